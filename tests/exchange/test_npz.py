"""Weights as .npz: a failure here means other weights than NumPy's, or a bad file taken."""

import io
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tpmlp
from tests.cases import mesh_of
from tests.exchange.weights import (
    DTYPES,
    MODEL,
    UNBIASED,
    arrays,
    converted,
    loaded,
    placed,
    same_bits,
)
from tpmlp.exchange.npz import read_npz

NAMES = ("W_1", "b_1", "W_2", "b_2")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.npz"


def good(dtype: Any = "float32") -> dict[str, np.ndarray]:
    return dict(zip(NAMES, (a for layer in arrays(dtype) for a in layer), strict=True))


def npz(named: dict[str, Any], save: Callable[..., None] = np.savez) -> bytes:
    file = io.BytesIO()
    save(file, **named)
    return file.getvalue()


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def archive(members: list[tuple[str, bytes]]) -> bytes:
    """Return a zip; its members may share a name, and need not be arrays."""
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w") as written:
        warnings.filterwarnings("ignore", "Duplicate name")
        for name, content in members:
            written.writestr(name, content)
    return file.getvalue()


def members(**changes: bytes) -> list[tuple[str, bytes]]:
    return [(f"{name}.npy", changes.get(name, npy(array))) for name, array in good().items()]


def header(text: str, data: bytes = b"") -> bytes:
    """Return a .npy with a header as it is given."""
    padded = text.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + data


def described(shape: str, dtype: str = "<f4") -> bytes:
    return header(f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}", bytes(48))


