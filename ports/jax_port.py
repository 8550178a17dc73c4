"""A port of RLoop in jax: batched and compiled, gradients by jax.grad, float32.

    python -m golden.check python ports/jax_port.py
    python ports/jax_port.py train SETTINGS.json           one RLoop iteration with its own samples

Written from golden/README.md and docs/porting.md; nothing is imported from RLoop. From numpy_port
come the parts that are calls of other libraries in any Python port: the random streams (numpy) and
the text (tokenizers, jinja2). JAX_ENABLE_X64=1 in front computes in float64.

Shapes: B responses, T tokens of a prompt with its response, V vocabulary, H query heads, K key
heads, E head width. Rows are padded behind their end; column t belongs to token t.
"""

import ast
import functools
import itertools
import json
import math
import operator
import re
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy_port import decode, encode, encode_prompt, render_chat, special_ids
from numpy_port import next_problems, permutation, seed_of, uniforms
from safetensors.numpy import load_file, save_file

UNKNOWN = -3.4028235e38  # the logit of ids that have no token
MAX_TEXT = 1000  # letters of a Countdown answer


# Stage losses: of arrays of any one shape; entries of weight 0 are padding


def grpo_loss(logp, old_logp, advantages, weights, clip_low, clip_high):
    """PPO's clipped objective with two clips. Returns the loss and its counts."""
    used = weights != 0
    rho = jnp.exp(jnp.where(used, logp - old_logp, 0.0))
    advantages = jnp.where(used, advantages, 0.0)
    clipped = jnp.clip(rho, 1 - clip_low, 1 + clip_high)
    counts = {
        "tokens": jnp.sum(used),
        "clip_low": jnp.sum((advantages < 0) & (rho < 1 - clip_low)),
        "clip_high": jnp.sum((advantages > 0) & (rho > 1 + clip_high)),
    }
    return -jnp.sum(weights * jnp.minimum(rho * advantages, clipped * advantages)), counts


def kl_loss(logp, ref_logp, weights):
    """The k3 estimate of KL(policy || reference)."""
    delta = jnp.where(weights != 0, ref_logp - logp, 0.0)
    return jnp.sum(weights * (jnp.exp(delta) - delta - 1))


def sft_loss(logp, weights):
    """The weighted negative log-likelihood."""
    return -jnp.sum(weights * jnp.where(weights != 0, logp, 0.0))


def with_gradient(loss, has_aux=False):
    """The golden function of a loss: its value and its gradient by its first argument."""

    def function(**inputs):
        arguments = [arrays(value) for value in inputs.values()]
        value, gradient = jax.value_and_grad(loss, has_aux=has_aux)(*arguments)
        value, counts = value if has_aux else (value, {})
        return {"loss": value, "gradient": gradient, **counts}

    return function


def token_weights(lengths, aggregation, max_new_tokens):
    """The weight of each token of a response, from the lengths of ALL responses of the step."""
    count = len(lengths)
    return {
        "token": lambda: [1 / sum(lengths)] * count,
        "sequence": lambda: [1 / (length * count) for length in lengths],
        "constant": lambda: [1 / (count * max_new_tokens)] * count,
    }[aggregation]()


def overlong_penalty(length, max_new_tokens, buffer):
    """DAPO's soft penalty: 0 until the buffer begins, -1 at max_new_tokens."""
    return -max(0.0, (length - (max_new_tokens - buffer)) / buffer) if buffer else 0.0


# Stage advantages


def group_advantages(rewards, normalize_std):
    """Rewards [N, G] minus their group's mean, divided by its std; exactly 0 in flat groups."""
    rewards = arrays(rewards)
    advantages = rewards - rewards.mean(axis=1, keepdims=True)
    if normalize_std:
        advantages = advantages / (rewards.std(axis=1, keepdims=True) + 1e-6)
    return jnp.where(jnp.all(rewards == rewards[:, :1], axis=1, keepdims=True), 0.0, advantages)


