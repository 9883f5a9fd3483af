"""The one tolerance of the kernel tests, and helpers that build cases."""

import torch

CANARY = -12345.0


def check(got, peer, truth, *, eps, size=None):
    """Require err <= 2 err_peer + rounding band, in the maximum and in the mean.

    Args:
        got: result under test.
        peer: what PyTorch computes in the same dtype.
        truth: the fp64 result on the same rounded inputs.
        eps: of the coarsest rounding that result and peer have in common.
        size: magnitude of the terms that were summed; by default that of the result.
    """
    assert got.shape == truth.shape, (got.shape, truth.shape)
    if truth.numel() == 0:
        return
    err = (got.double() - truth).abs()
    err_peer = (peer.double() - truth).abs()
    assert torch.isfinite(err).all(), "not finite"
    for reduce in (torch.max, torch.mean):
        band = 2 * eps * (size if size is not None else reduce(truth.abs()).item())
        assert reduce(err) <= 2 * reduce(err_peer) + band, (
            f"{reduce.__name__}: error {reduce(err):.3g}, peer {reduce(err_peer):.3g}, "
            f"band {band:.3g}"
        )


def guarded(*shape, dtype=torch.float32, margin=64):
    """A NaN-filled tensor inside a longer buffer of canaries: (tensor, check function)."""
    numel = 1
    for s in shape:
        numel *= s
    buffer = torch.full((numel + 2 * margin,), CANARY, dtype=torch.float64).to(dtype)
    inner = buffer[margin : margin + numel].view(shape)
    inner.fill_(float("nan") if dtype.is_floating_point else 0)
    expected = buffer[:1].clone()

    def intact():
        assert (buffer[:margin] == expected).all() and (buffer[margin + numel :] == expected).all()

    return inner, intact


def eps_of(dtype):
    return torch.finfo(dtype).eps
