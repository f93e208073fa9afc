"""fit(): optimiser, precision, progress bar, checkpoint and resume. It knows no teachers and no contexts."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable, Protocol

import torch
from torch import Tensor, nn

from .runtime.checks import at_least_one
from .runtime.device import autocast, in_bf16
from .runtime.files import all_tensors, atomic_safetensors, open_safetensors
from .runtime.half import Working
from .runtime.lean import checkpointed_blocks, loss_per_token, micro_batches, rows_together
from .runtime.lora import adapters
from .runtime.muon import Muon
from .runtime.products import chosen_products, fastest
from .runtime.progress import bar
from .labels import Examples, LabelBatch
from .losses import check_labels, find_loss, mean_over_tokens, source

OPTIMISERS = ("adamw", "muon")
CHECK_EVERY = 20  # steps between checks of the loss, since each check waits for the device
ADVICE = "lower the learning rate or clip the gradient; a checkpoint would be from before that step"


@dataclass
class FitSettings:
    """How to train. The paper: AdamW, batch 16, weight decay 0, lr 1e-5 or 1e-4 (appendix B.3); it names no
    schedule and no clipping.
    """

    lr: float = 1e-5
    batch_size: int = 16
    warmup: float = 0.0  # share of the steps with a linearly growing learning rate
    decay: float = 0.0  # share of the steps, at the end, with a linearly falling one
    clip: float = 0.0  # largest gradient norm; 0: no clipping
    loss: str = "empirical"  # by its name in losses.py; on hard labels it is the plain cross-entropy
    jsd_beta: float = 0.5  # of the loss jsd
    dropout: float | None = None  # None: the model's own
    optimiser: str = "adamw"  # or muon: for the layers' matrices (Jordan et al., 2024), AdamW for the rest
    precision: str = "auto"  # auto, fp32, bf16, or bf16-weights, whose masters, which learn, are fp32
    lora_rank: int = 0  # of low-rank adapters on the layers' matrices, which alone learn; 0: everything does
    micro_batch: int = 0  # rows whose activations are in memory together; 0: all, on the CPU what is fastest
    checkpointing: bool = False  # compute each block's activations again in backward, to save memory

    def __post_init__(self):
        at_least_one(self, "batch_size")
        if self.lora_rank < 0 or self.micro_batch < 0:
            raise ValueError("lora_rank and micro_batch must be at least 0")
        if self.clip < 0:
            raise ValueError(f"clip {self.clip}: a negative norm would turn every gradient round")


class BatchSource(Protocol):
    """Batches by step number, so that a resumed run sees exactly what an uninterrupted one sees.

    If it has `tokens_per_batch`, the mean number of answer tokens, every token has the same weight. Else a
    batch's loss is the mean over its own tokens. With a `digest`, a run resumes only where that is equal.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, step: int) -> tuple[Tensor, LabelBatch]: ...


class Epochs:
    """Shuffled passes over examples, in batches of similar length, which saves most padding."""

    def __init__(self, examples: Examples, batch_size: int, epochs: float, seed: int, pad: int = 0):
        """`pad`: the padding of prompts, the model's `config.pad_token_id`.

        Raises ValueError without examples or with no epochs.
        """
        if not len(examples) or not epochs > 0:
            raise ValueError(f"{epochs} epochs of {len(examples)} examples are no training")
        self.examples, self.seed, self.pad = examples, seed, pad
        self.batch_size = min(batch_size, len(examples))
        self.per_epoch = len(examples) // self.batch_size
        self.steps = max(1, round(epochs * self.per_epoch))
        self.tokens_per_batch = self.batch_size * len(examples.answers.values) / len(examples)
        self.epoch, self.order, self.digest = -1, [], examples.digest

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, LabelBatch]:
        epoch, batch = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            self.epoch, self.order = epoch, length_buckets(self.examples, self.batch_size, generator)
        return self.examples.batch(self.order[batch], self.pad)


def length_buckets(examples: Examples, batch_size: int, generator: torch.Generator,
                   window: int = 16) -> list[Tensor]:
    """The rows in random order, in batches [batch_size] of similar length; an incomplete one is dropped.

    Rows are sorted among `window` batches only: this saves most padding, yet batches stay random.
    What a row costs grows with its prompt as with its answer, so both count alike.
    """
    order = torch.randperm(len(examples), generator=generator)
    order = order[: len(order) - len(order) % batch_size]
    size = (examples.prompts.lengths + examples.answers.lengths) * 1000 + examples.answers.lengths
    groups = [rows[size[rows].argsort(stable=True)] for rows in order.split(window * batch_size)]
    batches = torch.cat(groups).view(-1, batch_size)
    return list(batches[torch.randperm(len(batches), generator=generator)])


def learning_rate(step: int, steps: int, settings: FitSettings) -> float:
    """Linear warm-up, constant, linear decay to zero."""
    up = (step + 1) / max(1.0, settings.warmup * steps)
    down = (steps - step) / max(1.0, settings.decay * steps)
    return settings.lr * min(1.0, up, down)


