"""Every layout of captions and pictures, the splits by image, what is skipped and said."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, names, pairs, photo, script, write_kaggle, write_photos

import dataset
from dataset import CaptionedImages, load_dataset
from sources.reading import Row
from sources.splits import choose_splits
from support.command import UserError

N = 6
SOURCE = ("cloud.tsinghua.edu.cn", "--download", "--data shapes")  # how to get the data


@pytest.fixture
def load(tmp_path):
    def loader(folder: Path, splits: str = "auto") -> CaptionedImages:
        return load_dataset(str(folder), splits, 8, tmp_path / "cache", 0)

    return loader


def captions_of(data: CaptionedImages) -> dict[str, list[str]]:
    table = defaultdict(list)
    for text, image in zip(data.captions, data.caption_image, strict=True):
        table[data.names[image]].append(text)
    return dict(table)


def table_of(rows) -> dict[str, list[str]]:
    table = defaultdict(list)
    for name, text in rows:
        table[name].append(text)
    return dict(table)


def labels_of(data: CaptionedImages) -> dict[str, set[str]]:
    table = defaultdict(set)
    for label, image in zip(data.labels, data.caption_image, strict=True):
        table[data.names[image]].add(str(label))
    return dict(table)


def write_csv(path: Path, rows, header: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        if header is not None:
            file.write(header + "\n")
        csv.writer(file, lineterminator="\n").writerows(rows)


def write_token(path: Path, count: int = N, change=str) -> None:
    lines = [f"{name}#{row % 5}\t{change(text)}\n" for row, (name, text) in enumerate(pairs(count))]
    path.write_text("".join(lines), "utf-8")


def write_karpathy(path: Path, splits: list[str | None]) -> None:
    images = []
    for name, split in zip(names(len(splits)), splits, strict=True):
        raws = [
            {"raw": text, "tokens": ["no"]} for image, text in pairs(len(splits)) if image == name
        ]
        part = {} if split is None else {"split": split}
        images.append({"filename": name, "filepath": "x", "sentences": raws, **part})
    path.write_text(json.dumps({"images": images, "dataset": "flickr8k"}), "utf-8")


def write_coco(folder: Path, parts: dict[str, list[str]], count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table = table_of(pairs(count))
    for part, images in parts.items():
        noted = [
            {"image_id": 7 * k, "id": 100 * k + j, "caption": text + "\n"}
            for k, name in enumerate(images)
            for j, text in enumerate(table[name])
        ]
        content = {
            "info": {},
            "images": [{"id": 7 * k, "file_name": name} for k, name in enumerate(images)],
            "annotations": noted,
        }
        (folder / f"captions_{part}.json").write_text(json.dumps(content), "utf-8")


# -------------------------------------------------------------------------------- layouts

IDS = [(name, text, row) for row, (name, text) in enumerate(pairs(N))]
LAYOUTS = {
    "header": lambda d: write_csv(d / "captions.txt", pairs(N), "image,caption"),
    "odd header": lambda d: write_csv(d / "captions.txt", pairs(N), " Image , Caption "),
    "blank header": lambda d: write_csv(d / "captions.txt", pairs(N), ""),
    "blank cells": lambda d: write_csv(d / "captions.txt", pairs(N), ",,"),
    "no header": lambda d: write_csv(d / "captions.txt", pairs(N)),
    "id column": lambda d: write_csv(d / "captions.txt", IDS, "image,caption,id"),
    "id column, no header": lambda d: write_csv(d / "captions.txt", IDS),
    "unknown header": lambda d: write_csv(d / "captions.txt", IDS, "file,text,number"),
    "index column": lambda d: write_csv(
        d / "captions.csv", [(k, a, b) for a, b, k in IDS], ",image,caption"
    ),
    "caption first": lambda d: write_csv(
        d / "captions.csv", [(b, a) for a, b, _ in IDS], "caption,image"
    ),
    "flickr30k csv": lambda d: write_csv(
        d / "captions.txt", [(a, k % 5, b) for a, b, k in IDS], "image_name,comment_number,comment"
    ),
    "captions.csv": lambda d: write_csv(d / "captions.csv", pairs(N), "image,caption"),
    "token": lambda d: write_token(d / "Flickr8k.token.txt"),
    "results": lambda d: (d / "results.csv").write_text(
        "image_name| comment_number| comment\n"
        + "".join(f"{a}| {k % 5}| {b}\n" for a, b, k in IDS),
        "utf-8",
    ),
    "karpathy": lambda d: write_karpathy(
        d / "dataset_flickr8k.json", ["train", "train", "restval", "val", "test", "test"]
    ),
    "coco": lambda d: write_coco(d, {"train2017": names(N)[:4], "val2017": names(N)[4:]}, N),
    "one coco": lambda d: write_coco(d, {"val2017": names(N)}, N),
}
DESCRIBED = {
    "token": "Flickr token (Flickr8k.token.txt)",
    "results": "Flickr30k results (results.csv)",
    "karpathy": "Karpathy json (dataset_flickr8k.json)",
    "coco": "COCO json (captions_train2017.json)",
    "one coco": "COCO json (captions_val2017.json)",
    "captions.csv": "Kaggle captions (captions.csv)",
    "header": "Kaggle captions (captions.txt)",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_recognised_and_read(tmp_path, load, layout):
    folder = tmp_path / "data"
    write_photos(folder / "images", N)
    LAYOUTS[layout](folder)
    data = load(folder)
    assert captions_of(data) == table_of(pairs(N))
    assert data.skipped == {} and not data.by_caption
    assert data.layout == DESCRIBED.get(layout, data.layout) and data.layout in data.summary()


@pytest.mark.parametrize("layout", ["header", "token", "results", "karpathy", "coco"])
def test_captions_one_folder_deep(tmp_path, load, layout):
    inner = tmp_path / "data" / ("annotations" if layout == "coco" else "Flickr8k_text")
    write_photos(tmp_path / "data" / "Images", N)
    inner.mkdir()
    LAYOUTS[layout](inner)
    assert captions_of(load(tmp_path / "data")) == table_of(pairs(N))


PLACES = [
    *("images", "Images", "Flicker8k_Dataset", "flickr30k_images", "train2017", "val2017"),
    *("Flickr8k_Dataset/Flicker8k_Dataset", "anything", ""),
]


@pytest.mark.parametrize("place", PLACES)
def test_images_are_found(tmp_path, load, place):
    folder = tmp_path / "data"
    write_photos(folder / place, N)
    write_csv(folder / "captions.txt", pairs(N), "image,caption")
    data = load(folder)
    assert captions_of(data) == table_of(pairs(N)) and data.skipped == {}
    assert data.paths == [folder / place / name for name in names(N)]


def test_images_in_two_coco_folders(tmp_path, load):
    folder = tmp_path / "data"
    for name in write_photos(folder / "train2017", N)[4:]:
        (folder / "val2017").mkdir(exist_ok=True)
        (folder / "train2017" / name).rename(folder / "val2017" / name)
    LAYOUTS["coco"](folder)
    data = load(folder, "given")
    assert captions_of(data) == table_of(pairs(N))


def test_images_behind_symlinks(tmp_path, load):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "data"
    write_photos(elsewhere, N)
    write_csv(folder / "captions.txt", pairs(N), "image,caption")
    (folder / "images").symlink_to(elsewhere)
    assert captions_of(load(folder)) == table_of(pairs(N))
    (folder / "images").unlink()
    (folder / "images").mkdir()
    for name in names(N):
        (folder / "images" / name).symlink_to(elsewhere / name)
    assert captions_of(load(folder)) == table_of(pairs(N))
    (tmp_path / "link").symlink_to(folder)
    assert captions_of(load(tmp_path / "link")) == table_of(pairs(N))


def test_what_is_no_picture_file_is_not_taken_for_one(tmp_path, load):
    folder = write_kaggle(tmp_path / "data", N)
    (folder / "images" / names(N)[0]).unlink()
    (folder / "images" / names(N)[0]).symlink_to(tmp_path / "gone.jpg")
    (folder / "images" / names(N)[1]).unlink()
    (folder / "images" / names(N)[1]).mkdir()
    for name in ("._photo_003.jpg", "Thumbs.db"):
        (folder / "images" / name).write_bytes(b"x")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "captions.txt").write_text("x")
    data = load(folder)
    assert set(captions_of(data)) == set(names(N)[2:])
    assert data.skipped == {"captions without an image": [n for n in names(2) for _ in range(5)]}


def test_token_file_and_its_quirk(tmp_path, load):
    """One real name has `.1` after its extension; the lemma file beside it is not read."""
    folder, odd = tmp_path / "data", "2258277193_586949ec62.jpg"
    write_photos(folder / "images", N)
    photo(9).save(folder / "images" / odd)
    write_token(folder / "Flickr8k.token.txt")
    write_token(folder / "Flickr8k.lemma.token.txt", change=lambda text: "lemma of " + text)
    with (folder / "Flickr8k.token.txt").open("a") as file:
        file.write(f"{odd}.1#0\tpeople sit on benches\n{odd}.1#1\tPeople waiting , #2 .\n")
    expected = {**table_of(pairs(N)), odd: ["people sit on benches", "People waiting , #2 ."]}
    assert captions_of(load(folder)) == expected
    (folder / "Flickr8k.token.txt").unlink()  # then it is the only captions file
    assert all(text.startswith("lemma of") for text in load(folder).captions)


def test_results_row_without_its_second_bar(tmp_path, load):
    folder = tmp_path / "data"
    write_photos(folder / "flickr30k_images", 3)
    a, b, c = names(3)
    lines = [
        "image_name| comment_number| comment",
        f"{a}| 0| Two men | one bench .",
        f"{a}| 4 A dog",
    ]
    lines += [f"{b}| 0| 2 dogs .", f"{c}| 1|no blank"]
    (folder / "results.csv").write_text("\n".join(lines))
    expected = {a: ["Two men | one bench .", "A dog"], b: ["2 dogs ."], c: ["no blank"]}
    assert captions_of(load(folder)) == expected


@pytest.mark.parametrize("header", ["image,caption\n", "", "\n", ",image,caption\n"])
def test_bare_commas_are_joined_again(tmp_path, load, header):
    folder = tmp_path / "data"
    write_photos(folder / "images", 3)
    texts = ["A dog, a cat,and a bird", "plain", '"Quoted, with commas"']
    first = "0," if header.startswith(",") else ""
    lines = [f"{first}{name},{text}\n" for name, text in zip(names(3), texts, strict=True)]
    (folder / "captions.txt").write_text(header + "".join(lines))
    expected = [*texts[:2], "Quoted, with commas"]
    assert captions_of(load(folder)) == {n: [t] for n, t in zip(names(3), expected, strict=True)}


ODD_NAMES = ("a#1.jpg", "b 2, c.jpg", "2_3.4.png", "Ünï.JPG", "c#0#2.jpeg")


@pytest.mark.parametrize("layout", ["captions.txt", "Flickr8k.token.txt", "results.csv", "json"])
def test_odd_file_names_in_every_layout(tmp_path, load, layout):
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    for number, name in enumerate(ODD_NAMES):
        photo(number).save(folder / "images" / name)
    if layout == "captions.txt":
        write_csv(folder / layout, [(name, f"words of {name}") for name in ODD_NAMES])
    elif layout == "json":
        images = [
            {"filename": name, "sentences": [{"raw": f"words of {name}"}]} for name in ODD_NAMES
        ]
        (folder / "dataset_x.json").write_text(json.dumps({"images": images}), "utf-8")
    else:
        between = "#0\t" if layout.endswith("token.txt") else "| 0| "
        lines = [f"{name}{between}words of {name}\n" for name in ODD_NAMES]
        (folder / layout).write_text("".join(lines), "utf-8")
    data = load(folder)
    assert captions_of(data) == {name: [f"words of {name}"] for name in ODD_NAMES}
    assert data.skipped == {}


def test_a_folder_of_photographs_loads_nothing_of_the_posters(photo_data):
    code = (
        "import sys; from pathlib import Path; from sources.layouts import read_folder;"
        f"found = read_folder(Path({str(photo_data)!r}));"
        "loaded = [name for name in sys.modules if 'posters' in name];"
        "print(len(found.rows), found.layout.name, *loaded)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["200", "Kaggle", "captions"], done.stderr


def encoded(text: str) -> dict[str, bytes]:
    crlf = text.replace("\n", "\r\n")
    return {
        "bom": b"\xef\xbb\xbf" + text.encode(),
        "crlf": crlf.encode(),
        "bom and crlf": b"\xef\xbb\xbf" + crlf.encode(),
        "Windows-1252": text.encode("cp1252"),
        "utf-16": crlf.encode("utf-16"),
        "blank lines": ("\n\n" + text.replace("\n", "\n\n  \n")).encode(),
        "no last newline": text.rstrip("\n").encode(),
    }


@pytest.mark.parametrize("kind", encoded(""))
@pytest.mark.parametrize("layout", ["captions.txt", "Flickr8k.token.txt", "results.csv"])
def test_encodings_line_ends_and_backslashes(tmp_path, load, kind, layout):
    folder = tmp_path / "data"
    write_photos(folder / "images", 4)
    # The ellipsis is \x85 in Windows' Latin-1, which is a line end to str.splitlines.
    texts = ["Ein Mädchen läuft .", "A café… with naïve guests", "plain ' text", "the ½ end"]
    said = [rf"Images\{name}" if k else name for k, name in enumerate(names(4))]
    form = {
        "captions.txt": "{},{}\n",
        "Flickr8k.token.txt": "{}#0\t{}\n",
        "results.csv": "{}| 0| {}\n",
    }
    text = "".join(form[layout].format(n, t) for n, t in zip(said, texts, strict=True))
    (folder / layout).write_bytes(encoded(text)[kind])
    data = load(folder)
    assert captions_of(data) == {n: [t] for n, t in zip(names(4), texts, strict=True)}
    assert data.skipped == {}


def test_utf8_and_a_single_latin1_byte_in_one_file(tmp_path, load):
    folder = tmp_path / "data"
    a, b, c = write_photos(folder / "images", 3)
    text = f"{a},caf".encode() + b"\xe9\n" + f"{b},café →\n{c},x\n".encode()
    (folder / "captions.txt").write_bytes(text)
    assert captions_of(load(folder)) == {a: ["café"], b: ["café →"], c: ["x"]}


def test_hostile_names_never_leave_the_folder(tmp_path, load, monkeypatch):
    folder = write_kaggle(tmp_path / "data", N)
    for number, name in enumerate(("passwd.jpg", "photo_000.jpg")):
        photo(20 + number).save(tmp_path / name)
    hostile = ["../passwd.jpg", "../../etc/passwd.jpg", str(tmp_path / "passwd.jpg"), "/", ".."]
    hostile += [r"..\passwd.jpg", r"C:\passwd.jpg", "images/../../passwd.jpg", "\0.jpg", "~/x.jpg"]
    with (folder / "captions.txt").open("a", newline="") as file:
        csv.writer(file).writerows((name, "secret") for name in hostile)
        csv.writer(file).writerow(("../photo_000.jpg", "inside"))
    opened, real = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path) or real(path))
    data = load(folder)
    assert "secret" not in data.captions and data.names == names(N)
    shipped = {path for path in opened if path.is_relative_to(ROOT / "Flickr8k")}
    for path in {*opened, *data.paths} - shipped:
        assert path.resolve().is_relative_to(folder.resolve())
    assert captions_of(data)["photo_000.jpg"][-1] == "inside"
    assert sum(map(len, data.skipped.values())) >= 8


# --------------------------------------------------------------------------------- splits


def write_course(folder: Path, count: int = 20) -> None:
    """Images 0-9 have four captions in train and one in test; 10 and 11 are test images alone;
    12-19 have three in train, one in val, and one in captions.txt only."""
    rows, parts = pairs(count), {"train": [], "val": [], "test": []}
    for row, (name, text) in enumerate(rows):
        image, which = divmod(row, 5)
        if image < 10:
            part = "train" if which < 4 else "test"
        elif image < 12:
            part = "test"
        else:
            part = ("train", "train", "train", "val", "")[which]
        if part:
            parts[part].append((name, text))
    write_photos(folder / "images", count)
    write_csv(folder / "captions.txt", rows, "image,caption")
    for part, chosen in parts.items():
        write_csv(folder / f"{part}_captions.txt", chosen, "image,caption")


def test_split_by_caption_is_refused_by_auto(tmp_path, load, capsys):
    write_course(tmp_path / "data")
    data = load(tmp_path / "data")
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.startswith("warning: ")
    assert "by caption" in message and re.search(r"\b10 of its 12 test images\b", message)
    assert "seeded split by image" in message
    assert data.splits == "random" and not data.by_caption
    assert captions_of(data).keys() == table_of(pairs(20)).keys() and len(data.captions) == 100
    assert all(len(labels) == 1 for labels in labels_of(data).values())
    assert data.layout.startswith("course")


def test_split_by_caption_is_taken_when_given(tmp_path, load, capsys):
    write_course(tmp_path / "data")
    data = load(tmp_path / "data", "given")
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "by caption" in message and "10 of its 12 test" in message
    assert data.by_caption and data.splits == "given"
    counts = Counter(data.labels.tolist())
    assert counts == {"train": 40 + 24, "test": 10 + 10, "dev": 8, "": 8}
    for (_, text), label in zip(
        ((data.names[i], t) for i, t in zip(data.caption_image, data.captions, strict=True)),
        data.labels, strict=True,
    ):  # fmt: skip
        in_file = {
            part
            for part, name in (("train", "train"), ("dev", "val"), ("test", "test"))
            for row in csv.reader((tmp_path / "data" / f"{name}_captions.txt").open(newline=""))
            if row[1] == text
        }
        assert label in in_file | {""}
    test = data.pairs("test")
    assert len(test.rows) == 12 and len(test.captions) == 20


def test_split_by_caption_with_flickr8k_names_uses_the_official_lists(tmp_path, load, capsys):
    folder, table = write_flickr_names(tmp_path / "data")
    rows = [(name, f"{k} words") for name in table for k in range(2)]
    write_csv(folder / "captions.txt", rows, "image,caption")
    for part, k in (("train", 0), ("test", 1)):
        write_csv(folder / f"{part}_captions.txt", [r for r in rows if r[1][0] == str(k)])
    data = load(folder)
    assert "the official lists" in capsys.readouterr().err
    assert data.splits == "official" and not data.by_caption
    assert labels_of(data) == {name: {label} for name, label in table.items()}


def test_without_the_shipped_lists_of_flickr8k(tmp_path, load, monkeypatch):
    monkeypatch.setattr("sources.splits.OFFICIAL", tmp_path / "taken away")
    write_course(tmp_path / "data")
    assert load(tmp_path / "data", "given").splits == "given"


def test_course_caption_that_stands_twice(tmp_path, load):
    write_course(tmp_path / "data")
    with (tmp_path / "data" / "captions.txt").open("a") as file:
        file.write("photo_015.jpg,twice\n" * 3)
    with (tmp_path / "data" / "train_captions.txt").open("a") as file:
        file.write("photo_015.jpg,twice\n")
    data = load(tmp_path / "data", "given")
    labels = [
        str(label)
        for text, label in zip(data.captions, data.labels, strict=True)
        if text == "twice"
    ]
    assert sorted(labels) == ["", "", "train"]


def official(split: str) -> list[str]:
    path = ROOT / "Flickr8k" / f"Flickr_8k.{split}Images.txt"
    return [line for line in path.read_text().split("\n") if line]


def write_flickr_names(folder: Path) -> tuple[Path, dict[str, str]]:
    """Generated pictures under names of Flickr8k: 4 train, 3 dev, 2 test, 1 in no list."""
    table = {name: "train" for name in official("train")[:4]}
    table |= {name: "dev" for name in official("dev")[5:8]}
    table |= {name: "test" for name in official("test")[-2:]}
    table["1_0.jpg"] = ""
    (folder / "images").mkdir(parents=True)
    for number, name in enumerate(table):
        photo(number).save(folder / "images" / name)
    rows = [(name, f"words of {name}, number {k}") for name in table for k in range(5)]
    write_csv(folder / "captions.txt", rows, "image,caption")
    return folder, table


def test_official_split(tmp_path, load, capsys):
    folder, table = write_flickr_names(tmp_path / "data")
    for choice in ("auto", "official"):
        data = load(folder, choice)
        assert data.splits == "official"
        assert labels_of(data) == {name: {label} for name, label in table.items()}
        assert "train 4/20, dev 3/15, test 2/10, in no split 1/5" in data.summary()
    assert load(folder, "random").splits == "random"
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="no splits of its own"):
        load(folder, "given")


def test_official_split_is_only_for_flickr8k(photos, load):
    with pytest.raises(UserError, match="not Flickr8k's"):
        load(photos, "official")


def test_pictures_of_one_official_list_are_split_by_the_seed(tmp_path):
    """Such a part of Flickr8k would have no test images."""
    rows = [Row(name, "words") for name in sorted(official("train")[:16])]
    labelled = choose_splits("auto", rows, {})
    assert labelled.way == "random" and "test" in labelled.labels
    with pytest.raises(UserError, match="not Flickr8k's"):
        choose_splits("official", rows, {})


def test_random_split(photos, load):
    data = load(photos, "random")
    labels = labels_of(data)
    assert all(len(found) == 1 for found in labels.values())
    counts = Counter(label for (label,) in labels.values())
    assert all(2 <= counts[split] <= 9 for split in ("test", "dev")) and sum(counts.values()) == 40
    assert load(photos).splits == "random"
    assert labels_of(load(photos, "random")) == labels == labels_of(load(photos, "auto"))
    test = [name for name, found in labels.items() if found == {"test"}]
    assert test not in (sorted(labels)[:5], sorted(labels)[-5:])  # drawn, not cut off


def test_own_lists_count_as_the_layouts_split(photos, load, capsys):
    parts = {"train": names(40)[:20], "dev": names(40)[20:28], "test": names(40)[28:38]}
    for part, chosen in parts.items():
        (photos / f"Flickr_8k.{part}Images.txt").write_bytes("\r\n".join(chosen).encode())
    for choice in ("auto", "given"):
        data = load(photos, choice)
        assert data.splits == "given" and capsys.readouterr().err == ""
        for part, chosen in parts.items():
            assert [data.names[i] for i in data.pairs(part).rows] == chosen
        assert "in no split 2/10" in data.summary()
    (photos / "text").mkdir()
    for part in parts:
        name = f"Flickr_8k.{part}Images.txt"
        (photos / name).rename(photos / "text" / name)
    assert load(photos).fingerprint == data.fingerprint


def test_karpathy_splits(tmp_path, load):
    splits = ["train", "test", "restval", "val", "test", "restval", "train", "val", None, "odd"]
    write_photos(tmp_path / "data" / "images", 10)
    write_karpathy(tmp_path / "data" / "dataset_x.json", splits)
    data = load(tmp_path / "data")
    expected = {"train": "train", "restval": "train", "val": "dev", "test": "test"}
    assert data.splits == "given"
    assert labels_of(data) == {
        name: {expected.get(split, "")} for name, split in zip(names(10), splits, strict=True)
    }
    assert "train 4/20, dev 2/10, test 2/10, in no split 2/10" in data.summary()


def test_coco_has_no_test_so_val_is_test_and_dev_is_drawn(tmp_path, load, capsys):
    write_photos(tmp_path / "data" / "images", 30)
    parts = {"train2017": names(30)[:20], "val2017": names(30)[20:]}
    write_coco(tmp_path / "data" / "annotations", parts, 30)
    data = load(tmp_path / "data")
    message = capsys.readouterr().err
    assert "val images are used as test" in message and "used as dev" in message
    assert [data.names[i] for i in data.pairs("test").rows] == names(30)[20:]
    train, dev = (set(data.pairs(name).rows.tolist()) for name in ("train", "dev"))
    assert 1 <= len(dev) <= 5 and train | dev == set(range(20)) and not train & dev
    again = load(tmp_path / "data")
    assert again.fingerprint == data.fingerprint


def test_a_split_of_some_captions_is_that_of_their_image(tmp_path):
    """Of an image's two captions only one is in a list; the image is not torn by that."""
    rows = [Row("a", "1", "train"), Row("a", "2"), Row("b", "3"), Row("b", "4", "test")]
    rows += [Row("c", "5", "dev"), Row("d", "6")]
    labelled = choose_splits("auto", rows, {})
    assert labelled.labels == ["train", "train", "test", "test", "dev", ""]
    assert labelled.way == "given" and not labelled.remarks and not labelled.by_caption


