"""Where RLoop, plain RL or pure RFT wins: strength of the base policy x length of the derivation x
number of training games, one seed a cell, each arm with the settings it has in headline.py.

The base policies are built first: the skills for games of 3, 4 and 5 numbers, then habits of three
strengths on top.
"""

import itertools
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from tqdm import tqdm

from experiments import common
from experiments.common import (
    MEASURES,
    RESULTS,
    ROOT,
    RUNS,
    known_results,
    paired_gain,
    publish,
    run,
    run_all,
    scores_P,
)
from experiments.headline import loop

NUMBERS = (3, 4, 5)
HABITS = (0, 2560, 10240)  # demonstrations of the habit; 0 = the skills alone
GAMES = (100, 400, 1600)
SEED = "20"
ARMS = {
    "RLoop": loop(4, "1e-4", 6, 10),
    "plain RL": ["--method", "rl", "--rl.lr", "6e-5"],
    "pure RFT": loop(8, "0", 6, 100),
}
COLORS = {"RLoop": "#b7dfb9", "plain RL": "#f5c9a8", "pure RFT": "#bcd0ec"}


def source(split: str, numbers: int) -> str:
    return f"countdown:{split}?numbers={numbers}"


def policy_of(name: str) -> Path:
    return RUNS / name / "policies" / "sft"


def starting_from(base: str) -> list[str]:
    return ["--model.path", str(policy_of(f"map/{base}").relative_to(ROOT))]


def build_bases(jobs: int) -> None:
    """Those that are not there of the policies RUNS/map/skills-NUMBERS and base-NUMBERS-HABIT."""
    skills, bases = {}, {}
    for n in NUMBERS:
        options = ["--sampling.max_new_tokens", "32", "--data.eval", source("search", n)]
        config = ["rloop.py", "--config", "configs/countdown_skills.toml"]
        skills[f"map/skills-{n}"] = [*config, *options, "--data.train", source("skills", n)]
        for habit in filter(None, HABITS):
            config = ["rloop.py", "--config", "configs/countdown_base.toml", *options]
            habits = ["--data.train", source("habit", n), "--data.train_size", str(habit)]
            bases[f"map/base-{n}-{habit}"] = [*config, *habits, *starting_from(f"skills-{n}")]
    for commands in (skills, bases):
        missing = {name: c for name, c in commands.items() if not policy_of(name).exists()}
        with ThreadPoolExecutor(jobs) as pool:
            done = pool.map(run, missing, missing.values())
            list(tqdm(done, total=len(missing), desc="base policies", unit="run"))


def cell_commands() -> dict[str, list[str]]:
    commands = {}
    for n in NUMBERS:
        for habit in HABITS:
            base = f"base-{n}-{habit}" if habit else f"skills-{n}"
            for games in GAMES:
                options = ["--config", "configs/countdown.toml", "--seed", SEED]
                options += starting_from(base)
                options += ["--data.train", source("train", n), "--data.train_size", str(games)]
                options += ["--data.eval", source("heldout", n), "--eval.every", "300"]
                options += ["--sampling.max_new_tokens", "32"]
                for arm, overrides in ARMS.items():
                    commands[f"map/{n}-{habit}-{games}/{arm}"] = ["rloop.py", *options, *overrides]
    return commands


def cell(results: dict, n: int, habit: int, games: int) -> dict[str, dict[str, np.ndarray]]:
    """Measure -> arm, or "base" -> score of each held-out game."""
    ends = {arm: results[f"map/{n}-{habit}-{games}/{arm}"]["evaluations"] for arm in ARMS}
    chosen = {"base": ends["RLoop"][0]} | {arm: e[-1] for arm, e in ends.items()}
    return {m: {name: scores_P(e, m) for name, e in chosen.items()} for m in MEASURES}


def winner_of(scores: dict[str, np.ndarray]) -> tuple[str, bool]:
    """The best arm, and whether the 95% interval (of the games) of its lead leaves out zero."""
    first, second = sorted(ARMS, key=lambda arm: scores[arm].mean(), reverse=True)[:2]
    return first, paired_gain(scores[first][None], scores[second][None])[1] > 0


