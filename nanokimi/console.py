"""Text from a model on its way to a terminal."""

from __future__ import annotations

import unicodedata


def printable(text: str) -> str:
    """``text`` without control characters, except line break and tab.

    A model can write anything, also a sequence that retitles the window or rewrites the screen. Without its
    ESC (or the C1 form of it) such a sequence is inert and stays visible. Each character is judged alone, so
    a text cut into pieces gives the same as the whole.
    """
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
