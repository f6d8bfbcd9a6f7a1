"""Long runs: memory, threads and open files of a training and of a prediction, drawn over time.

    python -m tests.faults.soak --workdir=DIR [--of=train,predict] [--steps=5000] [--cases=300]

A training of tiny steps with validation on crops and on whole cases and with checkpoints, and a
prediction of many cases (phantoms, each under many names). Both are looked at from outside, twice a
second, and asked where their threads are when there is one more: DIR/train.log, DIR/predict.log.
Prints a table, draws DIR/soak.png. Exit codes: 0 flat, 1 something grows, 2 usage.
"""

import argparse
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np

from masm_jax.files import replacing
from tests.faults import kills

TRAIN = (
    *(flag for flag in kills.TRAIN if "total_steps" not in flag and "_every" not in flag),
    "--config.log.patch_every=50",
    "--config.log.volume_every=250",
    "--config.log.volumes=1",
    "--config.log.checkpoint_every=100",
    "--config.infer.overlap=0.25",
    "--config.data.split=1/4",
)
EVERY = 0.5  # seconds
# What stands for a while, and the share by which the end may be above the middle. Checkpoints take
# memory and give it back, and how much at once is chance; what is lost for ever lifts the median.
QUANTITIES = {
    "memory, MB": (np.median, 0.05),
    "threads": (np.max, 0.0),
    "open files": (np.max, 0.0),
}


def main(argv=None):
    """Flags in, exit code out."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak")
    parser.add_argument("--workdir", required=True, metavar="DIR")
    parser.add_argument("--of", default="train,predict", help="commands; predict uses train's run")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--cases", type=int, default=300)
    args = parser.parse_args(argv)
    root = pathlib.Path(args.workdir).resolve()
    raw, records, run, log = root / "raw", root / "records", root / "run", root / "log"
    root.mkdir(parents=True, exist_ok=True)
    kills.run(["-m", "masm_jax.phantom", f"--output={raw}", "--cases=12", "--spacing=6"], log)
    kills.run(["-m", "masm_jax.prepare", f"--input={raw}", f"--output={records}"], log)
    commands = {
        "train": (f"training, {args.steps} steps", ["train.py", *TRAIN,
            f"--config.total_steps={args.steps}", f"--config.data.records={records}",
            f"--workdir={run}"]),
        "predict": (f"prediction of {args.cases} cases", ["-m", "masm_jax.predict",
            f"--workdir={run}", f"--input={_copies(raw, root / 'copies', args.cases)}",
            f"--output={root / 'predicted'}"]),
    }  # fmt: skip
    print("| | minutes | quantity | at a third | at the end |  |\n|---|---|---|---|---|---|")
    measured, flat = {}, True
    for name in args.of.split(","):
        title, words = commands[name]
        measured[title] = samples = watched(words, root / f"{name}.log")
        for quantity, values in zip(QUANTITIES, samples[:, 1:].T):
            middle, end, grows = ends(quantity, values)
            flat &= not grows
            cells = (title, f"{samples[-1, 0] / 60:.0f}", quantity, f"{middle:.0f}", f"{end:.0f}")
            print("|", " | ".join([*cells, "**grows**" if grows else "flat"]), "|", flush=True)
        np.savetxt(root / f"{name}.csv", samples, delimiter=",", header="s,MB,threads,files")
    draw(measured, root / "soak.png")
    return 0 if flat else 1


def watched(words, log):
    """Runs a command; (samples, 4): seconds, MB that it holds alone, threads, open files."""
    environment = os.environ | {"PYTHONPATH": str(kills.REPOSITORY)}
    with open(log, "w") as file:
        began, samples, most = time.monotonic(), [], 0
        process = subprocess.Popen([sys.executable, *words], cwd=kills.REPOSITORY, stdout=file,
                                   stderr=file, env=environment)  # fmt: skip
        while process.poll() is None:
            place = pathlib.Path(f"/proc/{process.pid}")
            try:
                status = dict(
                    line.split(":", 1) for line in (place / "status").read_text().splitlines()
                )
                files = len(list((place / "fd").iterdir()))
                held = int(status["RssAnon"].split()[0]) / 1e3
                threads = int(status["Threads"])
                samples.append((time.monotonic() - began, held, threads, files))
                if threads > most and int(status["SigCgt"], 16) >> (signal.SIGUSR2 - 1) & 1:
                    process.send_signal(signal.SIGUSR2)  # runtime.start has it listed
                    most = threads
            except (OSError, KeyError):
                pass  # it has just ended
            time.sleep(EVERY)
    if process.returncode:
        sys.exit(f"{' '.join(words)}: exit code {process.returncode}, see {log}")
    return np.array(samples)


def ends(quantity, values):
    """(around a third of the time, in the last tenth, whether it grows): ``values`` over time."""
    stands, slack = QUANTITIES[quantity]
    count = len(values)
    middle, end = (
        stands(part)
        for part in (values[count // 4 : count * 4 // 10], values[count * 9 // 10 : -4])
    )
    return middle, end, end > middle * (1 + slack)


def draw(measured, path):
    """One row per command, one column per quantity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shape = len(measured), len(QUANTITIES)
    figure, axes = pyplot.subplots(*shape, figsize=(11, 2.6 * shape[0]), squeeze=False)
    for row, (title, samples) in zip(axes, measured.items()):
        for index, (ax, quantity) in enumerate(zip(row, QUANTITIES)):
            ax.plot(samples[:, 0] / 60, samples[:, 1 + index], lw=0.8)
            ax.set(title=f"{title}: {quantity}", xlabel="minutes", ylim=(0, None))
            ax.title.set_size(9)
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)
    pyplot.close(figure)


def _copies(raw, folder, count):
    """The phantoms under ``count`` names, as links."""
    cases = sorted(path for path in raw.iterdir() if path.is_dir())
    for number in range(count):
        case = cases[number % len(cases)]
        name = f"Case_{number:05d}"
        (folder / name).mkdir(parents=True, exist_ok=True)
        for path in case.glob("*.nii.gz"):
            link = folder / name / path.name.replace(case.name, name)
            if not link.is_symlink():
                link.symlink_to(path)
    return folder


if __name__ == "__main__":
    sys.exit(main())
