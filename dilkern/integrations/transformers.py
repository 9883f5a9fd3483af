"""The loss head inside a Hugging Face causal LM: `model(..., labels=labels, dil_head=True)`.

Everything goes through `model(...)`, so that DDP, FSDP, PEFT and autocast see one forward. The patch
is on one model instance, is idempotent, and `remove_head` takes it away again.

S sequences, L positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from dilkern.integrations.attention import teach_packed_rows
from dilkern.integrations.data import IGNORE_INDEX, REFERENCE, model_inputs
from dilkern.integrations.heads import check_adapter, is_tied
from dilkern.integrations.metrics import LoggedOutputs
from dilkern.integrations.packing import check_packing
from dilkern.integrations.rows import PackedRow, pack
from dilkern.lm_head import LMHead
from dilkern.lm_head.modules import unwrap
from dilkern.logps import linear_logps, mask_first_labels
from dilkern.losses import Loss
from dilkern.objective import Objective
from dilkern.options import LossKeywords, Unpack
from dilkern.output import PreferenceLossOutput
from dilkern.preference import Counts, loss_from_token_logps
from dilkern.validation import name_of, reject


@dataclass
class DILOutput(ModelOutput):  # type: ignore[misc]
    """What `model(..., labels=labels, dil_head=True)` returns."""

    token_logps: Tensor = None  # type: ignore[assignment]  # (S, L), entry t belongs to label t
    aux_loss: Tensor | None = None  # 0-d, load-balancing loss of MoE models


class _Installed(NamedTuple):
    head: LMHead
    backend: str
    workspace_mib: float
    filter_eps: float | str | None


def keep_trainable(model: Any) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on the CPU.

    With AVX512-BF16 it does so at the first forward in eval mode, never undoes it, and the repacked
    product has no gradient: training after an evaluation would be silently wrong (0.50.2).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _aux_loss(config: Any, router_logits: Any, attention_mask: Tensor | None) -> Tensor:
    # Mixtral's function is the one that every MoE family of transformers uses.
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    return torch.as_tensor(
        load_balancing_loss_func(
            router_logits, config.num_experts, config.num_experts_per_tok, attention_mask
        )
    )


def _score(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DILOutput:
    """Run the backbone, then `linear_logps` on its last hidden layer."""
    installed: _Installed = model._dil_head
    labels = kwargs.pop("labels", None)
    row: PackedRow | None = kwargs.get("packed_row")
    if row is not None:
        labels = row.targets
        teach_packed_rows(model)
    if labels is None:
        reject("dil_head=True needs `labels`", "none", "Pass labels aligned with input_ids.")
    kwargs["use_cache"] = False
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    outputs = model.base_model(*args, **kwargs)
    if row is not None and not row.segments.windows:  # else each token would see all others
        reject(
            "packed rows (padding_free, shared_prompts) need a model that calls the attention "
            "function of its attn_implementation",
            f"{name_of(model)}, which does not call that of {config._attn_implementation!r}",
            "Set padding_free=False and shared_prompts=False (answers=None in a loop of your own), "
            "or load it with attn_implementation='sdpa'.",
        )
    hidden_states = outputs.last_hidden_state
    device = next(model.get_output_embeddings().parameters()).device
    if device.type != "cpu":  # a model spread over GPUs; an offloaded head is streamed instead
        hidden_states = hidden_states.to(device)
    if row is not None:
        hidden_states = row.scored_states(hidden_states)
    token_logps = linear_logps(
        hidden_states,
        installed.head,
        labels.to(hidden_states.device),
        shift=row is None,
        ignore_index=IGNORE_INDEX,
        backend=installed.backend,
        workspace_mib=installed.workspace_mib,
        filter_eps=installed.filter_eps,
    )
    if row is not None:
        token_logps = row.per_sequence(token_logps)
    aux_loss = None
    if kwargs.get("output_router_logits"):
        # A token counts as often as the padded batch has it.
        mask = kwargs.get("attention_mask") if row is None else row.times
        aux_loss = _aux_loss(config, outputs.router_logits, mask)
    return DILOutput(token_logps=token_logps, aux_loss=aux_loss)


def install_head(
    model: Any,
    *,
    backend: str = "auto",
    workspace_mib: float = 256,
    filter_eps: float | str | None = None,
) -> None:
    """Teach a causal LM the keyword `dil_head=True`; any other call of it is unchanged.

    4-bit layers are kept trainable on CPUs: see `keep_trainable`.

    `model(input_ids, attention_mask=..., labels=labels, dil_head=True)` returns a `DILOutput` whose
    token_logps (S, L) belong to `labels` (aligned with input_ids, -100 ignored). Installing again
    only changes the options. Deep copies carry a head of their own; an unpickled model needs it anew.

    Args:
        model: a causal LM of transformers, or a PEFT, DDP or compiled wrapper of one.
        backend, workspace_mib, filter_eps: see `linear_logps`.

    Raises:
        ValueError: the head of the model is not known (see `LMHead.from_model`).
    """
    model = unwrap(model)
    keep_trainable(model)
    installed = getattr(model, "_dil_head", None)
    # Pickle stores a bound method by its name: of our forward it gives back the class's own.
    if installed is not None and model._dil_forward.__func__ is not type(model).forward:
        model._dil_head = _Installed(installed.head, backend, workspace_mib, filter_eps)
        return
    model._dil_head = _Installed(LMHead.from_model(model), backend, workspace_mib, filter_eps)
    # What stood on the instance (device hooks of accelerate, other patches). Kept on the instance and
    # not in a closure: deepcopy then binds it to the copy.
    model._dil_previous = model.__dict__.get("forward")

    # `generate` and `Trainer` read the signature of the class's own forward.
    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, dil_head: bool = False, **kwargs: Any) -> Any:
        if dil_head:
            return _score(self, args, kwargs)
        if self._dil_previous is not None:
            return self._dil_previous(*args, **kwargs)
        return type(self).forward(self, *args, **kwargs)

    model.forward = types.MethodType(forward, model)
    model._dil_forward = model.forward


def remove_head(model: Any) -> None:
    """Undo `install_head`; nothing happens on a model without it.

    Raises:
        ValueError: something else has wrapped `forward` since.
    """
    model = unwrap(model)
    if getattr(model, "_dil_head", None) is None:
        return
    if model.__dict__.get("forward") != model._dil_forward:
        reject(
            "the head can only be removed while it is the outermost patch of `forward`",
            "a later patch",
            "Undo that first, e.g. `accelerator.unwrap_model(model, keep_fp32_wrapper=False)`.",
        )
    if model._dil_previous is None:
        del model.forward
    else:
        model.forward = model._dil_previous
    del model._dil_head, model._dil_previous, model._dil_forward


def labels_of(inputs: Mapping[str, Tensor]) -> Tensor:
    """Return `labels` of a batch, or input_ids where completion_mask is 1; -100 where not scored.

    A sequence's first token is not: nothing predicts it, padding before it neither.

    Raises:
        ValueError: none of the batch is to be scored, which would be a loss of 0 that says nothing.
    """
    labels = inputs.get("labels")
    if labels is None:
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE_INDEX)
    labels = mask_first_labels(labels, ignore_index=IGNORE_INDEX)
    mask = inputs.get("attention_mask")
    if mask is not None:  # the first token may stand behind padding
        labels = labels.masked_fill((mask.cumsum(1) == 1) & (mask != 0), IGNORE_INDEX)
    if not torch.compiler.is_compiling() and not (labels != IGNORE_INDEX).any():
        reject(
            "a batch must have a token to score, one of a completion with another before it",
            f"labels of shape {tuple(labels.shape)}, all of them {IGNORE_INDEX}"
            if "labels" in inputs
            else f"completion_mask of shape {tuple(labels.shape)} without one",
            "Look at the mask, and at truncation: a max_length that ends within the prompts leaves "
            "no completion.",
        )
    return labels


def compute_loss(
    model: Any,
    inputs: Mapping[str, Any],
    *,
    ref_model: Any = None,
    loss: str | Loss | Objective = "lsif",
    params: Mapping[str, float] | None = None,
    weights: Tensor | None = None,  # (S,)
    counts: Counts | None = None,
    kl_log_ratios: Tensor | None = None,
    answers: int | None = None,
    **options: Unpack[LossKeywords],
) -> PreferenceLossOutput:
    """Compute a preference loss of one batch, for any training loop.

    The head must be installed on `model` (and on `ref_model`): see `install_head`.

    Args:
        model: the (wrapped) policy, called as `model(..., dil_head=True)`.
        inputs: input_ids, attention_mask and labels or completion_mask (S, L), chosen first half;
            optionally is_chosen (S,) and ref_logps (S,), summed log-probs of the reference.
        ref_model: a frozen model; None: `ref_logps` of the batch, or for a loss with a reference and
            a PEFT model the model with its adapter disabled, in the mode that it is in: dropout of
            the base model, if it has any, acts on both.
        loss, params, weights, counts, kl_log_ratios, **options: see `preference_loss`.
        answers: run the models on one row without padding in which each prompt is once, with so
            many answers: 2 for pairs, 1 to share nothing (see `dilkern.integrations.rows.pack`,
            and `check_packing` for whether the model can); None: on the padded batch.

    Returns:
        PreferenceLossOutput.

    Raises:
        ValueError: no reference for a loss that needs one, one that would go unused, no head.
    """
    labels = labels_of(inputs)
    if answers is None:
        kwargs = {**model_inputs(inputs), "labels": labels}
    else:
        (row,) = pack(inputs, labels, answers=answers)
        kwargs = row.inputs

    def score(scorer: Any) -> Tensor:
        output = scorer(**kwargs, dil_head=True)
        # A model without our head takes dil_head=True for an option of its attention.
        token_logps: Tensor | None = getattr(output, "token_logps", None)
        if token_logps is None:
            reject(
                "the head must be installed on the model and on `ref_model`",
                name_of(unwrap(scorer)) + " without it",
                "Call install_head(model) first; a pickled model has lost it.",
            )
        return token_logps[:, -labels.shape[1] :]  # prompt tuning puts virtual tokens in front

    objective = Objective.of(loss, params, options)
    entry, ref_logps = objective.loss, inputs.get("ref_logps")
    unread = [name for name in REFERENCE if name in inputs]
    if ref_model is not None and (ref_logps is not None or not entry.reference):
        unread.append("ref_model")
    if unread:
        reject(
            f"the reference of loss {entry.name!r} is "
            + ("`ref_logps` of the batch, or `ref_model`" if entry.reference else "none"),
            ", ".join(unread),
            "Drop what is not used; log-probs of a batch come as ref_logps (S,), chosen first.",
        )
    if entry.reference and ref_logps is None:
        adapted = model.module if hasattr(model, "module") else model
        if ref_model is None and not hasattr(adapted, "disable_adapter"):
            reject(
                f"loss {entry.name!r} needs a reference",
                "no ref_model, no ref_logps in the batch, no PEFT adapter to disable",
                "Pass one of them, or take a loss without a reference such as 'simpo'.",
            )
        with torch.no_grad():
            if ref_model is not None:
                ref_logps = score(ref_model)
            else:
                with adapted.disable_adapter():
                    ref_logps = score(model)
    return loss_from_token_logps(
        objective,
        score(model),
        labels != IGNORE_INDEX,
        ref_logps=ref_logps,
        is_chosen=inputs.get("is_chosen"),
        weights=weights,
        counts=counts,
        kl_log_ratios=kl_log_ratios,
        backend=unwrap(model)._dil_head.backend,
    )


class PreferenceMixin:
    """Give a `transformers.Trainer` a preference loss: `class MyTrainer(PreferenceMixin, Trainer)`.

    The data collator must produce what `PreferenceCollator` does; set remove_unused_columns=False.

    Args:
        *args, **kwargs: as `transformers.Trainer`.
        preference: an `Objective`, or keywords of one, e.g. {"loss": "bce", "beta": 0.5}.
        ref_model: a second model, frozen here; None: see `compute_loss`.
        answers: 2 to run each prompt once for its two answers; see `compute_loss`.

    Raises:
        ValueError: an adapter on a layer that lm_head and embedding share; see also `install_head`,
            `check_packing`, `compute_loss` and `preference_loss`.

    Example:
        >>> class MyTrainer(PreferenceMixin, Trainer): ...  # doctest: +SKIP
        >>> MyTrainer(model, args, train_dataset=rows,  # doctest: +SKIP
        ...           data_collator=PreferenceCollator(tokenizer), preference={"loss": "lsif"})
    """

    # The loss is a mean over a batch: gradient accumulation must divide by the number of batches.
    loss_is_scaled_for_ga: ClassVar[bool] = False
    model: Any
    args: Any
    accelerator: Any

    def __init__(
        self,
        *args: Any,
        preference: Mapping[str, Any] | Objective | None = None,
        ref_model: Any = None,
        answers: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.args.remove_unused_columns:
            reject(
                "the collator needs the columns of the dataset",
                "remove_unused_columns=True",
                "Set remove_unused_columns=False in TrainingArguments.",
            )
        self.model_accepts_loss_kwargs = False  # transformers before 5.19 reads this instead
        self.objective = (
            preference if isinstance(preference, Objective) else Objective(**(preference or {}))
        )
        self.ref_model, self.answers = ref_model, answers
        if is_tied(self.model):
            check_adapter(self.model)
        for model in (self.model, ref_model):
            if model is not None:
                install_head(model)
        if ref_model is not None:
            ref_model.requires_grad_(False).eval().to(self.accelerator.device)
        if answers is not None:
            for model in (self.model, ref_model):
                if model is not None:
                    check_packing(model, answers)
        self._outputs = LoggedOutputs()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss of a batch and keep its metrics for the next log."""
        output = compute_loss(
            model, inputs, ref_model=self.ref_model, loss=self.objective, answers=self.answers
        )
        is_chosen = inputs.get("is_chosen")
        self._outputs.keep(self.model.training, output, self.accelerator, is_chosen)
        if not return_outputs:
            return output.loss
        ratios = torch.cat([output.chosen_log_ratios, output.rejected_log_ratios])
        return output.loss, {"loss": output.loss, "log_ratios": ratios}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the metrics over the sequences since the last log, named as in `DILTrainer`."""
        training = self.model.training
        prefix = "" if training else "eval_"
        logs.update({prefix + name: x for name, x in self._outputs.take(training).items()})
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate or predict; metrics that an earlier call left are not of this one."""
        self._outputs.clear(training=False)
        return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
