"""Is the difference between two models real: paired statistics over the documents that both of them answered.

Documents are paired by what they are (lm-eval's hashes), never by where they stand. Only numbers that lm-eval makes as
a mean over documents are compared, alone or over the subtasks of a group with lm-eval's weights; that they are is
checked against its own value, and what is left out is said. Standard errors of single models stay lm-eval's.

Pure but for reading the sample files, each once. It knows nothing of lm-eval beyond the records.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy import stats

from sweep.record import Record, Score, Status
from sweep.results.reading import Sweep

LEVEL = 0.95
"""Of every interval; 1 - LEVEL is what an adjusted p is held against."""
POWER = 0.8
FEW_CLUSTERS = 30
"""Below it clustered standard errors are known to be too small. Cameron, Gelbach and Miller (2008), "Bootstrap-based
improvements for inference with clustered errors", see it with 5 to 30 clusters."""
SOURCES = (
    *("passage", "context", "article", "story", "paragraph", "document", "background"),
    *("narrative", "document_str", "flores_passage", "abstract", "scenario"),
)
"""Fields of a document that hold a text which several questions are asked about."""
SOURCE_LEAST = 80
"""Characters of such a text; shorter ones are labels or empty, not a passage."""
PREMISE = "premise"
"""The field of the text that several hypotheses are held against: a sentence however short, never a label."""
EXACT_FLIPS = 12
"""Documents that differ up to which every pattern of signs is looked at, 4,096 of them."""
FLIPS = 9_999
"""Random patterns of signs beyond that: with the observed one p has steps of 0.0001."""
FLIPS_AT_ONCE = 1_111
ENOUGH = 100
"""So many patterns as far out settle a p without the rest: it is known to a tenth of itself, and it is not small."""
FAR = 20
"""Fewer than this tell too little; the saddlepoint takes over."""
FINEST = 12
"""Parts of the smallest difference that are tried as the step of a lattice; a finer one changes a tail too little."""
HOPELESS = 5.0
"""Standard deviations beyond which no pattern is tried: fewer than 1 in 100,000 come as far (Hoeffding)."""
AT_ONCE = 2_000_000
"""Numbers in one array of pairs by documents: 16 MB, and up to nine such arrays are at work together."""
PAIRS_AT_ONCE = 1_000
"""Of few documents; each has EXACT_FLIPS or FLIPS_AT_ONCE sums at once."""
SIGNS_AT_ONCE = 8_000_000
"""Random signs in memory together, at 5 bytes each."""

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Key = tuple[str, str, str, str]
"""Task, subtask, metric and filter: a number that models are compared by."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Model b against model a on the same documents, by one metric."""

    task: str
    """The cell's."""
    subtask: str
    """lm-eval's name of what is compared: the task or group that the cell asked for, or one task of a tag."""
    metric: str
    filter: str
    higher_is_better: bool | None
    model_a: str
    model_b: str
    n: int
    """Documents paired."""
    unpaired: int
    """Documents of either that found no partner."""
    value_a: float
    """Over the paired documents; the subtasks of a group weighted as lm-eval weights them."""
    value_b: float
    difference: float
    """`value_b` - `value_a`."""
    stderr: float
    """Of the difference; it, the interval and `detectable` are NaN where the documents tell nothing of the spread."""
    low: float
    """End of the 95 % interval of the difference."""
    high: float
    p: float
    p_adjusted: float
    """By Holm over all comparisons that were made together."""
    test: str
    """`exact McNemar` or `paired permutation`."""
    strata: int
    """Subtasks; 1 for a task of its own."""
    clusters: int | None
    """Texts that documents share, and documents that several subtasks ask about; None where each stands alone."""
    detectable: float
    """The smallest true difference that so many documents show four times out of five."""
    same_settings: bool
    """Whether both were asked alike, but for what belongs to a model (its chat template, its system instruction)."""
    notes: tuple[str, ...]

    @property
    def verdict(self) -> Literal["better", "worse", "differs", "no difference shown"]:
        """Of b against a; `differs` where the task does not say which direction is better."""
        if not self.p_adjusted < 1 - LEVEL:
            return "no difference shown"
        if self.higher_is_better is None:
            return "differs"
        return "better" if (self.difference > 0) == self.higher_is_better else "worse"


@dataclass(frozen=True, kw_only=True)
class Findings:
    comparisons: tuple[Comparison, ...]
    left_out: tuple[str, ...]
    """What could not be compared and why, in sentences."""


@dataclass(frozen=True, kw_only=True)
class Leaders:
    """The models of one number that no other is shown to be better than."""

    task: str
    subtask: str
    metric: str
    filter: str
    models: tuple[str, ...]
    """Of those that were compared."""
    best: str | None
    """The one that is shown to be better than each other model that has this number; None where there is none, which is
    the usual."""


def compare(sweep: Sweep, *, pairs: Sequence[tuple[str, str]] | None = None) -> tuple[Comparison, ...]:
    """The second model of each pair against the first on every task of both; without `pairs`, all pairs of models."""
    return examine(sweep, pairs=pairs).comparisons