def step_advantages(groups, normalize_std, max_new_tokens, overlong_buffer):
    """The advantages of a step's groups; the over-long penalty belongs to the reward."""
    penalty = functools.partial(
        overlong_penalty, max_new_tokens=max_new_tokens, buffer=overlong_buffer
    )
    rewards = [[s["reward"] + penalty(s["length"]) for s in group["samples"]] for group in groups]
    return group_advantages(rewards, normalize_std)


def sample_step(sample_round, problems_per_step, max_rounds):
    """The groups of a step, and the places of the usable ones; flat ones are replaced.
    sample_round: number of the round and of groups to the groups, each a list of rewards first."""
    groups, usable = [], []
    for number in range(max_rounds):
        for rewards, group in sample_round(number, problems_per_step - len(usable)):
            if len(set(rewards)) > 1:
                usable.append(len(groups))
            groups.append(group)
        if len(usable) == problems_per_step:
            break
    return groups, usable


def dynamic_sampling(
    num_problems, seed, iteration, step, drawn, problems_per_step, max_rounds, rewards, **unused
):
    """Which groups a step samples and keeps. Lengths and their penalty play no part."""
    rounds, rest = [], iter(rewards)

    def sample_round(number, count):
        position = drawn + sum(len(earlier["problems"]) for earlier in rounds)
        problems = next_problems(num_problems, position, count, seed)
        rounds.append({"seed": seed_of([seed, iteration, step, number]), "problems": problems})
        return [(row, None) for row in itertools.islice(rest, count)]

    groups, usable = sample_step(sample_round, problems_per_step, max_rounds)
    sampled = len(groups)
    return {"rounds": rounds, "usable": usable, "num_sampled": sampled, "drawn": drawn + sampled}


def rl_learning_rates(steps, lr, warmup_steps):
    """Linear warm-up, then constant."""
    return [lr * min(1.0, step / (warmup_steps + 1)) for step in range(1, steps + 1)]


# Stage filter


def select_experts(trajectories, max_success_rate, max_per_problem, min_reward):
    """The places of the phase's experts: successes at problems that are solved rarely."""
    by_problem = {}
    for place, trajectory in enumerate(trajectories):
        by_problem.setdefault(trajectory["problem"], []).append((place, trajectory))
    experts = []
    for rows in by_problem.values():
        successes = [(place, t["ids"]) for place, t in rows if t["reward"] >= min_reward]
        if len(successes) / len(rows) <= max_success_rate:
            unique = list({tuple(ids): place for place, ids in reversed(successes)}.values())[::-1]
            last, kept = len(unique) - 1, min(len(unique), max_per_problem)
            steps = [i * last / (kept - 1) for i in range(kept)] if kept > 1 else [0] * kept
            experts += [unique[round(step)] for step in steps]
    return experts


def rft_schedule(num_examples, seed, iteration, epochs, batch_size, lr, warmup_steps):
    """Rate and examples of each optimizer step of fine-tuning."""
    batches = []
    for epoch in range(epochs):
        order = permutation((seed, iteration, epoch), num_examples)
        batches += [order[i : i + batch_size] for i in range(0, num_examples, batch_size)]
    count = len(batches)
    rates = [lr * min((s + 1) / (warmup_steps + 1), (count - s) / count) for s in range(count)]
    return [{"lr": rate, "examples": b} for rate, b in zip(rates, batches, strict=True)]


# Stage evaluation


def pass_at_k(num_samples, num_correct, k):
    """The unbiased estimate of the chance that one of k samples is right."""
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def bootstrap_interval(values, resamples):
    """The middle 95% of the means of the resamples."""
    means = arrays(values)[jnp.asarray(resamples)].mean(axis=1)
    return jnp.quantile(means, arrays([0.025, 0.975]))


def evaluation(rewards, finished, earlier, min_reward):
    """The metrics of an evaluation, some of them in view of the earlier ones."""
    right = {problem: sum(r >= min_reward for r in row) for problem, row in rewards.items()}
    before = {problem for counts in earlier for problem, count in counts.items() if count > 0}
    now = {problem for problem, count in right.items() if count > 0}
    n, num = len(next(iter(rewards.values()))), len(right)
    ks = [2**i for i in range(n.bit_length())] + [n]
    ended = [end for row in finished.values() for end in row]
    return {
        f"avg@{n}": sum(right.values()) / (n * num),
        **{f"pass@{k}": sum(pass_at_k(n, c, k) for c in right.values()) / num for k in ks},
        "forgotten_share": len((before - now) & right.keys()) / num,
        "union_share": len((before | now) & right.keys()) / num,
        "truncated_share": ended.count(False) / len(ended),
    }


