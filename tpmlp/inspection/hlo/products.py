r"""The matrix products of a program.

They are written in three ways, alone or inside a fusion:

    dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, ...       CPU, CUDA
    custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", ...    CUDA; oneDNN's likewise
    convolution(%a, %b), dim_labels=bf_io->bf                            TPU

Products with a vector that the compiler writes as multiplications and a sum, and those that a
hand-written device kernel computes, are not seen.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np

from tpmlp.inspection.hlo.counts import Count, merged, times
from tpmlp.inspection.hlo.execution import Step, run
from tpmlp.inspection.hlo.text import Array, Instruction, Module, flat, integers, parse_shape

Dims: TypeAlias = tuple[int, ...]

_MATMUL_CALLS = ("__cublas$gemm", "__cublas$lt$matmul", "__onednn$matmul")
_DIM_LABELS = re.compile(r", dim_labels=(\w+)_(\w+)->(\w+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """Executions of `batch` products [m, k] @ [k, n], alike in everything.

    Attributes:
        m: rows of the result.
        k: length of the sums.
        n: columns of the result.
        batch: how many products one execution computes side by side.
        dtype: of the operands, "+" between two.
        count: executions; None where that depends on data.
        note: the condition under which `count` holds, such as a branch being taken; mostly empty.
    """

    m: int
    k: int
    n: int
    batch: int = 1
    dtype: str
    count: Count = 1
    note: str = ""

    @property
    def flops(self) -> int:
        """Additions and multiplications of one execution, 2 batch m k n."""
        return 2 * self.batch * self.m * self.k * self.n

    @property
    def total_flops(self) -> Count:
        """Additions and multiplications of all executions; None where `count` is."""
        return times(self.flops, self.count)

    def as_row(self) -> dict[str, Any]:
        """Return what it says as a plain dictionary, ready for JSON."""
        return asdict(self) | {"flops": self.flops, "total_flops": self.total_flops}

    def __str__(self) -> str:
        shape = f"{self.m} x {self.k} x {self.n}"
        return shape if self.batch == 1 else f"{self.batch} of {shape}"


def products(module: Module) -> tuple[Product, ...]:
    """Return the products of a program, alike ones as one, in program order."""
    return products_among(module, run(module))


def products_among(module: Module, steps: Iterable[Step]) -> tuple[Product, ...]:
    """Return the products among some steps of a program, alike ones as one."""
    return merged(_products(module, steps))


def _products(module: Module, steps: Iterable[Step]) -> Iterator[Product]:
    for step in steps:
        if step.count == 0 or not _is_product(step.instruction):
            continue
        line, lines = step.instruction, module.computations[step.computation]
        lhs, rhs, out = (_array(part) for part in (*map(lines.get, line.operands[:2]), line))
        read = _convolution if line.opcode == "convolution" else _product
        batch, m, k, n = read(line, lhs.dims, rhs.dims, out.dims)
        yield Product(
            m=m,
            k=k,
            n=n,
            batch=batch,
            dtype="+".join(dict.fromkeys((lhs.dtype, rhs.dtype))),
            count=step.count,
            note=step.note,
        )


def _is_product(line: Instruction) -> bool:
    if line.opcode == "custom-call":
        return line.target.startswith(_MATMUL_CALLS)
    return line.opcode in ("dot", "convolution")


def _array(line: Instruction | None) -> Array:
    """Return the result of a line; the first, where a workspace follows."""
    assert line is not None, "operands are lines of the same computation"
    return flat(parse_shape(line.shape))[0]


def _product(line: Instruction, lhs: Dims, rhs: Dims, out: Dims) -> Dims:
    """Return (batch, m, k, n) of a dot or of a library's product, in whatever order its dims are.

    The blocks hold m k, k n and m n entries, and the root of their product is m k n.
    """
    batch = math.prod(rhs[dim] for dim in _batch_dims(line, rhs))
    mk, kn, mn = (math.prod(dims) // batch for dims in (lhs, rhs, out))
    mkn = math.isqrt(mk * kn * mn)
    return batch, mkn // kn, mkn // mn, mkn // mk


def _batch_dims(line: Instruction, rhs: Dims) -> Dims:
    if line.opcode == "dot":
        found = re.search(r"rhs_batch_dims=\{([\d,]*)\}", line.attributes)
        return integers(found[1]) if found else ()
    if found := re.search(r'"rhs_batch_dimensions":\[([^\]]*)\]', line.attributes):
        return integers(found[1])
    return tuple(range(len(rhs) - 2))  # oneDNN's are the leading ones.


def _convolution(line: Instruction, lhs: Dims, rhs: Dims, out: Dims) -> Dims:
    """Return (batch, m, k, n) of a convolution: b and f are rows and columns, i is summed over.

    Spatial dims are the batch: each pair of a position of the result and one of the window that
    lies on an entry of the operand, neither on its padding nor between dilated entries, is one
    product. So TPU programs write batched products: a window that meets one entry at a time.
    """
    left, right, result = _DIM_LABELS.findall(line.attributes)[0]
    batch = 1
    for dim in filter(str.isdigit, result):
        window = {key: sizes.split("x")[int(dim)] for key, sizes in _window(line)}
        batch *= _meetings(lhs[left.index(dim)], out[result.index(dim)], window)
    return batch, out[result.index("b")], rhs[right.index("i")], out[result.index("f")]


def _window(line: Instruction) -> list[tuple[str, str]]:
    found = re.search(r", window=\{([^}]*)\}", line.attributes)
    return re.findall(r"(\w+)=(\S+)", found[1]) if found else []


def _meetings(entries: int, positions: int, window: dict[str, str]) -> int:
    """Return how many (position, place in the window) lie on one of the operand's entries."""
    size, stride, spread, gap = (
        int(window.get(key, 1)) for key in ("size", "stride", "rhs_dilate", "lhs_dilate")
    )
    padding = int(window.get("pad", "0_0").split("_")[0])
    places = np.add.outer(stride * np.arange(positions), spread * np.arange(size)) - padding
    return int(np.sum((places % gap == 0) & (places >= 0) & (places <= gap * (entries - 1))))
