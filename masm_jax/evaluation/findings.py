"""From numbers of a run to findings in plain words: the named failure signatures of the network.

Pure functions: what was measured goes in, findings come out. ``masm_jax/diagnose.py`` measures, and
writes the page. The limits at which something is called wrong are rules of thumb of ours.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import ndimage

from masm_jax.evaluation.metrics import dice

FINE, LOOK, WRONG = "fine", "worth a look", "wrong"
SHELLS = (1, 2, 4, 8)  # voxels from the surface; the last shell is what lies deeper
SMALL_ML = 1.0


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        signature: what it is a sign of.
        level: FINE, LOOK or WRONG.
        seen: what was measured, in words.
        advice: what to do; empty where nothing is to be done.
    """

    signature: str
    level: str
    seen: str
    advice: str = ""


# ---------------------------------------------------------------- measuring on arrays


def shells(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]
) -> dict[str, dict[str, int]]:
    """Voxels that are right and wrong by their distance from the surface of the reference.

    Args:
        prediction: (D, H, W) bool.
        reference: (D, H, W) bool, not empty, not everything.
        spacing: mm of a voxel along each axis.

    Returns:
        {name of the shell: {"missed", "inside", "false", "outside"}} numbers of voxels: of those
        of the reference in the shell how many were missed, of those outside how many are false. The
        distance is that to the nearest voxel of the other side (Euclidean), in units of the
        smallest voxel edge: the first shell is the two layers of voxels at the surface.
    """
    unit = min(spacing)
    inward = ndimage.distance_transform_edt(reference, sampling=spacing) / unit
    outward = ndimage.distance_transform_edt(~reference, sampling=spacing) / unit
    found, low = {}, 0.0
    for high in (*SHELLS, math.inf):
        name = f"up to {high}" if high < math.inf else f"beyond {SHELLS[-1]}"
        inside = reference & (inward > low) & (inward <= high)
        outside = ~reference & (outward > low) & (outward <= high)
        found[name] = {
            "missed": int((inside & ~prediction).sum()),
            "inside": int(inside.sum()),
            "false": int((outside & prediction).sum()),
            "outside": int(outside.sum()),
        }
        low = high
    return found


