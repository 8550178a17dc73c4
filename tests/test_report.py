"""report.py: the numbers of its tables against ones computed by hand, what it groups and compares, and that its pictures are pictures."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import report

REPORT = Path(report.__file__)
PLOTS = ("learning_curves.png", "pass_at_k.png", "stability.png")


def evaluation(policy, avg, last, *, iteration=0, rl_steps=0, seconds=0.0, K=4):
    record = {
        "phase": "eval",
        "policy": policy,
        "iteration": iteration,
        "rl_steps": rl_steps,
        "time/total_s": seconds,
    }
    record |= {"eval/num_problems": 10, "eval/num_samples": K, "num_trajectories": 16 * rl_steps}
    record |= {"eval/forgotten_share": rl_steps / 100, "eval/union_share": 0.8}
    for key, value in (
        ("avg@4", avg),
        ("pass@1", avg),
        ("pass@2", (avg + last) / 2),
        ("pass@4", last),
    ):
        record |= {
            f"eval/{key}": value,
            f"eval/{key}_low": value - 0.05,
            f"eval/{key}_high": value + 0.05,
        }
    return record


def rl_step(n, reward, *, iteration=0, updated=True):
    record = {
        "phase": "rl",
        "iteration": iteration,
        "step": n,
        "rl_steps": n,
        "rl/reward_mean": reward,
        "rl/flat_share": 0.5,
    }
    record |= {"rl/num_trajectories": 16 * n, "time/total_s": float(n)}
    if updated:
        record |= {
            "rl/loss": 0.1,
            "rl/entropy_mean_nat": 0.4 + iteration / 10,
            "rl/grad_norm": 1.0 + n / (1 + iteration),
        }
        record |= {"rl/clip_low_share": 0.0, "rl/clip_high_share": 0.01}
    return record


def write_run(folder, method, records, *, seed=0, lr=1e-4, iterations=2, steps=12, **config):
    folder.mkdir()
    config = {
        "method": method,
        "seed": seed,
        "run_dir": str(folder),
        "iterations": iterations,
        "rl": {"lr": lr, "steps": steps},
    } | config
    (folder / "config.json").write_text(json.dumps({"eval": {"num_samples": 4}} | config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def rloop_run(folder, *, seed=0, avg=0.3, last=0.7, lr=1e-4, complete=True):
    """Two iterations of 12 RL steps; no step of the first three had a usable group."""
    records = [evaluation("base", 0.1, 0.5, seconds=2.6)]
    for i in range(2):
        records += [
            rl_step(12 * i + n, n / 100 + i / 10, iteration=i, updated=lr > 0 and n > 3)
            for n in range(1, 13)
        ]
        records.append(
            evaluation("rl", 0.2 + i / 50, 0.6, iteration=i, rl_steps=12 * i + 12, seconds=60.0 + i)
        )
        records.append(
            {
                "phase": "filter",
                "iteration": i,
                "rl_steps": 12 * i + 12,
                "filter/num_experts": 1234 + i,
            }
        )
        records.append(
            {
                "phase": "rft",
                "iteration": i,
                "step": 1,
                "rl_steps": 12 * i + 12,
                "rft/loss": 0.5,
                "time/total_s": 70.0,
            }
        )
        records.append(
            evaluation(
                "rft",
                avg - 0.01 * (1 - i),
                last,
                iteration=i,
                rl_steps=12 * i + 12,
                seconds=125.4 + i,
            )
        )
    return write_run(folder, "rloop", records if complete else records[:20], seed=seed, lr=lr)


def plain_run(folder, *, seed=0, avg=0.2, last=0.4, lr=1e-4, best=0.25):
    records = [evaluation("base", 0.1, 0.5), *(rl_step(n, n / 50) for n in range(1, 25))]
    records += [
        evaluation("rl", best, 0.55, rl_steps=12),
        evaluation("rl", avg, last, rl_steps=24, seconds=61.0),
    ]
    return write_run(folder, "rl", records, seed=seed, lr=lr)


def run_report(capsys, *arguments):
    """Exit code, screen and errors of the command."""
    code = report.main([str(a) for a in arguments])
    screen = capsys.readouterr()
    return code, screen.out, screen.err


def tables(*folders):
    """The text that the command prints, without drawing."""
    return "\n".join(report.tables(report.load_runs(folders)))


def rows_of(text, name):
    """Cells of the table lines whose first cell is name."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return [row[1:] for row in cells if row[0] == name]


