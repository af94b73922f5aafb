import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sweep.errors import ConfigError
from sweep.record import WITHOUT_BOS, Counts, Record, Score, Status
from sweep.results.reading import Sweep
from sweep.results.references import FOLDER, Published, published, read_references
from sweep.results.store import RunDirectory

SOURCE = {"title": "A paper", "where": "somewhere/paper.md"}
STATED = {"harness": "lm-eval vllm", "num_fewshot": 5, "version": "3", "chat": False}
ROW = {"model": "Org/Model-3B", "task": "gsm8k", "metric": "exact_match", "filter": "strict-match", "value": 0.6861}


def record(
    *,
    version: str = "3",
    shots: int | None = 5,
    counts: Counts | None = None,
    warnings: tuple[str, ...] = (),
    **settings: Any,
) -> Record:
    score = Score(
        task="gsm8k",
        version=version,
        filter="strict-match",
        num_fewshot=shots,
        metric="exact_match",
        value=0.69,
        stderr=0.01,
        higher_is_better=True,
        samples=1319,
    )
    here = {"path": "Org/Model-3B", "chat": False, "task": {"limit": None, "gen_kwargs": {}}, **settings}
    return Record(
        model="m",
        task="gsm8k-5shot",
        fingerprint="f",
        status=Status.DONE,
        scores=(score,),
        counts=counts or Counts(),
        warnings=warnings,
        settings=here,
    )


def found(
    tmp_path: Path,
    ours: Record,
    *,
    settings: dict[str, Any] | None = None,
    models: dict[str, Any] | None = None,
    **row: Any,
) -> tuple[Published, ...]:
    stated = STATED | (settings or {})
    stated = {name: value for name, value in stated.items() if value is not None}
    document = {"sources": {"p": SOURCE | {"settings": stated}}, "scores": [ROW | {"source": "p"} | row]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(document))
    sweep = Sweep(
        directory=RunDirectory(tmp_path),
        name="s",
        config={"models": models or {}},
        models=("m",),
        tasks=("gsm8k-5shot",),
        records=(ours,),
        left_out=0,
        owed=0,
    )
    return published(sweep, folders=[tmp_path])


def test_a_published_score_is_comparable_where_all_settings_are_the_same(tmp_path: Path) -> None:
    (one,) = found(tmp_path, record(), stderr=0.0128)
    assert (one.model, one.task, one.subtask, one.value, one.stderr) == ("m", "gsm8k-5shot", "gsm8k", 0.6861, 0.0128)
    assert one.differs == ()
    assert one.source == "A paper (somewhere/paper.md)"
    assert one.settings == "lm-eval vllm, 5-shot, task version 3, no chat template"


@pytest.mark.parametrize(
    ("ours", "theirs", "difference"),
    [
        ({"shots": 0}, {}, "shots: 5 there, 0 here"),
        ({"version": "2.0"}, {}, "task version: 3 there, 2.0 here"),
        ({"chat": True}, {}, "chat template: no there, yes here"),
        ({"task": {"limit": 10}}, {}, "limit: none there, 10 here"),
        ({"task": {"gen_kwargs": {"temperature": 1}}}, {}, "gen_kwargs: the task's own there, {'temperature': 1} here"),
        ({"quantization": "fp8"}, {}, "quantization: none there, 'fp8' here"),
        ({"system_instruction": "Be brief."}, {}, "system instruction: none there, 'Be brief.' here"),
        ({"quantization": "unknown"}, {}, "not known here: quantization"),
        ({"dtype": "float16"}, {}, "dtype: auto there, 'float16' here"),
        ({"generation_config": "auto"}, {}, "generation config: vllm there, 'auto' here"),
        ({"revision": "deadbeef"}, {}, "revision: none there, deadbeef here"),
        ({"path": "/ckpt/sft-run3/Model-3B"}, {}, "a local folder: not known to be these weights"),
        (
            {"path": None, "url": "http://somewhere:1", "served_model_name": "Org/Model-3B"},
            {},
            "a server at a url: not known to be these weights",
        ),
        (
            {"server": {"kv_cache_dtype": "fp8", "enforce_eager": True}},
            {},
            "server: none there, {'kv_cache_dtype': 'fp8'} here",
        ),
        ({"server": "unknown"}, {}, "not known here: server"),
        (
            {"chat_template_kwargs": {"enable_thinking": False}},
            {},
            "chat template kwargs: none there, {'enable_thinking': False} here",
        ),
        ({"task": {"metadata": {"a": 1}}}, {}, "metadata: the task's own there, {'a': 1} here"),
        (
            {"task": {"include_path": "/mine"}},
            {},
            "task files: lm-eval's there, with a folder of its own here (include_path)",
        ),
        ({"counts": Counts(truncated=3)}, {}, "3 requests were cut to fit the model here"),
        ({}, {"version": None}, "task version: not stated there, 3 here"),
        ({}, {"harness": "their own"}, "measured with their own, not lm-eval"),
        ({}, {"unlike": ["prompts were sent as text"]}, "prompts were sent as text"),
        (
            {"chat": True, "fewshot_as_multiturn": False},
            {"chat": True, "fewshot_as_multiturn": True},
            "examples as turns: yes there, no here",
        ),
    ],
    ids=str,
)
def test_what_differs_or_is_not_stated_is_named(
    tmp_path: Path, ours: dict[str, Any], theirs: dict[str, Any], difference: str
) -> None:
    (one,) = found(tmp_path, record(**ours), settings=theirs)
    assert one.differs == (difference,)


