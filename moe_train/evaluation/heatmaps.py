"""Heat maps of expert load. Colour is an expert's share relative to perfect balance on a log2 scale.

Suffixes: N records, L MoE layers, E experts, D domains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_train.evaluation.plots import figure, to_png, to_svg
from moe_train.evaluation.series import layer_numbers, thin

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STOPS = ("#1f4e79", "#82aad0", "#f7f7f5", "#f0a860", "#b35806")
UNUSED = "#2d2d2d"
MAX_LAYERS = 16
COLUMNS = 2
WIDTH = 11.0
TOP, BOTTOM, BETWEEN, RIGHT = 0.3, 0.5, 0.36, 0.95
"""Margins in inches: fixed, so that colour bars and panels keep their sizes for any number of layers."""


def relative_load(counts: Any) -> np.ndarray:
    """float64, last axis E: share of each expert times E. 1 is perfect balance; 0 without any load."""
    counts = np.asarray(counts, dtype=np.float64)
    total = counts.sum(axis=-1, keepdims=True)
    return np.divide(counts * counts.shape[-1], total, out=np.zeros_like(counts), where=total > 0)


def load_over_time(records: Sequence[Mapping[str, Any]]) -> tuple[bytes, list[int]]:
    """PNG with one panel per layer, experts by step, and the layers that are shown (evenly chosen above 16), by their
    places in ``load``."""
    load_NLE = relative_load([record["load"] for record in records])
    numbers = layer_numbers(records[-1])
    steps = [record["step"] for record in records]
    layers = thin(range(load_NLE.shape[1]), MAX_LAYERS)
    rows = -(-len(layers) // COLUMNS)
    with figure(WIDTH, _height(rows, 2.0), constrained=False) as fig:
        grid = _panels(fig, rows, left=0.65)
        image = None
        for panel, layer in zip(grid.flat, layers, strict=False):
            image = _image(panel, load_NLE[:, layer].T, extent=_step_extent(steps, load_NLE.shape[2]))
            panel.set_title(f"layer {numbers[layer]}")
        for panel in grid.flat[len(layers) :]:
            panel.set_visible(False)
        for panel in grid[:, 0]:
            panel.set_ylabel("expert")
        for panel in grid.flat[max(0, len(layers) - COLUMNS) : len(layers)]:
            panel.set_xlabel("step")
            panel.xaxis.set_tick_params(labelbottom=True)
            if len(set(steps)) == 1:
                panel.set_xticks(steps[:1])
        _colour_bar(fig, image, "load / balanced load")
        return to_png(fig), layers


def load_matrix(load_LE: Sequence[Sequence[int]], numbers: Sequence[int] | None = None) -> bytes:
    """SVG: layers by experts. ``numbers``: those of the layers; 0, 1, … without."""
    relative_LE = relative_load(load_LE)
    layers, experts = relative_LE.shape
    with figure(WIDTH, _height(1, min(6.0, max(1.3, 0.34 * layers))), constrained=False) as fig:
        axes = _panels(fig, 1, left=0.65, columns=1)[0, 0]
        image = _image(axes, relative_LE, extent=(-0.5, experts - 0.5, layers - 0.5, -0.5))
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        rows = thin(range(layers), 12)
        axes.set_yticks(rows, [str(row if numbers is None else numbers[row]) for row in rows])
        axes.set_xticks(thin(range(experts), 17) if experts > 32 else range(experts))
        if layers * experts <= 2048:
            _cell_borders(axes, layers, experts)
        _colour_bar(fig, image, "load / balanced load")
        return to_svg(fig)


def load_matrices(loads: Sequence[tuple[str, Sequence[Sequence[int]], Sequence[int]]]) -> bytes:
    """SVG with one panel per model, layers by experts. ``loads``: title, load_LE and numbers of the layers of each."""
    rows = -(-len(loads) // COLUMNS)
    most = max(len(numbers) for _, _, numbers in loads)
    panel = min(3.0, max(0.6, 0.16 * most))
    between = BETWEEN + 0.2  # Experts differ from model to model: each panel has its own axis.
    height = TOP + rows * panel + (rows - 1) * between + BOTTOM
    with figure(WIDTH, height, constrained=False) as fig:
        grid = fig.subplots(rows, COLUMNS, squeeze=False)
        fig.subplots_adjust(0.5 / WIDTH, BOTTOM / height, 1 - RIGHT / WIDTH, 1 - TOP / height, 0.09, between / panel)
        image = None
        for axes, (title, load_LE, numbers) in zip(grid.flat, loads, strict=False):
            layers, experts = relative_load(load_LE).shape
            image = _image(axes, relative_load(load_LE), extent=(-0.5, experts - 0.5, layers - 0.5, -0.5))
            axes.set_title(shorten(title, 60), fontsize=9, fontweight="normal")
            shown = thin(range(layers), 4)
            axes.set_yticks(shown, [str(numbers[row]) for row in shown])
            axes.set_xticks(range(0, experts, -(-experts // 8)))
        for axes in grid.flat[len(loads) :]:
            axes.set_visible(False)
        for axes in grid[:, 0]:
            axes.set_ylabel("layer")
        for axes in grid.flat[max(0, len(loads) - COLUMNS) : len(loads)]:
            axes.set_xlabel("expert")
        _colour_bar(fig, image, "load / balanced load")
        return to_svg(fig)


def domain_matrix(
    domains: Mapping[str, Mapping[str, Any]], numbers: Sequence[int] | None = None
) -> tuple[bytes, list[int]]:
    """PNG with one panel per layer, domains by experts, and the layers shown. Colour: the expert's share of the
    domain's slots relative to its share of all slots, so that 1 means no specialisation. ``numbers``: those of the
    layers; 0, 1, … without."""
    names = list(domains)
    load_DLE = np.asarray([domains[name]["load"] for name in names], dtype=np.float64)
    share_DLE = relative_load(load_DLE)
    share_LE = relative_load(load_DLE.sum(axis=0))
    ratio_DLE = np.divide(share_DLE, share_LE[None], out=np.ones_like(share_DLE), where=share_LE[None] > 0)
    layers = thin(range(load_DLE.shape[1]), MAX_LAYERS)
    rows = -(-len(layers) // COLUMNS)
    with figure(WIDTH, _height(rows, 0.3 + 0.24 * len(names)), constrained=False) as fig:
        grid = _panels(fig, rows, left=0.35 + 0.08 * max(len(shorten(name)) for name in names))
        image = None
        experts = load_DLE.shape[2]
        for panel, layer in zip(grid.flat, layers, strict=False):
            image = _image(panel, ratio_DLE[:, layer], extent=(-0.5, experts - 0.5, len(names) - 0.5, -0.5))
            panel.set_title(f"layer {layer if numbers is None else numbers[layer]}")
            panel.set_yticks(range(len(names)), [shorten(name) for name in names])
        for panel in grid.flat[len(layers) :]:
            panel.set_visible(False)
        for panel in grid.flat[max(0, len(layers) - COLUMNS) : len(layers)]:
            panel.set_xlabel("expert")
            panel.xaxis.set_tick_params(labelbottom=True)
        _colour_bar(fig, image, "share in domain / share overall")
        return to_png(fig), layers


def pair_ratio(pairs_LEE: Sequence[Sequence[Sequence[int]]]) -> np.ndarray:
    """float64 [L, E, E]: how often two experts are chosen together, relative to what their loads alone let expect. 1 is
    that, also on the diagonal, which says nothing; 0 a pair that never occurs.

    c_ij / (c_i c_j) over its mean with weights c_i c_j, i and j different: tokens that choose k different experts have
    fewer pairs than independent draws, which is no preference.
    """
    counts = np.asarray(pairs_LEE, dtype=np.float64)
    load_LE = np.diagonal(counts, axis1=1, axis2=2)
    other_EE = ~np.eye(counts.shape[1], dtype=bool)
    product = load_LE[:, :, None] * load_LE[:, None, :] * other_EE
    pairs = counts * other_EE
    scale_L = np.divide(product.sum((1, 2)), pairs.sum((1, 2)), out=np.zeros(len(counts)), where=pairs.sum((1, 2)) > 0)
    ratio = np.divide(pairs * scale_L[:, None, None], product, out=np.zeros_like(counts), where=product > 0)
    return np.where(other_EE, ratio, 1.0)


def pair_matrices(pairs_LEE: Sequence[Sequence[Sequence[int]]], numbers: Sequence[int]) -> bytes:
    """PNG with one panel per layer (evenly chosen above 16), experts by experts; ``numbers``: those of the layers."""
    ratio_LEE = pair_ratio(pairs_LEE)
    experts = ratio_LEE.shape[1]
    layers = thin(range(len(ratio_LEE)), MAX_LAYERS)
    rows = -(-len(layers) // COLUMNS)
    with figure(11.0, _height(rows, 3.2), constrained=False) as fig:
        grid = _panels(fig, rows, left=0.65)
        image = None
        for panel, layer in zip(grid.flat, layers, strict=False):
            image = _image(panel, ratio_LEE[layer], extent=(-0.5, experts - 0.5, experts - 0.5, -0.5))
            panel.set_title(f"layer {numbers[layer]}")
        for panel in grid.flat[len(layers) :]:
            panel.set_visible(False)
        for panel in grid[:, 0]:
            panel.set_ylabel("expert")
        for panel in grid.flat[max(0, len(layers) - COLUMNS) : len(layers)]:
            panel.set_xlabel("expert")
            panel.xaxis.set_tick_params(labelbottom=True)
        _colour_bar(fig, image, "together / expected")
        return to_png(fig)


def shorten(name: str, most: int = 24) -> str:
    """Text for an axis. A dollar sign would start matplotlib's formula mode."""
    name = name if len(name) <= most else name[: most - 1] + "…"
    return name.replace("$", r"\$")


