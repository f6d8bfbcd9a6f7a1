"""Paths on this machine and in buckets; a bucket is fsspec's file system in memory here."""

import json

import jax.numpy as jnp
import pytest
from etils.epath import backend

from configs import masm_demo
from masm_jax import run_config
from masm_jax.evaluation import pictures
from masm_jax.files import as_path, is_remote, replacing
from masm_jax.metric_log import MetricLog

fsspec = pytest.importorskip("fsspec", reason="buckets need fsspec")


@pytest.fixture
def bucket(monkeypatch):
    """gs://bucket, which as on the real thing can neither append nor rename."""
    monkeypatch.setenv("EPATH_USE_TF", "false")
    memory = fsspec.filesystem("memory")
    monkeypatch.setattr(backend._FileSystemSpecBackend, "fs", lambda self, path: memory)
    yield "gs://bucket/run"
    memory.store.clear()


def test_paths(tmp_path):
    assert as_path(tmp_path) == tmp_path and not is_remote(as_path(tmp_path))
    assert as_path(f"file://{tmp_path}/run") == tmp_path / "run"
    assert as_path("runs/a").is_absolute()
    assert str(as_path("gs://bucket/run")) == "gs://bucket/run" and is_remote("gs://bucket/run")
    with pytest.raises(ValueError, match="ftp://host/run: no such scheme.*gs://"):
        as_path("ftp://host/run")


def test_half_a_file_is_never_there(bucket):
    path = as_path(bucket) / "file.txt"
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert not path.exists()
    with replacing(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"


def test_config_and_log_of_a_run_in_a_bucket(bucket):
    config = masm_demo.get_config()
    run_config.save(config, bucket)
    assert run_config.to_dict(run_config.load(bucket)) == run_config.to_dict(config)
    log = MetricLog(bucket, total_steps=6, start_step=0, every=1)
    for step in range(1, 4):
        names = ("train/loss", "train/dice_loss", "train/learning_rate")
        log.train(step, dict.fromkeys(names, jnp.float32(step)))
    log.flush()
    log.close()
    path = as_path(bucket) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and lines[1]["train/loss"] == 2
    # A run that goes on at step 1 takes back what came after.
    MetricLog(bucket, total_steps=6, start_step=1, every=1).close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1]
    pictures.curves(as_path(bucket) / "curves.png", path)
    assert (as_path(bucket) / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_who_does_not_write_leaves_nothing(tmp_path):
    log = MetricLog(tmp_path, total_steps=6, start_step=0, every=1, writes=False)
    log.train(1, {"train/loss": jnp.float32(1)})
    log.write(1, {"val/dice": 0.5})
    log.flush()
    log.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ArithmeticError, match="step 2: train/loss is not finite"):
        log.train(2, {"train/loss": jnp.float32("nan")})
        log.flush()
