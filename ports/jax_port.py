"""A port of RLoop in jax: batched and compiled, gradients by jax.grad, float32.

    python -m golden.check python ports/jax_port.py
    python ports/jax_train.py TASK.json                     trains on samples of its own

Written from golden/README.md and docs/porting.md, without RLoop. What computes no array is shared
with numpy_port: random streams, text, the Countdown judge, schedules and the counts of evaluation.
JAX_ENABLE_X64=1 before a command computes in float64.

Shapes: B responses, T tokens of a prompt with its response, padded behind its end (column t belongs
to token t), V vocabulary, R rows, H query heads, K key heads, E head width.
"""

import functools
import math
from itertools import islice
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy_port as shared

UNKNOWN = -3.4028235e38  # the logit of ids that have no token


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
    """What the vectors ask of a loss: its value and its gradient by logp."""

    def run(logp, **rest):
        function = functools.partial(loss, **arrays(rest))
        value, gradient = jax.value_and_grad(function, has_aux=has_aux)(arrays(logp))
        value, counts = value if has_aux else (value, {})
        return {"loss": value, "gradient": gradient, **counts}

    return run


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

    def reward(sample):
        limits = max_new_tokens, overlong_buffer
        return sample["reward"] + shared.overlong_penalty(sample["length"], *limits)

    rewards = [[reward(sample) for sample in group["samples"]] for group in groups]
    return group_advantages(rewards, normalize_std)


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
            first = {}
            for place, ids in successes:
                first.setdefault(tuple(ids), place)
            unique = list(first.values())
            last, kept = len(unique) - 1, min(len(unique), max_per_problem)
            steps = [i * last / (kept - 1) for i in range(kept)] if kept > 1 else [0] * kept
            experts += [unique[round(step)] for step in steps]
    return experts


# Stage evaluation


def pass_at_k(num_samples, num_correct, k):
    """The unbiased estimate of the chance that one of k samples is right."""
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def bootstrap_interval(values, resamples):
    """The middle 95% of the means of the resamples."""
    means = arrays(values)[jnp.asarray(resamples)].mean(axis=1)
    return jnp.quantile(means, arrays([0.025, 0.975]))


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


def fresh_moments(weights):
    """First and second moments, and the number of steps."""
    zeros = jax.tree.map(jnp.zeros_like, weights)
    return zeros, zeros, 0


@jax.jit
def adamw_step(weights, moments, gradients, lr, weight_decay, grad_clip):
    """Weights and moments after one step, and the norm of the gradients before clipping."""
    first, second, count = moments
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradients)))
    clipped = jax.tree.map(lambda g: g * jnp.minimum(1.0, grad_clip / (norm + 1e-6)), gradients)
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, clipped)
    second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, second, clipped)
    # 1 - 0.9^t and 1 - 0.999^t, without the cancellation in float32
    rest = [-jnp.expm1((count + 1) * math.log(beta)) for beta in (0.9, 0.999)]

    def move(w, m, v):
        return w - lr * weight_decay * w - lr * (m / rest[0]) / (jnp.sqrt(v / rest[1]) + 1e-8)

    return jax.tree.map(move, weights, first, second), (first, second, count + 1), norm


def adamw(parameters, gradients, lrs, weight_decay, grad_clip):
    """Optimizer steps with given gradients and rates."""
    parameters, steps = arrays(parameters), []
    moments = fresh_moments(parameters)
    for gradient, lr in zip(arrays(gradients), lrs, strict=True):
        parameters, moments, norm = adamw_step(
            parameters, moments, gradient, lr, weight_decay, grad_clip
        )
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


@jax.jit
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


@jax.jit
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
    weight, old_logp = batch["weight"], batch["old_logp"]
    policy, counts = grpo_loss(logp, old_logp, batch["advantage"], weight, clip_low, clip_high)
    kl = kl_loss(logp, batch["ref_logp"], weight) if "ref_logp" in batch else 0.0
    gap = jnp.where(weight != 0, jnp.abs(logp - batch["sampler_logp"]), 0.0)
    sums = {"entropy": jnp.sum(entropy * (weight != 0)), "gap": gap.sum(), "gap_max": gap.max()}
    return policy + kl_coef * kl, {"logp": logp, "kl": kl, **sums, **counts}


