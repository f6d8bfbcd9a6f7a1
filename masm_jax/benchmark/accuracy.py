"""Dice at equal budget: MASM beside other networks, trained and evaluated alike on one machine.

    python -m masm_jax.benchmark accuracy --records=DIR --test_records=DIR2 \
        --budget=minutes:10 --budget=steps:400 --output=OUT
    python -m masm_jax.benchmark accuracy --records=DIR --split=pairs --output=OUT

Networks: masm (of the config), late, unet, aware, shift; tiny, base, full (of that size); in
PyTorch dynunet, dynunet_light, segresnet, or MODULE:FUNCTION (torch_networks.py). All get the same
crops, augmentation, loss, optimiser, schedule and evaluation; on the CPU, in float32, one run at a
time.

minutes:N is wall-clock of training steps: compilation, checkpoints and evaluation are not in it.
Each network is first timed alone for some steps, and its schedule ends with the steps that fit.
Keep the machine otherwise idle. steps:N is the same number of steps for all.

Whatever is done is not done again: start the same command to go on, also with more seeds, networks
or budgets. OUT/BUDGET gets summary.json, table.md, dice.png and dice.svg. Exit codes: 0 done, 1 an
error, 2 usage, 3 some runs failed (listed; the others are done), 75 stopped by a signal.
"""

import json
import os
import pathlib
import sys
import time

import jax

from masm_jax import config as config_lib
from masm_jax import config_file, locks, run_config, runtime
from masm_jax.benchmark import accuracy_report, torch_networks
from masm_jax.benchmark.study import OURS, Budget, Fold, Run, Study
from masm_jax.commands import REPOSITORY, Stopped
from masm_jax.data import records as records_lib
from masm_jax.files import check_output, read_json, replacing
from masm_jax.inference.volume import check_task

FIXED = (  # not for --set
    "seed", "total_steps", "stop_at_step", "data.records", "data.split", "model.mixers",
)  # fmt: skip
LEAST_CALIBRATION = 6  # steps: as many intervals are timed


def add_arguments(parser):
    """Flags of the command."""
    parser.add_argument("--config", default="configs/masm_laptop.py", help="(%(default)s)")
    parser.add_argument("--records", required=True, metavar="DIR", help="to train on")
    parser.add_argument("--test_records", metavar="DIR", help="to evaluate on; then all train")
    parser.add_argument(
        "--split", action="append", default=[], metavar="RULE",
        help="without --test_records: a rule of config.data.split, may be repeated;\n"
        "pairs: every case is held out once, two at a time",
    )  # fmt: skip
    parser.add_argument(
        "--networks", default="masm,late,unet,dynunet,segresnet", metavar="A,B",
        help="the first is compared with every other (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--seeds", default="0,1,2", help="(%(default)s)")
    parser.add_argument(
        "--budget", action="append", metavar="minutes:N|steps:N",
        help="of every run; may be repeated (minutes:10)",
    )  # fmt: skip
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="of the config, for all networks: patch=64; may be repeated",
    )  # fmt: skip
    parser.add_argument("--calibration_steps", type=int, default=24, help="(%(default)s)")
    parser.add_argument(
        "--dry_run", action="store_true", help="time the networks, say what it would take, and stop"
    )


