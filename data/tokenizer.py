"""Text to token ids and back, the checkpoint's chat template, and the ids that end a response."""

import datetime
import functools
import json
import re
from pathlib import Path

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as HFTokenizer

from config import DataConfig, UserError, read_json

SPECIAL_TOKENS = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]


class Tokenizer:
    """The tokenizer and the chat template of a Hugging Face directory.

    stop_ids: the tokenizer's eos_token and every eos_token_id of generation_config.json and
    config.json. chat adds the token that ends an assistant's turn in the chat template, which for
    a base model is often not its EOS. eos_id: the turn's end, else the first of the others.
    Raises UserError for a file that is missing or broken, and when there is no EOS.
    """

    def __init__(self, path: str | Path, *, chat: bool = False):
        path = Path(path)
        try:
            self._tokenizer = HFTokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{path / 'tokenizer.json'}: not a tokenizer: {error}") from None
        # The file may hold settings of its training that cut or pad prompts.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = read_json(path / "tokenizer_config.json")
        self._tokenizer.encode_special_tokens = bool(config.get("split_special_tokens"))
        self._chat_file, self.chat_template = _chat_template(path, config)
        if "added_tokens_decoder" not in config:  # an old checkpoint
            config |= read_json(path / "special_tokens_map.json")
        tokens = {name: config[name] for name in SPECIAL_TOKENS if config.get(name) is not None}
        self._special = {n: t["content"] if isinstance(t, dict) else t for n, t in tokens.items()}
        # A special token that is a plain vocabulary entry would be split, and shown when decoded.
        added = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        to_id = self._tokenizer.token_to_id
        plain = [t for t in self._special.values() if to_id(t) is not None and t not in added]
        self._tokenizer.add_special_tokens(plain)
        ids = self._turn_end() if chat else []
        ids.append(to_id(self._special.get("eos_token", "")))
        for name in ("generation_config.json", "config.json"):
            value = read_json(path / name).get("eos_token_id")
            ids += value if isinstance(value, list) else [value]
        ids = [i for i in ids if i is not None]
        if not ids:
            files = "tokenizer_config.json, generation_config.json or config.json"
            raise UserError(f"{path}: no EOS token in {files}")
        self.eos_id, self.stop_ids = ids[0], set(ids)

    def unknown_ids(self, vocab_size: int) -> list[int]:
        """Ids below vocab_size without a token, stop ids aside: decode would lose them."""
        known = {*self._tokenizer.get_vocab(with_added_tokens=True).values(), *self.stop_ids}
        return [i for i in range(vocab_size) if i not in known]

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids; special tokens written in the text are recognised.

        add_special_tokens: add those that the tokenizer puts around plain text, as a base model's
        prompt needs it (Llama's BOS). Raises UserError for text outside the vocabulary.
        """
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"cannot tokenize {text[:80]!r}: {error}") from None

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, without special tokens."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def encode_prompt(
        self, question: str, cfg: DataConfig, context: tuple[tuple[str, str], ...] = ()
    ) -> list[int]:
        """Token ids of data.prompt around the question, after the (role, content) messages of its
        context: a conversation in the checkpoint's chat template, or plain text."""
        question = cfg.prompt.replace("{problem}", question)
        if cfg.chat_template:
            messages = [{"role": role, "content": content} for role, content in context]
            messages.append({"role": "user", "content": question})
            return self.encode(self.render_chat(messages))
        text = "\n\n".join([*(content for _, content in context), question])
        return self.encode(text, add_special_tokens=True)

    def render_chat(self, messages: list[dict], *, add_generation_prompt: bool = True) -> str:
        """Messages {"role": ..., "content": ...} in the checkpoint's chat format, up to where the
        assistant answers. Encode the text without add_special_tokens.

        Raises UserError when there is no chat template, or when it rejects the messages.
        """
        if not messages:
            raise ValueError("a chat needs at least one message")
        if self.chat_template is None:
            remedy = "set data.chat_template = false and give a data.prompt"
            raise UserError(f"{self._chat_file}: no chat template; {remedy}")
        variables = {"tools": None, "documents": None} | self._special
        variables |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return _compile(self.chat_template).render(variables)
        except Exception as error:  # a template is a stranger's program
            problem = f"{type(error).__name__}: {error}"
            raise UserError(f"{self._chat_file}: the chat template failed: {problem}") from None

    def _turn_end(self) -> list[int]:
        """The special token right after an assistant's message, if there is one."""
        answer = "0123456789"
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        text = self.render_chat(chat, add_generation_prompt=False)
        added = self._tokenizer.get_added_tokens_decoder()
        following = self.encode(text.rpartition(answer)[2].lstrip())[:1]
        return [i for i in following if i in added and added[i].special]


# transformers marks the assistant's tokens with {% generation %} ... {% endgeneration %}; here they
# become "with" tags, which only open a scope.
_GENERATION = re.compile(r"(\{%[-+]?\s*(?:end)?)generation(?=\s*[-+]?%\})")


@functools.lru_cache
def _compile(source: str) -> jinja2.Template:
    """A chat template in a sandbox, with the names that transformers gives it
    (utils/chat_template_utils.py)."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    # jinja2's own filter escapes HTML
    env.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return env.from_string(_GENERATION.sub(r"\1with", source))


def _chat_template(path: Path, config: dict) -> tuple[Path, str | None]:
    """The file that has the chat template, and the template, if there is one."""
    file = path / "chat_template.jinja"
    if file.exists():
        return file, file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return path / "tokenizer_config.json", template
