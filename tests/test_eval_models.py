"""`pumice eval` of what people have: folders of transformers, and an adapter over its base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from test_convert_next import folder as llava_next  # noqa: F401 - a fixture
from test_instructblip import theirs as instructblip  # noqa: F401 - a fixture

Run = Callable[..., tuple[int, str, str]]


def texts_of(
    run: Run, model: Path, world: Path, out: Path, *more: str, limit: int = 12
) -> list[str]:
    args = ("eval", model, "--bench", "pope", "--limit", limit, "--data", world, "--out", out)
    code, _, err = run(*args, *more)
    assert code == 0, err
    rows = (out / "pope" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(row)["text"] for row in rows]


def test_a_transformers_folder_answers_as_the_model_it_was_made_from(
    root: Path, world: Path, tmp_path: Path, run: Run
) -> None:
    assert run("convert", root / "model", tmp_path / "hf", "--to", "hf")[0] == 0
    own = texts_of(run, root / "model", world, tmp_path / "a")
    assert len(own) == 12 and texts_of(run, tmp_path / "hf", world, tmp_path / "b") == own
    assert (tmp_path / "b" / "report.html").is_file()
    code, out, _ = run("eval", "--compare", tmp_path / "a", tmp_path / "b", "--json")
    assert code == 0 and json.loads(out)["benchmarks"]["pope"]["same_text"] == 12


def test_folders_of_next_and_instructblip_answer_as_what_they_convert_to(
    llava_next: Path,  # noqa: F811
    instructblip: SimpleNamespace,  # noqa: F811
    world: Path,
    tmp_path: Path,
    run: Run,
) -> None:
    for name, folder in (("next", llava_next), ("blip", instructblip.folder)):
        own = tmp_path / f"{name}-own"
        assert run("convert", folder, own, "--to", "pumice")[0] == 0
        texts = texts_of(run, folder, world, tmp_path / name, limit=2)
        assert len(texts) == 2 and any(texts)
        assert texts_of(run, own, world, tmp_path / f"{name}-eval", limit=2) == texts


def test_an_adapter_is_evaluated_over_its_base(
    root: Path, world: Path, tmp_path: Path, run: Run
) -> None:
    args = [
        "run", "pocket-quick", "--out", tmp_path / "run", f"model.vision={root / 'vision'}",
        f"model.language={root / 'language'}", f"data={world}", "world.images=6",
        "world.eval_images=6", "stages.align.steps=2", "stages.tune.steps=2",
        "stages.align.batch_size=2", "stages.tune.batch_size=2", "eval.benchmarks=[scienceqa]",
        "eval.limit=2", "stages.tune.lora={r: 2, save: adapter}",
    ]  # fmt: skip
    code, _, err = run(*args)
    assert code == 0, err
    tune = tmp_path / "run" / "tune"
    assert (tune / "adapter_model.safetensors").is_file()
    merged = texts_of(run, tune, world, tmp_path / "merged")
    assert texts_of(run, tune, world, tmp_path / "kept", "--adapter", "keep") == merged
