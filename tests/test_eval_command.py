"""``qc eval``: errors of layers, tasks of lm-eval, phases, and what it refuses."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from checkpoints import TINY, WORDS, save_float, save_quantized
from torch import nn

from qc.compiler.cli import main, make_parser
from qc.compiler.commands.eval import tasks_asked
from qc.compiler.layer_error import LayerError, layer_errors, table
from qc.compiler.layer_plot import layer_plot
from qc.compiler.load import load
from qc.compiler.model_card import write_accuracy
from qc.runtime.phase import set_phase

READERS = ("embed", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
TOKENS = torch.arange(3, 43).reshape(2, 20)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(WORDS[3 + i * 7 % 12] for i in range(200)))
    return path


def rotated(model: nn.Module, seed: int = 3) -> nn.Module:
    """The same llama with its hidden states in another basis; its norms have a gain of one."""
    width = TINY["hidden_size"]
    q, _ = torch.linalg.qr(
        torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            wide = weight.double()
            if name.endswith("norm.weight"):
                wide = torch.ones_like(wide)
            elif any(part in name for part in READERS):
                wide = wide @ q
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                wide = q.T @ wide
            weight.copy_(wide)
    return model


def test_layers_of_one_model_do_not_differ_and_rotations_are_taken_back(tmp_path: Path) -> None:
    path = save_float(tmp_path / "float", dtype=torch.float32, vocab_size=96)
    plain = load(path)
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if name.endswith("norm.weight"):
                weight.fill_(1)
    assert all(e.own == e.reached == 0 for e in layer_errors(plain, plain, TOKENS))
    turned = layer_errors(rotated(load(path)), plain, TOKENS)
    assert [e.layer for e in turned] == ["model.layers.0", "model.layers.1"]
    assert all(0 < e.own < 1e-4 and 0 < e.reached < 1e-4 for e in turned)


def test_the_layer_that_is_wrong_is_found(tmp_path: Path) -> None:
    path = save_float(tmp_path / "float", dtype=torch.float32, num_hidden_layers=3)
    good, bad = load(path), load(path)
    with torch.no_grad():
        bad.get_submodule("model.layers.1.mlp.down_proj").get_parameter("weight").mul_(1.5)
    first, second, third = layer_errors(bad, good, TOKENS)
    assert first.own == first.reached == third.own == 0
    assert second.own > 0.01
    assert third.reached > 0


def test_table_and_picture() -> None:
    errors = [LayerError("model.layers.0", 0.02, 0.01), LayerError("model.layers.1", 0.04, 0.03)]
    rows = table(errors).splitlines()
    assert rows[1].split() == ["model.layers.0", "2.000%", "1.000%", "#" * 15]
    assert rows[2].endswith("#" * 30)
    root = ElementTree.fromstring(layer_plot(errors, "a < b"))
    bars = [r for r in root.iter("{http://www.w3.org/2000/svg}rect") if r.get("fill") == "#4477aa"]
    heights = [float(bar.get("height") or 0) for bar in bars]
    assert heights[1] == pytest.approx(2 * heights[0], rel=1e-2)
    assert "a < b" in "".join(root.itertext())


def test_eval_by_layer_with_picture_and_card(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_float(tmp_path / "float")
    path = save_quantized(source, tmp_path / "q", "W8A8_MIX")
    card = path / "README.md"
    card.write_text("# card\n<!-- accuracy: begin -->\nold\n<!-- accuracy: end -->\nend\n")
    words = ["eval", str(path), "--reference", str(source), "--text", str(text), "--length", "32"]
    plot = tmp_path / "layers.svg"
    assert main([*words, "--by", "layer", "--plot", str(plot), "--card"]) == 0
    said = capsys.readouterr().out
    assert "error by layer" in said
    assert "model.layers.1" in said
    assert "<svg" in plot.read_text()
    kept = card.read_text()
    assert said.strip() in kept
    assert "old" not in kept
    assert kept.startswith("# card\n")
    assert kept.endswith("end\n")
    found = []
    for phase in ("prefill", "decode"):
        assert main([*words, "--phase", phase, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["nll"] != found[1]["nll"]
    assert found[0]["reference_nll"] == found[1]["reference_nll"]


def test_phases_follow_a_sequence(tmp_path: Path) -> None:
    path = save_quantized(save_float(tmp_path / "float"), tmp_path / "q", "W8A8_MIX")
    model = load(path)
    ids = TOKENS[:1, :6]

    def run(phase: str, past: object = None) -> tuple[torch.Tensor, object]:
        assert set_phase(model, phase) == 14
        with torch.no_grad():
            out = model(input_ids=ids if past is None else ids[:, :1], past_key_values=past, use_cache=True)
        return out.logits, out.past_key_values

    prefill, past = run("prefill")
    assert not torch.equal(prefill, run("decode")[0])
    assert torch.equal(prefill, run("served")[0])
    step = run("served", past)[0]
    assert torch.equal(step, run("decode", run("prefill")[1])[0])
    with pytest.raises(ValueError, match="unknown phase 'decoding'"):
        set_phase(model, "decoding")


REFUSED = {
    "nothing to measure: give --text FILE, --tasks LIST, or both": [],
    "--text compares with the float model: give --reference MODEL": ["--text", "t"],
    "--plot draws the errors of layers: give --by layer": [
        "--text",
        "t",
        "--reference",
        "r",
        "--plot",
        "p.svg",
    ],
    "--by layer needs a text": ["--by", "layer", "--tasks", "arc_easy"],
    "--limit 0: at least one document": ["--tasks", "arc_easy", "--limit", "0"],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_does_not_go_together_is_refused(reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "out", *REFUSED[reason]]) == 2
    assert reason in capsys.readouterr().err


def test_more_refusals(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_float(tmp_path / "float")
    words = ["eval", str(source), "--reference", str(source), "--text", str(text), "--length", "32"]
    assert main([*words, "--phase", "decode"]) == 2
    assert "no linear of" in capsys.readouterr().err
    (source / "README.md").write_text("mine")
    with pytest.raises(Exception, match="are not there; put them where accuracy is told"):
        write_accuracy(source, "new")


def test_what_can_not_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_float(tmp_path / "float")
    monkeypatch.setattr("qc.compiler.evaluate.measure", lambda *args, **options: pytest.fail("it measured"))
    words = ["eval", str(source), "--reference", str(source), "--text", str(text), "--length", "32"]
    for plot, why in (
        ("p.png", "give a name that ends in .svg"),
        ("no/p.svg", "its directory does not exist"),
    ):
        assert main([*words, "--by", "layer", "--plot", str(tmp_path / plot)]) == 2
        assert why in capsys.readouterr().err
    assert main([*words, "--card"]) == 2
    assert "no README.md to write into" in capsys.readouterr().err


def test_the_command_of_tasks_says_what_is_zero() -> None:
    words = ["eval", "out", "--tasks", "arc_easy", "--shots", "0", "--phase", "decode"]
    assert tasks_asked(make_parser().parse_args(words)) == (
        "`qc eval OUT --tasks arc_easy --shots 0 --phase decode`"
    )


def test_without_the_library_tasks_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qc.compiler.tasks.find_spec", lambda name: None)
    assert main(["eval", "out", "--tasks", "arc_easy"]) == 2
    assert "lm-evaluation-harness, which is not installed; pip install lm-eval" in capsys.readouterr().err


TASK = """
task: qc_words
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: "the cat {{{{word}}}}"
doc_to_target: 0
doc_to_choice: ["sat on a mat", "ran to its dog"]
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.mark.broad
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed (pip install 'qc[tasks]')")
def test_a_task_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    source = save_float(tmp_path / "float")
    path = save_quantized(source, tmp_path / "q", "W8A8_DYNAMIC")
    folder = tmp_path / "own"
    folder.mkdir()
    data = folder / "data.jsonl"
    data.write_text("\n".join(json.dumps({"word": WORDS[3 + i]}) for i in range(8)))
    (folder / "qc_words.yaml").write_text(TASK.format(file=data))
    words = ["eval", str(path), "--tasks", "qc_words", "--include", str(folder)]
    assert main([*words, "--reference", str(source), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (ours,), (theirs,) = found["tasks"], found["reference_tasks"]
    assert ours["task"] == "qc_words"
    assert ours["metric"] == "acc"
    assert 0 <= ours["value"] <= 1
    for score, directory in ((ours, path), (theirs, source)):
        least, most = choice_scores(load(directory))
        assert least <= score["value"] <= most
    assert main([*words[:3], "qc_wrods", *words[4:]]) == 2
    assert "lm-eval knows no task 'qc_wrods'; did you mean qc_words?" in capsys.readouterr().err
    data.unlink()
    assert main(words) == 2
    assert "lm-eval stopped with" in capsys.readouterr().err


def choice_scores(model: nn.Module) -> tuple[float, float]:
    """Least and largest share of documents whose first answer is the likelier, computed without the library.

    Where both answers are within what bfloat16 rounds, either may be.
    """

    def of(answer: str, word: str) -> float:
        ids = [WORDS.index(w) for w in f"the cat {word} {answer}".split()]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        return float(sum(logits[i - 1, ids[i]] for i in range(3, len(ids))))

    margins = [of("sat on a mat", w) - of("ran to its dog", w) for w in WORDS[3:11]]
    assert sum(abs(margin) > 0.25 for margin in margins) >= 4
    return sum(m > 0.25 for m in margins) / len(margins), sum(m > -0.25 for m in margins) / len(margins)
