"""What a run measures of itself while it trains.

Often: "pseudo Dice" on validation crops, as nnU-Net names it: overlap summed over crops, cheap, and
not the Dice of cases. Sometimes: Dice of whole validation cases, in the grid of the records.
"""

import jax
import numpy as np

from masm_jax import sharding
from masm_jax.data.pipeline import batches
from masm_jax.evaluation.metrics import dice
from masm_jax.inference.postprocess import decode
from masm_jax.inference.volume import decoding


def validation_crops(config, records, cases, rows=None):
    """The same crops at every validation: a list of host batches, of these rows."""
    count = max(1, config.log.patches // config.batch_size)
    stream = batches(
        records,
        cases,
        seed=config.seed + 1,  # not the training crops of the same step
        batch_size=config.batch_size,
        patch=config.patch,
        foreground=config.data.foreground,
        rows=rows,
    )
    return [batch for batch, _ in zip(stream, range(count))]


def pseudo_dice(step, params, crops, mesh, regions, batch_size=None):
    """Dice per region over all crops: {"val/dice/WT": ..., "val/dice": mean, "val/keep/level1": 1}.

    A region that is neither in the crops nor predicted in any counts as 1. The share of tokens that
    is kept without the noise of the training may be far from the one with it.
    """
    sums = [step(params, sharding.global_batch(mesh, crop, batch_size)) for crop in crops]
    sums = jax.device_get(sums)
    overlap = sum(np.asarray(one["overlap"], np.float64) for one in sums)
    total = sum(np.asarray(one["total"], np.float64) for one in sums)
    shares = np.where(total > 0, 2 * overlap / np.maximum(total, 1), 1.0)
    values = {f"val/dice/{name}": float(value) for name, value in zip(regions, shares)}
    values["val/dice"] = float(shares.mean())
    for level in sums[0]["keep"]:
        values[f"val/keep/{level}"] = float(np.mean([one["keep"][level] for one in sums]))
    return values


def volume_dice(segmenter, records, cases, roll, overlays=None):
    """Mean Dice per region over whole cases: {"volume/dice/WT": ..., "volume/dice": mean}.

    Every process of the run takes its share of the cases; all get the means.

    Args:
      segmenter: of this process's devices.
      records: the records.
      cases: ids.
      roll: of the processes (masm_jax/processes.py).
      overlays: case -> PNG, of those that are to be drawn.
    """
    regions = segmenter.settings.regions
    own = {}
    for case in cases[jax.process_index() :: jax.process_count()]:
        probabilities = segmenter.probabilities(records.image(case))
        reference = np.asarray(records.label(case))
        spacing = records.meta(case)["record_spacing"]
        rules = decoding(segmenter.settings, spacing)
        predicted = decode(probabilities, regions=regions, **rules)
        own[case] = {
            name: float(dice(np.isin(predicted, values), np.isin(reference, values)))
            for name, values in regions.items()
        }
        if case in (overlays or {}):
            from masm_jax.evaluation import pictures  # Matplotlib: not before the first step

            pictures.overlay(
                overlays[case],
                records.image(case),
                predicted,
                reference,
                title=f"{case}   Dice " + "  ".join(f"{n} {s:.2f}" for n, s in own[case].items()),
                modalities=records.modalities,
                spacing=spacing,
                regions=regions,
            )
    scores = {}
    for part in roll.gather("the Dice of whole cases", own, limit=3600):
        scores |= part
    means = {
        f"volume/dice/{name}": float(np.mean([scores[case][name] for case in cases]))
        for name in regions
    }
    return means | {"volume/dice": float(np.mean(list(means.values())))}
