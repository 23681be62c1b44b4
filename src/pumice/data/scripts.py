"""Which writing system a text is in, by the Unicode names of its letters.

This tells Korean from English, not English from French: both are `latin`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection
from functools import lru_cache

from pumice.core.registry import Registry

SCRIPTS: Registry[str] = Registry(
    "script",
    {
        "latin": "LATIN",
        "cyrillic": "CYRILLIC",
        "greek": "GREEK",
        "armenian": "ARMENIAN",
        "georgian": "GEORGIAN",
        "arabic": "ARABIC",
        "hebrew": "HEBREW",
        "ethiopic": "ETHIOPIC",
        "devanagari": "DEVANAGARI",
        "bengali": "BENGALI",
        "gujarati": "GUJARATI",
        "gurmukhi": "GURMUKHI",
        "tamil": "TAMIL",
        "telugu": "TELUGU",
        "kannada": "KANNADA",
        "malayalam": "MALAYALAM",
        "sinhala": "SINHALA",
        "thai": "THAI",
        "lao": "LAO",
        "khmer": "KHMER",
        "myanmar": "MYANMAR",
        "hangul": "HANGUL",
        "hiragana": "HIRAGANA",
        "katakana": "KATAKANA",
        "han": "CJK",
    },
)
"""Every script that can be named, with the word that the Unicode names of its letters hold.

Japanese is `han` with `hiragana` and `katakana`; Chinese is `han`, Korean `hangul`.
"""
UNSPACED = frozenset(("thai", "lao", "khmer", "myanmar", "hiragana", "katakana", "han"))
"""Scripts that set no space between words."""


@lru_cache(maxsize=2**16)
def script_of(letter: str) -> str | None:
    """The script of a letter; None for other characters and for scripts that are not named."""
    if not letter.isalpha():
        return None
    name = unicodedata.name(letter, "")
    return next((script for script in SCRIPTS if SCRIPTS[script] in name), None)


def script_share(text: str, scripts: Collection[str]) -> float:
    """The share of a text's letters that are of these scripts; 1 for a text without letters."""
    letters = [letter for letter in text if letter.isalpha()]
    own = sum(script_of(letter) in scripts for letter in letters)
    return own / len(letters) if letters else 1.0


def read_scripts(text: str) -> tuple[str, ...]:
    """The scripts named in a text such as "han,hangul"; an unknown name is an error."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        SCRIPTS[name]
    return names
