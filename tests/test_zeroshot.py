"""Classification by the classes' names alone: figures recomputed, folders that will not do."""

import json
import math
import shutil
import tracemalloc
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import COLOURS, photo

import evaluate
from sources.pictures import decode
from support import zeroshot
from support.command import UserError
from support.zeroshot import ZeroShot, class_folders, find_pictures, parted, read_templates


@pytest.fixture
def run(tmp_path, tiny_run):
    """Runs evaluate.main --zero-shot on the tiny run and returns the JSON that it wrote."""

    def call(folder: Path, *words: object) -> dict:
        file = tmp_path / "figures.json"
        fixed = [tiny_run / "best.pt", "--zero-shot", folder, "--json", file]
        rest = ["--cache", tmp_path / "cache", "--workers", 0, "--device", "cpu"]
        evaluate.main([str(word) for word in [*fixed, *words, *rest]])
        return json.loads(file.read_text("utf-8"))

    return call


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


def test_zero_shot(run, classes, capsys):
    (classes / "red" / "broken.jpg").write_bytes(b"no picture")
    (classes / "red" / ".hidden.png").write_bytes(b"no picture either")
    (classes / "red" / "notes.txt").write_text("nor this")
    (classes / "nothing").mkdir()
    (classes / ".thumbnails").mkdir()
    shutil.copyfile(classes / "red" / "0.png", classes / ".thumbnails" / "0.png")
    (classes / "blue").rename(classes / "Blue_zeppelin")
    found = run(classes)
    out, err = capsys.readouterr()
    assert "1 of 19 pictures cannot be read (broken.jpg: not a picture)" in err
    assert "left out: nothing\n" in err
    assert "class 'blue zeppelin': zeppelin never stood in the training captions" in err
    assert "files that are not read as pictures are left out: 1 .txt\n" in err
    assert err.count("warning:") == 4
    assert found["chance"] == pytest.approx(100 / 6) and found["pictures"] == 18
    assert list(found["per_class"]) == ["blue zeppelin", *sorted(set(COLOURS) - {"blue"})]
    mean = sum(found["per_class"].values()) / 6  # as many pictures each
    assert found["zero_shot_top1"] == pytest.approx(mean)
    assert found["zero_shot_top1"] <= found["zero_shot_top5"] <= 100
    assert "zero-shot on 18 pictures of 6 classes" in out and "chance 16.7% and 83.3%" in out


def test_accuracies_counted_by_hand():
    scores = np.array([[3, 2, 1.0], [1, 2, 3], [2, 2, 1], [0, np.nan, 1], [np.nan] * 3, [1, 2, 9]])
    found = ZeroShot(scores, np.array([0, 0, 0, 2, 1, 2]), ["a", "b", "c"]).metrics()
    # Won; last of three; a tie; behind a score that is not finite; none of its own; won.
    assert found["zero_shot_top1"] == pytest.approx(100 * 2 / 6)
    assert found["zero_shot_top5"] == pytest.approx(100 * 5 / 6)
    assert found["per_class"] == pytest.approx({"a": 100 / 3, "b": 0, "c": 50})
    assert zeroshot.TIE == evaluate.TIE


def test_the_confusion_matrix_against_a_count(tmp_path, monkeypatch):
    """Rows are true classes, columns predicted ones; a tie is lost here too."""
    scores = np.array([[3, 2, 1.0], [1, 2, 3], [2, 2, 1], [1, 2, 1], [np.nan] * 3, [1, 2, 9]])
    result = ZeroShot(scores, np.array([0, 0, 0, 0, 1, 2]), ["a", "b", "c"])
    figures = []

    def draw(path, width, height, title, footer):
        figures.append((title, footer))
        return original(path, width, height, title, footer)

    original = zeroshot.canvas
    monkeypatch.setattr(zeroshot, "canvas", draw)
    shown = []
    from matplotlib.axes import Axes

    imshow = Axes.imshow
    monkeypatch.setattr(
        Axes,
        "imshow",
        lambda axes, cells, **rest: shown.append(cells) or imshow(axes, cells, **rest),
    )
    zeroshot.draw_confusion(tmp_path / "confusion.png", result, "the footer")
    np.testing.assert_allclose(shown[0], [[25, 50, 25], [0, 0, 0], [0, 0, 100]])
    assert figures == [("Zero-shot: top-1 33.3% of 6 pictures (chance 33.3%)", "the footer")]
    assert (tmp_path / "confusion.png").stat().st_size > 1000


def test_a_class_whose_pictures_are_all_broken(run, classes, capsys):
    shutil.rmtree(classes / "red" / "more")
    for path in (classes / "red").iterdir():
        path.write_bytes(b"broken")
    found = run(classes)
    assert found["chance"] == 20 and "red" not in found["per_class"] and found["pictures"] == 15
    assert "left out: red" in capsys.readouterr().err


def test_folders_that_will_not_do(run, classes, tmp_path):
    def refused(folder: Path, message: str) -> None:
        with pytest.raises(UserError, match=message):
            run(folder)

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


