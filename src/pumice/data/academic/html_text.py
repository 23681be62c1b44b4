"""Web pages as Markdown, without what the page of a chat put around its answers."""

from __future__ import annotations

import re

from pumice.core.errors import PumiceError

_TAG = re.compile(r"</?(div|p|pre|code|ul|ol|li|span|table|br|h[1-6])\b[^>]*>", re.IGNORECASE)
# What the page showed beside an answer: how many there are, how long it is, and a button.
_ANSWER_COUNT = re.compile(r"^\d+ / \d+$", re.MULTILINE)
_LENGTH = re.compile(r"Copy\d+ chars / \d+ words")
_COPY_CODE = re.compile(r"```\s*([A-Za-z+#]*)\s*Copy code[ \t]*\n?")
_BLANK_LINES = re.compile(r"\n{3,}")


def is_html(text: str) -> bool:
    """Whether a text is a piece of a web page: it begins with a tag."""
    return _TAG.match(text.lstrip()) is not None


def as_markdown(text: str) -> str:
    """The text of the page in Markdown."""
    try:
        from markdownify import markdownify
    except ModuleNotFoundError as error:
        raise PumiceError(
            "this file holds web pages, and reading them needs the package markdownify. Install "
            "pumice[data], or keep them as they are with html=false."
        ) from error
    written: str = markdownify(text, heading_style="ATX", escape_underscores=False,
                               escape_asterisks=False, escape_misc=False)  # fmt: skip
    for noise in (_ANSWER_COUNT, _LENGTH):
        written = noise.sub("", written)
    written = _COPY_CODE.sub(lambda found: f"```{found[1]}\n", written)
    return _BLANK_LINES.sub("\n\n", written).strip()
