"""What a target refuses, on plain data: every rule has a plan that breaks it and one that keeps it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qc.compiler.errors import Refused
from qc.compiler.operand import Kronecker
from qc.compiler.safetensors_io import TensorSpec
from qc.compiler.scheme import (
    FLOAT,
    W4A4,
    W4A8,
    W4A16,
    W4A16_G64,
    W8A8,
    W8A8_STATIC,
    W8A16,
    Int,
    LinearScheme,
)
from qc.compiler.targets.modelslim import MODELSLIM
from qc.compiler.targets.served import Heads, LinearSite, ModelFacts, NormBias
from qc.compiler.targets.target import Problem, SameNames, told
from qc.compiler.targets.vllm_ascend import VLLM_ASCEND

MODEL = ModelFacts(torch.bfloat16, attentions=(Heads(8, 2, 16),))
LAYER = "model.layers.0"
QKV = tuple(f"{LAYER}.self_attn.{n}_proj" for n in "qkv")
GATED = (f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.up_proj")


def layer(scheme: LinearScheme = W8A8, parallel: bool = False) -> dict[str, LinearSite]:
    """A Llama layer; with ``parallel``, attention and MLP read one norm."""
    together = {name: QKV + GATED if parallel else group for group in (QKV, GATED) for name in group}
    sizes = dict(zip(QKV, (128, 32, 32), strict=True)) | dict.fromkeys(GATED, 256)
    sites = {
        name: LinearSite(name, 128, size, scheme, reads_with=tuple(n for n in together[name] if n != name))
        for name, size in sizes.items()
    }
    down, o = f"{LAYER}.mlp.down_proj", f"{LAYER}.self_attn.o_proj"
    sites[down] = LinearSite(down, 256, 128, scheme, row_parallel=True)
    sites[o] = LinearSite(o, 128, 128, scheme, row_parallel=True)
    return sites


def having(sites: dict[str, LinearSite], name: str, **changes: object) -> list[LinearSite]:
    return [replace(s, **changes) if s.name == name else s for s in sites.values()]  # pyright: ignore[reportArgumentType]


def rules(sites: list[LinearSite], model: ModelFacts = MODEL) -> list[tuple[str, str]]:
    return [(p.rule, p.site) for p in VLLM_ASCEND.check(sites, model)]


@pytest.mark.parametrize("scheme", [FLOAT, W8A8, W8A8_STATIC, W8A16, W4A4])
def test_what_is_served_alike_everywhere_has_no_problem(scheme: LinearScheme) -> None:
    assert rules(list(layer(scheme).values())) == []


@pytest.mark.parametrize(
    ("scheme", "served", "sayable"),
    [
        (W8A8, "W8A8_DYNAMIC", "W8A8_DYNAMIC"),
        (W8A8_STATIC, "W8A8", "W8A8"),
        (W8A16, "W8A16", "W8A16"),
        (W4A4, "W4A4_DYNAMIC", "W4A4_DYNAMIC"),
        (W4A16, None, "W4A16"),
        (W4A16_G64, None, "W4A16"),
        (LinearScheme(Int(4, "group", 64), Int(4, "token")), None, "W4A4_DYNAMIC"),
        (LinearScheme(Int(8, "group", 64), Int(8, "tensor")), None, None),
        (W4A8, "W4A8_DYNAMIC", "W4A8_DYNAMIC"),
        (LinearScheme(Int(4, "group", 64), Int(8, "token")), None, None),
        (LinearScheme(Int(8, "channel", symmetric=False)), "W8A16", "W8A16"),
        (LinearScheme(Int(8, "channel", symmetric=False), Int(8, "token")), None, "W8A8_DYNAMIC"),
        (FLOAT, None, None),
    ],
)
def test_formats(scheme: LinearScheme, served: str | None, sayable: str | None) -> None:
    found = [target.format_of(scheme, False) for target in (VLLM_ASCEND, MODELSLIM)]
    assert [None if f is None else f.type for f in found] == [served, sayable]


def test_only_int4_readers_rotate_online() -> None:
    formats = {s: VLLM_ASCEND.format_of(s, True) for s in (FLOAT, W8A8, W8A8_STATIC, W8A16, W4A4)}
    assert {s for s, f in formats.items() if f is not None} == {W4A4}
    down = f"{LAYER}.mlp.down_proj"
    rotated = {"rotated": True, "split": (16, 16)}
    assert rules(having(layer(W4A4), down, **rotated)) == []
    (problem,) = VLLM_ASCEND.check(having(layer(W8A8), down, **rotated), MODEL)
    assert (problem.rule, problem.site) == ("rotation", down)
    assert "w4a4" in problem.fix
    assert "exclude it from online_rotation" in problem.fix


@pytest.mark.parametrize(
    ("scheme", "rule", "told_of"),
    [
        (W4A16, "type", "W4A16"),
        (W4A16_G64, "group", "group of 64"),
        (W4A8, "dense", "W4A8"),
        (LinearScheme(Int(4, "channel"), Int(8, "tensor")), "type", "W4A8"),
    ],
)
def test_schemes_that_the_server_has_no_linear_for(scheme: LinearScheme, rule: str, told_of: str) -> None:
    sites = list(layer(scheme).values())
    problems = VLLM_ASCEND.check(sites, MODEL)
    assert {(p.rule, p.site) for p in problems} == {(rule, site.name) for site in sites}
    assert all(told_of in p.message for p in problems)
    assert len(told(problems)) == 1


@pytest.mark.parametrize("group", [QKV, GATED])
def test_linears_that_are_served_as_one_have_one_type(group: tuple[str, ...]) -> None:
    for name in group:
        found = VLLM_ASCEND.check(having(layer(), name, scheme=W4A4), MODEL)
        assert [(p.rule, p.site) for p in found] == [("fused", group[0])]
        assert f"{name.rpartition('.')[2]} is W4A4_DYNAMIC" in found[0].message
        assert rules(having(layer(), name, scheme=FLOAT)) == [("fused", group[0])]


def test_linears_that_are_served_as_one_have_one_scheme_and_one_rotation() -> None:
    narrow = LinearScheme(Int(8, "channel"), Int(8, "tensor"))
    assert VLLM_ASCEND.format_of(narrow, False) is VLLM_ASCEND.format_of(W8A8_STATIC, False)
    (found,) = VLLM_ASCEND.check(having(layer(W8A8_STATIC), QKV[1], scheme=narrow), MODEL)
    assert (found.rule, found.site) == ("fused", QKV[0])
    assert (
        "q_proj is W8A8 (int8/channel, int8/tensor/asym), k_proj is W8A8 (int8/channel, int8/tensor),"
        in found.message
    )
    rotated = {"rotated": True, "split": (8, 16)}
    same = [
        replace(site, **rotated, rotation=Kronecker(8, 16, 0, torch.bfloat16)) if site.name in GATED else site
        for site in layer(W4A4).values()
    ]
    assert rules(same) == []
    other = {site.name: site for site in same}
    mixed = having(other, GATED[1], rotation=Kronecker(8, 16, 1, torch.bfloat16))
    (found,) = VLLM_ASCEND.check(mixed, MODEL)
    assert (found.rule, found.site) == ("fused", GATED[0])
    assert "gate_proj is rotated by 8x16 of seed 0, up_proj is rotated by 8x16 of seed 1" in found.message
    assert MODELSLIM.check(mixed, MODEL) == ()
    assert VLLM_ASCEND.run_as_one(same) == dict.fromkeys(QKV, QKV[0]) | dict.fromkeys(GATED, GATED[0])


def test_linears_of_two_modules_that_read_one_value_may_differ() -> None:
    sites = layer(parallel=True)
    mixed = [replace(s, scheme=W4A4) if s.name in GATED else s for s in sites.values()]
    assert rules(mixed) == []


def test_a_float_weight_whose_name_begins_with_a_quantized_one() -> None:
    router = LinearSite(f"{LAYER}.mlp.gate", 128, 8, W8A8)
    float_gate = having(layer(), GATED[0], scheme=FLOAT)
    float_both = [replace(s, scheme=FLOAT) if s.name == GATED[1] else s for s in float_gate]
    assert ("prefix", router.name) in rules([*float_both, router])
    assert rules([*layer().values(), router]) == []
    assert rules([*float_both, replace(router, scheme=FLOAT)]) == []
    norm = replace(MODEL, float_modules=(f"{LAYER}.self_attn.o_proj_norm",))
    assert rules(list(layer().values()), norm) == [("prefix", f"{LAYER}.self_attn.o_proj")]


@pytest.mark.parametrize("by", ["in_features", "out_features"])
def test_sizes(by: str) -> None:
    name = f"{LAYER}.mlp.down_proj"
    assert rules(having(layer(W8A8), name, **{by: 65_536})) == [("size", name)]
    assert rules(having(layer(FLOAT), name, **{by: 65_536})) == []
    assert ("size", name) in rules(having(layer(W4A4), name, **{by: 132}))
    assert rules(having(layer(W8A8), name, **{by: 132})) == []


@pytest.mark.parametrize(
    ("width", "split", "tp", "problem"),
    [
        (256, (16, 16), 1, None),
        (256, (8, 32), 1, "the server splits 256"),
        (1536, (32, 48), 1, None),
        (256, (8, 16), 2, None),
        (256, (16, 16), 2, "the server splits 128"),
        (256, (8, 16), 1, "the server splits 256"),
        (4864, (64, 76), 1, "multiple of 8"),
        (25600, (160, 160), 1, "CANN before 8.5"),
    ],
)
def test_the_split_of_a_rotation_is_the_servers(
    width: int, split: tuple[int, int], tp: int, problem: str | None
) -> None:
    name = f"{LAYER}.mlp.down_proj"
    sites = having(layer(W4A4), name, in_features=width, rotated=True, split=split)
    found = [p for p in VLLM_ASCEND.check(sites, replace(MODEL, tp=tp)) if p.rule == "split"]
    assert [p.site for p in found] == ([] if problem is None else [name])
    assert problem is None or problem in found[0].message
    assert [p.severity for p in found] == (
        [] if problem is None else ["warning" if width > 20_000 else "error"]
    )


def test_a_bias_that_a_pass_adds() -> None:
    name = GATED[1]
    added = {"bias": True, "added_bias": "iter_smooth"}
    (problem,) = VLLM_ASCEND.check(having(layer(W8A8), name, **added), MODEL)
    assert (problem.rule, problem.site) == ("bias", name)
    assert "iter_smooth" in problem.message
    assert "iter_smooth" in problem.fix
    assert rules(having(layer(FLOAT), name, **added)) == [("bias", name)]
    assert rules(having(layer(W8A8_STATIC), name, **added)) == []
    assert rules(having(layer(W8A8), name, bias=True)) == []


def test_a_bias_before_w8a16_is_a_warning() -> None:
    found = VLLM_ASCEND.check(having(layer(W8A16), QKV[0], bias=True), MODEL)
    assert [(p.rule, p.severity) for p in found] == [("bias", "warning")]


@pytest.mark.parametrize(
    ("norm", "offset", "problems"),
    [
        (f"{LAYER}.input_layernorm", 0.0, 0),
        (f"{LAYER}.input_layernorm", 1.0, 1),
        ("transformer.h.0.ln_1", 0.0, 1),
    ],
)
def test_a_norm_bias_that_the_server_would_not_load(norm: str, offset: float, problems: int) -> None:
    model = replace(MODEL, norm_biases=(NormBias(norm, "iter_smooth", offset),))
    assert rules(list(layer().values()), model) == [("norm-bias", norm)] * problems


def test_dtypes() -> None:
    sites = list(layer().values())
    assert rules(sites, replace(MODEL, dtype=torch.float32)) == [("dtype", "model")]
    (warning,) = VLLM_ASCEND.check(sites, replace(MODEL, dtype=torch.float16))
    assert (warning.rule, warning.severity) == ("dtype", "warning")
    assert rules(list(layer(W8A16).values()), replace(MODEL, dtype=torch.float16)) == []


def test_experts() -> None:
    names = [f"{LAYER}.mlp.experts.{e}.{n}_proj" for e in (0, 1) for n in ("gate", "up", "down")]
    sites = {name: LinearSite(name, 128, 128, W8A8, expert=True) for name in names}
    assert rules(list(sites.values())) == []
    mixed = having(sites, names[4], scheme=FLOAT)
    assert rules(mixed) == [("experts", f"{LAYER}.mlp.experts")]
    assert rules(having(sites, names[0], scheme=W4A4)) == [
        ("expert", names[0]),
        ("experts", f"{LAYER}.mlp.experts"),
    ]


def test_four_bit_experts_are_served_on_ranks_that_share_out_their_sums() -> None:
    names = [f"{LAYER}.mlp.experts.0.{n}_proj" for n in ("gate", "up", "down")]
    sites = {
        n: LinearSite(n, 192, 192, W4A8, expert=True, row_parallel=n.endswith("down_proj")) for n in names
    }
    model = replace(MODEL, attentions=(Heads(48, 48, 8),))
    assert rules(list(sites.values())) == []
    assert VLLM_ASCEND.tp_sizes(list(sites.values()), model) == (1, 2, 4, 8)
    narrow = VLLM_ASCEND.check(having(sites, names[2], in_features=184), MODEL)
    assert [(p.rule, p.site) for p in narrow] == [("size", names[2])]
    assert "16 equal stretches" in narrow[0].message


def test_weights_that_the_server_turns_when_loading() -> None:
    name = GATED[1]
    assert rules(having(layer(), name, transposed=True)) == [("transposed", name)]
    float_pair = [
        replace(s, scheme=FLOAT, transposed=True) if s.name in GATED else s for s in layer().values()
    ]
    assert rules(float_pair) == []


@pytest.mark.parametrize(
    ("sites", "model", "sizes"),
    [
        (layer(W8A8), MODEL, (1, 2, 4, 8)),
        (layer(W8A8), replace(MODEL, attentions=(Heads(8, 3, 16),)), (1,)),
        (layer(W8A8), replace(MODEL, attentions=(Heads(4, 2, 16), Heads(8, 2, 16))), (1, 2, 4)),
        (layer(W8A8), replace(MODEL, attentions=(Heads(9, 3, 16),)), (1,)),
        ({s.name: replace(s, rotated=s.row_parallel, split=(8, 16) if s.row_parallel else None)
          for s in having(layer(W4A4), f"{LAYER}.self_attn.o_proj", in_features=256)}, MODEL, (2,)),
    ],
)  # fmt: skip
def test_tensor_parallel_sizes(
    sites: dict[str, LinearSite], model: ModelFacts, sizes: tuple[int, ...]
) -> None:
    listed = list(sites.values())
    assert VLLM_ASCEND.tp_sizes(listed, model) == sizes
    for tp in range(1, 10):
        found = [p for p in VLLM_ASCEND.check(listed, replace(model, tp=tp)) if p.rule == "tp"]
        assert bool(found) == (tp not in sizes)
        assert all(f"sizes that do: {', '.join(map(str, sizes))}" in p.fix for p in found)


def test_packs_of_int4_stay_whole_on_every_rank() -> None:
    narrow = having(layer(W4A4), f"{LAYER}.mlp.down_proj", in_features=48)
    model = replace(MODEL, attentions=(Heads(12, 12, 8),))
    assert 4 not in VLLM_ASCEND.tp_sizes(narrow, model)
    assert 4 in VLLM_ASCEND.tp_sizes(having(layer(W8A8), f"{LAYER}.mlp.down_proj", in_features=48), model)


# -- modelslim, and what both write


def test_modelslim_says_whatever_the_layout_can() -> None:
    for scheme in (W8A8, W8A8_STATIC, W8A16, W4A16, W4A16_G64, W4A8, W4A4):
        assert MODELSLIM.check(list(layer(scheme).values()), MODEL) == ()
    odd = LinearScheme(Int(4, "channel"), Int(8, "tensor"))
    assert {p.rule for p in MODELSLIM.check(list(layer(odd).values()), MODEL)} == {"type"}
    grouped = LinearScheme(Int(4, "group", 96))
    assert len(MODELSLIM.check(list(layer(grouped).values()), MODEL)) == len(layer())


def parameters() -> dict[str, TensorSpec]:
    result = {"model.embed_tokens.weight": TensorSpec(torch.bfloat16, (96, 128))}
    for site in layer().values():
        result[f"{site.name}.weight"] = TensorSpec(torch.bfloat16, (site.out_features, site.in_features))
    result[f"{QKV[0]}.bias"] = TensorSpec(torch.bfloat16, (128,))
    return result | {"model.norm.weight": TensorSpec(torch.bfloat16, (128,))}


def test_the_layout_names_every_tensor_with_its_type() -> None:
    sites = having(layer(W8A8), QKV[0], bias=True)
    layout = VLLM_ASCEND.layout(parameters(), sites, MODEL, SameNames())
    assert layout.specs.keys() == layout.types.keys()
    own = {
        name: (str(layout.specs[name]), layout.types[name])
        for name in layout.specs
        if name.startswith(QKV[0])
    }
    assert own == {
        f"{QKV[0]}.bias": ("bfloat16[128]", "FLOAT"),
        f"{QKV[0]}.weight": ("int8[128, 128]", "W8A8_DYNAMIC"),
        f"{QKV[0]}.weight_scale": ("float32[128, 1]", "W8A8_DYNAMIC"),
        f"{QKV[0]}.weight_offset": ("float32[128, 1]", "W8A8_DYNAMIC"),
    }
    assert next(iter(layout.specs)) == "model.embed_tokens.weight"
    assert list(layout.specs)[-1] == "model.norm.weight"
    assert layout.prefixes == {site.name: site.name for site in sites}


def test_the_layout_is_written_under_the_names_on_disk() -> None:
    class Renamed(SameNames):
        def disk_name(self, name: str) -> str:
            return name.replace("model.", "transformer.")

        def disk_tensors(self, name: str, spec: TensorSpec) -> dict[str, TensorSpec]:
            return {self.disk_name(name): spec}

    layout = VLLM_ASCEND.layout(parameters(), list(layer().values()), MODEL, Renamed())
    assert all(name.startswith("transformer.") for name in layout.specs)
    assert layout.prefixes[QKV[0]] == "transformer.layers.0.self_attn.q_proj"


def test_a_quantized_linear_without_a_tensor_of_its_own() -> None:
    class Packed(SameNames):
        def disk_tensors(self, name: str, spec: TensorSpec) -> dict[str, TensorSpec]:
            return {f"{LAYER}.attn.qkv.weight": spec} if "q_proj" in name else {name: spec}

        def separable(self, name: str) -> bool:
            return "q_proj" not in name

    with pytest.raises(Refused, match=r"q_proj: its weight shares a tensor"):
        VLLM_ASCEND.layout(parameters(), list(layer().values()), MODEL, Packed())
    kept = having(layer(), QKV[0], scheme=FLOAT)
    assert f"{LAYER}.attn.qkv.weight" in VLLM_ASCEND.layout(parameters(), kept, MODEL, Packed()).specs


@pytest.mark.parametrize(
    ("schemes", "kind", "group"),
    [
        ({}, "FLOAT", 0),
        ({"mlp": W8A8}, "W8A8_DYNAMIC", 0),
        ({"mlp": W8A8, "attn": W8A8_STATIC}, "W8A8", 0),
        ({"gate": W4A4, "up": W4A4, "down": W8A8_STATIC}, "W4A4_DYNAMIC", 0),
        ({"mlp": W4A16_G64, "attn": W8A8}, "W8A8_DYNAMIC", 64),
    ],
)
def test_the_description_names_the_model_after_its_lowest_type(
    schemes: dict[str, LinearScheme], kind: str, group: int
) -> None:
    sites = [
        replace(site, scheme=next((s for part, s in schemes.items() if part in site.name), FLOAT))
        for site in layer(FLOAT).values()
    ]
    layout = MODELSLIM.layout(parameters(), sites, MODEL, SameNames())
    description = MODELSLIM.files(layout)["quant_model_description.json"]
    assert list(description)[: len(layout.types)] == list(layout.types)
    tail = {key: description[key] for key in list(description)[len(layout.types) :]}
    assert tail == {
        "version": "1.0.0", "model_quant_type": kind, "group_size": group, "metadata": {}, "optional": {},
    }  # fmt: skip


def test_problems_alike_are_told_once() -> None:
    problems = [Problem("r", f"layer {i}", "is wrong", "mend it") for i in range(3)]
    other = Problem("r", "layer 1", "is wrong", "leave it")
    assert told([*problems, other]) == (
        "layer 0 and 2 more alike: is wrong; mend it",
        "layer 1: is wrong; leave it",
    )
