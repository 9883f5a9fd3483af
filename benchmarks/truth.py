"""The truth in fp64, the errors against it, and the budget a peer must pass to be given a row.

Everything runs over row blocks, so that real heads fit. T tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case, Inputs, logits_of, softcapped

BETA = 0.1  # of the preference loss that peers without token log-probs are asked for


@dataclass
class Truth:
    """fp64 results on the already rounded inputs, and what same-dtype PyTorch misses of them."""

    logps: Tensor  # (T,)
    entropy: Tensor  # (T,)
    u: Tensor  # (T, D) d logp_t / d hidden_t: grad_hidden is g_t u_t for any loss
    # per kind of output, one gradient per tensor of `Inputs.trained`; empty unless the head is trained
    d_trained: dict[str, list[Tensor]]
    budget: dict[str, float]  # errors of same-dtype full-logits PyTorch

    def sharpness(self) -> dict[str, float]:
        return {
            "mean_p_label": self.logps.exp().mean().item(),
            "mean_logp_label": self.logps.mean().item(),
            "mean_entropy": self.entropy.mean().item(),
        }


def row_blocks(case: Case) -> list[slice]:
    size = max(1, 2**27 // case.vocab)
    return [slice(a, min(a + size, case.tokens)) for a in range(0, case.tokens, size)]


def preference_loss(logps: Tensor, case: Case) -> Tensor:
    """DPO on mean log-probs, as Liger computes it; in mode "step" the reference equals the policy."""
    means = logps.view(case.sequences, -1).mean(1)
    ratios = means - means.detach() if case.mode == "step" else means
    chosen, rejected = ratios.chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def upstream(output: str, logps: Tensor, inputs: Inputs) -> Tensor:
    """The gradient (T,) that the token log-probs receive under a peer's kind of output."""
    if output == "token_logps":
        return inputs.grad.to(logps.dtype)
    if output == "mean_nll":
        return torch.full_like(logps, -1 / logps.numel())
    with torch.enable_grad():
        leaf = logps.detach().requires_grad_()
        return torch.autograd.grad(preference_loss(leaf, inputs.case), leaf)[0]


def scalar_of(output: str, logps: Tensor, inputs: Inputs) -> Tensor:
    return -logps.mean() if output == "mean_nll" else preference_loss(logps, inputs.case)


@torch.no_grad()
def _exact(inputs: Inputs, outputs: tuple[str, ...]) -> Truth:
    case = inputs.case
    weight = inputs.effective_weight(torch.float64)
    logps, entropy, u = [], [], []
    for part in row_blocks(case):
        hidden, labels = inputs.hidden[part].double(), inputs.labels[part]
        z = softcapped(hidden @ weight.T, case.softcap)
        log_p = z.log_softmax(1)
        p = log_p.exp()
        slope = 1 - (z / case.softcap) ** 2 if case.softcap else torch.ones((), dtype=z.dtype)
        logps.append(log_p.gather(1, labels.unsqueeze(1)).squeeze(1))
        entropy.append(-(p * log_p).nan_to_num_(0.0).sum(1))
        dz = -p
        dz[torch.arange(len(labels), device=dz.device), labels] += 1
        u.append((dz * slope.to(dz.device)) @ weight)
    found = Truth(torch.cat(logps), torch.cat(entropy), torch.cat(u), {}, {})
    if case.mode == "trainable":
        for output in outputs:
            d_weight = _weight_gradient(inputs, weight, upstream(output, found.logps, inputs))
            found.d_trained[output] = inputs.head_gradients(d_weight)
    return found


def _weight_gradient(inputs: Inputs, weight: Tensor, g: Tensor) -> Tensor:
    case = inputs.case
    total = torch.zeros_like(weight)
    for part in row_blocks(case):
        hidden, labels = inputs.hidden[part].double(), inputs.labels[part]
        z = softcapped(hidden @ weight.T, case.softcap)
        dz = z.softmax(1).neg_()
        dz[torch.arange(len(labels), device=dz.device), labels] += 1
        if case.softcap:
            dz *= 1 - (z / case.softcap) ** 2
        total.addmm_((dz * g[part].unsqueeze(1)).T, hidden)
    return total


