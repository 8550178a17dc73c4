"""scale/parallel.py: several processes sample and learn the same as one, share every outcome, and
never wait for the dead."""

import copy
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest
import torch
import torch._dynamo  # here, not in each of the processes
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import ROOT, SMALL_RUN, TINY, random_model
from tqdm import tqdm

import packing
import rloop
import run as run_module
from config import load_config
from model import Transformer
from packing import Row, micro_batches, token_logprobs
from run import Run
from sampler import sampling_copy
from scale import parallel
from verify import Verdict

COUNTDOWN = str(ROOT / "configs/countdown.toml")
OPTIONS = [
    *("--rl.steps", "2", "--rl.samples_per_problem", "6", "--sampling.max_new_tokens", "40"),
    *("--data.eval_size", "4", "--eval.num_samples", "2", "--rft.epochs", "1"),
    *("--rl.max_sampling_rounds", "2", "--rl.recompute_logprobs", "true"),
    *("--rl.favor_hard", "true"),
    *("--rl.kl_coef", "0.01", "--rl.lr", "3e-4"),
    *("--compute.micro_batch_tokens", "150"),  # several a process, and not equally many
]


class Processes:
    """A function in several processes, which meet at a file: torchrun's TCPStore asks a name server
    at every connection, and a fork while its thread does so leaves the child a locked resolver."""

    def __init__(self, number: int, function, *arguments):
        self.folder = tempfile.TemporaryDirectory()

        def body(rank: int) -> None:
            os.environ["WORLD_SIZE"] = str(number)
            store = dist.FileStore(f"{self.folder.name}/store", number)
            dist.init_process_group = functools.partial(
                dist.init_process_group, store=store, rank=rank, world_size=number
            )
            tqdm.set_lock(threading.RLock())
            sys.exit(function(*arguments))

        context = multiprocessing.get_context("fork")
        self.processes = [context.Process(target=body, args=(rank,)) for rank in range(number)]
        for process in self.processes:
            process.start()

    def exit_codes(self, seconds: float = 60) -> list[int]:
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for rank in hanging:
            os.kill(self.processes[rank].pid, signal.SIGABRT)  # faulthandler prints where it hangs
            self.processes[rank].join()
        assert not hanging
        return [process.exitcode for process in self.processes]


def arguments(run_dir, *overrides: str) -> list[str]:
    run = ("--run_dir", str(run_dir))
    return ["--config", COUNTDOWN, *SMALL_RUN, *OPTIONS, *overrides, *run]


def run_with(num_processes: int, run_dir, *overrides: str) -> None:
    """A run without its report, which takes longer than the rest."""

    def body() -> int:
        with parallel.processes():
            rloop.run_method(cfg)
        return 0

    cfg = load_config(COUNTDOWN, arguments(run_dir, *overrides)[2:])
    if num_processes == 1:
        body()
    else:
        assert Processes(num_processes, body).exit_codes() == [0] * num_processes


def records(run_dir, name: str = "metrics.jsonl") -> list[dict]:
    """The records of a file, or of the files that several processes wrote in its place."""
    files = [run_dir / name, *sorted(run_dir.glob(name.replace(".jsonl", ".rank*.jsonl")))]
    lines = [line for file in files if file.exists() for line in file.read_text().splitlines()]
    found = [json.loads(line) for line in lines]
    if len(files) > 1:  # the order of sampling
        found.sort(key=lambda r: (r["step"], r["round"]))
    return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in found]


