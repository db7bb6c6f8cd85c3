"""A package of somebody else: it is installed as one is, and adds to every group without touching qc."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

import qc
from qc.compiler import registry
from qc.compiler.about import about, passes_text
from qc.compiler.laws import LAWS, Map, Passes, law
from qc.compiler.testing import check
from qc.compiler.testing_models import SIZES, calibration, characters
from tests.pages import importable
from tests.pages import qc as command
from tests.programs import BATCH, LENGTH, Drawing, aten, relative, run_float64

PLUGIN = Path(__file__).parent / "plugin"


def install(source: Path, target: Path) -> None:
    """What ``pip install`` of a package does, into a folder of the test and without network."""
    pytest.importorskip("setuptools", minversion="77", reason="the package is built without isolation")
    copy = target.parent / f"{target.name}-source"
    shutil.copytree(source, copy)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "--target", target, copy], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site") / "packages"
    install(PLUGIN, target)
    return target


@pytest.fixture
def plugin(installed: Path) -> Iterator[Any]:
    """The package as an import, with everything that it registers."""
    registry.names.cache_clear()
    with importable(installed):
        yield importlib.import_module("qc_leaky.op")
    registry.names.cache_clear()


def model(plugin: Any) -> torch.nn.Module:
    sizes = {name: value for name, value in SIZES.items() if name != "dtype"}
    torch.manual_seed(0)
    return plugin.LeakyForCausalLM._from_config(LlamaConfig(**sizes), dtype=torch.bfloat16)


def test_the_law_of_its_op_lets_through_what_it_says(plugin: Any) -> None:
    drawing = Drawing()
    x = drawing.value("x", BATCH, LENGTH, 8)
    node = drawing.op(torch.ops.leaky.rectify.default, x)
    program = drawing.program(node)
    assert isinstance(law(program, node, x, Map.SCALE), Passes)
    for what in (Map.ROTATION, Map.CENTRED, Map.HEAD):
        assert "positive scales" in law(program, node, x, what).reason  # type: ignore[union-attr]
    scale = torch.rand(8, dtype=torch.float64) + 0.5
    before = run_float64(program, drawing.tensors)
    after = run_float64(program, {name: t * scale for name, t in drawing.tensors.items()})
    assert relative(after, before * scale) < 1e-12


@pytest.mark.broad
def test_it_compiles_a_model_with_its_own_op(plugin: Any, tmp_path: Path) -> None:
    program = qc.capture(model(plugin))
    assert [m.first.module for m in registry.get("patterns", "across").find(program)][:1] == [
        "model.layers.0.mlp.up_proj"
    ]
    plan = qc.plan(program, "across_smooth{strength=0.7},linear_quant", scheme="mlp-w8a8", target="audited")
    assert plan.problems == ()
    assert plan.rewrites == {"across_smooth": 2, "linear_quant": 4}
    result = qc.compile(
        program, "across_smooth{strength=0.7},linear_quant", out=tmp_path / "out", scheme="mlp-w8a8",
        target="audited", tokenizer=characters(), calib=[calibration()], samples=2, length=32,
    )  # fmt: skip
    assert result.journal.proofs == 2
    assert result.journal.worst < 1e-12
    audit = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert len(audit["quantized"]) == 4
    assert [check for check in qc.verify(tmp_path / "out") if check.wrong] == []
    (no,) = qc.plan(program, "linear_quant", scheme="w4a4", target="audited").problems
    assert "four bits are not allowed here" in no


def test_without_its_law_nothing_matches(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    program = qc.capture(model(plugin), certify=False)
    pattern = registry.get("patterns", "across")
    names = registry.names
    monkeypatch.setattr(registry, "names", lambda group: {} if group == "laws" else names(group))
    assert not any("mlp" in match.first.module for match in pattern.find(program))
    miss = pattern.nearest(program, at="model.layers.0.mlp")
    assert miss is not None
    assert "no law lets a positive scale per channel through leaky.rectify" in miss.reason


@pytest.mark.broad
def test_its_pass_stands_the_ready_made_suite(plugin: Any) -> None:
    smooth = registry.get("passes", "across_smooth")
    report = check(smooth(), families=("llama", "gpt2"), refuses=[{"strength": 2.0}, {"strength": -1.0}])
    assert report.wrong == ()
    assert "compile, verify, load (gpt2)" in str(report)


def test_it_is_told_apart_on_the_command_line(plugin: Any) -> None:
    assert "(of qc-leaky)" in passes_text()
    assert about("across_smooth").package == "qc-leaky"
    status, said = command(["passes", "across_smooth"])
    assert status == 0
    assert "of qc-leaky, qc_leaky.smooth:AcrossSmooth" in said


@pytest.fixture
def registered(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Register things of a made-up package, whose module has some source."""

    def write(package: str, source: str, **groups: dict[str, str]) -> None:
        module = package.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(source, encoding="utf-8")
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"[qc.{g}]\n" + "\n".join(f"{k} = {v}" for k, v in ps.items()) for g, ps in groups.items()]
        (info / "entry_points.txt").write_text("\n".join(lines))
        importlib.invalidate_caches()
        registry.names.cache_clear()

    with importable(tmp_path):
        yield write
    registry.names.cache_clear()


INCOMPLETE = """
import qc

class Half(qc.Pass):
    name = "half"
    summary = "half a pass"
    patterns = ()
    requires = frozenset()
    claim = qc.EXACT

    def rewrite(self, program, setting):
        return qc.Answer(())
"""


