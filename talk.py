"""Talk to a policy: python rloop.py --sample runs/x/policies/theta_4 "make 24 from 3 5 9 2:"

The question is the whole prompt, in the checkpoint's chat template if there is one.
"""

import functools
import math
import sys
from collections.abc import Callable, Iterator

import torch

import hf
from config import ArgumentParser, DataConfig, UserError
from data.tokenizer import Tokenizer
from sampler import sample
from scale import parallel


def main(arguments: list[str]) -> int:
    """Print responses to the question, or to each line of standard input. Returns the exit code.

    Raises UserError for a bad option, a directory that is no policy, and a question that is empty
    or outside the vocabulary; the last is only printed if it was typed at the prompt.
    """
    path, question, plain, options = read_options(arguments)
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        tokenizer, data = Tokenizer(path), DataConfig()
        if tokenizer.chat_template is not None and not plain:
            tokenizer, data = Tokenizer(path, chat=True), DataConfig(chat_template=True)
        policy = hf.load_model(path, None, parallel.device())
        unknown_ids = tokenizer.unknown_ids(policy.config.vocab_size)
        policy.unknown_ids = torch.tensor(unknown_ids, dtype=torch.long, device=parallel.device())
        options |= {"stop_ids": tokenizer.stop_ids, "max_rows": 64}
        encode = functools.partial(tokenizer.encode_prompt, cfg=data)
        for n, prompt in enumerate(_prompts(encode) if question is None else [encode(question)]):
            # first_prompt: a question that is asked again gets other responses
            (responses,) = sample(policy, [prompt], first_prompt=n, **options)
            for i, response in enumerate(responses, start=1):
                probability = math.exp(sum(response.logps) / len(response.ids))
                cut = "" if response.finished else ", CUT OFF"
                print(f"[{i}] {len(response.ids)} tokens{cut}, mean probability {probability:.2f}")
                print(printable(tokenizer.decode(response.ids)), flush=True)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


def read_options(arguments: list[str]) -> tuple[str, str | None, bool, dict]:
    """The directory, the question, whether to do without a chat template, and sample's options."""
    parser = ArgumentParser(description="Print sampled responses of a policy.")
    add = parser.add_argument
    add("--sample", required=True, metavar="POLICY", help="its directory, as runs/*/policies/*")
    add("question", nargs="?", help="without it, each line of standard input is one")
    add("--num_samples", type=int, default=4, metavar="N", help="responses; default 4")
    add("--temperature", type=float, default=1.0, metavar="T", help="default 1; 0: one, greedy")
    add("--max_new_tokens", type=int, default=512, metavar="N", help="of a response; default 512")
    add("--seed", type=int, default=0, help="another one gives other responses; default 0")
    add("--plain", action="store_true", help="the prompt without the checkpoint's chat template")
    options = vars(parser.parse_args(arguments))
    path, question, plain = (options.pop(name) for name in ("sample", "question", "plain"))
    for name, least in (("num_samples", 1), ("temperature", 0), ("max_new_tokens", 1), ("seed", 0)):
        if not options[name] >= least:
            raise UserError(f"--{name} {options[name]}: must be at least {least}")
    if question is not None and not question.strip():
        raise UserError("the question is empty")
    if options["temperature"] == 0:
        options["num_samples"] = 1
    return path, question, plain, options


def _prompts(encode: Callable[[str], list[int]]) -> Iterator[list[int]]:
    """The lines of standard input that are not blank: asked for on a terminal, else printed."""
    terminal = sys.stdin.isatty()
    sys.stdin.reconfigure(errors="surrogateescape")  # what is not UTF-8, the tokenizer refuses
    while True:
        try:
            line = input("\n> " if terminal else "")
            if line.strip():
                print("" if terminal else f"> {printable(line)}")
                yield encode(line)
        except EOFError:
            return
        except UserError as error:
            if not terminal:
                raise
            print(f"error: {error}")


def printable(text: str) -> str:
    """The text with escapes for all that is no printable character, line break or tab."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
