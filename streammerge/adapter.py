"""An adapter on disk as a manifest: its config, and where each target's factors lie.

A manifest is columns of arrays over a name table that all adapters of a run share, never an
object for each tensor: 64 adapters of 45,000 targets take some 300 MiB this way. It holds no
tensor data, and no file is kept open for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

LINEAR, EMBEDDING, CONV = 0, 1, 2
"""Layer kinds: how the factors are named and shaped in the file."""

DTYPES = ("F64", "F32", "F16", "BF16")
"""The dtypes that factors may have, as safetensors spells them; columns hold the index."""

DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
"""Every dtype of the format, and the bits of a number; extra tensors may have any of them."""

TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The same dtypes as torch spells them, which is how options and plans do."""

STORED_NAMES = {ours: theirs for theirs, ours in TORCH_NAMES.items()}

ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
INDEX_NAME = "adapter_model.safetensors.index.json"
"""An adapter's files: PEFT's names, and the usual one for the index of shards."""

PREFIX = "base_model.model."
"""What PEFT writes before every module's path."""

SUFFIXES = {
    LINEAR: (".lora_A.weight", ".lora_B.weight"),
    EMBEDDING: (".lora_embedding_A", ".lora_embedding_B"),
    CONV: (".lora_A.weight", ".lora_B.weight"),
}
"""What PEFT writes after a module's path, for A and for B."""


class NameTable:
    """Target names, each held once and known by its number."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._ids: dict[str, int] = {}

    def add(self, name: str) -> int:
        """Return the number of `name`, which is entered if it is new."""
        number = self._ids.setdefault(name, len(self.names))
        if number == len(self.names):
            self.names.append(name)
        return number

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class AdapterConfig:
    """What of an adapter_config.json a merge needs; `raw` is the rest of it."""

    rank: int
    alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    base_model: str | None = None
    task_type: str | None = None
    raw: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Columns:
    """One row for each target: its shape, and where its two factors lie.

    In the canonical orientation a delta is m × n, B is m × rank and A is rank × n. For an
    embedding n counts the vocabulary; for a convolution n is inputs × kernel.
    """

    name: npt.NDArray[np.int32]
    kind: npt.NDArray[np.uint8]
    rank: npt.NDArray[np.int32]
    m: npt.NDArray[np.int64]
    n: npt.NDArray[np.int64]
    inner: npt.NDArray[np.int32]
    """What follows the rank in A's shape, four places, filled up with zeros: (n, 0, 0, 0), or
    (inputs, kernel, …) of a convolution."""
    declared_rank: npt.NDArray[np.int32]
    """The rank that the config gives this target; 0 where there is no config."""
    alpha: npt.NDArray[np.float64]
    """The config's alpha for this target; NaN where there is no config."""
    prefix: npt.NDArray[np.uint16]
    """Which of the adapter's key prefixes this target has in the file."""
    a_file: npt.NDArray[np.uint16]
    a_offset: npt.NDArray[np.int64]
    a_dtype: npt.NDArray[np.uint8]
    b_file: npt.NDArray[np.uint16]
    b_offset: npt.NDArray[np.int64]
    b_dtype: npt.NDArray[np.uint8]

    @classmethod
    def of_rows(cls, rows: Iterable[tuple[Any, ...]]) -> Columns:
        """Return the columns of `rows`, whose fields are in the order of the class."""
        gathered = list(zip(*rows, strict=True)) or [()] * len(_COLUMN_DTYPES)
        arrays = {
            name: np.array(values, dtype=dtype)
            for (name, dtype), values in zip(_COLUMN_DTYPES.items(), gathered, strict=True)
        }
        arrays["inner"] = arrays["inner"].reshape(-1, 4)
        return cls(**arrays)


_COLUMN_DTYPES: dict[str, Any] = {
    "name": np.int32,
    "kind": np.uint8,
    "rank": np.int32,
    "m": np.int64,
    "n": np.int64,
    "inner": np.int32,
    "declared_rank": np.int32,
    "alpha": np.float64,
    "prefix": np.uint16,
    "a_file": np.uint16,
    "a_offset": np.int64,
    "a_dtype": np.uint8,
    "b_file": np.uint16,
    "b_offset": np.int64,
    "b_dtype": np.uint8,
}


@dataclass(frozen=True)
class TensorFile:
    """One file of an adapter, as it was when its header was read."""

    path: str
    size: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True)
class Factor:
    """Where one factor lies: a view of one row of the columns."""

    file: TensorFile
    key: str
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True, repr=False)
class Adapter:
    """One adapter on disk, as its config and headers say; it holds no tensor's data.

    Its length is the number of its targets; a row is one of them.
    """

    path: str
    """The directory, as it was given."""
    config: AdapterConfig | None
    """What its config says; None where there is none."""
    files: tuple[TensorFile, ...]
    """Of its weights."""
    table: NameTable
    """Names of targets, shared by all adapters of a run."""
    columns: Columns
    """Where each target's factors lie; arrays of one length, a row for each target."""
    prefixes: tuple[str, ...] = (PREFIX,)
    """What stands before the modules' paths in the files."""
    extras: tuple[str, ...] = ()
    """Tensors in the files that are not LoRA factors."""

    def __len__(self) -> int:
        return len(self.columns.name)

    def __repr__(self) -> str:
        ranks = sorted(set(self.columns.rank.tolist()))
        extras = f", {len(self.extras)} extra tensors" if self.extras else ""
        return f"Adapter({self.path!r}: {len(self)} targets, ranks {ranks}{extras})"

    def take(self, rows: npt.NDArray[np.int32], table: NameTable) -> Adapter:
        """Return a manifest of these rows alone, in this order, with names in another table.

        It has no config: what a row means is in its columns.
        """
        columns = {name: column[rows] for name, column in vars(self.columns).items()}
        numbers = [table.add(self.table.names[number]) for number in columns["name"]]
        columns["name"] = np.array(numbers, np.int32)
        return replace(self, config=None, extras=(), table=table, columns=Columns(**columns))

    def target(self, row: int) -> str:
        """Return the module path of `row`."""
        return self.table.names[int(self.columns.name[row])]

    def factor(self, row: int, side: str) -> Factor:
        """Return where factor `side` ("A" or "B") of `row` lies, with its shape in the file."""
        c = self.columns
        kind, rank = int(c.kind[row]), int(c.rank[row])
        key = self.prefixes[int(c.prefix[row])] + self.target(row)
        inner = tuple(int(d) for d in c.inner[row] if d)
        if side == "A":
            file, offset, dtype = c.a_file[row], c.a_offset[row], c.a_dtype[row]
            key, shape = key + SUFFIXES[kind][0], (rank, *inner)
        else:
            file, offset, dtype = c.b_file[row], c.b_offset[row], c.b_dtype[row]
            key = key + SUFFIXES[kind][1]
            shape = (int(c.m[row]), rank, *(1,) * (len(inner) - 1))
        return Factor(self.files[int(file)], key, int(offset), DTYPES[int(dtype)], shape)
