"""Is a response's answer right? Text is only parsed by code of this package, never executed.

extract.py finds the answer in a response, latex.py (with units.py) makes a tree of it, equality.py
(with evaluation.py) compares two trees, symbolic.py asks sympy, in a process of workers.py.
"""
