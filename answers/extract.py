"""The text of the answer in a response."""

import re

LOOK_BACK = 20_000  # characters from the end in which an answer is looked for
_BRACES = re.compile(r"\\?(?:boxed|fbox|framebox)\s{0,9}\{|\\[{}\\]|[{}]")
_BARE_BOX = re.compile(r"\\boxed\s{0,9}(-?\.?\d[\d.,/]*)")
_JOINT = re.compile(
    r"(?s)(?=.{0,40}\Z)(?=.*?(?:[,;]|\band\b|\bor\b))"
    r"[\s$.\\()\[\]]{0,9}(?:,|;|\\text\s?\{|\\quad|and\b|or\b|\\ |[\s}$]){0,9}"
    r"(?<=[,;\s$}dr])[\s$\\()\[\]]{0,9}"
)
_PERCENT_BEHIND = re.compile(r"\s{0,9}(?:\$|\\\)|\\\])?\s{0,9}(?:\\?%(?! of)|per ?cent\b|pct\b)")
_CHANGED_BEHIND = re.compile(
    r"[a-fi-knp-rt-z](?![A-Za-z])|!\$|\s{0,9}(?:(?<!\n)[-+*/]\s?[\d(]|\^\{?[\da-z]|[inxyz]\$"
    r"|\$? ?or\s|\$?(?:, ?|,? (?:and|or) )\$?-?\d|[-+*/]?\s?\\(?:pi|cdot|times|sqrt|d?frac)\b"
    r"|(?:\\text\{)?\s?(?:hundred|thousand|[mbtr]{1,2}illion|dozen|k)\b)"
)
_CHANGED_BEFORE = re.compile(
    r"(?:\w[-+*/]|[\d)}] ?[-+*/] ?|[\w)}] ?(?<!answer)[<>] ?|[≤≥±≠] ?|\\(?:[lg]eq?|[lg]t"
    r"|cdot|times|pm|mp|d?frac|sqrt|log|ln|sin|cos|tan|neq?|not)\b ?|n't be |\b(?:minus|negative"
    r"|not|cannot be|least|most|than|twice|half of|plus|times) )[$({]{0,2}$"
    r"|(?:[/^|\d]|[\d\]]\}?\{)\{?$",
    re.IGNORECASE,
)
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_HASHES = re.compile(r"####(?!#)[ \t]*(?!\W*(?:[A-Z][a-z]+ ){0,3}[A-Z]?[a-z]+ *\d*:?\**\n)([^\n]+)")
_PHRASE = re.compile(
    r"\b(?:answer|(?:correct|right|best) (?:option|choice))(?:'s)?\b\**(?:\s+to\s[^.\n:]{0,80}?)?"
    r"(?:\s{1,9}(?:is|are|equals|(?:must|should|would|will) be|comes out to)\b|\s{0,9}[:=]\**"
    r"|\**:?\**\s{0,9}(?=\n|\$|\\[(\[]|\d))(?:\s{0,9}:)?|\bI(?:'d| would| will)? (?:pick|choose)\b",
    re.IGNORECASE,
)
_END_OF_TEXT = re.compile(
    r"(?:\s{0,9}(?:<\|\w{1,20}\|>(?:user)?|</s>|I hope it is correct\.?)){1,9}$"
)
_AFTERTHOUGHT = re.compile(
    r",?\s(?:which|where|because|since|so|as)\b|\s\((?:since|because|as)\b|\s\([a-z]+ [a-z ]+\)$"
    r"|\s[—–]\s(?=[A-Za-z])"
)
_CONTRAST = re.compile(r", (?:and |but )?not [^,;]*$")
_CLAUSE = re.compile(r"(?<=\d) ([a-z ]*[a-z]s) (?:that|who|to|in|of|for|such that) [^\d]*$")
_TAIL = re.compile(r"(?:,? in (?:total|all)| is (?:it|(?:the|our|my) (?:final |correct )?answer))$")
_DOUBT = re.compile(
    r"\b(?:not|cannot|never|wrong|incorrect|unless|except|impossible|unlikely|tempting|mistaken"
    r"|extraneous|invalid|false|misread|might|may|doubt|suppose|assume|try|perhaps"
    r"|maybe|wants?|hoped?|if|guess)\b|n't\b",
    re.IGNORECASE,
)
_CHOICE = re.compile(r"[\s$*(]{0,9}[A-J][\s$*).]{0,9}")
_LOWER_CHOICE = re.compile(r"\(?[a-d]\)?")
_WITHDRAWN = re.compile(
    r"\?\s{0,9}(?:no|or)\b|\.\s{0,9}(?:no,|hmm|but \W?\d)"
    r"|^\W{0,9}(?:is|was) (?:wrong|incorrect|not)\b"
    r"|\b(?:wait|sorry|oops|actually|alternatively|on reflection|correction)\b"
    r"|\b(?:could|might) (?:also )?be\b|\b(?:that|this|it|which) (?:is|was) (?:wrong|incorrect)",
    re.IGNORECASE,
)
_MORE_VALUES = re.compile(r"(?i)\W*(?:(?:and|or|also)\W+)*\\?[\d\W]*\d[\d\W]*")
_VERB = re.compile(
    r"(?:^|(?<!\bor)\s)(?:is|are|was|were|be|equals?|gets?|gives?|giving|have|has|had|makes?|pays?"
    r"|paid|costs?|earns?|earned|needs?|runs?|sold|spent|bought|takes?|obtain|find"
    r"|yields?|contains?|result"
    r"|(?:increases|decreases|grew|rose|fell) by|so|thus|hence|then|therefore|it's)(?:\s*:)?,?\s+",
    re.IGNORECASE,
)
_LEAD_IN = re.compile(
    r"^(?:(?:the|an?|our|about|approximately|roughly|exactly|just|only|simply|equal|to|in|total of"
    r"|total|values?|solutions?|interval(?= \W)|point(?= [($\\])|pair|ordered|set"
    r"|option(?= \(?[A-J])|result|we|it|there|ratio|final|probability|area"
    r"|length)\b[\s,:]+|[:=]\s*){1,20}"
)
_CHANGING = re.compile(  # words beside a formula that make another value of it
    r"(?i)\d|\\(?!\()|\b(?:than|least|most|half|twice|double|times|minus|negative|plus|roots?"
    r"|squared?|cubed?|sum|product|third|percent|dozen|hundred|thousand|[mb]illion|over|under"
    r"|below|above|let|error|step|case|when|between|from|mod|or|and|but|less|no|add|subtract"
    r"|multipl\w+|divid\w+|set|because|exceeds?|exclud\w+|bounded|smaller|larger|factor"
    r"|remainder|without|fails?|short)\b"
)
_FORMULAS = re.compile(r"\$[^$\s][^$]*(?<!\s)\$(?:(?:,|,? and|,? or) ?\$[^$]+\$){0,20}")
_MONEY = re.compile(r"(?<=[a-z] )\$(\d[\d,]*(?:\.\d+)?)(?=,?\s|$)")
_SENTENCE_END = re.compile(r"[.!?](?=\s|\*|$)|\n")
_DISPLAY = re.compile(r"\\\[([^\[\]]{1,2000}?|.{1,2000}?)\\\]|\$\$([^$]{1,2000})\$\$", re.DOTALL)


