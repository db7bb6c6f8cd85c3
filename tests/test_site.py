"""The site: built strictly, with every page in its place, the whole reference, and nothing fetched from elsewhere."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qc
from tests.pages import PAGES, ROOT, anchors, name_of

MISSING = [name for name in ("mkdocs", "material", "mkdocstrings") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.broad,
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)}: not installed, pip install -e '.[dev]'"),
]
ABOVE = {"README.md": "index.html", "CONTRIBUTING.md": "contributing.html"}


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Run mkdocs as ``make docs`` does."""
    words = ["-m", "mkdocs", "build", "--strict", "--config-file", str(config), "--site-dir", str(site)]
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stderr
    return folder


def place(page: Path) -> str:
    """Where a page of the repository is on the site."""
    name = name_of(page)
    inside = re.sub(r"(^|/)index\.md$", r"\1index.html", name.removeprefix("docs/"))
    return ABOVE.get(name, inside.replace(".md", ".html"))


def test_every_page_is_in_the_navigation(site: Path) -> None:
    home = (site / "index.html").read_text(encoding="utf-8")
    (navigation,) = re.findall(r'<nav class="md-nav md-nav--primary.*?</nav>\s*</div>', home, re.S)
    places = set(re.findall(r'href="([^"#]+)"', navigation))
    assert [name_of(page) for page in PAGES if place(page) not in places] == []
    assert [name for name in places if not (site / name).is_file()] == []


def test_headings_have_the_anchors_that_github_gives_them(site: Path) -> None:
    text = {page: (site / place(page)).read_text(encoding="utf-8") for page in PAGES}
    missing = [
        f"{name_of(page)}#{a}" for page in PAGES for a in anchors(page) if f' id="{a}"' not in text[page]
    ]
    assert missing == []


def test_the_reference_has_every_public_name(site: Path) -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (site / "reference").glob("*.html"))
    names = [f"qc.{name}" for name in qc.__all__ if name != "testing"]
    names += [f"qc.testing.{name}" for name in qc.testing.__all__]
    assert [name for name in names if f'id="{name}"' not in text] == []
    assert "Tensor-parallel ranks of the server" in text


def test_the_home_page_is_the_readme(site: Path) -> None:
    home = (site / "index.html").read_text(encoding="utf-8")
    assert 'src="pipeline.svg"' in home
    assert 'href="passes/index.html"' in home
    assert not re.search(r'(src|href)="(docs/|[^"]*README|[^"]*\.md["#])', home)


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    loads = r'<(?:script|img|iframe)[^>]*src="', r'<link[^>]*rel="(?:stylesheet|preconnect|icon)"[^>]*href="'
    fetched = rf"(?:{'|'.join(loads)})(?:https?:)?//"
    pages = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    found = {path.name: re.findall(fetched, text) for path, text in pages.items() if re.search(fetched, text)}
    assert found == {}
    sheets = (path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert [m for sheet in sheets for m in re.findall(r"url\(['\"]?https?:[^)]*|@import[^;]*", sheet)] == []


def test_a_page_that_is_wrong_stops_the_build(tmp_path: Path) -> None:
    """The rules of our ``mkdocs.yml``, on pages that break each of them."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# One\n\n[a](gone.md), [b](#gone), [c](two.md#gone)\n")
    (tmp_path / "docs" / "two.md").write_text("# Two\n")
    config = tmp_path / "mkdocs.yml"
    inherited = f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: {tmp_path / 'docs'}\nhooks: []\nplugins: []\n"
    config.write_text(inherited + "nav: [index.md]\n")
    done = build(config, tmp_path / "site")
    assert done.returncode != 0
    told = ("not found among documentation files", "no such anchor", "'two.md#gone'", "  - two.md")
    assert [words for words in told if words not in done.stderr] == []
    assert done.stderr.count("WARNING -") == 4
