"""What a run will need: memory of a GPU, time, disk. Computed from the config and the model's config.json; no weights are read.

    python rloop.py --config configs/X.toml --plan --gpus 8 --gpu-memory-gb 80

Memory at once = what always lies there + the largest of the phases, which follow one another: sampling, a micro-batch, the optimizer's
step. What a block keeps for the gradient was listed from model.py and packing.py in eager mode (compiled blocks keep less), and the sums
were measured on a CPU (tests/test_plan.py). The constants in capitals are assumptions, printed with the plan: nothing here was measured on
a GPU. The times leave out verifying and the starting of kernels, which is most of the time of a model of a few million parameters.

Letters: D width, F MLP width, V vocabulary, L layers, H query heads, K kv heads, E head width; G samples of a problem. Sizes are bytes.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from config import Config
from model import TransformerConfig
from packing import LOGITS_AT_ONCE

LOGITS_KEPT = 0

GIB = 2**30  # the GB of a GPU: an "80 GB" one has about 80 of these
NUM_BYTES = {"float32": 4, "bfloat16": 2}
STRIDE = 8  # sampler.STRIDE on a GPU

RESERVE = 2 * GIB  # CUDA context, NCCL's buffers, cuBLAS's workspace
FRAGMENTATION = 0.1  # of what training allocates and frees, besides
PROMPT_TOKENS = 512  # of the longest prompt
RESPONSE_SHARE = 0.5  # mean response / sampling.max_new_tokens
FLAT_SHARE = 0.5  # of groups: dropped, and sampled anew in the next round
PEAK_FLOPS = {
    "float32": 67e12,
    "bfloat16": 989e12,
}  # per second; H100 SXM, NVIDIA's data sheet, dense
MEMORY_BANDWIDTH = 3.35e12  # bytes per second; the same source
USE = {
    "training": 0.35,
    "prefill": 0.35,
    "decode": 0.4,
}  # of the peak; of decode also of the bandwidth
GPUS_PER_NODE = 8
LINK = {
    "node": 300e9,
    "network": 40e9,
    "host": 3e9,
}  # bytes per second and GPU: NVLink, 400 Gbit/s InfiniBand, gloo between hosts
PICKLED, LISTED, WRITTEN = (
    17,
    72,
    34,
)  # bytes of a response token: sent as an object, as Python's numbers, in trajectories/*.jsonl


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch. by_rows: attention repeats the prompt for every response, as on a GPU and for long responses."""

    tokens: float  # prompts' and responses'
    response_tokens: float
    rows: float  # responses
    longest: int  # tokens of the longest prompt and response
    by_rows: bool = True


