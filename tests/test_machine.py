"""Any machine: folders that are in use, data that have moved, streams, memory, damaged caches."""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    assert_same_run,
    listed,
    run_train,
    script,
    start,
    write_kaggle,
)

import evaluate
import train
import visualize
from dataset import load_dataset
from sources import augment as augmenting
from sources import pictures
from support import runs
from support.checkpoint import load_checkpoint, save_checkpoint
from support.command import Parser, UserError, out_of_memory, output
from support.device import choose_device
from support.folders import free_name, owned

QUICK = ("--train-image", "0", "--image-augment", "none")
CONFIG = {"image_tower": "resnet18"}  # enough to be known as a run's


# ---------------------------------------------------------------------------- a run's folder


def test_a_folder_in_use_is_refused(photo_data: Path, tiny_run: Path, tmp_path: Path):
    out = tmp_path / "run"
    with owned(out):
        for words in (start(photo_data, out, tmp_path / "cache"), ["--resume", out]):
            with pytest.raises(UserError, match=f"{out} is in use by process {os.getpid()}"):
                run_train(*words)
    assert not out.exists()  # nobody left anything in it
    copy = shutil.copytree(tiny_run, out)
    with owned(copy), pytest.raises(UserError, match="is in use by process"):
        run_train("--resume", copy / "last.pt", "--epochs", 9)


def test_a_lock_of_a_dead_process_does_not_block(tiny_run: Path, tmp_path: Path):
    out = shutil.copytree(tiny_run, tmp_path / "run")
    code = "import os, signal, sys; from pathlib import Path; from support.folders import owned\n"
    code += "with owned(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, out], env=env, timeout=60)
    assert (out / ".lock").exists()
    with owned(out):
        pass
    assert listed(out) == listed(tiny_run)


def test_a_folder_that_is_left_empty_goes_and_others_stay(tmp_path: Path):
    (tmp_path / "there").mkdir()
    with owned(tmp_path / "a" / "b"), owned(tmp_path / "there"):
        assert (tmp_path / "a" / "b" / ".lock").exists()
    assert listed(tmp_path) == ["there"]
    with owned(tmp_path / "a"):
        (tmp_path / "a" / "file").touch()
        (tmp_path / "a" / ".last-0123abcd.pt").touch()  # of a process that was killed
        with owned(tmp_path / "a" / "b"):
            pass
    assert listed(tmp_path / "a") == [".last-0123abcd.pt", "file"]
    with owned(tmp_path / "a"):
        pass
    assert listed(tmp_path / "a") == ["file"]


def test_two_starts_in_one_second_have_two_names(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "20261126-120000")
    found = [free_name(tmp_path / "checkpoints", "Photos").name for _ in range(3)]
    name = "photos-20261126-120000"
    assert found == [name, f"{name}-2", f"{name}-3"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="give --out"):
        free_name(tmp_path / "file", "photos")


