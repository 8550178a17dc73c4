"""The cases of the pure functions: what is asked. make.py adds the expected answers.

Each case: (id, flags, one sentence, inputs). Its flags, separated by blanks, are keys of FLAGS in
flags.py: the faults that the case is there to catch.
"""

import random

FLOAT32 = {"rel": 1e-5, "abs": 1e-6}
EXACT = {"rel": 0.0, "abs": 0.0}


def document(function: str, stage: str, cases: list, dtype="float32", tolerance=FLOAT32) -> dict:
    """The cases of a function. dtype: the precision that the expected floats are written in."""
    rows = [
        {"id": id_, "flags": flags.split(), "about": about, "inputs": inputs}
        for id_, flags, about, inputs in cases
    ]
    head = {"function": function, "stage": stage, "dtype": dtype, "tolerance": tolerance}
    return head | {"cases": rows}


def documents() -> list[dict]:
    return [
        document("grpo_loss", "losses", grpo_loss()),
        document("kl_loss", "losses", kl_loss()),
        document("sft_loss", "losses", sft_loss()),
        document("token_weights", "losses", token_weights()),
        document("overlong_penalty", "losses", overlong_penalty()),
        document("seed_of", "random", seed_of(), "exact", EXACT),
        document("uniforms", "random", uniforms(), "float64", EXACT),
        document("next_problems", "random", next_problems(), "exact", EXACT),
        # a flat group must get 0, and the other expected values need no absolute tolerance
        document("group_advantages", "advantages", group_advantages(), tolerance=TIGHT),
        document("step_advantages", "advantages", step_advantages(), tolerance=TIGHT),
        document("dynamic_sampling", "advantages", dynamic_sampling(), "exact", EXACT),
        document("rl_learning_rates", "advantages", rl_learning_rates()),
        document("select_experts", "filter", select_experts(), "exact", EXACT),
        document("rft_schedule", "filter", rft_schedule(), tolerance=TIGHT),
        document("pass_at_k", "evaluation", pass_at_k()),
        document("bootstrap_interval", "evaluation", bootstrap_interval()),
        document("evaluation", "evaluation", evaluation()),
        document("sampled_logprobs", "sampling", sampled_logprobs()),
        document("draw", "sampling", draw(), "exact", EXACT),
        document("adamw", "optimizer", adamw()),
    ]


TIGHT = {"rel": 1e-5, "abs": 0.0}


# ---- losses


def grpo_loss() -> list:
    on_policy = {
        "logp": [-1.0, -0.5, -2.0],
        "old_logp": [-1.0, -0.5, -2.0],
        "advantages": [1.0, 1.0, -1.5],
        "weights": [0.25, 0.25, 0.5],
        "clip_low": 0.2,
        "clip_high": 0.28,
    }

    def ratio(delta: float, advantage: float, **changes) -> dict:
        one = {"logp": [-1.0 + delta], "old_logp": [-1.0], "advantages": [advantage]}
        return on_policy | one | {"weights": [1.0]} | changes

    mixed = {
        "logp": [-0.9, -1.4, -0.7, -3.0, -0.2, -1.1, -2.2, -0.6],
        "old_logp": [-1.3, -1.0, -0.75, -2.9, -0.9, -0.5, -2.0, -0.6],
        "advantages": [1.2, 1.2, 1.2, 1.2, -0.8, -0.8, -0.8, 0.0],
        "weights": [0.125, 0.125, 0.125, 0.125, 0.2, 0.2, 0.2, 0.1],
    }
    return [
        ("on_policy", "loss_sign", "Ratios of 1: loss -sum w A, gradient -w A.", on_policy),
        (
            "ratio_gradient",
            "ratio_left_out",
            "Inside the clip range the gradient is -w A rho, not -w A.",
            ratio(0.1, 2.0),
        ),
        (
            "high_positive",
            "clip_wrong_side",
            "rho = 1.5 and A > 0: clipped at 1 + clip_high, so the gradient is 0.",
            ratio(0.4054651, 1.0),
        ),
        (
            "high_negative",
            "clip_wrong_side",
            "rho = 1.5 and A < 0: the minimum is the unclipped term, which keeps its gradient.",
            ratio(0.4054651, -1.0),
        ),
        (
            "low_negative",
            "clip_wrong_side",
            "rho = 0.5 and A < 0: clipped at 1 - clip_low, so the gradient is 0.",
            ratio(-0.6931472, -1.0),
        ),
        (
            "low_positive",
            "clip_wrong_side",
            "rho = 0.5 and A > 0: the unclipped term, with its gradient.",
            ratio(-0.6931472, 1.0),
        ),
        (
            "between_the_clips",
            "clip_symmetric",
            "rho = 1.25 lies between 1 + clip_low and 1 + clip_high: not clipped.",
            ratio(0.2231436, 1.0),
        ),
        (
            "below_low_clip",
            "clip_symmetric",
            "rho = 0.75 and A < 0 lies below 1 - clip_low but not below 1 - clip_high: clipped.",
            ratio(-0.2876821, -1.0),
        ),
        (
            "clip_counts",
            "clip_counts",
            "clip_low counts A < 0 below the range, clip_high A > 0 above it; others do not count.",
            on_policy | mixed,
        ),
        (
            "zero_advantage",
            "clip_counts",
            "A = 0 outside of the range counts as a token and for neither clip.",
            ratio(0.7, 0.0),
        ),
        (
            "zero_advantage_below",
            "clip_counts",
            "The same below the range.",
            ratio(-0.7, 0.0),
        ),
        (
            "weight_zero",
            "padding_counts",
            "Entries of weight 0 hold anything, here ratios beyond any float: they do not count.",
            on_policy
            | {
                "logp": [-1.0, 0.0, -0.5],
                "old_logp": [-1.2, -1000.0, "-inf"],
                "advantages": [1.0, 1.0, 1.0],
                "weights": [0.5, 0.0, 0.0],
            },
        ),
        (
            "sum_not_mean",
            "weights_renormalized",
            "The weights are used as given: their sum here is 0.4, and nothing divides by it.",
            on_policy | {"weights": [0.1, 0.1, 0.2]},
        ),
        (
            "mixed",
            "clip_wrong_side",
            "Eight tokens of two responses, clipped and unclipped.",
            on_policy | mixed,
        ),
    ]


