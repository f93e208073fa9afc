"""A Hugging Face folder ↔ a model and its tokenizer. Strict: what does not fit is named, and nothing is half-loaded."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .files import atomic_json, atomic_safetensors
from .t5 import T5, T5Config
from .tokenizer import TextTokenizer

# Our parameter name → the Hugging Face name; "kv" stands for the two matrices k and v that we keep stacked.
RENAMES = [
    (r"^(encoder|decoder)\.relative_bias\.embedding\.weight$", r"\1.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
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

# Copies of the shared embedding that some files carry, and a bias that T5 computes nothing with.
HARMLESS = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight",
            "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"}


def hf_names(name: str, config: T5Config) -> list[str]:
    """The Hugging Face tensors which, stacked along dimension 0, are our parameter `name`."""
    for pattern, replacement in RENAMES:
        renamed, hits = re.subn(pattern, replacement, name)
        if hits:
            name = renamed
            break
    if name.endswith(".kv.weight"):
        return [name.replace(".kv.", ".k."), name.replace(".kv.", ".v.")]
    if name.endswith(".wi.weight") and config.feed_forward_proj.startswith("gated-"):
        return [name.replace(".wi.", ".wi_0."), name.replace(".wi.", ".wi_1.")]
    return [name]


def load(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> tuple[T5, TextTokenizer]:
    """Read a T5 folder or hub id (config.json, model.safetensors, tokenizer.json) → model in eval mode, tokenizer.

    Raises ValueError, in one sentence that names the file, where something is missing, damaged or does not fit.
    """
    folder = resolve(folder)
    config = read_config(folder / "config.json")
    tokenizer = TextTokenizer.load(existing(folder / "tokenizer.json"))
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"{folder / 'tokenizer.json'} has {len(tokenizer)} tokens, but the model's embedding only "
                         f"{config.vocab_size}: they do not belong together")
    with torch.device("meta"):
        model = T5(config)
    load_weights(model, weights_file(folder), dtype)
    return model.to(device).eval(), tokenizer


def resolve(folder: str | Path) -> Path:
    """A folder, or else the local copy of a hub id, downloaded where that is possible."""
    path = Path(folder)
    if path.is_dir():
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)) and not path.exists():
        from huggingface_hub import snapshot_download  # comes with tokenizers; slow to import
        try:
            return Path(snapshot_download(str(folder), allow_patterns=["*.json", "*.safetensors", "*.bin", "*.model"]))
        except Exception as error:
            raise ValueError(f"{folder} is no folder here and could not be downloaded ({type(error).__name__}); download "
                             "config.json, model.safetensors and tokenizer.json from the hub into a folder and pass that") from None
    raise ValueError(f"{folder} is not a folder with a model")


def existing(path: Path) -> Path:
    if not path.exists():
        raise ValueError(f"{path} is missing")
    return path


def read_config(path: Path) -> T5Config:
    try:
        raw = json.loads(existing(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict) or raw.get("model_type") != "t5":
        kind = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(f"{path} describes a model of type {kind!r}; this version reads t5")
    known = {field.name for field in fields(T5Config)}
    raw = {"decoder_start_token_id": raw.get("pad_token_id", 0), **raw}
    if raw.get("scale_decoder_outputs") is False:  # transformers 5 calls every T5 tied, and marks v1.1 by this instead
        raw["tie_word_embeddings"] = False
    try:
        return T5Config(**{key: value for key, value in raw.items() if key in known})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def weights_file(folder: Path) -> Path:
    """model.safetensors; where there is only pytorch_model.bin, it is converted once, without unpickling code."""
    path, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    if not path.exists() and pickled.exists():
        try:
            state = torch.load(pickled, map_location="cpu", weights_only=True)
        except Exception:  # of many types, and with advice to switch the safety off
            raise ValueError(f"{pickled} is damaged, or holds code besides tensors and is therefore not read") from None
        if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
            raise ValueError(f"{pickled} does not hold a dictionary of named tensors")
        atomic_safetensors(path, {name: value.clone() for name, value in state.items()}, {"format": "pt"})
    return existing(path)


def load_weights(model: T5, path: Path, dtype: torch.dtype | None = None) -> None:
    """Fill a model on the meta device from a safetensors file. Raises ValueError naming all tensors that do not fit."""
    wanted = {name: hf_names(name, model.config) for name, _ in model.named_parameters()}
    try:
        with safe_open(path, "pt") as file:
            check_names(wanted, set(file.keys()), path)
            check_shapes(wanted, model, file, path)
            check_copies(file, path, tied=model.config.tie_word_embeddings)
            state = {name: torch.cat([file.get_tensor(part) for part in parts]) for name, parts in wanted.items()}
    except ValueError:
        raise
    except Exception as error:  # safetensors has an exception type of its own
        raise ValueError(f"{path} is damaged: {error}") from None
    state = {name: value.to(dtype or torch.float32) for name, value in state.items()}
    model.load_state_dict(state, assign=True)
    model.requires_grad_(True)


def check_names(wanted: dict[str, list[str]], found: set[str], path: Path) -> None:
    names = {part for parts in wanted.values() for part in parts}
    extra = found - names - HARMLESS
    if "lm_head.weight" not in names:
        extra.discard("lm_head.weight")  # tied: a copy of the embedding
    problems = [f"{word} {', '.join(sorted(group)[:5])}" + (f" and {len(group) - 5} more" if len(group) > 5 else "")
                for word, group in (("missing", names - found), ("unexpected", extra)) if group]
    if problems:
        raise ValueError(f"{path} does not fit its config.json: {'; '.join(problems)}")


def check_shapes(wanted: dict[str, list[str]], model: T5, file, path: Path) -> None:
    problems = []
    for name, parameter in model.named_parameters():
        shape = [parameter.shape[0] // len(wanted[name]), *parameter.shape[1:]]
        found = {part: file.get_slice(part).get_shape() for part in wanted[name]}
        problems += [f"{part} is {size}, not {shape}" for part, size in found.items() if size != shape]
    if problems:
        raise ValueError(f"{path} does not fit its config.json: {'; '.join(problems[:5])}")


def check_copies(file, path: Path, tied: bool) -> None:
    """What we drop as a copy of the shared embedding must be one, or the model would silently be another."""
    copies = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"} | ({"lm_head.weight"} if tied else set())
    for name in sorted(copies & set(file.keys())):
        if not torch.equal(file.get_tensor(name), file.get_tensor("shared.weight")):
            raise ValueError(f"{path} does not fit its config.json: {name} is no copy of shared.weight")


def save(model: T5, tokenizer: TextTokenizer, folder: str | Path) -> None:
    """Write a folder that `load` and Hugging Face transformers can read. Every file is written atomically."""
    folder = Path(folder)
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        parts = hf_names(name, model.config)
        tensors.update(zip(parts, parameter.detach().chunk(len(parts))))
    config = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True,
              "use_cache": True, **asdict(model.config)}
    atomic_json(folder / "config.json", config)
    tokenizer.save(folder / "tokenizer.json")
    atomic_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>",
                                                   "pad_token": "<pad>", "unk_token": "<unk>"})
    atomic_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
