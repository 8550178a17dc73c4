"""experiments/: statistics, summaries of runs, and the variants of the algorithm."""

import inspect
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, SMALL_RUN

import rloop
from config import load_config
from experiments import ablations, common, headline, language, phenomena, variants
from experiments import map as map_of_winners

FEW = ["--rl.steps", "4", "--rft.epochs", "1", "--eval.num_samples", "1"]
VARIANTS = [
    name
    for name, f in inspect.getmembers(variants, inspect.isfunction)
    if f.__module__ == variants.__name__ and not name.startswith("_") and name != "weights_of_theta"
]


@pytest.fixture
def small_variant(tmp_path, monkeypatch):
    """Runs a variant (or "" for RLoop itself) in a few small steps; returns the weights of all its
    policies, and its evaluations."""

    def run(variant: str, name: str, *overrides: str) -> tuple[bytes, list[dict]]:
        with monkeypatch.context() as patch:
            for attribute, value in vars(rloop).items():
                if callable(value):
                    patch.setattr(rloop, attribute, value)  # undone at the end
            if variant:
                getattr(variants, variant)()
            path = str(tmp_path / name)
            flags = [*SMALL_RUN, *FEW, *overrides, "--run_dir", path]
            rloop.run_method(load_config(ROOT / "configs" / "countdown.toml", flags))
        policies = sorted((tmp_path / name / "policies").glob("*/model.safetensors"))
        return b"".join(f.read_bytes() for f in policies), common.evaluations(tmp_path / name)

    return run


def test_every_variant_is_used_and_documented():
    """Fault: an arm of an experiment names a variant that does not exist."""
    arms = [arm for arms, *_ in ablations.ARMS.values() for arm in arms.values()]
    used = {variant for variant, _ in arms} - {""}
    assert used == set(VARIANTS)
    assert all(inspect.getdoc(getattr(variants, name)) for name in VARIANTS)


def test_variants_change_the_run(small_variant):
    """Fault: a variant replaces what nothing calls, and its row of the table is RLoop's again."""
    plain, _ = small_variant("", "plain")
    again, _ = small_variant("", "again")
    assert plain == again
    special = {  # where the change shows: in plain RL, and with groups that fail
        "entropy_bonus": ["--method", "rl"],
        "old_expert_in_failed_groups": ["--iterations", "3", "--rl.samples_per_problem", "2"],
    }
    for name in VARIANTS:
        options = special.get(name, [])
        reference = small_variant("", f"{name}-plain", *options)[0] if options else plain
        assert small_variant(name, name, *options)[0] != reference, name


def test_rft_is_stopped_by_validation(small_variant, tmp_path, monkeypatch):
    """Fault: theta is the policy of the last epoch, or of the worst."""
    respond, solved = rloop.respond, iter([1, 5, 3] * 2)

    def with_scores(model, tokenizer, problems, cfg, seed, place, *, num_samples, **options):
        if num_samples != 32:
            return respond(
                model, tokenizer, problems, cfg, seed, place, num_samples=num_samples, **options
            )
        assert len(problems) == 100
        right, count = SimpleNamespace(reward=1.0), next(solved)
        return [[right] * (n < count) for n in range(100)], {}

    monkeypatch.setattr(rloop, "respond", with_scores)
    small_variant("rft_stopped_by_validation", "run", "--rft.epochs", "3")
    policies = tmp_path / "run" / "policies"
    weights = {p.name: (p / "model.safetensors").read_bytes() for p in policies.iterdir()}
    assert len(weights) == 2 * (1 + 1 + 3) and not any(solved)
    for i in (1, 2):
        assert weights[f"theta_{i}"] == weights[f"rft_{i}_epoch_2"] != weights[f"rft_{i}_epoch_3"]


def test_phases_end_when_they_stall(small_variant, tmp_path, monkeypatch):
    """Fault: a phase goes on to the end, or all phases together are longer than RLoop's."""
    monkeypatch.setattr(variants, "STALL_STEPS", 5)
    monkeypatch.setattr(variants, "STALL_PROBLEMS", 99)
    _, found = small_variant("phase_ends_when_stalled", "run", "--rl.steps", "6")
    assert [(e["policy"], e["rl_steps"]) for e in found[1:]] == [
        ("rft", 5),
        ("rft", 10),
        ("rft", 12),
    ]
    monkeypatch.setattr(variants, "STALL_PROBLEMS", 0)
    _, found = small_variant("phase_ends_when_stalled", "whole", "--rl.steps", "6")
    assert [e["rl_steps"] for e in found] == [0, 12]


