"""Mixed calibration sets: published formats are read, draws are balanced and repeatable, wrong input is named."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qc.compiler.calib_answers import ModelAnswers
from qc.compiler.calib_mix import PATIENCE, Mix, mix, parse_sizes, read_config
from qc.compiler.calib_readers.boolq import Boolq
from qc.compiler.calib_readers.ceval import Ceval
from qc.compiler.calib_readers.gsm8k import Gsm8k
from qc.compiler.calib_readers.mmlu import Mmlu
from qc.compiler.calib_readers.question import Question, Reader, TooLong
from qc.compiler.calibration import read_texts
from qc.compiler.cli import main
from qc.compiler.errors import Refused

SETS = Path(__file__).parent / "data_sets"


@dataclass
class Says:
    """A model that always says the same."""

    said: str
    asked: int = 0

    def likeliest(self, prompt: str, choices: Sequence[str]) -> str:
        self.asked += 1
        return self.said

    def continued(self, prompt: str, longest: int) -> str:
        self.asked += 1
        return self.said


def test_boolq_is_a_passage_a_question_and_yes_or_no() -> None:
    questions = Boolq().read(SETS / "boolq" / "dev.jsonl")
    assert len(questions) == 8
    assert questions == Boolq().read(SETS / "boolq")  # a directory with the file in it
    assert questions[1].prompt.startswith("kites -- A kite is")
    assert questions[1].prompt.endswith("\nQuestion: is a kite made of stone?\nAnswer:")
    assert (questions[1].answer, questions[1].choices) == ("no", ("yes", "no"))


def test_ceval_asks_after_five_solved_questions_of_the_subject() -> None:
    questions = Ceval().read(SETS / "ceval")
    assert Counter(q.subject for q in questions) == {"advanced_mathematics": 3, "middle_school_geography": 3}
    first = questions[0]
    assert first.prompt.count("Answer:") == 6
    assert first.prompt.startswith("以下是中国关于advanced mathematics考试")
    assert first.prompt.endswith("7 * 7 = ____\nA. 48\nB. 49\nC. 50\nD. 51\nAnswer:")
    assert first.answer == "B"
    with pytest.raises(Refused, match="5 solved questions, and shots is 6: choose shots <= 5"):
        Ceval(shots=6).read(SETS / "ceval")


def test_mmlu_has_no_header_and_quotes_as_csv_does() -> None:
    questions = Mmlu().read(SETS / "mmlu")
    assert [q.answer for q in questions] == ["B", "C", "D", "B", "C", "D"]
    assert questions[3].prompt.startswith('"Not (A and B)" is the same as\nA. A and B\n')
    shot = Mmlu(shots=1).read(SETS / "mmlu")[0].prompt
    assert shot.startswith(
        "The following are multiple choice questions (with answers) about astronomy.\n\nWhich"
    )


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("1,200 - 450 = 750", True),
        ("So it is 750.00 seats.\nQuestion: what is 9?", True),
        ("#### 750\nand then 3", True),
        ("There are 750 or 751", False),
        ("none", False),
    ],
)
def test_gsm8k_looks_at_the_result(said: str, right: bool) -> None:
    questions = Gsm8k().read(SETS / "gsm8k" / "train.jsonl")
    assert [q.answer for q in questions] == ["12", "750", "10", "2000"]
    assert Gsm8k().right(questions[1], Says(said)) is right


def sizes(**named: int) -> dict[str, int]:
    return named


def test_a_mix_is_balanced_repeatable_and_read_as_calibration_text(tmp_path: Path) -> None:
    asked = sizes(boolq=4, ceval_5_shot=4, gsm8k=2, mmlu=4)
    one = mix(SETS / "mix.json", asked, tmp_path / "one.jsonl")
    mix(SETS / "mix.json", asked, tmp_path / "two.jsonl")
    other = mix(SETS / "mix.json", asked, tmp_path / "three.jsonl", seed=1)
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    assert one.samples != other.samples
    assert Counter(s["dataset"] for s in one.samples) == asked
    assert Counter(s["ans"] for s in one.samples if s["dataset"] == "boolq") == {"yes": 2, "no": 2}
    for name in ("ceval_5_shot", "mmlu"):
        assert set(Counter(s["subject"] for s in one.samples if s["dataset"] == name).values()) == {2}
        assert max(Counter(s["ans"] for s in one.samples if s["dataset"] == name).values()) == 2
    assert read_texts([tmp_path / "one.jsonl"]) == [s["prompt"] for s in one.samples]
    whole = mix(SETS / "mix.json", asked, tmp_path / "four.json")
    assert json.loads((tmp_path / "four.json").read_text(encoding="utf-8")) == list(whole.samples)


def test_what_is_drawn_of_one_set_does_not_depend_on_the_others(tmp_path: Path) -> None:
    alone = mix(SETS / "mix.json", sizes(boolq=3), tmp_path / "a.jsonl")
    beside = mix(SETS / "mix.json", sizes(gsm8k=2, boolq=3), tmp_path / "b.jsonl")
    prompts = [{s["prompt"] for s in found.samples if s["dataset"] == "boolq"} for found in (alone, beside)]
    assert prompts[0] == prompts[1]


def test_only_questions_that_the_model_answers_right(tmp_path: Path) -> None:
    model = Says("yes")
    found = mix(SETS / "mix.json", sizes(boolq=4), tmp_path / "a.jsonl", positive=model)
    assert {s["ans"] for s in found.samples} == {"yes"}
    assert found.sets[0].asked == model.asked > 4
    assert str(found.sets[0]) == f"boolq: 4 of 8 (4 yes), the model was asked {model.asked}"
    with pytest.raises(Refused, match=r"the model answers 4 of the 8 questions right .*choose at most 4"):
        mix(SETS / "mix.json", sizes(boolq=5), tmp_path / "b.jsonl", positive=Says("yes"))
    with pytest.raises(Refused, match=r"answers 0 of the 4 questions right .*leave the set out"):
        mix(SETS / "mix.json", sizes(gsm8k=1), tmp_path / "b.jsonl", positive=Says("I do not know"))
    assert not (tmp_path / "b.jsonl").exists()


@dataclass(frozen=True, kw_only=True)
class Lines(Reader):
    """Many questions with one answer each way."""

    def read(self, path: Path) -> list[Question]:
        return [Question(f"{i}?", "no" if i % 2 else "yes", ("yes", "no")) for i in range(2000)]


def test_an_answer_that_is_never_right_is_given_up(tmp_path: Path) -> None:
    model = Says("yes")
    found = mix(
        {"lines": SETS}, sizes(lines=20), tmp_path / "a.jsonl", positive=model, readers={"lines": Lines()}
    )
    assert len(found.samples) == 20
    assert model.asked == 20 + PATIENCE


@dataclass
class Short(Says):
    """A model that can be asked questions of few characters."""

    longest: int = 0

    def likeliest(self, prompt: str, choices: Sequence[str]) -> str:
        if len(prompt) > self.longest:
            raise TooLong
        return super().likeliest(prompt, choices)


def test_questions_that_are_too_long_are_counted_and_not_wrong(tmp_path: Path) -> None:
    def of(size: int, longest: int) -> Mix:
        return mix(
            {"lines": SETS}, sizes(lines=size), tmp_path / f"{size}-{longest}.jsonl", force=True,
            positive=Short("yes", longest=longest), readers={"lines": Lines()},
        )  # fmt: skip

    (found,) = of(20, 4).sets
    assert found.asked == 20 + PATIENCE
    assert found.too_long > PATIENCE / 2
    assert str(found).endswith(
        f"the model was asked {found.asked}, {found.too_long} more are too long for it"
    )
    (found,) = of(3, 2).sets  # 0? to 9?: an answer that is mostly too long is not given up
    assert found.too_long > 2 * PATIENCE
    with pytest.raises(
        Refused, match=r"answers 5 of the 10 questions right .*, and 1990 are longer than it has"
    ):
        of(6, 2)
    with pytest.raises(
        Refused, match=r"was asked none of the questions: 2000 are longer .*; leave the set out"
    ):
        of(1, 0)


def test_a_reader_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(
        json.dumps({"configurations": [{"dataset_name": "mine", "dataset_path": "."}]}), encoding="utf-8"
    )
    found = mix(tmp_path / "mine.json", sizes(mine=4), tmp_path / "a.jsonl", readers={"mine": Lines()})
    assert Counter(s["ans"] for s in found.samples) == {"yes": 2, "no": 2}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "line 1: not readable as JSON"),
        ("[]", "expected .*this is \\[\\]"),
        ('{"sets": []}', "this is an object with sets"),
        ('{"configurations": [3]}', r"configurations\[1\]: expected an object .*this is 3"),
        ('{"configurations": [{"dataset_name": "boolq"}]}', "no dataset_path; it has dataset_name"),
        ('{"configurations": [{"dataset_name": "bolq", "dataset_path": "."}]}', "'bolq'; did you mean boolq"),
        ('{"configurations": [{"dataset_name": "mmlu", "dataset_path": ".", "shot": 1}]}', "'shot'.*mmlu has shots"),
        ('{"configurations": [{"dataset_name": "mmlu", "dataset_path": ".", "shots": "1"}]}', 'shots is "1"'),
        (
            '{"configurations": [{"dataset_name": "a", "reader": "mmlu", "dataset_path": "."},'
            ' {"dataset_name": "a", "reader": "boolq", "dataset_path": "."}]}',
            "two sets 'a'",
        ),
    ],
)  # fmt: skip
def test_a_wrong_config_is_refused(content: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "mix.json").write_text(content, encoding="utf-8")
    with pytest.raises(Refused, match=why) as refusal:
        read_config(tmp_path / "mix.json")
    assert "mix.json" in str(refusal.value)


@pytest.mark.parametrize(
    ("reader", "file", "content", "why"),
    [
        (Boolq(), "a.jsonl", '{"inputs_pretokenized": "x", "id": 1}', "line 1: .*has inputs_pretokenized, id"),
        (Boolq(), "a.jsonl", '{"question": "x", "passage": "y", "answer": "yes"}', 'this answer is "yes"'),
        (Boolq(), "a.jsonl", "question,passage", "line 1: not readable as JSON"),
        (Boolq(), "a.jsonl", '{"question": "x", "passage": null, "answer": true}', "this passage is null"),
        (Boolq(), "a.jsonl", '{"question": "\\ud83d", "passage": "y", "answer": true}', r"line 1: half of .*ud83d"),
        (Boolq(), "a.jsonl", "[1]", r"this is \[1\]"),
        (Gsm8k(), "a.jsonl", '{"question": "x", "answer": "It is 4"}', "ends in 'It is 4'"),
        (Mmlu(), "val/law_val.csv", "question,A,B,C,D,answer\n", "row 1: .*6 columns"),
        (Mmlu(), "val/law_val.csv", "What?,a,b,c,A\n", "row 1: .*5 columns"),
        (Mmlu(), "val/law_val.csv", '"' + "What?,a,b,c,d,A\n" * 9000, "not readable as CSV .*larger than"),
        (Mmlu(), "all/test.parquet", "PAR1", "it holds all/"),
        (Mmlu(), "test-00000.parquet", "PAR1", "Parquet is not read"),
        (Ceval(), "val/law_val.csv", "What?,a,b,c,d,A\n", "the first row is What"),
    ],
)  # fmt: skip
def test_a_set_that_does_not_look_like_its_kind_is_refused(
    reader: Reader, file: str, content: str, why: str, tmp_path: Path
) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(content, encoding="utf-8")
    with pytest.raises(Refused, match=why):
        reader.read(path if file.endswith("jsonl") else tmp_path)


@dataclass(frozen=True, kw_only=True)
class Column(Reader):
    """A reader that cannot do without an option."""

    column: str

    def read(self, path: Path) -> list[Question]:
        return []


def test_a_set_without_questions_and_a_reader_without_its_options_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(Refused, match=r"set boolq: .*empty.jsonl holds no question"):
        mix({"boolq": tmp_path / "empty.jsonl"}, sizes(boolq=1), out)
    with pytest.raises(Refused, match="no data sets"):
        mix({}, {}, out)
    config = tmp_path / "mix.json"
    config.write_text(
        json.dumps({"configurations": [{"dataset_name": "mine", "dataset_path": ".", "column": "b"}]}),
        encoding="utf-8",
    )
    with pytest.raises(Refused, match=r"column: the reader 'mine' that was given has its options already"):
        read_config(config, {"mine": Column(column="a")})
    monkeypatch.setattr("qc.compiler.calib_mix.registry.names", lambda group: {"mine": None})
    monkeypatch.setattr("qc.compiler.calib_mix.registry.get", lambda group, name: Column)
    assert read_config(config)["mine"].reader == Column(column="b")
    with pytest.raises(Refused, match="mine: no column, which the reader mine needs"):
        mix({"mine": tmp_path}, sizes(mine=1), out)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"sizes": {"boolq": 9}}, "dev.jsonl has 8 questions; choose at most 8"),
        ({"sizes": {"bolq": 1}}, "unknown set 'bolq'; did you mean boolq"),
        ({"sizes": {"boolq": 0}}, "at least 1"),
        ({"sizes": {}}, "no sizes"),
        ({"out": "a.txt"}, "written as .jsonl or .json"),
        ({"out": "no/a.jsonl"}, "there is no directory"),
        ({"out": "boolq/dev.jsonl", "force": True}, "this is an input"),
        ({"out": "mix.json"}, "this is an input"),
        ({"out": "gsm8k/train.jsonl"}, "it exists; pass --force"),
    ],
)
def test_what_cannot_be_done_is_refused(given: dict[str, Any], why: str, tmp_path: Path) -> None:
    shutil.copytree(SETS, tmp_path / "sets")
    out = tmp_path / "sets" / given.pop("out", "a.jsonl")
    with pytest.raises(Refused, match=why):
        mix(tmp_path / "sets" / "mix.json", given.pop("sizes", {"boolq": 1}), out, **given)
    assert not (tmp_path / "sets" / "a.jsonl").exists()


def test_sizes_are_read_from_words() -> None:
    assert parse_sizes(["boolq=4,gsm8k=3", "mmlu=2"]) == {"boolq": 4, "gsm8k": 3, "mmlu": 2}
    for words, why in (
        (["boolq"], "boolq=4,gsm8k=3"),
        (["a=1,a=2"], "given twice"),
        (["a=-1"], "give names"),
    ):
        with pytest.raises(Refused, match=why):
            parse_sizes(words)


def test_a_model_chooses_by_log_likelihood(checkpoint: Callable[[str], Path]) -> None:
    import torch

    model = ModelAnswers(checkpoint("llama"))
    prompt, choices = "the quick brown fox", ("a", "b", "cat")

    def log_likelihood(choice: str) -> float:
        ids = torch.tensor([model.tokenizer(f"{prompt} {choice}")["input_ids"]])
        with torch.no_grad():
            scores = model.model(input_ids=ids).logits[0].float().log_softmax(-1)
        start = len(model.tokenizer(f"{prompt} ")["input_ids"])
        return sum(float(scores[i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))

    for offered in (choices, choices[:2]):
        assert model.likeliest(prompt, offered) == max(offered, key=log_likelihood)
    assert model.continued(prompt, 4) == model.continued(prompt, 4)
    model.model.config.max_position_embeddings = len(model.tokenizer(prompt)["input_ids"]) + 3
    assert model.continued(prompt, 3)
    with pytest.raises(TooLong, match=r"tokens, and .* positions"):
        model.continued(prompt, 4)
    with pytest.raises(TooLong):
        model.likeliest(prompt, choices)


@pytest.mark.broad
def test_the_command(
    checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "mix.jsonl")
    asked = ["calib", "mix", "--config", str(SETS / "mix.json"), "--out", out]
    assert main([*asked, "--size", "boolq=2,mmlu=2"]) == 0
    assert f"wrote {out}: 4 samples" in capsys.readouterr().out
    assert main([*asked, "--size", "boolq=2"]) == 2
    assert "pass --force" in capsys.readouterr().err
    short = [{"question": "is it", "passage": "a fox", "answer": right} for right in (True, False) * 4]
    (tmp_path / "boolq.jsonl").write_text("\n".join(map(json.dumps, short)), encoding="utf-8")
    config = {"configurations": [{"dataset_name": "boolq", "dataset_path": "boolq.jsonl"}]}
    (tmp_path / "mix.json").write_text(json.dumps(config), encoding="utf-8")
    asked = ["calib", "mix", "--config", str(tmp_path / "mix.json"), "--out", out, "--force"]
    assert main([*asked, "--size", "boolq=2", "--positive", str(checkpoint("llama"))]) == 0
    assert "the model was asked" in capsys.readouterr().out
