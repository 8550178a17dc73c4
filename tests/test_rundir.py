"""rundir.py: what a killed, stopped or damaged run loses (nothing), and what it says."""

import json
import multiprocessing
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, SMALL_RUN
from tqdm import tqdm

import rloop
from config import load_config
from rundir import RunDir

FILES = (
    *(
        "trajectories/iteration_1.jsonl",
        "trajectories/iteration_2.jsonl",
        "experts/iteration_1.jsonl",
        "experts/iteration_2.jsonl",
    ),
    *(
        "evaluations.jsonl",
        "policies/theta_1/model.safetensors",
        "policies/theta_2/model.safetensors",
        "policies/rl_2/model.safetensors",
    ),
)
TENSORS = "shard-00001-model-00001-of-00001.safetensors"


@pytest.fixture
def config(countdown_toml, tmp_path):
    return lambda name, *overrides: load_config(
        countdown_toml, [*SMALL_RUN, "--run_dir", str(tmp_path / name), *overrides]
    )


def outcome(cfg) -> list:
    """Everything of a finished run that must not depend on how often it was stopped."""
    path = RunDir(cfg).path
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in record.items() if not k.startswith("time/")} for record in metrics]
    return [metrics, *((path / file).read_bytes() for file in FILES)]


def run_with_own_lock(cfg) -> None:
    tqdm.set_lock(
        threading.RLock()
    )  # by default shared with the parent, which would wait for ever for one that died holding it
    rloop.run_method(cfg)


def run_and_kill(cfg, seconds: float) -> bool:
    """Whether the run was still going when it was killed."""
    process = multiprocessing.get_context("fork").Process(target=run_with_own_lock, args=(cfg,))
    process.start()
    process.join(seconds)
    alive = process.is_alive()
    process.kill()
    process.join()
    return alive


def test_killed_run_continues_to_the_same_bytes(config):
    """Fault: what was written between two checkpoints stands twice or is lost, a half-written file is taken for a whole one, the lock
    outlives its process."""
    rloop.run_method(config("whole"))
    start = time.perf_counter()
    rloop.run_method(config("again"))
    whole, duration, moments = (
        outcome(config("whole")),
        time.perf_counter() - start,
        random.Random(0),
    )
    assert outcome(config("again")) == whole
    kills = 0
    for n in range(20):  # one moment in every twentieth of the run, so that every phase is met
        cfg = config(f"killed-{n}")
        kills += run_and_kill(cfg, duration * (n + moments.random()) / 20)
        rloop.run_method(cfg)
        assert outcome(cfg) == whole, n
    assert kills >= 12  # the last moments may come after the end


def test_a_run_that_is_killed_again_and_again_comes_to_its_end(config):
    """Fault: continuing twice from one checkpoint, or a first checkpoint that never comes."""
    rloop.run_method(config("again"))  # the first run of a process takes longer
    start = time.perf_counter()
    rloop.run_method(config("whole"))
    duration, moments, kills = time.perf_counter() - start, random.Random(1), 0
    while run_and_kill(config("killed"), duration * moments.uniform(0.1, 0.6)):
        kills += 1
        assert kills < 60
    assert kills >= 2
    assert outcome(config("killed")) == outcome(config("whole"))


