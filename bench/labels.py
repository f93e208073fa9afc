"""What soft labels cost and how exact they are: bytes stored, memory, time and gradient error of a loss.

    OMP_NUM_THREADS=1 python -m bench.labels   # from the repository's root; 2 minutes on a CPU core, 2 GB
    pip install matplotlib                     # only for the plot
    python -m bench.labels --vocabulary 32128 --out /tmp/one.json

The teacher is made up: the tokens of a position, in random order, have the logits −s log(rank) + N(0, 1),
Zipf's law with noise. Each position draws s log-uniformly from 1 to 10: some positions are nearly flat (about
7 nats), some all but certain, most in between (the record has the quantiles of the entropy). The student's
logits are the teacher's + N(0, 1).

Peak memory: the label or dense target, and what a forward and backward pass of the loss allocates on top of
the logits. The gradient g is with respect to the student's logits; with the whole distribution q as the label
it is p − q. The relative error ‖g − (p − q)‖ / ‖p − q‖ is that of all positions as one vector ("whole"), or
the average over positions ("position"). For N samples E‖g − (p − q)‖² = (1 − Σ q²) / N, hence "expected". The
expected average is an upper bound, since it consists of root mean squares. Much of it comes from positions
that the student already knows, where ‖p − q‖ is nearly 0.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Callable

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from bench.common import Parser, count, guarded, parsed, png, publish, seed_number
from minicd.distill import PracticeSettings, soft_labels
from minicd.labels import Examples, LabelBatch, Ragged, SoftLabels
from minicd.losses import LOSSES, label_kind, mean_over_tokens

NAMES = {32128: "T5", 151936: "Qwen3"}  # the default vocabularies, and models that have them
SHAPE = (4, 32)  # answers and their tokens
EXPONENTS = (1.0, 10.0)
SAMPLES, TOPS = (1, 10, 100, 1000), (1, 4, 16, 64, 256)
KINDS = ("sampled", "top", "exact")  # of a stored label
CURVES = (("sampled", "o", "N samples"), ("top", "s", "k likeliest tokens and the tail"))  # of the plot
MIB = 2**20


def draw(vocabulary: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Logits of teacher and student, [positions, V] each."""
    how = {"generator": generator, "device": generator.device}
    positions, (low, high) = SHAPE[0] * SHAPE[1], EXPONENTS
    exponent = low * (high / low) ** torch.rand(positions, 1, **how)
    shift = torch.randint(vocabulary, (positions, 1), **how)  # faster than a permutation for every position
    rank = (torch.randperm(vocabulary, **how) + shift) % vocabulary
    teacher = torch.randn(positions, vocabulary, **how) - exponent * (rank + 1).log()
    return teacher, teacher + torch.randn(teacher.shape, **how)


def batch(labels: SoftLabels, tokens: Tensor) -> LabelBatch:
    """Labels of the positions in order, as the losses take them, for tokens [B, T]."""
    mask = torch.ones(tokens.shape, dtype=torch.bool)
    ids, weights = labels.gather(torch.arange(tokens.numel()).view(tokens.shape), mask)
    return LabelBatch(tokens, ids, weights, mask).to(tokens.device)


def entropy(teacher: Tensor, student: Tensor) -> dict[str, Any]:
    """How peaked the made-up teacher is, and how far the student is from it, in nats."""
    q, p = teacher.log_softmax(-1), student.log_softmax(-1)
    values = -(q.exp() * q).sum(-1)
    quantiles = {f"{x:.0%}": round(values.quantile(x).item(), 4) for x in (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)}
    return {"entropy": round(values.mean().item(), 4), "entropy_quantiles": quantiles,
            "likeliest": round(q.amax(-1).exp().mean().item(), 4),
            "student_kl": round((q.exp() * (q - p)).sum(-1).mean().item(), 4)}


def stored(labels: SoftLabels) -> float:
    """Bytes of a token's label in the file of a practice set."""
    positions = len(labels.ids)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "practice.safetensors"
        Examples(Ragged.of([[]]), Ragged.of([[0] * positions]), labels).save(path)
        size = sum(tensor.nbytes for name, tensor in load_file(path).items() if name.startswith("labels."))
    return round(size / positions, 1)


