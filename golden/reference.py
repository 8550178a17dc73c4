"""The reference as a port: answers the cases by calling this project's functions.

    python -m golden.check python -m golden.reference             in float64, as make does
    python -m golden.check python -m golden.reference float32     in float32, as most ports do

What a case needs beside pure functions (a run directory, a tokenizer's files, the sampler) is stood
in for here; every formula is the product's.
"""

import json
import math
import sys
from dataclasses import fields
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

import rloop
import sampler
from config import SECTIONS, Config
from golden.vectors import NOT_FINITE
from rloop import Trajectory
from run import Progress

DTYPE = torch.float64
FUNCTIONS = {}


def function(f):
    FUNCTIONS[f.__name__] = f
    return f


def answer(request: dict):
    """The output for {"function": NAME, "inputs": {...}}."""
    return plain(FUNCTIONS[request["function"]](**request["inputs"]))


def plain(value):
    """The value as JSON: lists for tensors, texts for numbers that are not finite."""
    if isinstance(value, Tensor):
        return plain(value.detach().tolist())
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def tensor(values) -> Tensor:
    return torch.tensor(_numbers(values), dtype=DTYPE)


def _numbers(values):
    if isinstance(values, list):
        return [_numbers(value) for value in values]
    return NOT_FINITE.get(values, values) if isinstance(values, str) else values


# ---- losses


def _with_gradient(loss_of, logp: list) -> dict:
    logp = tensor(logp).requires_grad_()
    result = loss_of(logp)
    loss, sums = result if isinstance(result, tuple) else (result, {})
    loss.backward()
    return {"loss": loss, "gradient": logp.grad} | sums


@function
def grpo_loss(logp, old_logp, advantages, weights, clip_low, clip_high):
    clip = {"clip_low": clip_low, "clip_high": clip_high}
    constants = tensor(old_logp), tensor(advantages), tensor(weights)
    return _with_gradient(lambda logp: rloop.grpo_loss(logp, *constants, **clip), logp)


@function
def kl_loss(logp, ref_logp, weights):
    return _with_gradient(lambda logp: rloop.kl_loss(logp, tensor(ref_logp), tensor(weights)), logp)


@function
def sft_loss(logp, weights):
    return _with_gradient(lambda logp: rloop.sft_loss(logp, tensor(weights)), logp)


@function
def token_weights(lengths, aggregation, max_new_tokens):
    return rloop.token_weights(lengths, aggregation, max_new_tokens)


@function
def overlong_penalty(length, max_new_tokens, buffer):
    return rloop.overlong_penalty(length, max_new_tokens, buffer)


# ---- advantages


@function
def group_advantages(rewards, normalize_std):
    return rloop.group_advantages(tensor(rewards), normalize_std=normalize_std)


@function
def step_advantages(groups, normalize_std, max_new_tokens, overlong_buffer):
    rl = {"normalize_std": normalize_std, "overlong_buffer": overlong_buffer}
    cfg = config(rl=rl, sampling={"max_new_tokens": max_new_tokens})
    groups = [
        [
            trajectory(group["problem"], [1] * sample["length"], sample["reward"])
            for sample in samples
        ]
        for group in groups
        for samples in [group["samples"]]
    ]
    return [[row.advantage for row in rows] for rows in rloop.training_rows(groups, cfg)]


@function
def dynamic_sampling(
    num_problems, seed, iteration, step, drawn, problems_per_step, max_rounds, rewards
):
    rl = {"problems_per_step": problems_per_step, "max_sampling_rounds": max_rounds}
    rl |= {"samples_per_problem": len(rewards[0]), "minibatches": 1}
    run = MemoryRun(config(rl=rl, seed=seed))
    run.progress = Progress(iteration=iteration, problems_drawn=drawn)
    waiting, rounds = [*enumerate(rewards)], []

    def respond(model, tokenizer, problems, cfg, seed, place, **options):
        rounds.append({"seed": str(seed), "problems": list(problems)})
        given = [waiting.pop(0) for _ in problems]
        rows = zip(problems, given, strict=True)
        return [[trajectory(p, [n], r) for r in group] for p, (n, group) in rows], {}

    with patch.object(rloop, "respond", respond), patch.object(rloop, "sampling_copy"):
        problems = list(range(num_problems))
        usable, sampled, drawn, _ = rloop.sample_groups(run, None, None, problems, step)
    usable = [group[0].ids[0] for group in usable]
    return {"rounds": rounds, "usable": usable, "num_sampled": len(sampled), "drawn": drawn}


@function
def rl_learning_rates(steps, lr, warmup_steps):
    run, rates = MemoryRun(config(rl={"lr": lr, "warmup_steps": warmup_steps})), []
    nothing = [], [], 0, {"time/rollout_s": 0.0}

    def update(run, policy, optimizer, usable, reference, lr):
        rates.append(lr)
        return {}

    stand_ins = {"sample_groups": lambda *_: nothing, "update": update}
    stand_ins |= {"sampling_metrics": lambda _: {}, "step_line": lambda *_: ""}
    with patch.multiple(rloop, **stand_ins):
        rloop.explore(run, nn.Linear(1, 1), None, [], [], steps, {})
    return rates


# ---- filter and evaluation


@function
def select_experts(trajectories, max_success_rate, max_per_problem, min_reward):
    rows = [trajectory(t["problem"], t["ids"], t["reward"]) for t in trajectories]
    limits = {"max_success_rate": max_success_rate, "max_per_problem": max_per_problem}
    experts = rloop.select_experts(rows, **limits, min_reward=min_reward)
    place = {id(row): n for n, row in enumerate(rows)}
    return [place[id(expert)] for expert in experts]