def compare_sweeps(a: Sweep, b: Sweep, *, pairs: Sequence[tuple[str, str]] | None = None) -> tuple[Comparison, ...]:
    """Each cell of `b` against that of `a` with the same task and model; models are called `<sweep>/<model>`. `pairs`
    are a model of `a` and one of `b` each; without them they are those of one name."""
    return examine_sweeps(a, b, pairs=pairs).comparisons


def examine(sweep: Sweep, *, pairs: Sequence[tuple[str, str]] | None = None) -> Findings:
    """`compare`, with what was left out. Raises StoreError where a sample file cannot be read."""
    chosen = pairs if pairs is not None else [(a, b) for i, a in enumerate(sweep.models) for b in sweep.models[i + 1 :]]
    cells = {
        task: {r.model: (sweep, r) for r in sweep.records if r.task == task and r.status is Status.DONE}
        for task in sweep.tasks
    }
    return _findings(cells, chosen)


def examine_sweeps(a: Sweep, b: Sweep, *, pairs: Sequence[tuple[str, str]] | None = None) -> Findings:
    """`compare_sweeps`, with what was left out. Two sweeps of one name are told apart by their folders."""
    names = (a.name, b.name) if a.name != b.name else (str(a.directory.root), str(b.directory.root))
    cells: dict[str, dict[str, tuple[Sweep, Record]]] = defaultdict(dict)
    for name, sweep in zip(names, (a, b), strict=True):
        for record in sweep.records:
            if record.status is Status.DONE:
                cells[record.task][f"{name}/{record.model}"] = (sweep, record)
    chosen = pairs if pairs is not None else [(model, model) for model in a.models]
    return _findings(cells, [(f"{names[0]}/{of_a}", f"{names[1]}/{of_b}") for of_a, of_b in chosen])


def leaders(sweep: Sweep, comparisons: Iterable[Comparison]) -> tuple[Leaders, ...]:
    """Who leads, number by number, where any two models were compared under the same settings.

    Differences that may be noise, or that come of other settings, make nobody a leader and nobody a loser. A model that
    has the number and was not compared is no loser either: nobody is the best beside it.
    """
    scored: dict[Key, set[str]] = defaultdict(set)
    for record in sweep.records:
        for score in record.scores:
            if record.status is Status.DONE and not score.depth:
                scored[record.task, score.task, score.metric, score.filter].add(record.model)
    groups: dict[Key, list[Comparison]] = defaultdict(list)
    for one in comparisons:
        if one.same_settings:
            groups[one.task, one.subtask, one.metric, one.filter].append(one)
    found = []
    for key, members in groups.items():
        models = list(dict.fromkeys(model for one in members for model in (one.model_a, one.model_b)))
        beats: dict[str, set[str]] = {model: set() for model in models}
        for one in members:
            if one.verdict == "better":
                beats[one.model_b].add(one.model_a)
            elif one.verdict == "worse":
                beats[one.model_a].add(one.model_b)
        beaten = set().union(*beats.values())
        rivals = scored[key].union(models)
        task, subtask, metric, filter_name = key
        found.append(
            Leaders(
                task=task,
                subtask=subtask,
                metric=metric,
                filter=filter_name,
                models=tuple(model for model in models if model not in beaten),
                best=next((model for model in models if beats[model] >= rivals - {model}), None),
            )
        )
    return tuple(found)


# --- The statistics: arrays in, arrays out ---------------------------------------------------------------------------


def mcnemar(only_a: NDArray[np.int64], only_b: NDArray[np.int64]) -> Floats:
    """Exact two-sided p of discordant pairs: that so unequal a split comes of a fair coin.

    McNemar (1947), Psychometrika 12:153; the exact form is the sign test, `scipy.stats.binomtest(only_a, n, 0.5)`.
    """
    total = only_a + only_b
    return np.minimum(1.0, 2.0 * np.asarray(stats.binom.cdf(np.minimum(only_a, only_b), total, 0.5)))


def tango(only_a: NDArray[np.int64], only_b: NDArray[np.int64], n: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """The score interval of p_b - p_a of paired proportions, from discordant pairs among `n`.

    Tango (1998), Statistics in Medicine 17:891-908: all differences d whose score statistic
    (b - c - n d) / sqrt(n (2 q + d (1 - d))) is within the normal quantile, q being the constrained estimate of the
    other discordant proportion. It keeps its level where Wald's interval collapses: without any discordant pair.
    """
    b, c, m = (np.asarray(x, dtype=np.float64) for x in (only_b, only_a, n))
    z = stats.norm.ppf((1 + LEVEL) / 2)

    def score(d: Floats) -> Floats:
        linear = -b - c + (2 * m - b + c) * d
        root = np.sqrt(np.maximum(linear**2 + 8 * m * c * d * (1 - d), 0.0))
        q = np.maximum((root - linear) / (4 * m), 0.0)
        variance = m * (2 * q + d * (1 - d))
        distance = b - c - m * d
        return np.asarray(distance / np.sqrt(np.maximum(variance, 1e-300)))

    estimate = (b - c) / m

    def end(outside: float, bound: float) -> Floats:
        inner, outer = estimate.copy(), np.full_like(estimate, outside)
        for _ in range(50):  # to the last digits of a double
            middle = (inner + outer) / 2
            within = np.abs(score(middle)) <= bound
            inner, outer = np.where(within, middle, inner), np.where(within, outer, middle)
        return np.asarray(inner)

    return end(-1.0, z), end(1.0, z)


def wilson(right: int, n: int) -> tuple[float, float]:
    """The score interval of a proportion: it stays within 0 and 1 and is never without width, at 0 % and 100 % either.

    Wilson (1927), JASA 22:209-212. Brown, Cai and DasGupta (2001), Statistical Science 16:101-133, recommend it and
    show how far the normal interval falls short of its level near 0 and 1.
    """
    found = stats.binomtest(right, n).proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)