def run(args):
    """Exit code of the command.

    Raises:
      ValueError: anything that the user can mend, in one line.
    """
    jax.config.update("jax_platforms", "cpu")  # here only shapes are traced
    networks, seeds = _names(args.networks), _seeds(args.seeds)
    budgets = [Budget.parse(text) for text in args.budget or ["minutes:10"]]
    if args.calibration_steps < LEAST_CALIBRATION:
        raise ValueError(f"--calibration_steps: expected {LEAST_CALIBRATION} or more")
    output = pathlib.Path(args.output).absolute()
    check_output(output)
    config = _config(args)
    folds, cases = _folds(args, output, config)
    study = _study(args, output, config, folds, cases)
    runs = [
        Run(budget, seed, network, fold)
        for budget in budgets
        for seed in seeds  # a study that is stopped has whole seeds
        for network in networks
        for fold in folds
    ]
    failed, rates, stopped = {}, {}, False
    try:
        with locks.alone(output), runtime.StopSignal() as stop:
            if args.dry_run or any(budget.kind == "minutes" for budget in budgets):
                _time(study, networks, folds[0], rates, failed, stop)
            if not args.dry_run:
                _execute(study, runs, rates, failed, stop)
    except Stopped:
        stopped = True
    for budget in budgets:
        if args.dry_run and not stopped:
            print("\n".join(_plan(budget, rates, len(seeds) * len(folds))))
        elif not args.dry_run:
            own = [run for run in runs if run.budget == budget]
            about = {"config": args.config, "set": args.set}
            print("\n".join(accuracy_report.write(study, own, about=about)))
    if stopped:
        print("stopped; the same command goes on")
        return runtime.EXIT_STOPPED
    for what, reason in failed.items():
        print(f"failed: {what}: {reason}", file=sys.stderr)
    return runtime.EXIT_SOME_FAILED if failed else 0


def _time(study, networks, fold, rates, failed, stop):
    """Find the steps per second of the networks that can be trained."""
    for network in networks:
        try:
            rates[network] = study.rate(network, fold, stop)
            print(f"{network}: {rates[network]:.3f} steps/s alone on this machine", flush=True)
        except RuntimeError as error:
            failed[f"{network}, calibration"] = error
            print(f"{network}: cannot be timed: {error}", flush=True)


def _execute(study, runs, rates, failed, stop):
    """Do what is not done, in order."""
    took = {}  # (budget, network) -> seconds of its runs
    for number, run in enumerate(runs):
        if run.budget.kind == "minutes" and run.network not in rates:
            continue  # said already
        steps = run.budget.steps(rates.get(run.network))
        place = f"{number + 1}/{len(runs)} {run.budget.words()}, {run}"
        if study.done(run, steps):
            print(f"{place}: done before", flush=True)
            continue
        left = _left(runs[number:], took)
        print(f"{place}: {steps} steps" + (f", left about {left}" if left else ""), flush=True)
        began = time.perf_counter()
        try:
            study.execute(run, steps, stop)
        except RuntimeError as error:
            failed[f"{run.budget.words()}, {run}"] = error
            print(f"{place}: failed: {error}", flush=True)
            continue
        took.setdefault((run.budget, run.network), []).append(time.perf_counter() - began)
        dice = accuracy_report.mean_dice(study.folder(run))
        print(f"{place}: Dice {accuracy_report.words(dice)}", flush=True)


def _left(runs, took):
    """Time for these runs as text, from those that are done; None where nothing is known."""
    known = [seconds for own in took.values() for seconds in own]
    total = 0.0
    for run in runs:
        own = took.get((run.budget, run.network)) or known
        if not own and run.budget.kind == "steps":
            return None
        total += sum(own) / len(own) if own else 60 * run.budget.amount
    return f"{total // 3600:.0f}:{total % 3600 // 60:02.0f} h"


def _plan(budget, rates, times):
    """Lines: what a budget would take."""
    yield f"{budget.words()}, {times} trainings of each network:"
    total = 0.0
    for network, rate in rates.items():
        steps = budget.steps(rate)
        total += times * steps / rate
        yield f"  {network:<16} {steps:>6} steps, {steps / rate / 60:6.1f} minutes each"
    yield f"  training steps {total / 3600:.1f} h; compilation and evaluation come on top"


# ---------------------------------------------------------------- arguments


def _names(text):
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"--networks={text}: expected names, each once, such as masm,segresnet")
    known = ", ".join([*OURS, *torch_networks.BUILDERS])
    for name in names:
        if name not in OURS:
            try:
                torch_networks.check(name)
            except ValueError as error:
                raise ValueError(f"--networks: {error}; all names: {known}") from error
    return names


