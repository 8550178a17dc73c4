"""How sampling grows with rows and with length: tokens a second and peak memory, each point in a process of its own.

python -m bench.scaling --model models/SmolLM2-135M-Instruct --out docs/scaling.png
"""

import json
import subprocess
import sys
import time

import torch

from bench.common import flags, options, own_peak, sampler_of, set_up
from sampler import sample

ROWS = [(rows, 64) for rows in (16, 32, 64, 128, 256, 512)]
LENGTHS = [(32, length) for length in (64, 128, 256, 512, 1024)]


def measure(args) -> dict[str, float]:
    model = sampler_of(args)
    prompts = torch.randint(
        3,
        model.config.vocab_size - 1,
        (args.rows // 8, args.prompt_tokens),
        generator=torch.Generator().manual_seed(0),
    )
    options = {"num_samples": 8, "stop_ids": set(), "seed": 0, "max_rows": args.rows}
    sample(model, prompts.tolist(), max_new_tokens=4, **options)
    start = time.perf_counter()
    sample(model, prompts.tolist(), max_new_tokens=args.new_tokens, **options)
    rate = args.rows * args.new_tokens / (time.perf_counter() - start)
    return {
        "rows": args.rows,
        "new_tokens": args.new_tokens,
        "tok_s": round(rate, 1),
        "peak_gb": round(own_peak() / 1e9, 3),
    }


def plot(points: list[dict[str, float]], file: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, 2, figsize=(9, 5.5), layout="constrained", sharex="col", sharey="row"
    )
    halves = (
        (points[: len(ROWS)], "rows", "rows decoded at once, 64 tokens each"),
        (points[len(ROWS) :], "new_tokens", "tokens of a response, 32 rows"),
    )
    for column, (half, x, label) in enumerate(halves):
        for row, (y, name) in enumerate(
            (("tok_s", "tokens a second"), ("peak_gb", "peak memory, GB"))
        ):
            ax = axes[row, column]
            ax.plot([p[x] for p in half], [p[y] for p in half], marker="o")
            ax.set_xscale("log", base=2)
            ax.set_xticks([p[x] for p in half], [str(p[x]) for p in half])
            ax.set_ylim(bottom=0)
            ax.grid(alpha=0.3)
            if row == 1:
                ax.set_xlabel(label)
            if column == 0:
                ax.set_ylabel(name)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rows", type=int, default=0, help="measure this one point")
    parser.add_argument("--out", default="scaling.png")
    args = parser.parse_args()
    if args.rows:
        set_up(args)
        print(json.dumps(measure(args)))
        return
    points = []
    for rows, length in ROWS + LENGTHS:
        args.new_tokens = length
        point = [*flags(args), "--rows", str(rows)]
        output = subprocess.run(
            [sys.executable, "-m", "bench.scaling", *point],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        points.append(json.loads(output.splitlines()[-1]))
        print(points[-1], flush=True)
    plot(points, args.out)


if __name__ == "__main__":
    main()
