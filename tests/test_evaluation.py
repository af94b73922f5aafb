"""Cells against stock lm-eval on the same stand-in; documents made once; what a record says; previews and checks."""

import json
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from datasets import load_dataset
from doubles import (
    KEY,
    Memory,
    RequestsLog,
    distinct,
    facts,
    make_gpqa,
    make_mmlu_pro,
    make_tasks,
    make_tokenizer,
    stand_in,
    with_end,
)
from fixture_model import BOS, make_fixture_tokenizer
from lm_eval.evaluator import simple_evaluate
from lm_eval.loggers import EvaluationTracker, WandbLogger
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sweep import __version__
from sweep.errors import TaskError
from sweep.evaluating.client import Pool
from sweep.evaluating.evaluation import Evaluated, _seeded, check_task, evaluate, load_tokenizer, preview
from sweep.evaluating.preflight import Facts
from sweep.evaluating.scoring import Method
from sweep.planning.config import Model, Overflow, Seeds, Task
from sweep.planning.plan import Cell, ModelPlan
from sweep.record import Record, Status
from sweep.results.report import caveats
from sweep.serving.server import Endpoint


@pytest.fixture(scope="module", autouse=True)
def _data_sets_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "plain")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tasks(tmp_path_factory.mktemp("tasks") / "own")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> RequestsLog:
    return RequestsLog(tmp_path_factory.mktemp("requests") / "log.jsonl")


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory, log: RequestsLog) -> Iterator[Endpoint]:
    with stand_in(tmp_path_factory.mktemp("server") / "log", requests_log=log.path, max_model_len=8192) as endpoint:
        yield endpoint


@pytest.fixture
def model(folder: Path) -> ModelPlan:
    return ModelPlan(name="m", model=Model(path=str(folder)), revision=None, fingerprint="f", server="m")


@pytest.fixture
def cell(model: ModelPlan, tasks: Path) -> Callable[..., Cell]:
    def make(
        task: str, *, model: ModelPlan = model, seeds: Seeds | None = None, folder: Path = tasks, **settings: Any
    ) -> Cell:
        asked = Task(task=task, include_path=str(folder), **settings)
        return Cell(model=model, task_name=task, task=asked, seeds=seeds or Seeds(), fingerprint="c")

    return make


@pytest.fixture
def run(endpoint: Endpoint, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Evaluated]:
    def run(cell: Cell, channel: Memory | None = None, *, tokenizer: PreTrainedTokenizerBase = tokenizer) -> Evaluated:
        pool = Pool()
        pool.update([(endpoint, 8)])
        return evaluate(cell, tokenizer=tokenizer, pool=pool, channel=channel or Memory(facts()))

    return run


@pytest.fixture
def stock(endpoint: Endpoint, folder: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def run(
        *names: str, tokenizer: Path = folder, tasks: Path = tasks, max_length: int = 2048, **settings: Any
    ) -> dict[str, Any]:
        found = simple_evaluate(
            model="local-completions",
            model_args={
                "base_url": f"{endpoint.url}/v1/completions",
                "model": "m",
                "tokenizer": str(tokenizer),
                "tokenizer_backend": "huggingface",
                "num_concurrent": 4,
                "max_length": max_length,
            },
            tasks=list(names),
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            **settings,
        )
        assert found is not None
        return found

    return run


def results_of(done: Evaluated) -> dict[str, Any]:
    (content,) = (content for name, content in done.files.items() if name.startswith("results_"))
    return json.loads(content)


def samples_of(done: Evaluated, task: str) -> list[dict[str, Any]]:
    (content,) = (content for name, content in done.files.items() if name.startswith(f"samples_{task}_"))
    return [json.loads(line) for line in content.splitlines()]


# The same results as stock


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("letters", {}),
        ("letters", {"num_fewshot": 5, "limit": 7}),
        ("phrases", {"num_fewshot": 1}),
        ("phrases", {"limit": 0.25}),
        ("writing", {"gen_kwargs": {"max_gen_toks": 3, "until": ["\n\n"]}}),
        ("story", {}),
        ("family", {"limit": 5}),
    ],
)
def test_a_cell_scores_what_stock_scores(task: str, settings: dict[str, Any], cell: Any, run: Any, stock: Any) -> None:
    expected = stock(task, **settings)
    done = run(cell(task, **settings))
    results = results_of(done)
    for part in ("results", "groups", "n-shot", "n-samples", "versions", "higher_is_better", "group_subtasks"):
        assert results.get(part, {}) == json.loads(json.dumps(expected.get(part, {}))), part
    for name, samples in expected["samples"].items():
        ours = samples_of(done, name)
        for key in ("doc_id", "doc_hash", "prompt_hash", "target_hash", "filter"):
            assert [s[key] for s in ours] == [s[key] for s in samples], key
        assert [s["resps"] for s in ours] == json.loads(json.dumps([_as_written(s["resps"]) for s in samples]))


