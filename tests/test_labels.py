"""Soft labels are unbiased and carry the right noise; practice sets survive every rearrangement and the disk."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from minicd.distill import Answer, with_stops
from minicd.labels import Examples, LabelBatch, Ragged, SoftLabels
from minicd.losses import empirical

Q_LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense(labels: SoftLabels, vocabulary: int) -> torch.Tensor:
    """[M, V] probabilities, built entry by entry."""
    result = torch.zeros(len(labels.ids), vocabulary, dtype=torch.float64)
    for m in range(len(labels.ids)):
        start, end = labels.ids.starts[m], labels.ids.starts[m + 1]
        for token, count in zip(labels.ids[m], labels.weights[start:end].tolist()):
            result[m, token] += count
    return result / result.sum(-1, keepdim=True)


def same(a: Examples, b: Examples) -> bool:
    """Bit for bit, element types included."""
    def tensors(x: Examples) -> list[torch.Tensor]:
        parts = (x.prompts, x.answers, x.labels.ids, *([] if x.inputs is None else [x.inputs]))
        return [*(part.values for part in parts), *(part.starts for part in parts), x.labels.weights]
    return all(s.dtype == t.dtype and torch.equal(s, t) for s, t in zip(tensors(a), tensors(b), strict=True))


@pytest.fixture
def examples() -> Examples:
    """Four items; the label of answer position m names the tokens m and m + 1, m + 1 more often."""
    prompts, answers = [[5, 6, 1], [7, 1], [8, 9, 10, 1], [11, 1]], [[2, 1], [3, 4, 5, 1], [1], [6, 1]]
    ids = Ragged.of([[m, m + 1] if m % 2 else [m] for m in range(9)])
    counts = torch.tensor([c for m in range(9) for c in ([1, 3] if m % 2 else [4])], dtype=torch.int32)
    return Examples(Ragged.of(prompts), Ragged.of(answers), SoftLabels(ids, counts))


def test_sampled_counts_sum_to_the_number_of_samples():
    logits = torch.randn(50, 30, generator=seeded(0))
    for samples in (1, 7, 100):
        labels = SoftLabels.sample(logits, samples, seeded(1))
        assert len(labels.ids) == 50 and len(labels.weights) == len(labels.ids.values)
        for m in range(50):
            tokens = labels.ids[m]
            counts = labels.weights[labels.ids.starts[m] : labels.ids.starts[m + 1]]
            assert counts.sum() == samples and counts.min() >= 1
            assert len(set(tokens)) == len(tokens), "every token is named once"


def test_certain_distributions_have_certain_labels():
    logits = torch.full((3, 6), -1e4)
    logits[[0, 1, 2], [4, 0, 5]] = 1e4
    labels = SoftLabels.sample(logits, 100, seeded(0))
    assert [labels.ids[m] for m in range(3)] == [[4], [0], [5]] and labels.weights.tolist() == [100] * 3


def test_the_generator_decides_the_labels():
    logits = torch.randn(40, 20, generator=seeded(0))
    first, again, other = (SoftLabels.sample(logits, 10, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.ids.values, again.ids.values) and torch.equal(first.weights, again.weights)
    assert torch.equal(first.ids.starts, again.ids.starts)
    assert not torch.equal(dense(first, 20), dense(other, 20))


@pytest.mark.parametrize("samples", [1, 10])
def test_mean_and_variance_of_sampled_labels(samples):
    """E[q̂] = q, and E‖q̂ − q‖² = (1 − Σ q²) / N: two facts about the mean of N independent draws."""
    rows = 4000
    q = Q_LOGITS.double().softmax(-1)
    labels = SoftLabels.sample(Q_LOGITS.expand(rows, 5), samples, seeded(3))
    sampled = dense(labels, 5)
    deviation = (q * (1 - q) / (samples * rows)).sqrt()
    assert ((sampled.mean(0) - q).abs() < 4 * deviation).all()
    squares = (sampled - q).square().sum(-1)
    expected = (1 - q.square().sum()) / samples
    assert abs(squares.mean() - expected) < 4 * squares.std() / rows**0.5
    assert squares.std() / rows**0.5 < 0.03 * expected  # the bound above is a tight one


@pytest.mark.parametrize("samples", [1, 20])
def test_sampled_labels_have_an_unbiased_gradient(samples):
    """The mean over many draws of the gradient at the student's logits is the exact one, p − q, within the noise of q̂."""
    draws = 3000
    student = torch.randn(5, dtype=torch.float64, generator=seeded(0))
    p, q = student.softmax(-1), Q_LOGITS.double().softmax(-1)
    soft = SoftLabels.sample(Q_LOGITS.expand(draws, 5), samples, seeded(4))
    mask = torch.ones(draws, 1, dtype=torch.bool)
    ids, weights = soft.gather(torch.arange(draws)[:, None], mask)
    z = student.repeat(draws, 1, 1).requires_grad_()
    empirical(z, LabelBatch(ids[..., 0], ids, weights, mask)).sum().backward()
    gradients = z.grad[:, 0]
    deviation = (q * (1 - q) / (samples * draws)).sqrt()
    assert ((gradients.mean(0) - (p - q)).abs() < 4 * deviation).all()
    trace = gradients.var(0).sum()  # of the gradient's covariance
    assert trace.item() == pytest.approx(((1 - q.square().sum()) / samples).item(), rel=0.06)


