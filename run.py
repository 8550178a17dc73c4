"""The run directory: what a run writes, what it prints, and where a stopped run continues.
docs/run_directory.md lists its files.

A step counts once a checkpoint follows it: when a run continues, lines written after its last
checkpoint are cut off, and those steps are run again. Every method that writes or reads is a
collective (scale/parallel.py), but for lines: the first process handles the files, but each process
writes its own trajectories, and its own shards of a checkpoint's tensors.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from tqdm import tqdm

import hf
from config import Config, UserError, differing_keys, read_json, write_json
from scale import parallel

MAX_CHECKPOINTS = 2
# in a run that continues: where the metrics go, and what takes memory and only rounds otherwise
MEMORY = ("max_rows", "micro_batch_tokens", "checkpoint_activations")
MAY_CHANGE = ("logging", *(f"compute.{name}" for name in MEMORY))
LINE_FILES = ("metrics.jsonl", "evaluations.jsonl", "trajectories/*.jsonl", "experts/*.jsonl")
# one process needs no process group
warnings.filterwarnings("ignore", "torch.distributed is disabled", module="torch.distributed")


class Stopped(Exception):
    """The run was asked to stop and has written a checkpoint."""


@dataclass(frozen=True)
class Progress:
    """Where the run stands; only Run replaces it. With the seed it decides all random draws."""

    iteration: int = 0  # finished iterations
    step: int = 0  # finished RL steps of the current iteration
    rft_step: int = 0  # finished RFT steps of it; above 0, exploring and filtering are done
    problems_drawn: int = 0  # position in the endless, seeded stream of problems
    successes: dict[str, int] = field(default_factory=dict)  # in the phase, where rl.favor_hard
    num_trajectories: int = 0  # sampled in training
    seconds: float = 0.0  # wall time of all sessions
    cut_off: bool = False  # it was said that nearly all responses are cut off
    finished: bool = False


class Run:
    """Opens a new run directory, or a stopped run of the same config at its last checkpoint.

    Raises UserError when the directory belongs to another config (naming the keys that differ) or
    to another process, or when the checkpoint is damaged.
    """

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.path = Path(cfg.run_dir)
        self.progress, self.checkpoint = parallel.on_main(self._open)
        self._start = time.perf_counter() - self.progress.seconds
        if self.progress.finished:
            print(f"{self.path} is finished; this is its result. A new run needs another --run_dir")
        elif self.checkpoint is not None:
            print(f"{self.path}: continuing after RL step {self.rl_steps}")
        self._tensorboard = self._wandb = None
        if not self.progress.finished:
            parallel.on_main(self._open_logs)

    def _open(self) -> tuple[Progress, Path | None]:
        """Lock the directory, compare its config with ours, and truncate the line files to their
        sizes at the last checkpoint. Returns the progress and that checkpoint."""
        with _disk(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / "lock").open("a")
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released with the process
        except BlockingIOError:
            raise UserError(f"{self.path}: another process runs in this directory") from None
        config_file, checkpoints = self.path / "config.json", self._checkpoints()
        stored = read_json(config_file)
        if "run_dir" not in stored and (stored or self._line_files()):
            raise UserError(f"{self.path} holds files of no run. Choose another --run_dir")
        data, module = self.cfg.data, self.cfg.data.reward.partition(":")[0]
        names = (data.train, data.eval, f"{module.replace('.', '/')}.py")
        files = [name for name in names if Path(name).is_file()]
        hashes = {name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in files}
        config = dataclasses.asdict(self.cfg) | {"sha256": hashes}
        keys = [key for key in differing_keys(stored, config) if key not in MAY_CHANGE]
        if checkpoints and keys:
            raise UserError(
                f"{self.path} holds a run of another config or other data files; differing keys: "
                f"{', '.join(keys)}. Choose another --run_dir"
            )
        with _disk(config_file):
            write_json(config_file, config)
        progress, checkpoint, sizes = Progress(), None, {}
        if checkpoints:
            checkpoint = checkpoints[-1]
            progress, sizes = self._read_checkpoint(checkpoint)
        for file in self._line_files():
            os.truncate(file, sizes.get(str(file.relative_to(self.path)), 0))
        return progress, checkpoint

    def _open_logs(self) -> None:
        """Open what cfg.logging names. Raises UserError for a missing package."""
        try:
            if "tensorboard" in self.cfg.logging:
                from torch.utils.tensorboard import SummaryWriter

                shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
                self._tensorboard = SummaryWriter(self.path / "tensorboard")
                for record in self.lines("metrics.jsonl"):  # anew, so that no step is there twice
                    self._log(record)
            if "wandb" in self.cfg.logging:
                import wandb

                id_ = next((d.name.split("-")[-1] for d in self.path.glob("wandb/*run-*-*")), None)
                options = {"dir": self.path, "id": id_, "resume": "allow"}
                self._wandb = wandb.init(project="rloop", name=self.path.name, **options)
                self._wandb.define_metric("*", step_metric="step")
        except ImportError as error:
            raise UserError(f"logging: {error}; pip install {' '.join(self.cfg.logging)}") from None

    @property
    def rl_steps(self) -> int:
        """Finished RL steps of the whole run."""
        return self.progress.iteration * self.cfg.rl.steps + self.progress.step

    def commit(
        self, record: dict, line: str | None = None, trajectories: list[list] = (), **progress
    ) -> None:
        """The one place that a step writes: its trajectories, its record in metrics.jsonl, its
        console line, and the progress it made (fields of Progress)."""
        records = [vars(trajectory) for group in trajectories for trajectory in group]
        total = self.progress.num_trajectories + parallel.total({"new": len(records)})["new"]
        warning = truncation_warning(record.get("rl/truncated_share", 0.0))
        if warning and not self.progress.cut_off:  # once a run; an evaluation says it each time
            line, progress = (line or "") + warning, progress | {"cut_off": True}
        if trajectories and self.cfg.rl.favor_hard:
            least, known = self.cfg.select.min_reward, Counter(self.progress.successes)
            right = Counter(r["problem"] for r in records if r["reward"] >= least)
            progress["successes"] = dict(sum(parallel.gather(lambda: right), known))
        self.progress = dataclasses.replace(self.progress, num_trajectories=total, **progress)
        iteration = self.progress.iteration
        if trajectories:
            self.append(f"trajectories/iteration_{iteration + 1}.jsonl", records, own=True)
        place = {"iteration": iteration, "rl_steps": self.rl_steps, "num_trajectories": total}
        record = record | place | {"time/total_s": round(time.perf_counter() - self._start, 3)}
        self.append("metrics.jsonl", [record])
        self._log(record)
        if line is not None:
            tqdm.write(line)

    def _log(self, record: dict) -> None:
        """Send the measures of a record to TensorBoard and W&B, where they are open. Every policy
        that is evaluated and every fine-tuning has its own curves; x is the RL or the RFT step."""
        x = record["step" if record["phase"] == "rft" else "rl_steps"]
        curves = {"eval": f"/{record.get('policy')}", "rft": f"/{record['iteration'] + 1}"}
        end = curves.get(record["phase"], "")
        values = {k + end: v for k, v in record.items() if "/" in k and not isinstance(v, str)}
        if self._tensorboard is not None:
            for key, value in values.items():
                self._tensorboard.add_scalar(key, value, x)
        if self._wandb is not None:
            self._wandb.log(values | {"step": x})

    def append(self, name: str, records: list[dict], own: bool = False) -> None:
        """Append the first process's records to a .jsonl file of the run directory; own: those of
        every process, of all but the first to a file of its own, NAME.rankR.jsonl."""
        if own and parallel.rank() > 0:
            name = name.replace(".jsonl", f".rank{parallel.rank():05}.jsonl")

        def write() -> None:
            file = self.path / name
            with _disk(file):
                file.parent.mkdir(exist_ok=True)
                with file.open("a", encoding="utf-8") as stream:
                    stream.writelines(json.dumps(record) + "\n" for record in records)

        (parallel.gather if own else parallel.on_main)(write)

    def shards(self, name: str) -> list[str]:
        """This process's share of the files that all processes have appended to as NAME."""
        found = self.path.glob(name.replace(".jsonl", ".*jsonl"))
        files = parallel.on_main(lambda: sorted(str(f.relative_to(self.path)) for f in found))
        return files[parallel.rank() :: parallel.num_ranks()]

    def lines(self, name: str) -> Iterator[dict]:
        """Records of a .jsonl file, one by one; none if it does not exist."""
        file = self.path / name
        if file.exists():
            with file.open(encoding="utf-8") as stream:
                yield from map(json.loads, stream)

    def read(self, name: str) -> list[dict]:
        """All records of a .jsonl file, the same in every process."""
        return parallel.on_main(lambda: list(self.lines(name)))

    def export(self, policy: nn.Module, name: str) -> None:
        """Write the policy with its tokenizer as the Hugging Face directory RUN/policies/NAME, and
        its adapters, if it has any, as the PEFT directory RUN/adapters/NAME."""
        state = parallel.full_state(policy.weights())
        path = self.path / "policies" / name
        with _disk(path):
            parallel.on_main(lambda: hf.save_model(policy, path, state))
            policy.save_adapters(self.path / "adapters" / name)

    def finish_iteration(self, policy: nn.Module) -> None:
        """Export theta_{i+1}, and start the next iteration."""
        done = self.progress.iteration + 1
        self.export(policy, f"theta_{done}")
        start = {"step": 0, "rft_step": 0, "successes": {}}
        self.progress = dataclasses.replace(self.progress, iteration=done, **start)
        self.save(policy)

    def finish(self, policy: nn.Module) -> None:
        self.progress = dataclasses.replace(self.progress, finished=True)
        self.save(policy)

    def evaluation_pending(self, num_steps: int) -> bool:
        """Whether an evaluation is due after the last RL step (of num_steps) and not yet done."""
        now = self.progress
        if now.step == 0 or (now.step % self.cfg.eval.every and now.step < num_steps):
            return False
        done = self.read("evaluations.jsonl")  # processes that disagree would wait for ever
        return not any(e["policy"] == "rl" and e["rl_steps"] == self.rl_steps for e in done)

    def checkpoint_if(self, due: bool, policy, optimizer, theta_i=None) -> None:
        """Write a checkpoint if one is due or a stop is requested. Raises Stopped for a stop."""
        stop = parallel.stop_requested()
        if due or stop:
            self.save(policy, optimizer, theta_i)
        if stop:
            raise Stopped

    def save(self, policy: nn.Module, optimizer=None, theta_i=None) -> None:
        """Write a checkpoint under a temporary name and rename it: the weights, the optimizer,
        theta_i (name -> tensor) and the progress. Raises UserError for a full disk."""
        seconds = parallel.on_main(lambda: time.perf_counter() - self._start)
        self.progress = dataclasses.replace(self.progress, seconds=seconds)
        existing = parallel.on_main(self._checkpoints)
        number = int(existing[-1].name) + 1 if existing else 0
        temporary = self.path / "checkpoints" / "tmp"
        target = self.path / "checkpoints" / f"{number:06d}"
        state = _named("policy", policy.state_dict()) | _named("theta_i", theta_i or {})
        if optimizer is not None:
            for index, entry in optimizer.state_dict()["state"].items():
                state |= _named(f"optimizer.{index}", entry)

        def complete() -> None:
            sizes = {str(f.relative_to(self.path)): f.stat().st_size for f in self._line_files()}
            for file in temporary.iterdir():
                sizes[f"checkpoints/{target.name}/{file.name}"] = file.stat().st_size
            state = {"progress": dataclasses.asdict(self.progress), "sizes": sizes}
            write_json(temporary / "state.json", state)
            os.replace(temporary, target)
            for old in existing[: len(existing) + 1 - MAX_CHECKPOINTS]:
                shutil.rmtree(old)

        with _disk(target):
            parallel.on_main(lambda: shutil.rmtree(temporary, ignore_errors=True))
            writer = dcp.HuggingFaceStorageWriter(temporary, save_distributed=True)
            dcp.save(state, storage_writer=writer)
            parallel.on_main(complete)
        self.checkpoint = target

    def load_policy(self, policy: nn.Module) -> None:
        """Fill the policy, sharded or not, with the last checkpoint's weights."""
        state = policy.state_dict()
        self._load("policy", state)
        policy.load_state_dict(state)

    def load_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Fill the optimizer with the state in the last checkpoint."""
        reader, state = dcp.HuggingFaceStorageReader(self.checkpoint), {}
        stored = reader.read_metadata().state_dict_metadata
        for index, parameter in enumerate(optimizer.param_groups[0]["params"]):
            if f"optimizer.{index}.step" in stored:  # none was before the first update
                moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": torch.zeros(())} | moments
                state |= _named(f"{index}", optimizer.state[parameter])
        self._load("optimizer", state)

    def phase_start(self, policy: nn.Module) -> dict[str, Tensor]:
        """theta_i, the weights that the iteration starts from: the policy's, or the checkpoint's
        if the run was stopped in the RL phase. If it was stopped in RFT: the half-tuned policy's,
        from which RFT continues."""
        state = {name: tensor.detach().clone() for name, tensor in policy.state_dict().items()}
        if self.progress.step > 0 and self.progress.rft_step == 0:
            self._load("theta_i", state)
        return state

    def _load(self, part: str, state: dict[str, Tensor]) -> None:
        """Fill the tensors with the checkpoint's of "policy", "theta_i" or "optimizer"."""
        reader = dcp.HuggingFaceStorageReader(self.checkpoint)
        dcp.load(_named(part, state), storage_reader=reader)

    def _read_checkpoint(self, checkpoint: Path) -> tuple[Progress, dict[str, int]]:
        """The progress and the files' sizes. Raises UserError if a file lacks bytes."""
        remedy = f"to continue from the checkpoint before it, remove {checkpoint}"
        try:
            state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
            for name, size in state["sizes"].items():
                if (found := (self.path / name).stat().st_size) < size:
                    raise ValueError(f"{self.path / name} has {found} bytes, expected {size}")
        except (OSError, ValueError) as error:
            raise UserError(f"{checkpoint} is damaged: {error}; {remedy}") from None
        return Progress(**state["progress"]), state["sizes"]

    def _checkpoints(self) -> list[Path]:
        return sorted(p for p in (self.path / "checkpoints").glob("*") if p.name.isdigit())

    def _line_files(self) -> list[Path]:
        return sorted(file for pattern in LINE_FILES for file in self.path.glob(pattern))


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Raise UserError for a full or read-only disk."""
    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        if isinstance(error, CheckpointException):  # what happened in one of the processes
            error = next(iter(error.failures.values()))[0]
        if not isinstance(error, (OSError, SafetensorError)):  # a second Ctrl-C, a fault
            raise error from None
        raise UserError(f"{path}: cannot be written: {error}") from error


def _named(part: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{part}.{name}": tensor for name, tensor in tensors.items()}


# ---- console


def step_line(r: dict, iteration: int, num_steps: int) -> str:
    """The console line of an RL step's record."""
    line = f"RL {iteration + 1} step {r['step']:>3}/{num_steps}"
    line += f"  reward {r['rl/reward_mean']:.3f}  flat {r['rl/flat_share']:.2f}"
    line += f"  len {r['rl/len_mean_tok']:.1f}"
    if "rl/loss" in r:
        line += f"  entropy {r['rl/entropy_mean_nat']:.3f}  grad {r['rl/grad_norm']:.3f}"
        line += f"  clip {r['rl/clip_low_share']:.4f}/{r['rl/clip_high_share']:.4f}"
        line += f"  gap {r['rl/logp_gap_max_nat']:.0e}"
    seconds = r["time/rollout_s"] + r["time/verify_s"] + r["time/update_s"]
    return f"{line}  {seconds:.2f}s"


