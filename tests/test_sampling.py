"""The sampler against the uncached model, and its draws against the distribution that they claim to come from."""

import pytest
import torch
from helpers import tiny_decoder, tiny_t5

from minicd import sampling
from minicd.runtime import memory
from minicd.sampling import LOOK_EVERY, choose, generate, score
from minicd.t5 import Cache
from minicd.tokenizer import word_tokenizer

EOS = 1


@pytest.fixture(scope="module")
def model():
    """Large weights: the greedy completions differ from prompt to prompt, and end at different steps."""
    return tiny_t5(12, initializer_factor=3.0)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """40 prompts of 1 to 11 tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 12, (40,), generator=generator)
    return [torch.randint(2, 12, (int(n),), generator=generator).tolist() for n in lengths]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uncached_greedy(model, prompt: list[int], max_new_tokens: int, stops: set[int]) -> list[int]:
    """One prompt at a time, the whole forward pass for every token."""
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < max_new_tokens:
            token = int(model(torch.tensor([prompt]), torch.tensor([[*answer, 0]]))[0, -1].argmax())
            if token in stops:
                break
            answer.append(token)
    return answer


def first_step(model, prompt: list[int]) -> torch.Tensor:
    """The model's distribution of the first token."""
    with torch.no_grad():
        return model(torch.tensor([prompt]), torch.tensor([[0]]))[0, 0].double().softmax(-1)


def first_tokens(model, prompt: list[int], rows: int, **how) -> torch.Tensor:
    """Counts [V] of the first token in many samples; an empty completion is the stop token."""
    completions = generate(model, [prompt] * rows, 1, generator=seeded(7), batch_size=1000, **how)
    return torch.bincount(torch.tensor([c[0] if c else EOS for c in completions]), minlength=model.config.vocab_size)


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities * counts.sum()
    assert expected.min() >= 5, "too few samples for the approximation"
    return ((counts - expected).square() / expected).sum().item()


def test_greedy_is_the_argmax_of_the_uncached_model(model, prompts):
    completions = generate(model, prompts[:15], 20, temperature=0)
    assert completions == [uncached_greedy(model, prompt, 20, {EOS}) for prompt in prompts[:15]]
    assert len(set(map(tuple, completions))) > 5, "the prompts matter"


def test_finished_rows_leave_the_batch_without_a_trace(model, prompts, monkeypatch):
    """Far more steps than LOOK_EVERY, rows that stop early, late and never."""
    kept = []
    keep = Cache.keep
    monkeypatch.setattr(Cache, "keep", lambda self, rows: (kept.append(len(rows)), keep(self, rows))[1])
    most = 5 * LOOK_EVERY
    completions = generate(model, prompts, most, temperature=0, stop=[5])
    assert completions == [uncached_greedy(model, prompt, most, {EOS, 5}) for prompt in prompts]
    lengths = [len(c) for c in completions]
    assert kept and kept == sorted(kept, reverse=True)  # the batch did shrink
    assert min(lengths) < LOOK_EVERY and most in lengths and any(LOOK_EVERY < n < most for n in lengths)


def test_a_prompt_alone_is_the_prompt_in_any_batch(model, prompts):
    together = generate(model, prompts, 20, temperature=0)
    assert together == [generate(model, [prompt], 20, temperature=0)[0] for prompt in prompts]
    assert together == generate(model, prompts, 20, temperature=0, batch_size=7)
    assert together[::-1] == generate(model, prompts[::-1], 20, temperature=0)


