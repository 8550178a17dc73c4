"""scale/lora.py: adapters learn, the base stays, and others read what is exported."""

import ast
import copy
import dataclasses
import json
import math

import peft
import pytest
import torch
import transformers
from conftest import ROOT, TINY, random_model
from safetensors.torch import load_file
from test_parallel import COUNTDOWN, Processes, arguments, assert_same_run, run_with, stop_when

import rloop
from config import Config, LoRAConfig, load_config
from model import Transformer
from packing import Row, micro_batches, pack, token_logprobs
from run import Run
from sampler import sampling_copy
from scale import lora, parallel

IDS = torch.randint(1, 61, (3, 9), generator=torch.Generator().manual_seed(0))
LAYERS = 7  # of a block
LORA_RUN = [
    *("--lora.rank", "3", "--lora.alpha", "6", "--rl.lr", "3e-3", "--rft.lr", "1e-2"),
    *("--optimizer.weight_decay", "0.1"),
]


def config(rank: int = 4, alpha: float = 8.0, **fields) -> Config:
    return dataclasses.replace(Config(), lora=LoRAConfig(rank=rank, alpha=alpha), **fields)


def adapted(model: Transformer, cfg: Config | None = None) -> Transformer:
    """A policy on a copy of the model."""
    cfg = cfg or config()
    return parallel.prepare(lora.add(copy.deepcopy(model), cfg), cfg.compute)


def randomize(policy: Transformer, seed: int = 3) -> Transformer:
    """Adapters as after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if ".lora_B." in name:
                weight.normal_(std=0.1, generator=generator)
    return policy


def adapted_layers(policy: Transformer) -> dict[str, lora.AdaptedLinear]:
    return {n: m for n, m in policy.named_modules() if isinstance(m, lora.AdaptedLinear)}


def test_one_call_is_all_that_refers_to_it():
    """Fault: the product does not run without scale/lora.py and the call in rloop.py."""
    files = [f for f in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")) if f.parent.name != "tests"]
    assert len(files) > 10
    uses = []
    for file in [file for file in files if file.name != "lora.py"]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.alias) and node.name.split(".")[-1] == "lora":
                uses.append((file.name, "import"))
            elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith("lora."):
                uses.append((file.name, ast.unparse(node)))
    assert uses == [("rloop.py", "import"), ("rloop.py", "lora.add(policy, cfg)")]


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "tie_word_embeddings": False}])
def test_new_adapters_change_nothing_and_are_all_that_is_trained(changes):
    """Fault: theta_0 is not the base model, a layer of a block has no adapter, or a weight of the
    base is trained, too; or rank 0 changes anything."""
    base = random_model(TINY | changes)
    policy = adapted(base)
    assert torch.equal(policy(IDS), base(IDS))
    assert len(adapted_layers(policy)) == LAYERS * len(base.model.layers)
    trained = {name for name, weight in policy.named_parameters() if weight.requires_grad}
    assert trained == {f"{n}.lora_{x}.weight" for n in adapted_layers(policy) for x in "AB"}
    assert trained == policy.state_dict().keys()
    assert not torch.equal(randomize(policy)(IDS), base(IDS))
    assert lora.add(base, config(rank=0)) is base and type(base) is Transformer
    assert all(weight.requires_grad for weight in base.parameters())


def test_adapters_follow_the_seed(tiny):
    """Fault: the run cannot be repeated, or every seed has the same adapters; or the layers of a
    block share their random numbers."""
    a, b, c = (adapted(tiny, config(seed=seed)).state_dict() for seed in (1, 1, 2))
    name, other = (f"model.layers.0.self_attn.{x}_proj.lora_A.weight" for x in "kv")
    assert torch.equal(a[name], b[name])
    assert not torch.equal(a[name], c[name]) and not torch.equal(a[name], a[other])
    bound = 1 / math.sqrt(32)  # PEFT's: of kaiming_uniform_ with a = sqrt(5)
    assert 0.9 * bound < a[name].abs().max() <= bound


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "tie_word_embeddings": False}])
def test_merged_weights_are_the_policy(dtype, changes):
    """Fault: what samples is not what is trained: adapters that are left out, added in another
    order or scale, or an earlier step's."""
    model = random_model(TINY | changes)
    exact = randomize(adapted(model))
    policy = randomize(adapted(model, config(compute=load_compute(dtype))))
    dtypes = {name: weight.dtype for name, weight in policy.named_parameters()}
    base, trained = getattr(torch, dtype), {n for n in dtypes if ".lora_" in n}
    assert {dtypes[name] for name in trained} == {torch.float32}
    assert {dtypes[name] for name in dtypes.keys() - trained} == {base}
    for _ in range(2):
        merged = sampling_copy(policy, dtype)
        assert type(merged) is Transformer and {w.dtype for w in merged.parameters()} == {base}
        error = (merged(IDS) - exact(IDS)).norm() / exact(IDS).norm()
        assert error < (1e-5 if dtype == "float32" else 0.03)
        with torch.no_grad():
            for weight in (*policy.state_dict().values(), *exact.state_dict().values()):
                weight.mul_(1.5)


