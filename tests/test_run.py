"""run.py: what a killed, stopped or damaged run loses (nothing), and what it says."""

import contextlib
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import ROOT, SMALL_RUN
from tensorboard.backend.event_processing import event_accumulator
from tqdm import tqdm

import rloop
from config import UserError, load_config
from run import Run, Stopped, evaluation_line
from scale import parallel

FILES = (
    *("trajectories/iteration_1.jsonl", "trajectories/iteration_2.jsonl"),
    *("experts/iteration_1.jsonl", "experts/iteration_2.jsonl", "evaluations.jsonl"),
    *(f"policies/{name}/model.safetensors" for name in ("rl_1", "theta_1", "rl_2", "theta_2")),
)
TENSORS = "shard-00001-model-00001-of-00001.safetensors"
FEW = [
    *(*SMALL_RUN, "--rl.steps", "2", "--data.eval_size", "2", "--eval.num_samples", "2"),
    *("--rft.epochs", "1", "--rft.batch_size", "4", "--rl.favor_hard", "true"),
    *("--save_every", "1"),
]
TOML = ROOT / "configs" / "countdown.toml"


@pytest.fixture
def config(tmp_path):
    return lambda name="run", *overrides: load_config(
        TOML, [*FEW, "--run_dir", str(tmp_path / name), *overrides]
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list:
    """The outcome of the run that nothing stopped."""
    cfg = load_config(TOML, [*FEW, "--run_dir", str(tmp_path_factory.mktemp("whole"))])
    rloop.run_method(cfg)
    result = outcome(cfg)
    phases = [(record["phase"], record["iteration"]) for record in result[0]]
    assert phases.count(("rft", 0)) >= 2 and phases.count(("rft", 1)) >= 2
    return result


def outcome(cfg) -> list:
    """Everything of a finished run that must not depend on how often it was stopped."""
    path = Path(cfg.run_dir)
    assert json.loads(newest_checkpoint(path).read_text())["progress"]["finished"]
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in record.items() if not k.startswith("time/")} for record in metrics]
    return [metrics, *((path / file).read_bytes() for file in FILES)]


def newest_checkpoint(path: Path) -> Path:
    return max(path.glob("checkpoints/??????/state.json"))


def num_records(cfg) -> int:
    file = Path(cfg.run_dir) / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


# ---- kills


def in_child(function, *arguments) -> multiprocessing.Process:
    """Start the function in a forked process."""

    def start():
        # by default the lock is shared with the parent, and a killed child may die holding it
        tqdm.set_lock(threading.RLock())
        function(*arguments)

    process = multiprocessing.get_context("fork").Process(target=start)
    process.start()
    return process


def run_and_kill(cfg, records: int, delay: float) -> bool:
    """Run until metrics.jsonl has so many records, and delay seconds longer; then kill the process.
    Whether the run was still alive."""
    process = in_child(rloop.run_method, cfg)
    while process.is_alive() and num_records(cfg) < records:
        time.sleep(0.002)
    process.join(delay)
    alive = process.is_alive()
    process.kill()
    process.join()
    return alive


@pytest.fixture(scope="module")
def seconds_a_record(whole, tmp_path_factory) -> float:
    flags = [*FEW, "--save_every", "2", "--run_dir", str(tmp_path_factory.mktemp("again"))]
    cfg = load_config(TOML, flags)
    start = time.perf_counter()
    rloop.run_method(cfg)  # the first run of a process takes longer
    assert outcome(cfg) == whole
    return (time.perf_counter() - start) / num_records(cfg)


