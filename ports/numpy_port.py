"""A port of RLoop in plain numpy: no framework, every gradient by hand.

    python -m golden.check python ports/numpy_port.py

Written from golden/README.md and docs/porting.md, in the order of docs/porting.md. Everything is
computed in float64, one response at a time and without a cache: short and exact, not fast. A layer
returns its output and a function that turns the gradient of the output into those of its inputs.
Of the verdicts only that on Countdown is here: mathematics would need a parser.
"""

import functools
import json
import math
import re
import sys
from collections import Counter
from fractions import Fraction

import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

UNKNOWN = -3.4028235e38  # the logit of ids that have no token
MAX_TEXT, MAX_DEPTH = 1000, 100  # letters and opening parentheses of a Countdown answer


def floats(values) -> np.ndarray:
    """An array of float64. In requests "inf", "-inf" and "nan" are texts, which numpy reads."""
    return np.array(values, dtype=np.float64)


# Stage losses


def grpo_loss(logp, old_logp, advantages, weights, clip_low, clip_high):
    """PPO's clipped objective with two clips, and its gradient by logp."""
    used = floats(weights) != 0  # padding is selected away before exp: 0 * inf would be NaN
    columns = (logp, old_logp, advantages, weights)
    logp, old_logp, advantages, weights = (floats(column)[used] for column in columns)
    rho = np.exp(logp - old_logp)
    clipped = np.clip(rho, 1 - clip_low, 1 + clip_high)
    passes = rho * advantages <= clipped * advantages  # equal inside of the clip range
    gradient = np.zeros(len(used))
    gradient[used] = np.where(passes, -weights * rho * advantages, 0.0)
    return {
        "loss": -np.sum(weights * np.minimum(rho * advantages, clipped * advantages)),
        "gradient": gradient,
        "tokens": int(used.sum()),
        "clip_low": int(np.sum((advantages < 0) & (rho < 1 - clip_low))),
        "clip_high": int(np.sum((advantages > 0) & (rho > 1 + clip_high))),
    }


def kl_loss(logp, ref_logp, weights):
    """The k3 estimate of KL(policy || reference), and its gradient by logp."""
    used = floats(weights) != 0
    logp, ref_logp, weights = (floats(column)[used] for column in (logp, ref_logp, weights))
    delta = ref_logp - logp
    gradient = np.zeros(len(used))
    gradient[used] = weights * (1 - np.exp(delta))
    return {"loss": np.sum(weights * (np.exp(delta) - delta - 1)), "gradient": gradient}


def sft_loss(logp, weights):
    """The weighted negative log-likelihood, and its gradient by logp."""
    used = floats(weights) != 0
    loss = -np.sum(floats(weights)[used] * floats(logp)[used])
    return {"loss": loss, "gradient": -floats(weights)}


def token_weights(lengths, aggregation, max_new_tokens):
    """The weight of each token of a response, from the lengths of ALL responses of the step."""
    lengths = floats(lengths)
    if aggregation == "token":
        return np.full(len(lengths), 1 / lengths.sum())
    if aggregation == "sequence":
        return 1 / (lengths * len(lengths))
    if aggregation == "constant":
        return np.full(len(lengths), 1 / (len(lengths) * max_new_tokens))
    raise ValueError(f"aggregation {aggregation!r}")


def overlong_penalty(length, max_new_tokens, buffer):
    """DAPO's soft penalty: 0 until the buffer begins, -1 at max_new_tokens."""
    return -max(0.0, (length - (max_new_tokens - buffer)) / buffer) if buffer else 0.0


# Stage advantages


def group_advantages(rewards, normalize_std):
    """Rewards minus their group's mean, divided by the group's std; exactly 0 in flat groups."""
    rewards = floats(rewards)
    advantages = rewards - rewards.mean(axis=1, keepdims=True)
    if normalize_std:
        advantages /= rewards.std(axis=1, keepdims=True) + 1e-6
    return np.where(is_flat(rewards)[:, None], 0.0, advantages)


def is_flat(rewards):
    """For each group whether its rewards are all equal."""
    rewards = floats(rewards)
    return (rewards == rewards[:, :1]).all(axis=1)


def step_advantages(groups, normalize_std, max_new_tokens, overlong_buffer):
    """The advantages of a step's groups; the over-long penalty belongs to the reward."""
    samples = [group["samples"] for group in groups]
    limits = max_new_tokens, overlong_buffer
    rewards = [
        [s["reward"] + overlong_penalty(s["length"], *limits) for s in row] for row in samples
    ]
    return group_advantages(rewards, normalize_std)


