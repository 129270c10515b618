"""Captions and pictures as strangers bring them: columns by their roles, layouts, names, encodings.

Each test is of a kind of mistake, with several of its cases: wrong captions must never be trained
on without a word.
"""

import json
import re
import sys
import unicodedata
from pathlib import Path

import pytest
from conftest import photo, write_photos

from dataset import load_dataset
from sources import splits
from sources.encodings import decode
from sources.folder import with_an_image
from sources.layouts import read_folder
from support.command import UserError

NAMES = [f"p{number:02}.jpg" for number in range(6)]
TEXTS = [f"a small dog, number {number}" for number in range(6)]
PAIRS = list(zip(NAMES, TEXTS, strict=True))
EXPECTED = {name: [text] for name, text in PAIRS}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of six pictures, without captions."""
    place = tmp_path / "data" / "images"
    place.mkdir(parents=True)
    for number, name in enumerate(NAMES):
        photo(number, (8, 8)).save(place / name)
    return place.parent


def read(folder: Path) -> dict[str, list[str]]:
    """{picture: its captions} as the readers find them."""
    found, table = read_folder(folder), {}
    rows, _, _, _ = with_an_image(found.rows, found.reading.pictures)
    for row in rows:
        table.setdefault(row.image, []).append(row.caption)
    return table


def write(folder: Path, text: str, name: str = "captions.csv", code: str = "utf-8") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(text.encode(code))


def lines(form: str) -> str:
    """A line for each picture: {name}, {stem}, {text}, {number}, in quotes {quoted}."""
    return "".join(
        form.format(name=n, stem=n[:-4], text=t, number=i, quoted=f'"{t}"') + "\n"
        for i, (n, t) in enumerate(PAIRS)
    )


# ------------------------------------------------------------------------ roles, not positions

TABLES = {
    "quotes": "image,caption\n" + lines("{name},{quoted}"),
    "bare commas": "image,caption\n" + lines("{name},{text}"),
    "bare commas before others": "image,caption,split\n" + lines("{name},{text},train"),
    "bare commas, image last": "caption,image\n" + lines("{text},{name}"),
    "id first": "id,filename,caption\n" + lines("{number},{name},{quoted}"),
    "index": ",file_name,text\n" + lines("{number},{name},{quoted}"),
    "label": "image,label,text\n" + lines("{name},class{number},{quoted}"),
    "label last": "text,path,class_id\n" + lines("{quoted},images/{name},7"),
    "camel case": "imageName,captionText,labelId\n" + lines("{name},{quoted},1"),
    "raw": "raw,sentids,split,filename,img_id\n"
    + lines('"[""{text}""]","[1, 2]",test,{name},{number}'),
    "comment number": "image_name,comment_number,comment\n" + lines("{name},{number},{quoted}"),
    "tabs": "image\tcaption\n" + lines("{name}\t{text}"),
    "tabs and quotes": "image\tcaption\n" + lines('{name}\t"{text}"'),
    "semicolons": "image;caption\n" + lines("{name};{text}"),
    "semicolons, no header": lines("{name};{text}"),
    "bars": "caption|image\n" + lines("{text}|{name}"),
    "excel's first line": "sep=;\nimage;caption\n" + lines("{name};{text}"),
    "excel's sep, tabs": "sep=\t\nfilename\ttitle\n" + lines("{name}\t{text}"),
    "blanks after commas": "image, caption\n" + lines('{name}, "{text}"'),
    "quoted header": '"image","caption"\n' + lines('"{name}",{quoted}'),
    "capitals": "IMAGE,Caption Text\n" + lines("{name},{quoted}"),
    "chinese header": "图片,标签,描述\n" + lines("{name},red dog,{quoted}"),
    "unknown names": "foto,beschreibung\n" + lines("{name},{quoted}"),
    "no header": lines("{name},{quoted}"),
    "no header, bare commas": lines("{name},{text}"),
    "no header, id first": lines("{number},{name},{quoted}"),
    "no header, tabs": lines("{name}\t{text}"),
    "no header, text first": lines("{quoted},{name}"),
    "no header, numbers last": lines("{name},{quoted},{number}"),
    "no header, labels": lines("{name},cat,{quoted}"),
    "names without extension": "image,caption\n" + lines("{stem},{quoted}"),
    "no header nor extension": lines("{stem},{quoted}"),
    "addresses": "image,caption,url\n" + lines("{name},{quoted},http://x.org/{number}.jpg"),
    "path and id": "image_id,image_path,caption\n" + lines("{number},images/{name},{quoted}"),
    "other paths": "image,caption\n" + lines("C:\\photos\\images\\{name},{quoted}"),
    "blanks": lines("{name} {text}"),
    "a blank line and an empty one": "image,caption\n\n,\n" + lines("{name},{quoted}"),
    "no header, number, text": lines("{name}\t{number}\t{text}"),
    "a caption that is none": "image,negative_caption,caption\n" + lines("{name},no dog,{quoted}"),
    "title and tags": "image,tags,title\n" + lines('{name},"red, big",{quoted}'),
}


LISTS = {
    "five columns": ("image,caption_0,caption_1\n", "{name},{quoted},{number} dogs"),
    "with another between": ("image,caption1,id,caption2\n", "{name},{quoted},9,{number} dogs"),
    "kinds of captions": ("raw,image,title\n", "{quoted},{name},{number} dogs"),
    "no header": ("", "{name},{quoted},{number} dogs"),
    "json in a cell": ("image,captions\n", '{name},"[""{text}"", ""{number} dogs""]"'),
    "python in a cell": ("image,captions\n", "{name},\"['{text}', '{number} dogs']\""),
    "numpy in a cell": ("image,captions\n", "{name},\"['{text}'  '{number} dogs']\""),
    "lines": ("image,caption\n", "{name},{quoted}\n{name},{number} dogs"),
}


@pytest.mark.parametrize("kind", LISTS)
def test_all_captions_of_a_line(folder, kind):
    header, form = LISTS[kind]
    write(folder, header + lines(form))
    assert read(folder) == {n: [t, f"{i} dogs"] for i, (n, t) in enumerate(PAIRS)}


def test_a_column_of_splits(folder, tmp_path):
    words = ("train", "Training", "validation", "val", "test", "testing")
    rows = [f"{name},a dog,{word}\n" for name, word in zip(NAMES, words, strict=True)]
    write(folder, "image,caption,split\n" + "".join(rows))
    data = load_dataset(folder, "auto", 8, tmp_path / "cache", 0)
    assert data.splits == "given"
    assert data.labels.tolist() == ["train", "train", "dev", "dev", "test", "test"]
    for name in ("phase", "data_type", "image_set"):  # known by what it holds
        write(folder, f"image,caption,{name}\n" + "".join(rows))
        assert [row.split for row in read_folder(folder).rows] == ["train"] * 2 + ["dev"] * 2 + [
            "test"
        ] * 2
    for name in ("split", "is_train"):
        write(folder, f"image,caption,{name}\n" + lines("{name},a dog,A"))
        with pytest.raises(UserError, match=f"its column {name} holds A; train, val and test"):
            read(folder)


NOT_UNDERSTOOD = {
    "no captions": ("image,label\n" + lines("{name},cat"), r"image, label.*captions"),
    "which of them": ("image,alpha,beta\n" + lines("{name},{quoted},a cat"), "image, alpha, beta"),
    "no image": ("name,caption\n" + lines("somebody,{quoted}"), "name, caption.*names"),
    "other data": ("epoch,loss\n1,2.5\n2,2.4\n", "epoch, loss"),
    "one column": ("caption\n" + lines("{text}"), "caption"),
    "prose": ("These are the captions of my photos.\nThey are good.\n", "These are the captions"),
    "a label": ("image,kind\n" + lines("{name},class{number}"), "image, kind"),
    "a label, no header": (lines("{name},cat"), r"p00\.jpg, cat"),
    "two labels": (lines("{name},cat,tom"), r"p00\.jpg, cat, tom"),
    "only numbers": (lines("{name},{number}"), r"p00\.jpg, 0"),
    "two pictures": ("image_a,image_b,caption\n" + lines("{name},p01.jpg,{quoted}"), "image_a and"),
    "two names": (lines("{stem},p01,{quoted}"), "p00 and p01 could both be names of pictures"),
}


@pytest.mark.parametrize("kind", NOT_UNDERSTOOD)
def test_what_is_not_understood_is_said_with_its_header(folder, kind):
    text, message = NOT_UNDERSTOOD[kind]
    write(folder, text)
    with pytest.raises(UserError, match=message) as error:
        read(folder)
    assert "image,caption" in str(error.value) and "tsinghua" not in str(error.value)


def test_stray_quotes_and_captions_of_several_lines(folder):
    first = (
        'image,caption\np00.jpg,"a dog\np01.jpg,the "best" dog\np02.jpg,"two\nlines, ""here"""\n'
    )
    write(folder, first + 'p03.jpg,"quoted" first\np04.jpg,5" wide\np05.jpg,"plain, ""x"""\n')
    assert read(folder) == {
        "p00.jpg": ["a dog"],
        "p01.jpg": ['the "best" dog'],
        "p02.jpg": ['two lines, "here"'],
        "p03.jpg": ['"quoted" first'],
        "p04.jpg": ['5" wide'],
        "p05.jpg": ['plain, "x"'],
    }


