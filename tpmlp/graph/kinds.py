"""What vertices can be: each kind's settings, the shape it gives, the parameters it has.

No arrays: how a kind computes on its devices is in the rules (tpmlp.graph.rules), and what it
computes, unsharded, in the plain functions that they are checked against (tpmlp.graph.plain). JAX
is here only to try a user's function without numbers.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from tpmlp.activations import Activation as Sigma
from tpmlp.activations import get_activation
from tpmlp.checks import check_count, check_flag
from tpmlp.graph.shape import Parameter, Shape


class Kind(ABC):
    """What a vertex computes.

    Attributes:
        num_inputs: how many in-neighbours it has; None is one or more.
    """

    num_inputs: ClassVar[int | None] = 1

    @property
    def label(self) -> str:
        """What tables and pictures call it."""
        return type(self).__name__

    @abstractmethod
    def shape(self, *inputs: Shape) -> Shape:
        """Return the shape of the output.

        Raises:
            ValueError: inputs that do not fit, as a sentence that follows the vertex's name.
        """

    def parameters(self, *inputs: Shape) -> dict[str, Parameter]:
        """Return the arrays that are trained."""
        return {}


class Source(Kind):
    """A vertex without in-neighbours: what the user gives."""

    num_inputs = 0


@dataclass(frozen=True, slots=True)
class Input(Source):
    """Samples: vectors [B, width], or [B, tokens, width].

    Attributes:
        width: features.
        tokens: T, or None.
    """

    width: int
    tokens: int | None = None

    def __post_init__(self) -> None:
        check_count("width", self.width)
        if self.tokens is not None:
            check_count("tokens", self.tokens)

    def shape(self, *inputs: Shape) -> Shape:
        """Return [B, width] or [B, tokens, width]."""
        return Shape(self.width, self.tokens)


@dataclass(frozen=True, slots=True)
class Tokens(Source):
    """Ids of tokens, integers [B, tokens] in 0 .. vocabulary - 1.

    Attributes:
        tokens: T.
        vocabulary: how many ids there are.
    """

    tokens: int
    vocabulary: int

    def __post_init__(self) -> None:
        check_count("tokens", self.tokens)
        check_count("vocabulary", self.vocabulary)

    def shape(self, *inputs: Shape) -> Shape:
        """Return [B, tokens] ids."""
        return Shape(None, self.tokens, self.vocabulary)


@dataclass(frozen=True, slots=True)
class Dense(Kind):
    """W h + b, of each token alone.

    Attributes:
        width: of the output.
        bias: whether there is a b.
    """

    width: int
    bias: bool = True

    def __post_init__(self) -> None:
        check_count("width", self.width)
        check_flag("bias", self.bias)

    @property
    def label(self) -> str:
        """What tables and pictures call it."""
        return f"Dense({self.width})"

    def shape(self, *inputs: Shape) -> Shape:
        """Return the input's with another width."""
        (h,) = _vectors(inputs)
        return Shape(self.width, h.tokens)

    def parameters(self, *inputs: Shape) -> dict[str, Parameter]:
        """Return W [width, width of the input] and b [width]."""
        W = Parameter(("outputs", "inputs"), (self.width, inputs[0].features), "glorot")
        b = Parameter(("features",), (self.width,), 0.0)
        return {"W": W, "b": b} if self.bias else {"W": W}


@dataclass(frozen=True, slots=True)
class Activation(Kind):
    """sigma(z), elementwise.

    Attributes:
        activation: as in tpmlp.MLP: a name or a pair (sigma, sigma_prime).
    """

    activation: Any = "relu"
    sigma: Sigma = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigma", get_activation(self.activation))

    @property
    def label(self) -> str:
        """What tables and pictures call it."""
        return self.sigma.name

    def shape(self, *inputs: Shape) -> Shape:
        """Return the input's."""
        return _vectors(inputs)[0]


class _Elementwise(Kind):
    """Of several inputs of one shape."""

    num_inputs = None

    def shape(self, *inputs: Shape) -> Shape:
        """Return the shape that all inputs have."""
        first, *others = _vectors(inputs)
        for other in others:
            if other != first:
                raise ValueError(
                    f"must have inputs of one shape: got {first} and {other}. Give them the same "
                    "width with Dense."
                )
        return first


@dataclass(frozen=True, slots=True)
class Sum(_Elementwise):
    """The sum of the inputs: a residual connection."""


@dataclass(frozen=True, slots=True)
class Product(_Elementwise):
    """The elementwise product of the inputs: a gate."""


