"""A Hugging Face folder ↔ a model and its tokenizer. Strict: what does not fit is named, not half-loaded."""

from __future__ import annotations

import json
import math
import re
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Iterator

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .families import (HARMLESS, Config, build, copies, depth, eos_ids, family, hf_names, is_transposed,
                       part_sizes, read_config, write_config)
from ..decoder import DecoderConfig
from ..runtime.device import find_device
from ..runtime.files import (atomic_bytes, atomic_json, atomic_safetensors, open_safetensors, read_checksums,
                             read_json)
from ..t5 import KEEP_FP32, T5Config
from ..tokenizer import TextTokenizer
from .tokenizers import read_backend, read_eos

PIECE = 2**25  # bytes read at a time: the memory that loading needs besides the model


def load(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None,
         check_finite: bool = False) -> tuple[nn.Module, TextTokenizer]:
    """Read a folder or hub id (config.json, weights, tokenizer) → model in eval mode, tokenizer.

    `dtype`: float32 (also for None) or bfloat16, where T5's `wo` stays float32. `check_finite` checks every
    weight. Raises ValueError, in one sentence that names the file, where one is missing, damaged or unfit.
    """
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"models compute in float32 or bfloat16, not in {dtype}")
    with one_sentence(folder):
        device, folder = find_device(device), resolve(folder)
        config, backend = load_config(folder / "config.json"), read_backend(folder)
        if isinstance(config, DecoderConfig):
            config = find_ends(folder, config, backend)
        tokenizer = fit_tokenizer(folder, config, backend)
        tokenizer.files = {str(p.relative_to(folder)): p.read_bytes() for p in carried(folder)}
        weights = Weights(weight_files(folder))
        config = tie_as_stored(config, weights)
        if depth(config) > len(weights):  # else making them could take forever
            raise ValueError(f"{weights.where} does not fit its config.json: {depth(config)} layers from "
                             f"{len(weights)} tensors")
        with torch.device("meta"), Unfilled():
            model = build(config)
        load_weights(model, weights, device, dtype or torch.float32, check_finite)
    return model.eval(), tokenizer


@contextmanager
def one_sentence(folder: str | Path):
    """Errors inside become a ValueError of one readable line, whatever a damaged file puts into them."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{error.filename or folder} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        text = "".join(c if c.isprintable() else " " for c in str(error))
        raise ValueError(text if len(text) < 550 else f"{text[:540]} …") from None


class Unfilled(TorchFunctionMode):
    """Inside, modules skip their initialisation, which even on the meta device costs seconds of imports."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def resolve(folder: str | Path) -> Path:
    """A folder, or the local copy of a hub id, downloaded if possible."""
    path = Path(folder)
    if path.is_dir():
        return path
    if (maker := path.with_suffix(".py")).exists():
        raise ValueError(f"{folder} is not here yet; this makes it: python {maker}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)) and not path.exists():
        from huggingface_hub import snapshot_download  # comes with tokenizers; slow to import
        wanted = ["*.json", "*.jinja", "merges.txt", "spiece.model"]
        try:
            found = Path(snapshot_download(str(folder), allow_patterns=[*wanted, "model*.safetensors"]))
            if not list(found.glob("model*.safetensors")):  # only then the old format
                found = Path(snapshot_download(str(folder), allow_patterns=[*wanted, "pytorch_model.bin"]))
            return found
        except Exception as error:
            raise ValueError(
                f"{folder} is no folder here and could not be downloaded ({type(error).__name__}); download "
                "config.json, model.safetensors and tokenizer.json into a folder and pass that") from None
    raise ValueError(f"{folder} is not a folder with a model")


def carried(folder: Path) -> list[Path]:
    """What a saved folder gets, too: how to chat, how to sample. None of it is needed to load a model."""
    names = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
             "chat_template.json", "*.jinja", "additional_chat_templates/*.jinja")
    return [path for name in names for path in sorted(folder.glob(name)) if path.is_file()]


def check_exists(path: Path) -> Path:
    if not path.exists():
        raise ValueError(f"{path} is missing")
    return path


