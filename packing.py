"""Training batches without padding: a group's prompt once, then its responses, all in one flat sequence of tokens.

The prompt's tokens are computed once for all responses to it, and no layer but attention ever sees a padding token. Attention has two
parts: prompts see themselves; each response sees its prompt and itself. Positions restart behind the prompt for every response.

Shapes: N groups, G responses of a group, R response tokens (both up to the longest), P prompt tokens, M packed tokens, Q response tokens of
the batch, H query heads, K kv heads, E head width.
"""

import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

Group = tuple[list[int], list[list[int]]]  # ids of a prompt and of the responses to it
LONG = 1024  # response tokens from which on the weights of the attention, [H, G, R, P + R], would fill the memory
LOGITS_AT_ONCE, LOGITS_KEPT = 2**24, 2**26  # whatever the number of tokens


class _Regroup(torch.autograd.Function):
    """x[there], rows of a tensor put elsewhere. back says for every row of x which row of the result its gradient comes from; one behind
    the last = none. (The gradient of plain indexing adds row by row, which is slow on a CPU.)"""

    @staticmethod
    def forward(ctx, x: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, there.clamp(max=len(x) - 1))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        if int(back.max()) == len(grad):
            grad = torch.cat([grad, torch.zeros_like(grad[:1])])
        return grad.index_select(0, back), None, None


