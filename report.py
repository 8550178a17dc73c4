"""Tables and plots of one run or several, from the files of their run directories.

    python report.py RUN_DIR [RUN_DIR ...] [--out DIR]

Reads config.json and metrics.jsonl of every run, prints the tables, and writes into DIR (default:
the first RUN_DIR) report.md, learning_curves.png and, of the first run, trajectories.html.

Runs that differ only in their seed form a group. A group's numbers are the mean and the sample
standard deviation over seeds; a band in a plot spans the lowest to the highest seed. The interval
of a single evaluation is the run's own: 95% bootstrap over problems.
"""

import argparse
import functools
import itertools
import json
import math
import operator
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import jinja2
import numpy as np
from tokenizers import Tokenizer

from config import UserError, differing_keys, flat, read_json

METHODS = {"rloop": "RLoop", "rl": "plain RL", "sft": "SFT", "eval": "evaluation"}
FINAL_POLICY = {"rloop": "rft", "rl": "rl", "sft": "rft", "eval": "base"}
# keys that do not make two runs different settings; keys in which compared runs must agree
NEUTRAL_KEY = re.compile(r"seed|run_dir|logging|save_every|eval\.every|compute\.(?!dtype).*")
SHARED_KEY = re.compile(r"data\.(eval.*|reward)|select\.min_reward|eval\.(?!every).*")
PLOT, PAGE = "learning_curves.png", "trajectories.html"
PAGE_STEPS, PAGE_TOKENS = 10, 200_000  # shown in the page, at most
PLACE = re.compile(rb'"iteration": \d+, "step": \d+')  # of a trajectory, in its line
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

    def policies(self) -> Iterator[tuple[str, list[float], dict, int | str]]:
        """Name, training rewards (the last 10 before its evaluation), last evaluation and number of
        experts of the base, every RL phase and every RFT."""
        is_loop = self.config["method"] == "rloop"
        experts = {("rft", r["iteration"]): r["filter/num_experts"] for r in self.records["filter"]}
        last = {(e["policy"], e["iteration"]): e for e in self.records["eval"]}
        for (policy, i), e in last.items():
            name = f"{'RFT' if policy == 'rft' else 'RL phase'} {i + 1}" if is_loop else self.method
            steps = [r for r in self.records["rl"] if r["iteration"] == i]
            rewards = [r["rl/reward_mean"] for r in steps if r["rl_steps"] <= e["rl_steps"]][-10:]
            yield "base" if policy == "base" else name, rewards, e, experts.get((policy, i), "")

    def finished(self) -> bool:
        num_steps = self.config["iterations"] * self.config["rl.steps"]
        has_rl = self.config["method"] in ("rloop", "rl")
        return any(not has_rl or e["rl_steps"] >= num_steps for e in self.final())


def score(evaluation: dict, measure: str) -> float:
    """avg@K or pass@K of an evaluation."""
    return evaluation[f"eval/{measure}@{evaluation['eval/num_samples']}"]


def load_groups(paths: list[Path]) -> dict[str, list[Run]]:
    """Label -> runs by seed. Raises UserError for what is no run and runs that do not compare."""
    runs = [load_run(path) for path in paths]
    # label = the method, the settings in which its runs differ, and whether it is unfinished
    for method in {run.method for run in runs}:
        same = [run for run in runs if run.method == method]
        keys = sorted({key for run in same for key in run.config if not NEUTRAL_KEY.fullmatch(key)})
        keys = [key for key in keys if len({repr(run.config.get(key)) for run in same}) > 1]
        for run in same:
            settings = ", ".join(f"{key} {run.config.get(key)}" for key in keys)
            run.label = f"{method} ({settings})" if keys else method
            run.label += "" if run.finished() else ", unfinished"
    runs.sort(key=lambda run: (run.label, run.config["seed"]))
    for a, b in itertools.pairwise(runs):
        for key in filter(SHARED_KEY.fullmatch, differing_keys(a.config, b.config)):
            x, y = a.config.get(key), b.config.get(key)
            raise UserError(f"{key}: {x!r} in {a.path}, {y!r} in {b.path}; expected the same")
        if (a.label, a.config["seed"]) == (b.label, b.config["seed"]):
            raise UserError(f"{a.path}, {b.path}: same settings and seed; expected each seed once")
    return {label: [*same] for label, same in itertools.groupby(runs, lambda run: run.label)}


def load_run(path: Path) -> Run:
    """Read a run directory. Raises UserError that names the file, and the line."""
    config = flat(read_json(path / "config.json"))
    if not {"method", "eval.num_samples"} <= config.keys():
        raise UserError(f"{path / 'config.json'}: not the config of a run")
    pure_rft = config["method"] == "rloop" and config["rl.lr"] == 0
    method = "pure RFT" if pure_rft else METHODS[config["method"]]
    records = read_records(path / "metrics.jsonl")
    return Run(path=path, config=config, method=method, records=records)


def read_records(file: Path) -> dict[str, list[dict]]:
    """Phase -> records."""
    records = {phase: [] for phase in ("rl", "filter", "rft", "eval")}
    for number, line in whole_lines(file):
        try:
            record = json.loads(line)
            records.setdefault(record["phase"], []).append(record)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{file}:{number}: not a record: {error!r}") from None
    return records


def whole_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines by number. Half a last one, written by a killed run, is reported and left out."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.endswith(b"\n"):
                print(f"{file}:{number}: the last line is half written and left out")
                return
            yield number, line


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


