"""A decoder-only transformer of the Llama / Qwen2 / Qwen3 family, with a KV cache, in and out of Hugging Face directories.

RMSNorm (Zhang & Sennrich 2019), RoPE (Su et al. 2021), grouped-query attention (Ainslie et al. 2023), SwiGLU (Shazeer 2020).
Module names are Hugging Face's, so a state dict is a checkpoint.

Shapes: B rows, T tokens, V vocabulary, D width, F MLP width, H query heads, K kv heads, E head width, S cache slots, L layers.
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
PACKED_FROM = (
    2**16
)  # numbers of a weight; with fewer the call costs more than the order of the weight
COPIED_FILES = (  # besides weights and config, what transformers and vLLM want in a directory
    *(
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    ),
    *("chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model"),
)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The architecture, read from a Hugging Face config.json. hf_config is that file's content, written back on saving."""

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

    @classmethod
    def from_hf(cls, hf: dict, where: str) -> "TransformerConfig":
        """Raises ValueError for an architecture or an option that this file does not implement."""
        name = (hf.get("architectures") or ["?"])[0]
        if name not in ARCHITECTURES:
            raise ValueError(
                f"{where}: architecture {name!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
            )
        family = ARCHITECTURES[name]
        rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        for key, value, supported in (
            ("rope_type", rope_type, ("default", "llama3")),
            ("hidden_act", hf.get("hidden_act", "silu"), ("silu",)),
            (
                "partial_rotary_factor",
                rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0,
                (1.0,),
            ),
            ("use_sliding_window", hf.get("use_sliding_window") or False, (False,)),
            (
                "layer_types",
                sorted(set(hf.get("layer_types") or ["full_attention"])),
                (["full_attention"],),
            ),
            ("mlp_bias", hf.get("mlp_bias") or False, (False,)),
            ("quantization_config", hf.get("quantization_config"), (None,)),
        ):
            if value not in supported:
                raise ValueError(
                    f"{where}: {key} = {value!r} is not supported; supported: {', '.join(map(repr, supported))}"
                )
        try:
            num_heads = hf["num_attention_heads"]
            bias = hf.get("attention_bias") or False
            return cls(
                vocab_size=hf["vocab_size"],
                hidden_size=hf["hidden_size"],
                intermediate_size=hf["intermediate_size"],
                num_layers=hf["num_hidden_layers"],
                num_heads=num_heads,
                num_kv_heads=hf.get("num_key_value_heads") or num_heads,
                head_dim=hf.get("head_dim")
                or (128 if family == "qwen3" else hf["hidden_size"] // num_heads),
                norm_eps=hf.get("rms_norm_eps", 1e-6),
                rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0),
                rope_scaling={key: float(rope[key]) for key in LLAMA3_ROPE}
                if rope_type == "llama3"
                else None,
                tie_embeddings=hf.get("tie_word_embeddings") or False,
                qkv_bias=family == "qwen2" or bias,
                o_bias=family != "qwen2" and bias,
                qk_norm=family == "qwen3",
                hf_config=hf,
            )
        except KeyError as error:
            raise ValueError(f"{where}: has no {error.args[0]!r}") from None


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        dtype = (
            torch.get_autocast_dtype(x.device.type)
            if torch.is_autocast_enabled(x.device.type)
            else x.dtype
        )
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps).to(dtype)


def rope_frequencies(config: TransformerConfig) -> Tensor:
    """Angular frequencies [E/2], radians a position; llama3 scaling stretches the low ones (Llama 3.1)."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    freq = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None:
        return freq
    turns = (
        scaling["original_max_position_embeddings"] * freq / (2 * math.pi)
    )  # over the original context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    blend = ((turns - low) / (high - low)).clamp(0, 1)  # 0 = stretched, 1 = untouched
    return freq * (blend + (1 - blend) / scaling["factor"])


def rotate(x_HE: Tensor, cos_1E: Tensor, sin_1E: Tensor) -> Tensor:
    """RoPE of [..., T, H, E] by angles [..., T, 1, E], in Hugging Face's layout: the halves of a head are real and imaginary parts."""
    a, b = x_HE.chunk(2, dim=-1)
    return x_HE * cos_1E + torch.cat((-b, a), dim=-1) * sin_1E


