"""Losses on sharded outputs: each sample's loss and its gradient, without a gather.

The last layer's output z is "C/g/s B/d": C outputs split over both tensor axes, so a softmax, a
mean over outputs or a picked logit is a sum of local sums. Each loss states, for one sample,

    loss(z, y)   and   d loss / d z

and the objective turns them into the weighted mean over the batch and g_{L+1}. Padding rows
(outputs that do not exist) take part in nothing: they are masked out of every sum, and their
gradient is 0.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tpmlp import reference
from tpmlp.checks import (
    as_array,
    check_finite,
    check_labels,
    check_length,
    check_range,
    check_values,
)
from tpmlp.collectives import all_gather, all_reduce, all_reduce_max, block_index, einsum


class PerSample(NamedTuple):
    """What a loss says of each sample of this device's part of the batch.

    Attributes:
        loss: "B/d", each sample's own loss.
        gradient: "C/g/s B/d", d loss / d z, 0 on padding rows.
        correct: "B/d", in [0, 1], how far the prediction is right; None where it has no meaning.
    """

    loss: jax.Array
    gradient: jax.Array
    correct: jax.Array | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """Where the outputs are: the logical number of them and the axes that split them.

    Attributes:
        num_outputs: logical width of the last layer.
        axes: mesh axis of each role of the last layer.
    """

    num_outputs: int
    axes: dict[str, str]

    def rows(self, z: jax.Array) -> jax.Array:
        """Return which output each local row of z is, [rows, 1]; padding is >= num_outputs."""
        first = block_index("C/g/s", **self.axes) * z.shape[0]
        return first + jnp.arange(z.shape[0], dtype=jnp.int32)[:, None]

    def gather_outputs(self, z: jax.Array) -> jax.Array:
        """Return all outputs, "C B/d"."""
        return all_gather("C/g/s B/d -> C B/d", z, **self.axes)

    def sum_outputs(self, *terms: jax.Array) -> list[jax.Array]:
        """Sum each "C/g/s B/d" over all outputs, together in one all-reduce; each "B/d"."""
        # Summed one by one: stacked first, the terms would all be there at once.
        local = [einsum("C/g/s B/d -> B/d +g+s", term, **self.axes) for term in terms]
        return list(all_reduce("K B/d +g+s -> K B/d", jnp.stack(local), **self.axes))

    def max_outputs(self, z: jax.Array) -> jax.Array:
        """Return the largest output of each sample, "B/d"."""
        return all_reduce_max("B/d +g+s -> B/d", jnp.max(z, axis=0), **self.axes)


class WholeHead(Head):
    """Outputs that are all here, gathered: their sums need no axis."""

    def rows(self, z: jax.Array) -> jax.Array:
        """Return which output each row of z is, [rows, 1]."""
        return jnp.arange(z.shape[0], dtype=jnp.int32)[:, None]

    def gather_outputs(self, z: jax.Array) -> jax.Array:
        """Return z, "C B/d"."""
        return z

    def sum_outputs(self, *terms: jax.Array) -> list[jax.Array]:
        """Sum each "C B/d" over all outputs; each "B/d"."""
        return [term.sum(axis=0) for term in terms]

    def max_outputs(self, z: jax.Array) -> jax.Array:
        """Return the largest output of each sample, "B/d"."""
        return jnp.max(z, axis=0)


class Loss(ABC):
    """A loss of one sample, and how samples are put together.

    Attributes:
        name: what tables and errors call it.
        reduction: "mean", sum(weight * loss) / sum(weight), or "sum", sum(weight * loss).
        targets: what y is: "labels" [B] integers, "values" [B, C], "any" [B, ...] or None.
        num_reduced: elements all-reduced over the tensor axes for each sample.
        reference: the same loss in NumPy (tpmlp.reference).
    """

    name: str
    reduction: ClassVar[Literal["mean", "sum"]] = "mean"
    targets: ClassVar[Literal["labels", "values", "any"] | None] = "values"

    @property
    @abstractmethod
    def reference(self) -> Any:
        """The same loss in NumPy."""

    @property
    def num_reduced(self) -> int:
        """Elements all-reduced over the tensor axes for each sample."""
        return 1

    @abstractmethod
    def per_sample(self, z: jax.Array, y: Any, head: Head) -> PerSample:
        """Return each sample's loss and gradient; z "C/g/s B/d", y as `targets` says."""

    def check_targets(self, y: Any, num_samples: int, num_outputs: int) -> Any:
        """Return y in the shape that the kernel takes, or refuse it.

        Raises:
            ValueError: y is missing, or its length, shape or dtype does not fit.
        """
        return check_values(self.name, y, num_samples, num_outputs)

    def check_target_values(self, y: np.ndarray, num_outputs: int) -> None:
        """Refuse values of y that no output can mean.

        Raises:
            ValueError: the first such value, with its row.
        """
        check_finite("y", y)


