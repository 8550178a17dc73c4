"""The algorithm: losses, advantages, weights, filter, and the loop's promises."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_RUN
from safetensors.torch import load_file

import rloop
from config import load_config
from data import load_problems
from data.tokenizer import Tokenizer
from model import Transformer
from packing import pack, token_logprobs
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
from rundir import RunDir
from sampler import sample


def trajectory(problem="p", ids=(1, 2, 0), reward=1.0, step=1, **fields):
    values = dict(problem=problem, iteration=0, step=step, prompt_ids=[3, 4], ids=list(ids), logps=[-0.5] * len(ids), finished=True,
                  response="", reason="correct" if reward else "wrong", reward=reward)  # fmt: skip
    return Trajectory(**(values | fields))


@pytest.fixture
def small_run(countdown_toml, tmp_path):
    """Opens a run of a few small steps in tmp_path/NAME with overrides."""

    def open_run(name="run", *overrides):
        cfg = load_config(
            countdown_toml, [*SMALL_RUN, "--run_dir", str(tmp_path / name), *overrides]
        )
        return RunDir(cfg)

    return open_run


# ---- pass@k


def test_pass_at_k_equals_brute_force():
    """Fault: pass@k with replacement (1 correct of 4 reads 0.684 at k = 4), or an off-by-one in the product."""
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
                assert pass_at_k(n, c, k) == pytest.approx(
                    sum(max(d) for d in draws) / len(draws), abs=1e-12
                )
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
    torch.testing.assert_close(
        got,
        torch.tensor([[0.75 / s, *[-0.25 / s] * 3], [1.0, 1.0, -1.0, -1.0]]),
        rtol=1e-4,
        atol=1e-5,
    )
    plain = group_advantages(torch.tensor([[1, 0, 0, 0]]), normalize_std=False)
    torch.testing.assert_close(plain, torch.tensor([[0.75, -0.25, -0.25, -0.25]]))


@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_flat_groups_and_groups_of_one_are_zero(normalize_std, value):
    """Fault: NaN for a group of one (torch.std), or rounding noise of a flat group blown up by 1 / eps."""
    for G in (1, 3, 7):
        assert (group_advantages(torch.full((2, G), value), normalize_std=normalize_std) == 0).all()


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_token_weights_by_hand(aggregation):
    """Fault: a denominator of the micro-batch instead of the whole step; prompt or padding counted."""
    mask = torch.tensor([[False, True, True, True], [False, False, True, False]])
    got = token_weights(mask, aggregation, num_tokens=4, num_rows=2, max_new_tokens=5)
    rows = {"token": (1 / 4, 1 / 4), "sequence": (1 / 6, 1 / 2), "constant": (1 / 10, 1 / 10)}[
        aggregation
    ]
    torch.testing.assert_close(got, torch.tensor([[0, *[rows[0]] * 3], [0, 0, rows[1], 0]]))
    part = token_weights(mask[1:], aggregation, num_tokens=4, num_rows=2, max_new_tokens=5)
    assert torch.equal(part, got[1:])


# ---- losses


def test_grpo_loss_by_hand():
    """Fault: the clip on the wrong side, max for min, a sign, or padding that counts."""
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1, 7.0])
    adv = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0, 1.0])
    weight = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2, 0.0])
    old = torch.tensor([-1.0, -2.0, -0.5, -3.0, -0.1, -1.0])
    loss, sums = grpo_loss(old + ratio.log(), old, adv, weight, clip_low=0.2, clip_high=0.28)
    assert loss.item() == pytest.approx(-0.2 * (1.28 - 1.5 + 0.5 - 0.8 + 2.2), abs=1e-6)
    assert {name: int(value) for name, value in sums.items()} == {
        "tokens": 5,
        "clip_low": 1,
        "clip_high": 1,
    }


def test_grpo_loss_gradcheck():
    """Fault: a gradient that is not the loss's (finite differences, float64), or one that flows into old_logp or adv."""
    generator = torch.Generator().manual_seed(0)
    logp = -torch.rand(4, 6, generator=generator, dtype=torch.float64) * 2
    old = logp + 0.4 * torch.randn(4, 6, generator=generator, dtype=torch.float64)
    adv = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    weight = torch.rand(4, 6, generator=generator, dtype=torch.float64)
    logp.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: grpo_loss(x, old, adv, weight, clip_low=0.2, clip_high=0.28)[0], logp
    )
    assert torch.autograd.gradcheck(lambda x: kl_loss(x, old, weight) + sft_loss(x, weight), logp)
    old.requires_grad_(), adv.requires_grad_()
    grpo_loss(logp, old, adv, weight, clip_low=0.2, clip_high=0.28)[0].backward()
    assert old.grad is None and adv.grad is None


