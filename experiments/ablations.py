"""RLoop with one thing changed, four seeds each: python -m experiments.ablations ablations (what
each part is worth) or beyond (what is not in the paper); return_100_games and return_high_rate: is
the return to theta_i worth more where RL goes further astray? And favor_hard: the best of beyond,
in all three methods, on the seeds and games on which the settings of headline.py were chosen."""

import sys

import numpy as np

from experiments import common
from experiments.common import MEASURES, mean_and_std, paired_gain, publish, run_all, scores_P
from experiments.headline import ENDS, SEARCH, SEARCH_SEEDS, loop

PLAIN, FAVOR_HARD = ["--method", "rl"], ["--rl.favor_hard", "true"]

# name -> (variant of variants.py or "", overrides)
ABLATIONS = {
    "RLoop": ("", []),
    "RFT from phi, not theta_i": ("rft_from_phi", []),
    "a quarter of the experts, spread over the phase": ("every_fourth_expert", []),
    "a quarter, those found last": ("last_experts", []),
    "a quarter, sampled from phi": ("resampled_experts", []),
    "no hard filter": ("", ["--select.max_success_rate", "1"]),
    "hard filter .5": ("", ["--select.max_success_rate", "0.5"]),
    "4 experts a problem": ("", ["--select.max_per_problem", "4"]),
    "no cap": ("", ["--select.max_per_problem", "100000"]),
    "1 iteration of 300 steps": ("", ["--iterations", "1", "--rl.steps", "300"]),
    "2 iterations of 150": ("", ["--iterations", "2", "--rl.steps", "150"]),
    "8 iterations of 38": ("", ["--iterations", "8", "--rl.steps", "38"]),
    "RFT 3 epochs": ("", ["--rft.epochs", "3"]),
    "RFT 12 epochs": ("", ["--rft.epochs", "12"]),
    "GRPO": ("", ["--rl.aggregation", "sequence", "--rl.clip_high", "0.2"]),
    "Dr.GRPO": ("", ["--rl.aggregation", "constant", "--rl.normalize_std", "false"]),
    "placebo: shuffled rewards": ("shuffled_rewards", []),
    "placebo: RFT on unverified samples": ("unverified_rft", []),
    "plain RL": ("", PLAIN),
    "plain RL, KL .01 to theta_0": ("", [*PLAIN, "--rl.kl_coef", "0.01"]),
    "plain RL, entropy bonus .01": ("entropy_bonus", PLAIN),
    "plain RL, optimizer reset 3 times": ("optimizer_resets", []),
}
BEYOND = {
    "RLoop": ("", []),
    "pure RFT, 4 rounds": ("", ["--rl.lr", "0"]),
    "pure RFT, experts of all rounds, from theta_0": ("pooled_from_theta_0", ["--rl.lr", "0"]),
    "experts of all iterations, RFT from theta_i": ("pooled_from_theta_i", []),
    "experts of all iterations, RFT from theta_0": ("pooled_from_theta_0", []),
    "theta_{i+1} = mean of theta_i and its RFT": ("mean_of_weights", []),
    "RFT weighs problems, not trajectories": ("weight_by_problem", []),
    "RL on problems with few successes": ("", FAVOR_HARD),
    "an old expert in failed groups": ("old_expert_in_failed_groups", []),
    "positives weigh .1 in RL": ("weak_positives", []),
    "RFT stopped by pass@32 of a validation split": ("rft_stopped_by_validation", []),
    "a phase ends when it solves nothing new": ("phase_ends_when_stalled", []),
}
ROUNDS_8, ROUNDS_4 = loop(8, "0", 6, 100), loop(4, "0", 6, 100)
HARD = {
    "RLoop": ("", []),
    "RLoop, favors hard problems": ("", FAVOR_HARD),
    "pure RFT, 8 rounds": ("", ROUNDS_8),
    "pure RFT, 8 rounds, favors hard problems": ("", [*ROUNDS_8, *FAVOR_HARD]),
    "pure RFT, 4 rounds, favors hard problems": ("", [*ROUNDS_4, *FAVOR_HARD]),
    "plain RL, lr 6e-5, favors hard problems": ("", [*PLAIN, "--rl.lr", "6e-5", *FAVOR_HARD]),
    "plain RL, lr 1e-4, favors hard problems": ("", [*PLAIN, *FAVOR_HARD]),
}
RETURN = {name: ABLATIONS[name] for name in ("RLoop", "RFT from phi, not theta_i", "plain RL")}
ARMS = {
    "ablations": (ABLATIONS, range(4), []),
    "beyond": (BEYOND, range(4), []),
    "favor_hard": (HARD, SEARCH_SEEDS, SEARCH),
    "return_100_games": (RETURN, range(8), ["--data.train_size", "100"]),
    "return_high_rate": (RETURN, range(4), ["--rl.lr", "2e-4"]),
}


def command(variant: str, overrides: list[str], seed: int) -> list[str]:
    program = ["-m", "experiments.variants", variant] if variant else ["rloop.py"]
    options = ["--config", "configs/countdown.toml", "--seed", str(seed)]
    return [*program, *options, *overrides, *ENDS]


def main(experiment: str, jobs: int) -> None:
    arms, seeds, games = ARMS[experiment]
    commands = {
        f"{experiment}/{name}/{seed}": command(variant, [*games, *overrides], seed)
        for seed in seeds
        for name, (variant, overrides) in arms.items()
    }
    results = run_all(experiment, commands, jobs)
    lines = [
        "| arm | avg@32 | difference [95%] | pass@32 | difference [95%] |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in arms:
        line = f"| {name} |"
        for measure in MEASURES:
            scores, reference = (
                np.array([last_scores(results[f"{experiment}/{n}/{s}"], measure) for s in seeds])
                for n in (name, "RLoop")
            )
            mean, low, high, _ = paired_gain(scores, reference)
            gain = "" if name == "RLoop" else f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
            line += f" {mean_and_std(scores.mean(axis=1))} | {gain} |"
        lines.append(line)
    publish(experiment, lines)


def last_scores(result: dict, measure: str) -> np.ndarray:
    return scores_P(result["evaluations"][-1], measure)


if __name__ == "__main__":
    main(sys.argv.pop(1), common.jobs_from_command_line(__doc__))
