"""What enters a run: whose captions give the vocabulary, which names are kept, whose cache."""

import csv
import json
import shutil
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from conftest import TINY, caption, photo, write_kaggle
from wiring import read_history, write_bert, write_folder

from dataset import load_dataset

QUICK = (*TINY, "--image-augment", "none", "--train-image", 0, "--epochs", 1)


def run_train(*words: object) -> int:
    return helpers.train.main([str(word) for word in words])


def load(folder: Path, cache: Path, **options: object):
    return load_dataset(str(folder), size=32, cache=cache, workers=0, **options)


# ----------------------------------------------------------------------- marker words


@pytest.mark.parametrize("layout", ["kaggle", "karpathy"])
def test_the_vocabulary_is_that_of_the_training_captions(tmp_path, layout):
    """Every caption of a split holds the split's own word, many times over --min-count."""
    if layout == "kaggle":
        folder = write_kaggle(tmp_path / "data", 24)
        data = load(folder, tmp_path / "cache")
        split_of = {data.names[i]: s for i, s in zip(data.caption_image, data.labels, strict=True)}
        assert set(split_of.values()) == {"train", "dev", "test"}
        with (folder / "captions.txt").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("image", "caption"))
            for number, (name, split) in enumerate(split_of.items()):
                for which in range(5):
                    rows.writerow((name, f"{caption(number, which)} marker{split}"))
    else:
        images = {
            f"{number}.png": (split, [f"{caption(number, x)} marker{split}" for x in range(3)])
            for number, split in enumerate(["train"] * 8 + ["val"] * 4 + ["test"] * 4)
        }
        folder = write_folder(tmp_path / "data", images)
    words = ("--data", folder, "--out", tmp_path / "run", "--cache", tmp_path / "cache", *QUICK)
    assert run_train(*words) == 0
    vocabulary = helpers.load_checkpoint(tmp_path / "run" / "last.pt")["vocabulary"]
    assert [word for word in vocabulary if word.startswith("marker")] == ["markertrain"]


def test_a_limited_run_knows_the_words_of_its_images_alone(tmp_path):
    images = {
        f"{number}.png": (split, [f"{caption(number, x)} own{number}" for x in range(3)])
        for number, split in enumerate(["train"] * 12 + ["val"] * 3 + ["test"] * 3)
    }
    folder = write_folder(tmp_path / "data", images)
    words = ("--data", folder, "--out", tmp_path / "run", "--cache", tmp_path / "cache", *QUICK)
    assert run_train(*words, "--limit", 5) == 0
    content = helpers.load_checkpoint(tmp_path / "run" / "last.pt")
    known = {word for word in content["vocabulary"] if word.startswith("own")}
    assert known == {f"own{Path(name).stem}" for name in content["train_images"]["names"]}
    assert len(known) == 5


# ---------------------------------------------------------------------------- odd names

ODD = (
    "a#1.jpg",
    "b#0#2.jpg",
    "c, d.jpg",
    "e f (1).jpg",
    "g.1.jpg",
    "h#.png",
    "í&j;.jpg",
    "k'l.jpg",
)


def write_captions(folder: Path, layout: str) -> None:
    texts = {name: [caption(n, 0), caption(n, 2)] for n, name in enumerate(ODD)}
    pairs = [(name, k, text) for name, two in texts.items() for k, text in enumerate(two)]
    if layout == "token":
        lines = [f"{name}#{k}\t{text}" for name, k, text in pairs]
        (folder / "Flickr8k.token.txt").write_text("\n".join(lines), "utf-8")
    elif layout == "bars":
        lines = ["image_name| comment_number| comment", *(f"{n}| {k}| {t}" for n, k, t in pairs)]
        (folder / "results.csv").write_text("\n".join(lines), "utf-8")
    elif layout == "csv":
        with (folder / "captions.txt").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("image", "caption"), *((n, t) for n, _, t in pairs)])
    elif layout == "course":
        for part, chosen in (("train", pairs[:8]), ("val", pairs[8:12]), ("test", pairs[12:])):
            lines = [f"{name}#{k}\t{text}" for name, k, text in chosen]
            (folder / f"{part}_captions.txt").write_text("\n".join(lines), "utf-8")
    elif layout == "karpathy":
        entries = [
            {"filename": name, "split": "train", "sentences": [{"raw": text} for text in two]}
            for name, two in texts.items()
        ]
        (folder / "dataset.json").write_text(json.dumps({"images": entries}), "utf-8")
    else:
        images = [{"id": i, "file_name": name} for i, name in enumerate(ODD)]
        notes = [{"image_id": ODD.index(name), "caption": text} for name, _, text in pairs]
        content = json.dumps({"images": images, "annotations": notes})
        (folder / "captions_all.json").write_text(content, "utf-8")


