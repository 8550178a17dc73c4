"""Tables and plots of one run or several, from the files of their run directories alone.

    python report.py RUN_DIR [RUN_DIR ...] [--out DIR]

reads RUN_DIR/config.json and RUN_DIR/metrics.jsonl, prints the tables, and writes report.md, learning_curves.png, pass_at_k.png and
stability.png into DIR (default: the first RUN_DIR). Runs that differ only in their seed form one group: its numbers are the mean and the
sample standard deviation over seeds, its bands go from the lowest to the highest seed. The interval of a single evaluation is the one
that the run wrote: 95% bootstrap over problems.
"""

import argparse
import json
import os
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import numpy as np

METHODS = {"rloop": "RLoop", "rl": "plain RL", "sft": "SFT", "eval": "evaluation"}
FINAL_POLICY = {"rloop": "rft", "rl": "rl", "sft": "rft", "eval": "base"}
COLORS = {
    "RLoop": "#0072B2",
    "plain RL": "#D55E00",
    "pure RFT": "#009E73",
    "SFT": "#CC79A7",
}  # Okabe and Ito: colour-blind safe
SPARE_COLORS = (
    "#E69F00",
    "#56B4E9",
    "#8C6BB1",
    "#999933",
    "#882255",
    "#44AA99",
)  # further groups of a method
NEUTRAL_KEYS = re.compile(
    r"(seed|run_dir|save_every|eval\.every|compute\.(threads|max_rows|micro_batch_tokens))$"
)  # do not make runs different settings
SHARED_KEYS = (
    "eval.num_samples",
    "eval.temperature",
    "eval.top_p",
    "eval.top_k",
    "data.eval",
    "data.eval_size",
)  # compared runs agree
REQUIRED = {
    "rl": ("iteration", "rl_steps", "rl/reward_mean"),
    "eval": ("policy", "iteration", "rl_steps", "eval/num_samples"),
}
BEST = ", best step"
STABILITY = {
    "rl/entropy_mean_nat": "entropy (nat a token)", "rl/grad_norm": "gradient norm", "rl/flat_share": "share of flat groups",
    "rl/clip_low_share": "share of tokens clipped low", "rl/clip_high_share": "share of tokens clipped high",
    "rl/logp_gap_max_nat": "largest sampler-trainer log-prob gap (nat)",
}  # fmt: skip
STYLE = {
    "font.size": 10, "axes.titlesize": 10, "axes.grid": True, "grid.color": "#E4E4E4", "grid.linewidth": 0.7, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "savefig.dpi": 150,
}  # fmt: skip


@dataclass(kw_only=True)
class Run:
    """One run directory: its config with dotted keys, its records, and what the reader should know about it."""

    path: Path
    config: dict
    records: list[dict]
    notes: list[str]
    label: str = ""

    @property
    def method(self) -> str:
        pure_rft = self.config["method"] == "rloop" and self.config["rl.lr"] == 0
        return "pure RFT" if pure_rft else METHODS[self.config["method"]]

    @property
    def num_steps(self) -> int:
        """RL steps of one phase when it is complete: plain RL has one phase with the steps of all iterations."""
        return self.config["rl.steps"] * (
            self.config["iterations"] if self.config["method"] == "rl" else 1
        )

    @property
    def finished(self) -> bool:
        final, method = self.final(), self.config["method"]
        if method == "rloop":
            return (
                final is not None
                and final["policy"] == "rft"
                and final["iteration"] == self.config["iterations"] - 1
            )
        return final is not None and (method != "rl" or final["rl_steps"] >= self.num_steps)

    def phase(self, name: str) -> list[dict]:
        return [r for r in self.records if r["phase"] == name]

    def evals(self, policy: str | None = None) -> list[dict]:
        return [r for r in self.phase("eval") if policy in (None, r["policy"])]

    def final(self) -> dict | None:
        """The evaluation that stands for the run: after the last RFT of RLoop, at the last step of plain RL."""
        return next(reversed(self.evals(FINAL_POLICY[self.config["method"]])), None)


@dataclass(kw_only=True)
class Group:
    """Runs that differ only in their seed."""

    label: str
    color: str
    runs: list[Run]


