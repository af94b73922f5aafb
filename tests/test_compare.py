"""Comparisons: checked against scipy and statsmodels, and against simulated data whose truth is known."""

import hashlib
import json
import time
import tracemalloc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as their_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from sweep.record import Record, Score, Status
from sweep.results import compare as compare_module
from sweep.results.compare import (
    Comparison,
    compare,
    compare_sweeps,
    estimates,
    examine,
    examine_sweeps,
    holm,
    leaders,
    mcnemar,
    permutation,
    saddlepoint,
    tango,
    wilson,
)
from sweep.results.reading import Sweep
from sweep.results.store import RunDirectory

Row = Mapping[str, Any]


def hashed(text: Any) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()


def row(document: Any, filter_name: str = "none", *, prompt: Any = None, doc: Any = None, **metrics: Any) -> Row:
    """A line of lm-eval's sample file, as far as anyone reads it."""
    return {
        "doc_id": 0,
        "doc": doc if doc is not None else {"q": str(document)},
        "target": "t",
        "arguments": {"gen_args_0": {"arg_0": "a prompt", "arg_1": {}}},
        "resps": [["an answer"]],
        "filtered_resps": ["an answer"],
        "filter": filter_name,
        "metrics": list(metrics),
        "doc_hash": hashed(document),
        "prompt_hash": hashed(("prompt", document if prompt is None else prompt)),
        "target_hash": hashed("t"),
        **metrics,
    }


def score(task: str, value: float, metric: str = "acc", filter_name: str = "none", **more: Any) -> Score:
    wanted = {"version": "1", "num_fewshot": 0, "stderr": None, "higher_is_better": True, "samples": None, **more}
    return Score(task=task, metric=metric, filter=filter_name, value=value, **wanted)


def mean(rows: Iterable[Row], metric: str = "acc") -> float:
    values = [float(one[metric]) for one in rows]
    return sum(values) / len(values)


class Bench:
    """Run directories with sample files, made without running anything."""

    def __init__(self, root: Path, name: str = "s") -> None:
        self.root, self.name = root / name, name
        self.records: list[Record] = []

    def cell(
        self, model: str, task: str, rows: Mapping[str, Sequence[Row]], scores: Sequence[Score] = (), **settings: Any
    ) -> None:
        files = []
        for subtask, lines in rows.items():
            path = Path("results") / model / f"samples_{subtask}_2026-01-01T00-00-00.000000.jsonl"
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            (self.root / path).write_text("".join(json.dumps(line) + "\n" for line in lines))
            files.append(str(path))
        found = tuple(scores) or tuple(score(name, mean(lines)) for name, lines in rows.items())
        self.records.append(
            Record(
                model=model,
                task=task,
                fingerprint="f",
                status=Status.DONE,
                scores=found,
                files=tuple(files),
                settings=settings,
            )
        )

    def answers(self, model: str, values: Sequence[float], task: str = "t", **settings: Any) -> None:
        self.cell(model, task, {task: [row(i, acc=value) for i, value in enumerate(values)]}, **settings)

    def sweep(self) -> Sweep:
        return Sweep(
            directory=RunDirectory(self.root),
            name=self.name,
            config={},
            models=tuple(dict.fromkeys(record.model for record in self.records)),
            tasks=tuple(dict.fromkeys(record.task for record in self.records)),
            records=tuple(self.records),
            left_out=0,
            owed=0,
        )


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def flat(values: Sequence[float]) -> np.ndarray[Any, Any]:
    return np.array([values], dtype=np.float64)


# --- The formulas ----------------------------------------------------------------------------------------------------


def test_mcnemars_p_is_that_of_scipys_binomial_test_and_of_statsmodels() -> None:
    cases = [(0, 0), (1, 0), (3, 0), (5, 5), (2, 9), (40, 61), (0, 30), (500, 400)]
    found = mcnemar(*(np.array(side) for side in zip(*cases, strict=True)))
    for (a, b), p in zip(cases, found, strict=True):
        assert p == pytest.approx(stats.binomtest(a, a + b, 0.5).pvalue if a + b else 1.0, rel=1e-9)
        assert p == pytest.approx(min(1.0, their_mcnemar([[7, a], [b, 7]], exact=True).pvalue), rel=1e-9)


def test_holms_correction_is_that_of_statsmodels() -> None:
    p = np.random.default_rng(1).uniform(0, 0.2, 50)
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])
    assert holm(np.array([])).shape == (0,)


def test_the_standard_error_of_a_difference_is_that_of_scipys_paired_t_test() -> None:
    random = np.random.default_rng(2)
    a, b = random.normal(size=(2, 40))
    made = estimates(flat(a), flat(b))
    theirs = stats.ttest_rel(b, a)
    interval = theirs.confidence_interval(0.95)
    assert made.difference[0] / made.stderr[0] == pytest.approx(theirs.statistic)
    assert (made.low[0], made.high[0]) == pytest.approx((interval.low, interval.high))


