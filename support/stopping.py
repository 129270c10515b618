"""What ends a script, in one line and with no process left, and what must not: a lost stream.

Ctrl-C, SIGTERM and a closed terminal end it at any moment: support/python.py calls `listen` before
anything else is imported. From `raising` on (support/command.py) a signal raises KeyboardInterrupt,
so that half-written files are tidied away; a thread ends the process all the same when that takes
long, as inside a step of torch, which nothing else can interrupt. A stdout that is closed, a full
disk, a terminal that is gone, or one that lacks a letter, ends nothing (`open_up`).
"""

import codecs
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

GRACE = 1.5  # seconds between a signal and the end, for what has to be tidied
SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
    if hasattr(signal, name)
]


def stopped() -> str:
    return f"{Path(sys.argv[0]).name}: stopped"


last_words: list[Callable[[], str]] = [stopped]  # the last of them is said
undoing: list[Callable[[], Any]] = []  # what must not be left behind
state = {"listening": False, "stopping": False, "said": False}


def in_a_script() -> bool:
    """Whether a script of the project runs, and not a worker of its, a test or a notebook."""
    project = Path(__file__).resolve().parents[1]
    script = getattr(sys.modules["__main__"], "__file__", None)  # none in a notebook
    return bool(script) and Path(script).resolve().parent in (project, project / "report")


def listen() -> None:
    """From here on a signal ends the process at once: nothing is begun that could be left half."""
    if state["listening"]:
        return
    state["listening"] = True
    fill_closed()
    receiver, sender = socket.socketpair()  # not a pipe: Windows wants a socket
    sender.setblocking(False)
    for signum in SIGNALS:
        handle(signum, leave)
    signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    sys.unraisablehook = quiet_hook(sys.unraisablehook)
    threading.Thread(target=watch, args=(receiver, sender), daemon=True).start()


def fill_closed() -> None:
    """Where stdin, stdout or stderr is closed, no file that is opened later takes its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def handle(signum: int, handler: Callable[[int, Any], None]) -> None:
    """Sets a handler; `nohup` has a hangup ignored, and so it stays."""
    hangup = getattr(signal, "SIGHUP", None)
    if signum != hangup or signal.getsignal(signum) is not signal.SIG_IGN:
        signal.signal(signum, handler)


def watch(receiver: socket.socket, _sender: socket.socket) -> None:
    """Ends the process where the main thread has not done so; it holds both ends open."""
    while True:
        signum = receiver.recv(1)[0]
        if signum in SIGNALS:
            time.sleep(GRACE)
            leave(signum)


def leave(signum: int, _frame: Any = None) -> None:
    """Says the last words, tidies and is gone. Workers follow: see support/workers.py."""
    say()
    end(128 + signum)


def end(code: int) -> None:
    """Undoes what must not be left, and waits for nothing else."""
    for action in reversed(undoing):
        with contextlib.suppress(Exception):
            action()
    if sys.platform != "linux" and "multiprocessing.util" in sys.modules:
        # Else a process that keeps count of semaphores, where workers are not forked, complains.
        with contextlib.suppress(Exception):
            sys.modules["multiprocessing.util"]._run_finalizers(0)
    os._exit(code)


def say() -> None:
    """The last words, once; not by `print`, into which the signal may have come."""
    if not state["said"]:
        state["said"] = True
        with contextlib.suppress(Exception):  # the terminal is gone
            line = f"{last_words[-1]()}\n".encode("utf-8", "backslashreplace")
            os.write(2, b"\n" + line if os.isatty(2) else line)  # a bar may stand in the line


def stop(signum: int, _frame: Any = None) -> None:
    """The first signal raises KeyboardInterrupt(exit code), a second one does not wait."""
    if state["stopping"]:
        leave(signum)
    state["stopping"] = True
    raise KeyboardInterrupt(128 + signum)


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Inside the block signals raise KeyboardInterrupt; after it they end the process at once."""
    for signum in SIGNALS:
        handle(signum, stop)
    try:
        yield
    finally:
        for signum in SIGNALS:
            handle(signum, leave)


@contextlib.contextmanager
def saying(words: Callable[[], str]) -> Iterator[None]:
    """Inside the block these are the last words."""
    last_words.append(words)
    try:
        yield
    finally:
        last_words.pop()


@contextlib.contextmanager
def undone(action: Callable[[], Any]) -> Iterator[None]:
    """Calls `action` when the block ends, and also when the process ends inside it."""
    undoing.append(action)
    try:
        yield
    finally:
        undoing.remove(action)
        action()


def code_of(error: KeyboardInterrupt) -> int:
    """The exit code of an interrupted process; Python's own KeyboardInterrupt has no number."""
    return error.args[0] if error.args else 128 + signal.SIGINT


def quiet_hook(hook: Callable[[Any], None]) -> Callable[[Any], None]:
    """A KeyboardInterrupt raised inside a destructor is lost there; `watch` ends the process."""

    def ignore(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            hook(unraisable)

    return ignore


# ------------------------------------------------------------------------- what is printed


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
        if stream is None:  # closed, which `fill_closed` has filled
            stream = open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        stream.reconfigure(errors="backslashreplace", line_buffering=True)
        setattr(sys, name, Lasting(stream, name))
