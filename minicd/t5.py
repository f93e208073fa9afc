"""The T5 encoder-decoder (Raffel et al., 2020): v1.0, and v1.1 with LM-adapted, Flan and TK-Instruct models.

What differs from a textbook transformer: attention logits are not divided by sqrt(d); positions enter only as
a learned bias per head and bucketed distance, computed once a stack and shared by its layers; RMS norm has no
mean; linear layers have no bias. v1.0 has a ReLU feed-forward and scales the tied head by d_model^-0.5.
Attention weights have no dropout, which transformers has in training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Embedding, KVCache, RMSNorm, attend, decoding_layout, select

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "gated-relu": F.relu, "gated-silu": F.silu,
               "gated-gelu": lambda x: F.gelu(x, approximate="tanh")}  # T5's convention, unlike plain "gelu"
KEEP_FP32 = (".wo.",)  # as in transformers, since it overflows in fp16 in large T5s


@dataclass
class T5Config:
    """The fields of a Hugging Face `config.json` that determine the computation, with their names there."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_heads: int
    num_layers: int
    num_decoder_layers: int | None = None  # None: as many as the encoder has
    feed_forward_proj: str = "relu"  # or gated-gelu, gated-silu
    tie_word_embeddings: bool = True  # v1.0 ties embedding and head, v1.1 does not
    scale_decoder_outputs: bool | None = None  # by d_model^-0.5 before the head; None: where it is tied
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0

    def __post_init__(self) -> None:
        if self.num_decoder_layers is None:
            self.num_decoder_layers = self.num_layers
        if self.feed_forward_proj not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"feed_forward_proj {self.feed_forward_proj!r} is unknown; known: {known}")


class Attention(nn.Module):
    """Multi-head attention of T5: no 1/sqrt(d), an additive bias instead of positions."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.heads, self.head_size = config.num_heads, config.d_kv
        inner = self.heads * self.head_size
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.kv = nn.Linear(config.d_model, 2 * inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, d_model] → keys and values, each [B, heads, S, d_kv]."""
        batch, length, _ = memory.shape
        kv = self.kv(memory).view(batch, length, 2, self.heads, self.head_size)
        k, v = kv.permute(2, 0, 3, 1, 4)
        return k, v

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor], bias: Tensor) -> Tensor:
        """x [B, T, d_model], bias broadcastable to [B, heads, T, S] → [B, T, d_model]."""
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, self.head_size).transpose(1, 2)
        y = attend(q, *keys_values, bias, scale=1.0)
        return self.o(y.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    """wo(act(wi x)), or the gated wo(act(gate x) * up x); gate and up are one matrix product."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.gated = config.feed_forward_proj.startswith("gated-")
        self.activation = ACTIVATIONS[config.feed_forward_proj]
        self.wi = nn.Linear(config.d_model, config.d_ff * (2 if self.gated else 1), bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            gate, up = self.wi(x).chunk(2, dim=-1)
            hidden = self.activation(gate) * up
        else:
            hidden = self.activation(self.wi(x))
        return self.wo(self.dropout(hidden).to(self.wo.weight.dtype))  # fp32 in a bf16 model, see KEEP_FP32


class Block(nn.Module):
    """Pre-norm residual block; a decoder block has cross-attention between its other two parts."""

    def __init__(self, config: T5Config, decoder: bool):
        super().__init__()
        def norm() -> RMSNorm:
            return RMSNorm(config.d_model, config.layer_norm_epsilon)

        self.attention_norm, self.attention = norm(), Attention(config)
        if decoder:
            self.cross_norm, self.cross = norm(), Attention(config)
        self.feed_forward_norm, self.feed_forward = norm(), FeedForward(config)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x: Tensor, bias: Tensor, cross_kv=None, cross_bias=None, cache=None) -> Tensor:
        """x [B, T, d_model]. cache: a function that stores new keys and values and returns all so far."""
        h = self.attention_norm(x)
        keys_values = self.attention.keys_values(h)
        if cache is not None:
            keys_values = cache(*keys_values)
        x = x + self.dropout(self.attention(h, keys_values, bias))
        if cross_kv is not None:
            x = x + self.dropout(self.cross(self.cross_norm(x), cross_kv, cross_bias))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class RelativeBias(nn.Module):
    """A learned scalar for each head and bucket of distance; distances share buckets logarithmically."""

    def __init__(self, config: T5Config, bidirectional: bool):
        super().__init__()
        self.buckets = config.relative_attention_num_buckets
        self.max_distance = config.relative_attention_max_distance
        self.bidirectional = bidirectional
        self.embedding = nn.Embedding(self.buckets, config.num_heads)

    def bucket(self, distance: Tensor) -> Tensor:
        """key position - query position, any shape → bucket ids (Raffel et al., 2020, section 2.1)."""
        buckets, offset = self.buckets, torch.zeros_like(distance)
        if self.bidirectional:
            buckets //= 2
            offset = (distance > 0) * buckets
            distance = distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = buckets // 2  # near distances have a bucket each
        scaled = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (scaled * (buckets - exact)).long()).clamp(max=buckets - 1)
        return offset + torch.where(distance < exact, distance, far)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Positions [T] and [S] → bias [1, heads, T, S]."""
        ids = self.bucket(keys[None, :] - queries[:, None])
        return self.embedding(ids).permute(2, 0, 1)[None]


class Stack(nn.Module):
    """The encoder or the decoder: blocks, their shared relative bias, a final norm."""

    def __init__(self, config: T5Config, decoder: bool):
        super().__init__()
        layers = config.num_decoder_layers if decoder else config.num_layers
        self.relative_bias = RelativeBias(config, bidirectional=not decoder)
        self.blocks = nn.ModuleList(Block(config, decoder) for _ in range(layers))
        self.norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)


