"""Training as a user meets it: runs, interruptions, resuming to the same bits, what is refused."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from cli import UserError
from conftest import ROOT, TINY, script, write_kaggle
from test_towers import write_bert

import optimizer
import train
from models import load_checkpoint, save_checkpoint


def run_train(*words: object) -> int:
    return train.main([str(word) for word in words])


def start(data: Path, out: Path, cache: Path, *more: object) -> list[str]:
    return [str(w) for w in ("--data", data, "--out", out, "--cache", cache, *TINY, *more)]


def flat(content: object, place: str = "") -> dict[str, object]:
    """Every leaf of a checkpoint by its place, so that two can be compared bit by bit."""
    if isinstance(content, dict):
        items = [(str(key), value) for key, value in content.items()]
    elif isinstance(content, (list, tuple)):
        items = [(str(key), value) for key, value in enumerate(content)]
    else:
        return {place: content}
    leaves: dict[str, object] = {}
    for key, value in items:
        leaves |= flat(value, f"{place}/{key}")
    return leaves


def assert_same_run(one: Path, other: Path) -> None:
    """The same bits in everything but the clock."""
    first, second = (flat(load_checkpoint(path)) for path in (one, other))
    assert first.keys() == second.keys()
    for place, value in first.items():
        if place.endswith(("/seconds", "/minutes", "/images_per_second")):
            continue
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[place]), place
        else:
            assert value == second[place], place


# ------------------------------------------------------------------------------ what a run leaves


def test_run_leaves_what_it_names(tiny_run: Path):
    present = {path.name for path in tiny_run.iterdir()}
    assert present == {"best.pt", "last.pt", "history.csv", "curves.png", "config.json"}
    with (tiny_run / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    wanted = {
        "train_loss",
        "dev_loss",
        "top1_i2t",
        "top1_t2i",
        "logit_scale",
        "mean_recall",
        "rsum",
    }
    for way in ("i2t", "t2i"):
        wanted |= {f"{way}_{key}" for key in ("r1", "r5", "r10", "medr", "meanr")}
    assert wanted <= rows[0].keys()
    assert float(rows[2]["train_loss"]) < float(rows[0]["train_loss"])
    best = load_checkpoint(tiny_run / "best.pt")
    scores = [float(row["mean_recall"]) for row in rows]
    assert best["epoch"] == 1 + scores.index(max(scores))


def test_checkpoint_is_plain_and_whole(tiny_run: Path):
    content = torch.load(tiny_run / "last.pt", weights_only=True)
    for key in ("config", "vocabulary", "transform", "history", "random_states", "versions"):
        assert content[key], key
    assert content["fingerprint"] and content["optimizer"]["state"]
    assert content["versions"]["torch"] == str(torch.__version__)
    assert len(content["train_images"]["names"]) == 30  # 40 photos less 5 for dev and 5 for test
    assert json.loads((tiny_run / "config.json").read_text()) == content["config"]


def test_same_seed_same_bits_and_workers_do_not_matter(photos: Path, tmp_path: Path):
    for name, more in (("a", []), ("b", ["--workers", 2]), ("c", ["--seed", 1])):
        assert (
            run_train(*start(photos, tmp_path / name, tmp_path / "c0", "--epochs", 1), *more) == 0
        )
    a, b, c = (load_checkpoint(tmp_path / name / "last.pt")["model"] for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_output_names_what_was_written(photos: Path, tmp_path: Path, capsys):
    run_train(*start(photos, tmp_path / "run", tmp_path / "cache", "--epochs", 1))
    told = capsys.readouterr()
    assert told.err == ""
    lines = told.out.splitlines()
    assert lines[0].startswith(f"data {photos}") and "fingerprint" in lines[0]
    assert lines[-1].startswith(f"wrote {tmp_path / 'run'}: best.pt (epoch 1")


@pytest.mark.parametrize(
    ("tower", "more"),
    [
        ("transformer", []),
        ("transformer", ["--fixed-temperature"]),
        ("lstm", ["--captions-per-image", "3"]),
        ("bag", ["--captions-per-image", "3"]),
    ],
)
def test_towers_and_several_captions_learn(
    photo_data: Path, tmp_path: Path, tower: str, more: list
):
    words = start(photo_data, tmp_path / "run", tmp_path / "cache", "--epochs", 6)
    assert run_train(*words, "--text-tower", tower, "--image-augment", "light", *more) == 0
    history = load_checkpoint(tmp_path / "run" / "last.pt")["history"]
    assert history[-1]["train_loss"] < 0.9 * history[0]["train_loss"]
    fixed = "--fixed-temperature" in more
    assert (abs(history[-1]["logit_scale"] - 1 / 0.07) < 1e-4) == fixed


@pytest.mark.parametrize(("batch", "limit"), [(29, 30), (2, 5), (64, 2)])
def test_short_and_odd_batches(photo_data: Path, tmp_path: Path, batch: int, limit: int):
    words = start(photo_data, tmp_path / "run", tmp_path / "cache", "--epochs", 1)
    assert run_train(*words, "--batch-size", batch, "--limit", limit) == 0
    record = load_checkpoint(tmp_path / "run" / "last.pt")
    assert math.isfinite(record["history"][0]["train_loss"])
    assert len(record["train_images"]["names"]) == limit


def test_limit_leaves_dev_whole(photo_data: Path, tmp_path: Path, capsys):
    words = start(photo_data, tmp_path / "run", tmp_path / "cache", "--epochs", 1)
    run_train(*words, "--limit", 8)
    assert "8 images in 1 batches; chance on dev: R@1 20.00%" in capsys.readouterr().out
    run_train(
        *start(photo_data, tmp_path / "all", tmp_path / "cache", "--epochs", 1, "--limit", 999)
    )
    assert "there are 30 training images, all are used" in capsys.readouterr().err


def test_patience_stops_early(photo_data: Path, tmp_path: Path, capsys):
    words = start(photo_data, tmp_path / "run", tmp_path / "cache", "--epochs", 50, "--patience", 1)
    assert run_train(*words, "--lr", 1e-12) == 0
    history = load_checkpoint(tmp_path / "run" / "last.pt")["history"]
    assert len(history) < 50
    assert history[-1]["mean_recall"] <= history[-2]["mean_recall"]
    assert "stopped early" in capsys.readouterr().out


# ------------------------------------------------------------------------- stopping and resuming


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, f"no {path}"
        time.sleep(0.01)


def spawn(words: list[str]) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


EPOCHS = 12


@pytest.fixture(scope="module")
def straight(photo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run never stopped, the reference of the stopped ones."""
    place = tmp_path_factory.mktemp("straight")
    assert run_train(*start(photo_data, place / "run", place / "cache", "--epochs", EPOCHS)) == 0
    return place / "run"


