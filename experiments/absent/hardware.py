"""Devices that are only described: enough of them to compile a program, none to run it on."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

import tpmlp
from experiments.command import require

# What the CUDA compiler asks a GPU for, as an H100 SXM with 80 GB answers.
H100 = Path(__file__).with_name("h100.txtpb")
SIMULATED = 8

# libtpu looks for the TPU that it should run on, and for other programs that use it.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """One kind and number of devices.

    Attributes:
        devices: makes them.
        x: of the mesh.
        y: of the mesh.
        module: the Python module that brings the compiler; None is JAX itself.
        extra: the extra of this package that brings the module.
    """

    devices: Callable[[], Sequence[Any]]
    x: int
    y: int
    module: str | None = None
    extra: str | None = None

    @property
    def num_devices(self) -> int:
        """How many there are."""
        return self.x * self.y

    def mesh(self) -> Mesh:
        """Return the mesh of these devices."""
        return tpmlp.make_mesh(x=self.x, y=self.y, devices=self.devices())


def _tpu(topology: str, x: int, y: int) -> Hardware:
    def devices() -> Sequence[Any]:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices

    return Hardware(devices=devices, x=x, y=y, module="libtpu", extra="tpu")


def _h100(x: int, y: int) -> Hardware:
    def devices() -> Sequence[Any]:
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name="h100",
            topology=f"1x{x * y // 8}x8",
            target_config=H100.read_text(encoding="utf-8"),
        ).devices

    return Hardware(devices=devices, x=x, y=y, module="jax_cuda13_plugin", extra="cuda")


HARDWARE = {
    "64 H100": _h100(8, 8),
    "64 v5p": _tpu("v5p:4x4x4", 8, 8),
    "256 v6e": _tpu("v6e:16x16", 16, 16),
    "8 H100": _h100(8, 1),
    "8 v5p": _tpu("v5p:2x2x2", 8, 1),
    "8 CPU": Hardware(devices=jax.devices, x=4, y=2),
}


def start(names: Sequence[str]) -> None:
    """Let JAX run on simulated CPU devices, and check that the compilers are there.

    Raises:
        SettingError: one is not.
        RuntimeError: JAX has started with other devices.
    """
    for name in names:
        module, extra = HARDWARE[name].module, HARDWARE[name].extra
        require(
            module is None or find_spec(module) is not None,
            f"{name} must have {module}, which is not installed",
            f"make absent installs it, as does pip install 'tpmlp[{extra}]'; or leave it out.",
            hardware=name,
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    tpmlp.simulate_devices(SIMULATED)
