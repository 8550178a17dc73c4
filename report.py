"""Tables and plots of one run or several, from the files of their run directories.

    python report.py RUN_DIR [RUN_DIR ...] [--out DIR]

Reads config.json and metrics.jsonl of every run, prints the tables, and writes report.md and
learning_curves.png into DIR (default: the first RUN_DIR).

Runs that differ only in their seed form a group. A group's numbers are the mean and the sample
standard deviation over seeds; a band in a plot spans the lowest to the highest seed. The interval
of a single evaluation is the run's own: 95% bootstrap over problems.
"""

import argparse
import itertools
import json
import operator
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import numpy as np

from config import UserError, flat

METHODS = {"rloop": "RLoop", "rl": "plain RL", "sft": "SFT", "eval": "evaluation"}
FINAL_POLICY = {"rloop": "rft", "rl": "rl", "sft": "rft", "eval": "base"}
# keys that do not make two runs different settings; keys in which compared runs must agree
NEUTRAL_KEY = re.compile(r"seed|run_dir|(rft\.)?save_every|eval\.every|compute\.(?!dtype).*")
SHARED_KEY = re.compile(r"data\.(eval.*|reward)|select\.min_reward|eval\.(?!every).*")
PLOT = "learning_curves.png"
PANELS = {
    "rl/reward_mean": "training reward",
    "avg": "held-out avg@{K} (diamonds: after RFT)",
    "pass": "held-out pass@{K} (diamonds: after RFT)",
    "rl/grad_norm": "gradient norm",
    "rl/entropy_mean_nat": "entropy (nat a token)",
    "pass@k": "held-out pass@k at the end (gray: base)",
}


@dataclass(kw_only=True)
class Run:
    """One run directory. Runs of one label differ only in their seed."""

    path: Path
    config: dict  # dotted keys
    method: str  # a name of METHODS, or "pure RFT": RLoop with an RL learning rate of 0
    records: dict[str, list[dict]]  # by phase
    label: str = ""

    def evals(self, policy: str) -> list[dict]:
        return [e for e in self.records["eval"] if e["policy"] == policy]

    def final(self) -> list[dict]:
        """The evaluation that stands for the run, after the last RFT or RL step; or none yet."""
        return self.evals(FINAL_POLICY[self.config["method"]])[-1:]

    def finished(self) -> bool:
        num_steps = self.config["iterations"] * self.config["rl.steps"]
        has_rl = self.config["method"] in ("rloop", "rl")
        return any(not has_rl or e["rl_steps"] >= num_steps for e in self.final())


def score(evaluation: dict, measure: str, bound: str = "") -> float:
    """avg@K or pass@K of an evaluation; bound "_low" or "_high": an end of its interval."""
    return evaluation[f"eval/{measure}@{evaluation['eval/num_samples']}{bound}"]


def load_groups(paths: list[Path]) -> dict[str, list[Run]]:
    """Label -> runs by seed. Raises UserError for what is no run and runs that do not compare."""
    runs = [load_run(path) for path in paths]
    label_runs(runs)
    runs.sort(key=lambda run: (run.label, run.config["seed"]))
    for a, b in itertools.pairwise(runs):
        for key in filter(SHARED_KEY.fullmatch, a.config | b.config):
            x, y = a.config.get(key), b.config.get(key)
            if x != y:
                raise UserError(f"{key}: {x!r} in {a.path}, {y!r} in {b.path}; expected the same")
        if (a.label, a.config["seed"]) == (b.label, b.config["seed"]):
            raise UserError(f"{a.path}, {b.path}: same settings and seed; expected each seed once")
    return {label: [*same] for label, same in itertools.groupby(runs, lambda run: run.label)}


