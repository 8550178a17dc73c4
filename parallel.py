"""Many processes as one: weights in shards (FSDP2), work dealt out, and everything that is decided, decided alike everywhere.

`torchrun --nproc-per-node 8 rloop.py --config X` starts the processes; a run of one process goes the same way, with nothing to exchange.
What the processes share is exchanged at few places, each called by all of them in the same order:

    gather      results of work that each does alone (sampling and verifying); an error or a stop in one is then raised in all
    on_main     what only the first one does (files)
    total       sums of a step's measures
    shard       FSDP2: parameters are all-gathered block by block when needed, gradients reduced into float32 shards
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partialmethod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from tqdm import tqdm

from model import whole_tensor

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and a cluster's pre-emption
TIMEOUT = timedelta(hours=2)  # of waiting for the slowest process; a dead one is noticed at once
_stops: list[int] = []  # signals that came while they could not be followed


@contextmanager
def processes() -> Iterator[None]:
    """Join the processes that torchrun started, if it did. All but the first are silent, errors excepted.

    Raises KeyboardInterrupt for SIGTERM as for Ctrl-C, and ConnectionError when another process has died.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        yield
        return
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, _: _stops.append(number))
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT
    )
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or any(
            name in str(error) for name in ("gloo", "Gloo", "NCCL", "Connection")
        ):
            raise ConnectionError(
                f"another process of this run has ended, or cannot be reached: {str(error).splitlines()[0]}"
            ) from error
        raise
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """The device that this process computes on."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def share(count: int) -> slice:
    """This process's part of count things in a row."""
    return slice(count * rank() // num_ranks(), count * (rank() + 1) // num_ranks())


# ---- what the processes exchange


def gather(function: Callable[[], object]) -> list:
    """function() of every process, in their order. It may take long and be stopped, so it must not exchange anything itself.

    Raises in all of them what it raised in one; a stop signal, KeyboardInterrupt.
    """
    if not dist.is_initialized():
        return [function()]
    try:
        outcome = _stoppable(function)
    except (KeyboardInterrupt, Exception) as error:
        outcome = error
    return _agree(outcome)


def on_main(function: Callable[[], object]):
    """function() of the first process, in all; what it raises is raised in all. It is not stopped half-way."""
    if not dist.is_initialized():
        return function()
    outcome = None
    if rank() == 0:
        try:
            outcome = function()
        except Exception as error:
            outcome = error
    return _agree(outcome)[0]


def total(measures: dict[str, float]) -> dict[str, float]:
    """Sums over the processes; of a measure named *_max, the maximum."""
    if not dist.is_initialized():
        return measures
    for operation, names in (
        (dist.ReduceOp.SUM, [name for name in measures if not name.endswith("_max")]),
        (dist.ReduceOp.MAX, [name for name in measures if name.endswith("_max")]),
    ):
        values = torch.tensor([measures[name] for name in names], dtype=torch.float64)
        dist.all_reduce(values, operation)
        measures = measures | dict(zip(names, values.tolist(), strict=True))
    return measures


def check_stop() -> None:
    """Raise KeyboardInterrupt in all processes when one was asked to stop."""
    if dist.is_initialized() and total({"stops_max": float(len(_stops))})["stops_max"]:
        raise KeyboardInterrupt


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Put Ctrl-C and SIGTERM off to the end of the block: what is in it happens whole or not at all. (With several processes they wait
    anyhow, for the next gather or check_stop.)"""
    if dist.is_initialized():
        yield
        return
    pending = []
    handlers = [signal.signal(number, lambda *_: pending.append(True)) for number in STOP_SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(STOP_SIGNALS, handlers, strict=True):
            signal.signal(number, handler)
    if pending:
        raise KeyboardInterrupt


def _stoppable(function: Callable[[], object]):
    handlers = [signal.signal(number, signal.default_int_handler) for number in STOP_SIGNALS]
    try:
        if _stops:
            raise KeyboardInterrupt
        return function()
    finally:
        for number, handler in zip(STOP_SIGNALS, handlers, strict=True):
            signal.signal(number, handler)


def _agree(outcome) -> list:
    outcomes = [None] * num_ranks()
    dist.all_gather_object(outcomes, outcome)
    for each in outcomes:
        if isinstance(each, BaseException):
            raise each
    return outcomes


# ---- sharded weights


def shard(model: nn.Module, *, dtype: torch.dtype, replicas: int) -> nn.Module:
    """FSDP2 over all processes: every block, and the root with embedding, last norm and head. Called last, after checkpointing and
    compilation are set. With replicas > 1 (HSDP) the model is sharded within that many groups of processes, which hold copies of it.

    Parameters, gradients and the optimizer are float32 shards; blocks compute in dtype. Gradients are summed, not averaged: the loss is
    divided by the token count of the whole step already. Weights become float32 here, block by block, so that a process never holds a
    large model whole in memory. One process: the model itself.
    """
    if not dist.is_initialized():
        return model.to(device(), torch.float32)
    if num_ranks() % replicas:
        raise ValueError(
            f"compute.replicas = {replicas}: must divide the number of processes, {num_ranks()}"
        )
    shape, names = (num_ranks(),), ("shard",)
    if replicas > 1:
        shape, names = (replicas, num_ranks() // replicas), ("replicate", "shard")
    mesh = init_device_mesh(device().type, shape, mesh_dim_names=names)
    precision = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for module in (*model.model.layers, model):
        fully_shard(module.float(), mesh=mesh, mp_policy=precision)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
    register_fsdp_forward_method(model, "hidden")
    return model


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """The whole weights, on the CPU of the first process; the others get none, but must call it too."""
    state = {}
    for name, tensor in model.state_dict().items():
        whole = whole_tensor(tensor.detach())
        if rank() == 0:
            state[name] = whole.cpu()
    return state
