"""RLoop, plain RL and pure RFT at equal RL steps and samples, each at its best settings.

Settings are chosen on seeds 10 to 12 and the split countdown:search, and reported once, on seeds 0
to 7 and the split countdown:heldout. All arms are chosen by the same number: the geometric mean of
avg@32 and pass@32 at the end. Every candidate runs on seed 10, the best four of each arm on seeds
11 and 12, too.
"""

import itertools
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments import common
from experiments.common import MEASURES, mean_and_std, paired_gain, publish, run_all, scores_P

STEPS = 300
SEARCH_SEEDS, SEEDS = (10, 11, 12), range(8)
ENDS = ["--eval.every", str(STEPS)]  # evaluated where a phase or an RFT ends
SEARCH = ["--data.eval", "countdown:search?numbers=4", "--data.eval_size", "200"]
NAMES = {"rl": "plain RL", "rft": "pure RFT", "rloop": "RLoop"}
BEST_FAVORING = {"rl": "lr 1e-4"}  # where rl.favor_hard is on: ablations.py favor_hard
FINAL = {"rloop": "rft", "rl": "rl", "rft": "rft"}  # the policy that an arm ends with
VALIDATION, TEST = 100, 400  # held-out games; the first choose plain RL's best checkpoint
BASE_SAMPLES = 256  # of the base policy, for the strata
LONGER = 400  # steps of plain RL, for the comparisons at equal tokens and equal time


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
        f"{n} iterations, lr {lr}, {epochs} epochs, cap {cap}": loop(n, lr, epochs, cap)
        for n, lr, (epochs, cap) in itertools.product(
            (2, 4, 8), ("6e-5", "1e-4"), ((6, 10), (12, 100))
        )
    }
    | {"4 iterations, lr 1.4e-4, 6 epochs, cap 10": loop(4, "1.4e-4", 6, 10)},
}


def command(overrides: list[str], seed: int, *more: str) -> list[str]:
    config = ["rloop.py", "--config", "configs/countdown.toml"]
    return [*config, "--seed", str(seed), *overrides, *more]


def main(experiment: str, setting: list[str], jobs: int) -> None:
    """The search and the report, with the overrides of a setting in all runs."""
    report(experiment, setting, search(f"{experiment}_search", setting, jobs), jobs)


def at_steps(result: dict, policy: str, steps: int = STEPS) -> dict:
    """The first evaluation of the policy at the given RL steps or later (16 rounds of 19: 304)."""
    found = (e for e in result["evaluations"] if e["policy"] == policy and e["rl_steps"] >= steps)
    return next(found)


def quality(evaluation: dict) -> float:
    avg, solved = (scores_P(evaluation, m).mean() for m in MEASURES)
    return float(np.sqrt(avg * solved))


def search(experiment: str, setting: list[str], jobs: int) -> dict[str, str]:
    """Arm -> its best candidate. Prints all of them."""
    best, lines, results = {}, [], {}

    def run(arm: str, names: list[str], seed: int) -> None:
        commands = {
            f"{experiment}/{arm}/{name}/{seed}": command(
                CANDIDATES[arm][name], seed, *SEARCH, *ENDS, *setting
            )
            for name in names
        }
        results.update(run_all(experiment, commands, jobs))

    def ends_of(arm: str, name: str) -> list[dict]:
        names = [f"{experiment}/{arm}/{name}/{seed}" for seed in SEARCH_SEEDS]
        return [at_steps(results[n], FINAL[arm]) for n in names if n in results]

    def rank(arm: str) -> list[str]:
        scores = {}
        for name in CANDIDATES[arm]:
            ends = ends_of(arm, name)
            scores[name] = (len(ends), np.mean([quality(end) for end in ends]))
        return sorted(scores, key=scores.get, reverse=True)

    for arm, candidates in CANDIDATES.items():
        run(arm, [*candidates], SEARCH_SEEDS[0])
        finalists = rank(arm)[:4]
        for seed in SEARCH_SEEDS[1:]:
            run(arm, finalists, seed)
        lines += [f"| {arm} | seeds | avg@32 | pass@32 |", "|---|---:|---:|---:|"]
        for name in rank(arm):
            ends = ends_of(arm, name)
            means = [np.mean([scores_P(end, m).mean() for end in ends]) for m in MEASURES]
            lines.append(f"| {name} | {len(ends)} | {means[0]:.3f} | {means[1]:.3f} |")
        lines.append("")
        best[arm] = rank(arm)[0]
    publish(experiment, lines)
    return best


