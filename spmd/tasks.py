"""What is learned: a model, its loss as sums with global weights, its metrics."""

# B batch, C classes, T time, D embed, V vocab

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spmd import batches, losses, scope, tree
from spmd.batches import Ids, feature
from spmd.fields import check
from spmd.network import Network, network

Batch = Mapping[str, jax.Array]
PyTree = Any
Sums = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, weight)
Notes = dict[str, tuple[jax.Array, jax.Array]]  # name -> ([B], its weights)
FROZEN = "frozen"  # where in the model state parameters lie that are not trained


class Staged(NamedTuple):
    """A training loss in parts, for a pipeline. params: a tree in which stacked leaves may hold only some of
    the layers; enter and leave read none of these, through reads no others. The model state is of layers too,
    each of its leaves stacked.

    enter: (params, batch, step_key) -> x, what the first layer reads.
    through: (params, state, x, batch, step_key, first, scale) -> (x behind these layers, scaled sum, Sums,
      their new state); first: the number of the first.
    leave: (params, x, batch, step_key, scale) -> (scaled sum, Sums).
    stream: logical dims of x.
    """

    enter: Callable[..., jax.Array]
    through: Callable[..., tuple[jax.Array, jax.Array, Sums, PyTree]]
    leave: Callable[..., tuple[jax.Array, Sums]]
    stream: tuple[str, ...]


def _unstaged() -> Staged:
    raise ValueError(
        "mesh.stage cuts layers, and this task does not say what they are; use --mesh.stage 1"
    )


