"""What verify found: every tensor's error and bound, and the first operation that is wrong."""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tpmlp.inspection.bounds import Phase
from tpmlp.table import text_table

Kind = Literal["float64", "integers", "float32"]
KINDS: tuple[Kind, ...] = ("float64", "integers", "float32")

MOST_WORDS = 12  # that a title lists one by one


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One tensor compared.

    Attributes:
        tensor: for example "g_2"; of a Graph "r[up]", "g[up]" and "d[up.W]".
        error: the largest difference, in the unit that `bound` has.
        bound: what it may be at most.
        end_to_end: max |a - b| / max |b| against the reference.
    """

    tensor: str
    error: float
    bound: float
    end_to_end: float

    @property
    def ok(self) -> bool:
        """Whether the error is within its bound; NaN is not."""
        return self.error <= self.bound


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """The first operation that rounding cannot explain.

    Attributes:
        tensor: what it computes, for example "g_2" or "g[up]".
        layer: whose forward or backward pass it belongs to: l, 1-based; of a Graph the vertex's
            name, of several that may be wrong all names.
        phase: "forward", "loss" or "backward".
        devices: where it is wrong: ids of devices, or "all" of those that hold a part of it.
    """

    tensor: str
    layer: int | str
    phase: Phase
    devices: tuple[int, ...] | Literal["all"]

    def __str__(self) -> str:
        ids = "all devices" if self.devices == "all" else f"device {_listed(self.devices)}"
        of = f"layer {self.layer}" if isinstance(self.layer, int) else f'vertex "{self.layer}"'
        return f"{self.tensor}, {self.phase} pass of {of}, on {ids}"


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Report:
    """What `verify` found.

    Attributes:
        kind: "float64", "integers" or "float32".
        mesh: devices on each axis.
        words: the role of each matrix.
        checks: one for each tensor.
        fault: the first operation that rounding cannot explain, or None.
    """

    kind: Kind
    mesh: dict[str, int]
    words: tuple[str, ...]
    checks: tuple[Check, ...]
    fault: Fault | None

    @property
    def ok(self) -> bool:
        """Whether every tensor is within its bound, and every operation."""
        return self.fault is None and all(check.ok for check in self.checks)

    @property
    def verdict(self) -> Literal["rounding", "bug"]:
        """What the differences are."""
        return "rounding" if self.ok else "bug"

    @property
    def worst(self) -> Check:
        """The check with the largest error relative to its bound."""
        return max(self.checks, key=_severity)

    def __str__(self) -> str:
        axes = " ".join(f"{name}={size}" for name, size in self.mesh.items())
        unit = {
            "float64": "max|a-b| / max|b|",
            "integers": "max|a-b|",
            "float32": "error / bound of the operation",
        }[self.kind]
        rows = [
            (
                c.tensor,
                *(f"{e:.1e}" for e in (c.error, c.bound, c.end_to_end)),
                "ok" if c.ok else "WRONG",
            )
            for c in self.checks
        ]
        headers = ["tensor", "error", "bound", "end to end", "verdict"]
        title = f"{self.kind} on {axes}, {_listed_words(self.words)}; error is {unit}"
        where = "" if self.fault is None else f": {self.fault}"
        return f"{title}\n{text_table(headers, rows)}\n{self.verdict}{where}"

    __repr__ = __str__


def _listed(devices: tuple[int, ...]) -> str:
    return ", ".join(map(str, devices))


def _listed_words(words: tuple[str, ...]) -> str:
    if len(words) <= MOST_WORDS:
        return f"layers {' '.join(words)}"
    return "matrices: " + ", ".join(f"{n} {word}" for word, n in Counter(words).items())


def _severity(check: Check) -> float:
    if np.isnan(check.error):
        return np.inf
    return check.error / check.bound if check.bound else check.error
