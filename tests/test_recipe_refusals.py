"""A recipe that is wrong, or asks for what is not built, is refused with its lines and what was meant."""

from __future__ import annotations

import pytest

from qc.compiler import registry
from qc.compiler.errors import Refused
from qc.compiler.qconfig import words
from qc.compiler.recipe import read_recipe
from qc.compiler.recipe_names import OPTIONS, PROCESSORS
from qc.compiler.scheme import W8A8, W8A8_STATIC, Int, LinearScheme
from qc.compiler.spelling import maker
from tests.recipes import HEAD, INT4_G64, INT8, NONE, QCONFIGS, STATIC, TOKEN, Written

# What is wrong is told with its line, all at once.

REFUSED = {
    "apiversion: modelslim_v2\nspec: {process: [{type: quarot}]}": [
        "line 1: unknown apiversion 'modelslim_v2'; did you mean modelslim_v1?"
    ],
    "apiversion: modelslim_v0\nspec: {process: [{type: quarot}]}": [
        "line 1",
        "modelslim_v0 is not supported: the reference",
    ],
    "apiversion: 1\nspec: {process: [{type: quarot}]}": ["line 1", "this is the number 1"],
    "spec: {process: [{type: quarot}]}": ["no apiversion in this recipe: write modelslim_v1"],
    "apiverison: modelslim_v1\nspec: {process: [{type: quarot}]}": ["is 'apiverison' on line 1 meant?"],
    "apiversion: modelslim_v1\nsepc: {}": ["no spec in this recipe; is 'sepc' on line 2 meant?"],
    "- type: quarot": ["line 1", "a recipe is a mapping with apiversion and spec; this is a list"],
    "quarot": ["this is the text 'quarot'"],
    "apiversion: modelslim_v1\nspec: [quarot]": ["line 2: spec is a mapping with process"],
    "apiversion: modelslim_v1\nspec: {}": ["line 2: process is a list of passes", "this is empty"],
    "apiversion: modelslim_v1\nspec:\n  process: []": [
        "line 3: process is a list of passes",
        "this is a list",
    ],
    "apiversion: modelslim_v1\nspec:\n  proces: [{type: quarot}]": [
        "line 3: unknown key of spec 'proces'; did you mean process?"
    ],
    "apiversion: modelslim_v1\nmetadata: {scor: 3}\nspec: {process: [{type: quarot}]}": [
        "line 2",
        "did you mean score?",
    ],
    "apiversion: modelslim_v1\nmetadata: {label: {wbit: 3}}\nspec: {process: [{type: quarot}]}": [
        "did you mean w_bit"
    ],
    HEAD + "    - iter_smooth:\n        alpha: 0.5": [
        "line 4",
        "'- type: NAME' and its options indented below",
        "keys iter_smooth",
    ],
    HEAD + "    - quarot": ["line 4", "this is the text 'quarot'"],
    HEAD + "    - type: [quarot]": ["type is the name of a pass; this is a list"],
    HEAD + "    - type: iter_smoth": ["line 4: unknown pass 'iter_smoth'; did you mean iter_smooth"],
    HEAD + "    - type: flex_smoth_quant": ["did you mean flex_smooth_quant"],
    HEAD + "    - type: binary_analysis": [
        "line 4: binary_analysis is not supported yet; there are adapt_residual"
    ],
    HEAD + "    - type: iter_smooth\n      alhpa: 0.5": [
        "line 5: unknown option of iter_smooth 'alhpa'; did you mean alpha?"
    ],
    HEAD + "    - type: iter_smooth\n\n      alpha: 1.5": [
        "line 6: iter_smooth: alpha=1.5: it must be between 0 and 1"
    ],
    HEAD + "    - type: iter_smooth\n      alpha: high": [
        "line 5: iter_smooth: alpha is the text 'high': it must be a number"
    ],
    HEAD + "    - type: iter_smooth\n      alpha: true": ["alpha is true: it must be a number"],
    HEAD + "    - type: iter_smooth\n      alpha: [0.5]": ["alpha is one value; this is a list"],
    HEAD + "    - type: iter_smooth\n      alpha:": ["alpha is one value; this is empty"],
    HEAD + "    - type: iter_smooth\n      alpha: .nan": ["between 0 and 1"],
    HEAD + "    - type: iter_smooth\n      symmetric: 1": [
        "symmetric is the number 1: it must be true or false"
    ],
    HEAD + "    - type: iter_smooth\n      include: '*.v_proj'": [
        "include is a list, such as [a, b]; this is the text '*.v_proj'"
    ],
    HEAD + "    - type: iter_smooth\n      include: ['*', 3]": [
        "line 5: iter_smooth: include is text; this is the number 3"
    ],
    HEAD + "    - type: iter_smooth\n      include: []": ["include is an empty list"],
    HEAD + "    - type: iter_smooth\n      enable_subgraph_type: [ov, qk]": [
        "line 5",
        "enable_subgraph_type=qk: types are up-down, ov",
    ],
    HEAD + "    - type: iter_smooth\n      group_method: median": ["one of max, mean"],
    HEAD + "    - {type: fuse_norms, x: 1}": ["fuse_norms has no options"],
    HEAD + "    - {type: autoround, iters: 4e2}": ["iters is the number 400.0: it must be a whole number"],
    HEAD + "    - {type: autoround, iters: 010}": [
        "iters is the text '010': with a leading zero, readers differ"
    ],
    HEAD + "    - {type: autoround, iters: -1}": ["iters=-1: it must not be negative"],
    HEAD + "    - {type: autoround, strategies: []}": ["strategies is an empty list"],
    HEAD + "    - {type: autoround, strategies: [w4a5]}": ["line 4: autoround: unknown scheme 'w4a5'"],
    HEAD + "    - {type: autoround, strategies: [{include: ['*']}]}": ["a strategy has no qconfig"],
    HEAD + "    - {type: autoround, strategies: [{qconfig: {weight: 3}, includ: ['*']}]}": [
        "did you mean include",
        "this is the number 3",
    ],
    HEAD + "    - {type: quarot, online: true, max_tp_size: 3}": [
        "line 4: quarot: max_tp_size=3: it must be a power"
    ],
    HEAD + "    - {type: quarot, online: true, down_proj_online_layers: [-1]}": ["layers are counted from 0"],
    HEAD + "    - {type: group}": ["line 4: group has a list of passes"],
    HEAD + "    - {type: group, configs: [{type: quarrot}]}": ["unknown pass 'quarrot'; did you mean quarot"],
    HEAD + "    - {type: unary_analysis, metrics: std}": ["line 4: unary_analysis is not supported yet"],
    HEAD + "    - {type: dynamic_cache, qconfig: {dtype: int8, scope: per_token}}": [
        "line 4: the qconfig of dynamic_cache: scope per_token is not supported: there is per_channel"
    ],
    HEAD + "    - {type: fa3_quant, details: {fa_q: {dtype: fp8_e4m3, scope: per_head}}}": [
        "details of fa_q: dtype fp8_e4m3 is not supported: there is int8"
    ],
    HEAD + "    - {type: fa3_quant, qconfig: {dtype: int8, scope: per_head, symmetric: false}}": [
        "a quantized attention has no offsets"
    ],
    HEAD + "    - {type: quarot, block_size: 6}": [
        "line 4: quarot: block_size=6: it must be -1 or a power of 2"
    ],
    HEAD + "    - {type: online_quarot, block_size: -1}": ["online_quarot: block_size is not supported yet"],
    HEAD + "    - type: quarot\n  save: [{type: ascendv1}]": [
        "line 5: unknown saver 'ascendv1'; did you mean ascendv1_saver?"
    ],
    HEAD + "    - type: quarot\n  save: [{type: compressed_tensors, ext: {}}]": ["compressed_tensors"],
    HEAD + "    - type: quarot\n  save: {type: ascendv1_saver}": [
        "save is a list of one saver",
        "this is a mapping",
    ],
    HEAD + "    - type: quarot\n  save: [{type: ascendv1_saver, part_file_size: 4.5}]": [
        "part_file_size",
        "this is the number 4.5",
    ],
    HEAD + "    - type: quarot\n  save: [{type: ascendv1_saver, size: 4}]": [
        "unknown key of ascendv1_saver 'size'"
    ],
    HEAD + "    - type: quarot\n  prior: [{proces: []}]": ["a stage of prior 'proces'; did you mean process"],
    HEAD + "    - type: quarot\n  runner: layerwise": ["unknown runner 'layerwise'; did you mean layer_wise"],
    HEAD + "    - type: quarot\n  dataset: [a.txt]": [
        "line 5: dataset is the name of a file",
        "this is a list",
    ],
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_recipe_that_is_wrong_is_refused_with_its_line(text: str, written: Written) -> None:
    with pytest.raises(Refused) as refused:
        read_recipe(written(text))
    assert [words for words in REFUSED[text] if words not in str(refused.value)] == []
    assert "recipe.yaml" in str(refused.value)


WRONG_QCONFIGS = {
    f"{{act: {TOKEN}}}": "a qconfig has no weight",
    f"{{weight: {INT8}, activation: {TOKEN}}}": "unknown key of a qconfig 'activation'",
    "{weight: {dtype: int8, scope: per_channel}}": "the weight of a qconfig has no symmetric, method",
    f"{{weight: {INT8.replace('int8', 'int5')}}}": "unknown dtype 'int5'; did you mean int",
    f"{{weight: {INT8.replace('int8', 'mxfp4')}}}": "dtype mxfp4 of the weight is not supported yet: there are float",
    f"{{weight: {INT8.replace('minmax', 'mse_round')}}}": "method mse_round of the weight is not supported here",
    f"{{weight: {INT8.replace('minmax', 'autoround')}}}": "method autoround of the weight is not supported here",
    f"{{weight: {INT8.replace('per_channel', 'per_block')}}}": "scope per_block with symmetric true of the weight",
    f"{{weight: {INT8.replace('true', '1')}}}": "symmetric is true or false, this is the number 1",
    f"{{weight: {INT8.replace('per_channel', 'per_group')}}}": "scope per_group needs ext.group_size",
    f"{{weight: {INT8.replace('minmax', 'minmax, ext: {group_size: 64}')}}}": "group_size belongs to scope per_group",
    f"{{weight: {INT4_G64.replace('64', '0')}}}": "group_size is a positive whole number, this is the number 0",
    f"{{weight: {INT4_G64.replace('64', 'true')}}}": "group_size is a positive whole number, this is true",
    f"{{weight: {INT4_G64.replace('group_size', 'groupsize')}}}": "did you mean group_size?",
    f"{{weight: {INT8}, act: {TOKEN.replace('minmax', 'histogram')}}}": "method histogram belongs to per_tensor",
    f"{{weight: {INT8}, act: {TOKEN.replace('per_token', 'pd_mix')}}}": "scope pd_mix",
    f"{{weight: {INT4_G64}, act: {STATIC}}}": "group_size 64 with act int8 per_tensor, symmetric false is",
    f"{{weight: {INT8}, act: {TOKEN.replace('int8', 'int4')}}}": "There are weight int8 per_channel with act float",
    f"{{weight: {NONE}, act: {TOKEN}}}": "weight float with act int8",
}


@pytest.mark.parametrize("qconfig", WRONG_QCONFIGS)
def test_a_format_that_cannot_be_had_is_refused(qconfig: str, written: Written) -> None:
    with pytest.raises(Refused) as refused:
        read_recipe(written(f"{HEAD}    - type: linear_quant\n      qconfig: {qconfig}"))
    assert WRONG_QCONFIGS[qconfig] in str(refused.value)
    assert "line 5" in str(refused.value)


def test_formats_that_are_offered_can_be_had(written: Written) -> None:
    mixed = f"{{weight: {INT8}, act: {TOKEN.replace('int8', 'int4')}}}"
    with pytest.raises(Refused) as refused:
        read_recipe(written(f"{HEAD}    - {{type: linear_quant, qconfig: {mixed}}}"))
    offered = str(refused.value).partition("There are ")[2].split("; ")
    assert words(W8A8) in offered
    assert words(W8A8_STATIC) in offered
    assert words(LinearScheme(Int(4, "channel"))) in offered
    assert words(LinearScheme(Int(8, "channel"), Int(4, "token"))) not in offered


def test_everything_wrong_is_told_at_once_and_once(written: Written) -> None:
    text = QCONFIGS.replace("dtype: int4}\n", "dtype: int3}\n", 1) + """
spec:
  process:
    - {type: quarot, online: true, max_tp_size: 5, down_proj_online_layers: [1]}
    - type: autoround_quant
      strategies:
        - {qconfig: *w4a4, include: ["*.o_proj"]}
        - {qconfig: *w4a4, include: ["*.up_proj"]}
      iters: many
  prior: 3
"""  # fmt: skip
    with pytest.raises(Refused) as refused:
        read_recipe(written(text))
    listed = str(refused.value).splitlines()
    assert listed[0].endswith("recipe.yaml has 4 problems:")
    assert [line.split(":")[0] for line in listed[1:]] == [
        "  1. line 7", "  2. line 12", "  3. line 17", "  4. line 18",
    ]  # fmt: skip
    assert "unknown dtype 'int3'" in listed[1]


def test_what_is_called_missing_is_missing() -> None:
    registered = {*registry.names("passes"), *registry.names("presets")}
    assert registered & PROCESSORS == set()
    assert {name: set(maker(name)[1]) & set(options) for name, options in OPTIONS.items()} == {
        name: set() for name in OPTIONS
    }
