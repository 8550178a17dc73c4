"""Units of measure, by one name each."""

_NAMES = {
    "m": "meter metre", "cm": "centimeter centimetre", "mm": "millimeter", "km": "kilometer",
    "in": "inch inche", "ft": "foot feet", "g": "gram", "kg": "kilogram", "lb": "pound lbs",
    "oz": "ounce", "s": "sec second", "min": "minute mins", "h": "hr hour", "yr": "year",
    "l": "liter litre", "ml": "mL milliliter", "mph": "", "dollar": "usd USD", "deg": "degree",
    "N": "newton", "J": "joule", "kJ": "kilojoule", "W": "watt", "kW": "kilowatt", "V": "volt",
    "eV": "", "keV": "", "MeV": "", "Hz": "hertz", "rad": "radian", "week": "",
    "mol": "mole", "C": "coulomb", "Pa": "pascal", "ohm": "", "cal": "calorie", "day": "",
    "people": "person", "child": "children", "man": "men", "woman": "women", "fish": "sheep",
    "cent": "", "month": "", "nm": "", "ms": "", "kPa": "", "atm": "", "mile": "mi", "yd": "yard",
}  # fmt: skip
UNITS = {name: unit for unit, names in _NAMES.items() for name in (unit, *names.split())}


def unit_of(word: str) -> str:
    """The name of a unit, given in singular or plural; an unknown word is a unit of its own."""
    lower = word.lower()
    for form in (word, lower, lower.removesuffix("s")):
        if form in UNITS:
            return UNITS[form]
    return lower.removesuffix("s") if len(word) > 3 and not lower.endswith("ss") else word
