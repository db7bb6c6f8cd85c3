"""What is written: shards tensor by tensor, and a directory that is there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from qc.compiler.errors import Failed, Refused
from qc.compiler.export import (
    Output,
    check_written,
    copy_side_files,
    exported_config,
    manifest_of,
    write_json,
    write_manifest,
)
from qc.compiler.safetensors_io import DTYPES, GIB, ShardWriter, TensorSpec, plan_shards

SPECS = {
    "a.weight": TensorSpec(torch.int8, (3, 5)),
    "a.weight_scale": TensorSpec(torch.float32, (3, 1)),
    "b": TensorSpec(torch.bfloat16, ()),
    "c": TensorSpec(torch.int64, (0, 4)),
    "d.é": TensorSpec(torch.bool, (7,)),
}


def values(specs: dict[str, TensorSpec], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(0, 2, spec.shape, generator=generator).to(spec.dtype)
        for name, spec in specs.items()
    }


def write(directory: Path, tensors: dict[str, torch.Tensor], order: list[str], size: float = 4) -> None:
    directory.mkdir(exist_ok=True)
    specs = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    with ShardWriter(directory, specs, part_file_size=size) as writer:
        for name in order:
            writer.write(name, tensors[name])


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


# -- shards

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
specs_of = st.dictionaries(
    st.text("abc.é_", min_size=1, max_size=6),
    st.builds(TensorSpec, st.sampled_from(list(DTYPES.values())), shapes),
    min_size=1,
    max_size=6,
)


@given(specs=specs_of, limit=st.integers(1, 400), order=st.randoms(use_true_random=False))
def test_any_order_gives_the_same_files_and_the_library_reads_them(
    specs: dict[str, TensorSpec], limit: int, order, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory, tensors = tmp_path_factory.mktemp("shards"), values(specs)
    names = list(specs)
    write(directory / "a", tensors, names, limit / GIB)
    order.shuffle(names)
    write(directory / "b", tensors, names, limit / GIB)
    assert contents(directory / "a") == contents(directory / "b")
    index = json.loads((directory / "a" / "quant_model_weights.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(t.numel() * t.element_size() for t in tensors.values())}
    assert set(index["weight_map"]) == set(specs)
    for name, file in index["weight_map"].items():
        with safe_open(directory / "a" / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            read = opened.get_tensor(name)
        assert read.dtype == tensors[name].dtype
        assert torch.equal(read.to(torch.float32), tensors[name].to(torch.float32))


@given(specs=specs_of, limit=st.integers(1, 400))
def test_shards_keep_the_order_and_the_limit(specs: dict[str, TensorSpec], limit: int) -> None:
    shards = plan_shards(specs, limit)
    assert [name for shard in shards for name in shard] == list(specs)
    for shard, following in zip(shards, (*shards[1:], ()), strict=True):
        size = sum(specs[name].nbytes for name in shard)
        assert size <= limit or sum(specs[name].nbytes > 0 for name in shard) == 1
        assert not following or size + specs[following[0]].nbytes > limit


def test_names_and_number_of_shards(tmp_path: Path) -> None:
    write(tmp_path, values(SPECS), list(SPECS), 24 / GIB)
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == [
        "quant_model_weights-00001-of-00002.safetensors",
        "quant_model_weights-00002-of-00002.safetensors",
    ]
    check_written(tmp_path, SPECS)


def test_every_tensor_is_aligned_to_its_own_size(tmp_path: Path) -> None:
    write(tmp_path, values(SPECS), list(SPECS))
    raw = (tmp_path / "quant_model_weights-00001-of-00001.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    for name, spec in SPECS.items():
        assert header[name]["data_offsets"][0] % spec.dtype.itemsize == 0


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("z", torch.zeros(1), "z was not announced"),
        ("a.weight", torch.zeros(3, 5), r"a\.weight is float32\[3, 5\], but int8\[3, 5\] was announced"),
        ("a.weight", torch.zeros(5, 3, dtype=torch.int8), r"int8\[5, 3\], but int8\[3, 5\]"),
    ],
)
def test_a_tensor_that_is_not_as_announced(
    name: str, tensor: torch.Tensor, message: str, tmp_path: Path
) -> None:
    with pytest.raises(Failed, match=message):
        ShardWriter(tmp_path, SPECS).write(name, tensor)


def test_twice_and_never(tmp_path: Path) -> None:
    tensors = values(SPECS)
    writer = ShardWriter(tmp_path, SPECS)
    writer.write("b", tensors["b"])
    with pytest.raises(Failed, match="b is written twice"):
        writer.write("b", tensors["b"])
    with pytest.raises(Failed, match=r"4 announced tensors were never written, among them a\.weight"):
        writer.close()


def test_a_view_is_written_as_it_looks(tmp_path: Path) -> None:
    whole = torch.arange(24, dtype=torch.float32).view(4, 6)
    write(tmp_path, {"t": whole.t()[1:3]}, ["t"])
    assert torch.equal(load_file(next(tmp_path.glob("*.safetensors")))["t"], whole.t()[1:3])


def test_what_was_written_is_compared_with_the_plan(tmp_path: Path) -> None:
    write(tmp_path, values(SPECS), list(SPECS))
    with pytest.raises(Failed, match="e is None, planned was"):
        check_written(tmp_path, SPECS | {"e": TensorSpec(torch.int8, (1,))})
    with pytest.raises(Failed, match=r"b is bfloat16\[\], planned was float16\[\]"):
        check_written(tmp_path, SPECS | {"b": TensorSpec(torch.float16, ())})
    with pytest.raises(Failed, match=r"a\.weight is .*planned was None"):
        check_written(tmp_path, {name: spec for name, spec in SPECS.items() if name != "a.weight"})


# -- the directory


def finished(out: Path, text: str = "new", force: bool = False) -> Path:
    with Output(out, force=force) as output:
        (output.path / "config.json").write_text(text)
        (output.path / "model.safetensors").write_text(text)
        assert not (out / "config.json").exists() or (out / "config.json").read_text() != text
    return out


def test_the_directory_appears_at_the_end_and_alone(tmp_path: Path) -> None:
    out = finished(tmp_path / "deep" / "out")
    assert (out / "config.json").read_text() == "new"
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def stop_with(error: BaseException, out: Path, force: bool = False) -> None:
    with Output(out, force=force) as output:
        (output.path / "config.json").write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error):
        stop_with(error(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_exception_leaves_the_old_output(tmp_path: Path) -> None:
    out = finished(tmp_path / "out", "old")
    with pytest.raises(ValueError, match="stop"):
        stop_with(ValueError("stop"), out, force=True)
    assert (out / "config.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(number, signal.SIG_DFL)  # nohup ignores SIGHUP
        try:
            with Output(tmp_path / "out") as output:
                (output.path / "half").write_text("half")
                os.write(writer, b"ready")
                time.sleep(60)
        except SystemExit as stopped:
            os._exit(int(stopped.code or 0))
        os._exit(0)
    assert os.read(reader, 5) == b"ready"
    assert len(list(tmp_path.iterdir())) == 1
    os.kill(child, number)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + number
    assert list(tmp_path.iterdir()) == []


def test_what_killed_processes_left_is_removed_and_what_others_work_on_is_not(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    ends = {}
    for _ in range(2):
        child = os.fork()
        if child == 0:
            with Output(tmp_path / "out") as output:
                (output.path / "half").write_text("half")
                os.write(writer, f"{output.path.name}\n".encode())
                time.sleep(60)
            os._exit(0)
        ends[child] = os.read(reader, 999).decode().strip()
    dead, alive = ends
    os.kill(dead, signal.SIGKILL)
    os.waitpid(dead, 0)
    others = {"out.partial-elsewhere-7", "out.partial-", "out.partial-notes", "outer.partial-1"}
    for name in others:
        (tmp_path / name).mkdir()
    assert {p.name for p in tmp_path.iterdir()} == others | set(ends.values())
    with Output(tmp_path / "out") as output:
        (output.path / "config.json").write_text("new")
    assert output.removed == (ends[dead],)
    assert {p.name for p in tmp_path.iterdir()} == others | {ends[alive], "out"}
    os.kill(alive, signal.SIGKILL)
    os.waitpid(alive, 0)


@pytest.mark.parametrize("below", ["file", "file/deeper"])
def test_a_place_below_what_is_no_directory(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(Refused, match=f"{tmp_path / 'file'} is not a directory"):
        Output(tmp_path / below / "out").check()


def test_a_place_that_is_not_writable_or_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match=r"1000000000.000 GB are to be written and .* GB are free"):
        Output(tmp_path / "out").check(nbytes=10**18)
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)  # root may write anywhere
    with pytest.raises(Refused, match=f"{tmp_path} is not writable"):
        Output(tmp_path / "new" / "out").check()


def test_signal_handlers_are_given_back(tmp_path: Path) -> None:
    finished(tmp_path / "out")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_existing_output_needs_force(tmp_path: Path) -> None:
    out = finished(tmp_path / "out", "old")
    with pytest.raises(Refused, match=r"exists and is not empty; pass --force"):
        finished(out)
    assert (finished(out, force=True) / "config.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_directory_needs_no_force(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert (finished(tmp_path / "out") / "config.json").exists()


def test_force_does_not_replace_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(Refused, match="neither an output of qc nor a model checkpoint"):
        finished(tmp_path / "out", force=True)
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_a_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(Refused, match="not a directory"):
        finished(tmp_path / "out", force=True)


def test_the_input_is_not_replaced(tmp_path: Path) -> None:
    model = finished(tmp_path / "models" / "m", "input")
    for out in (model, tmp_path / "models"):
        with pytest.raises(Refused, match="is or contains the input"):
            Output(out, force=True, inputs=[model]).check()
    with pytest.raises(Refused, match="is inside the input"):
        Output(model / "quantized", inputs=[model]).check()
    Output(tmp_path / "models" / "quantized", inputs=[model]).check()


def test_replacing_without_the_exchange_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = finished(tmp_path / "out", "old")
    monkeypatch.setattr("ctypes.CDLL", lambda *args, **options: object())
    assert (finished(out, force=True) / "config.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# -- what stands beside the weights

SIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "merges.txt",
)
LEFT = (
    "config.json", "model.safetensors", "model.safetensors.index.json", "quantize_config.json", "README.md",
    "quant_model_description.json", "qc_manifest.json", "run.json", "pytorch_model.bin",
)  # fmt: skip


@pytest.mark.parametrize("trusted", [False, True])
def test_side_files(trusted: bool, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    for name in (*SIDE, *LEFT, "modeling_x.py", "tokenizer.model", "tokenization_x.py"):
        (source / name).write_text(name)
    (source / "tokenizer_folder").mkdir()
    expected = {*SIDE, "tokenizer.model"} | ({"modeling_x.py", "tokenization_x.py"} if trusted else set())
    assert set(copy_side_files(source, out, trusted)) == expected
    assert {p.name for p in out.iterdir()} == expected
    assert (out / "merges.txt").read_text() == "merges.txt"


def test_a_side_file_that_links_outside(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(Refused, match=r"tokenizer\.json is a link"):
        copy_side_files(tmp_path / "source", tmp_path)


@pytest.mark.parametrize("keys", [("dtype",), ("torch_dtype",), ("dtype", "torch_dtype"), ()])
def test_the_config_says_the_new_dtype_where_it_said_the_old(keys: tuple[str, ...]) -> None:
    config = {"hidden_size": 8, **dict.fromkeys(keys, "float32")}
    exported = exported_config(config, torch.bfloat16)
    assert {key: exported[key] for key in keys or ("torch_dtype",)} == dict.fromkeys(
        keys or ("torch_dtype",), "bfloat16"
    )
    assert exported["hidden_size"] == 8
    assert len(exported) == 1 + max(1, len(keys))
    assert config == {"hidden_size": 8, **dict.fromkeys(keys, "float32")}


def test_the_config_loses_what_no_longer_holds() -> None:
    config = {
        "quantization_config": {"quant_method": "x"}, "tie_word_embeddings": True, "auto_map": {"A": "b.C"},
        "text_config": {"quantization_config": {}, "dtype": "float32", "tie_word_embeddings": True},
    }  # fmt: skip
    exported = exported_config(config, torch.float16, tied=False)
    assert exported == {
        "tie_word_embeddings": False,
        "text_config": {"dtype": "float16", "tie_word_embeddings": False},
        "torch_dtype": "float16",
    }
    assert "auto_map" in exported_config(config, torch.float16, remote_code=True)
    assert exported_config({}, torch.float16, tied=False)["tie_word_embeddings"] is False
    assert exported_config(config, torch.float16)["tie_word_embeddings"] is True


def test_the_manifest_hashes_inputs_and_outputs_but_not_what_varies(tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(b"weights")
    manifests = []
    for times in ("1 s", "2 s"):
        out = tmp_path / f"out {times}"
        out.mkdir()
        write_json(out / "config.json", {"a": 1})
        write_json(out / "run.json", {"seconds": times})
        made = manifest_of(out, {"model.safetensors": tmp_path / "input"}, "plan\ntext", {"fuse_norms": 3})
        (out / "report.html").write_text("made since")
        write_manifest(out, made)
        manifests.append((out / "qc_manifest.json").read_bytes())
    assert manifests[0] == manifests[1]
    manifest = json.loads(manifests[0])
    assert manifest["plan"] == "plan\ntext"
    assert manifest["inputs"]["model.safetensors"]["sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert list(manifest["outputs"]) == ["config.json", "report.html"]
    assert str(tmp_path) not in manifests[0].decode()
