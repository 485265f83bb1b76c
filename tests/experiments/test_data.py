"""The main job's data: what load makes of good files, and what it says about bad ones.

A failure in the split or scaling tests means that held-out data reaches training, or that
accuracies cannot be compared; one in the target tests, that the model learns other labels than the
user's; one in the tables of errors, that a user meets a traceback or is not told where to look.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.data import DataError, Dataset, load, save_class_map, split

# x is compared with what float64 statistics give, so only the final rounding to float32 remains:
# half a unit in the last place, 2^-24 of the value.
FLOAT32_ROUNDING = 2.0**-24

FEATURES = np.random.default_rng(0).normal(3.0, 7.0, size=(24, 3))


@pytest.fixture
def write_csv(tmp_path):
    def write(text: str | bytes, name: str = "data.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture
def write_npz(tmp_path):
    def write(**arrays) -> Path:
        path = tmp_path / "data.npz"
        np.savez(path, **arrays)
        return path

    return write


def csv_text(labels, header="a,b,target") -> str:
    rows = [f"{index},{index**2 / 8},{label}" for index, label in enumerate(labels)]
    return "\n".join([header, *rows]) + "\n"


def all_y(dataset: Dataset) -> np.ndarray:
    return np.concatenate([dataset.y_train, dataset.y_test])


def refusal(*args, **kwargs) -> str:
    with pytest.raises(DataError) as caught:
        load(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    return text


# Digits


def test_digits_are_real_images_between_0_and_1():
    digits = load()
    assert len(digits.x_train) + len(digits.x_test) == 1797
    assert digits.x_train.dtype == np.float32
    assert (digits.x_train.min(), digits.x_train.max()) == (0.0, 1.0)
    assert digits.classes == tuple("0123456789")
    assert (digits.name, digits.loss, digits.num_outputs) == ("digits", "cross_entropy", 10)
    assert len(digits.feature_names) == 64


def test_digits_are_divided_by_16_and_nothing_else():
    digits = load()
    assert not digits.mean.any()
    np.testing.assert_array_equal(digits.scale, 16.0)
    pixels = digits.x_test * 16
    np.testing.assert_array_equal(pixels, np.round(pixels))


def test_the_split_of_the_digits_does_not_depend_on_the_seed():
    first, second = load(seed=0), load(seed=7)
    np.testing.assert_array_equal(first.x_test, second.x_test)
    np.testing.assert_array_equal(first.y_train, second.y_train)


def test_the_digits_held_out_are_a_quarter_of_every_class():
    digits = load()
    total = np.bincount(all_y(digits), minlength=10)
    assert (np.abs(np.bincount(digits.y_test, minlength=10) - total / 4) <= 0.5).all()


def test_digits_without_scikit_learn_are_refused_with_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install 'tpmlp[data]'" in refusal()


# The split


@st.composite
def strata_and_fraction(draw):
    strata = draw(st.lists(st.integers(-3, 4), min_size=1, max_size=60))
    return np.array(strata), draw(st.floats(0.01, 0.99)), draw(st.integers(0, 2**32))


@given(strata_and_fraction())
def test_the_split_is_a_partition(case):
    strata, fraction, seed = case
    train, test = split(strata, test_fraction=fraction, seed=seed)
    assert sorted([*train, *test]) == list(range(len(strata)))


@given(strata_and_fraction())
def test_the_split_is_a_function_of_its_arguments(case):
    strata, fraction, seed = case
    first = split(strata, test_fraction=fraction, seed=seed)
    second = split(strata.copy(), test_fraction=fraction, seed=seed)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


@given(strata_and_fraction())
def test_the_split_holds_out_the_same_fraction_of_every_stratum(case):
    strata, fraction, seed = case
    train, test = split(strata, test_fraction=fraction, seed=seed)
    for stratum in np.unique(strata):
        size, held_out = np.sum(strata == stratum), np.sum(strata[test] == stratum)
        assert np.sum(strata[train] == stratum) >= 1
        assert (held_out >= 1) == (size >= 2)
        assert abs(held_out - fraction * size) < 1


def test_another_seed_gives_another_split_of_a_file(write_npz):
    path = write_npz(x=FEATURES, y=np.arange(24) % 2)
    assert not np.array_equal(load(path, seed=0).x_test, load(path, seed=1).x_test)


def test_x_and_y_stay_together_and_both_parts_are_shuffled(write_npz):
    amount = np.arange(24) + 0.5
    dataset = load(write_npz(x=amount[:, None], y=amount), seed=3)
    for x, y in ((dataset.x_train, dataset.y_train), (dataset.x_test, dataset.y_test)):
        np.testing.assert_allclose(x * dataset.scale + dataset.mean, y, rtol=1e-6)
        assert not (np.diff(y[:, 0]) > 0).all()


# Scaling


def test_features_are_standardised_by_the_training_part_alone(write_npz):
    path = write_npz(x=FEATURES, y=np.arange(24) % 3)
    dataset = load(path)
    train, _ = split(np.arange(24) % 3, test_fraction=0.25, seed=0)
    np.testing.assert_array_equal(dataset.mean, FEATURES[train].mean(axis=0))
    np.testing.assert_array_equal(dataset.scale, FEATURES[train].std(axis=0))
    expected = (FEATURES[train] - dataset.mean) / dataset.scale
    np.testing.assert_allclose(dataset.x_train, expected, rtol=FLOAT32_ROUNDING)


def test_held_out_rows_do_not_move_the_scaling(write_npz):
    labels = np.arange(24) % 2
    before = load(write_npz(x=FEATURES, y=labels))
    _, test = split(labels, test_fraction=0.25, seed=0)
    changed = FEATURES.copy()
    changed[test] += 1000
    after = load(write_npz(x=changed, y=labels))
    np.testing.assert_array_equal(after.x_train, before.x_train)
    assert after.x_test.min() > before.x_test.max()


@pytest.mark.parametrize("value", [0.0, 0.1, -1e9, 1e-200], ids=str)
def test_a_constant_column_is_divided_by_1(write_npz, value):
    x = np.column_stack([np.arange(24.0), np.full(24, value)])
    dataset = load(write_npz(x=x, y=np.arange(24) % 2))
    assert dataset.scale[1] == 1.0
    np.testing.assert_allclose(dataset.x_train[:, 1], 0.0, atol=1e-6)


def test_columns_so_small_that_their_variance_underflows_are_divided_by_1(write_npz):
    x = np.column_stack([np.arange(24.0), np.arange(24) * 1e-200])
    dataset = load(write_npz(x=x, y=np.arange(24) % 2))
    assert dataset.scale[1] == 1.0
    assert np.isfinite(dataset.x_train).all()


# The loss


INFERRED = {
    "text": (np.array(["b", "a"] * 12), "cross_entropy", "holds text"),
    "integers": (np.arange(24) % 3, "cross_entropy", "3 distinct integers, each at least twice"),
    "whole floats": (np.arange(24.0) % 3, "cross_entropy", "3 distinct integers"),
    "booleans": (np.arange(24) % 2 == 0, "cross_entropy", "2 distinct integers"),
    "a column of integers": ((np.arange(24) % 4)[:, None], "cross_entropy", "4 distinct integers"),
    "an integer seen once": (np.r_[np.zeros(23), 9], "mse", "9 only once"),
    "fractions": (np.arange(24) / 2, "mse", "not integers"),
    "columns of floats": (FEATURES[:, :2], "mse", "2 columns of numbers"),
    "columns of 0 and 1": (np.eye(24)[:, :5] + np.eye(24)[:, 1:6], "logistic", "5 columns of 0"),
    "one-hot columns": (np.eye(4)[np.arange(24) % 4], "logistic", "y.argmax(axis=1)"),
}


@pytest.mark.parametrize(("y", "loss", "words"), INFERRED.values(), ids=INFERRED)
def test_the_loss_is_inferred_from_the_target_and_the_reason_said(write_npz, y, loss, words):
    dataset = load(write_npz(x=FEATURES, y=y))
    assert dataset.loss == loss
    assert words in dataset.loss_reason


@pytest.mark.parametrize(("num_values", "loss"), [(50, "cross_entropy"), (51, "mse")])
def test_more_than_50_distinct_integers_are_amounts(write_npz, num_values, loss):
    y = np.repeat(np.arange(num_values), 2)
    dataset = load(write_npz(x=np.ones((len(y), 1)), y=y))
    assert dataset.loss == loss
    assert str(num_values) in dataset.loss_reason


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "logistic"])
def test_a_given_loss_is_kept(write_npz, loss):
    dataset = load(write_npz(x=FEATURES, y=np.arange(24) % 2), loss=loss)
    assert (dataset.loss, dataset.loss_reason) == (loss, "given")


# The target


LABELS = {
    "from 1": ([1, 2, 3], ("1", "2", "3")),
    "two far apart": ([7, 3], ("3", "7")),
    "signs": ([1, -1], ("-1", "1")),
    "numeric order": ([10, 9, 100], ("9", "10", "100")),
    "text": (["pear", "Fig", "apple"], ("Fig", "apple", "pear")),
    "not ASCII": (["Z\u00fcrich", "Gen\u00e8ve"], ("Gen\u00e8ve", "Z\u00fcrich")),
    "one name starts another": (["ab", "a"], ("a", "ab")),
}


@pytest.mark.parametrize("kind", ["csv", "npz"])
@pytest.mark.parametrize(("labels", "classes"), LABELS.values(), ids=LABELS)
def test_labels_become_indices_in_sorted_order(write_csv, write_npz, kind, labels, classes):
    given_labels = [labels[row % len(labels)] for row in range(24)]
    path = (
        write_csv(csv_text(given_labels))
        if kind == "csv"
        else write_npz(x=FEATURES, y=np.array(given_labels))
    )
    dataset = load(path)
    assert dataset.classes == classes
    assert dataset.num_outputs == len(classes)
    assert dataset.y_train.dtype == np.int32
    train, test = split(
        np.array([classes.index(str(label)) for label in given_labels]), test_fraction=0.25, seed=0
    )
    for y, rows in ((dataset.y_train, train), (dataset.y_test, test)):
        assert [classes[index] for index in y] == [str(given_labels[row]) for row in rows]


def test_logistic_with_two_classes_has_one_output_of_0_and_1(write_csv):
    dataset = load(write_csv(csv_text(["yes", "no", "no"] * 8)), loss="logistic")
    assert (dataset.num_outputs, dataset.classes) == (1, ("no", "yes"))
    assert (dataset.y_train.dtype, dataset.y_train.shape) == (np.float32, (18, 1))
    assert all_y(dataset).sum() == 8


def test_logistic_with_columns_has_an_output_for_each(write_npz):
    y = np.random.default_rng(1).integers(0, 2, size=(24, 3))
    dataset = load(write_npz(x=FEATURES, y=y))
    assert (dataset.num_outputs, dataset.classes) == (3, None)
    assert dataset.y_train.dtype == np.float32
    np.testing.assert_array_equal(all_y(dataset).sum(axis=0), y.sum(axis=0))


@pytest.mark.parametrize("num_columns", [1, 2])
def test_mse_keeps_the_units_of_the_target(write_npz, num_columns):
    y = 1000 + np.arange(24.0 * num_columns).reshape(24, num_columns) / 4
    dataset = load(write_npz(x=FEATURES, y=y))
    assert (dataset.num_outputs, dataset.classes) == (num_columns, None)
    assert dataset.y_test.dtype == np.float32
    np.testing.assert_array_equal(np.sort(all_y(dataset), axis=0), y)


def test_a_class_of_one_sample_is_trained_on(write_csv):
    dataset = load(write_csv(csv_text(["a"] * 5 + ["b"] * 5 + ["rare"])))
    assert dataset.classes == ("a", "b", "rare")
    assert (dataset.y_train == 2).sum() == 1
    assert set(dataset.y_test) == {0, 1}


# CSV


def test_quoted_commas_quotes_and_line_breaks_are_read(write_csv):
    rows = ['1, 2,"red, dark"', '3,"4","said ""no"""', '"5",6,"red, dark"', '7,8,"two\nlines"']
    dataset = load(write_csv('"len, cm",b,target\n' + "\n".join(rows) + "\n" + rows[1]))
    assert dataset.classes == ("red, dark", 'said "no"', "two\nlines")
    assert dataset.feature_names == ("len, cm", "b")