@function
def pass_at_k(num_samples, num_correct, k):
    return rloop.pass_at_k(num_samples, num_correct, k)


@function
def bootstrap_interval(values, resamples):
    counts = np.array([np.bincount(indices, minlength=len(values)) for indices in resamples])
    given = SimpleNamespace(multinomial=lambda *_, **__: counts)
    with patch.object(np.random, "default_rng", lambda seed: given):
        return rloop.bootstrap_interval(np.array(values))


@function
def evaluation(rewards, finished, earlier, min_reward):
    heldout = [SimpleNamespace(id=id_) for id_ in rewards]
    samples = len(next(iter(rewards.values())))
    run = MemoryRun(config(eval={"num_samples": samples}, select={"min_reward": min_reward}))
    run.files["evaluations.jsonl"] = [{"num_correct": counts} for counts in earlier]
    groups = [
        [trajectory(id_, [1], r, f) for r, f in zip(group, finished[id_], strict=True)]
        for id_, group in rewards.items()
    ]
    stand_ins = {"respond": lambda *_, **__: (groups, {}), "sampling_copy": lambda *_: None}
    with patch.multiple(rloop, **stand_ins, evaluation_line=lambda *_: ""):
        record = rloop.evaluate(run, None, None, heldout, "rl")
    left_out = ("_low", "_high", "num_problems", "num_samples")
    names = [name for name in record if name.startswith("eval/") and not name.endswith(left_out)]
    return {name.removeprefix("eval/"): record[name] for name in names}


# ---- random numbers and sampling


@function
def seed_of(path):
    return str(rloop.seed_of(*path))


@function
def uniforms(seed, prompt, sample, count):
    return np.random.default_rng((int(seed), prompt, sample)).random(count).tolist()


@function
def next_problems(num_problems, drawn, count, seed):
    return rloop.next_problems(list(range(num_problems)), drawn, count, seed)


@function
def rft_schedule(num_examples, seed, iteration, epochs, batch_size, lr, warmup_steps):
    rft = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "warmup_steps": warmup_steps}
    run, steps = MemoryRun(config(rft=rft, seed=seed)), []
    run.progress = Progress(iteration=iteration)

    def rft_step(run, policy, optimizer, examples):
        steps.append({"lr": optimizer.param_groups[0]["lr"], "examples": examples})
        return 0.0, 0.0

    with patch.object(rloop, "rft_step", rft_step):
        rloop.rft(run, nn.Linear(1, 1), list(range(num_examples)))
    return steps


@function
def sampled_logprobs(logits, temperature, top_p, top_k):
    return sampler.sampled_log_softmax(tensor(logits), temperature, top_p, top_k)


@function
def draw(logprobs, uniforms):
    return sampler.draw(tensor(logprobs), tensor(uniforms))


# ---- optimizer


@function
def adamw(parameters, gradients, lrs, weight_decay, grad_clip):
    run = MemoryRun(config(optimizer={"weight_decay": weight_decay, "grad_clip": grad_clip}))
    policy = nn.ParameterDict({name: nn.Parameter(tensor(v)) for name, v in parameters.items()})
    optimizer = rloop.new_optimizer(run, policy, resume=False)
    steps = []
    for gradient, lr in zip(gradients, lrs, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        loss = sum((policy[name] * tensor(values)).sum() for name, values in gradient.items())
        loss.backward()
        norm = rloop.finish_step(run, policy, optimizer, 0.0, [])
        after = {name: parameter.tolist() for name, parameter in policy.items()}
        steps.append({"grad_norm": norm, "parameters": after})
    return steps


# ---- what stands in for a run


def config(**values) -> Config:
    """A config of the given values; the others play no part in the case."""
    known = {f.name for f in fields(Config)}
    parts = {name: v if name not in SECTIONS else SECTIONS[name](**v) for name, v in values.items()}
    assert parts.keys() <= known
    return Config(**parts)


def trajectory(problem, ids, reward, finished=True, **values) -> Trajectory:
    """A trajectory of which the case says only this much."""
    unsaid = {"iteration": 0, "step": 1, "prompt_ids": [1], "logps": [0.0] * len(ids)}
    unsaid |= {"response": "", "reason": ""} | values
    return Trajectory(problem=problem, ids=ids, reward=reward, finished=finished, **unsaid)


class MemoryRun:
    """A run.Run without a directory."""

    def __init__(self, cfg: Config):
        self.cfg, self.progress = cfg, Progress()
        self.files: dict[str, list[dict]] = {}
        self.rl_steps = 0

    def lines(self, name: str) -> list[dict]:
        return self.files.get(name, [])

    read = lines

    def append(self, name: str, records: list[dict]) -> None:
        self.files.setdefault(name, []).extend(records)

    def commit(self, record, line=None, trajectories=(), **progress) -> None:
        for group in trajectories:
            name = f"trajectories/iteration_{self.progress.iteration + 1}.jsonl"
            self.append(name, [vars(t) for t in group])
        self.progress = Progress(**{**vars(self.progress), **progress})
        self.append("metrics.jsonl", [record])

    def evaluation_pending(self, num_steps: int) -> bool:
        return False

    def checkpoint_if(self, *_) -> None:
        pass

    export = finish_iteration = checkpoint_if


def main(arguments: list[str]) -> None:
    global DTYPE
    DTYPE = torch.float32 if arguments == ["float32"] else torch.float64
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if request["function"] not in FUNCTIONS:
            reply = {"skip": f"no {request['function']}"}
        else:
            try:
                reply = {"output": answer(request)}
            except Exception as error:  # a case that fails must not end the others
                reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