def permutation(units: Floats) -> Floats:
    """Two-sided p of each row: that the sum of its differences is so far from 0 when their signs are those of coins.

    The paired permutation test of Fisher (1935), The Design of Experiments, §21: exact over all signs where up to
    EXACT_FLIPS differences are not 0. Otherwise FLIPS random ones, (hits + 1) / (flips + 1) after Phipson and Smyth
    (2010), Stat. Appl. Genet. Mol. Biol. 9:39, or fewer where p is large, after Besag and Clifford (1991), Biometrika
    78:301; where too few of these come as far, the tail is that of `saddlepoint`:
    else no p could be small enough for the correction over thousands of comparisons.
    """
    total = np.abs(units.sum(axis=1))
    size = np.abs(units).sum(axis=1)
    differing = (units != 0).sum(axis=1)
    p = np.ones(len(units))
    reached = total - 1e-6 * size  # sums of one value by different roads differ in their last digits

    few = np.flatnonzero((differing > 0) & (differing <= EXACT_FLIPS))
    if len(few):
        order = np.argsort(units[few] == 0, axis=1, kind="stable")[:, :EXACT_FLIPS]
        packed = np.take_along_axis(units[few], order, axis=1)
        width = packed.shape[1]
        signs = 1.0 - 2.0 * ((np.arange(2**width)[:, None] >> np.arange(width)) & 1)
        p[few] = (np.abs(packed @ signs.T) >= reached[few, None]).mean(axis=1)

    many = differing > EXACT_FLIPS
    out = total > HOPELESS * np.sqrt((units**2).sum(axis=1))
    hits, tried = np.zeros(len(units), dtype=np.int64), 0
    random = np.random.default_rng(0)
    documents = SIGNS_AT_ONCE // FLIPS_AT_ONCE // 4 * 4  # the generator draws four signs together
    while tried < FLIPS and len(rows := np.flatnonzero(many & ~out & (hits < ENOUGH))):
        # The same signs for every pair, whichever others are tested with it; single precision is twice as fast.
        sums = np.zeros((len(rows), FLIPS_AT_ONCE), dtype=np.float32)
        for start in range(0, units.shape[1], documents):
            part = units[rows, start : start + documents].astype(np.float32)
            signs32 = random.integers(0, 2, size=(part.shape[1], FLIPS_AT_ONCE), dtype=np.int8).astype(np.float32)
            signs32 *= 2
            signs32 -= 1
            sums += part @ signs32
        tried += FLIPS_AT_ONCE
        hits[rows] += (np.abs(sums) >= reached[rows, None]).sum(axis=1)
        p[rows] = (hits[rows] + 1) / (tried + 1)
    if len(far := np.flatnonzero(many & (hits < FAR))):
        p[far] = saddlepoint(units[far])
    return p


def saddlepoint(units: Floats) -> Floats:
    """The p of `permutation` far out, where random signs hardly come; good to a few per cent of itself.

    Robinson (1982), "Saddlepoint approximations for permutation tests and confidence intervals", JRSS B 44:91-101, with
    the tail formula of Lugannani and Rice (1980): K(t) = sum log cosh(t d), solved for K'(t) = |sum d|. Never below
    2^(1-m), the p of m differences with one sign.

    Where all differences are whole multiples of some h, sums move in steps of 2 h. Then it takes the second continuity
    correction of Daniels (1987), "Tail probability approximations", International Statistical Review 55:37-48: the sum
    is brought nearer by half a step, h, and t in the last term is sinh(t h) / h. Where no single difference is h (all
    are 2 or 3, say) sums come unevenly, and p may be off by half.
    """
    total = np.abs(units.sum(axis=1))
    d = np.abs(units)  # log cosh is even
    d[d < 1e-9 * d.max(axis=1, keepdims=True)] = 0.0  # what should add up to nothing may keep a last digit
    size = d.sum(axis=1)
    least: Floats = 2.0 ** (1.0 - (d > 0).sum(axis=1))
    p = least.copy()
    rows = np.flatnonzero(total < size * (1 - 1e-9))
    if not len(rows):
        return p
    d = d[rows]
    h = _lattice(d)
    s = np.maximum(total[rows] - h, 0.0)
    t = s / (d**2).sum(axis=1)
    for _ in range(100):
        # K' is concave for t > 0, so Newton's steps from the left approach the root without passing it.
        bent = np.tanh(t[:, None] * d)
        step = (s - (d * bent).sum(axis=1)) / np.maximum((d**2 * (1 - bent**2)).sum(axis=1), 1e-300)
        t = t + np.maximum(step, 0.0)
        if np.all(np.abs(step) <= 1e-10 * t):
            break
    x = t[:, None] * d
    log_cosh = x + np.log1p(np.exp(-2 * x)) - np.log(2.0)
    curve = (d**2 * (1 - np.tanh(x) ** 2)).sum(axis=1)
    w = np.sqrt(np.maximum(2 * (t * s - log_cosh.sum(axis=1)), 1e-300))
    u = np.maximum(np.where(h > 0, np.sinh(t * h) / np.where(h > 0, h, 1.0), t) * np.sqrt(curve), 1e-300)
    tail = stats.norm.sf(w) + stats.norm.pdf(w) * (1 / u - 1 / w)
    p[rows] = np.clip(2 * tail, least[rows], 1.0)
    return p


