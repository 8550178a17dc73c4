"""RLoop (arXiv 2511.04285): iterated policy initialization for RL with verifiable rewards.

    theta_0 = base policy                                            Transformer.from_pretrained
    for i in 0 .. I-1:                                               run_rloop
        phi = theta_i                                                copy_weights
        for t in 1 .. N:                                             explore
            sample G responses to each of P problems, score 0/1      sample_groups, respond
            drop groups whose rewards are all equal, refill          sample_groups
            A = (r - mean(r)) / std(r) within a group                group_advantages
            phi += clipped policy-gradient step                      update, accumulate_gradient, grpo_loss
            D += every trajectory of the step
        E = successes in D on hard problems, deduplicated, capped    select_experts
        theta_{i+1} = SFT of theta_i (not phi) on E                  rft, sft_loss
    avg@K and pass@k on held-out problems, all along                 evaluate, pass_at_k
    baseline: the same I*N RL steps in a row from theta_0            run_rl

Shapes: N problems (groups), G samples a problem, B rows (responses), T tokens. Training tensors are flat, one entry a response token
(packing.py). Masks are bool, True = response token. Log-probs are natural logs in float32.
"""

import ctypes
import math
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import parallel
import plan
from config import Config, config_from_command_line
from data import Problem, check_overlap, load_demonstrations, load_problems
from data.tokenizer import Tokenizer
from model import Transformer, whole_tensor
from packing import Packed, micro_batches, token_logprobs
from parallel import uninterrupted
from rundir import RunDir, describe_step, truncation_warning
from sampler import sample
from verify import verify_many

STD_EPS = 1e-6  # keeps the advantages finite; GRPO


@dataclass(kw_only=True)
class Trajectory:
    """One sampled response. logps are the sampler's, of the sampled distribution, one a response token."""

    problem: str  # Problem.id
    iteration: int
    step: int  # RL step of the iteration, from 1
    prompt_ids: list[int]
    ids: list[int]  # response tokens, the stop token included
    logps: list[float]
    finished: bool  # ended on a stop token
    response: str
    reason: str  # the verdict's
    reward: float  # 0 or 1


# ---------------------------------------------------------------------------------------------------------------- pure functions


def group_advantages(reward_NG: Tensor, *, normalize_std: bool = True) -> Tensor:
    """Advantages [N, G]: reward minus the group's mean, over its population std (GRPO, arXiv 2402.03300, eq. 4).

    normalize_std=False leaves the division out (Dr.GRPO, arXiv 2503.20783). A flat group, or a group of one, gets exactly 0.
    """
    reward_NG = reward_NG if reward_NG.is_floating_point() else reward_NG.float()
    adv_NG = reward_NG - reward_NG.mean(dim=1, keepdim=True)
    if normalize_std:
        adv_NG = adv_NG / (reward_NG.std(dim=1, keepdim=True, unbiased=False) + STD_EPS)
    flat_N1 = reward_NG.amax(dim=1, keepdim=True) == reward_NG.amin(dim=1, keepdim=True)
    return adv_NG.masked_fill(flat_N1, 0.0)


