"""Parameters: logical arrays in and out, from mesh to mesh, and what is refused.

Parameters are JAX arrays split over the mesh and padded with zeros to widths that the mesh divides:
a tuple of layers (W_l, b_l), l at index l - 1, of an MLP; {vertex: {parameter: array}} of a Graph;
where the mesh has stages, what repeats is stacked. Gradients have the same structure.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from math import lcm
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpmlp.kernels.cost import NUM_PIECES
from tpmlp.models import Model
from tpmlp.placement import ParameterSpec
from tpmlp.strategy import Strategy


def to_numpy(model: Model, params: Any) -> Any:
    """Return parameters, or gradients, at logical widths; with many processes all call it.

    Args:
        model: the model.
        params: padded arrays in the structure of the parameters, on any mesh.

    Returns:
        For an MLP a list of (W_l [d_l, d_{l-1}], b_l [d_l] or None), for a Graph a dictionary
        {vertex: {parameter: array}}.

    Raises:
        ValueError: parameters of another model, or arrays that no mesh has.
    """
    params = _check_padded(model, params)
    arrays = jax.tree.map(
        lambda spec, array: spec.logical(_on_host(array)), model.specs(params), params
    )
    arrays = model.unstaged(arrays)
    return list(arrays) if isinstance(arrays, tuple) else arrays


def from_numpy(model: Model, arrays: Any, mesh: Mesh, *, strategy: Strategy | None = None) -> Any:
    """Pad arrays of logical widths and place them.

    Args:
        model: the model.
        arrays: as `to_numpy` gives them.
        mesh: the mesh.
        strategy: Strategy() by default.

    Raises:
        ValueError: another structure, another shape, a dtype that is not floating.
    """
    arrays = model.structured(arrays)
    placement = model.place(mesh, strategy)

    def check(spec: ParameterSpec, array: Any) -> np.ndarray:
        array = np.asarray(array)
        if array.shape != spec.shape or not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{spec.name} must be floating point of shape {spec.shape}: got shape "
                f"{array.shape}, dtype {array.dtype}. W is [outputs, inputs], b is [outputs]."
            )
        return array

    arrays = jax.tree.map(check, model.parameters, arrays)
    arrays = model.staged(arrays, placement)

    def put(spec: ParameterSpec, array: Any, sharding: NamedSharding) -> Any:
        whole = spec.padded(placement.num_blocks)
        fill = [(0, n - m) for m, n in zip(spec.shape, whole, strict=True)]
        return jax.device_put(np.pad(array, fill), sharding)

    return jax.tree.map(put, model.specs(arrays), arrays, model.shardings(placement))


def reshard(model: Model, params: Any, mesh: Mesh, *, strategy: Strategy | None = None) -> Any:
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
    params = _check_padded(model, params)
    placement = model.place(mesh, strategy)
    if _is_staged(model, params) or _is_staged(model, placement):
        return _restage(model, params, placement, mesh, strategy)
    return jax.tree.map(
        lambda spec, array, sharding: _move(array, spec, placement.num_blocks, sharding),
        model.parameters,
        params,
        model.shardings(placement),
    )


def _is_staged(model: Model, of: Any) -> bool:
    """Return whether parameters, or those of a placement, have a structure of stages."""
    return jax.tree.structure(model.specs(of)) != jax.tree.structure(model.parameters)


def _restage(model: Any, params: Any, placement: Any, mesh: Mesh, strategy: Any) -> Any:
    """Move parameters to or from a mesh with stages, or to other stages."""
    if jax.tree.leaves(params)[0].sharding.mesh.devices.tolist() != mesh.devices.tolist():
        return from_numpy(model, to_numpy(model, params), mesh, strategy=strategy)
    return _restaging(model, placement)(params)


@lru_cache(maxsize=16)
def _restaging(model: Any, placement: Any) -> Callable[[Any], Any]:
    def pad(spec: ParameterSpec, array: jax.Array) -> jax.Array:
        whole = spec.padded(placement.num_blocks)
        return jnp.pad(array, [(0, m - n) for n, m in zip(spec.shape, whole, strict=True)])

    def run(params: Any) -> Any:
        arrays = jax.tree.map(pad, model.parameters, logical_params(model, params))
        return model.staged(arrays, placement)

    return jax.jit(run, out_shardings=model.shardings(placement))


def logical_params(model: Model, params: Any) -> Any:
    """Return traced or placed parameters without their padding."""
    arrays = jax.tree.map(lambda spec, array: spec.logical(array), model.specs(params), params)
    return model.unstaged(arrays)


def clear_padding(model: Model, params: Any) -> Any:
    """Return traced or placed parameters with 0 for whatever their padding holds."""

    def clear(spec: ParameterSpec, array: jax.Array) -> jax.Array:
        for dim, width in enumerate(spec.shape):
            if width < array.shape[dim]:
                index = jax.lax.broadcasted_iota(jnp.int32, array.shape, dim)
                array = jnp.where(index < width, array, 0)
        return array

    return jax.tree.map(clear, model.specs(params), params)


def _check_padded(model: Model, params: Any) -> Any:
    """Return a model's parameters, or refuse what is not padded for the mesh that it is on."""
    params = model.structured(params)

    def check(spec: ParameterSpec, array: Any) -> None:
        if not isinstance(getattr(array, "sharding", None), NamedSharding):
            placed = getattr(array, "sharding", type(array).__name__)
            raise ValueError(
                f"{spec.name} must be a JAX array placed on a mesh: got {placed}. Place arrays of "
                "logical widths with tpmlp.from_numpy."
            )
        sizes = array.sharding.mesh.shape
        num_blocks = sizes.get("x", 1) * sizes.get("y", 1) * sizes.get("stage", 1)
        # Strategies that split parameters over data pad for that axis too; an invariant reduction
        # pads alike on all meshes.
        blocks = (num_blocks, num_blocks * sizes.get("data", 1), NUM_PIECES)
        shapes = [spec.padded(num_blocks) for num_blocks in blocks]
        if array.shape not in shapes:
            raise ValueError(
                f"{spec.name} must have the padded shape {shapes[0]} on its mesh: got "
                f"{array.shape}, logical shape {spec.shape}. These are the parameters of another "
                "model."
            )

    jax.tree.map(check, model.specs(params), params)
    return params


