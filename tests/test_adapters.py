"""ports/trl_rloop.py and ports/verl_prime_rl.py: RLoop on what people already run."""

import json

import pandas
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from conftest import ROOT
from test_tokenizer import CHATML, write_checkpoint

import rloop
from config import UserError, load_config
from data import load_data
from data.tokenizer import Tokenizer
from model import Transformer
from packing import Row
from ports import trl_rloop, verl_prime_rl
from rloop import Trajectory, select_experts
from verify import verify_many

BASE = ROOT / "data" / "countdown_base"


# ---- TRL


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def trl_run(tmp_path_factory):
    """Two iterations with the embedded policy: the run directory, the config, and what TRL's
    trainers saw: sampled ids, rewards, weights before and after, rows, logged losses."""
    seen = {"prompts": [], "ids": [], "rewards": [], "rl": [], "rft": []}
    generate = trl_rloop.GRPOTrainer._generate_single_turn
    score = trl_rloop.GRPOTrainer._calculate_rewards

    def generate_and_keep(self, prompt_ids, *args, **options):
        completion_ids, logprobs = generate(self, prompt_ids, *args, **options)
        seen["prompts"] += prompt_ids
        seen["ids"] += [list(ids) for ids in completion_ids]
        return completion_ids, logprobs

    def score_and_keep(self, *args):
        rewards = score(self, *args)
        seen["rewards"] += rewards[:, 0].tolist()
        return rewards

    def keep(name, train):
        def train_and_keep(self):
            start = weights_of(self.model)
            train(self)
            history = [entry for entry in self.state.log_history if "loss" in entry]
            seen[name].append((start, weights_of(self.model), history))

        return train_and_keep

    cfg = load_config(ROOT / "configs" / "countdown.toml", [
        *("--model.path", str(BASE), "--run_dir", str(tmp_path_factory.mktemp("trl") / "run")),
        *("--iterations", "2", "--rl.steps", "3", "--rl.problems_per_step", "8"),
        *("--rl.minibatches", "1", "--rl.lr", "1e-3", "--rft.epochs", "2"),
    ])  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl_rloop.GRPOTrainer, "_generate_single_turn", generate_and_keep)
        patch.setattr(trl_rloop.GRPOTrainer, "_calculate_rewards", score_and_keep)
        for name, trainer in (("rl", trl_rloop.GRPOTrainer), ("rft", trl_rloop.SFTTrainer)):
            patch.setattr(trainer, "train", keep(name, trainer.train))
        trl_rloop.run(cfg)
    return cfg, seen


def lines(cfg, folder: str, iteration: int) -> list[Trajectory]:
    file = f"{cfg.run_dir}/{folder}/iteration_{iteration}.jsonl"
    with open(file, encoding="utf-8") as stream:
        return [Trajectory(**json.loads(line)) for line in stream]


def test_trl_every_completion_is_kept_once(trl_run):
    """Fault: a step's completions are missing or kept twice, the ids are not those sampled (the
    stop token is cut, or a text is tokenized again), or the reward is another than TRL's."""
    cfg, seen = trl_run
    kept = lines(cfg, "trajectories", 1) + lines(cfg, "trajectories", 2)
    assert len(kept) == 2 * 3 * 8 * 8
    assert [t.ids for t in kept] == seen["ids"]
    assert [t.prompt_ids for t in kept] == seen["prompts"]
    assert [t.reward for t in kept] == seen["rewards"]
    problems = {problem.id: problem for problem in load_data(cfg)[0]}
    verdicts = verify_many([problems[t.problem] for t in kept], [t.response for t in kept])
    assert [(t.reward, t.reason) for t in kept] == [(v.reward, v.reason) for v in verdicts]
    assert 0 < sum(t.reward for t in kept) < len(kept)
    places = [(i, step) for i in (0, 1) for step in (1, 2, 3) for _ in range(8 * 8)]
    assert [(t.iteration, t.step) for t in kept] == places
    stops = Tokenizer(BASE).stop_ids
    assert all(t.finished == (t.ids[-1] in stops) and not stops & set(t.ids[:-1]) for t in kept)


def test_trl_phases_differ(trl_run):
    """Fault: every phase has the same seed, draws the same problems and the same numbers."""
    cfg, _ = trl_run
    orders = [[t.problem for t in lines(cfg, "trajectories", i)] for i in (1, 2)]
    assert orders[0] != orders[1]