def token_weights(
    mask_BT: Tensor, aggregation: str, *, num_tokens: int, num_rows: int, max_new_tokens: int
) -> Tensor:
    """Weight [B, T] of each response token in the loss; over all rows of an optimizer step they sum to 1.

    num_tokens and num_rows count the WHOLE optimizer step, so the gradient does not depend on how it is cut into micro-batches.
    "token": 1 / num_tokens (DAPO, arXiv 2503.14476, eq. 8). "sequence": mean over a response, then over responses (GRPO).
    "constant": 1 / (num_rows * max_new_tokens) (Dr.GRPO); these sum to less than 1 when responses are shorter.
    """
    mask_BT = mask_BT.float()
    if aggregation == "token":
        return mask_BT / num_tokens
    if aggregation == "sequence":
        return mask_BT / (mask_BT.sum(dim=1, keepdim=True).clamp(min=1) * num_rows)
    if aggregation == "constant":
        return mask_BT / (num_rows * max_new_tokens)
    raise ValueError(f"aggregation {aggregation!r}: expected 'token', 'sequence' or 'constant'")


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    adv: Tensor,
    weight: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy-gradient loss: -sum of weight * min(rho * A, clip(rho, 1 - clip_low, 1 + clip_high) * A), rho = exp(logp - old_logp).

    PPO's objective (arXiv 1707.06347, eq. 7) with DAPO's clip-higher. Shapes: four tensors of one shape, one entry a token; entries of
    weight 0 do not count. adv and old_logp are constants. Returns the loss (nat) and sums over the counted tokens: how many there are
    and how many the low and the high clip silence.
    """
    counted = weight != 0
    ratio = torch.exp(torch.where(counted, logp - old_logp.detach(), 0.0))
    adv = adv.detach()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -(weight * torch.minimum(ratio * adv, clipped * adv)).sum()
    sums = {
        "tokens": counted.sum(),
        "clip_low": (counted & (adv < 0) & (ratio < 1 - clip_low)).sum(),
        "clip_high": (counted & (adv > 0) & (ratio > 1 + clip_high)).sum(),
    }
    return loss, sums


def kl_loss(logp: Tensor, ref_logp: Tensor, weight: Tensor) -> Tensor:
    """Weighted k3 estimate of KL(policy || reference), nat: exp(d) - d - 1, d = ref_logp - logp (GRPO, eq. 4)."""
    delta = torch.where(weight != 0, ref_logp.detach() - logp, 0.0)
    return (weight * (delta.exp() - delta - 1)).sum()


def sft_loss(logp: Tensor, weight: Tensor) -> Tensor:
    """Weighted negative log-likelihood, nat; entries of weight 0 do not count."""
    return -(weight * torch.where(weight != 0, logp, 0.0)).sum()


def overlong_penalty(length: int, max_new_tokens: int, buffer: int) -> float:
    """DAPO's soft punishment (eq. 13): 0 up to max_new_tokens - buffer, then linearly down to -1 at max_new_tokens."""
    return -max(0.0, (length - (max_new_tokens - buffer)) / buffer) if buffer else 0.0


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased pass@k = 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, eq. 1), as a product that cannot overflow.

    Raises ValueError unless 1 <= k <= num_samples and 0 <= num_correct <= num_samples.
    """
    if not (1 <= k <= num_samples and 0 <= num_correct <= num_samples):
        raise ValueError(
            f"pass_at_k: k = {k} and num_correct = {num_correct} must fit num_samples = {num_samples}"
        )
    if num_samples - num_correct < k:
        return 1.0
    return 1.0 - math.prod(
        1.0 - k / i for i in range(num_samples - num_correct + 1, num_samples + 1)
    )


def select_experts(
    trajectories: Iterable[Trajectory], *, max_success_rate: float, max_per_problem: int
) -> list[Trajectory]:
    """Expert set E: the correct trajectories of problems whose success rate over the phase is in (0, max_success_rate].

    Exact duplicates are removed. Of a problem with more than max_per_problem, evenly spaced ones are kept in the order of the steps, so
    that they come from the whole phase and not from its end. The result may be empty. Of the wrong ones only the number is remembered.
    """
    num_attempts: Counter[str] = Counter()
    correct_of: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        num_attempts[trajectory.problem] += 1
        correct_of.setdefault(trajectory.problem, []).extend(
            [trajectory] if trajectory.reward == 1 else []
        )
    experts = []
    for problem, correct in correct_of.items():
        if not correct or len(correct) > max_success_rate * num_attempts[problem]:
            continue
        unique = list({tuple(t.ids): t for t in reversed(correct)}.values())[
            ::-1
        ]  # the first of equal ones
        spaced = (
            np.linspace(0, len(unique) - 1, min(len(unique), max_per_problem)).round().astype(int)
        )
        experts += [unique[i] for i in spaced]
    return experts


# ------------------------------------------------------------------------------------------------------- policy and batch


def copy_weights(policy: Transformer) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in policy.state_dict().items()}


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def new_optimizer(policy: Transformer, cfg: Config) -> torch.optim.AdamW:
    return torch.optim.AdamW(policy.parameters(), lr=0.0, weight_decay=cfg.optimizer.weight_decay)


def finish_step(
    policy: Transformer,
    optimizer: torch.optim.Optimizer,
    loss: float,
    rows: list[dict],
    run: RunDir,
) -> float:
    """Clip the gradient and apply it; returns its norm. A non-finite loss or gradient leaves the weights alone, saves the rows and stops.

    Raises FloatingPointError naming the saved rows.
    """
    grad_norm = float(
        whole_tensor(
            torch.nn.utils.clip_grad_norm_(policy.parameters(), run.cfg.optimizer.grad_clip)
        )
    )
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        run.append("nonfinite_batch.jsonl", rows)
        dump = run.path / "nonfinite_batch.jsonl"
        raise FloatingPointError(
            f"loss {loss}, gradient norm {grad_norm}: not finite; the weights are untouched, the batch is in {dump}"
        )
    optimizer.step()
    optimizer.zero_grad()
    return grad_norm


def seed_of(*path: int) -> int:
    """A seed for one place of the run, such as (seed, iteration, step, round)."""
    return int(np.random.SeedSequence(path).generate_state(1, np.uint64)[0])


# ------------------------------------------------------------------------------------------------------------------ explore


def encode_prompt(
    tokenizer: Tokenizer, question: str, cfg: Config, context: tuple[tuple[str, str], ...] = ()
) -> list[int]:
    """Token ids of data.prompt around the question, behind the (role, content) messages of its context: as a conversation in the
    checkpoint's chat template, or as plain text."""
    question = cfg.data.prompt.replace("{problem}", question)
    if cfg.data.chat_template:
        messages = [
            {"role": role, "content": content} for role, content in (*context, ("user", question))
        ]
        return tokenizer.encode(tokenizer.render_chat(messages))
    return tokenizer.encode(
        "\n\n".join([*(content for _, content in context), question]), add_special_tokens=True
    )


