"""Differentially private training (DP-SGD): which examples a step sees, and what a run gives away.

Each step takes every example with the same probability, independently of the others (Poisson sampling);
direct.per_example clips the gradient of each, and direct.add_noise adds the noise to their sum (Abadi et al.
2016, arXiv 1607.00133).

A strategy may take a step in several parts, each a private step of its own (the replicas of `local`). In
step t example i can then be sampled by part (i - t) % parts only. So all that a step gives away of an example
comes from one part's sample, sum and noise; the other parts compute what they would without it. Given all
that was seen before, a step is one sampled Gaussian of a part's size, and steps compose as ever: the states
that parts begin with, and what they agree on, were seen already. That the turns go round is for training.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

from spmd.core.fields import check, multiples

if TYPE_CHECKING:
    import numpy as np

# Standard deviations of the sampled number that the rows hold beside its mean, by default.
ROOM = 5.0
MOST_NOISE = 100.0  # multiples of the clip norm; the largest that are in use are about 40
# Of the privacy loss, rounded to the safe side; 1e-4 takes ten times as long for 0.1 % less of epsilon.
INTERVAL = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Privacy:
    """DP-SGD, on when `epsilon` or `noise_multiplier` is given."""

    epsilon: float = 0.0
    """Privacy budget of all planned steps; determines the noise. 0: use noise-multiplier."""
    noise_multiplier: float = 0.0
    """Standard deviation of the noise on the sum of gradients, in clip norms. 0: as epsilon says."""
    delta: float = 1e-5
    """Probability that epsilon does not hold; less than one over the number of examples."""
    clip_norm: float = 1.0
    """The gradient of each example is scaled down to at most this norm."""
    expected_batch_size: int = 0
    """Examples that a step samples on average, of at most data.batch-size; 0 leaves room for 5 deviations."""

    def __post_init__(self) -> None:
        for name in ("epsilon", "noise_multiplier", "expected_batch_size"):
            value = getattr(self, name)
            check(value >= 0, f"privacy.{name}={value} must not be negative")
        check(
            not (self.epsilon and self.noise_multiplier),
            f"privacy.epsilon={self.epsilon} and privacy.noise_multiplier={self.noise_multiplier} both say"
            " how much noise there is; give one, and 0 for the other",
        )
        check(0 < self.delta < 1, f"privacy.delta={self.delta} must be in (0, 1)")
        check(self.clip_norm > 0, f"privacy.clip_norm={self.clip_norm} must be more than 0")

    @property
    def on(self) -> bool:
        """Whether the run is private at all."""
        return bool(self.epsilon or self.noise_multiplier)

    def sampled(self, batch_size: int, parts: int = 1) -> int:
        """Examples of a step on average; batch_size: rows that a step has, over all its parts."""
        if not self.on:
            return batch_size
        if not self.expected_batch_size:
            rows = batch_size // parts
            per_part = math.floor((math.sqrt(ROOM**2 + 4 * rows) - ROOM) ** 2 / 4)
            return parts * max(1, per_part)
        check(
            self.expected_batch_size <= batch_size,
            f"privacy.expected_batch_size={self.expected_batch_size} is more than the data.batch_size="
            f"{batch_size} rows of a step, which also hold what is above the average; use"
            f" {self.sampled_by_default(batch_size, parts)} or a larger --data.batch-size",
        )
        check(
            self.expected_batch_size % parts == 0,
            f"privacy.expected_batch_size={self.expected_batch_size} does not divide over the {parts}"
            f" replicas, which each sample by themselves; use {multiples(self.expected_batch_size, parts)}",
        )
        return self.expected_batch_size

    def sampled_by_default(self, batch_size: int, parts: int = 1) -> int:
        """`sampled` where no expected_batch_size is given."""
        return dataclasses.replace(self, expected_batch_size=0).sampled(batch_size, parts)

    def check_use(self, strategy: Any, data: Any, source: Any) -> None:
        """ValueError for what cannot be private; strategy, data, source: those of the experiment."""
        if not self.on:
            return
        why = strategy.not_private()
        check(
            not why,
            f"privacy: {why}; use --strategy auto or local, or allreduce or server without compression",
        )
        check(
            not hasattr(source, "order"),
            "privacy needs each example to be sampled with the same probability, and a mixture is read by"
            " weight; train on one text",
        )
        blending = [t.name or type(t).__name__ for t in data.transforms if t.partners]
        check(
            not blending,
            f"data.transforms: {', '.join(blending)} blends examples, and privacy clips the gradient of each;"
            " leave it out",
        )

    def mechanism(
        self, num_examples: int, batch_size: int, num_steps: int, parts: int = 1
    ) -> Mechanism | None:
        """The mechanism of a step, its noise calibrated to epsilon; None when privacy is off.

        Args:
            num_examples: of the training data; 0 while planning without data, which skips the accounting.
            batch_size: rows of a step.
            num_steps: length of the run.
            parts: parts of a batch that are drawn apart, as replicas are.

        Raises:
            ValueError: no noise reaches epsilon.
        """
        if not self.on:
            return None
        mean = self.sampled(batch_size, parts)
        mechanism = Mechanism(
            -(-num_examples // parts),
            mean // parts,
            batch_size // parts,
            self.clip_norm,
            self.noise_multiplier or 1.0,
            self.delta,
            parts,
        )
        if not num_examples:
            return mechanism
        check(
            mean <= num_examples,
            f"privacy: a step would sample {mean} of {num_examples} examples; use"
            f" privacy.expected_batch_size={num_examples} or less",
        )
        check(
            self.delta < 1 / num_examples,
            f"privacy.delta={self.delta} must be less than one over the {num_examples} examples"
            f" ({1 / num_examples:.1e}): to publish one of them whole would satisfy it",
        )
        if self.epsilon:
            noise = enough_noise(mechanism, num_steps, self.epsilon)
            mechanism = dataclasses.replace(mechanism, noise_multiplier=noise)
        return mechanism

    def order(self, source: Any, seed: int, batch_size: int, parts: int = 1) -> Poisson:
        """The order in which data is read: each example is drawn by itself.

        Args:
            source: training data.
            seed: of the experiment.
            batch_size, parts: as `mechanism` takes them.
        """
        mean = self.sampled(batch_size, parts)
        return Poisson(seed, len(source), mean, batch_size, parts)


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """Sampling, clipping and noise of a step: `expected` of num_examples sampled, at most `rows` used.

    parts: independently sampled parts of a step (replicas); the other numbers are per part, num_examples the
    largest part's.
    """

    num_examples: int
    expected: int
    rows: int
    clip_norm: float
    noise_multiplier: float
    delta: float
    parts: int = 1

    @property
    def examples(self) -> int:
        """Examples of a step, on average."""
        return self.expected * self.parts

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise on each element of the gradient, a sum over `expected`."""
        return self.noise_multiplier * self.clip_norm / self.expected

    def epsilon(self, num_steps: int) -> float:
        """Privacy loss of num_steps at `delta`, for an observer of the parameters after every step."""
        return epsilon(self, num_steps) if num_steps else 0.0

    def about(self, num_steps: int) -> str:
        """Summary line for the start of a run."""
        who = f"each of {self.parts} replicas" if self.parts > 1 else "each"
        return (
            f"private: epsilon {self.epsilon(num_steps):.3f} at delta {self.delta:g} after {num_steps} steps;"
            f" {who} samples {self.expected} of {self.num_examples} examples on average and uses at most"
            f" {self.rows}, clip norm {self.clip_norm:g}, noise multiplier {self.noise_multiplier:.4f}"
        )

    def same_noise(self, stored: Any) -> None:
        """ValueError when the steps so far had other noise; stored: noise_multiplier of a checkpoint."""
        check(
            stored is None or math.isclose(stored, self.noise_multiplier, rel_tol=1e-6),
            f"the steps of this run had noise multiplier {stored}, found for privacy.epsilon and the number"
            f" of steps planned then; now it would be {self.noise_multiplier}, and epsilon would not hold."
            " Resume with the former --train.steps (or epochs), or start anew with --run.fresh",
        )


