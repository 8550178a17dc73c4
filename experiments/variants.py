"""RLoop with one thing changed: python -m experiments.variants NAME --config FILE ...

Every variant replaces one or two functions of rloop.py, and the rest runs as it is. They also show
what a change of the algorithm looks like. All of them run in one process and continue exactly after
a stop.
"""

import sys
from collections import Counter

import numpy as np

import rloop
from data import load_problems
from model import Transformer
from packing import Row, micro_batches, token_logprobs
from sampler import sampling_copy
from scale import parallel

STALL_STEPS, STALL_PROBLEMS = 20, 10  # of phase_ends_when_stalled

# ---- ablations: a part of RLoop is left out


def rft_from_phi() -> None:
    """RFT continues from the RL-ed weights instead of theta_i."""

    def run_rloop(run, policy, tokenizer, problems, heldout) -> None:
        for _ in range(run.progress.iteration, run.cfg.iterations):
            theta_i = run.phase_start(policy)
            rloop.explore(run, policy, tokenizer, problems, heldout, run.cfg.rl.steps, theta_i)
            rloop.rft(run, policy, rloop.filter_experts(run))
            rloop.evaluate(run, policy, tokenizer, heldout, "rft")
            run.finish_iteration(policy)

    rloop.run_rloop = run_rloop


def optimizer_resets() -> None:
    """Plain RL whose optimizer starts afresh where RLoop starts an iteration."""

    def run_rloop(run, policy, tokenizer, problems, heldout) -> None:
        for _ in range(run.progress.iteration, run.cfg.iterations):
            theta_i = run.phase_start(policy)
            rloop.explore(run, policy, tokenizer, problems, heldout, run.cfg.rl.steps, theta_i)
            run.finish_iteration(policy)

    rloop.run_rloop = run_rloop


def every_fourth_expert() -> None:
    """A quarter of the experts, from the whole phase: what the next two are compared with."""
    _replace_selection(lambda experts: experts[::4])


def last_experts() -> None:
    """The quarter of the experts that was found last."""
    _replace_selection(lambda experts: experts[len(experts) - len(experts[::4]) :])


def _replace_selection(keep) -> None:
    select_experts = rloop.select_experts

    def selected(trajectories, **options):
        return keep(sorted(select_experts(trajectories, **options), key=lambda t: t.step))

    rloop.select_experts = selected