def test_table_of_one_run_by_hand(tmp_path, capsys):
    """Would show another checkpoint's numbers, interval, trajectories, experts or wall time in a line of the table."""
    code, text, _ = run_report(capsys, rloop_run(tmp_path / "a"))
    assert code == 0
    assert rows_of(text, "base") == [
        ["0.100 [0.050, 0.150]", "0.500 [0.450, 0.550]", "0", "0", "", "0:03"]
    ]
    assert rows_of(text, "RL phase 2") == [
        ["0.220 [0.170, 0.270]", "0.600 [0.550, 0.650]", "24", "384", "", "1:01"]
    ]
    assert rows_of(text, "RFT 1") == [
        ["0.290 [0.240, 0.340]", "0.700 [0.650, 0.750]", "12", "192", "1,234", "2:05"]
    ]
    assert rows_of(text, "RFT 2") == [
        ["0.300 [0.250, 0.350]", "0.700 [0.650, 0.750]", "24", "384", "1,235", "2:06"]
    ]
    assert "unfinished" not in text and "Summary" not in text
    assert (tmp_path / "a" / "report.md").read_text().count("| RFT 2") == 1


def test_gap_and_forgetting_by_hand(tmp_path):
    """Would average the reward over another window or phase, or pair it with a policy that did not earn it."""
    text = tables(
        rloop_run(tmp_path / "a")
    )  # rewards of steps 3..12 of phase 2: 0.13 .. 0.22, mean 0.175
    assert (
        "Over-fitting gap at RL step 24: training reward 0.175 (mean of the last 10 RL steps) - held-out avg@4 0.220 = -0.045"
        in text
    )
    text = tables(plain_run(tmp_path / "b"))  # rewards of steps 15..24: 0.30 .. 0.48, mean 0.39
    assert (
        "training reward 0.390 (mean of the last 10 RL steps) - held-out avg@4 0.200 = 0.190"
        in text
    )
    assert (
        "Forgetting: 0.240 of the held-out problems were solved at an earlier evaluation" in text
    )  # at RL step 24
    assert "all evaluations together solve 0.800" in text


def test_gap_of_a_short_and_unfinished_phase(tmp_path):
    """Would count rewards of the phase before, or of steps after the policy that was evaluated."""
    records = [rl_step(n, 0.9) for n in range(1, 13)] + [
        rl_step(n, 0.2, iteration=1) for n in (13, 14)
    ]
    records += [evaluation("rl", 0.1, 0.5, iteration=1, rl_steps=14), rl_step(15, 0.8, iteration=1)]
    text = tables(write_run(tmp_path / "a", "rloop", records))
    assert (
        "gap at RL step 14: training reward 0.200 (mean of the last 2 RL steps) - held-out avg@4 0.100 = 0.100"
        in text
    )


