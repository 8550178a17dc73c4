"""A few minutes on a machine with one GPU: does what is tested on a CPU hold there, too?

    python -m bench.cuda_smoke

One line PASS or FAIL a check, with its figures; the exit code is 1 if one failed, 2 without CUDA.
"""

import contextlib
import json
import math
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import hf
import rloop
from config import load_config
from model import Transformer
from packing import Row, pack, token_logprobs
from run import Stopped
from sampler import sample, sampling_copy
from scale import parallel, plan, speed

CLOSE = 1e-3  # relative, of float32 sums in another order; TF32 would be seen
SAME = 0.99  # share of equal responses: rounding may move a draw over a token's border
BF16_MEAN, BF16_MAX = 0.03, 0.5  # nat
PLAN = 0.15  # relative error of planned memory
MODEL = "data/countdown_base"
LAPTOP = "configs/countdown.toml"
QWEN_05B = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
Figures = dict[str, tuple[float, bool]]  # name -> value, whether it is good


def draw(model: Transformer, max_rows: int = 24) -> list[list[Row]]:
    """The same prompts and random numbers on every device."""
    rng = np.random.default_rng(0)
    vocabulary = model.config.vocab_size
    prompts = [rng.integers(3, vocabulary, size=6 + 3 * n).tolist() for n in range(4)]
    options = {"num_samples": 16, "max_new_tokens": 24, "stop_ids": {0}, "seed": 0}
    groups = sample(model, prompts, max_rows=max_rows, progress=False, **options)
    return [
        [Row(prompt, c.ids, c.logps, weight=1.0) for c in group]
        for prompt, group in zip(prompts, groups, strict=True)
    ]


def logprobs(model: Transformer, groups: list[list[Row]], gradient: bool = False) -> Tensor:
    """Of all response tokens, on the CPU; with the gradient of their sum left in the weights."""
    parts = {}
    with torch.set_grad_enabled(gradient):
        for group in groups:
            batch = pack([group], model.head_weight.device)
            logp, _ = token_logprobs(model, batch)
            if gradient:
                logp.sum().backward()
            pieces = logp.detach().cpu().split([len(row.ids) for row in batch.rows])
            parts |= {id(row): piece for row, piece in zip(batch.rows, pieces, strict=True)}
    return torch.cat([parts[id(row)] for group in groups for row in group])


