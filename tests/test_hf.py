"""hf.py: directories that transformers reads as we do, and errors that name file and tensor."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import CASES, LLAMA3, ROOT, SIZES, TINY, assert_same_logits, hf_model, random_model
from safetensors.torch import load_file, save_file

from config import UserError
from hf import COPIED_FILES, load_model, read_config, save_model
from hf import random_model as random_model_of
from model import Transformer

HUB = SIZES | {
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rope_theta": 500000.0,
    "bos_token_id": 1,
}
HUB_CONFIGS = {  # config.json as transformers 4 wrote the checkpoints on the hub
    "TinyLlama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rope_scaling": None,
        "attention_bias": False,
        "pretraining_tp": 1,
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    },
    "Llama-3.2": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "mlp_bias": False,
        "head_dim": 8,
        "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"},
        "tie_word_embeddings": True,
        "eos_token_id": [3, 4, 5],
        "torch_dtype": "bfloat16",
    },
    "Qwen2.5": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": False,
        "sliding_window": 8,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
        "use_mrope": False,
        "eos_token_id": 3,
    },
    "Qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 16,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": ["full_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
}


def hub_model(name: str, **changes) -> Transformer:
    return random_model(HUB | HUB_CONFIGS[name] | changes, seed=0)


def assert_same_weights(a, b) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, weight in a.state_dict().items():
        assert torch.equal(weight, b.state_dict()[name]), name


@pytest.mark.parametrize("case", CASES)
def test_saved_directory_loads_in_transformers(case, tmp_path):
    """Fault: a config or tensor name that transformers does not understand, or a tied head that
    comes back untied."""
    hf_model(case).save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    with torch.no_grad():
        ours.model.norm.weight.mul_(1.5)
    save_model(ours, tmp_path / "ours")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tied = again.lm_head.weight is again.model.embed_tokens.weight
    assert tied == ours.config.tie_embeddings
    ids = torch.randint(0, 97, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = again.float()(ids).logits
        torch.testing.assert_close(expected, ours(ids), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", HUB_CONFIGS)
def test_config_of_the_hub_means_what_transformers_reads(name, tmp_path):
    """Fault: the RoPE base, scaling, head width or tying of a real config.json is read otherwise
    than transformers reads it."""
    ours = hub_model(name)
    ours.save_pretrained(tmp_path)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype="auto", output_loading_info=True
    )
    assert theirs.dtype == torch.float32
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_logits(ours, theirs, 2, 50)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 40_000, 1])
def test_saved_shards_load_in_transformers(max_shard_bytes, tmp_path):
    """Fault: the index names a wrong file or size, or a tensor falls between two shards."""
    hf_model("qwen2").save_pretrained(tmp_path / "theirs")
    ours, path = load_model(tmp_path / "theirs"), tmp_path / "ours"
    save_model(ours, path, max_shard_bytes=max_shard_bytes)
    files = sorted(file.name for file in path.glob("*.safetensors*"))
    if max_shard_bytes == 10**9:
        assert files == ["model.safetensors"]
    else:
        index, count = json.loads((path / files.pop()).read_text()), len(files)
        assert files == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        num_bytes = sum(weight.nbytes for weight in ours.parameters())
        assert index["metadata"]["total_size"] == num_bytes
        assert list(index["weight_map"]) == list(ours.state_dict())
        shards = [list(load_file(path / file).values()) for file in files]
        for shard in shards:
            assert len(shard) == 1 or sum(weight.nbytes for weight in shard) <= max_shard_bytes
        assert count == (len(ours.state_dict()) if max_shard_bytes == 1 else 9)
    assert_same_weights(ours, transformers.AutoModelForCausalLM.from_pretrained(path))
    assert_same_weights(ours, load_model(path))


def test_saving_again_replaces_the_earlier_weights(tmp_path):
    """Fault: an index or a model.safetensors of an earlier save stays and is what a reader loads;
    or saving over the memory-mapped file that the weights came from destroys them."""
    model = hub_model("Qwen2.5")
    for max_shard_bytes in (10**9, 20_000, 40_000, 40_000, 10**9):
        with torch.no_grad():
            model.model.norm.weight.add_(1.0)
        save_model(model, tmp_path, max_shard_bytes=max_shard_bytes)
        expected = {name: weight.clone() for name, weight in model.state_dict().items()}
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
        model = load_model(tmp_path)  # the next save overwrites the files that this one has mapped
        for name, weight in expected.items():
            assert torch.equal(model.state_dict()[name], weight), name
            assert torch.equal(theirs[name], weight), name
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("load", [load_model, lambda path: random_model_of(path, seed=0)])
def test_tokenizer_files_go_along(load, tiny, tmp_path):
    """Fault: an exported policy has no tokenizer, chat template or generation config, so
    transformers and vLLM cannot serve it; or others may not read the weights."""
    tiny.save_pretrained(tmp_path / "a")
    for name in COPIED_FILES:
        (tmp_path / "a" / name).write_text(name)
    save_model(load(tmp_path / "a"), tmp_path / "b")
    save_model(load_model(tmp_path / "b"), tmp_path / "b")
    files = list((tmp_path / "b").iterdir())
    assert {f.name for f in files} == {*COPIED_FILES, "config.json", "model.safetensors"}
    assert all((tmp_path / "b" / name).read_text() == name for name in COPIED_FILES)
    assert len({file.stat().st_mode for file in files}) == 1


def test_random_weights_follow_the_seed(tiny, tmp_path):
    """Fault: fresh weights do not depend on the seed, or depend on more than the seed; the residual
    outputs are not scaled by the depth."""
    tiny.save_pretrained(tmp_path)
    a, b, c = (random_model_of(tmp_path, seed).state_dict() for seed in (1, 1, 2))
    name = "model.layers.1.mlp.down_proj.weight"
    assert all(torch.equal(weight, b[name]) for name, weight in a.items())
    assert not torch.equal(a[name], c[name])
    assert float(a[name].std()) == pytest.approx(0.3 / 2, rel=0.1)  # 2 layers: 1 / sqrt(4)
    assert float(a["model.layers.1.mlp.up_proj.weight"].std()) == pytest.approx(0.3, rel=0.1)


@pytest.mark.parametrize("compiled", ["in place", "wrapper", "blocks"])
def test_compiled_model_saves_the_same_names(compiled, tmp_path):
    """Fault: torch.compile's _orig_mod. prefix gets into the checkpoint, which then loads
    nowhere."""
    model = hub_model("Llama-3.2")
    if compiled == "in place":
        model.compile()
    elif compiled == "wrapper":
        model = torch.compile(model)
    else:
        model.compile_blocks()
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert names == set(theirs.state_dict()) - {"lm_head.weight"}


@pytest.mark.parametrize("keys", [(), ("dtype",), ("torch_dtype",), ("dtype", "torch_dtype")])
def test_saved_dtype_is_the_weights(keys, tmp_path):
    """Fault: bfloat16 weights under a config that says float32, so that transformers and vLLM load
    them at twice the size."""
    hub_model("Qwen3", **dict.fromkeys(keys, "float32")).save_pretrained(tmp_path)
    half = Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    saved = {key: config[key] for key in ("dtype", "torch_dtype") if key in config}
    assert saved == dict.fromkeys(keys or ("dtype",), "bfloat16")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    for name, weight in half.state_dict().items():
        assert torch.equal(weight, theirs.state_dict()[name]), name
    ids = torch.randint(0, 97, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, exact, got = theirs(ids).logits.float(), theirs.float()(ids).logits, half(ids)
        again = load_model(tmp_path / "half")(ids)
    # rounding as large as theirs, nothing more
    assert (got - exact).norm() < 1.5 * (expected - exact).norm()
    torch.testing.assert_close(again, exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


MEASURE = """
import json, sys
from hf import load_model

