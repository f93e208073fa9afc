"""Decoding speed: minicd.generate against Hugging Face transformers' generate, same weights and same prompts, greedy.

    pip install transformers                            # needed by this benchmark only
    python -m bench.sampling                            # from the repository's root; about 12 minutes on 2 CPU cores
    python -m bench.sampling --shape "GPT-2 small" --precision bf16 --batch 16 --out /tmp/one.json

Both sides load the same folder of random weights, in the same type, and first have to write the same tokens. They take turns
in one process; a figure is the median over the rounds, after one untimed turn each. Tokens per second are the tokens written
÷ the seconds of the whole call, so that reading the prompts counts. On CUDA, transformers' compiled static cache is a third side.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace as Shape
from typing import Any, Callable, NamedTuple
from unittest import mock

import torch
from torch import nn

from bench.parity import import_transformers
from bench.train import SMALL, turns
from minicd import sampling
from minicd.checkpoint import load, save
from minicd.commands import Parser, count, guarded
from minicd.device import autocast, hardware, pick_device
from minicd.experiment import COMMIT, ROOT, command_line
from minicd.families import build, read_config
from minicd.files import atomic_json
from minicd.t5 import T5, initialise
from minicd.tokenizer import word_tokenizer

FIRST = 3  # the lowest token id that stands for text: below are padding, stop and unknown
MIXED = (20, 200)  # a prompt of one of these lengths, or any between them
SAME = 0.9  # the least share of equal completions in fp32; a tie may go either way
CHECK_NEW = 8  # tokens written for the check before the first turn
STOPS = 1 / 32  # of the vocabulary end a completion, in the cases with a stop rule
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Rows = list[list[int]]


class Case(NamedTuple):
    """One call of generate. `stop` False: every row writes `new` tokens; True: rows end at different times, after at most that."""

    batch: int
    prompt: int | tuple[int, int]
    new: int
    stop: bool = False

    def __str__(self) -> str:
        prompt = "–".join(map(str, self.prompt)) if isinstance(self.prompt, tuple) else self.prompt
        return f"{self.batch} × {prompt} → {'up to ' * self.stop}{self.new}"


def llama(**fields: Any) -> Any:
    return read_config(dict(architectures=["LlamaForCausalLM"], model_type="llama", rms_norm_eps=1e-5, eos_token_id=1, bos_token_id=2,
                            **fields))


GPT2 = read_config(dict(architectures=["GPT2LMHeadModel"], model_type="gpt2", vocab_size=50257, n_positions=1024, n_embd=768,
                        n_layer=12, n_head=12, eos_token_id=1, bos_token_id=2))
LLAMA_260K = llama(hidden_size=64, intermediate_size=172, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=4,
                   vocab_size=512, max_position_embeddings=512, tie_word_embeddings=True)
LLAMA_1B = llama(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
                 vocab_size=32000, max_position_embeddings=2048, tie_word_embeddings=False)
# A model, its precisions, and the calls to time; a large one needs --shape on the CPU. Memory is measured in the last case.
SHAPES = {
    "T5-small v1.1": Shape(config=SMALL, large=False, precisions=["fp32", "bf16"], cases=[
        Case(1, 32, 32), Case(16, 32, 32), Case(64, 32, 32), Case(64, 32, 64, stop=True), Case(64, MIXED, 64), Case(256, 32, 32)]),
    "GPT-2 small": Shape(config=GPT2, large=False, precisions=["fp32", "bf16"], cases=[
        Case(1, 32, 32), Case(16, 32, 32), Case(64, MIXED, 32)]),
    "260K Llama": Shape(config=LLAMA_260K, large=False, precisions=["fp32", "bf16"], cases=[
        Case(1, 32, 128), Case(64, 32, 128), Case(256, MIXED, 200, stop=True), Case(256, MIXED, 200)]),
    "1B Llama": Shape(config=LLAMA_1B, large=True, precisions=["bf16"], cases=[
        Case(1, 32, 128), Case(16, 32, 128), Case(64, MIXED, 200), Case(256, MIXED, 200)]),
}


@torch.no_grad()
def write(shape: Shape, precision: str, folder: str) -> None:
    """A folder of random weights, already rounded to the precision, so that both sides compute with the same numbers."""
    model = build(shape.config)
    if isinstance(model, T5):
        initialise(model, 0)
    else:
        generator = torch.Generator().manual_seed(0)
        for matrix in (p for p in model.blocks.parameters() if p.ndim == 2):
            matrix.normal_(0.0, matrix.shape[1] ** -0.5, generator=generator)
        for table in (p for name, p in model.named_parameters() if p.ndim == 2 and not name.startswith("blocks")):
            table.normal_(0.0, 0.02, generator=generator)
    save(model.to(DTYPES[precision]), word_tokenizer(["word"]), folder)


def load_ours(folder: str, precision: str, device: torch.device) -> nn.Module:
    model, _ = load(folder, device, DTYPES[precision])
    model.config = replace(model.config, eos_token_id=model.config.vocab_size)  # no such token: no row stops by itself
    return model


def load_theirs(folder: str, precision: str, device: torch.device) -> Any:
    hf = import_transformers()
    kind = hf.AutoConfig.from_pretrained(folder).is_encoder_decoder
    model = (hf.AutoModelForSeq2SeqLM if kind else hf.AutoModelForCausalLM).from_pretrained(folder, dtype=DTYPES[precision])
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.to(device).eval()


def ours_writes(model: nn.Module, precision: str, prompts: Rows, new: int, stop: list[int]) -> Rows:
    """bf16 is left to what generate does by itself on this device."""
    with mock.patch.object(sampling, "autocast", partial(autocast, precision="fp32" if precision == "fp32" else "auto")):
        return sampling.generate(model, prompts, new, 0, stop=stop, batch_size=len(prompts))


@torch.no_grad()
def theirs_writes(model: Any, prompts: Rows, new: int, stop: list[int], **how: Any) -> Rows:
    """transformers' generate with its defaults. A decoder's prompts are padded on the left, as it wants them."""
    if model.config.is_encoder_decoder:
        ids, skip = sampling.pad(prompts, 0), 1
    else:
        ids = sampling.pad([row[::-1] for row in prompts], 0).flip(1)
        skip = ids.shape[1]
    ids = ids.to(model.device)
    out = model.generate(input_ids=ids, attention_mask=(ids != 0).long(), max_new_tokens=new, do_sample=False,
                         eos_token_id=stop or None, **how)
    ends = set(stop)
    return [row[: next((t for t, token in enumerate(row) if token in ends), new)] for row in out[:, skip:].tolist()]


def work_of(case: Case, vocabulary: int) -> tuple[Rows, int, list[int]]:
    """The case's random prompts, how many tokens to write, and those that end a completion."""
    rng = random.Random(0)
    lengths = [rng.randint(*case.prompt) if isinstance(case.prompt, tuple) else case.prompt for _ in range(case.batch)]
    prompts = [[rng.randrange(FIRST, vocabulary) for _ in range(length)] for length in lengths]
    return prompts, case.new, rng.sample(range(FIRST, vocabulary), int(STOPS * vocabulary)) if case.stop else []