def _as_written(value: Any) -> Any:
    """lm-eval writes what a model answered as text."""
    return [_as_written(v) for v in value] if isinstance(value, list | tuple) else str(value)


def test_other_seeds_choose_other_examples_as_in_stock(cell: Any, run: Any, stock: Any) -> None:
    expected = stock("letters", fewshot_random_seed=7)
    done = run(cell("letters", seeds=Seeds(fewshot=7)))
    hashes = [s["prompt_hash"] for s in samples_of(done, "letters")]
    assert hashes == [s["prompt_hash"] for s in expected["samples"]["letters"]]
    assert hashes != [s["prompt_hash"] for s in samples_of(run(cell("letters")), "letters")]


def test_all_four_seeds_take_effect_as_in_stock(cell: Any, run: Any, stock: Any) -> None:
    """The documents of `dice` hold a number of each generator, drawn while a prompt is made."""
    seeds = {"random": 3, "numpy": 4, "torch": 5, "fewshot": 6}
    stocks = stock(
        "dice", random_seed=3, numpy_random_seed=4, torch_random_seed=5, fewshot_random_seed=6, num_fewshot=1, limit=4
    )

    def prompts(**seeds: int) -> list[str]:
        done = run(cell("dice", seeds=Seeds(**seeds), num_fewshot=1, limit=4))
        return [s["arguments"]["gen_args_0"]["arg_0"] for s in samples_of(done, "dice")]

    ours = prompts(**seeds)
    assert ours == [s["arguments"][0][0] for s in stocks["samples"]["dice"]]
    for name in seeds:
        assert prompts(**{**seeds, name: 99}) != ours, name


# A chat is asked as stock asks it

INSTRUCTION = "Answer like a pirate."


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fixture_tokenizer(tmp_path_factory.mktemp("tokenizer") / "chatty")


@pytest.mark.parametrize("multiturn", [True, False])
def test_every_kind_of_request_of_a_chat_model_is_the_one_that_stock_sends(
    multiturn: bool, cell: Any, run: Any, stock: Any, chatty: Path, log: RequestsLog
) -> None:
    tokenizer = load_tokenizer(chat_model(chatty))
    names = ("letters", "phrases", "writing", "sampled", "story")
    settings = {"limit": 3, "num_fewshot": 2}
    log.new()
    stock(
        *names,
        tokenizer=chatty,
        apply_chat_template=True,
        fewshot_as_multiturn=multiturn,
        system_instruction=INSTRUCTION,
        **settings,
    )
    sent_by_stock = with_end(log.new(), tokenizer.eos_token)
    model = chat_model(chatty, system_instruction=INSTRUCTION)
    records = {
        name: run(
            cell(name, model=model, fewshot_as_multiturn=None if multiturn else False, **settings),
            Memory(facts(methods=[Method.ECHO])),
            tokenizer=tokenizer,
        ).record
        for name in names
    }
    sent = log.new()
    seeds = [body["seed"] for body in sent]
    assert set(seeds) == {1234, 1235, 1236}
    assert distinct([{**body, "seed": 1234} for body in sent]) == distinct(sent_by_stock)
    assert {body["prompt"].count(tokenizer.bos_token_id) for body in sent} == {1}
    for name, record in records.items():
        said = [w for w in record.warnings if "chat template" in w or "BOS" in w]
        assert len(said) == (2 if name == "story" else 0), said
        assert record.settings["fewshot_as_multiturn"] is multiturn
    first = records["writing"].settings["first_prompt"]
    assert first.startswith(f"{BOS}<|im_start|>system\n{INSTRUCTION}<|im_end|>\n")
    assert first.count("<|im_start|>assistant") == (3 if multiturn else 1)


def chat_model(folder: Path, **settings: Any) -> ModelPlan:
    model = Model(path=str(folder), chat=True, **settings)
    return ModelPlan(name="m", model=model, revision=None, fingerprint="f", server="m")


