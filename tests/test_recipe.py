"""Recipes: shipped ones load, overrides reach their place, and every mistake is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from pumice.core.errors import PumiceError
from pumice.recipe.load import load_recipe, recipe_names, resolved_yaml
from pumice.recipe.yaml_text import dump_yaml, parse_yaml


def refusal(name: str, *overrides: str) -> str:
    with pytest.raises(PumiceError) as caught:
        load_recipe(name, list(overrides))
    return str(caught.value)


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipe_resolves_to_itself(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.about and recipe.source
    file = tmp_path / "recipe.yaml"
    file.write_text(resolved_yaml(recipe), encoding="utf-8")
    assert load_recipe(str(file)) == recipe


def test_pocket_is_there_and_quick_is_a_cut_of_it() -> None:
    assert {"pocket", "pocket-quick"} <= set(recipe_names())
    pocket, quick = load_recipe("pocket"), load_recipe("pocket-quick")
    assert quick.model == pocket.model
    for (name, long), (_, short) in zip(pocket.stage_list(), quick.stage_list(), strict=True):
        assert short.steps is not None and long.steps is not None and short.steps < long.steps
        assert short.train == long.train, name


def test_overrides_are_yaml_values_at_dotted_places() -> None:
    recipe = load_recipe(
        "pocket",
        [
            "stages.tune.train.language=2e-4",
            "stages.tune.data.0.cap=100",
            "stages.align=null",
            "world=null",
            "model.system=null",
            "eval.benchmarks=[pope]",
            "data=some/dir",
        ],
    )
    tune = recipe.stages.tune
    assert tune is not None and tune.train["language"] == 2e-4 and tune.data[0].cap == 100
    assert recipe.world is None and recipe.model.system is None and recipe.data == "some/dir"
    assert recipe.eval is not None and recipe.eval.benchmarks == ["pope"]
    assert [name for name, _ in recipe.stage_list()] == ["tune"]


def test_versions_of_a_benchmark_are_texts_and_come_back(tmp_path: Path) -> None:
    places = ("eval.options.pope.labels=2910", "eval.options.vqav2={scorer: before-2021}")
    recipe = load_recipe("pocket", list(places))
    assert recipe.eval is not None
    assert recipe.eval.options == {"pope": {"labels": "2910"}, "vqav2": {"scorer": "before-2021"}}
    assert recipe.eval.option_list() == ["pope.labels=2910", "vqav2.scorer=before-2021"]
    file = tmp_path / "recipe.yaml"
    file.write_text(resolved_yaml(recipe), encoding="utf-8")
    assert load_recipe(str(file)) == recipe
    assert "eval.options.pope.labels" in refusal("pocket", "eval.options.pope.labels=true")
    assert "eval.options.pope" in refusal("pocket", "eval.options.pope=2910")


def test_a_later_override_wins_and_a_null_section_can_be_filled() -> None:
    recipe = load_recipe("pocket", ["seed=1", "seed=2", "world=null", "world.images=7"])
    assert recipe.seed == 2
    assert recipe.world is not None and recipe.world.images == 7


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("stages.tune.epoch=3", ["stages.tune.epoch ", "'epochs'", "stages.tune.epoch=3"]),
        ("stages.aling.steps=3", ["stages.aling ", "'align'"]),
        ("modle.connector=linear", ["modle ", "'model'"]),
        ("stages.tune.train.languge=1e-3", ["stages.tune.train.languge ", "'language'"]),
        ("stages.tune.data.0.pth=x", ["stages.tune.data.0.pth ", "'path'"]),
        ("model.image=padd", ["model.image ", "'pad', 'crop', 'resize', 'hd' or", "mean 'pad'"]),
        ("stages.tune.train.language=fast", ["stages.tune.train.language ", "must be a number"]),
        ("stages.tune.steps=2.5", ["stages.tune.steps ", "must be a whole number"]),
        ("stages.tune.steps=true", ["stages.tune.steps ", "must be a whole number"]),
        ("stages.tune.clip=.nan", ["stages.tune.clip ", "must be a finite number"]),
        ("stages.tune.weight_decay=.inf", ["stages.tune.weight_decay ", "a finite number"]),
        ("world.images=0", ["world.images ", "must be greater than 0"]),
        ("stages.tune.epochs=1", ["stages.tune", "exactly one of the two"]),
        ("stages.tune.data=[]", ["stages.tune.data ", "must have at least 1 item"]),
        ("stages.tune.train={}", ["stages.tune.train ", "at least 1 item"]),
        ("stages.tune.checkpointing=all", ["'none', 'blocks' (each one), or 'every_2'"]),
        ("stages.tune.lora.dropout=1.0", ["stages.tune.lora.dropout ", "less than 1"]),
        ("model=null", ["model ", "must be a mapping"]),
        ("seed.x=3", ["seed is a number (0)"]),
        ("stages.tune.data.1.path=x", ["'1' must be a position", "(0 to 0)"]),
        ("steps", ["key=value"]),
        ("=3", ["key=value"]),
        ("model.vision=[1", ["not valid YAML"]),
    ],
)
def test_a_wrong_override_is_named(override: str, parts: list[str]) -> None:
    message = refusal("pocket", override)
    for part in parts:
        assert part in message


def test_the_override_is_blamed_and_not_the_file(tmp_path: Path) -> None:
    assert "the override 'foo=1' on recipes/pocket.yaml" in refusal("pocket", "foo=1")
    # What two values make of each other may be the fault of either.
    both = refusal("pocket", "stages.tune.packing={tokens: 9}", "seed=1", "stages.tune.steps=5")
    assert "the overrides 'stages.tune.packing={tokens: 9}' and 'stages.tune.steps=5' on" in both
    file = tmp_path / "mine.yaml"
    text = resolved_yaml(load_recipe("pocket")).replace("batch_size: 16", "batchsize: 16", 1)
    file.write_text(text, encoding="utf-8")
    message = refusal(str(file))
    assert f"stages.align.batchsize is an unknown key (in {file})" in message
    assert "Did you mean 'batch_size'?" in message
    assert f"stages.align.batch_size: this key is required and missing (in {file})" in message


def test_every_mistake_is_told_at_once() -> None:
    message = refusal("pocket", "foo=1", "world.images=-1", "seed=zero")
    assert all(part in message for part in ("foo ", "world.images ", "seed "))


def test_both_stages_cannot_be_left_out() -> None:
    assert "at least one stage" in refusal("pocket", "stages.align=null", "stages.tune=null")


def test_unknown_recipes(tmp_path: Path) -> None:
    assert "Did you mean 'pocket'?" in refusal("pockte")
    assert "pocket-quick" in refusal("nothing-like-it")
    assert "does not exist" in refusal("missing.yaml")
    assert "is a directory" in refusal(str(tmp_path))


def test_broken_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: a\nmodel: [\n", encoding="utf-8")
    assert "mine.yaml line 3, column 1: not valid YAML" in refusal(str(file))
    file.write_text("seed: 0\nname: a\nseed: 1\n", encoding="utf-8")
    assert "line 3, column 1: not valid YAML: the key 'seed' is given twice" in refusal(str(file))
    file.write_text("- a\n- b\n", encoding="utf-8")
    assert "holds a list" in refusal(str(file))
    file.write_text("", encoding="utf-8")
    assert "a recipe is a mapping" in refusal(str(file))
    file.write_bytes(b"name: \xff\xfe")
    assert "cannot be read" in refusal(str(file))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("2.0e-3", 2e-3),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-3", -3),
        ("1e", "1e"),
        ("e3", "e3"),
        ("1-3", "1-3"),
        ("null", None),
        ('""', ""),
        ("[1, b]", [1, "b"]),
    ],
)
def test_yaml_numbers(text: str, value: object) -> None:
    parsed = parse_yaml(text, "test")
    assert parsed == value and type(parsed) is type(value)


def test_yaml_written_is_read_back() -> None:
    value = {"b": 1e-05, "a": [1, None, "1e-3", "ü"], "c": {"d": True}}
    assert parse_yaml(dump_yaml(value), "test") == value
    assert list(parse_yaml(dump_yaml(value), "test")) == ["b", "a", "c"]


# --- base -----------------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_recipe_says_only_what_it_changes(tmp_path: Path) -> None:
    """Mappings are merged, lists and null replace; what was published stays with the base."""
    text = """
