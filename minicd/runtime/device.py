"""The device to compute on, and the precision."""

from __future__ import annotations

import platform
from contextlib import nullcontext
from pathlib import Path

import torch

PRECISIONS = ("auto", "bf16", "fp32", "bf16-weights")


def pick_device(name: str = "auto") -> torch.device:
    """auto: CUDA if available, else the CPU. Raises ValueError for an unknown device or absent CUDA."""
    return find_device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name,
                       "--device ")


def find_device(device: str | torch.device, flag: str = "") -> torch.device:
    """Raises ValueError, in a sentence that begins with `flag`, where models cannot be on this device."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"{flag}{device}: there is no such device; use {flag}cpu or {flag}cuda") from None
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"{flag}{device}: models run on cpu and cuda only")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{flag}{device}: this PyTorch sees no CUDA device; use {flag}cpu")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{flag}{device}: there are only {torch.cuda.device_count()} CUDA devices")
    return found


def pick_precision(device: torch.device, precision: str | None = "auto") -> str | None:
    """auto → bf16 where the device has units for it, else fp32. ValueError for unknown names."""
    if precision not in (None, *PRECISIONS):
        raise ValueError(f"precision {precision!r} is unknown; known: {', '.join(PRECISIONS)}")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)  # emulated, it is slower than fp32
    else:
        fast = (getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
                and torch.backends.cpu.get_cpu_capability() == "AVX512")  # else PyTorch's bf16 kernels fail
    return "bf16" if fast else "fp32"


def autocast(device: torch.device, precision: str | None = "auto"):
    """A context where matrix products run in bf16, or with fp32 and None in the precision of the weights."""
    return torch.autocast(device.type, torch.bfloat16) if in_bf16(device, precision) else nullcontext()


def in_bf16(device: torch.device, precision: str | None = "auto") -> bool:
    """Whether matrix products then run in bf16."""
    return pick_precision(device, precision) in ("bf16", "bf16-weights")


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
