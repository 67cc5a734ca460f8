"""Recipes as YAML files, in the words of mergekit where they fit.

Each file says what a call of `merge` says: reading one gives the call's arguments, and what is
written of a recipe reads as the same recipe again. Keys are strict, for a word that is passed over
in silence is a merge that nobody asked for.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from streammerge.errors import RecipeError, RecipeFileError, shorten
from streammerge.files import read_whole
from streammerge.ranks import RankLimit, RankPolicy
from streammerge.recipe import Recipe, make_rank
from streammerge.registry import PARAMETERS
from streammerge.schedule import Value, as_json, make_value, otherwise, scaled

MAX_BYTES = 4_000_000
MAX_DEPTH = 20

_TEXT, _NUMBER = (str,), (int, float)

_OPTIONS: dict[str, tuple[type, ...]] = {
    "rank": (int, str),
    "space": _TEXT,
    "seed": (int,),
    "majority_sign": _TEXT,
    "threshold_scope": _TEXT,
    "clamp": _NUMBER,
    "compute_dtype": _TEXT,
    "extras": _TEXT,
    "scaling": (*_TEXT, *_NUMBER),
    "include": _TEXT,
    "exclude": _TEXT,
    "format": _TEXT,
    "base_model": _TEXT,
    "strict_base": (bool,),
    "max_shard_size": (str, int),
}
"""Keys that are options of `merge` by the same name, and what they may be."""

_LINE_ENDS = frozenset("\n\r\x85\u2028\u2029")

_NAMES = {str: "a text", int: "an integer", float: "a number", bool: "true or false"}

_KEYS = ("merge_method", "models", "parameters", "dtype", "out_dtype", "output", *_OPTIONS)
_MODEL_KEYS = ("model", "parameters")
_PARAMETERS = ("weight", "density", "normalize", "lambda")
_MODEL_PARAMETERS = ("weight", "density")

_FOREIGN = {
    "slices": "an adapter is merged as a whole; filters and gradients tell layers apart",
    "modules": "an adapter is merged as a whole; include and exclude choose modules",
    "tokenizer": "adapters have no tokenizer",
    "tokenizer_source": "adapters have no tokenizer",
    "chat_template": "adapters have no chat template",
    "int8_mask": "masks take no memory here",
    "rescale": "dare divides by the density, as published",
    "t": "slerp goes by the weights, of which t is the second one's share: 1 - t and t",
}
"""Words of mergekit that have no meaning here, and why."""


@dataclass(frozen=True)
class RecipeFile:
    """What a recipe file asks for."""

    adapters: tuple[str, ...]
    output: str | None
    options: Mapping[str, Any]
    """Arguments of `merge`, by name."""


def read_recipe(path: Path) -> RecipeFile:
    """Read a recipe file.

    Args:
        path: of the file. Paths in it are relative to the working directory, as on the command
            line.

    Raises:
        RecipeFileError: it cannot be read, or says something that is not known here.
    """
    try:
        text = read_whole(path, MAX_BYTES).decode()
    except OSError as error:
        raise RecipeFileError(f"cannot be read ({error.strerror})", path=str(path)) from error
    except UnicodeDecodeError as error:
        raise RecipeFileError("is not text in UTF-8", path=str(path)) from error
    return _File(str(path)).recipe(text)


def write_recipe(recipe: Mapping[str, Any]) -> bytes:
    """Return the file of a recipe, given as `Recipe.to_dict` gives it."""
    found = Recipe.from_dict(dict(recipe))
    fields: dict[str, Any] = {"merge_method": found.method, "models": _models(found)}
    parameters: dict[str, Any] = {}
    if found.density is not None and not isinstance(found.density, tuple):
        parameters["density"] = found.density
    parameters.update(found.parameters)
    if found.normalize:
        parameters["normalize"] = True
    if parameters:
        fields["parameters"] = parameters
    if found.dtype != "auto":
        fields["dtype"] = found.dtype
    defaults = Recipe(adapters=found.adapters, method=found.method, weights=found.weights)
    for option in _OPTIONS:
        field = "max_shard_bytes" if option == "max_shard_size" else option
        value = getattr(found, field)
        if value != getattr(defaults, field):
            fields[option] = value
    return yaml.dump(
        fields, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000
    ).encode()


class _Dumper(yaml.SafeDumper):
    """Writes texts in which YAML would see the end of a line with escapes."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = '"' if _LINE_ENDS.intersection(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