def test_an_instruction_that_a_template_drops_is_said(cell: Any, run: Any, tmp_path: Path) -> None:
    deaf = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
    folder = make_tokenizer(tmp_path / "deaf", chat_template=deaf)
    model = chat_model(folder, system_instruction=INSTRUCTION)
    warnings = run(cell("writing", model=model, limit=2), tokenizer=load_tokenizer(model)).record.warnings
    assert any("the system instruction is missing in 2 prompts" in w for w in warnings)


def test_a_template_that_writes_the_day_is_said_unless_a_day_is_given(cell: Any, run: Any, tmp_path: Path) -> None:
    dated = "{{ date_string or strftime_now('%d %b') }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    folder = make_tokenizer(tmp_path / "dated", chat_template=dated)
    today, held = chat_model(folder), chat_model(folder, chat_template_kwargs={"date_string": "26 Nov"})
    said = [
        [w for w in run(cell("writing", model=m, limit=1), tokenizer=load_tokenizer(m)).record.warnings if "day" in w]
        for m in (today, held)
    ]
    assert [len(warnings) for warnings in said] == [1, 0]
    assert "date_string" in said[0][0]


def test_a_reasoning_model_says_what_it_was_asked_with_and_what_it_left_open(cell: Any, run: Any, chatty: Path) -> None:
    model = chat_model(chatty, chat_template_kwargs={"enable_thinking": False}, think_end_token=" 2")
    tokenizer = load_tokenizer(model)
    channel = Memory(facts())
    done = run(cell("writing", model=model, limit=8), channel, tokenizer=tokenizer)
    settings = done.record.settings
    assert settings["first_prompt"].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert settings["chat_template_kwargs"] == {"enable_thinking": False}
    assert settings["think_end_token"] == " 2"
    (said,) = (w for w in done.record.warnings if "reasoning" in w)
    open_ended = re.fullmatch(r"(\d) answers have no ' 2' and are taken whole: .*", said)
    assert open_ended is not None
    stored = [json.loads(answer)["text"] for answer in channel.answers.values()]
    assert sum(" 2" not in text for text in stored) == int(open_ended[1]) < 8
    texts = [s["resps"][0][0] for s in samples_of(done, "writing") if s["filter"] == "strict"]
    assert sorted(texts) == sorted(text.split(" 2")[-1].lstrip() for text in stored)
    (said,) = (
        w for w in run(cell("letters", model=model, limit=2), tokenizer=tokenizer).record.warnings if "reasoning" in w
    )
    assert said.startswith("continuations are scored without the reasoning")


def test_what_is_sent_otherwise_than_the_task_says_is_counted_with_the_cure(cell: Any, run: Any) -> None:
    warm = run(cell("writing", limit=2, gen_kwargs={"temperature": 0.7})).record.warnings
    assert any(w.startswith("2 requests with `do_sample: false` beside a temperature") for w in warm)
    asked = {"temperature": 0.7, "do_sample": True}
    assert not any("do_sample" in w for w in run(cell("writing", limit=2, gen_kwargs=asked)).record.warnings)
    cold = run(cell("writing", limit=2, gen_kwargs={"do_sample": True})).record.warnings
    assert any(w.startswith("2 requests with `do_sample: true` and no temperature") for w in cold)


# What does not fit


@pytest.fixture(scope="module")
def mmlu_pro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mmlu_pro(tmp_path_factory.mktemp("tasks") / "mmlu_pro")


