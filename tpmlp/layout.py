"""The notation: where an array lives, written as a string that is parsed and checked.

    W_l : "O/g I/s"        h_l : "I/s/g B/d"        z_l, g_l : "O/g/s B/d"

A *dim* is an array dimension and starts with a capital; an *axis* is a mesh axis and is written
small. "I/s/g" reads: the I features are split over axis s, and each piece again over axis g, so
that device (s, g) holds block s * G + g. "+s" marks a partial sum: the array is the sum, over
axis s, of what the devices hold. The axes in a layout are *roles* (g gathers, s scatters, d is the
batch); a mapping such as {"g": "x", "s": "y", "d": "data"} binds them to the axes of a mesh.

A layout is also the PartitionSpec of the global array, and two layouts with an arrow between them
are the signature of a collective. What is a lie is refused here, with the signature in the error.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from jax.sharding import Mesh, PartitionSpec

_DIM = re.compile(r"([A-Z]\w*)((?:/[a-z]\w*)*)")
_PARTIAL = re.compile(r"(?:\+[a-z]\w*)+")


class LayoutError(ValueError):
    """A layout or signature that is malformed, or that does not describe what it is used for."""


@dataclass(frozen=True, slots=True)
class Dim:
    """One array dimension and the axes that split it, major first."""

    name: str
    axes: tuple[str, ...]

    def __str__(self) -> str:
        return "/".join((self.name, *self.axes))


@dataclass(frozen=True, slots=True)
class Layout:
    """The dims of an array, and the axes over which it is a partial sum."""

    dims: tuple[Dim, ...]
    partial: tuple[str, ...]

    @property
    def axes(self) -> frozenset[str]:
        """Every axis on which devices hold different values: those that split, and the partial."""
        return frozenset(self.partial).union(*(dim.axes for dim in self.dims))

    def __str__(self) -> str:
        partial = "".join(f"+{axis}" for axis in self.partial)
        return " ".join([*map(str, self.dims), *([partial] if partial else [])])


@dataclass(frozen=True, slots=True)
class Signature:
    """What an operation takes and gives: layouts of the operands and of the result."""

    text: str
    operands: tuple[Layout, ...]
    result: Layout

    def refuse(self, reason: str) -> LayoutError:
        """Return the error that shows this signature and why it cannot hold."""
        return LayoutError(f'signature "{self.text}" {reason}')


@cache
def parse_layout(text: str) -> Layout:
    """Parse one layout.

    Args:
        text: for example "O/g B/d +s"; the empty string is a scalar, the same everywhere.

    Returns:
        The layout.

    Raises:
        LayoutError: a token that is neither a dim nor a partial sum, a dim named twice, an axis
            used twice.

    Examples:
        >>> str(parse_layout("O/g  B/d +s"))
        'O/g B/d +s'
        >>> parse_layout("O/g I/g")
        Traceback (most recent call last):
        ...
        tpmlp.layout.LayoutError: layout "O/g I/g" uses axis g twice. Split each axis once.
    """
    dims: list[Dim] = []
    partial: list[str] = []
    for token in text.split():
        if match := _DIM.fullmatch(token):
            dims.append(Dim(match[1], tuple(match[2].split("/")[1:])))
        elif _PARTIAL.fullmatch(token):
            partial += token.split("+")[1:]
        else:
            raise LayoutError(
                f'layout "{text}" has the token "{token}". Write a dim as I/s/g, a sum as +s.'
            )
    for what, names in (
        ("dim", [dim.name for dim in dims]),
        ("axis", [axis for dim in dims for axis in dim.axes] + partial),
    ):
        for name in names:
            if names.count(name) > 1:
                advice = "Name each dim once." if what == "dim" else "Split each axis once."
                raise LayoutError(f'layout "{text}" uses {what} {name} twice. {advice}')
    return Layout(tuple(dims), tuple(partial))


@cache
def parse_signature(text: str) -> Signature:
    """Parse "operand, operand -> result".

    Raises:
        LayoutError: no arrow, or a layout that does not parse.

    Examples:
        >>> parse_signature("O/g I/s, I/s B/d -> O/g B/d +s").result.partial
        ('s',)
    """
    left, arrow, right = text.partition("->")
    if not arrow or "->" in right or "," in right:
        raise LayoutError(f'signature "{text}" must read "operand, operand -> result".')
    try:
        operands = tuple(parse_layout(part.strip()) for part in left.split(","))
        return Signature(text, operands, parse_layout(right.strip()))
    except LayoutError as error:
        raise LayoutError(f'signature "{text}": {error}') from error


def gathered(signature: Signature) -> tuple[int, tuple[str, ...]]:
    """Return which dim an all-gather makes whole, and over which axes.

    Only the minor axes of a dim can be gathered: "I/s/g -> I/s" joins neighbouring blocks, while
    "I/s/g -> I/g" would have to interleave them.
    """
    operand, result = _one_operand(signature)
    if operand.partial != result.partial:
        raise signature.refuse("changes a partial sum. An all-gather only moves blocks.")
    dim, longer, shorter = _changed_dim(signature, operand, result)
    if longer[: len(shorter)] != shorter or len(longer) == len(shorter):
        raise signature.refuse(
            f"gathers dim {operand.dims[dim].name} from {operand.dims[dim]} to {result.dims[dim]}. "
            "An all-gather removes axes from the end."
        )
    return dim, longer[len(shorter) :]


def scattered(signature: Signature) -> tuple[int, tuple[str, ...]]:
    """Return which dim a reduce-scatter splits, and over which axes it sums."""
    operand, result = _one_operand(signature)
    summed = tuple(axis for axis in operand.partial if axis not in result.partial)
    dim, before, after = _changed_dim(signature, operand, result)
    added = after[len(before) :]
    kept_in_order = after[: len(before)] == before and set(result.partial) <= set(operand.partial)
    if not summed or not kept_in_order or set(added) != set(summed):
        raise signature.refuse(
            f"sums {summed} and splits {operand.dims[dim]} to {result.dims[dim]}. "
            "A reduce-scatter appends to one dim exactly the axes it sums."
        )
    return dim, added


def reduced(signature: Signature) -> tuple[str, ...]:
    """Return the axes over which an all-reduce sums."""
    operand, result = _one_operand(signature)
    if operand.dims != result.dims:
        raise signature.refuse("moves a dim. An all-reduce leaves every dim where it is.")
    summed = tuple(axis for axis in operand.partial if axis not in result.partial)
    if not summed or not set(result.partial) <= set(operand.partial):
        raise signature.refuse("sums nothing. An all-reduce removes a +axis.")
    return summed


def turned(signature: Signature) -> tuple[str, str]:
    """Return the two axes whose order in a dim is exchanged, major first."""
    operand, result = _one_operand(signature)
    _, before, after = _changed_dim(signature, operand, result)
    if operand.partial or result.partial or len(before) != 2 or after != before[::-1]:
        raise signature.refuse("is no turn. Write the two axes of one dim the other way round.")
    return before[0], before[1]


@cache
def einsum_formula(text: str) -> str:
    """Return the subscripts of an einsum whose signature is honest.

    Raises:
        LayoutError: a dim split differently in two places, a result dim that no operand has, a
            partial operand, or a contraction over a split dim that does not leave +axis.

    Examples:
        >>> einsum_formula("O/g I/s, I/s B/d -> O/g B/d +s")
        'ab,bc->ac'
    """
    signature = parse_signature(text)
    dims: dict[str, Dim] = {}
    for operand in signature.operands:
        if operand.partial:
            raise signature.refuse(f'multiplies the partial sum "{operand}". Reduce it first.')
        for dim in operand.dims:
            if dims.setdefault(dim.name, dim) != dim:
                raise signature.refuse(
                    f"has both {dims[dim.name]} and {dim}. A dim is split one way in all operands."
                )
    for dim in signature.result.dims:
        if dims.get(dim.name) != dim:
            raise signature.refuse(f"gives {dim}, but the operands have {dims.get(dim.name)}.")
    kept = {dim.name for dim in signature.result.dims}
    owed = {axis for dim in dims.values() if dim.name not in kept for axis in dim.axes}
    if owed != set(signature.result.partial):
        raise signature.refuse(
            f"contracts dims split over {sorted(owed)} and leaves {signature.result.partial}. "
            "Write + for each axis of a contracted dim, and for no other."
        )
    letter = {name: chr(ord("a") + i) for i, name in enumerate(dims)}
    layouts = ["".join(letter[d.name] for d in o.dims) for o in signature.operands]
    return ",".join(layouts) + "->" + "".join(letter[d.name] for d in signature.result.dims)


def partition_spec(layout: str, mesh: Mesh, axes: Mapping[str, str]) -> PartitionSpec:
    """Return the PartitionSpec that a layout means on a mesh.

    Axes of size 1 are left out: splitting over one device is nothing, and shard_map would
    otherwise call the value device-dependent and ask for a collective that moves nothing.

    Args:
        layout: for example "I/s/g B/d"; no partial sums.
        mesh: the mesh.
        axes: mesh axis of each role.

    Examples:
        >>> from tpmlp.mesh import make_mesh
        >>> axes = {"g": "x", "s": "y", "d": "data"}
        >>> tuple(partition_spec("I/s/g B/d", make_mesh(x=4, y=2), axes))
        (('y', 'x'), None)
    """
    parsed = parse_layout(layout)
    if parsed.partial:
        raise LayoutError(f'layout "{layout}" is a partial sum; no global array is. Reduce it.')
    names = [tuple(axes[a] for a in dim.axes if mesh.shape[axes[a]] > 1) for dim in parsed.dims]
    return PartitionSpec(*(n if len(n) > 1 else n[0] if n else None for n in names))


def padded(width: int, num_blocks: int) -> int:
    """Return the least multiple of num_blocks that is at least width.

    Examples:
        >>> padded(10, 8), padded(17, 3), padded(16, 8)
        (16, 18, 16)
    """
    return -(-width // num_blocks) * num_blocks


def _one_operand(signature: Signature) -> tuple[Layout, Layout]:
    if len(signature.operands) != 1:
        raise signature.refuse(f"has {len(signature.operands)} operands. A collective takes one.")
    return signature.operands[0], signature.result


def _changed_dim(
    signature: Signature, operand: Layout, result: Layout
) -> tuple[int, tuple[str, ...], tuple[str, ...]]:
    before = [dim.name for dim in operand.dims]
    after = [dim.name for dim in result.dims]
    if before != after:
        raise signature.refuse(f"turns dims {before} into {after}. A collective keeps their order.")
    changed = [i for i, dim in enumerate(operand.dims) if dim != result.dims[i]]
    if len(changed) != 1:
        raise signature.refuse(f"changes {len(changed)} dims. A collective changes one.")
    return changed[0], operand.dims[changed[0]].axes, result.dims[changed[0]].axes
