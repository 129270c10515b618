"""Films: which count as held out, what is read on posters and how, figures against their files."""

import csv
import importlib.machinery
import json
import sys
import types
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from conftest import TINY, write_posters
from PIL import Image
from torch.nn import functional as F
from wiring import figures_of, interval_loop, ranks_loop, write_bert

from dataset import load_dataset

QUICK = (*TINY, "--train-image", 0, "--epochs", 1)
FIGURES = {"films", "chance", "dim0", "dim1"}
DIRECTIONS = {"dim0": "t2i", "dim1": "i2t"}


def call(script: object, *words: object) -> None:
    assert not script.main([str(word) for word in words])


def load(folder: Path, cache: Path):
    return load_dataset(str(folder), size=32, cache=cache, workers=0)


def split_names(data, name: str) -> list[str]:
    return sorted({data.names[i] for i in data.caption_image[data.labels == name]})


def change_intros(folder: Path, intros: dict[str, str]) -> None:
    """Gives films, by their ids, other introductions."""
    with (folder / "movies.csv").open(newline="", encoding="utf-8") as file:
        head, *films = csv.reader(file)
    with (folder / "movies.csv").open("w", newline="", encoding="utf-8") as file:
        films = [[film[0], film[1], intros.get(film[0], film[2]), film[3]] for film in films]
        csv.writer(file).writerows([head, *films])


# ------------------------------------------------------------------------------- held out


@pytest.mark.parametrize("twin_of", ["train", "dev"])
@pytest.mark.parametrize("shared", ["introduction", "poster"])
def test_a_test_film_with_a_twin_elsewhere_leaves_test(tmp_path, twin_of, shared):
    """The best epoch is chosen on dev: its films are not held out either."""
    folder = write_posters(tmp_path / "films", 40)
    before = load(folder, tmp_path / "cache")
    other, (twin, *tests) = split_names(before, twin_of)[0], split_names(before, "test")
    if shared == "introduction":
        row = before.names.index(other)
        text = before.captions[before.caption_image.tolist().index(row)]
        change_intros(folder, {Path(other).stem: text, Path(twin).stem: text})
    else:
        (folder / "posters" / twin).write_bytes((folder / "posters" / other).read_bytes())
    after = load(folder, tmp_path / "cache")
    assert split_names(after, "test") == tests
    assert not after.labels[after.caption_image == after.names.index(twin)].any()
    for name in ("train", "dev"):
        assert split_names(after, name) == split_names(before, name)


@pytest.fixture(scope="module")
def moved(tmp_path_factory) -> tuple[Path, Path, dict]:
    """A run, and its films again where some that it was trained on stand in test."""
    place = tmp_path_factory.mktemp("moved")
    films = write_posters(place / "films", 60)
    words = ("--data", films, "--out", place / "run", "--cache", place / "cache", *QUICK)
    call(helpers.train, *words, "--image-augment", "none")
    content = helpers.load_checkpoint(place / "run" / "last.pt")
    train = (films / "train.txt").read_text().split()
    known = {Path(name).stem for name in content["train_images"]["names"]}
    gone = [name for name in train if name in known][::3]
    (films / "train.txt").write_text("\n".join(name for name in train if name not in gone))
    return films, place, content


