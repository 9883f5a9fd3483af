"""The naive log-probs that every test compares with: full logits, log_softmax, gather."""

from torch import Tensor


def gather_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probs (...) of `labels` (...) under `logits` (..., V); 0 where a label is -100."""
    scored = labels != -100
    picked = logits.log_softmax(-1).gather(-1, labels.where(scored, 0).unsqueeze(-1)).squeeze(-1)
    return picked.where(scored, 0.0)