@dataclass(frozen=True, slots=True)
class Concatenate(Kind):
    """The features of all inputs, one after another."""

    num_inputs = None

    def shape(self, *inputs: Shape) -> Shape:
        """Return the sum of the widths."""
        first, *others = _vectors(inputs)
        for other in others:
            if other.tokens != first.tokens:
                raise ValueError(
                    f"must have inputs of as many tokens: got {first} and {other}. Take the mean "
                    "over tokens of the longer one first."
                )
        return Shape(sum(shape.features for shape in inputs), first.tokens)


@dataclass(frozen=True, slots=True)
class Slice(Kind):
    """Features start .. stop - 1 of the input; several of them split it.

    Attributes:
        start: the first feature, from 0.
        stop: the one after the last.
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        if self.start != 0 or isinstance(self.start, bool | float):
            check_count("start", self.start)
        if check_count("stop", self.stop) <= self.start:
            raise ValueError(f"stop must be above start: got start={self.start}, stop={self.stop}.")

    @property
    def label(self) -> str:
        """What tables and pictures call it."""
        return f"Slice({self.start}:{self.stop})"

    def shape(self, *inputs: Shape) -> Shape:
        """Return the input's with the width of the slice."""
        (h,) = _vectors(inputs)
        if self.stop > h.features:
            raise ValueError(
                f"must take features that are there: got stop={self.stop} of an input {h}."
            )
        return Shape(self.stop - self.start, h.tokens)


@dataclass(frozen=True, slots=True)
class Scale(Kind):
    """Each feature times a trained number, 1 at first."""

    def shape(self, *inputs: Shape) -> Shape:
        """Return the input's."""
        return _vectors(inputs)[0]

    def parameters(self, *inputs: Shape) -> dict[str, Parameter]:
        """Return scale [width]."""
        return {"scale": Parameter(("features",), (inputs[0].features,), 1.0)}


@dataclass(frozen=True, slots=True)
class Shift(Kind):
    """Each feature plus a trained number, 0 at first."""

    def shape(self, *inputs: Shape) -> Shape:
        """Return the input's."""
        return _vectors(inputs)[0]

    def parameters(self, *inputs: Shape) -> dict[str, Parameter]:
        """Return shift [width]."""
        return {"shift": Parameter(("features",), (inputs[0].features,), 0.0)}


@dataclass(frozen=True, slots=True)
class Positions(Kind):
    """Each token plus a trained vector of its place in the sample."""

    def shape(self, *inputs: Shape) -> Shape:
        """Return the input's."""
        return _tokens(_vectors(inputs))[0]

    def parameters(self, *inputs: Shape) -> dict[str, Parameter]:
        """Return shift [width, T]."""
        (h,) = inputs
        return {"shift": Parameter(("features", "whole"), (h.features, h.positions), "small")}


@dataclass(frozen=True, slots=True)
class Dropout(Kind):
    """Features set to 0 at random while training, the others divided by 1 - rate.

    Which ones is a function of the key, the vertex's place in the graph, the sample, the token and
    the feature: the same on every mesh.

    Attributes:
        rate: share of features that are dropped, in [0, 1).
    """

    rate: float

    def __post_init__(self) -> None:
        if not _is_number(self.rate) or not 0 <= self.rate < 1:
            raise ValueError(
                f"rate must be in [0, 1): got rate={self.rate!r}. Use for example 0.1."
            )

    @property
    def label(self) -> str:
        """What tables and pictures call it."""
        return f"Dropout({self.rate:g})"

    def shape(self, *inputs: Shape) -> Shape:
        """Return the input's."""
        return _vectors(inputs)[0]


@dataclass(frozen=True, slots=True)
class RMSNorm(Kind):
    """scale * h / sqrt(mean of h^2 over the features + epsilon), of each token alone.

    Attributes:
        epsilon: keeps the root above 0.

    References: Zhang and Sennrich 2019, Root mean square layer normalization.
    """

    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        _check_epsilon(self.epsilon)

    def shape(self, *inputs: Shape) -> Shape:
        """Return the input's."""
        return _vectors(inputs)[0]

    def parameters(self, *inputs: Shape) -> dict[str, Parameter]:
        """Return scale [width]."""
        return {"scale": Parameter(("features",), (inputs[0].features,), 1.0)}


@dataclass(frozen=True, slots=True)
class LayerNorm(Kind):
    """scale * (h - mean) / sqrt(variance + epsilon) + shift, of each token alone.

    Attributes:
        epsilon: keeps the root above 0.

    References: Ba, Kiros and Hinton 2016, Layer normalization.
    """

    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        _check_epsilon(self.epsilon)

    def shape(self, *inputs: Shape) -> Shape:
        """Return the input's."""
        return _vectors(inputs)[0]

    def parameters(self, *inputs: Shape) -> dict[str, Parameter]:
        """Return scale and shift [width]."""
        width = (inputs[0].features,)
        return {
            "scale": Parameter(("features",), width, 1.0),
            "shift": Parameter(("features",), width, 0.0),
        }