def test_one_hot():
    labels = SoftLabels.one_hot(torch.tensor([3, 0, 3]))
    assert torch.equal(dense(labels, 4), torch.eye(4, dtype=torch.float64)[[3, 0, 3]])


def test_ragged_rows_and_lengths():
    ragged = Ragged.of([[1, 2, 3], [], [4]])
    assert len(ragged) == 3 and [ragged[i] for i in range(3)] == [[1, 2, 3], [], [4]]
    assert ragged.lengths.tolist() == [3, 0, 1]
    empty = Ragged.of([])
    assert len(empty) == 0 and empty.values.dtype == torch.int32


def test_ragged_padded_and_positions():
    ragged = Ragged.of([[1, 2, 3], [], [4], [5, 6]])
    values, mask = ragged.gather(torch.tensor([3, 1, 0]), pad=9)
    assert values.tolist() == [[5, 6, 9], [9, 9, 9], [1, 2, 3]]
    assert mask.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    where, real = ragged.positions(torch.tensor([2, 3]))  # row 2 starts at 3, row 3 at 4
    assert where[real].tolist() == [3, 4, 5] and real.tolist() == [[True, False], [True, True]]


def test_ragged_padded_takes_rows_of_any_shape():
    ragged = Ragged.of([[1], [2, 3]])
    values, mask = ragged.gather(torch.tensor([[0, 1], [1, 1]]))
    assert values.tolist() == [[[1, 0], [2, 3]], [[2, 3], [2, 3]]]
    assert mask.tolist() == [[[True, False], [True, True]], [[True, True], [True, True]]]


def test_ragged_padded_without_any_value():
    values, mask = Ragged.of([[], []]).gather(torch.tensor([0, 1]), pad=7)
    assert values.tolist() == [[7], [7]] and not mask.any()


def test_ragged_join():
    joined = Ragged.join([Ragged.of([[1, 2], []]), Ragged.of([]), Ragged.of([[3]])])
    assert [joined[i] for i in range(len(joined))] == [[1, 2], [], [3]]


def test_split_and_join_move_whole_labels():
    labels = SoftLabels.sample(torch.randn(6, 8, generator=seeded(0)), 5, seeded(1))
    expected = dense(labels, 8)
    one, none, other = labels.split([2, 0, 4])
    assert torch.equal(dense(one, 8), expected[:2]) and torch.equal(dense(other, 8), expected[2:])
    assert len(none.ids) == len(none.weights) == 0
    moved = SoftLabels.join([other, none, one])
    assert torch.equal(dense(moved, 8), expected[[2, 3, 4, 5, 0, 1]])
    back = SoftLabels.join([one, none, other])
    assert torch.equal(back.ids.values, labels.ids.values) and torch.equal(back.ids.starts, labels.ids.starts)
    assert torch.equal(back.weights, labels.weights)


def test_split_by_hand():
    """Three positions, which name one, three and two tokens: the first one answer's, the others another's."""
    labels = SoftLabels(Ragged.of([[7], [1, 2, 3], [4, 5]]), torch.tensor([9, 1, 2, 3, 4, 5]))
    first, second = labels.split([1, 2])
    assert first.ids[0] == [7] and first.weights.tolist() == [9]
    assert [second.ids[i] for i in range(2)] == [[1, 2, 3], [4, 5]]
    assert second.weights.tolist() == [1, 2, 3, 4, 5]


