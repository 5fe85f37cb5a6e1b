"""Fine-tuning on conversations from a directory of Hugging Face, answers to lines, and their mistakes."""

from __future__ import annotations

import importlib.util
import io
import json

import numpy as np
import pytest

from spmd.train import sample
from tests import chats

pytestmark = [
    pytest.mark.gate,
    pytest.mark.skipif(
        importlib.util.find_spec("jinja2") is None, reason="needs requirements/peers.txt, or jinja2"
    ),
]
DATA = (
    "--data.files",
    "CHATS.jsonl",
    "--data.eval-files",
    "MORE.jsonl",
    "--data.cache-dir",
    "cache",
)
WORDS = (
    "--experiment",
    "sft",
    "--init.from",
    "LLAMA",
    "--init.lora",
    "2",
    *DATA,
    "--run.dir",
    "out",
)
WORDS += (
    "--simulate",
    "2",
    "--mesh.data",
    "1",
    "--mesh.fsdp",
    "2",
    "--optimizer.warmup-steps",
    "1",
)


@pytest.fixture
def files(tmp_path):
    chats.write_checkpoint(tmp_path / "LLAMA")
    chats.write_records(tmp_path)


def test_a_directory_learns_conversations_and_answers(files, run_main, tmp_path, monkeypatch):
    done = run_main(*WORDS, "--train.steps", 2, "--init.quantize", "int8")
    assert done.returncode == 0, done.stderr
    assert (
        "of 20 conversations are longer than data.sequence_length=256 and left out" in done.stderr
    )
    saved = json.loads((tmp_path / "out/config.json").read_text())["config"]
    assert saved["data"]["tokenizer"] == "LLAMA/tokenizer.json" and not saved["data"]["template"]
    assert "frozen" in done.stdout
    lines = io.StringIO("after 1\n\nafter 1\nafter 1\n")
    monkeypatch.setattr("sys.stdin", lines)
    prompts, generate = [], sample.generate
    record = lambda snapshot, rows, **how: [
        prompts.append(rows[0]),
        generate(snapshot, rows, **how),
    ][1]
    monkeypatch.setattr(sample, "generate", record)
    chat = (
        "sample",
        *WORDS,
        "--init.quantize",
        "int8",
        "--chat",
        "--tokens",
        4,
        "--temperature",
        0,
    )
    done = run_main(*chat)
    assert done.returncode == 0, done.stderr
    assert len(prompts) == 3 and len(prompts[2]) > len(prompts[1]) + 4
    np.testing.assert_array_equal(prompts[0], prompts[1])  # begun anew
    np.testing.assert_array_equal(prompts[2][: len(prompts[1])], prompts[1])  # the turns before it
    assert len(set(done.stdout.rstrip("\n").split("\n")[-3:-1])) == 1  # the same answer twice


def test_int8_is_made_of_the_weights_of_a_directory(files, run_main, tmp_path, monkeypatch):
    import spmd

    monkeypatch.chdir(tmp_path)
    words = [*WORDS[2:], "--init.quantize"]
    exact, stored = (spmd.load("sft", [*words, kind]).init() for kind in ("none", "int8"))
    place = "model_state/frozen/blocks/mlp/up/kernel"
    kernel, found = np.asarray(exact.arrays[place]), stored.arrays
    values, scale = (np.asarray(found[f"{place}/{part}"]) for part in ("int8", "int8_scale"))
    largest = np.abs(kernel).max(1, keepdims=True)
    np.testing.assert_allclose(scale, largest / 127, rtol=1e-6)
    assert (np.abs(values * scale - kernel) <= largest / 254 * (1 + 1e-5)).all()
    table = "model_state/frozen/embed/table"
    np.testing.assert_array_equal(found[table], exact.arrays[table])
    assert f"{place}/lora_a" not in found and found[f"{place}/int8"].dtype == np.int8


def test_mistakes_are_one_line(files, run_main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "LLAMA/tokenizer_config.json"
    config = json.loads(place.read_text())
    place.write_text(json.dumps({**config, "chat_template": None}))
    (tmp_path / "empty.jsonl").write_text('{"prompt": "a", "completion": ""}')
    for words, message in (
        (WORDS, "there is no chat template beside data.tokenizer=LLAMA/tokenizer.json"),
        (
            (*WORDS, "--data.template", "chatml", "--data.files", "empty.jsonl"),
            "record 1 of empty: message 1 of completion, of the assistant, is empty. Mend it",
        ),
        (
            ("sample", "--experiment", "lm_stdlib", "--chat"),
            "--chat needs an experiment on conversations",
        ),
    ):
        done = run_main(*words)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_what_was_learned_is_answered(run_main, monkeypatch):
    assert run_main("--experiment", "sft", "--simulate", 1).returncode == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("write 3\nafter 7\n\nread nine\n"))
    done = run_main("sample", "--experiment", "sft", "--chat", "--temperature", 0, "--simulate", 1)
    assert done.stdout.splitlines()[-3:] == ["three", "8", "9"]
