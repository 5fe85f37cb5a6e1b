"""The experiment `hf`: config.json and tokenizer of a directory are all it needs, or it is refused."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import spmd
from spmd import tasks
from spmd.models.transformer import Transformer
from spmd.weights.huggingface import write
from tests.cases import MODELS

# Gemma's fields, and an odd number of layers with a window in the last one.
MODEL: Transformer = MODELS["gemma"]


def write_tokenizer(file, size):
    """A tokenizer.json of single bytes and a few merges, of `size` tokens with the end of a text."""
    import tokenizers

    made = tokenizers.ByteLevelBPETokenizer()
    text = "several words, and several words more; one after the other. " * 20
    made.train_from_iterator([text], size, special_tokens=["<eos>"], show_progress=False)
    assert made.get_vocab_size() == size
    made.save(str(file))


@pytest.fixture
def checkpoint(devices, tmp_path):
    """DIR with Gemma 3's family, and text.txt."""
    model = Transformer(
        **{f: getattr(MODEL, f) for f in ("norm_at", "norm_offset", "activation", "qk_norm")},
        **{f: getattr(MODEL, f) for f in ("embed_scale", "score_width", "tied", "window")},
        vocab=300,
        length=32,
        layers=3,
        embed=32,
        heads=4,
        kv_heads=2,
        mlp=48,
        rope_theta=1e6,
        rope_theta_window=1e4,
    )
    params, _ = jax.jit(tasks.LanguageModel().build(model).init)(jax.random.key(0))
    write.write(str(tmp_path / "DIR"), model, params)
    write_tokenizer(tmp_path / "DIR/tokenizer.json", 270)
    (tmp_path / "text.txt").write_text("several words, and more of them\n" * 200)
    return model, params


WORDS = ("--experiment", "hf", "--init.from", "DIR", "--data.files", "text.txt", "--simulate", "2")
WORDS += ("--mesh.data", "1", "--mesh.tensor", "2", "--data.cache-dir", "cache", "--run.dir", "out")
WORDS += ("--optimizer.warmup-steps", "1")


@pytest.mark.gate
def test_a_directory_is_fine_tuned_without_a_file(checkpoint, run_main, tmp_path, monkeypatch):
    _, params = checkpoint
    monkeypatch.chdir(tmp_path)
    start = spmd.load("hf", WORDS[2:]).init()
    table = start.arrays["params/embed/table"]
    assert "tensor" in table.sharding.spec
    np.testing.assert_array_equal(table, params["embed"]["table"])
    done = run_main(*WORDS, "--train.steps", 2, "--model.remat", "full")
    assert done.returncode == 0, done.stderr
    assert "(Hugging Face, gemma3_text, 1 file)" in done.stdout
    saved = json.loads((tmp_path / "out/config.json").read_text())["config"]
    assert saved["model"]["window"] == [3, 0] and saved["model"]["remat"] == "full"
    assert saved["data"]["tokenizer"] == "DIR/tokenizer.json" and saved["data"]["files"]
    sampled = run_main("sample", *WORDS, "--prompt", "several", "--tokens", 20, "--temperature", 0)
    assert sampled.returncode == 0 and sampled.stdout.startswith("several"), sampled.stderr


BAD = {  # fields of config.json, what the one line says
    "closest": ({"model_type": "gemma3n_text"}, "'gemma3n_text' is not known. The closest is gemma3_text"),
    "lacks": (
        {"model_type": "qwen2_moe", "num_shared_experts": 4},
        "is not known. The closest is qwen3_moe, which lacks:",
    ),
    "none": ({"model_type": None}, "it has no model_type; known are gpt2, llama,"),
    "code": (
        {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}},
        "comes with code of its own (auto_map), which is not executed",
    ),
    "code of a known family": (
        {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}},
        "auto_map: AutoModelForCausalLM in config.json: code of its own, which is not executed",
    ),
    "rope": (
        {"rope_parameters": None, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        "rope_type: yarn in config.json, which the model does not have (default, linear, llama3)",
    ),
    "field": ({"residual_multiplier": 0.2}, "residual_multiplier: 0.2 in config.json, a field that is"),
    "size": ({"num_attention_heads": 0}, "model.heads=0 must be at least 1"),
    "vocabulary": ({"vocab_size": 260}, "model.vocab=260 is less than the 270 tokens of data.tokenizer="),
}  # fmt: skip


@pytest.mark.gate
def test_what_cannot_be_computed_is_one_line(checkpoint, run_main, tmp_path):
    file = tmp_path / "DIR/config.json"
    fields = json.loads(file.read_text())
    for name, (change, message) in BAD.items():
        file.write_text(json.dumps(fields | change))
        done = run_main(*WORDS, "--train.steps", 2)
        (line,) = done.stderr.strip().splitlines()
        assert done.returncode == 2 and message in line, (name, line)
    file.unlink()
    done = run_main(*WORDS)
    assert (
        done.returncode == 2 and "has no config.json, which says what the model is" in done.stderr
    )
    file.write_text(json.dumps(fields))
    (tmp_path / "DIR/tokenizer.json").unlink()
    done = run_main(*WORDS)
    assert done.returncode == 2 and "give --data.tokenizer FILE" in done.stderr
