"""What is run: calls of the backend, of the 4-bit decode and of the small ops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from dilkern import lm_head
from dilkern.backends import triton as backend
from dilkern.backends import word_filter
from dilkern.kernels import configs, h_functions
from dilkern.kernels.sequence_loss import sequence_loss
from dilkern.losses import LOSSES

WORKSPACE = 256 << 20
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 30.0},
    "all": {"bias": True, "scale": 0.5, "softcap": 30.0},
}
# T, V, D: one of each; odd D; D that divides by 8 and not by 16; a ragged last block; own product
# and library product at a real size.
RAGGED = [(1, 1, 8), (2, 1003, 33), (300, 1003, 200), (300, 50257, 1030)]
EVEN = [(4096, 128256, 1024), (2048, 128256, 4096)]


class Case(NamedTuple):
    """One call of the backend or of a small op."""

    kind: str  # dense, own (dense, with our own product in any case), tile (own, with the
    # candidates of 256 words), lora, filter, decode or sequence
    dtype: str
    variant: str
    shape: tuple[int, ...]  # (T, V, D), (V, D, blocksize) or (S, T)
    reference: str = ""  # of a sequence loss: token, sequence or none
    quick: bool = False  # part of `make test`

    def __str__(self) -> str:
        parts = (*self[:3], "x".join(map(str, self.shape)), self.reference)
        return " ".join(filter(None, parts))


def cases() -> Iterator[Case]:
    for variant in VARIANTS:
        both = variant in ("plain", "all")
        for shape in RAGGED + EVEN if both else EVEN:
            yield Case("dense", "bfloat16", variant, shape, quick=both)
        for shape in EVEN if both else ():
            yield Case(
                "dense", "float16", variant, shape, quick=variant == "plain" and shape == EVEN[0]
            )
        for shape in (RAGGED[0], RAGGED[2], EVEN[1]) if both else ():
            yield Case("dense", "float32", variant, shape, quick=shape in EVEN)
        # An architecture may leave our own product to those who measured it: it must be fit to run.
        for shape in (RAGGED[2], EVEN[0]):
            yield Case("own", "bfloat16", variant, shape, quick=both)
    yield Case("tile", "bfloat16", "plain", EVEN[0])
    for dtype in ("bfloat16", "float32"):
        yield Case("lora", dtype, "plain", (300, 32000, 1024), quick=dtype == "bfloat16")
    for shape in RAGGED + EVEN:
        yield Case("filter", "bfloat16", "plain", shape, quick=shape in EVEN)
    for shape in (RAGGED[2], EVEN[1]):
        yield Case("filter", "float32", "plain", shape, quick=shape in EVEN)
    yield Case("filter", "float16", "plain", EVEN[1])
    for variant in ("flat", "nested"):
        for width in (33, 200, 4096):
            quick = width != 200
            yield Case("decode", "bfloat16", variant, (128, width, 64), quick=quick)
        yield Case("decode", "bfloat16", variant, (128, 4096, 128))
        for dtype in ("float16", "float32"):
            yield Case("decode", dtype, variant, (128, 4096, 64))
    twins = sorted({entry.triton for entry in LOSSES.values() if entry.triton})
    for twin in twins:
        yield Case("sequence", "float32", twin, (16, 1000), "token", quick=True)
    for reference in ("sequence", "none"):
        yield Case("sequence", "float32", "lsif", (16, 1000), reference, quick=True)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _run_op(case: Case) -> Iterator[str]:
    """Forward with and without gradient, then the head's backward; yields what each was."""
    (t, v, d), dtype = case.shape, getattr(torch, case.dtype)
    settings = dict(VARIANTS[case.variant])
    bias = _meta(v, dtype=dtype) if settings.pop("bias", False) else None
    head: Any = lm_head.DenseHead(_meta(v, d, dtype=dtype), bias, **settings)
    needed = [True] * len(head.tensors())
    if case.kind == "lora":
        adapter = lm_head.Adapter(_meta(8, d, dtype=dtype), _meta(v, 8, dtype=dtype), 2.0)
        head = lm_head.LoRAHead(head, [adapter])
        needed = [True, False]  # B alone: its base is frozen
    hidden = _meta(t, head.width, dtype=dtype)
    rows, labels = (_meta(t, dtype=torch.int64) for _ in range(2))
    sizes = {"workspace_bytes": WORKSPACE}
    for need_u in (True, False):
        out = backend.forward(hidden, rows, labels, head, need_u=need_u, **sizes)
        yield "forward with gradient" if need_u else "forward without gradient"
    grad = _meta(t)
    results = (out.logps, out.lse, grad)
    backend.head_backward(hidden, rows, labels, head, *results, needed=needed, **sizes)
    yield "head backward"


