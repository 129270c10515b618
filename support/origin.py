"""What figures name as their origin: the run, its checkpoint and its history.

visualize.py, posters/figures.py and report/ draw with it.
"""

from __future__ import annotations

import contextlib
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from support.checkpoint import load_checkpoint
from support.command import UserError
from support.options import same_run

if TYPE_CHECKING:
    from dataset import CaptionedImages
    from support.embedding import Trained


def run_name(folder: Path) -> str:
    """What figures call the run of a folder: after its recipe's folder, where it is one of such."""
    folder = folder.resolve()
    of_recipe = (folder.parent / "recipe.txt").is_file()
    return f"{folder.parent.name}/{folder.name}" if of_recipe else folder.name


def named(trained: Trained, options: Namespace) -> str:
    """The folders of the runs that a figure is made from."""
    paths = options.checkpoint or [trained.path]
    return " and ".join(run_name(path.parent) for path in paths)


def origin(trained: Trained, options: Namespace, dataset: CaptionedImages | None = None) -> str:
    """Which checkpoints a figure is made from, and whether a split by caption flatters it."""
    paths = [path.resolve() for path in options.checkpoint or [trained.path]]
    files = " and ".join(f"{path.parent.name}/{path.name}" for path in paths)
    torn = any(content["split_by_caption"] for content in trained.contents)
    mark = "; SPLIT BY CAPTION: flatters" if torn or (dataset and dataset.by_caption) else ""
    return f"checkpoint {files}, {trained.stage}{mark}"


def whole_history(trained: Trained) -> list[dict[str, float]]:
    """The history of the (first) run up to its last epoch: best.pt ends with the best one."""
    history = trained.content["history"]
    folder = trained.path.parent  # of a recipe, it may be, whose runs have folders of their own
    for last in (*folder.glob("last.pt"), *folder.glob("*/last.pt")):
        with contextlib.suppress(UserError):  # it may be damaged where best.pt is whole
            content = load_checkpoint(last)
            if same_run(trained.content, content):
                history = max(history, content["history"], key=len)
    return history
