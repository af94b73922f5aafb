"""Doubles that several test files share: a tokenizer, the stand-in server, and a store that lives in memory."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from sys import executable
from typing import Any

from sweep import demo
from sweep.evaluating.preflight import Facts
from sweep.evaluating.scoring import Method
from sweep.planning.config import Model, Scoring
from sweep.planning.plan import ServerPlan
from sweep.results.store import Response
from sweep.serving.server import Endpoint, Server

KEY = "a-key-for-tests-0123456789"
STAND_IN = [executable, str(Path(__file__).with_name("stand_in_server.py"))]


def make_tokenizer(folder: Path, **settings: Any) -> Path:
    """A folder with a small Qwen2 tokenizer; `settings` change its tokenizer_config.json, None removes one."""
    folder.mkdir(parents=True)
    demo._save_tokenizer(demo._train_tokenizer(demo._general_text(), 600), folder, end=demo.END_OF_TEXT)
    path = folder / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


@contextmanager
def stand_in(
    log: Path,
    *,
    path: str = "org/m",
    api_key: str = KEY,
    max_model_len: int = 2048,
    scoring: Scoring = Scoring.ECHO,
    **options: Any,
) -> Iterator[Endpoint]:
    """A running stand-in that serves `m`, with the tokenizer at `path` if that is a folder with one.

    `options` are those of tests/stand_in_server.py.
    """
    model = Model(
        path=path,
        max_model_len=max_model_len,
        scoring=scoring,
        env={f"STAND_IN_{name.upper()}": str(value) for name, value in options.items()},
        startup_timeout_s=60.0,
    )
    plan = ServerPlan(name="m", model=model, revision=None, adapters={"m": None}, gpus=0.0, replicas=1)
    server = Server(plan, name="m-0", api_key=api_key, gpu_ids=(), log_path=log, executable=STAND_IN)
    try:
        yield server.start()
    finally:
        server.stop()


@dataclass
class RequestsLog:
    """What reached a stand-in that was started with `requests_log`."""

    path: Path
    _read: int = 0

    def new(self) -> list[dict[str, Any]]:
        """The bodies since the last look; one of several prompts counts as one for each."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        bodies = [json.loads(line)["body"] for line in lines[self._read :]]
        self._read = len(lines)
        return [each for body in bodies for each in by_prompt(body)]