def test_the_clustered_standard_error_is_that_of_statsmodels() -> None:
    random = np.random.default_rng(3)
    clusters = np.repeat(np.arange(12), 5)[random.permutation(60)]
    d = random.normal(size=60) + random.normal(size=12)[clusters]
    made = estimates(flat(np.zeros(60)), flat(d), clusters=clusters)
    theirs = sm.OLS(d, np.ones(60)).fit(cov_type="cluster", cov_kwds={"groups": clusters}, use_t=True)
    assert made.stderr[0] == pytest.approx(theirs.bse[0])
    assert (made.low[0], made.high[0]) == pytest.approx(tuple(theirs.conf_int()[0]))
    assert made.clusters is not None
    assert made.clusters[0] == 12


@pytest.mark.parametrize("by_size", [True, False])
def test_over_strata_value_and_standard_error_are_what_lm_eval_makes_of_the_differences(by_size: bool) -> None:
    """lm-eval's own functions, on the subtasks' differences in place of their scores."""
    from lm_eval.api.metrics import (
        aggregate_subtask_metrics,
        mean_stderr,
        pooled_sample_stderr,
        unweighted_mean_stderr,
    )

    random = np.random.default_rng(4)
    sizes = [5, 30, 12]
    a, b = random.normal(size=(2, sum(sizes)))
    parts = np.split(b - a, np.cumsum(sizes)[:-1])
    stderrs = [mean_stderr(list(part)) for part in parts]
    made = estimates(flat(a), flat(b), starts=np.array([0, 5, 35]), by_size=by_size)
    assert made.difference[0] == pytest.approx(aggregate_subtask_metrics([p.mean() for p in parts], sizes, by_size))
    theirs = pooled_sample_stderr(stderrs, sizes) if by_size else unweighted_mean_stderr(stderrs)
    assert made.stderr[0] == pytest.approx(theirs)
    assert made.strata[0] == 3


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(
    ("starts", "clusters", "by_size"),
    [
        ([0], [0, 0, 0, 0], True),
        ([0, 2], [0, 0, 1, 1], True),
        ([0, 1, 2, 3], [0, 0, 1, 1], True),
        ([0, 1, 2, 3], None, False),
    ],
    ids=["one text", "a text for each subtask", "a document for each subtask, of texts", "a document for each subtask"],
)
def test_where_nothing_is_known_of_the_spread_there_is_no_interval(
    starts: list[int], clusters: list[int] | None, by_size: bool, binary: bool
) -> None:
    texts = None if clusters is None else np.array(clusters)
    a, b = flat([0, 0, 1, 0]), flat([1, 1, 0, 1])
    made = estimates(a, b, starts=np.array(starts), by_size=by_size, clusters=texts, binary=binary)
    assert made.difference[0] == pytest.approx(0.5)
    for name in ("stderr", "low", "high", "detectable"):
        assert np.isnan(getattr(made, name)[0]), name
    assert not np.isnan(permutation(made.units)[0])


def test_a_subtask_with_one_document_is_taken_to_spread_as_the_others_do() -> None:
    d = flat([1.0, 0.0, 1.0, 0.0, 0.25])
    made = estimates(np.zeros_like(d), d, starts=np.array([0, 4]), by_size=False)
    spread = np.var([1, 0, 1, 0], ddof=1)
    assert made.stderr[0] == pytest.approx(np.sqrt(spread / 4 + spread) / 2)


def test_an_answer_that_is_missing_on_either_side_counts_for_neither() -> None:
    nan = np.nan
    made = estimates(flat([1, nan, 0, 1, 0]), flat([0, 1, nan, 1, 1]), starts=np.array([0, 1]))
    kept = estimates(flat([1, 1, 0]), flat([0, 1, 1]), starts=np.array([0, 1]))
    for name in ("n", "value_a", "value_b", "difference", "stderr", "low", "high", "detectable"):
        assert getattr(made, name) == pytest.approx(getattr(kept, name)), name


