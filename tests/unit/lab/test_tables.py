"""Tables, curves and the page of a comparison whose runs were made up."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from moe_train.evaluation.heatmaps import load_matrices
from moe_train.evaluation.plots import CYCLE
from moe_train.lab.curves import Band, band, points
from moe_train.lab.experiment import load_experiment
from moe_train.lab.markdown import PUBLISHED_TITLE, cell
from moe_train.lab.runner import execute
from moe_train.lab.table import Column
from moe_train.lab.writing import write_tables
from moe_train.training.account import active_parameters
from tests.unit.lab.experiments import FakeRunner, planned

FACTS = {"title": "Two <b>arms</b>", "date": "2026-01-02", "command": "moe-train compare 'a<b'", "commit": "f" * 40}
VOID = {"meta", "img", "br"}


def made(folder: Path, *, figures: bool = False, unfinished: str = "", **changes: Any) -> dict[str, Any]:
    runs = planned(folder, **changes)
    execute([run for run in runs if run.arm != unfinished], FakeRunner(), lambda text: None)
    _, _, experiment = load_experiment(str(folder / "two.yaml"))
    return write_tables(experiment, runs, folder / "out", FACTS, figures=figures)


def change(folder: Path, metrics: dict[str, Any]) -> None:
    path = folder / "result.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps({**result, "metrics": result["metrics"] | metrics}))


def rows(folder: Path) -> dict[str, list[str]]:
    """First cell of each row of the first table -> the others."""
    text = (folder / "out" / "table.md").read_text(encoding="utf-8").split("Mean over seeds")[0]
    cells = [re.split(r"(?<!\\)\|", line.strip("| ")) for line in text.splitlines() if line.startswith("| ")]
    return {row[0].strip(): [text.strip() for text in row[1:]] for row in cells}


def test_one_seed_has_dashes(tmp_path: Path) -> None:
    table = made(tmp_path, seeds=[1])
    plain = dict(zip(rows(tmp_path)["arm"], rows(tmp_path)["plain"], strict=True))
    assert plain["test loss"] == "4.1000 (-)"
    assert plain["Gini"] == "0.2100 (-)"
    assert plain["min-max"] == "0.0000 (-)"
    assert "One seed" in (tmp_path / "out" / "table.md").read_text()
    assert table["arms"][0]["metrics"]["loss"] == {"mean": 4.1, "low": None, "high": None, "values": [4.1]}


def test_several_seeds_have_intervals_and_paired_differences(tmp_path: Path) -> None:
    table = made(tmp_path)
    found = rows(tmp_path)
    plain, free = (dict(zip(found["arm"], found[name], strict=True)) for name in ("plain", r"k < \| $x$ <free>"))
    assert plain["test loss"] == "4.1500 (4.1000, 4.2000)"
    assert plain["mean k"] == "2.500", "the same in both seeds: no interval"
    assert plain["tokens/s"] == "1,000", "the first interval, which warms up, is left out"
    assert free["seeds"] == "2"
    difference = table["arms"][1]["difference_to_baseline"]["loss"]
    assert difference["mean"] == pytest.approx(-0.5) and difference["high"] == pytest.approx(-0.5)
    assert table["arms"][0]["difference_to_baseline"] is None
    text = (tmp_path / "out" / "table.md").read_text()
    assert "Difference to plain" in text and "-0.5000" in text and "50 %" in text
    assert "commit abc (this table: ffffffffffff)\n" in text and FACTS["command"] in text


def test_drops_are_those_of_training_and_active_experts_those_that_were_measured(tmp_path: Path) -> None:
    """The evaluation has no capacity, so that it drops nothing; k of dynamic_k_free has no bound but the 8 experts."""
    table = made(tmp_path, seeds=[1])
    free = dict(zip(rows(tmp_path)["arm"], rows(tmp_path)[r"k < \| $x$ <free>"], strict=True))
    assert free["dropped in training %"] == "10.00 (-)", "one step in four dropped a quarter, the others a twentieth"
    assert "dropped in evaluation %" not in free
    assert free["mean k"] == "2.500 (-)" and free["mean k in training"] == "3.500 (-)"
    config = planned(tmp_path, seeds=[1])[1].config
    assert free["active parameters"] == f"{active_parameters(config, 2.5):,}"
    assert table["arms"][1]["active_parameters"] == active_parameters(config, 2.5) < active_parameters(config)
    assert table["arms"][1]["metrics"]["evaluation_drop_rate"]["mean"] == 0.0


def test_drops_of_an_evaluation_with_a_capacity_have_their_column(tmp_path: Path) -> None:
    runs = planned(tmp_path, seeds=[1])
    execute(runs, FakeRunner(), lambda text: None)
    change(runs[1].folder, {"evaluation_drop_rate": 0.03})
    made(tmp_path, seeds=[1])
    found = dict(zip(rows(tmp_path)["arm"], rows(tmp_path)[r"k < \| $x$ <free>"], strict=True))
    assert found["dropped in evaluation %"] == "3.00 (-)"


def test_published_meters_have_a_table_where_an_arm_is_a_latent_prototype_gate(tmp_path: Path, quick: None) -> None:
    table = made(tmp_path, seeds=[1])
    assert PUBLISHED_TITLE not in (tmp_path / "out" / "table.md").read_text()
    assert table["arms"][0]["metrics"]["loss_batch_average"]["mean"] == pytest.approx(4.35), "the JSON has them always"
    folder = tmp_path / "lpr"
    folder.mkdir()
    made(folder, seeds=[1], arms={"plain": {}, "free": {"parts.router": "lpr"}}, figures=True)
    text = (folder / "out" / "table.md").read_text()
    after = text.split(PUBLISHED_TITLE)[1]
    assert "| arm | test loss, batch average | Gini, without padding | min-max, without padding |" in after
    assert r"| k < \| $x$ <free> | 3.8500 (-) | 0.2000 (-) | 1.0e-09 (-) |" in after
    assert PUBLISHED_TITLE in (folder / "out" / "report.html").read_text(encoding="utf-8")


def test_json_has_the_points_of_the_curves(tmp_path: Path) -> None:
    table = made(tmp_path)
    assert set(table["curves"]) == {"loss", "balance/gini"}
    assert table["curves"]["loss"]["plain"] == {
        "tokens": [512, 1024, 1536, 2048],
        "mean": [10.3, 10.1, 9.9, 9.7],
        "low": [9.8, 9.6, 9.4, 9.2],
        "high": [10.8, 10.6, 10.4, 10.2],
    }
    long = Band("x", 0, [float(n) for n in range(5000)], [1.0] * 5000, [1.0] * 5000, [1 / 3] * 5000)
    thinned = points(long)
    assert len(thinned["tokens"]) == len(thinned["high"]) <= 100
    assert (thinned["tokens"][0], thinned["tokens"][-1], thinned["high"][0]) == (0, 4999, 0.333333)
    text = (tmp_path / "out" / "table.json").read_text(encoding="utf-8")
    assert '"tokens": [512.0, 1024.0, 1536.0, 2048.0]' in text, "a row of numbers is one line"


def test_an_arm_without_a_result_is_a_row_of_dashes(tmp_path: Path) -> None:
    table = made(tmp_path, unfinished="free")
    assert set(rows(tmp_path)[r"k < \| $x$ <free>"][1:]) == {"-"}
    assert "Without a finished run: free." in table["notes"]
    assert (table["finished_runs"], table["planned_runs"]) == (2, 4)


def test_means_over_different_seeds_are_noted(tmp_path: Path) -> None:
    runs = planned(tmp_path)
    execute(runs[:3], FakeRunner(), lambda text: None)
    _, _, experiment = load_experiment(str(tmp_path / "two.yaml"))
    table = write_tables(experiment, runs, tmp_path / "out", FACTS, figures=False)
    assert any("not all arms are finished with the same seeds" in note for note in table["notes"])
    execute(runs, FakeRunner(), lambda text: None)
    table = write_tables(experiment, runs, tmp_path / "out", FACTS, figures=False)
    assert not any("same seeds" in note for note in table["notes"])


def test_json_is_the_table(tmp_path: Path) -> None:
    table = made(tmp_path)
    text = (tmp_path / "out" / "table.json").read_text(encoding="utf-8")
    assert json.loads(text) == table
    assert "NaN" not in text and "Infinity" not in text


def test_a_loss_that_is_not_a_number_is_a_dash(tmp_path: Path) -> None:
    runs = planned(tmp_path, seeds=[1])
    execute(runs, FakeRunner(), lambda text: None)
    change(runs[0].folder, {"loss": None})
    made(tmp_path, seeds=[1])
    assert rows(tmp_path)["plain"][2] == "-"


def test_runs_that_do_not_compare_are_noted(tmp_path: Path) -> None:
    runs = planned(tmp_path)
    execute(runs, FakeRunner(), lambda text: None)
    path = runs[1].folder / "result.json"
    result = json.loads(path.read_text()) | {"processes": 2, "evaluated_tokens": 7, "alarms": {"entropy": 2}}
    path.write_text(json.dumps(result))
    notes = " ".join(made(tmp_path)["notes"])
    assert "different numbers of processes" in notes and "different numbers of tokens" in notes
    assert "Collapse alarm in free: entropy began in 2 layers (seed 1)." in notes, "what is not known is not said"


def test_alarms_of_an_arm_are_one_note(tmp_path: Path) -> None:
    runs = planned(tmp_path, seeds=[1, 2, 3])
    execute(runs, FakeRunner(), lambda text: None)
    for run, began, on in zip(
        [run for run in runs if run.arm == "free"],
        ({"a": 1}, {"a": 3, "b": 1, "c": 2}, {"c": 2}),
        ({"a": 0}, {"a": 2, "b": 0, "c": 2}, None),
        strict=True,
    ):
        path = run.folder / "result.json"
        found = json.loads(path.read_text()) | {"alarms": began, "alarms_on_at_end": on}
        path.write_text(json.dumps(found))
    table = made(tmp_path, seeds=[1, 2, 3])
    assert (
        "Collapse alarm in free: a began in 1 to 3 layers, on at the end in 0 to 2 (seeds 1, 2);"
        " b began in 1 layer, on at the end in none (seed 2); c began in 2 layers (seeds 2, 3)." in table["notes"]
    )
    assert table["arms"][1]["alarms_on_at_end"] == {"1": {"a": 0}, "2": {"a": 2, "b": 0, "c": 2}, "3": None}


def test_the_commit_of_the_runs_is_told_apart_from_that_of_the_table(tmp_path: Path) -> None:
    runs = planned(tmp_path, seeds=[1])
    execute(runs, FakeRunner(), lambda text: None)
    for run in runs:
        path = run.folder / "result.json"
        result = json.loads(path.read_text())
        result["environment"]["commit"] = "e" * 40
        path.write_text(json.dumps(result))
    made(tmp_path, seeds=[1])
    assert "commit eeeeeeeeeeee (this table: ffffffffffff)" in (tmp_path / "out" / "table.md").read_text()


def test_small_values_are_not_rounded_away() -> None:
    column = Column("min-max", 4)
    assert cell(column, {"mean": 1.27e-16, "low": None, "high": None}) == "1.3e-16 (-)"
    assert cell(column, {"mean": 0.0, "low": None, "high": None}) == "0.0000 (-)"
    assert (
        cell(Column("x", 2, 100.0), {"mean": 0.5, "low": 0.25, "high": 0.75}, signed=True) == "+50.00 (+25.00, +75.00)"
    )


class Reader(HTMLParser):
    """Notes elements that are not closed, or close what is not open; and every address."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_well_formed_and_needs_nothing_else(tmp_path: Path, quick: None) -> None:
    made(tmp_path, figures=True)
    reader = Reader()
    reader.feed((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert reader.open == []
    assert len(reader.addresses) == 4, "two curves, two heat maps"
    assert all(address.startswith("data:image/svg") for address in reader.addresses)
    assert "Two <b>arms</b>" in reader.text and "k < | $x$ <free>" in reader.text
    text = (tmp_path / "out" / "table.md").read_text()
    paths = re.findall(r"\]\((figures/.*?)\)", text)
    assert all((tmp_path / "out" / path).is_file() for path in paths)
    assert len(paths) == 3, "two curves, and the load of all arms in one figure"
    assert "![Expert load](figures/expert_load.svg)" in text


def test_figures_can_be_drawn(tmp_path: Path) -> None:
    """With a label that matplotlib would take for a formula, and more arms than colours."""
    from moe_train.lab.curves import band_curves

    lines = [band(f"$x_{number}", number, [[{"step": 1, "tokens": 5, "a": 1.0}]], "a") for number in range(9)]
    assert band_curves(lines, "y", from_zero=True).startswith(b"<?xml")


def test_an_arm_has_the_same_colour_in_every_figure() -> None:
    """Also where an arm before it has no such curve: a dense model has no Gini."""
    from moe_train.lab.page import curve_bands, curve_figures

    dense, sparse = ({"step": 1, "tokens": 5, "loss": 2.0}, {"step": 1, "tokens": 5, "loss": 2.0, "balance/gini": 0.1})
    records = {"dense": [[dense]], "not run yet": [], "sparse": [[sparse]]}
    loss, gini = curve_figures(curve_bands({arm: arm for arm in records}, records)).values()
    colours = [set(re.findall(rb"#[0-9a-f]{6}", figure)) & {c.encode() for c in CYCLE} for figure in (loss, gini)]
    assert colours == [{CYCLE[0].encode(), CYCLE[2].encode()}, {CYCLE[2].encode()}]


def test_loads_of_different_models_can_be_drawn_in_one_figure() -> None:
    loads = [("$x_", [[1, 2], [0, 3], [4, 4]], [1, 2, 5]), ("b", [[5] * 16], [0]), ("b", [[0, 0]], [0])]
    assert load_matrices(loads).startswith(b"<?xml")


def test_a_band_is_of_the_steps_that_all_seeds_have() -> None:
    def records(*points: tuple[int, int, float | None]) -> list[dict[str, Any]]:
        return [{"step": step, "tokens": tokens, "loss": loss} for step, tokens, loss in points]

    found = band(
        "x",
        0,
        [records((1, 10, 4.0), (2, 20, 3.0), (3, 30, None)), records((1, 12, 2.0), (2, 24, 5.0), (4, 9, 1.0))],
        "loss",
    )
    assert found.tokens == [11.0, 22.0]
    assert (found.mean, found.low, found.high) == ([3.0, 4.0], [2.0, 3.0], [4.0, 5.0])
    assert band("x", 0, [], "loss").tokens == []
