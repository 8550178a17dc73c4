"""What plain RL loses along the way, and RLoop keeps: over-fitting, forgetting, diversity and
stability, step by step, three seeds (the paper's Figures 1 to 4, on Countdown)."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from config import read_json, write_json
from experiments import common
from experiments.common import (
    MEASURES,
    RESULTS,
    RUNS,
    mean_and_std,
    publish,
    read_lines,
    run_all,
    scores_P,
)

SEEDS = range(3)
ARMS = {"plain RL": ["--method", "rl"], "RLoop": []}
N = 4  # tokens of an n-gram
WINDOW = 10  # RL steps of a moving mean


def ngrams(ids: list[int]) -> Counter:
    return Counter(zip(*(ids[i:] for i in range(N)), strict=False))


def similarity(a: Counter, b: Counter) -> float:
    """Cosine of two n-gram counts."""
    dot = sum(count * b[gram] for gram, count in a.items())
    norms = [np.sqrt(sum(count**2 for count in c.values())) for c in (a, b)]
    return dot / (norms[0] * norms[1]) if all(norms) else 0.0


def diversity(run_dir: Path) -> dict[str, list[float]]:
    """Over the RL steps: mean n-gram similarity of two responses to one problem in a step
    ("within"), and of a problem's responses to those of the step that last drew it ("between";
    None at first)."""
    within, between, last = [], [], {}
    for file in sorted((run_dir / "trajectories").glob("*.jsonl")):
        groups: dict[int, dict[str, list[Counter]]] = {}
        for t in read_lines(file):
            group = groups.setdefault(t["step"], {}).setdefault(t["problem"], [])
            group.append(ngrams(t["ids"]))
        for step_groups in groups.values():
            pairs = [itertools.combinations(group, 2) for group in step_groups.values()]
            within.append(np.mean([similarity(a, b) for group in pairs for a, b in group]))
            totals = {problem: sum(group, Counter()) for problem, group in step_groups.items()}
            seen = totals.keys() & last.keys()
            across = [similarity(totals[problem], last[problem]) for problem in seen]
            between.append(np.mean(across) if across else None)
            last |= totals
    return {"within": within, "between": between}


def curves(run_dir: Path) -> dict[str, str]:
    """Training reward, gradient norm and entropy of each RL step, and the diversity; nan = none."""
    keys = {"reward": "rl/reward_mean", "gradient norm": "rl/grad_norm"}
    keys["entropy"] = "rl/entropy_mean_nat"
    records = [r for r in read_lines(run_dir / "metrics.jsonl") if r["phase"] == "rl"]
    steps = {name: [r.get(key) for r in records] for name, key in keys.items()} | diversity(run_dir)
    return {
        key: " ".join("nan" if v is None else f"{v:.4g}" for v in values)
        for key, values in steps.items()
    }


def flips(result: dict) -> np.ndarray:
    """Share of the held-out games that the evaluation before solved and this one does not."""
    solved = [scores_P(e, "pass@32") for e in result["evaluations"]]
    return np.array([(a * (1 - b)).mean() for a, b in itertools.pairwise(solved)])


def main(jobs: int) -> None:
    commands = {}
    for seed in SEEDS:
        for arm, overrides in ARMS.items():
            options = ["--config", "configs/countdown.toml", "--seed", str(seed), *overrides]
            commands[f"phenomena/{arm}/{seed}"] = ["rloop.py", *options]
    results = run_all("phenomena", commands, jobs)
    file = RESULTS / "phenomena_steps.json"
    steps = read_json(file)
    steps |= {name: curves(RUNS / name) for name in commands if name not in steps}
    write_json(file, steps)
    publish("phenomena", table(results, steps))
    draw(results, steps)


def of_arm(values: dict, arm: str) -> list:
    return [values[f"phenomena/{arm}/{seed}"] for seed in SEEDS]


def table(results: dict, steps: dict) -> list[str]:
    """What each arm ends with: means over seeds; curves over the last WINDOW steps."""
    rows = {key: [] for key in ("reward", "gradient norm", "entropy", "within", "between")}
    rows |= {"avg@32": [], "pass@32": [], "1 -> 0 flips an evaluation": []}
    for arm in ARMS:
        for key in ("reward", "gradient norm", "entropy", "within", "between"):
            ends = [[float(v) for v in s[key].split()[-WINDOW:]] for s in of_arm(steps, arm)]
            rows[key].append(mean_and_std(np.nanmean(ends, axis=1)))
        for measure in MEASURES:
            ends = [scores_P(r["evaluations"][-1], measure).mean() for r in of_arm(results, arm)]
            rows[measure].append(mean_and_std(ends))
        rates = [flips(r).mean() for r in of_arm(results, arm)]
        rows["1 -> 0 flips an evaluation"].append(mean_and_std(rates))
    names = {"within": f"{N}-gram similarity within a step", "between": "the same between steps"}
    lines = [f"| at the end | {' | '.join(ARMS)} |", "|---|" + "---:|" * len(ARMS)]
    return lines + [f"| {names.get(key, key)} | {' | '.join(v)} |" for key, v in rows.items()]


def draw(results: dict, steps: dict) -> None:
    """Six panels over the RL steps, and the matrix of games and evaluations of seed 0."""
    figure = Figure(figsize=(13, 10.5), layout="constrained")
    axes = figure.subplots(3, 3).flat
    for key in ("reward", "gradient norm", "entropy", "within", "between"):
        ax = next(axes)
        for arm in ARMS:
            runs = [[float(v) for v in s[key].split()] for s in of_arm(steps, arm)]
            mean = np.mean(runs, axis=0)  # nan where a problem was not drawn before
            kernel = np.ones(WINDOW) / WINDOW
            ax.plot(np.convolve(mean, kernel, mode="valid"), label=arm)
        ax.set_title(
            {"within": "similarity within a step", "between": "between steps"}.get(key, key)
        )
    for measure in MEASURES:
        ax = next(axes)
        for arm in ARMS:
            chosen = [
                [(e["rl_steps"], scores_P(e, measure).mean()) for e in r["evaluations"]]
                for r in of_arm(results, arm)
            ]
            steps_E, scores_E = np.mean(chosen, axis=0).T
            ax.plot(steps_E, scores_E, marker="o", ms=3, label=arm)
        ax.set_title(f"held-out {measure}")
    for arm in ARMS:
        ax = next(axes)
        solved = [scores_P(e, "pass@32") for e in of_arm(results, arm)[0]["evaluations"]]
        order = np.lexsort(np.array(solved)[::-1])
        ax.imshow(np.array(solved)[:, order], aspect="auto", cmap="Greens", interpolation="none")
        ax.set_title(f"games solved by {arm}, seed 0")
        ax.set_xlabel("held-out games")
        ax.set_ylabel("evaluation")
    figure.axes[0].legend(frameon=False)
    figure.savefig(RESULTS / "phenomena.png", dpi=120)


if __name__ == "__main__":
    main(common.jobs_from_command_line(__doc__))
