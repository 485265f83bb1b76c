"""Chips that people rent, as their makers state them, and what was measured of them.

A maker's number of a link counts both ways; half of it is what a device receives. Peaks are of
dense products; float32 is what JAX multiplies in by default, TF32 on GPUs and bfloat16 on TPUs,
which have no float64. Capacities are 10^9 bytes; a runtime keeps some of them for itself.

Measured: on H100 products in bfloat16 (1024 x 1024 x 1024 and up) and NCCL collectives of 2 and 4
devices (notes/performance.md, section E of this project, which does not name where they are from).
Assumed, where nothing was measured: that a chip reaches the shares of its peak that H100 does, or
for TPUs TPU_PRODUCTS; and that collectives reach BUSY of a link. Each says so in its `sources`.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from tpmlp.planner.hardware import Hardware, Level, Measured

US, KIB, MIB, GIB = 1e-6, 2**10, 2**20, 2**30

# Shares of 989 TFLOP/s: 253, 418 (256 x 4096 x 4096), 641, 752 (1024 x 4096 x 4096), 780.
H100_PRODUCTS = (
    (1024.0, 0.256),
    (1625.5, 0.423),
    (2048.0, 0.648),
    (2580.3, 0.760),
    (4096.0, 0.789),
)
# A systolic array is full from a few of its own 128 or 256 rows on; the rest is memory's rate.
TPU_PRODUCTS = ((256.0, 0.5), (2048.0, 0.9))
# Of its link a collective of 1 GiB reaches on H100: 0.72 (all-gather of 4) to 0.77 (all-reduce).
BUSY = 0.75

SIZES = (64 * KIB, MIB, 8 * MIB, 64 * MIB, 256 * MIB, GIB)


def _curve(*microseconds: float) -> tuple[tuple[float, float], ...]:
    return tuple((size, us * US) for size, us in zip(SIZES, microseconds, strict=True))


H100_COLLECTIVES: Measured = {
    "all_gather": {
        2: _curve(11.8, 17.5, 40.2, 161, 549, 1997),
        4: _curve(13.9, 20.5, 56.7, 196, 666, 2473),
    },
    "reduce_scatter": {
        2: _curve(18.2, 15.7, 42.7, 221, 773, 2756),
        4: _curve(14.5, 29.1, 54.8, 224, 774, 2892),
    },
    "all_reduce": {
        2: _curve(15.2, 21.0, 72.9, 330, 1182, 4433),
        4: _curve(18.0, 43.5, 85.0, 395, 1420, 5415),
    },
}

MEASURED = (
    "bfloat16 products and NCCL collectives of 2 and 4 GPUs: measured, by whom is not recorded; "
    "larger groups take what 4 do for the bytes that a device receives"
)
ASSUMED_GPU = f"assumed: H100's shares of the peak, {BUSY} of a link, 2 us a step of a ring"
BETWEEN_NODES = f"assumed: one port a GPU, {BUSY} of it, 5 us a step of a ring"


def _gpu(
    name: str,
    *,
    peaks: tuple[float, float, float],
    memory_gb: float,
    memory_tb_per_s: float,
    nvlink_gb_per_s: float,
    port: tuple[str, float],
    sources: tuple[str, ...],
    measured: Measured | None = None,
) -> Hardware:
    """Return a GPU in nodes of 8; peaks in TFLOP/s of bfloat16, float32 and float64."""
    port_name, port_gb_per_s = port
    return Hardware(
        name=name,
        platform="gpu",
        flops_per_s=dict(zip(("bfloat16", "float32", "float64"), _tera(*peaks), strict=True)),
        memory_bytes=memory_gb * 1e9,
        memory_bytes_per_s=memory_tb_per_s * 1e12,
        products=H100_PRODUCTS,
        levels=(
            Level(
                name="NVLink",
                devices=8,
                bytes_per_s=BUSY * nvlink_gb_per_s * 1e9,
                latency_s=2 * US,
                measured=measured or {},
            ),
            Level(
                name=port_name,
                devices=None,
                bytes_per_s=BUSY * port_gb_per_s * 1e9,
                latency_s=5 * US,
            ),
        ),
        sources=sources,
    )


def _tpu(
    name: str,
    *,
    bfloat16_tflops: float,
    memory_gb: float,
    memory_gb_per_s: float,
    link_gb_per_s: float,
    pod: int,
    network_gbit_per_s: float,
    source: str,
) -> Hardware:
    """Return a TPU in pods; a mesh axis has one torus axis, on which a ring goes both ways."""
    return Hardware(
        name=name,
        platform="tpu",
        flops_per_s=dict.fromkeys(("bfloat16", "float32"), *_tera(bfloat16_tflops)),
        memory_bytes=memory_gb * 1e9,
        memory_bytes_per_s=memory_gb_per_s * 1e9,
        products=TPU_PRODUCTS,
        levels=(
            Level(
                name="ICI",
                devices=pod,
                bytes_per_s=BUSY * 2 * link_gb_per_s * 1e9,
                latency_s=1 * US,
            ),
            Level(
                name="DCN",
                devices=None,
                bytes_per_s=BUSY * network_gbit_per_s / 8 * 1e9,
                latency_s=20 * US,
            ),
        ),
        sources=(
            source,
            "Austin et al., How to Scale Your Model, 2025, Rooflines: rate of a link, one way",
            f"assumed: shares of the peak {TPU_PRODUCTS}, {BUSY} of a link, 1 us a step of a ring "
            "(20 us between pods), one torus axis for each mesh axis, wrapped round",
        ),
    )


def _tera(*numbers: float) -> tuple[float, ...]:
    return tuple(number * 1e12 for number in numbers)


CHIPS: Mapping[str, Hardware] = {
    chip.name: chip
    for chip in (
        _gpu(
            "a100",
            peaks=(312, 156, 19.5),
            memory_gb=80,
            memory_tb_per_s=2.039,
            nvlink_gb_per_s=300,
            port=("InfiniBand HDR", 25),
            sources=(
                "NVIDIA A100 Tensor Core GPU data sheet, SXM 80 GB; NVLink 600 GB/s both ways",
                ASSUMED_GPU,
                BETWEEN_NODES,
            ),
        ),
        _gpu(
            "h100",
            peaks=(989, 494, 67),
            memory_gb=80,
            memory_tb_per_s=3.35,
            nvlink_gb_per_s=450,
            port=("InfiniBand NDR", 50),
            measured=H100_COLLECTIVES,
            sources=(
                "NVIDIA H100 Tensor Core GPU data sheet, SXM; NVLink 900 GB/s both ways",
                MEASURED,
                BETWEEN_NODES,
            ),
        ),
        _gpu(
            "h200",
            peaks=(989, 494, 67),
            memory_gb=141,
            memory_tb_per_s=4.8,
            nvlink_gb_per_s=450,
            port=("InfiniBand NDR", 50),
            measured=H100_COLLECTIVES,
            sources=(
                "NVIDIA H200 Tensor Core GPU data sheet, SXM; NVLink 900 GB/s both ways",
                f"assumed: as H100, whose processor and links it has; there {MEASURED}",
                BETWEEN_NODES,
            ),
        ),
        _gpu(
            "b200",
            peaks=(2250, 1100, 40),
            memory_gb=180,
            memory_tb_per_s=8.0,
            nvlink_gb_per_s=900,
            port=("InfiniBand NDR", 50),
            sources=(
                "NVIDIA HGX B200 data sheet, half of its sparse peaks; NVLink 1800 GB/s both ways",
                ASSUMED_GPU,
                BETWEEN_NODES,
            ),
        ),
        _tpu(
            "tpu-v5e",
            bfloat16_tflops=197,
            memory_gb=16,
            memory_gb_per_s=819,
            link_gb_per_s=45,
            pod=256,
            network_gbit_per_s=25,
            source="cloud.google.com/tpu/docs/v5e; the network is 6.4 Tbit/s of 256 chips",
        ),
        _tpu(
            "tpu-v5p",
            bfloat16_tflops=459,
            memory_gb=95,
            memory_gb_per_s=2765,
            link_gb_per_s=90,
            pod=8960,
            network_gbit_per_s=50,
            source="cloud.google.com/tpu/docs/v5p",
        ),
        _tpu(
            "tpu-v6e",
            bfloat16_tflops=918,
            memory_gb=32,
            memory_gb_per_s=1600,
            link_gb_per_s=90,
            pod=256,
            network_gbit_per_s=100,
            source="cloud.google.com/tpu/docs/v6e; the network is 25.6 Tbit/s of 256 chips",
        ),
    )
}


def find_chip(name: Any) -> Hardware:
    """Return the chip of a name, in small or capital letters, "v5p" for "tpu-v5p".

    Raises:
        ValueError: an unknown name; says which are near.
    """
    written = name.lower() if isinstance(name, str) else ""
    for known in (written, f"tpu-{written}"):
        if known in CHIPS:
            return CHIPS[known]
    near = difflib.get_close_matches(written, [*CHIPS, "v5e", "v5p", "v6e"], n=2, cutoff=0.4)
    meant = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(
        f"hardware must be one of {tuple(CHIPS)} or a Hardware: got hardware={name!r}. {meant}"
        "Describe your own with tpmlp.planner.hardware.Hardware."
    )
