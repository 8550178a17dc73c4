"""What several test files share: tiny random policies, a small run, paths, and a clean state."""

import json
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # no thread of TRL's is on the net while a test forks
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # equal bits are a CPU's; bench.cuda_smoke checks a GPU
torch.set_num_threads(1)

import hf  # noqa: E402
import packing  # noqa: E402
import sampler  # noqa: E402
from model import Transformer  # noqa: E402
from scale import parallel  # noqa: E402

ROOT = Path(__file__).parent.parent

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.3,
    "eos_token_id": 0,
    "max_position_embeddings": 128,
}

SMALL_RUN = [
    *("--rl.steps", "3", "--iterations", "2"),
    *("--rl.problems_per_step", "4", "--rl.samples_per_problem", "8"),
    *("--data.train", str(ROOT / "tests" / "easy_games.jsonl")),  # the base policy solves a quarter
    *("--data.eval", str(ROOT / "tests" / "easy_heldout.jsonl")),
    *("--data.train_size", "16", "--data.eval_size", "8"),
    *("--eval.num_samples", "4", "--eval.every", "2"),
    *("--rft.epochs", "2", "--rft.batch_size", "8"),
    *("--save_every", "100"),
]

PLAIN_ATTEND, PLAIN_LAYERS = packing.Packed.attend, sampler.swap_layers
PLAIN_DECODE = sampler._decode
HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}


@pytest.fixture(autouse=True)
def clean_state() -> Iterator[None]:
    """A run in the test's process swaps in faster parts, follows signals and sets the threads: no
    other test may see that."""
    restore_state()
    yield
    restore_state()


def restore_state() -> None:
    packing.Packed.attend = PLAIN_ATTEND
    sampler.swap_layers = PLAIN_LAYERS
    sampler._decode = PLAIN_DECODE
    parallel._stop = False
    torch.set_num_threads(1)
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


def random_model(hf_config: dict, seed: int = 1) -> Transformer:
    """A random policy of the architecture of a config.json."""
    with tempfile.TemporaryDirectory() as path:
        (Path(path) / "config.json").write_text(json.dumps(hf_config))
        model = hf.random_model(path, seed)
    model.source = None
    return model


@pytest.fixture
def tiny() -> Transformer:
    """A random policy whose distributions are far from uniform, so that a mistake in them shows."""
    return random_model(TINY)


@pytest.fixture
def countdown_toml() -> Path:
    return ROOT / "configs" / "countdown.toml"


# ---- models of transformers, to compare with

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
}
CASES = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "llama-tied-bias": ("LlamaConfig", {"tie_word_embeddings": True, "attention_bias": True}),
    "llama3-rope": ("LlamaConfig", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": False}),
    "qwen2-tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True, "head_dim": 16}),
}


def hf_model(case: str):
    """A random model of transformers, biases and norms too: their defaults would hide a missing
    one."""
    import transformers

    config_class, extra = CASES[case]
    config = getattr(transformers, config_class)(**SIZES, **extra)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            torch.nn.init.normal_(weight, 1.0 if "norm" in name else 0.0, 0.2)
    return model.float().eval()


def assert_same_logits(ours, theirs, num_rows: int, num_tokens: int) -> None:
    ids = torch.randint(0, 97, (num_rows, num_tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, got = theirs(ids).logits, ours(ids)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
