"""One rank of test_distributed.py: gradients under FSDP2, the head as a unit of its own or not."""

import os
import sys
import types

import tiny_models as tiny
import torch
import torch.distributed as dist

from dilkern.integrations.transformers import compute_loss, install_head

ARRANGEMENTS = ("own", "root", "tied", "accelerate", "accelerate tied")


def rows(rank=None):
    """Four pairs as token batches; two of them for each rank."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 300, (8, 12), generator=generator)
    keep = torch.arange(8) if rank is None else torch.tensor([0, 1, 4, 5]) + 2 * rank
    labels = ids.clone()
    labels[:, :3] = -100
    return {
        "input_ids": ids[keep],
        "attention_mask": torch.ones_like(ids[keep]),
        "labels": labels[keep],
        "ref_logps": -40 - torch.arange(8.0)[keep],
    }


def shard_as_accelerate(model):
    """Accelerate's own arrangement, norm and head as one unit; its Accelerator has no FSDP on CPU."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    state = types.SimpleNamespace(fsdp_plugin=plugin)
    fsdp2_prepare_model(types.SimpleNamespace(state=state, mixed_precision="no"), model)


def gradients(arrangement, rank=None):
    """Return the gradient of each parameter, whole, of the mean loss over all rows."""
    model = tiny.build(tie_word_embeddings="tied" in arrangement)
    install_head(model)
    if rank is not None and "accelerate" in arrangement:
        shard_as_accelerate(model)
    elif rank is not None:
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        if arrangement == "own":
            fully_shard(model.lm_head)
        fully_shard(model)
    compute_loss(model, rows(rank), loss="bce").loss.backward()
    whole = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        whole[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return whole


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for arrangement in ARRANGEMENTS:
        found = gradients(arrangement, dist.get_rank())
        if dist.get_rank() == 0:
            torch.save(found, f"{sys.argv[1]}/{arrangement}.pt")
    dist.barrier()
    # No teardown: gloo's threads abort the process now and then ("terminate called without an active
    # exception") when a peer is gone first. Everything is written, failures have been raised.
    sys.stdout.flush()
    os._exit(0)
