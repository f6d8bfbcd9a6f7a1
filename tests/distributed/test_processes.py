"""Runs on several processes of this host: started, agreed, ended; and runs on one."""

import re
import socket

import pytest

from masm_jax import processes
from masm_jax.rollcall.members import differences, numbers
from tests.distributed.launched import ALONE, BOTH, HOST, TOGETHER, ended, listening, until, who

# ---------------------------------------------------------------- start and end


def test_all_come_agree_gather_and_leave(launch):
    script = (
        ALONE
        + TOGETHER
        + (
            "  roll.agree('the config', {'b': [1, None], 'a': 0.1})\n"
            "  print(roll.gather('ids', {'id': id}))\n"
            "  time.sleep(id / 2)\n"
            "  sys.exit(75)"
        )
    )
    for process in [launch(id, script, of=3) for id in range(3)]:
        out, said = ended(process, 75)
        assert out.splitlines()[1] == "[{'id': 0}, {'id': 1}, {'id': 2}]" and not said


def test_jax_knows_all_and_leaves(launch):
    script = BOTH + TOGETHER + "  print(process_allgather(np.int32(id + 1)).tolist())"
    for process in [launch(id, script) for id in range(2)]:
        assert "[1, 2]" in ended(process, 0)[0]


def test_strangers_are_left_alone(launch, port):
    script = ALONE + TOGETHER + "  roll.agree('all is well', True)\n"
    zero = launch(0, script)
    strangers = [listening(port + 1)]  # says nothing, and stays
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"\xff\x16\n", b"[1]\n", b'{"hello": 1}\n', b""):
        with listening(port + 1) as stranger:
            stranger.sendall(words)
    strangers.append(listening(port + 1))
    strangers[-1].sendall(b"{" * 2**20)  # a line without an end
    one = launch(1, script)
    for process in (zero, one):
        assert not ended(process, 0)[1]
    for stranger in strangers:
        stranger.close()


def test_who_is_missing_is_named(launch, port):
    script = ALONE + "Roll(place, limit=6 if id == 0 else 30)"
    zero, two = launch(0, script, of=4), launch(2, script, of=4)
    expected = (
        rf"-c: processes 1 and 3 of 4 did not come within 6 s; present: process 0 \(host {HOST}, "
        rf"pid {zero.pid}\), process 2 \(host {HOST}, pid {two.pid}\); look at the logs .* ports "
        rf"{port} and {port + 1} "
    )
    for process in (zero, two):
        assert re.match(expected, ended(process, 1)[1])


def test_nobody_writes_into_the_line_of_a_verdict(launch):
    """With PYTHONUNBUFFERED each write of Python is one to the file, and threads take turns."""
    script = (
        ALONE
        + "write, sys.stderr.write = sys.stderr.write, lambda text: write(f'<{text}>')\n"
        + "Roll(place, limit=1)"
    )
    _, err = launch(1, script).communicate(timeout=60)
    assert re.fullmatch("<-c: process 0 of 2 could not be reached [^<>]*\n>", err)


def test_process_0_is_missing(launch, port):
    process = launch(1, ALONE + "Roll(place, limit=1)")
    said = ended(process, 1)[1]
    assert said.startswith(
        f"-c: process 0 of 2 could not be reached at localhost:{port + 1} within"
    )
    assert who(process, 1) in said


@pytest.mark.parametrize(
    ("ids", "sizes", "message"),
    [
        ((1, 1), (3, 3), "two processes have the same id: {} and {}; give each its own"),
        ((1, 0), (3, 2), "{} was started as one of 3 processes, {} as one of 2; give all the"),
    ],
)
def test_who_does_not_fit_is_refused(launch, port, ids, sizes, message):
    script = ALONE + "Roll(place, limit=30)"
    zero = launch(0, script, of=3) if 0 not in ids else None
    others = [launch(id, script, of=of) for id, of in zip(ids, sizes)]
    names = [who(process, id) for process, id in zip(others, ids)]
    for process in [zero, *others] if zero else others:
        said = ended(process, 1)[1]
        assert message.format(*names) in said or message.format(*names[::-1]) in said


