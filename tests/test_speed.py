"""scale/speed.py: every faster part against the plain one that it replaces."""

import ast
import importlib.util
import resource
import sys
import unittest.mock
from types import SimpleNamespace

import pytest
import torch
from conftest import PLAIN_ATTEND, PLAIN_LAYERS, ROOT, TINY, random_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import packing
import sampler
from bench import limits
from model import KVCache, Linear, Transformer
from packing import Row, pack, token_logprobs
from sampler import sample, sampling_copy
from scale import speed

CASES = {
    "untied": {"tie_word_embeddings": False},
    "tied, bias": {"attention_bias": True},
    "qwen2, odd widths": {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 40,
        "intermediate_size": 53,
        "head_dim": 10,
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
    },
    "qwen3": {"architectures": ["Qwen3ForCausalLM"]},
}


def random_case(case: str) -> Transformer:
    """Biases and norms are random too: their defaults would hide a missing one."""
    model = random_model(TINY | CASES[case])
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            torch.nn.init.normal_(weight, 1.0 if "norm" in name else 0.0, 0.2)
    return model


@pytest.fixture
def packed_from_0(monkeypatch):
    """Pack all layers of sampling copies, small as they are."""
    monkeypatch.setattr(speed, "PACKED_FROM", 0)
    monkeypatch.setattr(sampler, "swap_layers", speed.pack_layers)


# ---- the file can be deleted


def test_nothing_else_refers_to_it():
    """Fault: the product does not run without scale/speed.py and the line that calls it."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]
    product = [f for f in files if f.parent.name not in ("tests", "bench") and f.name != "speed.py"]
    assert len(product) > 10
    uses = []
    for file in product:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.alias) and node.name.split(".")[-1] == "speed":
                uses.append((file.name, "import"))
            elif isinstance(node, ast.ImportFrom) and node.module == "scale.speed":
                uses.append((file.name, "from"))
            elif isinstance(node, ast.Call) and "speed." in ast.unparse(node.func):
                uses.append((file.name, ast.unparse(node)))
    assert uses == [("rloop.py", "import"), ("rloop.py", "speed.swap_in()")]


def test_swap_in_replaces_the_plain_parts():
    """Fault: the faster parts exist, but no run uses them; or they are used without the call."""
    assert packing.Packed.attend is PLAIN_ATTEND and sampler.swap_layers is PLAIN_LAYERS
    speed.swap_in()
    assert packing.Packed.attend is speed.attend and sampler.swap_layers is speed.pack_layers


def test_second_import_under_another_name():
    """Fault: an operator is defined twice, which PyTorch refuses."""
    spec = importlib.util.spec_from_file_location("speed_again", ROOT / "scale" / "speed.py")
    again = importlib.util.module_from_spec(spec)
    with unittest.mock.patch.dict(sys.modules, {"speed_again": again}):
        spec.loader.exec_module(again)
    assert again.PackedLinear is not speed.PackedLinear


# ---- memory


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_freed_memory_is_kept():
    """Fault: the allocator's setting does not work, so every step faults its memory in again."""

    def faults(num_blocks: int) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(num_blocks):
            torch.ones(2**24)  # 64 MB: 16,384 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    speed.keep_freed_memory()
    faults(10)  # until the heap has a hole of that size
    assert faults(5) < 100


# ---- training attention

RAGGED = {
    "one row": [(1, [1])],
    "one group": [(5, [3, 1, 6])],
    "groups of different sizes": [(5, [3, 1, 6]), (1, [2]), (3, [2, 2, 4, 7, 1])],
    "short prompts, long responses": [(1, [17, 4]), (2, [1, 1])],
    "long prompts, short responses": [(23, [1, 1]), (4, [1, 2, 3])],
}


@pytest.mark.parametrize(("H", "K", "E"), [(4, 4, 8), (4, 2, 8), (6, 1, 4)])
@pytest.mark.parametrize("lengths", RAGGED)
def test_attention_in_two_parts_equals_attention_by_rows(lengths, H, K, E):
    """Fault: a response sees another response, padding, the future or another group's prompt; the
    scale, the order of heads, or the gradient of a token of several rows is wrong."""
    groups = [
        [Row(prompt_ids=[1] * prompt, ids=[2] * length) for length in responses]
        for prompt, responses in RAGGED[lengths]
    ]
    batch, generator = pack(groups), torch.Generator().manual_seed(0)
    M = len(batch.ids_M)
    q, k, v = (torch.randn(M, heads, E, generator=generator) for heads in (H, K, K))
    factor = torch.randn(M, H, E, generator=generator)
    results = []
    for attend in (PLAIN_ATTEND, speed.attend):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        y = attend(batch, 0, *inputs)
        results.append((y, *torch.autograd.grad((y * factor).sum(), inputs)))
    for plain, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)


