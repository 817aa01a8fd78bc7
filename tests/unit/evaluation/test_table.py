from __future__ import annotations

import io
from typing import Any

from moe_train.evaluation.table import balance_rows, number, plain_table, print_table


def evaluation(**changes: Any) -> dict[str, Any]:
    layer = {"gini": 0.25, "gini_floor": 0.0312, "min_max": 0.5, "dead_experts": 0.0}
    return {
        "step": 1200,
        "data": "data/[red]validation",
        "loss": 5.25,
        "perplexity": 190.566,
        "bits_per_byte": 1.9,
        "tokens": 123456,
        "unigram_entropy": 6.75,
        "layers": [{"layer": 0, **layer}, {"layer": 1, **layer, "gini": 0.75}],
        "mean": {**layer, "gini": 0.5},
    } | changes


def test_plain_text_when_the_output_is_no_terminal() -> None:
    stream = io.StringIO()
    print_table(evaluation(), stream)
    text = stream.getvalue()
    for expected in ("5.2500", "190.5660", "1.9000", "123,456", "1.5000", "data/[red]validation"):
        assert expected in text
    assert text.isascii() and "\x1b" not in text
    assert text.splitlines()[-3].split() == ["0", "0.2500", "0.0312", "0.5000", "0.0"]
    assert text.splitlines()[-1].split() == ["mean", "0.5000", "0.0312", "0.5000", "0.0"]


def test_the_same_numbers_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    print_table(evaluation(), stream)
    text = stream.getvalue()
    for expected in ("5.2500", "190.5660", "0.7500", "mean", "data/[red]validation"):
        assert expected in text


def test_what_is_not_known_is_left_out() -> None:
    text = plain_table(evaluation(bits_per_byte=None, unigram_entropy=None, data=None, step=None, perplexity=None))
    assert "bits per byte" not in text and "unigram" not in text
    assert "perplexity               -" in text
    assert balance_rows({"layers": [], "mean": {}}) == [["layer"]]


def test_documents_show_both_losses() -> None:
    documents = {"documents": 1500, "truncated": 7, "max_length": 512, "batch_documents": 25, "loss_batch_average": 5.5}
    text = plain_table(evaluation(documents=documents))
    assert "1,500, 7 cut at 512 tokens" in text
    assert "mean of batches of 25    5.5000" in text and "loss (nats per token)    5.2500" in text


def test_worse_than_unigram_is_a_negative_difference() -> None:
    assert "-1.0000" in plain_table(evaluation(loss=7.75))


def test_an_estimate_is_called_one() -> None:
    for sample, remark in ((None, "6.7500\n"), (1 << 26, "6.7500, estimated from 67,108,864 tokens\n")):
        assert f"unigram entropy          {remark}" in plain_table(evaluation(unigram_sample=sample))


def test_numbers() -> None:
    assert [number(value) for value in (None, 3, 3.0, 1234567, 0.12345, 0.0000123, 0.0)] == [
        *("-", "3", "3.0000", "1,234,567", "0.1235", "1.23e-05", "0.0000")
    ]  # fmt: skip
