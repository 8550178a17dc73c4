"""Sampling against transformers.generate: same weights, prompts, samples and temperature.

    python -m bench.sampling --model models/SmolLM2-135M-Instruct --rows 64 --lengths fixed

The unit is useful tokens a second: those up to a response's stop.
"""

from collections.abc import Callable
from functools import partial

import torch

from bench.common import DTYPES, alternate, options, report, set_up
from model import Transformer
from sampler import sample, sampling_copy
from scale import parallel


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rows", type=int, default=64, help="8 samples of rows / 8 prompts")
    args = parser.parse_args()
    set_up(args)
    from transformers import AutoModelForCausalLM

    dtype, T = DTYPES[args.dtype], args.new_tokens
    device = parallel.device()
    policy = Transformer.from_pretrained(args.model, device=device)
    if args.compile:
        policy.compile_blocks()  # in float32 the policy itself is sampled from
    ours = sampling_copy(policy, dtype, compiled=args.compile)
    theirs = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval().to(device)
    vocabulary, shape = ours.config.vocab_size, (args.rows // 8, args.prompt_tokens)
    prompts = torch.randint(3, vocabulary - 1, shape, generator=torch.Generator().manual_seed(0))
    draw = partial(sample, ours, prompts.tolist(), num_samples=8, max_rows=args.rows)
    stop_ids = stopping_ids(draw, vocabulary) if args.lengths == "spread" else set()
    seeds = iter(range(10**6))

    def run_ours() -> float:
        groups = draw(max_new_tokens=T, stop_ids=stop_ids, seed=next(seeds), progress=False)
        return float(sum(len(c.ids) for group in groups for c in group))

    @torch.no_grad()
    def run_theirs() -> float:
        torch.manual_seed(next(seeds))
        rows = prompts.repeat_interleave(8, dim=0).to(device)
        stop = {"max_new_tokens": T, "eos_token_id": sorted(stop_ids) or -1, "pad_token_id": 0}
        random = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        ids = theirs.generate(rows, attention_mask=torch.ones_like(rows), **stop, **random)
        new = ids[:, args.prompt_tokens :].cpu()
        ended = torch.isin(new, torch.tensor(sorted(stop_ids), dtype=torch.long)).cumsum(dim=1)
        return float(((ended == 0).sum(dim=1) + (ended > 0).any(dim=1)).sum())

    rates = alternate({"ours": run_ours, "transformers.generate": run_theirs}, args.rounds)
    title = f"sampling {args.model}, {args.rows} rows x {T} tokens, {args.lengths}"
    report(args, title, rates, "tok/s")


def stopping_ids(draw: Callable, vocabulary: int, spacing: int = 40) -> set[int]:
    """Every 40th id by frequency: about one token in 40 ends a response, so lengths spread."""
    groups = draw(max_new_tokens=64, stop_ids=set(), seed=1, progress=False)
    ids = torch.tensor([token for group in groups for c in group for token in c.ids])
    counts = torch.bincount(ids, minlength=vocabulary)
    order = counts.argsort(descending=True, stable=True)
    gaps = [abs(int(counts[order[i::spacing]].sum()) * spacing - len(ids)) for i in range(spacing)]
    return set(order[gaps.index(min(gaps)) :: spacing].tolist())


if __name__ == "__main__":
    main()
