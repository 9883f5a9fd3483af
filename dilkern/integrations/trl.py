"""`DILTrainer`: TRL's `DPOTrainer` with every loss of the registry, never holding the logits.

Replaced are the parent's scoring of policy and reference and its loss, and what hangs on them: checks
of data and options (trl_checks.py), what an adapter file holds. Data preparation, PEFT, quantisation,
evaluation, checkpoints and logging stay TRL's.

S sequences, P pairs, L positions.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import Tensor
from transformers import AutoConfig, AutoProcessor
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import DataCollatorForVisionUnpairedPreference
from trl.trainer.utils import create_model_from_path, get_config_model_id, use_adapter

from dilkern.integrations.card import model_card
from dilkern.integrations.collators import (
    UnpairedCollator,
    UnpairedVisionCollator,
    mismatched,
)
from dilkern.integrations.data import (
    IGNORE_INDEX,
    check_completions,
    check_differences,
    model_inputs,
)
from dilkern.integrations.heads import (
    adapter_alone,
    check_adapter,
    check_quantization,
    is_tied,
    quantize_lm_head,
)
from dilkern.integrations.metrics import LoggedOutputs
from dilkern.integrations.packing import check_packing
from dilkern.integrations.rows import pack
from dilkern.integrations.transformers import (
    DILOutput,
    install_head,
    labels_of,
)
from dilkern.integrations.trl_checks import (
    brings_reference,
    check_cutting,
    check_run,
    check_tokens,
    has_images,
    is_unpaired,
)
from dilkern.integrations.trl_config import DILConfig
from dilkern.lm_head import as_head, weights_come_later
from dilkern.lm_head.modules import unwrap
from dilkern.output import PreferenceLossOutput, joined
from dilkern.preference import Counts, loss_from_token_logps
from dilkern.validation import reject

__all__ = ["DILConfig", "DILTrainer"]

logger = logging.getLogger(__name__)


class _NoReference(torch.nn.Module):
    """Given to the parent as `ref_model` where no reference is needed, so that it loads none."""

    class config:
        @staticmethod
        def get_text_config() -> None:
            return None

    def forward(self) -> None:
        raise AssertionError("a loss without a reference asked for one")


@contextlib.contextmanager
def _head_without_adapter(model: Any) -> Iterator[None]:
    """Let `get_output_embeddings` of this one model show the layer under an adapter on the lm_head.

    TRL since 1.15 refuses such an adapter, because its own head reads the frozen weight alone. Ours
    reads the adapter too, so this is open only until ours is installed.
    """
    causal = unwrap(model)

    def shown(self: Any) -> Any:
        head = type(self).get_output_embeddings(self)
        return head.get_base_layer() if hasattr(head, "get_base_layer") else head

    causal.get_output_embeddings = types.MethodType(shown, causal)
    try:
        yield
    finally:
        del causal.get_output_embeddings


def _source(args: Any) -> dict[str, Any]:
    """Return which files of a model to take, for what is loaded beside its weights."""
    init = args.model_init_kwargs or {}
    return {"revision": init.get("revision"), "trust_remote_code": args.trust_remote_code}


def _say(line: str | None, args: Any) -> None:
    """Show a line once, at the level that is shown without any setting."""
    if line is not None and args.process_index == 0:
        logger.warning(line)


def _evals(kwargs: dict[str, Any]) -> list[Any]:
    """Return the evaluation datasets of the trainer's keywords: none, one, or those of a dict."""
    datasets = kwargs.get("eval_dataset")
    if datasets is None:
        return []
    return list(datasets.values()) if isinstance(datasets, dict) else [datasets]


