"""The benchmark suite: dilkern beside every rival on the same tensors (see README.md here)."""
