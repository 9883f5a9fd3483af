"""Heads under real DeepSpeed ZeRO-3, in two processes (`make zero3` installs DeepSpeed aside)."""

import pytest
from head_ranks import run
from zero3_ranks import all_kinds

pytest.importorskip("deepspeed", reason="`make zero3` installs DeepSpeed aside")


def test_losses_and_gradients_of_every_kind_of_head(tmp_path):
    run(all_kinds, tmp_path)
