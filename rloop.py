"""RLoop (arXiv 2511.04285): iterated policy initialization for RL with verifiable rewards.

    theta_0 = base policy                                         Transformer.from_pretrained
    for each iteration i = 0, 1, 2 ...:                           run_rloop
        phi = theta_i                                             explore
        for each RL step of the phase:
            sample G responses to each of N problems, score them  sample_groups, respond
            drop groups whose rewards are all equal, refill       sample_groups
            A = (r - mean(r)) / std(r) within a group             group_advantages
            phi += clipped policy-gradient step                   update, grpo_loss
            D += every trajectory of the step                     run.commit
        E = successes in D on hard problems, unique, capped       filter_experts, select_experts
        theta_{i+1} = SFT of theta_i (not phi) on E               rft, sft_loss
    avg@k and pass@k on held-out problems, all along              evaluate, pass_at_k
    baseline: as many RL steps in a row from theta_0              run_rl

Shapes, in the whole project: N problems (groups), G samples of a problem, B = N*G rows (responses),
T tokens of a row, M tokens of a packed micro-batch, Q response tokens of it, R live rows of the
sampler, V vocabulary, D width, H query heads, K kv heads, E head width, S slots of a cache, U and
W tokens of a micro-batch's longest prompt and longest response (scale/speed.py).
Log-probs are natural logs in float32. Everywhere run is a run.Run, policy a model.Transformer,
tokenizer a data.tokenizer.Tokenizer, cfg a config.Config, problems and heldout list[Problem].
"""

import math
import sys
import time
from collections import ChainMap, Counter, namedtuple
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import hf
import report
import talk
from config import Config, UserError, config_from_command_line
from data import load_data, load_demonstrations, next_problems
from data.tokenizer import Tokenizer
from model import Transformer
from packing import Row, deal, micro_batches, token_logprobs
from run import Run, Stopped, evaluation_line, filter_line, progress_bar, step_line
from sampler import sample, sampling_copy
from scale import lora, parallel, plan, speed
from verify import check_reward, verify_many

STD_EPS = 1e-6  # keeps the advantages finite; GRPO
LONG_STEP_S = 60.0  # a step that sampled for longer can also be stopped before its update


@dataclass(kw_only=True)
class Trajectory:
    """One sampled response."""

    problem: str  # Problem.id
    iteration: int
    step: int  # RL step of the iteration, from 1
    round: int = 0  # of dynamic sampling, in the step
    prompt_ids: list[int]
    ids: list[int]  # response tokens, the stop token included
    logps: list[float]  # one a response token, of the distribution that was sampled from
    finished: bool  # ended on a stop token
    response: str
    reason: str  # the verdict's
    reward: float  # from 0 to 1


# what the filter needs of a trajectory; in the order of sampling when sorted
Outcome = namedtuple("Outcome", "step round file line problem reward ids")

# ---- the outer loop


def run_rloop(run, policy, tokenizer, problems, heldout) -> None:
    """theta_{i+1} = fine-tune theta_i on the successes of an RL phase that starts from theta_i. A
    resumed run starts here, too: each function skips what is already done."""
    for _ in range(run.progress.iteration, run.cfg.iterations):
        theta_i = run.phase_start(policy)
        explore(run, policy, tokenizer, problems, heldout, run.cfg.rl.steps, theta_i)
        experts = filter_experts(run)
        policy.load_state_dict(theta_i)  # RFT starts from theta_i, NOT from phi
        rft(run, policy, experts)
        evaluate(run, policy, tokenizer, heldout, "rft")
        run.finish_iteration(policy)


def run_rl(run, policy, tokenizer, problems, heldout) -> None:
    """Plain RL, the baseline: the same number of RL steps in one phase from theta_0."""
    theta_0 = run.phase_start(policy)
    num_steps = run.cfg.iterations * run.cfg.rl.steps
    explore(run, policy, tokenizer, problems, heldout, num_steps, theta_0)


# ---- explore


