"""A real language model: RLoop, plain RL and pure RFT on tasks with short answers.

The models are models/Qwen2.5-Coder-0.5B-Instruct and models/SmolLM2-135M-Instruct, the tasks
reasoning-gym's and GSM8K (datasets/gsm8k_train.jsonl and gsm8k_test.jsonl). It needs a GPU: a step
of the first takes about a second there. Rates and epochs are one guess for all, not searched.
"""

import numpy as np

from experiments import common
from experiments.common import publish, run_all

QWEN, SMOLLM2 = "models/Qwen2.5-Coder-0.5B-Instruct", "models/SmolLM2-135M-Instruct"
SEEDS = range(3)
ARMS = ("rloop", "rl", "rft")
BIG = "--compute.dtype bfloat16 --compute.threads 1 --compute.micro_batch_tokens 16384"
GYM = "--data.train_size 400 --data.eval_size 100 --eval.num_samples 16 --save_every 1000"
GYM += " --rl.problems_per_step 16 --rft.epochs 4 --select.max_per_problem 8"
# task -> model, reasoning-gym task and its options, RL and RFT rate, tokens of a response
TASKS = {
    "letter counting": (QWEN, "letter_counting", "min_words=5&max_words=8", "3e-6", "1e-5", "64"),
    "gcd": (QWEN, "gcd", "max_value=100", "3e-6", "1e-5", "64"),
    "sums": (
        SMOLLM2,
        "chain_sum",
        "min_terms=2&max_terms=3&min_digits=1&max_digits=2",
        "1e-5",
        "5e-5",
        "40",
    ),
}
GSM8K = "--data.eval_size 200 --eval.num_samples 8 --eval.every 20 --sampling.max_new_tokens 300"
GSM8K += " --rl.max_sampling_rounds 1 --rl.problems_per_step 20 --save_every 1000"
GSM8K += " --rft.lr 1e-5 --rft.epochs 2 --compute.max_rows 800"


def loop(arm: str, iterations: int, steps: int, lr: str) -> list[str]:
    """Overrides for so many RL steps an iteration; plain RL makes them all in one phase."""
    if arm == "rl":
        steps, iterations = steps * iterations, 1
    shape = ["--iterations", str(iterations), "--rl.steps", str(steps)]
    method = "rl" if arm == "rl" else "rloop"
    return [*shape, "--method", method, "--rl.lr", "0" if arm == "rft" else lr]


def gym_command(task: str, arm: str, seed: int) -> list[str]:
    model, name, options, lr, rft_lr, tokens = TASKS[task]
    sources = ["--data.train", f"reasoning_gym:{name}?{options}"]
    sources += ["--data.eval", f"reasoning_gym:{name}:heldout?{options}"]
    command = ["rloop.py", "--config", "configs/smollm2-chain-sum.toml", "--model.path", model]
    command += [*sources, *GYM.split(), *BIG.split(), "--compute.max_rows", "1024"]
    command += ["--sampling.max_new_tokens", tokens, "--rft.lr", rft_lr, "--eval.every", "20"]
    return [*command, *loop(arm, 3, 20, lr), "--seed", str(seed)]


def gsm8k_command(arm: str, seed: int) -> list[str]:
    command = ["rloop.py", "--config", "configs/smollm2-gsm8k.toml", "--model.path", QWEN]
    return [*command, *GSM8K.split(), *BIG.split(), *loop(arm, 4, 20, "2e-6"), "--seed", str(seed)]


def table(results: dict[str, dict]) -> list[str]:
    """Base and end of every arm, means of the seeds that there are."""
    lines = ["| task | policy | seeds | avg@k | pass@k |", "|---|---|---:|---:|---:|"]
    for task in (*TASKS, "gsm8k"):
        k = 8 if task == "gsm8k" else 16
        names = {arm: [f"language/{task}/{arm}/{seed}" for seed in SEEDS] for arm in ARMS}
        ends = {a: [results[n]["evaluations"] for n in names[a] if n in results] for a in ARMS}
        rows = {
            "base": [e[0] for e in ends["rl"]],
            "plain RL": [e[-1] for e in ends["rl"]],
            "RLoop, after its last RL phase": [e[-2] for e in ends["rloop"]],
            "RLoop": [e[-1] for e in ends["rloop"]],
            "pure RFT": [e[-1] for e in ends["rft"]],
        }
        for name, found in rows.items():
            if found:
                counts = np.array([e["num_correct"].split() for e in found], dtype=int)
                scores = f"{counts.mean() / k:.3f} | {(counts > 0).mean():.3f}"
                lines.append(f"| {task}, k = {k} | {name} | {len(found)} | {scores} |")
    return lines


def main(jobs: int) -> None:
    commands = {
        f"language/{task}/{arm}/{seed}": gym_command(task, arm, seed)
        for seed in SEEDS
        for task in TASKS
        for arm in ARMS
    }
    commands |= {f"language/gsm8k/{arm}/0": gsm8k_command(arm, 0) for arm in ARMS}
    publish("language", table(run_all("language", commands, jobs)))


if __name__ == "__main__":
    main(common.jobs_from_command_line(__doc__))
