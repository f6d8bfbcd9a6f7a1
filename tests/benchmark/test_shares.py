"""The table of shares: numbers by hand, refusals in one line."""

import argparse
import json
import re

import pytest

from masm_jax.benchmark import __main__ as command
from masm_jax.benchmark import peers, shares


def test_table_by_hand():
    networks = {
        "masm_tiny": {
            1.0: {"macs": 83_100_000_000, "seconds": [2.0, 4.0, 3.0]},
            0.5: {"macs": 49_500_000_000, "seconds": [1.5, 1.4, 1.6]},
        }
    }
    machine = {"cores": 2, "processor": "some CPU"}
    found = {"patch": 128, "rounds": 3, "networks": networks, "machine": machine}
    dice = {1.0: {"WT": 0.9, "mean": 0.9}, 0.5: {"WT": 0.8125, "mean": 0.8125}}
    lines = shares.table(found | {"date": "2026-11-23", "dice": dice, "run": "runs/x"})
    assert "| masm_tiny | 1 | 83.1 | 3.000 (2.000, 4.000) | 1.00 |" in lines
    assert "| masm_tiny | 0.5 | 49.5 | 1.500 (1.400, 1.600) | 0.50 |" in lines
    assert lines[-1] == "| 0.5 | 0.812 | 0.812 |"


def test_half_of_the_tokens_is_less_work_and_every_round_is_timed(monkeypatch):
    called = []

    def prepare(ours, **options):  # compiling takes the time here, not what is asked
        return lambda: called.append(ours.changes["infer.token_share"])

    monkeypatch.setattr(shares.jax_side, "prepare", prepare)
    args = argparse.Namespace(patch=16, rounds=2, config="configs/masm_demo.py")
    found = shares.measure(peers.NETWORKS["masm_tiny"], [1.0, 0.5], args)
    assert found[0.5]["macs"] < found[1.0]["macs"]
    assert all(len(each["seconds"]) == 2 for each in found.values())
    assert called == [1.0, 0.5] + [1.0, 0.5, 0.5, 1.0]  # once to compile, then back and forth


def test_what_cannot_be_measured_is_said_and_the_rest_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shares.jax_side, "prepare", lambda ours, **options: lambda: None)
    words = ["--networks=masm_tiny,late_base", "--patch=32", "--rounds=1", "--shares=1,0.5"]
    assert command.main(["shares", f"--output={tmp_path}", *words]) == 3
    said = capsys.readouterr()
    assert "| masm_tiny | 0.5 |" in said.out and "failed: late_base: " in said.err
    found = json.loads((tmp_path / "shares.json").read_text())
    assert list(found["networks"]) == ["masm_tiny"] and list(found["failed"]) == ["late_base"]


def test_a_run_that_is_not_there_is_said_before_anything_is_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shares, "measure", lambda *_: pytest.fail("measured"))
    assert command.main(["shares", f"--output={tmp_path}", f"--workdir={tmp_path / 'no'}"]) == 1
    assert "--workdir must be a folder that train.py has written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--shares=1,2"], r"--shares=1,2: expected numbers in \(0, 1\]"),
        (["--shares=abc"], "--shares=abc: expected numbers"),
        (["--networks=dynunet"], "dynunet has no tokens to choose"),
        (["--rounds=0"], "--rounds=0"),
    ],
)
def test_refusals(tmp_path, capsys, words, message):
    assert command.main(["shares", f"--output={tmp_path}", *words]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())
