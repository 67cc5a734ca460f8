"""Names, numbers, values and regular expressions that a reader may trip over."""

from __future__ import annotations

from random import Random
from typing import Any

from making import PREFIX

ESCAPE = "\x1b[2J\x1b]0;owned\x07"

NUMBERS: tuple[int | float, ...] = (
    0,
    1,
    -1,
    2,
    7,
    8,
    255,
    2**16,
    2**31 - 1,
    2**31,
    2**32,
    2**53 + 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    10**400,
    0.5,
    1.0,
    -0.0,
    1e308,
    5e-324,
    float("inf"),
    float("nan"),
)

TEXTS = (
    "1e999",
    "-1e999",
    "NaN",
    "Infinity",
    "-Infinity",
    "9" * 400,
    "9" * 5000,
    "1.0",
    "-0",
    "01",
    "0x10",
    "1_000",
    "true",
    "null",
    "[]",
    "{}",
    "[[[[]]]]",
    '"',
    '""',
    '"\\u0000"',
    '"\\ud800"',
    '"\\x"',
    "'a'",
    "\\",
    "/*x*/",
    "//",
    ",",
    ",,",
    "",
    "\ufeff",
    "\x00",
    "\u2028",
    "[" * 5000,
    '{"a":' * 5000,
    "[" * 400 + "]" * 400,
)

NAMES = (
    "",
    ".",
    "..",
    "/",
    "a\nb",
    "a\r\tb",
    "\x00",
    ESCAPE,
    "\x9b31m",
    "\u202e\u2066abc",
    "\ud800",
    "\udcff",
    "\U0001f600",
    "\ufeff",
    "__metadata__",
    "lora_A.weight",
    ".lora_A.weight",
    PREFIX,
    PREFIX * 3,
    f"{PREFIX}.lora_A.weight",
    f"{PREFIX}lora_A.weight",
    f"{PREFIX}a.lora_A.weight\n",
    f"{PREFIX}{ESCAPE}.lora_A.weight",
    f"{PREFIX}a.lora_magnitude_vector",
    f"{PREFIX}a.base_layer.lora_A.weight",
    "lora_unet_a.lora_down.weight",
    "a" * 300,
    "a" * 5000,
    "." * 3000,
    PREFIX * 400 + "\n",
    PREFIX * 400 + "x.lora_A.weight",
)

PATHS = (
    "../x.safetensors",
    "../../../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "/proc/self/mem",
    "a/../x.safetensors",
    "./x.safetensors",
    "",
    ".",
    "..",
    "x\x00.safetensors",
    "x" * 300,
    "\ud800",
    ESCAPE,
    "adapter_config.json",
    "adapter_model.safetensors.index.json",
    "gone.safetensors",
    "C:\\windows\\x",
    "~/x",
    "$HOME",
)
"""Where an index may say that a shard lies."""

REGEXES = (
    "(a+)+c",
    "(a|a)*c",
    "(a*)*c",
    "(.*)*c",
    "((a?){30})" + "a" * 30,
    "(a?){40}" + "a" * 40,
    ".*.*.*.*.*.*c",
    "(.*,){25}P",
    "([a-z]+)*$1",
    "(?=(a+)+c)a",
    "(a|ab|b)*\\1c",
    "a{99999999999999999999}",
    "a{65535}",
    "(a{1000}){1000}",
    "((a{0,1000}){0,1000}){0,1000}c",
    "(" * 3000 + ")" * 3000,
    "(" * 200 + "a" + ")*" * 200 + "c",
    "a" * 20000,
    "[[a]",
    "(?i)a",
    "(?i:[\x01-\U0010ffff])",
    "(?P<x>a)(?P=x)",
    "(?(1)a|b)",
    "(?<=a)b",
    "(?<!.*)b",
    "(?>a+)b",
    "a++",
    "\\Z",
    "^",
    "$",
    "a)|(b",
    "a|",
    "|" * 1000,
    "(",
    ")",
    "*",
    "\\",
    "[",
    "x{,}",
    "\\p{L}",
    "\\N{DIGIT ONE}",
    "(?#",
    "(?x: a # )",
    ESCAPE + "(",
    "\ud800",
    "\x00",
    "h\\.\\d+\\.(up|down)",
    ".*\\.layers\\.\\d+\\..*\\.(q|k|v)_proj",
)
"""Entries of rank_pattern and alpha_pattern."""

VICTIM = "a" * 40 + "b"
"""A module's name on which the worst of them take for ever."""


def odd_text(random: Random) -> str:
    """Text for the place of a token of JSON."""
    return random.choice(TEXTS)


def odd_name(random: Random) -> str:
    """A tensor's or a module's name, or a key."""
    name = random.choice(NAMES)
    return f"{PREFIX}{name}.lora_{random.choice('AB')}.weight" if random.random() < 0.3 else name


def odd_value(random: Random, depth: int = 0) -> Any:
    """Any value of JSON."""
    kind = random.randrange(8 if depth < 4 else 5)
    if kind < 2:
        return random.choice(NUMBERS)
    if kind < 5:
        return random.choice((None, True, False, "", "8", odd_name(random), random.choice(REGEXES)))
    if kind == 5:
        return [odd_value(random, depth + 1) for _ in range(random.choice((0, 1, 2, 4)))]
    if kind == 6:
        return {odd_name(random): odd_value(random, depth + 1) for _ in range(random.randrange(4))}
    return deep(random.choice((10, 100, 400, 900)), random.choice((None, 1)))


def deep(levels: int, inside: Any) -> Any:
    """A list in a list, so many times."""
    for _ in range(levels):
        inside = [inside]
    return inside