class Run:
    """A training run that can stop and resume: model, optimisers, step, losses so far, random state."""

    def __init__(self, model: nn.Module, settings: FitSettings, steps: int, seed: int,
                 checkpoint: Path | None, tokens_per_batch: float | None = None, digest: int | None = None):
        self.model, self.settings, self.steps, self.checkpoint = model, settings, steps, checkpoint
        self.tokens_per_batch = tokens_per_batch
        self.working = Working(model, half=settings.precision == "bf16-weights")
        warn_of_half(model)
        self.optimisers = make_optimisers(model, settings)
        self.loss = find_loss(settings.loss, settings.jsd_beta)
        self.device = next(model.parameters()).device
        self.description = json.dumps({"settings": asdict(settings), "steps": steps, "seed": seed,
                                       "loss": source(settings.loss), "data": digest})
        self.step, self.history, self.saved = 0, [], time.monotonic()
        self.recent: list[Tensor] = []  # losses since the last mean in the history
        self.products: list[bool] | None = None  # measured in the first step, then kept: resume is exact
        torch.manual_seed(seed)
        if checkpoint and checkpoint.exists():
            self.load()

    def update(self, prompts: Tensor, labels: LabelBatch) -> Tensor:
        """One optimiser step; returns the batch's summed loss and its tokens, still on the device."""
        prompts, labels = prompts.to(self.device, non_blocking=True), labels.to(self.device)
        tokens = self.tokens_per_batch or labels.mask.sum().clamp(min=1)
        size = self.settings.micro_batch or rows_together(
            self.model.config, len(prompts), prompts.shape[1] + labels.tokens.shape[1], self.device)
        losses = [self.backward(*part, tokens) for part in micro_batches(prompts, labels, size)]
        self.optimise()
        return torch.stack([torch.stack(losses).sum(), labels.mask.sum()])

    def backward(self, prompts: Tensor, labels: LabelBatch, tokens: float | Tensor) -> Tensor:
        """Add the gradient of the loss on these rows, of a batch with so many tokens; returns its sum."""
        with autocast(self.device, self.settings.precision):
            if self.products is None:
                self.products = fastest(self.working.model, prompts.numel() + labels.tokens.numel())
        with chosen_products(self.working.model, self.products):
            with autocast(self.device, self.settings.precision):
                per_token = loss_per_token(self.working.model, prompts, labels, self.loss)
            loss = mean_over_tokens(per_token, labels.mask, tokens)
            loss.backward()
        self.working.hand_over()
        return loss.detach() * tokens

    def optimise(self) -> None:
        """Take one step with the gradients that are there."""
        if self.settings.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(self.step, self.steps, self.settings)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.working.follow()
        self.step += 1

    def tensors(self) -> dict[str, Tensor]:
        """All state as named tensors: the model's, the optimisers', the random generators'."""
        state = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for optimiser in self.optimisers:
                for kind, value in optimiser.state.get(parameter, {}).items():
                    state[f"optimiser.{kind}.{name}"] = value
        state["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            state["random.cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def save(self) -> None:
        """Write the checkpoint. Raises FloatingPointError and keeps the old one where `check` does."""
        self.check()
        recent = [step.tolist() for step in self.recent]
        metadata = {"run": self.description, "history": json.dumps([self.step, self.history, recent]),
                    "products": json.dumps(self.products)}
        atomic_safetensors(self.checkpoint, self.tensors(), metadata)
        self.saved = time.monotonic()

    def check(self) -> None:
        """Raises FloatingPointError where the latest losses or the weights are not finite."""
        if self.recent:
            finite_mean(self.recent, self.step)
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise FloatingPointError(f"step {self.step} made weights that are not finite; {ADVICE}")

    def load(self) -> None:
        """Resume from the checkpoint. Raises ValueError where it is damaged or another run's."""
        with open_safetensors(self.checkpoint, advice="delete it to train this stage anew") as file:
            metadata, state = file.metadata() or {}, all_tensors(file)
            if metadata.get("run") != self.description:
                raise ValueError(
                    f"{self.checkpoint} belongs to a run with other settings, data or loss "
                    f"({metadata.get('run')}); this one has {self.description}. Delete it to train this "
                    "stage anew")
            self.products = json.loads(metadata.get("products", "[]"))  # older files lack it
            if self.device.type != "cpu" or in_bf16(self.device, self.settings.precision):
                self.products = None  # they are of fp32 on a CPU, where the run may have begun
            self.restore(json.loads(metadata["history"]), state)

    def restore(self, progress: list, state: dict[str, Tensor]) -> None:
        """Take step, losses, weights, optimisers and random state from a checkpoint."""
        self.step, self.history, recent = progress
        self.recent = [torch.tensor(step, device=self.device) for step in recent]
        self.model.load_state_dict({n[6:]: v for n, v in state.items() if n.startswith("model.")})
        self.working.follow()
        for name, parameter in self.model.named_parameters():
            for optimiser in self.optimisers:
                if any(parameter is p for group in optimiser.param_groups for p in group["params"]):
                    optimiser.state[parameter] = {
                        key.split(".")[1]: value.to(self.device) for key, value in state.items()
                        if key.startswith("optimiser.") and key.split(".", 2)[2] == name}
        torch.set_rng_state(state["random.cpu"])
        if self.device.type == "cuda" and "random.cuda" in state:
            torch.cuda.set_rng_state(state["random.cuda"], self.device)


def make_optimisers(model: nn.Module, settings: FitSettings) -> list[torch.optim.Optimizer]:
    """AdamW without weight decay; or Muon for the matrices inside the layers and AdamW for the rest."""
    if settings.optimiser not in OPTIMISERS:
        raise ValueError(f"optimiser {settings.optimiser!r} is unknown; known: {', '.join(OPTIMISERS)}")
    muon = settings.optimiser == "muon"
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for name, p in learning.items() if muon and "blocks." in name and p.ndim == 2]
    inside = {id(p) for p in matrices}
    rest = [p for p in learning.values() if id(p) not in inside]
    optimisers: list = [torch.optim.AdamW(rest, lr=settings.lr, weight_decay=0.0, fused=True)] if rest else []
    if matrices:  # Muon is scaled so that one learning rate suits both
        optimisers.append(Muon(matrices, lr=settings.lr))
    return optimisers


