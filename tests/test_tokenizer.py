"""data/tokenizer.py against transformers: ids of plain and chat prompts, text of the chat
template, stop ids."""

import json

import pytest
import transformers
from conftest import ROOT
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HFTokenizer

from config import UserError
from data.tokenizer import Tokenizer

CORPUS = [
    "What is 12 + 345 = 357? The quick brown fox jumps over the lazy dog, and then it's over.\n\n",
    "Please reason step by step, and put your final answer within \\boxed{}. "
    "Nombre naïf, größer, 数学题, 😀.\n",
    "system user assistant You are a helpful assistant. Cutting Knowledge Date: 2024\t"
    "def f(x):\n    return x\n",
]
TEXTS = [
    *("", " ", "  two leading spaces", "trailing ", "\n", "\n\n \n"),
    *("What is 12345678901234567890?", "it's WHAT'LL 1,234.5e-6"),
    *("größer naïve e\u0301 \u2212", "数学题 😀👩\u200d🚀", "<s>hi</s> there"),
    "a<|eot|>b",
    *(" <|eot|> c\n<|bos|>", "<|bos|><|bos|>x", "\\boxed{\\frac{1}{2}}\t$x$"),
    *("\u00a0\ufeff\x00", "<|eo|t>"),
]
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = ["<|bos|>", "<|eot|>", "<|end|>"]
LLAMA2_SPECIALS = ["<unk>", "<s>", "</s>"]


def byte_level(split: str, bos: bool) -> HFTokenizer:
    """Byte-level BPE: of Qwen, or with digits in groups of three and a BOS of Llama 3."""
    t = HFTokenizer(models.BPE())
    t.normalizer = None if bos else normalizers.NFC()
    byte_pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    t.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated"), byte_pieces]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    t.add_special_tokens(SPECIALS)
    t.decoder = decoders.ByteLevel()
    t.post_processor = processors.ByteLevel(trim_offsets=False)
    if bos:
        template = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", t.token_to_id("<|bos|>"))]
        )
        t.post_processor = processors.Sequence([t.post_processor, template])
    return t


def sentencepiece_bpe() -> HFTokenizer:
    """BPE with byte fallback as converted from SentencePiece: Llama 2, TinyLlama."""
    pieces = HFTokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    pieces.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=[*LLAMA2_SPECIALS, *bytes_],
        limit_alphabet=60,
        show_progress=False,
    )
    pieces.train_from_iterator(CORPUS, trainer)
    value = json.loads(pieces.to_str())
    value["added_tokens"] = [
        token for token in value["added_tokens"] if token["content"] in LLAMA2_SPECIALS
    ]
    t = HFTokenizer.from_str(json.dumps(value))
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    t.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return t


def unigram() -> HFTokenizer:
    t = HFTokenizer(models.Unigram())
    t.normalizer, t.pre_tokenizer, t.decoder = (
        normalizers.NFKC(),
        pre_tokenizers.Metaspace(),
        decoders.Metaspace(),
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=LLAMA2_SPECIALS, unk_token="<unk>", show_progress=False
    )
    t.train_from_iterator(CORPUS, trainer)
    t.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return t


def added(text: str) -> dict:
    """A special token as older tokenizer_config.json files write it."""
    return {
        "__type": "AddedToken",
        "content": text,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
    }


NEW_NAMES = {"bos_token": "<|bos|>", "eos_token": "<|eot|>", "pad_token": added("<|end|>")}
OLD_NAMES = {"bos_token": added("<s>"), "eos_token": "</s>", "unk_token": "<unk>"}
TOKENIZERS = {
    "qwen": (
        lambda: byte_level(QWEN_SPLIT, bos=False),
        {"tokenizer_class": "Qwen2Tokenizer", **NEW_NAMES},
    ),
    "llama3": (
        lambda: byte_level(QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|"), bos=True),
        NEW_NAMES,
    ),
    "llama3-split": (
        lambda: byte_level(QWEN_SPLIT, bos=True),
        NEW_NAMES | {"split_special_tokens": True},
    ),
    "llama2": (sentencepiece_bpe, OLD_NAMES),
    "unigram": (unigram, OLD_NAMES),
}


def write_checkpoint(path, name: str = "llama3", **config) -> None:
    build, names = TOKENIZERS[name]
    build().save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64} | names | config
    (path / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_equal_transformers(name, tmp_path):
    """Fault: a base model's prompt lacks its BOS, a chat's gets a second one, or special tokens in
    the text are cut into letters."""
    write_checkpoint(tmp_path, name)
    ours, theirs = Tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, *CORPUS, "".join(TEXTS) * 20]:
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids, text
        assert ours.encode(text, add_special_tokens=True) == theirs(text).input_ids, text
        assert ours.decode(ours.encode(text)) == theirs.decode(
            ours.encode(text), skip_special_tokens=True
        ), text
    assert (ours.encode("", add_special_tokens=True) != []) == (name != "qwen")


def test_embedded_tokenizer_ids_are_pinned():
    """Fault: the embedded base model, trained on these ids, gets others."""
    tokenizer = Tokenizer(ROOT / "data" / "countdown_base")
    theirs = transformers.AutoTokenizer.from_pretrained(ROOT / "data" / "countdown_base")
    text = "make 16 from 3 5 20: 3 + 5 = 8, 8 * (2 / 1) - 0 = 16<eos>"
    expected = "1 28 2 15 17 32 3 15 6 17 5 20 4 20 8 10 14 9 13 11 7 12 5 28 0"
    expected = [int(i) for i in expected.split()]
    assert (
        tokenizer.encode(text)
        == tokenizer.encode(text, add_special_tokens=True)
        == theirs(text).input_ids
        == expected
    )


def test_settings_of_training_do_not_cut_prompts(tmp_path):
    """Fault: truncation or padding stored in tokenizer.json cuts every prompt to 8 tokens, or fills
    it up, in silence."""
    write_checkpoint(tmp_path)
    expected = Tokenizer(tmp_path).encode(CORPUS[0], add_special_tokens=True)
    stored = HFTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    stored.enable_truncation(8)
    stored.enable_padding(length=200)
    stored.save(str(tmp_path / "tokenizer.json"))
    assert (
        len(expected) > 20
        and Tokenizer(tmp_path).encode(CORPUS[0], add_special_tokens=True) == expected
    )


def test_named_special_token_is_special(tmp_path):
    """Fault: an EOS or BOS that tokenizer.json holds as a plain entry is cut up in a chat and shown
    in the response's text; or a name that the vocabulary lacks gets an id behind the model's
    embedding."""
    vocabulary = {"<s>": 0, "</s>": 1, **{c: i for i, c in enumerate("</s>abcd ", start=2)}}
    HFTokenizer(models.BPE(vocabulary, [])).save(str(tmp_path / "tokenizer.json"))
    names = {
        "bos_token": "<s>",
        "eos_token": added("</s>"),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names | {"pad_token": "[absent]"}))
    ours, theirs = Tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode("<s>ab</s>") == theirs("<s>ab</s>", add_special_tokens=False).input_ids
    assert max(ours.encode("[absent]</s>")) < len(vocabulary)
    assert ours.stop_ids == {1} and "</s>" not in ours.decode([0, 6, 7, 1])


@pytest.mark.parametrize("bad", ["{", "[]", '{"version": "1.0"}'])
def test_broken_tokenizer_file_is_named(bad, tmp_path):
    """Fault: a bare exception of the tokenizers library, without the file, reaches the user as a
    traceback."""
    (tmp_path / "tokenizer.json").write_text(bad)
    with pytest.raises(UserError, match="tokenizer.json: not a tokenizer"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
def test_stop_ids_are_the_union(where, tmp_path):
    """Fault: Qwen2.5's second EOS (a base model that chats, or the other way round) does not end a
    response."""
    write_checkpoint(tmp_path, "qwen")
    ids = [Tokenizer(tmp_path).encode(token)[0] for token in SPECIALS]
    (tmp_path / where).write_text(json.dumps({"eos_token_id": [ids[2], ids[1]]}))
    tokenizer = Tokenizer(tmp_path)
    assert (
        tokenizer.stop_ids == {ids[1], ids[2]} and tokenizer.eos_id == ids[1]
    )  # the tokenizer's own comes first


@pytest.mark.parametrize(
    ("end", "expected"),
    [("<|eot|>", ["<|eot|>", "<|end|>"]), ("", ["<|end|>"]), (" .", ["<|end|>"])],
)
def test_end_of_a_turn_stops_a_chat(end, expected, tmp_path):
    """Fault: a base model (EOS <|endoftext|>) that chats (<|im_end|>) never stops, or stops at the
    plain text behind a message."""
    write_checkpoint(
        tmp_path, "qwen", eos_token="<|end|>", chat_template=CHATML.replace("<|eot|>", end)
    )
    tokenizer = Tokenizer(tmp_path, chat=True)
    ids = [tokenizer.encode(token)[0] for token in expected]
    assert tokenizer.stop_ids == set(ids) and tokenizer.eos_id == ids[0]
    assert Tokenizer(tmp_path).stop_ids == {ids[-1]}


# ---- chat template

CHATML = """{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|bos|>system\\nYou are a helpful assistant.<|eot|>\\n' }}
    {%- endif %}
    {{- '<|bos|>' + message['role'] + '\\n' + message['content'] + '<|eot|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|bos|>assistant\\n' }}{% endif %}
"""
HEADERS = """{{- bos_token }}
{%- if strftime_now is defined %}
    {%- set year = strftime_now("%Y") %}
{%- else %}
    {%- set year = "2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start|>system<|stop|>\\n\\nToday: " + year + "\\n" }}
{%- if tools is not none %}{{- "Tools are given" }}{% endif %}
{{- system + "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start|>' + message['role'] + '<|stop|>\\n\\n'
            + message['content'] | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|stop|>\\n\\n' }}
{%- endif %}"""
THINKING = """{%- if tools %}
    {%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{%- elif messages[0].role == 'system' %}
    {{- '<|bos|>system\\n' + messages[0].content + '<|end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user"
            and not(message.content.startswith('<r>') and message.content.endswith('</r>')) %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" %}
        {{- '<|bos|>' + message.role + '\\n' + content + '<|end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|bos|>assistant\\n' + content
            + (' LAST' if loop.index0 > ns.last else '') + '<|end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|bos|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
ALTERNATING = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{% set offset = 1 %}
{%- else %}{% set offset = 0 %}{% endif %}
{% for message in messages %}
    {% if message['role'] == 'system' %}
        {% continue %}
    {% elif (message['role'] == 'user') != ((loop.index0 + offset) % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if message['role'] == 'user' %}
  [INST] {{ (messages[0]['content'] + '\n\n' if offset and loop.last else '')
        + message['content'] }} [/INST]
    {% else %}
{% generation %}{% set mark = 'x' %}{{ ' ' ~ message['content'] ~ eos_token
        }}{% endgeneration %}{{ mark }}
    {% endif %}
{% endfor %}"""
ODDS = """{# a comment #}
{% macro turn(message, tail='') %}[{{ message.role }}]{{ message | tojson }}{{ tail }}{% endmacro %}
  {% for message in messages if message.role != 'system' %}
    {{ turn(message, tail=eos_token) }}{{ dict(a=1, b=message.content) | tojson(indent=1) }}
    {% if loop.index > 2 %}{% break %}{% endif %}
  {% endfor %}
{{ unk_token }}|{{ pad_token }}|{{ sep_token is defined }}|{{ documents is none }}|{{ missing }}

{{ messages | map(attribute='content') | join('&') | upper }}
"""
TEMPLATES = {
    "chatml": CHATML,
    "headers": HEADERS,
    "thinking": THINKING,
    "alternating": ALTERNATING,
    "odds": ODDS,
}
CHATS = [
    [{"role": "user", "content": "What is 12 + 345?"}],
    [
        {"role": "system", "content": "  Be <b>brief</b> & 'exact'.\n"},
        {"role": "user", "content": " 2 < 3?\n"},
    ],
    [
        {"role": "user", "content": "größer 😀 <|eot|>"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"},
        {"role": "user", "content": "<r>\"'\\</r>"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "<r>done</r>"},
    ],
]


@pytest.mark.parametrize("chat", range(len(CHATS)))
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", ["llama3", "llama2"])
def test_chat_equals_transformers(name, template, chat, tmp_path):
    """Fault: white space control, a variable, a filter, a tag or a special token differs from how
    the model was trained, or BOS comes twice: the policy starts worse than it is, and nothing says
    so."""
    write_checkpoint(tmp_path, name, chat_template=TEMPLATES[template])
    ours, theirs = Tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = ours.render_chat(CHATS[chat])
    assert text == theirs.apply_chat_template(
        CHATS[chat], add_generation_prompt=True, tokenize=False
    )
    assert ours.encode(text) == theirs.apply_chat_template(
        CHATS[chat], add_generation_prompt=True, return_dict=False
    )


@pytest.mark.parametrize("place", ["config", "list", "file", "file and config"])
def test_chat_template_is_found_where_transformers_finds_it(place, tmp_path):
    """Fault: a named or a separate template is missed, or the wrong one of two is taken."""
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
    inside = {"config": CHATML, "list": named, "file": None, "file and config": "no"}[place]
    write_checkpoint(tmp_path, **({"chat_template": inside} if inside else {}))
    if "file" in place:
        (tmp_path / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    text = Tokenizer(tmp_path).render_chat(CHATS[0])
    assert text == transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        CHATS[0], add_generation_prompt=True, tokenize=False
    )
    assert text.startswith("<|bos|>system\nYou are")


@pytest.mark.parametrize(
    "decoder", [{}, {"added_tokens_decoder": {"400": {"content": "<|bos|>", "special": True}}}]
)
def test_special_tokens_of_an_old_checkpoint(decoder, tmp_path):
    """Fault: special tokens named in special_tokens_map.json only are empty in the chat; or the map
    overrides a newer configuration."""
    write_checkpoint(
        tmp_path, chat_template="{{ bos_token }},{{ eos_token }},{{ pad_token }}", **decoder
    )
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "<|end|>"}, "bos_token": "<|eot|>"})
    )
    ours, theirs = Tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.render_chat(CHATS[0]) == theirs.apply_chat_template(CHATS[0], tokenize=False)
    assert ours.eos_id == theirs.eos_token_id


def test_checkpoint_without_chat_template_says_what_to_do(tmp_path):
    """Fault: a base model is asked in no format at all, or the error leaves the user alone."""
    write_checkpoint(tmp_path)
    with pytest.raises(
        UserError, match="tokenizer_config.json: no chat template; set data.chat_template = false"
    ):
        Tokenizer(tmp_path).render_chat(CHATS[0])
    write_checkpoint(tmp_path, chat_template=[{"name": "tool_use", "template": "x"}])
    with pytest.raises(UserError, match="no chat template"):
        Tokenizer(tmp_path).render_chat(CHATS[0])


@pytest.mark.parametrize(
    ("source", "messages", "message"),
    [
        ("{% for m in messages %}", CHATS[0], "TemplateSyntaxError"),
        (ALTERNATING, CHATS[0] * 2, "roles must alternate"),
        ("{{ 1 / 0 }}", CHATS[0], "ZeroDivisionError"),
        ("{{ messages.append(1) }}", CHATS[0], "SecurityError"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", CHATS[0], "SecurityError"),
        (
            "{{ raise_exception.__globals__ }}{{ strftime_now.__code__.co_consts }}",
            CHATS[0],
            "SecurityError",
        ),
        ("{% include 'tokenizer.json' %}", CHATS[0], "loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", CHATS[0], "RecursionError"),
    ],
)
def test_failing_template_is_named(source, messages, message, tmp_path):
    """Fault: a broken template ends in a traceback of jinja2, or a stranger's template reaches
    Python through the sandbox."""
    write_checkpoint(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(source, encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        Tokenizer(tmp_path).render_chat(messages)
    assert "chat_template.jinja" in str(error.value)


def test_empty_chat_is_an_error(tmp_path):
    """Fault: a problem without messages becomes a prompt of the generation header alone."""
    write_checkpoint(tmp_path, chat_template=CHATML)
    with pytest.raises(ValueError, match="at least one message"):
        Tokenizer(tmp_path).render_chat([])