@pytest.mark.parametrize(
    ("splits", "tests", "dev"),  # the drawn dev images: about a tenth, at most 1,500
    [
        ({"train": 29}, 0, (1, 6)),
        ({"train": 12_000}, 0, (1_100, 1_300)),
        ({"train": 60_000}, 0, (1_400, 1_600)),
        ({"train": 29, "dev": 3}, 3, (1, 6)),
        ({"train": 29, "test": 3}, 3, (1, 6)),
        ({"dev": 4, "test": 3}, 3, (4, 4)),
    ],
)
def test_what_a_layout_lacks_is_filled_from_what_it_has(splits, tests, dev):
    labels = [split for split, count in splits.items() for _ in range(count)]
    rows = [Row(f"{row:05}", "words", label) for row, label in enumerate(labels)]
    labelled = choose_splits("given", rows, {})
    used = Counter(labelled.labels)
    assert used["test"] == tests and dev[0] <= used["dev"] <= dev[1]
    assert used.total() == len(rows) and "" not in used
    assert bool(labelled.remarks) == (used != splits) and len(labelled.remarks) <= 1
    again = choose_splits("given", rows, {})
    assert again == labelled


def test_missing_split_is_a_user_error(tmp_path, load):
    folder, _ = write_flickr_names(tmp_path / "data")
    data = load(folder)
    with pytest.raises(UserError, match="no holdout images"):
        data.pairs("holdout")


