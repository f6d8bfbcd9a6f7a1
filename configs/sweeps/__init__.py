"""Sweeps of ``python -m masm_jax.sweep``: each file here compares variants of one part of MASM."""

# Phantoms of 4 mm (make sweep-records): a crop of 32^3 is nearly as much of a brain as one of 48^3
# at 3 mm, and a run takes two minutes on one CPU core.
SCORED = tuple(f"Phantom_{number:05d}" for number in range(40, 60))
COMMON = {
    "data.records": "demo/coarse/records",
    "data.split": "holdout:" + ",".join(SCORED),
    "patch": 32,
    "total_steps": 300,
    "log.patch_every": 100,  # keep ratios without noise are of these validations
    "log.volume_every": 0,  # whole cases are scored at the end
}


def on_scans(rows):
    """The sweep of these rows on real scans at 2 mm, with three seeds: two cases are scored."""
    common = {
        "data.split": "holdout:BraTS2021_01482,BraTS-GLI-00000-000",
        "log.volume_every": 0,  # whole cases are scored at the end
        "model.detail": 0,  # as docs/sweeps.md was measured
    }
    return _sweep("configs/masm_laptop.py", common, rows)


def on_phantoms(rows, **common):
    """The sweep of these rows on the coarse phantoms, with three seeds: 40 train, 20 are scored."""
    return _sweep("configs/masm_demo.py", COMMON | common, rows)


def _sweep(config, common, rows):
    # As docs/sweeps.md was measured.
    common = {"model.encoder_width": 1.0, "model.encoder_single": 0} | common
    return {"config": config, "common": common, "rows": rows, "seeds": (0, 1, 2), "split": "val"}
