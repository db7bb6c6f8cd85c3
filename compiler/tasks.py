"""Tasks: a quantized model and its reference on tasks of lm-evaluation-harness, where that is installed."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import Refused
from .registry import close

LIBRARY = "lm_eval"
INSTALL = "pip install lm-eval"


@dataclass(frozen=True)
class Score:
    """One metric of one task."""

    task: str
    metric: str
    """As the library names it: ``acc``, ``acc_norm``, ``exact_match (strict-match)``."""
    value: float
    error: float | None
    """Standard error, where the library gives one."""
    higher_is_better: bool | None = None


def check_library() -> None:
    """Refused where the library is not installed."""
    if find_spec(LIBRARY) is None:
        raise Refused(
            f"--tasks: tasks are run by lm-evaluation-harness, which is not installed; {INSTALL}, or leave --tasks out"
            " and give --text for perplexity and divergence"
        )


def task_names(asked: str | Iterable[str], include: Sequence[str | Path] = ()) -> tuple[list[str], Any]:
    """The tasks that names, groups and globs stand for, and the library's manager of tasks.

    Args:
        asked: As on the command line, ``arc_easy,hellaswag``, or a list.
        include: Directories with task files of your own.

    Raises:
        Refused: The library is not there, a directory is not, or a task is not known.
    """
    check_library()
    for folder in include:
        if not Path(folder).is_dir():
            raise Refused(f"--include {folder}: no such directory; give one that holds task files (.yaml)")
    with _quiet():
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

        manager = TaskManager(include_path=[str(folder) for folder in include] or None)
    words = asked.split(",") if isinstance(asked, str) else list(asked)
    found: list[str] = []
    for word in (word.strip() for word in words):
        matched = manager.match_tasks([word]) if word else []
        if not matched:
            near = close(word, manager.all_tasks)
            hint = f"did you mean {' or '.join(near)}?" if near else "lm-eval ls tasks lists them"
            raise Refused(
                f"--tasks: lm-eval knows no task {word!r}; {hint} Task files of your own: --include DIR"
                if near
                else f"--tasks: lm-eval knows no task {word!r}; {hint}; task files of your own: --include DIR"
            )
        found += matched
    return list(dict.fromkeys(found)), manager


def run_tasks(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    manager: Any,
    *,
    limit: int | None = None,
    shots: int | None = None,
    batch: int = 1,
) -> tuple[Score, ...]:
    """Every metric of every task, of one loaded model.

    Args:
        model: What ``load`` returns.
        tokenizer: Its tokenizer.
        names: Tasks that ``task_names`` gave.
        manager: The manager that it gave.
        limit: Documents per task; None is all.
        shots: Examples in front of each; None is what the task says.
        batch: Sequences that run at once.

    Raises:
        Refused: A data set cannot be had, or a task does not run.
    """
    with _quiet():
        from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

        served = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        try:
            results = simple_evaluate(
                model=served, tasks=list(names), task_manager=manager, limit=limit, num_fewshot=shots,
                bootstrap_iters=0, log_samples=False, batch_size=batch,
            )  # fmt: skip
        except Exception as error:  # of data sets, the hub, templates of tasks: whatever they raise
            reason = " ".join(str(error).split())[:300]
            raise Refused(
                f"--tasks {','.join(names)}: lm-eval stopped with {type(error).__name__}: {reason}. Where it is about"
                " a data set: it is downloaded from the hub, or named in the task file"
            ) from error
    assert results is not None, "one process"
    return tuple(_scores(results))


def _scores(results: Mapping[str, Any]) -> Iterator[Score]:
    better: Mapping[str, Mapping[str, bool]] = results.get("higher_is_better") or {}
    for task, found in results["results"].items():
        for key, value in found.items():
            metric, _, filtered = str(key).partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not filtered:
                continue
            error = found.get(f"{metric}_stderr,{filtered}")
            shown = metric if filtered == "none" else f"{metric} ({filtered})"
            known = float(error) if isinstance(error, int | float) else None
            yield Score(task, shown, float(value), known, (better.get(task) or {}).get(metric))


def table(quantized: Sequence[Score], reference: Sequence[Score] = ()) -> str:
    """The scores as a table, beside those of the reference where there are some."""
    theirs = {(score.task, score.metric): score for score in reference}
    width = max([len(f"{s.task} {s.metric}") for s in quantized] + [5]) + 2
    head = f"{'task':<{width}}{'quantized':<20}" + ("reference" if reference else "")
    lines = [head.rstrip()]
    for score in quantized:
        other = theirs.get((score.task, score.metric))
        line = f"{f'{score.task} {score.metric}':<{width}}{_shown(score):<20}" + (
            _shown(other) if other else ""
        )
        lines.append(line.rstrip())
    return "\n".join(lines)


def _shown(score: Score) -> str:
    return f"{score.value:.4f}" + (f" ± {score.error:.4f}" if score.error is not None else "")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's progress and remarks to itself; what fails raises."""
    names = ("lm_eval", "lm-eval", "datasets", "evaluate")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
