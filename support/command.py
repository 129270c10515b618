"""The command line that every script shares: flags, one-line errors, files never half-written.

Nothing here knows about images or text. Each script builds a `Parser`, and ends with `run(main)`,
which turns a `UserError` into one line on stderr and exit code 2; a bug keeps its traceback.
"""

import argparse
import contextlib
import glob
import importlib
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
        return super().format_help()

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see --help)")

    def typed(self, argv: list[str]) -> dict[str, Any]:
        """Returns only the flags that stand in `argv`, as {destination: value}."""
        absent: list[Any] = []  # argparse leaves what the namespace holds; `append` copies it
        held = argparse.Namespace(**dict.fromkeys(self.defaults(), absent))
        found = vars(super().parse_args([dashed(word) for word in argv], held))
        # A positional that is absent gets None all the same.
        return {flag: x for flag, x in found.items() if x is not absent and x is not None}

    def defaults(self) -> dict[str, Any]:
        """Returns every flag's default, as {destination: value}."""
        return {a.dest: a.default for a in self._actions if a.default != argparse.SUPPRESS}

    def group(self, title: str) -> list[str]:
        """The destinations of a group's flags."""
        groups = [group for group in self._action_groups if group.title == title]
        return [action.dest for group in groups for action in group._group_actions]

    def parse_args(self, argv: list[str]) -> argparse.Namespace:
        return argparse.Namespace(**{**self.defaults(), **self.typed(argv)})


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
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which it becomes when the block ends without error.

    Raises UserError when the folder cannot be made or the file cannot be written (full disk too).
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path  # /dev/stdout and the like are written to, never replaced
        return
    temporary = path.parent / f".{path.stem}-{secrets.token_hex(4)}{path.suffix}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # it has become `path`, or could not be made
            temporary.unlink()


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


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C and SIGTERM inside the block raise KeyboardInterrupt(exit code)."""

    def stop(signum: int, _frame: Any) -> None:
        raise KeyboardInterrupt(128 + signum)

    signals = (signal.SIGINT, signal.SIGTERM)
    earlier = {signum: signal.signal(signum, stop) for signum in signals}
    try:
        yield
    finally:
        for signum, handler in earlier.items():
            signal.signal(signum, handler)


def run(main: Callable[[list[str]], int | None]) -> None:
    """Runs a script's `main` on the command line's words and leaves with its exit code."""
    script = Path(sys.argv[0]).name
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        print(f"{script}: error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print(f"{script}: stopped", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # `python evaluate.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)
