"""packing.py against rows that are computed one at a time."""

import pytest
import torch
from conftest import TINY, random_model

import packing
from packing import Row, micro_batches, pack, token_logprobs
from sampler import sample, sampling_copy


def group(prompt: list[int], responses: list[list[int]]) -> list[Row]:
    return [Row(prompt_ids=prompt, ids=ids, weight=0.5) for ids in responses]


EXAMPLE = [group([7, 8], [[1, 2], [3]]), group([9], [[4, 5]])]  # of pack's docstring
GROUPS = [
    group([3, 4, 5, 6, 7], [[6, 7, 0], [8], [1, 2, 3, 4, 5, 0]]),
    group([9], [[8, 0]]),
    group([5, 5, 6], [[1, 2], [1, 2], [60, 0, 0, 4]]),
]


def one_by_one(model, groups, temperature):
    """Log-probs and entropies of the response tokens from the full forward of each row."""
    logps, entropies = [], []
    for row in [row for rows in groups for row in rows]:
        logits_TV = model(torch.tensor([row.prompt_ids + row.ids]))[0] / temperature
        logp_TV = logits_TV.log_softmax(-1)[len(row.prompt_ids) - 1 : -1]
        logps.append(logp_TV.gather(-1, torch.tensor(row.ids)[:, None])[:, 0])
        entropies.append(-(logp_TV.exp() * logp_TV).sum(-1))
    return torch.cat(logps), torch.cat(entropies)


