"""Cut-cross-entropy's gradient filter in plain PyTorch, on full logits (arXiv 2411.09009, 4.3).

Its backward kernel (cut_cross_entropy/cce_backward.py, 25.1.1) recomputes p - onehot tile by tile and
returns early where `_block_is_filtered`: where |p - onehot| < eps in the whole tile. Words are sorted
by their average logit first, so that there are such tiles. What is skipped is dropped from both
gradients, and nothing takes its place.
"""

import torch
from torch import Tensor

CCE_TILE = (128, 128)  # `tl_autotune._cce_backward_best_config`


def kept(dz: Tensor, eps: float, rows: int, words: int, order: Tensor) -> Tensor:
    """Which entries (N, V) of p - onehot are multiplied, with tiles of rows x words in `order`."""
    n, v = dz.shape
    loud = dz.abs()[:, order] >= eps
    padded = loud.new_zeros(-(-n // rows) * rows, -(-v // words) * words)
    padded[:n, :v] = loud
    tiles = padded.view(-1, rows, padded.shape[1] // words, words)
    found = tiles.any(3, keepdim=True).any(1, keepdim=True).expand_as(tiles).reshape(padded.shape)
    return found[:n, :v][:, order.argsort()]


class DroppedLogps(torch.autograd.Function):
    """log p of the labels (N,); see `dropped_logps`."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, eps, tile):
        z = hidden @ weight.T
        logp = z.log_softmax(1)
        dz = -logp.exp()
        dz[torch.arange(len(labels)), labels] += 1
        dz = dz * kept(dz, eps, *tile, order=z.mean(0).argsort())
        ctx.save_for_backward(hidden, weight, dz)
        return logp.gather(1, labels.unsqueeze(1)).squeeze(1)

    @staticmethod
    def backward(ctx, g):
        hidden, weight, dz = ctx.saved_tensors
        dz = g.unsqueeze(1) * dz
        return dz @ weight, dz.T @ hidden, None, None, None


def dropped_logps(hidden, weight, labels, eps, tile=(1, 1)):
    """log p (N,) with cut-cross-entropy's gradient: `CCE_TILE` as it drops, (1, 1) by element."""
    return DroppedLogps.apply(hidden, weight, labels, eps, tile)
