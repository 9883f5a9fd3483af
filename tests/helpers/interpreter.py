"""What Triton's interpreter needs to be right: set TRITON_INTERPRET=1 before Triton is imported."""

import os

import numpy as np

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def repair_bf16():
    """Make bf16 right: the interpreter keeps it as raw uint16 (3.6 to 3.9).

    Its dot multiplies bit patterns, and its cast truncates.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    _builder, _handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    _dot, _cast = _builder.create_dot, _builder.cast_impl

    def _widen(bits):
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def _round(values):
        values = np.asarray(values, np.float32)
        bits = values.view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)

    def _cast_impl(self, source, target):
        old, new = source.dtype.scalar, target.scalar
        if old == tl.bfloat16 and new == tl.float32:
            return _handle(_widen(source.data), new)
        if old == tl.float32 and new == tl.bfloat16:
            return _handle(_round(source.data), new)
        return _cast(self, source, target)

    def _create_dot(self, a, b, d, *rest):
        def up(x):
            return _handle(_widen(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x

        return _dot(self, up(a), up(b), d, *rest)

    _builder.cast_impl, _builder.create_dot = _cast_impl, _create_dot
