"""report.py: its numbers against ones computed by hand, its groups, its picture."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import report

REPORT = Path(report.__file__)


def evaluation(policy, avg, last, *, iteration=0, rl_steps=0, seconds=0.0):
    record = {"phase": "eval", "policy": policy, "iteration": iteration, "rl_steps": rl_steps}
    record |= {"eval/num_samples": 4, "num_trajectories": 16 * rl_steps, "time/total_s": seconds}
    record |= {"eval/forgotten_share": rl_steps / 100, "eval/union_share": 0.8}
    values = {"avg@4": avg, "pass@1": avg, "pass@2": (avg + last) / 2, "pass@4": last}
    for key, value in values.items():
        record |= {f"eval/{key}": value}
        record |= {f"eval/{key}_low": value - 0.05, f"eval/{key}_high": value + 0.05}
    return record


def rl_step(n, reward, *, iteration=0, updated=True):
    record = {"phase": "rl", "iteration": iteration, "rl_steps": n, "rl/reward_mean": reward}
    if updated:
        record |= {
            "rl/entropy_mean_nat": 0.4 + iteration / 10,
            "rl/grad_norm": 1 + n / (1 + iteration),
            "rl/len_mean_tok": 10 + 2 * iteration,
        }
    return record


def write_run(folder, method, records, *, seed=0, lr=1e-4, **sections):
    folder.mkdir()
    config = {"method": method, "seed": seed, "run_dir": str(folder), "iterations": 2}
    config |= {"rl": {"lr": lr, "steps": 12}, "eval": {"num_samples": 4}} | sections
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def rloop_run(folder, *, seed=0, avg=0.3, lr=1e-4, complete=True, **sections):
    """Two iterations of 12 RL steps; no step of the first three had a usable group."""
    records = [evaluation("base", 0.1, 0.5, seconds=2.6)]
    for i, last in enumerate((12, 24)):
        for n in range(1, 13):
            step = rl_step(12 * i + n, n / 100 + i / 10, iteration=i, updated=lr > 0 and n > 3)
            records.append(step)
        at = {"iteration": i, "rl_steps": last}
        records.append(evaluation("rl", 0.2 + i / 50, 0.6, seconds=60.0 + i, **at))
        records.append({"phase": "filter", "filter/num_experts": 1234 + i} | at)
        records.append({"phase": "rft", "rft/loss": 0.5} | at)
        records.append(evaluation("rft", avg - 0.01 * (1 - i), 0.7, seconds=125.4 + i, **at))
    records = records if complete else records[:20]
    return write_run(folder, "rloop", records, seed=seed, lr=lr, **sections)


def plain_run(folder, *, seed=0, avg=0.2, lr=1e-4, **sections):
    records = [evaluation("base", 0.1, 0.5), *(rl_step(n, n / 50) for n in range(1, 25))]
    records.append(evaluation("rl", 0.25, 0.55, rl_steps=12))
    records.append(evaluation("rl", avg, 0.4, rl_steps=24, seconds=61.0))
    return write_run(folder, "rl", records, seed=seed, lr=lr, **sections)


def run_report(capsys, *arguments):
    """Exit code, screen and errors of the command."""
    code = report.main([str(a) for a in arguments])
    screen = capsys.readouterr()
    return code, screen.out, screen.err


def tables(*folders):
    """The text that the command prints, without drawing."""
    groups = report.load_groups(folders)
    lines = [line for runs in groups.values() for run in runs for line in report.run_section(run)]
    return "\n".join([*lines, *report.summary_section(groups, K=4)])


def rows_of(text, name):
    """Cells of the table lines whose first cell is name."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row[1:]] for row in rows if row[0].strip() == name]


def test_table_of_one_run_by_hand(tmp_path, capsys):
    """Would show another checkpoint's numbers, interval, trajectories, experts or wall time in a
    line of the table."""
    code, text, _ = run_report(capsys, rloop_run(tmp_path / "a"))
    assert code == 0
    for name, row in (
        ("base", "0.100 [0.050, 0.150] 0.500 [0.450, 0.550] 0 0 0:03"),
        ("RFT 1", "0.290 [0.240, 0.340] 0.700 [0.650, 0.750] 12 192 1234 2:05"),
        ("RL phase 2", "0.220 [0.170, 0.270] 0.600 [0.550, 0.650] 24 384 1:01"),
        ("RFT 2", "0.300 [0.250, 0.350] 0.700 [0.650, 0.750] 24 384 1235 2:06"),
    ):
        assert [" ".join(cells).split() for cells in rows_of(text, name)] == [row.split()]
    assert "unfinished" not in text and "Summary" not in text
    assert (tmp_path / "a" / "report.md").read_text().count("| RFT 2") == 1


