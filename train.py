"""Trains the two towers so that a picture and its caption meet in one space.

    python train.py --data shapes          # built-in data, no download
    python train.py                        # Flickr8k in ./Flickr8k
    python train.py --resume checkpoints/NAME

Read `main` first: data, model, optimizer, then epochs of train_epoch and a measurement on dev.
Everything lands in --out: best.pt, last.pt, history.csv, curves.png, config.json.
"""

import csv
import json
import math
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cli import UserError, atomic_write, run, warn
from dataset import Batch, Dataset, Feed, Split, Tokenizer, limited, load_dataset
from evaluate import contrastive_loss, evaluate_split
from flags import MAY_CHANGE, build_parser, resolve
from images import augment
from loss import info_nce
from models import (
    CLIP,
    build_model,
    choose_device,
    image_transform,
    load_checkpoint,
    model_from_checkpoint,
    save_checkpoint,
)
from visualize import draw_curves

# ----------------------------------------------------------------------------- the schedule


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up over `warmup` steps, then half a cosine down to 0 at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def build_optimizer(model: CLIP, config: dict[str, Any]) -> torch.optim.AdamW:
    """AdamW; norms, biases and logit_scale (all with fewer than two dimensions) do not decay."""
    weights = [w for w in model.parameters() if w.requires_grad]
    groups = [
        {"params": [w for w in weights if w.ndim >= 2], "weight_decay": config["weight_decay"]},
        {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config["lr"], betas=(0.9, 0.98))


def choose_precision(name: str, device: torch.device) -> str:
    """`auto` asks the device; bf16 emulated by a CPU is several times slower than fp32."""
    if name == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU; use bf16, fp32 or auto")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    native = any(getattr(torch.cpu, test, lambda: False)() for test in tests)
    return "bf16" if device.type == "cpu" and native else "fp32"


# ------------------------------------------------------------------------------ one epoch


@dataclass
class Trainer:
    """What changes from step to step."""

    model: CLIP
    optimizer: torch.optim.Optimizer
    scaler: Any  # a GradScaler, which does nothing unless the precision is fp16
    config: dict[str, Any]
    device: torch.device
    steps: int  # in an epoch

    def rate(self, step: int) -> float:
        warmup = round(self.config["warmup"] * self.steps)
        return learning_rate(step, self.config["epochs"] * self.steps, warmup, self.config["lr"])


def train_epoch(trainer: Trainer, epoch: int, batches: Iterable[Batch]) -> dict[str, float]:
    """One pass over `batches`: the mean loss, the last learning rate and images a second.

    Raises UserError when the loss is not finite or the embeddings have collapsed; the weights are
    then still those before that step.
    """
    model, config = trainer.model.train(), trainer.config
    shuffler = torch.Generator().manual_seed(config["seed"] * 1_000_003 + epoch)
    total = seen = 0
    started = time.perf_counter()
    bar = tqdm(batches, f"epoch {epoch}", trainer.steps, unit="batch", leave=False, disable=None)
    for index, batch in enumerate(bar):
        step = (epoch - 1) * trainer.steps + index
        for group in trainer.optimizer.param_groups:
            group["lr"] = trainer.rate(step)
        pixels = batch.pixels.to(trainer.device, non_blocking=True)
        images = augment(pixels, config["image_size"], config["image_augment"], shuffler)
        repeats = len(batch.tokens) // len(images)
        ids = torch.arange(len(images), device=trainer.device).repeat_interleave(repeats)
        image_embeddings, text_embeddings, scale = model(images, batch.tokens.to(trainer.device))
        loss = info_nce(image_embeddings[ids], text_embeddings, scale, ids)
        value = loss.item()
        if not math.isfinite(value):
            raise UserError(f"{where(epoch, index)}: the loss is {value}; {WHAT_THEN}")
        check_spread(image_embeddings, text_embeddings, where(epoch, index))
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.scaler.scale(loss).backward()
        if config["grad_clip"]:
            trainer.scaler.unscale_(trainer.optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), config["grad_clip"])
        trainer.scaler.step(trainer.optimizer)
        trainer.scaler.update()
        with torch.no_grad():  # as in CLIP: beyond 100 training becomes unstable
            model.logit_scale.clamp_(max=math.log(CLIP.MAX_SCALE))
        total, seen = total + value * len(images), seen + len(images)
        bar.set_postfix(loss=f"{value:.3f}", rate=f"{seen / (time.perf_counter() - started):.0f}/s")
    return {
        "train_loss": total / seen,
        "lr": trainer.rate(step),
        "images_per_second": seen / (time.perf_counter() - started),
    }


