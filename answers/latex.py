"""Maths text (LaTeX or plain) to an expression tree: a hand-written recursive-descent parser.

A node is a tuple, its first entry the kind:
    ("num", Fraction, digits)   digits: significant digits as written with a point, 0 for an integer
    ("var", name)  ("const", "pi" | "e" | "i" | "inf" | other)  ("text", words)
    ("add", nodes) ("mul", nodes) ("inv", x) ("neg", x) ("pm", x) ("mp", x) ("pow", base, exponent)
    ("pct", x)  ("unit", x, ((power, name), ...))
    ("fn", name, nodes)         sqrt is ("fn", "root", (x, n)), |x| is "abs", n! is "factorial"
    ("integral", variable, low, high, body)
    ("list" | "tuple" | "set" | "ratio" | "union" | "minus" | "mod" | "matrix" | "both", nodes)
                                both: relations joined by and; matrix: rows
    ("interval", low, high, low_closed, high_closed)  ("rel", nodes, operators)
Nothing is evaluated while parsing. Text is never executed.
"""

import re
import unicodedata
from fractions import Fraction

from answers.units import UNITS, unit_of

MAX_CHARS = 2000
MAX_TOKENS = 1000
MAX_DEPTH = 60  # brackets, exponents and signs within one another
MAX_DIGITS = 400  # of one number


class NotMath(ValueError):
    """The text is not an expression of this grammar, or exceeds a cap."""


# ---- one spelling for each sign ----


def _words(text: str) -> set[str]:
    return set(text.split())


def _pairs(text: str) -> dict[str, str]:
    return dict(pair.split(":") for pair in text.split())


_SIGNS = {
    entry[0]: entry[1:] + " " if "\\" in entry else entry[1:]
    for entry in _words(
        r"""−- –- —- ‐- ×\times ✕\times ⋅\cdot ·\cdot ∙\cdot ÷/ ∕/ ⁄/
        π\pi ∞\infty √\sqrt ∛\sqrt[3] ≤<= ≥>= ⩽<= ⩾>= ≠!= ≈\approx
        ≡\equiv ∪\cup ∈\in ∅\emptyset ±\pm ∓\mp °\circ θ\theta α\alpha
        β\beta γ\gamma λ\lambda μ\mu σ\sigma ω\omega φ\phi ⟨\langle ⟩\rangle
        ⌊\lfloor ⌋\rfloor ⌈\lceil ⌉\rceil ′' ’' “" ”" €\euro £\pound"""
    )
} | {"\u200b": " ", "\ufeff": " "}
_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ"
_SUBSCRIPTS = "₀₁₂₃₄₅₆₇₈₉"
_RUNS = re.compile(f"[{_SUPERSCRIPTS}]+|[{_SUBSCRIPTS}]+")
_THOUSANDS = re.compile(r"(?<=\d) ?(?:\\[,!; ]|\{ ?, ?\}|, ?\\!) ?(?=\d{3}(?!\d))")
_MIXED = re.compile(
    r"(?<![\w.^_}])(\d+) ?"
    r"(?:\\[dtc]?frac ?(?:\{(\d+)\}|(\d)) ?(?:\{(\d+)\}|(\d))|(?<= )(\d+)/(\d+))"
)
_RAISED = re.compile(r"\^ ?(?:\{ ?((?:\\circ|\\prime)+) ?\}|((?:\\circ|\\prime)+))")
_PERIOD = re.compile(r"(\d\.\d*)\((\d+)\)")  # 0.1(6)
_TIMES_TEN = re.compile(r"(?<=\d) ?[xX] ?10 ?\^")
_CHOOSE = re.compile(r"(?<![A-Za-z\\])C\( ?(\w{1,9}), ?(\w{1,9}) ?\)")  # C(10, 3)
_MOD = re.compile(r"\(\\?mod (\w+)\)")
_UNIT_RATIO = re.compile(r"(?<=[\d})] )(k?[mg]|J|N) ?/ ?(k?[mgsh](?:\^2|\^\{2\})?)[ ,;]*$")  # 5 m/s
_MONEY = re.compile(r"-?\$ ?-?[\d.]")


