"""Directories made from nothing: a sound layout, and one or a few things wrong with it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from random import Random
from typing import Any

from fuzzing.corpus import ONE, SHARDS, as_json, one_file, sharded
from fuzzing.directories import Directory, File, Folder, Link, Pipe, with_header
from fuzzing.odd import NUMBERS, PATHS, REGEXES, VICTIM, deep, odd_name, odd_text, odd_value
from making import CONFIG, INDEX, PREFIX, WEIGHTS

ITEM = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "BOOL": 1, "I64": 8}
OTHER_DTYPES = ("F4", "F6_E2M3", "F8_E4M3", "C64", "F33", "f32", "", "\x1b[31m", None, 4, ["F32"])

Fields = list[tuple[str, Any]]
"""An object as pairs, for a key may stand twice."""


def render_object(pairs: Fields, random: Random) -> bytes:
    """An object as JSON, now and then with spaces or with names that are not escaped."""
    colon = random.choice((":", ": ", " :\n"))
    plain = random.random() < 0.2
    body = ",".join(
        json.dumps(k, ensure_ascii=not plain) + colon + json.dumps(v, ensure_ascii=not plain)
        for k, v in pairs
    )
    return ("{" + body + "}").encode(errors="replace")


def sound_layout(random: Random) -> tuple[Fields, int]:
    """The entries of some targets' factors, side by side, and the bytes of their data."""
    entries: Fields = []
    end = 0
    for number in range(random.choice((0, 1, 1, 2, 5))):
        target = random.choice(("up", "h.0.down", odd_name(random), f"m{number}"))
        m, n, rank = (random.choice((1, 2, 3, 8, 300)) for _ in range(3))
        kernel = random.choice(((), (), (), (3,), (2, 2), (1, 1, 1)))
        words = random.random() < 0.1
        suffixes = ("lora_embedding_A", "lora_embedding_B") if words else ("lora_A.weight",) * 2
        shapes = ([rank, n, *kernel], [m, rank, *(1 for _ in kernel)])
        for side, suffix, shape in zip("AB", suffixes, shapes, strict=True):
            name = f"{PREFIX}{target}.{suffix.replace('_A', '_' + side)}"
            dtype = random.choice(("F32", "F32", "F16", "BF16", "F64", "I8"))
            entry, end = lay(dtype, shape, end)
            entries.append((name, entry))
    random.shuffle(entries)
    return entries, end


def lay(dtype: str, shape: list[int], start: int) -> tuple[dict[str, Any], int]:
    """An entry at this place, and where it ends."""
    stop = start + ITEM[dtype] * math.prod(shape)
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}, stop


def spoil_entry(random: Random, entries: Fields, end: int) -> int:  # noqa: PLR0912  (one case a fault)
    """Make one thing wrong in one entry; returns the bytes of the data."""
    name, entry = entries[random.randrange(len(entries))]
    if not isinstance(entry, dict) or not isinstance(entry.get("data_offsets"), list):
        return end
    offsets, shape = entry["data_offsets"], entry.get("shape")
    match random.randrange(14):
        case 0:
            offsets.reverse()
        case 1 if offsets:
            offsets[random.randrange(len(offsets))] = random.choice(NUMBERS)
        case 2:
            step = random.choice((-8, -4, -1, 1, 3, 2**31, 2**63))
            entry["data_offsets"] = [o + step if isinstance(o, int) else o for o in offsets]
        case 3:
            entry["dtype"] = random.choice((*OTHER_DTYPES, *ITEM))
        case 4 if isinstance(shape, list) and shape:
            shape[random.randrange(len(shape))] = random.choice(NUMBERS)
        case 5:
            entry["shape"] = random.choice(
                ([], [0], [1] * 17, [1] * 5000, [2**32] * 2, [2**62, 4], [2**64], None, "ab", {})
            )
        case 6:
            entry["shape"] = odd_value(random)
        case 7:
            entry["data_offsets"] = odd_value(random)
        case 8:
            entry.pop(random.choice(list(entry)))
        case 9:
            entry[odd_name(random)] = odd_value(random)
        case 10:
            entries.append((name, dict(entry)))
        case 11:
            entries.append((odd_name(random), odd_value(random)))
        case 12:
            entry["shape"] = random.choice(([True, 4], [1.0, 4], [4, None], ["4"], [[4]], [-1, -4]))
        case _:
            return end + random.choice((-1, 1, -end, 2**20, 2**40))
    return end


