"""The evidence: one command for each experiment, `python -m experiments.NAME`.

A command runs what is missing, two runs side by side, and can be stopped and continued. It leaves
results/NAME.json (every evaluation of every run), prints its tables, and draws results/NAME.png.
With the committed results it only prints and draws. --jobs N: N runs side by side. language is the
one that needs a GPU.
"""
