"""The memory and disk that a run will need, from its config and the model's config.json.

    python rloop.py --config configs/X.toml --plan --gpus 8 --gpu-memory-gb 80

Memory of a GPU = what is always there + the larger of the phases, which follow one another:
sampling and training. It is counted from model.py, sampler.py and packing.py in eager mode;
tests/test_plan.py compares it with the memory of real runs on a CPU. What a GPU needs beyond it is
assumed. All sizes are bytes; the letters are those of rloop.py.
"""

import math
from bisect import bisect_left
from pathlib import Path

import torch

import hf
from config import Config, UserError
from model import Transformer, round_up
from packing import LOGITS_AT_ONCE

GIB = 2**30  # the GB of a GPU
PROMPT_TOKENS = 512  # assumed: the longest prompt
RESERVE = 2 * GIB  # assumed: CUDA context, buffers of NCCL and cuBLAS
FRAGMENTATION = 0.1  # assumed: lost in the allocator's gaps, of what training allocates
LISTED, WRITTEN = 72, 34  # a response token in a process's memory, and in trajectories/*.jsonl


class Setting:
    """What a plan is for. Raises UserError for a config.json that is missing or not supported."""

    def __init__(self, cfg: Config, gpus: int):
        self.cfg, self.gpus, self.c = cfg, gpus, hf.read_config(Path(cfg.model.path))
        with torch.device("meta"):
            model = Transformer(self.c)
        self.num_bytes = getattr(torch, cfg.compute.dtype).itemsize
        self.block = sum(weight.numel() for weight in model.model.layers[0].parameters())
        self.whole = sum(weight.numel() for weight in model.parameters())
        products = [weight for weight in model.model.layers.parameters() if weight.dim() == 2]
        self.adapters = cfg.lora.rank * sum(sum(weight.shape) for weight in products)
        self.trained = self.adapters or self.whole
        part = cfg.compute.replicas / gpus
        self.shard = 4.0 * self.trained * part  # of what is float32
        self.frozen = self.num_bytes * self.whole * part if self.adapters else 0.0


def always(s: Setting) -> float:
    """Shards of the frozen weights, and of the trained ones, their gradients, AdamW's moments and
    theta_i. The KL term's copy of the weights is there while gradients are not."""
    num_copies = 1 if s.cfg.method == "eval" else 4 + (s.cfg.method != "sft")
    return s.frozen + s.shard * num_copies


def sampling(s: Setting, rows: int, prompt_tokens: int = PROMPT_TOKENS) -> float:
    """The copy of the weights, the KV cache and a step, while rows responses are decoded at once
    and their prompts are prefilled."""
    c, b = s.c, s.num_bytes
    weights = s.whole * b
    if s.gpus == 1 and (s.adapters or b == 4):  # the rest is the policy's own
        weights = c.num_layers * s.block * b if s.adapters else 0
    num_slots = round_up(prompt_tokens + s.cfg.sampling.max_new_tokens)
    prompts = math.ceil(rows / s.cfg.rl.samples_per_problem)
    slots = rows * num_slots + prompts * round_up(prompt_tokens)
    cache = slots * 2 * c.num_layers * c.num_kv_heads * c.head_dim * b
    sorting = 28 if s.cfg.eval.top_p < 1 or s.cfg.eval.top_k > 0 else 0
    # beside logits, new rows' logits and log-probs: their exp and its sum, or a block's prefill
    of_token = 4 * c.intermediate_size * b + 8 * c.hidden_size + 2 * c.num_heads * prompt_tokens * b
    step = max(rows * c.vocab_size * (8 + sorting), prompts * prompt_tokens * of_token)
    return weights + cache + rows * c.vocab_size * 12 + step


def training(s: Setting, micro_batch_tokens: int) -> float:
    """The gradient of the most expensive micro-batch, or the optimizer's square roots of moments.

    Most expensive are whole groups of the longest responses; or, where no group fits, one longest
    response beside short ones of its group, which attention pads to its length."""
    if s.cfg.method == "eval":
        return 0.0
    G, T = s.cfg.rl.samples_per_problem, s.cfg.sampling.max_new_tokens
    longest, group = PROMPT_TOKENS + T, PROMPT_TOKENS + G * T
    M = max(micro_batch_tokens, longest)
    rows = max(min(G, 1 + M - longest), G * M / group)
    checkpoint = s.cfg.compute.checkpoint_activations
    batch = gradient(s, M, M * G * T / group, rows * longest, checkpoint)
    return max((1 + FRAGMENTATION) * batch, 2 * s.shard)