def sparse(name: str, made: dict[str, SoftLabels], tokens: Tensor) -> tuple[Callable, int]:
    """A loss of losses.py with its label: a function of the logits [B, T, V], and the bytes of the label."""
    hard = SoftLabels.one_hot(tokens.flatten().cpu())
    labels = batch(hard if name == "hard" else made[label_kind(name)], tokens)
    size = sum(tensor.nbytes for tensor in vars(labels).values())
    return lambda z: mean_over_tokens(LOSSES[name](z, labels), labels.mask), size


def dense(name: str, teacher: Tensor) -> tuple[Callable, int]:
    """The same with PyTorch's own loss of a dense target [B, T, V]."""
    target = teacher.softmax(-1)
    if name == "dense CE":
        return lambda z: F.cross_entropy(z.flatten(0, 1), target), target.nbytes
    return lambda z: F.kl_div(z.flatten(0, 1).log_softmax(-1), target, reduction="batchmean"), target.nbytes


def costs(teacher: Tensor, student: Tensor, made: dict[str, SoftLabels],
          arguments) -> dict[str, dict[str, float]]:
    """Peak memory and time of a forward and backward pass of every loss, on the same logits."""
    z = student.view(*SHAPE, -1).requires_grad_()
    tokens = torch.multinomial(teacher.softmax(-1), 1).view(SHAPE)
    makers = {name: partial(dense, name, teacher) for name in ("dense KL", "dense CE")}
    makers |= {name: partial(sparse, name, made, tokens) for name in LOSSES}
    found = {}
    for name, make in makers.items():
        loss, held = make()
        step = partial(forward_and_backward, loss, z)
        seconds = timed(step, arguments)
        allocated = (cuda_peak if z.is_cuda else cpu_peak)(step)
        found[name] = {"peak_mib": round((held + allocated) / MIB, 2), "label_mib": round(held / MIB, 2),
                       "copies": round((held + allocated) / z.nbytes, 2), "ms": round(1000 * seconds, 1)}
        print(f"    {name:9} peak {found[name]['peak_mib']:8.1f} MiB, {found[name]['copies']:5.2f} times "
              f"the logits, {found[name]['ms']:7.1f} ms", flush=True)
    return found


def forward_and_backward(loss: Callable, z: Tensor) -> None:
    torch.autograd.grad(loss(z), z)


def timed(call: Callable, arguments) -> float:
    """Median seconds of a call, after an untimed one."""
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    wait, seconds = torch.cuda.synchronize if arguments.device.type == "cuda" else int, []
    for _ in range(arguments.rounds + 1):
        wait()
        start, _, _ = clock(), call(), wait()
        seconds.append(clock() - start)
    return statistics.median(seconds[1:])


