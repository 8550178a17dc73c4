"""The algorithm: losses, advantages, weights, filter, and the loop's promises."""

import copy
import itertools
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_RUN
from safetensors.torch import load_file

import rloop
from config import UserError, load_config
from data import load_demonstrations, load_problems
from data.tokenizer import Tokenizer
from model import Linear, Transformer
from packing import Row, pack, token_logprobs
from rloop import (
    Trajectory,
    group_advantages,
    grpo_loss,
    kl_loss,
    pass_at_k,
    select_experts,
    sft_loss,
    token_weights,
)
from run import Run
from sampler import sample
from scale import parallel

CLIP = {"clip_low": 0.2, "clip_high": 0.28}
NO_GRAD_CLIP = ("--optimizer.grad_clip", "1e9")


def trajectory(problem="p", ids=(1, 2, 0), reward=1.0, step=1, **fields):
    values = {"problem": problem, "iteration": 0, "step": step, "prompt_ids": [3, 4]}
    values |= {"ids": list(ids), "logps": [-0.5] * len(ids), "finished": True, "response": ""}
    values |= {"reason": "correct" if reward else "wrong", "reward": reward}
    return Trajectory(**(values | fields))


def solved(problems, correct, num_samples=4):
    """A group of trajectories for each problem, the first correct[n] of them right."""
    return [
        [trajectory(p.id, reward=float(j < c)) for j in range(num_samples)]
        for p, c in zip(problems, correct, strict=True)
    ]


@pytest.fixture
def small_run(countdown_toml, tmp_path):
    """Opens a run of a few small steps in tmp_path/NAME with overrides."""

    def open_run(name="run", *overrides):
        few = ("--data.eval_size", "2", "--run_dir", str(tmp_path / name))
        flags = [*SMALL_RUN, *few, *overrides]
        return Run(load_config(countdown_toml, flags))

    return open_run


# ---- pass@k


def test_pass_at_k_equals_brute_force():
    """Fault: pass@k with replacement (1 correct of 4 reads 0.684 at k = 4), or an off-by-one in
    the product."""
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
                expected = sum(max(d) for d in draws) / len(draws)
                assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)
    assert pass_at_k(4, 1, 4) == 1.0


def test_pass_at_k_is_stable():
    """Fault: binomials of large n overflow or lose the small probabilities."""
    assert pass_at_k(100_000, 1, 50_000) == pytest.approx(0.5)
    assert pass_at_k(10**6, 1, 1) == pytest.approx(1e-6)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 5, 1), (4, -1, 1), (4, 1, 0)])
def test_pass_at_k_out_of_range(n, c, k):
    """Fault: k above the number of samples quietly reads 1.0."""
    with pytest.raises(ValueError, match="pass_at_k"):
        pass_at_k(n, c, k)


# ---- advantages and weights


def test_group_advantages_by_hand():
    """Fault: sample instead of population std, or groups mixed with one another."""
    got = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]))
    s = math.sqrt(3) / 4
    expected = torch.tensor([[0.75 / s, *[-0.25 / s] * 3], [1.0, 1.0, -1.0, -1.0]])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    plain = group_advantages(torch.tensor([[1, 0, 0, 0]]), normalize_std=False)
    torch.testing.assert_close(plain, torch.tensor([[0.75, -0.25, -0.25, -0.25]]))


@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_flat_groups_and_groups_of_one_are_zero(normalize_std, value):
    """Fault: NaN for a group of one (torch.std), or rounding noise of a flat group blown up by
    1 / eps."""
    for G in (1, 3, 7):
        assert (group_advantages(torch.full((2, G), value), normalize_std=normalize_std) == 0).all()


def padded_weights(mask_BT, aggregation, max_new_tokens):
    """The weights by their definitions, on a padded mask: the oracle of token_weights."""
    mask_BT = mask_BT.double()
    if aggregation == "token":
        return mask_BT / mask_BT.sum()
    if aggregation == "sequence":
        return mask_BT / mask_BT.sum(dim=1, keepdim=True) / len(mask_BT)
    return mask_BT / (len(mask_BT) * max_new_tokens)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_token_weights_by_hand(aggregation):
    """Fault: one of the three denominators; prompt or padding counted; the weights of a step do not
    sum to 1 (or, constant, to the share of the token budget that was used)."""
    by_hand = {"token": [1 / 4, 1 / 4], "sequence": [1 / 6, 1 / 2], "constant": [1 / 10, 1 / 10]}
    assert token_weights([3, 1], aggregation, 5) == pytest.approx(by_hand[aggregation])
    lengths = np.random.default_rng(0).integers(1, 9, size=12).tolist()
    mask_BT = torch.arange(8) < torch.tensor(lengths)[:, None]
    weights = token_weights(lengths, aggregation, 8)
    assert len(weights) == 12
    got_BT = mask_BT * torch.tensor(weights, dtype=torch.float64)[:, None]
    torch.testing.assert_close(got_BT, padded_weights(mask_BT, aggregation, 8))
    whole = sum(lengths) / (12 * 8) if aggregation == "constant" else 1.0
    assert got_BT.sum().item() == pytest.approx(whole, abs=1e-12)


# ---- losses


def test_grpo_loss_by_hand():
    """Fault: the clip on the wrong side, max for min, a sign, or padding that counts."""
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1, 7.0])
    adv = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0, 1.0])
    weight = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2, 0.0])
    old = torch.tensor([-1.0, -2.0, -0.5, -3.0, -0.1, -1.0])
    loss, sums = grpo_loss(old + ratio.log(), old, adv, weight, **CLIP)
    assert loss.item() == pytest.approx(-0.2 * (1.28 - 1.5 + 0.5 - 0.8 + 2.2), abs=1e-6)
    counts = {name: int(value) for name, value in sums.items()}
    assert counts == {"tokens": 5, "clip_low": 1, "clip_high": 1}