def explore(run, policy, tokenizer, problems, heldout, num_steps, theta_i) -> None:
    """One RL phase of num_steps steps: moves the policy from theta_i to phi. D is EVERY trajectory
    it samples, right or wrong; they are written to RUN/trajectories."""
    if run.progress.rft_step > 0:
        return  # the run was stopped in RFT: this phase is over
    cfg = run.cfg
    optimizer = new_optimizer(run, policy, resume=run.progress.step > 0)
    if run.evaluation_pending(num_steps):  # the run was stopped before this evaluation
        evaluate(run, policy, tokenizer, heldout, "rl")
    for step in range(run.progress.step + 1, num_steps + 1):
        run.checkpoint_if(False, policy, optimizer, theta_i)  # a stop during the evaluation
        usable, sampled, drawn, seconds = sample_groups(run, policy, tokenizer, problems, step)
        if seconds["time/rollout_s"] > LONG_STEP_S:
            run.checkpoint_if(False, policy, optimizer, theta_i)  # a stop drops this step
        lr = cfg.rl.lr * min(1.0, step / (cfg.rl.warmup_steps + 1))
        metrics = update(run, policy, optimizer, usable, theta_i, lr) | seconds
        record = {"phase": "rl", "step": step} | sampling_metrics(sampled) | metrics
        line = step_line(record, run.progress.iteration, num_steps)
        run.commit(record, line, trajectories=sampled, step=step, problems_drawn=drawn)
        due = step % cfg.save_every == 0 or step == num_steps
        run.checkpoint_if(due, policy, optimizer, theta_i)
        if run.evaluation_pending(num_steps):
            evaluate(run, policy, tokenizer, heldout, "rl")
    run.export(policy, f"rl_{run.progress.iteration + 1}")


def sample_groups(run, policy, tokenizer, problems, step):
    """Dynamic sampling (DAPO, section 3.2): sample N groups, drop the flat ones, and replace them
    by groups of the next problems, for a bounded number of rounds.

    Returns the usable groups (at most N), all sampled groups (both [group][sample]; another
    process's are empty), the new position in the stream of problems, and the seconds it took.
    """
    cfg, iteration = run.cfg, run.progress.iteration
    options = {"num_samples": cfg.rl.samples_per_problem, "temperature": cfg.sampling.temperature}
    model = sampling_copy(policy, cfg.compute.dtype, cfg.compute.compile)
    usable, sampled, seconds, drawn = [], [], Counter(), run.progress.problems_drawn
    for round_ in range(cfg.rl.max_sampling_rounds):
        count = cfg.rl.problems_per_step - len(usable)
        fresh = next_problems(problems, drawn, count, cfg.seed, run.progress.successes)
        seed = seed_of(cfg.seed, iteration, step, round_)
        place = {"iteration": iteration, "step": step, "round": round_}
        groups, spent = respond(model, tokenizer, fresh, cfg, seed, place, **options)
        drawn += count
        seconds.update(spent)
        sampled += groups
        flat = parallel.total({n: int(is_flat(group)) for n, group in enumerate(groups)})
        usable += [group for n, group in enumerate(groups) if not flat[n]]
        if len(usable) == cfg.rl.problems_per_step:
            break
    return usable, sampled, drawn, dict(seconds)


def is_flat(group: list[Trajectory]) -> bool:
    """Whether all rewards of a group are equal: it has no advantage to learn from."""
    return len({t.reward for t in group}) == 1


def seed_of(*path: int) -> int:
    """A seed for (seed, iteration, step, round). Always four: numpy pads shorter paths with 0."""
    return int(np.random.SeedSequence(path).generate_state(1, np.uint64)[0])


