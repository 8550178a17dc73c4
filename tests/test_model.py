"""model.py against transformers, and the cache against the full forward."""

import functools

import pytest
import torch
import transformers
from conftest import CASES, assert_same_logits, hf_model

from model import KVCache, Transformer
from packing import Row, pack, token_logprobs
from sampler import sample


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, tmp_path):
    """Fault: a wrong RoPE layout or scaling, norm placement, kv-head order, bias, qk-norm or head
    tying."""
    theirs = hf_model(case)
    theirs.save_pretrained(tmp_path)
    ours = Transformer.from_pretrained(tmp_path)
    assert_same_logits(ours, theirs, 3, 40)


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_equal_transformers(case, tmp_path):
    """Fault: prefill, decoding by the cache, or positions differ from transformers' generate."""
    theirs = hf_model(case)
    theirs.save_pretrained(tmp_path)
    prompts = [[5, 6, 7], [9, 1, 4, 4, 80, 2, 33]]
    ours = Transformer.from_pretrained(tmp_path)
    options = {"num_samples": 1, "max_new_tokens": 24, "top_k": 1, "stop_ids": set()}
    got = sample(ours, prompts, **options, seed=0, max_rows=2)
    greedy = transformers.GenerationConfig(do_sample=False, max_new_tokens=24, pad_token_id=0)
    for prompt, (completion,) in zip(prompts, got, strict=True):
        mask = torch.ones(1, len(prompt))
        ids = torch.tensor([prompt])
        expected = theirs.generate(ids, attention_mask=mask, generation_config=greedy)
        assert completion.ids == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cached_decode_equals_full_forward(tiny, dtype):
    """Fault: the KV cache, its positions or its mask differ from the causal forward; rows of
    different lengths see each other's slots; what is stored is lost when the cache grows."""
    generator = torch.Generator().manual_seed(0)
    lengths, new, tiny = [3, 9, 1, 6], 40, tiny.to(dtype)
    longest = max(lengths)
    ids = torch.randint(0, 61, (4, longest + new), generator=generator)
    cache = KVCache(tiny, 4, longest)
    close = {"rtol": 1e-5, "atol": 1e-5}
    with torch.no_grad():
        full = tiny(ids)
        pos = torch.arange(longest).expand(4, -1)
        prefill = tiny.hidden(ids[:, :longest], pos, cache.at(pos, longest))
        for b, length in enumerate(lengths):
            got = tiny.logits(prefill[b, length - 1])
            torch.testing.assert_close(got, full[b, length - 1], **close)
        for t in range(new):  # each row at its own position, over leftovers of the padded prefill
            pos = torch.tensor([[length + t] for length in lengths])
            attend = cache.at(pos, int(pos.max()) + 1)
            got = tiny.logits(tiny.hidden(ids.gather(1, pos), pos, attend)[:, 0])
            torch.testing.assert_close(got, full[torch.arange(4), pos[:, 0]], **close)


def test_right_padding_does_not_reach_back(tiny):
    """Fault: padding changes the logits of real tokens."""
    ids = torch.randint(1, 61, (1, 8), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(tiny(padded)[:, :8], tiny(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", ["bfloat16", "float32 masters"])
def test_bfloat16_keeps_rope_angles_exact(tiny, weights, monkeypatch):
    """Fault: half-precision weights or activations round the RoPE angles, which ruins long
    contexts; or the logits are not float32."""
    half = tiny.bfloat16() if weights == "bfloat16" else tiny
    half.compute_dtype = torch.bfloat16
    block, seen = half.model.layers[0], []
    run = block.run
    monkeypatch.setattr(
        block, "run", lambda x, rope, attend: seen.append(rope) or run(x, rope, attend)
    )
    positions = [0, 1, 1000, 4097, 100_003]
    logits = half.logits(half.hidden(torch.ones(1, 5, dtype=torch.long), torch.tensor([positions])))
    assert logits.dtype == torch.float32
    freq = 1 / 10000.0 ** (torch.arange(0, 8, 2).double() / 8)
    angle = torch.tensor(positions).double()[:, None] * freq
    for got, expected in zip(seen[0], (angle.cos(), angle.sin()), strict=True):
        error = (got[0, :, 0].double() - torch.cat([expected] * 2, dim=-1)).abs()
        assert error.max() < 2**-8 + 0.01  # of bfloat16, and of a float32 angle of 100,003 radians


def test_weights_stay_float32_where_activations_are_bfloat16(tiny):
    """Fault: the gradient of float32 weights is rounded to bfloat16 before it is summed; or
    bfloat16 activations give other gradients than rounding explains."""
    groups = [
        [Row(prompt_ids=[1, 2, 3 + n], ids=[4, 5 + g, 6, 7]) for g in range(4)] for n in range(4)
    ]

    def gradient(dtype) -> torch.Tensor:
        tiny.zero_grad()
        tiny.compute_dtype = dtype
        hidden = tiny.hidden(torch.tensor([[1, 2]]))
        assert hidden.dtype == dtype
        for group in groups:
            token_logprobs(tiny, pack([group]))[0].mean().backward()
        assert {weight.grad.dtype for weight in tiny.parameters()} == {torch.float32}
        return torch.cat([weight.grad.flatten() for weight in tiny.parameters()])

    exact, half = gradient(torch.float32), gradient(torch.bfloat16)
    assert (half != half.bfloat16()).float().mean() > 0.5  # sums of several micro-batches
    print((half - exact).norm() / exact.norm())
    assert 0 < (half - exact).norm() < 0.05 * exact.norm()


def test_compiled_blocks_give_the_same_logprobs_gradients_and_samples(tiny, monkeypatch):
    """Fault: torch.compile changes what is computed or the names of the weights, or compiles every
    block or every number of tokens again. (The graphs run without generated C++, which takes a
    minute to compile; test_speed.py runs some with it.)"""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    groups = [
        [Row(prompt_ids=[3, 4, 5], ids=ids) for ids in ([6, 7, 8, 9], [10, 11])],
        [Row(prompt_ids=[12], ids=ids) for ids in ([13, 14, 15], [16])],
    ]
    options = {"num_samples": 3, "max_new_tokens": 6, "stop_ids": set(), "seed": 1, "max_rows": 9}

    def results():
        tiny.zero_grad()
        logp, entropy = token_logprobs(tiny, pack(groups))
        logp.sum().backward()
        gradients = [weight.grad.clone() for weight in tiny.parameters()]
        completions = sample(tiny, [[3, 4, 5], [6]], **options)
        return logp.detach(), entropy, gradients, [c.ids for group in completions for c in group]

    logp, entropy, gradients, ids = results()
    names = set(tiny.state_dict())
    tiny.compile_blocks()
    compiled = results()
    torch.testing.assert_close(compiled[0], logp, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(compiled[1], entropy, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(compiled[2], gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    assert compiled[3] == ids
    assert set(tiny.state_dict()) == names
    longer = [Row(prompt_ids=[3, 4], ids=[6, 7, 8, 9, 10, 11]), Row(prompt_ids=[3, 4], ids=[1, 2])]
    with torch._dynamo.config.patch(error_on_recompile=True):
        token_logprobs(tiny, pack([longer]))[0].sum().backward()
        sample(tiny, [[1, 2, 3, 4], [6, 7], [8]], **options)
