"""Does minicd compute what Hugging Face transformers computes? Random small models, read and written.

    python -m bench.parity                                     # needs `pip install transformers`
    python -m bench.parity --families llama qwen3 --draws 100 --seed 1
    python -m bench.parity --publish                           # also writes results/bench-parity.json

transformers makes and saves a model; minicd loads it and must give the same teacher-forced logits and greedy
completions. The pretrained model of data/smollm2, where it is, or other --folders, has to write 50 tokens.
What minicd then saves, transformers must load without a missing or unexpected tensor, and give
the same logits as before. Relative differences are divided by the standard deviation of the logits; above
TOLERANCE the command ends with status 1.
"""

from __future__ import annotations

import random
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any, Callable

import torch
from torch import Tensor, nn

from bench.common import ROOT, Parser, count, guarded, import_transformers, publish, seed_number
from minicd import sampling
from minicd.hf.checkpoint import load, save
from minicd.tokenizer import word_tokenizer

TOLERANCE = 1e-4
TIE = 1e-3  # two tokens whose logits are this near: rounding decides which of them is the greedy one
PROMPT_LENGTHS, ANSWER_LENGTHS, NEW_TOKENS = [30, 1, 13, 22], [17, 9, 1, 20], 16
EOS = 1
REAL = ROOT / "data" / "smollm2"
BEGINNINGS = ["The capital of France is", "Once upon a time", "def fibonacci(n):\n", "1 + 1 = 2, 2 + 2 ="]
Rows = list[list[int]]


def t5(rng: random.Random) -> dict[str, Any]:
    buckets = rng.randint(4, 40)
    return dict(d_model=rng.randint(8, 40), d_kv=rng.randint(2, 16), d_ff=rng.randint(4, 64),
                num_heads=rng.randint(1, 5), num_layers=rng.randint(1, 3),
                num_decoder_layers=rng.randint(1, 3),
                feed_forward_proj=rng.choice(
                    ["relu", "gelu", "silu", "gated-relu", "gated-gelu", "gated-silu"]),
                tie_word_embeddings=rng.random() < 0.5, relative_attention_num_buckets=buckets,
                relative_attention_max_distance=rng.randint(buckets + 1, 150),
                layer_norm_epsilon=epsilon(rng), decoder_start_token_id=rng.choice([0, 2]))


def gpt2(rng: random.Random) -> dict[str, Any]:
    heads = rng.randint(1, 5)
    return dict(n_embd=heads * rng.randint(2, 12), n_head=heads, n_layer=rng.randint(1, 3),
                n_inner=rng.choice([None, rng.randint(4, 64)]), n_positions=rng.randint(50, 90),
                activation_function=activation(rng), layer_norm_epsilon=epsilon(rng),
                tie_word_embeddings=rng.random() < 0.7)


def xglm(rng: random.Random) -> dict[str, Any]:
    heads = rng.randint(1, 5)
    return dict(d_model=heads * rng.randrange(4, 14, 2), attention_heads=heads, num_layers=rng.randint(1, 3),
                ffn_dim=rng.randint(4, 64), activation_function=activation(rng),
                scale_embedding=rng.random() < 0.7, max_position_embeddings=rng.randint(50, 90),
                tie_word_embeddings=rng.random() < 0.7)


def llama(rng: random.Random) -> dict[str, Any]:
    return rotary(rng) | dict(head_dim=rng.choice([None, rng.randrange(2, 18, 2)]),
                              attention_bias=rng.random() < 0.5, mlp_bias=rng.random() < 0.5)


def qwen2(rng: random.Random) -> dict[str, Any]:
    return rotary(rng) | dict(use_sliding_window=False, sliding_window=rng.randint(2, 10))


def qwen3(rng: random.Random) -> dict[str, Any]:
    return qwen2(rng) | dict(head_dim=rng.randrange(2, 18, 2), attention_bias=rng.random() < 0.5)


