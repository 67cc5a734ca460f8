"""Directories that once made a reader hang, fail, or say what a terminal would obey."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest

import streammerge
from making import PREFIX, encode, linear, write_adapter
from streammerge import errors, events

ONE = {"up": linear(3, 2, 1)}


# ---------------------------------------------------------------------------------------------
# What is said

ESCAPE = "\x1b[2J\x1b]0;owned\x07"


def test_messages_of_errors_are_printable(tmp_path: Path) -> None:
    """A Python traceback sends them to a terminal as they are."""
    extra = {f"{PREFIX}{ESCAPE}.lora_A.weight": encode(np.ones((2, 2)))}
    with pytest.raises(errors.CorruptFileError, match="no B factor") as caught:
        streammerge.open_adapter(write_adapter(tmp_path / "in", ONE, extra=extra))
    assert str(caught.value).isprintable()
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert caught.value.tensor == f"{PREFIX}{ESCAPE}.lora_A.weight"


def test_notices_as_warnings_are_printable(tmp_path: Path) -> None:
    adapters = [
        write_adapter(tmp_path / f"{i}", ONE, base_model_name_or_path=base)
        for i, base in enumerate((ESCAPE, "plain"))
    ]
    adapters.append(write_adapter(tmp_path / "2", {ESCAPE: ONE["up"]}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        streammerge.merge(adapters, tmp_path / "out", method="cat")
    assert any("owned" in str(warning.message) for warning in caught)
    assert all(str(warning.message).isprintable() for warning in caught)
    streammerge.merge(adapters, tmp_path / "silent", method="cat", on_event=events.ignore)
