"""Which tile each kernel uses on which architecture: one table, nothing tunes at run time.

The dry run compiles the rows for their architecture; tools/tune.py proposes rows on a GPU.
None of them is measured yet: they were chosen by registers, shared memory and the roofline of
docs/kernels.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

# Said at every launch: later Triton releases change the default.
FUSED = {"enable_fp_fusion": True}


class Tile(NamedTuple):
    """A matrix-product tile of T tokens x V words, D at a time."""

    block_t: int
    block_v: int
    block_d: int
    warps: int
    stages: int
    descriptors: bool = False  # tensor descriptors (TMA) instead of pointers
    registers: int | None = None  # the most per thread; without a softcap, with one they spill

    def launch(self, softcap: float) -> dict[str, Any]:
        found = {"num_warps": self.warps, "num_stages": self.stages, **FUSED}
        return found if softcap or self.registers is None else found | {"maxnreg": self.registers}


class Rows(NamedTuple):
    """A block of rows x columns of an elementwise or reducing kernel."""

    block_t: int
    block: int
    warps: int

    @property
    def launch(self) -> dict[str, Any]:
        return {"num_warps": self.warps, **FUSED}


ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# 16-bit inputs. 128 x 128 everywhere: on sm_90 two such programs share an SM, if neither has more
# than 128 registers, and the epilogue of one hides under the products of the other.
_TILES_16 = {
    "sm_80": Tile(128, 128, 64, 8, 3),
    "sm_86": Tile(128, 128, 32, 8, 3),
    "sm_90": Tile(128, 128, 64, 8, 3, descriptors=True, registers=128),
    "sm_100": Tile(128, 128, 64, 8, 3, descriptors=True),
    "sm_120": Tile(128, 128, 32, 8, 3),
    "gfx942": Tile(128, 128, 64, 8, 2),
    "interpreter": Tile(32, 64, 64, 1, 1),
}
# What tools/tune.py times beside the row above, with its descriptors. Two of the first four fit
# an SM of sm_90 (at most 113 KiB of shared memory each), one of the others, which load less per
# product: 128 x 128 needs 32 KiB of operands per 512 cycles, as much as the L2 cache gives.
CANDIDATES = (
    Tile(128, 128, 64, 4, 3),
    Tile(128, 128, 32, 8, 4),
    Tile(128, 64, 64, 4, 4),
    Tile(128, 64, 64, 8, 3),
    Tile(128, 128, 64, 8, 4),
    Tile(128, 256, 64, 8, 3),
    Tile(128, 256, 64, 8, 4),
    Tile(256, 128, 64, 8, 3),
    Tile(256, 128, 64, 8, 4),
)
# fp32 inputs, exact products ("ieee") by default.
_TILES_32 = {
    "sm_80": Tile(64, 64, 32, 4, 3),
    "sm_86": Tile(64, 64, 32, 4, 3),
    "sm_90": Tile(64, 64, 32, 4, 3),
    "sm_100": Tile(64, 64, 32, 4, 3),
    "sm_120": Tile(64, 64, 32, 4, 3),
    "gfx942": Tile(64, 64, 32, 4, 2),
    "interpreter": Tile(32, 64, 64, 1, 1),
}

# U += P W over loud words: T tokens x D columns, V words at a time. The words' rows lie apart, so
# they come by pointers everywhere; descriptors are for P, and for a block that is taken whole.
_PRODUCTS_16 = {
    "sm_80": Tile(128, 32, 128, 8, 3),
    "sm_86": Tile(128, 32, 128, 8, 3),
    "sm_90": Tile(128, 64, 128, 8, 3, descriptors=True),
    "sm_100": Tile(128, 64, 128, 8, 3, descriptors=True),
    "sm_120": Tile(128, 32, 128, 8, 3),
    "gfx942": Tile(128, 32, 128, 8, 2),
    "interpreter": Tile(32, 16, 64, 1, 1),
}
_PRODUCTS_32 = {
    "sm_100": Tile(64, 16, 64, 4, 3),
    "gfx942": Tile(64, 32, 64, 4, 2),
    "interpreter": Tile(32, 16, 64, 1, 1),
}
_PRODUCTS_32_ANY = Tile(64, 32, 64, 4, 3)

# Blocks of the other kernels: on any GPU, and in the interpreter.
_ROWS = {
    # The logits that one program holds in registers where the library has multiplied.
    "chunk": (Rows(1, 4096, 8), Rows(64, 128, 1)),
    "fold": (Rows(1, 1024, 4), Rows(64, 128, 1)),
    "dot": (Rows(1, 1024, 4), Rows(64, 64, 1)),
    "decode": (Rows(4, 512, 4), Rows(16, 64, 1)),
    "sequence": (Rows(1, 1024, 4), Rows(1, 64, 1)),
    # The word filter: probability of words (all rows, `block` words per program), loud columns side
    # by side, mean of the quiet words (block_t words x block columns).
    "mass": (Rows(128, 64, 8), Rows(32, 64, 1)),
    "take": (Rows(2, 2048, 8), Rows(32, 128, 1)),
    "mean": (Rows(8, 256, 4), Rows(32, 64, 1)),
}

# Words of a block come in multiples of this where the library multiplies.
WORDS = 512
# Words of the first block, in which every row finds its first anchor.
_FIRST, _FIRST_INTERPRETED = 512, 64

# Largest hidden size at which P comes from our own product; above it the library
# product takes over. From the roofline of docs/kernels.md, not measured: the
# library is ahead once its product is faster than ours by more than the traffic of fp32 logits.
# fp32 always takes the library, which obeys PyTorch's TF32 settings by itself. ROCm always takes
# our own: its library does not multiply 16-bit matrices into fp32.
# Hopper and Blackwell take the library until tools/tune.py has said otherwise: what it costs is known,
# and by the roofline ours, bound by the L2 cache, comes level with it at D = 1024 at best.
_TILES_UP_TO_D = {
    "sm_80": 2048,
    "sm_86": 2048,
    "sm_90": 0,
    "sm_100": 0,
    "sm_120": 2048,
    "gfx942": 1 << 30,
    "interpreter": 64,
}


def arch(device: torch.device) -> str:
    """Return the row name that serves `device`, the nearest known one for an unknown GPU."""
    if device.type == "cpu":
        return "interpreter"
    if device.type != "cuda":
        return "sm_80"  # plain pointers and small tiles: right anywhere
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 8:
        return "sm_80" if minor == 0 else "sm_86"  # 8.9 has the limits of 8.6
    return {9: "sm_90", 10: "sm_100", 12: "sm_120"}.get(major, "sm_80")


def tile(device: torch.device, dtype: torch.dtype) -> Tile:
    """The tile of `softmax_tile` and `dz_tile` where they multiply."""
    table = _TILES_32 if dtype is torch.float32 else _TILES_16
    return table[arch(device)]


def product(device: torch.device, dtype: torch.dtype) -> Tile:
    """The tile of `add_words`."""
    if dtype is torch.float32:
        return _PRODUCTS_32.get(arch(device), _PRODUCTS_32_ANY)
    return _PRODUCTS_16[arch(device)]


def rows(kernel: str, device: torch.device) -> Rows:
    """The block of a kernel that multiplies no matrices, by its name in `_ROWS`."""
    on_gpus, interpreted = _ROWS[kernel]
    return interpreted if arch(device) == "interpreter" else on_gpus


def first_words(device: torch.device) -> int:
    return _FIRST_INTERPRETED if arch(device) == "interpreter" else _FIRST


def own_product(device: torch.device, dtype: torch.dtype, hidden_size: int) -> bool:
    """Whether P and dz come from our own product rather than the library's; never of need_u."""
    return dtype is not torch.float32 and hidden_size <= _TILES_UP_TO_D[arch(device)]


def input_precision(dtype: torch.dtype) -> str:
    """Exact fp32 products unless PyTorch's own setting allows TF32, by whichever of its names."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype is torch.float32 and allowed else "ieee"
