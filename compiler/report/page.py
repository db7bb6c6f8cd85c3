"""The page: data, style and script in one file that asks nobody for anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from ..show.svg import STYLE

REPORT = "report.html"
HERE = Path(__file__).parent
SCRIPTS = ("dom.js", "charts.js", "passes.js", "layers.js", "report.js")
"""In the order in which they need each other."""


def page(data: Mapping[str, Any]) -> str:
    """The report as HTML: same data, same bytes. What is in ``data`` can not leave the element that holds it."""
    scripts = "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return Template((HERE / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"{data['title']}: qc report"),
        style=(HERE / "page.css").read_text(encoding="utf-8") + STYLE,
        data=json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
        script=f'"use strict";\n(() => {{\n{scripts}}})();',
    )
