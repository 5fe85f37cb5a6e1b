"""A tokenizer as the files that AutoTokenizer of transformers loads, and vLLM with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spmd.core.storage import json_text
from spmd.data.text.tokenizer import ENDS, Bytes, Chars, FromFile, Tokenizer

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
GENERATION = "generation_config.json"
# Copied where they stand beside a tokenizer.json.
BESIDE = (CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", GENERATION)


def transformers_files(tokenizer: Tokenizer, length: int) -> dict[str, bytes]:
    """The files of a tokenizer, and generation_config.json with its first and last token.

    A tokenizer.json is copied with what stands beside it; `bytes` and `chars` are written as one of the same
    ids.

    Args:
        tokenizer: as the data open it.
        length: most tokens of the model.

    Returns:
        {file name: content}.
    """
    files: dict[str, bytes] = {}
    if isinstance(tokenizer, FromFile):
        file = Path(tokenizer.path)
        files[TOKENIZER] = file.read_bytes()
        beside = {name: file.parent / name for name in BESIDE}
        files |= {name: path.read_bytes() for name, path in beside.items() if path.is_file()}
    else:
        files[TOKENIZER] = _content(tokenizer).encode()
    special = _special(tokenizer, files[TOKENIZER])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
    }
    files.setdefault(CONFIG, _json(config | special))
    files.setdefault(GENERATION, _json(token_ids(tokenizer)))
    return files


def token_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """The fields of config.json and generation_config.json about the first and the last token of a text."""
    return {"bos_token_id": tokenizer.begin, "eos_token_id": tokenizer.end}


def _special(tokenizer: Tokenizer, content: bytes) -> dict[str, str]:
    """{bos_token, eos_token: text}, of those that there are."""
    parsed = json.loads(content)
    texts = {i: text for text, i in _vocabulary(parsed.get("model", {}))}
    texts |= {token["id"]: token["content"] for token in parsed.get("added_tokens", ())}
    ids = {"bos_token": tokenizer.begin, "eos_token": tokenizer.end}
    return {name: texts[i] for name, i in ids.items() if i is not None and i in texts}


def _vocabulary(model: dict[str, Any]) -> list[tuple[str, int]]:
    """(text, id) of the tokens; a Unigram model lists [text, score]."""
    vocab = model.get("vocab", {})
    if isinstance(vocab, dict):
        return list(vocab.items())
    return [(entry[0], i) for i, entry in enumerate(vocab)]


def _content(tokenizer: Tokenizer) -> str:
    """tokenizer.json of `bytes` or `chars`: a BPE without merges."""
    import tokenizers
    from tokenizers import AddedToken, decoders, models, pre_tokenizers

    if isinstance(tokenizer, Bytes):
        vocab = {text: byte for byte, text in enumerate(_byte_texts())}
        if tokenizer.end is not None:
            vocab = {text: byte for text, byte in vocab.items() if byte != tokenizer.end}
            vocab[ENDS[0]] = tokenizer.end
        inner = tokenizers.Tokenizer(models.BPE(vocab, []))
        level: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.pre_tokenizer = level
        inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        if tokenizer.end is not None:
            inner.add_special_tokens([AddedToken(ENDS[0], special=True, normalized=False)])
        return inner.to_str(pretty=True)
    assert isinstance(tokenizer, Chars)
    vocab = {character: i for i, character in enumerate(tokenizer.characters)}
    inner = tokenizers.Tokenizer(models.BPE(vocab, []))
    inner.decoder = decoders.Fuse()  # type: ignore[assignment]
    return inner.to_str(pretty=True)


def _byte_texts() -> list[str]:
    """The character that a byte-level BPE writes for each byte (Radford et al. 2019)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _json(fields: dict[str, Any]) -> bytes:
    return (json_text(fields, indent=1) + "\n").encode()
