"""What the experiments share: runs side by side, their results, and paired intervals."""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import read_json, write_json

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "experiments"
RESULTS = ROOT / "experiments" / "results"
NUM_SAMPLES = 32  # of an evaluation
Result = dict  # {"command": "...", "origin": {...}, "evaluations": [...]}: see evaluations


def jobs_from_command_line(description: str) -> int:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs side by side")
    return parser.parse_args().jobs


def run_all(experiment: str, commands: dict[str, list[str]], jobs: int) -> dict[str, Result]:
    """Name -> result of the runs `python COMMAND --run_dir RUNS/NAME`.

    Results are kept in results/EXPERIMENT.json. A command that one of the experiments has run is
    not run again. Each run has one thread. A run that fails shows its last lines, and ends all.
    """
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{experiment}.json"
    results, known = read_json(file).get("runs", {}), known_results()
    texts = {name: shlex.join(command) for name, command in commands.items()}
    missing = [name for name in texts if texts[name] not in known]
    results |= {name: known[text] for name, text in texts.items() if text in known}
    bar = tqdm(total=len(missing), desc=experiment, unit="run")
    with ThreadPoolExecutor(jobs) as pool:
        done = pool.map(lambda name: (name, run(name, commands[name])), missing)
        for name, result in done:
            results[name] = {"command": texts[name]} | result
            write_json(file, {"runs": results})
            bar.update()
    bar.close()
    write_json(file, {"runs": results})
    return {name: results[name] for name in commands}


def known_results() -> dict[str, Result]:
    """Command -> result of the runs of all experiments."""
    kept = [read_json(file).get("runs", {}) for file in RESULTS.glob("*.json")]
    return {result["command"]: result for runs in kept for result in runs.values()}


def origin() -> dict[str, str]:
    """Where and with what a result was made."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(": ")[2] for line in lines if "model name" in line), "CPU")
    return {"commit": commit, "hardware": cpu, "torch": version("torch")}


def run(name: str, command: list[str]) -> Result:
    """The result of `python COMMAND --run_dir RUNS/NAME`."""
    run_dir = RUNS / name
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    arguments = [sys.executable, *command, "--run_dir", str(run_dir)]
    output = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    if output.returncode:
        last = "\n".join((output.stdout + output.stderr).splitlines()[-20:])
        raise SystemExit(f"{' '.join(arguments)}\n{last}")
    return {"origin": origin(), "evaluations": evaluations(run_dir)}


def read_lines(file: Path) -> Iterable[dict]:
    with file.open(encoding="utf-8") as stream:
        yield from map(json.loads, stream)


def evaluations(run_dir: Path) -> list[dict]:
    """The evaluations of a run: the right answers of 32 to each held-out problem, and the seconds
    (without evaluations) and the tokens trained on up to then."""
    lines = read_lines(run_dir / "evaluations.jsonl")
    counts = [" ".join(map(str, e["num_correct"].values())) for e in lines]
    config = read_json(run_dir / "config.json")
    batch = config["rl"]["problems_per_step"] * config["rl"]["samples_per_problem"]
    found, tokens, rft_tokens, seconds, total_s = [], 0.0, {}, 0.0, 0.0
    for file in (run_dir / "experts").glob("*.jsonl"):
        experts = sum(len(t["ids"]) for t in read_lines(file))
        rft_tokens[int(file.stem.rpartition("_")[2]) - 1] = experts * config["rft"]["epochs"]
    for record in read_lines(run_dir / "metrics.jsonl"):
        if record["phase"] == "rl" and "rl/loss" in record:
            tokens += batch * (1 - record["rl/flat_share"]) * record["rl/len_mean_tok"]
        if record["phase"] != "eval":
            seconds += record["time/total_s"] - total_s
        total_s = record["time/total_s"]
        if record["phase"] == "eval":
            if record["policy"] == "rft":
                tokens += rft_tokens.get(record["iteration"], 0)
            place = {key: record[key] for key in ("policy", "iteration", "rl_steps")}
            cost = {"seconds": round(seconds, 1), "tokens": round(tokens)}
            found.append(place | cost | {"num_correct": counts[len(found)]})
    return found


# ---- statistics


MEASURES = ("avg@32", "pass@32")


def scores_P(evaluation: dict, measure: str) -> np.ndarray:
    """avg@32 or pass@32 of each held-out problem."""
    counts = np.array(evaluation["num_correct"].split(), dtype=int)
    return counts / NUM_SAMPLES if measure == "avg@32" else (counts > 0).astype(float)


def paired_gain(a_SP: np.ndarray, b_SP: np.ndarray) -> tuple[float, float, float, float]:
    """(mean difference, its 95% interval, relative difference of the means) of two arms with the
    same seeds and problems: percentiles of 10,000 bootstrap samples of both seeds and problems."""
    rng = np.random.default_rng(0)
    S, P = a_SP.shape
    weight_RS = rng.multinomial(S, np.full(S, 1 / S), size=10_000) / S
    weight_RP = rng.multinomial(P, np.full(P, 1 / P), size=10_000) / P
    means = np.einsum("rs,sp,rp->r", weight_RS, a_SP - b_SP, weight_RP, optimize=True)
    low, high = np.quantile(means, [0.025, 0.975])
    return float((a_SP - b_SP).mean()), float(low), float(high), a_SP.mean() / b_SP.mean() - 1


def publish(name: str, lines: list[str]) -> None:
    """Print the lines of Markdown, and keep them in results/NAME.md."""
    print("\n" + "\n".join(lines))
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def mean_and_std(values: Iterable[float]) -> str:
    values = list(values)
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"