def respond(model, tokenizer, problems, cfg, seed, place, *, num_samples, **options):
    """Sample responses to the problems and score them. place: iteration, step, round.
    options: of sample. Returns trajectories [problem][sample] and the seconds of both.

    Every process samples for its share of the problems; the groups of the others are empty.
    """
    share = parallel.share(len(problems))
    options |= {"max_new_tokens": cfg.sampling.max_new_tokens, "max_rows": cfg.compute.max_rows}
    options |= {"seed": seed, "first_prompt": share.start, "progress": parallel.rank() == 0}
    groups = [[] for _ in problems]

    def sample_and_verify() -> tuple[float, float]:
        start = time.perf_counter()
        mine, stop_ids = problems[share], tokenizer.stop_ids
        prompts = [tokenizer.encode_prompt(p.prompt, cfg.data, p.context) for p in mine]
        results = sample(model, prompts, num_samples=num_samples, stop_ids=stop_ids, **options)
        sampled = time.perf_counter()
        completions = [completion for group in results for completion in group]
        owners = [n for n, group in enumerate(results) for _ in group]
        texts = [tokenizer.decode(completion.ids) for completion in completions]
        verdicts = verify_many([mine[n] for n in owners], texts)
        for n, completion, text, verdict in zip(owners, completions, texts, verdicts, strict=True):
            source = {"problem": mine[n].id, "prompt_ids": prompts[n]} | place
            outcome = {"response": text, "reason": verdict.reason, "reward": verdict.reward}
            groups[share.start + n].append(Trajectory(**source, **vars(completion), **outcome))
        return sampled - start, time.perf_counter() - sampled

    rollout_s, verify_s = map(max, zip(*parallel.gather(sample_and_verify), strict=True))
    return groups, {"time/rollout_s": rollout_s, "time/verify_s": verify_s}


def sampling_metrics(sampled: list[list[Trajectory]]) -> dict[str, float]:
    rows = [t for group in sampled for t in group]
    num_rows = parallel.total({"rows": len(rows)})["rows"]
    shares = {
        "rl/reward_mean": float(np.sum([t.reward for t in rows])) / num_rows,
        "rl/flat_share": sum(is_flat(group) for group in sampled) / len(sampled),
        "rl/len_mean_tok": sum(len(t.ids) for t in rows) / num_rows,
        "rl/truncated_share": sum(not t.finished for t in rows) / num_rows,
    }
    return parallel.total(shares)


# ---- the RL update


def update(run, policy, optimizer, groups, theta_i, lr) -> dict[str, float]:
    """One RL update on the usable groups, in rl.minibatches optimizer steps; nothing without groups
    or at learning rate 0. theta_i is the reference of the KL term. Returns metrics."""
    if not groups or lr == 0:
        return {"rl/lr": lr, "time/update_s": 0.0}
    start = time.perf_counter()
    optimizer.param_groups[0]["lr"] = lr
    cfg = run.cfg
    rows_NG = [training_rows(group, cfg) if group else [] for group in groups]
    splits = np.array_split(np.arange(len(groups)), min(cfg.rl.minibatches, len(groups)))
    minibatches = [deal([rows_NG[n] for n in split]) for split in splits]
    if cfg.rl.recompute_logprobs:
        set_logprobs(sum(minibatches, []), "old_logps", policy, cfg)
    if cfg.rl.kl_coef > 0:
        phi = {name: weight.clone() for name, weight in policy.state_dict().items()}
        policy.load_state_dict(theta_i)
        set_logprobs(sum(minibatches, []), "ref_logps", policy, cfg)
        policy.load_state_dict(phi)
    steps: list[dict[str, float]] = []
    for minibatch in minibatches:
        totals = accumulate_gradient(policy, minibatch, cfg)
        totals["grad_norm"] = finish_step(run, policy, optimizer, totals["loss"], minibatch)
        steps.append(totals)
    sums = {name: sum(totals[name] for totals in steps) for name in steps[0]}
    first = steps[0]  # later minibatches see a policy that has moved
    metrics = {
        "rl/lr": lr,
        "rl/loss": sums["loss"] / len(steps),
        "rl/grad_norm": sums["grad_norm"] / len(steps),
        "rl/entropy_mean_nat": sums["entropy"] / sums["tokens"],
        "rl/clip_low_share": sums["clip_low"] / sums["tokens"],
        "rl/clip_high_share": sums["clip_high"] / sums["tokens"],
        "rl/logp_gap_mean_nat": first["gap"] / first["tokens"],
        "rl/logp_gap_max_nat": first["gap_max"],
        "time/update_s": time.perf_counter() - start,
    }
    return metrics | ({"rl/kl_nat": sums["kl"] / len(steps)} if cfg.rl.kl_coef > 0 else {})


