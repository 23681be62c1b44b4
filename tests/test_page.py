"""The page in a real browser: drop an image, ask, read the stream, stop, be told of errors."""

from __future__ import annotations

import base64
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pumice.infer.model import Model, load
from pumice.serve.limits import Limits
from pumice.world.scenes import random_scene, render
from serving import Running

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
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
    context = browser.new_context(viewport={"width": 900, "height": 800})
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
    handle = page.evaluate_handle(
        """([data, name, type]) => {
          const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
          const transfer = new DataTransfer();
          transfer.items.add(new File([bytes], name, { type }));
          return transfer;
        }""",
        [base64.b64encode(data).decode(), name, kind],
    )
    page.dispatch_event("body", "dragover", {"dataTransfer": handle})
    page.dispatch_event("body", "drop", {"dataTransfer": handle})


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
    expect(answers.locator(".quiet")).to_contain_text("36 of them image", timeout=PATIENCE)
    wanted = model.ask("What do you see in the image?", images=[scene]).text
    expect(answers.first).to_contain_text(wanted)
    expect(page.locator("#shown figure")).to_have_count(0)
    page.locator("label", has_text="Short answer").click()
    ask(page, "What color is the background?")
    expect(answers.locator(".quiet")).to_have_count(2, timeout=PATIENCE)
    expect(page.locator(".user").last).to_contain_text("using a single word or phrase")
    expect(answers.last.locator(".quiet")).to_contain_text("known already")
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


def test_errors_are_shown_and_the_question_stays(page: sync_api.Page) -> None:
    expect = sync_api.expect
    drop(page, b"no image at all", "notes.txt", "text/plain")
    expect(page.locator(".error")).to_have_text("notes.txt is no image")
    drop(page, b"no image at all", "broken.png", "image/png")
    expect(page.locator(".error").last).to_have_text("broken.png cannot be read as an image")
    long = "why " * 3000
    page.fill("#text", long)
    page.click("#send")
    expect(page.locator(".assistant.error")).to_contain_text("positions", timeout=PATIENCE)
    expect(page.locator("#text")).to_have_value(long.strip())


def test_a_phone_shows_everything(page: sync_api.Page) -> None:
    page.set_viewport_size({"width": 360, "height": 640})
    page.click("summary")
    for name in ("#choose", "#text", "#send", "#temperature", "#curl", "#reset"):
        sync_api.expect(page.locator(name)).to_be_in_viewport()
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 360
