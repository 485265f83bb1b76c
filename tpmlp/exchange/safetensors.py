"""Weights as safetensors, named and turned as PyTorch has them.

The file is that of an nn.Sequential of Linear modules with activations between them:

    0.weight [d_1, d_0], 0.bias [d_1], 2.weight [d_2, d_1], 2.bias [d_2], ...

On loading any numbers will do that rise from layer to layer, as where a Dropout stands between.
The safetensors package holds the header against the file: its length, JSON, shapes, dtypes, and
offsets that cover the data once. It lets one of two equal names win; here they are refused. Our
own files carry the hash of the parameters, so that a bit that flipped is found on loading.
"""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tpmlp.exchange.files import check_file, written_whole
from tpmlp.exchange.fingerprint import hash_arrays
from tpmlp.exchange.tensors import (
    Names,
    Tensor,
    check_dtypes,
    check_names,
    check_once,
    check_tensors,
    listed,
    shown,
    usable,
)
from tpmlp.extras import require
from tpmlp.model import MLP, Arrays, Params
from tpmlp.models import check_is_chain
from tpmlp.parameters import from_numpy, to_numpy
from tpmlp.strategy import Strategy

HASH_KEY = "tpmlp.parameter_hash"

# A header takes about 100 bytes a tensor. The package would parse 100 MB.
MAX_HEADER_BYTES = 2**22

# What the package says where the offsets are right and the data have another length.
_NOT_COVERED = "incomplete"

_NAME = re.compile(r"(0|[1-9][0-9]{0,8})\.(?:weight|bias)")
_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def save_safetensors(model: MLP, params: Params, path: Any) -> None:
    """Write parameters as the state of a PyTorch nn.Sequential.

    PyTorch takes them with `module.load_state_dict(safetensors.torch.load_file(path))`. The file
    at path is replaced when the new one is whole. Every process calls this; the first one writes.

    Args:
        model: the model.
        params: its parameters, on any mesh, in float32, bfloat16, float64 or float16.
        path: of the file; its folder must be there.

    Raises:
        ValueError: parameters of another model or of several dtypes, or no path for a file.
        ModuleNotFoundError: safetensors is not installed.
    """
    package = require("safetensors.numpy", extra="exchange", user="save_safetensors")
    check_is_chain(model, "save_safetensors")
    arrays = to_numpy(model, params)
    check_dtypes(arrays)
    names = [name for l in range(model.num_layers) for name in _names(2 * l)]
    pairs = zip(names, (a for layer in arrays for a in layer), strict=True)
    # The package writes other values, silently, for arrays that are not contiguous.
    tensors = {name: np.ascontiguousarray(a) for name, a in pairs if a is not None}
    if jax.process_index() == 0:
        with written_whole(path) as temporary:
            metadata = {"format": "pt", HASH_KEY: hash_arrays(arrays)}
            package.save_file(tensors, temporary, metadata=metadata)


def load_safetensors(
    model: MLP, path: Any, mesh: Mesh, *, strategy: Strategy | None = None
) -> Params:
    """Read the weights of a PyTorch nn.Sequential and place them.

    Args:
        model: the model; its widths and bias say what must be in the file. The activation is
            not in it.
        path: of the file.
        mesh: the mesh.
        strategy: Strategy() by default.

    Returns:
        Parameters in the file's dtype; float16 becomes float32, which has all its numbers.

    Raises:
        ValueError: names the tensor that is missing, extra, twice there, misshapen or of another
            dtype; or says what is wrong with the file.
        ModuleNotFoundError: safetensors is not installed.
    """
    return from_numpy(model, read_safetensors(model, path), mesh, strategy=strategy)


def read_safetensors(model: MLP, path: Any) -> Arrays:
    """Read a file into arrays of logical widths; nothing is read before all is checked."""
    package = require("safetensors", extra="exchange", user="load_safetensors")
    check_is_chain(model, "load_safetensors")
    path = check_file(path)
    _check_header_length(path)
    try:
        with package.safe_open(path, framework="numpy") as file:
            metadata, header = _read_header(path)
            found = {name: _tensor(entry) for name, entry in header.items()}
            names = _name_layers(path, model, list(found))
            check_names(path, model, list(found), names)
            check_tensors(path, model, found, names)
            arrays = [
                (file.get_tensor(W), file.get_tensor(b) if model.bias else None) for W, b in names
            ]
    except package.SafetensorError as error:
        raise _refuse(path, _reason(path, str(error))) from error
    if metadata.get(HASH_KEY, hash_arrays(arrays)) != hash_arrays(arrays):
        raise ValueError(
            f"tensors of {path} must have the hash that was written with them: got "
            f"{hash_arrays(arrays)[:16]}, written {metadata[HASH_KEY][:16]!r}. The file is "
            f"damaged; if it was changed on purpose, write it without {HASH_KEY!r}."
        )
    return usable(arrays)


def _names(module: int) -> tuple[str, str]:
    return f"{module}.weight", f"{module}.bias"


def _name_layers(path: Path, model: MLP, found: list[str]) -> Names:
    """Return the names of W_l and b_l: modules in the order of their numbers."""
    numbers = sorted({int(match[1]) for name in found if (match := _NAME.fullmatch(name))})
    if len(numbers) != model.num_layers:
        l = min(len(numbers), model.num_layers) + 1
        wrong = f"{numbers[l - 1]}.weight is extra" if l <= len(numbers) else f"W_{l} is missing"
        raise ValueError(
            f"tensors of {path} must be weight and bias of num_layers={model.num_layers} modules: "
            f"got {len(numbers)} modules, {listed(found)}; {wrong}. The file is of another model, "
            "or not that of an nn.Sequential."
        )
    return [_names(number) for number in numbers]


def _check_header_length(path: Path) -> None:
    """Refuse a header that is too long to be one, before anything reads it."""
    length = _header_bytes(path)
    if length > min(MAX_HEADER_BYTES, path.stat().st_size - 8):
        raise _refuse(path, f"header of {length} bytes in {path.stat().st_size}")


def _header_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return int.from_bytes(file.read(8), "little")


def _read_header(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Return metadata and tensors of a header that the package has accepted; each name once."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        check_once(path, (name for name, _ in pairs))
        return dict(pairs)

    with path.open("rb") as file:
        text = file.read(8 + _header_bytes(path))[8:]
    header = json.loads(text, object_pairs_hook=once)
    metadata = header.pop("__metadata__", None) or {}
    return metadata, header


def _tensor(entry: dict[str, Any]) -> Tensor:
    return Tensor(tuple(entry["shape"]), str(_DTYPES.get(entry["dtype"], entry["dtype"])))


def _reason(path: Path, said: str) -> str:
    """Return why the package refused a file: its words, and where the data end too soon."""
    if _NOT_COVERED not in said:
        return shown(said, most=200)
    # The package checks this last: it has accepted the header.
    header, data_bytes = _read_header(path)[1], path.stat().st_size - 8 - _header_bytes(path)
    ends = sorted((entry["data_offsets"][1], name) for name, entry in header.items())
    for end, name in ends:
        if end > data_bytes:
            return f"tensor {shown(name)} is cut off: {data_bytes} bytes of data, it ends at {end}"
    return f"{data_bytes} bytes of data, which are more than its tensors have"


def _refuse(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"path must be a safetensors file: got path={str(path)!r}, {reason}. It is damaged, or of "
        "another format."
    )
