"""Which Hugging Face config.json and tensor names mean what in our two models. Nothing is computed here."""

from __future__ import annotations

import re
from dataclasses import asdict, fields
from typing import Any

from ..decoder import Decoder, DecoderConfig
from ..t5 import T5, T5Config

Config = T5Config | DecoderConfig
Names = list[tuple[str, str]]

# Our parameter name → Hugging Face's, where "kv", "qkv" and a gated "wi" are several: see `hf_names`.
T5_NAMES: Names = [
    (r"^(encoder|decoder)\.relative_bias\.embedding\.weight$",
     r"\1.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
    (r"^(encoder|decoder)\.norm\.weight$", r"\1.final_layer_norm.weight"),
    (r"^(encoder|decoder)\.blocks\.(\d+)\.attention_norm\.", r"\1.block.\2.layer.0.layer_norm."),
    (r"^(encoder|decoder)\.blocks\.(\d+)\.attention\.", r"\1.block.\2.layer.0.SelfAttention."),
    (r"^decoder\.blocks\.(\d+)\.cross_norm\.", r"decoder.block.\1.layer.1.layer_norm."),
    (r"^decoder\.blocks\.(\d+)\.cross\.", r"decoder.block.\1.layer.1.EncDecAttention."),
    (r"^encoder\.blocks\.(\d+)\.feed_forward_norm\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^decoder\.blocks\.(\d+)\.feed_forward_norm\.", r"decoder.block.\1.layer.2.layer_norm."),
    (r"^encoder\.blocks\.(\d+)\.feed_forward\.", r"encoder.block.\1.layer.1.DenseReluDense."),
    (r"^decoder\.blocks\.(\d+)\.feed_forward\.", r"decoder.block.\1.layer.2.DenseReluDense."),
]
GPT2_NAMES: Names = [
    (r"^tokens\.", "transformer.wte."), (r"^positions\.", "transformer.wpe."),
    (r"^norm\.", "transformer.ln_f."),
    (r"^blocks\.(\d+)\.attention_norm\.", r"transformer.h.\1.ln_1."),
    (r"^blocks\.(\d+)\.attention\.qkv\.", r"transformer.h.\1.attn.c_attn."),
    (r"^blocks\.(\d+)\.attention\.o\.", r"transformer.h.\1.attn.c_proj."),
    (r"^blocks\.(\d+)\.feed_forward_norm\.", r"transformer.h.\1.ln_2."),
    (r"^blocks\.(\d+)\.feed_forward\.wi\.", r"transformer.h.\1.mlp.c_fc."),
    (r"^blocks\.(\d+)\.feed_forward\.wo\.", r"transformer.h.\1.mlp.c_proj."),
]
XGLM_NAMES: Names = [
    (r"^tokens\.", "model.embed_tokens."), (r"^norm\.", "model.layer_norm."),
    (r"^blocks\.(\d+)\.attention_norm\.", r"model.layers.\1.self_attn_layer_norm."),
    (r"^blocks\.(\d+)\.attention\.o\.", r"model.layers.\1.self_attn.out_proj."),
    (r"^blocks\.(\d+)\.attention\.", r"model.layers.\1.self_attn."),
    (r"^blocks\.(\d+)\.feed_forward_norm\.", r"model.layers.\1.final_layer_norm."),
    (r"^blocks\.(\d+)\.feed_forward\.wi\.", r"model.layers.\1.fc1."),
    (r"^blocks\.(\d+)\.feed_forward\.wo\.", r"model.layers.\1.fc2."),
]
LLAMA_NAMES: Names = [
    (r"^tokens\.", "model.embed_tokens."), (r"^norm\.", "model.norm."),
    (r"^blocks\.(\d+)\.attention_norm\.", r"model.layers.\1.input_layernorm."),
    (r"^blocks\.(\d+)\.attention\.o\.", r"model.layers.\1.self_attn.o_proj."),
    (r"^blocks\.(\d+)\.attention\.", r"model.layers.\1.self_attn."),
    (r"^blocks\.(\d+)\.feed_forward_norm\.", r"model.layers.\1.post_attention_layernorm."),
    (r"^blocks\.(\d+)\.feed_forward\.wo\.", r"model.layers.\1.mlp.down_proj."),
    (r"^blocks\.(\d+)\.feed_forward\.", r"model.layers.\1.mlp."),
]
NAMES = {"t5": T5_NAMES, "gpt2": GPT2_NAMES, "xglm": XGLM_NAMES,
         **dict.fromkeys(["llama", "qwen2", "qwen3"], LLAMA_NAMES)}

# Tensors in some files that nothing needs: masks, tables of positions, T5's bias of a cross-attention.
HARMLESS = re.compile(r"(.*\.)?attn\.(masked_)?bias|.*\.rotary_emb\.inv_freq|.*embed_positions\.weights"
                      r"|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight")
EMBEDDINGS = {"t5": "shared.weight", "gpt2": "transformer.wte.weight"}  # elsewhere model.embed_tokens.weight


def family(config: Config) -> str:
    return "t5" if isinstance(config, T5Config) else config.family


def depth(config: Config) -> int:
    """How many layers the model has."""
    return config.num_layers + (config.num_decoder_layers if isinstance(config, T5Config) else 0)


def build(config: Config) -> T5 | Decoder:
    """A model with random weights, or on the meta device with none."""
    return T5(config) if isinstance(config, T5Config) else Decoder(config)


def hf_names(name: str, config: Config) -> list[str]:
    """The Hugging Face tensors that, stacked along dimension 0, are our parameter `name`."""
    kind = family(config)
    for pattern, replacement in NAMES[kind]:
        renamed, hits = re.subn(pattern, replacement, name)
        if hits:
            name = renamed
            break
    gated = kind != "t5" or config.feed_forward_proj.startswith("gated-")
    for ours, theirs in SPLITS.get(kind, LLAMA_SPLITS).items():
        if f".{ours}." in name and (ours != "wi" or gated):
            return [name.replace(f".{ours}.", f".{part}.") for part in theirs]
    return [name]


QKV = ["q_proj", "k_proj", "v_proj"]
SPLITS = {"t5": {"kv": ["k", "v"], "wi": ["wi_0", "wi_1"]}, "gpt2": {}, "xglm": {"qkv": QKV}}
LLAMA_SPLITS = {"qkv": QKV, "wi": ["gate_proj", "up_proj"]}


def part_sizes(name: str, rows: int, config: Config) -> list[int]:
    """How many of the `rows` of our parameter `name` come from each of its `hf_names`."""
    parts = len(hf_names(name, config))
    if ".qkv." in name and parts == 3:
        q, kv = config.num_heads * config.d_kv, config.num_kv_heads * config.d_kv
        return [q, kv, kv]
    return [rows // parts] * parts


def is_transposed(name: str, config: Config) -> bool:
    """Whether our matrix `name` is [in, out] in the file, as GPT-2's are."""
    matrices = ("qkv.weight", "o.weight", "wi.weight")  # and wo
    return family(config) == "gpt2" and name.startswith("blocks.") and name.endswith(matrices)


def copies(config: Config) -> tuple[str, set[str]]:
    """The embedding's name in the file, and the names under which a file may carry copies of it."""
    kind = family(config)
    names = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"} if kind == "t5" else set()
    if config.tie_word_embeddings:
        names.add("lm_head.weight")
    return EMBEDDINGS.get(kind, "model.embed_tokens.weight"), names


def read_config(raw: Any) -> Config:
    """A config.json's content → our config. Raises ValueError for other families, bad or missing fields."""
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in NAMES:
        found = kind if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(f"it describes a model of type {found!r}; known are {', '.join(NAMES)}")
    try:
        config = READERS.get(kind, llama_config)(raw)
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is missing") from None
    except TypeError as error:
        raise ValueError(str(error).removeprefix("T5Config.__init__() ")) from None
    if config.num_heads * config.d_kv > LARGEST:
        raise ValueError(f"{config.num_heads} heads of {config.d_kv} dimensions are too many")
    return config


def t5_config(raw: dict) -> T5Config:
    known = {field.name: KINDS[field.type] for field in fields(T5Config)}
    raw = {"decoder_start_token_id": raw.get("pad_token_id", 0), **raw}
    for key in known.keys() & raw.keys():
        if not isinstance(raw[key], known[key]) or (isinstance(raw[key], bool) and known[key] is not bool):
            raise ValueError(f"{key} cannot be {raw[key]!r}")
    config = T5Config(**{key: value for key, value in raw.items() if key in known})
    values = asdict(config)
    for key, kind in ((field.name, field.type) for field in fields(T5Config)):
        if key.endswith("_token_id"):
            token(values[key], key, config.vocab_size)
        elif kind in ("int", "int | None"):
            whole(values, key)
        elif kind == "float":
            number(values, key, most=1.0 if key == "dropout_rate" else LARGEST)
    buckets, distance = config.relative_attention_num_buckets, config.relative_attention_max_distance
    if not 2 <= buckets // 2 < distance:  # else there is no logarithm
        raise ValueError(f"{buckets} relative_attention_num_buckets do not fit a "
                         f"relative_attention_max_distance of {distance}")
    return config


def gpt2_config(raw: dict) -> DecoderConfig:
    refuse(raw, scale_attn_by_inverse_layer_idx=False, scale_attn_weights=True, add_cross_attention=False)
    width, heads = whole(raw, "n_embd"), whole(raw, "n_head")
    return DecoderConfig(
        **common_fields(raw, width, heads), num_layers=whole(raw, "n_layer"), num_kv_heads=heads,
        d_kv=width // heads, d_ff=whole(raw, "n_inner", 4 * width, null=True),
        max_positions=whole(raw, "n_positions", 1024), positions="learned", norm="layer",
        activation=setting(raw, "activation_function", "gelu_new"), gated=False,
        qkv_bias=True, o_bias=True, ff_bias=True, qk_norm=False,
        tie_word_embeddings=setting(raw, "tie_word_embeddings", True),
        layer_norm_epsilon=number(raw, "layer_norm_epsilon", 1e-5),
        dropout_rate=number(raw, "resid_pdrop", 0.1, most=1.0))


def xglm_config(raw: dict) -> DecoderConfig:
    refuse(raw, add_cross_attention=False)
    width, heads = whole(raw, "d_model"), whole(raw, "attention_heads")
    return DecoderConfig(
        **common_fields(raw, width, heads), num_layers=whole(raw, "num_layers"), num_kv_heads=heads,
        d_kv=width // heads, d_ff=whole(raw, "ffn_dim"),
        max_positions=whole(raw, "max_position_embeddings", 2048), positions="sinusoidal", norm="layer",
        activation=setting(raw, "activation_function", "gelu"), gated=False,
        qkv_bias=True, o_bias=True, ff_bias=True, qk_norm=False,
        tie_word_embeddings=setting(raw, "tie_word_embeddings", True), layer_norm_epsilon=1e-5,
        dropout_rate=number(raw, "dropout", 0.1, most=1.0),
        embedding_scale=width**0.5 if setting(raw, "scale_embedding", True) else 1.0)


def llama_config(raw: dict) -> DecoderConfig:
    """Llama, Qwen2 (biases for q, k, v), Qwen3 (norms for q and k)."""
    refuse(raw, use_sliding_window=False, pretraining_tp=1, partial_rotary_factor=1.0)
    if any(layer != "full_attention" for layer in raw.get("layer_types") or []):
        raise ValueError("layer_types other than full_attention are not supported")
    kind, width, heads = raw["model_type"], whole(raw, "hidden_size"), whole(raw, "num_attention_heads")
    bias = setting(raw, "attention_bias", False)
    return DecoderConfig(
        **common_fields(raw, width, heads), num_layers=whole(raw, "num_hidden_layers"),
        num_kv_heads=whole(raw, "num_key_value_heads", heads, null=True),
        d_kv=whole(raw, "head_dim", 128 if kind == "qwen3" else width // heads, null=True),
        d_ff=whole(raw, "intermediate_size"),
        max_positions=whole(raw, "max_position_embeddings", 2048 if kind == "llama" else 32768),
        positions="rotary", norm="rms", activation=setting(raw, "hidden_act", "silu"), gated=True,
        qkv_bias=kind == "qwen2" or bias, o_bias=kind != "qwen2" and bias,
        ff_bias=kind == "llama" and setting(raw, "mlp_bias", False), qk_norm=kind == "qwen3",
        tie_word_embeddings=setting(raw, "tie_word_embeddings", False),
        layer_norm_epsilon=number(raw, "rms_norm_eps", 1e-6), **rope(raw))


READERS = {"t5": t5_config, "gpt2": gpt2_config, "xglm": xglm_config}
KINDS = {"int": int, "int | None": (int, type(None)), "float": (int, float), "bool": bool,
         "bool | None": bool, "str": str}  # of T5Config's fields
LARGEST = 2**28  # the largest size: larger ones overflow in products, before tensors are compared with them
LLAMA3 = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
ROPE_NUMBERS = {"default": [], "linear": ["factor"], "llama3": LLAMA3}


def common_fields(raw: dict, width: int, heads: int) -> dict[str, Any]:
    vocab_size = whole(raw, "vocab_size")
    first, *more = eos_ids(raw, vocab_size) or [-1]
    return {"family": raw["model_type"], "vocab_size": vocab_size, "d_model": width, "num_heads": heads,
            "eos_token_id": first, "more_eos_token_ids": tuple(more), "source": raw}


def eos_ids(raw: dict, vocab_size: int) -> list[int]:
    """The tokens that end a completion, as a config.json or generation_config.json names them: often none."""
    eos = raw.get("eos_token_id")
    listed = eos if isinstance(eos, list) and eos else [] if eos is None else [eos]
    return [token(i, "eos_token_id", vocab_size) for i in listed]


def rope(raw: dict) -> dict[str, Any]:
    """Rotary positions: rope_theta and rope_scaling, in transformers 5 together called rope_parameters."""
    name = "rope_scaling" if raw.get("rope_parameters") in (None, {}) else "rope_parameters"
    scaling = {} if raw.get(name) is None else raw[name]
    if not isinstance(scaling, dict):
        raise ValueError(f"{name} cannot be {scaling!r}")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_NUMBERS:
        raise ValueError(f"rope scaling {kind!r} is not supported; supported are {', '.join(ROPE_NUMBERS)}")
    refuse(scaling, partial_rotary_factor=1.0)
    theta = number({**raw, **scaling}, "rope_theta", 10000.0, least=1.0)
    numbers = {key: number(scaling, key, least=1e-3) for key in ROPE_NUMBERS[kind]}
    if kind == "llama3" and numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        raise ValueError("low_freq_factor must be below high_freq_factor")
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **numbers} if numbers else {}}


def whole(raw: dict, key: str, default: int | None = None, null: bool = False) -> int:
    """A size. Raises KeyError where it is missing without a default; `null`: None means the default too."""
    value = raw[key] if default is None else raw.get(key, default)
    if value is None and null:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
        raise ValueError(f"{key} cannot be {value!r}")
    return value


def number(raw: dict, key: str, default: float | None = None, least: float = 0.0,
           most: float = LARGEST) -> float:
    value = raw[key] if default is None else raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ValueError(f"{key} cannot be {value!r}")
    return value


def setting(raw: dict, key: str, default: str | bool) -> Any:
    """A text or a switch, whichever the default is."""
    value = raw.get(key, default)
    if not isinstance(value, type(default)):
        raise ValueError(f"{key} cannot be {value!r}")
    return value


def token(value: Any, key: str, vocab_size: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
        raise ValueError(f"{key} cannot be {value!r}, the vocabulary has {vocab_size} tokens")
    return value


def refuse(raw: dict, **supported: Any) -> None:
    """Raises ValueError where a switch has a value that we do not support."""
    for key, value in supported.items():
        if raw.get(key, value) != value:
            raise ValueError(f"{key}={raw[key]!r} is not supported")


def write_config(config: Config, dtype: str) -> dict[str, Any]:
    """Our config → the content of a config.json for `read_config` and Hugging Face transformers.

    Raises ValueError for a decoder's that was read from no file.
    """
    if isinstance(config, DecoderConfig) and "model_type" not in config.source:
        raise ValueError("this decoder has no config.json to write: make it by `read_config`, whose `source` "
                         "keeps the fields of its family")
    if isinstance(config, DecoderConfig):
        old = {key: value for key, value in config.source.items() if key not in ("torch_dtype", "dtype")}
        return {**old, "torch_dtype": dtype}
    ours = {key: value for key, value in asdict(config).items() if value is not None}
    return {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True,
            "use_cache": True, **ours, "torch_dtype": dtype}
