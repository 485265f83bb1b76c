"""Each collective against its definition as a function on the list of blocks, and its refusals.

A failure in a block test: the collective joins, sums or splits in another order than its signature
says, on this mesh over these axes; kernels built on it are wrong there. A failure in a lie: a
kernel whose layouts are wrong would run. A failure in the source test: something goes round the
checked operations.
"""

import ast
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import tpmlp
from conftest import MESHES
from tests.cases import mesh_of, name_of
from tpmlp.collectives import (
    all_gather,
    all_reduce,
    all_reduce_max,
    block_index,
    einsum,
    reduce_scatter,
    shift,
)
from tpmlp.layout import LayoutError

AXES = [("x",), ("y",), ("data",), ("x", "y"), ("y", "x"), ("data", "x", "y")]
ROLES = "abc"


def rows(mesh: Mesh) -> int:
    """Return a number of rows that every product of axes divides."""
    return int(np.prod(list(mesh.shape.values()))) * 2


def blocks_of(mesh: Mesh, axes: tuple[str, ...]) -> np.ndarray:
    """Return one random integer block [rows, 3] for each index over axes, major first."""
    count = int(np.prod([mesh.shape[a] for a in axes]))
    return np.random.default_rng(0).integers(-9, 9, (count, rows(mesh), 3)).astype(np.float32)


def spec(mesh: Mesh, *dims: tuple[str, ...]) -> PartitionSpec:
    """Return the PartitionSpec that splits each dim over axes, those of size 1 left out."""
    return PartitionSpec(*(tuple(a for a in axes if mesh.shape[a] > 1) or None for axes in dims))


def gather(x: jax.Array, split: str, partial: str, axes: dict[str, str]) -> jax.Array:
    return all_gather(f"K{split} N B -> K N B", x, **axes)


def scatter(x: jax.Array, split: str, partial: str, axes: dict[str, str]) -> jax.Array:
    return reduce_scatter(f"N B {partial} -> N{split} B", x[0], **axes)


def total(x: jax.Array, split: str, partial: str, axes: dict[str, str]) -> jax.Array:
    return all_reduce(f"N B {partial} -> N B", x[0], **axes)


def largest(x: jax.Array, split: str, partial: str, axes: dict[str, str]) -> jax.Array:
    return all_reduce_max(f"N B {partial} -> N B", x[0], **axes)


def index(x: jax.Array, split: str, partial: str, axes: dict[str, str]) -> jax.Array:
    return x[:, 0, 0].astype(jnp.int32) * 0 + block_index(f"N{split}", **axes)


# The operation, what device i must hold as a function of the list of blocks, and whether what
# the devices hold together is split over the axes.
OPERATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any], bool]] = {
    "all_gather": (gather, lambda blocks, i: blocks, False),
    "reduce_scatter": (
        scatter,
        lambda blocks, i: np.split(blocks.sum(axis=0), len(blocks))[i],
        True,
    ),
    "all_reduce": (total, lambda blocks, i: blocks.sum(axis=0), False),
    "all_reduce_max": (largest, lambda blocks, i: blocks.max(axis=0), False),
    "block_index": (index, lambda blocks, i: np.array([i]), True),
}


@cache
def results(sizes: tuple[int, int, int]) -> dict[tuple[str, tuple[str, ...]], jax.Array]:
    """Run every operation over every choice of axes, in one program."""
    mesh = mesh_of(sizes)
    runs = {}
    for (name, (operation, _, is_split)), axes in product(OPERATIONS.items(), AXES):
        bound = dict(zip(ROLES, axes, strict=False))
        split = "".join(f"/{role}" for role in bound)
        partial = "".join(f"+{role}" for role in bound)

        def body(x, operation=operation, split=split, partial=partial, bound=bound):
            return operation(x, split, partial, bound)

        runs[name, axes] = jax.shard_map(
            body,
            mesh=mesh,
            in_specs=spec(mesh, axes),
            out_specs=spec(mesh, axes) if is_split else PartitionSpec(),
        )
    blocks = {axes: blocks_of(mesh, axes) for axes in AXES}
    return jax.jit(lambda blocks: {key: run(blocks[key[1]]) for key, run in runs.items()})(blocks)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("axes", AXES, ids="-".join)
@pytest.mark.parametrize("sizes", MESHES, ids=name_of)
def test_a_collective_is_its_function_on_the_list_of_blocks(sizes, axes, name):
    mesh = mesh_of(sizes)
    blocks = blocks_of(mesh, axes)
    for shard in results(sizes)[name, axes].addressable_shards:
        place = dict(
            zip(mesh.axis_names, np.argwhere(mesh.devices == shard.device)[0], strict=True)
        )
        i = 0
        for axis in axes:
            i = i * mesh.shape[axis] + place[axis]
        np.testing.assert_array_equal(shard.data, OPERATIONS[name][1](blocks, i))