def normalise(text: str) -> str:
    """The text with one spelling for unicode signs, thousands, powers, dollars and Markdown."""
    if not text.isascii():
        text = "".join(map(_fold, _RUNS.sub(_script, text)))
    text = text.replace("~", " ").replace("\\quad", " ").replace("per cent", "percent")
    text = " ".join(text.replace("np.", "").split()).strip("`")  # np.sqrt(2)
    text = text.removeprefix("**").removesuffix("**")  # Markdown
    text = _TIMES_TEN.sub(r" \\times 10^", _THOUSANDS.sub("", text))
    text = _PERIOD.sub(r"\1\\overline{\2}", _CHOOSE.sub(r"\\binom{\1}{\2}", text))
    text = _MOD.sub(r"\\pmod{\1}", _RAISED.sub(r"\1\2 ", _MIXED.sub(_mixed, text)))
    text = text.replace("\\$", "\\dollar ").replace("**", "^").replace("...", "\\ldots ")
    text = text.replace("\\prime", "'")
    if text.count("$") == 1 and _MONEY.match(text):
        text = text.replace("$", "\\dollar ")
    return _UNIT_RATIO.sub(r"\\text{\1/\2}", text.replace("$", " ").rstrip(" ."))


def _mixed(match: re.Match) -> str:
    """2\\frac{1}{2} and 2 1/2 as a sum."""
    whole, top, bottom = (group for group in match.groups() if group)
    is_proper = 0 < int(top) < int(bottom)
    return f"({whole}+{top}/{bottom})" if is_proper else match[0]


def _script(match: re.Match) -> str:
    mark = "^" if match[0][0] in _SUPERSCRIPTS else "_"
    return f"{mark}{{{unicodedata.normalize('NFKC', match[0]).replace('−', '-')}}}"


def _fold(char: str) -> str:
    if char.isascii() or unicodedata.decomposition(char)[:5] in ("<supe", "<sub>"):
        return char
    char = _SIGNS.get(char) or unicodedata.normalize("NFKC", char)
    return re.sub(r"(\d+)⁄(\d+)", r"\\frac{\1}{\2}", char)  # ½


# ---- tokens ----

Token = tuple[str, str]  # kind (number, word, letter, text, function, sign) and value

_TOKEN = re.compile(
    r"(?P<grouped>(?<![\d.])(?<!\d,)\d{1,3}(?:(?:,\d{3})+(?!\d|,\d)|(?: \d{3})+(?![\d./]| [\d/]))"
    r"(?:\.\d+)?)"
    r"|(?P<based>(?<![\w\\])(?=\d*[A-F])[\dA-F]{2,}_\{?1[1-6]\}?)"  # FF_{16}
    r"|(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,6}(?!\w|\.\d))?)"
    r"|(?P<command>\\(?:(?:left|right)\.|[a-zA-Z]+|.))|(?P<word>[A-Za-z]+)|(?P<sign>[<>!]=|\S)"
)
_TEXT_COMMANDS = _words(
    "text mathrm textbf mathbf mbox textrm textit mathit mathsf operatorname hbox texttt boldsymbol"
    " textnormal bm"
)
_SKIPPED = _words(
    "left left. right right. big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr"
    " displaystyle textstyle limits nolimits rm bf it quad qquad thinspace"
) | set(",;: !()[]")
_SYNONYMS = _pairs(
    "dfrac:frac tfrac:frac cfrac:frac le:<= leq:<= leqslant:<= ge:>= geq:>= geqslant:>= ne:!="
    " neq:!= lt:< gt:> approx:~ simeq:~ to:rightarrow ast:cdot div:/ varnothing:emptyset"
    " dots:ldots cdots:ldots lbrace:{ rbrace:} lvert:| rvert:| vert:| mid:| land:and lor:or"
    " setminus:backslash lbrack:[ rbrack:] implies:rightarrow Rightarrow:rightarrow"
    " degree:circ deg:circ overrightarrow:vec varphi:phi varepsilon:epsilon arccos:acos"
    " arcsin:asin arctan:atan ln:log dbinom:binom tbinom:binom equiv:= bmod:pmod mod:pmod"
)
FUNCTIONS = _words(  # one without a value in evaluation.py equals itself only
    "sin cos tan cot sec csc asin acos atan arcsin arccos arctan sinh cosh tanh log ln lg exp gcd"
    " lcm max min sqrt abs floor ceil det binom cbrt sum prod lim"
)
_GREEK = _words(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon"
    " phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega hbar ell odot"
    " nabla partial mho angle triangle perp oplus top"
)
WORD_SIGNS = _pairs(  # without a backslash
    r"pi:\pi theta:\theta alpha:\alpha beta:\beta lambda:\lambda sigma:\sigma omega:\omega phi:\phi"
    r" mu:\mu and:\and And:\and AND:\and or:\or Or:\or OR:\or in:\in inf:\infty infinity:\infty"
    r" infty:\infty oo:\infty Infinity:\infty percent:\% pct:\% Percent:\% union:\cup mod:\pmod"
    r" negative:- minus:- plus:+"
)
_ACCENTS = _words("overline bar vec hat dot ddot tilde widehat underline mathcal mathbb")
_OPENING = _GREEK | _ACCENTS | _words("pi infty frac int emptyset ldots dollar euro pound")
_FILLER = _words(
    "the a an about approximately roughly exactly is are answer total only old long wide tall"
    " high away each every this of in all altogether different distinct possible left remaining now"
)
_CHANGING = _words(  # beside a number they make another one of it
    "hundred hundreds thousand thousands million millions billion billions trillion trillions dozen"
    " dozens score half halves quarter quarters times less fewer more than as does percent percents"
    " per no or over root roots gross basis power square squares cubes tens units ones plus upwards"
    " onwards guess lakhs crores"
)
_FRACTION = re.compile(r"thirds|(?!months|paths|lengths|depths|births|deaths)\w+ths")
_WHOLE_WORDS = {word for word in _FILLER if len(word) > 1} | {"per", "sq"}


