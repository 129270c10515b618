"""Text pretraining for a text tower from random weights: captions alone, before any picture.

train.py calls `pretrain_text` with --pretrain-text. Two captions of one image are a pair, as image
and caption are later on: so the image tower meets a space in which like scenes lie together.
"""

import math
import time
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from captions import PAD
from cli import UserError
from loss import info_nce
from models import CLIP
from optimizer import Phase, Trainer


def caption_pairs(caption_image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Two different captions of each image that has two: positions (images, 2), shuffled."""
    order = np.lexsort((random.random(len(caption_image)), caption_image))
    first = np.unique(caption_image[order], return_index=True)[1]
    several = np.bincount(caption_image)[caption_image[order[first]]] > 1
    pairs = np.stack([order[first[several]], order[first[several] + 1]], 1)
    return random.permutation(pairs)


def pretrain_text(
    model: CLIP, tokens: torch.Tensor, caption_image: np.ndarray, config: dict[str, Any]
) -> None:
    """Trains text tower and text projection by InfoNCE between captions of the same image.

    tokens (captions, L), padded. As in SimCSE (Gao et al. 2021) a text must find another of its
    meaning in the batch; here people have written it. Batch, rate, warm-up and schedule are those
    of the run, the temperature stays at its start. Raises UserError where no image has two
    captions, or when the loss is not finite.
    """
    count, epochs = int((np.bincount(caption_image) > 1).sum()), config["pretrain_text"]
    if count < 2:
        told = "needs images with two captions or more; give --pretrain-text 0 --train-text all"
        raise UserError(f"--pretrain-text {told}")
    random, started = np.random.default_rng([config["seed"], 0, 1]), time.perf_counter()
    torch.manual_seed(config["seed"])
    model.train_towers("0", "all")
    model.train()
    batches, rate = -(-count // config["batch_size"]), config["lr"]
    phase = Phase(0, 1, epochs, "0", "all", (0.0, rate, rate))
    trainer = Trainer(model, config, phase, batches)
    bar = tqdm(total=epochs * batches, desc="captions", unit="batch", leave=False, disable=None)
    with bar:
        for epoch in range(epochs):
            total = 0.0
            for index, pairs in enumerate(
                np.array_split(caption_pairs(caption_image, random), batches)
            ):
                trainer.set_rates(epoch * batches + index, 1.0)
                both = tokens[pairs.T.ravel()]
                made = model.encode_text(both[:, : (both != PAD).sum(1).max()].to(model.device))
                loss = info_nce(*made.chunk(2), 1 / config["temperature"])
                if not math.isfinite(loss.item()):
                    raise UserError(f"--pretrain-text: the loss is {loss.item()}; try a lower --lr")
                trainer.step(loss)
                total += loss.item() / batches
                bar.set_postfix(loss=f"{loss.item():.3f}")
                bar.update()
    seconds = time.perf_counter() - started
    print(f"captions alone: {epochs} epochs in {seconds:.0f} s, loss {total:.3f} in the last")