def test_split_positions(photos, load):
    data = load(photos)
    for name in ("train", "dev", "test"):
        split = data.pairs(name)
        assert split.name == name and len(split) == len(split.captions) == 5 * len(split.rows)
        table = table_of(pairs(40))
        for text, position in zip(split.captions, split.caption_image, strict=True):
            assert text in table[data.names[split.rows[position]]]


# --------------------------------------------------------------------- summary and skipping


def test_summary_line(tmp_path, load):
    folder = write_kaggle(tmp_path / "data", 40)
    for number in (3, 5, 7, 11):
        (folder / "images" / names(40)[number]).unlink()
    (folder / "images" / names(40)[20]).write_bytes(b"no picture")
    (folder / "images" / names(40)[21]).write_bytes(b"")
    photo(50).save(folder / "images" / "lonely.png")
    with (folder / "captions.txt").open("a") as file:
        file.write("photo_001.jpg,\nphoto_001.jpg,  \n")
    line = load(folder).summary()
    assert "\n" not in line
    rest = line.removeprefix(f"data {folder}: Kaggle captions (captions.txt), 34 images and 170 ")
    assert rest.startswith("captions; random splits (images/captions): ")
    counts = re.search(r"train (\d+)/(\d+), dev (\d+)/(\d+), test (\d+)/(\d+); skipped: ", rest)
    images, texts = (sum(map(int, counts.groups()[i::2])) for i in (0, 1))
    assert (images, texts) == (34, 170) and "in no split" not in rest
    a, b, c = (names(40)[number] for number in (3, 5, 7))
    assert f"20 captions without an image ({a}, {b}, {c}, ...)" in rest
    assert "1 images without captions (lonely.png)" in rest
    assert "2 empty captions (photo_001.jpg)" in rest
    assert "2 unreadable images (photo_020.jpg: not a picture, photo_021.jpg: empty file)" in rest
    assert re.search(r"; fingerprint [0-9a-f]{16}$", rest)