def test_gap_and_forgetting_by_hand(tmp_path):
    """Would average the reward over another window or phase, or pair it with a policy that did not
    earn it."""
    text = tables(rloop_run(tmp_path / "a"))  # steps 3..12 of phase 2: 0.13 .. 0.22, mean 0.175
    assert "Over-fitting gap at RL step 24: training reward 0.175 (mean of the last 10" in text
    assert "- held-out avg 0.220 = -0.045" in text
    text = tables(plain_run(tmp_path / "b"))  # steps 15..24: 0.30 .. 0.48, mean 0.39
    assert "training reward 0.390 (mean of the last 10 steps) - held-out avg 0.200 = 0.190" in text
    assert "Forgetting: 0.240 of the held-out problems were solved at an earlier" in text
    assert "all evaluations together solve 0.800" in text


def test_gap_of_a_short_and_unfinished_phase(tmp_path):
    """Would count rewards of the phase before, or of steps after the policy that was evaluated."""
    records = [rl_step(n, 0.9) for n in range(1, 13)]
    records += [rl_step(n, 0.2, iteration=1) for n in (13, 14)]
    records += [evaluation("rl", 0.1, 0.5, iteration=1, rl_steps=14), rl_step(15, 0.8, iteration=1)]
    text = tables(write_run(tmp_path / "a", "rloop", records))
    assert "gap at RL step 14: training reward 0.200 (mean of the last 2 steps) - held" in text
    assert "avg 0.100 = 0.100" in text


def test_summary_by_hand(tmp_path):
    """Would use the population std, another baseline or another checkpoint: 0.3, 0.32, 0.4 have
    mean 0.34 and sample std sqrt(0.0028)."""
    runs = [rloop_run(tmp_path / f"a{s}", seed=s, avg=a) for s, a in enumerate((0.3, 0.32, 0.4))]
    runs += [plain_run(tmp_path / f"b{s}", seed=s) for s in range(3)]
    text = tables(*runs)
    counts = ["3", "24", "384"]
    summary = [*counts, "0.340 ± 0.053", "+70.0%", "0.700 ± 0.000", "+75.0%"]
    assert rows_of(text, "RLoop") == [summary]
    summary = [*counts, "0.220 ± 0.000", "+10.0%", "0.600 ± 0.000", "+50.0%"]
    assert rows_of(text, "RLoop, last RL phase") == [summary]
    assert [*counts, "0.200 ± 0.000", "", "0.400 ± 0.000", ""] in rows_of(text, "plain RL")


def test_groups_follow_the_settings(tmp_path):
    """Would average runs of different learning rates as if they were seeds, call lr 0 RLoop, or
    compare with the worse plain RL."""
    runs = [plain_run(tmp_path / "b", lr=1e-4), plain_run(tmp_path / "c", lr=3e-5, avg=0.24)]
    runs += [rloop_run(tmp_path / "a"), rloop_run(tmp_path / "d", lr=0.0, avg=0.27)]
    text = tables(*runs)
    assert rows_of(text, "RLoop") == [["1", "24", "384", "0.300", "+25.0%", "0.700", "+75.0%"]]
    assert rows_of(text, "pure RFT") == [["1", "24", "384", "0.270", "+12.5%", "0.700", "+75.0%"]]
    row = ["1", "24", "384", "0.200", "-16.7%", "0.400", "+0.0%"]
    assert row in rows_of(text, "plain RL (rl.lr 0.0001)")
    assert "means to plain RL (rl.lr 3e-05), the best of 2 settings by avg@4" in text


def test_group_label_names_any_setting(tmp_path):
    """Would mix seeds of runs that differ in something else than the learning rate, or split them
    by what changes no result."""
    for name, seed, threads, tau in (("a", 0, 1, 0.5), ("b", 1, 2, 0.5), ("c", 0, 1, 0.9)):
        options = {"compute": {"threads": threads}, "select": {"max_success_rate": tau}}
        rloop_run(tmp_path / name, seed=seed, **options)
    groups = report.load_groups([tmp_path / name for name in "abc"])
    assert {label: len(runs) for label, runs in groups.items()} == {
        "RLoop (select.max_success_rate 0.5)": 2,
        "RLoop (select.max_success_rate 0.9)": 1,
    }


def test_tables_fit_the_screen(tmp_path):
    """Would break lines of a terminal of 120 columns, or columns that do not stand under each
    other."""
    runs = [
        plain_run(tmp_path / f"{lr}{seed}", lr=lr, seed=seed, avg=0.2 + seed / 50)
        for lr in (1.5e-4, 3e-5)
        for seed in (0, 1)
    ]
    block: list[str] = []
    for line in [*tables(*runs, rloop_run(tmp_path / "a")).splitlines(), ""]:
        assert len(line) <= 120
        block = [*block, line] if line.startswith("|") else []
        assert len({len(row) for row in block}) <= 1


