r"""Run tasks through lmsweep and through stock lm-eval against one live server; both outcomes as JSON on stdout.

    python tests/stock_comparison.py --url http://127.0.0.1:20000 --model demo --tokenizer FOLDER \
        --max-model-len 4096 gsm8k:40 hellaswag:100

A task may carry `:limit` and `@shots`. The key comes from OPENAI_API_KEY, as stock lm-eval wants it. It is a process of
its own because data-set libraries read HF_HOME once, when they are imported.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sweep.evaluating.client import Pool
from sweep.evaluating.evaluation import evaluate, load_tokenizer, probe_token_ids
from sweep.evaluating.preflight import Expected, Facts, inspect
from sweep.planning.config import Device, Model, Seeds, Task
from sweep.planning.plan import Cell, ModelPlan
from sweep.results.store import Response
from sweep.serving.server import Endpoint


class Fresh:
    """A channel to nowhere: nothing is stored before, what is answered is counted."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self.responses: list[Response] = []

    def facts(self) -> Facts:
        return self._facts

    def known(self, keys: Sequence[bytes]) -> Mapping[bytes, bytes]:
        return {}

    def owed(self, requests: int) -> None: ...

    def answered(self, response: Response) -> None:
        self.responses.append(response)

    def earlier(self) -> Mapping[bytes, bytes]:
        return {}

    def progress(self, *, done: int, total: int, reused: int, live: Any = dict) -> None: ...


def ours(endpoint: Endpoint, facts: Facts, plan: ModelPlan, task: Task, concurrency: int) -> dict[str, Any]:
    cell = Cell(model=plan, task_name=task.task, task=task, seeds=Seeds(), fingerprint="")
    pool = Pool()
    pool.update([(endpoint, concurrency)])
    tokenizer = load_tokenizer(plan)
    start = time.monotonic()
    done = evaluate(cell, tokenizer=tokenizer, pool=pool, channel=Fresh(facts))
    samples = {
        name.split("_2")[0].removeprefix("samples_"): [json.loads(line) for line in content.splitlines()]
        for name, content in done.files.items()
        if name.startswith("samples_")
    }
    (results,) = (json.loads(content) for name, content in done.files.items() if name.startswith("results_"))
    return {
        "results": results["results"],
        "samples": {name: [shortened(s) for s in rows] for name, rows in samples.items()},
        "wall_s": time.monotonic() - start,
        "methods": done.record.settings["methods"],
    }


def stock(endpoint: Endpoint, facts: Facts, plan: ModelPlan, task: Task, concurrency: int) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate

    start = time.monotonic()
    found = simple_evaluate(
        model="local-completions",
        model_args={
            "base_url": f"{endpoint.url}/v1/completions",
            "model": plan.name,
            "tokenizer": plan.model.path,
            "tokenizer_backend": "huggingface",
            "tokenized_requests": True,
            "max_length": facts.max_model_len,
            "num_concurrent": concurrency,
        },
        tasks=[task.task],
        num_fewshot=task.num_fewshot,
        limit=task.limit,
    )
    assert found is not None
    samples = {name: [shortened(s) for s in rows] for name, rows in found["samples"].items()}
    return {"results": found["results"], "samples": samples, "wall_s": time.monotonic() - start}


def shortened(sample: Mapping[str, Any]) -> dict[str, Any]:
    """What is compared: which document, which prompt, what came back, what it scored."""
    keep = ("doc_id", "doc_hash", "prompt_hash", "target_hash", "resps", "filter", *sample["metrics"])
    return {key: sample[key] for key in keep}


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--url", required=True)
    arguments.add_argument("--model", required=True)
    arguments.add_argument("--tokenizer", required=True)
    arguments.add_argument("--max-model-len", type=int, required=True)
    arguments.add_argument("--concurrency", type=int, default=16)
    arguments.add_argument("--scoring", nargs="*", default=[], help="methods that the server was started for")
    arguments.add_argument("tasks", nargs="+")
    given = arguments.parse_args()
    tokenizer = str(Path(given.tokenizer).absolute())
    # A folder here that is named like a data set would be taken for it.
    os.chdir(tempfile.mkdtemp())
    endpoint = Endpoint(
        server=given.model,
        url=given.url,
        api_key=os.environ["OPENAI_API_KEY"],
        max_model_len=given.max_model_len,
        engine_version="not asked",
        scoring=tuple(given.scoring),
    )
    plan = ModelPlan(
        name=given.model,
        model=Model(path=tokenizer, device=Device.CPU),
        revision=None,
        fingerprint="",
        server=given.model,
    )
    token_ids = probe_token_ids(load_tokenizer(plan))
    wanted = Expected(served_name=given.model, max_model_len=given.max_model_len, token_ids=token_ids)
    seen = inspect(endpoint, {given.model: wanted})
    if (facts := seen.facts) is None:
        sys.exit(seen.refusal)
    both: dict[str, Any] = {}
    for text in given.tasks:
        name, _, shots = text.partition("@")
        name, _, limit = name.partition(":")
        task = Task(task=name, limit=int(limit) if limit else None, num_fewshot=int(shots) if shots else None)
        both[name] = {
            "ours": ours(endpoint, facts, plan, task, given.concurrency),
            "stock": stock(endpoint, facts, plan, task, given.concurrency),
        }
    json.dump(both, sys.stdout, default=str)


if __name__ == "__main__":
    main()
