"""Forward and backward of an RL update against transformers: float32 master weights, products in --dtype, one group a micro-batch.

    python -m bench.training --model models/SmolLM2-135M-Instruct --dtype bf16 --lengths fixed

The peer runs padded rows under autocast, with logits of the response positions only. Counted are prompt and response tokens of all rows.
"""

import argparse
import random

import torch

from bench.common import alternate, flags, options, own_peak, peak_memory, report, set_up, setting
from model import Transformer
from packing import Group, micro_batches, token_logprobs


def random_groups(args: argparse.Namespace, vocabulary: int) -> list[Group]:
    rng = random.Random(0)
    length = (
        (lambda: rng.randint(args.new_tokens // 8, args.new_tokens))
        if args.lengths == "spread"
        else (lambda: args.new_tokens)
    )
    ids = lambda count: [rng.randrange(3, vocabulary) for _ in range(count)]  # noqa: E731
    return [
        (ids(args.prompt_tokens), [ids(length()) for _ in range(8)]) for _ in range(args.groups)
    ]


def ours(args: argparse.Namespace):
    model = Transformer.from_pretrained(args.model)
    if args.compile:
        model.compile_blocks()
    groups = random_groups(args, model.config.vocab_size)

    def run() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bf16"):
            for batch, _ in micro_batches(
                groups, max_tokens=args.prompt_tokens + 8 * args.new_tokens
            ):
                token_logprobs(model, batch)[0].mean().backward()
        model.zero_grad()
        return num_tokens(groups)

    return run


def theirs(args: argparse.Namespace):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="sdpa"
    )
    groups = random_groups(args, model.config.vocab_size)

    def run() -> float:
        for prompt, responses in groups:
            longest = max(map(len, responses))
            ids = torch.tensor(
                [prompt + response + [0] * (longest - len(response)) for response in responses]
            )
            mask = torch.tensor(
                [
                    [True] * len(response) + [False] * (longest - len(response))
                    for response in responses
                ]
            )
            with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bf16"):
                hidden = model.model(ids).last_hidden_state[:, len(prompt) - 1 : -1][mask]
                logits = model.lm_head(hidden)
            logp = (
                logits.float().log_softmax(dim=-1).gather(-1, ids[:, len(prompt) :][mask][:, None])
            )
            logp.mean().backward()
        model.zero_grad()
        return num_tokens(groups)

    return run


def num_tokens(groups: list[Group]) -> float:
    return float(
        sum(len(prompt) + len(response) for prompt, responses in groups for response in responses)
    )


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument(
        "--memory-of",
        choices=("ours", "transformers"),
        help="run once and print the peak resident bytes",
    )
    args = parser.parse_args()
    set_up(args)
    contestants = {"ours": ours, "transformers": theirs}
    if args.memory_of:
        contestants[args.memory_of](args)()
        print(own_peak())
        return
    rates = alternate({name: build(args) for name, build in contestants.items()}, args.rounds)
    shared = [*flags(args), "--groups", str(args.groups)]
    memory = {
        name: peak_memory("bench.training", [*shared, "--memory-of", name]) for name in contestants
    }
    work = f"{args.groups} x 8 x ({args.prompt_tokens} + {args.new_tokens}) tokens, {args.lengths}, {setting(args)}"
    gigabytes = {f"{name}_gb": round(size / 1e9, 2) for name, size in memory.items()}
    ratio = round(memory["ours"] / memory["transformers"], 3)
    report(f"training {args.model}, {work}", rates, "tok/s", **gigabytes, memory_ratio=ratio)


if __name__ == "__main__":
    main()
