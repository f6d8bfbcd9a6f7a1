"""The recipes in scripts/: shell syntax, what they would run, when they run it again.

gcloud, srun and the like are replaced by small programs on PATH that write down how they were
called. Nothing here has seen a TPU, a GPU or a cluster.
"""

import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
SCRIPTS = sorted([*REPOSITORY.glob("scripts/*.sh"), *REPOSITORY.glob("scripts/*.sbatch")])
NAMES = [path.name for path in SCRIPTS]
TPU = {
    "PROJECT": "my-project",
    "ZONE": "us-west4-a",
    "TYPE": "v5litepod-16",
    "BUCKET": "gs://my-bucket",
    "REPO": "https://example.org/masm-jax.git",
    "POLL": "0",
}
WORKDIR = "--workdir=gs://my-bucket/runs/masm"
# Exits with the next of $CODES at each call, and writes its arguments, one call a line.
PYTHON = """
(IFS='|'; echo "$*") >>"$CALLS"
codes=($CODES)
exit "${codes[$(wc -l <"$CALLS") - 1]}"
"""


@pytest.fixture
def fake(tmp_path):
    """fake(name, body): a program of that name, ahead of the real one."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(name, body):
        path = folder / name
        path.write_text("#!/usr/bin/env bash\n" + body)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return make


@pytest.fixture
def environment(tmp_path):
    """PATH with the fake programs first, and none of the variables that the scripts read."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    return kept | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "PYTHON": "python",
        "PAUSE": "0",
    }


@pytest.fixture
def run(environment):
    """run(script, *words, code=0, **variables) -> CompletedProcess."""

    def run(script, *words, code=0, **variables):
        pathlib.Path(environment["CALLS"]).unlink(missing_ok=True)
        result = subprocess.run(
            ["bash", f"scripts/{script}", *words],
            cwd=REPOSITORY,
            env=environment | variables,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == code, result.stdout + result.stderr
        return result

    return run


@pytest.fixture
def calls(tmp_path):
    """calls(): the arguments of every call of the fake python in the last run."""

    def calls():
        path = tmp_path / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.split("|") for line in lines]

    return calls


# ---------------------------------------------------------------- as shell


