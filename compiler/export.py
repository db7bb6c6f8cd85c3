"""Export: an output directory that is there whole or not at all, and what stands in it beside the weights."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import signal
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

from .errors import Failed, Refused
from .safetensors_io import TensorSpec, read_header
from .shards import inside

MANIFEST = "qc_manifest.json"
RUN = "run.json"
"""What varies between two runs of one command: times, memory, host. No hash covers it."""
CARD = "README.md"
"""The model card. No hash covers it: people write into it, and ``qc eval --card`` does."""
UNHASHED = (MANIFEST, RUN, CARD)
"""What the manifest does not name."""
SHARED = ("input_scale", "input_offset", "left_trans", "right_trans", "clip_ratio")
"""Tensors of a linear that have no axis of outputs."""
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "tokenizer*")
_REPLACED = ("config.json", "*.index.json", "quant*", "qc_*.json", "journal*.json", RUN, "*.safetensors")
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


class Output:
    """The directory ``out``, built beside it and renamed into place when everything is written and on disk.

    ``with Output(out) as output: ...`` writes to ``output.path``. An exception, Ctrl-C, SIGTERM or SIGHUP
    inside removes what was written and leaves ``out`` as it was. A process that is killed outright leaves its
    ``<out>.partial-<host>-<pid>``; the next one on that host with the same ``out`` removes it. Whether its owner
    lives is told by a lock that the owner holds, which ends with it.

    Args:
        out: Directory to make.
        force: Replace an existing one, at the end and atomically.
        inputs: Paths that the output must neither be nor contain; directories that it must not be in.

    Raises:
        Refused: ``out`` exists and may not be replaced, or would swallow an input.
    """

    def __init__(self, out: str | Path, force: bool = False, inputs: Iterable[Path] = ()) -> None:
        if not str(out):
            raise Refused("--out is empty; name the directory to make")
        self.out = Path(out).resolve()
        self._partial = f"{self.out.name}.partial-{platform.node()}-"
        self.path = self.out.with_name(f"{self._partial}{os.getpid()}")
        self.removed: tuple[str, ...] = ()
        """Names of what killed processes had left beside ``out``."""
        self._inputs = tuple(path.resolve() for path in inputs)
        self._force = force
        self._handlers: dict[signal.Signals, Any] = {}
        self._lock = -1

    def check(self, nbytes: int = 0) -> None:
        """Refuse an output that exists, without force, or that is not ours to replace, or has no place.

        Args:
            nbytes: What is going to be written, at least.
        """
        for path in self._inputs:
            if path.is_relative_to(self.out):
                raise Refused(f"{self.out} is or contains the input {path}; choose another output directory")
            if path.is_dir() and self.out.is_relative_to(path):
                raise Refused(
                    f"{self.out} is inside the input {path}; choose an output directory outside of it"
                )
        _check_place(self.out, nbytes)
        if not self.out.exists():
            return
        if not self.out.is_dir():
            raise Refused(f"{self.out} exists and is not a directory; choose another output directory")
        if not any(self.out.iterdir()):
            return
        if not self._force:
            raise Refused(f"{self.out} exists and is not empty; pass --force to replace it")
        if not ((self.out / MANIFEST).is_file() or _is_model(self.out)):
            raise Refused(
                f"{self.out} is neither an output of qc nor a model checkpoint (no {MANIFEST}, no config.json"
                " with safetensors); --force does not replace it: remove it yourself or choose another"
                " directory"
            )

    def __enter__(self) -> Output:
        self.check()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.removed = tuple(path.name for path in self._left_behind() if _remove_unowned(path))
        self._lock = _make_owned(self.path)
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is signal.SIG_DFL:
                    self._handlers[number] = signal.signal(number, _stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                _flush(self.path)
                self._place()
        finally:
            for number in self._handlers:
                signal.signal(number, signal.SIG_IGN)
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    def _left_behind(self) -> list[Path]:
        return sorted(
            path
            for path in self.out.parent.iterdir()
            if path.name.startswith(self._partial) and path.name.removeprefix(self._partial).isdigit()
        )

    def _place(self) -> None:
        """Rename into place. A directory that is replaced ends at ``self.path`` and is removed from there."""
        self.check()
        if self.out.exists() and any(self.out.iterdir()):
            _exchange(self.path, self.out)
        else:
            self.path.rename(self.out)
        _fsync(self.out.parent)


def _check_place(out: Path, nbytes: int) -> None:
    """Refuse an output that can not be made where it is asked for."""
    above = next(path for path in out.parents if os.path.lexists(path))
    if not above.is_dir():
        raise Refused(f"{out}: {above} is not a directory; choose another output directory")
    if not os.access(above, os.W_OK | os.X_OK):
        raise Refused(f"{out}: {above} is not writable; choose another output directory")
    free = shutil.disk_usage(above).free
    if free < nbytes:
        raise Refused(
            f"{out}: {nbytes / 1e9:.3f} GB are to be written and {free / 1e9:.3f} GB are free there; make room or"
            " choose another output directory"
        )


def _make_owned(path: Path) -> int:
    """Make a directory and lock it for as long as this process lives; returns the descriptor of the lock."""
    while True:
        path.mkdir()
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if path.is_dir() and os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
        os.close(descriptor)  # taken for left behind, and removed, before it was locked


def _remove_unowned(path: Path) -> bool:
    """Remove a directory whose owner no longer lives; whether that was so."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path)
    except OSError:  # locked by its owner, or not ours to remove
        return False
    finally:
        os.close(descriptor)
    return True


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _is_model(directory: Path) -> bool:
    return (directory / "config.json").is_file() and any(directory.glob("*.safetensors"))


