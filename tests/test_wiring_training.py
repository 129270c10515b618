"""A run of train.py recomputed from outside: its first step, its rates, what it keeps and when."""

import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from conftest import TINY, caption, names, photo
from wiring import (
    embed_captions,
    embed_pictures,
    info_nce_loop,
    picture_input,
    rate_share,
    read_history,
    split_figures,
    tokens_of,
    write_folder,
)

from models import CLIP

PLAIN = (*TINY, "--image-augment", "none")
# The image tower's features are computed once, and its weights are no part of the optimizer.
QUICK = (*PLAIN, "--train-image", "0")
TOWER = "image_tower."  # of the names of weights


def run_train(*words: object) -> int:
    return helpers.train.main([str(word) for word in words])


def spec(train: int, dev: int = 3, test: int = 3, each: int = 1) -> dict:
    """Made-up photographs in this order of splits, with `each` captions an image."""
    splits = ["train"] * train + ["val"] * dev + ["test"] * test
    return {
        name: (split, [caption(number, which) for which in range(each)])
        for number, (name, split) in enumerate(zip(names(len(splits)), splits, strict=True))
    }


def check_rates(run: Path) -> None:
    """The rate column is the closed form at each epoch's last step."""
    flags = json.loads((run / "config.json").read_text())
    images = len(helpers.load_checkpoint(run / "last.pt")["train_images"]["names"])
    each = math.ceil(images / flags["batch_size"])
    steps, warmup = flags["epochs"] * each, round(flags["warmup"] * each)
    for row in read_history(run):
        share = rate_share(int(row["epoch"]) * each - 1, steps, warmup, flags["schedule"])
        assert row["lr"] == pytest.approx(flags["lr"] * share, rel=1e-9), row["epoch"]


# -------------------------------------------------------------------------- the first step


def one_step(tmp_path: Path, images: dict, *flags: object) -> tuple[Path, dict, list[str]]:
    """A run of one epoch of one batch: (its folder, its last checkpoint, its pictures' names)."""
    data = write_folder(tmp_path / "data", images)
    words = ("--data", data, "--out", tmp_path / "run", "--cache", tmp_path / "cache", *PLAIN)
    words += ("--epochs", 1, "--batch-size", 64, "--warmup", 0, "--schedule", "constant")
    assert run_train(*words, "--dropout", 0, "--temperature", 0.05, *flags) == 0
    content = helpers.load_checkpoint(tmp_path / "run" / "last.pt")
    trained = [name for name, (split, _) in images.items() if split == "train"]
    assert sorted(content["train_images"]["names"]) == trained
    return tmp_path / "run", content, trained