def test_stop_tokens_stand_between_the_soft_labels_of_the_answers():
    """Answers of two, no and one token: their labels in turn, and a sure one to stop where f cut something off."""
    logits = [torch.full((n, 6), -1e4) for n in (2, 0, 1)]
    logits[0][0, 4], logits[0][1, 5], logits[2][0, 3] = 1e4, 1e4, 1e4  # the teacher is certain: of 4, 5 and 3
    given = [Answer([2, 3, 5], slice(0, 2), True), Answer([4], slice(0, 0), True), Answer([5], slice(0, 1), False)]
    answers, labels = with_stops(given, SoftLabels.sample(torch.cat(logits), 10, seeded(0)), 1)
    assert [answers[i] for i in range(3)] == [[2, 3, 1], [1], [5]]
    assert [labels.ids[m] for m in range(5)] == [[4], [5], [1], [1], [3]]
    assert labels.weights.tolist() == [10, 10, 1, 1, 10]


def test_kinds_of_labels():
    logits = torch.randn(4, 6, generator=seeded(0))
    made = {"sampled": SoftLabels.sample(logits, 3, seeded(1)), "exact": SoftLabels.top(logits),
            "top": SoftLabels.top(logits, 5)}
    stop = SoftLabels.one_hot(torch.tensor([1]))
    for kind, labels in made.items():
        assert labels.kind == kind == SoftLabels.join([labels, stop]).kind
    assert SoftLabels.join([stop, made["exact"], made["top"]]).kind == "top"


INPUTS = ["3 + 4", "", "naïve 日本", "7"]


def with_inputs(examples: Examples) -> Examples:
    return replace(examples, inputs=Ragged.of_texts(INPUTS))


def test_raw_inputs_survive_the_disk_and_joining(examples, tmp_path):
    practised = with_inputs(examples)
    practised.save(tmp_path / "practice")
    loaded = Examples.load(tmp_path / "practice")
    joined = Examples.join([loaded, practised])
    assert [loaded.input(i) for i in range(4)] == INPUTS and [joined.input(i) for i in range(8)] == INPUTS * 2
    assert same(loaded, practised)


def test_a_practice_set_without_raw_inputs_loads(examples, tmp_path):
    """Those of older versions have none, nor then has what is joined with them."""
    examples.save(tmp_path / "practice")
    assert "inputs.values" not in load_file(tmp_path / "practice")
    loaded = Examples.load(tmp_path / "practice")
    assert same(loaded, examples)
    mixed = [Examples.join(parts) for parts in ([with_inputs(examples), loaded], [loaded, with_inputs(examples)])]
    for without in (loaded, *mixed):
        with pytest.raises(ValueError, match="do not hold their raw inputs"):
            without.input(0)


def test_batch_by_hand(examples):
    prompts, labels = examples.batch(torch.tensor([1, 2, 0]), pad=0)
    assert prompts.tolist() == [[7, 1, 0, 0], [8, 9, 10, 1], [5, 6, 1, 0]]
    assert labels.tokens.tolist() == [[3, 4, 5, 1], [1, 0, 0, 0], [2, 1, 0, 0]]
    assert labels.mask.tolist() == [[True] * 4, [True, False, False, False], [True, True, False, False]]
    assert labels.ids.shape == labels.weights.shape == (3, 4, 2)
    # the answers' positions are 0, 1 | 2 … 5 | 6 | 7, 8; odd ones name two tokens
    target = torch.zeros(3, 4, 10).scatter_add(-1, labels.ids, labels.weights)
    expected = torch.zeros(3, 4, 10)
    expected[0, 0, 2] = expected[0, 2, 4] = expected[1, 0, 6] = expected[2, 0, 0] = 1.0
    expected[0, 1, 3], expected[0, 1, 4] = 0.25, 0.75
    expected[0, 3, 5], expected[0, 3, 6] = 0.25, 0.75
    expected[2, 1, 1], expected[2, 1, 2] = 0.25, 0.75
    assert torch.equal(target[labels.mask], expected[labels.mask])


def test_batch_weights_are_probabilities_at_answers_and_at_padding(examples):
    _, labels = examples.batch(torch.arange(4))
    assert torch.equal(labels.weights.sum(-1), torch.ones(labels.mask.shape))
    assert (labels.weights >= 0).all() and labels.ids.dtype == torch.int64