def rotary(rng: random.Random) -> dict[str, Any]:
    """What Llama and the Qwens have in common."""
    heads = rng.randint(1, 6)
    return dict(hidden_size=heads * rng.randrange(2, 14, 2), intermediate_size=rng.randint(4, 64),
                num_attention_heads=heads,
                num_key_value_heads=rng.choice([n for n in range(1, heads + 1) if heads % n == 0]),
                num_hidden_layers=rng.randint(1, 3), hidden_act=activation(rng), rms_norm_eps=epsilon(rng),
                tie_word_embeddings=rng.random() < 0.5, max_position_embeddings=rng.randint(50, 90),
                rope_theta=rng.choice([10.0, 100.0, 10000.0, 500000.0]), rope_scaling=scaling(rng),
                eos_token_id=rng.choice([EOS, [EOS, 4, 5]]))


def scaling(rng: random.Random) -> dict[str, Any] | None:
    low, factor = rng.choice([1.0, 1.5]), rng.choice([2.0, 3.5, 8.0])
    llama3 = dict(rope_type="llama3", factor=factor, low_freq_factor=low,
                  high_freq_factor=low + rng.choice([1.0, 3.0]),
                  original_max_position_embeddings=rng.randint(8, 40))
    return rng.choice([None, dict(rope_type="linear", factor=factor), llama3])


def activation(rng: random.Random) -> str:
    return rng.choice(["gelu", "gelu_new", "relu", "silu"])


def epsilon(rng: random.Random) -> float:
    return rng.choice([1e-6, 1e-5, 1e-2])


FAMILIES: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    function.__name__: function for function in (t5, gpt2, xglm, llama, qwen2, qwen3)}


def main() -> None:
    arguments = parse()
    version = import_transformers().__version__
    results = [family_result(family, arguments.draws, arguments.seed) for family in arguments.families]
    results += [pretrained_result(folder) for folder in arguments.folders]
    if arguments.publish:
        settings = {"draws": arguments.draws, "seed": arguments.seed, "tolerance": TOLERANCE}
        path = ROOT / "results" / "bench-parity.json"
        publish(path, torch.device("cpu"), settings, results, transformers=version)
    wrong = sum(result["mismatches"] for result in results)
    if wrong:
        total = sum(result["configurations"] for result in results)
        raise ValueError(f"{wrong} of {total} configurations differ from transformers")


def parse() -> Any:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES),
                        metavar="FAMILY", help=f"only these, of {', '.join(FAMILIES)}")
    parser.add_argument("--draws", type=count, default=10, help="random models of each family (default: 10)")
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.add_argument("--folders", nargs="*", type=Path, default=[REAL] if REAL.exists() else [],
                        help="decoders of natural text, such as the student of a run (default: data/smollm2)")
    parser.add_argument("--publish", action="store_true", help="write results/bench-parity.json")
    return parser.parse_args()


def family_result(family: str, draws: int, seed: int) -> dict[str, Any]:
    """Compare `draws` configurations, a line each; the largest differences of the family."""
    rows = []
    for number in range(draws):
        rng = random.Random(f"{seed} {family} {number}")  # independent of the configurations before it
        fields = FAMILIES[family](rng)
        rows.append(compare(family, fields, rng))
        listed = ", ".join(f"{key} {value}" for key, value in fields.items())
        print(f"{family} {number}: {words(rows[-1])}; {listed}", flush=True)
    result = {key: (max if isinstance(value, float) else sum)(row[key] for row in rows)
              for key, value in rows[0].items() if key != "problem"}
    result |= {"family": family, "configurations": draws,
               "mismatches": sum(bool(row["problem"]) for row in rows)}
    print(f"{family}, all {draws}: {words(result)}; {result['mismatches']} mismatches\n", flush=True)
    return result


