"""Text in colour where it is printed on a terminal, and as it is everywhere else."""

from __future__ import annotations

import os
import sys

ROWS = (
    (r"(?m)^\S.*$", "bold"),
    (r"(?m)^\s+(?:v|in|new)\d+(?=:)", "cyan"),
    (r"(?<== )\w+", "magenta"),
    (r"(?<=: )\w+\[[^\]]*\](?= = )", "dim"),
    (r"<- [^#\n]*", "yellow"),
    (r"#.*", "green"),
    (r"\b(?:exact|proved)\b", "green"),
    (r"\blossy\b", "red"),
)
DIFF = ((r"(?m)^\+.*$", "green"), (r"(?m)^-.*$", "red"), (r"(?m)^@@.*$", "cyan"), (r"(?m)^\w.*$", "bold"))


def coloured() -> bool:
    """Whether standard output is a terminal whose user has not asked for plain text (https://no-color.org)."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def show(text: str, styles: tuple[tuple[str, str], ...]) -> None:
    """Print a text that ends in a newline, with colours by pattern where they are wanted."""
    if not coloured():
        print(text, end="")
        return
    from rich.console import Console
    from rich.text import Text

    painted = Text(text)
    for pattern, style in styles:
        painted.highlight_regex(pattern, style)
    Console(highlight=False, soft_wrap=True).print(painted, end="")
