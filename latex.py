"""Maths text (LaTeX or plain) to an expression tree: a hand-written recursive-descent parser. evaluation.py makes a number of it.

A node is a tuple, its first entry the kind:
    ("num", Fraction, digits)      digits: significant digits as written with a decimal point or exponent, 0 for an integer
    ("var", name)  ("const", "pi" | "e" | "i" | "inf")  ("text", words)
    ("add", nodes) ("mul", nodes) ("inv", x) ("neg", x) ("pm", x) ("mp", x) ("pow", base, exponent) ("pct", x)
    ("fn", name, nodes)            sqrt is ("fn", "root", (x, n)), |x| is "abs", n! is "factorial"
    ("series", "sum" | "prod" | "int", variable, low, high, body)
    ("unit", x, ((base, power), ...), factor)
    ("list" | "tuple" | "set" | "ratio" | "union" | "intersection", nodes) ("minus", set, set)
    ("interval", low, high, low_closed, high_closed)
    ("matrix", rows) ("cases", ((value, condition), ...)) ("rel", nodes, operators) ("mod", x, modulus)
Nothing is evaluated while parsing, and the caps below hold before anything is evaluated. Text is never executed.
"""

import re
import unicodedata
from fractions import Fraction

from units import SCALES, UNITS, unit_of

MAX_CHARS = 2000
MAX_TOKENS = 1000
MAX_DEPTH = 60  # brackets, exponents and signs within one another
MAX_DIGITS = 400  # of one number
MAX_SUMS = 4  # within one another


class NotMath(ValueError):
    """The text is not an expression of this grammar, or exceeds a cap."""


class Undefined(ArithmeticError):
    """No value at this point: division by zero, log 0, infinity."""


class TooHard(ArithmeticError):
    """Exceeds a cap of the evaluation, or is of a kind that only sympy evaluates."""


class Exhausted(TooHard):
    """The steps allowed for one verdict are spent."""


# ---- normalise: one spelling for each thing ----

_UNICODE = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "－": "-", "×": "\\times ", "✕": "\\times ", "⋅": "\\cdot ", "·": "\\cdot ",
    "∙": "\\cdot ", "÷": "/", "∕": "/", "⁄": "/", "π": "\\pi ", "∞": "\\infty ", "√": "\\sqrt ", "∛": "\\sqrt[3]", "≤": "\\le ",
    "≥": "\\ge ", "⩽": "\\le ", "⩾": "\\ge ", "≠": "\\ne ", "≈": "\\approx ", "≡": "\\equiv ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ",
    "∅": "\\emptyset ", "±": "\\pm ", "∓": "\\mp ", "°": "^\\circ ", "θ": "\\theta ", "α": "\\alpha ", "β": "\\beta ", "γ": "\\gamma ",
    "λ": "\\lambda ", "μ": "\\mu ", "µ": "\\mu ", "σ": "\\sigma ", "ω": "\\omega ", "φ": "\\phi ", "ℝ": "\\mathbb{R}", "⟨": "\\langle ",
    "⟩": "\\rangle ", "⌊": "\\lfloor ", "⌋": "\\rfloor ", "⌈": "\\lceil ", "⌉": "\\rceil ", "\u00a0": " ", "\u2009": " ", "\u202f": " ",
    "\u2006": " ", "，": ",", "（": "(", "）": ")", "％": "%", "＝": "=", "＋": "+", "．": ".", "：": ":", "′": "'", "″": "''", "’": "'",
    "“": "\"", "”": "\"", "…": "\\ldots ", "€": "\\euro ", "£": "\\pound ", "\u200b": "", "\ufeff": "",
}  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_STYLE = re.compile(
    r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|nolimits|mathstrut|rm|bf|it)(?![a-zA-Z])\.?|\\phantom\s*\{[^{}]*\}|\\label\s*\{[^{}]*\}"
)
_THOUSANDS = re.compile(r"(?<=\d)\s*(?:\\[,!; ]|\{\s*,\s*\}|,\s*\\!|\\,)\s*(?=\d{3}(?!\d))")
_DECIMAL_COMMA = re.compile(r"\d\{,\}\d")
_END = re.compile(r"(?:\\[,;:! ]|[.,;:\s])+$|\\+$")
_RECURRING = re.compile(
    r"(\d*\.\d*?)(?:(\d)\2{2,}|(\d{2,6}?)\3{1,})(?:\.\.\.|\\[lc]?dots)"
)  # 0.333..., 0.1212...
_MOD = re.compile(r"\(\s*\\?mod\s*(\w+)\s*\)")
_PERIOD = re.compile(
    r"(?<=\d)\.(\d*)(?:\((\d+)\)|\\(?:bar|dot)\s*\{?(\d+)\}?)"
)  # 0.1(6), 0.1\bar{6}
_UNIT_VECTOR = re.compile(
    r"\\(?:mathbf|boldsymbol|bm|hat|widehat|vec)\s*(?:\{\s*\\?([ijk])(?:math)?\s*\}|\\?([ijk])(?:math)?\b)"
)
_OPEN_INTERVAL = re.compile(
    r"([\[\]])((?:(?!\\sqrt)[^\[\](),;])+[,;](?:(?!\\sqrt)[^\[\](),;])+)([\[\]])"
)  # ]0, 1[
_LOG_BASE = re.compile(r"(?<![\\\w])log(2|10)(?=\()")
_TO = re.compile(r"\s*(\d+)\s*(?:to|\\text\s*\{\s*to\s*\})\s*(\d+)\s*")  # 3 to 4
_UNION_LETTER = re.compile(r"(?<=[)\]}])\s*U\s*(?=[(\[{\\])")
_DEGREES = re.compile(r"\^\s*\{?\s*o\s*\}?(?![a-z])|\^?\\(?:degree|deg)(?![a-z])")
_DIGITS_AND_LETTERS = re.compile(
    r"(?<![\w\\])(?:\\(?:text|mathrm)\s*\{)?(\d[\dA-F]*|[\dA-Fa-f]{2,})\}?_\s*(?:16|\{\s*(1[1-6])\s*\})"
)  # 2A_{16}
_COMBINATIONS = re.compile(r"(?:\{\s*\})?_\{?(\d+)\}?\s*C_\{?(\d+)\}?")  # {}_5C_2
_ANGLE_VECTOR = re.compile(r"<([^<>=]+,[^<>=]+)>")
_TIMES_TEN = re.compile(r"(?<=\d)\s*[xX*]\s*10\s*\^")


