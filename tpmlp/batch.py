"""Batches: samples checked, padded and placed once, between the user and the kernel.

Users have samples as rows. On the devices x is [B, d_0] with the rows split over data and the
features as layer 1 reads them; rows that fill the batch up have weight 0 and count nowhere.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding

from tpmlp.checks import as_array, check_finite, check_length, check_weight
from tpmlp.layout import padded
from tpmlp.losses import Cotangent, CrossEntropy, Loss, Output, get_loss
from tpmlp.placement import OutputSpec, SampleSpec
from tpmlp.strategy import Strategy


class Batch(NamedTuple):
    """Samples on their devices; a tuple, so that step(params, *batch) takes it.

    Attributes:
        x: [B, d_0], padded; of a Graph [B, T, width], ids [B, T], or {source: array}.
        y: targets [B] or [B, d_{L+1}], padded; None for a loss without targets. With outputs for
            every token [B, T] or [B, T, width].
        weight: [B] or [B, T], 0 for the rows that pad the batch.
    """

    x: Any
    y: Any
    weight: Any

    def __repr__(self) -> str:
        shapes = ", ".join(f"{n}={_shape(a)}" for n, a in zip(self._fields, self, strict=True))
        return f"Batch({shapes})"


def shard_batch(
    model: Any,
    x: Any,
    y: Any = None,
    *,
    mesh: Mesh,
    strategy: Strategy | None = None,
    weight: Any = None,
    loss: Any = None,
) -> Batch:
    """Check a batch, pad it and place it on the mesh.

    A step takes the result without another look; arrays that are not placed are checked and
    placed at every call.

    Args:
        model: the model it is for.
        x: samples [B, d_0], real numbers.
        y: targets: integer labels [B], values [B, d_out], or None.
        mesh: the mesh.
        strategy: Strategy() by default.
        weight: sample weights [B], at least 0, not all 0; 1 by default.
        loss: the loss it is for. By default labels for y of integers [B] with d_out > 1, values
            for the rest; needed for a user's own loss.

    Returns:
        A Batch.

    Raises:
        ValueError: a wrong shape, dtype or length, a NaN or an infinity, a label out of range;
            with the name, the value and the row.

    Examples:
        >>> import jax, numpy as np, tpmlp
        >>> mesh = tpmlp.make_mesh(data=4, x=2)
        >>> mlp = tpmlp.MLP((3, 10))
        >>> batch = shard_batch(mlp, np.ones((30, 3)), np.zeros(30, int), mesh=mesh)
        >>> batch.x.shape, int(batch.weight.sum())
        ((32, 4), 30)
    """
    placement = model.place(mesh, strategy)
    meant = _infer_loss(y, placement.outputs) if loss is None else get_loss(loss)
    return place_batch(placement, meant, Batch(x, y, weight))


def place_batch(placement: Any, loss: Loss, batch: Batch) -> Batch:
    """Return the batch checked, padded and placed; a batch that is placed already is left alone.

    Traced arrays (inside a caller's jit) have no values to check: their shapes are.
    """
    arrays = jax.tree.leaves(batch)
    fits = _has_shapes(placement, loss, batch)
    if any(isinstance(array, Tracer) for array in arrays):
        if fits:
            if loss.targets != "values":
                _check_targets(placement, loss, batch.y, batch.weight.shape[0])
            return batch
        return pad_batch(placement, loss, check_shapes(placement, loss, batch), jnp)
    shardings = batch_shardings(placement, loss)
    if fits and all(map(_is_placed, arrays, jax.tree.leaves(shardings))):
        return batch
    on_host = jax.tree.map(lambda a: np.asarray(a) if isinstance(a, jax.Array) else a, batch)
    on_host = check_shapes(placement, loss, on_host)
    _check_values(placement, loss, on_host)
    return jax.tree.map(jax.device_put, pad_batch(placement, loss, on_host, np), shardings)


def batch_shardings(placement: Any, loss: Loss) -> Batch:
    """Return the sharding of each array of a batch; None for targets that do not exist."""
    outputs = placement.outputs
    y = {None: None, "values": outputs.values}.get(loss.targets, outputs.samples)
    x = jax.tree.map(lambda spec: spec.sharding, placement.samples)
    return Batch(x, y, outputs.samples)


def check_samples(placement: Any, x: Any) -> Any:
    """Return x in the structure of the sources, integers as floats, or refuse it.

    Raises:
        ValueError: a source that is missing or unknown, a wrong shape, dtype or length.
    """
    specs = placement.samples
    if isinstance(specs, dict):
        if not isinstance(x, Mapping) or set(x) != set(specs):
            got = sorted(x) if isinstance(x, Mapping) else type(x).__name__
            raise ValueError(
                f"x must be a dictionary of the graph's inputs {sorted(specs)}: got {got}."
            )
        checked = {name: _check_source(spec, x[name]) for name, spec in specs.items()}
        first, *others = checked.items()
        for name, array in others:
            check_length(f'x["{name}"]', array, first[1].shape[0])
        return checked
    return _check_source(specs, x)


def _check_source(spec: SampleSpec, x: Any) -> Any:
    x = as_array(spec.name, x)
    if x.shape[1:] != spec.shape or x.ndim != 1 + len(spec.shape):
        raise ValueError(
            f"{spec.name} must have {_wanted(spec)}: got x of shape {x.shape}. "
            "Samples are rows: reshape each to one row; pass all of a Batch from shard_batch, "
            "step(params, *batch)."
        )
    if x.shape[0] == 0:
        raise ValueError(f"{spec.name} must have at least one row: got x of shape {x.shape}.")
    if spec.vocabulary is None:
        return _as_float(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{spec.name} must be integers, ids of tokens: got dtype {x.dtype}.")
    return x


def _wanted(spec: SampleSpec) -> str:
    """Return the shape that samples must have, as a sentence has it."""
    if spec.vocabulary is not None:
        return f"shape [B, T] with T={spec.shape[0]}"
    if len(spec.shape) == 2:
        return f"shape [B, T, width] with T={spec.shape[0]}, width={spec.shape[1]}"
    return f"shape [B, d_0] with d_0={spec.shape[0]}"


def check_shapes(placement: Any, loss: Loss, batch: Batch) -> Batch:
    """Return the batch with its shapes and dtypes checked and a weight for each sample."""
    x = check_samples(placement, batch.x)
    num_samples = jax.tree.leaves(x)[0].shape[0]
    y = _check_targets(placement, loss, batch.y, num_samples)
    # Targets and weights keep their own precision: the step casts all to the parameters' type.
    if loss.targets == "values":
        y = _as_float(y)
    if batch.weight is None:
        return Batch(x, y, np.ones(num_samples, _default_float()))
    weight = as_array("weight", batch.weight)
    check_length("weight", weight, num_samples)
    tokens = placement.outputs.tokens
    if weight.ndim != 1 and (tokens is None or weight.shape != (num_samples, tokens)):
        shapes = "[B]" if tokens is None else f"[B] or [B, T] with T={tokens}"
        raise ValueError(f"weight must have shape {shapes}: got weight of shape {weight.shape}.")
    return Batch(x, y, _as_float(weight))


def _check_targets(placement: Any, loss: Loss, y: Any, num_samples: int) -> Any:
    """Return targets in the shape that the step takes: of a loss, one for each prediction."""
    outputs = placement.outputs
    if outputs.tokens is None or loss.targets is None or y is None:
        return loss.check_targets(y, num_samples, outputs.width)
    y = as_array("y", y)
    if y.shape[:2] != (num_samples, outputs.tokens):
        raise ValueError(
            f"y must have one row for each sample and token, [B, T, ..] with B={num_samples}, "
            f"T={outputs.tokens}: got y of shape {y.shape}."
        )
    flat = y.reshape(-1, *y.shape[2:])
    flat = loss.check_targets(flat, flat.shape[0], outputs.width)
    return flat.reshape(num_samples, outputs.tokens, *flat.shape[1:])


def _check_values(placement: Any, loss: Loss, batch: Batch) -> None:
    jax.tree.map(check_sample_values, placement.samples, batch.x)
    if batch.y is not None:
        check_target_values(placement, loss, batch.y)
    check_weight(batch.weight)


def check_sample_values(spec: SampleSpec, x: np.ndarray) -> None:
    """Refuse NaN, infinity, and ids that are none."""
    if spec.vocabulary is None:
        check_finite(spec.name, x)
        return
    wrong = np.argwhere((x < 0) | (x >= spec.vocabulary))
    if len(wrong):
        row, token = wrong[0]
        raise ValueError(
            f"{spec.name} must be ids in 0 .. {spec.vocabulary - 1}: got {x[row, token]} in row "
            f"{row}, token {token}. Map what is not in the vocabulary to an id of its own."
        )


def check_target_values(placement: Any, loss: Loss, y: np.ndarray) -> None:
    """Refuse values of y that no output can mean."""
    flat = y if placement.outputs.tokens is None else y.reshape(-1, *y.shape[2:])
    loss.check_target_values(flat, placement.outputs.width)


def pad_batch(placement: Any, loss: Loss, batch: Batch, library: ModuleType) -> Batch:
    """Fill the batch up to a multiple of data, and features with 0 to the padded widths.

    Padding samples are copies of the last one, with weight 0: whatever a user's activation is at
    real samples, it is there too, while at a sample of zeros it need not be finite.
    """
    rows = padded(batch.weight.shape[0], placement.row_blocks)
    return fill_batch(placement, loss, batch, rows, library)


def fill_batch(placement: Any, loss: Loss, batch: Batch, rows: int, library: ModuleType) -> Batch:
    """Return a checked batch with so many rows and with padded features."""
    shapes = _padded_shapes(placement, loss, rows, batch)
    return Batch(
        jax.tree.map(lambda a, shape: fill(a, shape.shape, library), batch.x, shapes.x),
        None if batch.y is None else fill(batch.y, shapes.y.shape, library),
        library.pad(
            batch.weight,
            [(0, rows - batch.weight.shape[0]), *[(0, 0)] * (batch.weight.ndim - 1)],
        ),
    )


def fill(array: Any, shape: tuple[int, ...], library: ModuleType) -> Any:
    """Return an array padded to a shape: rows with copies of the last, other dims with 0."""
    missing = [n - m for m, n in zip(array.shape, shape, strict=True)]
    if not any(missing):
        return array
    rows = library.pad(array, [(0, missing[0]), *[(0, 0)] * (array.ndim - 1)], mode="edge")
    return library.pad(rows, [(0, 0), *((0, n) for n in missing[1:])])


def padded_shapes(placement: Any, loss: Loss, batch_size: int) -> Batch:
    """Return the shapes of a batch on the mesh, as ShapeDtypeStructs of no particular type.

    Raises:
        ValueError: a user's loss, whose targets only the user knows.
    """
    if loss.targets == "any":
        raise ValueError(
            f"loss must have targets of a known shape: got loss={loss.name!r}. Give the arrays, or "
            "jax.ShapeDtypeStructs with the shardings of shard_batch, to step.lower."
        )
    rows = padded(batch_size, placement.row_blocks)
    return _padded_shapes(placement, loss, rows, Batch(None, None, None))


def _padded_shapes(placement: Any, loss: Loss, rows: int, batch: Batch) -> Batch:
    """Return the shapes of a batch of so many rows; what a user's loss takes is as it is."""
    outputs = placement.outputs

    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *sizes), bool)

    x = jax.tree.map(lambda spec: shape(*spec.padded_shape), placement.samples)
    tokens = outputs.shape[:-1]
    given = () if batch.y is None else tuple(np.shape(batch.y)[1:])
    tails = {"values": (*tokens, outputs.padded_width), "labels": tokens, "any": given}
    y = None if loss.targets is None else shape(*tails[loss.targets])
    weight = () if batch.weight is None else tuple(np.shape(batch.weight)[1:])
    return Batch(x, y, shape(*weight))


