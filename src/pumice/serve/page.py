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


class _Files(StaticFiles):
    """Asked for anew each time, which costs a 304: of two versions no page can be made."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        return response


def add_page(app: FastAPI) -> None:
    """The page on /, and its files under /page/."""
    app.add_api_route("/", _page, methods=["GET", "HEAD"], include_in_schema=False)
    app.mount("/page", _Files(directory=WEB), name="page")


def settings(model: str, max_new_tokens: int, *, takes_key: bool) -> dict[str, Any]:
    """What GET /page/settings answers: the model's name, the longest answer, formats.

    `takes_key` is whether a key that somebody types is looked at.
    """
    return {
        "model": model,
        "max_new_tokens": max_new_tokens,
        "takes_key": takes_key,
        "formats": {"": "", **{name: FORMATS[name] for name in _OFFERED}},
    }


def _page() -> Response:
    text = (WEB / "index.html").read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}
    return Response(text, media_type="text/html; charset=utf-8", headers=headers)