def training_rows(group: list[Trajectory], cfg: Config) -> list[Row]:
    """A group's trajectories as rows with their advantages."""
    limit, buffer = cfg.sampling.max_new_tokens, cfg.rl.overlong_buffer
    reward_G = [t.reward + overlong_penalty(len(t.ids), limit, buffer) for t in group]
    adv_1G = group_advantages(torch.tensor([reward_G]), normalize_std=cfg.rl.normalize_std)
    pairs = zip(group, adv_1G[0].tolist(), strict=True)
    return [Row(t.prompt_ids, t.ids, t.logps, adv) for t, adv in pairs]


@torch.no_grad()
def set_logprobs(rows_NG: list[list[Row]], name: str, model, cfg) -> None:
    """Set old_logps or ref_logps of the rows to the log-probs that the model gives in training."""
    for batch in micro_batches(rows_NG, cfg.compute.micro_batch_tokens):
        logp_Q, _ = token_logprobs(model, batch, cfg.sampling.temperature)
        parts = logp_Q.split([len(row.ids) for row in batch.rows])
        for row, part in zip(batch.rows, parts, strict=True):
            setattr(row, name, part.tolist())


def accumulate_gradient(policy, rows_NG: list[list[Row]], cfg: Config) -> dict[str, float]:
    """Add the gradient of one optimizer step's loss, in micro-batches. Returns the loss (nat), the
    number of its tokens, sums over them, and the largest gap to the sampler's log-probs."""
    rows = [row for group in rows_NG for row in group]
    lengths_B = sum(parallel.gather(lambda: [len(row.ids) for row in rows]), [])
    weights_B = token_weights(lengths_B, cfg.rl.aggregation, cfg.sampling.max_new_tokens)
    weight_of = dict(zip(lengths_B, weights_B, strict=True))
    for row in rows:
        row.weight = weight_of[len(row.ids)]
    names = ("loss", "kl", "entropy", "gap", "tokens", "clip_low", "clip_high")
    totals, gap_max = dict.fromkeys(names, 0.0), 0.0
    for batch in micro_batches(rows_NG, cfg.compute.micro_batch_tokens):
        logp, entropy = token_logprobs(policy, batch, cfg.sampling.temperature)
        adv = batch.per_token([row.advantage for row in batch.rows])
        weight = batch.per_token([row.weight for row in batch.rows])
        sampler_logp = batch.concatenate([row.sampler_logps for row in batch.rows])
        old_logp = batch.concatenate([row.old_logps or row.sampler_logps for row in batch.rows])
        if cfg.rl.importance_cap > 0:
            ratio = (old_logp - sampler_logp).exp()
            weight = weight * ratio.clamp(max=cfg.rl.importance_cap)
        clip = {"clip_low": cfg.rl.clip_low, "clip_high": cfg.rl.clip_high}
        loss, sums = grpo_loss(logp, old_logp, adv, weight, **clip)
        if cfg.rl.kl_coef > 0:
            ref_logp = batch.concatenate([row.ref_logps for row in batch.rows])
            sums["kl"] = kl_loss(logp, ref_logp, weight)
            loss = loss + cfg.rl.kl_coef * sums["kl"]
        loss.backward()
        counted = weight != 0
        gap = torch.where(counted, logp.detach() - sampler_logp, 0.0).abs()
        sums |= {"loss": loss, "entropy": (entropy * counted).sum(), "gap": gap.sum()}
        for name, value in sums.items():
            totals[name] += value.item()
        gap_max = max(gap_max, gap.max().item())
    return parallel.total(totals) | {"gap_max": max(parallel.gather(lambda: gap_max))}


def new_optimizer(run, policy, resume: bool) -> torch.optim.AdamW:
    """A phase's AdamW: fresh, or with its state from the checkpoint."""
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=run.cfg.optimizer.weight_decay)
    if resume:
        run.load_optimizer(optimizer)
    return optimizer