def by_prompt(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A body for each of its prompts; stock's list of one stays as it is."""
    several = isinstance(body["prompt"], list) and isinstance(body["prompt"][0], list) and len(body["prompt"]) > 1
    yield from ({**body, "prompt": prompt} for prompt in (body["prompt"] if several else [body["prompt"]]))


def distinct(bodies: Sequence[Mapping[str, Any]]) -> set[str]:
    """The distinct bodies; stock wraps its one prompt into a batch of one."""
    return {
        json.dumps({**b, "prompt": b["prompt"][0] if isinstance(b["prompt"][0], list) else b["prompt"]}, sort_keys=True)
        for b in bodies
    }


def with_end(bodies: Sequence[dict[str, Any]], end: str) -> list[dict[str, Any]]:
    """Stock's bodies with the end-of-text stop string, which it leaves out with several requests in flight."""
    return [{**b, "stop": [*b["stop"], *({end} - set(b["stop"]))]} if "stop" in b else b for b in bodies]


def facts(*, max_model_len: int = 2048, methods: Sequence[Method] = (Method.ECHO, Method.NEXT_TOKEN)) -> Facts:
    return Facts(max_model_len=max_model_len, engine_version="0.32.0", methods=tuple(methods))


@dataclass
class Memory:
    """lm.Channel over a dictionary. Without `known_facts` nobody may ask for them."""

    known_facts: Facts | None = None
    answers: dict[bytes, bytes] = field(default_factory=dict)
    fresh: list[Response] = field(default_factory=list)
    announced: list[int] = field(default_factory=list)
    others: dict[bytes, bytes] = field(default_factory=dict)
    """What another cell is answered while this one asks."""

    def facts(self) -> Facts:
        assert self.known_facts is not None, "nothing about the server is needed here"
        return self.known_facts

    def known(self, keys: Sequence[bytes]) -> Mapping[bytes, bytes]:
        assert len(set(keys)) == len(keys)
        return {key: self.answers[key] for key in keys if key in self.answers}

    def owed(self, requests: int) -> None:
        self.announced.append(requests)

    def answered(self, response: Response) -> None:
        assert response.key not in self.answers
        self.answers[response.key] = response.answer
        self.fresh.append(response)

    def earlier(self) -> Mapping[bytes, bytes]:
        return {key: self.others[key] for key in self.answers if key in self.others}

    def progress(self, *, done: int, total: int, reused: int, live: Callable[[], Mapping[str, float]] = dict) -> None:
        self.live = live()
        assert done <= total
        assert reused <= done


def make_tasks(folder: Path) -> Path:
    """A folder with one small lm-eval task of each request kind, a group of two, and tasks that misbehave.

    A question's right answer is the number in it, modulo 4.
    """
    folder.mkdir(parents=True)

    def write(name: str, settings: Mapping[str, Any]) -> None:
        # JSON is YAML, but for lm-eval's tag.
        text = "\n".join(
            f"{key}: {value if isinstance(value, str) and value.startswith('!') else json.dumps(value)}"
            for key, value in settings.items()
        )
        (folder / f"{name}.yaml").write_text(text + "\n")

    questions = [
        {"question": f"Which is number {n}?", "choices": [f"the {w}" for w in ("one", "other one", "town", "river")]}
        | {"answer": n % 4, "text": f"In the town number {n} there is a river. " * 12}
        for n in range(24)
    ]
    for split, some in (("train", questions[:8]), ("test", questions[8:])):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, some)))
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {s: str(folder / f"{s}.jsonl") for s in ("train", "test")}},
        "training_split": "train",
        "fewshot_split": "train",
        "test_split": "test",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "answer",
    }
    letters = data | {
        "output_type": "multiple_choice",
        "doc_to_choice": ["A", "B", "C", "D"],
        "metric_list": [{"metric": "acc"}],
        "metadata": {"version": 1.5},
    }
    phrases = letters | {"doc_to_choice": "choices", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    writing = data | {
        "output_type": "generate_until",
        "num_fewshot": 1,
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "filter_list": [
            {"name": "strict", "filter": [{"function": "take_first"}]},
            {"name": "first", "filter": [{"function": "regex", "regex_pattern": "(\\d+)"}, {"function": "take_first"}]},
        ],
        "metric_list": [{"metric": "exact_match"}],
        "metadata": {"version": 2},
    }
    write("letters", {"task": "letters", **letters, "num_fewshot": 3})
    write("phrases", {"task": "phrases", **phrases})
    write("pinned", {"task": "pinned", **letters, "num_fewshot": 0})
    write("writing", {"task": "writing", **writing})
    sampled = {"until": ["\n"], "max_gen_toks": 4, "do_sample": True, "temperature": 0.8}
    write("sampled", {"task": "sampled", **writing, "generation_kwargs": sampled, "repeats": 3})
    digit = [{"function": "regex", "regex_pattern": "(\\d)"}, {"function": "take_first"}]
    counted = {"doc_to_target": "1", "filter_list": [*writing["filter_list"], {"name": "digit", "filter": digit}]}
    write("counted", {"task": "counted", **writing, **counted})
    letter = [{"function": "multi_choice_regex"}, {"function": "take_first"}]
    write("slow_filter", {"task": "slow_filter", **writing, "filter_list": [{"name": "letter", "filter": letter}]})
    middle = [{"metric": "exact_match", "aggregation": "median"}]
    write("measured", {"task": "measured", **writing, "metric_list": middle})
    write("targeted", {"task": "targeted", **writing, "doc_to_target": "!function utils.target"})
    story = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"}
    write("story", {"task": "story", **data, **story, "metric_list": [{"metric": "bits_per_byte"}]})
    family = {"group": "family", "task": ["letters", "phrases"], "metadata": {"version": 3}}
    write("family", family | {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]})
    nowhere = {"data_files": {"test": str(folder / "nowhere.jsonl")}}
    write("lost", {"task": "lost", **data, "dataset_kwargs": nowhere, "output_type": "generate_until"})

    (folder / "utils.py").write_text(MISBEHAVING)
    scored = writing | {"filter_list": None, "metric_list": [{"metric": "score", "aggregation": "mean"}]}
    for name in ("timed", "exits", "forks", "undefined"):
        write(name, {"task": name, **scored, "process_results": f"!function utils.{name}"})
    write("code", {"task": "code", **scored, "process_results": "!function utils.code", "unsafe_code": True})
    dice = {"doc_to_text": "!function utils.dice", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}}
    write("dice", {"task": "dice", **writing, **dice})
    made = {"custom_dataset": "!function utils.made", "training_split": None, "fewshot_split": None}
    write("made", {"task": "made", **{k: v for k, v in letters.items() if k not in ("dataset_path",)}, **made})
    return folder