@dataclass(frozen=True, slots=True)
class MeanSquaredError(Loss):
    """Mean over samples and outputs of (z - y)^2."""

    name = "mse"

    @property
    def reference(self) -> Any:
        """The same loss in NumPy."""
        return reference.mse()

    def per_sample(self, z: jax.Array, y: Any, head: Head) -> PerSample:
        """Return sum_k (z_k - y_k)^2 / C and 2 (z - y) / C."""
        # Padding rows of z and y are both 0, so the difference is.
        difference = z - y
        (total,) = head.sum_outputs(difference * difference)
        return PerSample(total / head.num_outputs, difference * (2 / head.num_outputs), None)


@dataclass(frozen=True, slots=True)
class CrossEntropy(Loss):
    """Mean over samples of -log softmax(z)[y], in nats, with label smoothing."""

    label_smoothing: float = 0.0

    name = "cross_entropy"
    targets = "labels"

    def __post_init__(self) -> None:
        number = isinstance(self.label_smoothing, int | float | np.number)
        if not number or not 0 <= self.label_smoothing < 1:
            raise ValueError(
                "label_smoothing must be at least 0 and below 1: "
                f"got label_smoothing={self.label_smoothing!r}. Use for example 0.1."
            )

    @property
    def reference(self) -> Any:
        """The same loss in NumPy."""
        return reference.cross_entropy(self.label_smoothing)

    @property
    def num_reduced(self) -> int:
        """The maximum; sum exp, the picked logit, its rank; with smoothing, the sum of logits."""
        return 5 if self.label_smoothing else 4

    def per_sample(self, z: jax.Array, y: Any, head: Head) -> PerSample:
        """Return log sum exp(z) - <target, z> and softmax(z) - target.

        The target is (1 - a) onehot(y) + a / C. Logits are taken relative to their maximum, which
        is subtracted before anything is added, so that 1e4 is no larger than 1. A label that is
        no output gives NaN, never somebody else's class.
        """
        a, num_outputs = self.label_smoothing, head.num_outputs
        rows = head.rows(z)
        real = rows < num_outputs
        # The shift cancels, so it has no part in a derivative.
        largest = head.max_outputs(jnp.where(real, lax.stop_gradient(z), -jnp.inf))
        shifted = jnp.where(real, z - largest[None], -jnp.inf)
        onehot = rows.astype(y.dtype) == y[None]
        exp = jnp.exp(shifted)
        # The prediction is the first of the largest logits, as argmax takes it: y is it where its
        # logit is the maximum and no row before has it too.
        before = (shifted == 0) & (rows.astype(y.dtype) < y[None])
        terms = [exp, jnp.where(onehot, shifted, 0), before.astype(z.dtype)]
        terms += [jnp.where(real, shifted, 0)] if a else []
        total, picked, ahead, *logits = head.sum_outputs(*terms)
        loss = jnp.log(total) - (1 - a) * picked
        loss = loss - (a / num_outputs) * logits[0] if a else loss
        target = jnp.where(onehot, 1 - a, 0) + a / num_outputs
        gradient = jnp.where(real, exp / total[None] - target, 0).astype(z.dtype)
        known = (y >= 0) & (y < num_outputs)
        return PerSample(
            jnp.where(known, loss, jnp.nan),
            jnp.where(known[None], gradient, jnp.nan),
            (known & (picked == 0) & (ahead == 0)).astype(z.dtype),
        )

    def check_targets(self, y: Any, num_samples: int, num_outputs: int) -> Any:
        """Return y [B] as integers, or refuse it."""
        return check_labels(self.name, y, num_samples)

    def check_target_values(self, y: np.ndarray, num_outputs: int) -> None:
        """Refuse labels that are not in 0 .. num_outputs - 1."""
        check_range("labels y", y, 0, num_outputs - 1)