# Stage sampling


def sampled_logprobs(logits, temperature, top_p, top_k):
    """Log-probs [R, V] of the distribution that is sampled from; -inf for tokens cut off."""
    logits = arrays(logits)
    if temperature == 0:
        best = jax.nn.one_hot(logits.argmax(axis=-1), logits.shape[-1], dtype=bool)
        return jnp.where(best, 0.0, -jnp.inf)
    logp = jax.nn.log_softmax(logits / temperature)
    if top_k == 0 and top_p >= 1:
        return logp
    order = jnp.argsort(-logp, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logp, order, axis=-1)
    if top_k > 0:
        ranked = jnp.where(jnp.arange(ranked.shape[-1]) < top_k, ranked, -jnp.inf)
    if top_p < 1:
        p = jax.nn.softmax(ranked)
        ranked = jnp.where(jnp.cumsum(p, axis=-1) - p < top_p, ranked, -jnp.inf)
    back = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(jax.nn.log_softmax(ranked), back, axis=-1)


def draw(logprobs, uniforms):
    """A token for each row: the first whose cumulative probability exceeds the point."""
    cumulative = jnp.cumsum(jnp.exp(arrays(logprobs)), axis=-1)
    total = cumulative[:, -1:]
    points = jnp.minimum(arrays(uniforms)[:, None] * total, jnp.nextafter(total, 0 * total))
    return jnp.sum(cumulative <= points, axis=-1)


# Stage optimizer


class AdamW:
    """AdamW with clipping by the norm of all parameters."""

    def __init__(self, weights, weight_decay, grad_clip):
        self.first = self.second = jax.tree.map(jnp.zeros_like, weights)
        self.weight_decay, self.grad_clip, self.count = weight_decay, grad_clip, 0

    def step(self, weights, gradients, lr):
        """Weights after one update, and the norm of the gradients before clipping."""
        self.count += 1
        corrections = 1 - 0.9**self.count, 1 - 0.999**self.count  # too coarse in float32
        settings = lr, self.weight_decay, self.grad_clip, *corrections
        weights, self.first, self.second, norm = adamw_update(
            weights, self.first, self.second, gradients, *settings
        )
        return weights, norm


@jax.jit
def adamw_update(weights, first, second, gradients, lr, weight_decay, grad_clip, c1, c2):
    """Weights and moments after one update, and the norm of the gradients."""
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradients)))
    scale = jnp.minimum(1.0, grad_clip / (norm + 1e-6))
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * (g * scale), first, gradients)
    second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * (g * scale) ** 2, second, gradients)

    def moved(w, m, v):
        return w - lr * weight_decay * w - lr * (m / c1) / (jnp.sqrt(v / c2) + 1e-8)

    return jax.tree.map(moved, weights, first, second), first, second, norm


def adamw(parameters, gradients, lrs, weight_decay, grad_clip):
    """Optimizer steps with given gradients and rates."""
    parameters, steps = arrays(parameters), []
    optimizer = AdamW(parameters, weight_decay, grad_clip)
    for gradient, lr in zip(gradients, lrs, strict=True):
        parameters, norm = optimizer.step(parameters, arrays(gradient), lr)
        steps.append({"grad_norm": norm, "parameters": parameters})
    return steps


# Stage layers: leading axes are free


def rms_norm(x, weight, eps):
    """x [.., D] by the root of its mean square."""
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def rope_frequencies(head_dim, rope_theta, rope_scaling):
    """The angle by which each pair of a head turns from one position to the next."""
    frequencies = rope_theta ** (-2.0 * np.arange(head_dim // 2) / head_dim)
    if rope_scaling is None:
        return frequencies
    low, high = rope_scaling["low_freq_factor"], rope_scaling["high_freq_factor"]
    turns = rope_scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (blend + (1 - blend) / rope_scaling["factor"])


def rotate(x, cos, sin):
    """x [.., T, H, E] turned by the angles of cos and sin [T, E]."""
    real, imaginary = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-imaginary, real], axis=-1)
    return x * cos[:, None] + turned * sin[:, None]