@pytest.mark.parametrize("begins_alike", [True, False])
@pytest.mark.parametrize("make", [tiny_t5, tiny_decoder])
def test_batches_have_no_more_rows_than_their_keys_and_values_have_room(make, begins_alike, prompts, monkeypatch):
    """The longer the prompts, the fewer rows; what all begin with is once in a decoder's cache, in each row of a T5's."""
    model, sizes, original = make(12), [], sampling.sample_batch
    prompts = [[2] * 20 * begins_alike + [3 + i % 2, *row] for i, row in enumerate(prompts)]
    expected = generate(model, prompts, 10, temperature=0)

    def sample_batch(model, batch, *more):
        own = batch.shape[1] - 20 * (begins_alike and make is tiny_decoder)
        sizes.append((len(batch), own))
        return original(model, batch, *more)
    monkeypatch.setattr(sampling, "sample_batch", sample_batch)
    a_token = 2 * 8 * 2  # keys and values × size of a head × 2 layers of a head each, or a layer of two
    monkeypatch.setattr(memory, "CACHED_AT_ONCE", 200 * a_token)
    assert generate(model, prompts, 10, temperature=0) == expected
    assert [rows for rows, own in sizes[:-1]] == [200 // (own + 10) for rows, own in sizes[:-1]]
    assert sizes[0][0] < sizes[-2][0] and sum(rows for rows, own in sizes) == len(prompts)


def test_the_seed_decides_the_sample(model, prompts):
    first, again, other = (generate(model, prompts, 20, generator=seeded(seed)) for seed in (1, 1, 2))
    assert first == again and first != other
    torch.manual_seed(5)
    unseeded = generate(model, prompts, 20)
    torch.manual_seed(5)
    assert unseeded == generate(model, prompts, 20)  # without a generator, PyTorch's own seed


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_first_tokens_have_the_models_frequencies(temperature):
    """12 tokens, 11 degrees of freedom: chi-square beyond 31.26 has probability 0.001."""
    model, prompt, rows = tiny_t5(12, initializer_factor=1.0), [3, 4, EOS], 4000
    p = first_step(model, prompt)
    at_temperature = (p.log() / temperature).softmax(-1)
    counts = first_tokens(model, prompt, rows, temperature=temperature)
    assert counts.sum() == rows
    assert chi_square(counts, at_temperature) < 31.26
    wrong = (p.log() / (3 - temperature)).softmax(-1)  # the other temperature's frequencies
    assert chi_square(counts, wrong) > 100, "the test would notice"


def test_pairs_of_tokens_have_the_models_frequencies():
    """The second token too, which comes through the cache: 31 outcomes, 30 degrees of freedom; beyond 59.70 with
    probability 0.001."""
    model, prompt, rows = tiny_t5(6, initializer_factor=1.0, seed=1), [3, 4, EOS], 16_000
    completions = generate(model, [prompt] * rows, 2, generator=seeded(3), batch_size=4000)
    first = first_step(model, prompt)
    probabilities, counts = [first[EOS]], [sum(c == [] for c in completions)]
    for a in range(6):
        if a == EOS:
            continue
        with torch.no_grad():
            second = model(torch.tensor([prompt]), torch.tensor([[a, 0]]))[0, 1].double().softmax(-1)
        ends = [c for c in completions if c[:1] == [a]]
        for b in range(6):
            probabilities.append(first[a] * second[b])
            counts.append(sum((c[1] if len(c) > 1 else EOS) == b for c in ends))
    p, n = torch.stack(probabilities), torch.tensor(counts)
    assert n.sum() == rows and p.sum().item() == pytest.approx(1)
    assert chi_square(n, p) < 59.70


def sampled_set(logits: list[float], **how) -> set[int]:
    """Which tokens ever come out of 2000 draws."""
    settings = {"temperature": 1.0, "top_k": None, "top_p": None, **how}
    draws = choose(torch.tensor(logits).expand(2000, -1), *settings.values(), seeded(0))
    return set(draws.tolist())


# probabilities 0.1, 0.4, 0.2, 0.3; in order of size: token 1, 3, 2, 0, and their sums 0.4, 0.7, 0.9, 1.0
FOUR = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().tolist()


@pytest.mark.parametrize("k, expected", [(1, {1}), (2, {1, 3}), (3, {1, 2, 3}), (4, {0, 1, 2, 3}), (99, {0, 1, 2, 3})])
def test_top_k_keeps_the_k_most_likely(k, expected):
    assert sampled_set(FOUR, top_k=k) == expected


@pytest.mark.parametrize("p, expected", [(0.01, {1}), (0.35, {1}), (0.45, {1, 3}), (0.65, {1, 3}), (0.75, {1, 2, 3}),
                                         (0.95, {0, 1, 2, 3}), (1.0, {0, 1, 2, 3})])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p, expected):
    assert sampled_set(FOUR, top_p=p) == expected


