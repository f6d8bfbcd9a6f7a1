"""Draws docs/network.svg: the network, its two mixers, and a phantom going through it.

    python docs/network.py [PNG]

The numbers are read from the size "base", the images are simulated. With an argument the figure is
written there too, to look at.
"""

import pathlib
import re
import sys

import matplotlib
import numpy as np
from matplotlib import patches
from matplotlib.figure import Figure
from matplotlib.path import Path
from matplotlib.transforms import Affine2D

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configs import masm_brats  # noqa: E402
from masm_jax.data.simulate import simulate  # noqa: E402
from masm_jax.models.mosaic import offsets  # noqa: E402
from masm_jax.models.sizes import SIZES, encoder_widths  # noqa: E402

PATCH = 128
MODALITIES = ("T1", "T1ce", "T2", "FLAIR")
HUES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe and Ito, for all kinds of colour vision
PALE = ("#b3d5e8", "#f2cfb3", "#b3e2d5", "#f0d7e5")
INK, GREY, LINE = "#1f2933", "#6b7785", "#9aa5b1"
AWARE, SHIFT, DECODER = "#fff4cc", "#e6defa", "#e3e8ee"
AWARE_EDGE, SHIFT_EDGE, DECODER_EDGE = "#b58a00", "#6b4fc0", "#52606d"


def main(argv):
    """Draw, and write the figure."""
    matplotlib.rcParams.update(
        {"svg.hashsalt": "masm", "font.family": "DejaVu Sans", "text.color": INK, "font.size": 8.5}
    )
    figure = Figure(figsize=(15, 11.2), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 150), ylim=(0, 112))
    axes.axis("off")
    _network(axes, SIZES["base"])
    _aware(axes)
    _shift(axes)
    path = ROOT / "docs" / "network.svg"
    figure.savefig(path, metadata={"Date": None}, dpi=110)
    # Comments and indentation are a tenth of the file; trailing blanks trip up git.
    text = re.sub(r"\s*<!--.*?-->", "", path.read_text())
    path.write_text(re.sub(r" *\n *", "\n", text))
    for other in argv:
        figure.savefig(other, dpi=110)


# -------------------------------------------------------------------------------- the network


