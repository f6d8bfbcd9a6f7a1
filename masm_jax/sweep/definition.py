"""A sweep as its file says it: rows, seeds, and the config of every run, checked before any runs.

WORKDIR/ROW/seed-S/          what train.py writes, log.txt, cost.json
WORKDIR/ROW/seed-S/eval/     what eval.py writes
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_collections

from masm_jax import config as config_lib
from masm_jax import config_file, run_config
from masm_jax.commands import REPOSITORY
from masm_jax.data import records as records_lib

FUNCTION = "get_sweep"
EXAMPLE = "configs/sweeps/extras.py"
KEYS = ("config", "common", "rows", "seeds", "split")
OF_THE_SWEEP = ("seed", "stop_at_step")  # not for anybody to set
OF_ALL_ROWS = ("data.split", "data.split_seed")  # else the rows could not be paired by case
_KEYS = ", ".join(KEYS)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")  # of a row, which is a folder


@dataclasses.dataclass(frozen=True)
class Run:
    """One training with its evaluation."""

    row: str
    seed: int

    def __str__(self):
        return f"{self.row} seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep file and the command have said.

    Attributes:
        name: of the file.
        workdir: folder of the runs and of the tables.
        base: the config file, absolute.
        common: {flattened key: value} over it, for all rows.
        rows: {name: {flattened key: value}} over that; the first is what others are compared with.
        seeds: of every row.
        split: of eval.py, what is scored.
    """

    name: str
    workdir: pathlib.Path
    base: pathlib.Path
    common: Mapping[str, Any]
    rows: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...]
    split: str

    def runs(self):
        """All of them; seed by seed, so that a sweep that is stopped has whole seeds."""
        return [Run(row, seed) for seed in self.seeds for row in self.rows]

    def folder(self, run):
        """Of a run."""
        return self.workdir / run.row / f"seed-{run.seed}"

    def changes(self, run):
        """{flattened key: value} over the base config, of the types that the config has."""
        config = self.config(run)
        keys = {**self.common, **self.rows[run.row], "seed": run.seed}
        return {key: _plain(_at(config, key)) for key in keys}

    def config(self, run):
        """The ConfigDict of a run.

        Raises:
            ValueError: a key that the base config has not, or a value of another type.
        """
        config = config_file.load_config(self.base)
        config_file.change(config, self.common, f"sweep {self.name}, common")
        config_file.change(config, self.rows[run.row], f"sweep {self.name}, row {run.row}")
        config.seed = run.seed
        return config

    def check_records(self):
        """See that every row can be trained on its records.

        Raises:
            ValueError: there are none, or they do not fit.
        """
        known = {}
        for row in self.rows:
            config = self.config(Run(row, self.seeds[0]))
            place = config.data.records
            try:
                known[place] = known.get(place) or records_lib.Records(place)
            except ValueError as error:
                made = "; `make sweep-records` makes those of the sweeps on coarse phantoms"
                raise ValueError(f"{error}{made}") from error
            with _naming(f"sweep {self.name}, row {row}"):
                config_lib.validate_records(config, known[place])
                data = config.data
                records_lib.split(known[place].cases, data.split, data.split_seed)

    def check_folders(self):
        """See that what is in the folders was made with these configs.

        Raises:
            ValueError: a line for each key of each run that differs.
        """
        faults = []
        for run in self.runs():
            path = self.folder(run) / "config.json"
            if not path.is_file():
                continue
            old, new = json.loads(path.read_text()), run_config.to_dict(self.config(run))
            if not new["model"]["pairs"]:  # train.py has put in those of the records
                new["model"]["pairs"] = old.get("model", {}).get("pairs", [])
            faults += [f"{run}: {line}" for line in run_config.differences(old, new)]
        if faults:
            raise ValueError(
                f"{self.workdir} has runs of another config:\n  " + "\n  ".join(faults) + "\n"
                "choose another --workdir, restore the values, or delete the folders of these runs"
            )

    def evaluated(self, run):
        """Whether a run was trained to its end and all its cases were scored as it says now."""
        folder = self.folder(run)
        if not (folder / "config.json").is_file():
            return False
        summary, wanted = read_json(folder / "eval" / "summary.json"), self.config(run)
        now = run_config.to_dict(run_config.load(folder))  # with what masm_jax.tune has chosen
        untuned = run_config.to_dict(run_config.load(folder, tuned=False))
        asked = run_config.to_dict(wanted)
        return (
            summary.get("step") == wanted.total_steps
            and summary.get("split") == self.split
            and not summary.get("failed")
            and all(untuned[key] == asked[key] for key in ("infer", "evaluation"))
            and all(summary.get(key) == now[key] for key in ("infer", "evaluation"))
        )

    def done(self, run):
        """Whether nothing is left to do for a run."""
        return self.evaluated(run) and (self.folder(run) / "cost.json").is_file()


