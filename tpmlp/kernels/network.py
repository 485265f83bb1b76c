"""What an objective asks of a model's kernel: forward, and backward from g of the outputs.

A Chain of dense layers (tpmlp.kernels.backprop) and a graph (tpmlp.graph.network) are networks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

from tpmlp.losses import Head

Params = Any  # local blocks, in the structure of the model's parameters


class Finished(NamedTuple):
    """What a backward pass gives.

    Attributes:
        grads: laid out as the parameters; sums over this device's samples if not reduced.
        arrays: what a trace shows, as the network has it; what is not used is not computed.
    """

    grads: Params
    arrays: Any


class Passed(NamedTuple):
    """What a forward pass gives.

    Attributes:
        outputs: "C/g/s B/d" in the parameters' type; B counts tokens where samples have them.
        activity: what the model adds to the objective for this device's samples, "+d"; None if
            nothing.
        backward: (g of the outputs, reduce) -> Finished; `reduce` says whether gradients are
            summed over the data axis there.
    """

    outputs: jax.Array
    activity: jax.Array | None
    backward: Callable[[jax.Array, bool], Finished]


class Network(Protocol):
    """A model on its mesh, as functions of one device's blocks."""

    @property
    def placement(self) -> Any:
        """Where its arrays are."""
        ...

    @property
    def head(self) -> Head:
        """Where its outputs are."""
        ...

    @property
    def adds(self) -> bool:
        """Whether the model itself adds to the objective."""
        ...

    def forward(self, params: Params, x: Any, share: jax.Array | None, /) -> Passed:
        """Run forward; `share` "B/d" is what each sample counts in the objective."""
        ...

    @property
    def kept_specs(self) -> Any:
        """PartitionSpecs of what `outputs` keeps."""
        ...

    def outputs(self, params: Params, x: Any, /) -> tuple[jax.Array, Any]:
        """Return the outputs "C/g/s B/d" and what the backward pass needs."""
        ...

    def gradients(self, params: Params, x: Any, kept: Any, g: jax.Array, /) -> tuple[Params, Any]:
        """Return gradients by the parameters and by the samples, laid out as these; None by ids."""
        ...

    def reduce(self, grads: Params, /) -> Params:
        """Sum gradients over the data axis that are not."""
        ...

    def zeros(self, params: Params, dtype: Any, /) -> Params:
        """Return gradients of no samples, not reduced unless data splits the parameters."""
        ...

    def at(self, first_sample: Any, num_samples: int) -> "Network":
        """Return the network for the part of a device's samples that begins with that one."""
        ...

    def dropping(self, words: jax.Array) -> "Network":
        """Return the network while training: what is dropped is a function of these bits."""
        ...


def param_dtype(params: Params) -> Any:
    """Return the type of the parameters; JAX's own where there are none."""
    leaves = jax.tree.leaves(params)
    return leaves[0].dtype if leaves else jax.dtypes.canonicalize_dtype(float)
