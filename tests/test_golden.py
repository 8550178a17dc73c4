"""20 RL steps of the embedded task reproduce stored metrics.

After a change that is MEANT to change results, record them again: python tests/test_golden.py
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STORED = Path(__file__).with_name("golden.json")
KEYS = (
    *("phase", "iteration", "step", "rl_steps", "num_trajectories", "rl/reward_mean", "rl/loss"),
    *("rl/grad_norm", "rl/entropy_mean_nat", "rl/kl_nat", "rft/loss", "filter/num_experts"),
    *("eval/avg@4", "eval/pass@4"),
)
OVERRIDES = [
    *("--iterations", "2", "--rl.steps", "10", "--rl.problems_per_step", "8"),
    *("--rl.samples_per_problem", "4", "--rl.max_sampling_rounds", "2", "--rl.warmup_steps", "2"),
    *("--rl.lr", "3e-4", "--rl.kl_coef", "0.01", "--rft.epochs", "1", "--rft.batch_size", "8"),
    *("--data.train", str(ROOT / "tests" / "easy_games.jsonl")),
    *("--data.eval", str(ROOT / "tests" / "easy_heldout.jsonl")),
    *("--data.train_size", "20", "--data.eval_size", "10", "--eval.num_samples", "4"),
    *("--eval.every", "10", "--save_every", "10"),
]


def golden_records(run_dir: str) -> list[dict]:
    import rloop
    from config import load_config

    overrides = [*OVERRIDES, "--run_dir", run_dir]
    rloop.run_method(load_config(ROOT / "configs" / "countdown.toml", overrides))
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{key: record[key] for key in KEYS if key in record} for record in records]


def test_golden_run(tmp_path, monkeypatch):
    """Fault: any change of sampling, loss, optimizer, filter or data order that was not meant."""
    monkeypatch.chdir(ROOT)
    stored, got = json.loads(STORED.read_text()), golden_records(str(tmp_path / "run"))
    assert sum(r["phase"] == "rl" for r in got) == 20 and len(got) == len(stored)
    for expected, record in zip(stored, got, strict=True):
        assert record == {
            k: v if isinstance(v, str) else pytest.approx(v, rel=2e-3, abs=2e-5)
            for k, v in expected.items()
        }


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        STORED.write_text(json.dumps(golden_records(folder + "/run"), indent=0) + "\n")