def test_summary_by_hand(tmp_path):
    """Would use the population std, another baseline or another checkpoint: 0.3, 0.32, 0.4 have mean 0.34 and sample std sqrt(0.0028)."""
    runs = [
        rloop_run(tmp_path / f"a{s}", seed=s, avg=avg) for s, avg in enumerate((0.3, 0.32, 0.4))
    ]
    runs += [
        plain_run(tmp_path / f"b{s}", seed=s, avg=avg) for s, avg in enumerate((0.2, 0.2, 0.2))
    ]
    text = tables(*runs)
    assert ["3", "24", "384", "0.340 ± 0.053", "+70.0%", "0.700 ± 0.000", "+75.0%"] in rows_of(
        text, "RLoop"
    )
    assert ["3", "24", "384", "0.220 ± 0.000", "+10.0%", "0.600 ± 0.000", "+50.0%"] in rows_of(
        text, "RLoop, last RL phase"
    )
    assert ["3", "24", "384", "0.200 ± 0.000", "", "0.400 ± 0.000", ""] in rows_of(text, "plain RL")
    assert ["3", "12", "192", "0.250 ± 0.000", "+25.0%", "0.550 ± 0.000", "+37.5%"] in rows_of(
        text, "plain RL, best step"
    )
    assert rows_of(text, "RLoop")[1:] == [
        ["0", "0.300", "0.700"],
        ["1", "0.320", "0.700"],
        ["2", "0.400", "0.700"],
    ]
    assert "budgets are not equal" not in text


def test_groups_follow_the_settings(tmp_path):
    """Would average runs of different learning rates as if they were seeds, call lr 0 RLoop, or compare with the worse plain RL."""
    runs = [
        plain_run(tmp_path / "b", lr=1e-4, avg=0.2),
        plain_run(tmp_path / "c", lr=3e-5, avg=0.24, last=0.35),
    ]
    runs += [rloop_run(tmp_path / "a"), rloop_run(tmp_path / "d", lr=0.0, avg=0.27)]
    text = tables(*runs)
    assert ["1", "24", "384", "0.300", "+25.0%", "0.700", "+100.0%"] in rows_of(text, "RLoop")
    assert ["1", "24", "384", "0.270", "+12.5%", "0.700", "+100.0%"] in rows_of(text, "pure RFT")
    assert ["1", "24", "384", "0.200", "-16.7%", "0.400", "+14.3%"] in rows_of(
        text, "plain RL (lr 1e-4)"
    )
    assert (
        "relative difference of the means to plain RL (lr 3e-5), the best of 2 plain-RL settings by final avg@4"
        in text
    )


def test_group_label_names_any_setting(tmp_path):
    """Would mix seeds of runs that differ in something else than the learning rate, or split them by what changes no result."""
    for name, seed, threads, tau in (("a", 0, 1, 0.5), ("b", 1, 2, 0.5), ("c", 0, 1, 0.9)):
        options = {"compute": {"threads": threads}, "select": {"max_success_rate": tau}}
        write_run(tmp_path / name, "rloop", [evaluation("base", 0.1, 0.5)], seed=seed, **options)
    labels = [run.label for run in report.load_runs([tmp_path / name for name in "abc"])]
    assert labels == ["RLoop (max_success_rate 0.5)"] * 2 + ["RLoop (max_success_rate 0.9)"]
    write_run(tmp_path / "e", "rl", [], rft={"lr": 2e-4})
    write_run(tmp_path / "f", "rl", [], rft={"lr": 0.1})
    assert [run.label for run in report.load_runs([tmp_path / "e", tmp_path / "f"])] == [
        "plain RL (rft.lr 0.1)",
        "plain RL (rft.lr 2e-4)",
    ]


def test_tables_fit_the_screen(tmp_path):
    """Would break lines of a terminal of 120 columns, or columns that do not stand under each other."""
    runs = [
        plain_run(tmp_path / f"{lr}{s}", lr=lr, seed=s, avg=0.2 + s / 50)
        for lr in (1.5e-4, 3e-5)
        for s in (0, 1)
    ]
    long = {"select": {"max_success_rate": 0.123456, "max_per_problem": 12345}}
    runs.append(
        write_run(
            tmp_path / "x",
            "rl",
            [evaluation("base", 0.1, 0.5), evaluation("rl", 0.3, 0.5, rl_steps=24)],
            **long,
        )
    )
    text = tables(*runs)
    block: list[str] = []
    for line in [*text.splitlines(), ""]:
        assert not line.startswith("|") or len(line) <= 120
        block = [*block, line] if line.startswith("|") else []
        assert len({len(row) for row in block}) <= 1


