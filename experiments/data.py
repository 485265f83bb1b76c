"""The main job's data: scikit-learn's digits, or one file of the user's.

The idea: each source is read into the same `_Table`, which remembers how its user counts rows
(lines of a CSV file, indices of an array). Everything after reading is written once and can
still name the place at fault:

    read -> infer the loss -> encode the target -> split -> standardise

Notation: n samples as rows, d features, k target columns, C classes.
"""

import csv
import io
import json
import lzma
import os
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

Loss = Literal["cross_entropy", "mse", "logistic"]
Record = tuple[int, list[str]]

# Integers with more distinct values than this are taken for counts or amounts, not classes.
MAX_INFERRED_CLASSES = 50
# Fewer samples cannot give both parts of the split two rows.
MIN_ROWS = 4
# The digits' split never changes, so that accuracies of different seeds can be compared.
DIGITS_SPLIT_SEED = 0
DEFAULT_TARGET = "target"
FLOAT32_MAX = float(np.finfo(np.float32).max)
WRITE_AGAIN = "Write it again with np.savez(file, x=x, y=y)."
# Every integer below it is exact in float64, so no two labels fall together.
EXACT_INTEGER_BOUND = 2.0**53
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
class Dataset:
    """Samples split for training and held-out measurement, with what is needed to read the outputs.

    Attributes:
        name: "digits", or the name of the file.
        x_train: [n_train, d] float32, standardised: (x - mean) / scale.
        y_train: cross_entropy: [n_train] int32 class indices; logistic: [n_train, num_outputs]
            float32 of 0 and 1; mse: [n_train, num_outputs] float32 in the user's units.
        x_test: [n_test, d], scaled by the same mean and scale.
        y_test: as y_train.
        loss: the loss that fits the target.
        loss_reason: "given", or one sentence that says why this loss was inferred.
        num_outputs: the width of the last layer: C, or 1 for two classes under logistic, or k.
        classes: the name of every class, by index; None for regression and for k columns of 0/1.
        feature_names: the d columns' names.
        mean: [d] float64, subtracted from every feature; 0 for digits.
        scale: [d] float64, divides every feature; 16 for digits.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    loss: Loss
    loss_reason: str
    num_outputs: int
    classes: tuple[str, ...] | None
    feature_names: tuple[str, ...]
    mean: np.ndarray
    scale: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Table:
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
        return self.y.dtype.kind == "U"

    def place(self, row: int) -> str:
        return f"row {row} (0-based)" if self.lines is None else f"line {self.lines[row]}"


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    target: str | None = None,
    loss: Loss | None = None,
    test_fraction: float = 0.25,
    seed: int = 0,
) -> Dataset:
    """Load the digits, or a file, as a `Dataset`: target encoded, rows split, features scaled.

    A file's features are standardised by the mean and the deviation of its training part alone,
    so that nothing of the held-out part reaches training; a column that is constant there is
    divided by 1. The digits are divided by 16, the brightest pixel. Targets are never scaled.

    A loss that is not given is inferred from the target:

        [n] of text                                                          cross_entropy
        [n] of integers, at most 50 distinct, each at least twice            cross_entropy
        [n, k] of 0 and 1                                                    logistic
        any other numbers                                                    mse

    Classes are numbered in sorted order, and their names kept, whatever the labels were.

    Args:
        path: a `.csv` file with a header, or an `.npz` file with x [n, d] and y [n] or [n, k];
            None for scikit-learn's 1,797 digits.
        target: the CSV column to predict; it may be omitted if one is named "target".
        loss: "cross_entropy", "mse" or "logistic"; None to infer it.
        test_fraction: the part of the rows to hold out, between 0 and 1.
        seed: chooses a file's split; the digits' split is always the same.

    Returns:
        The data set.

    Raises:
        DataError: an argument or the file cannot be used; the text says where and what to do.

    Examples:
        >>> digits = load()
        >>> digits.x_train.shape, digits.x_test.shape, digits.num_outputs, digits.loss
        ((1347, 64), (450, 64), 10, 'cross_entropy')
    """
    _check_arguments(path, target, loss, test_fraction, seed)
    table = _digits() if path is None else _read(_existing(path), target)
    _check_table(table)
    chosen, reason = (loss, "given") if loss else _infer_loss(table)
    y, classes = _encode(table, chosen)
    strata = np.zeros(len(y)) if classes is None else y.reshape(-1)
    split_seed = DIGITS_SPLIT_SEED if path is None else seed
    train, test = split(strata, test_fraction=test_fraction, seed=split_seed)
    mean, scale = _digits_scaling(table) if path is None else _scaling(table.x[train])
    x = _scaled(table, mean, scale)
    return Dataset(
        name=Path(table.source).name,
        x_train=x[train],
        y_train=y[train],
        x_test=x[test],
        y_test=y[test],
        loss=chosen,
        loss_reason=reason,
        num_outputs=y.shape[1] if y.ndim == 2 else len(classes or ()),
        classes=classes,
        feature_names=table.feature_names,
        mean=mean,
        scale=scale,
    )


def split(strata: np.ndarray, *, test_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split rows into training and test indices, holding out the same fraction of every stratum.

    A stratum of two rows or more has at least one in each part; the row of a stratum of one is for
    training. Regression is the case of one stratum. Both parts come shuffled.

    Args:
        strata: [n] numbers, equal for the rows of one stratum.
        test_fraction: the part of each stratum to hold out, rounded to whole rows.
        seed: the split is a pure function of it and the other arguments.

    Returns:
        The indices for training and those for testing.

    Examples:
        >>> train, test = split(np.array([0, 0, 0, 0, 1, 1, 1, 1]), test_fraction=0.25, seed=0)
        >>> len(train), sorted((test // 4).tolist())
        (6, [0, 1])
    """
    rng = np.random.default_rng(seed)
    _, counts = np.unique(strata, return_counts=True)
    grouped = np.argsort(strata, kind="stable")
    held_out = np.zeros(len(strata), dtype=bool)
    for rows in np.split(grouped, np.cumsum(counts)[:-1]):
        held_out[rng.permutation(rows)[: _num_held_out(len(rows), test_fraction)]] = True
    order = rng.permutation(len(strata))
    return order[~held_out[order]], order[held_out[order]]