def test_the_target_may_be_any_column(write_csv):
    path = write_csv("kind,a,b\n" + "x,1,2\ny,3,4\n" * 4)
    dataset = load(path, target="kind")
    assert (dataset.feature_names, dataset.classes) == (("a", "b"), ("x", "y"))
    assert dataset.name == "data.csv"
    assert "column 'kind'" in dataset.loss_reason


def quoted(text: bytes, comma: bytes) -> bytes:
    return b"".join(b'"' + line.replace(b",", comma) + b'"\n' for line in text.splitlines())


FLAVOURS = {
    "byte order mark": lambda text: b"\xef\xbb\xbf" + text,
    "Windows lines": lambda text: text.replace(b"\n", b"\r\n"),
    "old Macintosh lines": lambda text: text.replace(b"\n", b"\r"),
    "blank lines": lambda text: text.replace(b"\n", b"\n\n  \n"),
    "no last line end": lambda text: text.rstrip(),
    "spaces after commas": lambda text: text.replace(b",", b" , "),
    "quotes everywhere": lambda text: quoted(text, b'","'),
    "spaces before quotes": lambda text: quoted(text, b'", "'),
}


@pytest.mark.parametrize("flavour", FLAVOURS.values(), ids=FLAVOURS)
def test_the_same_table_in_another_flavour_of_csv_is_the_same_data(write_csv, flavour):
    text = csv_text(["low", "high"] * 6)
    plain = load(write_csv(text))
    other = load(write_csv(flavour(text.encode()), "Other.CSV"))
    np.testing.assert_array_equal(other.x_train, plain.x_train)
    np.testing.assert_array_equal(other.y_test, plain.y_test)
    assert (other.classes, other.feature_names) == (plain.classes, plain.feature_names)


