"""What evaluate.py and visualize.py say, recomputed from the checkpoint and the picture files."""

import json
import os
import re
from itertools import zip_longest
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from conftest import TINY, caption
from PIL import Image
from wiring import (
    embed_captions,
    embed_pictures,
    interval_loop,
    ranks_loop,
    split_figures,
    write_folder,
)

from dataset import load_dataset
from support.protocol import protocol_of

LEVELS = (40, 105, 170, 235)
COLOURS = [(r, g, b) for r in LEVELS for g in LEVELS for b in LEVELS if len({r, g, b}) > 1]
FRAME = (0, 158, 115)  # around a true picture
SPLITS = ["train"] * 10 + ["val"] * 4 + ["test"] * 14


def flat(number: int) -> Image.Image:
    """A picture of one colour that no other has, and no letter or frame of a figure."""
    return Image.new("RGB", (48, 48), COLOURS[7 * number % len(COLOURS)])


def colour_spec() -> dict:
    """Pictures of every split in turn, so that rows of data are no positions in a split."""
    order = np.random.default_rng(5).permutation(len(SPLITS))
    return {
        f"{number:02d}.png": (SPLITS[place], [caption(number, k) for k in range(1 + number % 4)])
        for number, place in enumerate(order)
    }


def call(script: object, *words: object) -> None:
    assert not script.main([str(word) for word in words])


class Trained:
    """A trained run on `colour_spec`, and what plain loops make of its test split."""

    def __init__(self, place: Path, *flags: object):
        self.images = colour_spec()
        self.data = write_folder(place / "data", self.images, flat)
        self.shared = ("--data", self.data, "--cache", place / "cache", "--workers", 0)
        self.path = place / "run" / "last.pt"
        words = (*self.shared, "--out", place / "run", "--epochs", 2, *TINY, *flags)
        call(helpers.train, *words)
        self.content = helpers.load_checkpoint(self.path)
        self.model = helpers.trained_model(self.path)
        self.names = [name for name, (split, _) in self.images.items() if split == "test"]
        self.captions = [text for name in self.names for text in self.images[name][1]]
        counts = [len(self.images[name][1]) for name in self.names]
        self.owner = np.repeat(np.arange(len(self.names)), counts)
        self.pictures = self.see([self.data / "images" / name for name in self.names])
        self.texts = self.read(self.captions)

    def see(self, paths: list[Path]) -> np.ndarray:
        return embed_pictures(self.model, self.content, paths)

    def read(self, captions: list[str]) -> np.ndarray:
        return embed_captions(self.model, self.content, captions)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    flags = ("--image-augment", "none", "--train-image", 0, "--batch-size", 5, "--test-mirror")
    return Trained(tmp_path_factory.mktemp("figures"), *flags)


# ------------------------------------------------------------------------------- evaluate.py


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory) -> tuple[dict, dict, np.ndarray]:
    """What evaluate.py writes of the test split: JSON, embeddings, distances."""
    out = tmp_path_factory.mktemp("evaluated")
    files = ("--json", out / "a.json", "--save-embeddings", out / "a.npz")
    files += ("--distance-matrix", out / "a.npy")
    call(helpers.evaluate, trained.path, *trained.shared, *files)
    with np.load(out / "a.npz") as arrays:
        return json.loads((out / "a.json").read_text()), dict(arrays), np.load(out / "a.npy")


def test_embeddings_are_those_of_the_files(trained, evaluated):
    _, arrays, distances = evaluated
    assert set(arrays) == {
        *("image_embeddings", "text_embeddings", "image_names", "captions", "caption_image")
    }
    assert arrays["image_names"].tolist() == trained.names
    assert arrays["captions"].tolist() == trained.captions
    assert arrays["caption_image"].tolist() == trained.owner.tolist()
    assert np.abs(arrays["image_embeddings"] - trained.pictures).max() < 1e-5
    assert np.abs(arrays["text_embeddings"] - trained.texts).max() < 1e-5
    first = [trained.owner.tolist().index(image) for image in range(len(trained.names))]
    assert np.abs(distances + trained.pictures @ trained.texts[first].T).max() < 1e-5