def resampled_experts() -> None:
    """A quarter as many experts, sampled by the phase's last policy phi, with at most as many
    samples as the phase."""

    def run_rloop(run, policy, tokenizer, problems, heldout) -> None:
        for _ in range(run.progress.iteration, run.cfg.iterations):
            theta_i = run.phase_start(policy)
            rloop.explore(run, policy, tokenizer, problems, heldout, run.cfg.rl.steps, theta_i)
            count = len(rloop.filter_experts(run)[::4])
            policy.load_state_dict(theta_i)
            rloop.rft(run, policy, resample(run, tokenizer, problems, count))
            rloop.evaluate(run, policy, tokenizer, heldout, "rft")
            run.finish_iteration(policy)

    def resample(run, tokenizer, problems, count):
        cfg, iteration = run.cfg, run.progress.iteration
        phi = Transformer.from_pretrained(run.path / "policies" / f"rl_{iteration + 1}", dtype=None)
        model = sampling_copy(phi, cfg.compute.dtype, cfg.compute.compile)
        options = {"num_samples": cfg.rl.samples_per_problem, "temperature": 1.0}
        place, found, experts = {"iteration": iteration, "step": 0}, [], []
        rounds = cfg.rl.steps * cfg.rl.problems_per_step // len(problems)
        for round_ in range(rounds):
            seed = rloop.seed_of(cfg.seed, iteration, 0, 1 + round_)
            groups, _ = rloop.respond(model, tokenizer, problems, cfg, seed, place, **options)
            found += [trajectory for group in groups for trajectory in group]
            experts = rloop.select_experts(found, **vars(cfg.select))
            if len(experts) >= count:
                break
        return experts[:: max(1, len(experts) // count)][:count] if count else []

    rloop.run_rloop = run_rloop


def shuffled_rewards() -> None:
    """Placebo: the rewards of a step are dealt out anew among its responses."""
    sample_groups = rloop.sample_groups

    def shuffled(run, policy, tokenizer, problems, step):
        _, sampled, drawn, seconds = sample_groups(run, policy, tokenizer, problems, step)
        rows = [trajectory for group in sampled for trajectory in group]
        rng = np.random.default_rng((run.cfg.seed, run.progress.iteration, step))
        for row, reward in zip(rows, rng.permutation([row.reward for row in rows]), strict=True):
            row.reward = float(reward)
        return [g for g in sampled if not rloop.is_flat(g)], sampled, drawn, seconds

    rloop.sample_groups = shuffled


def unverified_rft() -> None:
    """Placebo: RFT on as many of the phase's trajectories as there are experts, right or wrong."""
    select_experts = rloop.select_experts

    def drawn(trajectories, **options):
        phase = list(trajectories)
        count = len(select_experts(phase, **options))
        chosen = np.random.default_rng(len(phase)).choice(len(phase), count, replace=False)
        return [phase[i] for i in sorted(chosen)]

    rloop.select_experts = drawn


def entropy_bonus() -> None:
    """The RL loss minus .01 of the policy's entropy (its score-function gradient)."""
    grpo_loss = rloop.grpo_loss

    def with_bonus(logp, old_logp, adv, weight, **clip):
        loss, sums = grpo_loss(logp, old_logp, adv, weight, **clip)
        return loss + 0.01 * (weight * logp.detach() * logp).sum(), sums

    rloop.grpo_loss = with_bonus


# ---- beyond the paper


def weights_of_theta(run) -> dict:
    """theta_i of the run's iteration, also after a stop in RFT."""
    i = run.progress.iteration
    path = run.path / "policies" / f"theta_{i}" if i else run.cfg.model.path
    return Transformer.from_pretrained(path, dtype=None).state_dict()


def pooled_from_theta_0() -> None:
    """Every RFT starts from theta_0 and trains on the experts of all iterations."""
    _run_pooled(from_theta_0=True)


def pooled_from_theta_i() -> None:
    """RFT from theta_i on the experts of all iterations."""
    _run_pooled(from_theta_0=False)


def _run_pooled(from_theta_0: bool) -> None:
    def run_rloop(run, policy, tokenizer, problems, heldout) -> None:
        for _ in range(run.progress.iteration, run.cfg.iterations):
            theta_i = run.phase_start(policy)
            rloop.explore(run, policy, tokenizer, problems, heldout, run.cfg.rl.steps, theta_i)
            rloop.filter_experts(run)
            names = [f"experts/iteration_{i + 1}.jsonl" for i in range(run.progress.iteration + 1)]
            experts = [rloop.Trajectory(**r) for name in names for r in run.lines(name)]
            unique = {(t.problem, *t.ids): t for t in experts}
            fresh = run.progress.rft_step == 0
            start = rloop.load_policy(run.cfg).state_dict() if from_theta_0 and fresh else theta_i
            policy.load_state_dict(start)
            rloop.rft(run, policy, [*unique.values()])
            rloop.evaluate(run, policy, tokenizer, heldout, "rft")
            run.finish_iteration(policy)

    rloop.run_rloop = run_rloop


def mean_of_weights() -> None:
    """theta_{i+1} = the mean of theta_i and its RFT."""
    rft = rloop.rft

    def averaged(run, policy, examples) -> None:
        rft(run, policy, examples)
        tuned = policy.state_dict()
        policy.load_state_dict(
            {name: (tuned[name] + old) / 2 for name, old in weights_of_theta(run).items()}
        )

    rloop.rft = averaged


def weight_by_problem() -> None:
    """In RFT every problem has the same weight, however many experts it has."""
    rft, num_experts = rloop.rft, Counter()

    def counting(run, policy, examples) -> None:
        num_experts.clear()
        num_experts.update(t.problem for t in examples)
        rft(run, policy, examples)

    def rft_step(run, policy, optimizer, examples) -> tuple[float, float]:
        total = sum(len(e.ids) / num_experts[e.problem] for e in examples)
        rows_NG = [
            [Row(e.prompt_ids, e.ids, weight=1 / num_experts[e.problem] / total)]
            for e in examples[parallel.share(len(examples))]
        ]
        loss_sum = 0.0
        for batch in micro_batches(rows_NG, run.cfg.compute.micro_batch_tokens):
            logp, _ = token_logprobs(policy, batch)
            loss = rloop.sft_loss(logp, batch.per_token([row.weight for row in batch.rows]))
            loss.backward()
            loss_sum += loss.item()
        loss_sum = parallel.total({"loss": loss_sum})["loss"]
        return loss_sum, rloop.finish_step(run, policy, optimizer, loss_sum, rows_NG)

    rloop.rft, rloop.rft_step = counting, rft_step


def old_expert_in_failed_groups() -> None:
    """A group without a right response gets an expert of an earlier iteration for its last one."""
    sample_groups = rloop.sample_groups

    def with_experts(run, policy, tokenizer, problems, step):
        usable, sampled, *rest = sample_groups(run, policy, tokenizer, problems, step)
        names = [f"experts/iteration_{i + 1}.jsonl" for i in range(run.progress.iteration)]
        experts = {r["problem"]: r for name in names for r in run.lines(name)}
        failed = [g for g in sampled if not any(t.reward for t in g) and g[0].problem in experts]
        usable += [[*g[:-1], rloop.Trajectory(**experts[g[0].problem])] for g in failed]
        return usable, sampled, *rest

    rloop.sample_groups = with_experts


def weak_positives() -> None:
    """Positive advantages count a tenth in RL: it mostly learns what to avoid."""
    group_advantages = rloop.group_advantages

    def weakened(reward_NG, **options):
        adv_NG = group_advantages(reward_NG, **options)
        return adv_NG.where(adv_NG < 0, 0.1 * adv_NG)

    rloop.group_advantages = weakened


def rft_stopped_by_validation() -> None:
    """RFT ends with the epoch whose policy has the best pass@32 on 100 games of another split."""
    rft, rft_step = rloop.rft, rloop.rft_step

    def name_of(run, epoch: int) -> str:
        return f"rft_{run.progress.iteration + 1}_epoch_{epoch}"

    def exporting(run, policy, optimizer, examples):
        outcome = rft_step(run, policy, optimizer, examples)
        num_steps, step = run.steps_per_epoch, run.progress.rft_step + 1
        if step % num_steps == 0:
            run.export(policy, name_of(run, step // num_steps))
        return outcome

    def stopped(run, policy, examples) -> None:
        run.steps_per_epoch = -(-len(examples) // run.cfg.rft.batch_size)
        rft(run, policy, examples)
        states = []
        for epoch in range(1, run.cfg.rft.epochs + 1) if examples else ():
            path = run.path / "policies" / name_of(run, epoch)
            states.append(Transformer.from_pretrained(path, dtype=None).state_dict())
        scores = [validate(run, policy, state) for state in states]
        if states:
            policy.load_state_dict(states[scores.index(max(scores))])

    def validate(run, policy, state) -> float:
        policy.load_state_dict(state)
        cfg, tokenizer = run.cfg, rloop.Tokenizer(run.cfg.model.path)
        games = load_problems("countdown:search?numbers=4", size=100, seed=0)
        model = sampling_copy(policy, cfg.compute.dtype)
        options = {"num_samples": 32, "temperature": 1.0}
        place = {"iteration": 0, "step": 0}
        groups, _ = rloop.respond(model, tokenizer, games, cfg, cfg.seed, place, **options)
        return float(np.mean([any(t.reward == 1 for t in group) for group in groups]))

    rloop.rft, rloop.rft_step = stopped, exporting


def phase_ends_when_stalled() -> None:
    """An RL phase ends when its last 20 steps have solved fewer than 10 problems that it had not
    solved before. The RL steps of all phases together are those of RLoop."""
    evaluate = rloop.evaluate

    class Run(rloop.Run):
        @property
        def steps_before(self) -> int:
            """RL steps of the finished iterations, which differ in length."""
            done, records = self.progress.iteration, self.lines("metrics.jsonl")
            return sum(r["phase"] == "rl" and r["iteration"] < done for r in records)

        @property
        def rl_steps(self) -> int:
            return self.steps_before + self.progress.step

    def stalled(run) -> bool:
        first: dict[str, int] = {}
        for record in run.lines(f"trajectories/iteration_{run.progress.iteration + 1}.jsonl"):
            if record["reward"] == 1:
                first.setdefault(record["problem"], record["step"])
        recent = run.progress.step - STALL_STEPS
        return recent >= 0 and sum(step > recent for step in first.values()) < STALL_PROBLEMS

    def run_rloop(run, policy, tokenizer, problems, heldout) -> None:
        budget = run.cfg.iterations * run.cfg.rl.steps
        while run.rl_steps < budget or run.progress.step > 0:
            theta_i, left = run.phase_start(policy), budget - run.steps_before
            while run.progress.rft_step == 0 and run.progress.step < left and not stalled(run):
                num_steps = min(run.progress.step + 5, left)  # looked at every 5 steps
                rloop.explore(run, policy, tokenizer, problems, heldout, num_steps, theta_i)
            experts = rloop.filter_experts(run)
            policy.load_state_dict(theta_i)
            rloop.rft(run, policy, experts)
            rloop.evaluate(run, policy, tokenizer, heldout, "rft")
            run.finish_iteration(policy)

    def evaluate_but_rl(run, policy, tokenizer, heldout, name):  # a phase is explored in chunks
        return evaluate(run, policy, tokenizer, heldout, name) if name != "rl" else None

    rloop.Run, rloop.run_rloop, rloop.evaluate = Run, run_rloop, evaluate_but_rl


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    globals()[name]()
    sys.exit(rloop.main(arguments))
