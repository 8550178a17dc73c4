"""scale/plan.py: the memory that it plans is the memory that is used."""

import ctypes
import gc
import json
import os
import re
import subprocess
import sys

import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import ROOT, TINY

import hf
from config import Config, load_config
from packing import Row, micro_batches, token_logprobs
from rloop import Trajectory, main
from sampler import sample, sampling_copy
from scale import lora, parallel, plan

SMALL = TINY | {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 6144,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
ROWS, NEW_TOKENS = 96, 8  # of sampling
GROUP = (56, 8, 64)  # of the micro-batch: tokens of the prompt, responses, tokens of each
FEW = (3, 2, 2)


def resident(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM the most since forget_peak."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))


def forget_peak() -> int:
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return resident("VmRSS")


def train(model, prompt: int, samples: int, response: int) -> None:
    rows = [Row(prompt_ids=[1] * prompt, ids=[5] * response, weight=1.0) for _ in range(samples)]
    for batch in micro_batches([rows], 2**20):
        token_logprobs(model, batch)[0].mean().backward()


def measure(path: str, dtype: str, rank: int) -> dict[str, int]:
    """Peak bytes of sampling and of a micro-batch with gradients and moments in place."""
    prompt, samples, _ = GROUP
    base = forget_peak()
    cfg = config(path, dtype, rank)
    model = parallel.prepare(lora.add(hf.random_model(path, seed=0), cfg), cfg.compute)
    options = {"num_samples": samples, "max_new_tokens": NEW_TOKENS, "max_rows": ROWS}
    forget_peak()
    copy = sampling_copy(model, dtype)
    prompts = [[1] * prompt] * (ROWS // samples)
    sample(copy, prompts, stop_ids=set(), seed=0, progress=False, **options)
    peaks = {"sampling": resident("VmHWM") - base}
    del copy
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    train(model, *FEW)
    optimizer.step()
    for phase, checkpoint in (("checkpointed", True), ("training", False)):
        for block in model.model.layers:
            block.checkpoint_activations = checkpoint
        forget_peak()
        train(model, *GROUP)
        peaks[phase] = resident("VmHWM") - base
    return peaks


def config(path: str, dtype: str, rank: int) -> Config:
    overrides = ["--method", "sft", "--model.path", path, "--compute.dtype", dtype]
    overrides += ["--sampling.max_new_tokens", f"{NEW_TOKENS}", "--lora.rank", f"{rank}"]
    overrides += ["--rl.samples_per_problem", f"{GROUP[1]}"]
    return load_config(ROOT / "configs" / "countdown.toml", overrides)


def planned(path: str, dtype: str, rank: int) -> dict[str, float]:
    prompt, samples, response = GROUP
    s = plan.Setting(config(path, dtype, rank), gpus=1)
    tokens, slots = prompt + samples * response, samples * (prompt + response)
    sizes = {"sampling": s.frozen + s.shard + plan.sampling(s, ROWS, prompt)}
    for phase, checkpoint in (("checkpointed", True), ("training", False)):
        batch = plan.gradient(s, tokens, samples * response, slots, checkpoint)
        sizes[phase] = plan.always(s) + batch
    return sizes


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_planned_memory_is_the_measured(tmp_path, dtype, rank):
    """Fault: a tensor that a block keeps for its gradient, a copy of the weights or a cache that
    the plan forgets or counts twice; frozen weights that get gradients, or masters in float32."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "0"  # it grows with the number of shapes
    command = [sys.executable, __file__, str(tmp_path), dtype, str(rank)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    for phase, size in planned(str(tmp_path), dtype, rank).items():
        told = f"{phase}: planned {size / 1e6:.0f} MB of {measured[phase] / 1e6:.0f}"
        assert abs(size / measured[phase] - 1) < 0.15, told


QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
QWEN_7B = QWEN | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
QWEN_32B = QWEN | {
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
}


QWEN_1_5B = QWEN | {
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}
QWEN_3B = QWEN_1_5B | {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
}


@pytest.mark.parametrize(
    ("name", "architecture", "options", "gpus", "gib", "num_parameters"),
    [
        ("qwen2.5-math-7b", QWEN_7B, [], 8, 80, 7_615_616_512),
        ("qwen2.5-32b", QWEN_32B, [], 64, 80, 32_763_876_352),
        ("qwen2.5-1.5b-lora", QWEN_1_5B, [], 1, 24, 1_543_714_304),
        ("qwen2.5-1.5b-lora", QWEN_3B, ["--compute.max_rows", "128"], 1, 24, 3_085_938_688),
    ],
)
def test_committed_configs_fit_their_gpus(
    tmp_path, capsys, name, architecture, options, gpus, gib, num_parameters
):
    """Fault: parameters that are not the model's (its page says how many it has), or a config that
    cannot run on what it names; a plan that begins a run."""
    (tmp_path / "config.json").write_text(json.dumps(architecture))
    command = ["--config", str(ROOT / "configs" / f"{name}.toml"), "--model.path", str(tmp_path)]
    command += ["--run_dir", str(tmp_path / "run"), "--plan", "--gpus", str(gpus), *options]
    assert main([*command, "--gpu-memory-gb", str(gib)]) == 0
    output = capsys.readouterr().out
    assert f"{num_parameters:,} parameters" in output and f"of {gib}: fits" in output
    assert main([*command, "--gpu-memory-gb", str(gib // 2)]) == 0
    assert "DOES NOT FIT" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_adapters_are_counted_as_peft_counts_them(tmp_path):
    """Fault: a layer without an adapter in the plan, or a wrong width."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    s = plan.Setting(config(str(tmp_path), "float32", 5), gpus=1)
    policy = lora.add(hf.random_model(tmp_path, seed=0), s.cfg)
    assert s.trained == sum(weight.numel() for weight in policy.state_dict().values())
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.Qwen2Config(**SMALL))
    settings = peft.LoraConfig(r=5, target_modules="all-linear")
    model = peft.get_peft_model(theirs, settings)
    assert s.trained == sum(w.numel() for w in model.parameters() if w.requires_grad)


def test_the_most_that_fits_is_the_most(tmp_path, capsys):
    """Fault: the plan promises rows or tokens with which it then says that the run does not fit, or
    fewer than fit."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B))

    def planned_with(*overrides: str) -> str:
        file = ROOT / "configs" / "qwen2.5-math-7b.toml"
        cfg = load_config(file, ["--model.path", str(tmp_path), *overrides])
        assert plan.main(cfg, gpus=8, gpu_memory_gb=80) == 0
        return capsys.readouterr().out

    line = next(line for line in planned_with().splitlines() if "most that fits" in line)
    most = re.findall(r"(compute\.\w+) = (\d+)", line)
    assert [key for key, _ in most] == ["compute.max_rows", "compute.micro_batch_tokens"]
    for key, number in most:
        assert "of 80: fits" in planned_with(f"--{key}", number)
        assert "of 80: DOES NOT FIT" in planned_with(f"--{key}", str(int(number) + 1))


def test_an_evaluation_needs_no_training(tmp_path, capsys):
    """Fault: a plan of an evaluation counts gradients and moments, or ends in a traceback."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B))
    command = ["--config", str(ROOT / "configs" / "qwen2.5-math-7b.toml"), "--plan", "--gpus", "8"]
    assert main([*command, "--model.path", str(tmp_path), "--method", "eval"]) == 0
    lines = capsys.readouterr().out.splitlines()
    sizes = [line.split()[-1] for line in lines if line.startswith(("  always:", "  training:"))]
    assert sizes == [f"{2 + 7_615_616_512 * 4 / 8 / 2**30:.2f}", "0.00"]


def test_bytes_of_a_response_token():
    """Fault: trajectories that are larger in memory or on disk than planned."""
    rng, T = np.random.default_rng(0), 4096
    trajectory = Trajectory(
        problem="p",
        iteration=0,
        step=1,
        prompt_ids=[1],
        ids=rng.integers(0, 152064, size=T).tolist(),
        logps=torch.tensor(-rng.exponential(size=T)).float().tolist(),
        finished=True,
        response="abc " * T,
        reason="correct",
        reward=1.0,
    )
    listed = sum(8 + sys.getsizeof(x) for x in (*trajectory.ids, *trajectory.logps))
    listed += sys.getsizeof(trajectory.response)
    sizes = [listed / T, len(json.dumps(vars(trajectory))) / T]
    assert sizes == pytest.approx([plan.LISTED, plan.WRITTEN], rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan", "--model.path", "nowhere/Some-7B"], "nowhere/Some-7B/config.json: not found"),
        (["--plan", "--gpus", "0"], "--gpus 0: expected a multiple of compute.replicas = 1"),
        (
            ["--plan", "--gpus", "8", "--compute.replicas", "3"],
            "--gpus 8: expected a multiple of compute.replicas = 3",
        ),
        (["--gpus", "8"], "--gpus and --gpu-memory-gb: go with --plan"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(countdown_toml, capsys, arguments, message):
    """Fault: a traceback, or a run that starts because --plan was forgotten."""
    assert main(["--config", str(countdown_toml), *arguments]) == 1
    assert message in capsys.readouterr().err


if __name__ == "__main__":
    torch.set_num_threads(1)
    # tensors of 64 kB and more go back to the kernel when they are freed: what is resident is alive
    ctypes.CDLL(None).mallopt(-3, 65536)
    path, dtype, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
    # what libraries keep for themselves
    measure(str(ROOT / "data" / "countdown_base"), dtype, rank)
    print(json.dumps(measure(path, dtype, rank)))