def summary(groups: dict[str, list[Run]]) -> dict:
    """Lines of the summary, and the plain RL that they are compared with, the best."""
    rows, measures = final_evals(groups), ("avg", "pass")
    means = {(name, m): fmean(score(e, m) for e in rows[name]) for name in rows for m in measures}
    plain = [n for n, same in groups.items() if same[0].method == "plain RL" and same[0].finished()]
    reference = max(plain, key=lambda name: means[name, "avg"], default=None)
    lines = []
    for name, evals in rows.items():
        cells = []
        for m in measures:
            spread = f" ± {stdev(score(e, m) for e in evals):.3f}" if len(evals) > 1 else ""
            base = means[reference, m] if reference not in (None, name) else 0
            change = f"{means[name, m] / base - 1:+.1%}" if base > 0 else ""
            cells += [f"{means[name, m]:.3f}{spread}", change]
        lines.append((name, evals, cells))
    return {"lines": lines, "reference": reference, "num_settings": len(plain)}


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
    for (key, title), ax in zip(PANELS.items(), figure.subplots(2, 3).flat, strict=True):
        ax.set_title(title.format(K=runs[0].config["eval.num_samples"]))
        ax.set_xlabel(f"RL steps (moving mean of {window})" if "rl/" in key else "RL steps")
        ax.xaxis.get_major_locator().set_params(integer=True)
        for label, same in groups.items():
            if "rl/" in key:
                draw_steps(ax, same, key, colors[label], window)
            elif key != "pass@k":
                draw_evals(ax, same, key, colors[label])
        for name, evals in final_evals(groups).items():
            if key == "pass@k" and name in colors:
                draw_pass_at_k(ax, evals, colors[name])
        ax.axhline(0, alpha=0)  # the margin above the data is one of the whole range
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.4)
    handles = figure.axes[1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(file, dpi=120)


def shown_answer(t: dict, tokenizer: Tokenizer | None, limit: int) -> dict:
    """A trajectory with the pieces, (probability in percent, text), of its first limit tokens."""
    prompt_ids, ids, logps = (t.pop(key) for key in ("prompt_ids", "ids", "logps"))
    t |= {"num_tokens": len(ids), "pieces": []}
    if tokenizer is not None:
        decode, start = functools.partial(tokenizer.decode, skip_special_tokens=False), 0
        t["prompt"] = decode(prompt_ids)
        for end in range(1, min(len(ids), limit) + 1):
            text = decode(ids[max(start - 1, 0) : end])
            if not text.endswith("\ufffd") or end - start == 4 or end == len(ids):  # whole letters
                before = decode(ids[max(start - 1, 0) : start])
                percent = min(round(100 * math.exp(sum(logps[start:end]))), 99)
                t["pieces"].append((percent, text[len(before) :]))
                start = end
    return t


def write_page(run: Run, rl_steps: list[int], file: Path) -> None:
    """trajectories.html: the first groups of the RL steps given, or of steps spread over the run,
    read in one pass. Raises UserError for a broken line."""
    base = Path(run.config["model.path"]) / "tokenizer.json"
    files = [f for f in (*run.path.glob("policies/*/tokenizer.json"), base) if f.exists()]
    tokenizer = Tokenizer.from_file(str(files[0])) if files else None
    G, steps = run.config["rl.samples_per_problem"], {}
    records = [r for r in run.records["rl"] if r["rl_steps"] in rl_steps] or run.records["rl"]
    for i in np.linspace(0, len(records) - 1, PAGE_STEPS).astype(int):
        place = f'"iteration": {records[i]["iteration"]}, "step": {records[i]["step"]}'
        steps[place.encode()] = {"record": records[i], "answers": []}
    space = PAGE_TOKENS // len(steps)  # the frame of an answer counts as 20 tokens
    num_answers = max(space // (run.config["sampling.max_new_tokens"] + 20) // G, 1) * G
    limit = max(space // num_answers, 1)
    for source in run.path.glob("trajectories/*.jsonl"):
        for number, line in whole_lines(source):
            try:
                step = steps.get(PLACE.search(line)[0])
                if step is not None and len(step["answers"]) < num_answers:
                    step["answers"].append(shown_answer(json.loads(line), tokenizer, limit))
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{source}:{number}: not a trajectory: {error!r}") from None
    text = render(PAGE, run=run, steps=steps.values(), G=G, limit=limit, tokenizer=tokenizer)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text, "utf-8", "replace")
    temporary.replace(file)


def render(name: str, **values) -> str:
    """A file of templates/, filled in; in a page every value is escaped."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    is_page = name.endswith(".html")
    environment = jinja2.Environment(autoescape=is_page, loader=loader, trim_blocks=True)
    return environment.get_template(f"{name}.jinja").render(values)


def main(arguments: list[str]) -> int:
    """Print the tables, write report.md and the picture; returns the exit code."""
    parser = argparse.ArgumentParser(description="Tables and plots of runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--steps", nargs="+", type=int, default=[], help="for the page: up to 10")
    parser.add_argument("--out", type=Path, help="where the files go (default: the first RUN_DIR)")
    options = parser.parse_args(arguments)
    out = options.out or options.runs[0]
    try:
        groups = load_groups(options.runs)
        runs = [run for same in groups.values() for run in same]
        text = render("report.md", runs=runs, **summary(groups))
        print(text)
        out.mkdir(parents=True, exist_ok=True)
        if any(run.records["rl"] for run in runs):
            write_plot(groups, out / PLOT)
            text += f"\n![learning curves]({PLOT})\n"
        (out / "report.md").write_text(text, encoding="utf-8")
        run = next(run for run in runs if run.path == options.runs[0])
        if run.records["rl"] and (run.path / "trajectories").exists():
            write_page(run, options.steps, out / PAGE)
            print(out / PAGE)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(out / "report.md")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may not know the plus-minus sign
    sys.exit(main(sys.argv[1:]))
