"""The batches of a run: which rows, in which order, and their way to the devices.

The order of an epoch is a pure function of (seed, epoch): it depends on no mesh and on no step
before, so a run can start anywhere and be the same run. All checks happen once, when samples are
read; a step only picks rows. Every batch has the same shape: where rows run out, it is filled up
with a copy of the last sample that has weight 0 and is kept after it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np

from tpmlp.batch import (
    Batch,
    batch_shardings,
    check_sample_values,
    check_shapes,
    check_target_values,
    fill_batch,
)
from tpmlp.checks import check_finite, check_weight
from tpmlp.layout import padded
from tpmlp.losses import Loss
from tpmlp.placement import SampleSpec


def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """Return the order in which an epoch visits the samples.

    Random 64-bit keys are sorted. NumPy promises that the bits of Philox stay as they are, but
    not what Generator.permutation makes of them.

    Args:
        seed: at least 0.
        epoch: counted from 1.
        num_samples: how many there are.

    Returns:
        A permutation of 0 .. num_samples - 1.

    Examples:
        >>> epoch_order(0, 1, 5), epoch_order(0, 2, 5)
        (array([...]), array([...]))
    """
    bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(epoch,)))
    return np.argsort(bits.random_raw(num_samples), kind="stable")


class Step(NamedTuple):
    """One step of a plan.

    Attributes:
        number: counted from 1.
        epoch: counted from 1.
        rows: the samples of its batch.
        ends_epoch: whether it is the last step of its epoch.
    """

    number: int
    epoch: int
    rows: np.ndarray
    ends_epoch: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Which samples each step of a run takes.

    Attributes:
        seed: of the order.
        num_samples: samples there are.
        batch_size: samples in a batch; the last of an epoch may have fewer.
        num_steps: steps of the run.
    """

    seed: int
    num_samples: int
    batch_size: int
    num_steps: int

    @property
    def steps_per_epoch(self) -> int:
        """Batches that visit every sample once."""
        return -(-self.num_samples // self.batch_size)

    def steps(self, done: int = 0) -> Iterator[Step]:
        """Yield the steps that are left after the first `done`."""
        order, ordered = np.empty(0, int), 0
        for number in range(done + 1, self.num_steps + 1):
            before, place = divmod(number - 1, self.steps_per_epoch)
            if before + 1 != ordered:
                ordered = before + 1
                order = epoch_order(self.seed, ordered, self.num_samples)
            rows = order[place * self.batch_size : (place + 1) * self.batch_size]
            yield Step(number, ordered, rows, place + 1 == self.steps_per_epoch)


@dataclass(frozen=True)
class Samples:
    """Checked samples on the host, as the devices will have them.

    Attributes:
        placement: where batches go.
        loss: what y means.
        host: NumPy arrays with padded features; after the last sample its copy of weight 0.
    """

    placement: Any
    loss: Loss
    host: Batch

    @property
    def num_samples(self) -> int:
        """Samples there are, the copy not counted."""
        return len(self.host.weight) - 1

    @cached_property
    def shardings(self) -> Batch:
        """Where the arrays of a batch go."""
        return batch_shardings(self.placement, self.loss)

    def take(self, rows: np.ndarray, batch_size: int) -> Batch:
        """Place the batch of these rows, filled up to batch_size and to a multiple of data."""
        size = padded(batch_size, self.placement.row_blocks)
        index = np.full(size, self.num_samples)
        index[: len(rows)] = rows
        return jax.device_put(self._pick(index), self.shardings)

    def in_order(self, batch_size: int) -> Iterator[tuple[Batch, float]]:
        """Yield all samples in batches, each with the sum of its weights."""
        for first in range(0, self.num_samples, batch_size):
            rows = np.arange(first, min(first + batch_size, self.num_samples))
            weight = float(self.host.weight[rows].astype(np.float64).sum())
            yield self.take(rows, batch_size), weight

    def _pick(self, index: np.ndarray) -> Batch:
        # A new array each time: on CPU a device may go on reading the memory it was given.
        return jax.tree.map(lambda a: np.take(a, index, axis=0), self.host)


def read_samples(name: str, data: Any, *, placement: Any, loss: Loss, dtype: Any) -> Samples:
    """Check samples and bring them into the form that batches are cut from.

    Rows of weight 0 are left out: they count nowhere, and a batch of nothing else would have no
    mean.

    Args:
        name: what the errors call them.
        data: (x, y) or (x, y, weight), anything that NumPy takes.
        placement: where batches will go.
        loss: what y means.
        dtype: of the parameters.

    Raises:
        ValueError: a wrong shape, dtype or length, a NaN or an infinity, a label out of range;
            with the name, the value and the row.
    """
    try:
        batch = _checked(data, placement, loss, np.dtype(dtype))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    kept = (batch.weight > 0).reshape(len(batch.weight), -1).any(axis=1)
    if not kept.all():
        batch = jax.tree.map(lambda a: a[kept], batch)
    return Samples(placement, loss, fill_batch(placement, loss, batch, len(batch.weight) + 1, np))


def _checked(data: Any, placement: Any, loss: Loss, dtype: np.dtype) -> Batch:
    if not isinstance(data, tuple | list) or len(data) not in (2, 3):
        raise ValueError(
            f"must be (x, y) or (x, y, weight): got {type(data).__name__}"
            f"{f' of length {len(data)}' if isinstance(data, tuple | list) else ''}. "
            "Use y=None for a loss without targets."
        )
    x, *others = (*data, None)[:3]
    x = {n: np.asarray(a) for n, a in x.items()} if isinstance(x, Mapping) else np.asarray(x)
    y, weight = (None if a is None else np.asarray(a) for a in others)
    batch = check_shapes(placement, loss, Batch(x, y, weight))

    def cast(spec: SampleSpec, x: np.ndarray) -> np.ndarray:
        if spec.vocabulary is None:
            return x.astype(dtype)
        # Before they are cast: 2^32 + 1 must not become id 1.
        check_sample_values(spec, x)
        return x.astype(np.int32)

    # A float64 that float32 cannot hold becomes infinite, and is refused as such.
    with np.errstate(over="ignore"):
        x, weight = jax.tree.map(cast, placement.samples, batch.x), batch.weight.astype(dtype)
        y = _checked_targets(batch.y, placement, loss, dtype)
    jax.tree.map(check_sample_values, placement.samples, x)
    check_weight(weight)
    return Batch(x, y, weight)


def _checked_targets(y: Any, placement: Any, loss: Loss, dtype: np.dtype) -> Any:
    if y is None:
        return None
    # Labels before they are cast: 2^32 + 1 must not become class 1.
    check_target_values(placement, loss, y)
    values = loss.targets == "values"
    y = y.astype(dtype if values else jax.dtypes.canonicalize_dtype(y.dtype))
    if values:
        check_finite("y", y)
    return y
