"""The truth in fp64, the errors against it, and the budget that whoever is measured must keep.

Everything runs over row blocks, so that real heads fit. T tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case, Inputs, label_logps, logits_of, softcapped

BETA = 0.1  # of the preference loss that peers without token log-probs are asked for
FP32 = torch.finfo(torch.float32).eps
FILTERED = 0.5  # most relative error of a filtered gradient: whatever has more filters nothing


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


def scalar_of(output: str, logps: Tensor, inputs: Inputs) -> Tensor:
    """The mean of -log p, or DPO on mean log-probs as Liger has it (mode "step": the policy is the
    reference).
    """
    if output == "mean_nll":
        return -logps.mean()
    means = logps.view(inputs.case.sequences, -1).mean(1)
    ratios = means - means.detach() if inputs.case.mode == "step" else means
    chosen, rejected = ratios.chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def upstream(output: str, logps: Tensor, inputs: Inputs) -> Tensor:
    """The gradient (T,) that the token log-probs receive under a peer's kind of output."""
    if output == "token_logps":
        return inputs.grad.to(logps.dtype)
    with torch.enable_grad():
        leaf = logps.detach().requires_grad_()
        return torch.autograd.grad(scalar_of(output, leaf, inputs), leaf)[0]


def _fp64_blocks(inputs: Inputs, weight: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Per block of t rows: which, log-softmax (t, V), and d logp / d (h W^T), before the softcap."""
    cap = inputs.case.softcap
    for part in row_blocks(inputs.case):
        z = softcapped(inputs.hidden[part].double() @ weight.T, cap)
        log_p, labels = z.log_softmax(1), inputs.labels[part]
        dz = -log_p.exp()
        dz[torch.arange(len(labels), device=dz.device), labels] += 1
        yield part, log_p, dz * (1 - (z / cap) ** 2) if cap else dz


@torch.no_grad()
def _exact(inputs: Inputs, outputs: tuple[str, ...]) -> Truth:
    weight = inputs.effective_weight(torch.float64)
    logps, entropy, u = [], [], []
    for part, log_p, dz in _fp64_blocks(inputs, weight):
        logps.append(log_p.gather(1, inputs.labels[part].unsqueeze(1)).squeeze(1))
        entropy.append(-(log_p.exp() * log_p).nan_to_num_(0.0).sum(1))
        u.append(dz @ weight)
    found = Truth(torch.cat(logps), torch.cat(entropy), torch.cat(u), {}, {})
    for output in outputs if inputs.case.mode == "trainable" else ():
        g = upstream(output, found.logps, inputs).unsqueeze(1)
        d_weight = torch.zeros_like(weight)
        for part, _, dz in _fp64_blocks(inputs, weight):
            d_weight.addmm_((dz * g[part]).T, inputs.hidden[part].double())
        found.d_trained[output] = inputs.head_gradients(d_weight)
    return found


def _same_dtype_errors(inputs: Inputs, truth: Truth) -> dict[str, float]:
    """Errors of full-logits PyTorch in the dtype of the inputs, row block by row block."""
    case = inputs.case
    mine = inputs.detached().require_grads()
    trained = mine.trained if case.mode == "trainable" else []
    totals = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in trained]
    logps, grads = [], []
    for part in row_blocks(case):
        hidden = inputs.hidden[part].detach().clone().requires_grad_()
        out = label_logps(logits_of(hidden, mine.head, case.softcap), inputs.labels[part])
        out.backward(inputs.grad[part])
        logps.append(out.detach())
        grads.append(hidden.grad)
        for total, tensor in zip(totals, trained):
            total += tensor.grad.float()
            tensor.grad = None
    return errors("token_logps", torch.cat(logps), torch.cat(grads), totals, inputs, truth)


def compute_truth(inputs: Inputs, outputs: tuple[str, ...] = ("token_logps",)) -> Truth:
    truth = _exact(inputs.detached(), outputs)
    found = _same_dtype_errors(inputs, truth)
    truth.budget = {name: value for name, value in found.items() if not name.startswith("u_")}
    # One scalar has its error by luck: it is held to the largest error of a token's log-prob.
    truth.budget["loss_err"] = truth.budget["logp_err_max"]
    return truth


def relative(got: Tensor, want: Tensor) -> tuple[float, float]:
    """Largest error over the largest entry, and rms error over rms entry."""
    error, tiny = got.double() - want, torch.finfo(torch.float64).tiny
    scale, rms = want.abs().amax(), want.square().mean().sqrt()
    return (
        (error.abs().amax() / scale.clamp_min(tiny)).item(),
        (error.square().mean().sqrt() / rms.clamp_min(tiny)).item(),
    )


def _unit_errors(got: Tensor, want: Tensor) -> dict[str, float]:
    """Of u (T, D), the gradient under g = 1: all of it, of its sum over the rows (what a batch's mean
    gradient is made of), and the largest row's over the rms row. No budget: for reading.
    """
    error, rows = got - want, math.sqrt(len(want))
    found = {
        "u_err_rms": error.norm() / want.norm(),
        "u_err_mean": error.sum(0).norm() / want.sum(0).norm(),
        "u_err_row": rows * error.norm(dim=1).amax() / want.norm(),
    }
    return {name: value.item() for name, value in found.items()}


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
        pair = relative(grad_hidden, g.unsqueeze(1) * truth.u)
        found["grad_err_max"], found["grad_err_rms"] = pair
        found |= _unit_errors(grad_hidden.double() / g.unsqueeze(1), truth.u)
    if grad_trained:
        pairs = [
            (math.nan, math.nan) if got is None else relative(got, want)
            for got, want in zip(grad_trained, truth.d_trained[output], strict=True)
        ]
        worst = torch.tensor(pairs).amax(0)  # NaN if one is
        found["head_grad_err_max"], found["head_grad_err_rms"] = worst.tolist()
    return found


def peer_band(name: str, dtype: torch.dtype) -> float:
    """Roundings that full logits need not make: a logit of size 16 rounded in fp32, 16 times for
    log-probs, once for gradients, which are also stored in the dtype (4 units of it).
    """
    return 4 * torch.finfo(dtype).eps + 16 * FP32 if "grad" in name else 256 * FP32


def refusal(
    found: dict[str, float],
    budget: dict[str, float],
    dtype: torch.dtype,
    band: Callable[[str, torch.dtype], float] = peer_band,
    filtered: bool = False,
) -> str | None:
    """Return None if every error with a budget is within twice that plus its band. A NaN fails.

    `filtered`: the gradient is approximate by design, and wrong only if half of it is.
    """
    for name, value in found.items():
        if name not in budget:  # for reading
            continue
        limit = 2 * budget[name] + band(name, dtype)
        if filtered and "grad" in name:
            limit = FILTERED
        if not value <= limit:
            return f"{name} {value:.3g} > {limit:.3g}"
    return None