def load_compute(dtype: str):
    return load_config(COUNTDOWN, ["--compute.dtype", dtype]).compute


# ---- learning


def gradients_of_weights(model: Transformer, groups) -> dict[str, torch.Tensor]:
    """Of the loss of one RL update with respect to all weights of a plain model."""
    model = copy.deepcopy(model)
    rows_NG = [rloop.training_rows(group, CFG) for group in groups]
    rloop.accumulate_gradient(model, rows_NG, CFG)
    return {name: weight.grad for name, weight in model.named_parameters()}


CFG = load_config(COUNTDOWN, ["--rl.minibatches", "1", "--optimizer.grad_clip", "1e9"])


def mixed_group(model: Transformer) -> list[list[rloop.Trajectory]]:
    """One problem, whose first response of four is right; log-probs are the model's."""
    rows = [Row(prompt_ids=[3, 4], ids=[5 + g, 9, 0]) for g in range(4)]
    with torch.no_grad():
        logps = token_logprobs(model, pack([rows]))[0].view(4, 3).tolist()
    place = {"problem": "p", "iteration": 0, "step": 1, "finished": True, "response": ""}
    return [
        [
            rloop.Trajectory(
                prompt_ids=row.prompt_ids,
                ids=row.ids,
                logps=logps[g],
                reason="",
                reward=float(g == 0),
                **place,
            )
            for g, row in enumerate(rows)
        ]
    ]


def updated(policy: Transformer, groups, tmp_path, make_optimizer, lr: float) -> dict:
    """The weights after one update: name -> tensor."""
    run = Run(dataclasses.replace(CFG, run_dir=str(tmp_path / "run")))
    rloop.update(run, policy, make_optimizer(policy.parameters()), groups, None, lr)
    return {name: weight.detach().clone() for name, weight in policy.weights()}


def change(after: dict, before: Transformer, name: str) -> torch.Tensor:
    return after[name].double() - before.state_dict()[name].double()


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))


