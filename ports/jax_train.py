"""One RLoop iteration in jax: explore with samples of its own, filter, exploit.

    python ports/jax_train.py TASK.json

TASK.json holds an object with the keys
    model       a Hugging Face directory
    problems    of Countdown: objects with prompt, numbers and target
    settings    seed, sampling, rl, select, rft and optimizer, as `iteration` of golden/README.md
                has them, and rl.samples_per_problem
    out         a directory for phi.safetensors and theta.safetensors, behind RL and behind RFT
Prints one line of JSON for each step of RL, for the experts, and for each step of RFT.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy_port as shared
from jax_model import fixed_of, sample_responses
from jax_port import run_iteration
from safetensors.numpy import load_file, save_file


class Sampler:
    """Draws the groups of RL steps, with the random streams of golden/README.md."""

    def __init__(self, files, fixed, stop_ids, problems, settings):
        self.files, self.fixed, self.stop_ids = files, fixed, stop_ids
        self.problems, self.seed = problems, settings["seed"]
        self.sampling = settings["sampling"]
        self.num_samples = settings["rl"]["samples_per_problem"]
        self.drawn = 0  # position in the stream of problems

    def __call__(self, policy, step, number, count):
        """count groups of a round; steps are counted from 0 here, and from 1 in the seed."""
        places = shared.next_problems(len(self.problems), self.drawn, count, self.seed)
        self.drawn += count
        seed = shared.seed_of([self.seed, 0, step + 1, number])
        groups = [
            {"problem": place, "prompt_ids": self.encode(self.problems[place])} for place in places
        ]
        rows = [(n, g) for n in range(count) for g in range(self.num_samples)]
        streams = [shared.uniforms(seed, *row, self.sampling["max_new_tokens"]) for row in rows]
        prompts = [groups[n]["prompt_ids"] for n, _ in rows]
        temperature = self.sampling["temperature"]
        responses = sample_responses(
            policy, self.fixed, prompts, streams, self.stop_ids, temperature
        )
        for group in groups:
            group["samples"] = [responses.pop(0) for _ in range(self.num_samples)]
            for sample in group["samples"]:
                sample["reward"] = self.reward(self.problems[group["problem"]], sample["ids"])
        return groups

    def encode(self, problem):
        """Ids of a problem's prompt."""
        return shared.encode_prompt(self.files, problem["prompt"], "{problem}", False, [])

    def reward(self, problem, ids):
        """1 for a right response, else 0."""
        text = shared.decode(self.files, ids)
        verdict = shared.verify_countdown(text, problem["numbers"], problem["target"])
        return float(verdict["correct"])


def train(task):
    """One RLoop iteration on a task."""
    folder, settings = Path(task["model"]), task["settings"]
    files = {file.name: json.loads(file.read_text("utf-8")) for file in folder.glob("*.json")}
    config = {"rope_scaling": None} | files["config.json"]
    ids = shared.special_ids(files, False, config["vocab_size"])
    fixed = fixed_of(config, ids["unknown_ids"])
    sampler = Sampler(files, fixed, ids["stop_ids"], task["problems"], settings)
    theta = phi = jax.tree.map(jnp.asarray, load_file(folder / "model.safetensors"))
    for name, value in run_iteration(theta, fixed, sampler, **settings):
        if name == "experts":
            report(name, experts=value)
        elif name == "rft":
            theta = value["weights"]
            report(name, loss=value["loss"], grad_norm=value["grad_norm"])
        else:
            phi = value["updates"][-1]["weights"] if value["updates"] else phi
            updates = [{key: u[key] for key in ("loss", "grad_norm")} for u in value["updates"]]
            samples = [sample for group in value["groups"] for sample in group["samples"]]
            keys = ("problem", "ids", "logps", "reward")
            samples = [{key: sample[key] for key in keys} for sample in samples]
            report(name, updates=updates, samples=samples)
    for name, weights in (("phi", phi), ("theta", theta)):
        save_file(jax.device_get(weights), Path(task["out"]) / f"{name}.safetensors")


def report(name, **values):
    """Prints a line of JSON."""
    print(json.dumps(shared.plain({"name": name} | values)), flush=True)


if __name__ == "__main__":
    train(json.loads(Path(sys.argv[1]).read_text("utf-8")))
