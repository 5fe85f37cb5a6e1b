"""Ours and transformers' models, from the same random weights, give the same logits; both ways, any mesh."""

from __future__ import annotations

import importlib.util
import json

import jax
import numpy as np
import pytest

import spmd
from spmd.weights.huggingface import config, names
from tests.marks import slow_but

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None,
    reason="needs requirements/peers.txt",
)

TIME, VOCAB = 16, 60
EXPERIMENT = '''"""Random tokens.

python run.py --experiment tiny.py        # some seconds; expect nothing
"""

import numpy as np

from spmd import Experiment
from spmd.data import Arrays
from spmd.models.attention import RopeScaling
from spmd.models.moe import Experts
from spmd.models.transformer import Transformer
from spmd.optim import AdamW
from spmd.tasks import LanguageModel


def examples():
    tokens = np.random.default_rng(0).integers(0, {vocab}, (32, {time})).astype(np.int32)
    return {{"tokens": tokens, "targets": np.roll(tokens, -1, 1)}}


def config():
    return Experiment(
        model=Transformer(vocab={vocab}, length={time}, {model}),
        task=LanguageModel(),
        data=Arrays(
            train=examples,
            eval=examples,
            batch_size=8,
            features={{"tokens": (({time},), "int32"), "targets": (({time},), "int32")}},
        ),
        optimizer=AdamW(),
    )
'''
GPT2 = 'norm="layer", activation="gelu", position="learned", bias=True'
SIZES = "layers=2, embed=32, heads=4"
GEMMA = "embed=32, heads=4, kv_heads=2, head_dim=10, mlp=48, norm_at='both', norm_offset=1.0, tied=True,"
GEMMA += " activation='geglu', embed_scale=True, score_width=12"
MODELS = {
    "gpt2": f"{SIZES}, {GPT2}, tied=True",
    "gpt2 untied": f"{SIZES}, {GPT2}, mlp=48, vocab_multiple=64",
    "llama": f"{SIZES}, mlp=48, rope_theta=10000.0",
    "llama gqa tied": f"{SIZES}, kv_heads=2, head_dim=16, mlp=48, tied=True, vocab_multiple=64,"
    " norm_epsilon=1e-6",
    "mixtral": f"{SIZES}, kv_heads=2, mlp=48, rope_theta=1e6, experts=Experts(num=4)",
    "llama biases": f"{SIZES}, kv_heads=2, mlp=48, bias=True",
    "llama scaled": f"{SIZES}, kv_heads=2, mlp=48, rope_scaling=RopeScaling(kind='llama3', length=24)",
    "llama linear": f"{SIZES}, mlp=48, rope_scaling=RopeScaling(kind='linear', factor=4.0)",
    "mistral": f"{SIZES}, kv_heads=2, mlp=48, window=(5,)",
    "mixtral windows": f"{SIZES}, kv_heads=2, mlp=48, window=(5,), experts=Experts(num=4)",
    "qwen2": f"{SIZES}, kv_heads=2, mlp=48, qkv_bias=True, tied=True, norm_epsilon=1e-6",
    "qwen3": f"{SIZES}, kv_heads=2, head_dim=10, mlp=48, qk_norm=True, vocab_multiple=64",
    "qwen3_moe": f"{SIZES}, kv_heads=2, head_dim=10, mlp=24, qk_norm=True, experts=Experts(num=4)",
    "gemma2": f"{GEMMA}, layers=4, window=(5, 0), score_cap=5.0, logit_cap=8.0",
    "gemma3_text": f"{GEMMA}, layers=7, window=(5, 5, 0), qk_norm=True, rope_theta=1e6,"
    " rope_theta_window=1e4, rope_scaling=RopeScaling(kind='linear', factor=4.0)",
    "olmo2": f"{SIZES}, kv_heads=2, mlp=48, norm_at='output', qk_norm=True, qk_norm_over='all'",
}
MESH = ("--simulate", "4", "--mesh.fsdp", "2", "--mesh.tensor", "2")
ONE = ("--simulate", "1")