def test_top_p_counts_what_top_k_and_temperature_leave():
    # of the two most likely, renormalised: 0.4 / 0.7 = 0.571 and 0.3 / 0.7 = 0.429
    assert sampled_set(FOUR, top_k=2, top_p=0.55) == {1}
    assert sampled_set(FOUR, top_k=2, top_p=0.6) == {1, 3}
    # at temperature 1/2 the probabilities are squared: 0.01, 0.16, 0.04, 0.09 of 0.30, so token 1 alone has 0.533
    assert sampled_set(FOUR, temperature=0.5, top_p=0.5) == {1}


def test_what_top_k_and_top_p_keep_stays_in_proportion():
    draws = choose(torch.tensor(FOUR).expand(7000, -1), 1.0, 2, None, seeded(1))
    assert torch.bincount(draws)[1].item() / 7000 == pytest.approx(4 / 7, abs=0.024)  # four standard deviations
    draws = choose(torch.tensor(FOUR).expand(7000, -1), 1.0, None, 0.6, seeded(2))
    assert torch.bincount(draws)[1].item() / 7000 == pytest.approx(4 / 7, abs=0.024)


def test_generate_passes_top_k_and_top_p_on():
    model, prompt = tiny_t5(12, initializer_factor=1.0), [3, 4, EOS]
    ordered = first_step(model, prompt).sort(descending=True)
    assert first_tokens(model, prompt, 2000, top_k=3).nonzero()[:, 0].tolist() == sorted(ordered.indices[:3].tolist())
    enough = int((ordered.values.cumsum(0) < 0.5).sum()) + 1
    assert enough > 1
    assert first_tokens(model, prompt, 2000, top_p=0.5).nonzero()[:, 0].tolist() == sorted(ordered.indices[:enough].tolist())


def test_top_k_of_one_is_greedy(model, prompts):
    assert generate(model, prompts, 10, top_k=1, generator=seeded(0)) == generate(model, prompts, 10, temperature=0)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_nothing_comes_after_a_stop_token_and_none_is_returned(model, prompts, temperature):
    most = 3 * LOOK_EVERY
    completions = generate(model, prompts, most, temperature, stop=[5, 8], generator=seeded(0))
    assert not any({EOS, 5, 8} & set(c) for c in completions)
    lengths = {len(c) for c in completions}
    assert max(lengths) <= most and len(lengths) > 2


def test_a_finished_row_goes_on_with_stop_tokens(model, prompts):
    """Inside the batch, before the answers are cut: also in rows that left it."""
    with torch.no_grad():
        [out] = sampling.sample_batch(model, sampling.pad(prompts, 0), 24, sampling.Stops(model, [5], None),
                                      lambda logits: (choose(logits, 0),))
    ended = torch.isin(out, torch.tensor([EOS, 5])).int().cummax(1).values.bool()
    after = ended.roll(1, 1)
    after[:, 0] = False
    assert 0 < ended[:, -1].sum() < len(prompts) and (out[after] == EOS).all()


def test_stop_tokens_only_cut_the_greedy_completion(model, prompts):
    whole = generate(model, prompts, 20, temperature=0)
    cut = generate(model, prompts, 20, temperature=0, stop=[5])
    assert cut == [c[: c.index(5)] if 5 in c else c for c in whole] and cut != whole


def test_no_prompts_no_completions(model):
    assert generate(model, [], 5) == [] and score(model, [], []) == []


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"temperature": -0.1}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1},
                                   {"top_p": -0.5}])
def test_settings_out_of_range(model, wrong):
    settings = {"max_new_tokens": 5, **wrong}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        generate(model, [[3]], **settings)


def test_an_unknown_precision_is_named(model):
    for call, what in ((generate, 5), (score, [[4]])):
        with pytest.raises(ValueError, match="precision 'half' is unknown; known: auto, bf16, fp32"):
            call(model, [[3]], what, precision="half")