def final_part(text: str) -> str:
    """The last LOOK_BACK characters of what stands behind </think>; "" if it is not closed."""
    closed = text.rfind("</think>")
    if text.rfind("<think>") > closed:
        return ""
    return text[max(closed + 8 if closed >= 0 else 0, len(text) - LOOK_BACK) :]


def extract_answer(text: str) -> str | None:
    """The text of the final answer, or None.

    What stands behind </think> is read, alone. The last marker counts: <answer>x</answer>,
    \\boxed{x} (or several joined by and / or / comma), `#### x`, "the answer is x" / "Answer: x".
    An empty or unclosed box is no answer. Without a marker it is the value that the last sentence
    gives.
    """
    text = final_part(text).rstrip()
    text = text[:-200] + _END_OF_TEXT.sub("", text[-200:])
    tag, inner = _tagged(text)
    boxes = _boxes(text)
    if boxes is None:
        return None
    hashes = _last(_HASHES, text, boxes)
    phrase = _last(_PHRASE, text, boxes)
    starts = [m.start() if m else -1 for m in (hashes, phrase)]
    box = boxes[-1][0] if boxes else -1
    last = max(tag, box, *starts)
    if last < 0:
        stated = None if text.endswith(("?", ",", "+", "=")) else _stated(text)
        return text if _CHOICE.fullmatch(text) else stated
    if 0 <= tag <= last <= tag + len(inner):
        text = text[: text.find(inner, tag) + len(inner)]
        if last == tag:
            return inner.strip() or None
    if last == box:
        behind = text[boxes[-1][2] + 1 :]
        return None if _WITHDRAWN.search(behind) else _joined(text, boxes)
    if last == starts[0]:
        return None if _WITHDRAWN.search(text, hashes.end()) else _value(hashes[1]) or None
    return _behind_phrase(text, phrase)


def extract_tagged(text: str) -> str | None:
    """What stands in the last <answer>...</answer>, or None."""
    start, inner = _tagged(text[-LOOK_BACK:])
    return inner.strip() if start >= 0 else None


def extract_boxed(text: str) -> str | None:
    """What the last \\boxed{...} holds, with the boxes joined to it by and / or / comma.

    Braces nest to any depth. A percent sign right behind the box belongs to it. None without one.
    """
    boxes = _boxes(text[-LOOK_BACK:]) if "box" in text else None
    return _joined(text[-LOOK_BACK:], boxes) if boxes else None


def _tagged(text: str) -> tuple[int, str]:
    """(start, content) of the last <answer>, which the text may end in; (-1, "") without one."""
    tags = list(_TAG.finditer(text))
    opened = [i for i, tag in enumerate(tags) if not tag[1]]
    if not opened:
        return -1, ""
    i = opened[-1]
    end = tags[i + 1].start() if i + 1 < len(tags) else len(text)
    return tags[i].start(), text[tags[i].end() : end]


