"""Faster parts, swapped in from outside by one call of swap_in. Without that call the program is
slower, and its results are equal up to rounding.

All of it is for CPUs: a setting of the C library's allocator; weights of a sampling copy in the
order that oneDNN's products need; training attention that computes a prompt once for its group.
oneDNN's operators are not public in PyTorch: requirements.txt pins its version.
"""

import ctypes
import functools
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import packing
import sampler
from model import KVCache, Linear, Transformer

PACKED_FROM = 2**16  # elements of a weight; with fewer, packing costs more than it saves
LONG = 1024  # response tokens from which on weights [N, K, G, H/K, W, U + W] take too much memory


def swap_in() -> None:
    keep_freed_memory()
    sampler.swap_layers = pack_layers
    sampler._decode = decode
    packing.Packed.attend = attend


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks. By default it returns large ones to the kernel, and every step
    faults them in again. The numbers are M_MMAP_MAX and M_TRIM_THRESHOLD of man 3 mallopt."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)
        libc.mallopt(-1, -1)


class PackedLinear(nn.Module):
    """A linear layer with its bfloat16 weight in oneDNN's order, without gradient."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 64)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.rloop.packed_linear(x, self.packed, self.bias)


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


# torch.compile accepts oneDNN's operator with constant weights only; ours, with any weights
if not hasattr(torch.ops.rloop, "packed_linear"):  # this file may be imported under two names
    operator = "rloop::packed_linear"
    torch.library.define(operator, "(Tensor x, Tensor packed, Tensor? bias) -> Tensor")
    torch.library.impl(operator, "CompositeExplicitAutograd", packed_linear)
    torch.library.register_fake(operator, lambda x, w, bias: x.new_empty(*x.shape[:-1], len(w)))


def pack_layers(copy: Transformer) -> None:
    """Replace the linear layers of a sampling copy, and its head, where packing pays."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return
    for module in list(copy.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, Linear) and can_pack(layer.weight):
                setattr(module, name, PackedLinear(layer.weight, layer.bias))
    if copy.lm_head is None and can_pack(copy.head_weight):  # a tied head
        copy.lm_head = PackedLinear(copy.head_weight, None)


def can_pack(weight: Tensor) -> bool:
    on_cpu = weight.device.type == "cpu"
    return on_cpu and weight.dtype == torch.bfloat16 and weight.numel() >= PACKED_FROM


decode_eagerly = sampler._decode


def decode(model: Transformer, cache: KVCache, rows: list, id_R: Tensor) -> Tensor:
    """sampler._decode; on a GPU the replay of a CUDA graph, one for each power of two of rows and
    of slots. Rows beyond the live ones compute what nobody reads."""
    if not id_R.is_cuda:
        return decode_eagerly(model, cache, rows, id_R)
    length_R = [row.prompt_length + len(row.completion.ids) for row in rows]
    num_rows = min(2 ** (len(rows) - 1).bit_length(), len(cache.v[0]))
    num_slots = min(2 ** (max(length_R) - 1).bit_length(), cache.v[0].shape[2])
    graphs = vars(cache).setdefault("graphs", {})
    graph, ids_R1, pos_R1, logits_RV = graphs.get((num_rows, num_slots), (None,) * 4)
    if graph is None:
        ids_R1, pos_R1 = id_R.new_zeros(2, num_rows, 1)
    ids_R1[: len(rows), 0] = id_R
    pos_R1[: len(rows), 0] = torch.tensor(length_R, device=id_R.device) - 1
    if graph is None:
        graph = torch.cuda.CUDAGraph()

        def step() -> Tensor:
            return model.logits(model.hidden(ids_R1, pos_R1, cache.at(pos_R1, num_slots))[:, 0])

        step()  # a graph must not be the first to use a kernel
        with torch.cuda.graph(graph):
            logits_RV = step()
        graphs[num_rows, num_slots] = graph, ids_R1, pos_R1, logits_RV
    graph.replay()
    return logits_RV[: len(rows)]


