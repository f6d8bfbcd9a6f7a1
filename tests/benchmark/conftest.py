"""A small program as the TPU compiler prints it, and a report of it."""

import json
import pathlib

import pytest

from masm_jax.benchmark import chips, hlo, report, traffic


@pytest.fixture(scope="session")
def program():
    """Optimised HLO text, written by hand; the tests of its counts work out the sizes."""
    return (pathlib.Path(__file__).parent / "program.hlo").read_text()


@pytest.fixture(scope="session")
def found(program):
    """The report of that program, as ``python -m masm_jax.benchmark tpu`` writes it to JSON."""
    facts = {
        "fits": True,
        "seconds": 12.0,
        "date": "2026-01-02T03:04:05+00:00",
        "memory": {
            "arguments": 3e9, "outputs": 2e9, "aliased": 1e9, "temporaries": 5e9,
            "program": 1e8, "peak": 8e9,
        },
        "cost": {"flops": 2e12, "bytes_accessed": 5e9},
    }  # fmt: skip
    where = chips.parse("v5e:2x4")
    built = report.build(
        facts,
        traffic.count(hlo.parse(program)),
        where=where,
        samples=0.5,
        spatial=2,
        movers=5,
    )
    run = {
        "config": "configs/some.py", "step": "train", "size": "base", "parameters": 2_500_000,
        "topology": "v5e:2x4", "accelerator_type": "v5litepod-8", "chips": 8, "batch_size": 4,
        "batch_per_chip": 0.5, "spatial": 2, "patch": [256, 256, 160],
    }  # fmt: skip
    found = {"run": run, "chip": report.chip_facts(where), "compiled": facts} | built
    return json.loads(json.dumps(found))
