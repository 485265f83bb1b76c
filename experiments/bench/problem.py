"""What is computed: an MLP of equal widths, relu, mean squared error; weights and data from a seed.

Every program of a comparison starts from the same arrays, so that all of them compute the same
loss and the same gradients, and tests can say so.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np

DType = Literal["float32", "bfloat16"]
# Features first: a sample is a column, z = W h with W [outputs, inputs].
# Batch first: a sample is a row, z = h W with W [inputs, outputs].
Form = Literal["features first", "batch first"]
FORMS: tuple[Form, ...] = ("features first", "batch first")


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """The size of a problem.

    Attributes:
        d: width of every layer, of the samples and of the targets.
        layers: number of W_l.
        batch: samples.
    """

    d: int
    layers: int
    batch: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the size that a text means.

        Raises:
            ValueError: not three positive integers.

        Examples:
            >>> Size.parse("1024x8x128")
            Size(d=1024, layers=8, batch=128)
        """
        parts = text.split("x")
        if len(parts) != 3 or not all(part.isascii() and part.isdigit() for part in parts):
            raise ValueError(
                f"size must be d x layers x batch: got {text!r}. Use for example 1024x8x128."
            )
        d, layers, batch = map(int, parts)
        if min(d, layers, batch) < 1:
            raise ValueError(f"size must be positive: got {text!r}. Use for example 1024x8x128.")
        return cls(d=d, layers=layers, batch=batch)

    def __str__(self) -> str:
        return f"{self.d}x{self.layers}x{self.batch}"

    @property
    def product_flops(self) -> int:
        """FLOPs of the products of one step: z, dW and dh of each layer, but dh of the first."""
        return 2 * self.d * self.d * self.batch * (3 * self.layers - 1)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Problem:
    """Arrays on the host, float32.

    Attributes:
        size: their size.
        layers: (W_l [d, d], b_l [d]) for each layer.
        x: samples [B, d].
        y: targets [B, d].
    """

    size: Size
    layers: tuple[tuple[np.ndarray, np.ndarray], ...]
    x: np.ndarray
    y: np.ndarray

    def arranged(self, form: Form) -> tuple[list[tuple[np.ndarray, np.ndarray]], Any, Any]:
        """Return layers, samples and targets as a form has them."""
        if form == "features first":
            return list(self.layers), self.x.T, self.y.T
        return [(W.T, b) for W, b in self.layers], self.x, self.y


def make_problem(size: Size, seed: int) -> Problem:
    """Draw a problem; weights have variance 2/d, so that activations keep their scale."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return scale * rng.standard_normal(shape, np.float32)

    d, scale = size.d, math.sqrt(2 / size.d)
    layers = tuple((normal(d, d, scale=scale), normal(d, scale=0.1)) for _ in range(size.layers))
    return Problem(size=size, layers=layers, x=normal(size.batch, d), y=normal(size.batch, d))