def kl_loss() -> list:
    above = {"logp": [-1.0], "ref_logp": [-1.5], "weights": [1.0]}
    several = {
        "logp": [-0.3, -2.0, -1.0, -4.0],
        "ref_logp": [-0.5, -1.2, -1.0, -3.0],
        "weights": [0.25, 0.25, 0.25, 0.25],
    }
    padded = {
        "logp": [-1.0, -2.0, 0.0],
        "ref_logp": [-1.25, 700.0, "inf"],
        "weights": [0.5, 0.0, 0.0],
    }
    equal = {"logp": [-1.0, -3.0], "ref_logp": [-1.0, -3.0], "weights": [0.5, 0.5]}
    return [
        ("above", "kl_sign", "d = ref - logp = -0.5: exp(d) - d - 1, gradient 1 - exp(d).", above),
        (
            "below",
            "kl_sign",
            "d = +0.5: the estimate is not symmetric.",
            above | {"ref_logp": [-0.5]},
        ),
        ("several", "kl_not_k3", "The k1 estimate -d would be negative for some.", several),
        ("equal", "kl_not_k3", "Equal log-probs: loss and gradient are 0.", equal),
        ("weight_zero", "padding_counts", "Entries of weight 0 hold anything.", padded),
    ]


def sft_loss() -> list:
    one = {"logp": [-0.5, -1.5, -2.5], "weights": [0.5, 0.25, 0.25]}
    return [
        ("weighted", "loss_sign", "-sum w logp, gradient -w.", one),
        (
            "sum_not_mean",
            "weights_renormalized",
            "The weights are used as given: their sum is 0.3.",
            one | {"weights": [0.1, 0.1, 0.1]},
        ),
        (
            "weight_zero",
            "padding_counts",
            "A log-prob of -inf at weight 0 does not count.",
            {"logp": [-0.5, "-inf", -1.0], "weights": [0.5, 0.0, 0.5]},
        ),
    ]


def token_weights() -> list:
    lengths = {"lengths": [1, 3, 4], "max_new_tokens": 16}

    def of(aggregation: str, **changes) -> dict:
        return lengths | {"aggregation": aggregation} | changes

    return [
        (
            "token",
            "aggregation_mixed_up",
            "1 / number of tokens of the whole step, the same for every response.",
            of("token"),
        ),
        (
            "sequence",
            "aggregation_mixed_up",
            "1 / (length * B): the mean of each response, then of the responses.",
            of("sequence"),
        ),
        (
            "constant",
            "constant_by_longest",
            "1 / (B * max_new_tokens): not the longest length of the step.",
            of("constant"),
        ),
        ("token_one", "aggregation_mixed_up", "One response.", of("token", lengths=[5])),
        (
            "sequence_equal",
            "aggregation_mixed_up",
            "Equal lengths: token and sequence agree, constant does not.",
            of("sequence", lengths=[4, 4]),
        ),
        (
            "constant_full",
            "constant_by_longest",
            "All responses as long as allowed: the weights of all tokens sum to 1.",
            of("constant", lengths=[16, 16]),
        ),
    ]


