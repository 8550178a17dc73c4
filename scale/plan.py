"""The memory and disk that a run will need, from its config and the model's config.json.

    python rloop.py --config configs/X.toml --plan --gpus 8 --gpu-memory-gb 80

Memory of a GPU = what is always there + the largest of the phases, which follow one another:
sampling, the gradient of a micro-batch, the optimizer's step. The parts are counted from model.py,
sampler.py and packing.py in eager mode; tests/test_plan.py compares them with the memory of real
runs on a CPU. What a GPU needs beyond them is assumed. All sizes are bytes.

Letters: D width, F MLP width, V vocabulary, L layers, H query heads, K kv heads, E head width.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path

import torch

import hf
from config import Config, UserError
from model import Transformer, TransformerConfig, round_up
from packing import LOGITS_AT_ONCE

GIB = 2**30  # the GB of a GPU
PROMPT_TOKENS = 512  # assumed: the longest prompt
RESERVE = 2 * GIB  # assumed: CUDA context, buffers of NCCL and cuBLAS
FRAGMENTATION = 0.1  # assumed: lost in the allocator's gaps, of what training allocates
LISTED, WRITTEN = 72, 34  # a response token in a process's memory, and in trajectories/*.jsonl


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a plan is for."""

    cfg: Config
    gpus: int
    c: TransformerConfig
    num_bytes: int  # of a number of compute.dtype
    block: int  # parameters of a block
    whole: int  # parameters of the model


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch."""

    tokens: float  # of prompts and responses
    response_tokens: float
    rows: float  # responses; attention repeats the prompt for each
    longest: int  # tokens of the longest prompt with its response


def setting(cfg: Config, gpus: int) -> Setting:
    """Count the parameters. Raises UserError for a config.json missing or not supported."""
    c, dtype = hf.read_config(Path(cfg.model.path)), getattr(torch, cfg.compute.dtype)
    with torch.device("meta"):
        model = Transformer(c)
    block = sum(weight.numel() for weight in model.model.layers[0].parameters())
    whole = sum(weight.numel() for weight in model.parameters())
    return Setting(cfg=cfg, gpus=gpus, c=c, num_bytes=dtype.itemsize, block=block, whole=whole)


def always(s: Setting) -> dict[str, float]:
    """What lies on a GPU in all phases."""
    cfg, shard = s.cfg, 4.0 * s.whole * s.cfg.compute.replicas / s.gpus
    parts = {"float32 weights": shard}
    if cfg.method != "eval":
        parts |= {"float32 gradients": shard, "AdamW moments": 2 * shard}
    if cfg.method == "rloop" or cfg.rl.kl_coef > 0:
        parts["theta_i"] = shard
    if cfg.rl.kl_coef > 0:
        parts["reference model"] = shard
    return parts


def sampling(s: Setting, rows: int, prompt_tokens: int = PROMPT_TOKENS) -> dict[str, float]:
    """While rows responses are decoded at once."""
    c, b = s.c, s.num_bytes
    num_slots = round_up(prompt_tokens + s.cfg.sampling.max_new_tokens)
    slot = 2 * c.num_layers * c.num_kv_heads * c.head_dim * b
    prompts = math.ceil(rows / s.cfg.rl.samples_per_problem)
    of_token = 4 * c.intermediate_size * b + 8 * c.hidden_size + 2 * c.num_heads * prompt_tokens * b
    sorting = 28 if s.cfg.eval.top_p < 1 or s.cfg.eval.top_k > 0 else 0
    # beside logits, new rows' logits and log-probs: their exp and its sum, or attention's weights
    drawing = rows * c.vocab_size * (8 + sorting)
    attention = rows * c.num_heads * num_slots * 2 * b
    step = rows * c.vocab_size * 12 + max(prompts * prompt_tokens * of_token, drawing, attention)
    return {
        "weights in compute.dtype": 0 if s.gpus == 1 and b == 4 else s.whole * b,
        "KV cache": rows * num_slots * slot,
        "KV cache of the prompts": prompts * round_up(prompt_tokens) * slot,
        "logits and attention": step,
    }


def largest_batch(cfg: Config, micro_batch_tokens: int) -> Batch:
    """The most expensive batch: whole groups of the longest responses; or, where no group fits, one
    longest response beside short ones of its group, which attention pads to its length."""
    G, R = cfg.rl.samples_per_problem, cfg.sampling.max_new_tokens
    longest, group = PROMPT_TOKENS + R, PROMPT_TOKENS + G * R
    tokens = max(micro_batch_tokens, longest)
    rows = max(min(G, 1 + tokens - longest), G * tokens / group)
    return Batch(tokens=tokens, response_tokens=tokens * G * R / group, rows=rows, longest=longest)


def training(s: Setting, batch: Batch, checkpoint: bool) -> dict[str, float]:
    """While the gradient of a micro-batch is computed."""
    c, b, M = s.c, s.num_bytes, batch.tokens
    D, HE, KE = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    # what a block keeps: norms, MLP (gate, silu(gate), up, product), attention by rows
    slots = batch.rows * batch.longest
    norms = 2 * M * D * (8 + b)
    mlp = M * 4 * c.intermediate_size * b
    attention = slots * ((2 * HE + 2 * KE) * b + 4 * c.num_heads) + M * HE * b
    kept, inputs = norms + mlp + attention, M * D * b
    # on top of it while its gradient is computed: at the MLP, or at the attention behind it
    on_top = max(2 * M * c.intermediate_size * b, slots * (HE + 2 * KE) * 2 * b - norms / 2 - mlp)
    at_block = on_top + (kept - inputs if checkpoint else 0)
    # a chunk's logits, log-softmax and gradient; the head and its gradient
    head, num_logits = c.vocab_size * D, batch.response_tokens * c.vocab_size
    at_logits = (12 if b == 4 else 14) * min(LOGITS_AT_ONCE, num_logits)
    if s.gpus == 1:
        blocks = 1 if checkpoint else c.num_layers
        weights = {"weights in compute.dtype": blocks * s.block * b if b < 4 else 0}
        at_logits += head * (4 + (b if b < 4 else 0))
        at_block += head * 4 * c.tie_embeddings  # a tied head's gradient waits for the embedding's
    else:
        gathered = s.whole - max(0, c.num_layers - 2) * s.block
        weights = {"gathered weights (2 blocks, root)": gathered * b}
        weights["their gradients"] = gathered * (b + 4)
    return weights | {
        "activations": c.num_layers * (inputs if checkpoint else kept) + M * D * (8 + 2 * b),
        "logits, or a block's gradient": max(at_logits, at_block),
    }


def elsewhere(s: Setting) -> dict[str, float]:
    """Memory of the host and disk. Every process gets all trajectories of a step."""
    cfg, weights = s.cfg, 4.0 * s.whole
    response = cfg.sampling.max_new_tokens + PROMPT_TOKENS / 3  # a prompt is ids alone
    num_tokens = cfg.rl.problems_per_step * cfg.rl.samples_per_problem * response
    loop = cfg.method == "rloop"
    return {
        "host: trajectories of a step, in every process": num_tokens * LISTED,
        "host: weights to export, in the first process": weights,
        "disk: trajectories": cfg.iterations * cfg.rl.steps * num_tokens * WRITTEN,
        "disk: checkpoints, two and one being written": 3 * (4 if loop else 3) * weights,
        "disk: policies": (2 * cfg.iterations if loop else 1) * weights,
    }


def phases(s: Setting, rows: int, micro_batch_tokens: int) -> dict[str, dict[str, float]]:
    """Phase -> part -> bytes of a GPU."""
    parts = {"always": always(s), "sampling": sampling(s, rows)}
    if s.cfg.method != "eval":
        batch = largest_batch(s.cfg, micro_batch_tokens)
        train = training(s, batch, s.cfg.compute.checkpoint_activations)
        parts["training"] = train | {"allocator's gaps": FRAGMENTATION * sum(train.values())}
        parts["optimizer"] = {"square roots of the moments": 2 * parts["always"]["float32 weights"]}
    return parts


def needed(parts: dict[str, dict[str, float]], *names: str) -> float:
    """Bytes of a GPU: what is always there, the largest of the named phases, and the reserve."""
    largest = max(sum(parts[name].values()) for name in names if name in parts)
    return sum(parts["always"].values()) + largest + RESERVE


def main(cfg: Config, gpus: int, gpu_memory_gb: float) -> int:
    """Print the plan. Raises UserError for replicas that do not divide the GPUs, and for a
    config.json that is missing or not supported."""
    replicas = cfg.compute.replicas
    if gpus % replicas:
        raise UserError(f"compute.replicas = {replicas}: must divide --gpus {gpus}")
    s, limit = setting(cfg, gpus), gpu_memory_gb * GIB
    rows, tokens = cfg.compute.max_rows, cfg.compute.micro_batch_tokens
    parts = phases(s, rows, tokens)
    need = needed(parts, "sampling", "training", "optimizer")
    verdict = "fits" if need <= limit else f"DOES NOT FIT, {(need - limit) / GIB:.2f} too much"
    lines = [
        f"{cfg.model.path}: {s.whole:,} parameters, computing in {cfg.compute.dtype}",
        f"{gpus} GPUs of {gpu_memory_gb:g} GiB: {replicas} x {gpus // replicas} shards",
        "",
        f"GiB of a GPU at compute.max_rows = {rows}, compute.micro_batch_tokens = {tokens}",
    ]
    for phase in parts:
        for name, size in parts[phase].items():
            lines.append(f"  {phase:<10} {name:<40} {size / GIB:8.2f}")
    total = f"  {'at once':<10} {'always + the largest phase + reserve':<40}"
    lines.append(f"{total} {need / GIB:8.2f} of {gpu_memory_gb:g}: {verdict}")

    too_many = (
        lambda n: needed(phases(s, n, tokens), "sampling") > limit,
        lambda n: needed(phases(s, rows, n), "training", "optimizer") > limit,
    )
    most_rows, most_tokens = (bisect_left(range(1, 2**24), True, key=key) for key in too_many)
    lines += [
        f"  most that fits: compute.max_rows = {most_rows},"
        f" compute.micro_batch_tokens = {most_tokens}",
        "",
        "GB of 10^9, at most, for one sampling round a step",
    ]
    lines += [f"  {name:<51} {size / 1e9:8.1f}" for name, size in elsewhere(s).items()]
    lines += [
        "",
        f"assumed, never measured on a GPU: prompts up to {PROMPT_TOKENS} tokens,"
        f" {RESERVE / GIB:g} GiB in reserve, {FRAGMENTATION:.0%} of training lost in gaps",
    ]
    print("\n".join(lines))
    return 0