class Cache(KVCache):
    """Self-attention keys and values; and fixed: those of the prompt, its mask, the bias of all steps."""

    def __init__(self, cross_kv: list, cross_bias: Tensor, bias: Tensor):
        super().__init__(len(cross_kv), cross_kv[0][0], length=bias.shape[-1])
        self.cross_kv, self.cross_bias, self.bias = cross_kv, cross_bias, bias

    def step_bias(self) -> Tensor:
        """This step's row of the bias [1, heads, 1, keys]."""
        if self.cache_position is not None:
            return self.bias.index_select(2, self.cache_position)
        return self.bias[:, :, self.position : self.position + 1, : self.end]

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        self.cross_kv = [select(pair, rows) for pair in self.cross_kv]
        self.cross_bias = self.cross_bias[rows]


class T5(nn.Module):
    """The model. Prompts [B, S] and answers [B, T] are token ids, padded on the right with pad_token_id."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.shared = Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, decoder=False)
        self.decoder = Stack(config, decoder=True)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(self, prompts: Tensor, answers: Tensor) -> Tensor:
        """Teacher-forced logits [B, T, V]: logits[:, t] predict answers[:, t] from answers[:, :t]."""
        states, cross_bias = self.encode(prompts)
        inputs = F.pad(answers[:, :-1], (1, 0), value=self.config.decoder_start_token_id)
        bias = self.causal_bias(inputs.shape[1])
        x = self.decoder.dropout(self.shared(inputs))
        for block in self.decoder.blocks:
            x = block(x, bias, block.cross.keys_values(states), cross_bias)
        return self.head(self.decoder.dropout(self.decoder.norm(x)))

    def causal_bias(self, length: int) -> Tensor:
        """The decoder's relative bias, with the future hidden [1, heads, length, length]."""
        position = torch.arange(length, device=self.shared.weight.device)
        future = torch.where(position[None, :] > position[:, None], -torch.inf, 0.0)
        return self.decoder.relative_bias(position, position) + future

    def encode(self, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder states [B, S, d_model] and the mask that hides padding as a bias [B, 1, 1, S]."""
        mask = torch.zeros(prompts.shape, device=prompts.device)
        mask = mask.masked_fill(prompts == self.config.pad_token_id, -1e9)[:, None, None]
        position = torch.arange(prompts.shape[1], device=prompts.device)
        bias = self.encoder.relative_bias(position, position) + mask
        x = self.encoder.dropout(self.shared(prompts))
        for block in self.encoder.blocks:
            x = block(x, bias)
        return self.encoder.dropout(self.encoder.norm(x)), mask

    def head(self, x: Tensor) -> Tensor:
        tied, scaled = self.config.tie_word_embeddings, self.config.scale_decoder_outputs
        if tied if scaled is None else scaled:
            x = x * self.config.d_model**-0.5
        return self.shared.head(x) if tied else self.lm_head(x)

    def prefill(self, prompts: Tensor, max_new_tokens: int) -> tuple[Tensor, Cache]:
        """Encode prompts [B, S] → logits [B, V] of the first token, and a cache for max_new_tokens steps."""
        states, cross_bias = self.encode(prompts)
        cross_kv = [decoding_layout(block.cross.keys_values(states)) for block in self.decoder.blocks]
        cache = Cache(cross_kv, cross_bias, self.causal_bias(max_new_tokens))
        start = torch.full((len(prompts),), self.config.decoder_start_token_id, device=prompts.device)
        return self.step(start, cache), cache

    def step(self, tokens: Tensor, cache: Cache) -> Tensor:
        """The latest tokens [B] → next-token logits [B, V]; the cache advances by one."""
        x, bias = self.shared(tokens)[:, None], cache.step_bias()
        for layer, block in enumerate(self.decoder.blocks):
            x = block(x, bias, cache.cross_kv[layer], cache.cross_bias, partial(cache.store, layer))
        cache.advance()
        return self.head(self.decoder.norm(x))[:, 0]


def initialise(model: T5, seed: int) -> T5:
    """Random weights as T5 draws them (Mesh TensorFlow's scales); returns the model."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    inner = config.num_heads * config.d_kv
    scales = {"q": (config.d_model * config.d_kv) ** -0.5, "kv": config.d_model**-0.5, "o": inner**-0.5,
              "wi": config.d_model**-0.5, "wo": config.d_ff**-0.5, "lm_head": config.d_model**-0.5,
              "embedding": config.d_model**-0.5, "shared": 1.0}
    for name, parameter in model.named_parameters():
        kind = name.split(".")[-2]
        if kind in scales:
            std = config.initializer_factor * scales[kind]
            with torch.no_grad():
                parameter.normal_(0.0, std, generator=generator)
    return model