@pytest.mark.parametrize("delay", [0.0, 0.1])
def test_killed_run_resumes_to_the_same_bits(
    photo_data: Path, straight: Path, tmp_path: Path, delay: float
):
    """SIGKILL at some moments between and inside epochs; each time a second process goes on."""
    out = tmp_path / "run"
    process = spawn(start(photo_data, out, tmp_path / "cache", "--epochs", EPOCHS))
    wait_for(out / "last.pt", process)
    time.sleep(delay)
    process.kill()
    process.communicate()
    done = load_checkpoint(out / "last.pt")["epoch"]
    assert 1 <= done < EPOCHS
    for name in (".last-abcdefg_.pt", ".curves-12345678.png"):  # as a kill inside a write leaves
        (out / name).write_bytes(b"half")
    assert run_train("--resume", out, "--cache", tmp_path / "cache") == 0
    for name in ("last.pt", "best.pt"):
        assert_same_run(straight / name, out / name)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_the_last_whole_epoch(
    photo_data: Path, straight: Path, tmp_path: Path, signum: int, code: int
):
    out = tmp_path / "run"
    process = spawn(start(photo_data, out, tmp_path / "cache", "--epochs", EPOCHS))
    wait_for(out / "last.pt", process)
    process.send_signal(signum)
    _, told = process.communicate(timeout=60)
    assert process.returncode == code
    assert told.count("\n") == 1 and f"python train.py --resume {out}" in told
    assert {path.name for path in out.iterdir()} <= {
        *("best.pt", "last.pt", "history.csv", "curves.png", "config.json")
    }
    assert run_train("--out", out, "--resume", "--cache", tmp_path / "cache") == 0
    assert_same_run(straight / "last.pt", out / "last.pt")


