"""The settings of the main job, and what is refused of them before anything starts."""

import math
from dataclasses import dataclass
from pathlib import Path

from experiments.command import require
from experiments.data import Loss

MAX_SEED = 2**32 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Train an MLP split over devices, on scikit-learn's digits or on your own data.

    Attributes:
        data: a .npz with x [n, d] and y, or a .csv with a header; the digits by default.
        target: the column of a .csv to predict; by default the one named "target".
        loss: cross_entropy, mse or logistic; by default the one that y asks for.
        widths: hidden widths, separated by commas or spaces; '' is a linear model. The ends
            follow from the data.
        activation: relu, gelu, silu, tanh, sigmoid, softplus or identity.
        x: devices on the first tensor axis.
        y: devices on the second tensor axis.
        data_parallel: devices over which each batch is split.
        devices: CPU devices to simulate; by default as many as the mesh has. 0 takes real ones.
        layout: column, row, alternate, auto, or one word a layer, separated by commas.
        l2: coefficient of sum_l |W_l|^2.
        steps: training steps.
        batch: samples of one step.
        lr: Adam's learning rate, falling to 0 along a cosine.
        seed: of the initial weights and the order of the samples.
        seeds: number of runs, with seeds seed, seed + 1, ...; the figures are of the first.
        out: folder for the results; those of an earlier run there are replaced.
    """

    data: Path | None = None
    target: str | None = None
    loss: Loss | None = None
    widths: str = "128,128"
    activation: str = "relu"
    x: int = 4
    y: int = 2
    data_parallel: int = 1
    devices: int | None = None
    layout: str = "auto"
    l2: float = 1e-4
    steps: int = 600
    batch: int = 128
    lr: float = 3e-3
    seed: int = 0
    seeds: int = 1
    out: Path = Path("results/train")

    def __post_init__(self) -> None:
        self._check_widths()
        self._check_numbers()
        self._check_seeds()
        self._check_devices()

    @property
    def hidden(self) -> tuple[int, ...]:
        """The hidden widths."""
        return tuple(map(int, _words(self.widths)))

    @property
    def mesh_size(self) -> int:
        """The devices that the mesh needs."""
        return self.data_parallel * self.x * self.y

    @property
    def layout_words(self) -> str | tuple[str, ...]:
        """The layout as tpmlp.Strategy takes it."""
        words = tuple(_words(self.layout))
        return words if len(words) > 1 else self.layout

    def _check_widths(self) -> None:
        words = _words(self.widths)
        require(
            all(word.isascii() and word.isdigit() and int(word) > 0 for word in words),
            "widths must be positive integers separated by commas or spaces",
            "Use for example 128,128.",
            widths=repr(self.widths),
        )

    def _check_numbers(self) -> None:
        for name in ("x", "y", "data_parallel", "steps", "batch", "seeds"):
            value = getattr(self, name)
            require(value >= 1, f"{name} must be at least 1", "Use 1 or more.", **{name: value})
        require(
            0 < self.lr < math.inf,
            "lr must be a finite number above 0",
            "Use for example 0.003.",
            lr=self.lr,
        )
        require(
            0 <= self.l2 < math.inf,
            "l2 must be a finite number, at least 0",
            "Use 0 for no regulariser.",
            l2=self.l2,
        )

    def _check_seeds(self) -> None:
        require(
            0 <= self.seed <= MAX_SEED - (self.seeds - 1),
            f"seed must be at least 0, and the last one at most {MAX_SEED}",
            "Use for example 0.",
            seed=self.seed,
            seeds=self.seeds,
        )

    def _check_devices(self) -> None:
        require(
            self.devices is None or self.devices == 0 or self.devices >= self.mesh_size,
            f"devices must be at least the {self.mesh_size} of the mesh, or 0 for real ones",
            f"Use {self.mesh_size}, or leave it out.",
            devices=self.devices,
            x=self.x,
            y=self.y,
            data_parallel=self.data_parallel,
        )


def _words(text: str) -> list[str]:
    return text.replace(",", " ").split()