WHAT_THEN = "training is stopped, the last checkpoint is intact; try a lower --lr or more --warmup"


def where(epoch: int, index: int) -> str:
    return f"epoch {epoch}, batch {index + 1}"


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


# ------------------------------------------------------------------------------- the run

COLUMNS = {  # of the table on the screen: key -> (title, format)
    "epoch": ("epoch", "{:5d}"),
    "train_loss": ("loss", "{:7.3f}"),
    "dev_loss": ("dev loss", "{:8.3f}"),
    "top1_i2t": ("top1 i2t", "{:8.1f}"),
    "top1_t2i": ("t2i", "{:5.1f}"),
    "i2t_r1": ("i2t R@1", "{:7.1f}"),
    "i2t_r5": ("R@5", "{:5.1f}"),
    "i2t_r10": ("R@10", "{:5.1f}"),
    "i2t_medr": ("medr", "{:5.0f}"),
    "t2i_r1": ("t2i R@1", "{:7.1f}"),
    "t2i_r5": ("R@5", "{:5.1f}"),
    "t2i_r10": ("R@10", "{:5.1f}"),
    "t2i_medr": ("medr", "{:5.0f}"),
    "mean_recall": ("mean", "{:5.1f}"),
    "logit_scale": ("scale", "{:5.1f}"),
    "images_per_second": ("img/s", "{:6.0f}"),
    "seconds": ("s", "{:5.0f}"),
}


def table_head() -> str:
    widths = {key: len(form.format(0)) for key, (_, form) in COLUMNS.items()}
    return " ".join(title.rjust(widths[key]) for key, (title, _) in COLUMNS.items())


def table_line(record: dict[str, float]) -> str:
    return " ".join(
        form.format(record[key]).rjust(len(title)) for key, (title, form) in COLUMNS.items()
    )


def write_history(path: Path, history: list[dict[str, float]]) -> None:
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(history[0]))
        writer.writeheader()
        writer.writerows(history)


