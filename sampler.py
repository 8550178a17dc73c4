"""Batched sampling with a KV cache: token ids in, completions and their log-probs out. Knows no text and no reward.

A prompt is prefilled once and shared by its samples. Up to max_rows rows decode at once, the first R rows of one cache; a finished row
leaves its slot, the last live row moves into the hole, and waiting rows are admitted. Every row draws from a random stream of its own,
seeded by (seed, prompt, sample), so which rows share a batch does not matter.

Shapes: R live rows, P prompts being prefilled, T tokens, V vocabulary, S cache slots.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from model import KVCache, Transformer

BLOCK = 128
STRIDE = {
    "cpu": 1,
    "cuda": 8,
}  # tokens drawn before the processor looks at them: to look is to wait for a GPU


@dataclass(slots=True)
class Completion:
    """ids: sampled tokens, the stop id included when it was sampled. logps: natural log of the sampled distribution's probability of
    each id (after temperature, top-k and top-p). finished: ended on a stop id; False = cut off at max_new_tokens."""

    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finished: bool = False


@dataclass(slots=True)
class _Rows:
    """The live rows: their completions, filled in when they end, and for each what the device needs to draw its next token without
    asking the processor. T = max_new_tokens, and what the last stride may draw behind it."""

    completions: list[Completion]
    start_R: Tensor  # length of the prompt
    num_R: Tensor  # tokens drawn so far
    uniform_RT: Tensor  # the t-th draws the t-th token
    ids_RT: Tensor
    logp_RT: Tensor

    def plus(self, new: "_Rows") -> "_Rows":
        return _Rows(
            self.completions + new.completions,
            *(torch.cat(both) for both in zip(self.tensors, new.tensors, strict=True)),
        )

    def take(self, order: list[int]) -> "_Rows":
        return _Rows([self.completions[i] for i in order], *(x[order] for x in self.tensors))

    @property
    def tensors(self) -> list[Tensor]:
        return [self.start_R, self.num_R, self.uniform_RT, self.ids_RT, self.logp_RT]


def sampled_log_softmax(
    logits_RV: Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> Tensor:
    """Log-probs [R, V] of the distribution that is sampled; tokens cut by top-k or top-p (in this order) get -inf."""
    logp_RV = torch.log_softmax(
        logits_RV.float() if temperature == 1.0 else logits_RV.float() / temperature, dim=-1
    )
    if top_k == 0 and top_p >= 1.0:
        return logp_RV
    sorted_RV, order_RV = logp_RV.sort(dim=-1, descending=True, stable=True)
    if 0 < top_k < logp_RV.shape[-1]:
        sorted_RV[:, top_k:] = -torch.inf
    if top_p < 1.0:
        prob_RV = sorted_RV.softmax(dim=-1)
        sorted_RV = sorted_RV.masked_fill(
            prob_RV.cumsum(dim=-1) - prob_RV >= top_p, -torch.inf
        )  # the first token always stays
    return torch.empty_like(logp_RV).scatter_(-1, order_RV, sorted_RV.log_softmax(dim=-1))


def draw(logp_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds the row's uniform number in [0, 1).

    First the block of BLOCK tokens is found, then the token in it: a running sum over a whole vocabulary is slow.
    """
    num_rows, num_blocks = len(logp_RV), math.ceil(logp_RV.shape[-1] / BLOCK)
    prob_RV, padding = logp_RV.exp(), num_blocks * BLOCK - logp_RV.shape[-1]
    prob_RCV = (F.pad(prob_RV, (0, padding)) if padding else prob_RV).view(
        num_rows, num_blocks, BLOCK
    )
    cdf_RC = prob_RCV.sum(dim=-1).cumsum(dim=-1)
    point_R1 = _below(uniform_R[:, None].to(cdf_RC) * cdf_RC[:, -1:], cdf_RC[:, -1:])
    block_R1 = torch.searchsorted(cdf_RC, point_R1, right=True).clamp(
        max=num_blocks - 1
    )  # NaN would be found behind the last
    before_R1 = F.pad(cdf_RC, (1, 0)).gather(-1, block_R1)
    cdf_RV = prob_RCV[torch.arange(num_rows, device=logp_RV.device), block_R1[:, 0]].cumsum(dim=-1)
    token_R1 = torch.searchsorted(cdf_RV, _below(point_R1 - before_R1, cdf_RV[:, -1:]), right=True)
    return (block_R1 * BLOCK + token_R1)[:, 0].clamp(max=logp_RV.shape[-1] - 1)


