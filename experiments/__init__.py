"""The evidence: one command for each experiment, `python -m experiments.NAME`.

A command runs what is missing, two runs side by side, and can be stopped and continued. It leaves
results/NAME.json (every evaluation of every run), prints its tables, and draws results/NAME.png.
With the committed results it only prints and draws. --jobs N: N runs side by side. language is the
one that needs a GPU.

Countdown with four numbers (countdown.toml), and a base policy that solves 1% of the games (22% to
26% in 32 tries). These two commands build one, equal to base_policy/ up to rounding:

    python rloop.py --config configs/countdown_skills.toml --sampling.max_new_tokens 24 \\
        --data.train "countdown:skills?numbers=4" --data.eval "countdown:search?numbers=4"
    python rloop.py --config configs/countdown_base.toml --sampling.max_new_tokens 24 \\
        --data.train "countdown:narrow?numbers=4" --data.eval "countdown:search?numbers=4"
"""