def test_resume_goes_further_and_says_when_finished(photos: Path, tmp_path: Path, capsys):
    out, cache = tmp_path / "run", tmp_path / "cache"
    run_train(*start(photos, out, cache, "--epochs", 1))
    assert run_train("--resume", out / "last.pt", "--cache", cache) == 0
    assert "this run is finished after 1 epochs" in capsys.readouterr().out
    assert run_train("--resume", out, "--epochs", 2, "--workers", 2, "--cache", cache) == 0
    assert load_checkpoint(out / "last.pt")["epoch"] == 2


def test_resume_of_a_run_from_before_a_flag_was_there(tiny_run: Path, tmp_path: Path):
    out = shutil.copytree(tiny_run, tmp_path / "run")
    content = load_checkpoint(out / "last.pt")
    for flag in ("start_size", "start_epochs", "pretrain_text"):
        del content["config"][flag]
    for key in ("format", "version", "versions"):
        del content[key]
    save_checkpoint(out / "last.pt", content)
    assert run_train("--resume", out, "--epochs", 4, "--cache", tmp_path / "cache") == 0
    assert load_checkpoint(out / "last.pt")["epoch"] == 4


def test_small_pictures_come_first(photo_data: Path, tmp_path: Path, monkeypatch):
    sizes, real = [], train.augment
    monkeypatch.setattr(train, "augment", lambda *a: (sizes.append(a[1]), real(*a))[1])
    words = start(photo_data, tmp_path / "run", tmp_path / "cache", "--epochs", 3)
    assert run_train(*words, "--image-size", 48, "--start-size", 32, "--patience", 1) == 0
    batches = len(sizes) // 3
    assert sizes == [32] * 2 * batches + [48] * batches  # --patience waits for the last size


@pytest.mark.parametrize(
    "words",
    [["--lr", "0.5"], ["--image_tower", "resnet50"], ["--seed", "3"], ["--data", "shapes"]],
)
def test_resume_refuses_other_flags(tiny_run: Path, words: list[str]):
    before = (tiny_run / "last.pt").read_bytes()
    with pytest.raises(UserError, match=f"{words[0].replace('_', '-')} .* differs from the run's"):
        run_train("--resume", tiny_run, "--epochs", 9, *words)
    assert (tiny_run / "last.pt").read_bytes() == before


def test_resume_takes_a_flag_typed_with_the_same_value(tiny_run: Path, capsys):
    assert run_train("--resume", tiny_run, "--lr", "0.001", "--batch_size", 16) == 0
    assert "finished" in capsys.readouterr().out


def test_resume_refuses_other_data(photos: Path, tmp_path: Path):
    out, cache = tmp_path / "run", tmp_path / "cache"
    run_train(*start(photos, out, cache, "--epochs", 1))
    text = (photos / "captions.txt").read_text()
    (photos / "captions.txt").write_text(text.replace("dog", "cat", 1))
    with pytest.raises(UserError, match="the data has changed"):
        run_train("--resume", out, "--epochs", 2, "--cache", cache)


def test_resume_refuses_another_model(tiny_run: Path, tmp_path: Path):
    content = torch.load(tiny_run / "last.pt", weights_only=True)
    content["config"]["image_tower"] = "resnet50"
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(UserError, match="holds another model"):
        run_train("--resume", tmp_path, "--epochs", 9)


# -------------------------------------------------------------------------------- bad input


FROZEN_TEXT = ("--text-tower", "bag", "--train-text", "0", "--image-size", "64")


