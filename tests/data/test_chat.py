"""Chats: ids as transformers gives them, what the loss is on, packed rows against their records, mistakes."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from spmd.data.text.chat import Chat, Preferences
from spmd.data.text.chat.conversation import encode, end_tokens
from spmd.data.text.tokenizer import Bytes
from tests import chats

needs_jinja2 = pytest.mark.skipif(
    importlib.util.find_spec("jinja2") is None, reason="needs requirements/peers.txt, or jinja2"
)
needs_peers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs requirements/peers.txt"
)
pytestmark = needs_jinja2
FIXTURE = Path(__file__).parents[1] / "fixtures" / "chat_ids.json"
PUBLISHED = {"llama3", "qwen2", "qwen3", "gemma", "mistral", "olmo2"}


def opened(root, family, **options):
    """(config, tokenizer, template) of a family's files in root/FAMILY."""
    chats.write_tokenizer(root / family, family)
    data = Chat(
        tokenizer=str(root / family / "tokenizer.json"), cache_dir=str(root / "c"), **options
    )
    tokenizer = data.open_tokenizer()
    return data, tokenizer, data.open_template(tokenizer)


def talks(family):
    return chats.conversations(system=family != "gemma")


def ids_of(template, tokenizer, messages):
    return encode(template.conversation(messages), tokenizer).ids_T.tolist()


def summary(ids):
    """As it stands in the fixture: the ids of two conversations, and a digest of all."""
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    return {"first": ids[:2], "digest": digest, "tokens": sum(map(len, ids))}


@needs_peers
@pytest.mark.parametrize("family", chats.FAMILIES)
def test_ids_are_those_of_transformers(family, tmp_path, request):
    import transformers

    _, tokenizer, template = opened(tmp_path, family, date="today")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / family)
    apply = lambda chat, **options: theirs.apply_chat_template(chat, return_dict=True, **options)
    found = talks(family)
    assert len(found) == 50
    for chat in found:
        want = apply(chat)["input_ids"]
        assert ids_of(template, tokenizer, chat) == want
        prompt = template.render(chat[:-1], prompt=True)
        assert prompt == theirs.apply_chat_template(
            chat[:-1], tokenize=False, add_generation_prompt=True
        )
        if "{% generation" in chats.FAMILIES[family]["template"]:
            counts = encode(template.conversation(chat), tokenizer).counts_T
            mask = apply(chat, return_assistant_tokens_mask=True)["assistant_masks"]
            np.testing.assert_array_equal(counts, mask)
    if request.config.getoption("--update"):
        stored = json.loads(FIXTURE.read_text()) if FIXTURE.exists() else {}
        if family != "llama3":  # whose ids depend on the day
            stored[family] = summary([apply(chat)["input_ids"] for chat in found])
        else:
            day = theirs.chat_template.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
            assert day != theirs.chat_template
            stored[family] = summary(
                [apply(chat, chat_template=day)["input_ids"] for chat in found]
            )
        FIXTURE.write_text(json.dumps(stored, sort_keys=True) + "\n")


def test_ids_are_those_that_transformers_gave(tmp_path):
    stored = json.loads(FIXTURE.read_text())
    assert stored.keys() == chats.FAMILIES.keys()
    for family, want in stored.items():
        _, tokenizer, template = opened(tmp_path, family)
        assert summary([ids_of(template, tokenizer, chat) for chat in talks(family)]) == want, (
            family
        )


