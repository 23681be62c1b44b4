"""`pumice eval URL`: the answers of the same model here, faults of an endpoint, resuming."""

from __future__ import annotations

import base64
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

import tiny
from eval_files import dump_lines, vqa_files
from pumice.core.errors import PumiceError
from pumice.core.images import open_image
from pumice.core.llm_client import Endpoint, LLMClient
from pumice.core.llm_types import chat_messages
from pumice.core.types import ImagePart, Message, Request, Sampling, TextPart, assistant, user
from pumice.eval.benchmarks import BENCHMARKS
from pumice.eval.prediction_files import PREDICTIONS
from pumice.eval.runner import SCORES, run_benchmark
from pumice.eval.scores import Scores, Served
from pumice.infer import remote, requests
from pumice.infer.model import load
from pumice.infer.remote import RemoteModel, choose_model, padded_square
from pumice.infer.remote_stream import stream_remote
from pumice.processing.images import ImageSpec, preprocess
from pumice.serve.limits import Limits
from serving import Running

Run = Callable[..., tuple[int, str, str]]
VQA = BENCHMARKS["vqav2"]
KEY = "a-key"


# --- beside a model here ------------------------------------------------------------------------


def rows_in(folder: Path) -> list[dict[str, Any]]:
    text = (folder / PREDICTIONS).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_an_endpoint_answers_as_the_model_it_serves(
    world: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    args = ("--bench", "pope,textvqa", "--limit", 16, "--data", world, "--out")
    assert run("eval", "pocket", *args, tmp_path / "here")[0] == 0
    server = Running(load("pocket"), Limits(drain_seconds=1.0), KEY)
    try:
        url = f"{server.url}/v1"
        code, out, err = run("eval", url, *args, tmp_path / "there", "--categories")
    finally:
        server.stop()
    assert code == 0, err
    assert "adversarial" in out
    for bench in ("pope", "textvqa"):
        here, there = (rows_in(tmp_path / name / bench) for name in ("here", "there"))
        assert [(r["id"], r["text"], r["score"]) for r in here] == [
            (r["id"], r["text"], r["score"]) for r in there
        ]
    scores = json.loads((tmp_path / "there" / "pope" / SCORES).read_text())
    assert scores["origin"]["served"] == {
        "url": url, "model": "pocket", "images": "as-is", "extra": {},
    }  # fmt: skip
    assert scores["protocol"]["prompt_template"] == "the server's own"
    assert KEY not in json.dumps(scores)
    assert f"pocket at {url}" in (tmp_path / "there" / "report.html").read_text()
    # All is answered, so nobody needs to be there any more; and the two can be compared.
    code, out, _ = run("eval", "--compare", tmp_path / "here", tmp_path / "there", "--json")
    assert code == 0 and json.loads(out)["benchmarks"]["pope"]["same_text"] == 16


def test_messages_come_back_as_they_were_sent(pictures: Path) -> None:
    first = (pictures / "0.png").read_bytes()
    talks = [
        (user("What?", first), assistant("A cat."), user("\nSure?")),
        (user("\nWhat?", first, first),),
        (Message("user", (TextPart("Before "), ImagePart(first), TextPart("\nafter"))),),
    ]
    for talk in talks:
        assert requests.chat_messages(list(chat_messages(talk)), images_dir=None) == talk


def test_a_square_is_what_llava_pads_to() -> None:
    for size in ((40, 24), (16, 33), (20, 20)):
        picture = tiny.noise(3, size)
        spec = ImageSpec("pad", 16)
        square = padded_square(picture)
        assert square.size == (max(size),) * 2
        assert preprocess(square, spec).equal(preprocess(picture, spec))


# --- faults -------------------------------------------------------------------------------------


class Scripted(ThreadingHTTPServer):
    """An endpoint that answers "red" to all; `plan` says what comes instead, by what is asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.plan: dict[str, list[Any]] = {}
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.always: Any = None
        self.models = ["scripted"]
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Scripted

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"][-1]["text"].split("\n")[0]
        with self.server.lock:
            self.server.asked[text] += 1
            self.server.bodies.append(body)
            steps = self.server.plan.get(text)
            step = steps.pop(0) if steps else self.server.always or "red"
        if isinstance(step, int):
            self._send(step, {"error": {"message": f"scripted {step}"}})
        elif isinstance(step, dict):
            self._send(200, {"choices": [step]})
        else:
            message = {"message": {"content": step}, "finish_reason": "stop"}
            self._send(200, {"choices": [message]})

    def _send(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    server = Scripted()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(10)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = vqa_files(tmp_path / "data")
    for number, file in enumerate(sorted((root / "val2014").iterdir())):
        tiny.noise(number, (16, 10)).save(file, "JPEG")
    return root


def evaluate(url: str, data: Path, out: Path, **more: Any) -> Scores:
    endpoint = Endpoint(url=url, first_wait=0.005, attempts=3, concurrency=4)
    with LLMClient(endpoint) as client:
        images = more.pop("images", "as-is")
        model = RemoteModel(client, choose_model(client, None), images=images)
        served = Served(client.url, model.name, images)
        return run_benchmark(model.generate, VQA, data, out, weights="w", served=served, **more)


def questions(data: Path) -> list[str]:
    return [item.prompt.split("\n")[0] for item in VQA.load(data)]


def test_what_passes_leaves_the_score_and_what_stays_is_an_error(
    scripted: Scripted, data: Path, tmp_path: Path
) -> None:
    whole = evaluate(scripted.url, data, tmp_path / "whole")
    assert whole.metrics is not None and whole.errors == 0
    a, b, c, d, e = questions(data)[:5]
    scripted.plan = {a: [500, 429, "red"], b: [503, "red"]}
    assert evaluate(scripted.url, data, tmp_path / "passing") == whole
    assert scripted.asked[a] == 1 + 3
    scripted.plan = {
        a: [500] * 3,
        b: [400],
        # Cut while it still thought, and withheld: neither is an empty answer.
        c: [{"message": {"content": None}, "finish_reason": "stop"}],
        d: [{"message": {"content": "no"}, "finish_reason": "content_filter"}],
        e: ["\ud83d red"],
    }
    broken = evaluate(scripted.url, data, tmp_path / "broken")
    assert broken.metrics is None and (broken.errors, broken.missing) == (5, 0)
    rows = [row for row in rows_in(tmp_path / "broken") if row["error"]]
    assert [row["score"] for row in rows] == [None] * 5
    assert "scripted 400" in rows[1]["error"] and "half a character" in rows[4]["error"]
    scripted.asked.clear()
    # What was an error is asked again, and nothing else.
    assert evaluate(scripted.url, data, tmp_path / "broken") == whole
    assert scripted.asked == Counter([a, b, c, d, e])
    scripted.plan = {a: [400], b: [{"message": {"content": ""}, "finish_reason": "length"}]}
    allowed = evaluate(scripted.url, data, tmp_path / "allowed", allow_errors=True)
    assert allowed.metrics is not None and (allowed.n, allowed.errors) == (12, 2)


def test_a_model_that_ends_at_once_has_answered(
    scripted: Scripted, data: Path, tmp_path: Path
) -> None:
    scripted.plan = {questions(data)[0]: ["  "], questions(data)[1]: [" red \n"]}
    scores = evaluate(scripted.url, data, tmp_path / "out")
    assert (scores.errors, scores.unparsed) == (0, 1) and scores.metrics is not None
    assert [row["text"] for row in rows_in(tmp_path / "out")[:3]] == ["", "red", "red"]


def test_an_image_that_cannot_be_decoded_is_not_sent(
    scripted: Scripted, data: Path, tmp_path: Path
) -> None:
    file = sorted((data / "val2014").iterdir())[1]
    good = file.read_bytes()
    file.write_bytes(good[: len(good) // 2])
    broken = evaluate(scripted.url, data, tmp_path / "out")
    assert broken.metrics is None and broken.errors == 3 and len(scripted.bodies) == 9
    assert all(file.name in row["error"] for row in rows_in(tmp_path / "out") if row["error"])
    file.write_bytes(good)
    assert evaluate(scripted.url, data, tmp_path / "out").metrics is not None


def test_an_endpoint_that_is_gone_ends_the_run(
    scripted: Scripted, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "GIVE_UP_AFTER", 3)
    whole = evaluate(scripted.url, data, tmp_path / "whole")
    for item in VQA.load(data)[:5]:
        scripted.plan[item.prompt.split("\n")[0]] = ["red"]
    scripted.always = 500
    with pytest.raises(PumiceError, match=r"requests to .* all failed.*scripted 500.*go on"):
        evaluate(scripted.url, data, tmp_path / "out", allow_errors=True)
    left = json.loads((tmp_path / "out" / SCORES).read_text())
    assert left["metrics"] is None and "has not finished" in left["notes"][0]
    scripted.always = None
    scripted.asked.clear()
    assert evaluate(scripted.url, data, tmp_path / "out") == whole
    assert scripted.asked.total() == 7
    # Another name, another form of pictures: other answers.
    assert evaluate(scripted.url, data, tmp_path / "out", images="square") != whole
    assert scripted.asked.total() == 7 + 12


def test_pictures_are_sent_as_the_files_are_or_as_squares(
    scripted: Scripted, data: Path, tmp_path: Path
) -> None:
    evaluate(scripted.url, data, tmp_path / "a")
    evaluate(scripted.url, data, tmp_path / "b", images="square")
    sent = []
    for body in scripted.bodies:
        image, text = body["messages"][0]["content"]
        assert (body["temperature"], body["max_tokens"]) == (0.0, 128)
        assert text["text"] in [item.prompt for item in VQA.load(data)]
        sent.append(base64.b64decode(image["image_url"]["url"].partition(",")[2]))
    files = [file.read_bytes() for file in (data / "val2014").iterdir()]
    assert Counter(sent[:12]) == Counter(files * 3)
    squares = [open_image(picture) for picture in sent[12:]]
    assert {picture.size for picture in squares} == {(16, 16)}
    assert {picture.getpixel((0, 0)) for picture in squares} == {(122, 116, 104)}
    assert isinstance(squares[0], PIL.Image.Image)


def test_keys_beside_the_usual_ones_are_sent_and_told(
    scripted: Scripted, data: Path, tmp_path: Path, run: Run
) -> None:
    args = ("eval", scripted.url, "--bench", "vqav2", "--data", data, "--out", tmp_path / "out")
    extra = ("max_tokens=null", "max_completion_tokens=64", 'reasoning_effort="low"')
    flags = [part for entry in extra for part in ("--api-extra", entry)]
    assert run(*args, *flags)[0] == 0
    body = scripted.bodies[0]
    assert "max_tokens" not in body and body["max_completion_tokens"] == 64
    scores = json.loads((tmp_path / "out" / "vqav2" / SCORES).read_text())
    told = {"max_tokens": None, "max_completion_tokens": 64, "reasoning_effort": "low"}
    assert scores["protocol"]["request_extra"] == told == scores["origin"]["served"]["extra"]
    assert len(scripted.bodies) == 12 and run(*args, *flags)[0] == 0
    assert len(scripted.bodies) == 12 and run(*args)[0] == 0
    assert len(scripted.bodies) == 24


def test_another_model_of_the_endpoint_is_asked_anew(
    scripted: Scripted, data: Path, tmp_path: Path, run: Run
) -> None:
    args = ("eval", scripted.url, "--bench", "vqav2", "--data", data, "--out", tmp_path / "out")
    assert run(*args)[0] == 0
    scripted.models.append("another")
    code, _, err = run(*args)
    assert code == 2 and "serves scripted, another, and none was named" in err
    assert run(*args, "--api-model", "scripted")[0] == 0 and len(scripted.bodies) == 12
    assert run(*args, "--api-model", "another")[0] == 0 and len(scripted.bodies) == 24
    assert [body["model"] for body in scripted.bodies[::12]] == ["scripted", "another"]


def test_one_question_to_an_endpoint(scripted: Scripted, pictures: Path, run: Run) -> None:
    args = ("ask", scripted.url, "What?", "--image", pictures / "0.png", "--temperature", 0.5)
    code, out, _ = run(*args, "--seed", 3, "--top-p", 0.9, "--json")
    assert code == 0 and json.loads(out) == {
        "text": "red", "finish_reason": "stop", "prompt_tokens": 0, "image_tokens": None,
        "new_tokens": 0,
    }  # fmt: skip
    [body] = scripted.bodies
    assert {name: body.get(name) for name in ("model", "temperature", "top_p", "seed")} == {
        "model": "scripted", "temperature": 0.5, "top_p": 0.9, "seed": 3,
    }  # fmt: skip
    scripted.always = 400
    code, _, err = run(*args)
    assert code == 2 and "scripted 400" in err


def test_an_endpoint_that_answers_off_the_list_is_told_on(
    scripted: Scripted, pictures: Path, run: Run
) -> None:
    args = ("ask", scripted.url, "What?", "--image", pictures / "0.png", "--choice")
    code, out, _ = run(*args, "red", "--choice", "blue")
    assert (code, out) == (0, "red\n")
    assert scripted.bodies[0]["structured_outputs"] == {"choice": ["red", "blue"]}
    code, out, err = run(*args, "blue", "--choice", "green")
    assert (code, out) == (2, "") and "'red' is none of the 2 choices" in err


def test_a_stream_is_asked_as_a_question_is(scripted: Scripted, pictures: Path) -> None:
    chosen = Sampling(temperature=0.5, top_k=3, top_p=0.9, seed=2, stop=("end",), max_new_tokens=7)
    request = Request((user("What?", pictures / "0.png"),), chosen)
    with LLMClient(Endpoint(url=scripted.url)) as client:
        model = RemoteModel(client, "scripted", images="square", extra={"min_p": 0.1})
        assert model.ask(request).text == "red"
        # This endpoint does not stream, which is said; what it was sent is all that counts here.
        with pytest.raises(PumiceError, match="broke off"):
            list(stream_remote(model, request))
    plain, streamed = scripted.bodies
    assert {plain[key] for key in ("top_k", "min_p", "max_tokens")} == {3, 0.1, 7}
    assert streamed == plain | {"stream": True, "stream_options": {"include_usage": True}}


def test_requests_of_a_file_to_an_endpoint(
    scripted: Scripted, pictures: Path, tmp_path: Path, run: Run
) -> None:
    rows = [{"question_id": n, "image": f"{n}.png", "text": f"What {n}?"} for n in range(3)]
    dump_lines(tmp_path / "questions.jsonl", [*rows, {"question_id": 3, "image": "x.png",
                                                      "text": "What?"}])  # fmt: skip
    out = tmp_path / "answers.jsonl"
    args = ("generate", scripted.url, "--requests", tmp_path / "questions.jsonl",
            "--images", pictures, "--out", out, "--json")  # fmt: skip
    scripted.plan = {"What 1?": [400]}
    code, said, _ = run(*args)
    assert code == 0 and json.loads(said) == {"out": str(out), "rows": 4, "errors": 2}
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row.get("text") for row in answers] == ["red", None, "red", None]
    assert "scripted 400" in answers[1]["error"] and "x.png" in answers[3]["error"]
    assert json.loads(run(*args)[1])["errors"] == 1
    assert scripted.asked == {"What 0?": 1, "What 1?": 2, "What 2?": 1}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("http://127.0.0.1:9/v1",), "cannot be reached"),
        (("http://127.0.0.1:9/v1", "--quantize", "int8"), "--quantize belongs to a model that is"),
        (("pocket", "--api-model", "x"), "--api-model belongs to a MODEL that is an address"),
        (("{url}", "--api-model", "script"), "Did you mean 'scripted'"),
        (("{url}", "--api-extra", "stop=end"), "is not NAME=JSON"),
        (("{url}", "--api-extra", "n=2"), "n of a request cannot be set"),
        (("pocket", "--api-extra", "top_k=1"), "--api-extra belongs to an address"),
    ],
)
def test_what_does_not_fit_is_said(
    scripted: Scripted, data: Path, tmp_path: Path, run: Run, args: tuple[str, ...], words: str
) -> None:
    given = [arg.replace("{url}", scripted.url) for arg in args]
    code, _, err = run("eval", *given, "--bench", "vqav2", "--data", data, "--out", tmp_path / "o")
    assert code == 2 and words in " ".join(err.split())