def normalise(text: str) -> str:
    """The text with one spelling for unicode signs, spacing, delimiters and thousands, without a trailing full stop."""
    if len(text) > MAX_CHARS:
        raise NotMath(f"longer than {MAX_CHARS} characters")
    if not text.isascii():
        text = _fold_unicode(text)
    text = _THOUSANDS.sub("", text.strip().replace("np.", "").replace("math.", ""))
    text = text.replace("{,}", ".") if _DECIMAL_COMMA.search(text) else text
    if "\\" in text:
        text = (
            text.replace("\\dfrac", "\\frac")
            .replace("\\tfrac", "\\frac")
            .replace("\\cfrac", "\\frac")
            .replace("\\!", "")
        )
        text = re.sub(
            r"\\([(\[\])])", " ", text.replace("\\not=", "\\ne ").replace("\\not =", "\\ne ")
        )
        text = _UNIT_VECTOR.sub(r"\\vec{\1\2}", _STYLE.sub(" ", text))
    if text.startswith(("**", "`")):  # Markdown
        text = text.strip("*`")
    if "$" in text:
        text = _drop_dollars(text)
    text = text.replace("~", " ")
    if "^" in text or "\\deg" in text:
        text = _DEGREES.sub(r"^\\circ ", text)
    if "..." in text or "dots" in text:
        text = _RECURRING.sub(r"\1\\overline{\2\3}", text)
    if "mod" in text:
        text = _MOD.sub(r"\\pmod{\1}", text)
    if text[:1] == "<":
        text = _ANGLE_VECTOR.sub(r"(\1)", text)
    if "[" in text or "]" in text:
        text = _OPEN_INTERVAL.sub(lambda m: "[("[m[1] == "]"] + m[2] + "])"[m[3] == "["], text)
    if "to" in text:
        text = _TO.sub(r"\1:\2", text) if _TO.fullmatch(text) else text
    if "log" in text:
        text = _LOG_BASE.sub(r"\\log_{\1}", text)
    if "U" in text:
        text = _UNION_LETTER.sub(r" \\cup ", text)
    if "_" in text:
        text = _COMBINATIONS.sub(r"\\binom{\1}{\2}", text)
        text = _DIGITS_AND_LETTERS.sub(_hexadecimal, text)
    if "." in text:
        text = _PERIOD.sub(lambda m: f".{m[1]}\\overline{{{m[2] or m[3]}}}", text)
    if text[:1] == "{" and text[-1:] == "}" and "\\" not in text:  # a set in plain text
        text = f"\\{{{text[1:-1]}\\}}"
    text = _TIMES_TEN.sub(r" \\times 10^", text)
    text = text.replace("**", "^") if "^" not in text else text
    return (
        text if text.endswith("...") else _END.sub("", text).lstrip("=: ").removeprefix("\\approx")
    )


def _hexadecimal(match: re.Match) -> str:
    """A number with letters for digits as a decimal; a number without, which the parser reads, as it is."""
    digits, base = match[1], int(match[2] or 16)
    if digits.isdigit() or any(int(digit, 16) >= base for digit in digits):
        return match[0]
    return str(int(digits, base))


def _drop_dollars(text: str) -> str:
    """Dollar signs are delimiters in pairs; a lone one before a number, or an escaped one, is the currency."""
    text = text.replace("\\$", "\\dollar ")
    if text.count("$") == 1 and re.match(r"-?\$\s*-?[\d.]", text):
        return text.replace("$", "\\dollar ")
    return text.replace("$", " ")


def _fold_unicode(text: str) -> str:
    text = re.sub(
        "[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+", lambda m: "^{" + m.group().translate(_SUPERSCRIPTS) + "}", text
    )
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda m: "_{" + m.group().translate(_SUBSCRIPTS) + "}", text)
    out = []
    for char in text:
        if char.isascii():
            out.append(char)
        elif char in _UNICODE:
            out.append(_UNICODE[char])
        elif char.isdecimal():
            out.append(str(unicodedata.decimal(char)))
        elif unicodedata.decomposition(char).startswith("<fraction>"):
            top, _, bottom = unicodedata.normalize("NFKC", char).partition("⁄")
            out.append(f"\\frac{{{top}}}{{{bottom}}}")
        else:
            out.append(char)
    return "".join(out)


# ---- tokens ----

