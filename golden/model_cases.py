"""The cases that need a model: its layers, forward and backward pass, training and sampling; and a
whole iteration. Weights are random, and so far from their usual values that a mistake shows."""

import numpy as np

from golden import reference
from golden.cases import document
from golden.vectors import resolve

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
}
PLAIN_ROPE = {"rope_scaling": None}
QWEN2 = LLAMA | PLAIN_ROPE | {"architectures": ["Qwen2ForCausalLM"], "rope_theta": 1000.0}
QWEN2 |= {"tie_word_embeddings": True, "num_key_value_heads": 1}
QWEN3 = LLAMA | PLAIN_ROPE | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 8}
QWEN3 |= {"tie_word_embeddings": True, "rms_norm_eps": 1e-6}
SMALL = LLAMA | PLAIN_ROPE | {"vocab_size": 13, "hidden_size": 8, "intermediate_size": 12}
SMALL |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
MODELS = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3, "iteration": SMALL}


def bundles() -> dict[str, dict[str, np.ndarray]]:
    """The weights of each model, by the name of its file."""
    return {
        f"{name}.safetensors": {f"weights.{key}": w for key, w in weights(config, n).items()}
        for n, (name, config) in enumerate(MODELS.items())
    }


def weights(config: dict, seed: int) -> dict[str, np.ndarray]:
    """Random weights of a config.json: norms around 1, everything else around 0."""
    rng = np.random.default_rng(seed)
    shapes = {name: w.shape for name, w in reference.empty_policy(config).named_parameters()}
    return {
        name: (rng.normal(size=shape) * 0.3 + name.endswith("norm.weight"))
        .round(4)
        .astype(np.float32)
        for name, shape in shapes.items()
    }


def model_inputs(name: str) -> dict:
    """The inputs that name a model: its config.json and its weights."""
    stored = {"bundle": f"{name}.safetensors", "prefix": "weights."}
    return {"config": MODELS[name], "weights": stored}


def documents() -> list[dict]:
    """Tolerances: of gradients, and of weights after steps of Adam, which enlarges their errors."""
    gradients = {"rel": 1e-4, "abs": 1e-5}
    return [
        document("rms_norm", "layers", rms_norm()),
        document("rope_frequencies", "layers", rope_frequencies(), tolerance=RELATIVE),
        document("rotate", "layers", rotate()),
        document("attention", "layers", attention()),
        document("swiglu", "layers", swiglu()),
        document("layer_gradients", "layers", layer_gradients(), tolerance=gradients),
        document("model_forward", "model", model_forward(), tolerance=gradients),
        document("model_gradients", "model", model_gradients(), tolerance=gradients),
        document("model_training", "model", model_training(), tolerance=gradients),
        document("policy_gradient", "model", policy_gradient(), tolerance=gradients),
        document("sample", "model", sample(), tolerance=gradients),
        document("iteration", "iteration", iteration(), tolerance=gradients),
    ]


RELATIVE = {"rel": 1e-5, "abs": 0.0}


def numbers(seed: int, *shape: int) -> list:
    """Random numbers with two decimals."""
    return np.random.default_rng(seed).normal(size=shape).round(2).tolist()


# ---- layers


def rms_norm() -> list:
    x, weight = numbers(0, 3, 4), [1.0, 0.5, -2.0, 1.5]
    small = [[0.001, -0.002, 0.001, 0.0], [0.0, 0.0, 0.0, 0.0]]
    return [
        (
            "plain",
            "norm_subtracts_mean",
            "Divided by the root of the mean square; the mean is not subtracted.",
            {"x": x, "weight": weight, "eps": 1e-6},
        ),
        (
            "eps",
            "norm_eps",
            "Small inputs, where eps inside the root decides; zeros stay 0.",
            {"x": small, "weight": weight, "eps": 1e-5},
        ),
    ]


def rope_frequencies() -> list:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192.0}
    small = scaling | {"original_max_position_embeddings": 64.0, "factor": 32.0}
    return [
        (
            "default",
            "rope_frequencies",
            "theta^(-2i / head_dim).",
            {"head_dim": 8, "rope_theta": 10000.0, "rope_scaling": None},
        ),
        (
            "large_theta",
            "rope_frequencies",
            "theta of a million.",
            {"head_dim": 16, "rope_theta": 1000000.0, "rope_scaling": None},
        ),
        (
            "llama3",
            "rope_llama3",
            "Low frequencies are divided by the factor, high ones kept, those between blended.",
            {"head_dim": 64, "rope_theta": 500000.0, "rope_scaling": scaling},
        ),
        (
            "llama3_small",
            "rope_llama3",
            "The same with another factor and a short original context.",
            {"head_dim": 16, "rope_theta": 10000.0, "rope_scaling": small},
        ),
    ]


