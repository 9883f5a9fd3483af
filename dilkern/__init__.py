"""dilkern: Direct Imitation Learning losses without the logits."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path


def _bind_checkout_kernels() -> None:
    """Make `dilkern.kernels` importable from a checkout, where the folder lies beside the package.

    Inert in an installed wheel. See docs/architecture.md for why `kernels/` has no __init__.py.
    """
    here = Path(__file__).resolve().parent
    folder = here.parent / "kernels"
    if (here / "kernels").is_dir() or not (here.parent / "setup.py").is_file():
        return
    name = f"{__name__}.kernels"
    spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    globals()["kernels"] = module


_bind_checkout_kernels()

from dilkern.filter_report import FilterReport, filter_report  # noqa: E402
from dilkern.functional import DILLoss, fused_dil_loss, fused_preference_loss  # noqa: E402
from dilkern.lm_head import DenseHead, Head, LMHead  # noqa: E402
from dilkern.logps import linear_logps  # noqa: E402
from dilkern.losses import LOSSES, Loss  # noqa: E402
from dilkern.objective import Objective  # noqa: E402
from dilkern.options import LossOptions  # noqa: E402
from dilkern.output import (  # noqa: E402
    DILLossOutput,
    PreferenceLossOutput,
    preference_metrics,
)
from dilkern.preference import preference_loss  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "LOSSES",
    "DILLoss",
    "DILLossOutput",
    "DenseHead",
    "FilterReport",
    "Head",
    "LMHead",
    "Loss",
    "LossOptions",
    "Objective",
    "PreferenceLossOutput",
    "filter_report",
    "fused_dil_loss",
    "fused_preference_loss",
    "linear_logps",
    "preference_loss",
    "preference_metrics",
]
