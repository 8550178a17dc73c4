"""Batched sampling with a KV cache: token ids in, completions and their log-probs out, no text.

A prompt is prefilled once for all its samples. Up to max_rows rows decode at once: the first R
rows of one cache. When rows finish, the last live rows move into their places, and the next
prompts are admitted. Every response draws from a random stream of its own, seeded by
(seed, prompt, sample), so it does not matter which rows share a batch.

Shapes: R live rows, N prompts being admitted, G samples of a prompt, T tokens, V vocabulary.
"""

import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model import KVCache, Transformer
from scale.parallel import whole_tensor


@dataclass
class Completion:
    """One response: its ids and the log-prob of each."""

    ids: list[int] = field(default_factory=list)  # the stop id included when it was sampled
    logps: list[float] = field(default_factory=list)  # nat, of the distribution sampled from
    finished: bool = False  # ended on a stop id; False = cut off at max_new_tokens


def sampled_log_softmax(
    logits_RV: Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> Tensor:
    """Log-probs [R, V] of the distribution that is sampled from; tokens cut off by top-k, then by
    top-p, get -inf. top_p 1 and top_k 0 cut nothing off. Temperature 0 is greedy: the first most
    probable token has probability 1, so log-prob 0."""
    if temperature == 0:
        logp_RV = torch.full_like(logits_RV, -torch.inf, dtype=torch.float32)
        best_R1 = logits_RV.argmax(dim=-1, keepdim=True)
        return logp_RV.scatter_(-1, best_R1, logits_RV.float().gather(-1, best_R1) * 0)  # or NaN
    logp_RV = torch.log_softmax(logits_RV.float() / temperature, dim=-1)
    if top_k == 0 and top_p >= 1.0:
        return logp_RV
    sorted_RV, order_RV = logp_RV.sort(dim=-1, descending=True, stable=True)
    if top_k > 0:
        sorted_RV[:, top_k:] = -torch.inf
    if top_p < 1.0:
        prob_RV = sorted_RV.softmax(dim=-1)
        before_RV = prob_RV.cumsum(dim=-1) - prob_RV
        sorted_RV[before_RV >= top_p] = -torch.inf  # the first token always stays
    return torch.empty_like(logp_RV).scatter_(-1, order_RV, sorted_RV.log_softmax(dim=-1))


def draw(logp_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """Inverse-CDF sampling: the first token [R] whose cumulative probability exceeds the row's
    uniform number in [0, 1)."""
    cdf_RV = logp_RV.exp().cumsum(dim=-1)
    total_R1 = cdf_RV[:, -1:]
    point_R1 = uniform_R[:, None].to(cdf_RV) * total_R1
    # rounding must not move the point to the total: no token lies there
    point_R1 = torch.minimum(point_R1, torch.nextafter(total_R1, torch.zeros_like(total_R1)))
    id_R = torch.searchsorted(cdf_RV, point_R1, right=True)[:, 0]
    return id_R.clamp(max=logp_RV.shape[-1] - 1)  # a row of NaN: sample raises


@dataclass(slots=True)
class _Row:
    """A response in the making."""

    completion: Completion
    prompt_length: int
    rng: np.random.Generator


@torch.no_grad()
def sample(
    model: Transformer,
    prompts: list[list[int]],
    *,
    num_samples: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop_ids: set[int],
    seed: int,
    max_rows: int,
    first_prompt: int = 0,
    progress: bool = True,
) -> list[list[Completion]]:
    """Sample num_samples completions of every prompt; returns them as [prompt][sample].

    max_rows bounds the rows decoded at once; the result does not depend on it. first_prompt is the
    number of the first prompt where the prompts are one process's share of many: the random
    streams go by these numbers. progress: show a bar on a terminal after five seconds.
    Raises ValueError for an empty prompt, ids outside the vocabulary, or arguments out of range;
    FloatingPointError for logits that are not finite.
    """
    _check(model, prompts, num_samples, max_new_tokens, temperature, top_p, top_k, max_rows)
    device = model.model.embed_tokens.weight.device
    results = [[Completion() for _ in range(num_samples)] for _ in prompts]
    num_parts = math.ceil(num_samples / max_rows)  # of a prompt's samples, admitted together
    waiting = deque(
        (p, samples)
        for p in range(len(prompts))
        for samples in np.array_split(np.arange(num_samples), num_parts)
    )
    # a GPU's allocator is slow at growing tensors: there the longest row's slots are taken at once
    longest = max(map(len, prompts), default=0) + max_new_tokens
    num_slots = 0 if device.type == "cpu" else longest
    cache = KVCache(model, min(max_rows, len(prompts) * num_samples), num_slots)
    rows: list[_Row] = []
    logits_RV = torch.empty(0, model.config.vocab_size, device=device)
    total = len(prompts) * num_samples * max_new_tokens
    disable = None if progress else True  # None: a bar on a terminal only
    bar = tqdm(total=total, desc="sampling", unit="tok", leave=False, delay=5, disable=disable)
    while rows or waiting:
        admitted: list[int] = []
        # a prefill costs about a decode step: wait until an eighth of the rows is free
        wait = max_rows - len(rows) < max_rows // 8
        while waiting and not wait and len(rows) + len(waiting[0][1]) <= max_rows:
            p, samples = waiting.popleft()
            for g in samples:
                rng = np.random.default_rng((seed, first_prompt + p, g))
                rows.append(_Row(results[p][g], len(prompts[p]), rng))
                admitted.append(p)
        if admitted:
            new_RV = _prefill(model, cache, prompts, admitted, len(rows) - len(admitted))
            logits_RV = torch.cat([logits_RV, new_RV])

        logp_RV = sampled_log_softmax(logits_RV, temperature, top_p, top_k)
        id_R = draw(logp_RV, torch.tensor([row.rng.random() for row in rows], device=device))
        logps = logp_RV.gather(-1, id_R[:, None])[:, 0].tolist()
        if not all(map(math.isfinite, logps)):
            raise FloatingPointError("the model's logits are not finite while sampling")
        live = []
        for i, (row, id_, logp) in enumerate(zip(rows, id_R.tolist(), logps, strict=True)):
            completion = row.completion
            completion.ids.append(id_)
            completion.logps.append(logp)
            completion.finished = id_ in stop_ids
            if not completion.finished and len(completion.ids) < max_new_tokens:
                live.append(i)
            else:
                bar.update(max_new_tokens - len(completion.ids))
        bar.update(len(rows))

        if len(live) < len(rows):
            live = _compact(cache, live)
            rows, id_R = [rows[i] for i in live], id_R[live]
        logits_RV = _decode(model, cache, rows, id_R) if rows else logits_RV[:0]
    bar.close()
    return results


def _prefill(
    model: Transformer, cache: KVCache, prompts: list[list[int]], admitted: list[int], start: int
) -> Tensor:
    """Run the prompts once and copy each to its rows of the cache, from row start on: one row for
    every number in admitted. Returns the next-token logits [rows, V]."""
    device = model.model.embed_tokens.weight.device
    place = {p: n for n, p in enumerate(dict.fromkeys(admitted))}
    length_N = torch.tensor([len(prompts[p]) for p in place], device=device)
    T = int(length_N.max())
    ids_NT = torch.tensor([prompts[p] + [0] * (T - len(prompts[p])) for p in place], device=device)
    pos_NT = torch.arange(T, device=device).expand_as(ids_NT)
    prefilled = KVCache(model, len(place), T)
    x_NTD = model.hidden(ids_NT, pos_NT, prefilled.at(pos_NT, T))
    logits_NV = model.logits(x_NTD[torch.arange(len(place), device=device), length_N - 1])
    source = [place[p] for p in admitted]
    cache.grow(T)
    cache.copy_rows(list(range(start, start + len(admitted))), prefilled, source)
    return logits_NV[source]


def _decode(model: Transformer, cache: KVCache, rows: list[_Row], id_R: Tensor) -> Tensor:
    """Next-token logits [R, V] behind the rows' newest tokens."""
    length_R = [row.prompt_length + len(row.completion.ids) for row in rows]
    pos_R1 = torch.tensor(length_R, device=id_R.device)[:, None] - 1
    attend = cache.at(pos_R1, max(length_R))
    return model.logits(model.hidden(id_R[:, None], pos_R1, attend)[:, 0])


def _compact(cache: KVCache, live: list[int]) -> list[int]:
    """Move the last live rows into the places of finished ones, so that the live rows are the
    first of the cache. Returns the old index of every live row, in the new order."""
    holes = sorted(set(range(len(live))) - set(live))
    movers = live[len(live) - len(holes) :]
    if holes:
        cache.copy_rows(holes, cache, movers)
    moved = dict(zip(holes, movers, strict=True))
    return [moved.get(i, i) for i in range(len(live))]


def _check(model, prompts, num_samples, max_new_tokens, temperature, top_p, top_k, max_rows):
    for name, value, good in (
        ("num_samples", num_samples, num_samples >= 1),
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1),
        ("temperature", temperature, temperature >= 0),
        ("top_p", top_p, 0 < top_p <= 1),
        ("top_k", top_k, top_k >= 0),
        ("max_rows", max_rows, max_rows >= 1),
    ):
        if not good:
            raise ValueError(f"sample: {name} = {value} is out of range")
    vocabulary = model.config.vocab_size
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"sample: prompt {i} is empty; expected at least one token")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise ValueError(f"sample: prompt {i}: ids outside the vocabulary 0..{vocabulary - 1}")


@torch.no_grad()
def sampling_copy(policy: Transformer, dtype: str, compiled: bool = False) -> Transformer:
    """An unsharded copy of the current weights in dtype ("float32" or "bfloat16"), or the policy
    itself if it has that dtype, no shards and no adapters. Every process gathers its own copy of
    sharded weights, tensor by tensor. compiled: compile the copy's blocks."""
    dtype = getattr(torch, dtype)
    if type(policy) is Transformer and policy.head_weight.dtype == dtype:
        return policy
    with torch.device("meta"):
        copy = Transformer(policy.config)
    state = {name: whole_tensor(weight.to(dtype)) for name, weight in policy.weights()}
    copy.load_state_dict(state, assign=True)
    copy.requires_grad_(False)
    copy.unknown_ids = policy.unknown_ids
    swap_layers(copy)
    return copy.compile_blocks() if compiled else copy


def swap_layers(copy: Transformer) -> None:
    """Does nothing; scale/speed.py replaces it by a function that swaps in faster layers."""
