"""A real language model: RLoop, plain RL and pure RFT on tasks with short answers.

The models are models/Qwen2.5-Coder-0.5B-Instruct and models/SmolLM2-135M-Instruct, the tasks
reasoning-gym's and GSM8K (datasets/gsm8k_train.jsonl and gsm8k_test.jsonl). It needs a GPU: a step
of the first takes about a second there. Rates and epochs are one guess for all, not searched.
Where a run's policies are at hand they are judged once more, by their last number, so that what
they learned of the form of an answer can be told from what they learned of arithmetic.
"""

import re
from fractions import Fraction

import numpy as np

from config import read_json
from experiments import common
from experiments.common import RESULTS, ROOT, RUNS, publish, run_all

QWEN, SMOLLM2 = "models/Qwen2.5-Coder-0.5B-Instruct", "models/SmolLM2-135M-Instruct"
SEEDS = range(3)
ARMS = ("rloop", "rl", "rft")
# row of the table -> arm, the place of the evaluation in its run, the name of the policy
ROWS = {
    "base": ("rl", 0, ""),
    "plain RL": ("rl", -1, "rl_1"),
    "RLoop, after its last RL phase": ("rloop", -2, "rl_{iterations}"),
    "RLoop": ("rloop", -1, "theta_{iterations}"),
    "pure RFT": ("rft", -1, "theta_{iterations}"),
}
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
GSM8K = "--data.eval_size 200 --eval.num_samples 8 --eval.every 25 --sampling.max_new_tokens 300"
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
    return [*command, *GSM8K.split(), *BIG.split(), *loop(arm, 4, 25, "2e-6"), "--seed", str(seed)]


def last_number(problem, response: str) -> bool:
    """A reward that asks for no form: is the last number of the response the answer?"""
    found = re.findall(r"(?<!\d)-?\d+(?:\.\d+)?", response.replace(",", ""))
    return bool(found) and Fraction(found[-1]) == Fraction(problem.answer.replace(",", ""))


def fair_commands(commands: dict[str, list[str]]) -> dict[str, list[str]]:
    """NAME OF A RUN, ROW -> the evaluation of that policy by last_number, on the same samples:
    where it has been run, and where the policy is at hand."""
    known, found = read_json(RESULTS / "language.json").get("runs", {}), {}
    reward = ["--method", "eval", "--data.reward", "experiments.language:last_number"]
    for name, command in commands.items():
        iterations = command[command.index("--iterations") + 1]
        for row, (arm, _, policy) in ROWS.items():
            path = RUNS / name / "policies" / policy.format(iterations=iterations)
            fair = f"{name}, {row}"
            if name.split("/")[-2] == arm and (fair in known or path.exists()):
                model = ["--model.path", str(path.relative_to(ROOT))] if policy else []
                found[fair] = [*command, *reward, *model]
    return found


def table(results: dict[str, dict]) -> list[str]:
    """Base and end of every arm, means of the seeds that there are."""
    lines = [
        "| task | policy | seeds | avg@k | pass@k | seeds | avg@k by the last number | pass@k |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for task in (*TASKS, "gsm8k"):
        k = 8 if task == "gsm8k" else 16
        for row, (arm, place, _) in ROWS.items():
            names = [f"language/{task}/{arm}/{seed}" for seed in SEEDS]
            ends = [results[name]["evaluations"][place] for name in names if name in results]
            names = [f"{name}, {row}" for name in names]
            fair = [results[name]["evaluations"][-1] for name in names if name in results]
            if ends:
                cells = [f"{task}, k = {k}", row, *scores(ends, k), *scores(fair, k)]
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def scores(evaluations: list[dict], k: int) -> list[str]:
    """Number of evaluations, avg@k, pass@k."""
    if not evaluations:
        return ["", "", ""]
    counts = np.array([e["num_correct"].split() for e in evaluations], dtype=int)
    return [f"{len(counts)}", f"{counts.mean() / k:.3f}", f"{(counts > 0).mean():.3f}"]


def main(jobs: int) -> None:
    commands = {
        f"language/{task}/{arm}/{seed}": gym_command(task, arm, seed)
        for seed in SEEDS
        for task in TASKS
        for arm in ARMS
    }
    commands |= {f"language/gsm8k/{arm}/0": gsm8k_command(arm, 0) for arm in ARMS}
    results = run_all("language", commands, jobs)
    publish("language", table(results | run_all("language", fair_commands(commands), jobs)))


if __name__ == "__main__":
    main(common.jobs_from_command_line(__doc__))
