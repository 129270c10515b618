"""A script that is stopped at any moment: one line, within 3 seconds, and no process is left."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, start, write_kaggle
from PIL import Image

from support import workers
from support.command import UserError
from support.workers import in_processes

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
ENDS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def as_in_a_terminal() -> None:
    """A shell's background job ignores SIGINT, and what nohup starts SIGHUP: so may the tests."""
    for signum in ENDS:
        signal.signal(signum, signal.SIG_DFL)


def begin(*words: object, code: str = "") -> subprocess.Popen[str]:
    """A script of the project, or Python code, in a process group of its own."""
    first = ["-c", code] if code else [str(ROOT / str(words[0]))]
    return subprocess.Popen(
        [sys.executable, *first, *map(str, words[0 if code else 1 :])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=as_in_a_terminal,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def alive(group: int) -> list[str]:
    """The processes of a group that run; an orphan that has ended may wait to be noticed."""
    found = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True)
    rows = (line.split(None, 2) for line in found.stdout.splitlines())
    return [row[2] for row in rows if row[0] == str(group) and row[1][0] not in "ZX"]


def stop(process: subprocess.Popen[str], signum: int) -> str:
    """Sends a signal to the group; what stood on stderr. Checks code, time and what is left."""
    os.killpg(process.pid, signum)
    since = time.monotonic()
    try:
        _, message = process.communicate(timeout=20)
        assert time.monotonic() - since < 3
        while left := alive(process.pid):
            assert time.monotonic() - since < 3, left
            time.sleep(0.05)
    finally:
        if alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == ENDS[signum], message
    assert message.count("\n") == 1 and "stopped" in message, message
    return message


def wait_for(pattern: str, folder: Path, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 100
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, pattern
        time.sleep(0.01)


# ------------------------------------------------------------------------------ whole scripts


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures enough for workers, and slow enough to stop them."""
    data = write_kaggle(tmp_path_factory.mktemp("many") / "photos", 220)
    Image.effect_noise((1600, 1600), 60).convert("RGB").save(data / "images" / "photo_000.jpg")
    content = (data / "images" / "photo_000.jpg").read_bytes()
    for path in (data / "images").iterdir():
        path.write_bytes(content)
    return data


@pytest.mark.parametrize(("signum", "seconds"), [*zip(ENDS, (0.15, 0.5, 1.0), strict=True)])
def test_stopped_amid_the_imports(photo_data: Path, tmp_path: Path, signum: int, seconds: float):
    process = begin("train.py", *start(photo_data, tmp_path / "run", tmp_path / "cache"))
    time.sleep(seconds)
    stop(process, signum)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("signum", ENDS)
def test_stopped_while_pictures_are_decoded(many: Path, tmp_path: Path, signum: int):
    words = start(many, tmp_path / "run", tmp_path / "cache", "--workers", 8)
    process = begin("train.py", *words)
    wait_for(".building-*/*/pixels.npy", tmp_path / "cache", process)
    time.sleep(0.2)
    line = stop(process, signum)
    assert line == "warning: stopped; no epoch was finished\n"
    assert not (tmp_path / "run").exists() and not list((tmp_path / "cache").iterdir())


@pytest.mark.flickr8k
def test_stopped_at_random_moments_of_real_data(flickr8k: Path, tmp_path: Path):
    """Twenty times, with eight workers: a terminal sends Ctrl-C to them all."""
    moments = random.Random(0)
    words = ("--data", flickr8k, "--image-size", 32, "--workers", 8, "--recipe", "plain")
    for turn in range(20):
        out, cache = tmp_path / f"run{turn}", tmp_path / "cache"
        process = begin("train.py", *words, "--out", out, "--cache", cache)
        time.sleep(moments.uniform(0.1, 4))
        stop(process, moments.choice(list(ENDS)))
        assert not out.exists() or (out / "config.json").exists()


# ------------------------------------------------------------------------- hard places to stop

RUN = "import sys; from support.command import run; sys.argv = ['x.py']\n"


def stopped_in(code: str, signum: int = signal.SIGINT) -> str:
    """What a program said when it was stopped after it had printed `here`."""
    process = begin(code=RUN + code)
    assert process.stdout.readline() == "here\n"
    time.sleep(0.1)
    return stop(process, signum)


def test_stopped_in_a_step_that_nothing_interrupts():
    """As inside a gradient, where Python's own handlers do not run."""
    long = "print('here'); hashlib.pbkdf2_hmac('sha256', b'x', b'y', 2**31 - 1)"
    assert stopped_in(f"import hashlib\ndef main(argv): {long}\nrun(main)") == "x.py: stopped\n"


def test_stopped_in_a_destructor():
    """Python prints an exception that is raised there, and goes on."""
    code = """
import time
class Slow:
    def __del__(self):
        print("here")
        time.sleep(30)
def main(argv):
    Slow()
    time.sleep(30)
run(main)
"""
    assert stopped_in(code, signal.SIGTERM) == "x.py: stopped\n"


def test_nothing_is_torn_down_after_the_end():
    """Python does so without its handlers: a signal would end it without a line."""
    code = """
import atexit, time
class Slow:
    def __del__(self):
        print("torn down")
        time.sleep(30)
slow = Slow()
def main(argv):
    atexit.register(print, "tidied")
    print("here", end="")
run(main)
"""
    process = begin(code=RUN + code)
    assert process.communicate(timeout=20) == ("heretidied\n", "") and process.returncode == 0


def test_a_hangup_that_is_ignored_stays_so():
    """`nohup python train.py`"""
    code = "import signal, time; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + RUN
    code += "def main(argv): print('here'); time.sleep(1); print('whole')\nrun(main)"
    process = begin(code=code)
    assert process.stdout.readline() == "here\n"
    os.killpg(process.pid, signal.SIGHUP)
    assert process.communicate(timeout=60) == ("whole\n", "") and process.returncode == 0


# ------------------------------------------------------------------------------------ workers

SLOW = """
import time
from support.workers import in_processes
def work(number):
    if number == 2:
        time.sleep(30)
    return number
def main(argv):
    for number in in_processes(work, range(100), 3, 1):
        print("here")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the program has no file to import again")
def test_workers_end_with_a_parent_that_is_killed():
    process = begin(code=RUN + SLOW + "run(main)")
    assert process.stdout.readline() == "here\n" and len(alive(process.pid)) == 4
    process.kill()
    until = time.monotonic() + 3
    while left := alive(process.pid):
        assert time.monotonic() < until, left
        time.sleep(0.05)
    process.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="the program has no file to import again")
def test_workers_end_with_a_consumer_that_fails():
    """Nobody waits for the one that would take half a minute."""
    failing = SLOW + '        raise UserError("enough")\n'
    process = begin(code=RUN + "from support.command import UserError\n" + failing + "run(main)")
    assert process.communicate(timeout=10) == ("here\n", "x.py: error: enough\n")
    assert process.returncode == 2 and not alive(process.pid)


def twice(number: int) -> int:
    return 2 * number


def die(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def counted(taken: list[int], count: int) -> Iterator[int]:
    for number in range(count):
        taken.append(number)
        yield number


def test_workers_keep_order_and_are_never_far_ahead():
    taken: list[int] = []
    results = in_processes(twice, counted(taken, 200), 2, 4)
    assert next(results) == 0
    time.sleep(0.3)
    assert len(taken) <= 4 * 5
    assert list(results) == [2 * number for number in range(1, 200)]
    assert list(in_processes(twice, [], 2, 4)) == []


def test_windows_waits_for_61_processes_at_most(monkeypatch):
    def refused(count: int, *more: object) -> None:
        raise ValueError(f"{count} workers")

    monkeypatch.setattr(workers, "ProcessPoolExecutor", refused)
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(ValueError, match="61 workers"):
        next(in_processes(twice, range(3), 128, 1))


def test_a_worker_that_is_killed_is_said():
    with pytest.raises(UserError, match=r"one of 8 processes was killed.*--workers 2"):
        list(in_processes(die, range(20), 8, 1))


def test_a_notebook_keeps_its_ctrl_c():
    """Imported from elsewhere than a script of the project, nothing of the process changes."""
    code = "import signal, train; print(signal.getsignal(signal.SIGINT) is before)"
    code = f"import signal; before = signal.getsignal(signal.SIGINT); {code}"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert found.stdout == "True\n", found.stderr