@dataclass(frozen=True, kw_only=True)
class _Slots:
    """Where sequences of different lengths lie in a padded tensor [..., longest]."""

    shape: tuple[int, ...]
    token_of_slot: Tensor  # the number of tokens = padding
    slot_of_token: Tensor

    @classmethod
    def of(cls, lengths: list[list[int]], num_columns: int, device: torch.device | str) -> "_Slots":
        """lengths[n][g] of sequences in the order of their tokens; every n gets num_columns of them."""
        longest = max(map(max, lengths))
        slot_of_token = [
            (n * num_columns + g) * longest + t
            for n, row in enumerate(lengths)
            for g, T in enumerate(row)
            for t in range(T)
        ]
        slot_of_token = torch.tensor(slot_of_token)
        token_of_slot = torch.full((len(lengths) * num_columns * longest,), len(slot_of_token))
        token_of_slot[slot_of_token] = torch.arange(len(slot_of_token))
        shape = (len(lengths), num_columns, longest)
        return cls(
            shape=shape,
            token_of_slot=token_of_slot.to(device),
            slot_of_token=slot_of_token.to(device),
        )

    def pad(self, x_M: Tensor) -> Tensor:
        return _Regroup.apply(x_M, self.token_of_slot, self.slot_of_token).unflatten(0, self.shape)

    def unpad(self, x: Tensor) -> Tensor:
        return _Regroup.apply(
            x.flatten(0, len(self.shape) - 1), self.slot_of_token, self.token_of_slot
        )


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A micro-batch: the prompts of all groups, then all their responses. Per-token values of the responses come in this order too."""

    ids_M: Tensor
    pos_M: Tensor
    targets_Q: Tensor  # ids of the response tokens
    predictors_Q: Tensor  # index in ids_M of the token before each of them
    response_lengths: list[int]
    prompts: _Slots  # [N, 1, P]
    responses: _Slots  # [N, G, R]

    @cached_property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Index in ids_M of the tokens of every response's row [B, T], prompt and response, 0 behind its end; and where in it each token
        of ids_M is, a prompt's in the row of its first response."""
        rows, start, num_prompt_tokens = [], 0, len(self.prompts.slot_of_token)
        predictors, pos = self.predictors_Q.tolist(), self.pos_M.tolist()
        for length in self.response_lengths:
            last = predictors[start]  # of its prompt
            own = num_prompt_tokens + start
            rows.append([*range(last - pos[last], last + 1), *range(own, own + length)])
            start += length
        T = max(map(len, rows))
        home = {
            token: b * T + t
            for b, row in reversed([*enumerate(rows)])
            for t, token in enumerate(row)
        }
        rows_BT = torch.tensor([row + [0] * (T - len(row)) for row in rows])
        return rows_BT.to(self.ids_M.device), torch.tensor(
            [home[token] for token in range(len(self.ids_M))], device=self.ids_M.device
        )

    @cached_property
    def bias(self) -> Tensor:
        """[N, 1, 1, 1, R, P + R]: 0 where a response's token sees a slot of [prompt, response], -inf where it does not."""
        (N, _, R), P = self.responses.shape, self.prompts.shape[2]
        padding_NP = (self.prompts.token_of_slot == len(self.prompts.slot_of_token)).view(N, P)
        future_RR = torch.ones(R, R, dtype=torch.bool, device=padding_NP.device).triu(1)
        hidden_NRS = torch.cat(
            [padding_NP[:, None].expand(N, R, P), future_RR.expand(N, R, R)], dim=-1
        )
        bias_NRS = torch.zeros(hidden_NRS.shape, device=hidden_NRS.device).masked_fill_(
            hidden_NRS, -torch.inf
        )
        return bias_NRS[:, None, None, None]

    def attend(self, layer: int, q_MHE: Tensor, k_MKE: Tensor, v_MKE: Tensor) -> Tensor:
        """Attention of the packed tokens; see model.Attend."""
        if self.responses.shape[2] > LONG or q_MHE.is_cuda:
            return self._attend_by_rows(q_MHE, k_MKE, v_MKE)
        (N, G, R), P, (_, H, E), K = (
            self.responses.shape,
            self.prompts.shape[2],
            q_MHE.shape,
            k_MKE.shape[1],
        )
        sizes = [len(self.prompts.slot_of_token), len(self.responses.slot_of_token)]
        parts = [x.split(sizes) for x in (q_MHE * E**-0.5, k_MKE, v_MKE)]
        q, k, v = (self.prompts.pad(x)[:, 0].transpose(1, 2) for x, _ in parts)
        y_NHPE = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=1.0)

        # [N, K, G, S, E], S = R tokens of H/K heads: the query heads of a kv head are rows of one product
        q, own_k, own_v = (
            self.responses.pad(x)
            .view(N, G, R, K, -1, E)
            .permute(0, 3, 1, 4, 2, 5)
            .reshape(N, K, G, -1, E)
            for _, x in parts
        )
        k, v = (
            torch.cat([x[:, :, None].expand(N, K, G, P, E), own], dim=3)
            for x, own in ((k, own_k), (v, own_v))
        )
        score = (q @ k.transpose(-1, -2)).unflatten(-2, (-1, R)).add_(self.bias.to(q))
        y = score.softmax(dim=-1).flatten(3, 4) @ v
        y_NGRHE = y.view(N, K, G, H // K, R, E).permute(0, 2, 4, 1, 3, 5).reshape(N, G, R, H, E)
        return torch.cat(
            [self.prompts.unpad(y_NHPE.transpose(1, 2)[:, None]), self.responses.unpad(y_NGRHE)]
        )

    def _attend_by_rows(self, q_MHE: Tensor, k_MKE: Tensor, v_MKE: Tensor) -> Tensor:
        """The prompt repeated for every response, so that a kernel that never holds the weights can be used."""
        rows_BT, home_M = self.rows
        shape = (*rows_BT.shape, -1, q_MHE.shape[-1])
        q, k, v = (
            x.index_select(0, rows_BT.flatten()).view(shape).transpose(1, 2)
            for x in (q_MHE, k_MKE, v_MKE)
        )
        y_BHTE = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y_BHTE.transpose(1, 2).flatten(0, 1).index_select(0, home_M)


def pack(groups: list[Group], device: torch.device | str = "cpu") -> Packed:
    """One micro-batch of (prompt ids, [response ids, ...]) groups; prompts and responses hold at least one token."""
    lengths = [[len(response) for response in responses] for _, responses in groups]
    ids = [token for prompt, _ in groups for token in prompt] + [
        token for _, rs in groups for response in rs for token in response
    ]
    pos = [t for prompt, _ in groups for t in range(len(prompt))]
    num_prompt_tokens, predictors, prompt_end = len(pos), [], 0
    for prompt, responses in groups:
        prompt_end += len(prompt)
        for response in responses:
            predictors += [prompt_end - 1, *range(len(pos), len(pos) + len(response) - 1)]
            pos += range(len(prompt), len(prompt) + len(response))
    return Packed(
        ids_M=torch.tensor(ids, device=device),
        pos_M=torch.tensor(pos, device=device),
        targets_Q=torch.tensor(ids[num_prompt_tokens:], device=device),
        predictors_Q=torch.tensor(predictors, device=device),
        response_lengths=[T for row in lengths for T in row],
        prompts=_Slots.of([[len(prompt)] for prompt, _ in groups], 1, device),
        responses=_Slots.of(lengths, max(map(len, lengths)), device),
    )


@dataclass
class _Piece:
    """Responses to one prompt that stay together; rows are their numbers among all."""

    group: Group
    rows: list[int]
    num_tokens: int


def micro_batches(
    groups: list[Group],
    max_tokens: int,
    rank: int = 0,
    num_ranks: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Packed, list[int]]]:
    """The groups in packed micro-batches of at most max_tokens tokens (or one response), each with the numbers of its responses among all.

    A group that is too large is cut, its prompt repeated. The largest come first, so that memory runs out at the first step or never.
    Of num_ranks processes each gets a like number of tokens and THE SAME number of micro-batches, as every one of them is a collective
    operation: what one lacks is made up by micro-batches that count for nothing, with an empty list of numbers.
    """
    pieces = sorted(_cut(groups, max_tokens, num_ranks), key=lambda piece: -piece.num_tokens)
    shares, loads = [[] for _ in range(num_ranks)], [(0, r) for r in range(num_ranks)]
    for piece in pieces:
        load, least = heapq.heappop(loads)
        shares[least].append(piece)
        heapq.heappush(loads, (load + piece.num_tokens, least))
    batches = [_fill(share, max_tokens) for share in shares]
    for batch in batches[rank]:
        yield (
            pack([piece.group for piece in batch], device),
            [row for piece in batch for row in piece.rows],
        )
    for _ in range(max(map(len, batches)) - len(batches[rank])):
        yield pack([pieces[-1].group], device), []