@dataclass(frozen=True, slots=True)
class Softmax(Kind):
    """exp(z) / sum of exp(z) over the features, of each token alone."""

    def shape(self, *inputs: Shape) -> Shape:
        """Return the input's."""
        return _vectors(inputs)[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention(Kind):
    """softmax(q^T k / sqrt(head width)) v, over the tokens, in heads; inputs q, k and v.

    Attributes:
        num_heads: heads of q.
        num_kv_heads: heads of k and v, each for as many heads of q; num_heads by default.
        causal: whether a token sees only itself and those before it.
        rotary: whether q and k are turned by angles that grow with the token's place, so that
            products depend on distances.

    References: Vaswani et al. 2017, Attention is all you need; Ainslie et al. 2023, GQA; Su et al.
    2021, RoFormer.
    """

    num_heads: int
    num_kv_heads: int | None = None
    causal: bool = False
    rotary: bool = False

    num_inputs = 3

    def __post_init__(self) -> None:
        check_flag("causal", self.causal)
        check_flag("rotary", self.rotary)
        check_count("num_heads", self.num_heads)
        if self.num_heads % check_count("num_kv_heads", self.kv_heads):
            raise ValueError(
                f"num_kv_heads must divide num_heads: got num_kv_heads={self.num_kv_heads}, "
                f"num_heads={self.num_heads}."
            )

    def splits_kv(self, num_devices: int) -> bool:
        """Return whether so many devices have whole heads of k and v each."""
        return self.kv_heads % num_devices == 0

    @property
    def kv_heads(self) -> int:
        """Heads of k and v."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def label(self) -> str:
        """What tables and pictures call it."""
        heads = (
            f"{self.num_heads}"
            if self.num_kv_heads is None
            else f"{self.num_heads}/{self.kv_heads}"
        )
        chosen = [name for name in ("causal", "rotary") if getattr(self, name)]
        return f"Attention({', '.join([heads, *chosen])})"

    def shape(self, *inputs: Shape) -> Shape:
        """Return that of q with the width of v's heads."""
        q, k, v = _tokens(_vectors(inputs))
        if not q.tokens == k.tokens == v.tokens:
            raise ValueError(f"must have q, k and v of as many tokens: got {q}, {k}, {v}.")
        for name, shape, heads in (("q", q, self.num_heads), ("k", k, self.kv_heads)):
            if shape.features % heads:
                raise ValueError(
                    f"must have heads that divide the width of {name}: got {heads} heads, {name} "
                    f"{shape}."
                )
        head = q.features // self.num_heads
        if k.features != self.kv_heads * head or v.features != k.features:
            raise ValueError(
                f"must have k and v of width {self.kv_heads * head}, {self.kv_heads} heads as wide "
                f"as those of q: got q {q}, k {k}, v {v}."
            )
        if self.rotary and head % 2:
            raise ValueError(f"must have heads of even width to turn them: got {head} of q {q}.")
        return q


@dataclass(frozen=True, slots=True)
class Embedding(Kind):
    """Row of a trained table for each id.

    Attributes:
        width: of the rows.
        split: what of the table is split on a mesh with one tensor axis: "features", which no
            collective is needed for; "vocabulary"; or "auto", the one that moves fewer bytes. With
            two axes both are.
    """

    width: int
    split: Literal["auto", "features", "vocabulary"] = "auto"

    def __post_init__(self) -> None:
        check_count("width", self.width)
        if self.split not in ("auto", "features", "vocabulary"):
            raise ValueError(
                "split must be one of ('auto', 'features', 'vocabulary'): got "
                f"split={self.split!r}."
            )

    @property
    def label(self) -> str:
        """What tables and pictures call it."""
        return f"Embedding({self.width})"

    def shape(self, *inputs: Shape) -> Shape:
        """Return [B, T, width]."""
        (ids,) = inputs
        if ids.width is not None:
            raise ValueError(f"must read ids of tokens: got {ids}. Use a vertex of kind Tokens.")
        return Shape(self.width, ids.tokens)

    def parameters(self, *inputs: Shape) -> dict[str, Parameter]:
        """Return W [vocabulary, width], which a Dense of the vocabulary can share."""
        (ids,) = inputs
        assert ids.vocabulary is not None
        return {"W": Parameter(("outputs", "inputs"), (ids.vocabulary, self.width), "small")}


@dataclass(frozen=True, slots=True)
class TokenMean(Kind):
    """The mean over the tokens of a sample."""

    def shape(self, *inputs: Shape) -> Shape:
        """Return [B, width]."""
        (h,) = _tokens(_vectors(inputs))
        return Shape(h.features)


@dataclass(frozen=True, slots=True)
class ActivityL1(Kind):
    """Its input, whose |h| it adds to the objective: coefficient * mean over samples of sum |h|.

    Attributes:
        coefficient: at least 0.
    """

    coefficient: float

    def __post_init__(self) -> None:
        if not _is_number(self.coefficient) or not 0 <= self.coefficient < math.inf:
            raise ValueError(
                f"coefficient must be a finite number of at least 0: got {self.coefficient!r}."
            )

    @property
    def label(self) -> str:
        """What tables and pictures call it."""
        return f"ActivityL1({self.coefficient:g})"

    def shape(self, *inputs: Shape) -> Shape:
        """Return the input's."""
        return _vectors(inputs)[0]


@dataclass(frozen=True, slots=True)
class Function(Kind):
    """A user's function of the inputs, differentiated by jax.vjp.

    Made by Vertex.from_function.

    Attributes:
        function: of arrays [B, width] or [B, T, width], one for each input; gives one array with
            as many samples, each of which depends on that sample alone.
        of: "gathered": it is given all features; every device computes all of it. "local": it is
            given the features that a device holds and must be elementwise.
    """

    function: Callable[..., Any]
    of: Literal["gathered", "local"] = "gathered"

    num_inputs = None

    def __post_init__(self) -> None:
        if not callable(self.function) or self.of not in ("gathered", "local"):
            raise ValueError(
                "function must be callable, and of one of ('gathered', 'local'): got "
                f"function={self.function!r}, of={self.of!r}."
            )
        try:
            hash(self.function)
        except TypeError as error:
            raise ValueError(
                "function must be hashable, as programs are found by it: got "
                f"function={self.function!r}. Give its class __hash__, or wrap it in a def."
            ) from error

    @property
    def label(self) -> str:
        """What tables and pictures call it."""
        return f"{getattr(self.function, '__name__', 'function')} ({self.of})"

    def shape(self, *inputs: Shape) -> Shape:
        """Return the shape that the function gives, tried without numbers."""
        batches = [self._try(num_samples, _vectors(inputs)) for num_samples in (2, 3)]
        if (
            any(shape[:1] != (n,) for shape, n in zip(batches, (2, 3), strict=True))
            or len({shape[1:] for shape in batches}) != 1
        ):
            raise ValueError(
                "must keep the batch: got a function that turns 2 and 3 samples into arrays of "
                f"shapes {batches[0]} and {batches[1]}. Return one row for each sample."
            )
        shape = batches[0]
        if len(shape) not in (2, 3):
            raise ValueError(f"must give [B, width] or [B, T, width]: got shape {shape} for B=2.")
        result = Shape(shape[-1], shape[1] if len(shape) == 3 else None)
        if self.of == "local" and any(result != given for given in inputs):
            raise ValueError(
                "must give the shape that its inputs have, as it is a function of local features: "
                f"got {', '.join(map(str, inputs))} and {result}. Use of='gathered'."
            )
        return result

    def _try(self, num_samples: int, inputs: tuple[Shape, ...]) -> tuple[int, ...]:
        def shape_of(shape: Shape) -> tuple[int, ...]:
            return tuple(n for n in (num_samples, shape.tokens, shape.width) if n is not None)

        arrays = [jax.ShapeDtypeStruct(shape_of(shape), jnp.float32) for shape in inputs]
        try:
            result = jax.eval_shape(self.function, *arrays)
        except Exception as error:
            raise ValueError(
                f"must have a function that takes {', '.join(str(a.shape) for a in arrays)}: got "
                f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            ) from error
        if not isinstance(result, jax.ShapeDtypeStruct) or not jnp.issubdtype(
            result.dtype, jnp.floating
        ):
            raise ValueError(f"must have a function that gives one array of floats: got {result}.")
        return result.shape


def _vectors(inputs: tuple[Shape, ...]) -> tuple[Shape, ...]:
    """Return shapes, none of which is one of ids."""
    for shape in inputs:
        if shape.width is None:
            raise ValueError(f"must read features: got {shape}. Use an Embedding first.")
    return inputs


def _tokens(inputs: tuple[Shape, ...]) -> tuple[Shape, ...]:
    """Return shapes, all of which have tokens."""
    for shape in inputs:
        if shape.tokens is None:
            raise ValueError(f"must read tokens [B, T, width]: got {shape}.")
    return inputs


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_epsilon(epsilon: Any) -> None:
    if not _is_number(epsilon) or not 0 < epsilon < math.inf:
        raise ValueError(
            f"epsilon must be a positive number: got epsilon={epsilon!r}. Use for example 1e-6."
        )
