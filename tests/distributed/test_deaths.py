"""Runs on several processes of this host: failed, killed, paused."""

import signal
import time

import pytest

from masm_jax.runtime import EXIT_PEER
from tests.distributed.launched import ALONE, BOTH, HOST, TOGETHER, ended, until, verdict, who


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_ends_all(launch, failing):
    script = (
        ALONE
        + TOGETHER
        + (
            f"  if id == {failing}: raise ValueError('config.patch = 7:\\nexpected 8')\n"
            "  time.sleep(60)"
        )
    )
    processes = [launch(id, script) for id in range(2)]
    cause = who(processes[failing], failing)
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert said[0].endswith(f"-c: {cause}: config.patch = 7:\nexpected 8\n")
    assert f"-c: {cause}: config.patch = 7:" in said[1]
    assert "Traceback" not in "".join(said)


def test_an_error_that_was_not_foreseen_has_its_traceback_where_it_was(launch):
    script = ALONE + TOGETHER + "  1 / id\n  time.sleep(60)"
    zero, one = [launch(id, script) for id in range(2)]
    err = zero.communicate(timeout=60)[1]
    assert "Traceback" in err and zero.returncode == 1
    assert ended(one, 1)[1] == f"-c: {who(zero, 0)}: ZeroDivisionError: division by zero"


def test_an_error_of_a_collective_waits_for_its_cause(launch):
    """JAX raises such as a ValueError at times."""
    script = (
        ALONE
        + "Roll.ping, Roll.silence = 0.5, 3.0\n"
        + TOGETHER
        + "  if id: raise ValueError('UNKNOWN: Gloo AllGather failed')\n"
        + "  time.sleep(60)"
    )
    zero, one = [launch(id, script) for id in range(2)]
    err = one.communicate(timeout=60)[1]
    assert "UNKNOWN: Gloo AllGather failed; up to 4 s to hear" in err and "Traceback" in err
    assert ended(zero, 1)[1] == f"-c: {who(one, 1)}: ValueError: UNKNOWN: Gloo AllGather failed"
    zero, one = [launch(id, script) for id in range(2)]
    until(one, "started")
    time.sleep(0.5)  # longer than a death takes to be seen
    zero.kill()
    assert "has gone without a word" in verdict(one, EXIT_PEER)


def test_an_error_ends_a_collective_of_the_others(launch):
    script = (
        BOTH
        + TOGETHER
        + ("  if id: roll.fail('no such record', 5)\n  process_allgather(np.ones(3))\n")
    )
    zero, one = [launch(id, script) for id in range(2)]
    for process in (zero, one):
        assert verdict(process, 5) == f"-c: {who(one, 1)}: no such record"


@pytest.mark.parametrize(("victim", "number"), [(0, signal.SIGKILL), (1, signal.SIGTERM)])
def test_a_death_ends_a_collective_of_the_others(launch, victim, number):
    """JAX would call abort(), at once if process 0 is dead, and name nobody."""
    script = (
        BOTH
        + TOGETHER
        + (
            "  process_allgather(np.ones(3))\n"
            f"  if id == {victim}: print('ready', flush=True); time.sleep(60)\n"
            "  process_allgather(np.ones(3))\n"
        )
    )
    two = [launch(id, script) for id in range(2)]
    until(two[victim], "ready")
    time.sleep(0.5)  # the other goes into the collective
    two[victim].send_signal(number)
    assert two[victim].wait(timeout=10) == -number  # JAX has not taken SIGTERM for itself
    start = time.monotonic()
    said = verdict(two[1 - victim], EXIT_PEER)
    assert time.monotonic() - start < 20
    assert said.startswith(
        f"-c: process {victim} of 2 (host {HOST}, pid {two[victim].pid}) has gone without a word"
    )


@pytest.mark.parametrize("victim", [0, 1])
def test_a_paused_process_ends_the_others_and_itself_when_it_comes_back(launch, victim):
    script = ALONE + "Roll.ping, Roll.silence = 0.2, 3.0\n" + TOGETHER + "  time.sleep(60)"
    two = [launch(id, script) for id in range(2)]
    until(two[victim], "started")
    two[victim].send_signal(signal.SIGSTOP)
    said = ended(two[1 - victim], EXIT_PEER)[1]
    assert f"pid {two[victim].pid}) has given no sign of life for 3 s" in said
    two[victim].send_signal(signal.SIGCONT)
    assert "; the run ends here; start all" in ended(two[victim], EXIT_PEER)[1]


def test_a_short_pause_is_forgiven(launch):
    script = ALONE + "Roll.ping, Roll.silence = 0.2, 5.0\n" + TOGETHER + "  time.sleep(2)"
    zero, one = [launch(id, script) for id in range(2)]
    until(one, "started")
    for process in (zero, one):
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.7)
        process.send_signal(signal.SIGCONT)
    ended(zero, 0), ended(one, 0)
