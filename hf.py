"""Hugging Face model directories, in and out: config.json and weights as safetensors.

Only safetensors and JSON are read: a pickle can run a stranger's code.
"""

import math
import os
import shutil
import textwrap
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from config import UserError, read_json, write_json
from model import Transformer, TransformerConfig

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
COPIED_FILES = (  # besides config and weights, what transformers and vLLM read
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "tokenizer.model"),
)
WEIGHT_FILES = ("model.safetensors.index.json", "model.safetensors", "model-*-of-*.safetensors")
HEAD = "lm_head.weight"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of weights


def load_model(
    path: str | Path, dtype: torch.dtype | None = torch.float32, device: str | torch.device = "cpu"
) -> Transformer:
    """The model of a Hugging Face directory (one safetensors file, or shards with their index).

    dtype None: as in the file. Weights that keep their dtype stay memory-mapped; a page is copied
    when it is written. Raises UserError naming the place and the first tensors: unsupported
    architecture; missing, unexpected or misshapen tensors; a missing or broken file.
    """
    path = Path(path)
    with torch.device("meta"):
        model = Transformer(read_config(path))
    weight_map = read_json(path / "model.safetensors.index.json").get("weight_map")
    names, state = set(weight_map.values()) if weight_map else {"model.safetensors"}, {}
    for file in [path / name for name in sorted(names)]:
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: cannot be read as safetensors: {error}") from None
        for name, tensor in tensors.items():
            if tensor.dtype not in DTYPES:
                raise UserError(f"{file}: tensor {name!r} is {tensor.dtype}, expected {DTYPES}")
            if not name.endswith("rotary_emb.inv_freq"):
                state[name] = tensor.to(device=device, dtype=dtype)
    # a tied head may be in the file all the same
    tied_head = state.pop(HEAD, None) if model.config.tie_embeddings else None
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:  # names what is missing, unexpected or misshapen
        raise UserError(f"{path}: {textwrap.shorten(str(error), 500)}") from None
    if tied_head is not None and not torch.equal(tied_head, model.model.embed_tokens.weight):
        raise UserError(f"{path}: {HEAD!r} differs from the embedding, but the two are tied")
    model.source = path
    return model.requires_grad_(True)


def random_model(path: str | Path, seed: int) -> Transformer:
    """A float32 model of the directory's architecture with seeded random weights: normal with
    config.json's initializer_range as std; the layers that write to the residual stream are scaled
    by 1/sqrt(2 * num_layers) (GPT-2)."""
    model, generator = Transformer(read_config(Path(path))), torch.Generator().manual_seed(seed)
    model.source, c = Path(path), model.config
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            nn.init.constant_(weight, 1.0 if name.endswith("norm.weight") else 0.0)
        else:
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = math.sqrt(2 * c.num_layers) if writes else 1.0
            std = c.hf_config.get("initializer_range", 0.02) / scale
            nn.init.normal_(weight, std=std, generator=generator)
    return model


def save_model(
    model: Transformer,
    path: str | Path,
    state: dict[str, Tensor] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a directory that transformers and vLLM load as it is, with the tokenizer of the
    directory that the model came from.

    state: the weights, where the model's own are sharded (parallel.full_state). More than
    max_shard_bytes become several files with an index. Every file is written elsewhere and moved,
    config.json last; then weight files of an earlier save under other names are removed.
    """
    path, temporary = Path(path), Path(path) / "saving.tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    state = dict(model.weights()) if state is None else state
    save_torch_state_dict(state, temporary, max_shard_size=max_shard_bytes)
    for name in COPIED_FILES:
        if model.source is not None and (model.source / name).exists():
            shutil.copyfile(model.source / name, temporary / name)
    written = [file.name for file in temporary.iterdir()]
    for name in written:
        os.replace(temporary / name, path / name)
    temporary.rmdir()
    hf_config = model.config.hf_config
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    # transformers 4 wrote torch_dtype, 5 writes dtype
    keys = {"dtype", "torch_dtype"} & hf_config.keys() or {"dtype"}
    write_json(path / "config.json", hf_config | dict.fromkeys(keys, dtype))
    for file in [file for pattern in WEIGHT_FILES for file in path.glob(pattern)]:
        if file.name in written:  # by safetensors, for their owner alone
            shutil.copymode(path / "config.json", file)
        else:
            file.unlink()


def read_config(path: Path) -> TransformerConfig:
    """config.json of a directory. Raises UserError for what model.py does not implement."""
    file = path / "config.json"
    if not file.exists():
        raise UserError(f"{file}: not found; expected a Hugging Face model directory")
    hf = read_json(file)
    name = (hf.get("architectures") or ["?"])[0]
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"{file}: architecture {name!r} is not supported; supported: {known}")
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
    layer_types = sorted(set(hf.get("layer_types") or ["full_attention"]))
    for key, value, supported in (
        ("rope_type", rope_type, ("default", "llama3")),
        ("hidden_act", hf.get("hidden_act", "silu"), ("silu",)),
        ("partial_rotary_factor", partial, (1.0,)),
        ("use_sliding_window", hf.get("use_sliding_window") or False, (False,)),
        ("layer_types", layer_types, (["full_attention"],)),
        ("mlp_bias", hf.get("mlp_bias") or False, (False,)),
        ("quantization_config", hf.get("quantization_config"), (None,)),
    ):
        if value not in supported:
            known = ", ".join(map(repr, supported))
            raise UserError(f"{file}: {key} = {value!r} is not supported; supported: {known}")
    bias = hf.get("attention_bias") or False
    qwen2, qwen3 = name == "Qwen2ForCausalLM", name == "Qwen3ForCausalLM"
    try:
        scaling = {key: float(rope[key]) for key in LLAMA3_ROPE} if rope_type == "llama3" else None
        num_heads, width = hf["num_attention_heads"], hf["hidden_size"]
        return TransformerConfig(
            vocab_size=hf["vocab_size"],
            hidden_size=width,
            intermediate_size=hf["intermediate_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=hf.get("num_key_value_heads") or num_heads,
            head_dim=hf.get("head_dim") or (128 if qwen3 else width // num_heads),
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0),
            rope_scaling=scaling,
            tie_embeddings=hf.get("tie_word_embeddings") or False,
            qkv_bias=qwen2 or bias,
            o_bias=bias and not qwen2,
            qk_norm=qwen3,
            hf_config=hf,
        )
    except KeyError as error:
        raise UserError(f"{file}: has no {error.args[0]!r}") from None