def test_every_figure_is_that_of_a_loop(trained, evaluated):
    figures, arrays, _ = evaluated
    pair = arrays["image_embeddings"], arrays["text_embeddings"]
    wanted = split_figures(*pair, trained.owner)
    assert set(figures) == {*wanted, "intervals", "protocol"}
    for key, value in wanted.items():
        assert figures[key] == pytest.approx(value), key
    i2t, t2i = (np.array(ranks) for ranks in ranks_loop(*pair, trained.owner))
    images = range(len(trained.names))
    assert len({int((trained.owner == image).sum()) for image in images}) > 1
    for k in (1, 5, 10):
        hits = [i2t[[image]] <= k for image in images]
        assert figures["intervals"][f"i2t_r{k}"] == pytest.approx(interval_loop(hits))
        hits = [t2i[trained.owner == image] <= k for image in images]
        assert figures["intervals"][f"t2i_r{k}"] == pytest.approx(interval_loop(hits))
    assert set(figures["intervals"]) == {
        *(f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)),
        *("rsum", "mean_recall"),
    }


def test_the_protocol_says_what_was_measured(trained, evaluated):
    protocol = evaluated[0]["protocol"]
    counts = [len(trained.images[name][1]) for name in trained.names]
    known = {
        "data": str(trained.data),
        "split": "test",
        "splits": "given",
        "split_by_caption": False,
        "images": len(trained.names),
        "captions": len(trained.captions),
        "captions_per_image": [min(counts), max(counts)],
        "ties": "lost",
        "trained_on": 0,
        "checkpoint": str(trained.path),
        "fingerprint": trained.content["fingerprint"],
        "equal_captions": 0,
        "highest_r1": {"i2t": 100.0, "t2i": 100.0},
    }
    assert {key: protocol[key] for key in known} == known
    assert set(protocol) == {*known, "i2t", "t2i", "interval"}


def test_the_highest_recall_is_that_of_a_model_that_knows_all(tmp_path):
    """Equal captions and copies of pictures: one-hot embeddings by content, ranked by loops."""
    numbers = [0, 1, 2, 3, 3, 4]  # pictures 3 and 4 are copies
    texts = [
        *(["a dog", "A  Dog"], ["a dog", "a cat"], ["a cat", "a cat"]),
        *(["one"], ["two", "a bird"], ["three", "three"]),
    ]
    names = [f"{i}.png" for i in range(6)]
    images = {name: ("test", text) for name, text in zip(names, texts, strict=True)}
    images |= {f"other{i}.png": (split, ["x", "y"]) for i, split in enumerate(("train", "val"))}
    data = write_folder(tmp_path / "data", images, lambda number: flat([*numbers, 8, 9][number]))
    pairs = load_dataset(data, cache=tmp_path / "cache", workers=0).pairs("test")
    said = [" ".join(text.lower().split()) for own in texts for text in own]
    owner = np.repeat(np.arange(6), [len(own) for own in texts])
    used = {text: {owner[i] for i in range(len(said)) if said[i] == text} for text in said}
    protocol = protocol_of(pairs.dataset, pairs)
    assert protocol["equal_captions"] == sum(len(used[text]) > 1 for text in said) == 6
    # i2t: what is on a picture points at the text that serves it best; t2i: a text at a picture.
    kinds = sorted({*said})
    texts_of = np.eye(len(kinds))[[kinds.index(text) for text in said]]
    found = 0
    for number in range(5):
        images = np.flatnonzero(np.array(numbers) == number)
        found += max(sum(first(scores, owner == i) for i in images) for scores in texts_of.T)
    assert protocol["highest_r1"]["i2t"] == pytest.approx(100 * found / 6)
    found = 0
    for kind in kinds:
        images = [owner[i] for i in range(len(said)) if said[i] == kind]
        pictures = np.eye(5)[numbers].T
        found += max(sum(first(scores, np.arange(6) == i) for i in images) for scores in pictures)
    assert protocol["highest_r1"]["t2i"] == pytest.approx(100 * found / len(said))


