"""The head of a whole transformers model: where it is, and what the model does to its logits."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from dilkern.lm_head.base import Head, HeadSource
from dilkern.lm_head.modules import as_head, unwrap
from dilkern.lm_head.sharded import call_gathered, sharded_by_zero3, weights_come_later
from dilkern.validation import check_positive, name_of, reject

# What a config may say of its logits. Models disagree on whether a number multiplies or divides
# (`logits_scaling` divides in Granite and multiplies in HyperCLOVA-X), and some carry one that they
# never apply, so the config only proposes: the probe decides.
SCALE_NAMES = (
    "logit_scale",  # Cohere
    "logits_scaling",  # Granite, HyperCLOVA-X, MiniCPM3
    "lm_head_multiplier",  # Falcon-H1
    "output_multiplier",  # Muse
    "logits_mup_width_multiplier",  # Inkling
)
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # in all models but HyperCLOVA-X
SOFTCAP_NAMES = ("final_logit_softcapping",)  # Gemma 2 and later, nanochat, Mistral Large 4, ...
# The probe's large tokens reach this logit: far enough for a softcap of 10 to 100 to show.
_PROBE_LOGIT = 60.0
# Largest error of a probed token's logits against its largest logit.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
_INT8_TOLERANCE = 6e-2  # bitsandbytes rounds the hidden states to int8 too


class LMHead(HeadSource):
    """Where a causal LM keeps its head, and the transforms between the head and the logits.

    Give it to `linear_logps` in place of a head. The weight is read at every use and never kept, so
    adapters, `modules_to_save`, merging, resizing, resharding are seen as they are at that moment.

    Args:
        find: returns the head's module or weight at the time of the call.
        scale: factor on the logits.
        softcap: 0 for none.
    """

    def __init__(
        self, find: Callable[[], Any], *, scale: float = 1.0, softcap: float = 0.0
    ) -> None:
        self.find, self.scale, self.softcap = find, scale, softcap

    def head(self) -> Head:
        return as_head(self.find(), scale=self.scale, softcap=self.softcap)

    @classmethod
    def from_model(cls, model: Any, *, temperature: float = 1.0) -> LMHead:
        """Find the head of a transformers causal LM and verify it against the model's own logits.

        One forward of 4 tokens runs the model with its last hidden states replaced, two of them
        scaled up until a softcap shows, and compares its logits with those of the head under every
        transform that the config suggests. With sharded weights every rank must call it. Where the
        weights come later (on the meta device, or sharded by ZeRO-3 and deepspeed.initialize not yet
        called), the config is taken at its word.

        Args:
            model: a causal LM, also inside PEFT, DDP or torch.compile wrappers.
            temperature: the logits are divided by it, after softcap and scale.

        Raises:
            ValueError: no head or backbone to be found, a head of an unknown kind, or logits that
                no known transform of the head reproduces.
        """
        check_positive("temperature", temperature)
        causal = unwrap(model)
        embeddings = getattr(causal, "get_output_embeddings", lambda: None)()
        backbone = getattr(causal, "base_model", causal)
        if not isinstance(embeddings, nn.Module) or backbone is causal:
            reject(
                "the model must have an lm_head and a backbone under it",
                f"{name_of(causal)} with get_output_embeddings() = {type(embeddings).__name__} and "
                f"base_model = {type(backbone).__name__}",
                "Pass a transformers causal LM whose `base_model` is its backbone, or `as_head(...)` "
                "of its head.",
            )
        if weights_come_later(embeddings):
            scale, softcap = _declared(causal.config)
            return cls(
                causal.get_output_embeddings,
                scale=scale / temperature,
                softcap=softcap / temperature,
            )
        raw, want, tolerance = _probe(causal, backbone, embeddings)
        error, scale, softcap = min(
            (_error(raw, want, scale, softcap), scale, softcap)
            for scale, softcap in _candidates(causal.config)
        )
        if not error <= tolerance:
            reject(
                "the model's logits must be those of its lm_head under a known scale and softcap",
                f"{name_of(causal)}, off by {error:.2g} of the largest logit under the best of "
                f"its config's {', '.join((*SCALE_NAMES, *SOFTCAP_NAMES))}",
                "Its transform is unknown here: pass `as_head(lm_head, scale=..., softcap=...)` "
                "if it is of that form.",
            )
        return cls(
            causal.get_output_embeddings, scale=scale / temperature, softcap=softcap / temperature
        )


def _candidates(config: Any) -> list[tuple[float, float]]:
    """Return every (scale, softcap) that the config's numbers suggest."""
    text = config.get_text_config()
    scales, softcaps = {1.0}, {0.0}
    for name in SCALE_NAMES:
        value = getattr(text, name, None)
        if value:
            scales = {a * b for a, b in product(scales, {1.0, float(value), 1 / float(value)})}
    for name in SOFTCAP_NAMES:
        value = getattr(text, name, None)
        if value:
            softcaps.add(float(value))
    return sorted(product(scales, softcaps))


