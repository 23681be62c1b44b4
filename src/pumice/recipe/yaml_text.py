"""YAML as recipes need it: `1e-3` is a number and a key written twice is an error.

PyYAML follows YAML 1.1, where `1e-3` is a string, and keeps the last of two equal keys silently.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from pumice.core.errors import PumiceError

_FLOAT = re.compile(
    r"""^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?
        |[-+]?[0-9]+[eE][-+]?[0-9]+
        |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


class _RecipeLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 floats and unique keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As SafeLoader does, but a key given twice is an error at its line."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' is given twice", key_node.start_mark
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _RecipeDumper(yaml.SafeDumper):
    """SafeDumper that quotes a text which `_RecipeLoader` would read as a number."""


for _side in (_RecipeLoader, _RecipeDumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def parse_yaml(text: str, where: str) -> Any:
    """The value written in `text`; a syntax error names `where`, line and column."""
    try:
        return yaml.load(text, Loader=_RecipeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise PumiceError(f"{where}{place}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise PumiceError(f"{where}: not valid YAML: {error}") from error


def dump_yaml(value: Any) -> str:
    """`value` as YAML text, keys in their given order; `parse_yaml` reads it back equal."""
    text: str = yaml.dump(
        value, Dumper=_RecipeDumper, sort_keys=False, allow_unicode=True, width=100
    )
    return text
