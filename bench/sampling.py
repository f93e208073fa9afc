"""Decoding speed: minicd's generate against Hugging Face transformers', same weights and prompts, greedy.

    pip install transformers                     # needed by this benchmark only
    OMP_NUM_THREADS=1 python -m bench.sampling   # from the repository's root; 17 minutes on a free CPU core
    python -m bench.sampling --shape "GPT-2 small" --precision bf16 --batch 16 --out /tmp/one.json

Both sides load the same folder of random weights, in the same type, and first have to write the same tokens.
They take turns in one process; a figure is the median over the rounds, after one untimed turn each. Tokens
per second are the tokens written ÷ the seconds of the whole call, prompt included. On CUDA, transformers'
compiled static cache is a third side.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import random
import re
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch
from torch import nn

from bench.common import Parser, count, guarded, import_transformers, parsed, publish, turns
from bench.train import SMALL
from minicd import sampling
from minicd.hf.checkpoint import load, save
from minicd.runtime.device import autocast, hardware
from minicd.hf.families import build, read_config
from minicd.t5 import T5, initialise
from minicd.tokenizer import word_tokenizer

FIRST = 3  # the lowest token id that stands for text: below are padding, stop and unknown
MIXED = (20, 200)  # a prompt of one of these lengths, or any between them
SAME = 0.9  # the least share of equal completions in fp32; a tie may go either way
STOPS = 1 / 16  # of the vocabulary end a completion, in the cases with a stop rule
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Rows = list[list[int]]


class Case(NamedTuple):
    """One call of generate. Every row writes `new` tokens; with `stop`, rows may end earlier."""

    batch: int
    prompt: int | tuple[int, int]
    new: int
    stop: bool = False

    def __str__(self) -> str:
        prompt = "–".join(map(str, self.prompt)) if isinstance(self.prompt, tuple) else self.prompt
        return f"{self.batch} × {prompt} → {'up to ' * self.stop}{self.new}"


LLAMA = dict(architectures=["LlamaForCausalLM"], model_type="llama", rms_norm_eps=1e-5, eos_token_id=1,
             bos_token_id=2)
LLAMA_260K = read_config(LLAMA | dict(
    hidden_size=64, intermediate_size=172, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=4,
    vocab_size=512, max_position_embeddings=512, tie_word_embeddings=True))
LLAMA_1B = read_config(LLAMA | dict(
    hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
    num_key_value_heads=4, vocab_size=32000, max_position_embeddings=2048, tie_word_embeddings=False))
GPT2 = read_config(dict(
    architectures=["GPT2LMHeadModel"], model_type="gpt2", vocab_size=50257, n_positions=1024, n_embd=768,
    n_layer=12, n_head=12, eos_token_id=1, bos_token_id=2))
LARGE = "1B Llama"  # only in bf16, and on the CPU only if asked for
# A model and the calls to time. On the CPU, memory is measured in the last one.
SHAPES = {
    "T5-small v1.1": (SMALL, [Case(1, 32, 32), Case(16, 32, 32), Case(64, 32, 32),
                              Case(64, 32, 64, stop=True), Case(256, 32, 16), Case(64, MIXED, 32)]),
    "GPT-2 small": (GPT2, [Case(1, 32, 32), Case(16, 32, 32), Case(16, MIXED, 32)]),
    "260K Llama": (LLAMA_260K, [Case(1, 32, 128), Case(64, 32, 200), Case(256, MIXED, 100, stop=True),
                                Case(256, MIXED, 100)]),
    LARGE: (LLAMA_1B, [Case(1, 32, 128), Case(16, 32, 128), Case(64, MIXED, 200), Case(256, MIXED, 200)]),
}


def write_folder(config: Any, precision: str, folder: str) -> None:
    """A folder of random weights, rounded to the precision: both sides compute with the same numbers."""
    model = build(config)
    initialise(model, 0) if isinstance(model, T5) else draw(model)
    save(model.to(DTYPES[precision]), word_tokenizer(["word"]), folder)


@torch.no_grad()
def draw(model: nn.Module) -> None:
    """Blocks outweigh the embedding: with GPT-2's scale a small tied model only repeats its last token."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            strong = parameter.ndim == 2 and name.startswith("blocks.")
            parameter.normal_(0.0, parameter.shape[1] ** -0.5 if strong else 0.02, generator=generator)


def minicd_side(folder: str, precision: str, device: torch.device) -> tuple[Callable[..., Rows], nn.Module]:
    """A function (prompts, new tokens, stop ids) → completions, and its model.

    bf16 is run as the experiments run it.
    """
    model, _ = load(folder, device, DTYPES[precision])

    def write(prompts: Rows, new: int, stop: list[int]) -> Rows:
        end = stop[0] if stop else model.config.vocab_size  # the latter never comes
        model.config = replace(model.config, eos_token_id=end)
        return sampling.generate(model, prompts, new, temperature=0, stop=stop, batch_size=len(prompts),
                                 precision="auto" if precision == "bf16" else precision)
    return write, model


