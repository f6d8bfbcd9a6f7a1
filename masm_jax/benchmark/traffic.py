"""What a compiled step moves: bytes of every instruction, what padding adds, the collectives.

Counted is the memory traffic of a chip, top-level instruction by top-level instruction: every
operand that lies in HBM is read once, every result in HBM written once, in their tiled sizes. What
happens inside a fusion stays on the chip. Smaller than the operands are

* a slice, also one taken inside a fusion: what it takes (but at most the operand);
* ``dynamic-update-slice``: what it writes; the rest stays where it is.

Bitcasts, tuples and the ``-done`` half of asynchronous pairs move nothing. A loop's body counts as
often as it runs, where its condition is i < N (from 0, by 1: how loops are traced), else once; of a
conditional the branch that moves most. Not seen: a convolution whose operand does not fit on the
chip may read parts of it more than once.

``cost_analysis()["bytes accessed"]`` of the same program is larger. Tried on small programs
(libtpu 0.0.52): it adds operands and results on the chip; counts a prefetch four times
(``copy-start``: its operand and both halves of its result; ``copy-done``); an operand of which a
fusion takes three slices three times; and a loop's body once. 8192 x 8192 float32: sin(x) 537 MB in
both counts, x[2:] + x[1:-1] + x[:-2] 1074 MB there and 537 here.
"""

import dataclasses
import functools
import re

from masm_jax.benchmark import convolutions, hlo, places

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "domain", "add-dependency",
}  # fmt: skip
_FREE_CALLS = ("ConcatBitcast", "AllocateBuffer", "AssumeGatherIndicesInBound")
_SLICES = {"slice", "dynamic-slice"}
COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all",
    "collective-broadcast", "ragged-all-to-all",
)  # fmt: skip
_LAYOUT = {"copy", "transpose", "reshape", "bitcast", "convert"}
_JOINS = _SLICES | {"dynamic-update-slice", "pad", "concatenate", "reverse", "select", "compare"}
_FILLS = {"broadcast", "iota"}
_SILENT = {"parameter", "constant", "tuple", "get-tuple-element", "fusion", "bitcast"}
# Kinds of instructions, in words.
KINDS = {
    "convolution": "convolutions and matrix products",
    "layout": "copies, transposes, reshapes, casts",
    "join": "slices, padding, concatenation",
    "gather": "gathers and scatters",
    "reduction": "reductions",
    "elementwise": "element by element",
    "fill": "constants written out",
    "prefetch": "between HBM and on-chip memory",
    "collective": "collectives",
}


@dataclasses.dataclass(frozen=True)
class Move:
    """An instruction and its memory traffic, over all its trips.

    Attributes:
      name, opcode: of the instruction.
      kind: a key of KINDS.
      read, written: bytes of HBM, tiled.
      padding: how many of these are padding.
      onchip: bytes of its operands and results in on-chip memory.
      cycles: the compiler's estimate; 0 where it gives none.
      flops: of its convolutions.
      trips: how often it runs.
      place: where in the source it comes from.
      op_name: the traced operation.
      arrays: the largest array, printed.
    """

    name: str
    opcode: str
    kind: str
    read: int
    written: int
    padding: int
    onchip: int
    cycles: int
    flops: int
    trips: int
    place: places.Place
    op_name: str
    arrays: str

    @property
    def bytes(self):
        """Bytes of HBM, read and written."""
        return self.read + self.written


@dataclasses.dataclass(frozen=True)
class Collective:
    """Chips that exchange: ``kind``, payload ``bytes`` per chip (of an all-gather the result, else
    the operands; no padding), chips in a ``group``, ``trips``."""

    name: str
    kind: str
    bytes: int
    group: int
    trips: int


