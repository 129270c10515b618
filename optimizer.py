"""Which weights learn when, at what rate, on images of what size; the average of the weights.

train.py goes through `phases_of` its config, and asks `learning_rate` at each step.
A new schedule is one entry of SCHEDULES: the share of the peak rate after warm-up, as a function of
the share of the steps that are done.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from cli import UserError
from models import CLIP, image_towers


class Phase(NamedTuple):
    """Some epochs in which the same blocks learn; a tower has one, or two with --head-epochs."""

    member: int  # of the image towers, which learn one after the other
    first: int
    last: int
    image: str  # how many of the image tower's last blocks learn, or "all"
    text: str
    rates: tuple[float, float, float]  # peak learning rates: image tower, text tower, the rest


def phases_of(config: dict[str, Any]) -> list[Phase]:
    """Heads first, on frozen pretrained towers, then all that is to learn (Kumar et al. 2022).

    With several image towers each in its turn has --epochs; of --train-image 8+0 the second has
    --head-epochs alone.
    """
    pretrained = [config[f"{tower}_weights"] != "none" for tower in ("image", "text")]
    heads, epochs, lr, low = (config[f] for f in ("head_epochs", "epochs", "lr", "tower_lr"))
    phases: list[Phase] = []
    for member, own in enumerate(image_towers(config)):
        wanted = [own["train_image"], own["train_text"]]
        held = ["0" if known else count for known, count in zip(pretrained, wanted, strict=True)]
        if heads:
            parts = [(min(heads, epochs), held, (lr, lr, lr)), (epochs, wanted, (low, low, low))]
            if "+" in config["train_image"] and own["train_image"] == "0":
                parts = parts[:1]
        else:
            parts = [(epochs, wanted, (*(low if known else lr for known in pretrained), lr))]
        begun = phases[-1].last if phases else 0
        for last, blocks, rates in parts:
            first, last = phases[-1].last + 1 if phases else 1, begun + last
            if first <= last:
                phases.append(Phase(member, first, last, *blocks, rates))
    return phases


def phase_after(done: int, config: dict[str, Any]) -> Phase:
    """The phase of the epoch that follows `done` epochs."""
    return next(phase for phase in phases_of(config) if done < phase.last)


def all_epochs(config: dict[str, Any]) -> int:
    """How many epochs a run has: --epochs for each of its image towers."""
    return phases_of(config)[-1].last


def size_in(epoch: int, config: dict[str, Any]) -> int:
    """Pixels of an epoch's images: --start-size in the first --start-epochs (Howard 2018)."""
    return config["start_size"] if epoch <= config["start_epochs"] else config["image_size"]


def unsettled(phase: Phase, config: dict[str, Any]) -> int:
    """How many epochs go by before those of a phase at the full image size, which compare."""
    return max(phase.first - 1, config["start_epochs"])


def build_optimizer(
    model: CLIP, config: dict[str, Any], rates: tuple[float, float, float]
) -> torch.optim.AdamW:
    """AdamW; norms, biases and logit_scale (all with fewer than two dimensions) do not decay.

    Each group holds its peak learning rate as `peak`.
    """
    chosen = defaultdict(list)  # (the place of its rate, whether it is spared the decay) -> weights
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            place = {"image_tower": 0, "text_tower": 1}.get(name.partition(".")[0], 2)
            chosen[place, weight.ndim < 2].append(weight)
    groups = [
        {"params": own, "weight_decay": 0.0 if spared else config["weight_decay"], "peak": rates[i]}
        for (i, spared), own in sorted(chosen.items())
    ]
    return torch.optim.AdamW(groups, lr=config["lr"], betas=(0.9, 0.98))


# -------------------------------------------------------------------------- the learning rate

SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "step": lambda done: 1.0 if done < 0.5 else 0.1 if done < 0.8 else 0.01,
    "plateau": lambda done: 1.0,  # times `plateau_factor`
    "constant": lambda done: 1.0,
}


