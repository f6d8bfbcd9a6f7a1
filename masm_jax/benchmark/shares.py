"""What pruning saves and costs: share of the tokens against multiply-adds, time and Dice.

    python -m masm_jax.benchmark shares --networks=masm_tiny,masm_base --output=runs/shares \
        [--workdir=runs/masm --records=DIR --split=all]

With ``infer.token_share`` the Modality-Aware mixers work on that share of their tokens alone. Time
is that of inference on one patch, all shares of a network in one process, in alternating order; the
weights are untrained, which changes no shape. With --workdir the run is evaluated with every share.
OUTPUT gets shares.json, shares.md and, with --workdir, eval.py's folders, after every network and
share. A network that cannot be measured, or an evaluation that fails, is said at the end.
"""

import dataclasses
import datetime
import json
import pathlib
import statistics
import subprocess
import sys
import time

import jax

from masm_jax import run_config, runtime
from masm_jax.benchmark import accuracy_report, counting, jax_side, peers, tables
from masm_jax.benchmark.workers import machine
from masm_jax.commands import REPOSITORY
from masm_jax.files import check_output, replacing
from masm_jax.inference.volume import FAILURES, failure

SHARES = (1.0, 0.7, 0.5, 0.3, 0.1)


def add_arguments(parser):
    """Flags of the command."""
    parser.add_argument("--networks", default="masm_tiny,masm_base", help="(%(default)s)")
    parser.add_argument("--shares", default=",".join(map(str, SHARES)), help="(%(default)s)")
    parser.add_argument("--patch", type=int, default=128, help="edge in voxels (128)")
    parser.add_argument("--rounds", type=int, default=5, help="(5)")
    parser.add_argument("--config", default="configs/masm_brats.py", metavar="FILE")
    parser.add_argument("--workdir", metavar="RUN", help="written by train.py: for the Dice")
    parser.add_argument("--records", metavar="DIR", help="of the cases (those of the run)")
    parser.add_argument("--split", default="val", help="as of eval.py (val)")
    parser.add_argument("--output", required=True, metavar="FOLDER")


def run(args):
    """Exit code of the command: 3 where something could not be measured.

    Raises:
      ValueError: a flag is wrong.
    """
    shares = _shares(args.shares)
    if args.rounds < 1:
        raise ValueError(f"--rounds={args.rounds}: expected 1 or more")
    check_output(args.output)
    chosen = peers.chosen(args.networks)
    others = [name for name, entry in chosen.items() if not isinstance(entry, peers.Ours)]
    if others:
        raise ValueError(f"--networks: {', '.join(others)} has no tokens to choose; expected MASM")
    if args.workdir:
        run_config.load(args.workdir)  # an hour before it is looked at
    jax.config.update("jax_platforms", "cpu")  # else the form of convolution is a GPU's
    runtime.start(cache=False)
    found = {"patch": args.patch, "rounds": args.rounds, "networks": {}, "dice": {}}
    found |= {"machine": machine(), "date": str(datetime.date.today()), "failed": {}}
    folder = pathlib.Path(args.output).absolute()
    for name, ours in chosen.items():
        try:
            found["networks"][name] = measure(ours, shares, args)
        except FAILURES as error:
            found["failed"][name] = failure(error)
        text = _written(found, folder)
    for share in shares if args.workdir else ():
        found["run"] = args.workdir
        try:
            found["dice"][share] = _dice(share, folder / f"eval_{share:g}", args)
        except ValueError as error:
            found["failed"][f"evaluation with {share:g} of the tokens"] = str(error)
        text = _written(found, folder)
    print(text, end="")
    for what, why in found["failed"].items():
        print(f"failed: {what}: {why}", file=sys.stderr)
    return runtime.EXIT_SOME_FAILED if found["failed"] else 0


def _written(found, folder):
    """The table, written with its numbers."""
    text = "\n".join(table(found)) + "\n"
    for file, content in (("shares.json", json.dumps(found, indent=1) + "\n"), ("shares.md", text)):
        with replacing(folder / file) as temporary:
            temporary.write_text(content)
    return text


def _shares(text):
    try:
        shares = [float(word) for word in text.split(",") if word]
    except ValueError:
        shares = []
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ValueError(f"--shares={text}: expected numbers in (0, 1], such as 1,0.5,0.1")
    return shares


def measure(ours, shares, args):
    """{share: {"macs": int, "seconds": [each round's]}} of inference on one patch."""
    options = dict(patch=args.patch, batch=1, dtype="float32")
    found, calls = {}, {}
    for share in shares:
        changed = dataclasses.replace(ours, changes=ours.changes | {"infer.token_share": share})
        built = jax_side.network(changed, **options, config=args.config)
        macs = counting.total(counting.macs(*jax_side.calls(built)["forward"]))
        found[share] = {"macs": macs, "seconds": []}
        calls[share] = jax_side.prepare(
            changed, **options, mode="infer", config=args.config, device="cpu"
        )
        calls[share]()  # compiles
    for turn in range(args.rounds):
        for share in shares if turn % 2 == 0 else shares[::-1]:
            began = time.perf_counter()
            calls[share]()
            found[share]["seconds"].append(time.perf_counter() - began)
    return found


def _dice(share, folder, args):
    """{region: mean Dice, "mean": over the regions} of the run with that share."""
    words = ["eval.py", f"--workdir={pathlib.Path(args.workdir).absolute()}"]
    words += [f"--split={args.split}", f"--output={folder}", "--set", f"infer.token_share={share}"]
    if args.records:
        words.append(f"--records={pathlib.Path(args.records).absolute()}")
    code = subprocess.run([sys.executable, *words], cwd=REPOSITORY).returncode
    if code:
        raise ValueError(f"eval.py ended with code {code}; what it said is above")
    return accuracy_report.mean_dice(folder)


def table(found):
    """Lines of Markdown: a row per network and share, then Dice by share."""
    on, rows = found["machine"], []
    for name, shares in found["networks"].items():
        dense = statistics.median(next(iter(shares.values()))["seconds"])
        for share, values in shares.items():
            took = values["seconds"]
            rows.append(
                [name, f"{share:g}", f"{values['macs'] / 1e9:.1f}",
                 f"{statistics.median(took):.3f} ({min(took):.3f}, {max(took):.3f})",
                 f"{statistics.median(took) / dense:.2f}"]
            )  # fmt: skip
    heads = ("network", "share", "GMAC", "inference, s (least, most)", "time over the first row's")
    lines = [
        f"One patch of {found['patch']}^3, float32, {found['rounds']} rounds in alternating order; "
        f"{on['cores']} cores of {on['processor']}, {found['date']}.",
        "",
        *tables.markdown(heads, rows),
    ]
    if found["dice"]:
        regions = list(next(iter(found["dice"].values())))
        rows = [[f"{share:g}", *(f"{dice[name]:.3f}" for name in regions)]
                for share, dice in found["dice"].items()]  # fmt: skip
        lines += ["", f"Dice of {found['run']}:", "", *tables.markdown(("share", *regions), rows)]
    return lines
