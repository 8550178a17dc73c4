"""ports/trl_rloop.py and ports/verl_prime_rl.py: RLoop on what people already run."""

import json

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from conftest import ROOT
from test_tokenizer import CHATML, write_checkpoint

import rloop
from config import Config, UserError, load_config
from data import load_data
from data.tokenizer import Tokenizer
from model import Transformer
from packing import Row, micro_batches
from ports import trl_rloop, verl_prime_rl
from rloop import Trajectory, select_experts
from verify import Verdict, verify_many

BASE = ROOT / "data" / "countdown_base"


# ---- TRL


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def small_config(path, *options: str) -> Config:
    return load_config(ROOT / "configs" / "countdown.toml", [
        *("--model.path", str(BASE), "--run_dir", str(path / "run"), "--iterations", "2"),
        *("--rl.problems_per_step", "8", "--rl.minibatches", "1", "--rl.lr", "1e-3", *options),
    ])  # fmt: skip


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

    cfg = small_config(tmp_path_factory.mktemp("trl"), "--rl.steps", "3", "--rft.epochs", "2")
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
    for batch in micro_batches(rows_NG, cfg.compute.micro_batch_tokens):
        logp, _ = rloop.token_logprobs(policy, batch)
        loss += rloop.sft_loss(logp, batch.per_token([row.weight for row in batch.rows])).item()
    logged = seen["rft"][0][2][0]
    assert logged["loss"] == pytest.approx(loss, rel=1e-3)
    assert logged["learning_rate"] == cfg.rft.lr


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_trl_gradient_differs_as_documented(aggregation, monkeypatch, tmp_path):
    """Fault: the adapter's settings give TRL another gradient than docs/adapters.md says: ours
    times sqrt((G-1)/G), for the unbiased std, times the share of tokens, or of responses, in groups
    that are not flat. Responses of many lengths, with rewards that depend on nothing."""
    options = ["--rl.aggregation", aggregation, "--sampling.temperature", "3.0"]
    cfg = small_config(tmp_path, "--rl.steps", "1", *options)
    history = []

    def train_and_keep(self):
        train(self)
        history.extend(self.state.log_history)

    def odd_length(problems, texts):
        pairs = zip(problems, texts, strict=True)
        return [Verdict(True, "", reward=len(t) * p.numbers[0] % 2) for p, t in pairs]

    train = trl_rloop.GRPOTrainer.train
    monkeypatch.setattr(trl_rloop.GRPOTrainer, "train", train_and_keep)
    monkeypatch.setattr(trl_rloop, "verify_many", odd_length)
    rows, G = trl_rloop.explore(BASE, cfg, 0, load_data(cfg)[0]), cfg.rl.samples_per_problem
    groups = [rows[i : i + G] for i in range(0, len(rows), G)]
    usable = [group for group in groups if not rloop.is_flat(group)]
    assert 0 < len(usable) < len(groups) and len({len(t.ids) for t in rows}) > 5
    policy = Transformer.from_pretrained(BASE)
    rows_NG = [rloop.training_rows(group, cfg) for group in usable]
    rloop.set_logprobs(rows_NG, "old_logps", policy, cfg)
    for row in [row for group in rows_NG for row in group]:
        row.sampler_logps = row.old_logps
    rloop.accumulate_gradient(policy, rows_NG, cfg)
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), float("inf")).item()
    size = (lambda t: len(t.ids)) if aggregation == "token" else (lambda t: 1)
    share = sum(size(t) for group in usable for t in group) / sum(size(t) for t in rows)
    expected = norm * share * ((G - 1) / G) ** 0.5
    assert history[0]["grad_norm"] == pytest.approx(expected, rel=2e-3)


def test_trl_refuses_what_it_lacks(trl_run):
    """Fault: a setting that TRL does not have is left out in silence, or a run is overwritten."""
    cfg, _ = trl_run
    with pytest.raises(UserError, match="holds a run"):
        trl_rloop.run(cfg)
    for key, value in (
        ("overlong_buffer", "4"),
        ("max_sampling_rounds", "2"),
        ("favor_hard", "true"),
    ):
        with pytest.raises(UserError, match=f"TRL lacks.*{key}"):
            trl_rloop.run(load_config(ROOT / "configs" / "countdown.toml", [f"--rl.{key}", value]))
    with pytest.raises(UserError, match="multiple"):
        override = ["--rl.problems_per_step", "7", "--rl.minibatches", "2"]
        trl_rloop.run(load_config(ROOT / "configs" / "countdown.toml", override))


# ---- verl and prime-rl