def test_long_examples_beside_2048_tokens_of_answer_are_refused_by_subject_or_cut_and_counted(
    cell: Any, run: Any, stock: Any, mmlu_pro: Path, folder: Path, log: RequestsLog
) -> None:
    """MMLU-Pro: 5 worked examples, 2,048 tokens to generate. Stock cuts them in silence."""

    def like(**settings: Any) -> Cell:
        return cell("mmlu_pro_like", folder=mmlu_pro, **settings)

    log.new()
    roomy = run(like(), Memory(facts(max_model_len=8192))).record
    longest = max(len(body["prompt"]) for body in log.new()) + 2048 + 1
    assert roomy.counts.truncated == 0
    assert 4096 < longest < 8192

    channel = Memory(facts(max_model_len=4096))
    with pytest.raises(TaskError) as caught:
        run(like(), channel)
    message = str(caught.value)
    assert message.startswith(
        "m/mmlu_pro_like: 4 of 6 samples do not fit into max_model_len 4096: "
        f"mmlu_pro_like_law 3 of 3 by up to {longest - 4096} tokens, mmlu_pro_like_math 1 of 3 by up to "
    )
    assert f"raise max_model_len to {longest} " in message
    assert all(cure in message for cure in ("num_fewshot", "gen_kwargs: max_gen_toks", "on_overflow: truncate"))
    assert (log.new(), channel.fresh) == ([], [])

    stock("mmlu_pro_like", tasks=mmlu_pro, tokenizer=folder, max_length=4096)
    sent_by_stock = with_end(log.new(), "<|endoftext|>")
    done = run(like(on_overflow=Overflow.TRUNCATE), channel)
    assert distinct(log.new()) == distinct(sent_by_stock)
    assert (done.record.counts.truncated, done.record.counts.requests) == (4, 6)
    assert "4 of 6 requests had their context cut from the left" in " ".join(caveats(done.record))

    for overflow in Overflow:  # no room for any prompt: stock asks with a negative length
        with pytest.raises(TaskError, match="6 of 6 samples leave no room for a context beside the answer in max_mod"):
            run(like(on_overflow=overflow), Memory(facts(max_model_len=2048)))
    assert log.new() == []