def _has_shapes(placement: Any, loss: Loss, batch: Batch) -> bool:
    """Whether all arrays have the shapes that a step takes, padding included."""
    if batch.weight is None or not all(hasattr(a, "shape") for a in jax.tree.leaves(batch)):
        return False
    rows = np.shape(batch.weight)[:1] or (0,)
    if rows[0] % placement.row_blocks or not rows[0]:
        return False
    wanted = _padded_shapes(placement, loss, rows[0], batch)
    if jax.tree.structure(wanted) != jax.tree.structure(batch):
        return False
    pairs = zip(jax.tree.leaves(wanted), jax.tree.leaves(batch), strict=True)
    return all(want.shape == got.shape for want, got in pairs)


def _shape(arrays: Any) -> Any:
    return jax.tree.map(lambda array: getattr(array, "shape", None), arrays)


def _is_placed(array: Any, sharding: NamedSharding | None) -> bool:
    """Whether an array needs no check: it has the step's own sharding, on the step's own mesh."""
    if array is None or sharding is None:
        return array is sharding
    given = getattr(array, "sharding", None)
    return (
        isinstance(given, NamedSharding)
        and given.mesh == sharding.mesh
        and given.is_equivalent_to(sharding, array.ndim)
    )


def _infer_loss(y: Any, outputs: OutputSpec) -> Loss:
    """Return a loss with the kind of targets that y looks like."""
    if y is None:
        return Output()
    y = as_array("y", y)
    one_each = y.ndim == len(outputs.shape)
    labels = one_each and jnp.issubdtype(y.dtype, jnp.integer) and outputs.width > 1
    return CrossEntropy() if labels else Cotangent()


def _as_float(array: Any) -> Any:
    """Return an array in a floating type that JAX has; integers in the default one."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(_default_float())
    with np.errstate(over="ignore"):  # What the type cannot hold is refused as infinite.
        return array.astype(jax.dtypes.canonicalize_dtype(array.dtype))


def _default_float() -> Any:
    return jax.dtypes.canonicalize_dtype(float)