def test_home_is_expanded(write_csv, monkeypatch):
    path = write_csv(csv_text("abab" * 2))
    monkeypatch.setenv("HOME", str(path.parent))
    assert load("~/data.csv").classes == ("a", "b")


# The class map


def test_the_class_map_is_written_as_json(write_csv, tmp_path):
    dataset = load(write_csv(csv_text(["Z\u00fcrich", "Bern"] * 4)))
    path = tmp_path / "results" / "classes.json"
    save_class_map(dataset, path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"Bern": 0, "Z\u00fcrich": 1}


def test_a_class_map_of_a_regression_is_refused(write_npz, tmp_path):
    dataset = load(write_npz(x=FEATURES, y=FEATURES[:, :2]))
    with pytest.raises(DataError, match=r"data\.npz: .* classes: got loss='mse' with 2 outputs"):
        save_class_map(dataset, tmp_path / "classes.json")


# Bad CSV files: the text of the file, the arguments, and the words that the error must hold

GOOD_ROWS = "1,2,u\n3,4,v\n5,6,u\n"
BAD_CSV = {
    "empty": ("", {}, ["is empty", "0 bytes"]),
    "blank": ("\n \n", {}, ["is empty", "blank lines"]),
    "header only": ("a,b,target\n", {}, ["has a header and no rows", "Add a line"]),
    "one column": ("a;target\n1;2\n", {}, ["at least two columns", "'a;target'", "commas"]),
    "no target": ("a,b,c\n" + GOOD_ROWS, {}, ["'target'", "Set target to one of 'a', 'b', 'c'"]),
    "wrong target": ("a,b,c\n" + GOOD_ROWS, {"target": "d"}, ["'d'", "'a', 'b', 'c'"]),
    "many columns": (",".join(f"p{i}" for i in range(99)), {}, ["'p11', ... (99 in all)"]),
    "nameless column": (",a,target\n" + GOOD_ROWS, {}, ["column 1 (1-based)", "index=False"]),
    "same name twice": ("a, a,target\n" + GOOD_ROWS, {}, ["'a' 2 times", "Rename"]),
    "not a number": (
        "a,b,target\n1,2,u\n3,four,v\n" + GOOD_ROWS,
        {},
        ["line 3, column 'b' must be a number: got 'four'"],
    ),
    "empty field": ("a,b,target\n1,,u\n" + GOOD_ROWS, {}, ["line 2, column 'b'", "got ''"]),
    "underscore": ("a,b,target\n1,1_0,u\n" + GOOD_ROWS, {}, ["line 2, column 'b'", "'1_0'"]),
    "long field": ("a,b,target\n1," + "z" * 99 + ",u\n", {}, ["'" + "z" * 37 + "...'"]),
    "too few fields": (
        "a,b,target\n" + GOOD_ROWS + "7,8\n",
        {},
        ["line 5 must have 3 fields", "got 2"],
    ),
    "too many fields": ("a,b,target\n1,2,3,u\n", {}, ["line 2 must have 3 fields", "got 4"]),
    "after blank lines": ("\na,b,target\n\n\n1,x,u\n", {}, ["line 5, column 'b'", "'x'"]),
    "after a quoted line break": (
        'a,b,target\n1,2,"u\nu"\n1,x,u\n',
        {},
        ["line 4, column 'b'", "'x'"],
    ),
    "open quote": ('a,b,target\n1,2,u\n3,"4,v\n5,6,u\n', {}, ["line 3 is not valid CSV", "Close"]),
    "NaN": ("a,b,target\n1,nan,u\n" + GOOD_ROWS, {}, ["line 2, column 'b'", "finite", "got nan"]),
    "infinity": ("a,b,target\n" + GOOD_ROWS + "-inf,2,u\n", {}, ["line 5, column 'a'", "got -inf"]),
    "too large": ("a,b,target\n" + GOOD_ROWS + "1,4e38,u", {}, ["line 5, column 'b'", "got 4e+38"]),
    "NaN target": ("a,target\n1,2\n3,nan\n5,6\n7,8\n", {}, ["line 3, column 'target'", "nan"]),
    "empty target": (
        "a,b,target\n" + GOOD_ROWS + "7,8, \n",
        {},
        ["line 5, column 'target' must not be empty"],
    ),
    "three rows": ("a,b,target\n" + GOOD_ROWS, {}, ["at least 4 rows", "got 3"]),
    "one class": (csv_text("aaaaa"), {}, ["at least two classes", "'a' in all 5 rows"]),
    "one sample a class": (csv_text("abcde"), {}, ["5 classes in 5 rows", "one sample each"]),
    "numbers and text": (
        csv_text(["1.5", "2.5", "1o5", "3"]),
        {},
        ["column 'target' holds numbers and text", "line 4 is '1o5'", "cross_entropy"],
    ),
    "text for mse": (
        csv_text(["1", "2", "three", "4"]),
        {"loss": "mse"},
        ["line 4, column 'target' must be a number for loss='mse': got 'three'"],
    ),
    "fractions for cross_entropy": (
        csv_text([1, 2, 2.5, 4]),
        {"loss": "cross_entropy"},
        ["line 4, column 'target' must be an integer or text", "got 2.5"],
    ),
    "three classes for logistic": (
        csv_text("abcabc"),
        {"loss": "logistic"},
        ["loss='logistic' needs two classes", "got 3, 'a', 'b', 'c'"],
    ),
    "Latin-1": (b"a,b,target\n1,2,u\n1,2,\xe9\n", {}, ["must be UTF-8", "line 3", "0xe9"]),
    "UTF-16": ("a,b,target\n".encode("utf-16"), {}, ["must be UTF-8", "line 1", "0xff"]),
}