def _lattice(d: Floats) -> Floats:
    """The largest h of each row that its numbers are whole multiples of; 0 where they are multiples of none."""
    least = np.where(d > 0, d, np.inf).min(axis=1)
    h = np.zeros(len(d))
    for parts in range(1, FINEST + 1):
        rest = np.flatnonzero(h == 0)
        multiples = d[rest] / (least[rest, None] / parts)
        fits = rest[np.all(np.abs(multiples - np.rint(multiples)) < 1e-6, axis=1)]
        h[fits] = least[fits] / parts
    return h


def holm(p: Floats) -> Floats:
    """p-values that may be held against 5 % whatever their number: the chance of one false claim among all stays 5 %.

    Holm (1979), Scandinavian Journal of Statistics 6:65-70.
    """
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


@dataclass(frozen=True, kw_only=True)
class Estimates:
    """Of many pairs at once; each field has one entry a pair."""

    n: NDArray[np.int64]
    value_a: Floats
    value_b: Floats
    difference: Floats
    stderr: Floats
    low: Floats
    high: Floats
    detectable: Floats
    clusters: NDArray[np.int64] | None
    strata: NDArray[np.int64]
    units: Floats
    """What a permutation test flips: the weighted difference of each document, or of all documents of a cluster."""
    only_a: NDArray[np.int64]
    """Documents that only a has right, of a 0/1 metric."""
    only_b: NDArray[np.int64]