@pytest.mark.parametrize(
    "words",
    [
        *(["--lr", value] for value in ("-1", "0", "nan", "inf", "1e9", "much")),
        *(["--batch-size", value] for value in ("0", "1", "-4", "1e3", "99999999999")),
        *(["--epochs", value] for value in ("0", "-1", "2.5")),
        *(["--temperature", value] for value in ("0", "-1", "nan")),
        *(
            [flag, "-1"]
            for flag in ("--weight-decay", "--warmup", "--workers", "--seed", "--limit")
        ),
        *([flag, "0"] for flag in ("--image-size", "--embed-dim", "--patience", "--max-tokens")),
        ["--image-tower", "resnet1"],
        ["--image-tower", "resnet18+"],
        ["--start-size", "32", "--image-tower", "resnet18+resnet50", *FROZEN_TEXT],
        ["--pretrain-text", "3", "--text-tower", "minilm"],
        ["--start-epochs", "2"],
        ["--start-size", "64", "--image-size", "32"],
        ["--start-size", "64", "--image-tower", "vit_b_16", "--image-size", "96"],
        ["--text-tower", "bert2"],
        ["--precision", "fp16", "--device", "cpu"],
        ["--no-such-flag"],
        ["stray"],
    ],
)
def test_flags_out_of_range(photo_data: Path, tmp_path: Path, words: list[str]):
    with pytest.raises(UserError) as caught:
        run_train(*start(photo_data, tmp_path / "run", tmp_path / "cache"), *words)
    assert words[0] in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_several_towers_share_a_frozen_text_tower(photo_data: Path, tmp_path: Path):
    words = start(photo_data, tmp_path / "run", tmp_path / "cache", "--image-tower")
    with pytest.raises(UserError, match="share a frozen text tower: --text-tower minilm"):
        run_train(*words, "resnet18+resnet18")
    with pytest.raises(UserError, match="--image-weights: some of these towers bring theirs"):
        run_train(*words, "resnet18+efficientnet_lite0", *FROZEN_TEXT)


def test_epochs_of_several_towers_stay(photo_data: Path, tmp_path: Path):
    out, cache = tmp_path / "run", tmp_path / "cache"
    words = start(photo_data, out, cache, *TWO_TOWERS, "--epochs", 1, "--head-epochs", 0)
    assert run_train(*words) == 0
    with pytest.raises(UserError, match="--epochs: a run of several image towers"):
        run_train("--resume", out, "--epochs", 2, "--cache", cache)


def test_unknown_tower_lists_the_known(photo_data: Path):
    with pytest.raises(UserError, match=r"resnet18.*resnet50"):
        run_train("--data", photo_data, "--image-tower", "vgg")


def test_folder_with_a_run_is_refused(photo_data: Path, tiny_run: Path, tmp_path: Path):
    before = {path: path.read_bytes() for path in tiny_run.iterdir()}
    with pytest.raises(UserError, match=r"already holds a run .* --resume"):
        run_train(*start(photo_data, tiny_run, tmp_path / "cache"))
    assert {path: path.read_bytes() for path in tiny_run.iterdir()} == before


def test_out_that_cannot_be_written(photo_data: Path, tmp_path: Path):
    (tmp_path / "file").write_text("here")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"file"):
            run_train(*start(photo_data, out, tmp_path / "cache"))
    assert (tmp_path / "file").read_text() == "here"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_full_disk_keeps_the_last_checkpoint(photos: Path, tmp_path: Path, monkeypatch):
    """The disk fills up in epoch 2: one line, and epoch 1's checkpoint is whole."""
    out, cache, real, calls = tmp_path / "run", tmp_path / "cache", torch.save, []

    def full(content, path):
        calls.append(path)
        if len(calls) < 2:
            return real(content, path)
        Path(path).write_bytes(b"half")
        with Path("/dev/full").open("wb") as file:
            file.write(b"x")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"cannot write .*last.pt: No space left"):
        run_train(*start(photos, out, cache, "--epochs", 3))
    monkeypatch.undo()
    assert load_checkpoint(out / "last.pt")["epoch"] == 1
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_one_line_and_exit_code_2(tmp_path: Path):
    done = script("train.py", "--data", tmp_path / "nowhere", "--out", tmp_path / "run")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("train.py: error: ")
    assert "cloud.tsinghua.edu.cn" in done.stderr and "--data shapes" in done.stderr
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------- loss and embeddings gone


def test_loss_that_is_not_finite_stops(photos: Path, tmp_path: Path, monkeypatch):
    out, cache, real, calls = tmp_path / "run", tmp_path / "cache", train.combined, []

    def diverging(*arguments):
        calls.append(1)
        return real(*arguments) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(train, "combined", diverging)
    with pytest.raises(UserError, match=r"epoch 2, batch 2: the loss is nan"):
        run_train(*start(photos, out, cache, "--epochs", 3))
    assert load_checkpoint(out / "last.pt")["epoch"] == 1


