"""The command line that every script shares: flags, one-line errors, files never half-written.

Nothing here knows about images or text. Each script builds a `Parser`, and ends with `run(main)`,
which turns a `UserError` into one line on stderr and exit code 2; a bug keeps its traceback.
"""

import argparse
import atexit
import contextlib
import errno
import glob
import importlib
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import Any

from support import stopping

HERE = Path(__file__).resolve().parents[1]  # the project, not this folder


class UserError(Exception):
    """Something that the user can put right: the message says what is wrong and what to do."""


class Parser(argparse.ArgumentParser):
    """Flags with dashes or underscores; one-line errors; knows which flags were typed."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def format_help(self) -> str:
        """A flag's help ends in its default, unless there is none to tell."""
        for action in self._actions:
            text, default = action.help or "", action.default
            silent = default in (None, argparse.SUPPRESS, []) or default is False
            if action.option_strings and not silent and "%(default)s" not in text:
                action.help = f"{text} (default: %(default)s)".strip()
            choices = ", ".join(action.choices or ())
            if len(choices) > 40 and not action.metavar:  # argparse breaks no list in braces
                action.metavar, action.help = "NAME", f"{choices}; {action.help}"
        return super().format_help()

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see --help)")

    def typed(self, argv: list[str]) -> dict[str, Any]:
        """Returns only the flags that stand in `argv`, as {destination: value}."""
        absent: list[Any] = []  # argparse leaves what the namespace holds; `append` copies it
        held = argparse.Namespace(**dict.fromkeys(self.defaults(), absent))
        found = vars(super().parse_args([dashed(word) for word in argv], held))
        # A positional that is absent gets None all the same, or an empty list.
        typed = {flag: x for flag, x in found.items() if x is not absent and x not in (None, [])}
        return {flag: at_home(x) for flag, x in typed.items()}

    def defaults(self) -> dict[str, Any]:
        """Returns every flag's default, as {destination: value}."""
        return {a.dest: a.default for a in self._actions if a.default != argparse.SUPPRESS}

    def group(self, title: str) -> list[str]:
        """The destinations of a group's flags."""
        groups = [group for group in self._action_groups if group.title == title]
        return [action.dest for group in groups for action in group._group_actions]

    def parse_args(self, argv: list[str]) -> argparse.Namespace:
        return argparse.Namespace(**{**self.defaults(), **self.typed(argv)})


def at_home(value: Any) -> Any:
    """A path in ~, which shells leave as it is in --out=~/x, where it is meant."""
    if isinstance(value, Path) or (isinstance(value, str) and value.startswith("~/")):
        with contextlib.suppress(RuntimeError):  # nobody's home
            return type(value)(Path(value).expanduser())
    return value


def dashed(word: str) -> str:
    """`--batch_size=8` -> `--batch-size=8`; whatever is not a flag's name stays as it is."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def number(
    kind: type, low: float, high: float, above: bool = False
) -> Callable[[str], float | int]:
    """An argparse type: a number of `kind` in [low, high], or in (low, high] with `above`."""
    sort = "a whole number" if kind is int else "a number"
    allowed = f"{sort} in {'(' if above else '['}{low:g}, {high:g}]"

    def parse(text: str) -> float | int:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high and not (above and value == low):  # nan never is
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")

    return parse


@contextlib.contextmanager
def atomic_write(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which it becomes when the block ends without error.

    `durable`: not before its content is on the disk, so that no power cut leaves half of it.
    Raises UserError when the folder cannot be made or the file cannot be written (full disk too).
    """
    path = Path(path)
    temporary = beside(path)
    try:
        if is_device(path):
            yield path  # /dev/stdout and the like are written to, never replaced
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with stopping.undone(lambda: remove(temporary)):
            temporary.touch()
            yield temporary
            if durable:
                to_disk(temporary)
            replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def is_device(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()


def remove(path: Path) -> None:
    """Deletes a file, if it is there and may be deleted."""
    with contextlib.suppress(OSError):
        path.unlink()


def to_disk(path: Path) -> None:
    """Returns when a file's content is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def replace(source: Path, target: Path) -> None:
    """os.replace; tries again for a moment where Windows has the target open, as a reader does."""
    for _ in range(5):
        with contextlib.suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(0.1)
    return os.replace(source, target)


def output(text: str) -> Path:
    """An argparse type: a file to write. Raises UserError before the work, not after it."""
    path = at_home(Path(text))
    if is_device(path):
        return path
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; name a file")
    missing = [folder for folder in path.parents if not folder.exists()]
    temporary = beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        remove(temporary)
        for folder in missing:
            with contextlib.suppress(OSError):  # could not be made either
                folder.rmdir()
    return path


def output_folder(text: str) -> Path:
    """The same for a folder of files to write."""
    return output(str(Path(text, "file"))).parent


def beside(path: Path) -> Path:
    """A name for what is to become `path`."""
    return path.parent / f".{path.stem}-{secrets.token_hex(4)}{path.suffix}"


def sweep(path: Path) -> None:
    """Deletes what killed processes left of `atomic_write(path)`."""
    for left in path.parent.glob(f".{glob.escape(path.stem)}-????????{path.suffix}"):
        left.unlink(missing_ok=True)


def later(module: str, name: str) -> Callable:
    """The function `name` of `module`, which is imported when the function is first called.

    So a table can name what lies in a folder without loading it, and without a circle.
    """

    def call(*values: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*values, **options)

    call.__name__ = call.__qualname__ = name
    return call


def warn(message: str) -> None:
    """One line on stderr."""
    print(f"warning: {' '.join(message.split())}", file=sys.stderr, flush=True)


def say_unused(typed: Container[str], flags: Iterable[str], reason: str) -> None:
    """Warns of typed flags that have no effect on this run."""
    if some := [dashed(f"--{flag}") for flag in flags if flag in typed]:
        warn(f"no effect on this run: {', '.join(some)} ({reason})")


# What torch, NumPy, oneDNN and C++ say for want of memory.
NO_MEMORY = (
    "out of memory|(can't|cannot|unable to) allocate|not enough memory|bad_alloc|alloc_failed|"
    "could not create a memory"
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the machine, or its GPU, has too little memory."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError) and bool(re.search(NO_MEMORY, str(error), re.I))


def run(main: Callable[[list[str]], int | None]) -> None:
    """Runs a script's `main` on the command line's words and leaves with its exit code."""
    stopping.listen()
    stopping.open_up()
    try:
        with stopping.raising():
            code = ended(main)
    except KeyboardInterrupt as error:
        stopping.say()
        code = stopping.code_of(error)
    if not stopping.state["stopping"]:
        atexit._run_exitfuncs()
    # Not by sys.exit: while Python tears itself down a signal ends it without a line.
    stopping.end(code or 0)


def ended(main: Callable[[list[str]], int | None]) -> int | None:
    """The exit code of `main`; its errors in one line."""
    script = Path(sys.argv[0]).name
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"{script}: error: {' '.join(str(error).split())}", file=sys.stderr)
    except BrokenPipeError:  # `python evaluate.py | head`
        return 1
    except (MemoryError, RuntimeError, OSError) as error:
        if not out_of_memory(error):
            raise
        advice = "close other programs, or give fewer --workers, on a GPU --device cpu"
        print(f"{script}: error: out of memory; {advice}", file=sys.stderr)
    return 2
