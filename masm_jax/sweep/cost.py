"""What the network of a run costs, and what its masks would let it leave out."""

import copy
import json

import jax
import jax.numpy as jnp

from masm_jax import run_config
from masm_jax.benchmark import counting
from masm_jax.data.records import Records
from masm_jax.evaluation import tables
from masm_jax.state import Network, abstract_state, num_parameters
from masm_jax.steps import segment_step

KEPT = "val/keep/"  # decided without noise, on validation crops
DRAWN = "train/keep/"  # with the noise of the training


def write(folder):
    """Write FOLDER/cost.json of a trained run.

    {"parameters", "gmac": 1e9 multiply-adds of one crop forward, "avoidable_gmac": of these, what
    would be saved if each Modality-Aware level worked on the share of tokens that it keeps
    (``infer.token_share``), "kept", "drawn": {level: last keep ratio without and with noise}}.
    Where no keep ratio without noise was logged, "avoidable_gmac" is None.
    """
    config = run_config.load(folder)
    records = Records(config.data.records)
    kept = last(folder / "metrics.jsonl", KEPT)
    found = costs(config, records.modalities, records.regions, kept)
    found |= {"kept": kept, "drawn": last(folder / "metrics.jsonl", DRAWN)}
    tables.write_summary_json(folder / "cost.json", found)


def costs(config, modalities, regions, kept):
    """{"parameters", "gmac", "avoidable_gmac"} of a config.

    Args:
        config: of a run.
        modalities, regions: of its records.
        kept: {"level1": share, ...}; {}: not known.
    """
    parameters, whole = _macs(config, modalities, regions, config.infer.token_share)
    avoidable = 0 if kept else None
    for level, share in kept.items():
        if share < config.infer.token_share:
            # Nothing kept: a level works on one token all the same.
            _, less = _macs(config, modalities, regions, max(share, 1e-9))
            place = f"mixers {level}"
            avoidable += whole[place] - less[place]
    return {
        "parameters": parameters,
        "gmac": sum(whole.values()) / 1e9,
        "avoidable_gmac": None if avoidable is None else avoidable / 1e9,
    }


def last(path, prefix):
    """{rest of the name: its last value} of those metrics of a metrics.jsonl."""
    found = {}
    for line in path.read_text().splitlines():
        for name, value in json.loads(line).items():
            if name.startswith(prefix) and value is not None:
                found[name.removeprefix(prefix)] = value
    return found


def _macs(config, modalities, regions, share):
    config = copy.deepcopy(config)
    config.infer.token_share = share
    network = Network(config, modalities=modalities, regions=regions)
    params = abstract_state(network)["params"]
    crop = jax.ShapeDtypeStruct((1, len(modalities), *network.patch), jnp.float32)
    counted = counting.by_place(segment_step(network), params, crop)
    return num_parameters(params), counted
