"""Quality of compiled checkpoints: SmolLM2-135M against its float self.

``python -m benchmarks.accuracy [ROW ...] [--rows GLOB]`` compiles the rows (default: those that have a bar) with the
command line and evaluates what was written, from its files alone, on 40 windows of 512 tokens. Rows that are on record
are not measured again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from qc.compiler.evaluate import Evaluation, evaluate

from .measure import Measured, run_qc
from .records import Row, record, results_folder, table
from .smollm2 import smollm2
from .texts import Texts, find_texts

SAMPLES, LENGTH, WINDOWS = 32, 512, 40
COLUMNS = (
    "row", "passes", "scheme", "ppl", "float ppl", "multiple", "± se", "bar", "KL", "KL of", "share", "top-1",
    "seconds", "peak MB", "met",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """One row: what is compiled, and the bar on its perplexity as a multiple of the float model's."""

    passes: str
    scheme: str
    """Empty where the passes have formats of their own."""
    bar: float | None = None
    target: str = "vllm-ascend"
    kl_of: tuple[str, float] | None = None
    """Another row, and the share of its divergence that this one may have."""


RECIPES = {
    "w8a8": Recipe("iter_smooth,linear_quant", "w8a8", 1.02, kl_of=("rtn-w8a8", 0.75)),
    "auto": Recipe("iter_smooth,flatquant,autoround", "auto", 1.25),
    "w4a4": Recipe("iter_smooth,flatquant,autoround", "w4a4", 1.5),
    "w4a16-g64": Recipe("autoround{iters=50}", "w4a16-g64", 1.10, target="modelslim"),
    "w4a16-g64-gptq": Recipe("gptq", "w4a16-g64", 1.12, target="modelslim"),
    "rtn-w8a8": Recipe("linear_quant", "w8a8"),
    "rtn-w8a8-static": Recipe("linear_quant", "w8a8-static"),
    "rtn-w8a16": Recipe("linear_quant", "w8a16"),
    "rtn-auto": Recipe("linear_quant", "auto"),
    "rtn-w4a4": Recipe("linear_quant", "w4a4"),
    "rtn-w4a16-g64": Recipe("linear_quant", "w4a16-g64", target="modelslim"),
    "w8a8-static": Recipe("iter_smooth,linear_quant", "w8a8-static"),
    "rotated-auto": Recipe("iter_smooth,quarot,linear_quant", "auto"),
    "rotated-w4a4": Recipe("iter_smooth,quarot,online_rotation,linear_quant", "w4a4"),
}
"""Rows by name. Those with a bar come first; the others show what plain rounding does."""
SMOOTHERS = {
    "none": "",
    "smooth_quant": "smooth_quant,",
    "iter_smooth": "iter_smooth,",
    "iter_smooth-shifted": "iter_smooth{symmetric=false},",
    "flex_smooth_quant": "flex_smooth_quant,",
}
RECIPES |= {
    f"{kind}/{name}": Recipe(f"{smoother}linear_quant", "w8a8" if kind == "dynamic" else "w8a8-static",
                             target="modelslim", kl_of=None if name == "none" else (f"{kind}/none", 1.0))
    for kind in ("dynamic", "static")
    for name, smoother in SMOOTHERS.items()
}  # fmt: skip
RECIPES |= {
    "static/histogram": Recipe(
        "linear_quant{act_method=histogram}", "w8a8-static", kl_of=("static/none", 1.0)
    ),
    "static/iter_smooth+histogram": Recipe(
        "iter_smooth,linear_quant{act_method=histogram}", "w8a8-static", kl_of=("static/iter_smooth", 1.0)
    ),
    "pd_mix": Recipe("iter_smooth,linear_quant", "w8a8-mix", kl_of=("static/iter_smooth", 1.0)),
    "kv8": Recipe("dynamic_cache", "float", target="modelslim"),
    "kv8/kv_smooth": Recipe("kv_smooth,dynamic_cache", "float", target="modelslim"),
    "fa3": Recipe("fa3_quant", "float", target="modelslim"),
    "fa3/kv_smooth": Recipe("kv_smooth,fa3_quant", "float", target="modelslim", kl_of=("fa3", 1.0)),
    "fa3/per_token": Recipe(
        "fa3_quant{fa_q=per_token,fa_k=per_token,fa_v=per_token}",
        "float",
        target="modelslim",
        kl_of=("fa3", 1.0),
    ),
    "w4a16/minmax": Recipe("linear_quant", "w4a16-g64", target="modelslim"),
    "w4a16/ssz": Recipe(
        "linear_quant{weight_method=ssz}", "w4a16-g64", target="modelslim", kl_of=("w4a16/minmax", 1.0)
    ),
    "w4a16/clip": Recipe(
        "linear_quant{weight_method=clip}", "w4a16-g64", target="modelslim", kl_of=("w4a16/minmax", 1.0)
    ),
    "w4a16/awq": Recipe(
        "awq,linear_quant{weight_method=clip}", "w4a16-g64", target="modelslim", kl_of=("w4a16/minmax", 1.0)
    ),
    "w4a16/flex_awq_ssz": Recipe(
        "flex_awq_ssz,linear_quant{weight_method=ssz}",
        "w4a16-g64",
        target="modelslim",
        kl_of=("w4a16/ssz", 1.0),
    ),
}
"""Rows of everything that acts on activations: each with the row that it claims to improve on, in divergence."""


