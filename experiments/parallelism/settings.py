"""The settings of make parallelism, and what is refused of them before anything starts."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from experiments.command import require
from experiments.parallelism.chips import ChipName
from experiments.parallelism.ways import CHUNKS
from experiments.record import plain

Part = Literal["counted", "modelled", "measured", "schedules", "published"]

# The settings that a part depends on.
SETTINGS: Mapping[Part, tuple[str, ...]] = {
    "counted": ("devices", "microbatches", "width", "layers", "batch_size"),
    "modelled": (
        "devices",
        "microbatches",
        "chip",
        "model_width",
        "model_layers",
        "model_batch_size",
        "bandwidths",
        "most_microbatches",
        "latency_s",
    ),
    "measured": (
        "measured_width",
        "measured_layers",
        "measured_batch_size",
        "measured_microbatches",
        "rounds",
    ),
    "schedules": (),
    "published": (),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Compare tensor parallel, pipeline parallel and mixtures.

    Attributes:
        parts: what to do; the others are kept from an earlier run in OUT.
        devices: numbers of devices, M, each a power of two.
        microbatches: m of what is counted and modelled, a multiple of every M.
        width: d of the model that is compiled.
        layers: its layers, at least two for each device.
        batch_size: its samples.
        chip: A100 or H100, whose rate and links are modelled.
        model_width: d of the model whose time is modelled.
        model_layers: its layers.
        model_batch_size: its samples, of a token each.
        bandwidths: number of links that are modelled, from 1 GB/s to 10 TB/s.
        most_microbatches: the turning point is modelled for m = 1, 2, 4 ... up to this.
        latency_s: of a collective or a message, modelled.
        measured_width: d of the model whose time is measured.
        measured_layers: its layers.
        measured_batch_size: its samples.
        measured_microbatches: numbers of its microbatches, m.
        rounds: how often each way is timed.
        out: folder for parallelism.json and the figures.
    """

    parts: tuple[Part, ...] = get_args(Part)
    devices: tuple[int, ...] = (2, 4, 8)
    microbatches: int = 16
    width: int = 512
    layers: int = 16
    batch_size: int = 1024
    chip: ChipName = "A100"
    model_width: int = 8192
    model_layers: int = 64
    model_batch_size: int = 8192
    bandwidths: int = 41
    most_microbatches: int = 32
    latency_s: float = 1e-5
    measured_width: int = 512
    measured_layers: int = 16
    measured_batch_size: int = 4096
    measured_microbatches: tuple[int, ...] = (2, 8)
    rounds: int = 5
    out: Path = Path("results/parallelism")

    def __post_init__(self) -> None:
        for name in ("bandwidths", "most_microbatches", "rounds", *self._sizes):
            value = getattr(self, name)
            require(value >= 1, f"{name} must be at least 1", "Use 1 or more.", **{name: value})
        require(
            bool(self.devices) and all(m in (2, 4, 8) for m in self.devices),
            "devices must be one number or more of 2, 4 and 8",
            "Use for example 2 4 8.",
            devices=self.devices,
        )
        require(
            0 <= self.latency_s < math.inf,
            "latency_s must be a finite number, at least 0",
            "Use 0 for none.",
            latency_s=self.latency_s,
        )
        most = max(self.devices)
        self._check_divides(most, "microbatches", "width", "model_width")
        self._check_divides(self.microbatches, "batch_size", "model_batch_size")
        self._check_divides(2, "measured_width")
        require(
            bool(self.measured_microbatches)
            and all(m >= 2 and m % 2 == 0 for m in self.measured_microbatches),
            "measured_microbatches must be one number or more, each a multiple of 2",
            "Use for example 2 8.",
            measured_microbatches=self.measured_microbatches,
        )
        for m in self.measured_microbatches:
            self._check_divides(m, "measured_batch_size")
        self._check_divides(self.most_microbatches, "model_batch_size")
        for name, chunks in (("layers", most), ("model_layers", most), ("measured_layers", 2)):
            layers, least = getattr(self, name), chunks * CHUNKS["interleaved"]
            require(
                layers >= least,
                f"{name} must be at least {least}, one for each chunk of a stage",
                f"Use {least} or more.",
                **{name: layers},
            )

    @property
    def _sizes(self) -> tuple[str, ...]:
        names = ("microbatches", "width", "layers", "batch_size")
        others = [f"{kind}_{name}" for kind in ("model", "measured") for name in names[1:]]
        return (*names, *others)

    def _check_divides(self, divisor: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            require(
                value % divisor == 0,
                f"{name} must be a multiple of {divisor}, for equal parts",
                f"Use {max(divisor, value // divisor * divisor)}.",
                **{name: value},
            )

    @property
    def path(self) -> Path:
        """The record."""
        return self.out / "parallelism.json"

    def earlier(self) -> dict[str, Any]:
        """Return the record of an earlier run, of whose parts some are kept; or an empty one.

        Raises:
            SettingError: a part to be kept was made with other settings.
        """
        kept = set(get_args(Part)) - set(self.parts)
        if not kept or not self.path.exists():
            return {}
        record = json.loads(self.path.read_text(encoding="utf-8"))
        mine = plain(asdict(self))
        for name in dict.fromkeys(name for part in kept for name in SETTINGS[part]):
            require(
                record["config"][name] == mine[name],
                f"what is kept of a record must have been made with the same {name}",
                f"Use {record['config'][name]}, or make that part anew.",
                **{name: mine[name]},
            )
        return record