def respond(
    policy: Transformer,
    tokenizer: Tokenizer,
    problems: list[Problem],
    cfg: Config,
    *,
    seed: int,
    place: tuple[int, int],
    **sampling,
) -> tuple[list[list[Trajectory]], dict[str, float]]:
    """Sample responses to the problems and score them 0/1. Returns trajectories [problem][sample] and the seconds each part took.

    Every process samples for its share of the problems, from weights of its own; then all of them know all trajectories."""
    sampler, share = (
        policy.copy_as(getattr(torch, cfg.compute.dtype)),
        parallel.share(len(problems)),
    )
    limits = {
        "max_new_tokens": cfg.sampling.max_new_tokens,
        "stop_ids": tokenizer.stop_ids,
        "max_rows": cfg.compute.max_rows,
    }

    def sample_and_verify() -> tuple[list[list[Trajectory]], float, float]:
        start, mine = time.perf_counter(), problems[share]
        prompts = [encode_prompt(tokenizer, p.prompt, cfg, p.context) for p in mine]
        completions = sample(
            sampler, prompts, seed=seed, first_prompt=share.start, **limits, **sampling
        )
        sampled = time.perf_counter()
        flat = [
            (p, prompt, c)
            for p, prompt, group in zip(mine, prompts, completions, strict=True)
            for c in group
        ]
        texts = [tokenizer.decode(c.ids) for _, _, c in flat]
        verdicts = verify_many([p for p, _, _ in flat], texts)
        trajectories = [
            Trajectory(problem=p.id, iteration=place[0], step=place[1], prompt_ids=prompt, ids=c.ids, logps=c.logps, finished=c.finished,
                       response=text, reason=v.reason, reward=float(v.correct))
            for (p, prompt, c), text, v in zip(flat, texts, verdicts, strict=True)
        ]  # fmt: skip
        G = sampling["num_samples"]
        groups = [trajectories[i : i + G] for i in range(0, len(trajectories), G)]
        return groups, sampled - start, time.perf_counter() - sampled

    groups, rollout_s, verify_s = zip(*parallel.gather(sample_and_verify), strict=True)
    policy.free_copies()  # training needs the memory
    return [group for part in groups for group in part], {
        "time/rollout_s": max(rollout_s),
        "time/verify_s": max(verify_s),
    }


def next_problems(problems: list[Problem], count: int, run: RunDir) -> list[Problem]:
    """The next problems of the run's endless stream: every epoch is a fresh seeded permutation."""
    chosen, orders = [], {}
    for position in range(run.progress.problems_drawn, run.progress.problems_drawn + count):
        epoch, index = divmod(position, len(problems))
        if epoch not in orders:
            orders[epoch] = np.random.default_rng((run.cfg.seed, epoch)).permutation(len(problems))
        chosen.append(problems[orders[epoch][index]])
    run.progress.problems_drawn += count
    return chosen


def is_flat(group: list[Trajectory]) -> bool:
    return len({t.reward for t in group}) == 1


def sample_groups(
    policy, tokenizer, problems, run: RunDir, step: int
) -> tuple[list[list[Trajectory]], list[list[Trajectory]], dict]:
    """Dynamic sampling (DAPO, section 3.2): sample P groups, drop the flat ones, replace them by fresh problems for a bounded number of
    rounds. Returns the usable groups (at most P), all sampled groups, and the seconds it took."""
    cfg = run.cfg.rl
    usable, sampled, seconds = [], [], {"time/rollout_s": 0.0, "time/verify_s": 0.0}
    for round_ in range(cfg.max_sampling_rounds):
        wanted = next_problems(problems, cfg.problems_per_step - len(usable), run)
        seed = seed_of(run.cfg.seed, run.progress.iteration, step, round_)
        groups, spent = respond(
            policy, tokenizer, wanted, run.cfg, seed=seed, place=(run.progress.iteration, step),
            num_samples=cfg.samples_per_problem, temperature=run.cfg.sampling.temperature,
        )  # fmt: skip
        seconds = {name: seconds[name] + spent[name] for name in seconds}
        sampled += groups
        usable += [group for group in groups if not is_flat(group)]
        if len(usable) == cfg.problems_per_step:
            break
    return usable, sampled, seconds


