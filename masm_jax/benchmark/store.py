"""What a comparison has measured, on disk after every measurement."""

import collections
import json

from masm_jax.benchmark.workers import machine
from masm_jax.files import read_json, replacing
from masm_jax.run_config import differences

Item = collections.namedtuple("Item", "network variant mode")
_PARTS = ("settings", "results", "counts", "versions")


class Store:
    """What was measured, in OUTPUT/comparison.json or another file there.

    Attributes:
      folder: OUTPUT.
      file: in it.
      settings: {name: value} of what may not differ, such as compare.FIXED.
      results: dicts with the fields of Item, "round", "first", "median", "calls", "peak", "wall".
      failures: {"network variant mode": reason}; those of a run before are tried again.
      counts: {network: count of flops.count_all}.
      definitions: {network: plain values}, of ``define``.
    """

    def __init__(self, folder, settings, name="comparison.json"):
        self.folder, self.settings, self.file = folder, settings, folder / name
        self.results, self.failures, self.counts, self.versions = [], {}, {}, {}
        self.definitions = {}
        if self.file.is_file():
            fix = "name another --output"
            before = read_json(self.file, fix)
            lacks = [name for name in _PARTS if name not in before]
            if lacks:
                raise ValueError(
                    f"{self.file} has no {', '.join(lacks)}: not of this command; {fix}"
                )
            other = {
                name: value
                for name, value in before["settings"].items() if settings.get(name) != value
            }  # fmt: skip
            if other:
                said = ", ".join(f"--{name}={value}" for name, value in other.items())
                raise ValueError(f"{self.file} was measured with {said}; expected the same, or "
                                 f"another --output")  # fmt: skip
            there, here = before.get("machine", {}).get("processor"), machine()["processor"]
            if there not in (None, here):
                raise ValueError(
                    f"{self.file} was measured on another machine, {there}, and this is {here}; "
                    f"expected the same, or another --output"
                )
            self.results, self.counts = before["results"], before["counts"]
            self.versions = before["versions"]
            self.definitions = before.get("definitions", {})

    def define(self, networks):
        """Note what the networks are: results of a name must not be of two.

        Args:
          networks: {network: what makes it that one, as plain values}.

        Raises:
          ValueError: a network was measured as another one.
        """
        for name, now in json.loads(json.dumps(networks)).items():
            changed = differences(self.definitions.get(name, now), now)
            if changed:
                raise ValueError(
                    f"{self.file} was measured with another {name} ({'; '.join(changed)}); "
                    f"expected the same, or another --output"
                )
            self.definitions[name] = now

    def of(self, item):
        """Results of an item, a dict per round."""
        return [found for found in self.results if item_of(found) == item]

    def failed(self, todo):
        """{Item: reason} of those items that failed."""
        return {item: self.failures[" ".join(item)] for item in todo
                if " ".join(item) in self.failures}  # fmt: skip

    def write(self):
        """All of it, at once."""
        found = {"settings": self.settings, "machine": machine(), "versions": self.versions}
        found |= {"definitions": self.definitions, "counts": self.counts}
        found |= {"failures": self.failures, "results": self.results}
        with replacing(self.file) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n")


def item_of(found):
    """The Item that a result is of."""
    return Item(*(found[name] for name in Item._fields))
