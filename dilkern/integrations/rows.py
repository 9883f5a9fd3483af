"""Packed rows: the sequences of a batch behind one another, a shared prompt once.

A row holds whole prompts with their answers, prompt after prompt: [prompt | answer | answer ...].
Which token lies where is settled here once per batch, on the host, from token ids alone; the
attention of packed rows (`attention.py`), the scorer and both passes of a step, policy and
reference, read it off.

S sequences, A answers per prompt, L positions of the padded batch, T tokens of a row, N scored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dilkern.integrations.data import IGNORE_INDEX, model_inputs
from dilkern.validation import check_positive, reject


class Index(NamedTuple):
    """Rows to gather, and how to add their gradients up in a fixed order."""

    rows: Tensor  # (N,) int64
    rounds: tuple[tuple[Tensor, Tensor], ...]  # (of the N, of the rows), each row once per round


def _index(rows: Tensor) -> Index:
    """An `Index` of rows on the host, its k-th round with the k-th mention of each row."""
    order = rows.argsort(stable=True)
    ordered = rows[order]
    mention = torch.empty_like(rows)
    mention[order] = torch.arange(len(rows)) - torch.searchsorted(ordered, ordered)
    count = int(mention.max()) + 1 if len(rows) else 0
    rounds = [(mention == k).nonzero().squeeze(1) for k in range(count)]
    return Index(rows, tuple((at, rows[at]) for at in rounds))


class _Gather(torch.autograd.Function):
    """`index_select` whose backward does not race: a row that two take adds one after the other."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, dim: int, index: Index) -> Tensor:
        ctx.dim, ctx.index, ctx.size = dim, index, values.shape[dim]
        return values.index_select(dim, index.rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad, dim = grads[0], ctx.dim
        shape = [*grad.shape]
        shape[dim] = ctx.size
        result = grad.new_zeros(shape)
        for number, (at, rows) in enumerate(ctx.index.rounds):
            add = result.index_add_ if number else result.index_copy_
            add(dim, rows, grad.index_select(dim, at))
        return result, None, None


def _on(device: torch.device, index: Index) -> Index:
    rounds = tuple((at.to(device), rows.to(device)) for at, rows in index.rounds)
    return Index(index.rows.to(device), rounds)


def gather(values: Tensor, dim: int, index: Index) -> Tensor:
    """Select rows of a dimension, some of them more than once; same inputs, same gradient."""
    result: Tensor = _Gather.apply(values, dim, _on(values.device, index))
    return result


class Segment(NamedTuple):
    """Queries that lie together in a row; they see a prompt and, causally, themselves."""

    size: int
    holder: int  # the segment at whose start the prompt lies
    shared: int  # tokens of that prompt; 0: all that is seen is in the segment itself


class Segments:
    """What attention reads off a row: who sees whom.

    Positions are contiguous in what a query sees, so causality and windows count keys from the end.
    """

    def __init__(self, parts: list[Segment]) -> None:
        self.parts = parts
        self.sizes = [part.size for part in parts]
        self.windows: set[int | None] = set()  # that attention was called with: see `check_packing`
        self._made: dict[Any, Any] = {}

    def mask(self, part: Segment, window: int | None, like: Tensor) -> Tensor:
        """Return what is added to the logits (1, 1, size, shared + size): 0, or the lowest number."""
        keys = part.shared + part.size
        if window is not None and window >= keys:
            window = None
        key = (part.size, keys, window, like.dtype, like.device)
        if key not in self._made:
            ahead = torch.arange(keys, device=like.device) - part.shared
            ahead = ahead - torch.arange(part.size, device=like.device).unsqueeze(1)
            hidden = ahead > 0 if window is None else (ahead > 0) | (ahead <= -window)
            mask = like.new_zeros(hidden.shape).masked_fill_(hidden, torch.finfo(like.dtype).min)
            self._made[key] = mask[None, None]
        found: Tensor = self._made[key]
        return found

    def varlen(self, device: torch.device) -> tuple[Index | None, dict[str, Any]]:
        """Return the keys to gather and the boundaries, as flash attention takes them."""
        if device not in self._made:
            sizes = torch.tensor(self.sizes)
            keys = sizes + torch.tensor([part.shared for part in self.parts])
            starts = (sizes.cumsum(0) - sizes).tolist()
            index = None
            if any(part.shared for part in self.parts):
                rows = []
                for part, start in zip(self.parts, starts):
                    prompt = starts[part.holder]
                    rows += [torch.arange(prompt, prompt + part.shared)]
                    rows += [torch.arange(start, start + part.size)]
                index = _on(device, _index(torch.cat(rows)))

            def bounds(lengths: Tensor) -> Tensor:
                ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
                return ends.to(device, torch.int32)

            self._made[device] = (
                index,
                {
                    "cu_seq_lens_q": bounds(sizes),
                    "cu_seq_lens_k": bounds(keys),
                    "max_length_q": int(sizes.max()),
                    "max_length_k": int(keys.max()),
                },
            )
        found: tuple[Index | None, dict[str, Any]] = self._made[device]
        return found


class PackedRow:
    """One row of whole prompts and their answers, for `model(**row.inputs, dil_head=True)`.

    Not a tuple or a dataclass, which wrappers of models take apart on the way.

    Attributes:
        inputs: what the model's forward takes.
        sequences: (S',) which sequences of the batch are in the row, on the host; None: all.
        num_tokens: T.
    """

    def __init__(
        self,
        input_ids: Tensor,  # (1, T)
        position_ids: Tensor,  # (1, T)
        segments: Segments,
        scored: Index,
        targets: Tensor,  # (N,)
        slots: Tensor,  # (N,)
        times: Tensor,  # (1, T)
        shape: tuple[int, int],
        sequences: Tensor | None,
    ) -> None:
        self.segments, self.scored, self.targets = segments, scored, targets
        self.slots, self.times, self.shape = slots, times, shape
        self.sequences: Tensor | None = sequences
        self.num_tokens: int = input_ids.shape[1]
        # A mask of four dimensions is taken as it is by transformers, which would else make one of
        # the row's length squared, and of restarting positions one that cuts answers off.
        mask = torch.zeros(1, 1, 1, 1, device=input_ids.device)
        self.inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "attention_mask": mask,
            "packed_row": self,
        }

    def scored_states(self, hidden_states: Tensor) -> Tensor:
        """Pick from (1, T, D) the states (N, D) that predict the labels `targets`."""
        return gather(hidden_states[0], 0, self.scored)

    def per_sequence(self, logps: Tensor) -> Tensor:
        """Put log-probs (N,) where the padded batch has them, (S', L); 0 elsewhere."""
        flat = logps.new_zeros(self.shape[0] * self.shape[1])
        return flat.index_copy(0, self.slots.to(logps.device), logps).view(self.shape)