class Bomb:
    """What would leave a mark if it were unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("import builtins; builtins.tpmlp_bomb = True",)


def with_pickle() -> bytes:
    content = pickle.dumps(np.array([Bomb()], object))
    return header("{'descr': '|O', 'fortran_order': False, 'shape': (4, 3)}", content)


def encrypted() -> bytes:
    content = bytearray(npz(good()))
    # The flags of the first member: in front of it and in the list at the end.
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(content)


def flipped() -> bytes:
    content = npz(good())
    array = good()["W_2"].tobytes()
    at = content.index(array)
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def dropped(*names: str) -> dict[str, np.ndarray]:
    return {k: v for k, v in good().items() if k not in names}


# What is wrong: (the file, what the error must say).
BAD: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "no weight": (npz(dropped("W_2")), ("W_2", "must be in")),
    "no bias": (npz(dropped("b_1")), ("b_1", "must be in")),
    "no arrays": (npz({}), ("W_1", "got none")),
    "another layer": (npz(good() | {"W_3": np.ones((1, 2))}), ("'W_3' besides",)),
    "other names": (npz({"arr_0": np.ones(3)}), ("'arr_0' besides",)),
    "transposed": (npz(good() | {"W_1": good()["W_1"].T}), ("W_1", "(3, 4)", "transpose")),
    "misshapen": (npz(good() | {"b_2": np.ones((2, 1), "f4")}), ("b_2", "(2,)", "(2, 1)")),
    "number": (npz(good() | {"b_2": np.float32(1)}), ("b_2", "()")),
    "integers": (npz(good() | {"W_1": np.ones((4, 3), "i4")}), ("W_1", "dtype=int32")),
    "complex": (npz(good() | {"W_1": np.ones((4, 3), "c8")}), ("W_1", "dtype=complex64")),
    "long double": (npz(good() | {"W_1": np.ones((4, 3), "g")}), ("W_1", "dtype=")),
    "strings": (npz(good() | {"b_2": np.array(["a", "b"])}), ("b_2", "dtype=str")),
    "records": (npz(good() | {"b_2": np.zeros(2, "u1,u1")}), ("b_2", "dtype=void")),
    "two dtypes": (npz(good() | {"b_2": np.ones(2)}), ("W_1 of float32", "b_2 of float64")),
    "objects": (npz(good() | {"b_2": np.array([1, "a"], object)}), ("b_2", "dtype=object")),
    "pickle": (archive(members(W_1=with_pickle())), ("W_1", "dtype=object")),
    "an array twice": (archive([*members(), *members()[2:3]]), ("'W_2'", "once")),
    "no .npy": (archive([*members(), ("notes.txt", b"")]), ("'notes.txt' besides",)),
    "no suffix": (archive([("W_1", npy(good()["W_1"])), *members()[1:]]), ("tensor W_1",)),
    "a way out": (archive([*members(), ("../W_1.npy", b"")]), ("'../W_1' besides",)),
    "shape of 2^60": (archive(members(W_1=described(f"({2**60}, 3)"))), ("W_1", f"({2**60}, 3)")),
    "negative shape": (archive(members(W_1=described("(-4, -3)"))), ("W_1", "(-4, -3)")),
    "no shape": (archive(members(W_1=described("None"))), ("W_1",)),
    "nested header": (archive(members(W_1=header("(" * 900))), ("tensor W_1 cannot be read",)),
    "signs in a header": (archive(members(W_1=header("-" * 9000))), ("tensor W_1 cannot be read",)),
    "a long header": (archive(members(W_1=header("1" * 60_000))), ("tensor W_1 cannot be read",)),
    "not an array": (archive(members(W_1=b"hello")), ("tensor W_1 cannot be read",)),
    "empty member": (archive(members(W_1=b"")), ("tensor W_1 cannot be read",)),
    "data cut off": (archive(members(W_1=npy(good()["W_1"])[:-1])), ("tensor W_1",)),
    "data left over": (
        archive(members(W_1=npy(good()["W_1"]) + b"0")),
        ("tensor W_1", "more bytes"),
    ),
    "another version": (
        archive(members(W_1=b"\x93NUMPY\x09\x00" + npy(good()["W_1"])[8:])),
        ("tensor W_1", "version"),
    ),
    "a flipped bit": (flipped(), ("tensor W_2", "CRC")),
    "encrypted": (encrypted(), ("tensor W_1", "password")),
    "no zip": (b"hello, world" * 20, ("its list of arrays", "not a zip file")),
    "safetensors": (b"\x08" + bytes(7) + b'{"a":1} ' + bytes(40), ("not a zip file",)),
    "a .npy": (npy(np.ones((4, 3))), ("not a zip file",)),
}


@pytest.mark.parametrize("wrong", BAD)
def test_a_bad_file_is_one_error_that_names_what_is_wrong(wrong: str, path: Path) -> None:
    content, said = BAD[wrong]
    path.write_bytes(content)
    with pytest.raises(ValueError, match="must") as raised:
        tpmlp.load_npz(MODEL, path, mesh_of((1, 3, 1)))
    for words in said:
        assert words in str(raised.value)
    assert str(path) in str(raised.value)
    assert len(str(raised.value)) < 1200
    assert str(raised.value).isprintable()
    assert not hasattr(__import__("builtins"), "tpmlp_bomb")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", [MODEL, UNBIASED], ids=["bias", "no bias"])
def test_parameters_come_back_bit_for_bit_on_another_mesh(
    model: tpmlp.MLP, dtype: str, path: Path
) -> None:
    tpmlp.save_npz(model, placed(model, dtype), path)
    wanted = arrays(dtype, bias=model.bias)
    assert same_bits(loaded(tpmlp.load_npz, model, path), wanted)


def test_float16_is_read_as_the_same_numbers_in_float32(path: Path) -> None:
    tpmlp.save_npz(MODEL, placed(MODEL, "float16"), path)
    halves = converted(arrays("float16"), np.float32)
    assert same_bits(loaded(tpmlp.load_npz, MODEL, path), halves)


def test_float64_is_refused_where_jax_would_make_float32_of_it(path: Path) -> None:
    path.write_bytes(npz(good("float64")))
    with jax.enable_x64(False), pytest.raises(ValueError, match=r"dtype=float64.*jax_enable_x64"):
        tpmlp.load_npz(MODEL, path, mesh_of((1, 3, 1)))


def test_numpy_reads_names_shapes_and_values(path: Path) -> None:
    tpmlp.save_npz(MODEL, placed(MODEL), path)
    with np.load(path, allow_pickle=False) as file:
        assert tuple(file) == NAMES
        for name, array in good().items():
            np.testing.assert_array_equal(file[name], array, strict=True)


def test_the_file_has_the_name_that_was_given(tmp_path: Path) -> None:
    tpmlp.save_npz(MODEL, placed(MODEL), tmp_path / "weights")
    assert [file.name for file in tmp_path.iterdir()] == ["weights"]


@pytest.mark.parametrize(
    "change",
    [
        lambda a: np.asfortranarray(a),
        lambda a: a.astype(">f4"),
        lambda a: np.repeat(a, 2, axis=0)[::2],
    ],
    ids=["by columns", "big-endian", "strided"],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_writes_is_read(change: Any, save: Any, path: Path) -> None:
    path.write_bytes(npz({name: change(array) for name, array in good().items()}, save))
    assert same_bits(read_npz(MODEL, path), arrays())


def test_bfloat16_as_numpy_writes_it_is_read(path: Path) -> None:
    path.write_bytes(npz(good(jnp.bfloat16)))
    assert same_bits(read_npz(MODEL, path), arrays(jnp.bfloat16))


def test_other_arrays_are_read_past_where_they_are_named(path: Path) -> None:
    path.write_bytes(npz(good() | {"mean": np.array([None]), "scale": np.ones(3)}))
    mesh = mesh_of((1, 3, 1))
    params = tpmlp.load_npz(MODEL, path, mesh, ignore=("mean", "scale"))
    assert same_bits(tpmlp.to_numpy(MODEL, params), arrays())
    with pytest.raises(ValueError, match="'scale' besides"):
        tpmlp.load_npz(MODEL, path, mesh, ignore=("mean",))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flip_of_any_bit_is_found_or_harmless(save: Any, path: Path) -> None:
    content, rng = npz(good(), save), np.random.default_rng(0)
    refused = 0
    for i in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[i] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            assert same_bits(read_npz(MODEL, path), arrays())
        except ValueError:
            refused += 1
    assert refused > 0.3 * len(content) / 3


def test_a_file_cut_anywhere_is_refused(path: Path) -> None:
    content = npz(good())
    for length in range(0, len(content), 5):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="must"):
            read_npz(MODEL, path)


def test_parameters_that_could_not_be_read_again_are_not_written(path: Path) -> None:
    numbers = converted(arrays(), jnp.float8_e4m3fn)
    params = tpmlp.from_numpy(MODEL, numbers, mesh_of((1, 1, 1)))
    with pytest.raises(ValueError, match=r"one dtype.*got float8_e4m3fn"):
        tpmlp.save_npz(MODEL, params, path)
    assert not path.exists()
