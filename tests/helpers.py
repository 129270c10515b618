"""The one place where the wiring tests reach inside the project."""

from argparse import Namespace
from pathlib import Path

from torch import nn

import evaluate
import models
import train
import visualize
from posters import words
from support.checkpoint import load_checkpoint
from support.command import UserError

__all__ = ["UserError", "evaluate", "load_checkpoint", "train", "visualize"]


def trained_model(path: Path) -> nn.Module:
    """The model of a checkpoint, as evaluation uses it."""
    return models.model_from_checkpoint(load_checkpoint(path), path).eval()


def rebuilt(content: dict, **changes: object) -> nn.Module:
    """The model that a run of this checkpoint's flags (some of them changed) begins with."""
    tokenizer = models.model_from_checkpoint(content, Path("checkpoint")).tokenizer
    return models.build_model(Namespace(**{**content["config"], **changes}), tokenizer)


def forget_reader() -> None:
    """Lets the next picture be read by a reader that is made anew."""
    words.reader.cache_clear()