def attention(q, k, v):
    """Causal attention, q [.., T, H, E], k and v [.., T, K, E]."""
    k, v = (jnp.repeat(heads, q.shape[-2] // k.shape[-2], axis=-2) for heads in (k, v))
    scores = jnp.einsum("...the,...she->...hts", q, k) / math.sqrt(q.shape[-1])
    past = jnp.tril(jnp.ones(scores.shape[-2:], dtype=bool))
    p = jax.nn.softmax(jnp.where(past, scores, -jnp.inf))
    return jnp.einsum("...hts,...she->...the", p, v)


def swiglu(x, gate, up, down):
    """down (silu(gate x) * (up x))."""
    return (jax.nn.silu(x @ gate.T) * (x @ up.T)) @ down.T


# Stage model: weights by Hugging Face's names, which say what a model has


class Fixed(NamedTuple):
    """What of a model is not learned."""

    frequencies: jax.Array  # [E / 2]
    eps: float
    unknown: jax.Array  # bool [V]: ids that have no token


def fixed_of(config, unknown_ids=()):
    """The fixed part of a model."""
    rope = rope_frequencies(*(config[key] for key in ("head_dim", "rope_theta", "rope_scaling")))
    return Fixed(
        frequencies=arrays(rope),
        eps=config["rms_norm_eps"],
        unknown=jnp.zeros(config["vocab_size"], bool).at[jnp.array(unknown_ids, int)].set(True),
    )


def forward(weights, fixed, ids):
    """Logits [B, T, V] of ids [B, T]."""
    angles = jnp.outer(jnp.arange(ids.shape[1]), jnp.tile(fixed.frequencies, 2))
    cos, sin = jnp.cos(angles), jnp.sin(angles)

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def norm(x, name):
        weight = weights.get(f"{name}.weight")
        return x if weight is None else rms_norm(x, weight, fixed.eps)

    def heads(x, name):
        return linear(x, name).reshape(*ids.shape, -1, angles.shape[1])

    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(sum(name.endswith(".input_layernorm.weight") for name in weights)):
        prefix = f"model.layers.{layer}"
        own, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        y = norm(x, f"{prefix}.input_layernorm")
        q = rotate(norm(heads(y, f"{own}.q_proj"), f"{own}.q_norm"), cos, sin)
        k = rotate(norm(heads(y, f"{own}.k_proj"), f"{own}.k_norm"), cos, sin)
        y = attention(q, k, heads(y, f"{own}.v_proj"))
        x = x + linear(y.reshape(*ids.shape, -1), f"{own}.o_proj")
        y = norm(x, f"{prefix}.post_attention_layernorm")
        x = x + swiglu(
            y, *(weights[f"{mlp}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        )
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return norm(x, "model.norm") @ head.T


def token_logprobs(weights, fixed, ids, temperature):
    """Log-probs and entropies [B, T] of each token given those before it; 0 for the first."""
    logits = forward(weights, fixed, ids)[:, :-1] / temperature
    logp = jax.nn.log_softmax(jnp.where(fixed.unknown, UNKNOWN, logits))
    entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
    taken = jnp.take_along_axis(logp, ids[:, 1:, None], axis=-1)[..., 0]
    return [jnp.pad(column, ((0, 0), (1, 0))) for column in (taken, entropy)]


def rl_loss(weights, fixed, batch, temperature, clip_low, clip_high, kl_coef):
    """The loss of an optimizer step of RL, and its metrics."""
    logp, entropy = token_logprobs(weights, fixed, batch["ids"], temperature)
    used = batch["weight"]
    policy, counts = grpo_loss(
        logp, batch["old_logp"], batch["advantage"], used, clip_low, clip_high
    )
    kl = kl_loss(logp, batch["ref_logp"], used) if "ref_logp" in batch else 0.0
    gap = jnp.where(used != 0, jnp.abs(logp - batch["sampler_logp"]), 0.0)
    sums = {"entropy": jnp.sum(entropy * (used != 0)), "gap": gap.sum(), "gap_max": gap.max()}
    return policy + kl_coef * kl, {"logp": logp, "kl": kl, **sums, **counts}


def rft_loss(weights, fixed, batch):
    """The loss of an optimizer step of fine-tuning, and the log-probs."""
    logp, _ = token_logprobs(weights, fixed, batch["ids"], 1.0)
    return sft_loss(logp, batch["weight"]), logp


rl_value_and_grad = jax.jit(jax.value_and_grad(rl_loss, has_aux=True))
rft_value_and_grad = jax.jit(jax.value_and_grad(rft_loss, has_aux=True))
jitted_forward = jax.jit(forward)
jitted_logprobs = jax.jit(token_logprobs)


def batch_of(rows, **columns):
    """Arrays [B, T] of rows with prompt_ids and ids: the ids, and columns, which have a value or
    one a token for each row, and 0 elsewhere. Sizes are rounded up, so that few are compiled."""
    longest = max(len(row["prompt_ids"]) + len(row["ids"]) for row in rows)
    shape = -len(rows) // 8 * -8, -longest // 16 * -16
    batch = {name: np.zeros(shape) for name in columns} | {"ids": np.zeros(shape, int)}
    for b, (row, place) in enumerate(zip(rows, response_places(rows), strict=True)):
        batch["ids"][b, : place[1].stop] = row["prompt_ids"] + row["ids"]
        for name, values in columns.items():
            batch[name][place] = values[b]
    return {name: jnp.asarray(column) for name, column in batch.items()}


def response_places(rows):
    """Where the response of each row stands in an array [B, T]."""
    starts = [len(row["prompt_ids"]) for row in rows]
    return [(b, slice(s, s + len(row["ids"]))) for b, (s, row) in enumerate(zip(starts, rows))]


def at_responses(column, rows):
    """The values of an array [B, T] for each row, one a response token."""
    column = np.asarray(column)
    return [column[place] for place in response_places(rows)]


def model_forward(config, weights, ids):
    """Logits of each row."""
    return jitted_forward(arrays(weights), fixed_of(config), jnp.array(ids))


def sft_gradients(weights, fixed, examples):
    """Log-probs, loss and gradients of fine-tuning on the examples, at temperature 1."""
    share = 1 / sum(len(example["ids"]) for example in examples)
    batch = batch_of(examples, weight=[share] * len(examples))
    (loss, logp), gradients = rft_value_and_grad(weights, fixed, batch)
    return {"logps": at_responses(logp, examples), "loss": loss, "gradients": gradients}


def model_gradients(config, weights, examples):
    """The gradient of fine-tuning."""
    return sft_gradients(arrays(weights), fixed_of(config), examples)


def model_training(config, weights, examples, steps, lr, weight_decay, grad_clip):
    """Optimizer steps on all examples."""
    weights, result = arrays(weights), {"losses": [], "grad_norms": []}
    optimizer = AdamW(weights, weight_decay, grad_clip)
    for step in range(1, steps + 1):
        output = sft_gradients(weights, fixed_of(config), examples)
        weights, norm = optimizer.step(weights, output["gradients"], lr)
        result["losses"].append(output["loss"])
        result["grad_norms"].append(norm)
        result[f"after_{step}"] = weights
    return result


def rl_gradients(weights, fixed, groups, rl, temperature, max_new_tokens):
    """The gradient of one optimizer step of RL, and its metrics. rl: the settings of the loss."""
    rows = [{**s, "prompt_ids": g["prompt_ids"]} for g in groups for s in g["samples"]]
    by_row = token_weights([len(row["ids"]) for row in rows], rl["aggregation"], max_new_tokens)
    columns = {
        "weight": by_row,
        "advantage": [row["advantage"] for row in rows],
        "sampler_logp": [row["sampler_logps"] for row in rows],
        "old_logp": [row.get("old_logps", row["sampler_logps"]) for row in rows],
    }
    if rl["importance_cap"] > 0:
        pairs = zip(columns["old_logp"], columns["sampler_logp"], strict=True)
        ratios = [np.exp(np.subtract(old, sampler)) for old, sampler in pairs]
        capped = [np.minimum(ratio, rl["importance_cap"]) for ratio in ratios]
        columns["weight"] = [w * ratio for w, ratio in zip(by_row, capped, strict=True)]
    if rl["kl_coef"] > 0:
        columns["ref_logp"] = [row["ref_logps"] for row in rows]
    settings = [rl[key] for key in ("clip_low", "clip_high", "kl_coef")]
    batch = batch_of(rows, **columns)
    (loss, sums), gradients = rl_value_and_grad(weights, fixed, batch, temperature, *settings)
    logps = iter(at_responses(sums.pop("logp"), rows))
    logps = [list(itertools.islice(logps, len(group["samples"]))) for group in groups]
    return {"token_weights": by_row, "logps": logps, "loss": loss, **sums, "gradients": gradients}


def policy_gradient(config, weights, groups, unknown_ids, temperature, max_new_tokens, **rl):
    """The same from a request. How finely the step is cut changes nothing."""
    fixed = fixed_of(config, unknown_ids)
    return rl_gradients(arrays(weights), fixed, groups, rl, temperature, max_new_tokens)


@functools.partial(jax.jit, static_argnames=("temperature", "top_p", "top_k"))
def sample_rows(weights, fixed, ids, lengths, uniforms, temperature, top_p, top_k):
    """A token and its log-prob for each of uniforms [B, M], behind prompts of the given lengths in
    ids [B, T]. Stop tokens do not stop it. Without a cache: the model reads whole rows."""
    rows = jnp.arange(len(ids))

    def step(ids, inputs):
        place, uniform = inputs
        logits = forward(weights, fixed, ids)[rows, lengths + place - 1]
        logits = jnp.where(fixed.unknown, UNKNOWN, logits)
        logprobs = sampled_logprobs(logits, temperature, top_p, top_k)
        token = draw(logprobs, uniform)
        return ids.at[rows, lengths + place].set(token), (token, logprobs[rows, token])

    numbers = jnp.arange(uniforms.shape[1]), uniforms.T
    _, (tokens, logps) = jax.lax.scan(step, ids, numbers)
    return tokens.T, logps.T


def sample_responses(weights, fixed, prompts, uniforms, stop_ids, temperature, top_p=1.0, top_k=0):
    """A response to each prompt, drawn with a row of uniforms [B, M]."""
    uniforms = np.asarray(uniforms, dtype=float)
    room = [0] * uniforms.shape[1]
    ids = batch_of([{"prompt_ids": prompt, "ids": room} for prompt in prompts])["ids"]
    padding = len(ids) - len(prompts)
    lengths = jnp.array([len(prompt) for prompt in prompts] + [1] * padding)
    uniforms = arrays(np.pad(uniforms, ((0, padding), (0, 0))))
    results = sample_rows(weights, fixed, ids, lengths, uniforms, temperature, top_p, top_k)
    responses = []
    for tokens, logps, _ in zip(*(np.asarray(r).tolist() for r in results), prompts, strict=False):
        end = next((i + 1 for i, token in enumerate(tokens) if token in stop_ids), len(tokens))
        finished = tokens[end - 1] in stop_ids
        responses.append({"ids": tokens[:end], "logps": logps[:end], "finished": finished})
    return responses


def sample(
    config, weights, prompts, uniforms, stop_ids, unknown_ids, num_samples, max_new_tokens, **rest
):
    """Responses to each prompt. The uniforms are given, so the seed of the rest is not used."""
    rows = [stream[:max_new_tokens] for streams in uniforms for stream in streams[:num_samples]]
    repeated = [prompt for prompt in prompts for _ in range(num_samples)]
    options = {key: rest[key] for key in ("temperature", "top_p", "top_k")}
    fixed = fixed_of(config, unknown_ids)
    responses = iter(sample_responses(arrays(weights), fixed, repeated, rows, stop_ids, **options))
    return [list(itertools.islice(responses, num_samples)) for _ in prompts]


# Stage verdicts: a side of a step is read by Python's own parser, and never executed

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
OPERATORS[ast.Div] = operator.truediv
SIGNS = {"×": "*", r"\times": "*", "÷": "/", r"\div": "/"}


def verify_countdown(response, numbers, target):
    """Is the response a derivation of the target that uses each number exactly once?"""
    board = Counter(map(Fraction, numbers))
    try:
        for step in re.split(r"[,;\n]", final_answer(response)):
            if step.strip():
                take_step(board, step)
    except (ValueError, SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        return {"correct": False}
    return {"correct": list(board.elements()) == [target]}


def final_answer(response):
    """The part of a response that is judged, with plain signs."""
    text = response.split("</think>")[-1]
    if "<think>" in text:
        raise ValueError("a thought without an end")
    if "<answer>" in text:
        text = text.split("<answer>")[-1].split("</answer>")[0]
    if r"\boxed{" in text:
        text = text.split(r"\boxed{")[-1]
        text = text[: text.index("}")]
    for sign, plain_sign in SIGNS.items():
        text = text.replace(sign, plain_sign)
    if len(text) > MAX_TEXT:
        raise ValueError("too long")
    return text


def take_step(board, step):
    """Take the numbers of a step off the board and put its value on it."""
    sides = [side_of(text) for text in step.split("=")]
    value, numbers, is_number = sides[0]
    if len(sides) > 1 and is_number and not board[value]:
        _, numbers, _ = sides[1]  # "number = expression"
    board.subtract(numbers)
    if any(side[0] != value for side in sides) or min(board.values()) < 0:
        raise ValueError("no step")
    board[value] += 1


def side_of(text):
    """Value of a side, the numbers that it uses, and whether it is a number alone."""
    if not re.fullmatch(r"[0-9+\-*/() \t]+", text):
        raise ValueError("no expression")
    numbers = []

    def value_of(node):
        match node:
            case ast.Constant(value=value):
                numbers.append(Fraction(value))
                return numbers[-1]
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=value)):
                numbers.append(-Fraction(value))
                return numbers[-1]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value_of(left), value_of(right))
        raise ValueError("no expression")

    tree = ast.parse(text.strip(), mode="eval").body
    return value_of(tree), numbers, not isinstance(tree, ast.BinOp)


# Stage iteration


def run_iteration(weights, fixed, sample_round, settings, iteration=0):
    """One RLoop iteration: explore, filter, exploit. sample_round: weights, step, round and count
    to pairs of rewards and group. Yields each RL step, the experts, and each step of RFT."""
    rl, sampling = settings["rl"], settings["sampling"]
    policy, adam = weights, AdamW(weights, **settings["optimizer"])
    limits, trajectories = (rl["problems_per_step"], rl["max_sampling_rounds"]), []
    rates = rl_learning_rates(rl["steps"], rl["lr"], rl["warmup_steps"])
    for number, lr in enumerate(rates):
        take = functools.partial(sample_round, policy, number)
        groups, usable = sample_step(take, *limits)
        for place, group in enumerate(groups):
            for n, s in enumerate(group["samples"]):
                s |= {"place": [number, place, n], "problem": group["problem"]}
                s |= {"prompt_ids": group["prompt_ids"]}
                s |= {"sampler_logps": s["logps"], "length": len(s["ids"])}
                trajectories.append(s)
        step = {"lr": lr, "usable": usable, "advantages": [], "updates": []}
        if usable:
            kept = [groups[place] for place in usable]
            step["advantages"] = prepare(policy, weights, fixed, kept, sampling, rl)
        for run in np.array_split(usable, min(rl["minibatches"], len(usable))) if usable else []:
            batch = [groups[place] for place in run]
            limits_ = sampling["temperature"], sampling["max_new_tokens"]
            update = rl_gradients(policy, fixed, batch, rl, *limits_)
            policy, norm = adam.step(policy, update["gradients"], lr)
            step["updates"].append({"groups": run, **update, "grad_norm": norm, "weights": policy})
        yield "steps", step
    experts = [trajectories[place] for place in select_experts(trajectories, **settings["select"])]
    yield "experts", [expert["place"] for expert in experts]
    adam = AdamW(weights, **settings["optimizer"])
    for step in rft_schedule(len(experts), settings["seed"], iteration, **settings["rft"]):
        batch = [experts[i] for i in step["examples"]]
        update = sft_gradients(weights, fixed, batch)
        weights, norm = adam.step(weights, update["gradients"], step["lr"])
        places = [expert["place"] for expert in batch]
        own = {"lr": step["lr"], "examples": places, "grad_norm": norm, "weights": weights}
        yield "rft", update | own


def prepare(policy, start, fixed, groups, sampling, rl):
    """Sets what the samples of a step need, before its first update. Returns the advantages."""
    limit, temperature = sampling["max_new_tokens"], sampling["temperature"]
    advantages = step_advantages(groups, rl["normalize_std"], limit, rl["overlong_buffer"])
    rows = [sample for group in groups for sample in group["samples"]]
    models = {"old_logps": policy} if rl["recompute_logprobs"] else {}
    models |= {"ref_logps": start} if rl["kl_coef"] > 0 else {}
    for name, model in models.items():
        logp, _ = jitted_logprobs(model, fixed, batch_of(rows)["ids"], temperature)
        for row, logps in zip(rows, at_responses(logp, rows), strict=True):
            row[name] = logps
    for row, advantage in zip(rows, np.ravel(advantages).tolist(), strict=True):
        row["advantage"] = advantage
    return advantages


def iteration(config, weights, prompts, samples, **settings):
    """One iteration from given samples."""
    rest = [iter(groups) for groups in samples]

    def sample_round(policy, step, number, count):
        groups = [
            {**g, "prompt_ids": prompts[g["problem"]]} for g in itertools.islice(rest[step], count)
        ]
        return [([s["reward"] for s in group["samples"]], group) for group in groups]

    result = {"steps": [], "experts": [], "rft": []}
    for kind, value in run_iteration(arrays(weights), fixed_of(config), sample_round, settings):
        result[kind] = value if kind == "experts" else result[kind] + [value]
    return result


# The protocol


def arrays(values):
    """Nested lists, or objects of them, as arrays; texts of infinities are read."""
    if isinstance(values, dict):
        return {name: arrays(value) for name, value in values.items()}
    return values if isinstance(values, jax.Array) else jnp.asarray(np.array(values, dtype=float))


def plain(value):
    """The value as JSON has it: lists for arrays, texts for floats that are not finite."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return plain(np.asarray(value).tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def layer(function):
    """The golden function of a layer: lists become arrays."""

    def run(**inputs):
        return function(**{k: arrays(v) if isinstance(v, list) else v for k, v in inputs.items()})

    return run


FUNCTIONS = {
    function.__name__: function
    for function in (
        *(token_weights, overlong_penalty, group_advantages, step_advantages, dynamic_sampling),
        *(rl_learning_rates, select_experts, rft_schedule),
        *(pass_at_k, bootstrap_interval, evaluation, seed_of, uniforms, next_problems),
        *(sampled_logprobs, draw, sample, adamw, model_forward, model_gradients, model_training),
        *(policy_gradient, encode, decode, render_chat, encode_prompt, special_ids),
        *(verify_countdown, iteration),
    )
}
FUNCTIONS |= {f.__name__: layer(f) for f in (rms_norm, rope_frequencies, rotate, attention, swiglu)}
FUNCTIONS |= {f.__name__: with_gradient(f) for f in (kl_loss, sft_loss)}
FUNCTIONS["grpo_loss"] = with_gradient(grpo_loss, has_aux=True)


def answer(request):
    """The answer to a request."""
    function = FUNCTIONS.get(request["function"])
    if function is None:
        return {"skip": "no parser of mathematics"}
    try:
        return {"output": plain(function(**request["inputs"]))}
    except Exception as error:  # the runner shows it
        return {"error": f"{type(error).__name__}: {error}"}


def main():
    """Answers one request a line until standard input is closed."""
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(encoding="utf-8")
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
