"""Weights as safetensors: a failure here means other outputs than PyTorch's, or a bad file taken.

Bad files are made byte by byte, so that each is wrong in one thing.
"""

import json
import struct
import tracemalloc
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

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
from tpmlp import reference
from tpmlp.exchange.safetensors import HASH_KEY, MAX_HEADER_BYTES, read_safetensors

DATA = Path(__file__).parent.parent / "data"
TORCH_MODEL = tpmlp.MLP((3, 4, 4, 4, 4, 2), activation="tanh")
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I64": 8}
Entries = list[tuple[str, Any]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.safetensors"


def entries(*tensors: tuple[str, str, tuple[int, ...]]) -> Entries:
    """Return a header for tensors (name, dtype, shape) that lie one behind the other."""
    header, end = [], 0
    for name, dtype, shape in tensors:
        start, end = end, end + SIZES[dtype] * int(np.prod(shape))
        header.append((name, {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}))
    return header


def good(dtype: str = "F32") -> Entries:
    shapes = {"0.weight": (4, 3), "0.bias": (4,), "2.weight": (2, 4), "2.bias": (2,)}
    return entries(*((name, dtype, shape) for name, shape in shapes.items()))


def file_of(header: Entries | bytes, length: int | None = None, data_bytes: int = 104) -> bytes:
    """Return a file; a header of pairs may name one tensor twice."""
    if not isinstance(header, bytes):
        header = (
            "{" + ", ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in header) + "}"
        ).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + bytes(data_bytes)


def changed(name: str, **fields: Any) -> bytes:
    return file_of([(k, v | fields if k == name else v) for k, v in good()])


def without(*names: str) -> bytes:
    kept = [(k, v["dtype"], v["shape"]) for k, v in good() if k not in names]
    header = entries(*kept)
    return file_of(header, data_bytes=header[-1][1]["data_offsets"][1])


def beside(name: str, dtype: str = "F32", shape: tuple[int, ...] = (2,)) -> bytes:
    header = entries(*((k, v["dtype"], v["shape"]) for k, v in good()), (name, dtype, shape))
    return file_of(header, data_bytes=header[-1][1]["data_offsets"][1])


def as_type(dtype: str) -> bytes:
    header = good(dtype)
    return file_of(header, data_bytes=header[-1][1]["data_offsets"][1])


def mixed() -> bytes:
    header = entries(*((k, "F64" if k == "2.weight" else "F32", v["shape"]) for k, v in good()))
    return file_of(header, data_bytes=header[-1][1]["data_offsets"][1])


def renamed(**names: str) -> bytes:
    return file_of([(names.get(k.replace(".", "_"), k), v) for k, v in good()])


def transposed() -> bytes:
    shapes = [(k, v["dtype"], (3, 4) if k == "0.weight" else v["shape"]) for k, v in good()]
    return file_of(entries(*shapes))


HOSTILE = "x\x1b[31m" * 100_000
TWICE = [*good(), ("2.weight", dict(good())["2.weight"])]
DEEP = b'{"__metadata__":' + b"[" * 100_000 + b"]" * 100_000 + b"}"

