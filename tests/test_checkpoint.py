"""Checkpoints: what is saved comes back, bit by bit and in its types, on any devices."""

import functools
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs import masm_demo
from masm_jax import optim, sharding
from masm_jax.checkpoint import Checkpoints, checksums, with_sharding
from masm_jax.files import told
from masm_jax.processes import Solo

META = {"modalities": ["t1", "flair"], "regions": {"WT": [1, 2, 3]}, "spacing": 2.0}


def new_state(seed=0, width=4):
    """A small state with all that a real one has."""
    random = np.random.default_rng(seed)
    params = {
        "encoder": {"levels": {0: {"kernel": random.normal(size=(3, width)).astype(np.float32)}}},
        "mixers": {"level1": {"bias": random.normal(size=(width,)).astype(np.float32)}},
    }
    params = jax.tree.map(jnp.asarray, params)
    section = masm_demo.get_config().optim
    tx = optim.optimiser(section, 10)
    _, opt_state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    return {
        "step": jnp.int32(seed + 1),
        "params": params,
        "ema": jax.tree.map(lambda x: x / 3, params),
        "opt_state": opt_state,
    }


def abstract(state, devices=1):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    shapes = jax.eval_shape(lambda: state)
    return with_sharding(shapes, sharding.replicated(mesh))


def assert_same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
        assert one.dtype == other.dtype and np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.fixture
def open_checkpoints(tmp_path):
    opened = []

    def make():
        opened.append(Checkpoints(tmp_path))
        return opened[-1]

    yield make
    for checkpoints in opened:
        checkpoints.close()


def save_all(checkpoints, scores):
    for step, dice in scores.items():
        checkpoints.save(step, new_state(step), dice=dice, meta=META | {"dice": dice})
    checkpoints.wait()


def kept(tmp_path):
    return sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("devices", [1, 8])
def test_what_was_saved_comes_back(open_checkpoints, devices):
    state = new_state()
    first = open_checkpoints()
    first.save(3, state, dice=0.25, meta=META | {"dice": 0.25})
    first.close()
    again = open_checkpoints()
    assert again.latest() == 3
    restored, meta = again.restore(3, abstract(state, devices))
    assert_same(state, restored)  # optax's named tuples too, not lists
    assert again.task() == meta
    assert meta.pop("checksums") == checksums(state) == checksums(restored)
    assert meta == META | {"dice": 0.25, "step": 3}
    assert all(len(leaf.sharding.device_set) == devices for leaf in jax.tree.leaves(restored))


def test_the_state_may_be_donated_once_save_returns(open_checkpoints):
    checkpoints, state = open_checkpoints(), new_state()
    expected = jax.tree.map(np.array, state)
    target = abstract(state)

    @functools.partial(jax.jit, donate_argnums=0)
    def overwrite(state):
        return jax.tree.map(lambda x: x * 0 - 1, state)

    checkpoints.save(1, state, dice=None, meta=META)
    jax.block_until_ready(overwrite(state))
    checkpoints.wait()
    restored, _ = checkpoints.restore(1, target)
    assert_same(expected, restored)