def _exchange(left: Path, right: Path) -> None:
    """Swap two directories: in one step where the file system can, else in three renames that are undone."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        if rename(_AT_FDCWD, os.fsencode(left), _AT_FDCWD, os.fsencode(right), _RENAME_EXCHANGE) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
            raise OSError(number, os.strerror(number), str(right))
    aside = right.with_name(f"{right.name}.replaced-{os.getpid()}")
    right.rename(aside)
    try:
        left.rename(right)
    except OSError:
        aside.rename(right)
        raise
    aside.rename(left)


def _flush(directory: Path) -> None:
    for folder, _, files in os.walk(directory):
        for file in files:
            _fsync(Path(folder) / file)
        _fsync(Path(folder))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_side_files(source: Path, destination: Path, trust_remote_code: bool = False) -> tuple[str, ...]:
    """Copy tokenizer, generation config, chat template and the like; return their names.

    Weights, indices, ``config.json`` and files of another quantization stay behind; Python files come along
    only when remote code is trusted. A link that leads out of the source directory is refused.
    """
    copied: list[str] = []
    patterns = (*_COPIED, "*.py") if trust_remote_code else _COPIED
    for path in sorted(source.iterdir()):
        wanted = any(fnmatch(path.name, pattern) for pattern in patterns)
        if not wanted or any(fnmatch(path.name, pattern) for pattern in _REPLACED) or not path.is_file():
            continue
        if path.suffix == ".py" and not trust_remote_code:
            continue
        if not inside(source, path):
            raise Refused(
                f"{path} is a link to {path.resolve()}, outside the checkpoint directory; copy it there"
            )
        shutil.copyfile(path, destination / path.name)
        copied.append(path.name)
    return tuple(copied)


def exported_config(
    config: Mapping[str, Any], dtype: torch.dtype, tied: bool | None = None, remote_code: bool = False
) -> dict[str, Any]:
    """The ``config.json`` of an export.

    Args:
        config: That of the input checkpoint; it is not changed.
        dtype: Dtype of the float tensors, written under the key that is there (``dtype``, ``torch_dtype`` or
            both).
        tied: Whether embedding and head are still one tensor; None leaves the entry as it is.
        remote_code: Whether Python files are exported; without them ``auto_map`` would name files that are
            not there.
    """
    result = json.loads(json.dumps(config))
    name = str(dtype).removeprefix("torch.")
    parts = [result] + ([result["text_config"]] if isinstance(result.get("text_config"), dict) else [])
    for part in parts:
        part.pop("quantization_config", None)
        part.pop("compression_config", None)
        for key in {"dtype", "torch_dtype"} & part.keys():
            part[key] = name
        if tied is not None and (part is result or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = tied
    if not {"dtype", "torch_dtype"} & result.keys():
        result["torch_dtype"] = name
    if not remote_code:
        result.pop("auto_map", None)
    result.pop("transformers_weights", None)
    return result


def write_json(path: Path, value: Mapping[str, Any], indent: int = 2) -> None:
    """Write a JSON file, keys in the order given."""
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def check_written(directory: Path, specs: Mapping[str, TensorSpec]) -> None:
    """Compare the headers of the safetensors at the top level of a directory with what was announced.

    Raises:
        Failed: A tensor is missing, of another dtype or shape, twice, or was never announced.
    """
    found: dict[str, TensorSpec] = {}
    for path in sorted(directory.glob("*.safetensors")):
        for name, entry in read_header(path).items():
            if name in found:
                raise Failed(f"{directory}: {name} was written into two files")
            found[name] = TensorSpec(entry.dtype, entry.shape)
    for name in found.keys() | specs.keys():
        planned = specs.get(name)
        wanted = None if planned is None else TensorSpec(planned.dtype, planned.shape)
        if found.get(name) != wanted:
            raise Failed(f"{directory}: {name} is {found.get(name)}, planned was {wanted}")


class RunAsOne:
    """A watch on tensors that are written: of linears that a server runs as one it keeps one for all.

    Args:
        first_of: Those linears, each with the first of them.
    """

    def __init__(self, first_of: Mapping[str, str]) -> None:
        self._first_of = first_of
        self._seen: dict[tuple[str, str], tuple[str, torch.Tensor]] = {}

    def check(self, module: str, leaf: str, tensor: torch.Tensor) -> None:
        """Take one finished tensor of a linear; Failed when another linear's is there and differs."""
        first = self._first_of.get(module)
        if first is None or leaf not in SHARED:
            return
        other, known = self._seen.setdefault((first, leaf), (module, tensor))
        if not torch.equal(known, tensor):
            raise Failed(
                f"{leaf} of {other} and of {module} differ, and the server runs both as one linear, with the last"
                " that it reads: the pass that made them must give linears that read one value the same"
            )