def load(path, workdir, given=()):
    """Read a sweep file and check all of it.

    Args:
        path: of the file.
        workdir: folder of the runs.
        given: "KEY=VALUE" over the config, for all rows.

    Raises:
        ValueError: anything that the user can mend.
    """
    module = config_file.load_module(path, example=EXAMPLE)
    if not hasattr(module, FUNCTION):
        raise ValueError(f"--config={path}: it has no function {FUNCTION}(); {EXAMPLE} has one")
    said = getattr(module, FUNCTION)()
    if not isinstance(said, dict) or set(said) != set(KEYS):
        found = ", ".join(map(str, said)) if isinstance(said, dict) else type(said).__name__
        raise ValueError(f"{path}: {FUNCTION}() gives {found}; expected a dict of {_KEYS}")
    given = dict(config_file.parsed(text) for text in given)
    for row, changes in said["rows"].items():
        for key in given.keys() & changes.keys():
            raise ValueError(f"--set {key}: row {row} of {path} sets it; change it there")
    sweep = Sweep(
        name=pathlib.Path(path).stem,
        workdir=pathlib.Path(workdir).absolute(),
        base=_config_file(said["config"], path),
        common=dict(said["common"]) | given,
        rows={name: dict(changes) for name, changes in said["rows"].items()},
        seeds=tuple(said["seeds"]),
        split=said["split"],
    )
    _check(sweep, path)
    return sweep


def read_json(path):
    """Its content; {} where it is not there."""
    return json.loads(path.read_text()) if path.is_file() else {}


def flag(key, value):
    """A key and its value as train.py takes them."""
    return f"--config.{key}={value}"


def _config_file(name, path):
    for place in (pathlib.Path(name), REPOSITORY / name):
        if place.is_file():
            return place.absolute()
    raise ValueError(
        f"{path}: config {name!r}: no such file; expected such as configs/masm_demo.py"
    )


def _check(sweep, path):
    """Rows, seeds and every config."""
    seeds = sweep.seeds
    if not seeds or len(set(seeds)) < len(seeds) or not all(type(seed) is int for seed in seeds):
        raise ValueError(f"{path}: seeds {seeds}: expected whole numbers, each once")
    if not sweep.rows:
        raise ValueError(f"{path}: rows: expected one or more, {{name: {{key: value}}}}")
    if not isinstance(sweep.split, str):
        raise ValueError(f"{path}: split {sweep.split!r}: expected one of eval.py, such as 'val'")
    for name in sweep.rows:
        if not _NAME.fullmatch(str(name)):
            raise ValueError(
                f"{path}: row {name!r}: expected letters, digits and _ . + -, as it names a folder"
            )
    for where, changes in (("common", sweep.common), *sweep.rows.items()):
        refused = OF_THE_SWEEP if where == "common" else OF_THE_SWEEP + OF_ALL_ROWS
        for key in sorted(changes.keys() & set(refused)):
            why = {"seed": "seeds says them", "stop_at_step": "a run would never be done"}
            reason = why.get(key, "rows are paired by case; set it in common")
            raise ValueError(f"{path}: {where} sets {key}: {reason}")
    known = {}
    for row in sweep.rows:
        for seed in seeds:
            config = sweep.config(Run(row, seed))
            for key in (*sweep.common, *sweep.rows[row]):
                if isinstance(_at(config, key), ml_collections.ConfigDict):
                    raise ValueError(f"{path}, row {row}: {key} is a section; set its keys")
            with _naming(f"{path}, row {row}"):
                config_lib.validate(config)
        same = known.setdefault(config.to_json(), row)
        if same != row:
            raise ValueError(f"{path}: rows {same} and {row} have the same config")


class _naming:
    """Puts what is being checked before the words of a ValueError."""

    def __init__(self, words):
        self._words = words

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if kind is not None and issubclass(kind, ValueError):
            raise ValueError(f"{self._words}: {error}") from error


def _at(config, key):
    for part in key.split("."):
        config = config[part]
    return config


def _plain(value):
    """Lists as the tuples that a flag is read as."""
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value
