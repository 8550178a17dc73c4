"""The run directory: what is on disk, what is printed, and where an interrupted run goes on.

RUN/config.json            the resolved config
RUN/metrics.jsonl          flat records of RL steps, filters, RFT steps and evaluations
RUN/evaluations.jsonl      correct answers per held-out problem, one line an evaluation
RUN/trajectories/*.jsonl   every sampled trajectory, one file an iteration
RUN/experts/*.jsonl        what RFT was trained on
RUN/policies/NAME/         Hugging Face directories: rl_1, theta_1, rl_2, theta_2, ...
RUN/checkpoints/STEP/      the last two states to continue from, each with the sizes and hashes of its files
RUN/lock                   held by the process that runs here

With several processes the first one writes all of it but the tensors of a checkpoint, of which each writes its own shards.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from tqdm import tqdm

import parallel
from config import Config, config_dict, differing_keys

MAX_CHECKPOINTS = 2
warnings.filterwarnings(
    "ignore", message="torch.distributed is disabled", module="torch.distributed.checkpoint"
)  # one process: as meant


@dataclass
class Progress:
    """Where the run stands. A step counts once its files and its checkpoint are written."""

    iteration: int = 0  # finished iterations
    step: int = 0  # finished RL steps of the current iteration
    rft_step: int = (
        0  # finished RFT steps of the current iteration; above 0, exploring and filtering are done
    )
    rl_steps: int = 0  # finished RL steps of the whole run
    evaluation_owed: bool = (
        False  # the last RL step is followed by an evaluation, which is not finished
    )
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
        checkpoints, sizes = parallel.on_main(self._open), {}
        if checkpoints:
            self.checkpoint, state = self._last_whole(checkpoints)
            self.progress, sizes = Progress(**state["progress"]), state["sizes"]
        parallel.on_main(lambda: self._drop_unfinished_lines(sizes))
        self._start = time.perf_counter() - self.progress.seconds

    def _open(self) -> list[Path]:
        """Lock the directory and compare its config with ours; returns its checkpoints, oldest first."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        config_file, checkpoints = self.path / "config.json", self._checkpoints()
        stored = json.loads(config_file.read_text(encoding="utf-8")) if config_file.exists() else {}
        if "run_dir" not in stored and (stored or self._line_files()):
            raise ValueError(
                f"{self.path} holds files of something else than a run. Choose another --run_dir"
            )
        keys = differing_keys(stored, config_dict(self.cfg))
        if (
            checkpoints and keys
        ):  # before the first one there is nothing to lose: a run that failed at once may be started anew
            raise ValueError(
                f"{self.path} holds a run of another config; differing keys: {', '.join(keys)}. Choose another --run_dir"
            )
        write_json(config_file, config_dict(self.cfg))
        return checkpoints

    # ---- what is written along the way

    def log(self, record: dict, line: str | None = None) -> None:
        """Append a record to metrics.jsonl and print its console line."""
        record = record | {"time/total_s": round(time.perf_counter() - self._start, 3)}
        self.append("metrics.jsonl", [record])
        if line is not None:
            tqdm.write(line)

    def append(self, name: str, records: list[dict]) -> None:
        """Append records to a .jsonl file of the run directory."""

        def write() -> None:
            file = self.path / name
            file.parent.mkdir(exist_ok=True)
            with file.open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(record) + "\n" for record in records)

        parallel.on_main(write)

    def lines(self, name: str) -> Iterator[dict]:
        """Records of a .jsonl file of the run directory, one by one; none if it does not exist. For the first process (on_main)."""
        file = self.path / name
        if file.exists():
            with file.open(encoding="utf-8") as stream:
                yield from map(json.loads, stream)

    def read(self, name: str) -> list[dict]:
        """All of these records, in every process."""
        return parallel.on_main(lambda: list(self.lines(name)))

    def save_policy(self, policy: nn.Module, name: str) -> None:
        """Export the policy with its tokenizer as a Hugging Face directory RUN/policies/NAME."""
        state = parallel.full_state(policy)
        parallel.on_main(lambda: policy.save_pretrained(self.path / "policies" / name, state=state))

    # ---- checkpoints

    def save(
        self,
        policy: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        theta_i: dict[str, Tensor] | None = None,
    ) -> None:
        """Write a checkpoint of the weights, the optimizer, the weights that the phase began with and the progress beside the others, then
        rename it into place. Everything random follows from the config's seed and the progress."""
        self.progress.seconds = parallel.on_main(lambda: time.perf_counter() - self._start)
        existing = parallel.on_main(self._checkpoints)
        number = int(existing[-1].name) + 1 if existing else 0
        temporary, target = (
            self.path / "checkpoints" / "tmp",
            self.path / "checkpoints" / f"{number:06d}",
        )
        state = _named("policy", policy.state_dict()) | _named("theta_i", theta_i or {})
        state |= _named("optimizer", _optimizer_tensors(optimizer) if optimizer is not None else {})
        try:
            parallel.on_main(lambda: shutil.rmtree(temporary, ignore_errors=True))
            dcp.save(
                state, storage_writer=dcp.HuggingFaceStorageWriter(temporary, save_distributed=True)
            )
            parts = parallel.gather(
                lambda: {f.name: _fingerprint(f) for f in sorted(temporary.iterdir())[_every_nth()]}
            )
            parallel.on_main(
                lambda: self._complete(
                    temporary, target, {name: f for part in parts for name, f in part.items()}
                )
            )
        except (OSError, CheckpointException) as error:  # a full disk, say
            parallel.on_main(lambda: shutil.rmtree(temporary, ignore_errors=True))
            kept = f"{self.checkpoint} is whole" if self.checkpoint else "there is none yet"
            problem = (
                next(iter(error.failures.values()))[0]
                if isinstance(error, CheckpointException)
                else error
            )
            raise OSError(
                f"checkpoint {target} could not be written: {problem}; of the earlier ones {kept}"
            ) from error
        parallel.on_main(
            lambda: [shutil.rmtree(old) for old in existing[: len(existing) + 1 - MAX_CHECKPOINTS]]
        )
        self.checkpoint = target

    def _complete(self, temporary: Path, target: Path, files: dict[str, dict]) -> None:
        sizes = {str(f.relative_to(self.path)): f.stat().st_size for f in self._line_files()}
        write_json(
            temporary / "state.json",
            {"progress": dataclasses.asdict(self.progress), "files": files, "sizes": sizes},
        )
        os.replace(temporary, target)

    def load_policy(self, policy: nn.Module) -> None:
        state = policy.state_dict()
        self._load("policy", state)
        policy.load_state_dict(state)

    def load_theta(self, policy: nn.Module) -> dict[str, Tensor]:
        """The weights that the interrupted RL phase began with, sharded like the policy's; none where the phase has no use for them."""
        wanted = self._stored("theta_i")
        state = {
            name: torch.empty_like(tensor)
            for name, tensor in policy.state_dict().items()
            if name in wanted
        }
        self._load("theta_i", state)
        return state

    def load_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Continue the optimizer of an interrupted phase."""
        parameters, state = optimizer.param_groups[0]["params"], {}
        for name in self._stored("optimizer"):
            index, key = name.split(".")
            state[name] = (
                torch.zeros(())
                if key == "step"
                else torch.empty_like(parameters[int(index)], requires_grad=False)
            )
        self._load("optimizer", state)
        by_parameter: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            index, key = name.split(".")
            by_parameter.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict(
            {"state": by_parameter, "param_groups": optimizer.state_dict()["param_groups"]}
        )

    def _stored(self, part: str) -> list[str]:
        """Names of the checkpoint's tensors of "policy", "theta_i" or "optimizer"."""
        names = dcp.HuggingFaceStorageReader(self.checkpoint).read_metadata().state_dict_metadata
        return [name.removeprefix(f"{part}.") for name in names if name.startswith(f"{part}.")]

    def _load(self, part: str, state: dict[str, Tensor]) -> None:
        """Fill the tensors, sharded as they may be, with the checkpoint's."""
        dcp.load(_named(part, state), storage_reader=dcp.HuggingFaceStorageReader(self.checkpoint))

    def _take_lock(self):
        """An open file whose lock the kernel drops with the process, however that ends."""
        lock = (self.path / "lock").open("a")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{self.path}: another process is running in this directory. Choose another --run_dir, or wait"
            ) from None
        return lock

    def _last_whole(self, checkpoints: list[Path]) -> tuple[Path, dict]:
        """The newest checkpoint that is as it was written, and its state. Newer ones are renamed to NUMBER.damaged."""
        damaged = []
        for checkpoint in reversed(checkpoints):
            try:
                state = parallel.gather(lambda checkpoint=checkpoint: self._read_state(checkpoint))[
                    0
                ]
            except (OSError, ValueError, KeyError, TypeError) as error:
                damaged.append((checkpoint, f"{type(error).__name__}: {error}"))
                continue
            for broken, problem in damaged:
                print(f"{broken} is damaged ({problem}) and set aside; going on from {checkpoint}")
            parallel.on_main(
                lambda: [
                    os.replace(broken, broken.with_name(broken.name + ".damaged"))
                    for broken, _ in damaged
                ]
            )
            return checkpoint, state
        problems = "; ".join(f"{broken}: {problem}" for broken, problem in damaged)
        raise ValueError(
            f"{self.path}: no checkpoint is whole ({problems}). Nothing was changed; to start anew choose another --run_dir"
        )

    def _read_state(self, checkpoint: Path) -> dict:
        """Its state.json. Raises ValueError (or what reading raises) when a file is not as the manifest says; of several processes each
        looks at a part of the files."""
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        for name, written in sorted(state["files"].items())[_every_nth()]:
            size = (checkpoint / name).stat().st_size
            if size != written["bytes"]:
                raise ValueError(f"{name} has {size} bytes, expected {written['bytes']}")
            if _fingerprint(checkpoint / name) != written:
                raise ValueError(f"{name} is not what was written (its hash differs)")
        for name, wanted in state["sizes"].items():
            size = (self.path / name).stat().st_size
            if size < wanted:
                raise ValueError(
                    f"{name} has {size} bytes, {wanted} were written before this checkpoint"
                )
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


def _fingerprint(file: Path) -> dict:
    with file.open("rb") as stream:
        return {
            "bytes": file.stat().st_size,
            "sha256": hashlib.file_digest(stream, "sha256").hexdigest(),
        }


def _every_nth() -> slice:
    return slice(parallel.rank(), None, parallel.num_ranks())


def _named(part: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{part}.{name}": tensor for name, tensor in tensors.items()}


def write_json(path: Path, value) -> None:
    """Write JSON beside the path, then rename, so that a reader never sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{key}": tensor for index, entry in state.items() for key, tensor in entry.items()
    }


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
