"""Typed configuration: the defaults below, a TOML file of what differs, command-line overrides.

The defaults are those of the laptop run. Each key stands with its default, its limits and a
comment: unit, and where the default is from. paper = arXiv 2511.04285, DAPO = arXiv 2503.14476
and its public recipe, ours = chosen by this project. Imports no torch.
"""

import argparse
import difflib
import json
import operator
import os
import tomllib
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path

LIMITS = {
    "above": operator.gt,
    "at_least": operator.ge,
    "below": operator.lt,
    "at_most": operator.le,
    "one_of": lambda value, allowed: value in allowed,
    "among": lambda values, allowed: all(value in allowed for value in values),
}


class UserError(ValueError):
    """An error for the user to correct (config, data, model, disk), shown without a traceback."""


def read_json(file: Path) -> dict:
    """The object in a file; {} if there is none. Raises UserError for what is not JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON: {error}") from None


def write_json(file: Path, value) -> None:
    """Write JSON under a temporary name, then rename: a reader never sees half a file."""
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, file)


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose errors are one line, too."""

    def error(self, message: str):
        raise UserError(message)


def key(default, **limits):
    """A field with its default and its limits (see LIMITS); a bound may be the name of a key."""
    return field(default=default, metadata=limits)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    path: str = "data/countdown_base"  # Hugging Face directory of theta_0
    random_init: bool = False  # true: seeded random weights instead of the stored ones


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    # Sources: see load_problems and load_demonstrations in data/__init__.py.
    train: str = "countdown:train?numbers=4"  # training problems; for method "sft" demonstrations
    train_size: int = key(400, at_least=0)  # number drawn by seed; 0 = the whole file (ours)
    eval: str = "countdown:heldout?numbers=4"  # held-out problems
    eval_size: int = key(200, at_least=0)  # number, the same for every seed; 0 = the whole file
    reward: str = ""  # a function of one's own, "module:function"; "" = the problem's own judge
    prompt: str = "{problem}"  # template of the prompt
    chat_template: bool = False  # put the prompt into the checkpoint's own chat template


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    max_new_tokens: int = key(24, above=0)  # tokens of a response, its stop token included
    temperature: float = key(1.0, above=0)  # of exploration and of the trainer's log-probs (DAPO)


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    steps: int = key(75, above=0)  # RL steps of an iteration (ours)
    problems_per_step: int = key(32, above=0)  # problems sampled in a step (ours; DAPO: 512)
    samples_per_problem: int = key(8, above=0)  # responses to each (ours; DAPO: 16)
    max_sampling_rounds: int = key(1, above=0)  # rounds to replace flat groups; 1 = none replaced
    favor_hard: bool = False  # draw problems with chance 1 / (1 + successes so far in the phase)
    lr: float = key(1e-4, at_least=0)  # peak learning rate (ours); 0 = pure RFT
    warmup_steps: int = key(0, at_least=0)  # linear warm-up of each RL phase, RL steps
    minibatches: int = key(2, above=0, at_most="rl.problems_per_step")  # optimizer steps a batch
    clip_low: float = key(0.2, at_least=0, below=1)  # ratios clipped below 1 - this (DAPO)
    clip_high: float = key(0.28, above=0)  # ratios clipped above 1 + this (DAPO)
    aggregation: str = key("token", one_of=("token", "sequence", "constant"))  # DAPO, GRPO, Dr.GRPO
    normalize_std: bool = True  # divide advantages by the group's std; false = Dr.GRPO
    kl_coef: float = key(0.0, at_least=0)  # weight of the k3 KL to the phase's start, nat (DAPO)
    recompute_logprobs: bool = False  # old log-probs by the trainer: one more forward pass
    importance_cap: float = key(0.0, at_least=0)  # of trainer / sampler probabilities; 0 = off
    # Tokens before max_new_tokens over which DAPO's soft penalty grows; 0 = off.
    overlong_buffer: int = key(0, at_least=0, below="sampling.max_new_tokens")


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    min_reward: float = key(1.0, above=0, at_most=1)  # of a success: an expert, and in avg@k
    max_success_rate: float = key(0.9, above=0, at_most=1)  # of hard problems (value ours)
    max_per_problem: int = key(10, above=0)  # expert trajectories kept per problem (ours)


