"""The cases of tokenizer and chat template, and the tokenizer that they use: a byte-level BPE with
every byte, eight merges and four special tokens."""

from golden.cases import EXACT, document

SPECIAL = {"<|bos|>": 264, "<|im_start|>": 265, "<|im_end|>": 266, "<|endoftext|>": 267}
MERGES = ["t h", "th e", "Ġ the", "i n", "Ġ a", "a n", "1 2", "Ġ 1"]

CHATML = (
    "{% for message in messages %}\n"
    "    {% if loop.first and message['role'] != 'system' %}\n"
    "<|im_start|>system\nBe brief.<|im_end|>\n"
    "    {% endif %}\n"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}\n"
)
WITH_BOS = "{{ bos_token }}" + CHATML
TOKENIZER = {"file": "tokenizer/tokenizer.json"}
CONFIG = {"bos_token": "<|bos|>", "eos_token": "<|endoftext|>", "added_tokens_decoder": {}}
FILES = {"tokenizer.json": TOKENIZER, "tokenizer_config.json": CONFIG | {"chat_template": CHATML}}
OBJECTS = {  # special tokens as older files write them
    key: {"__type": "AddedToken", "content": CONFIG[key], "lstrip": False, "special": True}
    for key in ("bos_token", "eos_token")
}
CHAT = [{"role": "user", "content": " What is the sum of 1 and 12? "}]


def tokenizer() -> dict:
    """The tokenizer.json."""
    vocabulary = [*byte_letters(), *(merge.replace(" ", "") for merge in MERGES)]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": i, "content": text, "special": True} | plain for text, i in SPECIAL.items()]
    bos = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": {
            "direction": "Right",
            "max_length": 24,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": level | {"use_regex": True},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, sequence],
            "pair": [bos, sequence, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                "<|bos|>": {"id": "<|bos|>", "ids": [SPECIAL["<|bos|>"]], "tokens": ["<|bos|>"]}
            },
        },
        "decoder": level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(vocabulary)},
            "merges": [merge.split() for merge in MERGES],
        },
    }