def write_rows(file, rows: list[dict]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def messages_of(file) -> list[list[dict]]:
    """The column messages, as verl's fine-tuning reads it; prime-rl's reads the same through
    datasets.load_dataset."""
    loaded = datasets.load_dataset("parquet", data_files=str(file), split="train")
    assert loaded.column_names == ["messages"]
    frame = pandas.read_parquet(file, dtype_backend="pyarrow")
    assert [list(messages) for messages in frame["messages"]] == list(loaded["messages"])
    return list(loaded["messages"])


@pytest.fixture
def verl(tmp_path):
    """Three steps of a run of verl: a function that turns its files into experts, and the paths.
    The texts are those that transformers decodes, as in verl's _log_rollout_data."""
    write_checkpoint(tmp_path, "qwen", chat_template=CHATML)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    system = {"role": "system", "content": "Be brief."}
    prompts = [[system, {"role": "user", "content": f"What is {n} + 1?"}] for n in (1, 2)]
    train = tmp_path / "train.parquet"
    rows = [{"prompt": prompt, "reward_model": {"ground_truth": "2"}} for prompt in prompts]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), train)
    texts = []
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        pad = tokenizer.pad_token_id
        texts.append(tokenizer.batch_decode([[pad, pad, *ids]], skip_special_tokens=True)[0])
    assert "<|" not in texts[0]
    for step in (10, 2, 1):
        answers = [("2", 1.0), (f"2, in step {step}", 1.0), ("no", 0.0), ("no", 0.0)]
        rows = [{"input": texts[0], "output": text, "score": score} for text, score in answers]
        rows += [{"input": texts[1], "output": "no", "score": 0.0, "acc": False}] * 4
        rows += [{"input": texts[1], "output": "3", "score": -0.4, "acc": True}]
        rows += [{"input": "", "output": "", "score": 0.0, "uid": "pad0f_0_0"}]
        write_rows(tmp_path / f"{step}.jsonl", [row | {"step": step} for row in rows])

    def select(*options) -> list[list[dict]]:
        files = sorted(str(file) for file in tmp_path.glob("*.jsonl"))
        out = tmp_path / "sft" / "train.parquet"
        sources = ["--train", str(train), "--model", str(tmp_path), "--out", str(out)]
        verl_prime_rl.main(["verl", *files, *sources, *options])
        return messages_of(out)

    return select, tmp_path, prompts


def test_verl_experts(verl, capsys):
    """Fault: the files are taken in the order of their names (10 before 2), so that the experts are
    not spread over the phase; a right answer with a penalty counts as wrong; a padding row counts
    as an attempt; the system message is lost."""
    select, _, prompts = verl
    rows = select("--select.max_per_problem", "3")
    assert [messages[:-1] for messages in rows] == [prompts[0]] * 3 + [prompts[1]]
    assert {messages[-1]["role"] for messages in rows} == {"assistant"}
    replies = [messages[-1]["content"] for messages in rows]
    assert replies == ["2", "2, in step 2", "2, in step 10", "3"]
    assert capsys.readouterr().out == "9 of 27 correct; 4 experts on 2 problems\n"
    assert [m[0] for m in select("--select.max_success_rate", "0.2")] == [prompts[1][0]]


def test_verl_trains_on_the_response_and_the_turns_end(verl):
    """Fault: what verl's MultiTurnSFTDataset trains, the assistant's message in the chat template
    behind the generation prompt, is not the response and the stop token."""
    select, path, _ = verl
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    whole, prompt = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=start)["input_ids"]
        for messages in [select()[0]]
        for messages, start in [(messages, False), (messages[:-1], True)]
    ]
    assert whole[: len(prompt)] == prompt
    assert tokenizer.decode(whole[len(prompt) :]) == "2<|eot|>\n"


def test_verl_rollouts_are_trajectories(verl):
    """Fault: the encoded ids differ from those that the policy would sample, or lack the stop
    token."""
    _, path, prompts = verl
    parse = verl_prime_rl.verl_parser(str(path / "train.parquet"), str(path))
    first = next(verl_prime_rl.read([str(path / "2.jsonl")], parse))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    template = tokenizer.apply_chat_template(prompts[0], add_generation_prompt=True)
    assert first.prompt_ids == template["input_ids"] and first.step == 2
    assert tokenizer.decode(first.ids) == "2<|eot|>"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input": "Who?", "output": "2", "score": 1.0, "step": 1}, "x.jsonl:1: no prompt of"),
        ({"input": "Who?", "score": 1.0, "step": 1}, "x.jsonl:1: no field 'output'"),
    ],
)
def test_verl_names_what_cannot_be_read(verl, row, message):
    """Fault: a rollout without its prompt is left out in silence, or the line is not named."""
    select, path, _ = verl
    write_rows(path / "x.jsonl", [row])
    with pytest.raises(UserError, match=message):
        select()