def tokenise(text: str, in_text: bool = False) -> list[Token]:
    """The tokens of normalised text; a command is a sign.

    in_text: the text is that of \\text{}, where letters and words stay whole."""
    tokens: list[Token] = []
    position = depth = 0
    while match := _TOKEN.search(text, position):
        if match.lastgroup == "grouped" and depth and "," in match[0]:  # (1,234) is a point
            match = re.compile(r"(?P<number>\d+)").match(text, match.start())
        kind, value, position = match.lastgroup, match[0], match.end()
        if kind == "grouped":
            kind, value = "number", value.replace(",", "").replace(" ", "")
        if kind == "based":
            kind, value = "text", value.replace("{", "").replace("}", "")
        if kind == "word":
            value = "inch" if value == "in" and position == len(text) else value
            before = tokens[-1] if tokens else ("", "")
            can_be_unit = before[0] in ("number", "text") or before[1] in (")", "}", "\\pi")
            tokens += _word_tokens(value, in_text, can_be_unit)
            continue
        if kind == "command":
            name = _SYNONYMS.get(value[1:], value[1:])
            if name in _TEXT_COMMANDS:
                inner, position = _braced(text, position)
                inner = re.sub(r"\\[,;: ]", " ", inner).strip()
                is_text = re.fullmatch(r"[A-Za-z][A-Za-z0-9. /^{}-]*", inner) is not None  # m/s^2
                tokens += tokenise(inner, is_text)
                continue
            if name in _SKIPPED:
                continue
            kind, value = "function" if name in FUNCTIONS else "sign", name
            if name in ("begin", "end"):
                inner, position = _braced(text, position)
                value = f"\\{name}{{{inner.strip('*')}}}"
            elif kind == "sign" and (name[:1].isalpha() or name in "{}\\%"):
                value = "\\" + name
        value = "\\%" if value == "%" else value
        depth += (value in ("(", "[", "\\{")) - (value in (")", "]", "\\}"))
        tokens.append((kind, value))
    if len(tokens) > MAX_TOKENS:
        raise NotMath(f"more than {MAX_TOKENS} signs")
    return tokens