def test_grpo_loss_gradcheck():
    """Fault: a gradient that is not the loss's (finite differences, float64), or one that flows
    into old_logp or adv."""
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "dtype": torch.float64}
    logp = -torch.rand(4, 6, **options) * 2
    old = logp + 0.4 * torch.randn(4, 6, **options)
    adv = torch.randn(4, 6, **options)
    weight = torch.rand(4, 6, **options)
    logp.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: grpo_loss(x, old, adv, weight, **CLIP)[0], logp)
    assert torch.autograd.gradcheck(lambda x: kl_loss(x, old, weight) + sft_loss(x, weight), logp)
    old.requires_grad_()
    adv.requires_grad_()
    grpo_loss(logp, old, adv, weight, **CLIP)[0].backward()
    assert old.grad is None and adv.grad is None


def test_grpo_loss_ignores_garbage_behind_the_mask():
    """Fault: 0 * inf = NaN from padded entries."""
    logp = torch.tensor([-0.5, 900.0], requires_grad=True)
    old, adv, weight = torch.tensor([-0.5, -900.0]), torch.ones(2), torch.tensor([1.0, 0.0])
    loss, _ = grpo_loss(logp, old, adv, weight, **CLIP)
    loss.backward()
    assert loss.item() == -1.0 and logp.grad.tolist() == [-1.0, 0.0]
    assert sft_loss(torch.tensor([-0.5, -torch.inf]), weight).item() == 0.5