class Task(NamedTuple):
    """Pure functions over plain dicts; what a strategy is handed.

    init: key -> (params, model_state). dims: logical dims by parameter name, None where there are none.
    coefficients: the factor of each loss term.
    weigh: batch -> the weight of each loss term, as wide as the parameters: 1 / weight must round to the same
      whatever is divided first; depends on the batch only, is summed over the devices.
    loss: (params, model_state, batch, step_key, scale) -> (scaled sum, (Sums, model_state)),
      scale = coefficient / global weight for each term, known before the backward pass.
    evaluate: (params, model_state, batch) -> Sums.
    predict: (params, model_state, batch) -> logits.
    ranges: (shapes of a batch, of its logits) -> the range of each feature that holds indices; ValueError,
      with the shapes, for those that the task does not take.
    call: (params, model_state, fn) -> fn(module), as in evaluation; for what a model does beside (decoding).
    whole_batch: layers that take statistics over the batch they see; only a jitted whole batch is right.
    state_dims: logical dims of what in the model state is cut as parameters are; the rest lies whole on
      every device.
    plain: (params, model_state) -> those of the model itself, where the task trains something else.
    staged: () -> the loss in parts; ValueError, by name, for a model that is no stack of layers.
    """

    init: Callable[[jax.Array], tuple[PyTree, PyTree]]
    dims: dict[str, tuple[str, ...] | None]
    coefficients: dict[str, float]
    weigh: Callable[[Batch], dict[str, jax.Array]]
    loss: Callable[..., tuple[jax.Array, tuple[Sums, PyTree]]]
    evaluate: Callable[[PyTree, PyTree, Batch], Sums]
    predict: Callable[[PyTree, PyTree, Batch], jax.Array]
    call: Callable[..., Any]
    whole_batch: tuple[str, ...] = ()
    state_dims: Mapping[str, tuple[str | None, ...] | None] = MappingProxyType({})
    ranges: Callable[[Any, Any], dict[str, Ids]] = lambda batch, logits: {}
    plain: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]] = lambda params, state: (params, state)
    staged: Callable[[], Staged] = _unstaged

    def scale(self, weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """coefficient / global weight; 0 where a term has no weight in this batch."""
        return {
            term: jnp.where(w > 0, self.coefficients[term] / jnp.where(w > 0, w, 1), 0)
            for term, w in weights.items()
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification:
    """Classes from images or vectors: softmax cross-entropy, accuracy; both blended under mixup."""

    input: str = "image"
    """Name of the input feature; uint8 is scaled to [0, 1]."""
    label: str = "label"
    """Name of the class-index feature."""
    label_smoothing: float = 0.0
    """Mass spread evenly over the classes."""

    def __post_init__(self) -> None:
        check(
            0 <= self.label_smoothing < 1,
            f"task.label_smoothing={self.label_smoothing} must be in [0, 1)",
        )

    def build(self, model: Any, param_dtype: str = "float32") -> Task:
        """The task of a model that maps [B, ...] to logits [B, C]."""
        net = network(model, param_dtype)
        real = tree.wide(jnp.dtype(param_dtype))

        def sums(logits_BC: jax.Array, batch: Batch, smoothing: float) -> Sums:
            self._check(batch, logits_BC)

            def against(label_B: jax.Array) -> tuple[jax.Array, jax.Array]:
                label_B = batches.wide_indices(label_B)
                loss_B = losses.cross_entropy(logits_BC, label_B, smoothing)
                return loss_B, (logits_BC.argmax(-1).astype(label_B.dtype) == label_B).astype(
                    loss_B.dtype
                )

            loss_B, right_B = against(batch[self.label])
            if "mix" in batch:  # mixup: the loss of a blend is the blend of the losses
                share_B = batch["mix"].astype(loss_B.dtype)
                other = against(batch[f"{self.label}_b"])
                loss_B, right_B = (
                    share_B * a + (1 - share_B) * b
                    for a, b in zip((loss_B, right_B), other, strict=True)
                )
            weight_B = batch["weight"].astype(loss_B.dtype)
            weight = weight_B.sum()
            return {
                "loss": (jnp.sum(loss_B * weight_B), weight),
                "accuracy": (jnp.sum(right_B * weight_B), weight),
            }

        def loss(params, model_state, batch, step_key, scale):
            with _training(batch, step_key):
                logits_BC, model_state = net.apply(
                    params, model_state, self._input(batch, real), train=True
                )
            metrics = sums(logits_BC, batch, self.label_smoothing)
            return _scaled(metrics, scale), (metrics, model_state)

        def finish(module, x, batch, scale):
            metrics = sums(module.logits(x), batch, self.label_smoothing)
            return _scaled(metrics, scale), metrics

        def predict(params, model_state, batch):
            return net.apply(params, model_state, self._input(batch, real), train=False)[0]

        def ranges(batch, logits):
            self._check(batch, logits)
            labels = Ids(logits.shape[-1], "classes of the model's output", target=True)
            return dict.fromkeys(self._labels(batch), labels)

        return Task(
            init=net.init,
            dims=net.dims,
            coefficients={"loss": 1.0},
            weigh=lambda batch: {"loss": jnp.sum(batch["weight"].astype(real))},
            loss=loss,
            predict=predict,
            call=net.evaluated,
            whole_batch=net.whole_batch,
            evaluate=lambda p, s, batch: sums(predict(p, s, batch), batch, 0.0),
            ranges=ranges,
            staged=lambda: _staged(net, lambda batch: [self._input(batch, real)], finish),
        )

    def _labels(self, batch: Batch) -> list[str]:
        """The label, and under mixup that of the other image."""
        return [self.label, f"{self.label}_b"] if "mix" in batch else [self.label]

    def _check(self, batch: Batch, logits_BC: Any) -> None:
        """ValueError for shapes or types that this task does not take."""
        for name in self._labels(batch):
            batches.check_indices(batch, name, "B", "one class for each example")
        batches.check_logits(logits_BC, batch[self.label], self.label, "classes")

    def _input(self, batch: Batch, real: Any) -> jax.Array:
        """The feature in floating point, as wide as `real` at least."""
        x = feature(batch, self.input)
        if x.dtype == jnp.uint8:
            return x.astype(real) / 255
        narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < real.itemsize
        return x.astype(real) if narrow else x


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """The next token: cross-entropy over the tokens that count, those with a target of at least 0."""

    inputs: tuple[str, ...] = ("tokens", "positions", "segments")
    """What the model is called with, in order; the last two only where the batch has them."""
    z_loss: float = 0.0
    """Weight of the squared log-partition as a second loss (PaLM: 1e-4): keeps logits small; 0 is off."""
    chunks: int = 1
    """Parts of the sequence whose logits are held at once; more is less memory, and slower."""

    def __post_init__(self) -> None:
        check(self.z_loss >= 0, f"task.z_loss={self.z_loss} must not be negative")
        check(bool(self.inputs), "task.inputs must name at least the tokens")
        check(self.chunks >= 1, f"task.chunks={self.chunks} must be at least 1")

    def build(self, model: Any, param_dtype: str = "float32") -> Task:
        """The task of a model that maps tokens [B, T] to logits [B, T, V]; with chunks, by its methods
        `hidden` and `logits`. The batch: tokens, targets [B, T], and perhaps positions and segments [B, T].
        """
        net = network(model, param_dtype)
        real = tree.wide(jnp.dtype(param_dtype))
        noted: dict[str, float] = getattr(model, "losses", {})
        terms = ("loss", "z_loss") if self.z_loss else ("loss",)

        def loss(params, model_state, batch, step_key, scale):
            with _training(batch, step_key):
                sums, model_state = net.call(
                    params, model_state, lambda module: self._sums(module, batch), train=True
                )
            return _scaled(sums, scale), (sums, model_state)

        def finish(module, x, batch, scale):
            sums = self._sums(module, batch, hidden=x)
            return _scaled(sums, scale), sums

        def predict(params, model_state, batch):
            return net.evaluated(params, model_state, lambda m: m(*self._inputs(batch)))

        def ranges(batch, logits):
            self._check(batch, ["targets"])
            batches.check_logits(logits, batch["targets"], "targets", "tokens of the model")
            vocab = min(getattr(model, "vocab", logits.shape[-1]), logits.shape[-1])
            tokens = Ids(vocab, "tokens of the model")
            found = {self.inputs[0]: tokens, "targets": tokens._replace(low=-1, target=True)}
            if "positions" in self.inputs and "positions" in batch and hasattr(model, "length"):
                found["positions"] = Ids(model.length, "positions of the model")
            return found

        return Task(
            init=net.init,
            dims=net.dims,
            coefficients={"loss": 1.0, "z_loss": self.z_loss} | noted,
            weigh=lambda batch: (
                dict.fromkeys(terms, _token_weights(batch).astype(real).sum())
                | dict.fromkeys(noted, batch["weight"].astype(real).sum())
            ),
            loss=loss,
            predict=predict,
            call=net.evaluated,
            whole_batch=net.whole_batch,
            evaluate=lambda p, s, batch: net.evaluated(p, s, lambda m: self._sums(m, batch)),
            ranges=ranges,
            staged=lambda: _staged(net, self._inputs, finish),
        )

    def _sums(self, module: Any, batch: Batch, hidden: jax.Array | None = None) -> Sums:
        """hidden: what the head reads, where it is known already."""
        self._check(batch, ["targets"])
        weight_BT = _token_weights(batch)
        target_BT = batches.wide_indices(feature(batch, "targets"))
        notes: Notes = {}
        with scope.bind(notes=notes):
            if self.chunks > 1:
                totals = self._chunked(module, batch, hidden, target_BT, weight_BT)
            else:
                given = hidden is not None
                logits_BTV = module.logits(hidden) if given else module(*self._inputs(batch))
                totals = self._totals(logits_BTV, target_BT, weight_BT)
        weight = weight_BT.sum()
        sums = {name: (total, weight.astype(total.dtype)) for name, total in totals.items()}
        return sums | _noted(notes, batch)

    def _totals(
        self, logits_BTV: jax.Array, target_BT: jax.Array, weight_BT: jax.Array
    ) -> dict[str, jax.Array]:
        """Sums over these tokens."""
        batches.check_logits(logits_BTV, target_BT, "targets", "tokens of the model")
        each = losses.token_losses(logits_BTV, target_BT)
        by_name = {"loss": each.loss_BT, "accuracy": each.right_BT}
        if self.z_loss:
            by_name["z_loss"] = jnp.square(each.partition_BT)
        return {n: jnp.sum(x * weight_BT.astype(x.dtype)) for n, x in by_name.items()}

    def _chunked(
        self,
        module: Any,
        batch: Batch,
        x_BTD: jax.Array | None,
        target_BT: jax.Array,
        weight_BT: jax.Array,
    ) -> dict[str, jax.Array]:
        """As _totals, but the logits of a chunk are made, reduced and, in the backward pass, made again.

        Chunk m takes tokens m, m + M, ..., so that a cut of time over devices stays as it is.
        """
        check(
            hasattr(module, "hidden") and hasattr(module, "logits"),
            f"task.chunks={self.chunks} needs a model with methods hidden and logits, as"
            " spmd.models.transformer has them; use task.chunks=1",
        )
        time = target_BT.shape[1]
        check(
            time % self.chunks == 0,
            f"task.chunks={self.chunks} does not divide the {time} tokens of a sequence",
        )

        def split(x: jax.Array) -> jax.Array:
            x = x.reshape(x.shape[0], time // self.chunks, self.chunks, *x.shape[2:])
            return jnp.moveaxis(x, 2, 0)

        @jax.checkpoint
        def totals(x_BTD, target_BT, weight_BT):
            return self._totals(module.logits(x_BTD), target_BT, weight_BT)

        def add(sums, chunk):
            return jax.tree.map(jnp.add, sums, totals(*chunk)), None

        if x_BTD is None:
            x_BTD = module.hidden(*self._inputs(batch))
        chunks = jax.tree.map(split, (x_BTD, target_BT, weight_BT))
        shapes = jax.eval_shape(totals, *jax.tree.map(lambda x: x[0], chunks))
        zeros = scope.varying(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))
        return jax.lax.scan(add, zeros, chunks)[0]

    def _check(self, batch: Batch, names: Iterable[str]) -> None:
        """ValueError for shapes or types that this task does not take."""
        for name in names:
            batches.check_indices(batch, name, "BT", "one for each token")
            shape, tokens = batch[name].shape, feature(batch, self.inputs[0]).shape
            check(
                shape == tokens,
                f"feature {name!r} is of shape {list(shape)}, and {self.inputs[0]!r} of {list(tokens)}: the"
                " task takes one for each token",
            )

    def _inputs(self, batch: Batch) -> list[jax.Array | None]:
        first, *rest = self.inputs
        self._check(
            batch, [first, *(n for n in ("segments", "positions") if n in rest and n in batch)]
        )
        return [feature(batch, first), *(batch.get(name) for name in rest)]


PARTS = ("enter", "through", "leave", "logits", "stream")


def _staged(
    net: Network, inputs: Callable[[Batch], Any], finish: Callable[..., tuple[jax.Array, Sums]]
) -> Staged:
    """The loss in parts, of a module with PARTS: methods, and stream, the logical dims of what flows between
    them. finish: (module, x, batch, scale) -> (scaled sum, Sums), x being what the head reads.
    """
    kind = f"{net.kind.__module__}.{net.kind.__qualname__}"
    missing = [name for name in PARTS if not hasattr(net.kind, name)]
    check(
        not missing,
        f"mesh.stage cuts a stack of equal layers, and {kind} is none: it has no"
        f" {', '.join(missing)}; use spmd.models.transformer, spmd.models.mlp with model.stacked, or"
        " --mesh.stage 1",
    )
    unstacked = [name for name, dims in net.state_dims.items() if (dims or ("",))[0] != "layers"]
    check(
        not unstacked,
        f"mesh.stage: {kind} keeps a state that is not of its layers (batch statistics), which a pipeline"
        f" does not carry: {', '.join(unstacked)}; use --mesh.stage 1",
    )
    _, unread = jax.eval_shape(net.init, jax.random.key(0))

    def enter(params, batch, step_key):
        with _training(batch, step_key):
            return net.call(params, unread, lambda m: m.enter(*inputs(batch)), train=True)[0]

    def through(params, state, x, batch, step_key, first, scale):
        notes: Notes = {}
        run = lambda module: module.through(x, *inputs(batch), first=first)
        with _training(batch, step_key), scope.bind(notes=notes):
            x, state = net.call(params, state, run, train=True)
        sums = _noted(notes, batch)
        return x, _scaled(sums, scale), sums, state

    def leave(params, x, batch, step_key, scale):
        run = lambda module: finish(module, module.leave(x), batch, scale)
        with _training(batch, step_key):
            return net.call(params, unread, run, train=True)[0]

    return Staged(enter, through, leave, net.kind.stream)


def _training(batch: Batch, step_key: jax.Array) -> contextlib.AbstractContextManager[Any]:
    """The scope of a training step's forward pass: a key and a weight for each example."""
    keys_B = scope.example_keys(step_key, batch["example_id"])
    return scope.bind(keys=keys_B, weight=batch["weight"], calls=0)


def _noted(notes: Notes, batch: Batch) -> Sums:
    """What layers told of the examples, summed over these."""
    wide = lambda x_B: x_B.astype(tree.wide(x_B.dtype))
    total = lambda x_B: jnp.sum(wide(x_B) * batch["weight"].astype(wide(x_B).dtype))
    return {name: (total(value_B), total(weight_B)) for name, (value_B, weight_B) in notes.items()}


def _scaled(sums: Sums, scale: Mapping[str, jax.Array]) -> jax.Array:
    """The loss: each of its terms by its factor; a part of the model has some of them."""
    terms = [term for term in scale if term in sums]
    total = jnp.zeros((), sums[terms[0]][0].dtype if terms else scale["loss"].dtype)
    for term in terms:
        total += sums[term][0] * scale[term].astype(total.dtype)
    return total


def _token_weights(batch: Batch) -> jax.Array:
    """[B, T] the example's weight where there is a target, else 0."""
    weight_B = batch["weight"]
    counts_BT = feature(batch, "targets") >= 0
    return jnp.where(counts_BT, weight_B[:, None], jnp.zeros((), weight_B.dtype))
