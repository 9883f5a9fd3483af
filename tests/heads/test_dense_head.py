"""Dense heads: every subset of trainable parts, transforms, tied weights, 16 bits, subclasses."""

import pytest
import torch
from head_cases import (
    D,
    T,
    V,
    check_budget,
    check_exact,
    leaf,
    naive_logits,
    placed,
    problem,
    results,
)
from naive import gather_logps
from torch import nn

from dilkern import linear_logps
from dilkern.lm_head import DenseHead, LMHead, as_head

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("train_weight", [True, False])
@pytest.mark.parametrize("train_bias", [True, False, None])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (0.25, 0.0), (2.0, 5.0)])
def test_every_subset_of_gradients(train_weight, train_bias, scale, softcap):
    weight = leaf(V, D, grad=train_weight)
    bias = None if train_bias is None else leaf(V, grad=train_bias)
    params = [p for p in (weight, bias) if p is not None and p.requires_grad]
    head = DenseHead(weight, bias, scale=scale, softcap=softcap)
    check_exact(head, lambda: (weight, bias), params, scale=scale, softcap=softcap)


def test_temperature_divides_the_logits_after_the_softcap():
    linear = placed(nn.Linear(D, V).double())
    source = LMHead(lambda: linear, scale=0.5 / 0.7, softcap=5.0 / 0.7)
    hidden, labels, _ = problem()
    logits = naive_logits(hidden, linear.weight, linear.bias, 0.5, 5.0) / 0.7
    torch.testing.assert_close(linear_logps(hidden, source, labels), gather_logps(logits, labels))


@pytest.mark.parametrize("shift", [False, True])
def test_tied_weight_gets_the_sum_of_both_gradients(shift):
    embedding = placed(nn.Embedding(V, D).double())
    linear = placed(nn.Linear(D, V, bias=False).double())
    linear.weight = embedding.weight
    _, labels, g = problem()
    ids = placed(torch.randint(0, V, (T,)))

    def hidden():
        return torch.tanh(embedding(ids))

    got = results(linear_logps(hidden(), linear, labels, shift=shift), g, [embedding.weight])
    logits = hidden() @ linear.weight.T
    if shift:
        labels = labels.clone()
        labels[0], logits = -100, logits.roll(1, 0)
    want = results(gather_logps(logits, labels), g, [embedding.weight])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_16_bits_within_twice_the_error_of_torch(dtype, softcap):
    hidden, labels, g = problem(dtype)
    linear = placed(nn.Linear(D, V).to(dtype))
    inputs = [hidden, linear.weight, linear.bias]
    head = as_head(linear, softcap=softcap)
    got = results(linear_logps(hidden, head, labels), g, inputs)
    logits = naive_logits(hidden, *inputs[1:], 1.0, softcap)
    peer = results(gather_logps(logits.float(), labels), g, inputs)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    logits = naive_logits(*wide, 1.0, softcap)
    check_budget(got, peer, results(gather_logps(logits, labels), g, wide))


def test_autocast_takes_fp32_masters_with_16_bit_products(device):
    hidden, labels, _ = problem(torch.float32)
    linear = placed(nn.Linear(D, V))
    with torch.autocast(device, dtype=torch.bfloat16):
        got = linear_logps(hidden, linear, labels)
    rounded = linear_logps(
        hidden.bfloat16(), DenseHead(linear.weight.bfloat16(), linear.bias.bfloat16()), labels
    )
    # The bias alone is not rounded under autocast.
    torch.testing.assert_close(got, rounded, atol=2e-3, rtol=0)
    (got.sum()).backward()
    assert linear.weight.grad.dtype is torch.float32


def test_subclasses_of_linear_that_keep_its_forward_are_dense():
    class Named(nn.Linear):
        pass

    named = placed(Named(D, V).double())
    check_exact(named, lambda: (named.weight, named.bias), [named.weight])
    nn.utils.parametrizations.weight_norm(named)
    check_exact(named, lambda: (named.weight, named.bias), list(named.parameters()))


def test_logits_are_the_naive_ones():
    weight = leaf(V, D, grad=False)
    hidden, _, _ = problem()
    got = DenseHead(weight, scale=2.0, softcap=3.0).logits(hidden, block_size=100)
    torch.testing.assert_close(got, naive_logits(hidden, weight, None, 2.0, 3.0))