class _ByLength(LengthGroupedSampler):  # type: ignore[misc]
    """transformers' batches of similar lengths, of which each epoch's follow from a seed alone.

    Theirs are drawn from the generator of the process: on all ranks alike, and after a resume as
    before, only by luck.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next; accelerate's loaders do."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        return iter(super().__iter__())


class _Part(NamedTuple):
    """Sequences of a batch that go through the model together."""

    inputs: dict[str, Any]  # of the model's forward
    labels: Tensor  # (S', L)
    ref_logps: Tensor | None  # (S',), where the batch brings them
    is_chosen: Tensor | None  # (S',)


class DILTrainer(DPOTrainer):  # type: ignore[misc]
    """TRL's `DPOTrainer` with the losses of dilkern and its memory.

    As in `DPOTrainer`: full, LoRA and QLoRA training, evaluation, resume, precomputed reference
    log-probs; beyond it: adapters on the lm_head, padding_free and shared_prompts. Options of
    `DPOConfig` that have no meaning here are refused; docs/trainers.md lists what was run. Unpaired
    datasets (columns prompt, completion, label) work with pointwise losses: chosen and rejected are
    each averaged over their own count of the batch of all ranks; a batch without one kind has that
    term 0.

    Args:
        model, ref_model, **kwargs: as `DPOTrainer`. Losses without a reference load none. A dataset
            with columns ref_chosen_logps and ref_rejected_logps (summed log-probs) needs none either.
        args: a `DILConfig`.

    Raises:
        ValueError: options or data that do not fit the loss.

    Example:
        >>> from dilkern.integrations.trl import DILConfig, DILTrainer  # doctest: +SKIP
        >>> trainer = DILTrainer(  # doctest: +SKIP
        ...     "Qwen/Qwen3-0.6B", args=DILConfig("out", loss_type="lsif"), train_dataset=dataset
        ... )
        >>> trainer.train()  # doctest: +SKIP
    """

    args: Any
    model: Any
    _signature_columns: Any
    _tag_names: Any = ["trl", "dil", "dilkern"]  # noqa: RUF012

    def __init__(
        self, model: Any, ref_model: Any = None, args: DILConfig | None = None, **kwargs: Any
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = DILConfig(f"{name.rstrip('/').split('/')[-1]}-DIL")
        if not isinstance(args, DILConfig):
            reject("`args` must be a DILConfig", type(args).__name__, "Build a DILConfig.")
        args = copy.copy(args)  # the caller's may serve another run
        named = isinstance(model, str)
        adds_adapter = kwargs.get("peft_config") is not None
        adapted = adds_adapter or (not named and is_peft_model(model))
        if args.learning_rate is None:
            args.learning_rate = 1e-4 if adapted else 1e-6
        dataset: Any = kwargs.get("train_dataset")
        for name, data in [
            ("train_dataset", dataset),
            *(("eval_dataset", e) for e in _evals(kwargs)),
        ]:
            if data is None or next(iter(data), None) is None:
                reject(f"`{name}` must have at least one row", "none", "Pass preference data.")
            if has_images(data):  # which the parent hands to the collator without a look
                equal, rows = check_completions(data, name)
                _say(check_differences(equal, rows, name), args)
        # Before the parent's __init__, which may call `compute_ref_log_probs`.
        self._objective = args.objective()
        entry = self._objective.loss
        self._tag_names = [*type(self)._tag_names, entry.name]
        self._unpaired = is_unpaired(dataset)
        self._needs_reference = (
            entry.reference and not args.reference_free and not brings_reference(dataset)
        )
        check_run(
            entry,
            args,
            train=dataset,
            evals=_evals(kwargs),
            needs_reference=self._needs_reference,
            ref_model=ref_model,
            peft_config=kwargs.get("peft_config"),
        )
        init: Any = args.model_init_kwargs
        # Answers that share a row's prompt; 0 for the padded batch.
        self._answers = 2 if args.shared_prompts else int(args.padding_free)
        config = AutoConfig.from_pretrained(model, **_source(args)) if named else model.config
        self._positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        loads_here = named and (adds_adapter or args.quantize_lm_head)
        if loads_here:
            model = self._load(model, config, args, kwargs)
        at_hand = loads_here or not named  # else the parent loads it
        tied = at_hand and is_tied(model)
        if args.quantize_lm_head:
            _say(quantize_lm_head(model), args)
        if not self._needs_reference:
            ref_model = _NoReference()
        elif (
            ref_model is None
            and not (named or adapted or args.precompute_ref_log_probs)
            and not get_config_model_id(model.config)
        ):
            reject(
                "the reference of full training is loaded by the model's name or folder",
                f"a {type(model).__name__} built in memory, and no ref_model",
                "Pass ref_model=copy.deepcopy(model), a peft_config, or reference_free=True.",
            )
        self._checked: set[int] = set()
        self._outputs = LoggedOutputs()
        self._until_installed = contextlib.ExitStack()
        if at_hand:
            self._until_installed.enter_context(_head_without_adapter(model))
        padding_free = args.padding_free
        args.padding_free = False  # the parent warns that it cannot; we can
        if loads_here:
            args.model_init_kwargs = None  # used up; the parent would warn that it ignores them
        try:
            super().__init__(model, ref_model=ref_model, args=args, **kwargs)
        finally:
            args.padding_free, args.model_init_kwargs = padding_free, init
            self._until_installed.close()
        if not self._needs_reference:
            self.ref_model = None
        if args.max_tokens_per_batch is not None:
            check_cutting(
                self.is_deepspeed_enabled or self.is_fsdp_enabled,
                getattr(self, "aux_loss_enabled", False),
            )
        if self._unpaired and kwargs.get("data_collator") is None:
            self.data_collator = UnpairedCollator(self.data_collator)
            if self._is_vision_dataset:
                processor: Any = self.processing_class
                of_kto = DataCollatorForVisionUnpairedPreference(
                    processor,
                    max_length=args.max_length,
                    calculate_kl=False,  # see `mismatched`
                    pad_to_multiple_of=args.pad_to_multiple_of,  # type: ignore[arg-type]
                )
                self.data_collator = UnpairedVisionCollator(of_kto)
        if tied:
            check_adapter(self.model)
        self._install(self.model)
        head = unwrap(self.model).get_output_embeddings()
        if not weights_come_later(head):
            # As every step finds it: dropout of an adapter on it is refused here, not at the first.
            mode = head.training
            as_head(head.train())
            head.train(mode)

    @staticmethod
    def _load(name: str, config: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Load the model as the parent would, which puts the adapter on it and then looks at it."""
        init: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
        init.update(args.model_init_kwargs or {})
        quantization = kwargs.pop("quantization_config", None)
        if quantization is not None:
            if "quantization_config" in init:
                reject(
                    "`quantization_config` must be given once",
                    "one for the trainer and one in model_init_kwargs",
                    "Drop one of them.",
                )
            init["quantization_config"] = quantization
        check_quantization(config, init.get("quantization_config"))
        if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            init["device_map"] = None  # "auto" would spread each rank's model over all GPUs
        if kwargs.get("processing_class") is None:
            kwargs["processing_class"] = AutoProcessor.from_pretrained(name, **_source(args))
        return create_model_from_path(name, **init)

    @property
    def tokens_trained(self) -> int:
        """Tokens of this run's batches on all ranks, prompts included, padding not."""
        return int(self._total_train_tokens)

    def create_model_card(  # type: ignore[override]  # TRL's, not transformers'
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Write README.md into the output folder: loss, training, last results, how to load it."""
        if not self.is_world_process_zero():
            return
        args, model = self.args, self.accelerator.unwrap_model(self.model)
        configs = model.peft_config if is_peft_model(model) else {}
        adapter = configs.get(model.active_adapter) if configs else None
        base = get_config_model_id(model.config) or unwrap(model).__class__.__name__
        card = model_card(
            self._objective,
            args,
            self.state,
            base=base,
            adapter=adapter,
            where=self.hub_model_id or args.output_dir,
            name=model_name,
            dataset=dataset_name,
            tags=sorted({*self._tag_names, *([tags] if isinstance(tags, str) else tags or ())}),
        )
        card.save(Path(args.output_dir) / "README.md")

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with adapter_alone(self.accelerator.unwrap_model(self.model, keep_torch_compile=False)):
            super()._save(output_dir, state_dict)

    def _install(self, model: Any) -> None:
        self._until_installed.close()
        model = self.accelerator.unwrap_model(model)
        args = self.args
        install_head(
            model,
            backend=args.backend,
            workspace_mib=args.workspace_mib,
            filter_eps=args.filter_eps,
        )
        if self._answers and id(model) not in self._checked:
            with self.accelerator.autocast():
                check_packing(model, self._answers)
            self._checked.add(id(model))

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, name: str) -> Any:
        columns = set(next(iter(dataset)))
        missing = {"prompt_ids", "completion_ids", "is_chosen"} - columns
        if "completion_ids" in columns and missing:
            reject(
                f"{name} dataset: tokenized completions come as prompt_ids, completion_ids, is_chosen",
                f"no {', '.join(sorted(missing))}",
                "Add it, or pass prompt, completion and label as text.",
            )
        if "completion_ids" not in columns and not {"chosen", "chosen_ids"} <= columns:
            check_completions(dataset, f"{name} dataset")
        if not self._unpaired:
            prepared = super()._prepare_dataset(dataset, processing_class, args, name)
        elif not missing:
            prepared = dataset
        else:
            # One row as a pair of equals: tokenization has one implementation, the parent's.
            dataset = dataset.map(
                lambda row: {
                    "chosen": row["completion"],
                    "rejected": row["completion"],
                    "is_chosen": bool(row["label"]),
                }
            )
            prepared = super()._prepare_dataset(dataset, processing_class, args, name)
            prepared = prepared.rename_column("chosen_ids", "completion_ids")
            prepared = prepared.remove_columns("rejected_ids")
        if isinstance(prepared, Dataset) and len(prepared) == 0:
            reject(
                f"some prompt of the {name} dataset must be shorter than max_length={args.max_length}",
                f"{len(dataset)} longer ones",
                "Raise max_length, or shorten the prompts.",
            )
        if isinstance(prepared, Dataset):
            _say(check_tokens(prepared, args, f"{name} dataset", self._positions), args)
        return prepared

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        names = (
            ["completion", "label"] if self._is_vision_dataset else ["completion_ids", "is_chosen"]
        )
        self._signature_columns = [*dict.fromkeys([*self._signature_columns, *names])]

    def _by_length(self, data: Any, batch_size: int) -> _ByLength:
        if not isinstance(data, Dataset):
            reject(
                "'group_by_length' must know the lengths of all rows",
                type(data).__name__,
                "Pass a Dataset, or use train_sampling_strategy='random'.",
            )
        lengths = [
            max(len(row["chosen_ids"]), len(row["rejected_ids"])) + len(row["prompt_ids"])
            for row in data.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
        ]
        if self.args.max_length is not None:
            lengths = [min(length, self.args.max_length) for length in lengths]
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return _ByLength(batch_size, lengths, seed)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.sampling != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        data = self.train_dataset if train_dataset is None else train_dataset
        steps = self.args.gradient_accumulation_steps
        return self._by_length(data, self.args.train_batch_size * steps)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        if self.args.sampling != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        return self._by_length(eval_dataset, self.args.eval_batch_size)

    def _model_inputs(self, inputs: dict[str, Any], labels: Tensor) -> dict[str, Any]:
        """Return what scoring a whole batch hands to the model: padded, or as one row."""
        if not self._answers:
            return {**model_inputs(inputs), "labels": labels}
        (row,) = pack(inputs, labels, answers=self._answers)
        return row.inputs

    def _parts(self, inputs: dict[str, Any], labels: Tensor) -> list[_Part]:
        """Return a batch as it goes through the model: whole, or as rows of bounded length."""
        is_chosen, ref_logps = inputs.get("is_chosen"), None
        needs = self._objective.loss.reference and not self.args.reference_free
        if needs and "ref_chosen_logps" in inputs:
            ref_logps = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        limit = self.args.max_tokens_per_batch
        if limit is None:
            return [_Part(self._model_inputs(inputs, labels), labels, ref_logps, is_chosen)]
        # Two of a pair are not parted, also where they share nothing.
        together = 1 if self._unpaired else 2
        parts = []
        for row in pack(inputs, labels, answers=self._answers, max_tokens=limit, together=together):
            own = slice(None) if row.sequences is None else row.sequences.to(labels.device)
            mine = [None if given is None else given[own] for given in (ref_logps, is_chosen)]
            parts.append(_Part(row.inputs, labels[own], *mine))
        return parts

    def _score(self, model: Any, inputs: dict[str, Any], width: int, **extra: Any) -> DILOutput:
        output: DILOutput = model(**inputs, dil_head=True, **extra)
        # Prompt tuning puts virtual tokens in front.
        output.token_logps = output.token_logps[:, -width:]
        return output

    def _ref_token_logps(self, inputs: dict[str, Any], width: int, model: Any = None) -> Tensor:
        """Score a batch under the reference: a second model, the "ref" adapter, or no adapter."""
        model = model or self.ref_model or self.model
        adapter: Any = contextlib.nullcontext()
        if self.ref_model is None and is_peft_model(self.accelerator.unwrap_model(self.model)):
            policy = self.accelerator.unwrap_model(self.model)
            adapter = use_adapter(policy, "ref" if "ref" in policy.peft_config else None)
        self._install(model)
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            adapter,
            self.accelerator.autocast(),
        ):
            return self._score(model, inputs, width).token_logps

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        """Return the reference's summed log-probs (P,) of chosen and of rejected completions."""
        labels = labels_of(inputs)
        sums = [
            self._ref_token_logps(part.inputs, labels.shape[1], model).sum(1).chunk(2)
            for part in self._parts(inputs, labels)
        ]
        return tuple(torch.cat(side) for side in zip(*sums))

    def _kl_log_ratios(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Score mismatched pairs under policy and reference, for KTO's baseline; all ranks' values."""
        rotated = mismatched(
            inputs, self._tokenizer.pad_token_id, self.args.max_length, self.args.truncation_mode
        )
        labels = labels_of(rotated)
        kwargs, width = self._model_inputs(rotated, labels), labels.shape[1]
        with torch.no_grad():
            logps = self._score(model, kwargs, width).token_logps
            if not self.args.reference_free:
                logps = logps - self._ref_token_logps(kwargs, width)
            mean = logps.sum(1).mean()
            if len(labels) == (1 if self._unpaired else 2):
                # What is left of an epoch: one example has nothing to be mismatched with.
                mean = torch.zeros_like(mean)
            gathered: Tensor = self.accelerator.gather(mean)
        return gathered

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        mode = "train" if self.model.training else "eval"
        labels = labels_of(inputs)
        kl_log_ratios = None
        if self._objective.loss.baseline:
            kl_log_ratios = self._kl_log_ratios(model, inputs)
        parts = self._parts(inputs, labels)
        scored, is_chosen = labels != IGNORE_INDEX, inputs.get("is_chosen")
        sft_count = None
        if len(parts) > 1:
            of_chosen = scored.chunk(2)[0] if is_chosen is None else scored[is_chosen]
            sft_count = self._objective.sft_count(of_chosen.sum(1))
        loss_of = functools.partial(
            self._loss_of,
            model,
            counts=self._counts(scored, is_chosen, len(parts) > 1),
            sft_count=sft_count,
            kl_log_ratios=kl_log_ratios,
        )
        outputs = []
        for part in parts[:-1]:
            with self.accelerator.no_sync(model):
                output, _ = loss_of(part)
                if output.loss.requires_grad:
                    scale = self.current_gradient_accumulation_steps
                    self.accelerator.backward(output.loss / scale)
                outputs.append(output._replace(loss=output.loss.detach()))
        output, aux_loss = loss_of(parts[-1])
        output = joined([*outputs, output])
        loss = output.loss
        self._outputs.keep(mode == "train", output, self.accelerator, is_chosen)
        metrics = {}
        if kl_log_ratios is not None:
            metrics["kl"] = kl_log_ratios.mean().clamp(min=0).item()
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss
            metrics["aux_loss"] = self.accelerator.gather(aux_loss.detach()).mean().item()
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)
        if mode == "train":
            count = self.accelerator.gather(inputs["attention_mask"].sum()).sum().item()
            self._total_train_tokens += count // getattr(self, "_tp_size", 1)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        if return_outputs:  # compute_metrics and predict() ask for logits
            with torch.no_grad():
                return loss, model(**model_inputs(inputs))
        return loss

    def _loss_of(
        self, model: Any, part: _Part, **options: Any
    ) -> tuple[PreferenceLossOutput, Tensor | None]:
        """Return the share of some sequences in the loss of their batch, and the auxiliary loss."""
        entry, width, ref_logps = self._objective.loss, part.labels.shape[1], part.ref_logps
        if self._needs_reference and ref_logps is None:
            # Before the policy, whose activations then do not lie beside it.
            ref_logps = self._ref_token_logps(part.inputs, width)
        aux = getattr(self, "aux_loss_enabled", False)
        scores = self._score(
            model, part.inputs, width, **({"output_router_logits": True} if aux else {})
        )
        output = loss_from_token_logps(
            self._objective,
            scores.token_logps,
            part.labels != IGNORE_INDEX,
            ref_logps=ref_logps,
            reference_free=entry.reference and self.args.reference_free,
            is_chosen=part.is_chosen,
            backend=self.args.backend,
            **options,
        )
        return output, scores.aux_loss if aux else None

    def _counts(self, scored: Tensor, is_chosen: Tensor | None, cut: bool) -> Counts | None:
        """Return the denominators of the loss, where its own batch does not give them.

        Unpaired: completions of either kind on all ranks; gradients are averaged, hence the count
        per rank. Pairs: those of the batch that is cut.
        """
        there = scored.any(1)
        if is_chosen is None:
            chosen, rejected = there.chunk(2)
            if not cut:
                return None
            if self._objective.pairwise:
                chosen = chosen & rejected
            return chosen.sum(), rejected.sum()
        counts = torch.stack([(there & is_chosen).sum(), (there & ~is_chosen).sum()]).float()
        chosen, rejected = self.accelerator.reduce(counts, "mean")
        return chosen, rejected

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the metrics over all sequences since the last log."""
        training = self.model.training
        for name, value in self._outputs.take(training).items():
            self._metrics["train" if training else "eval"][name] = [value]
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate or predict; metrics that an earlier call left are not of this one."""
        self._outputs.clear(training=False)
        self._metrics["eval"].clear()
        return super().evaluation_loop(*args, **kwargs)