def _run_filter(case: Case) -> Iterator[str]:
    """Forward with and without the word filter; its head's backward launches what others do."""
    (t, v, d), dtype = case.shape, getattr(torch, case.dtype)
    head = lm_head.DenseHead(_meta(v, d, dtype=dtype))
    hidden = _meta(t, d, dtype=dtype)
    rows, labels = (_meta(t, dtype=torch.int64) for _ in range(2))
    sizes = {"workspace_bytes": WORKSPACE, "need_u": True}
    backend.forward(hidden, rows, labels, head, **sizes)
    yield "forward without the filter"
    # Which words are expected is found on the host.
    expected = _meta(min(v, 1000), dtype=torch.int64)
    with mock.patch.object(word_filter, "expected_words", lambda *_: expected):
        backend.forward(hidden, rows, labels, head, filter_eps=2**-19, need_quiet=True, **sizes)
    yield "forward with the filter"


def _run_decode(case: Case) -> Iterator[str]:
    v, d, blocksize = case.shape
    blocks = -(-v * d // blocksize)
    nested = [_meta(256), _meta(-(-blocks // 256)), _meta()] if case.variant == "nested" else []
    packed = _meta(-(-v * d // 2), dtype=torch.uint8)
    absmax = _meta(blocks, dtype=torch.uint8 if nested else torch.float32)
    dtype = getattr(torch, case.dtype)
    head = lm_head.FourBitHead(
        lm_head.FourBit(packed, _meta(16), absmax, nested, blocksize, 256, dtype), v, d
    )
    head.block(3, 100, dtype)
    yield "range"
    head.gather(_meta(40, dtype=torch.int64), dtype)
    yield "rows"


def _run_sequence(case: Case) -> Iterator[str]:
    s, t = case.shape
    # The sum is not of the curve: one of them shows it, with every kind of reference.
    for by_length in (True, False) if case.variant == "lsif" else (True,):
        sequence_loss(
            _meta(t),
            _meta(t, dtype=torch.bool),
            _meta(s + 1, dtype=torch.int64),
            _meta(s, dtype=torch.bool),
            _meta(s),
            h=getattr(h_functions, case.variant),
            ref_token_logps=_meta(t) if case.reference == "token" else None,
            ref_logps=_meta(s) if case.reference == "sequence" else None,
            length_normalize=by_length,
        )
        yield "mean" if by_length else "sum"


def _run_own(case: Case) -> Iterator[str]:
    with mock.patch.object(configs, "own_product", lambda *_: True):
        yield from _run_op(case)


def _run_tiles(case: Case) -> Iterator[str]:
    """The candidates that load least per product, where a program may take a whole SM."""
    row = configs.tile(torch.device("cuda"), torch.bfloat16)
    for tile in configs.CANDIDATES if row.descriptors else ():
        if tile.block_v == 256:
            chosen = tile._replace(descriptors=True)
            with mock.patch.object(configs, "tile", lambda *_, tile=chosen: tile):
                for part in _run_own(case):
                    yield f"{part} {tile}"


RUN = {
    "dense": _run_op,
    "own": _run_own,
    "tile": _run_tiles,
    "lora": _run_op,
    "filter": _run_filter,
    "decode": _run_decode,
    "sequence": _run_sequence,
}
