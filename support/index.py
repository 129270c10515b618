"""Embeddings kept in --cache under what was embedded, so that only new or changed files are.

search.py asks for the pictures of a folder or of a data set, and for captions; each model has its
files, named for its weights. What is gone drops out; what was embedded before a stop is kept.
"""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from dataset import Captions, Pixels
from sources.pictures import DECODER, decode_quietly
from support.command import atomic_write
from support.embedding import embed_images, embed_texts

if TYPE_CHECKING:
    from argparse import Namespace

    from dataset import CaptionedImages
    from models import CLIP

BLOCK = 256  # pictures decoded and embedded at once
SAVE_EVERY = 60.0  # seconds: what a kill or a power cut can lose
UNREADABLE = (OSError, ValueError, LookupError, TypeError, zipfile.BadZipFile, EOFError)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def model_digest(model: CLIP, config: dict[str, Any]) -> str:
    """A name for what a model makes of pictures and texts: that of its weights and flags."""
    about = [DECODER, model.transform, model.tokenizer.vocabulary, sorted(config.items())]
    state = hashlib.sha256(repr(about).encode("utf-8", "surrogatepass"))
    for name, weights in model.state_dict().items():
        state.update(name.encode())
        state.update(weights.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return state.hexdigest()[:16]


def file_digests(paths: list[Path], kept: Path) -> list[str]:
    """sha256 of each file, "" for one that cannot be read; unchanged ones are not read again.

    `kept` remembers length and times of the files: no change of a file leaves them all alone.
    """
    try:
        known = json.loads(kept.read_text("utf-8"))
    except UNREADABLE:  # none yet, or a damaged one
        known = {}
    files, fresh = {}, 0
    for path in tqdm(paths, "reading", unit="picture", leave=False, disable=None):
        try:
            stat = path.stat()
            state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
            entry = known.get(str(path), [])
            if entry[:3] != state:
                entry, fresh = [*state, hashlib.sha256(path.read_bytes()).hexdigest()[:32]], 1
            files[str(path)] = entry
        except OSError:
            continue
    if fresh or len(files) != len(known):
        with atomic_write(kept) as temporary:
            temporary.write_text(json.dumps(files), "utf-8")
    return [files[str(path)][3] if str(path) in files else "" for path in paths]


def read_kept(kept: Path) -> tuple[dict[str, int], np.ndarray]:
    """{digest: row} and the embeddings (rows, D) of a file; nothing where there is none."""
    try:
        with np.load(kept) as content:
            names, embeddings = content["digests"].tolist(), content["embeddings"]
        if embeddings.dtype == np.float32 and embeddings.shape[:1] == (len(names),):
            return {name.decode(): row for row, name in enumerate(names)}, embeddings
    except UNREADABLE:  # none yet, or a damaged one
        pass
    return {}, np.empty((0, 0), np.float32)


def write_kept(kept: Path, digests: list[str], embeddings: np.ndarray) -> None:
    with atomic_write(kept) as temporary, temporary.open("wb") as file:
        np.savez(file, digests=np.array(digests, "S32"), embeddings=embeddings)


def embeddings_of(
    digests: list[str], kept: Path, embed: Callable[[list[int]], np.ndarray], what: str
) -> np.ndarray:
    """Embeddings (len(digests), D), float32; `embed` makes those of the positions not in `kept`.

    Equal digests are embedded once. Whatever `embed` is stopped by, what it has made is kept.
    """
    known, earlier = read_kept(kept)
    first_of = {name: position for position, name in reversed([*enumerate(digests)])}
    missing = [first_of[name] for name in dict.fromkeys(digests) if name not in known]
    unique = [name for name in first_of if name in known]
    parts = [earlier[[known[name] for name in unique]]] if unique else []
    if missing or len(unique) != len(known):
        saved = time.monotonic()
        try:
            with tqdm(total=len(missing), desc=what, leave=False, disable=None) as bar:
                for start in range(0, len(missing), BLOCK):
                    block = missing[start : start + BLOCK]
                    parts.append(embed(block))
                    unique += [digests[position] for position in block]
                    bar.update(len(block))
                    if time.monotonic() > saved + SAVE_EVERY:
                        write_kept(kept, unique, np.concatenate(parts))
                        saved = time.monotonic()
        finally:
            if parts:
                write_kept(kept, unique, np.concatenate(parts))
    row_of = {name: row for row, name in enumerate(unique)}
    return np.concatenate(parts)[[row_of[name] for name in digests]]


def embed_files(model: CLIP, workers: int, paths: Sequence[Path]) -> np.ndarray:
    """Embeddings (len(paths), D) of picture files; those of one that cannot be read are NaN."""
    size = model.transform["stored_size"]
    pictures = [pixels for pixels, _ in decode_quietly(paths, size, workers)]
    blank = np.zeros((size, size, 3), np.uint8)
    pixels = np.stack([blank if picture is None else picture for picture in pictures])
    embeddings = embed_images(model, Pixels(pixels, np.arange(len(pixels)), None), len(pixels))
    embeddings[[picture is None for picture in pictures]] = np.nan
    return embeddings


def folder_embeddings(
    models: dict[str, CLIP], folder: Path, paths: list[Path], options: Namespace
) -> dict[str, np.ndarray]:
    """What each model (by its digest) makes of a folder's pictures: (N, D), NaN where unread."""
    group = options.cache / f"search-{digest(str(folder))[:12]}"
    digests, found = file_digests(paths, group.with_suffix(".json")), {}
    for name, model in models.items():

        def embed(block: list[int], model: CLIP = model) -> np.ndarray:
            return embed_files(model, options.workers, [paths[i] for i in block])

        kept = group.with_name(f"{group.name}-{name}.npz")
        found[name] = embeddings_of(digests, kept, embed, "embedding pictures")
    return found


def dataset_embeddings(
    models: dict[str, CLIP], dataset: CaptionedImages, rows: np.ndarray, options: Namespace
) -> dict[str, np.ndarray]:
    """What each model (by its digest) makes of some images of a data set: (rows, D)."""
    place, found = digest(f"{Path(dataset.path).resolve()} {options.split}")[:12], {}
    for name, model in models.items():
        size = model.transform["stored_size"]
        pixels = dataset.at_size(size, options.cache, options.workers).pixels

        def embed(block: list[int], model: CLIP = model, pixels: np.ndarray = pixels) -> np.ndarray:
            return embed_images(model, Pixels(pixels, rows[block], None), len(block))

        digests = [dataset.digests[row] for row in rows]
        kept = options.cache / f"search-{place}-{name}.npz"
        found[name] = embeddings_of(digests, kept, embed, "embedding pictures")
    return found


def text_embeddings(
    models: dict[str, CLIP], texts: list[str], purpose: str, options: Namespace
) -> dict[str, np.ndarray]:
    """What each model (by its digest) makes of texts: (texts, D). `purpose` names their file."""
    digests, found = [digest(text) for text in texts], {}
    for name, model in models.items():

        def embed(block: list[int], model: CLIP = model) -> np.ndarray:
            return embed_texts(model, Captions([texts[i] for i in block], model.tokenizer))

        kept = options.cache / f"search-{purpose}-{name}.npz"
        found[name] = embeddings_of(digests, kept, embed, "embedding captions")
    return found
