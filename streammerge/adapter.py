"""An adapter on disk as a manifest: its config, and where each target's factors lie.

A manifest is columns of arrays over a name table that all adapters of a run share, never an
object for each tensor: 64 adapters of 45,000 targets take some 300 MiB this way. It holds no
tensor data, and no file is kept open for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

Dialect = Literal["peft", "diffusers", "kohya", "mlx"]
"""Whose names and layout an adapter's tensors have."""

PEFT: Dialect = "peft"
DIFFUSERS: Dialect = "diffusers"
KOHYA: Dialect = "kohya"
MLX: Dialect = "mlx"

IMAGE_DIALECTS = (DIFFUSERS, KOHYA)
"""Those whose targets begin with the component of a pipeline, such as `unet.`."""

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

ALL_DTYPES = tuple(DTYPE_BITS)

TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The same dtypes as torch spells them, which is how options and plans do."""

STORED_NAMES = {ours: theirs for theirs, ours in TORCH_NAMES.items()}

ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
INDEX_NAME = "adapter_model.safetensors.index.json"
"""An adapter's files: PEFT's names, and the usual one for the index of shards."""

IMAGE_WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
"""diffusers' name for the one file of an adapter."""

PLAIN_METADATA = {"format": "pt"}
"""What PEFT writes into the header of a file besides the tensors."""

METADATA_KEY = "lora_adapter_metadata"
"""What diffusers calls the configs, JSON, in that file's header."""

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
    """What of an adapter_config.json a merge needs; `raw` is the rest of it.

    In MLX's alpha is the scaling itself, and `dialect` says so.
    """

    rank: int
    alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    base_model: str | None = None
    task_type: str | None = None
    raw: Mapping[str, Any] = field(default_factory=dict)
    dialect: Dialect = PEFT


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
    """The rank that the config gives this target; 0 where nothing does."""
    alpha: npt.NDArray[np.float64]
    """The alpha that the config, or a tensor, gives this target; NaN where nothing does."""
    power: npt.NDArray[np.float32]
    """The scaling is alpha over the rank to this power: 1, 1/2 with rslora, and 0 where alpha is
    the scaling itself."""
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
    "power": np.float32,
    "prefix": np.uint16,
    "a_file": np.uint16,
    "a_offset": np.int64,
    "a_dtype": np.uint8,
    "b_file": np.uint16,
    "b_offset": np.int64,
    "b_dtype": np.uint8,
}


@dataclass(frozen=True)
class ExtraColumns:
    """One row for each tensor that is not a LoRA factor: where it lies."""

    name: npt.NDArray[np.int32]
    """Its full name's number in the table."""
    file: npt.NDArray[np.uint16]
    offset: npt.NDArray[np.int64]
    nbytes: npt.NDArray[np.int64]
    dtype: npt.NDArray[np.uint8]
    """Its dtype's place among all of the format."""
    shape: npt.NDArray[np.int32]
    """Its shape's place in `shapes`."""
    shapes: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of_rows(cls, rows: Iterable[tuple[int, int, int, int, str, tuple[int, ...]]]) -> Self:
        """Return the columns of `rows`, whose fields are in the order of the class."""
        shapes: dict[tuple[int, ...], int] = {}
        codes = {dtype: code for code, dtype in enumerate(DTYPE_BITS)}
        numbers = [
            (*place, codes[dtype], shapes.setdefault(shape, len(shapes)))
            for *place, dtype, shape in rows
        ]
        columns = np.array(numbers, np.int64).reshape(-1, len(_EXTRA_DTYPES)).T
        arrays = {
            name: column.astype(dtype)
            for (name, dtype), column in zip(_EXTRA_DTYPES.items(), columns, strict=True)
        }
        return cls(**arrays, shapes=tuple(shapes))

    def __len__(self) -> int:
        return len(self.name)


_EXTRA_DTYPES: dict[str, Any] = {
    "name": np.int32,
    "file": np.uint16,
    "offset": np.int64,
    "nbytes": np.int64,
    "dtype": np.uint8,
    "shape": np.int32,
}

NO_EXTRAS = ExtraColumns.of_rows(())


@dataclass(frozen=True)
class TensorFile:
    """One file of an adapter, as it was when its header was read."""

    path: str
    """On the Hub `user/repo@commit/name`."""
    size: int
    mtime_ns: int
    inode: int
    etag: str | None = None
    """What the Hub calls its content by; None of a file on this machine."""


@dataclass(frozen=True)
class Origin:
    """Where on the Hub an adapter comes from."""

    commit: str
    others: tuple[str, ...] = ()
    """Files that were read beside the weights, by their paths there."""


