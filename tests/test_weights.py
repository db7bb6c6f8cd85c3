"""Weights come from disk by parameter name and go back under the names on disk; bad files are refused."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import DENSE, FURTHER
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from qc.compiler.errors import Refused
from qc.compiler.safetensors_io import TensorSpec, read_header
from qc.compiler.weights import Checkpoint

FAMILIES = DENSE | {name: FURTHER[name] for name in ("gpt2", "gemma3", "mixtral", "qwen3_moe")}


def on_meta(config: PretrainedConfig) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def saved(config: PretrainedConfig, path: Path, **options: str) -> nn.Module:
    """A random model, written to ``path`` as transformers writes it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(path, **options)
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    saved(DENSE["llama"](), path)
    return path


@pytest.fixture
def damaged(llama: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be damaged."""
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def open_llama(path: Path) -> Checkpoint:
    return Checkpoint(path, on_meta(DENSE["llama"]()))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_comes_from_disk_and_goes_back(family: str, tmp_path: Path) -> None:
    config = FAMILIES[family]()
    expected = saved(config, tmp_path).state_dict()
    checkpoint = Checkpoint(tmp_path, on_meta(config))
    assert set(checkpoint.names()) == set(expected)
    loaded = checkpoint.load(checkpoint.names())
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == tensor.dtype
    back = checkpoint.to_disk({name: t for name, t in loaded.items() if name not in checkpoint.ties})
    stored = load_file(tmp_path / "model.safetensors")
    assert checkpoint.unused == ()
    assert set(back) == set(stored)
    assert all(torch.equal(back[name], stored[name]) for name in stored)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_stacked_experts_are_planned_one_by_one(family: str, tmp_path: Path) -> None:
    config = FAMILIES[family]()
    saved(config, tmp_path)
    checkpoint = Checkpoint(tmp_path, on_meta(config))
    stack = next(name for name in checkpoint.names() if "experts.gate_up_proj" in name)
    planned = checkpoint.disk_tensors(stack, TensorSpec(torch.float16, checkpoint.shape(stack)))
    header = read_header(tmp_path / "model.safetensors")
    assert len(planned) == 2 * checkpoint.shape(stack)[0]
    for disk, spec in planned.items():
        assert spec == TensorSpec(torch.float16, header[disk].shape)


def test_shards_are_open_while_loading_only(tmp_path: Path) -> None:
    expected = saved(DENSE["llama"](), tmp_path, max_shard_size="60KB").state_dict()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    checkpoint = open_llama(tmp_path)
    before = set(os.listdir("/proc/self/fd"))
    loaded = checkpoint.load(checkpoint.names())
    assert set(os.listdir("/proc/self/fd")) == before
    assert not any(str(tmp_path) in line for line in Path("/proc/self/maps").read_text().splitlines())
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_loaded_tensors_are_nobody_elses(llama: Path) -> None:
    checkpoint = open_llama(llama)
    name = "model.norm.weight"
    checkpoint.load([name])[name].zero_()
    assert not torch.equal(checkpoint.load([name])[name], torch.zeros(64, dtype=torch.bfloat16))


def test_order_and_names_are_those_of_the_request(llama: Path) -> None:
    names = ["lm_head.weight", "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"]
    assert list(open_llama(llama).load(names)) == names


def test_a_missing_base_prefix_is_added_and_kept_on_disk(tmp_path: Path) -> None:
    config = DENSE["opt"]()
    expected = saved(config, tmp_path).state_dict()

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    rewrite(tmp_path, strip)
    checkpoint = Checkpoint(tmp_path, on_meta(config))
    name = "model.decoder.layers.0.fc1.weight"
    assert torch.equal(checkpoint.load([name])[name], expected[name])
    assert checkpoint.disk_name(name) == "decoder.layers.0.fc1.weight"
    assert checkpoint.disk_name(f"{name}_scale") == "decoder.layers.0.fc1.weight_scale"


def test_new_tensors_take_the_names_of_their_neighbours(tmp_path: Path) -> None:
    config = FAMILIES["mixtral"]()
    saved(config, tmp_path)
    checkpoint = Checkpoint(tmp_path, on_meta(config))
    assert checkpoint.disk_name("model.norm.bias") == "model.norm.bias"
    assert list(checkpoint.to_disk({"model.norm.bias": torch.zeros(64)})) == ["model.norm.bias"]
    gate = "model.layers.0.block_sparse_moe.gate"
    assert checkpoint.disk_name("model.layers.0.mlp.gate.weight") == f"{gate}.weight"
    assert checkpoint.disk_name("model.layers.0.mlp.gate.weight_scale") == f"{gate}.weight_scale"


@pytest.mark.parametrize(("family", "head"), [("gpt_neox", "embed_out.weight"), ("cohere", "lm_head.weight")])
def test_an_untied_head_is_written_under_its_name_on_disk(family: str, head: str, tmp_path: Path) -> None:
    config = DENSE[family]()
    config.tie_word_embeddings = True
    saved(config, tmp_path)
    checkpoint = Checkpoint(tmp_path, on_meta(config))
    ((tied, owner),) = checkpoint.ties.items()
    assert tied == "lm_head.weight"
    both = checkpoint.load([tied, owner])
    assert both[tied] is both[owner]
    assert head not in read_header(tmp_path / "model.safetensors")
    assert checkpoint.disk_name(tied) == head
    assert list(checkpoint.to_disk({tied: both[tied]})) == [head]


def test_two_stored_tensors_that_the_config_ties_must_be_equal(tmp_path: Path) -> None:
    config = DENSE["smollm2"]()
    model = saved(config, tmp_path)
    embedding = model.get_parameter("model.embed_tokens.weight").detach()
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    assert Checkpoint(tmp_path, on_meta(config)).ties == {"lm_head.weight": "model.embed_tokens.weight"}
    other = embedding.clone()
    other[3, 4] += 1
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": other}))
    with pytest.raises(Refused, match=r"ties lm_head\.weight to model\.embed_tokens.*tie_word_embeddings"):
        Checkpoint(tmp_path, on_meta(config))


def test_without_a_model_names_are_those_on_disk(llama: Path) -> None:
    checkpoint = Checkpoint(llama)
    stored = load_file(llama / "model.safetensors")
    assert set(checkpoint.names()) == set(stored)
    assert all(torch.equal(t, stored[name]) for name, t in checkpoint.load(stored).items())


def test_an_unknown_name_gets_a_suggestion(llama: Path) -> None:
    with pytest.raises(Refused, match=r"no parameter model\.nrom\.weight; did you mean model\.norm\.weight"):
        open_llama(llama).load(["model.nrom.weight"])


def test_tensors_that_nobody_uses_are_listed(damaged: Path) -> None:
    rewrite(damaged, lambda tensors: tensors.update({"model.mtp.weight": torch.zeros(2)}))
    assert open_llama(damaged).unused == ("model.mtp.weight",)


# -- refusals


def test_no_directory_and_no_config(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no such directory"):
        Checkpoint(tmp_path / "nothing")
    with pytest.raises(Refused, match=r"no config\.json"):
        Checkpoint(tmp_path)


def test_no_weights(damaged: Path) -> None:
    (damaged / "model.safetensors").unlink()
    with pytest.raises(Refused, match=r"no weights: .*model\.safetensors"):
        open_llama(damaged)


def test_pickles_are_refused_with_the_way_out(damaged: Path) -> None:
    (damaged / "model.safetensors").rename(damaged / "pytorch_model.bin")
    with pytest.raises(Refused, match=r"pytorch_model\.bin.*run code.*save_pretrained"):
        open_llama(damaged)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_shard(keep: int, damaged: Path) -> None:
    file = damaged / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    with pytest.raises(Refused, match=r"model\.safetensors: truncated shard.*download it again"):
        open_llama(damaged)


def test_a_shard_that_shrinks_after_opening(damaged: Path) -> None:
    checkpoint = open_llama(damaged)
    os.truncate(damaged / "model.safetensors", 20_000)
    with pytest.raises(Refused, match="truncated shard"):
        checkpoint.load(checkpoint.names())


def test_bytes_after_the_last_tensor(damaged: Path) -> None:
    with (damaged / "model.safetensors").open("ab") as file:
        file.write(b"surplus")
    with pytest.raises(Refused, match="7 bytes follow the last tensor"):
        open_llama(damaged)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{]", "not a valid safetensors header"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "a is float32"),
        (b'{"a": {"dtype": "F3", "shape": [2], "data_offsets": [0, 4]}}', "dtype F3"),
        (b'{"a": {"dtype": "I8", "shape": [2], "data_offsets": [2, 4]}}', "begins at byte"),
        (b'{"a": 1, "a": 2}', "a occurs twice"),
        (b"[]", "not a valid safetensors header"),
    ],
)
def test_damaged_header(header: bytes, message: str, damaged: Path) -> None:
    (damaged / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(Refused, match=message):
        open_llama(damaged)


def test_missing_shard(tmp_path: Path) -> None:
    saved(DENSE["llama"](), tmp_path, max_shard_size="60KB")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(Refused, match=f"shards are missing: {gone.name}"):
        open_llama(tmp_path)


@pytest.mark.parametrize("where", ["../x.safetensors", "/etc/x.safetensors", "sub/../../x.safetensors"])
def test_an_index_that_points_outside(where: str, damaged: Path) -> None:
    index = {"weight_map": dict.fromkeys(read_header(damaged / "model.safetensors"), where)}
    (damaged / "model.safetensors").rename(damaged.parent / "x.safetensors")
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Refused, match=r"index\.json: .* points outside the checkpoint directory"):
        open_llama(damaged)


def test_a_link_that_leads_outside(damaged: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "model.safetensors"
    (damaged / "model.safetensors").rename(outside)
    (damaged / "model.safetensors").symlink_to(outside)
    with pytest.raises(Refused, match=r"is a link to .*outside the checkpoint directory"):
        open_llama(damaged)


def test_the_links_of_the_hub_cache_are_followed(llama: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--somebody--llama"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in llama.iterdir():
        (repository / "blobs" / f"blob-{file.name}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"blob-{file.name}")
    name = "model.norm.weight"
    assert torch.equal(open_llama(snapshot).load([name])[name], open_llama(llama).load([name])[name])


def test_a_stale_index(tmp_path: Path) -> None:
    saved(DENSE["llama"](), tmp_path, max_shard_size="60KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.ghost.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    with pytest.raises(Refused, match=r"model\.ghost\.weight should be in .*the index is stale"):
        open_llama(tmp_path)


def test_one_tensor_in_two_shards(tmp_path: Path) -> None:
    saved(DENSE["llama"](), tmp_path, max_shard_size="60KB")
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    tensors = load_file(second)
    twice = next(iter(read_header(first)))
    tensors[twice] = torch.zeros(1)
    save_file(tensors, second)
    with pytest.raises(Refused, match=f"{twice} is in {first.name} and in {second.name}"):
        open_llama(tmp_path)


def test_a_missing_parameter(damaged: Path) -> None:
    def misname(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.down_porj.weight"] = tensors.pop("model.layers.1.mlp.down_proj.weight")

    rewrite(damaged, misname)
    with pytest.raises(Refused, match=r"1 of \d+ parameters.*down_proj\.weight; did the files.*down_porj"):
        open_llama(damaged)


def test_a_parameter_of_another_shape(damaged: Path) -> None:
    rewrite(damaged, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(65)}))
    with pytest.raises(Refused, match=r"model\.norm\.weight \[65\].*\[64\].*do not belong together"):
        open_llama(damaged)


def test_integers_are_quantized_already(damaged: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    rewrite(damaged, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(Refused, match=r"down_proj\.weight is stored as torch\.int8: .*quantized already"):
        open_llama(damaged)


def test_a_quantization_config(damaged: Path) -> None:
    config = json.loads((damaged / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refused, match=r"quantization_config \(gptq\).*quantized already"):
        open_llama(damaged)


def test_an_expert_that_is_missing(tmp_path: Path) -> None:
    config = FAMILIES["qwen3_moe"]()
    saved(config, tmp_path)
    name = next(n for n in read_header(tmp_path / "model.safetensors") if "experts.1.gate_proj" in n)
    rewrite(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(Refused, match=r"experts\.gate_up_proj"):
        Checkpoint(tmp_path, on_meta(config))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(value: float, damaged: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    rewrite(damaged, lambda tensors: tensors[name].__setitem__((5, 7), value))
    checkpoint = open_llama(damaged)
    loaded = checkpoint.load(["model.norm.weight", name])
    checkpoint.check_finite("model.norm.weight", loaded["model.norm.weight"])
    with pytest.raises(Refused, match=rf"{name} has 1 values.*\[5, 7\].*in model\.safetensors"):
        checkpoint.check_finite(name, loaded[name])
