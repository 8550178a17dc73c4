"""What people write around numbers and instead of them: units, quantities of several units, and number words."""

import re
from fractions import Fraction

Unit = tuple[
    tuple[tuple[str, int], ...], Fraction
]  # powers of base units, sorted by name, and the factor to them

_METRE, _GRAM, _SECOND = (("m", 1),), (("g", 1),), (("s", 1),)
_VOLUME, _SPEED = (("m", 3),), (("m", 1), ("s", -1))
_NEWTON, _JOULE, _WATT = ((("g", 1), ("m", k), ("s", -n)) for k, n in ((1, 2), (2, 2), (2, 3)))

UNITS: dict[str, Unit] = {}
for _powers, _names in {
    _METRE: "m:1 meter:1 metre:1 cm:1/100 centimeter:1/100 centimetre:1/100 mm:1/1000 millimeter:1/1000 millimetre:1/1000 km:1000 "
    "kilometer:1000 kilometre:1000 dm:1/10 nm:1/1000000000 um:1/1000000 in:127/5000 inch:127/5000 ft:381/1250 foot:381/1250 "
    "feet:381/1250 yd:1143/1250 yard:1143/1250 mi:1609344/1000 mile:1609344/1000",
    _GRAM: "g:1 gram:1 kg:1000 kilogram:1000 mg:1/1000 milligram:1/1000 lb:45359237/100000 lbs:45359237/100000 pound:45359237/100000 "
    "oz:45359237/1600000 ounce:45359237/1600000",
    _SECOND: "s:1 sec:1 second:1 ms:1/1000 min:60 minute:60 mins:60 h:3600 hr:3600 hour:3600 day:86400 week:604800",
    (("month", 1),): "month:1 yr:12 year:12",
    _VOLUME: "L:1/1000 liter:1/1000 litre:1/1000 mL:1/1000000 ml:1/1000000 milliliter:1/1000000 millilitre:1/1000000",
    _SPEED: "mph:1397/3125 kph:5/18 kmh:5/18",
    (("gallon", 1),): "gallon:1 gal:1 quart:1/4 qt:1/4 pint:1/8 pt:1/8 cup:1/16",
    (("dollar", 1),): "dollar:1 USD:1 usd:1 buck:1 cent:1/100",
    (("deg", 1),): "deg:1 degree:1",
    (("degC", 1),): "celsius:1 degC:1",
    (("degF", 1),): "fahrenheit:1 degF:1",
    _NEWTON: "N:1000 newton:1000 kN:1000000",
    _JOULE: "J:1000 joule:1000 kJ:1000000 kilojoule:1000000 MJ:1000000000",
    _WATT: "W:1000 watt:1000 kW:1000000 kilowatt:1000000 MW:1000000000",
    (("g", 1), ("m", -1), ("s", -2)): "Pa:1000 pascal:1000 kPa:1000000",
    (("V", 1),): "V:1 volt:1 mV:1/1000 kV:1000",
    (("A", 1),): "A:1 amp:1 ampere:1 mA:1/1000",
    (("ohm", 1),): "ohm:1",
    (("Hz", 1),): "Hz:1 hertz:1 kHz:1000 MHz:1000000 GHz:1000000000",
    (("eV", 1),): "eV:1 keV:1000 MeV:1000000 GeV:1000000000",
    (("mol", 1),): "mol:1 mole:1",
    (("rad", 1),): "rad:1 radian:1",
    (("K", 1),): "K:1 kelvin:1",
}.items():
    for _entry in _names.split():
        _name, _, _factor = _entry.partition(":")
        UNITS[_name] = (_powers, Fraction(_factor))


def unit_of(word: str) -> Unit:
    """The unit of a word, in singular or plural; a word that is no known unit is its own base."""
    lower = word.lower()
    for form in (word, lower, lower.removesuffix("s"), lower.removesuffix("es")):
        if form in UNITS:
            return UNITS[form]
    base = lower.removesuffix("s") if len(word) > 3 and not lower.endswith("ss") else lower
    return ((base, 1),), Fraction(1)


_PART = r"(\d+(?:\.\d+)?)(?:[\s~]|\\[ ,;])*([A-Za-z]{1,7}|''|['\"°])\.?"
_PARTS = re.compile(_PART)
_COMPOUND = re.compile(rf"(-?){_PART}(?:(?:,|[\s~]|\\[ ,;]|and\b)*{_PART})+")
_MARKS = {"'": "ft", "''": "in", '"': "in"}
_ANGLE_MARKS = {
    "°": Fraction(1),
    "'": Fraction(1, 60),
    "''": Fraction(1, 3600),
    '"': Fraction(1, 3600),
}
_MARK_SIGNS = str.maketrans("′’″”", "''\"\"")
_DEGREE_SIGN = re.compile(r"\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})\s*")


