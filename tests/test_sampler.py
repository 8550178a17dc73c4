"""sampler.py against a sampler without a cache that decodes one row at a time."""

import numpy as np
import pytest
import torch

import sampler
from sampler import draw, sample, sampled_log_softmax

PROMPTS = [[5, 6, 7], [9], [3, 4, 5, 6, 7, 8, 9, 10, 11], [5, 6, 7], [20, 21]]
STOP = {0, 7}


def reference_sample(model, prompts, num_samples, max_new_tokens, seed, stop_ids, **options):
    """Same random numbers, no cache, no batch: the full forward for each token of each row."""
    results = []
    for p, prompt in enumerate(prompts):
        results.append([])
        for g in range(num_samples):
            uniforms = np.random.default_rng((seed, p, g)).random(max_new_tokens)
            ids, logps = [], []
            for uniform in uniforms:
                with torch.no_grad():
                    logits = model(torch.tensor([prompt + ids]))[:, -1]
                logp = sampled_log_softmax(logits, **options)
                ids.append(int(draw(logp, torch.tensor([uniform]))))
                logps.append(float(logp[0, ids[-1]]))
                if ids[-1] in stop_ids:
                    break
            results[-1].append((ids, logps, ids[-1] in stop_ids))
    return results


@pytest.mark.parametrize("max_rows", [1, 3, 20, 1000])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"temperature": 1.3, "top_k": 9, "top_p": 0.9},
    ],
)
def test_equals_uncached_one_row_reference(tiny, max_rows, options):
    """Fault: cache, slot refill, compaction, prompt sharing or padding changes what a row sees; max_rows changes the result."""
    got = sample(
        tiny,
        PROMPTS,
        num_samples=4,
        max_new_tokens=12,
        stop_ids=STOP,
        seed=3,
        max_rows=max_rows,
        **options,
    )
    expected = reference_sample(tiny, PROMPTS, 4, 12, 3, STOP, **({"temperature": 1.0} | options))
    for group, expected_group in zip(got, expected, strict=True):
        for completion, (ids, logps, finished) in zip(group, expected_group, strict=True):
            assert completion.ids == ids and completion.finished == finished
            np.testing.assert_allclose(completion.logps, logps, atol=2e-5)


def test_lengths_are_mixed(tiny):
    """Fault: the comparison above is empty because every row stops at once, or none does."""
    rows = [
        c
        for g in sample(
            tiny, PROMPTS, num_samples=4, max_new_tokens=12, stop_ids=STOP, seed=3, max_rows=3
        )
        for c in g
    ]
    assert (
        len({len(c.ids) for c in rows}) > 4
        and any(c.finished for c in rows)
        and any(not c.finished for c in rows)
    )
    for c in rows:
        assert (
            len(c.ids) == len(c.logps)
            and not STOP & set(c.ids[:-1])
            and c.finished == (c.ids[-1] in STOP)
        )


def test_equal_prompts_get_different_samples(tiny):
    """Fault: equal prompts are merged or share a random stream."""
    got = sample(
        tiny, [[5, 6, 7]] * 2, num_samples=3, max_new_tokens=12, stop_ids=set(), seed=0, max_rows=4
    )
    assert len({tuple(c.ids) for g in got for c in g}) == 6


def test_seed_decides(tiny):
    """Fault: the sampler draws from a global generator."""
    options = dict(num_samples=2, max_new_tokens=8, stop_ids=set(), max_rows=8)
    a, b, c = (sample(tiny, PROMPTS, seed=seed, **options) for seed in (1, 1, 2))
    assert a == b and a != c


def test_arguments_are_not_modified(tiny):
    """Fault: prompts grow in place while decoding."""
    prompts, stop = [list(p) for p in PROMPTS], set(STOP)
    sample(tiny, prompts, num_samples=2, max_new_tokens=5, stop_ids=stop, seed=0, max_rows=3)
    assert prompts == PROMPTS and stop == STOP


def test_frequencies_follow_the_distribution(tiny):
    """Fault: inverse-CDF sampling is off by one or biased (chi-square of 20,000 first tokens)."""
    got = sample(
        tiny,
        [[5, 6, 7]],
        num_samples=20_000,
        max_new_tokens=1,
        stop_ids=set(),
        seed=0,
        max_rows=20_000,
        temperature=1.5,
    )
    with torch.no_grad():
        expected = (tiny(torch.tensor([[5, 6, 7]]))[0, -1] / 1.5).softmax(
            -1
        ).double().numpy() * 20_000
    counts = np.bincount([c.ids[0] for c in got[0]], minlength=61)
    big = expected > 5
    chi2 = ((counts - expected)[big] ** 2 / expected[big]).sum()
    assert big.sum() > 10 and chi2 < big.sum() + 4 * np.sqrt(2 * big.sum())