def test_nothing_skipped(photos, load):
    assert "40 images and 200 captions" in load(photos).summary()
    assert "; skipped: nothing; " in load(photos).summary()


@pytest.mark.skipif(os.name != "posix" or os.uname().sysname != "Linux", reason="names are bytes")
def test_a_file_name_that_is_no_text_can_be_printed(photos, load):
    photo(1).save(photos / "images" / os.fsdecode(b"caf\xe9.png"))
    assert b"caf\\udce9.png" in load(photos).summary().encode()


def test_captions_that_are_few_texts_are_counted(tmp_path, load):
    """As where the classes' names stand for captions; five texts an image are no news."""
    names = write_photos(tmp_path / "images", 12)
    rows = [
        (name, f"{'A' if k else 'a'}  picture of class{i % 4}")
        for i, name in enumerate(names)
        for k in (0, 1)
    ]
    with (tmp_path / "captions.txt").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    assert "24 captions (4 different texts); " in load(tmp_path).summary()


def test_fingerprint(tmp_path, load, monkeypatch):
    folder = write_kaggle(tmp_path / "data", 12)
    for part, chosen in (
        ("train", names(12)[:6]),
        ("dev", names(12)[6:9]),
        ("test", names(12)[9:]),
    ):
        (folder / f"{part}Images.txt").write_text("\n".join(chosen))
    first = load(folder).fingerprint
    shutil.copytree(folder, tmp_path / "elsewhere" / "copy")
    assert load(tmp_path / "elsewhere" / "copy").fingerprint == first
    shutil.rmtree(tmp_path / "cache")
    assert load(folder).fingerprint == first
    assert load_dataset(str(folder), "auto", 24, tmp_path / "cache", 0).fingerprint == first

    seen = {first, load(folder, "random").fingerprint}
    captions, lists = folder / "captions.txt", folder / "trainImages.txt"
    picture, other = (folder / "images" / name for name in names(2))

    def changed(path: Path, data: bytes) -> str:
        kept = path.read_bytes()
        path.write_bytes(data)
        found = load(folder).fingerprint
        path.write_bytes(kept)
        assert load(folder).fingerprint == first
        return found

    text = captions.read_bytes()
    seen.add(changed(captions, text.replace(b"dog", b"cat", 1)))
    seen.add(changed(captions, text + b"photo_000.jpg,one more\n"))
    seen.add(changed(captions, text.replace(b"photo_001.jpg", b"photo_002.jpg", 1)))
    seen.add(changed(picture, picture.read_bytes() + b"\0"))  # it looks the same
    seen.add(changed(picture, other.read_bytes()))
    seen.add(changed(lists, "\n".join(names(12)[:5]).encode()))
    assert len(seen) == 8


