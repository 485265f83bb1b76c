"""The preflight: every collective on the mesh that is to train, with numbers whose sums are exact.

A backend that sums wrongly gives no error, only a model that learns less. Here each collective of
tpmlp.collectives runs over each axis that has more than one device, and over the axes that the
kernel sums over together, in float32 and bfloat16, on arrays from one number a device to 16 MiB:
backends change their algorithm with the size. The numbers are integers that both types hold, so a
right result is equal bit for bit, whatever the order of its sums. What is right is told by the
host, so that the devices' own arithmetic and the compiler have no part in it.

Over p devices, with integers u, element i of device a is

    to gather and to shift   block a of u
    to sum                   2 u_i where i % p == a, and u_i where (i + 1) % p == a; the sum is 3 u.
                             A device left out, counted twice or mistaken for another shows in any
                             p elements. Trees, which are there for p a power of 2, sum the same.
    for the maximum          u_i + 1 where i % p == a, else u_i; the maximum is u + 1
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpmlp import collectives

KIB, MIB = 2**10, 2**20

# Of an array before it is split, or after it is gathered; 0 is one number a device.
SIZES_BYTES = {"float32": (0, 64 * KIB, 16 * MIB), "bfloat16": (0, 64 * KIB, 4 * MIB)}

# Between processes large arrays go several times: a fault may come and go. In JAX 0.10.2 gloo's
# reduce-scatter was wrong in 8 of 640 chunks of 2 to 16 MiB, in none of 480 smaller (jax#40830).
_ROUNDS = 3

# In both directions: a device's two results are one array.
_SHIFTS = (1, -1)

# 3 u is exact: integers to 2^24 in float32, to 2^8 in bfloat16.
_LARGEST = {"float32": 2**22, "bfloat16": 2**6}

# In the order in which a fault is told: a sum in a tree after what it moves by.
_NAMES = (
    "all_gather",
    "reduce_scatter",
    "all_reduce",
    "all_reduce_max",
    "reduce_scatter_in_tree",
    "all_reduce_in_tree",
    "shift",
    "turn",
    "turn_in_group",
)


class Case(NamedTuple):
    """One program: all collectives over axes, on arrays of one type and size."""

    axes: tuple[str, ...]
    num_blocks: int
    dtype: str
    size_bytes: int


class Held(NamedTuple):
    """What devices hold: to gather and to shift, to sum, and for the maximum."""

    own: jax.Array
    terms: jax.Array
    high: jax.Array


class Wrong(NamedTuple):
    """A wrong result: the index of its case, collective and device, which orders them."""

    case: int
    collective: int
    device: int
    num_elements: int


def check_collectives(mesh: Mesh, largest_bytes: int | None = None) -> None:
    """Run every collective on a mesh and compare it with its definition.

    With many processes all of them call it, and each raises what any of them has found. A fault
    that comes and goes may not come while this runs.

    Args:
        mesh: the mesh.
        largest_bytes: the largest array to try; those of SIZES_BYTES by default.

    Raises:
        RuntimeError: a collective gives wrong numbers; names it, the axes, the type, the size and
            the first device on which they are wrong.
    """
    cases = list(dict.fromkeys(_cases(mesh, largest_bytes)))
    results = (wrong for k, case in enumerate(cases) for wrong in _run(mesh, k, case))
    if mesh.is_multi_process:
        # Every process runs all cases: one that stopped at its own would leave others waiting.
        found = list(results)
        first = min(found + _read_elsewhere(mesh, len(cases), found), default=None)
    else:
        first = next(results, None)
    if first is not None:
        raise RuntimeError(_message(mesh, cases, first))


@lru_cache(maxsize=16)
def check_collectives_once(mesh: Mesh, largest_bytes: int | None = None) -> None:
    """As `check_collectives`, but nothing for what has passed before."""
    check_collectives(mesh, largest_bytes)


def _cases(mesh: Mesh, largest_bytes: int | None) -> Iterator[Case]:
    """Give the cases, small ones first."""
    live = [axis for axis in mesh.axis_names if mesh.shape[axis] > 1]
    together = [tuple(a for a in axes if a in live) for axes in (("x", "y"), ("data", "x", "y"))]
    groups = dict.fromkeys([*((axis,) for axis in live), *(g for g in together if g)])
    for step in range(3):
        for axes, (dtype, sizes) in product(groups, SIZES_BYTES.items()):
            num_blocks = prod(mesh.shape[axis] for axis in axes)
            unit = num_blocks * jnp.dtype(dtype).itemsize
            size = sizes[step] if largest_bytes is None else min(sizes[step], largest_bytes)
            yield Case(axes, num_blocks, dtype, max(1, size // unit) * unit)


def _run(mesh: Mesh, k: int, case: Case) -> list[Wrong]:
    """Run one case and return what is wrong on this process's devices."""
    devices = {device: d for d, device in enumerate(mesh.devices.flat)}
    run, (held, right) = _collect(mesh, case), _numbers(mesh, case)
    return [
        Wrong(k, _NAMES.index(name), devices[shard.device], n)
        for _ in range(_ROUNDS if mesh.is_multi_process and case.size_bytes >= MIB else 1)
        for name, got in run(held).items()
        for shard in got.addressable_shards
        if (n := _count_different(np.asarray(shard.data), right[name][shard.index]))
    ]


