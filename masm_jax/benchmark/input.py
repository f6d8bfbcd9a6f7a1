"""How fast training crops come from records, beside MONAI's and nnU-Net's ways to load.

    python -m masm_jax.benchmark input --records=records/brats --output=FOLDER
    python -m masm_jax.benchmark input --records=NEW_FOLDER --cases=8 --output=FOLDER

Three questions: crops per second and core, of each way on the same cases; the share of a training
loop that waits for data, against a device that is a clock (--rate); whether the memory of the
loading processes stays what it is. Without augmentation, which happens on the device. Every
measurement has a process of its own, pinned to its cores and told to keep freed memory, as train.py
does; the ways take turns, in another order each round. Linux. MONAI and blosc2 are no requirements
of this package: a way without its packages is listed as skipped. FOLDER gets input.json, input.md
and a plot.
"""

import importlib.util
import json
import pathlib
import statistics
import sys
import tempfile

import numpy as np

from masm_jax.benchmark import loaders, workers
from masm_jax.files import replacing
from masm_jax.runtime import EXIT_SOME_FAILED

_BATCH = 2  # crops in a batch of the throughput: what nnU-Net trains with at 128^3
_INSTALL = "pip install -r requirements-bench.txt"


def add_arguments(parser):
    """Flags of the command."""
    parser.add_argument("--records", required=True, metavar="DIR", help="made by masm_jax.prepare")
    parser.add_argument(
        "--cases", type=int, default=0, metavar="N",
        help="make DIR first: N simulated patients at 1 mm, 15 s each; kept for the next time",
    )  # fmt: skip
    parser.add_argument("--patch", default="128,64", help="edges of crops, voxels (128,64)")
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement (10)")
    parser.add_argument("--rounds", type=int, default=5, help="of throughput (5)")
    parser.add_argument(
        "--rate", type=float, default=27, help="crops/s of the device waited for (27: an A100's)"
    )
    parser.add_argument("--batches", default="2,8", help="batch sizes of that loop (2,8)")
    parser.add_argument("--crops", type=int, default=2000, help="loaded for the memory (2000)")
    parser.add_argument(
        "--foreground", type=float, default=1 / 3, help="share of crops around tumour (1/3)"
    )
    parser.add_argument("--output", metavar="FOLDER", help="for input.json, input.md, input.png")


def run(args):
    """Exit code of the command: 3 where a way died.

    Raises:
      ValueError: anything that the user can mend, in one line.
    """
    patches, sizes = _numbers(args.patch, "--patch"), _numbers(args.batches, "--batches")
    if not 0 <= args.foreground <= 1 or min(args.seconds, args.rate, args.rounds, args.crops) <= 0:
        raise ValueError("--foreground: a share, 0 to 1; the other numbers: above 0")
    if args.cases:
        simulate(args.records, args.cases)
    found = {
        "what": "training crops from the same cases; no augmentation, files in the page cache",
        "machine": workers.machine(),
        "cases": cases(args.records),
        "foreground": args.foreground,
        "rate": args.rate,
        "skipped": skipped(),
        "failed": {},
        "throughput": [],
        "waiting": [],
        "memory": [],
    }
    with tempfile.TemporaryDirectory(dir=args.output and _made(args.output)) as stores:
        for patch in patches:
            found["throughput"] += _throughput(args, patch, stores, found["failed"])
    for size in sizes:
        for cores in dict.fromkeys((1, len(workers.cores()))):
            found["waiting"].append(_waiting(args, max(patches), size, cores))
    for processes in dict.fromkeys((0, len(workers.cores()))):
        found["memory"] += _memory(args, max(patches), processes)
    words = "\n".join(table(found))
    print(words)
    if args.output:
        folder = pathlib.Path(args.output)
        for name, text in (("input.json", json.dumps(found, indent=1)), ("input.md", words)):
            with replacing(folder / name) as temporary:
                temporary.write_text(text + "\n")
        from masm_jax.benchmark import plots

        plots.save(picture(found), folder / "input")
        print(f"{folder}: input.json, input.md, input.png, input.svg")
    return EXIT_SOME_FAILED if found["failed"] else 0


def simulate(records, number):
    """Make a folder of records of simulated patients at 1 mm; what is there stays.

    Raises:
      ValueError: it could not be made, or holds something else.
    """
    from masm_jax import phantom, prepare

    raw = f"{str(records).rstrip('/')}-phantoms"
    made = phantom.main([f"--output={raw}", f"--cases={number}", "--spacing=1"])
    if made or prepare.main([f"--input={raw}", f"--output={records}"]):
        raise ValueError(f"--cases={number}: {records} could not be made, as said above")