def kib(name):  # the peak is VmHWM: ru_maxrss starts at that of the parent process
    return int(open("/proc/self/status").read().split(name + ":")[1].split()[0])

small, *large = sys.argv[1:]
load_model(small)  # what a first call imports and sets up is not counted
for path in large:
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts again
    before = kib("RssAnon"), kib("VmHWM")
    model = load_model(path)
    print(json.dumps([kib("RssAnon") - before[0], kib("VmHWM") - before[1]]))
    del model
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_makes_no_second_copy(tiny, tmp_path):
    """Fault: loading reads the file into memory, or holds the weights twice. In units of the
    float32 weights: those that need no conversion stay in the mapped file; of bfloat16 weights the
    result (1.0) and, at the peak, the mapped pages of the file (0.5) count."""
    limits = {torch.float32: (0.1, 0.1), torch.bfloat16: (1.1, 1.7)}  # anonymous, peak
    model = hub_model("Qwen3", hidden_size=512, intermediate_size=2048, vocab_size=20000)
    weights_kib = sum(4 * weight.numel() for weight in model.parameters()) / 1024
    for dtype in limits:
        model.to(dtype).save_pretrained(tmp_path / str(dtype))
    tiny.save_pretrained(tmp_path / "small")
    paths = [tmp_path / "small", *(tmp_path / str(dtype) for dtype in limits)]
    command = [sys.executable, "-c", MEASURE, *paths]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for line, (anonymous, peak) in zip(output.splitlines(), limits.values(), strict=True):
        used = json.loads(line)
        assert used[0] < anonymous * weights_kib and used[1] < peak * weights_kib, used


