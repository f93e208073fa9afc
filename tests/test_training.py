"""fit(): it learns, and a run that was stopped anywhere ends bit for bit where an unbroken one ends."""

import collections
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import tiny_decoder, tiny_t5
from safetensors.torch import load_file

from minicd.labels import Examples, Ragged, SoftLabels
from minicd.losses import LOSSES, empirical, jsd
from minicd.runtime.muon import Muon
from minicd.training import CHECK_EVERY, Epochs, FitSettings, Run, fit, learning_rate, length_buckets

STEPS = 3 * CHECK_EVERY + 10


def settings(**changes) -> FitSettings:
    return FitSettings(**{"lr": 3e-3, "batch_size": 8, "precision": "fp32", **changes})


def toy_examples(n: int = 64, seed: int = 0) -> Examples:
    """Copy one to five symbols."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(2, 16, (1 + i % 5,), generator=generator).tolist() + [1] for i in range(n)]
    return Examples.hard(rows, rows)


class Batches:
    """Batches of toy examples that note which steps were asked for and call `before(step)` first."""

    def __init__(self, steps: int = STEPS, before=lambda step: None):
        self.inner, self.steps, self.before, self.asked = Epochs(toy_examples(), 8, 100, seed=0), steps, before, []

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int):
        self.before(step)
        self.asked.append(step)
        return self.inner[step]


def interrupted_at(step: int) -> Batches:
    def before(now: int) -> None:
        if now == step:
            raise KeyboardInterrupt
    return Batches(before=before)


def starting_model():
    return tiny_t5(dropout_rate=0.1)


def same_weights(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize("changes", [{}, {"optimiser": "muon"}, {"precision": "bf16"},
                                     {"warmup": 0.1, "decay": 0.3, "clip": 1.0, "loss": "empirical"}])
def test_fit_lowers_the_loss(changes):
    model = tiny_t5()
    history = fit(model, Batches(), settings(**changes))
    assert len(history) == 4  # after steps 20, 40, 60 and 70
    assert history[-1] < 0.75 * history[0], history
    assert not model.training


def test_history_is_the_mean_loss_since_the_last_look():
    """With a learning rate of nothing and one batch again and again, every entry is that batch's loss."""
    model = tiny_t5()
    batch = toy_examples().batch(torch.arange(8))
    with torch.no_grad():
        z = model(batch[0], batch[1].tokens).log_softmax(-1)
    own = -z.gather(-1, batch[1].tokens[..., None])[..., 0]
    history = fit(model, [batch] * (CHECK_EVERY + 1), settings(lr=0.0))
    assert history == pytest.approx([own[batch[1].mask].mean().item()] * 2, abs=1e-5)


def test_the_seed_decides_the_run():
    """Dropout is the only randomness inside fit."""
    runs = []
    for seed in (1, 1, 2):
        model = starting_model()
        runs.append((fit(model, Batches(CHECK_EVERY), settings(), seed=seed), model))
    assert runs[0][0] == runs[1][0] and same_weights(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]


def test_dropout_setting():
    def history(rate):
        return fit(starting_model(), Batches(CHECK_EVERY), settings(dropout=rate))
    assert history(None) == history(0.1) != history(0.0)


def test_the_share_of_jsd_reaches_the_loss():
    run = Run(starting_model(), settings(loss="jsd", jsd_beta=0.1), 1, 0, None)
    generator = torch.Generator().manual_seed(0)
    taught = SoftLabels.top(torch.randn(3, 16, generator=generator))
    _, labels = Examples(Ragged.of([[1], [2]]), Ragged.of([[3, 4], [5]]), taught).batch(torch.arange(2))
    logits = torch.randn(2, 2, 16, generator=generator)
    assert torch.equal(run.loss(logits, labels), jsd(logits, labels, beta=0.1))
    assert not torch.equal(run.loss(logits, labels), jsd(logits, labels))


@pytest.mark.parametrize("more", [{}, {"optimiser": "muon"}, {"precision": "bf16"}], ids=str)
def test_resume_is_bit_exact(more, tmp_path):
    how = settings(**more, warmup=0.2, decay=0.4, clip=1.0)
    unbroken = starting_model()
    history = fit(unbroken, Batches(), how, seed=3)
    path = tmp_path / "progress.safetensors"
    for stop, first in ((7, 0), (33, 7), (41, 33), (60, 41), (68, 60)):  # each attempt starts where the last one stopped
        batches = interrupted_at(stop)
        torch.rand(stop)  # another process is in another random state
        with pytest.raises(KeyboardInterrupt):
            fit(starting_model(), batches, how, seed=3, checkpoint=path, save_every=0)
        assert batches.asked == list(range(first, stop))
    resumed = starting_model()
    batches = Batches()
    assert fit(resumed, batches, how, seed=3, checkpoint=path, save_every=0) == history
    assert batches.asked == list(range(68, STEPS))
    assert same_weights(resumed, unbroken) and not same_weights(resumed, starting_model())


