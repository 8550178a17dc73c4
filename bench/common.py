"""What the measurements share: options, two contestants in turn, a table of results."""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from scale import parallel, speed

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def options(description: str) -> argparse.ArgumentParser:
    """The options that every measurement has."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=style)
    add = parser.add_argument
    add("--model", required=True, help="a Hugging Face directory")
    add("--dtype", choices=DTYPES, default="bf16")
    add("--prompt-tokens", type=int, default=50)
    add("--new-tokens", type=int, default=128)
    add("--lengths", choices=("fixed", "spread"), default="fixed", help="spread: some end early")
    add("--threads", type=int, default=2)
    add("--allocator", choices=("kept", "default"), default="kept", help="of both contestants")
    add("--compile", action="store_true", help="compile our blocks (compute.compile)")
    add("--rounds", type=int, default=3)
    return parser


def set_up(args: argparse.Namespace) -> None:
    """Threads, the C library's allocator, and the parts that rloop.py swaps in."""
    torch.set_num_threads(args.threads)
    if args.allocator == "default":
        speed.keep_freed_memory = lambda: None
    speed.swap_in()


def finish_work() -> None:
    """Wait for what a GPU still has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternate(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median of what each returns per second, A B A B ..., after one round that does not count."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            amount = run()
            rates[name].append(amount / (time.perf_counter() - start))
    return {name: statistics.median(values[1:]) for name, values in rates.items()}


def report(args, title: str, rates: dict[str, float], unit: str, **facts) -> None:
    """A table, and one line of JSON. Ours is the first of the rates."""
    title += f", {args.dtype}{', compiled' * args.compile}, "
    if parallel.device().type == "cuda":
        title += torch.cuda.get_device_name()
    else:
        title += f"{args.threads} threads, allocator {args.allocator}"
    ours, *peers = rates
    print(title)
    for name, rate in rates.items():
        ratio = f"   ours is {rates[ours] / rate:.2f} times as fast" if name in peers else ""
        print(f"  {name:<24} {rate:10.1f} {unit}{ratio}")
    for name, value in facts.items():
        print(f"  {name:<24} {value}")
    print(json.dumps({"title": title, "unit": unit, "rates": rates} | facts))