def _numbers(mesh: Mesh, case: Case) -> tuple[Held, dict[str, np.ndarray]]:
    """Return what devices hold, and the whole results."""
    p, dtype, limit = case.num_blocks, jnp.dtype(case.dtype), _LARGEST[case.dtype]
    size = case.size_bytes // dtype.itemsize
    u = np.random.default_rng(0).integers(-limit, limit + 1, size, dtype=np.int32)
    blocks, one = u.reshape(p, -1), np.eye(p, dtype=np.int32)

    def repeated(turn: np.ndarray) -> np.ndarray:
        return np.tile(turn, size // p)

    held = Held(
        own=_place(mesh, case, lambda a: blocks[a]),
        terms=_place(mesh, case, lambda a: u * repeated(2 * one[a] + one[a - 1])),
        high=_place(mesh, case, lambda a: u + repeated(one[a])),
    )
    shifted = np.hstack([np.roll(blocks, -by, axis=0) for by in _SHIFTS]).reshape(-1)
    results = (u, 3 * u, 3 * u, u + 1, 3 * u, 3 * u[: size // p], shifted, u, u)
    return held, {name: a.astype(dtype) for name, a in zip(_NAMES, results, strict=True)}


def _place(mesh: Mesh, case: Case, hold: Callable[[int], np.ndarray]) -> jax.Array:
    """Put on each device what its index along the axes holds, made once for those that share it."""
    split = NamedSharding(mesh, PartitionSpec(case.axes))
    once = lru_cache(maxsize=None)(lambda a: hold(a).astype(case.dtype))
    size = once(0).size

    def block(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        return once(index[0].start // size)

    return jax.make_array_from_callback((case.num_blocks * size,), split, block)


def _count_different(got: np.ndarray, right: np.ndarray) -> int:
    bits = f"u{right.dtype.itemsize}"
    return int(np.count_nonzero(got.view(bits) != right.view(bits)))


def _collect(mesh: Mesh, case: Case) -> Callable[[Held], dict[str, jax.Array]]:
    """Return the program that runs all collectives there are for a case."""
    runs, blocks = _runs(case), PartitionSpec(case.axes)

    def collect(held: Held) -> dict[str, jax.Array]:
        return {name: run(held) for name, (run, _) in runs.items()}

    out_specs = {name: spec for name, (_, spec) in runs.items()}
    return jax.jit(jax.shard_map(collect, mesh=mesh, in_specs=blocks, out_specs=out_specs))


def _runs(case: Case) -> dict[str, tuple[Callable[[Held], jax.Array], PartitionSpec]]:
    """Return the collectives there are for a case, and how their results are split."""
    roles = dict(zip("abc", case.axes, strict=False))
    split, partial = ("".join(mark + role for role in roles) for mark in "/+")
    gather, scatter, reduce = f"A{split} -> A", f"A {partial} -> A{split}", f"A {partial} -> A"
    whole, blocks = PartitionSpec(), PartitionSpec(case.axes)
    turned = PartitionSpec(case.axes[::-1])

    def all_reduce_in_tree(held: Held) -> jax.Array:
        # It gathers all terms: of 1/p of each, that is an array of the case's size.
        few = held.terms[: held.own.size]
        return collectives.all_reduce_in_tree(reduce, few, **roles)

    def shift(held: Held) -> jax.Array:
        steps = (collectives.shift("A/a", held.own, "a", by, **roles) for by in _SHIFTS)
        return jnp.concatenate(list(steps))

    runs = {
        "all_gather": (lambda h: collectives.all_gather(gather, h.own, **roles), whole),
        "reduce_scatter": (lambda h: collectives.reduce_scatter(scatter, h.terms, **roles), blocks),
        "all_reduce": (lambda h: collectives.all_reduce(reduce, h.terms, **roles), whole),
        "all_reduce_max": (lambda h: collectives.all_reduce_max(reduce, h.high, **roles), whole),
        "reduce_scatter_in_tree": (
            lambda h: collectives.reduce_scatter_in_tree(scatter, h.terms, **roles),
            blocks,
        ),
        "all_reduce_in_tree": (all_reduce_in_tree, whole),
        "shift": (shift, blocks),
        "turn": (lambda h: collectives.turn("A/a/b -> A/b/a", h.own, **roles), turned),
        "turn_in_group": (
            lambda h: collectives.turn_in_group("A/a/b -> A/b/a", h.own, **roles),
            turned,
        ),
    }
    if case.num_blocks.bit_count() > 1:
        del runs["reduce_scatter_in_tree"], runs["all_reduce_in_tree"]
    if len(case.axes) > 1:
        del runs["shift"]
    if len(case.axes) != 2:
        del runs["turn"], runs["turn_in_group"]
    return runs


def _read_elsewhere(mesh: Mesh, num_cases: int, found: list[Wrong]) -> list[Wrong]:
    """Return what any process has found, as far as a gather of their counts can be trusted.

    So that all stop together; a process whose own devices were wrong stops in any case.
    """
    table = np.zeros((mesh.size, num_cases, len(_NAMES)), np.int32)
    for k, c, device, n in found:
        table[device, k, c] = n
    split, everywhere = (
        NamedSharding(mesh, PartitionSpec(names)) for names in (mesh.axis_names, None)
    )
    placed = jax.make_array_from_callback(table.shape, split, lambda index: table[index])
    table = np.asarray(jax.jit(lambda counts: counts, out_shardings=everywhere)(placed))
    places = np.argwhere(table > 0).tolist()
    return [Wrong(k, c, device, int(table[device, k, c])) for device, k, c in places]


def _message(mesh: Mesh, cases: list[Case], wrong: Wrong) -> str:
    case, device = cases[wrong.case], mesh.devices.flat[wrong.device]
    return (
        f"{_NAMES[wrong.collective]} over mesh axis {', '.join(case.axes)} must give the numbers "
        f"of its definition: got {wrong.num_elements} wrong ones of {case.dtype} in an array of "
        f"{case.size_bytes} bytes, first on device {device} of process {device.process_index}, "
        f"mesh={dict(mesh.shape)}. Do not train on this mesh; check that device and its links, "
        "and the versions of JAX and its plugin."
    )