def _braced(text: str, position: int) -> tuple[str, int]:
    """The content of {...} at position (or the one sign there) and the position behind it."""
    position += text[position : position + 1] == " "
    if text[position : position + 1] != "{":
        return text[position : position + 1], position + 1
    depth = 0
    for i in range(position, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[position + 1 : i], i + 1
    raise NotMath("unbalanced braces")


def _word_tokens(word: str, in_text: bool, can_be_unit: bool = False) -> list[Token]:
    """A run of letters: a sign, a function, a unit or word, or else a product of variables."""
    if in_text and len(word) == 1:
        return [("letter", word)]
    if word in FUNCTIONS and word != "min":  # the minute
        return [("function", _SYNONYMS.get(word, word))]
    if word in WORD_SIGNS:
        return [("sign", WORD_SIGNS[word])]
    is_unit = can_be_unit and word in UNITS and len(word) > 1
    if in_text or len(word) > 3 or is_unit or word.lower() in _WHOLE_WORDS:
        return [("text", word)]
    return [("word", letter) for letter in word]


# ---- the parser ----

_JOINTS = (",", ";", "\\and", "\\or", "\\\\")
_RELATIONS = _words(r"= < > <= >= != ~ \in \rightarrow")
_CURRENCIES = {"\\dollar": "dollar", "\\euro": "euro", "\\pound": "sterling"}
_MATRICES = {"matrix", "pmatrix", "bmatrix", "Bmatrix", "smallmatrix", "array"}
_CLOSERS = {
    "(": (")", "]"), "[": (")", "]"), "{": ("}",), "\\{": ("\\}",),
    "\\langle": ("\\rangle",), "\\lfloor": ("\\rfloor",), "\\lceil": ("\\rceil",),
}  # fmt: skip
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9}
_UNIT_EXPONENTS = {"square": 2, "sq": 2, "cubic": 3, "squared": 2, "cubed": 3}


def integer(n: int) -> tuple:
    return ("num", Fraction(n), 0)


def parse(text: str) -> tuple:
    """The tree of a whole answer. Raises NotMath."""
    try:
        tokens = tokenise(normalise(text))
        while tokens and tokens[0][1].lower() in {"=", ":", "~"} | _FILLER - {"a"}:
            del tokens[0]  # the "about" of "about 5"
        while tokens and tokens[-1][1] in (".", ",", ";", ":", "\\\\"):
            del tokens[-1]
        parser = _Parser(tokens)
        node = parser.answer()
    except RecursionError:
        raise NotMath("too deep") from None
    if parser.peek() != "":
        raise NotMath(f"unexpected {parser.peek()!r}")
    return node