def test_interrupt_between_steps(tmp_path):
    """From `evaluate`, which comes after the steps and before the checkpoint of its step."""
    unbroken, looks = starting_model(), []
    history = fit(unbroken, Batches(), settings(), evaluate=looks.append)
    assert looks == [20, 40, 60, 70]
    path = tmp_path / "progress.safetensors"

    def evaluate(step: int) -> None:
        if step == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(starting_model(), Batches(), settings(), checkpoint=path, save_every=0, evaluate=evaluate)
    resumed, batches = starting_model(), Batches()
    assert fit(resumed, batches, settings(), checkpoint=path, save_every=0) == history
    assert batches.asked[0] == 39 and same_weights(resumed, unbroken)


def test_a_finished_run_is_taken_from_its_checkpoint(tmp_path):
    path = tmp_path / "progress.safetensors"
    done, again = starting_model(), starting_model()
    history = fit(done, Batches(), settings(), checkpoint=path)  # save_every has not passed: written because it is the end
    batches = Batches()
    assert fit(again, batches, settings(), checkpoint=path) == history
    assert batches.asked == [] and same_weights(done, again)


def train_slowly(path: str) -> None:
    """What the killed process runs: slow steps, and a halt before the end in case the kill comes late."""
    batches = Batches(before=lambda step: time.sleep(0.02 if step < STEPS - 5 else 600))
    fit(starting_model(), batches, settings(), seed=3, checkpoint=Path(path), save_every=0)


def test_resume_after_sigkill(tmp_path):
    path, here = tmp_path / "progress.safetensors", Path(__file__).resolve().parent
    code = f"import conftest, test_training; test_training.train_slowly({str(path)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=here, stderr=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 300  # a busy machine takes its time to import PyTorch
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and path.exists()

    unbroken, resumed, batches = starting_model(), starting_model(), Batches()
    history = fit(unbroken, Batches(), settings(), seed=3)
    assert fit(resumed, batches, settings(), seed=3, checkpoint=path) == history
    assert 0 < batches.asked[0] < STEPS and same_weights(resumed, unbroken)


@pytest.fixture
def half_done(tmp_path) -> Path:
    """The checkpoint of a run that was stopped at step 33."""
    path = tmp_path / "progress.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(starting_model(), interrupted_at(33), settings(), checkpoint=path, save_every=0)
    return path


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: data[:50], lambda data: b"", lambda data: b"x" * len(data)])
def test_a_damaged_checkpoint_is_named(half_done, damage):
    half_done.write_bytes(damage(half_done.read_bytes()))
    with pytest.raises(ValueError, match=f"{half_done} is damaged.*delete it"):
        fit(starting_model(), Batches(), settings(), checkpoint=half_done)


@pytest.mark.parametrize("other", [{"how": settings(lr=1e-4)}, {"how": settings(optimiser="muon")}, {"seed": 1}, {"steps": STEPS + 1}])
def test_a_checkpoint_of_another_run_is_refused(half_done, other):
    other = {"how": settings(), "seed": 0, "steps": STEPS, **other}
    before = half_done.read_bytes()
    with pytest.raises(ValueError, match=f"{half_done} belongs to a run with other settings"):
        fit(starting_model(), Batches(other["steps"]), other["how"], seed=other["seed"], checkpoint=half_done)
    assert half_done.read_bytes() == before


def finite(path: Path) -> bool:
    return all(value.isfinite().all() for name, value in load_file(path).items() if name.startswith("model."))


class SpoiltBatches(Batches):
    """One step, counted from 1, has labels that make its loss infinite or not a number."""

    def __init__(self, spoilt: int, value: float):
        super().__init__()
        self.spoilt, self.value = spoilt, value

    def __getitem__(self, step: int):
        prompts, labels = super().__getitem__(step)
        if step + 1 == self.spoilt:
            labels.weights[0, 0, 0] = self.value
        return prompts, labels


