"""parallel.py: several processes draw the same samples and learn the same as one, share every outcome, and never wait for the dead."""

import copy
import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT, SMALL_RUN
from tqdm import tqdm

import parallel
import rloop
from config import load_config
from model import Linear, Transformer, whole_tensor
from packing import micro_batches, token_logprobs

OPTIONS = [
    *(
        "--rl.max_sampling_rounds",
        "2",
        "--rl.recompute_logprobs",
        "true",
        "--rl.kl_coef",
        "0.01",
        "--rl.lr",
        "3e-4",
    ),
    *(
        "--compute.micro_batch_tokens",
        "150",
    ),  # several micro-batches a process, and not equally many
]


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def start(num_processes: int, function, *arguments) -> list[multiprocessing.Process]:
    """The function in as many processes, in torchrun's environment."""
    port = free_port()

    def body(rank: int) -> None:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_processes),
            "MASTER_ADDR": "127.0.0.1",
        }
        os.environ["MASTER_PORT"] = port
        tqdm.set_lock(threading.RLock())
        sys.exit(function(*arguments))

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=body, args=(rank,)) for rank in range(num_processes)]
    for process in processes:
        process.start()
    return processes


def exit_codes(processes: list[multiprocessing.Process], seconds: float = 60) -> list[int]:
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    assert not hanging
    return [process.exitcode for process in processes]


def arguments(run_dir, *overrides: str) -> list[str]:
    return [
        "--config",
        str(ROOT / "configs/countdown.toml"),
        *SMALL_RUN,
        *OPTIONS,
        *overrides,
        "--run_dir",
        str(run_dir),
    ]


def run_with(num_processes: int, run_dir, *overrides: str) -> None:
    if num_processes == 1:
        rloop.run_method(
            load_config(ROOT / "configs/countdown.toml", arguments(run_dir, *overrides)[2:])
        )
    else:
        assert (
            exit_codes(start(num_processes, rloop.main, arguments(run_dir, *overrides)))
            == [0] * num_processes
        )


def records(run_dir, name: str = "metrics.jsonl") -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / name).read_text().splitlines()]
    return [{k: v for k, v in record.items() if not k.startswith("time/")} for record in lines]


def assert_same_run(a, b) -> None:
    """The same samples to the token; figures and weights to rounding."""
    for file in (
        "trajectories/iteration_1.jsonl",
        "trajectories/iteration_2.jsonl",
        "experts/iteration_2.jsonl",
    ):
        drop = {"logps"}
        assert [{k: v for k, v in t.items() if k not in drop} for t in records(a, file)] == [
            {k: v for k, v in t.items() if k not in drop} for t in records(b, file)
        ]
    assert len(records(a)) == len(records(b))
    for x, y in zip(records(a), records(b), strict=True):
        assert x == {
            k: v if isinstance(v, str) else pytest.approx(v, rel=1e-3, abs=2e-5)
            for k, v in y.items()
        }
    one, other = (
        Transformer.from_pretrained(run / "policies/theta_2").state_dict() for run in (a, b)
    )
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The run of one process that the others must agree with."""
    run_dir = tmp_path_factory.mktemp("parallel") / "single"
    run_with(1, run_dir)
    return run_dir


@pytest.mark.parametrize(
    ("num_processes", "options"),
    [(2, ["--compute.checkpoint_activations", "true"]), (4, []), (4, ["--compute.replicas", "2"])],
)
def test_many_processes_draw_and_learn_what_one_does(single, tmp_path, num_processes, options):
    """Fault: seeds that depend on the process, gradients averaged instead of summed, a denominator of one process, a shard that is not
    exported, groups dealt out twice or not at all; dynamic sampling, RL, KL, recomputed log-probs, RFT and evaluation included."""
    run_with(num_processes, tmp_path / "run", *options)
    assert_same_run(tmp_path / "run", single)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_number_of_processes_may_change_between_stop_and_continue(single, tmp_path, before, after):
    """Fault: a checkpoint that only as many processes can read as wrote it."""
    stops = {
        "iteration 2, RL": lambda now: now.iteration == 1 and now.step == 1,
        "RFT": lambda now: now.rft_step == 2,
    }
    for name, reached in stops.items():
        run_dir = tmp_path / name
        assert exit_codes(start(before, stop_when, arguments(run_dir), reached)) == [130] * before
        assert len(records(run_dir)) < len(records(single))
        run_with(after, run_dir)
        assert_same_run(run_dir, single)


def stop_when(flags: list[str], reached) -> int:
    """rloop.main, sent SIGTERM by itself (by its last process) as soon as a checkpoint of that progress is written."""
    save = rloop.RunDir.save

    def save_and_stop(run, *rest):
        save(run, *rest)
        if reached(run.progress) and parallel.rank() == parallel.num_ranks() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    rloop.RunDir.save = save_and_stop
    return rloop.main(flags)


def gradients(model: Transformer, *, bf16: bool) -> dict[str, torch.Tensor]:
    groups = [([1, 2, 3 + n], [[4, 5 + g, 6, 7] for g in range(4)]) for n in range(4)]
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for batch, _ in micro_batches(groups, 1000):
            token_logprobs(model, batch)[0].mean().backward()
    return {name: whole_tensor(p.grad) for name, p in model.named_parameters()}


def test_bfloat16_shards_are_as_exact_as_autocast(tiny):
    """Fault: with bfloat16 weights handed out by FSDP, the residual stream or the sum of gradients is bfloat16 too."""
    tiny.requires_grad_(True)
    exact, auto = (gradients(copy.deepcopy(tiny), bf16=bf16) for bf16 in (False, True))
    error = lambda got: math.sqrt(
        sum(float((got[name] - g).square().sum()) for name, g in exact.items())
    )  # noqa: E731

    def sharded() -> int:
        with parallel.processes():
            model = parallel.shard(copy.deepcopy(tiny), dtype=torch.bfloat16, replicas=1)
            got = {
                name: g / 2 for name, g in gradients(model, bf16=True).items()
            }  # both processes add the same
            return int(
                error(got) > 1.2 * error(auto)
                or not 0 < error(auto) < 0.1 * error({k: 0 for k in exact})
            )

    assert exit_codes(start(2, sharded)) == [0, 0]


def test_copy_of_shards_gives_its_memory_back_and_comes_again(tiny, monkeypatch):
    """Fault: the sampler's copy lies beside the activations (65 GB of 80 with 32B), or samples from what lay there before."""
    monkeypatch.setattr("model.PACKED_FROM", 0)
    ids = torch.tensor([[1, 2, 3]])

    def sharded() -> int:
        with parallel.processes():
            expected = copy.deepcopy(tiny).copy_as(torch.bfloat16)(ids)
            model = parallel.shard(tiny, dtype=torch.bfloat16, replicas=1)
            first = model.copy_as(torch.bfloat16)(ids)
            model.free_copies()
            (freed,) = model._copies.values()
            packed = [
                freed.packed_head,
                *(m.packed for m in freed.modules() if isinstance(m, Linear)),
            ]
            left = not all(w.is_meta for w in freed.parameters()) or packed != [None] * len(packed)
            return int(
                left
                or not torch.equal(first, expected)
                or not torch.equal(model.copy_as(torch.bfloat16)(ids), expected)
            )

    assert exit_codes(start(2, sharded)) == [0, 0]