def test_the_loss_is_on_the_assistant(tmp_path):
    """What counts, decoded, is each answer and what ends it; of a template without marks too."""
    for family in chats.FAMILIES:
        _, tokenizer, template = opened(tmp_path, family)
        (end,) = end_tokens(template, tokenizer) - {tokenizer.end} or {tokenizer.end}
        for chat in talks(family):
            answers = [m["content"] for m in chat if m["role"] == "assistant"]
            encoded = encode(template.conversation(chat), tokenizer)
            edges = np.flatnonzero(np.diff(encoded.counts_T, prepend=False, append=False))
            parts = [encoded.ids_T[a:b] for a, b in edges.reshape(-1, 2)]
            assert len(parts) == len(answers)
            for part, answer in zip(parts, answers, strict=True):
                text = tokenizer.decode(part)
                assert answer.strip() in text and len(text) <= len(answer) + 30
                assert ("user" in text) == ("user" in answer)
                assert end in part[-2:]
        # Of a prompt and its completion, the prompt's own answers do not count.
        chat = talks(family)[-1]
        part = template.conversation(chat, first=len(chat) - 1)
        assert (
            len(part.spans) == 1 and chat[-1]["content"].strip() in part.text[slice(*part.spans[0])]
        )
    assert chats.FAMILIES.keys() >= PUBLISHED


RECORDS: list[dict[str, Any]] = [
    {"messages": chat} if i % 2 else {"prompt": chat[:-1], "completion": chat[-1:]}
    for i, chat in enumerate(chats.conversations(20))
] + [{"prompt": "one", "completion": "two"}]


def write(root, records, name="c.jsonl"):
    (root / name).write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records))
    return {"files": (str(root / name),), "eval_files": (str(root / name),)}


def plain(root, records=RECORDS, **options):
    options = {
        "template": "plain",
        "sequence_length": 256,
        "cache_dir": str(root / "cache"),
    } | options
    return Chat(**write(root, records), **options)


def parts_of(batch):
    """(tokens, targets) of each segment; asserts how they lie in their rows."""
    for row in range(len(batch["tokens"])):
        one = {name: x[row] for name, x in batch.items()}
        for segment in range(1, one["segments"].max() + 1):
            inside = one["segments"] == segment
            assert (np.diff(np.flatnonzero(inside)) == 1).all()
            np.testing.assert_array_equal(one["positions"][inside], np.arange(inside.sum()))
            yield one["tokens"][inside], one["targets"][inside]
        assert (one["targets"][one["segments"] == 0] == -1).all()


def test_packed_rows_hold_their_conversations(tmp_path, capsys):
    data = plain(tmp_path)
    source = data.open("train")
    found = list(parts_of(source.take(np.arange(len(source)))))
    assert len(source) < len(found)  # several in a row
    fits = {}
    for record in RECORDS:
        chat = record.get("messages") or record["prompt"]
        chat = [{"role": "user", "content": "one"}] if chat == "one" else [*chat]
        last = record.get("completion") or []
        chat += [{"role": "assistant", "content": "two"}] if last == "two" else last
        text = "".join(
            f"{m['role']}: {m['content']}" + ("\xff" if m["role"] == "assistant" else "\n")
            for m in chat
        )
        of = [
            m["content"]
            for m in (last if isinstance(last, list) and last else chat)
            if m["role"] == "assistant"
        ]
        ids = b"\xff".join(part.encode() for part in text.split("\xff"))
        if len(ids) - 1 <= 256:
            fits[ids[:-1]] = b"".join(f"{answer}".encode() + b"\xff" for answer in of)
    assert len(fits) == len(found) == len(RECORDS) - source.longer and source.longer > 0
    for tokens, targets in found:
        assert bytes(targets[targets >= 0].tolist()) == fits[bytes(tokens.tolist())]
        np.testing.assert_array_equal(
            np.where(targets >= 0, targets, -1)[:-1], np.where(targets[:-1] >= 0, tokens[1:], -1)
        )
    assert (
        f"{source.longer} of 21 conversations are longer than data.sequence_length=256 and left out"
        in capsys.readouterr().err
    )
    cut = plain(tmp_path, longer="cut").open("train")
    assert cut.longer == source.longer and 0 < cut.cut <= cut.longer
    single = plain(tmp_path, packed=False).open("train")
    assert len(single) == len(found) and single.take(np.arange(len(single)))["segments"].max() == 1
    # Parquet fills in what a message lacks.
    table = pa.Table.from_pylist(
        [
            {
                "messages": [
                    *chats.conversations(5)[1],
                    {"role": "assistant", "content": "x", "name": "n"},
                ]
            }
        ]
    )
    parquet.write_table(table, tmp_path / "c.parquet")
    rows = Chat(
        files=(str(tmp_path / "c.parquet"),), template="plain", cache_dir=str(tmp_path / "p")
    )
    assert len(rows.open("train")) == 1