def rotate() -> list:
    angles = np.array([[0.0, 0.0], [1.0, 0.01], [2.0, 0.02]])
    angles = np.concatenate([angles, angles], axis=1)
    cos, sin = np.cos(angles).round(7).tolist(), np.sin(angles).round(7).tolist()
    return [
        (
            "halves",
            "rope_interleaved",
            "Real parts in the first half of a head, imaginary parts in the second.",
            {"x": numbers(1, 3, 2, 4), "cos": cos, "sin": sin},
        ),
        (
            "unit",
            "rope_direction",
            "Position 0 changes nothing; a positive angle turns the real part into the imaginary.",
            {"x": [[[1.0, 1.0, 0.0, 0.0]]] * 3, "cos": cos, "sin": sin},
        ),
    ]


def attention() -> list:
    q, k, v = numbers(2, 5, 4, 4), numbers(3, 5, 2, 4), numbers(4, 5, 2, 4)
    return [
        (
            "grouped",
            "gqa_heads_tiled",
            "Query heads 0, 1 share key head 0; heads 2, 3 share head 1.",
            {"q": q, "k": k, "v": v},
        ),
        (
            "single_token",
            "attention_scale",
            "The first token sees itself alone: its value.",
            {"q": q[:1], "k": k[:1], "v": v[:1]},
        ),
        (
            "causal",
            "attention_not_causal",
            "A huge value at the last token reaches no other.",
            {"q": q, "k": k, "v": [*v[:4], [[1000.0] * 4] * 2]},
        ),
        (
            "scale",
            "attention_scale",
            "Scores are divided by the root of the head width, 2.",
            {"q": q[:2], "k": k[:2], "v": v[:2]},
        ),
    ]


def swiglu() -> list:
    return [
        (
            "plain",
            "swiglu_swapped",
            "down(silu(gate x) * up x): silu is of the gate, not of the other.",
            {
                "x": numbers(5, 2, 3),
                "gate": numbers(6, 5, 3),
                "up": numbers(7, 5, 3),
                "down": numbers(8, 3, 5),
            },
        )
    ]


def layer_gradients() -> list:
    def of(layer: str, case: tuple, gradient: list) -> dict:
        return {"layer": layer, "inputs": case[3], "gradient": gradient}

    grouped, single, *_ = attention()
    return [
        (
            "rms_norm",
            "rms_norm_backward",
            "The root depends on x, too.",
            of("rms_norm", rms_norm()[0], numbers(9, 3, 4)),
        ),
        (
            "rms_norm_eps",
            "rms_norm_backward",
            "Small inputs: eps counts in the backward pass as well.",
            of("rms_norm", rms_norm()[1], [[0.01, -0.02, 0.03, 0.01], [0.0, 0.02, 0.01, -0.01]]),
        ),
        (
            "rotate",
            "rotate_backward",
            "The gradient turns back, by the negative angle.",
            of("rotate", rotate()[0], numbers(10, 3, 2, 4)),
        ),
        (
            "attention",
            "attention_backward",
            "The gradient of a key head is the sum over its query heads.",
            of("attention", grouped, numbers(11, 5, 4, 4)),
        ),
        (
            "attention_single_token",
            "attention_backward",
            "One token's softmax is constant: q and k get 0.",
            of("attention", single, numbers(12, 1, 4, 4)),
        ),
        (
            "swiglu",
            "swiglu_backward",
            "x gets the gradients of both branches.",
            of("swiglu", swiglu()[0], numbers(13, 2, 3)),
        ),
    ]


# ---- the model

EXAMPLES = [
    {"prompt_ids": [3, 7, 1, 12, 5], "ids": [9, 4, 0]},
    {"prompt_ids": [8], "ids": [2, 2, 11, 6, 28, 0]},
    {"prompt_ids": [3, 7, 1], "ids": [17]},
]
IDS = [[3, 7, 1, 12, 5, 9, 4, 0, 20], [8, 2, 2, 11, 6, 28, 0, 0, 0]]
FLAG_OF_MODEL = {"llama": "rope_llama3", "qwen2": "qkv_bias", "qwen3": "qk_norm"}