@pytest.mark.parametrize(
    ("source", "value", "why"),
    [
        ("import no_such_module", "Half", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("x = 1 +", "Half", "SyntaxError"),
        ("", "Half", "AttributeError: module 'sad_pack' has no attribute 'Half'"),
        ("Half = 3", "Half", "is no class derived from qc.Pass"),
        (INCOMPLETE, "Half", "pass Half does not declare provides, breaks, before, after"),
        (INCOMPLETE.replace("qc.EXACT", "True; provides = {1}; breaks = frozenset(); before = after = {}"),
         "Half", "pass Half: provides is no frozenset of qc.Fact; pass Half: claim is neither qc.EXACT nor qc.LOSSY"),
    ],
    ids=["import", "syntax", "name", "kind", "incomplete", "wrong"],
)  # fmt: skip
def test_a_plug_in_that_is_broken_is_named(registered: Any, source: str, value: str, why: str) -> None:
    registered("sad-pack", source, passes={"half": f"sad_pack:{value}"})
    status, said = command(["passes", "half"])
    assert status == 2
    assert "pass 'half', which sad-pack registers as 'sad_pack:" in said
    assert why in said
    assert "mend sad-pack, or pip uninstall sad-pack" in said
    status, said = command(["passes"])
    assert status == 0
    assert "broken" in said
    assert "linear_quant" in said
    problems = qc.plan(qc.testing.tiny("llama"), "rotate_residual,linear_quant").problems
    assert "put fuse_norms before it" in problems[0]  # what is broken keeps nobody else from working


def test_two_packages_with_one_name_are_both_named(registered: Any) -> None:
    registered("one-pack", "", passes={"twice": "one_pack:A"})
    registered("two-pack", "", passes={"twice": "two_pack:B"})
    status, said = command(["passes"])
    assert status == 2
    assert "pass 'twice' is registered twice, by one-pack and two-pack: uninstall one of them" in said


def test_a_law_of_an_op_that_has_one_is_refused(registered: Any) -> None:
    registered("law-pack", "def law(*given): ...", laws={"aten.mul": "law_pack:law"})
    drawing = Drawing()
    x = drawing.value("x", BATCH, LENGTH, 8)
    node = drawing.op(aten.silu.default, x)
    with pytest.raises(qc.Refused, match=r"law 'aten.mul' of law-pack: qc has the law of that op"):
        law(drawing.program(node), node, x, Map.SCALE)
    assert aten.mul.Tensor in LAWS


@pytest.mark.broad
def test_wrong_passes_do_not_stand_the_suite() -> None:
    from qc.passes.smooth_quant import SmoothQuant

    class Silent(SmoothQuant):
        """Answers nothing."""

        name = "silent"

        def rewrite(self, program: Any, setting: Any) -> Any:
            return qc.Answer(())

    class Forgetful(SmoothQuant):
        """Forgets a reader."""

        name = "forgetful"

        def rewrite(self, program: Any, setting: Any) -> Any:
            answer = super().rewrite(program, setting)
            fewer = tuple(dataclasses.replace(one, edits=one.edits[:-1]) for one in answer.rewrites)
            return dataclasses.replace(answer, rewrites=fewer)

    class Fickle(SmoothQuant):
        """Answers otherwise every time."""

        name = "fickle"
        count = [0]  # noqa: RUF012

        def rewrite(self, program: Any, setting: Any) -> Any:
            self.count[0] += 1
            answer = super().rewrite(program, setting)
            return dataclasses.replace(answer, rewrites=answer.rewrites[self.count[0] % 2 :])

    class Lax(SmoothQuant):
        """Takes any alpha."""

        name = "lax"

        def __post_init__(self) -> None:
            return

    for cls, why in (
        (Silent, "it matches somewhere: no rewrite in llama"),
        (Forgetful, "the rewrite claims to keep the function, but changes it"),
        (Fickle, "rewrite answers otherwise when it is asked again"),
        (Lax, "bad options are refused: takes alpha=nan"),
    ):
        with pytest.raises(AssertionError) as caught:
            check(cls(), families=("llama",))
        assert why in str(caught.value)


@pytest.mark.broad
def test_a_skeleton_is_a_package_that_passes_its_own_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, said = command(["new-pass", "even_columns"])
    assert status == 0
    assert 'next: pip install -e "qc-even-columns[test]"' in said
    made = tmp_path / "qc-even-columns"
    install(made, tmp_path / "site")
    paths = os.pathsep.join([str(tmp_path / "site"), str(Path(__file__).parents[1])])
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(made)]
    done = subprocess.run(
        run, capture_output=True, text=True, check=False, cwd=made, env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stdout
    assert "5 passed" in done.stdout


@pytest.mark.slow
def test_the_pass_of_a_skeleton_stands_the_suite_on_every_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(["new-pass", "even_columns"])[0] == 0
    with importable(tmp_path / "qc-even-columns" / "src"):
        check(importlib.import_module("qc_even_columns").EvenColumns())


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["EvenColumns"], "'EvenColumns' is no name of a pass"),
        (["class"], "'class' is no name of a pass"),
        (["none"], "None is a word of Python's own"),
        (["../x"], "'../x' is no name of a pass"),
        (["gptq"], "gptq is a pass of qc already"),
        (["quarot"], "quarot is a preset of qc already"),
        (["best-w4a4"], "'best-w4a4' is no name of a pass"),
        (["mine", "--out", "there"], "there exists"),
        (["mine", "--out", "no/where"], "is no directory"),
    ],
)
def test_what_no_skeleton_is_made_for(
    words: list[str], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    status, said = command(["new-pass", *words])
    assert status == 2
    assert why in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]