class Slots:
    """Where sequences of different lengths lie in a padded tensor [N, G, longest]."""

    def __init__(self, lengths: list[list[int]]):
        """lengths[n][g] of the sequences, in the order of their tokens."""
        G, longest = max(map(len, lengths)), max(map(max, lengths))
        length_NG = torch.tensor([row + [0] * (G - len(row)) for row in lengths])
        self.taken = torch.arange(longest) < length_NG[:, :, None]
        self.slot_of_token = self.taken.flatten().nonzero()[:, 0]
        num_tokens = len(self.slot_of_token)  # in token_of_slot: padding
        self.token_of_slot = torch.full((self.taken.numel(),), num_tokens)
        self.token_of_slot[self.slot_of_token] = torch.arange(num_tokens)

    def pad(self, x_M: Tensor) -> Tensor:
        x = Regroup.apply(x_M, self.token_of_slot, self.slot_of_token)
        return x.unflatten(0, self.taken.shape)

    def unpad(self, x: Tensor) -> Tensor:
        return Regroup.apply(x.flatten(0, 2), self.slot_of_token, self.token_of_slot)


class Regroup(torch.autograd.Function):
    """x[there]: rows of a tensor in other places. back[i] is the row of the result that takes row i
    of x, or the number of rows where none does; indexing would add gradients row by row."""

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


@functools.lru_cache(maxsize=1)
def layout(batch: packing.Packed) -> tuple[Slots, Slots, Tensor]:
    """The slots of a micro-batch's prompts and responses, and the bias [N, 1, 1, 1, W, U + W]: 0
    where a response's token sees a slot of [prompt, response], -inf where it does not."""
    prompts = Slots([[length] for length, _ in batch.group_sizes])
    responses = Slots([lengths for _, lengths in batch.group_sizes])
    (N, _, U), W = prompts.taken.shape, responses.taken.shape[2]
    future_WW = torch.ones(W, W, dtype=torch.bool).triu(1)
    hidden = [~prompts.taken.expand(N, W, U), future_WW.expand(N, W, W)]
    hidden_NWS = torch.cat(hidden, dim=-1)
    bias_NWS = torch.zeros(hidden_NWS.shape).masked_fill_(hidden_NWS, -torch.inf)
    return prompts, responses, bias_NWS[:, None, None, None]


attend_by_rows = packing.Packed.attend


def attend(
    batch: packing.Packed, layer: int, q_MHE: Tensor, k_MKE: Tensor, v_MKE: Tensor
) -> Tensor:
    """Packed.attend in two parts: prompts see themselves; each response sees its prompt, which is
    computed once for the group, and itself."""
    longest = max(length for _, lengths in batch.group_sizes for length in lengths)
    if q_MHE.is_cuda and q_MHE.dtype == torch.float32:  # its fast kernel wants as many kv heads
        repeats = q_MHE.shape[1] // k_MKE.shape[1]
        k_MKE, v_MKE = (x.repeat_interleave(repeats, dim=1) for x in (k_MKE, v_MKE))
    if longest > LONG or q_MHE.is_cuda:
        return attend_by_rows(batch, layer, q_MHE, k_MKE, v_MKE)
    prompts, responses, bias = layout(batch)
    (N, G, W), U = responses.taken.shape, prompts.taken.shape[2]
    (_, H, E), K = q_MHE.shape, k_MKE.shape[1]
    sizes = [len(prompts.slot_of_token), len(responses.slot_of_token)]
    parts = [x.split(sizes) for x in (q_MHE * E**-0.5, k_MKE, v_MKE)]
    q, k, v = (prompts.pad(x)[:, 0].transpose(1, 2) for x, _ in parts)
    y_NHUE = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=1.0)

    # [N, K, G, W * H/K, E]: the query heads of a kv head are the rows of one matrix product
    q, own_k, own_v = (
        responses.pad(x).view(N, G, W, K, -1, E).permute(0, 3, 1, 4, 2, 5).reshape(N, K, G, -1, E)
        for _, x in parts
    )
    k, v = (
        torch.cat([x[:, :, None].expand(N, K, G, U, E), own], dim=3)
        for x, own in ((k, own_k), (v, own_v))
    )
    score = (q @ k.transpose(-1, -2)).unflatten(-2, (-1, W)).add_(bias.to(q))
    y = score.softmax(dim=-1).flatten(3, 4) @ v
    y_NGWHE = y.view(N, K, G, H // K, W, E).permute(0, 2, 4, 1, 3, 5).reshape(N, G, W, H, E)
    y_prompts = prompts.unpad(y_NHUE.transpose(1, 2)[:, None])
    return torch.cat([y_prompts, responses.unpad(y_NGWHE)])