def episode(step: int, reply: str, score: float, ids: list[int], work="train", **changes) -> dict:
    """The fields that are read of verifiers 0.4.0's Episode.to_record, one trace each."""
    prompt = {"message": {"role": "user", "content": "What is 1 + 1?"}, "sampled": False}
    reply = {"message": {"role": "assistant", "content": reply}, "sampled": True, "parent": 0}
    prompt |= {"token_ids": [1, 2, 3], "mask": [False] * 3, "logprobs": []}
    reply |= {"token_ids": [4, *ids], "mask": [False] + [True] * len(ids)}
    reply["logprobs"] = [-0.5] * len(ids)
    trace = {
        "task": {"type": "Sum", "key": "sum-1", "hash": "ab"},
        "agent": {"name": "agent", "trainable": True},
        "nodes": [prompt, reply],
        "calls": [{"node": 1, "finish_reason": "stop"}],
        "rewards": {
            "right": {"score": score, "weight": 0.75},
            "form": {"score": 1.0, "weight": 0.25},
        },
        "ok": True,
    }
    run = {"type": "train", "id": "r", "work": {"type": work, "step": step}}
    return {"id": "e", "run": run, "traces": [trace | changes]}


def test_prime_rl_experts(tmp_path, capsys):
    """Fault: steps are out of order, evaluations and failed or untrained rollouts count as
    attempts, a weighted reward is summed without weights, the generation prompt counts as
    sampled."""
    rows = [
        *(episode(10, "two", 1.0, [6, 6, 9]), episode(2, "2", 1.0, [7, 9])),
        *(
            episode(2, "3", 0.0, [8, 9]),
            episode(1, "II", 1.0, [5, 9]),
            episode(3, "2", 1.0, [7, 9]),
        ),
        episode(1, "failed", 1.0, [9], ok=False),
        episode(1, "evaluation", 1.0, [9], work="eval"),
        episode(1, "judge", 1.0, [9], agent={"name": "judge", "trainable": False}),
    ]
    rows[3]["traces"][0]["nodes"][1]["message"]["reasoning_content"] = "1 + 1"
    file = write_rows(tmp_path / "stream.jsonl", rows)
    out = tmp_path / "sft" / "train.parquet"
    verl_prime_rl.main(["prime-rl", file, "--out", str(out), "--select.max_per_problem", "2"])
    replies = [messages[-1] for messages in messages_of(out)]
    assert [reply["content"] for reply in replies] == ["II", "two"]
    assert [reply["reasoning_content"] for reply in replies] == ["1 + 1", None]
    assert capsys.readouterr().out == "4 of 5 correct; 2 experts on 1 problems\n"
    (rollout,) = verl_prime_rl.parse_prime_rl(rows[0])
    assert (rollout.prompt_ids, rollout.ids, rollout.logps) == ([1, 2, 3, 4], [6, 6, 9], [-0.5] * 3)
    assert rollout.finished and rollout.problem == "sum-1" and rollout.reward == 1.0
    (wrong,) = verl_prime_rl.parse_prime_rl(rows[2])
    assert wrong.reward == 0.25


def test_prime_rl_names_what_it_does_not_read(tmp_path):
    """Fault: of a rollout of several turns one is trained; a row of an older version is left out in
    silence."""
    several = episode(1, "2", 1.0, [7, 9])
    several["traces"][0]["nodes"] *= 2
    out = ["--out", str(tmp_path / "out.parquet")]
    no_ids = episode(1, "2", 1.0, [])
    turns = "1: expected rollouts of one turn"
    for row, message in ((several, turns), (no_ids, turns), ({}, "1: no field 'run'")):
        file = write_rows(tmp_path / "stream.jsonl", [row])
        with pytest.raises(UserError, match=f"stream.jsonl:{message}"):
            verl_prime_rl.main(["prime-rl", file, *out])


def test_no_experts_write_nothing(tmp_path):
    """Fault: an empty file, on which the frameworks' fine-tuning fails, or starts."""
    file = write_rows(tmp_path / "stream.jsonl", [episode(1, "3", 0.0, [8, 9])])
    verl_prime_rl.main(["prime-rl", file, "--out", str(tmp_path / "out.parquet")])
    assert list(tmp_path.iterdir()) == [tmp_path / "stream.jsonl"]