def test_quotes_behind_strokes_and_numbers_in_a_caption(folder):
    write(folder, "image,caption\n" + lines(r'{name},"the \"{number}\", a dog \""'))
    assert read(folder) == {name: [f'the "{i}", a dog "'] for i, name in enumerate(NAMES)}
    write(folder, lines("{name},a dog, a number, {number}"))
    assert read(folder) == {name: [f"a dog, a number, {i}"] for i, name in enumerate(NAMES)}


def test_of_two_columns_that_name_pictures_the_likelier_is_taken(folder):
    for header in ("mask_path,image_path", "id,image_id"):
        write(folder, f"{header},caption\n" + lines("p01,{stem},{quoted}"))
        assert read(folder) == EXPECTED


def test_a_caption_may_be_as_long_as_it_likes(folder):
    write(folder, "image,caption\n" + lines("{name},{quoted}") + f'p00.jpg,"{"dog, " * 40_000}"\n')
    assert len(read(folder)["p00.jpg"][1]) > 150_000


def test_lines_that_are_not_understood_are_counted(folder, tmp_path, capsys):
    rows = lines("{name},{quoted}") * 5
    write(folder, rows + "p00.jpg<TAB>a dog\np01.jpg a cat\n\nmore words\n", "captions.csv")
    data = load_dataset(folder, "auto", 8, tmp_path / "cache", 0)
    unread = data.skipped["lines that are not understood"]
    assert unread[0].startswith("line 31: ") and len(unread) == 3
    assert "3 lines that are not understood (line 31: " in data.summary()
    assert len(data.captions) == 30 and capsys.readouterr().err == ""
    write(folder, rows + "p00.jpg a dog\n" * 4)
    with pytest.raises(UserError, match=r"4 of the 34 lines of .*captions\.csv .*line 31: p00"):
        load_dataset(folder, "auto", 8, tmp_path / "cache", 0)


