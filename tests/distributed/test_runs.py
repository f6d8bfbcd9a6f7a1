"""train.py and eval.py on two processes of two devices: the same numbers, stops, deaths."""

import json
import shutil
import signal
import socket
import subprocess
import time

import pytest

from tests.conftest import CASES

STEPS = 6
FLAGS = (
    "--config=configs/masm_demo.py",
    f"--config.total_steps={STEPS}",
    "--config.batch_size=8",
    "--config.patch=16",
    "--config.optim.warmup_steps=2",
    # A fifteenth of the config's: AdamW divides by the size of the gradient, and so makes steps of
    # the rounding of those that are nearly zero. With all of it 1.1e-6 was seen at the fifth step.
    "--config.optim.learning_rate=2e-4",
    "--config.model.mixers=('aware','concat','concat','concat','concat','shift')",
    "--config.model.keep_bias=0.0",
    "--config.log.every=1",
    "--config.log.patch_every=0",
    f"--config.log.volume_every={STEPS}",
    "--config.log.volumes=2",
    "--config.log.checkpoint_every=2",
    "--config.log.keep=2",
    "--config.infer.overlap=0.25",  # a third of the tiles
)
LIMIT = 300  # seconds for anything here


@pytest.fixture(scope="module")
def words(records, tmp_path_factory):
    """The command line of a run on two cases, less its folder."""
    split = tmp_path_factory.mktemp("two") / "split.json"
    split.write_text(json.dumps({"train": CASES[:2], "val": CASES[2:]}))
    return "train.py", *FLAGS, f"--config.data.records={records}", f"--config.data.split={split}"


@pytest.fixture
def processes(command_line, tmp_path):
    """start(*words, count=2) -> the running processes, each with what it has said in .said()."""
    running = []
    command, options = command_line

    def start(*words, count=2, own=()):
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        for number in range(count):
            place = (
                f"--coordinator=localhost:{port}",
                f"--num_processes={count}",
                f"--process_id={number}",
                "--start_timeout=120",
            )
            path = tmp_path / f"said{len(running)}"
            more = own[number] if own else ()
            with open(path, "w") as file:
                process = subprocess.Popen(
                    [*command, *words, *more, *place], **options, stdout=file, stderr=file
                )
            process.said = path.read_text
            running.append(process)
        return running[-count:]

    yield start
    for process in running:
        process.kill()
        process.wait()


def wait_for(condition, *processes):
    """Until it holds, or one of the processes has ended."""
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, [process.said() for process in processes]
        assert all(process.poll() is None for process in processes), [p.said() for p in processes]
        time.sleep(0.05)


def codes(*processes):
    return [process.wait(timeout=LIMIT) for process in processes]