def compute_precision(cfg: Config) -> torch.autocast:
    """Where the products of the forward pass are of compute.dtype; weights, log-probs and losses are float32 all the same."""
    return torch.autocast(
        parallel.device().type, torch.bfloat16, enabled=cfg.compute.dtype == "bfloat16"
    )


def training_batches(
    groups: list[tuple[list[int], list[list[int]]]], cfg: Config
) -> Iterator[tuple[Packed, list[int]]]:
    """This process's micro-batches of (prompt ids, [response ids, ...]) groups and the numbers of their responses. All processes get
    equally many, of which some may count for nothing: their numbers are an empty list."""
    return micro_batches(
        groups,
        cfg.compute.micro_batch_tokens,
        parallel.rank(),
        parallel.num_ranks(),
        parallel.device(),
    )


def id_groups(groups: list[list[Trajectory]]) -> list[tuple[list[int], list[list[int]]]]:
    return [(group[0].prompt_ids, [t.ids for t in group]) for group in groups]


@torch.no_grad()
def response_logprobs(
    model: Transformer, groups: list[list[Trajectory]], cfg: Config
) -> list[Tensor]:
    """Log-probs of every response's tokens, one tensor a response, as the trainer computes them."""
    mine: dict[int, Tensor] = {}
    with compute_precision(cfg):
        for batch, members in training_batches(id_groups(groups), cfg):
            logp, _ = token_logprobs(model, batch, cfg.sampling.temperature)
            if members:
                mine |= zip(members, logp.cpu().split(batch.response_lengths), strict=True)
    logps = {b: logp for part in parallel.gather(lambda: mine) for b, logp in part.items()}
    return [logps[b] for b in range(len(logps))]


def accumulate_gradient(
    policy: Transformer, groups: list[list[Trajectory]], adv_NG: Tensor, old_logps: list[Tensor], ref_logps: list[Tensor], cfg: Config
) -> dict[str, float]:  # fmt: skip
    """Add the gradient of one optimizer step's loss, in micro-batches. old_logps and ref_logps hold one tensor a response; without the
    first, the sampler's count, without the second there is no KL term. Returns the loss (nat) and, over the step's tokens, their number,
    sums and the largest gap to the sampler."""
    rows = [t for group in groups for t in group]
    length_B = torch.tensor([len(t.ids) for t in rows])
    mask_BT = torch.arange(int(length_B.max())) < length_B[:, None]
    budget = {
        "num_tokens": int(length_B.sum()),
        "num_rows": len(rows),
        "max_new_tokens": cfg.sampling.max_new_tokens,
    }
    weight_BT, adv_B = token_weights(mask_BT, cfg.rl.aggregation, **budget), adv_NG.flatten()
    totals = dict.fromkeys(
        ("loss", "kl", "entropy", "gap", "gap_max", "tokens", "clip_low", "clip_high"), 0.0
    )
    with compute_precision(cfg):
        for batch, members in training_batches(id_groups(groups), cfg):
            logp, entropy = token_logprobs(policy, batch, cfg.sampling.temperature)
            if not members:
                (0.0 * logp.sum()).backward()
                continue
            weight, adv = (
                weight_BT[members][mask_BT[members]],
                adv_B[members].repeat_interleave(length_B[members]),
            )
            sampler_logp = torch.tensor([logp for b in members for logp in rows[b].logps])
            old_logp = torch.cat([old_logps[b] for b in members]) if old_logps else sampler_logp
            if cfg.rl.importance_cap > 0:
                weight = weight * (old_logp - sampler_logp).exp().clamp(max=cfg.rl.importance_cap)
            old_logp, adv, weight, sampler_logp = (
                x.to(logp.device) for x in (old_logp, adv, weight, sampler_logp)
            )
            loss, counts = grpo_loss(
                logp, old_logp, adv, weight, clip_low=cfg.rl.clip_low, clip_high=cfg.rl.clip_high
            )
            if ref_logps:
                kl = kl_loss(
                    logp, torch.cat([ref_logps[b] for b in members]).to(logp.device), weight
                )
                loss = loss + cfg.rl.kl_coef * kl
                totals["kl"] += kl.item()
            loss.backward()
            gap = (logp.detach() - sampler_logp).abs()
            counts |= {"loss": loss, "entropy": entropy.sum(), "gap": gap.sum()}
            totals = {
                name: value + (counts[name].item() if name in counts else 0.0)
                for name, value in totals.items()
            }
            totals["gap_max"] = max(totals["gap_max"], gap.max().item())
    return parallel.total(totals)