# -------------------------------------------------------------------------- further layouts

ENTRIES = [{"image": name, "caption": text, "image_id": i} for i, (name, text) in enumerate(PAIRS)]
COCO = {
    "images": [{"id": i, "file_name": name, "width": 8} for i, name in enumerate(NAMES)],
    "annotations": [{"image_id": i, "id": 9, "caption": text} for i, text in enumerate(TEXTS)],
}
JSON = {
    "blip": ENTRIES,
    "lists": [{"image": f"images/{name}", "caption": [text]} for name, text in PAIRS],
    "by image": EXPECTED,
    "by image, a text": dict(PAIRS),
    "by image, an entry": {n: {"captions": [t], "label": "x"} for n, t in PAIRS},
    "by id, an entry": {
        f"p0{5 - i}": {"file": n, "caption": t} for i, (n, t) in enumerate(PAIRS)
    },
    "columns and another": {"image": NAMES, "caption": TEXTS, "authors": ["me", "you"]},
    "by stem": {name[:-4]: text for name, text in PAIRS},
    "data": {"version": 1, "data": ENTRIES, "licenses": []},
    "pairs": PAIRS,
    "columns": {"image": NAMES, "caption": TEXTS},
    "pandas": {"image": dict(enumerate(NAMES)), "caption": dict(enumerate(TEXTS))},
    "coco": COCO,
    "karpathy": {"images": [{"filename": n, "sentences": [{"raw": t, "tokens": ["no"]}]}
                            for n, t in PAIRS]},
    "filename and text": [{"id": 3, "file_name": n, "text": t, "label": "cat"} for n, t in PAIRS],
}  # fmt: skip


FILES = {  # content, name, encoding
    f"{kind}, {code}": (text.replace("\n", "\r\n"), "captions.csv", code)
    for kind, text in TABLES.items()
    for code in ("utf-8-sig", "utf-16")
}
for name in ("captions.json", "annotations/mine.json"):
    for kind, content in JSON.items():
        FILES[f"{kind}, {name}"] = json.dumps(content, ensure_ascii=False), name, "utf-8"
for name in ("captions.jsonl", "mine.jsonl", "captions.json"):
    FILES[f"a line each, {name}"] = "".join(f"{json.dumps(x)}\n" for x in ENTRIES), name, "utf-8"


@pytest.mark.parametrize("file", FILES.values(), ids=FILES)
def test_captions_of_all_pictures(folder, file):
    write(folder, *file)
    assert read(folder) == EXPECTED