def check_params(model: Model, params: Any, placement: Any) -> Any:
    """Return the parameters in their structure; refuse those of another model, mesh or layout.

    Of traced ones, only shapes are checked.

    Raises:
        ValueError: names the array, what it is and what it must be.
    """
    params = model.structured(params)
    _check_stages(model, params, placement)
    if not any(isinstance(array, Tracer) for array in jax.tree.leaves(params)):
        params = _check_padded(model, params)
    jax.tree.map(
        lambda spec, array, sharding: _check_param(spec, array, placement.num_blocks, sharding),
        model.specs(params),
        params,
        model.shardings(placement),
    )
    return params


def _check_stages(model: Model, params: Any, placement: Any) -> None:
    """Refuse parameters of other stages than the mesh's, or of none."""
    structures = [jax.tree.structure(model.specs(of)) for of in (params, placement)]
    if structures[0] != structures[1]:
        stages = [
            f"{of.stages.route.num_stages} stages with {of.stages.route.num_chunks} chunks"
            if _is_staged(model, of)
            else "no stages"
            for of in (params, placement)
        ]
        raise ValueError(
            f"params must be placed for {stages[1]}, as the mesh and the strategy say: got "
            f"parameters of {stages[0]}. Move them by tpmlp.reshard(model, params, mesh, "
            "strategy=...)."
        )


def _check_param(spec: ParameterSpec, array: Any, num_blocks: int, sharding: NamedSharding) -> None:
    name, shape = spec.name, spec.padded(num_blocks)
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
    array: jax.Array, spec: ParameterSpec, num_blocks: int, sharding: NamedSharding
) -> jax.Array:
    shape = spec.padded(num_blocks)
    if array.shape == shape:
        return _transfer(array, sharding)
    between = spec.padded(lcm(array.sharding.num_devices, sharding.num_devices))
    array = _resize(array, spec.shape, between, array.sharding)
    return _resize(_transfer(array, sharding), spec.shape, shape, sharding)


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
