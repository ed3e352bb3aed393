"""The pictures that show errors: cumulative curves (Figure 4) and contact sheets (Figure 5)."""

from pathlib import Path

import numpy as np

from .drawing import contact_sheet, draw
from .evaluation import FAILURE, Evaluation
from .images import crop, face_box, square_box, to_crop, touches, write_image

STYLES = {"fit": "-", "heatmap maxima": "--", "mean shape": ":"}
"""Lines of the methods: dashed without the fit, as in Figure 4."""
MARKERS = {"fit": "D", "heatmap maxima": "o"}
TILE = 192
SHEET_COLUMNS = 8
SHEET_TILES, WORST = 40, 16


def draw_curves(
    models: dict[str, dict[str, Evaluation]],
    path: Path,
    title: str = "",
    published: dict[str, tuple[float, float]] | None = None,
    source: str = "",
) -> None:
    """The cumulative error curves of Figure 4, for each set of points: share of the faces with an error below x.

    Args:
        models: evaluations of the same faces by model and method ("fit", "heatmap maxima", "mean shape").
        published: medians by method for the sets of points, percent; they are marked at half of the faces.
        source: what the published medians are, for the legend.
    """
    import matplotlib.figure  # here: it takes half a second, and needs a folder to write to

    first = next(iter(next(iter(models.values())).values()))
    sets = first.point_sets()
    figure = matplotlib.figure.Figure(figsize=(1 + 4.2 * len(sets), 4.6), layout="constrained")
    panels = figure.subplots(1, len(sets), sharey=True, squeeze=False)[0]
    for index, (axes, (points, outline)) in enumerate(zip(panels, sets.items(), strict=True)):
        for color, methods in enumerate(models.values()):
            for method, evaluation in methods.items():
                _draw_curve(axes, evaluation.errors(outline), _color(method, color), STYLES[method])
        axes.axhline(0.5, color="0.7", linewidth=0.8, zorder=0)
        for method, medians in (published or {}).items():
            axes.plot(medians[index], 0.5, MARKERS[method], color="black", markerfacecolor="white", zorder=5)
        axes.set(xlim=(0, 100 * FAILURE), ylim=(0, 1), title=points if outline else f"{points}, without the outline")
        axes.set_xlabel(f"{first.normalisation} error [%]")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("share of the faces")
    figure.legend(handles=_legend(models, published or {}, source), loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=120)


def _draw_curve(axes, errors: np.ndarray, color: str, style: str) -> None:
    errors = np.sort(errors[~np.isnan(errors)])
    width = 1.4 if style == STYLES["fit"] else 1.0  # the dashed ones are many and close
    shares = np.arange(len(errors) + 1) / len(errors)
    axes.step([0, *(100 * errors)], shares, where="post", color=color, linestyle=style, linewidth=width)


def _color(method: str, index: int) -> str:
    """One colour a model; the mean shape is no model's."""
    return "0.4" if method == "mean shape" else f"C{index}"


def _legend(models: dict[str, dict[str, Evaluation]], published: dict, source: str) -> list:
    """A line for each model, then one for each way of reading its heatmaps, then the published points."""
    from matplotlib.lines import Line2D

    named = {name: f"C{index}" for index, name in enumerate(models) if name}
    lines = [Line2D([], [], color=color, label=name) for name, color in named.items()]
    methods = dict.fromkeys(method for evaluations in models.values() for method in evaluations)
    plain = "black" if named else "C0"
    for method in methods:
        color = "0.4" if method == "mean shape" else plain
        lines.append(Line2D([], [], color=color, linestyle=STYLES[method], label=method))
    for method in published:
        style = {"marker": MARKERS[method], "linestyle": "", "color": "black", "markerfacecolor": "white"}
        lines.append(Line2D([], [], label=f"{source}, {method}", **style))
    return lines


def draw_sheet(evaluation: Evaluation, path: Path) -> None:
    """Predictions sorted by error, evenly picked from best to worst, the worst ones in full (Figure 5)."""
    errors = evaluation.errors()
    order = np.argsort(errors)
    order = order[~np.isnan(errors[order])]
    rest = max(len(order) - WORST, 0)
    picked = np.unique(np.r_[np.linspace(0, rest - 1, min(SHEET_TILES - WORST, rest)).astype(int), rest : len(order)])
    tiles = [_tile(evaluation, index) for index in order[picked]]
    captions = [f"{100 * errors[index]:.2f} %" for index in order[picked]]
    sheet = contact_sheet(tiles, captions, SHEET_COLUMNS)
    write_image(path, sheet)


def _tile(evaluation: Evaluation, index: int) -> np.ndarray:
    box = square_box(face_box(evaluation.labelled[index]), 1.15)
    image = evaluation.faces[index].image(color=True)
    if not touches(box, image):  # its few labels all lie beside the picture
        box = square_box((0, 0, image.shape[1], image.shape[0]))
    return draw(crop(image, box, TILE), to_crop(evaluation.predicted[index], box, TILE))