def estimates(
    a: Floats,
    b: Floats,
    *,
    starts: NDArray[np.intp] | None = None,
    by_size: bool = True,
    clusters: NDArray[np.intp] | None = None,
    binary: bool = False,
) -> Estimates:
    """Difference, standard error and interval of each row of `b` against `a`; NaN stands for no answer.

    Columns are documents, those of a stratum side by side from its index in `starts`; `clusters` says which text each
    document is about. A pair needs two documents.

    Paired differences and their standard error: Miller (2024), "Adding Error Bars to Evals", arXiv 2411.00640, §4.
    Over strata: lm-eval's own rules (`pooled_sample_stderr` and `unweighted_mean_stderr` of its api/metrics.py) on
    differences; see Cochran (1977), Sampling Techniques, §5.4. Clustered: Miller §2.2 with the factor G / (G - 1) and t
    of G - 1 degrees, as in Cameron and Miller (2015), J. Human Resources 50:317. Intervals of 0/1 metrics: `tango`;
    over strata or clusters, Bonett and Price (2012), J. Educ. Behav. Stat. 37:479, one document more in each direction,
    of as many as the clustered ones are worth (the effective sample size of Korn and Graubard (1998), Survey
    Methodology 24:193); of other metrics, Student's t. Detectable: (z_0.975 + z_0.8) standard errors, Miller §5.
    """
    starts = np.zeros(1, dtype=np.intp) if starts is None else starts
    valid = ~np.isnan(a) & ~np.isnan(b)
    a, b = np.where(valid, a, 0.0), np.where(valid, b, 0.0)
    d = b - a
    widths = np.diff(np.append(starts, a.shape[1]))

    def summed(x: NDArray[Any]) -> Floats:
        return np.add.reduceat(x.astype(np.float64), starts, axis=1)

    def spread(x: Floats) -> Floats:
        return np.repeat(x, widths, axis=1)

    count = summed(valid)
    n = count.sum(axis=1)
    strata = (count > 0).sum(axis=1)
    held = np.maximum(count, 1.0)
    share = count / n[:, None] if by_size else (count > 0) / strata[:, None]
    """Of each stratum in the outcome."""
    weight = spread(share / held) * valid
    mean = summed(d) / held
    residual = (d - spread(mean)) * valid
    squares = summed(residual**2)
    # Strata with one document tell nothing of the spread within, and have that of the others.
    pooled = _ratio(squares.sum(axis=1), n - strata)
    if by_size:
        # Where none has more, that over all of them is more.
        alone = n == strata
        overall = ((d - (d.sum(axis=1) / n)[:, None]) ** 2 * valid).sum(axis=1)
        variance = np.where(alone, overall / (n - 1), pooled) / n
    else:
        own = np.where(count > 1, _ratio(squares, count - 1), pooled[:, None])
        variance = np.where(count > 0, own / held, 0.0).sum(axis=1) / strata**2
    freedom = np.maximum(n - strata, 1.0)
    units, groups, worth = weight * d, None, n
    if clusters is not None:
        alone_variance = variance
        order = np.argsort(clusters, kind="stable")
        ends = np.flatnonzero(np.diff(clusters[order], prepend=-1))
        groups = (np.add.reduceat(valid[:, order].astype(np.int64), ends, axis=1) > 0).sum(axis=1)
        together = np.add.reduceat((weight * residual)[:, order], ends, axis=1)
        variance = (together**2).sum(axis=1) * groups / np.maximum(groups - 1, 1)
        # Documents without any difference do not tell how alike those of a cluster are: then as alike as can be.
        worth = np.clip(n * np.where(variance > 0, _ratio(alone_variance, variance), 0.0), groups, n)
        # The residuals of a text that is the whole of its stratum add up to 0, whatever they are.
        apart = np.repeat(np.arange(len(starts)), widths) * (clusters.max() + 1) + clusters
        by_both = np.argsort(apart, kind="stable")
        firsts = np.flatnonzero(np.diff(apart[by_both], prepend=-1))
        parts = np.logical_or.reduceat(valid[:, by_both], firsts, axis=1).sum(axis=1)
        variance = np.where(parts > strata, variance, np.nan)
        freedom = np.maximum(groups - 1, 1.0)
        units = np.add.reduceat(units[:, order], ends, axis=1)

    difference = (share * mean).sum(axis=1)
    stderr = np.sqrt(variance)
    only_a, only_b = (np.rint(((d == sign) & valid).sum(axis=1)).astype(np.int64) for sign in (-1, 1))
    whole = np.rint(n).astype(np.int64)
    padded = stderr
    if binary:
        padded = np.sqrt(worth**2 * variance + 2) / (worth + 2)
    if binary and clusters is None and len(starts) == 1:
        low, high = tango(only_a, only_b, whole)
    else:
        reach = stats.t.ppf((1 + LEVEL) / 2, freedom) * padded
        centre = difference * worth / (worth + 2) if binary else difference
        low, high = centre - reach, centre + reach
        if binary:
            low, high = np.maximum(low, -1.0), np.minimum(high, 1.0)
    z = stats.norm.ppf((1 + LEVEL) / 2) + stats.norm.ppf(POWER)
    return Estimates(
        n=whole,
        value_a=(weight * a).sum(axis=1),
        value_b=(weight * b).sum(axis=1),
        difference=difference,
        stderr=stderr,
        low=low,
        high=high,
        detectable=z * padded,
        clusters=groups,
        strata=strata,
        units=units,
        only_a=only_a,
        only_b=only_b,
    )


def _ratio(a: Floats, b: Floats) -> Floats:
    """NaN for what is divided by nothing."""
    found: Floats = np.full(np.broadcast(a, b).shape, np.nan)
    np.divide(a, b, out=found, where=b > 0)
    return found


# --- From records and samples to arrays ------------------------------------------------------------------------------

_Cells = Mapping[str, tuple[Sweep, Record]]
"""By label of the model."""


@dataclass
class _Answers:
    """One model's outcomes on one leaf, filter: a row each, in the file's order."""

    whole: list[int] = field(default_factory=list)
    """The column of each by document, prompt and target."""
    alone: list[int] = field(default_factory=list)
    """The column of each by document."""
    values: dict[str, list[float | None]] = field(default_factory=dict)
    """By metric; None where the document has no such number. A metric whose values are no numbers is not here."""
    unusable: set[str] = field(default_factory=set)


@dataclass
class _Leaf:
    """All models' outcomes on one lm-eval task through one filter."""

    whole: dict[tuple[Any, ...], int] = field(default_factory=dict)
    alone: dict[tuple[Any, ...], int] = field(default_factory=dict)
    documents_whole: list[int] = field(default_factory=list)
    """Of each column, the number of its document; the same document has it in all subtasks."""
    documents_alone: list[int] = field(default_factory=list)
    answers: dict[str, _Answers] = field(default_factory=lambda: defaultdict(_Answers))


@dataclass(frozen=True)
class _Target:
    """A number of the result table that is to be compared."""

    name: str
    metric: str
    filter: str


@dataclass(frozen=True)
class _Make:
    """How lm-eval makes that number for one model."""

    leaves: tuple[str, ...]
    by_size: bool | None
    """None where both weightings give the same."""
    higher_is_better: bool | None
    reason: str | None = None
    """Why it cannot be compared."""


@dataclass(frozen=True)
class _Block:
    """Comparisons of several pairs on one target."""

    pairs: tuple[tuple[str, str], ...]
    whole: bool
    """Paired by prompts too."""
    made: Estimates
    unpaired: NDArray[np.int64]
    reprompted: NDArray[np.int64]
    """Documents of both whose prompts differ, where others agree."""