@pytest.mark.parametrize(("text", "arguments", "words"), BAD_CSV.values(), ids=BAD_CSV)
def test_a_bad_csv_file_is_refused_with_the_place_and_the_value(write_csv, text, arguments, words):
    path = write_csv(text)
    said = refusal(path, **arguments)
    assert said.startswith(f"{path}: ")
    for word in words:
        assert word in said


# Bad npz files

TWO = np.arange(24) % 2
HIGHEST = FEATURES.max()
HIGHEST_ROW, HIGHEST_COLUMN = np.unravel_index(FEATURES.argmax(), FEATURES.shape)
HOLED = np.where(np.arange(72).reshape(24, 3) == 17, np.nan, FEATURES)
BAD_NPZ = {
    "no x": ({"X": FEATURES, "y": TWO}, {}, ["'X', 'y'", "without x", "np.savez"]),
    "neither": ({"a": FEATURES}, {}, ["'a'", "without x and y"]),
    "no arrays": ({}, {}, ["got none, without x and y"]),
    "pickled x": ({"x": FEATURES.astype(object), "y": TWO}, {}, ["x is a pickled object array"]),
    "pickled y": ({"x": FEATURES, "y": TWO.astype(object)}, {}, ["y is a pickled object array"]),
    "flat x": ({"x": FEATURES[:, 0], "y": TWO}, {}, ["x must be [n, d]", "got shape [24]"]),
    "images": ({"x": np.ones((24, 8, 8)), "y": TWO}, {}, ["got shape [24, 8, 8]", "Reshape"]),
    "no features": ({"x": FEATURES[:, :0], "y": TWO}, {}, ["d >= 1", "[24, 0]"]),
    "text x": ({"x": FEATURES.astype(str), "y": TWO}, {}, ["x must hold numbers", "dtype <U"]),
    "complex x": ({"x": FEATURES * 1j, "y": TWO}, {}, ["x must hold numbers", "complex128"]),
    "scalar y": ({"x": FEATURES, "y": 1}, {}, ["y must be [n] or [n, k]", "got shape []"]),
    "deep y": ({"x": FEATURES, "y": np.ones((24, 2, 2))}, {}, ["got shape [24, 2, 2]"]),
    "text columns": ({"x": FEATURES, "y": np.full((24, 2), "a")}, {}, ["dtype <U1", "[24, 2]"]),
    "dates": ({"x": FEATURES, "y": TWO.astype("M8[D]")}, {}, ["dtype datetime64[D]"]),
    "bytes": ({"x": FEATURES, "y": np.full(24, b"\xe9")}, {}, ["not ASCII", "dtype |S1"]),
    "lengths": ({"x": FEATURES, "y": TWO[1:]}, {}, ["got x [24, 3], y [23]"]),
    "no rows": ({"x": FEATURES[:0], "y": TWO[:0]}, {}, ["at least 4 rows", "got 0"]),
    "NaN in x": ({"x": HOLED, "y": TWO}, {}, ["row 5 (0-based), column 'x[:, 2]'", "got nan"]),
    "infinite y": (
        {"x": FEATURES, "y": np.where(FEATURES < HIGHEST, FEATURES, np.inf)},
        {},
        [f"row {HIGHEST_ROW} (0-based), column 'y[:, {HIGHEST_COLUMN}]'", "got inf"],
    ),
    "empty label": ({"x": FEATURES, "y": np.array(["", "b", "c"] * 8)}, {}, ["row 0 (0-based), y"]),
    "overflow when scaled": (
        {"x": np.r_[np.arange(23) * 1e-30, 1e30][:, None], "y": np.arange(24) / 2},
        {"seed": 3},
        ["row 23 (0-based)", "after standardising", "got 1"],
    ),
    "columns for cross_entropy": (
        {"x": FEATURES, "y": np.eye(24)},
        {"loss": "cross_entropy"},
        ["loss='cross_entropy' needs y [n]", "got y [24, 24]", "y.argmax(axis=1)"],
    ),
    "amounts for logistic": (
        {"x": FEATURES, "y": np.c_[TWO, TWO * 2]},
        {"loss": "logistic"},
        ["row 1 (0-based), y[:, 1] must be 0 or 1", "got 2"],
    ),
    "target": ({"x": FEATURES, "y": TWO}, {"target": "y"}, ["target='y'", "Omit it"]),
}


