"""A picture in the terminal: two pixels a character, in the terminal's own colours."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import PIL.Image
    from rich.text import Text

_COLUMNS, _LINES = 40, 16


def drawing() -> Callable[[PIL.Image.Image], None] | None:
    """What draws a picture on stderr; None where that is no terminal with enough colours."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal or console.color_system not in ("256", "truecolor"):
        return None
    return lambda picture: console.print(drawn(picture, console.width), end="")


def drawn(picture: PIL.Image.Image, width: int) -> Text:
    """The picture in at most so many characters a line: the upper half of each is one pixel."""
    import PIL.Image
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    scale = min(min(_COLUMNS, width) / picture.width, 2 * _LINES / picture.height)
    columns = max(1, round(picture.width * scale))
    lines = max(1, round(picture.height * scale / 2))
    small = picture.convert("RGB").resize((columns, 2 * lines), PIL.Image.Resampling.BOX)
    colours = [Color.from_rgb(*pixel) for pixel in zip(*[iter(small.tobytes())] * 3, strict=True)]
    text = Text()
    for line in range(lines):
        for column in range(columns):
            upper = colours[2 * line * columns + column]
            lower = colours[(2 * line + 1) * columns + column]
            text.append("\N{UPPER HALF BLOCK}", Style(color=upper, bgcolor=lower))
        text.append("\n")
    return text
