"""Bootstrap draws of test LoRAs and runs, and intervals and tests of accuracies and their differences.

scipy's `bootstrap` draws anew for each statistic and knows no groups. Here hundreds of accuracies share their draws, so
that differences between them, and the largest among them, are drawn too. Everything is a product of small integers,
which float32 holds exactly: equal predictions give equal accuracies, whatever the machine.

Shape letters as in evidence.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
from scipy import sparse, stats

BLOCK = 2**24  # numbers worked on at a time
PART = 2**22  # of them beside large results
LEVEL, ALPHA = 0.95, 0.05  # of all intervals and tests
FEW_SEPARATING = 10  # LoRAs (groups) that separate two classifiers, below which draws know little of others
LEAST_BEYOND = 10  # draws beyond a bound, below which they do not say where it is
ROUNDING = 1e-9  # differences of shares that are rounding


def stream(*key: object) -> np.random.Generator:
    """Return a generator seeded by the SHA-256 of its key: other keys give independent streams, any seed is valid."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


class Draws:
    """Bootstrap resamples of test LoRAs, whole groups at a time, and of runs (Efron & Tibshirani, 1993).

    Args:
        groups: Group of each LoRA, int[T]; each a group of its own where there are none.
        count: B.
        seed: Of the draws.
        block: Numbers worked on at a time. How many draws share a random stream depends on it.
        families: How many families of differences, of other LoRAs, are to hold together with one of these.
    """

    def __init__(self, groups: np.ndarray, count: int, seed: int, block: int = BLOCK, families: int = 1):
        self.group = np.unique(groups, return_inverse=True)[1]
        self.units = int(self.group.max()) + 1  # G
        self.count, self.seed, self.block, self.families = count, seed, block, families
        self._members = sparse.csr_array((np.ones(len(groups)), (np.arange(len(groups)), self.group)))  # (T, G)

    def accuracies(self, correct: Sequence[np.ndarray], resample_runs: bool = True) -> np.ndarray:
        """Return the accuracy of each classifier in every draw, float64[L, B].

        LoRAs are drawn, each with its mean over runs, and to this comes what drawn runs differ by from the mean of all.
        Drawing both at once would count what only a run and a LoRA share up to three times (Owen, "The pigeonhole
        bootstrap", Annals of Applied Statistics 2007). Classifiers of equal numbers of runs share the draws of runs:
        what they have in common does not count as a difference.

        Args:
            correct: Of each classifier, the LoRAs that each run recognises, bool[R, T]; R may differ. Or real numbers,
                float[R, T], whose means are drawn.
            resample_runs: Whether runs are drawn too; else all of them count in every draw.
        """
        accuracies = np.empty((len(correct), self.count))
        run_counts = np.array([len(runs) for runs in correct])
        hits = np.stack([runs.sum(0, dtype=np.float32 if runs.dtype == bool else float) for runs in correct])  # (L, T)
        drawn_too = [runs for runs in np.unique(run_counts).tolist() if resample_runs and runs > 1]
        effects = {i: _run_effects(self._by_group(correct[i])) for i in np.flatnonzero(np.isin(run_counts, drawn_too))}
        for start, rows in self._blocks():
            columns, total = slice(start, start + len(rows)), rows.sum(1, dtype=float)
            np.divide(hits @ rows.T, run_counts[:, None] * total, out=accuracies[:, columns])
            for runs in drawn_too:
                members = np.flatnonzero(run_counts == runs)
                drawn_runs = self._counts(len(rows), runs, "runs", start).T  # (R, b)
                for part in (members[part] for part in parts_of(len(members), len(rows))):
                    accuracies[part, columns] += np.stack([effects[i] for i in part]) @ drawn_runs
        return accuracies

    def estimate(self, correct: np.ndarray, drawn: np.ndarray) -> dict:
        """Return the accuracy of a classifier, correct bool[R, T], and its interval, given the draws float[B]."""
        return {"accuracy": correct.mean(), "interval": self.intervals(correct.mean(), drawn)}

    def intervals(self, accuracy: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """Return intervals of accuracies, which draws alone give no width at 0 and 1: float[...] -> float[..., 2].

        Wilson's interval of a share a with the number of LoRAs that independent ones of the same variance would be:
        ``n = min(T, a (1 - a) / v)``, v the variance of the draws, and Student's t of G - 1 for the normal quantile.
        Where a is 0 or 1 or v is 0, n is G.

        Args:
            accuracy: Mean over runs.
            drawn: In each draw, float[..., B].

        Source:
            Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927; the effective
            number of Korn & Graubard, "Confidence intervals for proportions with small expected number of positive
            counts estimated from survey data", Survey Methodology 1998.
        """
        share = np.asarray(accuracy, float)
        between, variance = share * (1 - share), _variance(drawn) * self.inflation
        known = (between > ROUNDING) & (variance > ROUNDING)
        size = np.divide(between, variance, out=np.full(share.shape, float(self.units)), where=known)
        size = np.minimum(size, len(self.group))
        z = self.quantile(1 - ALPHA / 2)
        centre = (share + z**2 / (2 * size)) / (1 + z**2 / size)
        half = z * np.sqrt(between / size + z**2 / (4 * size**2)) / (1 + z**2 / size)
        return np.clip(np.stack([centre - half, centre + half], axis=-1), 0, 1)

    def quantile(self, probability: float) -> float:
        """Return a quantile of Student's t with G - 1 degrees of freedom."""
        return float(stats.t.ppf(probability, max(1, self.units - 1)))

    @cached_property
    def inflation(self) -> float:
        """The factor by which the variance of draws is less than that of a sample: G / (G - 1) of equal groups.

        Of others G is the number of equal ones that would weigh as much: what a large group adds is compared with a
        mean that is mostly its own.
        """
        equal = self.units**2 / np.square(self._weights).sum()  # Kish's
        return float(equal / max(equal - 1, ROUNDING))

    def differences(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]], resample_runs: bool = True) -> list[dict]:
        """Return the family of differences of accuracies a - b, with intervals and p that hold for all of it together.

        Args:
            pairs: The LoRAs that the runs of a and of b recognise, bool[R, T] each; R may differ.
            resample_runs: Whether runs are drawn too.

        Returns:
            Of each, ``difference``, ``interval``, ``p`` and ``significant``: see `family`.
        """
        if not pairs:
            return []
        distinct = list({id(runs): runs for pair in pairs for runs in pair}.values())
        position = {id(runs): i for i, runs in enumerate(distinct)}
        first, second = (np.array([position[id(pair[side])] for pair in pairs]) for side in (0, 1))
        drawn = self.accuracies(distinct, resample_runs)
        by_lora = np.stack([runs.mean(0) for runs in distinct])  # (., T)
        run_counts = np.array([max(len(a), len(b)) for a, b in pairs])
        return self.family(by_lora[first] - by_lora[second], _between(drawn, first, second), run_counts)

    def family(self, by_lora: np.ndarray, drawn: np.ndarray, run_counts: np.ndarray | None = None) -> list[dict]:
        """Return differences of accuracies with simultaneous intervals, and p by the same rule.

        Single-step: c is the 95 % quantile over draws of the largest studentised difference |draw - d| / SE of the
        family; the interval is d ± c SE, and p the share of draws whose largest is at least |d| / SE. So the interval
        of a difference excludes 0 where its p is below 0.05, and only there. Both are carried over to Student's t (see
        `_freedom`). Draws of a difference on which fewer than ten LoRAs (groups) separate the two, or fewer than ten do
        not, know little of others: these are computed from what was seen (`_of_few`), each at its part of the 5 %.
        Where the part of the rest is so small that hardly a draw lies beyond c, as of one among hundreds, c is
        Bonferroni's.

        Args:
            by_lora: Of each difference, the mean over runs for each LoRA, float[m, T].
            drawn: The differences in each draw, float[m, B].
            run_counts: R of each difference, int[m], where runs were drawn too.

        Source:
            Westfall & Young, "Resampling-based multiple testing", 1993 (single-step maxT).
        """
        count = len(by_lora)
        difference, by_group = by_lora.mean(1), self._by_group(by_lora)
        spread = np.sqrt(_variance(drawn))
        error = spread * np.sqrt(self.inflation)
        separating = self.separating(by_lora)
        few = (np.minimum(separating, self.units - separating) < FEW_SEPARATING) | (error < ROUNDING)
        freedom = self._freedom(by_group, error**2, run_counts)
        interval, p = _of_few(by_group, self._weights, error, freedom, self.families)
        many = np.flatnonzero(~few)
        if len(many):
            part = len(many) / count / self.families  # of the 5 %, as the others have theirs
            tail = stats.t.sf(np.abs(difference[many]) / error[many], freedom[many])
            if ALPHA * part * drawn.shape[1] < LEAST_BEYOND:
                together = count * self.families
                beyond, p[many] = ALPHA / together / 2, 2 * together * tail
            else:
                largest = np.zeros(drawn.shape[1])
                for block in parts_of(len(many), len(largest)):
                    rows = many[block]
                    away = np.abs(drawn[rows] - difference[rows, None]) / spread[rows, None]
                    np.maximum(largest, away.max(0), out=largest)
                beyond = stats.norm.sf(_bound(largest, ALPHA * part))
                p[many] = exceedance(stats.norm.isf(tail), largest[:, None]) / part
            half = stats.t.isf(beyond, freedom[many]) * error[many]
            interval[many] = difference[many, None] + np.array([-1, 1]) * half[:, None]
        interval, p = np.clip(interval, -1, 1), np.minimum(1, p)
        return [
            {"difference": difference[i], "interval": interval[i], "p": p[i], "significant": bool(p[i] < ALPHA)}
            for i in range(count)
        ]

    def separating(self, by_lora: np.ndarray) -> np.ndarray:
        """Return how many LoRAs (groups) differences float[m, T] tell apart, each as much as its mean: float[m]."""
        return np.abs(self._by_group(by_lora) / self._weights).sum(1)

    def _freedom(self, by_group: np.ndarray, variance: np.ndarray, run_counts: np.ndarray | None) -> np.ndarray:
        """Return the degrees of freedom of differences, float[m]: G - 1, or fewer where few runs differ by more.

        Satterthwaite's, of the variance float[m] in two parts: what groups give, and the rest, which R runs give.
        """
        of_groups = max(1, self.units - 1)
        if run_counts is None:
            return np.full(len(by_group), float(of_groups))
        centre = by_group.mean(1, keepdims=True)
        groups = np.square(by_group - centre * self._weights).sum(1) / self.units**2 * self.inflation
        runs = np.where(run_counts > 1, np.maximum(0, variance - groups), 0)
        part = groups**2 / of_groups + runs**2 / np.maximum(1, run_counts - 1)
        return np.divide((groups + runs) ** 2, part, out=np.full(len(part), float(of_groups)), where=part > 0)

    @cached_property
    def _weights(self) -> np.ndarray:
        """The LoRAs of each group, as a multiple of their mean, float[G]."""
        return np.bincount(self.group) * self.units / len(self.group)

    def _by_group(self, by_lora: np.ndarray) -> np.ndarray:
        """Return what each group adds to differences float[m, T], float[m, G]: their mean is the difference."""
        return (by_lora @ self._members) * self.units / len(self.group)

    def _blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the number of the first draw of a block, and how often each draw has each LoRA, float32[b, T]."""
        block_size = max(1, self.block // (4 * len(self.group)))
        for start in range(0, self.count, block_size):
            size = min(block_size, self.count - start)
            counts = self._counts(size, self.units, "rows", start)
            yield start, counts.astype(np.float32)[:, self.group]

    def _counts(self, draws: int, items: int, purpose: str, start: int) -> np.ndarray:
        """Draw as many items as there are, with replacement, and count each, int[draws, items]."""
        picked = stream(self.seed, purpose, items, start).integers(items, size=(draws, items))
        picked += items * np.arange(draws)[:, None]
        return np.bincount(picked.ravel(), minlength=draws * items).reshape(draws, items)


def parts_of(count: int, size: int, block: int = PART) -> list[slice]:
    """Return slices of ``count`` rows of ``size`` numbers each, of at most ``block`` numbers, but one row at least."""
    step = max(1, block // max(1, size))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _between(drawn: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return differences of rows of draws float[L, B] at positions int[m], float64[m, B]; both are never copied."""
    differences = np.empty((len(first), drawn.shape[1]))
    for part in parts_of(*differences.shape):
        np.subtract(drawn[first[part]], drawn[second[part]], out=differences[part])
    return differences


