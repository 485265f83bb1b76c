"""Plain text tables: what every report of this package prints."""

from collections.abc import Iterable, Sequence


def text_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return an aligned table; numbers to the right, text to the left.

    Args:
        headers: one for each column.
        rows: cells; formatted by str.

    Examples:
        >>> print(text_table(["tensor", "bytes"], [["W_1", 2048], ["b_1", 64]]))
        tensor  bytes
        W_1      2048
        b_1        64
    """
    cells = [list(map(str, row)) for row in rows]
    columns = list(zip(headers, *cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(_is_number(cell) for cell in column[1:]) for column in columns]

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        return "  ".join(padded).rstrip()

    return "\n".join(line(row) for row in [list(headers), *cells])


def format_bytes(num_bytes: float) -> str:
    """Return a size that a person reads at a glance.

    Examples:
        >>> format_bytes(512), format_bytes(2048), format_bytes(3.5 * 2**20)
        ('512 B', '2.00 KiB', '3.50 MiB')
    """
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"


def memory_line(param_bytes: float, temp_bytes: float | None) -> str:
    """Return what a device holds at the height of a step, optimiser not counted.

    Args:
        param_bytes: of the parameters, and so of the gradients.
        temp_bytes: of what lives within the step; None where it is not predicted.

    Examples:
        >>> memory_line(2048, 512)
        'on one device: parameters 2.00 KiB, gradients 2.00 KiB, within the step 512 B'
    """
    within = "not predicted" if temp_bytes is None else format_bytes(temp_bytes)
    held = format_bytes(param_bytes)
    return f"on one device: parameters {held}, gradients {held}, within the step {within}"


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] in ("-", "+", ".", "?")
