"""Parameters: logical arrays in and out, from mesh to mesh, and what is refused.

Parameters are a tuple of layers (W_l, b_l), l at index l - 1: JAX arrays split over the mesh and
padded with zeros to widths that the mesh divides. Gradients have the same structure.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from math import lcm
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpmlp.kernels.cost import NUM_PIECES
from tpmlp.layout import padded
from tpmlp.model import MLP, Params, param_shardings
from tpmlp.placement import Placement, place
from tpmlp.strategy import Strategy

Arrays = list[tuple[np.ndarray, np.ndarray | None]]


def to_numpy(model: MLP, params: Params) -> Arrays:
    """Return parameters, or gradients, at logical widths; with many processes all call it.

    Args:
        model: the model.
        params: padded arrays in the structure of the parameters, on any mesh.

    Returns:
        A list of (W_l [d_l, d_{l-1}], b_l [d_l] or None).

    Raises:
        ValueError: parameters of another model, or arrays that no mesh has.
    """
    _check_padded(model, params)
    return [
        (_on_host(W)[:d_out, :d_in], None if b is None else _on_host(b)[:d_out])
        for (W, b), (d_out, d_in) in zip(params, model.layer_shapes, strict=True)
    ]


def from_numpy(
    model: MLP, arrays: Sequence[Any], mesh: Mesh, *, strategy: Strategy | None = None
) -> Params:
    """Pad arrays of logical widths and place them.

    Args:
        model: the model.
        arrays: a list of (W_l [d_l, d_{l-1}], b_l [d_l] or None), as `to_numpy` gives.
        mesh: the mesh.
        strategy: Strategy() by default.

    Raises:
        ValueError: another number of layers, another shape, a dtype that is not floating.
    """
    check_structure(model, arrays)
    placement = place(model.widths, mesh, strategy)

    def put(name: str, array: Any, shape: tuple[int, ...], whole: Any, sharding: Any) -> Any:
        array = np.asarray(array)
        if array.shape != shape or not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{name} must be floating point of shape {shape}: got shape {array.shape}, dtype "
                f"{array.dtype}. W_l is [d_l, d_l-1], b_l is [d_l]."
            )
        fill = [(0, n - m) for m, n in zip(shape, whole, strict=True)]
        return jax.device_put(np.pad(array, fill), sharding)

    layers, shardings = [], param_shardings(model, placement)
    for l, ((W, b), logical) in enumerate(zip(arrays, model.layer_shapes, strict=True), 1):
        W_whole, b_whole = placement.layer_shapes(l)
        W = put(f"W_{l}", W, logical, W_whole, shardings[l - 1][0])
        if b is not None:
            b = put(f"b_{l}", b, logical[:1], b_whole, shardings[l - 1][1])
        layers.append((W, b))
    return tuple(layers)


def reshard(model: MLP, params: Params, mesh: Mesh, *, strategy: Strategy | None = None) -> Params:
    """Move parameters, or gradients, to another mesh or layout.

    Between meshes of the same devices, in the same order, blocks go from device to device. To
    other devices they go through the host, one array at a time. Where the padding differs they
    pass through a width that both meshes divide.

    Args:
        model: the model.
        params: placed on any mesh, for any layout.
        mesh: the mesh to go to.
        strategy: the strategy to go to; Strategy() by default.

    Raises:
        ValueError: parameters of another model, or arrays that no mesh has.
    """
    _check_padded(model, params)
    placement = place(model.widths, mesh, strategy)
    target = param_shardings(model, placement)
    moved = []
    for l, (layer, shardings) in enumerate(zip(params, target, strict=True), 1):
        logical = model.layer_shapes[l - 1]
        shapes = placement.layer_shapes(l)
        moved.append(
            tuple(
                None if array is None else _move(array, logical[: array.ndim], shape, sharding)
                for array, shape, sharding in zip(layer, shapes, shardings, strict=True)
            )
        )
    return tuple(moved)


def logical_layers(model: MLP, params: Params) -> Params:
    """Return traced or placed parameters without their padding."""
    return tuple(
        (W[:d_out, :d_in], None if b is None else b[:d_out])
        for (W, b), (d_out, d_in) in zip(params, model.layer_shapes, strict=True)
    )


def clear_padding(model: MLP, params: Params) -> Params:
    """Return traced or placed parameters with 0 for whatever their padding holds."""

    def clear(array: jax.Array, logical: tuple[int, ...]) -> jax.Array:
        for dim, width in enumerate(logical):
            if width < array.shape[dim]:
                index = jax.lax.broadcasted_iota(jnp.int32, array.shape, dim)
                array = jnp.where(index < width, array, 0)
        return array

    return tuple(
        (clear(W, logical), None if b is None else clear(b, logical[:1]))
        for (W, b), logical in zip(params, model.layer_shapes, strict=True)
    )


def check_structure(model: MLP, params: Any) -> None:
    """Refuse what is not one (W, b) a layer, with biases where the model has them."""
    pairs = isinstance(params, tuple | list) and all(
        isinstance(layer, tuple | list) and len(layer) == 2 for layer in params
    )
    if not pairs or len(params) != model.num_layers:
        got = f"{len(params)} layers" if pairs else type(params).__name__
        raise ValueError(
            f"params must be one (W, b) for each of num_layers={model.num_layers}: got {got}. "
            "They belong to another model; make them with model.init or tpmlp.from_numpy."
        )
    for l, (_, b) in enumerate(params, 1):
        if (b is None) == model.bias:
            raise ValueError(
                f"params of layer {l} must have b {'an array' if model.bias else 'None'} for "
                f"bias={model.bias}: got b={'None' if b is None else 'an array'}. They belong to "
                "another model."
            )


def _check_padded(model: MLP, params: Any) -> None:
    """Refuse what is not a model's parameters, padded for the mesh that they are on."""
    check_structure(model, params)
    for l, (layer, logical) in enumerate(zip(params, model.layer_shapes, strict=True), 1):
        for name, array in zip((f"W_{l}", f"b_{l}"), layer, strict=True):
            if array is None:
                continue
            if not isinstance(getattr(array, "sharding", None), NamedSharding):
                placed = getattr(array, "sharding", type(array).__name__)
                raise ValueError(
                    f"{name} must be a JAX array placed on a mesh: got {placed}. Place arrays of "
                    "logical widths with tpmlp.from_numpy."
                )
            sizes = array.sharding.mesh.shape
            num_blocks = sizes.get("x", 1) * sizes.get("y", 1)
            # Strategies that split parameters over data pad for that axis too; an invariant
            # reduction pads alike on all meshes.
            shapes = [
                tuple(padded(n, blocks) for n in logical[: array.ndim])
                for blocks in (num_blocks, num_blocks * sizes.get("data", 1), NUM_PIECES)
            ]
            if array.shape not in shapes:
                raise ValueError(
                    f"{name} must have the padded shape {shapes[0]} on its mesh: got "
                    f"{array.shape}, widths={model.widths}. These are the parameters of another "
                    "model."
                )


