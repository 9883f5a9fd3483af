"""The word filter: same log-probs, a gradient within its bound, unbiased where it is said to be.

Mostly in fp64, so of the torch backend; that of the triton backend: tests/kernels/test_loud_words.py.
"""

import pytest
import torch
from naive import gather_logps

from dilkern import filter_report, fused_dil_loss, linear_logps
from dilkern.backends import word_filter
from dilkern.integrations.trl_config import DILConfig
from dilkern.lm_head import Adapter, DenseHead, LoRAHead

N, V, D = 70, 900, 16
WORKSPACE = 0.2  # several blocks of rows and of words


def problem(peak=3.0, dtype=torch.float64, rows=N, vocab=V, seed=0):
    """Rows that agree on which words are frequent, as text does; `peak` 0 is a flat softmax."""
    torch.manual_seed(seed)
    common = torch.randn(D, dtype=torch.float64)
    hidden = 0.5 * torch.randn(rows, D, dtype=torch.float64) + common
    weight = peak * torch.randn(vocab, D, dtype=torch.float64) / D**0.5
    labels = torch.distributions.Categorical(logits=hidden @ weight.T).sample()
    return hidden.to(dtype), weight.to(dtype), labels


def gradients(hidden, head, labels, *tensors, g=None, **options):
    """Return log-probs, and the gradients of hidden states and tensors for row factors g."""
    hidden = hidden.detach().requires_grad_()
    logps = linear_logps(hidden, head, labels, **options)
    g = torch.ones_like(logps) if g is None else g.to(logps.dtype)
    return logps.detach(), *torch.autograd.grad((g * logps).sum(), [hidden, *tensors])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_logps_keep_their_bits(dtype):
    hidden, weight, labels = problem(dtype=dtype)
    head = DenseHead(weight, softcap=20.0)
    want = linear_logps(hidden, head, labels, workspace_mib=WORKSPACE)
    for filter_eps in (1e-30, 2**-14, 1.0, "auto"):
        options = {"filter_eps": filter_eps, "workspace_mib": WORKSPACE}
        assert torch.equal(linear_logps(hidden, head, labels, **options), want)
        assert torch.equal(gradients(hidden, head, labels, **options)[0], want)


def test_the_error_obeys_the_bound():
    """200 cases: peaked and flat, every transform, every threshold; and most of them do filter."""
    filtered = 0
    for seed in range(200):
        peak = (0.0, 1.0, 3.0, 6.0)[seed % 4]
        hidden, weight, labels = problem(peak, seed=seed)
        scale, softcap = ((1.0, 0.0), (0.7, 0.0), (1.0, 8.0))[seed % 3]
        bias = torch.randn(V, dtype=torch.float64) if seed % 5 == 0 else None
        head = DenseHead(weight, bias, scale=scale, softcap=softcap)
        options = {"filter_eps": 2.0 ** -(6 + seed % 7), "workspace_mib": WORKSPACE}
        _, want = gradients(hidden, head, labels, workspace_mib=WORKSPACE)
        _, got = gradients(hidden, head, labels, **options)
        report = filter_report(hidden, head, labels, **options)
        error = (got - want).norm(dim=1)
        assert (error <= report.error_bound * (1 + 1e-9) + 1e-13).all(), seed
        assert torch.allclose(report.gradient_norm, got.norm(dim=1), rtol=1e-5, atol=1e-5)
        filtered += bool(error.max() > 0)
    assert filtered > 100


def test_errors_cancel_over_the_rows():
    """One block of words: every row's sum over all words is known when the mean is formed."""
    hidden, weight, labels = problem()
    _, want = gradients(hidden, weight, labels)
    _, got = gradients(hidden, weight, labels, filter_eps=2**-10)
    assert (got - want).norm() > 1e-4 * want.norm()
    assert (got - want).sum(0).norm() < 1e-10 * want.sum(0).norm()


def test_the_mean_gradient_errs_less_than_a_filter_that_drops():
    """With several blocks the sums are estimates, but what is kept makes up for most."""
    hidden, weight, labels = problem(rows=400, vocab=4000)
    options = {"filter_eps": 2**-12, "workspace_mib": 4}
    _, want = gradients(hidden, weight, labels)
    _, got = gradients(hidden, weight, labels, **options)
    p = (hidden @ weight.T).softmax(1)
    share = 1 - p.gather(1, labels[:, None])
    p[torch.arange(400), labels] = 0
    loud = (
        p.mean(0)
        >= p.mean(0)
        .topk(int(4000 * filter_report(hidden, weight, labels, **options).loud))
        .values[-1]
    )
    dropped = share * weight[labels] - p[:, loud] @ weight[loud]
    bias, of_dropping = ((x - want).sum(0).norm() / want.sum(0).norm() for x in (got, dropped))
    assert 0 < bias < 0.1 * of_dropping


