"""The reference as a port: answers the cases by calling this project's functions.

    python -m golden.check python -m golden.reference             in float64, as make does
    python -m golden.check python -m golden.reference float32     in float32, as most ports do

What a case needs beside pure functions (a run directory, a tokenizer's files, the sampler) is stood
in for here; every formula is the product's.
"""

import json
import math
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

import hf
import model
import rloop
import sampler
import verify
from config import SECTIONS, Config, DataConfig
from data.tokenizer import Tokenizer
from golden.vectors import NOT_FINITE
from packing import Row
from rloop import Trajectory
from run import Progress

DTYPE = torch.float64
FUNCTIONS = {}  # by name; the inputs of a case are their keyword arguments


def function(f):
    """Enters a function in FUNCTIONS."""
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
    """A tensor of nested lists; a tensor as it is."""
    if isinstance(values, Tensor):
        return values
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
    cfg = run_config(rl=rl, sampling={"max_new_tokens": max_new_tokens})
    groups = [
        [trajectory(group["problem"], [1] * s["length"], s["reward"]) for s in group["samples"]]
        for group in groups
    ]
    return [[row.advantage for row in rloop.training_rows(group, cfg)] for group in groups]


@function
def dynamic_sampling(
    num_problems,
    seed,
    iteration,
    step,
    drawn,
    problems_per_step,
    max_rounds,
    rewards,
    lengths,
    max_new_tokens,
    overlong_buffer,
):
    rl = {"problems_per_step": problems_per_step, "max_sampling_rounds": max_rounds}
    rl |= {"samples_per_problem": len(rewards[0]), "minibatches": 1}
    rl |= {"overlong_buffer": overlong_buffer}
    run = MemoryRun(run_config(rl=rl, seed=seed, sampling={"max_new_tokens": max_new_tokens}))
    run.progress = Progress(iteration=iteration, problems_drawn=drawn)
    waiting, rounds = [*enumerate(zip(rewards, lengths, strict=True))], []

    def respond(model, tokenizer, problems, cfg, seed, place, **options):
        rounds.append({"seed": str(seed), "problems": list(problems)})
        given = [waiting.pop(0) for _ in problems]
        rows = zip(problems, given, strict=True)
        groups = [(p, n, zip(*columns, strict=True)) for p, (n, columns) in rows]
        return [[trajectory(p, [n] * size, r) for r, size in group] for p, n, group in groups], {}

    with patch.object(rloop, "respond", respond), patch.object(rloop, "sampling_copy"):
        problems = list(range(num_problems))
        usable, sampled, drawn, _ = rloop.sample_groups(run, None, None, problems, step)
    usable = [group[0].ids[0] for group in usable]
    return {"rounds": rounds, "usable": usable, "num_sampled": len(sampled), "drawn": drawn}


@function
def rl_learning_rates(steps, lr, warmup_steps):
    run, rates = MemoryRun(run_config(rl={"lr": lr, "warmup_steps": warmup_steps})), []
    nothing = [], [], 0, {"time/rollout_s": 0.0}

    def update(run, policy, optimizer, usable, theta_i, lr):
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
    run = MemoryRun(run_config(eval={"num_samples": samples}, select={"min_reward": min_reward}))
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
    run, steps = MemoryRun(run_config(rft=rft, seed=seed)), []
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
    run = MemoryRun(run_config(optimizer={"weight_decay": weight_decay, "grad_clip": grad_clip}))
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


# ---- layers


@function
def rms_norm(x, weight, eps):
    layer = model.RMSNorm(len(weight), eps).to(DTYPE)
    return functional_call(layer, {"weight": tensor(weight)}, tensor(x))


@function
def rope_frequencies(head_dim, rope_theta, rope_scaling):
    values = {"head_dim": head_dim, "rope_theta": rope_theta, "rope_scaling": rope_scaling}
    return model.rope_frequencies(SimpleNamespace(**values))


