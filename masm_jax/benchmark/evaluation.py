"""What an evaluation spends its time on: reading, inference, metrics, writing, the report.

    python -m masm_jax.benchmark evaluation --workdir=runs/masm --records=DIR --output=FOLDER

Runs eval.py, one case after the other and without workers beside, so that stages do not share the
cores, and takes the seconds it has put into seconds.json. FOLDER gets evaluation.json,
evaluation.md, a plot of all cases, and eval/ as eval.py writes it.
"""

import datetime
import json
import pathlib
import statistics
import subprocess
import sys

from matplotlib.figure import Figure

from masm_jax import runtime
from masm_jax.benchmark import tables
from masm_jax.benchmark.plots import COLOURS, save
from masm_jax.benchmark.workers import machine
from masm_jax.commands import REPOSITORY
from masm_jax.evaluation.clock import STAGES
from masm_jax.files import check_output, replacing

WORDS = {
    "reading": "reading the record and the reference",
    "inference": "inference, and back into the grid of the scan",
    "metrics": "metrics",
    "writing": "writing the segmentation and the tables",
    "report": "pictures and report",
}
LABELS = 40  # cases that are named in the plot; of more the names would overlap


def add_arguments(parser):
    """Flags of the command."""
    parser.add_argument("--workdir", required=True, metavar="RUN", help="written by train.py")
    parser.add_argument("--records", required=True, metavar="DIR", help="of the cases")
    parser.add_argument("--split", default="val", help="as of eval.py (val)")
    parser.add_argument("--cases", type=int, default=0, metavar="N", help="of the split (0: all)")
    parser.add_argument("--output", required=True, metavar="FOLDER")


def run(args):
    """Exit code of the command: 3 where cases failed.

    Raises:
      ValueError: a flag is wrong, or eval.py has failed.
    """
    if args.cases < 0:
        raise ValueError(f"--cases={args.cases}: expected 1 or more, or 0 for all of the split")
    check_output(args.output)
    folder = pathlib.Path(args.output).absolute()
    words = ["eval.py", f"--workdir={pathlib.Path(args.workdir).absolute()}"]
    words += [f"--records={pathlib.Path(args.records).absolute()}", f"--split={args.split}"]
    words += [f"--cases={args.cases}", "--workers=0", f"--output={folder / 'eval'}"]
    file = folder / "eval" / "seconds.json"
    file.unlink(missing_ok=True)  # those of a run before say nothing of this one
    code = subprocess.run([sys.executable, *words], cwd=REPOSITORY).returncode
    if code not in (0, runtime.EXIT_SOME_FAILED) or not file.is_file():
        raise ValueError(f"eval.py ended with code {code}; what it said is above")
    found = json.loads(file.read_text())
    found |= {"machine": machine(), "date": str(datetime.date.today()), "run": args.workdir}
    text = "\n".join(table(found)) + "\n"
    contents = {"evaluation.json": json.dumps(found, indent=1) + "\n", "evaluation.md": text}
    for name, content in contents.items():
        with replacing(folder / name) as temporary:
            temporary.write_text(content)
    save(figure(found["cases"]), folder / "evaluation")
    print(text, end="")
    return code


def table(found):
    """Lines of Markdown: seconds a case and share by stage, the whole, and whether the aim is met.

    Args:
      found: of seconds.json, and "run", "machine", "date".
    """
    cases, on = found["cases"], found["machine"]
    each = {stage: [case.get(stage, 0.0) for case in cases] for stage in STAGES}
    # The report and the tables of all cases together: to each its part.
    part = {stage: found["together"].get(stage, 0.0) / len(cases) for stage in STAGES}
    usual = {stage: statistics.median(each[stage]) + part[stage] for stage in STAGES}
    whole = sum(usual.values())
    rows = [
        [WORDS[stage], f"{usual[stage]:.3f}", f"{usual[stage] / whole:.0%}",
         f"{min(each[stage]) + part[stage]:.3f} to {max(each[stage]) + part[stage]:.3f}"]
        for stage in STAGES
    ]  # fmt: skip
    without = whole - usual["report"]
    rows += [["all, without pictures and report", f"{without:.3f}", f"{without / whole:.0%}", ""]]
    rows += [["all", f"{whole:.3f}", "100%", ""]]
    worst = [case["case"] for case in cases if largest(case) == "metrics"]
    said = f"missed in {', '.join(worst[:5])}{' and more' * (len(worst) > 5)}"
    return [
        f"eval.py of {found['run']}, {len(cases)} cases one after the other; medians; "
        f"{on['cores']} cores of {on['processor']}, {found['date']}.",
        "",
        *tables.markdown(("stage", "s a case", "share", "range"), rows),
        "",
        f"Inference of the first case, {each['inference'][0]:.1f} s, has the compilation in it. "
        f"Of the report {found['together'].get('report', 0.0):.1f} s are for all cases together. "
        f"The aim, that metrics take most of no case, is {said if worst else 'reached'}.",
    ]


def largest(case):
    """Stage that takes most of a case.

    Args:
      case: {"case", stage: seconds}.
    """
    return max(STAGES, key=lambda stage: case.get(stage, 0.0))


def figure(cases):
    """A bar per case, stacked by stage."""
    drawing = Figure(figsize=(8, 1.6 + min(8.0, 0.3 * len(cases))), layout="constrained")
    axes, left = drawing.subplots(), [0.0] * len(cases)
    for stage, colour in zip(STAGES, COLOURS):
        seconds = [case.get(stage, 0.0) for case in cases]
        axes.barh(range(len(cases)), seconds, left=left, color=colour, label=WORDS[stage])
        left = [before + more for before, more in zip(left, seconds)]
    named = len(cases) <= LABELS
    axes.set_yticks(range(len(cases)) if named else [], [c["case"] for c in cases if named])
    axes.tick_params(labelsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="s (the first case compiles)", ylabel="" if named else f"{len(cases)} cases")
    drawing.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return drawing