def test_runs_that_cannot_be_compared_are_refused(tmp_path, capsys):
    """Would put avg@4 and avg@8, or two held-out sets, into one column, or count one seed twice."""
    a = rloop_run(tmp_path / "a")
    b = write_run(tmp_path / "b", "rl", [], eval={"num_samples": 8})
    code, _, err = run_report(capsys, a, b)
    assert code == 2 and f"eval.num_samples: 4 in {a}, 8 in {b}" in err
    c = write_run(tmp_path / "c", "rl", [], data={"eval": "countdown:search"})
    assert "data.eval: None" in run_report(capsys, a, c)[2]
    assert "expected each seed once" in run_report(capsys, a, rloop_run(tmp_path / "d"))[2]


def test_one_base_only_where_it_is_the_same(tmp_path):
    """Would average the base evaluations of two models into one line."""
    runs = [
        plain_run(tmp_path / f"{n}{seed}", seed=seed, model={"path": n})
        for n in "ab"
        for seed in (0, 1)
    ]
    assert ["2", "0", "0", "0.100 ± 0.000", "-50.0%", "0.500 ± 0.000", "+25.0%"] in rows_of(
        tables(*runs[:2]), "base"
    )
    assert not [row for row in rows_of(tables(*runs), "base") if len(row) == 7]


def test_unfinished_run_is_shown_and_not_averaged(tmp_path, capsys):
    """Would crash on a run without its last evaluations, average a half-trained seed with finished
    ones, or compare with an unfinished baseline."""
    half = rloop_run(tmp_path / "half", seed=1, complete=False)
    code, text, _ = run_report(capsys, half)
    assert code == 0 and "## RLoop, unfinished, seed 1" in text and rows_of(text, "RFT 1")
    assert not rows_of(text, "RL phase 2") and (half / report.PLOT).exists()
    text = tables(rloop_run(tmp_path / "a"), half, plain_run(tmp_path / "b"))
    assert rows_of(text, "RLoop")[0][:4] == ["1", "24", "384", "0.300"]
    assert rows_of(text, "RLoop, unfinished")[0][:4] == ["1", "12", "192", "0.290"]
    records = [
        evaluation("base", 0.1, 0.5),
        rl_step(1, 0.1),
        evaluation("rl", 0.2, 0.5, rl_steps=1),
    ]
    assert "vs RL" not in tables(half, write_run(tmp_path / "mid", "rl", records))
    empty = [write_run(tmp_path / f"empty{s}", "rl", [], seed=s) for s in (0, 1)]
    code, text, _ = run_report(capsys, *empty)
    assert code == 0 and text.count("No evaluation yet") == 3


def test_half_written_last_line_is_told_and_left_out(tmp_path, capsys):
    """Would crash on, or silently drop, the line during which a run was killed (cut inside a
    character too)."""
    run = rloop_run(tmp_path / "a")
    with (run / "metrics.jsonl").open("ab") as stream:
        stream.write('{"phase": "eval", "policy": "ü'.encode()[:-1])
    code, text, _ = run_report(capsys, run)
    assert code == 0 and text.count("metrics.jsonl:34: the last line is half written") == 1
    assert rows_of(text, "RFT 2")


@pytest.mark.parametrize(
    "line, told",
    [
        ('{"phase": "rl", "iter', "not a record"),
        ("[1, 2]", "not a record"),
        ('{"iteration": 0, "rl_steps": 1}', "not a record"),
    ],
)
def test_broken_middle_line_names_file_and_line(tmp_path, capsys, line, told):
    """Would skip a damaged record and report on the rest, or end in a traceback that does not say
    where."""
    run = rloop_run(tmp_path / "a")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[4] = line
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    code, _, err = run_report(capsys, run)
    assert code == 2 and f"{run / 'metrics.jsonl'}:5: " in err and told in err


def test_directory_that_is_no_run_is_one_line_and_exit_code_2(tmp_path):
    """Would end in a traceback, or in success, for a directory that is not a run."""
    (tmp_path / "not_a_run").mkdir()
    no_metrics = write_run(tmp_path / "no_metrics", "rl", [])
    (no_metrics / "metrics.jsonl").unlink()
    other = write_run(tmp_path / "other", "rl", [])
    (other / "config.json").write_text('{"method": "rl", "seed": 0}')
    for name, told in (
        ("nowhere", ": has no config.json"),
        ("not_a_run", ": has no config.json"),
        ("no_metrics", ": has no metrics.jsonl"),
        ("other", "/config.json: not a run's config: KeyError('eval.num_samples')"),
    ):
        command = [sys.executable, REPORT, tmp_path / name]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith(f"error: {tmp_path / name}{told}")
        assert done.stderr.count("\n") == 1


