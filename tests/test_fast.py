"""What speeds decoding up must not change it: packed matrices, the step that can be recorded, smaller batches."""

import json
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_t5

from minicd import sampling
from minicd.runtime import fast
from minicd.hf.checkpoint import load
from minicd.runtime.fast import pack_weights
from minicd.sampling import generate, score
from minicd.tokenizer import word_tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
FOLDERS = ["t5-v1.0", "t5-v1.1", "gpt2", "xglm", "llama", "qwen3"]


@pytest.fixture(scope="module", params=FOLDERS)
def model(request):
    return load(FIXTURES / request.param)[0]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 30, (n,), generator=generator).tolist() for n in (9, 1, 4, 9, 7, 2, 3, 8)]


def as_batch(model, prompts: list[list[int]]) -> torch.Tensor:
    return sampling.pad(prompts, model.config.pad_token_id)


@torch.no_grad()
def steps(model, prompts: torch.Tensor, tokens: torch.Tensor, on_device: bool) -> torch.Tensor:
    """Logits [T + 1, B, V] of fixed tokens [T, B], with the cache's position as a number or as a tensor."""
    first, cache = model.prefill(prompts, len(tokens) + 1)
    logits = [first]
    if on_device:
        cache.cache_position = torch.tensor([cache.position])
    for t, row in enumerate(tokens):
        logits.append(model.step(row, cache))
        if t == 1:
            cache.keep(torch.arange(len(prompts)))
    return torch.stack(logits)


def test_a_step_that_can_be_recorded_computes_what_a_plain_one_does(model, prompts):
    """The recorded step reads all of the cache's memory behind a mask, the plain one only what is filled."""
    tokens = torch.randint(3, 30, (6, len(prompts)), generator=torch.Generator().manual_seed(1))
    plain, recordable = (steps(model, as_batch(model, prompts), tokens, how) for how in (False, True))
    assert torch.allclose(plain, recordable, atol=2e-5)
    assert not torch.allclose(plain[2], plain[3], atol=1e-2)


def test_a_recordable_step_makes_no_tensor_depend_on_the_step_number(model, prompts):
    """Replaying it must be enough: with only the position moved on, it gives what plain steps give."""
    batch, token = as_batch(model, prompts), torch.full((len(prompts),), 5)
    plain = steps(model, batch, token.expand(3, -1), on_device=False)
    with torch.no_grad():
        _, cache = model.prefill(batch, 4)
        cache.cache_position = torch.tensor([cache.position])
        for t in range(3):
            cache.position = -10**6  # what a replay does not know
            assert torch.allclose(model.step(token, cache), plain[t + 1], atol=2e-5)


@pytest.mark.skipif(not fast.can_pack(), reason="this PyTorch packs no weights")
def test_packed_matrices_change_no_completion(model, prompts, monkeypatch):
    monkeypatch.setattr(fast, "PACKED_PAYS", 0)
    used = []
    call = fast.PackedLinear.__call__
    monkeypatch.setattr(fast.PackedLinear, "__call__", lambda self, x: (used.append(1), call(self, x))[1])
    quick, logits = generate(model, prompts, 12, temperature=0), score(model, prompts, prompts)
    monkeypatch.setattr(fast, "can_pack", lambda: False)
    count = len(used)
    assert quick == generate(model, prompts, 12, temperature=0)
    assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(logits, score(model, prompts, prompts)))
    assert count > 0 and len(used) == count


