"""`python -m bench.scoring`: multiple choice, our way and lm-eval's, on the same server or engine.

Both sides run lm-eval on the same task. What is compared is the request phase (first byte sent to last received,
nothing in the prefix cache at its start); the time of the whole command stands beside it. `local-completions` gets the
num_concurrent and batch_size that it is fastest with. Log-likelihoods of both sides are compared, every one.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bench import data, sides
from bench.rows import ROUNDS, Row
from bench.served import PARTS, best_settings, by_turns, live, most_different
from bench.sides import Job, Ran, Side, Size, Work

TOLERANCE = 0.02
"""Of a log-likelihood against stock's, as in the tests."""

SUBJECT = Work(task="mmlu_professional_accounting", num_fewshot=5)
"""800 tokens a prompt with the tokenizer here, of which the five examples are the most: mmlu's mean is 720."""

CHOICES = Work(task=data.CHOICES, num_fewshot=0)
MMLU = Work(task="mmlu", num_fewshot=5)
HELLASWAG = Work(task="hellaswag", num_fewshot=0)


def against_client(
    size: str, work: Work, what: str, *, bar: float, rounds: int, rival_rounds: int, part: int, echo: bool = False
) -> list[Row]:
    """Ours against local-completions, and with `echo` against our own client scoring by echo alone."""
    with live(data.model(size)) as server:
        settings, amount = best_settings(server, work, part=part)
        rate = server.prefill_tokens_per_s()
        turns: dict[str, Callable[[], Ran]] = {
            "stock": lambda: server.run(Side.STOCK, work, settings=(settings,)),
            "ours": lambda: server.run(Side.OURS, work),
        }
        if echo:
            turns["echo"] = lambda: server.run(Side.OURS, work, echo=True)
        ran = by_turns(turns, rounds=rounds, fewer={"stock": rival_rounds})
    floor = {
        "unique_tokens": float(amount.unique_tokens),
        "prefill_tokens_per_s": rate,
        "floor_s": amount.unique_tokens / rate,
    }
    used = f"local-completions (num_concurrent {settings.num_concurrent}, batch_size {settings.batch_size})"
    rivals = {"stock": used} | ({"echo": "plain echo through our client"} if echo else {})
    return [
        _row(f"{what}, {size} parameters, against {name}", ran, rival, bar=bar, amount=amount, more=floor)
        for rival, name in rivals.items()
    ]


def against_engine(size: str, work: Work, what: str, *, bar: float, rounds: int, **_: Any) -> list[Row]:
    """Ours against `lm_eval --model vllm`, each with an engine of its own and the other's ended."""
    model = data.model(size)
    starts: list[float] = []

    def ours() -> Ran:
        with live(model) as server:
            starts.append(server.start_s)
            return server.run(Side.OURS, work)

    turns = {"stock": lambda: sides.run(Job(side=Side.IN_PROCESS, work=work, model=str(model))), "ours": ours}
    ran = by_turns(turns, rounds=rounds)
    return [
        _row(
            f"{what}, {size} parameters, against lm_eval --model vllm in process",
            ran,
            "stock",
            bar=bar,
            more={"ours_server_start_s": statistics.median(starts)},
        )
    ]


def _row(
    what: str,
    ran: Mapping[str, Sequence[Ran]],
    rival: str,
    *,
    bar: float,
    amount: Size | None = None,
    more: Mapping[str, float],
) -> Row:
    """Raises SystemExit where the two sides' log-likelihoods are not the same."""
    request_s = {name: statistics.median(one.request_s for one in some) for name, some in ran.items()}
    command_s = {name: statistics.median(one.command_s for one in some) for name, some in ran.items()}
    ours, theirs = ran["ours"][-1], ran[rival][-1]
    print(_agreement(what, ours, theirs, amount), flush=True)
    return Row(
        row=what,
        ratio=request_s[rival] / request_s["ours"],
        bar=bar,
        medians={
            f"{rival}_request_s": request_s[rival],
            "ours_request_s": request_s["ours"],
            f"{rival}_command_s": command_s[rival],
            "ours_command_s": command_s["ours"],
            f"{rival}_runs": len(ran[rival]),
            "ours_runs": len(ran["ours"]),
            **more,
        },
    )


