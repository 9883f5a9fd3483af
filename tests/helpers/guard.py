"""Outputs of kernel tests: full of NaN, between canaries."""

import math

import torch

CANARY = -12345.0


def guarded(*shape, dtype=torch.float32, margin=64):
    """Return a NaN-filled tensor inside a longer buffer, and a check that its margins are intact."""
    numel = math.prod(shape)
    buffer = torch.full((numel + 2 * margin,), CANARY).to(dtype)
    inner = buffer[margin : margin + numel].view(shape).fill_(float("nan"))

    def intact():
        outside = torch.cat((buffer[:margin], buffer[margin + numel :]))
        assert (outside == torch.tensor(CANARY).to(dtype)).all()

    return inner, intact