@function
def rotate(x, cos, sin):
    return model.rotate(tensor(x), tensor(cos)[:, None], tensor(sin)[:, None])


@function
def attention(q, k, v):
    return model.causal(0, tensor(q)[None], tensor(k)[None], tensor(v)[None])[0]


@function
def swiglu(x, gate, up, down):
    sizes = {"hidden_size": len(gate[0]), "intermediate_size": len(gate)}
    layer = model.MLP(SimpleNamespace(**sizes)).to(DTYPE)
    weights = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    weights = {f"{name}.weight": tensor(w) for name, w in weights.items()}
    return functional_call(layer, weights, tensor(x))


LEARNED = {"rms_norm": ["x", "weight"], "rotate": ["x"], "attention": ["q", "k", "v"]}
LEARNED |= {"swiglu": ["x", "gate", "up", "down"]}


@function
def layer_gradients(layer, inputs, gradient):
    leaves = {name: tensor(inputs[name]).requires_grad_() for name in LEARNED[layer]}
    FUNCTIONS[layer](**inputs | leaves).backward(tensor(gradient))
    return {name: leaf.grad for name, leaf in leaves.items()}


# ---- the model


def empty_policy(config: dict) -> model.Transformer:
    """A model of a config.json."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return model.Transformer(hf.read_config(Path(folder))).to(DTYPE)


def policy_of(config: dict, weights: dict, unknown_ids=()) -> model.Transformer:
    """The model with these weights."""
    policy = empty_policy(config)
    policy.load_state_dict({name: tensor(weight) for name, weight in weights.items()})
    policy.unknown_ids = torch.tensor(unknown_ids, dtype=torch.long) if unknown_ids else None
    return policy


def weights_of(policy) -> dict:
    return {name: weight.tolist() for name, weight in policy.named_parameters()}


def gradients_of(policy) -> dict:
    return {name: weight.grad.tolist() for name, weight in policy.named_parameters()}


@function
def model_forward(config, weights, ids):
    return policy_of(config, weights)(torch.tensor(ids))


@function
def model_gradients(config, weights, examples):
    policy, rows = policy_of(config, weights), [SimpleNamespace(**e) for e in examples]
    with traced_logprobs() as logps, patch.object(rloop, "finish_step", lambda *_: 0.0):
        loss, _ = rloop.rft_step(MemoryRun(run_config()), policy, None, rows)
    logps = [logps[id(row.ids)] for row in rows]
    return {"logps": logps, "loss": loss, "gradients": gradients_of(policy)}


@function
def model_training(config, weights, examples, steps, lr, weight_decay, grad_clip):
    run = MemoryRun(run_config(optimizer={"weight_decay": weight_decay, "grad_clip": grad_clip}))
    policy, rows = policy_of(config, weights), [SimpleNamespace(**e) for e in examples]
    optimizer = rloop.new_optimizer(run, policy, resume=False)
    optimizer.param_groups[0]["lr"] = lr
    output = {"losses": [], "grad_norms": []}
    for step in range(1, steps + 1):
        loss, norm = rloop.rft_step(run, policy, optimizer, rows)
        output["losses"].append(loss)
        output["grad_norms"].append(norm)
        if step in (1, steps):
            output[f"after_{step}"] = weights_of(policy)
    return output


@function
def policy_gradient(
    config, weights, groups, unknown_ids, temperature, max_new_tokens, micro_batch_tokens, **rl
):
    policy = policy_of(config, weights, unknown_ids)
    rl |= {"recompute_logprobs": rl["importance_cap"] > 0}
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    compute = {"micro_batch_tokens": micro_batch_tokens}
    cfg = run_config(rl=rl, sampling=sampling, compute=compute)
    rows_NG = [[Row(g["prompt_ids"], **sample) for sample in g["samples"]] for g in groups]
    with traced_logprobs() as logps:
        totals = rloop.accumulate_gradient(policy, rows_NG, cfg)
    counts = {name: int(totals.pop(name)) for name in ("tokens", "clip_low", "clip_high")}
    logps = [[logps[id(row.ids)] for row in rows] for rows in rows_NG]
    return {"logps": logps} | totals | counts | {"gradients": gradients_of(policy)}


@contextmanager
def traced_logprobs():
    """Fills a dictionary: id(response ids) to the log-probs that token_logprobs gives them."""
    logps, token_logprobs = {}, rloop.token_logprobs

    def traced(policy, batch, *temperature):
        logp_Q, entropy_Q = token_logprobs(policy, batch, *temperature)
        parts = logp_Q.detach().split([len(row.ids) for row in batch.rows])
        logps.update((id(row.ids), part) for row, part in zip(batch.rows, parts, strict=True))
        return logp_Q, entropy_Q

    with patch.object(rloop, "token_logprobs", traced):
        yield logps


@function
def sample(
    config, weights, prompts, uniforms, stop_ids, unknown_ids, seed, first_prompt, **options
):
    policy = policy_of(config, weights, unknown_ids)
    place = {"seed": int(seed), "first_prompt": first_prompt, "max_rows": 3, "progress": False}
    groups = sampler.sample(policy, prompts, stop_ids=set(stop_ids), **place, **options)
    return [[vars(completion) for completion in group] for group in groups]


# ---- one iteration


@function
def iteration(config, weights, prompts, samples, **values):
    policy, run = policy_of(config, weights), MemoryRun(run_config(iterations=1, **values))
    problems = [SimpleNamespace(id=str(p)) for p in range(len(prompts))]
    trace = Trace(prompts, samples)
    stand_ins = {name: getattr(trace, name) for name in Trace.WRAPPED}
    stand_ins |= {"respond": trace.respond, "evaluate": lambda *_: {}, "step_line": lambda *_: ""}
    with traced_logprobs() as trace.logps, patch.multiple(rloop, **stand_ins):
        rloop.run_rloop(run, policy, None, problems, [])
    return {"steps": trace.steps, "experts": trace.experts, "rft": trace.rft}


class Trace:
    """Gives the samples of a case to the loop, and records what the loop's functions do."""

    WRAPPED = ("update", "training_rows", "accumulate_gradient", "finish_step", "rft_step")
    WRAPPED += ("token_weights", "filter_experts")

    def __init__(self, prompts: list, samples: list):
        self.prompts, self.samples = prompts, samples
        self.steps, self.rft, self.experts = [], [], []
        self.place: dict[int, list[int]] = {}  # id(response ids) to [step, group, sample]
        self.ids = []  # keeps these lists alive, so that each id stays its own
        self.original = {name: getattr(rloop, name) for name in self.WRAPPED}

    def respond(self, policy, tokenizer, problems, cfg, seed, place, **options):
        groups = []
        for problem in problems:
            step = place["step"] - 1
            number = sum(p[0] == step and p[2] == 0 for p in self.place.values())
            given = self.samples[step][number]
            assert str(given["problem"]) == problem.id
            rows = []
            for n, sample in enumerate(given["samples"]):
                row = trajectory(problem.id, **sample, prompt_ids=self.prompts[given["problem"]])
                row.step, self.place[id(row.ids)] = place["step"], [step, number, n]
                rows.append(row)
            self.ids += [row.ids for row in rows]
            groups.append(rows)
        return groups, {"time/rollout_s": 0.0}

    def update(self, run, policy, optimizer, groups, theta_i, lr):
        usable = [self.place[id(group[0].ids)][1] for group in groups]
        self.steps.append({"lr": lr, "usable": usable, "advantages": [], "updates": []})
        return self.original["update"](run, policy, optimizer, groups, theta_i, lr)

    def training_rows(self, group, cfg):
        rows = self.original["training_rows"](group, cfg)
        self.steps[-1]["advantages"].append([row.advantage for row in rows])
        return rows

    def accumulate_gradient(self, policy, rows_NG, cfg):
        entry = {"groups": [self.place[id(rows[0].ids)][1] for rows in rows_NG]}
        self.steps[-1]["updates"].append(entry)
        totals = self.original["accumulate_gradient"](policy, rows_NG, cfg)
        entry["logps"] = [[self.logps[id(row.ids)] for row in rows] for rows in rows_NG]
        names = ("loss", "kl", "entropy", "gap", "gap_max")
        entry |= {name: totals[name] for name in names}
        entry |= {name: int(totals[name]) for name in ("tokens", "clip_low", "clip_high")}
        return totals

    def token_weights(self, lengths, aggregation, max_new_tokens):
        weights = self.original["token_weights"](lengths, aggregation, max_new_tokens)
        self.steps[-1]["updates"][-1]["token_weights"] = weights
        return weights

    def filter_experts(self, run):
        experts = self.original["filter_experts"](run)
        self.experts = [self.place[id(expert.ids)] for expert in experts]
        return experts

    def rft_step(self, run, policy, optimizer, examples):
        places = [self.place[id(example.ids)] for example in examples]
        entry = {"lr": optimizer.param_groups[0]["lr"], "examples": places}
        self.rft.append(entry)
        entry["loss"], norm = self.original["rft_step"](run, policy, optimizer, examples)
        entry["logps"] = [self.logps[id(example.ids)] for example in examples]
        return entry["loss"], norm

    def finish_step(self, run, policy, optimizer, loss, rows_NG):
        entry = self.rft[-1] if self.rft else self.steps[-1]["updates"][-1]
        entry["gradients"] = gradients_of(policy)
        norm = self.original["finish_step"](run, policy, optimizer, loss, rows_NG)
        entry["grad_norm"], entry["weights"] = norm, weights_of(policy)
        return norm