def _variance(drawn: np.ndarray) -> np.ndarray:
    """Return the variance over draws, float[..., B] -> float[...], a part of the rows at a time."""
    rows, variance = drawn.reshape(-1, drawn.shape[-1]), np.empty(drawn.shape[:-1])
    flat = variance.reshape(-1)
    for part in parts_of(*rows.shape):
        flat[part] = rows[part].var(-1)
    return variance


def _run_effects(by_group: np.ndarray) -> np.ndarray:
    """Return what each run adds to the mean over runs of a classifier, by groups float[R, G]: float64[R].

    Its deviation from that mean, shrunk by the share of its variance that LoRAs do not explain, ``1 - MS_LR / MS_R`` of
    the analysis of variance of runs by LoRAs (groups), and by ``sqrt((R - 1) R)`` so that drawn runs have the variance
    of the mean of R.
    """
    runs, groups = by_group.shape
    effect = by_group.mean(1) - by_group.mean()
    residual = by_group - by_group.mean(0) - effect[:, None]
    between = groups * np.square(effect).sum() / (runs - 1)
    within = np.square(residual).sum() / max(1, (runs - 1) * (groups - 1))
    share = max(0.0, 1 - within / between) if between > ROUNDING else 0.0
    return effect * np.sqrt(share / (runs * (runs - 1)))


