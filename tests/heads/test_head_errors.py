"""Every head that cannot be served says why and what to do; importing dilkern loads no library."""

import subprocess
import sys

import pytest
import torch
from head_cases import D, V, four_bit_linear, problem
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from dilkern import linear_logps
from dilkern.lm_head import Adapter, DenseHead, LMHead, LoRAHead, as_head


def lora_layer(linear, **config):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["lm_head"], **config)
    model = peft.get_peft_model(nn.ModuleDict({"lm_head": linear}), config)
    return model.base_model.model["lm_head"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: nn.Embedding(V, D),
            r"torch\.nn\.modules\.sparse\.Embedding\. Pass its dense weight",
        ),
        (lambda: "head", "builtins.str"),
        (lambda: torch.randn(V), r"shape \(V, D\); received shape \(301,\)"),
        (lambda: torch.zeros(V, D, dtype=torch.uint8), "uint8"),
        (lambda: nn.Linear(D, V, device="meta"), "on the meta device.*offload"),
        (lambda: nn.Linear(D, V).half(), "one dtype outside autocast.*float16"),
        (lambda: nn.Linear(D + 1, V), "hidden size.*D=65"),
        (
            lambda: DenseHead(torch.randn(V, D), torch.randn(V + 1)),
            r"bias must have shape \(301,\)",
        ),
        (lambda: DenseHead(torch.randn(V, D), scale=-1.0), "`scale` must be a number > 0"),
        (lambda: DenseHead(torch.randn(V, D), softcap=-1.0), "`softcap` must be a number > 0"),
    ],
)
def test_heads_that_are_refused(make, message):
    hidden, labels, _ = problem(torch.float32)
    with pytest.raises(ValueError, match=message):
        linear_logps(hidden, make(), labels)


def test_a_linear_with_a_forward_of_its_own_is_refused():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match=r"Doubled.*subclass dilkern.lm_head.Head"):
        as_head(Doubled(D, V))


def test_a_weight_that_is_a_tensor_subclass_is_refused():
    linear = nn.Linear(D, V)
    linear.weight = nn.Parameter(TwoTensor(linear.weight.data, linear.weight.data))
    with pytest.raises(ValueError, match=r"plain tensors or DTensors.*TwoTensor.*torchao"):
        as_head(linear)


def test_transforms_go_where_the_head_is_made():
    head = DenseHead(torch.randn(V, D))
    for given in (head, LMHead(lambda: head)):
        with pytest.raises(ValueError, match=r"scale=2.0.*constructor"):
            as_head(given, scale=2.0)


def test_lora_shapes():
    base = DenseHead(torch.randn(V, D))
    with pytest.raises(ValueError, match=r"shapes \(4, 64\) and \(301, 4\).*A shape \(4, 63\)"):
        LoRAHead(base, [Adapter(torch.randn(4, D - 1), torch.randn(V, 4), 1.0)])
    with pytest.raises(ValueError, match=r"bias of LoRA B must have shape \(301,\).*\(4,\)"):
        LoRAHead(base, [Adapter(torch.randn(4, D), torch.randn(V, 4), 1.0, torch.randn(4))])
    with pytest.raises(ValueError, match=r"LoRA B.*int64"):
        LoRAHead(base, [Adapter(torch.randn(4, D), torch.ones(V, 4, dtype=torch.int64), 1.0)])


def test_lora_dropout_in_training():
    layer = lora_layer(nn.Linear(D, V), lora_dropout=0.1)
    with pytest.raises(ValueError, match=r"peft.*layer.Linear with lora_dropout=0.1. Use lora_dro"):
        as_head(layer)


def test_dora():
    with pytest.raises(ValueError, match=r"layer.Linear with DoraLinearVariant.*use_dora=False"):
        as_head(lora_layer(nn.Linear(D, V), use_dora=True))


@pytest.mark.filterwarnings("ignore:aLoRA is currently:UserWarning")
def test_activated_lora():
    with pytest.raises(ValueError, match=r"layer.Linear with ALoraLinearVariant.*no other variant"):
        as_head(lora_layer(nn.Linear(D, V), alora_invocation_tokens=[1]))


def test_lora_on_parameters_instead_of_modules():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=[], target_parameters=["lm_head.weight"])
    model = peft.get_peft_model(nn.ModuleDict({"lm_head": nn.Linear(D, V)}), config)
    with pytest.raises(ValueError, match=r"received peft\.tuners\.lora\.layer\.ParamWrapper"):
        as_head(model.base_model.model["lm_head"])


def test_other_tuners():
    peft = pytest.importorskip("peft")
    for config in (peft.IA3Config, peft.LoHaConfig, peft.VeraConfig):
        more = {"feedforward_modules": []} if config is peft.IA3Config else {}
        model = peft.get_peft_model(
            nn.ModuleDict({"lm_head": nn.Linear(D, V)}), config(target_modules=["lm_head"], **more)
        )
        layer = model.base_model.model["lm_head"]
        with pytest.raises(
            ValueError, match=rf"received peft\.tuners\.\w+\.layer\.{type(layer).__name__}"
        ):
            as_head(layer)


def test_four_bit_before_it_is_quantised():
    bnb = pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match=r"bitsandbytes.*Linear4bit without quant_state.*\.to\("):
        as_head(bnb.nn.Linear4bit(D, V))


def test_eight_bit_before_it_is_quantised():
    bnb = pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match=r"Linear8bitLt with a weight of torch.float32.*\.to\("):
        as_head(bnb.nn.Linear8bitLt(D, V, has_fp16_weights=False))
    with pytest.raises(ValueError, match="has_fp16_weights=True"):
        as_head(bnb.nn.Linear8bitLt(D, V))


def test_four_bit_repacked_for_cpu_and_the_way_back():
    functional = pytest.importorskip("bitsandbytes.functional")
    linear = four_bit_linear(320)  # bitsandbytes repacks multiples of 32 only
    before = as_head(linear).block(0, 320, torch.float32)
    packed, state = functional._convert_weight_packed_for_cpu(
        linear.weight.data, linear.weight.quant_state
    )
    linear.weight.data, linear.weight.quant_state = packed, state
    with pytest.raises(ValueError, match=r"Linear4bit repacked for CPU.*state_dict"):
        as_head(linear)
    linear.state_dict()
    after = as_head(linear).block(0, 320, torch.float32)
    # bitsandbytes rounds absmax to bf16 when it repacks, and does not undo that.
    torch.testing.assert_close(after, before, rtol=2**-7, atol=0)


def test_a_head_on_another_device_than_the_cpu_or_the_hidden_states():
    hidden, labels, _ = problem(torch.float32)
    linear = nn.Linear(D, V)
    with pytest.raises(ValueError, match="labels` and `hidden_states` must be on one device"):
        linear_logps(hidden.to("meta"), linear, labels)


def test_importing_dilkern_loads_no_library():
    code = (
        "import sys, dilkern, dilkern.lm_head; "
        "print([m for m in ('transformers', 'peft', 'bitsandbytes', 'deepspeed') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