BAD_FILES = {
    "empty": ("captions.txt", b""),
    "blank": ("captions.txt", b"\n \r\n\n"),
    "header alone": ("captions.txt", b"image,caption\n"),
    "readme": ("captions.txt", b"# Flickr8k\n\nThis is the data of a paper, see there.\n" * 20),
    "binary": ("captions.txt", bytes(range(256)) * 50),
    "random bytes": ("captions.txt", np.random.default_rng(0).bytes(20_000)),
    "zip": ("captions.csv", b"PK\x03\x04" + bytes(5000)),
    "numbers": ("captions.csv", b"a,b,c\n" + b"1,2,3\n4,5,6\n" * 50),
    "other csv": ("results.csv", b"epoch,loss\n1,0.5\n"),
    "open quote": ("captions.txt", b'photo_000.jpg,"A dog\n' + b"photo_001.jpg,A cat\n" * 30),
    "open quote first": ("captions.txt", b'"photo_000.jpg,A dog\n' * 9 + b"a,b\n" * 20_000),
    "json list": ("dataset_x.json", b"[1, 2]"),
    "json of another kind": ("dataset_x.json", b'{"splits": {"train": 3}}'),
    "json images": ("dataset_x.json", b'{"images": [1, 2]}'),
    "json null": ("captions_x.json", b"null"),
    "json null caption": (
        "dataset_x.json",
        b'{"images": [{"filename": "photo_000.jpg", "sentences": [{"raw": null}]}]}',
    ),
    "json number name": (
        "captions_x.json",
        b'{"images": [{"id": 1, "file_name": 5}], '
        b'"annotations": [{"image_id": 1, "caption": "a"}]}',
    ),
    "json without images": ("dataset_x.json", b'{"images": []}'),
    "instances": ("captions_x.json", b'{"images": [{"id": 1}], "annotations": []}'),
    "broken json": ("dataset_x.json", b'{"images": ['),
    "deep json": ("dataset_x.json", b"[" * 200_000),
    "no json": ("dataset_x.json", b"hello"),
    "other images": ("captions.txt", b"image,caption\nother.jpg,A dog\n"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_captions_file_of_another_kind(tmp_path, load, kind):
    write_photos(tmp_path / "data" / "images", 4)
    name, content = BAD_FILES[kind]
    (tmp_path / "data" / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load(tmp_path / "data")
    message = str(error.value)
    assert str(tmp_path / "data") in message and re.search(r"image,caption|3 are needed", message)
    assert "tsinghua" not in message  # these are the user's own data
    assert len(message) < 900 and "\n" not in message and "Error(" not in message


def test_json_of_another_kind_does_not_hide_the_captions(photos, load):
    (photos / "dataset_info.json").write_text('{"features": {}}')
    assert load(photos).layout.startswith("Kaggle")


def test_nothing_there_says_how_to_get_the_data(tmp_path, load):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    write_csv(tmp_path / "texts" / "captions.txt", pairs(5), "image,caption")
    write_csv(tmp_path / "hollow" / "captions.txt", pairs(5), "image,caption")
    (tmp_path / "hollow" / "images").mkdir()
    write_photos(tmp_path / "pictures" / "images", 3)
    problems = {
        "empty": "no captions file",
        "missing": "does not exist",
        "file": "is a file",
        "texts": "no image",
        "hollow": "no image",
        "pictures": "no captions file, only 3 pictures; .*image,caption",
    }
    for name, problem in problems.items():
        with pytest.raises(UserError, match=problem) as error:
            load(tmp_path / name)
        own = name not in ("empty", "missing")  # the user's own data want no other
        assert own != all(part in str(error.value) for part in SOURCE), name


def test_a_folder_that_cannot_be_read_is_a_user_error(photos, load, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    with pytest.raises(UserError, match="cannot read"):
        load(Path("x" * 300))
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"captions\.txt: Permission denied"):
        load(photos)


@pytest.mark.parametrize(("bad", "refused"), [(4, False), (5, True)])
def test_a_tenth_of_the_pictures_may_be_unreadable(photos, load, bad, refused):
    for name in names(bad):
        path = photos / "images" / name
        path.write_bytes(path.read_bytes()[:300])
    if refused:
        with pytest.raises(UserError, match=r"5 of 40 images.*more than 10%"):
            load(photos)
    else:
        data = load(photos)
        assert len(data.skipped["unreadable images"]) == 4
        assert set(captions_of(data)) == set(names(40)[4:])
        used = {i for name in ("train", "dev", "test") for i in data.pairs(name).rows.tolist()}
        assert used == set(range(4, 40))


def test_too_few_pictures(tmp_path, load):
    with pytest.raises(UserError, match="3 are needed"):
        load(write_kaggle(tmp_path / "two", 2))
    assert len(load(write_kaggle(tmp_path / "three", 3)).pairs("train").rows) == 1


def test_the_data_folder_stays_as_it_is(photos, load):
    def state():
        return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in photos.rglob("*")}

    for path in photos.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    photos.chmod(0o555)
    before = state()
    load(photos)
    assert state() == before


def test_pixels_belong_to_their_names(photos, load):
    data = load(photos)
    assert data.pixels.shape == (40, 8, 8, 3)
    for row, name in enumerate(data.names):
        expected = photo(int(name[6:9])).resize((8, 8), 3)
        assert np.abs(data.pixels[row].astype(int) - np.asarray(expected)).mean() < 5


def test_picture_for_figures_is_turned_as_exif_says(photos, load):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 20), "red").save(photos / "images" / names(1)[0], exif=exif)
    data = load(photos)
    assert data.picture(0).size == (20, 60) and data.picture(1).size == (48, 40)


