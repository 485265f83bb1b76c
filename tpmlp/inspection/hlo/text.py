"""HLO text split into computations, instructions and shapes.

A module is a list of computations, each a list of instructions, one a line:

    %name = shape opcode(operands), attribute=value, attribute=value

A compiled module is scheduled: the lines of a computation are in the order in which they run.
"""

import itertools
import math
import re
from dataclasses import dataclass
from typing import TypeAlias

_TYPE_PREFIXES = {"f": "float", "bf": "bfloat", "s": "int", "u": "uint", "c": "complex"}

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE_TOKEN = re.compile(r"[()]|(\w+)\[([^\]]*)\](?:\{[^}]*\})?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Array:
    """One array of a shape.

    Attributes:
        dtype: NumPy's name of its type.
        dims: its sizes on one device.
        num_bytes: its size on one device, without padding.
    """

    dtype: str
    dims: tuple[int, ...]
    num_bytes: int


Shape: TypeAlias = Array | tuple["Shape", ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Instruction:
    """One line of a computation, split into its parts.

    Attributes:
        name: unique within its computation.
        shape: of its result, as text (`parse_shape` reads it).
        opcode: what it does.
        operands: names of its operands; the literal itself for a constant.
        attributes: all that follows the operands, as text.
        is_root: whether its result is that of its computation.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def attribute(self, name: str) -> str:
        """Return the value of an attribute that is one name or number; empty without it."""
        found = re.search(rf", {name}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """What a custom call calls; empty for other instructions."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""


Computation: TypeAlias = dict[str, Instruction]


@dataclass(frozen=True, kw_only=True, slots=True)
class Module:
    """A program: computations of instructions.

    Attributes:
        entry: name of the computation that a call runs.
        computations: the instructions of each by name, in the order they run.
        num_devices: how many devices run it together.
    """

    entry: str
    computations: dict[str, Computation]
    num_devices: int

    def root(self, computation: str) -> Instruction:
        """Return the instruction whose result is that of the computation."""
        (root,) = (line for line in self.computations[computation].values() if line.is_root)
        return root


def parse_module(text: str) -> Module:
    """Split the HLO module `text` into computations and instructions."""
    computations: dict[str, Computation] = {}
    entry = current = ""
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if header := _HEADER.match(line):
            current = header[2]
            computations[current] = {}
            entry = current if header[1] else entry
        elif match := _INSTRUCTION.match(line):
            computations[current][match[2]] = _parse_instruction(match)
    return Module(
        entry=entry,
        computations=computations,
        num_devices=_header_number(text, "replica_count") * _header_number(text, "num_partitions"),
    )


def _parse_instruction(match: re.Match[str]) -> Instruction:
    root, name, definition = match.groups()
    end_of_shape = _closing(definition, 0) if definition[0] == "(" else definition.index(" ")
    opening = definition.index("(", end_of_shape)
    closing = _closing(definition, opening)
    operands = definition[opening + 1 : closing - 1]
    return Instruction(
        name=name,
        shape=definition[:end_of_shape],
        opcode=definition[end_of_shape:opening].strip(),
        operands=tuple(re.findall(r"%([\w.\-]+)", operands)) or (operands,),
        attributes=definition[closing:],
        is_root=root is not None,
    )


def _closing(text: str, opening: int) -> int:
    """Return the index just after the parenthesis that closes the one at `opening`."""
    depth = 0
    for index in range(opening, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index + 1
    return len(text)


def _header_number(text: str, name: str) -> int:
    found = re.search(rf"{name}=(\d+)", text.partition("\n")[0])
    return int(found[1]) if found else 1


def parse_shape(text: str) -> Shape:
    """Return the arrays of a shape such as `(f32[2,8]{1,0}, (s32[], pred[4]))`."""
    nested: list[list[Shape]] = [[]]
    for token in _SHAPE_TOKEN.finditer(text):
        if token[0] == "(":
            nested.append([])
        elif token[0] == ")":
            inner = nested.pop()
            nested[-1].append(tuple(inner))
        else:
            nested[-1].append(_parse_array(token[1], token[2]))
    return nested[0][0]


def _parse_array(element: str, sizes: str) -> Array:
    """Read `f32` and `2,8`: the digits of a type are its bits; `token` and `opaque` have none."""
    name = re.match(r"([a-z]+?)(\d+)(\w*)$", element)
    if name is None:
        bits, dtype = (8, "bool") if element == "pred" else (0, element)
    else:
        bits = int(name[2])
        variant = f"_{name[3]}" if name[3] else ""
        dtype = f"{_TYPE_PREFIXES.get(name[1], name[1])}{bits}{variant}"
    dims = integers(sizes)
    return Array(dtype=dtype, dims=dims, num_bytes=-(-math.prod(dims) * bits // 8))


def flat(shape: Shape) -> tuple[Array, ...]:
    """Return the arrays of a shape without its nesting."""
    if isinstance(shape, Array):
        return (shape,)
    return tuple(itertools.chain.from_iterable(flat(part) for part in shape))


def integers(text: str) -> tuple[int, ...]:
    """Return the whole numbers in `text`, none negative."""
    return tuple(int(number) for number in re.findall(r"\d+", text))
