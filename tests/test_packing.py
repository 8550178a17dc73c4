"""packing.py against rows that are computed one at a time."""

import itertools

import pytest
import torch
from conftest import TINY

import packing
from model import Transformer, TransformerConfig
from packing import micro_batches, pack, token_logprobs

GROUPS = [
    ([3, 4, 5, 6, 7], [[6, 7, 0], [8], [1, 2, 3, 4, 5, 0]]),
    ([9], [[8, 0]]),
    ([5, 5, 6], [[1, 2], [1, 2], [60, 0, 0, 4]]),
]


def one_by_one(model, groups, temperature):
    """Log-probs and entropies of the response tokens from the full forward of each row."""
    logps, entropies = [], []
    for prompt, responses in groups:
        for response in responses:
            logp_TV = (model(torch.tensor([prompt + response]))[0] / temperature).log_softmax(-1)[
                len(prompt) - 1 : -1
            ]
            logps.append(logp_TV.gather(-1, torch.tensor(response)[:, None])[:, 0])
            entropies.append(-(logp_TV.exp() * logp_TV).sum(-1))
    return torch.cat(logps), torch.cat(entropies)


@pytest.mark.parametrize("long", [0, 1024])
@pytest.mark.parametrize("at_once, kept", [(61, 0), (400, 0), (61, 300), (2**24, 2**26)])
@pytest.mark.parametrize(
    "config",
    [{}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1, "tie_word_embeddings": False}],
)
def test_logprobs_entropies_and_gradients_equal_single_rows(
    config, at_once, kept, long, monkeypatch
):
    """Fault: a response sees another response, padding or the future; positions do not restart; the shift by one token; the temperature;
    a part of the head's gradient is lost between parts, or comes from another part's logits."""
    monkeypatch.setattr(packing, "LOGITS_AT_ONCE", at_once)
    monkeypatch.setattr(packing, "LOGITS_KEPT", kept)
    monkeypatch.setattr(packing, "LONG", long)
    model = Transformer(TransformerConfig.from_hf(TINY | config, "tests"))
    model.init_weights(seed=1)
    logp, entropy = token_logprobs(model, pack(GROUPS), 0.7)
    expected_logp, expected_entropy = one_by_one(model, GROUPS, 0.7)
    torch.testing.assert_close(logp, expected_logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy.detach(), rtol=1e-5, atol=1e-5)
    factor = torch.randn(len(logp), generator=torch.Generator().manual_seed(0))
    names, weights = zip(*model.named_parameters(), strict=True)
    got = torch.autograd.grad((logp * factor).sum(), weights)
    expected = torch.autograd.grad((expected_logp * factor).sum(), weights)
    for name, a, b in zip(names, got, expected, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm(), name


@pytest.mark.parametrize("kept", [0, 61 * 1500])
def test_no_more_logits_are_held_than_may_be(tiny, kept, monkeypatch):
    """Fault: vocabulary-sized logits of a whole batch are kept for the gradient, which is what runs out of memory first; or the bound is
    one on a part, not on their sum."""
    monkeypatch.setattr(packing, "LOGITS_AT_ONCE", 61 * 100)
    monkeypatch.setattr(packing, "LOGITS_KEPT", kept)
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: shapes.append(x.shape) or x, lambda x: x
    ):
        token_logprobs(tiny, pack([([1] * 3, [[2] * 40] * 50)]))
    assert [shape for shape in shapes if shape[-1:] == (61,)] == [(100, 61)] * (kept // 6100) and (
        2000,
        32,
    ) in shapes


def test_packed_tokens_hold_the_prompt_once():
    """Fault: the prompt is computed once for every response, or padding is computed."""
    batch = pack(GROUPS)
    assert batch.ids_M.tolist() == [
        3,
        4,
        5,
        6,
        7,
        9,
        5,
        5,
        6,
        6,
        7,
        0,
        8,
        1,
        2,
        3,
        4,
        5,
        0,
        8,
        0,
        1,
        2,
        1,
        2,
        60,
        0,
        0,
        4,
    ]
    assert batch.pos_M.tolist()[9:19] == [5, 6, 7, 5, 5, 6, 7, 8, 9, 10]
    assert batch.predictors_Q.tolist()[:10] == [4, 9, 10, 4, 4, 13, 14, 15, 16, 17]


@pytest.mark.parametrize("max_tokens", [1, 8, 11, 20, 1000])
def test_micro_batches_hold_every_response_once_largest_first(max_tokens):
    """Fault: a response is lost, doubled or put under another's number; the largest batch comes late, and with it the lack of memory."""
    responses = [(prompt, response) for prompt, rs in GROUPS for response in rs]
    batches = list(micro_batches(GROUPS, max_tokens))
    assert sorted(itertools.chain(*(rows for _, rows in batches))) == list(range(len(responses)))
    for batch, rows in batches:
        assert batch.targets_Q.tolist() == [token for row in rows for token in responses[row][1]]
        assert len(batch.ids_M) <= max_tokens or len(rows) == 1
    if max_tokens < 20:
        assert len(batches[0][0].ids_M) == max(len(batch.ids_M) for batch, _ in batches)