@pytest.mark.parametrize("layout", ["token", "bars", "csv", "course", "karpathy", "coco"])
def test_odd_names_keep_their_captions(tmp_path, layout):
    (tmp_path / "data" / "images").mkdir(parents=True)
    for number, name in enumerate(ODD):
        photo(number).save(tmp_path / "data" / "images" / name)
    write_captions(tmp_path / "data", layout)
    data = load(tmp_path / "data", tmp_path / "cache", splits="random")
    assert sorted(data.names) == sorted(ODD) and not data.skipped
    found = [
        (data.names[i], text) for i, text in zip(data.caption_image, data.captions, strict=True)
    ]
    wanted = [(name, caption(n, k)) for n, name in enumerate(ODD) for k in (0, 2)]
    assert sorted(found) == sorted(wanted)


# ------------------------------------------------------------------------------ the cache

# Runs one after the other on one cache; each changes what features are.
OF_IMAGES = {
    "plain": (),
    "larger pictures kept, to be cropped": ("--image-augment", "light"),
    "as large ones kept, and shown": ("--image-size", 36),
    "mirrored in testing": ("--test-mirror",),
    "mirrored in training": ("--image-augment", "mirror"),
}
OF_TEXTS = {
    "plain": (),
    "in bf16": ("--precision", "bf16"),
    "pooled in another way": ("--text-tower", "minilm"),
}


def outcome(run: Path) -> tuple[dict, dict]:
    """All that a run learned and measured, but for the clock."""
    row = read_history(run)[0]
    for clock in ("seconds", "minutes", "images_per_second"):
        del row[clock]
    return row, helpers.load_checkpoint(run / "last.pt")["model"]


@pytest.mark.parametrize("changes", [OF_IMAGES, OF_TEXTS], ids=["images", "texts"])
def test_a_shared_cache_gives_what_an_empty_one_gives(tmp_path, changes):
    images = {
        f"{number}.png": (split, [caption(number, x) for x in range(2)])
        for number, split in enumerate(["train"] * 10 + ["val"] * 6 + ["test"] * 2)
    }
    data, outcomes, run = write_folder(tmp_path / "data", images), set(), tmp_path / "run"
    words = ("--data", data, "--out", run, "--text-layers", 1, *QUICK)
    if changes is OF_TEXTS:
        weights = write_bert(tmp_path / "bert")
        words += ("--text-tower", "bert", "--text-weights", weights, "--max-tokens", 30)
    for name, flags in changes.items():
        made = []
        for cache in ("shared", "empty")[: 2 if flags else 1]:
            place = tmp_path / (cache if cache == "shared" else f"{cache} {name}")
            assert run_train(*words, "--cache", place, *flags) == 0
            made.append(outcome(run))
            shutil.rmtree(run)
        (row, weights), (other, others) = made[0], made[-1]
        assert row == other, name
        assert all(torch.equal(weights[key], others[key]) for key in others), name
        outcomes.add((row["train_loss"], row["dev_loss"]))
    assert len(outcomes) == len(changes), "each flag changes what is learned"


def test_changed_pictures_are_decoded_anew(tmp_path):
    """The same names, sizes and captions; the pictures change places."""
    images = {f"{n}.png": ("train", [caption(n, 0)]) for n in range(6)}
    data = write_folder(tmp_path / "data", images)
    before = load(data, tmp_path / "cache", splits="random")
    first, last = data / "images" / "0.png", data / "images" / "5.png"
    kept = first.read_bytes()
    first.write_bytes(last.read_bytes())
    last.write_bytes(kept)
    after = load(data, tmp_path / "cache", splits="random")
    assert np.array_equal(before.pixels[0], after.pixels[5])
    assert np.array_equal(before.pixels[5], after.pixels[0])
    assert before.fingerprint != after.fingerprint