def save_class_map(dataset: Dataset, path: str | os.PathLike[str]) -> None:
    """Write `{"class name": index, ...}` as JSON, so that predictions can be named later.

    Args:
        dataset: a data set with classes.
        path: the file to write; missing folders are made.

    Raises:
        DataError: the data set has no classes.
    """
    if dataset.classes is None:
        raise DataError(
            f"{dataset.name}: a class map needs classes: got loss={dataset.loss!r} with"
            f" {dataset.num_outputs} outputs and none. Save one for classification only."
        )
    indices = {name: index for index, name in enumerate(dataset.classes)}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(indices, indent=2, ensure_ascii=False)
    Path(path).write_text(text + "\n", encoding="utf-8")


# Reading


def _digits() -> _Table:
    try:
        from sklearn.datasets import load_digits
        from sklearn.utils import Bunch
    except ImportError as error:
        raise DataError(
            "digits: the data set ships with scikit-learn, which is not installed."
            " Run pip install 'tpmlp[data]', or give a .csv or .npz file."
        ) from error
    digits = load_digits()
    assert isinstance(digits, Bunch), "load_digits() without arguments returns a Bunch"
    return _Table(
        source="digits",
        x=digits["data"].astype(np.float64),
        y=digits["target"].astype(np.float64),
        feature_names=tuple(digits["feature_names"]),
        target_names=("digit",),
        lines=None,
    )


def _existing(path: str | os.PathLike[str]) -> Path:
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


def _read(file: Path, target: str | None) -> _Table:
    if file.suffix.lower() == ".csv":
        return _read_csv(file, target)
    if target is not None:
        raise DataError(
            f"{file}: target names a column of a .csv file: got target={target!r}."
            " Omit it: the target of an .npz file is its array y."
        )
    return _read_npz(file)


