"""What a run says of itself: one interval late, with NaN named, and taken back on resuming."""

import json
import logging

import jax.numpy as jnp
import pytest

from masm_jax import metric_log
from masm_jax.metric_log import MetricLog, NonFinite


def values(step, **changes):
    loss = {"train/loss": step / 8, "train/dice_loss": 0.5, "train/learning_rate": 1e-3}
    return {key: jnp.float32(value) for key, value in (loss | changes).items()}


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps(folder):
    return [line["step"] for line in lines(folder)]


@pytest.fixture
def make_log(tmp_path):
    logs = []

    def make(**options):
        options = dict(total_steps=100, start_step=0, every=1) | options
        logs.append(MetricLog(tmp_path, **options))
        return logs[-1]

    yield make
    for log in logs:
        log.close()


def test_lines_come_one_interval_late(make_log, tmp_path):
    log = make_log(every=2)
    seen = []
    for step in range(1, 9):
        log.train(step, values(step))
        seen.append(steps(tmp_path))
    # The first at once, as a sign of life; then each when the next interval is over.
    assert seen == [[], [2], [2], [2], [2], [2, 4], [2, 4], [2, 4, 6]]
    log.flush()
    assert steps(tmp_path) == [2, 4, 6, 8]
    assert [line["train/loss"] for line in lines(tmp_path)] == [0.25, 0.5, 0.75, 1.0]


def test_the_last_interval_is_written_at_once(make_log, tmp_path):
    log = make_log(total_steps=4, every=2)
    for step in range(1, 5):
        log.train(step, values(step))
    assert steps(tmp_path) == [2, 4]


def test_nothing_is_fetched_before_it_is_written(make_log):
    """A metric that is still being computed must not be waited for."""

    class Late:
        def __array__(self, *_):
            raise AssertionError("fetched")

    log = make_log(every=2)
    for step in (1, 2):
        log.train(step, values(step))
    for step in (3, 4):
        log.train(step, {"train/loss": Late()})


def test_a_line_has_speed_waiting_and_the_time_left(make_log, tmp_path, monkeypatch):
    """Compilation is no measure of what is left; validation, which comes again, is in its share."""
    now = [0]
    monkeypatch.setattr(metric_log.time, "perf_counter", lambda: now[0])
    log = make_log(total_steps=10, every=2)
    log.waiting(1e9)
    for step, seconds in ((1, 100), (2, 101), (3, 112), (4, 113)):
        now[0] = seconds
        log.train(step, values(step))
    log.flush()
    first, second = lines(tmp_path)
    assert first["time/steps_per_s"] == pytest.approx(2 / 101) and first["time/wait_share"] == 1
    assert first["time/left_s"] == pytest.approx(8 * 1)
    assert second["time/steps_per_s"] == pytest.approx(2 / 12) and second["time/wait_share"] == 0
    assert second["time/left_s"] == pytest.approx(6 * 13 / 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_is_named_with_step_and_metric(make_log, tmp_path, bad):
    log = make_log(every=4)
    for step in range(1, 8):
        log.train(step, values(step, **({"train/grad_norm": bad} if step == 6 else {})))
    with pytest.raises(NonFinite, match=r"step 6: train/grad_norm is not finite.*learning_rate"):
        log.flush()  # in the middle of an interval: before a checkpoint is written
    assert steps(tmp_path) == [4, 6]  # for those who look at the file afterwards
    assert lines(tmp_path)[-1]["train/grad_norm"] is None
    log.train(8, values(8))
    with pytest.raises(NonFinite, match="step 6"):
        log.train(12, values(12))
    assert 8 not in steps(tmp_path)


def test_the_last_steps_are_written_though_the_interval_is_not_full(make_log, tmp_path):
    log = make_log(every=10, total_steps=13)
    for step in range(1, 14):
        log.train(step, values(step))
    assert steps(tmp_path) == [10, 13]


def test_a_step_without_a_whole_pair_has_no_keep_ratio(make_log, tmp_path, caplog):
    log = make_log(total_steps=2)
    for step in (1, 2):
        log.train(step, values(step, **{"train/keep/level1": float("nan")}))
    log.flush()
    assert [line["train/keep/level1"] for line in lines(tmp_path)] == [None, None]
    assert "has left" not in caplog.text


def test_a_validation_score_that_is_not_finite_is_null(make_log, tmp_path):
    make_log().write(5, {"val/dice": float("nan"), "val/dice/WT": 0.5})
    assert lines(tmp_path) == [{"step": 5, "val/dice": None, "val/dice/WT": 0.5}]


def test_lines_after_the_restored_step_are_taken_back(make_log, tmp_path):
    log = make_log()
    for step in range(1, 6):
        log.train(step, values(step))
    log.write(5, {"val/dice": 0.5})
    log.flush()
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 5]
    resumed = make_log(start_step=3)
    assert steps(tmp_path) == [1, 2, 3]
    resumed.train(4, values(40))
    assert [line["train/loss"] for line in lines(tmp_path)] == [1 / 8, 2 / 8, 3 / 8, 5.0]


def test_a_line_cut_off_by_a_crash_does_not_bar_the_way(make_log, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2}\n{"step": 2, "tra')
    make_log(start_step=2)
    assert steps(tmp_path) == [1]


def test_a_new_run_in_an_old_folder_starts_an_empty_file(make_log, tmp_path):
    make_log().write(3, {"val/dice": 1.0})
    make_log(start_step=0)
    assert steps(tmp_path) == []


def test_a_keep_ratio_out_of_range_is_said_once_per_level(make_log, caplog):
    log = make_log(total_steps=8)
    with caplog.at_level(logging.WARNING, logger="masm_jax"):
        for step in range(1, 9):
            ratios = {"train/keep/level1": 0.5, "train/keep/level2": 0.04 if step > 2 else 0.5}
            log.train(step, values(step, **ratios, **{"train/keep/level3": 0.96}))
        log.flush()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert said[0].startswith("step 3: train/keep/level2 = 0.040 has left [0.05, 0.95]")
    # Too much is said from half of the run on: every run starts by keeping nearly all.
    half = log._total // 2
    assert said[1].startswith(f"step {half}: train/keep/level3 = 0.960 has left [0.05, 0.95]")