@pytest.mark.parametrize("spoilt, value", [(30, float("nan")), (27, float("inf")), (40, float("nan")), (21, -float("inf"))])
def test_a_loss_that_is_not_finite_names_its_step_and_keeps_the_checkpoint(spoilt, value, tmp_path):
    path = tmp_path / "progress.safetensors"
    how = settings(loss="empirical")
    with pytest.raises(FloatingPointError, match=f"the loss at step {spoilt} is"):
        fit(starting_model(), SpoiltBatches(spoilt, value), how, checkpoint=path, save_every=0)
    assert finite(path)
    batches = Batches()
    fit(starting_model(), batches, how, checkpoint=path)  # and training can go on from it
    assert batches.asked[0] == spoilt - 1


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """The gradient of step 40 overflows although its loss is finite; step 40 is also the step of a checkpoint."""
    path, model = tmp_path / "progress.safetensors", starting_model()
    batches = Batches()
    model.shared.weight.register_hook(lambda g: g * torch.inf if batches.asked[-1] == 39 else g)
    with pytest.raises(FloatingPointError, match="step 40"):
        fit(model, batches, settings(), checkpoint=path, save_every=0)
    assert finite(path)
    again = Batches()
    fit(starting_model(), again, settings(), checkpoint=path)
    assert again.asked[0] == 39


def test_weights_that_are_not_finite_are_told_without_a_checkpoint_too():
    model, batches = starting_model(), Batches()
    model.shared.weight.register_hook(lambda g: g * torch.inf if batches.asked[-1] == STEPS - 1 else g)
    with pytest.raises(FloatingPointError, match=f"step {STEPS} made weights that are not finite"):
        fit(model, batches, settings())


def test_a_checkpoint_is_of_these_examples_and_of_this_loss(tmp_path, monkeypatch):
    path = tmp_path / "progress.safetensors"

    def begun(examples: Examples, loss: str = "empirical") -> None:
        fit(starting_model(), Epochs(examples, 8, 1, seed=0), settings(loss=loss), checkpoint=path)
    examples = toy_examples()
    begun(examples)
    begun(examples)
    soft = SoftLabels.sample(torch.zeros(len(examples.answers.values), 16), 20, torch.Generator().manual_seed(0))
    for others in (toy_examples(seed=1), replace(examples, labels=soft)):
        with pytest.raises(ValueError, match="belongs to a run with other settings, data or loss"):
            begun(others)
    monkeypatch.setitem(LOSSES, "empirical", lambda logits, labels: 2 * empirical(logits, labels))
    with pytest.raises(ValueError, match="belongs to a run with other settings, data or loss"):
        begun(examples)


def test_history_is_a_mean_over_tokens():
    """The last entry is of one batch of long answers, though the batches before have short ones."""
    examples = Examples.hard([[2, 1]] * 168, [[3, 1]] * 160 + [[3] * 30] * 8)
    batches = Epochs(examples, 8, 1, 0)
    long = next(i for i in range(21) if batches[i][1].tokens.shape[1] == 30)

    class LongLast:
        tokens_per_batch = batches.tokens_per_batch

        def __len__(self):
            return 21

        def __getitem__(self, step):
            return batches[long if step == 20 else 20 if step == long else step]
    model = tiny_t5()
    prompts, labels = batches[long]
    with torch.no_grad():
        expected = empirical(model(prompts, labels.tokens), labels)[labels.mask].mean().item()
    assert fit(model, LongLast(), settings(lr=1e-12))[-1] == pytest.approx(expected, rel=1e-4)


def test_training_half_precision_warns():
    with pytest.warns(UserWarning, match="weights of half precision are trained"):
        fit(tiny_t5().bfloat16(), Batches(2), settings(precision="bf16"))


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"lora_rank": -1}, {"micro_batch": -1}])
def test_settings_out_of_range(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}.* must be at least"):
        FitSettings(**wrong)


def test_padding_takes_no_place_in_the_window():
    """Rows of 10 + 3 and of 4 + 9 tokens fit into 16 positions each, and so does a batch of both."""
    examples = Examples.hard([[2] * 10, [2] * 4], [[3, 3, 1], [3] * 8 + [1]])
    history = fit(tiny_decoder(max_positions=16), Epochs(examples, 2, 1, seed=0, pad=-1), settings(batch_size=2))
    assert len(history) == 1


def test_no_epochs_are_no_training():
    with pytest.raises(ValueError, match="0 epochs of 64 examples are no training"):
        Epochs(toy_examples(), 8, 0, seed=0)


def test_unknown_optimiser():
    with pytest.raises(ValueError, match="optimiser 'adam' is unknown; known: adamw, muon"):
        fit(tiny_t5(), Batches(), settings(optimiser="adam"))