def finish_step(run, policy, optimizer, loss: float, rows_NG: list[list[Row]]) -> float:
    """Clip the gradient, apply it, and return its norm. Raises FloatingPointError for a loss or
    gradient that is not finite; the weights are then unchanged, and the rows are saved."""
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), run.cfg.optimizer.grad_clip)
    grad_norm = float(parallel.whole_tensor(norm))
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        run.append("nonfinite_batch.jsonl", [vars(r) for g in rows_NG for r in g], own=True)
        what = f"loss {loss}, gradient norm {grad_norm}: not finite; the weights are untouched"
        raise FloatingPointError(f"{what}, the batch is in {run.path}/nonfinite_batch*.jsonl")
    optimizer.step()
    optimizer.zero_grad()
    return grad_norm


# ---- losses and other pure functions


def group_advantages(reward_NG: Tensor, *, normalize_std: bool = True) -> Tensor:
    """Advantages [N, G]: the reward minus the group's mean, over the group's population std (GRPO,
    arXiv 2402.03300, eq. 4).

    normalize_std=False leaves the division out (Dr.GRPO, arXiv 2503.20783). A flat group, or a
    group of one, gets exactly 0.
    """
    reward_NG = reward_NG if reward_NG.is_floating_point() else reward_NG.float()
    adv_NG = reward_NG - reward_NG.mean(dim=1, keepdim=True)
    if normalize_std:
        adv_NG = adv_NG / (reward_NG.std(dim=1, keepdim=True, unbiased=False) + STD_EPS)
    flat_N1 = reward_NG.amax(dim=1, keepdim=True) == reward_NG.amin(dim=1, keepdim=True)
    return adv_NG.masked_fill(flat_N1, 0.0)


def token_weights(lengths_B: list[int], aggregation: str, max_new_tokens: int) -> list[float]:
    """Weight [B] in the loss of each token of a response, from the lengths of ALL responses of the
    optimizer step: the gradient does not depend on how it is cut into micro-batches.

    "token": 1 / number of tokens (DAPO, arXiv 2503.14476, eq. 8). "sequence": mean over a response,
    then over responses (GRPO). "constant": 1 / (B * max_new_tokens) (Dr.GRPO). Over all tokens of
    the step the weights sum to 1; those of "constant" to less, unless all responses are that long.
    """
    B = len(lengths_B)
    if aggregation == "token":
        return [1 / sum(lengths_B)] * B
    if aggregation == "sequence":
        return [1 / (length * B) for length in lengths_B]
    if aggregation == "constant":
        return [1 / (B * max_new_tokens)] * B
    raise ValueError(f"aggregation {aggregation!r}: expected 'token', 'sequence' or 'constant'")