def first(scores: np.ndarray, true: np.ndarray) -> bool:
    """Whether the best of the true ones is ahead of all others."""
    return bool(scores[true].max() > scores[~true].max())


def test_images_that_were_trained_on_are_counted(trained, tmp_path, capsys):
    words = (trained.path, *trained.shared, "--split", "train", "--json", tmp_path / "a.json")
    call(helpers.evaluate, *words)
    protocol = json.loads((tmp_path / "a.json").read_text())["protocol"]
    assert protocol["split"] == "train" and protocol["trained_on"] == protocol["images"] == 10
    assert "10 of the 10 images evaluated were trained on" in capsys.readouterr().err


def test_a_run_is_evaluated_on_its_own_splits(tmp_path):
    """The data has splits, but the run drew others: of its test images it has seen none."""
    data = write_folder(tmp_path / "data", colour_spec(), flat)
    place = ("--cache", tmp_path / "cache", "--workers", 0)
    words = ("--data", data, "--out", tmp_path / "run", "--epochs", 1, *TINY, *place)
    quick = ("--image-augment", "none", "--train-image", 0)
    call(helpers.train, *words, *quick, "--splits", "random")
    call(helpers.evaluate, tmp_path / "run" / "last.pt", *place, "--json", tmp_path / "a.json")
    protocol = json.loads((tmp_path / "a.json").read_text())["protocol"]
    assert (protocol["splits"], protocol["trained_on"]) == ("random", 0)


def test_a_failing_write_leaves_the_old_file(trained, tmp_path, monkeypatch):
    replace = os.replace
    for flag, name in (
        ("--json", "a.json"),
        ("--save-embeddings", "a.npz"),
        ("--distance-matrix", "a.npy"),
    ):
        file, tried = tmp_path / name, []
        file.write_bytes(b"older")

        def failing(source: object, target: object, file=file, tried=tried) -> None:
            tried.append(Path(target))
            assert Path(target) == file and Path(source).parent == tmp_path
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", failing)
        with pytest.raises(helpers.UserError, match=f"{name}.*No space left"):
            call(helpers.evaluate, trained.path, *trained.shared, flag, file)
        monkeypatch.setattr(os, "replace", replace)
        assert tried == [file] and file.read_bytes() == b"older"
    assert len(list(tmp_path.iterdir())) == 3


# ------------------------------------------------------------------------ dropout, unit length

TOWERS = [
    *(("resnet18", text, head) for text in ("transformer", "lstm", "bag") for head in ("linear",)),
    *(("resnet18", "bag", head) for head in ("mlp", "identity")),
    *(("efficientnet_lite0", "transformer", head) for head in ("linear", "mlp", "identity")),
]


@pytest.mark.parametrize(("image", "text", "head"), TOWERS)
def test_evaluation_has_no_dropout(trained, image, text, head):
    """Every head and tower: the same bits twice, of unit length; in training they differ."""
    rate = 0.5
    model = helpers.rebuilt(
        trained.content,
        image_tower=image,
        text_tower=text,
        head=head,
        text_head=head,
        dropout=rate,
        image_dropout=rate,
        text_dropout=rate,
    )
    generator = torch.Generator().manual_seed(0)
    shown = torch.rand(4, 3, 32, 32, generator=generator)
    words = torch.randint(4, 12, (4, 9), generator=generator)
    for encode, batch in ((model.encode_image, shown), (model.encode_text, words)):
        with torch.no_grad():
            model.train()
            assert not torch.equal(encode(batch), encode(batch))
            model.eval()
            first = encode(batch)
            assert torch.equal(first, encode(batch))
        assert torch.allclose(first.norm(dim=1), torch.ones(4), atol=1e-5)
        assert first.shape == (4, 32) and first.dtype == torch.float32


# ---------------------------------------------------------------------------------- zero-shot

CLASSES = {"White car": 7, "Yellow tree": 4, "black dog": 5, "blue bird": 9}  # as paths are sorted
TEMPLATES = ("{}", "a {} above red ground, under a yellow boat", "green ball ; {} below")


