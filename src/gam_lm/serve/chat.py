"""From the messages of a chat to token ids: with the run's chat template, or as plain lines.

What a user writes stays text: a literal ``<|endoftext|>`` in a message is no special token. (In the prompt of a plain completion it is one, as in training.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gam_lm.checkpoint import read_json
from gam_lm.data.conversations import Marked
from gam_lm.errors import InputError
from gam_lm.serve.protocol import RequestError

TEMPLATE = """\
{%- for message in messages -%}
{{ message['role'] | capitalize + ': ' + message['content'] | trim + (eos_token if message['role'] == 'assistant' else '') + '\\n' }}
{%- endfor -%}
{{ 'Assistant:' if add_generation_prompt else '' }}"""
"""What a model is taught that has no template of its own: lines "User: …", "Assistant: …", and the end of text after each answer."""

NO_MASK = "so that which tokens are the assistant's cannot be told: mend chat_template.jinja, or remove the template to take the library's"

PLACEHOLDERS = range(0xF0000, 0xFFFFE)
"""A plane of Unicode for private use."""


class Chat:
    """How a model's chats are written.

    Args:
        tokenizer: of the model; truncation and padding are switched off in it.
        template: the compiled chat template; None writes lines "User: …", "Assistant: …".
        special_tokens: by role, for the template.
    """

    def __init__(self, tokenizer: Tokenizer, template: Any = None, special_tokens: Mapping[str, str] | None = None) -> None:
        self.tokenizer, self.template, self.special_tokens = tokenizer, template, dict(special_tokens or {})
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._literally = Tokenizer.from_str(tokenizer.to_str())
        self._literally.encode_special_tokens = True
        self._special = sorted((token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special), key=len, reverse=True)

    @property
    def ends(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return ("\nUser:",) if self.template is None else ()

    def ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a chat up to where the assistant answers.

        Raises:
            RequestError: where the template refuses the messages.
        """
        shown, hidden = self._hidden(messages)
        return self._encoded(self.text(shown), hidden)

    def marked(self, messages: Sequence[Mapping[str, Any]]) -> Marked:
        """Token ids of a whole conversation, and which of them the assistant said, the token that ends an answer included.

        Up to each answer the ids are those of `ids`, so that what is learned is what is asked for later.

        Raises:
            RequestError: where the template refuses the messages.
            InputError: where the template does not tell where an answer starts or ends.
        """
        shown, hidden = self._hidden(messages)
        whole, ends = self.text(shown, answer=False), self.special_tokens.get("eos_token", "")
        ids: list[int] = []
        counted: list[bool] = []
        place = 0

        def take(to: int, counts: bool) -> None:
            nonlocal place
            new = self._encoded(whole[place:to], hidden)
            ids.extend(new)
            counted.extend([counts] * len(new))
            place = to

        for i, message in enumerate(shown):
            if message["role"] != "assistant":
                continue
            before, after = self.text(shown[:i]), self.text(shown[: i + 1], answer=False)
            if not (whole.startswith(before) and whole.startswith(after) and place <= len(before) < len(after)):
                raise InputError(f"the chat template writes the start of a conversation otherwise once message {i + 1} follows, {NO_MASK}")
            said = whole[len(before) : len(after)]
            if not ends or ends not in said:
                raise InputError(f"the chat template ends no answer with the tokenizer's end of text ({ends or 'it has none'}), {NO_MASK}")
            take(len(before), False)
            take(len(before) + said.rindex(ends) + len(ends), True)
        take(len(whole), False)
        answers = "".join(str(message["content"]) for message in messages if message["role"] == "assistant")
        return Marked(ids, counted, answers)

    def _encoded(self, text: str, hidden: Mapping[str, str]) -> list[int]:
        """Token ids of a text in which characters stand for literal special tokens."""
        ids: list[int] = []
        for part in re.split(f"([{re.escape(''.join(hidden))}])", text) if hidden else [text]:
            literal = hidden.get(part)
            if part:
                ids += encode(self.tokenizer, part) if literal is None else encode(self._literally, literal)
        return ids

    def text(self, messages: Sequence[Mapping[str, Any]], *, answer: bool = True) -> str:
        """The chat as text, up to where the assistant answers or without an answer to come. Raises RequestError where the template refuses the messages."""
        if self.template is None:
            return "".join(f"{message['role'].capitalize()}: {_said(message)}\n" for message in messages) + ("Assistant:" if answer else "")
        from jinja2 import TemplateError

        try:
            return self.template.render(messages=list(messages), add_generation_prompt=answer, **self.special_tokens)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:  # what a template may do with a strange message
            raise RequestError(f"messages do not fit the chat template: {error}", param="messages") from error

    def _hidden(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """The messages with a character of private use in place of each literal special token, and what each such character is."""
        everything = "".join(_strings(messages))
        words = [word for word in self._special if word in everything]
        if not words:
            return [dict(message) for message in messages], {}
        free = (chr(code) for code in PLACEHOLDERS if chr(code) not in everything)
        hidden = dict(zip(words, free, strict=False))
        pattern = re.compile("|".join(map(re.escape, words)))

        def hide(value: Any) -> Any:
            if isinstance(value, str):
                return pattern.sub(lambda found: hidden[found[0]], value)
            if isinstance(value, Mapping):
                return {key: hide(each) for key, each in value.items()}
            return [hide(each) for each in value] if isinstance(value, list) else value

        return [hide(message) for message in messages], {mark: word for word, mark in hidden.items()}


def _strings(value: Any) -> Iterator[str]:
    """All texts in a value of JSON, keys left aside."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(each)


def _said(message: Mapping[str, Any]) -> Any:
    """The content; of an answer without the space that it began with behind "Assistant:", so that the next turn has the tokens that were drawn."""
    content = message["content"]
    return content.removeprefix(" ") if message["role"] == "assistant" and isinstance(content, str) else content


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text. Other threads go on: unlike ``encode``, ``encode_batch`` does not hold the interpreter's lock."""
    return tokenizer.encode_batch([text], add_special_tokens=False)[0].ids


def read_chat_template(directory: Path) -> tuple[Any, dict[str, str]]:
    """The template of chat_template.jinja or tokenizer_config.json, or None, and the special tokens.

    Raises:
        RequestError: at rendering, for what the template itself refuses.
        InputError: where the file is broken.
    """
    path = directory / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    special = {name: value for name, value in config.items() if name.endswith("_token") and isinstance(value, str)}
    file = directory / "chat_template.jinja"
    try:
        source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    except (OSError, UnicodeError) as error:
        raise InputError(f"{file} cannot be read ({error}): mend or remove it") from error
    if source is None:
        return None, special
    if not isinstance(source, str):
        raise InputError(f"the chat_template of {path} is {type(source).__name__}: give one text, in chat_template.jinja")
    return compiled(source, str(directory)), special


def compiled(source: str, where: str) -> Any:
    """A chat template. Raises InputError, which names ``where`` it is from, where it is broken."""
    from jinja2 import TemplateError, TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise InputError(f"the chat template of {where!r} is broken ({error}): mend chat_template.jinja or tokenizer_config.json") from error