for _kind in (RankPolicy, RankLimit):
    _Dumper.add_representer(_kind, lambda dumper, rank: _text(dumper, str(rank)))


def _models(recipe: Recipe) -> list[dict[str, Any]]:
    densities = recipe.density if isinstance(recipe.density, tuple) else None
    models = []
    for i, (adapter, weight) in enumerate(zip(recipe.adapters, recipe.weights, strict=True)):
        parameters = {"weight": as_json(weight)}
        if densities is not None:
            parameters["density"] = as_json(densities[i])
        models.append({"model": adapter, "parameters": parameters})
    return models


class _File:
    """A file being read; its name and lines go into every message."""

    def __init__(self, path: str) -> None:
        self._path = path

    def recipe(self, text: str) -> RecipeFile:
        """Return what the text asks for."""
        root = self._mapping(self._compose(text), "a recipe", _KEYS)
        for key in ("merge_method", "models"):
            if key not in root:
                raise self._error(f"{key} is missing")
        parameters = self._parameters(root.get("parameters"), (*_PARAMETERS, *PARAMETERS))
        models = [self._model(node) for node in self._sequence(root["models"], "models")]
        options: dict[str, Any] = {
            "method": self._typed(root["merge_method"], "merge_method", _TEXT),
            "weights": self._weights(models, parameters),
            "density": self._density(models, parameters),
            "parameters": {
                name: self._number(parameters, name, None)
                for name in parameters
                if name in PARAMETERS
            },
            "normalize": self._flag(parameters, "normalize"),
            **{
                key: self._typed(root[key], key, types)
                for key, types in _OPTIONS.items()
                if key in root
            },
        }
        if "rank" in root:
            self._check_rank(root["rank"], options["rank"])
        dtypes = {
            key: self._typed(root[key], key, _TEXT) for key in ("dtype", "out_dtype") if key in root
        }
        if len(set(dtypes.values())) > 1:
            raise self._error(
                "dtype and out_dtype differ; both are the output's here, and compute_dtype is "
                "that of the arithmetic",
                root["out_dtype"],
            )
        if dtypes:
            options["dtype"] = next(iter(dtypes.values()))
        output = self._typed(root["output"], "output", _TEXT) if "output" in root else None
        return RecipeFile(tuple(model for model, _ in models), output, options)

    def _weights(
        self, models: Sequence[tuple[str, Mapping[str, Any]]], general: Mapping[str, Any]
    ) -> list[Any]:
        factor = self._number(general, "lambda", 1.0)
        assert factor is not None
        if factor != 1.0 and self._flag(general, "normalize"):
            raise self._error("lambda does not go with normalize: the weights have a sum already")
        weights = [_of(own, "weight", general) for _, own in models]
        return [as_json(scaled(1.0 if w is None else w, factor)) for w in weights]

    def _density(
        self, models: Sequence[tuple[str, Mapping[str, Any]]], general: Mapping[str, Any]
    ) -> Any:
        default = general.get("density")
        if not any("density" in own for _, own in models) and not isinstance(default, tuple):
            return default
        densities = []
        for model, own in models:
            density = _of(own, "density", general)
            if density is None:
                raise self._error(f"{model} has no density, and there is none for all")
            densities.append(as_json(density))
        return densities

    def _model(self, node: yaml.Node) -> tuple[str, Mapping[str, Any]]:
        fields = self._mapping(node, "a model", _MODEL_KEYS)
        if "model" not in fields:
            raise self._error("an entry of models has no model", node)
        return (
            self._typed(fields["model"], "model", _TEXT),
            self._parameters(fields.get("parameters"), _MODEL_PARAMETERS),
        )

    def _parameters(self, node: yaml.Node | None, keys: Sequence[str]) -> dict[str, Any]:
        """Return parameters; weights and densities as values."""
        if node is None:
            return {}
        found = {}
        for key, inner in self._mapping(node, "parameters", keys).items():
            value = self._value(inner)
            if key in ("weight", "density"):
                value = self._schedule(inner, value, key)
            found[key] = value
        return found

    def _schedule(self, node: yaml.Node, given: Any, key: str) -> Value:
        try:
            return make_value(given, option=key)
        except RecipeError as error:
            raise self._error(str(error), node) from error

    def _check_rank(self, node: yaml.Node, given: int | str) -> None:
        try:
            make_rank(given)
        except RecipeError as error:
            raise self._error(str(error), node) from error

    def _flag(self, parameters: Mapping[str, Any], key: str) -> bool:
        value = parameters.get(key, False)
        if not isinstance(value, bool):
            raise self._error(f"{key} must be true or false, not {value!r}")
        return value

    def _number(
        self, parameters: Mapping[str, Any], key: str, default: float | None
    ) -> float | None:
        if key not in parameters:
            return default
        value = parameters[key]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._error(f"{key} must be a number, not {value!r}")
        return float(value)

    # What YAML is made of ----------------------------------------------------------------------

    def _compose(self, text: str) -> yaml.Node:
        """Return the tree of a document; no part of it is used twice, and none is too deep."""
        try:
            depth = 0
            for event in yaml.parse(text, Loader=yaml.SafeLoader):
                if isinstance(event, yaml.AliasEvent):
                    raise self._error("*names of YAML are not followed; write it out", event)
                depth += isinstance(event, yaml.CollectionStartEvent)
                depth -= isinstance(event, yaml.CollectionEndEvent)
                if depth > MAX_DEPTH:
                    raise self._error("is nested too deeply", event)
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise self._error(f"is not YAML: {error}") from error
        if node is None:
            raise self._error("is empty")
        return node

    def _mapping(
        self, node: yaml.Node, what: str, keys: Sequence[str] | None
    ) -> dict[str, yaml.Node]:
        """Return a mapping's parts by key, which must be known ones."""
        if not isinstance(node, yaml.MappingNode):
            raise self._error(f"{what} must be a mapping", node)
        found: dict[str, yaml.Node] = {}
        for key_node, value in node.value:
            key = self._value(key_node)
            if not isinstance(key, str):
                raise self._error(f"{key!r} cannot be a key", key_node)
            if key in found:
                raise self._error(f"{key} stands there twice", key_node)
            if keys is not None and key not in keys:
                raise self._unknown(key, what, keys, key_node)
            found[key] = value
        return found

    def _unknown(
        self, key: str, what: str, keys: Sequence[str], node: yaml.Node
    ) -> RecipeFileError:
        if key in _FOREIGN:
            return self._error(f"{key} does not go with adapters: {_FOREIGN[key]}", node)
        everywhere = {*_KEYS, *_MODEL_KEYS, *_PARAMETERS, *PARAMETERS}
        if key in everywhere:
            return self._error(f"{key} does not belong into {what}, where {_listed(keys)} do", node)
        close = difflib.get_close_matches(key, keys, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {_listed(keys)}"
        return self._error(f"{what} has no key {key!r}; {hint}", node)

    def _sequence(self, node: yaml.Node, what: str) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            raise self._error(f"{what} must be a list with at least one entry", node)
        return list(node.value)

    def _typed(self, node: yaml.Node, what: str, types: tuple[type, ...]) -> Any:
        """Return a value of one of these types."""
        value = self._value(node)
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            meant = " or ".join(dict.fromkeys(_NAMES[kind] for kind in types))
            raise self._error(f"{what} must be {meant}, not {shorten(value)}", node)
        return value

    def _value(self, node: yaml.Node) -> Any:
        """Return what a node means, in plain types."""
        if isinstance(node, yaml.SequenceNode):
            return [self._value(entry) for entry in node.value]
        if isinstance(node, yaml.MappingNode):
            parts = self._mapping(node, "an entry", None)
            return {key: self._value(value) for key, value in parts.items()}
        try:
            return yaml.constructor.SafeConstructor().construct_object(node)
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            raise self._error(f"{node.value!r} cannot be read", node) from error

    def _error(self, message: str, place: yaml.Node | yaml.Event | None = None) -> RecipeFileError:
        mark = None if place is None else place.start_mark
        line = None if mark is None else mark.line + 1
        return RecipeFileError(message, path=self._path, line=line)


def _of(own: Mapping[str, Any], key: str, general: Mapping[str, Any]) -> Value | None:
    """Return a model's own value, and the general one where that fits no target."""
    if key in own and key in general:
        return otherwise(own[key], general[key])
    found: Value | None = own.get(key, general.get(key))
    return found


def _listed(keys: Sequence[str]) -> str:
    return ", ".join(keys)
