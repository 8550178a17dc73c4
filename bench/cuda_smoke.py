"""Five minutes on a machine with one GPU: does what is tested on a CPU hold there too?

    python -m bench.cuda_smoke [--model data/countdown_base]

A line PASS or FAIL for each check, with the figure and its bound; ends with 1 if any failed, and with 2 where there is no CUDA.
`--device cpu` checks this script itself. Nobody has run it on a GPU yet.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import rloop
from model import Transformer
from packing import Group, micro_batches, token_logprobs
from sampler import sample

NUM_PROMPTS, NUM_SAMPLES, NEW_TOKENS = 4, 16, 24
CLOSE = 1e-3  # relative, of float32 sums in another order; TF32 would be seen
SAME = 0.99  # share of equal responses: rounding may move a draw over a token's border
BF16_MEAN, BF16_MAX = 0.03, 0.5  # nat; 0.015 and 0.2 on a CPU


def draw(model: Transformer) -> list[Group]:
    """The same prompts and random numbers on every device."""
    rng = np.random.default_rng(0)
    prompts = [
        rng.integers(3, model.config.vocab_size, size=6 + 3 * n).tolist()
        for n in range(NUM_PROMPTS)
    ]
    options = {
        "num_samples": NUM_SAMPLES,
        "max_new_tokens": NEW_TOKENS,
        "stop_ids": {0},
        "seed": 0,
        "max_rows": 24,
    }
    groups = sample(model, prompts, **options)
    return [(prompt, [c.ids for c in group]) for prompt, group in zip(prompts, groups, strict=True)]


def logprobs(
    model: Transformer,
    groups: list[Group],
    dtype: torch.dtype = torch.float32,
    gradient: bool = False,
) -> Tensor:
    """Of all response tokens, on the CPU; with the gradient of their mean left in the weights."""
    device, parts = model.head_weight.device, {}
    with (
        torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16),
        torch.set_grad_enabled(gradient),
    ):
        for batch, members in micro_batches(groups, 512, device=device):
            logp, _ = token_logprobs(model, batch)
            if gradient:
                logp.sum().backward()
            parts |= zip(members, logp.detach().cpu().split(batch.response_lengths), strict=True)
    return torch.cat([parts[b] for b in range(len(parts))])


def difference(a: Tensor, b: Tensor) -> float:
    """Largest, relative to the largest number."""
    return float((a.detach().cpu() - b.detach().cpu()).abs().max() / b.detach().abs().max().cpu())


def equal_responses(a: list[Group], b: list[Group]) -> float:
    pairs = [
        x == y for (_, xs), (_, ys) in zip(a, b, strict=True) for x, y in zip(xs, ys, strict=True)
    ]
    return sum(pairs) / len(pairs)


def gradient_difference(a: Transformer, b: Transformer) -> float:
    pairs = [
        (x.grad.cpu(), y.grad.cpu()) for x, y in zip(a.parameters(), b.parameters(), strict=True)
    ]
    return math.sqrt(
        sum(float((x - y).square().sum()) for x, y in pairs)
        / sum(float(y.square().sum()) for _, y in pairs)
    )


def rl_step(device: torch.device) -> float:
    """rloop.main for one RL step of the Countdown config; the gradient's norm."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        arguments = [
            "--config",
            "configs/countdown.toml",
            "--method",
            "rl",
            "--iterations",
            "1",
            "--rl.steps",
            "1",
            "--run_dir",
            str(run),
        ]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if rloop.main([*arguments, "--data.eval_size", "8"]) != 0:
            raise RuntimeError("rloop.main failed")
        if device.type == "cuda" and torch.cuda.max_memory_allocated() < 2**20:
            raise RuntimeError("rloop.main did not run on the GPU")
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(record["rl/grad_norm"] for record in records if record["phase"] == "rl")


def check(name: str, function: Callable[[], dict[str, tuple[float, bool]]]) -> bool:
    """Print the check's line. function returns figure -> (value, good)."""
    try:
        figures = function()
    except Exception as error:  # the other checks are worth running
        print(f"FAIL  {name}: {type(error).__name__}: {error}", flush=True)
        return False
    good = all(ok for _, ok in figures.values())
    print(
        f"{'PASS' if good else 'FAIL'}  {name}: "
        + ", ".join(f"{key} {value:.3g}" for key, (value, _) in figures.items()),
        flush=True,
    )
    return good


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="data/countdown_base")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: nothing was checked")
        return 2
    device = torch.device(args.device)
    there, here = (
        Transformer.from_pretrained(args.model, device=args.device),
        Transformer.from_pretrained(args.model),
    )
    groups = draw(here)

    def parity() -> dict[str, tuple[float, bool]]:
        ids_BT = torch.tensor(
            [(prompt + responses[0] + [0] * 64)[:16] for prompt, responses in groups]
        )
        logits = difference(there(ids_BT.to(device)), here(ids_BT))
        logp = difference(
            logprobs(there, groups, gradient=True), logprobs(here, groups, gradient=True)
        )
        gradient = gradient_difference(there, here)
        return {
            name: (x, x < CLOSE)
            for name, x in (("logits", logits), ("log-probs", logp), ("gradients", gradient))
        }

    def same_samples() -> dict[str, tuple[float, bool]]:
        share = equal_responses(draw(there), groups)
        return {"equal share": (share, share >= SAME)}

    def compiled() -> dict[str, tuple[float, bool]]:
        eager_logp, eager_groups = logprobs(there, groups), draw(there)
        model = Transformer.from_pretrained(args.model, device=args.device).compile_blocks()
        logp, share = (
            difference(logprobs(model, groups, gradient=True), eager_logp),
            equal_responses(draw(model), eager_groups),
        )
        return {"log-probs": (logp, logp < CLOSE), "equal share of samples": (share, share >= SAME)}

    def bf16_gap() -> dict[str, tuple[float, bool]]:
        exact = logprobs(there, groups)
        gaps = [(logprobs(model, groups, dtype) - exact).abs() for model, dtype in (
            (there, torch.bfloat16), (there.copy_as(torch.bfloat16), torch.float32)
        )]  # fmt: skip
        mean, most = (max(float(f(gap)) for gap in gaps) for f in (torch.mean, torch.max))
        return {"mean, nat": (mean, mean < BF16_MEAN), "largest": (most, most < BF16_MAX)}

    def step() -> dict[str, tuple[float, bool]]:
        norm = rl_step(device)
        return {"gradient norm": (norm, math.isfinite(norm) and norm > 0)}

    print(
        f"{args.model} on {torch.cuda.get_device_name() if device.type == 'cuda' else 'the CPU'}, torch {torch.__version__}"
    )
    results = [
        check("float32 equals the CPU's", parity),
        check("float32 draws the CPU's samples", same_samples),
        check("compiled equals eager, decoding in CUDA graphs included", compiled),
        check("bfloat16 gap to float32", bf16_gap),
        check("one RL step", step),
    ]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