def test_muon_has_the_matrices_inside_the_layers_and_adamw_the_rest():
    model = tiny_t5()
    run = Run(model, settings(optimiser="muon"), 10, 0, None)
    adamw, muon = ({id(p) for group in o.param_groups for p in group["params"]} for o in run.optimisers)
    names = {name for name, p in model.named_parameters() if id(p) in muon}
    assert "encoder.blocks.0.attention.q.weight" in names and "decoder.blocks.0.feed_forward.wo.weight" in names
    assert not any(part in name for name in names for part in ("shared", "lm_head", "norm", "relative_bias"))
    assert adamw | muon == {id(p) for p in model.parameters()} and not adamw & muon


def test_muon_is_pytorchs_muon():
    """Tall, wide and square matrices, several of a shape; the bf16 inside rounds otherwise in a batched product."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 8), (8, 16), (8, 16), (12, 12)]
    ours, theirs = ([torch.nn.Parameter(torch.zeros(shape)) for shape in shapes] for _ in range(2))
    optimisers = [Muon(ours, lr=0.01),
                  torch.optim.Muon(theirs, lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")]
    for _ in range(4):
        for one, other in zip(ours, theirs):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimiser in optimisers:
            optimiser.step()
    for one, other in zip(ours, theirs):
        assert (one - other).norm() < 0.02 * other.norm()


def test_learning_rate_by_hand():
    """10 steps, 2 of warm-up, 5 of decay: up in halves, then down from 5/5 in fifths."""
    schedule = [learning_rate(step, 10, FitSettings(lr=2.0, warmup=0.2, decay=0.5)) for step in range(10)]
    assert schedule == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.6, 1.2, 0.8, 0.4])


def test_learning_rate_without_warmup_or_decay_is_constant():
    assert [learning_rate(step, 7, FitSettings(lr=0.5)) for step in range(7)] == [0.5] * 7


def test_fit_follows_the_learning_rate():
    run = Run(tiny_t5(), settings(warmup=0.2, decay=0.5, optimiser="muon"), 10, 0, None)
    batches, seen = Batches(), []
    for step in range(10):
        run.update(*batches[step])
        rates = {group["lr"] for o in run.optimisers for group in o.param_groups}
        assert len(rates) == 1
        seen.append(rates.pop())
    assert seen == [learning_rate(step, 10, run.settings) for step in range(10)]


def test_a_negative_clip_is_refused():
    with pytest.raises(ValueError, match="clip -1.0: a negative norm would turn every gradient round"):
        settings(clip=-1.0)


def test_clip_bounds_the_gradient():
    """With one large step of plain descent in AdamW's place, the weights move by lr times the clipped norm."""
    for clip, bounded in ((0.01, True), (0.0, False)):
        model = tiny_t5()
        before = [p.detach().clone() for p in model.parameters()]
        run = Run(model, settings(clip=clip, lr=1.0), 10, 0, None)
        run.optimisers = [torch.optim.SGD(model.parameters(), lr=1.0)]
        run.update(*Batches()[0])
        moved = torch.cat([(p - b).flatten() for p, b in zip(model.parameters(), before)]).norm().item()
        assert (moved == pytest.approx(0.01, rel=1e-3)) if bounded else moved > 0.1