def test_losses_and_logprobs_leave_their_arguments_alone(tiny):
    """Fault: an in-place write through a view of the caller's ids, lengths or rewards."""

    def fresh_rows():
        return [
            [Row(prompt_ids=[3, 4], ids=[6, 7, 0], advantage=0.5)],
            [Row(prompt_ids=[5], ids=[8, 0], advantage=-0.5)],
        ]

    rows_NG, lengths = fresh_rows(), [3, 2]
    batch, old, reward = pack(rows_NG), torch.tensor([-1.0] * 3 + [-2.0] * 2), torch.eye(2)
    logp, _ = token_logprobs(tiny, batch, 0.5)
    weight = batch.per_token(token_weights(lengths, "token", 4))
    adv = batch.per_token([row.advantage for row in batch.rows])
    tensors = [old, reward, weight, adv, logp]
    tensors += [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    before = [tensor.detach().clone() for tensor in tensors]
    group_advantages(reward)
    grpo_loss(logp, old, adv, weight, **CLIP)[0].backward()
    kl_loss(logp, old, weight), sft_loss(logp, weight), token_logprobs(tiny, batch, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert rows_NG == fresh_rows() and lengths == [3, 2]


def test_packed_and_padded_losses_agree():
    """Fault: a loss that needs rows: ports pack groups into one axis."""
    generator = torch.Generator().manual_seed(0)
    logp, old, adv = (torch.randn(3, 5, generator=generator) for _ in range(3))
    weight = torch.rand(3, 5, generator=generator)
    padded, _ = grpo_loss(logp, old, adv, weight, **CLIP)
    packed, _ = grpo_loss(*(x.view(-1) for x in (logp, old, adv, weight)), **CLIP)
    torch.testing.assert_close(padded, packed)


def test_kl_k3_by_hand():
    """Fault: the KL's direction: k3 is exp(ref - logp) - (ref - logp) - 1, and 0 for equal
    policies."""
    got = kl_loss(torch.tensor([-1.0, -1.0]), torch.tensor([-1.5, -1.0]), torch.tensor([1.0, 1.0]))
    assert got.item() == pytest.approx(math.exp(-0.5) + 0.5 - 1)


def test_overlong_penalty_by_hand():
    """Fault: the soft punishment starts late, is not -1 at the limit, or acts when it is off."""
    assert [rloop.overlong_penalty(n, 100, 20) for n in (10, 80, 90, 100)] == [0, 0, -0.5, -1]
    assert rloop.overlong_penalty(100, 100, 0) == 0


# ---- log-probs and gradients


PROMPTS = [[5, 6, 7], [9], [3, 4, 5, 6, 7, 8]]
SAMPLING = {"num_samples": 4, "max_new_tokens": 10, "stop_ids": {0, 7}, "seed": 0}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_trainer_logprobs_equal_sampler_logprobs(tiny, temperature):
    """Fault: the loss sees another distribution than the one that was sampled (temperature left
    out, stop token dropped)."""
    sampled = sample(tiny, PROMPTS, temperature=temperature, max_rows=5, **SAMPLING)
    batch = pack(
        [
            [Row(prompt_ids=prompt, ids=c.ids, sampler_logps=c.logps) for c in group]
            for prompt, group in zip(PROMPTS, sampled, strict=True)
        ]
    )
    logp, _ = token_logprobs(tiny, batch, temperature)
    sampler_logp = batch.concatenate([row.sampler_logps for row in batch.rows])
    assert (logp - sampler_logp).abs().max() < 2e-5


def test_ids_without_a_token_do_not_move_the_loss(tiny):
    """Fault: sampler and trainer see different distributions where ids have no token; their
    entropy is NaN; or they get a gradient. The oracle: a model whose head lacks these rows."""
    tiny.lm_head = Linear(32, 61, bias=False)
    smaller = copy.deepcopy(tiny)
    smaller.lm_head.weight = torch.nn.Parameter(tiny.lm_head.weight[:50].detach().clone())
    tiny.unknown_ids = torch.arange(50, 61)
    sampled = sample(tiny, PROMPTS, temperature=0.6, max_rows=5, **SAMPLING)
    batch = pack(
        [
            [Row(prompt_ids=prompt, ids=c.ids, sampler_logps=c.logps) for c in group]
            for prompt, group in zip(PROMPTS, sampled, strict=True)
        ]
    )
    (logp, entropy), expected = (token_logprobs(model, batch, 0.6) for model in (tiny, smaller))
    torch.testing.assert_close((logp, entropy), expected)
    sampler_logp = batch.concatenate([row.sampler_logps for row in batch.rows])
    assert (logp - sampler_logp).abs().max() < 2e-5
    logp.sum().backward()
    expected[0].sum().backward()
    gradients = tiny.lm_head.weight.grad, smaller.lm_head.weight.grad
    torch.testing.assert_close(gradients[0][:50], gradients[1])
    assert (gradients[0][50:] == 0).all()
    embeddings = tiny.model.embed_tokens.weight.grad, smaller.model.embed_tokens.weight.grad
    torch.testing.assert_close(*embeddings)


def test_a_run_never_samples_ids_without_a_token(small_run, tmp_path):
    """Fault: the loop, its evaluations or the KL term's reference do not know the tokenizer's
    ids."""
    base = ROOT / "data" / "countdown_base"
    shutil.copytree(base, tmp_path / "model", ignore=lambda *_: ["model.safetensors"])
    config = json.loads((base / "config.json").read_text())
    size, wider = config["vocab_size"], config | {"vocab_size": 4 * config["vocab_size"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(wider))
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    hole = tokenizer["model"]["vocab"].pop("/")
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    few = ("--iterations", "1", "--rl.kl_coef", "0.1", "--rl.steps", "1", "--eval.num_samples", "1")
    greedy = ("--eval.temperature", "0", "--model.path", str(tmp_path / "model"))
    run = small_run("run", *few, *greedy, "--model.random_init", "true", "--method", "rl")
    run_whole(run)
    sampled = {id_ for t in run.lines("trajectories/iteration_1.jsonl") for id_ in t["ids"]}
    assert len(sampled) > 20 and max(sampled) < size and hole not in sampled
    policy = rloop.load_policy(run.cfg)
    assert policy.unknown_ids.tolist() == [hole, *range(size, 4 * size)]
    assert [r for r in run.lines("metrics.jsonl") if r["phase"] == "eval"][0][
        "eval/num_samples"
    ] == 1


def test_eos_gets_gradient(tiny):
    """Fault: the stop token is masked out (by `ids == pad` or by position), so the policy never
    learns to stop."""
    logp, _ = token_logprobs(tiny, pack([[Row(prompt_ids=[3, 4], ids=[6, 0])]]))
    logp.retain_grad()
    sft_loss(logp, torch.full((2,), 0.5)).backward()
    assert logp.grad.tolist() == [-0.5, -0.5]
    gradient = tiny.model.embed_tokens.weight.grad  # tied: it pulls towards the stop token, 0
    assert gradient[0].abs().max() > gradient[1].abs().max()


def gradient_of_update(small_run, policy, name, groups, *overrides):
    """The gradient that update() gives the optimizer for these groups, and its metrics."""
    run = small_run(name, "--rl.minibatches", "1", *overrides)
    parallel.prepare(policy, run.cfg.compute)
    policy.zero_grad()
    gradients = {}
    optimizer = torch.optim.SGD(policy.parameters())
    optimizer.step = lambda: gradients.update(
        {n: w.grad.clone() for n, w in policy.named_parameters()}
    )
    metrics = rloop.update(run, policy, optimizer, groups, None, lr=1e-3)
    return gradients, {k: v for k, v in metrics.items() if not k.startswith("time/")}


@pytest.fixture
def groups(tiny):
    """Three groups of four responses; in group n response n is right."""
    sampled = sample(tiny, PROMPTS, max_rows=64, **SAMPLING)
    return [
        [
            trajectory(ids=c.ids, logps=c.logps, prompt_ids=prompt, reward=float(j == i))
            for j, c in enumerate(group)
        ]
        for i, (prompt, group) in enumerate(zip(PROMPTS, sampled, strict=True))
    ]


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_gradient_does_not_depend_on_micro_batches(small_run, tiny, groups, aggregation):
    """Fault: the loss is normalised by the micro-batch instead of the whole step, so memory
    settings change what is learned."""
    options = ("--rl.aggregation", aggregation, *NO_GRAD_CLIP, "--compute.micro_batch_tokens")
    whole, whole_metrics = gradient_of_update(small_run, tiny, "a", groups, *options, "100000")
    split, split_metrics = gradient_of_update(small_run, tiny, "b", groups, *options, "17")
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], rtol=1e-4, atol=1e-6)
    assert max(g.abs().max() for g in whole.values()) > 1e-3
    assert whole_metrics.keys() == split_metrics.keys()
    for name, value in whole_metrics.items():
        assert split_metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_update_gradient_equals_a_direct_computation(small_run, tiny, groups):
    """Fault: anything between trajectories and gradient: advantages given to the wrong rows, a
    wrong denominator, a sign."""
    got, _ = gradient_of_update(small_run, tiny, "a", groups, *NO_GRAD_CLIP)
    tiny.zero_grad()
    num_tokens = sum(len(t.ids) for g in groups for t in g)
    for group in groups:
        rewards = np.array([t.reward for t in group])
        for t, advantage in zip(group, (rewards - rewards.mean()) / rewards.std(), strict=True):
            logp = tiny(torch.tensor([t.prompt_ids + t.ids]))[0].log_softmax(-1)
            own = logp[len(t.prompt_ids) - 1 : -1][torch.arange(len(t.ids)), t.ids]
            (-advantage / num_tokens * own.sum()).backward()  # on-policy: A * grad log p
    for name, weight in tiny.named_parameters():
        torch.testing.assert_close(got[name], weight.grad, rtol=1e-3, atol=1e-5)


def test_activation_checkpointing_leaves_the_gradient_and_keeps_less(small_run, tiny, groups):
    """Fault: the second run of a block sees other inputs, or nothing is saved by it."""
    kept, gradients = [], []
    for name, checkpointing in (("a", "false"), ("b", "true")):
        sizes: dict[int, int] = {}

        def remember(x, sizes=sizes):
            sizes[x.data_ptr()] = x.nbytes
            return x

        options = (*NO_GRAD_CLIP, "--compute.checkpoint_activations", checkpointing)
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda x: x):
            gradients.append(gradient_of_update(small_run, tiny, name, groups, *options)[0])
        kept.append(sum(sizes.values()))
    torch.testing.assert_close(gradients[1], gradients[0])
    assert kept[1] < 0.6 * kept[0]