@dataclass(kw_only=True)
class Row:
    """One line of the summary: what a group ends with, evaluated once for each seed."""

    label: str
    color: str
    evals: dict[int, dict]
    dashed: bool = False

    def mean(self, measure: str) -> float:
        return fmean(score(e, measure) for e in self.evals.values())


def score(record: dict, measure: str, bound: str = "") -> float | None:
    """avg@K or pass@K of an evaluation, K being its number of samples; bound "_low" or "_high": an end of its interval, if it has one."""
    return record.get(f"eval/{measure}@{record['eval/num_samples']}{bound}")


# ---------------------------------------------------------------------------------------------------------------- reading


def load_runs(paths: list[Path]) -> list[Run]:
    """Read the run directories, label their groups and refuse what cannot be compared."""
    runs = [load_run(path) for path in {path.resolve(): path for path in paths}.values()]
    for key in SHARED_KEYS:
        for run in runs[1:]:
            if run.config.get(key) != runs[0].config.get(key):
                raise ValueError(
                    f"{run.path}: {key} = {run.config.get(key)!r}, but {runs[0].path} has {runs[0].config.get(key)!r}: "
                    "wanted runs with the same evaluation; report these apart"
                )
    label_runs(runs)
    runs.sort(
        key=lambda run: (
            list(METHODS).index(run.config["method"]),
            run.method,
            run.config["rl.lr"],
            run.label,
            run.config["seed"],
        )
    )
    seen: dict[tuple, Run] = {}
    for run in runs:
        first = seen.setdefault((run.label, run.config["seed"]), run)
        if first is not run:
            raise ValueError(
                f"{run.path}: {run.label}, seed {run.config['seed']}, as in {first.path}; wanted each seed once"
            )
    return runs


def load_run(path: Path) -> Run:
    """Read config.json and metrics.jsonl of a run directory. Raises ValueError that names the file, and the line."""
    for name in ("config.json", "metrics.jsonl"):
        if not (path / name).is_file():
            got = f"no {name} there" if path.is_dir() else "no such directory"
            raise ValueError(
                f"{path}: {got}; wanted a run directory with config.json and metrics.jsonl"
            )
    try:
        config = flatten(json.loads((path / "config.json").read_bytes()))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path / 'config.json'}: not a JSON object ({error})") from None
    for key in ("method", "seed", "iterations", "rl.lr", "rl.steps", "eval.num_samples"):
        if key not in config:
            raise ValueError(
                f"{path / 'config.json'}: no key {key}; wanted the resolved config of a run"
            )
    if config["method"] not in METHODS:
        raise ValueError(
            f"{path / 'config.json'}: method = {config['method']!r}; wanted one of {', '.join(METHODS)}"
        )
    records, notes = read_records(path / "metrics.jsonl")
    return Run(path=path, config=config, records=records, notes=notes)


