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
# # A recommender
#
# Films for users, from a log of who watched what: two towers with in-batch negatives, their tables sharded
# over eight simulated devices. The log is generated, its titles are made up, and each film is of one of eight
# kinds, which the model does not see. It runs on a CPU in about a minute.
#
# With MovieLens, or a log of your own: `--data.files ml-100k/u.data --data.titles ml-100k/u.item`.

# %%
import matplotlib.pyplot as plt
import numpy as np

import spmd
from spmd.train.retrieval import titles_of

words = """
--simulate 8 --mesh.data 8
--data.generated.users 500 --data.generated.items 320 --data.generated.events 40000
--data.history 20 --model.dim 32 --train.epochs 4 --eval.every 30
--run.dir runs/recommender
"""
exp = spmd.load("movielens_two_tower", words.split())

# %% [markdown]
# ## The log
#
# Events of a user are split at random into 80 % to train, 10 % to validate and 10 % to test on. A few films
# are watched by most users, most films by few.

# %%
data = exp.experiment.data
log, titles = data.log, titles_of(data)
print(f"{len(log.user_E):,} events, {len(log.users)} users, {len(log.items)} films")
fig, ax = plt.subplots(figsize=(6, 2.5), layout="constrained")
ax.plot(np.sort(np.bincount(log.item_E))[::-1])
ax.set(xlabel="films, the most watched first", ylabel="events", yscale="log")
plt.show()

# %% [markdown]
# ## Training
#
# After every 30 steps all films are ranked for each user, those of the training part left out.

# %%
run = exp.train()

# %%
fig, ax = plt.subplots(figsize=(6, 2.5), layout="constrained")
for name in ("recall@10", "ndcg@10"):
    ax.plot(*run.series(f"eval/validation/{name}"), label=name, marker=".")
ax.set(xlabel="step", ylabel="validation")
ax.legend()
plt.show()

# %% [markdown]
# ## Neighbours of a film
#
# The vectors of all films are rows of one array, sharded over the devices. Films whose vectors point the same
# way were watched by the same users, and are of one kind far more often than films chosen at random.

# %%
model = exp.restore()
vectors = np.asarray(model.retriever.index)[: len(log.items)]
unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
cosine = unit @ unit.T - 2 * np.eye(len(unit))
neighbours = np.argsort(-cosine, axis=1)[:, :5]
film = int(np.bincount(log.item_E).argmax())
title = lambda row: titles[str(log.items.words[row])]
print(f"{title(film)}:")
for row in neighbours[film]:
    print(f"  {cosine[film, row]:.2f}  {title(row)}")

# %% [markdown]
# The two main directions of the vectors, by kind:

# %%
kind = np.array([int(title(row).split("kind ")[1].rstrip(")")) for row in range(len(unit))])
centred = unit - unit.mean(0)
_, _, directions = np.linalg.svd(centred, full_matrices=False)
x, y = centred @ directions[0], centred @ directions[1]
fig, ax = plt.subplots(figsize=(5, 4), layout="constrained")
ax.scatter(x, y, c=kind, cmap="tab10", s=12)
ax.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## Recommendations
#
# Each device ranks its own films, and the best of all devices are joined: the result is exact, and films that
# a user has watched are left out.

# %%
found = model.recommend([42, 7], k=5)
for i, user in enumerate(found.users):
    print(f"user {user}:")
    for name, score in zip(found.titles[i], found.scores[i], strict=True):
        print(f"  {score:.2f}  {name}")

# %% [markdown]
# ## On the test part
#
# A film chosen at random is of the same kind as another in one of eight cases.

# %%
same = (kind[neighbours] == kind[:, None]).mean()
print(f"neighbours of the same kind: {same:.2f}")
print(
    f"test recall@10 {run.metrics['eval/test/recall@10']:.2f}, hit@10 {run.metrics['eval/test/hit@10']:.2f}"
)