# Which tokens see which. Every layer calls it with its number, rotated q [..., T, H, E] and k, and v [..., T, K, E]; it returns
# [..., T, H, E].
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def causal(layer: int, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor) -> Tensor:
    """Rows of tokens from position 0 on, each seeing itself and those to its left."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BTKE, v_BTKE))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def _round_up(num_slots: int) -> int:
    """To whole vectors of the processor: a product whose rows are not is several times as slow in bfloat16."""
    return math.ceil(num_slots / 16) * 16


class KVCache:
    """Keys and values of rows, the slot of a token being its position, so that a row may sit at any length.

    k[layer]: [rows, K, E, S]; v[layer]: [rows, K, S, E]. Slots behind a row's position hold finite leftovers, which the mask hides. There
    are as many slots as were needed yet: a product with a part of the slots would copy that part first, at every token.
    """

    def __init__(self, model: "Transformer", num_rows: int, num_slots: int):
        c = model.config
        self.weight, self.num_rows, self.num_kv_heads, self.head_dim = (
            model.model.embed_tokens.weight,
            num_rows,
            c.num_kv_heads,
            c.head_dim,
        )
        self.k, self.v = map(
            list,
            zip(*(self._zeros(_round_up(num_slots)) for _ in range(c.num_layers)), strict=True),
        )

    def _zeros(self, S: int) -> tuple[Tensor, Tensor]:
        """K and V of a layer. K lies in memory as [S, E], which is faster to write and to multiply with; in float32 as [E, S], since that
        order would round differently from the results in the README."""
        v = self.weight.new_zeros(self.num_rows, self.num_kv_heads, S, self.head_dim)
        k = (
            v.new_zeros(self.num_rows, self.num_kv_heads, self.head_dim, S)
            if v.dtype == torch.float32
            else v.clone().transpose(-1, -2)
        )
        return k, v

    def grow(self, num_slots: int) -> None:
        """To num_slots at least; what is stored stays."""
        old = self.v[0].shape[2]
        for layer in range(len(self.v) if num_slots > old else 0):
            k, v = self._zeros(_round_up(num_slots))
            k[..., :old], v[:, :, :old] = self.k[layer], self.v[layer]
            self.k[layer], self.v[layer] = k, v

    def at(self, pos_BT: Tensor, num_slots: int) -> Attend:
        """New tokens of the first B rows at positions pos_BT, all below num_slots: they are stored, and see the earlier slots of their
        row. (num_slots is the caller's to know: to ask a GPU for the largest position would be to wait for it.)"""
        (B, T), num_slots = pos_BT.shape, _round_up(num_slots)
        self.grow(num_slots)
        rows_B1 = torch.arange(B, device=pos_BT.device)[:, None]
        mask_B1TS = torch.arange(num_slots, device=pos_BT.device) <= pos_BT[:, None, :, None]
        bias_B1TS = torch.zeros(
            mask_B1TS.shape, dtype=self.v[0].dtype, device=pos_BT.device
        ).masked_fill_(~mask_B1TS, -torch.inf)

        def attend(layer: int, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor) -> Tensor:
            k, v = self.k[layer], self.v[layer]
            k[rows_B1, :, :, pos_BT] = k_BTKE
            v[rows_B1, :, pos_BT] = v_BTKE
            k, v = k[:B, :, :, :num_slots], v[:B, :, :num_slots]
            if T > 1:
                q, k = q_BTHE.transpose(1, 2), k.transpose(-1, -2)
                return F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask_B1TS, enable_gqa=True
                ).transpose(1, 2)
            # of one token: the query heads of a kv head as the rows of one product, several times as fast on a CPU
            q_BKHE = q_BTHE.reshape(B, k.shape[1], -1, q_BTHE.shape[-1]) * q_BTHE.shape[-1] ** -0.5
            weight = (q_BKHE @ k).add_(bias_B1TS).softmax(dim=-1)
            return (weight @ v).view(q_BTHE.shape)

        return attend

    def copy_rows(self, target: list[int], source: "KVCache", source_rows: list[int]) -> None:
        """Copy whole rows from a cache (possibly this one) with no more slots than this one."""
        num_slots = source.v[0].shape[2]
        for layer in range(len(self.v)):
            self.k[layer][target, :, :, :num_slots] = source.k[layer][source_rows]
            self.v[layer][target, :, :num_slots] = source.v[layer][source_rows]


def prepack(weight: Tensor) -> Tensor | None:
    """A bfloat16 weight on a CPU in the order that oneDNN's products need; None where oneDNN cannot, or it would not pay. Without, oneDNN
    brings it into that order at every product, which takes longer than the product itself when the rows are few."""
    if (
        weight.dtype != torch.bfloat16
        or weight.device.type != "cpu"
        or weight.numel() < PACKED_FROM
    ):
        return None
    can = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._reorder_linear_weight(weight, 64) if can else None


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