def grpo_loss(
    logp: Tensor, old_logp: Tensor, adv: Tensor, weight: Tensor, *, clip_low, clip_high
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy-gradient loss: PPO's objective (arXiv 1707.06347, eq. 7) with DAPO's
    clip-higher, -sum of weight * min(rho * A, clip(rho, 1 - clip_low, 1 + clip_high) * A) with
    rho = exp(logp - old_logp).

    Shapes: four tensors of one shape, one entry a token; entries of weight 0 do not count. adv and
    old_logp are constants. Returns the loss (nat) and sums over the counted tokens: their number,
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
    """Weighted k3 estimate of KL(policy || reference), nat: exp(d) - d - 1 with
    d = ref_logp - logp (GRPO, eq. 4)."""
    delta = torch.where(weight != 0, ref_logp.detach() - logp, 0.0)
    return (weight * (delta.exp() - delta - 1)).sum()


def sft_loss(logp: Tensor, weight: Tensor) -> Tensor:
    """Weighted negative log-likelihood, nat; entries of weight 0 do not count."""
    return -(weight * torch.where(weight != 0, logp, 0.0)).sum()


def overlong_penalty(length: int, max_new_tokens: int, buffer: int) -> float:
    """DAPO's soft punishment (eq. 13): 0 up to max_new_tokens - buffer, then linearly down to -1 at
    max_new_tokens. buffer 0 = off."""
    return -max(0.0, (length - (max_new_tokens - buffer)) / buffer) if buffer else 0.0


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased pass@k = 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, eq. 1), as a product that
    cannot overflow.

    Raises ValueError unless 1 <= k <= num_samples and 0 <= num_correct <= num_samples.
    """
    n, c = num_samples, num_correct
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"pass_at_k: k = {k}, num_correct = {c} must fit num_samples = {n}")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


# ---- filter


def select_experts(
    trajectories: Iterable, *, max_success_rate: float, max_per_problem: int, min_reward=1.0
) -> list[Trajectory]:
    """Expert set E: the successes (a reward of min_reward or more) on problems whose success rate
    over the phase is in (0, max_success_rate], exact duplicates removed.

    Of a problem with more than max_per_problem, evenly spaced ones are kept in the order of steps,
    so that they come from the whole phase and not from its end. The result may be empty.

    Example, max_success_rate 0.5, max_per_problem 2, (problem, reward, ids) in the order of steps:
        (p, 0, 7) (p, 0, 8) (p, 1, 9) (q, 1, 5) (p, 1, 9) (p, 0, 8) (p, 1, 6) (p, 0, 4) (p, 1, 3)
    p is solved 4 times of 8, with the different responses 9, 6, 3: 9 and 3 are kept. q is solved
    always: it is too easy.
    """
    num_attempts: Counter[str] = Counter()
    correct_of: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        num_attempts[trajectory.problem] += 1
        correct = correct_of.setdefault(trajectory.problem, [])
        if trajectory.reward >= min_reward:  # the others are only counted
            correct.append(trajectory)
    experts = []
    for problem, correct in correct_of.items():
        if not correct or len(correct) / num_attempts[problem] > max_success_rate:
            continue
        unique: dict[tuple[int, ...], Trajectory] = {}
        for trajectory in correct:
            unique.setdefault(tuple(trajectory.ids), trajectory)
        candidates = list(unique.values())
        count = min(len(candidates), max_per_problem)
        spaced = np.linspace(0, len(candidates) - 1, count).round().astype(int)
        experts += [candidates[i] for i in spaced]
    return experts


def filter_experts(run) -> list[Trajectory]:
    """Select the experts among the phase's trajectories, and record what was kept."""
    name = f"iteration_{run.progress.iteration + 1}.jsonl"
    if run.progress.rft_step > 0:  # the run was stopped in RFT: they are selected already
        return [Trajectory(**record) for record in run.read(f"experts/{name}")]
    files = run.shards(f"trajectories/{name}")

    def outcomes() -> Iterator[tuple[Outcome, Trajectory]]:
        for file in files:
            for line, t in enumerate(Trajectory(**record) for record in run.lines(file)):
                ids = (hash(tuple(t.ids)),)  # of integers: the same in every process
                yield Outcome(t.step, t.round, file, line, t.problem, t.reward, ids), t

    shards = parallel.gather(lambda: [outcome for outcome, _ in outcomes()])
    phase = sorted(outcome for shard in shards for outcome in shard)
    chosen = select_experts(phase, **vars(run.cfg.select))
    wanted, correct = set(chosen), [o for o in phase if o.reward >= run.cfg.select.min_reward]
    kept = parallel.gather(lambda: {o: t for o, t in outcomes() if o in wanted})
    experts = [*map(ChainMap(*kept).get, chosen)]
    record = {
        "phase": "filter",
        "filter/outcome": "experts" if experts else "no_experts",
        "filter/num_trajectories": len(phase),
        "filter/num_correct": len(correct),
        "filter/num_solved_problems": len({o.problem for o in correct}),
        "filter/num_hard_problems": len({o.problem for o in chosen}),
        "filter/num_experts": len(experts),
    }
    run.append(f"experts/{name}", [vars(t) for t in experts])
    run.commit(record, filter_line(record, run.progress.iteration))
    return experts


# ---- exploit


