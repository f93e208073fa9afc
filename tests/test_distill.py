"""The practice pass and the distillation pass, on a random T5 and a toy context."""

import sys
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import tiny_t5

from minicd.distill import Context, NoAnswers, PracticeSettings, distill, practice
from minicd.labels import Examples, SoftLabels
from minicd.losses import empirical, mean_over_tokens
from minicd.sampling import score
from minicd.tokenizer import word_tokenizer
from minicd.training import FitSettings

distill_module = sys.modules["minicd.distill"]  # minicd.distill itself is the function
LETTERS = list("abcdefgh")
TOKENIZER = word_tokenizer([*LETTERS, "teacher", "student", "twice"])
VOCABULARY = len(TOKENIZER)
SETTINGS = PracticeSettings(max_new_tokens=12)


def teacher_template(x: str) -> str:
    return f"teacher twice {x} {x}"


def student_template(x: str) -> str:
    return f"student {x}"


def letters(n: int, rng: np.random.Generator) -> list[str]:
    return [" ".join(rng.choice(LETTERS, size=3)) for _ in range(n)]


def second_to_fourth(tokens: list[int]) -> slice | None:
    """f: three tokens after a 'scratchpad' of one; nothing in completions of fewer than four."""
    return slice(1, 4) if len(tokens) >= 4 else None


class Recorder:
    """A context that remembers the inputs drawn and the completions seen by the extractor."""

    def __init__(self, extract=second_to_fourth):
        self.inputs, self.completions, self.inner = [], [], extract
        self.context = Context(self.draw, teacher_template, student_template, self.extract)

    def draw(self, n: int, rng: np.random.Generator) -> list[str]:
        self.inputs += letters(n, rng)
        return self.inputs[-n:]

    def extract(self, tokens: list[int]) -> slice | None:
        self.completions.append(list(tokens))
        return self.inner(tokens)

    @property
    def kept(self) -> list[tuple[str, list[int]]]:
        """Input and completion of every item that has an answer."""
        return [(x, y) for x, y in zip(self.inputs, self.completions) if self.inner(y) is not None]


@pytest.fixture(scope="module")
def teacher():
    """Its next token depends on the prompt and on what came before; completions end at different lengths."""
    return tiny_t5(VOCABULARY, seed=4, initializer_factor=1.5)


@pytest.fixture
def practised(teacher) -> tuple[Recorder, Examples]:
    recorder = Recorder()
    return recorder, practice(teacher, TOKENIZER, recorder.context, 60, SETTINGS, seed=1)


@pytest.fixture(params=[10**6, 0], ids=["while sampling", "second pass"])
def route(request, monkeypatch) -> None:
    """Both ways to a label: with the token, at the step that draws it, or when the teacher reads what it wrote."""
    monkeypatch.setattr(distill_module, "KEPT_MOST", request.param)


def tensors(items: Examples) -> list[torch.Tensor]:
    parts = (items.prompts, items.answers, items.labels.ids)
    return [*(part.values for part in parts), *(part.starts for part in parts), items.labels.weights]


def same(a: Examples, b: Examples) -> bool:
    return all(torch.equal(s, t) for s, t in zip(tensors(a), tensors(b)))


def label_of(labels: SoftLabels, row: int) -> torch.Tensor:
    """The label's counts, dense: [V]."""
    counts = torch.zeros(VOCABULARY, dtype=torch.float64)
    counts[labels.ids[row]] = labels.weights[labels.ids.starts[row] : labels.ids.starts[row + 1]].double()
    return counts


def test_prompts_are_the_students_and_answers_are_what_f_keeps(practised):
    recorder, items = practised
    assert 10 < len(items) < 60, "some completions have an answer, some are dropped"
    assert len(items) == len(recorder.kept)
    for i, (x, y) in enumerate(recorder.kept):
        assert items.input(i) == x and items.prompts[i] == TOKENIZER.encode(student_template(x))
        assert items.answers[i] == y[1:4] + [TOKENIZER.eos_id]


