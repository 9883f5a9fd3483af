"""The specification: the same quantities in plain PyTorch with full logits, in any dtype.

Slow, memory-hungry and easy to read; in float64 it is the truth of the tests. One equation of
docs/math.md per line. S sequences, L positions, D hidden size, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# l_1(f) and l_-1(f) of the paper's table, eq. 24.
L_CHOSEN: dict[str, Callable[[Tensor], Tensor]] = {
    "lsif": lambda f: -torch.exp(f),
    "ukl": lambda f: -f,
    "bce": lambda f: torch.logaddexp(torch.zeros_like(f), -f),
}
L_REJECTED: dict[str, Callable[[Tensor], Tensor]] = {
    "lsif": lambda f: torch.exp(2 * f) / 2,
    "ukl": lambda f: torch.exp(f),
    "bce": lambda f: torch.logaddexp(torch.zeros_like(f), f),
}


def token_logps(
    hidden_states: Tensor,  # (..., D)
    lm_head_weight: Tensor,  # (V, D)
    labels: Tensor,  # (...)
    *,
    lm_head_bias: Tensor | None = None,  # (V,)
    scale: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """Log-probability of each label, labels already paired with hidden states; 0 where ignored.

    Example:
        >>> import torch
        >>> from dilkern import reference
        >>> reference.token_logps(torch.zeros(1, 4), torch.ones(8, 4), torch.tensor([3])).item()
        -2.0794...
    """
    logits = hidden_states @ lm_head_weight.T  # (1)
    if lm_head_bias is not None:
        logits = logits + lm_head_bias
    logits = scale * logits  # (2)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logps = logits.log_softmax(-1)  # (3)
    scored = labels != ignore_index
    gathered = logps.gather(-1, torch.where(scored, labels, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(scored, gathered, 0.0)


def shifted_token_logps(hidden_states: Tensor, lm_head_weight: Tensor, labels: Tensor) -> Tensor:
    """The same for one padded batch whose labels are aligned with input_ids: (S, L, D), (S, L)."""
    scored = token_logps(hidden_states[:, :-1], lm_head_weight, labels[:, 1:])
    return torch.cat([scored.new_zeros(labels.shape[0], 1), scored], dim=1)


def dil_loss(
    hidden_states: Tensor,  # (S, L, D), first half chosen
    lm_head_weight: Tensor,  # (V, D)
    labels: Tensor,  # (S, L), aligned with input_ids
    ref_logps: Tensor,  # (S,)
    *,
    h: str = "lsif",
    beta: float = 1.0,
    length_normalize: bool = True,
) -> Tensor:
    """The DIL loss, paper-exact (no extension of exponentials), for padded paired batches.

    Example:
        >>> import torch
        >>> from dilkern import reference
        >>> hidden, weight = torch.zeros(2, 3, 4), torch.ones(8, 4)
        >>> labels = torch.tensor([[0, 1, 2], [0, 3, -100]])
        >>> ref = torch.tensor([-2.0, -1.0]) * torch.log(torch.tensor(8.0))
        >>> reference.dil_loss(hidden, weight, labels, ref).item()
        -0.5
    """
    logps = shifted_token_logps(hidden_states, lm_head_weight, labels).sum(1)
    lengths = (labels[:, 1:] != -100).sum(1)
    f = logps - ref_logps
    if length_normalize:
        f = f / lengths.clamp(min=1)
    x_chosen, x_rejected = (beta * f).chunk(2)
    some_chosen, some_rejected = (lengths > 0).chunk(2)
    chosen: Tensor = L_CHOSEN[h](x_chosen)[some_chosen].sum() / some_chosen.sum().clamp(min=1)
    rejected: Tensor = L_REJECTED[h](x_rejected)[some_rejected].sum() / some_rejected.sum().clamp(
        min=1
    )
    return chosen + rejected  # (10)


def unscaled_gradient(
    hidden_states: Tensor,  # (N, D)
    lm_head_weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,)
) -> Tensor:
    """u_i = w_{y_i} - sum_v p_iv w_v, the gradient of each log-prob in its hidden state (6).

    Example:
        >>> import torch
        >>> from dilkern import reference
        >>> reference.unscaled_gradient(torch.zeros(1, 1), torch.tensor([[1.0], [3.0]]),
        ...                             torch.tensor([1]))
        tensor([[1.]])
    """
    probabilities = (hidden_states @ lm_head_weight.T).softmax(-1)
    return lm_head_weight[labels] - probabilities @ lm_head_weight
