"""Training as a user meets it: runs, interruptions, resuming to the same bits, what is refused."""

import csv
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    assert_same_run,
    run_train,
    script,
    small_model,
    small_options,
    start,
    write_bert,
    write_kaggle,
)

import evaluate
import loss
import train
from dataset import Captions, Pairs, Tokenizer, load_dataset
from models import CLIP, build_model, model_from_checkpoint
from sources.layouts import read_folder
from support import precision
from support.checkpoint import load_checkpoint, save_checkpoint
from support.command import UserError
from tricks.averaging import Average
from tricks.captions_alone import pair_captions

FILES = {"best.pt", "last.pt", "history.csv", "curves.png", "config.json"}
# The image tower's features are computed once, and its weights are no part of the optimizer.
QUICK = ("--train-image", "0", "--image-augment", "none")


def history_of(run: Path) -> list[dict[str, float]]:
    return load_checkpoint(run / "last.pt")["history"]


def images_of(data: Path, cache: Path) -> dict[str, int]:
    """How many images a split holds."""
    dataset = load_dataset(data, size=36, cache=cache, workers=0)
    return {split: len(dataset.pairs(split).rows) for split in ("train", "dev", "test")}


# ------------------------------------------------------------------------------ what a run leaves


def test_run_leaves_what_it_names(tiny_run: Path):
    assert {path.name for path in tiny_run.iterdir()} == FILES
    with (tiny_run / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[2]["train_loss"]) < float(rows[0]["train_loss"])
    scores = [float(row["mean_recall"]) for row in rows]
    assert load_checkpoint(tiny_run / "best.pt")["epoch"] == 1 + scores.index(max(scores))


def test_checkpoint_is_plain_and_whole(tiny_run: Path, photo_data: Path, tmp_path: Path):
    content = torch.load(tiny_run / "last.pt", weights_only=True)
    for key in ("config", "vocabulary", "transform", "history", "random_states", "versions"):
        assert content[key], key
    assert content["fingerprint"] and content["optimizer"]["state"]
    assert content["versions"]["torch"] == str(torch.__version__)
    assert len(content["train_images"]["names"]) == images_of(photo_data, tmp_path)["train"]
    assert json.loads((tiny_run / "config.json").read_text()) == content["config"]