def flatten(tree: dict, prefix: str = "") -> dict:
    """Nested sections as one dictionary with dotted keys."""
    flat = {}
    for key, value in tree.items():
        flat |= (
            flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def read_records(file: Path) -> tuple[list[dict], list[str]]:
    """Records of metrics.jsonl, and a note when the run was stopped while it wrote the last one."""
    records = []
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if not line.endswith(b"\n"):  # only the last line can lack its end
                return records, [f"{file}:{number}: the last line is half written and was left out"]
            raise ValueError(f"{file}:{number}: not a JSON record ({error})") from None
        if not isinstance(record, dict) or "phase" not in record:
            raise ValueError(f"{file}:{number}: got {line[:60]!r}; wanted a record with a phase")
        required = REQUIRED.get(record["phase"], ())
        if record["phase"] == "eval" and "eval/num_samples" in record:
            required += tuple(
                f"eval/{measure}@{record['eval/num_samples']}" for measure in ("avg", "pass")
            )
        for key in required:
            if key not in record:
                raise ValueError(f"{file}:{number}: {record['phase']} record without {key!r}")
        records.append(record)
    return records, []


def label_runs(runs: list[Run]) -> None:
    """Label = the method, and the settings in which runs of the same method differ (except the seed)."""
    for method in {run.method for run in runs}:
        same = [run for run in runs if run.method == method]
        keys = sorted({key for run in same for key in run.config if not NEUTRAL_KEYS.match(key)})
        keys = [key for key in keys if len({json.dumps(run.config.get(key)) for run in same}) > 1]
        for run in same:
            settings = ", ".join(
                f"{short_key(key, run.config)} {short_value(run.config.get(key))}" for key in keys
            )
            run.label = f"{method} ({settings})" if keys else method


def short_key(key: str, config: dict) -> str:
    """A key without its section where no other section has that name; lr is RL's."""
    name = key.rpartition(".")[2]
    return name if key == "rl.lr" or sum(k.rpartition(".")[2] == name for k in config) < 2 else key


def short_value(value) -> str:
    """A setting's value: 0.0003 as 3e-4."""
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return str(value)


# ----------------------------------------------------------------------------------------------------------------- tables


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table that is aligned on the screen too, without empty columns; a long first cell goes on in the next line."""
    full = [i for i in range(len(header)) if any(row[i] for row in rows)]
    cells = [[header[i] for i in full]]
    for row in ([row[i] for i in full] for row in rows):
        first, *more = textwrap.wrap(row[0], 30)
        cells += [[first, *row[1:]], *([part] + [""] * (len(row) - 1) for part in more)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
        for row in cells
    ]
    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return [lines[0], f"|{rule}|", *lines[1:]]


def tables(runs: list[Run]) -> list[str]:
    """Lines of the report: a section for each run and, of several runs, the summary."""
    return [line for run in runs for line in run_section(run)] + (
        summary_section(runs) if len(runs) > 1 else []
    )


def checkpoints(run: Run) -> list[tuple[str, dict]]:
    """Name and evaluation of the base, each end of an RL phase and each RFT; for plain RL of its best step too."""
    last = {(e["policy"], e["iteration"]): e for e in run.evals()}
    rows = []
    for (policy, i), e in last.items():
        name = {"base": "base", "rl": f"RL phase {i + 1}", "rft": f"RFT {i + 1}"}.get(
            policy, policy
        )
        if run.config["method"] in ("rl", "sft") and policy != "base":
            name = run.method
        if run.config["method"] == "rl" and policy == "rl":
            rows.append((name + BEST, ends(run)[BEST]))
        if policy == "rl" and e["rl_steps"] < (i + 1) * run.num_steps:
            name += ", unfinished"
        rows.append((name, e))
    return rows


def with_interval(e: dict, measure: str) -> str:
    low, high = score(e, measure, "_low"), score(e, measure, "_high")
    return f"{score(e, measure):.3f}" + (
        "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    )


def run_section(run: Run) -> list[str]:
    """Heading, table, gap and notes of one run."""
    lines = [
        f"## {run.label}, seed {run.config['seed']}: {run.path}"
        + ("" if run.finished else " (unfinished)"),
        "",
    ]
    K = run.config["eval.num_samples"]
    num_experts = {r["iteration"]: r.get("filter/num_experts") for r in run.phase("filter")}
    rows = []
    for name, e in checkpoints(run):
        experts = num_experts.get(e["iteration"]) if e["policy"] == "rft" else None
        minutes, seconds = divmod(round(e.get("time/total_s", 0)), 60)
        counts = [
            f"{e['rl_steps']}",
            f"{e.get('num_trajectories', 0):,}",
            "" if experts is None else f"{experts:,}",
        ]
        rows.append(
            [
                name,
                with_interval(e, "avg"),
                with_interval(e, "pass"),
                *counts,
                f"{minutes}:{seconds:02d}",
            ]
        )
    if rows:
        lines += table(
            [
                "policy",
                f"avg@{K} [95%]",
                f"pass@{K} [95%]",
                "RL steps",
                "trajectories",
                "experts",
                "wall m:ss",
            ],
            rows,
        )
    else:
        lines.append("No evaluation yet.")
    return [*lines, *gap_lines(run), *(f"Note: {note}" for note in run.notes), ""]


def gap_lines(run: Run) -> list[str]:
    """Over-fitting: training reward minus held-out avg@K of the last evaluated RL policy. Forgetting: problems lost on the way."""
    end, K = next(reversed(run.evals("rl")), {"iteration": None}), run.config["eval.num_samples"]
    steps = [
        r
        for r in run.phase("rl")
        if r["iteration"] == end["iteration"] and r["rl_steps"] <= end["rl_steps"]
    ][-10:]
    if not steps:
        return []
    reward, heldout = fmean(r["rl/reward_mean"] for r in steps), score(end, "avg")
    last = run.evals()[-1]
    lines = [
        "",
        f"Over-fitting gap at RL step {end['rl_steps']}: training reward {reward:.3f} (mean of the last {len(steps)} RL steps)"
        f" - held-out avg@{K} {heldout:.3f} = {reward - heldout:.3f}",
    ]
    if "eval/forgotten_share" in last:
        lines.append(
            f"Forgetting: {last['eval/forgotten_share']:.3f} of the held-out problems were solved at an earlier evaluation and not at"
            f" the last; all evaluations together solve {last['eval/union_share']:.3f}"
        )
    return lines


def group_runs(runs: list[Run]) -> list[Group]:
    """Groups of the finished runs; of unfinished ones only where a label has no finished one."""
    groups, own, spare = [], dict(COLORS), list(SPARE_COLORS)
    for label in dict.fromkeys(run.label for run in runs):
        same = [run for run in runs if run.label == label]
        color = own.pop(same[0].method, None) or (spare.pop(0) if spare else "#999999")
        finished = [run for run in same if run.finished]
        groups.append(
            Group(
                label=label if finished else f"{label}, unfinished",
                color=color,
                runs=finished or same,
            )
        )
    return groups


def ends(run: Run) -> dict[str, dict]:
    """What a run is judged by: its final evaluation under "", and under a suffix of the label the one reported beside it."""
    found, rl = {"": run.final()}, run.evals("rl")
    if rl and run.method == "RLoop":
        found[", last RL phase"] = rl[-1]
    if rl and run.method == "plain RL":
        found[BEST] = max(rl, key=lambda e: score(e, "avg"))
    return {suffix: e for suffix, e in found.items() if e}


def summary_rows(groups: list[Group]) -> list[Row]:
    """The base, then each group's final policy and, dashed, the one that is reported beside it."""
    base = {
        run.config["seed"]: e for group in groups for run in group.runs for e in run.evals("base")
    }
    rows = [Row(label="base", color="#555555", evals=base, dashed=True)]
    for group in groups:
        by_seed = {
            run.config["seed"]: ends(run) for run in group.runs if run.method != "evaluation"
        }
        for suffix in dict.fromkeys(suffix for found in by_seed.values() for suffix in found):
            evals = {seed: found[suffix] for seed, found in by_seed.items() if suffix in found}
            rows.append(
                Row(label=group.label + suffix, color=group.color, evals=evals, dashed=suffix != "")
            )
    return [row for row in rows if row.evals]


def summary_section(runs: list[Run]) -> list[str]:
    """The comparison of groups, and the numbers of each seed."""
    groups, K = group_runs(runs), runs[0].config["eval.num_samples"]
    rows = summary_rows(groups)
    if not rows:
        return []
    plain = [
        group.label
        for group in groups
        if group.runs[0].method == "plain RL" and group.runs[0].finished
    ]
    reference = max(
        (row for row in rows if row.label in plain), key=lambda row: row.mean("avg"), default=None
    )
    cells, seeds, budgets = [], [], set()
    for row in rows:
        steps, trajectories = (
            fmean(e.get(key, 0) for e in row.evals.values())
            for key in ("rl_steps", "num_trajectories")
        )
        measures = [
            cell
            for m in ("avg", "pass")
            for cell in (mean_std(row, m), relative(row, reference, m))
        ]
        cells.append(
            [row.label, str(len(row.evals)), f"{steps:.0f}", f"{trajectories:,.0f}", *measures]
        )
        seeds += [
            [row.label, str(s), f"{score(e, 'avg'):.3f}", f"{score(e, 'pass'):.3f}"]
            for s, e in sorted(row.evals.items())
        ]
        budgets |= {trajectories} if trajectories and not row.dashed else set()
    lines = ["## Summary: mean ± sample standard deviation over seeds", ""]
    lines += [
        *table(
            [
                "policy",
                "seeds",
                "RL steps",
                "trajectories",
                f"avg@{K}",
                "vs RL",
                f"pass@{K}",
                "vs RL",
            ],
            cells,
        ),
        "",
    ]
    if reference:
        best = (
            f", the best of {len(plain)} plain-RL settings by final avg@{K}"
            if len(plain) > 1
            else ""
        )
        lines.append(f"vs RL: relative difference of the means to {reference.label}{best}.")
        lines.append(
            f"Best step: the checkpoint with the highest avg@{K} on the held-out problems themselves, which flatters it."
        )
    if budgets and max(budgets) > 1.02 * min(budgets):
        lines.append(
            f"Note: the budgets are not equal: from {min(budgets):,.0f} to {max(budgets):,.0f} sampled trajectories."
        )
    left_out = [run for run in runs if not any(run in group.runs for group in groups)]
    lines += [
        f"Note: {run.label}, seed {run.config['seed']} is unfinished and left out of the summary and the plots."
        for run in left_out
    ]
    return [*lines, "", *table(["policy", "seed", f"avg@{K}", f"pass@{K}"], seeds), ""]


def mean_std(row: Row, measure: str) -> str:
    values = [score(e, measure) for e in row.evals.values()]
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def relative(row: Row, reference: Row | None, measure: str) -> str:
    base = reference.mean(measure) if reference and reference is not row else 0
    return f"{row.mean(measure) / base - 1:+.1%}" if base > 0 else ""


# ------------------------------------------------------------------------------------------------------------------ plots


def draw_curve(ax, x, values_RX: np.ndarray, color: str, band: bool = True, **style) -> None:
    """Mean over runs (rows), and a band from the lowest to the highest; NaN = no value."""
    some = np.isfinite(values_RX).any(0)
    if not some.any():
        return
    x, values_RX = np.asarray(x)[some], values_RX[:, some]
    ax.plot(x, np.nanmean(values_RX, 0), color=color, **style)
    if band and len(values_RX) > 1:
        ax.fill_between(
            x,
            np.nanmin(values_RX, 0),
            np.nanmax(values_RX, 0),
            color=color,
            alpha=0.15,
            linewidth=0,
        )


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving mean over an odd window, cut at the ends; NaN values do not count."""
    known, ones, middle = (
        np.isfinite(values),
        np.ones(window),
        slice(window // 2, window // 2 + len(values)),
    )
    count = np.convolve(known, ones)[middle]
    total = np.convolve(np.where(known, values, 0.0), ones)[middle]
    return np.where(count > 0.5, total / np.maximum(count, 1), np.nan)


def draw_steps(ax, group: Group, key: str, window: int, **style) -> None:
    """A metric of the RL steps, smoothed within each phase, at the steps that all runs of the group have."""
    by_step = [{r["rl_steps"]: r for r in run.phase("rl")} for run in group.runs]
    common = [r for step, r in by_step[0].items() if all(step in steps for steps in by_step)]
    for i in dict.fromkeys(r["iteration"] for r in common):
        x = [r["rl_steps"] for r in common if r["iteration"] == i]
        values = np.array(
            [
                smooth(np.array([steps[step].get(key, np.nan) for step in x], float), window)
                for steps in by_step
            ]
        )
        draw_curve(ax, x, values, group.color, **style)


def draw_evals(ax, group: Group, measure: str) -> None:
    """Held-out measure along RL steps: dots in RL, a diamond after RFT, from which the next phase goes on."""
    by_key = [
        {(e["rl_steps"], e["iteration"], e["policy"]): score(e, measure) for e in run.evals()}
        for run in group.runs
    ]
    keys = [key for key in by_key[0] if all(key in values for values in by_key)]
    if not keys:
        return
    values = np.array([[evals[key] for key in keys] for evals in by_key])
    draw_curve(ax, [key[0] for key in keys], values, group.color, linewidth=2)
    for policy, marker, size in (("rl", "o", 4), ("rft", "D", 7)):
        at = [j for j, key in enumerate(keys) if key[2] == policy]
        ax.plot(
            [keys[j][0] for j in at],
            values.mean(0)[at],
            marker,
            color=group.color,
            markersize=size,
            markeredgecolor="white",
            zorder=3,
        )


def start_at_zero(ax) -> None:
    """The y axis from 0 to a little above the data."""
    top = ax.dataLim.ymax
    ax.set_ylim(0, 1.06 * top if 0 < top < np.inf else 1)


def window_of(groups: list[Group]) -> int:
    """Odd smoothing window, about a thirtieth of the longest run."""
    return max(len(run.phase("rl")) for group in groups for run in group.runs) // 30 // 2 * 2 + 1


def spread_text(groups: list[Group], mark: str = "band") -> str:
    low, high = (edge(len(group.runs) for group in groups) for edge in (min, max))
    seeds = f"{low}" if low == high else f"{low} to {high}"
    return f"mean of {seeds} seeds, {mark}: lowest to highest" if high > 1 else "one seed"


def add_title(figure, groups: list[Group], text: str) -> None:
    """The picture's title, and under it the groups' colours."""
    from matplotlib.lines import Line2D

    keys = [Line2D([], [], color=group.color, linewidth=3, label=group.label) for group in groups]
    text = f"{text} ({spread_text(groups)})"
    figure.legend(
        handles=keys,
        loc="outside upper center",
        ncols=min(5, len(keys)),
        title=text,
        title_fontsize=12,
    )


def plot_learning_curves(figure, groups: list[Group]) -> None:
    """Training reward and held-out avg@K on the left; held-out avg@K (enlarged) and pass@K on the right, along RL steps."""
    from matplotlib.lines import Line2D

    runs, window = [run for group in groups for run in group.runs], window_of(groups)
    K, phases = (
        runs[0].config["eval.num_samples"],
        sorted({e["rl_steps"] for run in runs for e in run.evals("rft")}),
    )
    figure.set_size_inches(11, 6.6)
    axes = figure.subplot_mosaic([["reward", "avg"], ["reward", "pass"]])
    for group in groups:
        draw_steps(
            axes["reward"], group, "rl/reward_mean", window, linewidth=1, alpha=0.8, band=False
        )
    for name, ax in axes.items():
        measure = "pass" if name == "pass" else "avg"
        for x in phases:
            ax.axvline(x, color="#BBBBBB", linewidth=0.8, zorder=0)
        base = [score(e, measure) for run in runs for e in run.evals("base")]
        if base:
            ax.axhline(fmean(base), color="#555555", linestyle="--", linewidth=1.2)
        for group in groups:
            draw_evals(ax, group, measure)
        start_at_zero(ax)
        ax.set(
            xlim=(0, None),
            title=f"held-out {measure}@{K}",
            xlabel="" if name == "avg" else "RL steps",
        )
    axes["reward"].set_title(f"training reward (thin) and held-out avg@{K} (thick)")
    add_title(figure, groups, "Training reward and held-out accuracy along RL steps")
    moving = f" (moving mean of {window} steps)" if window > 1 else ""
    keys = [Line2D([], [], color="#333333", linewidth=1, label="training reward" + moving)]
    keys.append(
        Line2D(
            [],
            [],
            color="#333333",
            linewidth=2,
            marker="o",
            markersize=4,
            label="held-out, during RL",
        )
    )
    keys.append(
        Line2D(
            [],
            [],
            color="#333333",
            linewidth=2,
            marker="D",
            markersize=6,
            label="held-out, after RFT",
        )
    )
    keys.append(
        Line2D(
            [], [], color="#555555", linewidth=1.2, linestyle="--", label="held-out, base policy"
        )
    )
    figure.legend(handles=keys, loc="outside lower center", ncols=4)


def plot_pass_at_k(figure, groups: list[Group]) -> None:
    """pass@k over k of the base and of what each group ends with; the curves stand a little apart so that each bar can be read."""
    rows = [row for row in summary_rows(groups) if not row.label.endswith(BEST)]
    figure.set_size_inches(8, 5.4)
    ax = figure.subplots()
    for j, row in enumerate(rows):
        evals = list(row.evals.values())
        ks = np.array(
            sorted(
                int(key.split("@")[1]) for key in evals[0] if re.fullmatch(r"eval/pass@\d+", key)
            )
        )
        values, low, high = (
            np.array([[e.get(f"eval/pass@{k}{end}", np.nan) for k in ks] for e in evals])
            for end in ("", "_low", "_high")
        )
        low, high = (values.min(0), values.max(0)) if len(evals) > 1 else (low[0], high[0])
        x = ks * 2 ** (0.03 * (j - (len(rows) - 1) / 2))
        style = {"linestyle": (0, (4, 2)), "linewidth": 1.4} if row.dashed else {"linewidth": 2}
        ax.plot(
            x, values.mean(0), color=row.color, label=row.label, marker="o", markersize=4, **style
        )
        ax.vlines(x, low, high, color=row.color, linewidth=1)
    ax.set_xscale("log", base=2)
    ax.set_xticks(ks, [str(k) for k in ks])
    ax.minorticks_off()
    several = max(len(row.evals) for row in rows) > 1
    bars = spread_text(groups, "bars") if several else "one seed, bars: 95% interval over problems"
    ax.set(xlabel=f"k ({bars})", ylabel="pass@k")
    start_at_zero(ax)
    title = "Held-out pass@k over the number of samples k"
    figure.legend(
        loc="outside upper center", ncols=min(3, len(rows)), title=title, title_fontsize=12
    )


def plot_stability(figure, groups: list[Group]) -> None:
    """Entropy, gradient norm, flat groups, clip shares and the sampler's distance from the trainer along RL steps."""
    window = window_of(groups)
    figure.set_size_inches(11, 6)
    for ax, (key, title) in zip(figure.subplots(2, 3).flatten(), STABILITY.items(), strict=True):
        for group in groups:
            draw_steps(ax, group, key, window, linewidth=1.6)
        start_at_zero(ax)
        ax.set(title=title, xlim=(0, None))
        if not ax.has_data():
            ax.set(title=f"{title}:\nno data", frame_on=False, xticks=[], yticks=[])
    figure.supxlabel(
        "RL steps" + (f" (curves: moving mean of {window} steps)" if window > 1 else ""),
        fontsize=10,
    )
    add_title(figure, groups, "Stability along RL steps")


def write_plots(runs: list[Run], out: Path) -> list[str]:
    """Write the PNGs for which there is data, each under another name first. Returns their names."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups, written = group_runs(runs), []
    trained = [group for group in groups if any(run.phase("rl") for run in group.runs)]
    plots = (
        ("learning_curves.png", plot_learning_curves, trained),
        ("stability.png", plot_stability, trained),
    )
    evaluated = groups if summary_rows(groups) else []
    for name, plot, drawn in (*plots, ("pass_at_k.png", plot_pass_at_k, evaluated)):
        if not drawn:
            print(f"{name} is left out: the runs have no data for it")
            continue
        with rc_context(STYLE):
            figure = Figure(layout="constrained")
            FigureCanvasAgg(figure)
            plot(figure, drawn)
            figure.savefig(out / f"{name}.tmp", format="png")
        os.replace(out / f"{name}.tmp", out / name)
        written.append(name)
    return written


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Tables and plots of runs: report.md and PNGs.")
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN_DIR",
        help="a run directory with config.json and metrics.jsonl",
    )
    parser.add_argument(
        "--out", type=Path, help="where report.md and the PNGs go (default: the first RUN_DIR)"
    )
    options = parser.parse_args(arguments)
    out = options.out or options.runs[0]
    try:
        runs = load_runs(options.runs)
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    lines = tables(runs)
    print("\n".join(lines))
    written = write_plots(runs, out)
    text = "\n".join(["# Report", "", *lines, *(f"![{name}]({name})" for name in written), ""])
    (out / "report.md.tmp").write_text(text, encoding="utf-8")
    os.replace(out / "report.md.tmp", out / "report.md")
    print(*(out / name for name in ("report.md", *written)), sep="\n")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(
        errors="replace"
    )  # a terminal that does not know the plus-minus sign still gets the table
    sys.exit(main(sys.argv[1:]))