LITERATURE = {
    "smoothquant-o1": Recipe("smooth_quant,linear_quant", "w8a8-pt"),
    "smoothquant-o2": Recipe("smooth_quant,linear_quant", "w8a8-dynamic-tensor-pt", target="modelslim"),
    "smoothquant-o3": Recipe("smooth_quant,linear_quant", "w8a8-static-symmetric-pt"),
    "zeroquant": Recipe("linear_quant", "w8a8-g64", target="modelslim"),
    "llm-int8": Recipe("outlier_channels,linear_quant", "w8a8", target="modelslim"),
    "spqr": Recipe("spqr", "w4a16-g64-asym", target="modelslim"),
    "outlier-suppression": Recipe("fuse_norms,linear_quant{act_method=histogram}", "w8a8-static"),
}
RECIPES |= LITERATURE
"""What papers did, in the granularities that they did it in; more of them stand under other names."""


TRANSFORMS = {
    "none": "",
    "quarot": "quarot,",
    "quarot-online": "quarot{online=true},",
    "adapt_rotation": "adapt_rotation,",
    "adapt_rotation-online": "adapt_rotation{online=true},",
    "flatquant": "flatquant,",
}
ROUNDINGS = {"minmax": "linear_quant", "gptq": "gptq", "autoround": "autoround"}
BEATS = {"minmax": "", "gptq": "minmax", "autoround": "gptq"}
"""What each rounding claims to improve on; plain rounding is compared with the one that nothing is rotated for."""
RECIPES |= {
    f"{scheme}/{turn}/{rounding}": Recipe(
        f"iter_smooth,{passes}{quantizer}", scheme,
        kl_of=(f"{scheme}/{turn}/{BEATS[rounding]}", 1.0) if BEATS[rounding]
        else None if turn == "none" else (f"{scheme}/none/minmax", 1.0),
    )
    for scheme in ("w4a4", "auto")
    for turn, passes in TRANSFORMS.items()
    if not (scheme == "auto" and turn.endswith("-online"))
    for rounding, quantizer in ROUNDINGS.items()
}  # fmt: skip
"""Rotations and learned transforms against one another, under each way of rounding."""


LAOS_LAYERS = (1, 3, *range(9, 27))
LAOS_INT4 = f"*.up_proj|*.gate_proj|*.o_proj|model.layers.{{{','.join(map(str, LAOS_LAYERS))}}}.mlp.down_proj"
RECIPES["laos-v1"] = Recipe(
    "iter_smooth{alpha=0.9,symmetric=false,enable_subgraph_type=ov+up-down},"
    f"quarot{{online=true,block_size=32,max_tp_size=1,down_proj_online_layers={'+'.join(map(str, LAOS_LAYERS))}}},"
    "iter_smooth{alpha=0.9,symmetric=false,enable_subgraph_type=norm-linear},"
    f"autoround{{iters=50,strategies=w4a4-g64:{LAOS_INT4}+w8a8-g64}}",
    "", target="modelslim",
)  # fmt: skip
"""The recipe laos-v1.yaml with groups of 64 for 256 and max_tp_size 1 for 4, to fit the model, and 50 steps for 400."""
LAOS_UP = f"model.layers.{{{','.join(map(str, range(1, 9)))}}}.mlp"
RECIPES["laos-v2"] = Recipe(
    "adapt_rotation{max_tp_size=1},"
    f"autoround{{iters=50,strategies=w8a8:*self_attn*|*.down_proj|{LAOS_UP}.up_proj|{LAOS_UP}.gate_proj"
    "+w4a4:*.up_proj|*.gate_proj}",
    "",
    target="modelslim",
)
"""The recipe laos-v2.yaml at 50 steps for 400; of its layers those that the model has."""