def check(name: str, ours: nn.Module, theirs: Any, precision: str) -> float:
    """The share of equal short completions. Raises ValueError where it is too small in fp32, where rounding is no excuse."""
    work = work_of(Case(16, (20, 60), CHECK_NEW), ours.config.vocab_size)
    completions = ours_writes(ours, precision, *work), theirs_writes(theirs, *work)
    if any(len(row) != CHECK_NEW for rows in completions for row in rows):
        raise ValueError(f"{name}, {precision}: a row stopped before its {CHECK_NEW} tokens")
    same = statistics.mean(map(list.__eq__, *completions))
    distinct = len({token for row in completions[0] for token in row})
    print(f"{name}, {precision}: {same:.0%} of {len(work[0])} short completions equal, {distinct} different tokens", flush=True)
    if precision == "fp32" and same < SAME:
        raise ValueError(f"{name}: these are two different models, only {same:.0%} of their completions are equal")
    return same


def measure(name: str, case: Case, ours: nn.Module, theirs: Any, precision: str, arguments) -> dict[str, Any]:
    """Time one case, and what else is asked of it."""
    what, work = f"{name}, {precision}, {case}", work_of(case, ours.config.vocab_size)
    sides = {"minicd": partial(ours_writes, ours, precision, *work), "transformers": partial(theirs_writes, theirs, *work)}
    tokens = case.batch * case.new
    if case.stop:  # the token that ends a row is written, too
        tokens = sum(min(len(row) + 1, case.new) for row in sides["minicd"]())
    result = turns(what, tokens, arguments, **sides)
    result |= {"shape": name, "precision": precision, "batch": case.batch, "prompt": case.prompt, "new": case.new, "stop": case.stop,
               "tokens": tokens}
    if case.batch == 1:
        read = step_bytes(ours, precision)
        result |= {"step_bytes": read, "gbps": {side: round(read * rate / 1e9, 2) for side, rate in result["median"].items()}}
        result["share_of_copy"] = {side: round(100 * rate / arguments.copy_gbps, 1) for side, rate in result["gbps"].items()}
        print("    weights read: " + ", ".join(f"{side} {result['gbps'][side]:.1f} GB/s, {share:.0f} % of a copy"
                                               for side, share in result["share_of_copy"].items()), flush=True)
    if arguments.device.type == "cuda":
        result["static"] = static(what, tokens, arguments, sides["minicd"], partial(sides["transformers"], cache_implementation="static"))
        if arguments.memory:
            result["peak_mib"] = {side: cuda_peak(run, model) for (side, run), model in zip(sides.items(), (ours, theirs))}
    return result