_TOKEN = re.compile(
    r"(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,6}(?![\w.]))?)"
    r"|(?P<command>\\(?:[a-zA-Z]+|.))|(?P<word>[A-Za-z]+)|(?P<sign>[<>!]=|=>|\S)",
    re.DOTALL,
)
_UNIT_ENDS = re.compile(r"\s*(?:$|[,;/)])")
_GROUPED = re.compile(
    r"(?<!\d,)(?<!\d)\d{1,3}(?:,\d{3})+(?![\d]|,\d)|(?<![\d.])\d{1,3}(?: \d{3})+(?![\d.]| ?\d|/| */)"
)
_TEXT_COMMANDS = {
    "text", "mathrm", "textbf", "mathbf", "mbox", "textrm", "textit", "mathit", "mathsf", "operatorname", "hbox", "texttt", "boldsymbol",
    "textnormal", "mathop", "bm", "pmb",
}  # fmt: skip
_SYNONYMS = {
    "leq": "le", "leqslant": "le", "geq": "ge", "geqslant": "ge", "neq": "ne", "lt": "<", "gt": ">", "to": "rightarrow", "cdotp": "cdot",
    "ast": "cdot", "bullet": "cdot", "div": "/", "varnothing": "emptyset", "dots": "ldots", "cdots": "ldots", "lbrace": "{",
    "rbrace": "}", "lvert": "|", "rvert": "|", "vert": "|", "mid": "|", "land": "and", "lor": "or", "wedge": "and", "vee": "or",
    "setminus": "backslash", "simeq": "approx", "lbrack": "[", "rbrack": "]", "implies": "rightarrow", "Rightarrow": "rightarrow",
    "overrightarrow": "vec", "colon": ":", "slash": "/", "varphi": "phi", "varepsilon": "epsilon", "arccos": "acos", "arcsin": "asin",
    "arctan": "atan", "dbinom": "binom", "tbinom": "binom", "Pi": "Pi", "infin": "infty", "doteq": "=", "equiv": "=",
}  # fmt: skip
FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "log", "ln",
    "lg", "exp", "gcd", "lcm", "max", "min", "sqrt", "abs", "floor", "ceil", "det", "Re", "Im", "arg", "sgn", "binom", "cbrt",
}  # fmt: skip
_GREEK = {
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu", "xi", "rho", "sigma",
    "tau", "upsilon", "phi", "chi", "psi", "omega", "Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Upsilon", "Phi", "Psi",
    "Omega", "hbar", "ell", "odot", "nabla", "partial", "mho", "angle", "triangle", "AA", "sim", "perp", "star", "aleph", "prime",
    "oplus", "top", "intercal",
}  # fmt: skip
GREEK_WORDS = {
    "pi",
    "theta",
    "alpha",
    "beta",
    "lambda",
    "sigma",
    "omega",
    "phi",
    "mu",
}  # in plain text, without a backslash
_ACCENTS = {
    "overline", "bar", "vec", "hat", "dot", "ddot", "tilde", "widehat", "underline", "mathcal", "mathscr", "mathfrak",
    "overarc",
}  # fmt: skip
_OPENING = {
    "pi",
    "infty",
    "frac",
    "sum",
    "prod",
    "int",
    "emptyset",
    "mathbb",
    "ldots",
    "dollar",
    "euro",
    "pound",
}  # may begin a factor
_BASES = {
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "twelve": 12,
    "sixteen": 16,
}
_FILLER = {
    "the", "a", "an", "about", "approximately", "roughly", "exactly", "is", "are", "units", "unit", "total", "only", "old", "long",
    "wide", "tall", "high", "away", "each", "of", "in", "all", "altogether",
}  # fmt: skip
_CONDITION_WORDS = {"if", "for", "when", "where", "otherwise", "else"}
_WHOLE_WORDS = {word for word in _FILLER | _CONDITION_WORDS if len(word) > 1} | {
    "per",
    "sq",
}  # not products of letters
_UNITS_OR_LETTERS = {
    "mg",
    "ms",
    "nm",
    "dm",
    "um",
    "mA",
    "mV",
    "kN",
    "kV",
    "kW",
    "MW",
    "MJ",
    "kJ",
    "pt",
    "yd",
    "mi",
}

Token = tuple[str, str, int]  # kind (number, word, text, sign), value, position


def tokenise(text: str) -> list[Token]:
    """Tokens of normalised text. A command is a sign token with its name and backslash, save for text in \\text{} and the like."""
    grouped = {m.start(): m for m in _GROUPED.finditer(text)}
    tokens: list[Token] = []
    position = depth = 0
    while position < len(text):
        if position in grouped and (depth == 0 or " " in grouped[position].group()):
            match = grouped[position]
            whole = re.compile(r"\.\d+").match(text, match.end())
            end = whole.end() if whole else match.end()
            tokens.append(
                ("number", text[position:end].replace(",", "").replace(" ", ""), position)
            )
            position = end
            continue
        match = _TOKEN.match(text, position)
        if match is None:  # white space
            position += 1
            continue
        kind, value, start = match.lastgroup, match.group(), position
        position = match.end()
        if kind == "command":
            name = _SYNONYMS.get(value[1:], value[1:])
            if name in _TEXT_COMMANDS:
                inner, position = _braced(text, position)
                tokens += _text_tokens(inner, start)
                continue
            if name in FUNCTIONS:
                kind, value = "function", name
            elif name in ("begin", "end"):
                inner, position = _braced(text, position)
                kind, value = "sign", f"\\{name}{{{inner.strip('*')}}}"
            elif name in ("quad", "qquad", ",", ";", ":", " ", "!", "thinspace"):
                continue
            else:
                kind, value = (
                    "sign",
                    "\\" + name if name[:1].isalpha() or name in ("{", "}", "\\", "%") else name,
                )
        elif kind == "word":
            if value in _UNITS_OR_LETTERS and not (
                tokens and tokens[-1][0] == "number" and _UNIT_ENDS.match(text, position)
            ):
                tokens += [("word", letter, start) for letter in value]
            else:
                tokens += _word_tokens(value, start)
            continue
        elif kind == "sign":
            if value == "!=" and tokens and tokens[-1][0] == "number":  # 4!=24
                tokens.append((kind, "!", start))
                value = "="
            value = {
                "<=": "\\le",
                ">=": "\\ge",
                "!=": "\\ne",
                "=>": "\\rightarrow",
                "%": "\\%",
            }.get(value, value)
            if value == "~":
                continue
        depth += (value in ("(", "[", "\\{")) - (value in (")", "]", "\\}"))
        tokens.append((kind, value, start))
    if len(tokens) > MAX_TOKENS:
        raise NotMath(f"more than {MAX_TOKENS} signs")
    return tokens