def rft(run, policy, examples: list[Trajectory] | list[Row]) -> None:
    """Rejection-sampling fine-tuning: maximise the mean log-prob of the examples' response tokens.

    The policy enters as theta_i and leaves as theta_{i+1}. Fresh AdamW; linear warm-up, then linear
    decay to 0; every epoch is a seeded shuffle. Without examples nothing happens.
    """
    cfg, iteration, first = run.cfg.rft, run.progress.iteration, run.progress.rft_step
    optimizer = new_optimizer(run, policy, resume=first > 0)
    steps_per_epoch = math.ceil(len(examples) / cfg.batch_size)
    num_steps = cfg.epochs * steps_per_epoch
    name, losses = f"RFT {iteration + 1}", []
    for step in progress_bar(range(first, num_steps), name):
        epoch, position = divmod(step, steps_per_epoch)
        order = np.random.default_rng((run.cfg.seed, iteration, epoch)).permutation(len(examples))
        batch = order[position * cfg.batch_size : (position + 1) * cfg.batch_size]
        lr = cfg.lr * min((step + 1) / (cfg.warmup_steps + 1), (num_steps - step) / num_steps)
        optimizer.param_groups[0]["lr"] = lr
        loss, grad_norm = rft_step(run, policy, optimizer, [examples[i] for i in batch])
        losses.append(loss)
        mean, epoch_ends = np.mean(losses[-steps_per_epoch:]), position == steps_per_epoch - 1
        line = f"{name} epoch {epoch + 1}/{cfg.epochs}  loss {mean:.4f}" if epoch_ends else None
        record = {"rft/loss": loss, "rft/lr": lr, "rft/grad_norm": grad_norm}
        run.commit({"phase": "rft", "step": step + 1} | record, line, rft_step=step + 1)
        due = (step + 1) % run.cfg.save_every == 0 or step + 1 == num_steps
        run.checkpoint_if(due, policy, optimizer)


def rft_step(run, policy, optimizer, examples: list) -> tuple[float, float]:
    """One optimizer step on the examples; returns its loss (nat a token) and gradient norm."""
    weight, share = 1 / sum(len(e.ids) for e in examples), parallel.share(len(examples))
    rows_NG = [[Row(e.prompt_ids, e.ids, weight=weight)] for e in examples[share]]
    loss_sum = 0.0
    for batch in micro_batches(rows_NG, run.cfg.compute.micro_batch_tokens):
        logp, _ = token_logprobs(policy, batch)
        loss = sft_loss(logp, batch.per_token([row.weight for row in batch.rows]))
        loss.backward()
        loss_sum += loss.item()
    loss_sum = parallel.total({"loss": loss_sum})["loss"]
    return loss_sum, finish_step(run, policy, optimizer, loss_sum, rows_NG)


# ---- evaluate


