"""What the executor asks of a model: the parts of one stage, on one device's blocks.

    first part -> slots, chunk by chunk -> last part -> loss

A pipeline cuts a model into a first part, which the first virtual stage runs before its slots,
*slots* of equal shapes on every stage, and a last part, which the last virtual stage runs after
its own. What goes from slot to slot is one array, the *message*: z forward, g backward.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
from jax import lax

from tpmlp.collectives import per_stage
from tpmlp.kernels.execution import Execution


class Empty(NamedTuple):
    """Zeros of what there is on a device, in the shapes and types that tasks leave.

    Attributes:
        message: z of one microbatch.
        gradient: g of one microbatch.
        kept: by slot of a chunk, what B and W read of the F: pytrees.
        deferred: by slot of a chunk, what W reads of the B: pytrees.
        outputs: g of the outputs.
        grads: sums of gradients: of the first part, of all slots of all chunks, of the last part.
    """

    message: jax.Array
    gradient: jax.Array
    kept: tuple[Any, ...]
    deferred: tuple[Any, ...]
    outputs: jax.Array
    grads: tuple[Any, ...]


class Body(Protocol):
    """One stage's parts; c is a chunk, k a slot of it, both counted from 0.

    Attributes:
        stage: this device's stage, known when the program runs.
        types: of products and sums.
    """

    stage: jax.Array
    types: Execution

    def at(self, microbatch: Any, rows: int) -> "Body":
        """Return the body for one microbatch, of `rows` samples a device: what drops asks which."""
        ...

    def empty(self, rows: int) -> Empty:
        """Return zeros for microbatches of `rows` samples a device."""
        ...

    def enter(self, x: Any) -> jax.Array:
        """Run the first part: the message to the first slot, from samples."""
        ...

    def forward(self, c: int, z: jax.Array) -> tuple[tuple[Any, ...], jax.Array]:
        """Run F of a chunk: what is kept of each slot, and the message that leaves."""
        ...

    def leave(self, z: jax.Array) -> jax.Array:
        """Run the last part: the outputs, from the message that the last slot leaves."""
        ...

    def leave_backward(self, z: jax.Array, g: jax.Array) -> jax.Array:
        """Return the gradient of that message, from g of the outputs."""
        ...

    def backward(
        self, c: int, kept: tuple[Any, ...], g: jax.Array
    ) -> tuple[tuple[Any, ...], jax.Array]:
        """Run B of a chunk: what W needs of each slot, and the g that leaves."""
        ...

    def first_gradients(self, x: Any, g: jax.Array) -> Any:
        """Return gradients of the first part, from g of its message."""
        ...

    def slot_gradients(self, c: int, k: int, kept: Any, deferred: Any) -> Any:
        """Return gradients of a slot of this stage."""
        ...

    def last_gradients(self, z: jax.Array, g: jax.Array) -> Any:
        """Return gradients of the last part, from g of the outputs."""
        ...

    def has(self, c: int, k: int) -> jax.Array | bool:
        """Return whether this stage has something in a slot."""
        ...

    def moved_h(self, z: jax.Array, by: int) -> jax.Array:
        """Return the z that has come from the stage `by` places on, as a chunk takes it in."""
        ...

    def moved_g(self, g: jax.Array, by: int) -> jax.Array:
        """Return the g that has come from the stage `by` places on, as B takes it in."""
        ...

    def reduced(self, grads: tuple[Any, ...]) -> Any:
        """Sum gradients over data and stages, to where the parameters are, in their structure."""
        ...


def only_at(
    place: tuple[int, int],
    c: int,
    body: Body,
    there: Callable[[], Any],
    elsewhere: Callable[[], Any],
) -> Any:
    """Return one value in chunk c on the stage of a place, (stage, chunk), another elsewhere."""
    at, chunk = place
    if chunk != c:
        return elsewhere()
    return lax.cond(body.stage == at, lambda: per_stage(there()), lambda: per_stage(elsewhere()))
