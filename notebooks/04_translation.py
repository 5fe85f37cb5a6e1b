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
# # Translation
#
# From pairs of texts to translations: look at the packed rows, train a small encoder-decoder, score it, and
# see which words of the source each new token reads. The pairs are generated, numbers in English and German
# words, whose order differs (twenty-one, einundzwanzig). It runs on a CPU in less than a minute.
#
# With pairs of your own: `--data.files train.parquet --data.source-column en --data.target-column de`.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import spmd
from spmd.train.beam import BeamSearch
from spmd.train.translate import Decoding
from spmd.train.translation import translate_texts

words = """
--model.encoder-layers 1 --model.layers 1 --model.embed 96 --model.dropout 0 --data.tokenizer bpe:400
--train.steps 90 --eval.every 45 --log.every 45 --optimizer.learning-rate 5e-3
--run.dir runs/translation
"""
exp = spmd.load("translate_help", words.split())

# %% [markdown]
# ## The data
#
# One tokenizer encodes both sides: a byte-level BPE of 400 tokens, trained on the pairs. Several pairs share
# a row; colours are pairs, white is padding. Attention, cross-attention too, stays within a pair.

# %%
data = exp.experiment.data
rows = data.open("train")
for source, target in list(data.pairs("train"))[:3]:
    print(f"{source}  ->  {target}")
batch = rows.take(np.arange(8))
fig, axes = plt.subplots(1, 2, figsize=(8, 2), layout="constrained")
for ax, name in zip(axes, ("source_segments", "segments"), strict=True):
    ax.imshow(np.where(batch[name], batch[name], np.nan), aspect="auto", cmap="tab10")
    ax.set(title=name, xlabel="token", ylabel="row")
plt.show()
pairs = rows.num_pairs
print(f"{pairs} pairs in {len(rows)} rows, {(batch['segments'] == 0).mean():.0%} padding")

# %% [markdown]
# ## Training
#
# After every 45 steps a beam search translates 100 other numbers. `exact` is the share of translations that
# are right; with `pip install sacrebleu` there are BLEU and chrF too.

# %%
run = exp.train()

# %%
fig, ax = plt.subplots(figsize=(5, 2.5), layout="constrained")
ax.plot(*run.series("eval/translation/exact"), marker=".")
ax.set(xlabel="step", ylabel="exact translations", ylim=(0, 1))
plt.show()

# %% [markdown]
# ## Translations
#
# The same as `python run.py sample --experiment translate_help ...` with lines of text.

# %%
model = exp.restore()
texts = ["eighty-four", "three hundred seventeen", "nine thousand twenty-one"]
found = translate_texts(model, data, texts, Decoding(search=BeamSearch(beams=4)))
for text, translation in zip(texts, found, strict=True):
    print(f"{text}  ->  {translation}")

# %% [markdown]
# ## Which words a token reads
#
# A token of the target depends on one of the source as far as its probability changes when that one is
# hidden. Each row is a token of the translation: dark is a large loss of log-probability.

# %%
tokenizer = data.open_tokenizer()
source, target = data.encode([texts[0], found[0]])
hidden = 1 - np.eye(len(source), dtype=np.int32)  # a row for each token that is hidden
segments = np.concatenate([np.ones((1, len(source)), np.int32), hidden])
tokens = np.append([tokenizer.end], target[:-1]).astype(np.int32)
repeat = lambda x: jnp.asarray(np.tile(x, (len(segments), 1)))
inputs = repeat(tokens), repeat(source), None, jnp.ones_like(repeat(tokens)), None, segments


@jax.jit
def log_probabilities(params, state):
    logits = model.program.task.call(params, state, lambda module: module(*inputs))
    return jax.nn.log_softmax(logits)[:, np.arange(len(target)), target]


values = np.asarray(log_probabilities(*model.variables))
drop = np.maximum(values[:1] - values[1:], 0).T
name = lambda ids: [tokenizer.decode([int(i)]).strip() or "end" for i in ids]
fig, ax = plt.subplots(figsize=(4, 3), layout="constrained")
ax.imshow(np.sqrt(drop), cmap="Blues")
ax.set_xticks(range(len(source)), name(source), rotation=60)
ax.set_yticks(range(len(target)), name(target))
plt.show()

# %%
print(f"exact {run.metrics['eval/translation/exact']:.2f} of 100 numbers")