def load_config(path: Path) -> Config:
    raw = read_json(check_exists(path), "is not valid JSON")
    try:
        return read_config(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def find_ends(folder: Path, config: DecoderConfig, backend: Tokenizer) -> DecoderConfig:
    """The config with all tokens that end a completion: those of config.json and generation_config.json.

    Where both name none, the tokenizer's counts. Where that has none either, completions end by their length.
    """
    ends, where = [i for i in (config.eos_token_id, *config.more_eos_token_ids) if i >= 0], "config.json"
    path = folder / "generation_config.json"
    if path.exists():
        where = where if ends else path.name
        ends += [i for i in generation_ends(path, config.vocab_size) if i not in ends]
    if ends and backend.id_to_token(ends[0]) is None:
        raise ValueError(f"{folder}: the tokenizer has no token with the id {ends[0]}, "
                         f"which is eos_token_id in {where}")
    own = read_eos(folder / "tokenizer_config.json", backend) if len(ends) != 1 else []
    if not ends or (own and own[0] in ends and own[0] != ends[0]):  # the tokenizer's is that of answers
        ends = [*own, *(i for i in ends if i not in own)]
    if not ends:
        warnings.warn(f"{folder}: neither config.json nor generation_config.json nor tokenizer_config.json "
                      "names a token that ends a completion: each goes on to its greatest length")
        return config
    first, *more = ends
    source = {**config.source, "eos_token_id": ends if more else first}  # so that `save` writes all of them
    return replace(config, eos_token_id=first, more_eos_token_ids=tuple(more), source=source)


def generation_ends(path: Path, vocab_size: int) -> list[int]:
    raw = read_json(path, "is not valid JSON")
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__} instead of an object")
    try:
        return eos_ids(raw, vocab_size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def fit_tokenizer(folder: Path, config: Config, backend: Tokenizer) -> TextTokenizer:
    """The tokenizer as the model needs it. Raises ValueError where it is another model's."""
    if isinstance(config, T5Config):
        try:
            tokenizer = TextTokenizer(backend)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
        wanted = (("</s>", tokenizer.eos_id, config.eos_token_id),
                  ("<pad>", tokenizer.pad_id, config.pad_token_id))
        wrong = [f"{token} has the id {ours} there and {theirs} here"
                 for token, ours, theirs in wanted if ours != theirs]
        if wrong:
            raise ValueError(f"{folder}: the tokenizer does not belong to config.json: {', '.join(wrong)}")
    else:
        eos = None if config.eos_token_id < 0 else backend.id_to_token(config.eos_token_id)
        tokenizer = TextTokenizer(backend, eos=eos, pad=None, ends_prompts=False)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, but the model's embedding "
                         f"only {config.vocab_size}: they do not belong together")
    return tokenizer


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that an index names; a pytorch_model.bin alone is converted once."""
    path, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    pickled = folder / "pytorch_model.bin"
    if not path.exists() and index.exists():
        listed = read_json(index, "is not valid JSON")
        names = listed.get("weight_map") if isinstance(listed, dict) else None
        if not isinstance(names, dict) or not names or not all(
                isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name)
                for name in names.values()):
            raise ValueError(f"{index} has no weight_map from tensors to files of this folder")
        return [check_exists(folder / name) for name in sorted(set(names.values()))]
    if not path.exists() and (folder / f"{pickled.name}.index.json").exists():
        raise ValueError(f"{folder} has {pickled.name} in shards, which is not read: save the model with "
                         "transformers' save_pretrained, which writes safetensors")
    if not path.exists() and pickled.exists():
        convert(pickled, path)
    return [check_exists(path)]


def convert(pickled: Path, path: Path) -> None:
    """pytorch_model.bin → model.safetensors, without unpickling code."""
    try:
        state = torch.load(pickled, map_location="cpu", weights_only=True)
    except Exception:  # of many types, and with advice to switch the safety off
        raise ValueError(f"{pickled} is damaged, or holds code besides tensors and is not read") from None
    if not isinstance(state, dict) or not all(
            isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise ValueError(f"{pickled} does not hold a dictionary of named tensors")
    try:
        atomic_safetensors(path, {name: value.clone() for name, value in state.items()}, {"format": "pt"})
    except OSError as error:
        raise ValueError(f"{pickled} must be converted to {path.name}, which cannot be written "
                         f"({error.strerror or error}); copy the folder to where it can") from None
    except (KeyError, RuntimeError) as error:  # tensors without numbers, or of a type that the format lacks
        raise ValueError(f"{pickled} cannot be converted to {path.name}: {error}") from None


@dataclass
class StoredTensor:
    """A tensor in a file."""

    path: Path
    name: str
    shape: list[int]
    kind: str
    checksum: int | None  # crc32 of its bytes; only in files of ours


class Weights(dict[str, StoredTensor]):
    """The tensors of safetensors files by name, read in pieces, so that only a piece is in memory twice."""

    def __init__(self, files: list[Path]):
        super().__init__()
        self.where = files[0] if len(files) == 1 else files[0].parent / "model.safetensors.index.json"
        for path in files:
            with open_safetensors(path) as file:
                checksums = read_checksums(file)
                for name in file.keys():
                    if name in self:
                        raise ValueError(f"{path} and {self[name].path.name} both hold {name}")
                    part = file.get_slice(name)
                    self[name] = StoredTensor(path, name, part.get_shape(), part.get_dtype(),
                                              checksums.get(name))

    def pieces(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """A tensor, some rows at a time. Each reopens the file: else its pages would pile up in memory."""
        stored, checksum = self[name], 0
        step = max(1, PIECE // (4 * math.prod(stored.shape[1:])))
        for start in range(0, stored.shape[0], step):
            rows = slice(start, min(start + step, stored.shape[0]))
            with open_safetensors(stored.path) as file:
                piece = file.get_slice(stored.name)[rows]
            if stored.checksum is not None:
                checksum = zlib.crc32(piece.view(torch.uint8).numpy(), checksum)
            yield rows, piece
        if stored.checksum not in (None, checksum):
            raise ValueError(f"{stored.path} is damaged: {name} is not what was written")


def load_weights(model: nn.Module, weights: Weights, device="cpu", dtype=torch.float32,
                 check_finite: bool = False) -> None:
    """Fill a model on the meta device. Raises ValueError naming tensors that do not fit."""
    config = model.config
    if family(config) == "gpt2" and "wte.weight" in weights:  # the oldest files lack the prefix
        for name in [name for name in weights if not name.startswith(("transformer.", "lm_head."))]:
            if f"transformer.{name}" not in weights:
                weights[f"transformer.{name}"] = weights.pop(name)
    wanted = {name: hf_names(name, config) for name, _ in model.named_parameters()}
    check_names(wanted, weights, config)
    check_shapes(wanted, weights, model)
    state = {}
    for name, parameter in model.named_parameters():
        keep = family(config) == "t5" and any(part in name for part in KEEP_FP32)
        state[name] = torch.empty(parameter.shape, dtype=torch.float32 if keep else dtype, device=device)
        parts = state[name].split(part_sizes(name, len(parameter), config))
        for part, hf_name in zip(parts, wanted[name]):
            part = part.T if is_transposed(name, config) else part
            for rows, piece in weights.pieces(hf_name):
                if check_finite and not piece.isfinite().all():
                    raise ValueError(f"{weights[hf_name].path}: {hf_name} has values that are not finite")
                part[rows].copy_(piece)
    check_copies(weights, config, dtype, state)
    model.load_state_dict(state, assign=True)
    model.requires_grad_(True)


def tie_as_stored(config: Config, weights: Weights) -> Config:
    """T5's config, where transformers 5 wrote it: that calls every T5 tied, and its own key tells the scale.

    So the file has to tell: the head is tied where it is missing, or a copy of the embedding.
    """
    if not isinstance(config, T5Config) or config.scale_decoder_outputs is None:
        return config
    embedding, head = (weights.get(name) for name in ("shared.weight", "lm_head.weight"))
    tied = head is None
    if embedding and head and (embedding.shape, embedding.kind) == (head.shape, head.kind) and head.shape == [
            config.vocab_size, config.d_model]:
        pieces = zip(weights.pieces(embedding.name), weights.pieces(head.name))
        tied = all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for (_, a), (_, b) in pieces)
    scaled = config.scale_decoder_outputs
    return replace(config, tie_word_embeddings=tied, scale_decoder_outputs=None if scaled == tied else scaled)


def check_names(wanted: dict[str, list[str]], weights: Weights, config: Config) -> None:
    names = {part for parts in wanted.values() for part in parts}
    extra = {name for name in set(weights) - names - copies(config)[1] if not HARMLESS.fullmatch(name)}
    problems = [f"{what} {', '.join(sorted(group)[:3])}" + (f" and {len(group) - 3} more" * (len(group) > 3))
                for what, group in (("missing", names - set(weights)), ("unexpected", extra)) if group]
    if problems:
        raise ValueError(f"{weights.where} does not fit its config.json: {'; '.join(problems)}")


def check_shapes(wanted: dict[str, list[str]], weights: Weights, model: nn.Module) -> None:
    problems = []
    for name, parameter in model.named_parameters():
        for part, size in zip(wanted[name], part_sizes(name, len(parameter), model.config)):
            shape, found = [size, *parameter.shape[1:]], weights[part]
            shape = shape[::-1] if is_transposed(name, model.config) else shape
            if found.shape != shape:
                problems.append(f"{part} is {found.shape}, not {shape}")
            elif found.kind not in ("F32", "BF16", "F16"):
                problems.append(f"{part} holds {found.kind}, not floating-point numbers of 32 or 16 bits")
    if problems:
        raise ValueError(f"{weights.where} does not fit its config.json: {'; '.join(problems[:3])}")


def check_copies(weights: Weights, config: Config, dtype: torch.dtype, state: dict[str, Tensor]) -> None:
    """Check that what we drop as a copy of the embedding is one: else the model would silently differ."""
    embedding = state["shared.weight" if isinstance(config, T5Config) else "tokens.weight"]
    for name in sorted(copies(config)[1] & set(weights)):
        if weights[name].shape != list(embedding.shape) or not all(
                torch.equal(embedding[rows].cpu(), piece.to(dtype)) for rows, piece in weights.pieces(name)):
            raise ValueError(f"{weights.where} does not fit its config.json: {name} is no copy of "
                             f"{copies(config)[0]}")


def save(model: nn.Module, tokenizer: TextTokenizer, folder: str | Path) -> None:
    """Write a folder for `load` and Hugging Face transformers, each file atomically."""
    folder, config = Path(folder), model.config
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        parts = parameter.detach().split(part_sizes(name, len(parameter), config))
        for hf_name, part in zip(hf_names(name, config), parts):
            tensors[hf_name] = (part.T if is_transposed(name, config) else part).contiguous().cpu()
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    atomic_json(folder / "config.json", write_config(config, dtype))
    tokenizer.save(folder / "tokenizer.json")
    eos = tokenizer.eos_id
    specials = {} if eos is None else {"eos_token": tokenizer.backend.id_to_token(eos)}
    if isinstance(config, T5Config):
        specials |= {"pad_token": "<pad>", "unk_token": "<unk>"}
    specials = {"tokenizer_class": "PreTrainedTokenizerFast", **specials}
    atomic_json(folder / "tokenizer_config.json", specials | loaded_config(tokenizer))
    for name in tokenizer.files.keys() - {"tokenizer_config.json"}:
        atomic_bytes(folder / name, tokenizer.files[name])
    atomic_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})


def loaded_config(tokenizer: TextTokenizer) -> dict[str, Any]:
    """The tokenizer_config.json that was loaded, without code, which stays behind; else empty."""
    try:
        config = json.loads(tokenizer.files.get("tokenizer_config.json", b"{}"))
    except (ValueError, RecursionError):  # it is not needed to load, so nothing has complained yet
        return {}
    known = config if isinstance(config, dict) else {}
    return {key: value for key, value in known.items() if key != "auto_map"}