@pytest.mark.parametrize("name", NAMES)
def test_syntax_and_mode(name):
    path = REPOSITORY / "scripts" / name
    subprocess.run(["bash", "-n", path], check=True)
    if name != "gpu_env.sh":  # sourced
        assert path.read_text().startswith("#!/usr/bin/env bash\n")
        assert "\nset -euo pipefail\n" in path.read_text()
        assert os.access(path, os.X_OK)


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=pathlib.Path(sys.executable).parent)
    assert shellcheck, "no shellcheck beside python: pip install -r requirements-test.txt"
    found = subprocess.run(
        [shellcheck, "-x", *(f"scripts/{name}" for name in NAMES)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr


# ---------------------------------------------------------------- keep_running.sh


def test_again_after_75_76_and_137_until_done(run, fake, calls):
    fake("python", PYTHON)
    said = run("keep_running.sh", "python", "train.py", "a b", CODES="75 76 137 0").stderr
    assert calls() == [["train.py", "a b"]] * 4
    assert "exit code 76: starting again" in said


@pytest.mark.parametrize("code", [1, 2, 3, 139])
def test_an_error_is_not_tried_again(run, fake, calls, code):
    fake("python", PYTHON)
    run("keep_running.sh", "python", "train.py", CODES=f"75 {code} 0", code=code)
    assert len(calls()) == 2


def test_gives_up_when_starts_come_to_nothing(run, fake, calls):
    fake("python", PYTHON)
    said = run("keep_running.sh", "python", CODES="76 " * 9, ATTEMPTS="3", code=76).stderr
    assert len(calls()) == 3 and "giving up" in said
    # Those that lasted long enough count for nothing.
    run("keep_running.sh", "python", CODES="76 " * 9 + "0", ATTEMPTS="3", BRIEF="0")
    assert len(calls()) == 10


@pytest.mark.parametrize("terminal", [False, True], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_reaches_the_command_once_and_ends_it(fake, environment, tmp_path, terminal):
    # As train.py takes signals; waits on after the first one, to count a second one.
    body = """
import signal, sys, time
def say(*_): print("signal", flush=True)
signal.signal(signal.SIGINT, say), signal.signal(signal.SIGTERM, say)
print("ready", flush=True)
for _ in range(20): time.sleep(0.1)
sys.exit(75)
"""
    (tmp_path / "train.py").write_text(body)
    fake("python", f"exec {sys.executable} {tmp_path / 'train.py'}\n")
    log = tmp_path / "log"
    with open(log, "w") as out:
        process = subprocess.Popen(
            ["bash", "scripts/keep_running.sh", "python"],
            cwd=REPOSITORY,
            env=environment,
            stdout=out,
            stderr=out,
            start_new_session=True,
            # Where the tests run in the background, Ctrl-C is ignored, and stays so in a shell.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    _wait_for("ready", log)
    if terminal:
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    else:
        process.terminate()
    assert process.wait(timeout=30) == 75
    assert log.read_text().count("ready") == 1
    assert log.read_text().count("signal") == 1, log.read_text()


def _wait_for(text, path):
    limit = time.monotonic() + 30
    while text not in path.read_text():
        assert time.monotonic() < limit, path.read_text()
        time.sleep(0.05)


def test_a_training_that_failed_is_not_scored(run, fake, calls, tmp_path):
    """An older checkpoint would be, under its name."""
    fake("python", PYTHON)
    fake("taskset", 'shift 2\n"$@"\n')
    words = "compare_mixers.sh", str(tmp_path / "runs"), "configs/masm_laptop.py"
    one = {"SEEDS": "0", "CORES": "1"}
    said = run(*words, **one, VARIANTS="masm late", CODES="1 0 0", code=1).stdout
    assert f"masm seed 0 failed: {tmp_path}/runs/masm-0/log.txt" in said and "late seed 0: " in said
    assert [call[0] for call in calls()] == ["train.py", "train.py", "eval.py"]
    assert "late seed 0 failed" in run(*words, **one, VARIANTS="late", CODES="0 3", code=1).stdout
    assert "failed" not in run(*words, **one, VARIANTS="late", CODES="0 0").stdout


def test_usage(run):
    assert "usage" in run("keep_running.sh", code=2).stderr


# ---------------------------------------------------------------- gpu_node.sh


def test_gpu_node_prints_or_runs(run, fake, calls):
    fake("python", PYTHON)
    said = run("gpu_node.sh", "--config.seed=1", DRY_RUN="1").stdout
    assert "keep_running.sh python train.py --config=configs/masm_brats.py" in said
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" in said
    assert not calls()
    folder = "/data/my run"
    run("gpu_node.sh", "--config.seed=1", CODES="75 76 0", WORKDIR=folder, RECORDS="/data/r s")
    words = ["train.py", "--config=configs/masm_brats.py", f"--workdir={folder}"]
    words += ["--config.data.records=/data/r s", "--config.seed=1"]
    assert calls() == [words] * 3


def test_gpu_node_ends_with_the_error(run, fake, calls):
    fake("python", PYTHON)
    run("gpu_node.sh", CODES="1 0", code=1)
    assert len(calls()) == 1


def test_no_python(run):
    for script in ("gpu_node.sh", "slurm.sbatch"):
        said = run(script, PYTHON="/nowhere/python", code=2).stderr
        assert "PYTHON=/nowhere/python cannot be run" in said and "make venv" in said


def _gpu_variables(environment, **given):
    command = 'source scripts/gpu_env.sh; echo "$XLA_FLAGS"; echo "${XLA_CLIENT_MEM_FRACTION:-}"'
    said = subprocess.run(
        ["bash", "-euc", command],
        cwd=REPOSITORY,
        env=environment | given,
        capture_output=True,
        text=True,
        check=True,
    )
    return said.stdout.splitlines()


def test_what_is_set_before_wins(environment):
    flags, share = _gpu_variables(environment)
    assert share == "0.9" and flags.count("--") == 1
    off = "--xla_gpu_enable_latency_hiding_scheduler=false"
    flags, share = _gpu_variables(environment, XLA_FLAGS=off, XLA_CLIENT_MEM_FRACTION="0.5")
    assert share == "0.5" and flags.endswith(off)  # of two, XLA takes the last
    flags, share = _gpu_variables(environment, XLA_PYTHON_CLIENT_MEM_FRACTION="0.5")
    assert share == ""  # both together are an error


def test_this_xla_knows_the_flags(environment):
    """An unknown flag in XLA_FLAGS ends the process."""
    flags, _ = _gpu_variables(environment)
    for given, known in ((flags, True), (flags + " --xla_gpu_no_such_flag=true", False)):
        result = subprocess.run(
            [sys.executable, "-c", "import jax; jax.devices()"],
            env=environment | {"XLA_FLAGS": given, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        assert (result.returncode == 0) == known, result.stderr


# ---------------------------------------------------------------- slurm.sbatch

SRUN = """
echo "srun: $*" >&2
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""


@pytest.fixture
def slurm(fake, run):
    """slurm(codes, code=..., ...): run the job once."""
    fake("python", PYTHON)
    fake("srun", SRUN)
    fake("scontrol", 'echo "scontrol: $*" >&2')
    fake("squeue", 'echo "${STATE:-RUNNING}"')
    job = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "32", "SLURM_SUBMIT_DIR": str(REPOSITORY)}

    def slurm(codes, *words, **options):
        return run("slurm.sbatch", *words, CODES=codes, **(job | options))

    return slurm


def test_slurm_directives():
    text = (REPOSITORY / "scripts/slurm.sbatch").read_text()
    head = text[: text.index("\nset -euo pipefail")]  # SLURM reads none after the first command
    for directive in ("--ntasks-per-node=1", "--gpus-per-node=8", "--requeue"):
        assert f"\n#SBATCH {directive}\n" in head
    assert "\n#SBATCH --signal=TERM@120" in head


@pytest.mark.parametrize("code", [75, 76, 137])
def test_slurm_queues_again(slurm, calls, code):
    said = slurm(str(code), "--config.seed=1", WORKDIR="/data/my run", code=code).stderr
    assert "srun: --kill-on-bad-exit=0 --cpus-per-task=32 python train.py" in said
    assert "scontrol: requeue 7" in said
    (words,) = calls()
    assert "--workdir=/data/my run" in words and words[-1] == "--config.seed=1"


@pytest.mark.parametrize("code", [0, 1, 2])
def test_slurm_ends(slurm, code):
    assert "requeue" not in slurm(str(code), code=code).stderr


def test_slurm_does_not_come_back_when_cancelled_or_too_often(slurm):
    assert "requeue" not in slurm("75", STATE="COMPLETING", code=75).stderr
    assert "requeue" not in slurm("76", SLURM_RESTART_COUNT="50", code=76).stderr


def test_slurm_dry_run_and_wrong_places(slurm, calls, tmp_path):
    said = slurm("0", DRY_RUN="1").stdout
    assert said.startswith("srun ") and "--workdir=runs/masm" in said and not calls()
    assert "not inside a job" in slurm("0", SLURM_JOB_ID="", code=2).stderr
    said = slurm("0", SLURM_SUBMIT_DIR=str(tmp_path), code=2).stderr
    assert f"no train.py in {tmp_path}" in said


# ---------------------------------------------------------------- tpu_pod.sh

# Pretends two workers: what is sent to all of them runs in two home folders.
GCLOUD = r"""
tr '\n' ' ' <<<"gcloud $*" >>"$LOG"; echo >>"$LOG"
case $* in
  *" describe "*)
    now=$(head -n 1 "$STATES")
    (($(wc -l <"$STATES") == 1)) || sed -i 1d "$STATES"
    case $now in
      ABSENT) echo "ERROR: NOT_FOUND: Resource was not found" >&2; exit 1 ;;
      DENIED) echo "ERROR: PERMISSION_DENIED: no" >&2; exit 1 ;;
      *) echo "$now" ;;
    esac ;;
  *" ssh "*)
    for word in "$@"; do case $word in --command=*) command=${word#--command=} ;; esac; done
    for worker in 0 1; do
      (export HOME=$WORKERS/$worker && mkdir -p "$HOME" && cd && bash -c "$command") || exit
    done ;;
esac
"""
SYSTEMD_RUN = r"""
while [[ $1 == --* ]]; do
  echo "systemd-run $1" >>"$LOG"
  case $1 in
    --working-directory=*) cd "${1#*=}" ;;
    --setenv=*) export "${1#--setenv=}" ;;
  esac
  shift
