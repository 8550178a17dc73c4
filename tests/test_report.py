"""report.py: its numbers against ones computed by hand, its groups, its picture, its page."""

import ast
import functools
import html.parser
import json
import math
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import tokenizers

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
    runs = [run for same in groups.values() for run in same]
    return report.render("report.md", runs=runs, K=4, **report.summary(groups))


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
        ("base", "0.100 [0.050, 0.150] 0.500 [0.450, 0.550] 0.000 0 0 0:03"),
        ("RFT 1", "0.290 [0.240, 0.340] 0.700 [0.650, 0.750] 0.120 12 192 1234 2:05"),
        ("RL phase 2", "0.175 0.220 [0.170, 0.270] 0.600 [0.550, 0.650] 0.240 24 384 1:01"),
        ("RFT 2", "0.300 [0.250, 0.350] 0.700 [0.650, 0.750] 0.240 24 384 1235 2:06"),
    ):
        assert [" ".join(cells).split() for cells in rows_of(text, name)] == [row.split()]
    assert "unfinished" not in text and "Summary" not in text
    assert (tmp_path / "a" / "report.md").read_text().count("| RFT 2") == 1


def test_training_reward_by_hand(tmp_path):
    """Would average the reward over another window or phase, or pair it with a policy that did not
    earn it."""
    text = tables(rloop_run(tmp_path / "a"))  # steps 3..12: 0.03 .. 0.12, then 0.13 .. 0.22
    assert [rows_of(text, f"RL phase {n}")[0][0] for n in (1, 2)] == ["0.075", "0.175"]
    assert [rows_of(text, name)[0][0] for name in ("base", "RFT 1", "RFT 2")] == ["", "", ""]
    text = tables(plain_run(tmp_path / "b"))  # steps 15..24: 0.30 .. 0.48, mean 0.39
    assert rows_of(text, "plain RL")[0][0] == "0.390"


def test_training_reward_of_a_short_and_unfinished_phase(tmp_path):
    """Would count rewards of the phase before, or of steps after the policy that was evaluated."""
    records = [rl_step(n, 0.9) for n in range(1, 13)]
    records += [rl_step(n, 0.2, iteration=1) for n in (13, 14)]
    records += [evaluation("rl", 0.1, 0.5, iteration=1, rl_steps=14), rl_step(15, 0.8, iteration=1)]
    text = tables(write_run(tmp_path / "a", "rloop", records))
    assert rows_of(text, "RL phase 2")[0][:2] == ["0.200", "0.100 [0.050, 0.150]"]


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
    text = tables(half, write_run(tmp_path / "mid", "rl", records))
    assert "vs RL:" not in text and rows_of(text, "RLoop, unfinished")[0][4::2] == ["", ""]
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
        ("nowhere", "/config.json: not the config of a run"),
        ("not_a_run", "/config.json: not the config of a run"),
        ("no_metrics", "/metrics.jsonl"),
        ("other", "/config.json: not the config of a run"),
    ):
        command = [sys.executable, REPORT, tmp_path / name]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: ") and f"{tmp_path / name}{told}" in done.stderr
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


# ---- the page


G = 4
HOSTILE = "</script><script>x()</script> \"'><img src=x onerror=x()> </pre> {{ 7 }} "
HOSTILE += "\x00\u202e\x1b[0m π\n"