def test_first_step_is_the_gradient_in_the_rows_of_A(tiny, tmp_path):
    """Fault: the adapters' gradient is not the chain rule's. With B = 0 and G the gradient of the
    loss by W, a step of gradient descent on B changes W by -lr scale^2 G A^T A, and A by nothing;
    AdamW's first step by -lr scale sign(G A^T) A."""
    groups = mixed_group(tiny)
    G = gradients_of_weights(tiny, groups)
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        policy = adapted(tiny, config(rank=4, alpha=8.0))
        A = {n: m.lora_A.weight.detach().clone() for n, m in adapted_layers(policy).items()}
        after = updated(policy, groups, tmp_path, lambda w, k=kind: k(w, weight_decay=0.0), 0.01)
        for name, A_RD in A.items():
            if kind is torch.optim.SGD:
                expected = -0.01 * 2.0**2 * G[f"{name}.weight"] @ A_RD.T @ A_RD
            else:
                expected = -0.01 * 2.0 * (G[f"{name}.weight"] @ A_RD.T).sign() @ A_RD
            got = change(after, tiny, f"{name}.weight")
            assert cosine(got, expected) > 0.999, (kind, name)
            assert float(got.norm() / expected.norm()) == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_first_step_at_full_width_is_that_of_full_fine_tuning(tiny, tmp_path, kind):
    """Fault: with A^T A = 1 and alpha = rank, a step is not the one that training all weights
    takes: a wrong sign, scale, layer or order of A and B."""
    width = max(TINY["hidden_size"], TINY["intermediate_size"])
    groups, policy = mixed_group(tiny), adapted(tiny, config(rank=width, alpha=float(width)))
    with torch.no_grad():
        for layer in adapted_layers(policy).values():
            layer.lora_A.weight.zero_().fill_diagonal_(1.0)
    full = parallel.prepare(copy.deepcopy(tiny), CFG.compute)

    def make(weights):
        return kind(weights, weight_decay=0.0)

    got = updated(policy, groups, tmp_path, make, lr=0.01)
    expected = updated(full, groups, tmp_path, make, lr=0.01)
    for name in adapted_layers(policy):
        step = change(expected, tiny, f"{name}.weight")
        assert step.norm() > 0 and cosine(change(got, tiny, f"{name}.weight"), step) > 0.999
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert change(expected, tiny, name).norm() > 0 == change(got, tiny, name).norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_an_update_raises_the_right_answer(tiny, tmp_path, dtype, recomputed):
    """Fault: the policy's adapters get no gradient, its opposite, or none where blocks are computed
    a second time."""
    compute = dataclasses.replace(load_compute(dtype), checkpoint_activations=recomputed)
    policy = randomize(adapted(tiny, config(compute=compute)))
    groups = mixed_group(policy)
    before = [sum(t.logps) for t in groups[0]]
    updated(policy, groups, tmp_path, torch.optim.AdamW, lr=0.003)
    after = [sum(t.logps) for t in mixed_group(policy)[0]]
    assert after[0] > before[0] + 0.02 and sum(after[1:]) < sum(before[1:]) - 0.02


def test_the_kl_terms_reference_is_the_base_in_the_first_phase(tiny, tmp_path, monkeypatch):
    """Fault: the reference is the policy itself; or the policy is left with the reference's
    adapters."""
    policy = adapted(tiny)
    theta_0 = {name: weight.clone() for name, weight in policy.state_dict().items()}
    randomize(policy)
    moved = {name: weight.clone() for name, weight in policy.state_dict().items()}
    groups, rows = mixed_group(policy), []
    real = rloop.accumulate_gradient

    def spy(policy, rows_NG, cfg):
        rows.extend(rows_NG[0])
        assert all(torch.equal(policy.state_dict()[name], moved[name]) for name in moved)
        return real(policy, rows_NG, cfg)

    cfg = dataclasses.replace(CFG.rl, kl_coef=0.1)
    run = Run(dataclasses.replace(CFG, rl=cfg, run_dir=str(tmp_path / "run")))
    monkeypatch.setattr(rloop, "accumulate_gradient", spy)
    optimizer = torch.optim.AdamW(policy.parameters())
    metrics = rloop.update(run, policy, optimizer, groups, theta_0, 1e-3)
    with torch.no_grad():
        expected = token_logprobs(tiny, pack([rows]))[0].view(4, 3)
    torch.testing.assert_close(torch.tensor([row.ref_logps for row in rows]), expected)
    assert metrics["rl/kl_nat"] > 0.01