@dataclass(frozen=True, slots=True)
class Logistic(Loss):
    """Mean over samples and outputs of log(1 + exp(z)) - y z; labels are 0 and 1."""

    name = "logistic"

    @property
    def reference(self) -> Any:
        """The same loss in NumPy."""
        return reference.logistic()

    @property
    def num_reduced(self) -> int:
        """The loss and the number of right outputs."""
        return 2

    def per_sample(self, z: jax.Array, y: Any, head: Head) -> PerSample:
        """Return sum_k log(1 + exp(s_k z_k)) / C and s sigmoid(s z) / C, s = 1 - 2y.

        For labels 0 and 1 this is log(1 + exp(z)) - y z and sigmoid(z) - y, without the
        differences of equal numbers that these become where an output is confident and right.
        """
        real = head.rows(z) < head.num_outputs
        s = 1 - 2 * y
        right = (z > 0) == (y > 0)
        loss, right = head.sum_outputs(
            jnp.where(real, jnp.logaddexp(s * z, jnp.zeros((), z.dtype)), 0),
            jnp.where(real, right, False).astype(z.dtype),
        )
        gradient = jnp.where(real, s * jax.nn.sigmoid(s * z) / head.num_outputs, 0)
        return PerSample(loss / head.num_outputs, gradient, right / head.num_outputs)

    def check_target_values(self, y: np.ndarray, num_outputs: int) -> None:
        """Refuse targets that are neither 0 nor 1."""
        check_finite("y", y)
        wrong = np.flatnonzero(((y != 0) & (y != 1)).any(axis=-1))
        if wrong.size:
            raise ValueError(
                f"y must be 0 or 1 for logistic: got y[{wrong[0]}]={y[wrong[0]].tolist()}. "
                "Use loss='cross_entropy' for more classes, 'mse' for values."
            )


@dataclass(frozen=True, slots=True)
class Output(Loss):
    """The outputs themselves, or one of them, summed over samples: g_{L+1} = 1."""

    component: int | None = None

    def __post_init__(self) -> None:
        index = isinstance(self.component, int | np.integer | None)
        if not index or isinstance(self.component, bool) or (self.component or 0) < 0:
            raise ValueError(
                f"component must be the index of an output, 0 or more: got "
                f"component={self.component!r}. Leave it out for the sum of all outputs."
            )

    name = "output"
    reduction = "sum"
    targets = None

    @property
    def reference(self) -> Any:
        """The same loss in NumPy."""
        return reference.output(self.component)

    def per_sample(self, z: jax.Array, y: Any, head: Head) -> PerSample:
        """Return sum_k z_k and 1, or z_k and the k-th unit vector."""
        rows = head.rows(z)
        chosen = rows < head.num_outputs if self.component is None else rows == self.component
        (loss,) = head.sum_outputs(jnp.where(chosen, z, 0))
        return PerSample(loss, jnp.broadcast_to(chosen, z.shape).astype(z.dtype), None)

    def check_targets(self, y: Any, num_samples: int, num_outputs: int) -> Any:
        """Refuse a y, and a component that is no output."""
        if y is not None:
            raise ValueError(
                f"y must be None for loss 'output', which has no target: got a y of type "
                f"{type(y).__name__}. Leave it out, or use another loss."
            )
        if self.component is not None and self.component not in range(num_outputs):
            raise ValueError(
                f"component must be an integer in 0 .. {num_outputs - 1}, an output: got "
                f"component={self.component!r}."
            )
        return None