def _boxes(text: str) -> list[tuple[int, int, int]] | None:
    """(start of the command, start and end of the content) of the outermost boxes, or None when the
    last is not closed."""
    open_braces, boxes, depth = [], [], 0
    for mark in _BRACES.finditer(text):
        if mark[0] == "}":
            opened = open_braces.pop() if open_braces else None
            if opened:
                depth -= 1
                if not depth:
                    boxes.append((*opened, mark.start()))
        elif mark[0] == "{" or mark[0][-1] == "{" and len(mark[0]) > 2:
            is_box = len(mark[0]) > 1
            depth += is_box
            open_braces.append((mark.start(), mark.end()) if is_box else None)
    bare = [(m.start(), m.start(1), m.end(1)) for m in _BARE_BOX.finditer(text)]
    return None if depth else sorted(boxes + bare)


def _joined(text: str, boxes: list[tuple[int, int, int]]) -> str | None:
    first = len(boxes) - 1
    while first and _JOINT.fullmatch(text, boxes[first - 1][2] + 1, boxes[first][0]):
        first -= 1
    contents = [text[start:end].strip() for _, start, end in boxes[first:]]
    before, behind = text[: boxes[first][0]][-20:], text[boxes[-1][2] + 1 :][:40]
    if not contents[-1] or _CHANGED_BEFORE.search(before) or _CHANGED_BEHIND.match(behind):
        return None
    is_negative = re.search(r"(?<!-)-\$?$", before)
    is_percent = len(contents) == 1 and _PERCENT_BEHIND.match(behind) and "%" not in contents[0]
    joined = ", ".join(dict.fromkeys(contents)) + ("\\%" if is_percent else "")
    return f"-({joined})" if is_negative else joined


def _last(pattern: re.Pattern, text: str, boxes: list[tuple[int, int, int]]) -> re.Match | None:
    """The last match outside of all boxes."""
    found, spans = None, iter([*boxes, (len(text), 0, len(text))])
    start, _, end = next(spans)
    for match in pattern.finditer(text):
        while match.start() > end:
            start, _, end = next(spans)
        found = match if match.start() < start else found
    return found


def _behind_phrase(text: str, phrase: re.Match) -> str | None:
    """What follows "answer is" or "Answer:" in its sentence; None if it is doubted or withdrawn."""
    before = _SENTENCE_END.split(text[: phrase.start()][-300:])[-1]
    rest = _one_line(text[phrase.end() :].lstrip(" \t\n:*#_"))
    end = _SENTENCE_END.search(rest)
    sentence, behind = (rest[: end.start()], rest[end.start() :]) if end else (rest, "")
    sentence = _AFTERTHOUGHT.split(sentence, maxsplit=1)[0] or sentence
    withdrawn = _WITHDRAWN.search(rest, len(sentence))
    is_doubted = _DOUBT.search(before.rpartition(";")[2]) or withdrawn or behind[:1] == "?"
    if is_doubted or not sentence.isalpha() and _MORE_VALUES.fullmatch(behind[:200]):
        return None
    value = _value(sentence) or None
    return value.upper() if value and _LOWER_CHOICE.fullmatch(value) else value


def _one_line(text: str) -> str:
    """The text with each displayed formula on a line of its own."""
    return _DISPLAY.sub(lambda m: "$" + " ".join((m[1] or m[2]).split()).rstrip(".") + "$", text)


def _stated(text: str) -> str | None:
    """The value of the last sentence, without a marker: the last formula among words that change
    nothing, or what stands behind the verb."""
    text = _one_line(text[-4000:]).replace("\\(", "$").replace("\\)", "$").strip(' \t\n*_`"')
    sentence = next((s for s in reversed(_SENTENCE_END.split(text)) if s.strip(" *_`")), "")
    if _DOUBT.search(_CONTRAST.sub("", sentence)):
        return None
    if sentence.count("$") == 1:
        sentence = _MONEY.sub(r"$\1$", sentence)
    value = _value(sentence)
    for part in (value, sentence):
        formulas = list(_FORMULAS.finditer(part))
        if formulas and not _CHANGING.search(_FORMULAS.sub(" ", part)):
            return formulas[-1][0]
    return value if re.search(r"[\d√π\\$=]", value) else None


def _value(sentence: str) -> str:
    """The value that a sentence gives, whole: of "the largest n is 34" the 34.

    A sentence of doubt is not taken apart."""
    sentence = sentence.strip(' *_`"')
    sentence = _CLAUSE.sub(r" \1", _TAIL.sub("", _CONTRAST.sub("", sentence)))
    if _DOUBT.search(sentence):
        return sentence
    value = _VERB.split(sentence)[-1].strip()
    return _LEAD_IN.sub("", value).replace("\\(", "$").replace("\\)", "$")