def overlong_penalty() -> list:
    at = [
        ("below", 10, "overlong_start", "Below max_new_tokens - buffer: 0."),
        ("at_the_start", 12, "overlong_start", "At max_new_tokens - buffer: still 0."),
        ("first_token", 13, "overlong_start", "One token into the buffer: -1 / buffer."),
        ("middle", 14, "overlong_sign", "Half of the buffer: -0.5."),
        ("full", 16, "overlong_sign", "At max_new_tokens: -1."),
    ]
    rows = [
        (id_, flag, about, {"length": length, "max_new_tokens": 16, "buffer": 4})
        for id_, length, flag, about in at
    ]
    off = {"length": 16, "max_new_tokens": 16, "buffer": 0}
    return [*rows, ("off", "overlong_off", "A buffer of 0 switches it off.", off)]


# ---- advantages


def group_advantages() -> list:
    def rewards(*groups, normalize_std=True) -> dict:
        return {"rewards": [list(group) for group in groups], "normalize_std": normalize_std}

    return [
        (
            "population_std",
            "unbiased_std",
            "Std with division by G, not by G - 1.",
            rewards((1.0, 0.0, 0.0, 0.0)),
        ),
        (
            "two_groups",
            "advantage_over_batch",
            "Mean and std of each group by itself.",
            rewards((1.0, 0.0, 0.0, 0.0), (1.0, 1.0, 1.0, 0.0)),
        ),
        (
            "no_std",
            "std_not_left_out",
            "normalize_std false: reward minus mean.",
            rewards((1.0, 0.0, 0.0, 0.0), normalize_std=False),
        ),
        ("flat_zeros", "flat_group_nan", "All rewards 0: exactly 0.", rewards((0.0, 0.0, 0.0))),
        (
            "flat_rounding",
            "flat_group_nan",
            "0.1 seven times: their mean is not 0.1 in floating point, the advantage is exactly 0.",
            rewards((0.1,) * 7),
        ),
        (
            "flat_no_std",
            "flat_group_nan",
            "The same without std: exactly 0, too.",
            rewards((0.1,) * 7, normalize_std=False),
        ),
        ("group_of_one", "flat_group_nan", "One response: exactly 0.", rewards((1.0,))),
        (
            "tiny_std",
            "std_eps",
            "A std of 1e-6 is as large as the 1e-6 that is added to it.",
            rewards((0.0, 2e-6)),
        ),
        (
            "fractions",
            "std_left_out",
            "Rewards between 0 and 1.",
            rewards((0.25, 0.5, 1.0, 0.0, 0.75)),
        ),
    ]


def step_advantages() -> list:
    def group(problem: str, *samples) -> dict:
        return {
            "problem": problem,
            "samples": [{"reward": reward, "length": length} for reward, length in samples],
        }

    plain = {"normalize_std": True, "max_new_tokens": 16, "overlong_buffer": 0}
    one, other = group("p", (1.0, 4), (0.0, 5)), group("q", (1.0, 3), (1.0, 3))
    again = group("p", (0.0, 4), (0.0, 6), (1.0, 2))
    return [
        (
            "drawn_twice",
            "group_by_prompt_text",
            "Problem p is drawn twice in a step: two groups, each with its own mean.",
            plain
            | {
                "groups": [
                    group("p", (1.0, 4), (0.0, 5), (0.0, 4)),
                    group("p", (1.0, 4), (1.0, 5), (0.0, 4)),
                ]
            },
        ),
        (
            "penalty",
            "overlong_after_advantage",
            "The over-long penalty is added to the reward before mean and std are taken.",
            plain | {"overlong_buffer": 8, "groups": [group("p", (1.0, 16), (1.0, 4), (0.0, 12))]},
        ),
        (
            "penalty_of_flat",
            "overlong_after_advantage",
            "Equal rewards, unequal lengths in the buffer: the penalty makes advantages.",
            plain | {"overlong_buffer": 8, "groups": [group("q", (1.0, 16), (1.0, 8))]},
        ),
        (
            "penalty_no_std",
            "overlong_after_advantage",
            "The same without std.",
            plain
            | {"overlong_buffer": 4, "normalize_std": False}
            | {"groups": [group("p", (1.0, 16), (0.0, 14)), one]},
        ),
        (
            "flat",
            "flat_group_nan",
            "A flat group beside another.",
            plain | {"groups": [one, other]},
        ),
        (
            "lengths_do_not_matter",
            "advantage_by_length",
            "Without penalty the lengths play no part.",
            plain | {"groups": [again]},
        ),
    ]


