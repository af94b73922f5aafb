"""A logits processor that makes vLLM write given continuations, so that it says how likely they were.

Given to our own servers by `--logits-processors sweep.serving.forced_decoding:ForcedDecoding`, and imported inside
vLLM's engine and nowhere else. Log-probabilities are taken before processors, so they stay the model's own.

A request brings the continuations of all its prompts as `vllm_xargs`: `forced`, a flat list of token ids, `lengths`,
and in `sums` for each the sum of the token ids of the prompt that it follows. vLLM gives every prompt of a request the
same arguments and nothing but its tokens tells them apart, so a request holds no two prompts of one sum.

Whether a token was the likeliest is seen here and nowhere else: vLLM's ranks count ties against a token, and one
request with `logprob_token_ids` in a batch takes the best token out of every row's answer (v1/sample/sampler.py). So
behind its continuation each prompt gets a verdict, a token that says how many of the first ones were greedy.

Knows vLLM's V1 model runner only; the V2 one has another interface and refuses to start with this.
"""

from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates


@dataclass(kw_only=True, slots=True)
class _Row:
    """One prompt in the batch."""

    tokens: list[int]
    verdicts: list[int]
    """Tokens that say: not known; none of the first tokens was greedy, one, two, ..."""
    written: list[int]
    """vLLM's own list, which grows with each step."""
    likeliest: list[bool] = field(default_factory=list)
    """Of each step whether its token was the likeliest; ties count. Shorter than `written` where a prompt lost its
    place in the batch and came back."""

    @property
    def next(self) -> int:
        step = len(self.written)
        if step < len(self.tokens):
            return self.tokens[step]
        known = len(self.likeliest) == len(self.tokens)
        return self.verdicts[1 + len(list(takewhile(bool, self.likeliest))) if known else 0]

    def saw(self, likeliest: bool) -> None:
        """The last look at a step counts: a context that is read in parts is looked at after each of them, and what
        is sampled there is thrown away."""
        step = len(self.written)
        if step < len(self.tokens) and step <= len(self.likeliest):
            self.likeliest[step:] = [likeliest]


class ForcedDecoding(LogitsProcessor):  # type: ignore[misc]
    """Forces the rows of requests that bring `forced`; leaves all others alone."""

    def __init__(self, *_: Any) -> None:  # vLLM's configuration, the device, whether memory is pinned
        self._rows: dict[int, _Row] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(self._rows, batch_update, _row)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """`logits` is [batch, vocabulary], changed in place."""
        if not self._rows:
            return logits
        rows = list(self._rows.values())
        index = torch.tensor(list(self._rows), device=logits.device)
        forced = torch.tensor([row.next for row in rows], device=logits.device)
        theirs = logits[index]
        likeliest = theirs.gather(1, forced.unsqueeze(1)).squeeze(1) >= theirs.amax(1)
        for row, yes in zip(rows, likeliest.tolist(), strict=True):
            row.saw(yes)
        logits[index] = float("-inf")
        logits[index, forced] = 0.0
        return logits


def _row(params: Any, prompt: list[int] | None, written: list[int]) -> _Row | None:
    arguments = params.extra_args or {}
    if "forced" not in arguments:
        return None
    ours = sum(prompt or ())
    if ours not in arguments["sums"]:
        return None  # an exception would end the engine; that nothing was forced is seen in the answer
    which = arguments["sums"].index(ours)
    start = sum(arguments["lengths"][:which])
    return _Row(
        tokens=arguments["forced"][start : start + arguments["lengths"][which]],
        verdicts=arguments["verdicts"],
        written=written,
    )
