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
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from captions import Rewriter, Tokenizer, parse_rates
from charts import draw_curves
from cli import UserError, atomic_write, run, warn
from dataset import Batch, Dataset, Feed, Split, limited, load_dataset
from embedding import NOTHING, Cached
from evaluate import Embedded, contrastive_loss, evaluate_split
from features import image_features, key_of, opened, reading_features, text_features, window
from flags import build_parser, resolve
from generalisation import genre_likeness
from images import augment
from loss import combined
from metrics import table_head, table_line
from models import (
    AUTOCAST,
    Model,
    SideBySide,
    build_model,
    choose_device,
    choose_precision,
    image_towers,
    image_transform,
    keep_memory,
    make_tokenizer,
    model_from_checkpoint,
    save_checkpoint,
)
from optimizer import (
    WHAT_THEN,
    Average,
    Phase,
    Trainer,
    all_epochs,
    check_spread,
    phase_after,
    phases_of,
    plateau_factor,
    size_in,
    unsettled,
)
from pretraining import pretrain_text
from resuming import restore, resumed
from text_towers import TEXT_TOWERS, read_text_folder, text_folder

# ------------------------------------------------------------------------------ one epoch


def train_epoch(
    trainer: Trainer, epoch: int, batches: Iterable[Batch], factor: float = 1.0
) -> dict[str, float]:
    """One pass over `batches`: the mean loss, the last learning rate and images a second.

    Raises UserError when the loss is not finite or the embeddings have collapsed; the weights are
    then still those before that step.
    """
    model, config, device = trainer.model.train(), trainer.config, trainer.device
    shuffler = torch.Generator().manual_seed(config["seed"] * 1_000_003 + epoch)
    total = seen = 0
    started = time.perf_counter()
    bar = tqdm(batches, f"epoch {epoch}", trainer.steps, unit="batch", leave=False, disable=None)
    for index, batch in enumerate(bar):
        rate = trainer.set_rates((epoch - trainer.phase.first) * trainer.steps + index, factor)
        images = batch.images.to(device, non_blocking=True)
        if trainer.start:
            images = window(opened(images), config["map_crop"], shuffler)
        else:
            images = augment(images, size_in(epoch, config), config["image_augment"], shuffler)
        repeats = len(batch.texts) // len(images)
        ids = torch.arange(len(images), device=device).repeat_interleave(repeats)
        readings = None if batch.readings is None else batch.readings.to(device)
        images, texts, scale = model(images, batch.texts.to(device), trainer.start, readings)
        alike = trainer.alike
        if alike is not None:
            chosen = batch.positions.repeat_interleave(repeats)
            alike = alike[chosen][:, chosen].to(device)
        loss = combined(images[ids], texts, scale, model.logit_bias, ids, alike, config)
        value, place = loss.item(), f"epoch {epoch}, batch {index + 1}"
        if not math.isfinite(value):
            raise UserError(f"{place}: the loss is {value}; {WHAT_THEN}")
        check_spread(images, texts, place)
        trainer.step(loss)
        total, seen = total + value * len(images), seen + len(images)
        bar.set_postfix(loss=f"{value:.3f}", rate=f"{seen / (time.perf_counter() - started):.0f}/s")
    return {
        "train_loss": total / seen,
        "lr": rate,
        "images_per_second": seen / (time.perf_counter() - started),
    }


# ------------------------------------------------------------------------------- the run


