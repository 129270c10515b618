"""Flags, one-line errors, files that are never half-written."""

import argparse
import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli import Parser, UserError, atomic_write, dashed, number, warn
from conftest import ROOT

import dataset
import evaluate
import train


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make_parser() -> Parser:
    parser = Parser(prog="x")
    parser.add_argument("place", nargs="?", type=Path)
    parser.add_argument("--batch-size", type=int, default=64, help="of a step")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--url", action="append")
    parser.add_argument("--resume", nargs="?", const="")
    parser.add_argument("--seed", type=int, default=0)
    return parser


# ------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    "words", ["--batch-size 8", "--batch_size 8", "--batch-size=8", "--batch_size=8"]
)
def test_dashes_and_underscores_mean_the_same(words):
    assert make_parser().parse_args(words.split()).batch_size == 8


def test_only_a_flags_name_loses_its_underscores():
    assert dashed("--out_dir=a_b/c_d") == "--out-dir=a_b/c_d"
    assert dashed("a_b") == "a_b" and dashed("-a_b") == "-a_b"


def test_typed_holds_only_what_stands_there():
    parser = make_parser()
    assert parser.typed([]) == {}
    assert parser.typed(["--batch-size", "64"]) == {"batch_size": 64}  # typed, though the default
    assert parser.typed(["--resume", "--dry-run"]) == {"resume": "", "dry_run": True}
    assert parser.typed(["there", "--seed=0"]) == {"place": Path("there"), "seed": 0}
    assert parser.typed(["--url", "a", "--url", "b"]) == {"url": ["a", "b"]}
    assert parser.typed([]) == {}  # nothing stays from the time before


def test_what_is_not_typed_takes_its_default():
    expected = {"place": None, "batch_size": 64, "dry_run": False, "url": None, "resume": None}
    parser = make_parser()
    assert vars(parser.parse_args([])) == expected | {"seed": 0} == parser.defaults()
    changed = vars(parser.parse_args(["p", "--url", "u"]))
    assert changed == expected | {"seed": 0, "place": Path("p"), "url": ["u"]}


@pytest.mark.parametrize("words", ["--batch 8", "--no-such 1", "--batch-size x", "--batch-size"])
def test_wrong_flags_are_user_errors(words):
    with pytest.raises(UserError, match="--help"):
        make_parser().parse_args(words.split())


def test_numbers_within_their_bounds():
    assert number(int, 2, 10)("2") == 2 and number(int, 2, 10)("10") == 10
    assert number(float, 0, 1)("0") == 0 and number(float, 0, 1, above=True)("1e-9") == 1e-9
    assert number(float, -1, 1)("-0.5") == -0.5


@pytest.mark.parametrize("text", ["-1", "1.01", "nan", "inf", "-inf", "1e400", "x", "", "0x1"])
def test_numbers_outside_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"is not a number in \[0, 1\]"):
        number(float, 0, 1)(text)


@pytest.mark.parametrize("text", ["0", "-0.0", "nan", "-1e-300"])
def test_zero_is_refused_where_it_has_to_be_above(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"in \(0, 1\]"):
        number(float, 0, 1, above=True)(text)


@pytest.mark.parametrize("text", ["1", "11", "2.0", "1e400", "nan", "inf", "9" * 400, "9" * 5000])
def test_whole_numbers_outside_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number in"):
        number(int, 2, 10)(text)


@pytest.mark.parametrize("script", [dataset, train, evaluate])
def test_help_names_flags_and_defaults(script, capsys):
    with pytest.raises(SystemExit) as left:
        script.main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0
    assert "--cache" in told and f"(default: {os.cpu_count()})" in told
    assert "SUPPRESS" not in told and "None" not in told and "False" not in told
    defaults = {
        dataset: ["(default: Flickr8k)", "(default: auto)"],
        evaluate: ["--split {test,dev,train} (default: test)", "(default: auto)"],
        train: ["(default: 0.07)", "all that is random (default: 0)", "(default: resnet18)"],
    }
    for default in defaults[script]:
        assert default in told


def test_a_default_is_told_once_and_only_where_there_is_one():
    told = " ".join(make_parser().format_help().split())
    assert "of a step (default: 64)" in told and "SEED (default: 0)" in told
    assert told.count("default") == 2
    assert " ".join(make_parser().format_help().split()) == told


# ------------------------------------------------------------------------------------- files


def test_atomic_write_replaces_the_old_file_whole(tmp_path):
    path = tmp_path / "new" / "a.txt"
    for text in ("one", "two"):
        with atomic_write(path) as temporary:
            assert temporary.parent == path.parent and temporary.suffix == ".txt"
            temporary.write_text(text)
        assert path.read_text() == text
        assert listed(path.parent) == ["a.txt"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError(28, "No space left")])
def test_atomic_write_leaves_nothing_half_written(tmp_path, error):
    (tmp_path / "a.txt").write_text("old")
    wanted = UserError if isinstance(error, OSError) else error
    for name in ("a.txt", "b.txt"):
        with pytest.raises(wanted), atomic_write(tmp_path / name) as temporary:
            temporary.write_text("half")
            raise error
    assert listed(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


def test_atomic_write_into_what_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for path in (
        tmp_path / "file" / "a.txt",
        tmp_path / "file" / "b" / "a.txt",
        tmp_path / "folder",
        tmp_path / ("a" * 250),  # which leaves no room for what the temporary file's has beyond
    ):
        with pytest.raises(UserError, match="cannot write"), atomic_write(path) as temporary:
            temporary.write_text("x")
    assert listed(tmp_path) == ["file", "folder"]


def test_atomic_write_into_an_unwritable_folder(tmp_path, monkeypatch):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    if os.geteuid() == 0:  # nothing is closed to root: refuse as the system would refuse others

        def refuse(*_place, **_options):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "touch", refuse)
    wanted = pytest.raises(UserError, match=r"cannot write .*: Permission denied")
    with wanted, atomic_write(closed / "a.txt"):
        pass
    assert listed(closed) == []


# ---------------------------------------------------------------------------------- run, warn


def run_code(tmp_path: Path, body: str) -> subprocess.CompletedProcess[str]:
    program = tmp_path / "program.py"
    program.write_text(f"import cli\ndef main(argv):\n    {body}\ncli.run(main)\n")
    return subprocess.run(
        [sys.executable, program, "word"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_a_user_error_is_one_line_and_code_2(tmp_path):
    done = run_code(tmp_path, r"raise cli.UserError('no\nsuch   thing\r\nat all')")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "program.py: error: no such thing at all\n"


def test_a_bug_keeps_its_traceback(tmp_path):
    done = run_code(tmp_path, "raise KeyError('a bug')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "KeyError: 'a bug'" in done.stderr


@pytest.mark.parametrize(
    ("body", "code"), [("return", 0), ("return 3", 3), ("raise KeyboardInterrupt", 130)]
)
def test_exit_codes(tmp_path, body, code):
    done = run_code(tmp_path, body)
    assert done.returncode == code and "Traceback" not in done.stderr


def test_a_closed_pipe_is_no_traceback(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import cli\ncli.run(lambda argv: print('x\\n' * 10**6))\n")
    process = subprocess.Popen(
        [sys.executable, program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 1
    process.stderr.close()


def test_a_warning_is_one_line():
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        warn("a file named\n'x\ny'")
    assert told.getvalue() == "warning: a file named 'x y'\n"