def main(arguments: list[str] | None = None) -> int:
    """Compile, evaluate, print, record; 1 when a bar is missed on comparable texts."""
    barred = [name for name, recipe in RECIPES.items() if recipe.bar]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("row", nargs="*", help=f"rows to run (default: {' '.join(barred)}); all: every row")
    parser.add_argument(
        "--rows", metavar="GLOB", action="append", default=[], help="rows by glob, with their references"
    )
    parser.add_argument(
        "--windows", type=int, default=WINDOWS, help=f"windows of the evaluation (default {WINDOWS})"
    )
    parser.add_argument(
        "--again", action="store_true", help="measure rows anew that are on record with as many windows"
    )
    parser.add_argument("--keep", type=Path, help="keep the compiled checkpoints in this folder")
    options = parser.parse_args(arguments)
    wanted: list[str] = list(RECIPES) if options.row == ["all"] else list(options.row)
    for glob in options.rows:
        found = [name for name in RECIPES if fnmatch(name, glob)]
        if not found:
            parser.error(f"no row matches {glob}; there are {', '.join(RECIPES)}")
        wanted += found
    wanted = wanted or barred
    if unknown := sorted(set(wanted) - set(RECIPES)):
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    ordered = with_references(wanted)
    texts, model = find_texts(), smollm2()
    print(texts)
    known = {} if options.again else on_record(options.windows, comparable=texts.comparable)
    rows: list[Row] = []
    divergence: dict[str, float] = {name: row["KL"] for name, row in known.items()}
    with tempfile.TemporaryDirectory() as scratch:
        for name in ordered:
            if name in known:
                rows.append(known[name])
                continue
            run, evaluation = _measure(name, model, texts, options.keep or Path(scratch), options.windows)
            divergence[name] = evaluation.kl
            rows.append(_row(name, run, evaluation, divergence, comparable=texts.comparable))
            record("accuracy", {**rows[-1], "windows": options.windows, "comparable": texts.comparable})
            print(
                f"{name}: {evaluation.ratio:.4f} times the float perplexity, {run.seconds:.0f} s", flush=True
            )
    table(f"SmolLM2-135M, {texts}", rows)
    return 1 if any(row["met"] is False for row in rows) else 0


def with_references(wanted: Iterable[str]) -> list[str]:
    """These rows and all that they are compared with, those first, each once."""
    found: dict[str, None] = {}
    for name in wanted:
        chain = [name]
        while (kl_of := RECIPES[chain[-1]].kl_of) is not None:
            chain.append(kl_of[0])
        found |= dict.fromkeys(reversed(chain))
    return list(found)


def on_record(windows: int, *, comparable: bool) -> dict[str, dict[str, Any]]:
    """The newest row of each name on record: the same recipe, as many windows, texts of the same kind."""
    file = results_folder() / "accuracy.jsonl"
    if not file.is_file():
        return {}
    found: dict[str, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        recipe = RECIPES.get(row.get("row"))
        same = recipe is not None and (row["passes"], row["scheme"]) == (recipe.passes, recipe.scheme)
        if same and (row.get("windows"), row.get("comparable")) == (windows, comparable):
            found[row["row"]] = {key: row[key] for key in COLUMNS}
    return found


def _measure(name: str, model: Path, texts: Texts, folder: Path, windows: int) -> tuple[Measured, Evaluation]:
    recipe = RECIPES[name]
    out = folder / name.replace("/", "-")
    calibration = [argument for file in texts.calibration for argument in ("--calib", file)]
    run = run_qc(
        *("compile", model, "--passes", recipe.passes, "--target", recipe.target),
        *(("--scheme", recipe.scheme) if recipe.scheme else ()),
        *calibration,
        *("--samples", str(SAMPLES), "--length", str(LENGTH), "--out", out, "--force"),
        quiet=False,
    )
    return run, evaluate(out, model, texts.evaluation, windows=windows, length=LENGTH)


def _row(
    name: str, run: Measured, evaluation: Evaluation, divergence: dict[str, float], *, comparable: bool
) -> Row:
    """One line of the table; ``met`` is None where there is no bar or the texts are not those of the bars."""
    recipe = RECIPES[name]
    share = divergence[name] / divergence[recipe.kl_of[0]] if recipe.kl_of else None
    met = None
    if comparable and (recipe.bar is not None or share is not None):
        met = recipe.bar is None or evaluation.ratio <= recipe.bar
        if share is not None and recipe.kl_of is not None:
            met = met and share <= recipe.kl_of[1]
    return {
        "row": name,
        "passes": recipe.passes,
        "scheme": recipe.scheme,
        "ppl": evaluation.perplexity,
        "float ppl": evaluation.reference_perplexity,
        "multiple": evaluation.ratio,
        "± se": evaluation.ratio * evaluation.difference_error,
        "bar": recipe.bar,
        "KL": evaluation.kl,
        "KL of": recipe.kl_of[0] if recipe.kl_of else None,
        "share": share,
        "top-1": evaluation.agreement,
        "seconds": run.seconds,
        "peak MB": run.peak / 1e6,
        "met": met,
    }


if __name__ == "__main__":
    raise SystemExit(main())