def learning_rate(step: int, steps: int, warmup: int, schedule: str = "cosine") -> float:
    """The share of the peak rate: linear warm-up over `warmup` steps, then the schedule."""
    if step < warmup:
        return (step + 1) / warmup
    return SCHEDULES[schedule]((step - warmup) / max(1, steps - warmup))


def plateau_factor(scores: list[float], wait: int = 2) -> float:
    """Halved whenever `wait` epochs in a row bring no better score than the best before."""
    factor, best, idle = 1.0, float("-inf"), 0
    for score in scores:
        best, idle = (score, 0) if score > best else (best, idle + 1)
        if idle == wait:
            factor, idle = factor / 2, 0
    return factor


# -------------------------------------------------------------------------- weight averaging


class Average:
    """An exponential moving average of the weights that learn (Polyak and Juditsky 1992).

    Early on it forgets faster, min(decay, (1 + n) / (10 + n)) after n steps, as the first weights
    are worth little. Batch norm's running statistics are averages already and are not touched.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.steps = decay, 0
        self.learned = {name: x for name, x in model.named_parameters() if x.requires_grad}
        self.average = {name: x.detach().clone() for name, x in self.learned.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        kept = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, weight in self.learned.items():
            self.average[name].lerp_(weight, 1 - kept)

    @torch.no_grad()
    def swap(self) -> None:
        """The model gets the average, and the average the model's weights; twice: as before."""
        for name, weight in self.learned.items():
            kept = weight.clone()
            weight.copy_(self.average[name])
            self.average[name] = kept

    def state_dict(self) -> dict:
        return {"steps": self.steps, "average": self.average}

    def load_state_dict(self, state: dict) -> None:
        self.steps = state["steps"]
        for name, kept in state["average"].items():
            self.average[name].copy_(kept)


# ------------------------------------------------------------------------------- the steps


@dataclass
class Trainer:
    """What changes from step to step in a phase."""

    model: CLIP
    config: dict[str, Any]
    phase: Phase
    steps: int  # in an epoch
    start: int = 0  # the image block that the feed's features are the input of; 0: pixels
    average: Average | None = None  # of the weights, with --ema
    alike: torch.Tensor | None = None  # (images, images) in [0, 1], with --soft-positives

    def __post_init__(self) -> None:
        self.device = self.model.device
        self.optimizer = build_optimizer(self.model, self.config, self.phase.rates)
        kind = getattr(torch.amp, "GradScaler", torch.cuda.amp.GradScaler)
        half = self.config["precision"] == "fp16" and self.device.type == "cuda"
        self.scaler = kind(enabled=half)  # does nothing unless the precision is fp16

    def set_rates(self, step: int, factor: float) -> float:
        """Sets every group's learning rate for a step of the phase; returns the largest."""
        steps = (self.phase.last - self.phase.first + 1) * self.steps
        warmup = round(self.config["warmup"] * self.steps)
        share = factor * learning_rate(step, steps, warmup, self.config["schedule"])
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        return max(group["lr"] for group in self.optimizer.param_groups)

    def step(self, loss: torch.Tensor) -> None:
        """One step of the optimizer, and of the average."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.config["grad_clip"]:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config["grad_clip"])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():  # as in CLIP: beyond 100 training becomes unstable
            self.model.logit_scale.clamp_(max=math.log(CLIP.MAX_SCALE))
        if self.average:
            self.average.update()


WHAT_THEN = "training is stopped, the last checkpoint is intact; try a lower --lr or more --warmup"


def check_spread(images: torch.Tensor, texts: torch.Tensor, place: str) -> None:
    """Raises UserError when embeddings of 8 or more are not finite, or all the same point.

    Measured: fresh models spread by 1e-4 or more; a collapsed one by float32's rounding, 1e-13.
    """
    for article, name, embeddings in (("an", "image", images), ("a", "text", texts)):
        if not embeddings.isfinite().all():
            raise UserError(f"{place}: {article} {name} embedding is not finite; {WHAT_THEN}")
        spread = (embeddings - embeddings.mean(0)).square().sum(1).mean().item()
        if len(embeddings) >= 8 and spread < 1e-10:
            raise UserError(f"{place}: all {name} embeddings are the same point; {WHAT_THEN}")
