"""The parts of a port in jax that compute arrays: losses, sampling, AdamW, layers, the model with
its gradients, and the sampler. Compiled, gradients by jax.grad, float32.

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
from numpy_port import token_weights

UNKNOWN = -3.4028235e38  # the logit of ids that have no token


def arrays(values):
    """Nested lists, or objects of them, as arrays; texts of infinities are read."""
    if isinstance(values, dict):
        return {name: arrays(value) for name, value in values.items()}
    if isinstance(values, list) and values and isinstance(values[0], dict):
        return [arrays(value) for value in values]
    return values if isinstance(values, jax.Array) else jnp.asarray(np.array(values, dtype=float))


# Losses: of arrays of any one shape; entries of weight 0 are padding


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


# Sampling


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


# Optimizer


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


# Layers: leading axes are free


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


# Model: weights by Hugging Face's names, which say what a model has


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


def sft_gradients(weights, fixed, examples):
    """Log-probs, loss and gradients of fine-tuning on the examples, at temperature 1."""
    share = 1 / sum(len(example["ids"]) for example in examples)
    batch = batch_of(examples, weight=[share] * len(examples))
    (loss, logp), gradients = rft_value_and_grad(weights, fixed, batch)
    logp = np.asarray(logp)
    logps = [logp[place] for place in places(examples)]
    return {"logps": logps, "loss": loss, "gradients": gradients}


def rl_gradients(weights, fixed, groups, rl, temperature, max_new_tokens):
    """The gradient of one optimizer step of RL, and its metrics. rl: the settings of the loss."""
    rows = [s | {"prompt_ids": group["prompt_ids"]} for group in groups for s in group["samples"]]
    lengths = [len(row["ids"]) for row in rows]
    by_row = token_weights(lengths, rl["aggregation"], max_new_tokens)
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
