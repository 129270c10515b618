"""In which precision this machine trains a model faster: measured once, kept in --cache.

train.py's `begin` asks on CPUs with bf16 instructions, which need not be faster for having them.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sources.pictures import cached
from support.command import UserError
from support.device import AUTOCAST, native_bf16

if TYPE_CHECKING:
    from models import CLIP

MEASURED = ("fp32", "bf16")
IMAGES = 32  # of a batch at most: a quarter of the usual one tells as much
SECONDS = 1.0  # no more rounds after this
STEPS = "4"  # part of the question: raise it when the code of a step changes what it costs
ROUNDS = 4  # the first, which allocates memory, is not counted
AT_LEAST = 3
TICK = 1e-3  # seconds that a step takes at least, where a clock is too coarse to see it
WORDS = 12  # of a caption


def faster_precision(model: CLIP, options: Namespace) -> str:
    """The precision in which steps of this model, batch and picture size take less time."""
    measure, name = partial(measure_steps, model, options), name_of(options)
    try:
        seconds = cached(options.cache, name, partial(write_seconds, measure), read_seconds)
    except UserError:  # nothing can be kept there
        seconds = measure()
    return min(seconds, key=seconds.get)


def describe_precision(options: Namespace) -> str:
    """The precision of a run, and what was measured of it on this machine, if anything was."""
    other = {"fp32": "bf16", "bf16": "fp32"}.get(options.precision)
    try:
        seconds = read_seconds(options.cache / name_of(options))
        ratio = seconds[other] / seconds[options.precision]
    except (OSError, ValueError, KeyError):
        return options.precision
    return f"{options.precision} (measured {ratio:.1f} times as fast as {other})"


def machine_of() -> dict[str, str | int | bool]:
    """What decides about speed: the processor and the library. Virtual ones have names alike."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        lines = information.read_text("utf-8", "replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    return {
        "processor": processor,
        "bf16": ", ".join(native_bf16()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def machine_in_words() -> str:
    """`2 cores with bf16 (PROCESSOR)`, or the GPU: what a figure of speed is to be read with."""
    cores = torch.get_num_threads()
    kind = f"{cores} core{'s' * (cores > 1)} {'with' if native_bf16() else 'without'} bf16"
    if torch.cuda.is_available():
        kind = f"one {torch.cuda.get_device_name()}"
    return f"{kind} ({machine_of()['processor']})"


def name_of(options: Namespace) -> str:
    """The cache's folder for one question: which machine, and which steps on it."""
    flags = ("image_tower", "text_tower", "image_size", "batch_size", "captions_per_image")
    more = ("image_weights", "text_weights", "train_image", "train_text", "text_width")
    more += ("text_layers", "captions_alone")
    of_run = {flag: getattr(options, flag) for flag in flags + more}
    question = json.dumps([STEPS, machine_of(), of_run], sort_keys=True)
    return f"precision-{hashlib.sha256(question.encode()).hexdigest()[:12]}"


def write_seconds(measure: Callable[[], dict[str, float]], folder: Path) -> None:
    """Measures, and writes the answer with the machine that it is true of."""
    content = {"seconds_per_step": measure(), "machine": machine_of()}
    (folder / "seconds.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def read_seconds(folder: Path) -> dict[str, float]:
    seconds = json.loads((folder / "seconds.json").read_text("utf-8"))["seconds_per_step"]
    return {name: float(seconds[name]) for name in MEASURED}


def measure_steps(model: CLIP, options: Namespace) -> dict[str, float]:
    """Seconds a step, forward and backward through both towers, in each precision, in turns.

    One thread takes the steps, and the time is its own: what else the machine is doing would
    lengthen one precision's steps and not the other's. A copy of the model learns, from noise, and
    torch's generator is left as it was: the run learns nothing of it.
    """
    generator, size = torch.Generator().manual_seed(0), options.image_size
    count = min(IMAGES, options.batch_size)
    images = torch.rand(count, 3, size, size, generator=generator)
    texts = count * options.captions_per_image, min(WORDS, options.max_tokens)
    tokens = torch.randint(1, len(model.tokenizer.vocabulary), texts, generator=generator)
    copy, seconds, since = deepcopy(model).train(), {name: [] for name in MEASURED}, clock()
    sides = [(copy.text_tower, tokens)]
    if not options.captions_alone:
        sides.append((copy.image_tower, images.contiguous(memory_format=torch.channels_last)))
    with torch.random.fork_rng(devices=[]), one_thread():
        for turn in range(ROUNDS):
            for name in MEASURED:
                copy.autocast, begun = AUTOCAST[name], clock()
                step(copy, sides)
                seconds[name].append(max(clock() - begun, TICK))
            if turn + 1 >= AT_LEAST and clock() - since > SECONDS:
                break
    return {name: min(times[1:]) for name, times in seconds.items()}


def clock() -> float:
    """Seconds that the processor has worked for this thread."""
    return time.thread_time()


@contextmanager
def one_thread() -> Iterator[None]:
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


def step(model: CLIP, sides: list[tuple[torch.nn.Module, torch.Tensor]]) -> None:
    """Forward and, where a tower learns, backward."""
    model.zero_grad(set_to_none=True)
    with model.lower_precision():
        features = [tower(inputs) for tower, inputs in sides]
    total = sum(each.float().square().sum() for each in features)
    if total.requires_grad:
        total.backward()
