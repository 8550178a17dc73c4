"""The port in jax: it passes the golden vectors, and trains as the reference does.

20 RL steps of the laptop task beside the reference, some minutes: python tests/test_ports.py
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).parent.parent
FEW = [
    *("--rl.steps", "3", "--rl.problems_per_step", "8", "--rl.max_sampling_rounds", "2"),
    *("--rl.kl_coef", "0.01", "--rl.warmup_steps", "1", "--rft.batch_size", "8"),
]
MANY = ["--rl.steps", "20"]
BOTH = [
    *("--iterations", "1", "--rft.epochs", "2", "--eval.every", "1000"),
    *("--data.eval_size", "1", "--eval.num_samples", "1"),
]


def beside(folder: Path, overrides: list[str]) -> tuple[list[dict], list[dict], dict]:
    """One iteration of the laptop task by the reference and by the port, from the same settings,
    problems and base policy. Returns the port's lines, the reference's in the same form, and the
    policies behind RL and RFT: name to those of the port and of the reference."""
    import rloop
    from config import load_config
    from data import load_data

    options = [*BOTH, *overrides, "--run_dir", str(folder / "run")]
    cfg = load_config(ROOT / "configs" / "countdown.toml", options)
    problems, _ = load_data(cfg)
    sections = ("seed", "sampling", "rl", "select", "rft", "optimizer")
    values = dataclasses.asdict(cfg)
    games = [{"prompt": p.prompt, "numbers": p.numbers, "target": p.target} for p in problems]
    task = {"model": cfg.model.path, "problems": games, "out": str(folder)}
    task["settings"] = {key: values[key] for key in sections}
    (folder / "task.json").write_text(json.dumps(task))
    command = [sys.executable, "ports/jax_train.py", str(folder / "task.json")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert run.returncode == 0, run.stderr
    got = [json.loads(line) for line in run.stdout.splitlines()]
    rloop.run_method(cfg)
    expected = reference_lines(folder / "run", {p.id: n for n, p in enumerate(problems)})
    policies = {
        name: (load_file(folder / f"{name}.safetensors"), load_policy(folder, exported))
        for name, exported in (("phi", "rl_1"), ("theta", "theta_1"))
    }
    return got, expected, policies


def load_policy(folder: Path, name: str) -> dict[str, np.ndarray]:
    return load_file(folder / "run" / "policies" / name / "model.safetensors")


def reference_lines(run: Path, number_of: dict[str, int]) -> list[dict]:
    """What the reference wrote, one line a step, as the port prints it."""

    def lines(name: str) -> list[dict]:
        return [json.loads(line) for line in (run / name).read_text().splitlines()]

    trajectories = lines("trajectories/iteration_1.jsonl")
    result = []
    for record in lines("metrics.jsonl"):
        metrics = {key.partition("/")[2]: value for key, value in record.items()}
        if record["phase"] == "rl":
            rows = [t for t in trajectories if t["step"] == record["step"]]
            rows = [t | {"problem": number_of[t["problem"]]} for t in rows]
            result.append({"name": "steps", "samples": rows, **metrics})
        elif record["phase"] == "filter":
            result.append({"name": "experts", "num_experts": metrics["num_experts"]})
        elif record["phase"] == "rft":
            result.append({"name": "rft", **metrics})
    return result


def distance(a: dict, b: dict) -> float:
    """The largest difference of two policies' weights."""
    assert a.keys() == b.keys()
    return max(float(np.abs(a[key] - b[key]).max()) for key in a)


def report(folder: Path) -> None:
    """Prints both sides of 20 steps, and how far apart they are."""
    got, expected, policies = beside(folder, MANY)
    for line, other in zip(got, expected, strict=True):
        print(line["name"], summary(line), summary(other))
    base = load_file(ROOT / "data" / "countdown_base" / "model.safetensors")
    for name, (mine, theirs) in policies.items():
        print(name, "moved", distance(theirs, base), "apart", distance(mine, theirs))


def summary(line: dict) -> dict:
    line = dict(line)
    return line


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as name:
        report(Path(name))
