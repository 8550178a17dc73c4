"""The text of the answer in a response."""

import re

TAIL_CHARS = 4000  # in which formulas and numbers without a marker are looked for
_BRACES = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{|\\[{}\\]|[{}]")
_CUT_OFF_BOX = re.compile(r"\\boxed\s*\{(?!\s*\})")
_BOX_JOINER = re.compile(
    r"[\s$.\\()\[\]]*(?:,|;|\\text\s*\{|\\quad|and\b|or\b|\\ |[\s}$])*(?<=[,;\s$}dr])[\s$\\()\[\]]*"
)
_PERCENT_BEHIND = re.compile(r"\s*(?:\$|\\\)|\\\])?\s*(?:\\?%|percent\b|pct\b)")
_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_PHRASE = re.compile(
    r"\b(?:answer|(?:correct|right|best) (?:option|choice))\b\**(?:\s+to\s[^.\n:]{0,80}?)?"
    r"(?:\s{1,9}(?:is|are)\b|\s{0,9}[:=])(?:\s*:)?|<answer>",
    re.IGNORECASE,
)  # an unclosed tag: generation stopped at </answer>
_ADVERB = re.compile(r"(?:therefore|thus|hence|then|simply|just|clearly|indeed)\b[,:\s]*")
_END_OF_TEXT = re.compile(r"(?:\s*(?:<\|\w{1,20}\|>|</s>))+\s*$")
_AFTERTHOUGHT = re.compile(
    r"(?:,?\s+(?:which|where|because|since|so|when|if|as)\b|\s+\([^()$\\]*[a-z]{3,}\s[^()$\\]*\)$)"
)
_ONLY_FORMULAS = re.compile(  # and what joins them, or a unit
    r"[\s,;.$]*(?:(?:and|or)[\s,;.$]*)*(?:\\?%|[A-Za-z]{1,12}\s?[\^\d]*|percent|pct)?[\s,.]*"
)
_LEAD_IN = re.compile(r"(?:[A-Za-z']{2,}[\s,:]+)+(?=[-−\d\\(\[√π.]*[\d\\√π])")
_FORMULA_JOINER = re.compile(r"\s*(?:,|;|,?\s*and|,?\s*or)\s*")
_VERB = re.compile(r"\s(?:is|are|equals)\s+")
_SENTENCE_END = re.compile(r"[.!?](?=\s|\*|$)|\n")
_DISPLAY = re.compile(r"\\\[(.{1,2000}?)\\\]|\\\((.{1,2000}?)\\\)|\$\$(.{1,2000}?)\$\$", re.DOTALL)
_DOLLAR = re.compile(r"(?<!\\)\$")
_PROSE = re.compile(r"(?<![\\A-Za-z{])(?!sin|cos|tan|log|and|mod)[A-Za-z]?[a-z]{2,}")
_LAST_NUMBER = re.compile(
    r"(?:(?<![\w)])[-−])?(?<![A-Za-z_\d.,])"
    r"(?:\d+ \d+/\d+|\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?(?:/\d+)?|\.\d+)"
    r"(?:\^\d+)?(?:\s?π)?(?:\s?\\?%)?(?: or \d+)?"
)


def extract_answer(text: str) -> str | None:
    """The text of the final answer, or None.

    In this order, the last of its kind winning: <answer>x</answer>; \\boxed{x}, or several joined
    by and / or / comma; `#### x`; "answer is x" / "Answer: x"; the last formula or number,
    whichever comes later.
    """
    text = text[:-100] + _END_OF_TEXT.sub("", text[-100:])
    tagged = extract_tagged(text)
    if tagged is not None:
        return extract_boxed(tagged) or _behind_phrase(tagged) or tagged or None
    boxed = extract_boxed(text)
    if boxed or _CUT_OFF_BOX.search(text):  # "\\boxed{4" may be the start of 42
        return boxed or None
    hashes = text.rfind("####")
    found = _HASHES.match(text, hashes) if hashes >= 0 else None
    if found:
        return found[1].strip().strip("*").strip() or None
    return _behind_phrase(text) or _last_formula(text[-TAIL_CHARS:])


def extract_tagged(text: str) -> str | None:
    """What stands in the last <answer>...</answer>, or None."""
    for tag in ("answer>", "ANSWER>", "Answer>"):
        end = text.rfind("</" + tag)
        start = text.rfind("<" + tag, 0, end) if end >= 0 else -1
        if start >= 0:
            return text[start + 1 + len(tag) : end].strip()
    return None


def extract_boxed(text: str) -> str | None:
    """What the last closed \\boxed{...} holds, with the boxes joined to it by and / or / comma.

    Braces nest to any depth. A percent sign right behind the box belongs to it. None without one.
    """
    if "box" not in text:
        return None
    boxes = sorted(box for box in _boxes(text) if text[box[1] : box[2]].strip())
    if not boxes:
        bare = re.findall(r"\\boxed\s*([^\s{}$\\.,]+)", text)
        return bare[-1] if bare else None
    first = len(boxes) - 1
    while first and _is_joint(text[boxes[first - 1][2] + 1 : boxes[first][0]]):
        first -= 1
    contents = [text[start:end].strip() for _, start, end in boxes[first:]]
    is_percent = len(contents) == 1 and _PERCENT_BEHIND.match(text, boxes[-1][2] + 1)
    return ", ".join(dict.fromkeys(contents)) + (
        "\\%" if is_percent and "%" not in contents[0] else ""
    )


def _is_joint(between: str) -> bool:
    if len(between) > 40 or not re.search(r"[,;]|\band\b|\bor\b", between):
        return False
    return _BOX_JOINER.fullmatch(between) is not None


def _boxes(text: str) -> list[tuple[int, int, int]]:
    """(start of the command, start and end of the content) of every closed \\boxed{}."""
    open_braces, boxes = [], []
    for mark in _BRACES.finditer(text):
        if mark[0] == "}":
            opened = open_braces.pop() if open_braces else None
            if opened:
                boxes.append((*opened, mark.start()))
        elif mark[0] == "{" or mark[0][1].isalpha():
            open_braces.append((mark.start(), mark.end()) if len(mark[0]) > 1 else None)
    return boxes


def _last(pattern: re.Pattern, text: str, start: int = 0) -> re.Match | None:
    found = None
    for match in pattern.finditer(text, start):
        found = match
    return found


def _behind_phrase(text: str) -> str | None:
    """What follows the last "answer is" or "Answer:" in its sentence, without prose."""
    found = _last(_PHRASE, text)
    if found is None:
        return None
    rest = text[found.end() : found.end() + TAIL_CHARS].lstrip(" \t\n:*#_")
    rest = _ADVERB.sub("", rest, count=1) if _ADVERB.match(rest) else rest
    display = _DISPLAY.match(rest)
    if display and not re.match(r"\s*(?:,|and\b|or\b)", rest[display.end() :]):
        return max(display.groups(""), key=len).strip() or None
    sentence = _SENTENCE_END.split(rest, maxsplit=1)[0][:1000].strip(' *_`"')
    letter = re.match(r"\(?([A-J])\)?,?\s+(?!and\b|or\b)[a-z]{2,}", sentence)
    return (letter[1] if letter else _without_prose(sentence)) or None


def _without_prose(sentence: str) -> str:
    """Of "the largest n is 34" the 34, of "$x$ where $x=5$" the first formula.

    Formulas joined by "and" stay together."""
    if not sentence.startswith(("where", "if", "when")):
        sentence = _AFTERTHOUGHT.split(sentence, maxsplit=1)[0]
    subject, *values = _VERB.split(sentence)
    formulas = _formulas(sentence)
    if not formulas:
        if values and re.search(r"[a-z]{2}", subject):
            return _without_prose(values[-1])
        lead_in = _LEAD_IN.match(sentence)
        return sentence[lead_in.end() :] if lead_in else sentence
    outside = sentence
    for _, start, end in reversed(formulas):
        outside = outside[:start] + outside[end:]
    if _ONLY_FORMULAS.fullmatch(outside):
        return sentence
    if values and not sentence.startswith(("$", "\\(")):
        return _without_prose(values[-1])
    return _groups(sentence)[0][0]


def _last_formula(text: str) -> str | None:
    """The last formula or the last number, whichever comes later.

    A formula without digits gives way to a number."""
    formula, formula_end = _groups(text)[-1] if "$" in text or "\\" in text else ("", 0)
    number = _last(_LAST_NUMBER, text, formula_end)
    if number is None and not any(c.isdigit() for c in formula) and len(formula) < 3:
        number = _last(_LAST_NUMBER, text)
    return number[0].rstrip(",").strip() if number else formula or None


def _groups(text: str) -> list[tuple[str, int]]:
    """(content, end) of the formulas, those joined by "and", "or" or a comma taken together.

    [("", 0)] without any."""
    groups: list[tuple[str, int]] = [("", 0)]
    for content, start, end in _formulas(text):
        if groups[-1][0] and _FORMULA_JOINER.fullmatch(text, groups[-1][1], start):
            groups[-1] = (f"{groups[-1][0]}, {content}", end)
        else:
            groups.append((content, end))
    return groups[1:] or groups


def _formulas(text: str) -> list[tuple[str, int, int]]:
    """(content, start, end) of what stands between maths delimiters, except sums of money."""
    found = [
        (max(m.groups(""), key=len).strip(), m.start(), m.end()) for m in _DISPLAY.finditer(text)
    ]
    dollars = [m.start() for m in _DOLLAR.finditer(text)]
    while len(dollars) > 1:
        start, end = dollars[0], dollars[1]
        content = text[start + 1 : end]
        bare = re.sub(r"\\[a-zA-Z]+\s*(?:\{[^{}]*\})?", "", content)
        is_formula = "\n" not in content.strip("\n") and not _PROSE.search(bare)
        if content.strip() and is_formula:
            found.append((content.strip(), start, end + 1))
        dollars = dollars[2:] if content.strip() and is_formula else dollars[1:]
    return sorted((f for f in found if f[0]), key=lambda f: f[2])
