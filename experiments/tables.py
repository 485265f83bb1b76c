"""Reading: a file of the user's becomes a Table, or one line that says what is wrong with it.

A Table remembers how its user counts rows (lines of a CSV file, indices of an array), so that
whatever is found wrong later can still name the place at fault.
"""

import csv
import io
import lzma
import os
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Record = tuple[int, list[str]]

DEFAULT_TARGET = "target"
WRITE_AGAIN = "Write it again with np.savez(file, x=x, y=y)."
# What zipfile, its decompressors and the npy header parser raise on bytes they cannot read.
UNREADABLE_NPZ = (
    ValueError,
    OSError,
    EOFError,
    RuntimeError,
    MemoryError,
    SyntaxError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)


class DataError(ValueError):
    """The user's data cannot be used; the text is one line that names the file and the way out."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Table:
    """What a source holds, before anything decides what its target means.

    Attributes:
        source: the file, as error texts name it.
        x: [n, d] float64.
        y: [n] or [n, k >= 2], float64, or [n] text.
        feature_names: one for each column of x.
        target_names: one for each column of y.
        lines: the line in the file at which each row starts; None where rows count from 0.
    """

    source: str
    x: np.ndarray
    y: np.ndarray
    feature_names: tuple[str, ...]
    target_names: tuple[str, ...]
    lines: tuple[int, ...] | None

    @property
    def is_text(self) -> bool:
        """Whether the target is text."""
        return self.y.dtype.kind == "U"

    def place(self, row: int) -> str:
        """Return how a user finds a row."""
        return f"row {row} (0-based)" if self.lines is None else f"line {self.lines[row]}"


def existing(path: str | os.PathLike[str]) -> Path:
    """Return the path of a .csv or .npz file that is there and not empty."""
    file = Path(os.path.expanduser(path))
    try:
        size = file.stat().st_size
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read ({error.strerror}). Give the path of a .csv or .npz file."
        ) from error
    if file.is_dir():
        raise DataError(f"{file}: is a directory. Give the path of a .csv or .npz file in it.")
    if file.suffix.lower() not in (".csv", ".npz"):
        raise DataError(
            f"{file}: the suffix must be .csv or .npz: got {file.suffix!r}."
            " Save the data in one of these formats."
        )
    if size == 0:
        raise DataError(f"{file}: is empty (0 bytes). Write the data to it again.")
    return file


def read(file: Path, target: str | None) -> Table:
    """Read a .csv or .npz file; target names the column of a .csv to predict."""
    if file.suffix.lower() == ".csv":
        return _read_csv(file, target)
    if target is not None:
        raise DataError(
            f"{file}: target names a column of a .csv file: got target={target!r}."
            " Omit it: the target of an .npz file is its array y."
        )
    return _read_npz(file)


def _read_csv(file: Path, target: str | None) -> Table:
    records = _csv_records(file)
    if not records:
        raise DataError(f"{file}: is empty (blank lines only). Write the data to it again.")
    header = _csv_header(file, records[0])
    position = _target_position(file, header, target)
    rows = records[1:]
    if not rows:
        raise DataError(f"{file}: has a header and no rows. Add a line for each sample.")
    _check_ragged(file, rows, len(header))
    labels = [fields.pop(position).strip() for _, fields in rows]
    names = header[:position] + header[position + 1 :]
    return Table(
        source=str(file),
        x=np.array([_csv_numbers(file, row, names) for row in rows]),
        y=_csv_labels(labels),
        feature_names=names,
        target_names=(header[position],),
        lines=tuple(line for line, _ in rows),
    )


def _csv_records(file: Path) -> list[Record]:
    """Each record that is not blank, with the line at which it starts."""
    text = io.StringIO(_decoded(file), newline="")
    reader = csv.reader(text, skipinitialspace=True, strict=True)
    records, line = [], 1
    try:
        for fields in reader:
            if len(fields) > 1 or "".join(fields).strip():
                records.append((line, fields))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{file}: line {line} is not valid CSV ({error})."
            ' Close every quoted field, and write a quote inside it as "".'
        ) from error
    return records


def _decoded(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read ({error.strerror}). Change its permissions."
        ) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(
            f"{file}: must be UTF-8: line {line} holds the byte"
            f" 0x{error.object[error.start]:02x}. Save the file as UTF-8."
        ) from error


def _csv_header(file: Path, record: Record) -> tuple[str, ...]:
    header = tuple(name.strip() for name in record[1])
    if len(header) < 2:
        raise DataError(
            f"{file}: the header must name at least two columns: got {listed(header)}."
            " Separate the columns by commas."
        )
    if "" in header:
        raise DataError(
            f"{file}: column {header.index('') + 1} (1-based) has no name in the header."
            " Name it or remove it (pandas writes its index so: to_csv(index=False))."
        )
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise DataError(
            f"{file}: column names must differ: got {shown(twice[0])}"
            f" {header.count(twice[0])} times. Rename or remove one."
        )
    return header


def _target_position(file: Path, header: tuple[str, ...], target: str | None) -> int:
    name = DEFAULT_TARGET if target is None else target.strip()
    if name in header:
        return header.index(name)
    raise DataError(
        f"{file}: no column is named {shown(name)}. Set target to one of {listed(header)}."
    )


def _check_ragged(file: Path, rows: Sequence[Record], num_columns: int) -> None:
    for line, fields in rows:
        if len(fields) != num_columns:
            raise DataError(
                f"{file}: line {line} must have {num_columns} fields, as the header has:"
                f" got {len(fields)}. Add or remove commas, or quote a field that holds one."
            )


def _csv_numbers(file: Path, row: Record, names: tuple[str, ...]) -> list[float]:
    values = [number_in(text) for text in row[1]]
    if None in values:
        column = values.index(None)
        raise DataError(
            f"{file}: line {row[0]}, column {shown(names[column])} must be a number:"
            f" got {shown(row[1][column])}. Correct it, or remove the column."
        )
    return [value for value in values if value is not None]


def _csv_labels(labels: list[str]) -> np.ndarray:
    numbers = [number_in(label) for label in labels]
    return np.array(labels) if None in numbers else np.array(numbers, dtype=np.float64)


def number_in(text: str) -> float | None:
    """Return the number that a text is, None if it is none."""
    # float() also reads Python's own 1_000, which in a data file is a name, not a thousand.
    if "_" in text:
        return None
    try:
        return float(text)
    except ValueError:
        return None


def _read_npz(file: Path) -> Table:
    x, y = _npz_arrays(file)
    if x.dtype.kind not in "biuf":
        raise DataError(
            f"{file}: x must hold numbers: got dtype {x.dtype}. Save it as float32 or float64."
        )
    if x.ndim != 2 or x.shape[1] == 0:
        raise DataError(
            f"{file}: x must be [n, d] with d >= 1: got shape {shape_text(x)}."
            " Reshape it to one row a sample."
        )
    if y.ndim not in (1, 2) or 0 in y.shape[1:]:
        raise DataError(
            f"{file}: y must be [n] or [n, k]: got shape {shape_text(y)}."
            " Reshape it to one label, or one row, a sample."
        )
    if len(x) != len(y):
        raise DataError(
            f"{file}: x and y must have as many rows: got x {shape_text(x)}, y {shape_text(y)}."
            " Save one target for each sample."
        )
    return Table(
        source=str(file),
        x=x.astype(np.float64),
        y=_npz_labels(file, y),
        feature_names=tuple(f"x[:, {column}]" for column in range(x.shape[1])),
        target_names=_npz_target_names(y),
        lines=None,
    )


def _npz_target_names(y: np.ndarray) -> tuple[str, ...]:
    if y.ndim == 1:
        return ("y",)
    return tuple(f"y[:, {column}]" for column in range(y.shape[1]))


def _npz_labels(file: Path, y: np.ndarray) -> np.ndarray:
    values = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if values.dtype.kind in "biuf":
        return values.astype(np.float64)
    if values.dtype.kind not in "US" or values.ndim == 2:
        raise DataError(
            f"{file}: y must hold numbers, or be [n] of text: got dtype {y.dtype},"
            f" shape {shape_text(y)}. Save it as numbers or one label a sample."
        )
    try:
        return values.astype(np.str_)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: y must be text: got bytes that are not ASCII (dtype {y.dtype})."
            " Decode them, and save an array of str."
        ) from error


def _npz_arrays(file: Path) -> tuple[np.ndarray, np.ndarray]:
    with _npz_archive(file) as archive:
        names = [name for name in archive.namelist() if name.endswith(".npy")]
        keys = tuple(name.removesuffix(".npy") for name in names)
        missing = " and ".join(key for key in ("x", "y") if key not in keys)
        if missing:
            raise DataError(
                f"{file}: must hold the arrays x and y: got {listed(keys) or 'none'}, without"
                f" {missing}. {WRITE_AGAIN}"
            )
        return _npz_array(file, archive, "x"), _npz_array(file, archive, "y")


def _npz_archive(file: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except UNREADABLE_NPZ as error:
        raise DataError(
            f"{file}: is damaged or not an .npz archive ({one_line(error)}). {WRITE_AGAIN}"
        ) from error


def _npz_array(file: Path, archive: zipfile.ZipFile, key: str) -> np.ndarray:
    # The whole member is read first, and with it its checksum; np.load would parse a damaged
    # header before it noticed.
    try:
        member = io.BytesIO(archive.read(f"{key}.npy"))
        return np.lib.format.read_array(member, allow_pickle=False)
    except UNREADABLE_NPZ as error:
        if "Object arrays" in str(error):
            raise DataError(
                f"{file}: {key} is a pickled object array, which is never loaded: a pickle can"
                f" run any code. Save {key} with a numeric or text dtype."
            ) from error
        raise DataError(
            f"{file}: {key} is damaged and cannot be read ({one_line(error)}). {WRITE_AGAIN}"
        ) from error


# Words of the error texts


def shape_text(array: np.ndarray) -> str:
    """Write a shape as [n, d]."""
    return str(list(array.shape))


def shown(text: str, limit: int = 40) -> str:
    """Quote a text of the user's, cut to a length that fits a line."""
    return repr(str(text) if len(text) <= limit else f"{text[: limit - 3]}...")


def listed(names: Sequence[str], limit: int = 12) -> str:
    """Quote names of the user's, the first of them if they are many."""
    text = ", ".join(shown(name) for name in names[:limit])
    return text if len(names) <= limit else f"{text}, ... ({len(names)} in all)"


def one_line(error: BaseException) -> str:
    """Write an error of a library as one line."""
    return " ".join(str(error).split()) or type(error).__name__