def compound(text: str) -> tuple[Fraction, Unit] | None:
    """(value in the first unit, that unit) of 5 ft 3 in, 5'3", 2 h 30 min, 30°15': units of one kind, each smaller than the one before."""
    text = _DEGREE_SIGN.sub("°", text.translate(_MARK_SIGNS))
    whole = _COMPOUND.fullmatch(text)
    if not whole:
        return None
    parts = _PARTS.findall(text)
    names = [name for _, name in parts]
    if names[0] == "°":
        units = [((("deg", 1),), _ANGLE_MARKS[name]) for name in names if name in _ANGLE_MARKS]
    else:
        names = [_MARKS.get(name, name) for name in names]
        if unit_of(names[0])[0] == _SECOND:
            names = ["min" if name == "m" else name for name in names]  # 2h 30m
        units = [unit_of(name) for name in names]
    factors = [factor for _, factor in units]
    if (
        len(units) < len(parts)
        or len({powers for powers, _ in units}) > 1
        or factors != sorted(set(factors), reverse=True)
    ):
        return None
    value = sum(
        Fraction(number) * factor for (number, _), factor in zip(parts, factors, strict=True)
    )
    return (-value if whole[1] else value) / factors[0], units[0]


_SMALL = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11,
    "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16, "seventeen": 17, "eighteen": 18, "nineteen": 19,
}  # fmt: skip
_TENS = {
    "twenty": 20,
    "thirty": 30,
    "forty": 40,
    "fifty": 50,
    "sixty": 60,
    "seventy": 70,
    "eighty": 80,
    "ninety": 90,
}
SCALES = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_FRACTIONS = {
    "half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9, "tenth": 10,
}  # fmt: skip
_FRACTIONS |= {f"{word}s": n for word, n in _FRACTIONS.items()} | {"halves": 2}
_NUMBER_WORDS = {*_SMALL, *_TENS, *SCALES, *_FRACTIONS, "a", "an", "and", "minus", "negative"}
_WORD = re.compile(r"([a-z]+)([ -]?)")


def number_words_as_digits(text: str) -> str:
    """ "twenty-one apples" is "21 apples", "two and a half" is "5/2"; any other text (in lower case) is as it was."""
    words, end = [], 0
    for match in _WORD.finditer(text):
        if match.start() != end or match[1] not in _NUMBER_WORDS:
            break
        words.append(match[1])
        end = match.end()
    is_negative = bool(words) and words[0] in ("minus", "negative")
    value = _value_of(words[is_negative:])
    if value is None or text[end - 1] == "-":  # one-to-one
        return text
    return f"{'-' * is_negative}{value} {text[end:]}".rstrip()


def _value_of(words: list[str]) -> Fraction | None:
    """three quarters, two and a half, half, or a whole number."""
    parts = _FRACTIONS.get(words[-1]) if words else None
    if parts is None:
        return _whole_number(words)
    before, _, behind = " ".join(words[:-1]).rpartition("and")
    whole = _whole_number(before.split()) if before else Fraction(0)
    is_one = behind.split() in (["a"], ["an"]) or words == ["half"]
    count = Fraction(1) if is_one else _whole_number(behind.split())
    return None if whole is None or count is None else whole + count / parts


def _whole_number(words: list[str]) -> Fraction | None:
    total, group, last = 0, 0, ""  # last: the kind of the word before
    for word in words:
        if word in _SMALL and (
            last in ("", "scale", "and") or last == "tens" and 0 < _SMALL[word] < 10
        ):
            group, last = group + _SMALL[word], "small"
        elif word in _TENS and last in ("", "scale", "and"):
            group, last = group + _TENS[word], "tens"
        elif word in ("a", "an") and not last:
            group, last = 1, "a"
        elif word == "hundred" and last in ("small", "tens", "a"):
            group, last = group * 100, "scale"
        elif word in SCALES and group:
            total, group, last = total + group * SCALES[word], 0, "scale"
        elif word == "and" and last == "scale":
            last = "and"
        else:
            return None
    return None if last in ("", "a", "and") else Fraction(total + group)