def test_json_with_what_cannot_be_used(folder, tmp_path):
    """A name that stands twice, null, half of an emoji, an entry without a picture."""
    two = ", ".join(f'"{name}": "{text}"' for name, text in [*PAIRS, ("p00.jpg", "a cat")])
    write(folder, f"{{{two}}}", "captions.json")
    assert read(folder) == EXPECTED | {"p00.jpg": [TEXTS[0], "a cat"]}
    odd = [{"image": "p00.jpg", "caption": None}, {"image": "p01.jpg", "caption": "a \ud83d dog"}]
    odd += [{"caption": "a dog"}]
    write(folder, json.dumps(ENTRIES * 9 + odd), "captions.json")
    data = load_dataset(folder, "auto", 8, tmp_path / "cache", 0)
    assert data.captions[-1] == "a  dog" and data.skipped["empty captions"] == ["p00.jpg"]
    assert len(data.skipped["lines that are not understood"]) == 1
    for content in ({"a": 1}, [1, 2], [], "x", {"image": "p.jpg", "label": 3}, {"p00.jpg": 5}):
        write(folder, json.dumps(content), "captions.json")
        with pytest.raises(UserError, match="image,caption") as error:
            read(folder)
        assert "Error(" not in str(error.value)


def test_json_with_splits_and_captions_that_only_some_have(folder):
    lists = [[name, text, "train" if i < 4 else "val"] for i, (name, text) in enumerate(PAIRS)]
    for content in (lists, {name: {"caption": text, "split": part} for name, text, part in lists}):
        write(folder, json.dumps(content), "captions.json")
        assert read(folder) == EXPECTED
        assert [row.split for row in read_folder(folder).rows] == ["train"] * 4 + ["dev"] * 2
    more = [*ENTRIES * 40, {"image": "p00.jpg", "caption": "a cat", "caption2": "a lion"}]
    write(folder, json.dumps(more), "captions.json")
    assert read(folder)["p00.jpg"] == [TEXTS[0]] * 40 + ["a cat", "a lion"]
    assert len(read_folder(folder).rows) == 242  # no caption2 is none, not an empty one
    write(folder, json.dumps([*lists * 40, ["p00.jpg"], []]), "captions.json")
    found = read_folder(folder)
    assert len(found.rows) == 241 and found.rows[-1][:2] == ("p00.jpg", "")
    assert found.reading.skipped == {"lines that are not understood": ["entry 242: {}"]}


def test_coco_notes_of_images_that_are_not_listed_are_counted(folder, tmp_path, capsys):
    write(folder, json.dumps(COCO | {"images": COCO["images"][:4]}), "captions_val.json")
    data = load_dataset(folder, "auto", 8, tmp_path / "cache", 0)
    assert data.skipped["captions without an image"] == ["image_id 4", "image_id 5"]
    assert "2 of the 6 captions have no picture" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_hugging_face_folders(tmp_path, ending):
    """Names are of the folder that they stand in; the same name may be in several."""
    data, number = tmp_path / "data", 0
    for part, count in (("train", 3), ("validation", 2), ("test", 1)):
        (data / part).mkdir(parents=True)
        rows = [{"file_name": f"{i}.jpg", "text": f"dog {i} of {part}"} for i in range(count + 1)]
        for row in rows[:count]:
            photo(number := number + 1, (8, 8)).save(data / part / row["file_name"])
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if ending == "csv":
            text = "file_name,text\n" + "".join(f"{r['file_name']},{r['text']}\n" for r in rows)
        write(data, text, f"{part}/metadata.{ending}")
    found = load_dataset(data, "auto", 8, tmp_path / "cache", 0)
    assert found.splits == "given" and found.kind == "Hugging Face imagefolder"
    for image, text, split in zip(found.caption_image, found.captions, found.labels, strict=True):
        place, _, file = found.names[image].rpartition("/")
        assert text == f"dog {file[0]} of {place}" if place else text.endswith("train")
        assert split == {"validation": "dev"}.get(place or "train", place or "train")
    assert len(found.skipped["captions without an image"]) == 3


@pytest.mark.parametrize("place", ["", "texts/", "images/"])
def test_pictures_and_texts_of_one_name(folder, place):
    for name, text in PAIRS:
        write(folder, f"{text}\n\n{text}!\n", f"{place}{name[:-4]}.txt")
    write(folder, "a list of words", f"{place}notes.txt")
    write(folder, "\n".join(NAMES), f"{place}train.txt")
    assert read(folder) == {name: [text, f"{text}!"] for name, text in PAIRS}
    assert read_folder(folder).reading.skipped == {"texts without a picture": ["notes.txt"]}


def test_texts_that_are_named_after_the_whole_file(folder):
    for name, text in PAIRS:
        write(folder, text, f"images/{name}.txt")
    assert read(folder) == EXPECTED