@pytest.mark.parametrize("at_once", [61, 400, 2**24])  # one token, some tokens, all tokens
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "tie_word_embeddings": False},
    ],
)
def test_logprobs_entropies_and_gradients_equal_single_rows(config, at_once, monkeypatch):
    """Fault: a response sees another response, padding or the future; positions do not restart; the
    shift by one token; the temperature; a part of the head's gradient is lost between chunks, or
    comes from another chunk's logits; the entropy has a gradient."""
    monkeypatch.setattr(packing, "LOGITS_AT_ONCE", at_once)
    model = random_model(TINY | config)
    logp, entropy = token_logprobs(model, pack(GROUPS), 0.7)
    expected_logp, expected_entropy = one_by_one(model, GROUPS, 0.7)
    assert logp.dtype == entropy.dtype == torch.float32 and not entropy.requires_grad
    torch.testing.assert_close(logp, expected_logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy.detach(), rtol=1e-5, atol=1e-5)
    factor = torch.randn(len(logp), generator=torch.Generator().manual_seed(0))
    names, weights = zip(*model.named_parameters(), strict=True)
    got = torch.autograd.grad((logp * factor).sum(), weights)
    expected = torch.autograd.grad((expected_logp * factor).sum(), weights)
    for name, a, b in zip(names, got, expected, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm(), name


def test_docstring_examples(tiny):
    """Fault: the worked examples of pack and token_logprobs say something else than the code."""
    batch = pack(EXAMPLE)
    assert batch.ids_M.tolist() == [7, 8, 9, 1, 2, 3, 4, 5]
    assert batch.pos_M.tolist() == [0, 1, 0, 2, 3, 2, 1, 2]
    assert batch.targets_Q.tolist() == [1, 2, 3, 4, 5]
    assert batch.predictors_Q.tolist() == [1, 3, 1, 2, 6]
    assert batch.row_tokens_BT.tolist() == [[0, 1, 3, 4], [0, 1, 5, 0], [2, 6, 7, 0]]
    assert batch.home_M.tolist() == [0, 1, 8, 2, 3, 6, 9, 10]
    logp, _ = token_logprobs(tiny, batch)
    texts = [([7, 8], 1), ([7, 8, 1], 2), ([7, 8], 3), ([9], 4), ([9, 4], 5)]
    expected = [tiny(torch.tensor([ids]))[0, -1].log_softmax(-1)[target] for ids, target in texts]
    torch.testing.assert_close(logp, torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("at_once", [61 * 100, 61 * 2000])
def test_no_more_logits_are_held_than_may_be(tiny, at_once, monkeypatch):
    """Fault: vocabulary-sized logits of a whole batch are kept for the gradient, which is what runs
    out of memory first; or the backward pass makes them all at once; or logits that fit are
    computed twice."""
    monkeypatch.setattr(packing, "LOGITS_AT_ONCE", at_once)
    saved, made, logits = [], [], tiny.logits
    monkeypatch.setattr(tiny, "logits", lambda x: made.append(len(x)) or logits(x))
    batch = pack([group([1] * 3, [[2] * 40] * 50)])
    hooks = torch.autograd.graph.saved_tensors_hooks
    with hooks(lambda x: saved.append(x) or x, lambda x: x):
        logp, _ = token_logprobs(tiny, batch)
    logp.sum().backward()
    assert (2003, 32) in [x.shape for x in saved]
    kept = {x.data_ptr(): len(x) for x in saved if x.shape[1:] == (61,) and len(x) > 32}
    if at_once == 61 * 2000:
        assert made == [2000] and list(kept.values()) == [2000]
    else:
        assert made == [100] * 40 and not kept


def test_packed_tokens_hold_the_prompt_once():
    """Fault: the prompt is computed once for every response, or padding is computed."""
    batch = pack(GROUPS)
    prompts, responses = [3, 4, 5, 6, 7, 9, 5, 5, 6], [6, 7, 0, 8, 1, 2, 3, 4, 5, 0, 8, 0]
    assert batch.ids_M.tolist() == prompts + responses + [1, 2, 1, 2, 60, 0, 0, 4]
    assert batch.pos_M.tolist()[9:19] == [5, 6, 7, 5, 5, 6, 7, 8, 9, 10]
    assert batch.predictors_Q.tolist()[:10] == [4, 9, 10, 4, 4, 13, 14, 15, 16, 17]


def test_values_are_in_the_order_of_the_tokens():
    """Fault: a row's weight, advantage or old log-probs go to another row's tokens."""
    batch = pack(EXAMPLE)
    assert batch.per_token([0.25, 2.0, 4.0]).tolist() == [0.25, 0.25, 2.0, 4.0, 4.0]
    values = [[0.5 * token for token in row.ids] for row in batch.rows]
    assert batch.concatenate(values).tolist() == [0.5 * i for i in batch.targets_Q.tolist()]


@pytest.mark.parametrize("max_tokens", [1, 8, 11, 20, 1000])
def test_micro_batches_hold_every_response_once_largest_first(max_tokens):
    """Fault: a response is lost, doubled or put under another's row; the largest batch comes late,
    and with it the lack of memory."""
    rows = [id(row) for rows in GROUPS for row in rows]
    batches = list(micro_batches(GROUPS, max_tokens))
    assert sorted(id(row) for batch in batches for row in batch.rows) == sorted(rows)
    for batch in batches:
        assert batch.targets_Q.tolist() == [token for row in batch.rows for token in row.ids]
        assert len(batch.ids_M) <= max_tokens or len(batch.rows) == 1
    if max_tokens < 20:
        assert len(batches[0].ids_M) == max(len(batch.ids_M) for batch in batches)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_bfloat16_logprobs_are_as_near_to_the_samplers_as_rounding_allows(temperature):
    """Fault: training rounds elsewhere than sampling does (float32 norms, a float32 residual
    stream, weights that are not cast), so that both are exact enough but differ from each other."""
    config = {"hidden_size": 64, "initializer_range": 0.15, "tie_word_embeddings": False}
    policy, prompts = random_model(TINY | config), [[3, 4, 5, 6], [7, 8], [9] * 9]
    policy.compute_dtype = torch.bfloat16
    copy = sampling_copy(policy, "bfloat16")
    options = {"num_samples": 8, "max_new_tokens": 40, "stop_ids": {0}, "seed": 0, "max_rows": 24}
    groups = [
        [Row(prompt_ids=prompt, ids=c.ids, sampler_logps=c.logps) for c in completions]
        for prompt, completions in zip(
            prompts, sample(copy, prompts, temperature=temperature, **options), strict=True
        )
    ]
    batch = pack(groups)
    sampled = batch.concatenate([row.sampler_logps for row in batch.rows])
    with torch.no_grad():
        trained, _ = token_logprobs(policy, batch, temperature)
        of_copy, _ = token_logprobs(copy, batch, temperature)
        policy.compute_dtype = None
        exact, _ = token_logprobs(policy, batch, temperature)
    assert torch.equal(trained, of_copy)  # float32 masters, cast, are the copy's weights
    assert 0 < (trained - sampled).norm() < (trained - exact).norm()  # the same roundings
