"""Batches: samples checked, padded and placed once, between the user and the kernel.

Users have samples as rows. On the devices x is [B, d_0] with the rows split over data and the
features as layer 1 reads them; rows that fill the batch up have weight 0 and count nowhere.
"""

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
from tpmlp.placement import Placement, place
from tpmlp.strategy import Strategy


class Batch(NamedTuple):
    """Samples on their devices; a tuple, so that step(params, *batch) takes it.

    Attributes:
        x: [B, d_0], padded.
        y: targets [B] or [B, d_{L+1}], padded; None for a loss without targets.
        weight: [B], 0 for the rows that pad the batch.
    """

    x: Any
    y: Any
    weight: Any

    def __repr__(self) -> str:
        shapes = ", ".join(f"{n}={s}" for n, s in zip(self._fields, _shapes(self), strict=True))
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
    placement = place(model.widths, mesh, strategy)
    meant = _infer_loss(y, placement.widths[-1]) if loss is None else get_loss(loss)
    return place_batch(placement, meant, Batch(x, y, weight))


def place_batch(placement: Placement, loss: Loss, batch: Batch) -> Batch:
    """Return the batch checked, padded and placed; a batch that is placed already is left alone.

    Traced arrays (inside a caller's jit) have no values to check: their shapes are.
    """
    if any(isinstance(array, Tracer) for array in batch):
        if batch.weight is not None and _shapes(batch) == _padded_shapes(
            placement, loss, _shapes(batch)
        ):
            if loss.targets != "values":
                loss.check_targets(batch.y, batch.weight.shape[0], placement.widths[-1])
            return batch
        return _pad(placement, loss, check_shapes(placement, loss, batch), jnp)
    shardings = batch_shardings(placement, loss)
    fits = _shapes(batch) == _padded_shapes(placement, loss, _shapes(batch))
    if fits and all(map(_is_placed, batch, shardings)):
        return batch
    on_host = Batch(*(np.asarray(a) if isinstance(a, jax.Array) else a for a in batch))
    on_host = check_shapes(placement, loss, on_host)
    _check_values(placement, loss, on_host)
    full = _pad(placement, loss, on_host, np)
    pairs = zip(full, shardings, strict=True)
    return Batch(*(None if a is None else jax.device_put(a, s) for a, s in pairs))


def batch_shardings(placement: Placement, loss: Loss) -> Batch:
    """Return the sharding of each array of a batch; None for targets that do not exist."""
    rows = placement.sharding("B/d", 1)
    num_layers = len(placement.words)
    y = placement.sharding("B/d O/g/s", num_layers) if loss.targets == "values" else rows
    return Batch(placement.sharding("B/d I/s/g", 1), None if loss.targets is None else y, rows)


def check_features(x: Any, width: int) -> Any:
    """Return x [B, width] as an array, integers as floats, or refuse its shape or dtype."""
    x = as_array("x", x)
    if x.ndim != 2 or x.shape[1] != width:
        raise ValueError(
            f"x must have shape [B, d_0] with d_0={width}: got x of shape {x.shape}. Samples are "
            "rows: reshape each to one row; pass all of a Batch from shard_batch, step(params, "
            "*batch)."
        )
    if x.shape[0] == 0:
        raise ValueError(f"x must have at least one row: got x of shape {x.shape}.")
    return _as_float(x)


def check_shapes(placement: Placement, loss: Loss, batch: Batch) -> Batch:
    """Return the batch with its shapes and dtypes checked and a weight for each sample."""
    x = check_features(batch.x, placement.widths[0])
    num_samples = x.shape[0]
    y = loss.check_targets(batch.y, num_samples, placement.widths[-1])
    # Targets and weights keep their own precision: the step casts all to the parameters' type.
    if loss.targets == "values":
        y = _as_float(y)
    if batch.weight is None:
        return Batch(x, y, np.ones(num_samples, _default_float()))
    weight = as_array("weight", batch.weight)
    check_length("weight", weight, num_samples)
    if weight.ndim != 1:
        raise ValueError(f"weight must have shape [B]: got weight of shape {weight.shape}.")
    return Batch(x, y, _as_float(weight))


def _check_values(placement: Placement, loss: Loss, batch: Batch) -> None:
    check_finite("x", batch.x)
    if batch.y is not None:
        loss.check_target_values(batch.y, placement.widths[-1])
    check_weight(batch.weight)


def _pad(placement: Placement, loss: Loss, batch: Batch, library: ModuleType) -> Batch:
    """Fill the batch up to a multiple of data, and features with 0 to the padded widths.

    Padding samples are copies of the last one, with weight 0: whatever a user's activation is at
    real samples, it is there too, while at a sample of zeros it need not be finite.
    """
    x, y, weight = _padded_shapes(placement, loss, _shapes(batch))
    return Batch(
        fill(batch.x, x, library),
        None if y is None else fill(batch.y, y, library),
        library.pad(batch.weight, (0, weight[0] - batch.weight.shape[0])),
    )


def fill(array: Any, shape: tuple[int, ...], library: ModuleType) -> Any:
    """Return an array padded to a shape: rows with copies of the last, other dims with 0."""
    missing = [n - m for m, n in zip(array.shape, shape, strict=True)]
    if not any(missing):
        return array
    rows = library.pad(array, [(0, missing[0]), *[(0, 0)] * (array.ndim - 1)], mode="edge")
    return library.pad(rows, [(0, 0), *((0, n) for n in missing[1:])])


def padded_shapes(placement: Placement, loss: Loss, batch_size: int) -> Batch:
    """Return the shapes of a batch on the mesh.

    Raises:
        ValueError: a user's loss, whose targets only the user knows.
    """
    if loss.targets == "any":
        raise ValueError(
            f"loss must have targets of a known shape: got loss={loss.name!r}. Give the arrays, or "
            "jax.ShapeDtypeStructs with the shardings of shard_batch, to step.lower."
        )
    return _padded_shapes(placement, loss, Batch((batch_size,), (), (batch_size,)))


def _padded_shapes(placement: Placement, loss: Loss, shapes: Batch) -> Batch:
    rows = padded((shapes.x or (0,))[0], placement.row_blocks)
    d_in, d_out = placement.padded_widths[0], placement.padded_widths[-1]
    tail = {"values": (d_out,), "any": (shapes.y or ())[1:]}.get(loss.targets or "none", ())
    return Batch((rows, d_in), None if loss.targets is None else (rows, *tail), (rows,))


def _shapes(batch: Batch) -> Batch:
    return Batch(*(getattr(array, "shape", None) for array in batch))


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


def _infer_loss(y: Any, num_outputs: int) -> Loss:
    """Return a loss with the kind of targets that y looks like."""
    if y is None:
        return Output()
    y = as_array("y", y)
    labels = y.ndim == 1 and jnp.issubdtype(y.dtype, jnp.integer) and num_outputs > 1
    return CrossEntropy() if labels else Cotangent()


def _as_float(array: Any) -> Any:
    """Return an array in a floating type that JAX has; integers in the default one."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(_default_float())
    with np.errstate(over="ignore"):  # What the type cannot hold is refused as infinite.
        return array.astype(jax.dtypes.canonicalize_dtype(array.dtype))


def _default_float() -> Any:
    return jax.dtypes.canonicalize_dtype(float)