@pytest.mark.parametrize(("arrays", "arguments", "words"), BAD_NPZ.values(), ids=BAD_NPZ)
def test_a_bad_npz_file_is_refused_with_the_place_and_the_value(
    write_npz, arrays, arguments, words
):
    path = write_npz(**arrays)
    said = refusal(path, **arguments)
    assert said.startswith(f"{path}: ")
    for word in words:
        assert word in said


@pytest.mark.parametrize("content", [b"not a zip file", b"\x93NUMPY\x01\x00", b"\x80\x04N."])
def test_what_is_not_an_archive_is_refused(write_csv, content):
    path = write_csv(content, "data.npz")
    said = refusal(path)
    assert said.startswith(f"{path}: is damaged or not an .npz archive")
    assert "np.savez" in said


def test_a_damaged_archive_is_refused_or_read_right(write_npz):
    path = write_npz(x=FEATURES[:6, :1], y=TWO[:6])
    raw, whole = path.read_bytes(), load(path)
    refused = 0
    for position in range(0, len(raw), 5):
        path.write_bytes(raw[:position] + bytes([raw[position] ^ 4]) + raw[position + 1 :])
        try:
            np.testing.assert_array_equal(load(path).x_train, whole.x_train)
        except DataError:
            refused += 1
    assert refused > len(raw) / 5 / 2


