"""plan.py: the memory it promises is the memory that is used."""

import ctypes
import dataclasses
import gc
import json
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY

import plan
from config import load_config
from model import Transformer, TransformerConfig
from packing import micro_batches, token_logprobs
from rloop import Trajectory, keep_freed_memory, main
from sampler import sample

SMALL = {
    "architectures": ["Qwen2ForCausalLM"], "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 5,
    "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
GROUP = {
    "prompt": 40,
    "samples": 8,
    "response": 128,
}  # prompt and NEW_TOKENS fit in 48 slots: the cache is whole from the start, as on a GPU
FEW = {"prompt": 3, "samples": 2, "response": 2}
ROWS, NEW_TOKENS = 256, 4


def resident(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM the most since forget_peak."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))


def forget_peak() -> int:
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return resident("VmRSS")


def set_checkpointing(model: Transformer, on: bool) -> None:
    for module in (model, *model.model.layers):
        module.checkpoint_activations = on


def train(model: Transformer, group: dict[str, int], dtype: str) -> None:
    groups = [([1] * group["prompt"], [[5] * group["response"]] * group["samples"])]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        for batch, _ in micro_batches(groups, 2**20):
            token_logprobs(model, batch)[0].mean().backward()


def measure(path: str, dtype: str, allocator: str) -> dict[str, int]:
    """Peak resident bytes, over those before the model was there, of sampling and of a micro-batch with gradients and moments in place."""
    torch.set_num_threads(1)
    libc = ctypes.CDLL(None)
    if (
        allocator == "exact"
    ):  # every tensor of 64 kB and more goes back to the kernel when it is freed: what is resident is alive
        libc.mallopt(-3, 65536)
    elif allocator == "kept":  # as rloop.py sets it
        keep_freed_memory()

    def run(
        path: str, group: dict[str, int], rows: int, new_tokens: int, base: int
    ) -> dict[str, int]:
        model = Transformer.from_config(path, seed=0)
        options = {
            "num_samples": group["samples"],
            "max_new_tokens": new_tokens,
            "stop_ids": set(),
            "seed": 0,
            "max_rows": rows,
        }
        forget_peak()
        sample(
            model.copy_as(getattr(torch, dtype)),
            [[1] * group["prompt"]] * (rows // group["samples"]),
            **options,
        )
        peaks = {"sampling": resident("VmHWM") - base}
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        train(model, FEW, dtype)
        optimizer.step()
        for phase, checkpoint in (("checkpointed", True), ("training", False)):
            set_checkpointing(model, checkpoint)
            forget_peak()
            train(model, group, dtype)
            peaks[phase] = resident("VmHWM") - base
        return peaks

    run(str(ROOT / "data" / "countdown_base"), FEW, 4, 2, 0)  # what libraries keep for themselves
    return run(path, GROUP, ROWS, NEW_TOKENS, forget_peak())


def planned(path: str, dtype: str) -> dict[str, float]:
    cfg = load_config(ROOT / "configs" / "countdown.toml", [
        *("--method", "rl", "--model.path", path, "--compute.dtype", dtype, "--sampling.max_new_tokens", str(NEW_TOKENS)),
        *("--rl.samples_per_problem", str(GROUP["samples"])),
    ])  # fmt: skip
    c = plan.read_architecture(cfg)
    prompt, rows, response = GROUP["prompt"], GROUP["samples"], GROUP["response"]
    batch = plan.Batch(
        tokens=prompt + rows * response,
        response_tokens=rows * response,
        rows=rows,
        longest=prompt + response,
        by_rows=False,
    )
    always = plan.always(c, cfg, 1)
    train = {
        ck: sum(always.values()) + sum(plan.training(c, cfg, 1, batch, checkpoint=ck).values())
        for ck in (False, True)
    }
    sampling = plan.sampling(c, cfg, 1, ROWS, prompt_tokens=prompt, stride=1)
    return {
        "sampling": always["float32 master weights"]
        + always.get("weights for the sampler", 0.0)
        + sum(sampling.values()),
        "checkpointed": train[True],
        "training": train[False],
    }


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_planned_memory_is_the_measured(tmp_path, dtype):
    """Fault: a tensor that a block keeps for its gradient, a copy of the weights or a cache that the plan forgets or counts twice."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, __file__, str(tmp_path), dtype, "exact"]
    measured = json.loads(
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    )
    for phase, size in planned(str(tmp_path), dtype).items():
        assert abs(size / measured[phase] - 1) < 0.15, (
            f"{phase}: planned {size / 1e6:.0f} MB, measured {measured[phase] / 1e6:.0f} MB"
        )


QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "vocab_size": 152064, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "use_sliding_window": False,
}  # fmt: skip
QWEN_7B = QWEN | {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
}  # fmt: skip
QWEN_32B = QWEN | {
    "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40, "num_key_value_heads": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "hf", "gpus", "num_parameters"),
    [("qwen2.5-math-7b", QWEN_7B, 8, 7_615_616_512), ("qwen2.5-32b", QWEN_32B, 64, 32_763_876_352)],
)
def test_committed_configs_fit_their_gpus(tmp_path, capsys, name, hf, gpus, num_parameters):
    """Fault: parameters that are not the model's (its page says how many it has), or a config that cannot run on what it names; a plan
    that begins a run."""
    (tmp_path / "config.json").write_text(json.dumps(hf))
    command = [
        "--config",
        str(ROOT / "configs" / f"{name}.toml"),
        "--model.path",
        str(tmp_path),
        "--run_dir",
        str(tmp_path / "run"),
    ]
    assert main([*command, "--plan", "--gpus", str(gpus), "--gpu-memory-gb", "80"]) == 0
    output = capsys.readouterr().out
    assert f"{num_parameters:,} parameters" in output and "of 80: fits" in output
    assert main([*command, "--plan", "--gpus", str(gpus), "--gpu-memory-gb", "40"]) == 0
    assert "DOES NOT FIT" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "hf",
    [TINY, SMALL, TINY | {"architectures": ["Qwen3ForCausalLM"], "attention_bias": True}, QWEN_7B],
)
def test_parameters_are_those_of_the_model(hf):
    """Fault: biases, norms or a tied head counted wrongly."""
    c = TransformerConfig.from_hf(hf, "tests")
    block, root = plan.count_parameters(c)
    with torch.device("meta"):
        assert c.num_layers * block + root == sum(
            weight.numel() for weight in Transformer(c).parameters()
        )


def test_the_most_that_fits_is_the_most(tmp_path, capsys):
    """Fault: the plan promises rows or tokens with which it then says that the run does not fit, or fewer than fit."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B))
    command = [
        "--config",
        str(ROOT / "configs" / "qwen2.5-math-7b.toml"),
        "--model.path",
        str(tmp_path),
        "--plan",
        "--gpus",
        "8",
    ]
    main(command)
    most = dict(
        re.findall(
            r"(compute\.\w+) = ([\d,]+)",
            capsys.readouterr().out.split("the most that fits:")[1].splitlines()[0],
        )
    )
    for key, number in most.items():
        for more, verdict in ((0, "fits"), (1, "DOES NOT FIT")):
            main([*command, f"--{key}", str(int(number.replace(",", "")) + more)])
            assert f"of 80: {verdict}" in capsys.readouterr().out, (key, more)


def test_work_of_a_step_by_hand(tmp_path):
    """Fault: a factor in the FLOPs: forward 2 a parameter and token, backward twice that, once more with checkpointing."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B))
    overrides = [
        "--model.path",
        str(tmp_path),
        "--rl.max_sampling_rounds",
        "1",
        "--compute.checkpoint_activations",
        "false",
    ]
    cfg = load_config(
        ROOT / "configs" / "qwen2.5-math-7b.toml",
        [*overrides, "--rl.recompute_logprobs", "false", "--rl.importance_cap", "0"],
    )
    c = plan.read_architecture(cfg)
    work, tokens = plan.step_work(c, cfg), 512 * 16 * 4096
    without_embedding = 7_615_616_512 - 152064 * 3584
    assert work["decode"] / (2 * without_embedding * tokens) == pytest.approx(
        1, abs=0.1
    )  # and attention
    # half of the groups are flat; the logits are computed a second time with or without checkpointing
    assert work["training"] / (6 * without_embedding * tokens / 2) == pytest.approx(1, abs=0.2)
    again = plan.step_work(
        c,
        dataclasses.replace(
            cfg, compute=dataclasses.replace(cfg.compute, checkpoint_activations=True)
        ),
    )
    assert again["training"] / work["training"] == pytest.approx(4 / 3, abs=0.04)


def test_bytes_of_a_response_token():
    """Fault: trajectories that are larger in a message, in memory or on disk than planned."""
    rng, T = np.random.default_rng(0), 4096
    logps = torch.tensor(-rng.exponential(size=T)).float().tolist()
    ids = rng.integers(0, QWEN["vocab_size"], size=T).tolist()
    trajectory = Trajectory(problem="p", iteration=0, step=1, prompt_ids=[1], ids=ids, logps=logps, finished=True, response="abc " * T,
                            reason="correct", reward=1.0)  # fmt: skip
    numbers = sum(8 + sys.getsizeof(x) for x in (*ids, *logps)) + sys.getsizeof(trajectory.response)
    sizes = (len(pickle.dumps(trajectory)), numbers, len(json.dumps(vars(trajectory))))
    assert [size / T for size in sizes] == pytest.approx(
        [plan.PICKLED, plan.LISTED, plan.WRITTEN], rel=0.1
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--plan", "--model.path", "nowhere/Some-7B"],
            "hf download OWNER/Some-7B config.json --local-dir nowhere/Some-7B",
        ),
        (["--plan", "--gpus", "0"], "--gpus 0: must be above 0"),
        (
            ["--plan", "--gpus", "8", "--compute.replicas", "3"],
            "compute.replicas = 3: must divide --gpus 8",
        ),
        (["--gpus", "8"], "--gpus: goes with --plan"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(countdown_toml, capsys, arguments, message):
    """Fault: a traceback, or a run that starts because --plan was forgotten."""
    assert main(["--config", str(countdown_toml), *arguments]) == 1
    assert message in capsys.readouterr().err


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
