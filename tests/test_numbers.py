"""Which numbers a task can give by its YAML, held to what lm-eval registers and to what a real sweep got."""

import csv
from pathlib import Path
from typing import Any

import pytest

from sweep import ROOT, demo
from sweep.planning.numbers import ANY, DEFAULT_METRICS, REGISTERED_METRICS, Numbers, missing, of_group, of_task
from sweep.planning.tasks import catalog

ACC = Numbers(metrics=("acc", "acc_norm"), filters=("none",))
MATCH = Numbers(metrics=("exact_match",), filters=("strict-match", "flexible-extract"))


def test_metrics_are_lm_evals_own() -> None:
    import lm_eval.api.metrics  # noqa: F401 (registers them)
    from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY, metric_registry

    assert set(metric_registry) == REGISTERED_METRICS
    assert {kind: tuple(names) for kind, names in DEFAULT_METRIC_REGISTRY.items()} == DEFAULT_METRICS


def test_the_demos_tasks_can_give_exactly_what_its_sweep_got(tmp_path: Path) -> None:
    for folder in ("tasks", "data"):
        (tmp_path / folder).mkdir()
    demo._write_tasks(tmp_path, demo._world())
    known = catalog([str(tmp_path / "tasks")])
    with (ROOT / "docs" / "demo.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in sorted({row["task"] for row in rows}):
        got = {f"{row['metric']},{row['filter']}" for row in rows if name == row["task"] == row["lm_eval_task"]}
        assert {one for numbers in known.info(name).numbers for one in numbers.names()} == got
    for row in rows:
        number = f"{row['lm_eval_task']}/{row['metric']},{row['filter']}"
        assert known.missing(row["task"], number) is None, number


@pytest.mark.parametrize(
    ("config", "numbers"),
    [
        ({}, Numbers(metrics=("exact_match",), filters=("none",))),
        ({"output_type": "multiple_choice"}, ACC),
        ({"metric_list": [{"metric": "bleu"}]}, Numbers(metrics=("bleu",), filters=("none",))),
        (
            {"filter_list": [{"name": "strict-match", "filter": []}, {"name": "flexible-extract", "filter": []}]},
            MATCH,
        ),
        ({"class": "a.B", "metric_list": [{"metric": "acc"}]}, ANY),
        ({"process_results": "utils.mark"}, Numbers(metrics=None, filters=("none",))),
        ({"metric_list": [{"metric": "utils.pass_at_k"}]}, Numbers(metrics=None, filters=("none",))),
        ({"metric_list": [{"metric": "rouge"}]}, Numbers(metrics=None, filters=("none",))),
        ({"metric_list": [{"metric": "exact_match", "hf_evaluate": True}]}, Numbers(metrics=None, filters=("none",))),
        ({"metric_list": ["acc"], "filter_list": "a"}, ANY),
        ({"output_type": "of a later lm-eval"}, Numbers(metrics=None, filters=("none",))),
    ],
)
def test_a_task_can_give_what_its_yaml_lists_and_anything_where_code_decides(
    config: dict[str, Any], numbers: Numbers
) -> None:
    assert of_task(config, config.get("output_type", "generate_until")) == numbers


@pytest.mark.parametrize(
    ("aggregated", "members", "names"),
    [
        (None, [ACC], []),
        ([{"metric": "acc"}], [ACC, ACC], ["acc,none"]),
        ({"metric": "exact_match"}, [MATCH], ["exact_match,strict-match", "exact_match,flexible-extract"]),
        ([{"metric": "exact_match", "filter_list": "strict-match"}], [MATCH], ["exact_match,strict-match"]),
        ([{"metric": "acc", "filter_list": ["a", "b"]}], [ACC], ["acc,a", "acc,b"]),
    ],
)
def test_a_group_has_what_it_aggregates(aggregated: Any, members: list[Numbers], names: list[str]) -> None:
    found = of_group(aggregated, members)
    assert [name for numbers in found for name in numbers.names()] == names


@pytest.mark.parametrize("aggregated", [["acc"], [{"filter_list": "a"}], "acc"])
def test_of_a_group_that_cannot_be_read_anything_may_come(aggregated: Any) -> None:
    assert of_group(aggregated, [ACC]) == (ANY,)


def test_a_group_of_tasks_with_filters_of_their_own_may_have_any() -> None:
    (numbers,) = of_group([{"metric": "acc"}], [ACC, ANY])
    assert numbers.may_hold("acc,x")
    assert not numbers.may_hold("f1,x")


@pytest.mark.parametrize("number", ["acc", "acc,none", "acc_norm", "a/acc", "a/acc_norm,none", "inner/f1", "g::in/f1"])
def test_a_number_that_may_come_is_not_missing(number: str) -> None:
    assert missing(number, [ACC], {"a": ACC}, {"inner"}) is None


@pytest.mark.parametrize("number", ["x", "x,none", "a/x", "of/x"])
def test_where_code_decides_no_metric_is_missing(number: str) -> None:
    free = Numbers(metrics=None, filters=("none",))
    assert missing(number, [free], {"a": free}, ()) is None


@pytest.mark.parametrize(
    ("number", "own", "why"),
    [
        (
            "exact_match",
            [MATCH],
            "'exact_match,none'; did you mean 'exact_match,strict-match' or 'exact_match,flexible-",
        ),
        ("acc_nrm", [ACC], "'acc_nrm,none'; did you mean 'acc_norm,none' or 'acc,none'?"),
        ("bleu", [ACC, ACC], "'bleu,none'; there is acc,none, acc_norm,none"),
        ("x,strict", [Numbers(metrics=None, filters=("a", "b"))], "'x,strict'; its filters are a, b"),
        ("acc", [], "'acc,none'; it has none of its own, only of subtasks, as in a/acc"),
        ("a/f1", [ACC], "'a/f1,none'; there is a/exact_match,strict-match, a/exact_match,flexible-extract"),
        ("b/exact_match", [ACC], "there is no subtask 'b'; there is a"),
        ("acc,strict", [ACC], "'acc,strict'; did you mean 'acc,none'?"),
    ],
)
def test_a_number_that_cannot_come_is_said_with_the_nearest(number: str, own: list[Numbers], why: str) -> None:
    said = missing(number, own, {"a": MATCH}, ())
    assert said is not None
    assert said.removeprefix("there is no number ").startswith(why)
