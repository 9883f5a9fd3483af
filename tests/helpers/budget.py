"""The one tolerance of the test suite.

Truth is fp64 on the already rounded inputs; the peer is plain PyTorch in the same dtype. An error
may be at most twice the peer's, plus a rounding band of the result's own dtype. No test has a
tolerance of its own and nothing in the environment loosens this one.
"""

import torch
from torch import Tensor

# Roundings that a correct result may carry beyond the peer's: one of the output, one of each sum.
BAND_ULPS = 4


class Budget:
    def check(self, name: str, got: Tensor, peer: Tensor, truth: Tensor) -> None:
        """Require max and mean |got - truth| <= 2 |peer - truth| + band."""
        assert got.shape == truth.shape, f"{name}: shape {got.shape}, expected {truth.shape}"
        eps = torch.finfo(got.dtype).eps
        if truth.numel() == 0:
            return
        truth = truth.double()
        scale = truth.abs().max().clamp(min=1e-30)
        for kind in (torch.max, torch.mean):
            error = kind((got.double() - truth).abs())
            allowed = 2 * kind((peer.double() - truth).abs()) + BAND_ULPS * eps * scale
            assert error <= allowed, f"{name}: {kind.__name__} error {error:.3e} > {allowed:.3e}"

    def exact64(self, name: str, got: Tensor, truth: Tensor, relative: float = 1e-10) -> None:
        """Require agreement of two fp64 computations."""
        assert got.dtype == torch.float64 and got.shape == truth.shape
        scale = truth.abs().max().clamp(min=1e-6) if truth.numel() else torch.tensor(1.0)
        error = (got - truth).abs().max() if truth.numel() else torch.tensor(0.0)
        assert error <= relative * scale, f"{name}: error {error:.3e} of scale {scale:.3e}"