def test_roundtrip_is_bitwise(tiny, tmp_path):
    """Fault: saving or loading rounds the weights."""
    tiny.save_pretrained(tmp_path)
    assert_same_weights(tiny, load_model(tmp_path))


def test_sharded_checkpoint_loads(tmp_path):
    """Fault: only model.safetensors is looked for, so real checkpoints with an index fail."""
    theirs = hf_model("qwen2")
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = torch.arange(20)[None]
    with torch.no_grad():
        got, expected = load_model(tmp_path)(ids), theirs(ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "Missing key"),
        ("extra", "Unexpected key"),
        ("shape", "size mismatch"),
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
    with pytest.raises(UserError, match=message) as error:
        load_model(tmp_path)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type = 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear'"),
        (  # rope_scaling comes first
            {"rope_scaling": {"type": "yarn"}, "rope_parameters": {"rope_type": "default"}},
            "rope_type = 'yarn'",
        ),
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
    """Fault: a model that model.py does not implement loads and computes something else."""
    (tmp_path / "config.json").write_text(json.dumps(TINY | change))
    for load in (load_model, lambda path: random_model_of(path, seed=0)):
        with pytest.raises(UserError, match=message):
            load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x00" * 5, b"\xff" * 200, b"cut"])
def test_broken_weight_file_is_named(content, tiny, tmp_path):
    """Fault: a cut or foreign file raises something that main does not catch, or that does not say
    which file."""
    tiny.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] if content == b"cut" else content)
    with pytest.raises(UserError, match="model.safetensors: cannot be read"):
        load_model(tmp_path)


def test_missing_files_are_named(tiny, tmp_path):
    """Fault: an index without its shard, or a checkpoint that is only a pickle, loads or fails
    without a name; a pickle is opened."""

    def assert_error(message: str) -> None:
        with pytest.raises(UserError, match=message):
            load_model(tmp_path)

    assert_error("config.json: not found")
    save_model(tiny, tmp_path, max_shard_bytes=5_000)
    index = tmp_path / "model.safetensors.index.json"
    shard = sorted(tmp_path.glob("model-*"))[3]
    shard.unlink()
    assert_error(f"{shard.name}: cannot be read as safetensors: No such file")
    index.write_text("{}")
    assert_error("model.safetensors: cannot be read as safetensors: No such file")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch OPENED'\ntR.")
    assert_error("model.safetensors: cannot be read as safetensors: No such file")
    (tmp_path / "config.json").write_text("{")
    assert_error("config.json: not valid JSON")
    incomplete = {key: value for key, value in TINY.items() if key != "hidden_size"}
    (tmp_path / "config.json").write_text(json.dumps(incomplete))
    assert_error("config.json: has no 'hidden_size'")


def test_tied_head_in_the_file_must_be_the_embedding(tiny, tmp_path):
    """Fault: a fine-tuned head of its own is dropped because config.json says that it is tied; or a
    copy of the embedding is refused."""
    tiny.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    assert "lm_head.weight" not in load_model(tmp_path).state_dict()
    save_file(tensors | {"lm_head.weight": head + 1}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="'lm_head.weight' differs"):
        load_model(tmp_path)


def test_hf_config_is_kept_on_saving(tiny, tmp_path):
    """Fault: fields that this code does not read, such as eos_token_id, are lost on export."""
    tiny.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {k: v for k, v in saved.items() if k != "dtype"} == TINY
    assert read_config(tmp_path).num_layers == 2
