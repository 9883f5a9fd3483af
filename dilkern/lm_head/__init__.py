"""Every output head behind one small interface; see docs/heads.md for the kinds."""

from dilkern.lm_head.base import HEAD_KINDS, DenseHead, Head, rebuild
from dilkern.lm_head.lora import Adapter, LoRAHead
from dilkern.lm_head.model import LMHead
from dilkern.lm_head.modules import as_head
from dilkern.lm_head.quantized import EightBitHead, FourBit, FourBitHead
from dilkern.lm_head.sharded import (
    VocabParallelHead,
    call_gathered,
    sharded_by_zero3,
    weights_come_later,
)

# The kinds that the op rebuilds from tensors and spec; a new kind is one class and one name here.
HEAD_KINDS.update({cls.kind: cls for cls in (DenseHead, FourBitHead, EightBitHead, LoRAHead)})

__all__ = [
    "Adapter",
    "DenseHead",
    "EightBitHead",
    "FourBit",
    "FourBitHead",
    "Head",
    "LMHead",
    "LoRAHead",
    "VocabParallelHead",
    "as_head",
    "call_gathered",
    "rebuild",
    "sharded_by_zero3",
    "weights_come_later",
]
