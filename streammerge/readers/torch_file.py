"""Files of torch.save as a header: which tensor lies where in them. Hostile until checked.

Such a file is a zip archive that stores, uncompressed, a pickle of the tensors' names and shapes
and one record of bytes for each storage, so that a window on it is as good as one on a safetensors
file. The pickle is first gone through without being run: only a few opcodes and the names that
rebuild tensors may be in it. torch then loads it with `weights_only` and a memory map, by which no
tensor is copied, and where each storage lies in the map says which record it is.

This is the one file of the readers that imports torch, when there is such a file to read.
https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickletools import genops
from typing import Any

from streammerge.adapter import TensorFile
from streammerge.errors import CorruptFileError, MissingFileError, UnsupportedAdapterError, shorten
from streammerge.files import open_regular
from streammerge.readers.archive import MAGIC, read_records
from streammerge.readers.header import MAX_DIMENSIONS, MAX_NAME, Entry, Header

_OLD_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
"""How files of torch before 1.6 begin: a pickle of a number."""

_GLOBALS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|"
    r"torch (Double|Float|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage"
)
"""All that a pickle of tensors names."""

_OPCODES = frozenset(
    {"PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID", "BINPUT", "LONG_BINPUT"}
    | {"BINGET", "LONG_BINGET", "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_TUPLE", "TUPLE"}
    | {"TUPLE1", "TUPLE2", "TUPLE3", "BINUNICODE", "NONE", "NEWTRUE", "NEWFALSE", "BININT"}
    | {"BININT1", "BININT2", "LONG1"}
)

_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def is_torch_file(path: Path) -> bool:
    """Whether a file is one of torch.save, by its name or its first bytes."""
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return True
    try:
        with open_regular(path) as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_torch_file(path: Path) -> Header:
    """Return where each tensor of a file of torch.save lies.

    Raises:
        MissingFileError: there is no such file.
        CorruptFileError: it is no such file, or at odds with itself.
        UnsupportedAdapterError: it holds something else than plain tensors, each in a record of
            its own.
    """
    try:
        with open_regular(path) as stream:
            status = os.fstat(stream.fileno())
            _check_beginning(path, stream.read(len(_OLD_MAGIC)))
            records, text = read_records(path, stream, status.st_size)
            _check_pickle(path, text)
            tensors = _load(path)
            entries = tuple(_entries(path, tensors, records))
            after = path.stat()
    except FileNotFoundError as error:
        raise MissingFileError("no such file", path=str(path)) from error
    except OSError as error:
        raise CorruptFileError(f"cannot be read ({error.strerror})", path=str(path)) from error
    file = TensorFile(str(path), status.st_size, status.st_mtime_ns, status.st_ino)
    if (after.st_size, after.st_mtime_ns, after.st_ino) != (file.size, file.mtime_ns, file.inode):
        raise CorruptFileError("has changed while it was read", path=str(path))
    return Header(file, {}, entries)


def _check_beginning(path: Path, head: bytes) -> None:
    if head.startswith(MAGIC):
        return
    if head == _OLD_MAGIC:
        raise UnsupportedAdapterError(
            "was saved by torch before 1.6, whose format has no records; load and save it with "
            "PEFT to get safetensors",
            path=str(path),
            variant="torch before 1.6",
        )
    if head.startswith(b"version https:"):
        raise CorruptFileError(
            "is a git-lfs pointer, not the weights; run `git lfs pull` where it was cloned",
            path=str(path),
        )
    raise CorruptFileError("is not a file of torch.save, which is a zip archive", path=str(path))


def _check_pickle(path: Path, text: bytes) -> None:
    """Check that a pickle can do nothing but name tensors; it is not run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in texts that are refused anyway
            steps = genops(text)
            used = {(op.name, str(arg) if op.name == "GLOBAL" else "") for op, arg, _ in steps}
    except (ValueError, OverflowError) as error:
        raise CorruptFileError(f"its pickle is not sound ({error})", path=str(path)) from error
    for opcode, name in sorted(used):
        if opcode in _OPCODES and (opcode != "GLOBAL" or _GLOBALS.fullmatch(name)):
            continue
        raise UnsupportedAdapterError(
            f"its pickle holds {shorten(name or opcode)}, which no file of plain tensors does; it "
            "is not loaded",
            path=str(path),
            variant="pickle",
        )


def _load(path: Path) -> Mapping[str, Any]:
    # Loaded here alone: most adapters do without torch until they are merged.
    import torch  # noqa: PLC0415  # takes seconds to load

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        # Of the errors of an unpickler that is given anything there is no list.
        why = (str(error).splitlines() or [""])[0][:200]
        raise CorruptFileError(
            f"torch cannot load it ({type(error).__name__}: {why})", path=str(path)
        ) from error
    if not isinstance(found, dict) or not found:
        raise UnsupportedAdapterError(
            "does not hold tensors by name", path=str(path), variant="pickle"
        )
    return found


def _entries(path: Path, tensors: Mapping[str, Any], records: Mapping[int, int]) -> Iterator[Entry]:
    """Yield where each tensor lies, once it is clear which record each storage is.

    All storages are parts of one map of the file. In the order of their addresses they are the
    records in the order of their places, at one distance; nothing else is believed.
    """
    storages = {}
    for name, tensor in tensors.items():
        _check_tensor(path, name, tensor)
        storages[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
    starts, addresses = sorted(records), sorted(storages)
    distances = {a - s for a, s in zip(addresses, starts, strict=False)}
    lengths = [storages[a] for a in addresses] == [records[s] for s in starts]
    if len(distances) != 1 or not lengths:
        raise CorruptFileError(
            "its tensors are not its records, each one of them whole", path=str(path)
        )
    (distance,) = distances
    for name, tensor in tensors.items():
        dtype = _DTYPES[str(tensor.dtype).removeprefix("torch.")]
        nbytes = tensor.untyped_storage().nbytes()
        yield Entry(name, dtype, tuple(tensor.shape), tensor.data_ptr() - distance, nbytes)


def _check_tensor(path: Path, name: object, tensor: Any) -> None:
    import torch  # noqa: PLC0415  # takes seconds to load

    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        raise CorruptFileError(f"names a tensor {shorten(name)}", path=str(path))
    what = ""
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        what = f"is no plain tensor, but {shorten(type(tensor).__name__)}"
    elif str(tensor.dtype).removeprefix("torch.") not in _DTYPES or tensor.dim() > MAX_DIMENSIONS:
        what = f"is of dtype {tensor.dtype} and {tensor.dim()} dimensions"
    elif (
        not tensor.is_contiguous()
        or tensor.storage_offset()
        or tensor.nbytes != tensor.untyped_storage().nbytes()
        or tensor.nbytes == 0
    ):
        what = "is a view of a part of what was saved, or empty"
    if what:
        raise UnsupportedAdapterError(
            f"{what}; load and save the adapter with PEFT to get safetensors",
            path=str(path),
            tensor=name,
            variant="pickle",
        )