def test_evaluations_of_a_run(small_variant, tmp_path):
    """Fault: the cost of a run leaves out RFT, or counts the evaluations."""
    _, found = small_variant("", "run", "--rft.epochs", "2")
    assert [e["policy"] for e in found] == ["base", *["rl", "rl", "rft"] * 2]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    tokens = 0
    for file in (tmp_path / "run" / "experts").iterdir():
        tokens += 2 * sum(len(json.loads(line)["ids"]) for line in file.open())
    updates = [r for r in records if r["phase"] == "rl" and "rl/loss" in r]
    tokens += sum(32 * (1 - r["rl/flat_share"]) * r["rl/len_mean_tok"] for r in updates)
    assert found[-1]["tokens"] == pytest.approx(tokens, abs=1)
    assert 0 < found[-1]["seconds"] < records[-1]["time/total_s"]
    assert [e["seconds"] for e in found] == sorted(e["seconds"] for e in found)


def test_paired_gain():
    """Fault: the interval is that of unpaired arms, or of the problems alone."""
    rng = np.random.default_rng(1)
    problem_P, seed_S1 = rng.random(200), rng.normal(0, 0.1, (8, 1))
    a_SP = problem_P + 0.1 + rng.normal(0, 0.01, (8, 200))
    mean, low, high, relative = common.paired_gain(a_SP, np.tile(problem_P, (8, 1)))
    assert low < 0.1 < high and high - low < 0.01 and mean == pytest.approx(0.1, abs=0.005)
    assert relative == pytest.approx(a_SP.mean() / problem_P.mean() - 1)
    # a difference that varies by seed alone: its standard error is std / sqrt(seeds)
    _, low, high, _ = common.paired_gain(problem_P + seed_S1, np.tile(problem_P, (8, 1)))
    wanted = 2 * 1.96 * seed_S1.std() / np.sqrt(8)
    assert high - low == pytest.approx(wanted, rel=0.1)


def test_best_checkpoint_and_closest():
    """Fault: the best checkpoint is chosen on the games that are reported, or behind the budget."""

    def evaluation(steps, validation, test, tokens):
        counts = [validation] * headline.VALIDATION + [test] * headline.TEST
        text = " ".join(map(str, counts))
        return {"policy": "rl", "rl_steps": steps, "num_correct": text, "tokens": tokens}

    found = [evaluation(100, 3, 1, 10), evaluation(300, 2, 9, 30), evaluation(400, 9, 9, 45)]
    assert headline.best_checkpoint({"evaluations": found}) is found[0]
    assert headline.at_steps({"evaluations": found}, "rl") is found[1]
    assert headline.closest({"evaluations": found}, "tokens", 40) is found[2]
    assert headline.quality(found[1]) == pytest.approx(np.sqrt((2 * 100 + 9 * 400) / 500 / 32))


