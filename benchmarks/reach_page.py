"""What the rows of the reach benchmark say: a summary, the bars, and the page docs/architectures.md."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from .reach_row import Row

Bar = tuple[str, str, bool]
"""What is asked for, what was reached, and whether that is enough."""


def bars(rows: Sequence[Row], types: int) -> list[Bar]:
    """The bars of the benchmark, for rows of so many types."""
    built = [row for row in rows if row.failed not in ("build", "process") or row.captured]
    captured = [row for row in rows if row.captured]
    turning = [row for row in captured if row.prenorm and not row.experts and not row.scans]
    turned = [row for row in turning if row.rotated]
    exported = [row for row in captured if not row.failed]
    least = types - 4
    return [
        (f"types that build, of {types} (bar {least})", str(len(built)), len(built) >= least),
        (
            "of them captured with open batch and length (bar 95 %)",
            _share(len(captured), len(built)), len(captured) >= 0.95 * len(built),
        ),
        (
            "dense models in pre-norm form that rotate (bar: all)",
            f"{len(turned)} of {len(turning)}", len(turned) == len(turning),
        ),
        (
            "captured models that go through to a quantized export and back (bar 85 %)",
            _share(len(exported), len(captured)), len(exported) >= 0.85 * len(captured),
        ),
    ]  # fmt: skip


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({100 * part / max(whole, 1):.1f} %)"


def summary(rows: Sequence[Row]) -> str:
    """The bars, and every miss with its reason and place."""
    lines = [f"{'met   ' if met else 'MISSED'} {what}: {got}" for what, got, met in bars(rows, len(rows))]
    missed = [row for row in rows if row.failed]
    if missed:
        lines += ["", f"{len(missed)} types did not go all the way:"]
        lines += [f"  {row.type} ({row.failed}): {row.reason[:200]}  [{row.place[:100]}]" for row in missed]
    return "\n".join(lines)


def page(rows: Sequence[Row], versions: Mapping[str, str]) -> str:
    """The page: the bars, what went through, what is not rotated and why, what stopped where."""
    through = [row for row in rows if not row.failed]
    stopped = [row for row in rows if row.failed]
    still = [row for row in through if not row.rotated]
    return "\n".join([
        "# Architectures",
        "",
        "Every causal language model type that transformers registers, as a small random model with one layer of each",
        "kind that it knows: built, captured and certified, matched, rotated and proved, quantized to W8A8, exported",
        "and read back. `python -m benchmarks.reach` makes the rows, `--page` this page;",
        f"transformers {versions['transformers']}, torch {versions['torch']}. There is no table of models behind it.",
        "",
        "| what | reached | |",
        "| --- | --- | --- |",
        *(f"| {what} | {got} | {'met' if met else 'missed'} |" for what, got, met in bars(rows, len(rows))),
        "",
        "## Went all the way",
        "",
        "Sites are norm-linear, o-v, up-down and linear-linear matches. *rotated* is the hidden state: *plain* by any",
        "rotation, *centred* by one that keeps the all-ones vector, as LayerNorm asks. *heads* counts attentions whose",
        "values are rotated.",
        "",
        "| type | blocks | experts | sites | rotated | heads | linears | proofs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {row.type} | {row.blocks} | {row.experts or ''} | {'/'.join(map(str, row.sites.values()))} |"
            f" {row.rotated or 'no'} | {row.heads or ''} | {row.linears} | {row.proofs} |"
            for row in through
        ),
        "",
        "## Whose hidden state is not rotated, and why",
        "",
        *_grouped((row.type, _why(row.rotation)) for row in still),
        "",
        "## Stopped",
        "",
        "| type | at | reason | place |",
        "| --- | --- | --- | --- |",
        *(f"| {row.type} | {row.failed} | {_cell(row.reason)} | {_cell(row.place)} |" for row in stopped),
        "",
        "## Remarks of the capture",
        "",
        *_grouped((row.type, _why(note)) for row in through for note in row.notes),
        "",
    ])  # fmt: skip


def _why(text: str) -> str:
    """A reason without what differs between models: layer numbers, advice."""
    text = text.removeprefix("rotate_residual: the residual stream can not be rotated: ")
    text = text.removeprefix("the residual stream can not be rotated: ").partition(". Leave quarot")[0]
    return re.sub(r"\.\d+\.", ".N.", text)


def _grouped(pairs: Iterable[tuple[str, str]]) -> list[str]:
    found: dict[str, list[str]] = {}
    for name, why in pairs:
        found.setdefault(why, []).append(name)
    return [
        f"- {_cell(why)}: {', '.join(names)}"
        for why, names in sorted(found.items(), key=lambda p: -len(p[1]))
    ]


def _cell(text: str) -> str:
    """Text that is safe in a table, without the folders of the machine."""
    text = re.sub(r"(?:/[\w.\-]+)+/", "", text)
    return f"{text[:220]}".replace("|", "/").replace("<", "&lt;").replace("\n", " ")