def _image(axes: Axes, relative: np.ndarray, extent: tuple[float, float, float, float]) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("load", STOPS)
    # Experts without load are not a shade of blue: they are painted first, and left out of the image above.
    axes.set_facecolor(UNUSED)
    level = np.ma.log2(np.ma.masked_equal(relative, 0.0))
    axes.grid(False)
    return axes.imshow(
        level, cmap=colours, vmin=-2, vmax=2, aspect="auto", interpolation="nearest", extent=extent, origin="upper"
    )


def _step_extent(steps: Sequence[int], experts: int) -> tuple[float, float, float, float]:
    half = (steps[-1] - steps[0]) / max(len(steps) - 1, 1) / 2 or 0.5
    return steps[0] - half, steps[-1] + half, experts - 0.5, -0.5


def _cell_borders(axes: Axes, layers: int, experts: int) -> None:
    axes.set_xticks(np.arange(-0.5, experts), minor=True)
    axes.set_yticks(np.arange(-0.5, layers), minor=True)
    axes.grid(which="minor", color="white", linewidth=1.0)
    axes.tick_params(which="minor", length=0)


def _height(rows: int, panel: float) -> float:
    """Height in inches of a figure with so many rows of panels."""
    return TOP + rows * panel + (rows - 1) * BETWEEN + BOTTOM


def _panels(fig: Figure, rows: int, left: float, columns: int = COLUMNS) -> np.ndarray:
    """Axes [rows, columns] inside of the margins."""
    width, height = fig.get_size_inches()
    panel = (height - TOP - BOTTOM - (rows - 1) * BETWEEN) / rows
    grid = fig.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    fig.subplots_adjust(left / width, BOTTOM / height, 1 - RIGHT / width, 1 - TOP / height, 0.06, BETWEEN / panel)
    return grid


def _colour_bar(fig: Figure, image: Any, label: str) -> None:
    width, height = fig.get_size_inches()
    tall = min(3.0, height - TOP - BOTTOM)
    axes = fig.add_axes(((width - RIGHT + 0.18) / width, 1 - (TOP + tall) / height, 0.14 / width, tall / height))
    labels = {-2: "≤ ¼", -1: "½", 0: "1", 1: "2", 2: "≥ 4"}
    if tall < 1.2:
        labels = {level: labels[level] for level in (-2, 0, 2)}
    bar = fig.colorbar(image, cax=axes, ticks=list(labels))
    axes.set_yticklabels(list(labels.values()))
    if tall > 2:
        bar.set_label(label, labelpad=2)
    bar.outline.set_visible(False)
    axes.grid(False)
