"""config.py: every mistake in a config is an error that names the key; every key is used."""

import json
import re
import tomllib
from dataclasses import asdict

import pytest
from conftest import ROOT

from config import (
    KEYS,
    Config,
    UserError,
    config_from_command_line,
    differing_keys,
    load_config,
)

CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.toml"))


def test_overrides_are_typed(countdown_toml):
    """Fault: an override stays a string, or changes something else."""
    overrides = "--rl.lr 1e-6 --method rl --seed 7 --rl.normalize_std false --run_dir 123"
    cfg = load_config(countdown_toml, overrides.split())
    assert (cfg.rl.lr, cfg.method, cfg.seed) == (1e-6, "rl", 7)
    assert (cfg.rl.normalize_std, cfg.run_dir) == (False, "123")
    changed = differing_keys(asdict(load_config(countdown_toml)), asdict(cfg))
    assert changed == ["method", "seed", "run_dir", "rl.lr", "rl.normalize_std"]


def test_integer_for_a_float_is_fine(countdown_toml):
    """Fault: `--rl.lr 0` is refused for not being a float, or stays an integer."""
    lr = load_config(countdown_toml, ["--rl.lr", "0"]).rl.lr
    assert lr == 0 and type(lr) is float


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--rl.lrr", "1"], "command line: unknown key 'rl.lrr'; the nearest known one is 'rl.lr'"),
        (["--rl.clip_hihg", "1"], "'rl.clip_high'"),
        (["--sed", "1"], "'seed'"),
        (["--rl", "1"], "unknown key 'rl'"),
        (["--rft.save_every", "1"], "unknown key 'rft.save_every'; the nearest known one is"),
        (["--seed", "1.5"], "command line: seed = 1.5: expected int"),
        (["--seed", "true"], "expected int"),
        (["--rl.normalize_std", "1"], "expected bool"),
        (["--rl.lr", "fast"], "rl.lr = 'fast': expected float"),
        (["--rl.lr", "nan"], "rl.lr = nan: must be at least 0"),
        (["--rl.lr", "-1"], "rl.lr = -1.0: must be at least 0"),
        (["--rl.lr"], "expected --section.key value"),
        (["rl.lr", "1"], "expected --section.key value"),
        (["--method", "ppo"], "must be one of ('rloop', 'rl', 'eval', 'sft')"),
        (["--rl.aggregation", "tokens"], "rl.aggregation"),
        (["--rl.clip_low", "1"], "must be below 1"),
        (["--rl.minibatches", "33"], "rl.minibatches = 33: must be at most rl.problems_per_step"),
        (["--rl.overlong_buffer", "24"], "must be below sampling.max_new_tokens"),
        (["--select.max_success_rate", "0"], "select.max_success_rate = 0.0: must be above 0"),
        (["--eval.top_p", "1.1"], "eval.top_p = 1.1: must be at most 1"),
        (["--sampling.temperature", "0"], "sampling.temperature"),
        (
            ["--eval.temperature", "0"],
            "eval.temperature = 0 is greedy and needs eval.num_samples = 1",
        ),
        (["--eval.temperature", "-1"], "eval.temperature = -1.0: must be at least 0"),
        (["--seed", "-1"], "seed = -1"),
        (["--data.prompt", "hello"], "data.prompt = 'hello': must contain {problem}"),
        (["--compute.dtype", "float16"], "must be one of ('float32', 'bfloat16')"),
        (["--logging", '["tensorbord"]'], "must be among ('tensorboard', 'wandb')"),
        (["--logging", "wandb"], "logging = 'wandb': expected list"),
        (["--rl.importance_cap", "2"], "needs rl.recompute_logprobs = true"),
    ],
)
def test_bad_override_names_the_key(countdown_toml, overrides, message):
    """Fault: a typo or a wrong value is ignored, or the error does not say where."""
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(countdown_toml, overrides)


def test_greedy_evaluation_of_one_sample(countdown_toml):
    """Fault: temperature 0 is refused in evaluation."""
    cfg = load_config(countdown_toml, ["--eval.temperature", "0", "--eval.num_samples", "1"])
    assert cfg.eval.temperature == 0.0