def test_films_that_were_trained_on_are_not_held_out(moved, tmp_path):
    """All figures of films from the embeddings, the checkpoint's list and the splits."""
    films, place, content = moved
    words = (place / "run" / "last.pt", "--data", films, "--cache", place / "cache")
    words += ("--splits", "given")  # not the run's own
    files = ("--json", tmp_path / "a.json", "--save-embeddings", tmp_path / "a.npz")
    call(helpers.evaluate, *words, *files, "--distance-matrix", tmp_path / "a.npy", "--workers", 0)
    figures = json.loads((tmp_path / "a.json").read_text())
    arrays, distances = np.load(tmp_path / "a.npz"), np.load(tmp_path / "a.npy")
    names = arrays["image_names"].tolist()
    images, texts = arrays["image_embeddings"], arrays["text_embeddings"]
    tests = split_names(load(films, tmp_path / "cache"), "test")
    seen = set(content["train_images"]["names"])
    assert len(names) == len(set(names)) == 60 and len(seen & set(tests)) > 5
    chosen = {
        "all": np.ones(60, bool),
        "train": np.array([name in seen for name in names]),
        "heldout": np.array([name in tests and name not in seen for name in names]),
    }
    assert set(figures) == {
        *(f"{group}_{dim}" for group in chosen for dim in DIRECTIONS),
        *("groups", "by_candidates", "distance_diagonal", "distance_rest", "protocol"),
    }
    assert set(figures["groups"]) == set(chosen)
    for group, rows in chosen.items():
        found, count = figures["groups"][group], int(rows.sum())
        i2t, t2i = ranks_loop(images[rows], texts[rows], np.arange(count))
        wanted = figures_of(i2t, t2i)
        assert set(found) == FIGURES
        assert (found["films"], found["chance"]) == (count, pytest.approx(100 / count))
        for dim, way in DIRECTIONS.items():
            assert figures[f"{group}_{dim}"] == found[dim]["r1"]
            assert found[dim]["r1"] == pytest.approx(wanted[f"{way}_r1"])
            for key in ("r5", "r10", "medr"):
                assert found[dim][key] == pytest.approx(wanted[f"{way}_{key}"])
            hits = [np.array([rank <= 1]) for rank in (t2i if way == "t2i" else i2t)]
            assert found[dim]["interval"] == pytest.approx(interval_loop(hits))
    held = int(chosen["heldout"].sum())
    assert [row["candidates"] for row in figures["by_candidates"]] == [held]
    assert figures["by_candidates"][0]["dim0"] == figures["heldout_dim0"]
    assert np.abs(distances + images @ texts.T).max() < 1e-5
    own = np.eye(60, dtype=bool)
    assert figures["distance_diagonal"] == pytest.approx(distances[own].mean(), abs=1e-6)
    assert figures["distance_rest"] == pytest.approx(distances[~own].mean(), abs=1e-6)

    protocol = figures["protocol"]
    known = {
        "data": str(films),
        "split": "test",
        "splits": "given",
        "split_by_caption": False,
        "images": len(tests),
        "captions": len(tests),
        "captions_per_image": [1, 1],
        "ties": "lost",
        "trained_on": len(seen & set(tests)),
        "checkpoint": str(place / "run" / "last.pt"),
    }
    assert {key: protocol[key] for key in known} == known
    further = {"i2t", "t2i", "interval", "fingerprint", "equal_captions", "highest_r1"}
    assert set(protocol) == {*known, *further}
    assert "one introduction a film" in protocol["i2t"]


@pytest.mark.parametrize("flags", [("--image-augment", "light"), ("--image-size", 36)])
def test_kept_features_of_films_are_never_anothers(moved, tmp_path, flags):
    """A model that differs in its preprocessing alone, on the first one's cache and on none."""
    films, place, _ = moved
    words = ("--data", films, "--out", tmp_path / "run", "--cache", place / "cache", *QUICK)
    call(helpers.train, *words, "--image-augment", "none", *flags)
    made = []
    call(helpers.evaluate, place / "run" / "last.pt", "--data", films, "--cache", place / "cache")
    for cache in (place / "cache", tmp_path / "empty"):
        words = (tmp_path / "run" / "last.pt", "--data", films, "--workers", 0)
        file = tmp_path / f"{cache.name}.npz"
        call(helpers.evaluate, *words, "--cache", cache, "--save-embeddings", file)
        made.append(dict(np.load(file)))
    for key, values in made[0].items():
        assert np.array_equal(values, made[1][key]), key


def test_films_are_measured_in_full_precision(moved, tmp_path):
    """Features of a frozen tower, kept for evaluation: the same for a run that was in bf16."""
    films, _, content = moved
    made = []
    for precision in ("fp32", "bf16"):
        path, file = tmp_path / f"{precision}.pt", tmp_path / f"{precision}.npz"
        torch.save({**content, "config": {**content["config"], "precision": precision}}, path)
        words = ("--data", films, "--cache", tmp_path / "cache", "--workers", 0)
        call(helpers.evaluate, path, *words, "--save-embeddings", file)
        made.append(dict(np.load(file)))
    for key, values in made[0].items():
        assert np.array_equal(values, made[1][key]), key


def test_titles_that_a_run_has_read_stand_in_its_evaluation(tmp_path):
    films, place = write_posters(tmp_path / "films", 20), ("--cache", tmp_path / "cache")
    words = ("--data", films, "--out", tmp_path / "run", *QUICK, *place)
    call(helpers.train, *words, "--image-augment", "none", "--titles", "keep")
    path, file = tmp_path / "run" / "last.pt", tmp_path / "a.json"
    call(helpers.evaluate, path, *place, "--split", "train", "--json", file, "--workers", 0)
    protocol, content = json.loads(file.read_text())["protocol"], helpers.load_checkpoint(path)
    assert protocol["fingerprint"] == content["fingerprint"]
    assert content["fingerprint"] != load(films, tmp_path / "cache").fingerprint