def update(
    policy: Transformer,
    optimizer,
    reference: Transformer | None,
    groups: list[list[Trajectory]],
    run: RunDir,
) -> dict[str, float]:
    """One RL update on the usable groups, in minibatches optimizer steps. Returns the step's metrics."""
    cfg, limit = run.cfg, run.cfg.sampling.max_new_tokens
    reward_NG = torch.tensor(
        [
            [t.reward + overlong_penalty(len(t.ids), limit, cfg.rl.overlong_buffer) for t in g]
            for g in groups
        ]
    )
    adv_NG = group_advantages(reward_NG, normalize_std=cfg.rl.normalize_std)
    old_logps = response_logprobs(policy, groups, cfg) if cfg.rl.recompute_logprobs else []
    ref_logps = response_logprobs(reference, groups, cfg) if reference is not None else []
    steps = []
    for split in np.array_split(np.arange(len(groups)), min(cfg.rl.minibatches, len(groups))):
        chosen, rows = (
            [groups[n] for n in split],
            slice(split[0] * len(groups[0]), (split[-1] + 1) * len(groups[0])),
        )
        totals = accumulate_gradient(
            policy, chosen, adv_NG[split], old_logps[rows], ref_logps[rows], cfg
        )
        totals["grad_norm"] = finish_step(
            policy, optimizer, totals["loss"], [vars(t) for group in chosen for t in group], run
        )
        steps.append(totals)
    tokens, first = (
        sum(totals["tokens"] for totals in steps),
        steps[0],
    )  # later minibatches see a policy that has moved away
    return {
        "rl/loss": float(np.mean([totals["loss"] for totals in steps])),
        "rl/grad_norm": float(np.mean([totals["grad_norm"] for totals in steps])),
        "rl/entropy_mean_nat": sum(totals["entropy"] for totals in steps) / tokens,
        "rl/clip_low_share": sum(totals["clip_low"] for totals in steps) / tokens,
        "rl/clip_high_share": sum(totals["clip_high"] for totals in steps) / tokens,
        "rl/logp_gap_mean_nat": first["gap"] / first["tokens"],
        "rl/logp_gap_max_nat": first["gap_max"],
    } | (
        {"rl/kl_nat": float(np.mean([totals["kl"] for totals in steps]))}
        if reference is not None
        else {}
    )


def explore(
    run: RunDir, policy: Transformer, tokenizer: Tokenizer, problems: list[Problem], heldout: list[Problem], num_steps: int,
    theta_i: dict[str, Tensor],
) -> None:  # fmt: skip
    """One RL phase of num_steps steps: moves the policy away from theta_i. D, EVERY trajectory it sampled, right or wrong, goes to
    RUN/trajectories: the memory would not hold a long phase's."""
    cfg, now = run.cfg, run.progress
    optimizer = new_optimizer(policy, cfg)
    if now.step > 0:
        run.load_optimizer(optimizer)
    reference = None
    if cfg.rl.kl_coef > 0:
        reference = load_policy(cfg)
        reference.load_state_dict(theta_i)
    bar = tqdm(
        range(now.step + 1, num_steps + 1),
        initial=now.step,
        total=num_steps,
        desc=f"RL {now.iteration + 1}",
        leave=False,
    )
    drawn = now.problems_drawn
    try:
        if now.evaluation_owed:
            evaluate(run, policy, tokenizer, heldout, "rl")
        for step in bar:
            start = time.perf_counter()
            usable, sampled, seconds = sample_groups(policy, tokenizer, problems, run, step)
            lr = cfg.rl.lr * min(1.0, step / (cfg.rl.warmup_steps + 1))
            set_lr(optimizer, lr)
            with uninterrupted():
                updating = time.perf_counter()
                metrics = (
                    update(policy, optimizer, reference, usable, run) if usable and lr > 0 else {}
                )
                done = time.perf_counter()
                rows = [t for group in sampled for t in group]
                run.append(
                    f"trajectories/iteration_{now.iteration + 1}.jsonl", [vars(t) for t in rows]
                )
                now.step, now.rl_steps, now.num_trajectories = (
                    step,
                    now.rl_steps + 1,
                    now.num_trajectories + len(rows),
                )
                record = {
                    "phase": "rl", "iteration": now.iteration, "step": step, "rl_steps": now.rl_steps,
                    "rl/reward_mean": float(np.mean([t.reward for t in rows])),
                    "rl/flat_share": float(np.mean([is_flat(group) for group in sampled])),
                    "rl/len_mean_tok": float(np.mean([len(t.ids) for t in rows])),
                    "rl/truncated_share": float(np.mean([not t.finished for t in rows])),
                    "rl/num_trajectories": now.num_trajectories, "rl/lr": lr,
                } | metrics | seconds | {"time/update_s": done - updating, "time/step_s": done - start}  # fmt: skip
                run.log(record, describe_step(record, num_steps))
                drawn, now.evaluation_owed = (
                    now.problems_drawn,
                    step % cfg.eval.every == 0 or step == num_steps,
                )
            if now.evaluation_owed:
                evaluate(run, policy, tokenizer, heldout, "rl")
            if step % cfg.save_every == 0 or step == num_steps:
                run.save(policy, optimizer, theta_i)
    except KeyboardInterrupt:
        if now.step > 0:  # the weights are those of the last finished step
            now.problems_drawn = drawn
            run.save(policy, optimizer, theta_i)
        raise