def test_sigterm_saves_the_last_step_and_the_run_goes_on(config):
    """Fault: a pre-empted run loses the steps since its last checkpoint, or does not stop."""
    options = (
        "--rl.steps",
        "40",
        "--save_every",
        "1000",
        "--eval.every",
        "1000",
        "--iterations",
        "1",
        "--method",
        "rl",
    )
    flags = [*SMALL_RUN, *options]
    whole, stopped = config("whole", *options), config("stopped", *options)
    rloop.run_method(whole)
    command = [
        sys.executable,
        "rloop.py",
        "--config",
        "configs/countdown.toml",
        *flags,
        "--run_dir",
        stopped.run_dir,
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while "step   5/40" not in process.stdout.readline():
        assert process.poll() is None
    start = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert time.perf_counter() - start < 10
    assert process.returncode == 130
    assert "stopped; the same command goes on" in errors
    assert RunDir(stopped).progress.rl_steps >= 5
    rloop.run_method(stopped)
    for file in ("trajectories/iteration_1.jsonl", "policies/rl_1/model.safetensors"):
        assert (RunDir(stopped).path / file).read_bytes() == (
            RunDir(whole).path / file
        ).read_bytes()


def stopped_run(config, monkeypatch, name="run"):
    """A run that stopped in RL step 4, with two checkpoints."""
    cfg, real = config(name), rloop.sample_groups

    def failing(policy, tokenizer, problems, run, step):
        if run.progress.rl_steps == 4:
            raise RuntimeError
        return real(policy, tokenizer, problems, run, step)

    monkeypatch.setattr(rloop, "sample_groups", failing)
    with pytest.raises(RuntimeError):
        rloop.run_method(cfg)
    monkeypatch.setattr(rloop, "sample_groups", real)
    return cfg, RunDir(cfg)


@pytest.mark.parametrize(
    ("file", "how", "said"),
    [
        *((TENSORS, how, TENSORS) for how in ("cut", "gone", "changed")),
        *(("state.json", how, "Error") for how in ("cut", "gone")),
        *(
            ("../../trajectories/iteration_2.jsonl", how, "trajectories/iteration_2.jsonl")
            for how in ("cut", "gone")
        ),
    ],
)
def test_damaged_checkpoint_is_set_aside_and_the_older_one_taken(
    config, monkeypatch, capsys, file, how, said
):
    """Fault: a run goes on from half a checkpoint, dies of it with a traceback, or deletes the good one after the next save."""
    rloop.run_method(config("whole"))
    cfg, run = stopped_run(config, monkeypatch)
    target = run.checkpoint / file
    data = target.read_bytes()
    if how == "gone":
        target.unlink()
    else:
        target.write_bytes(data[: len(data) - 20] if how == "cut" else data[:-20] + bytes(20))
    capsys.readouterr()
    rloop.run_method(cfg)
    line = next(
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith(f"{run.checkpoint} is damaged (")
    )
    assert said in line
    assert outcome(cfg) == outcome(config("whole"))
    assert (run.path / "checkpoints" / f"{run.checkpoint.name}.damaged").is_dir()


def test_all_checkpoints_damaged_changes_nothing(config, monkeypatch):
    """Fault: a run whose checkpoints are all damaged starts anew over its own files."""
    cfg, run = stopped_run(config, monkeypatch)
    for tensors in run.path.glob(f"checkpoints/*/{TENSORS}"):
        tensors.write_bytes(b"")
    before = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
    with pytest.raises(
        ValueError, match=rf"no checkpoint is whole \(.*{TENSORS} has 0 bytes, expected"
    ):
        RunDir(cfg)
    assert {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()} == before


def test_full_disk_while_saving_leaves_the_last_checkpoint(config, tmp_path):
    """Fault: a checkpoint that does not fit destroys the one before it, or half of it is taken for whole. (A limit on the size of a file
    stands for the full disk: the model's export passes, the optimizer's file does not.)"""
    code = "import resource, signal, sys, rloop\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, resource.RLIM_INFINITY))\nsys.exit(rloop.main(sys.argv[1:]))"
    cfg = config("run")
    command = [
        sys.executable,
        "-c",
        code,
        "--config",
        "configs/countdown.toml",
        *SMALL_RUN,
        "--run_dir",
        cfg.run_dir,
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1, result.stderr
    assert "could not be written" in result.stderr and "000000 is whole" in result.stderr
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["000000"]
    rloop.run_method(config("whole"))
    rloop.run_method(cfg)
    assert outcome(cfg) == outcome(config("whole"))


def test_two_runs_in_one_directory(config):
    """Fault: two processes write into one run directory."""
    cfg = config("run")
    code = "import sys, time\nfrom config import load_config\nfrom rundir import RunDir\n"
    code += "run = RunDir(load_config(sys.argv[1], sys.argv[2:]))\nprint('open', flush=True)\ntime.sleep(60)"
    other = [
        sys.executable,
        "-c",
        code,
        "configs/countdown.toml",
        *SMALL_RUN,
        "--run_dir",
        cfg.run_dir,
    ]
    process = subprocess.Popen(other, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "open\n"
    with pytest.raises(ValueError, match="another process is running in this directory"):
        RunDir(cfg)
    process.kill()
    process.wait()
    assert RunDir(cfg).path.is_dir()


@pytest.mark.parametrize("parent", ["file", "/proc/read-only"])
def test_run_directory_that_cannot_be_made(tmp_path, capsys, parent):
    """Fault: a traceback instead of an error that names the path, when a file is in the way or the place is read-only."""
    (tmp_path / "file").write_text("")
    target = str(tmp_path / parent / "run")
    assert (
        rloop.main(
            ["--config", str(ROOT / "configs/countdown.toml"), *SMALL_RUN, "--run_dir", target]
        )
        == 1
    )
    assert parent in capsys.readouterr().err


def test_stop_inside_an_evaluation_keeps_the_steps_before_it(config, monkeypatch):
    """Fault: a run stopped while it evaluates does the RL steps since its last checkpoint again (hours, with a large model)."""
    options = ("--save_every", "100", "--eval.every", "2")
    rloop.run_method(config("whole", *options))
    cfg, real = config("stopped", *options), rloop.evaluate

    def stopped_in_step_2(run, *rest):
        if run.progress.rl_steps == 2:
            raise KeyboardInterrupt
        return real(run, *rest)

    monkeypatch.setattr(rloop, "evaluate", stopped_in_step_2)
    with pytest.raises(KeyboardInterrupt):
        rloop.run_method(cfg)
    monkeypatch.setattr(rloop, "evaluate", real)
    assert RunDir(cfg).progress.rl_steps == 2
    rloop.run_method(cfg)
    assert outcome(cfg) == outcome(config("whole", *options))
