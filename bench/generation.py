"""`python -m bench.generation`: generations through our server and client, and by vLLM's own offline `LLM.generate`.

Both get the prompts of real gsm8k as token ids and the same sampling parameters, each an engine of its own while the
other's is ended, with nothing in its cache. Greedy texts vary with the batches that they are computed in, so it is also
told how many differ between two undisturbed runs of ours, and between ours and the offline ones.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence

from bench import data, sides
from bench.rows import ROUNDS, Row
from bench.served import by_turns, live
from bench.sides import Job, Ran, Side, Work

BAR = 0.9

NEW_TOKENS = 128


def measure(size: str, *, limit: int, rounds: int) -> Row:
    model = data.model(size)
    work = Work(task="gsm8k", limit=limit, gen_kwargs={"max_gen_toks": NEW_TOKENS})
    offline_job = Job(side=Side.OFFLINE, work=work, model=str(model))
    texts: list[dict[str, str]] = []
    starts: list[float] = []

    def ours() -> Ran:
        with live(model) as server:
            ran = server.run(Side.OURS, work)
            starts.append(server.start_s)
            texts.append(_texts(ran))
            if len(texts) == 1:
                texts.append(_texts(server.run(Side.OURS, work)))  # undisturbed, on the very same server
            return ran

    ran = by_turns({"offline": lambda: sides.run(offline_job), "ours": ours}, rounds=rounds)
    offline = statistics.median(one.request_s for one in ran["offline"])
    through_server = statistics.median(one.request_s for one in ran["ours"])
    flips, apart = _differing(*texts[:2]), _differing(texts[0], _texts(ran["offline"][0]))
    what = f"gsm8k ({limit} prompts, {NEW_TOKENS} new tokens, greedy), {size} parameters, against LLM.generate"
    print(
        f"{what}: {flips:.1%} of our texts differ between two undisturbed runs, {apart:.1%} from the offline ones",
        flush=True,
    )
    return Row(
        row=what,
        ratio=offline / through_server,
        bar=BAR,
        medians={
            "offline_generate_s": offline,
            "ours_request_s": through_server,
            "offline_command_s": statistics.median(one.command_s for one in ran["offline"]),
            "ours_command_s": statistics.median(one.command_s for one in ran["ours"]),
            "ours_server_start_s": statistics.median(starts),
            "flip_rate": flips,
            "apart_from_offline": apart,
        },
    )


def _texts(ran: Ran) -> dict[str, str]:
    """By the number of the document."""
    return {key.partition("-")[0]: text for key, text in ran.answers.items()}


def _differing(some: dict[str, str], others: dict[str, str]) -> float:
    """Share of texts that are not equal. Ends the program where there are other documents."""
    if some.keys() != others.keys() or not some:
        raise SystemExit(f"two sides have other documents: {len(some)} and {len(others)}")
    return sum(text != others[number] for number, text in some.items()) / len(some)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.generation", description=__doc__)
    parser.add_argument("--limit", type=int, default=200, help="prompts (200)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"runs of each side, by turns ({ROUNDS})")
    parser.add_argument("--size", choices=data.SHAPES, default="0.9m", help="model (0.9m)")
    given = parser.parse_args(arguments)
    row = measure(given.size, limit=given.limit, rounds=given.rounds)
    print(row.line(), flush=True)
    return 0 if row.holds else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