def truncation_warning(truncated_share: float) -> str:
    if truncated_share <= 0.9:
        return ""
    remedy = "raise sampling.max_new_tokens, or check data.prompt, data.chat_template and the EOS"
    return f"\n  nearly all responses are cut off: {remedy}"


def filter_line(r: dict, iteration: int) -> str:
    line = f"filter {iteration + 1}: {r['filter/num_correct']} correct of "
    line += f"{r['filter/num_trajectories']} trajectories, "
    line += f"{r['filter/num_solved_problems']} problems solved; "
    line += f"{r['filter/num_experts']} experts on {r['filter/num_hard_problems']} hard problems"
    if r["filter/num_experts"] == 0:
        line += f"\nno hard problem was solved: no RFT, theta_{iteration + 1} = theta_{iteration}"
    return line


def evaluation_line(r: dict, rl_steps: int, groups: list[list], min_reward: float) -> str:
    """The console line of an evaluation's record, with its first right and first wrong response."""
    line = f"eval {r['policy']:<4} after {rl_steps} RL steps:"
    for key in (f"avg@{r['eval/num_samples']}", f"pass@{r['eval/num_samples']}"):
        line += f"  {key} {r[f'eval/{key}']:.4f}"
    line += truncation_warning(r["eval/truncated_share"])
    for name, is_right in (("right", True), ("wrong", False)):
        for t in [t for group in groups for t in group if (t.reward >= min_reward) == is_right][:1]:
            line += f"\n  {name}  {quoted(t.problem, 40)}: {quoted(t.response, 100)}"
            line += "" if t.finished else ", truncated"
    return line


def quoted(text: str, width: int) -> str:
    """Foreign text in quotes, shortened in the middle, its control characters escaped."""
    if len(text) > width:
        text = f"{text[: width // 2]} ... {text[-width // 2 :]}"
    encoding = sys.stdout.encoding or "ascii"
    return repr(text).encode(encoding, "backslashreplace").decode(encoding)


def progress_bar(steps: range, name: str) -> Iterator[int]:
    """The steps, with a bar on the terminal of the first process."""
    disable = None if parallel.rank() == 0 else True  # None: a bar on a terminal only
    return tqdm(steps, name, steps.stop, leave=False, initial=steps.start, disable=disable)
