"""Shared by the tests: small photo folders, tiny runs, and the real Flickr8k where it is."""

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: threads only wait for one another

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {
    "red": (200, 30, 30),
    "green": (30, 160, 60),
    "blue": (30, 60, 200),
    "white": (240, 240, 240),
    "black": (15, 15, 15),
    "yellow": (240, 220, 40),
}
THINGS = ("dog", "ball", "car", "tree", "boat", "bird")
FLICKR8K = Path(os.environ.get("FLICKR8K", ROOT.parent / "shared" / "Flickr8k"))


def pytest_collection_modifyitems(items):
    if not FLICKR8K.is_dir():
        for item in items:
            if "flickr8k" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=f"no {FLICKR8K}"))


@pytest.fixture(scope="session")
def flickr8k() -> Path:
    return FLICKR8K


def photo(number: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A picture of one colour with a bar of another and noise; `number` decides them."""
    generator = np.random.default_rng(number)
    colours = list(COLOURS.values())
    pixels = np.empty((size[1], size[0], 3), np.float64)
    pixels[:] = colours[number % 6]
    pixels[: 8 + 4 * (number // 6 % 6)] = colours[(number // 6 + number + 1) % 6]
    return Image.fromarray(
        (pixels + generator.normal(0, 6, pixels.shape)).clip(0, 255).astype("uint8")
    )


def caption(number: int, which: int) -> str:
    words = list(COLOURS)
    top, ground = words[(number // 6 + number + 1) % 6], words[number % 6]
    thing = THINGS[number // 6 % 6]
    return (
        f"A {top} {thing} above {ground} ground .",
        f"{ground} ground, under a {top} {thing}",
        f'The {thing} is "{top}" , not {ground}',
        f"a {thing} in {top} over {ground}",
        f"{top} {thing} ; {ground} below",
    )[which]


def names(count: int) -> list[str]:
    return [f"photo_{number:03d}.jpg" for number in range(count)]


def write_photos(folder: Path, count: int = 40) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names(count)):
        photo(number).save(folder / name, quality=92)
    return names(count)


def pairs(count: int) -> list[tuple[str, str]]:
    return [(name, caption(n, k)) for n, name in enumerate(names(count)) for k in range(5)]


def write_kaggle(folder: Path, count: int = 40, header: str | None = "image,caption") -> Path:
    """A folder in Kaggle's layout: images/ and captions.txt."""
    write_photos(folder / "images", count)
    with (folder / "captions.txt").open("w", newline="", encoding="utf-8") as file:
        if header is not None:
            file.write(header + "\n")
        csv.writer(file, lineterminator="\n").writerows(pairs(count))
    return folder


GENRES = ("Drama", "Comedy|Romance", "Western", "Horror|Thriller", "")
FILMS = ("night", "river", "winter", "garden", "soldier", "teacher", "island", "train")


def film(number: int) -> tuple[str, str, str, str]:
    """(id, title, intro, genres) of a made-up film; the intros of 0, 8, 16 ... hold their title."""
    word, other = FILMS[number % 8], FILMS[number // 8 % 8]
    title = f"The {word} and {number} {other}s".title()
    named = f'In "{title}" ' if number % 8 == 0 else ""
    intro = f"{named}{number} people meet a {word} by the {other}, and one of them stays."
    return str(10 + number), f"{title} (1999)", intro, GENRES[number % 5]


def write_posters(folder: Path, count: int = 40, place: str = "posters") -> Path:
    """A folder in the posters' layout: each poster shows its title; two thirds are in train.txt."""
    (folder / place).mkdir(parents=True)
    films = [film(number) for number in range(count)]
    for number, (name, title, _, _) in enumerate(films):
        poster = photo(number, (200, 300))
        draw = ImageDraw.Draw(poster)
        draw.rectangle((0, 120, 200, 200), fill="white")
        for row, line in enumerate(textwrap.wrap(title.partition(" (")[0], 14)):
            draw.text((10, 125 + 24 * row), line, "black", ImageFont.load_default(20))
        poster.save(folder / place / f"{name}.{'png' if number % 5 == 4 else 'jpg'}", quality=95)
    with (folder / "movies.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "title", "intro", "genres"), *films])
    train = [film[0] for number, film in enumerate(films) if number % 3 != 2]
    (folder / "train.txt").write_text("\n".join(train) + "\n", "utf-8")
    return folder


@pytest.fixture
def films(tmp_path: Path) -> Path:
    return write_posters(tmp_path / "films")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_kaggle(tmp_path / "photos")


@pytest.fixture(scope="session")
def photo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, made once; only for tests that leave it as it is."""
    return write_kaggle(tmp_path_factory.mktemp("data") / "photos")


def write_bert(folder: Path, **changes: object) -> Path:
    """A random BERT of two small layers in the hub's format; `changes` are its config.json's."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *"abcdefghijklmnopqrstuvwxyz", "dog", "##s"]
    shape = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=48,
    )
    torch.manual_seed(3)
    transformers.BertModel(shape).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")
    known = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(known))
    return folder


TINY = (  # one run: the default is a recipe of several
    *("--recipe", "plain"),
    *("--image-size", "32", "--text-width", "32", "--text-layers", "1", "--embed-dim", "32"),
    *("--batch-size", "16", "--lr", "0.001", "--precision", "fp32", "--workers", "0"),
)


def script(*words: object, timeout: float = 120, **options) -> subprocess.CompletedProcess[str]:
    """Runs a script of the project as a user would."""
    return subprocess.run(
        [sys.executable, str(ROOT / str(words[0])), *map(str, words[1:])],
        capture_output=True,
        text=True,
        timeout=timeout,
        **options,
    )


@pytest.fixture(scope="session")
def tiny_run(photo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of three epochs on `photo_data`."""
    import train

    out = tmp_path_factory.mktemp("runs") / "tiny"
    cache = tmp_path_factory.mktemp("cache")
    words = ["--data", photo_data, "--out", out, "--epochs", 3, "--cache", cache, *TINY]
    assert train.main([str(word) for word in words]) == 0
    return out


def listed(folder: Path) -> list[str]:
    """The names in a folder, those of hidden files too."""
    return sorted(path.name for path in folder.iterdir())


SMALL = {"data": "shapes", "image_size": 32, "text_width": 32, "text_layers": 2, "embed_dim": 16}
WORDS = [f"word{number}" for number in range(30)]  # of `small_model`'s vocabulary; the first is 4


def small_options(**flags: object) -> argparse.Namespace:
    """The options of a run with a small model, as train.py would settle them."""
    import train
    from support.options import resolve

    return resolve(train.build_parser(), {**SMALL, **flags}, {})


def small_model(**flags: object):
    """A CLIP of random weights for pictures of 32 pixels and texts of `WORDS`."""
    from dataset import Tokenizer
    from models import build_model

    return build_model(small_options(**flags), Tokenizer([*Tokenizer.SPECIAL, *WORDS], 12))


# ------------------------------------------------------------------------------- whole runs


def run_train(*words: object) -> int:
    """train.py in this process; an exit code. Raises UserError."""
    import train

    return train.main([str(word) for word in words])


def start(data: Path, out: Path, cache: Path, *more: object) -> list[str]:
    """The words of a tiny run."""
    return [str(w) for w in ("--data", data, "--out", out, "--cache", cache, *TINY, *more)]


def flat(content: object, place: str = "") -> dict[str, object]:
    """Every leaf of a checkpoint by its place, so that two can be compared bit by bit."""
    if isinstance(content, dict):
        items = [(str(key), value) for key, value in content.items()]
    elif isinstance(content, (list, tuple)):
        items = [(str(key), value) for key, value in enumerate(content)]
    else:
        return {place: content}
    leaves: dict[str, object] = {}
    for key, value in items:
        leaves |= flat(value, f"{place}/{key}")
    return leaves


def assert_same_run(one: Path, other: Path) -> None:
    """Two checkpoints have the same bits in everything but the clock."""
    import torch

    from support.checkpoint import load_checkpoint

    first, second = (flat(load_checkpoint(path)) for path in (one, other))
    assert first.keys() == second.keys()
    for place, value in first.items():
        if place.endswith(("/seconds", "/minutes", "/images_per_second")):
            continue
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[place]), place
        else:
            assert value == second[place], place


@pytest.fixture
def signalled(monkeypatch):
    """signalled(n, signum): the n-th checkpoint from here on is half written when a signal comes.

    It stands in for a user who stops a run there, or for a kill; returns the list of the calls.
    """
    import torch

    def stop(signum: int, _frame: object) -> None:
        raise KeyboardInterrupt(128 + signum)

    def prepare(count: int, signum: int = signal.SIGINT) -> list[Path]:
        real, calls = torch.save, []

        def save(content: object, path: Path) -> None:
            calls.append(Path(path))
            if len(calls) == count:
                Path(path).write_bytes(b"half")
                earlier = signal.signal(signum, stop)  # as a script has it
                try:
                    signal.raise_signal(signum)
                finally:
                    signal.signal(signum, earlier)
            real(content, path)

        monkeypatch.setattr(torch, "save", save)
        return calls

    yield prepare


@pytest.fixture(scope="session")
def resnet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a ResNet18 in the format of torchvision's."""
    import torch
    import torchvision

    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), path)
    return path