def transformers_side(folder: str, precision: str,
                      device: torch.device) -> tuple[Callable[..., Rows], nn.Module]:
    """The same with transformers: generate with its defaults and `how`; decoders are padded on the left."""
    hf = import_transformers()
    seq2seq = hf.AutoConfig.from_pretrained(folder).is_encoder_decoder
    kind = hf.AutoModelForSeq2SeqLM if seq2seq else hf.AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=DTYPES[precision]).to(device).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0

    @torch.no_grad()
    def write(prompts: Rows, new: int, stop: list[int], **how: Any) -> Rows:
        ids = sampling.pad(prompts, 0) if seq2seq else sampling.pad([row[::-1] for row in prompts], 0).flip(1)
        out = model.generate(input_ids=ids.to(device), attention_mask=(ids != 0).long().to(device),
                             max_new_tokens=new, do_sample=False, eos_token_id=stop or None, **how)
        rows, ends = out[:, 1 if seq2seq else ids.shape[1] :].tolist(), set(stop)
        return [row[: next((t for t, token in enumerate(row) if token in ends), new)] for row in rows]
    return write, model


SIDES = {"minicd": minicd_side, "transformers": transformers_side}


def work_of(case: Case, vocabulary: int) -> tuple[Rows, int, list[int]]:
    """The case's random prompts, how many tokens to write, and those that end a completion."""
    rng = random.Random(0)
    lengths = [rng.randint(*case.prompt) if isinstance(case.prompt, tuple) else case.prompt
               for _ in range(case.batch)]
    prompts = [[rng.randrange(FIRST, vocabulary) for _ in range(length)] for length in lengths]
    stop = rng.sample(range(FIRST, vocabulary), int(STOPS * vocabulary)) if case.stop else []
    return prompts, case.new, stop


def check(name: str, precision: str, vocabulary: int, minicd: Callable, transformers: Callable) -> None:
    """Raises ValueError where the sides write different tokens in fp32: in bf16, rounding is an excuse."""
    work = work_of(Case(16, (20, 60), 8), vocabulary)
    ours, theirs = minicd(*work), transformers(*work)
    same = sum(map(list.__eq__, ours, theirs)) / len(ours)
    print(f"{name}, {precision}: {same:.0%} of {len(ours)} short completions are equal", flush=True)
    if {len(row) for row in ours + theirs} != {8} or (precision == "fp32" and same < SAME):
        raise ValueError(f"{name}: these are two different models, or a row stopped early")


def measure(name: str, precision: str, case: Case, sides: dict[str, tuple[Callable, nn.Module]],
            arguments) -> dict[str, Any]:
    """Time one case, and what else is asked of it."""
    what, model = f"{name}, {precision}, {case}", sides["minicd"][1]
    work, tokens = work_of(case, model.config.vocab_size), case.batch * case.new
    calls = {side: partial(write, *work) for side, (write, _) in sides.items()}
    if case.stop:  # the token that ends a row is written, too
        tokens = sum(min(len(row) + 1, case.new) for row in calls["minicd"]())
    result = {"shape": name, "precision": precision, **case._asdict(), "tokens": tokens}
    result |= turns(what, tokens, arguments, **calls)
    if case.batch == 1:
        result |= bandwidth(step_bytes(model, precision), result["median"], arguments.copy_gbps)
    if arguments.device.type == "cuda":
        result["static"] = static(f"{what}, static", tokens, arguments, **calls)
        if arguments.memory:
            result["peak_mib"] = {side: cuda_peak(calls[side], model) for side, (_, model) in sides.items()}
    return result


def bandwidth(read: int, rates: dict[str, float], copy_gbps: float) -> dict[str, Any]:
    """How fast one row reads the weights, once for each token: this, and not arithmetic, bounds its speed."""
    gbps = {side: round(read * rate / 1e9, 2) for side, rate in rates.items()}
    share = {side: round(100 * rate / copy_gbps, 1) for side, rate in gbps.items()}
    print(f"    weights read, GB/s: {gbps}, % of a copy: {share}", flush=True)
    return {"step_bytes": read, "gbps": gbps, "percent_of_copy": share}


def static(what: str, tokens: int, arguments, minicd: Callable, transformers: Callable) -> dict[str, Any]:
    """minicd against transformers with its compiled static cache; if that fails, the error's first line."""
    theirs = partial(transformers, cache_implementation="static")
    try:
        return turns(what, tokens, arguments, minicd=minicd, static=theirs)
    except Exception as error:  # of many types: of compilers, of models that know no such cache
        line = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        print(f"    static cache: {line}", flush=True)
        return {"error": line}