def pretrained_result(folder: Path) -> dict[str, Any]:
    """The same of the decoder in a folder, which transformers reads too, with its tokenizer."""
    transformers = import_transformers()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, rng = load(folder)[1], random.Random(0)
    prompts = tokenizer.encode_all(BEGINNINGS)
    if transformers.AutoTokenizer.from_pretrained(folder)(BEGINNINGS)["input_ids"] != prompts:
        raise ValueError(f"{folder}: transformers' tokenizer gives other tokens")
    answers = [[rng.randrange(3, len(tokenizer)) for _ in range(n)] for n in ANSWER_LENGTHS]
    with tempfile.TemporaryDirectory() as saved:
        row = judged(lambda: from_folder(folder, Path(saved), theirs, prompts, answers, 50))
    print(f"{folder.name}: {words(row)}\n", flush=True)
    wrong = int(bool(row.pop("problem")))
    name = folder.resolve().relative_to(ROOT) if folder.resolve().is_relative_to(ROOT) else folder
    return row | {"family": str(name), "configurations": 1, "mismatches": wrong}


def words(row: dict[str, Any]) -> str:
    ties = f", {row['ties']} ties" if row["ties"] else ""
    text = (f"logits {row['absolute']:.1e} (relative {row['relative']:.1e}), "
            f"saved and read back {row['saved']:.1e}, "
            f"{row['equal']} of {row['completions']} completions equal{ties}")
    return f"MISMATCH, {row['problem']}; {text}" if row.get("problem") else text