@dataclasses.dataclass(frozen=True)
class Loop:
    """A while loop; ``trips`` 0: not known, its body counted once."""

    name: str
    trips: int
    place: places.Place


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All of a program: ``moves``, ``collectives``, ``loops``, number of ``conditionals``."""

    moves: tuple[Move, ...]
    collectives: tuple[Collective, ...]
    loops: tuple[Loop, ...]
    conditionals: int


def count(module):
    """``Traffic`` of a ``hlo.Module``."""
    counter = _Counter(module)
    moves = counter.walk(module.entry, 1, places.UNKNOWN)
    collectives, loops = tuple(counter.collectives), tuple(counter.loops)
    return Traffic(tuple(moves), collectives, loops, counter.branches)


class _Counter:
    def __init__(self, module):
        self.module, self.where = module, places.Finder(module)
        self.loops, self.collectives, self.branches = [], [], 0

    def walk(self, name, trips, inherited):
        """Moves of a computation that runs ``trips`` times, in order."""
        moves, body = [], self.module.computations[name]
        for instruction in body.values():
            place = self.where.place(name, instruction) or inherited
            if instruction.opcode == "while":
                times = _trips(self.module, instruction)
                self.loops.append(Loop(instruction.name, times, place))
                inner = instruction.attribute(r"body=%?([\w.\-]+)")
                moves += self.walk(inner, trips * (times or 1), place)
            elif instruction.opcode == "conditional":
                self.branches += 1
                branches = [self.walk(branch, trips, place) for branch in instruction.calls]
                moves += max(branches, key=lambda branch: sum(move.bytes for move in branch))
            elif instruction.opcode in ("call", "async-start"):
                for called in instruction.calls:
                    moves += self.walk(called, trips, place)
            else:
                self._collect(instruction, body, trips)
                move = self._move(instruction, body, trips, place)
                moves += [move] if move else []
        return moves

    def _collect(self, instruction, body, trips):
        """Note the collectives of an instruction, also those inside a fusion."""
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            group = _group(instruction.attributes, self.module.partitions)
            given = [array for name in instruction.operands for array in body[name].arrays]
            payload = sum(array.logical_bytes for array in given)
            payload *= group if kind == "all-gather" else 1
            self.collectives.append(
                Collective(instruction.name, kind, trips * payload, group, trips)
            )
        # An asynchronous fusion comes in two halves, "...-start" and "...-done".
        if instruction.opcode == "fusion" and "-done" not in instruction.name:
            for called in instruction.calls:
                inner = self.module.computations[called]
                for nested in inner.values():
                    self._collect(nested, inner, trips)

    def _move(self, instruction, body, trips, place):
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            return None
        if opcode == "custom-call" and instruction.attribute(
            r'custom_call_target="(\w+)"'
        ).startswith(_FREE_CALLS):
            return None
        operands = [body[name].arrays for name in instruction.operands]
        reads = [(array, array.bytes) for arrays in operands for array in arrays]
        writes = [(array, array.bytes) for array in instruction.arrays]
        if opcode == "copy-start":
            writes = writes[:1]  # the result is (destination, source, context)
        elif opcode in ("all-gather-start", "collective-permute-start"):
            writes = writes[len(operands) : 2 * len(operands)]  # (sources, results, contexts)
        elif opcode == "slice-start":
            taken = writes[1][0]
            reads, writes = [(reads[0][0], taken.bytes)], [(taken, taken.bytes)]
        elif opcode in _SLICES:
            reads = [(reads[0][0], min(reads[0][1], writes[0][1])), *reads[1:]]
        elif opcode == "dynamic-update-slice":
            update = reads[1][1]
            reads, writes = reads[1:], [(writes[0][0], update)]
        elif opcode == "fusion":
            reads, writes = self._fusion(instruction, operands)
        hbm = [(array, size) for array, size in [*reads, *writes] if array.space == hlo.HBM]
        padding = sum(size - size * a.logical_bytes / a.bytes for a, size in hbm if a.bytes)
        inner = self._opcodes(instruction)
        largest = max(hbm, key=lambda entry: entry[1], default=(None, 0))[0]
        return Move(
            name=instruction.name,
            opcode=opcode,
            kind=_kind(opcode, inner),
            read=trips * sum(size for array, size in reads if array.space == hlo.HBM),
            written=trips * sum(size for array, size in writes if array.space == hlo.HBM),
            padding=trips * round(padding),
            onchip=trips * sum(s for array, s in [*reads, *writes] if array.space in hlo.ON_CHIP),
            cycles=trips * instruction.cycles,
            flops=trips * convolutions.flops(self.module, instruction, body),
            trips=trips,
            place=place,
            op_name=instruction.op_name,
            arrays=str(largest) if largest else "",
        )

    def _fusion(self, instruction, operands):
        """(array, bytes) that a fusion reads and writes: of slices what they take."""
        (called,) = instruction.calls
        reads = []
        for number, arrays in enumerate(operands):
            taken = self._taken(called, number)
            for array in arrays:
                reads.append((array, array.bytes if taken is None else min(taken, array.bytes)))
        writes = [(array, array.bytes) for array in instruction.arrays]
        update = self._updated(called)
        if update is not None and len(writes) == 1:
            writes = [(writes[0][0], min(update, writes[0][1]))]
        return reads, writes

    @functools.cache  # noqa: B019 - lives as long as one count
    def _taken(self, computation, number):
        """Bytes that a fusion reads of a parameter by slices alone; None: all of it."""
        body, users = self.module.computations[computation], self.where.users(computation)
        start = next(
            (i for i in body.values() if i.opcode == "parameter" and int(i.literal) == number), None
        )
        total, waiting = 0, [start] if start else []
        while waiting:
            value = waiting.pop()
            if value.root:
                return None
            for user in users.get(value.name, ()):
                first, rest = user.operands[0] == value.name, value.name in user.operands[1:]
                if user.opcode == "bitcast":
                    waiting.append(user)
                elif user.opcode in _SLICES and first and not rest:
                    total += sum(array.bytes for array in user.arrays)
                elif user.opcode == "dynamic-update-slice" and first and not rest:
                    pass  # overwritten in place
                elif user.opcode == "fusion":
                    for place, name in enumerate(user.operands):
                        if name == value.name:
                            inner = self._taken(user.calls[0], place)
                            if inner is None:
                                return None
                            total += inner
                else:
                    return None
        return total

    @functools.cache  # noqa: B019
    def _updated(self, computation):
        """Bytes that a fusion writes if its result is an update in place; else None."""
        body = self.module.computations[computation]
        root = next(i for i in body.values() if i.root)
        while root.opcode == "bitcast":
            root = body[root.operands[0]]
        if root.opcode == "dynamic-update-slice":
            return sum(array.bytes for array in body[root.operands[1]].arrays)
        return self._updated(root.calls[0]) if root.opcode == "fusion" else None

    def _opcodes(self, instruction):
        """Opcodes of an instruction and of what is fused into it."""
        if instruction.opcode != "fusion":
            return {instruction.opcode}
        return frozenset().union(*(self._fused(called) for called in instruction.calls))

    @functools.cache  # noqa: B019
    def _fused(self, computation):
        body = self.module.computations[computation].values()
        return frozenset().union(*(self._opcodes(instruction) for instruction in body))


def _kind(opcode, inner):
    """A key of KINDS."""
    work = inner - _SILENT
    if any(name.removesuffix("-start") in COLLECTIVES for name in work):
        return "collective"
    if opcode in ("copy-start", "slice-start"):
        return "prefetch"
    if work & {"convolution", "dot"}:
        return "convolution"
    if work & {"gather", "scatter"}:
        return "gather"
    if work <= _LAYOUT:
        return "layout"
    if work <= _FILLS:
        return "fill"
    if work <= _JOINS | _LAYOUT | _FILLS:
        return "join"
    return "reduction" if work & {"reduce", "reduce-window"} else "elementwise"


def _group(attributes, devices):
    """Chips in one group of a collective; it is written in four ways."""
    explicit = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if explicit:
        return len(explicit.group(1).split(","))
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", attributes)
    if iota:
        return int(iota.group(1))
    mesh = re.search(r"replica_groups=(?:@\w+|mesh\[([^\]]*)\]\S*) \{([^}]*)\}", attributes)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh.group(1) or ""))
        size = 1
        for name, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh.group(2)):
            size *= int(part or sizes.get(name, devices))
        return size
    return devices


def _trips(module, loop):
    """How often a loop runs; 0: its condition does not say."""
    known = loop.attribute(r'known_trip_count":\{"n":"(\d+)"')
    if known:
        return int(known)
    condition = module.computations[loop.attribute(r"condition=%?([\w.\-]+)")]
    lines = list(condition.values())
    for instruction in condition.values():
        if instruction.opcode == "fusion":
            lines += module.computations[instruction.calls[0]].values()
    bounds = {i.literal for i in lines if i.opcode == "constant" and i.literal.isdigit()}
    counts_up = any("direction=LT" in i.attributes for i in lines if i.opcode == "compare")
    return int(bounds.pop()) if counts_up and len(bounds) == 1 else 0