@pytest.mark.skipif(not fast.can_pack(), reason="this PyTorch packs no weights")
def test_weights_changed_between_two_calls_count(prompts, monkeypatch):
    """A packed copy must not outlive the call that made it."""
    monkeypatch.setattr(fast, "PACKED_PAYS", 0)
    model = tiny_t5(30, initializer_factor=3.0)
    generate(model, prompts, 5, temperature=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.mul_(0.5)
    assert generate(model, prompts, 5, temperature=0) == generate(load_copy(model), prompts, 5, temperature=0)


def load_copy(model):
    other = tiny_t5(30, seed=1)
    other.load_state_dict(model.state_dict())
    return other


def test_an_error_inside_leaves_the_model_unpacked():
    model = tiny_t5(30)
    with pytest.raises(KeyError), pack_weights(model):
        assert not fast.can_pack() or "forward" in vars(model.lm_head)
        raise KeyError
    assert not any("forward" in vars(m) or "head" in vars(m) for m in model.modules())


@pytest.mark.parametrize("supported", [True, False])
def test_packed_under_autocast_is_bf16(monkeypatch, supported):
    """On a CPU for which oneDNN has no such product, the plain one must do."""
    if supported and not (fast.can_pack() and fast.packs_bf16()):
        pytest.skip("this CPU multiplies no packed bf16")
    monkeypatch.setattr(fast, "PACKED_PAYS", 0)
    monkeypatch.setattr(fast, "packs_bf16", lambda: supported)
    model, x = tiny_t5(30), torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        linear = fast.PackedLinear(model.lm_head.weight)
        expected = torch.nn.functional.linear(x, model.lm_head.weight)
        for _ in range(3):  # plain, packed, packed already
            assert torch.allclose(linear(x), expected, atol=1e-2) and linear(x).dtype == torch.bfloat16
    assert (linear.prepared is not None) == supported


def short_of_memory(monkeypatch, model, most: int, error: Exception) -> list[int]:
    """Prefill fails for batches of more than `most` rows. Returns a list that will hold the sizes tried."""
    tried, prefill = [], model.prefill

    def failing(prompts, *rest):
        tried.append(len(prompts))
        if len(prompts) > most:
            raise error
        return prefill(prompts, *rest)
    monkeypatch.setattr(model, "prefill", failing)
    return tried


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")])
def test_a_batch_that_does_not_fit_is_halved(prompts, monkeypatch, error):
    model = tiny_t5(30, initializer_factor=3.0)
    expected = generate(model, prompts, 8, temperature=0)
    tried = short_of_memory(monkeypatch, model, 3, error)
    with pytest.warns(UserWarning, match="out of memory at a batch of 8; going on with batches of 4"):
        assert generate(model, prompts, 8, temperature=0) == expected
    assert tried == [8, 4, 2, 2, 2, 2]


def test_halving_leaves_the_random_numbers_as_they_were(prompts, monkeypatch):
    model = tiny_t5(30, initializer_factor=3.0)
    expected = generate(model, prompts, 8, generator=torch.Generator().manual_seed(3), batch_size=4)
    short_of_memory(monkeypatch, model, 4, MemoryError())
    with pytest.warns(UserWarning, match="out of memory"):
        assert generate(model, prompts, 8, generator=torch.Generator().manual_seed(3)) == expected


def test_one_row_that_does_not_fit_and_other_errors_are_errors(prompts, monkeypatch):
    model = tiny_t5(30)
    short_of_memory(monkeypatch, model, 0, MemoryError())
    with pytest.raises(MemoryError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        generate(model, prompts, 8)
    short_of_memory(monkeypatch, model, 0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        generate(model, prompts, 8)


class FailingStep:
    """A recording that fails at its end, when it has moved the cache on."""

    def __init__(self, model, tokens, cache):
        cache.cache_position = torch.full((1,), cache.position)
        model.step(tokens, cache)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")


def unrecorded(model, tokens, cache):
    """The step that a RecordedStep would record."""
    cache.cache_position = torch.full((1,), cache.position, device=tokens.device)
    return partial(model.step, cache=cache)


def sampled(model, prompts, temperature: float, precision: str = "fp32") -> list[list[int]]:
    generator = torch.Generator(next(model.parameters()).device).manual_seed(3)
    return generate(model, prompts, 40, temperature, generator=generator, precision=precision)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_recording_that_fails_at_its_end_changes_no_completion(model, prompts, monkeypatch, temperature):
    expected = sampled(model, prompts, temperature)
    monkeypatch.setattr(fast, "pays", lambda tokens, steps: True)
    monkeypatch.setattr(fast, "RecordedStep", FailingStep)
    with pytest.warns(UserWarning, match="goes on without a CUDA graph: operation not permitted when .* capturing$"):
        assert sampled(model, prompts, temperature) == expected


def test_what_is_recorded_writes_what_is_not(model, prompts, monkeypatch):
    """Run as it is, without a recording, also where rows leave the batch."""
    expected = sampled(model, prompts, temperature=0)
    used = []
    monkeypatch.setattr(fast, "pays", lambda tokens, steps: True)
    monkeypatch.setattr(fast, "RecordedStep", lambda *how: (used.append(1), unrecorded(*how))[1])
    assert sampled(model, prompts, temperature=0) == expected and used


class PretendCuda:
    """Stands for torch.cuda where there is none: steps run as they are, and it notes on which device and stream.

    A "replay" is a plain step: the graph keeps the call that was "captured" in it. `fails`: captures do, at their end.
    """

    def __init__(self, monkeypatch, fails: bool = False):
        self.fails, self.current, self.stream_now = fails, "cuda:0", "the device's own stream"
        self.made, self.used, self.captures = [], [], []
        for name in ("device", "stream", "graph", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", self.new_stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", self.Graph)
        monkeypatch.setattr(fast, "pays", lambda tokens, steps: True)
        fast.recording_stream.cache_clear()

    class Graph:
        def replay(self) -> None:
            raise NotImplementedError("only the test of one step replays")

    def new_stream(self, device):
        self.made.append(str(device))
        return SimpleNamespace(device=str(device), wait_stream=lambda other: None)

    def current_stream(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    @contextmanager
    def device(self, device):
        before, self.current = self.current, str(device)
        yield
        self.current = before

    @contextmanager
    def stream(self, stream):
        self.used.append((self.current, stream.device))
        yield

    @contextmanager
    def graph(self, graph, stream=None):
        self.captures.append((self.current, stream.device))
        yield
        if self.fails:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_capture_that_fails_at_its_end_changes_no_completion(model, prompts, monkeypatch, temperature):
    """The real RecordedStep, which has warmed up and moved the cache on when the end of its capture fails."""
    expected = sampled(model, prompts, temperature)
    cuda = PretendCuda(monkeypatch, fails=True)
    with pytest.warns(UserWarning, match="goes on without a CUDA graph: CUDA error: operation not permitted"):
        assert sampled(model, prompts, temperature) == expected
    assert cuda.captures


def test_all_recordings_share_the_stream_of_their_device(model, prompts, monkeypatch):
    """A library keeps a workspace for each stream; and a stream of another device would record nothing."""
    cuda = PretendCuda(monkeypatch)
    batch, token = as_batch(model, prompts), torch.full((len(prompts),), 5)
    plain = steps(model, batch, token.expand(2, -1), on_device=False)
    for _ in range(3):
        _, cache = model.prefill(batch, 4)
        position = cache.position
        with torch.no_grad():
            step = fast.stepper(model, token, cache, 3)
        assert isinstance(step, fast.RecordedStep) and torch.allclose(step.logits, plain[1], atol=2e-5)
        assert cache.position == position, "nothing was decoded yet"
    assert cuda.made == ["cpu"], "the tokens' device, which is the CPU here"
    assert cuda.used == cuda.captures == [("cpu", "cpu")] * 3 and cuda.current == "cuda:0"


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture
def on_cuda(model):
    yield model.to("cuda")
    model.to("cpu")


@needs_cuda
def test_a_cuda_graph_changes_no_completion(on_cuda, prompts, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recorded = sampled(on_cuda, prompts, temperature=0)
    monkeypatch.setattr(fast, "RECORD_FROM", 10**9)
    assert recorded == sampled(on_cuda, prompts, temperature=0)


@needs_cuda
@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cuda_graph_replays_its_step_exactly(on_cuda, prompts, monkeypatch, temperature, precision):
    """Against the same step without a recording: a plain one attends to less, which bf16 may round otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recorded = sampled(on_cuda, prompts, temperature, precision)
    monkeypatch.setattr(fast, "RecordedStep", unrecorded)
    assert recorded == sampled(on_cuda, prompts, temperature, precision)


WORDS = ["zero", "one", "two", "three", "stop", "here"]


def greedy_chain(text: list[str]):
    """A model of the tiny tokenizer's vocabulary which writes `text` whatever it is asked: its step is replaced."""
    tokenizer = word_tokenizer(WORDS)
    model, ids = tiny_t5(len(tokenizer)), tokenizer.encode(" ".join(text))
    step = model.step

    def scripted(tokens, cache):
        next_one = torch.tensor(ids)[cache.position % len(ids)]
        return torch.nn.functional.one_hot(next_one, len(tokenizer)).float() + 0 * step(tokens, cache)
    model.step = scripted
    return model, tokenizer


@pytest.mark.parametrize("stop, most, kept, reason", [
    ((), 20, "one two three stop here zero", "eos"), ((), 3, "one two three", "length"),
    (("stop here",), 20, "one two three", "stop"), (("stop",), 20, "one two three", "stop"), (("two",), 20, "one", "stop"),
    (("here", "three"), 20, "one two", "stop"), (("here two",), 20, "one two three stop here zero", "eos"),
    (("o three",), 20, "one", "stop"),  # begins in the middle of the second word
    ((6,), 20, "one two", "stop"), ((6, "two"), 20, "one", "stop"), (("one",), 20, "", "stop")])
def test_stop_strings_and_reasons(stop, most, kept, reason):
    model, tokenizer = greedy_chain(["one", "two", "three", "stop", "here", "zero"])
    assert tokenizer.encode("three")[0] == 6
    [tokens], [why] = generate(model, [[5]], most, temperature=0, stop=stop, tokenizer=tokenizer, reasons=True)
    assert (tokenizer.decode(tokens), why) == (kept, reason)


def test_a_stop_string_ends_the_sampling():
    """And not only the text: no step is made after it has been seen."""
    model, tokenizer = greedy_chain(["one", "two"] * 50)
    calls, step = [], model.step
    model.step = lambda tokens, cache: (calls.append(1), step(tokens, cache))[1]
    generate(model, [[5], [6]], 90, temperature=0, stop=["two one"], tokenizer=tokenizer)
    assert len(calls) <= 3 + sampling.LOOK_EVERY


@pytest.mark.parametrize("stop, tokenizer", [(["x"], None), ([""], word_tokenizer(WORDS))])
def test_stop_strings_that_cannot_be_looked_for(stop, tokenizer):
    with pytest.raises(ValueError, match="stop strings"):
        generate(tiny_t5(9), [[5]], 4, stop=stop, tokenizer=tokenizer)


@pytest.mark.parametrize("prompts, words", [([[3], [3, 30]], "outside 0…29"), ([[3, -1]], "outside 0…29"),
                                            ([[]], "prompt 0 is empty")])
def test_prompts_of_another_tokenizer_are_refused(prompts, words):
    with pytest.raises(ValueError, match=words):
        generate(tiny_t5(30), prompts, 4)


@pytest.mark.parametrize("folder", ["gpt2", "llama"])
def test_a_prompt_too_long_for_the_model_is_named(folder):
    model, _ = load(FIXTURES / folder)
    most = json.loads((FIXTURES / folder / "config.json").read_text()).get("n_positions") or model.config.max_positions
    assert len(generate(model, [[5] * (most - 4)], 4, temperature=0)[0]) <= 4
    with pytest.raises(ValueError, match=f"prompt 1 has {most - 3} tokens; with 4 new ones .* than the model's {most}"):
        generate(model, [[5], [5] * (most - 3)], 4)
