"""The collectives of a compiled program, read from its HLO text.

XLA's memory and cost statistics are structures that JAX exposes; its collectives are not, so this
module reads them from text, and no other module does. The text is a list of computations, each a
list of instructions, one a line:

    %name = shape opcode(operands), attribute=value, attribute=value

The walk starts at the entry computation and follows every call: fusions, the two computations of a
while loop (as often as the loop runs), the branches of a conditional, wrapped asynchronous ones.

Devices are numbered by their position in the program's device assignment, not by `device.id`.
XLA writes groups of them in three ways, all expanded here into the first:

    {{0,1},{2,3}}                            each group in full
    [2,4]<=[4,2]T(1,0)                       iota(8) reshaped, transposed, cut into 2 groups of 4
    mesh['data'=2,'x'=4] {'data','x':(2)2}   axes of a mesh, whole or the (before)size part of one
"""

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

Kind: TypeAlias = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "ppermute"]
Groups: TypeAlias = tuple[tuple[int, ...], ...]

_KINDS: dict[str, Kind] = {
    "all-gather": "all_gather",
    "reduce-scatter": "reduce_scatter",
    "all-reduce": "all_reduce",
    "all-to-all": "all_to_all",
    "collective-permute": "ppermute",
}
_UNCOUNTED = ("collective-broadcast", "ragged-all-to-all", "send", "recv")
_TYPE_PREFIXES = {"f": "float", "bf": "bfloat", "s": "int", "u": "uint", "c": "complex"}

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE_TOKEN = re.compile(r"[()]|(\w+)\[([^\]]*)\](?:\{[^}]*\})?")
_CALLED = re.compile(
    r", (?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
    r"|, (?:branch_computations|called_computations)=\{([^}]*)\}"
)
_EXPLICIT = re.compile(r"\{((?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"(?:\[(\d+),(\d+)\]<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}")
_MESH_AXIS = re.compile(r"([^,=]+)=(\d+)")
_AXIS_PART = re.compile(r"([^,:]+)(?::\((\d+)\)(\d+))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Array:
    """One array of a shape.

    Attributes:
        dtype: NumPy's name of its type.
        num_bytes: its size on one device, without padding.
    """

    dtype: str
    num_bytes: int


Shape: TypeAlias = Array | tuple["Shape", ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Instruction:
    """One line of a computation, split into its parts.

    Attributes:
        name: unique within the program.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Module:
    """A program: computations of instructions.

    Attributes:
        entry: name of the computation that a call runs.
        computations: the instructions of each by name, in the order they run.
        num_devices: how many devices run it together.
    """

    entry: str
    computations: dict[str, tuple[Instruction, ...]]
    num_devices: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectiveInstruction:
    """One collective of the program.

    Attributes:
        kind: which collective.
        groups: devices that communicate with each other; for ppermute the (source, target) pairs.
        payload_bytes: what one device holds of the whole array: the operand, or for all_gather
            the result.
        dtype: of what moves, "+" between several.
        asynchronous: whether other work can run between its start and its end.
        count: executions in one call; None where the program does not tell.
        note: the condition under which `count` holds; empty when there is none.
    """

    kind: Kind
    groups: Groups
    payload_bytes: int
    dtype: str
    asynchronous: bool
    count: int | None
    note: str


def collectives(module: Module) -> tuple[CollectiveInstruction, ...]:
    """Return every collective of a program, in program order, calls followed where they occur.

    Raises:
        ValueError: the program communicates in a way that has no kind here.
    """
    return tuple(_walk(module, module.entry, count=1, note="", asynchronous=False))


def parse_module(text: str) -> Module:
    """Split the HLO module `text` into computations and instructions."""
    computations: dict[str, list[Instruction]] = {}
    entry = current = ""
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if header := _HEADER.match(line):
            current = header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif match := _INSTRUCTION.match(line):
            computations[current].append(_parse_instruction(match))
    return Module(
        entry=entry,
        computations={name: tuple(lines) for name, lines in computations.items()},
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


def _parse_array(element: str, dims: str) -> Array:
    """Read `f32` and `2,8`: the digits of a type are its bits; `token` and `opaque` have none."""
    name = re.match(r"([a-z]+?)(\d+)(\w*)$", element)
    if name is None:
        bits, dtype = (8, "bool") if element == "pred" else (0, element)
    else:
        bits = int(name[2])
        variant = f"_{name[3]}" if name[3] else ""
        dtype = f"{_TYPE_PREFIXES.get(name[1], name[1])}{bits}{variant}"
    num_elements = math.prod(int(dim) for dim in re.findall(r"\d+", dims))
    return Array(dtype=dtype, num_bytes=-(-num_elements * bits // 8))


def _arrays(shape: Shape) -> tuple[Array, ...]:
    if isinstance(shape, Array):
        return (shape,)
    return tuple(itertools.chain.from_iterable(_arrays(part) for part in shape))


def parse_groups(text: str, num_devices: int) -> Groups:
    """Expand the replica groups, or source and target pairs, that `text` begins with.

    Raises:
        ValueError: the text has none of the three forms.
    """
    if explicit := _EXPLICIT.match(text):
        groups = re.findall(r"\{([\d,]+)\}", explicit[1])
        # No group at all stands for one of all devices.
        return tuple(_integers(group) for group in groups) or (tuple(range(num_devices)),)
    if (iota := _IOTA.match(text)) and iota[1]:
        return _rows(_iota(iota).reshape(int(iota[1]), int(iota[2])))
    if mesh := _MESH.match(text):
        return _mesh_groups(mesh)
    raise ValueError(
        f"replica_groups must be lists, an iota or axes of a mesh: got {text[:60]!r}. "
        "This version of XLA writes them in a way that tpmlp does not know; use a version of JAX "
        "that tpmlp supports."
    )


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def _rows(array: np.ndarray) -> Groups:
    return tuple(tuple(int(entry) for entry in row) for row in array)


def _iota(match: re.Match[str]) -> np.ndarray:
    dims = _integers(match[3])
    order = _integers(match[4]) if match[4] else tuple(range(len(dims)))
    return np.arange(math.prod(dims)).reshape(dims).transpose(order)


def _mesh_groups(match: re.Match[str]) -> Groups:
    """Group the devices of a mesh that differ only in their coordinates along the named parts.

    The part `(before)size` of an axis of n reads the axis as [before, size, n / before / size].
    """
    names = [name for name, _ in _MESH_AXIS.findall(match[1])]
    shape = tuple(int(size) for _, size in _MESH_AXIS.findall(match[1]))
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, device in np.ndenumerate(_mesh_devices(match[2], shape)):
        rest = list(index)
        for name, before, size in _AXIS_PART.findall(match[3]):
            axis = names.index(name)
            stride = shape[axis] // (int(before) * int(size)) if size else 1
            coordinate = index[axis] // stride % (int(size) if size else shape[axis])
            rest[axis] -= coordinate * stride
        groups.setdefault(tuple(rest), []).append(int(device))
    return tuple(tuple(group) for group in groups.values())


def _mesh_devices(device_ids: str | None, shape: tuple[int, ...]) -> np.ndarray:
    if device_ids is None:
        return np.arange(math.prod(shape)).reshape(shape)
    iota = _IOTA.match(device_ids)
    return (_iota(iota) if iota else np.array(_integers(device_ids))).reshape(shape)


def _walk(
    module: Module, computation: str, *, count: int | None, note: str, asynchronous: bool
) -> Iterator[CollectiveInstruction]:
    """Yield the collectives of a computation that runs `count` times, and of all it calls."""
    for instruction in module.computations[computation]:
        opcode = instruction.opcode.removesuffix("-start")
        if opcode in _KINDS:
            yield _collective(module, instruction, count, note, asynchronous)
        elif opcode in _UNCOUNTED and "is_host_transfer=true" not in instruction.attributes:
            raise ValueError(
                f"function must communicate by {', '.join(_KINDS.values())} only: got "
                f"{instruction.opcode} in {instruction.name}. Audit the rest without it."
            )
        elif not instruction.opcode.endswith(("-update", "-done")):
            for callee, times, condition in _calls(module, computation, instruction):
                yield from _walk(
                    module,
                    callee,
                    count=None if count is None or times is None else count * times,
                    note="; ".join(filter(None, (note, condition))),
                    asynchronous=asynchronous or instruction.opcode == "async-start",
                )


def _collective(
    module: Module,
    instruction: Instruction,
    count: int | None,
    note: str,
    asynchronous: bool,
) -> CollectiveInstruction:
    started = instruction.opcode.endswith("-start")
    kind = _KINDS[instruction.opcode.removesuffix("-start")]
    groups = _groups(instruction, module.num_devices)
    arrays = _payload(kind, parse_shape(instruction.shape), started)
    num_bytes = sum(array.num_bytes for array in arrays)
    if kind == "reduce_scatter" and not started:
        num_bytes *= len(groups[0])
    return CollectiveInstruction(
        kind=kind,
        groups=groups,
        payload_bytes=num_bytes,
        dtype="+".join(dict.fromkeys(array.dtype for array in arrays)),
        # CUDA programs keep the -start form for those that were made to run at once.
        asynchronous=(started or asynchronous) and '"is_sync":true' not in instruction.attributes,
        count=count,
        note=note,
    )


def _groups(instruction: Instruction, num_devices: int) -> Groups:
    found = re.search(r", (?:replica_groups|source_target_pairs)=(.*)", instruction.attributes)
    return parse_groups(found[1] if found else "{}", num_devices)


def _payload(kind: Kind, shape: Shape, started: bool) -> tuple[Array, ...]:
    """Return the arrays that `payload_bytes` counts.

    A start returns (operand, result, ...), or ((operands), (results), ...) when it stands for
    several; an all-reduce's own start returns its results alone.
    """
    if not started or isinstance(shape, Array):
        return _arrays(shape)
    if kind == "all_reduce":
        return _arrays(shape if isinstance(shape[0], Array) else shape[0])
    return _arrays(shape[0] if kind in ("reduce_scatter", "all_to_all") else shape[1])


def _calls(
    module: Module, caller: str, instruction: Instruction
) -> Iterator[tuple[str, int | None, str]]:
    """Yield (computation, times it runs per execution, condition) for what an instruction calls."""
    called = [name for match in _CALLED.finditer(instruction.attributes) for name in _names(match)]
    if instruction.opcode == "while":
        trips = _trip_count(module, caller, instruction)
        note = "" if trips is not None else f"trip count of {instruction.name} unknown"
        yield _attribute(instruction, "body"), trips, note
        yield _attribute(instruction, "condition"), None if trips is None else trips + 1, note
    elif instruction.opcode == "conditional":
        for branch, name in enumerate(called):
            yield name, 1, f"if branch {branch} of {len(called)} is taken"
    else:
        yield from ((name, 1, "") for name in called)


def _names(match: re.Match[str]) -> list[str]:
    return [name.strip().lstrip("%") for name in (match[1] or match[2]).split(",")]


def _attribute(instruction: Instruction, name: str) -> str:
    found = re.search(rf", {name}=%?([\w.\-]+)", instruction.attributes)
    return found[1] if found else ""


def _trip_count(module: Module, caller: str, loop: Instruction) -> int | None:
    """Return how often a while loop runs, or None where that depends on data.

    CPU and CUDA programs carry the number. TPU programs do not, and there a counter that is
    compared with a constant tells: from `start` in steps of `step` while it is less than `limit`.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known[1])
    test = _root(module, _attribute(loop, "condition"))
    if test.opcode != "compare" or _attribute(test, "direction") != "LT":
        return None
    counter, bound = (_origin(module, _attribute(loop, "condition"), o) for o in test.operands)
    if counter is None or counter.opcode != "get-tuple-element":
        return None
    index = int(_attribute(counter, "index"))
    limit = _constant(bound)
    start = _constant(_tuple_entry(module, caller, loop.operands[0], index))
    step = _step(module, _attribute(loop, "body"), index)
    if limit is None or start is None or step is None or step < 1:
        return None
    return max(0, -(-(limit - start) // step))


def _root(module: Module, computation: str) -> Instruction:
    (root,) = (line for line in module.computations[computation] if line.is_root)
    return root


def _origin(module: Module, computation: str, name: str) -> Instruction | None:
    """Return the instruction that `name` is a copy of."""
    lines = {line.name: line for line in module.computations[computation]}
    line = lines.get(name)
    while line is not None and line.opcode in ("copy", "bitcast"):
        line = lines.get(line.operands[0])
    return line


def _tuple_entry(module: Module, computation: str, name: str, index: int) -> Instruction | None:
    line = _origin(module, computation, name)
    if line is None or line.opcode != "tuple":
        return None
    return _origin(module, computation, line.operands[index])


def _constant(line: Instruction | None) -> int | None:
    if line is None or line.opcode != "constant" or not re.match(r"-?\d+$", line.operands[0]):
        return None
    return int(line.operands[0])


def _step(module: Module, body: str, index: int) -> int | None:
    """Return the constant that a loop's body adds to entry `index` of its state."""
    update = _tuple_entry(module, body, _root(module, body).name, index)
    if update is None or update.opcode != "add":
        return None
    terms = [_origin(module, body, name) for name in update.operands]
    counters = [t for t in terms if t is not None and t.opcode == "get-tuple-element"]
    steps = [step for step in map(_constant, terms) if step is not None]
    if len(counters) != 1 or len(steps) != 1 or _attribute(counters[0], "index") != str(index):
        return None
    return steps[0]
