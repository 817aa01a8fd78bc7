from __future__ import annotations

import io
from pathlib import Path

import pytest

from moe_train.training.callbacks.base import RunInfo
from moe_train.training.callbacks.console import Console, console_line, duration, short_number

RUN = RunInfo("demo", Path("runs/demo"), total_steps=2000)
RECORD = {
    "kind": "train",
    "step": 100,
    "tokens": 1_638_400,
    "loss": 4.12344,
    "lr": 3e-4,
    "grad_norm": 0.912,
    "tokens_per_second": 12345.6,
    "step_seconds": 1.327,
    "memory_bytes": 3 * 2**30,
    "mfu": 0.331,
    "aux/switch": 1.0234,
    "aux/z": 0.5,
    "balance/gini": 0.1234,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_line_in_the_style_of_the_field() -> None:
    assert console_line(RECORD, RUN) == (
        "step  100/2000 | tokens 1.64M | 12,346 tokens/s | 1,327 ms/step | MFU 33.1% | lr 3.00e-04 | loss 4.1234 | "
        "switch 1.023 | z 0.5 | grad norm 0.912 | gini 0.123 | memory 3.00 GiB | ETA 0:42:01"
    )


def test_no_mfu_without_a_known_peak() -> None:
    assert "MFU" not in console_line({key: value for key, value in RECORD.items() if key != "mfu"}, RUN)


def test_validation_line() -> None:
    record = {"kind": "eval", "step": 100, "eval/loss": 3.0, "eval/perplexity": 20.0855, "balance": {"gini": 0.5}}
    assert console_line(record, RUN) == "step  100/2000 | validation loss 3.0000 | perplexity 20.0855 | gini 0.500"


def test_bad_numbers_line() -> None:
    record = {"kind": "guard", "step": 100, "bad_step": 120, "action": "leave_out", "message": "the loss is nan"}
    assert console_line(record, RUN) == "step  100/2000 | BAD NUMBERS, leave out | step 120: the loss is nan"


def test_log_has_plain_lines_and_no_bar() -> None:
    stream = io.StringIO()
    console = Console(stream)
    console.on_start(RUN)
    console.on_record(RECORD)
    console.on_end("finished")
    assert stream.getvalue().splitlines() == [console_line(RECORD, RUN), "run demo finished"]


def test_terminal_has_a_bar_and_the_same_line() -> None:
    stream = Terminal()
    console = Console(stream)
    console.on_start(RUN)
    console.on_record(RECORD)
    console.on_end("interrupted")
    text = stream.getvalue()
    assert console_line(RECORD, RUN) in text
    assert "100/2000" in text.replace(console_line(RECORD, RUN), "") and "\x1b[" in text


def test_run_names_with_markup_are_printed_as_they_are() -> None:
    stream = Terminal()
    console = Console(stream)
    console.on_start(RunInfo("[red]x[/red]", Path("x"), total_steps=1))
    console.on_end("finished")
    assert "run [red]x[/red] finished" in stream.getvalue()


@pytest.mark.parametrize(("value", "text"), [(950, "950"), (1234, "1.23K"), (999_900, "1000K"), (2.5e9, "2.5B")])
def test_short_number(value: float, text: str) -> None:
    assert short_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (3599.6, "1:00:00"), (90061, "1d 1:01:01"), (float("nan"), "?")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
