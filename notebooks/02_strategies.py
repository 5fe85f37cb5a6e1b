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
# Three strategies by which eight devices train one model, side by side: an all-reduce of the gradients around
# a ring, a parameter server that is sharded over the devices, and replicas that take local steps and
# synchronise now and then. What each does, and where the code is: `docs/strategies.md`.
#
# The devices are simulated, so the notebook runs on a CPU in about a minute. Cells may be run again: finished
# runs are reused.

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
# Seed, data and number of steps are the same for all. An entry is the name of a strategy with its options.
# The network is a model: eight devices joined by 10 Gb Ethernet, each with a millisecond of computation per
# step.

# %%
entries = [
    "allreduce:reduction=ring",
    "server",
    "server:staleness=2:optimizer.learning_rate=0.03",
    "local:period=20:outer=average",
]
comparison = exp.compare(entries, network="10gbe", compute=1e-3)

# %%
display(comparison)

# %% [markdown]
# The ring and the server at staleness 0 are the same algorithm, synchronous SGD: their curves coincide, and
# they send the same bytes, $2 (N-1)/N$ of the parameters per step. A stale server does not wait for the
# newest parameters: it sends as much, and needs a lower learning rate. The replicas of `local` exchange their
# parameters in every 20th step, and therefore send a twentieth.

# %%
sent = {result.entry: result.charge.sent_bytes for result in comparison.results}
parameters = 4 * 50_826
for entry, size in sent.items():
    print(f"{entry:50} {size / (2 * 7 / 8 * parameters):.3f} x 2 (N-1)/N P")

# %% [markdown]
# ## The same runs on other networks
#
# Nothing is trained again: the runs are finished, and only the network of the time model changes.

# %%
networks = ["nvlink", "10gbe", "wan", "home"]
fig, ax = plt.subplots(figsize=(8, 3), layout="constrained")
places, width = np.arange(len(networks)), 0.2
for i, entry in enumerate(entries):
    seconds = [comparison.on(name).step_seconds(comparison.results[i]) for name in networks]
    ax.bar(places + i * width, seconds, width, label=entry)
ax.set(ylabel="seconds per step", yscale="log")
ax.set_xticks(places + 1.5 * width, networks)
ax.legend(fontsize="small")
plt.show()

# %% [markdown]
# ## Accuracy

# %%
for result in comparison.results:
    print(f"{result.entry:50} test accuracy {result.last('eval/accuracy'):.3f}")

# %%
print(f"lowest accuracy {min(result.last('eval/accuracy') for result in comparison.results):.3f}")
