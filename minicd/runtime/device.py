"""Which processor to compute on, and in which precision."""

from __future__ import annotations

import platform
from contextlib import nullcontext
from pathlib import Path

import torch


def pick_device(name: str = "auto") -> torch.device:
    """auto: CUDA where there is one, else the CPU. Raises ValueError where CUDA is asked for and absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: there is no such device; use cpu, cuda or auto") from None


def resolved_precision(device: torch.device, precision: str | None = "auto") -> str | None:
    """auto → bf16 where that is fast (CUDA, CPUs with bf16 units), else fp32; other names stay. Raises ValueError for unknown ones."""
    if precision not in (None, "auto", "bf16", "fp32"):
        raise ValueError(f"precision {precision!r} is unknown; known: auto, bf16, fp32")
    if precision != "auto":
        return precision
    fast = device.type == "cuda" or getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return "bf16" if fast else "fp32"


def autocast(device: torch.device, precision: str | None = "auto"):
    """The context in which matrix products run in bf16, or (fp32, None) in the precision of the weights."""
    bf16 = resolved_precision(device, precision) == "bf16"
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def hardware(device: torch.device) -> str:
    """What a result record says of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    models = [line.split(":", 1)[1].strip() for line in cpu_info() if line.startswith("model name")]
    return f"{models[0] if models else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