def test_trl_experts_are_the_filters(trl_run):
    """Fault: the filter sees a part of the phase, or experts of an earlier phase."""
    cfg, _ = trl_run
    for i in (1, 2):
        expected = select_experts(lines(cfg, "trajectories", i), **vars(cfg.select))
        assert lines(cfg, "experts", i) == expected and expected


def test_trl_fine_tuning_starts_from_theta_i(trl_run):
    """Fault: RFT, or the next phase, goes on from the weights that RL left behind."""
    cfg, seen = trl_run
    directories = [BASE, *(f"{cfg.run_dir}/policies/theta_{i}" for i in (1, 2))]
    theta = [Transformer.from_pretrained(path).state_dict() for path in directories]
    for i in (0, 1):
        (rl_start, phi, _), (rft_start, rft_end, _) = seen["rl"][i], seen["rft"][i]
        for name, tensor in theta[i].items():
            assert torch.equal(rl_start[name], tensor) and torch.equal(rft_start[name], tensor)
            assert torch.equal(rft_end[name], theta[i + 1][name])
        assert not torch.equal(phi["model.norm.weight"], rl_start["model.norm.weight"])


def test_trl_fine_tuning_has_the_same_loss(trl_run):
    """Fault: TRL trains on the prompt, not on the stop token, cuts long rows, or divides by another
    number than that of the response tokens."""
    cfg, seen = trl_run
    experts = lines(cfg, "experts", 1)
    assert len(experts) <= cfg.rft.batch_size
    policy = Transformer.from_pretrained(BASE)
    weight = 1 / sum(len(e.ids) for e in experts)
    rows_NG = [[Row(e.prompt_ids, e.ids, weight=weight)] for e in experts]
    loss = 0.0
    for batch in rloop.training_batches(rows_NG, cfg):
        logp, _ = rloop.token_logprobs(policy, batch)
        loss += rloop.sft_loss(logp, batch.per_token([row.weight for row in batch.rows])).item()
    logged = seen["rft"][0][2][0]
    assert logged["loss"] == pytest.approx(loss, rel=1e-3)
    assert logged["learning_rate"] == cfg.rft.lr


def test_trl_gradient_differs_as_documented(trl_run):
    """Fault: the adapter's settings give TRL another gradient than docs/adapters.md says: ours
    times sqrt((G-1)/G), for the unbiased std, times the share of tokens in groups that are not
    flat."""
    cfg, seen = trl_run
    G = cfg.rl.samples_per_problem
    rows = [t for t in lines(cfg, "trajectories", 1) if t.step == 1]
    groups = [rows[i : i + G] for i in range(0, len(rows), G)]
    usable = [group for group in groups if not rloop.is_flat(group)]
    assert 0 < len(usable) < len(groups)
    policy = Transformer.from_pretrained(BASE)
    rows_NG = rloop.training_rows(usable, cfg)
    rloop.set_logprobs(rows_NG, "old_logps", policy, cfg)
    for row in [row for group in rows_NG for row in group]:
        row.sampler_logps = row.old_logps
    rloop.accumulate_gradient(policy, rows_NG, cfg)
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), float("inf")).item()
    share = sum(len(t.ids) for g in usable for t in g) / sum(len(t.ids) for t in rows)
    expected = norm * share * ((G - 1) / G) ** 0.5
    assert seen["rl"][0][2][0]["grad_norm"] == pytest.approx(expected, rel=2e-3)


def test_trl_refuses_what_it_lacks(trl_run):
    """Fault: a setting that TRL does not have is left out in silence, or a run is overwritten."""
    cfg, _ = trl_run
    with pytest.raises(UserError, match="holds a run"):
        trl_rloop.run(cfg)
    for override in (["--rl.overlong_buffer", "4"], ["--rl.max_sampling_rounds", "2"]):
        with pytest.raises(UserError, match="TRL has no"):
            trl_rloop.run(load_config(ROOT / "configs" / "countdown.toml", override))
    with pytest.raises(UserError, match="multiple"):
        override = ["--rl.problems_per_step", "7", "--rl.minibatches", "2"]
        trl_rloop.run(load_config(ROOT / "configs" / "countdown.toml", override))
