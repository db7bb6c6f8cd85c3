"""What the site adds to the pages of docs/: a home page, the contributor's page, and the reference of the public names.

Pages are written for GitHub, where README.md and CONTRIBUTING.md stand above docs/. On the site they are ``index.md``
and ``contributing.md``, and links to them are turned.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import qc

ROOT = Path(__file__).resolve().parents[1]
ABOVE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
"""Pages that stand above docs/, and what they are called on the site."""
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")
FENCE = re.compile(r"(^```.*?^```[ ]*$)", re.M | re.S)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put pages in the place of every ``FOLDER/*`` of the navigation: all that have no place of their own."""
    assert config.nav is not None
    known = {*reference(), *(path.relative_to(config.docs_dir).as_posix() for path in pages(config))}
    config.nav = filled(config.nav, sorted(known - set(placed(config.nav))))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for source, name in ABOVE.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    for name, text in reference().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn links between pages above docs/ and pages in it, outside of fenced blocks."""
    here = next((source for source, name in ABOVE.items() if name == page.file.src_uri), None)
    folder = posixpath.dirname(here or f"docs/{page.file.src_uri}")

    def turned(link: re.Match[str]) -> str:
        there = posixpath.normpath(posixpath.join(folder, link[1]))
        name = ABOVE.get(there, there.removeprefix("docs/"))
        return posixpath.relpath(name, posixpath.dirname(page.file.src_uri) or ".")

    parts = FENCE.split(markdown)
    return "".join(part if i % 2 else LINK.sub(turned, part) for i, part in enumerate(parts))


def reference() -> dict[str, str]:
    """Pages of the public names, a page per module that defines some, by their place on the site."""
    found = dict[str, str]()
    for home, names in {**qc._HOMES, ".testing": tuple(qc.testing.__all__)}.items():
        prefix = "qc.testing" if home == ".testing" else "qc"
        title = TITLES.get(home) or home.rpartition(".")[2].replace("_", " ").capitalize()
        body = "\n".join(f"::: {prefix}.{name}\n" for name in names)
        found[f"reference/{title.lower().replace(' ', '-')}.md"] = f"# {title}\n\n{body}"
    return found


TITLES = {
    ".api": "Functions",
    ".compiler.calib_readers.question": "Calibration readers",
    ".compiler.contract": "Contract of a pass",
    ".compiler.edit": "Edits",
    ".compiler.operand": "Operands",
    ".compiler.pattern": "Pattern language",
    ".compiler.scheme": "Schemes",
    ".testing": "Testing a pass",
}
"""What modules that define public names are called on the site, where it is not their own name."""


def pages(config: MkDocsConfig) -> list[Path]:
    """All pages of docs/."""
    return sorted(Path(config.docs_dir).rglob("*.md"))


def placed(nav: Any) -> Iterator[str]:
    """Pages that a navigation names."""
    if isinstance(nav, str):
        yield nav
    else:
        for item in nav.values() if isinstance(nav, dict) else nav:
            yield from placed(item)


def filled(nav: Any, left: list[str]) -> Any:
    """A navigation with the pages of a folder, those of ``left``, in the place of ``FOLDER/*``."""
    if isinstance(nav, dict):
        return {title: filled(item, left) for title, item in nav.items()}
    if not isinstance(nav, list):
        return nav
    found = list[Any]()
    for item in nav:
        if isinstance(item, str) and item.endswith("/*"):
            found += [name for name in left if posixpath.dirname(name) == item[:-2]]
        else:
            found.append(filled(item, left))
    return found