def test_flickr8k_in_chinese(folder):
    text = "".join(f"{n}#zhc#{k} 一只狗{k} \n" for n in NAMES for k in range(2))
    write(folder, text.replace(".jpg", ""), "data/flickr8kzhc.caption.txt")
    write(folder, text, "data/flickr8kzhb.caption.txt")
    for part, chosen in (("train", NAMES[:4]), ("val", NAMES[4:5]), ("test", NAMES[5:])):
        write(folder, "".join(f"{n[:-4]}\n" for n in chosen), f"data/flickr8k{part}.txt")
    assert read(folder) == {name: ["一只狗0", "一只狗1"] for name in NAMES}
    assert read_folder(folder).described == "Flickr8k-CN (flickr8kzhc.caption.txt)"
    lists = splits.own_lists(read_folder(folder).reading)
    assert [lists[name] for name in NAMES] == ["train"] * 4 + ["dev", "test"]


@pytest.mark.parametrize("name", ["my_captions.csv", "data.tsv", "text/labels of mine.txt"])
def test_the_only_captions_file_may_have_any_name(folder, name):
    write(folder, "image\tcaption\n" + lines("{name}\t{text}"), name)
    write(folder, "Pictures of dogs.\n", "README.md")
    write(folder, "p00.jpg\np01.jpg\n", "chosen.txt")
    assert read(folder) == EXPECTED


def test_of_several_files_that_which_is_understood_is_read(folder):
    write(folder, "image,caption\n" + lines("{name},{quoted}"), "one.csv")
    write(folder, "epoch,loss\n1,2\n", "history.csv")
    assert read(folder) == EXPECTED
    write(folder, "image,caption\n" + lines("{name},a cat"), "two.csv")
    with pytest.raises(UserError, match=r"several files of captions \(one\.csv, two\.csv\)"):
        read(folder)


@pytest.mark.parametrize("form", ["{}.csv", "coco_karpathy_{}.csv", "captions-{}.csv"])
def test_files_that_are_named_after_their_splits(folder, tmp_path, form):
    rows = lines("{name},{quoted}").splitlines(keepends=True)
    for word, part in (("train", rows[:4]), ("val", rows[4:5]), ("test", rows[5:])):
        write(folder, "image,caption\n" + "".join(part), form.format(word))
    data = load_dataset(folder, "auto", 8, tmp_path / "cache", 0)
    found = dict(zip(data.caption_image.tolist(), data.labels.tolist(), strict=True))
    assert [found[i] for i in range(6)] == ["train"] * 4 + ["dev", "test"]
    assert data.splits == "given"


