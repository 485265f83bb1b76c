"""What a rule is: how a kind of vertex computes on one device's blocks, forward and backward.

    forward    r = F(W, inputs), and what of it is worth keeping beside the inputs
    backward   (d F / d inputs)^T g and (d F / d W)^T g, g = d loss / d r: `forward`, transposed

Blocks are features first and samples last: "F/s/g B/d", with B the samples, or the tokens of all
samples one after another. Padding rows of every r and of every g are 0. Numbers come and go in the
total type (tpmlp.kernels.execution); products convert them.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from tpmlp.graph.placement import Node
from tpmlp.kernels.execution import Execution
from tpmlp.kernels.padding import clear_rows

Params = dict[str, jax.Array]


class Given(NamedTuple):
    """What a pass is given beside parameters and inputs.

    Attributes:
        run: types and choices.
        sizes: devices on each mesh axis.
        words: two words of random bits, from the key; None where nothing is dropped.
        first_sample: number of this device's first sample in the whole batch.
        share: what each sample counts in the objective, "B/d"; None where no vertex adds to it.
        seeds: by vertex whose name in the graph is known when the program runs: what stands for it
            in random draws; seed_of the name for the others.
    """

    run: Execution
    sizes: dict[str, int]
    words: jax.Array | None
    first_sample: Any
    share: jax.Array | None
    seeds: Mapping[str, jax.Array] = MappingProxyType({})


class Gradients(NamedTuple):
    """What a rule's backward pass gives.

    Attributes:
        inputs: by each input, laid out as it; None for ids.
        params: by each parameter, a sum over this device's samples, "+d".
        later: ready -> more of `params`, for which an input is gathered once `ready` is there.
    """

    inputs: tuple[jax.Array | None, ...]
    params: Params
    later: Callable[[jax.Array], Params] | None = None


# read(i) is input i, in the total type; read(i, after) is not there before another array is.
Reader = Callable[..., jax.Array]


class Rule(NamedTuple):
    """How a kind computes.

    Attributes:
        forward: (node, params, inputs, given) -> (r, residue); residue is what `rebuild` and
            `backward` can use of it, small, or None.
        backward: (node, params, read, residue, g, given) -> Gradients.
        reads: which inputs `backward` reads; None is all.
        rebuild: (node, params, inputs, residue, given) -> r again, without a collective; None
            where r is kept instead.
        residue: the residue's layout, None where there is none.
    """

    forward: Callable[..., tuple[jax.Array, Any]]
    backward: Callable[..., Gradients]
    reads: tuple[int, ...] | None = ()
    rebuild: Callable[..., jax.Array] | None = None
    residue: str | None = None


def clear(array: jax.Array, node: Node) -> jax.Array:
    """Set the padding rows of a block "F/s/g B/d" of a node to 0."""
    if node.width == node.padded_width:
        return array
    return clear_rows(array, node.width, "F/s/g", **node.axes)
