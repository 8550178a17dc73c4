"""The run directory: what is on disk, what is printed, and where an interrupted run goes on.

RUN/config.json            the resolved config
RUN/metrics.jsonl          flat records of RL steps, filters, RFT steps and evaluations
RUN/evaluations.jsonl      correct answers per held-out problem, one line an evaluation
RUN/trajectories/*.jsonl   every sampled trajectory, one file an iteration
RUN/experts/*.jsonl        what RFT was trained on
RUN/policies/NAME/         Hugging Face directories: rl_1, theta_1, rl_2, theta_2, ...
RUN/checkpoints/STEP/      the last two states to continue from, each with the sizes and hashes of its files
RUN/lock                   held by the process that runs here
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from config import Config, config_dict, differing_keys

MAX_CHECKPOINTS = 2


@dataclass
class Progress:
    """Where the run stands. A step counts once its files and its checkpoint are written."""

    iteration: int = 0  # finished iterations
    step: int = 0  # finished RL steps of the current iteration
    rl_steps: int = 0  # finished RL steps of the whole run
    problems_drawn: int = 0  # position in the endless, seeded stream of problems
    num_trajectories: int = 0  # sampled in training so far
    seconds: float = 0.0  # wall time so far, over all sittings
    finished: bool = False


class RunDir:
    """Opens a new run directory, or an unfinished one of the same config at its last checkpoint.

    A damaged checkpoint is set aside with a message, and the one before it is taken. Raises ValueError that lists the differing keys when
    the directory belongs to another config, and when another process runs in it or no checkpoint is whole.
    """

    def __init__(self, cfg: Config):
        self.path = Path(cfg.run_dir)
        self.cfg = cfg
        self.progress = Progress()
        self.checkpoint: Path | None = None
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        config_file, checkpoints = self.path / "config.json", self._checkpoints()
        stored = json.loads(config_file.read_text(encoding="utf-8")) if config_file.exists() else {}
        if "run_dir" not in stored and (stored or self._line_files()):
            raise ValueError(f"{self.path} holds files of something else than a run. Choose another --run_dir")
        if checkpoints:  # before the first one there is nothing to lose: a run that failed at once may be started anew
            keys = differing_keys(stored, config_dict(cfg))
            if keys:
                raise ValueError(f"{self.path} holds a run of another config; differing keys: {', '.join(keys)}. Choose another --run_dir")
            self.checkpoint, state = self._last_whole(checkpoints)
            self.progress = Progress(**state["progress"])
        write_json(config_file, config_dict(cfg))
        self._drop_unfinished_lines(state["sizes"] if checkpoints else {})
        self._start = time.perf_counter() - self.progress.seconds

    # ---- what is written along the way

    def log(self, record: dict, line: str | None = None) -> None:
        """Append a record to metrics.jsonl and print its console line."""
        record = record | {"time/total_s": round(time.perf_counter() - self._start, 3)}
        self.append("metrics.jsonl", [record])
        if line is not None:
            tqdm.write(line)

    def append(self, name: str, records: list[dict]) -> None:
        """Append records to a .jsonl file of the run directory."""
        file = self.path / name
        file.parent.mkdir(exist_ok=True)
        with file.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(record) + "\n" for record in records)

    def read(self, name: str) -> list[dict]:
        """Records of a .jsonl file of the run directory; none if it does not exist."""
        file = self.path / name
        if not file.exists():
            return []
        with file.open(encoding="utf-8") as stream:
            return [json.loads(line) for line in stream]

    def save_policy(self, policy: nn.Module, name: str) -> None:
        """Export the policy with its tokenizer as a Hugging Face directory RUN/policies/NAME."""
        policy.save_pretrained(self.path / "policies" / name)

    # ---- checkpoints

    def save(self, policy: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Write a checkpoint of the weights, the optimizer and the progress beside the others, then rename it into place."""
        self.progress.seconds = time.perf_counter() - self._start
        folder = self.path / "checkpoints"
        existing = self._checkpoints()
        number = int(existing[-1].name) + 1 if existing else 0
        temporary, target = folder / "tmp", folder / f"{number:06d}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            save_file({name: tensor.contiguous() for name, tensor in policy.state_dict().items()}, temporary / "policy.safetensors")
            if optimizer is not None:
                save_file(_optimizer_tensors(optimizer), temporary / "optimizer.safetensors")
            files = {f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in temporary.iterdir()}
            sizes = {str(f.relative_to(self.path)): f.stat().st_size for f in self._line_files()}
            write_json(temporary / "state.json", {"progress": dataclasses.asdict(self.progress), "files": files, "sizes": sizes})
            os.replace(temporary, target)
        except (OSError, SafetensorError) as error:  # a full disk, say
            shutil.rmtree(temporary, ignore_errors=True)
            kept = f"{self.checkpoint} is whole" if self.checkpoint else "there is none yet"
            raise OSError(f"checkpoint {target} could not be written: {error}; of the earlier ones {kept}") from error
        for old in existing[: len(existing) + 1 - MAX_CHECKPOINTS]:
            shutil.rmtree(old)
        self.checkpoint = target

    def load_policy(self, policy: nn.Module) -> None:
        policy.load_state_dict(load_file(self.checkpoint / "policy.safetensors"))

    def load_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Continue the optimizer of an interrupted RL phase."""
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in load_file(self.checkpoint / "optimizer.safetensors").items():
            index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

    def _take_lock(self):
        """An open file whose lock the kernel drops with the process, however that ends."""
        lock = (self.path / "lock").open("a")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.path}: another process is running in this directory. Choose another --run_dir, or wait") from None
        return lock

    def _last_whole(self, checkpoints: list[Path]) -> tuple[Path, dict]:
        """The newest checkpoint that is as it was written, and its state. Newer ones are renamed to NUMBER.damaged."""
        damaged = []
        for checkpoint in reversed(checkpoints):
            try:
                state = self._read_state(checkpoint)
            except (OSError, ValueError, KeyError, TypeError) as error:
                damaged.append((checkpoint, f"{type(error).__name__}: {error}"))
                continue
            for broken, problem in damaged:
                print(f"{broken} is damaged ({problem}) and set aside; going on from {checkpoint}")
                os.replace(broken, broken.with_name(broken.name + ".damaged"))
            return checkpoint, state
        problems = "; ".join(f"{broken}: {problem}" for broken, problem in damaged)
        raise ValueError(f"{self.path}: no checkpoint is whole ({problems}). Nothing was changed; to start anew choose another --run_dir")

    def _read_state(self, checkpoint: Path) -> dict:
        """Its state.json. Raises ValueError (or what reading raises) when a file is not as the manifest says."""
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        for name, written in state["files"].items():
            size = (checkpoint / name).stat().st_size
            if size != written["bytes"]:
                raise ValueError(f"{name} has {size} bytes, expected {written['bytes']}")
            if _sha256(checkpoint / name) != written["sha256"]:
                raise ValueError(f"{name} is not what was written (its hash differs)")
        for name, wanted in state["sizes"].items():
            size = (self.path / name).stat().st_size
            if size < wanted:
                raise ValueError(f"{name} has {size} bytes, {wanted} were written before this checkpoint")
        return state

    def _checkpoints(self) -> list[Path]:
        return sorted(p for p in (self.path / "checkpoints").glob("*") if p.name.isdigit())

    def _line_files(self) -> list[Path]:
        patterns = ("metrics.jsonl", "evaluations.jsonl", "trajectories/*.jsonl", "experts/*.jsonl")
        return sorted(file for pattern in patterns for file in self.path.glob(pattern))

    def _drop_unfinished_lines(self, sizes: dict[str, int]) -> None:
        """Cut what was written after the checkpoint: the step it belongs to is done again."""
        for file in self._line_files():
            size = sizes.get(str(file.relative_to(self.path)), 0)
            if file.stat().st_size > size:
                os.truncate(file, size)


@contextmanager
def uninterrupted():
    """Put Ctrl-C and SIGTERM off to the end of the block: what is in it happens whole or not at all."""
    pending, numbers = [], (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, lambda *_: pending.append(True)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
    if pending:
        raise KeyboardInterrupt


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(path: Path, value) -> None:
    """Write JSON beside the path, then rename, so that a reader never sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{index}.{key}": tensor for index, entry in state.items() for key, tensor in entry.items()}


def describe_step(r: dict, num_steps: int) -> str:
    """The console line of an RL step."""
    line = f"RL {r['iteration'] + 1} step {r['step']:>3}/{num_steps}  reward {r['rl/reward_mean']:.3f}  flat {r['rl/flat_share']:.2f}"
    line += f"  len {r['rl/len_mean_tok']:.1f}"
    if "rl/loss" in r:
        line += f"  entropy {r['rl/entropy_mean_nat']:.3f}  grad {r['rl/grad_norm']:.3f}"
        line += f"  clip {r['rl/clip_low_share']:.4f}/{r['rl/clip_high_share']:.4f}  gap {r['rl/logp_gap_max_nat']:.0e}"
    line += f"  {r['time/step_s']:.2f}s"
    return line + truncation_warning(r["rl/truncated_share"])


def truncation_warning(truncated_share: float) -> str:
    remedy = "raise sampling.max_new_tokens, or check data.prompt, data.chat_template and the model's EOS ids"
    return f"\n  nearly all responses are cut off: {remedy}" if truncated_share > 0.9 else ""
