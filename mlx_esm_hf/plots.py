"""Plots of what the jobs compute: every picture of the commands, the notebooks and the documentation.

Each function draws plain arrays and returns the figure. With `axes` it draws into a figure of the caller. Colours are
safe for colour-blind readers: viridis, cividis, a red-blue scale, and the palette of Okabe and Ito.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The palette of Okabe and Ito (https://jfly.uni-koeln.de/color/), its strongest colours first.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
BLUE, VERMILLION = PALETTE[:2]
GREY = "#B8B8B8"
DPI = 150
# AlphaFold's levels of pLDDT: lower end, name, colour in AlphaFold DB.
PLDDT_LEVELS = (
    (0, "very low", "#FF7D45"),
    (50, "low", "#FFDB13"),
    (70, "confident", "#65CBF3"),
    (90, "very high", "#0053D6"),
)
WIDEST = 24  # inches
STEPS = 12  # pieces of a drawn backbone between two residues
TICKS = 60  # labels along a sequence, at most


def contact_map(
    probabilities: np.ndarray,
    known: np.ndarray | None = None,
    top: Iterable[tuple[int, int, float]] = (),
    title: str = "",
    axes: Axes | None = None,
) -> Figure:
    """Draw predicted contacts above the diagonal and, if given, known contacts below it.

    Args:
        probabilities: predicted probabilities of a contact, [residues, residues].
        known: 1 for a contact, 0 for none, NaN where the structure has no residue, [residues, residues].
        top: predicted contacts (i, j, probability), residues counted from 1, to compare with the known ones.
        title: the title.
        axes: where to draw; a new figure by default.

    Returns:
        The figure.
    """
    from matplotlib.colors import ListedColormap

    axes = _new_axes(6.4, 5.5) if axes is None else axes
    ends = (0.5, len(probabilities) + 0.5)
    extent = (*ends, *ends)
    upper = probabilities if known is None else np.where(np.tri(len(probabilities), k=-1) > 0, probabilities, np.nan)
    image = axes.imshow(upper, cmap="Blues", vmin=0, vmax=1, origin="lower", extent=extent)
    if known is not None:
        lower = np.where(np.triu(np.nan_to_num(known), k=1) > 0, 1.0, np.nan)
        axes.imshow(lower, cmap=ListedColormap([GREY]), origin="lower", extent=extent)
        axes.plot(ends, ends, color="black", linewidth=0.8)
        _mark_predicted(axes, known, top)
        axes.set(xlim=ends, ylim=ends)
    axes.set_title(title.strip(), fontsize=10, parse_math=False)
    axes.set(xlabel="residue", ylabel="residue")
    _whole_numbers(axes.xaxis, axes.yaxis)
    axes.figure.colorbar(image, ax=axes, label="predicted probability of a contact", shrink=0.85)
    return _figure(axes)


def _mark_predicted(axes: Axes, known: np.ndarray, top: Iterable[tuple[int, int, float]]) -> None:
    """Mark predicted contacts among the known ones, the right and the wrong by colour and shape."""
    from matplotlib.patches import Patch

    pairs = np.array([(i, j) for i, j, _ in top if not np.isnan(known[i - 1, j - 1])], int).reshape(-1, 2)
    right = known[pairs[:, 0] - 1, pairs[:, 1] - 1] > 0
    size = (220 / len(known)) ** 2
    handles: list[Any] = [Patch(color=GREY, label="known contact")]
    for chosen, colour, marker, label in (
        (right, BLUE, "o", "top prediction, right"),
        (~right, VERMILLION, "x", "top prediction, wrong"),
    ):
        if chosen.any():
            # i < j, so that x = j and y = i are below the diagonal.
            i, j = pairs[chosen].T
            handles.append(axes.scatter(j, i, s=size, color=colour, marker=marker, linewidths=1, label=label))
    axes.legend(handles=handles, loc="upper left", fontsize=7, framealpha=0.9)


def mutation_scan(
    scores: np.ndarray,
    wild_type: Sequence[str],
    residues: Sequence[str],
    first_residue: int = 1,
    title: str = "",
    axes: Axes | None = None,
) -> Figure:
    """Draw the scores of all substitutions as a heat map, with a dot in the cells of the wild type.

    Args:
        scores: log p(mutant) - log p(wild type), [residues to substitute, positions].
        wild_type: the residue at each position.
        residues: the residue of each row.
        first_residue: number of the first position.
        title: the title.
        axes: where to draw; a new figure by default.

    Returns:
        The figure.
    """
    axes = _new_axes(min(max(6, len(wild_type) / 8), WIDEST), 5) if axes is None else axes
    bound = np.nanmax(np.abs(scores)) if np.isfinite(scores).any() else 1
    bound = bound or 1
    image = axes.imshow(scores, cmap="RdBu", vmin=-bound, vmax=bound, aspect="auto", interpolation="nearest")
    axes.set_facecolor(GREY)  # shows where a score is NaN
    rows = {residue: row for row, residue in enumerate(residues)}
    places = [place for place, residue in enumerate(wild_type) if residue in rows]
    # As wide as a cell, so that the marks of neighbours do not merge.
    size = min(4.0, 50 * _width(axes) / len(wild_type))
    axes.scatter(
        places,
        [rows[wild_type[place]] for place in places],
        s=size**2,
        color="black",
        edgecolors="white",
        linewidths=0.4,
    )
    axes.set_yticks(range(len(residues)), list(residues), fontsize=8)
    _label_residues(axes, wild_type, first_residue)
    axes.set(xlabel="wild type and position (dots: wild type)", ylabel="mutant")
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.figure.colorbar(image, ax=axes, label="log p(mutant) − log p(wild type)", pad=0.015)
    return _figure(axes)


def _label_residues(axes: Axes, wild_type: Sequence[str], first_residue: int) -> None:
    """Label the x axis with residues and their numbers, as many as there is room for."""
    step = max(1, -(-len(wild_type) // max(1, min(TICKS, int(9 * _width(axes))))))
    places = range(0, len(wild_type), step)
    labels = [f"{wild_type[place]}{place + first_residue}" for place in places]
    axes.set_xticks(places, labels, rotation=90, fontsize=7)


def _width(axes: Axes) -> float:
    """Return the width of the axes in inches."""
    return float(_figure(axes).get_size_inches()[0] * axes.get_position().width)


def _whole_numbers(*axes: Any) -> None:
    """Put ticks at whole numbers, with a separator of thousands."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    for axis in axes:
        axis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _name_chains(
    axes: Axes, chain_ends: Sequence[float], names: Sequence[str], length: int, right: bool = False
) -> None:
    """Write the names of the chains above their middles, as many as there is room for; one chain needs no name.

    Args:
        axes: the axes, with residues from 1 to `length` along x.
        chain_ends: where one chain ends and the next begins.
        names: the name of each chain.
        length: the number of residues.
        right: also write the names to the right.
    """
    if len(names) < 2:
        return
    ends = np.array([0.5, *chain_ends, length + 0.5])
    middles, last = (ends[1:] + ends[:-1]) / 2, -np.inf
    for middle, name in zip(middles, names, strict=True):
        if middle - last < length * 0.09 * len(name) / _width(axes):  # inches of a letter
            continue
        last = middle
        axes.text(middle, 1.01, name, transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=8)
        if right:
            axes.text(1.01, middle, name, transform=axes.get_yaxis_transform(), ha="left", va="center", fontsize=8)