def by_prompts(trained: Trained, pictures: np.ndarray, templates: tuple[str, ...]) -> np.ndarray:
    """Scores (pictures, classes): a class is the mean of its prompts."""
    scores = []
    for name in CLASSES:
        prompts = [template.replace("{}", name.lower()) for template in templates]
        prompts = [re.sub(r"\ba (?=[aeiou])", "an ", prompt) for prompt in prompts]
        mean = trained.read(prompts).mean(0)
        scores.append(pictures @ (mean / np.linalg.norm(mean)))
    return np.stack(scores, 1)


def accuracies(scores: np.ndarray, truth: list[int]) -> dict:
    ranks = [1 + sum(x >= row[i] for j, x in enumerate(row) if j != i) for row, i in
             zip(scores, truth, strict=True)]  # fmt: skip
    first = np.array([rank == 1 for rank in ranks])
    return {
        "zero_shot_top1": 100 * first.mean(),
        "zero_shot_top5": 100.0,
        "chance": 25.0,
        "pictures": len(truth),
        "per_class": {
            name.lower(): 100 * first[np.array(truth) == i].mean() for i, name in enumerate(CLASSES)
        },
    }


def test_zero_shot_is_that_of_a_loop(trained, tmp_path):
    """Unlike counts of pictures, and names whose order changes with their case."""
    assert sorted(CLASSES) == list(CLASSES) != sorted(CLASSES, key=str.lower)
    paths, truth = [], []
    for place, (name, count) in enumerate(CLASSES.items()):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for _ in range(count):
            paths.append(tmp_path / "classes" / name / f"{len(paths):02d}.png")
            flat(len(paths)).save(paths[-1])
            truth.append(place)
    pictures, differ = trained.see(paths), []
    for number, templates in enumerate((TEMPLATES, TEMPLATES[::-1])):
        (tmp_path / "prompts.txt").write_text("\n".join(templates) + "\n")
        words = ("--zero-shot", tmp_path / "classes", "--templates", tmp_path / "prompts.txt")
        call(helpers.evaluate, trained.path, *words, "--json", tmp_path / f"{number}.json")
        found = json.loads((tmp_path / f"{number}.json").read_text())
        wanted = accuracies(by_prompts(trained, pictures, templates), truth)
        alone = accuracies(by_prompts(trained, pictures, templates[:1]), truth)
        differ.append(alone["per_class"] != wanted["per_class"])
        assert found.pop("per_class") == pytest.approx(wanted.pop("per_class"))
        assert found == pytest.approx(wanted)
    assert any(differ), "the prompts tell apart whether all of them count"


# ------------------------------------------------------------------------------- the figures


def pictures_in(
    figure: Path, known: dict[tuple[int, int, int], int]
) -> list[list[tuple[int, bool]]]:
    """Rows of a grid from the top, each from the left: (which known colour, is it framed)."""
    pixels = np.asarray(Image.open(figure).convert("RGB"))[::2, ::2].astype(np.int16)
    found = []
    for colour, number in known.items():
        mask = (np.abs(pixels - colour) <= 2).all(2)
        rows, columns = np.flatnonzero(mask.sum(1) > 30), np.flatnonzero(mask.sum(0) > 30)
        if not len(rows):
            continue
        # A colour may be shown in several rows and columns: cut at the gaps.
        for high in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1):
            for wide in np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1):
                if mask[high[0] : high[-1] + 1, wide[0] : wide[-1] + 1].mean() > 0.9:
                    edge = pixels[high[0] : high[-1] + 1, max(0, wide[0] - 2) : wide[0]]
                    framed = (np.abs(edge - FRAME) <= 12).all(2).mean() > 0.3
                    found.append((high[0], wide[0], number, bool(framed)))
    lines: list[list[tuple]] = []
    for cell in sorted(found):
        if not lines or cell[0] - lines[-1][0][0] > 30:
            lines.append([])
        lines[-1].append(cell)
    return [[(n, framed) for _, _, n, framed in sorted(x, key=lambda c: c[1])] for x in lines]


