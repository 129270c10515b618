"""The hand-in: what an archive holds, that it holds nothing else and is always the same."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from report import handin
from support.command import HERE, UserError

OURS = {
    "README.md", "README.zh.md", "LICENSE", "train.py", "requirements.txt", ".gitignore", ".ci/run",
    "recipes/best.txt", "tests/test_x.py", "support/page.html", "Flickr8k/README.md",
    "Flickr8k/Flickr_8k.testImages.txt", "report/report.zh.md", "report/runs.csv",
    "report/figures/curves.png", "report/figures/shapes/grid_best_worst.png",
    "report/analysis/best/groups.csv", "report/words.json", "checkpoints/README.md",
    "checkpoints/a/history.csv", "checkpoints/a/config.json", "checkpoints/a/curves.png",
    "checkpoints/a/figures/grid_text_to_image.png", "checkpoints/b/lite2/figures/tsne.png",
}  # fmt: skip
OTHERS = {
    "Flickr8k/images/1.jpg", "Flickr8k/captions.txt", "Flickr8k/test_captions.txt", "Posters/1.png",
    "Posters/movies.csv", "mine/a.jpg", "mine/captions.csv", "mine/dataset.json", "photo.png",
    "checkpoints/a/best.pt", "checkpoints/a/last.pt", "checkpoints/a/figures/embeddings.npz",
    "checkpoints/a/predictions.csv", "report/analysis/best/near_misses.csv",
    "report/analysis/best/hubs.csv", ".cache/images/0.bin", ".venv/lib/a.py", ".git/config.toml",
    "env/pyvenv.cfg", "env/lib/b.py", "conda/conda-meta/x.json", "conda/c.py", "old.zip",
    "__pycache__/train.py", "support/._command.py", "shared/tests/d.py", ".env", "notes.txt",
}  # fmt: skip


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project with files of every kind, each holding its own name."""
    root = tmp_path / "project"
    for name in OURS | OTHERS:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name, "utf-8")
    monkeypatch.setattr(handin, "HERE", root)
    return root


def packed(path: Path) -> dict[str, str]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {entry.filename: archive.read(entry).decode() for entry in archive.infolist()}


def test_code_report_and_figures_and_nothing_else(project, tmp_path, capsys):
    out = tmp_path / "x.zip"
    handin.main(["--name", "2026_张三", "--out", str(out)])
    assert packed(out) == {f"2026_张三/{name}": name for name in OURS}
    text = capsys.readouterr().out
    assert f"wrote {out}: {len(OURS)} files" in text
    assert "figures      5 files" in text and "2 .pt" in text and "2 .jpg" in text


def test_links_are_left_out(project, tmp_path):
    """One to a file outside, one to a folder outside, one within."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key.py").write_text("secret")
    (project / "key.py").symlink_to(secret / "key.py")
    (project / "more").symlink_to(secret)
    (project / "report" / "figures" / "photo.png").symlink_to(project / "Flickr8k/images/1.jpg")
    handin.main(["--name", "n", "--out", str(tmp_path / "x.zip")])
    assert packed(tmp_path / "x.zip") == {f"n/{name}": name for name in OURS}


def test_the_same_files_give_the_same_bytes(project, tmp_path, monkeypatch):
    """Other dates, another order of making, another name of the archive."""
    monkeypatch.chdir(tmp_path)
    handin.main(["--name", "n"])
    for name in sorted(OURS, reverse=True):
        (project / name).unlink()
        (project / name).write_text(name, "utf-8")
        os.utime(project / name, (1e9, 1e9))
    (project / "train.py").chmod(0o755)
    handin.main(["--name", "n.zip", "--out", "other.ZIP"])
    assert Path("n.zip").read_bytes() == Path("other.ZIP").read_bytes()
    with zipfile.ZipFile("n.zip") as archive:
        assert archive.namelist() == sorted(archive.namelist())


def test_an_archive_in_the_project_does_not_hold_itself(project, monkeypatch):
    monkeypatch.chdir(project)
    for _ in range(2):
        handin.main(["--name", "n"])
        assert len(packed(Path("n.zip"))) == len(OURS)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a\\b", "C:x", "a\nb", " a", "a.", "-x", "con", "Nul.1",
             "x" * 300, "a?b", "\udcff"]
)  # fmt: skip
def test_names_that_are_no_files(project, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--name"):
        handin.main([f"--name={name}"])
    assert [path.name for path in tmp_path.iterdir()] == ["project"]


def test_nothing_else_is_overwritten(project, tmp_path):
    for name in ("report.md", "photos.zip"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(UserError, match="--out"):
            handin.main(["--name", "n", "--out", str(tmp_path / name)])
        assert (tmp_path / name).read_text() == "mine"


def test_figures_that_are_lacking_are_said(project, tmp_path, capsys):
    handin.main(["--name", "n", "--out", str(tmp_path / "x.zip")])
    assert "visualize.py" not in capsys.readouterr().err
    for path in project.glob("checkpoints/**/*.png"):
        path.unlink()
    handin.main(["--name", "n", "--out", str(tmp_path / "x.zip")])
    assert "visualize.py" in capsys.readouterr().err


def test_this_project(tmp_path):
    """All scripts and pages are in it; an error is one line."""
    script = [sys.executable, str(HERE / "report" / "handin.py")]
    done = subprocess.run(
        [*script, "--name", "n"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / "n.zip") as archive:
        names = {name.removeprefix("n/") for name in archive.namelist()}
    for form in (
        "*.py",
        "*/*.py",
        "recipes/*.txt",
        "report/*.md",
        "report/figures/**/*.png",
        "*.md",
    ):
        wanted = {path.relative_to(HERE).as_posix() for path in HERE.glob(form)}
        assert {name for name in wanted if not name.startswith(("shared/", "."))} <= names
    assert not [name for name in names if name.endswith((".jpg", ".pt")) or "images" in name]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