def _title_pad(chain_names: Sequence[str]) -> float:
    """Return the points between the axes and a title, which is above the names of the chains."""
    return 18 if len(chain_names) > 1 else 6


def residue_curve(
    values: np.ndarray,
    label: str,
    chain_ends: Iterable[float] = (),
    title: str = "",
    first_residue: int = 1,
    marked: np.ndarray | None = None,
    axes: Axes | None = None,
    chain_names: Sequence[str] = (),
) -> Figure:
    """Draw a value of each residue along the sequence.

    Args:
        values: [residues]; NaN where there is none.
        label: what the values are, with their unit.
        chain_ends: where one chain ends and the next begins, such as 10.5.
        title: the title.
        first_residue: number of the first residue.
        marked: true for residues to shade, [residues].
        axes: where to draw; a new figure by default.
        chain_names: the name of each chain; needs `first_residue` 1.

    Returns:
        The figure.
    """
    axes = _new_axes(7, 3) if axes is None else axes
    numbers, chain_ends = np.arange(len(values)) + first_residue, list(chain_ends)
    chains = np.searchsorted(chain_ends, numbers)
    colour = "black" if len(chain_names) else BLUE  # black on coloured bands
    for chain in np.unique(chains):  # no line joins two chains
        one = chains == chain
        axes.plot(numbers[one], values[one], linewidth=1.2, color=colour)
    finite = np.isfinite(np.pad(values, 1, constant_values=np.nan))
    joined = (finite[:-2] & (chains == np.roll(chains, 1))) | (finite[2:] & (chains == np.roll(chains, -1)))
    axes.plot(numbers[~joined], values[~joined], ".", color=colour)  # a point without neighbours has no line
    for number in [] if marked is None else numbers[marked]:
        axes.axvspan(number - 0.5, number + 0.5, color=PALETTE[3], alpha=0.35, linewidth=0, zorder=0)
    for end in chain_ends:
        axes.axvline(end, color="black", linewidth=0.8)
    _whole_numbers(axes.xaxis)
    _name_chains(axes, chain_ends, chain_names, len(values))
    axes.set(xlabel="residue", ylabel=label, xlim=(first_residue - 0.5, first_residue + len(values) - 0.5))
    axes.set_title(title, fontsize=10, parse_math=False, pad=_title_pad(chain_names))
    return _figure(axes)


