"""The word filter against the one of cut-cross-entropy, which drops what it skips."""

import pytest
import torch
from dropping import CCE_TILE, dropped_logps
from interpreter import INTERPRET

from dilkern import filter_report, linear_logps

ROWS, WORDS, WIDTH = 100, 1000, 32


def head(dtype=torch.float64):
    """A peaked softmax with a long tail: one coordinate is a falling unigram bias."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(WORDS, WIDTH, generator=rng, dtype=torch.float64) / WIDTH**0.5
    weight[:, 0] = -0.5 * (torch.arange(WORDS) + 2.7).log()
    hidden = 2 * torch.randn(ROWS, WIDTH, generator=rng, dtype=torch.float64)
    hidden[:, 0] = 4
    labels = torch.multinomial((hidden @ weight.T).softmax(1), 1, generator=rng).squeeze(1)
    return [t.to(dtype).requires_grad_() for t in (hidden, weight)] + [labels]


def gradients(logps, hidden, weight, g=None):
    return torch.autograd.grad(logps, (hidden, weight), torch.ones_like(logps) if g is None else g)


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


def mean_error(got, want):
    return relative(got.sum(0), want.sum(0))


def exact(hidden, weight, labels):
    return -torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="none")


def test_without_a_threshold_the_rule_is_cut_cross_entropy_itself():
    """Its torch implementation, without the compiler."""
    package = pytest.importorskip("cut_cross_entropy")
    hidden, weight, labels = head(torch.float32)
    with torch.compiler.set_stance("force_eager"):
        theirs = -package.linear_cross_entropy(
            hidden, weight, labels, reduction="none", impl="torch_compile"
        )
        want = gradients(theirs, hidden, weight)
    for tile in ((1, 1), CCE_TILE):
        mine = dropped_logps(hidden, weight, labels, 0.0, tile)
        torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(gradients(mine, hidden, weight), want, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not INTERPRET, reason="TRITON_INTERPRET=1 runs its kernel on a CPU")
def test_the_rule_drops_what_the_kernel_of_cut_cross_entropy_drops(eps=2.0**-5):
    """fp16, because its backward takes nothing wider; what is dropped is far above its rounding."""
    module = pytest.importorskip("cut_cross_entropy.cce_backward")
    half = [t.detach().half() for t in head()[:2]]
    hidden, weight = (t.double().requires_grad_() for t in half)
    labels, g = head()[2], torch.rand(ROWS, generator=torch.Generator().manual_seed(1))
    z = (hidden @ weight.T).detach()
    theirs = module.cce_backward_kernel(
        g, half[0], half[1].requires_grad_(), z.logsumexp(1).float(), None, None, eps,
        targets=labels, vocab_ordering=z.mean(0).argsort().int(),
    )  # fmt: skip
    mine = gradients(dropped_logps(hidden, weight, labels, eps, CCE_TILE), hidden, weight, g)
    whole = gradients(exact(hidden, weight, labels), hidden, weight, g)
    for have, want, unfiltered in zip(theirs, mine, whole):
        error = relative(-have.double(), want)  # of a loss, not of log-probs
        assert error < min(1e-3, relative(want, unfiltered) / 2)


def test_dropping_by_element_and_by_tile_errs_towards_the_rare_words():
    """Less of the probability mass is left than there was, so the mean gradient is off."""
    hidden, weight, labels = head()
    want, _ = gradients(exact(hidden, weight, labels), hidden, weight)
    errors = []
    for tile in ((1, 1), (ROWS, 1)):
        got, _ = gradients(dropped_logps(hidden, weight, labels, 2.0**-9, tile), hidden, weight)
        assert mean_error(got, want) > 2 * relative(got, want) > 1e-3
        errors.append(relative(got, want))
    assert errors[1] < errors[0]  # a word that is loud anywhere is kept everywhere


@pytest.mark.parametrize("filter_eps", [2.0**-13, 2.0**-14])
def test_at_equal_numbers_of_loud_words_dropping_has_the_larger_mean_error(filter_eps):
    """One block, so that the number of words that are multiplied is one number."""
    hidden, weight, labels = head()
    want = gradients(exact(hidden, weight, labels), hidden, weight)
    ours = linear_logps(hidden, weight, labels, filter_eps=filter_eps)
    mine = gradients(ours, hidden, weight)
    report = filter_report(hidden.detach(), weight.detach(), labels, filter_eps=filter_eps)
    loud = round(report.loud * WORDS)
    assert 0.05 * WORDS < loud < 0.5 * WORDS
    z = (hidden @ weight.T).detach()
    largest = (torch.nn.functional.one_hot(labels, WORDS) - z.softmax(1)).abs().amax(0)
    eps = largest.sort(descending=True).values[loud - 1].item()
    logps = dropped_logps(hidden, weight, labels, eps, (ROWS, 1))
    theirs = gradients(logps, hidden, weight)
    assert mean_error(mine[0], want[0]) < 1e-10 < 1e-2 < mean_error(theirs[0], want[0])
    for have, drop, unfiltered in zip(mine, theirs, want):
        assert relative(have, unfiltered) < relative(drop, unfiltered)
