"""`python -m bench.tokenize`: encoding the requests of real mmlu, stock lm-eval's way and ours.

Stock is `TemplateLM.loglikelihood` of `local-completions` with tokenized requests, up to where it would send them. Both
sides get the same (context, continuation) texts, which lm-eval has built before, and a tokenizer object of their own
from the same files. The token ids of both are compared, every one.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import data
from bench.rows import ROUNDS, Row, alternately

BAR = 4.0
"""What the project promises."""


def measure(name: str, tokenizer: Path, requests: Sequence[Any], *, what: str, rounds: int) -> Row:
    """Both sides on `requests` with the tokenizer in this folder. Raises where a token id differs."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from transformers import AutoTokenizer

    from sweep.evaluating.encoding import Encoder

    class Stock(LocalCompletionsAPI):  # type: ignore[misc]
        """lm-eval's client, which keeps what it would send."""

        def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            self.encoded = requests
            return [(0.0, False)] * len(requests)

    stock = Stock(
        base_url="http://127.0.0.1:9/v1/completions",
        model=name,
        tokenizer=str(tokenizer),
        tokenizer_backend="huggingface",
        tokenized_requests=True,
    )
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    pairs = [request.args for request in requests]
    sides = {
        "stock": lambda: stock.loglikelihood(list(requests), disable_tqdm=True),
        "ours": lambda: Encoder(loaded).pairs(pairs),
    }
    seconds = alternately(sides, rounds=rounds)
    expected = [(tuple(context), tuple(continuation)) for _, context, continuation in stock.encoded]
    if Encoder(loaded).pairs(pairs) != expected:
        raise SystemExit(f"{name}: our token ids are not those of lm-eval")
    contexts = {context for context, _ in expected}
    print(
        f"{name} ({len(loaded):,} entries, cut: {Encoder(loaded).cuts}): {len(pairs):,} requests on {len(contexts):,} "
        f"distinct contexts of {sum(map(len, contexts)) / len(contexts):,.0f} tokens; all token ids equal lm-eval's",
        flush=True,
    )
    return Row(
        row=f"encode the requests of {what}, {name}",
        ratio=seconds["stock"] / seconds["ours"],
        bar=BAR,
        medians={
            "stock_s": seconds["stock"],
            "ours_s": seconds["ours"],
            "stock_s_per_1000": 1000 * seconds["stock"] / len(pairs),
            "ours_s_per_1000": 1000 * seconds["ours"] / len(pairs),
        },
    )


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tokenize", description=__doc__)
    parser.add_argument("--limit", type=int, default=20, help="questions of each subject; 0 for all 14,042 (20)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"runs of each side, by turns ({ROUNDS})")
    parser.add_argument("--tokenizer", type=Path, action="append", help="folder of a tokenizer, instead of our two")
    given = parser.parse_args(arguments)
    data.use_real_data()
    tokenizers = {folder.name: folder for folder in given.tokenizer or ()} or {
        "demo-base": data.demo_models() / "demo-base",
        "qwen2-like": data.trained_tokenizer(data.LARGE_VOCABULARY),
    }
    requests = data.requests("mmlu", limit=given.limit or None, num_fewshot=5)
    what = f"mmlu (57 subjects, {f'limit {given.limit}' if given.limit else 'all'}, 5-shot)"
    rows = [measure(name, folder, requests, what=what, rounds=given.rounds) for name, folder in tokenizers.items()]
    for row in rows:
        print(row.line(), flush=True)
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
