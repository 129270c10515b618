"""How long the convolutions and matrix products of a step take alone: report/benchmark.py's limit.

A step is watched below autograd; each product in it, forward and backward, is then done again by
itself, on noise of the same shapes, strides and type.
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
PRODUCTS = {"convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm"}
PRODUCTS |= {ATTENTION, f"{ATTENTION}_backward"}


class Products(TorchDispatchMode):
    """Inside the block every product is noted: how often each, and the shapes of its inputs."""

    def __init__(self):
        super().__init__()
        self.counts, self.calls = Counter(), {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.overloadpacket.__name__ in PRODUCTS:
            shapes = tree_map(shape_of, (args, kwargs))
            key = repr((function, tree_map(described, shapes)))
            self.counts[key] += 1
            self.calls[key] = function, shapes
        return function(*args, **kwargs)


def shape_of(value: Any) -> Any:
    return torch.empty_like(value, device="meta") if isinstance(value, torch.Tensor) else value


def described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    return value


def noise(value: Any) -> Any:
    """A tensor of a shape, filled; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    tensor = torch.empty_like(value, device="cpu")
    return tensor.uniform_(-1, 1) if tensor.is_floating_point() else tensor.zero_()


def seconds_of_products(step: Callable[[], None], rounds: int = 3) -> float:
    """Seconds that the products of a step take, each alone: the best of some rounds, summed."""
    with Products() as products:
        step()
    total = 0.0
    with torch.no_grad():
        for key, (function, shapes) in products.calls.items():
            args, kwargs = tree_map(noise, shapes)
            times = []
            for _ in range(rounds + 1):  # the first prepares
                since = time.perf_counter()
                function(*args, **kwargs)
                times.append(time.perf_counter() - since)
            total += products.counts[key] * min(times[1:])
    return total