def _network(axes, size):
    _title(axes, 2, 109, "MASM", "one encoder for all modalities, mixers on the skips, one decoder")
    scans, labels = _phantom()
    rows = [99 - 9.4 * level for level in range(6)]
    stride, token_stride = size.stem, size.token_size
    own = encoder_widths(masm_brats.get_config().model)

    for place, (name, hue) in enumerate(zip(MODALITIES, HUES)):
        y = 88 - 13.2 * place
        _image(axes, scans[place], (2, 11.6, y, y + 11.6))
        _box(axes, 2, y, 9.6, 11.6, edge=hue, lw=2)
        axes.text(2.6, y + 10.6, name, color="white", fontsize=9, weight="bold", va="top")
        lane, entry = 15.4 - 0.6 * place, rows[0] + 0.9 - 0.6 * place
        axes.plot([11.7, lane, lane, 23.6], [y + 5.8, y + 5.8, entry, entry], color=hue, lw=1.4)
    _head(axes, 24, rows[0], 1.6)
    axes.text(2, 45.4, "a phantom of this project", color=GREY, fontsize=7.5, va="top")

    for x, text in ((32.5, "shared encoder"), (61, "mixers"), (87, "fuse"), (108, "decoder")):
        axes.text(x, 105, text, ha="center", fontsize=10.5, weight="bold")
    for level, y in enumerate(rows):
        stride *= size.strides[level]
        edge, width = 13.0 - 1.7 * level, size.widths[level]
        height = 6.0 - 0.55 * level
        grid, patch = PATCH // stride, max(1, token_stride // stride)
        _sheets(axes, 32.5, y, edge, height)
        axes.text(17, y + 1.7, f"level {level + 1}", fontsize=8.5, weight="bold")
        axes.text(17, y - 3.1, f"{own[level]} × {grid}³", fontsize=8, color=GREY)
        _mixer(axes, y, last=level == 5, tokens=grid // patch, patch=patch)
        axes.text(87, y, "1×1×1", ha="center", va="center", fontsize=8)
        _box(axes, 83.6, y - 1.9, 6.8, 3.8, edge=DECODER_EDGE, rounded=True)
        _bundle(axes, (34.5 + edge / 2, y), (45.6, y))
        _bundle(axes, (76.4, y), (82.6, y))
        _arrow(axes, (91.2, y), (107.3 - edge / 2, y), colour=DECODER_EDGE)
        _box(axes, 108 - edge / 2, y - height / 2, edge, height, DECODER, DECODER_EDGE)
        axes.text(108, y, str(width), ha="center", va="center", fontsize=8, color=GREY)
        if level < 5:
            down = f"÷{size.strides[level + 1]}" if size.strides[level + 1] > 1 else ""
            _arrow(axes, (32.5, y - 3.6), (32.5, rows[level + 1] + 3.9))
            axes.text(33.3, y - 4.75, down, fontsize=7.5, color=GREY, va="center")
            up = down.replace("÷", "×")
            _arrow(axes, (108, rows[level + 1] + 3.2), (108, y - 3.4), colour=DECODER_EDGE)
            axes.text(108.8, y - 4.75, up, fontsize=7.5, color=GREY, va="center")
        if 0 < level < size.deep_heads - 1:
            _arrow(axes, (108.6 + edge / 2, y), (117.4, y), colour=LINE)
            axes.text(118, y, f"head, loss × 1/{2**level}", va="center", fontsize=8, color=GREY)

    _arrow(axes, (115.2, rows[0]), (129.6, rows[0]), colour=DECODER_EDGE)
    axes.text(122, rows[0] + 0.9, "head, sub-pixel", fontsize=8, color=GREY, ha="center")
    _image(axes, labels, (130.4, 142.6, 88.6, 103.4))
    _box(axes, 130.4, 88.6, 12.2, 14.8, edge=INK)
    for place, (name, hue) in enumerate(zip(("WT", "TC", "ET"), REGIONS)):
        axes.add_patch(patches.Circle((144.2, 102 - 2.6 * place), 0.7, color=hue))
        axes.text(145.4, 102 - 2.6 * place, name, va="center", fontsize=8.5)
    axes.text(
        118,
        66,
        f"Drawn: size “base” at a crop of {PATCH}³,\nchannels × grid per level, and the channels\n"
        f"of the decoder. A stem turns {size.stem}³ voxels into\nchannels before level 1; "
        "two convolutions\nof the scans themselves correct the first\nlogits (not drawn).\n"
        "The mixer of every level is an entry of\nthe config: aware, shift or concat.\n"
        "The lower heads are for training only.",
        va="top",
        fontsize=8,
        color=GREY,
        linespacing=1.5,
    )


def _mixer(axes, y, *, last, tokens, patch):
    face, edge = (SHIFT, SHIFT_EDGE) if last else (AWARE, AWARE_EDGE)
    _box(axes, 46, y - 3.1, 30, 6.2, face, edge, rounded=True)
    name = "Modality-Shift" if last else "Modality-Aware"
    axes.text(59, y + 0.9, name, ha="center", va="center", fontsize=9, weight="bold", color=edge)
    words = f"{tokens}³ tokens, {f'{patch}³ voxels' if patch > 1 else 'one voxel'} each"
    axes.text(59, y - 1.4, words, ha="center", va="center", fontsize=7.5, color=GREY)
    if last:
        _plane(axes, 71.2, y - 1.9, 3.8, _mosaic(0)[0])
        return
    for place, pair in enumerate(((0, 1), (2, 3))):
        for k, modality in enumerate(pair):
            spot = (71.4 + 2.9 * k, y + 1.2 - 2.4 * place)
            axes.add_patch(patches.Circle(spot, 0.75, color=HUES[modality]))
        axes.plot([72.3, 73.5], [spot[1], spot[1]], color=INK, lw=1)


def _sheets(axes, x, y, width, height):
    """One sheet per modality, one behind the other."""
    for place in reversed(range(4)):
        shift = 0.75 * (place - 1.5)
        corner = (x - width / 2 + shift, y - height / 2 + 0.6 * shift)
        _box(axes, *corner, width, height, PALE[place], HUES[place], lw=1)


def _bundle(axes, start, end):
    """Four parallel lines, one per modality."""
    for place, hue in enumerate(HUES):
        y = start[1] + 1.5 - place
        axes.plot([start[0], end[0] - 0.9], [y, y], color=hue, lw=1.4, solid_capstyle="butt")
    _head(axes, end[0] - 1, end[1], 2.1)


def _head(axes, x, y, half):
    axes.add_patch(patches.Polygon([(x, y - half), (x, y + half), (x + 1.3, y)], color=LINE))


# -------------------------------------------------------------------------------- the mixers

KEPT = np.array(  # which patches each of the two keeps, in the drawing
    [
        [[1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]],
        [[1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 1, 0], [1, 1, 0, 1]],
    ]
)


def _aware(axes):
    _frame(axes, 2, 1.5, 82, 40, AWARE_EDGE)
    _title(axes, 4, 38.6, "Modality-Aware mixer", "pairs: T1 with T1ce, T2 with FLAIR", AWARE_EDGE)
    steps = (
        (5, "1  tokens", "patches of both\nmodalities, on\none token grid"),
        (20.5, "2  keep?", "a small network sees\neach token and the mean\nof all: keep or prune"),
        (38.5, "3  replace", "a pruned patch\nbecomes the\npartner's"),
        (53.5, "4  attend", "over both modalities;\na pruned token is a\nkey for itself alone"),
        (70, "5  back", "to voxels: a gate\nand a shift,\nzero at the start"),
    )
    for x, name, words in steps:
        axes.text(x, 33.6, name, weight="bold", fontsize=9.5)
        axes.text(x, 10.2, words, va="top", fontsize=8, color=GREY, linespacing=1.4)
    for k in range(2):
        y = 22.8 - 11 * k
        own = np.full((4, 4), k)
        _plane(axes, 5, y, 9, own)
        axes.text(4.2, y + 4.5, MODALITIES[k], rotation=90, ha="right", va="center", fontsize=8)
        _plane(axes, 21.5, y, 9, own, kept=KEPT[k])
        _plane(axes, 38.5, y, 9, np.where(KEPT[k] == 1, k, 1 - k))
        _arrow(axes, (15, y + 4.5), (20.4, y + 4.5))
        _arrow(axes, (31.5, y + 4.5), (37.4, y + 4.5))
        _arrow(axes, (48.3, y + 4.5), (53.2, y + 4.5 - (1, -1)[k] * 2.5))
    _attention(axes, 54.3, 13.6, 15.6)
    _arrow(axes, (70.6, 21.8), (73, 21.8))
    axes.text(73.4, 23.2, "x (1 + gate)", fontsize=9, va="center")
    axes.text(73.4, 20.2, "    + shift", fontsize=9, va="center")


def _attention(axes, x, y, side):
    """Who attends to whom: rows ask, columns answer; half of the tokens of either modality."""
    order = [(k, place) for k in range(2) for place in range(8)]
    cell = side / len(order)
    for column, (k, place) in enumerate(order):
        left, colour = x + column * cell, HUES[k]
        if KEPT[k].reshape(-1)[place]:
            axes.add_patch(patches.Rectangle((left, y), cell, side, color=colour, alpha=0.5, lw=0))
        own = (left, y + side - (column + 1) * cell)
        axes.add_patch(patches.Rectangle(own, cell, cell, color=colour, lw=0))
    _box(axes, x, y, side, side, edge=INK)
    axes.text(x + side / 2, y + side + 0.6, "keys", ha="center", fontsize=7.5, color=GREY)
    axes.text(x - 0.5, y + 1.4, "queries", ha="right", fontsize=7.5, color=GREY, rotation=90)


def _shift(axes):
    _frame(axes, 87, 1.5, 61, 40, SHIFT_EDGE)
    _title(axes, 89, 38.6, "Modality-Shift mixer", "mosaic “bayer3d”, no parameters", SHIFT_EDGE)
    axes.text(90, 33.6, "before", weight="bold", fontsize=9.5)
    axes.text(103.4, 33.6, "1  shifted", weight="bold", fontsize=9.5)
    axes.text(104.0, 31.4, "even slice", fontsize=7.5, color=GREY)
    axes.text(112.6, 31.4, "odd slice", fontsize=7.5, color=GREY)
    even, odd = _mosaic(0), _mosaic(1)
    for m in range(4):
        y = 24.4 - 7 * m
        axes.text(89.6, y + 3, MODALITIES[m], ha="left", va="center", fontsize=8, color=HUES[m])
        _plane(axes, 94, y, 6, np.full((4, 4), m))
        _arrow(axes, (100.6, y + 3), (103.6, y + 3))
        _plane(axes, 104.2, y, 6, even[m])
        _plane(axes, 112.4, y, 6, odd[m])
    steps = (
        (32.2, "2", "self-attention inside each plane,\nwhich now holds all modalities"),
        (27.2, "3", "shift back: the exact inverse"),
        (24.4, "4", "self-attention over the modalities\nat every place"),
        (19.4, "5", "MLP, and the next block"),
        (16.6, "6", "back to voxels: a gate and a shift"),
    )
    for y, number, words in steps:
        axes.text(121.5, y, number, weight="bold", fontsize=8.5, va="top", linespacing=1.35)
        axes.text(124, y, words, fontsize=8.5, va="top", linespacing=1.35)
    axes.text(
        121.5,
        11.6,
        "Every cell of 2×2×2 places holds\nevery modality twice. Other mosaics:\n"
        "bayer, tps, diagonal, none, or a list.",
        fontsize=8,
        color=GREY,
        va="top",
        linespacing=1.45,
    )


def _mosaic(slice_):
    """(M, 4, 4): which modality each place of each plane shows in an even (0) or odd (1) slice."""
    table = offsets("bayer3d", (2, 4, 4), 4)[slice_]
    return (np.arange(4)[:, None, None] + table) % 4


# -------------------------------------------------------------------------------- small parts

REGIONS = ("#2f9e44", "#f08c00", "#e03131")  # WT, TC, ET: what belongs to each and to none inside


def _phantom():
    """One axial slice: four images (H, W) in 0..1, and the labels on FLAIR (H, W, 3)."""
    case = simulate(0, 0, spacing=2.0)
    slice_ = int(np.argmax((case.labels == 4).sum((0, 1))))
    brain = np.argwhere(case.images["flair"][:, :, slice_] > 0)
    low, high = brain.min(0) - 2, brain.max(0) + 3
    cut = (slice(low[0], high[0]), slice(low[1], high[1]), slice_)
    images = [case.images[name][cut].T.astype(float) for name in ("t1", "t1ce", "t2", "flair")]
    images = [np.round((image / np.percentile(image, 99.7)).clip(0, 1), 2) for image in images]
    painted = np.repeat(images[3][..., None], 3, axis=2) * 0.85
    labels = case.labels[cut].T
    for value, hue in zip((2, 1, 4), REGIONS):
        colour = np.array(matplotlib.colors.to_rgb(hue))
        painted[labels == value] = 0.35 * painted[labels == value] + 0.65 * colour
    return images, painted


def _plane(axes, x, y, side, owners, kept=None):
    """A square of patches, each in the colour of the modality it came from; pruned ones hatched."""
    cell = side / len(owners)
    kept = np.ones_like(owners) if kept is None else kept
    for hue in np.unique(owners):
        for is_kept, colours in ((1, (HUES[hue], "white")), (0, ("white", HUES[hue]))):
            squares = [
                Path.unit_rectangle().transformed(
                    Affine2D().scale(cell).translate(x + column * cell, y + side - (row + 1) * cell)
                )
                for row, column in np.argwhere((owners == hue) & (kept == is_kept))
            ]
            if squares:
                style = {"facecolor": colours[0], "edgecolor": colours[1], "lw": 0.8}
                shape = Path.make_compound_path(*squares)
                hatch = None if is_kept else "xxxx"
                axes.add_patch(patches.PathPatch(shape, hatch=hatch, clip_on=False, **style))
    _box(axes, x, y, side, side, edge=INK, lw=0.8)


def _image(axes, values, extent):
    style = {"cmap": "gray"} if values.ndim == 2 else {}
    axes.imshow(values, extent=extent, aspect="auto", interpolation="none", **style)


def _box(axes, x, y, width, height, face="none", edge=INK, *, rounded=False, lw=1.2):
    style = {"facecolor": face, "edgecolor": edge, "lw": lw, "clip_on": False}
    if rounded:
        shape = patches.FancyBboxPatch(
            (x + 0.6, y + 0.6), width - 1.2, height - 1.2, boxstyle="round,pad=0.6", **style
        )
    else:
        shape = patches.Rectangle((x, y), width, height, **style)
    axes.add_patch(shape)


def _frame(axes, x, y, width, height, colour):
    _box(axes, x, y, width, height, "#fcfcfd", LINE, rounded=True, lw=1)
    axes.plot([x + 2, x + width - 2], [y + height - 5.2] * 2, color=colour, lw=0.8, alpha=0.5)


def _title(axes, x, y, words, more, colour=INK):
    title = axes.text(x, y, words, fontsize=12.5, weight="bold", color=colour, va="center")
    axes.annotate(
        more,
        xy=(1, 0.5),
        xycoords=title,
        xytext=(10, 0),
        textcoords="offset points",
        fontsize=9.5,
        color=GREY,
        va="center",
    )


def _arrow(axes, start, end, colour=LINE):
    axes.add_patch(
        patches.FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=9,
            lw=1.3,
            color=colour,
            shrinkA=0,
            shrinkB=0,
            clip_on=False,
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
