"""`train.py --resume`: finds the run, checks what was typed against it, restores its last step.

train.py calls `resumed` before it builds a run and `restore` after; `Run.content` wrote it all.
"""

from pathlib import Path
from typing import Any

import torch

from cli import UserError, sweep
from flags import MAY_CHANGE, build_parser, resolve
from models import image_towers, load_checkpoint
from optimizer import Trainer


def resumed(typed: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Reads the checkpoint that --resume means: (its path, its content). Raises UserError."""
    place = Path(typed["resume"] or typed.get("out") or "")
    if not typed["resume"] and "out" not in typed:
        raise UserError("--resume needs the run's folder: --resume checkpoints/NAME")
    path = place / "last.pt" if place.is_dir() else place
    if not path.is_file():
        raise UserError(f"--resume: there is no {path}; no epoch of that run was finished")
    content = load_checkpoint(path)
    content.setdefault("beside", {})  # of checkpoints older than several image towers
    known = build_parser().defaults()  # of flags that are younger than the checkpoint
    for flag in ("resume", "cache", "out", "device"):
        del known[flag]
    config = content["config"] = {**known, **content["config"]}
    wanted = resolve({**config, **typed}, {})
    for flag in typed.keys() - set(MAY_CHANGE):
        if wanted[flag] != config.get(flag):
            raise UserError(
                f"--{flag.replace('_', '-')} {typed[flag]} differs from the run's "
                f"{config.get(flag)}; leave it out, or start a new run with another --out"
            )
    towers = len(image_towers(config))
    if towers > 1 and typed.get("epochs", config["epochs"]) != config["epochs"]:
        raise UserError("--epochs: a run of several image towers keeps its own; leave it out")
    for name in ("last.pt", "best.pt", "history.csv", "curves.png", "config.json"):
        sweep(path.with_name(name))
    return path, content


def restore(trainer: Trainer, content: dict[str, Any]) -> None:
    """The optimizer, the average and the random states as a checkpoint's last epoch left them."""
    if content["epoch"] >= trainer.phase.first:  # else the phase begins with the next epoch
        trainer.optimizer.load_state_dict(content["optimizer"])
        if content["scaler"]:
            trainer.scaler.load_state_dict(content["scaler"])
        if trainer.average:
            trainer.average.load_state_dict(content["average"])
            trainer.average.swap()  # the checkpoint's model is the average
    torch.set_rng_state(content["random_states"]["cpu"])
    if trainer.device.type == "cuda" and content["random_states"]["cuda"]:
        torch.cuda.set_rng_state_all(content["random_states"]["cuda"])
