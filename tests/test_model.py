"""model.py against transformers, and the cache against the full forward."""

import importlib.util
import json
import subprocess
import sys
import unittest.mock

import pytest
import torch
import transformers
from conftest import ROOT, TINY
from safetensors.torch import load_file, save_file

from model import COPIED_FILES, KVCache, Linear, Transformer, TransformerConfig
from packing import pack, token_logprobs
from sampler import sample

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
}  # fmt: skip
SIZES = dict(
    vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
    max_position_embeddings=128, rms_norm_eps=1e-5, initializer_range=0.2,
)  # fmt: skip
CASES = {
    "llama": (transformers.LlamaConfig, dict(tie_word_embeddings=False)),
    "llama-tied-bias": (
        transformers.LlamaConfig,
        dict(tie_word_embeddings=True, attention_bias=True),
    ),
    "llama3-rope": (
        transformers.LlamaConfig,
        dict(tie_word_embeddings=True, rope_parameters=LLAMA3),
    ),
    "qwen2": (transformers.Qwen2Config, dict(tie_word_embeddings=False)),
    "qwen2-tied": (transformers.Qwen2Config, dict(tie_word_embeddings=True)),
    "qwen3": (transformers.Qwen3Config, dict(tie_word_embeddings=True, head_dim=16)),
}


def hf_model(case: str, seed: int = 0):
    config_class, extra = CASES[case]
    torch.manual_seed(seed)
    model = (
        transformers.AutoModelForCausalLM.from_config(
            config_class(**SIZES, **extra), attn_implementation="eager"
        )
        .float()
        .eval()
    )
    for (
        name,
        weight,
    ) in model.named_parameters():  # biases and norms at their defaults would hide a missing one
        if weight.dim() == 1:
            torch.nn.init.normal_(weight, 1.0 if "norm" in name else 0.0, 0.2)
    return model


def assert_same_logits(ours, theirs, num_rows, num_tokens):
    ids = torch.randint(0, 97, (num_rows, num_tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, got = theirs(ids).logits, ours(ids)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, tmp_path):
    """Fault: a wrong RoPE layout or scaling, norm placement, kv-head order, bias, qk-norm or head tying."""
    theirs = hf_model(case)
    theirs.save_pretrained(tmp_path)
    ours = Transformer.from_pretrained(tmp_path)
    assert_same_logits(ours, theirs, 3, 40)


@pytest.mark.parametrize("case", CASES)
def test_saved_directory_loads_in_transformers(case, tmp_path):
    """Fault: a config or tensor name that transformers does not understand, or a tied head that comes back untied."""
    hf_model(case).save_pretrained(tmp_path / "theirs")
    ours = Transformer.from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        ours.model.norm.weight.mul_(1.5)
    ours.save_pretrained(tmp_path / "ours")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == ours.config.tie_embeddings
    ids = torch.randint(0, 97, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(again.float()(ids).logits, ours(ids), rtol=1e-4, atol=1e-3)


HUB = dict(
    vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
    max_position_embeddings=64, rms_norm_eps=1e-5, initializer_range=0.2, hidden_act="silu", rope_theta=500000.0, bos_token_id=1,
)  # fmt: skip
HUB_CONFIGS = {  # config.json as transformers 4 wrote the checkpoints on the hub
    "TinyLlama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_scaling": None, "attention_bias": False,
                  "pretraining_tp": 1, "torch_dtype": "float32", "tie_word_embeddings": False, "eos_token_id": 2},
    "Llama-3.2": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False, "head_dim": 8,
                  "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}, "tie_word_embeddings": True,
                  "eos_token_id": [3, 4, 5], "torch_dtype": "bfloat16"},
    "Qwen2.5": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False, "sliding_window": 8,
                "max_window_layers": 1, "tie_word_embeddings": True, "use_mrope": False, "eos_token_id": 3},
    "Qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16, "use_sliding_window": False,
              "sliding_window": None, "layer_types": ["full_attention", "full_attention"], "tie_word_embeddings": True},
}  # fmt: skip