def test_an_empty_prompt_is_named(model):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(model, [[3], [], [4]], 5)


def test_score_equals_forward(model, prompts):
    """Each answer alone through the uncached model, whatever batch it was scored in."""
    answers = [prompt[::-1][: 1 + i % 4] for i, prompt in enumerate(prompts)]
    answers[3] = []
    for batch_size in (512, 6):
        scored = score(model, prompts, answers, batch_size)
        for prompt, answer, logits in zip(prompts, answers, scored):
            assert logits.shape == (len(answer), 12) and logits.dtype == torch.float32
            if answer:
                with torch.no_grad():
                    alone = model(torch.tensor([prompt]), torch.tensor([answer]))[0]
                assert torch.allclose(logits, alone, atol=2e-4, rtol=1e-4)


def test_score_agrees_with_the_greedy_sampler(model, prompts):
    completions = generate(model, prompts, 10, temperature=0)
    assert [z.argmax(-1).tolist() for z in score(model, prompts, completions)] == completions


def test_dropout_is_off_in_a_model_that_is_in_training(prompts):
    """And back on afterwards: students are asked in the middle of it."""
    model = tiny_t5(12, initializer_factor=3.0, dropout_rate=0.5)
    expected, logits = generate(model, prompts, 8, temperature=0), score(model, prompts, prompts)
    model.train()
    assert generate(model, prompts, 8, temperature=0) == expected and model.training
    assert all(torch.equal(a, b) for a, b in zip(score(model, prompts, prompts), logits)) and model.training


def test_bf16_is_close_to_fp32(model, prompts):
    for a, b in zip(score(model, prompts, prompts), score(model, prompts, prompts, precision="bf16")):
        assert b.dtype == torch.float32 and not torch.equal(a, b)
        assert (a.softmax(-1) - b.softmax(-1)).abs().mean() < 0.05


def test_a_generator_of_another_device_is_named():
    """A model on the meta device stands for one on CUDA."""
    model = tiny_t5(12).to("meta")
    sentence = r"the generator is on cpu and the model on meta: make it with torch.Generator\('meta'\)"
    with pytest.raises(ValueError, match=sentence):
        generate(model, [[3]], 5, generator=seeded(0))


def test_on_cuda_rows_leave_the_batch_less_often(model, prompts, monkeypatch):
    """A smaller step must be recorded there. What is written stays the same."""
    def run(share: float) -> tuple[list[list[int]], int]:
        count, keep = [], Cache.keep
        with monkeypatch.context() as patch:
            patch.setattr(Cache, "keep", lambda *how: (count.append(1), keep(*how))[1])
            patch.setattr(sampling, "SHRINK_BELOW", share)
            return generate(model, prompts, 40, temperature=0), len(count)
    (often, many), (seldom, few) = (run(sampling.pace(torch.device(kind))[1]) for kind in ("cpu", "cuda"))
    assert often == seldom and few < many
    assert sampling.pace(torch.device("cuda"))[0] == LOOK_EVERY > sampling.pace(torch.device("cpu"))[0] == 1


def test_a_greedy_model_without_numbers_is_told():
    model = tiny_t5(12)
    model.shared.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="the model's logits are not numbers"):
        generate(model, [[2, 3]], 4, temperature=0)


def test_a_stop_string_may_be_a_special_token():
    """Decoding leaves it out, so that no text ever holds it."""
    tokenizer = word_tokenizer([*"abcdefgh", "<|end|>"])
    tokenizer.backend.add_special_tokens(["<|end|>"])
    end, model = tokenizer.backend.token_to_id("<|end|>"), tiny_t5(len(tokenizer))
    assert tokenizer.decode([end]) == ""
    def always(logits):
        return torch.full((len(logits),), end),
    completions, reasons, _ = generate(model, [[2, 3]], 4, stop=["<|end|>"], tokenizer=tokenizer, pick=always)
    assert (completions, reasons) == ([[]], ["stop"])