# What is wrong: (the file, what the error must say).
BAD: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "no weight": (without("2.weight"), ("2.weight", "W_2", "must be in")),
    "no bias": (without("0.bias"), ("0.bias", "b_1", "must be in")),
    "no layer": (without("2.weight", "2.bias"), ("1 modules", "W_2 is missing")),
    "no tensors": (file_of(b"{}", data_bytes=0), ("0 modules", "none", "W_1 is missing")),
    "another layer": (beside("4.weight", shape=(1, 2)), ("3 modules", "4.weight is extra")),
    "another tensor": (beside("1.running_mean"), ("'1.running_mean' besides",)),
    "a long name": (beside("x" * 10_000), ("'" + "x" * 60 + "'", "besides")),
    "a zero before": (renamed(**{"2_weight": "02.weight"}), ("'02.weight' besides",)),
    "digits of elsewhere": (renamed(**{"2_weight": "\u0662.weight"}), ("besides",)),
    "a huge number": (renamed(**{"2_weight": "9" * 5000 + ".weight"}), ("9" * 60, "besides")),
    "a prefix": (renamed(**{"0_weight": "net.0.weight"}), ("'net.0.weight' besides",)),
    "a tensor twice": (file_of(TWICE), ("'2.weight'", "once")),
    "metadata twice": (
        file_of(b'{"__metadata__":{"a":"b","a":"c"},' + json.dumps(dict(good())).encode()[1:]),
        ("'a'", "once"),
    ),
    "transposed": (transposed(), ("0.weight", "W_1", "(4, 3)", "(3, 4)", "transpose")),
    "misshapen": (changed("2.bias", shape=[1, 2]), ("2.bias", "b_2", "(2,)", "(1, 2)")),
    "empty tensor": (
        file_of(entries(*((k, "F32", (0, *v["shape"][1:])) for k, v in good())), data_bytes=0),
        ("0.weight", "(0, 3)"),
    ),
    "integers": (changed("0.weight", dtype="I32"), ("0.weight", "dtype=I32", "bfloat16")),
    "all integers": (as_type("I64"), ("0.weight", "dtype=I64")),
    "two dtypes": (mixed(), ("0.weight of float32", "2.weight of float64")),
    "unknown dtype": (changed("0.weight", dtype="F33"), ("F33",)),
    "short": (b"\x01\x02\x03", ("safetensors file", "header of")),
    "header beyond the file": (file_of(b"{}", length=2**40), (f"header of {2**40} bytes",)),
    "header of 2^60": (file_of(b"{}", length=2**60), (f"header of {2**60} bytes",)),
    "header of many MiB": (
        file_of(b"{}" + b" " * (MAX_HEADER_BYTES - 1), data_bytes=0),
        (f"header of {MAX_HEADER_BYTES + 1} bytes",),
    ),
    "no JSON": (file_of(b"hello, world"), ("invalid JSON",)),
    "no UTF-8": (file_of(b'{"\xff": 1}'), ("invalid UTF-8",)),
    "a list": (file_of(b"[]"), ("invalid JSON",)),
    "null": (file_of(b"null"), ("invalid JSON",)),
    "deep": (file_of(DEEP), ("invalid JSON",)),
    "overlap": (changed("2.weight", data_offsets=[60, 92]), ("invalid offset", "2.weight")),
    "offsets turned": (changed("2.bias", data_offsets=[104, 96]), ("2.bias",)),
    "beyond the data": (changed("2.bias", data_offsets=[96, 2**40]), ("offset for tensor",)),
    "data left over": (file_of(good(), data_bytes=105), ("105 bytes of data", "more than")),
    "data cut off": (file_of(good(), data_bytes=103), ("'2.bias' is cut off", "103", "104")),
    "most data cut off": (file_of(good(), data_bytes=50), ("'0.bias' is cut off", "50", "64")),
    "a hostile name cut off": (
        file_of(entries((HOSTILE, "F32", (2,))), data_bytes=7),
        ("\\x1b[31m", "is cut off"),
    ),
    "a hostile name": (beside(HOSTILE), ("\\x1b[31m", "besides")),
    "a hostile name and offset": (
        file_of([*good(), (HOSTILE, {"dtype": "F32", "shape": [1], "data_offsets": [999, 1003]})]),
        ("\\x1b[31m", "offset for tensor"),
    ),
    "a hostile dtype": (changed("0.bias", dtype=HOSTILE), ("\\x1b[31m", "unknown variant")),
    "a hostile rank": (changed("0.bias", shape=[4] + [1] * 9999), ("0.bias", "10000 dims")),
    "negative dim": (changed("0.weight", shape=[-4, -3]), ("invalid JSON",)),
    "dims beyond 2^64": (changed("0.weight", shape=[2**62, 2**62]), ("overflow",)),
    "npz": (b"PK\x03\x04" + bytes(200), ("safetensors file", "header of")),
}


@pytest.mark.parametrize("wrong", BAD)
def test_a_bad_file_is_one_error_that_names_what_is_wrong(wrong: str, path: Path) -> None:
    content, said = BAD[wrong]
    path.write_bytes(content)
    with pytest.raises(ValueError, match="must") as raised:
        tpmlp.load_safetensors(MODEL, path, mesh_of((1, 3, 1)))
    for words in said:
        assert words in str(raised.value)
    assert str(path) in str(raised.value)
    assert len(str(raised.value)) < 1200
    assert str(raised.value).isprintable()


def test_the_file_that_the_bad_ones_are_made_of_is_good(path: Path) -> None:
    path.write_bytes(file_of(good()))
    zeros = [(np.zeros(shape, "f4"), np.zeros(shape[0], "f4")) for shape in MODEL.layer_shapes]
    assert same_bits(read_safetensors(MODEL, path), zeros)


