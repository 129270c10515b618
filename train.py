"""Trains the two towers so that a picture and its caption meet in one space.

    python train.py --data shapes          # built-in data, no download
    python train.py                        # Flickr8k in ./Flickr8k
    python train.py --recipe best          # recipes/best.txt, several runs one after the other
    python train.py --resume checkpoints/NAME

Read `train` first: data, model, optimizer, then epochs of `train_epoch` and a measurement on dev.
Everything lands in --out: best.pt, last.pt, history.csv, curves.png, config.json.
"""

from __future__ import annotations

import support.python  # noqa: F401  refuses a Python that is too old, before all else

# isort: split

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from dataset import Pairs, add_data_flags
from evaluate import contrastive_loss, evaluate_split
from loss import build_loss, check_finite
from models import CLIP, HEADS, IMAGE_TOWERS, TEXT_TOWERS, hold_back
from sources.augment import AUGMENTATIONS
from support import remarks, runs
from support.checkpoint import contents, restore, save_checkpoint
from support.command import Parser, later, number, run
from support.device import AUTOCAST, choose_device, choose_precision, keep_memory
from support.options import block_count, config_of, per_data

# ------------------------------------------------------------------------------- the flags


def build_parser() -> Parser:
    parser = Parser(prog="train.py", description="Trains a miniature CLIP.")
    text = "a list of runs: recipes/NAME.txt or a file; best is the strongest in 15 minutes"
    text += " (default: assignment; plain, one run, where that does not fit)"
    parser.add_argument("--recipe", metavar="NAME", help=text)
    add_data_flags(parser, data="Flickr8k", splits="auto")
    share, count = number(float, 0, 0.95), number(int, 1, 100_000)
    size, rate = number(int, 1, 10_000), number(float, 0, 10, above=True)
    switch = {"action": argparse.BooleanOptionalAction, "default": False}

    flag = parser.add_argument_group("input").add_argument
    text = f"flips, crops, turns, colour ({per_data('image_augment')}; none above frozen blocks)"
    flag("--image-augment", choices=AUGMENTATIONS, help=text)
    flag("--map-crop", type=share, default=0.0, help="share cut off frozen blocks' maps, at random")
    text = "rates of words changed in captions, e.g. synonym=0.1,delete=0.1,swap=0.05"
    flag("--text-augment", default="none", metavar="RATES", help=text)
    text = "of an image in one batch; several are positives together"
    flag("--captions-per-image", type=number(int, 1, 100), default=1, metavar="K", help=text)
    flag("--captions-alone", **switch, help="no pictures: a pair is two captions of an image")
    flag("--limit", type=number(int, 2, 10**9), metavar="N", help="train on N images, seeded")

    flag = parser.add_argument_group("model").add_argument
    text = f"of the square input ({per_data('image_size')}; pretrained: as the tower was trained)"
    flag("--image-size", type=number(int, 32, 1024), metavar="PIXELS", help=text)
    flag("--image-tower", choices=IMAGE_TOWERS, default="resnet18")
    text = "to start from (default: none for resnet*, imagenet for the others)"
    flag("--image-weights", metavar="none|imagenet|PATH", help=text)
    flag("--text-tower", choices=TEXT_TOWERS, default="transformer")
    text = "to start from; a FOLDER holds a BERT (default: pretrained, where it is one)"
    flag("--text-weights", metavar="none|pretrained|FOLDER", help=text)
    flag("--text-width", type=number(int, 8, 4096), default=256, help="of its word embeddings")
    flag("--text-layers", type=number(int, 1, 48), help="(default: 1 for an lstm, else 2)")
    flag("--dropout", type=share, default=0.1, help="in the text tower; in a bag of whole words")
    flag("--min-count", type=size, default=2, help="a known word stands this often in the captions")
    flag("--max-tokens", type=number(int, 3, 1000), default=40, help="more are cut, and counted")
    flag("--head", choices=HEADS, default="linear", help="the projections; mlp: two layers more")
    text = "the text tower's own; identity starts at the tower's features (default: as --head)"
    flag("--text-head", choices=HEADS, help=text)
    flag("--image-dropout", type=share, default=0.0, help="of image features, to be projected")
    flag("--text-dropout", type=share, default=0.0, help="of text features, to be projected")
    flag("--embed-dim", type=number(int, 2, 8192), default=256, help="of the common space")
    text = "at the start; logit_scale is the logarithm of its inverse"
    flag("--temperature", type=number(float, 0.01, 10), default=0.07, help=text)
    flag("--test-crops", **switch, help="an image's embedding: the mean with those of five crops")
    flag("--test-mirror", **switch, help="an image's embedding: the mean with its mirror image's")

    flag = parser.add_argument_group("training").add_argument
    text = "start from another run's weights, those that fit; model flags left out are its own"
    flag("--init", metavar="CHECKPOINT", help=text)
    text = "last blocks that learn; 0: frozen (default: 0 if pretrained, else all)"
    flag("--train-image", type=block_count, metavar="N|all", help=text)
    flag("--train-text", type=block_count, metavar="N|all", help="the same for the text tower")
    text = "infonce, siglip, triplet, or a weighted sum such as infonce+0.2*triplet"
    flag("--loss", default="infonce", help=text)
    flag("--label-smoothing", type=share, default=0.0, help="of InfoNCE's target, over all texts")
    flag("--fixed-temperature", **switch, help="do not learn the temperature")
    flag("--epochs", type=count, help=f"({per_data('epochs')})")
    text = f"images; a pair alone has no negatives ({per_data('batch_size')})"
    flag("--batch-size", type=number(int, 2, 65_536), help=text)
    flag("--lr", type=rate, help=f"AdamW's learning rate at its peak ({per_data('lr')})")
    flag("--tower-lr", type=rate, default=1e-4, help="the same for pretrained towers")
    text = "the same for a text tower that has learned before (default: as --lr or --tower-lr)"
    flag("--text-lr", type=rate, help=text)
    text = "not on norms, biases and logit_scale"
    flag("--weight-decay", type=number(float, 0, 10), default=0.1, help=text)
    flag("--schedule", choices=SCHEDULES, default="cosine", help="learning rate after warm-up")
    flag("--warmup", type=number(float, 0, 1000), default=1.0, help="epochs of linear warm-up")
    text = "measure and keep an average of the weights, of which a step keeps this share"
    flag("--ema", type=number(float, 0, 0.99999), default=0.0, metavar="DECAY", help=text)
    flag("--grad-clip", type=number(float, 0, 1e6), default=1.0, help="its largest norm; 0: none")
    flag("--patience", type=count, metavar="N", help="stop after N epochs without a better recall")
    flag("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of all that is random")
    flag("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    text = "of the towers in training; auto: what this machine is faster in"
    flag("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help=text)

    flag = parser.add_argument_group("output").add_argument
    flag("--out", type=Path, help="the run's folder (default: checkpoints/DATA-DATE-TIME)")
    text = "go on with the run, or the recipe, in the folder PATH (default: in --out)"
    flag("--resume", nargs="?", const="", metavar="PATH", help=text)
    later("posters.flags", "add_flags")(parser)
    return parser


# --------------------------------------------------------------------------- the optimizer

# The share of the peak rate after warm-up, by the share of the steps that are done.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "step": lambda done: 1.0 if done < 0.5 else 0.1 if done < 0.8 else 0.01,
    "constant": lambda done: 1.0,
}


def learning_rate(step: int, steps: int, warmup: int, schedule: str = "cosine") -> float:
    """The share of the peak rate: linear warm-up over `warmup` steps, then the schedule."""
    if step < warmup:
        return (step + 1) / warmup
    return SCHEDULES[schedule]((step - warmup) / max(1, steps - warmup))


def build_optimizer(model: CLIP, loss: nn.Module, options: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW; norms, biases and logit_scale (all with fewer than two dimensions) do not decay.

    Each group holds its peak learning rate as `peak`: --tower-lr for a pretrained tower, --text-lr
    for the text tower and its projection.
    """
    rates = {}  # of a tower's weights; with --captions-alone both towers are the text tower
    towers = (model.image_tower, options.image_weights), (model.text_tower, options.text_weights)
    for tower, source in towers:
        rate = options.lr if source == "none" else options.tower_lr
        rates |= dict.fromkeys(tower.parameters(), rate)
    if options.text_lr:
        texts = *model.text_tower.parameters(), *model.text_projection.parameters()
        rates |= dict.fromkeys(texts, options.text_lr)
    groups = defaultdict(list)  # (peak rate, decay) -> weights
    for weight in [*model.parameters(), *loss.parameters()]:
        if weight.requires_grad:
            peak = rates.get(weight, options.lr)
            groups[peak, options.weight_decay if weight.ndim >= 2 else 0.0].append(weight)
    rows = [{"params": w, "peak": peak, "weight_decay": d} for (peak, d), w in groups.items()]
    fused = torch.__version__ >= (2, 4) and model.device.type != "mps"  # a step in 0.95 of the time
    return torch.optim.AdamW(rows, lr=options.lr, betas=(0.9, 0.98), fused=fused)


# ------------------------------------------------------------------------------- one epoch


def train_epoch(
    run: Run,
    epoch: int,
    options: argparse.Namespace,
    batches: Iterable[tuple[torch.Tensor, ...]] | None = None,
) -> dict[str, float]:
    """Every training image once, with its next captions: mean loss, last rate, images a second.

    `batches` (the benchmark's) stand in the place of the epoch's. Raises UserError when the loss is
    not finite or the embeddings have collapsed; the weights are then still those before that step.
    """
    model, loss, optimizer, scaler = run.learner.train(), run.loss, run.optimizer, run.scaler
    steps = len(run.pairs["train"].sampler(options))
    if not batches:  # those of --init's epochs do not come again: they are known by heart
        batches = run.pairs["train"].batches(options.epochs_before + epoch, options, model.device)
    total = seen = 0
    clock = time.perf_counter()
    bar = tqdm(batches, f"epoch {epoch}", steps, unit="batch", leave=False, disable=None)
    for step, (images, texts, ids, text_ids) in enumerate(bar):
        # images (B, 3, S, S) in [0, 1], augmented; texts (B * K, L), K captions an image, 0 where
        # padded; ids and text_ids (B * K,): each text's image, and which texts are equal
        done, warmup = (epoch - 1) * steps + step, round(options.warmup * steps)
        share = learning_rate(done, options.epochs * steps, warmup, options.schedule)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
        image_embeddings = model.encode_image(images)  # (B, D), unit length
        text_embeddings = model.encode_text(texts)  # (B * K, D), unit length
        each = image_embeddings.repeat_interleave(len(texts) // len(images), 0)  # (B * K, D)
        value = loss(each, text_embeddings, model.scale(), ids, text_ids=text_ids)
        place = f"epoch {epoch}, batch {step + 1}"
        check_finite(value.item(), image_embeddings, text_embeddings, place)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        if options.grad_clip:
            nn.utils.clip_grad_norm_(model.parameters(), options.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(CLIP.MAX_SCALE))
        total, seen = total + value.item() * len(images), seen + len(images)
        speed = seen / (time.perf_counter() - clock)
        bar.set_postfix(loss=f"{value.item():.3f}", rate=f"{speed:.0f}/s")
        if epoch == 1 and step == min(10, steps - 1):
            remarks.say_duration(steps * len(images) / speed, options.epochs)
    return {
        "train_loss": total / seen,
        "lr": max(group["lr"] for group in optimizer.param_groups),
        "images_per_second": seen / (time.perf_counter() - clock),
    }


# -------------------------------------------------------------------------------- the run

# (when, trick), in turn: each takes model and pairs, and returns what stands in their place.
Trick = Callable[[CLIP, dict[str, Pairs], argparse.Namespace], tuple[CLIP, dict[str, Pairs]]]
TRICKS: tuple[tuple[Callable[[argparse.Namespace], bool], Trick], ...] = (
    (lambda o: o.captions_alone, later("tricks.captions_alone", "pair_captions")),
    (lambda o: o.text_augment != "none", later("tricks.rewrite", "rewrite_captions")),
    (lambda o: not o.captions_alone and not o.poster_text, later("tricks.frozen", "keep_features")),
    (lambda o: o.poster_text, later("posters.words", "add_words")),
)


class Run(NamedTuple):
    """Everything that changes while a run learns, and what it learns from."""

    model: CLIP
    learner: CLIP  # what the epochs train: the model, or what is above its frozen blocks
    pairs: dict[str, Pairs]  # train, dev; with --train-recall a sample of train, too
    loss: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: Any  # of the weights, with --ema
    history: list[dict[str, float]]  # a record an epoch


def begin(options: argparse.Namespace, earlier: dict[str, Any] | None = None) -> Run:
    """Data, model, tricks, loss and optimizer of a new run, or of one as `earlier` left it."""
    device = choose_device(options.device)
    options.precision = choose_precision(options.precision, device)
    dataset = runs.read_data(options, earlier)
    model = runs.model_of(options, dataset, earlier).to(device)
    hold_back(model.image_tower, options.train_image)
    hold_back(model.text_tower, options.train_text)
    if options.precision == "auto":
        options.precision = later("support.precision", "faster_precision")(model, options)
    model.autocast = AUTOCAST[options.precision]
    pairs = {name: dataset.pairs(name, model.tokenizer) for name in ("train", "dev")}
    pairs["train"] = pairs["train"].limited(options.limit, options.seed)
    if options.train_recall:
        as_many = min(len(pairs["dev"].rows), len(pairs["train"].rows))
        pairs["sample"] = pairs["train"].limited(as_many, 0)
    learner = model
    for applies, trick in TRICKS:  # none in `plain`; `assignment` starts from captions
        if applies(options):
            learner, pairs = trick(learner, pairs, options)
    loss = build_loss(options, pairs["train"]).to(device)
    optimizer = build_optimizer(learner, loss, options)
    kind = getattr(torch.amp, "GradScaler", torch.cuda.amp.GradScaler)
    scaler = kind(enabled=options.precision == "fp16" and device.type == "cuda")
    average = later("tricks.averaging", "Average")(learner, options.ema) if options.ema else None
    if average:
        optimizer.register_step_post_hook(lambda *_: average.update())
    # Dropout draws from torch's own generator, and after --init not the same as before it.
    torch.manual_seed(options.seed + 1_000_003 * options.epochs_before)
    run = Run(model, learner, pairs, loss, optimizer, scaler, average, [])
    return restore(run, earlier) if earlier else run


def train(
    options: argparse.Namespace, out: Path, earlier: dict[str, Any] | None, home: Path
) -> int:
    """One run, from its first epoch, or the one after `earlier`, to its last; an exit code.

    After each epoch dev is measured; the one with the best mean of six recalls is kept in best.pt.
    `home` is the folder to resume: the run's, or that of its recipe.
    """
    if earlier and runs.is_finished(earlier["history"], options):
        return runs.complete(out, home, earlier)
    clock = time.perf_counter()
    with runs.fitting(options):  # into memory
        run = begin(options, earlier)
        history, before = run.history, run.history[-1]["minutes"] if run.history else 0.0
        runs.write_config(out / "config.json", config_of(options))
        print(remarks.describe(run, options))
        print(remarks.table_head())
        while not runs.is_finished(history, options):
            epoch, since = len(history) + 1, time.perf_counter()
            record = {"epoch": epoch} | train_epoch(run, epoch, options)
            with run.average.in_place() if run.average else nullcontext() as weights:
                record |= measure(run, options, f"epoch {epoch}, dev")
                now = time.perf_counter()
                record |= {"seconds": now - since, "minutes": before + (now - clock) / 60}
                history.append(record)
                best = max(history, key=lambda past: past["mean_recall"])  # first of equals
                copy = out / "best.pt" if best is record else None
                content = contents(run, weights, config_of(options))
                save_checkpoint(out / "last.pt", content, copy)
            origin, images = run.pairs["train"].dataset.origin(), len(run.pairs["dev"].rows)
            runs.write_history(out, history, origin, images, options.batch_size)
            print(remarks.table_line(record))
            remarks.warn_of_chance(run, options)
    if len(history) < options.epochs:
        print(f"stopped early: no better epoch in {options.patience} (--patience)")
    files = "last.pt, history.csv, curves.png, config.json"
    print(f"wrote {out}: best.pt ({remarks.best_of(history)}), {files}")
    return 0


def measure(run: Run, options: argparse.Namespace, place: str) -> dict[str, float]:
    """Loss and recalls on dev; with --train-recall top-1 of as many training images, too."""
    embedded, scale = evaluate_split(run.learner, run.pairs["dev"]), run.learner.scale().item()
    images, texts = map(torch.from_numpy, (embedded.image_embeddings, embedded.text_embeddings))
    check_finite(0.0, images, texts, place)
    record = {"dev_loss": contrastive_loss(embedded, scale, options.batch_size), **embedded.metrics}
    if "sample" in run.pairs:
        sample = evaluate_split(run.learner, run.pairs["sample"]).metrics
        record |= {f"train_top1_{way}": sample[f"top1_{way}"] for way in ("i2t", "t2i")}
        record["dev_films"] = len(run.pairs["dev"].rows)
    return {**record, "logit_scale": scale}


# Both find the run's folder, and the runs of a recipe, and call `train` for each.
BEGIN_ANEW = later("support.recipes", "begin_anew")
GO_ON = later("support.recipes", "go_on")


def main(argv: list[str]) -> int:
    keep_memory()
    parser = build_parser()
    typed = parser.typed(argv)
    return (GO_ON if "resume" in typed else BEGIN_ANEW)(typed, parser, train)


if __name__ == "__main__":
    run(main)
