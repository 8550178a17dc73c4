"""What several test files share: a tiny random policy and the paths of the repository."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("MPLBACKEND", "Agg")
torch.set_num_threads(1)

from model import Transformer, TransformerConfig  # noqa: E402

ROOT = Path(__file__).parent.parent

TINY = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "tie_word_embeddings": True, "initializer_range": 0.3, "eos_token_id": 0, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture
def tiny() -> Transformer:
    """A random policy whose distributions are far from uniform, so that a mistake in them shows."""
    model = Transformer(TransformerConfig.from_hf(TINY, "tests"))
    model.init_weights(seed=1)
    return model


@pytest.fixture
def countdown_toml() -> Path:
    return ROOT / "configs" / "countdown.toml"


SMALL_RUN = [
    *(
        "--rl.steps",
        "3",
        "--iterations",
        "2",
        "--rl.problems_per_step",
        "4",
        "--rl.samples_per_problem",
        "8",
        "--data.train_size",
        "16",
    ),
    *(
        "--data.eval_size",
        "8",
        "--eval.num_samples",
        "4",
        "--eval.every",
        "2",
        "--rft.epochs",
        "2",
        "--rft.batch_size",
        "8",
    ),
    *("--save_every", "1"),
]