def test_grpo_loss_ignores_garbage_behind_the_mask():
    """Fault: 0 * inf = NaN from padded entries."""
    logp = torch.tensor([-0.5, 900.0], requires_grad=True)
    loss, _ = grpo_loss(
        logp,
        torch.tensor([-0.5, -900.0]),
        torch.ones(2),
        torch.tensor([1.0, 0.0]),
        clip_low=0.2,
        clip_high=0.2,
    )
    loss.backward()
    assert loss.item() == -1.0 and logp.grad.tolist() == [-1.0, 0.0]
    assert sft_loss(torch.tensor([-0.5, -torch.inf]), torch.tensor([1.0, 0.0])).item() == 0.5


def test_losses_and_logprobs_leave_their_arguments_alone(tiny):
    """Fault: an in-place write through a view of the caller's ids, mask or rewards."""
    groups = [([3, 4], [[6, 7, 0]]), ([5], [[8, 0]])]
    batch, old, mask = (
        pack(groups),
        torch.tensor([-1.0] * 3 + [-2.0] * 2),
        torch.tensor([[True, True, True], [True, True, False]]),
    )
    tensors = [
        old,
        mask,
        *(value for value in vars(batch).values() if isinstance(value, torch.Tensor)),
    ]
    reward, before = torch.tensor([[1.0], [0.0]]), [tensor.clone() for tensor in tensors]
    logp, _ = token_logprobs(tiny, batch, 0.5)
    weight = token_weights(mask, "token", num_tokens=5, num_rows=2, max_new_tokens=4)[mask]
    weight_before, logp_before = weight.clone(), logp.detach().clone()
    grpo_loss(
        logp, old, group_advantages(reward).expand(2, 3)[mask], weight, clip_low=0.2, clip_high=0.28
    )[0].backward()
    kl_loss(logp, old, weight), sft_loss(logp, weight)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True)) and groups == [
        ([3, 4], [[6, 7, 0]]),
        ([5], [[8, 0]]),
    ]
    assert (
        torch.equal(weight, weight_before)
        and torch.equal(logp, logp_before)
        and reward.tolist() == [[1.0], [0.0]]
    )


def test_packed_and_padded_losses_agree():
    """Fault: a loss that needs rows: ports pack groups into one axis."""
    generator = torch.Generator().manual_seed(0)
    logp, old, adv = (torch.randn(3, 5, generator=generator) for _ in range(3))
    weight = torch.rand(3, 5, generator=generator)
    padded, _ = grpo_loss(logp, old, adv, weight, clip_low=0.2, clip_high=0.28)
    packed, _ = grpo_loss(
        logp.view(-1), old.view(-1), adv.view(-1), weight.view(-1), clip_low=0.2, clip_high=0.28
    )
    torch.testing.assert_close(padded, packed)


def test_kl_k3_by_hand():
    """Fault: the KL's direction: k3 is exp(ref - logp) - (ref - logp) - 1, and 0 for equal policies."""
    got = kl_loss(torch.tensor([-1.0, -1.0]), torch.tensor([-1.5, -1.0]), torch.tensor([1.0, 1.0]))
    assert got.item() == pytest.approx(math.exp(-0.5) + 0.5 - 1)


def test_overlong_penalty_by_hand():
    """Fault: the soft punishment starts late, is not -1 at the limit, or acts when it is switched off."""
    assert [rloop.overlong_penalty(n, 100, 20) for n in (10, 80, 90, 100)] == [0, 0, -0.5, -1]
    assert rloop.overlong_penalty(100, 100, 0) == 0


# ---- log-probs


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_trainer_logprobs_equal_sampler_logprobs(tiny, temperature):
    """Fault: the loss sees another distribution than the one that was sampled (temperature left out, stop token dropped)."""
    prompts = [[5, 6, 7], [9], [3, 4, 5, 6, 7, 8]]
    groups = sample(
        tiny,
        prompts,
        num_samples=4,
        max_new_tokens=10,
        temperature=temperature,
        stop_ids={0, 7},
        seed=0,
        max_rows=5,
    )
    batch = pack([(p, [c.ids for c in g]) for p, g in zip(prompts, groups, strict=True)])
    old = torch.tensor([logp for g in groups for c in g for logp in c.logps])
    logp, _ = token_logprobs(tiny, batch, temperature)
    assert (logp - old).abs().max() < 2e-5


