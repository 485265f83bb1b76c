"""An audit's rows as text."""

from collections.abc import Sequence

from tpmlp.inspection.collective import Collective
from tpmlp.inspection.hlo.counts import Count, total
from tpmlp.inspection.hlo.products import Product
from tpmlp.table import format_bytes, text_table

_UNITS = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP")


def collective_table(rows: Sequence[Collective]) -> str:
    """Return one line a row, with what is computed while an asynchronous one is under way."""
    header = ("collective", "axes", "dtype", "bytes", "count", "total", "mode", "meanwhile", "note")
    return text_table(header, map(_collective_cells, rows))


def product_table(rows: Sequence[Product]) -> str:
    """Return one line a row: the product's sizes m x k x n, its FLOPs and its count."""
    header = ("product", "dtype", "flops", "count", "total", "note")
    return text_table(header, map(_product_cells, rows))


def grouped(number: Count | float) -> str:
    """Return a number with its thousands apart, and a question mark where there is none."""
    return "?" if number is None else f"{number:,.0f}"


def format_flops(flops: Count) -> str:
    """Return a number of operations that a person reads at a glance.

    Examples:
        >>> format_flops(640), format_flops(1_073_741_824), format_flops(None)
        ('640 FLOP', '1.07 GFLOP', '?')
    """
    if flops is None:
        return "?"
    thousands = min((len(str(flops)) - 1) // 3, len(_UNITS) - 1)
    return f"{flops / 1000**thousands:.{2 if thousands else 0}f} {_UNITS[thousands]}"


def _collective_cells(row: Collective) -> tuple[str, ...]:
    return (
        row.kind,
        ",".join(row.axes),
        row.dtype,
        format_bytes(row.bytes),
        grouped(row.count),
        "?" if row.total_bytes is None else format_bytes(row.total_bytes),
        "async" if row.asynchronous else "sync",
        _meanwhile(row) if row.asynchronous else "",
        row.note,
    )


def _meanwhile(row: Collective) -> str:
    if not row.overlaps:
        return "no product"
    count = total(product.count for product in row.overlaps)
    noun = "product" if count == 1 else "products"
    return f"{grouped(count)} {noun}, {format_flops(row.overlapped_flops)}"


def _product_cells(row: Product) -> tuple[str, ...]:
    flops, in_all = format_flops(row.flops), format_flops(row.total_flops)
    return (str(row), row.dtype, flops, grouped(row.count), in_all, row.note)