# ---------------------------------------------------------------------------- the words


WORDS = (("x", 0.1, 0.2), ("z", 0.1, 0.6), ("y", 0.6, 0.21), ("q", 0.6, 0.61))  # left, top


def stub_reader(folder: Path) -> types.ModuleType:
    """An OCR package that keeps what it is handed, and finds two columns of two words each."""

    class RapidOCR:
        def __init__(self, **options: object):
            pass

        def __call__(self, pixels: np.ndarray) -> tuple[list, None]:
            np.save(folder / f"{len(list(folder.iterdir()))}-{id(pixels)}.npy", pixels)
            high, wide = pixels.shape[:2]
            lines = []
            for text, left, top in WORDS:
                box = [(left, top), (left + 0.2, top), (left + 0.2, top + 0.1), (left, top + 0.1)]
                lines.append([[[a * wide, b * high] for a, b in box], text, 0.95])
            return lines, None

    module = types.ModuleType("rapidocr_onnxruntime")
    module.RapidOCR = RapidOCR
    module.__spec__ = importlib.machinery.ModuleSpec("rapidocr_onnxruntime", None)
    return module


@pytest.fixture(scope="module")
def read(tmp_path_factory) -> tuple[Path, Path, list[np.ndarray], list[list[int]]]:
    """A run with --poster-text: (films, its place, pictures as the reader saw them, tokens)."""
    pytest.importorskip("rapidocr_onnxruntime")
    pytest.importorskip("wordninja")
    place = tmp_path_factory.mktemp("read")
    films, bert = write_posters(place / "films", 10), write_bert(place / "bert")
    lookup, rows = F.embedding, []
    (place / "seen").mkdir()

    def spying(ids: torch.Tensor, *more: object, **named: object) -> torch.Tensor:
        rows.extend(ids.tolist())
        return lookup(ids, *more, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "rapidocr_onnxruntime", stub_reader(place / "seen"))
        patch.setattr(F, "embedding", spying)
        helpers.forget_reader()
        words = ("--data", films, "--out", place / "run", "--cache", place / "cache", *QUICK)
        text = ("--text-tower", "bert", "--text-weights", bert, "--poster-text", "--max-tokens", 40)
        call(helpers.train, *words, *text, "--image-augment", "none")
    helpers.forget_reader()
    return films, place, [np.load(file) for file in (place / "seen").iterdir()], rows


def test_the_reader_is_handed_blue_green_red(read):
    films, seen = read[0], [pixels[::8, ::8].astype(float) for pixels in read[2]]
    assert len(seen) == 10
    for path in (films / "posters").iterdir():
        picture = Image.open(path).convert("RGB")
        size = read[2][0].shape[1::-1]
        shown = np.asarray(picture.resize(size, Image.Resampling.BICUBIC))[::8, ::8, ::-1]
        assert min(np.abs(shown - pixels).mean() for pixels in seen) < 1


def test_words_are_read_line_by_line(read):
    """From the top, then from the left; each reading of the lines as one text of the tower."""
    _, place, _, rows = read
    vocabulary = helpers.load_checkpoint(place / "run" / "last.pt")["vocabulary"]
    texts = [" ".join(vocabulary[i] for i in row if i) for row in rows if row]
    texts = [text for text in texts if text.startswith("[CLS]")]
    found = {text for text in texts if {"x", "y", "z", "q"} & {*text.split()}}
    assert found == {"[CLS] x y z q [SEP]", *(f"[CLS] {x} [SEP]" for x in "xyzq")}


def test_an_embedding_with_words_is_of_unit_length(read, tmp_path):
    """And what the words add is there: without them it is another."""
    films, place, _, _ = read
    words = (place / "run" / "last.pt", "--data", films, "--cache", place / "cache", "--workers", 0)
    for split in ("test", "train"):
        file = tmp_path / f"{split}.npz"
        call(helpers.evaluate, *words, "--split", split, "--save-embeddings", file)
        with np.load(file) as arrays:
            for kind in ("image_embeddings", "text_embeddings"):
                norms = np.linalg.norm(arrays[kind], axis=1)
                assert np.abs(norms - 1).max() < 1e-5, kind
            images = arrays["image_embeddings"]
    model = helpers.trained_model(place / "run" / "last.pt")
    plain = model.encode_image(torch.rand(2, 3, 32, 32)).norm(dim=1)
    assert torch.allclose(plain, torch.ones(2), atol=1e-5) and images.shape[1] == 32