def test_attention_follows_the_batch():
    """Fault: the places of an earlier micro-batch are used for the next one of equal size."""
    x = torch.randn(9, 2, 4, generator=torch.Generator().manual_seed(0))
    for responses in ([2, 4], [4, 2], [3, 3]):
        batch = pack([[Row(prompt_ids=[1] * 3, ids=[2] * length) for length in responses]])
        for _ in range(2):
            plain, fast = (a(batch, 0, x, x, x) for a in (PLAIN_ATTEND, speed.attend))
            torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)


def test_attention_of_long_responses_is_by_rows(monkeypatch):
    """Fault: attention weights of responses of thousands of tokens fill the memory."""
    batch = pack([[Row(prompt_ids=[1] * 3, ids=[2] * speed.LONG + [3])]])
    x = torch.zeros(len(batch.ids_M), 1, 2)
    monkeypatch.setattr(speed, "layout", None)
    assert torch.equal(speed.attend(batch, 0, x, x, x), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recomputed", [False, True])
def test_training_with_the_faster_attention_gives_the_same(dtype, recomputed, monkeypatch):
    """Fault: log-probs, entropies or gradients of a whole model change by more than rounding, also
    where the blocks are computed a second time."""
    model = random_model(TINY)
    for block in model.model.layers:
        block.checkpoint_activations = recomputed
    ids = torch.randint(1, 61, (80,), generator=torch.Generator().manual_seed(0)).tolist()
    lengths = [(5, [3, 1, 9, 4]), (1, [12]), (8, [7, 7, 10])]
    batch = pack([[Row(prompt_ids=ids[:p], ids=ids[p : p + r]) for r in rs] for p, rs in lengths])

    def results(compute_dtype) -> list[torch.Tensor]:
        model.compute_dtype = compute_dtype
        logp, entropy = token_logprobs(model, batch, 0.7)
        gradients = torch.autograd.grad(logp.sum(), list(model.parameters()))
        return [logp.detach(), entropy, torch.cat([g.flatten() for g in gradients])]

    exact, plain = results(torch.float32), results(dtype)
    monkeypatch.setattr(packing.Packed, "attend", speed.attend)
    for fast, by_rows, reference in zip(results(dtype), plain, exact, strict=True):
        if dtype == torch.float32:
            assert (fast - by_rows).norm() < 1e-5 * by_rows.norm()
        else:
            assert (fast - reference).norm() < 2 * (by_rows - reference).norm()


# ---- packed weights of a sampling copy


def assert_packed(copy: Transformer) -> None:
    packed = [m for m in copy.modules() if isinstance(m, speed.PackedLinear)]
    can = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert len(packed) == (7 * len(copy.model.layers) + 1 if can else 0)
    assert can == (not any(isinstance(m, Linear) for m in copy.modules()))


@pytest.mark.parametrize("case", CASES)
def test_packed_weights_give_the_same_logits(case, packed_from_0):
    """Fault: a copy's products leave out a bias, a tied head, or a width or number of rows that is
    no multiple of oneDNN's blocks; or round more than bfloat16 does."""
    exact = random_case(case)
    copy = sampling_copy(exact, "bfloat16")
    half = random_case(case).bfloat16()
    assert_packed(copy)
    ids = torch.randint(0, 61, (3, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = exact(ids)
        error = (half(ids) - expected).abs().max()
        cache, steps = KVCache(copy, 3, 5), []
        for t in range(5):
            pos = torch.full((3, 1), t)
            steps.append(copy.logits(copy.hidden(ids[:, t : t + 1], pos, cache.at(pos, t + 1))))
        for got in (copy(ids), torch.cat(steps, dim=1)):
            assert got.dtype == torch.float32
            assert (got - expected).abs().max() < 2 * error < 0.2 * expected.abs().max()


def test_packed_weights_are_those_of_now(tiny, packed_from_0):
    """Fault: a weight is packed under another's name, or an earlier step's is used."""
    sampling_copy(tiny, "bfloat16")
    with torch.no_grad():
        for weight in tiny.parameters():
            weight.add_(1.0)
    copy = sampling_copy(tiny, "bfloat16")
    assert_packed(copy)
    kept = dict(copy.named_parameters())
    for name, module in copy.named_modules():
        if isinstance(module, speed.PackedLinear):
            kept[f"{name}.weight"] = module.packed.to_dense()
    assert torch.equal(kept.pop("lm_head.weight"), tiny.head_weight.bfloat16())
    assert kept.keys() == dict(tiny.named_parameters()).keys()
    for name, weight in tiny.named_parameters():
        assert torch.equal(kept[name], weight.bfloat16()), name


def test_weights_that_do_not_pay_or_cannot_be_packed_stay(tiny, monkeypatch):
    """Fault: small products get slower; or weights on a machine without oneDNN are lost."""
    monkeypatch.setattr(sampler, "swap_layers", speed.pack_layers)

    def num_packed() -> int:
        copy = sampling_copy(tiny, "bfloat16")
        copy(torch.tensor([[1, 2]]))
        return sum(isinstance(module, speed.PackedLinear) for module in copy.modules())

    assert num_packed() == 0  # all weights are smaller than PACKED_FROM
    monkeypatch.setattr(speed, "PACKED_FROM", 0)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert num_packed() == 0


def test_samples_from_packed_weights_agree_with_training(tiny, packed_from_0):
    """Fault: the sampler's log-probs are those of other weights than are trained."""
    tiny.compute_dtype = torch.bfloat16
    copy, prompts = sampling_copy(tiny, "bfloat16"), [[3, 4, 5], [9]]
    options = {"num_samples": 4, "max_new_tokens": 12, "stop_ids": {0}, "seed": 0, "max_rows": 5}
    groups = [
        [Row(prompt_ids=prompt, ids=c.ids, sampler_logps=c.logps) for c in completions]
        for prompt, completions in zip(prompts, sample(copy, prompts, **options), strict=True)
    ]
    batch = pack(groups)
    sampled = batch.concatenate([row.sampler_logps for row in batch.rows])
    with torch.no_grad():
        trained, _ = token_logprobs(tiny, batch)
        tiny.compute_dtype = None
        exact, _ = token_logprobs(tiny, batch)
    assert 0 < (trained - sampled).norm() < 1.5 * (trained - exact).norm()


def test_packed_weights_are_no_constants_of_a_compilation(tiny, packed_from_0):
    """Fault: a compiled copy computes something else, keeps the weights of an earlier step's copy,
    or is compiled again at every step."""
    torch._dynamo.reset()
    ids = torch.arange(60).view(3, 20)

    @torch.no_grad()
    def error(compiled: bool) -> float:
        copy = sampling_copy(tiny, "bfloat16", compiled)
        assert_packed(copy)
        return float((copy(ids) - tiny(ids)).abs().max())

    rounding = error(compiled=False)
    assert error(compiled=True) < 2 * rounding
    with torch.no_grad():
        for weight in tiny.parameters():
            weight.mul_(1.1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert error(compiled=True) < 4 * rounding


# ---- the limits of bench.limits


@pytest.mark.parametrize("case", ["tied, bias", "qwen2, odd widths"])
def test_counted_operations(case):
    """Fault: bench.limits counts other products than a forward pass has, as PyTorch counts them."""
    model, ids = random_case(case), torch.arange(60).view(3, 20)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids)
    work = limits.Work(model, torch.bfloat16)
    counted = work.forward(tokens=60, logits=60, seen=3 * 20 * 20)
    assert counted == counter.get_total_flops() > 0


def test_limits_of_sampling_and_training():
    """Fault: a limit counts steps, rows or the backward pass once too often or not at all."""
    work, args = limits.Work(random_case("tied, bias"), torch.bfloat16), SimpleNamespace()
    args.rows, args.groups, args.prompt_tokens, args.new_tokens = 16, 3, 4, 2
    prompts = work.forward(2 * 4, 2, 2 * 8)
    step = work.forward(16, 16, 16 * 5)
    assert limits.sampling_limit(work, args, 1.0, torch.inf) == prompts + step
    assert limits.sampling_limit(work, args, torch.inf, 1.0) == work.read(16 * 5)
    tokens = work.forward(4 + 8 * 2, 8 * 2, 8 + 8 * 2 * 5)
    assert limits.training_limit(work, args, 1.0) == 9 * tokens