def step_bytes(model: nn.Module, precision: str) -> int:
    """Bytes of weights that a decoding step reads: no encoder, one row of an embedding that is no head."""
    unread = ["encoder.", ".cross.kv.", "positions."]
    unread += [] if model.config.tie_word_embeddings else ["shared.", "tokens."]
    sizes = (p.numel() for name, p in model.named_parameters() if not any(part in name for part in unread))
    return DTYPES[precision].itemsize * sum(sizes)


def copy_speed(device: torch.device) -> float:
    """GB/s of a large copy, what is read plus what is written; the best of several."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    target, seconds = torch.empty_like(source), []
    wait = torch.cuda.synchronize if device.type == "cuda" else int
    for _ in range(10):
        wait()
        start, _, _ = time.perf_counter(), target.copy_(source), wait()
        seconds.append(time.perf_counter() - start)
    return round(2 * source.numel() * source.itemsize / min(seconds) / 1e9, 2)


def cuda_peak(call: Callable, model: nn.Module) -> int:
    """MiB at the peak of one call, with the weights of its own model but not the other's."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before + weight_bytes(model)) >> 20


def cpu_peak(side: str, folder: str, precision: str, case: Case) -> int:
    """The same on the CPU, in a process of its own, without what the libraries take."""
    write, model = SIDES[side](folder, precision, torch.device("cpu"))
    write(*work_of(Case(1, 4, 2), model.config.vocab_size))  # libraries load more at their first use
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    write(*work_of(case, model.config.vocab_size))
    return (resident("VmHWM") - before + weight_bytes(model)) >> 20


def resident(key: str) -> int:
    """Bytes, as Linux counts them."""
    return 1024 * int(re.search(rf"{key}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def weight_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def compare(name: str, precision: str, arguments) -> list[dict[str, Any]]:
    """All cases of one shape in one precision."""
    (config, cases), peaks = SHAPES[name], {}
    cases = [case for case in cases if not arguments.batch or case.batch in arguments.batch]
    if precision == "bf16":  # rounding makes rows stop at different places: two different amounts of work
        cases = [case for case in cases if not case.stop]
    with tempfile.TemporaryDirectory() as folder:
        write_folder(config, precision, folder)
        on_linux_cpu = arguments.device.type == "cpu" and Path("/proc/self/clear_refs").exists()
        if arguments.memory and cases and on_linux_cpu:
            for side in SIDES:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    peaks[side] = pool.submit(cpu_peak, side, folder, precision, cases[-1]).result()
            print(f"{name}, {precision}, {cases[-1]}: peak memory in MiB {peaks}", flush=True)
        sides = {side: load_side(folder, precision, arguments.device) for side, load_side in SIDES.items()}
    check(name, precision, config.vocab_size, *(write for write, _ in sides.values()))
    results = [measure(name, precision, case, sides, arguments) for case in cases]
    if peaks:
        results[-1]["peak_mib"] = peaks
    return results


def parse() -> Any:
    parser = Parser(__doc__.splitlines()[0])
    for flag, choices in (("--precision", list(DTYPES)), ("--shape", list(SHAPES))):
        parser.add_argument(flag, choices=choices, action="append", help="only this one")
    parser.add_argument("--batch", type=count, action="append", help="only the cases of this batch")
    parser.add_argument("--rounds", type=count, default=5, help="timed turns of each side")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True,
                        help="also measure peak memory")
    return parsed(parser, "bench-sampling")


def main() -> None:
    arguments, results = parse(), []
    version = import_transformers().__version__
    arguments.copy_gbps = copy_speed(arguments.device)
    print(f"{hardware(arguments.device)}; a copy runs at {arguments.copy_gbps:.1f} GB/s", flush=True)
    names = arguments.shape or [name for name in SHAPES if name != LARGE or arguments.device.type == "cuda"]
    both = isinstance(autocast(arguments.device), torch.autocast)  # bf16 is fast here
    for precision in arguments.precision or ["fp32", "bf16"][: 1 + both]:
        for name in names:
            results += compare(name, precision, arguments) if name != LARGE or precision == "bf16" else []
    if not results:
        raise ValueError("no case is of this shape, precision and batch")
    settings = {key: getattr(arguments, key) for key in ("rounds", "cpu_time", "batch")} | {"temperature": 0}
    settings["shapes"] = {name: asdict(SHAPES[name][0]) for name in names}
    publish(arguments.out, arguments.device, settings, results, copy_gbps=arguments.copy_gbps,
            transformers=version)
    wrong = [row["what"] for row in results if row["precision"] == "fp32" and row["same_completions"] < SAME]
    if wrong:
        raise ValueError(f"the two sides wrote different completions: {'; '.join(wrong)}")


if __name__ == "__main__":
    guarded(main)