@pytest.mark.parametrize("sizes", [(1, 2, 3), (1, 4, 2), (2, 2, 2)], ids=name_of)
def test_gathering_the_minor_axis_joins_neighbouring_blocks(sizes):
    mesh = mesh_of(sizes)
    whole = np.arange(rows(mesh) * 3.0).reshape(-1, 3)

    def body(x):
        return all_gather("N/a/b B -> N/a B", x, a="x", b="y")

    run = jax.shard_map(
        body, mesh=mesh, in_specs=spec(mesh, ("x", "y")), out_specs=spec(mesh, ("x",))
    )
    got = jax.jit(run)(whole)
    np.testing.assert_array_equal(got, whole)
    assert {s.data.shape[0] for s in got.addressable_shards} == {len(whole) // sizes[1]}


AXES_2D = {"g": "x", "s": "y", "d": "data"}
SPLIT = PartitionSpec("x", "data")  # O/g B/d on the mesh (2, 2, 2)

LIES: dict[str, tuple[Callable[..., Any], str, tuple[PartitionSpec, ...], str]] = {
    "rank mismatch": (all_gather, "O/g -> O", (SPLIT,), "ranks differ"),
    "rank mismatch in an einsum": (einsum, "O/g, O/g B/d -> B/d +g", (SPLIT, SPLIT), "ranks"),
    "unbound role": (all_gather, "O/q B/d -> O B/d", (SPLIT,), "['q']"),
    "unbound role in the result": (
        reduce_scatter,
        "O B/d +g+q -> O/g/q B/d",
        (PartitionSpec(None, "data"),),
        "['q']",
    ),
    "axis that is not named": (all_gather, "O/g B -> O B", (SPLIT,), "['data', 'x']"),
    "axis that is named and does not split": (
        all_gather,
        "O/g/s B/d -> O/g B/d",
        (SPLIT,),
        "['data', 'x', 'y']",
    ),
    "partial sum of what is equal": (all_reduce, "O/g B/d +s -> O/g B/d", (SPLIT,), "'y'"),
    "maximum of what is equal": (all_reduce_max, "O/g B/d +s -> O/g B/d", (SPLIT,), "'y'"),
    "operand of an einsum split otherwise": (
        einsum,
        "O/s B/d, O/s B/d -> B/d +s",
        (SPLIT, SPLIT),
        "['data', 'y']",
    ),
    "too few operands": (einsum, "O/g B/d, O/g B/d -> B/d +g", (SPLIT,), "2 operands"),
    "too many operands": (einsum, "O/g B/d -> B/d +g", (SPLIT, SPLIT), "1 operands"),
    "indivisible reduce-scatter": (reduce_scatter, "O B/d +g -> O B/d/g", (SPLIT,), "multiple"),
}


@pytest.mark.parametrize(("operation", "text", "specs", "reason"), LIES.values(), ids=LIES)
def test_a_signature_that_does_not_describe_its_array_is_refused(operation, text, specs, reason):
    # Local blocks are [3, 5]: no axis of size 2 divides them.
    def body(*blocks):
        operation(text, *blocks, **AXES_2D)
        return 0.0

    arrays = [np.ones((3 * 2 if s[0] else 3, 5 * 2)) for s in specs]
    run = jax.shard_map(body, mesh=mesh_of((2, 2, 2)), in_specs=specs, out_specs=PartitionSpec())
    with pytest.raises(LayoutError) as refusal:
        jax.eval_shape(run, *arrays)
    assert f'"{text}"' in str(refusal.value)
    assert reason in str(refusal.value)


SOURCES = sorted(Path(tpmlp.__file__).parent.rglob("*.py"))
COLLECTIVES = frozenset(
    [
        "psum",
        "pmax",
        "pmin",
        "pmean",
        "psum_scatter",
        "all_gather",
        "all_to_all",
        "ppermute",
        "pshuffle",
        "pbroadcast",
        "all_gather_invariant",
        "ragged_all_to_all",
        "psum_invariant",
    ]
)


def calls(path: Path) -> list[tuple[str, str, ast.Call]]:
    """Return (what it is called on, name, call) of every call in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found.append(("", node.func.id, node))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            found.append((ast.unparse(node.func.value), node.func.attr, node))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_goes_round_the_checked_operations(path):
    for owner, name, call in calls(path):
        where = f"{path.name}:{call.lineno}"
        for keyword in call.keywords:
            assert keyword.arg not in ("check_vma", "check_rep"), f"{where} switches checks off"
        if path.name != "collectives.py":
            on_lax = owner.split(".")[-1] == "lax" or name.startswith("p")
            assert not (name in COLLECTIVES and on_lax), f"{where} calls {owner}.{name}"
        if path.name != "mesh.py":
            makes_mesh = name in ("Mesh", "AbstractMesh") or (owner, name) == ("jax", "make_mesh")
            assert not makes_mesh, f"{where} makes a mesh"
        if path.name != "xla.py":
            assert name != "bitcast_convert_type", f"{where} loses the tangent: use xla.on_bits"


TANGENTS: dict[str, tuple[Callable[..., Any], PartitionSpec]] = {
    "all_gather": (lambda x: all_gather("N/a B -> N B", x, a="x"), PartitionSpec()),
    "shift": (lambda x: shift("N/a B", x, "a", 1, a="x"), PartitionSpec("x")),
    "reduce_scatter": (
        lambda x: reduce_scatter("N B +a -> N/a B", x, a="x"),
        PartitionSpec("x"),
    ),
    "all_reduce": (lambda x: all_reduce("N B +a -> N B", x, a="x"), PartitionSpec()),
}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", TANGENTS)
def test_a_tangent_goes_the_way_of_its_array(name, dtype):
    operation, out = TANGENTS[name]
    mesh = mesh_of((1, 4, 1))
    run = jax.shard_map(operation, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=out)
    x = jnp.arange(32.0).reshape(16, 2).astype(dtype)
    _, tangent = jax.jit(lambda x, dx: jax.jvp(run, (x,), (dx,)))(x, x + 1)
    np.testing.assert_array_equal(tangent, run(x + 1))