def hub_model(name: str, **changes) -> Transformer:
    model = Transformer(TransformerConfig.from_hf(HUB | HUB_CONFIGS[name] | changes, "tests"))
    model.init_weights(seed=0)
    return model


@pytest.mark.parametrize("name", HUB_CONFIGS)
def test_config_of_the_hub_means_what_transformers_reads(name, tmp_path):
    """Fault: the RoPE base, scaling, head width or tying of a real config.json is read otherwise than transformers reads it."""
    ours = hub_model(name)
    ours.save_pretrained(tmp_path)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype="auto", output_loading_info=True
    )
    assert (
        theirs.dtype == torch.float32 and not info["missing_keys"] and not info["unexpected_keys"]
    )
    assert_same_logits(ours, theirs, 2, 50)


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_equal_transformers(case, tmp_path):
    """Fault: prefill, decoding by the cache, or positions differ from transformers' generate."""
    theirs = hf_model(case)
    theirs.save_pretrained(tmp_path)
    prompts = [[5, 6, 7], [9, 1, 4, 4, 80, 2, 33]]
    ours = Transformer.from_pretrained(tmp_path)
    got = sample(
        ours, prompts, num_samples=1, max_new_tokens=24, top_k=1, stop_ids=set(), seed=0, max_rows=2
    )
    greedy = transformers.GenerationConfig(do_sample=False, max_new_tokens=24, pad_token_id=0)
    for prompt, (completion,) in zip(prompts, got, strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            generation_config=greedy,
        )
        assert completion.ids == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("max_shard_bytes", [10**9, 40_000, 1])
def test_saved_shards_load_in_transformers(max_shard_bytes, tmp_path):
    """Fault: the index names a wrong file or size, or a tensor falls between two shards."""
    hf_model("qwen2").save_pretrained(tmp_path / "theirs")
    ours = Transformer.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours", max_shard_bytes=max_shard_bytes)
    files = sorted(file.name for file in (tmp_path / "ours").glob("*.safetensors*"))
    num_bytes = sum(weight.nbytes for weight in ours.parameters())
    if max_shard_bytes == 10**9:
        assert files == ["model.safetensors"]
    else:
        index = json.loads((tmp_path / "ours" / files.pop()).read_text())
        assert files == [
            f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
        ]
        assert index["metadata"]["total_size"] == num_bytes and list(index["weight_map"]) == list(
            ours.state_dict()
        )
        shards = [load_file(tmp_path / "ours" / file).values() for file in files]
        assert all(
            len(shard) == 1 or sum(weight.nbytes for weight in shard) <= max_shard_bytes
            for shard in shards
        )
        assert len(files) == (len(ours.state_dict()) if max_shard_bytes == 1 else 9)
    for again in (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours"),
        Transformer.from_pretrained(tmp_path / "ours"),
    ):
        assert again.state_dict().keys() == ours.state_dict().keys()
        assert all(
            torch.equal(weight, again.state_dict()[name])
            for name, weight in ours.state_dict().items()
        )