SPLIT_FOLDERS = {
    "train/a train/b": "train",
    "seg_train/a seg_train/b": "seg_train",
    "train/a val/a": r"holds train, val: .*give one: \S+val",
    "training_set/a test_set/a": "holds test_set, training_set: ",
    "train/a train/b test": "holds test, train: ",
    "train/a train/b samples": r"holds train: .*give one: \S+train",
    "train test": "holds test, train: ",
    "train car": "",
    "train/a car/a": "",
    "train/@eaDir car": "",
}


@pytest.mark.parametrize("places", SPLIT_FOLDERS)
def test_splits_above_the_class_folders(tmp_path, places):
    for place in places.split():
        (tmp_path / place).mkdir(parents=True)
    holders, right = sorted(tmp_path.iterdir()), SPLIT_FOLDERS[places]
    if "holds" not in right:
        assert class_folders(tmp_path, holders) == tmp_path / right
    else:
        with pytest.raises(UserError, match=right):
            class_folders(tmp_path, holders)


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("HappyDog", "happy dog"), ("TVSet", "tv set"), ("000.Dog", "dog"), ("a-b_c", "a b c"),
        ("001.Black_footed_Albatross", "black footed albatross"), ("n02085620-Pug", "pug"),
        ("2_dogs", "2 dogs"), ("红色的狗", "红色的狗"), ("cafe\u0301", "café"),
    ],
)  # fmt: skip
def test_class_names_are_parted(name, right):
    assert parted(name, numbered=False) == right


def test_flags_that_do_not_go_together(tmp_path):
    with pytest.raises(UserError, match="--templates goes with --zero-shot"):
        evaluate.main(["--templates", str(tmp_path)])
    with pytest.raises(UserError, match="do not go with --zero-shot"):
        evaluate.main(["--save-embeddings", "a.npz", "--zero-shot", str(tmp_path)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a photo\n", "every line needs {}"),
        (b"a {}\na photo\n", "every line needs {}"),
        (b" \n\n", "every line needs {}"),
        (b"", "every line needs {}"),
        (b"\xff\xfe a {}", "cannot read the templates"),
        (None, "cannot read the templates"),
    ],
)
def test_templates_that_will_not_do(tmp_path, content, message):
    path = tmp_path / "templates.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_templates(path)
    with pytest.raises(UserError, match="cannot read the templates"):
        read_templates(tmp_path)


def test_prompts_say_an_before_a_vowel():
    asked = []

    def embed_texts(texts):
        asked.extend(texts)
        return np.ones((len(texts), 2), np.float32)

    trained = SimpleNamespace(embed_texts=embed_texts)
    vectors = zeroshot.class_embeddings(trained, ["apple", "dog"], ["a photo of a {}.", "{} at {}"])
    assert asked == ["a photo of an apple.", "apple at apple", "a photo of a dog.", "dog at dog"]
    np.testing.assert_allclose(vectors, np.full((2, 2), math.sqrt(0.5)))


def test_pictures_of_several_sizes(tmp_path):
    """Members of several picture sizes each get every picture at theirs, in one order."""
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    photo(0).save(paths[0])
    paths[1].write_bytes(b"broken")
    photo(2).save(paths[2])
    asked = {}

    def embed_pixels(pixels_at):
        asked.update({size: pixels_at(size) for size in (16, 24)})
        return np.zeros((2, 4), np.float32)

    members = [SimpleNamespace(transform={"stored_size": size}) for size in (24, 16, 24)]
    trained = SimpleNamespace(
        members=members, embed_pixels=embed_pixels, options=Namespace(poster_text=False)
    )
    _, kept = zeroshot.embed_pictures(trained, paths, 0)
    assert kept == [paths[0], paths[2]]
    for size, pixels in asked.items():
        assert (pixels == np.stack([decode(path, size) for path in kept])).all()


def test_a_folder_is_never_held_decoded(tmp_path):
    """2,000 pictures of 49 KB each, 100 at a time: the block before may still be there."""
    photo(0).save(tmp_path / "0.png")
    member = SimpleNamespace(transform={"stored_size": 128})
    trained = SimpleNamespace(
        members=[member],
        embed_pixels=lambda pixels_at: np.zeros((len(pixels_at(128)), 4), np.float32),
        options=Namespace(poster_text=False),
    )
    tracemalloc.start()
    embeddings, kept = zeroshot.embed_pictures(trained, [tmp_path / "0.png"] * 2000, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(embeddings) == len(kept) == 2000 and peak < 500 * 128 * 128 * 3


def test_hidden_pictures_are_left_aside(tmp_path):
    folder = tmp_path / ".within" / "cats"  # only what is hidden below the folder itself counts
    for name in ("b.PNG", "a.jpg", "in/c.webp", ".d.png", ".in/e.png", "f.txt", "g.png/h.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    found = [path.relative_to(folder).as_posix() for path in find_pictures(folder)]
    assert found == ["a.jpg", "b.PNG", "g.png/h.png", "in/c.webp"]