def load_run(path: Path) -> Run:
    """Read a run directory. Raises UserError that names the file, and the line."""
    for name in ("config.json", "metrics.jsonl"):
        if not (path / name).is_file():
            raise UserError(f"{path}: has no {name}; expected the directory of a run")
    try:
        config = flat(json.loads((path / "config.json").read_bytes()))
        pure_rft = config["method"] == "rloop" and config["rl.lr"] == 0
        method = "pure RFT" if pure_rft else METHODS[config["method"]]
        config["eval.num_samples"]  # every run has it
    except (ValueError, AttributeError, KeyError) as error:
        raise UserError(f"{path / 'config.json'}: not a run's config: {error!r}") from None
    records = read_records(path / "metrics.jsonl")
    return Run(path=path, config=config, method=method, records=records)


def read_records(file: Path) -> dict[str, list[dict]]:
    """Phase -> records. Half a last line, written by a killed run, is reported and left out."""
    records = {phase: [] for phase in ("rl", "filter", "rft", "eval")}
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            print(f"{file}:{number}: the last line is half written and left out")
            break
        try:
            record = json.loads(line)
            records.setdefault(record["phase"], []).append(record)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{file}:{number}: not a record: {error!r}") from None
    return records


def label_runs(runs: list[Run]) -> None:
    """Label = the method, the settings in which its runs differ, and whether it is unfinished."""
    for method in {run.method for run in runs}:
        same = [run for run in runs if run.method == method]
        keys = sorted({key for run in same for key in run.config if not NEUTRAL_KEY.fullmatch(key)})
        keys = [key for key in keys if len({repr(run.config.get(key)) for run in same}) > 1]
        for run in same:
            settings = ", ".join(f"{key} {run.config.get(key)}" for key in keys)
            run.label = f"{method} ({settings})" if keys else method
            run.label += "" if run.finished() else ", unfinished"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table, aligned for the screen, without empty columns; a sentence if no rows."""
    if not rows:
        return ["No evaluation yet."]
    columns = [column for column in zip(header, *rows, strict=True) if any(column[1:])]
    first, *others = [max(map(len, column)) for column in columns]
    rule = ["-" * first, *("-" * (width - 1) + ":" for width in others)]
    names, *body = zip(*columns, strict=True)
    rows = [[row[0].ljust(first), *map(str.rjust, row[1:], others)] for row in (names, rule, *body)]
    return [f"| {' | '.join(row)} |" for row in rows]


def run_section(run: Run) -> list[str]:
    """The base, every RL phase and every RFT of one run, with the over-fitting gap."""
    K, is_loop = run.config["eval.num_samples"], run.config["method"] == "rloop"
    experts = {("rft", r["iteration"]): r["filter/num_experts"] for r in run.records["filter"]}
    rows = []
    for (policy, i), e in {(e["policy"], e["iteration"]): e for e in run.records["eval"]}.items():
        name = f"{'RFT' if policy == 'rft' else 'RL phase'} {i + 1}" if is_loop else run.method
        minutes, seconds = divmod(round(e["time/total_s"]), 60)
        cells = ["base" if policy == "base" else name]
        for measure in ("avg", "pass"):
            value, low, high = (score(e, measure, bound) for bound in ("", "_low", "_high"))
            cells.append(f"{value:.3f} [{low:.3f}, {high:.3f}]")
        cells += [f"{e['rl_steps']}", f"{e['num_trajectories']:,}"]
        rows.append([*cells, f"{experts.get((policy, i), '')}", f"{minutes}:{seconds:02d}"])
    names = f"policy,avg@{K} [95%],pass@{K} [95%],RL steps,trajectories,experts,wall m:ss"
    lines = [f"## {run.label}, seed {run.config['seed']}: {run.path}", ""]
    return [*lines, *table(names.split(","), rows), *gap_lines(run), ""]


def gap_lines(run: Run) -> list[str]:
    """Training reward minus held-out avg@K at the last RL evaluation; problems forgotten."""
    last, end = next(reversed(run.evals("rl")), None), next(reversed(run.records["eval"]), None)
    if last is None:
        return []
    steps = [r for r in run.records["rl"] if r["iteration"] == last["iteration"]]
    rewards = [r["rl/reward_mean"] for r in steps if r["rl_steps"] <= last["rl_steps"]][-10:]
    reward, heldout = fmean(rewards), score(last, "avg")
    return [
        "",
        f"Over-fitting gap at RL step {last['rl_steps']}: training reward {reward:.3f} (mean of the"
        f" last {len(rewards)} steps) - held-out avg {heldout:.3f} = {reward - heldout:.3f}",
        f"Forgetting: {end['eval/forgotten_share']:.3f} of the held-out problems were solved at an"
        " earlier evaluation and not at the last;",
        f"all evaluations together solve {end['eval/union_share']:.3f}",
    ]


def final_evals(groups: dict[str, list[Run]]) -> dict[str, list[dict]]:
    """Row of the summary -> evaluations, one a seed: the base, and what each group ends with."""
    trained = [run for runs in groups.values() for run in runs if run.method != "evaluation"]
    bases = {run.config["seed"]: e for run in trained for e in run.evals("base")}
    one_model = len({run.config.get("model.path") for run in trained}) == 1
    rows = {"base": [*bases.values()] if one_model else []}
    for label, runs in groups.items():
        rows[label] = [e for run in runs for e in run.final()]
        if runs[0].method == "RLoop":
            rows[f"{label}, last RL phase"] = [e for run in runs for e in run.evals("rl")[-1:]]
    return {name: evals for name, evals in rows.items() if evals}


def summary_section(groups: dict[str, list[Run]], K: int) -> list[str]:
    """Mean and sample standard deviation over seeds, relative to the best plain RL."""
    rows, measures = final_evals(groups), ("avg", "pass")
    means = {(name, m): fmean(score(e, m) for e in rows[name]) for name in rows for m in measures}
    plain = [n for n, same in groups.items() if same[0].method == "plain RL" and same[0].finished()]
    reference = max(plain, key=lambda name: means[name, "avg"], default=None)
    cells = []
    for name, evals in rows.items():
        line = [name, str(len(evals)), f"{fmean(e['rl_steps'] for e in evals):.0f}"]
        line.append(f"{fmean(e['num_trajectories'] for e in evals):,.0f}")
        for m in measures:
            spread = f" ± {stdev(score(e, m) for e in evals):.3f}" if len(evals) > 1 else ""
            base = means[reference, m] if reference not in (None, name) else 0
            change = f"{means[name, m] / base - 1:+.1%}" if base > 0 else ""
            line += [f"{means[name, m]:.3f}{spread}", change]
        cells.append(line)
    header = f"policy,seeds,RL steps,trajectories,avg@{K},vs RL,pass@{K},vs RL".split(",")
    lines = ["## Summary: mean ± sample standard deviation over seeds", "", *table(header, cells)]
    if reference:
        best = f", the best of {len(plain)} settings by avg@{K}" if len(plain) > 1 else ""
        lines += ["", f"vs RL: relative difference of the means to {reference}{best}."]
    return [*lines, ""]


def smooth(curve: dict, window: int) -> dict:
    """Centred moving mean of the values over an odd window, cut at the ends."""
    values, half = [*curve.values()], window // 2
    return {x: fmean(values[max(0, i - half) : i + half + 1]) for i, x in enumerate(curve)}


def draw_mean(ax, curves: list[dict], color: str, **style) -> dict:
    """Mean over the runs' curves, (x, ...) -> y, as a line, lowest to highest as a band."""
    shared = [key for key in curves[0] if all(key in curve for curve in curves)]
    x, y_RX = [key[0] for key in shared], np.array([[c[key] for key in shared] for c in curves])
    ax.plot(x, y_RX.mean(axis=0), color=color, **style)
    ax.fill_between(x, y_RX.min(0), y_RX.max(0), color=color, alpha=0.15, linewidth=0)
    return dict(zip(shared, y_RX.mean(axis=0), strict=True))


