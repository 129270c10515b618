"""What frozen blocks make of pictures and captions, computed once and kept in the cache.

train.py asks for the features of the training and dev images (in several views: whole, mirrored,
random crops) and trains only what stands above them; an epoch then takes seconds.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from captions import PAD
from cli import UserError
from dataset import Dataset
from images import DECODER, augment, cached_folder, check_space, resize, write_header
from models import CLIP
from ocr import READINGS, read_words

FEATURES = "1"  # part of every key: raise it when the same weights would give other features


def key_of(*parts: Any) -> str:
    """sha256 over weights (their bytes), arrays, and whatever JSON can write."""
    hashed = hashlib.sha256(FEATURES.encode())
    for part in parts:
        if isinstance(part, torch.Tensor):
            part = part.detach().cpu().contiguous().numpy()
        if isinstance(part, np.ndarray):
            hashed.update(f"{part.dtype} {part.shape}".encode() + part.tobytes())
        else:
            hashed.update(json.dumps(part, sort_keys=True).encode("utf-8", "surrogatepass"))
    return hashed.hexdigest()[:20]


def views_of(
    pixels: torch.Tensor, count: int, size: int, level: str = "none", first_row: int = 0
) -> Iterable[torch.Tensor]:
    """`count` views of a batch of pictures: whole, mirrored, then seeded crops of a `level`."""
    whole = resize(pixels, size)
    yield whole
    if count > 1:
        yield whole.flip(3).contiguous(memory_format=torch.channels_last)
    for view in range(2, count):
        random = torch.Generator().manual_seed(1_000_003 * view + first_row)
        yield augment(pixels, size, level, random)


def image_features(
    model: CLIP,
    dataset: Dataset,
    rows: np.ndarray,
    views: dict[int, int],
    config: dict[str, Any],
    cache: Path,
    name: str,
) -> dict[int, np.ndarray]:
    """The input of each image block of `views` but the first: float16 (len(rows), views, ...).

    `views` says of how many views each is kept. Feature maps lie channels last, (..., H, W, C), the
    layout that convolutions are fastest in.
    The key holds the weights of all blocks below, the preprocessing, and every picture's content.
    What is missing is computed in one pass.
    """
    views = {start: count for start, count in sorted(views.items()) if start}
    crops = [config["image_augment"]] if max(views.values(), default=0) > 2 else []
    preparation = key_of(
        *(model.pixel_mean, model.pixel_std, config["image_size"], config["precision"], crops),
        *(dataset.pixels.shape[1], [dataset.digests[row] for row in rows]),
        *(DECODER, config["image_tower"]),
    )
    folders = {}
    for start, count in views.items():
        below = torch.nn.Sequential(*model.image_blocks[:start]).state_dict().values()
        folders[start] = f"images-{key_of(preparation, start, count, *below)}"

    def build(missing: list[int], made: dict[int, Path]) -> None:
        """Each start gets a folder of its own, and the innermost call fills them all."""
        if missing:
            cached_folder(
                *(cache, folders[missing[0]]),
                lambda folder: build(missing[1:], {**made, missing[0]: folder}),
            )
            if not all((folder / "features.npy").exists() for folder in made.values()):
                raise UserError("another run has just made the same features; start this one again")
        elif made:
            with frozen(model):
                write_features(model, dataset, rows, views, config, made, name)

    build([start for start in folders if not (cache / folders[start]).is_dir()], {})
    return {
        start: np.load(cache / folder / "features.npy", mmap_mode="r")
        for start, folder in folders.items()
    }


@torch.inference_mode()
def write_features(
    model: CLIP,
    dataset: Dataset,
    rows: np.ndarray,
    views: dict[int, int],
    config: dict[str, Any],
    folders: dict[int, Path],
    name: str,
) -> None:
    """Runs the views of all pictures through the blocks once; fills features.npy of each start."""
    most = max(views[start] for start in folders)
    size, level = config["image_size"], config["image_augment"]
    bar = tqdm(total=len(rows), desc=f"{name} images", unit="image", leave=False, disable=None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(bar)
        files = {
            start: stack.enter_context((folder / "features.npy").open("wb"))
            for start, folder in folders.items()
        }
        for first in range(0, len(rows), 32):
            pixels = torch.from_numpy(dataset.pixels[rows[first : first + 32]])
            made: dict[int, list[np.ndarray]] = {start: [] for start in folders}
            shown = views_of(pixels.to(model.device), most, size, level, first)
            for view, images in enumerate(shown):
                x = model.normalised(images)
                wanted = [start for start in folders if view < views[start]]
                for place, block in enumerate(model.image_blocks[: max(wanted)], 1):
                    with model.lower_precision():
                        x = block(x)
                    if place in wanted:
                        made[place].append(stored(x))
            for start, parts in made.items():
                batch = np.stack(parts, 1)
                if first == 0:
                    shape = (len(rows), *batch.shape[1:])
                    check_space(folders[start], 2 * int(np.prod(shape)))
                    write_header(files[start], shape, np.float16)
                files[start].write(batch.tobytes())
            bar.update(len(pixels))


def text_features(
    model: CLIP, tokens: torch.Tensor, config: dict[str, Any], cache: Path, name: str
) -> np.ndarray:
    """The frozen text tower's features of padded tokens: float16 (len(tokens), width).

    Those of pretrained weights are cached; the key holds the weights and every token.
    """
    kind = [config["text_tower"], config.get("text_architecture"), config["precision"]]

    def compute() -> np.ndarray:
        lengths = (tokens != PAD).sum(1)
        order = lengths.argsort(stable=True)
        made = np.empty((len(tokens), model.text_width), np.float16)
        bar = tqdm(total=len(order), desc=f"{name} texts", unit="text", leave=False, disable=None)
        with bar, frozen(model), torch.inference_mode():
            for chosen in order.split(128):
                part = tokens[chosen, : lengths[chosen].max()].to(model.device)
                with model.lower_precision():
                    made[chosen] = stored(model.text_tower(part))
                bar.update(len(chosen))
        return made

    if config["text_weights"] == "none":  # a tower of this run alone
        return compute()
    key = key_of(*model.text_tower.state_dict().values(), tokens, kind)
    folder = cached_folder(
        cache, f"texts-{key}", lambda folder: np.save(folder / "features.npy", compute())
    )
    return np.load(folder / "features.npy", mmap_mode="r")


def reading_features(
    model: CLIP, dataset: Dataset, config: dict[str, Any], cache: Path, workers: int
) -> np.ndarray:
    """What is written on every picture: float16 (len(dataset.names), readings, text width).

    The text tower's features of each of ocr.READINGS, 0 where it is empty.
    """
    if not dataset.paths:
        raise UserError(f"--poster-text reads picture files, and {dataset.path} has none")
    good = [row for row, digest in enumerate(dataset.digests) if digest]
    paths, digests = [dataset.paths[i] for i in good], [dataset.digests[i] for i in good]
    read = read_words(paths, digests, cache, workers)
    texts = {
        (row, place): text
        for row, lines in zip(good, read, strict=True)
        for place, reading in enumerate(READINGS)
        if (text := reading(lines).strip())
    }
    made = np.zeros((len(dataset.names), len(READINGS), model.text_width), np.float16)
    if texts:
        cut = model.tokenizer.cut
        tokens = model.tokenizer(list(texts.values()))
        model.tokenizer.cut = cut  # which counts captions
        rows, places = np.array(list(texts)).T
        made[rows, places] = text_features(model, tokens, config, cache, "poster")
    lines, pictures = sum(map(len, read)), sum(map(bool, read))
    print(f"words: {lines:,} lines on {pictures:,} of {len(read):,} pictures")
    return made


@contextlib.contextmanager
def frozen(model: CLIP) -> Iterator[None]:
    """Every module in eval mode, but in the precision of training."""
    was_training = model.training
    model.eval().always_lower = True
    try:
        yield
    finally:
        model.always_lower = False
        model.train(was_training)


def stored(x: torch.Tensor) -> np.ndarray:
    """A batch of features as it is kept: float16, maps channels last. Raises UserError."""
    kept = (x.permute(0, 2, 3, 1) if x.ndim == 4 else x).half()
    if not kept.isfinite().all():
        raise UserError(
            "a frozen tower's features do not fit into 16 bits; train it with --views 0"
        )
    return kept.cpu().numpy()


def opened(x: torch.Tensor) -> torch.Tensor:
    """A batch of stored features as blocks take it: float32, maps (B, C, H, W)."""
    x = x.float()
    return x.permute(0, 3, 1, 2) if x.ndim == 4 else x


def window(maps: torch.Tensor, share: float, random: torch.Generator) -> torch.Tensor:
    """In every second batch a random window of the maps (B, C, H, W), `share` smaller each way.

    A crop of the picture, as far as frozen blocks allow one: cheap, and it keeps the blocks above
    from learning the places of things by heart.
    """
    side = max(1, round(maps.shape[-1] * (1 - share)))
    if maps.ndim != 4 or side >= maps.shape[-1] or torch.rand(1, generator=random) < 0.5:
        return maps
    top, left = torch.randint(maps.shape[-1] - side + 1, (2,), generator=random).tolist()
    cut = maps[:, :, top : top + side, left : left + side]
    return cut.contiguous(memory_format=torch.channels_last)