def test_eos_gets_gradient(tiny):
    """Fault: the stop token is masked out (by `ids == pad` or by position), so the policy never learns to stop."""
    logp, _ = token_logprobs(tiny, pack([([3, 4], [[6, 0]])]))
    logp.retain_grad()
    sft_loss(logp, torch.full((2,), 0.5)).backward()
    assert logp.grad.tolist() == [-0.5, -0.5]
    gradient = (
        tiny.model.embed_tokens.weight.grad
    )  # tied: pushed towards the stop token, 0, at its place
    assert gradient[0].abs().max() > gradient[1].abs().max()


def gradient_of_update(small_run, tiny, name, groups, *overrides):
    """The gradient that update() gives the optimizer for these groups."""
    run = small_run(name, "--rl.minibatches", "1", *overrides)
    gradients = {}
    tiny.zero_grad()
    optimizer = torch.optim.SGD(tiny.parameters(), lr=0.0)
    optimizer.step = lambda: gradients.update(
        {n: w.grad.clone() for n, w in tiny.named_parameters()}
    )
    metrics = rloop.update(tiny, optimizer, None, groups, run)
    return gradients, metrics


@pytest.fixture
def groups(tiny):
    prompts = [[5, 6, 7], [9], [3, 4, 5, 6, 7, 8]]
    sampled = sample(
        tiny, prompts, num_samples=4, max_new_tokens=10, stop_ids={0, 7}, seed=0, max_rows=64
    )
    return [
        [
            trajectory(ids=c.ids, logps=c.logps, prompt_ids=p, reward=float(j == i))
            for j, c in enumerate(g)
        ]
        for i, (p, g) in enumerate(zip(prompts, sampled, strict=True))
    ]


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_gradient_does_not_depend_on_micro_batches(small_run, tiny, groups, aggregation):
    """Fault: the loss is normalised per micro-batch, so memory settings change what is learned."""
    options = ("--rl.aggregation", aggregation, "--optimizer.grad_clip", "1e9")
    whole, whole_metrics = gradient_of_update(
        small_run, tiny, "a", groups, *options, "--compute.micro_batch_tokens", "100000"
    )
    split, split_metrics = gradient_of_update(
        small_run, tiny, "b", groups, *options, "--compute.micro_batch_tokens", "17"
    )
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], rtol=1e-4, atol=1e-6)
    assert max(g.abs().max() for g in whole.values()) > 1e-3
    for name, value in whole_metrics.items():
        assert split_metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_update_gradient_equals_a_direct_computation(small_run, tiny, groups):
    """Fault: anything between trajectories and gradient: advantages given to the wrong rows, a wrong denominator, a sign."""
    got, _ = gradient_of_update(small_run, tiny, "a", groups, "--optimizer.grad_clip", "1e9")
    tiny.zero_grad()
    num_tokens = sum(len(t.ids) for g in groups for t in g)
    for group in groups:
        rewards = np.array([t.reward for t in group])
        for t, advantage in zip(group, (rewards - rewards.mean()) / rewards.std(), strict=True):
            logp = tiny(torch.tensor([t.prompt_ids + t.ids]))[0].log_softmax(-1)
            for j, token in enumerate(t.ids):  # on-policy the gradient is A * grad log p
                (-advantage / num_tokens * logp[len(t.prompt_ids) + j - 1, token]).backward(
                    retain_graph=True
                )
    for name, weight in tiny.named_parameters():
        torch.testing.assert_close(got[name], weight.grad, rtol=1e-3, atol=1e-5)


def test_activation_checkpointing_leaves_the_gradient_and_keeps_less(small_run, tiny, groups):
    """Fault: the second run of a block sees other inputs, or nothing is saved by it."""
    kept = []

    def update(name: str, checkpointing: bool):
        for block in tiny.model.layers:
            block.checkpoint_activations = checkpointing
        sizes: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: (sizes.update({x.data_ptr(): x.nbytes}), x)[1], lambda x: x
        ):
            gradient, _ = gradient_of_update(
                small_run, tiny, name, groups, "--optimizer.grad_clip", "1e9"
            )
        kept.append(sum(sizes.values()))
        return gradient

    whole, twice = update("a", False), update("b", True)
    torch.testing.assert_close(twice, whole)
    assert kept[1] < 0.6 * kept[0]


