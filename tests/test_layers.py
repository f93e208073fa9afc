"""Attention by plain products against PyTorch's own, values and gradients."""

import pytest
import torch

from minicd.layers import attend, plain_attend


def inputs(heads: int, kv_heads: int, queries: int, dtype=torch.float64) -> tuple[torch.Tensor, ...]:
    """q, k, v and a bias that hides a key."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, heads, queries, 8), (3, kv_heads, 7, 8), (3, kv_heads, 7, 8), (1, 1, queries, 7)]
    q, k, v, bias = (torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes)
    bias[..., 2] = -torch.inf
    return q, k, v, bias


def expected(q, k, v, bias, scale: float) -> torch.Tensor:
    """Head by head, as the formula is written."""
    share = q.shape[1] // k.shape[1]
    rows = []
    for h in range(q.shape[1]):
        logits = scale * q[:, h] @ k[:, h // share].mT + bias[:, 0]
        rows.append(logits.softmax(-1) @ v[:, h // share])
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("function", [attend, plain_attend])
def test_attention_is_its_formula(function, heads, kv_heads, queries, scale):
    tensors = [t.requires_grad_() for t in inputs(heads, kv_heads, queries)]
    found, wanted = function(*tensors, scale), expected(*tensors, scale)
    assert torch.allclose(found, wanted, atol=1e-12)
    upstream = torch.randn(wanted.shape, dtype=wanted.dtype, generator=torch.Generator().manual_seed(1))
    for a, b in zip(*(torch.autograd.grad(y, tensors[:3], upstream) for y in (found, wanted))):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2)])
def test_attention_trained_in_bf16_is_near_that_in_fp32(heads, kv_heads):
    exact = [t.requires_grad_() for t in inputs(heads, kv_heads, 5, torch.float32)]
    half = [t.detach().bfloat16().requires_grad_() for t in exact[:3]]
    found, wanted = attend(*half, exact[3].detach(), 0.3), attend(*exact, 0.3)
    assert found.dtype == torch.bfloat16 and torch.allclose(found.float(), wanted, atol=0.05)
    gradients = torch.autograd.grad(found.sum(), half), torch.autograd.grad(wanted.sum(), exact[:3])
    assert all(torch.allclose(a.float(), b, atol=0.1) for a, b in zip(*gradients))


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("queries", [1, 5])
def test_off_the_cpu_no_heads_are_shared(monkeypatch, heads, kv_heads, queries):
    """CUDA's fast kernels take a mask only where every head has keys of its own. Computed by the CPU's kernel here."""
    q, k, v, bias = inputs(heads, kv_heads, queries)
    seen, real = [], torch.nn.functional.scaled_dot_product_attention

    def spy(q, *rest, enable_gqa=False, **how):
        seen.append((rest[0].shape[1], rest[1].shape[1], enable_gqa))
        return real(q.as_subclass(torch.Tensor), *rest, enable_gqa=enable_gqa, **how)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    found = attend(q.as_subclass(Elsewhere), k, v, bias, 0.3)
    assert torch.allclose(found, expected(q, k, v, bias, 0.3), atol=1e-12)
    expanded = kv_heads if queries == 1 else heads  # one query a head: those of a key head are one head's
    assert seen == [(expanded, expanded, False)]


class Elsewhere(torch.Tensor):
    """A tensor of the CPU that says it is on CUDA."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda:1")