def digests(files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of files, by the name that each is given."""
    result: dict[str, dict[str, Any]] = {}
    for name in sorted(files):
        with files[name].open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        result[name] = {"bytes": files[name].stat().st_size, "sha256": digest}
    return result


def manifest_of(
    directory: Path,
    inputs: Mapping[str, Path],
    plan: str,
    rewrites: Mapping[str, int],
    remote_code: Iterable[str] = (),
) -> dict[str, Any]:
    """A manifest: versions, the plan, sha256 of every input and of every file written so far.

    Args:
        directory: The output, complete but for the manifest; ``run.json`` and the model card are left out.
        inputs: Files that the output depends on, by a name that says nothing of this machine.
        plan: The plan as text.
        rewrites: How many rewrites each pass of the plan makes.
        remote_code: Python files of the checkpoint that ran, because they were trusted.
    """
    return {
        "versions": {name: version(name) for name in ("qc", "torch", "transformers")},
        "plan": plan,
        "rewrites": dict(rewrites),
        "remote_code": list(remote_code),
        "inputs": digests(inputs),
        "outputs": digests(_written(directory)),
    }


def write_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Write ``qc_manifest.json``, with the digests of files that were written since it was made."""
    known: dict[str, Any] = manifest["outputs"]
    since = digests({name: path for name, path in _written(directory).items() if name not in known})
    write_json(directory / MANIFEST, {**manifest, "outputs": dict(sorted((known | since).items()))})


def _written(directory: Path) -> dict[str, Path]:
    files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    return {name: path for name, path in files.items() if name not in UNHASHED}