def test_finished_runs_are_not_run_again(tmp_path, monkeypatch):
    """Fault: a continued experiment starts from nothing, or keeps the result of another command."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    ran = []

    def run(name, command):
        ran.append((name, *command))
        return {"evaluations": command}

    monkeypatch.setattr(common, "run", run)
    common.run_all("x", {"a": ["1"], "b": ["2"]}, jobs=2)
    results = common.run_all("x", {"b": ["2"], "a": ["3"]}, jobs=1)
    assert common.run_all("y", {"c": ["3"]}, jobs=1) == {"c": results["a"]}
    assert sorted(ran) == [("a", "1"), ("a", "3"), ("b", "2")]
    assert results == {
        name: {"command": c, "evaluations": [c]} for name, c in (("b", "2"), ("a", "3"))
    }


def test_headline_report(tmp_path, monkeypatch):
    """Fault: an arm is read at another step, the validation games are reported, a gain has the
    wrong sign or interval, or is another row's."""

    def result(command):
        """Scores that depend on the arm alone: every test game is solved so often of 32."""
        lr = command[command.index("--rl.lr") + 1] if "--rl.lr" in command else None
        per_game = {"0": 2, "6e-5": 4, "1e-4": 8}.get(lr, 1)
        per_game += 4 * ("--rl.favor_hard" in command) + (command[5:7] == ["--iterations", "8"])
        plain = "rl" in command
        steps = (0, 100, 300, 400) if plain else (0, 75, 150, 225, 300)
        found = []
        for step in steps:
            solved = per_game + (step == 100) if step else 1
            counts = " ".join(["32"] * headline.VALIDATION + [str(solved)] * headline.TEST)
            for policy in ("base",) if step == 0 else ("rl",) if plain else ("rl", "rft"):
                cost = {"seconds": step * 0.1, "tokens": step * (100 if plain else 110)}
                place = {"policy": policy, "iteration": 0, "rl_steps": step}
                found.append(place | cost | {"num_correct": counts})
        return {"evaluations": found}

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    everything = {}
    monkeypatch.setattr(
        headline,
        "run_all",
        lambda experiment, commands, jobs: (
            everything.update(commands)
            or {name: result(command) for name, command in commands.items()}
        ),
    )
    best = {
        "rl": "lr 6e-5",
        "rft": "4 rounds, 6 epochs, cap 10",
        "rloop": "4 iterations, lr 1e-4, 6 epochs, cap 10",
    }
    headline.report("headline", [], best, jobs=1)
    text = (tmp_path / "headline.md").read_text()
    tables = [[line.split("|") for line in part.splitlines()] for part in text.split("\n\n")]
    rows, hard, strata = ({row[1].strip(): row for row in rows} for rows in tables)
    assert rows.keys() | hard.keys() == strata.keys() - {tables[2][0][1].strip()} | {"policy"}
    gains = {name: row[6].strip() for name, row in hard.items()}
    assert (
        gains["RLoop, 4 iterations, lr 1e-4, 6 epochs, cap 10"] == "+0.125 [+0.125, +0.125], +50%"
    )
    assert gains["pure RFT, 4 rounds, 6 epochs, cap 10, favors hard problems"].endswith(", +100%")
    assert gains["plain RL, lr 1e-4, favors hard problems"].endswith(", +0%")
    assert [*gains.values()].index("") == len(gains) - 1 == 7
    assert all(len({len(row) for row in rows}) == 1 for rows in tables)
    assert strata["plain RL, lr 6e-5"][2:5] == ["  ", " 0.125 / 1.000 ", "  "]
    plain = rows["plain RL, lr 6e-5"]
    assert plain[5].strip() == "0.125 ± 0.000"
    assert plain[6].strip() == "+0.125 [+0.125, +0.125], +100%"
    assert [cell.strip() for cell in rows["plain RL, its best checkpoint"][2:6:3]] == [
        "100",
        "0.156 ± 0.000",
    ]
    assert rows["plain RL at RLoop's training tokens"][2].strip() == "300"
    assert rows["RLoop, 4 iterations, lr 1e-4, 6 epochs, cap 10"][6].strip() == ""
    assert len(everything) == 6 * 8 + 1 and (tmp_path / "headline.png").exists()

    everything.clear()
    headline.main("many", ["--data.train_size", "1600"], jobs=1)
    assert all(c[c.index("--data.train_size") + 1] == "1600" for c in everything.values())
    of_search = [name for name in everything if name.startswith("many_search/")]
    assert len(of_search) == sum(len(c) + 2 * 4 for c in headline.CANDIDATES.values())
    rows = (tmp_path / "many_search.md").read_text().split("\n\n")[1].splitlines()
    assert [row.split(" | ")[1] for row in rows[2:]] == ["3"] * 4 + ["1"] * 20
    text = (tmp_path / "many.md").read_text()
    assert text.count("RLoop, 8 iterations, lr 1e-4") == 5 and text.count("pure RFT, 8 rounds") == 5


def fake_results(monkeypatch, tmp_path, module, solved_of) -> None:
    """Instead of runs: evaluations in which every game is solved solved_of(name) times of 32."""

    def run_all(experiment, commands, jobs):
        found = {}
        for name in commands:
            place = {"policy": "base", "rl_steps": 0, "num_correct": " ".join(["1"] * 10)}
            end = " ".join([str(solved_of(name))] * 9 + ["0"])
            last = {"policy": "rl", "rl_steps": 300, "num_correct": end}
            found[name] = {"evaluations": [place, last]}
        return found

    for target in (common, module):
        monkeypatch.setattr(target, "RESULTS", tmp_path, raising=False)
    monkeypatch.setattr(module, "run_all", run_all)


def test_ablations_report(tmp_path, monkeypatch):
    """Fault: an arm is compared with another seed's RLoop, or with itself."""
    solved = {"RLoop": 16, "no cap": 8, "RFT 12 epochs": 32}
    name_of = lambda path: path.split("/")[1]  # noqa: E731
    fake_results(monkeypatch, tmp_path, ablations, lambda path: solved.get(name_of(path), 4))
    ablations.main("ablations", jobs=1)
    lines = (tmp_path / "ablations.md").read_text().splitlines()
    rows = {line.split(" | ")[0]: line for line in lines}
    assert rows["| no cap"] == (
        "| no cap | 0.225 ± 0.000 | -0.225 [-0.250, -0.175] "
        "| 0.900 ± 0.000 | +0.000 [+0.000, +0.000] |"
    )
    assert rows["| RLoop"] == "| RLoop | 0.450 ± 0.000 |  | 0.900 ± 0.000 |  |"
    assert len(lines) == 2 + len(ablations.ABLATIONS)