def test_who_went_before_the_start_may_come_again(launch):
    script = ALONE + TOGETHER + "  pass"
    zero = launch(0, script, of=3)
    first = launch(
        1,
        ALONE + "import threading\nthreading.Timer(0.5, os._exit, [9]).start()\n"
        "Roll(place, limit=30)",
        of=3,
    )
    ended(first, 9)
    rest = [launch(id, script, of=3) for id in (1, 2)]
    for process in (zero, *rest):
        ended(process, 0)


def test_a_late_double_does_not_end_the_run(launch):
    script = ALONE + TOGETHER + "  sys.stdin.readline() if id else None"
    zero, one = (
        launch(0, script),
        launch(1, script.replace("sys.stdin.readline()", "time.sleep(4)")),
    )
    until(one, "started")
    double = launch(1, script)
    assert f"the same id: {who(one, 1)} and {who(double, 1)}" in ended(double, 1)[1]
    ended(zero, 0), ended(one, 0)


@pytest.mark.parametrize("above", [0, 1])
def test_a_port_in_use_is_said(launch, port, above):
    with socket.create_server(("", port + above)):
        said = ended(launch(0, ALONE + "Roll(place, limit=30)"), 1)[1]
    assert f"cannot listen on ports {port} and {port + 1}" in said and "already in use" in said


# ---------------------------------------------------------------- agreement


def test_what_differs_is_said_by_process_0(launch):
    script = ALONE + "Roll(place, limit=30).agree('the config', {'seed': id // 2, 'patch': 16})\n"
    three = [launch(id, script, of=3) for id in range(3)]
    zero, *others = [process.communicate(timeout=60)[1].splitlines() for process in three]
    assert [process.returncode for process in three] == [1, 1, 1]
    assert zero[-2].startswith("-c: the processes do not agree on the config; start all with")
    assert zero[-1] == "  seed: 0 on processes 0 and 1; 1 on process 2"
    for lines in others:
        assert lines == [zero[-2] + " (more in the output of process 0)"]


def test_who_does_not_come_to_a_meeting_is_named(launch):
    script = ALONE + "roll = Roll(place, limit=30); time.sleep(60 * id)\n"
    zero, one = [launch(id, script + "roll.agree('ready', 1, limit=1)") for id in range(2)]
    for process in (zero, one):
        assert f"{who(one, 1)} has not reached 'ready' within 1 s" in ended(process, 1)[1]


def test_different_points_of_the_run(launch):
    script = ALONE + "roll = Roll(place, limit=30); roll.gather(f'point {id}', 0)"
    zero, one = [launch(id, script) for id in range(2)]
    assert ended(zero, 1)[1] == '  "point 0" on process 0; "point 1" on process 1'
    assert "different points" in ended(one, 1)[1]


def test_differences():
    assert differences([{"a": 1, "b": [1]}, {"b": [1], "a": 1}]) == ""
    assert differences([float("nan"), float("nan")]) == ""
    assert differences([5, 3, 5]) == "  5 on processes 0 and 2; 3 on process 1"
    one, two = {"x": {"y": 1, "z": []}}, {"x": {"y": 1.5, "z": [7]}, "w": None}
    assert differences([one, two]).splitlines() == [
        "  x.y: 1 on process 0; 1.5 on process 1",
        "  x.z: [] on process 0; absent on process 1",
        "  x.z.0: absent on process 0; 7 on process 1",
        "  w: absent on process 0; null on process 1",
    ]
    lines = differences([list(range(50)), list(range(1, 51))]).splitlines()
    assert len(lines) == 11 and lines[-1] == "  and 40 more"


def test_numbers():
    assert numbers([2]) == "process 2"
    assert numbers([0, 1]) == "processes 0 and 1"
    assert numbers([0, 1, 2, 5, 7, 8, 9, 10]) == "processes 0-2, 5 and 7-10"
    assert numbers(range(0, 1000, 2)).endswith(", 36, 38 and more")


# ---------------------------------------------------------------- one process


def test_one_process_has_the_same_calls(capsys):
    with processes.joined(None) as roll:
        roll.agree("the config", {"a": 1})
        assert roll.gather("ids", 7) == [7]
    with pytest.raises(SystemExit) as stopped, processes.joined(None):
        raise ValueError("config.patch = 7")
    assert stopped.value.code == 1 and capsys.readouterr().err.endswith(": config.patch = 7\n")
    with pytest.raises(ZeroDivisionError), processes.joined(None):
        raise ZeroDivisionError