def _findings(tasks: Mapping[str, _Cells], pairs: Sequence[tuple[str, str]]) -> Findings:
    comparisons: list[Comparison] = []
    left_out: list[str] = []
    for task, cells in tasks.items():
        wanted = [(a, b) for a, b in pairs if a in cells and b in cells]
        if wanted:
            involved = {model for pair in wanted for model in pair}
            _task(task, {m: c for m, c in cells.items() if m in involved}, wanted, comparisons.append, left_out.append)
    adjusted = holm(np.array([one.p for one in comparisons]))
    for one, p in zip(comparisons, adjusted.tolist(), strict=True):
        # A copy of each would take most of the time; nobody else has seen them yet.
        object.__setattr__(one, "p_adjusted", p)
    return Findings(comparisons=tuple(comparisons), left_out=tuple(dict.fromkeys(left_out)))


def _task(
    task: str,
    cells: _Cells,
    pairs: Sequence[tuple[str, str]],
    found: Callable[[Comparison], None],
    left_out: Callable[[str], None],
) -> None:
    leaves, sources = _read(cells)
    makes: dict[_Target, dict[str, _Make]] = defaultdict(dict)
    for model, (_, record) in cells.items():
        for target, make in _targets(record, leaves, model):
            makes[target][model] = make
    said = {model: _said(record) for model, (_, record) in cells.items()}
    for target, by_model in makes.items():
        able = {model: make for model, make in by_model.items() if make.reason is None}
        for reason in dict.fromkeys(make.reason for make in by_model.values() if make.reason is not None):
            left_out(f"{task}: {_called(target, task)} {reason}")
        weightings = {make.by_size for make in able.values()} - {None}
        if len(weightings) > 1:
            left_out(f"{task}: {_called(target, task)} is weighted in two ways by different models' runs")
            continue
        able_pairs = [(a, b) for a, b in pairs if a in able and b in able]
        if able_pairs:
            by_size = weightings.pop() if weightings else True
            names = list(dict.fromkeys(leaf for make in able.values() for leaf in make.leaves))
            table = _Table(leaves, names, target, list(able), sources=sources)
            blocks = table.blocks(able_pairs, bool(by_size))
            higher = next(iter(able.values())).higher_is_better
            for one in _comparisons(task, target, blocks, said, higher, binary=table.binary, by_size=bool(by_size)):
                found(one)
            for a, b in table.strangers:
                left_out(f"{task}: {_called(target, task)} of {a} and {b}: fewer than two documents in common")


def _called(target: _Target, task: str) -> str:
    """A number's name behind that of its task."""
    shown = target.metric if target.filter == "none" else f"{target.metric} ({target.filter})"
    return shown if target.name == task else f"{shown} of {target.name}"


def _read(cells: _Cells) -> tuple[dict[tuple[str, str], _Leaf], NDArray[np.intp]]:
    """The outcomes by leaf and filter, and by the number of each document that of the text which it is about."""
    leaves: dict[tuple[str, str], _Leaf] = defaultdict(_Leaf)
    source_by_text: dict[Any, int] = {}
    number_by_hash: dict[str, int] = {}
    sources: list[int] = []
    for model, (sweep, record) in cells.items():
        seen: dict[Any, int] = defaultdict(int)
        for outcome in sweep.outcomes(record):
            leaf = leaves[outcome.subtask, outcome.filter]
            answers = leaf.answers[model]
            if (document := number_by_hash.get(outcome.doc_hash)) is None:
                text = _source(msgspec.json.decode(outcome.doc))
                own = text if text is not None else (outcome.doc_hash,)
                document = number_by_hash[outcome.doc_hash] = len(sources)
                sources.append(source_by_text.setdefault(own, len(source_by_text)))
            # A document that a data set holds twice is paired as often as both have it.
            where = (outcome.subtask, outcome.filter)
            key = (outcome.doc_hash, outcome.prompt_hash, outcome.target_hash)
            for kind, columns, documents, rows in (
                (key, leaf.whole, leaf.documents_whole, answers.whole),
                (key[:1], leaf.alone, leaf.documents_alone, answers.alone),
            ):
                nth = seen[where, kind]
                seen[where, kind] = nth + 1
                column = columns.setdefault((kind, nth), len(columns))
                if column == len(documents):
                    documents.append(document)
                rows.append(column)
            for metric, value in outcome.metrics:
                if value is None or isinstance(value, (int, float)):
                    column_of = answers.values.setdefault(metric, [])
                    column_of += [None] * (len(answers.whole) - 1 - len(column_of))
                    column_of.append(None if value is None else float(value))
                else:
                    answers.unusable.add(metric)
    for leaf in leaves.values():
        for answers in leaf.answers.values():
            for values in answers.values.values():
                values += [None] * (len(answers.whole) - len(values))
    return leaves, np.array(sources, dtype=np.intp)


