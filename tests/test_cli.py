"""The command line: what it says where, how it fails, and that work once done is kept."""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from transformers import AutoTokenizer

import tiny
from command_lines import examples, leaves, parse
from pumice.cli.app import main
from pumice.cli.doctor import _NEEDS
from pumice.core.errors import PumiceError
from pumice.infer.model import Model
from pumice.models.checkpoint import save_checkpoint
from pumice.models.lmm import LMM
from pumice.processing.images import ImageSpec
from pumice.processing.processor import Processor

ASK_KEYS = ["text", "finish_reason", "prompt_tokens", "image_tokens", "new_tokens"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process: exit code, stdout, stderr."""

    def call(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint, its backbones, and pictures."""
    root = tmp_path_factory.mktemp("cli")
    tiny.vision_folder(root / "vision")
    tiny.language_folder(root / "language")
    torch.manual_seed(0)
    lmm = LMM.from_backbones(root / "vision", root / "language", "mlp2x_gelu", -2, "patch")
    processor = Processor(
        AutoTokenizer.from_pretrained(root / "language"),
        ImageSpec("pad", tiny.IMAGE_SIZE),
        "vicuna_v1",
        "",
        lmm.image_tokens,
    )
    save_checkpoint(root / "model", lmm, processor.save, {})
    for number, color in enumerate(("red", "blue")):
        PIL.Image.new("RGB", (40, 24), color).save(root / f"{number}.png")
    (root / "broken.png").write_bytes(b"not a picture")
    return root


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world") / "data"
    with pytest.raises(SystemExit) as caught:
        main(["world", "make", "--out", str(out), "--images", "6", "--eval-images", "6"])
    assert not caught.value.code
    return out


def test_the_commands_of_this_landing_and_no_stubs() -> None:
    assert {" ".join(words) for words in leaves()} == {
        "run", "recipes list", "recipes show", "ask", "chat", "generate", "eval", "score",
        "world make", "world backbones", "doctor",
    }  # fmt: skip


@pytest.mark.parametrize("words", [*leaves(), ("recipes",), ("world",)], ids=" ".join)
def test_help_has_examples_that_parse(words: tuple[str, ...], run: Run) -> None:
    code, out, err = run(*words, "--help")
    assert (code, err) == (0, "")
    assert examples(out)
    for line in examples(out):
        assert parse(line).startswith("pumice " + " ".join(words))


def test_help_is_quick_and_light() -> None:
    code = "import sys; from pumice.cli.app import main; main(sys.argv[1:])"
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-c", code, "--help"], check=True, capture_output=True, timeout=60
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.3, spent


def test_version_and_no_arguments(run: Run) -> None:
    assert run("--version")[:2] == (0, "pumice 0.1.0\n")
    code, out, err = run()
    assert code == 2 and "Commands:" in out + err


def test_doctor_knows_every_command(run: Run) -> None:
    assert set(_NEEDS) >= {" ".join(w) for w in leaves() if w[0] not in {"recipes", "doctor"}}
    _, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["threads"] == torch.get_num_threads()
    assert found["commands"]["score"] == {"ready": True, "missing": []}


def test_doctor_names_what_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pumice.cli.doctor.shipped", lambda name: None)
    code, out, _ = run("doctor")
    assert code == 1
    assert "missing: shipped pocket-vision, shipped pocket-language" in out


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("run", "pockte", "--out", "x"), "Did you mean 'pocket'?"),
        (("run", "pocket", "stages.tune.epoch=1", "--out", "x"), "stages.tune.epoch is an unknown"),
        (("recipes", "show", "pockte"), "Did you mean 'pocket'?"),
        (("ask", "pockte", "hello"), "Did you mean 'pocket'?"),
        (("ask", "{root}/vision", "hello"), "is not a pumice checkpoint"),
        (("ask", "{root}/model", "hello", "--image", "{root}/broken.png"), "broken.png"),
        (("ask", "{root}/model", "hello", "--image", "none.png"), "none.png"),
        (("ask", "{root}/model", "hello", "--dtype", "float31"), "Did you mean 'float32'?"),
        (("eval", "pocket", "--bench", "pop", "--data", "x", "--out", "y"), "Did you mean 'pope'?"),
        (("eval", "pocket", "--bench", ",", "--data", "x", "--out", "y"), "no benchmark was named"),
        (("score", "pop", "--data", "x", "--answers", "y"), "Did you mean 'pope'?"),
        (("generate", "{root}/model", "--requests", "no.jsonl", "--out", "y"), "no.jsonl"),
    ],
)
def test_a_wrong_input_is_one_clear_block(
    args: tuple[str, ...], said: str, root: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    code, out, err = run(*(arg.format(root=root) for arg in args))
    assert code == 2
    assert out == ""
    assert err.startswith("error: ") and said in err and "Traceback" not in err


def test_an_unknown_command_or_option(run: Run) -> None:
    assert run("rnu")[0] == 2
    code, out, err = run("ask", "pocket", "hi", "--imag", "x")
    assert (code, out) == (2, "") and "--image" in err


def test_a_place_that_cannot_be_written(root: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = run("world", "make", "--out", tmp_path / "file" / "below", "--images", 1)
    assert code == 2 and err.startswith("error: ") and "below" in err


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (PumiceError("no"), 2)])
def test_exit_codes(
    error: BaseException, code: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("pumice.recipe.load.recipe_names", fail)
    assert run("recipes")[0] == code


# --- recipes, ask, chat ---------------------------------------------------------------------------


def test_recipes(run: Run) -> None:
    code, out, _ = run("recipes")
    assert code == 0 and out.splitlines()[0].startswith("pocket ")
    assert run("recipes", "list")[1] == out
    names = [entry["name"] for entry in json.loads(run("recipes", "--json")[1])["recipes"]]
    assert names == [line.split()[0] for line in out.splitlines()]
    shown = json.loads(run("recipes", "show", "pocket", "seed=7", "--json")[1])
    assert shown["seed"] == 7 and shown["name"] == "pocket"
    assert "seed: 7\n" in run("recipes", "show", "pocket", "seed=7")[1]


def test_ask(root: Path, run: Run) -> None:
    args = ("ask", root / "model", "What is this?", "--image", root / "0.png")
    code, out, err = run(*args, "--max-new-tokens", 5, "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert list(answer) == ASK_KEYS
    assert answer["image_tokens"] == 16 and 1 <= answer["new_tokens"] <= 5
    code, plain, err = run(*args, "--max-new-tokens", 5)
    assert plain == answer["text"] + "\n"
    assert ("cut after" in err) == (answer["finish_reason"] == "length")
    two = json.loads(run(*args, "--image", root / "1.png", "--json", "--max-new-tokens", 1)[1])
    assert two["image_tokens"] == 32


def test_chat_through_a_pipe(root: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def stream(_: Model, request: Any) -> Any:
        asked.append(request)
        yield from ("an ", "answer")

    monkeypatch.setattr(Model, "stream", stream)
    lines = [
        "first",
        f"/image {root / '1.png'}",
        "/image missing.png",
        "/imgae x",
        "/image",
        "second",
        "/reset",
        "third",
        "",
        "never read",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    code, out, err = run("chat", root / "model", "--image", root / "0.png", "--temperature", 0.5)
    assert code == 0
    assert out == "an answer\n" * 3
    assert "missing.png" in err and "Did you mean '/image'?" in err and "needs a file" in err
    first, second, third = (request.messages for request in asked)
    assert [part.image for part in first[-1].images] == [root / "0.png"]
    assert [message.role for message in second] == ["user", "assistant", "user"]
    assert second[1].text == "an answer"
    assert [part.image for part in second[-1].images] == [root / "1.png"]
    assert [message.text for message in third] == ["third"]
    assert asked[0].sampling.temperature == 0.5


def test_chat_with_a_model_until_the_input_ends(
    root: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    code, out, _ = run("chat", root / "model", "--max-new-tokens", 4)
    asked = json.loads(run("ask", root / "model", "hello", "--max-new-tokens", 4, "--json")[1])
    assert code == 0 and out.strip() == asked["text"]


# --- generate -------------------------------------------------------------------------------------

CHAT = {
    "id": "a",
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "0.png"}},
                {"type": "text", "text": "What is it?"},
            ],
        }
    ],
}
REQUESTS = [
    json.dumps(CHAT),
    json.dumps({"question_id": 7, "image": "1.png", "text": "Colour?", "category": "c"}),
    json.dumps({"question_id": 8, "image": "broken.png", "text": "Colour?"}),
    "{not json",
    json.dumps({"question_id": 9, "text": "No image."}),
    json.dumps({"question_id": 9, "text": "No image."}),
    json.dumps({"id": "nothing asked"}),
]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def generate(root: Path, tmp_path: Path, run: Run) -> Run:
    requests = tmp_path / "requests.jsonl"
    requests.write_text("\n".join(REQUESTS) + "\n\n", encoding="utf-8")

    def call(*args: object) -> tuple[int, str, str]:
        return run(
            "generate", root / "model", "--requests", requests, "--images", root,
            "--out", tmp_path / "out.jsonl", "--max-new-tokens", 4, *args,
        )  # fmt: skip

    return call