def test_a_rate_far_too_high_ends_in_one_line_or_in_a_whole_run(photos: Path, tmp_path: Path):
    out = tmp_path / "run"
    words = start(photos, out, tmp_path / "cache", "--epochs", 6, "--lr", 10, "--grad-clip", 0)
    try:
        run_train(*words)
    except UserError as error:
        assert "epoch" in str(error) and "training is stopped" in str(error)
    for path in out.glob("*.pt"):
        weights = load_checkpoint(path)["model"]
        assert all(w.isfinite().all() for w in weights.values() if w.is_floating_point())


def test_collapse_stops_and_a_fresh_model_does_not(photo_data: Path, tmp_path: Path):
    same = torch.nn.functional.normalize(torch.randn(1, 64), dim=1).expand(32, 64)
    spread = torch.nn.functional.normalize(torch.randn(32, 64), dim=1)
    with pytest.raises(UserError, match="all image embeddings are the same point"):
        train.check_spread(same, spread, "epoch 1")
    with pytest.raises(UserError, match="all text embeddings are the same point"):
        train.check_spread(spread, same, "epoch 1")
    train.check_spread(same[:4], spread, "a batch too small to tell")
    with pytest.raises(UserError, match="an image embedding is not finite"):
        train.check_spread(spread * float("nan"), spread, "epoch 1")
    for tower in ("resnet18", "resnet50"):
        for text in ("transformer", "lstm"):
            words = ["--image-tower", tower, "--text-tower", text, "--lr", 1e-12, "--warmup", 0]
            place = start(photo_data, tmp_path / (tower + text), tmp_path / "cache", "--epochs", 1)
            assert run_train(*place, *words) == 0


# ------------------------------------------------------------- pretrained towers and phases


@pytest.fixture(scope="module")
def resnet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the format of torchvision's."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), path)
    return path


PHASES = (
    *("--head", "mlp", "--head-epochs", 2, "--epochs", 4, "--train-image", 1, "--ema", "0.9"),
    *(
        "--image-augment",
        "mirror",
        "--test-mirror",
        "--captions-per-image",
        2,
        "--tower-lr",
        "1e-3",
    ),
    *("--loss", "infonce+0.2*triplet", "--text-dropout", "0.1", "--schedule", "linear"),
)


TWO_TOWERS = (
    *("--image-tower", "resnet18+resnet18", "--head-epochs", 1, "--epochs", 2),
    *("--text-tower", "bag", "--train-text", 0),
)


@pytest.mark.parametrize("towers", [(), TWO_TOWERS, (*TWO_TOWERS, "--train-image", "1+0")])
def test_phases_stop_and_resume_to_the_same_bits(
    photo_data: Path, tmp_path: Path, resnet_file: Path, towers: tuple
):
    """Stopped after each epoch: inside a phase, between two, and between two towers."""
    words = ["--image-weights", resnet_file, *PHASES, *towers]
    whole, parts, cache = tmp_path / "whole", tmp_path / "parts", tmp_path / "cache"
    assert run_train(*start(photo_data, whole, cache, *words)) == 0
    real = train.Run.finished
    for epoch in range(1, 5):
        train.Run.finished = lambda run, n=epoch: len(run.history) >= n or real(run)
        try:
            go_on = ["--resume", parts, "--cache", cache]
            assert (
                run_train(*(go_on if epoch > 1 else start(photo_data, parts, cache, *words))) == 0
            )
        finally:
            train.Run.finished = real
        content = load_checkpoint(parts / "last.pt")
        content["finished"] = False
        save_checkpoint(parts / "last.pt", content)
    a, b = load_checkpoint(whole / "last.pt"), load_checkpoint(parts / "last.pt")
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
    for key, value in a["average"]["average"].items():
        assert torch.equal(value, b["average"]["average"][key])
    losses = [[record["train_loss"] for record in content["history"]] for content in (a, b)]
    assert losses[0] == losses[1]


