"""`python -m bench.memory`: what an evaluator's process takes with 60,000 requests queued and none sent.

A process of its own gives them to our LM as lm-eval would, with a pool that has no endpoint, and looks at itself when
all of them wait: multiple choice of mmlu's size and texts (15,000 five-shot prompts with four choices), and as many
generations of 600 tokens that have nothing in common. The figure is the largest resident memory of the whole
process; what it has beyond the imported libraries stands beside it.
"""

import argparse
import itertools
import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bench import data
from bench.rows import Row
from bench.sides import Alone

REQUESTS = 60_000
GENERATION_TOKENS = 600
GIB = 2**30
KINDS = {
    "choices": f"{REQUESTS:,} requests of 5-shot mmlu",
    "generations": f"{REQUESTS:,} generations of {GENERATION_TOKENS} tokens",
}


def measure(kind: str) -> Row:
    environment = {**os.environ, **data.real_data_environment(), "PYTHONPATH": str(data.ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", "--hold", kind], env=environment, stdout=subprocess.PIPE, check=True
    )
    found = json.loads(done.stdout)
    if found["waiting"] < (REQUESTS if kind == "generations" else REQUESTS // 4):
        raise SystemExit(f"only {found['waiting']} prompts waited")
    taken = found["peak"] - found["libraries"]
    medians = {
        "process_gib": found["peak"] / GIB,
        "beyond_libraries_gib": taken / GIB,
        "prompts": found["waiting"],
    }
    return Row(
        row=f"{KINDS[kind]} queued, memory of the process against 1 GiB",
        ratio=GIB / found["peak"],
        bar=1.0,
        medians=medians,
    )


def _hold(kind: str) -> dict[str, int]:
    """Peak memory in bytes when all requests wait and before the first was made; how many prompts waited."""
    from lm_eval.api.instance import Instance
    from transformers import AutoTokenizer

    from sweep.evaluating.client import Cancelled, Client, Pool
    from sweep.evaluating.lm import SweepLM
    from sweep.evaluating.preflight import Facts
    from sweep.evaluating.scoring import Method
    from sweep.planning.config import Overflow

    found: dict[str, int] = {}

    def all_wait() -> None:
        found["peak"], found["waiting"] = _peak(), pool.queued
        pool.cancel("seen")

    pool = Pool(on_want=all_wait)
    lm = SweepLM(
        cell="memory",
        fingerprint="",
        tokenizer=AutoTokenizer.from_pretrained(data.trained_tokenizer(data.SMALL_VOCABULARY)),
        overflow=Overflow.ERROR,
        client=Client(model="m", pool=pool),
        channel=Alone(
            Facts(
                max_model_len=data.MAX_MODEL_LEN,
                engine_version="",
                methods=(Method.NEXT_TOKEN, Method.FORCED, Method.ECHO),
            )
        ),
    )
    found["libraries"] = _peak()
    ask: Callable[[list[Instance]], object]
    arguments: Iterator[tuple[Any, ...]]
    if kind == "choices":
        ask, request_type, arguments = lm.loglikelihood, "loglikelihood", _choices()
    else:
        ask, request_type, arguments = lm.generate_until, "generate_until", _generations(lm.tokenizer)
    requests = [
        Instance(request_type=request_type, doc={}, arguments=some, idx=0)
        for some in itertools.islice(arguments, REQUESTS)
    ]
    try:
        ask(requests)
    except Cancelled:
        return found
    raise AssertionError("nothing waited")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _rows(split: str) -> list[dict[str, Any]]:
    from pyarrow import parquet

    paths = sorted((data.DATA / "repos" / "cais" / "mmlu").rglob(f"{split}-*.parquet"))
    return [{**row, "subject": path.parent.name} for path in paths for row in parquet.read_table(path).to_pylist()]


def _choices() -> Iterator[tuple[str, str]]:
    """As lm-eval makes them: the four choices of a question share one context."""
    examples: dict[str, str] = {}
    for row in _rows("dev"):
        answer = f"{_asked(row)} {'ABCD'[row['answer']]}\n\n"
        examples[row["subject"]] = examples.get(row["subject"], "") + answer
    for number, row in enumerate(itertools.cycle(_rows("test"))):
        head = f"The following are multiple choice questions (with answers).\n\n{examples[row['subject']]}"
        context = f"{head}{number}. {_asked(row)}"  # some questions are there twice, and one answer would do for both
        yield from ((context, f" {letter}") for letter in "ABCD")


def _asked(row: dict[str, Any]) -> str:
    choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", row["choices"], strict=True))
    return f"{row['question'].strip()}\n{choices}Answer:"


def _generations(tokenizer: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Prompts that have nothing in common, of words that are a token or two each."""
    rng = random.Random(0)
    words = [tokenizer.decode([token]) for token in range(300, data.SMALL_VOCABULARY)]
    words = [word for word in words if word.startswith(" ") and word.strip().isalpha()]
    while True:
        yield "".join(rng.choices(words, k=GENERATION_TOKENS)), {"until": ["\n\n"], "max_gen_toks": 256}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("--hold", choices=KINDS, help=argparse.SUPPRESS)  # what the process of its own does
    given = parser.parse_args(arguments)
    if given.hold:
        print(json.dumps(_hold(given.hold)))
        return 0
    rows = [measure(kind) for kind in KINDS]
    for row in rows:
        print(row.line(), flush=True)
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
