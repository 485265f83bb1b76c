"""One dense layer, forward and backward, on every mesh under both choices of roles.

z alone fails: the forward product, its reduce-scatter or the bias. dW alone: the product g h^T or
its sum over data. db alone: the sum over the batch. dh alone: W^T g or its reduce-scatter. On some
meshes only: the collectives of that axis (tests/test_collectives.py says more).
"""

from functools import cache

import jax
import numpy as np
import pytest

from conftest import MESHES
from tests.cases import Sizes, mesh_of, name_of, relative_error
from tests.tolerances import FLOAT64
from tpmlp.kernels import dense
from tpmlp.layout import padded, partition_spec

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


@cache
def layer(sizes: Sizes, roles: str, dtype: str) -> dict[str, np.ndarray]:
    """Run the kernel forward and backward."""
    mesh, axes = mesh_of(sizes), ROLES[roles]
    specs = {name: partition_spec(layout, mesh, axes) for name, layout in LAYOUTS.items()}

    def body(W, b, h, g):
        return dense.forward(W, b, h, **axes), *dense.backward(W, h, g, **axes)

    run = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=tuple(specs[name] for name in "Wbhg"),
        out_specs=tuple(specs[name] for name in TENSORS),
    )
    results = jax.jit(run)(*operands(sizes[1] * sizes[2], dtype).values())
    return dict(zip(TENSORS, map(np.asarray, results), strict=True))


def by_numpy(sizes: Sizes, dtype: str) -> dict[str, np.ndarray]:
    """Compute the same with NumPy: four lines of mathematics."""
    W, b, h, g = operands(sizes[1] * sizes[2], dtype).values()
    return {"z": W @ h + b[:, None], "dW": g @ h.T, "db": g.sum(axis=1), "dh": W.T @ g}


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("roles", ROLES)
@pytest.mark.parametrize("sizes", MESHES, ids=name_of)
def test_float64_tensor_equals_numpy(sizes, roles, tensor):
    got = layer(sizes, roles, "float64")[tensor]
    assert relative_error(got, by_numpy(sizes, "float64")[tensor]) <= FLOAT64


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("roles", ROLES)
@pytest.mark.parametrize("sizes", MESHES, ids=name_of)
def test_integer_tensor_equals_numpy_bit_for_bit(sizes, roles, tensor):
    got = layer(sizes, roles, "float32")[tensor]
    np.testing.assert_array_equal(got, by_numpy(sizes, "float32")[tensor])


@pytest.mark.parametrize("roles", ROLES)
def test_each_device_holds_its_share_of_every_tensor(roles):
    mesh, axes = mesh_of((2, 2, 2)), ROLES[roles]
    held = []

    def body(W, b, h, g):
        z = dense.forward(W, b, h, **axes)
        dW, db, dh = dense.backward(W, h, g, **axes)
        held.extend([z.shape, dW.shape, db.shape, dh.shape])
        return z

    specs = {name: partition_spec(layout, mesh, axes) for name, layout in LAYOUTS.items()}
    in_specs = tuple(specs[name] for name in "Wbhg")
    run = jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=specs["z"])
    jax.eval_shape(run, *operands(4, "float64").values())
    assert held == [(O // 4, B // 2), (O // 2, I // 2), (O // 4,), (I // 4, B // 2)]