def check_params(model: MLP, params: Any, placement: Placement) -> Params:
    """Return the parameters as tuples; refuse those of another model, mesh or layout.

    Of traced ones, only shapes are checked.

    Raises:
        ValueError: names the layer, what it is and what it must be.
    """
    check_structure(model, params)
    params = tuple(tuple(layer) for layer in params)
    if not any(isinstance(array, Tracer) for layer in params for array in layer):
        _check_padded(model, params)
    shardings = param_shardings(model, placement)
    for l, (layer, wanted) in enumerate(zip(params, shardings, strict=True), 1):
        for name, array, shape, sharding in zip(
            (f"W_{l}", f"b_{l}"), layer, placement.layer_shapes(l), wanted, strict=True
        ):
            if array is not None:
                _check_param(name, array, shape, sharding)
    return params


def _check_param(name: str, array: Any, shape: tuple[int, ...], sharding: NamedSharding) -> None:
    way_out = (
        "Parameters for another mesh or layout are moved by tpmlp.reshard(model, params, mesh, "
        "strategy=...); NumPy arrays are placed by tpmlp.from_numpy."
    )
    if not isinstance(array, jax.Array | jax.ShapeDtypeStruct):
        raise ValueError(f"{name} must be a JAX array: got {type(array).__name__}. {way_out}")
    if array.shape != shape:
        raise ValueError(
            f"{name} must have the padded shape {shape} on this mesh: got {array.shape}. {way_out}"
        )
    traced = isinstance(array, Tracer)
    if not traced and not array.sharding.is_equivalent_to(sharding, array.ndim):
        raise ValueError(
            f"{name} must be placed as {sharding.spec} on {dict(sharding.mesh.shape)}: got "
            f"{array.sharding}. {way_out}"
        )


def _on_host(array: jax.Array) -> np.ndarray:
    """Return a whole padded array, also where other processes hold blocks of it."""
    if not array.is_fully_addressable:
        whole: Any = array.sharding
        array = _identity(NamedSharding(whole.mesh, PartitionSpec()))(array)
    return np.asarray(array)


def _move(
    array: jax.Array, logical: tuple[int, ...], shape: tuple[int, ...], sharding: NamedSharding
) -> jax.Array:
    if array.shape == shape:
        return _transfer(array, sharding)
    blocks = lcm(array.sharding.num_devices, sharding.num_devices)
    between = tuple(padded(n, blocks) for n in logical)
    array = _resize(array, logical, between, array.sharding)
    return _resize(_transfer(array, sharding), logical, shape, sharding)


def _transfer(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    if _devices(array.sharding) != _devices(sharding):
        return jax.device_put(array, sharding)
    # device_put would assemble the array on the host; a program moves blocks by collectives.
    return _identity(sharding)(array)


def _devices(sharding: Any) -> list[Any]:
    return sharding.mesh.devices.ravel().tolist()


@lru_cache(maxsize=64)
def _identity(sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda array: array, out_shardings=sharding)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _resize(array: jax.Array, logical: Any, shape: Any, sharding: Any) -> jax.Array:
    cut = array[tuple(slice(n) for n in logical)]
    cut = jnp.pad(cut, [(0, n - m) for m, n in zip(logical, shape, strict=True)])
    return jax.lax.with_sharding_constraint(cut, sharding)
