"""Where in the source an instruction comes from: part of the network, level, function, direction.

The compiler keeps for most instructions which functions were being traced (stack frames) and the
name of the operation, in which ``jax.named_scope("level1")`` stands. What it adds itself (copies
into another layout, prefetches) has neither; it is booked on the first instruction that uses it, or
on the one whose result it moves.
"""

import dataclasses
import re

_PARTS = (  # end of a file's path, or a folder in it -> part; the first that is on the stack counts
    ("models/encoder.py", "encoder"),
    ("models/unetr.py", "encoder"),
    ("models/swin_unetr.py", "encoder"),
    ("models/decoder.py", "decoder"),
    ("models/residual.py", "decoder"),  # its blocks in an encoder are the encoder's, above
    ("models/aware.py", "aware mixer"),
    ("models/shift.py", "shift mixer"),
    ("models/masm.py", "network"),
    ("masm_jax/state.py", "network"),
    ("masm_jax/losses.py", "loss"),
    ("data/augment.py", "augmentation"),
    ("masm_jax/optim.py", "optimiser"),
    ("/optax/", "optimiser"),
    ("masm_jax/steps.py", "step"),
)
_REACH = 8  # users of users of ..., to find a place for what has none


@dataclasses.dataclass(frozen=True)
class Place:
    """``part`` of the step, ``level`` of the network (0: none), innermost ``function`` of this
    package with its ``line``, and ``direction``: "forward", "backward", "recomputed" or ""."""

    part: str
    level: int = 0
    function: str = ""
    line: str = ""
    direction: str = ""

    @property
    def whose(self):
        """Part and direction."""
        return f"{self.part} {self.direction}".strip()

    def __str__(self):
        level = f"level {self.level}" if self.level else ""
        words = (self.part, level, self.function, self.direction)
        return " ".join(word for word in words if word)


UNKNOWN = Place("unknown")


class Finder:
    """Finds the ``Place`` of the instructions of a module."""

    def __init__(self, module):
        self._module, self._users = module, {}

    def users(self, computation):
        """{name of a value: [instructions that use it]} of a computation."""
        if computation not in self._users:
            users = self._users[computation] = {}
            for instruction in self._module.computations[computation].values():
                for name in dict.fromkeys(instruction.operands):
                    users.setdefault(name, []).append(instruction)
        return self._users[computation]

    def place(self, computation, instruction):
        """Place of an instruction, else of the nearest that uses it or that it uses, or None."""
        users, body = self.users(computation), self._module.computations[computation]
        return self._nearest(instruction, lambda i: users.get(i.name, ())) or self._nearest(
            instruction, lambda i: [body[name] for name in i.operands]
        )

    def _nearest(self, instruction, neighbours):
        waiting = [instruction]
        for _ in range(_REACH):
            for candidate in waiting:
                found = self._own(candidate)
                if found:
                    return found
            waiting = [other for value in waiting for other in neighbours(value)]
        return None

    def _own(self, instruction):
        stack = self._module.stack(instruction)
        if not stack:
            return None
        files = [line.rpartition(":")[0] for _, line in stack]
        part = next(
            (part for key, part in _PARTS if any(f.endswith(key) or key in f for f in files)),
            "other",
        )
        own = [(f, line) for f, line in stack if "/masm_jax/" in line] or stack
        function, line = own[-1]
        operation = instruction.op_name
        level = re.search(r"\blevel(\d+)\b", operation)
        return Place(
            part,
            int(level.group(1)) if level else 0,
            _short(function),
            line.rpartition("/")[2],
            _direction(operation),
        )


def _short(function):
    """ "train_step.<locals>.step" -> "step"; "ConvNorm.__call__" -> "ConvNorm"."""
    names = [name for name in function.split(".") if not name.startswith(("<", "__"))]
    return names[-1] if names else function


def _direction(operation):
    if "rematted_computation" in operation:
        return "recomputed"
    if "transpose(" in operation:
        return "backward"
    return "forward" if "jvp(" in operation else ""