def test_recomputed_logprobs_replace_the_samplers(small_run, tiny, groups):
    """Fault: with a sampler of other precision the ratio is not 1 before the first update, or its
    gap is not logged; or the log-probs go to other rows than they are of."""
    options = ("--rl.recompute_logprobs", "true", "--compute.micro_batch_tokens", "40")
    expected, _ = gradient_of_update(small_run, tiny, "a", groups, *NO_GRAD_CLIP)
    for t in itertools.chain(*groups):
        t.logps = [logp - 0.5 for logp in t.logps]
    got, metrics = gradient_of_update(small_run, tiny, "b", groups, *NO_GRAD_CLIP, *options)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-5)
    assert metrics["rl/logp_gap_mean_nat"] == pytest.approx(0.5, abs=1e-4)
    assert metrics["rl/clip_high_share"] == 0


def test_importance_weights_are_truncated(small_run, tiny, groups):
    """Fault: tokens that the trainer finds likelier than the sampler did are not weighted up, or
    beyond the cap."""
    options = (*NO_GRAD_CLIP, "--rl.recompute_logprobs", "true")
    cap = "--rl.importance_cap"
    plain, _ = gradient_of_update(small_run, tiny, "a", groups, *options)
    groups[1][1].logps = [logp - math.log(3) for logp in groups[1][1].logps]  # a ratio of 3
    whole, _ = gradient_of_update(small_run, tiny, "b", groups, *options, cap, "5.0")
    capped, _ = gradient_of_update(small_run, tiny, "c", groups, *options, cap, "2.0")
    for name in plain:
        by_two, by_one = whole[name] - plain[name], capped[name] - plain[name]
        torch.testing.assert_close(2 * by_one, by_two, rtol=1e-2, atol=1e-5)
    assert max((whole[name] - plain[name]).abs().max() for name in plain) > 1e-3


def test_bfloat16_gradient_is_close_and_weights_stay_float32(small_run, tiny, groups):
    """Fault: bfloat16 weights or losses (small updates are rounded away), or products of another
    precision than asked for."""
    options = (*NO_GRAD_CLIP, "--compute.micro_batch_tokens", "40", "--compute.dtype")
    exact, _ = gradient_of_update(small_run, tiny, "a", groups, *options, "float32")
    rounded, metrics = gradient_of_update(small_run, tiny, "b", groups, *options, "bfloat16")
    for name, weight in tiny.named_parameters():
        assert weight.dtype == rounded[name].dtype == torch.float32
        pair = rounded[name].flatten(), exact[name].flatten()
        assert torch.cosine_similarity(*pair, dim=0) > 0.98, name
    assert any(not torch.equal(rounded[name], exact[name]) for name in exact)
    assert 1e-4 < metrics["rl/logp_gap_mean_nat"] < 0.1


def test_bfloat16_run_is_whole(small_run):
    """Fault: sampling in bfloat16 leaves its rounded weights in the policy, or the run does not
    repeat."""
    options = ("--compute.dtype", "bfloat16", "--rl.recompute_logprobs", "true")
    options += ("--iterations", "1", "--rl.steps", "2")
    runs = [run_whole(small_run(name, *options)) for name in ("a", "b")]
    assert without_times(runs[0]) == without_times(runs[1])
    gaps = [r["rl/logp_gap_mean_nat"] for r in runs[0] if "rl/logp_gap_mean_nat" in r]
    assert gaps and all(1e-5 < gap < 0.1 for gap in gaps)
    saved = load_file(small_run("a", *options).path / "policies/theta_1/model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    assert any((tensor != tensor.bfloat16()).any() for tensor in saved.values())


def test_flat_groups_give_zero_gradient(small_run, tiny, groups):
    """Fault: groups without a signal move the policy."""
    for t in itertools.chain(*groups):
        t.reward = 1.0
    gradients, _ = gradient_of_update(small_run, tiny, "a", groups)
    assert gradients and all((g == 0).all() for g in gradients.values())


@pytest.mark.parametrize(("num_groups", "lr"), [(0, 1e-3), (3, 0.0)])
def test_update_without_groups_or_learning_rate_does_nothing(
    small_run, tiny, groups, num_groups, lr
):
    """Fault: a step whose groups were all flat, or pure RFT, crashes or moves the policy (weight
    decay, momentum)."""
    before = {n: w.clone() for n, w in tiny.state_dict().items()}
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=1.0, weight_decay=0.5)
    metrics = rloop.update(small_run("a"), tiny, optimizer, groups[:num_groups], None, lr)
    assert metrics == {"rl/lr": lr, "time/update_s": 0.0}
    assert not optimizer.state
    assert all(torch.equal(before[n], w) for n, w in tiny.state_dict().items())


def test_non_finite_loss_stops_and_saves_the_batch(small_run, tiny, groups):
    """Fault: a NaN is printed, or written into the weights, and the run goes on."""
    run = small_run("a", "--rl.minibatches", "1")
    before = {n: w.clone() for n, w in tiny.state_dict().items()}
    groups[1][2].logps[0] = math.nan
    optimizer = torch.optim.AdamW(tiny.parameters())
    with pytest.raises(FloatingPointError, match="nonfinite_batch"):
        rloop.update(run, tiny, optimizer, groups, None, lr=0.1)
    saved = list(run.lines("nonfinite_batch.jsonl"))
    assert len(saved) == 12 and saved[6]["ids"] == groups[1][2].ids
    assert math.isnan(saved[6]["sampler_logps"][0])
    assert all(torch.equal(before[n], w) for n, w in tiny.state_dict().items())


# ---- filter


def test_select_experts_by_hand():
    """Fault: wrong answers, easy problems or duplicates among the experts; equal answers to
    different problems merged."""
    hard = [((1, 0), 1), ((2, 0), 0), ((1, 0), 1), ((3, 0), 1)]
    phase = [
        *[trajectory("easy", ids=(i, 0)) for i in range(1, 5)],
        *[trajectory("hard", ids=i, reward=r, step=s) for s, (i, r) in enumerate(hard)],
        *[trajectory("harder", ids=ids, reward=r) for ids, r in [((1, 0), 1), ((2, 0), 0)]],
        *[trajectory("never", ids=(i, 0), reward=0) for i in range(3)],
    ]
    before = [repr(t) for t in phase]

    def select(rate, trajectories=phase):
        return select_experts(trajectories, max_success_rate=rate, max_per_problem=10)

    got = [(t.problem, t.ids, t.step) for t in select(0.75)]
    assert got == [("hard", [1, 0], 0), ("hard", [3, 0], 3), ("harder", [1, 0], 1)]
    assert [(t.problem, t.ids) for t in select(0.5)] == [("harder", [1, 0])]
    assert len(select(1.0)) == 7
    assert select(1.0, phase[-3:]) == []
    assert [repr(t) for t in phase] == before