def test_runs_that_cannot_be_compared_are_refused(tmp_path, capsys):
    """Would put avg@4 and avg@8, or two held-out sets, into one column, or count one seed twice."""
    a = rloop_run(tmp_path / "a")
    b = write_run(tmp_path / "b", "rl", [], eval={"num_samples": 8})
    code, _, err = run_report(capsys, a, b)
    assert code == 2 and "eval.num_samples = 8" in err and str(b) in err
    c = write_run(tmp_path / "c", "rl", [], data={"eval": "countdown:search"})
    assert "data.eval = 'countdown:search'" in run_report(capsys, a, c)[2]
    assert "wanted each seed once" in run_report(capsys, a, rloop_run(tmp_path / "d"))[2]
    assert "Summary" not in tables(
        a, a / "." / ".." / "a"
    )  # the same directory given twice is one run


def test_unfinished_run_is_shown_and_not_averaged(tmp_path, capsys):
    """Would crash on a run without its last evaluations, or average a half-trained seed with finished ones."""
    half = rloop_run(tmp_path / "half", seed=1, complete=False)
    code, text, _ = run_report(capsys, half)
    assert (
        code == 0
        and "half (unfinished)" in text
        and rows_of(text, "RFT 1")
        and not rows_of(text, "RL phase 2")
    )
    assert all((half / name).exists() for name in PLOTS)
    text = tables(rloop_run(tmp_path / "a"), half)
    assert "RLoop, seed 1 is unfinished and left out" in text
    assert ["1", "24", "384", "0.300", "0.700"] in rows_of(text, "RLoop")
    mid_phase = write_run(
        tmp_path / "mid",
        "rl",
        [evaluation("base", 0.1, 0.5), rl_step(1, 0.1), evaluation("rl", 0.2, 0.5, rl_steps=1)],
    )
    assert rows_of(tables(mid_phase), "plain RL, unfinished")
    assert rows_of(tables(half, mid_phase), "RLoop, unfinished") == [
        ["1", "12", "192", "0.290", "0.700"],
        ["1", "0.290", "0.700"],
    ]
    empty = write_run(tmp_path / "empty", "rl", [])
    code, text, _ = run_report(capsys, empty, write_run(tmp_path / "empty1", "rl", [], seed=1))
    assert (
        code == 0
        and "No evaluation yet" in text
        and not any((empty / name).exists() for name in PLOTS)
    )


def test_half_written_last_line_is_told_and_left_out(tmp_path, capsys):
    """Would crash on, or silently drop, the line during which a run was killed (cut inside a character too)."""
    run = rloop_run(tmp_path / "a")
    with (run / "metrics.jsonl").open("ab") as stream:
        stream.write('{"phase": "eval", "policy": "ü'.encode()[:-1])
    code, text, _ = run_report(capsys, run)
    assert (
        code == 0
        and len(
            [
                line
                for line in text.splitlines()
                if "metrics.jsonl:34: the last line is half written" in line
            ]
        )
        == 1
    )
    assert rows_of(text, "RFT 2")


@pytest.mark.parametrize(
    "line, told",
    [
        ('{"phase": "rl", "iter', "not a JSON record"),
        ("[1, 2]", "wanted a record with a phase"),
        ('{"phase": "rl", "iteration": 0, "rl_steps": 1}', "rl record without 'rl/reward_mean'"),
        (
            '{"phase": "eval", "policy": "rl", "iteration": 0, "rl_steps": 1}',
            "eval record without 'eval/num_samples'",
        ),
        (
            json.dumps(evaluation("rl", 0.1, 0.5) | {"eval/num_samples": 8}),
            "eval record without 'eval/avg@8'",
        ),
    ],
)
def test_broken_middle_line_names_file_and_line(tmp_path, capsys, line, told):
    """Would skip a damaged record and report on the rest, or end in a traceback that does not say where."""
    run = rloop_run(tmp_path / "a")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[4] = line
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    code, _, err = run_report(capsys, run)
    assert code == 2 and f"{run / 'metrics.jsonl'}:5: " in err and told in err