@dataclass(frozen=True)
class Factor:
    """Where one factor lies: a view of one row of the columns."""

    file: TensorFile
    key: str
    offset: int
    dtype: str
    shape: tuple[int, ...]
    """As a factor: A is rank × …, B is m × rank …."""
    turned: bool = False
    """Whether the file holds its transpose."""

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Extra:
    """Where a tensor lies that is no factor: a view of one row of the columns."""

    file: TensorFile
    key: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


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
    dialect: Dialect = PEFT
    """Whose names and layout its tensors have."""
    keys: tuple[tuple[str, str], ...] | None = None
    """The names of each row's A and B in the files, where they are not a prefix, the target and
    PEFT's suffix."""
    notices: tuple[str, ...] = ()
    """What was settled when it was read, and somebody may want to know."""
    origin: Origin | None = None
    """None of an adapter on this machine."""
    extra_columns: ExtraColumns = NO_EXTRAS
    """Where each tensor lies that is no LoRA factor."""

    def __len__(self) -> int:
        return len(self.columns.name)

    @property
    def extras(self) -> tuple[str, ...]:
        """The full names of the tensors in the files that are not LoRA factors."""
        return tuple(self.table.names[number] for number in self.extra_columns.name)

    def __repr__(self) -> str:
        ranks = sorted(set(self.columns.rank.tolist()))
        count = len(self.extra_columns)
        extras = f", {count} extra tensors" if count else ""
        return f"Adapter({self.path!r}: {len(self)} targets, ranks {ranks}{extras})"

    def take(
        self,
        rows: npt.NDArray[np.int32],
        extra_rows: npt.NDArray[np.int32],
        table: NameTable,
    ) -> Adapter:
        """Return a manifest of these rows alone, in this order, with names in another table.

        It has no config: what a row means is in its columns.

        Args:
            rows: of targets.
            extra_rows: of tensors that are no factors.
            table: where the names are entered.
        """
        columns = {name: column[rows] for name, column in vars(self.columns).items()}
        columns["name"] = self._renumbered(columns["name"], table)
        shapes = self.extra_columns.shapes
        extra = {
            name: column[extra_rows]
            for name, column in vars(self.extra_columns).items()
            if name != "shapes"
        }
        extra["name"] = self._renumbered(extra["name"], table)
        return replace(
            self,
            config=None,
            table=table,
            columns=Columns(**columns),
            keys=None if self.keys is None else tuple(self.keys[row] for row in rows),
            notices=(),
            extra_columns=ExtraColumns(**extra, shapes=shapes),
        )

    def _renumbered(
        self, numbers: npt.NDArray[np.int32], table: NameTable
    ) -> npt.NDArray[np.int32]:
        return np.array([table.add(self.table.names[number]) for number in numbers], np.int32)

    def target(self, row: int) -> str:
        """Return the module path of `row`."""
        return self.table.names[int(self.columns.name[row])]

    def key(self, row: int, side: str) -> str:
        """Return the name of factor `side` ("A" or "B") of `row` in its file."""
        if self.keys is not None:
            return self.keys[row]["AB".index(side)]
        prefix = self.prefixes[int(self.columns.prefix[row])]
        suffix = SUFFIXES[int(self.columns.kind[row])]["AB".index(side)]
        return prefix + self.target(row) + suffix

    def extra(self, row: int) -> Extra:
        """Return where the tensor of `row` of the extra columns lies, and what it is."""
        c = self.extra_columns
        return Extra(
            file=self.files[int(c.file[row])],
            key=self.table.names[int(c.name[row])],
            offset=int(c.offset[row]),
            nbytes=int(c.nbytes[row]),
            dtype=ALL_DTYPES[int(c.dtype[row])],
            shape=c.shapes[int(c.shape[row])],
        )

    def factor(self, row: int, side: str) -> Factor:
        """Return where factor `side` ("A" or "B") of `row` lies, and what it is."""
        c = self.columns
        rank, inner = int(c.rank[row]), tuple(int(d) for d in c.inner[row] if d)
        if side == "A":
            file, offset, dtype = c.a_file[row], c.a_offset[row], c.a_dtype[row]
            shape: tuple[int, ...] = (rank, *inner)
        else:
            file, offset, dtype = c.b_file[row], c.b_offset[row], c.b_dtype[row]
            shape = (int(c.m[row]), rank, *(1,) * (len(inner) - 1))
        return Factor(
            file=self.files[int(file)],
            key=self.key(row, side),
            offset=int(offset),
            dtype=DTYPES[int(dtype)],
            shape=shape,
            turned=self.dialect == MLX,
        )
