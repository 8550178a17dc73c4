"""Experts for verl and prime-rl: their rollout files in, rows for their fine-tuning out.

    python -m ports.verl_prime_rl verl ROLLOUTS/*.jsonl --train train.parquet --model MODEL \\
        --out sft/train.parquet
    python -m ports.verl_prime_rl prime-rl RUN/monitors/file/traces/stream.jsonl \\
        --out sft/train.parquet

Both frameworks fine-tune on the result: parquet with a column messages, whose last message is the
expert's response. docs/adapters.md says which files, which versions and what is lost on the way.
"""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

from config import ArgumentParser, SelectConfig, UserError
from data.files import read_records
from data.tokenizer import Tokenizer
from rloop import Trajectory, select_experts


@dataclass(kw_only=True)
class Rollout(Trajectory):
    messages: list[dict]  # the conversation, the response last


def verl_parser(train: str, model: str) -> Callable[[dict], list[Rollout]]:
    """Parser of a line of trainer.rollout_data_dir.

    The lines hold texts without special tokens: a prompt is found by its text among those of train
    (data.train_files), the ids are encoded again, and every response counts as finished. acc, where
    there is one, comes before the score, which may hold a penalty. Rows whose uid begins with "pad"
    fill up a batch: nobody sampled them.
    """
    tokenizer, prompts = Tokenizer(model, chat=True), {}
    for record, _ in read_records(train):
        ids = tokenizer.encode(tokenizer.render_chat(record["prompt"]))
        prompts[tokenizer.decode(ids)] = record["prompt"], ids

    def parse(record: dict) -> list[Rollout]:
        text, response = record["input"], record["output"]
        if str(record.get("uid")).startswith("pad"):
            return []
        if text not in prompts:
            raise UserError(f"no prompt of {train} reads {text[:200]!r}")
        messages, prompt_ids = prompts[text]
        ids = [*tokenizer.encode(response), tokenizer.eos_id]
        reward = float(record.get("acc", record["score"]))
        place = {"problem": text, "iteration": 0, "step": record["step"]}
        tokens = {"prompt_ids": prompt_ids, "ids": ids, "logps": [], "finished": True}
        outcome = {"response": response, "reason": "", "reward": reward}
        messages = [*messages, {"role": "assistant", "content": response}]
        return [Rollout(**place, **tokens, **outcome, messages=messages)]

    return parse


def parse_prime_rl(episode: dict) -> list[Rollout]:
    """Rollouts of an episode, a line of a run's traces, with ids and log-probs as sampled: of its
    agents that are trained, unless it is an evaluation or failed."""
    work, rollouts = episode["run"]["work"], []
    for trace in episode["traces"] if work["type"] == "train" else []:
        if not (trace["ok"] and trace["agent"]["trainable"]):
            continue
        *context, last = nodes = trace["nodes"]
        if not any(last["mask"]) or any(node["sampled"] for node in context):
            raise UserError("expected rollouts of one turn: the response, with its ids, comes last")
        sampled = [m for node in nodes for m in node["mask"]]
        ids = [i for node in nodes for i in node["token_ids"]]
        start = sampled.index(True)
        rewards = [reward for reward in trace["rewards"].values() if reward is not None]
        reward = sum(reward["score"] * reward["weight"] for reward in rewards)
        finished = trace["calls"][-1].get("finish_reason") == "stop"
        place = {"problem": trace["task"]["key"], "iteration": 0, "step": work["step"]}
        tokens = {"prompt_ids": ids[:start], "ids": ids[start:], "logps": last["logprobs"]}
        outcome = {"response": last["message"].get("content", ""), "reason": "", "reward": reward}
        messages = [node["message"] for node in nodes]
        rollouts.append(Rollout(**place, **tokens, **outcome, finished=finished, messages=messages))
    return rollouts


def read(files: list[str], parse: Callable[[dict], list[Rollout]]) -> Iterator[Rollout]:
    """Rollouts of all files. Raises UserError, with its place, for a line that cannot be read."""
    for file in files:
        for record, where in read_records(file):
            try:
                yield from parse(record)
            except KeyError as error:
                raise UserError(f"{where}: no field {error}") from None
            except UserError as error:
                raise UserError(f"{where}: {error}") from None


def write_messages(experts: list[Rollout], out: Path) -> None:
    """Write the parquet file, a row an expert."""
    out.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist([{"messages": expert.messages} for expert in experts])
    temporary = out.with_name(f"{out.name}.tmp")
    pyarrow.parquet.write_table(table, temporary)
    os.replace(temporary, out)


def main(arguments: list[str]) -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("framework", choices=("verl", "prime-rl"))
    add("files", nargs="+", help="all rollout files of one RL phase")
    add("--train", help="verl: the data.train_files of the run")
    add("--model", help="verl: directory with the policy's tokenizer and chat template")
    add("--out", required=True, type=Path, help="the parquet file to write")
    for key, value in vars(SelectConfig()).items():
        add(f"--select.{key}", dest=key, type=type(value), default=value)
    args = parser.parse_args(arguments)
    if args.framework == "verl" and not (args.train and args.model):
        raise UserError("verl needs --train and --model")
    verl = args.framework == "verl"
    parse = verl_parser(args.train, args.model) if verl else parse_prime_rl
    rollouts = sorted(read(args.files, parse), key=lambda rollout: rollout.step)
    select = {key: getattr(args, key) for key in vars(SelectConfig())}
    experts = select_experts(rollouts, **select)
    correct = sum(rollout.reward >= args.min_reward for rollout in rollouts)
    problems = len({expert.problem for expert in experts})
    print(f"{correct} of {len(rollouts)} correct; {len(experts)} experts on {problems} problems")
    if experts:
        write_messages(experts, args.out)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