def _read_csv(file: Path, target: str | None) -> _Table:
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
    return _Table(
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
            f"{file}: the header must name at least two columns: got {_listed(header)}."
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
            f"{file}: column names must differ: got {_shown(twice[0])}"
            f" {header.count(twice[0])} times. Rename or remove one."
        )
    return header


def _target_position(file: Path, header: tuple[str, ...], target: str | None) -> int:
    name = DEFAULT_TARGET if target is None else target.strip()
    if name in header:
        return header.index(name)
    raise DataError(
        f"{file}: no column is named {_shown(name)}. Set target to one of {_listed(header)}."
    )


def _check_ragged(file: Path, rows: Sequence[Record], num_columns: int) -> None:
    for line, fields in rows:
        if len(fields) != num_columns:
            raise DataError(
                f"{file}: line {line} must have {num_columns} fields, as the header has:"
                f" got {len(fields)}. Add or remove commas, or quote a field that holds one."
            )


def _csv_numbers(file: Path, row: Record, names: tuple[str, ...]) -> list[float]:
    values = [_number(text) for text in row[1]]
    if None in values:
        column = values.index(None)
        raise DataError(
            f"{file}: line {row[0]}, column {_shown(names[column])} must be a number:"
            f" got {_shown(row[1][column])}. Correct it, or remove the column."
        )
    return [value for value in values if value is not None]


def _csv_labels(labels: list[str]) -> np.ndarray:
    numbers = [_number(label) for label in labels]
    return np.array(labels) if None in numbers else np.array(numbers, dtype=np.float64)


def _number(text: str) -> float | None:
    # float() also reads Python's own 1_000, which in a data file is a name, not a thousand.
    if "_" in text:
        return None
    try:
        return float(text)
    except ValueError:
        return None


def _read_npz(file: Path) -> _Table:
    x, y = _npz_arrays(file)
    if x.dtype.kind not in "biuf":
        raise DataError(
            f"{file}: x must hold numbers: got dtype {x.dtype}. Save it as float32 or float64."
        )
    if x.ndim != 2 or x.shape[1] == 0:
        raise DataError(
            f"{file}: x must be [n, d] with d >= 1: got shape {_shape(x)}."
            " Reshape it to one row a sample."
        )
    if y.ndim not in (1, 2) or 0 in y.shape[1:]:
        raise DataError(
            f"{file}: y must be [n] or [n, k]: got shape {_shape(y)}."
            " Reshape it to one label, or one row, a sample."
        )
    if len(x) != len(y):
        raise DataError(
            f"{file}: x and y must have equally many rows: got x {_shape(x)}, y {_shape(y)}."
            " Save one target for each sample."
        )
    return _Table(
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
            f" shape {_shape(y)}. Save it as numbers or one label a sample."
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
                f"{file}: must hold the arrays x and y: got {_listed(keys) or 'none'}, without"
                f" {missing}. {WRITE_AGAIN}"
            )
        return _npz_array(file, archive, "x"), _npz_array(file, archive, "y")