def test_saving_again_replaces_the_earlier_weights(tmp_path):
    """Fault: an index or a model.safetensors of an earlier save stays and is what a reader loads; or saving over the memory-mapped file
    that the weights came from destroys them."""
    model = hub_model("Qwen2.5")
    for max_shard_bytes in (10**9, 20_000, 40_000, 40_000, 10**9):
        with torch.no_grad():
            model.model.norm.weight.add_(1.0)
        model.save_pretrained(tmp_path, max_shard_bytes=max_shard_bytes)
        expected = {name: weight.clone() for name, weight in model.state_dict().items()}
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        model = Transformer.from_pretrained(
            tmp_path
        )  # the next save goes over the files that this one has mapped
        for name, weight in expected.items():
            assert torch.equal(model.state_dict()[name], weight) and torch.equal(
                theirs.state_dict()[name], weight
            ), name
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    "load", [Transformer.from_pretrained, lambda path: Transformer.from_config(path, seed=0)]
)
def test_tokenizer_files_go_along(load, tiny, tmp_path):
    """Fault: an exported policy has no tokenizer, chat template or generation config, so transformers and vLLM cannot serve it."""
    tiny.save_pretrained(tmp_path / "a")
    for name in COPIED_FILES:
        (tmp_path / "a" / name).write_text(name)
    load(tmp_path / "a").save_pretrained(tmp_path / "b")
    Transformer.from_pretrained(tmp_path / "b").save_pretrained(tmp_path / "b")
    assert {file.name for file in (tmp_path / "b").iterdir()} == {
        *COPIED_FILES,
        "config.json",
        "model.safetensors",
    }
    assert all((tmp_path / "b" / name).read_text() == name for name in COPIED_FILES)
    assert (
        len({file.stat().st_mode for file in (tmp_path / "b").iterdir()}) == 1
    )  # readable by the same people


@pytest.mark.parametrize("compiled", ["in place", "wrapper", "blocks"])
def test_compiled_model_saves_the_same_names(compiled, tmp_path):
    """Fault: torch.compile's _orig_mod. prefix gets into the checkpoint, which then loads nowhere."""
    model = hub_model("Llama-3.2")
    if compiled == "in place":
        model.compile()
    elif compiled == "wrapper":
        model = torch.compile(model)
    else:
        model.model.layers[0] = torch.compile(model.model.layers[0])
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert names == set(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    ) - {"lm_head.weight"}


