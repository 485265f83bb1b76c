"""The main job's data: scikit-learn's digits, or one file of the user's.

The idea: each source is read into the same `Table`, which remembers how its user counts rows
(lines of a CSV file, indices of an array). Everything after reading is written once and can
still name the place at fault:

    read -> infer the loss -> encode the target -> split -> standardise

Notation: n samples as rows, d features, k target columns, C classes.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from experiments.tables import (
    DataError,
    Table,
    existing,
    listed,
    number_in,
    read,
    shape_text,
    shown,
)

Loss = Literal["cross_entropy", "mse", "logistic"]

# Integers with more distinct values than this are taken for counts or amounts, not classes.
MAX_INFERRED_CLASSES = 50
# Fewer samples cannot give both parts of the split two rows.
MIN_ROWS = 4
# The digits' split never changes, so that accuracies of different seeds can be compared.
DIGITS_SPLIT_SEED = 0
FLOAT32_MAX = float(np.finfo(np.float32).max)
# Every integer below it is exact in float64, so no two labels fall together.
EXACT_INTEGER_BOUND = 2.0**53


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
    table = _digits() if path is None else read(existing(path), target)
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


def _digits() -> Table:
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
    return Table(
        source="digits",
        x=digits["data"].astype(np.float64),
        y=digits["target"].astype(np.float64),
        feature_names=tuple(digits["feature_names"]),
        target_names=("digit",),
        lines=None,
    )


# What the target means


def _infer_loss(table: Table) -> tuple[Loss, str]:
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


def _infer_columns(table: Table) -> tuple[Loss, str]:
    what = f"{_target(table)} has {table.y.shape[1]} columns"
    if not np.isin(table.y, (0, 1)).all():
        return "mse", f"{what} of numbers"
    if (table.y.sum(axis=1) == 1).all():
        return "logistic", f"{what} of 0 and 1 (if they are one-hot, save y.argmax(axis=1) instead)"
    return "logistic", f"{what} of 0 and 1"


def _encode(table: Table, loss: Loss) -> tuple[np.ndarray, tuple[str, ...] | None]:
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
            f" got {len(classes)}, {listed(classes)}. Set loss to 'cross_entropy'."
        )
    return indices[:, None].astype(np.float32), classes


def _amounts(table: Table) -> np.ndarray:
    if table.is_text:
        row = next(row for row, label in enumerate(table.y) if number_in(label) is None)
        raise DataError(
            f"{table.source}: {table.place(row)}, {_target(table)} must be a number for"
            f" loss='mse': got {shown(table.y[row])}. Correct it, or set loss to 'cross_entropy'."
        )
    return table.y.reshape(len(table.y), -1).astype(np.float32)


def _indicators(table: Table, loss: Loss) -> np.ndarray:
    if loss == "cross_entropy":
        raise DataError(
            f"{table.source}: loss='cross_entropy' needs y [n], one class a sample: got y"
            f" {shape_text(table.y)}. Save y.argmax(axis=1) if y is one-hot, or use 'logistic'."
        )
    wrong = np.argwhere(~np.isin(table.y, (0, 1)))
    if len(wrong):
        row, column = wrong[0]
        raise DataError(
            f"{table.source}: {table.place(row)}, {table.target_names[column]} must be 0 or 1 for"
            f" loss='logistic': got {table.y[row, column]:g}. Correct it, or set loss to 'mse'."
        )
    return table.y.astype(np.float32)


def _class_indices(table: Table, loss: Loss) -> tuple[np.ndarray, tuple[str, ...]]:
    if not table.is_text:
        _refuse_fractions(table, loss)
    values, indices, counts = np.unique(table.y, return_inverse=True, return_counts=True)
    classes = tuple(str(value) if table.is_text else str(int(value)) for value in values)
    if len(classes) < 2:
        raise DataError(
            f"{table.source}: {_target(table)} must hold at least two classes: got"
            f" {listed(classes)} in all {len(indices)} rows. Add samples of another class."
        )
    if counts.max() < 2:
        raise DataError(
            f"{table.source}: {_target(table)} must hold a class at least twice: got"
            f" {len(classes)} classes in {len(indices)} rows, one sample each."
            " Choose another target, or set loss to 'mse' if it is a number."
        )
    return indices, classes


def _refuse_fractions(table: Table, loss: Loss) -> None:
    whole = _is_integer(table.y)
    if not whole.all():
        row = int(whole.argmin())
        raise DataError(
            f"{table.source}: {table.place(row)}, {_target(table)} must be an integer or text for"
            f" loss={loss!r}: got {table.y[row]:g}. Set loss to 'mse', or name the classes."
        )


def _refuse_mixture(table: Table) -> None:
    # One mistyped amount would otherwise turn a regression into thousands of classes.
    numbers = [number_in(label) for label in table.y]
    if any(number is not None and np.isfinite(number) for number in numbers):
        row = numbers.index(None)
        raise DataError(
            f"{table.source}: {_target(table)} holds numbers and text: {table.place(row)} is"
            f" {shown(table.y[row])}. Correct it, or set loss to 'cross_entropy' to make each"
            " value a class."
        )


def _is_integer(values: np.ndarray) -> np.ndarray:
    return (np.floor(values) == values) & (np.abs(values) < EXACT_INTEGER_BOUND)


# Splitting and scaling


def _num_held_out(num_rows: int, test_fraction: float) -> int:
    return 0 if num_rows < 2 else min(max(round(test_fraction * num_rows), 1), num_rows - 1)


def _digits_scaling(table: Table) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(table.x.shape[1]), np.full(table.x.shape[1], 16.0)


def _scaling(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # Constant is judged by the range: rounding gives the deviation of ten times 0.1 as 1e-17.
    deviation = x.std(axis=0)
    varies = (np.ptp(x, axis=0) > 0) & (deviation > 0)
    return x.mean(axis=0), np.where(varies, deviation, 1.0)


def _scaled(table: Table, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
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
            f"loss must be one of {listed(get_args(Loss))}: got loss={loss!r}."
            " Omit it to have it inferred."
        )
    if not 0 < test_fraction < 1:
        raise DataError(
            f"test_fraction must be between 0 and 1: got test_fraction={test_fraction}."
            " Use 0.25 to hold out a quarter."
        )
    if seed < 0:
        raise DataError(f"seed must not be negative: got seed={seed}. Use 0 or more.")


def _check_table(table: Table) -> None:
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


def _refuse_empty_labels(table: Table) -> None:
    empty = table.y == ""
    if empty.any():
        raise DataError(
            f"{table.source}: {table.place(int(empty.argmax()))}, {_target(table)} must not be"
            " empty. Fill in the target, or remove the row."
        )


def _refuse_unusable(
    table: Table, values: np.ndarray, names: tuple[str, ...], when: str = "as given"
) -> None:
    # The comparison is false for NaN too, so one test finds NaN, infinity and overflow.
    usable = np.abs(values) <= FLOAT32_MAX
    if not usable.all():
        row, column = np.argwhere(~usable)[0]
        raise DataError(
            f"{table.source}: {table.place(row)}, column {shown(names[column])} must be finite in"
            f" float32 {when}: got {values[row, column]:g}. Correct it, or remove the row."
        )


# Words of the error texts


def _target(table: Table) -> str:
    return "y" if table.lines is None else f"column {shown(table.target_names[0])}"