# ---------------------------------------------------------------------------- command line


def test_the_script_prints_the_summary(photos, tmp_path, capsys):
    dataset.main([str(photos), "--cache", str(tmp_path / "cache"), "--workers", "0"])
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and err == ""
    assert out.startswith(
        f"data {photos}: Kaggle captions (captions.txt), 40 images and 200 captions"
    )
    assert out.rstrip().endswith(load_dataset(str(photos), cache=tmp_path / "cache").fingerprint)
    with pytest.raises(UserError, match="does not exist"):
        dataset.main([str(tmp_path / "missing")])


def test_the_script_fails_in_one_line(tmp_path):
    done = script("dataset.py", tmp_path / "missing")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("dataset.py: error: ")
    assert "Traceback" not in done.stderr and all(part in done.stderr for part in SOURCE)


@pytest.mark.flickr8k
def test_the_real_flickr8k(flickr8k, tmp_path, capsys):
    data = load_dataset(str(flickr8k), size=64, cache=tmp_path / "cache", workers=2)
    assert len(data.names) == 8091 and len(data.captions) == 40_455
    images = {name: len(data.pairs(name).rows) for name in ("train", "dev", "test")}
    assert images == {"train": 6000, "dev": 1000, "test": 1000}
    assert len(np.unique(data.caption_image[data.labels == ""])) == 91
    assert data.skipped == {} and not data.by_caption and capsys.readouterr().err == ""
    for name in images:
        assert {data.names[i] for i in data.pairs(name).rows} == set(official(name))
