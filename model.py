"""A decoder-only transformer of the Llama / Qwen2 / Qwen3 family, with a KV cache.

RMSNorm (Zhang & Sennrich 2019), RoPE (Su et al. 2021), grouped-query attention (Ainslie et al.
2023), SwiGLU (Shazeer 2020). Module names are Hugging Face's, so a state dict is a checkpoint;
hf.py reads and writes their directories.

Shapes: B rows, T tokens, V vocabulary, D width, H query heads, K kv heads, E head width, S cache
slots. rloop.py lists the letters of the whole project.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The architecture. hf_config is the config.json it was read from (hf.py), kept for saving."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict | None  # llama3 scaling (Llama 3.1), or None
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    hf_config: dict


class Linear(nn.Linear):
    """A linear layer that computes in its input's dtype; its weights may be float32 masters."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.RMSNorm):
    """A norm that computes in its input's dtype, as Linear."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def rope_frequencies(config: TransformerConfig, device: torch.device | str = "cpu") -> Tensor:
    """Angular frequencies [E/2], radians a position; llama3 scaling stretches the low ones."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    freq = 1.0 / config.rope_theta ** (exponent / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return freq
    turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    blend = ((turns - low) / (high - low)).clamp(0, 1)  # 0 = stretched, 1 = untouched
    return freq * (blend + (1 - blend) / scaling["factor"])


def rotate(x_HE: Tensor, cos_1E: Tensor, sin_1E: Tensor) -> Tensor:
    """RoPE of [..., T, H, E] by angles [..., T, 1, E], in Hugging Face's layout: the first half of
    a head holds the real parts, the second half the imaginary parts."""
    real, imaginary = x_HE.chunk(2, dim=-1)
    return x_HE * cos_1E + torch.cat((-imaginary, real), dim=-1) * sin_1E


# Attention is a function that the caller passes in: only the caller knows which tokens see which.
# Each layer calls it with the layer's number, rotated q [..., T, H, E] and k [..., T, K, E], and
# v [..., T, K, E]; it returns [..., T, H, E].
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def causal(layer: int, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor) -> Tensor:
    """Rows of tokens from position 0 on; each token sees itself and those to its left."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BTKE, v_BTKE))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def round_up(num_slots: int) -> int:
    """Rounded up to a multiple of 16 (SIMD width)."""
    return math.ceil(num_slots / 16) * 16


class KVCache:
    """Keys and values of rows. A token's slot is its position, so rows may differ in length.

    k[layer], v[layer]: [B, K, S, E]. Slots after a row's position hold finite leftovers, which
    the mask hides. The cache grows on demand.
    """

    def __init__(self, model: "Transformer", num_rows: int, num_slots: int):
        c = model.config
        shape = (num_rows, c.num_kv_heads, round_up(num_slots), c.head_dim)
        weight = model.model.embed_tokens.weight
        dtype = model.compute_dtype or weight.dtype
        self.k = [weight.new_zeros(shape, dtype=dtype) for _ in range(c.num_layers)]
        self.v = [weight.new_zeros(shape, dtype=dtype) for _ in range(c.num_layers)]

    def grow(self, num_slots: int) -> None:
        """Make room for num_slots slots a row, if there are fewer; keeps what is stored."""
        extra = round_up(num_slots) - self.v[0].shape[2]
        if extra > 0:
            for tensors in (self.k, self.v):
                for layer, tensor in enumerate(tensors):
                    tensors[layer] = F.pad(tensor, (0, 0, 0, extra))

    def at(self, pos_BT: Tensor, num_slots: int) -> Attend:
        """Attention for new tokens of the first B rows at positions pos_BT, all below num_slots.
        Their keys and values are stored; each token sees the slots of its row up to its own."""
        B, T = pos_BT.shape
        num_slots = round_up(num_slots)
        self.grow(num_slots)
        rows_B1 = torch.arange(B, device=pos_BT.device)[:, None]
        hidden_B1TS = torch.arange(num_slots, device=pos_BT.device) > pos_BT[:, None, :, None]
        bias_B1TS = torch.zeros(hidden_B1TS.shape, dtype=self.v[0].dtype, device=pos_BT.device)
        bias_B1TS.masked_fill_(hidden_B1TS, -torch.inf)

        def attend(layer: int, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor) -> Tensor:
            self.k[layer][rows_B1, :, pos_BT] = k_BTKE
            self.v[layer][rows_B1, :, pos_BT] = v_BTKE
            k, v = self.k[layer][:B, :, :num_slots], self.v[layer][:B, :, :num_slots]
            if T > 1:
                q = q_BTHE.transpose(1, 2)
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_B1TS, enable_gqa=True)
                return y.transpose(1, 2)
            # one token: the H/K query heads of a kv head are the rows of one matrix product
            q = q_BTHE.reshape(B, k.shape[1], -1, q_BTHE.shape[-1]) * q_BTHE.shape[-1] ** -0.5
            weight = (q @ k.transpose(-1, -2)).add_(bias_B1TS).softmax(dim=-1)
            return (weight @ v).view(q_BTHE.shape)

        return attend

    def copy_rows(self, target: list[int], source: "KVCache", source_rows: list[int]) -> None:
        """Copy whole rows from a cache (possibly this one) with no more slots than this one."""
        num_slots = source.v[0].shape[2]
        for layer in range(len(self.v)):
            self.k[layer][target, :, :num_slots] = source.k[layer][source_rows]
            self.v[layer][target, :, :num_slots] = source.v[layer][source_rows]


class Attention(nn.Module):
    def __init__(self, c: TransformerConfig):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = Linear(c.hidden_size, c.num_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.num_heads * c.head_dim, c.hidden_size, bias=c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x_D: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q [..., H, E] and k [..., K, E], and v [..., K, E]."""
        heads = (-1, self.head_dim)
        q_HE = self.q_norm(self.q_proj(x_D).unflatten(-1, heads))
        k_KE = self.k_norm(self.k_proj(x_D).unflatten(-1, heads))
        return rotate(q_HE, *rope), rotate(k_KE, *rope), self.v_proj(x_D).unflatten(-1, heads)