# ------------------------------------------------------------------------------------------------------------------ exploit


def rft(run: RunDir, policy: Transformer, pairs: list[tuple[list[int], list[int]]]) -> None:
    """Rejection-sampling fine-tuning: maximise the mean log-probability of the response tokens of (prompt ids, response ids) pairs.

    Fresh AdamW, linear warm-up, then linear decay to 0; every epoch is a seeded shuffle. The policy given is theta_i and leaves as
    theta_{i+1}.
    """
    cfg, now = run.cfg, run.progress
    optimizer = new_optimizer(policy, cfg)
    if now.rft_step > 0:
        run.load_optimizer(optimizer)
    steps_per_epoch = math.ceil(len(pairs) / cfg.rft.batch_size)
    num_steps = cfg.rft.epochs * steps_per_epoch
    losses: list[float] = []
    bar = tqdm(
        range(now.rft_step, num_steps),
        initial=now.rft_step,
        total=num_steps,
        desc=f"RFT {now.iteration + 1}",
        leave=False,
    )
    try:
        for step in bar:
            parallel.check_stop()
            epoch, position = divmod(step, steps_per_epoch)
            order = np.random.default_rng((cfg.seed, now.iteration, epoch)).permutation(len(pairs))
            rows = [
                pairs[i]
                for i in order[position * cfg.rft.batch_size : (position + 1) * cfg.rft.batch_size]
            ]
            lr = cfg.rft.lr * min(
                (step + 1) / (cfg.rft.warmup_steps + 1), (num_steps - step) / num_steps
            )
            set_lr(optimizer, lr)
            with uninterrupted():
                step_loss, grad_norm = rft_step(run, policy, optimizer, rows)
                losses.append(step_loss)
                now.rft_step = step + 1
                record = {
                    "phase": "rft",
                    "iteration": now.iteration,
                    "step": step + 1,
                    "rl_steps": now.rl_steps,
                }
                record |= {"rft/loss": step_loss, "rft/lr": lr, "rft/grad_norm": grad_norm}
                line = f"RFT {now.iteration + 1} epoch {epoch + 1}/{cfg.rft.epochs}  loss {np.mean(losses[-steps_per_epoch:]):.4f}"
                run.log(record, line if position == steps_per_epoch - 1 else None)
            if (step + 1) % cfg.save_every == 0 or step + 1 == num_steps:
                run.save(policy, optimizer)
    except KeyboardInterrupt:
        if now.rft_step > 0:
            run.save(policy, optimizer)
        raise


def rft_step(
    run: RunDir, policy: Transformer, optimizer, rows: list[tuple[list[int], list[int]]]
) -> tuple[float, float]:
    """One optimizer step on a batch of (prompt ids, response ids); returns its loss (nat a token) and gradient norm."""
    num_tokens, loss_sum = sum(len(response) for _, response in rows), 0.0
    for batch, members in training_batches(
        [(prompt, [response]) for prompt, response in rows], run.cfg
    ):
        with compute_precision(run.cfg):
            logp, _ = token_logprobs(policy, batch)
        loss = sft_loss(logp, torch.full_like(logp, 1 / num_tokens if members else 0.0))
        loss.backward()
        loss_sum += loss.item()
    loss_sum = parallel.total({"loss": loss_sum})["loss"]
    return loss_sum, finish_step(
        policy, optimizer, loss_sum, [{"prompt_ids": p, "ids": r} for p, r in rows], run
    )


# ----------------------------------------------------------------------------------------------------------------- evaluate


