"""The parts of both models: RMS norm, attention over given keys and values, the static key/value cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROUNDED = 16  # steps between new lengths of attention, see `KVCache.end`


class RMSNorm(nn.Module):
    """x / rms(x) * weight, always computed in fp32."""

    def __init__(self, size: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.epsilon)
        return y.to(self.weight.dtype)


class Embedding(nn.Embedding):
    """Token embeddings that can also be the output head."""

    def head(self, x: Tensor) -> Tensor:
        """x [..., d] → logits [..., V]: its product with each token's embedding."""
        return F.linear(x, self.weight)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float,
           prefix: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """softmax(scale · q kᵀ + bias) v.  q [B, heads, T, d], k and v [B, kv_heads, S, d] → [B, heads, T, d].

    If kv_heads < heads, neighbouring heads share a key head (grouped-query attention, Ainslie et al., 2023).
    `bias` is broadcastable to [B, heads, T, S]; where heads share keys, it is the same for all heads.
    `prefix`: further keys and values [1, kv_heads, P, d], which all rows see.
    """
    if prefix is not None:
        return attend_with_prefix(q, k, v, bias, scale, prefix)
    if q.device.type == "cpu" and (q.shape[2] == 1 or (q.dtype == torch.bfloat16 and q.requires_grad)):
        return plain_attend(q, k, v, bias, scale)
    share, shape = q.shape[1] // k.shape[1], q.shape
    if share > 1 and q.device.type != "cpu":  # shared heads with a mask fall to the slowest of CUDA's kernels
        if q.shape[2] == 1:  # the queries of all heads that share a key head, like several of one head
            q = q.reshape(len(q), k.shape[1], share, -1)
        else:
            k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        share = 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=scale,
                                          enable_gqa=share > 1).reshape(shape)


def plain_attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """`attend` by plain products: faster than the CPU's fused kernel for one query and for bf16 gradients."""
    (batch, heads, length, size), kv_heads = q.shape, k.shape[1]
    groups = (q if scale == 1.0 else q * scale).reshape(batch, kv_heads, -1, size).to(k.dtype)
    with torch.autocast(q.device.type, enabled=False):  # it would copy keys to bf16, weights to fp32
        logits = (groups @ k.transpose(-2, -1)).view(batch, heads, length, -1)
        weights = logits.add_(bias).softmax(-1)
        y = weights.view(batch, kv_heads, -1, v.shape[2]).to(v.dtype) @ v
    return y.reshape(batch, heads, length, size).to(q.dtype)


def attend_with_prefix(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float,
                       prefix: tuple[Tensor, Tensor]) -> Tensor:
    """`attend`, where one product for each key head serves the prefix of all rows."""
    (batch, heads, length, size), kv_heads = q.shape, k.shape[1]
    prefix_k, prefix_v = (x[0].to(k.dtype) for x in prefix)  # [kv_heads, P, d]
    groups = (q * scale).reshape(batch, kv_heads, -1, size).to(k.dtype)
    own = product(groups, k.transpose(-2, -1)).view(batch, heads, length, -1).add_(bias)
    before = rows_together(groups) @ prefix_k.transpose(-2, -1)
    logits = torch.cat([before, rows_together(own.view(batch, kv_heads, -1, k.shape[2]))], -1)
    before, own = logits.softmax(-1).to(v.dtype).split([prefix_k.shape[1], k.shape[2]], -1)
    y = rows_apart(before @ prefix_v, batch) + product(rows_apart(own, batch), v)
    return y.reshape(batch, heads, length, size).to(q.dtype)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in their own type: autocast would copy all of a cache in fp32 to bf16 at every step."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def rows_together(x: Tensor) -> Tensor:
    """[B, kv_heads, n, m] → [kv_heads, B · n, m]"""
    return x.transpose(0, 1).flatten(1, 2)


def rows_apart(x: Tensor, batch: int) -> Tensor:
    """[kv_heads, B · n, m] → [B, kv_heads, n, m]"""
    return x.unflatten(1, (batch, -1)).transpose(0, 1)


class KVCache:
    """Keys and values of all steps so far, allocated once: for each layer two tensors [B, heads, length, d].

    Either `position` is a number and `store` returns little more than the filled part, or `cache_position`
    holds it on the device and `store` returns all, so that a recorded step can be replayed. The mask must
    hide what is not filled.
    """

    def __init__(self, layers: int, like: Tensor, length: int):
        """`like` [B, heads, any, d]: keys of the right batch, type and device."""
        batch, heads, _, size = like.shape
        self.memory = [decoding_layout(like.new_zeros(batch, heads, length, size) for _ in range(2))
                       for _ in range(layers)]
        self.position, self.length = 0, length
        self.cache_position: Tensor | None = None  # [1]

    def fill(self, rows: slice, layer: int, k: Tensor, v: Tensor) -> None:
        """Put the keys and values of these rows' whole prompts at the beginning."""
        for memory, new in zip(self.memory[layer], (k, v)):
            memory[rows, :, : new.shape[2]] = new

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write one step's keys and values [B, heads, 1, d]; returns those to attend to."""
        keys, values = self.memory[layer]
        if self.cache_position is not None:
            for memory, new in ((keys, k), (values, v)):
                memory.index_copy_(2, self.cache_position, new.to(memory.dtype))
            return keys, values
        t, end = self.position, self.end
        keys[:, :, t], values[:, :, t] = k[:, :, 0], v[:, :, 0]
        return keys[:, :, :end], values[:, :, :end]

    @property
    def end(self) -> int:
        """The length of attention, rounded up: every new length costs the CPU's matrix products a setup."""
        return min(self.length, -(-(self.position + 1) // ROUNDED) * ROUNDED)

    def advance(self) -> None:
        self.position += 1
        if self.cache_position is not None:
            self.cache_position += 1

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows [R] of the batch: layer by layer, so that there are never two of all."""
        for layer, pair in enumerate(self.memory):
            self.memory[layer] = select(pair, rows)


def decoding_layout(keys_values) -> tuple[Tensor, Tensor]:
    """Keys and values [B, heads, S, d] as decoding reads them fastest: on the CPU, keys with S contiguous."""
    keys, values = keys_values
    if keys.device.type == "cpu":  # in fp32, since every new length costs products of half precision a setup
        return keys.float().transpose(2, 3).contiguous().transpose(2, 3), values.float().contiguous()
    return keys.contiguous(), values.contiguous()


def select(keys_values: tuple[Tensor, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [R] of the batch, in the same layout."""
    return decoding_layout(x.index_select(0, rows) for x in keys_values)
