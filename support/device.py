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
    """What `auto` means on a device: on a CPU with bf16 instructions it stays `auto`.

    There support/precision.py measures; bf16 that is emulated is several times slower than fp32, on
    GPUs too. Raises UserError for fp16 on a CPU.
    """
    if name == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU; use bf16, fp32 or auto")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    return "auto" if device.type == "cpu" and native_bf16() else "fp32"


def native_bf16() -> list[str]:
    """The bf16 instructions of this CPU, by name."""
    tests = {"avx512_bf16": "_is_avx512_bf16_supported", "amx": "_is_amx_tile_supported"}
    return [name for name, test in tests.items() if getattr(torch.cpu, test, lambda: False)()]


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
    """Lets CUDA sum in one order alone, so that a run done again, or resumed, has the same bits.

    And float32 is float32, as on a CPU.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # has no such order in its gradient
    if hasattr(torch.backends.cuda, "enable_cudnn_sdp"):  # nor has this one, since torch 2.5
        torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.allow_tf32 = False  # which has 10 bits: embeddings were off by 3e-4
