"""Devices that are only described: enough of them to compile a program, none to run it on.

A topology is a chip and how many of it lie along each physical dim:

    "v5p:4x4x4"   TPUs, a torus of 4 x 4 x 4 chips; v5e and v6e have two dims
    "h100:8x8"    GPUs, 8 nodes of 8; "h100:8" is one node
    "cpu:8"       simulated CPU devices, which are here: tpmlp.simulate_devices

The compilers come with the extras tpu and cuda. They are asked for devices without any being
there: libtpu by the name of the topology, the CUDA plugin by what such a GPU would answer.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, Literal

import jax
from jax.experimental import topologies

EXAMPLES = "'v5p:4x4x4', 'v6e:16x16', 'h100:8x8' or 'cpu:8'"

# libtpu looks for the TPU that it should run on, and for other programs that use it.
_FOR_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}

# JAX's plugin does not start without a GPU unless it is told to leave its checks out.
_FOR_CUDA = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
_GPU = Path("/dev/nvidiactl")


@dataclass(frozen=True, kw_only=True, slots=True)
class Chip:
    """A kind of device.

    Attributes:
        platform: JAX's name of its compiler.
        sizes: how many sizes a topology of it may have.
        module: the Python module that brings the compiler; None is JAX itself.
        extra: the extra of tpmlp that brings the module.
    """

    platform: Literal["tpu", "cuda", "cpu"]
    sizes: tuple[int, ...]
    module: str | None = None
    extra: str | None = None


def _tpu(num_dims: int) -> Chip:
    return Chip(platform="tpu", sizes=(num_dims,), module="libtpu", extra="tpu")


# Not tpu7x: an audit does not see the collectives that its compiler gives to the sparse cores.
CHIPS = {
    "v5e": _tpu(2),
    "v5p": _tpu(3),
    "v6e": _tpu(2),
    "h100": Chip(platform="cuda", sizes=(1, 2), module="jax_cuda13_plugin", extra="cuda"),
    "cpu": Chip(platform="cpu", sizes=(1,)),
}


@dataclass(frozen=True, slots=True)
class Topology:
    """A chip, and how many of it lie along each physical dim.

    Attributes:
        name: of the chip, a key of CHIPS.
        sizes: chips along each dim.
    """

    name: str
    sizes: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """The kind of device."""
        return CHIPS[self.name]

    @property
    def num_devices(self) -> int:
        """How many devices there are."""
        return prod(self.sizes)

    def __str__(self) -> str:
        return f"{self.name}:{'x'.join(map(str, self.sizes))}"

    def check_installed(self) -> None:
        """Refuse a topology whose compiler is not installed.

        Raises:
            ModuleNotFoundError: says how to install it.
        """
        module = self.chip.module
        if module is not None and find_spec(module) is None:
            raise ModuleNotFoundError(
                f"topology must be one whose compiler is there: got topology='{self}', and "
                f"{module} is not installed. pip install 'tpmlp[{self.chip.extra}]'",
                name=module,
            )

    def devices(self) -> Sequence[Any]:
        """Return the devices; the same ones each time.

        Raises:
            ModuleNotFoundError: the compiler is not installed.
            ValueError: of "cpu:n", there are fewer in this process.
        """
        self.check_installed()
        return _devices(self)


def parse_topology(topology: Any) -> Topology:
    """Return the topology that a text means, or refuse it.

    Raises:
        ValueError: an unknown chip, sizes that are none, or that the chip cannot have.

    Examples:
        >>> parse_topology("v5p:4x4x4").num_devices, parse_topology("h100:8x8").num_devices
        (64, 64)
    """
    found = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)", str(topology).strip().lower())
    if not isinstance(topology, str) or found is None:
        raise ValueError(
            f"topology must be a chip and its sizes, as {EXAMPLES}: got topology={topology!r}. "
            f"Chips are {', '.join(CHIPS)}."
        )
    name, sizes = found[1], tuple(map(int, found[2].split("x")))
    if name not in CHIPS:
        raise ValueError(
            f"topology must name a chip that is known: got topology={topology!r}. The nearest are "
            f"{' and '.join(get_close_matches(name, CHIPS, n=2, cutoff=0))}; all are "
            f"{', '.join(CHIPS)}."
        )
    _check_sizes(topology, name, sizes)
    return Topology(name, sizes)


def _check_sizes(topology: str, name: str, sizes: tuple[int, ...]) -> None:
    chip = CHIPS[name]
    if len(sizes) not in chip.sizes:
        wanted = " or ".join(map(str, chip.sizes))
        example = "x".join("4" * chip.sizes[-1])
        raise ValueError(
            f"topology of {name} must have {wanted} size{'s' * (wanted != '1')}: got "
            f"topology={topology!r}. Use for example '{name}:{example}'."
        )
    if chip.platform == "tpu" and any(size > 1 and size % 2 for size in sizes[:2]):
        even = "x".join(str(n + (n > 1 and n % 2)) for n in sizes[:2])
        rest = "".join(f"x{n}" for n in sizes[2:])
        raise ValueError(
            f"topology of {name} must be whole hosts of 2x2 chips, its first two sizes even or 1: "
            f"got topology={topology!r}. Use for example '{name}:{even}{rest}'."
        )


@cache
def _devices(topology: Topology) -> Sequence[Any]:
    make = {"tpu": _tpu_devices, "cuda": _cuda_devices, "cpu": _cpu_devices}
    return make[topology.chip.platform](topology)


def _tpu_devices(topology: Topology) -> Sequence[Any]:
    # A host has 2 x 2 chips; where there are fewer along a dim, fewer.
    host = [min(size, most) for size, most in zip(topology.sizes, (2, 2, 1), strict=False)]
    bounds = (*host, 1)[:3]
    with _environment(_FOR_LIBTPU):
        return topologies.get_topology_desc(
            platform="tpu", topology_name=str(topology), chips_per_host_bounds=bounds
        ).devices


def _cuda_devices(topology: Topology) -> Sequence[Any]:
    nodes, gpus = (1, *topology.sizes)[-2:]
    answers = files("tpmlp.planner").joinpath(f"{topology.name}.txtpb").read_text("utf-8")
    try:
        with _environment({} if _GPU.exists() else _FOR_CUDA):
            return topologies.get_topology_desc(
                platform="cuda",
                topology_name=topology.name,
                topology=f"1x{nodes}x{gpus}",
                target_config=answers,
            ).devices
    except NotImplementedError as error:
        raise RuntimeError(
            f"topology='{topology}' must have JAX's CUDA plugin, which has not started: without a "
            "GPU call compile_for before JAX starts, or set JAX_PLATFORMS=cpu."
        ) from error


def _cpu_devices(topology: Topology) -> Sequence[Any]:
    there, needed = jax.devices("cpu"), topology.num_devices
    if len(there) < needed:
        raise ValueError(
            f"topology must be CPU devices that this process has: got topology='{topology}', "
            f"devices={len(there)}. Call tpmlp.simulate_devices({needed}) before JAX starts."
        )
    return there[:needed]


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables that are not set, for a while."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