def test_same_seed_same_bits_and_workers_do_not_matter(photo_data: Path, tmp_path: Path):
    for name, more in (("a", []), ("b", ["--workers", 2]), ("c", ["--seed", 1])):
        words = start(photo_data, tmp_path / name, tmp_path / f"cache{len(more)}", "--epochs", 1)
        assert run_train(*words, *more) == 0
    a, b, c = (load_checkpoint(tmp_path / name / "last.pt")["model"] for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_output_says_what_there_is_what_it_takes_and_what_was_written(
    photo_data: Path, tmp_path: Path, capsys
):
    words = start(photo_data, tmp_path / "run", tmp_path / "cache", *QUICK, "--epochs", 1)
    assert run_train(*words, "--limit", 8, "--train-image", "all") == 0
    written = capsys.readouterr()
    assert written.err == ""
    lines = written.out.splitlines()
    assert lines[0].startswith(f"data {photo_data}") and "fingerprint" in lines[0]
    chance = 100 / images_of(photo_data, tmp_path / "cache")["dev"]  # dev stays whole
    assert f"8 images in 1 batches; chance on dev: R@1 {chance:.2f}%" in lines[1]
    assert [line for line in lines if line.startswith("about ") and "min for 1" in line]
    assert lines[-1].startswith(f"wrote {tmp_path / 'run'}: best.pt (epoch 1")


@pytest.mark.parametrize(("batch", "limit"), [(25, 26), (2, 5), (64, 2)])
def test_short_and_odd_batches(photo_data: Path, tmp_path: Path, batch: int, limit: int):
    words = start(photo_data, tmp_path / "run", tmp_path / "cache", *QUICK, "--epochs", 1)
    assert run_train(*words, "--batch-size", batch, "--limit", limit) == 0
    content = load_checkpoint(tmp_path / "run" / "last.pt")
    assert math.isfinite(content["history"][0]["train_loss"])
    assert len(content["train_images"]["names"]) == limit


def test_a_limit_above_all_images_is_told_once(photo_data: Path, tmp_path: Path, capsys):
    words = start(photo_data, tmp_path / "run", tmp_path / "cache", *QUICK, "--epochs", 1)
    assert run_train(*words, "--limit", 999, "--train-image", "all") == 0
    count = images_of(photo_data, tmp_path / "cache")["train"]
    warning = f"warning: --limit 999: there are {count} training images, all are used\n"
    assert capsys.readouterr().err == warning


def test_train_recall_measures_as_many_training_images(photo_data: Path, tmp_path: Path, capsys):
    words = start(photo_data, tmp_path / "run", tmp_path / "cache", *QUICK, "--epochs", 2)
    dev = images_of(photo_data, tmp_path / "cache")["dev"]
    for limit, images in ((20, dev), (3, 3)):
        out = tmp_path / f"run{limit}"
        assert run_train(*words, "--out", out, "--train-recall", "--limit", limit) == 0
        for record in history_of(out):
            assert record["dev_films"] == dev
            for way in ("i2t", "t2i"):
                found = record[f"train_top1_{way}"] * images / 100
                assert found == pytest.approx(round(found)) and 0 <= found <= images
    assert history_of(out)[-1].keys() - history_of(tmp_path / "run20")[-1].keys() == set()
    assert "limit" not in capsys.readouterr().err  # which was not too large


def test_patience_stops_early_for_good(photo_data: Path, tmp_path: Path, capsys):
    words = start(photo_data, tmp_path / "run", tmp_path / "cache", *QUICK, "--epochs", 50)
    assert run_train(*words, "--patience", 1, "--lr", 1e-12) == 0
    assert len(history_of(tmp_path / "run")) == 2
    assert "stopped early: no better epoch in 1 (--patience)" in capsys.readouterr().out
    assert run_train("--resume", tmp_path / "run", "--cache", tmp_path / "cache") == 0
    assert "this run is finished after 2 epochs" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["--fixed-temperature"],
        ["--text-tower", "lstm", "--captions-per-image", "3", "--precision", "bf16"],
        ["--text-tower", "bag", "--image-augment", "light", "--label-smoothing", "0.1"],
        ["--loss", "siglip", "--schedule", "constant", "--grad-clip", "0"],
        ["--loss", "infonce+0.2*triplet", "--schedule", "step", "--ema", "0.5"],
        ["--text-augment", "synonym=0.2,delete=0.2,swap=0.2", "--head", "mlp"],
        ["--image-augment", "strong", "--test-mirror", "--train-text", "1"],
        ["--captions-alone", "--text-tower", "bag", "--min-count", "1", "--max-tokens", "8"],
        ["--train-image", "3", "--text-dropout", "0.1", "--image-dropout", "0.1"],
    ],
)
def test_every_flag_trains(photo_data: Path, tmp_path: Path, words: list[str]):
    place = start(photo_data, tmp_path / "run", tmp_path / "cache", *QUICK, "--epochs", 4)
    assert run_train(*place, *words) == 0
    history = history_of(tmp_path / "run")
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    fixed = "--fixed-temperature" in words
    assert (abs(history[-1]["logit_scale"] - 1 / 0.07) < 1e-4) == fixed


def test_split_by_caption_is_remembered(tmp_path: Path, capsys):
    data = write_kaggle(tmp_path / "course")
    rows = (data / "captions.txt").read_text().splitlines()[1:]
    parts = {"train": (0, 1, 2), "val": (3,), "test": (4,)}  # of an image's five captions
    for name, places in parts.items():
        chosen = [row for i, row in enumerate(rows) if i % 5 in places]
        (data / f"{name}_captions.txt").write_text("image,caption\n" + "\n".join(chosen) + "\n")
    words = start(data, tmp_path / "run", tmp_path / "cache", *QUICK, "--epochs", 1)
    assert run_train(*words, "--splits", "given") == 0
    assert "40 of its 40 test images are also training images" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "run" / "best.pt")["split_by_caption"] is True


@pytest.mark.flickr8k
def test_real_photographs_learn(flickr8k: Path, tmp_path: Path):
    """On the first 1,000 of them: to decode all would take most of the test's time."""
    rows = read_folder(flickr8k).rows
    names = set(sorted({row.image for row in rows})[:1000])
    (tmp_path / "data" / "images").mkdir(parents=True)
    for name in names:
        (tmp_path / "data" / "images" / name).symlink_to(flickr8k / "images" / name)
    with (tmp_path / "data" / "captions.txt").open("w", newline="", encoding="utf-8") as file:
        chosen = [(row.image, row.caption) for row in rows if row.image in names]
        csv.writer(file).writerows([("image", "caption"), *chosen])
    words = ["--data", tmp_path / "data", "--out", tmp_path / "run", "--cache", tmp_path / "cache"]
    assert run_train(*words, *TINY, "--epochs", 3, "--batch-size", 64, "--warmup", 0) == 0
    history = history_of(tmp_path / "run")
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert history[-1]["t2i_meanr"] < 53  # chance: 57 of 113