def gradient(s: Setting, M: float, response_tokens: float, slots: float, checkpoint: bool) -> float:
    """While the gradient of a micro-batch is computed: gathered weights, activations, and the
    logits or a block's gradient. slots: its rows times the longest one; attention pads to it, and
    repeats the prompt for each response."""
    c, b = s.c, s.num_bytes
    D, HE, KE = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    # what a block keeps: norms, MLP (gate, silu(gate), up, product), attention by rows
    norms = 2 * M * D * (8 + b)
    mlp = M * 4 * c.intermediate_size * b
    attention = slots * ((2 * HE + 2 * KE) * b + 4 * c.num_heads) + M * HE * b
    adapters = 7 * M * s.cfg.lora.rank * b
    kept, inputs = norms + mlp + attention + adapters, M * D * b
    activations = c.num_layers * (inputs if checkpoint else kept) + M * D * (8 + 2 * b)
    # on top of it while its gradient is computed, at the MLP
    at_block = 2 * M * c.intermediate_size * b + (kept - inputs if checkpoint else 0)
    # a chunk's logits, log-softmax and gradient; the head and its gradient
    head, num_logits = c.vocab_size * D, response_tokens * c.vocab_size
    at_logits = (12 if b == 4 else 14) * min(LOGITS_AT_ONCE, num_logits)
    weights = 0
    if s.gpus > 1:  # two blocks and the root, and their gradients
        gathered = s.whole - max(0, c.num_layers - 2) * s.block
        weights = gathered * (b if s.adapters else 2 * b + 4)
    elif not s.adapters:
        weights = s.block * b * (1 if checkpoint else c.num_layers) if b < 4 else 0
        at_logits += head * (4 + (b if b < 4 else 0))
        at_block += head * 4 * c.tie_embeddings  # a tied head's gradient waits for the embedding's
    return weights + activations + max(at_logits, at_block)


def elsewhere(s: Setting) -> dict[str, float]:
    """Memory of the host and disk. A process holds what it has sampled, and what is dealt to it."""
    cfg, weights = s.cfg, 4.0 * (s.whole + s.adapters)
    num_copies = 3 + (cfg.method != "sft")  # the weights, two moments and theta_i
    response = cfg.sampling.max_new_tokens + PROMPT_TOKENS / 3  # a prompt is ids alone
    num_tokens = cfg.rl.problems_per_step * cfg.rl.samples_per_problem * response
    return {
        "host: trajectories of a step, in a process": num_tokens * LISTED * min(2, s.gpus) / s.gpus,
        "host: weights to export, in the first process": weights,
        "disk: trajectories": cfg.iterations * cfg.rl.steps * num_tokens * WRITTEN,
        "disk: checkpoints, two and one being written": 3 * num_copies * 4.0 * s.trained,
        "disk: policies": (2 * cfg.iterations if cfg.method == "rloop" else 1) * weights,
    }


def main(cfg: Config, gpus: int = 1, gpu_memory_gb: float = 80) -> int:
    """Print the plan. Raises UserError for replicas that do not divide the GPUs, and for a
    config.json that is missing or not supported."""
    replicas, limit = cfg.compute.replicas, gpu_memory_gb * GIB
    if gpus < 1 or gpus % replicas:
        raise UserError(f"--gpus {gpus}: expected a multiple of compute.replicas = {replicas}")
    s, rows, tokens = Setting(cfg, gpus), cfg.compute.max_rows, cfg.compute.micro_batch_tokens
    base = always(s) + RESERVE
    sizes = {
        f"always: {RESERVE / GIB:g} in reserve, shards of weights and moments": base,
        f"sampling: compute.max_rows = {rows}": sampling(s, rows),
        f"training: compute.micro_batch_tokens = {tokens}": training(s, tokens),
    }
    need = base + max(sampling(s, rows), training(s, tokens))
    verdict = "fits" if need <= limit else f"DOES NOT FIT, {(need - limit) / GIB:.2f} too much"
    counts = range(1, 2**24)
    most_rows = bisect_left(counts, True, key=lambda n: base + sampling(s, n) > limit)
    most_tokens = bisect_left(counts, True, key=lambda n: base + training(s, n) > limit)
    print(f"{cfg.model.path}: {s.whole:,} parameters, computing in {cfg.compute.dtype}")
    print(f"{gpus} GPUs of {gpu_memory_gb:g} GiB: {replicas} x {gpus // replicas} shards\n")
    print("GiB of a GPU")
    for name, size in sizes.items():
        print(f"  {name:<51} {size / GIB:8.2f}")
    print(f"  {'always + the larger phase':<51} {need / GIB:8.2f} of {gpu_memory_gb:g}: {verdict}")
    most = f"compute.max_rows = {most_rows}, compute.micro_batch_tokens = {most_tokens}"
    print(f"  most that fits: {most}\n")
    print("GB of 10^9, at most, for one sampling round a step")
    for name, size in elsewhere(s).items():
        print(f"  {name:<51} {size / 1e9:8.1f}")
    print(f"\nassumed, never measured on a GPU: prompts up to {PROMPT_TOKENS} tokens, the reserve,")
    print(f"{FRAGMENTATION:.0%} of training lost in the allocator's gaps")
    return 0
