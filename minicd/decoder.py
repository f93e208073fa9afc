"""The decoder-only transformer: GPT-2, XGLM (InCoder's architecture), Llama, Qwen2, Qwen3.

All are pre-norm residual networks, made of one block with a few switches. They differ in how positions enter
(learned or sinusoidal embeddings at the bottom, or rotations of queries and keys in every layer), in norm and
feed-forward part, and in which matrices have a bias. Attention weights have no dropout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Embedding, KVCache, RMSNorm, attend, decoding_layout
from .runtime.fused import Rotation
from .runtime.lean import READ_AT_ONCE

SHARED_FROM = 16  # common tokens of all prompts from which it pays to read them once
SAVED_FROM = 200  # tokens not read again, of all rows together, from which it pays in training
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu,
               "gelu_new": partial(F.gelu, approximate="tanh")}
ACTIVATIONS["gelu_pytorch_tanh"] = ACTIVATIONS["gelu_new"]


@dataclass
class DecoderConfig:
    """The switches of the block. `families.py` makes one from a Hugging Face config.json of any family."""

    family: str  # model_type in config.json
    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    d_kv: int
    d_ff: int
    max_positions: int  # the most tokens of prompt and answer together
    positions: str  # learned, sinusoidal or rotary
    norm: str  # layer or rms
    activation: str
    gated: bool  # act(gate x) * up x, or act(wi x)
    qkv_bias: bool
    o_bias: bool
    ff_bias: bool
    qk_norm: bool  # RMS norm of each head's queries and keys
    tie_word_embeddings: bool
    layer_norm_epsilon: float
    embedding_scale: float = 1.0
    dropout_rate: float = 0.0
    rope_theta: float = 10000.0
    rope_scaling: dict = field(default_factory=dict)  # {}: none; else rope_type (linear, llama3) and numbers
    eos_token_id: int = -1  # -1: none
    more_eos_token_ids: tuple = ()
    pad_token_id: int = -1  # not a token, since many of these models have none for padding
    source: dict = field(default_factory=dict)  # config.json as it was read

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is unknown; known: {', '.join(ACTIVATIONS)}")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} heads cannot share {self.num_kv_heads} key heads evenly")
        if self.positions == "rotary" and self.d_kv % 2:
            raise ValueError(f"rotary positions need an even head size, not {self.d_kv}")


class Attention(nn.Module):
    """Causal multi-head or grouped-query attention; queries, keys and values are one matrix product."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_size = config.num_heads, config.num_kv_heads, config.d_kv
        heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv = nn.Linear(config.d_model, heads * config.d_kv, bias=config.qkv_bias)
        self.o = nn.Linear(config.num_heads * config.d_kv, config.d_model, bias=config.o_bias)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(config.d_kv, config.layer_norm_epsilon) for _ in range(2))

    def forward(self, x: Tensor, bias: Tensor, rotation, store, prefix=None) -> Tensor:
        """x [B, T, width]. `store`: new keys and values [B, kv_heads, T, d] → all those to attend to."""
        batch, length, _ = x.shape
        qkv = self.qkv(x).view(batch, length, -1, self.head_size).transpose(1, 2)
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        if self.qk_norm:
            qk = torch.cat([self.q_norm(qk[:, : self.heads]), self.k_norm(qk[:, self.heads :])], dim=1)
        if rotation is not None:
            qk = rotate(qk, *rotation)
        q, k = qk.split([self.heads, self.kv_heads], dim=1)
        y = attend(q, *store(k, v), bias, self.head_size**-0.5, prefix)
        return self.o(y.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    """wo(act(wi x)), or the gated wo(act(gate x) * up x); gate and up are one matrix product."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gated, self.activation = config.gated, ACTIVATIONS[config.activation]
        self.wi = nn.Linear(config.d_model, config.d_ff * (2 if config.gated else 1), bias=config.ff_bias)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=config.ff_bias)

    def forward(self, x: Tensor) -> Tensor:
        if not self.gated:
            return self.wo(self.activation(self.wi(x)))
        gate, up = self.wi(x).chunk(2, dim=-1)
        return self.wo(self.activation(gate) * up)


class Block(nn.Module):
    """x + attention(norm x), then x + feed_forward(norm x)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.attention_norm, self.attention = norm(config), Attention(config)
        self.feed_forward_norm, self.feed_forward = norm(config), FeedForward(config)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x: Tensor, bias: Tensor, rotation, store, prefix=None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), bias, rotation, store, prefix))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


def norm(config: DecoderConfig) -> nn.Module:
    return (RMSNorm if config.norm == "rms" else nn.LayerNorm)(config.d_model, config.layer_norm_epsilon)