def dynamic_sampling() -> list:
    mixed, flat = [1.0, 0.0], [0.0, 0.0]
    start = {"num_problems": 5, "seed": 7, "iteration": 0, "step": 1, "drawn": 0}
    start |= {"problems_per_step": 2}
    cases = [
        (
            "none_flat",
            "refill_without_need",
            "Both groups are usable: one round.",
            start | {"max_rounds": 3, "rewards": [mixed, mixed]},
        ),
        (
            "one_replaced",
            "flat_group_kept",
            "A flat group is replaced by the next problem of the stream, sampled with the next "
            "round's seed.",
            start | {"max_rounds": 3, "rewards": [flat, mixed, mixed]},
        ),
        (
            "all_right",
            "flat_group_kept",
            "All right is flat, too.",
            start | {"max_rounds": 2, "rewards": [[1.0, 1.0], mixed, [1.0, 1.0]]},
        ),
        (
            "bounded",
            "refill_unbounded",
            "After max_rounds the step goes on with the groups it has.",
            start | {"max_rounds": 2, "rewards": [flat, mixed, flat]},
        ),
        (
            "none_usable",
            "refill_unbounded",
            "All flat: no usable group, but all trajectories count.",
            start | {"max_rounds": 2, "rewards": [flat, flat, flat, flat]},
        ),
        (
            "later_step",
            "seed_of_step_left_out",
            "The seed depends on iteration, step and round, the problems on how many were drawn.",
            start
            | {"iteration": 2, "step": 5, "drawn": 3, "max_rounds": 2}
            | {"rewards": [mixed, flat, mixed]},
        ),
        (
            "partial_rewards",
            "flat_means_zero",
            "Equal fractions are flat; 0.5 and 0.25 are not.",
            start | {"max_rounds": 1, "rewards": [[0.5, 0.5], [0.5, 0.25]]},
        ),
        (
            "penalty",
            "flat_after_penalty",
            "Equal rewards, unequal lengths in the buffer: flat, since the penalty does not count.",
            start
            | {"max_rounds": 2, "rewards": [[1.0, 1.0], mixed, mixed]}
            | {"lengths": [[8, 3], [2, 2], [8, 6]], "overlong_buffer": 4},
        ),
    ]
    return [(*head, unpenalized(inputs) | inputs) for *head, inputs in cases]


def unpenalized(inputs: dict) -> dict:
    """Lengths, and the settings of no over-long penalty, for the inputs of dynamic_sampling."""
    lengths = [[3] * len(group) for group in inputs["rewards"]]
    return {"lengths": lengths, "max_new_tokens": 8, "overlong_buffer": 0}


def rl_learning_rates() -> list:
    return [
        ("constant", "warmup", "No warm-up: constant.", {"steps": 3, "lr": 0.5, "warmup_steps": 0}),
        (
            "warmup",
            "warmup",
            "lr * min(1, step / (warmup_steps + 1)), steps from 1: the first rate is not 0.",
            {"steps": 5, "lr": 0.5, "warmup_steps": 3},
        ),
    ]


# ---- filter