def test_killed_run_continues_to_the_same_bytes(config, whole, seconds_a_record):
    """Fault: what was written between two checkpoints stands twice or is lost, a half-written file
    is taken for a whole one, the lock outlives its process."""
    moments, kills = random.Random(0), 0
    for n in range(20):  # one moment in every twentieth of the run, so that every phase is met
        cfg = config(f"killed-{n}", "--save_every", "2")
        kills += run_and_kill(cfg, n * len(whole[0]) // 20, seconds_a_record * moments.random())
        rloop.run_method(cfg)
        assert outcome(cfg) == whole, n
    assert kills >= 16  # on a busy machine the last moments may come after the end


def test_a_run_that_is_killed_again_and_again_comes_to_its_end(config, whole, seconds_a_record):
    """Fault: continuing twice from one checkpoint, or a first checkpoint that never comes."""
    moments, cfg, kills = random.Random(1), config("killed", "--save_every", "2"), 0
    while True:
        records = num_records(cfg) + moments.randrange(4)
        if not run_and_kill(cfg, records, seconds_a_record * moments.random()):
            break
        kills += 1
        assert kills < 60
    assert kills >= 2
    assert outcome(cfg) == whole


# ---- stops


def call_on(monkeypatch, name: str, call: int, action) -> list[str]:
    """Do the action at the end of one call of rloop.NAME. Returns a list to which the names of
    finished calls of sample_groups, evaluate and rft_step are added."""
    finished: list[str] = []

    def wrap(wrapped: str):
        real = getattr(rloop, wrapped)

        def spy(*args, **kwargs):
            result = real(*args, **kwargs)
            finished.append(wrapped)
            if wrapped == name and finished.count(name) == call:
                action()
            return result

        monkeypatch.setattr(rloop, wrapped, spy)

    for wrapped in ("sample_groups", "evaluate", "rft_step"):
        wrap(wrapped)
    return finished


def request_stop() -> None:
    parallel._stop = True


def run_until_stopped(cfg) -> None:
    with pytest.raises(Stopped):
        rloop.run_method(cfg)
    parallel._stop = False


@pytest.mark.parametrize(
    ("name", "call"),
    [
        *(("evaluate", 1), ("evaluate", 2), ("evaluate", 3)),  # base, rl, rft
        *(("sample_groups", 1), ("sample_groups", 2), ("sample_groups", 3)),
        *(("rft_step", 1), ("rft_step", 2)),
    ],
)
def test_stopped_run_does_nothing_twice(config, whole, monkeypatch, name, call):
    """Fault: a run that is asked to stop in an evaluation, an RL step or RFT loses or repeats what
    it did since its last checkpoint (hours, with a large model), does not stop, or first samples
    for one more RL step."""

    def stop():
        request_stop()
        asked.append(len(done))

    asked: list[int] = []
    done = call_on(monkeypatch, name, call, stop)
    cfg = config("run", "--save_every", "100")
    run_until_stopped(cfg)
    at_stop = len(done)
    assert "sample_groups" not in done[asked[0] :]
    rloop.run_method(cfg)
    assert at_stop < len(done) == len([r for r in whole[0] if r["phase"] != "filter"])
    assert outcome(cfg) == whole


@pytest.mark.parametrize("call", [1, 2, 3])
def test_stop_in_a_long_step_drops_it_whole(config, whole, monkeypatch, call):
    """Fault: after hours of sampling a stopped run still waits for the update; or the dropped step
    leaves trajectories, a record or its place in the stream of problems behind."""
    monkeypatch.setattr(rloop, "LONG_STEP_S", 0.0)
    done = call_on(monkeypatch, "sample_groups", call, request_stop)
    cfg = config("run", "--save_every", "100")
    run_until_stopped(cfg)
    assert done.count("sample_groups") == call
    run = Run(cfg)
    records = [r for r in run.lines("metrics.jsonl") if r["phase"] == "rl"]
    assert (run.progress.iteration, run.progress.step) == divmod(call - 1, 2)
    assert run.rl_steps == len(records) == call - 1
    position = 4 * len(records)  # one round of 4 problems a step
    assert run.progress.problems_drawn == position
    assert run.progress.num_trajectories == 8 * position
    trajectories = list(run.lines("trajectories/iteration_1.jsonl"))
    trajectories += run.lines("trajectories/iteration_2.jsonl")
    assert len(trajectories) == 8 * position
    rloop.run_method(cfg)
    assert outcome(cfg) == whole


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_second_ctrl_c_ends_at_once(config, whole, monkeypatch, capsys, first):
    """Fault: a second Ctrl-C still waits for the end of the step, shows a traceback, or loses more
    than the steps behind the last checkpoint."""
    survived = []

    def press():
        os.kill(os.getpid(), first)
        survived.append("first")
        os.kill(os.getpid(), signal.SIGINT)
        survived.append("second")

    call_on(monkeypatch, "sample_groups", 4, press)
    cfg = config()
    assert rloop.main(["--config", str(TOML), *FEW, "--run_dir", cfg.run_dir]) == 130
    assert survived == ["first"]
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith("stopped; the same command continues from the last checkpoint")
    parallel._stop = False
    assert Run(cfg).rl_steps == 3
    rloop.run_method(cfg)
    assert outcome(cfg) == whole


def test_kill_inside_an_evaluation_keeps_the_checkpoint_before_it(config, whole, monkeypatch):
    """Fault: the checkpoint of a step is written after its evaluation, so that a run that dies
    there does the step again; or the evaluation is left out when it continues."""

    def die():
        raise KeyboardInterrupt

    done = call_on(monkeypatch, "evaluate", 2, die)  # it is recorded, and the record cut off
    cfg = config("run", "--save_every", "2")
    with pytest.raises(KeyboardInterrupt):
        rloop.run_method(cfg)
    run = Run(cfg)
    assert run.rl_steps == 2 and run.evaluation_pending(2)
    rloop.run_method(cfg)
    assert done.count("sample_groups") == 4
    assert outcome(cfg) == whole


def test_sigterm_saves_the_last_step_and_the_run_goes_on(config):
    """Fault: a pre-empted run loses the steps since its last checkpoint, or does not stop."""
    options = ("--rl.steps", "20", "--save_every", "1000", "--eval.every", "1000")
    options += ("--iterations", "1", "--method", "rl", "--rl.problems_per_step", "2")
    unstopped, stopped = config("unstopped", *options), config("stopped", *options)
    command = [sys.executable, "rloop.py", "--config", str(TOML), *FEW, *options]
    command += ["--run_dir", stopped.run_dir]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    while "step   3/20" not in process.stdout.readline():
        assert process.poll() is None
    start = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert time.perf_counter() - start < 10
    assert process.returncode == 130
    assert "stopped; the same command continues" in errors
    assert 3 <= Run(stopped).rl_steps < 20
    rloop.run_method(unstopped)
    rloop.run_method(stopped)
    for file in ("trajectories/iteration_1.jsonl", "policies/rl_1/model.safetensors"):
        got, expected = (Path(cfg.run_dir) / file for cfg in (stopped, unstopped))
        assert got.read_bytes() == expected.read_bytes()


# ---- damage


def interrupted_run(cfg, monkeypatch) -> Run:
    """The run, interrupted in the second RL step of iteration 2, with two checkpoints."""

    def die():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        call_on(patch, "sample_groups", 4, die)
        with pytest.raises(KeyboardInterrupt):
            rloop.run_method(cfg)
    run = Run(cfg)
    assert run.rl_steps == 3 and len(list(run.path.glob("checkpoints/*"))) == 2
    return run


@pytest.mark.parametrize("how", ["cut", "gone"])
@pytest.mark.parametrize("file", [TENSORS, "state.json", "../../trajectories/iteration_2.jsonl"])
def test_damaged_checkpoint_is_named_and_the_older_one_continues(
    config, whole, monkeypatch, file, how
):
    """Fault: a run continues from half a checkpoint, dies of it with a traceback, changes or
    deletes what the older one needs, or starts again over its own files."""
    cfg = config()
    run = interrupted_run(cfg, monkeypatch)
    target = run.checkpoint / file
    if how == "gone":
        target.unlink()
    else:
        target.write_bytes(target.read_bytes()[:-20])
    before = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match=f"{run.checkpoint} is damaged: .*") as error:
        Run(cfg)
    assert file == "state.json" or target.name in str(error.value)
    assert str(error.value).endswith(f"remove {run.checkpoint}")
    assert {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()} == before
    shutil.rmtree(run.checkpoint)
    rloop.run_method(cfg)
    assert outcome(cfg) == whole


