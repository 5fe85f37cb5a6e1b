# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A first run
#
# Handwritten digits on eight simulated devices: load an experiment, see how its arrays are sharded, train,
# plot, read the trained model back and predict. It runs on a CPU in half a minute, without network data.
#
# Cells may be run again: a finished run is reused, and the stop button saves the state, so that the next call
# resumes there.
#
# The words are those of the command line. `--simulate 8` creates eight CPU devices; without it, the run uses
# the real ones. The mesh holds two copies (`data`) of parameters that are sharded four ways (`fsdp`).

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

import spmd

words = """
--simulate 8 --mesh.data 2 --mesh.fsdp 4
--train.epochs 12 --eval.every 60 --log.every 20
--run.dir runs/notebook
"""
exp = spmd.load("digits", words.split())

# %% [markdown]
# ## Shardings
#
# Each array is created on the mesh with its sharding. The rows of this matrix are sharded four ways, and each
# shard is replicated twice: on devices 0 and 4, 1 and 5, and so on.

# %%
untrained = exp.init()
kernel = untrained.arrays["params/layers/1/kernel"]
print("[{}, {}] sharded by {}".format(*kernel.shape, kernel.sharding.spec))
jax.debug.visualize_array_sharding(kernel)

# %% [markdown]
# A batch is sharded eight ways, over both axes: here 64 images of 64 pixels.

# %%
jax.debug.visualize_sharding((64, 64), untrained.program.strategy.batch_shardings["image"])

# %% [markdown]
# ## Training
#
# The same as `python run.py --experiment digits ...` in a terminal.

# %%
run = exp.train()

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
left.plot(*run.series("train/loss"), label="training, with dropout")
left.plot(*run.series("eval/loss"), "o-", label="test")
left.set(xlabel="step", ylabel="loss", yscale="log")
left.legend()
right.plot(*run.series("train/accuracy"), label="training, with dropout")
right.plot(*run.series("eval/accuracy"), "o-", label="test")
right.set(xlabel="step", ylabel="accuracy", ylim=(0.7, 1))
right.legend()
plt.show()

# %% [markdown]
# ## The trained model
#
# `exp.restore()` reads the newest checkpoint, here or in another session, on any mesh.

# %%
model = exp.restore()
print(model)
print(
    "accuracy: untrained {:.3f}, trained {:.3f}".format(
        untrained.evaluate()["eval/accuracy"], model.evaluate()["eval/accuracy"]
    )
)

# %% [markdown]
# Predictions are numpy arrays: the logits of every test image. Below are the images with the least certain
# predictions.

# %%
test = exp.experiment.data.open("eval")
examples = test.take(np.arange(len(test)))
label = examples["label"]
logits = model.predict(examples)
probability = np.asarray(jax.nn.softmax(logits))
predicted = probability.argmax(-1)

fig, axes = plt.subplots(1, 8, figsize=(8, 1.6), layout="constrained")
for ax, i in zip(axes, probability.max(-1).argsort()[:8], strict=True):
    wrong = predicted[i] != label[i]
    ax.imshow(examples["image"][i, :, :, 0], cmap="gray_r")
    ax.set_title(
        f"{predicted[i]}: {probability[i].max():.0%}\n" + (f"is {label[i]}" if wrong else "right"),
        fontsize=9,
        color="tab:red" if wrong else "black",
    )
    ax.axis("off")
plt.show()

# %%
print(f"test accuracy {(predicted == label).mean():.3f} on {len(test)} images")
