"""The report in a real browser: it opens from disk, works by keyboard, can be read, and keeps still."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from qc.compiler.report.page import REPORT, page
from tests.browser import chromium, opened
from tests.homes import compiled, homes

pytestmark = pytest.mark.broad

CONTRAST = """
() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = (c) => { const v = c / 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const luminance = ([r, g, b]) => 0.2126 * light(r) + 0.7152 * light(g) + 0.0722 * light(b);
  const behind = (element) => {
    const paper = element.ownerSVGElement && element.closest("g")?.querySelector(":scope > .qc-area");
    if (paper) return parse(getComputedStyle(paper).fill);
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
  };
  const bad = [];
  let count = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
    if (!text || ["SCRIPT", "STYLE", "TITLE", "NOSCRIPT", "title", "style"].includes(element.tagName)) continue;
    if (element.classList.contains("qc-on") || element.closest(".skip")) continue;
    const style = getComputedStyle(element);
    if (style.visibility !== "visible" || !element.getClientRects().length) continue;
    const front = parse(element.ownerSVGElement ? style.fill : style.color);
    const [one, two] = [luminance(front), luminance(behind(element))].sort((a, b) => b - a);
    count += 1;
    const what = `${element.tagName}.${element.getAttribute("class")}: ${text.slice(0, 30)}`;
    if ((one + 0.05) / (two + 0.05) < 4.5) bad.push(what);
  }
  return { count, bad: [...new Set(bad)] };
}
"""
"""Text whose contrast with what is behind it is less than 4.5 to 1 (WCAG 2.1)."""
SHIFT = """
() => new Promise((done) => {
  let sum = 0;
  new PerformanceObserver((list) => list.getEntries().forEach((e) => { sum += e.value; }))
    .observe({ type: "layout-shift", buffered: true });
  setTimeout(() => done(sum), 200);
})
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a tiny model, with everything that a report can have."""
    chromium()
    out = tmp_path_factory.mktemp("report") / "out"
    passes = "iter_smooth,quarot,autoround{iters=4}"
    compiled(homes(tmp_path_factory)("llama-128"), out, passes, scheme="auto", timings=True)
    return out / REPORT


def data_of(report: Path) -> dict[str, Any]:
    found = re.search(r'id="data">(.*?)</script>', report.read_text(encoding="utf-8"), re.S)
    assert found
    return json.loads(found.group(1))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_opens_from_disk_and_can_be_read(
    width: int, scheme: str, report: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with opened(report, width=width, scheme=scheme) as seen:
        slider = seen.page.get_by_label("Pass", exact=True)
        slider.focus()
        for _ in range(2):
            slider.press("ArrowRight")
        for details in seen.page.locator("summary").all():
            details.click()
        shot = tmp_path_factory.getbasetemp() / "screenshots" / f"report-{width}-{scheme}.png"
        seen.page.screenshot(path=shot, full_page=True)
        contrast = seen.page.evaluate(CONTRAST)
        assert contrast["count"] > 200
        assert contrast["bad"] == []
        wide = seen.page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert wide <= 0, "the page scrolls sideways"
        assert seen.said == []
        assert seen.asked == [report.as_uri()]
    assert shot.stat().st_size > 10_000


@pytest.mark.parametrize("width", [1280, 400])
def test_the_slider_goes_over_all_passes_by_keyboard_and_nothing_moves(width: int, report: Path) -> None:
    data = data_of(report)
    with opened(report, width=width) as seen:
        slider = seen.page.get_by_label("Pass", exact=True)
        slider.focus()
        below = "document.querySelector('#layers').getBoundingClientRect().top + scrollY"
        place = seen.page.evaluate(below)
        drawings, titles = [], []
        for _ in range(len(data["steps"]) + 1):
            titles.append(seen.page.locator(".caption.here h3").inner_text())
            drawings.append(seen.page.locator(".drawing").inner_html())
            assert seen.page.evaluate(below) == place
            slider.press("ArrowRight")
        assert [title.split()[1] for title in titles[1:]] == [step["spelled"] for step in data["steps"]]
        assert len(set(drawings)) > 3
        assert "W4A4" in drawings[-1]
        assert "W4A4" not in drawings[0]
        assert seen.page.locator(".diff .plus").count() > 3
        assert seen.page.evaluate(SHIFT) == 0
        seen.page.get_by_label("prologue").check()
        assert "embed_tokens" in seen.page.locator(".drawing").inner_text()
        assert seen.said == []


def test_the_charts_follow_one_layer(report: Path) -> None:
    with opened(report) as seen:
        layer = seen.page.locator("#layers").get_by_role("slider")
        values = seen.page.locator("#layers .value")
        first = values.all_inner_texts()
        layer.focus()
        layer.press("End")
        assert values.all_inner_texts() != first
        assert seen.page.locator("#training").get_by_role("slider").input_value() == layer.input_value()
        for metric in seen.page.get_by_role("group", name="What is shown").get_by_role("radio").all():
            metric.check()
            assert seen.page.locator("#layers .series").count() > 7
        seen.page.get_by_text("All linears as a table").click()
        rows = seen.page.get_by_role("region", name="All linears").locator("tbody tr")
        rows.first.wait_for()
        assert rows.count() == 21
        seen.page.get_by_role("button", name="Output, dB").click()
        shown = [float(text) for text in rows.locator("td:nth-child(3)").all_inner_texts()]
        assert shown == sorted(shown, reverse=True)


def test_tab_goes_from_top_to_bottom(report: Path) -> None:
    with opened(report) as seen:
        places = []
        for _ in range(60):
            seen.page.keyboard.press("Tab")
            at = seen.page.evaluate(
                "document.activeElement === document.body ? null : [document.activeElement.textContent.trim(),"
                " [...document.querySelectorAll('*')].indexOf(document.activeElement)]"
            )
            if at is None:
                break
            places.append(at)
        assert places[0][0] == "Skip to the passes"
        assert [text for text, _ in places[1:4]] == ["Passes", "Layer by layer", "Training"]
        order = [index for _, index in places]
        assert order == sorted(order)
        assert len(order) > 20


def test_four_hundred_layers(report: Path, tmp_path: Path) -> None:
    data = data_of(report)
    many = lambda values: (values * 400)[:400]  # noqa: E731
    data["layers"] = [f"model.layers.{i}" for i in range(400)]
    for row in data["linears"]:
        for key in ("format", "bits", "sqnr", "weight_sqnr"):
            row[key] = many(row[key])
        for what in ("weight", "input"):
            for of in row[what].values():
                of |= {key: many(values) for key, values in of.items()}
    for one in data["losses"]:
        one["layers"] = many(one["layers"])
    for one in data["certificates"]:
        one |= {key: one[key] * 200 for key in ("part", "where", "math", "stored")}
    file = tmp_path / REPORT
    file.write_text(page(data), encoding="utf-8")
    with opened(file) as seen:
        seen.page.locator("#layers").get_by_role("slider").press("End")
        seen.page.get_by_text("All linears as a table").click()
        seen.page.get_by_text("Show all 2,800 rows").wait_for()
        assert seen.page.locator("*").count() < 8000
        assert seen.said == []


def test_no_minute_has_sixty_seconds(report: Path, tmp_path: Path) -> None:
    data = data_of(report)
    data["run"] |= {"seconds": 119.7, "stages": {"load": 89.4, "write": 89.6}}
    file = tmp_path / REPORT
    file.write_text(page(data), encoding="utf-8")
    with opened(file) as seen:
        told = seen.page.locator("#timings").inner_text()
    assert "2 min 0 s" in told
    assert "89.4 s" in told
    assert "1 min 30 s" in told
