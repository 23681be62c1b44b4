"""What a study file may say: a base recipe, what is changed, how often, and what is measured.

A file can hold several sizes of one study: `sizes: {paper: {...}}` lays its keys over the others,
so the pocket version and the paper's share their axes, claims and metrics. With `extends: NAME` it
says only what it adds to another study or changes in it; runs that both have are the same runs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from pumice.core.errors import PumiceError
from pumice.core.registry import check_choice, suggest
from pumice.recipe.load import Override, apply_override, explain, laid_over, parse_override
from pumice.recipe.schema import PositiveFloat, PositiveInt, Section
from pumice.recipe.yaml_text import parse_yaml

_SHIPPED = Path(__file__).parent / "studies"
POCKET = "pocket"
"""The size that a study has without being asked for another."""

Changes = dict[str, Any]
"""Dotted recipe paths and what each is set to."""


class Axis(Section):
    """One design choice: a recipe path with its values, or variants that set several paths."""

    path: str | None = None
    values: list[Any] | None = Field(default=None, min_length=1)
    variants: dict[str, Changes] | None = Field(default=None, min_length=1)
    cumulative: bool = False
    """A variant keeps the changes of all before it: the steps of a ladder."""
    positions: list[float] | None = None
    """Where the levels lie on a numeric axis of a plot (percent of data, pixels)."""
    unit: str = ""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        by_path = self.path is not None and self.values is not None
        if by_path == (self.variants is not None) or (self.path is None) != (self.values is None):
            raise ValueError("set path and values, or variants; not both and not neither")
        if self.cumulative and self.variants is None:
            raise ValueError("cumulative adds variants up: it needs variants")
        if self.positions is not None and len(self.positions) != len(self.levels()):
            raise ValueError(
                f"positions has {len(self.positions)} numbers for {len(self.levels())} levels"
            )
        return self

    def levels(self) -> dict[str, Changes]:
        """The changes of each level by its name, in the order of the file."""
        if self.variants is None:
            assert self.path is not None and self.values is not None
            return {level_name(value): {self.path: value} for value in self.values}
        if not self.cumulative:
            return self.variants
        so_far: Changes = {}
        steps: dict[str, Changes] = {}
        for name, changes in self.variants.items():
            so_far = {**so_far, **changes}
            steps[name] = so_far
        return steps

    def numbers(self) -> list[float] | None:
        """The levels as numbers, where they are some."""
        if self.positions is not None:
            return self.positions
        if self.values is None or any(isinstance(value, bool) for value in self.values):
            return None
        if not all(isinstance(value, int | float) for value in self.values):
            return None
        return [float(value) for value in self.values]


class Budget(Section):
    """What all runs get the same of. Steps of `stage` follow from it, the reference as it is."""

    equal: Literal["steps", "tokens", "flops"] = "steps"
    stage: Literal["align", "tune", "both"] = "both"
    image: list[PositiveInt] = Field(default=[192, 192], min_length=2, max_length=2)
    """Width and height of a training picture, by which tokens and FLOPs are counted."""
    text_tokens: PositiveInt = 100
    """Tokens of text of a training conversation."""


class Claim(Section):
    """What a paper says: `more` has a higher `metric` than `less` (levels of an axis).

    By more than `above`: below zero it says that `more` loses no more than that.
    """

    text: str
    source: str
    metric: str
    axis: str
    more: str
    less: str
    above: float = 0.0
    within: dict[str, str] = {}
    """The levels of the other axes; the reference's where not named."""
    paper: str = ""
    """The paper's own numbers."""


class StudyFile(Section):
    """A study: every run that it needs follows from this, and nothing else."""

    name: str
    about: str = ""
    source: str = ""
    base: str
    set: Changes = {}
    """Changes to the base that hold for every run."""
    axes: dict[str, Axis] = Field(min_length=1)
    grid: Literal["product", "one-at-a-time"] = "product"
    reference: dict[str, str] = {}
    """The level of an axis that others are compared with; the first where not named."""
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    budget: Budget = Budget()
    evaluations: list[str] | None = None
    """Benchmarks; null for the base's own."""
    limit: PositiveInt | None = None
    """Questions of a benchmark; null for the base's own."""
    metrics: list[str] = []
    """BENCHMARK.METRIC, the first one first in verdicts; empty for each benchmark's headline."""
    lengths: list[str] = []
    """Benchmarks whose answers' lengths are shown."""
    against: list[Annotated[list[str], Field(min_length=2, max_length=2)]] = []
    """Pairs of an axis and a metric that get a plot of their own, level by level."""
    claims: list[Claim] = []
    not_testable: list[str] = []
    """What the paper says and no run of this study can tell, with the reason."""
    features_gb: PositiveFloat | None = None
    """Keep so many GB of image features in the store (for large frozen vision backbones)."""

    @model_validator(mode="after")
    def _names_that_are_there(self) -> Self:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {self.seeds} names a seed twice")
        for axis, level in self.reference.items():
            self._check_level(axis, level, "reference")
        for claim in self.claims:
            for axis, level in {**claim.within, claim.axis: claim.more}.items():
                self._check_level(axis, level, f"the claim {claim.text!r}")
            self._check_level(claim.axis, claim.less, f"the claim {claim.text!r}")
            self._check_arms(claim)
        for axis, _ in self.against:
            self._check_axis(axis, "against")
        return self

    def _check_axis(self, axis: str, where: str) -> None:
        if axis not in self.axes:
            known = ", ".join(self.axes)
            raise ValueError(
                f"{where} names the axis {axis!r}; there are: {known}.{suggest(axis, self.axes)}"
            )

    def _check_level(self, axis: str, level: str, where: str) -> None:
        self._check_axis(axis, where)
        levels = self.axes[axis].levels()
        if level not in levels:
            raise ValueError(
                f"{where} names {level!r} of the axis {axis!r}; it has: {', '.join(levels)}."
                f"{suggest(level, levels)}"
            )

    def _check_arms(self, claim: Claim) -> None:
        if self.grid == "product":
            return
        reference = self.reference_levels().items()
        for level in (claim.more, claim.less):
            if len(self.levels_of(claim, level).items() - reference) > 1:
                raise ValueError(
                    f"the claim {claim.text!r} compares arms that the grid {self.grid} does not "
                    "have: they leave the reference on more than one axis. Let grid be product, or "
                    "name the reference's levels in `within`."
                )

    def levels_of(self, claim: Claim, level: str) -> dict[str, str]:
        """The arm of a claim that has this level of its axis."""
        return {**self.reference_levels(), **claim.within, claim.axis: level}

    def reference_levels(self) -> dict[str, str]:
        """The level of every axis that differences are taken from."""
        return {
            name: self.reference.get(name, next(iter(axis.levels())))
            for name, axis in self.axes.items()
        }


