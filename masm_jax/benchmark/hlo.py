"""The optimised HLO text of a compiled program, read into dataclasses.

Nothing here needs JAX or a device: text in, ``Module`` out. What moves how many bytes is counted by
``masm_jax.benchmark.traffic``.

Sizes are those of the memory, not of the mathematics. A TPU stores an array in tiles: the layout
``bf16[4,64,64,24]{3,2,1,0:T(8,128)(2,1)}`` says minor-to-major order, tiles of 8 x 128 over the two
minor dimensions, and pairs of bf16 packed into 32 bits. Its 24 channels take 128 lanes: 5.3 times
the bytes of the numbers. No ``S(...)`` is HBM; ``S(1)``, on v4 ``S(3)``, is on the chip.
"""

import dataclasses
import functools
import math
import re

HBM, ON_CHIP = 0, (1, 3)  # VMEM, and the CMEM of v4
_BITS = {
    "pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128, "s1": 1, "u1": 1,
    "s2": 2, "u2": 2, "s4": 4, "u4": 4, "f4e2m1fn": 4,
}  # fmt: skip
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_HOURS = 10**13  # cycles: nothing in a step takes that long
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|branch_computations|true_computation|"
                     r"false_computation|called_computations)=(\{[^}]*\}|%?[\w.\-]+)")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Array:
    """One array and how it lies in memory.

    Attributes:
      dtype: "bf16", "f32", ...
      dims: the logical shape.
      order: dimensions from minor to major.
      tiles: tile shapes, outermost first: ((8, 128), (2, 1)); () is untiled.
      space: memory space; one of HBM, ON_CHIP or for scalars and flags.
      bits: of an element as stored.
    """

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tiles: tuple[tuple[int, ...], ...] = ()
    space: int = 0
    bits: int = 0

    def __str__(self):
        dims, order = (",".join(map(str, numbers)) for numbers in (self.dims, self.order))
        return f"{self.dtype}[{dims}]{{{order}}}"

    @functools.cached_property
    def logical_bytes(self):
        """Bytes of the numbers alone."""
        return math.prod(self.dims) * self.bits // 8

    @functools.cached_property
    def bytes(self):
        """Bytes in memory: every tile is there in full."""
        physical = [self.dims[axis] for axis in reversed(self.order)]
        for tile in self.tiles:
            physical = [1] * (len(tile) - len(physical)) + physical
            whole = len(physical) - len(tile)
            tiles = [-(-size // edge) for size, edge in zip(physical[whole:], tile)]
            physical = [*physical[:whole], *tiles, *tile]
        return math.prod(physical) * self.bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name, opcode: without the leading "%".
      arrays: leaves of the result, in order; more than one for a tuple.
      operands: names of instructions of the same computation.
      literal: what stands in the brackets where no operands do: a constant's value, a parameter's
        number.
      calls: names of the computations it holds: a fusion's body, a loop's, the branches.
      attributes: the rest of the line.
      root: whether it is the computation's result.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    calls: tuple[str, ...]
    attributes: str
    root: bool

    def attribute(self, pattern, default=""):
        """First group of a regular expression in the attributes."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else default

    @property
    def op_name(self):
        """The traced operation that it came from: "jit(step)/encoder/level1/dot_general"."""
        return self.attribute(r'op_name="((?:[^"\\]|\\.)*)"')

    @property
    def cycles(self):
        """The compiler's own estimate of its duration in clock cycles; 0 where it gives none."""
        cycles = int(self.attribute(r'"estimated_cycles":"(\d+)"', "0"))
        return cycles if cycles < _HOURS else 0  # of some exchanges it says 2^63 - 1


@dataclasses.dataclass(frozen=True)
class Module:
    """A program.

    Attributes:
      computations: {name: {instruction name: Instruction}}.
      entry: name of the computation that runs.
      partitions: devices that run it side by side.
      frames: {id: ((function, "file:line"), ...)}, outermost first: where an operation was traced.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str
    partitions: int
    frames: dict[int, tuple[tuple[str, str], ...]]

    def stack(self, instruction):
        """Functions that were being traced, outermost first; () where the text does not say."""
        return self.frames.get(int(instruction.attribute(r"stack_frame_id=(\d+)", "0")), ())


def parse(text):
    """Read ``compiled.as_text()``.

    Args:
      text: optimised HLO.

    Returns:
      Module.

    Raises:
      ValueError: it has no entry computation.
    """
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if current is None:
            if line.endswith("{") and line.startswith(("%", "ENTRY ")):
                name = _NAME.search(line).group(1)
                current = computations[name] = {}
                entry = name if line.startswith("ENTRY") else entry
        elif line.startswith("}"):
            current = None
        elif " = " in line:
            instruction = _instruction(line)
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError(f"expected HLO text with an ENTRY computation, found {text[:60]!r}")
    partitions = re.search(r"\bnum_partitions=(\d+)", text[: text.index("\n")])
    return Module(computations, entry, int(partitions.group(1)) if partitions else 1, _frames(text))


def parse_arrays(text):
    """The arrays of a printed shape: of a tuple all its leaves, in order."""
    return tuple(_array(*match) for match in _ARRAY.findall(text))


@functools.cache
def _array(dtype, dims, layout):
    sizes = tuple(int(n.lstrip("<=")) for n in dims.split(",") if n)
    order, _, physical = layout.partition(":")
    order = tuple(int(n) for n in order.split(",") if n) or tuple(reversed(range(len(sizes))))
    tiles = re.match(r"T((?:\([\d,*]+\))+)", physical)
    tiles = re.findall(r"\(([\d,]+)\)", tiles.group(1)) if tiles else ()
    space = re.search(r"(?<![A-Z])S\((\d+)\)", physical)
    bits = re.search(r"E\((\d+)\)", physical)
    stored = _BITS.get(dtype) if dtype in _BITS else int(re.search(r"\d+", dtype).group())
    return Array(
        dtype,
        sizes,
        order,
        tuple(tuple(map(int, tile.split(","))) for tile in tiles),
        int(space.group(1)) if space else 0,
        int(bits.group(1)) if bits else stored,
    )


def _instruction(line):
    left, _, right = line.strip().partition(" = ")
    shape, rest = _head(right)
    opcode, _, rest = rest.lstrip().partition("(")
    operands, attributes = _head("(" + rest)
    names = tuple(_NAME.findall(operands))
    calls = [_NAME.findall(called) or [called] for _, called in _CALLED.findall(attributes)]
    return Instruction(
        name=left.removeprefix("ROOT ").lstrip("%"),
        opcode=opcode,
        arrays=parse_arrays(shape),
        operands=names,
        literal="" if names else operands[1:-1],
        calls=tuple(name for names in calls for name in names),
        attributes=attributes,
        root=left.startswith("ROOT "),
    )


def _head(text):
    """(the first word or bracketed group, the rest)."""
    if not text.startswith("("):
        word, space, rest = text.partition(" ")
        return word, rest
    depth = 0
    for place in re.finditer(r"[()]", text):
        depth += 1 if place.group() == "(" else -1
        if depth == 0:
            return text[: place.end()], text[place.end() :]
    raise ValueError(f"expected a closing bracket in {text[:80]!r}")


def _frames(text):
    """{id: ((function, "file:line"), ...)} from the tables that stand before the computations."""
    tables, current = {}, None
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY ")):
            break
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            current = tables[line] = {}
        elif current is not None and line[:1].isdigit():
            number, _, value = line.partition(" ")
            current[int(number)] = value
    places = {}
    for number, value in tables.get("FileLocations", {}).items():
        fields = dict(re.findall(r"(\w+)=(\d+)", value))
        function = tables["FunctionNames"].get(int(fields["function_name_id"]), "").strip('"')
        file = tables["FileNames"].get(int(fields["file_name_id"]), "").strip('"')
        places[number] = (function, f"{file}:{fields['line']}")
    frames = {}
    for number, value in sorted(tables.get("StackFrames", {}).items()):
        fields = dict(re.findall(r"(\w+)=(\d+)", value))
        # Stored plus one: 1 is "no parent". Parents come first.
        parent = frames.get(int(fields.get("parent_frame_id", 1)) - 1, ())
        frames[number] = (*parent, places.get(int(fields["file_location_id"]), ("", "")))
    return frames
