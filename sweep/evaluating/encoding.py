r"""Texts and (context, continuation) pairs -> lm-eval's token ids, with as little encoding as that takes.

lm-eval encodes the context and the context + continuation whole, for every choice of a question anew. Here a text is
cut where that changes no token and each distinct piece is encoded once: examples that many prompts share, and of a
context + continuation only the end.

Where a cut changes nothing. A fast tokenizer takes added tokens (`<|im_start|>`) out of a text, normalizes what is
left, splits that into words by regular expressions, and encodes each word by itself. So X + Y gets the tokens of X and
then those of Y if no added token and no word lies across the cut and X and Y do not change each other's words. That is
so, whatever X and Y, at the two kinds of places in `_CUT`, provided that

- no added token has such a place inside it or takes in the blanks at its sides;
- nothing is normalized except to NFC, which joins neither a letter of `_LETTER` nor a blank to what stands before it;
- the expressions are made of `_ALTERNATIVES` and end in `\s+`. None of them matches a letter or digit together with the
  blank after it, nor a newline together with the letter after it; none looks back; and none matches anything else in
  X because X ends there: of a single newline `\s+(?!\S)` takes nothing before a letter and `\s+` takes the same one.

Everything else is encoded whole, as lm-eval does, though each distinct text once: SentencePiece's way (the text is one
word), expressions that nobody has looked at, tokenizers in Python, classes of a checkpoint's own.
"""

import json
import logging
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

logger = logging.getLogger(__name__)

Tokens = tuple[int, ...]

ENCODED_AT_ONCE = 250
"""Texts that the tokenizer gets in one call: enough for all its threads, without holding a whole group's encodings."""

WORTH_CUTTING = 400
"""Characters: shorter texts hold no examples that others share, and a piece costs about 10 µs whatever its length."""

CUT_WITHIN = 200
"""Characters from an empty line to a cut that belongs to it: most are near, and a search does not cross the text."""

_LETTER = "0-9A-Za-zÀ-ÖØ-öø-ÿА-я\u0621-\u063a\u0641-\u064aぁ-ゖァ-ヺ一-龥가-힣"
"""Letters and digits that every version of Unicode calls so, none of which NFC joins to what stands before it."""
_CUT = rf"(?:(?<=[{_LETTER}])(?=[ \n])|(?<=[!-~。！？：{_LETTER}]\n)(?=[{_LETTER}]))"
"""Between a letter or digit and a blank or newline; between a single newline and a letter or digit."""
_FIRST_CUT = re.compile(_CUT)
_LAST_CUT = re.compile(f".*{_CUT}", re.DOTALL)
_CUT_IN_A_TOKEN = re.compile(rf"[{_LETTER}][ \n]|\n[{_LETTER}]")

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_NO_LETTER = r"[^\r\n\p{L}\p{N}]?"
_ALTERNATIVES = (
    *(_CONTRACTIONS, r"'s|'t|'re|'ve|'m|'ll|'d"),
    *(r" ?\p{L}+", rf"{_NO_LETTER}\p{{L}}+", rf"{_NO_LETTER}[\p{{L}}\p{{M}}]+"),
    *(f"{_NO_LETTER}{_UPPER}*{_LOWER}+", f"{_NO_LETTER}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"),
    *(f"{_NO_LETTER}{_UPPER}+{_LOWER}*", f"{_NO_LETTER}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"),
    *(r" ?\p{N}+", r"\p{N}", r"\p{N}{1,3}"),
    *(r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"),
    *(r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)"),
)
"""Of the expressions of GPT-2, Llama 3, Qwen 2 to 3.5, GPT-4o, and the many who took theirs over."""
_known = "|".join(map(re.escape, _ALTERNATIVES))
_KNOWN_EXPRESSION = re.compile(rf"(?:(?:{_known})\|)+\\s\+")

_SAMPLE = (
    "The following are questions (with answers) that try a tokenizer's own ways.\n\nWhat is 12 + 30?\nA. 42\nB. it's\n"
    "Answer: A\n\nWhat  is\tthis:   é, 中文 or 😀?\nThis one. And \n that.\n\n\nAnswer: B.\n\nWhich of\nthem?\nAnswer:"
)


class Encoder:
    """The token ids of one tokenizer, none added by itself: a chat template brings its BOS along."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._token: dict[int, int] = {}
        self.cuts = cuts_change_nothing(tokenizer)
        """Whether long texts are encoded in pieces."""
        if self.cuts:
            pieces = re.split(_CUT, _SAMPLE)
            ids = self._encoded([_SAMPLE, *pieces])
            self.cuts = ids[_SAMPLE] == _joined(ids, pieces)
            if not self.cuts:
                logger.warning("the tokenizer encodes pieces otherwise than the whole: texts are encoded whole, slower")

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by: the tokenizer's BOS, else its EOS."""
        bos = self.tokenizer.bos_token_id
        return int(bos if bos is not None else self.tokenizer.eos_token_id)

    def texts(self, texts: Sequence[str]) -> list[Tokens]:
        """The token ids of each text; equal texts share one tuple."""
        distinct = dict.fromkeys(texts)
        found = dict(zip(distinct, self.each(distinct), strict=True))
        return [found[text] for text in texts]

    def each(self, texts: Iterable[str]) -> Iterator[Tokens]:
        """The token ids of one text after the other, of which no more than ENCODED_AT_ONCE are held."""
        rest = iter(texts)
        while some := list(islice(rest, ENCODED_AT_ONCE)):
            cut = [_pieces(text) if self.cuts and len(text) >= WORTH_CUTTING else [text] for text in some]
            ids = self._encoded(chain.from_iterable(cut))
            yield from (_joined(ids, pieces) for pieces in cut)

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[Tokens, Tokens]]:
        """Context and continuation ids of each pair, split as lm-eval's TemplateLM does; equal contexts share a tuple.

        Spaces at the end of a context go to the continuation. A continuation is what the whole has after as many tokens
        as the context alone has, and the prompt is the context alone followed by that: where a token reaches across
        the boundary this is not the whole, in the reference neither. A context of blanks gets no tokens.
        """
        moved = []
        for context, continuation in pairs:
            stripped = context.rstrip()
            moved.append((stripped, context[len(stripped) :] + continuation))
        contexts = dict.fromkeys(context for context, _ in moved)
        # The whole and the context alone begin with the same tokens, up to the last cut in the context.
        tails = {context: context[_last_cut(context) :] if self.cuts else context for context in contexts}
        both = [*contexts, *tails.values()]
        ids = dict(zip(both, self.texts(both), strict=True))
        encoded: list[tuple[Tokens, Tokens]] = []
        for start in range(0, len(moved), ENCODED_AT_ONCE):
            some = moved[start : start + ENCODED_AT_ONCE]
            # Where nothing is cut, all ends would be the contexts' tokens as often as there are choices.
            ends = self._encoded(tails[context] + rest for context, rest in some)
            for (context, rest), (original, _) in zip(some, pairs[start : start + ENCODED_AT_ONCE], strict=True):
                end = ends[tails[context] + rest]
                if original:
                    pair = (ids[context], end[len(ids[tails[context]]) :])
                elif end and end[0] == self.prefix_token_id:
                    pair = (end[:1], end[1:])
                else:
                    pair = ((self.prefix_token_id,), end)
                encoded.append(pair)
        return encoded

    def _encoded(self, texts: Iterable[str]) -> dict[str, Tokens]:
        """The token ids of each distinct text, encoded whole."""
        found: dict[str, Tokens] = {"": ()}
        distinct = [text for text in dict.fromkeys(texts) if text]
        if distinct:
            encoded = self.tokenizer(distinct, add_special_tokens=False, return_attention_mask=False).input_ids
            # One object for each token of the vocabulary, not one for each of the prompts: 8 bytes instead of 36.
            found.update(zip(distinct, (tuple(map(self._token.setdefault, ids, ids)) for ids in encoded), strict=True))
        return found