def select_experts() -> list:
    def trajectories(*rows) -> list:
        return [{"problem": p, "reward": float(r), "ids": list(ids)} for p, r, ids in rows]

    def of(*rows, rate=0.5, cap=2, min_reward=1.0) -> dict:
        limits = {"max_success_rate": rate, "max_per_problem": cap, "min_reward": min_reward}
        return {"trajectories": trajectories(*rows)} | limits

    def successes(count: int) -> list:
        """count different successes, and as many failures, of one problem."""
        return [row for n in range(count) for row in [("p", 1, [n, 9]), ("p", 0, [n, 8])]]

    docstring = [
        *[("p", 0, [7]), ("p", 0, [8]), ("p", 1, [9]), ("q", 1, [5]), ("p", 1, [9])],
        *[("p", 0, [8]), ("p", 1, [6]), ("p", 0, [4]), ("p", 1, [3])],
    ]
    half = [("p", 1, [1]), ("p", 0, [2])]
    return [
        (
            "docstring",
            "cap_takes_first",
            "p is solved 4 times of 8 with 9, 6, 3, of which 9 and 3 are kept; q is too easy.",
            of(*docstring),
        ),
        (
            "threshold",
            "threshold_at_equality",
            "A success rate equal to the threshold is hard enough.",
            of(*half, rate=0.5),
        ),
        (
            "above_threshold",
            "easy_problems_kept",
            "2 of 3 is above 0.6: nothing is kept of it.",
            of(*half, ("p", 1, [3]), rate=0.6),
        ),
        (
            "rate_counts_duplicates",
            "rate_after_duplicates",
            "The success rate counts every trajectory: 3 of 4, not 1 different one of 2.",
            of(*half, ("p", 1, [1]), ("p", 1, [1]), rate=0.6),
        ),
        (
            "never_solved",
            "unsolved_kept",
            "A problem without success has a rate of 0 and no experts.",
            of(("p", 0, [1]), ("p", 0, [2]), *[("q", 1, [1]), ("q", 0, [2])]),
        ),
        (
            "duplicates",
            "duplicates_kept",
            "Of equal responses the first is kept.",
            of(("p", 1, [4, 5]), ("p", 0, [1]), ("p", 1, [4, 5]), ("p", 0, [2]), rate=0.9),
        ),
        (
            "same_ids_of_two_problems",
            "duplicates_across_problems",
            "Equal responses to different problems are different experts.",
            of(*[("p", 1, [1]), ("q", 1, [1]), ("p", 0, [2]), ("q", 0, [2])]),
        ),
        (
            "prefix",
            "duplicates_kept",
            "A response that begins as another one does is not equal to it.",
            of(*[("p", 1, [1]), ("p", 1, [1, 2]), ("p", 0, [3]), ("p", 0, [4])]),
        ),
        (
            "later_duplicate",
            "duplicates_order",
            "A response that comes again keeps the place of its first occurrence.",
            of(*[("p", 1, [1]), ("p", 1, [2]), ("p", 1, [1]), ("p", 0, [3])], rate=0.9),
        ),
        (
            "digits_joined",
            "ids_as_text",
            "The ids 1, 23 and 12, 3 are different responses.",
            of(*[("p", 1, [1, 23]), ("p", 1, [12, 3]), ("p", 0, [4]), ("p", 0, [5])]),
        ),
        ("cap_of_one", "cap_takes_last", "A cap of 1 keeps the first.", of(*successes(5), cap=1)),
        ("cap_evenly", "cap_takes_first", "3 of 7: places 0, 3, 6.", of(*successes(7), cap=3)),
        (
            "cap_half_to_even",
            "half_rounded_up",
            "3 of 6: places 0, 2.5, 5; a half is rounded to the even number, 2.",
            of(*successes(6), cap=3),
        ),
        (
            "cap_half_to_even_up",
            "half_rounded_down",
            "3 of 4: places 0, 1.5, 3; the even number is 2.",
            of(*successes(4), cap=3),
        ),
        (
            "cap_not_reached",
            "cap_takes_first",
            "Fewer than the cap: all.",
            of(*successes(3), cap=5),
        ),
        (
            "order_of_problems",
            "experts_sorted",
            "Problems in the order of their first trajectory, right or wrong.",
            of(*[("q", 0, [1]), ("p", 1, [2]), ("p", 0, [3]), ("q", 1, [4])]),
        ),
        (
            "problems_as_numbers",
            "experts_sorted",
            "The same where problems are numbers, which some languages sort as keys.",
            of(*[(12, 1, [1]), (12, 0, [2]), (3, 1, [3]), (3, 0, [4])]),
        ),
        (
            "partial_reward",
            "min_reward_ignored",
            "With min_reward 0.5 a reward of 0.5 is a success and 0.25 is none.",
            of(*[("p", 0.5, [1]), ("p", 0.25, [2]), ("p", 0, [3])], min_reward=0.5),
        ),
        (
            "partial_is_no_success",
            "min_reward_ignored",
            "With min_reward 1 a reward of 0.9 is none.",
            of(*[("p", 0.9, [1]), ("p", 1, [2]), ("p", 0, [3])]),
        ),
        ("empty", "unsolved_kept", "No trajectory, no expert.", of()),
    ]


def rft_schedule() -> list:
    common = {"seed": 3, "iteration": 0, "lr": 0.5}
    return [
        (
            "decay",
            "rft_without_decay",
            "Linear decay: at step s of S the rate is lr (S - s) / S; the last is lr / S.",
            common | {"num_examples": 4, "epochs": 2, "batch_size": 2, "warmup_steps": 0},
        ),
        (
            "last_batch",
            "last_batch_dropped",
            "5 examples in batches of 2: the last batch has one example.",
            common | {"num_examples": 5, "epochs": 2, "batch_size": 2, "warmup_steps": 0},
        ),
        (
            "warmup",
            "warmup",
            "The smaller of warm-up (s + 1) / (warmup_steps + 1) and decay.",
            common | {"num_examples": 6, "epochs": 1, "batch_size": 1, "warmup_steps": 2},
        ),
        (
            "later_iteration",
            "same_shuffle_each_epoch",
            "Every epoch of every iteration is a shuffle of its own.",
            common
            | {"iteration": 1}
            | {"num_examples": 6, "epochs": 3, "batch_size": 6, "warmup_steps": 0},
        ),
        (
            "none",
            "rft_without_experts",
            "Without examples there is no step.",
            common | {"num_examples": 0, "epochs": 2, "batch_size": 2, "warmup_steps": 0},
        ),
    ]