def test_a_config_of_another_program_is_not_overwritten(photo_data: Path, tmp_path: Path):
    words = start(photo_data, tmp_path / "run", tmp_path / "cache", *QUICK, "--epochs", 1)
    (tmp_path / "run").mkdir()
    for text in ('{"model": "of somebody"}', "no json", "[1]"):
        (tmp_path / "run" / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config.json is not of a run of train.py"):
            run_train(*words)
        assert (tmp_path / "run" / "config.json").read_text() == text
    (tmp_path / "run" / "config.json").write_text(json.dumps(CONFIG))  # stopped in its first epoch
    assert run_train(*words) == 0


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs Linux")
def test_where_nothing_can_be_written_no_work_is_done(photo_data: Path, tmp_path: Path, capsys):
    words = start(photo_data, "/proc/run", tmp_path / "cache")
    with pytest.raises(UserError, match=r"cannot write --out /proc/run: "):
        run_train(*words)
    for flag in ("--json", "--save-embeddings", "--distance-matrix", "--predictions", "--analysis"):
        with pytest.raises(UserError, match=r"cannot write /proc/x(/file)?: "):
            evaluate.main(["nowhere.pt", flag, "/proc/x"])
    assert capsys.readouterr().out == "" and not (tmp_path / "cache").exists()


def test_figures_that_cannot_be_written(tiny_run: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file"):
        visualize.main([str(tiny_run / "best.pt"), "--out", str(tmp_path / "file"), "--data", "no"])


def test_a_file_is_tried_and_nothing_is_left(tmp_path: Path, monkeypatch):
    assert output(str(tmp_path / "a" / "b" / "x.json")) == tmp_path / "a" / "b" / "x.json"
    (tmp_path / "old.json").write_text("old")
    assert output(str(tmp_path / "old.json")).read_text() == "old"
    assert output(os.devnull) == Path(os.devnull)
    assert listed(tmp_path) == ["old.json"]
    for place in (tmp_path, tmp_path / "old.json" / "x.json"):
        with pytest.raises(UserError, match="cannot write"):
            output(str(place))
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = Parser()
    parser.add_argument("--out", type=Path)
    assert parser.parse_args(["--out=~/x"]).out == tmp_path / "x"  # where shells leave ~ alone


# ------------------------------------------------------------- what is of the run and what not


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(data that have moved, a run of one epoch on them, the same run gone on before the move)."""
    place = tmp_path_factory.mktemp("moved")
    data, cache = write_kaggle(place / "data"), place / "cache"
    assert run_train(*start(data, place / "run", cache, *QUICK, "--epochs", 1)) == 0
    stayed = shutil.copytree(place / "run", place / "stayed")
    assert run_train("--resume", stayed, "--epochs", 2, "--cache", cache) == 0
    data.rename(place / "elsewhere")
    return place / "elsewhere", place / "run", stayed


def test_a_run_goes_on_after_its_data_have_moved(moved, tmp_path: Path):
    data, run, stayed = moved
    run = shutil.copytree(run, tmp_path / "run")
    words = ("--epochs", 2, "--cache", tmp_path / "cache")
    with pytest.raises(UserError, match=r"has moved: --resume .* --data PATH"):
        run_train("--resume", run, *words)
    assert run_train("--resume", run, "--data", data, *words) == 0
    first, second = (load_checkpoint(x / "last.pt") for x in (stayed, run))
    assert all(torch.equal(first["model"][key], x) for key, x in second["model"].items())
    assert second["config"]["data"] == str(data)
    assert json.loads((run / "config.json").read_text()) == second["config"]


def test_other_data_than_the_runs_are_refused(moved, tmp_path: Path):
    data, run, _ = moved
    run, other = shutil.copytree(run, tmp_path / "run"), shutil.copytree(data, tmp_path / "other")
    text = (other / "captions.txt").read_text()
    (other / "captions.txt").write_text(text.replace("dog", "cat", 1))
    with pytest.raises(UserError, match=f"--data {other} differs from the run's data .fingerprint"):
        run_train("--resume", run, "--data", other, "--epochs", 2, "--cache", tmp_path / "cache")
    assert load_checkpoint(run / "last.pt")["epoch"] == 1


def test_a_run_goes_on_in_another_precision(moved, tmp_path: Path, capsys):
    data, run, _ = moved
    words = ["--data", data, "--cache", tmp_path / "cache", "--resume", tmp_path / "run"]
    shutil.copytree(run, tmp_path / "run")
    again = [*words, *TINY, *QUICK, "--precision", "auto"]  # as it was typed at first
    assert run_train(*again, "--epochs", 2) == 0
    assert "bits" not in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "run" / "last.pt")["config"]["precision"] == "fp32"
    assert run_train(*words, "--precision", "bf16", "--epochs", 3) == 0
    line = "the run's --precision was fp32 and is now bf16: it ends in other bits"
    assert line in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "run" / "last.pt")["config"]["precision"] == "bf16"


def test_a_run_of_a_gpu_goes_on_without_one(moved, tmp_path: Path, capsys):
    data, run, _ = moved
    out = shutil.copytree(run, tmp_path / "run")
    content = load_checkpoint(out / "last.pt")
    content["config"]["precision"], content["device"] = "fp16", "cuda"
    content["random_states"]["cuda"] = [torch.get_rng_state()] * 4
    save_checkpoint(out / "last.pt", strip(content))
    words = ["--data", data, "--cache", tmp_path / "cache", "--resume", out, "--epochs", 2]
    assert run_train(*words, "--device", "cpu") == 0
    said = capsys.readouterr().err
    assert "--device was cuda and is now cpu" in said and "--precision was fp16 and is now" in said


def strip(content: dict) -> dict:
    """Without what `save_checkpoint` adds."""
    return {key: x for key, x in content.items() if key not in ("format", "version", "versions")}


def test_a_recipe_goes_on_after_its_data_have_moved(tmp_path: Path, capsys):
    data, cache, out = write_kaggle(tmp_path / "data"), tmp_path / "cache", tmp_path / "run"
    (tmp_path / "two.txt").write_text("a: --epochs 1\nb: --init a --epochs 2\n")
    words = start(data, out, cache, *QUICK, "--recipe", tmp_path / "two.txt")
    assert run_train(*words) == 0
    (out / "best.pt").unlink()
    (out / "last.pt").unlink()
    data.rename(tmp_path / "new")
    other = write_kaggle(tmp_path / "other", 30)
    with pytest.raises(UserError, match="differs from the run's data"):
        run_train("--resume", out, "--data", other, "--cache", cache)
    assert not (out / "last.pt").exists()
    assert run_train("--resume", out, "--data", tmp_path / "new", "--cache", cache) == 0
    assert load_checkpoint(out / "last.pt")["config"]["data"] == str(tmp_path / "new")
    assert run_train("--resume", out, "--cache", cache) == 0  # it has learned where they are


def test_a_finished_run_completes_its_files(tiny_run: Path, tmp_path: Path, capsys):
    out = shutil.copytree(tiny_run, tmp_path / tiny_run.name)  # which the curves name
    whole = {name: (out / name).read_bytes() for name in ("history.csv", "curves.png")}
    lines = whole["history.csv"].splitlines(keepends=True)
    (out / "history.csv").write_bytes(b"".join(lines[:-1]))  # stopped after its last checkpoint
    (out / "curves.png").unlink()
    assert run_train("--resume", out) == 0
    assert {name: (out / name).read_bytes() for name in whole} == whole
    assert "finished" in capsys.readouterr().out and listed(out) == listed(tiny_run)


def test_curves_show_all_epochs_after_a_resume(moved, tmp_path: Path):
    """best.pt may end with the first epoch, and its config is of before the resume."""
    data, run, _ = moved
    out = shutil.copytree(run, tmp_path / "run")
    words = ("--data", data, "--epochs", 3, "--workers", 1, "--cache", tmp_path / "cache")
    assert run_train("--resume", out, *words) == 0
    first = load_checkpoint(run / "best.pt")
    trained = SimpleNamespace(content=first, path=out / "best.pt")
    assert [record["epoch"] for record in visualize.whole_history(trained)] == [1, 2, 3]
    (out / "last.pt").write_bytes(b"damaged")
    assert len(visualize.whole_history(trained)) == 1


# --------------------------------------------------------------------------- files and streams


def test_a_history_that_is_open_elsewhere_is_written_later(
    photo_data: Path, tmp_path: Path, monkeypatch, capsys
):
    """Windows replaces no file that Excel shows."""
    out, replace, refused = tmp_path / "run", os.replace, []

    def refusing(source, target):
        if Path(target).name in ("history.csv", "curves.png") and len(refused) < 12:
            refused.append(Path(target).name)
            raise PermissionError(13, "Access is denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refusing)
    assert run_train(*start(photo_data, out, tmp_path / "cache", *QUICK, "--epochs", 2)) == 0
    said = capsys.readouterr().err
    for name in ("history.csv", "curves.png"):
        assert f"warning: cannot write {out / name}: Access is denied; is it open elsewhere" in said
    assert (out / "curves.png").exists()
    with (out / "history.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2


def test_a_checkpoint_is_on_the_disk_before_it_takes_the_old_ones_place(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace

    def syncing(number):
        done.append(
            Path(f"/proc/self/fd/{number}").resolve().name if Path("/proc").exists() else ""
        )
        fsync(number)

    def replacing(source, target):
        done.append((Path(source).name, Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", replacing)
    save_checkpoint(tmp_path / "last.pt", {"epoch": 1}, tmp_path / "best.pt")
    assert len(done) == 4
    for synced, replaced, name in ((0, 1, "best.pt"), (2, 3, "last.pt")):
        assert done[replaced][1] == name and done[synced] in ("", done[replaced][0])


def shell(command: str, *words: object, **env: str) -> subprocess.CompletedProcess[str]:
    """A script of the project in a shell, which may close or redirect its streams."""
    typed = ["bash", "-c", f'"$@" {command}', "bash", sys.executable, *map(str, words)]
    env = {name: x for name, x in os.environ.items() if name != "PYTHONUNBUFFERED"} | env
    return subprocess.run(typed, capture_output=True, text=True, timeout=120, env=env)


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
def test_a_run_ends_well_without_a_place_to_print(photo_data: Path, tmp_path: Path, streams: str):
    words = start(photo_data, tmp_path / "run", tmp_path / "cache", *QUICK, "--epochs", 2)
    done = shell(streams, ROOT / "train.py", *words)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert load_checkpoint(tmp_path / "run" / "best.pt")["history"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_full_disk_behind_stdout_is_said(photo_data: Path, tiny_run: Path, tmp_path: Path):
    words = (photo_data, "--cache", tmp_path / "cache")
    done = shell(">/dev/full", ROOT / "dataset.py", *words)
    assert done.returncode == 0
    line = "warning: cannot write to stdout: No space left on device; it is left out\n"
    assert done.stderr == line
    done = script("evaluate.py", tiny_run / "best.pt", "--json", "/dev/full", *words[1:])
    assert done.returncode == 2 and "cannot write /dev/full: No space left" in done.stderr
    assert "Traceback" not in done.stderr and "protocol:" in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
def test_letters_that_a_console_lacks_are_escaped(tmp_path: Path):
    data = write_kaggle(tmp_path / "数据 é", 20)
    env = {"PYTHONIOENCODING": "cp1252"}
    typed = [sys.executable, str(ROOT / "dataset.py"), str(data), "--cache", str(tmp_path / "c")]
    done = subprocess.run(typed, capture_output=True, env={**os.environ, **env}, timeout=60)
    assert done.returncode == 0 and done.stderr == b""
    assert "\\u6570\\u636e é".encode("cp1252") in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
def test_lines_of_a_log_appear_at_once(photo_data: Path, tmp_path: Path):
    log = tmp_path / "log"
    words = start(photo_data, tmp_path / "run", tmp_path / "cache", "--epochs", 200)
    env = {name: x for name, x in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with log.open("w") as file:
        typed = [sys.executable, str(ROOT / "train.py"), *words]
        process = subprocess.Popen(typed, stdout=file, stderr=file, env=env)
    until = time.monotonic() + 100
    while "\n    1 " not in log.read_text():
        assert time.monotonic() < until and process.poll() is None, log.read_text()
        time.sleep(0.05)
    process.terminate()
    process.wait(20)
    text = log.read_text()
    assert "\r" not in text and text.startswith("data ") and "--resume" in text.splitlines()[-1]


# -------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)("CUDA out of memory."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate"),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_is_a_line_and_the_checkpoint_is_whole(
    photo_data: Path, tmp_path: Path, monkeypatch, error: Exception
):
    real = train.train_epoch

    def failing(run, epoch, options):
        if epoch == 2:
            raise error
        return real(run, epoch, options)

    monkeypatch.setattr(train, "train_epoch", failing)
    out = tmp_path / "run"
    with pytest.raises(
        UserError, match="out of memory: --batch-size 16 at --image-size 32"
    ) as told:
        run_train(*start(photo_data, out, tmp_path / "cache", *QUICK, "--epochs", 2))
    assert "lower" in str(told.value) and load_checkpoint(out / "last.pt")["epoch"] == 1
    assert listed(out)[0] == "best.pt"  # no lock is left


def test_other_errors_are_not_taken_for_want_of_memory():
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not out_of_memory(ValueError("out of memory")) and not out_of_memory(OSError(28, "full"))
    with pytest.raises(RuntimeError, match="a bug"), runs.fitting(SimpleNamespace()):
        raise RuntimeError("a bug")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a bound on memory")
def test_a_machine_too_small_ends_in_a_line(tmp_path: Path):
    """The tensor is far larger than any memory."""
    code = "import torch; from support.command import run\n"
    code += "run(lambda argv: torch.zeros(2**46) and None)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "out of memory" in done.stderr


def test_a_large_data_set_is_read_split_and_cached_in_bounded_memory(tmp_path: Path):
    """4 GB for COCO's 118,000 pictures and 590,000 captions are 34 KB a picture."""
    data, count = write_kaggle(tmp_path / "data", 600), 600
    tracemalloc.start()
    found = load_dataset(data, size=256, cache=tmp_path / "cache", workers=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.captions) == 5 * count and peak < 34_000 * count


# --------------------------------------------------------------------------------------- caches


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, emptied, Path.unlink])
@pytest.mark.parametrize("name", ["pixels.npy", "index.json"])
def test_a_damaged_cache_is_built_anew(photo_data: Path, tmp_path: Path, capsys, name, damage):
    whole = load_dataset(photo_data, size=32, cache=tmp_path, workers=0)
    pixels = whole.pixels.copy()
    (folder,) = tmp_path.iterdir()
    damage(folder / name)
    again = load_dataset(photo_data, size=32, cache=tmp_path, workers=0)
    assert (again.pixels == pixels).all() and again.digests == whole.digests
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"the cache {folder} is damaged" in said and "anew" in said
    load_dataset(photo_data, size=32, cache=tmp_path, workers=0)
    assert capsys.readouterr().err == ""


