"""LoRA on the head: real PEFT layers over dense, 4-bit and 8-bit weights, in every state."""

import math

import pytest
import torch
from head_cases import (
    D,
    V,
    check_budget,
    check_exact,
    eight_bit_linear,
    four_bit_linear,
    leaf,
    placed,
    problem,
    recipe,
    results,
)
from naive import gather_logps
from torch import nn

from dilkern import linear_logps
from dilkern.lm_head import Adapter, DenseHead, LoRAHead, as_head

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("device")

BASES = ("dense", "four_bit", "eight_bit")


class Model(nn.Module):
    """PEFT wraps a quantised layer in its own class only where the model says that it is one."""

    def __init__(self, lm_head):
        super().__init__()
        self.lm_head = lm_head
        self.is_loaded_in_4bit = type(lm_head).__name__ == "Linear4bit"
        self.is_loaded_in_8bit = type(lm_head).__name__ == "Linear8bitLt"


def base_linear(kind, bias=False):
    if kind == "dense":
        return placed(nn.Linear(D, V, bias=bias).double())
    pytest.importorskip("bitsandbytes")
    return four_bit_linear(bias=bias) if kind == "four_bit" else eight_bit_linear(bias=bias)


def base_weight(linear):
    """The dense-equivalent fp64 weight; the parameter itself where it is dense."""
    if type(linear).__name__ == "Linear4bit":
        return recipe(linear).double()
    if type(linear).__name__ == "Linear8bitLt":
        scales = linear.weight.SCB if linear.state.SCB is None else linear.state.SCB
        return linear.weight.data.double() * (scales[:, None] * (1 / 127)).double()
    return linear.weight


