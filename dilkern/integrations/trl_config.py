"""`DILConfig`: the options of TRL's `DPOConfig` that apply, and those of the losses."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from trl.trainer.dpo_config import DPOConfig

from dilkern.backends.base import BACKENDS
from dilkern.backends.word_filter import threshold
from dilkern.integrations.packing import check_attention
from dilkern.losses import Loss, get_loss
from dilkern.objective import Objective
from dilkern.options import OPTION_NAMES, LossOptions, described
from dilkern.validation import check_bool, check_choice, check_count, check_positive, reject

# Options of DPOConfig that DILTrainer does not have: (name, the value that means "not asked for",
# what to do instead).
_FOREIGN = (
    ("loss_weights", None, "Use sft_weight to add the likelihood of the chosen completions."),
    ("ld_alpha", None, "Leave it out."),
    ("f_divergence_type", "reverse_kl", "Use loss_type='fdpo_forward_kl', 'fdpo_jsd', ..."),
    ("f_alpha_divergence_coef", 0.5, "Use loss_type='fdpo_alpha' with loss_params={'alpha': ...}."),
    ("use_weighting", False, "Leave it out."),
    ("discopop_tau", 0.05, "Leave it out."),
    ("use_liger_kernel", False, "Leave it out: it replaces the forward that dilkern extends."),
)
_OF_REFERENCE = ("precompute_ref_log_probs", "sync_ref_model", "reference_free")


def _check_report_to(names: Any) -> None:
    """Refuse logging backends that are unknown or not installed; transformers does so later."""
    installed = {*get_available_reporting_integrations(), "flyte"}  # flyte has no probe
    for name in names:
        check_choice("report_to", name, ("none", "all", *INTEGRATION_TO_CALLBACK))
        if name not in installed:
            reject(
                f"report_to={name!r} needs its package",
                "it is not installed",
                f"pip install {name}, or take one of: none, {', '.join(sorted(installed))}.",
            )


def _has_bf16(use_cpu: bool) -> bool:
    """Return whether the device of a run has units for bf16."""
    if use_cpu or not torch.accelerator.is_available():
        able: Any = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch cannot tell
        return any(value for name, value in able.items() if "bf16" in name)
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)


@described
@dataclass
class DILConfig(LossOptions, DPOConfig):  # type: ignore[misc]
    """`DPOConfig` with the losses of dilkern.

    Args:
        loss_type: name or alias of a loss in `dilkern.losses.LOSSES`.
        loss_params: its own parameters, e.g. {"lam": -0.5} for "power".
        beta, length_normalize, ..., strict: the fields of `dilkern.options.LossOptions`.
        reference_free: f = log pi_theta on purpose, no reference model is loaded or run.
        padding_free: run the model on one row of all sequences without padding; results are the same.
        shared_prompts: padding_free, and of the two answers of a pair the prompt, or what of it both
            begin with, goes through the model once (docs/shared_prompts.md); results are the same.
        max_tokens_per_batch: of padding_free or shared_prompts: cut a batch into rows of at most so
            many tokens, each with its own forward and backward, for the gradient of the whole
            batch; pairs stay whole, and one that is larger goes alone. None for one row.
        train_sampling_strategy: as in `TrainingArguments`, and "group_by_length" knows pairs: batches
            of similar lengths, drawn anew from the seed in every epoch.
        backend: auto, torch or triton; see `linear_logps`.
        workspace_mib: temporary memory of the head; see `linear_logps`.
        filter_eps: auto, or the mean probability below which a word enters the gradient by its mean;
            None for exact gradients; see `linear_logps`.
        quantize_lm_head: the lm_head too in 4 bits, for a model loaded in 4 bits; of a tied one a copy.
        learning_rate: None for 1e-4 where an adapter trains and 1e-6 where all weights do.
        bf16: None for what the hardware multiplies in; in software bf16 is slower than fp32.
        logging_nan_inf_filter: as in `TrainingArguments`, but off: a loss of NaN is logged as NaN,
            where transformers would log the mean of the steps before it, at first 0.

    Raises:
        ValueError: an option that the loss or the trainer does not have.

    Example:
        >>> from dilkern.integrations.trl import DILConfig  # doctest: +SKIP
        >>> DILConfig("out", loss_type="bce", beta=0.5, use_cpu=True).beta  # doctest: +SKIP
        0.5
    """

    # Not annotated: that would make it a field.
    _VALID_DICT_FIELDS = [*DPOConfig._VALID_DICT_FIELDS, "loss_params"]  # noqa: RUF012

    loss_type: str = "lsif"  # type: ignore[assignment]
    loss_params: dict[str, Any] | str | None = None
    reference_free: bool = False
    shared_prompts: bool = False
    max_tokens_per_batch: int | None = None
    learning_rate: float | None = None  # type: ignore[assignment]
    logging_nan_inf_filter: bool = False
    backend: str = "auto"
    workspace_mib: float = 256
    filter_eps: float | str | None = None
    quantize_lm_head: bool = False

    def __post_init__(self) -> None:
        loss_type = self.loss_type
        if isinstance(loss_type, (list, tuple)):
            if len(loss_type) != 1:
                reject(
                    "`loss_type` must be one loss",
                    repr(loss_type),
                    "Use sft_weight to add the likelihood of the chosen completions.",
                )
            loss_type = loss_type[0]
        if not isinstance(loss_type, str):
            reject(
                "`loss_type` must be a name, which a saved configuration can hold",
                type(loss_type).__name__,
                "Enter a loss of your own first: dilkern.losses.LOSSES[loss.name] = loss.",
            )
        entry = get_loss(loss_type, argument="loss_type")
        if not torch.accelerator.is_available():
            self.use_cpu = True  # transformers wants to be told before it takes bf16 there
        if self.bf16 is None:
            self.bf16 = not self.fp16 and _has_bf16(self.use_cpu)
        if isinstance(self.learning_rate, str):
            reject(
                "`learning_rate` must be a number",
                f"the text {self.learning_rate!r}",
                "Write 1.0e-4 or 0.0001: YAML reads 1e-4 as text.",
            )
        if self.learning_rate is None and self.deepspeed:
            reject(
                "`learning_rate` must be given with DeepSpeed, which takes it from the configuration",
                "none",
                "Set it, e.g. learning_rate=1e-4 for an adapter, 1e-6 for full training.",
            )
        super().__post_init__()
        self.loss_type = entry.name
        for name, neutral, remedy in _FOREIGN:
            value = getattr(self, name, neutral)
            if value != neutral:
                reject(f"DILTrainer has no `{name}`", repr(value), remedy)
        _check_report_to(self.report_to)
        for name in ("padding_free", "shared_prompts"):
            check_bool(name, getattr(self, name))
        init: Any = self.model_init_kwargs or {}
        packed = self.padding_free or self.shared_prompts
        check_attention(init.get("attn_implementation"), self.device, packed)
        self._check_batches(entry)
        check_positive("workspace_mib", self.workspace_mib)
        check_choice("backend", self.backend, ("auto", *BACKENDS))
        if isinstance(self.filter_eps, str):  # as a command line gives numbers
            with contextlib.suppress(ValueError):
                self.filter_eps = float(self.filter_eps)
        threshold(self.filter_eps, torch.float32)
        pairs = f"loss {entry.name!r} scores mismatched pairs, which change with every batch"
        for clash, rule, names in (
            (not entry.reference, f"loss {entry.name!r} has no reference", _OF_REFERENCE),
            (self.reference_free, "`reference_free` runs no reference", _OF_REFERENCE[:2]),
            (entry.baseline, pairs, _OF_REFERENCE[:1]),
        ):
            for name in names:
                if clash and getattr(self, name):
                    reject(rule, f"{name}=True", "Leave it out, or take another loss.")
        self.objective()  # every other rule of the loss, before anything is loaded

    @property
    def sampling(self) -> str:
        """How batches are drawn; transformers 5.0 has one switch for it."""
        old = "group_by_length" if getattr(self, "group_by_length", False) else "random"
        return str(getattr(self, "train_sampling_strategy", old))

    def _check_batches(self, entry: Loss) -> None:
        """Rules on how a batch is put together and cut."""
        if self.torch_compile and (self.padding_free or self.shared_prompts):
            reject(
                "packed rows are cut anew in every batch, which torch.compile would compile anew",
                "torch_compile=True",
                "Set torch_compile=False, or padding_free=False and shared_prompts=False.",
            )
        sampling = self.sampling
        meets = f"loss {entry.name!r} depends on which examples meet in a batch"
        if sampling == "batch_rebalance":
            reject(
                "every batch must hold as many pairs: its loss is a mean over them",
                "train_sampling_strategy='batch_rebalance'",
                "Use 'group_by_length', or max_tokens_per_batch to bound the tokens of a row.",
            )
        if sampling == "group_by_length" and entry.baseline:
            reject(
                meets, "train_sampling_strategy='group_by_length'", "Use 'random', or another loss."
            )
        if self.max_tokens_per_batch is None:
            return
        check_count("max_tokens_per_batch", self.max_tokens_per_batch, 4096)
        if not (self.padding_free or self.shared_prompts):
            reject(
                "max_tokens_per_batch counts the tokens of packed rows",
                "neither padding_free nor shared_prompts",
                "Set shared_prompts=True, or lower per_device_train_batch_size.",
            )
        if entry.baseline:
            reject(meets, "max_tokens_per_batch", "Leave it out, or take another loss.")
        if "lomo" in self.optim or "layerwise" in self.optim:
            reject(
                "max_tokens_per_batch adds gradients up over several backward passes",
                f"optim={str(self.optim)!r}, which steps in each",
                "Take another optimizer, or leave it out.",
            )

    def objective(self) -> Objective:
        """Return the loss that this configuration asks for, with its options."""
        options: Any = {name: getattr(self, name) for name in OPTION_NAMES}
        params: Any = self.loss_params
        return Objective(self.loss_type, params, **options)