def byte_letters() -> list[str]:
    """GPT-2's letter for each byte, in the order of bytes: itself where it is printable."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]


def documents() -> list[dict]:
    return [
        document("encode", "text", encode(), "exact", EXACT),
        document("decode", "text", decode(), "exact", EXACT),
        document("render_chat", "text", render_chat(), "exact", EXACT),
        document("encode_prompt", "text", encode_prompt(), "exact", EXACT),
        document("special_ids", "text", special_ids(), "exact", EXACT),
    ]


def encode() -> list:
    def of(text: str, add_special_tokens: bool = False) -> dict:
        files = {"tokenizer.json": TOKENIZER, "tokenizer_config.json": CONFIG}
        return {"files": files, "text": text, "add_special_tokens": add_special_tokens}

    long = "the sum of 1 and 12 and 12 and 12 and 12"
    return [
        ("plain", "merges_order", "Merges by rank, within a word.", of("the thin 112 an")),
        ("bos", "bos_left_out", "With special tokens: BOS comes first.", of("the sum", True)),
        ("no_bos", "bos_twice", "Without them: none.", of("the sum")),
        ("special", "special_token_split", "A special token in the text.", of("a<|im_end|>\nb")),
        ("bytes", "bytes_not_utf8", "Letters of two, three and four bytes.", of("é√𝟙")),
        ("long", "prompt_cut_off", "The file's truncation to 24 tokens is not applied.", of(long)),
        ("empty", "bos_left_out", "No text: BOS alone.", of("", True)),
    ]


def decode() -> list:
    def of(*ids: int) -> dict:
        files = {"tokenizer.json": TOKENIZER, "tokenizer_config.json": CONFIG}
        return {"files": files, "ids": list(ids)}

    return [
        ("plain", "merges_order", "Merged tokens.", of(258, 32, 257, 263)),
        (
            "special",
            "special_token_shown",
            "Special tokens are left out.",
            of(264, 97, 266, 98, 267),
        ),
        (
            "half_letter",
            "bytes_not_utf8",
            "The first byte of two alone, then a letter.",
            of(195, 97),
        ),
        ("whole_letter", "bytes_not_utf8", "Both bytes: one letter.", of(195, 169)),
        ("nothing", "special_token_shown", "Only a stop token: no text.", of(267)),
    ]


def render_chat() -> list:
    def of(
        template: str = CHATML, messages: list = CHAT, add_generation_prompt: bool = True, **config
    ) -> dict:
        config = CONFIG | {"chat_template": template} | config
        files = FILES | {"tokenizer_config.json": config}
        return {
            "files": files,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }

    talk = [{"role": "system", "content": "Count."}, *CHAT, {"role": "assistant", "content": "13"}]
    return [
        ("question", "generation_prompt", "One question, up to the assistant's turn.", of()),
        ("whole", "generation_prompt", "A whole talk.", of(CHATML, talk, False)),
        (
            "blanks",
            "template_blanks",
            "Blocks on lines of their own leave no blank and no newline.",
            of("  {% for m in messages %}\n  {{ m['content'] }}\n  {% endfor %}\nend"),
        ),
        ("bos", "template_variables", "The template writes BOS itself.", of(WITH_BOS)),
        (
            "bos_object",
            "special_token_object",
            "BOS is an object in tokenizer_config.json, and its content in the template.",
            of(WITH_BOS, **OBJECTS),
        ),
        (
            "json",
            "template_json",
            "tojson escapes no HTML and no letters, and keeps the order of the keys.",
            of("{{ messages[0] | tojson }}", [{"role": "user", "content": "a < b é"}]),
        ),
    ]


def encode_prompt() -> list:
    asked = "What is 1 + 12?"

    def of(
        prompt: str = "{problem}", chat: bool = False, context=(), template=CHATML, question=asked
    ) -> dict:
        files = FILES | {"tokenizer_config.json": CONFIG | {"chat_template": template}}
        inputs = {"files": files, "question": question, "prompt": prompt, "chat_template": chat}
        return inputs | {"context": [list(message) for message in context]}

    earlier = [("user", "Hello"), ("assistant", "Hi")]
    return [
        ("plain", "bos_left_out", "A base model's prompt begins with BOS.", of()),
        ("template", "prompt_template", "data.prompt around it.", of("Q: {problem}\nA:")),
        ("chat", "generation_prompt", "A chat: rendered, then encoded as it is.", of(chat=True)),
        (
            "chat_bos",
            "bos_twice",
            "The template wrote BOS already.",
            of(chat=True, template=WITH_BOS),
        ),
        (
            "chat_template",
            "prompt_template",
            "data.prompt is the user's message.",
            of("Think. {problem}", True),
        ),
        (
            "braces",
            "prompt_formatted",
            "Other braces of data.prompt stay as they are.",
            of("Put it in \\boxed{}. {problem}"),
        ),
        (
            "braces_of_question",
            "prompt_formatted",
            "So do those of the question.",
            of("Q: {problem}", question="Is {1} in {1, {2}}?"),
        ),
        (
            "context",
            "context_lost",
            "Messages before the question.",
            of(chat=True, context=earlier),
        ),
        (
            "plain_context",
            "context_lost",
            "As plain text: their contents and the question, an empty line between them.",
            of("Q: {problem}", context=earlier),
        ),
    ]


def special_ids() -> list:
    def of(chat: bool, vocab_size: int = 268, **files) -> dict:
        return {"files": FILES | files, "chat": chat, "vocab_size": vocab_size}

    generation = {"generation_config.json": {"eos_token_id": [267, 265]}}
    return [
        ("base", "stop_ids", "A base model: the tokenizer's EOS.", of(False)),
        ("chat", "stop_ids", "A chat also ends on the turn's end, which is its EOS.", of(True)),
        (
            "lists",
            "stop_ids",
            "EOS ids of generation_config.json (a list) and of config.json.",
            of(False, **generation, **{"config.json": {"eos_token_id": 266}}),
        ),
        (
            "objects",
            "special_token_object",
            "EOS is an object in tokenizer_config.json.",
            of(False, **{"tokenizer_config.json": FILES["tokenizer_config.json"] | OBJECTS}),
        ),
        ("wide", "unknown_ids_sampled", "Ids 268 to 271 have no token.", of(False, 272)),
        (
            "wide_with_eos",
            "unknown_ids_sampled",
            "An EOS id without a token is a stop id, and not unknown.",
            of(False, 272, **{"config.json": {"eos_token_id": 270}}),
        ),
    ]
