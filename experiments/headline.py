"""RLoop, plain RL and pure RFT at equal RL steps and samples, each at its best settings.

Settings are chosen on seeds 10 to 12 and the split countdown:search, and reported once, on seeds 0
to 7 and the split countdown:heldout. All arms are chosen by the same number: the geometric mean of
avg@32 and pass@32 at the end. Every candidate runs on seed 10, the best four of each arm on seeds
11 and 12, too.
"""

import itertools

import numpy as np
from matplotlib.figure import Figure

from experiments import common
from experiments.common import MEASURES, mean_and_std, paired_gain, run_all, scores_P

STEPS = 300
SEARCH_SEEDS, SEEDS = (10, 11, 12), range(8)
SEARCH = ["--data.eval", "countdown:search?numbers=4", "--data.eval_size", "200"]
FINAL = {"rloop": "rft", "rl": "rl", "rft": "rft"}  # the policy that an arm ends with
VALIDATION = 100  # of the held-out games, the first; they choose plain RL's best checkpoint


def loop(iterations: int, lr: str, epochs: int, cap: int) -> list[str]:
    """Overrides of RLoop, or with lr 0 of pure RFT."""
    shape = ["--iterations", str(iterations), "--rl.steps", str(-(-STEPS // iterations))]
    rft = ["--rft.epochs", str(epochs), "--select.max_per_problem", str(cap)]
    return [*shape, "--rl.lr", lr, *rft]


CANDIDATES = {
    "rl": {
        f"lr {lr}": ["--method", "rl", "--rl.lr", lr]
        for lr in ("3e-5", "6e-5", "1e-4", "1.4e-4", "2e-4", "3e-4")
    },
    "rft": {
        f"{rounds} rounds, {epochs} epochs, cap {cap}": loop(rounds, "0", epochs, cap)
        for rounds, epochs, cap in itertools.product((2, 4, 8, 16), (6, 12, 24), (10, 100))
    },
    "rloop": {
        f"{iterations} iterations, lr {lr}, {epochs} epochs": loop(iterations, lr, epochs, 100)
        for iterations, lr, epochs in itertools.product((2, 4, 8), ("6e-5", "1e-4"), (6, 12))
    }
    | {"4 iterations, lr 1.4e-4, 12 epochs": loop(4, "1.4e-4", 12, 100)},
}


def command(overrides: list[str], seed: int, *more: str) -> list[str]:
    config = ["rloop.py", "--config", "configs/countdown.toml"]
    return [*config, "--seed", str(seed), *overrides, *more]


def at_steps(result: dict, policy: str, steps: int = STEPS) -> dict:
    """The arm's last evaluation at the given RL steps (of 16 rounds of 19: 304)."""
    found = [e for e in result["evaluations"] if e["policy"] == policy and e["rl_steps"] >= steps]
    return found[0]


def quality(evaluation: dict) -> float:
    avg, solved = (scores_P(evaluation, m).mean() for m in MEASURES)
    return float(np.sqrt(avg * solved))


def search(jobs: int) -> dict[str, str]:
    """Arm -> its best candidate. Prints all of them."""
    best = {}
    results: dict[str, dict] = {}

    def run(arm: str, names: list[str], seed: int) -> None:
        commands = {
            f"{arm}/{name}/{seed}": command(
                CANDIDATES[arm][name], seed, *SEARCH, "--eval.every", str(STEPS)
            )
            for name in names
        }
        results.update(run_all("search", commands, jobs))

    def score(arm: str, name: str) -> tuple[int, float]:
        seeds = [seed for seed in SEARCH_SEEDS if f"{arm}/{name}/{seed}" in results]
        ends = [at_steps(results[f"{arm}/{name}/{seed}"], FINAL[arm]) for seed in seeds]
        return len(seeds), float(np.mean([quality(end) for end in ends]))

    for arm, candidates in CANDIDATES.items():
        run(arm, [*candidates], SEARCH_SEEDS[0])
        finalists = sorted(candidates, key=lambda name: score(arm, name), reverse=True)[:4]
        for seed in SEARCH_SEEDS[1:]:
            run(arm, finalists, seed)
        ranked = sorted(candidates, key=lambda name: score(arm, name), reverse=True)
        best[arm] = ranked[0]
        print(f"\n{arm}: avg@32, pass@32 (seeds)")
        for name in ranked:
            seeds = [s for s in SEARCH_SEEDS if f"{arm}/{name}/{s}" in results]
            ends = [at_steps(results[f"{arm}/{name}/{s}"], FINAL[arm]) for s in seeds]
            means = [np.mean([scores_P(end, m).mean() for end in ends]) for m in MEASURES]
            print(f"  {name:36} {means[0]:.3f} {means[1]:.3f}  ({len(seeds)})")
    return best


if __name__ == "__main__":
    search(common.jobs_from_command_line(__doc__))