def test_a_cache_that_memory_does_not_suffice_for_stays(photo_data, tmp_path, monkeypatch, capsys):
    load_dataset(photo_data, size=32, cache=tmp_path, workers=0)
    (folder,) = tmp_path.iterdir()
    before = (folder / "pixels.npy").stat().st_ino

    def too_small(folder: Path, name: str) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(pictures, "read_array", too_small)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        load_dataset(photo_data, size=32, cache=tmp_path, workers=0)
    assert (folder / "pixels.npy").stat().st_ino == before and capsys.readouterr().err == ""


def test_damaged_features_are_computed_anew(photo_data: Path, tmp_path: Path, capsys):
    words = start(photo_data, tmp_path / "a", tmp_path / "cache", *QUICK, "--epochs", 1)
    assert run_train(*words) == 0
    (damaged, *_) = (tmp_path / "cache").glob("images-*/features.npy")
    cut(damaged)
    assert run_train(*words, "--out", tmp_path / "b") == 0
    assert f"the cache {damaged.parent} is damaged" in capsys.readouterr().err
    assert_same_run(tmp_path / "a" / "last.pt", tmp_path / "b" / "last.pt")


def test_a_cache_that_stays_damaged_is_an_error(tmp_path: Path, capsys):
    def build(folder: Path) -> None:
        (folder / "x").write_text("x")

    with pytest.raises(UserError, match=r"cannot read the cache .* give --cache DIR"):
        pictures.cached(tmp_path, "name", build, lambda folder: int((folder / "x").read_text()))


# --------------------------------------------------------------------------- devices of others


def test_a_torch_too_old_for_numpy_is_said(monkeypatch):
    def lacking(tensor):
        raise RuntimeError("Numpy is not available")

    monkeypatch.setattr(torch.Tensor, "numpy", lacking)
    with pytest.raises(UserError, match=r"cannot read NumPy .*: pip install 'numpy<2'"):
        choose_device("cpu")


def test_pictures_are_resized_where_a_device_has_no_antialiasing(monkeypatch):
    """Apple's MPS before torch 2.7; the CPU does it there."""
    pixels = torch.randint(0, 255, (2, 40, 40, 3), dtype=torch.uint8)
    expected, real, calls = augmenting.resize(pixels, 24), augmenting.F.interpolate, []

    def lacking(images, **options):
        calls.append(images.device)
        if len(calls) == 1:
            raise NotImplementedError("'aten::_upsample_bilinear2d_aa.out' on MPS")
        return real(images, **options)

    monkeypatch.setattr(augmenting.F, "interpolate", lacking)
    assert torch.equal(augmenting.resize(pixels, 24), expected) and len(calls) == 2