def test_recomputed_logprobs_replace_the_samplers(small_run, tiny, groups):
    """Fault: with a sampler of other precision the ratio is not 1 before the first update, or its gap is not logged."""
    options = (
        "--optimizer.grad_clip",
        "1e9",
        "--rl.recompute_logprobs",
        "true",
        "--compute.micro_batch_tokens",
        "40",
    )
    expected, _ = gradient_of_update(small_run, tiny, "a", groups, "--optimizer.grad_clip", "1e9")
    for t in itertools.chain(*groups):
        t.logps = [logp - 0.5 for logp in t.logps]
    got, metrics = gradient_of_update(small_run, tiny, "b", groups, *options)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-5)
    assert (
        metrics["rl/logp_gap_mean_nat"] == pytest.approx(0.5, abs=1e-4)
        and metrics["rl/clip_high_share"] == 0
    )


def test_importance_weights_are_truncated(small_run, tiny, groups):
    """Fault: tokens that the trainer finds likelier than the sampler did are not weighted up, or beyond the cap."""
    options = (
        "--optimizer.grad_clip",
        "1e9",
        "--rl.recompute_logprobs",
        "true",
        "--rl.importance_cap",
    )
    plain, _ = gradient_of_update(small_run, tiny, "a", groups, *options[:-1])
    groups[1][1].logps = [
        logp - math.log(3) for logp in groups[1][1].logps
    ]  # trainer / sampler = 3
    whole, _ = gradient_of_update(small_run, tiny, "b", groups, *options, "5.0")
    capped, _ = gradient_of_update(small_run, tiny, "c", groups, *options, "2.0")
    for name in plain:
        torch.testing.assert_close(
            2 * (capped[name] - plain[name]), whole[name] - plain[name], rtol=1e-2, atol=1e-5
        )
    assert max((whole[name] - plain[name]).abs().max() for name in plain) > 1e-3


def test_bfloat16_gradient_is_close_and_weights_stay_float32(small_run, tiny, groups):
    """Fault: bfloat16 weights or losses (small updates are rounded away), or products of another precision than asked for."""
    options = ("--optimizer.grad_clip", "1e9", "--compute.micro_batch_tokens", "40")
    exact, _ = gradient_of_update(small_run, tiny, "a", groups, *options)
    rounded, metrics = gradient_of_update(
        small_run, tiny, "b", groups, *options, "--compute.dtype", "bfloat16"
    )
    for name, weight in tiny.named_parameters():
        assert weight.dtype == rounded[name].dtype == torch.float32
        assert (
            torch.cosine_similarity(rounded[name].flatten(), exact[name].flatten(), dim=0) > 0.98
        ), name
    assert (
        any(not torch.equal(rounded[name], exact[name]) for name in exact)
        and 1e-4 < metrics["rl/logp_gap_mean_nat"] < 0.1
    )


def test_bfloat16_run_is_whole(small_run):
    """Fault: sampling in bfloat16 leaves its rounded weights in the policy, or the run does not repeat."""
    runs = [
        run_whole(small_run(name, "--compute.dtype", "bfloat16", "--rl.recompute_logprobs", "true"))
        for name in ("a", "b")
    ]
    assert without_times(runs[0]) == without_times(runs[1])
    gaps = [r["rl/logp_gap_mean_nat"] for r in runs[0] if "rl/logp_gap_mean_nat" in r]
    assert gaps and all(1e-5 < gap < 0.1 for gap in gaps)
    saved = load_file(
        small_run("a", "--compute.dtype", "bfloat16", "--rl.recompute_logprobs", "true").path
        / "policies/theta_2/model.safetensors"
    )
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    assert any((tensor != tensor.bfloat16()).any() for tensor in saved.values())


def test_flat_groups_give_zero_gradient(small_run, tiny, groups):
    """Fault: groups without a signal move the policy."""
    for t in itertools.chain(*groups):
        t.reward = 1.0
    gradients, _ = gradient_of_update(small_run, tiny, "a", groups)
    assert all((g == 0).all() for g in gradients.values())


def test_non_finite_loss_stops_and_saves_the_batch(small_run, tiny, groups):
    """Fault: a NaN is printed, or written into the weights, and the run goes on."""
    run = small_run("a", "--rl.minibatches", "1")
    before = {n: w.clone() for n, w in tiny.state_dict().items()}
    groups[1][2].logps[0] = math.nan
    with pytest.raises(FloatingPointError, match="nonfinite_batch"):
        rloop.update(tiny, torch.optim.AdamW(tiny.parameters(), lr=0.1), None, groups, run)
    saved = run.read("nonfinite_batch.jsonl")
    assert (
        len(saved) == 12
        and math.isnan(saved[6]["logps"][0])
        and saved[6]["ids"] == groups[1][2].ids
    )
    assert all(torch.equal(before[n], w) for n, w in tiny.state_dict().items())