def assert_same_run(a, b) -> None:
    """The same samples to the token, the same experts in the same order; figures and weights to
    rounding."""
    folders = ("trajectories", "experts")
    paths = [[f for folder in folders for f in run.glob(f"{folder}/*.jsonl")] for run in (a, b)]
    names = [{f"{f.parent.name}/{f.name.split('.')[0]}.jsonl" for f in files} for files in paths]
    assert names[0] == names[1] and len(names[0]) >= 2
    for name in names[0]:
        one, other = (
            [{k: v for k, v in t.items() if k != "logps"} for t in records(run, name)]
            for run in (a, b)
        )
        assert one == other and (one or "experts" in name)
    assert len(records(a)) == len(records(b))
    for x, y in zip(records(a), records(b), strict=True):
        assert x == {
            k: v if isinstance(v, str) else pytest.approx(v, rel=1e-3, abs=2e-5)
            for k, v in y.items()
        }
    last = max(path.name for path in (a / "policies").glob("theta_*"))
    one, other = (
        Transformer.from_pretrained(run / "policies" / last).state_dict() for run in (a, b)
    )
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The run of one process that the others must agree with."""
    run_dir = tmp_path_factory.mktemp("parallel") / "single"
    run_with(1, run_dir)
    kinds = [record["phase"] for record in records(run_dir)]
    assert kinds.count("rft") > 1 and any("rl/loss" in r for r in records(run_dir))
    return run_dir


@pytest.mark.parametrize(
    ("num_processes", "options"),
    [
        (4, []),
        (4, ["--compute.replicas", "2", "--compute.checkpoint_activations", "true"]),
    ],
)
def test_many_processes_draw_and_learn_what_one_does(single, tmp_path, num_processes, options):
    """Fault: seeds that depend on the process, gradients averaged instead of summed, a denominator
    of one process, a shard that is not exported, groups dealt out twice or not at all; dynamic
    sampling, RL, KL, recomputed log-probs, RFT and evaluation included. (Two processes: below.)"""
    run_with(num_processes, tmp_path / "run", *options)
    assert_same_run(tmp_path / "run", single)


@pytest.mark.parametrize(
    ("before", "after", "options"), [(1, 2, []), (2, 1, []), (4, 2, ["--compute.replicas", "2"])]
)
def test_number_of_processes_may_change_between_stop_and_continue(
    single, tmp_path, before, after, options
):
    """Fault: a checkpoint of RL or of RFT, or a phase's trajectories, that only as many processes
    can read as wrote them, HSDP (2 x 2, then 2 x 1) included; or several processes learn something
    else than one."""
    flags = arguments(tmp_path / "run", *options)
    lines = [0]
    for number, reached in (
        (before, lambda now: now.iteration == 1 and now.step == 1),
        (after, lambda now: now.iteration == 1 and now.rft_step == 1),
    ):
        assert Processes(number, stop_when, flags, reached).exit_codes() == [130] * number
        lines.append(len(records(tmp_path / "run")))
    assert lines[0] < lines[1] < lines[2] < len(records(single))
    assert records(tmp_path / "run")[lines[1] - 1]["phase"] == "rl"
    assert records(tmp_path / "run")[lines[2] - 1]["phase"] == "rft"
    run_with(before, tmp_path / "run", *options)
    assert_same_run(tmp_path / "run", single)


def stop_when(flags: list[str], reached) -> int:
    """rloop.main, sent SIGTERM by itself (by its last process) as soon as it has come so far."""
    commit = Run.commit

    def commit_and_signal(run, *rest, **progress):
        commit(run, *rest, **progress)
        if reached(run.progress) and parallel.rank() == parallel.num_ranks() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    Run.commit = commit_and_signal
    return rloop.main(flags)


@pytest.mark.parametrize(
    ("stopped", "signals"),
    [((1,), [signal.SIGTERM]), ((0, 1), [signal.SIGINT, signal.SIGTERM] * 2)],
)
def test_stop_while_processes_write_a_checkpoint_is_a_stop(tmp_path, capfd, stopped, signals):
    """Fault: SIGTERM to one process, or repeated signals to all (by a terminal and torchrun), while
    they write their shards of a checkpoint end in an error, a half-written checkpoint, a process
    that waits for the others, or a run that continues to other bits."""

    def body() -> int:
        real, calls = dcp.HuggingFaceStorageWriter.write_data, []

        def interrupted(writer, plan, planner):
            calls.append(None)
            if len(calls) == 3:
                for number in signals if parallel.rank() in stopped else ():
                    os.kill(os.getpid(), number)
                    time.sleep(0.01)  # the handler runs
            return real(writer, plan, planner)

        dcp.HuggingFaceStorageWriter.write_data = interrupted
        return rloop.main(flags)

    flags = arguments(tmp_path / "run", "--save_every", "1")
    assert Processes(2, body).exit_codes() == [130, 130]
    assert capfd.readouterr().err.count("stopped; the same command continues") == 2
    found = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert found == ["000002", "000003"]  # the third, and the one of the stop
    state = json.loads((tmp_path / "run/checkpoints/000003/state.json").read_text())
    assert (state["progress"]["step"], state["progress"]["rft_step"]) == (2, 1)
    run_with(2, tmp_path / "run", "--save_every", "1")
    run_with(2, tmp_path / "whole", "--save_every", "1")
    files = [f"trajectories/iteration_2{end}.jsonl" for end in ("", ".rank00001")]
    for file in (*files, "policies/theta_2/model.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert records(tmp_path / "run") == records(tmp_path / "whole")


def test_first_signal_asks_and_second_ctrl_c_ends_a_single_process():
    """Fault: Ctrl-C breaks off a step whose checkpoint is seconds away, or nothing but a kill ends
    a run that hangs; or a signal of an earlier run stops the next one."""
    for number in (signal.SIGTERM, signal.SIGINT):
        with pytest.raises(KeyboardInterrupt), parallel.processes():
            assert not parallel.stop_requested()
            os.kill(os.getpid(), number)
            assert parallel.stop_requested()
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)


def test_signals_and_measures_are_shared():
    """Fault: a signal to one process is not heard by the others, or a repeated one, which torchrun
    sends, breaks off their exchange; sums or parcels over processes are those of one."""

    def check() -> int:
        with parallel.processes():
            rank = parallel.rank()
            assert not parallel.stop_requested()
            for _ in range(2 if rank == 1 else 0):
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGTERM)
            assert parallel.stop_requested()
            measures = parallel.total({"loss": 1.5 + rank, "rows": 5 - rank})
            assert measures == {"loss": 7.5, "rows": 12}
            counts = parallel.total({"p": rank, "q": 1})
            assert counts == {"p": 3, "q": 3} and isinstance(counts["p"], int)
            assert parallel.gather(lambda: rank) == [0, 1, 2]
            assert parallel.exchange([[(rank, r)] * r for r in range(3)]) == [
                (source, rank) for source in range(3) for _ in range(rank)
            ]
            assert parallel.on_main(lambda: f"of {rank}") == "of 0"
            shares = parallel.gather(lambda: list(range(10))[parallel.share(10)])
            assert sum(shares, []) == list(range(10))
        return 0

    assert Processes(3, check).exit_codes() == [0, 0, 0]


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_dealt_groups_hold_every_response_once_and_are_balanced(num_ranks):
    """Fault: a response trained twice or never, or under another one's prompt; a dummy that is
    trained; processes with different numbers of micro-batches (which would hang), or one that
    waits for another with twice its tokens."""
    lengths = [[5 + (5 * n + 3 * g) % 17 for g in range(8)] for n in range(6)]

    def check() -> int:
        with parallel.processes():
            owner = [0, 0, 0, 0, 0, num_ranks - 1]  # of a minibatch's groups: far from balanced
            groups = [
                [
                    Row([n, 1], [10 * n + g] * x, [-float(g)] * x, weight=1.0)
                    for g, x in enumerate(ls)
                ]
                if owner[n] == parallel.rank()
                else []
                for n, ls in enumerate(lengths)
            ]
            dealt = packing.deal(groups)
            batches = [*micro_batches(dealt, 60)]
            rows = [row for batch in batches for row in batch.rows if row.weight > 0]
            assert sorted(map(id, rows)) == sorted(id(row) for part in dealt for row in part)
            assert all(row.prompt_ids == part[0].prompt_ids for part in dealt for row in part)
            assert len({*parallel.gather(lambda: len(batches))}) == 1
            found = sorted(
                (row.prompt_ids[0], row.ids[0], len(row.ids), -row.sampler_logps[0])
                for part in parallel.gather(lambda: rows)
                for row in part
            )
            assert found == [
                (n, 10 * n + g, x, g) for n, ls in enumerate(lengths) for g, x in enumerate(ls)
            ]
            tokens = parallel.gather(lambda: sum(len(row.ids) for row in rows))
            assert max(tokens) <= sum(tokens) / num_ranks + max(map(max, lengths))
        return 0

    assert Processes(num_ranks, check).exit_codes() == [0] * num_ranks


def test_a_dummy_counts_nowhere():
    """Fault: the dummy of a process that has no response adds to the loss, to the gradient or to
    the gap to the sampler's log-probs, which is 3e38 in a vocabulary without id 0 (unknown_ids)."""
    cfg, tiny = load_config(COUNTDOWN, ["--rl.kl_coef", "0.01"]), random_model(TINY)
    tiny.unknown_ids = torch.tensor([0])
    row = Row([1, 2], [3, 4], [-1.0, -2.0], advantage=1.0, ref_logps=[-1.5, -2.5])

    def measures() -> dict[str, float]:
        policy = parallel.prepare(copy.deepcopy(tiny), cfg.compute)
        groups = [[row]] if parallel.rank() == 0 else []
        found = rloop.accumulate_gradient(policy, groups, cfg)
        squares = [parallel.whole_tensor(w.grad).square().sum() for w in policy.parameters()]
        return found | {"gradient": math.sqrt(sum(map(float, squares)))}

    def check() -> int:
        with parallel.processes():
            assert measures() == pytest.approx(expected, rel=1e-5)
        return 0

    expected = measures()
    assert expected["gap_max"] > 0 and expected["gradient"] > 0
    assert Processes(2, check).exit_codes() == [0, 0]


