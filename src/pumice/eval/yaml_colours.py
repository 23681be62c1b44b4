"""A line of a recipe as HTML: keys and remarks told apart."""

from __future__ import annotations

import re
from html import escape

_YAML_LINE = re.compile(r"^(\s*(?:- )?)([\w.\-]+)(:)(.*)$")


def yaml_line(line: str) -> str:
    """One line, escaped, with its key and its remark marked."""
    code, mark, remark = (
        line.partition(" #") if not line.lstrip().startswith("#") else ("", line, "")
    )
    parts = _YAML_LINE.match(code)
    shown = escape(code)
    if parts:
        indent, key, colon, value = map(escape, parts.groups())
        shown = f'{indent}<span class="key">{key}</span>{colon}{value}'
    return shown + (f'<span class="remark">{escape(mark + remark)}</span>' if mark else "")