def _braced(text: str, position: int) -> tuple[str, int]:
    """The content of {...} at position (or the one sign there) and the position behind it."""
    while position < len(text) and text[position] == " ":
        position += 1
    if position >= len(text) or text[position] != "{":
        return text[position : position + 1], position + 1
    depth = 0
    for i in range(position, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[position + 1 : i], i + 1
    raise NotMath("unbalanced braces")


def _text_tokens(inner: str, position: int) -> list[Token]:
    """What stands in \\text{...}: numbers and single letters are maths, words are words."""
    inner = inner.replace("~", " ").replace("\\", " \\").strip()
    if not inner:
        return []
    if re.fullmatch(r"[A-Za-z]", inner):
        return [("letter", inner, position)]
    if re.fullmatch(r"[A-Za-z. '-]+", inner):
        return [
            token
            for word in re.findall(r"[A-Za-z'-]+", inner)
            for token in _word_tokens(word.strip("'-"), position, text=True)
        ]
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9. /^{}-]*", inner):  # m/s^2
        parts = re.findall(r"[A-Za-z]+|\d+|\S", inner)
        return [token for part in parts for token in _unit_tokens(part, position)]
    return [(kind, value, position) for kind, value, _ in tokenise(inner)]


def _unit_tokens(part: str, position: int) -> list[Token]:
    if part.isalpha():
        return (
            [("letter", part, position)]
            if len(part) == 1
            else _word_tokens(part, position, text=True)
        )
    return [("number" if part.isdigit() else "sign", part, position)]


def _word_tokens(word: str, position: int, text: bool = False) -> list[Token]:
    """A run of letters: a function, a joining word, a unit or word, or else a product of one-letter variables."""
    lower = word.lower()
    if word == "Abs":
        word = "abs"
    if word in FUNCTIONS and word != "min":  # the minute
        return [
            (
                "function",
                {"arcsin": "asin", "arccos": "acos", "arctan": "atan"}.get(word, word),
                position,
            )
        ]
    if lower in ("and", "or"):
        return [("sign", "\\" + lower, position)]
    if word in GREEK_WORDS:
        return [("sign", "\\" + word, position)]
    if lower in ("inf", "infinity", "infty", "oo"):
        return [("sign", "\\infty", position)]
    if lower in ("percent", "pct", "percentage"):
        return [("sign", "\\%", position)]
    if word in ("union", "U"):
        return [("sign", "\\cup", position)] if word == "union" else [("word", "U", position)]
    if word == "mod":
        return [("sign", "\\pmod", position)]
    if (
        3 < len(word) < 6
        and word[:3] in ("sin", "cos", "tan", "log")
        or word[:2] == "ln"
        and len(word) < 4
    ):  # sinx
        head = 3 if word[0] != "l" or word[1] == "o" else 2
        return [("function", word[:head], position), *_word_tokens(word[head:], position + head)]
    if word == "in":
        return [("sign", "\\in", position)]
    if text or len(word) >= 4 or word in UNITS and len(word) > 1 or lower in _WHOLE_WORDS:
        return [("text", word, position)]
    return [("word", letter, position + i) for i, letter in enumerate(word)]


# ---- the parser ----

_RELATIONS = {
    "=": "=",
    "<": "<",
    ">": ">",
    "\\le": "<=",
    "\\ge": ">=",
    "\\ne": "!=",
    "\\approx": "~",
    "\\in": "in",
    "\\rightarrow": "->",
}
_CURRENCIES = {
    f"\\{name}": (((base, 1),), Fraction(1))
    for name, base in (("dollar", "dollar"), ("euro", "euro"), ("pound", "sterling"))
}
_MATRICES = {"matrix", "pmatrix", "bmatrix", "Bmatrix", "vmatrix", "smallmatrix", "array"}
_CLOSERS = {
    "(": ")",
    "[": "]",
    "\\{": "\\}",
    "\\langle": "\\rangle",
    "\\lfloor": "\\rfloor",
    "\\lceil": "\\rceil",
    "{": "}",
}
OTHERWISE = ("text", "otherwise")  # the condition of the last of several cases
ONE, MINUS_ONE = ("num", Fraction(1), 0), ("num", Fraction(-1), 0)


def integer(n: int) -> tuple:
    return ("num", Fraction(n), 0)


def parse(text: str) -> tuple:
    """The tree of a whole answer. Raises NotMath."""
    tokens = tokenise(normalise(text))
    while len(tokens) > 1 and tokens[0][0] == "text" and tokens[0][1].lower() in _FILLER:  # about 5
        del tokens[0]
    parser = _Parser(tokens)
    if parser.peek() == "":
        raise NotMath("empty")
    try:
        node = parser.answer()
    except RecursionError:
        raise NotMath("too deep") from None
    if parser.peek() != "":
        raise NotMath(f"unexpected {parser.peek()!r}")
    return node