def test_parquet_needs_pyarrow(folder, monkeypatch):
    write(folder, "PAR1", "captions.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        read(folder)


def test_what_lies_there_is_said_where_nothing_is_understood(folder):
    write(folder, "x", "captions.docx")
    with pytest.raises(UserError, match=r"6 pictures and captions\.docx; .*image,caption"):
        read(folder)


# ------------------------------------------------------------------------------------ names


def write_tree(folder: Path, paths: list[str]) -> None:
    for number, path in enumerate(paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        photo(number, (8, 8)).save(folder / path)


def test_the_same_name_in_two_folders(tmp_path):
    paths = [f"images/{animal}/{i}.jpg" for animal in ("cat", "dog") for i in range(3)]
    write_tree(tmp_path, paths)
    texts = {path: f"a {path.split('/')[1]} number {path[-5]}" for path in paths}
    for cut in (0, 1):  # with all the folders, and with those that tell them apart
        rows = [f"{'/'.join(path.split('/')[cut:])},{text}\n" for path, text in texts.items()]
        write(tmp_path, "image,caption\n" + "".join(rows))
        assert read(tmp_path) == {path: [text] for path, text in texts.items()}
    write(tmp_path, "image,caption\n0.jpg,an animal\n")
    with pytest.raises(UserError, match=r"0\.jpg.* images/cat/0\.jpg and images/dog/0\.jpg"):
        read(tmp_path)
    (tmp_path / paths[3]).write_bytes((tmp_path / paths[0]).read_bytes())  # a copy may be either
    assert read(tmp_path) == {paths[0]: ["an animal"]}


def test_captions_of_pictures_that_are_not_there_go_to_no_other(tmp_path):
    write_tree(tmp_path, [f"images/dog/{i}.jpg" for i in range(3)])
    rows = [f"{animal}/{i}.jpg,a {animal}\n" for animal in ("cat", "dog") for i in range(3)]
    write(tmp_path, "image,caption\n" + "".join(rows))
    found = read_folder(tmp_path)
    assert read(tmp_path) == {f"{i}.jpg": ["a dog"] for i in range(3)}
    _, _, skipped, remarks = with_an_image(found.rows, found.reading.pictures)
    assert skipped["captions without an image"] == [f"cat/{i}.jpg" for i in range(3)]
    assert len(remarks) == 1 and "3 of the 6 captions have no picture (cat/0.jpg" in remarks[0]
    rows = [f"{animal}/{i}.jpg,a {animal}\n" for animal in ("cat", "cow") for i in range(3)]
    write(tmp_path, "image,caption\n" + "".join(rows))
    with pytest.raises(UserError, match=r"cat/0\.jpg and cow/0\.jpg .* images/dog/0\.jpg"):
        read(tmp_path)


def test_other_folders_than_the_captions_say_are_said(tmp_path):
    write_tree(tmp_path, ["one/a.jpg", "one/b.jpg", "two/c.jpg"])
    write(tmp_path, "image,caption\nxyz/a.jpg,a dog\none/b.jpg,a cat\ntwo/c.jpg,a cow\n")
    found = read_folder(tmp_path)
    *_, remarks = with_an_image(found.rows, found.reading.pictures)
    assert remarks == ["images in other folders than their captions say: 1 (xyz/a.jpg: one/a.jpg)"]


NEAR = {
    "case": ("P{:02}.JPG", "p{:02}.jpg"),
    "case, both ways": ("p{:02}.Jpg", "P{:02}.jPG"),
    "decomposed on disk": (unicodedata.normalize("NFD", "café{}.jpg"), "café{}.jpg"),
    "decomposed in the captions": ("für{}.jpg", unicodedata.normalize("NFD", "für{}.jpg")),
    "no extension": ("p{:02}.png", "p{:02}"),
    "an id": ("{:012}.jpg", "{}"),
    "blanks and dots": ("p {}.jpg", " ./p {}.jpg "),
    "windows": ("a/b/p{}.jpg", "D:\\x\\a\\b\\p{}.jpg"),
    "deep": ("a/b/c/d/e/p{}.jpg", "a/b/c/d/e/p{}.jpg"),
    "deep, without folders": ("a/b/c/d/e/p{}.jpg", "p{}.jpg"),
}


@pytest.mark.parametrize("kind", NEAR)
def test_names_that_are_nearly_the_files(tmp_path, kind):
    files, named = NEAR[kind]
    write_tree(tmp_path, [f"images/{files.format(i)}" for i in range(3)])
    rows = [f"{named.format(i)},a dog {i}\n" for i in range(3)]
    write(tmp_path, "image,caption\n" + "".join(rows))
    assert list(read(tmp_path).values()) == [["a dog 0"], ["a dog 1"], ["a dog 2"]]


@pytest.mark.skipif(sys.platform != "linux", reason="names differ by their case alone")
def test_names_that_differ_by_case_alone(tmp_path):
    write_tree(tmp_path, ["a.jpg", "A.jpg", "b.jpg", "b.png"])
    write(tmp_path, "image,caption\na.jpg,low\nA.jpg,high\nb.jpg,photo\nb.png,drawing\n")
    assert read(tmp_path) == {
        "a.jpg": ["low"], "A.jpg": ["high"], "b.jpg": ["photo"], "b.png": ["drawing"],
    }  # fmt: skip
    for name, both in (("A.JPG", r"A\.jpg and a\.jpg"), ("b", r"b\.jpg and b\.png")):
        write(tmp_path, f"image,caption\n{name},which\n")
        with pytest.raises(UserError, match=both):
            read(tmp_path)


def test_links_that_lead_back_and_folders_of_disks(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    write_tree(data, ["images/p00.jpg", "images/@eaDir/p01.jpg/SYNOPHOTO_THUMB_M.jpg"])
    write_tree(data, ["images/.thumbnails/p00.jpg", "#recycle/p01.jpg", "__MACOSX/p00.jpg"])
    write_tree(elsewhere, ["deep/p00.png", "deep/p01.jpg"])
    (data / "images" / "back").symlink_to(data)
    (data / "images" / "self").symlink_to(data / "images" / "self")
    (data / "images" / "album").symlink_to(elsewhere)
    (elsewhere / "again").symlink_to(elsewhere / "deep")
    (elsewhere / "deep" / "up").symlink_to(elsewhere)
    write(data, "image,caption\np00.jpg,a dog\np01.jpg,a cat\n")
    assert read(data) == {"p00.jpg": ["a dog"], "p01.jpg": ["a cat"]}
    assert len(read_folder(data).reading.pictures) == 3


@pytest.mark.skipif("pillow_heif" in sys.modules, reason="pillow-heif reads them")
def test_pictures_of_iphones_are_counted(folder, tmp_path):
    (folder / "images" / "p05.jpg").rename(folder / "images" / "p05.HEIC")
    write(folder, "image,caption\n" + lines("{stem},{quoted}"))
    data = load_dataset(folder, "auto", 8, tmp_path / "cache", 0)
    assert "1 pictures of iPhones: .heic needs pip install pillow-heif (p05.HEIC)" in data.summary()
    for picture in (folder / "images").iterdir():
        picture.rename(picture.with_suffix(".heic"))
    with pytest.raises(UserError, match=r"no image; \.heic needs pip install pillow-heif"):
        load_dataset(folder, "auto", 8, tmp_path / "cache", 0)


def test_a_near_miss_shows_a_name_of_each_side(folder):
    write(folder, "image,caption\n" + lines("photo_{number}.jpg,{quoted}"))
    with pytest.raises(UserError, match=r"none of the 6 images .*photo_0\.jpg.*p00\.jpg"):
        read(folder)


def test_too_many_captions_without_a_picture_are_a_warning(folder, tmp_path, capsys):
    rows = "".join(f"q{i}.jpg,a dog\n" for i in range(94))
    write(folder, "image,caption\n" + lines("{name},{quoted}") + rows)
    load_dataset(folder, "auto", 8, tmp_path / "cache", 0)
    message = capsys.readouterr().err
    assert message.startswith("warning: 94 of the 100 captions have no picture (q0.jpg, q1.jpg, q2")
    assert message.count("\n") == 1


# -------------------------------------------------------------------------------- encodings

SPOKEN = {
    "GBK": ("gb18030", ["一只狗在草地上奔跑", "一个男孩在海边玩球", "两个女人坐在长椅上"]),
    "GBK, rare": ("gbk", ["蹒跚的骆驼穿越沙漠", "消防员用水龙头灭火，浓烟滚滚"]),
    "GBK, four bytes": ("gb18030", ["一只狗在草地上奔跑㐀", "一个男孩在海边玩球", "两个女人坐着"]),
    "Big5": ("big5", ["一隻狗在草地上奔跑", "一個男孩在海邊玩球", "兩個女人坐在長椅上"]),
    "Shift-JIS": ("cp932", ["犬が草の上を走っている", "男の子が海辺で遊んでいる"]),
    "EUC-KR": ("cp949", ["개 한 마리가 풀밭에서 달리고 있다", "두 여자가 벤치에 앉아 있다"]),
    "Windows-1250": ("cp1250", ["Pies biegnie po trawie, za nim chłopiec", "Mężczyzna w żółtej"]),
    "Windows-1250, Czech": ("cp1250", ["Pes běží po trávě", "Chlapec si hraje s míčem na pláži"]),
    "Windows-1251": ("cp1251", ["собака бежит по траве", "Две женщины сидят на скамейке"]),
    "Windows-1252": ("cp1252", ["the dog’s “red” ball – number 0", "a man in a café"]),
    "Windows-1252, German": ("cp1252", ["Ein Hund läuft über grünes Gras", "draußen, müde"]),
    "Windows-1252, French": ("cp1252", ["Un chien à côté d'une forêt", "Deux femmes âgées, l’été"]),
    "Windows-1253": ("cp1253", ["ένας σκύλος τρέχει στο γρασίδι", "ένα αγόρι παίζει μπάλα"]),
    "Windows-1254": ("cp1254", ["Bir köpek çimenlerde koşuyor", "İki kadın, yağmur yağıyor"]),
    "KOI8-R": ("koi8_r", ["собака бежит по траве", "Две женщины сидят на скамейке"]),
    "UTF-16": ("utf-16", ["一只狗在草地上奔跑", "Ein Hund läuft"]),
    "UTF-16, no mark": ("utf-16-le", ["一只狗在草地上奔跑", "Ein Hund läuft"]),
    "UTF-32": ("utf-32", ["一只狗在草地上奔跑"]),
    "": ("utf-8", ["一只狗在草地上奔跑", "Ein Hund läuft"]),
}


@pytest.mark.parametrize("kind", SPOKEN)
def test_encodings_are_told_and_said(folder, kind):
    code, texts = SPOKEN[kind]
    rows = [f"{NAMES[i]},{text}\n" for i, text in enumerate(texts)]
    write(folder, "image,caption\n" + "".join(rows), "captions.txt", code)
    assert [text for found in read(folder).values() for text in found] == texts
    said = ", ".join(filter(None, ("captions.txt", kind.split(",")[0])))
    assert read_folder(folder).described == f"Kaggle captions ({said})"


def doubtful() -> dict[str, bytes]:
    chinese = "一只狗在草地上奔跑"
    return {
        "one letter": "p00.jpg,caffè\n".encode("cp1252"),
        "a few letters": "".join(f"p{i}.jpg,{x}\n" for i, x in enumerate("狗猫马")).encode("gbk"),
        "two codes": f"p00.jpg,{chinese}\n".encode("gbk")
        + "p01.jpg,собака бежит\n".encode("cp1251"),
        "noise": bytes(range(255, 128, -1)) * 9,
        "binary": bytes(range(256)) * 9,
        "cut": f"p00.jpg,{chinese}\n".encode("utf-16")[:-1],
        "a picture": b"\x89PNG\r\n\x1a\n" + bytes(200),
    }


@pytest.mark.parametrize("kind", doubtful())
def test_what_cannot_be_told_is_an_error(kind):
    with pytest.raises(UserError, match=r"mine\.csv.*(UTF-8|no text file)"):
        decode(doubtful()[kind], "mine.csv")


def test_letters_of_dos_are_not_taken_for_signs():
    text = "the café dog\na naïve man with a dog\nis the café old and nice\n" * 2
    with pytest.raises(UserError, match="cannot be told with confidence"):
        decode(text.encode("cp437"), "mine.csv")


def test_a_line_in_another_code_is_named():
    lines = ["p00.jpg,两个女人坐在公园的长椅上\n".encode(), "p01.jpg,一只棕色的狗\n".encode("gbk")]
    for cut in (lines[1], b"p01.jpg,a dog \xe7\x8b\n"):
        with pytest.raises(UserError, match=r"mine\.csv is UTF-8 but for \d+ bytes.* in line 3,"):
            decode(lines[0] * 2 + cut, "mine.csv")


def test_a_few_stray_bytes_in_utf8_are_said():
    data = "p00.jpg,café →\np01.jpg,naïve".encode() + b" caf\xe9 \x93x\x94\n"
    text, code = decode(data, "mine.csv")
    assert text == "p00.jpg,café →\np01.jpg,naïve café “x”\n"
    assert code == "UTF-8 but for 3 bytes of Windows-1252"


def test_no_control_character_reaches_a_model(folder):
    odd = "a\x07 dog\x85with \x9fa\u2028ball\x00"
    write(folder, "image,caption\n" + "".join(f"{n},{odd}\n" for n in NAMES) + " " * 2000)
    for (caption,) in read(folder).values():
        assert not re.search("[\x00-\x1f\x7f-\x9f]", caption) and "dog" in caption


# ------------------------------------------------------------------------- seeded splits


def split_names(folder: Path, cache: Path) -> dict[str, str]:
    data = load_dataset(folder, "random", 8, cache, 0)
    return {data.names[i]: str(x) for i, x in zip(data.caption_image, data.labels, strict=True)}


def test_a_lost_picture_moves_none_of_the_others(tmp_path):
    names = write_photos(tmp_path / "data" / "images", 60)
    write(tmp_path / "data", "image,caption\n" + "".join(f"{name},a dog\n" for name in names))
    before = split_names(tmp_path / "data", tmp_path / "cache")
    assert {*before.values()} == {"train", "dev", "test"}
    for name in names[7:12]:
        (tmp_path / "data" / "images" / name).write_bytes(b"")
    assert split_names(tmp_path / "data", tmp_path / "cache") == {
        name: split for name, split in before.items() if name not in names[7:12]
    }


def test_copies_of_a_picture_are_in_one_split(tmp_path):
    images = tmp_path / "data" / "images"
    names = write_photos(images, 40)
    for name in names:
        (images / f"copy_{name}").write_bytes((images / name).read_bytes())
    rows = [f"{prefix}{name},a dog\n" for name in names for prefix in ("", "copy_")]
    write(tmp_path / "data", "image,caption\n" + "".join(rows))
    found = split_names(tmp_path / "data", tmp_path / "cache")
    assert len(found) == 80 and all(found[name] == found[f"copy_{name}"] for name in names)


@pytest.mark.parametrize("count", [3, 4, 5, 8, 20, 1_000, 11_999, 12_001, 100_000])
def test_sizes_of_a_seeded_split(count):
    found = splits.seeded_splits({f"{i}.jpg": f"content {i}" for i in range(count)})
    sizes = [[*found.values()].count(split) for split in ("train", "dev", "test")]
    assert min(sizes) >= 1 and sum(sizes) == count and sizes[0] >= count / 3
    if count >= 1_000:
        assert all(min(count / 8, 700) * 0.75 < size < 1_700 for size in sizes[1:])
