"""The report from synthetic run folders, whole and with parts missing."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from moe_train.evaluation.report import render, write_report
from moe_train.evaluation.run_files import RunFiles, read_run
from moe_train.evaluation.series import balance_by_layer, load_records, series, thin
from moe_train.evaluation.summary import summary_cards

NASTY = '<script>alert("x")</script> & $y$'


def train_record(step: int, layers: int = 2, experts: int = 8) -> dict[str, Any]:
    return {
        "kind": "train",
        "step": step,
        "tokens": step * 1000,
        "loss": 9 - math.log(step),
        "lr": 1e-3,
        "grad_norm": 1.0,
        "tokens_per_second": 5000.0,
        "step_seconds": 0.2,
        "memory_bytes": 2**30,
        "mfu": 0.25,
        "aux/switch": 1.1,
        "balance/gini": 0.2,
        "balance/drop_rate": 0.01,
        "balance/mean_k": 2.0 + step / 100,
        "load": [[(step * (e + layer)) % 97 for e in range(experts)] for layer in range(layers)],
    }


def evaluation(layers: int = 2, experts: int = 8) -> dict[str, Any]:
    load = [[10 + e for e in range(experts)] for _ in range(layers)]
    stats = {"gini": 0.1, "gini_floor": 0.01, "min_max": 0.5}
    domain = {"loss": 3.0, "tokens": 50, "bits_per_byte": 1.0, "load": load}
    return {
        "step": 100,
        "data": "data/validation",
        "loss": 4.25,
        "perplexity": 70.1,
        "bits_per_byte": 1.75,
        "tokens": 100,
        "unigram_entropy": 6.5,
        "layers": [{"layer": i, **stats, "load": load[i]} for i in range(layers)],
        "mean": stats,
        "domains": {NASTY: domain, "none": {**domain, "loss": None, "tokens": 0, "load": [[0] * experts] * layers}},
    }


def make_run(folder: Path, *, records: int = 5, layers: int = 2, experts: int = 8, name: str = "demo") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [train_record(10 * i, layers, experts) for i in range(1, records + 1)]
    lines.append({"kind": "eval", "step": 20, "eval/loss": 5.0, "eval/perplexity": 148.0, "balance": {"gini": 0.1}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {"name": name, "model": {"family": "qwen3_moe"}, "data": {"validation": "data/validation"}}
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "evaluation").mkdir(exist_ok=True)
    (folder / "evaluation" / "validation.json").write_text(json.dumps(evaluation(layers, experts)))
    environment = {"command": ["train", NASTY], "model": {"total_parameters": 15_400_000}, "commit": None}
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not drawn, which is what takes the time."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: file.write(b"not drawn"))


class Reader(HTMLParser):
    """Collects what a browser would see: text, tags, and every address that it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"tags that are not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "data", "action")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style",):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def test_whole_run_is_shown_in_one_self_contained_file(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path / "demo"))
    assert path == tmp_path / "demo" / "report.html"
    page = Reader(path.read_text(encoding="utf-8"))
    for expected in ("demo", "4.2500", "70.1000", "1.7500", "6.5000", "2.2500", "15.4 M", "unigram", "0.0100"):
        assert expected in page.text, expected
    for title in ("Loss", "Optimisation", "Balance over time", "Expert load", "Evaluation", "Domains", "Environment"):
        assert title in page.text, title
    assert page.tags.count("img") >= 12
    # Self-contained:
    text = path.read_text(encoding="utf-8")
    assert page.addresses and all(address.startswith("data:image/") for address in page.addresses)
    assert not re.search(r"@import|url\(|<link|<script|<iframe", text)


def test_routing_in_detail_and_alarms(tmp_path: Path, quick: None) -> None:
    run = make_run(tmp_path)
    alarm = {"kind": "alarm", "step": 15, "cause": "entropy", "layer": 1, "state": "began", "message": NASTY}
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        for cause in ("entropy", "load_share"):
            file.write(json.dumps({**alarm, "cause": cause, "advice": "a smaller optimizer.lr"}) + "\n")
    meter = {"gini": 0.1, "min_max": 1.27e-16, "cv": 0.2, "utilisation": 1.0}
    whole = evaluation()
    for layer in whole["layers"]:
        layer["k_histogram"] = [0, 3, 5, 2]
        layer["coactivation"] = [[1 + (i + j) % 3 for j in range(8)] for i in range(8)]
        layer["moving_average_of_lpr"] = {"masked": meter, "unmasked": None}
    rows = [{"layer": 0, "same_slots": 0.81, "jaccard": None, "same_by_chance": 0.25}]
    whole["stability"] = {"checkpoint": NASTY, "step": 50, "layers": rows, "mean": {"same_slots": 0.81}}
    (run / "evaluation" / "validation.json").write_text(json.dumps(whole))
    before = Reader(render(read_run(make_run(tmp_path / "before"))))
    page = Reader(render(read_run(run)))
    assert "2 alarms" in page.text and "Against entropy and load_share try a smaller optimizer.lr." in page.text
    for expected in (
        "Routing in detail",
        "0.8100",
        "1.27e-16",
        "without padding",
        "Experts per token",
        "chosen together",
    ):
        assert expected in page.text and expected not in before.text, expected
    assert "with padding" not in page.text and "Collapse alarm" not in before.text
    assert page.tags.count("img") == before.tags.count("img") + 2
    assert "script" not in page.tags


