"""Find the chat template of a tokenizer: in the files beside it, in a file of the user's, or built in."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spmd.core.fields import check, closest
from spmd.data.text.chat.template import ChatTemplate

BUILT_IN = {
    "plain": (
        "{% for message in messages %}{{ message.role + ': ' }}{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
        "{% else %}{{ message.content + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
    "raw": (
        "{% for message in messages %}{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
        "{% else %}{{ message.content }}{% endif %}{% endfor %}"
    ),
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
        "{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
"""Templates for tokenizers that have none. plain: `user: TEXT` and a line feed, `assistant: TEXT` and the end
token. raw: the texts alone, the end token after the assistant's. chatml: for tokenizers with its tokens."""


TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


def load_template(tokenizer: str, name: str, date: str, end: str | None) -> ChatTemplate:
    """The chat template of a tokenizer, or another one for it.

    Args:
        tokenizer: path of a tokenizer.json, beside which chat_template.jinja and tokenizer_config.json are
            read; or another name, of a tokenizer that has neither.
        name: a file, or one of BUILT_IN; empty is the tokenizer's own.
        date: YYYY-MM-DD, or today.
        end: the tokenizer's end token, where no file says which.

    Returns:
        The template, with the special tokens.

    Raises:
        ValueError: there is none, or the tokenizer comes with code.
    """
    directory = Path(tokenizer).expanduser().parent
    config = _read_json(directory / "tokenizer_config.json") if _is_file(tokenizer) else {}
    check(
        not config.get("auto_map"),
        f"{directory}/tokenizer_config.json comes with code of its own (auto_map), which is not executed:"
        " the tokens would be others",
    )
    tokens = {"eos_token": end} if end is not None else {}
    if _is_file(tokenizer):
        legacy = _read_json(directory / "special_tokens_map.json")
        legacy = {} if "added_tokens_decoder" in config else legacy
        tokens |= _special_tokens({**config, **legacy})
    source, place = _source(directory, config, name, tokenizer)
    return ChatTemplate(source, tokens, _parse_date(date), place)


def _source(
    directory: Path, config: Mapping[str, Any], name: str, tokenizer: str
) -> tuple[str, str]:
    """(text of the template, where it is from)."""
    if name in BUILT_IN:
        return BUILT_IN[name], f"data.template={name}"
    if name:
        file = Path(name).expanduser()
        known = ", ".join(BUILT_IN)
        check(
            file.is_file(),
            f"data.template={name!r} is neither a file nor one of {known}.{closest(name, BUILT_IN)}",
        )
        return _read_text(file), name
    own = directory / "chat_template.jinja"
    if _is_file(tokenizer) and own.is_file():
        return _read_text(own), str(own)
    place = f"{directory}/tokenizer_config.json"
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
        check(
            isinstance(found, str),
            f"{place} has the chat templates {', '.join(map(str, named))} and none named default: write one"
            " to a file and give --data.template FILE",
        )
    about = f"beside data.tokenizer={tokenizer}, in chat_template.jinja or tokenizer_config.json"
    about = about if _is_file(tokenizer) else f"of data.tokenizer={tokenizer}"
    check(
        isinstance(found, str),
        f"there is no chat template {about}: give --data.template FILE, or one of {', '.join(BUILT_IN)}",
    )
    assert isinstance(found, str)
    return found, place


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens of a tokenizer_config.json."""
    text = lambda token: token.get("content") if isinstance(token, dict) else token
    found = {name: text(config.get(name)) for name in TOKENS}
    return {name: token for name, token in found.items() if isinstance(token, str)}


def _parse_date(date: str) -> datetime.date:
    if date == "today":
        return datetime.date.today()
    try:
        return datetime.date.fromisoformat(date)
    except ValueError:
        raise ValueError(f"data.date={date!r} is no date: write YYYY-MM-DD, or today") from None


def _is_file(tokenizer: str) -> bool:
    return Path(tokenizer).expanduser().is_file()


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None


def _read_json(file: Path) -> dict[str, Any]:
    """The object of a JSON file; {} where there is none."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(_read_text(file))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    check(isinstance(found, dict), f"{file} is no JSON object")
    return found