DATA = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.mark.skipif(not DATA.is_dir(), reason=f"needs real evaluation data in {DATA.parent.name}/{DATA.name}")
def test_ifeval_beside_its_1280_tokens_of_answer_is_refused_or_cut_and_counted(
    cell: Any, run: Any, stock: Any, folder: Path, log: RequestsLog, tmp_path: Path
) -> None:
    """The real prompts and generation settings; what is scored is of no interest here."""
    (rows,) = (DATA / "repos" / "google" / "IFEval").rglob("*.parquet")
    (tmp_path / "ifeval_like.yaml").write_text(
        f"task: ifeval_like\ndataset_path: parquet\ndataset_kwargs: {{data_files: {{train: {rows}}}}}\n"
        "output_type: generate_until\ntest_split: train\nnum_fewshot: 0\ndoc_to_text: prompt\ndoc_to_target: 0\n"
        "generation_kwargs: {until: [], do_sample: false, temperature: 0.0, max_gen_toks: 1280}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    channel = Memory(facts(max_model_len=1380))
    log.new()
    with pytest.raises(TaskError) as caught:
        run(cell("ifeval_like", folder=tmp_path, limit=100), channel)
    said = re.search(
        r"(\d+) of 100 samples do not fit .*: ifeval_like \1 of 100 by up to (\d+) tokens", str(caught.value)
    )
    assert said is not None
    assert (log.new(), channel.fresh) == ([], [])
    record = run(cell("ifeval_like", folder=tmp_path, limit=100, on_overflow=Overflow.TRUNCATE), channel).record
    sent = log.new()
    assert record.counts.truncated == int(said[1]) > 0
    assert max(len(body["prompt"]) for body in sent) == 1380 - 1 - 1280
    stock("ifeval_like", tasks=tmp_path, tokenizer=folder, max_length=1380, limit=100)
    assert distinct(sent) == distinct(with_end(log.new(), "<|endoftext|>"))
    fits = run(cell("ifeval_like", folder=tmp_path, limit=100), Memory(facts(max_model_len=1380 + int(said[2])))).record
    assert fits.counts.truncated == 0


# What a record and its files say


def test_a_record_says_what_was_asked_and_what_took_effect(cell: Any, run: Any, folder: Path) -> None:
    record = run(cell("writing", num_fewshot=2, limit=6)).record
    assert record.status is Status.DONE
    assert [(s.task, s.version, s.filter, s.num_fewshot, s.metric, s.samples, s.depth) for s in record.scores] == [
        ("writing", "2", "strict", 2, "exact_match", 6, 0),
        ("writing", "2", "first", 2, "exact_match", 6, 0),
    ]
    assert (record.counts.requests, record.counts.asked, record.counts.reused) == (6, 6, 0)
    assert record.counts.length_stopped + record.counts.empty > 0
    assert record.settings["num_fewshot"] == {"writing": 2}
    assert record.settings["samples"] == {"writing": 6}
    assert record.settings["methods"] == {"generate": 6}
    assert record.settings["path"] == str(folder)
    assert record.settings["seeds"] == {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
    assert record.settings["first_prompt"].count("Question: ") == 3
    assert record.settings["first_prompt"].endswith("Question: Which is number 8?\nAnswer:")
    assert record.versions["lm_eval"] == "0.4.13"
    assert record.versions["vllm"] == "0.32.0"
    assert msgspec.json.decode(msgspec.json.encode(record), type=Record) == record


def test_a_checkout_that_is_installed_nowhere_knows_its_version(
    cell: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def installed(name: str) -> str:
        if name == "lmsweep":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("sweep.evaluating.evaluation.version", installed)
    record = run(cell("writing", limit=1)).record
    assert record.versions["lmsweep"] == __version__
    assert record.versions["lm_eval"] == version("lm_eval")


def test_a_model_at_a_url_is_asked_by_its_name_there_and_recorded_as_far_as_it_is_known(
    cell: Any, run: Any, endpoint: Endpoint, folder: Path, log: RequestsLog
) -> None:
    theirs = Model(url=endpoint.url, tokenizer=str(folder), served_model_name="m", revision="v2")
    plan = ModelPlan(name="mine", model=theirs, revision=None, fingerprint="f2", server="mine")
    log.new()
    done = run(cell("writing", limit=2, model=plan))
    assert {body["model"] for body in log.new()} == {"m"}
    settings = done.record.settings
    assert (settings["url"], settings["served_model_name"], settings["revision"]) == (endpoint.url, "m", "v2")
    assert settings["tokenizer"] == str(folder)
    assert {name for name, value in settings.items() if value == "unknown"} == {
        *("dtype", "quantization", "adapter", "device", "tensor_parallel", "server", "generation_config")
    }
    assert "path" not in settings
    (warning,) = (w for w in done.record.warnings if endpoint.url in w)
    assert warning.startswith(f"what {endpoint.url} serves is not ours to know: a change of its weights, dtype")
    assert not any("commit" in w for w in done.record.warnings)
    results = results_of(done)
    assert results["config"]["model_args"] == (
        f"model=m,base_url={endpoint.url}/v1/completions,tokenizer={folder},revision=v2"
    )
    assert results["model_name"] == "mine"


def test_the_python_of_a_server_is_in_the_record(cell: Any, run: Any, folder: Path) -> None:
    old = Model(path=str(folder), server_python="/old/bin/python")
    plan = ModelPlan(name="m", model=old, revision=None, fingerprint="f3", server="m")
    assert run(cell("writing", limit=1, model=plan)).record.settings["server_python"] == "/old/bin/python"
    assert "server_python" not in run(cell("writing", limit=1)).record.settings


def test_a_group_comes_before_its_subtasks(cell: Any, run: Any) -> None:
    scores = run(cell("family", limit=4)).record.scores
    assert [(s.task, s.metric, s.depth, s.num_fewshot, s.samples) for s in scores] == [
        ("family", "acc", 0, None, None),
        ("letters", "acc", 1, 3, 4),
        ("phrases", "acc", 1, 0, 4),
        ("phrases", "acc_norm", 1, 0, 4),
    ]
    assert all(s.higher_is_better and s.stderr is not None for s in scores)


def test_the_files_are_lm_evals_own(cell: Any, run: Any) -> None:
    done = run(cell("family", limit=4))
    kinds = sorted(re.sub(r"_2\d{3}-.*", "", name) for name in done.files)
    assert kinds == ["results", "samples_letters", "samples_phrases"]
    table = make_table(results_of(done))
    assert re.search(r"^\|family +\|", table, flags=re.MULTILINE)
    assert results_of(done)["model_name"] == "m"
    for sample in samples_of(done, "letters"):
        assert {"doc_id", "doc", "target", "arguments", "resps", "doc_hash", "prompt_hash", "target_hash"} <= set(
            sample
        )


def test_every_number_of_a_record_is_in_the_table_that_lm_eval_makes_of_the_file(cell: Any, run: Any) -> None:
    done = run(cell("family", limit=4))
    shown, task = {}, ""
    for line in make_table(results_of(done)).splitlines()[2:]:
        name, _, filter_name, _, metric, _, value, _, stderr, _ = (part.strip() for part in f"{line} ".split("|")[1:])
        task = name.lstrip("- ") or task
        shown[task, filter_name, metric] = (float(value), float(stderr))
    assert shown == {
        (score.task, score.filter, score.metric): (round(score.value, 4), round(score.stderr, 4))
        for score in done.record.scores
    }


@pytest.mark.parametrize("task", ["family", "writing", "story"])
def test_lm_evals_wandb_logger_takes_the_files(
    task: str, cell: Any, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: dict[str, Any] = {}
    artifacts: list[str] = []
    nobody = SimpleNamespace(
        log=lambda values, step=None: logged.update(values),
        log_artifact=lambda artifact: artifacts.append(artifact.name),
        config=SimpleNamespace(update=lambda values, allow_val_change=False: logged.update(values)),
        summary={},
    )
    monkeypatch.setattr("wandb.run", nobody)
    done = run(cell(task, limit=4))
    logger = WandbLogger()
    logger.post_init(results_of(done))
    logger.log_eval_result()
    for score in done.record.scores:
        suffix = "" if score.filter == "none" else f",{score.filter}"
        assert logged[f"{score.task}/{score.metric}{suffix}"] == score.value
    table = logged["evaluation/eval_results"]
    assert {row[0] for row in table.data} == {s.task for s in done.record.scores if s.task != "family"}
    names = [score.task for score in done.record.scores if score.task != "family"]
    logger.log_eval_samples({name: [_in_memory(sample) for sample in samples_of(done, name)] for name in names})
    assert artifacts == ["results", *dict.fromkeys(names)]
    for name in dict.fromkeys(names):
        frame = logged[f"{name}_eval_results"]
        assert list(frame["id"]) == [sample["doc_id"] for sample in samples_of(done, name)]
        assert all(frame["data"])


def _in_memory(sample: dict[str, Any]) -> dict[str, Any]:
    """A line of a file in the form that lm-eval hands its loggers: arguments by position, numbers as numbers."""
    resps = [[_read(answer) for answer in answers] for answers in sample["resps"]]
    return sample | {
        "arguments": [tuple(arguments.values()) for arguments in sample["arguments"].values()],
        "resps": resps,
        "filtered_resps": [_read(answer) for answer in sample["filtered_resps"]],
    }


def _read(answer: Any) -> Any:
    return (float(answer[0]), answer[1] == "True") if isinstance(answer, list) else answer


def test_lm_evals_logger_for_the_hub_describes_a_folder_of_our_files(
    cell: Any, run: Any, chatty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a tokenizer with a BOS: the `[null, "None"]` that lm-eval writes for others is more than Arrow reads."""
    done = run(cell("family", limit=4), tokenizer=AutoTokenizer.from_pretrained(chatty))
    for name, content in done.files.items():
        path = tmp_path / "m" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    files = [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*.json*"))]
    cards: list[str] = []
    monkeypatch.setattr("huggingface_hub.hf_hub_url", lambda repo_id, filename, repo_type: str(tmp_path / filename))
    monkeypatch.setattr("huggingface_hub.DatasetCard.push_to_hub", lambda card, *_, **__: cards.append(str(card)))
    tracker = EvaluationTracker(output_path=str(tmp_path))
    tracker.api = SimpleNamespace(list_repo_files=lambda repo_id, repo_type: files)
    tracker.recreate_metadata_card()
    (card,) = cards
    configs = [line.split(": ")[1] for line in card.splitlines() if line.startswith("- config_name")]
    assert sorted(configs) == ["m__letters", "m__phrases"]  # what stock's own files give: it never lists results
    assert card.count("split: latest") == 2
    assert '"family"' in card
    (letters,) = tmp_path.rglob("samples_letters_*")
    loaded = load_dataset("json", data_files=str(letters), split="train")
    assert [row["doc_hash"] for row in loaded] == [sample["doc_hash"] for sample in samples_of(done, "letters")]


def test_repeats_with_seeds_of_their_own_are_said(cell: Any, run: Any, log: RequestsLog) -> None:
    log.new()
    done = run(cell("sampled", limit=2))
    assert sorted(body["seed"] for body in log.new()) == [1234, 1234, 1235, 1235, 1236, 1236]
    assert any("4 repeats of sampled requests have a seed of their own" in w for w in done.record.warnings)
    assert not any("repeats" in w for w in run(cell("writing", limit=2)).record.warnings)


def test_cut_contexts_are_in_the_record(cell: Any, run: Any) -> None:
    channel = Memory(facts(max_model_len=40))
    with pytest.raises(TaskError, match=r"m/letters: 2 of 2 samples do not fit into max_model_len 40: letters 2 of 2"):
        run(cell("letters", limit=2), channel)
    assert channel.fresh == []
    for _ in range(2):  # asked, then replayed
        record = run(cell("letters", limit=2, on_overflow=Overflow.TRUNCATE), channel).record
        assert record.counts.truncated == record.counts.requests == 8
    assert record.counts.asked == 0


def test_a_metric_that_is_no_number_is_said_and_left_out(cell: Any, run: Any) -> None:
    record = run(cell("undefined", limit=3)).record
    assert record.scores == ()
    assert "undefined: score (none) is nan and left out of the scores" in record.warnings
    assert msgspec.json.decode(msgspec.json.encode(record), type=Record) == record


def test_one_document_has_a_score_without_an_error_bar(cell: Any, run: Any) -> None:
    (score,) = run(cell("letters", limit=1)).record.scores
    assert score.samples == 1
    assert score.stderr is None


def test_the_wait_for_a_server_is_not_counted_as_time_of_the_cell(
    cell: Any, endpoint: Endpoint, tokenizer: PreTrainedTokenizerBase
) -> None:
    pool = Pool()

    class Late(Memory):
        waited = False

        def facts(self) -> Facts:
            if not self.waited:
                self.waited = True
                time.sleep(1)
                threading.Timer(1, pool.update, [[(endpoint, 8)]]).start()
            return super().facts()

    start = time.monotonic()
    record = evaluate(cell("story", limit=2), tokenizer=tokenizer, pool=pool, channel=Late(facts())).record
    assert time.monotonic() - start - record.wall_s > 1.9
    assert 0 < record.request_s < record.wall_s


def test_shots_that_a_task_pins_away_are_refused(cell: Any, run: Any) -> None:
    with pytest.raises(TaskError, match="m/pinned: num_fewshot 5 was asked for, but pinned ran with 0"):
        run(cell("pinned", num_fewshot=5, limit=2))
    assert run(cell("pinned", limit=2)).record.scores[0].num_fewshot == 0


# Documents are made once


def test_prompts_of_gpqa_are_the_same_each_time_and_never_hold_the_question(
    cell: Any, run: Any, tmp_path: Path
) -> None:
    gpqa = make_gpqa(tmp_path / "tasks")

    def asked(task: str) -> list[str]:
        done = run(cell(task, num_fewshot=5, folder=gpqa))
        return [s["arguments"]["gen_args_0"]["arg_0"] for s in samples_of(done, task)]

    first = asked("gpqa_like")
    check_task(Task(task="gpqa_like", include_path=str(gpqa)), Seeds(), Model(path="org/m"))
    run(cell("letters", limit=2))
    assert asked("gpqa_like_too") == first
    assert asked("gpqa_like") == first
    assert len(first) == 24
    for prompt in first:
        *examples, question = re.findall(r"Question: (.*)\n", prompt)
        assert len(set(examples)) == 5
        assert question not in examples


def test_random_states_are_as_before_after_documents_were_made() -> None:
    states = random.getstate(), np.random.get_state()[1].tolist()
    made = _seeded(lambda: (random.random(), np.random.random()), Seeds())
    assert made == _seeded(lambda: (random.random(), np.random.random()), Seeds())
    assert made != _seeded(lambda: (random.random(), np.random.random()), Seeds(random=1, numpy=1))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states


# Checks and previews


def test_a_task_whose_data_is_missing_is_said_with_the_cause(tasks: Path) -> None:
    check_task(Task(task="letters", include_path=str(tasks)), Seeds(), Model(path="org/m"))
    with pytest.raises(TaskError, match=r"load task lost: FileNotFoundError: .*nowhere\.jsonl"):
        check_task(Task(task="lost", include_path=str(tasks)), Seeds(), Model(path="org/m"))


def test_a_task_that_looks_at_the_model_gets_it(cell: Any, run: Any, tasks: Path, folder: Path) -> None:
    task = Task(task="made", include_path=str(tasks), metadata={"number": 3})
    check_task(task, Seeds(), Model(path="org/m"))
    done = run(cell("made", metadata={"number": 3}))
    assert done.record.settings["first_prompt"] == f"Question: {folder} {folder}\nAnswer:"
    assert done.record.settings["samples"] == {"made": 3}


def test_code_is_executed_only_where_the_config_confirms_it(cell: Any, run: Any) -> None:
    with pytest.raises(TaskError, match="marked as unsafe"):
        run(cell("code", limit=1))
    (score,) = run(cell("code", limit=1, unsafe_code=True)).record.scores
    assert score.value == 1
    assert "HF_ALLOW_CODE_EVAL" not in os.environ


def test_a_tokenizer_that_cannot_be_loaded_is_said_with_the_model(model: ModelPlan, tmp_path: Path) -> None:
    lost = replace(model, model=replace(model.model, path=str(tmp_path / "nowhere")))
    with pytest.raises(TaskError, match=r"load the tokenizer of model m from .*nowhere"):
        load_tokenizer(lost)


def test_a_chat_model_without_a_template_is_refused(model: ModelPlan, tmp_path: Path) -> None:
    bare = str(make_tokenizer(tmp_path / "bare", chat_template=None))
    plain = replace(model, model=replace(model.model, path=bare))
    load_tokenizer(plain)
    with pytest.raises(
        TaskError, match=r"model m has `chat: true`, but the tokenizer in .*bare brings no chat template"
    ):
        load_tokenizer(replace(plain, model=replace(plain.model, chat=True)))
    load_tokenizer(replace(plain, model=replace(plain.model, chat=True, tokenizer=model.model.path)))


def test_a_preview_is_the_first_request(cell: Any, tokenizer: PreTrainedTokenizerBase, model: ModelPlan) -> None:
    seen = preview(cell("family"), tokenizer)
    assert (seen.kind, seen.continuation, seen.requests) == ("loglikelihood", " A", 4)
    assert seen.prompt.endswith("Question: Which is number 8?\nAnswer:")
    assert seen.prompt_tokens == len(tokenizer(seen.prompt).input_ids)
    chat = replace(model, model=replace(model.model, chat=True, system_instruction="Be brief."))
    seen = preview(cell("writing", model=chat, num_fewshot=2), tokenizer)
    assert seen.arguments == {
        "max_tokens": 8,
        "temperature": 0,
        "stop": ["\n", "<|endoftext|>"],
        "seed": 1234,
    }
    assert seen.prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert seen.prompt.count("<|im_start|>assistant") == 3
    single = preview(cell("writing", model=chat, num_fewshot=2, fewshot_as_multiturn=False), tokenizer)
    assert single.prompt.count("<|im_start|>assistant") == 1
    assert preview(cell("story"), tokenizer).kind == "loglikelihood_rolling"


@pytest.mark.parametrize("task", ["letters", "family"])
def test_multiple_choice_is_estimated_as_it_is_scored(task: str, cell: Any, run: Any) -> None:
    channel = Memory(facts())
    scores = run(cell(task), channel).record.scores
    (acc,) = [score.value for score in scores if score.metric == "acc" and score.depth == 0]
    assert channel.live["acc_of_finished"] == pytest.approx(acc)
    assert channel.live["finished_documents"] == sum(score.samples or 0 for score in scores if score.metric == "acc")


@pytest.mark.parametrize("task", ["counted", "sampled"])
def test_generation_is_estimated_by_each_filter_as_it_is_scored(task: str, cell: Any, run: Any) -> None:
    channel = Memory(facts())
    scores = run(cell(task), channel).record.scores
    assert task == "sampled" or any(0 < score.value < 1 for score in scores), "or nothing would be shown here"
    assert {f"{score.metric}__{score.filter}_of_finished": score.value for score in scores} | {
        "finished_documents": 16
    } == pytest.approx(channel.live)
    again = Memory(facts(), answers=dict(channel.answers))
    run(cell(task), again)
    assert again.live.keys() == channel.live.keys(), "of stored answers, too"


@pytest.mark.parametrize(
    ("task", "why"),
    [
        ("story", "loglikelihood_rolling"),
        ("timed", "its scoring is its own"),
        ("slow_filter", "multi_choice_regex"),
        ("measured", "its metrics are not just the mean of exact_match"),
        ("targeted", "code of its own"),
    ],
)
def test_what_is_scored_slowly_or_by_code_of_its_own_is_not_estimated(
    task: str, why: str, cell: Any, run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    channel = Memory(facts())
    with caplog.at_level(logging.DEBUG, logger="sweep"):
        run(cell(task, limit=4), channel)
    assert channel.live == {}
    (said,) = [record.message for record in caplog.records if "no live estimate" in record.message]
    assert said.startswith(f"no live estimate of {task}: ")
    assert why in said