@dataclass(frozen=True, kw_only=True)
class RFTConfig:
    lr: float = key(3e-4, at_least=0)  # peak learning rate, linear decay to 0 (ours)
    epochs: int = key(6, above=0)  # passes over the experts (ours)
    batch_size: int = key(64, above=0)  # trajectories in an optimizer step (ours)
    warmup_steps: int = key(0, at_least=0)  # linear warm-up, optimizer steps (ours)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    weight_decay: float = key(0.0, at_least=0)  # AdamW, decoupled (ours; DAPO: 0.1)
    grad_clip: float = key(1.0, above=0)  # largest gradient norm (DAPO)


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    rank: int = key(0, at_least=0)  # of the adapters, scale/lora.py; 0 = all weights are trained
    alpha: float = key(32.0, above=0)  # adapters count alpha / rank times (ours)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    every: int = key(25, above=0)  # RL steps between evaluations; a phase's end is always evaluated
    num_samples: int = key(32, above=0)  # responses per problem: k of avg@k, pass@k (paper)
    temperature: float = key(1.0, at_least=0)  # 0 = greedy (DAPO; the paper's is not known)
    top_p: float = key(1.0, above=0, at_most=1)  # nucleus; 1.0 = off
    top_k: int = key(0, at_least=0)  # 0 = off


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    threads: int = key(1, above=0)  # CPU threads of torch
    dtype: str = key("float32", one_of=("float32", "bfloat16"))  # of products; the rest float32
    compile: bool = False  # torch.compile of the blocks; on a CPU it needs a C++ compiler
    checkpoint_activations: bool = False  # compute each block a second time for its gradient
    max_rows: int = key(512, above=0)  # responses decoded at once; does not change the result
    micro_batch_tokens: int = key(16384, above=0)  # of a forward pass, a prompt once per group
    replicas: int = key(1, above=0)  # HSDP: copies of the sharded model; 1 = FSDP over all


@dataclass(frozen=True, kw_only=True)
class Config:
    method: str = key("rloop", one_of=("rloop", "rl", "eval", "sft"))  # "rl" is the baseline
    seed: int = key(0, at_least=0)  # of everything that is drawn
    run_dir: str = "runs/{method}-{seed}"  # {method} and {seed} stand for the values of these keys
    iterations: int = key(4, above=0)  # RLoop iterations (ours)
    save_every: int = key(10, above=0)  # RL or RFT steps between two checkpoints
    # Also write the metrics to these: ["tensorboard"], ["wandb"] or both.
    logging: list = field(default_factory=list, metadata={"among": ("tensorboard", "wandb")})
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    sampling: SamplingConfig = SamplingConfig()
    rl: RLConfig = RLConfig()
    select: SelectConfig = SelectConfig()
    rft: RFTConfig = RFTConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoRAConfig = LoRAConfig()
    eval: EvalConfig = EvalConfig()
    compute: ComputeConfig = ComputeConfig()

    def __post_init__(self):
        values = {name: operator.attrgetter(name)(self) for name in KEYS}
        for name, setting in KEYS.items():
            for limit, bound in setting.metadata.items():
                if not LIMITS[limit](values[name], values.get(bound, bound)):
                    rule = f"must be {limit.replace('_', ' ')} {bound}"
                    raise UserError(f"{name} = {values[name]!r}: {rule}")
        if self.rl.importance_cap > 0 and not self.rl.recompute_logprobs:
            raise UserError("rl.importance_cap above 0 needs rl.recompute_logprobs = true")
        if self.eval.temperature == 0 and self.eval.num_samples > 1:
            raise UserError("eval.temperature = 0 is greedy and needs eval.num_samples = 1")
        if self.data.reward and ":" not in self.data.reward:
            raise UserError(f"data.reward = {self.data.reward!r}: expected module:function")
        if "{problem}" not in self.data.prompt:
            raise UserError(f"data.prompt = {self.data.prompt!r}: must contain {{problem}}")


