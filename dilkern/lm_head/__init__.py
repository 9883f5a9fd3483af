"""Every output head behind one small interface; see docs/heads.md for the kinds."""

from dilkern.lm_head.base import HEAD_KINDS, DenseHead, Head, rebuild
from dilkern.lm_head.lora import Adapter, LoRAHead
from dilkern.lm_head.model import LMHead
from dilkern.lm_head.modules import as_head
from dilkern.lm_head.quantized import EightBitHead, FourBit, FourBitHead
from dilkern.lm_head.sharded import VocabParallelHead, absent, call_held

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
    "absent",
    "as_head",
    "call_held",
    "rebuild",
]