def _seeds(text):
    try:
        seeds = [int(seed) for seed in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds={text}: expected whole numbers, each once, such as 0,1,2")
    return seeds


def _config(args):
    """The config with what is set over it: each run would say the same error, hours apart."""
    for text in args.set:
        key, equals, _ = text.partition("=")
        if not equals or key in FIXED:
            raise ValueError(f"--set {text}: expected KEY=VALUE, and none of {', '.join(FIXED)}")
    config = config_file.load_config(_file(args.config), args.set)
    config_lib.validate(config)
    config.data.records = str(args.records)
    config_lib.validate_records(config, records_lib.Records(args.records))
    return config


def _file(config):
    """Path of the config, which may lie beside the package."""
    path = pathlib.Path(config)
    path = path if path.is_file() else REPOSITORY / path
    if not path.is_file():
        raise ValueError(f"--config={config}: no such file")
    return path.absolute()


def _folds(args, output, config):
    """The divisions of the records, and for each of them the cases it is scored on."""
    records = records_lib.Records(args.records)
    cases = records.cases
    if bool(args.test_records) == bool(args.split):
        raise ValueError(
            "expected --test_records=DIR (all of --records train), or --split=RULE, and not both"
        )
    if args.test_records:
        tested = records_lib.Records(args.test_records)
        check_task(
            vars(records), modalities=tested.modalities, regions=tested.regions,
            spacing=tested.spacing, where=f"--test_records={args.test_records}",
        )  # fmt: skip
        unlabelled = [case for case in tested.cases if tested.label(case) is None]
        if unlabelled or not tested.cases:
            raise ValueError(
                f"--test_records={args.test_records}: {', '.join(unlabelled[:3]) or 'no case'} "
                f"without segmentation; expected cases that can be scored"
            )
        # Written by ``_study``.
        return [Fold("", str(output / "split.json"))], [tested.cases]
    rules = []
    for rule in args.split:
        if rule == "pairs":
            count = len(cases) // 2
            if count < 2:
                raise ValueError(
                    f"--split=pairs: {args.records} has {len(cases)} cases, expected 4 or more: "
                    f"two are held out at a time"
                )
            rules += [f"{fold}/{count}" for fold in range(count)]
        else:
            rules.append(os.path.abspath(rule) if rule.endswith(".json") else rule)
    held = [records_lib.split(cases, rule, config.data.split_seed)["val"] for rule in rules]
    owners = {}
    for rule, own in zip(rules, held):
        if not own:
            raise ValueError(f"--split={rule}: it holds out no case, and there is nothing to score")
        for case in own:
            if case in owners:
                raise ValueError(
                    f"--split={owners[case]} and --split={rule} both hold out {case}: expected "
                    f"each case once"
                )
            owners[case] = rule
    if len(rules) == 1:
        return [Fold("", rules[0])], held
    return [Fold(f"fold-{number}", rule) for number, rule in enumerate(rules)], held


def _short(value, most=200):
    """As text; of a thousand cases the first."""
    text = str(value)
    return text if len(text) <= most else f"{text[:most]} ..."


def _study(args, output, config, folds, cases):
    """The study of a folder, if what is there is of the same."""
    about = {
        "config": str(_file(args.config)),
        "records": os.path.abspath(args.records),
        "test_records": os.path.abspath(args.test_records) if args.test_records else None,
        "given": sorted(args.set),
        "calibration_steps": args.calibration_steps,
    }
    file, described = output / "study.json", about | {"folds": [fold.rule for fold in folds]}
    described["cases"] = cases  # seeds that are added later are paired with those that are there
    old = read_json(file, "name another --output") if file.is_file() else described
    changed = [
        f"{key}: {_short(old[key])} -> {_short(value)}"
        for key, value in described.items() if key in old and old[key] != value
    ]  # fmt: skip
    # What the file of the config said then, too.
    described["values"] = run_config.to_dict(config)
    changed += run_config.differences(old.get("values", described["values"]), described["values"])
    if changed:
        raise ValueError(f"--output={output} is another study: {'; '.join(changed)}; name another")
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(described, indent=2) + "\n")
    if args.test_records:
        whole = {"train": records_lib.Records(args.records).cases, "val": [], "test": []}
        with replacing(output / "split.json") as temporary:
            temporary.write_text(json.dumps(whole) + "\n")
    return Study(output, **about)
