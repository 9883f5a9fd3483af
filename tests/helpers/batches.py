"""Small random preference batches."""

import torch


def batch(seed=0, sequences=4, length=9, hidden=16, vocab=31, dtype=torch.float64, empty=False):
    rng = torch.Generator().manual_seed(seed)
    states = torch.randn(sequences, length, hidden, generator=rng, dtype=torch.float64)
    weight = torch.randn(vocab, hidden, generator=rng, dtype=torch.float64) / hidden**0.5
    labels = torch.randint(0, vocab, (sequences, length), generator=rng)
    labels[torch.rand(labels.shape, generator=rng) < 0.3] = -100
    labels[:, -1] = 1  # no sequence is empty unless asked for
    if empty:
        labels[0] = -100
    other = states + 0.1 * torch.randn(states.shape, generator=rng, dtype=torch.float64)
    return states.to(dtype), weight.to(dtype), labels, other.to(dtype)
