"""What the wiring tests recompute by plain loops, from files alone; it knows no script."""

import csv
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import photo
from PIL import Image
from torch.nn import functional as F

Spec = dict[str, tuple[str, list[str]]]  # image name -> (split, captions)


def write_folder(folder: Path, images: Spec, picture: Callable[[int], Image.Image] = photo) -> Path:
    """A folder in Karpathy's layout, whose splits and numbers of captions the test decides."""
    (folder / "images").mkdir(parents=True)
    for number, name in enumerate(images):
        picture(number).save(folder / "images" / name)
    entries = [
        {"filename": name, "split": split, "sentences": [{"raw": text} for text in captions]}
        for name, (split, captions) in images.items()
    ]
    content = json.dumps({"images": entries}, ensure_ascii=False)
    (folder / "dataset.json").write_text(content, "utf-8")
    return folder


def write_bert(folder: Path) -> Path:
    """A random BERT of two small layers in the hub's format; it knows single letters and `dog`."""
    transformers = pytest.importorskip("transformers")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, "dog", "##s"]
    words += [f"##{letter}" for letter in letters if letter != "s"]
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
    return folder


def read_history(run: Path) -> list[dict[str, float]]:
    with (run / "history.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


# ------------------------------------------------------------------------------ embeddings


def picture_input(path: Path, transform: dict) -> torch.Tensor:
    """A picture file as the model takes it: (1, 3, S, S) in [0, 1]."""
    side = transform["stored_size"]
    image = Image.open(path).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    if side == transform["image_size"]:
        return pixels
    return F.interpolate(pixels, (transform["image_size"],) * 2, mode="bilinear", antialias=True)


def tokens_of(caption: str, vocabulary: list[str], most: int = 40) -> torch.Tensor:
    """A caption in the numbers of a trained vocabulary: (1, L)."""
    words = re.findall(r"'?\w+|[^\w\s]", caption.lower())[: most - 2]
    known = {word: number for number, word in enumerate(vocabulary)}
    unknown = known["<unk>"]
    return torch.tensor([[2, *(known.get(word, unknown) for word in words), 3]])


@torch.no_grad()
def embed_pictures(model: torch.nn.Module, content: dict, paths: list[Path]) -> np.ndarray:
    """Unit-length embeddings in float64, a picture file at a time."""
    made = []
    for path in paths:
        whole = picture_input(path, content["transform"])
        views = [whole, whole.flip(3)] if content["transform"]["mirror"] else [whole]
        mean = sum(model.encode_image(view).double()[0] for view in views)
        made.append((mean / mean.norm()).numpy())
    return np.stack(made)


@torch.no_grad()
def embed_captions(model: torch.nn.Module, content: dict, captions: list[str]) -> np.ndarray:
    """Unit-length embeddings in float64, a caption at a time."""
    tokens = (tokens_of(caption, content["vocabulary"]) for caption in captions)
    made = [model.encode_text(each).double()[0] for each in tokens]
    return np.stack([(each / each.norm()).numpy() for each in made])


# -------------------------------------------------------------------------------- figures


def info_nce_loop(
    images: np.ndarray, texts: np.ndarray, scale: float, owner: list[int] | None = None
) -> float:
    """InfoNCE of pairs (rows of both), in float64; pairs of one `owner` are no negatives."""
    owner, total = owner or list(range(len(images))), 0.0
    for left, right in ((images, texts), (texts, images)):
        for i in range(len(left)):
            scores = [scale * float(left[i] @ right[j]) for j in range(len(right))]
            rivals = [scores[j] for j in range(len(right)) if owner[j] != owner[i]]
            total += math.log(sum(math.exp(x - scores[i]) for x in [scores[i], *rivals]))
    return total / (2 * len(images))


def ranks_loop(
    images: np.ndarray, texts: np.ndarray, owner: np.ndarray
) -> tuple[list[int], list[int]]:
    """Ranks from 1, image to text and text to image; a tie (within rounding) is lost."""
    cosines, tie = images.astype(np.float64) @ texts.astype(np.float64).T, 1e-12
    i2t, t2i = [], []
    for image, row in enumerate(cosines):
        best = max(row[owner == image])
        i2t.append(1 + sum(bool(x >= best - tie) for x in row[owner != image]))
    for text, column in enumerate(cosines.T):
        others = np.delete(column, owner[text])
        t2i.append(1 + sum(bool(x >= column[owner[text]] - tie) for x in others))
    return i2t, t2i


def figures_of(i2t: list[int], t2i: list[int]) -> dict[str, float]:
    """The recalls and ranks that history.csv and evaluate.py's JSON name."""
    made = {}
    for way, ranks in (("i2t", i2t), ("t2i", t2i)):
        for k in (1, 5, 10):
            made[f"{way}_r{k}"] = 100 * sum(rank <= k for rank in ranks) / len(ranks)
        made[f"{way}_medr"] = float(np.median(ranks))
        made[f"{way}_meanr"] = sum(ranks) / len(ranks)
    made["rsum"] = sum(made[f"{way}_r{k}"] for way in ("i2t", "t2i") for k in (1, 5, 10))
    made["mean_recall"] = made["rsum"] / 6
    return made


def split_figures(images: np.ndarray, texts: np.ndarray, owner: np.ndarray) -> dict[str, float]:
    """All figures of a split, the top-1 of N x N with first captions among them."""
    made = figures_of(*ranks_loop(images, texts, owner))
    first = [list(owner).index(image) for image in range(len(images))]
    i2t, t2i = ranks_loop(images, texts[first], np.arange(len(images)))
    for way, ranks in (("i2t", i2t), ("t2i", t2i)):
        made[f"top1_{way}"] = 100 * sum(rank == 1 for rank in ranks) / len(ranks)
    return made


def interval_loop(hits: list[np.ndarray], resamples: int = 1000) -> list[float]:
    """95% interval of a recall; `hits[i]` tells for each query of image i whether it was found."""
    generator, drawn = np.random.default_rng(0), []
    found, asked = np.array([h.sum() for h in hits]), np.array([len(h) for h in hits])
    for _ in range(resamples):
        images = generator.integers(len(hits), size=len(hits))
        drawn.append(100 * found[images].sum() / asked[images].sum())
    return np.percentile(drawn, [2.5, 97.5]).tolist()


def rate_share(step: int, steps: int, warmup: int, schedule: str) -> float:
    """The share of the peak learning rate at a step (from 0) of a run."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / (steps - warmup)
    shapes = {
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "linear": 1 - done,
        "step": 1.0 if done < 0.5 else 0.1 if done < 0.8 else 0.01,
        "constant": 1.0,
    }
    return shapes[schedule]
