"""The pages of the documentation: their blocks of code, links and tables, and the run of what they show."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qc.compiler.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = tuple(sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]))
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```[ ]*$", re.M | re.S)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|<img[^>]*src=\"([^\"]+)\"")
HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.M)
REAL_MODEL = "SmolLM2-135M-Instruct"
"""Blocks that name it are sessions with the real model."""
SHELL = ("ls", "head", "cat")
"""Commands of a console block, besides qc, that are run as they stand."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line on which it begins, and whether it follows another at once."""

    language: str
    text: str
    line: int
    follows: bool


def name_of(page: Path) -> str:
    """A page as people write it: ``docs/passes/quarot.md``."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text, end, found = page.read_text(encoding="utf-8"), 0, list[Block]()
    for m in FENCE.finditer(text):
        follows = bool(found) and not text[end : m.start()].strip()
        found.append(Block(m[1], m[2], text.count("\n", 0, m.start()) + 1, follows))
        end = m.end()
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """What links to headings of a page end in, as GitHub makes it."""
    plain = (re.sub(r"[`*]", "", heading).lower() for heading in HEADING.findall(prose(page)))
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def links(page: Path) -> list[str]:
    """Targets of all links and pictures of a page that lead into this repository."""
    found = (one or other for one, other in LINK.findall(prose(page)))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def rows_under(page: Path, heading: str) -> list[list[str]]:
    """Cells of the first table under a heading, without its head; code marks are taken off."""
    _, _, section = prose(page).partition(f"\n## {heading}\n")
    section = section.partition("\n## ")[0]
    found = re.search(r"(?:^\|.*\n)+", section, re.M)
    lines = found[0].splitlines() if found else []
    return [[cell.strip().strip("`") for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def commands(text: str) -> Iterator[tuple[str, str]]:
    """Commands of a console block, each with the output that is shown below it."""
    for chunk in re.split(r"^\$ ", text.replace("\\\n", " "), flags=re.M)[1:]:
        command, _, shown = chunk.partition("\n")
        yield command.strip(), shown.strip("\n")


def alike(want: str, got: str) -> bool:
    """Whether an output is what a page shows: ``...`` stands for anything, spaces at ends of lines for nothing."""

    def trimmed(text: str) -> str:
        return "\n".join(line.rstrip() for line in text.strip("\n").splitlines()) + "\n"

    return doctest.OutputChecker().check_output(trimmed(want), trimmed(got), doctest.ELLIPSIS)


@dataclass
class Reader:
    """Somebody who tries every block of one page, in order, in the current directory."""

    page: Path
    namespace: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})

    def follow(self) -> None:
        """Run the page; AssertionError says which block does something else than the page says."""
        found = blocks(self.page)
        for index, block in enumerate(found):
            after = found[index + 1] if index + 1 < len(found) else None
            if block.language == "python":
                shown = after is not None and after.language == "text" and after.follows
                self.python(block, after if shown else None)
            elif block.language == "console" and REAL_MODEL not in block.text:
                self.console(block)
            elif block.language == "yaml" and (file := re.match(r"# (\w+\.yaml)\n", block.text)):
                Path(file[1]).write_text(block.text, encoding="utf-8")

    def python(self, block: Block, shown: Block | None) -> None:
        """Run a block; one that begins with ``# name.py`` is kept as that file. A text block after it is its output."""
        at = f"{name_of(self.page)}:{block.line}"
        file = re.match(r"# (\w+\.py)\n", block.text)
        if file:
            Path(file[1]).write_text(block.text, encoding="utf-8")
            return
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
            exec(compile("\n" * block.line + block.text, at, "exec"), self.namespace)
        if shown is not None:
            assert alike(shown.text, said.getvalue()), f"{at} prints\n{said.getvalue()}"

    def console(self, block: Block) -> None:
        """Run the commands of a block and compare what they print, and whether they refuse, with the page."""
        for command, shown in commands(block.text):
            status, got = self.run(command)
            refused = shown.startswith("qc: ") or "\nproblems (" in shown
            at = f"{name_of(self.page)}:{block.line}: $ {command}"
            assert status == (2 if refused else 0), f"{at} ended with {status}\n{got}"
            assert not shown or alike(shown, got), f"{at} prints\n{got}"

    def run(self, command: str) -> tuple[int, str]:
        """Exit status, and what was printed: also the errors if it was refused."""
        program, *words = shlex.split(command)
        if program in SHELL:
            done = subprocess.run([program, *words], capture_output=True, text=True, check=False)
            return done.returncode, done.stdout
        assert program == "qc", f"a page may show qc, {', '.join(SHELL)}; not {program}"
        return qc(as_plan(words) if words[0] == "compile" and "/" in words[1] else words)


def as_plan(words: list[str]) -> list[str]:
    """A compile of a model that is not here as its plan: the same options but for the output."""
    out = words.index("--out")
    return [
        "plan",
        *(word for i, word in enumerate(words) if i not in (0, out, out + 1) and word != "--force"),
    ]


def qc(words: list[str]) -> tuple[int, str]:
    """Run the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(words)
        except SystemExit as stop:
            status = int(stop.code or 0)
    return status, out.getvalue() + (err.getvalue() if status else "")


@contextlib.contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Let modules of a folder be imported, and forget them afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
                del sys.modules[name]
