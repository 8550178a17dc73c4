"""Training batches without padding, and the log-probs of their response tokens.

A micro-batch is one flat sequence of tokens: the prompts of its groups, then all responses. A
prompt is computed once for all responses to it, and no layer but attention needs to know which
token belongs to whom: positions restart behind the prompt for every response.

Shapes: M packed tokens, Q response tokens, B rows (responses), T tokens of the longest row.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model import Transformer
from scale import parallel

LOGITS_AT_ONCE = 2**25  # elements of a chunk of logits [Q, V]; bounds memory, not the result


@dataclass
class Row:
    """One response, as RL and RFT train on it."""

    prompt_ids: list[int]
    ids: list[int]  # response tokens, the stop token included
    sampler_logps: list[float] = field(default_factory=list)  # one a token, from sampling
    advantage: float = 0.0
    weight: float = 0.0  # of each of its tokens in the loss; 0 = the row does not count
    old_logps: list[float] = field(default_factory=list)  # the trainer's own; empty: the sampler's
    ref_logps: list[float] = field(default_factory=list)  # of the KL term's reference


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """A micro-batch. Values per response token come in the order of rows."""

    rows: list[Row]
    ids_M: Tensor
    pos_M: Tensor
    targets_Q: Tensor  # ids of the response tokens
    predictors_Q: Tensor  # index in ids_M of the token before each of them
    group_sizes: list[tuple[int, list[int]]]  # tokens of the prompt, and of each response
    row_tokens_BT: Tensor  # index in ids_M of each row's prompt and response; 0 behind its end
    home_M: Tensor  # where in the flattened row_tokens_BT a token is (a prompt: in its first row)

    def per_token(self, values_B: list[float]) -> Tensor:
        """One value a row, repeated for each of its tokens: [Q]."""
        lengths = torch.tensor([len(row.ids) for row in self.rows])
        return torch.tensor(values_B).repeat_interleave(lengths).to(self.ids_M.device)

    def concatenate(self, values: list[list[float]]) -> Tensor:
        """A list of values for each row, one a token, in one tensor [Q]."""
        return torch.tensor([x for row in values for x in row], device=self.ids_M.device)

    def attend(self, layer: int, q_MHE: Tensor, k_MKE: Tensor, v_MKE: Tensor) -> Tensor:
        """Attention (model.Attend), row by row: the prompt is repeated for each of its responses.

        scale/speed.py has a faster one for CPUs.
        """
        shape = (*self.row_tokens_BT.shape, -1, q_MHE.shape[-1])
        index = self.row_tokens_BT.flatten()
        q, k, v = (
            x.index_select(0, index).view(shape).transpose(1, 2) for x in (q_MHE, k_MKE, v_MKE)
        )
        y_BHTE = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y_BHTE.transpose(1, 2).flatten(0, 1).index_select(0, self.home_M)


def pack(groups: list[list[Row]], device: torch.device | str = "cpu") -> Packed:
    """One micro-batch of groups; the rows of a group share their prompt.

    Example: prompt [7, 8] with responses [1, 2] and [3], prompt [9] with response [4, 5] give

        ids_M          7 8 9 1 2 3 4 5        prompts, then responses
        pos_M          0 1 0 2 3 2 1 2
        targets_Q      1 2 3 4 5
        predictors_Q   1 3 1 2 6              8 predicts 1 and 3, 1 predicts 2, ...
        row_tokens_BT  [0 1 3 4] [0 1 5 0] [2 6 7 0]
        home_M         0 1 8 2 3 6 9 10       token 7 is the first of row 0, 9 the first of row 2
    """
    ids = [token for group in groups for token in group[0].prompt_ids]
    pos = [t for group in groups for t in range(len(group[0].prompt_ids))]
    rows = [row for group in groups for row in group]
    T = max(len(row.prompt_ids) + len(row.ids) for row in rows)
    home = [0] * len(ids)
    predictors, row_tokens, prompt_start = [], [], 0
    for group in groups:
        prompt = range(prompt_start, prompt_start + len(group[0].prompt_ids))
        for row in group:
            tokens = [*prompt, *range(len(ids), len(ids) + len(row.ids))]
            place = range(len(row_tokens) * T, len(row_tokens) * T + len(tokens))
            if row is group[0]:
                home[prompt.start : prompt.stop] = place[: len(prompt)]
            home += place[len(prompt) :]
            predictors += tokens[len(prompt) - 1 : -1]
            pos += range(len(prompt), len(tokens))
            ids += row.ids
            row_tokens.append(tokens + [0] * (T - len(tokens)))
        prompt_start = prompt.stop
    return Packed(
        rows=rows,
        ids_M=torch.tensor(ids, device=device),
        pos_M=torch.tensor(pos, device=device),
        targets_Q=torch.tensor(ids[prompt_start:], device=device),
        predictors_Q=torch.tensor(predictors, device=device),
        group_sizes=[(len(g[0].prompt_ids), [len(row.ids) for row in g]) for g in groups],
        row_tokens_BT=torch.tensor(row_tokens, device=device),
        home_M=torch.tensor(home, device=device),
    )


def deal(groups: list[list[Row]]) -> list[list[Row]]:
    """Deal an optimizer step out to the processes, in its order and by tokens (a collective): the
    groups, and parts of groups, that this one trains on. groups: all of the step; those that other
    processes have sampled are empty."""
    sizes = parallel.total({n: sum(len(row.ids) for row in g) for n, g in enumerate(groups)})
    num_tokens, num_ranks = sum(sizes.values()), parallel.num_ranks()
    parcels, group_start = [{} for _ in range(num_ranks)], 0
    for n, group in enumerate(groups):
        start, group_start = group_start, group_start + sizes[n]
        for row in group:
            parcels[start * num_ranks // num_tokens].setdefault(n, []).append(row)
            start += len(row.ids)
    return parallel.exchange([[*parcel.values()] for parcel in parcels])


def micro_batches(groups: list[list[Row]], max_tokens: int) -> Iterator[Packed]:
    """This process's groups in micro-batches of at most max_tokens tokens (or one row).

    A group that is too large is cut, its prompt repeated. The largest parts come first, so that
    memory runs out in the first step or never. Every micro-batch is a collective, so all processes
    get equally many: one with fewer also gets dummies of one row, whose weight is 0.
    """
    parts = [part for group in groups for part in _cut(group, max_tokens)]
    batches = _fill(sorted(parts, key=_num_tokens, reverse=True), max_tokens)
    dummy = Row([0], [0], sampler_logps=[0.0], ref_logps=[0.0])
    batches += [[[dummy]]] * (max(parallel.gather(lambda: len(batches))) - len(batches))
    for batch in batches:
        yield pack(batch, parallel.device())


def _num_tokens(rows: list[Row]) -> int:
    return len(rows[0].prompt_ids) + sum(len(row.ids) for row in rows)


def _cut(group: list[Row], limit: int) -> Iterator[list[Row]]:
    """Parts of a group of at most limit tokens (or one row)."""
    part: list[Row] = []
    for row in group:
        if part and _num_tokens(part) + len(row.ids) > limit:
            yield part
            part = []
        part.append(row)
    yield part


def _fill(parts: list[list[Row]], max_tokens: int) -> list[list[list[Row]]]:
    """The parts, in their order, in batches of at most max_tokens tokens (or one part)."""
    batches: list[list[list[Row]]] = []
    room = 0
    for part in parts:
        if _num_tokens(part) > room:
            batches.append([])
            room = max_tokens
        batches[-1].append(part)
        room -= _num_tokens(part)
    return batches


def token_logprobs(
    model: Transformer, batch: Packed, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probs [Q] of the response tokens, and the entropies [Q] (no gradient) of the
    distributions that they were drawn from: softmax of logits / temperature. nat, float32.

    The logits are computed in chunks of at most LOGITS_AT_ONCE elements. If there are several, the
    backward pass recomputes them, so that all logits are never in memory at once.

    Example: the batch of pack's example gives log p(1 | 7 8), log p(2 | 7 8 1), log p(3 | 7 8),
    log p(4 | 9), log p(5 | 9 4).
    """
    x_QD = model.hidden(batch.ids_M, batch.pos_M, batch.attend)
    x_QD = x_QD.index_select(0, batch.predictors_Q) / temperature
    num_chunks = math.ceil(len(x_QD) * len(model.head_weight) / LOGITS_AT_ONCE)
    chunks = zip(x_QD.chunk(num_chunks), batch.targets_Q.chunk(num_chunks), strict=True)
    if num_chunks == 1:
        results = [_head_logprobs(model, *chunk) for chunk in chunks]
    else:
        results = [checkpoint(_head_logprobs, model, *c, use_reentrant=False) for c in chunks]
    logps, entropies = zip(*results, strict=True)
    return torch.cat(logps), torch.cat(entropies)


def _head_logprobs(model: Transformer, x_QD: Tensor, targets_Q: Tensor) -> tuple[Tensor, Tensor]:
    logp_QV = model.logits(x_QD).log_softmax(dim=-1)
    detached_QV = logp_QV.detach()
    entropy_Q = -torch.linalg.vecdot(detached_QV.exp(), detached_QV)
    return logp_QV.gather(-1, targets_Q[:, None])[:, 0], entropy_Q