def means(values: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return means of real numbers over runs and LoRAs, and their intervals: float[...] and float[..., 2].

    Student's t intervals. The variance of a mean among draws of groups and of runs, as in `Draws.accuracies`, is known
    without drawing: that between groups, times G / (G - 1) of equal groups, and what drawn runs add. Degrees of freedom
    are Satterthwaite's of groups and runs, of these before what LoRAs explain is subtracted: by what is left, few runs
    would count as more. NaN for the interval of a single group, which shows no variance.

    Args:
        values: Real numbers, float[..., R, T].
        groups: Group of each LoRA, int[T].

    Source:
        Satterthwaite, "An approximate distribution of estimates of variance components", Biometrics Bulletin 1946.
    """
    group = np.unique(groups, return_inverse=True)[1]
    weights = np.bincount(group) * (group.max() + 1) / len(group)  # (G,), of mean 1
    units, runs = len(weights), values.shape[-2]
    members = sparse.csr_array((np.full(len(group), units / len(group)), (np.arange(len(group)), group)))
    by_group = (values.reshape(-1, len(group)) @ members).reshape(*values.shape[:-1], units)
    mean = by_group.mean((-2, -1))
    if units == 1:
        return mean, np.full((*mean.shape, 2), np.nan)
    equal = units**2 / np.square(weights).sum()
    deviation = by_group.mean(-2) - mean[..., None] * weights
    of_groups = np.square(deviation).sum(-1) / units**2 * equal / max(equal - 1, ROUNDING)
    of_runs, between = np.zeros_like(mean), np.zeros_like(mean)
    if runs > 1:
        effect = by_group.mean(-1) - mean[..., None]  # (..., R)
        residual = by_group - by_group.mean(-2, keepdims=True) - effect[..., None]
        within = np.square(residual).sum((-2, -1)) / ((runs - 1) * (units - 1)) / units
        between = np.square(effect).sum(-1) / (runs - 1)
        of_runs = np.maximum(0, between - within) / runs
        between = np.where(of_runs > 0, between / runs, 0)
    part = of_groups**2 / (units - 1) + between**2 / max(1, runs - 1)
    total = of_groups + of_runs
    freedom = np.divide(total**2, part, out=np.full_like(mean, units - 1), where=part > 0)
    freedom = np.maximum(1, freedom)
    half = stats.t.ppf((1 + LEVEL) / 2, freedom) * np.sqrt(total)
    return mean, np.stack([mean - half, mean + half], axis=-1)


def _of_few(
    by_group: np.ndarray, weights: np.ndarray, drawn_error: np.ndarray, freedom: np.ndarray, families: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Return intervals float[m, 2] and p float[m] of differences, to which one win and one defeat is added.

    These differ by w, the mean size of what separates the two and of half a group that is won wholly: ``(sum n d² +
    1/2) / (sum n |d| + 1/2)``, where d is a group's difference and n its size as a multiple of the mean. The interval
    is ``c ± z SE``, c the mean of all G + 2, its error that of a ratio, ``SE² = (sum (n (d - c))² + 2 mean(n²) (w² +
    c²)) / (G + 2)²``, and z at ``1 - 0.05 / m`` (Bonferroni). Of one run and no groups it is Bonett and Price's
    interval. Where draws, which know of runs, spread wider, their error and Student's z are taken.

    Source:
        Bonett & Price, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired
        data", Journal of Educational and Behavioral Statistics 2012.
    """
    count, size = len(by_group) * families, len(weights) + 2
    sizes, squares = np.abs(by_group).sum(1), (np.square(by_group) / weights).sum(1)
    added, centre = (squares + 0.5) / (sizes + 0.5), by_group.sum(1) / size
    variance = np.square(by_group - centre[:, None] * weights).sum(1)
    error = np.sqrt(variance + 2 * np.square(weights).mean() * (added**2 + centre**2)) / size
    freedom = np.where(drawn_error > error, freedom, np.inf)  # Student's t of infinitely many is normal
    error = np.maximum(error, drawn_error)
    half = stats.t.isf(ALPHA / count / 2, freedom) * error
    p = np.minimum(1, count * 2 * stats.t.sf(np.abs(centre) / error, freedom))
    return np.stack([centre - half, centre + half], axis=-1), p


def _bound(largest: np.ndarray, alpha: float) -> float:
    """Return the number above which `exceedance` of draws float[B] is below alpha, and only there."""
    allowed = int(np.ceil(alpha * (1 + len(largest)) - ROUNDING)) - 2  # draws that may be as large
    return float(np.sort(largest)[-1 - allowed]) if allowed >= 0 else np.inf


def interval(drawn: np.ndarray) -> np.ndarray:
    """Return the central 95 % of the last axis: float[..., B] -> float[..., 2]."""
    outside = (1 - LEVEL) / 2
    return np.moveaxis(np.quantile(drawn, (outside, 1 - outside), axis=-1), 0, -1)


def exceedance(observed: np.ndarray, null: np.ndarray) -> np.ndarray:
    """Return p of observed float[L] against null float[B, L or 1], float64[L]: (1 + draws as large) / (1 + B)."""
    as_large = sum((null[part] >= observed - ROUNDING).sum(0) for part in parts_of(len(null), observed.size))
    return (1 + as_large) / (1 + len(null))