def frequencies(config: DecoderConfig, device: torch.device) -> Tensor:
    """Radians per position of each pair of dimensions [d / 2] (Su et al., 2021), scaled by the config."""
    exponent = torch.arange(0, config.d_kv, 2, device=device).float() / config.d_kv
    frequency, scaling = config.rope_theta**-exponent, config.rope_scaling
    if scaling.get("rope_type") == "linear":
        return frequency / scaling["factor"]
    if scaling.get("rope_type") == "llama3":  # slow pairs slower by `factor`, fast ones unchanged
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        ramp = ((turns - low) / (high - low)).clamp(0, 1)
        return frequency * (ramp + (1 - ramp) / scaling["factor"])
    return frequency


def rotations(positions: Tensor, config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """Positions [...] → cosines and sines of all angles [..., d / 2]."""
    angle = positions[..., None] * frequencies(config, positions.device)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn dimension i of x [B, heads, T, d] against dimension i + d/2; cos and sin [B, 1, T, d/2]."""
    if x.requires_grad and x.device.type == "cpu":
        return Rotation.apply(x, cos, sin)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """XGLM's position embeddings [..., width]: sines, then cosines; its table begins at position -2."""
    half = width // 2
    frequency = torch.exp(torch.arange(half, device=positions.device) * -(math.log(10000) / (half - 1)))
    angle = (positions + 2).float()[..., None] * frequency
    return F.pad(torch.cat([angle.sin(), angle.cos()], dim=-1), (0, width % 2))


class Cache(KVCache):
    """Keys and values of prompt and answer, the left padding of each row, and a mask that hides it.

    What all prompts begin with stands in `prefix`, once for all rows.
    """

    def __init__(self, layers: int, like: Tensor, length: int, padding: Tensor, prefix: Prefix):
        super().__init__(layers, like, length)
        self.padding, self.prefix = padding, prefix  # [B]
        self.slots = torch.arange(length, device=padding.device)
        self.bias = mask_bias(self.slots >= padding[:, None])[:, None, None]  # [B, 1, 1, length]

    def step_bias(self) -> Tensor:
        if self.cache_position is not None:
            return self.bias + mask_bias(self.slots <= self.cache_position)
        return self.bias[..., : self.end] + mask_bias(self.slots[: self.end] <= self.position)

    def step_positions(self) -> Tensor:
        """[B, 1]"""
        position = self.position if self.cache_position is None else self.cache_position
        return (self.prefix.length + position - self.padding)[:, None]

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        self.padding, self.bias = self.padding[rows], self.bias[rows]


class Prefix:
    """Keys and values [1, kv_heads, length, d] of tokens that all rows begin with, layer by layer."""

    def __init__(self) -> None:
        self.length, self.layers = 0, {}

    def of(self, layer: int) -> tuple[Tensor, Tensor] | None:
        return self.layers[layer] if self.length else None


def common_length(prompts: Tensor) -> int:
    """How many tokens all prompts [B, S] begin with, without the last of each; 0 where that saves little."""
    if len(prompts) == 1:
        return 0
    same = (prompts == prompts[:1]).all(0) & (prompts >= 0).all(0)
    shortest = (prompts >= 0).sum(1).min()
    length = int(torch.minimum(same.long().cumprod(0).sum(), shortest - 1))
    return length if length >= SHARED_FROM else 0


def mask_bias(visible: Tensor) -> Tensor:
    """0 where `visible`, -inf elsewhere."""
    return torch.zeros(visible.shape, device=visible.device).masked_fill(~visible, -torch.inf)


class Decoder(nn.Module):
    """The model. Prompts [B, S] and answers [B, T] are token ids, right-padded with pad_token_id (-1)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.tokens = Embedding(config.vocab_size, config.d_model)
        if config.positions == "learned":
            self.positions = Embedding(config.max_positions, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = norm(config)
        self.dropout = nn.Dropout(config.dropout_rate)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(self, prompts: Tensor, answers: Tensor) -> Tensor:
        """Teacher-forced logits [B, T, V]: logits[:, t] predict answers[:, t] from prompt and answers[:, :t].

        Raises ValueError where prompt and answer are longer than max_positions.
        """
        self.check_length(prompts, answers)
        prefix, prompts = self.read_prefix(prompts)
        prompts, padding = left_pad(prompts)
        tokens = torch.cat([prompts, answers[:, :-1]], dim=1)
        x = self.run(tokens, padding, lambda rows, layer, k, v: (k, v), prefix)
        return self.head(x[:, prompts.shape[1] - 1 :])

    def check_length(self, prompts: Tensor, answers: Tensor) -> None:
        most = self.config.max_positions
        if prompts.shape[1] + answers.shape[1] > most:  # else no need to wait for the device
            longest = int(((prompts >= 0).sum(1) + (answers >= 0).sum(1)).max())
            if longest > most:
                raise ValueError(f"prompt and answer have {longest} tokens, the model only {most} positions")

    def read_prefix(self, prompts: Tensor) -> tuple[Prefix, Tensor]:
        """What all prompts [B, S] begin with, read once, and the rest of them.

        In training gradients of all rows meet in it; but dropout differs from row to row, and on CUDA to look
        for it would wait for the last step.
        """
        learns = torch.is_grad_enabled()
        apart = learns and (prompts.is_cuda or (self.training and self.dropout.p > 0))
        prefix, length = Prefix(), 0 if apart else common_length(prompts)
        if learns and length * (len(prompts) - 1) < SAVED_FROM:
            length = 0
        if length:
            def store(rows: slice, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
                prefix.layers[layer] = (k, v) if learns else decoding_layout((k, v))
                return k, v
            self.run(prompts[:1, :length], prompts.new_zeros(1), store, Prefix())
            prefix.length = length
        return prefix, prompts[:, length:]

    def run(self, tokens: Tensor, padding: Tensor, store, prefix: Prefix) -> Tensor:
        """All tokens [B, L], with left padding [B] → states [B, L, width] before the last norm.

        Without gradients the CPU reads a few rows at a time, or its caches would not hold what a layer makes.
        `store`: as that of attention, after the slice of rows and the number of the layer.
        """
        size = max(1, READ_AT_ONCE // tokens.shape[1])
        if torch.is_grad_enabled() or tokens.is_cuda or size >= len(tokens):
            return self.run_rows(tokens, padding, partial(store, slice(None)), prefix)
        parts = [slice(first, first + size) for first in range(0, len(tokens), size)]
        return torch.cat([self.run_rows(tokens[rows], padding[rows], partial(store, rows), prefix)
                          for rows in parts])

    def run_rows(self, tokens: Tensor, padding: Tensor, store, prefix: Prefix) -> Tensor:
        """`run` of rows that are read together."""
        slots = torch.arange(tokens.shape[1], device=tokens.device)
        visible = (slots[None, :] <= slots[:, None]) & (slots >= padding[:, None])[:, None, None]
        itself = torch.eye(len(slots), dtype=torch.bool, device=tokens.device)
        bias = mask_bias(visible | itself)  # padding sees itself, or its softmax would be 0/0
        positions = (prefix.length + slots - padding[:, None]).clamp(0, self.config.max_positions - 1)
        x, rotation = self.embed(tokens, positions)
        for layer, block in enumerate(self.blocks):
            x = block(x, bias, rotation, partial(store, layer), prefix.of(layer))
        return x

    def embed(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Token ids and positions [B, L] → the first block's input [B, L, width] and all blocks' rotation."""
        config, rotation = self.config, None
        x = self.tokens(tokens.clamp(min=0))
        if config.embedding_scale != 1.0:
            x = x * config.embedding_scale
        if config.positions == "learned":
            x = x + self.positions(positions)
        elif config.positions == "sinusoidal":
            x = x + sinusoids(positions, config.d_model).to(x.dtype)
        else:
            rotation = rotations(positions[:, None], config)
        return self.dropout(x), rotation

    def head(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.tokens.head(x) if self.config.tie_word_embeddings else self.lm_head(x)

    def prefill(self, prompts: Tensor, max_new_tokens: int) -> tuple[Tensor, Cache]:
        """Read prompts [B, S] → logits [B, V] of the first token, and a cache for max_new_tokens steps.

        Raises ValueError where both together are longer than max_positions.
        """
        self.check_length(prompts, prompts.new_zeros(len(prompts), max_new_tokens))
        prefix, prompts = self.read_prefix(prompts)
        prompts, padding = left_pad(prompts)
        like = self.tokens.weight.new_empty(len(prompts), self.config.num_kv_heads, 1, self.config.d_kv)
        if torch.is_autocast_enabled(like.device.type):
            like = like.to(torch.get_autocast_dtype(like.device.type))
        cache = Cache(len(self.blocks), like, prompts.shape[1] + max_new_tokens, padding, prefix)

        def store(rows: slice, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            cache.fill(rows, layer, k, v)
            return k, v

        logits = self.head(self.run(prompts, padding, store, prefix)[:, -1])
        cache.position = prompts.shape[1]
        return logits, cache

    def step(self, tokens: Tensor, cache: Cache) -> Tensor:
        """The latest tokens [B] → next-token logits [B, V]; the cache advances by one."""
        x, rotation = self.embed(tokens[:, None], cache.step_positions())
        bias = cache.step_bias()
        for layer, block in enumerate(self.blocks):
            x = block(x, bias, rotation, partial(cache.store, layer), cache.prefix.of(layer))
        cache.advance()
        return self.head(x[:, 0])


def left_pad(prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Shift prompts [B, S] right, next to their answers; also returns the padding [B] left of each."""
    padding = (prompts < 0).sum(1)
    index = torch.arange(prompts.shape[1], device=prompts.device) - padding[:, None]
    return prompts.gather(1, index.clamp(min=0)).masked_fill(index < 0, -1), padding


def initialise(model: Decoder, seed: int) -> Decoder:
    """Random weights as GPT-2 draws them (standard deviation 0.02, biases 0); returns the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.02, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()
    return model
