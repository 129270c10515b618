"""The plain loop of a course, as the baseline of report/benchmark.py: the same towers, in fp32.

    python report/course_loop.py --data Flickr8k --batches 15

A Dataset opens each picture's file, crops, flips and resizes it with torchvision; a DataLoader with
two workers feeds AdamW. It runs in a process of its own, without what train.py does for speed.
"""

import sys
import time
from argparse import Namespace
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project above this folder

from dataset import Pairs, load_dataset
from models import build_model, hold_back
from support.command import UserError, number, run
from support.recipes import first_options
from towers import on_cpu
from train import build_parser


class Photographs(Dataset):
    """A photograph and one of its captions; the tower itself normalises the pixels."""

    def __init__(self, pairs: Pairs, size: int):
        self.pairs, self.tokens = pairs, pairs.tokenizer(pairs.captions)
        crop = transforms.RandomResizedCrop(size, scale=(0.6, 1))
        self.transform = transforms.Compose(
            [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        )
        self.first = {int(row): i for i, row in reversed([*enumerate(pairs.caption_image)])}

    def __len__(self) -> int:
        return len(self.pairs.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(image (3, S, S) in [0, 1], tokens (L,))."""
        image = Image.open(self.pairs.dataset.paths[self.pairs.rows[index]]).convert("RGB")
        return self.transform(image), self.tokens[self.first[index]]


def images_per_second(options: Namespace) -> float:
    """The loop's rate after its first batch, for which the workers start. Raises UserError."""
    dataset = load_dataset(options.data, options.splits, 96, options.cache, options.workers)
    if not dataset.paths:
        raise UserError("built-in data has no files to open")
    pairs = dataset.pairs("train")
    pairs.tokenizer.max_tokens = options.max_tokens
    options.image_weights = options.text_weights = "none"  # the speed is that of any weights
    model = build_model(options, pairs.tokenizer).to(memory_format=torch.contiguous_format).train()
    hold_back(model.image_tower, options.train_image)
    hold_back(model.text_tower, options.train_text)
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], options.lr)
    photographs = Photographs(pairs, options.image_size)
    loader = DataLoader(photographs, options.batch_size, shuffle=True, num_workers=2)
    seen = 0
    for step, (images, tokens) in enumerate(islice(loader, options.batches)):
        if step == 1:
            clock = time.perf_counter()
        image_embeddings, text_embeddings, scale = model(images, tokens)
        logits, target = scale * image_embeddings @ text_embeddings.T, torch.arange(len(images))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        seen += len(images) if step else 0
    return seen / (time.perf_counter() - clock)


def main(argv: list[str]) -> None:
    on_cpu.exchange = lambda net: net  # a course's towers have PyTorch's own layers
    parser = build_parser()
    parser.prog, parser.description = "course_loop.py", __doc__.split("\n")[0]
    flag = parser.add_argument_group("benchmark").add_argument
    flag("--batches", type=number(int, 2, 100_000), default=15, help="to train on")
    print(f"{images_per_second(first_options(parser, parser.typed(argv))):.3f}")


if __name__ == "__main__":
    run(main)