def static(what: str, tokens: int, arguments, ours: Callable, theirs: Callable) -> dict[str, Any]:
    """minicd against transformers with the static cache, which it compiles; where that fails, the error's first line."""
    try:
        return turns(f"{what}, static", tokens, arguments, minicd=ours, transformers_static=theirs)
    except Exception as error:  # of many types: of compilers, of models that know no such cache
        print(f"    static cache: {first_line(error)}", flush=True)
        return {"error": first_line(error)}


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def step_bytes(model: nn.Module, precision: str) -> int:
    """Bytes of the weights that every decoding step must read; of an embedding that is no head, or of positions, it reads a row."""
    unread = ["encoder.", ".cross.kv.", "positions."] + ([] if model.config.tie_word_embeddings else ["shared.", "tokens."])
    return DTYPES[precision].itemsize * sum(p.numel() for name, p in model.named_parameters() if not any(u in name for u in unread))


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


def cuda_peak(run: Callable, model: nn.Module) -> int:
    """MiB of one call, with the weights of its own model but not the other's."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before + weight_bytes(model)) >> 20


def weight_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def cpu_peaks(name: str, case: Case, precision: str, folder: str) -> dict[str, Any]:
    """The same on the CPU, where only a process of its own tells one side's memory from the other's."""
    peaks = {}
    for side in ("minicd", "transformers"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            peaks[side] = pool.submit(probe, side, case, precision, folder).result()
    print(f"{name}, {precision}, {case}: peak memory " + ", ".join(f"{side} {mib} MiB" for side, mib in peaks.items()), flush=True)
    return {"shape": name, "precision": precision, "case": str(case), "peak_mib": peaks}


def probe(side: str, case: Case, precision: str, folder: str) -> int:
    """In a fresh process: MiB at the peak of one call, with the weights but without the libraries."""
    model = (load_ours if side == "minicd" else load_theirs)(folder, precision, torch.device("cpu"))
    run = partial(ours_writes, model, precision) if side == "minicd" else partial(theirs_writes, model)
    vocabulary = model.config.vocab_size
    run(*work_of(Case(1, 4, 2), vocabulary))  # loads what the libraries load at their first use
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    run(*work_of(case, vocabulary))
    return (resident("VmHWM") - before >> 10) + (weight_bytes(model) >> 20)


def resident(key: str) -> int:
    """KiB, as Linux counts them."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))


