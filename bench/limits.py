"""What share of this machine's limits sampling and training reach.

    python -m bench.limits --model models/SmolLM2-135M-Instruct --rows 64 --groups 4

The limit is the time of the matrix products alone at the machine's best rate, or in decoding, where
it takes longer, of reading the weights and the cache once a step. Rate and bandwidth are measured
between the rounds. Everything else (norms, exp, the loss, the optimizer's float32 sums) is free.
"""

import statistics
import time
from collections.abc import Callable

import torch

from bench.common import DTYPES, options, set_up
from bench.training import contestant
from model import Linear, Transformer
from sampler import sample, sampling_copy


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def best_rates(dtype: torch.dtype) -> tuple[float, float]:
    """(operations a second of a large matrix product, bytes a second of a copy)."""
    n, size = 4096, 2**28
    a, b = torch.randn(2, n, n, dtype=dtype)
    source, target = torch.ones(2, size, dtype=torch.uint8)
    product = min(seconds(lambda: a @ b) for _ in range(5))
    copy = min(seconds(lambda: target.copy_(source)) for _ in range(5))
    return 2 * n**3 / product, 2 * size / copy


class Work:
    """Operations and bytes that a model needs."""

    def __init__(self, model: Transformer, dtype: torch.dtype):
        c = model.config
        self.layers = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, Linear))
        self.head, self.element = model.head_weight.numel(), dtype.itemsize
        self.q_width = c.num_layers * c.num_heads * c.head_dim
        self.kv_width = c.num_layers * c.num_kv_heads * c.head_dim

    def forward(self, tokens: int, logits: int, seen: int) -> int:
        """Operations for so many tokens, logits of so many, and attention to `seen` in all."""
        return 2 * (tokens * self.layers + logits * self.head + 2 * seen * self.q_width)

    def read(self, seen: int) -> int:
        """Bytes of all weights and of the keys and values of `seen` tokens."""
        return self.element * (self.layers + self.head + 2 * seen * self.kv_width)


def sampling_limit(work: Work, args, product: float, bandwidth: float) -> float:
    rows, U = args.rows, args.prompt_tokens
    limit = work.forward(rows // 8 * U, rows // 8, rows // 8 * U * U // 2) / product
    for t in range(1, args.new_tokens):
        seen = rows * (U + t)
        operations = work.forward(rows, rows, seen)
        limit += max(operations / product, work.read(seen) / bandwidth)
    return limit


def training_limit(work: Work, args, product: float) -> float:
    """The backward pass has twice the products of the forward pass."""
    U, T = args.prompt_tokens, args.new_tokens
    seen = U * U // 2 + 8 * T * (U + T // 2)
    return args.groups * 3 * work.forward(U + 8 * T, 8 * T, seen) / product


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rows", type=int, default=64, help="8 samples of rows / 8 prompts")
    parser.add_argument("--groups", type=int, default=4, help="of 8 responses, to train on")
    args = parser.parse_args()
    set_up(args)
    dtype = DTYPES[args.dtype]
    policy = Transformer.from_pretrained(args.model)
    work = Work(policy, getattr(torch, dtype))
    copy, train = sampling_copy(policy, dtype), contestant("ours", args)
    shape = (args.rows // 8, args.prompt_tokens)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, policy.config.vocab_size - 1, shape, generator=generator).tolist()
    limits = {"num_samples": 8, "max_rows": args.rows, "max_new_tokens": args.new_tokens}

    def draw() -> None:
        sample(copy, prompts, **limits, stop_ids=set(), seed=0, progress=False)

    rounds: dict[str, list[tuple[float, float]]] = {"sampling": [], "training": []}
    for _ in range(args.rounds + 1):
        product, bandwidth = best_rates(getattr(torch, dtype))
        rounds["sampling"].append((seconds(draw), sampling_limit(work, args, product, bandwidth)))
        rounds["training"].append((seconds(train), training_limit(work, args, product)))
    print(
        f"{args.model}, {args.dtype}, {args.threads} threads, at the end "
        f"{product / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s"
    )
    for name, pairs in rounds.items():
        took, limit = (statistics.median(values) for values in zip(*pairs[1:], strict=True))
        print(f"  {name:<10} {took:7.2f} s   limit {limit:7.2f} s   reached {limit / took:.0%}")


if __name__ == "__main__":
    main()