def resumed(typed: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Reads the checkpoint that --resume means: (its path, its content). Raises UserError."""
    place = Path(typed["resume"] or typed.get("out") or "")
    if not typed["resume"] and "out" not in typed:
        raise UserError("--resume needs the run's folder: --resume checkpoints/NAME")
    path = place / "last.pt" if place.is_dir() else place
    if not path.is_file():
        raise UserError(f"--resume: there is no {path}; no epoch of that run was finished")
    content = load_checkpoint(path)
    config = content["config"]
    wanted = resolve({**config, **typed}, {})
    for flag in typed.keys() - set(MAY_CHANGE):
        if wanted[flag] != config.get(flag):
            raise UserError(
                f"--{flag.replace('_', '-')} {typed[flag]} differs from the run's "
                f"{config.get(flag)}; leave it out, or start a new run with another --out"
            )
    return path, content


def check_folder(out: Path) -> None:
    """Refuses, before any work is done, a folder that holds a run or cannot be one."""
    held = [name for name in ("last.pt", "best.pt", "history.csv") if (out / name).exists()]
    if held:
        raise UserError(f"{out} already holds a run ({held[0]}); use --resume, or another --out")
    if any(place.exists() and not place.is_dir() for place in (out, *out.parents)):
        raise UserError(f"--out {out} is, or lies in, a file; give a folder")


@dataclass
class Run:
    """A run from its first epoch to its last: what it needs and what it has done so far."""

    out: Path
    config: dict[str, Any]
    dataset: Dataset
    dev: Split
    feed: Feed
    tokenizer: Tokenizer
    trainer: Trainer
    history: list[dict[str, float]]

    def epoch(self, epoch: int) -> None:
        """Trains an epoch, measures dev, and keeps the result: checkpoints, history, curves."""
        started, model = time.perf_counter(), self.trainer.model
        record: dict[str, float] = {"epoch": epoch}
        batches = self.feed.epoch(epoch, ahead=self.config["workers"] > 0)
        record |= train_epoch(self.trainer, epoch, batches)
        size = self.config["image_size"]
        embedded = evaluate_split(model, self.tokenizer, self.dataset, self.dev, size)
        images, texts = embedded.image_embeddings, embedded.text_embeddings
        check_spread(torch.from_numpy(images), torch.from_numpy(texts), f"epoch {epoch}, dev")
        scale = model.scale().item()
        record["dev_loss"] = contrastive_loss(embedded, scale, self.config["batch_size"])
        record |= embedded.metrics
        record |= {"logit_scale": scale, "seconds": time.perf_counter() - started}
        self.history.append(record)
        best = self.out / "best.pt" if self.stale() == 0 else None
        save_checkpoint(self.out / "last.pt", self.content(), copy=best)
        write_history(self.out / "history.csv", self.history)
        footer = f"{self.dataset.layout}, {self.dataset.splits} splits"
        footer += "; SPLIT BY CAPTION: flatters" if self.dataset.by_caption else ""
        draw_curves(self.history, self.out / "curves.png", footer)

    def best(self) -> dict[str, float]:
        return max(self.history, key=lambda record: record["mean_recall"])  # the first of equals

    def stale(self) -> int:
        """How many epochs ago the best one was."""
        return int(self.history[-1]["epoch"] - self.best()["epoch"])

    def finished(self) -> bool:
        """All epochs done, or --patience run out."""
        patience = self.config["patience"]
        done = len(self.history)
        return done >= self.config["epochs"] or bool(done and patience and self.stale() >= patience)

    def content(self) -> dict[str, Any]:
        """What the checkpoint holds: enough to go on in the same bits, and to be evaluated."""
        names, digests = self.dataset.names, self.dataset.digests
        trained_on = self.feed.split.images
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {
            "epoch": len(self.history),
            "finished": self.finished(),
            "config": self.config,
            "transform": image_transform(self.config),
            "vocabulary": self.tokenizer.vocabulary,
            "model": self.trainer.model.state_dict(),
            "optimizer": self.trainer.optimizer.state_dict(),
            "scaler": self.trainer.scaler.state_dict(),
            "history": self.history,
            "random_states": {"cpu": torch.get_rng_state(), "cuda": cuda},
            "fingerprint": self.dataset.fingerprint,
            "split_by_caption": self.dataset.by_caption,
            "train_images": {
                "names": [names[row] for row in trained_on],
                "digests": [digests[row] for row in trained_on],
            },
        }


def prepare(
    config: dict[str, Any], out: Path, cache: Path, content: dict[str, Any] | None, device: str
) -> Run:
    """Builds a run from its flags; `content` is the checkpoint that it goes on from, or None."""
    place = choose_device(device)
    transform = image_transform(config)
    dataset = load_dataset(
        config["data"], config["splits"], transform["stored_size"], cache, config["workers"]
    )
    print(dataset.summary())
    if content and dataset.fingerprint != content["fingerprint"]:
        raise UserError(
            f"--resume: the data has changed since (fingerprint {dataset.fingerprint}, the run's "
            f"is {content['fingerprint']}); put it back, or start a new run"
        )
    split = limited(dataset.split("train"), config["limit"], config["seed"])
    dev = dataset.split("dev")
    if content:
        model, tokenizer = model_from_checkpoint(content, out / "last.pt")
    else:
        tokenizer = Tokenizer.train(split.captions, config["min_count"], config["max_tokens"])
        model = build_model(config, transform, tokenizer)
    model.to(place)
    model.autocast = AUTOCAST[config["precision"]]
    feed = Feed(
        dataset.pixels,
        split,
        tokenizer(split.captions).numpy(),
        config["batch_size"],
        config["captions_per_image"],
        config["seed"],
    )
    optimizer = build_optimizer(model, config)
    make_scaler = getattr(torch.amp, "GradScaler", torch.cuda.amp.GradScaler)
    scaler = make_scaler(enabled=config["precision"] == "fp16" and place.type == "cuda")
    torch.manual_seed(config["seed"])  # dropout draws from torch's own generator
    if content:
        optimizer.load_state_dict(content["optimizer"])
        scaler.load_state_dict(content["scaler"])
        torch.set_rng_state(content["random_states"]["cpu"])
        if place.type == "cuda" and content["random_states"]["cuda"]:
            torch.cuda.set_rng_state_all(content["random_states"]["cuda"])
    trainer = Trainer(model, optimizer, scaler, config, place, feed.batches())
    history = content["history"] if content else []
    return Run(out, config, dataset, dev, feed, tokenizer, trainer, history)


AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def describe(run: Run) -> str:
    """The line before the table: towers, sizes, precision and what chance would give."""
    config, tokenizer, model = run.config, run.tokenizer, run.trainer.model
    return (
        f"model: {config['image_tower']} at {config['image_size']} px and {config['text_tower']}, "
        f"{sum(weight.numel() for weight in model.parameters()):,} weights; vocabulary "
        f"{len(tokenizer.vocabulary):,} words, {tokenizer.cut:,} of "
        f"{len(run.feed.split.captions):,} captions cut to {tokenizer.max_tokens} tokens; "
        f"{config['precision']} on {run.trainer.device}; {len(run.feed.split.images):,} images in "
        f"{run.feed.batches():,} batches; chance on dev: R@1 {100 / len(run.dev.images):.2f}%"
    )


def main(argv: list[str]) -> int:
    parser = build_parser()
    typed = parser.typed(argv)
    options = {**parser.defaults(), **typed}
    content = None
    if "resume" in typed:
        path, content = resumed(typed)
        out = path.parent
        config = {**content["config"], **{f: typed[f] for f in ("epochs", "workers") if f in typed}}
        if content["epoch"] >= config["epochs"] or (content["finished"] and "epochs" not in typed):
            told = f"finished after {content['epoch']} epochs; --epochs N goes further"
            print(f"{path}: this run is {told}")
            return 0
    else:
        config = resolve(typed, parser.defaults())
        name = Path(config["data"]).name.lower()
        out = config["out"] or Path("checkpoints") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        for place in ("resume", "cache", "out", "device"):  # of this machine, not of the run
            del config[place]
        device = choose_device(options["device"])
        config["precision"] = choose_precision(config["precision"], device)
        check_folder(out)
    run = prepare(config, out, options["cache"], content, options["device"])
    if content is None:
        with atomic_write(out / "config.json") as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    print(describe(run))
    return run_epochs(run)


def run_epochs(run: Run) -> int:
    """The epochs that are left; Ctrl-C and SIGTERM end them with a word on how to go on."""
    caught = []

    def stop(signum: int, _frame: Any) -> None:
        caught.append(signum)
        raise KeyboardInterrupt

    handlers = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    print(table_head())
    try:
        while not run.finished():
            run.epoch(len(run.history) + 1)
            print(table_line(run.history[-1]), flush=True)
    except KeyboardInterrupt:
        go_on = f"go on from the last whole epoch: python train.py --resume {run.out}"
        saved = (run.out / "last.pt").exists()
        warn(f"stopped; {go_on if saved else 'no epoch was finished'}")
        return 128 + caught[0]
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    best = run.best()
    if len(run.history) < run.config["epochs"]:
        print(f"stopped early: no better epoch in {run.stale()} (--patience)")
    print(
        f"wrote {run.out}: best.pt (epoch {best['epoch']}, mean recall on dev "
        f"{best['mean_recall']:.1f}%), last.pt, history.csv, curves.png, config.json"
    )
    return 0


if __name__ == "__main__":
    run(main)
