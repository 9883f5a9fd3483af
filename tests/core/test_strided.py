"""Every tensor argument of every entry point in every layout: the bits of the contiguous call.

`--backend triton` under TRITON_INTERPRET=1 runs the same sweep, and the kernels' own launchers.
"""

from collections.abc import Callable
from typing import NamedTuple

import interpreter
import pytest
import torch

from dilkern import DILLoss, fused_dil_loss, fused_preference_loss, linear_logps, preference_loss
from dilkern.backends import base
from dilkern.lm_head import Adapter, DenseHead, EightBitHead, FourBit, FourBitHead, LoRAHead

S, L, V, D, RANK = 4, 3, 40, 24, 3
T = S * L
BLOCKS = base.Blocks(32, 32, 32)  # two blocks of words
BOUNDS = [0, 4, 4, 7, T]
F32, BF16 = torch.float32, torch.bfloat16


def poison(*shape, like):
    """What lies between the elements must not be read as one of them."""
    worst = torch.nan if like.is_floating_point() else like.dtype is torch.bool or 99
    return torch.full(shape, worst, dtype=like.dtype)


def column(t):
    out = poison(*t.shape, 3, like=t)[..., 1]
    return out.copy_(t)


def every_second(t):
    if t.dim() == 0:
        return None
    out = poison(*t.shape[:-1], 2 * t.shape[-1], like=t)[..., ::2]
    return out.copy_(t)


def expanded(t):
    return t[:1].clone().expand(t.shape) if t.dim() else None


def transposed(t):
    if t.dim() < 2:
        return None
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def offset(t):
    # Libraries choose by alignment how they multiply: matrices keep theirs, 64 bytes.
    start = 3 if t.dim() < 2 else 64
    out = poison(t.numel() + start, like=t)[start:].view(t.shape)
    return out.copy_(t)


LAYOUTS = [column, every_second, expanded, transposed, offset]


class Case(NamedTuple):
    """One entry point: `tensors` by name, and what it makes of them."""

    call: Callable
    tensors: dict
    learned: tuple = ()  # which of them get a gradient
    rigid: tuple = ()  # which of them cannot be `expanded`: the values are not free


def floats(*shape, dtype=F32):
    return torch.randn(*shape).to(dtype)


def batch(dtype=F32, length=L):
    labels = torch.randint(0, V, (S, length))
    labels[1, 2] = labels[3, 1] = -100
    return {
        "hidden_states": floats(S, length, D, dtype=dtype),
        "weight": floats(V, D, dtype=dtype),
        "labels": labels,
    }


def packed(dtype=F32):
    flat = {name: t.flatten(0, 1) if name != "weight" else t for name, t in batch(dtype).items()}
    return {**flat, "cu_seqlens": torch.tensor(BOUNDS)}


def op(make, **options):
    """`linear_logps` over the head that `make` builds of the tensors it names."""

    def call(hidden_states, labels, g, backend, **tensors):
        head = make(**tensors)
        logps = linear_logps(hidden_states, head, labels, backend=backend, **options)
        return [logps], g

    return call


def op_case(make, dtype=F32, learned=(), **tensors):
    inputs = batch(dtype)
    del inputs["weight"]
    return Case(
        op(make, shift=True),
        {**inputs, "g": floats(S, L), **tensors},
        ("hidden_states", *learned),
    )


def dense(dtype):
    def make(weight, bias):
        return DenseHead(weight, bias, scale=0.7, softcap=5.0)

    parts = {"weight": floats(V, D, dtype=dtype), "bias": floats(V, dtype=dtype)}
    return op_case(make, dtype, ("weight", "bias"), **parts)


def lora():
    def make(weight, a, b, lora_bias):
        return LoRAHead(DenseHead(weight), [Adapter(a, b, 2.0, lora_bias)])

    parts = {"weight": floats(V, D), "a": floats(RANK, D), "b": floats(V, RANK)}
    return op_case(make, F32, ("a", "b", "lora_bias"), **parts, lora_bias=floats(V))