# an operator of ours, as compiled blocks take oneDNN's with constants only (and defined once, whatever imports this file a second time)
if not hasattr(torch.ops.rloop, "packed_linear"):
    torch.library.define(
        "rloop::packed_linear", "(Tensor x, Tensor packed, Tensor? bias) -> Tensor"
    )
    torch.library.impl("rloop::packed_linear", "CompositeExplicitAutograd", packed_linear)
    torch.library.register_fake(
        "rloop::packed_linear", lambda x, packed, bias: x.new_empty(*x.shape[:-1], len(packed))
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor | None) -> Tensor:
    return (
        F.linear(x, weight, bias)
        if packed is None
        else torch.ops.rloop.packed_linear(x, packed, bias)
    )


class Linear(nn.Linear):
    """A linear layer. In a copy for sampling it may have its weight packed, and nowhere else."""

    packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.packed)


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
        """Rotated q [..., H, E] and k [..., K, E], and v [..., K, E], in the dtype of the products (the rotation may be in float32)."""
        q_HE, k_KE, v_KE = (
            proj(x_D).unflatten(-1, (-1, self.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return (
            rotate(self.q_norm(q_HE), *rope).to(v_KE.dtype),
            rotate(self.k_norm(k_KE), *rope).to(v_KE.dtype),
            v_KE,
        )


class MLP(nn.Module):
    def __init__(self, c: TransformerConfig):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x_D: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_D)) * self.up_proj(x_D))


