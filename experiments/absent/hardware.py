"""Devices that are only described, by the names that they have in the table."""

from collections.abc import Sequence
from dataclasses import dataclass

import tpmlp
from experiments.command import SettingError
from tpmlp.planner.topology import parse_topology

SIMULATED = 8


@dataclass(frozen=True, slots=True)
class Hardware:
    """One kind and number of devices.

    Attributes:
        topology: as tpmlp.compile_for takes it.
        x: of the mesh.
        y: of the mesh.
    """

    topology: str
    x: int
    y: int

    @property
    def num_devices(self) -> int:
        """How many there are."""
        return self.x * self.y


HARDWARE = {
    "64 H100": Hardware("h100:8x8", x=8, y=8),
    "64 v5p": Hardware("v5p:4x4x4", x=8, y=8),
    "256 v6e": Hardware("v6e:16x16", x=16, y=16),
    "8 H100": Hardware("h100:8", x=8, y=1),
    "8 v5p": Hardware("v5p:2x2x2", x=8, y=1),
    "8 CPU": Hardware("cpu:8", x=4, y=2),
}


def start(names: Sequence[str]) -> None:
    """Let JAX run on simulated CPU devices, and check that the compilers are there.

    Raises:
        SettingError: one is not.
        RuntimeError: JAX has started with other devices.
    """
    for name in names:
        try:
            parse_topology(HARDWARE[name].topology).check_installed()
        except ModuleNotFoundError as error:
            raise SettingError(f"{error}. make absent installs it; or leave out {name}.") from error
    tpmlp.simulate_devices(SIMULATED)
