"""Packs what is handed in: code, report and figures as they lie; no data, no weights.

    python report/handin.py --name "学号_姓名"        # writes 学号_姓名.zip

Only files that TAKEN names go in, so a photograph, a caption file or a checkpoint never does,
wherever it lies; figures that were drawn do, committed or not. Links are left out, with whatever
they lead to. The same files give the same bytes.
"""

import os
import re
import stat
import sys
import zipfile
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project above this folder

from support.command import HERE, Parser, UserError, atomic_write, run, warn

# What is taken, by its path in the project (a star stands for folders, too), and how it is counted;
# the first that fits decides, and what fits none, or "", stays out.
TAKEN = {
    "report/analysis/*/near_misses.csv": "",  # these two hold captions of the data
    "report/analysis/*/hubs.csv": "",
    "report/figures/*.png": "figures",
    "report/figures/*.jpg": "figures",
    "report/figures/*.svg": "figures",
    "checkpoints/*.png": "figures",
    "checkpoints/*/history.csv": "runs",
    "checkpoints/*.json": "runs",
    "checkpoints/*.txt": "runs",
    "report/*.csv": "report",
    "report/*.json": "report",
    "report/*.pdf": "report",
    "report/*.docx": "report",
    "*.md": "report",
    "tests/*.py": "tests",
    "*.py": "code",
    "*.toml": "code",
    "support/*.html": "code",
    "recipes/*.txt": "code",
    "requirements*.txt": "code",
    "Flickr8k/Flickr_8k.*Images.txt": "code",  # the official splits: names alone
    "LICENSE": "code",
    ".gitignore": "code",
    ".ci/run": "code",
}
ENVIRONMENTS = ("pyvenv.cfg", "conda-meta")  # what lies in the folder of a Python environment
NOT_OURS = ("__pycache__", "shared", "node_modules", "site-packages")
RESERVED = r"con|prn|aux|nul|com\d|lpt\d"  # no file of Windows may be called so


def kind_of(path: PurePosixPath) -> str:
    """How a file is counted, "" for one that is not handed in."""
    if path.name.startswith("._"):  # what macOS leaves beside a file on other disks
        return ""
    return next((kind for form, kind in TAKEN.items() if fnmatchcase(str(path), form)), "")


def is_foreign(folder: Path) -> bool:
    """A folder that is not looked into: hidden, or of Python or an environment."""
    hidden = folder.name.startswith(".") and folder.name != ".ci"
    inside = any((folder / name).exists() for name in ENVIRONMENTS)
    return hidden or inside or folder.name in NOT_OURS


def collect(root: Path) -> tuple[dict[PurePosixPath, str], Counter[str]]:
    """({path in the project: kind} in order, how many files are left out by their ending)."""
    found: dict[PurePosixPath, str] = {}
    left: Counter[str] = Counter()
    for folder, folders, names in os.walk(root):  # which follows no link
        here = Path(folder)
        folders[:] = [name for name in folders if not is_foreign(here / name)]
        for name in names:
            path = PurePosixPath((here / name).relative_to(root).as_posix())
            mode = (here / name).lstat().st_mode
            kind = kind_of(path) if stat.S_ISREG(mode) else ""
            if kind:
                found[path] = kind
            else:
                left["links" if stat.S_ISLNK(mode) else path.suffix.lower() or name] += 1
    return dict(sorted(found.items(), key=lambda item: str(item[0]))), left


def pack(out: Path, root: Path, paths: list[PurePosixPath], name: str) -> None:
    """Writes the archive, all of it in a folder `name`. Raises UserError."""
    with atomic_write(out) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for path in paths:
            entry = zipfile.ZipInfo(f"{name}/{path}", (1980, 1, 1, 0, 0, 0))  # not the file's date
            entry.create_system = 3  # the modes below are those of Unix, wherever this runs
            entry.external_attr = (0o100755 if str(path) == ".ci/run" else 0o100644) << 16
            try:
                content = (root / path).read_bytes()
                archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
            except (OSError, UnicodeEncodeError) as error:
                raise UserError(f"cannot pack {str(path)!a}: {error}") from error


def check_name(name: str) -> None:
    """Raises UserError for a name that is no file's everywhere."""
    odd = re.search(r'[\x00-\x1f\x7f/\\:*?"<>|\ud800-\udfff]', name)
    edges = name.strip(" .") != name or name.startswith("-")
    if not name or odd or edges or re.fullmatch(RESERVED, name.split(".")[0], re.IGNORECASE):
        text = 'letters, digits, _ and - as in 2026012345_Name; no / \\ : * ? " < > |'
        raise UserError(f"--name {name!r} cannot be a file's name everywhere; {text}")
    if len(name.encode()) > 200:
        raise UserError(f"--name is of {len(name.encode())} bytes; at most 200 fit every disk")


def check_out(out: Path) -> None:
    """Raises UserError where the archive would take the place of something else."""
    if out.suffix.lower() != ".zip":
        raise UserError(f"--out {out}: the name has to end in .zip")
    if out.exists() and not zipfile.is_zipfile(out):
        raise UserError(f"--out {out} is there and is no zip; name another")


def size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def main(argv: list[str]) -> None:
    parser = Parser(prog="handin.py", description="Packs code, report and figures; no data.")
    text = "student number and name as the course asks, such as 学号_姓名: file and folder in it"
    parser.add_argument("--name", required=True, help=text)
    parser.add_argument("--out", type=Path, metavar="FILE.zip", help="(default: NAME.zip)")
    options = parser.parse_args(argv)
    name = options.name.removesuffix(".zip")
    check_name(name)
    out = options.out or Path(f"{name}.zip")
    check_out(out)
    found, left = collect(HERE)
    pack(out, HERE, list(found), name)
    for kind in dict.fromkeys(filter(None, TAKEN.values())):
        files = [path for path, other in found.items() if other == kind]
        total = sum((HERE / path).stat().st_size for path in files)
        print(f"{kind:8} {len(files):5,} files {size(total):>10}")
    if left:
        print("left out: " + ", ".join(f"{n:,} {what}" for what, n in left.most_common(8)))
    if not any(str(path).startswith("checkpoints/") for path in found if path.suffix == ".png"):
        warn("no figure of a run is there: python visualize.py draws them, also the photographs")
    print(f"wrote {out}: {len(found):,} files, {size(out.stat().st_size)}")


if __name__ == "__main__":
    run(main)
