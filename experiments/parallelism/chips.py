"""Devices and links that people have, as their makers state them.

NVIDIA's data sheets: A100 (SXM, 80 GB), 312 dense bfloat16 TFLOP/s, NVLink 600 GB/s; H100 (SXM),
989 and 900. A link's number counts both ways; half of it is what a device receives. InfiniBand, one
port a device: HDR 200 Gbit/s, NDR 400 Gbit/s. Products and links that are busy reach less of both.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

ChipName = Literal["A100", "H100"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chip:
    """A device.

    Attributes:
        flops_per_s: of bfloat16 products.
        links: bytes_per_s that it receives over each link.
    """

    flops_per_s: float
    links: Mapping[str, float]


CHIPS: Mapping[ChipName, Chip] = {
    "A100": Chip(flops_per_s=312e12, links={"InfiniBand HDR": 25e9, "NVLink": 300e9}),
    "H100": Chip(flops_per_s=989e12, links={"InfiniBand NDR": 50e9, "NVLink": 450e9}),
}
