"""Flags, one-line errors, files that are never half-written, and a Python that is too old."""

import argparse
import ast
import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, listed

import dataset
import evaluate
import search
import train
import visualize
from support.command import Parser, UserError, atomic_write, dashed, later, number, sweep, warn

SCRIPTS = ("dataset.py", "train.py", "evaluate.py", "visualize.py", "search.py")


def make_parser() -> Parser:
    parser = Parser(prog="x")
    parser.add_argument("place", nargs="?", type=Path)
    parser.add_argument("--batch-size", type=int, default=64, help="of a step")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--url", action="append")
    parser.add_argument("--resume", nargs="?", const="")
    parser.add_argument_group("chance").add_argument("--seed", type=int, default=0)
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


def test_a_list_of_places_that_is_absent_is_not_typed():
    parser = Parser()
    parser.add_argument("places", nargs="*", default=[], type=Path)
    assert parser.typed([]) == {} and parser.parse_args([]).places == []
    assert parser.typed(["a", "b"]) == {"places": [Path("a"), Path("b")]}


def test_what_is_not_typed_takes_its_default():
    expected = {"place": None, "batch_size": 64, "dry_run": False, "url": None, "resume": None}
    parser = make_parser()
    assert vars(parser.parse_args([])) == expected | {"seed": 0} == parser.defaults()
    changed = vars(parser.parse_args(["p", "--url", "u"]))
    assert changed == expected | {"seed": 0, "place": Path("p"), "url": ["u"]}


def test_the_flags_of_a_group():
    assert make_parser().group("chance") == ["seed"] and make_parser().group("none") == []
    model = train.build_parser().group("model")
    assert {"image_tower", "text_tower", "embed_dim"} <= {*model} and "epochs" not in model


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


@pytest.mark.parametrize(
    ("script", "defaults"),
    [
        (dataset, ["(default: Flickr8k)", "(default: auto)"]),
        (train, ["(default: 0.07)", "all that is random (default: 0)", "(default: resnet18)"]),
        (evaluate, ["--split {test,dev,train} (default: test)", "(default: auto)"]),
        (visualize, ["--split {test,dev,train} (default: test)"]),
        (search, ["--split {all,test,dev,train} of the data set (default: all)", "(default: 10)"]),
    ],
    ids=SCRIPTS,
)
def test_help_names_flags_and_defaults(script, defaults, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as left:
        script.main(["--help"])
    page = capsys.readouterr().out
    assert max(map(len, page.splitlines())) <= 80
    page = " ".join(page.split())
    assert left.value.code == 0
    assert "--cache" in page and f"(default: {os.cpu_count()})" in page
    assert "SUPPRESS" not in page and "None" not in page and "False" not in page
    for default in defaults:
        assert default in page


def test_a_default_is_named_once_and_only_where_there_is_one():
    page = " ".join(make_parser().format_help().split())
    assert "of a step (default: 64)" in page and "SEED (default: 0)" in page
    assert page.count("default") == 2
    assert " ".join(make_parser().format_help().split()) == page


def test_what_is_imported_later(monkeypatch, tmp_path):
    (tmp_path / "some_folder").mkdir()
    (tmp_path / "some_folder" / "some_module.py").write_text(
        "def add(a, b=1):\n    '''Adds.'''\n    return a + b\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    add = later("some_folder.some_module", "add")
    assert "some_folder.some_module" not in sys.modules and add.__name__ == "add"
    assert add(1) == 2 and add(1, b=5) == 6
    assert "some_folder.some_module" in sys.modules


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
    raised = UserError if isinstance(error, OSError) else error
    for name in ("a.txt", "b.txt"):
        with pytest.raises(raised), atomic_write(tmp_path / name) as temporary:
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
    refusal = pytest.raises(UserError, match=r"cannot write .*: Permission denied")
    with refusal, atomic_write(closed / "a.txt"):
        pass
    assert listed(closed) == []


@pytest.mark.skipif(not Path("/dev/stdout").exists(), reason="no such device")
def test_devices_are_written_to_and_never_replaced(tmp_path):
    with atomic_write(Path(os.devnull)) as place:
        place.write_text("x")
    assert not Path(os.devnull).is_file()


def test_what_a_killed_process_left_is_swept(tmp_path):
    for name in (".last-0123abcd.pt", ".last-0123abcd.json", ".last-3.pt", "last.pt", ".a[1]-x.pt"):
        (tmp_path / name).touch()
    sweep(tmp_path / "last.pt")
    assert listed(tmp_path) == [".a[1]-x.pt", ".last-0123abcd.json", ".last-3.pt", "last.pt"]


# ---------------------------------------------------------------------------------- run, warn


def run_code(tmp_path: Path, body: str) -> subprocess.Popen[str]:
    program = tmp_path / "program.py"
    program.write_text(
        f"from support.command import UserError, run\ndef main(argv):\n    {body}\nrun(main)\n"
    )
    return subprocess.Popen(
        [sys.executable, program, "word"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_a_user_error_is_one_line_and_code_2(tmp_path):
    process = run_code(tmp_path, r"raise UserError('no\nsuch   thing\r\nat all')")
    assert process.communicate(timeout=60) == ("", "program.py: error: no such thing at all\n")
    assert process.returncode == 2


def test_a_bug_keeps_its_traceback(tmp_path):
    process = run_code(tmp_path, "raise KeyError('a bug')")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" in err and "KeyError: 'a bug'" in err


@pytest.mark.parametrize(
    ("body", "code"), [("return", 0), ("return 3", 3), ("raise KeyboardInterrupt", 130)]
)
def test_exit_codes(tmp_path, body, code):
    process = run_code(tmp_path, body)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err


def test_a_closed_pipe_is_no_traceback(tmp_path):
    process = run_code(tmp_path, r"print('x\n' * 10**6)")
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 1
    process.stderr.close()


def test_a_warning_is_one_line():
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        warn("a file named\n'x\ny'")
    assert stderr.getvalue() == "warning: a file named 'x y'\n"


# ------------------------------------------------------------------------ a Python too old


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_old_python_ends_in_one_line(script):
    old = "import runpy, sys; sys.version_info = (3, 8, 0, 'final', 0); "
    code = f"{old}runpy.run_path({script!r}, run_name='__main__')"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert "Python 3.10" in done.stderr and "runs on 3.8" in done.stderr


@pytest.mark.parametrize("script", [*SCRIPTS, "support/python.py"])
def test_an_old_python_reads_the_scripts(script):
    """So far as to get to that line: a syntax that it does not know would be a traceback."""
    ast.parse((ROOT / script).read_text("utf-8"), feature_version=(3, 8))


def test_every_script_is_among_these():
    programs = [path.name for path in ROOT.glob("*.py") if "__main__" in path.read_text("utf-8")]
    assert sorted(programs) == sorted(SCRIPTS)
