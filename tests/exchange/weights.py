"""What the tests of both formats share: a small model, its arrays, and how results are compared."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import tpmlp
from tests.cases import mesh_of, strategy_of

MODEL = tpmlp.MLP((3, 4, 2))
UNBIASED = tpmlp.MLP((3, 4, 2), bias=False)
RNG = np.random.default_rng(0)
NUMBERS = [(RNG.normal(size=shape), RNG.normal(size=shape[0])) for shape in MODEL.layer_shapes]
# From a file written on one to parameters on the other.
START, END = ((2, 2, 2), "row-column"), ((1, 3, 1), "row")
DTYPES = ("float32", "bfloat16", "float64")


def arrays(dtype: Any = "float32", *, bias: bool = True) -> Any:
    """Return the model's arrays."""
    dtype = jax.numpy.dtype(dtype)
    return [(W.astype(dtype), b.astype(dtype) if bias else None) for W, b in NUMBERS]


def placed(model: tpmlp.MLP, dtype: Any = "float32") -> Any:
    """Return the arrays on the mesh to start from."""
    strategy = strategy_of(START[1], 2)
    numbers = arrays(dtype, bias=model.bias)
    return tpmlp.from_numpy(model, numbers, mesh_of(START[0]), strategy=strategy)


def loaded(load: Callable[..., Any], model: tpmlp.MLP, path: Any) -> Any:
    """Return what a function reads onto the other mesh, at logical widths."""
    strategy = strategy_of(END[1], 2)
    return tpmlp.to_numpy(model, load(model, path, mesh_of(END[0]), strategy=strategy))


def converted(numbers: Any, dtype: Any) -> Any:
    """Return arrays in another dtype."""
    return [tuple(a.astype(dtype) for a in layer) for layer in numbers]


def same_bits(got: Any, wanted: Any) -> bool:
    """Return whether arrays are equal in shape, dtype and every bit."""
    pairs = [pair for layers in zip(got, wanted, strict=True) for pair in zip(*layers, strict=True)]
    return all(
        a is b or (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())
        for a, b in pairs
    )