@pytest.mark.parametrize("name", ["signal", "KeyboardInterrupt"])
def test_stop_while_a_checkpoint_is_written_is_a_stop(config, monkeypatch, capsys, whole, name):
    """Fault: SIGTERM, or two Ctrl-C, while a checkpoint is written end with an error without a
    reason, or damage the run."""
    numbers = [signal.SIGTERM] if name == "signal" else [signal.SIGINT, signal.SIGINT]
    real, calls = dcp.HuggingFaceStorageWriter.write_data, []

    def interrupted(writer, plan, planner):
        calls.append(None)
        for number in numbers if len(calls) == 3 else ():
            os.kill(os.getpid(), number)
            time.sleep(0.01)  # the handler runs
        return real(writer, plan, planner)

    monkeypatch.setattr(dcp.HuggingFaceStorageWriter, "write_data", interrupted)
    cfg = config()
    command = ["--config", str(TOML), *FEW, "--run_dir", cfg.run_dir]
    assert rloop.main(command) == 130
    assert len(calls) == (3 if name == "KeyboardInterrupt" else 4)
    assert "stopped; the same command continues" in capsys.readouterr().err
    assert rloop.main(command) == 0
    assert outcome(cfg) == whole


def test_fault_in_saving_is_no_full_disk(config):
    """Fault: a mistake of the program is shown as an error of the user, without its traceback."""
    run = Run(config())
    policy = rloop.load_policy(run.cfg)
    with pytest.raises(RuntimeError, match="share memory"):
        run.save(policy, None, policy.state_dict())


