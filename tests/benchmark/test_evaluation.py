"""Where an evaluation spends its time: a real one of two cases; tables by hand."""

import json

import jax
import pytest

from masm_jax import checkpoint, run_config, state
from masm_jax.benchmark import evaluation
from masm_jax.benchmark.__main__ import main
from masm_jax.data.conventions import MODALITIES, REGIONS
from masm_jax.evaluation.clock import Clock

CASES = [f"Phantom_{index:05d}" for index in range(4)]


@pytest.fixture
def untrained(make_config, tmp_path):
    """A run of no steps: a plain U-Net as it was born."""
    config = make_config(**{"model.mixers": ()})
    workdir = tmp_path / "run"
    network = state.Network(config, modalities=MODALITIES, regions=REGIONS)
    with checkpoint.Checkpoints(workdir) as checkpoints:
        meta = {"modalities": MODALITIES, "regions": REGIONS, "spacing": None}
        born = jax.device_put(state.init_state(network, network.init(0)), jax.devices()[0])
        checkpoints.save(0, born, dice=None, meta=meta)
    run_config.save(config, workdir)
    split = {"train": CASES[:1], "val": CASES[1:], "test": []}
    (workdir / "split.json").write_text(json.dumps(split))
    return workdir


def test_the_seconds_of_a_real_evaluation(
    untrained, records, command_line, tmp_path, monkeypatch, capfd
):
    for name in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS", "PYTHONPATH"):
        monkeypatch.setenv(name, command_line[1]["env"][name])
    words = [f"--workdir={untrained}", f"--records={records}", f"--output={tmp_path}"]
    assert main(["evaluation", *words, "--cases=2"]) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert [case["case"] for case in found["cases"]] == CASES[1:3]
    for case in found["cases"]:
        assert all(case[stage] > 0 for stage in evaluation.STAGES)
    assert found["together"]["report"] > found["together"]["writing"] > 0
    assert capfd.readouterr().out.endswith((tmp_path / "evaluation.md").read_text())
    for name in ("evaluation.png", "evaluation.svg", "eval/report.html"):
        assert (tmp_path / name).stat().st_size > 500


def case(name, *seconds):
    return {"case": name} | dict(zip(evaluation.STAGES, seconds))


def test_shares_and_the_aim_by_hand():
    found = {"run": "R", "date": "D", "machine": {"cores": 2, "processor": "P"}}
    found["cases"] = [case("a", 1, 20, 2, 1, 2), case("b", 1, 4, 2, 1, 2), case("c", 1, 4, 5, 1, 2)]
    found["together"] = {"writing": 0.0, "report": 6.0}
    lines = evaluation.table(found)
    assert "| metrics | 2.000 | 17% | 2.000 to 5.000 |" in lines
    assert "| pictures and report | 4.000 | 33% | 4.000 to 4.000 |" in lines
    assert "| all, without pictures and report | 8.000 | 67% |  |" in lines
    assert "| all | 12.000 | 100% |  |" in lines and lines[-1].endswith("is missed in c.")
    found["cases"].pop()
    assert evaluation.table(found)[-1].endswith("is reached.")


def test_the_clock_adds_up_also_what_fails():
    times = iter([0.0, 2.0, 10.0, 13.0])
    clock = Clock(lambda: next(times))
    with clock.stage("metrics"):
        pass
    with pytest.raises(ValueError), clock.stage("metrics"):
        raise ValueError
    assert clock.seconds == {"metrics": 5.0}


def test_wrong_flags_are_one_line(tmp_path, monkeypatch, capsys):
    words = ["evaluation", "--workdir=w", "--records=r", f"--output={tmp_path}"]
    assert main([*words, "--cases=-1"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "--cases=-1: expected 1 or more, or 0" in line
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "seconds.json").write_text("{}")  # of another time
    (tmp_path / "eval.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(evaluation, "REPOSITORY", tmp_path)
    assert main(words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "benchmark evaluation: eval.py ended with code 3; what it said is above"