def test_every_answer_token_has_a_label_and_the_stop_token_a_hard_one_where_the_teacher_went_on(practised):
    recorder, items = practised
    assert {len(y) > 4 for _, y in recorder.kept} == {True, False}
    assert len(items.labels.ids) == len(items.answers.values) == 4 * len(items)
    for row, token in enumerate(items.answers.values.tolist()):
        counts = label_of(items.labels, row)
        if row % 4 == 3 and len(recorder.kept[row // 4][1]) > 4:
            assert token == TOKENIZER.eos_id and items.labels.ids[row] == [token]
        else:
            assert counts.sum() == 100 and (counts > 0).sum() > 1


def test_labels_come_from_the_teachers_distribution_under_the_teachers_prompt(teacher, route):
    """Counts of 5000 samples against q at the same position; neither the student's prompt nor a shifted position would pass."""
    recorder = Recorder()
    settings = PracticeSettings(label_samples=5000, max_new_tokens=12)
    items = practice(teacher, TOKENIZER, recorder.context, 40, settings, seed=2)
    counts = torch.stack([label_of(items.labels, row) for row in range(len(items.labels.ids))]).view(len(items), 4, -1)[:, :3]

    def distance(template, completion, positions: slice) -> torch.Tensor:
        """Pearson's statistic over all labels, for each degree of freedom; about 1 for the right distributions."""
        prompts = [TOKENIZER.encode(template(x)) for x, _ in recorder.kept]
        logits = score(teacher, prompts, [completion(y) for _, y in recorder.kept])
        expected = 5000 * torch.stack([z[positions] for z in logits]).double().softmax(-1)
        common = expected > 5
        assert common.sum() > 700
        return (((counts - expected).square() / expected)[common].sum() / common.sum()).item()

    # some 700 degrees of freedom or more: a standard deviation of at most sqrt(2 / 700) = 0.053
    assert distance(teacher_template, lambda y: y[:4], slice(1, 4)) == pytest.approx(1, abs=0.2)
    assert distance(student_template, lambda y: y[:4], slice(1, 4)) > 10
    assert distance(teacher_template, lambda y: y[:4], slice(0, 3)) > 10
    assert distance(teacher_template, lambda y: y[1:4], slice(0, 3)) > 10  # a teacher without its scratchpad


@pytest.mark.parametrize("ends", [slice(1, -1), slice(-3, -1), slice(None, 2), slice(2, None), slice(None)])
def test_open_and_negative_ends_of_slices(teacher, ends, route):
    """However f writes its slice, every label stands with its own token."""
    def extract(tokens: list[int]) -> slice | None:
        return ends if len(tokens) >= 4 else None

    recorder = Recorder(extract)
    items = practice(teacher, TOKENIZER, recorder.context, 40, PracticeSettings(label_samples=2000, max_new_tokens=12), seed=3)
    prompts = [TOKENIZER.encode(teacher_template(x)) for x, _ in recorder.kept]
    scored = score(teacher, prompts, [y for _, y in recorder.kept])
    for i, ((_, y), logits) in enumerate(zip(recorder.kept, scored)):
        end = [] if ends.stop is None and len(y) == 12 else [TOKENIZER.eos_id]  # 12: cut, so without an end
        assert items.answers[i] == [*y[ends], *end]
        start = int(items.answers.starts[i])
        for t, z in enumerate(logits[ends]):
            frequencies = label_of(items.labels, start + t) / 2000
            assert (frequencies - z.double().softmax(-1)).abs().max() < 0.06  # more than five standard deviations


def test_an_answer_may_be_empty(teacher):
    """The student is then to stop at once."""
    recorder = Recorder(lambda tokens: slice(0, 0) if len(tokens) % 2 else slice(0, 1))
    items = practice(teacher, TOKENIZER, recorder.context, 40, SETTINGS, seed=1)
    for i, (_, y) in enumerate(recorder.kept):
        assert items.answers[i] == ([] if len(y) % 2 else y[:1]) + [TOKENIZER.eos_id]


@pytest.mark.parametrize("extract", [lambda tokens: None, lambda tokens: slice(0, 1) if tokens[:1] == [99] else None])
def test_nothing_to_extract(teacher, extract):
    with pytest.raises(NoAnswers, match="only 0 of 30 completions"):
        practice(teacher, TOKENIZER, Recorder(extract).context, 30, SETTINGS)


def test_almost_nothing_to_extract(teacher):
    seen = []

    def every_twentieth(tokens: list[int]) -> slice | None:
        seen.append(tokens)
        return slice(0, 1) if len(seen) % 20 == 0 else None

    with pytest.raises(NoAnswers, match="only 2 of 40 completions"):
        practice(teacher, TOKENIZER, Recorder(every_twentieth).context, 40, SETTINGS)


def test_what_is_left_at_the_end_may_have_no_answer(teacher):
    drawn = []

    def all_but_the_last(tokens: list[int]) -> slice | None:
        drawn.append(tokens)
        return slice(0, 1) if len(drawn) <= 20 else None

    items = practice(teacher, TOKENIZER, Recorder(all_but_the_last).context, 21, replace(SETTINGS, chunk=20))
    assert len(drawn) == 21 and 0 < len(items) <= 20 and items.input(0)


@pytest.mark.parametrize("step", [2, -1])
def test_an_extractor_keeps_neighbours(teacher, step):
    with pytest.raises(ValueError, match="f keeps neighbouring tokens, without a step"):
        practice(teacher, TOKENIZER, Recorder(lambda tokens: slice(None, None, step)).context, 5, SETTINGS)


def test_d_draws_as_many_inputs_as_it_is_asked_for(teacher):
    context = Context(lambda n, rng: letters(n - 1, rng), teacher_template, student_template, second_to_fourth)
    with pytest.raises(ValueError, match="D was asked for 5 inputs and drew 4"):
        practice(teacher, TOKENIZER, context, 5, SETTINGS)
    with pytest.raises(ValueError, match="practice on 0 inputs"):
        practice(teacher, TOKENIZER, context, 0, SETTINGS)


@pytest.mark.parametrize("name", ["label_samples", "label_top", "max_new_tokens", "chunk"])
def test_settings_out_of_range(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        PracticeSettings(**{name: 0})


def test_an_unknown_kind_of_label_is_refused_at_once():
    with pytest.raises(ValueError, match="labels 'sample' are unknown; known: sampled, top, exact"):
        PracticeSettings(labels="sample")


OTHERS = {"seed": dict(seed=2), "settings": dict(settings=replace(SETTINGS, labels="top")), "items": dict(n=30),
          "teacher": dict(teacher=lambda x: f"teacher {x}"), "student": dict(student=lambda x: f"student twice {x}"),
          "extract": dict(extract=lambda y: slice(0, 2)), "inputs": dict(inputs=lambda n, rng: letters(n, rng))}


@pytest.mark.parametrize("change", OTHERS)
def test_chunks_of_another_practice_are_refused(teacher, change, tmp_path):
    def practised(n=25, settings=SETTINGS, seed=1, **templates):
        context = Context(**{"inputs": letters, "teacher": teacher_template, "student": student_template,
                             "extract": second_to_fourth, **templates})
        return practice(model, TOKENIZER, context, n, replace(settings, chunk=20), seed=seed, folder=tmp_path)
    model, changed = teacher, OTHERS[change]
    first = practised()
    assert same(first, practised())  # the same practice goes on
    with pytest.raises(ValueError, match="is of a practice with other prompts, f, D, settings or seed"):
        practised(**changed)


def test_few_answers_at_a_time_have_the_same_labels(teacher, monkeypatch):
    """As a large vocabulary under many prompts makes necessary."""
    context = Context(letters, [teacher_template, lambda x: f"teacher {x}"], student_template, second_to_fourth)
    whole = practice(teacher, TOKENIZER, context, 30, SETTINGS)
    monkeypatch.setattr(distill_module, "LOGITS_AT_ONCE", 12 * VOCABULARY * 3 * 2)  # two answers
    few = practice(teacher, TOKENIZER, context, 30, SETTINGS)
    assert distill_module.answers_at_once(VOCABULARY, 2, SETTINGS) == 2 and same(whole, few)


def test_the_seed_decides_the_practice_set(teacher):
    first, again, other = (practice(teacher, TOKENIZER, Recorder().context, 30, SETTINGS, seed=seed) for seed in (1, 1, 2))
    assert same(first, again) and not same(first, other)


def test_practice_leaves_the_teacher_alone(teacher):
    before = deepcopy(teacher.state_dict())
    practice(teacher, TOKENIZER, Recorder().context, 30, SETTINGS)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_chunks_differ_and_are_resumed_bit_for_bit(teacher, tmp_path):
    settings = PracticeSettings(max_new_tokens=12, chunk=16)
    unbroken = Recorder()
    expected = practice(teacher, TOKENIZER, unbroken.context, 40, settings, seed=5, folder=tmp_path / "whole")
    assert len(unbroken.inputs) == 40 and len(set(unbroken.inputs[:16]) & set(unbroken.inputs[16:32])) < 16

    calls = []

    def interrupted(tokens: list[int]) -> slice | None:
        calls.append(tokens)
        if len(calls) == 20:  # in the second chunk
            raise KeyboardInterrupt
        return second_to_fourth(tokens)

    folder = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        practice(teacher, TOKENIZER, Recorder(interrupted).context, 40, settings, seed=5, folder=folder)
    assert [file.name for file in folder.iterdir()] == ["chunk-0000.safetensors"]
    resumed = Recorder()
    items = practice(teacher, TOKENIZER, resumed.context, 40, settings, seed=5, folder=folder)
    assert len(resumed.inputs) == 24, "the first chunk is not practised again"
    assert same(items, expected)
    assert same(items, practice(teacher, TOKENIZER, Recorder().context, 40, settings, seed=5))  # nor does a folder matter
    names = [sorted(file.name for file in path.iterdir()) for path in (folder, tmp_path / "whole")]
    assert names[0] == names[1] == [f"chunk-000{i}.safetensors" for i in range(3)]


def mean_loss(model, items: Examples) -> float:
    prompts, labels = items.batch(torch.arange(len(items)))
    with torch.no_grad():
        return mean_over_tokens(empirical(model(prompts, labels.tokens), labels), labels.mask).item()


@pytest.mark.parametrize("loss", ["empirical", "hard"])
def test_distil_brings_the_student_to_the_teacher(teacher, loss):
    """Measured on practice items that the student has not seen, against the labels' own entropy as the floor."""
    items = practice(teacher, TOKENIZER, Recorder().context, 400, SETTINGS, seed=1)
    fresh = practice(teacher, TOKENIZER, Recorder().context, 300, SETTINGS, seed=2)
    _, labels = fresh.batch(torch.arange(len(fresh)))
    entropy = -torch.xlogy(labels.weights, labels.weights).sum() / labels.mask.sum()
    student = deepcopy(teacher)
    settings = FitSettings(lr=1e-2, batch_size=16, decay=0.5, loss=loss, precision="fp32")
    before = mean_loss(student, fresh) - entropy
    history = distill(student, items, settings, epochs=5, seed=0)
    after = mean_loss(student, fresh) - entropy
    assert history[-1] < history[0]
    assert 0 < after < before / 2, "the KL from the labels to the student halves at least"


def test_distil_is_decided_by_its_seed_and_resumes(teacher, tmp_path):
    items = practice(teacher, TOKENIZER, Recorder().context, 100, SETTINGS, seed=1)
    settings = FitSettings(lr=1e-2, batch_size=8, loss="empirical", precision="fp32")
    histories = [distill(deepcopy(teacher), items, settings, epochs=4, seed=seed) for seed in (0, 0, 1)]
    assert histories[0] == histories[1] != histories[2]
    path = tmp_path / "student.progress.safetensors"
    assert distill(deepcopy(teacher), items, settings, epochs=4, checkpoint=path) == histories[0]
    student = deepcopy(teacher)
    assert distill(student, items, settings, epochs=4, checkpoint=path) == histories[0]
    assert mean_loss(student, items) < mean_loss(teacher, items)