def read_architecture(cfg: Config) -> TransformerConfig:
    file = Path(cfg.model.path) / "config.json"
    if not file.exists():
        raise ValueError(
            f"{file}: not found; the plan needs this file and no weights. For a model of the Hugging Face hub: "
            f"hf download OWNER/{file.parent.name} config.json --local-dir {file.parent}"
        )
    try:
        return TransformerConfig.from_hf(json.loads(file.read_text(encoding="utf-8")), str(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from None


def count_parameters(c: TransformerConfig) -> tuple[int, int]:
    """Of a block, and of the root (embedding, last norm, head)."""
    D, H, K, E = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim
    attention = (
        2 * D * H * E
        + 2 * D * K * E
        + c.qkv_bias * (H + 2 * K) * E
        + c.o_bias * D
        + c.qk_norm * 2 * E
    )
    return attention + 3 * D * c.intermediate_size + 2 * D, c.vocab_size * D * (
        1 if c.tie_embeddings else 2
    ) + D


# -------------------------------------------------------------------------------------------------------------------- memory


def always(c: TransformerConfig, cfg: Config, gpus: int) -> dict[str, float]:
    block, root = count_parameters(c)
    shard = 4.0 * (c.num_layers * block + root) * cfg.compute.replicas / gpus
    parts = {"float32 master weights": shard}
    if gpus == 1 and cfg.compute.dtype != "float32":
        parts["weights for the sampler"] = float(
            (c.num_layers * block + root) * NUM_BYTES[cfg.compute.dtype]
        )
    if cfg.method != "eval":
        parts |= {"float32 gradients": shard, "AdamW moments": 2 * shard}
    if cfg.method == "rloop" or cfg.rl.kl_coef > 0:
        parts["theta_i"] = shard
    if cfg.rl.kl_coef > 0:
        parts["reference model"] = shard
    return parts


def sampling(
    c: TransformerConfig,
    cfg: Config,
    gpus: int,
    rows: int,
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    stride: int = STRIDE,
) -> dict[str, float]:
    """While rows responses are decoded at once. The cache is given back afterwards, and so is the whole copy of sharded weights."""
    b, (block, root) = NUM_BYTES[cfg.compute.dtype], count_parameters(c)
    num_slots = math.ceil((prompt_tokens + cfg.sampling.max_new_tokens + stride - 1) / 16) * 16
    slot = 2 * c.num_layers * c.num_kv_heads * c.head_dim * b
    prompts = math.ceil(rows / cfg.rl.samples_per_problem)
    prefill = (
        prompts
        * prompt_tokens
        * (3 * c.intermediate_size * b + 16 * c.hidden_size + 8 * c.num_heads * prompt_tokens)
    )
    decode = (
        rows * c.num_heads * num_slots * (2 * b + 4)
    )  # scores, their softmax in float32, the weights
    sorting = 28 if cfg.eval.top_p < 1 or cfg.eval.top_k > 0 else 0
    return {
        "weights for the sampler": float((c.num_layers * block + root) * b) if gpus > 1 else 0.0,
        "KV cache": float(rows * num_slots * slot),
        "prompts' KV cache": float(prompts * prompt_tokens * slot),
        "logits and attention of a step": float(
            rows * c.vocab_size * 8 + max(prefill, rows * c.vocab_size * (8 + sorting) + decode)
        ),
    }


def largest_batch(cfg: Config, micro_batch_tokens: int) -> Batch:
    """The worst that micro_batches can make: whole groups of the longest responses; or, where one does not fit, the longest response beside
    short ones of its group, which attention pads to its length."""
    G, R = cfg.rl.samples_per_problem, cfg.sampling.max_new_tokens
    longest, group = PROMPT_TOKENS + R, PROMPT_TOKENS + G * R
    tokens = max(micro_batch_tokens, longest)
    rows = max(min(G, 1 + tokens - longest), G * tokens / group)
    return Batch(tokens=tokens, response_tokens=tokens * G * R / group, rows=rows, longest=longest)


def block_activations(c: TransformerConfig, batch: Batch, b: int) -> tuple[float, float]:
    """Bytes that a block keeps for its gradient, and those on top while the gradient is computed; b: bytes of a computed number."""
    M, Q, D, F = batch.tokens, batch.response_tokens, c.hidden_size, c.intermediate_size
    H, HE, KE = c.num_heads, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    norm = M * D * (8 + b)  # input and normalised input in float32, and the result; twice a block
    mlp = M * 4 * F * b  # gate, silu(gate), up, their product
    slots = batch.rows * batch.longest
    if batch.by_rows:
        attention = slots * (
            (2 * HE + 2 * KE) * b + 4 * H
        )  # q, k, v, the result and log-sum-exp of the kernel
        on_top = slots * (HE + 2 * KE) * 2 * b  # gradients of q, k, v for rows and for tokens
    else:
        scores = H * Q * batch.longest * b
        attention = scores + Q * HE * b + slots * 2 * KE * b + (M - Q) * (2 * HE + 2 * KE) * b
        on_top = 2 * scores
    on_top = max(
        2 * M * F * b, on_top - norm - mlp
    )  # at the MLP; or at the attention, when the MLP's share is gone
    return 2 * norm + mlp + attention + M * HE * b, on_top


def training(
    c: TransformerConfig, cfg: Config, gpus: int, batch: Batch, *, checkpoint: bool
) -> dict[str, float]:
    """While the gradient of a micro-batch is computed."""
    b, (block, root) = NUM_BYTES[cfg.compute.dtype], count_parameters(c)
    head = c.vocab_size * c.hidden_size
    kept, on_top = block_activations(c, batch, b)
    inputs = (
        batch.tokens * c.hidden_size * (4 if gpus == 1 else b)
    )  # one process keeps them in float32
    num_logits = batch.response_tokens * c.vocab_size
    at_logits = (12 if b == 4 else 14) * min(LOGITS_AT_ONCE, num_logits) + b * min(
        LOGITS_KEPT, num_logits
    )
    at_block = on_top + (kept - inputs if checkpoint else 0)
    if gpus == 1:
        gathered = {"bfloat16 weights": float(c.num_layers * block * b) if b < 4 else 0.0}
        at_logits += head * (4 + (b if b < 4 else 0))
        at_block += head * 4 * c.tie_embeddings  # a tied head's gradient waits for the embedding's
    else:
        unsharded = min(2, c.num_layers) * block + root
        gathered = {
            "all-gathered weights (2 blocks, root)": float(unsharded * b),
            "their gradients": float(unsharded * (b + 4)),
        }
    last_norm = batch.tokens * c.hidden_size * 8 + 2 * batch.response_tokens * c.hidden_size * b
    return gathered | {
        "activations": c.num_layers * (inputs if checkpoint else kept) + last_norm,
        "chunked logits, or a block's gradient": max(at_logits, at_block),
    }


def phases(
    c: TransformerConfig, cfg: Config, gpus: int, rows: int, batch: Batch
) -> dict[str, dict[str, float]]:
    """Phase -> part -> bytes of a GPU. "always" is there in all the others, which follow one another."""
    fixed = always(c, cfg, gpus)
    parts = {"always": fixed, "sampling": sampling(c, cfg, gpus, rows)}
    if cfg.method != "eval":
        parts["training"] = training(
            c, cfg, gpus, batch, checkpoint=cfg.compute.checkpoint_activations
        )
        parts["training"]["lost in the allocator's gaps"] = FRAGMENTATION * sum(
            parts["training"].values()
        )
        parts["optimizer"] = {"square roots of the moments": 2 * fixed["float32 master weights"]}
    return parts


def at_once(parts: dict[str, dict[str, float]], *names: str) -> float:
    """Bytes of a GPU: what is always there, the largest of the named phases, and the reserve."""
    return (
        sum(parts["always"].values())
        + max(sum(parts.get(name, {}).values()) for name in names)
        + RESERVE
    )


def largest(fits, limit: int = 2**24) -> int:
    """The largest number up to the limit that fits; 0 if none does."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


# -------------------------------------------------------------------------------------------------------------- time and disk


def sampled_problems(cfg: Config) -> list[float]:
    """Problems of each round of an RL step's dynamic sampling: what was flat is replaced."""
    return [cfg.rl.problems_per_step * FLAT_SHARE**r for r in range(cfg.rl.max_sampling_rounds)]


def step_work(c: TransformerConfig, cfg: Config) -> dict[str, float]:
    """FLOPs of an RL step on all GPUs together: two a parameter and token, four a head's number and pair of tokens."""
    weights, head = c.num_layers * count_parameters(c)[0], c.vocab_size * c.hidden_size
    pair, mean = (
        4 * c.num_layers * c.num_heads * c.head_dim,
        RESPONSE_SHARE * cfg.sampling.max_new_tokens,
    )
    prompts, seen = sum(sampled_problems(cfg)), PROMPT_TOKENS + mean / 2
    trained = (
        min(cfg.rl.problems_per_step, prompts * (1 - FLAT_SHARE))
        * cfg.rl.samples_per_problem
        * mean
    )  # response tokens
    trained_prompts = trained / (mean * cfg.rl.samples_per_problem) * PROMPT_TOKENS
    extra = cfg.rl.recompute_logprobs + (
        cfg.rl.kl_coef > 0
    )  # forward passes for old and reference log-probs
    forward = (trained + trained_prompts) * 2 * weights + trained * pair * seen
    return {
        "prefill": prompts * PROMPT_TOKENS * (2 * weights + pair * PROMPT_TOKENS / 2),
        "decode": prompts
        * cfg.rl.samples_per_problem
        * mean
        * (2 * (weights + head) + pair * seen),
        "training": (3 + cfg.compute.checkpoint_activations + extra) * forward
        + (4 + extra) * trained * 2 * head,
    }


def decode_seconds(c: TransformerConfig, cfg: Config, gpus: int) -> float:
    """Every token's step reads the weights and the cache once; the last rows run on to the longest response."""
    b, R = NUM_BYTES[cfg.compute.dtype], cfg.sampling.max_new_tokens
    weights = c.num_layers * count_parameters(c)[0] + c.vocab_size * c.hidden_size
    seconds = 0.0
    for problems in sampled_problems(cfg):
        responses = (
            math.ceil(problems / gpus) * cfg.rl.samples_per_problem
        )  # of the GPU that has most
        rows = min(cfg.compute.max_rows, responses)
        steps = responses * RESPONSE_SHARE * R / rows + (1 - RESPONSE_SHARE) * R
        read = b * (
            weights + rows * (PROMPT_TOKENS + R) * 2 * c.num_layers * c.num_kv_heads * c.head_dim
        )
        flops = rows * (
            2 * weights + 4 * c.num_layers * c.num_heads * c.head_dim * (PROMPT_TOKENS + R)
        )
        seconds += (
            steps
            / USE["decode"]
            * max(read / MEMORY_BANDWIDTH, flops / PEAK_FLOPS[cfg.compute.dtype])
        )
    return seconds


def step_seconds(c: TransformerConfig, cfg: Config, gpus: int) -> dict[str, float]:
    """Of an RL step. Training's collectives overlap with its products: the longer of the two counts."""
    b, (block, root), work = NUM_BYTES[cfg.compute.dtype], count_parameters(c), step_work(c, cfg)
    weights, shards = c.num_layers * block + root, gpus // cfg.compute.replicas
    link, elsewhere = LINK["node" if shards <= GPUS_PER_NODE else "network"], 1 - 1 / shards
    mean, speed = RESPONSE_SHARE * cfg.sampling.max_new_tokens, PEAK_FLOPS[cfg.compute.dtype] * gpus
    groups = min(cfg.rl.problems_per_step, sum(sampled_problems(cfg)) * (1 - FLAT_SHARE))
    tokens = (
        groups
        * (PROMPT_TOKENS + cfg.rl.samples_per_problem * mean)
        / gpus
        / cfg.compute.micro_batch_tokens
    )
    batches = cfg.rl.minibatches * math.ceil(tokens / cfg.rl.minibatches)
    extra = math.ceil(tokens) * (cfg.rl.recompute_logprobs + (cfg.rl.kl_coef > 0))
    moved = (
        weights * elsewhere * (batches * (2 * b + 4) + extra * b)
    )  # weights twice, gradients once a micro-batch
    between_replicas = batches * 8 * weights / shards * (1 - 1 / cfg.compute.replicas)
    return {
        "copy of the weights for the sampler": len(sampled_problems(cfg))
        * 4
        * weights
        * elsewhere
        / link,
        "prefill": work["prefill"] / speed / USE["prefill"],
        "decode": decode_seconds(c, cfg, gpus),
        "trajectories to every process": trajectory_bytes(cfg, PICKLED) / LINK["host"] * (gpus > 1),
        "training, products": work["training"] / speed / USE["training"],
        "training, collectives": moved / link + between_replicas / LINK["network"],
    }


def total_seconds(seconds: dict[str, float]) -> float:
    training = [value for name, value in seconds.items() if name.startswith("training")]
    return sum(seconds.values()) - min(training)


def trajectory_bytes(cfg: Config, of_token: float) -> float:
    """Of an RL step's trajectories; a prompt's tokens take a third of a response's, which have log-probs and text too."""
    mean = RESPONSE_SHARE * cfg.sampling.max_new_tokens
    return (
        sum(sampled_problems(cfg))
        * cfg.rl.samples_per_problem
        * (mean + PROMPT_TOKENS / 3)
        * of_token
    )


def disk(c: TransformerConfig, cfg: Config) -> dict[str, float]:
    block, root = count_parameters(c)
    weights = 4.0 * (c.num_layers * block + root)
    iteration = cfg.rl.steps * trajectory_bytes(cfg, WRITTEN)
    return {
        "trajectories of an iteration": iteration,
        "trajectories of the run": cfg.iterations * iteration,
        "checkpoints, two kept and one being written": 3
        * weights
        * (4 if cfg.method == "rloop" else 3),
        "exported policies": weights * (2 * cfg.iterations if cfg.method == "rloop" else 1),
    }


# -------------------------------------------------------------------------------------------------------------------- report


def report(cfg: Config, gpus: int, gpu_memory_gb: float) -> str:
    """The plan as text. Raises ValueError when config.json is not there, or the replicas do not divide the GPUs."""
    if gpus % cfg.compute.replicas:
        raise ValueError(f"compute.replicas = {cfg.compute.replicas}: must divide --gpus {gpus}")
    c, rows, tokens = read_architecture(cfg), cfg.compute.max_rows, cfg.compute.micro_batch_tokens
    block, root = count_parameters(c)
    batch, limit, shards = (
        largest_batch(cfg, tokens),
        gpu_memory_gb * GIB,
        gpus // cfg.compute.replicas,
    )
    parts = phases(c, cfg, gpus, rows, batch)
    need = at_once(parts, "sampling", "training", "optimizer")
    lines = [
        f"{cfg.model.path}: {c.num_layers * block + root:,} parameters, computing in {cfg.compute.dtype}"
    ]
    lines.append(
        f"{gpus} GPUs of {gpu_memory_gb:g} GiB, weights in {shards} shards, {cfg.compute.replicas} replicas"
    )
    lines += [
        "",
        f"memory of a GPU, GiB, at compute.max_rows = {rows}, compute.micro_batch_tokens = {tokens}",
    ]
    lines += [
        f"  {phase:<10} {name:<40} {size / GIB:8.2f}"
        for phase in parts
        for name, size in parts[phase].items()
    ]
    kept = {
        on: training(c, cfg, gpus, batch, checkpoint=on)["activations"] / GIB
        for on in (True, False)
    }
    lines.append(
        f"             (activations: {kept[True]:.2f} with checkpointing, {kept[False]:.2f} without)"
    )
    verdict = "fits" if need <= limit else f"DOES NOT FIT, {(need - limit) / GIB:.2f} too much"
    lines.append(
        f"  at once    {'always + the largest phase + the reserve':<40} {need / GIB:8.2f} of {gpu_memory_gb:g}: {verdict}"
    )
    most_rows = largest(lambda n: at_once(phases(c, cfg, gpus, n, batch), "sampling") <= limit)
    most_tokens = largest(
        lambda n: (
            at_once(phases(c, cfg, gpus, rows, largest_batch(cfg, n)), "training", "optimizer")
            <= limit
        )
    )
    lines.append(
        f"  the most that fits: compute.max_rows = {most_rows:,}, compute.micro_batch_tokens = {most_tokens:,}"
    )
    seconds, work = step_seconds(c, cfg, gpus), step_work(c, cfg)
    lines += [
        "",
        f"an RL step: {total_seconds(seconds):,.1f} s = {total_seconds(seconds) / 3600:.2f} hours, {sum(work.values()):.2e} FLOPs",
    ]
    lines += [
        f"  {name:<40} {value:12,.1f} s" + (f"  {work[name]:.2e} FLOPs" if name in work else "")
        for name, value in seconds.items()
    ]
    lines[-2] += f"  {work['training']:.2e} FLOPs"
    lines.append(
        f"  the run: {cfg.iterations * cfg.rl.steps} RL steps, {cfg.iterations * cfg.rl.steps * total_seconds(seconds) / 86400:.1f} days"
    )
    sent, listed = trajectory_bytes(cfg, PICKLED), trajectory_bytes(cfg, LISTED)
    lines += [
        "",
        f"host memory of every process, GB: {sent / 1e9:.1f} received in an RL step, as Python's numbers {listed / 1e9:.1f}",
    ]
    lines += ["", "disk, GB"] + [
        f"  {name:<45} {size / 1e9:10,.1f}" for name, size in disk(c, cfg).items()
    ]
    return "\n".join([*lines, "", assumptions(cfg)])


def assumptions(cfg: Config) -> str:
    use = ", ".join(f"{name} {value:.0%}" for name, value in USE.items())
    links = ", ".join(f"{name} {value / 1e9:g}" for name, value in LINK.items())
    return "\n".join(
        (
            f"assumed, not measured: longest prompt {PROMPT_TOKENS} tokens; mean response {RESPONSE_SHARE:.0%} of the limit of "
            f"{cfg.sampling.max_new_tokens}; {FLAT_SHARE:.0%} of groups flat;",
            f"  of {PEAK_FLOPS[cfg.compute.dtype] / 1e12:g} TFLOP/s and {MEMORY_BANDWIDTH / 1e12:g} TB/s are used: {use};",
            f"  links, GB/s and GPU: {links}; {GPUS_PER_NODE} GPUs a node; reserve {RESERVE / GIB:g} GiB; gaps {FRAGMENTATION:.0%} of "
            "what training allocates",
        )
    )