def test_select_experts_keeps_the_first_of_equal_responses_in_their_order():
    """Fault: a repetition moves its response to a later place, or takes the place of the first."""
    responses = [(7, 0), (5, 0), (7, 0), (6, 0), (5, 0), (7, 0)]
    phase = [trajectory("p", ids=ids, step=step) for step, ids in enumerate(responses, start=1)]
    got = select_experts(phase, max_success_rate=1.0, max_per_problem=10)
    assert [(t.ids, t.step) for t in got] == [([7, 0], 1), ([5, 0], 2), ([6, 0], 4)]


@pytest.mark.parametrize(("correct", "kept"), [(63, 63), (64, 0)])
def test_select_experts_threshold_is_inclusive(correct, kept):
    """Fault: a problem at the threshold is dropped by rounding (0.7 * 90 is below 63)."""
    phase = [trajectory("p", ids=[n], reward=float(n < correct)) for n in range(90)]
    experts = select_experts(phase, max_success_rate=0.7, max_per_problem=100)
    assert len(experts) == kept


def test_select_experts_docstring_example():
    """Fault: the example in the docstring is not what the function does."""
    text = "(p, 0, 7) (p, 0, 8) (p, 1, 9) (q, 1, 5) (p, 1, 9) (p, 0, 8) (p, 1, 6) (p, 0, 4)"
    text += " (p, 1, 3)"
    assert text in " ".join(select_experts.__doc__.split())
    fields = [part.strip(" (").split(", ") for part in text.split(")") if part]
    phase = [trajectory(p, reward=float(reward), ids=(int(i),)) for p, reward, i in fields]
    assert sum(t.problem == "p" for t in phase) == 8
    assert sum(t.reward for t in phase if t.problem == "p") == 4
    everything = select_experts(phase, max_success_rate=0.5, max_per_problem=10)
    assert [(t.problem, t.ids) for t in everything] == [("p", [9]), ("p", [6]), ("p", [3])]
    kept = select_experts(phase, max_success_rate=0.5, max_per_problem=2)
    assert [(t.problem, t.ids) for t in kept] == [("p", [9]), ("p", [3])]


def test_select_experts_cap_spans_the_phase():
    """Fault: the cap keeps only the first or the last steps, and with them one policy's habits."""
    phase = [trajectory("p", ids=(s, 0), step=s) for s in range(1, 100)]
    phase.append(trajectory("p", reward=0))
    got = select_experts(phase, max_success_rate=1.0, max_per_problem=4)
    assert [t.step for t in got] == [1, 34, 66, 99]
    assert [t.step for t in select_experts(phase, max_success_rate=1.0, max_per_problem=1)] == [1]


# ---- the loop


def run_whole(run):
    rloop.run_method(run.cfg)
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def without_times(records):
    return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in records]


def weights_of(directory):
    return Transformer.from_pretrained(directory).state_dict()


def test_rloop_run_is_whole(small_run):
    """Fault: a phase left out or in the wrong order, a trajectory lost, a policy that was not
    exported, a count of steps or trajectories that is wrong in the records."""
    run = small_run()
    records = run_whole(run)
    order = [
        r["policy"] if r["phase"] == "eval" else r["phase"]
        for r in records
        if r["phase"] != "rft" or r["step"] == 1
    ]
    assert order == ["base", *["rl", "rl", "rl", "rl", "rl", "filter", "rft", "rft"] * 2]
    evaluations = [r for r in records if r["phase"] == "eval"]
    assert [r["rl_steps"] for r in evaluations] == [0, 2, 3, 3, 5, 6, 6]
    assert [r["iteration"] for r in evaluations] == [0, 0, 0, 0, 1, 1, 1]
    steps = [r for r in records if r["phase"] == "rl"]
    assert [r["num_trajectories"] for r in steps] == [32 * n for n in range(1, 7)]
    for i in (1, 2):
        trajectories = list(run.lines(f"trajectories/iteration_{i}.jsonl"))
        assert len(trajectories) == 3 * 4 * 8 and {t["step"] for t in trajectories} == {1, 2, 3}
        assert all(t["reward"] == 1 for t in run.lines(f"experts/iteration_{i}.jsonl"))
    names = {p.name for p in (run.path / "policies").iterdir()}
    assert names == {"rl_1", "theta_1", "rl_2", "theta_2"}
    assert Tokenizer(run.path / "policies" / "theta_2").stop_ids == {0}
    theta = weights_of(run.path / "policies" / "theta_2")
    rl = weights_of(run.path / "policies" / "rl_2")
    assert not torch.equal(theta["model.norm.weight"], rl["model.norm.weight"])


def test_rft_starts_bitwise_from_theta_i(small_run, monkeypatch):
    """Fault: RFT starts from the RL policy (or a rounded copy) instead of the policy that the phase
    started from."""
    starts, ends = [], []
    real_rft, real_explore = rloop.rft, rloop.explore

    def copy(policy):
        return {n: w.clone() for n, w in policy.state_dict().items()}

    def spy_explore(run, policy, *rest):
        starts.append(copy(policy))
        return real_explore(run, policy, *rest)

    def spy_rft(run, policy, examples):
        ends.append(copy(policy))
        real_rft(run, policy, examples)

    monkeypatch.setattr(rloop, "explore", spy_explore)
    monkeypatch.setattr(rloop, "rft", spy_rft)
    run = small_run()
    run_whole(run)
    assert len(starts) == len(ends) == 2
    for i in range(2):
        assert all(torch.equal(starts[i][n], ends[i][n]) for n in starts[i])
        rl = weights_of(run.path / "policies" / f"rl_{i + 1}")
        assert any(not torch.equal(rl[n], ends[i][n]) for n in rl)
    theta_1 = weights_of(run.path / "policies" / "theta_1")
    assert all(torch.equal(theta_1[n], starts[1][n]) for n in theta_1)