def cpu_peak(call: Callable) -> int:
    """The most bytes out of PyTorch's allocator at a time, kernels' own use included."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler announces every start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return max(accumulate(size for _, size in changes))


def cuda_peak(call: Callable) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def gradient(loss: str, logits: Tensor, labels: SoftLabels) -> Tensor:
    """Of the loss, summed over positions, with respect to logits [positions, V]."""
    z = logits[None].detach().requires_grad_()
    tokens = torch.zeros(z.shape[:2], dtype=torch.long, device=z.device)  # unused by these losses
    return torch.autograd.grad(LOSSES[loss](z, batch(labels, tokens)).sum(), z)[0][0]


def relative(error: Tensor, length: Tensor) -> dict[str, float]:
    """‖error‖² and ‖p − q‖² of the positions → the relative error of one long vector, and the average one."""
    return {"whole": (error.sum() / length.sum()).sqrt().item(),
            "position": (error / length).sqrt().mean().item()}


def errors(vocabulary: int, seed: int, device: torch.device) -> dict[tuple[str, int], dict[str, float]]:
    """Relative errors of the gradient for one seed, by kind and size of the label."""
    generator = torch.Generator(device).manual_seed(seed)
    teacher, z = draw(vocabulary, generator)
    q = teacher.softmax(-1)
    exact = z.softmax(-1) - q
    length, noise = exact.square().sum(-1), (1 - q.square().sum(-1)).clamp(min=0)

    def found(loss: str, labels: SoftLabels) -> dict[str, float]:
        return relative((gradient(loss, z, labels) - exact).square().sum(-1), length)
    result = {}
    for n in SAMPLES:
        expected = {f"expected_{key}": value for key, value in relative(noise / n, length).items()}
        result["sampled", n] = found("empirical", SoftLabels.sample(teacher, n, generator)) | expected
    result |= {("top", k): found("topk", SoftLabels.top(teacher, k)) for k in TOPS if k < vocabulary}
    return result | {("exact", 0): found("exact", SoftLabels.top(teacher))}


def gradients(vocabulary: int, arguments) -> list[dict[str, Any]]:
    """The errors of all seeds, with mean and spread, one row a label."""
    seeds = [errors(vocabulary, seed, arguments.device) for seed in arguments.seeds]
    rows = [{"label": kind, "size": size}
            | {key: spread([seed[kind, size][key] for seed in seeds]) for key in figures}
            for (kind, size), figures in seeds[0].items()]
    for row in rows:
        print(f"    {row['label']:8}{row['size'] or '':5}" + "".join(
            f"  {key} {row[key]['mean']:<8.3g}" for key in row if key not in ("label", "size")), flush=True)
    return rows


def spread(values: list[float]) -> dict[str, Any]:
    """Mean and sample standard deviation, to four digits: these errors are of very different sizes."""
    std = digits(statistics.stdev(values)) if len(values) > 1 else None
    return {"values": list(map(digits, values)), "mean": digits(statistics.mean(values)), "std": std}


def digits(value: float) -> float:
    return float(f"{value:.4g}")


def measure(vocabulary: int, arguments) -> dict[str, Any]:
    """All figures of one vocabulary."""
    print(f"vocabulary {vocabulary:,}", flush=True)
    generator = torch.Generator(arguments.device).manual_seed(arguments.seeds[0])
    teacher, student = draw(vocabulary, generator)
    result = {"vocabulary": vocabulary, "model": NAMES.get(vocabulary, "")} | entropy(teacher, student)
    made = {kind: soft_labels(teacher, PracticeSettings(labels=kind), generator) for kind in KINDS}
    result["bytes"] = {"dense": 4.0 * vocabulary} | {kind: stored(labels) for kind, labels in made.items()}
    print(f"    bytes a label: {result['bytes']}", flush=True)
    result["losses"] = costs(teacher, student, made, arguments)
    del teacher, student, made
    return result | {"gradient": gradients(vocabulary, arguments)}


def plot(results: list[dict[str, Any]], path: Path) -> bool:
    """The gradient's relative error by the size of the label. Whether it could be drawn."""
    def draw(axes) -> None:
        for i, result in enumerate(results):
            for kind, marker, title in CURVES:
                rows = [row for row in result["gradient"] if row["label"] == kind]
                curve(axes, rows, title, result["vocabulary"], marker=marker, color=f"C{i}",
                      markerfacecolor=f"C{i}" if kind == "sampled" else "white")
        axes.set(xscale="log", yscale="log", xlabel="samples N, or tokens k",
                 ylabel="relative error of the gradient")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return png(path, (5.5, 3.5), draw)


def curve(axes, rows: list[dict[str, Any]], title: str, vocabulary: int, **how: Any) -> None:
    """One line with the seeds' standard deviation; dotted: what is expected of samples."""
    sizes = [row["size"] for row in rows]
    whole = [row["whole"] for row in rows]
    axes.errorbar(sizes, [w["mean"] for w in whole], yerr=[w["std"] or 0.0 for w in whole], capsize=3,
                  linewidth=1, label=f"{title}, vocabulary {vocabulary:,}", **how)
    if rows and "expected_whole" in rows[0]:
        axes.plot(sizes, [row["expected_whole"]["mean"] for row in rows], ":", color=how["color"])


def parse() -> Any:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=count, action="append", help="only this size; may be repeated")
    parser.add_argument("--seeds", type=seed_number, nargs="+", default=[0, 1, 2],
                        help="of the gradient's error")
    parser.add_argument("--rounds", type=count, default=3, help="timed passes of each loss")
    return parsed(parser, "bench-labels", out="the record; beside it the plot")


def main() -> None:
    arguments, start = parse(), time.monotonic()
    results = [measure(vocabulary, arguments) for vocabulary in arguments.vocabulary or NAMES]
    drawn = plot(results, arguments.out.with_suffix(".png"))
    practice = PracticeSettings()
    settings = {"shape": SHAPE, "exponents": EXPONENTS, "samples": practice.label_samples,
                "top": practice.label_top, "rounds": arguments.rounds, "cpu_time": arguments.cpu_time}
    publish(arguments.out, arguments.device, settings, results, seeds=arguments.seeds, plot=drawn,
            minutes=round((time.monotonic() - start) / 60, 2))


if __name__ == "__main__":
    guarded(main)
