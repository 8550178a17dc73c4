"""Where RLoop, plain RL or pure RFT wins: strength of the base policy x length of the derivation x
number of training games, one seed a cell.

The base policies are built first: the skills for games of 3, 4 and 5 numbers, then habits of three
strengths on top.
"""

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments import common
from experiments.common import MEASURES, RESULTS, ROOT, RUNS, publish, run_all, scores_P

NUMBERS = (3, 4, 5)
HABITS = (0, 2560, 10240)  # demonstrations of the habit; 0 = the skills alone
GAMES = (100, 400, 1600)
SEED = "20"
ARMS = {
    "RLoop": [[]],
    "plain RL": [["--method", "rl", "--rl.lr", lr] for lr in ("3e-5", "1e-4")],
    "pure RFT": [["--rl.lr", "0"]],
}
COLORS = {"RLoop": "#b7dfb9", "plain RL": "#f5c9a8", "pure RFT": "#bcd0ec"}


def source(split: str, numbers: int) -> str:
    return f"countdown:{split}?numbers={numbers}"


def starting_from(run: str) -> list[str]:
    policy = RUNS.relative_to(ROOT) / "map" / run / "policies" / "sft"
    return ["--model.path", str(policy)]


def build_bases(jobs: int) -> None:
    """The policies RUNS/map/skills-NUMBERS and RUNS/map/base-NUMBERS-HABIT."""
    skills, bases = {}, {}
    for n in NUMBERS:
        options = ["--sampling.max_new_tokens", "32", "--data.eval", source("search", n)]
        config = ["rloop.py", "--config", "configs/countdown_skills.toml"]
        skills[f"map/skills-{n}"] = [*config, *options, "--data.train", source("skills", n)]
        for habit in filter(None, HABITS):
            config = ["rloop.py", "--config", "configs/countdown_base.toml", *options]
            habits = ["--data.train", source("habit", n), "--data.train_size", str(habit)]
            bases[f"map/base-{n}-{habit}"] = [*config, *habits, *starting_from(f"skills-{n}")]
    run_all("map", skills, jobs)
    run_all("map", bases, jobs)


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
                for arm, settings in ARMS.items():
                    for overrides in settings:
                        name = f"map/{n}-{habit}-{games}/{arm} {overrides[-1:]}"
                        commands[name] = ["rloop.py", *options, *overrides]
    return commands


def cell(results: dict, n: int, habit: int, games: int) -> dict[str, dict[str, float]]:
    """Measure -> arm -> its best score, and that of the base policy."""
    found = {}
    for measure in MEASURES:
        scores = {}
        for arm, settings in ARMS.items():
            names = [f"map/{n}-{habit}-{games}/{arm} {overrides[-1:]}" for overrides in settings]
            ends = [results[name]["evaluations"] for name in names]
            scores[arm] = max(scores_P(e[-1], measure).mean() for e in ends)
            scores["base"] = scores_P(ends[0][0], measure).mean()
        found[measure] = scores
    return found


def main(jobs: int) -> None:
    build_bases(jobs)
    results = run_all("map", cell_commands(), jobs)
    lines = [
        "| numbers | base | games | " + " | ".join(f"{m}: {a}" for m in MEASURES for a in ARMS)
    ]
    lines[0] += " |"
    lines.append("|---" * (3 + 2 * len(ARMS)) + "|")
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(len(MEASURES), len(NUMBERS))
    for column, n in enumerate(NUMBERS):
        for y, habit in enumerate(HABITS):
            for x, games in enumerate(GAMES):
                scores = cell(results, n, habit, games)
                base = scores["avg@32"]["base"]
                values = [scores[m][a] for m in MEASURES for a in ARMS]
                numbers = " | ".join(f"{v:.3f}" for v in values)
                lines.append(f"| {n} | {base:.3f} | {games} | {numbers} |")
                for ax, measure in zip(axes[:, column], MEASURES, strict=True):
                    draw_cell(ax, x, y, scores[measure])
        bases = [cell(results, n, habit, GAMES[0])["avg@32"]["base"] for habit in HABITS]
        for ax, measure in zip(axes[:, column], MEASURES, strict=True):
            ax.set_title(f"{n} numbers, {measure}")
            ax.set_xticks(range(len(GAMES)), [f"{g:,}" for g in GAMES])
            ax.set_yticks(range(len(HABITS)), [f"{b:.3f}" for b in bases])
            ax.set_xlabel("training games")
            ax.set_ylabel("avg@32 of the base policy")
            ax.set(xlim=(-0.5, len(GAMES) - 0.5), ylim=(-0.5, len(HABITS) - 0.5))
    publish("map", lines)
    figure.savefig(RESULTS / "map.png", dpi=120)


def draw_cell(ax, x: int, y: int, scores: dict[str, float]) -> None:
    """A square in the winner's colour, with the scores of all arms in it."""
    winner = max(ARMS, key=lambda arm: scores[arm])
    corner = (x - 0.5, y - 0.5)
    ax.add_patch(Rectangle(corner, 1, 1, facecolor=COLORS[winner], edgecolor="white", linewidth=3))
    for row, arm in enumerate(ARMS):
        weight = "bold" if arm == winner else "normal"
        text = f"{arm} {scores[arm]:.3f}"
        ax.text(x, y + 0.25 - 0.25 * row, text, ha="center", va="center", fontsize=8, weight=weight)


if __name__ == "__main__":
    main(common.jobs_from_command_line(__doc__))