@pytest.fixture(scope="module")
def figures(trained, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("drawn")
    call(helpers.visualize, trained.path, *trained.shared, "--out", out, "--top-k", 4)
    return out


def known_colours(trained: Trained) -> dict[tuple[int, int, int], int]:
    """Colour -> position in the test split; pictures of other splits from -1 down."""
    place = {name: i for i, name in enumerate(trained.names)}
    names = list(trained.images)
    return {flat(row).getpixel((0, 0)): place.get(name, -1 - row) for row, name in enumerate(names)}


def order_of(query: np.ndarray, pool: np.ndarray, count: int) -> list[int]:
    return np.argsort(-(pool @ query), kind="stable")[:count].tolist()


def test_a_search_shows_what_was_found(trained, tmp_path):
    queries = ["a red dog above blue ground", "white boat ; black below"]
    words = (trained.path, *trained.shared, "--top-k", 5, "--out", tmp_path / "out")
    call(helpers.visualize, *words, *(x for query in queries for x in ("--query", query)))
    (drawn,) = (tmp_path / "out").iterdir()
    texts = trained.read(queries)
    wanted = [[(i, False) for i in order_of(text, trained.pictures, 5)] for text in texts]
    assert pictures_in(drawn, known_colours(trained)) == wanted


def test_a_search_in_a_folder_shows_its_pictures(trained, tmp_path):
    paths = [tmp_path / "folder" / f"{number}.png" for number in (31, 8, 25, 12, 40, 17)]
    paths[0].parent.mkdir()
    for path in paths:
        flat(int(path.stem)).save(path)
    words = (trained.path, "--images", paths[0].parent, "--query", "a red dog", "--top-k", 4)
    call(helpers.visualize, *words, "--out", tmp_path / "out")
    (drawn,) = (tmp_path / "out").iterdir()
    pool, texts = trained.see(paths), trained.read(["a red dog"])
    known = {flat(int(path.stem)).getpixel((0, 0)): i for i, path in enumerate(paths)}
    assert pictures_in(drawn, known) == [[(i, False) for i in order_of(texts[0], pool, 4)]]


def test_the_grids_show_what_was_found(trained, figures):
    """Each row is some caption's own picture and the first ones found, its own one framed."""
    known = known_colours(trained)
    rows = pictures_in(figures / "grid_text_to_image.png", known)
    possible = set()
    for text, own in zip(trained.texts, trained.owner, strict=True):
        order = [int(own), *order_of(text, trained.pictures, 4)]
        possible.add(tuple((i, i == own) for i in order))
    assert len(rows) == 6 and all(tuple(row) in possible for row in rows)
    assert len({tuple(row) for row in rows}) > 1
    rows = pictures_in(figures / "grid_image_to_text.png", known)
    shown = [number for row in rows for number, _ in row]
    assert len(shown) == 6 and min(shown) >= 0 and len(set(shown)) == 6


def test_the_best_and_worst_cases_are_those_of_the_ranks(trained, figures):
    rows = pictures_in(figures / "grid_best_worst.png", known_colours(trained))
    t2i = np.array(ranks_loop(trained.pictures, trained.texts, trained.owner)[1])
    cosines = trained.texts @ trained.pictures.T
    best = [i for i in np.flatnonzero(t2i == 1)]
    best.sort(key=lambda i: -np.diff(np.sort(cosines[i])[-2:])[0])
    worst = np.argsort(-t2i, kind="stable").tolist()
    halves = []
    for order in (best, worst):
        seen: list[int] = []
        halves.append([])
        for text in order:
            own = int(trained.owner[text])
            if own in seen or len(seen) == 4:
                continue
            seen.append(own)
            found = [own, *order_of(trained.texts[text], trained.pictures, 2)]
            halves[-1].append([(i, i == own) for i in found])
    wanted = [[*best, *worst] for best, worst in zip_longest(*halves, fillvalue=[])]
    assert rows == wanted