def plddt_curve(
    plddt: np.ndarray,
    chain_ends: Iterable[float] = (),
    title: str = "",
    axes: Axes | None = None,
    chain_names: Sequence[str] = (),
) -> Figure:
    """Draw pLDDT along the chains, on bands of AlphaFold's confidence levels.

    Args:
        plddt: 0 to 100, [residues]; NaN where there is none.
        chain_ends: where one chain ends and the next begins, such as 10.5.
        title: the title.
        axes: where to draw; a new figure by default.
        chain_names: the name of each chain.

    Returns:
        The figure.
    """
    axes = _new_axes(7, 3) if axes is None else axes
    for (low, name, colour), high in zip(PLDDT_LEVELS, (50, 70, 90, 100), strict=True):
        axes.axhspan(low, high, color=colour, alpha=0.3, linewidth=0, zorder=0)
        place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 7}
        axes.text(1.01, (low + high) / 2, name, **place)
    residue_curve(plddt, "pLDDT", chain_ends, title, axes=axes, chain_names=chain_names)
    axes.set(ylim=(0, 100), yticks=(0, 50, 70, 90, 100))
    return _figure(axes)


def aligned_error(
    error: np.ndarray,
    largest: float,
    chain_ends: Iterable[float] = (),
    title: str = "",
    axes: Axes | None = None,
    chain_names: Sequence[str] = (),
) -> Figure:
    """Draw the predicted aligned error.

    Args:
        error: in Å, [aligned residues, scored residues].
        largest: upper end of the colour scale in Å.
        chain_ends: where one chain ends and the next begins, such as 10.5.
        title: the title.
        axes: where to draw; a new figure by default.
        chain_names: the name of each chain.

    Returns:
        The figure.
    """
    axes = _new_axes(6, 5) if axes is None else axes
    ends, chain_ends = (0.5, len(error) + 0.5), list(chain_ends)
    image = axes.imshow(error, cmap="Greens_r", vmin=0, vmax=largest, extent=(*ends, *ends[::-1]))
    for end in chain_ends:
        axes.axvline(end, color="black", linewidth=0.8)
        axes.axhline(end, color="black", linewidth=0.8)
    axes.set_facecolor(GREY)  # shows where an error is NaN
    _whole_numbers(axes.xaxis, axes.yaxis)
    _name_chains(axes, chain_ends, chain_names, len(error), right=True)
    axes.set(xlabel="scored residue", ylabel="aligned residue")
    axes.set_title(title, fontsize=10, parse_math=False, pad=_title_pad(chain_names))
    axes.figure.colorbar(image, ax=axes, label="expected position error (Å)")
    return _figure(axes)


