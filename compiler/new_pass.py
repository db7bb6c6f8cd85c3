"""The skeleton of a package that adds a pass: an entry point, the pass, its tests, a page that says what it is."""

from __future__ import annotations

import keyword
import re
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path
from string import Template

from . import registry
from .errors import Refused

NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
FILES = {
    "pyproject.toml.txt": "pyproject.toml",
    "README.md.txt": "README.md",
    "pass.py.txt": "src/$module.py",
    "test.py.txt": "tests/test_$name.py",
}
"""Files of ``compiler/skeleton`` to what they become."""


def new_pass(name: str, out: str | Path | None = None) -> Path:
    """Write a package that adds the pass ``name``, with tests that pass; it is there whole or not at all.

    Args:
        name: Small letters, digits and ``_``, as in ``--passes``.
        out: Directory to make; None is ``qc-NAME`` here.

    Raises:
        Refused: The name is no name or is taken, or the directory exists.
    """
    title = "".join(part.capitalize() for part in name.split("_"))
    if not NAME.fullmatch(name):
        raise Refused(
            f"{name!r} is no name of a pass: small letters, digits and single _, such as even_columns"
        )
    if keyword.iskeyword(name) or keyword.iskeyword(title):
        raise Refused(
            f"{name!r} is no name of a pass: {name} or {title} is a word of Python's own; add another word"
        )
    for group in ("passes", "presets", "recipes"):
        if name in registry.names(group):
            owner = registry.package(registry.names(group)[name])
            raise Refused(f"{name} is a {registry.singular(group)} of {owner} already: take another name")
    out = Path(f"qc-{name.replace('_', '-')}" if out is None else out)
    if out.exists():
        raise Refused(f"{out} exists: give another --out, or move it away")
    if not out.absolute().parent.is_dir():
        raise Refused(f"{out.absolute().parent} is no directory: make it first, or give another --out")
    words = {
        "name": name,
        "package": f"qc-{name.replace('_', '-')}",
        "module": f"qc_{name}",
        "Class": title,
    }
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}-") as folder:
        for source, target in FILES.items():
            file = Path(folder, "new", Template(target).substitute(words))
            file.parent.mkdir(parents=True, exist_ok=True)
            template = (
                files(__package__ or "qc.compiler").joinpath("skeleton", source).read_text(encoding="utf-8")
            )
            file.write_text(Template(template).substitute(words), encoding="utf-8")
        shutil.move(Path(folder, "new"), out)
    return out