def test_bad_numbers_are_listed(tmp_path: Path, quick: None) -> None:
    run = make_run(tmp_path)
    assert "Bad numbers" not in Reader(render(read_run(run))).text
    record = {"kind": "guard", "step": 15, "bad_step": 18, "action": "skip", "message": NASTY}
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        for action in ("skip", "skip", "rewind"):
            file.write(json.dumps({**record, "action": action}) + "\n")
    page = Reader(render(read_run(run)))
    assert "Bad numbers" in page.text and "1 x rewind, 2 x skip." in page.text and f"skip: {NASTY}" in page.text


def test_one_number_of_experts_needs_no_histogram(tmp_path: Path, quick: None) -> None:
    run = make_run(tmp_path)
    whole = evaluation()
    for layer in whole["layers"]:
        layer |= {"k_histogram": [0, 9], "coactivation": [[int(i == j) for j in range(8)] for i in range(8)]}
    (run / "evaluation" / "validation.json").write_text(json.dumps(whole))
    assert "Routing in detail" not in render(read_run(run)), "one expert per token: no pairs, and nothing to count"


@pytest.mark.parametrize(("loss", "words"), [(4.0, "below"), (7.0, "ABOVE")])
def test_the_distance_to_the_unigram_entropy_says_what_is_subtracted(loss: float, words: str) -> None:
    run = RunFiles(Path(), evaluations={"v": {**evaluation(), "loss": loss}})
    [card] = [card for card in summary_cards(run) if card[0] == f"nats {words} unigram"]
    formula = {"below": "unigram entropy - loss", "ABOVE": "loss - unigram entropy"}[words]
    assert card[1:] == (f"{abs(6.5 - loss):.4f}", formula)


def test_all_text_is_escaped(tmp_path: Path, quick: None) -> None:
    run = make_run(tmp_path, name=NASTY)
    (run / "evaluation" / "<b>bold.json").write_text(json.dumps({**evaluation(), "data": NASTY}))
    (run / "evaluation" / "broken<i>.json").write_text("{")
    text = render(read_run(run))
    page = Reader(text)
    assert not {"script", "b", "i"} & set(page.tags)
    assert page.text.count(NASTY) >= 3, "name, domain and command are shown as they are"
    assert "<b>bold" in page.text and "broken<i>.json" in page.text


def test_one_record_only(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(train_record(1)) + "\n")
    page = Reader(render(read_run(tmp_path)))
    assert "training loss" in page.text and "9" in page.text and "Expert load in training" in page.text
    assert "Evaluation" not in page.text


@pytest.mark.parametrize("missing", ["metrics.jsonl", "config.yaml", "environment.json", "evaluation/validation.json"])
def test_each_part_may_be_missing(tmp_path: Path, missing: str, quick: None) -> None:
    run = make_run(tmp_path)
    (run / missing).unlink()
    Reader(render(read_run(run)))


def test_dense_model_without_loads(tmp_path: Path, quick: None) -> None:
    record = {**train_record(1), "load": []}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    page = Reader(render(read_run(tmp_path)))
    assert "Expert load in training" not in page.text and "Balance over time" not in page.text


def test_nan_and_bad_lines(tmp_path: Path, quick: None) -> None:
    diverged = {**train_record(20), "loss": None, "grad_norm": None}
    lines = [json.dumps(train_record(10)), json.dumps(diverged), '{"kind": "tra']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    page = Reader(render(read_run(tmp_path)))
    assert "1 lines of metrics.jsonl" in page.text
    assert "training loss" in page.text


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not a run folder"):
        write_report(tmp_path)


def test_size_of_a_large_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, records=60, layers=20, experts=64)
    assert len(render(read_run(run))) < 3_000_000


def test_own_validation_set_comes_first(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    other = {**evaluation(), "data": "data/another", "loss": 1.5}
    (run / "evaluation" / "another.json").write_text(json.dumps(other))
    assert list(read_run(run).evaluations) == ["validation", "another"]


def test_thin_keeps_the_ends() -> None:
    assert thin(range(5), 10) == [0, 1, 2, 3, 4]
    thinned = thin(range(1001), 11)
    assert thinned == list(range(0, 1001, 100))
    assert thin(range(9), 1) == [8]


def test_series_leaves_out_what_is_null() -> None:
    line = series([{"step": 1, "x": 2.0}, {"step": 2, "x": None}, {"step": 3}], "x", scale=10)
    assert (line.steps, line.values) == ([1], [20.0])


def test_balance_is_recorded_or_recomputed_from_the_load() -> None:
    record = {"step": 1, "load": [[1, 2, 3, 4], [5, 5, 5, 5]], "balance/layer_1/gini": 0.125}
    assert [line.values for line in balance_by_layer([record], ["gini"])["gini"]] == [[pytest.approx(0.25)], [0.125]]


def test_layers_go_by_their_own_numbers() -> None:
    record = {"step": 1, "layers": [1, 5], "load": [[1, 2, 3, 4], [5, 5, 5, 5]], "balance/layer_5/gini": 0.125}
    lines = balance_by_layer([record], ["gini"])["gini"]
    assert [(line.label, line.values) for line in lines] == [("layer 1", [pytest.approx(0.25)]), ("layer 5", [0.125])]
    assert load_records([{**record, "layers": [0, 5]}, record]) == [record]


def test_loads_of_another_shape_are_left_out() -> None:
    records = [{"step": 1, "load": [[1, 2]]}, {"step": 2, "load": [[1, 2, 3]]}, {"step": 3}]
    assert load_records(records) == [records[1]]