def batch_of(
    folder: Path, content: dict, images: dict, trained: list[str], each: int
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """The whole training split as one batch: pictures, tokens, each text's picture."""
    shown = [picture_input(folder / "images" / name, content["transform"]) for name in trained]
    texts, owner = [], []
    for number, name in enumerate(trained):
        captions = images[name][1]
        assert each % len(captions) == 0  # else it would matter which ones are drawn
        for turn in range(each):
            texts.append(tokens_of(captions[turn % len(captions)], content["vocabulary"])[0])
            owner.append(number)
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    return torch.cat(shown), padded, owner


def numpy_of(embeddings: torch.Tensor) -> np.ndarray:
    return embeddings.detach().double().numpy()


@pytest.mark.parametrize("each", [1, 2, 3])
def test_the_first_step(tmp_path, each):
    """Loss and every weight after a step, from the files: pairs, ids, scale, clipping, AdamW."""
    images = spec(14, each=each)
    lone = {names(3)[each - 1]} if each > 1 else set()  # its one caption stands for all
    images = {
        name: (split, captions[:1] if name in lone else captions)
        for name, (split, captions) in images.items()
    }
    flags = ("--captions-per-image", each, "--weight-decay", 2)
    run, content, trained = one_step(tmp_path, images, *flags)
    shown, texts, owner = batch_of(tmp_path / "data", content, images, trained, each)
    model = helpers.rebuilt(content).train()
    pictures, words = model.encode_image(shown), model.encode_text(texts)
    wanted = info_nce_loop(numpy_of(pictures)[owner], numpy_of(words), 1 / 0.05, owner)
    assert read_history(run)[0]["train_loss"] == pytest.approx(wanted, rel=1e-4)

    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    cosines = pictures[owner] @ words.T * model.logit_scale.exp()
    loss = torch.tensor(0.0)
    for scores in (cosines, cosines.T):
        for i in range(len(owner)):
            rivals = [j for j in range(len(owner)) if j == i or owner[j] != owner[i]]
            loss = loss + (scores[i, rivals].logsumexp(0) - scores[i, i]) / (2 * len(owner))
    loss.backward()
    learned = [weight for weight in model.parameters() if weight.grad is not None]
    torch.nn.utils.clip_grad_norm_(learned, 1.0)
    groups = [
        {"params": [w for w in learned if w.ndim > 1], "weight_decay": 2.0},
        {"params": [w for w in learned if w.ndim < 2], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=0.001, betas=(0.9, 0.98)).step()
    for name, weight in model.named_parameters():
        moved = content["model"][name] - before[name]
        off = (moved - (weight.detach() - before[name])).abs()
        assert off.mean() < 0.02 * 0.001, name
        assert bool(moved.any()) == (weight.grad is not None), name
    assert read_history(run)[0]["logit_scale"] == pytest.approx(
        content["model"]["logit_scale"].exp().item(), rel=1e-6
    )


def test_a_frozen_text_tower_has_no_dropout_in_training(tmp_path):
    """Captions pass through it anew in each epoch where they are rewritten (here: never)."""
    images = spec(14)
    flags = ("--train-text", 0, "--dropout", 0.5, "--text-augment", "swap=1e-12")
    run, content, trained = one_step(tmp_path, images, *flags, "--fixed-temperature")
    shown, texts, owner = batch_of(tmp_path / "data", content, images, trained, 1)
    model = helpers.rebuilt(content).train()
    model.text_tower.eval()
    made = [numpy_of(x) for x in (model.encode_image(shown), model.encode_text(texts))]
    wanted = info_nce_loop(*made, 1 / 0.05, owner)
    assert read_history(run)[0]["train_loss"] == pytest.approx(wanted, rel=1e-4)
    for name, value in model.text_tower.state_dict().items():
        assert torch.equal(content["model"][f"text_tower.{name}"], value)
    assert content["model"]["logit_scale"].item() == pytest.approx(math.log(1 / 0.05))


@pytest.mark.parametrize("augment", ["none", "light"])
def test_only_the_last_blocks_learn(tmp_path, augment):
    """--train-image 1 is ResNet18's last residual block: 2 convolutions of 512, 2 batch norms."""
    images = spec(14)
    flags = ("--train-image", 1, "--train-text", 0, "--image-augment", augment)
    _, content, _ = one_step(tmp_path, images, *flags)
    fresh = helpers.rebuilt(content)
    learned = 0
    for name, weight in fresh.named_parameters():
        moved = not torch.equal(weight, content["model"][name])
        if name.startswith(TOWER):
            learned += weight.numel() * moved
            assert moved or learned == 0, f"{name} stands above one that learns"
        else:
            assert moved == name.startswith(("image_projection", "text_projection", "logit_scale"))
    assert learned == 2 * 512 * 512 * 9 + 4 * 512
    statistics = [name for name, _ in fresh.named_buffers() if name.endswith("running_mean")]
    kept = [torch.equal(dict(fresh.named_buffers())[x], content["model"][x]) for x in statistics]
    assert sum(kept) == len(statistics) - 2 and not any(kept[-2:])


def test_an_epoch_shows_each_image_once_and_its_captions_in_turn(tmp_path, monkeypatch):
    images = spec(15, each=4)
    data, passed, encode = write_folder(tmp_path / "data", images), [], CLIP.encode_text

    def spying(model: CLIP, tokens: torch.Tensor) -> torch.Tensor:
        if model.training:
            passed.append(tokens.tolist())
        return encode(model, tokens)

    monkeypatch.setattr(CLIP, "encode_text", spying)
    words = ("--data", data, "--out", tmp_path / "run", "--cache", tmp_path / "cache", *QUICK)
    assert run_train(*words, "--epochs", 3, "--batch-size", 4, "--captions-per-image", 2) == 0
    vocabulary = helpers.load_checkpoint(tmp_path / "run" / "last.pt")["vocabulary"]
    assert len(passed) == 3 * 4 and {len(batch) for batch in passed} == {6, 8}
    owner = {
        tuple(tokens_of(text, vocabulary)[0].tolist()): name
        for name, (split, captions) in images.items()
        for text in captions
        if split == "train"
    }
    assert len(owner) == 60
    epochs = [[tuple(filter(None, row)) for b in passed[i : i + 4] for row in b] for i in (0, 4, 8)]
    for shown in epochs:
        assert sorted(owner[text] for text in shown) == sorted(names(15) * 2)
    assert sorted(epochs[0] + epochs[1]) == sorted(owner)
    assert sorted(epochs[0]) == sorted(epochs[2]) and epochs[0] != epochs[2]


def test_the_scale_is_held_at_a_hundred(tmp_path, monkeypatch):
    """As if every step drove it up: the weight itself goes back, not only the factor in use."""
    step, driven = torch.optim.AdamW.step, []

    def driving(optimizer: torch.optim.AdamW, *more: object, **named: object) -> object:
        made = step(optimizer, *more, **named)
        for weight in (w for group in optimizer.param_groups for w in group["params"]):
            if weight.ndim == 0:
                driven.append(weight.data.add_(3.0))
        return made

    monkeypatch.setattr(torch.optim.AdamW, "step", driving)
    data = write_folder(tmp_path / "data", spec(14))
    words = ("--data", data, "--out", tmp_path / "run", "--cache", tmp_path / "cache", *QUICK)
    assert run_train(*words, "--epochs", 1) == 0
    content = helpers.load_checkpoint(tmp_path / "run" / "last.pt")
    assert len(driven) == 1
    assert content["model"]["logit_scale"].item() == pytest.approx(math.log(100), abs=1e-5)
    assert read_history(tmp_path / "run")[0]["logit_scale"] == pytest.approx(100, rel=1e-4)


@pytest.mark.parametrize("most", [0.01, 0])
def test_the_gradient_is_clipped(tmp_path, monkeypatch, most):
    """Of all weights together, at every step; AdamW's first step is the same without."""
    step, norms = torch.optim.AdamW.step, []

    def noting(optimizer: torch.optim.AdamW, *more: object, **named: object) -> object:
        weights = [w for group in optimizer.param_groups for w in group["params"]]
        norms.append(torch.stack([w.grad.norm() for w in weights]).norm().item())
        return step(optimizer, *more, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    data = write_folder(tmp_path / "data", spec(14))
    words = ("--data", data, "--out", tmp_path / "run", "--cache", tmp_path / "cache", *QUICK)
    assert run_train(*words, "--epochs", 2, "--grad-clip", most) == 0
    assert len(norms) == 2 and min(norms) > 0.009
    assert all(norm == pytest.approx(0.01, rel=1e-3) for norm in norms) == bool(most)


# ------------------------------------------------------------ what a run keeps, and how long


@pytest.fixture(scope="module")
def noisy(tmp_path_factory) -> tuple[Path, Path, list[int]]:
    """A run whose dev figures go up and down: (data, its folder, epochs that wrote best.pt)."""
    place = tmp_path_factory.mktemp("noisy")
    data = write_folder(place / "data", spec(16, dev=24, each=3))
    words = ("--data", data, "--out", place / "run", "--cache", place / "cache", *QUICK)
    words += ("--epochs", 8, "--batch-size", 8, "--lr", 0.006, "--warmup", 1.5, "--dropout", 0.3)
    replace, written = os.replace, []

    def noting(source: object, target: object) -> None:
        replace(source, target)
        written.append(Path(target).name)

    os.replace = noting
    try:
        assert run_train(*words, "--seed", 1) == 0
    finally:
        os.replace = replace
    files = [name for name in written if name in ("last.pt", "best.pt")]
    assert files.count("last.pt") == 8
    # best.pt is written before last.pt: a run killed in between does the epoch again.
    wrote = [files[:place].count("last.pt") + 1 for place, f in enumerate(files) if f == "best.pt"]
    return data, place / "run", wrote


def record_epochs(history: list[dict[str, float]], key: str, sign: int = 1) -> list[int]:
    """The epochs that are better than all before by one key."""
    scores = [sign * row[key] for row in history]
    return [i + 1 for i, score in enumerate(scores) if score > max(scores[:i], default=-math.inf)]


def test_best_is_kept_by_the_mean_recall_alone(noisy):
    _, run, wrote = noisy
    history = read_history(run)
    assert wrote == record_epochs(history, "mean_recall")
    others = {key: record_epochs(history, key) for key in ("i2t_r1", "t2i_r1", "top1_i2t")}
    others["dev_loss"] = record_epochs(history, "dev_loss", -1)
    others["train_loss"] = record_epochs(history, "train_loss", -1)
    others["every epoch"] = list(range(1, 9))
    assert [key for key in others if others[key] == wrote] == [], "the data tells them apart"
    best = helpers.load_checkpoint(run / "best.pt")
    assert best["epoch"] == len(best["history"]) == wrote[-1]


def test_the_rate_follows_the_closed_form(noisy):
    check_rates(noisy[1])


@pytest.mark.parametrize(("schedule", "patience"), [("linear", 1), ("step", 2)])
def test_patience(tmp_path, schedule, patience):
    """At a rate of nothing dev stands still: the first of equals is best, then N more epochs."""
    data = write_folder(tmp_path / "data", spec(10, each=2))
    words = ("--data", data, "--out", tmp_path / "run", "--cache", tmp_path / "cache", *QUICK)
    words += ("--lr", 1e-12, "--batch-size", 5, "--warmup", 1, "--schedule", schedule)
    assert run_train(*words, "--epochs", 5, "--patience", patience) == 0
    history = read_history(tmp_path / "run")
    assert len({row["mean_recall"] for row in history}) == 1
    assert len(history) == 1 + patience
    assert helpers.load_checkpoint(tmp_path / "run" / "best.pt")["epoch"] == 1
    check_rates(tmp_path / "run")


def test_a_failing_write_leaves_the_old_file(tmp_path, noisy, monkeypatch):
    """Of every file of a run in turn; each is written beside the old one and takes its place."""
    data, replace = noisy[0], os.replace
    words = ("--data", data, "--out", tmp_path / "run", "--cache", tmp_path / "cache", *QUICK)
    assert run_train(*words, "--epochs", 1) == 0
    for name in ("history.csv", "last.pt", "curves.png"):
        run, tried = tmp_path / name.partition(".")[0], []
        shutil.copytree(tmp_path / "run", run)
        before = (run / name).read_bytes()

        def failing(source: object, target: object, run=run, name=name, tried=tried) -> None:
            if Path(target) == run / name:
                tried.append(Path(source).parent)
                raise OSError(28, "No space left on device")
            replace(source, target)

        monkeypatch.setattr(os, "replace", failing)
        again = ("--resume", run, "--epochs", 2, "--cache", tmp_path / "cache", "--workers", 0)
        with pytest.raises(helpers.UserError, match=f"{name}.*No space left"):
            run_train(*again)
        assert tried == [run], f"{name} is written in place"
        assert (run / name).read_bytes() == before
        assert not [path.name for path in run.iterdir() if path.name.startswith(".")]


# ---------------------------------------------------------- one file's figures from another's


@pytest.mark.parametrize("which", ["plain", "mirrored"])
def test_the_history_is_what_the_checkpoint_gives_on_dev(noisy, tmp_path, which):
    """Every figure of the last epoch, from last.pt, the pictures and the captions."""
    if which == "plain":
        data, run, _ = noisy
    else:
        images, run = spec(10, dev=7, each=3), tmp_path / "run"
        data = write_folder(tmp_path / "data", images, lambda n: photo(n).rotate(90, expand=True))
        words = ("--data", data, "--out", run, "--cache", tmp_path / "cache", *TINY)
        words += ("--image-augment", "light", "--test-mirror", "--image-size", 40)
        assert run_train(*words, "--epochs", 1, "--batch-size", 4) == 0
    history, content = read_history(run), helpers.load_checkpoint(run / "last.pt")
    images = {
        entry["filename"]: (entry["split"], [each["raw"] for each in entry["sentences"]])
        for entry in json.loads((data / "dataset.json").read_text())["images"]
    }
    dev = [name for name, (split, _) in images.items() if split == "val"]
    captions = [text for name in dev for text in images[name][1]]
    owner = np.repeat(np.arange(len(dev)), 3)
    model = helpers.trained_model(run / "last.pt")
    pictures = embed_pictures(model, content, [data / "images" / name for name in dev])
    texts = embed_captions(model, content, captions)
    row = history[-1]
    for key, value in split_figures(pictures, texts, owner).items():
        assert row[key] == pytest.approx(value), key
    scale = content["model"]["logit_scale"].exp().item()
    assert row["logit_scale"] == pytest.approx(scale, rel=1e-6)
    batches = math.ceil(len(dev) / content["config"]["batch_size"])
    loss = 0.0
    for part in np.array_split(np.arange(len(dev)), batches):
        loss += len(part) * info_nce_loop(pictures[part], texts[3 * part], scale) / len(dev)
    assert row["dev_loss"] == pytest.approx(loss, rel=1e-4)
    file = tmp_path / "dev.npz"
    words = (run / "last.pt", "--data", data, "--cache", tmp_path / "cache", "--workers", 0)
    helpers.evaluate.main([*map(str, words), "--split", "dev", "--save-embeddings", str(file)])
    with np.load(file) as arrays:
        assert np.abs(arrays["image_embeddings"] - pictures).max() < 1e-5
        assert np.abs(arrays["text_embeddings"] - texts).max() < 1e-5
    if which == "mirrored":
        whole = {**content, "transform": {**content["transform"], "mirror": False}}
        others = embed_pictures(model, whole, [data / "images" / name for name in dev])
        assert np.abs(others - pictures).max() > 1e-4


def test_train_recall_is_that_of_training_images(tmp_path):
    """As many as dev has, which here are all of them; dev's captions tell nothing apart."""
    images = {
        name: (split, captions if split == "train" else ["a dog", "the ground"])
        for name, (split, captions) in spec(3, dev=3, each=2).items()
    }
    data, run = write_folder(tmp_path / "data", images), tmp_path / "run"
    words = ("--data", data, "--out", run, "--cache", tmp_path / "cache", *QUICK, "--train-recall")
    assert run_train(*words, "--epochs", 4, "--warmup", 0) == 0
    content, row = helpers.load_checkpoint(run / "last.pt"), read_history(run)[-1]
    model, made = helpers.trained_model(run / "last.pt"), []
    for split, key in (("train", "train_top1"), ("val", "top1")):
        chosen = {name: texts for name, (which, texts) in images.items() if which == split}
        pictures = embed_pictures(model, content, [data / "images" / name for name in chosen])
        texts = [text for captions in chosen.values() for text in captions]
        texts = embed_captions(model, content, texts)
        figures = split_figures(pictures, texts, np.repeat(np.arange(3), 2))
        made.append([figures[f"top1_{way}"] for way in ("i2t", "t2i")])
        assert [row[f"{key}_{way}"] for way in ("i2t", "t2i")] == pytest.approx(made[-1])
    assert made[0] != made[1]


def test_the_files_of_a_run_say_the_same(noisy):
    _, run, _ = noisy
    content, best = (helpers.load_checkpoint(run / f"{name}.pt") for name in ("last", "best"))
    written = [{key: float(value) for key, value in row.items()} for row in content["history"]]
    assert written == read_history(run)
    assert best["history"] == content["history"][: best["epoch"]]
    assert [row["epoch"] for row in written] == list(range(1, 9))
    assert json.loads((run / "config.json").read_text()) == content["config"] == best["config"]
    assert content["epoch"] == 8
    figures = {f"{way}_{x}" for way in ("i2t", "t2i") for x in ("r1", "r5", "r10", "medr", "meanr")}
    figures |= {"rsum", "mean_recall", "top1_i2t", "top1_t2i"}
    clock = {"images_per_second", "seconds", "minutes"}
    assert set(written[0]) == figures | clock | {
        *("epoch", "train_loss", "lr", "dev_loss", "logit_scale")
    }
    assert [row["minutes"] for row in written] == sorted(row["minutes"] for row in written)


def test_a_checkpoint_names_the_images_that_it_was_trained_on(noisy):
    """By name and by content: what evaluation warns of."""
    data, run, _ = noisy
    known = helpers.load_checkpoint(run / "best.pt")["train_images"]
    assert sorted(known["names"]) == names(16)
    for name, digest in zip(known["names"], known["digests"], strict=True):
        content = (data / "images" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest().startswith(digest) and len(digest) >= 16
