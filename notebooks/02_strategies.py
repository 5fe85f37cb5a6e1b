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
# # Ring, server, local
#
# Three ways in which eight devices train one model, side by side: a ring of neighbours that sums gradients, a
# parameter server that is spread over the devices, and replicas that train by themselves and meet now and
# then. What each part of them does, and where it stands: `docs/strategies.md`.
#
# The devices are simulated, so that all of it runs on a CPU in about a minute. Cells may be run again:
# finished runs are taken as they are.

# %%
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display

import spmd

words = """
--simulate 8 --mesh.replica 8 --mesh.data 1
--train.steps 240 --log.every 10 --eval.every 240
--run.dir runs/strategies
"""
exp = spmd.load("digits", words.split())

# %% [markdown]
# ## Four entries, one budget
#
# The same seed, data and number of steps for all. An entry is the name of a strategy with its options. The
# network is a model: eight devices joined by 10 Gb Ethernet, each with a millisecond of computation a step.

# %%
entries = [
    "allreduce:reduction=ring",
    "server",
    "server:staleness=2:optimizer.learning_rate=0.03",
    "local:period=20:outer=average",
]
made = exp.compare(entries, network="10gbe", compute=1e-3)

# %%
display(made)

# %% [markdown]
# The ring and the server at staleness 0 are the same algorithm, synchronous SGD: their curves lie on one
# another, and they send the same bytes, $2 (N-1)/N$ of the parameters in each step. A stale server does not
# wait for the newest parameters: that sends as much, and asks for a lower learning rate. The replicas of
# `local` exchange their parameters in every 20th step, and so send a twentieth.

# %%
sent = {result.entry: result.charge.sent_bytes for result in made.results}
parameters = 4 * 50_826
for entry, size in sent.items():
    print(f"{entry:50} {size / (2 * 7 / 8 * parameters):.3f} x 2 (N-1)/N P")

# %% [markdown]
# ## The same runs on other networks
#
# Nothing is trained anew: the runs are finished, and only the clock of the model is another one.

# %%
networks = ["nvlink", "10gbe", "wan", "home"]
fig, ax = plt.subplots(figsize=(8, 3), layout="constrained")
places, width = np.arange(len(networks)), 0.2
for i, entry in enumerate(entries):
    each = [made.on(name).step_seconds(made.results[i]) for name in networks]
    ax.bar(places + i * width, each, width, label=entry)
ax.set(ylabel="seconds a step", yscale="log")
ax.set_xticks(places + 1.5 * width, networks)
ax.legend(fontsize="small")
plt.show()

# %% [markdown]
# ## What they reached

# %%
for result in made.results:
    print(f"{result.entry:50} test accuracy {result.last('eval/accuracy'):.3f}")

# %%
print(f"accuracy {min(result.last('eval/accuracy') for result in made.results):.3f}, at least")
