"""Time to the first step: a real start of train.py, cold and cached; the arithmetic by hand."""

import json

import pytest

from masm_jax.benchmark import start
from masm_jax.benchmark.__main__ import main


def test_a_start_cold_and_cached(command_line, records, split, tmp_path, monkeypatch, capsys):
    for name in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS", "PYTHONPATH"):
        monkeypatch.setenv(name, command_line[1]["env"][name])
    words = ["start", "--config=configs/masm_demo.py", f"--records={records}", "--repeats=1"]
    small = ["patch=16", "model.mixers=()", "augment=none", f"data.split={split}"]
    words += [f"--set={text}" for text in small]
    assert main([*words, f"--output={tmp_path}"]) == 0
    found = json.loads((tmp_path / "start.json").read_text())
    cold, cached = (found["starts"][kind][0] for kind in ("cold", "cached"))
    assert list(cold["parts"]) == list(cached["parts"]) == list(start.PARTS)
    assert all(seconds > 0 for each in (cold, cached) for seconds in each["parts"].values())
    compiling = start.WORK["XLA compilation"]
    assert cached["work"][compiling] < cold["work"][compiling] < cold["parts"]["first step"] + 5
    assert found["ratio"] == sum(cached["parts"].values()) / sum(cold["parts"].values())
    said = capsys.readouterr().out
    assert said == (tmp_path / "start.md").read_text() and "| to the first step |" in said


def said(second, what, took):
    when = f"2026-01-01 00:00:{second:02d},000"
    return f"DEBUG:{when}:jax._src.dispatch:204: Finished {what} in {took:.9f} sec"


LINES = [
    (2.0, "DEBUG:2026-01-01 00:00:02,000:jax._src.xla_bridge:922: Initializing backend 'cpu'"),
    (3.0, "12:00:00 I 3 cases to train on, 1 to validate"),
    (4.0, "12:00:00 I compiling the training step; the first one takes longer"),
    (6.0, said(6, "tracing inner for jit", 1)),  # a part of the next
    (9.0, said(9, "tracing step for jit", 4)),
    (9.5, "12:00:00 D " + said(9, "tracing step for jit", 4)[20:]),  # again, by another handler
    (11.0, said(11, "jaxpr to MLIR module conversion jit(step)", 2)),
    (20.0, said(20, "XLA compilation of jit(step)", 8)),
    (21.0, "12:00:00 I step 1/1100  loss 1.3873"),
    (22.0, said(22, "XLA compilation of jit(later)", 1)),
]


def test_parts_and_work_by_hand():
    found = start.read(LINES)
    assert list(found["parts"].values()) == [2.0, 1.0, 1.0, 17.0]
    assert list(found["work"].values()) == [4.0, 2.0, 8.0]


def test_a_start_that_ends_early_names_what_is_missing():
    with pytest.raises(ValueError, match="has not written 'step 1/'"):
        start.read(LINES[:6])


def test_the_aim_is_said():
    each = start.read(LINES)
    on = {"cores": 2, "processor": "P"}
    found = {"config": "c.py", "set": ["a=b"], "date": "D", "machine": on, "aim": 0.25}
    found |= {"starts": {"cold": [each], "cached": [each]}}
    assert "is reached" in start.table(found | {"ratio": 0.25})[-1]
    assert "1.00. The aim, at most 0.25, is missed" in start.table(found | {"ratio": 1.0})[-1]


def test_what_train_refuses_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "train.py").write_text("print('DEBUG: no'); raise SystemExit('no key pach')")
    monkeypatch.setattr(start, "REPOSITORY", tmp_path)
    common = ["--config=configs/masm_demo.py", f"--records={tmp_path}", f"--output={tmp_path}"]
    assert main(["start", *common, "--set=pach=32"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "benchmark start: train.py ended with code 1, and said last: no key pach"


@pytest.mark.parametrize(
    "words, said",
    [
        (["--repeats=0"], "--repeats=0: expected 1 or more"),
        (["--set=patch"], "--set patch: expected KEY=VALUE"),
        (["--records=nowhere"], "--records=nowhere: not there"),
    ],
)
def test_wrong_flags_are_one_line(words, said, tmp_path, capsys):
    common = ["--config=configs/masm_demo.py", f"--records={tmp_path}", f"--output={tmp_path}"]
    assert main(["start", *common, *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
