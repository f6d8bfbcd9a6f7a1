"""What a learnt mosaic has become: which modality each place borrows its patch from."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from masm_jax.evaluation import tables
from masm_jax.files import replacing

# A colour per modality, of Okabe and Ito (2008): apart for all eyes.
COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#d55e00", "#0072b2", "#999999")


def shares(logits: Any) -> np.ndarray:
    """(..., M) logits of ``Network.learnt_mosaics`` -> their softmax, float64."""
    logits = np.asarray(logits, np.float64)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def draw(
    path: str | os.PathLike, share: np.ndarray, *, title: str, modalities: Sequence[str]
) -> None:
    """Draw a cell: a row per modality, a column per plane, in each place whose patch comes there.

    Args:
        path: the PNG; replaced if there. Beside it a CSV: place, offset, probability, and whether
            it is the likeliest, which is the one that inference takes.
        share: (d, h, w, M) of ``shares``.
        title: one line above.
        modalities: names of the M.
    """
    depth, height, width, count = share.shape
    likeliest = share.argmax(-1)
    figure = Figure(
        figsize=(1.1 + depth * (0.4 + 0.75 * width), 0.9 + count * (0.3 + 0.55 * height)),
        layout="constrained",
    )
    panels = figure.subplots(count, depth, squeeze=False)
    for own, row in enumerate(panels):
        for plane, axes in enumerate(row):
            _cell(axes, share[plane], likeliest[plane], own, modalities)
            if own == 0:
                axes.set_title(f"plane {plane}", fontsize=9)
        row[0].set_ylabel(modalities[own], fontsize=10)
    figure.suptitle(title, fontsize=10, parse_math=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    rows = [
        {"d": d, "h": h, "w": w, "offset": offset, "probability": float(share[d, h, w, offset]),
         "likeliest": int(likeliest[d, h, w] == offset)}
        for d, h, w in np.ndindex(depth, height, width) for offset in range(count)
    ]  # fmt: skip
    columns = ("d", "h", "w", "offset", "probability", "likeliest")
    tables.write_csv(os.path.splitext(path)[0] + ".csv", columns, rows)


def _cell(axes, share, likeliest, own, modalities):
    """One plane of a cell, as the modality ``own`` sees it."""
    height, width = likeliest.shape
    for place in np.ndindex(height, width):
        offset = likeliest[place]
        source = (own + offset) % len(modalities)
        y, x = place
        axes.fill(
            [x, x + 1, x + 1, x], [y, y, y + 1, y + 1], color=COLOURS[source % len(COLOURS)],
            alpha=float(share[place][offset]),
        )  # fmt: skip
        words = f"{modalities[source]}\n{share[place][offset]:.2f}"
        axes.text(x + 0.5, y + 0.5, words, ha="center", va="center", fontsize=8)
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    axes.set_xticks(range(width + 1), [])
    axes.set_yticks(range(height + 1), [])
    axes.grid(color="white", linewidth=2)