def compare(name: str, shape: Shape, precision: str, arguments) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All cases of one shape in one precision: their times, and the memory of the last one."""
    cases = [case for case in shape.cases if case.batch in (arguments.batch or [case.batch])]
    # Where rounding differs, rows would stop at different places: two different amounts of work.
    cases = [case for case in cases if precision == "fp32" or not case.stop]
    if not cases:
        return [], []
    with tempfile.TemporaryDirectory() as folder:
        write(shape, precision, folder)
        memory = []
        if arguments.memory and arguments.device.type == "cpu" and Path("/proc/self/clear_refs").exists():
            memory = [cpu_peaks(name, cases[-1], precision, folder)]
        ours, theirs = (read(folder, precision, arguments.device) for read in (load_ours, load_theirs))
    check(name, ours, theirs, precision)
    return [measure(name, case, ours, theirs, precision, arguments) for case in cases], memory


def parse() -> Any:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    for flag, choices in (("--precision", list(DTYPES)), ("--shape", list(SHAPES))):
        parser.add_argument(flag, choices=choices, action="append", help="only this one")
    parser.add_argument("--batch", type=count, action="append", help="only the cases of this batch")
    parser.add_argument("--rounds", type=count, default=5, help="timed turns of each side")
    parser.add_argument("--cpu-time", action="store_true", help="count processor seconds: for a machine busy with other work")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="also measure peak memory")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench-sampling.json", help="the record")
    arguments = parser.parse_args()
    arguments.device = pick_device(arguments.device)
    return arguments


def main() -> None:
    arguments = parse()
    import_transformers()
    arguments.copy_gbps = copy_speed(arguments.device)
    print(f"{hardware(arguments.device)}, {torch.get_num_threads()} threads, a copy at {arguments.copy_gbps:.1f} GB/s", flush=True)
    names = arguments.shape or [name for name, shape in SHAPES.items() if arguments.device.type == "cuda" or not shape.large]
    results, memory = [], []
    for precision in arguments.precision or ["fp32", "bf16"][: 1 + isinstance(autocast(arguments.device), torch.autocast)]:
        for name in names:
            if precision in SHAPES[name].precisions:
                rows, peaks = compare(name, SHAPES[name], precision, arguments)
                results, memory = results + rows, memory + peaks
    publish(results, memory, names, arguments)
    wrong = [row["what"] for row in results if row["precision"] == "fp32" and row["same_completions"] < SAME]
    if wrong:
        raise ValueError(f"the two sides wrote different completions: {'; '.join(wrong)}")


def publish(results: list, memory: list, names: list[str], arguments) -> None:
    settings = {key: getattr(arguments, key) for key in ("rounds", "cpu_time", "batch")} | {"temperature": 0}
    settings["shapes"] = {name: {"config": asdict(SHAPES[name].config), "cases": list(map(str, SHAPES[name].cases))} for name in names}
    atomic_json(arguments.out, {
        "task": "bench", "scale": arguments.out.stem.removeprefix("bench-"), "commit": COMMIT, "command": command_line(),
        "hardware": hardware(arguments.device), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "transformers": sys.modules["transformers"].__version__, "copy_gbps": arguments.copy_gbps, "settings": settings,
        "results": results, "memory": memory})


if __name__ == "__main__":
    guarded(main)