def rft_loss(weights, fixed, batch):
    """The loss of an optimizer step of fine-tuning, and the log-probs."""
    logp, _ = token_logprobs(weights, fixed, batch["ids"], 1.0)
    return sft_loss(logp, batch["weight"]), logp


rl_value_and_grad = jax.jit(jax.value_and_grad(rl_loss, has_aux=True))
rft_value_and_grad = jax.jit(jax.value_and_grad(rft_loss, has_aux=True))


def batch_of(rows, **columns):
    """Arrays [B, T] of rows with prompt_ids and ids: the ids, and columns, which have a value or
    one a token for each row, and 0 elsewhere. Sizes are rounded up, so that few are compiled."""
    longest = max(len(row["prompt_ids"]) + len(row["ids"]) for row in rows)
    shape = -(-len(rows) // 8) * 8, -(-longest // 16) * 16
    batch = {name: np.zeros(shape) for name in columns} | {"ids": np.zeros(shape, int)}
    for b, (row, place) in enumerate(zip(rows, places(rows), strict=True)):
        batch["ids"][b, : place[1].stop] = row["prompt_ids"] + row["ids"]
        for name, values in columns.items():
            batch[name][place] = values[b]
    return {name: jnp.asarray(column) for name, column in batch.items()}


def places(rows):
    """Where the response of each row stands in an array [B, T]."""
    ends = [len(row["prompt_ids"]) + len(row["ids"]) for row in rows]
    return [(b, slice(end - len(rows[b]["ids"]), end)) for b, end in enumerate(ends)]


def model_forward(config, weights, ids):
    """Logits of each row."""
    return forward(arrays(weights), fixed_of(config), jnp.array(ids))


def sft_gradients(weights, fixed, examples):
    """Log-probs, loss and gradients of fine-tuning on the examples, at temperature 1."""
    share = 1 / sum(len(example["ids"]) for example in examples)
    batch = batch_of(examples, weight=[share] * len(examples))
    (loss, logp), gradients = rft_value_and_grad(weights, fixed, batch)
    logp = np.asarray(logp)
    logps = [logp[place] for place in places(examples)]
    return {"logps": logps, "loss": loss, "gradients": gradients}


def model_gradients(config, weights, examples):
    """The gradient of fine-tuning."""
    return sft_gradients(arrays(weights), fixed_of(config), examples)


def model_training(config, weights, examples, steps, lr, **optimizer):
    """Optimizer steps on all examples."""
    weights, result = arrays(weights), {"losses": [], "grad_norms": []}
    moments = fresh_moments(weights)
    for step in range(1, steps + 1):
        output = sft_gradients(weights, fixed_of(config), examples)
        weights, moments, norm = adamw_step(weights, moments, output["gradients"], lr, **optimizer)
        result["losses"].append(output["loss"])
        result["grad_norms"].append(norm)
        if step in (1, 10):
            result[f"after_{step}"] = weights
    return result


def rl_gradients(weights, fixed, groups, rl, temperature, max_new_tokens):
    """The gradient of one optimizer step of RL, and its metrics. rl: the settings of the loss."""
    rows = [s | {"prompt_ids": group["prompt_ids"]} for group in groups for s in group["samples"]]
    lengths = [len(row["ids"]) for row in rows]
    by_row = shared.token_weights(lengths, rl["aggregation"], max_new_tokens)
    sampler_logps = [np.array(row["sampler_logps"]) for row in rows]
    old_logps = [np.array(row.get("old_logps", row["sampler_logps"])) for row in rows]
    columns = {"weight": by_row, "advantage": [row["advantage"] for row in rows]}
    columns |= {"sampler_logp": sampler_logps, "old_logp": old_logps}
    if rl["importance_cap"] > 0:
        ratios = map(np.exp, map(np.subtract, old_logps, sampler_logps))
        capped = [np.minimum(ratio, rl["importance_cap"]) for ratio in ratios]
        columns["weight"] = list(map(np.multiply, by_row, capped))
    if rl["kl_coef"] > 0:
        columns["ref_logp"] = [row["ref_logps"] for row in rows]
    settings = temperature, rl["clip_low"], rl["clip_high"], rl["kl_coef"]
    batch = batch_of(rows, **columns)
    (loss, sums), gradients = rl_value_and_grad(weights, fixed, batch, *settings)
    logp = np.asarray(sums.pop("logp"))
    logps = iter([logp[place] for place in places(rows)])
    logps = [list(islice(logps, len(group["samples"]))) for group in groups]
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
    """A response to each prompt, drawn with its row of uniforms [B, M]."""
    room = [0] * len(uniforms[0])
    ids = batch_of([{"prompt_ids": prompt, "ids": room} for prompt in prompts])["ids"]
    padding = len(ids) - len(prompts)
    lengths = jnp.array([len(prompt) for prompt in prompts] + [1] * padding)
    uniforms = arrays(np.pad(uniforms, ((0, padding), (0, 0))))
    results = sample_rows(weights, fixed, ids, lengths, uniforms, temperature, top_p, top_k)
    tokens, logps = (np.asarray(result)[: len(prompts)].tolist() for result in results)
    responses = []
    for row, row_logps in zip(tokens, logps, strict=True):
        ends = [place + 1 for place, token in enumerate(row) if token in stop_ids]
        end = min(ends, default=len(row))
        response = {"ids": row[:end], "logps": row_logps[:end], "finished": bool(ends)}
        responses.append(response)
    return responses


def sample(
    config, weights, prompts, uniforms, stop_ids, unknown_ids, num_samples, max_new_tokens, **rest
):
    """Responses to each prompt. The uniforms are given, so the seed of the rest is not used."""
    rows = [stream[:max_new_tokens] for streams in uniforms for stream in streams[:num_samples]]
    prompts = [prompt for prompt in prompts for _ in range(num_samples)]
    options = [rest[key] for key in ("temperature", "top_p", "top_k")]
    fixed = fixed_of(config, unknown_ids)
    responses = sample_responses(arrays(weights), fixed, prompts, rows, stop_ids, *options)
    return [responses[i : i + num_samples] for i in range(0, len(prompts), num_samples)]


# Stage iteration


def run_iteration(weights, fixed, sample_round, seed, sampling, rl, select, rft, optimizer):
    """One RLoop iteration: explore, filter, exploit. sample_round: policy, step, round and count
    to groups with prompt_ids. Yields a name and a value: each step, and the experts."""
    policy, moments, trajectories = weights, fresh_moments(weights), []
    rates = shared.rl_learning_rates(rl["steps"], rl["lr"], rl["warmup_steps"])
    for number, lr in enumerate(rates):
        groups, usable = sample_step(functools.partial(sample_round, policy, number), rl)
        trajectories += annotate(groups, number)
        step = {"lr": lr, "usable": usable, "advantages": [], "updates": []}
        kept = [groups[place] for place in usable]
        if usable:
            step["advantages"] = prepare(policy, weights, fixed, kept, sampling, rl)
        for run in np.array_split(usable, min(rl["minibatches"], len(usable)) or 1):
            batch = [groups[place] for place in run]
            if batch:
                limits = sampling["temperature"], sampling["max_new_tokens"]
                update = rl_gradients(policy, fixed, batch, rl, *limits)
                policy, moments, norm = adamw_step(
                    policy, moments, update["gradients"], lr, **optimizer
                )
                update |= {"groups": run, "grad_norm": norm, "weights": policy}
                step["updates"].append(update)
        yield "steps", step | {"groups": groups}
    experts = [trajectories[place] for place in select_experts(trajectories, **select)]
    yield "experts", [expert["place"] for expert in experts]
    moments = fresh_moments(weights)
    for step in shared.rft_schedule(len(experts), seed, 0, **rft):
        batch = [experts[i] for i in step["examples"]]
        update = sft_gradients(weights, fixed, batch)
        weights, moments, norm = adamw_step(
            weights, moments, update["gradients"], step["lr"], **optimizer
        )
        update |= {"lr": step["lr"], "examples": [expert["place"] for expert in batch]}
        yield "rft", update | {"grad_norm": norm, "weights": weights}


def sample_step(sample_round, rl):
    """The groups of a step, and the places of the usable ones; flat ones are replaced."""
    groups, usable = [], []
    for number in range(rl["max_sampling_rounds"]):
        groups += sample_round(number, rl["problems_per_step"] - len(usable))
        rewards = [{sample["reward"] for sample in group["samples"]} for group in groups]
        usable = [place for place, values in enumerate(rewards) if len(values) > 1]
        if len(usable) == rl["problems_per_step"]:
            break
    return groups, usable


def annotate(groups, step):
    """All samples of the groups, with what the functions of the other stages read."""
    for place, group in enumerate(groups):
        for number, sample in enumerate(group["samples"]):
            sample |= {"place": [step, place, number], "problem": group["problem"]}
            sample |= {"prompt_ids": group["prompt_ids"], "length": len(sample["ids"])}
            sample["sampler_logps"] = sample["logps"]
    return [sample for group in groups for sample in group["samples"]]


def prepare(policy, start, fixed, groups, sampling, rl):
    """Sets what the samples of a step need, before its first update. Returns the advantages."""
    limits = sampling["max_new_tokens"], rl["overlong_buffer"]
    advantages = step_advantages(groups, rl["normalize_std"], *limits)
    rows = [sample for group in groups for sample in group["samples"]]
    for row, advantage in zip(rows, np.ravel(advantages), strict=True):
        row["advantage"] = advantage
    models = {"old_logps": policy} if rl["recompute_logprobs"] else {}
    models |= {"ref_logps": start} if rl["kl_coef"] > 0 else {}
    for name, weights in models.items():
        arguments = weights, fixed, batch_of(rows)["ids"], sampling["temperature"]
        logp = np.asarray(token_logprobs(*arguments)[0])
        for row, place in zip(rows, places(rows), strict=True):
            row[name] = logp[place]
    return advantages


def iteration(config, weights, prompts, samples, **settings):
    """One iteration from given samples."""
    given = [iter(groups) for groups in samples]

    def sample_round(policy, step, number, count):
        groups = list(islice(given[step], count))
        return [group | {"prompt_ids": prompts[group["problem"]]} for group in groups]

    result = {"steps": [], "rft": []}
    for name, value in run_iteration(arrays(weights), fixed_of(config), sample_round, **settings):
        result |= {name: value if name == "experts" else result[name] + [value]}
    return result


# The protocol


def arrays(values):
    """Nested lists, or objects of them, as arrays; texts of infinities are read."""
    if isinstance(values, dict):
        return {name: arrays(value) for name, value in values.items()}
    if isinstance(values, list) and values and isinstance(values[0], dict):
        return [arrays(value) for value in values]
    return values if isinstance(values, jax.Array) else jnp.asarray(np.array(values, dtype=float))


def layer(function):
    """The golden function of a layer: lists become arrays."""

    def run(**inputs):
        return function(**{k: arrays(v) if isinstance(v, list) else v for k, v in inputs.items()})

    return run


SHARED = (
    *("token_weights", "overlong_penalty", "dynamic_sampling", "rl_learning_rates", "rft_schedule"),
    *("evaluation", "seed_of", "uniforms", "next_problems", "verify_countdown"),
    *("encode", "decode", "render_chat", "encode_prompt", "special_ids"),
)
OWN = (
    *(group_advantages, step_advantages, select_experts, pass_at_k, bootstrap_interval),
    *(sampled_logprobs, draw, adamw, model_forward, model_gradients, model_training),
    *(policy_gradient, sample, iteration),
)
FUNCTIONS = {name: shared.FUNCTIONS[name] for name in SHARED}
FUNCTIONS |= {f.__name__: f for f in OWN}
FUNCTIONS |= {f.__name__: layer(f) for f in (rms_norm, rope_frequencies, rotate, attention, swiglu)}
FUNCTIONS |= {f.__name__: with_gradient(f) for f in (kl_loss, sft_loss)}
FUNCTIONS["grpo_loss"] = with_gradient(grpo_loss, has_aux=True)


if __name__ == "__main__":
    shared.main(FUNCTIONS)