def odd_header(random: Random) -> Directory:
    """Weights with a header of which something is wrong, or nothing."""
    entries, end = sound_layout(random)
    if random.random() < 0.3:
        entries.insert(0, ("__metadata__", {"format": "pt"}))
    for _ in range(random.choice((0, 1, 1, 1, 2, 4))):
        if entries:
            end = spoil_entry(random, entries, end)
    text = render_object(entries, random)
    if random.random() < 0.1:
        text += random.choice((b" " * 7, b"\n", b"\x00", b"{}", b"\xff", b" " * 10**5))
    file = with_header(text, max(0, end))
    if random.random() < 0.1:
        length = random.choice(
            (0, 1, len(text) - 1, len(text) + 1, 10**8, 10**8 + 1, 2**63, 2**64 - 1)
        )
        file = File(length.to_bytes(8, "little") + text, file.length)
    return one_file(ONE) | {WEIGHTS: file}


EXTRA_PARTS = (
    "classifier",
    "score",
    "dense",
    "up",
    "base_layer",
    "modules_to_save",
    "original_module",
    "default",
    "token_adapter",
    "lora_B",
    "",
)
EXTRA_ENDS = ("weight", "bias", "trainable_tokens_delta", "trainable_tokens_original", "lora_A", "")


def odd_extras(random: Random) -> Directory:
    """Sound factors, tensors that are none beside them, and a config that says things of these."""
    entries, end = sound_layout(random)
    for _ in range(random.choice((1, 2, 5, 20))):
        parts = random.choices(EXTRA_PARTS, k=random.choice((0, 1, 1, 2, 3)))
        name = random.choice((PREFIX, PREFIX, PREFIX * 2, "")) + ".".join(
            (*parts, random.choice(EXTRA_ENDS))
        )
        shape = [random.choice((0, 1, 3, 8)) for _ in range(random.choice((0, 1, 1, 2, 3)))]
        if name not in dict(entries):
            entry, end = lay(random.choice(list(ITEM)), shape, end)
            entries.append((name, entry))
    pieces = one_file(ONE)
    config = json.loads(pieces[CONFIG].head)
    for key, values in {
        "modules_to_save": (["classifier", "score"], ["", "s"], [odd_name(random)], "score"),
        "task_type": ("SEQ_CLS", "QUESTION_ANS"),
        "trainable_token_indices": ([1, 2], {"up": [1]}, {"up": [-1]}, [True], [[1]]),
        "bias": ("all", "lora_only"),
        "lora_bias": (True,),
        "ensure_weight_tying": (True,),
    }.items():
        if random.random() < 0.4:
            config[key] = random.choice((*values, odd_value(random)))
    return pieces | {
        CONFIG: as_json(config),
        WEIGHTS: with_header(render_object(entries, random), end),
    }


def odd_metadata(random: Random) -> Directory:
    """Metadata that are large, or no strings, or hold code."""
    value = random.choice(
        (
            {str(i): "x" * 100 for i in range(2000)},
            {"a": "x" * 10**6},
            {"format": "__import__('os').system('false')"},
            {"a": 1},
            {"a": None},
            {"a": {"b": "c"}},
            [],
            "pt",
            deep(300, "x"),
            {odd_name(random): odd_name(random)},
            {odd_name(random): odd_value(random)},
        )
    )
    entries, end = sound_layout(random)
    text = render_object([*entries, ("__metadata__", value)], random)
    return one_file(ONE) | {WEIGHTS: with_header(text, end)}


