"""`python dataset.py --download [DIR]` calls download_flickr8k: fetches Flickr8k and unpacks it.

A broken download goes on where it stopped; sizes, digests and names are checked, not trusted."""

import hashlib
import re
import shutil
import stat
import struct
import zipfile
import zlib
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib import request

from tqdm import tqdm

from support.command import UserError, atomic_write

RELEASE = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/"
ARCHIVES = {  # the small one first: a network that does not work shows at once
    RELEASE + "Flickr8k_text.zip": "md5:bf6c1abcb8e4a833b7f922104de18627",
    RELEASE + "Flickr8k_Dataset.zip": "md5:f18a1e2920de5bd84dae7cf08ec78978",
}
ELSE = "get the files from https://cloud.tsinghua.edu.cn/f/6e5dcf45eac345649665/ or use --url"
TIMEOUT, CHUNK = 30, 1 << 18  # seconds of silence on the socket; bytes
MAX_BYTES, MAX_RATIO = 20 * 10**9, 200  # an archive that unpacks to more is a bomb
UNSAFE = r"^$|^/|[\\:\0-\x1f]|(^|/)\.\.(/|$)"  # a name that can leave the folder, on any system
BAR = {"unit": "B", "unit_scale": True, "disable": None}
BROKEN = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError)


def download_flickr8k(folder: Path, urls: list[str] | None = None) -> list[Path]:
    """Fetches the zip files, unpacks them into `folder` and returns the unpacked files.

    `urls` replace ARCHIVES; each may end in #sha256=HEX or #md5=HEX, which is then checked. An
    archive is not fetched again while `<folder>/.<name>.done` names the same url and all the files
    it lists are there. Raises UserError; the files unpacked before it stay whole.
    """
    folder, files = Path(folder), []
    for url, digest, name in [split_url(url) for url in urls or ARCHIVES]:
        log, part = folder / f".{name}.done", folder / f"{name}.zip.part"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            old, *names = log.read_text("utf-8", "replace").split("\n") if log.exists() else [""]
            if old != f"{url}#{digest}" or not all((folder / n).is_file() for n in names):
                fetch(url, part)
                names = unpack(part, folder, digest)
                with atomic_write(log) as temporary:
                    temporary.write_text("\n".join([f"{url}#{digest}", *names]), "utf-8")
                part.unlink()
        except BROKEN as error:  # if kept, it would be found whole and refused on every run
            part.unlink(missing_ok=True)
            raise UserError(f"{url} is refused and deleted: {error}; run again, {ELSE}") from error
        except OSError as error:
            raise UserError(f"cannot write into {folder}: {error.strerror or error}") from error
        files += [folder / name for name in names]
    return files


def split_url(url: str) -> tuple[str, str, str]:
    """Returns (address, "algorithm:hex" or "", archive's name without .zip); raises UserError."""
    address, _, fragment = url.strip().partition("#")
    digest = fragment.replace("=", ":", 1).lower() or ARCHIVES.get(address, "")
    if digest and not re.fullmatch("md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}", digest):
        raise UserError(f"{url!r}: what follows # has to be sha256= and 64 hex digits")
    if not re.match(r"https?://[^/]", address, re.I):
        raise UserError(f"cannot download {url!r}: only http:// and https:// urls are fetched")
    name = address.split("?")[0].split("://")[1].partition("/")[2].rstrip("/").split("/")[-1]
    name = re.sub(r"[^\w.-]|\.zip$", "", name, flags=re.I).lstrip(".")[:100]
    return address, digest, name or "archive"


def fetch(url: str, part: Path) -> None:
    """Downloads `url` to `part`, going on from the bytes already there; raises UserError."""
    have = part.stat().st_size if part.exists() else 0
    asked = {"User-Agent": "miniature-clip"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        reply = request.urlopen(request.Request(url, headers=asked), timeout=TIMEOUT)
    except (OSError, HTTPException, ValueError) as error:
        if not (have and getattr(error, "code", None) == 416):
            raise UserError(f"cannot download {url}: {str(error).strip('<>')}; {ELSE}") from error
        reply = error
    with reply:
        span = reply.headers.get("Content-Range", "")
        if reply.status == 416 and span == f"bytes */{have}":
            return  # nothing is left to ask for: the part is whole
        rest = re.match(rf"bytes {have}-\d+/(\d+)", span) if reply.status == 206 else None
        if have and not rest and reply.status != 200:  # not what was asked for: start afresh
            part.unlink()
            return fetch(url, part)
        have, total = (have, int(rest[1])) if have and rest else (0, reply.length)
        free, need = shutil.disk_usage(part.parent).free, 2 * (total or 0) - have
        if free < need:  # twice: photos unpack to about the size of their zip
            raise UserError(f"{part.parent} needs {need:,} free bytes and has {free:,}")
        bar = tqdm(total=total, initial=have, desc=part.stem, **BAR)
        try:
            with part.open("ab" if have else "wb") as sink, bar:
                while chunk := reply.read1(CHUNK):
                    bar.update(sink.write(chunk))
            if total not in (None, part.stat().st_size):
                raise OSError("the server stopped")
        except (OSError, HTTPException) as error:
            kept = f"{part.stat().st_size:,} of {total or 0:,} bytes came ({error}); they are kept"
            raise UserError(f"{url}: {kept}, run the same command again to resume") from error


def unpack(archive: Path, folder: Path, digest: str = "") -> list[str]:
    """Checks a zip file, unpacks it into `folder` and returns the files' names, relative to it.

    Raises UserError (a file cannot be written) or one of BROKEN (the archive is at fault).
    """
    state = hashlib.new(digest.split(":")[0] or "md5", usedforsecurity=False)
    with archive.open("rb") as file:
        while chunk := file.read(CHUNK):
            state.update(chunk)
    if digest and digest.split(":")[1] != state.hexdigest():
        raise ValueError(f"its digest is {state.hexdigest()}, not {digest}")
    entries, root = {}, folder.resolve()
    with zipfile.ZipFile(archive) as zipped:
        for info in zipped.infolist():
            name = str(PurePosixPath(info.filename))
            unsafe = re.search(UNSAFE, info.filename) or re.search(UNSAFE, info.orig_filename)
            skipped = info.filename.endswith(("/", ".DS_Store")) or name.startswith("__MACOSX/")
            inside = skipped or (folder / name).parent.resolve().is_relative_to(root)
            if unsafe or not inside or stat.S_ISLNK(info.external_attr >> 16) or info.flag_bits & 1:
                raise ValueError(f"its entry {name!r} is encrypted, a link or outside {folder}")
            entries |= {} if skipped else {name: info}  # of two with the same name the last
        size = sum(info.file_size for info in zipped.infolist())
        if size > min(MAX_BYTES, MAX_RATIO * archive.stat().st_size):
            raise ValueError(f"it unpacks to {size:,} bytes, too many for its size")
        with tqdm(total=size, desc=f"unpack {archive.stem}", **BAR) as bar:
            for path, info in ((folder / name, info) for name, info in entries.items()):
                if not path.is_file() or path.stat().st_size != info.file_size:
                    with atomic_write(path) as new, zipped.open(info) as raw, new.open("wb") as out:
                        shutil.copyfileobj(raw, out, CHUNK)  # stops at the declared size
                        if out.tell() != info.file_size:
                            raise ValueError(f"its entry {info.filename!r} is cut off")
                bar.update(info.file_size)
    return list(entries)
