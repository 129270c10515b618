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
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from dataset import add_data_flags, load_dataset
from evaluate import contrastive_loss, evaluate_split
from loss import build_loss, check_finite
from models import (
    CLIP,
    HEADS,
    IMAGE_TOWERS,
    TEXT_TOWERS,
    hold_back,
    image_transform,
    model_from_checkpoint,
)
from sources.pictures import AUGMENTATIONS
from support import runs
from support.checkpoint import contents, restore, save_checkpoint
from support.command import Parser, UserError, later, number, run
from support.device import AUTOCAST, choose_device, choose_precision, keep_memory
from support.options import block_count, config_of, per_data, resolve

if TYPE_CHECKING:
    from dataset import CaptionedImages, Pairs

# ------------------------------------------------------------------------------- the flags


def build_parser() -> Parser:
    parser = Parser(prog="train.py", description="Trains a miniature CLIP.")
    text = (
        "a list of runs: recipes/NAME.txt, or a file. best: the strongest in a quarter of an hour"
    )
    parser.add_argument("--recipe", default="assignment", metavar="NAME", help=text)
    add_data_flags(parser, data="Flickr8k", splits="auto")
    share, count = number(float, 0, 0.95), number(int, 1, 100_000)
    rate = number(float, 0, 10, above=True)
    switch = {"action": argparse.BooleanOptionalAction, "default": False}

    flag = parser.add_argument_group("input").add_argument
    text = f"flips, crops, turns, colour ({per_data('image_augment')}; none above frozen blocks)"
    flag("--image-augment", choices=AUGMENTATIONS, help=text)
    text = "share of the side of frozen blocks' maps that is cut away at random, every second batch"
    flag("--map-crop", type=share, default=0.0, metavar="SHARE", help=text)
    text = "rates of words changed in captions, e.g. synonym=0.1,delete=0.1,swap=0.05"
    flag("--text-augment", default="none", metavar="RATES", help=text)
    text = "of an image in one batch; several are positives together"
    flag("--captions-per-image", type=number(int, 1, 100), default=1, metavar="K", help=text)
    text = "no pictures: two captions of an image are a pair, so that the text tower learns first"
    flag("--captions-alone", **switch, help=text)
    text = "train on N seeded training images; dev and test stay whole"
    flag("--limit", type=number(int, 2, 10**9), metavar="N", help=text)

    flag = parser.add_argument_group("model").add_argument
    text = f"of the square input ({per_data('image_size')}; pretrained: as the tower was trained)"
    flag("--image-size", type=number(int, 32, 1024), metavar="PIXELS", help=text)
    flag("--image-tower", choices=IMAGE_TOWERS, default="resnet18")
    text = "to start from (default: none for resnet*, imagenet for the others)"
    flag("--image-weights", metavar="none|imagenet|PATH", help=text)
    flag("--text-tower", choices=TEXT_TOWERS, default="transformer")
    text = "to start from; a FOLDER has config.json, vocab.txt and model.safetensors (default: "
    text += "pretrained for minilm and bert)"
    flag("--text-weights", metavar="none|pretrained|FOLDER", help=text)
    flag("--text-width", type=number(int, 8, 4096), default=256, help="of its word embeddings")
    flag("--text-layers", type=number(int, 1, 48), default=2)
    flag("--dropout", type=share, default=0.1, help="in the text tower; in a bag of whole words")
    text = "a word in the vocabulary stands this often in the training captions"
    flag("--min-count", type=number(int, 1, 1000), default=2, help=text)
    text = "longer captions are cut, and counted"
    flag("--max-tokens", type=number(int, 3, 1000), default=40, help=text)
    text = "the projections: one matrix, or a matrix and two layers on standardised features"
    flag("--head", choices=HEADS, default="linear", help=text)
    text = "the text tower's own; identity starts at the tower's features (default: as --head)"
    flag("--text-head", choices=HEADS, help=text)
    flag("--image-dropout", type=share, default=0.0, help="of image features, to be projected")
    flag("--text-dropout", type=share, default=0.0, help="of text features, to be projected")
    flag("--embed-dim", type=number(int, 2, 8192), default=256, help="of the common space")
    text = "at the start; logit_scale is the logarithm of its inverse"
    flag("--temperature", type=number(float, 0.01, 10), default=0.07, help=text)
    text = "an image's embedding is the mean of the image's and its mirror image's"
    flag("--test-mirror", **switch, help=text)

    flag = parser.add_argument_group("training").add_argument
    text = "start from another run's weights, those that fit; model flags left out are its own"
    flag("--init", metavar="CHECKPOINT", help=text)
    text = "last blocks that learn; 0: frozen (default: 0 if pretrained, else all)"
    flag("--train-image", type=block_count, metavar="N|all", help=text)
    flag("--train-text", type=block_count, metavar="N|all", help="the same for the text tower")
    text = "infonce, siglip, triplet, or a weighted sum such as infonce+0.2*triplet"
    flag("--loss", default="infonce", help=text)
    text = "share of InfoNCE's target that is spread over all candidates"
    flag("--label-smoothing", type=share, default=0.0, help=text)
    flag("--fixed-temperature", **switch, help="do not learn the temperature")
    flag("--epochs", type=count, help=f"({per_data('epochs')})")
    text = f"images; a pair alone has no negatives ({per_data('batch_size')})"
    flag("--batch-size", type=number(int, 2, 65_536), help=text)
    flag("--lr", type=rate, help=f"AdamW's learning rate at its peak ({per_data('lr')})")
    flag("--tower-lr", type=rate, default=1e-4, help="the same for pretrained towers")
    text = "not on norms, biases and logit_scale"
    flag("--weight-decay", type=number(float, 0, 10), default=0.1, help=text)
    flag("--schedule", choices=SCHEDULES, default="cosine", help="learning rate after warm-up")
    flag("--warmup", type=number(float, 0, 1000), default=1.0, help="epochs of linear warm-up")
    text = "measure and keep a moving average of the weights; a step keeps this share of it"
    flag("--ema", type=number(float, 0, 0.99999), default=0.0, metavar="DECAY", help=text)
    text = "largest norm of the gradient; 0: no clipping"
    flag("--grad-clip", type=number(float, 0, 1e6), default=1.0, help=text)
    text = "stop after N epochs without a better mean recall on dev"
    flag("--patience", type=count, metavar="N", help=text)
    flag("--train-recall", **switch, help="measure as many training images as dev has, too")
    flag("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of all that is random")
    flag("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    text = "of the towers in training; auto asks the device"
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

    Each group holds its peak learning rate as `peak`: --tower-lr for a pretrained tower.
    """
    peaks = {
        "image_tower": options.lr if options.image_weights == "none" else options.tower_lr,
        "text_tower": options.lr if options.text_weights == "none" else options.tower_lr,
    }
    groups = defaultdict(list)  # (peak rate, decay) -> weights
    for name, weight in [*model.named_parameters(), *loss.named_parameters("loss")]:
        if weight.requires_grad:
            peak = peaks.get(name.partition(".")[0], options.lr)
            groups[peak, options.weight_decay if weight.ndim >= 2 else 0.0].append(weight)
    return torch.optim.AdamW(
        [{"params": w, "peak": peak, "weight_decay": d} for (peak, d), w in groups.items()],
        lr=options.lr,
        betas=(0.9, 0.98),
    )


# ------------------------------------------------------------------------------- one epoch


def train_epoch(
    model: CLIP,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    steps: int,
    loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    epoch: int,
    options: argparse.Namespace,
) -> dict[str, float]:
    """Every training image once, with its next captions: mean loss, last rate, images a second.

    Raises UserError when the loss is not finite or the embeddings have collapsed; the weights are
    then still those before that step.
    """
    model.train()
    total = seen = 0
    clock = time.perf_counter()
    bar = tqdm(batches, f"epoch {epoch}", steps, unit="batch", leave=False, disable=None)
    for step, (images, texts, ids) in enumerate(bar):
        # images (B, 3, S, S) in [0, 1], augmented; texts (B * K, L), K captions an image, 0 where
        # padded; ids (B * K,): which image each text belongs to
        done, warmup = (epoch - 1) * steps + step, round(options.warmup * steps)
        share = learning_rate(done, options.epochs * steps, warmup, options.schedule)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
        image_embeddings = model.encode_image(images)  # (B, D), unit length
        text_embeddings = model.encode_text(texts)  # (B * K, D), unit length
        each = image_embeddings.repeat_interleave(len(texts) // len(images), 0)  # (B * K, D)
        value = loss(each, text_embeddings, model.scale(), ids)
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
            runs.say_duration(steps * len(images) / speed, options.epochs)
    return {
        "train_loss": total / seen,
        "lr": max(group["lr"] for group in optimizer.param_groups),
        "images_per_second": seen / (time.perf_counter() - clock),
    }


# -------------------------------------------------------------------------------- the run

# (when, trick): each takes model and pairs, and returns what stands in their place.
Trick = Callable[[CLIP, "dict[str, Pairs]", argparse.Namespace], "tuple[CLIP, dict[str, Pairs]]"]
TRICKS: tuple[tuple[Callable[[argparse.Namespace], bool], Trick], ...] = (
    (lambda o: o.text_augment != "none", later("tricks.rewrite", "rewrite_captions")),
    (lambda o: o.captions_alone, later("tricks.captions_alone", "pair_captions")),
    (lambda o: not o.captions_alone, later("tricks.frozen", "keep_features")),
    (lambda o: o.poster_text, later("posters.words", "add_words")),
)


def train(
    options: argparse.Namespace, out: Path, earlier: dict[str, Any] | None, home: Path
) -> int:
    """One run, from its first epoch, or the one after `earlier`, to its last; an exit code.

    After each epoch dev is measured; the one with the best mean of six recalls is kept in best.pt.
    `home` is the folder to resume: the run's, or that of its recipe.
    """
    if earlier and runs.is_finished(earlier["history"], options):
        epochs = f"after {earlier['epoch']} epochs; --epochs N goes further"
        print(f"{out}: this run is finished {epochs}")
        return 0
    clock, device = time.perf_counter(), choose_device(options.device)
    options.precision = choose_precision(options.precision, device)
    dataset = read_data(options, earlier)
    if earlier:
        model = model_from_checkpoint(earlier, out / "last.pt")
    else:
        model = runs.new_model(options, dataset)
    model.to(device).autocast = AUTOCAST[options.precision]
    hold_back(model.image_tower, options.train_image)
    hold_back(model.text_tower, options.train_text)

    pairs = {name: dataset.pairs(name, model.tokenizer) for name in ("train", "dev")}
    pairs["train"] = pairs["train"].limited(options.limit, options.seed)
    if options.train_recall:
        as_many = min(len(pairs["dev"].rows), len(pairs["train"].rows))
        pairs["sample"] = pairs["train"].limited(as_many, 0)
    learner = model  # what the epochs train
    for applies, trick in TRICKS:  # none in the assignment
        if applies(options):
            learner, pairs = trick(learner, pairs, options)
    loss = build_loss(options, pairs["train"]).to(device)
    optimizer = build_optimizer(learner, loss, options)
    scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "fp16")
    average = later("tricks.averaging", "Average")(learner, options.ema) if options.ema else None
    if average:
        optimizer.register_step_post_hook(lambda *_: average.update())
    torch.manual_seed(options.seed)  # dropout draws from torch's own generator
    history = restore(earlier, optimizer, scaler, loss, average) if earlier else []
    runs.write_config(out / "config.json", config_of(options))
    print(runs.describe(model, learner, pairs, options))

    steps = len(pairs["train"].sampler(options))
    before = history[-1]["minutes"] if history else 0.0
    with runs.Interrupts() as interrupts:
        try:
            print(runs.table_head())
            while not runs.is_finished(history, options):
                epoch, since = len(history) + 1, time.perf_counter()
                batches = pairs["train"].batches(epoch, options, device)
                record: dict[str, float] = {"epoch": epoch}
                record |= train_epoch(
                    learner, batches, steps, loss, optimizer, scaler, epoch, options
                )
                with average.in_place() if average else nullcontext() as raw:
                    record |= measure(learner, pairs, options, f"epoch {epoch}, dev")
                    now = time.perf_counter()
                    record |= {"seconds": now - since, "minutes": before + (now - clock) / 60}
                    history.append(record)
                    best = max(history, key=lambda past: past["mean_recall"])  # first of equals
                    content = contents(model, pairs, optimizer, scaler, loss, raw, history)
                    content["config"] = config_of(options)
                    content["finished"] = runs.is_finished(history, options)
                    copy = out / "best.pt" if best is record else None
                    save_checkpoint(out / "last.pt", content, copy)
                runs.write_history(out / "history.csv", history)
                later("support.figures", "draw_curves")(
                    history, out / "curves.png", dataset.origin()
                )
                print(runs.table_line(record), flush=True)
        except KeyboardInterrupt:
            runs.say_stopped(out, home)
            return interrupts.code
    if len(history) < options.epochs:
        print(f"stopped early: no better epoch in {options.patience} (--patience)")
    print(
        f"wrote {out}: best.pt (epoch {best['epoch']}, mean recall on dev "
        f"{best['mean_recall']:.1f}%), last.pt, history.csv, curves.png, config.json"
    )
    return 0


def read_data(options: argparse.Namespace, earlier: dict[str, Any] | None) -> CaptionedImages:
    """The data of a run, and a line about it. Raises UserError when it has changed since."""
    size = image_transform(options)["stored_size"]
    place = options.splits, size, options.cache, options.workers, options.titles
    dataset = load_dataset(options.data, *place)
    print(dataset.summary())
    if earlier and dataset.fingerprint != earlier["fingerprint"]:
        raise UserError(
            f"--resume: the data has changed since (fingerprint {dataset.fingerprint}, the run's "
            f"is {earlier['fingerprint']}); put it back, or start a new run"
        )
    return dataset


def measure(
    learner: CLIP, pairs: dict[str, Pairs], options: argparse.Namespace, place: str
) -> dict[str, float]:
    """Loss and recalls on dev; with --train-recall top-1 of as many training images, too."""
    embedded, scale = evaluate_split(learner, pairs["dev"]), learner.scale().item()
    images, texts = map(torch.from_numpy, embedded[1:3])
    check_finite(0.0, images, texts, place)
    record = {"dev_loss": contrastive_loss(embedded, scale, options.batch_size), **embedded.metrics}
    if "sample" in pairs:
        sample = evaluate_split(learner, pairs["sample"]).metrics
        record |= {f"train_top1_{way}": sample[f"top1_{way}"] for way in ("i2t", "t2i")}
        record["dev_films"] = len(pairs["dev"].rows)
    return {**record, "logit_scale": scale}


def main(argv: list[str]) -> int:
    keep_memory()
    parser = build_parser()
    typed = parser.typed(argv)
    if "resume" in typed:
        return runs.go_on(typed, parser, train)
    recipe, out = (
        runs.read_recipe(typed.get("recipe", "assignment")),
        runs.new_folder(typed, parser),
    )
    runs.check_folder(out)
    if len(recipe) > 1:
        return runs.run_recipe(recipe, out, parser, typed, train)
    return train(resolve(parser, typed, parser.typed(recipe[0][1])), out, None, out)


if __name__ == "__main__":
    run(main)