# ---- filter


def test_select_experts_by_hand():
    """Fault: wrong answers, easy problems or duplicates among the experts; equal answers to different problems merged."""
    phase = [
        *[trajectory("easy", ids=(i, 0)) for i in range(1, 5)],
        *[
            trajectory("hard", ids=ids, reward=r, step=s)
            for s, (ids, r) in enumerate([((1, 0), 1), ((2, 0), 0), ((1, 0), 1), ((3, 0), 1)])
        ],
        *[trajectory("harder", ids=ids, reward=r) for ids, r in [((1, 0), 1), ((2, 0), 0)]],
        *[trajectory("never", ids=(i, 0), reward=0) for i in range(3)],
    ]
    before = [repr(t) for t in phase]
    got = select_experts(phase, max_success_rate=0.75, max_per_problem=10)
    assert [(t.problem, t.ids, t.step) for t in got] == [
        ("hard", [1, 0], 0),
        ("hard", [3, 0], 3),
        ("harder", [1, 0], 1),
    ]
    assert [
        (t.problem, t.ids) for t in select_experts(phase, max_success_rate=0.5, max_per_problem=10)
    ] == [("harder", [1, 0])]
    assert len(select_experts(phase, max_success_rate=1.0, max_per_problem=10)) == 7
    assert select_experts(phase[-3:], max_success_rate=1.0, max_per_problem=10) == []
    assert [repr(t) for t in phase] == before


def test_select_experts_cap_spans_the_phase():
    """Fault: the cap keeps only the first or the last steps, and with them one policy's habits."""
    phase = [trajectory("p", ids=(s, 0), step=s) for s in range(1, 100)] + [
        trajectory("p", reward=0)
    ]
    got = select_experts(phase, max_success_rate=1.0, max_per_problem=4)
    assert [t.step for t in got] == [1, 34, 66, 99]
    assert [t.step for t in select_experts(phase, max_success_rate=1.0, max_per_problem=1)] == [1]


# ---- the loop


def run_whole(run):
    rloop.run_method(run.cfg)
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def without_times(records):
    return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in records]


def test_rloop_run_is_whole(small_run):
    """Fault: a phase left out or in the wrong order, a trajectory lost, a policy that was not exported."""
    run = small_run()
    records = run_whole(run)
    order = [
        r["policy"] if r["phase"] == "eval" else r["phase"]
        for r in records
        if r["phase"] != "rft" or r["step"] == 1
    ]
    assert order == ["base", *["rl", "rl", "rl", "rl", "rl", "filter", "rft", "rft"] * 2]
    assert [r["rl_steps"] for r in records if r["phase"] == "eval"] == [0, 2, 3, 3, 5, 6, 6]
    for i in (1, 2):
        trajectories = run.read(f"trajectories/iteration_{i}.jsonl")
        assert len(trajectories) == 3 * 4 * 8 and {t["step"] for t in trajectories} == {1, 2, 3}
        assert all(t["reward"] == 1 for t in run.read(f"experts/iteration_{i}.jsonl"))
    names = {p.name for p in (run.path / "policies").iterdir()}
    assert names == {"rl_1", "theta_1", "rl_2", "theta_2"}
    theta = Transformer.from_pretrained(run.path / "policies" / "theta_2")
    assert Tokenizer(run.path / "policies" / "theta_2").stop_ids == {0}
    rl = Transformer.from_pretrained(run.path / "policies" / "rl_2")
    assert not torch.equal(theta.model.norm.weight, rl.model.norm.weight)


def test_rft_starts_bitwise_from_theta_i(small_run, monkeypatch):
    """Fault: RFT starts from the RL policy (or a rounded copy) instead of the policy that the phase started from."""
    starts, ends = [], []
    real_rft, real_explore = rloop.rft, rloop.explore

    def spy_explore(run, policy, *rest):
        starts.append(rloop.copy_weights(policy))
        return real_explore(run, policy, *rest)

    def spy_rft(run, policy, pairs):
        ends.append(rloop.copy_weights(policy))
        real_rft(run, policy, pairs)

    monkeypatch.setattr(rloop, "explore", spy_explore)
    monkeypatch.setattr(rloop, "rft", spy_rft)
    run = small_run()
    run_whole(run)
    assert len(starts) == len(ends) == 2
    for i in range(2):
        assert all(torch.equal(starts[i][n], ends[i][n]) for n in starts[i])
        rl = Transformer.from_pretrained(run.path / "policies" / f"rl_{i + 1}").state_dict()
        assert any(not torch.equal(rl[n], ends[i][n]) for n in rl)
    theta_1 = Transformer.from_pretrained(run.path / "policies" / "theta_1").state_dict()
    assert all(torch.equal(theta_1[n], starts[1][n]) for n in theta_1)