def with_lora(linear, *, zero_b=False, **config):
    """Return the PEFT model around `linear` as lm_head, adapters in fp64 and B not zero."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["lm_head"]} | config
    model = peft.get_peft_model(Model(linear), peft.LoraConfig(**config))
    widen(model, zero_b)
    return model


def widen(model, zero_b=False):
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.double()
            if "lora_B" in name and not zero_b:
                p.data.normal_()


def layer_of(model):
    return model.base_model.model.lm_head


def dense_equivalent(layer, names=("default",)):
    weight, bias = base_weight(layer.base_layer), layer.base_layer.bias
    for name in names:
        a, b, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        weight = weight + scaling * (b.weight @ a.weight)
        if b.bias is not None:
            bias = scaling * b.bias + (0 if bias is None else bias)
    return weight, bias


def adapter_params(layer, names=("default",)):
    return [
        p
        for name in names
        for p in (*layer.lora_A[name].parameters(), *layer.lora_B[name].parameters())
    ]


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (0.5, 4.0)])
def test_gradients_of_hidden_states_a_and_b(kind, rslora, scale, softcap):
    layer = layer_of(with_lora(base_linear(kind), use_rslora=rslora))
    assert kind == "dense" or type(layer).__module__ == "peft.tuners.lora.bnb"
    assert layer.scaling["default"] == (8 / math.sqrt(4) if rslora else 2.0)
    head = as_head(layer, scale=scale, softcap=softcap)
    check_exact(
        head, lambda: dense_equivalent(layer), adapter_params(layer), scale=scale, softcap=softcap
    )


@pytest.mark.parametrize("kind", BASES)
def test_bias_of_the_base_and_of_the_adapter(kind):
    linear = base_linear(kind, bias=True)
    linear.bias = nn.Parameter(leaf(V, grad=False))
    layer = layer_of(with_lora(linear, lora_bias=True))
    linear.bias.requires_grad_()
    params = [*adapter_params(layer), linear.bias]
    assert len(params) == 4
    check_exact(layer, lambda: dense_equivalent(layer), params)


@pytest.mark.parametrize("train_a", [True, False])
@pytest.mark.parametrize("train_b", [True, False])
@pytest.mark.parametrize("train_weight", [True, False])
def test_every_subset_of_gradients(train_a, train_b, train_weight):
    layer = layer_of(with_lora(base_linear("dense")))
    parts = (
        (layer.lora_A["default"].weight, train_a),
        (layer.lora_B["default"].weight, train_b),
        (layer.base_layer.weight, train_weight),
    )
    for p, train in parts:
        p.requires_grad_(train)
    check_exact(layer, lambda: dense_equivalent(layer), [p for p, train in parts if train])


@pytest.mark.parametrize("kind", BASES)
def test_several_active_adapters_add_up(kind):
    model = with_lora(base_linear(kind))
    model.add_adapter("second", peft.LoraConfig(r=3, lora_alpha=5, target_modules=["lm_head"]))
    model.base_model.set_adapter(["default", "second"])
    widen(model)
    layer, names = layer_of(model), ("default", "second")
    check_exact(layer, lambda: dense_equivalent(layer, names), adapter_params(layer, names))
    model.set_adapter("second")
    check_exact(layer, lambda: dense_equivalent(layer, names[1:]), adapter_params(layer, names[1:]))


@pytest.mark.parametrize("kind", BASES)
def test_disabled_adapters_leave_the_base(kind):
    model = with_lora(base_linear(kind))
    layer = layer_of(model)
    layer.lora_B["default"].weight.data[0, 0] = torch.nan  # nothing of the adapter is read
    with model.disable_adapter():
        check_exact(layer, lambda: (base_weight(layer.base_layer), None))


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fresh_adapter_and_disabled_adapter_give_the_same_bits(kind, dtype):
    linear = base_linear(kind)
    if kind == "dense":
        linear = linear.to(dtype)
    model = with_lora(linear, zero_b=True)
    hidden, labels, _ = problem(dtype)
    policy = linear_logps(hidden, layer_of(model), labels)
    width = as_head(layer_of(model)).width
    with model.disable_adapter(), torch.no_grad():
        reference = linear_logps(hidden, layer_of(model), labels)
        assert as_head(layer_of(model)).width == width > D
    assert torch.equal(policy, reference)
    # The bare base differs by the order of its sums only.
    bare = linear_logps(hidden, layer_of(model).base_layer, labels)
    torch.testing.assert_close(policy.detach(), bare.detach(), atol=1e-5, rtol=1e-5)


def test_merged_adapter_is_in_the_weight_and_disabling_takes_it_out_again():
    model = with_lora(base_linear("dense"))
    layer = layer_of(model)
    plain = layer.base_layer.weight.detach().clone()
    model.merge_adapter()
    assert isinstance(as_head(layer), DenseHead)
    want = plain + layer.get_delta_weight("default").detach()
    check_exact(layer, lambda: (want, None))
    with model.disable_adapter():
        check_exact(layer, lambda: (plain, None))
    assert not layer.merged  # as after PEFT's own forward
    check_exact(layer, lambda: dense_equivalent(layer), adapter_params(layer))


@pytest.mark.filterwarnings("ignore:Merge lora module to:UserWarning")
@pytest.mark.parametrize("kind", ["four_bit", "eight_bit"])
def test_merged_adapter_in_a_quantised_weight(kind):
    model = with_lora(base_linear(kind))
    layer = layer_of(model)
    before = base_weight(layer.base_layer).clone()
    for p in adapter_params(layer):
        p.data = p.data.float()
    model.merge_adapter()
    after = base_weight(layer.base_layer)
    assert not torch.equal(before, after)
    check_exact(layer, lambda: (after, None))


def test_recompute_pass_leaves_out_the_columns_of_a_frozen_base():
    layer = layer_of(with_lora(nn.Linear(D, V, bias=False)))
    head = as_head(layer)
    assert head.gradient_columns([True, False]) == slice(D, None)  # B, then the weight
    assert head.gradient_columns([True, True]) == slice(None)
    assert as_head(layer.base_layer).gradient_columns([False]) == slice(0, 0)


def test_scale_changed_later_is_read_at_the_call():
    layer = layer_of(with_lora(base_linear("dense")))
    layer.scale_layer(0.25)
    assert layer.scaling["default"] == 0.5
    check_exact(layer, lambda: dense_equivalent(layer), adapter_params(layer))


def test_dropout_is_harmless_outside_training():
    model = with_lora(base_linear("dense"), lora_dropout=0.1)
    layer = layer_of(model.eval())
    check_exact(layer, lambda: dense_equivalent(layer), adapter_params(layer))


def test_modules_to_save_are_read_at_the_call():
    linear = base_linear("dense", bias=True)
    body = nn.Sequential(placed(nn.Linear(D, D)))
    outer = Model(linear)
    outer.body = body
    config = peft.LoraConfig(target_modules=["body.0"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(outer, config)
    wrapper = layer_of(model)
    copy = wrapper.modules_to_save["default"]
    copy.weight.data.normal_()
    check_exact(wrapper, lambda: (copy.weight, copy.bias), [copy.weight, copy.bias])
    with model.disable_adapter():
        original = wrapper.original_module
        check_exact(wrapper, lambda: (original.weight, original.bias))


def test_modules_to_save_of_several_adapters():
    outer = Model(base_linear("dense", bias=True))
    outer.body = nn.Sequential(placed(nn.Linear(D, D)))
    saved = peft.LoraConfig(target_modules=["body.0"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(outer, saved)
    model.add_adapter("second", saved)
    model.add_adapter("without", peft.LoraConfig(target_modules=["body.0"]))
    wrapper = layer_of(model)
    for copy in wrapper.modules_to_save.values():
        copy.weight.data.normal_()
    hidden, _, _ = problem()
    seen = []
    for names in ("default", "second", "without", ["default", "without"]):
        model.base_model.set_adapter(names)
        seen.append(as_head(wrapper).logits(hidden))
        torch.testing.assert_close(seen[-1], wrapper(hidden))
    assert not torch.equal(seen[0], seen[1])


def test_adapter_over_an_adapter():
    weight = leaf(V, D, grad=False)
    leaves = a1, b1, a2, b2 = [leaf(*s) for s in ((3, D), (V, 3), (2, D), (V, 2))]
    inner = LoRAHead(DenseHead(weight), [Adapter(a1, b1, 2.0)])
    head = LoRAHead(inner, [Adapter(a2, b2, 0.5)])
    check_exact(head, lambda: (weight + 2 * b1 @ a1 + 0.5 * b2 @ a2, None), leaves)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", BASES)
def test_bf16_within_twice_the_error_of_peft(kind, autocast, device):
    """fp32 adapters over a bf16 base, as PEFT makes them."""
    linear = base_linear(kind)
    if kind == "dense":
        linear = linear.to(torch.bfloat16)
    model = with_lora(linear)
    layer = layer_of(model)
    for p in adapter_params(layer):
        p.data = (0.1 * p.data).float()
    hidden, labels, g = problem(torch.bfloat16)
    inputs = [hidden, *adapter_params(layer)]
    with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        got = results(linear_logps(hidden, layer, labels), g, inputs)
        peer = results(gather_logps(layer(hidden).float(), labels), g, inputs)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    weight = base_weight(linear).double() + layer.scaling["default"] * wide[2] @ wide[1]
    truth = results(gather_logps(wide[0] @ weight.T, labels), g, wide)
    check_budget(got, peer, truth)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    layer = layer_of(with_lora(base_linear("four_bit")))
    hidden, labels, g = problem()
    inputs = [hidden, *adapter_params(layer)]

    def run(function):
        return results(function(hidden, layer, labels), g, inputs)

    compiled = torch.compile(linear_logps, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    torch.testing.assert_close(run(compiled), run(linear_logps))