class Block(nn.Module):
    def __init__(self, c: TransformerConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.mlp = MLP(c)
        self.checkpoint_activations = (
            False  # keep only the block's input for the gradient, and run the block a second time
        )

    def forward(self, x_D: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(self.run, x_D, rope, attend, use_reentrant=False)
        return self.run(x_D, rope, attend)

    def run(self, x_D: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        q_HE, k_KE, v_KE = self.before(x_D, rope)
        return self.after(x_D, attend(self.layer, q_HE, k_KE, v_KE))

    # what compile_blocks compiles: all but attention, whose shapes change at every token

    def before(self, x_D: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn(self.input_layernorm(x_D), rope)

    def after(self, x_D: Tensor, y_HE: Tensor) -> Tensor:
        x_D = x_D + self.self_attn.o_proj(y_HE.flatten(-2))
        return x_D + self.mlp(self.post_attention_layernorm(x_D))


class Body(nn.Module):
    """What Hugging Face calls `model.`: everything but the head."""

    def __init__(self, c: TransformerConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, layer) for layer in range(c.num_layers))
        self.norm = RMSNorm(c.hidden_size, c.norm_eps)


class Transformer(nn.Module):
    """model(ids_BT) -> logits_BTV, float32: position t's logits are of the token at t + 1."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.model = Body(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # recomputed, never saved: half-precision weights must not round the angles
        self._rope_freq: Tensor | None = None
        self.source: Path | None = (
            None  # the directory that it came from: save_pretrained copies the tokenizer from there
        )
        self.compiled = False
        self.packed_head: Tensor | None = None
        self._copies: dict[
            torch.dtype, Transformer
        ] = {}  # no submodules: a copy is not part of the state dict

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Full causal forward of right-padded ids: padding cannot reach the tokens to its left, so no mask is needed."""
        return self.logits(self.hidden(ids_BT))

    def hidden(self, ids_T: Tensor, pos_T: Tensor | None = None, attend: Attend = causal) -> Tensor:
        """Last hidden states [..., T, D] of ids [..., T] at positions pos_T (0, 1, 2 .. if None); attend says which tokens see which."""
        if pos_T is None:
            pos_T = torch.arange(ids_T.shape[-1], device=ids_T.device)
        if self._rope_freq is None or self._rope_freq.device != ids_T.device:
            self._rope_freq = rope_frequencies(self.config).to(ids_T.device)
        x_TD = self.model.embed_tokens(ids_T)
        if torch.is_autocast_enabled(ids_T.device.type):
            x_TD = (
                x_TD.float()
            )  # the sum over the blocks is float32, also where FSDP hands out bfloat16 weights
        angle_T1E = torch.cat([pos_T[..., None, None] * self._rope_freq] * 2, dim=-1)
        rope = angle_T1E.cos().to(x_TD.dtype), angle_T1E.sin().to(x_TD.dtype)
        for block in self.model.layers:
            x_TD = block(x_TD, rope, attend)
        return self.model.norm(x_TD)

    def logits(self, x_D: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D], in float32."""
        return linear(x_D, self.head_weight, None, self.packed_head).float()

    @property
    def head_weight(self) -> Tensor:
        """[V, D]; the embedding's, if they are tied."""
        return (self.model.embed_tokens if self.config.tie_embeddings else self.lm_head).weight

    def copy_as(self, dtype: torch.dtype) -> "Transformer":
        """The model with its weights of now, whole and in a dtype, for sampling; itself when it is like that. The copy is filled anew by
        the next call, and free_copies gives its memory back meanwhile. (Of sharded weights every process gets a copy, one tensor after
        the other.) Where prepack can, the blocks' products have packed weights only, the head both."""
        state = self.state_dict()  # FSDP puts its shards in place for this
        if self.head_weight.dtype == dtype and not isinstance(self.head_weight, DTensor):
            return self
        if dtype not in self._copies:
            with torch.device("meta"):
                self._copies[dtype] = Transformer(self.config).to(dtype).requires_grad_(False)
            if self.compiled:
                self._copies[dtype].compile_blocks()
        copy = self._copies[dtype]
        for prefix, module in copy.named_modules():
            for name, mine in module.named_parameters(recurse=False):
                weight = whole_tensor(state[f"{prefix}.{name}"]).detach().to(dtype)
                if (
                    isinstance(module, Linear)
                    and name == "weight"
                    and (packed := prepack(weight)) is not None
                ):
                    module.packed = packed
                    continue
                if mine.is_meta:
                    mine = nn.Parameter(
                        torch.empty_like(mine, device=weight.device), requires_grad=False
                    )
                    setattr(module, name, mine)
                mine.copy_(weight)
        copy.packed_head = prepack(copy.head_weight)
        return copy

    def free_copies(self) -> None:
        """Give the memory of a sharded model's copies back until the next copy_as: training needs it. (A whole model's stay.)"""
        for copy in self._copies.values() if isinstance(self.head_weight, DTensor) else ():
            copy.to("meta").packed_head = None
            for module in copy.modules():
                if isinstance(module, Linear):
                    module.packed = None

    def compile_blocks(self) -> "Transformer":
        """Compile what a block does before and after attention (torch.compile; on a CPU it needs a C++ compiler). One compilation serves
        all blocks and all numbers of tokens; training and sampling have one each."""
        torch._dynamo.config.recompile_limit = (
            32  # one number of rows, one token, with and without gradient: 8 are too few
        )
        for block in self.model.layers:
            block.before = torch.compile(block.before, dynamic=True)
            block.after = torch.compile(block.after, dynamic=True)
        self.compiled = True
        return self

    def init_weights(self, seed: int) -> None:
        """Fresh weights: normal with config.json's initializer_range as std, residual outputs scaled by 1/sqrt(2L) (GPT-2)."""
        std = self.config.hf_config.get("initializer_range", 0.02)
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            with torch.no_grad():
                if weight.dim() == 1:
                    weight.fill_(1.0 if name.endswith("norm.weight") else 0.0)
                else:
                    residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                    weight.normal_(
                        0.0,
                        std / math.sqrt(2 * self.config.num_layers) if residual else std,
                        generator=generator,
                    )

    @classmethod
    def from_config(cls, path: str | Path, seed: int) -> "Transformer":
        """A randomly initialised float32 model with the architecture of a Hugging Face directory."""
        path = Path(path)
        model = cls(_read_config(path))
        model.init_weights(seed)
        model.source = path
        return model

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = torch.float32,
        device: str | torch.device = "cpu",
    ) -> "Transformer":
        """Load a Hugging Face directory (one safetensors file, or shards with their index). dtype None: as they are in the file.

        Weights of the same dtype stay memory-mapped, a page being copied when it is written; others are converted one at a time.
        Raises ValueError that names the file and the tensor: unsupported architecture, missing, unexpected or misshapen tensors, a broken
        or missing file.
        """
        path = Path(path)
        with torch.device("meta"):
            model = cls(_read_config(path))
        parameters, head, embedding = (
            dict(model.named_parameters()),
            "lm_head.weight",
            "model.embed_tokens.weight",
        )
        wanted = {
            head: parameters[embedding]
        } | parameters  # a tied head may be in the file all the same
        state = {}
        for file in _weight_files(path):
            with _open_weights(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (a safe_open is no dictionary)
                    if name.endswith("rotary_emb.inv_freq"):
                        continue
                    if name not in wanted:
                        raise ValueError(
                            f"{file}: unexpected tensor {name!r} for {type(model).__name__} of {path / 'config.json'}"
                        )
                    tensor = tensors.get_tensor(name)
                    if tensor.shape != wanted[name].shape:
                        raise ValueError(
                            f"{file}: tensor {name!r} has shape {tuple(tensor.shape)}, expected {tuple(wanted[name].shape)}"
                        )
                    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                        raise ValueError(
                            f"{file}: tensor {name!r} is {tensor.dtype}, expected float32, bfloat16 or float16"
                        )
                    state[name] = tensor.to(device=device, dtype=dtype)
        missing = [name for name in parameters if name not in state]
        if missing:
            raise ValueError(f"{path}: {len(missing)} tensors are missing, first {missing[0]!r}")
        if (
            head in state
            and head not in parameters
            and not torch.equal(state.pop(head), state[embedding])
        ):
            raise ValueError(
                f"{path}: {head!r} differs from {embedding!r}, but config.json says tie_word_embeddings = true"
            )
        model.load_state_dict(state, assign=True)
        model.source = path
        return model.requires_grad_(True)

    def save_pretrained(
        self,
        path: str | Path,
        max_shard_bytes: int = 5 * 10**9,
        state: dict[str, Tensor] | None = None,
    ) -> None:
        """Write a directory that transformers and vLLM load as it is, with the tokenizer of the directory that the model came from.

        state: the weights to write instead of the model's own, when these are in shards (parallel.full_state). More than
        max_shard_bytes of weights become shards with an index, as transformers writes them. Every file is written beside its place and
        then renamed; the weight files of an earlier save under other names are removed last.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        state = self.state_dict() if state is None else state
        state = {
            name.replace("_orig_mod.", ""): tensor.detach() for name, tensor in state.items()
        }  # torch.compile's prefix
        written = _write_weights(path, state, max_shard_bytes)
        for name in COPIED_FILES:
            if self.source is not None and (self.source / name).exists():
                shutil.copyfile(self.source / name, path / f"{name}.tmp")
                written.append(name)
        dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
        keys = {"dtype", "torch_dtype"} & self.config.hf_config.keys() or {
            "dtype"
        }  # transformers 4 wrote torch_dtype, 5 reads both
        _write_json(path / "config.json.tmp", self.config.hf_config | dict.fromkeys(keys, dtype))
        for name in [*written, "config.json"]:
            shutil.copymode(
                path / "config.json.tmp", path / f"{name}.tmp"
            )  # safetensors' files are for their writer alone
            os.replace(path / f"{name}.tmp", path / name)
        for pattern in (
            "model.safetensors.index.json",
            "model.safetensors",
            "model-*-of-*.safetensors",
        ):
            for file in path.glob(pattern):
                if file.name not in written:
                    file.unlink()


def whole_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, by all processes at once; a plain one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _write_weights(path: Path, state: dict[str, Tensor], max_bytes: int) -> list[str]:
    """Write NAME.tmp for every weight file, one shard at a time in memory, and for the index; returns the names."""
    shards, size = [[]], 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    written, weight_map = [], {}
    for number, names in enumerate(shards, start=1):
        file = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        save_file(
            {name: state[name].contiguous().cpu() for name in names},
            path / f"{file}.tmp",
            metadata={"format": "pt"},
        )
        written.append(file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total_size = sum(tensor.nbytes for tensor in state.values())
        written.append("model.safetensors.index.json")
        _write_json(
            path / f"{written[-1]}.tmp",
            {"metadata": {"total_size": total_size}, "weight_map": weight_map},
        )
    return written


def _read_config(path: Path) -> TransformerConfig:
    file = path / "config.json"
    if not file.exists():
        raise ValueError(f"{file}: not found; expected a Hugging Face model directory")
    return TransformerConfig.from_hf(_read_json(file), str(file))


def _read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from None


def _write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if not index.exists():
        file, unsafe = (
            path / "model.safetensors",
            sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]),
        )
        if unsafe and not file.exists():
            raise ValueError(
                f"{unsafe[0]}: a pickle can run a stranger's code and is not loaded; convert the checkpoint to safetensors"
            )
        return [file]
    weight_map = _read_json(index).get("weight_map")
    if not weight_map:
        raise ValueError(f"{index}: has no 'weight_map'")
    return [path / name for name in sorted(set(weight_map.values()))]


def _open_weights(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise ValueError(f"{file}: not found; expected the weights as safetensors") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: cannot be read as safetensors: {error}") from None
