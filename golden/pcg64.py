"""numpy's SeedSequence and PCG64 in whole numbers: the definition of the stage random."""

from collections.abc import Sequence

M32, M64, M128 = 2**32 - 1, 2**64 - 1, 2**128 - 1


def seed_words(path: Sequence[int], count: int) -> list[int]:
    """SeedSequence(path).generate_state(count, uint64). Each number of the path is one 32-bit word,
    or several, the low one first."""
    words = []
    for number in path:
        words.append(number & M32)
        while number := number >> 32:
            words.append(number & M32)
    constant = 0x43B0D7E5

    def hashed(value: int) -> int:
        nonlocal constant
        value ^= constant
        constant = constant * 0x931E8875 & M32
        value = value * constant & M32
        return value ^ value >> 16

    def mixed(x: int, y: int) -> int:
        value = (0xCA01F9DD * x - 0x4973F715 * y) & M32
        return value ^ value >> 16

    pool = [hashed(words[i] if i < len(words) else 0) for i in range(4)]
    for source in range(4):
        for target in range(4):
            if source != target:
                pool[target] = mixed(pool[target], hashed(pool[source]))
    for word in words[4:]:
        for target in range(4):
            pool[target] = mixed(pool[target], hashed(word))
    constant, output = 0x8B51F9DD, []
    for i in range(2 * count):
        value = pool[i % 4] ^ constant
        constant = constant * 0x58F38DED & M32
        value = value * constant & M32
        output.append(value ^ value >> 16)
    return [output[2 * i] | output[2 * i + 1] << 32 for i in range(count)]


class PCG64:
    """default_rng(path)"""

    def __init__(self, path: Sequence[int]):
        a, b, c, d = seed_words(path, 4)
        self.increment = ((c << 64 | d) << 1 | 1) & M128
        self.state = ((a << 64 | b) + self.increment) & M128
        self.step()
        self.half = None  # the high half of a word whose low half was used

    def step(self) -> None:
        self.state = (self.state * 0x2360ED051FC65DA44385DF649FCCF645 + self.increment) & M128

    def next64(self) -> int:
        self.step()
        value, turn = (self.state >> 64 ^ self.state) & M64, self.state >> 122
        return (value >> turn | value << (64 - turn)) & M64

    def next32(self) -> int:
        if self.half is not None:
            value, self.half = self.half, None
            return value
        word = self.next64()
        self.half = word >> 32
        return word & M32

    def random(self) -> float:
        return (self.next64() >> 11) / 2**53

    def permutation(self, n: int) -> list[int]:
        items = list(range(n))
        for i in range(n - 1, 0, -1):
            mask = 2 ** i.bit_length() - 1
            while (j := self.next32() & mask) > i:
                pass
            items[i], items[j] = items[j], items[i]
        return items