MISBEHAVING = '''
import multiprocessing
import os
import random
import signal
import sys
import time

import datasets


def timed(doc, results):
    """1 where a time limit by SIGALRM works, as in minerva_math: everywhere else than in the main thread it is 0."""

    def ring(*_):
        raise TimeoutError

    try:
        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        try:
            time.sleep(10)
        except TimeoutError:
            return {"score": 1}
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    except Exception:
        return {"score": 0}


def exits(doc, results):
    sys.exit("a task that wants to leave")


def forks(doc, results):
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,)).start()
    time.sleep(600)


def undefined(doc, results):
    return {"score": float("nan")}


def code(doc, results):
    return {"score": int(os.environ.get("HF_ALLOW_CODE_EVAL", "0"))}


def target(doc):
    return doc["choices"][doc["answer"]]


def dice(doc):
    import numpy
    import torch

    rolled = random.random(), numpy.random.random(), torch.rand(1).item()
    return f"{rolled} Question: {doc['question']}\\nAnswer:"


def made(pretrained, tokenizer, number=4, **_):
    docs = [{"question": f"{pretrained} {tokenizer}", "answer": n % 4} for n in range(number)]
    return {"test": datasets.Dataset.from_list(docs)}
'''


def make_mmlu_pro(folder: Path) -> Path:
    """A folder with a group of two subjects in MMLU-Pro's shape, under lm-eval's own settings and prompts: law, whose
    examples are long, and math with one long question. Some 40 tokens of prompt for each 10 words."""
    import lm_eval.tasks

    folder.mkdir(parents=True)
    own = Path(lm_eval.tasks.__file__).parent / "mmlu_pro" / "_default_template_yaml"
    words = {"law": 240, "math": 60}
    for subject, length in words.items():
        thoughts = "A: Let's think step by step. " + "the river and the town " * (length // 5) + "The answer is (A)."
        rows = [
            {"question": f"What is {subject} {n}?", "options": ["one", "two"], "cot_content": thoughts, "answer": "A"}
            for n in range(8)
        ]
        rows[7]["question"] += " It is by the sea and not by the river." * (80 if subject == "math" else 1)
        for split, some in (("validation", rows[:5]), ("test", rows[5:])):
            (folder / f"{subject}_{split}.jsonl").write_text("\n".join(map(json.dumps, some)))
        files = {split: str(folder / f"{subject}_{split}.jsonl") for split in ("validation", "test")}
        (folder / f"{subject}.yaml").write_text(
            f"include: {own}\ntask: mmlu_pro_like_{subject}\ndataset_path: json\n"
            f"dataset_kwargs: {json.dumps({'data_files': files})}\n"
        )
    (folder / "group.yaml").write_text(
        "group: mmlu_pro_like\ntask: [mmlu_pro_like_law, mmlu_pro_like_math]\n"
        "aggregate_metric_list: [{metric: exact_match, filter_list: custom-extract}]\n"
    )
    return folder


def make_gpqa(folder: Path) -> Path:
    """A folder with two tasks over a data set in GPQA's shape, under lm-eval's own settings and processing of it."""
    import lm_eval.tasks

    folder.mkdir(parents=True)
    rows = [
        {"Question": f"What is the {n}th?", "Correct Answer": f"right {n} [title] x"}
        | {f"Incorrect Answer {i}": f"wrong  {n}-{i}" for i in (1, 2, 3)}
        for n in range(24)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = Path(lm_eval.tasks.__file__).parent / "gpqa" / "n_shot" / "_gpqa_n_shot_yaml"
    for name in ("gpqa_like", "gpqa_like_too"):
        (folder / f"{name}.yaml").write_text(
            f"include: {own}\ntask: {name}\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{train: {folder / 'train.jsonl'}}}}}\n"
        )
    return folder