class _Parser:
    """Recursive descent: a method for each rule of the grammar.

    answer   := union (("," | ";" | and | or) union)*
    union    := relation ((cup | backslash) relation)*
    relation := sum (("=" | "<" | ...) sum)*
    sum      := sign? term (("+" | "-" | "±") term)*
    term     := factor (("*" | "/" | nothing) factor)* unit?        factor := sign* power
    power    := atom ("!" | "%" | degree | "^" exponent)*
    """

    def __init__(self, tokens: list[Token]):
        self.tokens = [*tokens, *[("", "")] * 4]  # what peek sees past the end
        self.position = 0
        self.depth = 0
        self.in_bars = 0

    def peek(self, ahead: int = 0) -> str:
        return self.tokens[self.position + ahead][1]

    def kind(self, ahead: int = 0) -> str:
        return self.tokens[self.position + ahead][0]

    def at(self, *values: str) -> bool:
        return self.peek() in values

    def accept(self, *values: str) -> bool:
        found = self.at(*values)
        self.position += found
        return found

    def take(self) -> str:
        self.position += 1
        return self.peek(-1)

    def expect(self, value: str) -> None:
        if not self.accept(value):
            raise NotMath(f"expected {value!r}, got {self.peek()!r}")

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotMath(f"deeper than {MAX_DEPTH}")

    def answer(self) -> tuple:
        joint = "both"
        items = [self.joined_sets(self.relation)]
        while self.at(*_JOINTS):
            joint = joint if self.at("\\and") else "list"
            while self.accept(*_JOINTS):  # "1, 2, and 3"
                pass
            items.append(self.joined_sets(self.relation))
        kind = joint if all(item[0] == "rel" for item in items) else "list"
        return items[0] if len(items) == 1 else (kind, tuple(items))

    def items(self, *separators: str) -> list[tuple]:
        items = [self.joined_sets(self.relation)]
        while self.accept(*separators):
            items.append(self.joined_sets(self.relation))
        return items

    def joined_sets(self, part) -> tuple:
        node = part()
        while self.at("\\cup", "\\backslash"):
            if self.take() == "\\backslash":
                node = ("minus", (node, part()))
            else:
                node = ("union", (*(node[1] if node[0] == "union" else (node,)), part()))
        return node

    def relation(self) -> tuple:
        nodes, operators = [self.ratio()], []
        while self.peek() in _RELATIONS:
            operators.append(self.take().strip("\\"))
            is_set = operators[-1] in ("=", "in")
            nodes.append(self.joined_sets(self.ratio) if is_set else self.ratio())
        if self.accept("\\pmod"):  # x = 3 (mod 7)
            nodes[-1] = ("mod", (nodes[-1], self.argument()))
        return ("rel", tuple(nodes), tuple(operators)) if operators else nodes[0]

    def ratio(self) -> tuple:
        nodes = [self.sum()]
        while self.depth == 0 and self.accept(":"):
            nodes.append(self.sum())
        return nodes[0] if len(nodes) == 1 else ("ratio", tuple(nodes))

    def sum(self) -> tuple:
        items = []
        sign = self.take() if self.at("\\pm", "\\mp") else ""
        while True:
            node = self.term()
            kind = {"-": "neg", "\\pm": "pm", "\\mp": "mp"}.get(sign)
            items.append((kind, node) if kind else node)
            if not self.at("+", "-", "\\pm", "\\mp"):
                return items[0] if len(items) == 1 else ("add", tuple(items))
            sign = self.take()

    def term(self) -> tuple:
        factors = [self.factor()]
        can_have_unit = factors[0][0] in ("num", "pct", "unit")
        while True:
            is_letter = can_have_unit and self.kind() == "letter" and not self.at("e", "i")
            if self.accept("*", "\\cdot", "\\times"):
                factors.append(self.factor())
            elif self.accept("/"):
                factors.append(("inv", self.factor()))
            elif self.kind() == "text" and factors[0][0] == "num" and self.peek() in _SCALES:
                factors.append(("pow", integer(10), integer(_SCALES[self.take()])))
            elif self.kind() == "text" or is_letter:  # 5 \text{m}
                return ("unit", product(factors), self.unit())
            elif self.peek() in _CURRENCIES and self.kind(1) != "number":  # 5 \euro
                return ("unit", product(factors), ((1, _CURRENCIES[self.take()]),))
            elif self.starts_factor():
                factors.append(self.power())
            else:
                return product(factors)

    def starts_factor(self) -> bool:
        if self.kind() == "number":  # 2^{3} 5^{2}, x3; not (2)1
            closers = (")", "}", "]", "|", "\\%", "!")
            return self.peek(1) in ("^", "!") or self.peek(-1) not in closers
        if self.kind() != "sign":
            return self.kind() in ("word", "function", "letter")
        value = self.peek()
        opens = value in _CLOSERS or value == "|" and not self.in_bars
        return opens or value[1:] in _OPENING or value[1:7] == "begin{"

    def factor(self) -> tuple:
        negative = False
        while self.at("+", "-"):
            negative ^= self.take() == "-"
        node = self.power()
        if negative and node[0] in ("unit", "pct"):
            return (node[0], ("neg", node[1]), *node[2:])
        if negative and node[0] == "num":
            return ("num", -node[1], node[2])
        return ("neg", node) if negative else node

    def power(self) -> tuple:
        node = self.atom()
        for _ in range(6):
            if self.accept("!"):
                node = ("fn", "factorial", (node,))
            elif self.accept("\\%"):
                node = ("pct", node)
            elif node[0] == "var" and self.accept("'"):
                node = ("var", node[1] + "'")
            elif node[0] == "var" and self.accept("_"):  # {g}_{k}
                node = ("var", f"{node[1]}_{self.subscript()}")
            elif self.accept("\\circ"):
                is_temperature = self.peek() in ("C", "F") and self.kind() != "sign"
                name = "deg" + self.take() if is_temperature else "deg"
                node = ("unit", node, ((1, name),))
            elif self.accept("^"):
                node = ("pow", node, self.exponent())
            else:
                break
        return node

    def exponent(self) -> tuple:
        self.deeper()
        node = self.factor() if self.at("+", "-") else self.atom()
        if self.accept("^"):
            node = ("pow", node, self.exponent())
        self.depth -= 1
        return node

    def atom(self) -> tuple:
        kind = self.kind()
        value = self.take()
        if not value:
            raise NotMath("ends too early")
        if kind == "number":
            return self.number(value)
        if kind in ("word", "letter"):
            return self.variable(value)
        if kind == "text":
            words = [value]
            while self.kind() == "text":
                words.append(self.take())
            return ("text", " ".join(words).lower())
        if kind == "function":
            return self.function(value)
        self.deeper()
        node = self.bracket(value) if value in _CLOSERS or value == "|" else self.command(value)
        self.depth -= 1
        return node

    def number(self, value: str) -> tuple:
        mantissa, _, exponent = value.lower().partition("e")
        if len(value) > MAX_DIGITS or exponent and abs(int(exponent)) > MAX_DIGITS:
            raise NotMath(f"a number of more than {MAX_DIGITS} digits")
        if self.at("_", "\\overline", "\\bar", "\\dot"):  # 1010_2, 0.\overline{3}
            sign, base = self.take(), self.subscript()
            if (sign, base) != ("_", "10"):
                return ("const", f"{value} {sign} {base}")
        if self.kind() == "number":
            raise NotMath("two numbers side by side")
        mantissa = mantissa.rstrip(".")
        is_decimal = "." in mantissa or exponent
        digits = max(len(mantissa.replace(".", "").lstrip("0")), 1) if is_decimal else 0
        return ("num", Fraction(mantissa) * Fraction(10) ** int(exponent or 0), digits)

    def variable(self, name: str) -> tuple:
        if name in ("e", "i") and not self.at("_"):
            return ("const", name)
        if self.accept("_"):
            name += "_" + self.subscript()
        if [self.peek(ahead) for ahead in range(3)] == ["(", "0", ")"]:  # I(0) is no product
            self.position += 3
            name += "(0)"
        return ("var", name)

    def subscript(self) -> str:
        """The text of {...} or of one token, as a part of a name."""
        if not self.accept("{"):
            if not self.peek():
                raise NotMath("ends in a subscript sign")
            return self.take().strip("\\")
        parts, depth = [], 1
        while self.peek():
            depth += self.at("{") - self.at("}")
            value = self.take()
            if depth == 0:
                return " ".join(parts)
            parts.append(value.strip("\\"))
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
                power = self.exponent()
        if self.at("(", "[", "{", "|", "\\{"):
            arguments = (self.atom(),)
        else:
            self.deeper()
            arguments = (self.function_argument(),)
            self.depth -= 1
        arguments = arguments if base is None else (*arguments, base)
        if power == integer(-1):
            return ("fn", {"sin": "asin", "cos": "acos", "tan": "atan"}.get(name, "?"), arguments)
        node = ("fn", name, arguments)
        return node if power is None else ("pow", node, power)

    def function_argument(self) -> tuple:
        """sin 2x cos x is sin(2x) cos(x); sin x / 2 is sin(x) / 2."""
        factors = [self.factor()]
        while self.starts_factor() and self.kind() != "function" and not self.at("(", "[", "d"):
            factors.append(self.power())
        return product(factors)

    def argument(self) -> tuple:
        """{...}, (...), or a single digit, letter or command: \\frac13, \\sqrt3."""
        kind, value = self.kind(), self.peek()
        if kind != "number" or not value.isdigit():
            return self.atom()
        if len(value) > 1:
            self.tokens[self.position] = (kind, value[1:])
        else:
            self.position += 1
        return integer(int(value[0]))

    def bracket(self, opener: str) -> tuple:
        if opener == "|":
            self.in_bars += 1
            node = self.sum()
            self.in_bars -= 1
            self.expect("|")
            return ("fn", "abs", (node,))
        bars, self.in_bars = self.in_bars, 0
        if self.accept("\\}", "}"):
            return ("set", ())
        items = self.items(",", ";")
        if opener == "{" and self.accept("\\over"):
            items[-1:] = [("mul", (items[-1], ("inv", self.sum())))]
        if not self.at(*_CLOSERS[opener]):
            raise NotMath(f"brackets do not match at {self.peek()!r}")
        self.in_bars = bars
        return self.bracketed(opener, self.take(), items)

    def bracketed(self, opener: str, closer: str, items: list[tuple]) -> tuple:
        if opener == "\\{" or opener == "{" and len(items) > 1:
            return ("set", tuple(items))
        if len(items) == 2 and "]" in (closer, opener.replace("[", "]")):
            return ("interval", *items, opener == "[", closer == "]")
        if opener + closer in ("(]", "[)") or len(items) > 1 and opener in ("\\lfloor", "\\lceil"):
            raise NotMath("brackets do not match")
        if opener in ("\\lfloor", "\\lceil"):
            return ("fn", "floor" if opener == "\\lfloor" else "ceil", tuple(items))
        if len(items) > 1:
            return ("tuple", tuple(items))
        return items[0]

    def command(self, value: str) -> tuple:
        name = value[1:]
        if name == "frac":
            return ("mul", (self.argument(), ("inv", self.argument())))
        if name in ("pi", "infty"):
            return ("const", "pi" if name == "pi" else "inf")
        if value in _CURRENCIES:
            return ("unit", self.factor(), ((1, _CURRENCIES[value]),))
        if name == "emptyset":
            return ("set", ())
        if name == "int":
            return self.integral()
        if value.startswith("\\begin{"):
            return self.matrix(value[7:-1])
        if name in _ACCENTS:
            return self.variable(f"{name} {self.subscript()}")
        if name in ("ldots", "angle", "triangle"):
            return ("text", name)
        if name in _GREEK:
            return self.variable(value)
        raise NotMath(f"unknown {value!r}")

    def integral(self) -> tuple:
        self.expect("_")
        low = self.argument()
        self.expect("^")
        high = self.exponent()
        body = self.sum()
        factors = list(body[1]) if body[0] == "mul" else []
        if len(factors) < 3 or factors[-2] != ("var", "d") or factors[-1][0] != "var":
            raise NotMath("an integral needs its dx")
        return ("integral", factors[-1][1], low, high, product(factors[:-2]))

    def matrix(self, environment: str) -> tuple:
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
        if len(rows[0]) == 1:  # a column is a vector
            return ("tuple", tuple(row[0] for row in rows))
        return ("matrix", tuple(("tuple", tuple(row)) for row in rows))

    def unit(self) -> tuple[tuple[str, int], ...]:
        """The unit behind a value, as powers of named units."""
        powers: dict[str, int] = {}
        sign = ahead = 1  # the exponent that "square" gives to the word behind it
        name = ""
        changes = False
        while self.kind() in ("text", "letter", "word") or self.at("/", "\\cdot", "*"):
            kind = self.kind()
            word = self.take().lower()
            if word in ("/", "per"):
                sign = -1
            elif word in _UNIT_EXPONENTS:
                ahead = _UNIT_EXPONENTS[word]
            elif word in ("unit", "units"):
                ahead = 1
            elif kind != "sign" and word not in _FILLER:
                name = unit_of(self.peek(-1))
                is_known = name in UNITS.values()
                is_plural = len(word) > 3 and word.endswith("s") and not _FRACTION.fullmatch(word)
                changes |= word in _CHANGING
                exponent = self.exponent() if self.accept("^") else integer(1)
                if exponent[0] != "num" or exponent[1] not in range(-9, 10):
                    raise NotMath("not a unit's power")
                powers[name] = powers.get(name, 0) + int(exponent[1]) * ahead * sign
                ahead = 1
        if ahead > 1 or changes or name and not (is_known or is_plural):
            powers["?"] = 1  # may be no unit: the number without it is another answer
        return tuple(sorted((power, name) for name, power in powers.items() if power))


def product(factors: list[tuple]) -> tuple:
    return factors[0] if len(factors) == 1 else ("mul", tuple(factors))
