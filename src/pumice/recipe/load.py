"""Read a recipe: by shipped name or from a YAML file, with `key=value` overrides on top.

A recipe may name another as its `base` and say only what it changes, so that a design choice is
one line. Its `published` is its own and never the base's.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pumice.core.errors import PumiceError
from pumice.core.registry import suggest
from pumice.recipe.schema import Recipe
from pumice.recipe.yaml_text import dump_yaml, parse_yaml

_SHIPPED = Path(__file__).parent / "recipes"

# pydantic's words for the mistakes people make, in the form: what is allowed.
_WORDS = {
    "missing": "this key is required and missing",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be a text",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be a mapping of keys to values",
    "model_type": "must be a mapping of keys to values",
    "too_short": "must have at least 1 item",
}
# The same for texts of a form, by the last key of their place.
_FORMS = {"checkpointing": "must be 'none', 'blocks' (each one), or 'every_2', 'every_3', ..."}


@dataclass(frozen=True, slots=True)
class Override:
    """One `key=value` of the command line, split and parsed."""

    text: str
    path: tuple[str, ...]
    value: Any

    @property
    def dotted(self) -> str:
        """The key as it was written."""
        return ".".join(self.path)


def recipe_names() -> list[str]:
    """The shipped recipes by name."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def load_recipe(name_or_file: str, overrides: list[str] | None = None) -> Recipe:
    """The recipe of that name or file with the overrides applied, checked as a whole.

    Raises PumiceError naming the full dotted path, the file or override, and what is allowed.
    """
    path = _find(name_or_file)
    tree = _read(path)
    parsed = [parse_override(text) for text in overrides or []]
    for override in parsed:
        apply_override(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise PumiceError(explain(error, _shown(path), parsed)) from error


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe with every default written out; loading this text gives the same recipe."""
    return dump_yaml(recipe.model_dump())


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a recipe file, laid over the one it names as its `base`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PumiceError(f"recipe file {path} cannot be read: {error}") from error
    tree = parse_yaml(text, _shown(path))
    if not isinstance(tree, dict):
        raise PumiceError(
            f"recipe file {_shown(path)} holds {_kind(tree)}; a recipe is a mapping with at least "
            "the keys name, model and stages. See `pumice recipes show pocket`."
        )
    if "base" not in tree:
        return tree
    base = tree.pop("base")
    if not isinstance(base, str):
        raise PumiceError(
            f"base in {_shown(path)} is {base!r}; the name of a shipped recipe or a YAML file is "
            "needed."
        )
    # A file beside this one, or else what the name means anywhere.
    beside = path.parent / base
    below = beside if beside.is_file() else _find(base)
    if below.resolve() in (entry.resolve() for entry in (*seen, path)):
        raise PumiceError(
            f"recipe {_shown(path)} is its own base, by way of {_shown(below)}. Name another base."
        )
    under = _read(below, (*seen, path))
    # What was measured with the base says nothing of a recipe that changes it.
    under.pop("published", None)
    merged: dict[str, Any] = laid_over(under, tree)
    return merged


def laid_over(base: Any, own: Any) -> Any:
    """Mappings are merged key by key; everything else, lists too, is what the upper one says."""
    if not (isinstance(base, dict) and isinstance(own, dict)):
        return own
    merged = {key: laid_over(base.get(key), value) for key, value in own.items()}
    return {**base, **merged}


def _find(name_or_file: str) -> Path:
    known = recipe_names()
    if name_or_file in known:
        return _SHIPPED / f"{name_or_file}.yaml"
    path = Path(name_or_file).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise PumiceError(
            f"recipe '{name_or_file}' is a directory; give the YAML file itself, for example "
            f"{path / 'recipe.yaml'}."
        )
    if path.suffix in {".yaml", ".yml"}:
        raise PumiceError(
            f"recipe file {name_or_file} does not exist. Give an existing YAML file or one of the "
            f"shipped recipes: {', '.join(known)}."
        )
    raise PumiceError(
        f"recipe '{name_or_file}' is unknown; shipped recipes: {', '.join(known)}."
        f"{suggest(name_or_file, known)} A path to a YAML file is allowed too."
    )


def _shown(path: Path) -> str:
    """Shipped recipes are shown by their place in the package, other files as they were given."""
    return f"recipes/{path.name}" if path.parent == _SHIPPED else str(path)


def parse_override(text: str) -> Override:
    """A `key=value`, the value read as YAML."""
    key, equals, value = text.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise PumiceError(
            f"override '{text}' is not of the form key=value; write the key with dots and no "
            "spaces around '=', for example stages.tune.steps=200."
        )
    return Override(text, path, parse_yaml(value, f"override '{text}'"))


def apply_override(tree: dict[str, Any], override: Override) -> None:
    """Set the value at its dotted place; sections that are null or absent are made."""
    node: Any = tree
    for depth, key in enumerate(override.path):
        last = depth == len(override.path) - 1
        if isinstance(node, list):
            node = _set_in_list(node, key, override, last)
        elif isinstance(node, dict):
            if last:
                node[key] = override.value
            elif node.get(key) is None:
                node[key] = {}
            node = node[key]
        else:
            parent = ".".join(override.path[:depth])
            raise PumiceError(
                f"override '{override.text}': {parent} is {_kind(node)} ({node!r}) and has no key "
                f"'{key}'. Set {parent} itself, or see the keys with `pumice recipes show`."
            )


def _set_in_list(node: list[Any], key: str, override: Override, last: bool) -> Any:
    if not key.isdigit() or int(key) >= len(node):
        raise PumiceError(
            f"override '{override.text}': '{key}' must be a position in a list of {len(node)} "
            f"(0 to {len(node) - 1}); to change its length, override the whole list."
        )
    if last:
        node[int(key)] = override.value
    return node[int(key)]


def explain(
    error: ValidationError,
    file: str,
    overrides: Sequence[Override] = (),
    schema: type[BaseModel] = Recipe,
) -> str:
    """What is wrong in a file that should follow a schema, one line for each fault."""
    word = _word(schema)
    lines = [_explain_one(detail, file, overrides, schema) for detail in error.errors()]
    if len(lines) == 1:
        return f"{word} not valid: {lines[0]}"
    return f"{word} not valid:\n" + "\n".join(f"  {line}" for line in lines)


def _word(schema: type[BaseModel]) -> str:
    """What people call such a file: recipe, study, mixture."""
    return schema.__name__.removesuffix("File").lower()


def _explain_one(
    detail: ErrorDetails, file: str, overrides: Sequence[Override], schema: type[BaseModel]
) -> str:
    place = [str(part) for part in detail["loc"] if part != "[key]"]
    dotted = ".".join(place) or f"the {_word(schema)}"
    where = _blame(place, file, overrides)
    kind = detail["type"]
    if detail["loc"][-1:] == ("[key]",) and kind == "string_type":
        # YAML reads no, on, 5 and null as other things than text.
        within = ".".join(place[:-1]) or f"the {_word(schema)}"
        return (
            f"{within} has the key {detail['input']!r} (in {where}); keys must be text. Put it in "
            f"quotes."
        )
    if kind == "extra_forbidden" or detail["loc"][-1:] == ("[key]",):
        known = _known_keys(place[:-1], schema)
        return (
            f"{dotted} is an unknown key (in {where}); known here: {', '.join(known)}."
            f"{suggest(place[-1], known)}"
        )
    if kind == "missing":
        return f"{dotted}: {_WORDS[kind]} (in {where})"
    if kind == "value_error":
        words = str(detail["ctx"]["error"])
        return f"{dotted}: {words} (in {where})"
    if kind == "literal_error":
        words = f"must be {detail['ctx']['expected']}"
        given = detail["input"]
        if isinstance(given, str):
            words += "." + suggest(given, detail["ctx"]["expected"].replace("'", " ").split())
        return f"{dotted} is {given!r} (in {where}); {words}"
    words = _WORDS.get(kind, detail["msg"].replace("Input should be", "must be"))
    if kind == "string_pattern_mismatch":
        words = _FORMS.get(place[-1], words)
    return f"{dotted} is {detail['input']!r} (in {where}); {words}"


def _blame(place: list[str], file: str, overrides: Sequence[Override]) -> str:
    """Where a value came from: the override that set it, those that set parts of it, the file."""
    whole = [o for o in overrides if place[: len(o.path)] == list(o.path)]
    parts = [o for o in overrides if list(o.path[: len(place)]) == place]
    blamed = whole[-1:] or parts
    if not blamed:
        return file
    named = " and ".join(f"'{override.text}'" for override in blamed)
    return f"the override{'s' if len(blamed) > 1 else ''} {named} on {file}"


def _known_keys(place: list[str], schema: type[BaseModel]) -> list[str]:
    """The keys the schema allows at a dotted place."""
    annotation: Any = schema
    for key in place:
        model = _model_in(annotation)
        if model is not None and key in model.model_fields:
            annotation = model.model_fields[key].annotation
        elif typing.get_origin(annotation) in (list, dict):
            annotation = typing.get_args(annotation)[-1]
    model = _model_in(annotation)
    if model is not None:
        return list(model.model_fields)
    if typing.get_origin(annotation) is dict:
        return [str(key) for key in typing.get_args(typing.get_args(annotation)[0])]
    return []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The section class in `X` or `X | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in {types.UnionType, typing.Union}:
        for choice in typing.get_args(annotation):
            if isinstance(choice, type) and issubclass(choice, BaseModel):
                return choice
    return None


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "a text", int: "a number", float: "a number"}
    return names.get(type(value), "empty" if value is None else f"a {type(value).__name__}")