def bootstrap_interval(
    values_N: np.ndarray, seed: int = 0, num_resamples: int = 2000
) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean over problems."""
    N = len(values_N)
    counts = np.random.default_rng(seed).multinomial(N, np.full(N, 1 / N), size=num_resamples)
    low, high = np.quantile(counts @ values_N / N, [0.025, 0.975])
    return float(low), float(high)


def evaluate(
    run: RunDir, policy: Transformer, tokenizer: Tokenizer, heldout: list[Problem], name: str
) -> dict:
    """avg@K and pass@1, 2, 4 .. K with 95% bootstrap intervals over the held-out problems; logs and returns the record. Also the shares of
    problems that an earlier evaluation of the run solved and this one does not, and that any evaluation so far solved.

    name: "base", "rl" or "rft". The same samples' random numbers are used at every evaluation, so checkpoints are compared on equal terms.
    """
    cfg, now, K = run.cfg.eval, run.progress, run.cfg.eval.num_samples
    groups, _ = respond(
        policy, tokenizer, heldout, run.cfg, seed=seed_of(run.cfg.seed, 1 << 32), place=(now.iteration, now.step),
        num_samples=K, temperature=cfg.temperature, top_p=cfg.top_p, top_k=cfg.top_k,
    )  # fmt: skip
    correct_N = [sum(t.reward == 1 for t in group) for group in groups]
    ks = sorted({2**e for e in range(K.bit_length()) if 2**e <= K} | {K})
    measures = {f"avg@{K}": [c / K for c in correct_N]}
    measures |= {f"pass@{k}": [pass_at_k(K, c, k) for c in correct_N] for k in ks}
    record: dict = {
        "phase": "eval",
        "policy": name,
        "iteration": now.iteration,
        "rl_steps": now.rl_steps,
    }
    for key, values in measures.items():
        low, high = bootstrap_interval(np.array(values))
        record |= {
            f"eval/{key}": float(np.mean(values)),
            f"eval/{key}_low": low,
            f"eval/{key}_high": high,
        }
    earlier = {
        id_ for e in run.read("evaluations.jsonl") for id_, c in e["num_correct"].items() if c > 0
    }
    counts = {p.id: c for p, c in zip(heldout, correct_N, strict=True)}
    record |= {
        "eval/forgotten_share": float(np.mean([c == 0 and id_ in earlier for id_, c in counts.items()])),
        "eval/union_share": float(np.mean([c > 0 or id_ in earlier for id_, c in counts.items()])),
        "eval/truncated_share": float(np.mean([not t.finished for group in groups for t in group])),
        "eval/num_problems": len(heldout), "eval/num_samples": K, "num_trajectories": now.num_trajectories,
    }  # fmt: skip
    line = f"eval {name:<4} after {now.rl_steps} RL steps:  avg@{K} {record[f'eval/avg@{K}']:.4f}  pass@{K} {record[f'eval/pass@{K}']:.4f}"
    with uninterrupted():
        run.log(record, line + truncation_warning(record["eval/truncated_share"]))
        run.append(
            "evaluations.jsonl", [{"policy": name, "rl_steps": now.rl_steps, "num_correct": counts}]
        )
        now.evaluation_owed = False
    return record


# --------------------------------------------------------------------------------------------------------------- outer loops


def run_rloop(
    run: RunDir,
    policy: Transformer,
    tokenizer: Tokenizer,
    problems: list[Problem],
    heldout: list[Problem],
) -> None:
    """The outer loop; goes on where run.progress stands."""
    cfg, now = run.cfg, run.progress
    while now.iteration < cfg.iterations:
        i = now.iteration
        if now.rft_step == 0:
            theta_i = run.load_theta(policy) if now.step > 0 else copy_weights(policy)
            explore(run, policy, tokenizer, problems, heldout, cfg.rl.steps, theta_i)
            run.save_policy(policy, f"rl_{i + 1}")
            experts = filter_experts(run)
            policy.load_state_dict(theta_i)  # RFT starts from theta_i, not from the RL policy
        else:  # continuing inside RFT: the policy is on its way from theta_i to theta_{i+1}
            experts = [
                Trajectory(**record) for record in run.read(f"experts/iteration_{i + 1}.jsonl")
            ]
        if experts:  # else theta_{i+1} = theta_i, and filter_experts has said so
            rft(run, policy, [(t.prompt_ids, t.ids) for t in experts])
        evaluate(run, policy, tokenizer, heldout, "rft")
        run.save_policy(policy, f"theta_{i + 1}")
        now.iteration, now.step, now.rft_step = i + 1, 0, 0
        run.save(policy)


def filter_experts(run: RunDir) -> list[Trajectory]:
    """Select the experts among the phase's trajectories; record what was kept, and say so when it was nothing."""
    now, cfg, seen = run.progress, run.cfg.select, Counter()

    def trajectories() -> Iterator[Trajectory]:
        for record in run.lines(f"trajectories/iteration_{now.iteration + 1}.jsonl"):
            seen.update(
                ["all", "correct", ("solved", record["problem"])]
                if record["reward"] == 1
                else ["all"]
            )
            yield Trajectory(**record)

    def select() -> tuple[list[Trajectory], Counter]:
        limits = {"max_success_rate": cfg.max_success_rate, "max_per_problem": cfg.max_per_problem}
        return select_experts(trajectories(), **limits), seen

    experts, seen = parallel.on_main(select)
    num_solved = len(seen.keys() - {"all", "correct"})
    record = {
        "phase": "filter", "iteration": now.iteration, "rl_steps": now.rl_steps,
        "filter/outcome": "experts" if experts else "no_experts", "filter/num_trajectories": seen["all"],
        "filter/num_correct": seen["correct"], "filter/num_solved_problems": num_solved,
        "filter/num_hard_problems": len({t.problem for t in experts}), "filter/num_experts": len(experts),
    }  # fmt: skip
    line = f"filter {now.iteration + 1}: {record['filter/num_correct']} correct of {seen['all']} trajectories, {num_solved} problems"
    line += f" solved; {len(experts)} experts on {record['filter/num_hard_problems']} hard problems"
    if not experts:
        line += f"\nno experts: no hard problem was solved, so RFT is left out and theta_{now.iteration + 1} = theta_{now.iteration}"
    run.log(record, line)
    run.append(f"experts/iteration_{now.iteration + 1}.jsonl", [vars(t) for t in experts])
    return experts


