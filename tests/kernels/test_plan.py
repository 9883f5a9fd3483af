"""What the plans of a GPU come to, without one: the figures of docs/dev/log.md, findings 6 to 10."""

import pytest
import torch

from dilkern import DenseHead
from dilkern.backends import base, triton
from dilkern.kernels import configs
from dilkern.kernels.operands import aligned
from dilkern.lm_head import Adapter, LoRAHead

T, V, MIB = 8192, 128_256, 256 << 20


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(configs, "arch", lambda device: "sm_90")
    for module in (base, triton):
        monkeypatch.setattr(module, "wide_products", lambda tensor: True)


def plan(width, kind="dense", **options):
    def of(*shape):
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    head = DenseHead(of(V, width))
    if kind == "lora":
        head = LoRAHead(head, [Adapter(of(16, width), of(V, 16), 2.0)])
    own = configs.own_product(torch.device("meta"), torch.bfloat16, width)
    assert not own  # our own product waits for a measurement (finding 6)
    return triton.plan(T, head, of(T, head.width), MIB, own=own, **options)


@pytest.mark.parametrize("width", [1024, 2048, 4096])
def test_a_lora_head_is_made_once_per_call(width):
    assert plan(width, "lora").kept >= T


def test_backward_touches_a_block_of_the_head_s_gradient_twice():
    blocks = plan(4096, gradient_columns=4096)
    assert -(-T // blocks.rows) == 2


@pytest.mark.parametrize("width, words", [(1024, 7680), (2048, 14336), (4096, 26112)])
def test_words_of_a_block_are_hardly_rounded_down(width, words):
    blocks = plan(width)
    assert blocks.vocab == words and words % configs.WORDS == 0
    assert blocks.first <= 512  # whose P every row moves (finding 13)


@pytest.mark.parametrize("width", [33, 200, 1030])
def test_rows_of_operands_are_padded_with_zeros_to_sixteen_elements(width, monkeypatch):
    """Triton sees whether 16 divides D and the stride, in elements, or it loads them one by one."""
    monkeypatch.setattr(configs, "arch", lambda device: "sm_80")  # plain pointers
    config = configs.tile(torch.device("cpu"), torch.bfloat16)
    rows = aligned(torch.ones(5, width, dtype=torch.bfloat16), config)
    assert rows.shape[1] % 16 == 0 and rows.stride(0) % 16 == 0
    assert (rows[:, :width] == 1).all() and (rows[:, width:] == 0).all()
