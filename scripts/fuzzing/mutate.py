"""Mutations of sound files: of their bytes, of their JSON as text, of their JSON as a tree."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from random import Random
from typing import Any

from fuzzing.directories import Directory, File, header_of, with_header
from fuzzing.odd import odd_name, odd_text, odd_value
from making import WEIGHTS

TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|-?[\d.eE+]+|true|false|null|NaN|Infinity|[{}\[\],:]')


def mutate(random: Random, corpus: Directory) -> Directory:
    """A directory with one or a few of its files changed."""
    pieces = dict(corpus)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        name = random.choice(sorted(pieces))
        piece = pieces[name]
        if isinstance(piece, File):
            pieces[name] = _changed(random, name, piece)
    return pieces


def _changed(random: Random, name: str, file: File) -> File:
    if random.random() < 0.05:
        return File(file.head, random.choice((0, 1, 7, 8, 9, file.length - 1, file.length + 1)))
    if name.endswith(".bin"):
        return File(_change_bytes(random, file.head))
    if not name.endswith(".safetensors"):
        return File(_change_text(random, file.head))
    if random.random() < 0.3 or len(file.head) < 16:
        return File(_change_bytes(random, file.head), file.length)
    text = header_of(file)
    return with_header(_change_text(random, text), file.length - 8 - len(text))


def _change_text(random: Random, text: bytes) -> bytes:
    change: Callable[[Random, bytes], bytes] = random.choice(
        (_change_bytes, _change_tokens, _change_tree)
    )
    return change(random, text)


def _change_bytes(random: Random, data: bytes) -> bytes:
    """Flip, insert, delete, double or cut, a few times."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        at = random.randrange(len(changed) + 1)
        match random.randrange(6):
            case 0 if at < len(changed):
                changed[at] ^= 1 << random.randrange(8)
            case 1 if at < len(changed):
                changed[at] = random.randrange(256)
            case 2:
                changed[at:at] = random.randbytes(random.choice((1, 2, 9)))
            case 3:
                del changed[at : at + random.choice((1, 3, 30))]
            case 4:
                other = random.randrange(len(changed) + 1)
                changed[at:at] = changed[other : other + random.choice((1, 8, 80))]
            case 5 if random.random() < 0.2:
                del changed[at:]
    return bytes(changed)


def _change_tokens(random: Random, data: bytes) -> bytes:
    """Put other text in the place of some tokens: numbers that no parser gives, half objects."""
    text = data.decode(errors="replace")
    for _ in range(random.choice((1, 1, 2, 5))):
        found = list(TOKEN.finditer(text))
        if not found:
            return data
        token = random.choice(found)
        text = text[: token.start()] + odd_text(random) + text[token.end() :]
    return text.encode(errors="replace")


def _change_tree(random: Random, data: bytes) -> bytes:
    """Change, remove, rename or move a value of the tree."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return _change_bytes(random, data)
    tree = copy.deepcopy(tree)
    for _ in range(random.choice((1, 1, 2, 5))):
        holders = [holder for holder in _holders(tree) if holder]
        if not holders:
            return json.dumps(odd_value(random)).encode()
        _change_holder(random, random.choice(holders), holders)
    return json.dumps(tree, ensure_ascii=random.random() < 0.9).encode(errors="replace")


def _change_holder(random: Random, holder: Any, holders: list[Any]) -> None:
    key = random.choice(list(holder)) if isinstance(holder, dict) else random.randrange(len(holder))
    match random.randrange(6):
        case 0 | 1:
            holder[key] = odd_value(random)
        case 2:
            del holder[key]
        case 3 if isinstance(holder, dict):
            holder[odd_name(random)] = holder.pop(key)
        case 4:
            other = random.choice(holders)
            holder[key] = copy.deepcopy(random.choice(_values(other)))
        case _ if isinstance(holder[key], int):
            holder[key] += random.choice((-1, 1, 4, -(2**31), 2**31, 2**63, 2**64))


def _values(holder: Any) -> list[Any]:
    return list(holder.values()) if isinstance(holder, dict) else holder


def _holders(tree: Any) -> list[Any]:
    """Every object and list of a tree."""
    found, waiting = [], [tree]
    while waiting:
        value = waiting.pop()
        if isinstance(value, (dict, list)):
            found.append(value)
            waiting += _values(value)
    return found


def splice(random: Random, one: Directory, other: Directory) -> Directory:
    """The files of two directories mixed, or two headers joined at some byte."""
    taken = {name: piece for name, piece in other.items() if random.random() < 0.5}
    mixed = {**one, **taken}
    first, second = one.get(WEIGHTS), other.get(WEIGHTS)
    if random.random() < 0.5 and isinstance(first, File) and isinstance(second, File):
        cut, start = (random.randrange(len(f.head) + 1) for f in (first, second))
        mixed[WEIGHTS] = File(first.head[:cut] + second.head[start:], first.length)
    return mixed