class _Parser:
    """Recursive descent; a method reads one rule of the grammar and leaves the position behind it.

    answer   := union (("," | ";" | and | or) union)*             union  := relation ((cup | cap | backslash) relation)*
    relation := sum (("=" | "<" | ...) sum)*                      sum    := sign? term (("+" | "-" | "±") term)*
    term     := factor (("*" | "/" | nothing) factor)* unit?      factor := sign* power
    power    := atom ("!" | "%" | degree | "^" exponent)*
    """

    def __init__(self, tokens: list[Token]):
        self.tokens = tokens
        self.position = 0
        self.depth = 0
        self.in_bars = 0
        self.bound: tuple[str, ...] = ()  # indices of the sums around

    def peek(self, ahead: int = 0) -> str:
        i = self.position + ahead
        return self.tokens[i][1] if i < len(self.tokens) else ""

    def kind(self, ahead: int = 0) -> str:
        i = self.position + ahead
        return self.tokens[i][0] if i < len(self.tokens) else ""

    def accept(self, *values: str) -> bool:
        if self.peek() in values and self.kind() == "sign":
            self.position += 1
            return True
        return False

    def expect(self, value: str) -> None:
        if not self.accept(value):
            raise NotMath(f"expected {value!r}, got {self.peek()!r}")

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotMath(f"deeper than {MAX_DEPTH}")

    def answer(self) -> tuple:
        items = self.items((",", ";", "\\and", "\\or", "\\\\"))
        return items[0] if len(items) == 1 else ("list", tuple(items))

    def items(self, separators: tuple[str, ...]) -> list[tuple]:
        items = [self.union()]
        while self.accept(*separators):
            while self.accept("\\and", "\\or"):  # "1, 2, and 3"
                pass
            items.append(self.union())
        return items

    def union(self) -> tuple:
        node = self.relation()
        while self.peek() in ("\\cup", "\\cap", "\\backslash") and self.kind() == "sign":
            sign = self.peek()
            self.position += 1
            other = self.relation()
            if sign == "\\backslash":
                node = ("minus", node, other)
            else:
                kind = "union" if sign == "\\cup" else "intersection"
                node = (kind, (*node[1], other)) if node[0] == kind else (kind, (node, other))
        return node

    def relation(self) -> tuple:
        nodes, operators = [self.sum()], []
        while self.kind() == "sign" and self.peek() in _RELATIONS:
            operators.append(_RELATIONS[self.peek()])
            self.position += 1
            if operators[-1] == "in" or self.peek() in ("[", "\\{"):
                nodes.append(self.set_expression())
            else:
                nodes.append(self.sum())
        node = ("rel", tuple(nodes), tuple(operators)) if operators else self.ratio(nodes[0])
        return ("mod", node, self.argument()) if self.accept("\\pmod", "\\bmod", "\\mod") else node

    def set_expression(self) -> tuple:
        node = self.sum()
        while self.peek() in ("\\cup", "\\backslash") and self.kind() == "sign":
            sign = self.peek()
            self.position += 1
            other = self.sum()
            node = (
                ("minus", node, other)
                if sign == "\\backslash"
                else ("union", (*(node[1] if node[0] == "union" else (node,)), other))
            )
        return node

    def ratio(self, first: tuple) -> tuple:
        items = [first]
        while self.depth == 0 and self.accept(":"):
            items.append(self.sum())
        return ("ratio", tuple(items)) if len(items) > 1 else first

    def sum(self) -> tuple:
        items = []
        sign = self.peek() if self.kind() == "sign" and self.peek() in ("\\pm", "\\mp") else ""
        self.position += bool(sign)
        while True:
            node = self.term()
            items.append(
                {"-": ("neg", node), "\\pm": ("pm", node), "\\mp": ("mp", node)}.get(sign, node)
            )
            sign = self.peek()
            if self.kind() != "sign" or sign not in ("+", "-", "\\pm", "\\mp"):
                return items[0] if len(items) == 1 else ("add", tuple(items))
            self.position += 1

    def term(self) -> tuple:
        factors = [self.factor()]
        while True:
            if self.kind() == "sign" and self.peek() in ("*", "\\cdot", "\\times"):
                self.position += 1
                factors.append(self.factor())
            elif self.kind() == "sign" and self.peek() == "/":
                if self.kind(1) in ("text", "letter") and factors[-1][0] != "num":
                    if len(factors) == 1 or self.tokens[self.position - 1][1] not in UNITS:
                        break
                    self.position -= 1  # 5 g/cm^3
                    return ("unit", self.product(factors[:-1]), *self.unit())
                self.position += 1
                if self.kind() == "text":  # "3 / can"
                    return ("unit", self.product(factors), *self.unit(divided=True))
                factors.append(("inv", self.factor()))
            elif self.kind() == "text" and self.peek().lower() in SCALES and factors[0][0] == "num":
                factors.append(integer(SCALES[self.peek().lower()]))
                self.position += 1
            elif (
                self.peek() == "\\in"
                and self.peek(1) in ("", ",", ")", "^")
                and factors[-1][0] == "num"
            ):
                self.tokens[self.position] = ("text", "inch", 0)
            elif self.kind() in ("text", "letter") and self.is_unit(factors):
                return ("unit", self.product(factors), *self.unit())
            elif self.peek() in _CURRENCIES and self.kind(1) != "number":  # 5 €
                self.position += 1
                return (
                    "unit",
                    self.product(factors),
                    *_CURRENCIES[self.tokens[self.position - 1][1]],
                )
            elif self.starts_factor():
                factors.append(self.power(mixed_after=factors[-1] if len(factors) == 1 else None))
                if factors[-1][0] == "mixed":
                    whole, fraction = factors[0], factors[1][1]
                    factors = [
                        ("neg", ("add", (whole[1], fraction)))
                        if whole[0] == "neg"
                        else ("add", (whole, fraction))
                    ]
                    if self.accept("\\%"):
                        factors = [("pct", factors[0])]
            else:
                break
        return self.product(factors)

    @staticmethod
    def product(factors: list[tuple]) -> tuple:
        if len(factors) == 1:
            return factors[0]
        if factors[0][0] == "neg":  # -2x is -(2x)
            return ("neg", ("mul", (factors[0][1], *factors[1:])))
        return ("mul", tuple(factors))

    def starts_factor(self) -> bool:
        if self.kind() == "number":
            return self.peek(1) in ("^", "!") or self.peek(-1) not in (
                ")",
                "}",
                "]",
                "|",
                "\\%",
                "!",
            )  # 2^{3} 5^{2}, x3; not (2)1
        if self.kind() in ("word", "function", "letter"):
            return True
        value = self.peek()
        if value == "|":
            return not self.in_bars
        return self.kind() == "sign" and (
            value in ("(", "[", "{", "\\{", "\\langle", "\\lfloor", "\\lceil")
            or self.is_symbol(value)
        )

    @staticmethod
    def is_symbol(value: str) -> bool:
        name = value[1:]
        return value[:1] == "\\" and (
            name in _GREEK or name in _ACCENTS or name in _OPENING or value.startswith("\\begin{")
        )

    def factor(self) -> tuple:
        negative = False
        while self.kind() == "sign" and self.peek() in ("+", "-"):
            negative ^= self.peek() == "-"
            self.position += 1
        node = self.power()
        return ("neg", node) if negative else node

    def power(self, mixed_after: tuple | None = None) -> tuple:
        start = self.position
        node = self.atom()
        if mixed_after is not None and self.is_mixed(mixed_after, node, start):
            return ("mixed", node)
        posts = 0
        while self.kind() == "sign" and posts < 6:
            posts += 1
            if self.accept("!"):
                node = ("fn", "factorial", (node,))
            elif self.accept("\\%"):
                node = ("pct", node)
            elif self.accept("'"):
                node = (
                    ("var", node[1] + "'")
                    if node[0] == "var"
                    else ("unit", node, (("prime", 1),), Fraction(1))
                )
            elif self.accept("^"):
                node = self.exponent(node)
            else:
                break
        return node

    def is_mixed(self, whole: tuple, fraction: tuple, start: int) -> bool:
        """2\\frac{1}{2} and 2 1/2 are mixed numbers; the proper fraction must stand right behind the whole number."""
        whole = whole[1] if whole[0] == "neg" else whole
        if whole[0] != "num" or whole[2] or self.kind(start - 1 - self.position) != "number":
            return False
        if self.tokens[start][1] == "\\frac":
            parts = fraction[1] if fraction[0] == "mul" else ()
            return (
                len(parts) == 2
                and parts[0][0] == "num"
                and parts[1][0] == "inv"
                and parts[1][1][0] == "num"
                and 0 < parts[0][1] < parts[1][1][1]
            ) and self.peek() != "^"
        return False

    def exponent(self, base: tuple) -> tuple:
        if self.peek() in ("\\circ", "\\prime") or (
            self.peek() == "{" and self.peek(1) in ("\\circ", "\\prime")
        ):
            braced = self.accept("{")
            count = 0
            degree = self.peek() == "\\circ"
            while self.accept("\\circ", "\\prime"):
                count += 1
            if braced:
                self.expect("}")
            if not degree:
                return (
                    ("var", base[1] + "'" * count)
                    if base[0] == "var"
                    else ("unit", base, (("prime" * count, 1),), Fraction(1))
                )
            if self.kind() in ("letter", "word") and self.peek() in ("C", "F"):
                self.position += 1
                return (
                    "unit",
                    base,
                    (("deg" + self.tokens[self.position - 1][1], 1),),
                    Fraction(1),
                )
            return ("unit", base, (("deg", 1),), Fraction(1))
        self.deeper()
        if self.accept("{"):
            exponent = self.sum()
            self.expect("}")
        elif self.peek() in ("+", "-"):
            exponent = self.factor()
        else:
            exponent = self.atom()
            if self.accept("^"):
                exponent = self.exponent(exponent)
        self.depth -= 1
        return ("pow", base, exponent)

    def bare_exponent(self) -> tuple:
        node = self.exponent(ONE)
        if node[0] != "pow":
            raise NotMath("a degree or prime sign is no exponent here")
        return node[2]

    def atom(self) -> tuple:
        kind, value = self.kind(), self.peek()
        if not value:
            raise NotMath("ends too early")
        self.position += 1
        if kind == "number":
            return self.number(value)
        if kind in ("word", "letter"):
            return self.variable(value)
        if kind == "text":
            words = [value]
            while self.kind() == "text":
                words.append(self.peek())
                self.position += 1
            return ("text", " ".join(words).lower())
        if kind == "function":
            return self.function(value)
        self.deeper()
        node = (
            self.bracket(value)
            if value in ("(", "[", "{", "\\{", "\\langle", "\\lfloor", "\\lceil", "|")
            else self.command(value)
        )
        self.depth -= 1
        return node

    def number(self, value: str) -> tuple:
        if len(value) > MAX_DIGITS:
            raise NotMath(f"a number of more than {MAX_DIGITS} digits")
        mantissa, _, exponent = value.lower().partition("e")
        if exponent and abs(int(exponent)) > MAX_DIGITS:
            raise NotMath(f"a power of ten beyond {MAX_DIGITS}")
        if self.peek() == "_" and mantissa == value:
            return self.based(value)
        if self.peek() == "\\overline" and "." in mantissa:
            return self.repeating(mantissa)
        decimal = "." in mantissa.rstrip(".") or bool(exponent)
        digits = len(mantissa.replace(".", "").lstrip("0")) if decimal else 0
        if (
            self.kind() == "number"
            and self.peek(1) == "/"
            and self.kind(2) == "number"
            and not decimal
        ):
            top, bottom = self.peek(), self.peek(2)
            if top.isdigit() and bottom.isdigit() and 0 < int(top) < int(bottom):  # 2 1/2
                self.position += 3
                return ("num", Fraction(int(value)) + Fraction(int(top), int(bottom)), 0)
        if self.kind() == "number":
            raise NotMath("two numbers side by side")
        return (
            "num",
            Fraction(mantissa.rstrip(".") or "0") * Fraction(10) ** int(exponent or 0),
            max(digits, 1) if decimal else 0,
        )

    def based(self, digits: str) -> tuple:
        """1010_2: a number in another base."""
        self.position += 1
        name = self.subscript().lower().replace(" ", "").strip("()")
        base = _BASES.get(name, int(name) if name.isdecimal() and len(name) < 3 else 0)
        if not 2 <= base <= 36 or not digits.isdigit() or any(int(d) >= base for d in digits):
            raise NotMath(f"not a number in base {base}")
        return integer(int(digits, base))

    def repeating(self, start: str) -> tuple:
        """0.1\\overline{6}"""
        self.position += 1
        self.expect("{")
        period = self.peek()
        self.position += 1
        self.expect("}")
        if not period.isdigit():
            raise NotMath("a repeating part must be digits")
        places = len(start.partition(".")[2])
        return (
            "num",
            Fraction(start.rstrip("."))
            + Fraction(int(period), (10 ** len(period) - 1) * 10**places),
            0,
        )

    def variable(self, name: str) -> tuple:
        if name in ("e", "i") and self.peek() != "_" and name not in self.bound:
            return ("const", name)
        if self.accept("_"):
            name += "_" + self.subscript()
        if [self.peek(ahead) for ahead in range(3)] == ["(", "0", ")"]:  # I(0) is no product
            self.position += 3
            name += "(0)"
        return ("var", name)

    def subscript(self) -> str:
        if not self.accept("{"):
            self.position += 1
            if self.position > len(self.tokens):
                raise NotMath("ends in a subscript sign")
            return self.tokens[self.position - 1][1].strip("\\")
        parts, depth = [], 1
        while self.peek():
            depth += (self.peek() == "{") - (self.peek() == "}")
            self.position += 1
            if depth == 0:
                return " ".join(parts)
            parts.append(self.tokens[self.position - 1][1].strip("\\"))
        raise NotMath("unbalanced braces")

    def function(self, name: str) -> tuple:
        if name in ("sqrt", "cbrt"):
            degree = integer(3 if name == "cbrt" else 2)
            if self.accept("["):
                degree = self.sum()
                self.expect("]")
            return ("fn", "root", (self.argument(), degree))
        if name == "binom":
            return ("fn", "binom", (self.argument(), self.argument()))
        base = power = None
        for _ in range(2):
            if base is None and self.accept("_"):
                base = self.argument()
            elif power is None and self.accept("^"):
                power = self.bare_exponent()
        if self.peek() in ("(", "[", "{", "|", "\\{") and self.kind() == "sign":
            argument = self.atom()
            arguments = argument[1] if argument[0] in ("tuple", "set") else (argument,)
        else:
            self.deeper()
            arguments = (self.function_argument(),)
            self.depth -= 1
        if base is not None:
            arguments = (*arguments, base)
        if power == MINUS_ONE or power == ("neg", ONE):
            return ("fn", {"sin": "asin", "cos": "acos", "tan": "atan"}.get(name, "?"), arguments)
        node = ("fn", name, tuple(arguments))
        return ("pow", node, power) if power is not None else node

    def function_argument(self) -> tuple:
        """sin 2x cos x is sin(2x) cos(x); sin x / 2 is sin(x) / 2."""
        factors = [self.factor()]
        while self.starts_factor() and self.kind() != "function" and self.peek() not in ("(", "["):
            factors.append(self.power())
        return self.product(factors)

    def argument(self) -> tuple:
        """{...}, (...), or a single digit, letter or command: \\frac13, \\sqrt3."""
        kind, value = self.kind(), self.peek()
        if kind == "number" and value.isdigit():
            if len(value) > 1:
                self.tokens[self.position] = (kind, value[1:], self.tokens[self.position][2])
            else:
                self.position += 1
            return integer(int(value[0]))
        return self.atom()

    def bracket(self, opener: str) -> tuple:
        if opener == "|":
            self.in_bars += 1
            node = self.sum()
            self.in_bars -= 1
            self.expect("|")
            return ("fn", "abs", (node,))
        bars, self.in_bars = self.in_bars, int(opener == "\\{")
        closers = (")", "]") if opener in ("(", "[") else (_CLOSERS[opener],)
        if self.accept(*closers):
            if opener in ("\\{", "{"):
                return ("set", ())
            raise NotMath("empty brackets")
        items = self.items((",", ";"))
        if opener == "{" and len(items) == 1 and self.accept("\\over"):
            items = [("mul", (items[0], ("inv", self.sum())))]
        elif opener == "{" and len(items) == 1 and self.accept("\\choose"):
            items = [("fn", "binom", (items[0], self.sum()))]
        if opener == "\\{" and self.accept("|", ":"):  # {x | condition}
            items = self.items((",", ";", "\\and"))
            if len(items) > 1:
                raise NotMath("several conditions")
        if self.kind() != "sign" or self.peek() not in closers:
            raise NotMath(f"expected {closers[0]!r}, got {self.peek()!r}")
        closer = self.peek()
        self.position += 1
        self.in_bars = bars
        return self.bracketed(opener, closer, items)

    def bracketed(self, opener: str, closer: str, items: list[tuple]) -> tuple:
        if opener == "\\{":
            return items[0] if len(items) == 1 and items[0][0] == "rel" else ("set", tuple(items))
        if (
            len(items) != 2
            and opener + closer in ("(]", "[)")
            or len(items) > 1
            and opener in ("\\lfloor", "\\lceil")
        ):
            raise NotMath("brackets do not match")
        if opener in ("\\lfloor", "\\lceil"):
            return ("fn", "floor" if opener == "\\lfloor" else "ceil", (items[0],))
        if len(items) == 1:
            return (
                self.based(str(items[0][1]))
                if items[0][0] == "num" and self.peek() == "_"
                else items[0]
            )
        if opener == "{":
            return ("set", tuple(items))
        if len(items) == 2 and (opener == "[" or closer == "]"):
            return ("interval", items[0], items[1], opener == "[", closer == "]")
        return ("tuple", tuple(items))

    def command(self, value: str) -> tuple:
        name = value[1:]
        if name == "frac":
            return self.fraction()
        if name in ("pi", "infty"):
            return ("const", "pi" if name == "pi" else "inf")
        if value in _CURRENCIES:
            return ("unit", self.factor(), *_CURRENCIES[value])
        if name == "emptyset":
            return ("set", ())
        if name == "mathbb":
            name = "mathbb " + self.subscript()
            if self.peek() == "^" and self.peek(1 + (self.peek(1) == "{")) in (
                "+",
                "-",
            ):  # the positive ones
                self.position += 1
                name += "^" + self.subscript()
            return ("var", name)
        if name == "ldots":
            return ("text", "...")
        if name in ("sum", "prod", "int"):
            return self.series(name)
        if value.startswith("\\begin{"):
            return self.matrix(value[7:-1])
        if name in _ACCENTS:
            inner = self.argument()
            return self.variable(f"{name} {inner}")
        if name in ("angle", "triangle"):
            return ("text", name)
        if name in _GREEK and value[0] == "\\":
            return self.variable("\\" + name)
        raise NotMath(f"unknown {value!r}")

    def fraction(self) -> tuple:
        top, bottom = self.argument(), self.argument()
        d = ("var", "d")
        if (
            top[0] == "mul"
            and bottom[0] == "mul"
            and top[1][0] in (d, ("pow", d, integer(2)))
            and bottom[1][0] == d
        ):  # dy/dx
            return ("var", f"{top[1]} / {bottom[1]}")
        return (
            ("mul", (top, ("inv", bottom)))
            if top[0] != "neg"
            else ("neg", ("mul", (top[1], ("inv", bottom))))
        )

    def series(self, name: str) -> tuple:
        low = high = None
        variable = ""
        for _ in range(2):
            if self.accept("_"):
                low = self.argument()
            elif self.accept("^"):
                high = self.bare_exponent()
        if name == "int":
            body = self.sum()
            factors = list(body[1]) if body[0] == "mul" else []
            if (
                len(factors) < 3
                or factors[-2] != ("var", "d")
                or factors[-1][0] != "var"
                or (low is None) != (high is None)
            ):
                raise NotMath("an integral needs its dx")
            body, variable = self.product(factors[:-2]), factors[-1][1]
        else:
            if (
                low is None
                or high is None
                or low[0] != "rel"
                or low[2] != ("=",)
                or low[1][0][0] != "var"
                and low[1][0] != ("const", "i")
            ):
                raise NotMath("a sum needs its bounds")
            variable, low = low[1][0][1], low[1][1]
            self.bound += (variable,)
            if len(self.bound) > MAX_SUMS:
                raise NotMath(f"more than {MAX_SUMS} sums within one another")
            body = self.term()
            self.bound = self.bound[:-1]
        return ("series", name, variable, low, high, body)

    def cases(self) -> tuple:
        """Values with conditions; or, without any condition, a system of equations."""
        rows: list[tuple] = []
        while not self.accept("\\end{cases}"):
            value, condition = self.relation(), None
            self.accept(",", ";", ".")
            if self.accept("&") or self.kind() == "text":
                condition = self.condition()
            self.accept("\\\\")
            rows.append((value, condition))
        conditions = [condition for _, condition in rows]
        if rows and not any(conditions):
            return ("list", tuple(value for value, _ in rows))
        if not rows or None in conditions[:-1]:
            raise NotMath("cases without conditions")
        return ("cases", (*rows[:-1], (rows[-1][0], conditions[-1] or OTHERWISE)))

    def condition(self) -> tuple:
        start = self.position
        while self.peek() and self.peek() not in ("\\\\", "\\end{cases}"):
            self.position += 1
        tokens = self.tokens[start : self.position]
        while tokens and (
            tokens[-1][1] in (",", ";", ".") or tokens[0][1].lower() in _CONDITION_WORDS
        ):
            tokens = tokens[:-1] if tokens[-1][1] in (",", ";", ".") else tokens[1:]
        parser = _Parser(tokens)
        try:
            node = parser.answer() if tokens else OTHERWISE
        except NotMath:
            node = None
        if node is None or parser.peek():
            return ("text", " ".join(value for _, value, _ in tokens).lower())
        return node

    def matrix(self, environment: str) -> tuple:
        if environment == "cases":
            return self.cases()
        if environment not in _MATRICES:
            raise NotMath(f"unknown environment {environment!r}")
        if environment == "array":
            self.subscript()
        rows: list[list[tuple]] = [[]]
        while not self.accept(f"\\end{{{environment}}}"):
            if self.accept("\\\\"):
                rows.append([])
            elif not self.accept("&", "\\hline"):
                rows[-1].append(self.sum())
        rows = [row for row in rows if row]
        if not rows or len({len(row) for row in rows}) != 1:
            raise NotMath("the rows of a matrix must be of one length")
        matrix = ("matrix", tuple(map(tuple, rows)))
        return ("fn", "det", (matrix,)) if environment == "vmatrix" else matrix

    def is_unit(self, factors: list[tuple]) -> bool:
        if self.kind() == "text":
            return self.peek().lower() not in _CONDITION_WORDS
        has_number = any(
            f[0] in ("num", "pct", "unit") or f[0] in ("inv", "neg") and f[1][0] == "num"
            for f in factors
        )
        return has_number and self.peek() not in ("e", "i")

    def unit(self, divided: bool = False) -> tuple[tuple, Fraction]:
        """The unit behind a value, as powers of base units and the factor to them."""
        powers: dict[str, int] = {}
        factor = Fraction(1)
        sign = -1 if divided else 1
        power_ahead = 1
        while self.kind() in ("text", "letter", "word") or self.peek() in (
            "/",
            "\\cdot",
            "{",
            "}",
            "*",
        ):
            kind, value = self.kind(), self.peek()
            self.position += 1
            if value == "/" or value.lower() == "per":
                sign = -1
            elif value.lower() in ("square", "sq", "cubic", "squared", "cubed"):
                power_ahead = 2 if value.lower().startswith("sq") else 3
                if value.lower().endswith("ed") and powers:
                    base = next(reversed(powers))
                    powers[base] *= power_ahead
                    power_ahead = 1
            elif kind in ("text", "letter", "word") and value.lower() not in _FILLER:
                bases, one = unit_of(value)
                if bases[0][0] in ("degC", "degF"):  # degrees Celsius
                    powers.pop("deg", None)
                power = self.unit_power() * power_ahead * sign
                for base, exponent in bases:
                    powers[base] = powers.get(base, 0) + power * exponent
                factor *= one**power
                power_ahead = 1
        return tuple(sorted((b, p) for b, p in powers.items() if p)), factor

    def unit_power(self) -> int:
        if self.peek() == "}":
            self.position += 1
        if not self.accept("^"):
            return 1
        exponent = self.bare_exponent()
        value = (
            -exponent[1][1]
            if exponent[0] == "neg" and exponent[1][0] == "num"
            else exponent[1]
            if exponent[0] == "num"
            else None
        )
        if not isinstance(value, Fraction) or value.denominator != 1 or not -9 <= value <= 9:
            raise NotMath("not a unit's power")
        return int(value)