def sampling_rounds(rewards, problems_per_step, max_rounds):
    """How many groups each round samples, and which groups are usable: flat ones are replaced."""
    counts, usable = [], []
    while len(counts) < max_rounds and len(usable) < problems_per_step:
        start = sum(counts)
        counts.append(problems_per_step - len(usable))
        flat = is_flat(rewards[start : start + counts[-1]])
        usable += [start + place for place in np.flatnonzero(~flat).tolist()]
    return counts, usable


def dynamic_sampling(
    num_problems, seed, iteration, step, drawn, problems_per_step, max_rounds, rewards, **unused
):
    """Which groups a step samples and keeps. Lengths and their penalty play no part."""
    counts, usable = sampling_rounds(rewards, problems_per_step, max_rounds)
    rounds = []
    for number, count in enumerate(counts):
        problems = next_problems(num_problems, drawn, count, seed)
        rounds.append({"seed": seed_of([seed, iteration, step, number]), "problems": problems})
        drawn += count
    return {"rounds": rounds, "usable": usable, "num_sampled": sum(counts), "drawn": drawn}


def rl_learning_rates(steps, lr, warmup_steps):
    """Linear warm-up, then constant."""
    return [lr * min(1.0, step / (warmup_steps + 1)) for step in range(1, steps + 1)]


# Stage filter


def select_experts(trajectories, max_success_rate, max_per_problem, min_reward):
    """The places of the phase's experts: successes at problems that are solved rarely."""
    places_of = {}  # problem to places, in the order of first trajectories
    for place, trajectory in enumerate(trajectories):
        places_of.setdefault(trajectory["problem"], []).append(place)
    experts = []
    for places in places_of.values():
        successes = [p for p in places if trajectories[p]["reward"] >= min_reward]
        if successes and len(successes) / len(places) <= max_success_rate:
            first = {}  # ids to the first success that has them
            for place in successes:
                first.setdefault(tuple(trajectories[place]["ids"]), place)
            experts += evenly_spaced(list(first.values()), max_per_problem)
    return experts


def evenly_spaced(items, limit):
    """At most limit items, from the first to the last; halves go to the even place."""
    count = min(len(items), limit)
    if count <= 1:
        return items[:count]
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def rft_schedule(num_examples, seed, iteration, epochs, batch_size, lr, warmup_steps):
    """Rate and examples of each optimizer step of fine-tuning."""
    batches = []
    for epoch in range(epochs if num_examples else 0):
        order = permutation((seed, iteration, epoch), num_examples)
        batches += [order[i : i + batch_size] for i in range(0, num_examples, batch_size)]
    steps = []
    for step, examples in enumerate(batches):
        warmup, decay = (step + 1) / (warmup_steps + 1), (len(batches) - step) / len(batches)
        steps.append({"lr": lr * min(warmup, decay), "examples": examples})
    return steps


# Stage evaluation


def pass_at_k(num_samples, num_correct, k):
    """The unbiased estimate of the chance that one of k samples is right."""
    wrong = num_samples - num_correct
    if wrong < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(wrong + 1, num_samples + 1))


def bootstrap_interval(values, resamples):
    """The middle 95% of the means of the resamples."""
    means = floats(values)[np.array(resamples)].mean(axis=1)
    return np.quantile(means, [0.025, 0.975])  # numpy's default interpolates linearly


def evaluation(rewards, finished, earlier, min_reward):
    """The metrics of an evaluation, some of them in view of the earlier ones."""
    right = {problem: sum(r >= min_reward for r in row) for problem, row in rewards.items()}
    n = len(next(iter(rewards.values())))
    before = [any(counts.get(problem, 0) for counts in earlier) for problem in right]
    pairs = list(zip(right.values(), before, strict=True))
    result = {f"avg@{n}": np.mean(list(right.values())) / n}
    for k in sorted({n, *(2**i for i in range(n.bit_length()))}):
        result[f"pass@{k}"] = np.mean([pass_at_k(n, count, k) for count in right.values()])
    return result | {
        "forgotten_share": np.mean([past and now == 0 for now, past in pairs]),
        "union_share": np.mean([past or now > 0 for now, past in pairs]),
        "truncated_share": 1.0 - np.mean(list(finished.values())),
    }


# Stage random: numpy's own generators


def seed_of(path):
    """The seed of a sampling round: 64 bits, as text."""
    return str(np.random.SeedSequence(path).generate_state(1, np.uint64)[0])


def permutation(path, count):
    """The numbers below count in the order that belongs to the path."""
    return np.random.default_rng(path).permutation(count).tolist()


def uniforms(seed, prompt, sample, count):
    """The random stream of one response."""
    return np.random.default_rng((int(seed), prompt, sample)).random(count)


def next_problems(num_problems, drawn, count, seed):
    """Problems from position drawn on of an endless stream; each pass has an order of its own."""
    places = [divmod(position, num_problems) for position in range(drawn, drawn + count)]
    return [permutation((seed, number), num_problems)[place] for number, place in places]