def test_generate_one_row_out_per_row_in(generate: Run, tmp_path: Path) -> None:
    code, out, _ = generate("--json")
    assert code == 0
    assert json.loads(out) == {"out": str(tmp_path / "out.jsonl"), "rows": 7, "errors": 3}
    rows = rows_of(tmp_path / "out.jsonl")
    names = [row.get("id", row.get("question_id")) for row in rows]
    assert names == ["a", 7, 8, "line 4", 9, 9, "nothing asked"]
    assert ["error" in row for row in rows] == [False, False, True, True, False, False, True]
    assert all(("text" in row) != ("error" in row) for row in rows)
    assert rows[0]["image_tokens"] == 16 and rows[4]["image_tokens"] == 0
    assert rows[1]["prompt"] == "Colour?" and rows[1]["category"] == "c"
    assert rows[4]["text"] == rows[5]["text"]
    assert "broken.png" in rows[2]["error"] and "line 4" in rows[3]["error"]


def test_generate_goes_on_where_it_stopped(
    generate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate()
    out = tmp_path / "out.jsonl"
    whole = out.read_text(encoding="utf-8")
    lines = whole.splitlines(keepends=True)
    # Stopped while writing: rows in the order they came, the last one cut.
    out.write_text(lines[4] + lines[0] + lines[1][:20], encoding="utf-8")
    asked: list[str] = []
    real = Model.generate

    def counted(self: Model, requests: Any, on_result: Any = None) -> Any:
        asked.extend(request.messages[0].text for request in requests)
        return real(self, requests, on_result)

    monkeypatch.setattr(Model, "generate", counted)
    code, _, err = generate()
    assert code == 0 and "2 of 7 rows are answered already" in err
    assert asked == ["\nColour?", "\nColour?", "No image."]
    assert out.read_text(encoding="utf-8") == whole


def test_generate_never_mixes_settings_or_deletes_foreign_rows(
    generate: Run, tmp_path: Path
) -> None:
    generate()
    before = (tmp_path / "out.jsonl").read_bytes()
    code, _, err = generate("--seed", 1)
    assert code == 2 and "holds 4 answers" in err and "--resume never" in err
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert generate("--seed", 1, "--resume", "never")[0] == 0
    assert (tmp_path / "out.jsonl").read_bytes() != before


def test_generate_with_nothing_but_errors_fails(root: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "r.jsonl").write_text("[]\n", encoding="utf-8")
    args = ("--requests", tmp_path / "r.jsonl", "--out", tmp_path / "out.jsonl")
    assert run("generate", root / "model", *args)[0] == 1
    assert "error" in rows_of(tmp_path / "out.jsonl")[0]
    (tmp_path / "r.jsonl").write_text("\n", encoding="utf-8")
    assert run("generate", root / "model", *args)[0] == 2


# --- world, eval, score, run ----------------------------------------------------------------------


def test_a_world_is_made_once(world: Path, tmp_path: Path, run: Run) -> None:
    args = ("world", "make", "--images", 6, "--eval-images", 6)
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*") if path.is_file()}
    assert run(*args, "--out", world)[1] == f"{world}\n"
    assert {path: path.stat().st_mtime_ns for path in before} == before
    code, _, err = run(*args, "--out", world, "--seed", 1)
    assert code == 2 and "holds another synthetic world" in err and "seed=1" in err
    # Someone's own files are left alone; a stopped run is made again.
    (tmp_path / "mine.txt").write_text("data")
    code, _, err = run(*args, "--out", tmp_path)
    assert code == 2 and "is not empty" in err and "world=null" in err
    (tmp_path / "world.unfinished").touch()
    assert run(*args, "--out", tmp_path)[0] == 0
    assert not (tmp_path / "world.unfinished").exists()
    assert (tmp_path / "world.json").read_bytes() == (world / "world.json").read_bytes()


def test_eval_then_score_agree(root: Path, world: Path, tmp_path: Path, run: Run) -> None:
    args = ("eval", root / "model", "--bench", "scienceqa", "--data", world, "--out", tmp_path)
    code, out, _ = run(*args, "--json")
    assert code == 0
    scores = json.loads(out)["benchmarks"]["scienceqa"]
    assert scores == json.loads((tmp_path / "scienceqa" / "scores.json").read_text())
    answers = tmp_path / "scienceqa" / "predictions.jsonl"
    code, out, _ = run("score", "scienceqa", "--data", world, "--answers", answers, "--json")
    again = json.loads(out)
    assert code == 0 and again["metrics"] == scores["metrics"]
    keys = "benchmark metrics n unparsed missing errors interval protocol"
    assert set(keys.split()) <= set(again)
    table = run("score", "scienceqa", "--data", world, "--answers", answers)[1]
    assert table.splitlines()[0].split()[:3] == ["benchmark", "metric", "value"]


def test_a_withheld_score_is_a_failure(world: Path, tmp_path: Path, run: Run) -> None:
    questions = rows_of(world / "pope" / "coco_pope_random.json")
    rows = [{"question_id": questions[0]["question_id"], "text": "yes"}]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code, out, err = run("score", "pope", "--data", world, "--answers", answers)
    assert code == 1 and "withheld" in out and "pope: " in err
    assert json.loads(run("score", "pope", "--data", world, "--answers", answers, "--json")[1])


def recipe_args(root: Path, world: Path, out: Path, *more: str) -> list[str]:
    """A run that takes seconds: tiny backbones, two steps a stage, four questions."""
    return [
        "run", "pocket-quick", "--out", str(out), f"model.vision={root / 'vision'}",
        f"model.language={root / 'language'}", f"data={world}", "world.images=6",
        "world.eval_images=6", "stages.align.steps=2", "stages.tune.steps=2",
        "stages.align.batch_size=2", "stages.tune.batch_size=2", "eval.benchmarks=[scienceqa]",
        "eval.limit=4", *more,
    ]  # fmt: skip


def test_run_a_recipe(root: Path, world: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "run"
    code, stdout, _ = run(*recipe_args(root, world, out), "--json")
    assert code == 0
    summary = json.loads(stdout)
    assert list(summary["stages"]) == ["align", "tune"]
    for name in ("recipe.yaml", "metrics.jsonl", "scores.json", "report.html"):
        assert (out / name).is_file(), name
    scores = json.loads((out / "scores.json").read_text())["benchmarks"]["scienceqa"]
    assert scores["n"] == 4 and scores["shuffled"]["protocol"]["control"] == "shuffled"
    assert scores == summary["benchmarks"]["scienceqa"]
    assert "ScienceQA" in (out / "report.html").read_text(encoding="utf-8")
    trained = (out / "tune" / "model.safetensors").stat().st_mtime_ns
    # The resolved recipe is the same run; nothing is trained again.
    code, stdout, _ = run("run", out / "recipe.yaml", "--out", out)
    assert code == 0 and f"report: {out / 'report.html'}" in stdout
    assert (out / "tune" / "model.safetensors").stat().st_mtime_ns == trained
    code, _, err = run(*recipe_args(root, world, out, "stages.tune.steps=3"))
    assert code == 2 and "stages.tune.steps: 2 there, 3 now" in err and "--resume never" in err
    assert "steps: 3" not in (out / "recipe.yaml").read_text()


def test_run_refuses_before_it_makes_anything(
    root: Path, world: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "run"
    for more, said in (
        ("model.connector=mlpx", "connector 'mlpx'"),
        ("model.template=vicuna", "Did you mean 'vicuna_v1'?"),
        ("model.vision=pocket-visoin", "Did you mean 'pocket-vision'?"),
        ("eval.benchmarks=[popee]", "Did you mean 'pope'?"),
    ):
        code, _, err = run(*recipe_args(root, world, out, more))
        assert code == 2 and said in err
    code, _, err = run(*recipe_args(root, world, out, "stages.align=null"), "--stage", "align")
    assert code == 2 and "has no stage 'align'" in err
    assert not out.exists()
    code, _, err = run(*recipe_args(root, world, out), "--stage", "tune")
    assert code == 2 and "Run the stage 'align' first" in err
    args = recipe_args(root, world, out, "world=null", f"data={tmp_path}")
    code, _, err = run(*args, "--resume", "never")
    assert code == 2 and "pretrain.json" in err