def test_data_file_that_changed_is_named(config, tmp_path):
    """Fault: a run continues on other data than it began with, in silence."""
    games = rloop.load_data(config())
    for name, problems in zip(("train", "eval"), games, strict=True):
        lines = [json.dumps({"nums": p.numbers, "target": p.target}) for p in problems]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    files = [("--data.train", "train.jsonl"), ("--data.eval", "eval.jsonl")]
    cfg = config("run", *(word for key, file in files for word in (key, str(tmp_path / file))))
    run = Run(cfg)
    run.save(rloop.load_policy(cfg))
    assert Run(cfg).progress == run.progress
    for _, name in files:
        text = (tmp_path / name).read_text()
        for change in (text + "\n", None):
            (tmp_path / name).unlink() if change is None else (tmp_path / name).write_text(change)
            with pytest.raises(UserError, match=f"other data files; differing keys: .*{name}"):
                Run(cfg)
        (tmp_path / name).write_text(text)
    assert Run(cfg).progress == run.progress


def main_on_a_full_disk(cfg, method: str, limit: int, call: int, errors: Path) -> None:
    """rloop.main, in whose given call of Run.METHOD no file can grow beyond limit bytes. (A limit
    on the size of a file stands for the full disk.) Its exit code becomes the process's."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    real, calls = getattr(Run, method), 0

    def limited(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return real(*args, **kwargs)

    setattr(Run, method, limited)
    with errors.open("w") as stream, contextlib.redirect_stderr(stream):
        code = rloop.main(["--config", str(TOML), *FEW, "--run_dir", cfg.run_dir])
    os._exit(code)


@pytest.mark.parametrize(
    ("method", "limit", "call", "said", "last_step"),
    [
        # the first checkpoint has no optimizer and fits; the second does not
        ("save", 2_000_000, 2, "000001: cannot be written", 0),
        ("export", 100_000, 1, "policies/rl_1: cannot be written", 2),
        ("commit", 5_000, 3, "trajectories/iteration_1.jsonl: cannot be written", 1),
    ],
)
def test_full_disk_leaves_the_last_checkpoint(
    config, whole, tmp_path, method, limit, call, said, last_step
):
    """Fault: a file that does not fit destroys the checkpoint before it, or half of it is taken for
    whole; a full disk shows a traceback."""
    cfg, errors = config(), tmp_path / "errors"
    process = in_child(main_on_a_full_disk, cfg, method, limit, call, errors)
    process.join(120)
    assert process.exitcode == 1, errors.read_text()
    error = errors.read_text().splitlines()[-1]
    assert error.startswith("error: ") and said in error and "File too large" in error
    if method == "save":
        assert [p.name for p in (tmp_path / "run/checkpoints").glob("0*")] == ["000000"]
    assert Run(cfg).rl_steps == last_step
    rloop.run_method(cfg)
    assert outcome(cfg) == whole


# ---- TensorBoard and W&B


def logged(cfg) -> dict[str, list[tuple[int, float]]]:
    """Curve -> (x, value) of its points, as metrics.jsonl has them."""
    curves: dict[str, list] = {}
    for line in (Path(cfg.run_dir) / "metrics.jsonl").read_text().splitlines():
        r = json.loads(line)
        end = {"rft": f"/{r['iteration'] + 1}", "eval": f"/{r.get('policy')}"}.get(r["phase"], "")
        for key, value in r.items():
            if "/" in key and key != "filter/outcome":
                x = r["step"] if r["phase"] == "rft" else r["rl_steps"]
                curves.setdefault(key + end, []).append((x, pytest.approx(value)))
    return curves


def read_tensorboard(cfg) -> dict[str, list[tuple[int, float]]]:
    folder = str(Path(cfg.run_dir) / "tensorboard")
    events = event_accumulator.EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def test_tensorboard_has_every_record_once(config, whole):
    """Fault: a metric is missing or at another x, the steps that a killed run does again stand
    there twice, or the metrics of before the kill are lost."""
    cfg = config("run", "--logging", '["tensorboard"]', "--save_every", "2")
    assert run_and_kill(cfg, len(whole[0]) * 2 // 3, 0.0)
    in_child(rloop.run_method, cfg).join(120)  # to its end
    assert outcome(cfg) == whole
    curves = logged(cfg)
    assert read_tensorboard(cfg) == curves
    assert [x for x, _ in curves["rl/reward_mean"]] == [1, 2, 3, 4]
    assert {"rft/loss/1", "rft/loss/2", "eval/avg@2/base", "eval/avg@2/rl"} <= curves.keys()


def test_logging_may_change_when_a_run_continues(config, whole):
    """Fault: TensorBoard cannot be turned on for a run that has begun, or has only half of it."""
    cfg = config("run", "--save_every", "2")
    assert run_and_kill(cfg, len(whole[0]) // 2, 0.0)
    cfg = config("run", "--save_every", "2", "--logging", '["tensorboard"]')
    rloop.run_method(cfg)
    assert outcome(cfg) == whole and read_tensorboard(cfg) == logged(cfg)


def test_run_that_was_out_of_memory_goes_on_with_less(config, whole, monkeypatch, capsys):
    """Fault: running out of GPU memory shows a traceback without a remedy, or costs the whole run:
    a smaller micro-batch is refused as another config."""
    cfg, update, count = config("run"), rloop.update, iter(range(100))

    def update_thrice(*args):
        if next(count) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.32 GiB.")
        return update(*args)

    monkeypatch.setattr(rloop, "update", update_thrice)
    command = ["--config", str(TOML), *FEW, "--run_dir", cfg.run_dir]
    assert rloop.main(command) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: CUDA out of memory.") and "compute.max_rows" in error
    done = num_records(cfg)
    less = ["--compute.micro_batch_tokens", "64", "--compute.max_rows", "4"]
    assert rloop.main([*command, *less, "--compute.checkpoint_activations", "true"]) == 0
    assert "continuing after RL step 3" in capsys.readouterr().out and num_records(cfg) > done
    assert [r["phase"] for r in outcome(cfg)[0]] == [r["phase"] for r in whole[0]]
    assert rloop.main([*command, "--rl.lr", "1e-3"]) == 1
    assert "differing keys: rl.lr. Choose" in capsys.readouterr().err


def test_wandb_continues_its_run(config, whole, monkeypatch):
    """Fault: W&B has other metrics than metrics.jsonl, or a run that continues is another run
    there."""
    calls = []

    class Session:
        def __init__(self, project, name, dir, id, resume):
            calls.append((name, id, resume))
            Path(dir, f"wandb/offline-run-20260101_0000{len(calls):02d}-abc123").mkdir(parents=True)

        def define_metric(self, name, step_metric):
            assert (name, step_metric) == ("*", "step")

        def log(self, values):
            step = values.pop("step")
            for key, value in values.items():
                curves.setdefault(key, []).append((step, value))

    wandb = types.ModuleType("wandb")
    wandb.init = Session
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    curves: dict[str, list] = {}
    cfg = config("run", "--logging", '["wandb"]')
    Run(cfg)  # stopped before its first step
    rloop.run_method(cfg)
    assert outcome(cfg) == whole and curves == logged(cfg)
    Run(cfg)  # finished: nothing to log
    assert calls == [("run", None, "allow"), ("run", "abc123", "allow")]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_missing_package_is_named_before_the_first_step(config, monkeypatch, capsys, name):
    """Fault: a traceback, or an error after the base policy was evaluated for an hour."""
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    cfg = config("run")
    command = ["--config", str(TOML), *FEW, "--run_dir", cfg.run_dir, "--logging", f'["{name}"]']
    assert rloop.main(command) == 1
    screen = capsys.readouterr()
    assert screen.err.startswith("error: logging: ") and screen.err.count("\n") == 1
    assert f"pip install {name}" in screen.err and "eval base" not in screen.out


# ---- the console


def console_line(responses) -> list[str]:
    """The lines of an evaluation with groups of (problem, response, reward, finished)."""
    record = {"policy": "rl", "eval/num_samples": 2, "eval/truncated_share": 0.0}
    record |= {"eval/avg@2": 0.5, "eval/pass@2": 0.75}
    names = ("problem", "response", "reward", "finished")
    groups = [
        [types.SimpleNamespace(**dict(zip(names, r, strict=True))) for r in group]
        for group in responses
    ]
    first, *others = evaluation_line(record, 7, groups, 1.0).split("\n")
    assert first == "eval rl   after 7 RL steps:  avg@2 0.5000  pass@2 0.7500"
    return others


def test_evaluation_shows_one_right_and_one_wrong_response():
    """Fault: other problems are shown each time, a wrong response as a right one, or a response of
    nobody where all are right."""
    wrong, right = ("p1", "12", 0.0, True), ("p2", "24", 1.0, True)
    assert console_line([[wrong, wrong], [wrong, right], [right, ("p3", "0", 0.0, True)]]) == [
        "  right  'p2': '24'",
        "  wrong  'p1': '12'",
    ]
    assert console_line([[right]]) == ["  right  'p2': '24'"]
    assert console_line([[("p1", "1", 0.0, False)]]) == ["  wrong  'p1': '1', truncated"]
    assert console_line([]) == []


def test_response_cannot_take_over_the_terminal(monkeypatch):
    """Fault: a response moves the cursor, reorders the line, fills the screen, or ends the run on a
    terminal that has not its letters."""
    hostile = "a\n\x1b[2J\r\x07\u202e\ud800 π\u00a0"
    (line,) = console_line([[(hostile, hostile, 0.0, True)]])
    shown = r"'a\n\x1b[2J\r\x07\u202e\ud800 π\xa0'"
    assert line == f"  wrong  {shown}: {shown}"
    (line,) = console_line([[("p", "x" * 10**6 + "y", 0.0, True)]])
    assert line == f"  wrong  'p': '{'x' * 50} ... {'x' * 49}y'"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    (line,) = console_line([[("π", "√", 0.0, True)]])
    assert line == r"  wrong  '\u03c0': '\u221a'"


# ---- the directory


def test_two_runs_in_one_directory(config):
    """Fault: two processes write into one run directory."""
    cfg, opened = config(), multiprocessing.get_context("fork").Event()

    def hold():
        run = Run(cfg)
        opened.set()
        while run:  # the lock lives as long as the run
            time.sleep(1)

    process = in_child(hold)
    assert opened.wait(30)
    with pytest.raises(UserError, match="another process runs in this directory"):
        Run(cfg)
    process.kill()
    process.join()
    assert Run(cfg).path.is_dir()


@pytest.mark.parametrize("parent", ["file", "/proc/read-only"])
def test_run_directory_that_cannot_be_made(tmp_path, capsys, parent):
    """Fault: a traceback instead of an error that names the path, when a file is in the way or the
    place is read-only."""
    (tmp_path / "file").write_text("")
    target = str(tmp_path / parent / "run")
    assert rloop.main(["--config", str(TOML), *FEW, "--run_dir", target]) == 1
    assert parent in capsys.readouterr().err


def test_config_json_that_is_no_json_is_an_error_of_the_user(config):
    """Fault: a half-edited config.json ends in a traceback, or the run starts over it."""
    cfg = config("run")
    path = Path(cfg.run_dir)
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"run_dir": ')
    with pytest.raises(UserError, match="config.json: not valid JSON"):
        Run(cfg)
    assert (path / "config.json").read_text() == '{"run_dir": '