def test_sft_builds_a_policy_from_demonstrations(small_run):
    """Fault: method "sft" drops the stop token, trains on the prompt, or exports no policy."""
    options = ("--method", "sft", "--data.train", "countdown:habit", "--data.train_size", "4")
    run = small_run("sft", *options, "--rft.batch_size", "4", "--rft.epochs", "1")
    first = next(r for r in run_whole(run) if r["phase"] == "rft")
    base, tokenizer = rloop.load_policy(run.cfg), Tokenizer(run.cfg.model.path)
    logps, num_tokens = 0.0, 0
    for question, response in load_demonstrations("countdown:habit", size=4):
        prompt, ids = tokenizer.encode(question), [*tokenizer.encode(response), tokenizer.eos_id]
        logp = base(torch.tensor([prompt + ids]))[0].log_softmax(-1)[len(prompt) - 1 : -1]
        logps += logp[torch.arange(len(ids)), ids].sum().item()
        num_tokens += len(ids)
    assert first["rft/loss"] == pytest.approx(-logps / num_tokens, rel=1e-4)
    exported, start = weights_of(run.path / "policies" / "sft"), base.state_dict()
    assert any(not torch.equal(exported[n], start[n]) for n in start)


@pytest.mark.parametrize(("method", "lr"), [("rloop", "1e-4"), ("rl", "1e-4"), ("rloop", "0")])
def test_interrupted_run_continues_at_the_last_step(small_run, monkeypatch, method, lr):
    """Fault: continuing repeats or skips steps, forgets the optimizer, theta_i or trajectories,
    sees other problems, or wants an optimizer that pure RFT (lr 0) never had."""
    options = ("--method", method, "--rl.kl_coef", "0.01", "--rl.lr", lr)
    options += ("--rl.steps", "2", "--eval.every", "1", "--rft.epochs", "1")
    whole = without_times(run_whole(small_run("whole", *options)))
    real = rloop.sample_groups
    for stop_at in (1, 3):

        def failing(run, *rest, stop_at=stop_at):
            if run.rl_steps == stop_at:
                raise KeyboardInterrupt
            return real(run, *rest)

        name = f"stopped-{stop_at}"
        monkeypatch.setattr(rloop, "sample_groups", failing)
        with pytest.raises(KeyboardInterrupt):
            rloop.run_method(small_run(name, *options).cfg)
        monkeypatch.setattr(rloop, "sample_groups", real)
        again = small_run(name, *options)
        again.append("metrics.jsonl", [{"phase": "half a step"}])  # behind the checkpoint: cut off
        assert without_times(run_whole(small_run(name, *options))) == whole


def test_run_interrupted_in_rft_continues_exactly(small_run, monkeypatch):
    """Fault: an interrupted RFT starts again from half-tuned or RL-ed weights, or its filter and
    RFT records stand twice."""
    options = ("--rl.steps", "2", "--save_every", "2")
    options += ("--rft.batch_size", "2", "--rft.epochs", "3")
    whole = run_whole(small_run("whole", *options))
    assert sum(r["phase"] == "rft" and r["iteration"] == 0 for r in whole) > 8
    names = [f"experts/iteration_{i}.jsonl" for i in (1, 2)] + ["trajectories/iteration_2.jsonl"]
    expected = [list(small_run("whole", *options).lines(name)) for name in names]
    real = rloop.sft_loss
    for calls in (1, 8):  # before the first checkpoint in RFT, and behind the third
        count = itertools.count(1)

        def failing(logp, weight, calls=calls, count=count):
            if next(count) == calls:
                raise KeyboardInterrupt
            return real(logp, weight)

        name = f"stopped-{calls}"
        monkeypatch.setattr(rloop, "sft_loss", failing)
        with pytest.raises(KeyboardInterrupt):
            rloop.run_method(small_run(name, *options).cfg)
        monkeypatch.setattr(rloop, "sft_loss", real)
        again = small_run(name, *options)
        assert again.progress.rft_step == (0 if calls == 1 else 6)
        assert without_times(run_whole(again)) == without_times(whole)
        assert [list(again.lines(name)) for name in names] == expected


def test_nearly_all_truncated_is_said(small_run, capsys):
    """Fault: a prompt format without EOS scores 0 for a whole run, in silence; or every step says
    it."""
    warning = "nearly all responses are cut off: raise sampling.max_new_tokens"
    plain = ("--method", "rl", "--iterations", "1")
    run_whole(small_run("a", *plain, "--sampling.max_new_tokens", "5"))
    lines = capsys.readouterr().out.splitlines()
    before = [lines[i - 1].split()[0] for i, line in enumerate(lines) if warning in line]
    assert before == ["eval", "RL", "eval", "eval"]  # of three steps, the first one's
    run_whole(small_run("b", *plain))
    assert "cut off" not in capsys.readouterr().out
    run_whole(small_run("c", "--method", "eval", "--sampling.max_new_tokens", "5"))
    assert warning in capsys.readouterr().out


def test_prompt_is_a_conversation_or_plain_text(countdown_toml, tmp_path):
    """Fault: the chat template or the messages before the question are left out, so a chat model
    never ends its answers."""
    base = ROOT / "data" / "countdown_base"
    (tmp_path / "tokenizer.json").write_text((base / "tokenizer.json").read_text())
    template = "{% for m in messages %}{{ 'from' if m.role == 'system' else 'make' }}: "
    template += "{{ m.content }}\n{% endfor %}="
    tokens = {"eos_token": "<eos>", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokens))
    tokenizer = Tokenizer(tmp_path)
    for chat, expected in (
        ("true", "from: 7\nmake: 3 from 1 2 *\n="),
        ("false", "7\n\n3 from 1 2 *"),
    ):
        flags = ["--data.chat_template", chat, "--data.prompt", "{problem} *"]
        cfg = load_config(countdown_toml, flags)
        got = tokenizer.encode_prompt("3 from 1 2", cfg.data, (("system", "7"),))
        assert got == tokenizer.encode(expected)