def _declared(config: Any) -> tuple[float, float]:
    """Return (scale, softcap) as the config's model type applies them, for want of a probe."""
    text = config.get_text_config()
    scale = 1.0
    for name in SCALE_NAMES:
        value = getattr(text, name, None)
        if value:
            divides = name in DIVISORS and text.model_type != "hyperclovax"
            scale *= 1 / float(value) if divides else float(value)
    softcap = next((v for v in (getattr(text, n, None) for n in SOFTCAP_NAMES) if v), 0.0)
    return scale, float(softcap)


def _error(raw: Tensor, want: Tensor, scale: float, softcap: float) -> float:
    """Return the largest error of a token's logits, relative to that token's largest logit."""
    if raw.shape != want.shape:
        return float("inf")
    got, want = raw.double() * scale, want.double()
    if softcap:
        got = softcap * torch.tanh(got / softcap)
    size = want.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    return float(((got - want).abs() / size).amax())


@torch.no_grad()
def _probe(causal: Any, backbone: Any, embeddings: nn.Module) -> tuple[Tensor, Tensor, float]:
    """Return raw logits W h + b (4, V), the model's logits (4, V), and how far they may differ."""
    raw: list[Tensor] = []
    dtypes: set[torch.dtype] = set()
    tolerance = 0.0

    def raw_logits(hidden: Tensor) -> Tensor:
        nonlocal tolerance
        head = as_head(embeddings)
        if hidden.shape[-1] != head.hidden_size:
            reject(
                "the last hidden states of the backbone must be what the lm_head multiplies",
                f"{name_of(causal)}, hidden states D={hidden.shape[-1]}, lm_head "
                f"D={head.hidden_size}",
                "What lies between them is unknown here; use full logits with this model.",
            )
        # The module may round where the head does not: to the dtype of an adapter.
        own = {p.dtype for p in embeddings.parameters()} & set(_TOLERANCE)
        dtypes.update((hidden.dtype, *own))
        if "eight_bit" in head.kinds():
            tolerance = _INT8_TOLERANCE
        return head.logits(hidden)

    def gathered_logits(hidden: Tensor) -> Tensor:
        sharded = sharded_by_zero3(embeddings)
        return raw_logits(hidden) if sharded is None else call_gathered(sharded, raw_logits, hidden)

    def replace(module: Any, args: Any, output: Any) -> Any:
        last = output[0]
        hidden = last.reshape(-1, last.shape[-1])[:4]
        top = gathered_logits(hidden).abs().amax(-1, keepdim=True)
        # Two tokens as they are; two with logits near and above the usual softcaps.
        factor = torch.tensor([[0.0], [0.0], [0.5], [1.0]], device=top.device) * _PROBE_LOGIT
        factor = torch.where(factor > 0, factor / top.float().clamp_min(1e-30), 1.0)
        hidden = hidden * factor.to(hidden.dtype)
        raw.append(gathered_logits(hidden))
        new = hidden.reshape(last.shape)
        if isinstance(output, tuple):
            return (new, *output[1:])
        output.last_hidden_state = new
        return output

    # On AVX512-BF16 CPUs bitsandbytes repacks a 4-bit weight in place at its first forward in eval
    # mode, and its gradient is lost; a probe must leave the model as it found it.
    asleep = [
        layer
        for layer in causal.modules()
        if hasattr(layer, "support_avx512bf16_for_cpu") and not layer.training
    ]
    device = causal.get_input_embeddings().weight.device
    # accelerate puts autocast around the forward and keeps the original under this name.
    forward = getattr(causal, "_original_forward", causal)
    # Some models call the decoder inside their backbone past it; the outermost one that is called
    # has the last word.
    decoder = getattr(causal, "get_decoder", lambda: backbone)()
    hooks = [
        m.register_forward_hook(replace) for m in {decoder, backbone} - {None, causal, embeddings}
    ]
    try:
        for layer in asleep:
            layer.training = True
        with (
            torch.autocast(device.type, enabled=False),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
        ):
            logits = forward(input_ids=torch.arange(4, device=device)[None]).logits
    finally:
        for hook in hooks:
            hook.remove()
        for layer in asleep:
            layer.training = False
    if not raw:
        reject(
            "the model must call its backbone as a module",
            f"{name_of(causal)}, whose {name_of(backbone)} was not called",
            "Pass `as_head(lm_head, scale=..., softcap=...)`.",
        )
    want = logits.reshape(-1, logits.shape[-1]).to(raw[-1].device)
    tolerance = max(tolerance, *(_TOLERANCE[dtype] for dtype in {want.dtype, *dtypes}))
    return raw[-1], want, tolerance