def buckets(n: int, batch_size: int, seed: int) -> list[list[int]]:
    return [rows.tolist() for rows in length_buckets(toy_examples(n), batch_size, torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize("n, batch_size", [(64, 8), (67, 8), (500, 8), (9, 8), (8, 8), (7, 1)])
def test_length_buckets_fill_every_batch_with_each_row_at_most_once(n, batch_size):
    batches = buckets(n, batch_size, seed=0)
    rows = [row for batch in batches for row in batch]
    assert [len(batch) for batch in batches] == [batch_size] * (n // batch_size)
    assert len(set(rows)) == len(rows) and set(rows) <= set(range(n))


def test_fewer_rows_than_a_batch_make_no_batch():
    assert buckets(5, 8, seed=0) == []


def test_length_buckets_are_decided_by_the_generator():
    assert buckets(100, 8, seed=0) == buckets(100, 8, seed=0) != buckets(100, 8, seed=1)


def test_rows_meet_other_rows_of_their_length_in_another_order():
    one, other = ({frozenset(batch) for batch in buckets(64, 8, seed)} for seed in (0, 1))
    assert not one & other


def test_length_buckets_hold_similar_lengths():
    lengths = toy_examples(256).answers.lengths
    spread = [int(lengths[batch].max() - lengths[batch].min()) for batch in map(torch.tensor, buckets(256, 8, seed=0))]
    assert sum(spread) / len(spread) < 0.5  # random batches of 8 of these lengths would have about 3.6


def test_long_prompts_meet_no_short_ones_because_their_answers_are_as_long():
    """Short prompts with answers of 5 tokens, long ones with answers of 4 to 6: at most one batch has both."""
    prompts = [[2] * (10 if i % 2 else 100) for i in range(128)]
    examples = Examples.hard(prompts, [[2] * (5 if i % 2 else 4 + i % 3) for i in range(128)])
    batches = length_buckets(examples, 8, torch.Generator().manual_seed(0))
    assert sum(len(examples.prompts.lengths[batch].unique()) > 1 for batch in batches) <= 1


def test_no_kind_of_row_is_left_out_more_often():
    """43 rows in batches of 8 leave 3 out each time: long ones no more often than short ones."""
    lengths, left_out = toy_examples(43).answers.lengths, collections.Counter()
    for seed in range(200):
        used = {row for batch in buckets(43, 8, seed) for row in batch}
        left_out.update(int(lengths[row]) for row in range(43) if row not in used)
    for length, count in left_out.items():
        expected = 600 * int((lengths == length).sum()) / 43
        assert abs(count - expected) < 5 * expected**0.5, (length, count, expected)


def test_epochs_cover_every_row_once_an_epoch():
    examples = Examples.hard([[i + 2] for i in range(48)], [[i + 2] * (1 + i % 3) for i in range(48)])
    epochs = Epochs(examples, 8, 3, seed=0)
    assert len(epochs) == 18
    orders = [[row for step in range(6) for row in epochs[6 * epoch + step][0][:, 0].tolist()] for epoch in range(3)]
    assert all(sorted(order) == list(range(2, 50)) for order in orders)
    assert orders[0] != orders[1] != orders[2]


def test_epochs_leave_only_the_remainder_out():
    examples = Examples.hard([[i + 2] for i in range(45)], [[1]] * 45)
    epochs = Epochs(examples, 8, 2, seed=0)
    first, second = ({row for step in range(5) for row in epochs[5 * e + step][0][:, 0].tolist()} for e in range(2))
    assert len(first) == len(second) == 40 and first != second  # another remainder in another epoch


@pytest.mark.parametrize("passes, steps", [(1, 8), (0.5, 4), (2.25, 18), (0.001, 1)])
def test_epochs_may_be_fractions(passes, steps):
    assert len(Epochs(toy_examples(64), 8, passes, seed=0)) == steps


def test_epochs_of_fewer_rows_than_a_batch():
    epochs = Epochs(toy_examples(5), 8, 2, seed=0)
    assert len(epochs) == 2 and len(epochs[0][0]) == 5


def test_epochs_by_step_number_do_not_depend_on_the_way_there():
    walked, jumped = (Epochs(toy_examples(), 8, 3, seed=4) for _ in range(2))
    steps = [walked[step] for step in range(24)]
    for step in (23, 3, 11):
        prompts, labels = jumped[step]
        assert torch.equal(prompts, steps[step][0]) and torch.equal(labels.tokens, steps[step][1].tokens)
    other = Epochs(toy_examples(), 8, 3, seed=5)
    assert any(not torch.equal(other[step][0], steps[step][0]) for step in range(8))


def test_a_token_weighs_the_same_in_every_batch():
    """Its gradient does not depend on whether its batch holds short or long answers: one number divides all."""
    short, long = [[3, 1]] * 8, [[3, 4, 5, 6, 3, 4, 5, 6, 3, 1]] * 8
    examples = Examples.hard([[2, 1]] * 16, [*short, *long])
    batches = Epochs(examples, 8, 1, 0)
    assert batches.tokens_per_batch == 8 * (2 + 10) / 2
    model = tiny_t5(16)
    run = Run(model, FitSettings(precision="fp32"), 2, 0, None, batches.tokens_per_batch)
    run.optimise = lambda: None  # so that the gradients stay to be seen
    for step in range(2):
        prompts, labels = batches[step]
        total = empirical(model(prompts, labels.tokens), labels)[labels.mask].sum()
        expected = torch.autograd.grad(total / batches.tokens_per_batch, list(model.parameters()), allow_unused=True)
        model.zero_grad(set_to_none=True)
        grown, tokens = run.update(prompts, labels).tolist()
        assert (grown, tokens) == pytest.approx((total.item(), labels.mask.sum().item()), rel=1e-5)
        for parameter, gradient in zip(model.parameters(), expected):
            assert gradient is None or torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


def test_the_default_loss_is_the_papers():
    assert FitSettings().loss == "empirical"