def bootstrap_interval(values_N: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean over problems, from 2,000 resamples."""
    N = len(values_N)
    counts = np.random.default_rng(seed).multinomial(N, np.full(N, 1 / N), size=2000)
    low, high = np.quantile(counts @ values_N / N, [0.025, 0.975])
    return float(low), float(high)


def evaluate(run, policy, tokenizer, heldout, name: str) -> dict:
    """avg@k and pass@1, 2, 4 .. k on the held-out problems, from k samples each, and the shares of
    problems that an earlier evaluation solved but this one does not (forgotten) and that any
    solved (union); a sample solves it with select.min_reward or more. name: "base", "rl" or "rft".
    Every evaluation uses the same random numbers, so policies are compared on equal terms.
    """
    cfg, num_samples, least = run.cfg, run.cfg.eval.num_samples, run.cfg.select.min_reward
    model = sampling_copy(policy, cfg.compute.dtype, cfg.compute.compile)
    place = {"iteration": run.progress.iteration, "step": run.progress.step}
    seed = seed_of(cfg.seed, 0, 0, 0)  # RL steps count from 1, so no step has this seed
    options = {key: value for key, value in vars(cfg.eval).items() if key != "every"}
    groups, _ = respond(model, tokenizer, heldout, cfg, seed, place, **options)
    pairs = zip(heldout, groups, strict=True)
    counts = parallel.total({p.id: sum(t.reward >= least for t in g) for p, g in pairs})
    ks = sorted({2**e for e in range(num_samples.bit_length())} | {num_samples})
    values = {f"avg@{num_samples}": [c / num_samples for c in counts.values()]}
    values |= {f"pass@{k}": [pass_at_k(num_samples, c, k) for c in counts.values()] for k in ks}
    evaluations = run.read("evaluations.jsonl")
    earlier = {id_ for e in evaluations for id_, c in e["num_correct"].items() if c > 0}
    values["forgotten_share"] = [c == 0 and id_ in earlier for id_, c in counts.items()]
    values["union_share"] = [c > 0 or id_ in earlier for id_, c in counts.items()]
    values["truncated_share"] = [sampling_metrics(groups)["rl/truncated_share"]]
    record = {"phase": "eval", "policy": name}
    record |= {f"eval/{key}": float(np.mean(values_N)) for key, values_N in values.items()}
    for key in [key for key in values if "@" in key]:
        low, high = bootstrap_interval(np.array(values[key]))
        record |= {f"eval/{key}_low": low, f"eval/{key}_high": high}
    record |= {"eval/num_problems": len(heldout), "eval/num_samples": num_samples}
    evaluation = {"policy": name, "rl_steps": run.rl_steps, "num_correct": counts}
    run.append("evaluations.jsonl", [evaluation])
    run.commit(record, evaluation_line(record, run.rl_steps, groups, least))
    return record


# ---- from the command line to the loop


def run_sft(run, policy, tokenizer, heldout) -> None:
    """The RFT loop on given demonstrations: it builds the embedded base policy."""
    data, examples = run.cfg.data, []
    demonstrations = load_demonstrations(data.train, size=data.train_size, seed=run.cfg.seed)
    for question, response in demonstrations:
        ids = [*tokenizer.encode(response), tokenizer.eos_id]
        examples.append(Row(tokenizer.encode_prompt(question, data), ids))
    rft(run, policy, examples)
    evaluate(run, policy, tokenizer, heldout, "rft")
    run.export(policy, "sft")


def load_policy(cfg: Config) -> Transformer:
    """theta_0, ready to compute as cfg.compute says."""
    if cfg.model.random_init:
        policy = hf.random_model(cfg.model.path, cfg.seed)
    else:
        policy = Transformer.from_pretrained(cfg.model.path, dtype=None)
    unknown_ids = Tokenizer(cfg.model.path).unknown_ids(policy.config.vocab_size)
    policy.unknown_ids = torch.tensor(unknown_ids, dtype=torch.long, device=parallel.device())
    return parallel.prepare(lora.add(policy, cfg), cfg.compute)


def run_method(cfg: Config) -> None:
    """A whole run, or the rest of a stopped one."""
    torch.set_num_threads(cfg.compute.threads)
    speed.swap_in()
    run = Run(cfg)
    if run.progress.finished:
        return
    tokenizer = Tokenizer(cfg.model.path, chat=cfg.data.chat_template)
    problems, heldout = load_data(cfg, tokenizer)
    check_reward(heldout)
    policy = load_policy(cfg)
    if run.checkpoint is None:
        evaluate(run, policy, tokenizer, heldout, "base")
        run.save(policy)
    else:
        run.load_policy(policy)
    if cfg.method == "rloop":
        run_rloop(run, policy, tokenizer, problems, heldout)
    elif cfg.method == "rl":
        run_rl(run, policy, tokenizer, problems, heldout)
    elif cfg.method == "sft":
        run_sft(run, policy, tokenizer, heldout)
    run.finish(policy)


def main(arguments: list[str]) -> int:
    try:
        if any(word.startswith("--sample") for word in arguments):
            return talk.main(arguments)
        with parallel.processes():
            cfg, machine = config_from_command_line(arguments)
            if machine is not None:
                return plan.main(cfg, **machine)
            run_method(cfg)
            return parallel.on_main(lambda: report.main([cfg.run_dir]))
    except (UserError, torch.OutOfMemoryError) as error:
        memory = isinstance(error, torch.OutOfMemoryError)
        remedy = "; a smaller compute.max_rows or micro_batch_tokens lets the run go on" * memory
        print(f"error: {error}{remedy}", file=sys.stderr)
        return 1
    except (Stopped, KeyboardInterrupt):
        print("stopped; the same command continues from the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