def _joined(ids: Mapping[str, Tokens], pieces: Sequence[str]) -> Tokens:
    return ids[pieces[0]] if len(pieces) == 1 else tuple(chain.from_iterable(map(ids.__getitem__, pieces)))


def _last_cut(text: str) -> int:
    """Where the last piece of `text` begins; 0 if it has no place for a cut."""
    found = _LAST_CUT.match(text)
    return found.end() if found else 0


def _pieces(text: str) -> list[str]:
    """`text` in pieces that begin and end at cuts, one for each example, and small ones between them.

    An example ends with the last cut before an empty line; if that is not at the line itself, it also begins only with
    the first cut after it, so that the same example is the same piece after another one.
    """
    cuts = [0]
    gap = text.find("\n\n")
    while gap >= 0:
        last = _LAST_CUT.match(text, max(cuts[-1], gap - CUT_WITHIN), gap + 1)
        if last and last.end() > cuts[-1]:
            cuts.append(last.end())
        if cuts[-1] != gap and (first := _FIRST_CUT.search(text, gap + 2, gap + CUT_WITHIN)):
            cuts.append(first.end())
        gap = text.find("\n\n", max(gap + 2, cuts[-1]))
    return [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def cuts_change_nothing(tokenizer: Any) -> bool:
    """Whether this tokenizer is of the kind of which the module says why it encodes pieces as it does the whole."""
    if not getattr(tokenizer, "is_fast", False) or not type(tokenizer).__module__.startswith("transformers."):
        return False
    backend = tokenizer.backend_tokenizer
    return (
        not getattr(backend.model, "dropout", None)
        and all(stage == {"type": "NFC"} for stage in _stages(backend.normalizer, "normalizers"))
        and _splits_at_cuts(_stages(backend.pre_tokenizer, "pretokenizers"))
        and not any(map(_may_lie_across, backend.get_added_tokens_decoder().values()))
    )


def _stages(component: Any, parts: str) -> list[dict[str, Any]]:
    """What a normalizer or pre-tokenizer does, one after the other, as tokenizer.json writes it."""
    if component is None:
        return []
    said = json.loads(component.__getstate__())
    stages: list[dict[str, Any]] = said[parts] if said["type"] == "Sequence" else [said]
    return stages


def _splits_at_cuts(stages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether each stage of a pre-tokenizer allows a cut, and one of them makes it the border of a word."""
    border = False
    for stage in stages:
        match stage:
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": expression}:
                border |= bool(expression)  # GPT-2's
            case {"type": "Split", "pattern": {"Regex": expression}, "behavior": behavior, "invert": invert}:
                # Either way the matches are the words.
                if (behavior, invert) not in {("Isolated", False), ("Removed", True)}:
                    return False
                if not _KNOWN_EXPRESSION.fullmatch(expression):
                    return False
                border = True
            case {"type": "Digits"}:
                pass
            case _:
                return False
    return border


def _may_lie_across(token: Any) -> bool:
    """Whether an added token could take in both sides of a cut."""
    ways = (token.content, unicodedata.normalize("NFC", token.content))
    return token.lstrip or token.rstrip or token.single_word or any(map(_CUT_IN_A_TOKEN.search, ways))