class CountedCollectives:
    """torch.distributed as scale/parallel.py sees it: counts the bytes that a process receives,
    weights, gradients and checkpoints left out."""

    num_bytes = 0

    def __getattr__(self, name: str):
        return getattr(dist, name)

    def all_gather_object(self, results: list, *rest) -> None:
        dist.all_gather_object(results, *rest)
        self.num_bytes += sum(len(pickle.dumps(result)) for result in results)

    def all_to_all_single(self, received: torch.Tensor, *rest) -> None:
        dist.all_to_all_single(received, *rest)
        self.num_bytes += received.nbytes

    def all_reduce(self, tensor: torch.Tensor, *rest) -> None:
        dist.all_reduce(tensor, *rest)
        self.num_bytes += tensor.nbytes


def test_what_a_process_receives_does_not_grow_with_their_number(tmp_path):
    """Fault: every process receives what all have sampled. Each process has the same number of
    problems, however many there are: a further one may cost the others a few numbers, but not the
    tokens that it samples."""

    def body(run_dir) -> int:
        real = rloop.sample_groups, Run.commit

        def sample_groups(*arguments):
            parallel.dist = CountedCollectives()
            return real[0](*arguments)

        def commit(run, record, *rest, trajectories=(), **progress):
            real[1](run, record, *rest, trajectories=trajectories, **progress)
            if record["phase"] == "rl":
                sampled = sum(len(pickle.dumps(t)) for group in trajectories for t in group)
                counted = parallel.dist.num_bytes, sampled
                parallel.dist = dist
                counts = parallel.gather(lambda: counted)
                (tmp_path / f"{parallel.num_ranks()}.json").write_text(json.dumps(counts))

        def verify_many(problems, texts):  # no group is flat
            return [Verdict(n % 2 == 0, "", reward=float(n % 2 == 0)) for n in range(len(texts))]

        rloop.sample_groups, Run.commit, rloop.verify_many = sample_groups, commit, verify_many
        with parallel.processes():
            problems = ("--rl.problems_per_step", str(4 * parallel.num_ranks()))
            options = ("--method", "rl", "--iterations", "1", "--rl.steps", "1")
            size = ("--data.train_size", "32", "--rl.max_sampling_rounds", "1")
            data = ("--data.train", load_config(COUNTDOWN).data.train, "--data.eval_size", "8")
            flags = arguments(run_dir, *problems, *options, *size, *data)
            rloop.run_method(load_config(COUNTDOWN, flags[2:]))
        return 0

    received, sampled = {}, {}
    for number in (2, 4, 8):
        assert Processes(number, body, tmp_path / f"run{number}").exit_codes(120) == [0] * number
        counts = json.loads((tmp_path / f"{number}.json").read_text())
        received[number] = max(r for r, _ in counts)
        sampled[number] = min(s for _, s in counts)
    of_another = (received[8] - received[2]) / 6  # numbers: of its problems, and of itself
    assert 0 < of_another < 0.05 * sampled[8], (received, sampled)
    assert received[8] < sampled[8]


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    groups = [
        [Row(prompt_ids=[1, 2, 3 + n], ids=[4, 5 + g, 6, 7]) for g in range(4)] for n in range(4)
    ]
    for batch in micro_batches(groups, 40):
        token_logprobs(model, batch)[0].mean().backward()
    return {name: parallel.whole_tensor(p.grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_shards_are_as_exact_as_a_whole_model(tied):
    """Fault: with bfloat16 weights handed out by FSDP, the sum of gradients is bfloat16, too; or
    the sampling copy of the shards is not the copy of the whole model, or is an earlier step's."""
    tiny, ids = random_model(TINY | {"tie_word_embeddings": tied}), torch.tensor([[1, 2, 3]])
    compute = dataclasses.replace(load_config(COUNTDOWN).compute, dtype="bfloat16")
    exact = gradients(copy.deepcopy(tiny))
    whole = gradients(parallel.prepare(copy.deepcopy(tiny), compute))

    def error(got: dict[str, torch.Tensor]) -> float:
        return math.sqrt(sum(float((got[name] - g).square().sum()) for name, g in exact.items()))

    def sharded() -> int:
        expected = sampling_copy(tiny, "bfloat16")(ids)
        with parallel.processes():
            model = parallel.prepare(copy.deepcopy(tiny), compute)
            assert torch.equal(sampling_copy(model, "bfloat16")(ids), expected)
            got = {name: g / 2 for name, g in gradients(model).items()}  # two add the same
            print("errors", error(got), error(whole), error(dict.fromkeys(exact, 0)))
            assert {g.dtype for g in got.values()} == {torch.float32}
            assert error(got) < 1.2 * error(whole)
            assert 0 < error(whole) < 0.1 * error(dict.fromkeys(exact, 0))
            assert torch.equal(sampling_copy(model, "bfloat16")(ids), expected)
            with torch.no_grad():
                for weight in (*model.parameters(), *tiny.parameters()):
                    weight.mul_(1.5)
            got = sampling_copy(model, "bfloat16")(ids)
            assert torch.equal(got, sampling_copy(tiny, "bfloat16")(ids))
            assert not torch.equal(got, expected)
        return 0

    assert Processes(2, sharded).exit_codes() == [0, 0]


def test_fewer_problems_than_processes(tmp_path):
    """Fault: a process with no problem, no usable group or no micro-batch hangs, or makes the
    others wait; what it runs instead is trained."""
    tight = (
        *("--rl.problems_per_step", "2", "--rl.minibatches", "1", "--data.eval_size", "2"),
        *("--rft.batch_size", "2", "--iterations", "1"),
    )
    run_with(3, tmp_path / "run", *tight)
    run_with(1, tmp_path / "single", *tight)
    assert_same_run(tmp_path / "run", tmp_path / "single")


def test_all_groups_flat(tmp_path):
    """Fault: processes that skip an update together wait for each other all the same."""
    run_with(2, tmp_path / "run", "--rl.samples_per_problem", "1", "--iterations", "1")
    steps = [record for record in records(tmp_path / "run") if record["phase"] == "rl"]
    assert len(steps) == 2 and all(record["rl/flat_share"] == 1 for record in steps)


def test_error_of_one_process_ends_all(tmp_path, capfd):
    """Fault: one process fails while sampling and the others wait for it for ever, or none of
    them shows the line that failed."""

    def failing() -> int:
        real = rloop.sample

        def sample(*positional, **named):
            if parallel.rank() == 1:
                raise FloatingPointError("the model's logits are not finite while sampling")
            return real(*positional, **named)

        rloop.sample = sample
        return rloop.main(arguments(tmp_path / "run"))

    assert Processes(2, failing).exit_codes() == [1, 1]
    message = "FloatingPointError: the model's logits are not finite while sampling"
    error = capfd.readouterr().err
    assert error.count(message) == 2
    assert error.count(", in sample\n") == 1


@pytest.mark.parametrize(
    ("owner", "name", "call", "reached"),
    [
        (rloop, "sample", 4, (1, 0)),  # the base policy's evaluation, two rounds of step 1, step 2
        (rloop, "finish_step", 3, (1, 0)),  # two in step 1
        (dcp.HuggingFaceStorageWriter, "write_data", 3, (1, 0)),  # at the start, after steps 1, 2
        (rloop, "rft_step", 2, (2, 1)),  # two in an iteration
    ],
)
def test_death_of_one_process_ends_the_others_with_an_error(
    single, tmp_path, capfd, owner, name, call, reached
):
    """Fault: the others wait for ever, or end with a traceback; or what a lost process had written
    since the last checkpoint, or its part of that one, is missing or there twice afterwards."""

    def dying() -> int:
        real, calls = getattr(owner, name), []

        def function(*positional, **named):
            calls.append(None)
            if parallel.rank() == 1 and len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*positional, **named)

        setattr(owner, name, function)
        return rloop.main(arguments(tmp_path / "run", *options))

    options = ("--save_every", "1")
    assert Processes(3, dying).exit_codes() == [1, -signal.SIGKILL, 1]
    error = capfd.readouterr().err
    assert error.count("error: another process of this run has ended") == 2
    assert "Traceback" not in error
    last = max((tmp_path / "run/checkpoints").glob("*/state.json"))
    progress = json.loads(last.read_text())["progress"]
    assert (progress["step"], progress["rft_step"]) == reached
    run_with(2, tmp_path / "run", *options)  # nothing is lost
    assert_same_run(tmp_path / "run", single)


def test_full_disk_of_one_process_ends_all(single, tmp_path, capfd, monkeypatch):
    """Fault: one process cannot write its trajectories and the others go on without them, or wait
    for ever; or a half written line of it is still there when the run continues."""

    def failing() -> int:
        real, count = json.dumps, []

        def dumps(record, **options):
            count.append(None)
            if parallel.rank() == 1 and len(count) == 20:
                raise OSError(28, "No space left on device")
            return real(record, **options)

        monkeypatch.setattr(run_module.json, "dumps", dumps)
        return rloop.main(arguments(tmp_path / "run"))

    assert Processes(2, failing).exit_codes() == [1, 1]
    error = capfd.readouterr().err
    assert error.count("iteration_1.rank00001.jsonl: cannot be written: [Errno 28]") == 2
    assert "Traceback" not in error
    run_with(2, tmp_path / "run")
    assert_same_run(tmp_path / "run", single)


def test_torchrun(tmp_path):
    """Fault: the documented command does not start, or prints every line once for each process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    flags = arguments(tmp_path / "run", "--method", "eval")
    result = subprocess.run(
        [*command, "--nproc-per-node", "2", "rloop.py", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("eval base after 0 RL steps") == 1
    run_with(1, tmp_path / "single", "--method", "eval")
    assert records(tmp_path / "run") == records(tmp_path / "single")


def test_replicas_must_divide_the_processes(tmp_path, capfd):
    """Fault: a mesh of another shape than asked for, or a traceback."""
    flags = arguments(tmp_path / "run", "--compute.replicas", "2")
    assert Processes(3, rloop.main, flags).exit_codes() == [1, 1, 1]
    error = capfd.readouterr().err
    assert "error: compute.replicas = 2: must divide the 3 processes" in error
    assert "Traceback" not in error
