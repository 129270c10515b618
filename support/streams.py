"""What a script prints: lines that appear at once, and never end its work.

stdout may be closed, a full disk, a terminal that is gone, or one that lacks a letter.
"""

import codecs
import os
import sys
from typing import Any, TextIO

NAMES = "names"  # of files: their bytes where they are no text, escapes for what a console lacks


def name_or_escape(error: UnicodeEncodeError) -> tuple[str | bytes, int]:
    """The error handler NAMES: one letter as its byte, or else as its escape."""
    one = type(error)(error.encoding, error.object, error.start, error.start + 1, error.reason)
    try:
        return codecs.lookup_error("surrogateescape")(one)
    except UnicodeEncodeError:
        return codecs.backslashreplace_errors(one)


codecs.register_error(NAMES, name_or_escape)


class Lasting:
    """A stream that is laid aside, in one line, when it can no longer be written to.

    A pipe that nobody reads any more (`| head`) still raises BrokenPipeError on stdout.
    """

    def __init__(self, stream: TextIO, name: str):
        self.stream, self.name = stream, name

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            self.lay_aside(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self.lay_aside(error)

    def lay_aside(self, error: OSError) -> None:
        """What is printed from here on goes nowhere, and so does what waits to be written."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        if self.name == "stdout":
            if isinstance(error, BrokenPipeError):
                raise error
            problem = f"cannot write to stdout: {error.strerror or error}"
            print(f"warning: {problem}; it is left out", file=sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def open_up() -> None:
    """Makes stdout and stderr last. A letter that a console lacks is escaped."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:  # closed, which support/stopping.py has filled
            stream = open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        stream.reconfigure(errors="backslashreplace", line_buffering=True)
        setattr(sys, name, Lasting(stream, name))