def report(experiment: str, setting: list[str], best: dict[str, str], jobs: int) -> None:
    """The best candidates on the reported seeds and games."""
    favoring = best | BEST_FAVORING  # with the option rl.favor_hard, beside the paper's method
    commands = {}
    held_out = ["--data.eval_size", str(VALIDATION + TEST), *setting]
    for seed in SEEDS:
        for arm, name in best.items():
            every = ["--eval.every", "75" if arm == "rloop" else str(STEPS)]
            if arm == "rl":  # longer: for equal tokens and equal time
                every = ["--eval.every", "25", "--rl.steps", str(LONGER // 4)]
            overrides = [*CANDIDATES[arm][name], *held_out, *every]
            commands[f"{experiment}/{arm}/{seed}"] = command(overrides, seed)
            hard = [*CANDIDATES[arm][favoring[arm]], "--rl.favor_hard", "true", *held_out]
            commands[f"{experiment}/{arm}, hard/{seed}"] = command(hard, seed, *ENDS)
    results = run_all(experiment, commands, jobs)
    arms = {arm: [results[f"{experiment}/{arm}/{seed}"] for seed in SEEDS] for arm in best}
    rows = {"base": [r["evaluations"][0] for r in arms["rl"]]}
    names = {arm: f"{kind}, {best[arm]}" for arm, kind in NAMES.items()}
    rows[names["rl"]] = [at_steps(r, "rl") for r in arms["rl"]]
    rows["plain RL, its best checkpoint"] = [best_checkpoint(r) for r in arms["rl"]]
    loop_ends = [at_steps(r, "rft") for r in arms["rloop"]]
    for what, key in (("training tokens", "tokens"), ("wall time", "seconds")):
        pairs = zip(arms["rl"], loop_ends, strict=True)
        rows[f"plain RL at RLoop's {what}"] = [closest(r, key, end[key]) for r, end in pairs]
    rows[names["rft"]] = [at_steps(r, "rft") for r in arms["rft"]]
    rows["RLoop, after the last RL phase"] = [at_steps(r, "rl") for r in arms["rloop"]]
    rows[names["rloop"]] = loop_ends
    hard = {arm: [results[f"{experiment}/{arm}, hard/{seed}"] for seed in SEEDS] for arm in best}
    ends = {arm: [at_steps(r, FINAL[arm]) for r in hard[arm]] for arm in best}
    favored = {f"{NAMES[a]}, {favoring[a]}, favors hard problems": ends[a] for a in best}
    compared = {name: rows[name] for name in names.values()} | favored
    lines = [*table(rows, loop_ends), "", *table(compared, ends["rloop"]), ""]
    name = f"{experiment}/base"
    base = run_all(experiment, {name: base_command(held_out)}, jobs)[name]["evaluations"][0]
    publish(experiment, lines + strata_table(rows | favored, base))
    draw(arms, common.RESULTS / f"{experiment}.png")


def base_command(held_out: list[str]) -> list[str]:
    samples = ["--method", "eval", "--eval.num_samples", str(BASE_SAMPLES)]
    return command([*held_out, *samples], 0)


def strata_table(rows: dict[str, list[dict]], base: dict) -> list[str]:
    """The scores by how often the base policy solves a game: the mean hides where they differ."""
    counts = np.array(base["num_correct"].split(), dtype=int)[VALIDATION:]
    rate, edges = counts / BASE_SAMPLES, (0, 1 / BASE_SAMPLES, 0.05, 0.3, 1.01)
    masks = [(rate >= low) & (rate < high) for low, high in itertools.pairwise(edges)]
    names = (f"0 of {BASE_SAMPLES}", "below 5%", "below 30%", "30% and more")
    titles = [f"{name} ({mask.sum()} games)" for name, mask in zip(names, masks, strict=True)]
    lines = [f"| avg@32 / pass@32, by the base policy's rate | {' | '.join(titles)} |"]
    lines.append("|---" + "|---:" * len(masks) + "|")
    for name, ends in rows.items():
        means = [np.mean([scores_P(e, m)[VALIDATION:] for e in ends], axis=0) for m in MEASURES]
        cells = [
            " / ".join(f"{m[mask].mean():.3f}" for m in means) if mask.any() else ""
            for mask in masks
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def best_checkpoint(result: dict) -> dict:
    """The evaluation of plain RL, up to STEPS, with the best avg@32 on the validation games."""
    found = [e for e in result["evaluations"] if e["policy"] == "rl" and e["rl_steps"] <= STEPS]
    return max(found, key=lambda e: scores_P(e, "avg@32")[:VALIDATION].mean())


def closest(result: dict, key: str, value: float) -> dict:
    """The evaluation of plain RL at the closest training tokens or seconds."""
    found = [e for e in result["evaluations"] if e["policy"] == "rl"]
    return min(found, key=lambda e: abs(e[key] - value))


def table(rows: dict[str, list[dict]], last: list[dict]) -> list[str]:
    lines = [
        "| policy | RL steps | tokens, M | min | avg@32 | the last row's gain [95%] "
        "| pass@32 | the last row's gain [95%] |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, ends in rows.items():
        steps, tokens, seconds = (
            np.mean([end[key] for end in ends]) for key in ("rl_steps", "tokens", "seconds")
        )
        line = f"| {name} | {steps:.0f} | {tokens / 1e6:.2f} | {seconds / 60:.1f} |"
        for measure in MEASURES:
            ours, theirs = (
                np.array([scores_P(e, measure)[VALIDATION:] for e in some]) for some in (last, ends)
            )
            line += f" {mean_and_std(theirs.mean(axis=1))} |"
            mean, low, high, relative = paired_gain(ours, theirs)
            gain = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}], {relative:+.0%}"
            line += f" {gain if ends is not last else ''} |"
        lines.append(line)
    return lines


def draw(arms: dict[str, list[dict]], file: Path) -> None:
    """avg@32 and pass@32 over the RL steps, mean and range of the seeds."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for ax, measure in zip(figure.subplots(1, 2), MEASURES, strict=True):
        for arm, results in arms.items():
            curves: dict[int, list[float]] = {}
            for e in [e for r in results for e in r["evaluations"]]:
                if e["rl_steps"] <= STEPS + 4 and e["policy"] in ("base", FINAL[arm]):
                    score = scores_P(e, measure)[VALIDATION:].mean()
                    curves.setdefault(e["rl_steps"], []).append(score)
            steps = [*curves]
            (line,) = ax.plot(
                steps, [np.mean(v) for v in curves.values()], marker="o", ms=4, label=NAMES[arm]
            )
            low, high = ([f(v) for v in curves.values()] for f in (min, max))
            ax.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        ax.set_title(f"held-out {measure}")
        ax.set_xlabel("RL steps")
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.4)
    ax.legend(frameon=False)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main("headline", [], common.jobs_from_command_line(__doc__))