@pytest.mark.parametrize(("backend", "differs"), [("vllm", True), ("local-completions on vLLM", False)])
def test_prompts_without_the_bos_that_the_sources_backend_sends_are_named(
    tmp_path: Path, backend: str, differs: bool
) -> None:
    (one,) = found(
        tmp_path,
        record(warnings=("another", f"12 {WITHOUT_BOS} and so on")),
        settings={"harness": f"lm-eval {backend}"},
    )
    said = ("12 prompts begin without the BOS here, as with local-completions; other backends put it there",)
    assert one.differs == (said if differs else ())


def test_only_a_revision_that_was_chosen_is_another(tmp_path: Path) -> None:
    """A record holds the commit of the hub's own choice too."""
    (usual,) = found(tmp_path, record(revision="c0ffee"), models={"m": {"revision": None}})
    (chosen,) = found(tmp_path, record(revision="c0ffee"), models={"m": {"revision": "step-1000"}})
    assert (usual.differs, chosen.differs) == ((), ("revision: none there, step-1000 here",))


def test_options_that_change_no_number_and_usual_seeds_make_no_difference(tmp_path: Path) -> None:
    seeds = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
    (same,) = found(tmp_path, record(server={"enforce_eager": True}, seeds=seeds))
    (other,) = found(tmp_path, record(seeds=seeds | {"fewshot": 1}))
    assert same.differs == ()
    assert other.differs[0].startswith("seeds: ")


def test_a_version_is_the_same_with_and_without_its_zero(tmp_path: Path) -> None:
    (one,) = found(tmp_path, record(version="3.0"))
    assert one.differs == ()


def test_the_shots_of_a_group_are_those_of_its_subtasks(tmp_path: Path) -> None:
    (same,) = found(tmp_path, record(shots=None, num_fewshot={"x": 5, "y": 5}))
    (mixed,) = found(tmp_path, record(shots=None, num_fewshot={"x": 5, "y": 0}))
    assert (same.differs, mixed.differs) == ((), ("shots: 5 there, several here",))


def test_a_local_copy_is_known_by_the_name_of_its_folder(tmp_path: Path) -> None:
    (copy,) = found(tmp_path, record(path="/models/Model-3B"))
    assert copy.differs == ("a local folder: not known to be these weights",)
    assert not found(tmp_path, record(path="/models/Model-3B-AWQ"))
    assert not found(tmp_path, record(path="Other/Model-3B"))
    assert not found(tmp_path, record(adapter="org/adapter"))
    assert not found(tmp_path, record(), metric="acc")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": 68.61}, r"scores\[0\]\.value: .*<= 1.*; values are on lm-eval's scale of 0 to 1$"),
        ({"vlaue": 0.5}, r"scores\[0\]: .*unknown field 'vlaue'$"),
        ({"source": "pp"}, r"scores\[0\]\.source: no source 'pp'; did you mean 'p'\?$"),
        ({"settings": {"chat": "yes"}}, r"settings\.chat: Expected .*bool.*"),
    ],
    ids=str,
)
def test_a_wrong_file_is_one_line_with_the_place(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        found(tmp_path, record(), **change)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'r.yaml'}: ")
    assert "\n" not in said
    assert re.search(message, said), said


def test_bad_yaml_is_one_line_with_its_number(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("sources: {}\nscores: [\n")
    with pytest.raises(ConfigError, match=r"r\.yaml: line \d+: bad YAML"):
        read_references(tmp_path / "r.yaml")


def test_the_references_that_come_with_it_are_valid_and_name_what_lm_eval_has() -> None:
    from sweep.planning.tasks import catalog

    references = read_references(FOLDER / "qwen2.5.yaml")
    by_key = {(s.model, s.task, s.filter, s.source, s.settings.unlike): s for s in references.scores}
    assert len(by_key) == len(references.scores)
    base = by_key["Qwen/Qwen2.5-3B", "gsm8k", "strict-match", "recipe", ()]
    assert (base.value, base.stderr) == (0.6861, 0.0128)
    known = catalog()
    assert not [score.task for score in references.scores if score.task not in known.names()]