def run_rl(
    run: RunDir,
    policy: Transformer,
    tokenizer: Tokenizer,
    problems: list[Problem],
    heldout: list[Problem],
) -> None:
    """Plain RL, the baseline: the same number of RL steps in one phase from theta_0, which only a KL term needs to remember."""
    theta_0 = {}
    if run.cfg.rl.kl_coef > 0:
        theta_0 = run.load_theta(policy) if run.progress.step > 0 else copy_weights(policy)
    explore(
        run, policy, tokenizer, problems, heldout, run.cfg.iterations * run.cfg.rl.steps, theta_0
    )
    run.save_policy(policy, "rl_1")


def run_sft(run: RunDir, policy: Transformer, tokenizer: Tokenizer, heldout: list[Problem]) -> None:
    """The RFT loop on given demonstrations: it builds the embedded base policy."""
    cfg = run.cfg
    demonstrations = load_demonstrations(cfg.data.train, size=cfg.data.train_size, seed=cfg.seed)
    rft(
        run,
        policy,
        [
            (encode_prompt(tokenizer, q, cfg), [*tokenizer.encode(r), tokenizer.eos_id])
            for q, r in demonstrations
        ],
    )
    evaluate(run, policy, tokenizer, heldout, "rft")
    run.save_policy(policy, "sft")


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks. By default it gives large ones back to the kernel, and every step faults them in anew: a fifth to a
    third of a training step (LOG.md). The numbers are man 3 mallopt's M_MMAP_MAX and M_TRIM_THRESHOLD; elsewhere nothing happens."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)
        libc.mallopt(-1, -1)


def load_policy(cfg: Config) -> Transformer:
    """theta_0, made ready in this order: activation checkpointing, torch.compile, shards."""
    if cfg.model.random_init:
        policy = Transformer.from_config(cfg.model.path, seed=cfg.seed)
    else:
        policy = Transformer.from_pretrained(cfg.model.path, dtype=None)
    for block in policy.model.layers:
        block.checkpoint_activations = cfg.compute.checkpoint_activations
    if cfg.compute.compile:
        policy.compile_blocks()
    return parallel.shard(
        policy, dtype=getattr(torch, cfg.compute.dtype), replicas=cfg.compute.replicas
    )


def load_data(cfg: Config) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out problems; the training ones are drawn by cfg.seed, the held-out ones are the same for every seed."""
    heldout = load_problems(cfg.data.eval, size=cfg.data.eval_size, seed=0)
    if cfg.method in ("eval", "sft"):
        return [], heldout
    problems = load_problems(cfg.data.train, size=cfg.data.train_size, seed=cfg.seed)
    check_overlap(problems, heldout)
    return problems, heldout


def run_method(cfg: Config) -> None:
    torch.set_num_threads(cfg.compute.threads)
    keep_freed_memory()
    run = RunDir(cfg)
    if run.progress.finished:
        print(
            f"{run.path} is finished; this is its result. For another run choose another --run_dir"
        )
        return
    problems, heldout = load_data(cfg)
    tokenizer = Tokenizer(cfg.model.path, chat=cfg.data.chat_template)
    policy = load_policy(cfg)
    if run.checkpoint is None:
        evaluate(run, policy, tokenizer, heldout, "base")
        run.save(policy)
    else:
        run.load_policy(policy)
        print(f"{run.path}: going on after RL step {run.progress.rl_steps}")
    if cfg.method == "rloop":
        run_rloop(run, policy, tokenizer, problems, heldout)
    elif cfg.method == "rl":
        run_rl(run, policy, tokenizer, problems, heldout)
    elif cfg.method == "sft":
        run_sft(run, policy, tokenizer, heldout)
    run.progress.finished = True
    run.save(policy)


def main(arguments: list[str]) -> int:
    try:
        with parallel.processes():
            cfg, machine = config_from_command_line(arguments)
            if machine is not None:
                print(plan.report(cfg, **machine))
                return 0
            run_method(cfg)
            report = [sys.executable, str(Path(__file__).with_name("report.py")), cfg.run_dir]
            return parallel.on_main(lambda: subprocess.run(report).returncode)
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on after the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
