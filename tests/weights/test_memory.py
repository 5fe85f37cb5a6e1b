"""The host's memory while safetensors of some GB are read onto a mesh: at most a file and 1 GiB more."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.command import REPOSITORY

SIZES = {"vocab": 1024, "length": 64, "layers": 12, "embed": 1536, "heads": 12, "mlp": 7680}

READS = """
import json, pathlib, sys
import jax
from spmd.parallel import mesh, sharding; from spmd.core import tree
mesh.simulate(4)
from spmd.models.functional import functionalize
from spmd.weights.huggingface import read
from spmd.models.transformer import Transformer

model = Transformer(**json.loads(sys.argv[2]))
cut = mesh.make(mesh.MeshConfig(data=1, fsdp=2, tensor=2), jax.devices())
net = functionalize(model)
params, _ = jax.eval_shape(net.init, jax.random.key(0))
placed = sharding.param_shardings(params, net.dims, cut, fsdp=True)
wanted = {
    f"params/{name}": jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    for (name, leaf), where in zip(tree.named_leaves(params).items(), jax.tree.leaves(placed))
}
source = read.find(pathlib.Path(sys.argv[1]), model)
source.check(wanted)
status = lambda key: next(
    int(line.split()[1]) * 1024
    for line in open("/proc/self/status")
    if line.startswith(key)
)
before = status("VmRSS")
arrays = source.read(wanted)
host = status("VmHWM") - before
sums = {name: float(abs(x).max()) for name, x in arrays.items()}
print(json.dumps({
    "host": host,
    "arrays": tree.num_bytes(arrays),
    "found": len(arrays) == len(wanted) and all(sums.values()),
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_host_peak(tmp_path):
    pytest.importorskip("safetensors")
    largest, total = synthetic(tmp_path)
    assert largest > 600e6 and len(list(tmp_path.glob("*.safetensors"))) == 3
    command = [sys.executable, "-c", READS, str(tmp_path), json.dumps(SIZES)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=900)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    print(f"largest file {largest / 1e9:.2f} GB, of {total / 1e9:.2f}; {seen}")
    assert seen["found"]
    # On simulated devices the arrays themselves lie in the host's memory too.
    assert seen["host"] - seen["arrays"] < largest + 2**30


def synthetic(place):
    """Three files with the tensors of a Llama in float32; (bytes of the largest, of all)."""
    from safetensors.numpy import save_file

    from spmd.models.transformer import Transformer
    from spmd.weights.huggingface import names

    model = Transformer(**SIZES)
    shapes = layer_shapes(model)
    files: list[dict] = [{}, {}, {}]
    where = {}
    listed = list(names.tensors(model, "llama"))
    for tensor in listed:
        number = 3 * (tensor.layer or 0) // model.layers
        number = 2 if tensor.name in ("model.norm.weight", "lm_head.weight") else number
        shape = tensor.shape(shapes)
        files[number][tensor.name] = np.full(shape, 0.5, np.float32)
        where[tensor.name] = f"model-{number + 1:05}-of-00003.safetensors"
    sizes = []
    for number, content in enumerate(files):
        save_file(content, place / f"model-{number + 1:05}-of-00003.safetensors")
        sizes.append(sum(x.nbytes for x in content.values()))
        content.clear()
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return max(sizes), sum(sizes)


def layer_shapes(model):
    """Shapes of one layer's arrays, by name."""
    import jax

    from spmd.core import tree
    from spmd.models.functional import functionalize

    params, _ = jax.eval_shape(functionalize(model).init, jax.random.key(0))
    return {
        name: leaf.shape[1:] if name.startswith("blocks/") else leaf.shape
        for name, leaf in tree.named_leaves(params).items()
    }
