"""The curves of the report, as SVG. One palette and one style for all figures.

matplotlib is used through its Figure class only: no window system and no global state.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moe_train.evaluation.series import Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, GREY, INK = "#1f4e79", "#c8690f", "#3d7a4e", "#a83246", "#8a8f98", "#2b2f36"
CYCLE = (BLUE, ORANGE, GREEN, RED, "#6a4c93", "#2a8c9a", "#8c6d31", GREY)
WIDE, MEDIUM, SMALL = (10.8, 3.4), (5.3, 2.9), (3.5, 2.4)
"""Sizes in inches: alone, two or three beside each other."""
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": "#555b66",
    "axes.edgecolor": "#c4c8cf",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8eaee",
    "grid.linewidth": 0.8,
    "xtick.color": "#555b66",
    "ytick.color": "#555b66",
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "moe_train",
}


@contextmanager
def figure(width: float, height: float, constrained: bool = True) -> Iterator[Figure]:
    """An empty figure of this size in inches, in the report's style."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the report needs matplotlib: pip install matplotlib") from None
    style: Any = STYLE
    with matplotlib.rc_context(style):
        yield Figure(figsize=(width, height), layout="constrained" if constrained else None)


def to_svg(fig: Figure) -> bytes:
    """The figure as an SVG file, the same bytes for the same figure."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def to_png(fig: Figure, dpi: int = 130) -> bytes:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def curves(
    title: str,
    lines: Sequence[Series],
    *,
    y_label: str = "",
    marked: Series | None = None,
    level: tuple[str, float] | None = None,
    from_zero: bool = False,
    log: bool = False,
    size: tuple[float, float] = SMALL,
) -> bytes:
    """Lines over steps. ``marked`` is a series of few points, drawn with markers; ``level`` a horizontal line.
    ``log`` where the values span more than a factor of 20."""
    with figure(*size, constrained=False) as fig:
        axes = one_axes(fig, title, y_label)
        for line, colour in zip(lines, _colours(len(lines)), strict=True):
            draw_line(axes, line, color=colour)
        if marked:
            draw_line(axes, marked, color=ORANGE, marker="o", markersize=4.5, markeredgecolor="white", linewidth=1.3)
        if level is not None:
            axes.axhline(level[1], color=GREY, linestyle=(0, (4, 3)), linewidth=1.2, label=level[0])
        values = [value for line in (*lines, *([marked] if marked else [])) for value in line.values]
        if log and values and min(values) > 0 and max(values) > 20 * min(values):  # else: no label
            axes.set_yscale("log")
        elif from_zero:
            from_zero_up(axes)
        finish(axes, title, y_label)
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend(loc="best")
        return to_svg(fig)


def layer_curves(
    title: str,
    layers: Sequence[Series],
    *,
    y_label: str = "",
    floor: Series | None = None,
    size: tuple[float, float] = MEDIUM,
) -> bytes:
    """One thin line per layer, coloured from the first to the last, and their mean on top."""
    with figure(*size, constrained=False) as fig:
        axes = one_axes(fig, title, y_label)
        colours = layer_colours(len(layers))
        many = len(layers) > 6
        for index, (line, colour) in enumerate(zip(layers, colours, strict=True)):
            label = line.label if not many or index in (0, len(layers) - 1) else None
            draw_line(axes, Series(label or "_", line.steps, line.values), color=colour, linewidth=1.1, alpha=0.9)
        if len(layers) > 1:
            mean = [sum(values) / len(values) for values in zip(*(line.values for line in layers), strict=True)]
            draw_line(axes, Series("mean", layers[0].steps, mean), color=INK, linewidth=2.2)
        if floor:
            draw_line(axes, floor, color=RED, linestyle=(0, (4, 3)), linewidth=1.2)
        from_zero_up(axes)
        finish(axes, title, y_label)
        axes.legend(loc="best", ncols=2)
        return to_svg(fig)


def k_histogram(counts_LK: Sequence[Sequence[int]], numbers: Sequence[int]) -> bytes:
    """SVG: share of the tokens by number of experts, one line per layer."""
    from matplotlib.ticker import MaxNLocator

    with figure(11.0, 2.8) as fig:
        axes = fig.subplots()
        colours = layer_colours(len(counts_LK))
        for index, (counts_K, colour) in enumerate(zip(counts_LK, colours, strict=True)):
            total = sum(counts_K) or 1
            shown = len(counts_LK) <= 8 or index in (0, len(counts_LK) - 1)
            axes.plot(
                range(len(counts_K)),
                [100 * count / total for count in counts_K],
                marker="o",
                markersize=3.5,
                color=colour,
                label=f"layer {numbers[index]}" if shown else None,
            )
        axes.set_ylim(bottom=0)
        axes.set_xlabel("experts per token")
        axes.set_ylabel("% of tokens")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="best", ncols=2)
        return to_svg(fig)


def one_axes(fig: Figure, title: str, y_label: str) -> Axes:
    """Axes with margins in inches that do not depend on the labels, so that those of neighbours are in line (and
    nothing has to be drawn twice to find them)."""
    width, height = fig.get_size_inches()
    left, right, bottom, top = 0.78 if y_label else 0.62, 0.14, 0.5, 0.32 if title else 0.1
    return fig.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height))


def draw_line(axes: Axes, line: Series, **style: Any) -> None:
    """A line; a single point gets a marker, for a line of one point is invisible."""
    if len(line.steps) == 1:
        style.setdefault("marker", "o")
    axes.plot(line.steps, line.values, label=line.label, **style)


def from_zero_up(axes: Axes) -> None:
    """The y axis from zero, with air above the highest point."""
    highest = axes.dataLim.y1
    axes.set_ylim(0, 1.08 * highest if math.isfinite(highest) and highest > 0 else 1.0)


def finish(axes: Axes, title: str, y_label: str) -> None:
    """Title, labels, and thousands separators on both axes."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    if title:
        axes.set_title(title)
    axes.set_xlabel("step")
    if y_label:
        axes.set_ylabel(y_label)
    width = axes.get_window_extent().width / axes.figure.dpi
    if axes.dataLim.width > 0:
        axes.xaxis.set_major_locator(MaxNLocator(5 if width < 5 else 10, integer=True))
    else:
        axes.set_xticks([axes.dataLim.x0])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        highest = max(abs(limit) for limit in axes.get_ylim())
        if highest >= 1000:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        elif highest < 0.01:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.margins(x=0.02)


def layer_colours(count: int) -> list[Any]:
    """From light to dark blue-green, so that depth can be read off the colour."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.08 + 0.8 * i / max(count - 1, 1)) for i in range(count)]


def _colours(count: int) -> list[str]:
    return [CYCLE[i % len(CYCLE)] for i in range(count)]
