"""A port of RLoop in jax. What computes arrays is in jax_model.py.

    python -m golden.check python ports/jax_port.py
    python ports/jax_train.py TASK.json                     trains on samples of its own

Written from golden/README.md and docs/porting.md, without RLoop. What computes no array is shared
with numpy_port: random streams, text, the Countdown judge, schedules and the counts of evaluation.
"""

import functools
import math
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import numpy_port as shared
from jax_model import (
    adamw_step,
    arrays,
    attention,
    batch_of,
    draw,
    fixed_of,
    forward,
    fresh_moments,
    grpo_loss,
    kl_loss,
    places,
    rl_gradients,
    rms_norm,
    rope_frequencies,
    rotate,
    sample_responses,
    sampled_logprobs,
    sft_gradients,
    sft_loss,
    swiglu,
    token_logprobs,
)

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


# What the vectors ask: lists in, lists out


def with_gradient(loss, has_aux=False):
    """What the vectors ask of a loss: its value and its gradient by logp."""
    function = jax.jit(jax.value_and_grad(loss, has_aux=has_aux))

    def run(logp, **rest):
        value, gradient = function(arrays(logp), **arrays(rest))
        value, counts = value if has_aux else (value, {})
        return {"loss": value, "gradient": gradient, **counts}

    return run


def layer(function):
    """What the vectors ask of a layer: lists become arrays."""
    return lambda **inputs: function(**array_inputs(inputs))


def array_inputs(inputs):
    """The inputs of a layer, as arrays where they are lists."""
    return {key: arrays(v) if isinstance(v, list) else v for key, v in inputs.items()}


def layer_gradients(layer, inputs, gradient):
    """The backward pass of a layer: the gradients of all its inputs, by name."""
    function = jax.jit(lambda inputs: LAYERS[layer](**inputs))
    _, backward = jax.vjp(function, array_inputs(inputs))
    return backward(arrays(gradient))[0]


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


def model_forward(config, weights, ids):
    """Logits of each row."""
    return forward(arrays(weights), fixed_of(config), jnp.array(ids))


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


def policy_gradient(config, weights, groups, unknown_ids, temperature, max_new_tokens, **rl):
    """The same from a request. How finely the step is cut changes nothing."""
    fixed = fixed_of(config, unknown_ids)
    return rl_gradients(arrays(weights), fixed, groups, rl, temperature, max_new_tokens)


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


SHARED = (
    *("token_weights", "overlong_penalty", "dynamic_sampling", "rl_learning_rates", "rft_schedule"),
    *("evaluation", "seed_of", "uniforms", "next_problems", "verify_countdown"),
    *("encode", "decode", "render_chat", "encode_prompt", "special_ids"),
)
OWN = (
    *(group_advantages, step_advantages, select_experts, pass_at_k, bootstrap_interval),
    *(sampled_logprobs, draw, adamw, model_forward, model_gradients, model_training),
    *(layer_gradients, policy_gradient, sample, iteration),
)
LAYERS = {f.__name__: f for f in (rms_norm, rope_frequencies, rotate, attention, swiglu)}
FUNCTIONS = {name: shared.FUNCTIONS[name] for name in SHARED}
FUNCTIONS |= {f.__name__: f for f in OWN}
FUNCTIONS |= {name: layer(function) for name, function in LAYERS.items()}
FUNCTIONS |= {f.__name__: with_gradient(f) for f in (kl_loss, sft_loss)}
FUNCTIONS["grpo_loss"] = with_gradient(grpo_loss, has_aux=True)


if __name__ == "__main__":
    shared.main(FUNCTIONS)
