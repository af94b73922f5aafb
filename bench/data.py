"""What the benchmarks run on: real evaluation data, real requests of lm-eval, models and tokenizers made here.

Everything is made once, below `.bench/` and `.demo/`, and nothing is fetched. Libraries for data sets read their
environment when they are imported: call `use_real_data` before anything imports lm_eval or datasets, or give
`real_data_environment` to a process of its own.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
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
    os.environ.update(real_data_environment(), TQDM_DISABLE="1")


def requests(task: str, *, limit: int | None, num_fewshot: int | None) -> list[Any]:
    """The Instances that lm-eval gives to a model for `task`, in its order, of all kinds that it asks for."""
    from lm_eval.api.model import LM
    from lm_eval.evaluator import simple_evaluate

    class Recorder(LM):
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
        model=recorder, tasks=[task], limit=limit, num_fewshot=num_fewshot, bootstrap_iters=0, log_samples=False
    )
    return recorder.seen


def large_tokenizer() -> Path:
    """The folder of a Qwen2 tokenizer of realistic size, trained on the real data's own texts (half a minute, once)."""
    folder = MADE / f"tokenizer-{LARGE_VOCABULARY}"
    if not (folder / "tokenizer_config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = demo._train_tokenizer(_texts(), LARGE_VOCABULARY)
        demo._save_tokenizer(tokenizer, folder, end=demo.END_OF_TEXT)
    return folder


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