def test_a_pickle_is_never_run(write_npz, tmp_path):
    trap = tmp_path / "trap"
    path = write_npz(x=np.array([Opener(trap)] * 4), y=TWO[:4])
    assert "a pickle can run any code" in refusal(path)
    assert not trap.exists()


class Opener:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


# Bad paths and arguments


def test_a_missing_file_is_refused(tmp_path):
    path = tmp_path / "gone.csv"
    assert refusal(path).startswith(f"{path}: cannot be read (No such file or directory)")


def test_a_directory_is_refused(tmp_path):
    assert refusal(tmp_path).startswith(f"{tmp_path}: is a directory")


@pytest.mark.parametrize("suffix", [".txt", ".npy", ""])
def test_an_unknown_suffix_is_refused(write_csv, suffix):
    path = write_csv("a,target\n1,2\n", f"data{suffix}")
    assert f"{path}: the suffix must be .csv or .npz: got {suffix!r}" in refusal(path)


def test_an_empty_archive_file_is_refused(write_csv):
    path = write_csv(b"", "data.npz")
    assert f"{path}: is empty (0 bytes)" in refusal(path)


ARGUMENTS = {
    "loss": ({"loss": "hinge"}, "'cross_entropy', 'mse', 'logistic': got loss='hinge'"),
    "target": ({"target": "a"}, "got target='a' and no file"),
    "no test part": ({"test_fraction": 0.0}, "got test_fraction=0.0"),
    "no training part": ({"test_fraction": 1}, "got test_fraction=1"),
    "NaN part": ({"test_fraction": float("nan")}, "got test_fraction=nan"),
    "seed": ({"seed": -1}, "got seed=-1"),
}


@pytest.mark.parametrize(("arguments", "words"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_a_bad_argument_is_refused_with_its_value(arguments, words):
    assert words in refusal(**arguments)


def test_logistic_for_ten_digits_is_refused():
    assert "digits: loss='logistic' needs two classes in y: got 10" in refusal(loss="logistic")
