"""One dense layer, forward and backward, on every mesh under both choices of roles.

Plain, as rings in one and in both directions, and in blocks: the same claims for each.

z alone fails: the forward product, its reduce-scatter or the bias. dW alone: the product g h^T or
its sum over data. db alone: the sum over the batch. dh alone: W^T g or its reduce-scatter. On some
meshes only: the collectives of that axis (tests/test_collectives.py says more).
"""

from functools import cache, partial
from typing import Any

import jax
import numpy as np
import pytest

import tpmlp
from conftest import MESHES
from tests.cases import Sizes, mesh_of, name_of, relative_error
from tests.tolerances import FLOAT64
from tpmlp.kernels import dense, invariant, ring
from tpmlp.kernels.cost import NUM_PIECES
from tpmlp.kernels.execution import Execution, execution
from tpmlp.layout import padded, partition_spec
from tpmlp.placement import place

I, O, B = 20, 12, 16
ROLES = {
    "gather-x": {"g": "x", "s": "y", "d": "data"},
    "gather-y": {"g": "y", "s": "x", "d": "data"},
}
TENSORS = ("z", "dW", "db", "dh")
LAYOUTS = {
    "W": "O/g I/s",
    "b": "O/g/s",
    "h": "I/s/g B/d",
    "g": "O/g/s B/d",
    "z": "O/g/s B/d",
    "dW": "O/g I/s",
    "db": "O/g/s",
    "dh": "I/s/g B/d",
}


@cache
def operands(num_blocks: int, dtype: str) -> dict[str, np.ndarray]:
    """Return W, b, h, g at widths that num_blocks divides, in float64 or as small integers."""
    rng = np.random.default_rng(3)
    i, o = padded(I, num_blocks), padded(O, num_blocks)
    shapes = {"W": (o, i), "b": (o,), "h": (i, B), "g": (o, B)}
    if dtype == "float32":
        return {name: rng.integers(-4, 5, s).astype(dtype) for name, s in shapes.items()}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (dense, {}),
    "ring": (ring, {"overlap": "ring"}),
    "bidirectional_ring": (ring, {"overlap": "bidirectional_ring"}),
    "invariant": (invariant, {"reduction": "invariant"}),
}
ON_MESHES = [
    *((kernel, sizes) for kernel in ("plain", "ring") for sizes in MESHES),
    *(("invariant", sizes) for sizes in MESHES if all(8 % size == 0 for size in sizes)),
]


def choices(sizes: Sizes, kernel: str, dtype: str) -> Execution:
    """Return the kernel's choices for a strategy that means it."""
    placement = place((I, O), mesh_of(sizes), tpmlp.Strategy(**KERNELS[kernel][1]))
    return execution(placement, np.dtype(dtype))


def num_blocks(sizes: Sizes, kernel: str) -> int:
    """Return what widths are padded to multiples of."""
    return NUM_PIECES if kernel == "invariant" else sizes[1] * sizes[2]


def passes(W, b, h, g, *, kernel: str, run: Execution, axes: dict[str, str]):
    """Run one layer forward and backward on local blocks; return the tensors of TENSORS."""
    layer, _ = KERNELS[kernel]
    h, g_all = layer.gather_input(h, run, **axes), layer.gather_gradient(g, run, **axes)
    dW, db = layer.backward_weight(g_all, h, run, **axes), layer.backward_bias(g, **axes)
    return (
        layer.forward(W, b, h, run, **axes),
        layer.reduce_weight(dW, run, **axes),
        layer.reduce_bias(db, run, **axes),
        layer.backward_input(W, g_all, run, **axes),
    )


@cache
def layer(sizes: Sizes, roles: str, dtype: str, kernel: str) -> dict[str, np.ndarray]:
    """Run the kernel forward and backward."""
    mesh, axes = mesh_of(sizes), ROLES[roles]
    specs = {name: partition_spec(layout, mesh, axes) for name, layout in LAYOUTS.items()}
    body = partial(passes, kernel=kernel, run=choices(sizes, kernel, dtype), axes=axes)
    run = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=tuple(specs[name] for name in "Wbhg"),
        out_specs=tuple(specs[name] for name in TENSORS),
    )
    results = jax.jit(run)(*operands(num_blocks(sizes, kernel), dtype).values())
    return dict(zip(TENSORS, map(np.asarray, results), strict=True))


def by_numpy(sizes: Sizes, dtype: str, kernel: str) -> dict[str, np.ndarray]:
    """Compute the same with NumPy: four lines of mathematics."""
    W, b, h, g = operands(num_blocks(sizes, kernel), dtype).values()
    return {"z": W @ h + b[:, None], "dW": g @ h.T, "db": g.sum(axis=1), "dh": W.T @ g}


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("roles", ROLES)
@pytest.mark.parametrize(("kernel", "sizes"), ON_MESHES, ids=name_of)
def test_float64_tensor_equals_numpy(kernel, sizes, roles, tensor):
    got = layer(sizes, roles, "float64", kernel)[tensor]
    assert relative_error(got, by_numpy(sizes, "float64", kernel)[tensor]) <= FLOAT64


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("roles", ROLES)
@pytest.mark.parametrize("sizes", MESHES, ids=name_of)
@pytest.mark.parametrize("kernel", ["plain", "bidirectional_ring"])
def test_integer_tensor_equals_numpy_bit_for_bit(kernel, sizes, roles, tensor):
    got = layer(sizes, roles, "float32", kernel)[tensor]
    np.testing.assert_array_equal(got, by_numpy(sizes, "float32", kernel)[tensor])


@pytest.mark.parametrize("kernel", ["plain", "ring"])
@pytest.mark.parametrize("roles", ROLES)
def test_each_device_holds_its_share_of_every_tensor(roles, kernel):
    sizes = (2, 2, 2)
    mesh, axes = mesh_of(sizes), ROLES[roles]
    held = []

    def body(W, b, h, g):
        tensors = passes(
            W, b, h, g, kernel=kernel, run=choices(sizes, kernel, "float64"), axes=axes
        )
        held.extend(tensor.shape for tensor in tensors)
        return tensors[0]

    specs = {name: partition_spec(layout, mesh, axes) for name, layout in LAYOUTS.items()}
    in_specs = tuple(specs[name] for name in "Wbhg")
    run = jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=specs["z"])
    jax.eval_shape(run, *operands(4, "float64").values())
    assert held == [(O // 4, B // 2), (O // 2, I // 2), (O // 4,), (I // 4, B // 2)]