@functools.cache
def byte_tokenizer() -> tokenizers.Tokenizer:
    """One token a byte: ids 0..255 are not the bytes themselves, but encode and decode agree."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def trajectory(step, n, g, *, iteration=0, response="6 * 7", **changes):
    """Sample g of problem n of a step. Every token has probability 0.5."""
    ids = byte_tokenizer().encode(response).ids
    record = {"problem": f"p{n}", "iteration": iteration, "step": step}
    record |= {"prompt_ids": byte_tokenizer().encode(f"Question {n}").ids, "ids": ids}
    record |= {"logps": [math.log(0.5)] * len(ids), "finished": g != 3, "response": response}
    return record | {"reason": "correct" if g == 0 else "wrong", "reward": float(g == 0)} | changes


def run_with_trajectories(folder, num_steps, num_problems=3, *, max_new_tokens=50, **changes):
    """Two iterations of so many RL steps."""
    sections = {"sampling": {"max_new_tokens": max_new_tokens}, "model": {"path": "nowhere"}}
    sections["rl"] = {"lr": 1e-4, "steps": num_steps, "samples_per_problem": G}
    at = [divmod(n, num_steps) for n in range(2 * num_steps)]
    records = [rl_step(n, 0.1, iteration=i) | {"step": s + 1} for n, (i, s) in enumerate(at, 1)]
    write_run(folder, "rloop", records, **sections)
    for name in ("trajectories", "policies/rl_1"):
        (folder / name).mkdir(parents=True)
    byte_tokenizer().save(str(folder / "policies/rl_1/tokenizer.json"))
    for i in (0, 1):
        with (folder / f"trajectories/iteration_{i + 1}.jsonl").open("w") as stream:
            for step in range(1, num_steps + 1):
                for n in range(num_problems):
                    for g in range(G):
                        record = trajectory(step, n, g, iteration=i, **changes)
                        stream.write(json.dumps(record) + "\n")
    return folder


class Page(html.parser.HTMLParser):
    """What a browser makes of the page: h2, h3, figure and script elements with their text, and the
    probability and text of every token of a figure."""

    def __init__(self, folder):
        super().__init__()
        self.found = {"h2": [], "h3": [], "figure": [], "script": [], "title": []}
        self.open, self.tags, self.pieces = [], set(), []
        self.text = (folder / report.PAGE).read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.open += [tag]
        if tag == "figure":
            self.pieces.append([])
        if tag in self.found:
            self.found[tag].append([dict(attrs), ""])
        if tag == "i" and "figure" in self.open:
            self.pieces[-1].append([dict(attrs)["data-p"], ""])

    def handle_endtag(self, tag):
        while self.open.pop() != tag:
            pass

    def handle_data(self, data):
        for tag in set(self.open) & self.found.keys():
            self.found[tag][-1][1] += data
        if "i" in self.open and "figure" in self.open:
            self.pieces[-1][-1][1] += data

    def texts(self, tag):
        return [" ".join(text.split()) for _, text in self.found[tag]]


def page_of(capsys, folder, *arguments):
    code, text, err = run_report(capsys, folder, *arguments)
    assert code == 0, err
    assert str(folder / report.PAGE) in text.splitlines()
    return Page(folder)


def test_page_shows_groups_by_step_and_problem(tmp_path, capsys):
    """Would show other steps than it says, tear a group apart, or hide why an answer has its
    reward, and that it was cut off."""
    page = page_of(capsys, run_with_trajectories(tmp_path / "a", 30))
    steps = [1, 7, 14, 20, 27, 33, 40, 46, 53, 60]  # ten of 60, the first and the last
    assert [int(text.split()[2]) for text in page.texts("h2")] == steps
    assert page.texts("h2")[5] == "RL step 33 iteration 2, mean reward 0.100"
    assert page.texts("h3") == ["p0", "p1", "p2"] * 10
    assert len(page.found["figure"]) == 10 * 3 * G
    group = page.texts("figure")[:G]
    assert group[0] == "1 correct · 5 tokens, finished 6 * 7"
    assert group[1] == group[2] == "0 wrong · 5 tokens, finished 6 * 7"
    assert group[3] == "0 wrong · 5 tokens, cut off 6 * 7"
    attributes = [attrs for attrs, _ in page.found["figure"][:G]]
    assert [a["data-reward"] for a in attributes] == ["right", "wrong", "wrong", "wrong"]
    assert [a["data-end"] for a in attributes] == ["finished"] * 3 + ["cut"]


def test_page_of_chosen_steps(tmp_path, capsys):
    """Would ignore --steps, count them within their iteration, or leave problems out for want of
    space where there is enough."""
    run = run_with_trajectories(tmp_path / "a", 20, num_problems=40, max_new_tokens=80)
    page = page_of(capsys, run, "--steps", 3, 24)
    assert [text.split(",")[0] for text in page.texts("h2")] == [
        "RL step 3 iteration 1",
        "RL step 24 iteration 2",
    ]
    assert page.texts("h3") == [f"p{n}" for n in range(40)] * 2


def test_page_escapes_what_it_shows(tmp_path, capsys):
    """Would let a response, a problem id or a reason break out of its element and run a script."""
    run = run_with_trajectories(tmp_path / "a", 1, 1, response=HOSTILE, problem=HOSTILE)
    lines = [json.loads(line) for line in (run / "trajectories/iteration_1.jsonl").open()]
    prompt = byte_tokenizer().encode(HOSTILE).ids
    changed = [line | {"reason": HOSTILE, "prompt_ids": prompt} for line in lines]
    text = "".join(json.dumps(line) + "\n" for line in changed)
    (run / "trajectories/iteration_1.jsonl").write_text(text)
    page = page_of(capsys, run)
    for tokenizer in (True, False):
        assert page.tags.isdisjoint({"img", "link", "iframe"}) and len(page.found["script"]) == 1
        assert "x()" not in page.texts("script")[0]
        assert HOSTILE.replace("\x00", "") in page.found["figure"][0][1].replace("\x00", "")
        assert page.texts("h3")[0].startswith("</script><script>x()</script> \"'><img")
        assert "http" not in page.text.replace("http-equiv", "")
        (run / "policies/rl_1/tokenizer.json").unlink(missing_ok=True)
        page = page_of(capsys, run) if tokenizer else None


def test_page_colours_tokens_by_probability(tmp_path, capsys):
    """Would give a token the colour of its neighbour, show half a character, or change the text.
    π has two bytes, so its probability is 0.25 of two tokens of 0.5."""
    run = run_with_trajectories(tmp_path / "a", 1, 1, response="aπ b")
    page = page_of(capsys, run)
    assert page.pieces[0] == [["50", "a"], ["25", "π"], ["50", " "], ["50", "b"]]
    file = run / "trajectories/iteration_1.jsonl"
    whole = file.read_text()
    broken = byte_tokenizer().encode("π").ids[:1] * 6  # half letters, as a bad policy writes them
    line = json.dumps(trajectory(1, 0, 0, ids=broken, logps=[math.log(0.5)] * 6))
    file.write_text(f"{line}\n")
    page = page_of(capsys, run)
    assert page.pieces[0] == [["06", "\ufffd" * 4], ["25", "\ufffd" * 2]]
    file.write_text(whole)
    (run / "policies/rl_1/tokenizer.json").unlink()
    page = page_of(capsys, run)
    assert page.pieces[0] == [] and page.texts("figure")[0].endswith("finished aπ b")
    assert "tokenizer was not found" in page.text


def test_page_stays_small_and_reads_line_by_line(tmp_path, capsys):
    """Would hold the trajectories of a run in memory, or grow with the run."""
    changes = {"response": "<&> " * 1500, "prompt_ids": [3] * 5000}
    folder = run_with_trajectories(tmp_path / "a", 10, 4, max_new_tokens=100, **changes)
    size = sum(file.stat().st_size for file in folder.glob("trajectories/*"))
    run = report.load_run(folder)
    tracemalloc.start()
    report.write_page(run, [], folder / report.PAGE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    page = Page(folder)
    assert size > 50e6 and peak < size / 3 and len(page.text) < 3e6
    assert len(page.found["figure"]) == 10 * 4 * G
    assert page.texts("figure")[0].endswith("without colours: … <&> " + "<&> " * 373 + "<&>")


def test_page_of_a_killed_run(tmp_path, capsys):
    """Would fail on the half line of a killed run, or show what is no trajectory."""
    run = run_with_trajectories(tmp_path / "a", 1, 1)
    file = run / "trajectories/iteration_2.jsonl"
    whole = file.read_text()
    file.write_text(whole + whole[:100])
    assert len(page_of(capsys, run).found["figure"]) == 2 * G
    file.write_text(whole.replace('"logps"', '"lops"', 1))
    code, _, err = run_report(capsys, run)
    assert code == 2 and err.startswith(f"error: {file}:1: not a trajectory: KeyError('logps')")
    file.unlink()
    assert len(page_of(capsys, run).found["figure"]) == G


def test_page_is_of_the_first_run(tmp_path, capsys):
    """Would show the trajectories of another run than the one given first."""
    runs = [run_with_trajectories(tmp_path / "b", 1), run_with_trajectories(tmp_path / "a", 2)]
    for first, second in (runs, runs[::-1]):
        code, _, err = run_report(capsys, first, second, "--out", tmp_path / "out")
        assert code == 0, err
        assert Page(tmp_path / "out").texts("title") == [f"Trajectories of {first}"]


def test_report_reads_files_only():
    """Would make the report need torch, or tie it to the code of the run that it describes."""
    tree = ast.parse(REPORT.read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in imports}
    ours = {file.stem for file in REPORT.parent.glob("*.py")} | {"data", "answers", "scale"}
    assert {name.split(".")[0] for name in names} & (ours | {"torch"}) == {"config"}