def cases(records):
    """{"number", "shape": median edges, voxels, "origin"} of a folder of records."""
    found = loaders.Records(records)
    metas = [found.meta(case) for case in found.cases]
    unlabelled = [meta["case"] for meta in metas if meta["segmentation"] is None]
    if unlabelled or not metas:
        raise ValueError(
            f"{records}: {unlabelled[:3]} without segmentation; expected labelled cases"
        )
    shape = np.median([meta["record_shape"] for meta in metas], axis=0)
    simulated = all(case.startswith("Phantom_") for case in found.cases)
    return {
        "number": len(metas),
        "shape": [len(found.modalities), *map(int, shape)],
        "origin": "simulated" if simulated else "scans",
    }


def skipped():
    """Ways that cannot be measured here: name -> why, and what would help."""
    missing = {
        way: [name for name in needed if importlib.util.find_spec(name) is None]
        for way, needed in loaders.NEEDS.items()
    }
    return {
        way: f"{', '.join(names)} not installed; {_INSTALL}"
        for way, names in missing.items()
        if names
    }


# ---------------------------------------------------------------- measuring


def _throughput(args, patch, stores, failed):
    """Rows: every way alone on one core, and those with workers on all cores.

    A way that dies, as one that holds all cases in memory may, is noted in ``failed``, and the
    others go on.
    """
    options = {"records": str(args.records), "patch": patch, "foreground": args.foreground}
    ways = [way for way in loaders.WAYS if way not in skipped()]
    store = {"store": str(pathlib.Path(stores) / str(patch))}
    gone = set()
    if "nnunet" in ways:
        try:
            packed = workers.call(
                "masm_jax.benchmark.loaders:compress", records=str(args.records), patch=patch,
                **store,
            )  # fmt: skip
        except workers.Failed as error:
            gone.add(("nnunet", 0))
            failed[f"nnunet, {patch}^3, its files"] = str(error)
    every = workers.cores()
    plans = [(way, 0) for way in ways]
    plans += [(way, len(every)) for way in ways if way in loaders.WITH_WORKERS]
    runs = {plan: [] for plan in plans}
    for number in range(args.rounds):
        turn = number % len(plans)
        for way, processes in plans[turn:] + plans[:turn]:
            if (way, processes) in gone:
                continue
            _say(f"{patch}^3, round {number + 1} of {args.rounds}: {way}, {processes} workers")
            try:
                found = workers.call(
                    "masm_jax.benchmark.feeding:throughput", cores=every[: processes or 1],
                    environment=workers.KEEP_MEMORY, way=way, workers=processes, seed=number,
                    batch=_BATCH, seconds=args.seconds, **options,
                    **(store if way == "nnunet" else {}),
                )  # fmt: skip
            except workers.Failed as error:
                gone.add((way, processes))
                failed[f"{way}, {patch}^3, {processes or 'no'} workers"] = str(error)
                _say(f"{way}: {error}")
                continue
            runs[way, processes].append(found)
    return [
        {"way": way, "patch": patch, "workers": processes, "cores": processes or 1}
        | _summary(found, processes or 1)
        | {"packed": packed["bytes"] / packed["of"] if way == "nnunet" else None}
        for (way, processes), found in runs.items()
        if (way, processes) not in gone
    ]


def _summary(runs, cores):
    rates = [run["crops"] / run["seconds"] / cores for run in runs]
    return {
        "per_core": statistics.median(rates), "slowest": min(rates), "fastest": max(rates),
        "cpu_ms": statistics.median(1e3 * run["cpu_seconds"] / run["crops"] for run in runs),
        "memory_mb": statistics.median(run["memory_mb"] for run in runs),
    }  # fmt: skip


def _waiting(args, patch, batch, cores):
    """A row: the training loop's input at the speed of a device."""
    _say(f"{patch}^3, batch {batch}, {cores} cores: waiting share at {args.rate:g} crops/s")
    run = workers.call(
        "masm_jax.benchmark.feeding:waiting", cores=workers.cores()[:cores],
        environment={"JAX_PLATFORMS": "cpu"}, records=str(args.records), patch=patch, batch=batch,
        foreground=args.foreground, rate=args.rate,
        seconds=max(args.seconds, 20 * batch / args.rate),
    )  # fmt: skip
    shares = {name: run[name] / run["seconds"] for name in ("waited", "idle")}
    return {"patch": patch, "batch": batch, "cores": cores, "steps": run["steps"], **shares}