@pytest.fixture(autouse=True, scope="module")
def started(devices):
    """JAX with its eight devices, before an experiment asks for fewer."""


@pytest.fixture
def tiny(tmp_path):
    """Writes the experiment file of a model; a function of its fields and command-line words."""

    def load(model, *words):
        file = tmp_path / "tiny.py"
        file.write_text(EXPERIMENT.format(vocab=VOCAB, time=TIME, model=model))
        return spmd.load(str(file), [*map(str, words), "--run.dir", str(tmp_path / "run")])

    return load


def theirs(model, **more):
    """A randomly initialised model of transformers with the sizes of ours."""
    import torch
    import transformers

    torch.manual_seed(0)
    fields = config.build_config(model, names.family_of(model), "float32")
    kind = fields.pop("model_type")
    made = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **{**fields, **more})
    )
    with torch.no_grad():  # biases are 0 and norms 1 at first: any order would do
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


def logits_of_theirs(made, tokens):
    import torch

    with torch.no_grad():
        return made(torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()


def logits_of_ours(snapshot, tokens):
    task = snapshot.program.task
    out = task.predict(*snapshot.variables, {"tokens": jax.numpy.asarray(tokens)})
    return np.asarray(out, np.float32)[..., :VOCAB]


TOKENS = np.random.default_rng(1).integers(0, VOCAB, (3, TIME)).astype(np.int32)


# On a mesh: tables padded, q and k normed by head and over all heads, experts, biases.
SHARDED = ("gpt2 untied", "llama gqa tied", "mixtral", "qwen2", "gemma3_text", "olmo2")


@pytest.mark.parametrize(
    "words,kind",
    slow_but(
        [*((ONE, kind) for kind in MODELS), *((MESH, kind) for kind in SHARDED)],
        [(words, kind) for words in (ONE, MESH) for kind in MODELS],
    ),
    ids=lambda x: x if isinstance(x, str) else "mesh" if len(x) > 2 else "one",
)
def test_from_theirs(kind, words, tiny, tmp_path):
    made = theirs(tiny(MODELS[kind]).experiment.model)
    made.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("model-*-of-*.safetensors"))) > 2
    start = tiny(MODELS[kind], "--init.from", tmp_path / "theirs", *words).init()
    want = logits_of_theirs(made, TOKENS)
    assert want.std() > 0.1
    np.testing.assert_allclose(logits_of_ours(start, TOKENS), want, atol=1e-4)
    if words is MESH:
        spec = start.arrays["params/blocks/mlp/up/kernel"].sharding.spec
        assert "tensor" in spec and "fsdp" in spec


@pytest.mark.parametrize("kind", MODELS)
def test_to_theirs(kind, tiny, tmp_path):
    import transformers

    from spmd.weights.huggingface import write

    start = tiny(MODELS[kind], *MESH).init()
    params, _ = start.program.task.plain(*start.variables)
    write.write(str(tmp_path / "ours"), tiny(MODELS[kind]).experiment.model, params, shard=20_000)
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    got = logits_of_theirs(made, TOKENS)
    np.testing.assert_allclose(got, logits_of_ours(start, TOKENS), atol=1e-4)


def test_bfloat16_and_base_models(tiny, tmp_path):
    """GPT-2 at OpenAI: tensors without a prefix, and masks beside them."""
    import torch
    from safetensors.torch import load_file, save_file

    made = theirs(tiny(MODELS["gpt2"]).experiment.model).to(torch.bfloat16)
    made.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs/model.safetensors"
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(file).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, TIME, TIME)
    save_file(tensors, file)
    start = tiny(MODELS["gpt2"], "--init.from", tmp_path / "theirs", *ONE).init()
    assert start.arrays["params/embed/table"].dtype == "float32"
    want = logits_of_theirs(made.float(), TOKENS)
    np.testing.assert_allclose(logits_of_ours(start, TOKENS), want, atol=1e-4)


