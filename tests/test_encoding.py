"""Token ids against those of stock lm-eval, for tokenizers of every make, those that are cut and those that are not."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lm_eval.models.openai_completions import LocalCompletionsAPI
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sweep import demo
from sweep.evaluating import encoding
from sweep.evaluating.encoding import Encoder

END = "<|endoftext|>"

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_3_5 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PIECES = [
    *("the", " the", "th", "e", "ing", "A", "B", " I", "it's", "'re", "'S", "x", "\u01c4", "\u017f", "\u212a"),
    *("1", "42", " 7", "1234567", "²", "½", "٣"),
    *(" ", "  ", "   ", "\t", "\n", "\n\n", "\n\n\n", " \n", "\n ", "\r\n", "\r", "\x0b", "\x85", "\u2028"),
    *("\u00a0", "\u3000", "\u200b", "\u180e", "\x1c", "\x00"),
    *(".", ":", ". ", "(A)", " (", "?\n", "...\n\n", "/", "\n/", "//\n", "_", "=", "。", "。\n", "！\n\n"),
    *("é", "e\u0301", "\u0301", "\u0327", "ñ", "\u212b", "Å", "ß", "für", "\ufb01"),
    *("中", "中文", "答案：A", "日本語", "か\u3099"),
    *("한", "\u1112\u1161\u11ab", "\u11a8", "привет", "и\u0306", "سلام", "ا\u0653", "هل", "क्षि", "😀", "👩\u200d🚀"),
    *(END, "<|im_start|>", "<|im_end|>", "<mask>", "<two words>", "foo"),
    *("Answer:", "\nAnswer:", "Answer: B\n\n", "\nA. ", "Question: what is it?\n"),
]


def texts(source: random.Random, number: int, longest: int) -> list[str]:
    """Heaps of what could go wrong next to each other, few of them blank."""
    found: list[str] = []
    while len(found) < number:
        text = "".join(source.choices(PIECES, k=source.randint(1, longest)))
        if text.strip():
            found.append(text)
    return found


def saved(tokenizer: Tokenizer, folder: Path) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)
    return folder


def trained(
    model: Any, trainer: Any, *, normalizer: Any = None, pre_tokenizer: Any = None, added: Sequence[Any] = ()
) -> Tokenizer:
    """A tokenizer of a few hundred entries that has seen words, blanks, lines and the scripts above."""
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    lessons = [*demo._general_text(), *(" ".join(PIECES) for _ in range(20)), *texts(random.Random(1), 300, 12)]
    tokenizer.train_from_iterator(lessons, trainer)
    tokenizer.add_special_tokens([END, "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(list(added))
    return tokenizer


def byte_level(*stages: Any, added: Sequence[Any] = (), normalizer: Any = None, **settings: Any) -> Tokenizer:
    """Byte-level BPE with these stages, the last of which maps bytes."""
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    words = pre_tokenizers.Sequence(list(stages)) if len(stages) > 1 else stages[0]
    return trained(models.BPE(**settings), trainer, normalizer=normalizer, pre_tokenizer=words, added=added)


def split(expression: str, *, behavior: str = "isolated", invert: bool = False) -> list[Any]:
    return [
        pre_tokenizers.Split(Regex(expression), behavior=behavior, invert=invert),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


def gpt_2(**settings: Any) -> Any:
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **settings})


def bpe_trainer() -> Any:
    """Whole texts are words to it, so that merges reach over blanks and lines as they may."""
    return trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>"], max_token_length=8, show_progress=False)


def unigram_trainer() -> Any:
    return trainers.UnigramTrainer(
        vocab_size=600, special_tokens=["<unk>"], unk_token="<unk>", max_piece_length=8, show_progress=False
    )


CUT: dict[str, Callable[[], Tokenizer]] = {
    "gpt-2": lambda: byte_level(gpt_2()),
    "qwen2": lambda: byte_level(*split(demo.QWEN2_SPLIT), normalizer=normalizers.NFC()),
    "qwen3.5": lambda: byte_level(*split(QWEN_3_5), normalizer=normalizers.NFC()),
    "llama-3": lambda: byte_level(*split(LLAMA_3), ignore_merges=True),
    "gpt-4o": lambda: byte_level(*split(GPT_4O)),
    "gpt-4o, other words removed": lambda: byte_level(*split(GPT_4O, behavior="removed", invert=True)),
    "starcoder": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), gpt_2()),
    "gpt-neox": lambda: byte_level(
        gpt_2(),
        normalizer=normalizers.NFC(),
        added=[AddedToken(text, normalized=True) for text in ("  ", "   ", "\n\n", " \n", "foo", "é")],
    ),
}
"""Tokenizers that encode pieces as they do the whole."""

WHOLE: dict[str, Callable[[], Tokenizer]] = {
    "llama-2": lambda: trained(
        models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"),
        bpe_trainer(),
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    ),
    "llama-2, split at blanks": lambda: trained(
        models.BPE(unk_token="<unk>"),
        bpe_trainer(),
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=True),
    ),
    "unigram": lambda: trained(
        models.Unigram(),
        unigram_trainer(),
        normalizer=normalizers.NFKC(),
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="always", split=False),
    ),
    "wordpiece": lambda: trained(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer(vocab_size=900, special_tokens=["<unk>"], show_progress=False),
        normalizer=normalizers.BertNormalizer(lowercase=True),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
    ),
    "a blank before each word": lambda: byte_level(gpt_2(add_prefix_space=True)),
    "no words": lambda: byte_level(gpt_2(use_regex=False)),
    "words with the line before them": lambda: byte_level(*split(r"\s?\p{L}+|\s?\p{N}+|[^\s\p{L}\p{N}]+|\s+")),
    "joined to the word before": lambda: byte_level(*split(LLAMA_3, behavior="merged_with_previous")),
    "nfkc": lambda: byte_level(gpt_2(), normalizer=normalizers.NFKC()),
    "a token that takes blanks": lambda: byte_level(gpt_2(), added=[AddedToken("<mask>", lstrip=True, rstrip=True)]),
    "a token with a blank inside": lambda: byte_level(gpt_2(), added=["<two words>"]),
    "a token over two lines": lambda: byte_level(gpt_2(), added=[":\nA"]),
    "a token that is a word": lambda: byte_level(gpt_2(), added=[AddedToken("foo", single_word=True)]),
}
"""Tokenizers that do not, or of which nobody has shown it."""


@pytest.fixture(scope="module", params=[*CUT, *WHOLE])
def make(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A make of tokenizer and the folder of one."""
    return request.param, saved((CUT | WHOLE)[request.param](), tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def everything_is_cut(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(encoding, "WORTH_CUTTING", 0)
    monkeypatch.setattr(encoding, "ENCODED_AT_ONCE", 64)
    return


def stock(folder: Path) -> LocalCompletionsAPI:
    return LocalCompletionsAPI(
        base_url="http://127.0.0.1:9/v1/completions",
        model="m",
        tokenizer=str(folder),
        tokenizer_backend="huggingface",
        tokenized_requests=True,
    )


def test_only_what_is_known_to_allow_it_is_cut(make: tuple[str, Path]) -> None:
    name, folder = make
    assert Encoder(AutoTokenizer.from_pretrained(folder)).cuts == (name in CUT)


def test_texts_have_the_ids_that_stock_gives_them(make: tuple[str, Path], everything_is_cut: None) -> None:
    _, folder = make
    reference, encoder = stock(folder), Encoder(AutoTokenizer.from_pretrained(folder))
    some = [*texts(random.Random(2), 600, 40), "", " ", "\n\n", "A\n\n", "\n\nA", "A\n\nB", "A\nB", ".\nB", "\nB"]
    for text, ids in zip(some, encoder.texts(some), strict=True):
        assert list(ids) == reference.tok_encode(text), text


def test_pairs_have_the_ids_that_stock_gives_them(make: tuple[str, Path], everything_is_cut: None) -> None:
    _, folder = make
    reference, encoder = stock(folder), Encoder(AutoTokenizer.from_pretrained(folder))
    source = random.Random(3)
    contexts = texts(source, 300, 12)
    pairs = [(context, text) for context in contexts for text in (*texts(source, 3, 5), "")]
    for pair, ids in zip(pairs, encoder.pairs(pairs), strict=True):
        assert tuple(map(list, ids)) == reference._encode_pair(*pair), pair


def test_what_reading_a_tokenizer_misses_a_sample_finds(
    make: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name, folder = make
    monkeypatch.setattr(encoding, "cuts_change_nothing", lambda _: True)
    encoder = Encoder(AutoTokenizer.from_pretrained(folder))
    if name in {"llama-2", "unigram", "a blank before each word", "words with the line before them"}:
        assert not encoder.cuts
        assert "encoded whole, slower" in caplog.text


@pytest.mark.parametrize("name", ["no words", "a token with a blank inside", "a token over two lines"])
def test_these_tests_see_a_cut_that_changes_tokens(name: str, tmp_path: Path, everything_is_cut: None) -> None:
    reference, encoder = stock(saved(WHOLE[name](), tmp_path)), Encoder(InPython())
    encoder.tokenizer = reference.tokenizer
    encoder.cuts = True
    some = texts(random.Random(2), 600, 40)
    assert [list(ids) for ids in encoder.texts(some)] != [reference.tok_encode(text) for text in some]


class InPython:
    """A tokenizer with a token for each character, and one for each two blanks."""

    bos_token_id = 1

    def __call__(self, some: list[str], **_: Any) -> Any:
        return SimpleNamespace(input_ids=[[ord(c) for c in text.replace("  ", "\uffff")] for text in some])


class OfACheckpoint(PreTrainedTokenizerFast):
    """A fast tokenizer with code of its own."""


def test_a_tokenizer_in_python_or_with_code_of_its_own_is_given_the_whole() -> None:
    assert not Encoder(OfACheckpoint(tokenizer_object=CUT["gpt-2"]())).cuts
    encoder = Encoder(InPython())
    assert not encoder.cuts
    pairs = [("one a ", " b"), ("", "\x01b"), ("", "b")]
    assert encoder.pairs(pairs) == [
        (tuple(map(ord, "one a")), (0xFFFF, ord("b"))),
        ((1,), (ord("b"),)),
        ((1,), (ord("b"),)),
    ]


def test_a_tokenizer_that_merges_by_chance_is_given_the_whole() -> None:
    assert not Encoder(PreTrainedTokenizerFast(tokenizer_object=byte_level(gpt_2(), dropout=0.5))).cuts


def questions(number: int) -> list[str]:
    """Prompts with the same five examples, then a question of their own."""
    examples = [
        f"Question {n}: which one of the two that follow here may it be this time?\nA. one\nB. two.\nAnswer: B."
        for n in range(5)
    ]
    return ["\n\n".join([*examples, f"This is what number {n} asks?\nA. one.\nAnswer:"]) for n in range(number)]


class Counting:
    """A tokenizer that knows what it was asked to encode."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.asked: list[str] = []

    def __call__(self, some: list[str], **settings: Any) -> Any:
        self.asked += some
        return self.tokenizer(some, **settings)


def test_shared_examples_are_encoded_once_and_of_a_whole_only_its_end() -> None:
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=CUT["qwen2"]()))
    encoder.tokenizer = counting = Counting(encoder.tokenizer)
    contexts = questions(50)
    encoder.pairs([(context, f" {letter}") for context in contexts for letter in "AB"])
    assert len(counting.asked) == len(set(counting.asked))
    own = 50 * len("This is what number 10 asks?\nA. one.\nAnswer:")
    assert sum(map(len, counting.asked)) < len(contexts[0]) + own + 100


def test_equal_contexts_share_one_object_and_so_do_equal_tokens() -> None:
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=CUT["qwen2"]()))
    contexts = [*questions(2), *questions(1)]
    (first, _), (second, _), (again, _) = encoder.pairs([(context, f" {n}") for n, context in enumerate(contexts)])
    assert first is again
    assert len({id(token) for token in (*first, *second)}) == len({*first, *second})


def test_a_text_without_a_place_for_a_cut_stays_whole() -> None:
    text = "\u0964\n\n" * 2_000
    assert encoding._pieces(text) == [text]