def _memory(args, patch, processes):
    """Rows: first and last size of every loading process, and how it grows."""
    _say(f"{patch}^3, {processes} workers: memory over {args.crops} crops")
    found = workers.call(
        "masm_jax.benchmark.feeding:flat", records=str(args.records), patch=patch,
        foreground=args.foreground, crops=args.crops, processes=processes,
    )  # fmt: skip
    rows = []
    for row in found:
        if len(row["crops"]) < 3:
            continue  # a helper that came and went
        rest = len(row["crops"]) // 4  # by then every case has been read
        slope = np.polyfit(row["crops"][rest:], row["own"][rest:], 1)[0]
        rows.append({
            "process": row["process"], "workers": processes, "patch": patch,
            "first_mb": row["own"][0] / 1024, "last_mb": row["own"][-1] / 1024,
            "slope_kb": 1000 * slope, "rss_mb": row["rss"][-1] / 1024, "samples": row,
        })  # fmt: skip
    return rows


# ---------------------------------------------------------------- report


def table(found):
    """Lines of Markdown."""
    machine, shape = found["machine"], "x".join(map(str, found["cases"]["shape"]))
    lines = [
        f"{found['cases']['number']} {found['cases']['origin']} cases of about {shape} voxels; "
        f"{found['what']}; {found['foreground']:.0%} of the crops around tumour; "
        "epochs of at least 1251 crops. "
        f"{machine['cores']} cores of {machine['processor']}, load {machine['load']} before, "
        f"{machine['date']}.",
        "",
        "| way | crop | workers | crops/s per core (slowest, fastest) | CPU ms per crop | own MB |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["throughput"]:
        spread = f"{row['per_core']:.1f} ({row['slowest']:.1f}, {row['fastest']:.1f})"
        packed = f", files {row['packed']:.0%} of the arrays" if row["packed"] else ""
        lines.append(
            f"| {row['way']}: {loaders.WAYS[row['way']]}{packed} | {row['patch']}^3 | "
            f"{row['workers'] or 'none'} | {spread} | {row['cpu_ms']:.1f} | "
            f"{row['memory_mb']:.0f} |"
        )
    for said in ("skipped", "failed"):
        lines += [f"| {way}: {said} | {why} | | | | |" for way, why in found[said].items()]
    patches = [row["patch"] for row in found["throughput"]]
    if patches and min(found["cases"]["shape"][1:]) < max(patches):
        lines += ["", f"Crops are larger than some cases ({shape}): padded. --cases makes others."]
    lines += [
        "",
        f"| loop at {found['rate']:g} crops/s | cores | steps | waiting for data | device idle |",
        "|---|---|---|---|---|",
    ]
    for row in found["waiting"]:
        lines.append(
            f"| {row['patch']}^3, batch {row['batch']} | {row['cores']} | {row['steps']} | "
            f"{row['waited']:.1%} | {row['idle']:.1%} |"
        )
    lines += [
        "",
        "| process | first MB | last MB | kB per 1000 crops | with mapped files, MB |",
        "|---|---|---|---|---|",
    ]
    for row in found["memory"]:
        lines.append(
            f"| {row['process']} of {row['workers']} workers, {row['patch']}^3 | "
            f"{row['first_mb']:.0f} | {row['last_mb']:.0f} | {row['slope_kb']:+.0f} | "
            f"{row['rss_mb']:.0f} |"
        )
    return lines


def picture(found):
    """Crops per second and core of each way; memory of our processes over crops."""
    from matplotlib.figure import Figure

    from masm_jax.benchmark.plots import COLOURS

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = found["throughput"]
    for place, row in enumerate(rows):
        colour = COLOURS[list(loaders.WAYS).index(row["way"])]
        error = [[row["per_core"] - row["slowest"]], [row["fastest"] - row["per_core"]]]
        left.barh(place, row["per_core"], xerr=error, color=colour)
    names = [f"{r['way']}, {r['patch']}^3, {r['workers'] or 'no'} workers" for r in rows]
    left.set_yticks(range(len(rows)), names, fontsize=7)
    left.invert_yaxis()
    left.set_xlabel("crops per second and core (line: all rounds)")
    for row in found["memory"]:
        samples, name = row["samples"], f"{row['process']} of {row['workers']} workers"
        right.plot(samples["crops"], np.asarray(samples["own"]) / 1024, label=name)
    right.margins(y=0.1)
    right.set_ylim(0)
    right.set_xlabel("crops")
    right.set_ylabel("MB of its own")
    right.legend(fontsize=7)
    return figure


def _numbers(text, flag):
    numbers = [int(word) if word.strip().isdigit() else 0 for word in text.split(",")]
    if min(numbers) < 1:
        raise ValueError(f"{flag}={text}: expected whole numbers, such as 128,64")
    return numbers


def _made(folder):
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    return folder


def _say(words):
    print(words, file=sys.stderr, flush=True)