SECTIONS = {f.name: f.type for f in fields(Config) if is_dataclass(f.type)}
KEYS = {f.name: f for f in fields(Config) if f.name not in SECTIONS} | {
    f"{section}.{f.name}": f for section, cls in SECTIONS.items() for f in fields(cls)
}


def load_config(path: str | Path, overrides: list[str] = ()) -> Config:
    """The defaults, then the values of a TOML file, then command-line overrides.

    overrides: pairs such as ["--rl.lr", "1e-6", "--method", "rl"], or "--rl.lr=1e-6"; values are
    TOML values, and a bare word is a string. Raises UserError for unreadable TOML, unknown keys
    (naming the nearest known one), wrong types and values out of range.
    """
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"config file {path}: {error}") from None
    values = {name: _checked(name, v, path) for name, v in flat(tree).items()}
    values |= {name: _checked(name, v, "command line") for name, v in _overrides(overrides).items()}
    parts = {section: {} for section in ("", *SECTIONS)}
    for name, value in values.items():
        section, _, leaf = name.rpartition(".")
        parts[section][leaf] = value
    top = parts.pop("")
    config = Config(**top, **{name: SECTIONS[name](**part) for name, part in parts.items()})
    run_dir = config.run_dir.replace("{method}", config.method).replace("{seed}", str(config.seed))
    return replace(config, run_dir=run_dir)


def config_from_command_line(arguments: list[str]) -> tuple[Config, dict[str, float] | None]:
    """The config and, with --plan, the machine to plan for: see --help for the arguments."""
    epilog = "Every key is an option too: --rl.lr 1e-4. To talk to a policy: --sample POLICY --help"
    parser = ArgumentParser(epilog=epilog)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="TOML file; its keys are in config.py")
    add("--plan", action="store_true", help="print what the run needs, and do nothing else")
    add("--gpus", type=int, metavar="N", help="with --plan: number of GPUs, default 1")
    add("--gpu-memory-gb", type=float, metavar="M", help="with --plan: GiB per GPU, default 80")
    known, overrides = parser.parse_known_args(arguments)
    machine = {"gpus": known.gpus, "gpu_memory_gb": known.gpu_memory_gb}
    machine = {name: value for name, value in machine.items() if value is not None}
    if machine and not known.plan:
        raise UserError("--gpus and --gpu-memory-gb: go with --plan; torchrun starts processes")
    return load_config(known.config, overrides), machine if known.plan else None


def differing_keys(a: dict, b: dict) -> list[str]:
    """Dotted names of the keys at which two nested dictionaries differ."""
    a, b = flat(a), flat(b)
    return [name for name in a | b if a.get(name) != b.get(name)]


def flat(tree: dict, prefix: str = "") -> dict:
    """Dotted name -> value of every leaf of nested dictionaries."""
    leaves = {}
    for k, v in tree.items():
        leaves |= flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k: v}
    return leaves


def _overrides(arguments: list[str]) -> dict:
    """Dotted name -> value of `--section.key value` and `--section.key=value` arguments."""
    values, rest = {}, iter(arguments)
    for argument in rest:
        flag, sign, text = argument.partition("=")
        text = text if sign else next(rest, None)
        if not flag.startswith("--") or text is None:
            raise UserError(f"override {argument!r}: expected --section.key value")
        name = flag.removeprefix("--")
        is_text = name in KEYS and KEYS[name].type is str and text[:1] not in ('"', "'")
        try:
            values[name] = text if is_text else tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            values[name] = text
    return values


def _checked(name: str, value, where: str | Path):
    """The value of a key, an integer as a float where the key is a float."""
    if name not in KEYS:
        (nearest,) = difflib.get_close_matches(name, KEYS, n=1, cutoff=0.0)
        raise UserError(f"{where}: unknown key {name!r}; the nearest known one is {nearest!r}")
    wanted = KEYS[name].type
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise UserError(f"{where}: {name} = {value!r}: expected {wanted.__name__}")
    return value
