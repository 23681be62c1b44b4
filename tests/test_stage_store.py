"""Finished stages in a store: trained once, and what is taken is what would have been trained."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

from pumice.train.adapters import LoraTraining
from pumice.train.stage_store import StageStore
from pumice.train.stages import StageResult, StageSpec, run_stage
from stage_specs import align_spec


class Training:
    """Trains a stage and counts how often."""

    def __init__(self, spec: StageSpec, out: Path) -> None:
        self.spec, self.out, self.times = spec, out, 0

    def __call__(self) -> StageResult:
        done = (self.out / self.spec.name / "training.json").is_file()
        self.times += not done
        return run_stage(self.spec, self.out)


def rows(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_second_run_takes_what_the_first_has_trained(
    folders: SimpleNamespace, world: Path, tmp_path: Path
) -> None:
    spec = align_spec(folders.vision, folders.language, world, steps=2, batch_size=2)
    store, one, two = StageStore(tmp_path / "store"), tmp_path / "one", tmp_path / "two"
    first, second = Training(spec, one), Training(spec, two)
    made = store.run(spec, one, first)
    # What a stopped attempt of the second left gives way.
    (two / "align.part").mkdir(parents=True)
    (two / "metrics.jsonl").write_text(json.dumps({"stage": "align", "step": 1, "loss": 9}) + "\n")
    taken = store.run(spec, two, second)
    assert (first.times, second.times) == (1, 0)
    assert dataclasses.replace(taken, checkpoint=one / "align") == made
    assert rows(one) == rows(two) and len(rows(two)) == 2
    names = sorted(path.name for path in (one / "align").iterdir())
    assert names == sorted(path.name for path in (two / "align").iterdir())
    assert not (two / "align.part").exists()
    for name in names:
        assert (one / "align" / name).read_bytes() == (two / "align" / name).read_bytes()
    # Another setting, or other data, is another stage; where things lie is not.
    third = Training(dataclasses.replace(spec, seed=1), tmp_path / "three")
    store.run(third.spec, third.out, third)
    assert third.times == 1
    assert len([path for path in (tmp_path / "store").iterdir() if path.is_dir()]) == 2


def test_an_adapter_beside_its_base_is_not_kept(
    folders: SimpleNamespace, world: Path, tmp_path: Path
) -> None:
    lora = LoraTraining(r=2, alpha=4.0, save="adapter")
    spec = align_spec(folders.vision, folders.language, world, lora=lora)
    result = StageResult(
        checkpoint=tmp_path, steps=1, seconds=0, final_loss=0, supervised_tokens=0,
        resumed_from=0, peak_memory_bytes=0,
    )  # fmt: skip
    assert StageStore(tmp_path / "store").run(spec, tmp_path, lambda: result) is result
    assert not (tmp_path / "store").exists()


def test_a_store_and_never_resuming_contradict(
    root: Path, world: Path, tmp_path: Path, run: object
) -> None:
    assert callable(run)
    args = ("run", "pocket-quick", "--out", tmp_path, "--store", tmp_path, "--resume", "never")
    code, _, err = run(*args)
    assert code == 2 and "--store" in err and "--resume never" in err