def main(jobs: int) -> None:
    commands = cell_commands()
    if {shlex.join(command) for command in commands.values()} - known_results().keys():
        build_bases(jobs)
    results = run_all("map", commands, jobs)
    names = [f"{measure}: {arm}" for measure in MEASURES for arm in ARMS]
    lines = [f"| numbers | base | games | {' | '.join(names)} |"]
    lines.append("|---:" * (3 + len(names)) + "|")
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(len(MEASURES), len(NUMBERS))
    for column, n in enumerate(NUMBERS):
        bases = []
        for y, habit in enumerate(HABITS):
            for x, games in enumerate(GAMES):
                scores = cell(results, n, habit, games)
                base = scores["avg@32"]["base"].mean()
                values = []
                for ax, measure in zip(axes[:, column], MEASURES, strict=True):
                    winner, clear = winner_of(scores[measure])
                    draw_cell(ax, x, y, scores[measure], winner if clear else "")
                    for arm in ARMS:
                        star = "**" if clear and arm == winner else ""
                        values.append(f"{star}{scores[measure][arm].mean():.3f}{star}")
                lines.append(f"| {n} | {base:.3f} | {games} | {' | '.join(values)} |")
            bases.append(f"{base:.3f}")
        for ax, measure in zip(axes[:, column], MEASURES, strict=True):
            ax.set_title(f"{n} numbers, {measure}")
            ax.set_xticks(range(len(GAMES)), [f"{g:,}" for g in GAMES])
            ax.set_yticks(range(len(HABITS)), bases)
            ax.set_xlabel("training games")
            ax.set_ylabel("avg@32 of the base policy")
            ax.set(xlim=(-0.5, len(GAMES) - 0.5), ylim=(-0.5, len(HABITS) - 0.5))
    publish("map", [*lines, "", *gains(results)])
    figure.savefig(RESULTS / "map.png", dpi=120)


def gains(results: dict) -> list[str]:
    """RLoop over the two others, by games and by numbers: the mean of the cells, its 95% interval
    by bootstrap of the cells, and the relative difference of the means."""
    titles = [f"{measure} over {arm}" for measure in MEASURES for arm in ("plain RL", "pure RFT")]
    lines = [f"| cells | {' | '.join(titles)} |", "|---" + "|---:" * len(titles) + "|"]
    places = list(itertools.product(NUMBERS, HABITS, GAMES))
    cells = [cell(results, *place) for place in places]
    groups = [(f"{g:,} training games", [place[2] == g for place in places]) for g in GAMES]
    groups += [(f"{n} numbers", [place[0] == n for place in places]) for n in NUMBERS]
    for name, chosen in [*groups, ("all", [True] * len(places))]:
        line = f"| {name} ({sum(chosen)}) |"
        for measure in MEASURES:
            means = {a: np.array([[c[measure][a].mean()] for c in cells])[chosen] for a in ARMS}
            for arm in ("plain RL", "pure RFT"):
                gain = paired_gain(means["RLoop"], means[arm])
                line += " {:+.3f} [{:+.3f}, {:+.3f}], {:+.0%} |".format(*gain)
        lines.append(line)
    return lines


def draw_cell(ax, x: int, y: int, scores: dict[str, np.ndarray], winner: str) -> None:
    """A square in the winner's colour, grey where none is clear, with the scores of all arms."""
    color = COLORS.get(winner, "#e6e6e6")
    ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, edgecolor="white", lw=3))
    for row, arm in enumerate(ARMS):
        weight = "bold" if arm == winner else "normal"
        text = f"{arm} {scores[arm].mean():.3f}"
        ax.text(x, y + 0.25 - 0.25 * row, text, ha="center", va="center", fontsize=8, weight=weight)


if __name__ == "__main__":
    main(common.jobs_from_command_line(__doc__))
