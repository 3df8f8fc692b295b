"""Safetensors headers: read, check, write. Data is only touched by `read_tensor`.

The format: 8 bytes little-endian header length, a JSON object of that length (space padded), then the data. Every
tensor names its type, shape and [begin, end) in the data; together they cover the data without holes or overlaps
(github.com/huggingface/safetensors, README "Format").
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from angelforge.diskerrors import explained
from angelforge.dtypes import DType
from angelforge.errors import AngelForgeError

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: `offset` is absolute in the file, `nbytes` its size."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class TensorFile:
    """The header of one safetensors file. `header_sha256` covers the first `data_start` bytes."""

    path: Path
    size: int
    data_start: int
    header_sha256: str
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def read_tensor_file(path: Path) -> TensorFile:
    """Reads and checks the header of a safetensors file.

    Raises AngelForgeError naming the file and the problem: absent, truncated, malformed, unknown type, wrong offsets.
    """
    raw, size = _read_header_bytes(path)
    data_start = len(raw)
    entries = _parse(path, raw[8:])
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad(path, "its __metadata__ is not an object of strings")
    tensors = {name: _tensor(path, data_start, name, entry) for name, entry in entries.items()}
    _check_coverage(path, size, data_start, tensors)
    return TensorFile(
        path,
        size,
        data_start,
        hashlib.sha256(raw).hexdigest(),
        MappingProxyType(tensors),
        MappingProxyType(metadata),
    )


def read_tensor(info: TensorInfo) -> npt.NDArray[Any]:
    """The data of one tensor in memory of its own (NumPy array of `info.shape` and `info.dtype`).

    Raises AngelForgeError when the file cannot be read or has become shorter.
    """
    array = np.empty(info.shape, info.dtype.numpy)
    view = array.reshape(-1).view(np.uint8).data
    done = 0
    with explained("read", info.path):
        descriptor = os.open(info.path, os.O_RDONLY)
        try:
            while done < info.nbytes:
                count = os.preadv(descriptor, [view[done:]], info.offset + done)
                if count == 0:
                    raise _bad(info.path, f"it ends inside tensor {info.name!r}; the file was shortened meanwhile")
                done += count
        finally:
            os.close(descriptor)
    return array


def encode_header(
    tensors: Sequence[tuple[str, DType, tuple[int, ...]]], metadata: Mapping[str, str], align: int = 4096
) -> bytes:
    """The header of a file that holds `tensors` in this order, back to back.

    Returns 8 bytes of length and the JSON, space padded so that the data begins at a multiple of `align` bytes.
    Raises AngelForgeError for a name given twice or reserved by the format.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, dtype, shape in tensors:
        if name in entries or name == "__metadata__":
            raise AngelForgeError(f"Tensor name {name!r} is reserved or used twice in one file; each needs its own.")
        end = begin + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": dtype.value, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    length = -(-(8 + len(text)) // align) * align - 8
    return length.to_bytes(8, "little") + text.ljust(length)


def _bad(path: Path, problem: str) -> AngelForgeError:
    return AngelForgeError(
        f"{path} is not a usable safetensors file: {problem}. Fetch or write this file again, complete."
    )


def _read_header_bytes(path: Path) -> tuple[bytes, int]:
    with explained("read", path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise _bad(path, f"it has {size} bytes, a header needs at least 8")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER:
            raise _bad(path, f"its header claims {length} bytes, at most {MAX_HEADER} are allowed")
        if 8 + length > size:
            raise _bad(path, f"its header claims {length} bytes, the whole file has {size}")
        header = file.read(length)
    if len(header) < length:
        raise _bad(path, "it was shortened while being read")
    return prefix + header, size


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(text.decode(), object_pairs_hook=lambda pairs: _unique(path, pairs))
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, numbers or nesting beyond all measure
        raise _bad(path, f"its header is not valid JSON ({error})") from None
    if not isinstance(parsed, dict):
        raise _bad(path, "its header is not a JSON object")
    return parsed


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _bad(path, f"its header holds {twice!r} twice")
    return result


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _tensor(path: Path, data_start: int, name: str, entry: Any) -> TensorInfo:
    if not name.isprintable():
        raise _bad(path, f"the tensor name {name!r} has characters that cannot be printed")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, f"tensor {name!r} needs exactly dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DType.__members__:
        raise _bad(path, f"tensor {name!r} has the unsupported type {code!r}, known are {', '.join(DType.__members__)}")
    if not _counts(shape):
        raise _bad(path, f"tensor {name!r} has the shape {shape!r}, expected a list of counts")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(path, f"tensor {name!r} has the offsets {offsets!r}, expected [begin, end]")
    dtype = DType(code)
    nbytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise _bad(
            path, f"tensor {name!r} ({code} {shape}) needs {nbytes} bytes, its offsets hold {offsets[1] - offsets[0]}"
        )
    return TensorInfo(name, dtype, tuple(shape), path, data_start + offsets[0], nbytes)


def _check_coverage(path: Path, size: int, data_start: int, tensors: Mapping[str, TensorInfo]) -> None:
    end = data_start
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset < end:
            raise _bad(path, f"tensor {info.name!r} overlaps the one before it")
        if info.offset > end:
            raise _bad(path, f"{info.offset - end} bytes before tensor {info.name!r} belong to no tensor")
        end = info.offset + info.nbytes
    if end > size:
        raise _bad(path, f"it has {size} bytes, its tensors need {end}: it is truncated")
    if end < size:
        raise _bad(path, f"its last {size - end} bytes belong to no tensor")