# ---- whole runs


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run of two iterations by one process."""
    run_dir = tmp_path_factory.mktemp("lora") / "single"
    run_with(1, run_dir, *LORA_RUN)
    return run_dir


def test_a_run_leaves_the_base_alone_and_keeps_adapters(whole_run):
    """Fault: a weight of the base moves (weight decay, an optimizer that has it), a checkpoint
    holds the base, or the adapters do not move."""
    base = load_file(ROOT / "data/countdown_base/model.safetensors")
    cfg = load_config(COUNTDOWN, arguments(whole_run, *LORA_RUN)[2:])
    exported = load_file(whole_run / "policies/theta_2/model.safetensors")
    moved = {name for name in base if not torch.equal(base[name], exported[name])}
    policy = rloop.load_policy(cfg)
    assert moved == {f"{name}.weight" for name in adapted_layers(policy)}
    for name, weight in policy.named_parameters():
        assert ".lora_" in name or torch.equal(weight, base[name]), name
    num_bytes = adapter_bytes(whole_run)
    assert num_bytes == sum(weight.nbytes for weight in policy.state_dict().values())
    assert num_bytes < 0.2 * sum(weight.nbytes for weight in base.values())
    assert checkpoint_bytes(whole_run) == num_bytes


def adapter_bytes(run_dir) -> int:
    """Of one set of adapters, as exported."""
    tensors = load_file(run_dir / "adapters/rl_1/adapter_model.safetensors")
    return sum(tensor.nbytes for tensor in tensors.values())


def checkpoint_bytes(run_dir) -> int:
    """Of the weights and moments in the last checkpoint, none of them of a frozen weight."""
    shards = max((run_dir / "checkpoints").iterdir()).glob("*.safetensors")
    named = [pair for file in shards for pair in load_file(file).items()]
    assert all(".lora_" in name or name.startswith("optimizer.") for name, _ in named)
    return sum(tensor.nbytes for _, tensor in named if tensor.dim() > 0)


def test_exported_directories_load_in_transformers_and_peft(whole_run):
    """Fault: names, scale or settings that PEFT reads otherwise; an adapter of another step than
    the merged weights beside it."""
    names = sorted(path.name for path in (whole_run / "policies").iterdir())
    assert names == ["rl_1", "rl_2", "theta_1", "theta_2"]
    assert names == sorted(path.name for path in (whole_run / "adapters").iterdir())
    load, ids = transformers.AutoModelForCausalLM.from_pretrained, IDS % 20
    logits = []
    for name in names:
        merged, base = load(whole_run / "policies" / name), load(ROOT / "data/countdown_base")
        with torch.no_grad():
            of_base = base(ids).logits
            model = peft.PeftModel.from_pretrained(base, whole_run / "adapters" / name)
            logits.append(model(ids).logits)
            torch.testing.assert_close(merged(ids).logits, logits[-1], rtol=1e-4, atol=1e-3)
        assert (logits[-1] - of_base).abs().max() > 0.1
        file = whole_run / "adapters" / name / "adapter_model.safetensors"
        assert load_file(file).keys() == peft.get_peft_model_state_dict(model).keys()
    assert all((logits[0] - other).abs().max() > 0.01 for other in logits[1:])


@pytest.mark.parametrize(
    ("num_processes", "options"),
    [
        (2, ()),
        (2, ("--compute.replicas", "2")),
        (3, ("--compute.checkpoint_activations", "true")),
    ],
)
def test_many_processes_learn_what_one_does(whole_run, tmp_path, num_processes, options):
    """Fault: shards of frozen weights or of adapters with fewer rows than processes; adapters that
    differ from process to process, or from replica to replica; a merge of shards."""
    run_with(num_processes, tmp_path / "run", *LORA_RUN, *options)
    assert_same_run(tmp_path / "run", whole_run)
    name = "adapters/theta_2/adapter_model.safetensors"
    one, other = (load_file(run / name) for run in (whole_run, tmp_path / "run"))
    for key in one:
        torch.testing.assert_close(other[key], one[key], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stopped_run_continues_to_the_bit(tmp_path, processes):
    """Fault: adapters, their moments or theta_i are not what they were when the run was stopped,
    in RL or in RFT; or the checkpoint holds more than these."""
    for reached, copies in (
        (lambda now: now.iteration == 1 and now.step == 1, 4),
        (lambda now: now.iteration == 1 and now.rft_step == 1, 3),
    ):
        flags = arguments(tmp_path / "run", *LORA_RUN)
        assert Processes(processes, stop_when, flags, reached).exit_codes() == [130] * processes
        assert checkpoint_bytes(tmp_path / "run") == copies * adapter_bytes(tmp_path / "run")
    run_with(processes, tmp_path / "run", *LORA_RUN)
    run_with(processes, tmp_path / "whole", *LORA_RUN)
    for file in ("trajectories/iteration_2.jsonl", "policies/theta_2/model.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_bfloat16_shards_are_as_exact_as_a_whole_policy(tiny):
    """Fault: FSDP hands out a frozen weight of another dtype, or sums the adapters' gradients in
    bfloat16; the merged copy of shards is not the copy of the whole."""

    def gradients(policy: Transformer) -> dict[str, torch.Tensor]:
        rows = [[Row([1, 2, 3 + n], [4, 5 + g, 6, 7]) for g in range(4)] for n in range(4)]
        for batch in micro_batches(rows, 40):
            token_logprobs(policy, batch)[0].mean().backward()
        named = policy.named_parameters()
        return {n: parallel.whole_tensor(w.grad) for n, w in named if w.requires_grad}

    def error(got: dict[str, torch.Tensor]) -> float:
        return math.sqrt(sum(float((got[name] - g).square().sum()) for name, g in exact.items()))

    def new(dtype: str) -> Transformer:
        return randomize(adapted(tiny, config(rank=1, compute=load_compute(dtype))))

    exact, whole = gradients(new("float32")), gradients(new("bfloat16"))
    expected = sampling_copy(new("bfloat16"), "bfloat16")(IDS)
    start = new("bfloat16").state_dict()

    def sharded() -> int:
        with parallel.processes():
            cfg = config(rank=1, compute=load_compute("bfloat16"))
            policy = adapted(tiny, cfg)
            with torch.no_grad():
                for name, weight in policy.state_dict().items():
                    weight.copy_(
                        torch.distributed.tensor.distribute_tensor(
                            start[name], weight.device_mesh, weight.placements
                        )
                    )
            assert torch.equal(sampling_copy(policy, "bfloat16")(IDS), expected)
            got = {name: g / 2 for name, g in gradients(policy).items()}  # two add the same
            assert {g.dtype for g in got.values()} == {torch.float32}
            assert error(got) < 1.2 * error(whole)
            assert 0 < error(whole) < 0.1 * error(dict.fromkeys(exact, 0))
            assert torch.equal(sampling_copy(policy, "bfloat16")(IDS), expected)
        return 0

    assert Processes(2, sharded).exit_codes() == [0, 0]


def test_adapters_are_no_constants_of_a_compilation(tiny, monkeypatch):
    """Fault: compiled blocks go on with the adapters, the scale or the rank that they were compiled
    with; or new values compile them again."""
    torch._dynamo.reset()
    compile_, compute = torch.compile, dataclasses.replace(load_compute("float32"), compile=True)
    monkeypatch.setattr(torch, "compile", lambda f, **k: compile_(f, backend="eager", **k))

    def assert_same(rank: int, alpha: float) -> Transformer:
        compiled = randomize(adapted(tiny, config(rank, alpha, compute=compute)))
        plain = randomize(adapted(tiny, config(rank, alpha)))
        with torch.no_grad():
            torch.testing.assert_close(compiled(IDS), plain(IDS))
            for values in (randomize(plain, seed=4).state_dict(), plain.state_dict()):
                compiled.load_state_dict(values)
                with torch._dynamo.config.patch(error_on_recompile=True):
                    torch.testing.assert_close(compiled(IDS), plain(IDS))
        return compiled

    for rank, alpha in ((2, 4.0), (2, 40.0), (5, 5.0)):
        assert_same(rank, alpha)


def test_a_state_of_other_adapters_is_refused(tiny):
    """Fault: a state that lacks adapters, or the base's, is loaded in part and in silence."""
    policy = adapted(tiny)
    for state in (dict(list(policy.state_dict().items())[1:]), tiny.state_dict()):
        with pytest.raises(ValueError, match="not that of this policy's adapters"):
            policy.load_state_dict(state)


def test_config_names_what_peft_needs(whole_run):
    """Fault: a setting is lost, so that PEFT applies its own default."""
    config = json.loads((whole_run / "adapters/rl_1/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 6.0)
    names = ["down", "gate", "k", "o", "q", "up", "v"]
    assert config["target_modules"] == [f"{name}_proj" for name in names]
