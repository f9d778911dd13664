"""Words for mistakes: one line for what the user can put right, none for a bug of ours."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

#: What ends the writing of a file that was begun, whoever writes it; ENOENT is tempfile's, which
#: finds no folder that can be written.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENOENT)
_REMEDIES = {
    (errno.ENOSPC, errno.EDQUOT): " Make room, or choose another folder.",
    (errno.EFBIG,): " Raise the limit on the size of files (ulimit -f).",
    (errno.EACCES, errno.EPERM, errno.EROFS): " Choose another folder.",
    (errno.EEXIST, errno.ENOTDIR, errno.EISDIR): " Something else is there: move it, or choose "
    "another name.",
    (errno.ENAMETOOLONG,): " Choose a shorter name.",
}


class BadInput(Exception):
    """Something the user can put right; the message is one line."""


def explain(error: BaseException, folder: Path | None = None) -> str | None:
    """One line for a user's mistake; None for a bug of ours.

    Args:
        error: What was raised.
        folder: What was written to, where the error does not say it.
    """
    cause = error
    while cause.__cause__ is not None and _is_wrapped_by_hydra(cause):
        cause = cause.__cause__
    if isinstance(cause, BadInput):
        return str(cause)
    if _is_wrapped_by_hydra(cause):
        return f"config: {one_line(str(cause).splitlines()[0])}"
    text = str(cause.args[0]) if isinstance(cause, KeyError) and cause.args else str(cause)
    # Another process's exception arrives as text that ends with it.
    elsewhere = "DataLoader worker process" in text or type(cause).__name__.startswith("Process")
    last = text.strip().splitlines()[-1] if text.strip() else ""
    if elsewhere and last.startswith(("ValueError: ", "KeyError: ")):
        return one_line(last.split(": ", 1)[1])
    if elsewhere and (told := re.match(r"\w+Error: (\[Errno (\d+)\] .*)", last)):
        return _files(told[1], int(told[2]), folder if "'" not in told[1] else None)
    if isinstance(cause, TypeError) and "unexpected keyword argument" in text:
        return f"config: expected a key that its target knows, got {one_line(text)}. Remove it."
    # Our messages start "where: expected"; "not enough values to unpack (expected 2" is a bug.
    if isinstance(cause, ValueError | KeyError) and ": expected " in text and _is_ours(cause):
        return one_line(text)
    if type(cause).__module__.partition(".")[0] == "yaml":
        return _yaml(cause)
    for own in (cause, cause.__cause__):  # logging's own ValueError, say, is due to one
        if isinstance(own, OSError) and own.filename is not None:
            return _files(str(own), own.errno)
        if isinstance(own, OSError) and own.errno in _DISK:
            return _files(str(own), own.errno, folder)
    # torch's words for memory that processes share, which is files as well.
    shared = re.search(r"^unable to \w+ .*(<.+>).*: (.+) \((\d+)\)$", text)
    if isinstance(cause, RuntimeError) and shared:
        return _files(f"[Errno {shared[3]}] {shared[2]}: {shared[1]}", int(shared[3]))
    if type(cause).__name__ == "MisconfigurationException":  # Lightning's
        return f"trainer: expected settings that fit this machine, got: {one_line(text)}"
    if type(cause).__name__ == "ProcessExitedException":
        return f"trainer: expected all processes to end by themselves, got: {one_line(text)}."
    if type(cause).__name__ == "OutOfMemoryError":
        return (
            f"memory: expected model and batch to fit the device, got: {one_line(text)} "
            "Lower data.batch_size, or choose model.dtype=bfloat16 (to train, "
            "trainer.precision=bf16-mixed)."
        )
    return _in_a_strategy(cause)


def _yaml(error: BaseException) -> str:
    """The line for a file that is no YAML: where it ends to be one, and why."""
    mark: Any = getattr(error, "problem_mark", None)
    if mark is not None:
        place, problem = f"{mark.name}, line {mark.line + 1}", getattr(error, "problem", None)
    else:  # characters that no YAML may have
        name, position = getattr(error, "name", "config"), getattr(error, "position", 0)
        place, problem = f"{name}, character {position}", getattr(error, "reason", None)
    return f"{place}: expected YAML, got: {one_line(str(problem or error))}. Correct the file."


def _in_a_strategy(error: BaseException) -> str | None:
    """The line for what a user's own strategy raised when the engine asked it; else None."""
    ours, before, frames = Path(__file__).parents[1], False, error.__traceback__
    while frames is not None:
        frame, line, frames = frames.tb_frame, frames.tb_lineno, frames.tb_next
        inside = Path(frame.f_code.co_filename).is_relative_to(ours)
        name, asked = frame.f_code.co_name, frame.f_locals.get("self")
        if before and not inside and name in ("needs", "score", "select") and asked is not None:
            from tokenprune.imports import reason

            return (
                f"{type(asked).__name__}.{name}: expected it to run, got {one_line(reason(error))}"
                f", called by {frame.f_code.co_filename}, line {line}. Repair it; "
                "HYDRA_FULL_ERROR=1 shows all calls."
            )
        before = inside
    return None


def _files(text: str, number: int | None, folder: Path | None = None) -> str:
    """The line for a file that cannot be read or written, or one in a folder, and why."""
    text += "" if folder is None else f": {str(folder)!r}"
    remedy = next((own for numbers, own in _REMEDIES.items() if number in numbers), "")
    return f"files: expected to read and write what a run needs, got: {one_line(text)}.{remedy}"


def is_interruption(error: BaseException) -> bool:
    """Whether Ctrl-C is behind an exception: Lightning makes an exit of it, others what they do."""
    return any(isinstance(cause, KeyboardInterrupt) for cause in _causes(error))


def one_line(text: str) -> str:
    """A text without line breaks."""
    return " ".join(text.split())


def unknown(what: str, name: str, choices: Sequence[str]) -> str:
    """The message for a name that is not among `choices`: lists them and names the nearest."""
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.0)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{what}: expected one of {list(choices)}, got {name!r}.{hint}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception, what it was raised from, and what it was raised while handling."""
    seen: list[BaseException] = []
    waiting = [error]
    while waiting:
        cause = waiting.pop()
        if cause in seen:
            continue
        seen.append(cause)
        yield cause
        context = None if cause.__suppress_context__ else cause.__context__
        waiting += [other for other in (cause.__cause__, context) if other is not None]


def _is_wrapped_by_hydra(error: BaseException) -> bool:
    """Whether Hydra or OmegaConf raised it; by name, for `--help` loads neither."""
    return any(
        kind.__module__.partition(".")[0] in ("hydra", "omegaconf") for kind in type(error).__mro__
    )


def _is_ours(error: BaseException) -> bool:
    """Whether our own code raised it, on purpose; a library's exception is nobody's message."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    if frame is None:
        return False
    # By the whole path: a checkout, and the .venv in it, may be in a folder called tokenprune.
    source = Path(frame.tb_frame.f_code.co_filename)
    return source.is_relative_to(Path(__file__).parents[1])
