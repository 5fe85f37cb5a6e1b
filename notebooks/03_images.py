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
# # Your own images
#
# From a folder of images to predictions: look at the data, train, see what is predicted, predict other files.
# It runs on a CPU in half a minute.
#
# The folder holds a folder of images for each class. This one is generated, 240 drawings of three shapes; put
# the path of your own in its place.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw

import spmd


def draw(shape: str, seed: int) -> Image.Image:
    """A circle, a square or a cross of a random size, place and colours."""
    rng = np.random.default_rng(seed)
    ground, colour = (tuple(map(int, rng.integers(*c, 3))) for c in ((0, 90), (150, 256)))
    image = Image.new("RGB", (96, 72), ground)
    pen = ImageDraw.Draw(image)
    r, x, y = rng.integers(16, 24), rng.integers(36, 60), rng.integers(30, 42)
    box = [int(x - r), int(y - r), int(x + r), int(y + r)]
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    else:
        pen.line(box, fill=colour, width=9)
        pen.line([box[0], box[3], box[2], box[1]], fill=colour, width=9)
    return image


shapes = ("circle", "cross", "square")
folder = Path("shapes")
for name in shapes:
    (folder / name).mkdir(parents=True, exist_ok=True)
    for i in range(80):
        draw(name, seed=100 * shapes.index(name) + i).save(
            folder / name / f"{i:03}.jpg", quality=90
        )

# %% [markdown]
# ## The data
#
# The classes are the names of the folders. A tenth of the files, chosen by a hash of their name, is kept for
# the evaluation (`--data.eval-fraction`). Training sees random crops and flips of them, 64 x 64 pixels.

# %%
words = """
--data.path shapes --data.batch-size 32 --train.epochs 16
--eval.every 40 --log.every 20 --run.dir runs/shapes
"""
exp = spmd.load("image_folder", words.split())
data = exp.experiment.data.found()
train, test = data.open("train"), data.open("eval")
print(
    f"classes {', '.join(data.classes)}: {len(train)} images to train on, {len(test)} to evaluate on"
)

fig, axes = plt.subplots(1, 6, figsize=(8, 1.5), layout="constrained")
batch = next(
    exp.build().host_batches(0, 1)
)  # the first batch of the training, after its transforms
for ax, image, label in zip(axes, batch["image"][:6], batch["label"][:6], strict=True):
    ax.imshow(image)
    ax.set_title(data.classes[label], fontsize=9)
    ax.axis("off")
plt.show()

# %% [markdown]
# ## Training
#
# The same as `python run.py --experiment image_folder --data.path shapes ...` in a terminal.

# %%
run = exp.train()

# %% [markdown]
# `log.pictures`, 16 in this experiment, draws evaluation examples beside their predictions at each
# evaluation.

# %%
pictures = sorted(Path("runs/shapes/pictures").iterdir())
fig, ax = plt.subplots(figsize=(8, 3.4), layout="constrained")
ax.imshow(Image.open(pictures[-1]))
ax.axis("off")
plt.show()

# %% [markdown]
# ## Predictions for other files
#
# `model.predictions` takes any source of images; `run.py predict --data.path OTHER --out predictions.jsonl`
# writes the same to a file. The classes are those of the run.

# %%
others = Path("others")
others.mkdir(exist_ok=True)
for i in range(6):
    draw(shapes[i % 3], seed=1000 + i).save(others / f"{i}.png")

model = exp.restore()
words = ["--data.path", "others", "--run.dir", "runs/shapes"]
source = spmd.load("image_folder", words).experiment.data.open_all()
logits = np.concatenate([*model.predictions(source)])
probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)

fig, axes = plt.subplots(1, 6, figsize=(8, 1.5), layout="constrained")
for i, ax in enumerate(axes):
    ax.imshow(Image.open(others / source.name_of(i)))
    ax.set_title(f"{data.classes[logits[i].argmax()]} {probability[i].max():.0%}", fontsize=9)
    ax.axis("off")
plt.show()

# %%
print(f"test accuracy {run.metrics['eval/accuracy']:.3f} on {len(test)} images")