def test_what_learns_in_which_phase(photo_data: Path, tmp_path: Path, resnet_file: Path, capsys):
    words = ["--image-weights", resnet_file, *PHASES]
    assert run_train(*start(photo_data, tmp_path / "run", tmp_path / "cache", *words)) == 0
    assert "images in 2 batches" in capsys.readouterr().out
    given = torch.load(resnet_file, weights_only=True)
    model = load_checkpoint(tmp_path / "run" / "last.pt")["model"]
    changed = {
        k
        for k, x in given.items()
        if k[:3] != "fc." and not torch.equal(model[f"image_tower.{k}"], x)
    }
    assert changed and all(key.startswith("layer4.1.") for key in changed)
    assert not any("running" in key for key in changed)  # frozen statistics


@pytest.mark.parametrize("views", [0, 1, 3])
def test_a_frozen_tower_learns_to_match(
    photo_data: Path, tmp_path: Path, resnet_file: Path, views: int
):
    words = start(photo_data, tmp_path / "run", tmp_path / "cache", "--epochs", 6)
    more = ["--image-weights", resnet_file, "--views", views, "--image-augment", "light"]
    assert run_train(*words, *more) == 0
    history = load_checkpoint(tmp_path / "run" / "last.pt")["history"]
    assert history[-1]["train_loss"] < 0.9 * history[0]["train_loss"]
    cached = [path for path in (tmp_path / "cache").iterdir() if path.name.startswith("images-")]
    assert len(cached) == (2 if views else 0)


@pytest.mark.parametrize("towers", [(), TWO_TOWERS])
def test_evaluation_from_the_cache_is_that_from_pixels(
    photo_data: Path, tmp_path: Path, resnet_file: Path, towers: tuple
):
    """A checkpoint, evaluated on dev as a user does, gives the figures of its epoch."""
    words = ["--image-weights", resnet_file, *PHASES, *towers]
    out, name = tmp_path / "run", "last.pt" if towers else "best.pt"  # the last has both towers
    assert run_train(*start(photo_data, out, tmp_path / "cache", *words)) == 0
    told = ["--split", "dev", "--json", tmp_path / "dev.json", "--cache", tmp_path / "cache"]
    done = script("evaluate.py", out / name, *told)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "dev.json").read_text())
    content = load_checkpoint(out / name)
    record = content["history"][content["epoch"] - 1]
    assert found["mean_recall"] == pytest.approx(record["mean_recall"], abs=4)
    assert found["i2t_meanr"] == pytest.approx(record["i2t_meanr"], rel=0.1)
    if towers:  # a model of both, each with its head on one text tower
        assert content["model"]["trained"] == 2 and len(content["history"]) == 4
        made = [content["model"][f"members.{i}.image_projection.linear.weight"] for i in (0, 1)]
        assert not torch.equal(*made)
        shared = [x.data_ptr() for key, x in content["model"].items() if ".text_tower." in key]
        assert shared and len(set(shared)) == len(shared) / 2  # kept once


@pytest.mark.parametrize(
    "words",
    [
        ["--loss", "siglip", "--schedule", "constant"],
        ["--loss", "triplet", "--schedule", "plateau"],
        ["--text-tower", "bag", "--pretrain-text", "3", "--train-text", "0"],
        ["--label-smoothing", "0.1", "--schedule", "step", "--ema", "0.5"],
        ["--text-augment", "synonym=0.2,delete=0.2,swap=0.2", "--head", "mlp"],
        ["--image-augment", "strong", "--test-mirror", "--train-text", "1"],
    ],
)
def test_every_flag_trains(photo_data: Path, tmp_path: Path, words: list[str]):
    place = start(photo_data, tmp_path / "run", tmp_path / "cache", "--epochs", 5)
    assert run_train(*place, *words) == 0
    history = load_checkpoint(tmp_path / "run" / "last.pt")["history"]
    assert history[-1]["train_loss"] < history[0]["train_loss"]