def test_top_k_and_top_p_match_transformers():
    """Fault: the cut distribution differs from the usual one, or keeps nothing when one token has all the mass."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * 4
    for temperature, top_k, top_p in [
        (0.6, 5, 1.0),
        (1.0, 0, 0.7),
        (1.4, 12, 0.5),
        (1.0, 0, 1e-6),
        (1.0, 100, 0.9),
    ]:
        scores = TemperatureLogitsWarper(temperature)(None, logits)
        if top_k:
            scores = TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1:
            scores = TopPLogitsWarper(top_p)(None, scores)
        torch.testing.assert_close(
            sampled_log_softmax(logits, temperature, top_p, top_k),
            scores.log_softmax(-1),
            rtol=1e-4,
            atol=1e-5,
        )


def test_draw_never_takes_an_impossible_token():
    """Fault: a uniform number at either end picks a token of probability 0."""
    logp = torch.tensor([[0.0, 0.0, 0.5, 0.5, 0.0]]).log().repeat(3, 1)
    assert draw(logp, torch.tensor([0.0, 0.4999, 1 - 2**-53], dtype=torch.float64)).tolist() == [
        2,
        2,
        3,
    ]


@pytest.mark.parametrize("vocabulary", [1, 127, 128, 129, 1000])
def test_draw_equals_brute_force(vocabulary):
    """Fault: a token of the wrong block, behind the last one, or of probability 0."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(200, vocabulary, generator=generator) * 3
    logits[torch.rand(logits.shape, generator=generator) < 0.7] = -torch.inf
    logits[:, vocabulary // 2] = 0.0
    uniform = torch.rand(200, generator=generator, dtype=torch.float64)
    uniform[:4] = torch.tensor([0.0, 1 - 2**-53, 1 - 2**-24, 2**-60])
    drawn = draw(logits.log_softmax(-1), uniform)
    prob = logits.double().softmax(-1)
    assert (prob.gather(-1, drawn[:, None]) > 0).all()
    cdf = prob.cumsum(-1)
    low, high = cdf - prob, cdf  # the uniform number lies in the drawn token's share, up to float32
    assert (low.gather(-1, drawn[:, None])[:, 0] <= uniform + 1e-6).all() and (
        high.gather(-1, drawn[:, None])[:, 0] >= uniform - 1e-6
    ).all()


def test_not_finite_logits_stop(tiny):
    """Fault: NaN weights produce text of one repeated token instead of an error."""
    with torch.no_grad():
        tiny.model.norm.weight[0] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        sample(tiny, [[1]], num_samples=1, max_new_tokens=3, stop_ids=set(), seed=0, max_rows=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_rows": 0}, "max_rows"),
    ],
)
def test_arguments_out_of_range_are_errors(tiny, change, message):
    """Fault: a bad option hangs, divides by zero or returns nothing."""
    options = dict(num_samples=1, max_new_tokens=3, stop_ids=set(), seed=0, max_rows=2) | change
    with pytest.raises(ValueError, match=message):
        sample(tiny, [[1]], **options)


def test_bad_prompts_are_errors(tiny):
    """Fault: an empty prompt or a foreign id crashes deep in the model."""
    options = dict(num_samples=1, max_new_tokens=3, stop_ids=set(), seed=0, max_rows=2)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        sample(tiny, [[1], []], **options)
    with pytest.raises(ValueError, match="prompt 0 has ids outside"):
        sample(tiny, [[61]], **options)
    assert sample(tiny, [], **options) == []


@pytest.mark.parametrize("max_rows", [3, 100])
def test_drawing_several_tokens_between_looks_changes_nothing(tiny, monkeypatch, max_rows):
    """Fault: tokens drawn behind a stop or behind the limit are kept, or a row's random numbers or positions slip (the CUDA path)."""
    arguments = {
        "num_samples": 5,
        "max_new_tokens": 10,
        "stop_ids": {0, 7, 9},
        "seed": 4,
        "max_rows": max_rows,
    }
    one = sample(tiny, [[3, 4, 5], [6, 7], [8]], **arguments)
    monkeypatch.setitem(sampler.STRIDE, "cpu", 4)
    four = sample(tiny, [[3, 4, 5], [6, 7], [8]], **arguments)
    assert [[c.ids for c in group] for group in four] == [[c.ids for c in group] for group in one]
    assert any(c.finished and len(c.ids) < 10 for group in one for c in group)
    for a, b in zip(
        (c for group in one for c in group), (c for group in four for c in group), strict=True
    ):
        assert a.finished == b.finished
        assert b.logps == pytest.approx(a.logps, abs=1e-5)


@pytest.mark.parametrize("max_rows", [3, 7, 100])
def test_rows_and_slots_rounded_up_for_cuda_graphs_change_nothing(tiny, monkeypatch, max_rows):
    """Fault: the rows behind the live ones write into a row that is alive, or a graph is replayed with the numbers of another step (what
    can be tested of it without a GPU: the steps are not captured here)."""
    arguments = {
        "num_samples": 5,
        "max_new_tokens": 40,
        "stop_ids": {0, 7},
        "seed": 4,
        "max_rows": max_rows,
        "first_prompt": 2,
    }
    prompts, made = [[3, 4, 5], [6, 7], [8] * 20], []
    plain = sample(tiny, prompts, **arguments)

    def graphs(model, cache):
        cache.grow(64)
        made.append(sampler._Graphs(model, cache, capture=False, row_bucket=4, slot_bucket=32))
        return made[-1]

    monkeypatch.setattr(sampler, "_decoder", graphs)
    rounded = sample(tiny, prompts, **arguments)
    assert [[c.ids for c in group] for group in rounded] == [
        [c.ids for c in group] for group in plain
    ]
    assert {slots for _, slots in made[0].graphs} == {32, 64} and len(made[0].graphs) <= 8
