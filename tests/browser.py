"""A real Chromium without a window, for the tests of pages; they skip where there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

VARIABLE = "QC_CHROMIUM"
"""Names the browser where it is not in the path."""
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium() -> str:
    """Path of the browser, or the test skips and says why."""
    pytest.importorskip("playwright.sync_api", reason="Playwright drives the browser: pip install playwright")
    found = os.environ.get(VARIABLE) or next(filter(None, map(shutil.which, NAMES)), None)
    if found and Path(found).is_file():
        return found
    pytest.skip(f"no Chromium: install one of {', '.join(NAMES)}, or name it in {VARIABLE}")


class Seen:
    """A page as the browser shows it, with everything that it said and asked for."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.said: list[str] = []
        self.asked: list[str] = []
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))


@contextmanager
def opened(file: Path, *, width: int = 1280, scheme: str = "light") -> Iterator[Seen]:
    """A file, opened from disk."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            context = browser.new_context(
                color_scheme=scheme,  # pyright: ignore[reportArgumentType]
                viewport={"width": width, "height": 900}, offline=True,
            )  # fmt: skip
            seen = Seen(context.new_page())
            seen.page.goto(file.as_uri())
            yield seen
        finally:
            browser.close()
