"""What the runs of ``python -m masm_jax.benchmark accuracy`` say together: tables and a figure."""

import importlib.metadata
import json
import platform
import statistics

import jax
import jax.numpy as jnp

from masm_jax import compare, run_config
from masm_jax.benchmark import counting, plots, workers
from masm_jax.benchmark.study import OURS, training_rate
from masm_jax.benchmark.tables import markdown
from masm_jax.data.records import Records
from masm_jax.evaluation import tables
from masm_jax.files import replacing
from masm_jax.state import Network, abstract_state, num_parameters
from masm_jax.steps import segment_step

CLOCK = (
    "Minutes are of training steps alone, at the median rate of the run: compilation, validation, "
    "checkpoints and evaluation are not in them; PyTorch runs without torch.compile"
)
INTERVAL = (
    "Differences are paired by case and seed; intervals are 95 % of a bootstrap that draws cases "
    "and seeds anew: of one seed, cases alone"
)
MEAN = "mean"  # over the regions, beside their names


def write(study, runs, *, about):
    """Write summary.json, table.md and the figure of one budget, of what is done.

    Args:
        study: the ``Study``.
        runs: all runs of the budget; those of a seed count when every fold is done.
        about: further entries of summary.json.

    Returns:
        lines for the terminal.
    """
    budget, folder = runs[0].budget, study.output / str(runs[0].budget)
    found = {}
    for network in dict.fromkeys(run.network for run in runs):
        own = [run for run in runs if run.network == network]
        if values := _network(study, own):
            found[network] = values
    if not found:
        return [f"{budget.words()}: nothing is done yet"]
    first = runs[0].network
    ours = found.get(first, {"tables": {}})["tables"]
    differences = {
        name: rows
        for name, values in found.items()
        if name != first and (rows := difference(values["tables"], ours))
    }
    summary = {
        "budget": budget.words(),
        "clock": CLOCK,
        "interval": INTERVAL,
        "first": first,
        **about,
        "machine": machine(),
        "networks": {
            name: {key: value for key, value in values.items() if key != "tables"}
            for name, values in found.items()
        },
        "differences": differences,
    }
    tables.write_summary_json(folder / "summary.json", summary)
    lines = table(summary)
    with replacing(folder / "table.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    plots.save(figure(summary), folder / "dice")
    return [*lines, "", f"{folder}: summary.json, table.md, dice.png, dice.svg"]


def _network(study, runs):
    """What is known of one network: its cost, and what each seed has reached; None: no seed."""
    seeds, evaluated, leaked, example = {}, {}, set(), None
    for seed in dict.fromkeys(run.seed for run in runs):
        folders = [study.folder(run) for run in runs if run.seed == seed]
        if not all(_evaluated(folder) for folder in folders):
            continue
        example = folders[0]
        evaluated[seed] = {
            key: values for folder in folders for key, values in compare.read(folder).items()
        }
        rates = [training_rate(folder) for folder in folders]
        summaries = [_read(folder / "eval" / "summary.json") for folder in folders]
        steps = [summary["step"] for summary in summaries]
        leaked |= {case for summary in summaries for case in summary.get("trained_on", ())}
        minutes = [step / rate / 60 for step, rate in zip(steps, rates)]
        seeds[seed] = {
            "dice": means(evaluated[seed]),
            "steps": statistics.mean(steps),
            "steps_per_s": statistics.mean(rates),
            "minutes": statistics.mean(minutes),
        }
    if not seeds:
        return None
    scored = [one.keys() for one in evaluated.values()]
    if any(keys != scored[0] for keys in scored):
        raise ValueError(
            f"{runs[0].network}: its seeds were scored on different cases, and cannot be averaged: "
            f"records have changed between them; start anew with another --output"
        )
    columns = {key: [values[key] for values in seeds.values()] for key in ("steps", "minutes")}
    columns["steps_per_s"] = [values["steps_per_s"] for values in seeds.values()]
    dice = [values["dice"] for values in seeds.values()]
    return {
        **cost(example, runs[0].network),
        **{key: statistics.mean(values) for key, values in columns.items()},
        "dice": {name: statistics.mean(one[name] for one in dice) for name in dice[0]},
        "seeds": seeds,
        "absent": compare.absent(evaluated.values()),
        "cases": len({case for case, _ in next(iter(evaluated.values()))}),
        "trained_on": sorted(leaked),
        "tables": evaluated,
    }


def difference(first, other):
    """{region or "mean": ``compare.crossed``} of Dice, ``other`` minus ``first``.

    Args:
        first, other: {seed: {(case, region): {"dice": float}}}.

    Returns:
        Of the seeds and cases that both have; None where there are none.
    """
    seeds = [seed for seed in first if seed in other]
    pairs = [(_with_mean(first[seed]), _with_mean(other[seed])) for seed in seeds]
    if not pairs:
        return None
    keys = [key for key in pairs[0][0] if all(key in one for pair in pairs for one in pair)]
    found = {}
    for region in dict.fromkeys(region for _, region in keys):
        own = [key for key in keys if key[1] == region]
        found[region] = compare.crossed(
            [[theirs[key] - ours[key] for key in own] for ours, theirs in pairs]
        )
    return found or None


def _with_mean(evaluation):
    """Dice of each case and region, and of a case's mean over the regions where it has several."""
    dice = {key: values["dice"] for key, values in evaluation.items()}
    for case in dict.fromkeys(case for case, _ in evaluation):
        own = [value for (of, _), value in dice.items() if of == case]
        if len(own) > 1:  # one region is its own mean
            dice[case, MEAN] = statistics.mean(own)
    return dice


def means(evaluation):
    """Mean Dice over the cases by region, then their mean."""
    found = {}
    for region in dict.fromkeys(region for _, region in evaluation):
        own = [values["dice"] for (_, of), values in evaluation.items() if of == region]
        found[region] = statistics.mean(own)
    return found | {MEAN: statistics.mean(found.values())}


def mean_dice(folder):
    """{region: mean Dice, "mean": over the regions} of an evaluated run."""
    return means(compare.read(folder))


def words(dice):
    """Dice by region as text."""
    return "  ".join(f"{name} {value:.3f}" for name, value in dice.items())


def cost(folder, name):
    """{"framework", "parameters", "gmac": 1e9 multiplications of a crop forward} of a run."""
    if name not in OURS:
        about = _read(folder / "network.json")
        return {key: about[key] for key in ("framework", "parameters", "gmac")}
    config = run_config.load(folder)
    records = Records(config.data.records)
    network = Network(config, modalities=records.modalities, regions=records.regions)
    params = abstract_state(network)["params"]
    crop = jax.ShapeDtypeStruct((1, len(records.modalities), *network.patch), jnp.float32)
    return {
        "framework": f"JAX {jax.__version__}",
        "parameters": num_parameters(params),
        "gmac": counting.total(counting.macs(segment_step(network), params, crop)) / 1e9,
    }


def table(summary):
    """Lines of Markdown."""
    first, networks = summary["first"], summary["networks"]
    regions = [name for name in next(iter(networks.values()))["dice"] if name != MEAN]
    heads = [
        "network", "framework", "parameters, M", "GMAC per crop", "steps/s", "steps", "minutes",
        *(f"Dice {name}" for name in regions), "mean Dice", "by seed",
        f"{first} minus it, mean Dice (95 %)",
    ]  # fmt: skip
    rows = []
    for name, values in networks.items():
        seeds = [seed["dice"][MEAN] for seed in values["seeds"].values()]
        rows.append([
            name,
            values["framework"],
            f"{values['parameters'] / 1e6:.2f}",
            f"{values['gmac']:.1f}",
            number(values["steps_per_s"], 2),
            f"{values['steps']:.0f}",
            number(values["minutes"], 1),
            *(f"{values['dice'][region]:.3f}" for region in regions),
            f"{values['dice'][MEAN]:.3f}",
            ", ".join(f"{dice:.3f}" for dice in seeds),
            difference_words(summary["differences"].get(name)),
        ])  # fmt: skip
    lines = markdown(heads, rows)
    leaked = next(iter(networks.values()))["trained_on"]
    if leaked:
        lines += ["", f"**{len(leaked)} of the cases were trained on.**"]
    for line in compare.absent_lines({name: one["absent"] for name, one in networks.items()}):
        lines += ["", line]
    cases, facts = next(iter(networks.values()))["cases"], summary["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    return [
        *lines,
        "",
        f"Budget {summary['budget']}, {cases} cases. GMAC: forward, batch 1. {CLOCK}. {INTERVAL}. "
        f"{facts['date']}, {facts['cores']} cores of {facts['processor']}, {versions}.",
    ]


def figure(summary):
    """Mean Dice of every seed, and what the first network has ahead of the others."""
    differences = summary["differences"]
    entries = [
        {
            "name": name,
            "seeds": [seed["dice"][MEAN] for seed in values["seeds"].values()],
            "mean": values["dice"][MEAN],
            "difference": mean_row(differences.get(name)),
        }
        for name, values in summary["networks"].items()
    ]
    against = f"{summary['first']} minus it, 95 % over cases and seeds"
    return compare.forest(entries, title=f"{summary['budget']} each", against=against)


def machine():
    """That of ``workers``, and {"versions": {package: version}} of Python and those that train."""
    versions = {"Python": platform.python_version()}
    for package in ("jax", "torch", "monai"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return workers.machine() | {"versions": versions}


def mean_row(rows):
    """Of what ``difference`` gives the row of the mean (one region is its own); None for None."""
    return rows and (rows.get(MEAN) or next(iter(rows.values())))


def difference_words(rows):
    """That row as text, with its interval; "-" for None."""
    return "-" if rows is None else interval_words(mean_row(rows))


def interval_words(row):
    """A difference with its interval, as text."""
    interval = "" if row["low"] is None else f" [{row['low']:+.3f}, {row['high']:+.3f}]"
    return f"{row['difference']:+.3f}{interval}"


def number(value, decimals):
    """As text; \"-\" for NaN."""
    return "-" if value != value else f"{value:.{decimals}f}"  # NaN: too short to be timed


def _evaluated(folder):
    file = folder / "eval" / "summary.json"
    return file.is_file() and not _read(file)["failed"] and (folder / "eval/metrics.csv").is_file()


def _read(path):
    return json.loads(path.read_text())
