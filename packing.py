"""Training batches without padding: a group's prompt once, then its responses, all in one flat sequence of tokens.

The prompt's tokens are computed once for all responses to it, and no layer but attention ever sees a padding token. Attention has two
parts: prompts see themselves; each response sees its prompt and itself. Positions restart behind the prompt for every response.

Shapes: N groups, G responses of a group, R response tokens (both up to the longest), P prompt tokens, M packed tokens, Q response tokens of
the batch, H query heads, K kv heads, E head width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

Group = tuple[list[int], list[list[int]]]  # ids of a prompt and of the responses to it
LONG = 1024  # response tokens from which on the weights of the attention, [H, G, R, P + R], would fill the memory


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
    def of(cls, lengths: list[list[int]], num_columns: int) -> "_Slots":
        """lengths[n][g] of sequences in the order of their tokens; every n gets num_columns of them."""
        longest = max(map(max, lengths))
        slot_of_token = [(n * num_columns + g) * longest + t for n, row in enumerate(lengths) for g, T in enumerate(row) for t in range(T)]
        slot_of_token = torch.tensor(slot_of_token)
        token_of_slot = torch.full((len(lengths) * num_columns * longest,), len(slot_of_token))
        token_of_slot[slot_of_token] = torch.arange(len(slot_of_token))
        return cls(shape=(len(lengths), num_columns, longest), token_of_slot=token_of_slot, slot_of_token=slot_of_token)

    def pad(self, x_M: Tensor) -> Tensor:
        return _Regroup.apply(x_M, self.token_of_slot, self.slot_of_token).unflatten(0, self.shape)

    def unpad(self, x: Tensor) -> Tensor:
        return _Regroup.apply(x.flatten(0, len(self.shape) - 1), self.slot_of_token, self.token_of_slot)


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
        for length in self.response_lengths:
            last = int(self.predictors_Q[start])  # of its prompt
            own = num_prompt_tokens + start
            rows.append([*range(last - int(self.pos_M[last]), last + 1), *range(own, own + length)])
            start += length
        T = max(map(len, rows))
        home = {token: b * T + t for b, row in reversed([*enumerate(rows)]) for t, token in enumerate(row)}
        rows_BT = torch.tensor([row + [0] * (T - len(row)) for row in rows])
        return rows_BT, torch.tensor([home[token] for token in range(len(self.ids_M))])

    @cached_property
    def bias(self) -> Tensor:
        """[N, 1, 1, 1, R, P + R]: 0 where a response's token sees a slot of [prompt, response], -inf where it does not."""
        (N, _, R), P = self.responses.shape, self.prompts.shape[2]
        padding_NP = (self.prompts.token_of_slot == len(self.prompts.slot_of_token)).view(N, P)
        future_RR = torch.ones(R, R, dtype=torch.bool).triu(1)
        hidden_NRS = torch.cat([padding_NP[:, None].expand(N, R, P), future_RR.expand(N, R, R)], dim=-1)
        return torch.zeros(hidden_NRS.shape).masked_fill_(hidden_NRS, -torch.inf)[:, None, None, None]

    def attend(self, layer: int, q_MHE: Tensor, k_MKE: Tensor, v_MKE: Tensor) -> Tensor:
        """Attention of the packed tokens; see model.Attend."""
        if self.responses.shape[2] > LONG or q_MHE.is_cuda:
            return self._attend_by_rows(q_MHE, k_MKE, v_MKE)
        (N, G, R), P, (_, H, E), K = self.responses.shape, self.prompts.shape[2], q_MHE.shape, k_MKE.shape[1]
        sizes = [len(self.prompts.slot_of_token), len(self.responses.slot_of_token)]
        parts = [x.split(sizes) for x in (q_MHE * E**-0.5, k_MKE, v_MKE)]
        q, k, v = (self.prompts.pad(x)[:, 0].transpose(1, 2) for x, _ in parts)
        y_NHPE = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=1.0)

        # [N, K, G, S, E], S = R tokens of H/K heads: the query heads of a kv head are rows of one product
        q, own_k, own_v = (
            self.responses.pad(x).view(N, G, R, K, -1, E).permute(0, 3, 1, 4, 2, 5).reshape(N, K, G, -1, E) for _, x in parts
        )
        k, v = (torch.cat([x[:, :, None].expand(N, K, G, P, E), own], dim=3) for x, own in ((k, own_k), (v, own_v)))
        score = (q @ k.transpose(-1, -2)).unflatten(-2, (-1, R)).add_(self.bias.to(q))
        y = score.softmax(dim=-1, dtype=torch.float32).to(v.dtype).flatten(3, 4) @ v
        y_NGRHE = y.view(N, K, G, H // K, R, E).permute(0, 2, 4, 1, 3, 5).reshape(N, G, R, H, E)
        return torch.cat([self.prompts.unpad(y_NHPE.transpose(1, 2)[:, None]), self.responses.unpad(y_NGRHE)])

    def _attend_by_rows(self, q_MHE: Tensor, k_MKE: Tensor, v_MKE: Tensor) -> Tensor:
        """The prompt repeated for every response, so that a kernel that never holds the weights can be used."""
        rows_BT, home_M = self.rows
        shape = (*rows_BT.shape, -1, q_MHE.shape[-1])
        q, k, v = (x.index_select(0, rows_BT.flatten()).view(shape).transpose(1, 2) for x in (q_MHE, k_MKE, v_MKE))
        y_BHTE = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y_BHTE.transpose(1, 2).flatten(0, 1).index_select(0, home_M)


def pack(groups: list[Group]) -> Packed:
    """One micro-batch of (prompt ids, [response ids, ...]) groups; prompts and responses hold at least one token."""
    lengths = [[len(response) for response in responses] for _, responses in groups]
    ids = [token for prompt, _ in groups for token in prompt] + [token for _, rs in groups for response in rs for token in response]
    pos = [t for prompt, _ in groups for t in range(len(prompt))]
    num_prompt_tokens, predictors, prompt_end = len(pos), [], 0
    for prompt, responses in groups:
        prompt_end += len(prompt)
        for response in responses:
            predictors += [prompt_end - 1, *range(len(pos), len(pos) + len(response) - 1)]
            pos += range(len(prompt), len(prompt) + len(response))
    return Packed(
        ids_M=torch.tensor(ids),
        pos_M=torch.tensor(pos),
        targets_Q=torch.tensor(ids[num_prompt_tokens:]),
        predictors_Q=torch.tensor(predictors),
        response_lengths=[T for row in lengths for T in row],
        prompts=_Slots.of([[len(prompt)] for prompt, _ in groups], 1),
        responses=_Slots.of(lengths, max(map(len, lengths))),
    )


def micro_batches(groups: list[Group], max_tokens: int) -> Iterator[tuple[Packed, list[int]]]:
    """The groups in packed micro-batches of at most max_tokens tokens (or one response), each with the numbers of its responses among all.

    A group that is too large is cut, its prompt repeated. The largest come first, so that memory runs out at the first step or never.
    """
    pieces: list[_Piece] = []
    row = 0
    for prompt, responses in groups:
        pieces.append(_Piece((prompt, []), [], len(prompt)))
        for response in responses:
            if pieces[-1].rows and pieces[-1].num_tokens + len(response) > max_tokens:
                pieces.append(_Piece((prompt, []), [], len(prompt)))
            piece = pieces[-1]
            piece.group[1].append(response)
            piece.rows.append(row)
            piece.num_tokens += len(response)
            row += 1
    batch: list[_Piece] = []
    for piece in sorted(pieces, key=lambda piece: -piece.num_tokens):
        if batch and sum(p.num_tokens for p in batch) + piece.num_tokens > max_tokens:
            yield pack([p.group for p in batch]), [row for p in batch for row in p.rows]
            batch = []
        batch.append(piece)
    yield pack([p.group for p in batch]), [row for p in batch for row in p.rows]


@dataclass
class _Piece:
    group: Group
    rows: list[int]
    num_tokens: int


# ---- log-probs


class _HeadLogprobs(torch.autograd.Function):
    """log softmax(x head^T)[target] and its entropy, in parts of CHUNK logits: nothing of size [tokens, vocabulary] is ever held, at the
    price of computing the logits a second time for the gradient."""

    CHUNK = 2**23

    @staticmethod
    def forward(ctx, x_QD: Tensor, head_VD: Tensor, targets_Q: Tensor) -> tuple[Tensor, Tensor]:
        head = head_VD.to(x_QD.dtype)
        logp_Q, entropy_Q = torch.empty(2, len(x_QD), device=x_QD.device)
        for part in _HeadLogprobs.parts(x_QD, head):
            logp_PV = (x_QD[part] @ head.T).log_softmax(dim=-1, dtype=torch.float32)
            logp_Q[part] = logp_PV.gather(-1, targets_Q[part, None])[:, 0]
            entropy_Q[part] = -torch.linalg.vecdot(logp_PV.exp(), logp_PV)
        ctx.save_for_backward(x_QD, head_VD, targets_Q)
        ctx.mark_non_differentiable(entropy_Q)
        return logp_Q, entropy_Q

    @staticmethod
    def backward(ctx, grad_Q: Tensor, _) -> tuple[Tensor, Tensor, None]:
        x_QD, head_VD, targets_Q = ctx.saved_tensors
        head, grad_x, grad_head = head_VD.to(x_QD.dtype), torch.empty_like(x_QD), torch.zeros_like(head_VD)
        for part in _HeadLogprobs.parts(x_QD, head):
            grad_PV = (x_QD[part] @ head.T).softmax(dim=-1, dtype=torch.float32)
            grad_PV[torch.arange(len(grad_PV)), targets_Q[part]] -= 1
            grad_PV = grad_PV.mul_(-grad_Q[part, None]).to(head.dtype)
            grad_x[part] = grad_PV @ head
            grad_head += grad_PV.T @ x_QD[part]
        return grad_x, grad_head, None

    @staticmethod
    def parts(x_QD: Tensor, head_VD: Tensor) -> list[slice]:
        rows = max(1, _HeadLogprobs.CHUNK // len(head_VD))
        return [slice(start, start + rows) for start in range(0, len(x_QD), rows)]


def token_logprobs(model, batch: Packed, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs [Q] of the response tokens and entropies [Q] (no gradient) of the distributions they came from, float32.

    The distribution is the sampler's: softmax of logits / temperature.
    """
    x_QD = model.hidden(batch.ids_M, batch.pos_M, batch.attend).index_select(0, batch.predictors_Q) / temperature
    return _HeadLogprobs.apply(x_QD, model.head_weight, batch.targets_Q)