def model_forward() -> list:
    about = "Logits of two rows of nine tokens, {}."
    which = {
        "llama": "llama3 RoPE, a head of its own",
        "qwen2": "biases of q, k, v, one key head, tied head",
        "qwen3": "norms of q and k before RoPE, heads wider than width / heads, tied head",
    }
    return [
        (name, FLAG_OF_MODEL[name], about.format(which[name]), model_inputs(name) | {"ids": IDS})
        for name in FLAG_OF_MODEL
    ]


def model_gradients() -> list:
    about = "The mean negative log-likelihood of three responses, and its gradient."
    flags = {
        "llama": "backward shift_by_one stop_token_untrained prompt_trained repeated_ids",
        "qwen2": "backward tied_head_gradient repeated_ids",
        "qwen3": "backward tied_head_gradient repeated_ids",
    }
    return [
        (name, flag, about, model_inputs(name) | {"examples": EXAMPLES})
        for name, flag in flags.items()
    ]


def model_training() -> list:
    about = "Ten steps of AdamW on three responses; the weights after 1 and after 10."
    settings = {"steps": 10, "lr": 0.003, "weight_decay": 0.1, "grad_clip": 1.0}
    return [
        (name, flag, about, model_inputs(name) | {"examples": EXAMPLES} | settings)
        for name, flag in (
            ("llama", "weight_decay_coupled"),
            ("qwen2", "clip_by_tensor"),
            ("qwen3", "gradient_kept"),
        )
    ]


def given_samples(name: str, prompts: list, responses: list, seed: int, spread: float) -> list:
    """Log-probs as another policy might have given the responses [group][sample]: the model's own,
    moved at random and written with two decimals."""
    rng = np.random.default_rng(seed)
    pairs = [(prompt, r) for prompt, rs in zip(prompts, responses, strict=True) for r in rs]
    weights_ = {key: w.tolist() for key, w in weights(MODELS[name], [*MODELS].index(name)).items()}
    examples = resolve([{"prompt_ids": prompt, "ids": ids} for prompt, ids in pairs])
    answer = reference.FUNCTIONS["model_gradients"](MODELS[name], weights_, examples)
    return [
        (np.array(logps.tolist()) + rng.uniform(-spread, spread, len(logps))).round(2).tolist()
        for logps in answer["logps"]
    ]


def policy_gradient() -> list:
    prompts = [[3, 7, 1, 12, 5], [8, 14], [3, 7]]
    responses = [
        [[9, 4, 0], [11, 6, 28, 13, 0], [9, 4, 4]],
        [[2, 2, 11, 6], [0], [2, 0]],
        [[17, 0], [5, 17, 21, 0], [1, 1, 1, 1, 1, 1]],
    ]
    sampler_logps = iter(given_samples("qwen3", prompts, responses, 0, 0.5))
    old_logps = iter(given_samples("qwen3", prompts, responses, 1, 0.5))
    ref_logps = iter(given_samples("qwen3", prompts, responses, 2, 0.5))
    advantages = iter([1.25, -0.5, -0.75, 0.5, -1.0, 0.5, 1.0, -1.0, 0.25])
    rows = [
        [
            {
                "ids": ids,
                "sampler_logps": next(sampler_logps),
                "old_logps": next(old_logps),
                "ref_logps": next(ref_logps),
                "advantage": next(advantages),
            }
            for ids in group
        ]
        for group in responses
    ]

    def groups(*left_out: str) -> dict:
        samples = [
            [{key: v for key, v in row.items() if key not in left_out} for row in group]
            for group in rows
        ]
        pairs = zip(prompts, samples, strict=True)
        return {"groups": [{"prompt_ids": p, "samples": group} for p, group in pairs]}

    plain = model_inputs("qwen3") | groups("old_logps", "ref_logps")
    plain |= {"unknown_ids": [], "max_new_tokens": 6, "temperature": 1.0, "aggregation": "token"}
    plain |= {"clip_low": 0.2, "clip_high": 0.28, "kl_coef": 0.0, "importance_cap": 0.0}
    plain |= {"micro_batch_tokens": 1000}
    return [
        (
            "whole_step",
            "shift_by_one positions_do_not_restart responses_see_each_other",
            "Three groups of three responses; old log-probs are the sampler's.",
            plain,
        ),
        (
            "temperature",
            "temperature_left_out",
            "Log-probs and entropies are those of softmax(logits / 0.7).",
            plain | {"temperature": 0.7},
        ),
        (
            "micro_batches",
            "micro_batch_mean",
            "The first step again, cut into small micro-batches: nothing may change.",
            plain | {"micro_batch_tokens": 12},
        ),
        (
            "sequence",
            "micro_batch_mean",
            "Weights by response, in small micro-batches.",
            plain | {"aggregation": "sequence", "micro_batch_tokens": 12},
        ),
        (
            "constant",
            "constant_by_longest",
            "Weights 1 / (9 * max_new_tokens), which is 8 here.",
            plain | {"aggregation": "constant", "max_new_tokens": 8},
        ),
        (
            "unknown_ids",
            "unknown_ids_sampled",
            "Ids 25 to 27 have no token: probability 0, so the others share 1.",
            plain | {"unknown_ids": [25, 26, 27]},
        ),
        (
            "old_logps",
            "old_logps_of_sampler",
            "Old log-probs by the trainer: ratios are taken to them, the gap to the sampler's.",
            plain | groups("ref_logps"),
        ),
        (
            "importance_cap",
            "importance_weight",
            "Weights times min(exp(old - sampler), 1.1), a constant.",
            plain | groups("ref_logps") | {"importance_cap": 1.1},
        ),
        (
            "kl",
            "kl_coef kl_sign",
            "The loss holds 0.3 times the KL to the reference, with the tokens' weights.",
            plain | groups("old_logps") | {"kl_coef": 0.3, "aggregation": "sequence"},
        ),
        (
            "cap_and_kl",
            "kl_without_importance",
            "Both: the KL has the weights of the policy's loss, the importance weights included.",
            plain | groups() | {"importance_cap": 1.1, "kl_coef": 0.3},
        ),
    ]