def test_trained_exported_and_loaded(tiny, run_main, tmp_path):
    """Through the commands: adapters on weights of theirs, merged, evaluated by theirs."""
    import transformers

    model = MODELS["llama gqa tied"]
    theirs(tiny(model).experiment.model).save_pretrained(tmp_path / "theirs")
    words = (
        "--experiment",
        "tiny.py",
        "--init.from",
        "theirs",
        "--init.lora",
        2,
        "--run.dir",
        "run",
    )
    done = run_main(*words, *MESH, "--train.steps", 5)
    assert done.returncode == 0, done.stderr
    assert "(Hugging Face, llama, 1 file)" in done.stdout
    done = run_main("export", *words, "--to", "out")
    assert done.returncode == 0, done.stderr
    assert "step 5 is in out: config.json, model.safetensors" in done.stdout
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    relative = ("--init.from", "theirs", "--init.lora", 2)
    handle = tiny(model, *relative, *ONE)
    np.testing.assert_allclose(
        logits_of_theirs(made, TOKENS), logits_of_ours(handle.restore(), TOKENS), atol=1e-4
    )
    again = run_main("export", *words, "--to", "out")
    assert again.returncode == 2 and "exists already" in again.stderr
    assert not (tmp_path / "out.part").exists()


# ---- mistakes


@pytest.fixture
def saved(tiny, tmp_path):
    place = tmp_path / "theirs"
    theirs(tiny(MODELS["llama"]).experiment.model).save_pretrained(place, max_shard_size="20KB")
    return place


def said(tiny, place, model=MODELS["llama"], *words):
    with pytest.raises(ValueError) as error:
        tiny(model, "--init.from", place, *words, *ONE).init()
    return str(error.value)


def test_truncated_and_missing_files(tiny, saved):
    files = sorted(saved.glob("*.safetensors"))
    first = files[0]
    first.write_bytes(first.read_bytes()[:-10])
    assert f"{first} is truncated, or no safetensors file" in said(tiny, saved)
    first.unlink()
    assert f"{first}, which the index names, is missing" in said(tiny, saved)


def test_missing_and_unexpected_tensors_and_other_shapes(tiny, saved):
    from safetensors.numpy import load_file, save_file

    file = next(f for f in saved.glob("*.safetensors") if "model.norm.weight" in load_file(f))
    tensors = load_file(file)
    tensors["model.norm.other"] = tensors.pop("model.norm.weight")
    save_file(tensors, file)
    assert "holds model.norm.other, which" in said(tiny, saved)
    (saved / "model.safetensors.index.json").unlink()
    message = said(tiny, saved)
    assert "model.norm.weight: absent in the checkpoint, [32] in the model" in message
    assert "model.norm.other: F32[32] in the checkpoint, absent in the model" in message
    (saved / "config.json").unlink()
    message = said(tiny, saved, MODELS["llama"].replace("mlp=48", "mlp=64"))
    assert (
        "model.layers.0.mlp.up_proj.weight: F32[48, 32] in the checkpoint, [64, 32] in the model"
        in message
    )


def test_what_no_shape_tells_is_read_from_config_json(tiny, saved):
    message = said(tiny, saved, MODELS["llama"].replace("10000.0", "500000.0"))
    assert "rope_theta: 10000.0 in config.json, 500000.0 in the model" in message
    file = saved / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"rope_parameters": {"rope_type": "yarn"}}))
    assert "rope_type: yarn in config.json, which the model does not have" in said(tiny, saved)
    file.write_text("{")
    assert "is no JSON object" in said(tiny, saved)


def test_a_model_of_no_family_is_refused(tiny, saved):
    message = said(tiny, saved, MODELS["llama"] + ", logit_cap=30.0")
    assert "not llama for model.logit_cap=30.0" in message


def test_every_field_of_their_classes_is_known(tiny):
    """A later version's new field would be refused, rather than another function computed."""
    for kind in MODELS:
        model = tiny(MODELS[kind]).experiment.model
        family = names.family_of(model)
        fields = theirs(model).config.to_dict()
        assert config.find_differences(model, family, fields) == []
