"""Evaluation as a user runs it: figures recomputed, zero-shot, what is refused."""

import hashlib
import json
import math
import os
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import zeroshot
from cli import UserError
from conftest import COLOURS, pairs, photo, script, write_kaggle
from test_cli import listed
from test_loss import loop as loop_loss
from test_metrics import loop_ranks
from zeroshot import ZeroShot, find_pictures, read_templates

import evaluate
from dataset import Split
from evaluate import Embedded, contrastive_loss

WAYS, KS = ("i2t", "t2i"), (1, 5, 10)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(cache):
    def call(*words: object) -> None:
        evaluate.main(
            [*map(str, words), "--cache", str(cache), "--workers", "0", "--device", "cpu"]
        )

    return call


def read(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


# -------------------------------------------------------------------------------- one split


@pytest.mark.parametrize(("split", "images"), [("test", 5), ("dev", 5), ("train", 30)])
def test_figures_are_those_of_the_embeddings(run, tiny_run, tmp_path, capsys, split, images):
    checkpoint = tiny_run / "best.pt"
    before = hashlib.sha256(checkpoint.read_bytes()).hexdigest(), checkpoint.stat().st_mtime_ns
    paths = tmp_path / "figures.json", tmp_path / "embeddings.npz"
    run(checkpoint, "--split", split, "--json", paths[0], "--save-embeddings", paths[1])
    out, err = capsys.readouterr()
    assert (
        hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        checkpoint.stat().st_mtime_ns,
    ) == before
    seen = images if split == "train" else 0
    trained = f"warning: {seen} of the {images} images evaluated were trained on\n"
    assert err == (trained if seen else "")

    with np.load(paths[1], allow_pickle=False) as file:
        saved = {key: file[key] for key in file.files}
    assert saved.keys() == {
        "image_embeddings", "text_embeddings", "image_names", "captions", "caption_image"
    }  # fmt: skip
    owner = saved["caption_image"]
    assert saved["image_embeddings"].shape == (images, 32) and len(owner) == 5 * images
    for key in ("image_embeddings", "text_embeddings"):
        assert saved[key].dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(saved[key], axis=1), 1, atol=1e-5)
    written = zip(saved["image_names"][owner].tolist(), saved["captions"].tolist(), strict=True)
    chosen = set(saved["image_names"].tolist())
    assert sorted(written) == sorted(pair for pair in pairs(40) if pair[0] in chosen)

    found = read(paths[0])
    ranks = loop_ranks(saved["image_embeddings"], saved["text_embeddings"], owner)
    wanted = {}
    for way, rank in zip(WAYS, ranks, strict=True):
        wanted |= {f"{way}_r{k}": 100 * sum(r <= k for r in rank) / len(rank) for k in KS}
        ordered = sorted(rank)
        wanted[f"{way}_medr"] = (ordered[(len(rank) - 1) // 2] + ordered[len(rank) // 2]) / 2
        wanted[f"{way}_meanr"] = sum(rank) / len(rank)
    wanted["rsum"] = sum(wanted[f"{way}_r{k}"] for way in WAYS for k in KS)
    wanted["mean_recall"] = wanted["rsum"] / 6
    first = [owner.tolist().index(i) for i in range(images)]
    square = saved["image_embeddings"].astype(float) @ saved["text_embeddings"][first].T.astype(
        float
    )
    for key, table in (("top1_i2t", square), ("top1_t2i", square.T)):
        best = [
            all(row[i] > row[j] for j in range(images) if j != i) for i, row in enumerate(table)
        ]
        wanted[key] = 100 * sum(best) / images
    assert {key: found[key] for key in wanted} == pytest.approx(wanted)
    assert found.keys() == wanted.keys() | {"intervals", "protocol"}

    intervals = found["intervals"]
    assert intervals.keys() == {
        k for k in wanted if not k.endswith(("medr", "meanr", "i2t", "t2i"))
    }
    assert all(low <= wanted[key] <= high for key, (low, high) in intervals.items())
    protocol = found["protocol"]
    assert protocol["images"] == images and protocol["captions"] == 5 * images
    assert protocol["split"] == split and protocol["splits"] == "random"
    assert protocol["captions_per_image"] == [5, 5] and protocol["ties"] == "lost"
    assert protocol["trained_on"] == seen and protocol["checkpoint"] == str(checkpoint)

    lines = out.splitlines()
    for way in WAYS:
        row = next(line for line in lines if line.startswith(way))
        for key in ("r1", "r5", "r10", "medr", "meanr"):
            assert f"{wanted[f'{way}_{key}']:.1f}" in row
    assert (
        f"mean recall {wanted['mean_recall']:5.1f}" in out and "R@10" in out and "protocol:" in out
    )


def test_evaluation_gives_the_same_figures_again(run, tiny_run, tmp_path):
    for name in ("one", "two"):
        run(tiny_run / "best.pt", "--json", tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_the_best_epoch_is_the_one_on_dev(run, tiny_run, tmp_path):
    """best.pt gives on dev what history.csv says of its epoch."""
    run(tiny_run / "best.pt", "--split", "dev", "--json", tmp_path / "a.json")
    rows = [line.split(",") for line in (tiny_run / "history.csv").read_text().splitlines()]
    column = rows[0].index("mean_recall")
    best = max(float(row[column]) for row in rows[1:])
    assert read(tmp_path / "a.json")["mean_recall"] == pytest.approx(best)


def test_default_is_the_newest_best_checkpoint(run, tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no checkpoints"):
        run()
    for name, age in (("a", 200), ("b", 100), ("c", 300)):
        place = Path("checkpoints") / name / "best.pt"
        place.parent.mkdir(parents=True)
        shutil.copyfile(tiny_run / "best.pt", place)
        os.utime(place, (place.stat().st_mtime - age,) * 2)
    shutil.copyfile(tiny_run / "last.pt", "checkpoints/c/last.pt")  # newer, but not the best
    run()
    assert "checkpoint checkpoints/b/best.pt, epoch" in capsys.readouterr().out


def test_data_elsewhere(run, tiny_run, tmp_path, capsys):
    """The same pictures under other names are known by their content; new ones are not known."""
    data = write_kaggle(tmp_path / "there", 40)
    for path in sorted((data / "images").iterdir()):
        path.rename(path.with_name(f"x{path.name}"))
    captions = data / "captions.txt"
    captions.write_text(captions.read_text().replace("photo_", "xphoto_"))
    run(tiny_run / "best.pt", "--data", data, "--split", "train", "--json", tmp_path / "a.json")
    out, err = capsys.readouterr()
    assert "30 of the 30 images evaluated were trained on" in err and str(data) in out
    protocol = read(tmp_path / "a.json")["protocol"]
    assert protocol["data"] == str(data) and protocol["trained_on"] == 30
    for path in sorted((data / "images").iterdir()):
        photo(1000 + int(path.stem[-3:])).save(path)
    run(tiny_run / "best.pt", "--data", data, "--split", "train")
    assert "trained on" not in capsys.readouterr().err


def test_data_that_is_gone(run, tiny_run, tmp_path, monkeypatch):
    with pytest.raises(UserError) as told:
        run(tiny_run / "best.pt", "--data", tmp_path / "nowhere")
    assert "--data PATH names another place" not in str(told.value)
    content = evaluate.load_checkpoint(tiny_run / "best.pt")
    content["config"]["data"] = str(tmp_path / "gone")
    monkeypatch.setattr(evaluate, "load_checkpoint", lambda _path: content)
    with pytest.raises(UserError, match="--data PATH names another place"):
        run(tiny_run / "best.pt")


def test_files_that_cannot_be_written(run, tiny_run, tmp_path):
    (tmp_path / "file").touch()
    for flag in ("--json", "--save-embeddings"):
        with pytest.raises(UserError, match="cannot write"):
            run(tiny_run / "best.pt", flag, tmp_path / "file" / "a.npz")
    assert listed(tmp_path) == ["file"]


def test_a_wrong_checkpoint_is_one_line(tmp_path):
    (tmp_path / "best.pt").write_text("nothing")
    done = script("evaluate.py", tmp_path / "best.pt")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("evaluate.py: error: ") and done.stderr.count("\n") == 1


def test_flags_that_do_not_go_together(run, tmp_path):
    with pytest.raises(UserError, match="--templates goes with --zero-shot"):
        run("--templates", tmp_path)
    with pytest.raises(UserError, match="do not go with --zero-shot"):
        run("--save-embeddings", tmp_path / "a.npz", "--zero-shot", tmp_path)


def test_evaluating_leaves_the_models_mode(tiny_run, photo_data, cache):
    trained = evaluate.load_trained(tiny_run / "best.pt", "cpu")
    given = Namespace(data=None, splits=None, split="dev", cache=cache, workers=0)
    dataset, split = evaluate.load_data_for(trained, given)
    assert not trained.model.training
    for mode in (True, False):
        trained.model.train(mode)
        before = trained.model.image_tower.bn1.running_mean.clone()
        evaluate.evaluate_split(trained.model, dataset, split)
        assert trained.model.training is mode
        assert (trained.model.image_tower.bn1.running_mean == before).all()


def test_order_and_company_do_not_change_a_text(tiny_run):
    trained = evaluate.load_trained(tiny_run / "best.pt", "cpu")
    texts = [caption for _, caption in pairs(40)] + ["a", "red " * 60]
    assert len({len(text) for text in texts}) > 10
    together = evaluate.embed_texts(trained.model, texts * 2)
    np.testing.assert_allclose(together[: len(texts)], together[len(texts) :], atol=1e-5)
    for row in (0, 7, 150, 200, 201):
        alone = evaluate.embed_texts(trained.model, [texts[row]])
        np.testing.assert_allclose(together[row], alone[0], atol=1e-5)


@pytest.mark.parametrize(("batch", "sizes"), [(100, [9]), (9, [9]), (4, [3, 3, 3]), (5, [5, 4])])
def test_contrastive_loss_against_a_loop(batch, sizes):
    generator = np.random.default_rng(0)
    owner = np.array([0, 3, 1, 1, 2, 4, 5, 6, 3, 7, 8, 0])
    first = [0, 2, 4, 1, 5, 6, 7, 9, 10]
    images, texts = generator.normal(size=(9, 6)), generator.normal(size=(12, 6))
    images, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts))
    split = Split("dev", np.arange(9), ["x"] * 12, owner)
    embedded = Embedded(split, images, texts, np.ones(9), np.ones(12), {})
    wanted, start = 0.0, 0
    for size in sizes:
        part = slice(start, start + size)
        own = texts[first][part]
        wanted += size / 9 * loop_loss(images[part], own, 7.0, list(range(size)))
        start += size
    assert contrastive_loss(embedded, 7.0, batch) == pytest.approx(wanted)


# -------------------------------------------------------------------------------- zero-shot


@pytest.fixture
def classes(tmp_path) -> Path:
    """Folders named for the ground's colour, which captions of the tiny run name too."""
    folder = tmp_path / "classes"
    for number, colour in enumerate(COLOURS):
        (folder / colour / "more").mkdir(parents=True)
        for row in range(3):
            inner = "more/" if row == 2 else ""
            photo(number + 6 * row).save(folder / colour / f"{inner}{row}.png")
    return folder


def test_zero_shot(run, tiny_run, classes, tmp_path, capsys):
    (classes / "red" / "broken.jpg").write_bytes(b"no picture")
    (classes / "red" / ".hidden.png").write_bytes(b"no picture either")
    (classes / "red" / "notes.txt").write_text("nor this")
    (classes / "nothing").mkdir()
    (classes / ".thumbnails").mkdir()
    shutil.copyfile(classes / "red" / "0.png", classes / ".thumbnails" / "0.png")
    (classes / "blue").rename(classes / "Blue_zeppelin")
    run(tiny_run / "best.pt", "--zero-shot", classes, "--json", tmp_path / "a.json")
    out, err = capsys.readouterr()
    assert "1 of 19 pictures cannot be read (broken.jpg: not a picture)" in err
    assert "left out: nothing\n" in err
    assert "class 'blue zeppelin': zeppelin never stood in the training captions" in err
    assert err.count("warning:") == 3
    found = read(tmp_path / "a.json")
    assert found["chance"] == pytest.approx(100 / 6) and found["pictures"] == 18
    assert found["per_class"].keys() == {"blue zeppelin", *(set(COLOURS) - {"blue"})}
    mean = sum(found["per_class"].values()) / 6  # as many pictures each
    assert found["zero_shot_top1"] == pytest.approx(mean)
    assert found["zero_shot_top1"] <= found["zero_shot_top5"] <= 100
    assert "zero-shot on 18 pictures of 6 classes" in out and "chance 16.7% and 83.3%" in out


def test_zero_shot_figures_against_a_loop(run, tiny_run, classes, tmp_path):
    templates = tmp_path / "templates.txt"
    templates.write_text("\ufeffa {} ground\n\n a dog above {} ground.\n", "utf-8")
    run(
        *(tiny_run / "best.pt", "--zero-shot", classes),
        *("--templates", templates, "--json", tmp_path / "a.json"),
    )
    trained = evaluate.load_trained(tiny_run / "best.pt", "cpu")
    names, prompts = sorted(COLOURS), ("a {} ground", "a dog above {} ground.")
    vectors = []
    for name in names:
        made = [evaluate.embed_texts(trained.model, [p.format(name)])[0] for p in prompts]
        mean = np.mean(np.array(made, np.float64), axis=0)
        vectors.append(mean / math.sqrt(mean @ mean))
    hits = {1: 0, 5: 0}
    for truth, name in enumerate(names):
        for path in find_pictures(classes / name):
            image, kept = zeroshot.embed_pictures(trained.model, [path], 0)
            assert kept == [path]
            scores = [float(image[0].astype(np.float64) @ vector) for vector in vectors]
            rank = 1 + sum(s >= scores[truth] for i, s in enumerate(scores) if i != truth)
            for k in hits:
                hits[k] += rank <= k
    found = read(tmp_path / "a.json")
    assert found["zero_shot_top1"] == pytest.approx(100 * hits[1] / 18)
    assert found["zero_shot_top5"] == pytest.approx(100 * hits[5] / 18)


def test_zero_shot_accuracies_counted_by_hand():
    scores = np.array([[3, 2, 1.0], [1, 2, 3], [2, 2, 1], [0, np.nan, 1], [np.nan] * 3, [1, 2, 9]])
    found = ZeroShot(scores, np.array([0, 0, 0, 2, 1, 2]), ["a", "b", "c"]).metrics()
    # Won; last of three; a tie; behind a score that is not finite; none of its own; won.
    assert found["zero_shot_top1"] == pytest.approx(100 * 2 / 6)
    assert found["zero_shot_top5"] == pytest.approx(100 * 5 / 6)
    assert found["per_class"] == pytest.approx({"a": 100 / 3, "b": 0, "c": 50})


def test_a_class_whose_pictures_are_all_broken(run, tiny_run, classes, tmp_path, capsys):
    shutil.rmtree(classes / "red" / "more")
    for path in (classes / "red").iterdir():
        path.write_bytes(b"broken")
    run(tiny_run / "best.pt", "--zero-shot", classes, "--json", tmp_path / "a.json")
    found = read(tmp_path / "a.json")
    assert found["chance"] == 20 and "red" not in found["per_class"] and found["pictures"] == 15
    assert "left out: red" in capsys.readouterr().err


def test_zero_shot_folders_that_will_not_do(run, tiny_run, classes, tmp_path):
    def refused(folder: Path, told: str) -> None:
        with pytest.raises(UserError, match=told):
            run(tiny_run / "best.pt", "--zero-shot", folder)

    refused(tmp_path / "missing", "is not a folder")
    refused(classes / "red" / "0.png", "is not a folder")
    (tmp_path / "empty" / "dog").mkdir(parents=True)
    refused(tmp_path / "empty", "holds no picture")
    refused(classes / "red", "two class folders")
    (tmp_path / "bad" / "a").mkdir(parents=True)
    (tmp_path / "bad" / "b").mkdir()
    for place in "ab":
        (tmp_path / "bad" / place / "x.png").write_bytes(b"broken")
    refused(tmp_path / "bad", "not one of the pictures can be read")
    shutil.copyfile(classes / "red" / "0.png", tmp_path / "bad" / "a" / "y.png")
    refused(tmp_path / "bad", "two class folders")
    shutil.copytree(classes / "red", classes / "RED_")
    refused(classes, "two class folders for red")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a photo\n", "every line needs {}"),
        (b"a {}\na photo\n", "every line needs {}"),
        (b" \n\n", "every line needs {}"),
        (b"", "every line needs {}"),
        (b"\xff\xfe a {}", "cannot read the templates"),
        (None, "cannot read the templates"),
    ],
)
def test_templates_that_will_not_do(tmp_path, content, told):
    path = tmp_path / "templates.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=told):
        read_templates(path)
    with pytest.raises(UserError, match="cannot read the templates"):
        read_templates(tmp_path)


def test_prompts_say_an_before_a_vowel(monkeypatch):
    asked = []

    def embed(_model, texts):
        asked.extend(texts)
        return np.ones((len(texts), 2), np.float32)

    monkeypatch.setattr(zeroshot, "embed_texts", embed)
    made = zeroshot.class_embeddings(None, ["apple", "dog"], ["a photo of a {}.", "{} at {}"])
    assert asked == ["a photo of an apple.", "apple at apple", "a photo of a dog.", "dog at dog"]
    np.testing.assert_allclose(made, np.full((2, 2), math.sqrt(0.5)))


def test_hidden_pictures_are_left_aside(tmp_path):
    folder = tmp_path / ".within" / "cats"  # only what is hidden below the folder itself counts
    for name in ("b.PNG", "a.jpg", "in/c.webp", ".d.png", ".in/e.png", "f.txt", "g.png/h.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    found = [path.relative_to(folder).as_posix() for path in find_pictures(folder)]
    assert found == ["a.jpg", "b.PNG", "g.png/h.png", "in/c.webp"]
