"""What an output holds beside the weights: config, tokenizer, description, journal, plan, report, manifest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .calibration import Calibration
from .cost import cost_of
from .export import CARD, copy_side_files, exported_config, manifest_of, write_json, write_manifest
from .journal import Journal
from .model_card import model_card
from .plan import Plan
from .plan_text import plan_text
from .program import Program
from .report.data import report_data
from .report.page import REPORT, page
from .rotation_file import write_rotation
from .same_command import same_command
from .weights import Checkpoint

if TYPE_CHECKING:
    from .compile import Options


def write_beside(
    planned: Plan, layout: Any, data: Calibration | None, journal: Journal, path: Path, options: Options,
    run: dict[str, Any] | None,
) -> None:  # fmt: skip
    """The files beside the weights: config, tokenizer, description, journal, plan, model card, report, manifest."""
    program = planned.program
    config = _config(program)
    if config is not None:
        tied = bool(planned.final.ties) if program.ties else None
        whole = exported_config(config, planned.dtype, tied, options.trust_remote_code)
        write_json(path / "config.json", planned.target.config(whole, layout))
    if program.path is not None:
        copy_side_files(Path(program.path), path, options.trust_remote_code)
    for name, content in planned.target.files(layout).items():
        write_json(path / name, content, indent=4)
    write_rotation(planned, path)
    journal.save(path)
    text = plan_text(
        planned, cost=cost_of(planned, peak=False), calibration=str(data.digest) if data else None
    )
    (path / "qc_plan.txt").write_text(text, encoding="utf-8")
    planned.target.add(path)
    command = same_command(planned, options, data)
    (path / CARD).write_text(model_card(planned, journal, command, data), encoding="utf-8")
    ran = _remote_code(program, options)
    manifest = manifest_of(path, _inputs(program, options), text, planned.rewrites, ran)
    told = page(report_data(planned, journal, manifest, command, data, run))
    (path / REPORT).write_text(told, encoding="utf-8")
    write_manifest(path, manifest)


def _remote_code(program: Program, options: Options) -> list[str]:
    """Names of the Python files that came with the checkpoint and ran."""
    if program.path is None or not options.trust_remote_code or not getattr(program.config, "auto_map", None):
        return []
    return sorted(file.name for file in Path(program.path).glob("*.py"))


def _inputs(program: Program, options: Options) -> dict[str, Path]:
    """What the output depends on: files of the checkpoint by their place in it, texts by order and name."""
    source = program.source
    found = {f"calib/{number}/{Path(file).name}": Path(file) for number, file in enumerate(options.calib, 1)}
    if isinstance(source, Checkpoint):
        found |= {f"model/{file.relative_to(source.path).as_posix()}": file for file in source.files}
    if options.recipe is not None:
        found[f"recipe/{options.recipe.name}"] = options.recipe
    return found


def _config(program: Program) -> dict[str, Any] | None:
    if isinstance(program.source, Checkpoint):
        return dict(program.source.config)
    return program.config.to_dict() if program.config is not None else None
