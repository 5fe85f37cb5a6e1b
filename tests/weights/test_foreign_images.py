"""ResNet and ViT in the layout of Hugging Face: read and written, running statistics included."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest

import spmd
from spmd.core import tree
from spmd.models.functional import functionalize
from spmd.models.resnet import ResNet
from spmd.models.vit import ViT
from spmd.parallel import mesh, sharding
from spmd.weights.huggingface import config, names, read, write

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None,
    reason="needs requirements/peers.txt",
)
SIDE = 16
VIT = "image=16, patch=4, layers=2, embed=32, heads=4, mlp=48, norm_epsilon=1e-12"
MODELS = {
    "basic": "ResNet(depth=18, width=4, classes={classes})",
    "bottleneck": "ResNet(depth=50, width=4, classes={classes})",
    "vit": f"ViT({VIT}, classes={{classes}})",
}
EXPERIMENT = '''"""Random images.

python run.py --experiment tiny.py        # some seconds; expect nothing
"""

import numpy as np

from spmd import Experiment
from spmd.data import Arrays
from spmd.models.resnet import ResNet
from spmd.models.vit import ViT
from spmd.optim import SGD
from spmd.tasks import Classification


def examples():
    draws = np.random.default_rng(0)
    image = draws.normal(size=(16, 16, 16, 3)).astype(np.float32)
    return {{"image": image, "label": draws.integers(0, 5, 16).astype(np.int32)}}


def config():
    features = {{"image": ((16, 16, 3), "float32"), "label": ((), "int32")}}
    return Experiment(
        model={model},
        task=Classification(),
        data=Arrays(train=examples, eval=examples, batch_size=8, features=features),
        optimizer=SGD(),
    )
'''
MESH = ("--simulate", "4", "--mesh.fsdp", "2", "--mesh.tensor", "2")
IMAGES = np.random.default_rng(1).normal(size=(3, SIDE, SIDE, 3)).astype(np.float32)


def model_of(kind, classes=7):
    return eval(MODELS[kind].format(classes=classes), {"ResNet": ResNet, "ViT": ViT})


def arrays_of(model, seed=0):
    """(params, model_state) whose every value is drawn: zeros and ones would fit any array."""
    drawn = np.random.default_rng(seed)
    draw = lambda x: np.abs(drawn.normal(size=x.shape)).astype(np.float32) + 0.1
    return jax.tree.map(draw, jax.eval_shape(functionalize(model).init, jax.random.key(0)))


def wanted_of(model, config):
    """Shapes and shardings of the arrays on eight devices."""
    cut, net = mesh.make(config, jax.devices()), functionalize(model)
    params, state = jax.eval_shape(net.init, jax.random.key(0))
    placed = sharding.param_shardings(params, net.dims, cut, fsdp=True)
    whole = jax.sharding.NamedSharding(cut, jax.sharding.PartitionSpec())
    shardings = {"params": placed, "model_state": jax.tree.map(lambda _: whole, state)}
    leaves = tree.named_leaves({"params": params, "model_state": state})
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
        for (name, leaf), where in zip(leaves.items(), jax.tree.leaves(shardings), strict=True)
    }


@pytest.mark.parametrize("kind", MODELS)
def test_written_and_read_onto_a_mesh(kind, tmp_path, devices):
    model = model_of(kind)
    params, state = arrays_of(model)
    write.write(str(tmp_path / "out"), model, params, state, shard=20_000)
    source = read.find(tmp_path / "out", model)
    wanted = wanted_of(model, mesh.MeshConfig(data=1, fsdp=4, tensor=2))
    source.check(wanted)
    got = source.read(wanted)
    want = tree.named_leaves({"params": params, "model_state": state})
    assert got.keys() == want.keys() and source.arrays == sorted(want)
    for name, leaf in want.items():
        np.testing.assert_array_equal(got[name], leaf, err_msg=name)
        assert got[name].sharding == wanted[name].sharding
    assert any(
        "fsdp" in str(x.sharding.spec) and "tensor" in str(x.sharding.spec) for x in got.values()
    )


def test_resnet50_and_vit_b16_have_the_tensors_of_their_checkpoints():
    """microsoft/resnet-50: five arrays for each of 53 convolutions; google/vit-base-patch16-224: 200."""
    resnet = [t.name for t in names.tensors(ResNet(depth=50), "resnet")]
    assert len(set(resnet)) == len(resnet) == 53 * 5 + 2
    assert "resnet.encoder.stages.3.layers.2.layer.2.normalization.running_var" in resnet
    model = ViT(embed=768, heads=12, norm_epsilon=1e-12)
    vit = [t.name for t in names.tensors(model, "vit")]
    assert len(set(vit)) == len(vit) == 12 * 16 + 8
    fields = {"model_type": "vit", "hidden_size": 768, "image_size": 224, "layer_norm_eps": 1e-12}
    assert config.find_differences(model, "vit", fields) == []
    assert config.find_differences(ResNet(depth=50), "resnet", {"layer_type": "bottleneck"}) == []


OTHER = [
    ("basic", {"downsample_in_bottleneck": True}, "downsample_in_bottleneck: True in config.json"),
    ("basic", {"depths": [3, 4, 6, 3]}, r"depths: \[3, 4, 6, 3\] in config.json, \[2, 2, 2, 2\]"),
    ("vit", {"layer_norm_eps": 1e-6}, "layer_norm_eps: 1e-06 in config.json, 1e-12 in the model"),
    ("vit", {"hidden_act": "gelu_new"}, "hidden_act: gelu_new in config.json, gelu in the model"),
    ("vit", {"rope_theta": 1e4}, "rope_theta: 10000.0 in config.json, which vit does not have"),
]


@pytest.mark.parametrize("kind, fields, message", OTHER)
def test_another_function_is_refused_by_name(kind, fields, message, tmp_path):
    model = model_of(kind)
    write.write(str(tmp_path / "out"), model, *arrays_of(model))
    file = tmp_path / "out/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(ValueError, match=message):
        read.find(tmp_path / "out", model)


def test_every_field_of_a_model_is_exported_or_of_no_output():
    """A field added to ViT or ResNet is given a place here, or exports would lose it."""
    written = "embed heads kv_heads head_dim mlp norm_epsilon image patch channels classes layers"
    by_family = "norm activation bias mask window position pool experts depth width groups"
    by_family += " qk_norm qk_norm_over norm_at norm_offset score_width score_cap qkv_bias"
    training = "dropout init_std dtype attention context scan remat saved zero_head"
    known = {*written.split(), *by_family.split(), *training.split()}
    for model in (ViT, ResNet):
        assert {f.name for f in dataclasses.fields(model)} <= known


def test_models_that_hugging_face_lacks_are_named():
    for model, field in (
        (ResNet(depth=20), "model.depth=20"),
        (ResNet(norm="group"), "model.norm=group"),
        (ViT(pool="mean"), "model.pool=mean"),
        (ViT(score_cap=50.0), "model.score_cap=50.0"),
    ):
        with pytest.raises(ValueError, match=f"no (ResNet|ViT) with {field}"):
            names.family_of(model)


@pytest.fixture
def tiny(tmp_path, devices):
    """Writes the experiment file of a model; a function of its kind, classes and command-line words."""

    def load(kind, classes, *words):
        file = tmp_path / "tiny.py"
        file.write_text(EXPERIMENT.format(model=MODELS[kind].format(classes=classes)))
        return spmd.load(str(file), [*map(str, words), "--run.dir", str(tmp_path / "run")])

    return load


@pytest.mark.gate
def test_a_new_head_for_other_classes_then_exported(tiny, run_main, tmp_path):
    """From seven classes to five: all but the head is read; trained, the statistics move; exported."""
    model = model_of("basic")
    params, state = arrays_of(model)
    write.write(str(tmp_path / "theirs"), model, params, state)
    with pytest.raises(ValueError, match=r"classifier\.1\.bias: F32\[7\].*\[5\] in the model"):
        tiny("basic", 5, "--init.from", tmp_path / "theirs", "--simulate", "1").init()
    words = ("--init.from", tmp_path / "theirs", "--init.skip", "head/*", "--simulate", "1")
    start = tiny("basic", 5, *words).init()
    name = "blocks/0/first/norm/var"
    np.testing.assert_array_equal(
        start.arrays[f"model_state/{name}"], tree.named_leaves(state)[name]
    )
    assert start.arrays["params/head/kernel"].shape == (32, 5)

    common = ("--experiment", "tiny.py", "--run.dir", "run", *words)
    done = run_main(*common, "--train.steps", 2)
    assert done.returncode == 0, done.stderr
    done = run_main("export", *common, "--to", "out")
    assert done.returncode == 0, done.stderr
    exported = read.find(tmp_path / "out", model_of("basic", 5))
    wanted = wanted_of(model_of("basic", 5), mesh.MeshConfig(data=8))
    trained = tiny("basic", 5, *words).restore().arrays
    for array, value in exported.read(wanted).items():
        np.testing.assert_array_equal(value, trained[array], err_msg=array)
    assert not np.allclose(trained[f"model_state/{name}"], tree.named_leaves(state)[name])


# ---- beside transformers


def theirs(model):
    """A randomly initialised model of transformers with the sizes of ours."""
    import torch
    import transformers

    family = names.family_of(model)
    fields = config.build_config(model, family, "float32")
    kind = {"resnet": "ResNet", "vit": "ViT"}[family]
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{kind}ForImageClassification")(
        getattr(transformers, f"{kind}Config")(**fields)
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in theirs.named_buffers():
            if "running" in name:
                buffer.add_(0.5 * torch.rand_like(buffer))
    return theirs.eval()


def logits_of_theirs(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor(IMAGES.transpose(0, 3, 1, 2))).logits.numpy()


def logits_of_ours(snapshot):
    image = jax.numpy.asarray(IMAGES)
    return np.asarray(snapshot.program.task.predict(*snapshot.variables, {"image": image}))


@needs_transformers
@pytest.mark.parametrize("words", [("--simulate", "1"), MESH], ids=["one", "mesh"])
@pytest.mark.parametrize("kind", MODELS)
def test_from_theirs(kind, words, tiny, tmp_path):
    other = theirs(model_of(kind))
    other.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    start = tiny(kind, 7, "--init.from", tmp_path / "theirs", *words).init()
    want = logits_of_theirs(other)
    assert want.std() > 0.01
    np.testing.assert_allclose(logits_of_ours(start), want, atol=1e-4)
    model = model_of(kind)
    assert config.find_differences(model, names.family_of(model), other.config.to_dict()) == []


@needs_transformers
@pytest.mark.parametrize("kind", MODELS)
def test_to_theirs(kind, tiny, tmp_path):
    import transformers

    start = tiny(kind, 7, *MESH).init()
    params, state = start.program.task.plain(*start.variables)
    draw = np.random.default_rng(0)
    moved = jax.tree.map(
        lambda x: x + 0.3 * draw.random(x.shape).astype(np.float32), (params, state)
    )
    write.write(str(tmp_path / "ours"), model_of(kind), *moved)
    other = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "ours").eval()
    predict = start.program.task.predict
    want = np.asarray(predict(*moved, {"image": jax.numpy.asarray(IMAGES)}))
    np.testing.assert_allclose(logits_of_theirs(other), want, rtol=1e-4, atol=1e-4)
