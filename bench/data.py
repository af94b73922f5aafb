"""What the benchmarks run on: real evaluation data, real requests of lm-eval, models and tokenizers made here.

Everything is made once, below `.bench/` and `.demo/`, and nothing is fetched. Libraries for data sets read their
environment when they are imported: call `use_real_data` before anything imports lm_eval or datasets, or give
`real_data_environment` to a process of its own.
"""

import json
import logging
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweep import demo

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
"""Real rows of public data sets, beside the project and no part of it; LOADER.md there says which."""
MADE = ROOT / ".bench"
"""What the benchmarks make and keep."""

LARGE_VOCABULARY = 64_000
"""About as many entries as the texts here have merges for; real models have 32,000 to 256,000."""

SMALL_VOCABULARY = 8_000
"""Of the models here: with a real one's most of their weights would be embeddings."""

MAX_MODEL_LEN = 8192
"""Tokens: the longest 5-shot prompt of mmlu fits."""

CHOICES = "bench_choices"
"""A task with choices of several tokens, made by `choices_task`."""
CHOICES_QUESTIONS, CONTEXT_TOKENS, CHOICE_TOKENS = 100, 600, 8


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a Qwen2 model with random weights."""

    hidden: int
    intermediate: int
    layers: int
    heads: int


SHAPES = {
    "27m": Shape(hidden=384, intermediate=1536, layers=10, heads=6),
    "0.9m": Shape(hidden=64, intermediate=384, layers=4, heads=2),
}
"""By a name that tells the parameters, embeddings included. In the first computing rules, in the second the server."""

WEIGHT_SPREAD = 0.05
"""Standard deviation of the weights: with the usual 0.02 all tokens would be nearly as likely."""


def demo_models() -> Path:
    """The folder of the demo's models, trained if they are not there yet (a minute)."""
    demo.make(ROOT / ".demo")
    return ROOT / ".demo" / "models"


def real_data_environment() -> dict[str, str]:
    """The variables under which lm-eval's tasks find the real data offline. Ends the program where there is none."""
    if not (DATA / "make_cache.py").exists():
        raise SystemExit(
            f"this benchmark needs real evaluation data in {DATA}, and there is none: put the folder `shared/data` "
            "beside the project (its LOADER.md says what is in it)"
        )
    home = MADE / "hf"
    if not (home / "complete").exists():
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([sys.executable, DATA / "make_cache.py", "--hf-home", home], check=True, stdout=sys.stderr)
        (home / "complete").touch()
    return {
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "HF_EVALUATE_OFFLINE": "1",
        "NLTK_DATA": str((DATA / "nltk_data").resolve()),
    }


def use_real_data() -> None:
    """Have this process find the real data. Ends the program where there is none."""
    if loaded := {"datasets", "evaluate", "lm_eval"} & sys.modules.keys():
        raise RuntimeError(f"{sorted(loaded)} read HF_HOME when they were imported; call use_real_data before")
    # Of each of mmlu's 57 subjects they would say that it is offline and given five shots, several times.
    os.environ.update(real_data_environment(), TQDM_DISABLE="1", DATASETS_VERBOSITY="error")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def requests(
    task: str, *, limit: int | None, num_fewshot: int | None, include_path: str | None = None, gen_kwargs: Any = None
) -> list[Any]:
    """The Instances that lm-eval gives to a model for `task`, in its order, of all kinds that it asks for."""
    from lm_eval.api.model import LM
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    class Recorder(LM):  # type: ignore[misc]
        """A model that knows no answer."""

        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Any] = []

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            self.seen += requests
            return [(0.0, False)] * len(requests)

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            self.seen += requests
            return [0.0] * len(requests)

        def generate_until(self, requests: list[Any]) -> list[str]:
            self.seen += requests
            return [""] * len(requests)

    recorder = Recorder()
    simple_evaluate(
        model=recorder,
        tasks=[task],
        limit=limit,
        num_fewshot=num_fewshot,
        gen_kwargs=gen_kwargs,
        task_manager=TaskManager(include_path=include_path),
        bootstrap_iters=0,
        log_samples=False,
    )
    return recorder.seen