def test_the_permutation_test_is_exact_where_few_documents_differ() -> None:
    d = np.array([0.5, -0.25, 0.75, 1.0, 0.5, -0.1, 0.0, 0.3])
    theirs = stats.permutation_test((d,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert permutation(d[None])[0] == pytest.approx(theirs.pvalue)
    assert permutation(np.zeros((1, 5)))[0] == 1.0


def test_the_permutation_test_of_right_and_wrong_is_mcnemars() -> None:
    d = np.array([1.0] * 40 + [-1.0] * 22 + [0.0] * 100)
    exact = mcnemar(np.array([22]), np.array([40]))[0]
    assert permutation(d[None])[0] == pytest.approx(exact, abs=3 * np.sqrt(exact / 9999))
    assert permutation(d[None])[0] == permutation(d[None])[0]


def test_signs_drawn_in_parts_are_the_same_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    units = np.random.default_rng(10).normal(size=(4, 50)) + 0.2
    whole = permutation(units)
    monkeypatch.setattr(compare_module, "SIGNS_AT_ONCE", 13 * compare_module.FLIPS_AT_ONCE)
    assert permutation(units).tolist() == whole.tolist()


def test_two_hundred_thousand_documents_fit_in_200_megabytes() -> None:
    random = np.random.default_rng(11)
    a, b = random.normal(size=(2, 10, 200_000))
    tracemalloc.start()
    try:
        permutation(estimates(a[:1], b[:1]).units)
        estimates(a, b)
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()


def test_a_p_that_random_signs_cannot_reach_comes_from_the_saddlepoint() -> None:
    random = np.random.default_rng(5)
    d = random.uniform(-0.5, 1.0, size=18)
    signs = 1.0 - 2.0 * ((np.arange(2**18)[:, None] >> np.arange(18)) & 1)
    exact = (np.abs(signs @ d) >= abs(d.sum()) - 1e-12).mean()
    assert saddlepoint(d[None])[0] == pytest.approx(exact, rel=0.03)
    unlike = random.uniform(0.1, 1.0, size=60)
    assert permutation(unlike[None])[0] == pytest.approx(2.0**-59)
    unlike[:5] *= -1
    assert 2.0**-59 < permutation(unlike[None])[0] < 1e-6


@pytest.mark.parametrize("step", [1.0, 0.1 / 3])
@pytest.mark.parametrize("differing", [14, 20, 30, 60, 300])
def test_far_out_differences_of_one_size_have_the_p_of_the_binomial_test(differing: int, step: float) -> None:
    """Their sum moves in steps: a tail that is taken for smooth is up to three times too small."""
    exact = {fewer: float(stats.binomtest(fewer, differing, 0.5).pvalue) for fewer in range(differing // 2)}
    far = [fewer for fewer, p in exact.items() if 1e-30 < p < 0.002]
    units = np.array([[step] * (differing - fewer) + [-step] * fewer + [0.0, 1e-17] for fewer in far])
    assert saddlepoint(units) == pytest.approx([exact[fewer] for fewer in far], rel=0.03)
    assert permutation(units[:1])[0] == pytest.approx(exact[far[0]], rel=0.03)


@pytest.mark.parametrize("sizes", [{1: 14, 2: 8}, {1: 40, 2: 40}, {1: 20, 2: 10, 3: 5, 4: 2}], ids=str)
def test_far_out_differences_in_steps_of_one_size_have_the_p_of_all_their_signs(sizes: Mapping[int, int]) -> None:
    """As of metrics with 0, a half and 1, and of the questions of a passage counted together."""
    steps = np.repeat(list(sizes), list(sizes.values()))
    chances = np.ones(1)
    for size in steps.tolist():
        chances = np.convolve(chances, [0.5, *[0.0] * (2 * size - 1), 0.5])
    random = np.random.default_rng(12)
    checked = 0
    for _ in range(300):
        signs = np.where(random.uniform(size=len(steps)) < random.uniform(0.6, 1.0), 1, -1)
        total = int(abs(signs @ steps))
        exact = 2 * chances[steps.sum() + total :].sum()
        if exact < 0.002 and total < steps.sum():
            assert saddlepoint((signs * steps / 7)[None])[0] == pytest.approx(exact, rel=0.03)
            checked += 1
    assert checked > 30


@pytest.mark.parametrize(("right", "n"), [(0, 40), (1, 40), (20, 40), (39, 40), (40, 40), (1, 2), (999, 1000)])
def test_the_interval_of_a_share_is_that_of_statsmodels_and_has_a_width_at_both_ends(right: int, n: int) -> None:
    low, high = wilson(right, n)
    assert (low, high) == pytest.approx(proportion_confint(right, n, method="wilson"))
    assert 0 <= low < high <= 1
    assert low <= right / n <= high


@pytest.mark.parametrize(("only_a", "only_b", "n"), [(2, 12, 50), (0, 0, 20), (0, 7, 7), (3, 1, 200), (150, 90, 2000)])
def test_at_the_ends_of_the_score_interval_the_score_is_the_normal_quantile(only_a: int, only_b: int, n: int) -> None:
    """By its definition, with the constrained estimate found by search: what is tested is the closed form."""
    low, high = (float(end[0]) for end in tango(np.array([only_a]), np.array([only_b]), np.array([n])))

    def likelihood(q: np.ndarray[Any, Any], d: float) -> np.ndarray[Any, Any]:
        cells = ((only_b, q + d), (only_a, q), (n - only_a - only_b, 1 - 2 * q - d))
        return sum(count * np.log(np.maximum(p, 1e-300)) if count else 0 * p for count, p in cells)  # type: ignore

    for d in (low, high):
        if abs(d) > 1 - 1e-9:
            continue
        q = np.linspace(max(0.0, -d), (1 - d) / 2, 400_001)
        best = q[np.argmax(likelihood(q, d))]
        score_there = (only_b - only_a - n * d) / np.sqrt(n * (2 * best + d * (1 - d)))
        assert abs(score_there) == pytest.approx(1.96, abs=0.01)
    assert low <= (only_b - only_a) / n <= high


# --- Simulations: what is claimed about intervals and tests holds ----------------------------------------------------

RUNS = 2_000


def draws(n: int, p_a: float, p_b: float, alike: float, runs: int = RUNS) -> tuple[Any, Any]:
    """Right and wrong answers of two models; `alike` is their correlation."""
    random = np.random.default_rng(int(1e6 * p_a + 1e3 * p_b) + n)
    both = min(p_a * p_b + alike * np.sqrt(p_a * (1 - p_a) * p_b * (1 - p_b)), p_a, p_b)
    drawn = random.random((runs, n), dtype=np.float32)
    a = drawn < p_a
    b = (drawn < both) | ((drawn >= p_a) & (drawn < p_a + p_b - both))
    return a.astype(float), b.astype(float)


@pytest.mark.parametrize("n", [20, 200, 2000])
@pytest.mark.parametrize(
    ("p_a", "p_b", "alike"), [(0.5, 0.5, 0.0), (0.5, 0.55, 0.3), (0.9, 0.9, 0.0), (0.9, 0.9, 0.2), (0.85, 0.9, 0.0)]
)
def test_the_interval_holds_its_level(n: int, p_a: float, p_b: float, alike: float) -> None:
    a, b = draws(n, p_a, p_b, alike)
    made = estimates(a, b, binary=True)
    covered = np.mean((made.low <= p_b - p_a + 1e-9) & (made.high >= p_b - p_a - 1e-9))
    assert 0.93 <= covered <= 0.975


@pytest.mark.parametrize(
    ("n", "p_a", "p_b"), [(20, 0.95, 0.95), (20, 0.98, 0.95), (200, 0.98, 0.98), (200, 0.99, 0.97), (2000, 0.99, 0.99)]
)
def test_close_to_1_the_interval_is_never_too_narrow(n: int, p_a: float, p_b: float) -> None:
    """With two discordant documents to expect, no interval can be exact: this one errs towards saying less."""
    a, b = draws(n, p_a, p_b, 0.1)
    made = estimates(a, b, binary=True)
    assert np.mean((made.low <= p_b - p_a + 1e-9) & (made.high >= p_b - p_a - 1e-9)) >= 0.93
    wald = np.mean(np.abs(made.difference - (p_b - p_a)) <= 1.96 * made.stderr + 1e-9)
    if n == 20 and p_a != p_b:
        assert wald < 0.8


def test_the_interval_over_strata_and_over_clusters_holds_its_level() -> None:
    random = np.random.default_rng(6)
    hardness = np.repeat(random.uniform(0.3, 0.95, 20), 15)
    a, b = (random.uniform(size=(RUNS, 300)) < hardness for _ in range(2))
    made = estimates(a.astype(float), b.astype(float), starts=np.arange(0, 300, 15), binary=True)
    assert 0.93 <= np.mean((made.low <= 0) & (made.high >= 0)) <= 0.97

    clusters = np.repeat(np.arange(40), 6)
    shared = random.normal(size=(RUNS, 40))[:, clusters]
    d = shared + random.normal(size=(RUNS, 240))
    clustered = estimates(np.zeros_like(d), d, clusters=clusters)
    alone = estimates(np.zeros_like(d), d)
    assert 0.93 <= np.mean((clustered.low <= 0) & (clustered.high >= 0)) <= 0.97
    assert np.mean((alone.low <= 0) & (alone.high >= 0)) < 0.8


def test_documents_asked_several_times_are_worth_no_more_to_the_interval() -> None:
    """Close to 1 few of them differ, and what stands in for the others is to be of a whole document."""
    a, b = (np.repeat(side, 6, axis=1) for side in draws(30, 0.98, 0.95, 0.0))
    made = estimates(a, b, clusters=np.repeat(np.arange(30), 6), binary=True)
    assert np.mean((made.low <= -0.03) & (made.high >= -0.03)) >= 0.95


def test_equal_models_are_told_apart_no_more_often_than_allowed_and_the_detectable_difference_is_found() -> None:
    a, b = draws(400, 0.7, 0.7, 0.3)
    assert np.mean(mcnemar(estimates(a, b).only_a, estimates(a, b).only_b) < 0.05) <= 0.06
    a, b = draws(400, 0.6, 0.68, 0.3)
    made = estimates(a, b, binary=True)
    assert np.median(made.detectable) == pytest.approx(0.08, abs=0.005)
    assert np.mean(mcnemar(made.only_a, made.only_b) < 0.05) == pytest.approx(0.8, abs=0.08)

    random = np.random.default_rng(7)
    skewed = random.exponential(size=(300, 30)) - random.exponential(size=(300, 30))
    assert np.mean(permutation(skewed) < 0.05) <= 0.08


# --- From files to comparisons ---------------------------------------------------------------------------------------


def test_two_models_are_compared_on_the_documents_that_both_answered(bench: Bench) -> None:
    bench.cell("a", "t", {"t": [row(i, acc=float(i % 2)) for i in range(30)]})
    bench.cell("b", "t", {"t": [row(i, acc=1.0) for i in reversed(range(5, 33))]})
    (one,) = compare(bench.sweep())
    assert (one.model_a, one.model_b, one.task, one.subtask, one.metric, one.filter) == (
        "a",
        "b",
        "t",
        "t",
        "acc",
        "none",
    )
    assert (one.n, one.unpaired, one.test, one.strata, one.clusters) == (25, 8, "exact McNemar", 1, None)
    assert (one.value_a, one.value_b) == (13 / 25, 1.0)
    assert one.p == pytest.approx(stats.binomtest(0, 12, 0.5).pvalue)
    assert one.difference == pytest.approx(12 / 25)
    assert one.low < one.difference < one.high
    assert one.verdict == "better"
    assert replace(one, higher_is_better=False).verdict == "worse"
    assert replace(one, higher_is_better=None).verdict == "differs"
    assert replace(one, p_adjusted=0.06).verdict == "no difference shown"


def test_only_the_pairs_that_are_asked_for_are_compared_and_in_their_direction(bench: Bench) -> None:
    for model, right in (("a", 3), ("b", 6), ("c", 9)):
        bench.answers(model, [1.0] * right + [0.0] * (12 - right))
    (one,) = compare(bench.sweep(), pairs=[("c", "a")])
    assert (one.model_a, one.model_b, one.difference) == ("c", "a", -0.5)
    assert len(compare(bench.sweep())) == 3


def test_p_values_are_corrected_for_all_that_is_compared(bench: Bench) -> None:
    for model, right in (("a", 3), ("b", 12), ("c", 20)):
        bench.answers(model, [1.0] * right + [0.0] * (24 - right))
    made = compare(bench.sweep())
    assert [one.p_adjusted for one in made] == pytest.approx(list(holm(np.array([one.p for one in made]))))
    assert any(one.p_adjusted > one.p for one in made)


def test_filters_and_metrics_are_compared_each_on_its_own(bench: Bench) -> None:
    for model, shift in (("a", 0), ("b", 1)):
        rows = [
            row(i, name, em=float((i + shift * (name == "strict")) % 2), f1=(i + shift) / 30)
            for name in ("strict", "loose")
            for i in range(20)
        ]
        kinds = [(m, f) for f in ("strict", "loose") for m in ("em", "f1")]
        scores = [score("t", mean([r for r in rows if r["filter"] == f], m), m, f) for m, f in kinds]
        bench.cell(model, "t", {"t": rows}, scores)
    by_kind = {(one.metric, one.filter): one for one in compare(bench.sweep())}
    assert by_kind.keys() == {("em", "strict"), ("em", "loose"), ("f1", "strict"), ("f1", "loose")}
    assert by_kind["em", "loose"].p == 1.0
    assert by_kind["em", "loose"].stderr == 0.0
    assert by_kind["em", "loose"].low < 0 < by_kind["em", "loose"].high
    assert by_kind["f1", "loose"].test == "paired permutation"
    assert by_kind["f1", "loose"].difference == pytest.approx(1 / 30)


def test_a_document_that_a_data_set_holds_twice_is_paired_as_often(bench: Bench) -> None:
    bench.cell("a", "t", {"t": [row("x", acc=1.0), row("x", acc=1.0), row("x", acc=0.0), row("y", acc=0.0)]})
    bench.cell("b", "t", {"t": [row("y", acc=1.0), row("x", acc=1.0), row("x", acc=1.0)]})
    (one,) = compare(bench.sweep())
    assert (one.n, one.unpaired) == (3, 1)
    assert one.difference == pytest.approx(1 / 3)


def test_where_all_prompts_differ_documents_are_paired_and_the_reader_is_told_why(bench: Bench) -> None:
    bench.cell("a", "t", {"t": [row(i, acc=1.0) for i in range(10)]}, chat=False)
    bench.cell("b", "t", {"t": [row(i, prompt=f"chat {i}", acc=0.0) for i in range(10)]}, chat=True)
    (one,) = compare(bench.sweep())
    assert (one.n, one.unpaired) == (10, 0)
    assert one.notes == ("prompts differ (chat template): documents are paired, prompts are not",)
    assert one.same_settings
    bench.cell("c", "t", {"t": [row(i, prompt=f"other {i}", acc=0.0) for i in range(10)]}, chat=False)
    (other,) = compare(bench.sweep(), pairs=[("a", "c")])
    assert not other.same_settings


def test_where_some_prompts_differ_these_documents_are_left_out_and_counted(bench: Bench) -> None:
    bench.cell("a", "t", {"t": [row(i, acc=1.0) for i in range(10)]})
    bench.cell("b", "t", {"t": [row(i, prompt=None if i < 7 else "other", acc=0.0) for i in range(10)]})
    (one,) = compare(bench.sweep())
    assert (one.n, one.unpaired) == (7, 6)
    assert one.notes == ("3 documents of both are left out because their prompts differ",)


def test_settings_that_differ_are_named(bench: Bench) -> None:
    bench.answers("a", [1.0, 0.0, 1.0], task="t", num_fewshot={"t": 5}, seeds={"fewshot": 1})
    bench.answers("b", [1.0, 0.0, 1.0], task="t", num_fewshot={"t": 0}, seeds={"fewshot": 1})
    (one,) = compare(bench.sweep())
    assert one.notes == ("settings differ: shots",)
    assert not one.same_settings


def test_subtasks_of_one_size_and_position_are_never_mixed_up(bench: Bench) -> None:
    """The same document in two subjects is two documents, and a group is compared over its subjects."""
    for model, right in (("a", {"algebra": 0.0, "logic": 1.0}), ("b", {"algebra": 1.0, "logic": 1.0})):
        rows = {name: [row(i, acc=value) for i in range(12)] for name, value in right.items()}
        scores = [score("g", mean([*rows["algebra"], *rows["logic"]]), num_fewshot=None)]
        scores += [score(name, mean(lines), depth=1, samples=12) for name, lines in rows.items()]
        bench.cell(model, "cell", rows, scores)
    (one,) = compare(bench.sweep())
    assert (one.task, one.subtask, one.n, one.strata, one.unpaired) == ("cell", "g", 24, 2, 0)
    assert (one.value_a, one.value_b, one.stderr) == (0.5, 1.0, 0.0)
    assert one.low < 0.5 < one.high


def group(bench: Bench, model: str, sizes: Mapping[str, int], right: Mapping[str, int], value: float) -> None:
    rows = {name: [row(f"{name}{i}", acc=float(i < right[name])) for i in range(size)] for name, size in sizes.items()}
    scores = [score("g", value), *(score(name, mean(lines), depth=1) for name, lines in rows.items())]
    bench.cell(model, "g", rows, scores)


def test_a_group_is_weighted_as_lm_eval_weighted_it(bench: Bench) -> None:
    sizes = {"x": 10, "y": 30}
    group(bench, "a", sizes, {"x": 5, "y": 15}, (0.5 + 0.5) / 2)
    group(bench, "b", sizes, {"x": 10, "y": 15}, (1.0 + 0.5) / 2)  # lm-eval's weight_by_size: false
    (plain,) = compare(bench.sweep())
    assert plain.difference == pytest.approx(0.25)
    assert plain.test == "paired permutation"

    sized = Bench(bench.root.parent, "sized")
    group(sized, "a", sizes, {"x": 5, "y": 15}, 20 / 40)
    group(sized, "b", sizes, {"x": 10, "y": 15}, 25 / 40)
    (one,) = compare(sized.sweep())
    assert one.difference == pytest.approx(5 / 40)
    assert one.test == "exact McNemar"


def variants(bench: Bench, model: str, right: Sequence[float], prompts: int, *, own: bool = False) -> None:
    """A group whose subtasks ask about one data set with a prompt each; `own`: each about one of its own, all with the
    same prompts and targets."""
    rows = {
        f"prompt{k}": [
            row(f"{k if own else ''} document {i}", prompt=i if own else f"prompt{k} {i}", acc=value)
            for i, value in enumerate(right)
        ]
        for k in range(prompts)
    }
    top = score("g", sum(right) / len(right), num_fewshot=None)
    bench.cell(model, "g", rows, [top, *(score(name, mean(lines), depth=1) for name, lines in rows.items())])


def test_a_document_that_several_prompts_ask_about_counts_once(bench: Bench) -> None:
    """As in lm-eval's evalita-mp_te, sib and openai_mmlu: 12 documents against 4 are no evidence, six times or once."""
    right = {"a": [0.0] * 12 + [1.0] * 4 + [1.0] * 44, "b": [1.0] * 12 + [0.0] * 4 + [1.0] * 44}
    for model, values in right.items():
        variants(bench, model, values, 6)
        bench.answers(model, values, task="once")
    made = {one.subtask: one for one in compare(bench.sweep())}
    many, once = made["g"], made["once"]
    assert (many.n, many.strata, many.clusters, many.verdict) == (360, 6, 60, "no difference shown")
    assert once.p == pytest.approx(0.0768, abs=1e-4)
    assert many.p == pytest.approx(once.p, rel=0.2)  # a hundred random signs or more came as far
    assert many.difference == pytest.approx(once.difference)
    assert many.stderr == pytest.approx(once.stderr, rel=0.01)
    assert many.detectable == pytest.approx(once.detectable, rel=0.1)
    assert many.high - many.low == pytest.approx(once.high - once.low, rel=0.1)
    assert [of.best for of in leaders(bench.sweep(), made.values())] == [None, None]


def test_documents_that_no_other_subtask_asks_about_are_not_linked(bench: Bench) -> None:
    """Neither by their place, prompt and target, nor because their own data set repeats them."""
    for model, right in (("a", [0.0] * 12 + [1.0] * 4), ("b", [1.0] * 12 + [0.0] * 4)):
        variants(bench, model, right, 2, own=True)
        repeated = {name: [row(i // 2, acc=value) for i, value in enumerate(right)] for name in ("x", "y")}
        bench.cell(model, "tag", repeated)
    group, *alone = compare(bench.sweep())
    assert (group.subtask, group.clusters, group.test, group.n) == ("g", None, "exact McNemar", 32)
    assert group.p == pytest.approx(stats.binomtest(8, 32, 0.5).pvalue)
    assert [(one.subtask, one.clusters, one.test) for one in alone] == [
        ("x", None, "exact McNemar"),
        ("y", None, "exact McNemar"),
    ]


def test_a_direction_that_lm_eval_leaves_open_is_not_guessed(bench: Bench) -> None:
    for directions, expected in (((True, True), True), ((True, False), None), ((True, None), None)):
        one = Bench(bench.root, str(directions))
        for model, right in (("a", 0.0), ("b", 1.0)):
            rows = {name: [row(f"{name}{i}", acc=right) for i in range(12)] for name in ("x", "y")}
            parts = [
                score(name, right, depth=1, higher_is_better=high) for name, high in zip(rows, directions, strict=True)
            ]
            one.cell(model, "g", rows, [score("g", right, higher_is_better=None), *parts])
        (made,) = compare(one.sweep())
        assert (made.higher_is_better, made.verdict) == (expected, "better" if expected else "differs")


def test_a_tag_is_compared_task_by_task(bench: Bench) -> None:
    for model in ("a", "b"):
        bench.cell(model, "tag", {name: [row(i, acc=float(i % 2)) for i in range(6)] for name in ("easy", "hard")})
    assert [(one.task, one.subtask) for one in compare(bench.sweep())] == [("tag", "easy"), ("tag", "hard")]


def test_what_is_no_mean_over_documents_is_left_out_and_said(bench: Bench) -> None:
    for model in ("a", "b"):
        rows = [row(i, acc=1.0, perplexity=-float(i), bits=[-3.0, 10], f1=[1, 0]) for i in range(8)]
        values = {"acc": 1.0, "perplexity": 33.1, "bits": 0.43, "f1": 0.5}
        bench.cell(model, "t", {"t": rows}, [score("t", value, name) for name, value in values.items()])
    found = examine(bench.sweep())
    assert [one.metric for one in found.comparisons] == ["acc"]
    assert found.left_out == (
        "t: perplexity is no mean over documents",
        "t: bits is made of more than a number per document",
        "t: f1 is made of more than a number per document",
    )


def test_a_document_without_a_number_is_left_out_of_that_metric_alone(bench: Bench) -> None:
    for model, value in (("a", 0.25), ("b", 0.5)):
        rows = [row(i, acc=1.0, f1=float("nan") if i == 0 else value) for i in range(6)]
        bench.cell(model, "t", {"t": rows}, [score("t", 1.0), score("t", value, "f1")])
    by_metric = {one.metric: one for one in compare(bench.sweep())}
    assert (by_metric["acc"].n, by_metric["f1"].n, by_metric["f1"].difference) == (6, 5, 0.25)


def test_questions_about_one_passage_are_clustered_and_few_passages_are_said(bench: Bench) -> None:
    random = np.random.default_rng(8)
    for model in ("a", "b"):
        right = random.integers(0, 2, 40)
        rows = [
            row(i, doc={"question": str(i), "passage": f"passage {i // 5} " + "x" * 100}, acc=float(right[i // 5]))
            for i in range(40)
        ]
        bench.cell(model, "t", {"t": rows})
    (one,) = compare(bench.sweep())
    assert (one.clusters, one.test) == (8, "paired permutation")
    assert one.notes == ("too few clusters (8): the standard error is probably too small",)
    assert one.p >= 2 / 2**8


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("narrative", "x" * 500),  # leaderboard_musr
        ("document_str", "x" * 500),  # qa4mre
        ("flores_passage", "x" * 500),  # belebele
        ("abstract", "x" * 500),  # qasper
        ("scenario", "x" * 90),  # ethics_virtue
        ("premise", "And he said, Mama, I'm home."),  # xnli, which begins with it; anli
    ],
    ids=["narrative", "document_str", "flores_passage", "abstract", "scenario", "premise"],
)
def test_the_texts_of_lm_evals_tasks_are_known_by_their_fields(bench: Bench, field: str, text: str) -> None:
    for model, values in (("a", [1.0, 0.0] * 15), ("b", [0.0, 0.0, 1.0] * 10)):
        rows = [row(i, doc={"q": str(i), field: f"{text} {i // 3}"}, acc=value) for i, value in enumerate(values)]
        bench.cell(model, "t", {"t": rows})
    (one,) = compare(bench.sweep())
    assert one.clusters == 10


def test_documents_with_a_passage_each_or_with_a_mere_label_are_not_clustered(bench: Bench) -> None:
    for model in ("a", "b"):
        own = [row(i, doc={"q": str(i), "passage": f"{i} " + "x" * 100}, acc=float(i % 2)) for i in range(9)]
        label = [row(i, doc={"q": str(i), "context": "maths"}, acc=float(i % 2)) for i in range(9)]
        bench.cell(model, "own", {"own": own})
        bench.cell(model, "label", {"label": label})
    assert [one.clusters for one in compare(bench.sweep())] == [None, None]


def test_models_without_a_document_in_common_are_not_compared(bench: Bench) -> None:
    bench.cell("a", "t", {"t": [row(i, acc=1.0) for i in range(5)]})
    bench.cell("b", "t", {"t": [row(i, acc=1.0) for i in range(5, 10)]})
    found = examine(bench.sweep())
    assert found.comparisons == ()
    assert found.left_out == ("t: acc of a and b: fewer than two documents in common",)


def test_pairs_are_done_with_before_the_next_are_begun(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held of a block has a number for each of its documents."""
    for model in ("a", "b", "c"):
        bench.answers(model, [1.0, 0.0, 1.0])
    steps = []

    def noted(name: str, of: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            steps.append(name)
            return of(*args, **kwargs)

        return called

    monkeypatch.setattr(compare_module, "AT_ONCE", 3)
    for name in ("estimates", "mcnemar"):
        monkeypatch.setattr(compare_module, name, noted(name, getattr(compare_module, name)))
    assert len(compare(bench.sweep())) == 3
    assert steps == ["estimates", "mcnemar"] * 3


def test_a_failed_cell_is_compared_with_nothing(bench: Bench) -> None:
    bench.answers("a", [1.0, 0.0])
    bench.records.append(Record(model="b", task="t", fingerprint="f", status=Status.FAILED, error="no"))
    assert compare(bench.sweep()) == ()


def test_two_sweeps_are_compared_cell_by_cell(bench: Bench) -> None:
    later = Bench(bench.root.parent, "later")
    for one, right in ((bench, 4), (later, 12)):
        for model in ("a", "b"):
            one.answers(model, [1.0] * right + [0.0] * (12 - right))
    made = compare_sweeps(bench.sweep(), later.sweep())
    assert [(one.model_a, one.model_b, one.verdict) for one in made] == [
        ("s/a", "later/a", "better"),
        ("s/b", "later/b", "better"),
    ]
    again = examine_sweeps(bench.sweep(), replace(later.sweep(), name="s")).comparisons
    assert len({name for one in again for name in (one.model_a, one.model_b)}) == 4


def test_nobody_leads_by_noise_and_one_leads_who_is_shown_to_be_better_than_all(bench: Bench) -> None:
    for model, right in (("a", 20), ("b", 21), ("c", 2)):
        bench.answers(model, [1.0] * right + [0.0] * (40 - right))
    (tied,) = leaders(bench.sweep(), compare(bench.sweep()))
    assert (tied.models, tied.best) == (("a", "b"), None)
    bench.answers("d", [1.0] * 40)
    (led,) = leaders(bench.sweep(), compare(bench.sweep()))
    assert (led.models, led.best) == (("d",), "d")


def test_who_is_beaten_by_somebody_does_not_lead_and_a_sole_leader_need_not_be_the_best(bench: Bench) -> None:
    for model, right in (("a", 26), ("b", 22), ("c", 15)):
        bench.answers(model, [1.0] * right + [0.0] * (40 - right))
    made = [replace(one, p_adjusted=float({one.model_a, one.model_b} != {"b", "c"})) for one in compare(bench.sweep())]
    (found,) = leaders(bench.sweep(), made)
    assert (found.models, found.best) == (("a", "b"), None)


def test_a_difference_that_comes_of_other_settings_makes_no_leader(bench: Bench) -> None:
    for model, right, shots in (("a", 2, 5), ("b", 40, 0)):
        bench.answers(model, [1.0] * right + [0.0] * (40 - right), num_fewshot={"t": shots})
    made = compare(bench.sweep())
    assert made[0].verdict == "better"
    assert leaders(bench.sweep(), made) == ()
    bench.answers("c", [0.0] * 40, num_fewshot={"t": 0})
    (found,) = leaders(bench.sweep(), compare(bench.sweep()))
    assert (found.models, found.best) == (("b",), None)


def test_nobody_is_the_best_beside_a_model_that_was_not_compared(bench: Bench) -> None:
    for model, right in (("a", 2), ("b", 40), ("c", 39)):
        bench.answers(model, [1.0] * right + [0.0] * (40 - right))
    (found,) = leaders(bench.sweep(), compare(bench.sweep(), pairs=[("a", "b")]))
    assert (found.models, found.best) == (("b",), None)


@pytest.mark.slow
def test_forty_models_on_thirty_tasks_are_compared_in_seconds(bench: Bench) -> None:
    """100,000 samples, 23,400 pairs and two metrics, one of them no right or wrong."""
    random = np.random.default_rng(9)
    skill = random.uniform(0.3, 0.9, 40)
    for task in range(30):
        for model in range(40):
            right = random.uniform(size=83) < skill[model]
            rows = [row(i, acc=float(r), f1=float(np.round(r * 0.7 + i / 300, 4))) for i, r in enumerate(right)]
            scores = [score(f"t{task}", mean(rows, name), name) for name in ("acc", "f1")]
            bench.cell(f"m{model}", f"t{task}", {f"t{task}": rows}, scores)
    began = time.process_time()
    made: tuple[Comparison, ...] = compare(bench.sweep())
    took = time.process_time() - began
    assert len(made) == 2 * 30 * 780
    assert {"better", "worse", "no difference shown"} == {one.verdict for one in made}
    assert took < 20, took  # process time; the bound leaves room for a core that is shared
