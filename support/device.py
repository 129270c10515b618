"""The machine: which device and precision a run takes, and how its memory and sums behave.

train.py and evaluate.py ask here once, at their start.
"""

import ctypes
import os
import sys

import numpy as np
import torch

from support.command import UserError

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU. Raises UserError for what is missing."""
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    check_numpy()
    if name == "auto":
        name = next((device for device, there in available.items() if there()), "cpu")
    if name in available and not available[name]():
        raise UserError(f"--device {name}: this machine or this torch has none; use --device auto")
    if name == "cuda":
        keep_order()
    return torch.device(name)


def check_numpy() -> None:
    """Raises UserError where torch is too old for NumPy: up to 2.2, the last for Intel Macs."""
    try:
        torch.zeros(1).numpy()
    except RuntimeError as error:
        versions = f"torch {torch.__version__} cannot read NumPy {np.__version__}"
        raise UserError(f"{versions}: pip install 'numpy<2'") from error


def choose_precision(name: str, device: torch.device) -> str:
    """`auto` asks the device; bf16 emulated by a CPU is several times slower than fp32."""
    if name == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU; use bf16, fp32 or auto")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if bf16_in_hardware() else "fp16"
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    native = any(getattr(torch.cpu, test, lambda: False)() for test in tests)
    return "bf16" if device.type == "cpu" and native else "fp32"


def bf16_in_hardware() -> bool:
    """Whether a GPU has bf16 (from compute capability 8.0); an emulated one is slower than fp32."""
    try:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    except TypeError:  # an older torch, which does not count what is emulated
        return torch.cuda.is_bf16_supported()


def keep_memory() -> None:
    """Tells glibc to keep freed memory: large batches on a CPU are 1.6 to 2 times as fast for it.

    Otherwise every large tensor is mapped afresh, and its pages are zeroed again.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):  # musl has none
            for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):
                library.mallopt(option, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD


def keep_order() -> None:
    """Lets CUDA sum in one order alone, so that a run done again, or resumed, has the same bits."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # has no such order in its gradient