def trained_tokenizer(vocabulary: int) -> Path:
    """The folder of a Qwen2 tokenizer that is trained on the real data's own texts (half a minute at most, once)."""
    folder = MADE / f"tokenizer-{vocabulary}"
    if not (folder / "tokenizer_config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = demo._train_tokenizer(_texts(), vocabulary)
        demo._save_tokenizer(tokenizer, folder, end=demo.END_OF_TEXT)
    return folder


def model(size: str) -> Path:
    """The folder of a model with random weights, of one of SHAPES and with a tokenizer of SMALL_VOCABULARY entries."""
    folder, shape = MADE / f"model-{size}", SHAPES[size]
    if not (folder / "complete").exists():
        import torch
        from tokenizers import Tokenizer
        from transformers import Qwen2Config, Qwen2ForCausalLM

        tokenizer = Tokenizer.from_file(str(trained_tokenizer(SMALL_VOCABULARY) / "tokenizer.json"))
        end = tokenizer.token_to_id(demo.END_OF_TEXT)
        torch.manual_seed(0)
        made = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=tokenizer.get_vocab_size(),
                hidden_size=shape.hidden,
                intermediate_size=shape.intermediate,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.heads,
                max_position_embeddings=MAX_MODEL_LEN,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=end,
                pad_token_id=end,
                initializer_range=WEIGHT_SPREAD,
            )
        )
        tensors = {name: one for name, one in made.state_dict().items() if name != "lm_head.weight"}
        # Half precision is ten times slower than float32 on a CPU that has no instructions for it.
        config = {**demo._config(made), "dtype": "float32"}
        demo._save_model(folder, config, tensors, tokenizer, end=demo.END_OF_TEXT)
        (folder / "complete").touch()
    return folder


def choices_task() -> Path:
    """The folder of the task CHOICES: real text of CONTEXT_TOKENS, and which of four CHOICE_TOKENS long follows it.

    So many tokens by the tokenizer of `model`; contexts have nothing in common.
    """
    folder = MADE / "tasks"
    rows = folder / f"{CHOICES}.jsonl"
    if not (folder / f"{CHOICES}.yaml").exists():
        folder.mkdir(parents=True, exist_ok=True)
        rows.write_text("".join(json.dumps(row) + "\n" for row in _questions()))
        settings = {
            "task": CHOICES,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(rows)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "context",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0},
        }
        (folder / f"{CHOICES}.yaml").write_text(json.dumps(settings))  # JSON is YAML
    return folder


def _questions() -> Iterator[dict[str, Any]]:
    from pyarrow import parquet
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained_tokenizer(SMALL_VOCABULARY))
    rng = random.Random(0)
    folder = DATA / "repos" / "EleutherAI" / "wikitext_document_level"
    texts = parquet.read_table(next(folder.rglob("test-*.parquet")))["page"].to_pylist()
    owed = CHOICES_QUESTIONS
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        begins = [token.startswith("Ġ") for token in tokenizer.convert_ids_to_tokens(ids)]

        def words(start: int, end: int, ids: list[int] = ids, begins: list[bool] = begins) -> str:
            """These tokens as text, with the blank in front; empty unless they are words, and encoded so again."""
            if not (begins[start] and begins[end]):
                return ""
            found: str = tokenizer.decode(ids[start:end])
            return found if tokenizer(found, add_special_tokens=False).input_ids == ids[start:end] else ""

        last = len(ids) - CHOICE_TOKENS
        phrases = [phrase for start in range(last) if (phrase := words(start, start + CHOICE_TOKENS))]
        free = 0
        for start in range(CONTEXT_TOKENS, last):
            if owed and start >= free + CONTEXT_TOKENS and (right := words(start, start + CHOICE_TOKENS)):
                if not (context := words(start - CONTEXT_TOKENS, start)):
                    continue
                choices = [right, *rng.sample(phrases, 3)]
                rng.shuffle(choices)
                gold = choices.index(right)
                yield {"context": context, "choices": [choice.strip() for choice in choices], "gold": gold}
                owed, free = owed - 1, start


def _texts() -> Iterator[str]:
    """Every string of every data set here."""
    from pyarrow import parquet

    for path in sorted((DATA / "repos").rglob("*.parquet")):
        for row in parquet.read_table(path).to_pylist():
            yield from _strings(row)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings(list(value.values()))
    elif isinstance(value, Sequence):
        for one in value:
            yield from _strings(one)
