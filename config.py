"""Typed configuration: a complete TOML file plus typed command-line overrides. Imports no torch.

Every field must be in the file (nothing has a hidden default), so a config can be read and diffed on its own.
Each field's comment gives its unit and where its value in configs/countdown.toml comes from:
paper = arXiv 2511.04285, DAPO = arXiv 2503.14476 and its public recipe, ours = chosen by this project.
"""

import argparse
import dataclasses
import difflib
import math
import tomllib
import typing
from dataclasses import dataclass
from pathlib import Path

METHODS = ("rloop", "rl", "eval", "sft")
DTYPES = ("float32", "bfloat16")
AGGREGATIONS = ("token", "sequence", "constant")


class UserError(ValueError):
    """The user's to mend: config, data, model directory or disk. Printed as one line, without a
    traceback; every other exception is a fault of the program and shows its own."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    path: str  # Hugging Face directory of theta_0: config.json, tokenizer.json, *.safetensors
    random_init: (
        bool  # true: ignore its weights and start from seeded random ones (to build a base policy)
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: str  # problems for RL: "countdown:train", "reasoning_gym:TASK", or a .jsonl, .json, .csv or .parquet file (data/files.py)
    train_size: int  # how many of them to use, drawn by seed; 0 = all (a file) (ours)
    eval: str  # held-out problems: "countdown:heldout", "countdown:search", "reasoning_gym:TASK:heldout", or such a file
    eval_size: int  # how many of them, the same for every seed; 0 = all (a file) (ours)
    demonstrations: (
        str  # for method "sft": "countdown:demonstrations", or a .jsonl file of {problem, response}
    )
    num_demonstrations: int  # how many of them, drawn by seed; 0 = all (a file) (ours)
    prompt: str  # template around {problem}
    chat_template: bool  # put it into the checkpoint's own chat template, as the user's message
    countdown_numbers: int  # Countdown: how many numbers a problem has
    countdown_max: int  # Countdown: numbers are drawn from 1..this (targets from 1..99)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    max_new_tokens: int  # tokens of a response, its stop token included
    temperature: float  # of exploration; the trainer's log-probs use the same (DAPO: 1.0)


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    steps: int  # N, RL steps of one iteration (ours)
    problems_per_step: int  # P (ours)
    samples_per_problem: int  # G (ours; DAPO: 16)
    max_sampling_rounds: (
        int  # dynamic sampling: rounds of fresh problems to fill P non-flat groups; 1 = no refill
    )
    lr: float  # peak learning rate; 0 = pure rejection-sampling fine-tuning
    warmup_steps: int  # linear warm-up at the start of each RL phase, RL steps
    minibatches: int  # optimizer steps a batch is split into
    clip_low: float  # lower clip range (DAPO: 0.2)
    clip_high: float  # upper clip range, clip-higher (DAPO: 0.28)
    aggregation: str  # "token" (DAPO), "sequence" (GRPO) or "constant" (Dr.GRPO)
    normalize_std: bool  # divide advantages by the group's std; false = Dr.GRPO
    kl_coef: float  # weight of the k3 KL to the phase's start, nat; DAPO: 0 = off
    recompute_logprobs: (
        bool  # old log-probs from the trainer instead of the sampler, for one more forward pass
    )
    importance_cap: float  # truncated importance sampling: tokens weigh min(trainer / sampler probability, this); 0 = off
    overlong_buffer: int  # tokens before max_new_tokens in which DAPO's soft penalty grows; 0 = off


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    max_success_rate: float  # tau: problems solved more often than this over the phase are left out (the paper has a
    # hard-problem filter; the value is ours)
    max_per_problem: int  # M: expert trajectories kept per problem (ours)


@dataclass(frozen=True, kw_only=True)
class RFTConfig:
    lr: float  # peak learning rate, linear decay to 0 (ours)
    epochs: int  # passes over the experts (ours)
    batch_size: int  # trajectories an optimizer step (ours)
    warmup_steps: int  # linear warm-up, optimizer steps (ours)
    save_every: (
        int  # optimizer steps between two checkpoints; the last one is always followed by one
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    weight_decay: float  # AdamW, decoupled (DAPO: 0.1)
    grad_clip: float  # largest gradient norm (DAPO: 1.0)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    every: (
        int  # RL steps between two evaluations inside an RL phase; phase ends are always evaluated
    )
    num_samples: int  # K: responses a problem; avg@K and pass@1..K (paper: 32)
    temperature: float  # 1.0 here; the paper's text at hand does not say
    top_p: float  # nucleus; 1.0 = off
    top_k: int  # 0 = off


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    threads: int  # CPU threads of torch
    dtype: str  # "float32" or "bfloat16": of the products in sampling and training; weights, log-probs and losses stay float32
    compile: bool  # torch.compile of the blocks; on a CPU it needs a C++ compiler, and pays for models of 100M parameters and more
    checkpoint_activations: (
        bool  # run every block a second time for the gradient instead of keeping what it computed
    )
    max_rows: int  # responses decoded at once; changes speed and memory, not the result
    micro_batch_tokens: int  # tokens of a forward/backward pass, a prompt counted once for its responses; changes memory, not the gradient
    replicas: int  # HSDP: copies of the sharded model; 1 = FSDP over all processes


@dataclass(frozen=True, kw_only=True)
class Config:
    method: str  # "rloop", "rl" (the plain-RL baseline at equal RL steps), "eval", "sft"
    seed: int  # of everything that is drawn
    run_dir: str  # where this run's files go; {method} and {seed} stand for these keys
    iterations: int  # I, RLoop iterations (ours)
    save_every: int  # RL steps between two checkpoints
    model: ModelConfig
    data: DataConfig
    sampling: SamplingConfig
    rl: RLConfig
    select: SelectConfig
    rft: RFTConfig
    optimizer: OptimizerConfig
    eval: EvalConfig
    compute: ComputeConfig

    def __post_init__(self):
        for key, allowed in (
            ("method", METHODS),
            ("rl.aggregation", AGGREGATIONS),
            ("compute.dtype", DTYPES),
        ):
            value = _get(self, key)
            if value not in allowed:
                raise ValueError(
                    f"{key} = {value!r}: expected one of {', '.join(map(repr, allowed))}"
                )
        for key in POSITIVE:
            if not _get(self, key) > 0:
                raise ValueError(f"{key} = {_get(self, key)}: must be above 0")
        for key in NOT_NEGATIVE:
            if not _get(self, key) >= 0:
                raise ValueError(f"{key} = {_get(self, key)}: must be 0 or more")
        if not self.rl.clip_low < 1:
            raise ValueError(
                f"rl.clip_low = {self.rl.clip_low}: must be below 1 (the lower clip bound is 1 - clip_low)"
            )
        if self.rl.minibatches > self.rl.problems_per_step:
            raise ValueError(
                f"rl.minibatches = {self.rl.minibatches}: must not exceed rl.problems_per_step = {self.rl.problems_per_step}"
            )
        if self.rl.importance_cap > 0 and not self.rl.recompute_logprobs:
            raise ValueError(
                f"rl.importance_cap = {self.rl.importance_cap}: needs rl.recompute_logprobs = true, or there is nothing to correct"
            )
        if self.rl.overlong_buffer >= self.sampling.max_new_tokens:
            raise ValueError(
                f"rl.overlong_buffer = {self.rl.overlong_buffer}: must be below sampling.max_new_tokens = {self.sampling.max_new_tokens}"
            )
        for key, value in (
            ("select.max_success_rate", self.select.max_success_rate),
            ("eval.top_p", self.eval.top_p),
        ):
            if not 0 < value <= 1:
                raise ValueError(f"{key} = {value}: must be in (0, 1]")
        if "{problem}" not in self.data.prompt:
            raise ValueError(f"data.prompt = {self.data.prompt!r}: must contain {{problem}}")


POSITIVE = (
    *(
        "iterations",
        "save_every",
        "sampling.max_new_tokens",
        "sampling.temperature",
        "rl.steps",
        "rl.problems_per_step",
    ),
    *(
        "rl.samples_per_problem",
        "rl.max_sampling_rounds",
        "rl.minibatches",
        "rl.clip_high",
        "select.max_per_problem",
        "rft.epochs",
    ),
    *(
        "rft.batch_size",
        "rft.save_every",
        "optimizer.grad_clip",
        "eval.every",
        "eval.num_samples",
        "eval.temperature",
        "compute.threads",
    ),
    *(
        "compute.max_rows",
        "compute.micro_batch_tokens",
        "compute.replicas",
        "data.countdown_numbers",
        "data.countdown_max",
    ),
)
NOT_NEGATIVE = (
    *(
        "seed",
        "rl.lr",
        "rl.warmup_steps",
        "rl.kl_coef",
        "rl.importance_cap",
        "rl.clip_low",
        "rl.overlong_buffer",
    ),
    *("rft.lr", "rft.warmup_steps"),
    *(
        "optimizer.weight_decay",
        "eval.top_k",
        "data.train_size",
        "data.eval_size",
        "data.num_demonstrations",
    ),
)


def load_config(path: str | Path, overrides: list[str] = ()) -> Config:
    """Read a complete TOML config and apply command-line overrides.

    overrides: flat list of pairs such as ["--rl.lr", "1e-6", "--method", "rl"] (or "--rl.lr=1e-6"); values are TOML values, and a bare
    word is a string.
    Raises ValueError for unreadable TOML, unknown or missing keys (naming the nearest known one), and wrong types or ranges.
    """
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"config file {path}: not found") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"config file {path}: not valid TOML: {error}") from None
    overrides = [
        part
        for text in overrides
        for part in (text.split("=", 1) if text.startswith("--") else [text])
    ]
    if len(overrides) % 2:
        raise ValueError(f"overrides come in pairs --key value; {overrides[-1]!r} has no partner")
    known = _field_types(Config)
    for flag, text in zip(overrides[::2], overrides[1::2], strict=True):
        if not flag.startswith("--"):
            raise ValueError(f"override {flag!r}: expected --section.key value")
        *sections, name = flag[2:].split(".")
        _check_key(flag[2:], known, where="command line")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path}: {section} must be a section, not {node!r}")
        node[name] = _parse_value(text, known[flag[2:]])
    config = _build(Config, tree, "", str(path))
    run_dir = config.run_dir.replace("{method}", config.method).replace("{seed}", str(config.seed))
    return dataclasses.replace(config, run_dir=run_dir)


def config_from_command_line(arguments: list[str]) -> tuple[Config, dict[str, float] | None]:
    """`--config FILE [--section.key value ...] [--plan [--gpus N] [--gpu-memory-gb M]]`. Returns the config and, with --plan, the machine
    that the plan is for."""
    parser = argparse.ArgumentParser(
        description="RLoop: explore with RL, keep the experts, fine-tune the policy that the phase began with, repeat.",
        epilog="Every key of the config can be overridden: --method rl --seed 1 --rl.lr 1e-4 --run_dir runs/rl-1",
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="a complete TOML file, such as configs/countdown.toml",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print what the run will need (memory, time, disk), and do nothing",
    )
    parser.add_argument(
        "--gpus", type=int, default=1, metavar="N", help="with --plan: of this many GPUs"
    )
    parser.add_argument(
        "--gpu-memory-gb",
        type=float,
        default=80,
        metavar="M",
        help="with --plan: of this size, in GB of 2^30 bytes",
    )
    known, overrides = parser.parse_known_args(arguments)
    machine = {"gpus": known.gpus, "gpu_memory_gb": known.gpu_memory_gb}
    for name, value in machine.items():
        if not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be above 0")
        if not known.plan and value != parser.get_default(name):
            raise ValueError(
                f"--{name.replace('_', '-')}: goes with --plan; torchrun says how many processes there are"
            )
    return load_config(known.config, overrides), machine if known.plan else None


def config_dict(config: Config) -> dict:
    """The config as nested plain dictionaries, as config.json stores it."""
    return dataclasses.asdict(config)


def differing_keys(a: dict, b: dict, prefix: str = "") -> list[str]:
    """Dotted names of the keys at which two nested dictionaries differ."""
    keys = []
    for key in [*a, *(k for k in b if k not in a)]:
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            keys += differing_keys(x, y, f"{prefix}{key}.")
        elif x != y:
            keys.append(f"{prefix}{key}")
    return keys


def _get(config: Config, dotted: str):
    for name in dotted.split("."):
        config = getattr(config, name)
    return config


def _field_types(cls: type, prefix: str = "") -> dict[str, type]:
    """Dotted name -> annotation of every leaf field."""
    types = {}
    for name, annotation in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(annotation):
            types |= _field_types(annotation, f"{prefix}{name}.")
        else:
            types[prefix + name] = annotation
    return types


def _check_key(key: str, known, where: str) -> None:
    if key not in known:
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
        raise ValueError(f"{where}: unknown key {key!r}; the nearest known one is {nearest[0]!r}")


def _parse_value(text: str, annotation: type):
    """An override's text as a TOML value; for a string field, text that is no TOML string stands for itself."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # where the field is no string, the type check names it
    return text if annotation is str and not isinstance(value, str) else value


def _build(cls: type, tree: dict, prefix: str, where: str):
    hints = typing.get_type_hints(cls)
    if not isinstance(tree, dict):
        raise ValueError(f"{where}: {prefix.rstrip('.')} must be a section, not {tree!r}")
    for key in tree:
        _check_key(prefix + key, [prefix + name for name in hints], where)
    values = {}
    for name, annotation in hints.items():
        key = prefix + name
        if name not in tree:
            raise ValueError(f"{where}: {key} is missing (a config file is complete)")
        value = tree[name]
        if dataclasses.is_dataclass(annotation):
            values[name] = _build(annotation, value, key + ".", where)
        elif annotation is float:
            if type(value) not in (int, float) or not math.isfinite(value):
                raise ValueError(f"{where}: {key} = {value!r}: expected a finite float")
            values[name] = float(value)
        elif type(value) is not annotation:
            raise ValueError(f"{where}: {key} = {value!r}: expected {annotation.__name__}")
        else:
            values[name] = value
    return cls(**values)