@pytest.mark.parametrize("tiny", [1e-300, 1e-30])
def test_a_tiny_threshold_gives_the_exact_bits(tiny):
    hidden, weight, labels = problem(peak=1.0)
    weight.requires_grad_()
    want = gradients(hidden, weight, labels, weight, workspace_mib=WORKSPACE)
    got = gradients(hidden, weight, labels, weight, workspace_mib=WORKSPACE, filter_eps=tiny)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("stands_back", [True, False])
def test_all_words_quiet(monkeypatch, stands_back):
    """The blocks are multiplied whole; if they were not, the gradient were finite and bounded."""
    if not stands_back:
        monkeypatch.setattr(word_filter, "MOST_QUIET", 1e300)
    hidden, weight, labels = problem()
    weight.requires_grad_()
    want = gradients(hidden, weight, labels, weight)
    got = gradients(hidden, weight, labels, weight, filter_eps=1.0)
    report = filter_report(hidden, weight, labels, filter_eps=1.0)
    assert torch.equal(got[1], want[1]) == stands_back
    assert ((got[1] - want[1]).norm(dim=1) <= report.error_bound + 1e-12).all()
    assert report.whole == float(stands_back) and got[2].isfinite().all()
    assert "loud words" in str(report)


def test_same_inputs_same_bits():
    hidden, weight, labels = problem(dtype=torch.float32)
    weight.requires_grad_()
    options = {"filter_eps": 2**-10, "workspace_mib": WORKSPACE}
    first, second = (gradients(hidden, weight, labels, weight, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("softcap", [0.0, 8.0])
def test_trainable_head(softcap):
    """Loud words and labels exactly, quiet words in shares that keep their sum."""
    hidden, weight, labels = problem()
    weight.requires_grad_()
    bias = torch.randn(V, dtype=torch.float64, requires_grad=True)
    head = DenseHead(weight, bias, softcap=softcap)
    g = torch.randn(N)
    options = {"workspace_mib": WORKSPACE, "g": g}
    want = gradients(hidden, head, labels, weight, bias, **options)
    got = gradients(hidden, head, labels, weight, bias, filter_eps=2**-10, **options)
    for a, b in zip(got[2:], want[2:]):
        assert 0 < (a - b).norm() < 0.05 * b.norm()
        assert torch.allclose(a.sum(0), b.sum(0), rtol=1e-10, atol=1e-12)
        assert torch.allclose(a[labels], b[labels], rtol=1e-10, atol=1e-12)


def test_trainable_head_where_later_words_are_likelier():
    """The anchor moves on, and with it what was left out before."""
    hidden, weight, labels = problem()
    weight[V // 2 :] *= 5
    weight.requires_grad_()
    options = {"workspace_mib": WORKSPACE, "g": torch.randn(N)}
    want = gradients(hidden, weight, labels, weight, **options)
    got = gradients(hidden, weight, labels, weight, filter_eps=2**-10, **options)
    assert 0 < (got[2] - want[2]).norm() < 0.05 * want[2].norm()
    assert torch.allclose(got[2].sum(0), want[2].sum(0), rtol=1e-10, atol=1e-12)


def test_only_the_head_trains():
    hidden, weight, labels = problem()
    weight.requires_grad_()
    both = gradients(hidden, weight, labels, weight, filter_eps=2**-10)
    logps = linear_logps(hidden, weight, labels, filter_eps=2**-10)
    assert torch.equal(torch.autograd.grad(logps.sum(), weight)[0], both[2])


def test_lora_on_the_head():
    """As the merged weight, whose quiet words have the same mean."""
    hidden, weight, labels = problem()
    a, b = (torch.randn(*s, dtype=torch.float64) / 4 for s in ((4, D), (V, 4)))
    a.requires_grad_(), b.requires_grad_()
    options = {"filter_eps": 2**-10, "g": torch.randn(N)}
    head = LoRAHead(DenseHead(weight), [Adapter(a, b, 0.5)])
    logps, *got = gradients(hidden, head, labels, a, b, **options)
    merged = (weight + 0.5 * b @ a).detach().requires_grad_()
    merged_logps, d_hidden, d_merged = gradients(hidden, merged, labels, merged, **options)
    want = [d_hidden, 0.5 * b.T @ d_merged, 0.5 * d_merged @ a.T]
    assert torch.allclose(logps, merged_logps, rtol=1e-10)
    for x, y in zip(got, want):
        assert (x - y).norm() < 1e-9 * y.norm()
    exact = gradients(hidden, head, labels, a, b, g=options["g"])
    assert (got[0] - exact[1]).norm() > 1e-5 * exact[1].norm()
    reports = [filter_report(hidden, h, labels, filter_eps=2**-10) for h in (head, merged)]
    for mine, its in zip(*reports):
        torch.testing.assert_close(mine, its)


def test_a_row_of_nan_stays_in_its_row():
    hidden, weight, labels = problem()
    hidden[3] = torch.nan
    _, got = gradients(hidden, weight, labels, filter_eps=2**-10, workspace_mib=WORKSPACE)
    others = torch.arange(N) != 3
    assert got[3].isnan().all() and got[others].isfinite().all()


def test_confident_rows_keep_their_digits():
    """Their wrong words are rare in every row, and are all that their gradient is made of."""
    hidden, weight, labels = problem()
    hidden[:5] = 20 * weight[labels[:5]]
    _, want = gradients(hidden, weight, labels)
    _, got = gradients(hidden, weight, labels, filter_eps=2**-14)
    assert linear_logps(hidden, weight, labels)[:5].max() > -1e-6
    assert ((got - want).norm(dim=1) < 0.05 * want.norm(dim=1)).all()


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows):
    hidden, weight, labels = problem(rows=rows)
    weight.requires_grad_()
    got = gradients(hidden, weight, labels, weight, filter_eps=2**-10)
    want = torch.autograd.grad(
        gather_logps(hidden @ weight.T, labels).sum(), weight, materialize_grads=True
    )[0]
    assert got[1].shape == (rows, D)
    assert (got[2] - want).norm() <= 0.05 * want.norm()


def test_the_fused_loss_takes_it():
    hidden, weight, labels = problem()
    rows, labels = hidden.reshape(2, N // 2, D), labels.reshape(2, N // 2)

    def run(**options):
        states = rows.detach().requires_grad_()
        out = fused_dil_loss(states, weight, labels, ref_logps=torch.zeros(2), **options)
        return out.loss, torch.autograd.grad(out.loss, states)[0]

    (loss, exact), (same, got) = (
        run(length_normalize=True),
        run(length_normalize=True, filter_eps=2**-10),
    )
    assert torch.equal(loss, same) and 0 < (got - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("bad", [0, -1e-3, 1.5, True, "Auto", float("nan"), [1e-3]])
def test_a_threshold_out_of_range(bad, tmp_path):
    hidden, weight, labels = problem()
    with pytest.raises(
        ValueError, match=r"`filter_eps` must be None, 'auto' or a number in \(0, 1\]"
    ):
        linear_logps(hidden, weight, labels, filter_eps=bad)
    with pytest.raises(ValueError, match="`filter_eps` must be"):
        DILConfig(str(tmp_path), filter_eps=bad)


def test_the_command_line_gives_numbers_as_text(tmp_path):
    assert DILConfig(str(tmp_path), filter_eps="1e-5").filter_eps == 1e-5
    assert DILConfig(str(tmp_path), filter_eps="auto").filter_eps == "auto"


def test_a_report_needs_a_filter_and_a_scored_label():
    hidden, weight, labels = problem()
    with pytest.raises(ValueError, match="a report needs a label that is scored"):
        filter_report(hidden, weight, torch.full_like(labels, -100))
    with pytest.raises(ValueError, match="a report needs a filter"):
        filter_report(hidden, weight, labels, filter_eps=None)


def test_quiet_words_of_confident_rows_keep_their_mean_in_fp16():
    """Their probabilities are below what fp16 holds; their mean, which u leans on, is not."""
    hidden, weight, _ = problem(peak=1.0, rows=2, vocab=8000)
    hidden, weight = hidden * 0.1, weight + 2.0  # near uniform, with a direction that all share
    bias = torch.zeros(8000)
    bias[0], bias[1:41] = 30.0, 6.0  # the label, and words with two thirds of what is left
    labels, options = torch.zeros(2, dtype=torch.long), {"filter_eps": 2**-8}
    hidden, weight, bias = (tensor.half() for tensor in (hidden, weight, bias))
    narrow, wide = (
        filter_report(hidden.to(t), DenseHead(weight.to(t), bias.to(t)), labels, **options)
        for t in (torch.float16, torch.float32)
    )
    assert narrow.loud < 0.1 and 0 < narrow.quiet_mass.max() < 1e-8
    torch.testing.assert_close(narrow.gradient_norm, wide.gradient_norm, rtol=1e-3, atol=0)
