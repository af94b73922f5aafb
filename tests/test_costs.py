"""What is expected of cells, before anything is measured and after."""

from pathlib import Path

import pytest

from sweep.planning.config import Model, Seeds, Task
from sweep.planning.plan import Cell, ModelPlan, ServerPlan
from sweep.record import Counts, Record, Status
from sweep.running.costs import (
    BILLIONS,
    CPU_SLOWER,
    GROUP_DOCUMENTS,
    Costs,
    billions,
    prior_size,
    start_s,
    sweep_s,
)
from sweep.running.schedule import CELLS_PER_MODEL, LifeView, ServerView


def cell(model: str = "m", task: str = "gsm8k", **settings: object) -> Cell:
    plan = ModelPlan(name=model, model=Model(path="org/M-7B"), revision=None, fingerprint="", server=model)
    return Cell(
        model=plan,
        task_name=task,
        task=Task(task=task, **settings),  # type: ignore[arg-type]
        seeds=Seeds(),
        fingerprint="",
    )


def server(path: str = "org/M-7B", gpus: float = 1, **settings: object) -> ServerPlan:
    model = Model(path=path, **settings)  # type: ignore[arg-type]
    return ServerPlan(name="m", model=model, revision=None, adapters={"m": None}, gpus=gpus, replicas=1)


def record(
    model: str = "m", task: str = "gsm8k", *, asked: int = 100, request_s: float = 50.0, **more: object
) -> Record:
    counts = Counts(requests=100, asked=asked, prompt_tokens=50_000, generated_tokens=10_000)
    known = {"status": Status.DONE, "counts": counts, **more}
    return Record(model=model, task=task, fingerprint="", request_s=request_s, **known)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "size"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", 7),
        ("Qwen/Qwen2.5-0.5B", 0.5),
        ("meta-llama/Llama-3.1-70b", 70),
        ("Qwen/Qwen3-30B-A3B", 3),
        ("HuggingFaceTB/SmolLM2-135M", 0.135),
        ("openai-community/gpt2", BILLIONS),
        ("7B/unnamed", BILLIONS),
    ],
)
def test_a_name_tells_how_many_parameters_compute_a_token(path: str, size: float) -> None:
    assert billions(path) == pytest.approx(size)


def test_a_folder_tells_it_by_its_weights(tmp_path: Path) -> None:
    assert billions(str(tmp_path)) == BILLIONS
    (tmp_path / "model.safetensors").write_bytes(b"0" * 2_000_000)
    assert billions(str(tmp_path)) == pytest.approx(0.001)


def test_a_prior_counts_documents_and_examples() -> None:
    assert prior_size(Task(task="gsm8k", limit=20)).requests == 20
    assert prior_size(Task(task="mmlu")).requests == 57 * GROUP_DOCUMENTS
    assert prior_size(Task(task="gsm8k", num_fewshot=5)).read > prior_size(Task(task="gsm8k", num_fewshot=0)).read
    assert prior_size(Task(task="gsm8k")).generated > prior_size(Task(task="hellaswag")).generated
    assert prior_size(Task(task="there is none of this name")).requests > 0


def test_larger_models_take_longer_and_more_gpus_less() -> None:
    costs = Costs()
    base = costs.expected_s(cell(), server(), on_cpu=False)
    assert costs.expected_s(cell(), server("org/M-70B"), on_cpu=False) == pytest.approx(10 * base)
    assert costs.expected_s(cell(), server(gpus=4), on_cpu=False) == pytest.approx(base / 4)
    assert costs.expected_s(cell(), server(gpus=4, nodes=2), on_cpu=False) == pytest.approx(base / 8)
    assert costs.expected_s(cell(), server(), on_cpu=True) == pytest.approx(base * CPU_SLOWER)
    assert start_s(server("org/M-70B"), on_cpu=False) > start_s(server(), on_cpu=False)


def test_what_one_model_s_cell_came_to_is_expected_of_the_others() -> None:
    costs = Costs([record("other")])
    measured = costs.expected_s(cell(), server(), on_cpu=False)
    assert measured == pytest.approx((50_000 + 4 * 10_000 + 20 * 100) * 7 / 200_000)
    assert costs.measured
    assert Costs([record("other", asked=50)]).expected_s(cell(), server(), on_cpu=False) == pytest.approx(
        (2 * 90_000 + 20 * 100) * 7 / 200_000
    )


def test_a_model_s_own_records_correct_its_rate_the_more_the_longer_they_took() -> None:
    def expected(took_s: float) -> float:
        return Costs([record(request_s=took_s * CELLS_PER_MODEL)]).expected_s(cell(), server(), on_cpu=False)

    prior = Costs([record("other")]).expected_s(cell(), server(), on_cpu=False)
    assert expected(prior) == pytest.approx(prior)
    assert prior < expected(10) < 10
    assert expected(10_000) == pytest.approx(10_000, rel=0.15)


@pytest.mark.parametrize("changes", [{"status": Status.FAILED}, {"counts": Counts(requests=5, reused=5)}])
def test_failed_cells_and_replays_teach_nothing(changes: dict[str, object]) -> None:
    assert not Costs([record(**changes)]).measured  # type: ignore[arg-type]


def seen(*, work_s: float, ready_at_s: tuple[float, ...] = (), unfinished: int = 1, live: bool = True) -> ServerView:
    lives = tuple(LifeView(name=str(n), ready_at_s=at, live=live) for n, at in enumerate(ready_at_s))
    known = {"need": None, "replicas": None, "wanted": True, "start_s": 60.0}
    return ServerView(name="m", lives=lives, unfinished_cells=unfinished, work_s=work_s, **known)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("servers", "expected"),
    [
        ([], 0),
        ([seen(work_s=0, ready_at_s=(0,), unfinished=0)], 0),
        ([seen(work_s=100, ready_at_s=(0,))], 100),
        ([seen(work_s=100, ready_at_s=(1030,))], 130),  # it starts
        ([seen(work_s=100)], 160),  # it has yet to start
        ([seen(work_s=100, ready_at_s=(0,), live=False)], 160),  # it was lost
        ([seen(work_s=100, ready_at_s=(0, 0))], 50),
        ([seen(work_s=100, ready_at_s=(0,)), seen(work_s=10, ready_at_s=(0,))], 100),  # side by side
        ([seen(work_s=100, ready_at_s=(0,)), seen(work_s=300), seen(work_s=400)], 800),  # one after the other
    ],
)
def test_a_sweep_takes_as_long_as_its_longest_model_or_as_its_work_on_the_servers_there_are(
    servers: list[ServerView], expected: float
) -> None:
    assert sweep_s(servers, 1000.0) == expected
