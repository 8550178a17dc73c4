"""Countdown: make a target from numbers with + - *, each number used exactly once (verify.py accepts / too).

A response is a derivation, one step for each operator: "3 + 5 = 8, 8 * 2 = 16". Games are drawn by seed from four splits that
share no numbers (hence no pair of numbers and target): train, heldout, search (held-out set for choosing settings) and demonstrations.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

MAX_VALUE = 99  # of targets and intermediate results: every number up to it is one token
OPERATORS = ("+", "-", "*")
BUCKETS = {
    "heldout": (0, 1),
    "search": (2, 3),
    "train": (4, 5, 6),
    "demonstrations": (7, 8, 9),
}  # tenths of all sets of numbers
MAX_MISSES = (
    5_000  # random derivations in a row without a new game, after which a split counts as exhausted
)

# What makes the embedded base policy like an LLM before RL. It first learns the skills, then a habit on top of them: (ours)
# share of demonstrations whose target is another game's, share of derivations that combine the first two numbers first
STAGES = {"skills": (0.3, 0.0), "habit": (1.0, 0.9)}

Game = tuple[tuple[int, ...], int]  # numbers, target


def question(numbers: tuple[int, ...], target: int) -> str:
    return f"make {target} from {' '.join(map(str, numbers))}:"


def split_of(numbers: tuple[int, ...]) -> str:
    """The split a set of numbers belongs to, whatever their order: a hash, so that it is the same for every seed and size."""
    digest = hashlib.sha256(",".join(map(str, sorted(numbers))).encode()).digest()
    bucket = int.from_bytes(digest[:8], "big") % 10
    return next(split for split, buckets in BUCKETS.items() if bucket in buckets)


def random_derivation(
    numbers: tuple[int, ...], rng: np.random.Generator, in_order: bool = False
) -> tuple[str, int] | None:
    """Combine two random numbers of the board (in_order: its first two) until one is left; returns (steps, value), or None when a result
    leaves 0..MAX_VALUE."""
    board, steps = list(numbers), []
    while len(board) > 1:
        pair = [board.pop(0 if in_order else int(rng.integers(len(board)))) for _ in range(2)]
        a, b = pair if rng.random() < 0.5 else pair[::-1]
        operator = OPERATORS[rng.integers(len(OPERATORS))]
        value = {"+": a + b, "-": a - b, "*": a * b}[operator]
        if not 0 <= value <= MAX_VALUE:
            return None
        steps.append(f"{a} {operator} {b} = {value}")
        board.insert(0, value)
    return ", ".join(steps), board[0]


def _derivations(
    split: str, seed: int, num_numbers: int, max_number: int, in_order_share: float = 0.0
) -> Iterator[tuple]:
    """Endless random (numbers, target, steps) of a split."""
    rng = np.random.default_rng((seed, *split.encode()))
    while True:
        numbers = tuple(int(n) for n in rng.integers(1, max_number + 1, size=num_numbers))
        if split_of(numbers) != split:
            continue
        derivation = random_derivation(numbers, rng, in_order=rng.random() < in_order_share)
        if derivation is not None and derivation[1] > 0:
            yield numbers, derivation[1], derivation[0]


def generate_games(
    split: str, *, size: int, seed: int, num_numbers: int, max_number: int
) -> list[Game]:
    """size different solvable games of a split, drawn by seed. Games that plain addition solves are left out: they need no search.

    Raises ValueError when the split holds too few.
    """
    if split not in BUCKETS:
        raise ValueError(
            f"data source 'countdown:{split}': unknown split; expected one of {', '.join(BUCKETS)}"
        )
    if size < 1:
        raise ValueError(
            f"data source 'countdown:{split}': its problems are generated, so their number must be given (got {size})"
        )
    if not (2 <= num_numbers <= 8 and 1 <= max_number <= MAX_VALUE):
        raise ValueError(
            f"countdown: {num_numbers} numbers up to {max_number}: expected 2..8 numbers up to at most {MAX_VALUE}"
        )
    games: dict[tuple, Game] = {}
    misses = 0
    for numbers, target, _ in _derivations(split, seed, num_numbers, max_number):
        key = (tuple(sorted(numbers)), target)
        if sum(numbers) == target or key in games:
            misses += 1
            if misses > MAX_MISSES:
                found = f"only {len(games)} games of {num_numbers} numbers up to {max_number} found"
                raise ValueError(f"countdown:{split}: {found}, {size} wanted")
            continue
        games[key] = (numbers, target)
        misses = 0
        if len(games) == size:
            return list(games.values())


def generate_demonstrations(
    stage: str, *, size: int, seed: int, num_numbers: int, max_number: int
) -> list[tuple[tuple[int, ...], int, str]]:
    """size (numbers, target, steps) of a stage of STAGES. The arithmetic is right; a share of the targets is swapped among the games."""
    if stage not in STAGES:
        raise ValueError(
            f"demonstrations 'countdown:{stage}': expected countdown:{' or countdown:'.join(STAGES)}"
        )
    wrong_target_share, in_order_share = STAGES[stage]
    source = _derivations("demonstrations", seed, num_numbers, max_number, in_order_share)
    demos = [next(source) for _ in range(size)]
    rng = np.random.default_rng((seed, 1))
    wrong = np.flatnonzero(rng.random(size) < wrong_target_share)
    targets = [target for _, target, _ in demos]
    for i, j in zip(wrong, rng.permutation(wrong), strict=True):
        targets[i] = demos[j][1]
    return [
        (numbers, target, steps) for (numbers, _, steps), target in zip(demos, targets, strict=True)
    ]


def build_tokenizer() -> Tokenizer:
    """One token for each number 0..MAX_VALUE, sign and word of the game."""
    words = [
        "<eos>",
        "make",
        "from",
        ":",
        ",",
        "=",
        "+",
        "-",
        "*",
        "/",
        "(",
        ")",
        *map(str, range(MAX_VALUE + 1)),
    ]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    return tokenizer