def test_a_bert_of_the_users_own(photo_data: Path, tmp_path: Path):
    folder = write_bert(tmp_path / "bert")
    for trained in ("0", "1"):
        out = tmp_path / f"run{trained}"
        words = start(photo_data, out, tmp_path / "cache", "--epochs", 2, "--text-tower", "bert")
        assert run_train(*words, "--text-weights", folder, "--train-text", trained) == 0
    shutil.rmtree(folder)  # the checkpoint alone is enough
    done = script("evaluate.py", out / "best.pt", "--cache", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    content = load_checkpoint(out / "best.pt")
    assert content["config"]["text_architecture"]["hidden_size"] == 32


# ------------------------------------------------------------------------------ the schedule


def test_learning_rate_against_the_closed_form():
    rates = [2 * optimizer.learning_rate(step, 100, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    expected = 1 + np.cos(np.pi * np.arange(90) / 90)
    assert rates[10:] == pytest.approx(expected.tolist())
    assert optimizer.learning_rate(0, 5, 0) == 1.0
    assert all(0 < optimizer.learning_rate(step, 3, 300) <= 1 for step in range(3))


def test_no_decay_on_norms_biases_and_scale(photo_data: Path, tmp_path: Path):
    config = train.resolve({"data": "shapes"}, train.build_parser().defaults())
    tokenizer = train.Tokenizer.train(["a dog"], 1, 8)
    model = train.build_model(config, train.image_transform(config), tokenizer)
    groups = optimizer.build_optimizer(model, config, (0.1, 0.2, 0.3)).param_groups
    decayed = {id(x) for group in groups if group["weight_decay"] for x in group["params"]}
    assert {group["weight_decay"] for group in groups} == {0, config["weight_decay"]}
    peak = {id(x): group["peak"] for group in groups for x in group["params"]}
    assert peak[id(model.image_tower.conv1.weight)] == 0.1
    assert peak[id(model.text_tower.words.weight)] == 0.2
    assert peak[id(model.text_projection.weight)] == peak[id(model.logit_scale)] == 0.3
    for name, weight in model.named_parameters():
        plain = weight.ndim >= 2
        assert (id(weight) in decayed) == plain, name
        if "bias" in name or "norm" in name or name == "logit_scale":
            assert not plain, name
    learned = [x for x in model.parameters() if x.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(learned)


def test_precision_follows_the_device(monkeypatch):
    cpu = torch.device("cpu")
    for native, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(
            torch.cpu, "_is_avx512_bf16_supported", lambda n=native: n, raising=False
        )
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
        assert train.choose_precision("auto", cpu) == expected
    assert train.choose_precision("auto", torch.device("mps")) == "fp32"
    assert train.choose_precision("bf16", cpu) == "bf16"
    for supported, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda s=supported: s)
        assert train.choose_precision("auto", torch.device("cuda")) == expected


def test_bf16_trains(photo_data: Path, tmp_path: Path):
    words = start(photo_data, tmp_path / "run", tmp_path / "cache", "--epochs", 2)
    assert run_train(*words, "--precision", "bf16") == 0
    history = load_checkpoint(tmp_path / "run" / "last.pt")["history"]
    assert history[1]["train_loss"] < history[0]["train_loss"]


# ------------------------------------------------------------------------------- real data


@pytest.mark.flickr8k
def test_real_photographs_learn(flickr8k: Path, tmp_path: Path):
    words = ["--data", flickr8k, "--out", tmp_path / "run", "--cache", tmp_path / "cache"]
    small = ["--image-size", 32, "--limit", 600, "--epochs", 3, "--batch-size", 64]
    assert run_train(*words, *small) == 0
    content = load_checkpoint(tmp_path / "run" / "last.pt")
    assert content["history"][-1]["train_loss"] < content["history"][0]["train_loss"]
    assert content["history"][-1]["t2i_meanr"] < 480  # chance: 500.5 of 1,000
    assert os.access(flickr8k, os.R_OK)


def test_split_by_caption_is_remembered(tmp_path: Path, capsys):
    data = write_kaggle(tmp_path / "course")
    rows = (data / "captions.txt").read_text().splitlines()[1:]
    for name, part in (("train", 0), ("val", 3), ("test", 4)):
        chosen = [
            r for i, r in enumerate(rows) if (i % 5 in (0, 1, 2) if part == 0 else i % 5 == part)
        ]
        (data / f"{name}_captions.txt").write_text("image,caption\n" + "\n".join(chosen) + "\n")
    words = start(data, tmp_path / "run", tmp_path / "cache", "--epochs", 1)
    assert run_train(*words, "--splits", "given") == 0
    assert "40 of its 40 test images are also training images" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "run" / "best.pt")["split_by_caption"] is True