def difference(a: Tensor, b: Tensor) -> float:
    """Norm of the difference, relative to the norm of b."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm())


def equal_responses(a: list[list[Row]], b: list[list[Row]]) -> float:
    pairs = zip([r.ids for g in a for r in g], [r.ids for g in b for r in g], strict=True)
    return float(np.mean([x == y for x, y in pairs]))


def below(bound: float, **values: float) -> Figures:
    return {name: (value, value < bound) for name, value in values.items()}


def the_same_as_on_a_cpu(there: Transformer, here: Transformer) -> Figures:
    groups = draw(here)
    ids_BT = torch.tensor([(g[0].prompt_ids + g[0].ids + [0] * 64)[:16] for g in groups])
    logits = difference(there(ids_BT.cuda()), here(ids_BT))
    logp = difference(logprobs(there, groups, True), logprobs(here, groups, True))
    gradients = [
        torch.cat([weight.grad.flatten().cpu() for weight in model.parameters()])
        for model in (there, here)
    ]
    share = equal_responses(draw(there), groups)
    figures = below(CLOSE, logits=logits, logprobs=logp, gradients=difference(*gradients))
    return figures | {"equal responses": (share, share >= SAME)}


def no_influence_of_neighbours(there: Transformer) -> Figures:
    share = equal_responses(draw(there, max_rows=5), draw(there, max_rows=64))
    groups = draw(there)
    sampled = torch.tensor([x for group in groups for row in group for x in row.sampler_logps])
    gap = float((logprobs(there, groups) - sampled).abs().max())
    figures = {"equal responses": (share, share >= SAME)}
    return figures | below(CLOSE, **{"sampled and trained log-probs, most": gap})


def compiled(there: Transformer) -> Figures:
    groups, eager = draw(there), logprobs(there, draw(there))
    model = Transformer.from_pretrained(MODEL, device="cuda").compile_blocks()
    share = equal_responses(draw(model), groups)
    figures = below(CLOSE, logprobs=difference(logprobs(model, groups, True), eager))
    return figures | {"equal responses": (share, share >= SAME)}


def bfloat16(there: Transformer) -> Figures:
    groups = draw(there)
    exact = logprobs(there, groups)
    trained = Transformer.from_pretrained(MODEL, device="cuda")
    trained.compute_dtype = torch.bfloat16
    models = {"trained": trained, "copy": sampling_copy(there, "bfloat16")}
    gaps = {name: (logprobs(model, groups) - exact).abs() for name, model in models.items()}
    figures = below(BF16_MEAN, **{f"{name}, mean nat": float(g.mean()) for name, g in gaps.items()})
    return figures | below(
        BF16_MAX, **{f"{name}, most": float(g.max()) for name, g in gaps.items()}
    )


@contextlib.contextmanager
def run_directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "run"


def laptop_run(run_dir: Path, *overrides: str) -> list[dict]:
    """Its metrics, of a run of two iterations of three steps."""
    small = "--iterations 2 --rl.steps 3 --rft.epochs 2 --eval.every 3 --data.eval_size 20"
    command = ["--config", LAPTOP, *small.split(), "--run_dir", str(run_dir), *overrides]
    with contextlib.redirect_stdout(sys.stderr):
        if rloop.main(command) != 0:
            raise RuntimeError("rloop.main failed")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def a_run() -> Figures:
    """RLoop as on a CPU, on the GPU; and twice the same."""
    torch.cuda.reset_peak_memory_stats()
    with run_directory() as first, run_directory() as second:
        a, b = laptop_run(first), laptop_run(second)
    used = torch.cuda.max_memory_allocated() / 2**20
    norms = [[r["rl/grad_norm"] for r in records if "rl/grad_norm" in r] for records in (a, b)]
    good = len(norms[0]) == 6 and all(math.isfinite(x) and x > 0 for x in norms[0])
    repeated = difference(*(torch.tensor(x) for x in norms))
    return {
        "gradient norms": (np.mean(norms[0]), good),
        "MiB on the GPU": (used, used > 1),
        "between two runs": (repeated, repeated < 0.2),
    }


def continued() -> Figures:
    """A run that is stopped after its second checkpoint goes on to its end."""
    with run_directory() as run_dir:
        append, count = rloop.Run.commit, []

        def stop_at_fourth(self, *args, **kwargs):
            append(self, *args, **kwargs)
            count.append(1)
            if len(count) == 4:
                signal.raise_signal(signal.SIGTERM)

        rloop.Run.commit = stop_at_fourth
        with contextlib.suppress(Stopped, RuntimeError):
            laptop_run(run_dir, "--save_every", "1")
        rloop.Run.commit = append
        stopped = len((run_dir / "metrics.jsonl").read_text().splitlines())
        whole = len(laptop_run(run_dir, "--save_every", "1"))
    return {"records at the stop": (stopped, stopped < whole), "at the end": (whole, whole > 12)}


def planned_memory(dtype: str) -> Figures:
    """A random Qwen2.5-0.5B: 64 rows sampled, a micro-batch trained, against scale/plan.py."""
    prompt, samples, response, new = 256, 8, 512, 64
    options = {"num_samples": samples, "max_new_tokens": new, "max_rows": 64}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(QWEN_05B))
        overrides = ["--method", "rl", "--model.path", folder, "--compute.dtype", dtype]
        overrides += ["--sampling.max_new_tokens", str(new)]
        cfg = load_config(LAPTOP, [*overrides, "--rl.samples_per_problem", str(samples)])
        s, model = plan.Setting(cfg, gpus=1), hf.random_model(folder, seed=0)
    model = parallel.prepare(model, cfg.compute)
    peaks, sizes = {}, {"sampling": 4 * s.whole + plan.sampling(s, 64, prompt)}
    torch.cuda.reset_peak_memory_stats()
    copy = sampling_copy(model, dtype)
    sample(copy, [[1] * prompt] * 8, stop_ids=set(), seed=0, progress=False, **options)
    peaks["sampling"] = torch.cuda.max_memory_allocated()
    del copy

    def train(prompt: int, samples: int, response: int) -> None:
        rows = [Row([1] * prompt, [5] * response, weight=1.0) for _ in range(samples)]
        token_logprobs(model, pack([rows], "cuda"))[0].mean().backward()

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    train(3, 2, 2)
    optimizer.step()
    for phase, checkpoint in (("checkpointed", True), ("training", False)):
        for block in model.model.layers:
            block.checkpoint_activations = checkpoint
        torch.cuda.reset_peak_memory_stats()
        train(prompt, samples, response)
        peaks[phase] = torch.cuda.max_memory_allocated()
        tokens, slots = prompt + samples * response, samples * (prompt + response)
        batch = plan.gradient(s, tokens, samples * response, slots, checkpoint)
        sizes[phase] = plan.always(s) - s.shard + batch  # there is no theta_i here
    ratios = {phase: sizes[phase] / peak for phase, peak in peaks.items()}
    return {
        f"{phase} planned / measured ({peaks[phase] / 2**30:.2f} GiB)": (r, abs(r - 1) < PLAN)
        for phase, r in ratios.items()
    }


def check(name: str, function: Callable[[], Figures]) -> bool:
    """Print the check's line, and whether all its figures are good."""
    start = time.perf_counter()
    try:
        figures = function()
    except Exception as error:  # the other checks are worth running
        print(f"FAIL  {name}: {type(error).__name__}: {error}", flush=True)
        return False
    finally:
        torch.cuda.empty_cache()
    good = all(ok for _, ok in figures.values())
    told = ", ".join(
        f"{key} {value:.3g}{'' if ok else ' (!)'}" for key, (value, ok) in figures.items()
    )
    seconds = time.perf_counter() - start
    print(f"{'PASS' if good else 'FAIL'}  {name}: {told} [{seconds:.0f} s]", flush=True)
    return good


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was checked")
        return 2
    speed.swap_in()
    there = Transformer.from_pretrained(MODEL, device="cuda")
    here = Transformer.from_pretrained(MODEL)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    results = [
        check("float32 equals the CPU's", lambda: the_same_as_on_a_cpu(there, here)),
        check("rows do not influence one another", lambda: no_influence_of_neighbours(there)),
        check("bfloat16 is close to float32", lambda: bfloat16(there)),
        check("a run of RLoop", a_run),
        check("a stopped run goes on", continued),
        check("planned memory, float32", lambda: planned_memory("float32")),
        check("planned memory, bfloat16", lambda: planned_memory("bfloat16")),
        check("compiled equals eager", lambda: compiled(there)),
    ]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
