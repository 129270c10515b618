"""Checkpoints on disk: plain tensors, numbers and strings, written whole or not at all.

train.py writes one after every epoch with `save_checkpoint`; `load_checkpoint` never runs code.
"""

from __future__ import annotations

import pickle
import platform
import shutil
import struct
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torchvision

from support.command import UserError, atomic_write, out_of_memory

if TYPE_CHECKING:
    from dataset import CaptionedImages
    from train import Run

FORMAT, VERSION = "mini-clip", 4
# What torch.load and load_state_dict raise for a file of another kind.
NOT_A_CHECKPOINT = (pickle.UnpicklingError, zipfile.BadZipFile, struct.error, RuntimeError)
NOT_A_CHECKPOINT += (EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError)


def first_line(error: Exception) -> str:
    """The first line of an error, without the advice that torch's go on with."""
    return (str(error).strip() or type(error).__name__).split("\n")[0].split(". ")[0][:120]


def save_checkpoint(path: Path, content: dict[str, Any], copy: Path | None = None) -> None:
    """Writes `content` atomically, safe from a power cut; to `copy` first where one is wanted.

    When the process dies in between, `path` is still the older one, and redoing its epoch writes
    the same `copy` again.
    """
    versions = {module.__name__: str(module.__version__) for module in (torch, torchvision, np)}
    versions["python"] = platform.python_version()
    with atomic_write(path, durable=True) as temporary:
        try:
            torch.save(
                {"format": FORMAT, "version": VERSION, "versions": versions, **content}, temporary
            )
        except RuntimeError as error:  # torch's word for a full disk
            if out_of_memory(error):
                raise
            raise OSError(28, f"{first_line(error)} (is the disk full?)") from error
        if copy:
            with atomic_write(copy, durable=True) as second:
                shutil.copyfile(temporary, second)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what `save_checkpoint` wrote; never runs code from the file. Raises UserError."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the checkpoint in it, such as {path}/best.pt")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    except NOT_A_CHECKPOINT as error:
        if out_of_memory(error):
            raise
        raise UserError(
            f"{path} is not a checkpoint of train.py, or a damaged one ({first_line(error)})"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is a checkpoint of another program; give one of train.py")
    if content.get("version") != VERSION:
        raise UserError(
            f"{path} has checkpoint version {content.get('version')}, this code reads {VERSION}; "
            "train again, or use the code that wrote it"
        )
    return content


def fill_from(model: torch.nn.Module, content: dict[str, Any], name: str) -> list[str]:
    """Copies the weights of a checkpoint that fit; which parts of the model keep some of theirs.

    Raises UserError when none fits.
    """
    state, weights = model.state_dict(), content["model"]
    shared = state.keys() & weights.keys()
    fitting = {key: weights[key] for key in shared if weights[key].shape == state[key].shape}
    if not any(weight.ndim for weight in fitting.values()):  # logit_scale fits any model
        raise UserError(f"--init {name}: none of its weights fits this model")
    model.load_state_dict({**state, **fitting})
    fresh = sorted({key.partition(".")[0] for key in state.keys() - fitting.keys()})
    rest = f"; fresh ones in {', '.join(fresh)}" if fresh else ""
    print(f"init: {len(fitting):,} of {len(state):,} weights are those of {name}{rest}")
    return fresh


def contents(run: Run, weights: dict[str, Any] | None, config: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds of a run: enough to go on in the same bits, and to be evaluated.

    With --ema the model is the average, and `weights` are those that learn.
    """
    dataset, rows = run.pairs["train"].dataset, run.pairs["train"].rows
    return {
        "epoch": len(run.history),
        "transform": run.model.transform,
        "vocabulary": run.model.tokenizer.vocabulary,
        "model": run.model.state_dict(),
        "average": weights,
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "loss": run.loss.state_dict(),
        "history": run.history,
        "random_states": {  # dropout draws from torch's generators
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        },
        "device": run.model.device.type,
        "fingerprint": dataset.fingerprint,
        "origin": dataset.origin(),
        "split_by_caption": dataset.by_caption,
        "train_images": identity(dataset, rows),
        "split_images": {  # what is held out, wherever the data will lie
            name: identity(dataset, np.unique(dataset.caption_image[dataset.labels == name]))
            for name in ("dev", "test")
        },
        "images": len(np.unique(dataset.caption_image)),
        "config": config,
    }


def identity(dataset: CaptionedImages, rows: np.ndarray) -> dict[str, list[str]]:
    """By what some images are known again: their names, and sha256 of their contents."""
    return {
        "names": [dataset.names[row] for row in rows],
        "digests": [dataset.digests[row] for row in rows],
    }


def best_epoch(history: list[dict[str, float]]) -> dict[str, float]:
    """The record of the epoch that best.pt is kept of, the first of equals."""
    return max(history, key=lambda record: record["mean_recall"])


def dev_size(content: dict[str, Any]) -> int:
    """How many images dev had; 0 in a checkpoint that is too old to tell."""
    return len(content.get("split_images", {}).get("dev", {}).get("digests", []))


def restore(run: Run, earlier: dict[str, Any]) -> Run:
    """Everything but the model as a checkpoint's last epoch left it."""
    run.optimizer.load_state_dict(earlier["optimizer"])
    if earlier["scaler"]:
        run.scaler.load_state_dict(earlier["scaler"])
    run.loss.load_state_dict(earlier["loss"])
    if run.average:
        run.average.restore(earlier["average"])
    torch.set_rng_state(earlier["random_states"]["cpu"])
    if run.model.device.type == "cuda":  # which may have fewer GPUs now
        states = earlier["random_states"]["cuda"][: torch.cuda.device_count()]
        torch.cuda.set_rng_state_all(states)
    return run._replace(history=earlier["history"])