# ------------------------------------------------------------------------- stopping and resuming

EPOCHS = 4


def spawn(words: list[str]) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 100) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, f"no {path}"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def straight(photo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run never stopped, the reference of the stopped ones."""
    place = tmp_path_factory.mktemp("straight")
    assert run_train(*start(photo_data, place / "run", place / "cache", "--epochs", EPOCHS)) == 0
    return place / "run"


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_stopped_run_resumes_to_the_same_bits(
    photo_data: Path, straight: Path, tmp_path: Path, signum: int, code: int
):
    """A signal at some moment of an epoch; a second process goes on."""
    out, cache = tmp_path / "run", tmp_path / "cache"
    process = spawn(start(photo_data, out, cache, "--epochs", EPOCHS))
    wait_for(out / "last.pt", process)
    process.send_signal(signum)
    _, message = process.communicate(timeout=100)
    assert process.returncode == code
    if signum == signal.SIGKILL:
        for name in (".last-abcdefg_.pt", ".curves-12345678.png"):  # as inside a write
            (out / name).write_bytes(b"half")
    else:
        assert message.count("\n") == 1 and f"python train.py --resume {out}" in message
        assert {path.name for path in out.iterdir()} <= FILES
    assert 1 <= load_checkpoint(out / "last.pt")["epoch"] < EPOCHS
    assert run_train("--out", out, "--resume", "--cache", cache) == 0
    for name in ("last.pt", "best.pt"):
        assert_same_run(straight / name, out / name)
    assert {path.name for path in out.iterdir()} == FILES


# Everything that has a state of its own: averages, frozen statistics, dropout, a loss that learns.
STATES = (
    *("--head", "mlp", "--epochs", 4, "--train-image", 1, "--ema", "0.9", "--test-mirror"),
    *("--image-augment", "mirror", "--captions-per-image", 2, "--tower-lr", "1e-3"),
    *("--loss", "infonce+0.2*siglip", "--text-dropout", "0.1", "--schedule", "linear"),
)
FEATURES = (
    *("--text-tower", "bag", "--train-text", 0, "--epochs", 4, "--map-crop", "0.5"),
    *("--image-size", 64, "--image-dropout", "0.2", "--ema", "0.9"),
)
REWRITTEN = (
    *("--captions-alone", "--text-tower", "bag", "--epochs", 4, "--ema", "0.9"),
    *("--schedule", "step", "--text-augment", "delete=0.3"),
)


@pytest.mark.parametrize("flags", [STATES, FEATURES, REWRITTEN], ids=["states", "maps", "captions"])
def test_stopped_in_every_epoch_a_run_ends_in_the_same_bits(
    photo_data: Path, tmp_path: Path, resnet_file: Path, signalled, flags: tuple
):
    words = ["--image-weights", resnet_file, *flags]
    whole, parts, cache = tmp_path / "whole", tmp_path / "parts", tmp_path / "cache"
    assert run_train(*start(photo_data, whole, cache, *words)) == 0
    for epoch in range(1, 5):  # the first checkpoint of each start is whole, the second is not
        again = ["--resume", parts, "--cache", cache]
        signalled(2)
        code = run_train(*(again if epoch > 1 else start(photo_data, parts, cache, *words)))
        assert code == (130 if epoch < 4 else 0)
        assert load_checkpoint(parts / "last.pt")["epoch"] == epoch
    for name in ("last.pt", "best.pt"):
        assert_same_run(whole / name, parts / name)


def test_resume_goes_further_and_says_when_finished(tiny_run: Path, tmp_path: Path, capsys):
    out, cache = shutil.copytree(tiny_run, tmp_path / "run"), tmp_path / "cache"
    assert run_train("--resume", out / "last.pt", "--cache", cache) == 0
    assert "this run is finished after 3 epochs" in capsys.readouterr().out
    content = load_checkpoint(out / "last.pt")
    for flag in ("captions_alone", "train_recall", "map_crop"):  # younger than the run, say
        del content["config"][flag]
    for key in ("format", "version", "versions"):
        del content[key]
    save_checkpoint(out / "last.pt", content)
    assert run_train("--resume", out, "--epochs", 4, "--workers", 2, "--cache", cache) == 0
    assert load_checkpoint(out / "last.pt")["epoch"] == 4


@pytest.mark.parametrize(
    "words",
    [
        *(["--lr", "0.5"], ["--image_tower", "resnet50"], ["--seed", "3"], ["--data", "shapes"]),
        ["--captions-alone"],
    ],
)
def test_resume_refuses_other_flags(tiny_run: Path, words: list[str]):
    before = (tiny_run / "last.pt").read_bytes()
    with pytest.raises(UserError, match=f"{words[0].replace('_', '-')} .* differs from the run's"):
        run_train("--resume", tiny_run, "--epochs", 9, *words)
    assert (tiny_run / "last.pt").read_bytes() == before


def test_resume_takes_a_flag_typed_with_the_same_value(tiny_run: Path, capsys):
    words = ["--lr", "0.001", "--batch_size", 16, "--train-image", "all", "--recipe", "plain"]
    assert run_train("--resume", tiny_run, *words) == 0
    assert "finished" in capsys.readouterr().out


def test_resume_refuses_other_data(photos: Path, tmp_path: Path):
    out, cache = tmp_path / "run", tmp_path / "cache"
    run_train(*start(photos, out, cache, *QUICK, "--epochs", 1))
    text = (photos / "captions.txt").read_text()
    (photos / "captions.txt").write_text(text.replace("dog", "cat", 1))
    with pytest.raises(UserError, match="the data has changed"):
        run_train("--resume", out, "--epochs", 2, "--cache", cache)


def test_resume_refuses_what_is_no_run(tiny_run: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"there is no .*last.pt; no epoch of that run"):
        run_train("--resume", tmp_path)
    with pytest.raises(UserError, match="--resume needs the run's folder"):
        run_train("--resume")
    content = torch.load(tiny_run / "last.pt", weights_only=True)
    torch.save({**content, "version": 3}, tmp_path / "last.pt")
    for words in (["--resume", tmp_path], ["--init", tmp_path / "last.pt"]):
        with pytest.raises(UserError, match=r"has checkpoint version 3, .* train again"):
            run_train(*words)
    with pytest.raises(UserError, match=r"has checkpoint version 3, .* train again"):
        evaluate.main([str(tmp_path / "last.pt")])
    content["config"]["image_tower"] = "resnet50"
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(UserError, match="holds another model"):
        run_train("--resume", tmp_path, "--epochs", 9)


# -------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "words",
    [
        *(["--lr", value] for value in ("-1", "0", "nan", "inf", "1e9", "much")),
        *(["--batch-size", value] for value in ("0", "1", "-4", "1e3", "99999999999")),
        *(["--epochs", value] for value in ("0", "-1", "2.5")),
        *(["--temperature", value] for value in ("0", "-1", "nan")),
        *(
            [flag, "-1"]
            for flag in ("--weight-decay", "--warmup", "--workers", "--seed", "--limit", "--ema")
        ),
        *([flag, "0"] for flag in ("--image-size", "--embed-dim", "--patience", "--max-tokens")),
        ["--image-tower", "resnet1"],
        ["--text-tower", "bert2"],
        ["--precision", "fp16", "--device", "cpu"],
        ["--recipe", "nope"],
        ["--no-such-flag"],
        ["stray"],
    ],
)
def test_flags_out_of_range(photo_data: Path, tmp_path: Path, words: list[str]):
    with pytest.raises(UserError) as caught:
        run_train(*start(photo_data, tmp_path / "run", tmp_path / "cache"), *words)
    assert words[0] in str(caught.value)
    assert not (tmp_path / "run").exists()


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
def test_full_disk_keeps_the_last_checkpoint(photo_data: Path, tmp_path: Path, monkeypatch):
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
        run_train(*start(photo_data, out, cache, *QUICK, "--epochs", 3))
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


def test_loss_that_is_not_finite_stops(photo_data: Path, tmp_path: Path, monkeypatch):
    out, calls = tmp_path / "run", []

    def diverging(*batch, **ids):
        calls.append(1)
        return loss.info_nce(*batch, **ids) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setitem(loss.LOSSES, "infonce", lambda options, pairs: diverging)
    with pytest.raises(UserError, match=r"epoch 2, batch 2: the loss is nan; training is stopped"):
        run_train(*start(photo_data, out, tmp_path / "cache", *QUICK, "--epochs", 3))
    assert load_checkpoint(out / "last.pt")["epoch"] == 1


def test_a_rate_far_too_high_ends_in_one_line_or_in_a_whole_run(photo_data: Path, tmp_path: Path):
    words = start(photo_data, tmp_path / "run", tmp_path / "cache", "--epochs", 3, "--lr", 10)
    try:
        run_train(*words, "--grad-clip", 0)
    except UserError as error:
        assert "epoch" in str(error) and "training is stopped" in str(error)
    for path in (tmp_path / "run").glob("*.pt"):
        weights = load_checkpoint(path)["model"]
        assert all(w.isfinite().all() for w in weights.values() if w.is_floating_point())


def test_collapse_is_told_from_a_small_batch():
    same = torch.nn.functional.normalize(torch.randn(1, 64), dim=1).expand(32, 64)
    spread = torch.nn.functional.normalize(torch.randn(32, 64), dim=1)
    loss.check_finite(0.0, same[:4], spread, "a batch too small to tell")
    for images, texts, message in (
        (same, spread, "epoch 1: all image embeddings are the same point"),
        (spread, same, "epoch 1: all text embeddings are the same point"),
        (spread * float("nan"), spread, "epoch 1: an image embedding is not finite"),
        (spread, spread * float("inf"), "epoch 1: a text embedding is not finite"),
    ):
        with pytest.raises(UserError, match=message):
            loss.check_finite(0.0, images, texts, "epoch 1")


@pytest.mark.parametrize("mode", ["training", "dev"])
def test_collapse_stops_a_run(photos: Path, tmp_path: Path, monkeypatch, mode: str):
    """The dev split has 8 images or more: fewer do not tell."""
    real = CLIP.encode_text

    def collapsed(model: CLIP, tokens: torch.Tensor) -> torch.Tensor:
        embeddings = real(model, tokens)
        gone = model.training == (mode == "training")
        return embeddings[:1].expand_as(embeddings) if gone else embeddings

    monkeypatch.setattr(CLIP, "encode_text", collapsed)
    place = "epoch 1, batch 1" if mode == "training" else "epoch 1, dev"
    words = start(photos, tmp_path / "run", tmp_path / "cache", *QUICK, "--epochs", 2)
    with pytest.raises(UserError, match=f"{place}: all text embeddings are the same point"):
        run_train(*words)
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize("text", ["transformer", "lstm", "bag"])
@pytest.mark.parametrize("image", ["resnet18", "resnet50"])
def test_a_fresh_model_has_not_collapsed(image: str, text: str):
    model = small_model(image_tower=image, text_tower=text)
    pictures = torch.rand(16, 3, 32, 32) * 0.1 + 0.4
    tokens = torch.randint(4, 30, (16, 6))
    for mode in (True, False):
        model.train(mode)
        loss.check_finite(0.0, model.encode_image(pictures), model.encode_text(tokens), "fresh")


# -------------------------------------------------------------------------- pretrained towers


def test_what_learns_of_a_pretrained_tower(photo_data: Path, tmp_path: Path, resnet_file: Path):
    words = ["--image-weights", resnet_file, *STATES, "--epochs", 1]
    assert run_train(*start(photo_data, tmp_path / "run", tmp_path / "cache", *words)) == 0
    content = load_checkpoint(tmp_path / "run" / "last.pt")
    tokenizer = Tokenizer(content["vocabulary"], 40)
    before = build_model(Namespace(**content["config"]), tokenizer).state_dict()
    changed = {k for k, x in content["model"].items() if not torch.equal(x, before[k])}
    of_tower = {key for key in changed if key.startswith("image_tower.")}
    assert of_tower and all(key.startswith("image_tower.9.") for key in of_tower)
    assert not any("running" in key for key in of_tower)  # frozen statistics
    assert "image_projection.linear.weight" in changed and "text_tower.words.weight" in changed


@pytest.mark.parametrize("augment", ["none", "light"])
def test_a_frozen_tower_learns_to_match(
    photo_data: Path, tmp_path: Path, resnet_file: Path, augment: str
):
    words = start(photo_data, tmp_path / "run", tmp_path / "cache", "--epochs", 5)
    more = ["--image-weights", resnet_file, "--image-augment", augment]
    assert run_train(*words, *more) == 0
    history = history_of(tmp_path / "run")
    assert history[-1]["train_loss"] < 0.9 * history[0]["train_loss"]
    cached = [path for path in (tmp_path / "cache").iterdir() if path.name.startswith("images-")]
    assert len(cached) == (2 if augment == "none" else 0)  # of train and of dev


def test_evaluation_from_the_cache_is_that_from_pixels(
    photo_data: Path, tmp_path: Path, resnet_file: Path
):
    """A checkpoint, evaluated on dev as a user does, gives the figures of its epoch."""
    out, cache = tmp_path / "run", tmp_path / "cache"
    words = ["--image-weights", resnet_file, *STATES, "--image-augment", "none", "--epochs", 2]
    assert run_train(*start(photo_data, out, cache, *words)) == 0
    flags = ["--split", "dev", "--json", tmp_path / "dev.json", "--cache", cache]
    evaluate.main([str(word) for word in (out / "last.pt", *flags)])
    found = json.loads((tmp_path / "dev.json").read_text())
    record = history_of(out)[-1]
    assert found["mean_recall"] == pytest.approx(record["mean_recall"], abs=4)
    assert found["i2t_meanr"] == pytest.approx(record["i2t_meanr"], rel=0.1)


def test_a_bert_of_the_users_own(photo_data: Path, tmp_path: Path):
    folder = write_bert(tmp_path / "bert")
    for trained in ("0", "1"):
        out = tmp_path / f"run{trained}"
        words = start(photo_data, out, tmp_path / "cache", *QUICK, "--epochs", 1)
        words += ["--text-tower", "bert", "--text-weights", folder, "--train-text", trained]
        assert run_train(*words) == 0
    shutil.rmtree(folder)  # the checkpoint alone is enough
    evaluate.main([str(out / "best.pt"), "--cache", str(tmp_path / "cache")])
    content = load_checkpoint(out / "best.pt")
    assert content["config"]["text_architecture"]["hidden_size"] == 32


# ----------------------------------------------------------- the optimizer and its averages


@pytest.mark.parametrize("schedule", train.SCHEDULES)
def test_schedules_begin_at_the_peak_and_never_rise(schedule: str):
    rates = [2 * train.learning_rate(step, 100, 10, schedule) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(2.0)
    assert all(0 < b <= a for a, b in pairwise(rates[10:]))


def test_schedules_against_closed_forms():
    at = {
        name: [schedule(x) for x in (0, 0.25, 0.5, 0.9)]
        for name, schedule in train.SCHEDULES.items()
    }
    half = math.sqrt(2) / 2
    cosine = [1, (1 + half) / 2, 0.5, 0.5 - 0.5 * math.cos(0.1 * math.pi)]
    assert at["cosine"] == pytest.approx(cosine)
    assert at["linear"] == pytest.approx([1, 0.75, 0.5, 0.1])
    assert at["step"] == [1, 1, 0.1, 0.01]
    assert at["constant"] == [1] * 4
    rates = [train.learning_rate(step, 100, 10) for step in range(10, 100)]
    assert rates == pytest.approx(((1 + np.cos(np.pi * np.arange(90) / 90)) / 2).tolist())
    assert train.learning_rate(0, 5, 0) == 1.0
    assert all(0 < train.learning_rate(step, 3, 300) <= 1 for step in range(3))


@pytest.mark.parametrize("pretrained", ["neither", "image", "text"])
def test_rates_and_decay_of_each_weight(pretrained: str):
    options = small_options(lr=0.3, tower_lr=0.1, weight_decay=0.05)
    model = build_model(options, Tokenizer.train(["a dog"], 1, 8))
    options.image_weights = "x" if pretrained == "image" else "none"
    options.text_weights = "x" if pretrained == "text" else "none"
    model.image_tower[1].requires_grad_(False)
    siglip = loss.SigLIP()
    groups = train.build_optimizer(model, siglip, options).param_groups
    found = {
        id(x): (group["peak"], group["weight_decay"]) for group in groups for x in group["params"]
    }
    assert sum(len(group["params"]) for group in groups) == len(found)
    for name, weight in model.named_parameters():
        if name.startswith("image_tower.1."):
            assert id(weight) not in found, name
            continue
        peak, decay = found[id(weight)]
        assert peak == (0.1 if name.startswith(f"{pretrained}_tower.") else 0.3), name
        assert decay == (0.05 if weight.ndim >= 2 else 0.0), name
        if "bias" in name or "norm" in name or name == "logit_scale":
            assert decay == 0.0, name
    assert found[id(siglip.bias)] == (0.3, 0.0)


def test_average_against_a_loop():
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    average, expected = Average(model, 0.9), model.weight.detach().clone()
    fixed = model.bias.clone()
    for step in range(1, 200):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        average.update()
        kept = min(0.9, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * model.weight.detach()
    last = model.weight.detach().clone()
    with average.in_place() as state:
        torch.testing.assert_close(model.weight.detach(), expected)
        assert torch.equal(model.bias, fixed)
        again = torch.nn.Linear(3, 2)
        again.load_state_dict(model.state_dict())
    assert torch.equal(model.weight.detach(), last)
    again.bias.requires_grad_(False)
    resumed = Average(again, 0.9)
    resumed.restore(state)
    assert torch.equal(again.weight.detach(), last)
    for one in (average, resumed):
        one.update()
    with average.in_place(), resumed.in_place():
        assert torch.equal(model.weight, again.weight)


def test_the_average_is_what_is_measured_and_kept(photo_data: Path, tmp_path: Path):
    words = start(photo_data, tmp_path / "run", tmp_path / "cache", *QUICK, "--epochs", 2)
    assert run_train(*words, "--ema", "0.99") == 0
    content = load_checkpoint(tmp_path / "run" / "last.pt")
    assert content["average"]["steps"] == 4
    for name, weight in content["average"]["weights"].items():
        if weight.ndim >= 2:
            assert not torch.equal(weight, content["model"][name]), name
    scale = content["model"]["logit_scale"].exp().item()
    assert content["history"][-1]["logit_scale"] == pytest.approx(scale)


# -------------------------------------------------------------------------- captions alone


def captioned(owner: list[int], captions: list[str], tokenizer: Tokenizer, name: str) -> Pairs:
    """Pairs whose pictures nothing looks at."""
    rows = np.arange(max(owner) + 1)
    texts = Captions(captions, tokenizer)
    return Pairs(None, name, rows, captions, np.array(owner), tokenizer, images="none", texts=texts)


def test_pairs_are_two_captions_of_one_image():
    owner = [3, 0, 1, 1, 3, 4, 3, 4, 0, 2]  # image 2 has one caption, 3 has three, the others two
    model = small_model(text_tower="bag")
    captions = [f"word{number}" for number in range(len(owner))]
    split = captioned(owner, captions, model.tokenizer, "train")
    options = small_options(text_tower="bag", captions_alone=True, batch_size=4, workers=0)
    _, paired = pair_captions(model, {"train": split}, options)
    seen = set()
    for epoch in range(1, 41):
        batches = list(paired["train"].batches(epoch, options, torch.device("cpu")))
        images, texts = (torch.cat([batch[side][:, 1] - 4 for batch in batches]) for side in (0, 1))
        ids = torch.cat([batch[2] for batch in batches])
        assert sorted(ids.tolist()) == [0, 1, 3, 4]
        for one, other, image in zip(images.tolist(), texts.tolist(), ids.tolist(), strict=True):
            assert owner[one] == owner[other] == image and one != other
            if image == 3:
                seen.add((one, other))
    assert seen == {(a, b) for a in (0, 4, 6) for b in (0, 4, 6) if a != b}


def test_first_captions_look_for_the_others_on_dev():
    model = small_model(text_tower="bag")
    captions = [f"word{number}" for number in range(6)]
    split = captioned([1, 0, 0, 1, 1, 2], captions, model.tokenizer, "dev")
    options = small_options(text_tower="bag", captions_alone=True)
    learner, paired = pair_captions(model, {"dev": split}, options)
    embedded = evaluate.evaluate_split(learner, paired["dev"])
    assert paired["dev"].captions == ["word2", "word3", "word4"]
    assert paired["dev"].caption_image.tolist() == [0, 1, 1]
    with torch.inference_mode():
        each = model.eval().encode_text(model.tokenizer(captions)).numpy()
    np.testing.assert_allclose(embedded.image_embeddings, each[[1, 0]], atol=1e-6)
    np.testing.assert_allclose(embedded.text_embeddings, each[[2, 3, 4]], atol=1e-6)


def test_one_caption_an_image_is_no_start():
    model = small_model(text_tower="bag")
    split = captioned([0, 1, 2], ["word1", "word2", "word3"], model.tokenizer, "train")
    with pytest.raises(UserError, match="no two train images have two captions or more"):
        pair_captions(model, {"train": split}, small_options(captions_alone=True))


def test_captions_alone_move_the_text_tower_alone(photo_data: Path, tmp_path: Path):
    words = start(photo_data, tmp_path / "run", tmp_path / "cache", "--epochs", 3)
    assert run_train(*words, "--captions-alone", "--text-tower", "lstm") == 0
    content = load_checkpoint(tmp_path / "run" / "last.pt")
    assert content["history"][-1]["train_loss"] < content["history"][0]["train_loss"]
    tokenizer = Tokenizer(content["vocabulary"], 40)
    before = build_model(Namespace(**content["config"]), tokenizer).state_dict()
    parts = {k.split(".")[0] for k, x in content["model"].items() if not torch.equal(x, before[k])}
    assert parts == {"text_tower", "text_projection", "logit_scale"}
    assert model_from_checkpoint(content, tmp_path).tokenizer.vocabulary == tokenizer.vocabulary


def test_captions_alone_are_rewritten_too(photo_data: Path, tmp_path: Path):
    losses = []
    for rates in ("none", "delete=0.5"):
        words = start(photo_data, tmp_path / rates, tmp_path / "cache", "--epochs", 1)
        words += ["--captions-alone", "--text-tower", "bag", "--dropout", "0"]
        assert run_train(*words, "--text-augment", rates) == 0
        losses.append(load_checkpoint(tmp_path / rates / "last.pt")["history"][0]["train_loss"])
    assert losses[0] != losses[1]


def test_the_text_tower_has_a_rate_of_its_own():
    options = small_options(lr=0.3, text_lr=0.02)
    model = build_model(options, Tokenizer.train(["a dog"], 1, 8))
    groups = train.build_optimizer(model, torch.nn.Module(), options).param_groups
    peaks = {id(x): group["peak"] for group in groups for x in group["params"]}
    for name, weight in model.named_parameters():
        assert peaks[id(weight)] == (0.02 if name.startswith("text_") else 0.3), name


@pytest.mark.parametrize("pretrained", ["image", "text"])
def test_captions_alone_have_the_rate_of_the_text_tower(pretrained: str):
    options = small_options(text_tower="bag", captions_alone=True, lr=0.3, tower_lr=0.1)
    model = small_model(text_tower="bag")
    split = captioned([0, 0, 1, 1], ["word1", "word2", "word3", "word4"], model.tokenizer, "train")
    learner, _ = pair_captions(model, {"train": split}, options)
    options.image_weights = "x" if pretrained == "image" else "none"
    options.text_weights = "x" if pretrained == "text" else "none"
    groups = train.build_optimizer(learner, loss.SigLIP(), options).param_groups
    peaks = {id(x): group["peak"] for group in groups for x in group["params"]}
    expected = 0.1 if pretrained == "text" else 0.3
    assert {peaks[id(x)] for x in model.text_tower.parameters()} == {expected}


# ----------------------------------------------------------------------------------- --init


def test_a_run_that_goes_on_sees_batches_and_dropout_of_its_own(
    photo_data: Path, tmp_path: Path, monkeypatch
):
    """Those that its weights have learned are known by heart: in `best` they cost 1.4 of recall."""
    found, real = [], Pairs.batches

    def batches(pairs: Pairs, epoch: int, options, device):
        owners = [ids.tolist() for _, _, ids, _ in real(pairs, epoch, options, device)]
        found.append((torch.initial_seed(), owners))
        return real(pairs, epoch, options, device)

    monkeypatch.setattr(Pairs, "batches", batches)
    (tmp_path / "two.txt").write_text("a: --epochs 2\nb: --init a --epochs 3\n")
    words = start(photo_data, tmp_path / "run", tmp_path / "cache", *QUICK)
    assert run_train(*words, "--recipe", tmp_path / "two.txt") == 0
    epoch = load_checkpoint(tmp_path / "run" / "a" / "best.pt")["epoch"]
    seeds, owners = zip(*found, strict=True)
    assert len(owners) == 5 and seeds[0] == seeds[1] and seeds[2] == seeds[3] != seeds[0]
    seen = owners[:epoch]
    assert all(batch not in earlier for earlier in seen for later in owners[2:] for batch in later)
    assert not any(later == earlier for earlier in seen for later in owners[2:])


# ------------------------------------------------------------------------------- precision


def test_the_precision_that_auto_chose_is_kept(photo_data: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(precision, "measure_steps", lambda *_: {"fp32": 2.0, "bf16": 1.0})
    words = start(photo_data, tmp_path / "run", tmp_path / "cache", *QUICK, "--epochs", 1)
    assert run_train(*words, "--precision", "auto") == 0
    assert load_checkpoint(tmp_path / "run" / "last.pt")["config"]["precision"] == "bf16"
