"""The device to compute on, and the precision."""

from __future__ import annotations

import platform
from contextlib import nullcontext
from pathlib import Path

import torch


def pick_device(name: str = "auto") -> torch.device:
    """auto: CUDA if available, else the CPU. Raises ValueError for an unknown device or absent CUDA."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: there is no such device; use cpu, cuda or auto") from None


def pick_precision(device: torch.device, precision: str | None = "auto") -> str | None:
    """auto → bf16 where it is fast (CUDA, CPUs with bf16 units), else fp32. ValueError for unknown names."""
    if precision not in (None, "auto", "bf16", "fp32"):
        raise ValueError(f"precision {precision!r} is unknown; known: auto, bf16, fp32")
    if precision != "auto":
        return precision
    fast = device.type == "cuda" or getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return "bf16" if fast else "fp32"


def autocast(device: torch.device, precision: str | None = "auto"):
    """A context where matrix products run in bf16, or with fp32 and None in the precision of the weights."""
    bf16 = pick_precision(device, precision) == "bf16"
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def hardware(device: torch.device) -> str:
    """The machine, for result records."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    models = [line.split(":", 1)[1].strip() for line in cpu_info() if line.startswith("model name")]
    name = models[0] if models else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