def _below(point: Tensor, limit: Tensor) -> Tensor:
    """The point, or the largest number below the limit: rounding must not find a token behind the last."""
    return torch.minimum(point, torch.nextafter(limit, torch.zeros_like(limit)))


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
) -> list[list[Completion]]:
    """Sample num_samples completions of every prompt; returns them as [prompt][sample].

    max_rows bounds the rows decoded at once; the result does not depend on it. first_prompt is the number of the first prompt, where the
    prompts are one process's part of many: the random streams go by these numbers.
    Raises ValueError for an empty prompt, ids outside the vocabulary, or arguments out of range; FloatingPointError for non-finite logits.
    """
    _check(model, prompts, num_samples, max_new_tokens, temperature, top_p, top_k, max_rows)
    device = model.model.embed_tokens.weight.device
    results = [[Completion() for _ in range(num_samples)] for _ in prompts]
    waiting = deque((p, g) for p in range(len(prompts)) for g in range(num_samples))
    num_rows = min(max_rows, len(waiting))
    stride = STRIDE[device.type]
    num_slots = max(map(len, prompts), default=0)  # on a CPU more as they are needed
    cache = KVCache(
        model, num_rows, num_slots + (max_new_tokens + stride - 1 if device.type == "cuda" else 0)
    )
    decode = _decoder(model, cache)
    prefilled: dict[
        int, tuple[KVCache, int, Tensor]
    ] = {}  # prompt -> its cache, row in it, next-token logits
    rows = _new_rows([], [], [], max_new_tokens + stride - 1, device)
    stops, stride_S = (
        torch.tensor(sorted(stop_ids), dtype=torch.long, device=device),
        torch.arange(stride, device=device),
    )
    logits_RV = torch.empty(0, model.config.vocab_size, device=device)
    bar = tqdm(
        total=len(waiting) * max_new_tokens, desc="sampling", unit="tok", leave=False, delay=5
    )
    while rows.completions or waiting:
        # a prefill costs a forward pass, so wait until it admits a fair number of rows
        free = num_rows - len(rows.completions)
        if waiting and free >= min(len(waiting), max(1, num_rows // 8)):
            batch = [waiting.popleft() for _ in range(min(len(waiting), free))]
            _prefill(
                model,
                prompts,
                [p for p in dict.fromkeys(p for p, _ in batch) if p not in prefilled],
                prefilled,
            )
            _admit(cache, len(rows.completions), [prefilled[p] for p, _ in batch])
            logits_RV = torch.cat([logits_RV, torch.stack([prefilled[p][2] for p, _ in batch])])
            generators = [np.random.default_rng((seed, first_prompt + p, g)) for p, g in batch]
            starts = [len(prompts[p]) for p, _ in batch]
            rows = rows.plus(
                _new_rows(
                    [results[p][g] for p, g in batch],
                    starts,
                    generators,
                    max_new_tokens + stride - 1,
                    device,
                )
            )
            for p in {p for p, _ in batch} - {p for p, _ in waiting}:
                del prefilled[p]
        num_RS = rows.num_R[:, None] + stride_S
        pos_RS, num_slots, drawn = (
            rows.start_R[:, None] + num_RS,
            int((rows.start_R + rows.num_R).max()),
            [],
        )
        uniform_RS = rows.uniform_RT.gather(-1, num_RS)
        for t in range(stride):
            logp_RV = sampled_log_softmax(logits_RV, temperature, top_p, top_k)
            id_R = draw(logp_RV, uniform_RS[:, t])
            drawn.append((id_R, logp_RV.gather(-1, id_R[:, None])[:, 0]))
            if t + 1 < stride:
                logits_RV = decode(id_R, pos_RS[:, t], num_slots + t + 1)
        ids_RS, logp_RS = (torch.stack(values, dim=1) for values in zip(*drawn, strict=True))
        if not logp_RS.isfinite().all():
            raise FloatingPointError("the model's logits are not finite while sampling")
        rows.ids_RT.scatter_(-1, num_RS, ids_RS)
        rows.logp_RT.scatter_(-1, num_RS, logp_RS)
        end_RS = torch.isin(ids_RS, stops) | (num_RS == max_new_tokens - 1)
        live_R = ~end_RS.any(dim=-1)
        count_R = torch.where(live_R, stride, end_RS.int().argmax(dim=-1) + 1)
        rows.num_R += count_R
        bar.update(int(count_R.sum()))
        pos_R = pos_RS[:, -1]
        if not all(live := live_R.tolist()):
            bar.total -= _finish(rows, live, stop_ids, max_new_tokens)
            order = _compact(cache, live)
            rows, id_R, pos_R = rows.take(order), id_R[order], pos_R[order]
        logits_RV = decode(id_R, pos_R, num_slots + stride) if rows.completions else logits_RV[:0]
    bar.close()
    return results


def _check(
    model, prompts, num_samples, max_new_tokens, temperature, top_p, top_k, max_rows
) -> None:
    for name, value, good in (
        ("num_samples", num_samples, num_samples >= 1),
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1),
        ("temperature", temperature, temperature > 0),
        ("top_p", top_p, 0 < top_p <= 1),
        ("top_k", top_k, top_k >= 0),
        ("max_rows", max_rows, max_rows >= 1),
    ):
        if not good:
            raise ValueError(f"sample: {name} = {value} is out of range")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(
                f"sample: prompt {i} is empty; a completion needs at least one token to start from"
            )
        if not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
            raise ValueError(
                f"sample: prompt {i} has ids outside the vocabulary 0..{model.config.vocab_size - 1}"
            )


def _new_rows(
    completions: list[Completion],
    starts: list[int],
    generators: list[np.random.Generator],
    width: int,
    device,
) -> _Rows:
    num = len(completions)
    uniform_RT = torch.from_numpy(
        np.stack([g.random(width) for g in generators]) if generators else np.empty((0, width))
    ).to(device)
    ids_RT, logp_RT = (
        torch.zeros(num, width, dtype=torch.long, device=device),
        torch.zeros(num, width, device=device),
    )
    start_R = torch.tensor(starts, dtype=torch.long, device=device)
    return _Rows(completions, start_R, torch.zeros_like(start_R), uniform_RT, ids_RT, logp_RT)


def _prefill(
    model: Transformer, prompts: list[list[int]], chosen: list[int], prefilled: dict
) -> None:
    """Run the chosen prompts, right-padded, through the model once and remember their caches and next-token logits."""
    if not chosen:
        return
    device = model.model.embed_tokens.weight.device
    length_P = torch.tensor([len(prompts[p]) for p in chosen], device=device)
    T = int(length_P.max())
    ids_PT = torch.tensor([prompts[p] + [0] * (T - len(prompts[p])) for p in chosen], device=device)
    cache = KVCache(model, len(chosen), T)
    pos_PT = torch.arange(T, device=device).expand(len(chosen), T)
    x_PTD = model.hidden(ids_PT, pos_PT, cache.at(pos_PT, T))
    logits_PV = model.logits(x_PTD[torch.arange(len(chosen), device=device), length_P - 1])
    prefilled.update({p: (cache, i, logits_PV[i]) for i, p in enumerate(chosen)})


def _admit(cache: KVCache, first_row: int, sources: list[tuple[KVCache, int, Tensor]]) -> None:
    """Copy prefilled prompts into consecutive rows of the cache, one copy for each prefill batch they come from."""
    by_cache: dict[int, tuple[KVCache, list[int], list[int]]] = {}
    for offset, (source, source_row, _) in enumerate(sources):
        _, targets, source_rows = by_cache.setdefault(id(source), (source, [], []))
        targets.append(first_row + offset)
        source_rows.append(source_row)
    for source, targets, source_rows in by_cache.values():
        cache.copy_rows(targets, source, source_rows)


def _decode(
    model: Transformer, cache: KVCache, id_R: Tensor, pos_R: Tensor, num_slots: int
) -> Tensor:
    """Next-token logits [R, V] of rows that get one more token each, at positions below num_slots."""
    return model.logits(
        model.hidden(id_R[:, None], pos_R[:, None], cache.at(pos_R[:, None], num_slots))[:, 0]
    )


def _decoder(model: Transformer, cache: KVCache) -> Callable[[Tensor, Tensor, int], Tensor]:
    """_decode for this model and cache; with compute.compile on a GPU, as CUDA graphs."""
    return (
        _Graphs(model, cache)
        if model.compiled and cache.v[0].is_cuda
        else partial(_decode, model, cache)
    )


class _Graphs:
    """Decoding steps captured as CUDA graphs: a step is one call then, not hundreds. (Never run: this project had no GPU.)

    Rows and slots are rounded up, so that few graphs serve all steps. The rows behind the live ones decode token 0 at position 0: what
    they write lies in rows that nobody has, and is overwritten when one is admitted. capture = False decodes the same without graphs.
    """

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        capture: bool = True,
        row_bucket: int = 16,
        slot_bucket: int = 256,
    ):
        self.model, self.cache, self.capture, self.row_bucket, self.slot_bucket = (
            model,
            cache,
            capture,
            row_bucket,
            slot_bucket,
        )
        self.graphs: dict[
            tuple[int, int], tuple[Tensor, Callable[[], Tensor]]
        ] = {}  # rows, slots -> ids and positions [2, rows], replay
        self.pool = torch.cuda.graph_pool_handle() if capture else None

    def __call__(self, id_R: Tensor, pos_R: Tensor, num_slots: int) -> Tensor:
        most_rows, _, most_slots, _ = self.cache.v[0].shape
        rows = min(math.ceil(len(id_R) / self.row_bucket) * self.row_bucket, most_rows)
        slots = min(math.ceil(num_slots / self.slot_bucket) * self.slot_bucket, most_slots)
        inputs_2R, replay = self.graphs.get(
            (rows, slots), (torch.empty(2, rows, dtype=torch.long, device=id_R.device), None)
        )
        inputs_2R.zero_()[:, : len(id_R)] = torch.stack([id_R, pos_R])
        if replay is None:
            replay = self._capture(inputs_2R, slots)
            self.graphs[rows, slots] = inputs_2R, replay
        return replay()[: len(id_R)]

    def _capture(self, inputs_2R: Tensor, slots: int) -> Callable[[], Tensor]:
        step = partial(_decode, self.model, self.cache, *inputs_2R, slots)
        if not self.capture:
            return step
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()  # libraries and compiled blocks set themselves up; a step done twice writes the same keys and values
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            logits_RV = step()
        return lambda: (graph.replay(), logits_RV)[1]


def _finish(rows: _Rows, live: list[bool], stop_ids: set[int], max_new_tokens: int) -> int:
    """Fill in the completions of the rows that ended; returns how many tokens they were short of the longest."""
    ended = [i for i, alive in enumerate(live) if not alive]
    nums = rows.num_R[ended].tolist()
    for i, num, ids, logps in zip(
        ended, nums, rows.ids_RT[ended].tolist(), rows.logp_RT[ended].tolist(), strict=True
    ):
        completion = rows.completions[i]
        completion.ids, completion.logps = ids[:num], logps[:num]
        completion.finished = completion.ids[-1] in stop_ids
    return sum(max_new_tokens - num for num in nums)


def _compact(cache: KVCache, live: list[bool]) -> list[int]:
    """Move the last live rows into the holes that finished rows left; returns the old index of every row that is left, in its new order."""
    order = [i for i, alive in enumerate(live) if alive]
    num_live = len(order)
    holes = [i for i in range(num_live) if not live[i]]
    movers = order[num_live - len(holes) :]
    if holes:
        cache.copy_rows(holes, cache, movers)
    kept = dict(zip(holes, movers, strict=True))
    return [kept.get(i, i) for i in range(num_live)]