def test_language_report():
    """Fault: arms that differ in RL steps or in what they start from, a table that mixes up the
    policies of a run, or one that an arm without a finished run stops."""
    commands = {arm: language.gym_command("gcd", arm, 1) for arm in language.ARMS}
    commands["gsm8k"] = language.gsm8k_command("rft", 0)
    configs = {arm: load_config(ROOT / c[2], c[3:]) for arm, c in commands.items()}
    assert {arm: cfg.iterations * cfg.rl.steps for arm, cfg in configs.items()} == {
        "rloop": 60,
        "rl": 60,
        "rft": 60,
        "gsm8k": 100,
    }
    assert [cfg.method for cfg in configs.values()] == ["rloop", "rl", "rloop", "rloop"]
    assert [cfg.rl.lr for cfg in configs.values()] == [3e-6, 3e-6, 0, 0]
    counts = {"rloop": ["0 0", "16 0", "8 4"], "rl": ["0 4", "16 0"]}
    results = {
        f"language/gcd/{arm}/0": {"evaluations": [{"num_correct": c} for c in found]}
        for arm, found in counts.items()
    }
    results["language/gcd/rloop/0, RLoop"] = {"evaluations": [{"num_correct": "16 4"}]}
    assert language.table(results)[2:] == [
        "| gcd, k = 16 | base | 1 | 0.125 | 0.500 |  |  |  |",
        "| gcd, k = 16 | plain RL | 1 | 0.500 | 0.500 |  |  |  |",
        "| gcd, k = 16 | RLoop, after its last RL phase | 1 | 0.500 | 0.500 |  |  |  |",
        "| gcd, k = 16 | RLoop | 1 | 0.375 | 1.000 | 1 | 0.625 | 1.000 |",
    ]


def test_policies_are_judged_by_their_last_number(tmp_path, monkeypatch):
    """Fault: a policy is judged as another one, on other samples, or where it is not at hand; the
    form of an answer plays a part."""
    monkeypatch.setattr(language, "ROOT", tmp_path)
    monkeypatch.setattr(language, "RUNS", tmp_path)
    monkeypatch.setattr(language, "RESULTS", tmp_path)
    known = {"language/gcd/rft/2, pure RFT": {}}
    (tmp_path / "language.json").write_text(json.dumps({"runs": known}))
    for policy in ("rl_3", "theta_3", "theta_2"):
        (tmp_path / "language" / "gcd" / "rloop" / "1" / "policies" / policy).mkdir(parents=True)
    (tmp_path / "language" / "gsm8k" / "rl" / "0" / "policies" / "rl_1").mkdir(parents=True)
    runs = {
        f"language/gcd/{a}/{s}": language.gym_command("gcd", a, s)
        for a in language.ARMS
        for s in (1, 2)
    }
    runs["language/gsm8k/rl/0"] = language.gsm8k_command("rl", 0)
    found = language.fair_commands(runs)
    configs = {name: load_config(ROOT / c[2], c[3:]) for name, c in found.items()}
    model = language.QWEN
    assert {name: (cfg.model.path, cfg.seed) for name, cfg in configs.items()} == {
        "language/gcd/rloop/1, RLoop, after its last RL phase": (
            "language/gcd/rloop/1/policies/rl_3",
            1,
        ),
        "language/gcd/rloop/1, RLoop": ("language/gcd/rloop/1/policies/theta_3", 1),
        "language/gcd/rft/2, pure RFT": ("language/gcd/rft/2/policies/theta_3", 2),
        "language/gsm8k/rl/0, base": (model, 0),
        "language/gsm8k/rl/0, plain RL": ("language/gsm8k/rl/0/policies/rl_1", 0),
    }
    assert all(cfg.method == "eval" and cfg.data.reward for cfg in configs.values())
    problem = SimpleNamespace(answer="-1,234")
    texts = ["it is -1,234.", "-1234.00", "12 -1234, or 5", "", "1234", "1-1234"]
    judged = [language.last_number(problem, text) for text in texts]
    assert judged == [True, True, False, False, False, False]


