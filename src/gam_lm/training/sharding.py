"""A model whose weights, gradients and optimiser state are spread over the processes: FSDP2 (torch.distributed.fsdp.fully_shard), block by block.

Each process keeps a slice of the rows of every tensor. A block's weights are gathered before its forward and backward pass and freed afterwards; what
stands outside the blocks (embedding, last norm, output head) is gathered for the whole step. Weights are gathered, and gradients summed, in the format of
the weights, so that a run makes what data parallelism makes: matrix products in bf16 are autocast's, with and without sharding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gam_lm.errors import InputError
from gam_lm.model import LanguageModel


def shard(model: LanguageModel, device: torch.device) -> None:
    """Spread ``model`` over all processes in place, before an optimiser is made of its parameters. Rank 0's weights are taken.

    Raises:
        InputError: for a model of another library, which has no blocks to shard.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    if not len(model.layers):
        raise InputError("shard is True, and the model has no blocks of this library: leave it out")
    marks = {name: dict(vars(parameter)) for name, parameter in model.named_parameters()}
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, src=0)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # The gradient is summed in no narrower format than that of the weights; a block takes its input as it comes.
    policy = MixedPrecisionPolicy(reduce_dtype=model.embed_tokens.weight.dtype, cast_forward_inputs=False)
    parts: list[Any] = [*model.layers, model]
    for part in parts:
        fully_shard(part, mesh=mesh, mp_policy=policy)
    for part in sharded_parts(model):
        part.set_gradient_divide_factor(1.0)  # shares of a batch add up
        part.set_force_sum_reduction_for_comms(True)  # of the other reductions gloo has none
    register_fsdp_forward_method(model, "hidden")
    for name, parameter in model.named_parameters():
        for mark, value in marks[name].items():  # as ``no_weight_decay``, which an optimiser reads
            setattr(parameter, mark, value)


# Both by what they can do: importing FSDP takes more than a second, which a run that does not shard shall not pay.


def is_sharded(part: nn.Module | Tensor) -> bool:
    """Whether `shard` has been here."""
    return hasattr(part, "set_gradient_divide_factor" if isinstance(part, nn.Module) else "full_tensor")


def sharded_parts(model: nn.Module) -> list[Any]:
    """The model and its blocks, where they are sharded."""
    return [part for part in model.modules() if is_sharded(part)]


def local(tensor: Tensor) -> Tensor:
    """This process's slice of a sharded tensor, sharing its memory; any other tensor as it is."""
    sharded: Any = tensor
    return sharded.to_local() if is_sharded(tensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, for which all processes make the call; any other tensor as it is."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_sharded(tensor) else tensor


def like(whole: Tensor, target: Tensor) -> Tensor:
    """``whole`` on the device of ``target`` and sharded as that is: every process takes its slice of what it has, and none sends anything."""
    whole = whole.to(target.device)
    if not is_sharded(target):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(target, DTensor)
    return distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)


@torch.no_grad()
def put(targets: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> None:
    """Give sharded or other tensors the values of whole ones with the same names.

    Raises:
        ValueError: where a name is missing or a shape differs.
    """
    for name, target in targets.items():
        if name not in whole or whole[name].shape != target.shape:
            raise ValueError(f"{name} is {'missing' if name not in whole else list(whole[name].shape)}, not {list(target.shape)}")
        local(target).copy_(local(like(whole[name], target)))


@torch.no_grad()
def gathered(model: LanguageModel) -> LanguageModel | None:
    """On rank 0 a whole copy of a sharded model on the CPU, tensor after tensor; None on other ranks. All ranks make the call."""
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        whole = full(tensor)
        if dist.get_rank() == 0:
            found[name] = whole.cpu()
    if dist.get_rank():
        return None
    with torch.device("meta"):
        copy = LanguageModel(model.config)
    copy.load_state_dict(found, assign=True)
    if model.config.tie_word_embeddings:
        copy.lm_head.weight = copy.embed_tokens.weight
    return copy


def give_back(model: nn.Module) -> None:
    """Free what forward passes without a backward pass have gathered: it is out of date after the next step."""
    sharded: Any = model
    if is_sharded(model):
        sharded.reshard()


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of all tensors together, over all processes where they are sharded."""
    tensors = list(tensors)
    norm = torch.nn.utils.get_total_norm([local(each) for each in tensors])
    if any(map(is_sharded, tensors)):
        squared = norm.square()
        dist.all_reduce(squared)
        norm = squared.sqrt()
    return norm