@dataclass(frozen=True, slots=True)
class Cotangent(Loss):
    """<v, z> summed over samples, v the targets: g_{L+1} = v."""

    name = "cotangent"
    reduction = "sum"

    @property
    def reference(self) -> Any:
        """The same loss in NumPy."""
        return reference.cotangent()

    def per_sample(self, z: jax.Array, y: Any, head: Head) -> PerSample:
        """Return sum_k y_k z_k and y."""
        (loss,) = head.sum_outputs(y * z)
        return PerSample(loss, y, None)

    def check_targets(self, y: Any, num_samples: int, num_outputs: int) -> Any:
        """Return v [B, C], or refuse it."""
        return check_values(self.name, y, num_samples, num_outputs, name="cotangent")

    def check_target_values(self, y: np.ndarray, num_outputs: int) -> None:
        """Refuse NaN and infinity."""
        check_finite("cotangent", y)


@dataclass(frozen=True, slots=True)
class UserLoss(Loss):
    """A user's function of one sample's outputs, gathered; differentiated by jax.grad.

    Attributes:
        function: (z [C], y [...]) -> scalar, in jax.numpy.
        name: the function's own name.
    """

    function: Callable[[jax.Array, Any], Any]
    name: str

    targets = "any"

    @property
    def num_reduced(self) -> int:
        """Nothing is reduced: the outputs are gathered."""
        return 0

    @property
    def reference(self) -> Any:
        """Refuse: NumPy cannot differentiate a user's function."""
        raise ValueError(
            f"loss {self.name!r} has no NumPy reference: it is a user's function, differentiated "
            "by JAX. Compare with jax.grad of the unsharded model."
        )

    def per_sample(self, z: jax.Array, y: Any, head: Head) -> PerSample:
        """Gather the outputs, apply the function to each sample, keep this device's rows.

        The price of generality: B * C words are gathered, where the losses above move a few
        words a sample.
        """
        outputs = head.gather_outputs(z)[: head.num_outputs]
        one = jax.eval_shape(self.function, outputs[:, 0], y[0])
        if one.shape != ():
            raise ValueError(
                f"loss {self.name!r} must return a scalar for one sample: got shape {one.shape}. "
                "It is called with z [C] and the y of that sample; sum or average over C."
            )
        over_samples = jax.vmap(jax.value_and_grad(self.function), in_axes=(1, 0))
        loss, gradient = over_samples(outputs, y)
        rows = head.rows(z)[:, 0]
        mine = gradient.T.at[rows].get(mode="fill", fill_value=0)
        return PerSample(loss, mine.astype(z.dtype), None)

    def check_targets(self, y: Any, num_samples: int, num_outputs: int) -> Any:
        """Return y [B, ...], or refuse another number of samples."""
        y = as_array("y", y)
        check_length("y", y, num_samples)
        return y

    def check_target_values(self, y: np.ndarray, num_outputs: int) -> None:
        """Leave the meaning of y to the user's function."""


def mse() -> Loss:
    """Return the mean over samples and outputs of the squared error."""
    return MeanSquaredError()


def cross_entropy(label_smoothing: float = 0.0) -> Loss:
    """Return the softmax cross-entropy, the mean over samples, in nats.

    Args:
        label_smoothing: a in [0, 1): the target is (1 - a) onehot(y) + a / C.
    """
    return CrossEntropy(label_smoothing)


def logistic() -> Loss:
    """Return the logistic loss, the mean over samples and outputs; labels 0 and 1."""
    return Logistic()


def output(component: int | None = None) -> Loss:
    """Return the sum over samples of all outputs, or of one: g_{L+1} = 1, without a target.

    Args:
        component: which output, 0-based; None for all.
    """
    return Output(component)


LOSSES: dict[str, Callable[[], Loss]] = {
    "mse": mse,
    "cross_entropy": cross_entropy,
    "logistic": logistic,
    "output": output,
}


def get_loss(loss: object) -> Loss:
    """Return the Loss meant by a name, a Loss, or a function (z [C], y) -> scalar.

    Raises:
        ValueError: none of these.

    Examples:
        >>> get_loss("mse").name
        'mse'
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str) and loss in LOSSES:
        return LOSSES[loss]()
    if callable(loss):
        return UserLoss(loss, getattr(loss, "__name__", "user"))
    raise ValueError(
        f"loss must be one of {tuple(LOSSES)}, a tpmlp loss such as tpmlp.cross_entropy(0.1), or "
        f"a function of one sample's outputs and target: got loss={loss!r}."
    )