# ---- text


@contextmanager
def tokenizer_of(files: dict, chat: bool = False):
    """The tokenizer of a model directory with these JSON files."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_text(json.dumps(content), encoding="utf-8")
        yield Tokenizer(folder, chat=chat)


@function
def encode(files, text, add_special_tokens):
    with tokenizer_of(files) as tokenizer:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)


@function
def decode(files, ids):
    with tokenizer_of(files) as tokenizer:
        return tokenizer.decode(ids)


@function
def render_chat(files, messages, add_generation_prompt):
    with tokenizer_of(files) as tokenizer:
        return tokenizer.render_chat(messages, add_generation_prompt=add_generation_prompt)


@function
def encode_prompt(files, question, prompt, chat_template, context):
    data = DataConfig(prompt=prompt, chat_template=chat_template)
    with tokenizer_of(files) as tokenizer:
        return tokenizer.encode_prompt(question, data, [tuple(message) for message in context])


@function
def special_ids(files, chat, vocab_size):
    with tokenizer_of(files, chat) as tokenizer:
        stops = {"stop_ids": sorted(tokenizer.stop_ids), "eos_id": tokenizer.eos_id}
        return stops | {"unknown_ids": tokenizer.unknown_ids(vocab_size)}


# ---- verdicts


@function
def verify_countdown(response, numbers, target):
    return {"correct": verify.verify_countdown(response, numbers, target).correct}


@function
def answers_match(gold, answer, tolerance):
    return {"correct": verify.answers_match(gold, answer, tolerance=tolerance).correct}


@function
def verify_math(response, gold, tolerance):
    return {"correct": verify.verify_math(response, gold, tolerance=tolerance).correct}


# ---- what stands in for a run


def run_config(**values) -> Config:
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

    def shards(self, name: str) -> list[str]:
        return [name]

    def append(self, name: str, records: list[dict], own: bool = False) -> None:
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

    def phase_start(self, policy) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in policy.state_dict().items()}


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
