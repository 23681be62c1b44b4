"""The page in a real browser: drop an image, ask, read the stream, stop, be told of errors."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright import sync_api

import tiny
from pumice.core.llm_client import Endpoint
from pumice.infer.model import Model, load
from pumice.models.tiling import TilingSpec
from pumice.serve.forward import Forwarder
from pumice.serve.limits import Limits
from pumice.world.scenes import random_scene, render
from serving import Listening, Running

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="the page needs a browser: install chromium (Debian: apt install chromium)",
)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update",
             "--disable-sync"]  # fmt: skip
PATIENCE = 30_000


@pytest.fixture(scope="module")
def model() -> Model:
    return load("pocket", max_batch=4)


@pytest.fixture(scope="module")
def running(model: Model) -> Iterator[Running]:
    server = Running(model, Limits(drain_seconds=1.0))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: sync_api.Browser, running: Running) -> Iterator[sync_api.Page]:
    """An opened page; whatever its console complains of fails the test."""
    with opened(browser, running) as page:
        yield page


@contextmanager
def opened(browser: sync_api.Browser, running: Listening) -> Iterator[sync_api.Page]:
    context = browser.new_context(
        viewport={"width": 900, "height": 800}, permissions=["clipboard-read", "clipboard-write"]
    )
    page = context.new_page()
    complaints: list[str] = []
    elsewhere: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda r: elsewhere.append(r.url)
            if not r.url.startswith((running.url, "data:", "blob:")) else None)  # fmt: skip
    page.goto(running.url)
    sync_api.expect(page.locator("#model")).to_have_text("pocket")
    yield page
    context.close()
    assert not complaints and not elsewhere


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    render(random_scene(1)).save(path)
    return path


def drop(page: sync_api.Page, data: bytes, name: str, kind: str) -> None:
    """Drops a file on the page as a person does."""
    handle = transfer(page, data, name, kind)
    page.dispatch_event("body", "dragover", {"dataTransfer": handle})
    page.dispatch_event("body", "drop", {"dataTransfer": handle})


def transfer(page: sync_api.Page, data: bytes, name: str, kind: str) -> sync_api.JSHandle:
    """What a browser holds of a file on its way."""
    return page.evaluate_handle(
        """([data, name, type]) => {
          const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
          const transfer = new DataTransfer();
          transfer.items.add(new File([bytes], name, { type }));
          return transfer;
        }""",
        [base64.b64encode(data).decode(), name, kind],
    )


def ask(page: sync_api.Page, text: str) -> None:
    page.fill("#text", text)
    page.keyboard.press("Enter")


def test_drop_an_image_ask_and_ask_again(
    page: sync_api.Page, scene: Path, model: Model, running: Running
) -> None:
    expect = sync_api.expect
    drop(page, scene.read_bytes(), "scene.png", "image/png")
    expect(page.locator("#shown figcaption")).to_have_text("192 × 192: 36 image tokens")
    ask(page, "What do you see in the image?")
    answers = page.locator(".assistant")
    expect(answers.locator(".quiet")).to_contain_text("36 image", timeout=PATIENCE)
    wanted = model.ask("What do you see in the image?", images=[scene]).text
    expect(answers.first).to_contain_text(wanted)
    expect(page.locator("#shown figure")).to_have_count(0)
    page.locator("label", has_text="Short answer").click()
    ask(page, "What color is the background?")
    expect(answers.locator(".quiet")).to_have_count(2, timeout=PATIENCE)
    expect(page.locator(".user").last).to_contain_text("using a single word or phrase")
    expect(answers.last.locator(".quiet")).to_contain_text("cached")
    page.click("#reset")
    expect(page.locator(".turn")).to_have_count(0)
    page.reload()
    expect(page.locator("#model")).to_have_text("pocket")


def test_stop_ends_the_answer_and_frees_the_server(page: sync_api.Page, running: Running) -> None:
    online = running.server.online
    step, before = online._scheduler.step, online.counters().cancelled
    online._scheduler.step = lambda: (time.sleep(0.2), step())[1]  # type: ignore[method-assign]
    try:
        ask(page, "Describe the image in detail.")
        sync_api.expect(page.locator("#stop")).to_be_visible()
        while not online.counters().running:
            page.wait_for_timeout(20)
        page.keyboard.press("Escape")
        sync_api.expect(page.locator("#send")).to_be_visible()
        until = time.monotonic() + 20
        while online.counters().cancelled == before:
            assert time.monotonic() < until
            page.wait_for_timeout(20)
    finally:
        online._scheduler.step = step  # type: ignore[method-assign]


def test_a_new_talk_knows_nothing_of_an_answer_on_its_way(
    page: sync_api.Page, running: Running, scene: Path
) -> None:
    expect, online = sync_api.expect, running.server.online
    step = online._scheduler.step
    online._scheduler.step = lambda: (time.sleep(0.2), step())[1]  # type: ignore[method-assign]
    try:
        drop(page, scene.read_bytes(), "scene.png", "image/png")
        expect(page.locator("#shown figure")).to_have_count(1)
        ask(page, "Describe the image in detail.")
        expect(page.locator(".assistant")).to_contain_text("The", timeout=PATIENCE)
        page.click("#reset")
        expect(page.locator("#send")).to_be_visible()
        expect(page.locator("#text")).to_have_value("")
        expect(page.locator("#shown figure")).to_have_count(0)
        with page.expect_request("**/v1/chat/completions") as sent:
            ask(page, "What is red?")
        assert len(sent.value.post_data_json["messages"]) == 1
        expect(page.locator(".assistant")).to_have_count(1)
        # What is written meanwhile is not lost to a question that got no answer.
        page.fill("#text", "And what is blue?")
        page.keyboard.press("Escape")
        expect(page.locator("#send")).to_be_visible()
        expect(page.locator("#text")).to_have_value("And what is blue?")
    finally:
        online._scheduler.step = step  # type: ignore[method-assign]


def test_the_longest_answer_is_the_servers_however_short(
    browser: sync_api.Browser, model: Model
) -> None:
    short = Running(model, Limits(max_new_tokens=5, drain_seconds=1.0))
    try:
        with opened(browser, short) as page:
            ask(page, "What is red?")
            answer = page.locator(".assistant .quiet")
            sync_api.expect(answer).to_contain_text("tokens", timeout=PATIENCE)
            page.click("summary")
            page.fill("#key", "clé")
            ask(page, "And blue?")
            refused = page.locator(".assistant.error")
            sync_api.expect(refused).to_contain_text("the API key has a sign")
    finally:
        short.stop()


def test_errors_are_shown_and_the_question_stays(page: sync_api.Page) -> None:
    expect = sync_api.expect
    drop(page, b"no image at all", "notes.txt", "text/plain")
    expect(page.locator(".error")).to_contain_text("notes.txt is no image")
    long = "why " * 3000
    page.fill("#text", long)
    page.click("#send")
    expect(page.locator(".assistant.error")).to_contain_text("positions", timeout=PATIENCE)
    expect(page.locator("#text")).to_have_value(long.strip())


def test_what_no_server_takes_is_told_when_it_is_given(
    page: sync_api.Page, scene: Path, tmp_path: Path
) -> None:
    expect = sync_api.expect
    errors, data = page.locator(".turn.error"), scene.read_bytes()
    drop(page, b"no image at all", "notes.png", "image/png")
    expect(errors.last).to_contain_text("notes.png cannot be decoded by the browser")
    # A browser draws both of these.
    drawing = b"<svg xmlns='http://www.w3.org/2000/svg' width='90' height='90'/>"
    drop(page, drawing, "logo.svg", "image/svg+xml")
    expect(errors.last).to_contain_text("logo.svg is an SVG drawing")
    page.evaluate(
        "(data) => document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data}))",
        transfer(page, data[: len(data) * 2 // 3], "half.png", "image/png"),
    )
    expect(errors.last).to_contain_text("half.png cannot be decoded by the browser: it is cut")
    photo = io.BytesIO()
    render(random_scene(1)).save(photo, "JPEG")
    half = tmp_path / "half.jpg"
    half.write_bytes(photo.getvalue()[:-500])
    page.set_input_files("#file", [half, scene])
    expect(page.locator("#shown figure")).to_have_count(1)
    expect(errors).to_have_count(4)
    expect(errors.last).to_contain_text("half.jpg cannot be decoded")


def test_images_chosen_and_pasted_and_taken_away(page: sync_api.Page, scene: Path) -> None:
    expect = sync_api.expect
    page.set_input_files("#file", [scene, scene])
    expect(page.locator("#shown figure")).to_have_count(2)
    page.evaluate(
        "(data) => document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data}))",
        transfer(page, scene.read_bytes(), "", "image/png"),
    )
    expect(page.locator("#shown figure")).to_have_count(3)
    page.get_by_role("button", name="Take the image away").first.click()
    expect(page.locator("#shown figure")).to_have_count(2)
    page.get_by_role("button", name="Image", exact=True).focus()
    page.get_by_role("button", name="Ask", exact=True).click()  # without a question
    expect(page.locator("#text")).to_be_focused()
    expect(page.locator(".turn")).to_have_count(0)
    ask(page, "What do you see in the images?")
    expect(page.locator(".assistant .quiet")).to_contain_text("72 image", timeout=PATIENCE)


@pytest.mark.parametrize("temperature", ["0", "1.2"])
def test_what_is_copied_runs(page: sync_api.Page, scene: Path, temperature: str) -> None:
    expect = sync_api.expect
    page.click("summary")
    page.fill("#temperature", temperature)
    if temperature != "0":  # as a page has it that came over plain http from another machine
        page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(); }")
    drop(page, scene.read_bytes(), "scene.png", "image/png")
    page.locator("label", has_text="Short answer").click()
    ask(page, "What's the background's color?")
    expect(page.locator(".assistant .quiet")).to_have_count(1, timeout=PATIENCE)
    answer = page.evaluate("document.querySelector('.assistant').firstChild.data")
    said = {}
    for button, program in (("#curl", "bash"), ("#python", sys.executable)):
        page.click(button)
        expect(page.locator("#copied")).to_have_text("copied")
        text = page.evaluate("navigator.clipboard.readText()")
        # A new process, as for whoever pastes it; a proxy of the machine is no part of it.
        alone = {**os.environ, "no_proxy": "*"}
        done = subprocess.run([program], input=text, text=True, capture_output=True, env=alone)
        said[button] = done.stdout
    if shutil.which("curl"):
        told = json.loads(said["#curl"])["choices"][0]["message"]["content"]
        assert told == answer
    assert said["#python"].strip() == answer.strip()


def test_everything_by_keyboard(page: sync_api.Page) -> None:
    expect = sync_api.expect
    expect(page.locator("#text")).to_be_focused()
    for _ in range(2):
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Tab")
    expect(page.locator("#choose")).to_be_focused()
    page.evaluate("""() => {
      document.getElementById("file").onclick = (event) => {
        event.preventDefault();  // the browser's own dialogue is no part of the page
        document.title = "choosing";
      };
    }""")
    page.keyboard.press("Enter")
    expect(page).to_have_title("choosing")
    page.locator("#text").focus()
    page.keyboard.type("What is")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("this?")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    page.keyboard.press("Tab")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Tab")
    page.keyboard.press("Home")
    expect(page.locator("#length-shown")).to_have_text("16")
    with page.expect_request("**/v1/chat/completions") as sent:
        page.locator("#text").press("Enter")
    body = sent.value.post_data_json
    assert body["max_tokens"] == 16 and body["temperature"] == 0.3 and body["seed"] >= 0
    [part] = body["messages"][0]["content"]
    assert part["text"] == "What is\nthis?\nAnswer the question using a single word or phrase."
    expect(page.locator(".assistant .quiet")).to_have_count(1, timeout=PATIENCE)


def test_a_lost_server_is_told(page: sync_api.Page, scene: Path) -> None:
    expect = sync_api.expect
    half = 'data: {"choices": [{"index": 0, "delta": {"content": "A mo"}}]}\n\n'
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=half))
    ask(page, "What is this?")
    expect(page.locator(".assistant.error")).to_contain_text("A mo\nthe answer broke off")
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.click("#send")
    expect(page.locator(".assistant.error").last).to_have_text("the server cannot be reached")
    expect(page.locator("#text")).to_have_value("What is this?")
    page.route("**/page/image-plan*", lambda route: route.abort())
    drop(page, scene.read_bytes(), "scene.png", "image/png")
    expect(page.locator("#shown figcaption")).to_have_text("192 × 192")


def test_the_page_before_an_endpoint(
    browser: sync_api.Browser, running: Running, scene: Path, model: Model
) -> None:
    expect = sync_api.expect
    online = running.server.online
    endpoint = Endpoint(url=f"{running.url}/v1")
    listening = Listening(Forwarder(endpoint, "pocket", limits=Limits(max_new_tokens=64)))
    try:
        with opened(browser, listening) as page:
            drop(page, scene.read_bytes(), "scene.png", "image/png")
            expect(page.locator("#shown figcaption")).to_have_text("192 × 192")
            expect(page.locator("#length")).to_have_attribute("max", "64")
            ask(page, "What do you see in the image?")
            expect(page.locator(".assistant .quiet")).to_contain_text("36 image", timeout=PATIENCE)
            wanted = model.ask("What do you see in the image?", images=[scene], max_new_tokens=64)
            expect(page.locator(".assistant")).to_contain_text(wanted.text)
            step, before = online._scheduler.step, online.counters().cancelled
            online._scheduler.step = lambda: (time.sleep(0.2), step())[1]  # type: ignore[method-assign]
            try:
                ask(page, "Describe the image in detail.")
                while not online.counters().running:
                    page.wait_for_timeout(20)
                page.click("#stop")
                until = time.monotonic() + 20
                while online.counters().cancelled == before:
                    assert time.monotonic() < until
                    page.wait_for_timeout(20)
            finally:
                online._scheduler.step = step  # type: ignore[method-assign]
    finally:
        listening.stop()


def test_a_stream_of_another_kind_of_server(page: sync_api.Page) -> None:
    said = [
        ": ping",
        'data: {"choices": [{"delta": {"role": "assistant"}}]}',
        'data:{"choices": [{"delta": {"content": "Yes"}, "finish_reason": null}]}',
        'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}',
        "data: [DONE]",
    ]
    page.route("**/v1/chat/completions", lambda r: r.fulfill(body="\r\n\r\n".join(said) + "\r\n"))
    ask(page, "What is this?")
    sync_api.expect(page.locator(".assistant .quiet")).to_have_count(1, timeout=PATIENCE)
    sync_api.expect(page.locator(".assistant")).to_contain_text("Yes")


def test_the_tiles_of_an_image_are_drawn(browser: sync_api.Browser, folders: Any) -> None:
    tiling = TilingSpec("hd", tiny.IMAGE_SIZE, max_tiles=6)
    lmm = tiny.new_lmm(folders.vision, folders.language, tiling=tiling)
    processor = tiny.processor_for(lmm, folders.language, tiling=tiling)
    server = Running(Model(lmm, processor), Limits(max_new_tokens=8, drain_seconds=1.0))
    picture = io.BytesIO()
    tiny.smooth(90, 60).save(picture, "PNG")
    try:
        with opened(browser, server) as page:
            drop(page, picture.getvalue(), "wide.png", "image/png")
            caption = page.locator("#shown figcaption")
            sync_api.expect(caption).to_contain_text("90 × 60: 3 × 2 tiles")
            plan = processor.plan((90, 60))
            assert plan is not None
            sync_api.expect(caption).to_contain_text(f"{plan.tokens.total} image tokens")
            # On the line between two tiles stands the colour of lines, within a tile it does not.
            colours = page.evaluate("""() => {
              const canvas = document.querySelector('#shown canvas');
              const draw = canvas.getContext('2d');
              const at = (x, y) => [...draw.getImageData(x, y, 1, 1).data];
              const line = Math.round(canvas.width / 3);
              return [at(line, canvas.height / 4), at(canvas.width / 6, canvas.height / 4)];
            }""")
            assert colours[0][:3] == [240, 145, 107] and colours[1][:3] != [240, 145, 107]
            # Nor are lines lost where it is shown smaller.
            shrunk = page.evaluate("""() => {
              const canvas = document.querySelector('#shown canvas');
              return canvas.width / canvas.getBoundingClientRect().width;
            }""")
            assert shrunk <= 2.5
    finally:
        server.stop()


def test_a_phone_shows_everything(page: sync_api.Page) -> None:
    page.set_viewport_size({"width": 375, "height": 667})
    page.click("summary")
    for name in ("#choose", "#text", "#send", "#temperature", "#curl", "#reset"):
        sync_api.expect(page.locator(name)).to_be_in_viewport()
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 375


CHAT = "**/v1/chat/completions"


def piece(text: str, **more: Any) -> str:
    """One event of a stream."""
    return f"data: {json.dumps({'choices': [{'delta': {'content': text}, **more}]})}\n\n"


LAST = piece("", finish_reason="stop")
END = f"{LAST}data: [DONE]\n\n"
HELD = "half of it, "
PLAIN, JSON, PAGE = "text/plain", "application/json", "text/html"
# What a server sends, and what is told of it: status, kind, body, texts.
SENT = {
    "ends without [DONE]": (200, PLAIN, f"{piece('All of it.')}{LAST}", "All of it."),
    "ends without a line's end": (200, PLAIN, f"{piece('All.')}data: [DONE]", "All."),
    "cut": (200, PLAIN, piece(HELD), f"{HELD}the answer broke off"),
    "cut in a line": (200, PLAIN, f"{piece(HELD)}data: {{'cho", f"{HELD}the answer broke off"),
    "no JSON in it": (200, PLAIN, f"{piece(HELD)}data: {{oh\n\n{END}", "is no JSON: {oh"),
    "not streamed": (
        200,
        JSON,
        json.dumps({"choices": [{"message": {"content": "Whole."}, "finish_reason": "stop"}]}),
        "Whole.",
    ),
    "an error with 200": (200, JSON, '{"error": {"message": "not today"}}', "not today"),
    "an error in it": (200, PLAIN, 'data: {"error": "all gone"}\n\n', "all gone"),
    "a page": (200, PAGE, "<title>Log in</title>", "no answer but a page: Log in"),
    "a proxy": (502, PAGE, "<title>Bad gate</title><hr>", "HTTP 502: Bad gate"),
    "a text": (500, PLAIN, "out of memory", "HTTP 500: out of memory"),
    "nothing": (500, PLAIN, "", "the server answered with HTTP 500"),
    "a word": (400, JSON, '{"error": "no such model"}', "no such model"),
    "a list": (422, JSON, '{"detail": [{"msg": "field required"}]}', "field required"),
    "too many": (429, JSON, '{"error": {"message": "Slow down"}}', "Slow down (try again in 17 s)"),
    "filtered": (200, PLAIN, piece("I", finish_reason="content_filter"), "by a content filter"),
    "thoughts": (
        200,
        PLAIN,
        f'data: {{"choices": [{{"delta": {{"reasoning_content": "Hm"}}}}]}}\n\n{END}',
        "(no answer, only thoughts before one)",
    ),
}


def test_whatever_a_server_sends_is_told(page: sync_api.Page) -> None:
    for name, (status, kind, body, told) in SENT.items():
        headers = {"Content-Type": kind, **({"Retry-After": "17"} if status == 429 else {})}
        answer = {"status": status, "body": body, "headers": headers}
        page.route(CHAT, lambda route, _, answer=answer: route.fulfill(**answer))
        page.click("#reset")
        ask(page, name)
        bubble = page.locator(".assistant")
        sync_api.expect(bubble, name).to_contain_text(told)
        failed = "error" in (bubble.get_attribute("class") or "")
        assert failed == (bubble.locator(".failed").count() == 1), name
        assert bubble.locator(".quiet").count() == (not failed), name
        page.unroute(CHAT)


def test_a_long_answer_does_not_hold_up_the_page(page: sync_api.Page) -> None:
    body = "".join(piece(f"word{number} ") for number in range(20_000)) + END
    page.route(CHAT, lambda route: route.fulfill(body=body))
    ask(page, "Go on and on.")
    sync_api.expect(page.locator(".assistant .quiet")).to_have_count(1, timeout=PATIENCE)
    said = page.evaluate("document.querySelector('.assistant').firstChild.data")
    assert said == "".join(f"word{number} " for number in range(20_000))


def test_who_goes_up_to_read_is_left_there(page: sync_api.Page) -> None:
    held: list[sync_api.Route] = []
    page.route(CHAT, lambda route: held.append(route))
    body = "".join(piece(f"line {number}\n") for number in range(100)) + END
    talk = "document.getElementById('talk')"
    at = f"{talk}.scrollTop"
    below = f"{talk}.scrollHeight - {at} - {talk}.clientHeight"
    for number in (1, 2, 3):
        ask(page, f"Question {number}")
        page.wait_for_function("() => !document.getElementById('stop').hidden")
        while len(held) < number:
            page.wait_for_timeout(20)
        if number == 2:
            page.locator("#talk").hover()
            page.mouse.wheel(0, -900)
            page.wait_for_function(f"() => {below} > 500")
            page.wait_for_timeout(300)
        before = page.evaluate(at)
        held[number - 1].fulfill(body=body)
        sync_api.expect(page.locator(".assistant .quiet")).to_have_count(number)
        page.click("summary")  # makes the talk smaller
        page.wait_for_timeout(100)
        if number == 2:
            assert page.evaluate(at) == before
        else:
            assert page.evaluate(below) < 2


def test_a_question_does_not_go_before_its_image(page: sync_api.Page, scene: Path) -> None:
    page.route(CHAT, lambda route: route.fulfill(body=piece("Yes.") + END))
    page.evaluate("""() => {
      const decode = createImageBitmap;
      window.createImageBitmap = async (file) => {
        await new Promise((done) => setTimeout(done, 500));  // as a large one takes
        return decode(file);
      };
    }""")
    drop(page, scene.read_bytes(), "scene.png", "image/png")
    with page.expect_request(CHAT) as sent:
        ask(page, "What is this?")
    kinds = [part["type"] for part in sent.value.post_data_json["messages"][0]["content"]]
    assert kinds == ["image_url", "text"]
    sync_api.expect(page.locator(".assistant .quiet")).to_have_count(1)
    # One that cannot be used is told, and the question stays.
    drop(page, b"no image", "notes.png", "image/png")
    ask(page, "And this?")
    sync_api.expect(page.locator(".turn.error")).to_contain_text("notes.png cannot be decoded")
    page.wait_for_timeout(200)
    assert page.locator(".user").count() == 1
    sync_api.expect(page.locator("#text")).to_have_value("And this?")


def test_the_keyboard_stays_where_it_is_used(page: sync_api.Page, scene: Path) -> None:
    expect = sync_api.expect
    held: list[sync_api.Route] = []
    page.route(CHAT, lambda route: held.append(route))

    def answered(number: int) -> None:
        while len(held) < number:
            page.wait_for_timeout(20)
        expect(page.locator("#talk")).to_have_attribute("aria-busy", "true")
        held[number - 1].fulfill(body=piece("Yes.") + END)
        expect(page.locator(".assistant .quiet")).to_have_count(number)
        expect(page.locator("#talk")).to_have_attribute("aria-busy", "false")

    page.fill("#text", "What is this?")
    page.locator("#send").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#stop")).to_be_focused()
    answered(1)
    expect(page.locator("#text")).to_be_focused()
    page.click("summary")
    ask(page, "And this?")
    page.get_by_role("slider", name="Temperature").focus()
    answered(2)
    expect(page.locator("#temperature")).to_be_focused()
    page.fill("#text", "And that?")
    page.dblclick("#send")  # the second click is not meant for what is there by then
    answered(3)
    page.set_input_files("#file", [scene, scene])
    page.get_by_role("button", name="Take the image away").first.press("Enter")
    expect(page.get_by_role("button", name="Take the image away")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#choose")).to_be_focused()
    assert page.get_by_role("slider", name="Longest answer").count() == 1


def test_text_that_is_dragged_or_pasted_is_text(page: sync_api.Page) -> None:
    taken = page.evaluate("""() => {
      const box = document.getElementById("text");
      const sent = (event) => !box.dispatchEvent(event) || !document.getElementById("drop").hidden;
      const all = { bubbles: true, cancelable: true };
      const text = new DataTransfer();
      text.setData("text/plain", "why");
      const sheet = new DataTransfer();
      sheet.setData("text/plain", "1 2");
      sheet.setData("text/html", "<td>1<td>2");
      sheet.items.add(new File(["x"], "image.png", { type: "image/png" }));
      return [
        sent(new DragEvent("dragover", { ...all, dataTransfer: text })),
        sent(new DragEvent("drop", { ...all, dataTransfer: text })),
        sent(new ClipboardEvent("paste", { ...all, clipboardData: sheet })),
      ];
    }""")
    assert taken == [False, False, False]


def test_many_images_leave_the_box_in_sight(page: sync_api.Page, scene: Path) -> None:
    tall = scene.with_name("tall.png")
    render(random_scene(2)).resize((40, 400)).save(tall)
    page.set_input_files("#file", [scene, tall] * 8)
    sync_api.expect(page.locator("#shown figure")).to_have_count(16)
    for width, height in ((900, 800), (640, 360), (360, 640)):
        page.set_viewport_size({"width": width, "height": height})
        assert page.evaluate("document.documentElement.scrollHeight") <= height
        sync_api.expect(page.locator("#text")).to_be_in_viewport(ratio=1)


def test_the_chosen_format_is_seen_in_the_colours_of_a_person_s_own(page: sync_api.Page) -> None:
    page.emulate_media(forced_colors="active")
    grounds = page.eval_on_selector_all(
        ".chips span", "all => all.map((one) => getComputedStyle(one).backgroundColor)"
    )
    assert grounds[0] not in grounds[1:]


def test_lines_run_in_the_direction_of_their_script(page: sync_api.Page) -> None:
    page.route(CHAT, lambda route: route.fulfill(body=piece("שלום (cat).\nYes.") + END))
    ask(page, "Say hello.")
    sync_api.expect(page.locator(".assistant .quiet")).to_have_count(1)
    lines = page.evaluate("""() => {
      const bubble = document.querySelector(".assistant");
      const range = document.createRange();
      range.selectNodeContents(bubble.firstChild);
      const { left, width } = bubble.getBoundingClientRect();
      const lines = [...range.getClientRects()].filter((one) => one.width);
      return lines.map((one) => (one.left - left) / width);
    }""")
    assert min(lines[:-1]) > 0.5 and lines[-1] < 0.1


def test_a_key_that_is_asked_for_is_typed_on_the_page(
    browser: sync_api.Browser, model: Model
) -> None:
    expect = sync_api.expect
    locked = Running(model, Limits(max_new_tokens=16, drain_seconds=1.0), "a-key")
    try:
        with opened(browser, locked) as page:
            ask(page, "What is red?")
            expect(page.locator(".failed")).to_contain_text("Give the key under Settings.")
            page.fill("#key", "a-key")
            page.locator("#key").press("Enter")
            expect(page.locator(".assistant .quiet")).to_have_count(1, timeout=PATIENCE)
    finally:
        locked.stop()
