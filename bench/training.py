"""Forward and backward of an RL update against transformers: float32 weights, products in --dtype.

    python -m bench.training --model models/SmolLM2-135M-Instruct --lengths fixed

One group of 8 responses in a micro-batch. The peer runs padded rows under autocast, with logits of
the response positions only. The unit is prompt and response tokens of all rows a second.
"""

import argparse
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from bench.common import DTYPES, alternate, finish_work, options, report, set_up
from model import Transformer
from packing import Row, pack, token_logprobs
from scale import parallel


def random_groups(args: argparse.Namespace, vocabulary: int) -> list[list[Row]]:
    rng, T = random.Random(0), args.new_tokens
    groups = []
    for _ in range(args.groups):
        prompt = [rng.randrange(3, vocabulary) for _ in range(args.prompt_tokens)]
        lengths = [rng.randint(T // 8, T) if args.lengths == "spread" else T for _ in range(8)]
        responses = [[rng.randrange(3, vocabulary) for _ in range(length)] for length in lengths]
        groups.append([Row(prompt_ids=prompt, ids=ids, weight=1.0) for ids in responses])
    return groups


def contestant(name: str, args: argparse.Namespace) -> Callable[[], float]:
    """A function that trains on all groups once and returns the number of their tokens."""
    device = parallel.device()
    if name == "ours":
        model, train = Transformer.from_pretrained(args.model, device=device), train_ours
        model.compute_dtype = getattr(torch, DTYPES[args.dtype])
        if args.compile:
            model.compile_blocks()
    else:
        from transformers import AutoModelForCausalLM

        load = AutoModelForCausalLM.from_pretrained
        model, train = load(args.model, dtype=torch.float32).to(device), train_theirs
    groups = random_groups(args, model.config.vocab_size)

    def run() -> float:
        for group in groups:
            train(model, group, args.dtype)
        model.zero_grad()
        finish_work()
        return float(sum(len(row.prompt_ids) + len(row.ids) for group in groups for row in group))

    return run


def train_ours(model, group: list[Row], dtype: str) -> None:
    logp, _ = token_logprobs(model, pack([group], model.head_weight.device))
    logp.mean().backward()


def train_theirs(model, group: list[Row], dtype: str) -> None:
    prompt, longest = group[0].prompt_ids, max(len(row.ids) for row in group)
    ids = [prompt + row.ids + [0] * (longest - len(row.ids)) for row in group]
    ids = torch.tensor(ids, device=model.device)
    lengths = torch.tensor([[len(row.ids)] for row in group], device=model.device)
    mask = torch.arange(longest, device=model.device) < lengths
    with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bf16"):
        hidden = model.model(ids).last_hidden_state[:, len(prompt) - 1 : -1][mask]
        logits = model.lm_head(hidden)
    targets = ids[:, len(prompt) :][mask][:, None]
    logits.float().log_softmax(dim=-1).gather(-1, targets).mean().backward()


def peak_memory(name: str, args: argparse.Namespace) -> int:
    """Peak resident bytes of a process of its own that runs once; on a GPU, allocated ones."""
    set_up(args)
    contestant(name, args)()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--groups", type=int, default=8)
    args = parser.parse_args()
    set_up(args)
    names = ("ours", "transformers")
    rates = alternate({name: contestant(name, args) for name in names}, args.rounds)
    memory = {}
    for name in names:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            memory[name] = process.submit(peak_memory, name, args).result()
    facts = {f"{name}_gb": round(size / 1e9, 2) for name, size in memory.items()}
    facts["memory_ratio"] = round(memory["ours"] / memory["transformers"], 3)
    tokens = f"{args.groups} x 8 x ({args.prompt_tokens} + {args.new_tokens}) tokens"
    report(args, f"training {args.model}, {tokens}, {args.lengths}", rates, "tok/s", **facts)


if __name__ == "__main__":
    main()
