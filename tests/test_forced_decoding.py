"""What the logits processor makes a batch write, step by step; in real vLLM test_fidelity.py tries it."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow  # vLLM's import

WORDS = 12
VERDICTS = [0, 1, 2, 3, 4]
"""Not known, none, one, two, three."""


@pytest.fixture(scope="module")
def module() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's and its libraries' own
        from sweep.serving import forced_decoding
    return forced_decoding


def arguments(*, sums: list[int] | None = None) -> Any:
    extra = {"forced": [7, 8, 9, 10, 11], "lengths": [3, 2], "sums": sums or [30, 40], "verdicts": VERDICTS}
    return SimpleNamespace(extra_args=extra)


def added(*rows: tuple[int, Any, list[int], list[int]]) -> Any:
    return SimpleNamespace(added=list(rows), removed=[], moved=[])


def favouring(*tokens: int | tuple[int, int]) -> torch.Tensor:
    """Logits of a batch in which these are the likeliest; a pair of tokens ties."""
    logits = torch.zeros(len(tokens), WORDS)
    for row, best in enumerate(tokens):
        for token in best if isinstance(best, tuple) else (best,):
            logits[row, token] = 5.0
    return logits


def sampled(processor: Any, logits: torch.Tensor) -> list[int]:
    found: list[int] = processor.apply(logits).argmax(-1).tolist()
    return found


def test_each_prompt_writes_its_continuation_and_how_many_first_tokens_were_greedy(module: Any) -> None:
    processor = module.ForcedDecoding(None, torch.device("cpu"), False)
    one, two = [], []  # type: ignore[var-annotated]
    processor.update_state(added((0, arguments(), [10, 20], one), (2, arguments(), [40], two)))
    # Row 1 is somebody else's.
    for best, expected in (
        ((7, 5, 3), [7, 5, 10]),
        (((8, 3), 5, 11), [8, 5, 11]),  # a tie is greedy
        ((3, 5, 3), [9, 5, VERDICTS[1]]),
        ((3, 5, 3), [VERDICTS[3], 5, VERDICTS[1]]),
    ):
        found = sampled(processor, favouring(*best))
        assert found == expected
        one.append(found[0])
        two.append(found[2])
        processor.update_state(None)


@pytest.mark.parametrize(("parts", "verdict"), [([3, 7], 4), ([7, 3], 1)])
def test_what_is_sampled_while_a_context_is_read_in_parts_counts_for_nothing(
    module: Any, parts: list[int], verdict: int
) -> None:
    processor = module.ForcedDecoding(None, torch.device("cpu"), False)
    written: list[int] = []
    processor.update_state(added((0, arguments(), [30], written)))
    for best in parts:
        assert sampled(processor, favouring(best)) == [7]  # thrown away but for the last
    for token in (7, 8, 9):
        written.append(token)
        found = sampled(processor, favouring(token + 1))
    assert found == [verdict]


def test_a_prompt_that_comes_back_goes_on_and_does_not_claim_to_know(module: Any) -> None:
    processor = module.ForcedDecoding(None, torch.device("cpu"), False)
    written = [7]
    processor.update_state(added((0, arguments(), [30], written)))
    for token in (8, 9, VERDICTS[0]):
        assert sampled(processor, favouring(token)) == [token]
        written.append(token)


def test_what_was_not_asked_for_is_left_alone(module: Any) -> None:
    processor = module.ForcedDecoding(None, torch.device("cpu"), False)
    processor.update_state(
        added((0, SimpleNamespace(extra_args=None), [30], []), (1, arguments(sums=[1, 2]), [30], []))
    )
    logits = favouring(4, 5)
    assert torch.equal(processor.apply(logits.clone()), logits)
    assert not processor.is_argmax_invariant()
