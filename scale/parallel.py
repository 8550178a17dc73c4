"""Many processes as one: sharded weights (FSDP2), shared work, one stop flag.

`torchrun --nproc-per-node 8 rloop.py --config X` starts the processes. A run of one process takes
the same path, with nothing to exchange. Processes exchange data in few places, each a collective:
all processes must call it, in the same order.
"""

import contextlib
import os
import pickle
import signal
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from config import ComputeConfig, UserError
from model import Transformer

TIMEOUT = timedelta(hours=2)  # of waiting for the slowest process; a dead one is noticed at once
_stop = False  # set by a signal


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Join the processes that torchrun started, if it did; all but the first print nothing.

    From here on Ctrl-C and SIGTERM set a flag (stop_requested). A second Ctrl-C ends a run of one
    process at once. Raises UserError when another process has died.
    """
    global _stop
    _stop = False
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _request_stop)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        with contextlib.ExitStack() as stack:
            if rank() > 0:
                silence = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(silence))
            yield
    except RuntimeError as error:
        names = ("gloo", "Gloo", "NCCL", "Connection")
        if isinstance(error, dist.DistError) or any(name in str(error) for name in names):
            first_line = str(error).splitlines()[0]
            raise UserError(
                f"another process of this run has ended, or cannot be reached: {first_line}"
            ) from error
        raise
    finally:
        dist.destroy_process_group()


def _request_stop(number: int, _) -> None:
    global _stop
    _stop = True
    if dist.is_initialized():
        return  # torchrun repeats the signal: a second one means nothing
    os.write(2, b"stopping after this step; Ctrl-C again stops at once\n")  # print may be busy
    signal.signal(signal.SIGINT, signal.default_int_handler)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """The device that this process computes on."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def share(count: int) -> slice:
    """This process's part of count things in a row."""
    return slice(count * rank() // num_ranks(), count * (rank() + 1) // num_ranks())


# ---- collectives


def gather(function: Callable[[], object]) -> list:
    """Results of function() in every process, in the order of ranks. function must not contain a
    collective. An exception in one process is raised in all."""
    if not dist.is_initialized():
        return [function()]
    try:
        outcome = function()
    except Exception as error:
        outcome = error
    outcomes = [None] * num_ranks()
    dist.all_gather_object(outcomes, outcome)
    outcomes[rank()] = outcome  # not its copy: an exception keeps its traceback
    for each in outcomes:
        if isinstance(each, BaseException):
            raise each
    return outcomes


def on_main(function: Callable[[], object]):
    """The result of function() in the first process, or its exception, in all processes."""
    return gather(lambda: function() if rank() == 0 else None)[0]


def exchange(parcels: list[list]) -> list:
    """What all processes have for this one, in the order of ranks; parcels[r] is for process r."""
    if not dist.is_initialized():
        return parcels[0]
    sent = [torch.frombuffer(bytearray(pickle.dumps(p)), dtype=torch.uint8) for p in parcels]
    sizes = torch.tensor([len(parcel) for parcel in sent])
    sizes_here = torch.empty_like(sizes)
    dist.all_to_all_single(sizes_here, sizes)
    received = torch.empty(int(sizes_here.sum()), dtype=torch.uint8)
    dist.all_to_all_single(received, torch.cat(sent), sizes_here.tolist(), sizes.tolist())
    parts = [part.numpy() for part in received.split(sizes_here.tolist())]
    return [item for part in parts for item in pickle.loads(part)]


def total(measures: dict) -> dict:
    """Sums over the processes."""
    sums = torch.from_numpy(np.array([*measures.values()]))
    if dist.is_initialized():
        dist.all_reduce(sums)
    return dict(zip(measures, sums.tolist(), strict=True))


def stop_requested() -> bool:
    """Whether Ctrl-C or SIGTERM reached any of the processes."""
    return any(gather(lambda: _stop))


# ---- sharded weights


def prepare(model: Transformer, cfg: ComputeConfig) -> Transformer:
    """Checkpoint activations, compile the blocks and shard, in this order, as the config says.

    Weights, gradients and the optimizer are float32, activations and frozen weights of cfg.dtype.
    Several processes: FSDP2 of every block, and of the root with embedding, last norm and head.
    With cfg.replicas > 1 (HSDP) the model is sharded within that many groups of processes, which
    hold copies of it. Gradients are summed, not averaged: the loss is already divided by the token
    count of the whole step. Weights change their dtype here, block by block.
    """
    for block in model.model.layers:
        block.checkpoint_activations = cfg.checkpoint_activations
    if cfg.compile:
        model.compile_blocks()
    dtype, replicas = getattr(torch, cfg.dtype), cfg.replicas
    model.compute_dtype = dtype
    if not dist.is_initialized():
        return set_dtypes(model, dtype).to(device())
    if num_ranks() % replicas:
        raise UserError(f"compute.replicas = {replicas}: must divide the {num_ranks()} processes")
    shape, names = (num_ranks(),), ("shard",)
    if replicas > 1:
        shape, names = (replicas, num_ranks() // replicas), ("replicate", "shard")
    mesh = init_device_mesh(device().type, shape, mesh_dim_names=names)
    precision = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for module in (*model.model.layers, model):
        fully_shard(set_dtypes(module, dtype), mesh=mesh, mp_policy=precision)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    # FSDP gathers the root's weights (the head's, too) for hidden and keeps them for logits
    register_fsdp_forward_method(model, "hidden")
    return model


def set_dtypes(module: nn.Module, frozen: torch.dtype) -> nn.Module:
    """Give weights without gradient the dtype frozen; all others float32."""
    for weight in module.parameters():
        weight.data = weight.data.to(torch.float32 if weight.requires_grad else frozen)
    return module


def whole_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one (a collective); a plain one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The whole tensors, float32 on the CPU of the first process; {} elsewhere (a collective)."""
    state = {}
    for name, tensor in tensors:
        whole = whole_tensor(tensor.detach())
        if rank() == 0:  # a copy: a whole tensor may be part of a padded one
            state[name] = whole.to("cpu", torch.float32, copy=isinstance(tensor, DTensor))
    return state