# ---- evaluation


def pass_at_k() -> list:
    rows = [
        ("one", 8, 3, 1, "biased_pass_at_k", "pass@1 is the share of right samples."),
        ("two", 8, 3, 2, "biased_pass_at_k", "1 - C(5, 2) / C(8, 2), not 1 - (5/8)^2."),
        ("all", 8, 3, 8, "pass_at_k_of_all", "k = n with a right sample: 1."),
        ("sure", 8, 6, 3, "pass_at_k_of_all", "Fewer wrong samples than k: 1."),
        ("none", 8, 0, 8, "pass_at_k_of_all", "No right sample: 0."),
        ("last", 32, 1, 32, "biased_pass_at_k", "One right sample of n = k: 1."),
        ("large", 2000, 7, 1000, "pass_at_k_overflow", "Binomials beyond float64."),
        ("huge", 100000, 3, 20000, "pass_at_k_overflow", "The same, larger."),
    ]
    return [
        (id_, flag, about, {"num_samples": n, "num_correct": c, "k": k})
        for id_, n, c, k, flag, about in rows
    ]


def bootstrap_interval() -> list:
    rng = random.Random(0)
    values = [0.0, 0.25, 0.5, 1.0, 0.75]
    resamples = [[rng.randrange(5) for _ in values] for _ in range(41)]
    return [
        (
            "resamples",
            "interval_not_95",
            "The 2.5% and 97.5% quantiles of 41 resampled means: places 1 and 39 of 0..40.",
            {"values": values, "resamples": resamples},
        ),
        (
            "between",
            "quantile_not_linear",
            "Of 10 means the quantiles lie between two: linear interpolation.",
            {"values": values, "resamples": resamples[:10]},
        ),
        (
            "constant",
            "interval_not_95",
            "Equal values: the interval is one point.",
            {"values": [0.5, 0.5, 0.5], "resamples": [[0, 1, 2], [0, 0, 0], [2, 2, 1]]},
        ),
        (
            "large_values",
            "sorted_as_text",
            "Means of more than one digit, and below 0, sorted as numbers.",
            {"values": [10.0, -9.0, 2.0, 100.0, -30.0], "resamples": resamples[:10]},
        ),
    ]


def evaluation() -> list:
    rewards = {"a": [1.0, 0.0, 0.0, 1.0], "b": [0.0, 0.0, 0.0, 0.0], "c": [0.0, 0.5, 0.0, 0.0]}
    finished = {"a": [True] * 4, "b": [True, False, False, True], "c": [True] * 4}
    inputs = {"rewards": rewards, "finished": finished, "min_reward": 1.0}
    earlier = [{"a": 0, "b": 2, "c": 0}, {"a": 1, "b": 0, "c": 0}]
    return [
        (
            "first",
            "forgotten_by_last",
            "The first evaluation: nothing is forgotten.",
            inputs | {"earlier": []},
        ),
        (
            "forgotten",
            "forgotten_by_last",
            "b was solved two evaluations ago and is not now: forgotten, and in the union.",
            inputs | {"earlier": earlier},
        ),
        (
            "partial",
            "min_reward_ignored",
            "With min_reward 0.5 the 0.5 of c is a success.",
            inputs | {"earlier": earlier, "min_reward": 0.5},
        ),
        (
            "six_samples",
            "biased_pass_at_k",
            "k is each power of two up to the number of samples, and that number.",
            inputs
            | {"earlier": []}
            | {"rewards": {"a": [1.0, 0.0, 0.0, 1.0, 0.0, 0.0], "b": [1.0] * 6}}
            | {"finished": {"a": [True] * 6, "b": [True] * 6}},
        ),
    ]


# ---- random numbers and sampling


def seed_of() -> list:
    rows = [
        ("zeros", [0, 0, 0, 0], "The seed of every evaluation of a run with seed 0."),
        ("step", [0, 0, 1, 0], "The first step."),
        ("round", [0, 0, 1, 1], "Its second round."),
        ("iteration", [0, 1, 0, 0], "Order matters."),
        ("seed", [1, 0, 0, 0], "Order matters."),
        ("large", [4294967296, 3, 700, 2], "A seed of more than 32 bits takes two words."),
        ("usual", [42, 3, 75, 0], "An ordinary step."),
    ]
    flags = "seed_of_step_left_out seed_of_32_bits"
    return [(id_, flags, about, {"path": path}) for id_, path, about in rows]