def _npz_archive(file: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except UNREADABLE_NPZ as error:
        raise DataError(
            f"{file}: is damaged or not an .npz archive ({_one_line(error)}). {WRITE_AGAIN}"
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
            f"{file}: {key} is damaged and cannot be read ({_one_line(error)}). {WRITE_AGAIN}"
        ) from error


# What the target means


def _infer_loss(table: _Table) -> tuple[Loss, str]:
    if table.is_text:
        _refuse_mixture(table)
        return "cross_entropy", f"{_target(table)} holds text, so each text is a class"
    if table.y.ndim == 2:
        return _infer_columns(table)
    values, counts = np.unique(table.y, return_counts=True)
    if not _is_integer(values).all():
        return "mse", f"{_target(table)} holds numbers that are not integers"
    if len(values) > MAX_INFERRED_CLASSES:
        return "mse", f"{_target(table)} holds {len(values)} distinct integers, too many classes"
    if counts.min() < 2:
        lone = int(values[counts.argmin()])
        return "mse", f"{_target(table)} holds integers, and {lone} only once, so not classes"
    return (
        "cross_entropy",
        f"{_target(table)} holds {len(values)} distinct integers, each at least twice",
    )


def _infer_columns(table: _Table) -> tuple[Loss, str]:
    what = f"{_target(table)} has {table.y.shape[1]} columns"
    if not np.isin(table.y, (0, 1)).all():
        return "mse", f"{what} of numbers"
    if (table.y.sum(axis=1) == 1).all():
        return "logistic", f"{what} of 0 and 1 (if they are one-hot, save y.argmax(axis=1) instead)"
    return "logistic", f"{what} of 0 and 1"


def _encode(table: _Table, loss: Loss) -> tuple[np.ndarray, tuple[str, ...] | None]:
    if loss == "mse":
        return _amounts(table), None
    if table.y.ndim == 2:
        return _indicators(table, loss), None
    indices, classes = _class_indices(table, loss)
    if loss == "cross_entropy":
        return indices.astype(np.int32), classes
    if len(classes) != 2:
        raise DataError(
            f"{table.source}: loss='logistic' needs two classes in {_target(table)}:"
            f" got {len(classes)}, {_listed(classes)}. Set loss to 'cross_entropy'."
        )
    return indices[:, None].astype(np.float32), classes


def _amounts(table: _Table) -> np.ndarray:
    if table.is_text:
        row = next(row for row, label in enumerate(table.y) if _number(label) is None)
        raise DataError(
            f"{table.source}: {table.place(row)}, {_target(table)} must be a number for"
            f" loss='mse': got {_shown(table.y[row])}. Correct it, or set loss to 'cross_entropy'."
        )
    return table.y.reshape(len(table.y), -1).astype(np.float32)


def _indicators(table: _Table, loss: Loss) -> np.ndarray:
    if loss == "cross_entropy":
        raise DataError(
            f"{table.source}: loss='cross_entropy' needs y [n], one class a sample: got y"
            f" {_shape(table.y)}. Save y.argmax(axis=1) if y is one-hot, or set loss to 'logistic'."
        )
    wrong = np.argwhere(~np.isin(table.y, (0, 1)))
    if len(wrong):
        row, column = wrong[0]
        raise DataError(
            f"{table.source}: {table.place(row)}, {table.target_names[column]} must be 0 or 1 for"
            f" loss='logistic': got {table.y[row, column]:g}. Correct it, or set loss to 'mse'."
        )
    return table.y.astype(np.float32)


def _class_indices(table: _Table, loss: Loss) -> tuple[np.ndarray, tuple[str, ...]]:
    if not table.is_text:
        _refuse_fractions(table, loss)
    values, indices, counts = np.unique(table.y, return_inverse=True, return_counts=True)
    classes = tuple(str(value) if table.is_text else str(int(value)) for value in values)
    if len(classes) < 2:
        raise DataError(
            f"{table.source}: {_target(table)} must hold at least two classes: got"
            f" {_listed(classes)} in all {len(indices)} rows. Add samples of another class."
        )
    if counts.max() < 2:
        raise DataError(
            f"{table.source}: {_target(table)} must hold a class at least twice: got"
            f" {len(classes)} classes in {len(indices)} rows, one sample each."
            " Choose another target, or set loss to 'mse' if it is a number."
        )
    return indices, classes


def _refuse_fractions(table: _Table, loss: Loss) -> None:
    whole = _is_integer(table.y)
    if not whole.all():
        row = int(whole.argmin())
        raise DataError(
            f"{table.source}: {table.place(row)}, {_target(table)} must be an integer or text for"
            f" loss={loss!r}: got {table.y[row]:g}. Set loss to 'mse', or name the classes."
        )


def _refuse_mixture(table: _Table) -> None:
    # One mistyped amount would otherwise turn a regression into thousands of classes.
    numbers = [_number(label) for label in table.y]
    if any(number is not None and np.isfinite(number) for number in numbers):
        row = numbers.index(None)
        raise DataError(
            f"{table.source}: {_target(table)} holds numbers and text: {table.place(row)} is"
            f" {_shown(table.y[row])}. Correct it, or set loss to 'cross_entropy' to make each"
            " value a class."
        )


def _is_integer(values: np.ndarray) -> np.ndarray:
    return (np.floor(values) == values) & (np.abs(values) < EXACT_INTEGER_BOUND)


# Splitting and scaling


def _num_held_out(num_rows: int, test_fraction: float) -> int:
    return 0 if num_rows < 2 else min(max(round(test_fraction * num_rows), 1), num_rows - 1)


def _digits_scaling(table: _Table) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(table.x.shape[1]), np.full(table.x.shape[1], 16.0)


def _scaling(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # Constant is judged by the range: rounding gives the deviation of ten times 0.1 as 1e-17.
    deviation = x.std(axis=0)
    varies = (np.ptp(x, axis=0) > 0) & (deviation > 0)
    return x.mean(axis=0), np.where(varies, deviation, 1.0)


def _scaled(table: _Table, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    scaled = (table.x - mean) / scale
    _refuse_unusable(table, scaled, table.feature_names, "after standardising")
    return scaled.astype(np.float32)


# Checks


def _check_arguments(
    path: object, target: str | None, loss: str | None, test_fraction: float, seed: int
) -> None:
    if path is None and target is not None:
        raise DataError(
            f"target names a column of a .csv file: got target={target!r} and no file."
            " Give a file, or omit target."
        )
    if loss is not None and loss not in get_args(Loss):
        raise DataError(
            f"loss must be one of {_listed(get_args(Loss))}: got loss={loss!r}."
            " Omit it to have it inferred."
        )
    if not 0 < test_fraction < 1:
        raise DataError(
            f"test_fraction must be between 0 and 1: got test_fraction={test_fraction}."
            " Use 0.25 to hold out a quarter."
        )
    if seed < 0:
        raise DataError(f"seed must not be negative: got seed={seed}. Use 0 or more.")


def _check_table(table: _Table) -> None:
    if len(table.x) < MIN_ROWS:
        raise DataError(
            f"{table.source}: must hold at least {MIN_ROWS} rows, to train on some and test on"
            f" others: got {len(table.x)}. Add samples."
        )
    _refuse_unusable(table, table.x, table.feature_names)
    if table.is_text:
        _refuse_empty_labels(table)
    else:
        _refuse_unusable(table, table.y.reshape(len(table.y), -1), table.target_names)


def _refuse_empty_labels(table: _Table) -> None:
    empty = table.y == ""
    if empty.any():
        raise DataError(
            f"{table.source}: {table.place(int(empty.argmax()))}, {_target(table)} must not be"
            " empty. Fill in the target, or remove the row."
        )


def _refuse_unusable(
    table: _Table, values: np.ndarray, names: tuple[str, ...], when: str = "as given"
) -> None:
    # The comparison is false for NaN too, so one test finds NaN, infinity and overflow.
    usable = np.abs(values) <= FLOAT32_MAX
    if not usable.all():
        row, column = np.argwhere(~usable)[0]
        raise DataError(
            f"{table.source}: {table.place(row)}, column {_shown(names[column])} must be finite in"
            f" float32 {when}: got {values[row, column]:g}. Correct it, or remove the row."
        )


# Words of the error texts


def _target(table: _Table) -> str:
    return "y" if table.lines is None else f"column {_shown(table.target_names[0])}"


def _shape(array: np.ndarray) -> str:
    return str(list(array.shape))


def _shown(text: str, limit: int = 40) -> str:
    return repr(str(text) if len(text) <= limit else f"{text[: limit - 3]}...")


def _listed(names: Sequence[str], limit: int = 12) -> str:
    shown = ", ".join(_shown(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... ({len(names)} in all)"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
