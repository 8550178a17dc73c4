"""sampler.py against a sampler without a cache that decodes one row at a time."""

import numpy as np
import pytest
import torch
from conftest import TINY, random_model

import sampler
from sampler import draw, sample, sampled_log_softmax, sampling_copy

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
def test_equals_uncached_one_row_reference(tiny, options):
    """Fault: cache, slot refill, compaction, prompt sharing or padding changes what a row sees;
    max_rows changes the result: smaller than num_samples, equal to it, no multiple of it, or larger
    than all rows; tokens behind a stop or behind the limit are kept."""
    expected = reference_sample(tiny, PROMPTS, 4, 12, 3, STOP, **({"temperature": 1.0} | options))
    options |= {"num_samples": 4, "max_new_tokens": 12, "stop_ids": STOP, "seed": 3}
    for max_rows in (1, 3, 4, 6, 20, 1000):
        got = sample(tiny, PROMPTS, max_rows=max_rows, **options)
        for group, expected_group in zip(got, expected, strict=True):
            for completion, (ids, logps, finished) in zip(group, expected_group, strict=True):
                assert completion.ids == ids and completion.finished == finished
                np.testing.assert_allclose(completion.logps, logps, atol=2e-5)


@pytest.mark.parametrize("cut", [{}, {"top_k": 3, "top_p": 0.5}])
def test_temperature_0_is_greedy(tiny, cut):
    """Fault: temperature 0 divides by zero, draws at random, or its log-probs are not those of the
    distribution that is sampled from (one token has probability 1)."""
    options = {"max_new_tokens": 12, "temperature": 0, "stop_ids": STOP, "max_rows": 4} | cut
    groups = sample(tiny, PROMPTS, num_samples=3, seed=5, **options)
    assert groups == sample(tiny, PROMPTS, num_samples=3, seed=6, **options)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        ids = []
        while len(ids) < 12 and not STOP & {*ids}:
            ids.append(int(tiny(torch.tensor([prompt + ids]))[0, -1].argmax()))
        assert [c.ids for c in group] == [ids] * 3
        assert all(c.logps == [0.0] * len(ids) for c in group)
    ties = sampled_log_softmax(torch.tensor([[1.0, 3.0, 3.0, -torch.inf]]), 0.0, **cut)
    assert ties.tolist() == [[-torch.inf, 0.0, -torch.inf, -torch.inf]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_an_error(tiny, value, temperature):
    """Fault: a broken policy samples token 0 or the last one for ever, in greedy sampling too."""
    logits = tiny.logits
    tiny.logits = lambda x: logits(x).index_fill(-1, torch.tensor([17]), value)
    with pytest.raises(FloatingPointError, match="not finite"):
        sample(tiny, PROMPTS, num_samples=2, max_new_tokens=3, temperature=temperature,
               stop_ids=STOP, seed=0, max_rows=4)  # fmt: skip


@pytest.mark.parametrize("cut", [{}, {"temperature": 1.5, "top_k": 50, "top_p": 0.99}])
def test_ids_without_a_token_are_never_sampled(tiny, cut):
    """Fault: ids that the model has and the tokenizer has not (behind its last token, or between
    tokens) are sampled and lost in decoding, or keep a share of the probability."""
    unknown, options = torch.tensor([2, 30, *range(50, 61)]), {"temperature": 1.0} | cut
    arguments = {"num_samples": 40, "max_new_tokens": 8, "stop_ids": STOP, "seed": 0}
    free = sample(tiny, PROMPTS, max_rows=64, **arguments, **options)
    assert {id_ for group in free for c in group for id_ in c.ids} & {*unknown.tolist()}
    hidden = tiny.hidden(torch.tensor([PROMPTS[2]]))[0]
    known_logits = tiny.logits(hidden)[:, [i for i in range(61) if i not in unknown]]
    tiny.unknown_ids = unknown
    for policy in (tiny, sampling_copy(tiny, "bfloat16")):
        for group in sample(policy, PROMPTS, max_rows=64, **arguments, **options):
            assert not {id_ for c in group for id_ in c.ids} & {*unknown.tolist()}
    logp = sampled_log_softmax(tiny.logits(hidden), 0.7)
    assert (logp.exp()[:, unknown] == 0).all()
    expected = (known_logits / 0.7).log_softmax(-1)
    torch.testing.assert_close(logp[:, [i for i in range(61) if i not in unknown]], expected)


@pytest.mark.parametrize(("num_samples", "max_rows"), [(4, 8), (4, 9), (3, 2), (5, 1), (2, 1000)])
def test_rows_decoded_at_once_are_bounded_and_used(tiny, num_samples, max_rows, monkeypatch):
    """Fault: more rows are decoded at once than fit; or rows stay empty while prompts wait; or a
    prompt is prefilled once for each of its samples."""
    prefilled, decoded, decode, prefill = [], [], sampler._decode, sampler._prefill

    def counted_prefill(model, cache, prompts, admitted, start):
        prefilled.extend(dict.fromkeys(admitted))
        decoded.append(start + len(admitted))
        assert len(cache.k[0]) <= max_rows
        return prefill(model, cache, prompts, admitted, start)

    def counted_decode(model, cache, rows, id_R):
        decoded.append(len(rows))
        return decode(model, cache, rows, id_R)

    monkeypatch.setattr(sampler, "_prefill", counted_prefill)
    monkeypatch.setattr(sampler, "_decode", counted_decode)
    options = {"num_samples": num_samples, "max_new_tokens": 5, "stop_ids": set(), "seed": 0}
    sample(tiny, PROMPTS, max_rows=max_rows, **options)
    units = -(-num_samples // max_rows)
    assert sorted(prefilled) == sorted(units * list(range(len(PROMPTS))))
    at_once = min(max_rows // num_samples, len(PROMPTS)) * num_samples or max_rows
    assert max(decoded) == min(at_once, max_rows)


def test_a_share_of_the_prompts_gets_its_own_random_streams(tiny):
    """Fault: which process samples a prompt changes its responses."""
    options = {"num_samples": 3, "max_new_tokens": 8, "stop_ids": STOP, "seed": 1, "max_rows": 8}
    whole = sample(tiny, PROMPTS, **options)
    share = sample(tiny, PROMPTS[2:], first_prompt=2, **options)
    assert [[c.ids for c in group] for group in share] == [[c.ids for c in g] for g in whole[2:]]


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
    """Fault: the cut distribution differs from the usual one, or keeps nothing when one token has
    all the mass."""
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
        ({"temperature": -0.5}, "temperature"),
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
    with pytest.raises(ValueError, match="prompt 0: ids outside"):
        sample(tiny, [[61]], **options)
    assert sample(tiny, [], **options) == []


@pytest.mark.parametrize("tied", [True, False])
def test_sampling_copy_has_the_weights_of_now(tied):
    """Fault: sampling continues with the weights of an earlier step; a weight is left out or
    rounded twice; the copy shares memory with the policy or takes part in its training."""
    policy = random_model(TINY | {"tie_word_embeddings": tied})
    policy.compute_dtype = torch.bfloat16
    assert sampling_copy(policy, "float32") is policy
    earlier = sampling_copy(policy, "bfloat16")
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(1.0)
    copy = sampling_copy(policy, "bfloat16")
    assert copy.state_dict().keys() == policy.state_dict().keys()
    for name, weight in policy.named_parameters():
        mine = copy.get_parameter(name)
        assert torch.equal(mine, weight.bfloat16()) and not mine.requires_grad, name
        assert not torch.equal(earlier.get_parameter(name), mine), name
    assert all(weight.dtype == torch.float32 for weight in policy.parameters())
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(copy(ids), policy(ids))


def test_policy_with_bfloat16_activations_can_be_sampled_from(tiny):
    """Fault: float32 weights that compute in bfloat16 get a float32 cache, which attention
    refuses."""
    tiny.compute_dtype = torch.bfloat16
    options = {"num_samples": 2, "max_new_tokens": 8, "stop_ids": STOP, "seed": 1, "max_rows": 3}
    expected = sample(sampling_copy(tiny, "bfloat16"), PROMPTS, **options)
    assert sample(tiny, PROMPTS, **options) == expected
