"""Conversations, chat templates and tokenizers that tests of several rooms share.

The templates write what those of the families write, in words of this project.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

# What each needs: `system` messages, and its special tokens.
LLAMA3 = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n' }}
{{- 'Today Date: ' + strftime_now('%d %b %Y') + '\\n\\n' + system + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN2 = """\
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# The reasoning of the turns before the last question is dropped.
QWEN3 = """\
{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' %}
        {%- set ns.last = messages | length - 1 - loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- set reasoning = message.reasoning_content if message.reasoning_content is string else '' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last %}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate') }}{% endif %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""
MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system is defined %}
            {{- "[INST]" + system + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST]" + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- message["content"] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
OLMO2 = """\
{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}
{{ '<|assistant|>\\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{% if not loop.last %}{{ '\\n' }}{% endif %}
{% else %}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' }}
{% endif %}
{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}
"""
JSON = """\
{% for message in messages %}{{ message | tojson }}{% if message.role == 'assistant' %}
{% generation %}{{ '\\n' + message.content + eos_token }}{% endgeneration %}{% endif %}
{% endfor %}
"""
FAMILIES: dict[str, dict[str, Any]] = {
    "llama3": {
        "template": LLAMA3,
        "bos": "<|begin_of_text|>",
        "eos": "<|eot_id|>",
        "special": ["<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"],
    },
    "qwen2": {"template": QWEN2, "eos": "<|im_end|>", "special": ["<|im_start|>", "<|endoftext|>"]},
    "qwen3": {"template": QWEN3, "eos": "<|im_end|>", "special": ["<|im_start|>", "<|endoftext|>"]},
    "gemma": {
        "template": GEMMA,
        "bos": "<bos>",
        "eos": "<eos>",
        "special": ["<start_of_turn>", "<end_of_turn>"],
        "metaspace": True,
    },
    "mistral": {
        "template": MISTRAL,
        "bos": "<s>",
        "eos": "</s>",
        "special": ["[INST]", "[/INST]"],
        "metaspace": True,
    },
    "olmo2": {"template": OLMO2, "bos": "<|endoftext|>", "eos": "<|endoftext|>", "special": []},
    "json": {"template": JSON, "eos": "</s>", "special": []},
}
WORDS = (
    "file",
    "Öffnen",
    "naïve",
    "日本語",
    "x = 1",
    "don't",
    "🙂",
    "a  b",
    "\tif",
    "<b>&",
    "end\n",
    "</s",
)


def conversations(num: int = 50, *, system: bool = True) -> list[list[dict[str, str]]]:
    """Conversations of one to four turns, some with a system message, some with blanks around texts."""
    rng = np.random.default_rng(0)
    text = lambda: " ".join(rng.choice(WORDS, rng.integers(1, 9)))
    made = []
    for number in range(num):
        turns = [{"role": "system", "content": text()}] if system and number % 3 == 0 else []
        for _ in range(rng.integers(1, 5)):
            turns.append({"role": "user", "content": text() + " " * (number % 2)})
            turns.append({"role": "assistant", "content": text()})
        made.append(turns)
    return made


def write_tokenizer(directory: Any, family: str) -> None:
    """tokenizer.json and tokenizer_config.json of a family: single bytes or characters, and its tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    row = FAMILIES[family]
    special = [*filter(None, (row.get("bos"), row["eos"])), *row["special"]]
    special = list(dict.fromkeys(special))
    if row.get("metaspace"):
        text = "".join(message["content"] for each in conversations() for message in each)
        text += "▁0123456789abcdefghijklmnopqrstuvwxyz\n"
        characters = sorted({*text.replace(" ", "▁")} | {"▁▁", "▁b"})
        fallback = [f"<0x{i:02X}>" for i in range(256)]
        vocabulary = {piece: i for i, piece in enumerate(["<unk>", *fallback, *characters])}
        merges = [("▁", "▁"), ("▁", "b")]
        tokenizer: Any = Tokenizer(
            models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        )
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    else:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {letter: i for i, letter in enumerate([*letters, "Ġa", "Ġf"])}
        tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "a"), ("Ġ", "f")]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": row["template"]}
    config |= {f"{name}_token": row[name] for name in ("bos", "eos") if name in row}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def write_checkpoint(directory: Any, family: str = "qwen2") -> None:
    """A tiny Llama of random weights as transformers writes it, with a tokenizer and a chat template."""
    import jax

    from spmd.models.transformer import Transformer
    from spmd.tasks import LanguageModel
    from spmd.weights.huggingface import write

    model = Transformer(vocab=300, length=256, layers=2, embed=32, heads=4, mlp=48)
    params, _ = jax.jit(LanguageModel().build(model).init)(jax.random.key(0))
    write.write(str(directory), model, params)
    write_tokenizer(directory, family)


def write_records(directory: Any) -> None:
    """CHATS.jsonl and MORE.jsonl of conversations, PAIRS.jsonl of preferences."""
    found = conversations(30)
    lines = lambda rows: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    for name, part in (("CHATS", found[:20]), ("MORE", found[20:])):
        (directory / f"{name}.jsonl").write_text(lines({"messages": chat} for chat in part))
    pairs = [{"prompt": f"after {i}", "chosen": str(i + 1), "rejected": str(i)} for i in range(30)]
    (directory / "PAIRS.jsonl").write_text(lines(pairs))