def added(tables: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """The sum of several tables of ``shells``."""
    return {
        shell: {key: sum(table[shell][key] for table in tables) for key in tables[0][shell]}
        for shell in tables[0]
    }


def parts(
    prediction: np.ndarray, reference: np.ndarray, voxel_ml: float
) -> list[tuple[float, bool]]:
    """Connected parts (26 neighbours) of the reference: (volume in ml, touched)."""
    labels, count = ndimage.label(reference, structure=np.ones((3, 3, 3)))
    sizes = ndimage.sum_labels(reference, labels, range(1, count + 1))
    touched = set(np.unique(labels[prediction]).tolist())
    return [(float(size * voxel_ml), i in touched) for i, size in enumerate(sizes, 1)]


def scores(internal: np.ndarray, label: np.ndarray, regions: Mapping) -> list[float]:
    """Dice of every region of two maps of internal labels."""
    return [dice(np.isin(internal, v), np.isin(label, v)) for v in regions.values()]


# ---------------------------------------------------------------- numbers to words


def masks(
    kept: Mapping[str, Mapping[str, float]],
    without: Mapping[str, float],
    whole: float,
    target: float,
) -> list[Finding]:
    """Too aggressive masks: what is kept without noise, and what changes when all is kept.

    Args:
        kept: {"level1/t1": {"all", "brain", "tumour": share}}.
        without: {level: mean Dice with all tokens of that level kept}.
        whole: mean Dice as trained.
        target: loss.keep_target.
    """
    what, findings = "masks too aggressive", []
    for level in dict.fromkeys(name.split("/")[0] for name in kept):
        own = {name.split("/")[1]: v for name, v in kept.items() if name.startswith(f"{level}/")}
        lowest = min(own, key=lambda name: own[name]["tumour"])
        share, brain = own[lowest]["tumour"], np.mean([v["brain"] for v in own.values()])
        seen = (
            f"{level} keeps {brain:.0%} of the brain (target {target:.0%}), and least of the "
            f"tumour in {lowest}: {share:.0%}"
        )
        gain = without.get(level, whole) - whole
        if level in without:
            seen += f"; with all of it kept the mean Dice changes by {gain:+.3f}"
        if gain > 0.02 or brain < 0.05:
            findings.append(Finding(what, WRONG, seen, _milder()))
        elif share < 0.5 or gain > 0.005:
            findings.append(Finding(what, LOOK, seen, _milder()))
        elif brain > 0.999:
            findings.append(
                Finding(what, FINE, seen + ": nothing is pruned here without the noise of training")
            )
        else:
            findings.append(Finding(what, FINE, seen))
    return findings


def _milder() -> str:
    return (
        "raise loss.keep_target towards 1, lower loss.ratio_weight, or train with "
        "model.pruning='mask' (pruned patches stay) or 'none' and compare"
    )


def detail(
    tables: Mapping[str, Mapping[str, Mapping[str, float]]],
    lesions: Mapping[str, Sequence[tuple[float, bool]]],
) -> list[Finding]:
    """Lost fine detail: errors far from the surface against those at it; small parts that are lost.

    Args:
        tables: {region: ``added`` shells}.
        lesions: {region: ``parts`` of all cases}.
    """
    what, findings = "lost fine detail", []
    for region, table in tables.items():
        names = list(table)
        missed = [_share(table[name], "missed", "inside") for name in names]
        deep = sum(table[name]["missed"] for name in names[2:])
        total = sum(table[name]["missed"] for name in names)
        seen = f"{region}: missed of the reference " + ", ".join(
            f"{value:.0%} {name} voxels from its surface" for name, value in zip(names, missed)
            if not math.isnan(value)
        )  # fmt: skip
        if total > 0.95 * sum(table[name]["inside"] for name in names):
            findings.append(
                Finding(
                    what, LOOK, f"{seen}: next to nothing of it is found",
                    "this is no matter of fine detail: train longer, or look at the labels",
                )
            )  # fmt: skip
        elif total and deep / total > 0.5:
            findings.append(
                Finding(
                    what, LOOK, f"{seen}; {deep / total:.0%} of what is missed lies deeper than "
                    f"{SHELLS[1]} voxels: whole parts are lost, not their rim",
                    "this is no matter of fine detail: train longer, or look at the cases",
                )
            )  # fmt: skip
        elif missed[0] > 0.4:
            findings.append(
                Finding(
                    what, LOOK, f"{seen}: the rim is lost",
                    "model.detail=8 where the size has a stem (model.size='full' has none), finer "
                    "records, or look at what the skips of levels 1 and 2 bring (below)",
                )
            )  # fmt: skip
        else:
            findings.append(Finding(what, FINE, seen))
        small = [found for ml, found in lesions.get(region, ()) if ml < SMALL_ML]
        large = [found for ml, found in lesions.get(region, ()) if ml >= SMALL_ML]
        if small:
            seen = (
                f"{region}: of {len(small)} parts below {SMALL_ML:g} ml {sum(small)} are touched, "
                f"of {len(large)} larger ones {sum(large)}"
            )
            lost = np.mean(small) < 0.5 and (not large or np.mean(large) > 0.8)
            advice = "specks are lost: infer.minimum_ml and infer.largest_component remove them too"
            findings.append(Finding(what, LOOK if lost else FINE, seen, advice if lost else ""))
    return findings


def skips(without: Mapping[str, float], whole: float) -> list[Finding]:
    """What the skip of each level brings: {level: mean Dice with that skip put to zero}."""
    findings = []
    for level, score in without.items():
        seen = f"without the skip of {level} the mean Dice is {score:.3f}, with it {whole:.3f}"
        if whole - score < -0.005:
            findings.append(
                Finding(
                    "contribution of the skips", WRONG, f"{seen}: the skip harms",
                    "look at the mixer of this level: 'concat' in its place in model.mixers",
                )
            )  # fmt: skip
        elif whole - score < 0.005:
            findings.append(
                Finding(
                    "contribution of the skips", LOOK, f"{seen}: it brings nothing",
                    "normal early in a training; else its mixer can be saved",
                )
            )  # fmt: skip
        else:
            findings.append(Finding("contribution of the skips", FINE, seen))
    return findings


def training(lines: Sequence[Mapping[str, float]], clip: float) -> list[Finding]:
    """How the training went.

    Args:
        lines: of metrics.jsonl.
        clip: optim.clip_norm.
    """
    findings, what = [], "training"
    loss = [(row["step"], row["train/loss"]) for row in lines if "train/loss" in row]
    if not loss:
        return [Finding(what, LOOK, "metrics.jsonl has no training loss", "is the run young?")]
    broken = [step for step, value in loss if value is None or not math.isfinite(value)]
    if broken:
        findings.append(
            Finding(
                what, WRONG, f"the loss was not finite at step {broken[0]}",
                "lower optim.learning_rate, or train in float32",
            )
        )  # fmt: skip
        return findings
    if len(loss) < 5:
        seen = f"{len(loss)} lines have a loss, 5 are needed to see how it goes"
        return [Finding(what, LOOK, seen, "train longer, or lower log.every")]
    count = len(loss) // 5
    first, last = (np.mean([v for _, v in part]) for part in (loss[:count], loss[-count:]))
    seen = f"mean loss {first:.3f} in the first fifth of the lines, {last:.3f} in the last"
    good = last < 0.97 * first
    advice = "" if good else "nothing is learnt: look at the labels, and at optim.learning_rate"
    findings.append(Finding(what, FINE if good else WRONG, seen, advice))
    norms = [row["train/grad_norm"] for row in lines if row.get("train/grad_norm") is not None]
    if norms and np.mean(np.array(norms) > clip) > 0.5:
        findings.append(
            Finding(
                what, LOOK,
                f"{np.mean(np.array(norms) > clip):.0%} of the logged gradients were cut to "
                f"optim.clip_norm = {clip:g}",
                "the step is set by the cut: lower optim.learning_rate or raise optim.clip_norm",
            )
        )  # fmt: skip
    dice_of = [(row["step"], row["val/dice"]) for row in lines if row.get("val/dice") is not None]
    if len(dice_of) >= 3:
        best = max(dice_of, key=lambda pair: pair[1])
        seen = (
            f"Dice on validation crops: best {best[1]:.3f} at step {best[0]}, last "
            f"{dice_of[-1][1]:.3f} at step {dice_of[-1][0]}"
        )
        fell = best[1] - dice_of[-1][1] > 0.03
        advice = "it overfits: fewer steps, more augmentation, or eval.py --checkpoint=best"
        findings.append(Finding(what, LOOK if fell else FINE, seen, advice if fell else ""))
    return findings


def empties(missed: Mapping[str, int], have: Mapping[str, int]) -> list[Finding]:
    """Regions predicted empty where the reference has some.

    Args:
        missed: {region: in how many cases}.
        have: {region: how many cases have it}.
    """
    return [
        Finding(
            "empty predictions", LOOK,
            f"{region}: nothing found in {count} of {have[region]} cases that have it",
            "lower infer.threshold or infer.minimum_ml (python -m masm_jax.tune)",
        )
        for region, count in missed.items() if count
    ] or [Finding("empty predictions", FINE, "no region that is there was left empty")]  # fmt: skip


def _share(row: Mapping[str, float], part: str, whole: str) -> float:
    return row[part] / row[whole] if row[whole] else math.nan