def test_picture_is_written_and_shows_something(tmp_path, capsys):
    """Would leave an empty picture or panel, fail on steps without an update, or not say where the
    report is."""
    import matplotlib.image

    runs = [rloop_run(tmp_path / f"a{s}", seed=s) for s in (0, 1)] + [plain_run(tmp_path / "b")]
    out = tmp_path / "new" / "out"
    _, text, _ = run_report(capsys, *runs, "--out", out)
    assert sorted(file.name for file in out.iterdir()) == [report.PLOT, "report.md"]
    assert text.splitlines()[-1] == str(out / "report.md")
    assert f"![learning curves]({report.PLOT})" in (out / "report.md").read_text()
    image = matplotlib.image.imread(out / report.PLOT)[:, :, :3]
    height, width, _ = image.shape
    for name, rgb in (("RLoop", (31, 119, 180)), ("plain RL", (255, 127, 14))):
        close = (abs(image * 255 - rgb).max(axis=2) < 4)[height // 20 :]  # without the legend
        for i in range(6):  # panels: two rows of three
            rows = slice(i // 3 * height // 2, (i // 3 + 1) * height // 2)
            columns = slice(i % 3 * width // 3, (i % 3 + 1) * width // 3)
            assert close[rows, columns].any(axis=0).sum() > 100, (name, i)


def test_tables_without_matplotlib(tmp_path, capsys, monkeypatch):
    """Would lose the table at the end of a run, or end it with an error, for want of a picture."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = rloop_run(tmp_path / "a")
    code, text, _ = run_report(capsys, run)
    assert code == 0 and rows_of(text, "RFT 2") and not (run / report.PLOT).exists()
    assert text.count("pip install matplotlib") == 1 and (run / "report.md").exists()


def test_full_disk_is_one_line(tmp_path, capsys):
    """Would end a finished run with a traceback when the report cannot be written."""
    (tmp_path / "file").touch()
    code, text, err = run_report(capsys, rloop_run(tmp_path / "a"), "--out", tmp_path / "file")
    assert code == 2 and rows_of(text, "RFT 2")
    assert err.startswith("error: ") and err.count("\n") == 1 and str(tmp_path / "file") in err


@pytest.mark.parametrize("method", ["eval", "sft"])
def test_runs_without_rl_have_no_picture(tmp_path, capsys, method):
    """Would crash on a method that has no RL steps, or draw empty panels."""
    records = [evaluation("base", 0.1, 0.5)]
    records += [evaluation("rft", 0.2, 0.6)] if method == "sft" else []
    run = write_run(tmp_path / "a", method, records)
    code, text, _ = run_report(capsys, run)
    assert code == 0 and rows_of(text, "base") and not (run / report.PLOT).exists()
    assert bool(rows_of(text, "SFT")) == (method == "sft")


def test_curves_by_hand(tmp_path):
    """Would shift a curve, cut its ends, smooth over two phases, let a step without an update pull
    the mean down, or average runs at different steps."""
    from matplotlib.figure import Figure

    curve = report.smooth({10: 1.0, 11: 2.0, 12: 4.0, 13: 8.0, 14: 3.0}, 3)
    assert curve == pytest.approx({10: 1.5, 11: 7 / 3, 12: 14 / 3, 13: 5.0, 14: 5.5})
    runs = []
    for seed, missing in enumerate((2, 4)):
        steps = [rl_step(n, 0.1, updated=n != missing, iteration=n // 4) for n in range(1, 7)]
        steps += [rl_step(7, 0.1, iteration=1)] if seed else []
        runs.append(report.load_run(write_run(tmp_path / f"{seed}", "rloop", steps, seed=seed)))
    ax = Figure().subplots()
    report.draw_steps(ax, runs, "rl/grad_norm", "C0", window=3)
    lines = [[*zip(*line.get_data(), strict=True)] for line in ax.lines]
    # phase 1: steps 1, 3 of seed 0 are 2, 4, smoothed 3, 3; steps 1-3 of seed 1 are 2.5, 3, 3.5
    # phase 2: steps 4-6 of seed 0 are 3.25, 3.5, 3.75; steps 5-7 of seed 1 are 3.75, 4, 4.25
    assert lines == [[(1, 2.75), (3, 3.25)], [(5, 3.625), (6, 3.875)]]


def test_report_reads_files_only():
    """Would make the report need torch, or tie it to the code of the run that it describes."""
    tree = ast.parse(REPORT.read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in imports}
    ours = {file.stem for file in REPORT.parent.glob("*.py")} | {"data", "answers", "scale"}
    assert {name.split(".")[0] for name in names} & (ours | {"torch"}) == {"config"}