def compare(family: str, fields: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """One configuration in both directions, `judged`."""
    with tempfile.TemporaryDirectory() as folder:
        return judged(lambda: differences(
            Path(folder), random_model(family, fields, rng.getrandbits(32)), rng))


def judged(compared: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `compared` finds, and under `problem` what of it is wrong, in words, or nothing."""
    row = {"absolute": 0.0, "relative": 0.0, "saved": 0.0, "completions": 0, "equal": 0, "ties": 0}
    try:
        row |= compared()
    except ValueError as error:
        return row | {"problem": str(error)}
    if not (row["relative"] <= TOLERANCE and row["saved"] <= TOLERANCE):  # so that NaN is no match
        return row | {"problem": "the logits differ"}
    same = row["equal"] + row["ties"] == row["completions"]
    return row | {"problem": "" if same else "the completions differ"}


def random_model(family: str, fields: dict[str, Any], seed: int) -> Any:
    """transformers' model, with weights, biases and norms large enough for each to show in the logits."""
    hf, generator = import_transformers(), torch.Generator().manual_seed(seed)
    tokens = dict(vocab_size=50 + seed % 30, bos_token_id=2, eos_token_id=EOS, pad_token_id=0)
    config = hf.AutoConfig.for_model(family, **tokens | deepcopy(fields))  # it writes into nested fields
    kind = hf.AutoModelForSeq2SeqLM if family == "t5" else hf.AutoModelForCausalLM
    model = kind.from_config(config).eval()
    if not fields.get("tie_word_embeddings", True):  # transformers 5 ties every T5
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if noise.dim() == 1:
            parameter.data = 0.4 * noise + (0 if name.endswith("bias") else 1)
        else:
            parameter.data = noise * scale(name, parameter.shape, family)
    return model


def scale(name: str, shape: torch.Size, family: str) -> float:
    """The scale of a random matrix that keeps activations near 1: rounding does not grow with the layers."""
    if any(part in name for part in ("embed", "shared", "relative", "wte", "wpe")):
        return 0.5
    transposed = family == "gpt2" and "lm_head" not in name
    fan_in = shape[0 if transposed else 1]
    return fan_in**-0.5 * (0.3 if ".q." in name else 1.0)  # T5 does not divide by the root of the head size


def differences(folder: Path, theirs: Any, rng: random.Random) -> dict[str, Any]:
    """Write transformers' model, read it, compare. Write minicd's, let transformers read it, compare."""
    size = theirs.config.vocab_size
    prompts, answers = ([[rng.randrange(3, size) for _ in range(length)] for length in lengths]
                        for lengths in (PROMPT_LENGTHS, ANSWER_LENGTHS))
    theirs.save_pretrained(folder / "theirs")
    word_tokenizer([f"w{n}" for n in range(3, size)]).save(folder / "theirs" / "tokenizer.json")
    return from_folder(folder / "theirs", folder / "ours", theirs, prompts, answers, NEW_TOKENS)


def from_folder(written: Path, ours: Path, theirs: Any, prompts: Rows, answers: Rows,
                new_tokens: int) -> dict[str, Any]:
    """minicd reads the folder `written` of the model `theirs`, and saves it again as `ours`."""
    model, tokenizer = load(written)
    expected = their_logits(theirs, prompts, answers)
    absolute = largest(our_logits(model, prompts, answers), expected)
    save(model, tokenizer, ours)
    spread = torch.cat(expected).std().item()
    saved = largest(their_logits(read_back(theirs, ours), prompts, answers), expected) / spread
    found = {"absolute": absolute, "relative": absolute / spread, "saved": saved}
    return found | completions(model, theirs, prompts, new_tokens)


def read_back(theirs: Any, folder: Path) -> Any:
    """transformers' model of a folder by minicd. Raises ValueError for missing, extra, misshapen tensors."""
    try:
        model, info = type(theirs).from_pretrained(folder, output_loading_info=True)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"transformers does not read what minicd saved: {error}") from None
    problems = [f"{kind.replace('_', ' ')} {', '.join(map(str, names))}"
                for kind, names in info.items() if names]
    if problems:
        raise ValueError(f"transformers does not read what minicd saved: {'; '.join(problems)}")
    return model.eval()


@torch.no_grad()
def our_logits(model: nn.Module, prompts: Rows, answers: Rows) -> list[Tensor]:
    """In one padded batch: for each answer [T, V]."""
    logits = model(*(sampling.pad(rows, model.config.pad_token_id) for rows in (prompts, answers)))
    return [row[: len(answer)] for row, answer in zip(logits, answers)]


@torch.no_grad()
def their_logits(model: Any, prompts: Rows, answers: Rows) -> list[Tensor]:
    """The same, row by row and without padding."""
    if model.config.is_encoder_decoder:
        return [model(input_ids=torch.tensor([p]), labels=torch.tensor([a])).logits[0]
                for p, a in zip(prompts, answers)]
    return [model(torch.tensor([p + a])).logits[0, len(p) - 1 : -1] for p, a in zip(prompts, answers)]


def largest(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return torch.stack([(a - b).abs().max() for a, b in zip(ours, theirs)]).max().item()


def completions(model: nn.Module, theirs: Any, prompts: Rows, new_tokens: int) -> dict[str, int]:
    """How many greedy completions are equal, and how many differ only by a tie of two tokens."""
    ours = sampling.generate(model, prompts, new_tokens, temperature=0, precision="fp32")
    expected = [their_completion(theirs, prompt, new_tokens) for prompt in prompts]
    ties = [a != b and tie(theirs, prompt, a + [EOS], b + [EOS])
            for prompt, a, b in zip(prompts, ours, expected)]
    return {"completions": len(prompts), "equal": sum(map(list.__eq__, ours, expected)), "ties": sum(ties)}


def their_completion(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    encoder_decoder = model.config.is_encoder_decoder  # transformers 5: its cache has the encoder's layers
    ids = torch.tensor([prompt])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1,
                         pad_token_id=0, max_new_tokens=new_tokens, use_cache=not encoder_decoder)
    row, stops = out[0, 1 if encoder_decoder else len(prompt) :].tolist(), model.config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    return row[:-1] if row[-1] in stops else row


def tie(model: Any, prompt: list[int], ours: list[int], theirs: list[int]) -> bool:
    """Where the two part, does transformers give both tokens nearly the same logit?"""
    t = next(t for t, (a, b) in enumerate(zip(ours, theirs)) if a != b)
    logits = their_logits(model, [prompt], [theirs[: t + 1]])[0][t]
    return abs(logits[ours[t]] - logits[theirs[t]]).item() < TIE


if __name__ == "__main__":
    guarded(main)