def warn_of_half(model: nn.Module) -> None:
    """Warns where weights that learn are of half precision."""
    if any(p.requires_grad and p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()):
        warnings.warn("weights of half precision are trained: most steps are too small for them to tell. "
                      "Load the model in fp32, or train with precision='bf16-weights'")


def finite_mean(losses: list[Tensor], last_step: int) -> float:
    """The mean over the tokens of the latest steps, each [summed loss, tokens].

    Raises FloatingPointError, naming the first step that is not finite.
    """
    sums, tokens = torch.stack(losses).cpu().double().T
    bad = (~sums.isfinite()).nonzero()
    if len(bad):
        raise FloatingPointError(f"the loss at step {last_step - len(losses) + 1 + int(bad[0])} is "
                                 f"{(sums / tokens)[bad[0, 0]].item()}; {ADVICE}")
    return (sums.sum() / tokens.sum().clamp(min=1)).item()


def fit(model: nn.Module, batches: BatchSource, settings: FitSettings, *, seed: int = 0,
        name: str = "training", checkpoint: Path | None = None, save_every: float = 30.0,
        evaluate: Callable[[int], None] | None = None) -> list[float]:
    """Minimise the mean answer-token loss, in place; returns its mean over every CHECK_EVERY steps.

    The last mean is over the steps that are left. All are in nats, though `empirical` has its least at the
    label's entropy instead of 0.
    With `checkpoint`, the state is written there every `save_every` seconds, and a rerun after Ctrl-C or a
    kill resumes from it, on the CPU bit for bit as if it had never stopped. (Two runs in fp32 may differ in
    rounding, since large layers measure at first which product is faster. On CUDA attention adds gradients up
    in no fixed order, so there two runs are never quite equal.) `evaluate(step)` is called
    every CHECK_EVERY steps and at the last.
    Raises FloatingPointError on a non-finite loss, ValueError for a damaged or another run's checkpoint.
    """
    if kind := getattr(batches, "label_kind", None):
        check_labels(settings.loss, kind)
    set_dropout(model, settings.dropout)
    with adapters(model, settings.lora_rank, seed), checkpointed_blocks(model, settings.checkpointing):
        run = Run(model.train(), settings, len(batches), seed, checkpoint,
                  getattr(batches, "tokens_per_batch", None), getattr(batches, "digest", None))
        take_steps(run, batches, name, save_every, evaluate)
    model.eval()
    return run.history


def take_steps(run: Run, batches: BatchSource, name: str, save_every: float,
               evaluate: Callable[[int], None] | None) -> None:
    """The steps of `fit`."""
    with bar(run.steps, name, "step", initial=run.step) as shown:
        while run.step < run.steps:
            run.recent.append(run.update(*batches[run.step]))
            shown.update()
            done = run.step == run.steps
            if run.step % CHECK_EVERY == 0 or done:
                run.history.append(finite_mean(run.recent, run.step))
                run.recent.clear()
                shown.set_postfix(loss=f"{run.history[-1]:.4f}", refresh=False)
                if evaluate:
                    evaluate(run.step)
            if run.checkpoint and (done or time.monotonic() - run.saved > save_every):
                run.save()
    if not run.checkpoint:  # else the last one has been checked
        run.check()


def set_dropout(model: nn.Module, rate: float | None) -> None:
    """Set the rate of every dropout layer; None leaves them unchanged."""
    for module in model.modules():
        if isinstance(module, nn.Dropout) and rate is not None:
            module.p = rate