def uniforms() -> list:
    rows = [
        ("first", "0", 0, 0, 4, "The stream of the first response."),
        ("next_sample", "0", 0, 1, 4, "Another sample has a stream of its own."),
        ("next_prompt", "0", 1, 0, 4, "So has another problem."),
        ("large_seed", "15793235383387715774", 5, 3, 8, "A seed of 64 bits, as seed_of gives."),
    ]
    return [
        (
            id_,
            "stream_by_batch_row",
            about,
            {"seed": seed, "prompt": prompt, "sample": sample, "count": count},
        )
        for id_, seed, prompt, sample, count, about in rows
    ]


def next_problems() -> list:
    rows = [
        ("start", 5, 0, 3, 0, "The beginning of the first pass."),
        ("over_the_end", 5, 3, 4, 0, "From the end of one pass to the next, which differs."),
        ("several_passes", 3, 1, 9, 2, "More than a whole pass."),
        ("third_pass", 4, 8, 4, 1, "The third pass alone."),
        ("one", 1, 6, 3, 0, "A single problem again and again."),
    ]
    return [
        (
            id_,
            "same_shuffle_each_epoch",
            about,
            {"num_problems": number, "drawn": drawn, "count": count, "seed": seed},
        )
        for id_, number, drawn, count, seed, about in rows
    ]