def _cut(groups: list[Group], max_tokens: int, num_ranks: int) -> list[_Piece]:
    """Pieces of at most max_tokens tokens, and of a process's fair share of all tokens."""
    num_tokens = sum(len(prompt) + sum(map(len, responses)) for prompt, responses in groups)
    limit = min(max_tokens, math.ceil(num_tokens / num_ranks))
    pieces: list[_Piece] = []
    row = 0
    for prompt, responses in groups:
        pieces.append(_Piece((prompt, []), [], len(prompt)))
        for response in responses:
            if pieces[-1].rows and pieces[-1].num_tokens + len(response) > limit:
                pieces.append(_Piece((prompt, []), [], len(prompt)))
            piece = pieces[-1]
            piece.group[1].append(response)
            piece.rows.append(row)
            piece.num_tokens += len(response)
            row += 1
    return pieces


def _fill(pieces: list[_Piece], max_tokens: int) -> list[list[_Piece]]:
    batches: list[list[_Piece]] = []
    room = 0
    for piece in pieces:
        if piece.num_tokens > room:
            batches.append([])
            room = max_tokens
        batches[-1].append(piece)
        room -= piece.num_tokens
    return batches


# ---- log-probs


class _HeadLogprobs(torch.autograd.Function):
    """log softmax(x head^T)[target] and its entropy, in parts of at most LOGITS_AT_ONCE. For the gradient something of the size of the
    logits is kept for the first parts, LOGITS_KEPT numbers at most; the logits of the others are computed a second time."""

    @staticmethod
    def forward(ctx, x_QD: Tensor, head_VD: Tensor, targets_Q: Tensor) -> tuple[Tensor, Tensor]:
        head, kept = head_VD.to(x_QD.dtype), []
        logp_Q, entropy_Q = torch.empty(2, len(x_QD), device=x_QD.device)
        for part in _HeadLogprobs.parts(x_QD, head):
            logits_PV = x_QD[part] @ head.T
            logp_PV, prob_PV = (
                logits_PV.log_softmax(dim=-1, dtype=torch.float32),
                _softmax(logits_PV),
            )
            logp_Q[part] = logp_PV.gather(-1, targets_Q[part, None])[:, 0]
            entropy_Q[part] = -torch.linalg.vecdot(prob_PV, logp_PV)
            if ctx.needs_input_grad[0] and part.stop * len(head) <= LOGITS_KEPT:
                kept.append(_HeadLogprobs.slope(prob_PV, targets_Q[part], head.dtype))
            del logits_PV, logp_PV, prob_PV  # before the next part's are there
        ctx.save_for_backward(x_QD, head_VD, targets_Q, *kept)
        ctx.mark_non_differentiable(entropy_Q)
        return logp_Q, entropy_Q

    @staticmethod
    def backward(ctx, grad_Q: Tensor, _) -> tuple[Tensor, Tensor, None]:
        x_QD, head_VD, targets_Q, *kept = ctx.saved_tensors
        head, grad_x = head_VD.to(x_QD.dtype), torch.empty_like(x_QD)
        grad_head = torch.zeros(
            head.shape, device=head.device
        )  # float32, also of a bfloat16 head: it is a sum over many parts
        for i, part in enumerate(_HeadLogprobs.parts(x_QD, head)):
            slope_PV = (
                kept[i]
                if i < len(kept)
                else _HeadLogprobs.slope(_softmax(x_QD[part] @ head.T), targets_Q[part], head.dtype)
            )
            grad_PV = slope_PV * -grad_Q[part, None].to(head.dtype)
            grad_x[part] = grad_PV @ head
            for total, term in zip(
                grad_head.split(1024), (grad_PV.T @ x_QD[part]).split(1024), strict=True
            ):
                total += term  # 1024 words at once: what is added to float32 becomes float32 first
        return grad_x, grad_head.to(head_VD.dtype), None

    @staticmethod
    def slope(prob_PV: Tensor, targets_P: Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient of -logp by the logits. (The probabilities are lost.)"""
        prob_PV[torch.arange(len(prob_PV)), targets_P] -= 1
        return prob_PV.to(dtype)

    @staticmethod
    def parts(x_QD: Tensor, head_VD: Tensor) -> list[slice]:
        """Of equal sizes: a product with a few rows left over would be a slow one."""
        num_parts = min(len(x_QD), math.ceil(len(x_QD) * len(head_VD) / LOGITS_AT_ONCE))
        bounds = [len(x_QD) * i // num_parts for i in range(num_parts + 1)]
        return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


def _softmax(logits_PV: Tensor) -> Tensor:
    return logits_PV.softmax(dim=-1, dtype=torch.float32)


def token_logprobs(model, batch: Packed, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs [Q] of the response tokens and entropies [Q] (no gradient) of the distributions they came from, float32.

    The distribution is the sampler's: softmax of logits / temperature.
    """
    x_QD = (
        model.hidden(batch.ids_M, batch.pos_M, batch.attend).index_select(0, batch.predictors_Q)
        / temperature
    )
    return _HeadLogprobs.apply(x_QD, model.head_weight, batch.targets_Q)