def four_bit_parts(nested):
    blocks = V * D // 32 + 1
    parts = {
        "packed": torch.randint(0, 256, (V * D // 2,), dtype=torch.uint8),
        "code": floats(16),
        "absmax": torch.rand(blocks),
    }
    if nested:
        parts["absmax"] = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
        parts |= {"code2": floats(256), "absmax2": torch.rand(2), "shift2": torch.tensor(0.3)}
    return parts


def four_bit(nested):
    def make(packed, code, absmax, bias, **rest):
        weight = FourBit(packed, code, absmax, list(rest.values()), 32, 32, F32)
        return FourBitHead(weight, V, D, bias)

    return op_case(make, learned=("bias",), **four_bit_parts(nested), bias=floats(V))


def eight_bit():
    codes = torch.randint(-127, 128, (V, D), dtype=torch.int8)
    return op_case(
        EightBitHead, learned=("bias",), codes=codes, scales=torch.rand(V), bias=floats(V)
    )


def fields(output):
    return [x for x in output if isinstance(x, torch.Tensor)]


def fused(entry, **options):
    def call(hidden_states, weight, labels, backend, g=None, count_w=None, count_l=None, **tensors):
        if count_w is not None:
            tensors["counts"] = (count_w, count_l)
        output = entry(hidden_states, weight, labels, backend=backend, **tensors, **options)
        return fields(output), g

    return call


def dil_module(*inputs, backend, beta, **tensors):
    return DILLoss(beta=beta, backend=backend)(*inputs, **tensors)


def sums(call):
    def run(logps, backend, g=None, count_w=None, count_l=None, **tensors):
        counts = None if count_w is None else (count_w, count_l)
        return fields(call(logps, counts=counts, **tensors)), g

    return run


def direct(loss, **options):
    return sums(lambda logps, lengths, **rest: preference_loss(
        logps, lengths, loss=loss, **options, **rest
    ))  # fmt: skip


def side():
    return torch.tensor([True, False, True, False])


def counts():
    return {"count_w": torch.tensor(2.0), "count_l": torch.tensor(3.0), "g": torch.tensor(0.7)}


def per_sequence():
    return {"logps": floats(S), "lengths": torch.tensor([3, 0, 2, 2])}


def sums_of_both():
    return {"log_ratios": floats(S), "weights": torch.rand(S)}


def references(*shape):
    return {"ref_logps": floats(*shape), "weights": torch.rand(S)}


BOTH = ("hidden_states", "weight")
CASES = {
    **{f"dense-{dtype}": (lambda dtype=dtype: dense(dtype)) for dtype in (F32, BF16)},
    "lora": lora,
    "nf4": lambda: four_bit(False),
    "nf4-nested": lambda: four_bit(True),
    "int8": eight_bit,
    "dil": lambda: Case(
        fused(fused_dil_loss),
        {**batch(), "ref_hidden_states": floats(S, L, D), "ref_lm_head": floats(V, D), **counts()},
        BOTH,
    ),
    "dil-token-references": lambda: Case(
        fused(fused_dil_loss, h="bce"),
        # Rows long enough that the order of their sums shows.
        {**batch(length=7), **references(S, 7), "is_chosen": side()},
        BOTH,
        ("is_chosen",),
    ),
    "dil-packed": lambda: Case(
        fused(fused_dil_loss, h="ukl", length_normalize=False),
        {**packed(), **references(S), "is_chosen": side()},
        BOTH,
        ("is_chosen", "cu_seqlens"),
    ),
    "dil-packed-token-references": lambda: Case(
        fused(dil_module, beta=0.5), {**packed(), **references(T)}, BOTH, ("cu_seqlens",)
    ),
    "kto": lambda: Case(
        fused(fused_preference_loss, loss="kto"),
        {**batch(), **references(S), "kl_log_ratios": floats(S, 3), "is_chosen": side()},
        BOTH,
        ("is_chosen",),
    ),
    "sums-dil": lambda: Case(
        direct("lsif", sft_weight=0.3, mixture=0.2),
        {**per_sequence(), **sums_of_both(), "is_chosen": side(), **counts()},
        ("logps", "log_ratios"),
        ("is_chosen",),
    ),
    "sums-dpo": lambda: Case(
        direct("dpo"), {**per_sequence(), **sums_of_both()}, ("logps", "log_ratios")
    ),
    "sums-kto": lambda: Case(
        direct("kto"),
        {**per_sequence(), "log_ratios": floats(S), "kl_log_ratios": floats(7, 9)},
        ("logps", "log_ratios"),
    ),
}


def kernel_cases():
    """The launchers by themselves; what they write in place has the layout that they ask for."""
    from dilkern.kernels import configs, h_functions
    from dilkern.kernels.dz_tile import dz_tile
    from dilkern.kernels.finish_rows import finish_rows
    from dilkern.kernels.fold_block import fold_block
    from dilkern.kernels.nf4_dequant import Packed4bit, nf4_dequant
    from dilkern.kernels.sequence_loss import sequence_loss
    from dilkern.kernels.softmax_tile import softmax_tile

    n, words, cpu = 9, 40, torch.device("cpu")
    settings = {"start": 10, "scale": 0.7, "softcap": 5.0}
    z = floats(n, words)

    def softmax(labels, anchor, bias, backend, h=z, w=None):
        tile = configs.rows("chunk", cpu).block if w is None else configs.tile(cpu, F32).block_v
        written = torch.zeros(2, n, -(-words // tile)), torch.zeros(n, words)
        softmax_tile(h, w, labels, anchor, *written, bias=bias, **settings)
        return written, None

    def dz(labels, lse, miss, g, bias, backend, h=z, w=None):
        out = torch.zeros(n, words)
        dz_tile(h, w, labels, lse, miss, g, out, bias=bias, **settings)
        return [out], None

    def fold(partial, backend):
        state, p, u = torch.ones(3, n), z.clone(), z.clone()
        fold_block(partial, state, p, u, tile=32)
        return [state, p, u], None

    def finish(h, w, labels, bias, backend):
        state, logps, lse = torch.ones(3, n), torch.zeros(n), torch.zeros(2, n)
        u = torch.ones(n, D)
        finish_rows(h, w, labels, state, u, logps, lse, u, bias=bias, scale=0.7, softcap=5.0)
        return [logps, lse, u], None

    def decode(packed, code, absmax, backend, code2=None, absmax2=None, shift2=None, ids=None):
        weight = Packed4bit(packed, code, absmax, 32, D, code2, absmax2, 32, shift2)
        return [nf4_dequant(weight, F32, start=3, end=V, ids=ids)], None

    def loss(logps, scored, bounds, is_chosen, factor, backend, **references):
        return list(
            sequence_loss(
                logps, scored, bounds, is_chosen, factor, h=h_functions.lsif, **references
            )
        ), None

    rows = {"labels": torch.randint(0, 60, (n,)), "bias": floats(words)}
    state = {**rows, "anchor": floats(n).round()}
    slopes = {**rows, "lse": floats(2, n) + 6, "miss": torch.rand(n), "g": floats(n)}
    operands = {"h": floats(n, D), "w": floats(words, D)}
    tokens = {
        "logps": -torch.rand(T), "scored": torch.rand(T) < 0.8, "bounds": torch.tensor(BOUNDS),
        "is_chosen": side(), "factor": torch.rand(S),
    }  # fmt: skip
    ids = {"ids": torch.randint(0, V, (n,))}
    return {
        "softmax_tile-library": Case(softmax, state),
        "softmax_tile": Case(softmax, {**operands, **state}),
        "dz_tile-library": Case(dz, slopes),
        "dz_tile": Case(dz, {**operands, **slopes}),
        "fold_block": Case(fold, {"partial": floats(2, n, 3).round()}),
        "finish_rows": Case(
            finish,
            {**operands, **rows, "w": floats(n, D), "labels": torch.randint(0, words, (n,))},
        ),
        "nf4_dequant": Case(decode, {**four_bit_parts(False), **ids}),
        "nf4_dequant-nested": Case(decode, four_bit_parts(True)),
        "sequence_loss": Case(
            loss, {**tokens, "ref_token_logps": -torch.rand(T)}, rigid=("bounds",)
        ),
        "sequence_loss-sums": Case(loss, {**tokens, "ref_logps": floats(S)}, rigid=("bounds",)),
    }


if interpreter.INTERPRET:
    CASES |= {name: lambda name=name: kernel_cases()[name] for name in kernel_cases()}


def run(case, tensors, backend):
    """Results and gradients; `tensors` as they are, layout and all."""
    leaves = {
        name: t.detach().requires_grad_() if name in case.learned else t
        for name, t in tensors.items()
    }
    outputs, g = case.call(**leaves, backend=backend)
    learned = [leaves[name] for name in case.learned]
    grads = ()
    if learned:
        grads = torch.autograd.grad(outputs[0], learned, g, allow_unused=True)
    return [*outputs, *(t for t in grads if t is not None)]


def storage(t):
    """The bytes of the whole storage under `t`."""
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())


def same_bits(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape
    return torch.equal(*(x.detach().contiguous().flatten().view(torch.uint8) for x in (got, want)))


@pytest.fixture
def backend(request, monkeypatch):
    """The backend's name; it cuts every problem alike.

    Blocks of another size have other bits, and a strided weight gets smaller ones: it is copied.
    """
    name = request.config.getoption("--backend")
    monkeypatch.setattr(base.load("torch"), "plan", lambda *_, **__: BLOCKS)
    if interpreter.INTERPRET:
        monkeypatch.setattr(base.load("triton"), "plan", lambda *_, **__: BLOCKS)
    return name


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A second thread costs these sizes more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("name", CASES)
def test_layout_changes_no_bit(name, layout, backend):
    torch.manual_seed(0)
    case = CASES[name]()
    plain = run(case, case.tensors, backend)
    for argument, tensor in case.tensors.items():
        moved = None if layout is expanded and argument in case.rigid else layout(tensor)
        if moved is None:
            continue
        want = plain
        if layout is expanded:
            want = run(case, {**case.tensors, argument: moved.contiguous()}, backend)
        before = storage(moved).clone()
        got = run(case, {**case.tensors, argument: moved}, backend)
        differ = [i for i, (a, b) in enumerate(zip(got, want, strict=True)) if not same_bits(a, b)]
        assert not differ, f"{argument}: results {differ} of {len(want)}"
        assert torch.equal(storage(moved), before), f"{argument} was written to"