def sampled_logprobs() -> list:
    logits = [[1.0, 3.0, 2.0, 0.5, 2.5, -1.0], [0.0, 0.0, 1.0, -2.0, 0.25, 4.0]]
    plain = {"logits": logits, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    ties = [[1.0, 2.0, 2.0, 2.0, 0.0]]
    return [
        ("plain", "logits_not_normalized", "log-softmax.", plain),
        (
            "large_logits",
            "softmax_overflow",
            "Logits whose exponentials no float holds.",
            plain | {"logits": [[1000.0, 999.0, 998.5], [-1000.0, -1001.0, -1000.5]]},
        ),
        (
            "temperature",
            "temperature_left_out",
            "Logits are divided by the temperature.",
            plain | {"temperature": 0.5},
        ),
        ("hot", "temperature_left_out", "A temperature above 1.", plain | {"temperature": 2.0}),
        (
            "greedy",
            "greedy_not_one",
            "Temperature 0: log-prob 0 for the best token, -inf for the others.",
            plain | {"temperature": 0.0},
        ),
        (
            "greedy_tie",
            "greedy_not_one",
            "Of equal best tokens the first.",
            plain | {"temperature": 0.0, "logits": ties},
        ),
        (
            "top_k",
            "cut_not_renormalized",
            "The k most probable tokens, renormalized; the others -inf.",
            plain | {"top_k": 3},
        ),
        (
            "top_k_tie",
            "top_k_tie",
            "Of equal tokens at the limit the first stay: exactly k.",
            plain | {"top_k": 2, "logits": ties},
        ),
        (
            "top_p",
            "cut_not_renormalized top_p_empty",
            "Tokens before which less than top_p has been passed; the first always.",
            plain | {"top_p": 0.7},
        ),
        (
            "top_p_at_equality",
            "top_p_at_equality",
            "0.5 is passed before the second token: top_p 0.5 keeps one, not two.",
            plain | {"top_p": 0.5, "logits": [[0.0, "-inf", 0.0, "-inf", "-inf"]]},
        ),
        (
            "top_p_small",
            "top_p_empty",
            "A top_p below the first token's probability keeps the first token.",
            plain | {"top_p": 0.01},
        ),
        (
            "both",
            "top_p_before_top_k",
            "top-k first; of the renormalized rest the first token has 0.52, so it stays alone.",
            plain | {"top_p": 0.5, "top_k": 2, "logits": [[2.0, 1.9, 1.8, 1.7, 1.6]]},
        ),
        (
            "temperature_first",
            "temperature_after_cut",
            "The temperature applies before top-p.",
            plain | {"temperature": 0.5, "top_p": 0.8},
        ),
        (
            "unknown_ids",
            "unknown_ids_sampled",
            "A logit of -3.4028235e38, as ids without a token get, has probability 0.",
            plain | {"logits": [[1.0, -3.4028235e38, 2.0]]},
        ),
    ]


def draw() -> list:
    quarter = -1.3862943611198906  # log 1/4
    four = [quarter] * 4

    def of(row: list, *points: float) -> dict:
        return {"logprobs": [row] * len(points), "uniforms": list(points)}

    return [
        ("inside", "draw_off_by_one", "One point in each quarter.", of(four, 0.1, 0.3, 0.6, 0.9)),
        (
            "zero_skips_impossible",
            "draw_impossible",
            "0 draws the first token with a probability above 0.",
            of(["-inf", "-inf", -0.6931471805599453, -0.6931471805599453], 0.0),
        ),
        (
            "zero_between",
            "draw_impossible",
            "A token of probability 0 between two others is never drawn.",
            of([-0.6931471805599453, "-inf", -0.6931471805599453], 0.4999, 0.5001),
        ),
        (
            "last_is_impossible",
            "draw_impossible",
            "The largest number below 1, also where it is rounded to 1, draws the last token with "
            "a probability above 0.",
            of([-0.6931471805599453, -0.6931471805599453, "-inf", "-inf"], 0.9999999999999999),
        ),
        (
            "total_is_not_one",
            "draw_past_the_end",
            "The point is the uniform number times the row's total: here 0.5.",
            of([-1.3862943611198906, -1.3862943611198906], 0.4, 0.6, 0.9999999999999999),
        ),
        (
            "one",
            "draw_impossible draw_past_the_end",
            "1, as float32 makes it of a number close to it, draws the last possible token.",
            {"logprobs": [four, [*four[:3], "-inf"]], "uniforms": [1.0, 1.0]},
        ),
        (
            "near_borders",
            "draw_in_half_precision",
            "Points 1e-5 beside the borders, which numbers of 16 bits do not tell from them.",
            of(four, 0.24999, 0.25001, 0.49999, 0.50001, 0.74999, 0.75001),
        ),
        ("certain", "draw_off_by_one", "One token has all.", of(["-inf", 0.0, "-inf"], 0.0, 0.99)),
        (
            "unequal",
            "draw_off_by_one",
            "Cumulative probabilities 0.5, 0.75, 1.",
            of([-0.6931471805599453, quarter, quarter], 0.49, 0.51, 0.74, 0.76),
        ),
    ]


# ---- optimizer


def adamw() -> list:
    parameters = {"a": [1.0, -2.0], "b": [0.5]}
    gradient = {"a": [0.3, -0.1], "b": [0.2]}
    later = {"a": [-0.2, 0.4], "b": [0.1]}
    plain = {"parameters": parameters, "gradients": [gradient], "lrs": [0.1]}
    plain |= {"weight_decay": 0.0, "grad_clip": 1.0}
    large = {"a": [3.0, -4.0], "b": [12.0]}
    return [
        (
            "first_step",
            "adam_bias_correction",
            "With bias correction the first step is lr * sign(gradient).",
            plain,
        ),
        (
            "two_steps",
            "adam_bias_correction",
            "The second step knows the moments of the first.",
            plain | {"gradients": [gradient, later], "lrs": [0.1, 0.1]},
        ),
        (
            "decay",
            "weight_decay_coupled",
            "Decoupled: the weight shrinks by lr * weight_decay of itself before the step.",
            plain | {"weight_decay": 0.1, "gradients": [gradient, later], "lrs": [0.1, 0.05]},
        ),
        (
            "clipped",
            "clip_by_tensor grad_norm_clipped",
            "The norm is that of all parameters together, 13; the gradient is scaled to grad_clip. "
            "The second step shows it, the first would hide it.",
            plain | {"gradients": [large, gradient], "lrs": [0.1, 0.1]},
        ),
        (
            "not_clipped",
            "clip_scales_up",
            "A norm below grad_clip is left as it is.",
            plain | {"gradients": [gradient, later], "lrs": [0.1, 0.1], "grad_clip": 5.0},
        ),
        (
            "tiny_gradient",
            "adam_eps",
            "A gradient as small as Adam's eps of 1e-8, which is added behind the root.",
            plain | {"gradients": [{"a": [1e-8, -2e-8], "b": [0.0]}]},
        ),
        (
            "fresh_gradient",
            "gradient_kept",
            "The gradient of a step does not hold that of the step before.",
            plain
            | {"gradients": [gradient, {"a": [0.0, 0.0], "b": [0.0]}, later]}
            | {"lrs": [0.1, 0.1, 0.1]},
        ),
        (
            "small_lr",
            "weight_decay_coupled",
            "Five steps of equal gradients with decay and a falling rate.",
            plain
            | {"gradients": [gradient] * 5, "lrs": [0.05, 0.04, 0.03, 0.02, 0.01]}
            | {"weight_decay": 0.5},
        ),
    ]