def test_training_on_held_out_questions_is_refused(small_run, tmp_path):
    """Fault: a run whose training and held-out files share questions starts."""
    file = tmp_path / "p.jsonl"
    lines = [json.dumps({"problem": f"{i}?", "answer": "1"}) + "\n" for i in range(20)]
    file.write_text("".join(lines))
    run = small_run("a", "--data.train", str(file), "--data.eval", str(file))
    with pytest.raises(ValueError, match="questions of data.eval"):
        rloop.run_method(run.cfg)


def test_rl_baseline_has_the_same_budget(small_run):
    """Fault: the baseline gets other numbers of RL steps or trajectories than RLoop, or sees
    RFT."""
    loop = run_whole(small_run("loop", "--rl.steps", "2"))
    plain = run_whole(small_run("plain", "--rl.steps", "2", "--method", "rl"))
    last_loop, last_plain = ([r for r in rs if r["phase"] == "rl"][-1] for rs in (loop, plain))
    for key in ("rl_steps", "num_trajectories"):
        assert last_loop[key] == last_plain[key] > 0
    assert not [r for r in plain if r["phase"] in ("rft", "filter")]
    # base and the first steps are the same run
    assert without_times(loop)[:3] == without_times(plain)[:3]


def test_finished_run_says_so(small_run, capsys):
    """Fault: running a finished directory again trains on, or repeats its records."""
    options = ("--method", "rl", "--iterations", "1")
    before = run_whole(small_run("done", *options))
    assert run_whole(small_run("done", *options)) == before
    assert "is finished" in capsys.readouterr().out


# ---- errors


def test_only_the_users_errors_are_one_line(countdown_toml, tmp_path, monkeypatch, capsys):
    """Fault: a traceback hides what the user did wrong; or the ValueError of a modified algorithm
    (zip, int, numpy) is printed as one line without the place that raised it."""
    flags = ["--config", str(countdown_toml), "--run_dir", str(tmp_path / "run")]

    def fails_with(error):
        def respond(*args, **kwargs):
            raise error

        monkeypatch.setattr(rloop, "respond", respond)

    fails_with(UserError("data/x.jsonl:17: no answer"))
    assert rloop.main(flags) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: data/x.jsonl:17: no answer"
    for error in (ValueError("zip() argument 2 is shorter"), OSError(5, "broken"), KeyError("x")):
        fails_with(error)
        with pytest.raises(type(error)) as raised:
            rloop.main(flags)
        assert raised.value is error


def test_unwritable_run_directory_is_one_line(countdown_toml, capsys):
    """Fault: a traceback for a run directory that cannot be made."""
    assert rloop.main(["--config", str(countdown_toml), "--run_dir", "/dev/null/run"]) == 1
    assert "/dev/null/run" in capsys.readouterr().err