def test_a_hostile_length_allocates_nothing(path: Path) -> None:
    path.write_bytes(file_of(b"{}", length=2**31))
    tracemalloc.start()
    with pytest.raises(ValueError, match="header of"):
        read_safetensors(MODEL, path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 2**20


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", [MODEL, UNBIASED], ids=["bias", "no bias"])
def test_parameters_come_back_bit_for_bit_on_another_mesh(
    model: tpmlp.MLP, dtype: str, path: Path
) -> None:
    tpmlp.save_safetensors(model, placed(model, dtype), path)
    wanted = arrays(dtype, bias=model.bias)
    assert same_bits(loaded(tpmlp.load_safetensors, model, path), wanted)


def test_float16_is_read_as_the_same_numbers_in_float32(path: Path) -> None:
    tpmlp.save_safetensors(MODEL, placed(MODEL, "float16"), path)
    halves = converted(arrays("float16"), np.float32)
    assert same_bits(loaded(tpmlp.load_safetensors, MODEL, path), halves)


def test_float64_is_refused_where_jax_would_make_float32_of_it(path: Path) -> None:
    tpmlp.save_safetensors(MODEL, placed(MODEL, "float64"), path)
    with (
        jax.enable_x64(False),
        pytest.raises(ValueError, match=r"0\.weight must .*dtype=float64.*jax_enable_x64"),
    ):
        tpmlp.load_safetensors(MODEL, path, mesh_of((1, 3, 1)))


def test_names_shapes_and_values_are_those_of_a_sequential(path: Path) -> None:
    tpmlp.save_safetensors(MODEL, placed(MODEL), path)
    tensors = safetensors.numpy.load_file(path)
    assert sorted(tensors) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    for l, (W, b) in enumerate(arrays()):
        np.testing.assert_array_equal(tensors[f"{2 * l}.weight"], W, strict=True)
        np.testing.assert_array_equal(tensors[f"{2 * l}.bias"], b, strict=True)


def test_a_file_says_that_it_is_pytorchs_and_what_its_hash_is(path: Path) -> None:
    params = placed(MODEL)
    tpmlp.save_safetensors(MODEL, params, path)
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    assert metadata == {"format": "pt", HASH_KEY: tpmlp.parameter_hash(MODEL, params)}


@cache
def torch_outputs() -> dict[str, np.ndarray]:
    return {
        k: np.array(v) for k, v in json.loads((DATA / "torch-outputs.json").read_text()).items()
    }


def test_the_weights_of_pytorch_give_its_outputs() -> None:
    numbers = read_safetensors(TORCH_MODEL, DATA / "torch-float32.safetensors")
    x, wanted = torch_outputs()["x"], torch_outputs()["outputs"]
    outputs = reference.forward(numbers, x, activation="tanh")
    # PyTorch's own float32: five layers of four sums, of numbers below 1.
    np.testing.assert_allclose(outputs, wanted, rtol=0, atol=5 * 4 * 2**-24)


def test_the_weights_of_pytorch_in_bfloat16_are_those_in_float32_rounded() -> None:
    wide, narrow = (
        read_safetensors(TORCH_MODEL, DATA / f"torch-{dtype}.safetensors")
        for dtype in ("float32", "bfloat16")
    )
    assert same_bits(narrow, converted(wide, jax.numpy.bfloat16))


def test_a_flip_of_any_bit_of_our_file_is_found_or_harmless(path: Path) -> None:
    tpmlp.save_safetensors(MODEL, placed(MODEL), path)
    content, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for i in range(0, len(content), 2):
        damaged = bytearray(content)
        damaged[i] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            assert same_bits(read_safetensors(MODEL, path), arrays())
        except ValueError:
            refused += 1
    # All of the data is behind the hash; in the header, the name of the format is not.
    assert refused > 0.8 * len(content) / 2


def test_a_file_cut_anywhere_is_refused(path: Path) -> None:
    tpmlp.save_safetensors(MODEL, placed(MODEL), path)
    content = path.read_bytes()
    for length in range(0, len(content), 3):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="must"):
            read_safetensors(MODEL, path)


def test_damaged_data_is_named_as_such(path: Path) -> None:
    tpmlp.save_safetensors(MODEL, placed(MODEL), path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"must have the hash.*damaged"):
        read_safetensors(MODEL, path)


def test_nothing_of_the_callers_is_changed(path: Path) -> None:
    params = placed(MODEL)
    before = tpmlp.parameter_hash(MODEL, params)
    tpmlp.save_safetensors(MODEL, params, path)
    content = path.read_bytes()
    loaded(tpmlp.load_safetensors, MODEL, path)
    assert tpmlp.parameter_hash(MODEL, params) == before
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_parameters_of_another_model_are_not_written_over_a_file(path: Path) -> None:
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=r"W_2 .*logical shape \(9, 4\).* of another model"):
        tpmlp.save_safetensors(tpmlp.MLP((3, 4, 9)), placed(MODEL), path)
    assert path.read_bytes() == b"old"


def test_parameters_that_could_not_be_read_again_are_not_written(path: Path) -> None:
    first, last = arrays("float32")
    narrow = [first, *converted([last], jax.numpy.float8_e4m3fn)]
    params = tpmlp.from_numpy(MODEL, narrow, mesh_of((1, 1, 1)))
    with pytest.raises(ValueError, match=r"one dtype.*float32, float8_e4m3fn"):
        tpmlp.save_safetensors(MODEL, params, path)
    assert not path.exists()


def test_without_the_package_it_is_said_what_to_install(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    for call in (
        lambda: tpmlp.save_safetensors(MODEL, placed(MODEL), path),
        lambda: tpmlp.load_safetensors(MODEL, path, mesh_of((1, 1, 1))),
    ):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'tpmlp\[exchange\]'"):
            call()
