"""run.py export: what other libraries read, weights and tokenizer, and what they compute with them."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

from spmd.data.text import handoff
from spmd.data.text.tokenizer import Bytes, Chars, FromFile

TEXTS = ("Tabs\tand  blanks \n", "naïve – 東京 🙂", "")
needs_peers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None,
    reason="needs requirements/peers.txt",
)


def save_files(tokenizer, directory):
    directory.mkdir()
    for name, content in handoff.transformers_files(tokenizer, 128).items():
        (directory / name).write_bytes(content)


@pytest.mark.parametrize(
    "tokenizer", [Bytes(), Bytes(end=False), Chars("".join(sorted({*"".join(TEXTS)})))]
)
def test_a_tokenizer_as_a_file_gives_the_same_ids(tokenizer, tmp_path):
    save_files(tokenizer, tmp_path / "out")
    again = FromFile(str(tmp_path / "out/tokenizer.json"))
    assert (again.vocab_size, again.begin, again.end) == (tokenizer.vocab_size, None, tokenizer.end)
    for text, ours, theirs in zip(
        TEXTS, *(t.encode(TEXTS) for t in (tokenizer, again)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
        assert again.decode(theirs) == text
    # What stands beside a tokenizer.json goes with it, and a first start writes no other.
    (tmp_path / "out/chat_template.jinja").write_text("{{ messages }}")
    copied = handoff.transformers_files(again, 64)
    assert copied == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}


@needs_peers
def test_weights_and_tokenizer_are_read_by_transformers(run_main, tmp_path):
    """Through the commands: trained on bytes, exported, continued by theirs and by ours."""
    import torch
    import transformers

    (tmp_path / "text.txt").write_text("".join(TEXTS) * 200)
    words = ("--experiment", "hf", "--data.files", "text.txt", "--run.dir", "run", "--simulate", 1)
    done = run_main(*words, "--train.steps", 6, "--model.layers", 1)
    assert done.returncode == 0, done.stderr
    words = (*words, "--model.layers", 1)
    done = run_main("export", *words, "--to", "out")
    assert done.returncode == 0, done.stderr
    for name in (handoff.TOKENIZER, handoff.CONFIG, handoff.GENERATION):
        assert name in done.stdout
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 255
    prompt = TEXTS[1][:5]
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    assert ids[0].tolist() == [*prompt.encode()]
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    ours = run_main("sample", *words, "--prompt", prompt, "--tokens", 12, "--temperature", 0)
    assert ours.returncode == 0, ours.stderr
    theirs = bytes(i for i in out.tolist() if i < 255).decode("utf-8", "replace")
    assert ours.stdout == f"{prompt}{theirs}\n"
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == 255