def test_other_config_in_the_same_directory_is_refused(small_run):
    """Fault: a run continues under settings that it did not start with, or a mistyped first try
    blocks its directory."""
    small_run("a", "--rl.lr", "0.25")
    run = small_run("a")
    run.save(Transformer.from_pretrained(run.cfg.model.path))
    with pytest.raises(UserError, match="rl.lr"):
        small_run("a", "--rl.lr", "0.5")
    assert json.loads((run.path / "config.json").read_text())["rl"]["lr"] == run.cfg.rl.lr


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_foreign_directory_is_left_alone(small_run, tmp_path, name):
    """Fault: --run_dir on a model's or another program's directory overwrites or empties its
    files."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_text('{"model_type": "llama"}\n')
    with pytest.raises(UserError, match="holds files of no run"):
        small_run("a")
    assert (tmp_path / "a" / name).read_text() == '{"model_type": "llama"}\n'


# ---- outcomes


def test_no_experts_is_a_named_outcome(small_run, capsys):
    """Fault: an empty expert set crashes RFT, moves the policy, or passes in silence."""
    run = small_run("none", "--select.max_success_rate", "1e-9", "--iterations", "1")
    records = run_whole(run)
    assert [r["filter/outcome"] for r in records if r["phase"] == "filter"] == ["no_experts"]
    assert "no RFT, theta_1 = theta_0" in capsys.readouterr().out
    assert not [r for r in records if r["phase"] == "rft"]
    base, theta = weights_of(run.cfg.model.path), weights_of(run.path / "policies" / "theta_1")
    assert all(torch.equal(base[n], theta[n]) for n in base)


def test_learning_rate_zero_leaves_the_policy_alone(small_run):
    """Fault: pure RFT (lr 0) still moves the exploring policy, by weight decay for instance."""
    run = small_run("rft", "--rl.lr", "0", "--iterations", "1", "--optimizer.weight_decay", "0.5")
    run_whole(run)
    base, rl = weights_of(run.cfg.model.path), weights_of(run.path / "policies" / "rl_1")
    assert all(torch.equal(base[n], rl[n]) for n in base)


# ---- sampling


def test_dynamic_sampling_refills_with_fresh_problems(small_run, tiny, monkeypatch):
    """Fault: flat groups are trained on or replaced by the same problems; the number of rounds has
    no bound; the rounds draw the same random numbers; the position in the stream is lost."""
    asked, seeds = [], []

    def fake_respond(model, tokenizer, problems, cfg, seed, place, **sampling):
        asked.append([p.id for p in problems])
        seeds.append(seed)
        # of the first two rounds one group is usable
        correct = [int(i == 0 or len(asked) == 3) for i in range(len(problems))]
        return solved(problems, correct, 8), {"time/rollout_s": 1.0, "time/verify_s": 0.5}

    monkeypatch.setattr(rloop, "respond", fake_respond)
    problems = load_problems("countdown:train", size=16)
    run = small_run("a", "--rl.max_sampling_rounds", "5")
    usable, sampled, drawn, seconds = rloop.sample_groups(run, tiny, None, problems, step=1)
    assert [len(ids) for ids in asked] == [4, 3, 2] and len(usable) == 4 and len(sampled) == 9
    assert not any(map(rloop.is_flat, usable))
    assert len(set(sum(asked, []))) == 9 and len(set(seeds)) == 3
    assert seconds == {"time/rollout_s": 3.0, "time/verify_s": 1.5}
    assert drawn == 9 and run.progress.problems_drawn == 0  # the step's commit takes it over
    asked.clear()
    bounded = small_run("b", "--rl.max_sampling_rounds", "2")
    usable, sampled, drawn, _ = rloop.sample_groups(bounded, tiny, None, problems, step=1)
    assert len(usable) == 2 and len(sampled) == drawn == 7


@pytest.mark.parametrize("favor_hard", ["true", "false"])
def test_successes_of_the_phase_decide_what_is_drawn(small_run, monkeypatch, favor_hard):
    """Fault: rl.favor_hard counts failures, responses of another phase or of the step itself, or
    works where it is off."""
    seen, next_problems = [], rloop.next_problems

    def spy(problems, drawn, count, seed, successes):
        seen.append(dict(successes))
        return next_problems(problems, drawn, count, seed, successes)

    monkeypatch.setattr(rloop, "next_problems", spy)
    cfg = small_run("a", "--rl.favor_hard", favor_hard).cfg
    rloop.run_method(cfg)
    expected = []
    for iteration in (1, 2):
        lines = (Path(cfg.run_dir) / "trajectories" / f"iteration_{iteration}.jsonl").open()
        records = [json.loads(line) for line in lines]
        for step in range(1, cfg.rl.steps + 1):
            right = [r["problem"] for r in records if r["reward"] == 1 and r["step"] < step]
            expected.append(dict(Counter(right)) if favor_hard == "true" else {})
    assert seen == expected and (any(seen) == (favor_hard == "true"))


def test_equal_problems_stay_separate_groups(small_run):
    """Fault: groups keyed by prompt text merge a problem that is drawn twice."""
    problems = load_problems("countdown:train", size=1) * 4
    cfg = small_run("a").cfg
    policy, tokenizer = rloop.load_policy(cfg), Tokenizer(cfg.model.path)
    place = {"iteration": 0, "step": 1}
    groups, _ = rloop.respond(
        policy, tokenizer, problems, cfg, 0, place, num_samples=8, temperature=1.0
    )
    assert [len(g) for g in groups] == [8] * 4
    assert len({tuple(tuple(t.ids) for t in g) for g in groups}) == 4


def test_problem_stream_covers_every_epoch():
    """Fault: problems are repeated or left out within an epoch, every epoch or every seed has the
    same order, or the stream depends on how many are drawn at once."""
    problems = load_problems("countdown:train", size=10)

    def ids(drawn, count, seed=0):
        return [p.id for p in rloop.next_problems(problems, drawn, count, seed)]

    epochs = [ids(0, 5) + ids(5, 5), ids(10, 5) + ids(15, 5)]
    assert all(sorted(epoch) == sorted(p.id for p in problems) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert ids(0, 20) == sum(epochs, []) and ids(7, 6) == sum(epochs, [])[7:13]
    assert ids(0, 10, seed=1) != epochs[0]


# ---- evaluation


def test_bootstrap_interval_covers_the_mean():
    """Fault: an interval over samples instead of problems, or of the wrong width (normal
    approximation as the oracle)."""
    values = np.random.default_rng(0).random(400)
    low, high = rloop.bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.004)
    assert high == pytest.approx(values.mean() + half, abs=0.004)


def test_evaluations_share_no_random_numbers_with_training(small_run, monkeypatch):
    """Fault: an evaluation draws from the random streams of an RL step (numpy pads a short seed
    sequence with zeros), or from others than the evaluation before it."""
    seeds, real = {"training": [], "evaluation": []}, rloop.respond

    def spy(model, tokenizer, problems, cfg, seed, place, **options):
        seeds["evaluation" if "top_p" in options else "training"].append(seed)
        return real(model, tokenizer, problems, cfg, seed, place, **options)

    monkeypatch.setattr(rloop, "respond", spy)
    rloop.run_method(small_run("a").cfg)
    assert len(set(seeds["training"])) == len(seeds["training"]) == 6
    assert len(set(seeds["evaluation"])) == 1 < len(seeds["evaluation"])
    assert not set(seeds["evaluation"]) & set(seeds["training"])


def evaluate(run, policy, heldout, correct, monkeypatch, name="rl"):
    """The record of an evaluation with these numbers of correct responses."""
    fake = solved(heldout, correct)
    monkeypatch.setattr(rloop, "respond", lambda *args, **kwargs: (fake, {}))
    return rloop.evaluate(run, policy, None, heldout, name)


def test_evaluate_by_hand(small_run, tiny, monkeypatch):
    """Fault: avg@K or pass@k averaged over samples of all problems, or the wrong powers of two."""
    heldout = load_problems("countdown:heldout", size=3)
    record = evaluate(small_run("a"), tiny, heldout, [0, 1, 4], monkeypatch, "base")
    assert record["eval/avg@4"] == pytest.approx(5 / 12) == record["eval/pass@1"]
    assert record["eval/pass@2"] == pytest.approx((0 + 0.5 + 1) / 3)
    assert record["eval/pass@4"] == pytest.approx(2 / 3)
    assert record["eval/avg@4_low"] < record["eval/avg@4"] < record["eval/avg@4_high"]
    assert record["eval/num_problems"] == 3 and record["eval/num_samples"] == 4
    assert "eval/pass@3" not in record and "eval/pass@8" not in record


def test_forgotten_and_union_shares_by_hand(small_run, tiny, monkeypatch):
    """Fault: a problem that was never solved counts as forgotten, or only the last evaluation is
    looked at."""
    heldout = load_problems("countdown:heldout", size=4)
    run, shares = small_run("a"), []
    for correct in ([1, 2, 0, 0], [0, 1, 0, 0], [0, 0, 3, 0]):
        record = evaluate(run, tiny, heldout, correct, monkeypatch)
        shares.append((record["eval/forgotten_share"], record["eval/union_share"]))
    assert shares == [(0.0, 0.5), (0.25, 0.5), (0.5, 0.75)]