class Poisson:
    """Stream position -> example index: each step takes every example with probability expected / n, in
    random order, so that those beyond its rows are a random part; -1 in the rows that are left.

    parts: each with its part of the rows, in order; part r takes in step t only examples i with
    i % parts == (r + t) % parts.
    """

    def __init__(
        self, seed: int, num_examples: int, expected: int, batch_size: int, parts: int = 1
    ):
        self._seed, self._n, self._batch_size, self._parts = seed, num_examples, batch_size, parts
        per_part = -(-num_examples // parts)
        self._probability = expected / parts / per_part

    def _step(self, step: int) -> np.ndarray:
        """[batch_size] indices of one step."""
        import numpy as np

        bits = np.random.Philox(np.random.SeedSequence([self._seed, step, int.from_bytes(b"dp")]))
        draw = np.random.Generator(bits)
        rows = self._batch_size // self._parts
        examples_PR = np.full((self._parts, rows), -1)
        for part in range(self._parts):
            first = (part + step) % self._parts
            size = len(range(first, self._n, self._parts))
            num = draw.binomial(size, self._probability)
            chosen = draw.choice(size, num, replace=False)[:rows]
            examples_PR[part, : len(chosen)] = first + self._parts * chosen
        return examples_PR.ravel()

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        import numpy as np

        steps, rows = np.divmod(positions, self._batch_size)
        out = np.empty_like(positions)
        for step in np.unique(steps):
            in_step = steps == step
            out[in_step] = self._step(int(step))[rows[in_step]]
        return out


# ---- accounting


def _library() -> Any:
    try:
        import dp_accounting
        import dp_accounting.pld
    except ImportError as error:
        raise ValueError(
            "privacy needs the package dp-accounting, which finds epsilon: pip install dp-accounting"
        ) from error
    return dp_accounting


@functools.lru_cache(maxsize=256)
def epsilon(mechanism: Mechanism, num_steps: int) -> float:
    """By the distribution of the privacy loss (Koskela et al. 2020), truncation of the sample included
    (arXiv 2508.15089); neighbours differ in one example that is there or not. An upper bound.
    """
    dp = _library()
    event = dp.TruncatedSubsampledGaussianDpEvent(
        mechanism.num_examples,
        mechanism.expected / mechanism.num_examples,
        mechanism.rows,
        mechanism.noise_multiplier,
    )
    accountant = dp.pld.PLDAccountant(value_discretization_interval=INTERVAL)
    accountant.compose(dp.SelfComposedDpEvent(event, num_steps))
    return float(accountant.get_epsilon(mechanism.delta))


@functools.lru_cache(maxsize=64)
def enough_noise(mechanism: Mechanism, num_steps: int, target: float) -> float:
    """The least noise multiplier, to 3 digits, with which `num_steps` stay within epsilon = target."""

    def spent(noise: float) -> float:
        return epsilon(dataclasses.replace(mechanism, noise_multiplier=noise), num_steps)

    low, high = 0.0, 1.0
    while spent(high) > target:
        low, high = high, 2 * high
        if high > MOST_NOISE:
            raise ValueError(_out_of_reach(mechanism, num_steps, target, spent(low)))
    while high - low > 1e-3 * high:
        middle = (low + high) / 2 if low else high / 2
        if middle < 0.1:  # epsilon in the hundreds: who asks for that may have less
            break
        low, high = (middle, high) if spent(middle) > target else (low, middle)
    return high


def _out_of_reach(mechanism: Mechanism, num_steps: int, target: float, least: float) -> str:
    mean, rows = mechanism.expected, mechanism.rows
    return (
        f"privacy.epsilon={target} is out of reach of {num_steps} steps that sample {mean} of"
        f" {mechanism.num_examples} examples each (at most {rows}) at delta {mechanism.delta:g}: even a noise"
        f" multiplier of {MOST_NOISE / 2:g} or more spends {least:.3g}. Use a larger epsilon, fewer"
        " --train.steps, a smaller --privacy.expected-batch-size, or more room above it (--data.batch-size)"
    )
