"""Units of measure: to each word the powers of base units, and the factor to them."""

from fractions import Fraction

# powers of base units, sorted by name, and the factor to them: km/h is (("m", 1), ("s", -1)), 5/18
Unit = tuple[tuple[tuple[str, int], ...], Fraction]

_TABLE = {
    "m": "m:1 meter:1 metre:1 cm:1/100 centimeter:1/100 mm:1/1000 millimeter:1/1000 km:1000 "
    "kilometer:1000 in:127/5000 inch:127/5000 ft:381/1250 foot:381/1250 "
    "feet:381/1250 yard:1143/1250 mile:1609344/1000",
    "g": "g:1 gram:1 kg:1000 kilogram:1000 lb:45359237/100000 lbs:45359237/100000 "
    "pound:45359237/100000 oz:45359237/1600000 ounce:45359237/1600000",
    "s": "s:1 sec:1 second:1 min:60 minute:60 mins:60 h:3600 hr:3600 hour:3600 day:86400 "
    "week:604800",
    "month": "month:1 year:12",
    "m^3": "L:1/1000 liter:1/1000 mL:1/1000000 ml:1/1000000",
    "m s^-1": "mph:1397/3125",
    "dollar": "dollar:1 USD:1 cent:1/100",
    "deg": "deg:1 degree:1",
    "g m s^-2": "N:1000 newton:1000",
    "g m^2 s^-2": "J:1000 joule:1000 kJ:1000000",
    "g m^2 s^-3": "W:1000 watt:1000 kW:1000000",
    "V": "V:1 volt:1",
    "eV": "eV:1 keV:1000 MeV:1000000",
    "Hz": "Hz:1 hertz:1",
    "rad": "rad:1 radian:1",
}


def _table() -> dict[str, Unit]:
    units = {}
    for bases, names in _TABLE.items():
        parts = [base.partition("^") for base in bases.split()]
        powers = tuple((base, int(power or 1)) for base, _, power in parts)
        for entry in names.split():
            name, _, factor = entry.partition(":")
            units[name] = (powers, Fraction(factor))
    return units


UNITS = _table()


def unit_of(word: str) -> Unit:
    """The unit of a word, in singular or plural; a word that is no known unit is its own base."""
    lower = word.lower()
    for form in (word, lower, lower.removesuffix("s"), lower.removesuffix("es")):
        if form in UNITS:
            return UNITS[form]
    base = lower.removesuffix("s") if len(word) > 3 and not lower.endswith("ss") else lower
    return ((base, 1),), Fraction(1)