@pytest.mark.parametrize(("method", "lr"), [("rloop", "1e-4"), ("rl", "1e-4"), ("rloop", "0")])
def test_interrupted_run_continues_at_the_last_step(small_run, monkeypatch, method, lr):
    """Fault: continuing repeats or skips steps, forgets the optimizer, theta_i or trajectories, sees other problems, or wants an
    optimizer that pure RFT (lr 0) never had."""
    options = ("--method", method, "--rl.kl_coef", "0.01", "--rl.lr", lr)
    whole = without_times(run_whole(small_run("whole", *options)))
    real = rloop.sample_groups
    for stop_at in (2, 5):

        def failing(policy, tokenizer, problems, run, step, stop_at=stop_at):
            if run.progress.rl_steps == stop_at:
                raise KeyboardInterrupt
            return real(policy, tokenizer, problems, run, step)

        name = f"stopped-{stop_at}"
        monkeypatch.setattr(rloop, "sample_groups", failing)
        with pytest.raises(KeyboardInterrupt):
            rloop.run_method(small_run(name, *options).cfg)
        monkeypatch.setattr(rloop, "sample_groups", real)
        again = small_run(name, *options)
        again.append(
            "metrics.jsonl", [{"phase": "half a step"}]
        )  # written after the checkpoint: must be dropped
        assert without_times(run_whole(small_run(name, *options))) == whole


@pytest.mark.parametrize("calls", [1, 16])
def test_run_interrupted_in_rft_continues_exactly(small_run, monkeypatch, calls):
    """Fault: an interrupted RFT starts again from half-tuned or RL-ed weights, or its filter and RFT records stand twice."""
    options = ("--rft.batch_size", "1", "--rft.epochs", "3")
    whole = run_whole(small_run("whole", *options))
    assert sum(r["phase"] == "rft" for r in whole) > 8
    real, count = rloop.sft_loss, itertools.count(1)

    def failing(logp, weight):
        if next(count) == calls:
            raise KeyboardInterrupt
        return real(logp, weight)

    monkeypatch.setattr(rloop, "sft_loss", failing)
    with pytest.raises(KeyboardInterrupt):
        rloop.run_method(small_run("stopped", *options).cfg)
    monkeypatch.setattr(rloop, "sft_loss", real)
    again = small_run("stopped", *options)
    assert without_times(run_whole(again)) == without_times(whole)
    names = (
        "experts/iteration_1.jsonl",
        "experts/iteration_2.jsonl",
        "trajectories/iteration_2.jsonl",
    )
    assert all(again.read(name) == small_run("whole", *options).read(name) for name in names)


def test_nearly_all_truncated_is_said(small_run, capsys):
    """Fault: a prompt format without EOS scores 0 for a whole run, in silence."""
    run_whole(
        small_run("a", "--method", "rl", "--iterations", "1", "--sampling.max_new_tokens", "5")
    )
    assert (
        "nearly all responses are cut off: raise sampling.max_new_tokens" in capsys.readouterr().out
    )
    run_whole(small_run("b", "--method", "rl", "--iterations", "1"))
    assert "cut off" not in capsys.readouterr().out
    run_whole(small_run("c", "--method", "eval", "--sampling.max_new_tokens", "5"))
    assert (
        "nearly all responses are cut off: raise sampling.max_new_tokens" in capsys.readouterr().out
    )


def test_prompt_is_a_conversation_or_plain_text(countdown_toml, tmp_path):
    """Fault: the chat template or the messages before the question are left out, so a chat model never ends its answers."""
    base = ROOT / "data" / "countdown_base"
    (tmp_path / "tokenizer.json").write_text((base / "tokenizer.json").read_text())
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    tokens = {
        "eos_token": "<eos>",
        "chat_template": template.replace("m.role", "'from' if m.role == 'system' else 'make'"),
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokens).replace("assistant:", "="))
    tokenizer = Tokenizer(tmp_path)
    for chat, expected in (
        ("true", "from: 7\nmake: 3 from 1 2 *\n="),
        ("false", "7\n\n3 from 1 2 *"),
    ):
        cfg = load_config(
            countdown_toml, ["--data.chat_template", chat, "--data.prompt", "{problem} *"]
        )
        assert rloop.encode_prompt(
            tokenizer, "3 from 1 2", cfg, (("system", "7"),)
        ) == tokenizer.encode(expected)