def odd_config(random: Random) -> Directory:
    """A config with odd values, among them patterns of ranks and alphas."""
    pieces = dict(one_file({VICTIM: ONE["up"]} if random.random() < 0.3 else ONE))
    file = pieces[CONFIG]
    assert isinstance(file, File)
    config = json.loads(file.head)
    for _ in range(random.choice((1, 1, 2, 4))):
        key = random.choice(
            (*config, "auto_mapping", "revision", "use_dora", "layers_to_transform")
        )
        if key in ("rank_pattern", "alpha_pattern"):
            count = random.choice((1, 1, 2, 10))
            config[key] = {
                random.choice((*REGEXES, odd_name(random), "up", VICTIM)): odd_pattern_value(random)
                for _ in range(count)
            }
        elif key == "target_modules":
            config[key] = random.choice((*REGEXES, odd_value(random)))
        else:
            config[key] = odd_value(random)
    if random.random() < 0.1:
        text = json.dumps(config)
        config_text = (
            text[:-1] + f', "{random.choice(("r", "auto_mapping"))}": {odd_text(random)}' + "}"
        )
        return pieces | {CONFIG: File(config_text.encode(errors="replace"))}
    text = json.dumps(config, ensure_ascii=random.random() < 0.9)
    return pieces | {
        CONFIG: File(text.encode(random.choice(("utf-8",) * 9 + ("utf-16",)), "replace"))
    }


def odd_pattern_value(random: Random) -> Any:
    """A rank or an alpha, mostly a sound one."""
    return random.choice((1, 1, 1, 2, 2**31 - 1, random.choice(NUMBERS), odd_value(random)))


def odd_index(random: Random) -> Directory:
    """An index that does not tell the truth, or names what is no shard beside it."""
    pieces: dict[str, Any] = dict(sharded(ONE))
    index = json.loads(pieces[INDEX].head)
    weight_map = index["weight_map"]
    match random.randrange(8):
        case 0 | 1:
            weight_map[random.choice(list(weight_map))] = random.choice(PATHS)
        case 2:
            weight_map[odd_name(random)] = random.choice((*SHARDS, *PATHS))
        case 3:
            weight_map[random.choice(list(weight_map))] = odd_value(random)
        case 4:
            index["weight_map"] = odd_value(random)
        case 5:
            pieces[INDEX] = as_json(odd_value(random))
            return pieces
        case 6:
            for name in weight_map:
                weight_map[name] = SHARDS[0]
        case _:
            pieces[random.choice(SHARDS)] = odd_piece(random)
    if random.random() < 0.1:
        pieces[INDEX] = File(render_object([*index.items(), *index.items()], random))
    else:
        pieces[INDEX] = as_json(index)
    return pieces


def odd_piece(random: Random) -> Any:
    """What is no regular file, or not the one that it should be."""
    to = (
        "/dev/zero",
        "/dev/null",
        "/etc/hostname",
        "..",
        "gone",
        WEIGHTS,
        CONFIG,
        INDEX,
        SHARDS[0],
    )
    return random.choice((Pipe(), Folder(), File(b""), Link(random.choice(to)), Link("/dev/zero")))


def odd_files(random: Random) -> Directory:
    """Directories of which a file is missing, a link, a pipe, a folder, or too large to be read."""
    pieces: dict[str, Any] = dict(random.choice((one_file(ONE), sharded(ONE))))
    for _ in range(random.choice((1, 1, 2))):
        name = random.choice(
            (*pieces, CONFIG, WEIGHTS, INDEX, "adapter_model.bin", "streammerge.json")
        )
        match random.randrange(5):
            case 0:
                pieces.pop(name, None)
            case 1 if isinstance(pieces.get(name), File):
                pieces[name] = File(pieces[name].head, random.choice((2**24, 2**40)))
            case 2:
                pieces["adapter_model.bin"] = File(UNSAFE_PICKLE)
                pieces.pop(WEIGHTS, None)
                pieces.pop(INDEX, None)
            case _:
                pieces[name] = odd_piece(random)
    return pieces


