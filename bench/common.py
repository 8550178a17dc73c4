"""What the measurements share: two contestants in turn, the machine's limits, and memory in a process of its own."""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from model import Transformer
from rloop import keep_freed_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def options(description: str) -> argparse.ArgumentParser:
    """The options that every measurement has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--prompt-tokens", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument(
        "--lengths",
        choices=("fixed", "spread"),
        default="fixed",
        help="spread: responses end early, at all lengths",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--allocator",
        choices=("kept", "default"),
        default="kept",
        help="kept: as rloop.py sets it, for the peer too",
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile our blocks (compute.compile)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    return parser


def set_up(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    if args.allocator == "kept":
        keep_freed_memory()


def sampler_of(args: argparse.Namespace) -> Transformer:
    """The weights that rloop.py would sample from."""
    policy = Transformer.from_pretrained(args.model).requires_grad_(False)
    return (policy.compile_blocks() if args.compile else policy).copy_as(DTYPES[args.dtype])


def flags(args: argparse.Namespace) -> list[str]:
    """The shared options as a command line again, for a process of its own."""
    names = ("model", "dtype", "prompt_tokens", "new_tokens", "lengths", "threads", "allocator")
    return [
        part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(args, name)))
    ] + ["--compile"] * args.compile


def setting(args: argparse.Namespace) -> str:
    return f"{args.dtype}, {args.threads} threads{', compiled' * args.compile}, allocator {args.allocator}"


def alternate(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median of what each contestant returns per second, A B A B ..., after one round that does not count."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            amount = run()
            rates[name].append(amount / (time.perf_counter() - start))
    return {name: statistics.median(values[1:]) for name, values in rates.items()}


def matmul_peak(dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of a large matrix product."""
    a, b = torch.randn(2, size, size).to(dtype)
    return alternate({"peak": lambda: (a @ b, 2.0 * size**3)[1]}, rounds=9)["peak"]


def bandwidth(num_bytes: int = 2**29) -> float:
    """Bytes a second of reading a large tensor."""
    x = torch.ones(num_bytes // 4)
    return alternate({"read": lambda: (x.sum(), float(num_bytes))[1]}, rounds=9)["read"]


def peak_memory(module: str, arguments: list[str]) -> int:
    """Peak resident bytes of `python -m module arguments`, which prints them last."""
    output = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=True
    ).stdout
    return int(output.split()[-1])


def own_peak() -> int:
    """Peak resident bytes of this process."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def report(title: str, rates: dict[str, float], unit: str, **facts) -> None:
    """A table, and one line of JSON."""
    ours, *peers = rates
    print(title)
    for name, rate in rates.items():
        print(
            f"  {name:<24} {rate:10.1f} {unit}"
            + (f"   ours is {rates[ours] / rate:.2f} times as fast" if name in peers else "")
        )
    for name, value in facts.items():
        print(f"  {name:<24} {value}")
    print(json.dumps({"title": title, "unit": unit, "rates": rates} | facts))
