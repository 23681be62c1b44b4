"""Samples as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import PIL.Image

from pumice.data.show import Piece, Shown

# Pictures are shown smaller than they are, so that a page of many stays small.
_SIDE = 480
_LINE_BREAK = "\u21b5\n"
_STYLE = """
:root { color-scheme: light dark; --ink: #1e1c1a; --soft: #6b655f; --paper: #fcfbf9;
  --rule: #e6e1da; --learned: #1d6b3d; --learned-bg: #2f7a4d1f; }
@media (prefers-color-scheme: dark) { :root { --ink: #ece8e3; --soft: #a59d95; --paper: #151312;
  --rule: #322e2a; --learned: #7fd09d; --learned-bg: #6cc08b26; } }
body { margin: 0 auto; max-width: 960px; padding: 40px 24px; background: var(--paper);
  color: var(--ink); font: 15px/1.6 system-ui, sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 16px; margin: 0; overflow-wrap: anywhere; }
p { margin: 4px 0 12px; color: var(--soft); }
article { border-top: 1px solid var(--rule); padding: 24px 0; }
figure { display: inline-block; margin: 0 12px 12px 0; color: var(--soft); font-size: 13px; }
figure img { display: block; max-width: 240px; max-height: 240px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; color: var(--soft);
  font: 14px/1.9 ui-monospace, monospace; }
pre span { border-bottom: 1px solid var(--rule); margin-right: 1px; }
pre .learned, .key { color: var(--learned); background: var(--learned-bg);
  border-color: currentColor; }
pre .image { border: 1px solid; border-radius: 4px; padding: 1px 6px; }
"""


def samples_page(title: str, samples: Sequence[Shown], read_with: str) -> str:
    """A page of the samples, each token marked off, the learnt ones coloured."""
    articles = "\n".join(map(_article, samples))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body>"
        f"<h1>{html.escape(title)}</h1>\n<p>Read with {html.escape(read_with)}. "
        f'<span class="key">Coloured</span> tokens are learnt, the others are only read.</p>\n'
        f"{articles}\n</body></html>\n"
    )


def _article(sample: Shown) -> str:
    figures = "".join(
        f'<figure><img alt="image {number}" src="{_data_url(image)}">image {number}: '
        f"{image.width} x {image.height}</figure>"
        for number, image in enumerate(sample.images, start=1)
    )
    return (
        f"<article><h2>{html.escape(sample.id)}</h2>"
        f"<p>{html.escape(sample.source)}: {sample.tokens} tokens, {sample.learned} learnt</p>"
        f"{figures}<pre>{''.join(map(_span, sample.pieces))}</pre></article>"
    )


def _span(piece: Piece) -> str:
    if piece.image is not None:
        return f'<span class="image">image {piece.image}: {piece.tokens} tokens</span>'
    kind = ' class="learned"' if piece.learned else ""
    # A line break moves the text on, and is seen as a token of its own.
    text = html.escape(piece.text).replace("\n", _LINE_BREAK)
    return f"<span{kind}>{text}</span>"


def _data_url(image: PIL.Image.Image) -> str:
    small = image.copy()
    small.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