def sample() -> list:
    prompts = [[3, 7, 1, 12, 5], [8], [3, 7]]
    seed = "5577006791947779410"
    plain = {"stop_ids": [0, 4], "unknown_ids": [], "seed": seed, "first_prompt": 0}
    plain |= {"num_samples": 2, "max_new_tokens": 6, "temperature": 1.0, "top_p": 1.0, "top_k": 0}

    def of(name: str, **changes) -> dict:
        options = plain | changes
        streams = [
            [
                reference.FUNCTIONS["uniforms"](seed, options["first_prompt"] + p, g, 6)
                for g in range(options["num_samples"])
            ]
            for p in range(len(prompts))
        ]
        return model_inputs(name) | {"prompts": prompts, "uniforms": streams} | options

    return [
        (
            "llama",
            "stop_token_dropped decode_position cache_row_mixed_up",
            "A response ends on one of the stop ids, which is part of it, or at max_new_tokens.",
            of("llama"),
        ),
        (
            "later_prompts",
            "stream_by_batch_row",
            "One process's share of the problems: their numbers begin at 4.",
            of("llama", first_prompt=4),
        ),
        (
            "close_points",
            "draw_in_half_precision",
            "Points 2e-4 beside the borders of tokens.",
            of("llama", first_prompt=24),
        ),
        (
            "cool",
            "temperature_left_out",
            "Log-probs are those of the distribution that was sampled, here at temperature 0.6.",
            of("qwen2", temperature=0.6),
        ),
        (
            "nucleus",
            "cut_not_renormalized",
            "top-k and top-p: the log-probs are the renormalized ones.",
            of("qwen3", top_k=6, top_p=0.8, stop_ids=[0]),
        ),
        (
            "greedy",
            "greedy_not_one",
            "Temperature 0: log-probs 0.",
            of("qwen3", temperature=0.0, num_samples=1),
        ),
        (
            "unknown_ids",
            "unknown_ids_sampled",
            "Ids without a token are never drawn.",
            of("qwen3", unknown_ids=list(range(10, 29)), stop_ids=[0]),
        ),
    ]


# ---- one iteration


