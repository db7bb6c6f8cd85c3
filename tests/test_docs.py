"""The documentation is true: every example is run, every link leads somewhere, everything has its place.

Pages speak of ``my-model``, a checkpoint directory, with ``calibration.txt`` and ``text.txt`` beside it. Here it
is a tiny random Llama. A name such as ``Qwen/Qwen3-8B`` stands for the same model, and a compile of it is
planned. Blocks that name SmolLM2 are run on the real model: plans in ``make test``, the rest in ``make slow``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from benchmarks.random_llama import character_tokenizer
from qc.compiler import registry
from qc.compiler.about import about
from qc.compiler.capture import capture
from qc.compiler.cli import make_parser
from qc.compiler.contract import Pass
from qc.compiler.edit import Verb
from qc.compiler.laws import LAWS
from qc.runtime.formats import FORMATS
from tests.families import GQA, build
from tests.pages import (
    PAGES,
    REAL_MODEL,
    ROOT,
    Reader,
    alike,
    anchors,
    as_plan,
    blocks,
    commands,
    importable,
    links,
    name_of,
    prose,
    qc,
    rows_under,
)  # fmt: skip

pytestmark = pytest.mark.broad

SENTENCE = "the quick brown fox jumps over the lazy dog while the cat sleeps on a mat. "
PASSES = {name: registry.get("passes", name) for name in registry.names("passes")}
PASS_PAGES = {cls.name: ROOT / "docs" / "passes" / f"{cls.name}.md" for cls in PASSES.values()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what the pages speak of."""
    folder = tmp_path_factory.mktemp("docs")
    sizes = {"num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 128}
    config = LlamaConfig(**GQA | sizes, architectures=["LlamaForCausalLM"])
    build(config).save_pretrained(folder / "my-model")
    character_tokenizer().save_pretrained(folder / "my-model")
    (folder / "calibration.txt").write_text(SENTENCE * 8, encoding="utf-8")
    (folder / "text.txt").write_text(SENTENCE * 16, encoding="utf-8")
    (folder / "data_sets").symlink_to(ROOT / "tests" / "data_sets")
    words = SENTENCE.split()
    samples = (f'{{"text": "{" ".join(words[i : i + 6])}"}}\n' for i in range(12))
    (folder / "samples.jsonl").write_text("".join(samples), encoding="utf-8")
    (folder / "Qwen").mkdir()
    (folder / "Qwen" / "Qwen3-8B").symlink_to(folder / "my-model")
    return folder


@pytest.fixture
def there(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of one test with links to all of it, as working directory; a model is captured once."""
    for file in place.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    for module in ("qc.compiler.capture", "qc.compiler.compile", "qc.api"):
        monkeypatch.setattr(f"{module}.capture", captured_once)
    return tmp_path


def captured_once(model: Any, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """``capture``, with what a path gave kept for the pages that come later."""
    if options or not isinstance(model, str | Path) or not Path(model).is_dir():
        return capture(model, trust_remote_code=trust_remote_code, **options)
    key = str(Path(model).resolve())
    if key not in CAPTURED:
        CAPTURED[key] = capture(key)
    return dataclasses.replace(CAPTURED[key], path=str(model))


CAPTURED: dict[str, Any] = {}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_examples_do_what_the_page_says(page: Path, there: Path) -> None:
    with importable(there):
        Reader(page).follow()


def real_sessions(page: Path) -> list[tuple[str, str]]:
    """Commands with the real model on a page, with what they print there."""
    shown = (block.text for block in blocks(page) if block.language == "console" and REAL_MODEL in block.text)
    return [pair for text in shown for pair in commands(text)]


@pytest.mark.real
def test_plans_of_the_real_model(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / REAL_MODEL).symlink_to(smollm2)
    monkeypatch.chdir(tmp_path)
    plans = [pair for page in PAGES for pair in real_sessions(page) if pair[0].startswith("qc plan")]
    assert plans
    for command, shown in plans:
        status, got = Reader(ROOT / "README.md").run(command)
        assert status == (2 if "problems (" in shown else 0)
        assert alike(shown, got), got


@pytest.mark.real
@pytest.mark.slow
def test_sessions_with_the_real_model(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / REAL_MODEL).symlink_to(smollm2)
    (tmp_path / "text.txt").symlink_to(ROOT / "benchmarks" / "evaluation.txt")
    monkeypatch.chdir(tmp_path)
    for page in PAGES:
        for command, shown in real_sessions(page):
            if command.startswith("qc plan"):
                continue
            status, got = Reader(page).run(command)
            assert status == 0, got
            assert alike(numbers_left_out(shown), numbers_left_out(got)), got
            if "..." in shown:  # the page does not give them all
                continue
            for want, found in zip(numbers(shown), numbers(got), strict=True):
                assert found == pytest.approx(want, rel=0.1, abs=0.01), got


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


def numbers_left_out(text: str) -> str:
    return re.sub(r" +", " ", re.sub(r"\d+\.\d+", "#", text))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        target, _, anchor = link.partition("#")
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), f"{name_of(page)} links to {link}"
        assert there.is_relative_to(ROOT)
        if anchor:
            assert anchor in anchors(there), f"{name_of(page)} links to {link}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, queue = set[Path](), [ROOT / "README.md"]
    while queue:
        page = queue.pop()
        reached.add(page)
        found = {(page.parent / link.partition("#")[0]).resolve() for link in links(page)}
        queue += [target for target in found - reached if target.suffix == ".md"]
    assert [name_of(page) for page in PAGES if page not in reached] == []


@pytest.mark.parametrize("name", sorted(PASS_PAGES))
def test_options_of_a_pass_are_those_of_its_dataclass(name: str) -> None:
    wanted = [[option.name, option.kind, option.default] for option in about(name).options]
    found = [row[:3] for row in rows_under(PASS_PAGES[name], "Options")]
    assert found == wanted, f"docs/passes/{name}.md: name, type and default of every option, in their order"


@pytest.mark.parametrize("name", sorted(PASS_PAGES))
def test_a_pass_tells_what_its_page_tells(name: str) -> None:
    found = about(name)
    assert {"Why", "Before / after", "Source"} <= found.sections.keys()
    assert [option.name for option in found.options if not option.doc] == []
    page = prose(PASS_PAGES[name])
    assert [title for title in ("**Why.**", "**Where.**", "**Source.**") if title not in page] == []


@pytest.mark.parametrize("name", sorted(PASS_PAGES))
def test_the_contract_of_a_pass_is_on_its_page(name: str) -> None:
    cls: type[Pass] = PASSES[name]
    found = dict(row[:2] for row in rows_under(PASS_PAGES[name], "Contract"))

    def listed(names: Any) -> str:
        return ", ".join(f"`{one}`" for one in sorted(names)).strip("`") or "nothing"

    assert found["claim"] == cls.claim.name
    assert found["requires"] == listed(fact.name for fact in cls.requires)
    assert found["provides"] == listed(fact.name for fact in cls.provides)
    assert found["breaks"] == listed(fact.name for fact in cls.breaks)
    others = {other for order in (cls.before, cls.after) for why in order.values() for other in why}
    text = prose(PASS_PAGES[name])
    assert [other for other in sorted(others) if f"`{other}`" not in text] == []
    assert [p.name for p in cls.patterns if f"`{p.name}`" not in text] == []


def test_every_name_that_is_registered_has_its_place() -> None:
    text = {name: prose(ROOT / "docs" / name) for name in ("patterns.md", "formats.md", "passes/index.md")}
    patterns = {f"## `{name}`" for name in registry.names("patterns")}
    assert {heading for heading in patterns if heading not in text["patterns.md"]} == set()
    schemes = {row[0] for row in rows_under(ROOT / "docs" / "formats.md", "Schemes")}
    assert schemes == set(registry.names("schemes"))
    assert all(f"`{name}`" in text["formats.md"] for name in registry.names("targets"))
    assert all(f"`{name}`" in text["formats.md"] for name in FORMATS)
    known = {*registry.names("passes"), *registry.names("presets")}
    assert all(f"`{name}`" in text["passes/index.md"] for name in known)
    presets = registry.names("presets")
    assert all((ROOT / "docs" / "passes" / f"{name}.md").is_file() for name in presets)


def test_every_command_and_option_has_its_place() -> None:
    page = prose(ROOT / "docs" / "command-line.md")
    (sub,) = [action for action in make_parser()._actions if isinstance(action.choices, dict)]
    assert isinstance(sub.choices, dict)
    for name, parser in sub.choices.items():
        _, heading, section = page.partition(f"\n## qc {name}\n")
        assert heading, f"docs/command-line.md: no section for qc {name}"
        section = section.partition("\n## ")[0]
        if "the options of [qc plan]" in section:
            section += page.partition("\n## qc plan\n")[2].partition("\n## ")[0]
        nested = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
        below = [one for choices in nested for one in choices.values()]
        options = [o for one in (parser, *below) for action in one._actions for o in action.option_strings]
        assert [o for o in options if o.startswith("--") and o != "--help" and f"`{o}" not in section] == []


def test_the_help_of_every_command_says_what_it_does_and_what_every_word_means() -> None:
    (sub,) = [action for action in make_parser()._actions if isinstance(action.choices, dict)]
    assert isinstance(sub.choices, dict)
    parsers = dict(sub.choices)
    for name, parser in sub.choices.items():
        below = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
        parsers |= {f"{name} {one}": held for choices in below for one, held in choices.items()}
    assert [name for name, parser in parsers.items() if not parser.description] == []
    silent = [
        f"{name} {action.dest}"
        for name, parser in parsers.items()
        for action in parser._actions
        if not action.help and not isinstance(action.choices, dict)
    ]
    assert silent == []


def test_every_verb_and_law_has_its_place() -> None:
    page = prose(ROOT / "docs" / "concepts.md")
    assert [verb.name for verb in Verb if f"`{verb.name}`" not in page] == []
    functions = {law.__name__ for law in LAWS.values()}
    told = {"everything", "layout", "add", "mul", "div", "relu", "routed", "combined"}
    assert functions == told, "docs/concepts.md has a table of the laws"


def test_the_entry_point_of_a_pass_of_ones_own(there: Path) -> None:
    page = ROOT / "docs" / "writing-a-pass.md"
    (toml,) = [block.text for block in blocks(page) if block.language == "toml"]
    source = next(b.text for b in blocks(page) if b.text.startswith("# my_passes.py"))
    (there / "my_passes.py").write_text(source, encoding="utf-8")
    info = there / "my_passes-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-passes\nVersion: 1.0\n")
    group = re.search(r'entry-points\."(.+)"\]', toml)
    assert group is not None
    points = "\n".join(
        line.replace('"', "") for line in toml.splitlines() if " = " in line and "." not in line[:3]
    )
    (info / "entry_points.txt").write_text(f"[{group[1]}]\n{points}\n")
    registry.names.cache_clear()
    try:
        with importable(there):
            status, got = qc(
                ["plan", "my-model", "--passes", "even_columns,linear_quant", "--scheme", "w8a8"]
            )
    finally:
        registry.names.cache_clear()
    assert status == 0, got
    assert "even_columns" in got


def test_what_ellipsis_means() -> None:
    assert alike("a ... c\n...\nend", "a b c\nx\ny\nend \n")
    assert not alike("a ... c", "a b d")
    assert as_plan(["compile", "a/b", "--out", "o", "--tp", "2", "--force"]) == ["plan", "a/b", "--tp", "2"]
    assert list(commands("$ qc a \\\n  b\nout\n\nmore\n$ qc c\n")) == [
        ("qc a    b", "out\n\nmore"),
        ("qc c", ""),
    ]


@pytest.fixture
def page(tmp_path: Path) -> Callable[[str], Path]:
    def written(text: str) -> Path:
        path = ROOT / "docs" / "concepts.md"
        (tmp_path / path.name).write_text(text, encoding="utf-8")
        return tmp_path / path.name

    return written


def test_a_page_that_is_wrong_is_found_out(
    page: Callable[[str], Path], there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.pages.ROOT", there)
    plan = "$ qc plan my-model --passes {} --scheme w8a8\n{}"
    wrong = (
        "```python\nprint(1)\n```\n\n```text\n2\n```\n",
        "```python\nassert False\n```\n",
        f"```console\n{plan.format('linear_quant', 'plan for something else')}\n```\n",
        f"```console\n{plan.format('linear_qant', '')}\n```\n",
        f"```console\n{plan.format('linear_quant', 'qc: ...')}\n```\n",
        "```console\n$ rm -r my-model\n```\n",
    )
    for text in wrong:
        with pytest.raises(AssertionError):
            Reader(page(text)).follow()
    Reader(page("```python\nprint(1)\n```\n```text\n1\n```\n")).follow()
    Reader(page("```python\nprint(1)\n```\nA picture:\n```text\n2\n```\n")).follow()  # not its output


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"`((?:compiler|passes|patterns|runtime|tests|benchmarks|docs)/[\w./]*)`", prose(page))
    missing = [file for file in named if not (ROOT / file).exists()]
    assert missing == []