def draw_steps(ax, runs: list[Run], key: str, color: str, window: int) -> None:
    """A metric of the RL steps, smoothed within its phase."""
    for i in dict.fromkeys(r["iteration"] for r in runs[0].records["rl"]):
        curves = []
        for run in runs:
            records = [r for r in run.records["rl"] if r["iteration"] == i and key in r]
            curves.append(smooth({(r["rl_steps"],): r[key] for r in records}, window))
        draw_mean(ax, curves, color)


def draw_evals(ax, runs: list[Run], measure: str, color: str) -> None:
    """A held-out measure along the RL steps: dots inside an RL phase, diamonds after RFT."""
    place = operator.itemgetter("rl_steps", "policy", "iteration")
    curves = [{place(e): score(e, measure) for e in run.records["eval"]} for run in runs]
    mean = draw_mean(ax, curves, color, marker="o", markersize=4, label=runs[0].label)
    after_rft = {x: y for (x, policy, _), y in mean.items() if policy == "rft"}
    ax.plot(after_rft.keys(), after_rft.values(), "D", color=color)


def draw_pass_at_k(ax, evals: list[dict], color: str) -> None:
    """Held-out pass@k over the number of samples k."""
    ks = sorted(int(key[10:]) for key in evals[0] if re.fullmatch(r"eval/pass@\d+", key))
    curves = [{(k,): e[f"eval/pass@{k}"] for k in ks} for e in evals]
    draw_mean(ax, curves, color, marker="o", markersize=4)
    ax.set_xscale("log", base=2)
    ax.set_xticks(ks, [str(k) for k in ks])
    ax.set_xlabel("samples k")