class MLP(nn.Module):
    def __init__(self, c: TransformerConfig):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x_D: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_D)) * self.up_proj(x_D))


class Block(nn.Module):
    """Attention and MLP. before and after are what compile_blocks compiles: everything but the
    attention between them, whose shapes change at every token."""

    def __init__(self, c: TransformerConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.mlp = MLP(c)
        self.checkpoint_activations = False  # keep only a block's input, recompute for the gradient

    def forward(self, x_D: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(self.run, x_D, rope, attend, use_reentrant=False)
        return self.run(x_D, rope, attend)

    def run(self, x_D: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        q_HE, k_KE, v_KE = self.before(x_D, rope)
        return self.after(x_D, attend(self.layer, q_HE, k_KE, v_KE))

    def before(self, x_D: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn(self.input_layernorm(x_D), rope)

    def after(self, x_D: Tensor, y_HE: Tensor) -> Tensor:
        x_D = x_D + self.self_attn.o_proj(y_HE.flatten(-2))
        return x_D + self.mlp(self.post_attention_layernorm(x_D))


class Transformer(nn.Module):
    """model(ids_BT) -> logits_BTV, float32: position t's logits predict the token at t + 1."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = c = config
        self.model = nn.Module()  # Hugging Face's name of everything but the head
        self.model.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.model.layers = nn.ModuleList(Block(c, layer) for layer in range(c.num_layers))
        self.model.norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.lm_head: Linear | None = None  # None: the embedding is the head, too
        if not c.tie_embeddings:
            self.lm_head = Linear(c.hidden_size, c.vocab_size, bias=False)
        self.compute_dtype: torch.dtype | None = None  # of the activations; None = the weights'
        self.source: Path | None = None  # the directory it came from, for save_pretrained
        self.unknown_ids: Tensor | None = None  # ids without a token, which a run never samples

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Full causal forward of right-padded ids. No mask is needed: padding is to the right."""
        return self.logits(self.hidden(ids_BT))

    def hidden(self, ids_T: Tensor, pos_T: Tensor | None = None, attend: Attend = causal) -> Tensor:
        """Last hidden states [..., T, D] of ids [..., T] at positions pos_T (None: 0, 1, 2 ...)."""
        if pos_T is None:
            pos_T = torch.arange(ids_T.shape[-1], device=ids_T.device)
        x_TD = self.model.embed_tokens(ids_T)
        x_TD = x_TD.to(self.compute_dtype or x_TD.dtype)
        freq = rope_frequencies(self.config, ids_T.device)
        angle_T1E = torch.cat([pos_T[..., None, None] * freq] * 2, dim=-1)
        rope = angle_T1E.cos().to(x_TD.dtype), angle_T1E.sin().to(x_TD.dtype)
        for block in self.model.layers:
            x_TD = block(x_TD, rope, attend)
        return self.model.norm(x_TD)

    def logits(self, x_D: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D], in float32. Those of unknown_ids are so low
        that their probability is 0, in sampling as in training."""
        if self.lm_head is not None:
            logits_V = self.lm_head(x_D).float()
        else:
            logits_V = F.linear(x_D, self.head_weight.to(x_D.dtype)).float()
        if self.unknown_ids is not None:  # detached: the gradient at probability 0 is 0 anyway
            logits_V.detach().index_fill_(-1, self.unknown_ids, torch.finfo(torch.float32).min)
        return logits_V

    @property
    def head_weight(self) -> Tensor:
        """[V, D]; the embedding's where they are tied."""
        return (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of its checkpoint, one by one; adapters are merged (scale/lora.py)."""
        yield from self.state_dict().items()

    def save_adapters(self, path: Path) -> None:
        """Nothing: without scale/lora.py there are none."""

    def compile_blocks(self) -> "Transformer":
        """torch.compile of the blocks without their attention; on a CPU it needs a C++ compiler.
        One compilation serves all blocks and all numbers of tokens."""
        torch._dynamo.config.recompile_limit = 32  # one token or more, with and without gradient
        for block in self.model.layers:
            block.before = torch.compile(block.before, dynamic=True)
            block.after = torch.compile(block.after, dynamic=True)
        return self

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu") -> "Transformer":
        """Load a Hugging Face directory; see hf.load_model."""
        import hf  # which imports this file

        return hf.load_model(path, dtype, device)

    def save_pretrained(self, path: str | Path) -> None:
        """Write a directory that transformers and vLLM load as it is; see hf.save_model."""
        import hf

        hf.save_model(self, path)
