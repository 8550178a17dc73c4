"""config.py: every mistake in a config is an error that names the place; every key is read by somebody."""

import dataclasses
import json
import re
import tomllib

import pytest
from conftest import ROOT

import config
from config import config_dict, differing_keys, load_config


def test_overrides_are_typed(countdown_toml):
    """Fault: an override stays a string, or changes something else."""
    cfg = load_config(
        countdown_toml,
        [
            "--rl.lr",
            "1e-6",
            "--method",
            "rl",
            "--seed",
            "7",
            "--rl.normalize_std",
            "false",
            "--run_dir",
            "123",
        ],
    )
    assert (cfg.rl.lr, cfg.method, cfg.seed, cfg.rl.normalize_std, cfg.run_dir) == (
        1e-6,
        "rl",
        7,
        False,
        "123",
    )
    changed = differing_keys(config_dict(load_config(countdown_toml)), config_dict(cfg))
    assert changed == ["method", "seed", "run_dir", "rl.lr", "rl.normalize_std"]


def test_integer_for_a_float_is_fine(countdown_toml):
    """Fault: `--rl.lr 0` is refused for not being a float."""
    assert load_config(countdown_toml, ["--rl.lr", "0"]).rl.lr == 0.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--rl.lrr", "1"], "nearest known one is 'rl.lr'"),
        (["--rl.clip_hihg", "1"], "'rl.clip_high'"),
        (["--sed", "1"], "'seed'"),
        (["--rl", "1"], "unknown key 'rl'"),
        (["--seed", "1.5"], "seed = 1.5: expected int"),
        (["--seed", "true"], "expected int"),
        (["--rl.normalize_std", "1"], "expected bool"),
        (["--rl.lr", "fast"], "rl.lr = 'fast': expected a finite float"),
        (["--rl.lr", "nan"], "rl.lr = nan: expected a finite float"),
        (["--rl.lr"], "no partner"),
        (["rl.lr", "1"], "expected --section.key"),
        (["--method", "ppo"], "'rloop', 'rl', 'eval', 'sft'"),
        (["--rl.aggregation", "tokens"], "rl.aggregation"),
        (["--rl.clip_low", "1"], "below 1"),
        (["--rl.minibatches", "33"], "rl.problems_per_step"),
        (["--rl.overlong_buffer", "16"], "sampling.max_new_tokens"),
        (["--select.max_success_rate", "0"], "select.max_success_rate"),
        (["--sampling.temperature", "0"], "sampling.temperature"),
        (["--seed", "-1"], "seed = -1"),
        (["--data.prompt", "hello"], "{problem}"),
        (
            ["--compute.dtype", "float16"],
            "compute.dtype = 'float16': expected one of 'float32', 'bfloat16'",
        ),
        (["--rl.importance_cap", "2"], "needs rl.recompute_logprobs = true"),
    ],
)
def test_bad_override_names_the_key(countdown_toml, overrides, message):
    """Fault: a typo or a wrong value is ignored, or the error does not say where."""
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(countdown_toml, overrides)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (("lr = 1e-4", "lrate = 1e-4"), "unknown key 'rl.lrate'"),
        (("clip_low = 0.2\n", ""), "rl.clip_low is missing"),
        (("[rl]", "[rl"), "not valid TOML"),
        (("threads = ", "threads = 'two' #"), "compute.threads = 'two': expected int"),
    ],
)
def test_bad_file_names_file_and_key(countdown_toml, tmp_path, edit, message):
    """Fault: a broken config file gives a traceback or a silent default."""
    text = countdown_toml.read_text()
    assert edit[0] in text
    (tmp_path / "bad.toml").write_text(text.replace(*edit, 1))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_config(tmp_path / "bad.toml")
    assert "bad.toml" in str(error.value)


def test_every_method_and_seed_has_its_run_directory(countdown_toml):
    """Fault: the baseline, or another seed, started as the README says, lands in the directory of the first run and is refused."""
    overrides = ([], ["--method", "rl"], ["--seed", "1"], ["--run_dir", "runs/mine"])
    assert [load_config(countdown_toml, o).run_dir for o in overrides] == [
        "runs/countdown-rloop-0",
        "runs/countdown-rl-0",
        "runs/countdown-rloop-1",
        "runs/mine",
    ]


def test_equals_sign_form(countdown_toml):
    """Fault: --key=value, which most programs take, is refused."""
    cfg = load_config(
        countdown_toml, ["--rl.lr=1e-6", "--seed", "3", '--data.prompt="{problem} = "']
    )
    assert (cfg.rl.lr, cfg.seed, cfg.data.prompt) == (1e-6, 3, "{problem} = ")


def test_missing_file(tmp_path):
    """Fault: a traceback for a mistyped path."""
    with pytest.raises(ValueError, match="not found"):
        load_config(tmp_path / "no.toml")


@pytest.mark.parametrize("path", sorted(p.name for p in (ROOT / "configs").glob("*.toml")))
def test_every_config_file_loads(path):
    """Fault: a committed config that no longer fits the code."""
    cfg = load_config(ROOT / "configs" / path)
    assert config_dict(cfg) == json.loads(json.dumps(config_dict(cfg)))
    with (ROOT / "configs" / path).open("rb") as file:
        assert set(differing_keys(tomllib.load(file), config_dict(cfg))) <= {
            "run_dir"
        }  # its placeholders are filled in


def test_every_field_is_read_somewhere():
    """Fault: a dead option."""
    source = "".join((ROOT / name).read_text() for name in ("rloop.py", "rundir.py", "plan.py"))
    for section in dataclasses.fields(config.Config):
        names = (
            [f.name for f in dataclasses.fields(section.type)]
            if dataclasses.is_dataclass(section.type)
            else [section.name]
        )
        for name in names:
            assert re.search(rf"\.{name}\b", source), f"{section.name}.{name} is read by nobody"
