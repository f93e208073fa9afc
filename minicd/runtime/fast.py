"""Faster decoding with the same results: packed matrices on the CPU, a recorded step on CUDA."""

from __future__ import annotations

import functools
import warnings
from contextlib import contextmanager
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Embedding

PACKED_PAYS = 2**18  # rows × weights from which oneDNN beats the plain product; measured on an AVX-512 CPU
RECORD_FROM = 8  # steps from which a recording pays


class PackedLinear:
    """x Wᵀ + b by oneDNN, with W rearranged at its second use into its blocks: up to 2.5 times as fast."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self.weight, self.bias, self.prepared, self.uses = weight, bias, None, 0

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else self.weight.dtype
        if rows * self.weight.numel() < PACKED_PAYS or (dtype == torch.bfloat16 and not packs_bf16()):
            return F.linear(x, self.weight, self.bias)
        if self.uses == 0:
            bias = None if self.bias is None else self.bias.detach().to(dtype)
            self.prepared = self.weight.detach().to(dtype), bias
        elif self.uses == 1:  # what is used once, like an encoder's matrices, is not worth it
            self.prepared = torch.ops.mkldnn._reorder_linear_weight(self.prepared[0], rows), self.prepared[1]
        self.uses += 1
        return torch.ops.mkldnn._linear_pointwise(x.to(dtype), *self.prepared, "none", [], "")


@contextmanager
def pack_weights(model: nn.Module):
    """Inside, the model's CPU products use packed copies of the weights, which must not change meanwhile."""
    changed: list[tuple[nn.Module, str]] = []
    try:
        if next(model.parameters()).device.type == "cpu" and can_pack():
            for module in model.modules():
                if type(module) is nn.Linear:
                    module.forward = PackedLinear(module.weight, module.bias)
                    changed.append((module, "forward"))
                elif type(module) is Embedding:
                    module.head = PackedLinear(module.weight)
                    changed.append((module, "head"))
        yield
    finally:
        for module, name in changed:
            delattr(module, name)


def can_pack() -> bool:
    """PyTorch's operators for packed weights are undocumented: another version may lack them."""
    names = "_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported"
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


def packs_bf16() -> bool:
    """oneDNN multiplies bf16 only on CPUs with AVX-512, PyTorch's plain product on all."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


class RecordedStep:
    """One decoding step as a CUDA graph, replayed without Python and without a launch for each kernel."""

    def __init__(self, model, tokens: Tensor, cache):
        self.tokens, self.cache = tokens.clone(), cache
        cache.cache_position = torch.full((1,), cache.position, device=tokens.device)
        with torch.cuda.device(tokens.device):  # which need not be the current one
            stream = recording_stream(tokens.device)
            self.warm_up(model, stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=stream):
                self.logits = model.step(self.tokens, cache)
        cache.position -= 1

    def warm_up(self, model, stream) -> None:
        """Libraries initialise in the first runs; a recording must not contain that."""
        current = torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(2):
                model.step(self.tokens, self.cache)
                self.cache.position -= 1
                self.cache.cache_position -= 1
        current.wait_stream(stream)

    def __call__(self, tokens: Tensor) -> Tensor:
        self.tokens.copy_(tokens)
        self.graph.replay()
        self.cache.position += 1
        return self.logits


@functools.cache
def recording_stream(device: torch.device):
    """The stream for all recordings on a device: libraries keep a workspace for each stream."""
    return torch.cuda.Stream(device)


def stepper(model, tokens: Tensor, cache, steps: int) -> Callable[[Tensor], Tensor]:
    """A function tokens [B] → logits [B, V] for the next steps, recorded on CUDA where that pays."""
    position = cache.position
    if pays(tokens, steps):
        try:
            return RecordedStep(model, tokens, cache)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            warnings.warn(f"decoding goes on without a CUDA graph: {reason}")
            cache.position, cache.cache_position = position, None  # the recording may have changed them
    return functools.partial(model.step, cache=cache)


def pays(tokens: Tensor, steps: int) -> bool:
    return tokens.device.type == "cuda" and steps >= RECORD_FROM