def level_name(value: Any) -> str:
    """How a value of an axis is written in tables."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value, ensure_ascii=False)


def study_names() -> list[str]:
    """The shipped studies by name."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def load_study(
    name_or_file: str, size: str = POCKET, overrides: Sequence[str] = ()
) -> tuple[StudyFile, Path]:
    """A study by shipped name or from a YAML file, in one of its sizes, and the file it is in.

    `overrides` are `key=value`, laid over it last. Raises PumiceError naming what is wrong in the
    file and what is allowed.
    """
    path = _find(name_or_file)
    chain = _read_chain(path)
    sizes = [name for _, tree in chain for name in _sizes(tree)]
    if size != POCKET or POCKET in sizes:
        check_choice(f"the size of {_shown(path)}", size, list(dict.fromkeys([POCKET, *sizes])))
    tree: dict[str, Any] = {}
    # The lowest first: what an upper one adds to an axis is there in every size of the lower one.
    for _, own in reversed(chain):
        tree = laid_over(tree, _in_size(own, size))
    parsed = [_of_study(parse_override(text), tree) for text in overrides]
    for override in parsed:
        apply_override(tree, override)
    try:
        return StudyFile.model_validate(tree), path
    except ValidationError as error:
        raise PumiceError(explain(error, _shown(path), parsed, StudyFile)) from error


def _of_study(override: Override, tree: dict[str, Any]) -> Override:
    """An override as a study reads it: paths of the recipe are one key of `Changes` each.

    What is set in an axis is set in one that is there: a misspelt axis is no new one.
    """
    path, whole = override.path, len(override.path)
    if path[0] == "set":
        whole = 1
    elif path[0] == "axes" and len(path) > 2:
        check_choice(f"override {override.text!r}: the axis", path[1], list(tree.get("axes") or {}))
        whole = 4 if path[2] == "variants" else whole
    return replace(override, path=(*path[:whole], *filter(None, [".".join(path[whole:])])))


def _shown(path: Path) -> str:
    return f"studies/{path.name}" if path.parent == _SHIPPED else str(path)


def _read_chain(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """A study file and those that it extends, the lowest last."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    below: Path | None = path
    while below is not None:
        if below.resolve() in (known.resolve() for known, _ in chain):
            raise PumiceError(f"study {_shown(path)} extends itself, by way of {_shown(below)}.")
        tree = _read(below)
        chain.append((below, tree))
        extends = tree.pop("extends", None)
        beside = below.parent / str(extends)
        below = None if extends is None else beside if beside.is_file() else _find(str(extends))
    return chain


def _read(path: Path) -> dict[str, Any]:
    shown = _shown(path)
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), shown)
    except (OSError, UnicodeDecodeError) as error:
        raise PumiceError(f"study file {shown} cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise PumiceError(
            f"study file {shown} holds no mapping; at least the keys name, base and axes are "
            "needed. See docs/study.md."
        )
    for name, over in _sizes(tree, shown).items():
        if not isinstance(over, dict):
            raise PumiceError(f"{shown}: the size {name!r} must be a mapping of keys it changes.")
    # A recipe beside the file stays that recipe for a study elsewhere that extends this one.
    for keys in (tree, *_sizes(tree).values()):
        beside = path.parent / str(keys.get("base"))
        if "base" in keys and beside.is_file():
            keys["base"] = str(beside.resolve())
    return tree


def _find(name_or_file: str) -> Path:
    known = study_names()
    if name_or_file in known:
        return _SHIPPED / f"{name_or_file}.yaml"
    path = Path(name_or_file).expanduser()
    if path.is_file():
        return path
    raise PumiceError(
        f"study {name_or_file!r} is no file and no shipped study; shipped: {', '.join(known)}."
        f"{suggest(name_or_file, known)}"
    )


def _sizes(tree: dict[str, Any], shown: str = "") -> dict[str, Any]:
    sizes = tree.get("sizes") or {}
    if not isinstance(sizes, dict):
        raise PumiceError(f"{shown}: sizes must map the name of a size to what it changes.")
    return sizes


def _in_size(tree: dict[str, Any], size: str) -> dict[str, Any]:
    """The file's keys with those of a size laid over them; an axis is replaced as a whole."""
    over = _sizes(tree).get(size, {})
    merged = {**tree, **over}
    merged.pop("sizes", None)
    if isinstance(over.get("axes"), dict) and isinstance(tree.get("axes"), dict):
        merged["axes"] = {**tree["axes"], **over["axes"]}
    return merged
