"""From picture files to pixels: decoded once, into a cache.

sources/folder.py calls `cached_pixels` on the files that it found.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from sources.opening import open_picture
from support.command import UserError, out_of_memory, warn
from support.stopping import undone
from support.workers import in_processes

Decoded = tuple[np.ndarray | None, str]  # of one file, see `try_decode`
DECODER = "1"  # part of every cache key: raise it when `decode` gives other pixels
DECODE_IN_PROCESS = 200  # fewer pictures than this are decoded sooner than processes start


def decode(source: Path | bytes, size: int) -> np.ndarray:
    """A picture file, `squashed`. Raises as `open_picture` does."""
    return squashed(open_picture(source, 2 * size), size)


def squashed(image: Image.Image, size: int) -> np.ndarray:
    """A picture as models take it, whatever its proportions: uint8 (size, size, 3)."""
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def try_decode(path: Path, size: int) -> Decoded:
    """Decodes one file: (pixels, sha256 of its bytes), or (None, why it cannot be read)."""
    try:
        data = path.read_bytes()
        return decode(data, size), hashlib.sha256(data).hexdigest()[:32]
    except Exception as error:  # a hostile picture may raise anything inside Pillow
        reason = "not a picture" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        return None, " ".join(reason.split())[:80] or type(error).__name__


def cached_folder(cache: Path, name: str, build: Callable[[Path], None]) -> Path:
    """Returns `cache`/`name`, made by `build(temporary folder)` unless it is there already.

    The folder appears whole or not at all. When two runs build it at once, the first wins and the
    second takes the first one's. Raises UserError when the cache cannot be written.
    """
    folder = cache / name
    try:
        if folder.is_dir():
            return folder
        cache.mkdir(parents=True, exist_ok=True)
        for left in cache.glob(".building-*"):  # by a run that was killed, over a day ago
            with contextlib.suppress(FileNotFoundError):  # another run has just finished it
                if time.time() - left.stat().st_mtime > 86_400:
                    shutil.rmtree(left, ignore_errors=True)
        scratch = tempfile.TemporaryDirectory("", ".building-", cache, ignore_cleanup_errors=True)
        with undone(scratch.cleanup):
            new = Path(scratch.name) / name
            new.mkdir()
            build(new)
            for file in new.iterdir():  # whole on disk before it can be found: power may fail
                with file.open("rb+") as written:
                    os.fsync(written.fileno())
            try:
                new.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write the cache {cache}: {reason}; give --cache DIR") from error
    return folder


# What reading a damaged file raises: one that is cut off, empty, half copied, or gone.
DAMAGED = (OSError, ValueError, EOFError, LookupError, TypeError)


def cached(
    cache: Path, name: str, build: Callable[[Path], None], read: Callable[[Path], Any]
) -> Any:
    """What `read` gives of the folder `cache`/`name`, which is built unless it is there already.

    A damaged one (by a power cut, or by what cleans up temporary folders) is said and built anew.
    Raises UserError when the cache cannot be written.
    """
    folder = cached_folder(cache, name, build)
    try:
        return read(folder)
    except DAMAGED as error:
        if out_of_memory(error):  # the cache is whole, and stays
            raise
        reason = " ".join(str(error).split())[:80] or type(error).__name__
        warn(f"the cache {folder} is damaged ({reason}); it is built anew")
    shutil.rmtree(folder, ignore_errors=True)
    folder = cached_folder(cache, name, build)
    try:
        return read(folder)
    except DAMAGED as error:
        raise UserError(f"cannot read the cache {folder}: {error}; give --cache DIR") from error


def read_array(folder: Path, name: str = "features.npy") -> np.ndarray:
    """An array that `cached_folder` holds, memory-mapped."""
    return np.load(folder / name, mmap_mode="r")


class PixelCache(NamedTuple):
    """The decoded pictures of some files."""

    pixels: np.ndarray  # uint8 (N, size, size, 3), memory-mapped
    digests: list[str | None]  # sha256 of each file, None for one that cannot be read
    failed: dict[int, str]  # and why it cannot


def cached_pixels(paths: list[Path], size: int, cache: Path, workers: int) -> PixelCache:
    """Decodes `paths` to `size` x `size` pixels, or finds them decoded.

    The key holds each file's path, length and times, so a changed file means a new cache, which
    replaces the old one.
    """
    names, state = hashlib.sha256(f"{DECODER} {size}".encode()), hashlib.sha256()
    for path in paths:
        stat = path.stat()
        names.update(f"{path}\n".encode("utf-8", "surrogateescape"))
        state.update(f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}\n".encode())
    group = f"pixels-{size}-{names.hexdigest()[:12]}"
    build = partial(write_pixels, paths, size, workers)
    name = f"{group}-{state.hexdigest()[:12]}"
    kept = cached(cache, name, build, partial(read_pixels, count=len(paths)))
    for old in cache.glob(f"{group}-*"):
        if old.name != name:
            shutil.rmtree(old, ignore_errors=True)
    return kept


def read_pixels(folder: Path, count: int) -> PixelCache:
    index = json.loads((folder / "index.json").read_text("utf-8"))
    failed = {int(row): reason for row, reason in index["failed"].items()}
    pixels, digests = read_array(folder, "pixels.npy"), index["digests"]
    if len(pixels) != count or len(digests) != count:
        raise ValueError(f"{len(pixels)} pictures and {len(digests)} digests, not {count} of each")
    return PixelCache(pixels, digests, failed)


def write_pixels(paths: list[Path], size: int, workers: int, folder: Path) -> None:
    """Fills pixels.npy and index.json; the parent writes, so a full disk is an ordinary error."""
    digests, failed, blank = [], {}, np.zeros((size, size, 3), np.uint8)
    with (folder / "pixels.npy").open("wb") as file:
        write_header(file, (len(paths), size, size, 3), np.uint8)
        for row, (pixels, digest_or_reason) in enumerate(decode_all(paths, size, workers)):
            if pixels is None:
                failed[row] = digest_or_reason
            digests.append(None if row in failed else digest_or_reason)
            file.write((blank if row in failed else pixels).tobytes())
    (folder / "index.json").write_text(json.dumps({"digests": digests, "failed": failed}), "utf-8")


def write_header(file: io.BufferedWriter, shape: tuple[int, ...], kind: type) -> None:
    """Begins an .npy file in a folder that `cached_folder` builds; its rows are written after it.

    Raises UserError when the disk has no room for them.
    """
    cache = Path(file.name).parents[2]
    needed, free = math.prod(shape) * np.dtype(kind).itemsize, shutil.disk_usage(cache).free
    if free < needed + 2**26:
        raise UserError(
            f"the cache needs {needed / 1e6:.0f} MB, the disk of {cache} has {free / 1e6:.0f} MB "
            "free, of which 64 MB stay; give --cache DIR on another, or a smaller --image-size"
        )
    head = {"descr": np.dtype(kind).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, head)


def decode_quietly(paths: Sequence[Path], size: int, workers: int) -> Iterable[Decoded]:
    """Decodes in order, in `workers` processes where there are pictures enough."""
    work = partial(try_decode, size=size)
    alone = workers < 2 or len(paths) < DECODE_IN_PROCESS
    return map(work, paths) if alone else in_processes(work, paths, workers, 32)


def decode_all(paths: list[Path], size: int, workers: int) -> Iterable[Decoded]:
    """The same behind a bar."""
    pictures = decode_quietly(paths, size, workers)
    return tqdm(pictures, "decoding", len(paths), unit="image", leave=False, disable=None)