UNSAFE_PICKLE = b"cos\n_exit\n(I66\ntR."
"""Whoever unpickles it ends with exit code 66."""


def huge_shapes(random: Random) -> Directory:
    """Sound headers of factors so large that only a file of zeros can hold them."""
    side = random.choice((2**20, 2**27, 2**30, 2**31 - 1, 2**31, 2**33, 2**36))
    other = random.choice((1, 2, 2**10, side))
    rank = random.choice((1, 1, 2, 2**31))
    kernel = random.choice(((), (), (2**16,)))
    entries: Fields = []
    end = 0
    for letter, shape in (("A", [rank, other, *kernel]), ("B", [side, rank, *(1 for _ in kernel)])):
        entry, end = lay("F16", shape, end)
        entries.append((f"{PREFIX}up.lora_{letter}.weight", entry))
    return one_file(ONE) | {WEIGHTS: with_header(render_object(entries, random), min(end, 2**43))}


def many(random: Random) -> Directory:
    """Thousands of tensors, one of them twice; or thousands of entries of a pattern; or shards."""
    count = random.choice((1000, 20_000))
    pieces: dict[str, Any] = dict(one_file(ONE))
    match random.randrange(4):
        case 0:
            empty, _ = lay("F32", [0], 0)
            entries = [(f"k{i}", empty) for i in (*range(count), count - 1)]
            pieces[WEIGHTS] = with_header(render_object(entries, random), 0)
        case 1:
            names = [(f"{random.choice(('a.', 'a|', 'a+'))}{i}", 1) for i in range(count // 20)]
            config = json.loads(pieces[CONFIG].head) | {"rank_pattern": dict(names)}
            pieces[CONFIG] = as_json(config)
        case 2:
            text = random.choice((b"[],", b"{},", b'"a",')) * count
            pieces[random.choice((CONFIG, INDEX))] = File(b"[" + text + b"1]")
        case _:
            pieces = dict(sharded(ONE))
            pieces[INDEX] = as_json({"weight_map": {f"t{i}": f"s{i}" for i in range(count)}})
    return pieces


def record(random: Random, output: Directory) -> Directory:
    """An output whose record says odd things."""
    pieces: dict[str, Any] = dict(output)
    text = json.loads(pieces["streammerge.json"].head)
    for _ in range(random.choice((1, 1, 3))):
        match random.randrange(6):
            case 0:
                text[random.choice(list(text))] = odd_value(random)
            case 1 if isinstance(text.get("files"), list) and text["files"]:
                file = text["files"][0]
                if isinstance(file, dict):
                    file[random.choice(list(file) or ["name"])] = random.choice((*NUMBERS, *PATHS))
            case 2 if isinstance(text.get("tensors"), dict) and text["tensors"]:
                tensor = text["tensors"][random.choice(list(text["tensors"]))]
                if isinstance(tensor, dict):
                    key = random.choice(list(tensor) or ["shape"])
                    tensor[key] = random.choice((*NUMBERS, odd_value(random), [2**40], [-1]))
            case 3:
                text["other_files"] = {
                    random.choice(PATHS): "00",
                    odd_name(random): odd_value(random),
                }
            case 4:
                text.pop(random.choice(list(text)))
            case _:
                text[odd_name(random)] = odd_value(random)
        if not text:
            break
    pieces["streammerge.json"] = as_json(text)
    return pieces


GENERATORS: tuple[tuple[int, Callable[[Random], Directory]], ...] = (
    (30, odd_header),
    (15, odd_extras),
    (6, odd_metadata),
    (25, odd_config),
    (15, odd_index),
    (10, odd_files),
    (6, huge_shapes),
    (1, many),
)
"""Each with its share."""