def test_training_on_held_out_questions_is_refused(small_run, tmp_path):
    """Fault: a run whose training and held-out files share questions starts."""
    file = tmp_path / "p.jsonl"
    file.write_text(
        "".join(json.dumps({"problem": f"{i}?", "answer": "1"}) + "\n" for i in range(20))
    )
    run = small_run("a", "--data.train", str(file), "--data.eval", str(file))
    with pytest.raises(ValueError, match="questions of data.eval"):
        rloop.run_method(run.cfg)


def test_rl_baseline_has_the_same_budget(small_run):
    """Fault: the baseline gets other numbers of RL steps or trajectories than RLoop, or sees RFT."""
    loop = run_whole(small_run("loop"))
    plain = run_whole(small_run("plain", "--method", "rl"))
    last_loop, last_plain = (
        [r for r in records if r["phase"] == "rl"][-1] for records in (loop, plain)
    )
    for key in ("rl_steps", "rl/num_trajectories"):
        assert last_loop[key] == last_plain[key]
    assert not [r for r in plain if r["phase"] in ("rft", "filter")]
    assert (
        without_times(loop)[:3] == without_times(plain)[:3]
    )  # base and the first steps are the same run


def test_finished_run_says_so(small_run, capsys):
    """Fault: running a finished directory again trains on, or repeats its records."""
    run = small_run("done", "--method", "rl")
    before = run_whole(run)
    assert run_whole(small_run("done", "--method", "rl")) == before
    assert "is finished" in capsys.readouterr().out


