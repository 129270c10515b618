"""A start for a text tower from random weights: it learns from captions alone, before any picture.

train.py calls `learn_captions` with --text-epochs. Two captions of one image are a pair, as image
and caption are later on: so the image tower meets a space in which like scenes lie together.
"""

import time
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from cli import UserError
from loss import info_nce
from models import CLIP
from optimizer import build_optimizer, learning_rate


def caption_pairs(caption_image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Two different captions of each image that has two: positions (images, 2), shuffled."""
    order = np.lexsort((random.random(len(caption_image)), caption_image))
    first = np.unique(caption_image[order], return_index=True)[1]
    several = np.bincount(caption_image)[caption_image[order[first]]] > 1
    pairs = np.stack([order[first[several]], order[first[several] + 1]], 1)
    return random.permutation(pairs)


def learn_captions(
    model: CLIP, tokens: torch.Tensor, caption_image: np.ndarray, config: dict[str, Any]
) -> None:
    """Trains text tower and text projection by InfoNCE between captions of the same image.

    tokens (captions, L), padded. As in SimCSE (Gao et al. 2021) a text must find another of its
    meaning in the batch; here people have written it. Raises UserError where no image has two.
    """
    random, started = np.random.default_rng([config["seed"], 1]), time.perf_counter()
    torch.manual_seed(config["seed"])
    count = len(caption_pairs(caption_image, random))
    if count < 2:
        raise UserError("--text-epochs needs images with two captions or more")
    batches = -(-count // config["batch_size"])
    model.train_towers("0", "all")
    model.train()
    optimizer = build_optimizer(model, config, (0.0, config["lr"], config["lr"]))
    epochs, step = config["text_epochs"], 0
    bar = tqdm(total=epochs * batches, desc="captions", unit="batch", leave=False, disable=None)
    with bar:
        for _ in range(epochs):
            total = 0.0
            for pairs in np.array_split(caption_pairs(caption_image, random), batches):
                share = learning_rate(step, epochs * batches, batches)
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * share
                both = tokens[pairs.T.ravel()].to(model.device)
                made = model.encode_text(both[:, : (both != 0).sum(1).max()])
                loss = info_nce(*made.chunk(2), 1 / config["temperature"])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total, step = total + loss.item() / batches, step + 1
                bar.set_postfix(loss=f"{loss.item():.3f}")
                bar.update()
    seconds = time.perf_counter() - started
    print(f"captions alone: {epochs} epochs in {seconds:.0f} s, loss {total:.3f} in the last")