def iteration() -> list:
    """Two problems, four samples, two RL steps; the second one replaces a flat group."""
    prompts = [[5, 3, 9], [7, 2]]
    order = [[0, 1], [1, 0, 0]]  # problems of the groups of each step
    responses = [
        [[[4, 6, 0], [4, 0], [11, 12, 1, 8], [4, 6, 0]], [[2, 0], [9, 9, 0], [10, 0], [3, 5, 0]]],
        [
            [[2, 0], [9, 0], [10, 4, 0], [10, 0]],
            [[4, 6, 0], [4, 7, 0], [1, 0], [12, 0]],
            [[2, 0], [10, 0], [6, 6, 6, 6], [0]],
        ],
    ]
    rewards = [
        [[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]],
        [[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]],
    ]
    samples = sampled(prompts, order, responses, rewards)
    rl = {"steps": 2, "problems_per_step": 2, "samples_per_problem": 4, "max_sampling_rounds": 2}
    rl |= {"lr": 0.01, "warmup_steps": 0, "minibatches": 2, "clip_low": 0.2, "clip_high": 0.28}
    rl |= {"aggregation": "token", "normalize_std": True, "kl_coef": 0.0, "overlong_buffer": 0}
    rl |= {"recompute_logprobs": False, "importance_cap": 0.0}
    dapo = model_inputs("iteration") | {"prompts": prompts, "samples": samples, "seed": 14}
    dapo |= {
        "sampling": {"max_new_tokens": 4, "temperature": 1.0},
        "rl": rl,
        "select": {"max_success_rate": 0.7, "max_per_problem": 3, "min_reward": 1.0},
        "rft": {"lr": 0.02, "epochs": 2, "batch_size": 2, "warmup_steps": 0},
        "optimizer": {"weight_decay": 0.1, "grad_clip": 1.0},
    }
    grpo = {"aggregation": "sequence", "kl_coef": 0.1, "minibatches": 2, "overlong_buffer": 2}
    grpo |= {"recompute_logprobs": True, "importance_cap": 1.2, "warmup_steps": 1}
    uneven = {"steps": 3, "problems_per_step": 3, "samples_per_problem": 2}
    return [
        (
            "dapo",
            "rft_from_phi optimizer_kept old_logps_move group_by_prompt_text minibatches_ignored "
            "flat_trajectories_lost experts_of_last_step",
            "Token mean, clip-higher, two optimizer steps a batch, a flat group replaced.",
            dapo,
        ),
        (
            "grpo",
            "reference_moves old_logps_move rft_temperature overlong_after_advantage "
            "kl_without_importance flat_after_penalty",
            "Temperature 0.8, mean by response, KL to theta_i, over-long penalty, old log-probs "
            "by the trainer with an importance cap, warm-up, a smaller expert set.",
            dapo
            | {
                "sampling": {"max_new_tokens": 4, "temperature": 0.8},
                "rl": rl | grpo,
                "select": {"max_success_rate": 0.5, "max_per_problem": 2, "min_reward": 1.0},
            },
        ),
        (
            "uneven",
            "minibatches_uneven no_usable_group",
            "Three groups in two minibatches, the larger one first; then a step whose groups are "
            "all flat, without an update; then a third step.",
            dapo
            | {
                "samples": three_steps(prompts),
                "rl": rl | uneven | {"max_sampling_rounds": 1},
            },
        ),
    ]


def three_steps(prompts: list) -> list:
    """Three groups of two samples in each of three steps: all usable, all flat, two usable."""
    order = [[0, 1, 1], [0, 0, 1], [1, 0, 1]]
    right, wrong, also_right = [4, 6, 0], [11, 2, 8, 1], [9, 0]
    responses = [
        [[right, wrong], [[10, 0], [3, 5, 0]], [[7, 7, 1, 0], [2, 0]]],
        [[[4, 0], [5, 0]], [wrong, [12, 0]], [[10, 0], [10, 0]]],
        [[[6, 1, 0], also_right], [right, [1, 0]], [[0], [8, 8, 0]]],
    ]
    rewards = [
        [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]],
        [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]],
        [[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]],
    ]
    return sampled(prompts, order, responses, rewards)


def sampled(prompts: list, order: list, responses: list, rewards: list) -> list:
    """The samples of an iteration. order: the problems of each step's groups; responses and
    rewards: [step][group][sample]."""
    steps = []
    for step, groups in enumerate(responses):
        given = given_samples("iteration", [prompts[p] for p in order[step]], groups, step, 0.3)
        logps = iter(given)
        steps.append(
            [
                {
                    "problem": problem,
                    "samples": [
                        {"ids": ids, "logps": next(logps), "finished": ids[-1] == 0, "reward": r}
                        for ids, r in zip(group, rewards_, strict=True)
                    ],
                }
                for problem, group, rewards_ in zip(order[step], groups, rewards[step], strict=True)
            ]
        )
    return steps