def _agreement(what: str, ours: Ran, theirs: Ran, amount: Size | None) -> str:
    """What was asked and how far both agree, in words."""
    difference = most_different(ours, theirs)
    if difference > TOLERANCE:
        raise SystemExit(f"{what}: log-likelihoods differ by up to {difference:.4f}: fast, but not the same numbers")
    choices = [pair for key in ours.answers for pair in zip(ours.answers[key], theirs.answers[key], strict=True)]
    greedy = sum(mine[1] == other[1] for mine, other in choices)
    accuracy = {name: value for name, value in ours.scores.items() if name.partition("/")[2] == "acc,none"}
    task = min(accuracy, key=len)
    asked = (
        ""
        if amount is None
        else (
            f"{amount.requests:,} requests on {amount.contexts:,} contexts of {amount.context_tokens:,.0f} tokens, "
            f"continuations of {amount.continuation_tokens:.1f}; "
        )
    )
    return (
        f"{what}: {asked}scored by {ours.methods}; {len(choices):,} log-likelihoods differ by up to {difference:.6f}, "
        f"{greedy:,} agree about being greedy; {task} {ours.scores[task]:.4f} and {theirs.scores[task]:.4f}"
    )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A row, or two, before it is measured."""

    rows: Callable[..., list[Row]]
    size: str
    work: Work
    what: str
    """What is asked, with `{}` for the number of questions."""
    questions: int
    """Of each subject, where a task has several."""
    bar: float


FOUR_CHOICES = "{} questions of four one-token choices, 5-shot"
LONG_CHOICES = f"{{}} questions of four {data.CHOICE_TOKENS}-token choices, {data.CONTEXT_TOKENS} tokens of context"

COMPARISONS = {
    "mc-27m": Comparison(rows=against_client, size="27m", work=SUBJECT, what=FOUR_CHOICES, questions=24, bar=15.0),
    "mc-27m-engine": Comparison(
        rows=against_engine, size="27m", work=SUBJECT, what=FOUR_CHOICES, questions=24, bar=12.0
    ),
    "mc-0.9m": Comparison(rows=against_client, size="0.9m", work=SUBJECT, what=FOUR_CHOICES, questions=100, bar=40.0),
    "choices-0.9m": Comparison(
        rows=against_client, size="0.9m", work=CHOICES, what=LONG_CHOICES, questions=100, bar=2.5
    ),
    "choices-27m": Comparison(rows=against_client, size="27m", work=CHOICES, what=LONG_CHOICES, questions=12, bar=2.5),
    "mmlu": Comparison(
        rows=against_client, size="0.9m", work=MMLU, what="mmlu (57 subjects, limit {}, 5-shot)", questions=20, bar=15.0
    ),
    "hellaswag": Comparison(
        rows=partial(against_client, echo=True),
        size="0.9m",
        work=HELLASWAG,
        what="hellaswag (limit {}, 0-shot)",
        questions=100,
        bar=1.0,
    ),
}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scoring", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=COMPARISONS, default=list(COMPARISONS), metavar="ROW", help=", ".join(COMPARISONS)
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"runs of each side, by turns ({ROUNDS})")
    parser.add_argument("--rival-rounds", type=int, help="runs of local-completions if fewer (mmlu: 1, else all)")
    parser.add_argument("--questions", type=int, help="instead of each row's own number; of mmlu for each subject")
    parser.add_argument("--part", type=int, default=PARTS, help=f"local-completions is tuned on 1/PART ({PARTS})")
    given = parser.parse_args(arguments)
    measured: list[Row] = []
    for name in given.only:
        one = COMPARISONS[name]
        questions = given.questions or one.questions
        print(f"{name}:", flush=True)
        rows = one.rows(
            one.size,
            replace(one.work, limit=questions, include_path=_tasks(one.work)),
            one.what.format(questions),
            bar=one.bar,
            rounds=given.rounds,
            rival_rounds=given.rival_rounds or (1 if one.work is MMLU else given.rounds),
            part=given.part,
        )
        for row in rows:
            print(row.line(), flush=True)
        measured += rows
    return 0 if all(row.holds for row in measured) else 1


def _tasks(work: Work) -> str | None:
    """The folder of a task that is made here."""
    return str(data.choices_task()) if work.task == data.CHOICES else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