def test_joined_examples_are_the_same_examples(examples):
    joined = Examples.join([examples, Examples.hard([[4, 1]], [[9, 1]]), examples])
    assert len(joined) == 9
    for rows in (torch.arange(4), torch.arange(5, 9)):
        prompts, labels = joined.batch(rows)
        expected_prompts, expected = examples.batch(torch.arange(4))
        assert torch.equal(prompts, expected_prompts)
        assert torch.equal(labels.tokens, expected.tokens) and torch.equal(labels.mask, expected.mask)
        assert torch.equal(labels.weights, expected.weights)
        assert torch.equal(labels.ids[labels.mask], expected.ids[labels.mask])
    _, labels = joined.batch(torch.tensor([4]))
    assert labels.tokens.tolist() == [[9, 1]] and labels.ids[..., 0].tolist() == [[9, 1]]


def test_hard_examples_label_every_token_with_itself():
    _, labels = Examples.hard([[2, 1], [3, 1]], [[4, 5, 1], [6, 1]]).batch(torch.arange(2))
    assert torch.equal(labels.ids[..., 0][labels.mask], labels.tokens[labels.mask])
    assert torch.equal(labels.weights[..., 0], torch.ones(labels.mask.shape))


@pytest.mark.parametrize("kind", ["soft", "hard", "sampled"])
def test_save_and_load_bit_for_bit(examples, kind, tmp_path):
    if kind == "hard":
        examples = Examples.hard([[5, 1], [6, 7, 1]], [[2, 3, 1], [1]])
    if kind == "sampled":
        logits = torch.randn(9, 50, generator=seeded(0))
        examples = Examples(examples.prompts, examples.answers, SoftLabels.sample(logits, 100, seeded(1)))
    path = tmp_path / "inside" / "practice.safetensors"
    examples.save(path, {"task": "test"})
    assert same(Examples.load(path), examples)
    assert [file.name for file in path.parent.iterdir()] == [path.name], "no temporary file stays behind"


def test_a_practice_set_is_the_same_file_twice(examples, tmp_path):
    for name in "ab":
        examples.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_that_is_no_practice_set_is_named(examples, tmp_path):
    path = tmp_path / "practice.safetensors"
    examples.save(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="practice.safetensors is damaged, or not a practice set"):
        Examples.load(path)
    save_file({"prompts.values": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="not a practice set .'prompts.starts'"):
        Examples.load(path)


@pytest.mark.parametrize("prompt, answer, label", [([50], [1], [1]), ([5], [50], [1]), ([5], [1], [50]), ([5], [-1], [1])])
def test_token_ids_out_of_range_are_named(prompt, answer, label):
    examples = Examples(Ragged.of([prompt]), Ragged.of([answer]), SoftLabels.one_hot(torch.tensor(label)))
    with pytest.raises(ValueError, match="the practice set holds token ids from .* the model's go from 0 to 49"):
        examples.check(50, 100)


@pytest.mark.parametrize("prompts, answers, problem", [
    ([], [], "there is nothing to train on"), ([[1]], [[]], "there is nothing to train on: all answers are empty"), ([[1], []], [[1], [1]], "the prompt of row 1 is empty"),
    ([[1], [1, 2, 3]], [[1], [1, 2]], "row 1 has a prompt and answer of 5 tokens, the model only 4 positions")])
def test_what_a_model_cannot_read_is_named(prompts, answers, problem):
    with pytest.raises(ValueError, match=problem):
        Examples.hard(prompts, answers).check(10, 4)


def test_rows_are_counted_from_the_end_too():
    rows = Ragged.of([[1], [2, 3], [4]])
    assert rows[-1] == [4] and rows[-2] == [2, 3]


def test_counts_do_not_join_with_probabilities():
    counts, exact = SoftLabels.sample(torch.zeros(2, 5), 100), SoftLabels.top(torch.zeros(1, 5))
    with pytest.raises(ValueError, match="sampled labels cannot be joined with exact or top-k ones"):
        SoftLabels.join([counts, exact])
    assert SoftLabels.join([exact, SoftLabels.one_hot(torch.tensor([3]))]).kind == "exact"  # a hard label is both


def test_a_label_of_the_whole_vocabulary_is_exact():
    assert SoftLabels.top(torch.zeros(1, 151_936)).kind == "exact"
