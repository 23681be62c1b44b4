"""The page on /: its files, and what it is told of the model behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response
from fastapi.staticfiles import StaticFiles

from pumice.processing.response_formats import FORMATS

WEB = Path(__file__).parent / "web"
# The page loads nothing from elsewhere, and nobody may put it into a frame.
_POLICY = "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'"
# The response formats that the page offers beside none.
_OFFERED = ("short", "letter", "detailed")


def add_page(app: FastAPI) -> None:
    """The page on /, and its files under /page/."""
    app.add_api_route("/", _page, methods=["GET", "HEAD"], include_in_schema=False)
    app.mount("/page", StaticFiles(directory=WEB), name="page")


def settings(model: str, max_new_tokens: int) -> dict[str, Any]:
    """What GET /page/settings answers: the model's name, the longest answer, formats."""
    return {
        "model": model,
        "max_new_tokens": max_new_tokens,
        "formats": {"": "", **{name: FORMATS[name] for name in _OFFERED}},
    }


def _page() -> Response:
    text = (WEB / "index.html").read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}
    return Response(text, media_type="text/html; charset=utf-8", headers=headers)