def damage(folder, how):
    """A bit of its largest file flipped, the second half or all of that cut off, or no state."""
    if how == "gone":
        shutil.rmtree(folder / "state")
        return
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    if how == "bit":
        content[len(content) // 2] ^= 4
    kept = {"bit": len(content), "half": len(content) // 2, "empty": 0}[how]
    largest.write_bytes(content[:kept])


@pytest.mark.parametrize("how", ["bit", "half", "empty", "gone"])
def test_a_broken_one_is_put_aside_and_the_one_before_taken(tmp_path, how):
    checkpoints = Checkpoints(tmp_path, keep=3)
    save_all(checkpoints, {1: 0.1, 2: 0.2, 3: 0.3})
    checkpoints.close()
    (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()  # of a run that was killed
    damage(tmp_path / "checkpoints" / "3", how)
    again = Checkpoints(tmp_path, keep=3)
    step, state, meta = again.restore_newest(abstract(new_state()), Solo(), put_aside=True)
    assert step == meta["step"] == 2
    assert_same(state, new_state(2))
    assert kept(tmp_path) == [1, 2] and (tmp_path / "checkpoints_broken" / "3").is_dir()
    again.save(3, new_state(3), dice=0.3, meta=META)  # its place is free
    again.close()
    assert kept(tmp_path) == [1, 2, 3]


def test_nothing_whole_is_an_error_that_changes_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    save_all(checkpoints, {1: 0.1, 2: 0.2})
    checkpoints.close()
    for step in (1, 2):
        damage(tmp_path / "checkpoints" / str(step), "gone")
    again = Checkpoints(tmp_path, keep=2)
    with pytest.raises(ValueError, match="no checkpoint is whole: 2: .*; 1: .*another --workdir"):
        again.restore_newest(abstract(new_state()), Solo(), put_aside=True)
    again.close()
    assert kept(tmp_path) == [1, 2]


def test_checksums_see_a_bit_and_a_swap():
    state = {"a": jnp.arange(4.0), "b": jnp.ones(3)}
    before = checksums(state)
    swapped = {"a": state["a"][::-1], "b": state["b"]}
    assert checksums(swapped)["a"] != before["a"] and checksums(swapped)["b"] == before["b"]
    next_to_two = np.nextafter(np.float32(2), np.float32(3))
    nudged = {"a": state["a"].at[2].set(next_to_two), "b": state["b"]}
    assert checksums(nudged)["a"] != before["a"]


def test_while_a_slow_disk_writes_the_one_before_is_the_newest(
    open_checkpoints, tmp_path, monkeypatch
):
    written, real = threading.Event(), ocp.StandardCheckpointHandler.async_save

    class Slow(ocp.future.Future):
        def result(self, timeout=None):
            assert written.wait(60)

    async def slowly(self, *args, **kwargs):
        return [*(await real(self, *args, **kwargs) or []), Slow()]

    checkpoints = open_checkpoints()
    save_all(checkpoints, {1: 0.1})
    monkeypatch.setattr(ocp.StandardCheckpointHandler, "async_save", slowly)
    checkpoints.save(2, new_state(2), dice=0.2, meta=META)  # comes back: training goes on
    assert not (tmp_path / "checkpoints" / "2").exists()
    assert open_checkpoints().latest() == 1  # what a run would find that starts now
    written.set()
    checkpoints.wait()
    restored, _ = open_checkpoints().restore(2, abstract(new_state()))
    assert_same(restored, new_state(2))


def test_a_folder_that_is_gone_is_not_made_anew(open_checkpoints, tmp_path):
    """As where a mount goes away: what is saved would lie below it."""
    checkpoints = open_checkpoints()
    save_all(checkpoints, {1: 0.1})
    (tmp_path / "checkpoints").rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match="is gone") as error:
        checkpoints.save(2, new_state(2), dice=0.2, meta=META)
    assert told(error.value).endswith("correct the path, or mount what it is on")
    assert not (tmp_path / "checkpoints").exists()


def test_the_best_and_the_latest_are_kept(open_checkpoints, tmp_path):
    checkpoints = open_checkpoints()
    assert checkpoints.latest() is None and checkpoints.best() is None
    save_all(checkpoints, {1: None, 2: 0.5, 3: 0.7})
    assert kept(tmp_path) == [3]
    save_all(checkpoints, {4: 0.6, 5: 0.65})
    assert kept(tmp_path) == [3, 5]
    assert (checkpoints.best(), checkpoints.latest()) == (3, 5)
    reopened = open_checkpoints()
    assert (reopened.best(), reopened.latest()) == (3, 5)
    save_all(reopened, {6: 0.8})
    assert kept(tmp_path) == [6]


def test_of_equals_the_newest_is_the_best(open_checkpoints):
    checkpoints = open_checkpoints()
    save_all(checkpoints, {1: 0.5, 2: 0.5})
    assert checkpoints.best() == 2


@pytest.mark.parametrize("step", [3, 4])
def test_a_step_is_not_written_twice(open_checkpoints, step):
    checkpoints = open_checkpoints()
    save_all(checkpoints, {4: None})
    with pytest.raises(RuntimeError, match=f"{step} was not written: a checkpoint at or past"):
        checkpoints.save(step, new_state(), dice=0.9, meta=META)


def test_an_unfinished_checkpoint_is_none(open_checkpoints, tmp_path):
    checkpoints = open_checkpoints()
    save_all(checkpoints, {2: None})
    (tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir()
    assert open_checkpoints().latest() == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda params: new_state(width=5)["params"],
            r"encoder.levels.0.kernel is \(3, 4\) float32 there and \(3, 5\) float32 in the",
        ),
        (
            lambda params: params | {"head": {"bias": jnp.zeros(2)}},
            r"head.bias is none there and \(2,\) float32 in",
        ),
        (lambda params: {"encoder": params["encoder"]}, r"mixers.level1.bias is \(4,\).* none in"),
        (
            lambda params: jax.tree.map(lambda x: x.astype(jnp.bfloat16), params),
            r"kernel is \(3, 4\) float32 there and \(3, 4\) bfloat16",
        ),
    ],
)
def test_another_network_is_named_by_its_first_parameter(open_checkpoints, change, words):
    checkpoints, state = open_checkpoints(), new_state()
    save_all(checkpoints, {1: None})
    other = state | {"params": change(state["params"])}
    with pytest.raises(ValueError, match=words) as caught:
        checkpoints.restore(1, abstract(other))
    assert len(str(caught.value).splitlines()) == 1