@pytest.mark.parametrize("keys", [(), ("dtype",), ("torch_dtype",), ("dtype", "torch_dtype")])
def test_saved_dtype_is_the_weights(keys, tmp_path):
    """Fault: bfloat16 weights under a config that says float32, so that transformers and vLLM load them at twice the size."""
    hub_model("Qwen3", **dict.fromkeys(keys, "float32")).save_pretrained(tmp_path)
    half = Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert {key: config[key] for key in ("dtype", "torch_dtype") if key in config} == dict.fromkeys(
        keys or ("dtype",), "bfloat16"
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    assert all(
        torch.equal(weight, theirs.state_dict()[name]) for name, weight in half.state_dict().items()
    )
    ids = torch.randint(0, 97, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, exact, got = theirs(ids).logits.float(), theirs.float()(ids).logits, half(ids)
    assert (got - exact).norm() < 1.5 * (
        expected - exact
    ).norm()  # rounding as large as theirs, nothing more
    with torch.no_grad():
        again = Transformer.from_pretrained(tmp_path / "half")(ids)
    torch.testing.assert_close(again, exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


MEASURE = """
import json, sys
from model import Transformer

def kib(name):  # the peak is VmHWM: ru_maxrss starts at that of the parent process
    return int(open("/proc/self/status").read().split(name + ":")[1].split()[0])

Transformer.from_pretrained(sys.argv[2])  # what a first call imports and sets up is not counted
before = kib("RssAnon"), kib("VmHWM")
model = Transformer.from_pretrained(sys.argv[1])
print(json.dumps([kib("RssAnon") - before[0], kib("VmHWM") - before[1]]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("dtype", "anonymous", "peak"), [(torch.float32, 0.1, 0.1), (torch.bfloat16, 1.1, 1.7)]
)
def test_loading_makes_no_second_copy(dtype, anonymous, peak, tiny, tmp_path):
    """Fault: loading reads the file into memory, or holds the weights twice. In units of the float32 weights: those that need no
    conversion stay in the mapped file; of bfloat16 weights the result (1.0) and, at the peak, the mapped pages of the file (0.5) count."""
    model = hub_model("Qwen3", hidden_size=512, intermediate_size=2048, vocab_size=20000).to(dtype)
    model.save_pretrained(tmp_path / "big")
    tiny.save_pretrained(tmp_path / "small")
    weights_kib = sum(4 * weight.numel() for weight in model.parameters()) / 1024
    command = [sys.executable, "-c", MEASURE, tmp_path / "big", tmp_path / "small"]
    used = json.loads(
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    )
    assert used[0] < anonymous * weights_kib and used[1] < peak * weights_kib, (used, weights_kib)


def test_roundtrip_is_bitwise(tiny, tmp_path):
    """Fault: saving or loading rounds the weights."""
    tiny.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    for name, weight in tiny.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_sharded_checkpoint_loads(tmp_path):
    """Fault: only model.safetensors is looked for, so real checkpoints with an index fail."""
    theirs = hf_model("qwen2")
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            Transformer.from_pretrained(tmp_path)(ids), theirs(ids).logits, rtol=1e-4, atol=1e-3
        )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "missing"),
        ("extra", "unexpected tensor"),
        ("shape", "has shape"),
        ("int8", "is torch.int8"),
    ],
)
def test_damaged_checkpoint_names_the_tensor(tiny, tmp_path, damage, message):
    """Fault: a checkpoint that does not fit loads silently with random or dropped weights."""
    tiny.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "extra":
        name = "model.layers.1.mlp.extra.weight"
        tensors[name] = torch.zeros(2)
    elif damage == "int8":
        tensors[name] = tensors[name].to(torch.int8)
    else:
        tensors[name] = torch.zeros(3, 3)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        Transformer.from_pretrained(tmp_path)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type = 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear'"),
        (
            {"rope_scaling": {"type": "yarn"}, "rope_parameters": {"rope_type": "default"}},
            "rope_type = 'yarn'",
        ),  # the first wins
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_type = 'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'low_freq_factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
            "partial_rotary_factor = 0.25",
        ),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_unsupported_architecture_is_an_error(tmp_path, change, message):
    """Fault: a model that this file does not implement loads and computes something else."""
    (tmp_path / "config.json").write_text(json.dumps(TINY | change))
    with pytest.raises(ValueError, match=message):
        Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x00" * 5, b"\xff" * 200, b"cut"])
def test_broken_weight_file_is_named(content, tiny, tmp_path):
    """Fault: a cut or foreign file raises something that main does not catch, or that does not say which file."""
    tiny.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] if content == b"cut" else content)
    with pytest.raises(ValueError, match="model.safetensors: cannot be read"):
        Transformer.from_pretrained(tmp_path)


def test_missing_files_are_named(tiny, tmp_path):
    """Fault: an index without its shard, or a checkpoint that is only a pickle, loads or fails without a name; a pickle is opened."""
    with pytest.raises(ValueError, match="config.json: not found"):
        Transformer.from_pretrained(tmp_path)
    tiny.save_pretrained(tmp_path, max_shard_bytes=5_000)
    shard = sorted(tmp_path.glob("model-*"))[3]
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name}: not found"):
        Transformer.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="index.json: has no 'weight_map'"):
        Transformer.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="model.safetensors: not found"):
        Transformer.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch OPENED'\ntR.")
    with pytest.raises(ValueError, match="pytorch_model.bin: a pickle"):
        Transformer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        Transformer.from_pretrained(tmp_path)


def test_tied_head_in_the_file_must_be_the_embedding(tiny, tmp_path):
    """Fault: a fine-tuned head of its own is dropped because config.json says that it is tied; or a copy of the embedding is refused."""
    tiny.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    assert "lm_head.weight" not in Transformer.from_pretrained(tmp_path).state_dict()
    save_file(tensors | {"lm_head.weight": head + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="'lm_head.weight' differs"):
        Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # K lies differently in memory
def test_cached_decode_equals_full_forward(tiny, dtype):
    """Fault: the KV cache, its positions or its mask differ from the causal forward; rows of different lengths see each other's slots;
    what is stored is lost when the cache grows."""
    generator = torch.Generator().manual_seed(0)
    lengths, new, tiny = [3, 9, 1, 6], 40, tiny.to(dtype)
    ids = torch.randint(0, 61, (4, max(lengths) + new), generator=generator)
    cache = KVCache(tiny, 4, max(lengths))
    with torch.no_grad():
        full = tiny(ids)
        prefill = tiny.hidden(
            ids[:, : max(lengths)],
            torch.arange(max(lengths)).expand(4, -1),
            cache.at(torch.arange(max(lengths)).expand(4, -1), max(lengths)),
        )
        for b, length in enumerate(lengths):
            torch.testing.assert_close(
                tiny.logits(prefill[b, length - 1]), full[b, length - 1], rtol=1e-5, atol=1e-5
            )
        for t in range(
            new
        ):  # every row decodes at its own position, over the leftovers of the padded prefill
            pos = torch.tensor([[length + t] for length in lengths])
            got = tiny.logits(
                tiny.hidden(ids.gather(1, pos), pos, cache.at(pos, int(pos.max()) + 1))[:, 0]
            )
            torch.testing.assert_close(got, full[torch.arange(4), pos[:, 0]], rtol=1e-5, atol=1e-5)


def test_right_padding_does_not_reach_back(tiny):
    """Fault: padding changes the logits of real tokens."""
    ids = torch.randint(1, 61, (1, 8), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(tiny(padded)[:, :8], tiny(ids), rtol=1e-5, atol=1e-5)


def test_bfloat16_keeps_rope_angles_exact(tiny, tmp_path):
    """Fault: half-precision weights round the RoPE frequencies, which ruins long contexts."""
    tiny.save_pretrained(tmp_path)
    half = Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half(torch.zeros(1, 2, dtype=torch.long))
    tiny(torch.zeros(1, 2, dtype=torch.long))
    assert half._rope_freq.dtype == torch.float32 and torch.equal(half._rope_freq, tiny._rope_freq)
    assert half(torch.zeros(1, 2, dtype=torch.long)).dtype == torch.float32


def test_hf_config_is_kept_on_saving(tiny, tmp_path):
    """Fault: fields that this code does not read, such as eos_token_id, are lost on export."""
    tiny.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {k: v for k, v in saved.items() if k != "dtype"} == TINY
    assert TransformerConfig.from_hf(saved, "x").num_layers == 2


def dense_weights(copy: Transformer) -> dict[str, torch.Tensor]:
    """Of a sampling copy, of whose weights some are packed."""
    modules = {
        f"{name}.weight": module
        for name, module in copy.named_modules()
        if isinstance(module, Linear)
    }
    packed = {
        name: module.packed.to_dense()
        for name, module in modules.items()
        if module.packed is not None
    }
    can = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert (len(packed) == 7 * len(copy.model.layers)) == (copy.packed_head is not None) == can
    return dict(copy.named_parameters()) | packed


@pytest.mark.parametrize("onednn", [True, False])
def test_sampling_copy_follows_the_weights_in_the_same_memory(tiny, onednn, monkeypatch):
    """Fault: sampling goes on with the weights of an earlier step, or every step allocates a model; or weights that cannot be packed, as on
    a GPU, are not copied."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    monkeypatch.setattr("model.PACKED_FROM", 0)
    copy = tiny.copy_as(torch.bfloat16)
    places = [weight.data_ptr() for weight in copy.parameters() if not weight.is_meta]
    with torch.no_grad():
        for weight in tiny.parameters():
            weight.add_(1.0)
    again = tiny.copy_as(torch.bfloat16)
    assert [weight.data_ptr() for weight in again.parameters() if not weight.is_meta] == places
    got = dense_weights(again)
    for name, weight in tiny.named_parameters():
        assert torch.equal(got[name], weight.bfloat16()), name
    if again.packed_head is not None:
        assert torch.equal(again.packed_head.to_dense(), tiny.head_weight.bfloat16())
    assert set(tiny.state_dict()) == set(again.state_dict())


@pytest.mark.parametrize("case", CASES)
def test_packed_weights_give_the_same_logits(case, tmp_path, monkeypatch):
    """Fault: the sampling copy's products leave out a bias, or a width or a number of rows that is no multiple of oneDNN's blocks; or the
    copy rounds more than bfloat16 does. (The rows of a block's product: 15, and 3.)"""
    monkeypatch.setattr("model.PACKED_FROM", 0)
    hf_model(case).save_pretrained(tmp_path)
    exact, half = (
        Transformer.from_pretrained(tmp_path),
        Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16),
    )
    copy, ids = (
        exact.copy_as(torch.bfloat16),
        torch.randint(0, 97, (3, 5), generator=torch.Generator().manual_seed(0)),
    )
    dense_weights(copy)
    with torch.no_grad():
        expected, error = exact(ids), (half(ids) - exact(ids)).abs().max()
        one_by_one = KVCache(copy, 3, 5)
        pos = torch.arange(5).expand(3, 5)
        steps = [
            copy.logits(
                copy.hidden(
                    ids[:, t : t + 1], pos[:, t : t + 1], one_by_one.at(pos[:, t : t + 1], t + 1)
                )
            )
            for t in range(5)
        ]
        for got in (copy(ids), torch.cat(steps, dim=1)):
            assert (got - expected).abs().max() < 2 * error < 0.2 * expected.abs().max()


def test_second_import_under_another_name():
    """Fault: an operator is defined twice, which PyTorch refuses."""
    spec = importlib.util.spec_from_file_location("model_again", ROOT / "model.py")
    again = importlib.util.module_from_spec(spec)
    with unittest.mock.patch.dict(sys.modules, {"model_again": again}):
        spec.loader.exec_module(again)
    assert again.Transformer is not Transformer


def test_compiled_blocks_give_the_same_logprobs_gradients_and_samples(tiny, monkeypatch):
    """Fault: torch.compile changes what is computed, or compiles every block or every number of tokens anew."""
    monkeypatch.setattr("model.PACKED_FROM", 0)
    groups = [([3, 4, 5], [[6, 7, 8, 9], [10, 11]]), ([12], [[13, 14, 15], [16]])]
    sampling = {"num_samples": 3, "max_new_tokens": 6, "stop_ids": set(), "seed": 1, "max_rows": 4}
    ids_BT = torch.arange(60).view(3, 20)

    def results():
        tiny.zero_grad()
        logp, entropy = token_logprobs(tiny, pack(groups))
        logp.sum().backward()
        completions = sample(tiny, [[3, 4, 5], [6]], **sampling)
        return (
            logp.detach(),
            entropy,
            [w.grad.clone() for w in tiny.parameters()],
            [c.ids for group in completions for c in group],
        )

    @torch.no_grad()
    def bfloat16_error():
        return (tiny.copy_as(torch.bfloat16)(ids_BT) - tiny(ids_BT)).abs().max()

    logp, entropy, gradients, ids = results()
    names = set(tiny.state_dict())
    rounding = bfloat16_error()
    tiny._copies.clear()  # eager ones
    tiny.compile_blocks()
    compiled = results()
    torch.testing.assert_close(compiled[0], logp, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(compiled[1], entropy, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(compiled[2], gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    assert compiled[3] == ids
    assert set(tiny.state_dict()) == names
    assert bfloat16_error() < 2 * rounding
    with torch.no_grad():
        for weight in tiny.parameters():
            weight.mul_(1.1)
    assert bfloat16_error() < 4 * rounding  # packed weights are no constants of the compilation
    with torch._dynamo.config.patch(error_on_recompile=True):
        token_logprobs(tiny, pack([([3, 4], [[6, 7, 8, 9, 10, 11], [10, 11, 12]])]))[
            0
        ].sum().backward()