def test_pairs_of_answers_are_rows(tmp_path):
    records = [
        {"prompt": "1 + 1", "chosen": "2", "rejected": "three"},
        {
            "chosen": [*RECORDS[1]["messages"]],
            "rejected": [*RECORDS[1]["messages"][:-1], {"role": "assistant", "content": "no"}],
        },
    ]
    options = {"template": "plain", "sequence_length": 512, "cache_dir": str(tmp_path / "cache")}
    source = Preferences(**write(tmp_path, records), **options).open("train")
    batch = source.take(np.arange(2))
    found = [(bytes(x.tolist()), bytes(y[y >= 0].tolist())) for x, y in parts_of(batch)]
    assert (b"user: 1 + 1\nassistant: 2", b"2\xff") in found
    assert (b"user: 1 + 1\nassistant: three", b"three\xff") in found
    assert b"no\xff" in [answer for _, answer in found] and len(found) == 4
    assert (batch["segments"].max(1) == 2).all()


BAD = [
    ({"text": "x"}, "record 1 of c: it has neither messages, nor prompt and completion"),
    ({"messages": "hi"}, "no message of the assistant"),
    ({"messages": [{"role": "bot", "content": "x"}]}, "message 1 of messages has the role 'bot'; known are"),
    ({"messages": [{"from": "human", "value": "x"}]}, "has the role None"),
    ({"messages": 3}, "messages is int, and should be a list"),
    ({"prompt": "a", "completion": " "}, "message 1 of completion, of the assistant, is empty"),
    ({"prompt": "a", "completion": None}, "neither messages, nor prompt and completion"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "has parts that are not text"),
]  # fmt: skip


@pytest.mark.parametrize("record,message", BAD)
def test_bad_records(record, message, tmp_path):
    with pytest.raises(ValueError, match="skip-bad N") as error:
        plain(tmp_path, [record]).open("train")
    assert message in str(error.value)
    rest = plain(tmp_path, [record, RECORDS[-1]], skip_bad=1).open("train")
    assert len(rest) == len(rest.skipped) == 1


def test_templates_that_do_not_work(tmp_path):
    data, _, _ = opened(tmp_path, "gemma")
    place = tmp_path / "gemma" / "tokenizer_config.json"
    config = json.loads(place.read_text())

    def said(**change):
        place.write_text(json.dumps(config | change))
        with pytest.raises(ValueError) as error:
            data.open_template(data.open_tokenizer()).conversation(chats.conversations(1)[0])
        return str(error.value)

    assert "the chat template refuses it: System role not supported" in said()
    assert "there is no chat template beside data.tokenizer=" in said(chat_template=None)
    assert "auto_map), which is not executed" in said(auto_map={"AutoTokenizer": ["x.Y", None]})
    assert "is no chat template: " in said(chat_template="{% for x %}")
    assert "chat templates a and none named" in said(chat_template=[{"name": "a", "template": ""}])
    for escape in ("''.__class__.__mro__", "messages.append(1)", "cycler.__init__.__globals__.os"):
        assert "the chat template refuses it" in said(chat_template="{{ " + escape + " }}")
    with pytest.raises(ValueError, match=r"there is no chat template of data.tokenizer=bytes"):
        Chat().open_template(Bytes())
    with pytest.raises(ValueError, match=r"'plian' is neither a file nor one of .* 'plain'"):
        Chat(template="plian").open_template(Bytes())
    with pytest.raises(ValueError, match=r"data.date='July' is no date: write YYYY-MM-DD"):
        Chat(template="plain", date="July").open_template(Bytes())