def _same_dtype_errors(inputs: Inputs, truth: Truth) -> dict[str, float]:
    """Errors of full-logits PyTorch in the dtype of the inputs, row block by row block."""
    case = inputs.case
    mine = inputs.detached().require_grads()
    trained = mine.trained if case.mode == "trainable" else []
    totals = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in trained]
    logps, grads = [], []
    for part in row_blocks(case):
        hidden = inputs.hidden[part].detach().clone().requires_grad_()
        z = logits_of(hidden, mine.head, case.softcap)
        out = z.log_softmax(1).gather(1, inputs.labels[part].unsqueeze(1)).squeeze(1)
        out.backward(inputs.grad[part])
        logps.append(out.detach())
        grads.append(hidden.grad)
        for total, tensor in zip(totals, trained):
            total += tensor.grad.float()
            tensor.grad = None
    return errors("token_logps", torch.cat(logps), torch.cat(grads), totals, inputs, truth)


def compute_truth(inputs: Inputs, outputs: tuple[str, ...] = ("token_logps",)) -> Truth:
    truth = _exact(inputs.detached(), outputs)
    truth.budget = _same_dtype_errors(inputs, truth)
    return truth


def _relative(got: Tensor, want: Tensor) -> tuple[float, float]:
    """Largest error over the largest entry, and rms error over rms entry."""
    error = got.double() - want
    scale = want.abs().amax().clamp_min(torch.finfo(torch.float64).tiny)
    rms = want.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return (error.abs().amax() / scale).item(), (error.square().mean().sqrt() / rms).item()


@torch.no_grad()
def errors(
    output: str,
    value: Tensor,
    grad_hidden: Tensor | None,
    grad_trained: Sequence[Tensor | None],
    inputs: Inputs,
    truth: Truth,
) -> dict[str, float]:
    """Errors of one peer: log-probs in nats, gradients relative; a scalar loss in its own unit.

    Of several trained tensors the worst counts; one without a gradient counts as NaN.
    """
    found = {}
    if output == "token_logps":
        error = value.double() - truth.logps
        found["logp_err_max"] = error.abs().amax().item()
        found["logp_err_rms"] = error.square().mean().sqrt().item()
    else:
        want = scalar_of(output, truth.logps, inputs)
        found["loss_err"] = (value.double() - want).abs().item()
    if grad_hidden is not None:
        g = upstream(output, truth.logps, inputs)
        pair = _relative(grad_hidden, g.unsqueeze(1) * truth.u)
        found["grad_err_max"], found["grad_err_rms"] = pair
    if grad_trained:
        pairs = [
            (math.nan, math.nan) if got is None else _relative(got, want)
            for got, want in zip(grad_trained, truth.d_trained[output], strict=True)
        ]
        worst = torch.tensor(pairs).amax(0)  # NaN if one is
        found["head_grad_err_max"], found["head_grad_err_rms"] = worst.tolist()
    return found


def refusal(found: dict[str, float], budget: dict[str, float], dtype: torch.dtype) -> str | None:
    """Return None if every error is within twice that of same-dtype PyTorch plus a rounding band.

    The bands are roundings that full logits need not make: a logit of size 16 rounded in fp32, 16
    times for log-probs, once for gradients, which are also stored in the dtype (4 units of it). A
    scalar loss is held to the largest error of a token's log-prob. A NaN fails.
    """
    fp32, own = torch.finfo(torch.float32).eps, torch.finfo(dtype).eps
    for name, value in found.items():
        if "grad" in name:
            limit = 2 * budget[name] + 4 * own + 16 * fp32
        else:
            limit = 2 * budget["logp_err_max" if name == "loss_err" else name] + 256 * fp32
        if not value <= limit:
            return f"{name} {value:.3g} > {limit:.3g}"
    return None


def sharpness_line(found: dict[str, Any]) -> str:
    return (
        f"mean p(label) {found['mean_p_label']:.3f}, mean log p(label) "
        f"{found['mean_logp_label']:.3f}, mean entropy {found['mean_entropy']:.3f} nats"
    )