def write_history(path: Path, history: list[dict[str, float]]) -> None:
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(history[0]))
        writer.writeheader()
        writer.writerows(history)


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
    cache: Path
    config: dict[str, Any]
    dataset: Dataset
    split: Split
    dev: Split
    model: Model
    rewriter: Rewriter | None
    readings: np.ndarray | None  # what is written on every image of the dataset
    since: float  # the clock when the run began, or when its last epoch ended
    history: list[dict[str, float]] = field(default_factory=list)
    trainer: Trainer | None = None
    feed: Feed | None = None
    cached: Cached = NOTHING  # of dev
    sample: tuple[Split, Cached] | None = None  # of training films, as many as dev has
    # Embeddings (images, texts) of dev and sample by the image towers that have learned already.
    beside: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    @cached_property
    def tokens(self) -> list[torch.Tensor]:
        """The captions of train and dev as they stand, padded; counts those that are cut."""
        self.model.tokenizer.cut = 0
        return [self.model.tokenizer(each.captions) for each in (self.split, self.dev)]

    def begin(self, phase: Phase) -> None:
        """Sets up a phase: which blocks learn, the features below them, the optimizer."""
        config, model = image_towers(self.config)[phase.member], self.model
        if self.trainer and self.trainer.average:
            self.trainer.average.swap()  # a phase goes on from what was measured and kept
        if isinstance(model, SideBySide):
            model.trained.fill_(phase.member + 1)
        model = model.members[phase.member]
        tokens, dev_tokens = self.tokens
        starts = []
        own = [p for p in phases_of(self.config) if p.member == phase.member]
        for each in [p for p in own if p.first >= phase.first][::-1]:
            model.train_towers(each.image, each.text)  # the last is `phase` itself
            starts.insert(0, model.first_that_learns() if config["views"] else 0)
        images, rows, self.cached = self.dataset.pixels, self.split.images, NOTHING
        if start := starts[0]:
            # --head-epochs see whole pictures alone: what upper blocks make of others would take
            # a fifth of the time of all features.
            above = len(model.image_blocks) if config["head_epochs"] else 0
            shown = {each: 1 if each == above else config["views"] for each in starts}
            views = {"train": shown, "dev": dict.fromkeys(starts, 1 + config["test_mirror"])}
            images, dev_images = (
                image_features(
                    *(model, self.dataset, split.images, views[split.name]),
                    *(config, self.cache, split.name),
                )[start]
                for split in (self.split, self.dev)
            )
            rows, self.cached = np.arange(len(rows)), Cached(dev_images, start)
        texts = tokens.numpy()
        if phase.text == "0" and not self.rewriter:
            texts, dev_texts = (
                text_features(model, given, config, self.cache, name)
                for given, name in ((tokens, "train"), (dev_tokens, "dev"))
            )
            self.cached = self.cached._replace(texts=dev_texts)
        self.cached = self.cached._replace(readings=self.readings_of(self.dev))
        self.feed = Feed(images, rows, self.split, texts, config, self.readings_of(self.split))
        alike = None
        if config["soft_positives"] == "genres":
            genres = [self.dataset.films[row].genres for row in self.split.images]
            alike = torch.from_numpy(genre_likeness(genres))
        if self.dataset.films:
            self.sample = self.sample_of_training(images, rows, texts)
        average = Average(model, config["ema"]) if config["ema"] else None
        steps = self.feed.batches()
        self.trainer = Trainer(model, config, phase, steps, start, average, alike)

    def readings_of(self, split: Split) -> np.ndarray | None:
        return None if self.readings is None else self.readings[split.images]

    def sample_of_training(
        self, images: np.ndarray, rows: np.ndarray, texts: np.ndarray
    ) -> tuple[Split, Cached]:
        """Training films to be measured like dev's, for the gap between the two, and features."""
        whole, count = self.split, min(len(self.dev.images), len(self.split.images))
        split = limited(whole, count, 0) if count < len(whole.images) else whole
        chosen = np.searchsorted(whole.images, split.images)
        cached = Cached(readings=self.readings_of(split))
        if self.cached.start:
            views = images[rows[chosen]][:, : 1 + self.config["test_mirror"]]
            cached = cached._replace(images=views, start=self.cached.start)
        if self.cached.texts is not None:
            cached = cached._replace(texts=texts[np.isin(whole.caption_image, chosen)])
        return split, cached

    def texts_of(self, epoch: int) -> Feed:
        """The feed of an epoch: with --text-augment its captions are rewritten."""
        if not self.rewriter:
            return self.feed
        random = np.random.default_rng([self.config["seed"], epoch])
        captions = list(self.split.captions)
        for row in np.sort(np.concatenate([texts for _, texts in self.feed.plan(epoch)])):
            captions[row] = self.rewriter(captions[row], random)
        return self.feed._replace(texts=self.model.tokenizer(captions).numpy())

    def epoch(self, epoch: int) -> None:
        """Trains an epoch, measures dev, and keeps the result: checkpoints, history, curves."""
        started, average = time.perf_counter(), self.trainer.average
        record: dict[str, float] = {"epoch": epoch}
        batches = self.texts_of(epoch).epoch(epoch, ahead=self.config["workers"] > 0)
        settled = self.history[unsettled(self.trainer.phase, self.config) :]
        scores = [past["mean_recall"] for past in settled]
        factor = plateau_factor(scores) if self.config["schedule"] == "plateau" else 1.0
        record |= train_epoch(self.trainer, epoch, batches, factor)
        if average:
            average.swap()
        embedded = self.measured(self.dev, self.cached)
        own = slice(-self.config["embed_dim"], None)  # the others' would hide a collapse
        images, texts = embedded.image_embeddings[:, own], embedded.text_embeddings[:, own]
        check_spread(torch.from_numpy(images), torch.from_numpy(texts), f"epoch {epoch}, dev")
        scale = self.trainer.model.scale().item()
        record["dev_loss"] = contrastive_loss(embedded, scale, self.config["batch_size"])
        record |= embedded.metrics
        if self.sample:
            made = self.measured(*self.sample)
            record |= {f"train_top1_{w}": made.metrics[f"top1_{w}"] for w in ("i2t", "t2i")}
            record["dev_films"] = len(self.dev.images)
        now, past = time.perf_counter(), self.history[-1]["minutes"] if self.history else 0.0
        record |= {"logit_scale": scale, "seconds": now - started}
        record["minutes"], self.since = past + (now - self.since) / 60, now
        self.history.append(record)
        best = self.out / "best.pt" if self.stale() == 0 else None
        save_checkpoint(self.out / "last.pt", self.content(), copy=best)
        if average:
            average.swap()
        write_history(self.out / "history.csv", self.history)
        flatters = "; SPLIT BY CAPTION: flatters" if self.dataset.by_caption else ""
        footer = f"{self.dataset.layout}, {self.dataset.splits} splits{flatters}"
        draw_curves(self.history, self.out / "curves.png", footer)

    def measured(self, split: Split, cached: Cached) -> Embedded:
        """What the tower that learns makes of a split, beside those that have learned."""
        cached = cached._replace(beside=self.beside.get(split.name))
        made = evaluate_split(self.trainer.model, self.dataset, split, cached)
        done, member = len(self.history) + 1, self.trainer.phase.member
        if done < all_epochs(self.config) and phase_after(done, self.config).member > member:
            own = made.image_embeddings, made.text_embeddings
            self.beside[split.name] = [torch.from_numpy(x) for x in own]
        return made

    def best(self) -> dict[str, float]:
        return max(self.history, key=lambda record: record["mean_recall"])  # the first of equals

    def stale(self) -> int:
        """How many epochs ago the best one was."""
        return int(self.history[-1]["epoch"] - self.best()["epoch"])

    def finished(self) -> bool:
        """All epochs done, or --patience run out in the last phase."""
        done, patience = len(self.history), self.config["patience"]
        in_phase = done - unsettled(phases_of(self.config)[-1], self.config)
        idle = patience and in_phase >= patience and self.stale() >= patience
        return done >= all_epochs(self.config) or bool(done and idle)

    def content(self) -> dict[str, Any]:
        """What the checkpoint holds: enough to go on in the same bits, and to be evaluated."""
        names, digests = self.dataset.names, self.dataset.digests
        trained_on, average = self.split.images, self.trainer.average
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {
            "epoch": len(self.history),
            "finished": self.finished(),
            "config": self.config,
            "transform": image_transform(self.config),
            "vocabulary": self.model.tokenizer.vocabulary,
            "model": self.model.state_dict(),  # with --ema the average
            "average": average.state_dict() if average else None,  # with --ema the weights
            "optimizer": self.trainer.optimizer.state_dict(),
            "scaler": self.trainer.scaler.state_dict(),
            "history": self.history,
            "beside": self.beside,
            "random_states": {"cpu": torch.get_rng_state(), "cuda": cuda},
            "fingerprint": self.dataset.fingerprint,
            "readings": "" if self.readings is None else key_of(self.readings),
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
    since, place = time.perf_counter(), choose_device(device)
    # `auto` becomes what this device has; a run that goes on may meet a device without its own.
    config["precision"] = choose_precision(config["precision"], place)
    transform = image_transform(config)
    folder = None
    if content is None and TEXT_TOWERS[config["text_tower"]].folder:
        folder = text_folder(config["text_tower"], config["text_weights"])
        known, vocabulary, config["text_lower_case"] = read_text_folder(folder)
        config["text_architecture"] = known
    dataset = load_dataset(
        *(config["data"], config["splits"], transform["stored_size"], cache, config["workers"]),
        config["titles"],
    )
    print(dataset.summary())
    if content and dataset.fingerprint != content["fingerprint"]:
        raise UserError(
            f"--resume: the data has changed since (fingerprint {dataset.fingerprint}, the run's "
            f"is {content['fingerprint']}); put it back, or start a new run"
        )
    split = limited(dataset.split("train"), config["limit"], config["seed"])
    if len(split.images) < 2:
        raise UserError("one training image has nothing to be told apart from; give more")
    if content:
        model = model_from_checkpoint(content, out / "last.pt")
    else:
        if folder:
            tokenizer = make_tokenizer(config, vocabulary)
        else:
            tokenizer = Tokenizer.train(split.captions, config["min_count"], config["max_tokens"])
        wanted = folder if config["text_weights"] != "none" else None
        model = build_model(config, transform, tokenizer, wanted)
    for member in model.to(place).members:
        member.autocast = AUTOCAST[config["precision"]]
    rates = parse_rates(config["text_augment"])
    rewriter = Rewriter(split.captions, split.caption_image, rates) if any(rates.values()) else None
    history = content["history"] if content else []
    readings = None
    if config["soft_positives"] == "genres" and not any(film.genres for film in dataset.films):
        raise UserError(f"--soft-positives genres: {dataset.path} has no genres")
    if config["poster_text"]:
        readings = reading_features(model, dataset, config, cache, config["workers"])
        if content and content["readings"] != key_of(readings):
            told = "other words are read on the pictures than the run read"
            raise UserError(f"--resume: {told}; install its OCR packages, or start a new run")
    run = Run(
        *(out, cache, config, dataset, split, dataset.split("dev"), model, rewriter),
        *(readings, since, history),
    )
    if not content and config["pretrain_text"]:
        first, *others = model.members
        pretrain_text(first, run.tokens[0], split.caption_image, config)
        for member in others:
            member.text_projection.load_state_dict(first.text_projection.state_dict())
    if content:
        run.beside = content["beside"]
    run.begin(phase_after(len(history), config))
    torch.manual_seed(config["seed"])  # dropout draws from torch's own generator
    if content:
        restore(run.trainer, content)
    return run


def describe(run: Run) -> str:
    """The line before the table: towers, sizes, precision and what chance would give."""
    config, model = run.config, run.model
    tokenizer = model.tokenizer
    weights = list(model.parameters())
    learned = sum(w.numel() for w in run.trainer.model.parameters() if w.requires_grad)
    return (
        f"model: {config['image_tower']} at {config['image_size']} px and {config['text_tower']}, "
        f"{sum(weight.numel() for weight in weights):,} weights of which {learned:,} learn at "
        f"first; vocabulary {len(tokenizer.vocabulary):,} words, {tokenizer.cut:,} captions cut to "
        f"{tokenizer.max_tokens} tokens; {config['precision']} on {model.device}; "
        f"{len(run.split.images):,} images in {run.feed.batches():,} batches; "
        f"chance on dev: R@1 {100 / len(run.dev.images):.2f}%"
    )


def main(argv: list[str]) -> int:
    keep_memory()
    parser = build_parser()
    typed = parser.typed(argv)
    options = {**parser.defaults(), **typed}
    content = None
    if "resume" in typed:
        path, content = resumed(typed)
        out = path.parent
        config = {**content["config"], **{f: typed[f] for f in ("epochs", "workers") if f in typed}}
        if content["epoch"] >= all_epochs(config) or (
            content["finished"] and "epochs" not in typed
        ):
            further = "" if len(image_towers(config)) > 1 else "; --epochs N goes further"
            print(f"{path}: this run is finished after {content['epoch']} epochs{further}")
            return 0
    else:
        config = resolve(typed, parser.defaults())
        name = Path(config["data"]).name.lower()
        out = config["out"] or Path("checkpoints") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        for place in ("resume", "cache", "out", "device"):  # of this machine, not of the run
            del config[place]
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
            if len(run.history) == run.trainer.phase.last:
                run.begin(phase_after(len(run.history), run.config))
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
    if len(run.history) < all_epochs(run.config):
        print(f"stopped early: no better epoch in {run.stale()} (--patience)")
    print(
        f"wrote {run.out}: best.pt (epoch {best['epoch']}, mean recall on dev "
        f"{best['mean_recall']:.1f}%), last.pt, history.csv, curves.png, config.json"
    )
    return 0


if __name__ == "__main__":
    run(main)