done
exec "$@"
"""
GIT = r"""
echo "git $*" >>"$LOG"
if [[ $1 == clone ]]; then
  folder=${*: -1}
  mkdir -p "$folder/.git"
  cp -r "$SOURCE/scripts" "$SOURCE/requirements.txt" "$folder"
fi
"""
# `pip install --user uv`, and then uv: an environment is a fake python.
PIP = r"""
mkdir -p ~/.local/bin
cat >~/.local/bin/uv <<'UV'
#!/usr/bin/env bash
echo "uv $*" >>"$LOG"
if [[ $1 == venv ]]; then mkdir -p .venv/bin; cp "$(command -v python)" .venv/bin/python; fi
UV
chmod +x ~/.local/bin/uv
"""


@pytest.fixture
def tpu(tmp_path, fake, run):
    """tpu(command, ..., states=...) -> (result, lines that the fake programs wrote)."""
    fake("gcloud", GCLOUD)
    fake("sudo", 'exec "$@"')
    fake("systemd-run", SYSTEMD_RUN)
    fake("systemctl", 'echo "systemctl $*" >>"$LOG"; [[ ${ACTIVE:-0} == 1 ]]')
    fake("git", GIT)
    fake("python3", PIP)
    fake("python", PYTHON)
    log, states = tmp_path / "log", tmp_path / "states"

    def tpu(*words, at="ACTIVE", **variables):
        log.write_text("")
        states.write_text("\n".join(at.split()) + "\n")
        places = {"LOG": log, "STATES": states, "WORKERS": tmp_path, "SOURCE": REPOSITORY}
        places = {name: str(place) for name, place in places.items()}
        result = run("tpu_pod.sh", *words, **(TPU | places | {"CODES": "0 0"} | variables))
        return result, [line.rstrip() for line in log.read_text().splitlines()]

    return tpu


def _verbs(lines):
    """What gcloud was asked for: [compute tpus queued-resources] create, [storage] rsync, ..."""
    calls = [line.split() for line in lines if line.startswith("gcloud ")]
    return [words[2] if words[1] == "storage" else words[4] for words in calls]


def test_tpu_dry_run(run, fake):
    fake("gcloud", "echo called >&2; exit 9")
    said = run("tpu_pod.sh", "resume", "--config.seed=1", DRY_RUN="1", **TPU).stdout
    assert "queued-resources create masm --node-id=masm --accelerator-type=v5litepod-16" in said
    assert "--runtime-version=v2-alpha-tpuv5-lite --spot" in said
    assert said.count("ssh masm --project=my-project --zone=us-west4-a --worker=all") == 3
    assert "scripts/keep_running.sh .venv/bin/python train.py --config=configs/masm_brats" in said
    assert f" {WORKDIR} " in said
    assert said.rstrip().endswith("--config.seed=1")
    for command in ("create", "setup", "data", "train", "status", "stop", "delete"):
        assert "gcloud" in run("tpu_pod.sh", command, DRY_RUN="1", **TPU).stdout


@pytest.mark.parametrize("missing", ["PROJECT", "ZONE", "TYPE", "BUCKET", "REPO"])
def test_tpu_missing_variable(run, missing):
    said = run("tpu_pod.sh", "create", code=2, **(TPU | {missing: ""})).stderr
    assert f"{missing} is not set" in said and f"{missing}=" in said


@pytest.mark.parametrize(
    "name, value",
    [("NAME", "my pod"), ("WORKDIR", "gs://b/my run"), ("REPO", "a;b"), ("RECORDS", "$(id)")],
)
def test_tpu_values_that_no_shell_would_keep(run, name, value):
    said = run("tpu_pod.sh", "train", code=2, **(TPU | {name: value})).stderr
    assert f"{name}='{value}'" in said and "no spaces" in said


def test_tpu_other_wrong_values(run):
    assert "expected gs://NAME" in run("tpu_pod.sh", "data", code=2, **TPU | {"BUCKET": "b"}).stderr
    assert "set RUNTIME" in run("tpu_pod.sh", "create", code=2, **TPU | {"TYPE": "h100"}).stderr
    assert "usage" in run("tpu_pod.sh", "begin", code=2, **TPU).stderr
    assert "takes no arguments" in run("tpu_pod.sh", "stop", "now", code=2, **TPU).stderr


def test_tpu_create_waits(tpu):
    _, lines = tpu("create", at="ABSENT WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    assert _verbs(lines) == ["describe", "create", "describe", "describe", "describe"]
    _, lines = tpu("create", at="ACTIVE", SPOT="0")
    assert _verbs(lines) == ["describe"]  # called again


def test_tpu_create_ends_with_the_cause(tpu):
    result, lines = tpu("create", at="FAILED", code=2)
    assert "failed" in result.stderr and "create" not in _verbs(lines)
    result, lines = tpu("create", at="DENIED", code=1)
    assert "PERMISSION_DENIED" in result.stderr and _verbs(lines) == ["describe"]


def test_tpu_on_demand(tpu):
    _, lines = tpu("create", at="ABSENT ACTIVE", SPOT="0")
    assert not any("--spot" in line for line in lines)


def test_tpu_setup_trains_and_starts_again_on_all_workers(tpu, calls):
    _, lines = tpu("setup", BRANCH="v1")
    clones = [line for line in lines if line.startswith("git clone")]
    assert clones == [f"git clone --quiet {TPU['REPO']} masm-jax"] * 2
    assert lines.count("git fetch --quiet --tags origin v1") == 2
    pins = (REPOSITORY / "requirements.txt").read_text().splitlines()
    (jax,) = (line for line in pins if line.startswith("jax=="))
    installed = [line for line in lines if line.startswith("uv pip install")]
    assert len(installed) == 2 and jax.replace("jax", "jax[tpu]") in installed[0]
    _, lines = tpu("setup")  # again: what is there stays
    assert not any(line.startswith(("git clone", "uv venv")) for line in lines)

    # The two pretended workers run one after the other.
    _, lines = tpu("train", "--config.seed=1", CODES="75 76 0 0", LIBTPU_INIT_ARGS="--a=1 --b=2")
    assert len(calls()) == 4
    expected = ["train.py", "--config=configs/masm_brats.py", WORKDIR]
    expected += ["--config.data.records=records/brats", "--config.batch_size=16", "--config.seed=1"]
    assert all(words == expected for words in calls())
    assert lines.count("systemd-run --property=KillMode=mixed") == 2
    assert lines.count("systemd-run --setenv=LIBTPU_INIT_ARGS=--a=1 --b=2") == 2


def test_tpu_leaves_a_running_training_alone(tpu, calls):
    for command in ("setup", "data", "train"):
        result, lines = tpu(command, ACTIVE="1")
        assert [line for line in lines if "systemctl" not in line and " ssh " not in line] == []
        assert "runs" in result.stdout
    assert not calls()
    _, lines = tpu("stop", ACTIVE="1")
    assert lines.count("systemctl stop masm-train") == 2


def test_tpu_resume_makes_a_slice_that_was_taken_anew(tpu, calls):
    _, lines = tpu("resume", at="SUSPENDED SUSPENDING ABSENT ACTIVE")
    expected = ["describe", "delete", "describe", "describe", "create", "describe"]
    assert _verbs(lines) == [*expected, "ssh", "ssh", "rsync", "rsync", "ssh"]
    assert len(calls()) == 2  # on each of the two workers


def test_tpu_status_and_delete(tpu):
    result, lines = tpu("status")
    assert "masm: ACTIVE" in result.stdout
    assert lines[-1] == "gcloud storage ls gs://my-bucket/runs/masm/checkpoints/"
    result, lines = tpu("status", at="SUSPENDED")
    assert "masm: SUSPENDED" in result.stdout and "ssh" not in _verbs(lines)
    _, lines = tpu("delete")
    assert "queued-resources delete masm --force --quiet" in lines[-1]
    _, lines = tpu("delete", at="ABSENT")
    assert _verbs(lines) == ["describe"]
