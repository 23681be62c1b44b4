"""The command line: what it says where, how it fails, and that work once done is kept."""

from __future__ import annotations

import io
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from command_lines import examples, leaves, parse
from pumice.cli.doctor import _NEEDS
from pumice.core.errors import PumiceError

ASK_KEYS = ["text", "finish_reason", "prompt_tokens", "image_tokens", "new_tokens"]
Run = Callable[..., tuple[int, str, str]]


# The whole surface; what is not built yet is no command, rather than a stub.
SURFACE = {
    "run", "launch slurm", "recipes list", "recipes show", "plan", "study", "ask", "chat",
    "generate", "serve", "page", "eval", "score", "submit", "data convert", "data mix",
    "data verify", "data show", "data generate", "convert", "tiles", "world make", "world teacher",
    "world backbones", "doctor",
}  # fmt: skip


def test_every_command_is_of_the_surface() -> None:
    assert {" ".join(words) for words in leaves()} <= SURFACE


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
        (("ask", "{root}/vision", "hello"), "model_type 'clip_vision_model'"),
        (("ask", "{root}/model", "hello", "--image", "{root}/broken.png"), "broken.png"),
        (("ask", "{root}/model", "hello", "--image", "none.png"), "none.png"),
        (("ask", "{root}/model", "hello", "--dtype", "float31"), "Did you mean 'float32'?"),
        (("eval", "pocket", "--bench", "pop", "--data", "x", "--out", "y"), "Did you mean 'pope'?"),
        (("ask", "{root}/model", "hello", "--image", "{root}"), "is a directory, not a file"),
        (("ask", "{root}/model", "hello", "--device", "cuad"), "Did you mean 'cuda'?"),
        (("ask", "{root}/model", " "), "the question is empty"),
        (("eval", "pocket", "--bench", "pope", "--data", "x", "--out", "y"), "x does not exist"),
        (("score", "pope", "--data", "0.png", "--answers", "y"), "0.png is a file"),
        (("eval", "pocket", "--bench", ",", "--data", "x", "--out", "y"), "no benchmark was named"),
        (("score", "pop", "--data", "x", "--answers", "y"), "Did you mean 'pope'?"),
        (("generate", "{root}/model", "--requests", "no.jsonl", "--out", "y"), "no.jsonl"),
        (("generate", "{root}/model", "--requests", ".", "--out", "y"), "Is a directory"),
        # With a model that is not there, so that none of them would serve.
        (("serve", "pockte", "--port", "0", "--api-key", ""), "an empty key"),
        (("serve", "pockte", "--port", "0", "--api-key", " blank"), "blanks around it"),
        (("serve", "pockte", "--port", "0", "--api-key", "clé"), "not ASCII"),
        (("serve", "pockte", "--port", "0", "--image-host", "https://a.b/"), "the name alone"),
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


@pytest.mark.parametrize("words", ["recipes", "recipes show pocket", "doctor --json"])
def test_output_goes_through_a_pipe_that_closes(words: str) -> None:
    command = [sys.executable, "-m", "pumice", *words.split()]
    whole = subprocess.run(command, capture_output=True, text=True, check=False)
    assert whole.stderr == "" and whole.stdout
    piped = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert piped.stdout is not None and piped.stderr is not None
    piped.stdout.close()
    assert piped.stderr.read() == ""
    piped.stderr.close()
    piped.wait(60)


def test_an_unknown_command_or_option(run: Run) -> None:
    assert run("rnu")[0] == 2
    code, out, err = run("ask", "pocket", "hi", "--imag", "x")
    assert (code, out) == (2, "") and "--image" in err


@pytest.mark.parametrize(
    ("line", "told", "meant"),
    [
        ("ask pocket none.jpg 'What is it?' stray", "'What is it?' 'stray'",
         "pumice ask pocket 'What is it? stray' --image none.jpg"),
        ("ask pocket What is it", "takes MODEL TEXT (here MODEL is 'pocket', TEXT is 'What')",
         "pumice ask pocket 'What is it'"),
        ("ask pocket a.png x --json --image a.png --seed 3", "'x': too many",
         "pumice ask pocket x --image a.png --json --image a.png --seed 3"),
        ("chat pocket cat.JPG", "takes MODEL (here", "pumice chat pocket --image cat.JPG"),
        ("serve pocket x", "takes MODEL (here MODEL is 'pocket')", None),
        ("recipes list x y", "'x' 'y': too many arguments; pumice recipes list takes opt", None),
    ],
)  # fmt: skip
def test_too_many_arguments(run: Run, line: str, told: str, meant: str | None) -> None:
    code, out, err = run(*shlex.split(line))
    assert (code, out) == (2, "") and told in err
    if meant is None:
        assert "in quotes" in err and "Did you mean" not in err
    else:
        assert f"Did you mean: {meant}\n" in err
        parse(meant)


@pytest.mark.parametrize("seconds", ["0", "-1", "nan"])
def test_a_server_has_time_to_answer(run: Run, seconds: str) -> None:
    code, _, err = run("serve", "pockte", "--port", "0", "--timeout", seconds)
    assert code == 2 and "--timeout" in err and "0.1" in err


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


def importing(tmp_path: Path, module: str, words: str, ignored: bool = False) -> tuple[int, str]:
    """Exit code and output of a command that is interrupted while it imports a module."""
    # What an import raises seldom comes out as it was.
    (tmp_path / f"{module}.py").write_text("""
import sys, time
print("importing", flush=True)
try:
    time.sleep(2)
except KeyboardInterrupt:
    raise RuntimeError("a fault of the module")
sys.exit(7)
""")
    process = subprocess.Popen(
        [sys.executable, "-m", "pumice", *words.split()], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler
        ),
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=60)
    return process.returncode, told


def test_ctrl_c_while_it_starts(tmp_path: Path) -> None:
    # The command line itself, and what a command needs.
    for module, words in (("typer", "--help"), ("yaml", "recipes")):
        (tmp_path / words).mkdir()
        assert importing(tmp_path / words, module, words) == (130, "")
    assert importing(tmp_path, "typer", "--help", ignored=True) == (7, "")
    # The script that pip writes starts as `python -m pumice` does.
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"pumice": "pumice.__main__:main"}


# --- recipes, ask, chat ---------------------------------------------------------------------------


def test_recipes(run: Run) -> None:
    code, out, _ = run("recipes")
    assert code == 0 and any(line.startswith("pocket ") for line in out.splitlines())
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


def test_chat_with_a_model_until_the_input_ends(
    root: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    code, out, _ = run("chat", root / "model", "--max-new-tokens", 4)
    asked = json.loads(run("ask", root / "model", "hello", "--max-new-tokens", 4, "--json")[1])
    assert code == 0 and out.strip() == asked["text"]