def test_other_config_in_the_same_directory_is_refused(small_run):
    """Fault: a run goes on under settings that it did not start with, or a mistyped first try blocks its directory."""
    small_run("a", "--rl.lr", "0.25")
    run = small_run("a")
    run.save(Transformer.from_pretrained(run.cfg.model.path))
    with pytest.raises(ValueError, match="rl.lr"):
        small_run("a", "--rl.lr", "0.5")
    assert json.loads((run.path / "config.json").read_text())["rl"]["lr"] == run.cfg.rl.lr


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_foreign_directory_is_left_alone(small_run, tmp_path, name):
    """Fault: --run_dir on a model's or another program's directory overwrites or empties its files."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_text('{"model_type": "llama"}\n')
    with pytest.raises(ValueError, match="something else than a run"):
        small_run("a")
    assert (tmp_path / "a" / name).read_text() == '{"model_type": "llama"}\n'


def test_unwritable_run_directory_is_one_line(countdown_toml, capsys):
    """Fault: a traceback for a run directory that cannot be made."""
    assert rloop.main(["--config", str(countdown_toml), "--run_dir", "/dev/null/run"]) == 1
    assert "/dev/null/run" in capsys.readouterr().err


def test_no_experts_is_a_named_outcome(small_run, capsys):
    """Fault: an empty expert set crashes RFT, or passes in silence."""
    run = small_run("none", "--select.max_success_rate", "1e-9", "--iterations", "1")
    records = run_whole(run)
    assert [r["filter/outcome"] for r in records if r["phase"] == "filter"] == ["no_experts"]
    assert not [r for r in records if r["phase"] == "rft"]
    base = Transformer.from_pretrained(run.cfg.model.path).state_dict()
    theta = Transformer.from_pretrained(run.path / "policies" / "theta_1").state_dict()
    assert all(torch.equal(base[n], theta[n]) for n in base)


def test_learning_rate_zero_leaves_the_policy_alone(small_run):
    """Fault: pure RFT (lr 0) still moves the exploring policy, by weight decay for instance."""
    run = small_run("rft", "--rl.lr", "0", "--iterations", "1", "--optimizer.weight_decay", "0.5")
    run_whole(run)
    base = Transformer.from_pretrained(run.cfg.model.path).state_dict()
    rl = Transformer.from_pretrained(run.path / "policies" / "rl_1").state_dict()
    assert all(torch.equal(base[n], rl[n]) for n in base)


def test_dynamic_sampling_refills_with_fresh_problems(small_run, monkeypatch):
    """Fault: flat groups are trained on or replaced by the same problems; the number of rounds has no bound."""
    asked = []

    def fake_respond(policy, tokenizer, problems, cfg, *, seed, place, **sampling):
        asked.append([p.id for p in problems])
        flat = len(asked) < 3  # the first two rounds have one usable group each
        groups = [
            [trajectory(p.id, reward=float(j == 0 and (i == 0 or not flat))) for j in range(8)]
            for i, p in enumerate(problems)
        ]
        return groups, {"time/rollout_s": 1.0, "time/verify_s": 1.0}

    monkeypatch.setattr(rloop, "respond", fake_respond)
    problems = load_problems("countdown:train", size=16)
    run = small_run("a", "--rl.max_sampling_rounds", "5")
    usable, sampled, seconds = rloop.sample_groups(None, None, problems, run, step=1)
    assert [len(ids) for ids in asked] == [4, 3, 2] and len(usable) == 4 and len(sampled) == 9
    assert (
        len(set(sum(asked, []))) == 9
        and seconds["time/rollout_s"] == 3.0
        and run.progress.problems_drawn == 9
    )
    asked.clear()
    bounded = small_run("b", "--rl.max_sampling_rounds", "2")
    usable, sampled, _ = rloop.sample_groups(None, None, problems, bounded, step=1)
    assert len(usable) == 2 and len(sampled) == 7


def test_equal_problems_stay_separate_groups(small_run, monkeypatch):
    """Fault: groups keyed by prompt text merge a problem that is drawn twice."""
    problems = load_problems("countdown:train", size=1) * 4
    run = small_run("a")
    policy, tokenizer = rloop.load_policy(run.cfg), Tokenizer(run.cfg.model.path)
    groups, _ = rloop.respond(
        policy, tokenizer, problems, run.cfg, seed=0, place=(0, 1), num_samples=8, temperature=1.0
    )
    assert [len(g) for g in groups] == [8] * 4
    assert len({tuple(tuple(t.ids) for t in g) for g in groups}) == 4


def test_problem_stream_covers_every_epoch(small_run):
    """Fault: problems are repeated or left out within an epoch, or every epoch has the same order."""
    run = small_run("a")
    problems = load_problems("countdown:train", size=10)
    epochs = [
        [
            p.id
            for p in rloop.next_problems(problems, 5, run) + rloop.next_problems(problems, 5, run)
        ]
        for _ in range(2)
    ]
    assert (
        all(sorted(e) == sorted(p.id for p in problems) for e in epochs) and epochs[0] != epochs[1]
    )


def test_bootstrap_interval_covers_the_mean():
    """Fault: an interval over samples instead of problems, or of the wrong width (normal approximation as the oracle)."""
    values = np.random.default_rng(0).random(400)
    low, high = rloop.bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.004) and high == pytest.approx(
        values.mean() + half, abs=0.004
    )


def test_evaluate_by_hand(small_run, monkeypatch):
    """Fault: avg@K or pass@k averaged over samples of all problems, or the wrong powers of two."""
    heldout = load_problems("countdown:heldout", size=3)
    correct = [0, 1, 4]
    fake = [
        [trajectory(p.id, reward=float(j < c)) for j in range(4)]
        for p, c in zip(heldout, correct, strict=True)
    ]
    monkeypatch.setattr(rloop, "respond", lambda *args, **kwargs: (fake, {}))
    record = rloop.evaluate(small_run("a"), None, None, heldout, "base")
    assert record["eval/avg@4"] == pytest.approx(5 / 12) == record["eval/pass@1"]
    assert record["eval/pass@2"] == pytest.approx((0 + 0.5 + 1) / 3) and record[
        "eval/pass@4"
    ] == pytest.approx(2 / 3)
    assert (
        record["eval/num_problems"] == 3
        and record["eval/num_samples"] == 4
        and "eval/pass@3" not in record
    )


def test_forgotten_and_union_shares_by_hand(small_run, monkeypatch):
    """Fault: a problem that was never solved counts as forgotten, or only the last evaluation is looked at."""
    heldout = load_problems("countdown:heldout", size=4)
    run, shares = small_run("a"), []
    for correct in ([1, 2, 0, 0], [0, 1, 0, 0], [0, 0, 3, 0]):
        fake = [
            [trajectory(p.id, reward=float(j < c)) for j in range(4)]
            for p, c in zip(heldout, correct, strict=True)
        ]
        monkeypatch.setattr(rloop, "respond", lambda *args, fake=fake, **kwargs: (fake, {}))
        record = rloop.evaluate(run, None, None, heldout, "rl")
        shares.append((record["eval/forgotten_share"], record["eval/union_share"]))
    assert shares == [(0.0, 0.5), (0.25, 0.5), (0.5, 0.75)]
