"""Curves of several arms over the tokens that they were trained on, with a band over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_train.evaluation.plots import CYCLE, WIDE, figure, finish, one_axes, to_svg
from moe_train.evaluation.run_files import Record
from moe_train.evaluation.series import MAX_POINTS, thin

JSON_POINTS = 100
STYLES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))


@dataclass(frozen=True)
class Band:
    """One arm: the mean over its seeds and the range between the lowest and the highest."""

    label: str
    number: int
    """Of the arm in its comparison: an arm has the same colour in every figure, also where others have no curve."""
    tokens: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def band(label: str, number: int, runs: Sequence[Sequence[Record]], key: str) -> Band:
    """``runs``: the records of each seed. Steps that all seeds have recorded; tokens are averaged over the seeds, which
    differ in them where documents are padded."""
    by_step = [{record["step"]: record for record in records if _is_number(record.get(key))} for records in runs]
    common = sorted(set.intersection(*(set(records) for records in by_step))) if by_step else []
    steps = thin(common, MAX_POINTS)
    values = [[float(records[step][key]) for records in by_step] for step in steps]
    return Band(
        label=label,
        number=number,
        tokens=[sum(records[step]["tokens"] for records in by_step) / len(by_step) for step in steps],
        mean=[sum(found) / len(found) for found in values],
        low=[min(found) for found in values],
        high=[max(found) for found in values],
    )


def bands(labels: Mapping[str, str], records: Mapping[str, Sequence[Sequence[Record]]], key: str) -> dict[str, Band]:
    """One for each arm that has recorded ``key``, by its name."""
    found = {arm: band(labels[arm], number, runs, key) for number, (arm, runs) in enumerate(records.items()) if runs}
    return {arm: one for arm, one in found.items() if one.tokens}


def points(line: Band) -> dict[str, list[float]]:
    """A band for table.json: at most `JSON_POINTS` of its points, to six digits."""
    shown = thin(range(len(line.tokens)), JSON_POINTS)
    columns = {"tokens": line.tokens, "mean": line.mean, "low": line.low, "high": line.high}
    found = {name: [float(f"{values[place]:.6g}") for place in shown] for name, values in columns.items()}
    return found | {"tokens": [line.tokens[place] for place in shown]}


_INSIDE = 7
"""Names of lines that find room among the lines; more stand beside the axes."""


def band_curves(lines: Sequence[Band], y_label: str, *, from_zero: bool = False) -> bytes:
    """SVG: one line for each arm over million tokens, its band behind it where there are several seeds."""
    width, height = WIDE[0], WIDE[1] + 0.9
    with figure(width, height, constrained=False) as fig:
        axes = one_axes(fig, "", y_label)
        for line in lines:
            colour, style = CYCLE[line.number % len(CYCLE)], STYLES[line.number // len(CYCLE) % len(STYLES)]
            millions = [count / 1e6 for count in line.tokens]
            if line.low != line.high:
                axes.fill_between(millions, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
            marker = "o" if len(millions) == 1 else None
            axes.plot(millions, line.mean, color=colour, linestyle=style, label=line.label, marker=marker)
        if from_zero:
            axes.set_ylim(bottom=0)
        finish(axes, "", y_label)
        _million_tokens(axes)
        if len(lines) > _INSIDE:
            left, bottom, width, height = axes.get_position().bounds
            axes.set_position((left, bottom, 0.75 * width, height))
            axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)
        else:
            axes.legend(loc="best")
        return to_svg(fig)


def _million_tokens(axes: object) -> None:
    """``finish`` is for steps, which are whole numbers."""
    from matplotlib.axes import Axes
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    assert isinstance(axes, Axes)
    axes.set_xlabel("training tokens (million)")
    axes.xaxis.set_major_locator(MaxNLocator(10))
    axes.xaxis.set_major_formatter(ScalarFormatter())


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
