"""Sampling against transformers.generate: same weights, prompts, samples, temperature and threads; useful tokens a second.

python -m bench.sampling --model models/SmolLM2-135M-Instruct --dtype bf16 --rows 64 --new-tokens 128 --lengths fixed
"""

import torch

from bench.common import (
    DTYPES,
    alternate,
    bandwidth,
    matmul_peak,
    options,
    report,
    sampler_of,
    set_up,
    setting,
)
from model import Transformer
from sampler import sample


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rows", type=int, default=64, help="8 samples of rows / 8 prompts")
    args = parser.parse_args()
    set_up(args)
    from transformers import AutoModelForCausalLM

    dtype = DTYPES[args.dtype]
    ours = sampler_of(args)
    theirs = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=dtype, attn_implementation="sdpa"
    ).eval()
    vocabulary = ours.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(
        3, vocabulary - 1, (args.rows // 8, args.prompt_tokens), generator=generator
    )
    stop_ids = stopping_ids(ours, prompts) if args.lengths == "spread" else set()
    seeds = iter(range(10**6))

    def run_ours() -> float:
        groups = sample(
            ours,
            prompts.tolist(),
            num_samples=8,
            max_new_tokens=args.new_tokens,
            stop_ids=stop_ids,
            seed=next(seeds),
            max_rows=args.rows,
        )
        return float(sum(len(c.ids) for group in groups for c in group))

    @torch.no_grad()
    def run_theirs() -> float:
        torch.manual_seed(next(seeds))
        rows = prompts.repeat_interleave(8, dim=0)
        ids = theirs.generate(
            rows, attention_mask=torch.ones_like(rows), do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=args.new_tokens,
            eos_token_id=sorted(stop_ids) or -1, pad_token_id=0,
        )[:, args.prompt_tokens :]  # fmt: skip
        ended = torch.isin(ids, torch.tensor(sorted(stop_ids), dtype=torch.long)).cumsum(dim=1)
        return float(((ended == 0).sum(dim=1) + (ended > 0).any(dim=1)).sum())

    rates = alternate({"ours": run_ours, "transformers.generate": run_theirs}, args.rounds)
    c = ours.config
    matrices = sum(
        w.numel()
        for name, w in ours.named_parameters()
        if w.dim() == 2 and (name != "model.embed_tokens.weight" or c.tie_embeddings)
    )
    slots = args.prompt_tokens + args.new_tokens / 2
    flop = 2 * matrices + 4 * slots * c.num_heads * c.head_dim * c.num_layers
    size = torch.finfo(dtype).bits // 8
    moved = size * (matrices / args.rows + 2 * slots * c.num_kv_heads * c.head_dim * c.num_layers)
    peak, read = matmul_peak(dtype), bandwidth()
    limit = 1 / max(flop / peak, moved / read)
    report(
        f"sampling {args.model}, {args.rows} rows x {args.new_tokens} tokens, {args.lengths}, {setting(args)}", rates,
        "tok/s", peak_gflops=round(peak / 1e9), read_gb_s=round(read / 1e9, 1), gflop_per_token=round(flop / 1e9, 3),
        limit_tok_s=round(limit), share_of_limit=round(rates["ours"] / limit, 3),
    )  # fmt: skip


def stopping_ids(model: Transformer, prompts: torch.Tensor, spacing: int = 40) -> set[int]:
    """Every 40th id by frequency, so that about one token in 40 ends a response, whatever it is about: lengths spread geometrically."""
    groups = sample(
        model,
        prompts.tolist(),
        num_samples=8,
        max_new_tokens=64,
        stop_ids=set(),
        seed=1,
        max_rows=64,
    )
    ids = torch.tensor([token for group in groups for c in group for token in c.ids])
    counts = torch.bincount(ids, minlength=model.config.vocab_size)
    order = counts.argsort(descending=True, stable=True)
    first = min(
        range(spacing),
        key=lambda start: abs(int(counts[order[start::spacing]].sum()) * spacing - len(ids)),
    )
    return set(order[first::spacing].tolist())


if __name__ == "__main__":
    main()
