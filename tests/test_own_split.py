"""A run's own split, wherever its data lies: moved, less by a picture, more by some, or others."""

import re
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
from conftest import caption, names, photo, run_train, start, write_photos

import evaluate
import search
from support.command import UserError
from support.embedding import load_trained
from support.own_split import load_run_data

COUNT = 60


def write_captions(data: Path, rows: list[tuple[str, str, str]]) -> None:
    lines = ["image,caption,split", *(f'{name},"{text}",{split}' for name, text, split in rows)]
    (data / "captions.csv").write_text("\n".join(lines) + "\n", "utf-8")


def rows_of(count: int) -> list[tuple[str, str, str]]:
    """Two captions an image, and a split of the data's own: the last are for dev and test."""
    splits = ["train"] * (count - 20) + ["val"] * 10 + ["test"] * 10
    plain = [caption(number, k).replace('"', "") for number in range(count) for k in (0, 3)]
    return [(names(count)[i // 2], text, splits[i // 2]) for i, text in enumerate(plain)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, and a run of --splits random on it."""
    place = tmp_path_factory.mktemp("own")
    write_photos(place / "data" / "images", COUNT)
    write_captions(place / "data", rows_of(COUNT))
    words = start(place / "data", place / "run", place / "cache", "--splits", "random")
    assert run_train(*words, "--epochs", 1, "--train-image", 0, "--image-augment", "none") == 0
    return place


@pytest.fixture
def load(place: Path, capsys):
    """load(data): ({split: names}, what was said) of a run's data that lies elsewhere now."""
    trained = load_trained([place / "run" / "best.pt"], "cpu")

    def call(data: Path | None, splits: str | None = None) -> tuple[dict[str, set[str]], str]:
        capsys.readouterr()
        options = Namespace(data=data, splits=splits, cache=place / "cache", workers=0)
        found = load_run_data(trained, options)
        parts = {"train": set(), "dev": set(), "test": set(), "": set()}
        for row, split in zip(found.caption_image, found.labels, strict=True):
            parts[split].add(found.names[row])
        return parts, capsys.readouterr().out

    return call


@pytest.fixture
def moved(place: Path, tmp_path: Path) -> Path:
    return shutil.copytree(place / "data", tmp_path / "moved")


def test_data_that_have_moved_have_the_runs_split(load, moved: Path):
    own, said = load(None)
    assert "random splits" in said and "run's" not in said
    parts, said = load(moved)
    assert parts == own and "the run's own splits" in said and "other data" not in said
    given, said = load(moved, "given")  # the data's own, as asked for
    assert given["test"] == set(names(COUNT)[-10:]) != own["test"] and "given splits" in said


def test_evaluation_of_moved_data_meets_no_training_image(place: Path, moved: Path, capsys):
    words = [place / "run" / "best.pt", "--data", moved, "--cache", place / "cache", "--workers", 0]
    evaluate.main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert "the run's own test split" in out and "trained on" not in err


def test_a_search_of_moved_data_has_the_runs_split(place: Path, moved: Path, load, capsys):
    tests = load(None)[0]["test"]
    words = [place / "run" / "best.pt", "--data", moved, "--cache", place / "cache", "--workers", 0]
    words += ["--split", "test", "--query", "a red dog", "--paths", "--top-k", len(tests)]
    search.main([str(word) for word in words])
    assert {Path(line).name for line in capsys.readouterr().out.splitlines()} == tests


def test_pictures_that_are_lost_or_new_move_none_of_the_others(load, moved: Path):
    own, _ = load(None)
    lost = {min(own["train"]), min(own["test"]), min(own["dev"])}
    for name in lost:
        (moved / "images" / name).unlink()
    parts, said = load(moved)
    assert {x: parts[x] for x in own} == {x: own[x] - lost for x in own}
    missing = f"2 of its {len(own['dev'] | own['test'])} dev and test images are missing"
    assert f"this is the run's data, but not as it was: {missing} (fingerprint " in said
    more = []
    for number in range(20):
        photo(500 + number).save(moved / "images" / f"new_{number}.png")
        more.append((f"new_{number}.png", "a new dog", ["train", "test"][number % 2]))
    write_captions(moved, [*rows_of(COUNT), *more])
    parts, _ = load(moved)
    assert parts["dev"] == own["dev"] - lost and parts["test"] == own["test"] - lost
    assert parts["train"] == own["train"] - lost | {f"new_{n}.png" for n in range(0, 20, 2)}
    assert parts[""] == {f"new_{n}.png" for n in range(1, 20, 2)}  # nobody was tested on them


def test_captions_in_another_order_are_said(load, moved: Path):
    write_captions(moved, rows_of(COUNT)[::-1])
    parts, said = load(moved)
    assert parts == load(None)[0]
    assert "not as it was: captions, names, training images or splits differ" in said


def test_other_data_under_the_same_names_are_said(place: Path, load, moved: Path, capsys):
    """Nothing of them was trained on."""
    for number, name in enumerate(names(COUNT)):
        photo(900 + number).save(moved / "images" / name)
    parts, said = load(moved)
    assert "this is other data than the run's (fingerprint " in said and "given splits" in said
    assert parts["test"] == set(names(COUNT)[-10:])
    words = [place / "run" / "best.pt", "--data", moved, "--split", "train", "--workers", 0]
    evaluate.main([str(word) for word in [*words, "--cache", place / "cache"]])
    assert "trained on" not in capsys.readouterr().err


def test_a_hint_at_the_data_stands_only_where_they_are_gone(place: Path, moved: Path):
    words = [str(place / "run" / "best.pt"), "--workers", "0"]
    (moved / "file").touch()
    with pytest.raises(UserError, match=r"give --cache DIR$"):
        evaluate.main([*words, "--cache", str(moved / "file")])


def test_texts_that_are_not_read_are_said(place: Path, moved: Path, capsys):
    rows = [(name, f"{text} quagga okapi tapir", split) for name, text, split in rows_of(COUNT)]
    write_captions(moved, rows)
    words = [place / "run" / "best.pt", "--data", moved, "--cache", place / "cache", "--workers", 0]
    evaluate.main([str(word) for word in words])
    said = re.search(r"(\d+)% of the words of the captions are unknown", capsys.readouterr().err)
    texts = [text.split() for _, text, _ in rows]
    assert int(said[1]) == pytest.approx(100 * 3 * len(texts) / sum(map(len, texts)), abs=3)