def losses(workdir):
    """{step: (loss, ...)}."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    names = ("train/loss", "train/dice_loss", "train/cross_entropy", "train/ratio_loss")
    return {line["step"]: [line[name] for name in names] for line in lines if "train/loss" in line}


def saved(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def assert_same_losses(one, other):
    """But for the order of sums."""
    assert list(one) == list(other)
    for step, values in one.items():
        assert other[step] == pytest.approx(values, rel=1e-6, abs=1e-6), step


@pytest.fixture(scope="module")
def alone(command, words, tmp_path_factory):
    """The run on one process of four devices."""
    workdir = tmp_path_factory.mktemp("runs") / "alone"
    command(*words, f"--workdir={workdir}", "--cpu_devices=4")
    return workdir


def test_two_processes_stop_and_go_on_as_one(alone, processes, words, command, tmp_path):
    """SIGTERM to one, of two: both save and leave; one process of four devices goes on."""
    workdir = tmp_path / "run"
    first, second = processes(*words, f"--workdir={workdir}", "--cpu_devices=2")
    log = workdir / "metrics.jsonl"
    wait_for(lambda: log.is_file() and log.read_text().count("\n") >= 2, first, second)
    second.send_signal(signal.SIGTERM)
    assert codes(first, second) == [75, 75], (first.said(), second.said())
    assert "process 1" in first.said() and "SIGTERM; all stop after saving" in first.said()
    assert "SIGTERM: finishing the step and saving" in second.said()
    stopped = saved(workdir)[-1]
    assert 2 <= stopped < STEPS and list(losses(workdir)) == list(range(1, stopped + 1))
    said = command(*words, f"--workdir={workdir}", "--cpu_devices=4")
    assert f"continuing at step {stopped}" in said.stderr
    assert_same_losses(losses(alone), losses(workdir))


def test_a_killed_process_ends_the_other_and_both_go_on(alone, processes, words, tmp_path):
    workdir = tmp_path / "run"
    flags = (*words, f"--workdir={workdir}", "--cpu_devices=2")
    first, second = processes(*flags)
    wait_for(lambda: (workdir / "checkpoints" / "2").is_dir(), first, second)
    began = time.monotonic()
    second.kill()
    assert codes(first) == [76], first.said()
    assert time.monotonic() - began < 30
    (line,) = [line for line in first.said().splitlines() if line.startswith("train.py: ")]
    assert "process 1 of 2" in line and "start all processes again" in line
    kept = saved(workdir)[-1]
    again = processes(*flags)
    assert codes(*again) == [0, 0], [one.said() for one in again]
    assert_same_losses(losses(alone), losses(workdir))
    assert kept >= 2 and saved(workdir)[-1] == STEPS
    numbers = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert sum("volume/dice" in line for line in numbers) == 1  # one process writes
    assert {path.stem for path in (workdir / "overlays").iterdir()} == set(CASES[2:])


def test_another_config_on_one_of_them_ends_both(processes, words, tmp_path):
    flags = (*words, f"--workdir={tmp_path / 'run'}", "--cpu_devices=2")
    own = ((), ("--config.optim.learning_rate=0.5",))
    both = processes(*flags, own=own)
    assert codes(*both) == [1, 1]
    assert "do not agree on the config" in both[0].said()
    assert "optim.learning_rate: 0.0002 on process 0; 0.5 on process 1" in both[0].said()
    assert not (tmp_path / "run").exists()


def test_an_error_of_one_is_said_by_the_first(processes, words, records, tmp_path):
    gone = tmp_path / "gone"
    flags = (*words, f"--workdir={tmp_path / 'run'}", "--cpu_devices=2")
    both = processes(*flags, own=((), (f"--config.data.records={gone}",)))
    assert codes(*both) == [1, 1]
    assert f"process 1 (host {socket.gethostname()}" in both[0].said()
    assert str(gone) in both[0].said() and "Traceback" not in both[0].said()


def test_evaluation_shares_the_cases(alone, processes, command, tmp_path):
    flags = ("eval.py", f"--workdir={alone}", "--set=evaluation.styles=()", "--workers=0")
    command(*flags, f"--output={tmp_path / 'one'}")
    both = processes(*flags, f"--output={tmp_path / 'two'}")
    assert codes(*both) == [0, 0], [process.said() for process in both]
    one, two = ((tmp_path / name / "metrics.csv").read_text() for name in ("one", "two"))
    assert one == two and all(case in one for case in CASES[2:])
    assert "1/1 " in both[0].said() and "1/1 " in both[1].said()
    assert (tmp_path / "two" / "report.html").is_file()
    predictions = sorted(path.name for path in (tmp_path / "two" / "predictions").iterdir())
    assert predictions == [f"{case}.nii.gz" for case in CASES[2:]]


@pytest.mark.slow  # the others here go from four devices to two, test_train.py from one to eight
def test_fewer_and_fewer_devices(alone, processes, command, words, tmp_path):
    """4 devices of one process, 2 of two processes, 1."""
    workdir = tmp_path / "run"
    flags = (*words, f"--workdir={workdir}")
    command(*flags, "--cpu_devices=4", "--config.stop_at_step=2", code=75)
    assert losses(workdir) == {step: losses(alone)[step] for step in (1, 2)}  # to the last bit
    two = processes(*flags, "--cpu_devices=1", "--config.stop_at_step=4")
    assert codes(*two) == [75, 75], [process.said() for process in two]
    command(*flags, "--cpu_devices=1")
    assert_same_losses(losses(alone), losses(workdir))


def test_a_broken_checkpoint_is_named_and_the_one_before_used(alone, command, words, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(alone, workdir)
    newest, before = saved(workdir)[-1], saved(workdir)[-2]
    files = (path for path in (workdir / "checkpoints" / str(newest)).rglob("*") if path.is_file())
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 16
    largest.write_bytes(content)
    said = command(*words, f"--workdir={workdir}", "--cpu_devices=4")
    assert f"checkpoint {workdir / 'checkpoints' / str(newest)} is broken" in said.stderr
    assert f"continuing at step {before}" in said.stderr
    assert (workdir / "checkpoints_broken" / str(newest)).is_dir()
    assert losses(workdir) == losses(alone)  # to the last bit


def test_a_dry_run_says_what_a_run_takes_and_leaves_nothing(command, words, tmp_path):
    said = command(*words, f"--workdir={tmp_path / 'run'}", "--cpu_devices=2", "--dry_run")
    for text in ("2 data x 1 spatial", "process 0: 2 devices", "1 steps for 2 cases", "GB work"):
        assert text in said.stdout, said.stdout
    assert not (tmp_path / "run").exists()