# Stage sampling


def log_softmax(logits):
    """The logarithm of softmax over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def sampled_logprobs(logits, temperature, top_p, top_k):
    """Log-probs of the distribution that is sampled from; -inf for tokens that are cut off."""
    return np.array([row_logprobs(row, temperature, top_p, top_k) for row in floats(logits)])


def row_logprobs(logits, temperature, top_p, top_k):
    """The same for one row of logits."""
    if temperature == 0:
        return np.where(np.arange(len(logits)) == logits.argmax(), 0.0, -np.inf)
    logp = log_softmax(logits / temperature)
    order = np.argsort(-logp, kind="stable")
    if top_k > 0:
        logp[order[top_k:]] = -np.inf
    if top_p < 1:
        p = np.exp(log_softmax(logp))[order]
        logp[order[np.cumsum(p) - p >= top_p]] = -np.inf
    return log_softmax(logp) if top_k > 0 or top_p < 1 else logp


def draw(logprobs, uniforms):
    """A token for each row: the first whose cumulative probability exceeds the point."""
    cumulative = np.cumsum(np.exp(floats(logprobs)), axis=1)
    total = cumulative[:, -1]
    points = np.minimum(floats(uniforms) * total, np.nextafter(total, 0.0))
    pairs = zip(cumulative, points, strict=True)
    return [int(np.searchsorted(row, point, side="right")) for row, point in pairs]


def sample(
    config, weights, prompts, uniforms, stop_ids, unknown_ids, num_samples, max_new_tokens, **rest
):
    """Responses to each prompt. The uniforms are given, so the seed of the rest is not used."""
    model = Model(config, weights)

    def respond(prompt, stream):
        ids, logps = [], []
        for uniform in stream[:max_new_tokens]:
            logits = model.forward(prompt + ids)[0][-1]
            logits[unknown_ids] = UNKNOWN
            logprobs = row_logprobs(logits, rest["temperature"], rest["top_p"], rest["top_k"])
            ids += draw([logprobs], [uniform])
            logps.append(logprobs[ids[-1]])
            if ids[-1] in stop_ids:
                break
        return {"ids": ids, "logps": logps, "finished": ids[-1] in stop_ids}

    pairs = zip(prompts, uniforms, strict=True)
    return [[respond(prompt, row) for row in rows[:num_samples]] for prompt, rows in pairs]


# Stage optimizer


class AdamW:
    """AdamW with clipping by the norm of all parameters. Updates the given arrays in place."""

    def __init__(self, parameters, weight_decay, grad_clip):
        self.parameters = parameters  # name to array
        self.weight_decay, self.grad_clip = weight_decay, grad_clip
        self.first = {name: np.zeros_like(w) for name, w in parameters.items()}
        self.second = {name: np.zeros_like(w) for name, w in parameters.items()}
        self.count = 0

    def step(self, gradients, lr):
        """One update. Returns the norm of the gradients before clipping."""
        self.count += 1
        norm = math.sqrt(sum(np.sum(gradient**2) for gradient in gradients.values()))
        scale = min(1.0, self.grad_clip / (norm + 1e-6))
        for name, w in self.parameters.items():
            g, m, v = gradients[name] * scale, self.first[name], self.second[name]
            m += 0.1 * (g - m)
            v += 0.001 * (g**2 - v)
            root = np.sqrt(v / (1 - 0.999**self.count)) + 1e-8
            w -= lr * self.weight_decay * w
            w -= lr * (m / (1 - 0.9**self.count)) / root
        return norm


def adamw(parameters, gradients, lrs, weight_decay, grad_clip):
    """Optimizer steps with given gradients and rates."""
    parameters = arrays(parameters)
    optimizer, steps = AdamW(parameters, weight_decay, grad_clip), []
    for gradient, lr in zip(gradients, lrs, strict=True):
        norm = optimizer.step(arrays(gradient), lr)
        steps.append({"grad_norm": norm, "parameters": arrays(parameters)})
    return steps


def arrays(parameters):
    """A copy of named parameters, as arrays."""
    return {name: floats(values) for name, values in parameters.items()}


# Stage layers: each returns its output and its backward pass


def rms_norm(x, weight, eps):
    """x [..., D] by the root of its mean square. Backward: dy to (dx, dweight)."""
    scale = 1.0 / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)
    unit = x * scale

    def backward(dy):
        dunit = dy * weight
        dx = scale * (dunit - unit * np.mean(dunit * unit, axis=-1, keepdims=True))
        return dx, np.sum(dy * unit, axis=tuple(range(dy.ndim - 1)))

    return unit * weight, backward


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
    """x [T, H, E] turned by the angles of cos and sin [T, E]. Backward: with -sin for sin."""
    real, imaginary = np.split(x, 2, axis=-1)
    return x * cos[:, None] + np.concatenate([-imaginary, real], axis=-1) * sin[:, None]


def attention(q, k, v):
    """Causal attention, q [T, H, E], k and v [T, K, E]. Backward: dy to (dq, dk, dv)."""
    (length, _, size), num_keys = q.shape, k.shape[1]
    # Query heads by their key head: [K, H / K, T, E]; key heads: [K, 1, T, E]
    q = q.transpose(1, 0, 2).reshape(num_keys, -1, length, size)
    k, v = (heads.transpose(1, 0, 2)[:, None] for heads in (k, v))
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(size)
    future = np.triu(np.ones((length, length), dtype=bool), 1)
    p = np.exp(log_softmax(np.where(future, -np.inf, scores)))

    def tokens_first(heads):
        return heads.reshape(-1, length, size).transpose(1, 0, 2)

    def backward(dy):
        dy = dy.transpose(1, 0, 2).reshape(q.shape)
        dp = dy @ v.swapaxes(-1, -2)
        dscores = p * (dp - np.sum(dp * p, axis=-1, keepdims=True)) / math.sqrt(size)
        dk = (dscores.swapaxes(-1, -2) @ q).sum(axis=1)  # over the query heads of a key head
        dv = (p.swapaxes(-1, -2) @ dy).sum(axis=1)
        return tokens_first(dscores @ k), tokens_first(dk), tokens_first(dv)

    return tokens_first(p @ v), backward


def swiglu(x, gate, up, down):
    """down (silu(gate x) * (up x)). Backward: dy to (dx, dgate, dup, ddown)."""
    a, b = x @ gate.T, x @ up.T
    sigmoid = 1.0 / (1.0 + np.exp(-a))
    hidden = a * sigmoid * b

    def backward(dy):
        dhidden = dy @ down
        da = dhidden * b * sigmoid * (1 + a * (1 - sigmoid))
        db = dhidden * a * sigmoid
        return da @ gate + db @ up, da.T @ x, db.T @ x, dy.T @ hidden

    return hidden @ down.T, backward


def run_layer(layer, **inputs):
    """A layer as its cases ask for it: arrays from lists, and the output without backward."""
    inputs = {key: floats(v) if isinstance(v, list) else v for key, v in inputs.items()}
    result = layer(**inputs)
    return result[0] if isinstance(result, tuple) else result


def layer_gradients(layer, inputs, gradient):
    """The backward pass of a layer: the gradients of its inputs, by name."""
    inputs = {key: floats(v) if isinstance(v, list) else v for key, v in inputs.items()}
    if layer == "rotate":
        return {"x": rotate(floats(gradient), inputs["cos"], -inputs["sin"])}
    names = {"rms_norm": ("x", "weight"), "attention": ("q", "k", "v")}
    function = {"rms_norm": rms_norm, "attention": attention, "swiglu": swiglu}[layer]
    _, backward = function(**inputs)
    pairs = zip(
        names.get(layer, ("x", "gate", "up", "down")), backward(floats(gradient)), strict=True
    )
    return dict(pairs)


# Stage model


class Model:
    """A Llama, Qwen2 or Qwen3, one row of tokens at a time.

    A block returns its output and backward, which turns the gradient of its output into that of its
    input and adds those of its weights to gradients. What the weights lack is left out: biases are
    Qwen2's alone, norms of q and k are Qwen3's.
    """

    def __init__(self, config, weights):
        self.config, self.weights = config, arrays(weights)
        self.head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"

    def forward(self, ids):
        """Logits [T, V] of a row, and backward: dlogits to gradients by the weights' names."""
        embedding = "model.embed_tokens.weight"
        x, backs = self.weights[embedding][ids], []
        for layer in range(self.config["num_hidden_layers"]):
            for block in (self.attend, self.feed):
                y, back = block(x, f"model.layers.{layer}.")
                x = x + y
                backs.append(back)
        y, back_norm = self.norm(x, "model.norm")
        logits, back_head = self.project(y, self.head)

        def backward(dlogits):
            gradients = {name: np.zeros_like(w) for name, w in self.weights.items()}
            dx = back_norm(back_head(dlogits, gradients), gradients)
            for back in reversed(backs):
                dx = dx + back(dx, gradients)
            np.add.at(gradients[embedding], ids, dx)
            return gradients

        return logits, backward

    def project(self, x, name):
        """The linear layer of a name."""
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")

        def backward(dy, gradients):
            gradients[f"{name}.weight"] += dy.T @ x
            if bias is not None:
                gradients[f"{name}.bias"] += dy.sum(axis=0)
            return dy @ weight

        return x @ weight.T + (0.0 if bias is None else bias), backward

    def norm(self, x, name):
        """The RMSNorm of a name; where the model has none, x as it is."""
        weight = self.weights.get(f"{name}.weight")
        if weight is None:
            return x, lambda dy, gradients: dy
        y, back = rms_norm(x, weight, self.config["rms_norm_eps"])

        def backward(dy, gradients):
            dx, dweight = back(dy)
            gradients[f"{name}.weight"] += dweight
            return dx

        return y, backward

    def attend(self, x, prefix):
        """The attention block of a layer."""
        y, back_norm = self.norm(x, f"{prefix}input_layernorm")
        own = f"{prefix}self_attn."
        heads, backs = zip(*(self.heads(y, own, part) for part in "qkv"), strict=True)
        mixed, back_attention = attention(*heads)
        output, back_output = self.project(mixed.reshape(len(x), -1), f"{own}o_proj")

        def backward(dy, gradients):
            dmixed = back_output(dy, gradients).reshape(mixed.shape)
            pairs = zip(backs, back_attention(dmixed), strict=True)
            return back_norm(sum(back(dheads, gradients) for back, dheads in pairs), gradients)

        return output, backward

    def heads(self, x, prefix, part):
        """The heads [T, heads, E] of part "q", "k" or "v"; those of q and k are rotated."""
        rows, back_rows = self.project(x, f"{prefix}{part}_proj")
        heads = rows.reshape(len(x), -1, self.config["head_dim"])
        heads, back_norm = self.norm(heads, f"{prefix}{part}_norm")
        cos, sin = self.rotation(len(x))

        def backward(dheads, gradients):
            dheads = dheads if part == "v" else rotate(dheads, cos, -sin)
            return back_rows(back_norm(dheads, gradients).reshape(rows.shape), gradients)

        return heads if part == "v" else rotate(heads, cos, sin), backward

    def rotation(self, length):
        """cos and sin [T, E] of the angles at positions 0, 1, 2 .."""
        keys = ("head_dim", "rope_theta", "rope_scaling")
        frequencies = rope_frequencies(*(self.config[key] for key in keys))
        angles = np.outer(np.arange(length), np.tile(frequencies, 2))
        return np.cos(angles), np.sin(angles)

    def feed(self, x, prefix):
        """The SwiGLU block of a layer."""
        names = [f"{prefix}mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
        y, back_norm = self.norm(x, f"{prefix}post_attention_layernorm")
        output, back_swiglu = swiglu(y, *(self.weights[name] for name in names))

        def backward(dy, gradients):
            dnormed, *dweights = back_swiglu(dy)
            for name, dweight in zip(names, dweights, strict=True):
                gradients[name] += dweight
            return back_norm(dnormed, gradients)

        return output, backward

    def score(self, prompt_ids, ids, temperature=1.0, unknown_ids=()):
        """Log-probs and entropies of a response's tokens, and backward: dlogp to gradients."""
        logits, back_model = self.forward(prompt_ids + ids[:-1])
        start, places = len(prompt_ids) - 1, np.arange(len(ids))
        known = np.setdiff1d(np.arange(logits.shape[1]), unknown_ids)
        rows = np.full((len(ids), logits.shape[1]), UNKNOWN)
        rows[:, known] = logits[start:, known] / temperature
        logp = log_softmax(rows)
        p = np.exp(logp)

        def backward(dlogp):
            drows = -p * dlogp[:, None]
            drows[places, ids] += dlogp
            dlogits = np.zeros_like(logits)
            dlogits[start:, known] = drows[:, known] / temperature
            return back_model(dlogits)

        return logp[places, ids], -np.sum(p * logp, axis=1), backward


def model_forward(config, weights, ids):
    """Logits of each row."""
    model = Model(config, weights)
    return [model.forward(row)[0] for row in ids]


def score_all(model, responses, temperature=1.0, unknown_ids=()):
    """The same for pairs of prompt_ids and ids: a list of log-probs, the sum of all entropies, and
    backward, which takes dlogp of all tokens in a row."""
    scores = [model.score(*response, temperature, unknown_ids) for response in responses]
    logps, entropies, backs = zip(*scores, strict=True)

    def backward(dlogp):
        pieces = np.split(dlogp, np.cumsum([len(logp) for logp in logps])[:-1])
        parts = [back(piece) for back, piece in zip(backs, pieces, strict=True)]
        return {name: sum(part[name] for part in parts) for name in parts[0]}

    return logps, np.concatenate(entropies).sum(), backward


def sft_gradients(model, examples):
    """Log-probs, loss and gradients of fine-tuning on the examples, at temperature 1."""
    logps, _, backward = score_all(model, [(e["prompt_ids"], e["ids"]) for e in examples])
    logp = np.concatenate(logps)
    loss = sft_loss(logp, np.full(len(logp), 1 / len(logp)))
    return {"logps": logps, "loss": loss["loss"], "gradients": backward(loss["gradient"])}


def model_gradients(config, weights, examples):
    """The gradient of fine-tuning."""
    return sft_gradients(Model(config, weights), examples)


def model_training(config, weights, examples, steps, lr, weight_decay, grad_clip):
    """Optimizer steps on all examples."""
    model = Model(config, weights)
    optimizer = AdamW(model.weights, weight_decay, grad_clip)
    result = {"losses": [], "grad_norms": []}
    for step in range(1, steps + 1):
        output = sft_gradients(model, examples)
        result["losses"].append(output["loss"])
        result["grad_norms"].append(optimizer.step(output["gradients"], lr))
        if step in (1, 10):
            result[f"after_{step}"] = arrays(model.weights)
    return result


def rl_gradients(model, groups, rl, temperature, max_new_tokens, unknown_ids=()):
    """The gradient of one optimizer step of RL, and its metrics. rl: the settings of the loss."""
    samples = [sample for group in groups for sample in group["samples"]]
    responses = [(group["prompt_ids"], s["ids"]) for group in groups for s in group["samples"]]
    lengths = [len(sample["ids"]) for sample in samples]
    logps, entropy, backward = score_all(model, responses, temperature, unknown_ids)
    logp, parts = np.concatenate(logps), iter(logps)
    sampler = np.concatenate([sample["sampler_logps"] for sample in samples])
    old = np.concatenate([sample.get("old_logps", sample["sampler_logps"]) for sample in samples])
    advantages = np.repeat([sample["advantage"] for sample in samples], lengths)
    by_response = token_weights(lengths, rl["aggregation"], max_new_tokens)
    weights = np.repeat(by_response, lengths)
    if rl["importance_cap"] > 0:
        weights = weights * np.minimum(np.exp(old - sampler), rl["importance_cap"])
    policy = grpo_loss(logp, old, advantages, weights, rl["clip_low"], rl["clip_high"])
    kl = {"loss": 0.0, "gradient": 0.0}
    if rl["kl_coef"] > 0:
        kl = kl_loss(logp, np.concatenate([s["ref_logps"] for s in samples]), weights)
    return {
        "token_weights": by_response,
        "logps": [[next(parts) for _ in group["samples"]] for group in groups],
        "loss": policy["loss"] + rl["kl_coef"] * kl["loss"],
        "kl": kl["loss"],
        "entropy": entropy,
        "gap": np.sum(np.abs(logp - sampler)),
        "gap_max": np.max(np.abs(logp - sampler)),
        **{key: policy[key] for key in ("tokens", "clip_low", "clip_high")},
        "gradients": backward(policy["gradient"] + rl["kl_coef"] * kl["gradient"]),
    }


def policy_gradient(config, weights, groups, unknown_ids, temperature, max_new_tokens, **rl):
    """The same from a request. How finely the step is cut changes nothing."""
    model = Model(config, weights)
    return rl_gradients(model, groups, rl, temperature, max_new_tokens, unknown_ids)


# Stage text: by the tokenizers and jinja2 packages


def tokenizer_of(files):
    """The tokenizer of a model directory, without the file's truncation and padding."""
    tokenizer = Tokenizer.from_str(json.dumps(files["tokenizer.json"]))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode(files, text, add_special_tokens):
    """Ids of a text."""
    return tokenizer_of(files).encode(text, add_special_tokens=add_special_tokens).ids


def decode(files, ids):
    """The text of ids, without special tokens."""
    return tokenizer_of(files).decode(ids, skip_special_tokens=True)


def special_tokens(files):
    """bos_token, eos_token .. of tokenizer_config.json: texts, or objects with the content."""
    settings = files.get("tokenizer_config.json", {})
    tokens = {key: token for key, token in settings.items() if key.endswith("_token")}
    return {key: t["content"] if isinstance(t, dict) else t for key, t in tokens.items()}


def render_chat(files, messages, add_generation_prompt):
    """The messages in the form of the model's chat template."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    template = environment.from_string(files["tokenizer_config.json"]["chat_template"])
    variables = {"tools": None, "documents": None, **special_tokens(files)}
    variables |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
    return template.render(variables)


def encode_prompt(files, question, prompt, chat_template, context):
    """Ids of the prompt for a question. A rendered chat has its special tokens already."""
    text = prompt.replace("{problem}", question)
    if not chat_template:
        contents = [content for _, content in context]
        return encode(files, "\n\n".join([*contents, text]), add_special_tokens=True)
    turns = [*context, ("user", text)]
    messages = [{"role": role, "content": content} for role, content in turns]
    return encode(files, render_chat(files, messages, True), add_special_tokens=False)


def special_ids(files, chat, vocab_size):
    """The ids that end a response, the one that is appended, and those without a token."""
    tokenizer = tokenizer_of(files)
    eos = special_tokens(files).get("eos_token")
    ends = [tokenizer.token_to_id(eos)] if eos else []
    for name in ("generation_config.json", "config.json"):
        ids = files.get(name, {}).get("eos_token_id")
        ends += ids if isinstance(ids, list) else [ids]
    ends = [token for token in ends if token is not None]
    if chat:
        ends = turn_end(files, tokenizer) + ends
    known = set(tokenizer.get_vocab(with_added_tokens=True).values()) | set(ends)
    return {
        "stop_ids": sorted(set(ends)),
        "eos_id": ends[0],
        "unknown_ids": [token for token in range(vocab_size) if token not in known],
    }


def turn_end(files, tokenizer):
    """The special token behind an assistant's message, in a list, or an empty one."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
    rest = render_chat(files, messages, False).rpartition("ANSWER")[2]
    special = [id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    ids = tokenizer.encode(rest, add_special_tokens=False).ids
    return [token for token in ids if token in special][:1]


# Stage verdicts


def verify_countdown(response, numbers, target):
    """Is the response a derivation of the target that uses each number exactly once?"""
    board = Counter(Fraction(number) for number in numbers)
    try:
        for step in re.split(r"[,;\n]", final_answer(response)):
            if step.strip():
                take_step(board, step)
    except (ValueError, ZeroDivisionError):
        return {"correct": False}
    return {"correct": list(board.elements()) == [Fraction(target)]}


def final_answer(response):
    """The part of a response that is judged, with plain signs."""
    text = response.rpartition("</think>")[2]
    if "<think>" in text:
        raise ValueError("a thought without an end")
    if "<answer>" in text:
        text = text.rpartition("<answer>")[2].partition("</answer>")[0]
    if r"\boxed{" in text:
        text, closed, _ = text.rpartition(r"\boxed{")[2].partition("}")
        if not closed:
            raise ValueError("a box without an end")
    if len(text) > MAX_TEXT or text.count("(") > MAX_DEPTH:
        raise ValueError("too long")
    for sign, plain_sign in (("×", "*"), (r"\times", "*"), ("÷", "/"), (r"\div", "/")):
        text = text.replace(sign, plain_sign)
    return text


def take_step(board, step):
    """Take the numbers of a step off the board and put its value on it."""
    sides = [Expression(side) for side in step.split("=")]
    first = sides[0]
    if len(sides) > 1 and first.is_number and not board[first.value]:
        first = sides[1]  # "number = expression"
    board.subtract(first.numbers)
    if any(side.value != first.value for side in sides) or min(board.values()) < 0:
        raise ValueError("no step")
    board[first.value] += 1


class Expression:
    """A side of a step, read from left to right: its value and the numbers that it uses."""

    def __init__(self, text):
        self.is_number = re.fullmatch(r"\s*-?\s*[0-9]+\s*", text) is not None
        self.tokens, self.place = [*re.findall(r"[0-9]+|\S", text), "end"], 0
        self.numbers = []
        self.value = self.sum()
        self.expect("end")

    def accept(self, *choices):
        """The next token, which is read, if it is one of the choices; else None."""
        token = self.tokens[self.place]
        self.place += token in choices
        return token if token in choices else None

    def expect(self, token):
        """Read this token, nothing else."""
        if not self.accept(token):
            raise ValueError(f"no {token}")

    def sum(self):
        """Products, added and subtracted from left to right."""
        value = self.product()
        while sign := self.accept("+", "-"):
            value += self.product() if sign == "+" else -self.product()
        return value

    def product(self):
        """Factors, multiplied and divided from left to right."""
        value = self.factor()
        while sign := self.accept("*", "/"):
            value = value * self.factor() if sign == "*" else value / self.factor()
        return value

    def factor(self):
        """A number, which may be negative, or a sum in parentheses."""
        if self.accept("("):
            value = self.sum()
            self.expect(")")
            return value
        sign = -1 if self.accept("-") else 1
        digits = self.tokens[self.place]
        if not re.fullmatch(r"[0-9]{1,20}", digits):
            raise ValueError("no number")
        self.place += 1
        self.numbers.append(Fraction(sign * int(digits)))
        return self.numbers[-1]


# Stage iteration


def iteration(config, weights, prompts, samples, seed, sampling, rl, select, rft, optimizer):
    """One RLoop iteration from given samples: explore, filter, exploit."""
    annotate(samples, prompts)
    policy, reference = Model(config, weights), Model(config, weights)
    adam = AdamW(policy.weights, **optimizer)
    rates = rl_learning_rates(rl["steps"], rl["lr"], rl["warmup_steps"])
    steps, trajectories = [], []
    for groups, lr in zip(samples, rates, strict=True):
        rewards = [[sample["reward"] for sample in group["samples"]] for group in groups]
        limits = rl["problems_per_step"], rl["max_sampling_rounds"]
        counts, usable = sampling_rounds(rewards, *limits)
        trajectories += [s for group in groups[: sum(counts)] for s in group["samples"]]
        step = {"lr": lr, "usable": usable, "advantages": [], "updates": []}
        if usable:
            step |= explore(policy, reference, adam, groups, usable, lr, sampling, rl)
        steps.append(step)
    experts = [trajectories[place] for place in select_experts(trajectories, **select)]
    return {
        "steps": steps,
        "experts": [expert["place"] for expert in experts],
        "rft": exploit(Model(config, weights), experts, seed, rft, optimizer),
    }


def annotate(samples, prompts):
    """Adds to all groups and samples what the functions of the other stages read."""
    for step, groups in enumerate(samples):
        for place, group in enumerate(groups):
            group["prompt_ids"] = prompts[group["problem"]]
            for number, sample in enumerate(group["samples"]):
                sample["problem"], sample["prompt_ids"] = group["problem"], group["prompt_ids"]
                sample["place"] = [step, place, number]
                sample["length"], sample["sampler_logps"] = len(sample["ids"]), sample["logps"]


def explore(policy, reference, adam, groups, usable, lr, sampling, rl):
    """The updates of an RL step. Old log-probs are those before the first of them."""
    temperature, max_new_tokens = sampling["temperature"], sampling["max_new_tokens"]
    kept = [groups[place] for place in usable]
    advantages = step_advantages(kept, rl["normalize_std"], max_new_tokens, rl["overlong_buffer"])
    for group, row in zip(kept, advantages, strict=True):
        for sample, advantage in zip(group["samples"], row, strict=True):
            response = sample["prompt_ids"], sample["ids"], temperature
            sample["advantage"] = advantage
            if rl["recompute_logprobs"]:
                sample["old_logps"] = policy.score(*response)[0]
            if rl["kl_coef"] > 0:
                sample["ref_logps"] = reference.score(*response)[0]
    updates = []
    for run in np.array_split(usable, min(rl["minibatches"], len(usable))):
        batch = [groups[place] for place in run]
        update = rl_gradients(policy, batch, rl, temperature, max_new_tokens)
        update["groups"] = run
        update["grad_norm"] = adam.step(update["gradients"], lr)
        update["weights"] = arrays(policy.weights)
        updates.append(update)
    return {"advantages": advantages, "updates": updates}


def exploit(model, experts, seed, rft, optimizer):
    """Fine-tuning of theta_i on the experts, with fresh optimizer moments."""
    adam, steps = AdamW(model.weights, **optimizer), []
    for step in rft_schedule(len(experts), seed, 0, **rft):
        batch = [experts[i] for i in step["examples"]]
        update = sft_gradients(model, batch)
        update["lr"], update["examples"] = step["lr"], [expert["place"] for expert in batch]
        update["grad_norm"] = adam.step(update["gradients"], step["lr"])
        update["weights"] = arrays(model.weights)
        steps.append(update)
    return steps


# The protocol


def plain(value):
    """The value as JSON has it: lists for arrays, texts for floats that are not finite."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # of numpy or jax
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


FUNCTIONS = {
    function.__name__: function
    for function in (
        *(grpo_loss, kl_loss, sft_loss, token_weights, overlong_penalty),
        *(group_advantages, step_advantages, dynamic_sampling, rl_learning_rates),
        *(select_experts, rft_schedule, pass_at_k, bootstrap_interval, evaluation),
        *(seed_of, uniforms, next_problems, sampled_logprobs, draw, sample, adamw),
        *(layer_gradients, model_forward, model_gradients, model_training, policy_gradient),
        *(encode, decode, render_chat, encode_prompt, special_ids, verify_countdown, iteration),
    )
}
for layer in (rms_norm, rope_frequencies, rotate, attention, swiglu):
    FUNCTIONS[layer.__name__] = functools.partial(run_layer, layer)


def answer(request, functions):
    """The answer to a request."""
    function = functions.get(request["function"])
    if function is None:
        return {"skip": "no parser of mathematics"}
    try:
        return {"output": plain(function(**request["inputs"]))}
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main(functions):
    """Answers one request a line until standard input is closed."""
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(encoding="utf-8")
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), functions)), flush=True)


if __name__ == "__main__":
    main(FUNCTIONS)
