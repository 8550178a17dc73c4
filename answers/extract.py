"""The text of the answer in a response."""

import re

MAX_SENTENCE = 1000
TAIL_CHARS = 4000  # of the response in which formulas and numbers without a marker are looked for
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
_IS_THE_ANSWER = re.compile(
    r"(\$[^$\n]{1,200}\$|(?<![\w.,])-?\d[\d.,/]*\s?\\?%?|\b[A-J]\b)\)?\s+is\s+(?:the|our|my)\s+"
    r"(?:final\s+|correct\s+|right\s+)?answer\b"
)
_CHOICE = re.compile(r"\b(?:option|choice|choose|select|pick)\s+\(?([A-J])\b(?!')")
_ONLY_CHOICE = re.compile(r"[\s*(\\$]*([A-J])[\s*).\\$]*")
_END_OF_TEXT = re.compile(r"(?:\s*(?:<\|\w{1,20}\|>|</s>))+\s*$")
_AFTERTHOUGHT = re.compile(
    r"(?:,?\s+(?:which|where|because|since|so|when|if|as)\b|\s+\([^()$\\]*[a-z]{3,}\s[^()$\\]*\)$)"
)
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
    by and / or / comma; `#### x`; "answer is x" / "Answer: x"; "x is the answer"; the last formula
    or number, whichever comes later; the letter of a choice.
    """
    text = text[:-100] + _END_OF_TEXT.sub("", text[-100:])
    tagged = extract_tagged(text)
    if tagged is not None:
        return extract_boxed(tagged) or _behind_phrase(tagged) or tagged or None
    boxed = extract_boxed(text)
    if boxed or _CUT_OFF_BOX.search(text):  # "\\boxed{4" may have been going to be 42
        return boxed or None
    hashes = text.rfind("####")
    found = _HASHES.match(text, hashes) if hashes >= 0 else None
    if found:
        return found[1].strip().strip("*").strip() or None
    return (
        _behind_phrase(text)
        or _before_phrase(text[-TAIL_CHARS:])
        or _last_formula(text[-TAIL_CHARS:])
        or _chosen(text[-TAIL_CHARS:])
    )


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
    boxes = [box for box in _boxes(text) if text[box[1] : box[2]].strip()]
    if not boxes:
        bare = re.findall(r"\\boxed\s*([^\s{}$\\.,]+)", text)
        return bare[-1] if bare else None
    boxes.sort()
    contents = [text[boxes[-1][1] : boxes[-1][2]].strip()]
    for before, after in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
        between = text[before[2] + 1 : after[0]]
        if (
            len(between) > 40
            or not re.search(r"[,;]|\band\b|\bor\b", between)
            or not _BOX_JOINER.fullmatch(between)
        ):
            break
        contents.append(text[before[1] : before[2]].strip())
    percent = "\\%" if len(contents) == 1 and _PERCENT_BEHIND.match(text, boxes[-1][2] + 1) else ""
    return ", ".join(dict.fromkeys(reversed(contents))) + (
        percent if "%" not in contents[0] else ""
    )


def _boxes(text: str) -> list[tuple[int, int, int]]:
    """(start of the command, start and end of the content) of every closed \\boxed{}."""
    open_braces, boxes = [], []
    for mark in _BRACES.finditer(text):
        if mark.group() == "}":
            opened = open_braces.pop() if open_braces else None
            if opened:
                boxes.append((*opened, mark.start()))
        elif mark.group() == "{":
            open_braces.append(None)
        elif mark.group()[1].isalpha():
            open_braces.append((mark.start(), mark.end()))
    return boxes


def _behind_phrase(text: str) -> str | None:
    """What follows the last "answer is" or "Answer:" in its sentence, without prose."""
    found = None
    for found in _PHRASE.finditer(text):  # noqa: B007  the last
        pass
    if found is None:
        return None
    rest = text[found.end() : found.end() + TAIL_CHARS].lstrip(" \t\n:*#_")
    adverb = _ADVERB.match(rest)
    rest = rest[adverb.end() :] if adverb else rest
    display = _DISPLAY.match(rest)
    if display and not re.match(r"\s*(?:,|and\b|or\b)", rest[display.end() :]):
        return max(display.groups(""), key=len).strip() or None
    end = _SENTENCE_END.search(rest)
    sentence = (rest[: end.start()] if end else rest)[:MAX_SENTENCE].strip(' *_`"')
    letter = re.match(r"\(?([A-J])\)?,?\s+(?!and\b|or\b)[a-z]{2,}", sentence)
    return (letter[1] if letter else _without_prose(sentence)) or None


def _before_phrase(text: str) -> str | None:
    """42 of "42 is the answer"."""
    found = _IS_THE_ANSWER.findall(text)
    return found[-1].strip() if found else None


def _chosen(text: str) -> str | None:
    only = _ONLY_CHOICE.fullmatch(text)
    chosen = [only[1]] if only else _CHOICE.findall(text)
    return chosen[-1] if chosen else None


def _without_prose(sentence: str) -> str:
    """Of "the largest n is 34" the 34, of "$x$ where $x=5$" the first formula.

    Formulas joined by "and" stay together."""
    sentence = (
        _AFTERTHOUGHT.split(sentence, maxsplit=1)[0]
        if not sentence.startswith(("where", "if", "when"))
        else sentence
    )
    formulas = _formulas(sentence)
    outside = sentence
    for _, start, end in reversed(formulas):
        outside = outside[:start] + outside[end:]
    if formulas and not re.fullmatch(
        r"[\s,;.$]*(?:(?:and|or)[\s,;.$]*)*(?:\\?%|[A-Za-z]{1,12}\s?[\^\d]*|percent|pct)?[\s,.]*",
        outside,
    ):
        values = _VERB.split(sentence)[1:]
        return (
            _without_prose(values[-1])
            if values and not sentence.startswith(("$", "\\("))
            else _groups(sentence)[0][0]
        )
    if formulas:
        return sentence
    subject, *values = _VERB.split(sentence)
    if values and re.search(r"[a-z]{2}", subject):
        return _without_prose(values[-1])
    lead_in = re.match(r"(?:[A-Za-z']{2,}[\s,:]+)+(?=[-−\d\\(\[√π.]*[\d\\√π])", sentence)
    return sentence[lead_in.end() :] if lead_in else sentence


def _last_formula(text: str) -> str | None:
    """The last formula or the last number, whichever comes later.

    A formula without digits gives way to a number."""
    formula, formula_end = _groups(text)[-1] if "$" in text or "\\" in text else ("", 0)
    behind = None
    for behind in _LAST_NUMBER.finditer(text, formula_end):  # noqa: B007  the last
        pass
    if behind:
        return behind.group().rstrip(",").strip()
    if formula and (any(c.isdigit() for c in formula) or len(formula) > 2):
        return formula
    numbers = _LAST_NUMBER.findall(text)
    return numbers[-1].rstrip(",").strip() if numbers else formula or None


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
    """(content, start, end) of what stands between maths delimiters; of money, nothing."""
    found = [
        (max(m.groups(""), key=len).strip(), m.start(), m.end()) for m in _DISPLAY.finditer(text)
    ]
    dollars = [m.start() for m in _DOLLAR.finditer(text)]
    i = 0
    while i + 1 < len(dollars):
        start, end = dollars[i], dollars[i + 1]
        content = text[start + 1 : end]
        bare = re.sub(r"\\[a-zA-Z]+\s*(?:\{[^{}]*\})?", "", content)
        if content.strip() and "\n" not in content.strip("\n") and not _PROSE.search(bare):
            found.append((content.strip(), start, end + 1))
            i += 2
        else:
            i += 1
    return sorted((f for f in found if f[0]), key=lambda f: f[2])