def loss_curves(log: Iterable[Mapping[str, Any]], title: str = "", axes: Axes | None = None) -> Figure:
    """Draw the training and validation losses over the steps.

    Args:
        log: lines of a training's log, each with `step` and `loss` or `eval_loss`.
        title: the title.
        axes: where to draw; a new figure by default.

    Returns:
        The figure.
    """
    axes = _new_axes(7, 4) if axes is None else axes
    lines = list(log)
    for name, label, marker in (("loss", "training", "."), ("eval_loss", "validation", "o")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            colour = BLUE if name == "loss" else VERMILLION
            shown = marker if len(points) < 30 else None
            axes.plot(*zip(*points, strict=True), label=label, color=colour, marker=shown, markersize=5)
    _whole_numbers(axes.xaxis)
    axes.set(xlabel="step", ylabel="loss")
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.grid(color="lightgray", linewidth=0.5)
    if axes.lines:
        axes.legend()
    return _figure(axes)


def embedding_map(
    points: np.ndarray,
    groups: Sequence[str],
    labels: tuple[str, str] = ("component 1", "component 2"),
    title: str = "",
    axes: Axes | None = None,
) -> Figure:
    """Draw proteins as points of a plane, each group with a colour and a marker of its own.

    Args:
        points: [proteins, 2].
        groups: the group of each protein, eight at most.
        labels: names of the two axes.
        title: the title.
        axes: where to draw; a new figure by default.

    Returns:
        The figure.
    """
    axes = _new_axes(6, 5) if axes is None else axes
    names = list(dict.fromkeys(groups))
    for name, colour, marker in zip(names, PALETTE, "os^DvPX*", strict=False):
        chosen = np.array([group == name for group in groups])
        x, y = points[chosen].T
        label = f"{name} ({chosen.sum()})"
        axes.scatter(x, y, s=28, color=colour, marker=marker, edgecolors="white", linewidths=0.5, label=label)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.legend(fontsize=8, framealpha=0.9)
    return _figure(axes)


def residue_letters(
    probabilities: np.ndarray,
    residues: Sequence[str],
    wild_type: Sequence[str],
    first_residue: int = 1,
    title: str = "",
    axes: Axes | None = None,
) -> Figure:
    """Draw a sequence logo: the height of a column is its information, the height of a letter its share of it.

    Letters are coloured by chemistry: blue basic, vermillion acidic, green polar, black hydrophobic.

    Args:
        probabilities: probability of each residue, [positions, residues]; rows sum to 1.
        residues: the residue of each column.
        wild_type: the residue at each position, for the labels.
        first_residue: number of the first position.
        title: the title.
        axes: where to draw; a new figure by default.

    Returns:
        The figure.

    Source:
        Schneider and Stephens 1990, doi:10.1093/nar/18.20.6097.
    """
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import PathPatch
    from matplotlib.textpath import TextPath
    from matplotlib.transforms import Affine2D

    axes = _new_axes(min(max(6, len(wild_type) / 6), WIDEST), 2.6) if axes is None else axes
    bold = FontProperties(family="DejaVu Sans Mono", weight="bold")
    heights = probabilities * information(probabilities)[:, None]
    for place, column in enumerate(heights):
        bottom = 0.0
        for index in np.argsort(column):
            if column[index] > 0.01 * heights.max():
                letter = TextPath((0, 0), residues[index], size=1, prop=bold)
                box = letter.get_extents()
                fit = Affine2D().translate(-box.x0, -box.y0).scale(0.9 / box.width, column[index] / box.height)
                shape = fit.translate(place - 0.45, bottom).transform_path(letter)
                axes.add_patch(PathPatch(shape, color=CHEMISTRY.get(residues[index], "black"), linewidth=0))
            bottom += column[index]
    _label_residues(axes, wild_type, first_residue)
    axes.set(xlim=(-0.6, len(wild_type) - 0.4), ylim=(0, heights.sum(1).max() * 1.05))
    axes.set(xlabel="wild type and position", ylabel="information (bits)")
    axes.set_title(title, fontsize=10, parse_math=False)
    return _figure(axes)


CHEMISTRY = {**dict.fromkeys("KRH", BLUE), **dict.fromkeys("DE", VERMILLION), **dict.fromkeys("NQSTGCY", PALETTE[2])}


def information(probabilities: np.ndarray) -> np.ndarray:
    """Return log2 of the number of residues minus the entropy of each position, in bits.

    Args:
        probabilities: probability of each residue, [positions, residues]; rows sum to 1.

    Returns:
        The information of each position, [positions].
    """
    logs = np.log2(np.where(probabilities > 0, probabilities, 1))
    return np.log2(probabilities.shape[1]) + (probabilities * logs).sum(1)


def backbone(
    positions: np.ndarray,
    values: np.ndarray,
    label: str,
    limits: tuple[float, float] | None = None,
    pairs: Iterable[tuple[int, int, float]] = (),
    colours: str = "viridis",
    title: str = "",
    axes: Axes | None = None,
) -> Figure:
    """Draw the path of a chain's Cα atoms as a tube, coloured by a value of each residue.

    The view is along the axis in which the atoms spread least.

    Args:
        positions: positions of the Cα atoms in Å, [residues, 3].
        values: [residues].
        label: what the values are, with their unit.
        limits: ends of the colour scale; the least and the largest value by default.
        pairs: contacts (i, j, probability) to draw as dashed lines, residues counted from 1.
        colours: name of matplotlib's colour map.
        title: the title.
        axes: where to draw; a new figure by default.

    Returns:
        The figure.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import LineCollection
    from matplotlib.colors import Normalize

    axes = _new_axes(6, 5) if axes is None else axes
    centred = positions - positions.mean(0)
    points = _smooth(centred @ np.linalg.svd(centred, full_matrices=len(centred) < 3)[2].T)
    shades = np.interp(np.linspace(0, len(values) - 1, len(points)), np.arange(len(values)), values)
    norm = Normalize(*(limits or (float(np.nanmin(values)), float(np.nanmax(values)))))
    nearness = (points[:, 2] - points[:, 2].min()) / max(float(np.ptp(points[:, 2])), 1e-9)
    for i, j, _ in pairs:
        x, y = points[[(i - 1) * STEPS, (j - 1) * STEPS], :2].T
        axes.plot(x, y, color="black", linewidth=0.7, linestyle=(0, (2, 1.5)), zorder=3, alpha=0.7)
    # Each piece of the tube is an outline and, a little longer, so that no gap shows, a core. The farthest come first.
    rgb = colormaps[colours](norm(shades[:-1]))[:, :3]
    steps = np.diff(points[:, :2], axis=0)
    lines, colour, widths = [], [], []
    for k in np.argsort(nearness[:-1]):
        start, stop, width = points[k, :2], points[k + 1, :2], 5 + 4 * nearness[k]
        faded = 1 - (1 - rgb[k]) * (0.5 + 0.5 * nearness[k])  # far parts fade towards white
        outline = 1 - 0.85 * (0.5 + 0.5 * nearness[k]) * np.ones(3)
        lines += [(start - 0.3 * steps[k], stop + 0.3 * steps[k]), (start - 0.7 * steps[k], stop + 0.7 * steps[k])]
        colour += [outline, faded]
        widths += [width + 2, width]
    axes.add_collection(LineCollection(lines, colors=colour, linewidths=widths, capstyle="butt", zorder=2))
    for place, name in ((0, "N"), (-1, "C")):
        x, y, _ = points[place]
        axes.annotate(name, (x, y), xytext=(9, 5), textcoords="offset points", fontsize=11, weight="bold", zorder=4)
    axes.set(xlim=_padded(points[:, 0]), ylim=_padded(points[:, 1]))
    axes.set_aspect("equal")
    axes.set_axis_off()
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.figure.colorbar(ScalarMappable(norm, colours), ax=axes, label=label, shrink=0.85)
    return _figure(axes)


def _padded(values: np.ndarray) -> tuple[float, float]:
    """Return the ends of an axis that leave 2 Å around the values."""
    return float(values.min()) - 2, float(values.max()) + 2


def _smooth(points: np.ndarray) -> np.ndarray:
    """Return a Catmull-Rom curve through points, [points, 3], with STEPS steps between two of them."""
    second, last_but_one = points[:2][-1:], points[-2:][:1]
    padded = np.concatenate([2 * points[:1] - second, points, 2 * points[-1:] - last_but_one])
    before, start, stop, after = (padded[k : len(padded) - 3 + k, None] for k in range(4))
    t = np.arange(STEPS)[None, :, None] / STEPS
    curve = start + t / 2 * (
        stop - before + t * (2 * before - 5 * start + 4 * stop - after + t * (3 * (start - stop) + after - before))
    )
    return np.concatenate([curve.reshape(-1, points.shape[1]), points[-1:]])


def png(figure: Figure) -> bytes:
    """Return the figure as the bytes of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def _new_axes(width: float, height: float) -> Axes:
    """Return the axes of a new figure, its size in inches; pyplot and its global state stay out."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained").add_subplot()


def _figure(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure
