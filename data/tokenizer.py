"""Text to token ids and back, the checkpoint's chat template, and the ids that end a response."""

import datetime
import functools
import json
from pathlib import Path

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer

from config import DataConfig

SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class Tokenizer:
    """tokenizer.json of a Hugging Face directory, with the special tokens and the chat template of tokenizer_config.json.

    stop_ids: the tokenizer's own eos_token and every eos_token_id of generation_config.json and config.json; eos_id is the first of these.
    chat: prompts will be conversations, so what ends an assistant's turn in the chat template is the first of the stop ids; a base model's
    EOS is often another one.
    """

    def __init__(self, path: str | Path, *, chat: bool = False):
        path = Path(path)
        file = path / "tokenizer.json"
        if not file.exists():
            raise ValueError(f"{file}: not found; expected a Hugging Face tokenizer")
        try:
            self._tokenizer = HFTokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{file}: not a tokenizer: {error}") from None
        self._tokenizer.no_truncation()  # the file may hold settings of its training, which would silently cut prompts
        self._tokenizer.no_padding()
        config = _read_json(path / "tokenizer_config.json")
        self._special = _special_tokens(path, config)
        self._chat_template, self._chat_file = _chat_template(path, config)
        self._tokenizer.encode_special_tokens = bool(config.get("split_special_tokens"))
        added = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        names = (
            t
            for t in self._special.values()
            if t not in added and self._tokenizer.token_to_id(t) is not None
        )
        self._tokenizer.add_special_tokens(
            [*names]
        )  # else one that is a plain vocabulary entry would be cut up, and decoded
        ids = (
            [self._tokenizer.token_to_id(self._special["eos_token"])]
            if "eos_token" in self._special
            else []
        )
        for name in ("generation_config.json", "config.json"):
            value = _read_json(path / name).get("eos_token_id")
            ids += value if isinstance(value, list) else [value]
        ids = [i for i in ids if i is not None]
        if not ids:
            raise ValueError(
                f"{path}: neither tokenizer_config.json, generation_config.json nor config.json names an EOS token"
            )
        ids = self._turn_end() + ids if chat else ids
        self.eos_id = ids[0]
        self.stop_ids = set(ids)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids; special tokens written in the text, as a chat template does, are recognised.

        add_special_tokens: with those that the tokenizer puts around a plain text (Llama's BOS), as a base model's prompt wants it.
        Raises ValueError for text that the vocabulary cannot express.
        """
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"cannot tokenize {text[:80]!r}: {error}") from None

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, special tokens left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def encode_prompt(
        self, question: str, cfg: DataConfig, context: tuple[tuple[str, str], ...] = ()
    ) -> list[int]:
        """Token ids of data.prompt around the question, behind the (role, content) messages of its
        context: a conversation in the checkpoint's chat template, or plain text."""
        question = cfg.prompt.replace("{problem}", question)
        if cfg.chat_template:
            messages = [{"role": role, "content": content} for role, content in context]
            messages.append({"role": "user", "content": question})
            return self.encode(self.render_chat(messages))
        text = "\n\n".join([*(content for _, content in context), question])
        return self.encode(text, add_special_tokens=True)

    def render_chat(self, messages: list[dict]) -> str:
        """The conversation in the checkpoint's own chat format, up to where the assistant answers; encode it without special tokens.

        messages: [{"role": "user", "content": ...}, ...]. A template that writes today's date (Llama 3.x) does so here too.
        Raises ValueError when the checkpoint has no chat template, or when its template rejects the messages.
        """
        if not messages:
            raise ValueError("a chat needs at least one message")
        return self._render(messages, add_generation_prompt=True)

    def _turn_end(self) -> list[int]:
        """The special token right behind an assistant's message, if there is one."""
        answer = "0123456789"
        rendered = self._render(
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}],
            add_generation_prompt=False,
        )
        behind = self.encode(rendered.rpartition(answer)[2].lstrip())[:1]
        return [
            i
            for i in behind
            if self._tokenizer.get_added_tokens_decoder().get(i, AddedToken("")).special
        ]

    def _render(self, messages: list[dict], add_generation_prompt: bool) -> str:
        if self._chat_template is None:
            raise ValueError(
                f"{self._chat_file}: no chat template; set data.chat_template = false and give a data.prompt"
            )
        messages = [
            {key: value for key, value in message.items() if value is not None}
            for message in messages
        ]
        try:
            template = _compile(self._chat_template)
            return template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special,
            )
        except Exception as error:  # a template is a stranger's program
            raise ValueError(
                f"{self._chat_file}: the chat template failed: {type(error).__name__}: {error}"
            ) from None


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}, by which transformers finds the assistant's tokens: here only its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(
            parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
        )


@functools.lru_cache
def _compile(source: str) -> jinja2.Template:
    """A chat template with what it may use, as in transformers (utils/chat_template_utils.py); the sandbox keeps it from the rest."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value, ensure_ascii=False, indent=None, separators=None, sort_keys=False
    ) -> str:  # jinja's own escapes HTML
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    env.filters["tojson"] = tojson
    env.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    return env.from_string(source)


def _chat_template(path: Path, config: dict) -> tuple[str | None, Path]:
    """The chat template's source, if there is any, and its file: chat_template.jinja, or the (default) one in tokenizer_config.json."""
    file = path / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8"), file
    file, source = path / "tokenizer_config.json", config.get("chat_template")
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    return source, file


def _special_tokens(path: Path, config: dict) -> dict[str, str]:
    """Text of bos_token, eos_token, ... as far as there are any; special_tokens_map.json counts in old checkpoints only."""
    if "added_tokens_decoder" not in config:
        config = config | _read_json(path / "special_tokens_map.json")
    tokens = {name: config.get(name) for name in SPECIAL_TOKENS}
    return {
        name: token["content"] if isinstance(token, dict) else token
        for name, token in tokens.items()
        if token is not None
    }


def _read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from None
