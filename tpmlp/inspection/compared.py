"""What verify compares, whatever the model: made-up numbers, a run beside its reference."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from tpmlp.inspection.bounds import Operation, Roundoff, unit_roundoff
from tpmlp.inspection.report import Kind
from tpmlp.kernels.execution import Execution
from tpmlp.losses import Loss


class Compared(NamedTuple):
    """A run beside its reference.

    Attributes:
        words: the role of each matrix.
        pairs: every tensor of the run and of the reference, in the order they are computed.
        operations: of the run, each with its exact result on the run's own inputs.
    """

    words: tuple[str, ...]
    pairs: dict[str, tuple[np.ndarray, np.ndarray]]
    operations: Sequence[Operation]


@dataclass(frozen=True, slots=True)
class Numbers:
    """Made-up numbers of the type that a kind of comparison has.

    Attributes:
        rng: where they come from.
        kind: integers are small, others normal.
    """

    rng: np.random.Generator
    kind: Kind

    @property
    def dtype(self) -> Any:
        """The type of all of them."""
        return np.float64 if self.kind == "float64" else np.float32

    def draw(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        """Return an array."""
        if self.kind == "integers":
            return self.rng.integers(-2, 3, shape).astype(self.dtype)
        return (self.rng.normal(size=shape) * scale).astype(self.dtype)

    def targets(self, loss: Loss, shape: tuple[int, ...], num_outputs: int) -> np.ndarray | None:
        """Return targets of a loss for predictions of a shape."""
        if loss.targets == "labels":
            return self.rng.integers(0, num_outputs, shape)
        if loss.targets == "values":
            return self.rng.integers(0, 2, (*shape, num_outputs)).astype(self.dtype)
        return None

    def weights(self, batch_size: int) -> np.ndarray:
        """Return positive sample weights."""
        if self.kind == "integers":
            return self.rng.integers(1, 4, batch_size).astype(self.dtype)
        return self.rng.uniform(0.5, 2.0, batch_size).astype(self.dtype)


def check_at_once(placement: Any) -> None:
    """Refuse microbatches where no step is run but the one that is traced, which has none."""
    microbatches = placement.strategy.microbatches
    if microbatches > 1 and placement.sizes["stage"] == 1:
        raise ValueError(
            "strategy must run the batch at once to be verified on a mesh without stages, as every "
            f"array of it is compared: got microbatches={microbatches}. Use microbatches=1."
        )


def check_exact(most: float, run: Execution, described: str) -> None:
    """Refuse integers whose sums could be too large for the narrowest type, and be rounded.

    Args:
        most: the largest that any sum can get, in any order.
        run: the types.
        described: the model and the batch, as name=value.
    """
    narrowest = max((run.compute, run.total, run.reduce), key=unit_roundoff)
    bits = jnp.finfo(narrowest).nmant + 1
    if most > 2**bits:
        raise ValueError(
            f"kind='integers' must have sums below 2^{bits}, which {narrowest} holds exactly: got "
            f"{described}, sums up to {most:.1e}. Use a narrower or shallower model, a smaller "
            "batch, or kind='float32'."
        )


def roundoff_of(placement: Any, run: Execution) -> Roundoff:
    """Return the unit roundoffs of a run on a mesh."""
    return Roundoff(
        compute=unit_roundoff(run.compute),
        total=unit_roundoff(run.total),
        reduce=unit_roundoff(run.reduce),
        num_devices=max(placement.num_blocks, placement.sizes["data"]),
    )