def _to(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """Move flat int64 tensors in one transfer."""
    sizes = [len(tensor) for tensor in tensors]
    return list(torch.cat(tensors).to(device, non_blocking=True).split(sizes))


class _Sequences(NamedTuple):
    """Sequences on the host, each with its tokens at the start."""

    ids: Tensor  # (S', L)
    lengths: Tensor  # (S',)
    labels: Tensor  # (S', L)
    origin: Tensor  # (S', L) the place of each token in the batch
    skipped: Tensor  # (S',) tokens that lie with the prompt's first answer


def _row(
    batch: _Sequences, answers: int, device: torch.device, sequences: Tensor | None
) -> PackedRow:
    ids, lengths, labels, origin, skipped = batch
    count, width = ids.shape
    at = torch.arange(width)
    number = torch.arange(count)
    first = number % (count // answers)
    own = lengths - skipped
    order = number.view(answers, -1).T.flatten()  # prompt by prompt
    ends = own[order].cumsum(0)
    start = torch.empty_like(own)
    start[order] = ends - own[order]
    real = at < lengths.unsqueeze(1)
    kept = real & (at >= skipped.unsqueeze(1))
    row_of = torch.where(kept, (start - skipped).unsqueeze(1), start[first].unsqueeze(1)) + at
    scored = (labels != IGNORE_INDEX) & real & (at > 0)
    shared = skipped.view(answers, -1).amax(0).repeat(answers)  # of the prompt that a sequence has
    times = torch.where((number == first).unsqueeze(1) & (at < shared.unsqueeze(1)), answers, 1)
    position = at.expand(count, width)
    flat = [values[order][kept[order]] for values in (ids, position, times)]
    index = _index(row_of.roll(1, 1)[scored])  # the state before a token predicts it
    slots = (number.unsqueeze(1) * width + origin)[scored]
    pairs = [tensor for pair in index.rounds for tensor in pair]
    moved = _to(device, *flat, index.rows, labels[scored], slots, *pairs)
    input_ids, position_ids, weights, rows, targets, slots, *pairs = moved

    parts: list[Segment] = []
    place = 0  # of the segment with the prompt at hand
    for sequence, size, skip in zip(order.tolist(), own[order].tolist(), skipped[order].tolist()):
        if sequence < count // answers:
            place = len(parts)
        if size:
            parts.append(Segment(size, place, skip))
    return PackedRow(
        input_ids.unsqueeze(0),
        position_ids.unsqueeze(0),
        Segments(parts),
        Index(rows, tuple(zip(pairs[::2], pairs[1::2]))),
        targets,
        slots,
        weights.unsqueeze(0),
        (count, width),
        sequences,
    )


def _cuts(sizes: list[int], limit: int | None) -> list[slice]:
    """Consecutive runs of sizes that sum to at most a limit; what is above it stands alone."""
    cuts, start, total = [], 0, 0
    for number, size in enumerate(sizes):
        if limit is not None and number > start and total + size > limit:
            cuts.append(slice(start, number))
            start, total = number, 0
        total += size
    return [*cuts, slice(start, len(sizes))]


def pack(
    inputs: Mapping[str, Any],
    labels: Tensor,  # (S, L)
    *,
    answers: int = 2,
    max_tokens: int | None = None,
    together: int | None = None,
) -> list[PackedRow]:
    """Pack a padded batch into rows without padding, in which answers share their prompt.

    Sequences s, s + S/A, s + 2 S/A ... answer one prompt: [chosen; rejected] with two. They share the
    tokens that all of them begin with, up to the first that one of them is scored on, found on the
    token ids: where tokens merge across the end of a prompt, or truncation cut the two sides
    differently, that is less than the prompt, or nothing.

    Args:
        inputs: input_ids and attention_mask (S, L), padded on either side; what `compute_loss` reads
            beside them is passed over.
        labels: aligned with input_ids, -100 ignored.
        answers: A, sequences per prompt; 1 shares nothing.
        max_tokens: the most tokens of a row; None for one row. A prompt with its answers stays
            whole: one that is larger gets a row of its own.
        together: how many sequences max_tokens does not part, A or a multiple of it; None for A.

    Returns:
        The rows. `model(**row.inputs, dil_head=True).token_logps` is (S', L), of the sequences
        `row.sequences`, as the padded batch gives it. One device sync.

    Raises:
        ValueError: S is no multiple of A; labels on padding, or padding inside a sequence; or the
            batch has anything else for the model, such as images or token types: what positions and
            masks a model makes of them in a packed row is its own affair.

    Example:
        >>> import torch
        >>> from dilkern.integrations.rows import pack
        >>> ids = torch.tensor([[5, 6, 7, 1], [5, 6, 8, 9]])  # the prompt 5 6 and two answers
        >>> labels = torch.tensor([[-100, -100, 7, 1], [-100, -100, 8, 9]])
        >>> (row,) = pack({"input_ids": ids}, labels)
        >>> row.inputs["input_ids"].tolist(), row.inputs["position_ids"].tolist()
        ([[5, 6, 7, 1, 8, 9]], [[0, 1, 2, 3, 2, 3]])
    """
    others = sorted(model_inputs(inputs).keys() - {"input_ids", "attention_mask"})
    if others:
        reject(
            "packed rows (padding_free, shared_prompts) take batches of input_ids and "
            "attention_mask alone",
            ", ".join(others),
            "Set padding_free=False and shared_prompts=False, or leave them out of the batch.",
        )
    ids = inputs["input_ids"]
    if not isinstance(answers, int) or isinstance(answers, bool) or answers < 1:
        reject("`answers` must be a whole number > 0", repr(answers), "Pass answers=2 for pairs.")
    if len(ids) % answers:
        reject(
            f"a batch of {answers} answers per prompt has a multiple of {answers} sequences",
            f"S={len(ids)}",
            "Stack all first answers, then all second ones, and so on.",
        )
    together = answers if together is None else together
    if max_tokens is not None:
        check_positive("max_tokens", max_tokens)
    if together % answers or len(ids) % together:
        reject(
            "`together` must be a multiple of `answers` and divide the number of sequences",
            f"together={together}, answers={answers}, S={len(ids)}",
            "Leave it out.",
        )
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask.to(ids.dtype)
    device = ids.device
    ids, mask, labels = torch.stack([ids, mask, labels.to(ids.dtype)]).cpu()
    real = mask.bool()
    lengths = real.sum(1)
    if ((labels != IGNORE_INDEX) & ~real).any():
        reject(
            "packed rows have no padding to score",
            "labels other than -100 where attention_mask is 0",
            "Set labels to -100 there.",
        )
    if (real[:, 1:] & ~real[:, :-1]).sum(1).add(real[:, 0]).gt(1).any():
        reject(
            "a packed sequence is one run of tokens, padded on either side",
            "an attention_mask with a gap",
            "Leave out the padding inside sequences; a token of the text is 1 in the mask.",
        )
    # The tokens of each sequence to its start, wherever the padding is.
    origin = real.byte().argsort(dim=1, descending=True, stable=True)
    ids, labels = ids.gather(1, origin), labels.gather(1, origin)
    prompts = len(ids) // answers
    skipped = torch.zeros_like(lengths)
    if answers > 1:
        first = torch.arange(len(ids)) % prompts
        free = (labels == IGNORE_INDEX) & (torch.arange(ids.shape[1]) < lengths.unsqueeze(1))
        same = (ids == ids[first]) & free & free[first]
        common = same.long().cumprod(1).sum(1).view(answers, -1).amin(0)
        skipped[prompts:] = common.repeat(answers - 1)
    sizes = (lengths - skipped).view(together, -1).sum(0).tolist()
    batch = _Sequences(ids, lengths, labels, origin, skipped)
    cuts = _cuts(sizes, max_tokens)
    if len(cuts) == 1:
        return [_row(batch, answers, device, None)]
    members = [torch.arange(len(ids)).view(together, -1)[:, cut].flatten() for cut in cuts]
    return [
        _row(_Sequences(*(values[own] for values in batch)), answers, device, own)
        for own in members
    ]