base: llava15-7b
name: mine
model: {connector: linear, system: null}
stages:
  align: null
  tune: {batch_size: 8, data: [{path: a.json, images: .}], train: {language: null}}
"""
    base, mine = load_recipe("llava15-7b"), load_recipe(str(write(tmp_path / "mine.yaml", text)))
    assert mine.model == base.model.model_copy(update={"connector": "linear"})
    assert [name for name, _ in mine.stage_list()] == ["tune"]
    tune, theirs = mine.stages.tune, base.stages.tune
    assert tune is not None and theirs is not None
    assert [entry.path for entry in tune.data] == ["a.json"]
    assert tune.train == {"connector": 2e-5}
    assert (tune.batch_size, tune.epochs, tune.clip) == (8, theirs.epochs, None)
    assert base.published is not None and mine.published is None
    assert (mine.seed, mine.source) == (base.seed, base.source)


def test_a_base_may_have_a_base_and_lie_beside(tmp_path: Path) -> None:
    write(tmp_path / "lower.yaml", "base: pocket-hd\nname: lower\nseed: 5\n")
    upper = write(tmp_path / "upper.yaml", "base: lower.yaml\nname: upper\nworld: {wide: false}\n")
    recipe = load_recipe(str(upper), ["model.tiling.max_tiles=2"])
    assert (recipe.name, recipe.seed, recipe.model.image) == ("upper", 5, "hd")
    assert recipe.world is not None and (recipe.world.wide, recipe.world.images) == (False, 6000)
    assert recipe.model.tiling == {"max_tiles": 2}


def test_a_base_that_cannot_be(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    for base, said in [
        ("pockte", "Did you mean 'pocket'?"),
        ("gone.yaml", "gone.yaml does not exist"),
        ("mine.yaml", "is its own base"),
        ("null", "base in"),
        ("[pocket]", "the name of a shipped recipe or a YAML file"),
    ]:
        assert said in refusal(str(write(file, f"base: {base}\nname: mine\n"))), base
    write(tmp_path / "other.yaml", "base: mine.yaml\n")
    assert "is its own base, by way of" in refusal(str(write(file, "base: other.yaml\n")))
    assert "base is an unknown key" in refusal("pocket", "base=llava")
    assert "stages.tune.btch is an unknown key" in refusal(
        str(write(file, "base: pocket\nstages: {tune: {btch: 1}}\n"))
    )


def test_null_freezes_a_part_and_hides_no_mistake() -> None:
    tune = load_recipe("pocket", ["stages.tune.train.language=null"]).stages.tune
    assert tune is not None and list(tune.train) == ["connector"]
    assert "stages.tune.train.languge is an unknown key" in refusal(
        "pocket", "stages.tune.train.languge=null"
    )
    assert "stages.align.train " in refusal("pocket", "stages.align.train.connector=null")