def write_plot(groups: dict[str, list[Run]], file: Path) -> None:
    """One picture of six panels, a colour for each group."""
    from matplotlib.figure import Figure

    runs = [run for same in groups.values() for run in same]
    window = max(len(run.records["rl"]) for run in runs) // 30 // 2 * 2 + 1
    colors = {"base": "gray"} | {label: f"C{n % 10}" for n, label in enumerate(groups)}
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    axes = dict(zip(PANELS, figure.subplots(2, 3).flat, strict=True))
    for key, ax in axes.items():
        ax.set_title(PANELS[key].format(K=runs[0].config["eval.num_samples"]))
        ax.set_xlabel(f"RL steps (moving mean of {window})" if "rl/" in key else "RL steps")
        ax.xaxis.get_major_locator().set_params(integer=True)
        for label, same in groups.items():
            if "rl/" in key:
                draw_steps(ax, same, key, colors[label], window)
            elif key != "pass@k":
                draw_evals(ax, same, key, colors[label])
    for name, evals in final_evals(groups).items():
        if name in colors:
            draw_pass_at_k(axes["pass@k"], evals, colors[name])
    for ax in axes.values():
        ax.axhline(0, alpha=0)  # the margin above the data is one of the whole range
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.4)
    handles = axes["avg"].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(file, dpi=120)


def main(arguments: list[str]) -> int:
    """Print the tables, write report.md and the picture; returns the exit code."""
    parser = argparse.ArgumentParser(description="Tables and plots of runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, help="where the files go (default: the first RUN_DIR)")
    options = parser.parse_args(arguments)
    out = options.out or options.runs[0]
    try:
        groups = load_groups(options.runs)
        runs = [run for same in groups.values() for run in same]
        lines = [line for run in runs for line in run_section(run)]
        if len(runs) > 1:
            lines += summary_section(groups, runs[0].config["eval.num_samples"])
        print("\n".join(lines))
        out.mkdir(parents=True, exist_ok=True)
        if any(run.records["rl"] for run in runs):
            try:
                write_plot(groups, out / PLOT)
                lines.append(f"![learning curves]({PLOT})")
            except ImportError as error:
                print(f"no learning curves: {error}; pip install matplotlib")
        (out / "report.md").write_text("\n".join(["# Report", "", *lines, ""]), encoding="utf-8")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(out / "report.md")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may not know the plus-minus sign
    sys.exit(main(sys.argv[1:]))