def _source(doc: Any) -> str | None:
    """The text that a document is a question about, if it says so."""
    for name in (*SOURCES, PREMISE) if isinstance(doc, dict) else ():
        text = doc.get(name)
        if isinstance(text, list):
            text = "\n".join(map(str, text))
        if isinstance(text, str) and len(text.strip()) >= (1 if name == PREMISE else SOURCE_LEAST):
            return text
    return None


def _targets(record: Record, leaves: Mapping[tuple[str, str], _Leaf], model: str) -> Iterator[tuple[_Target, _Make]]:
    """The numbers at the top of a record, with what they are made of: a group's own or, without one, its members'."""
    above: list[Score] = []
    below: dict[tuple[str, str, str], list[Score]] = {}
    tops: dict[tuple[str, str, str], Score] = {}
    for score in record.scores:
        above = [one for one in above if one.depth < score.depth]
        parents = [(one.task, score.metric, score.filter) for one in above]
        top = next((key for key in parents if key in tops), None)
        if top is None:
            tops[score.task, score.metric, score.filter] = score
        elif (score.task, score.filter) in leaves:
            below.setdefault(top, []).append(score)
        if all(one.task != score.task for one in above):
            above.append(score)
    for (name, metric, filter_name), score in tops.items():
        target = _Target(name, metric, filter_name)
        members = below.get((name, metric, filter_name), [])
        parts = [score] if (name, filter_name) in leaves else members
        reason = None if parts else "has no samples"
        sizes = []
        for part in parts:
            answers = leaves[part.task, filter_name].answers.get(model)
            values = answers.values.get(metric) if answers else None
            numbers = [value for value in values or () if value is not None]
            if answers is None or values is None or metric in answers.unusable:
                reason = "is made of more than a number per document"
            elif not numbers or not _near(sum(numbers) / len(numbers), part.value):
                reason = "is no mean over documents"
            sizes.append(len(answers.whole) if answers else 0)
        by_size: bool | None = None
        if reason is None and parts != [score]:
            sized = _near(sum(n * p.value for n, p in zip(sizes, parts, strict=True)) / sum(sizes), score.value)
            plain = _near(sum(p.value for p in parts) / len(parts), score.value)
            by_size = None if sized and plain else sized
            if not sized and not plain:
                reason = "is no mean over its subtasks"
        yield (
            target,
            _Make(
                leaves=tuple(part.task for part in parts),
                by_size=by_size,
                higher_is_better=_direction(score, parts),
                reason=reason,
            ),
        )


def _direction(score: Score, parts: Sequence[Score]) -> bool | None:
    """lm-eval's; of a group without one, that of its subtasks if all have the same: lm-eval gives it none where not."""
    known = {part.higher_is_better for part in ([score] if score.higher_is_better is not None else parts)}
    return known.pop() if len(known) == 1 else None


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-9 * max(1.0, abs(b))