def test_reward_by_the_last_number_needs_no_torch():
    """Fault: a worker has too little memory for the reward's imports where PyTorch is for CUDA."""
    program = "import sys, experiments.language; print('torch' in sys.modules)"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_map_report(tmp_path, monkeypatch):
    """Fault: the winner of a cell is not the arm with the best score, a cell is another's, or arms
    that are level have a winner."""
    winner = {"3-0-100": "pure RFT", "5-2560-1600": "plain RL", "4-0-400": "none"}

    def solved_of(name):
        cell, arm = name.split("/")[1], name.split("/")[-1]
        best = winner.get(cell, "RLoop")
        return 16 if arm == best else 8

    fake_results(monkeypatch, tmp_path, map_of_winners, solved_of)
    monkeypatch.setattr(map_of_winners, "build_bases", lambda jobs: None)
    map_of_winners.main(jobs=1)
    lines = (tmp_path / "map.md").read_text().splitlines()
    end = lines.index("")
    assert end == 2 + 27 and len({line.count("|") for line in lines[:end]}) == 1
    of_all = lines[-1].split(" | ")  # RLoop .425, the others .233
    assert of_all[1:3] == ["+0.192 [+0.150, +0.225], +82%"] * 2
    assert of_all[4] == "+0.000 [+0.000, +0.000], +0% |"
    assert len(lines) == end + 1 + 2 + len(map_of_winners.GAMES) + len(map_of_winners.NUMBERS) + 1
    assert "| 3 | 0.031 | 100 | 0.225 | 0.225 | **0.450** | 0.900 | 0.900 | 0.900 |" in lines
    assert "| 5 | 0.031 | 1600 | 0.225 | **0.450** | 0.225 | 0.900 | 0.900 | 0.900 |" in lines
    assert "| 4 | 0.031 | 400 | 0.225 | 0.225 | 0.225 | 0.900 | 0.900 | 0.900 |" in lines
    assert (tmp_path / "map.png").exists()


def test_base_policies_of_the_map(tmp_path, monkeypatch):
    """Fault: a base policy that is not there is taken for built, as in a fresh clone with kept
    results; or one that is there is built again, or a habit before the skills under it."""
    built = []
    monkeypatch.setattr(map_of_winners, "run", lambda name, command: built.append(name))
    monkeypatch.setattr(map_of_winners, "RUNS", tmp_path)
    monkeypatch.setattr(map_of_winners, "ROOT", tmp_path)
    (tmp_path / "map" / "skills-4" / "policies" / "sft").mkdir(parents=True)
    map_of_winners.build_bases(jobs=1)
    assert built[:2] == ["map/skills-3", "map/skills-5"]
    assert len(built) == 2 + 6 and len(set(built)) == 8


def test_diversity_and_flips(tmp_path):
    """Fault: responses to different problems are compared, or of one step as of two."""
    a, b = [1, 2, 3, 4, 5], [9, 8, 7, 6, 5]
    records = [(1, "p", a), (1, "p", a), (1, "q", a), (1, "q", b), (2, "p", a), (2, "p", a)]
    file = tmp_path / "trajectories" / "iteration_1.jsonl"
    file.parent.mkdir()
    lines = [json.dumps({"step": s, "problem": p, "ids": ids}) for s, p, ids in records]
    file.write_text("\n".join(lines))
    found = phenomena.diversity(tmp_path)
    assert found["within"] == pytest.approx([0.5, 1.0])  # p: 1, q: 0
    assert found["between"] == [None, pytest.approx(1.0)]
    evaluations = [{"num_correct": text} for text in ("1 1 0 0", "0 3 1 0", "0 0 0 0")]
    assert phenomena.flips({"evaluations": evaluations}) == pytest.approx([0.25, 0.5])


def test_phenomena_report(small_variant, tmp_path, monkeypatch):
    """Fault: the report fails on the records of a real run."""
    fake_results(monkeypatch, tmp_path, phenomena, lambda name: 8)
    monkeypatch.setattr(phenomena, "RUNS", tmp_path)
    small_variant("", "run", "--rl.steps", "8")
    for arm in phenomena.ARMS:
        for seed in phenomena.SEEDS:
            link = tmp_path / "phenomena" / arm / str(seed)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(tmp_path / "run")
    phenomena.main(jobs=1)
    text = (tmp_path / "phenomena.md").read_text()
    assert "| avg@32 | 0.225 ± 0.000 | 0.225 ± 0.000 |" in text and "nan" not in text
    assert (tmp_path / "phenomena.png").exists()