def test_fewer_problems_than_processes(tmp_path):
    """Fault: a process with no problem, no usable group or no micro-batch hangs, or makes the others wait."""
    tight = (
        "--rl.problems_per_step",
        "2",
        "--rl.minibatches",
        "1",
        "--rft.batch_size",
        "1",
        "--rft.epochs",
        "1",
        "--data.eval_size",
        "2",
    )
    run_with(3, tmp_path / "run", *tight)
    run_with(1, tmp_path / "single", *tight)
    assert_same_run(tmp_path / "run", tmp_path / "single")


def test_all_groups_flat(tmp_path, capfd):
    """Fault: processes that skip an update together wait for each other all the same."""
    run_with(2, tmp_path / "run", "--rl.samples_per_problem", "1", "--iterations", "1")
    assert all(
        record["rl/flat_share"] == 1
        for record in records(tmp_path / "run")
        if record["phase"] == "rl"
    )


def test_error_of_one_process_ends_all(tmp_path, capfd):
    """Fault: one process fails while sampling and the others wait for it for ever."""

    def failing() -> int:
        real = rloop.sample

        def sample(*positional, **named):
            if parallel.rank() == 1:
                raise FloatingPointError("the model's logits are not finite while sampling")
            return real(*positional, **named)

        rloop.sample = sample
        return rloop.main(arguments(tmp_path / "run"))

    assert exit_codes(start(2, failing)) == [1, 1]
    assert (
        capfd.readouterr().err.count("error: the model's logits are not finite while sampling") == 2
    )


def test_death_of_one_process_ends_the_others_with_an_error(tmp_path, capfd):
    """Fault: the others wait for ever, or end with a traceback."""

    def dying() -> int:
        real = rloop.finish_step

        def finish_step(policy, optimizer, loss, rows, run):
            if parallel.rank() == 1 and run.progress.step == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(policy, optimizer, loss, rows, run)

        rloop.finish_step = finish_step
        return rloop.main(arguments(tmp_path / "run"))

    assert exit_codes(start(3, dying)) == [1, -signal.SIGKILL, 1]
    assert "another process of this run has ended" in capfd.readouterr().err
    run_with(2, tmp_path / "run")  # nothing is lost


def test_torchrun(single, tmp_path):
    """Fault: the documented command does not start, or prints every line once for each process."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "rloop.py",
        *arguments(tmp_path / "run"),
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("eval base after 0 RL steps") == 1
    assert_same_run(tmp_path / "run", single)


def test_replicas_must_divide_the_processes(tmp_path, capfd):
    """Fault: a mesh of another shape than asked for, or a traceback."""
    assert exit_codes(
        start(3, rloop.main, arguments(tmp_path / "run", "--compute.replicas", "2"))
    ) == [1, 1, 1]
    assert "compute.replicas = 2: must divide the number of processes, 3" in capfd.readouterr().err


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 20])
def test_micro_batches_of_all_processes_hold_every_response_once(num_ranks):
    """Fault: a response trained twice or never, or processes with different numbers of collectives (which would hang)."""
    groups = [
        ([1] * (3 + n), [[2] * (1 + (5 * n + 3 * g) % 17) for g in range(4)]) for n in range(5)
    ]
    parts = [list(micro_batches(groups, 60, rank, num_ranks)) for rank in range(num_ranks)]
    assert len({len(part) for part in parts}) == 1
    assert sorted(row for part in parts for _, members in part for row in members) == list(
        range(20)
    )
    tokens = [
        sum(sum(batch.response_lengths) for batch, members in part if members) for part in parts
    ]
    assert max(tokens) - min(tokens) <= 2 * 17