class _Table:
    """One number's values: models by documents, both ways of pairing."""

    def __init__(
        self,
        leaves: Mapping[tuple[str, str], _Leaf],
        names: Sequence[str],
        target: _Target,
        models: Sequence[str],
        *,
        sources: NDArray[np.intp],
    ) -> None:
        self._rows = {model: row for row, model in enumerate(models)}
        parts = [leaves[name, target.filter] for name in names]
        self._ways = {}
        for whole in (True, False):
            widths = [len(leaf.whole if whole else leaf.alone) for leaf in parts]
            values = np.full((len(models), sum(widths)), np.nan)
            for leaf, start in zip(parts, np.cumsum([0, *widths[:-1]]), strict=True):
                for model, row in self._rows.items():
                    if (answers := leaf.answers.get(model)) and target.metric in answers.values:
                        columns = np.array(answers.whole if whole else answers.alone, dtype=np.intp) + start
                        values[row, columns] = np.array(answers.values[target.metric], dtype=np.float64)
            kept = [leaf.documents_whole if whole else leaf.documents_alone for leaf in parts]
            documents = np.array([document for of_leaf in kept for document in of_leaf], dtype=np.intp)
            asked = documents * len(parts) + np.repeat(np.arange(len(parts)), widths)
            self._ways[whole] = (values, np.cumsum([0, *widths[:-1]]), sources[documents], asked)
        known = self._ways[False][0]
        self.binary = bool(np.all(np.isnan(known) | (known == 0) | (known == 1)))
        self.strangers: list[tuple[str, str]] = []
        """Pairs without enough documents in common; filled by `blocks`."""

    def blocks(self, pairs: Sequence[tuple[str, str]], by_size: bool) -> Iterator[_Block]:
        """The comparisons of these pairs: by prompts where any agree, otherwise by documents alone."""
        answered = {whole: ~np.isnan(values) for whole, (values, *_) in self._ways.items()}
        firsts, seconds = (np.array([self._rows[pair[side]] for pair in pairs], dtype=np.intp) for side in (0, 1))
        common = {whole: _in_common(flags)[firsts, seconds] for whole, flags in answered.items()}
        for whole in (True, False):
            chosen = (common[True] > 0) == whole
            enough = common[whole] >= 2
            self.strangers += [pairs[i] for i in np.flatnonzero(chosen & ~enough)]
            picked = np.flatnonzero(chosen & enough)
            values, starts, sources, asked = self._ways[whole]
            clusters = _truly_shared(sources, asked, answered[whole].any(axis=0))
            held = answered[whole].sum(axis=1)
            step = max(1, min(AT_ONCE // values.shape[1], PAIRS_AT_ONCE))
            for part in (picked[start : start + step] for start in range(0, len(picked), step)):
                a, b = firsts[part], seconds[part]
                again = common[False][part] - common[True][part] if whole else np.zeros(len(part), dtype=np.int64)
                yield _Block(
                    tuple(pairs[i] for i in part),
                    whole,
                    estimates(
                        values[a],
                        values[b],
                        starts=starts,
                        by_size=by_size,
                        clusters=clusters,
                        binary=self.binary,
                    ),
                    held[a] + held[b] - 2 * common[whole][part],
                    np.maximum(again, 0),
                )


def _in_common(answered: Flags) -> NDArray[np.int64]:
    """Documents that each two models have both answered."""
    flags = answered.astype(np.float64)
    return np.rint(flags @ flags.T).astype(np.int64)


def _truly_shared(sources: NDArray[np.intp], asked: NDArray[np.intp], answered: Flags) -> NDArray[np.intp] | None:
    """The clusters, unless each document has a text of its own and is asked by one subtask, however often.

    `asked` numbers documents by subtask: prompt variants ask about the same ones.
    """
    return sources if len(np.unique(sources[answered])) < len(np.unique(asked[answered])) else None


def _comparisons(
    task: str,
    target: _Target,
    blocks: Iterable[_Block],
    said: Mapping[str, "_Said"],
    higher: bool | None,
    *,
    binary: bool,
    by_size: bool,
) -> Iterator[Comparison]:
    for block in blocks:
        made = block.made
        exact = binary and by_size and made.clusters is None
        p = mcnemar(made.only_a, made.only_b) if exact else permutation(made.units)
        columns = zip(
            block.pairs,
            *(getattr(made, name).tolist() for name in ("n", "value_a", "value_b", "difference", "stderr")),
            *(getattr(made, name).tolist() for name in ("low", "high", "detectable", "strata")),
            p.tolist(),
            made.clusters.tolist() if made.clusters is not None else [None] * len(p),
            block.unpaired.tolist(),
            block.reprompted.tolist(),
            strict=True,
        )
        for (a, b), n, value_a, value_b, difference, stderr, low, high, least, strata, chance, g, lone, new in columns:
            yield Comparison(
                task=task,
                subtask=target.name,
                metric=target.metric,
                filter=target.filter,
                higher_is_better=higher,
                model_a=a,
                model_b=b,
                n=n,
                unpaired=lone,
                value_a=value_a,
                value_b=value_b,
                difference=difference,
                stderr=stderr,
                low=low,
                high=high,
                p=chance,
                p_adjusted=chance,
                test="exact McNemar" if exact else "paired permutation",
                strata=strata,
                clusters=g,
                detectable=least,
                same_settings=_same_settings(said[a], said[b], whole=block.whole),
                notes=tuple(_notes(said[a], said[b], whole=block.whole, reprompted=new, clusters=g)),
            )


# --- What the reader has to know of a pair ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Said:
    """Settings of a cell that bear on a comparison, by what they are called."""

    numbers: Mapping[str, Any]
    """What changes numbers and should not differ between two models."""
    prompts: Mapping[str, Any]
    """What changes prompts, and belongs to a model."""


def _said(record: Record) -> _Said:
    asked = record.settings.get("task", {})
    return _Said(
        {
            "task version": {score.task: score.version for score in record.scores},
            "shots": record.settings.get("num_fewshot"),
            "gen_kwargs": asked.get("gen_kwargs"),
            "metadata": asked.get("metadata"),
            "seeds": record.settings.get("seeds"),
            "lm-eval": record.versions.get("lm_eval"),
        },
        {
            "chat template": [
                record.settings.get(name) or None for name in ("chat", "chat_template_sha", "chat_template_kwargs")
            ],
            "system instruction": record.settings.get("system_instruction"),
            "turns of the examples": record.settings.get("fewshot_as_multiturn"),
        },
    )


def _same_settings(a: _Said, b: _Said, *, whole: bool) -> bool:
    """Prompts that differ, and nothing of the models tells why, were made under other settings."""
    return a.numbers == b.numbers and (whole or a.prompts != b.prompts)


def _notes(a: _Said, b: _Said, *, whole: bool, reprompted: int, clusters: int | None) -> Iterator[str]:
    differs = [name for name, value in a.numbers.items() if value != b.numbers[name]]
    if differs:
        yield f"settings differ: {', '.join(differs)}"
    if not whole:
        why = [name for name, value in a.prompts.items() if value != b.prompts[name]]
        cause = f" ({', '.join(why)})" if why else ""
        yield f"prompts differ{cause}: documents are paired, prompts are not"
    if reprompted:
        yield f"{reprompted} documents of both are left out because their prompts differ"
    if clusters is not None and clusters < FEW_CLUSTERS:
        yield f"too few clusters ({clusters}): the standard error is probably too small"