def test_bounds_follow_the_other_key(countdown_toml):
    """Fault: a bound that is another key's value is compared with that key's default."""
    overrides = "--rl.problems_per_step 64 --rl.minibatches 33 --sampling.max_new_tokens 100"
    cfg = load_config(countdown_toml, [*overrides.split(), "--rl.overlong_buffer", "99"])
    assert (cfg.rl.minibatches, cfg.rl.overlong_buffer) == (33, 99)
    with pytest.raises(UserError, match=r"rl.minibatches = 2: must be at most"):
        load_config(countdown_toml, ["--rl.problems_per_step", "1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rl.lrate = 1e-4", "unknown key 'rl.lrate'"),
        ("rl = 1", "unknown key 'rl'"),
        ("[seed]\nx = 1", "unknown key 'seed.x'"),
        ("[rl", "Expected"),
        ("[compute]\nthreads = 'two'", "compute.threads = 'two': expected int"),
    ],
)
def test_bad_file_names_file_and_key(tmp_path, text, message):
    """Fault: a broken config file gives a traceback, or a key of it is silently ignored."""
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_config(tmp_path / "bad.toml")
    assert "bad.toml" in str(error.value)


def test_every_method_and_seed_has_its_run_directory(countdown_toml):
    """Fault: the baseline, or another seed, started as the README says, lands in the directory of
    the first run and is refused."""
    overrides = ([], ["--method", "rl"], ["--seed", "1"], ["--run_dir", "runs/mine"])
    assert [load_config(countdown_toml, o).run_dir for o in overrides] == [
        "runs/countdown-rloop-0",
        "runs/countdown-rl-0",
        "runs/countdown-rloop-1",
        "runs/mine",
    ]


def test_equals_sign_form(countdown_toml):
    """Fault: --key=value, which most programs take, is refused, or a value ends at its own `=`."""
    source = "countdown:train?numbers=4"
    cfg = load_config(
        countdown_toml,
        ["--rl.lr=1e-6", "--seed", "3", '--data.prompt="{problem} = "', f"--data.train={source}"],
    )
    assert (cfg.rl.lr, cfg.seed, cfg.data.prompt) == (1e-6, 3, "{problem} = ")
    assert cfg.data.train == source


def test_missing_file(tmp_path):
    """Fault: a traceback for a mistyped path."""
    with pytest.raises(UserError, match="No such file.*no.toml"):
        load_config(tmp_path / "no.toml")


def test_command_line(countdown_toml):
    """Fault: an override is lost beside --plan, or the plan is made for other GPUs."""
    arguments = ["--config", str(countdown_toml), "--seed", "3"]
    cfg, machine = config_from_command_line(arguments)
    assert cfg.seed == 3 and machine is None
    cfg, machine = config_from_command_line([*arguments, "--plan", "--gpus", "8"])
    assert cfg.seed == 3 and machine == {"gpus": 8}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_file_loads(name):
    """Fault: a committed config no longer fits the code, one of its values is lost, a resolved
    config is not what config.json gives back, or a config repeats defaults, so that nobody sees
    what is special about its run."""
    cfg = asdict(load_config(ROOT / "configs" / name))
    assert cfg == json.loads(json.dumps(cfg))
    with (ROOT / "configs" / name).open("rb") as file:
        stated = tomllib.load(file)
    stated_keys = set(differing_keys(stated, {}))
    assert stated_keys & set(differing_keys(stated, cfg)) <= {"run_dir"}  # its placeholders
    if name != "countdown.toml":
        assert stated_keys == set(differing_keys(asdict(Config()), cfg))


def test_defaults_are_the_laptop_run(countdown_toml):
    """Fault: the README's numbers are of other values than the defaults."""
    differing = differing_keys(asdict(Config()), asdict(load_config(countdown_toml)))
    assert differing == ["run_dir"]


def test_every_field_is_read_somewhere():
    """Fault: a dead option."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("scale/*.py"), *ROOT.glob("data/*.py")]
    source = "".join(file.read_text() for file in files if file.name != "config.py")
    for name in KEYS:
        section, _, leaf = name.rpartition(".")
        as_argument = re.search(rf"\bvars\([\w.]*\.{section}\)", source) and f"{leaf}: " in source
        assert re.search(rf"\.{leaf}\b", source) or as_argument, f"{name} is read by nobody"