def test_missing_files_are_one_line_and_exit_code_2(tmp_path):
    """Would end in a traceback, or in success, for a directory that is not a run. As a command: rloop.py starts it like this."""
    (tmp_path / "not_a_run").mkdir()
    config_only = write_run(tmp_path / "config_only", "rl", [])
    (config_only / "metrics.jsonl").unlink()
    cases = {
        "nowhere": "no such directory",
        "not_a_run": "no config.json there",
        "config_only": "no metrics.jsonl there",
    }
    for name, got in cases.items():
        folder = tmp_path / name
        done = subprocess.run([sys.executable, REPORT, folder], capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith(f"error: {folder}: {got}") and done.stderr.count("\n") == 1
    (config_only / "metrics.jsonl").touch()
    (config_only / "config.json").write_text('{"method": "rl", "seed": 0}')
    with pytest.raises(ValueError, match="config.json: no key iterations"):
        report.load_run(config_only)


def test_pictures_are_written_and_show_something(tmp_path, capsys):
    """Would leave a temporary or an empty picture, fail on steps without an update, or not say where the pictures are."""
    import matplotlib.image

    runs = [rloop_run(tmp_path / f"a{s}", seed=s) for s in (0, 1)] + [plain_run(tmp_path / "b")]
    _, text, _ = run_report(capsys, *runs, "--out", tmp_path / "new" / "out")
    out = tmp_path / "new" / "out"
    assert sorted(file.name for file in out.iterdir()) == sorted([*PLOTS, "report.md"])
    assert text.splitlines()[-4:] == [
        str(out / name)
        for name in ("report.md", "learning_curves.png", "stability.png", "pass_at_k.png")
    ]
    for name in PLOTS:
        image = matplotlib.image.imread(out / name)[:, :, :3]
        assert image.shape[0] > 600 and image.shape[1] > 1000
        for label in ("RLoop", "plain RL"):  # its curve is there, not only its legend
            rgb = [int(report.COLORS[label][i : i + 2], 16) / 255 for i in (1, 3, 5)]
            rows = (abs(image - rgb).max(axis=2) < 0.02)[image.shape[0] // 10 :]
            assert rows.sum() > 500 and rows.any(axis=0).sum() > 200, (name, label)
        assert f"![{name}]({name})" in (out / "report.md").read_text()


@pytest.mark.parametrize("method", ["eval", "sft"])
def test_runs_without_rl_skip_the_rl_pictures(tmp_path, capsys, method):
    """Would crash on a method that has no RL steps, or leave out a picture without a word."""
    records = [evaluation("base", 0.1, 0.5)] + (
        [evaluation("rft", 0.2, 0.6)] if method == "sft" else []
    )
    run = write_run(tmp_path / "a", method, records)
    code, text, _ = run_report(capsys, run)
    assert code == 0 and (run / "pass_at_k.png").exists() and not (run / "stability.png").exists()
    assert "learning_curves.png is left out" in text and "stability.png is left out" in text
    assert bool(rows_of(text, "SFT")) == (method == "sft")


def test_smooth_against_a_plain_loop():
    """Would shift the curve, cut its ends, or let a step without an update pull the mean down."""
    import numpy as np

    values = np.array([1.0, 2.0, np.nan, 4.0, 8.0, np.nan, np.nan, np.nan, 3.0])
    for window in (1, 3, 5, 21):
        half = window // 2
        parts = [
            [v for v in values[max(0, i - half) : i + half + 1] if v == v]
            for i in range(len(values))
        ]
        expected = [np.mean(part) if part else np.nan for part in parts]
        np.testing.assert_allclose(report.smooth(values, window), expected)


def test_report_reads_files_only():
    """Would make the report need torch, or tie it to the code of the run that it describes."""
    tree = ast.parse(REPORT.read_text(encoding="utf-8"))
    names = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names} & {
        "torch",
        "rloop",
        "rundir",
        "model",
        "sampler",
        "config",
        "data",
        "verify",
    }
