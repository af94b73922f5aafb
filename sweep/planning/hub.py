"""The Hugging Face hub as a sweep needs it: the commit that a name stands for, which files vLLM reads of it, what of
them lies in the cache of this machine, and how the rest gets there.

The rules about files are those of vLLM 0.32 (`model_executor/model_loader/default_loader.py` and `weight_utils.py`,
`transformers_utils/repo_utils.py`), so that a server finds all that it wants with HF_HUB_OFFLINE=1 and nothing is
downloaded that no server reads. The cache's layout is the one that huggingface_hub documents. Data sets are lm-eval's
affair: see `fetch.py`.
"""

import fnmatch
import glob
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

log = logging.getLogger(__name__)

DEFAULT_BRANCH = "main"
HUB_TIMEOUT_S = 10.0

SAFETENSORS, BIN, PT, CONSOLIDATED = "*.safetensors", "*.bin", "*.pt", "consolidated*.safetensors"

WEIGHTS_BY_LOAD_FORMAT = {
    "auto": (SAFETENSORS, BIN, PT),
    "hf": (SAFETENSORS, BIN, PT),
    "safetensors": (SAFETENSORS,),
    "fastsafetensors": (SAFETENSORS,),
    "instanttensor": (SAFETENSORS,),
    "runai_streamer": (SAFETENSORS,),
    "mistral": (CONSOLIDATED,),
    "npcache": (BIN, PT),
    "pt": (PT,),
    "dummy": (),
}
"""Weight files by vLLM's `--load-format`: it takes the first pattern that the repository has files for. Of a format
that is not here everything is fetched."""

INDEX_BY_PATTERN = {
    SAFETENSORS: "model.safetensors.index.json",
    BIN: "pytorch_model.bin.index.json",
    CONSOLIDATED: "consolidated.safetensors.index.json",
}
"""The file that lists which weight file holds which tensor, where there are several."""

TRAINING_STATE = frozenset({"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"})
"""What a trainer leaves beside `*.bin` and `*.pt` weights; vLLM passes over it."""

LARGE = frozenset(
    {
        *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data"),
        *(".ot", ".tflite", ".npz", ".pkl"),
        *(".png", ".jpg", ".jpeg", ".gif", ".webp", ".mp3", ".mp4", ".wav", ".flac"),
        *(".parquet", ".arrow", ".ipynb", ".zip", ".tar", ".gz"),
    }
)
"""All else up to LARGE_BYTES is configuration, tokenizer, template or code, and always wanted."""

LARGE_BYTES = 100_000_000
"""The largest tokenizers have 35 MB. What is larger is a model in a form that vLLM cannot read."""

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")


class Part(StrEnum):
    """What of a repository is used."""

    MODEL = "model"
    TOKENIZER = "tokenizer"
    ADAPTER = "adapter"


NEEDED_BY_PART = {
    Part.MODEL: (("config.json", "params.json"),),
    Part.TOKENIZER: (("tokenizer*", "vocab.*", "*.tiktoken", "*.model", "tekken.json"),),
    Part.ADAPTER: (("adapter_config.json",), ADAPTER_WEIGHTS),
}
"""Of each of these one file at least, beside the weights of a model."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A part of a hub repository at one commit, as a sweep uses it."""

    repository: str
    branch: str | None
    """Branch, tag or commit as it was asked for; None means the default branch."""
    commit: str | None
    """None while nobody has told it."""
    part: Part
    load_format: str = "auto"
    """vLLM's; matters for a model only."""

    def __str__(self) -> str:
        return at(self.repository, self.branch)


@dataclass(frozen=True, kw_only=True)
class Brought:
    folder: Path
    """The snapshot in the cache; complete."""
    commit: str
    new_bytes: int
    """0 where everything was there."""


def at(repository: str, branch: str | None) -> str:
    """`name@branch`: how a hub name is written where its branch, tag or commit matters."""
    return f"{repository}@{branch or DEFAULT_BRANCH}"


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids asking the hub."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def snapshot(repository: str, commit: str) -> Path:
    """The folder of a model repository's commit in the cache, whether it exists or not."""
    return _folder(repository) / "snapshots" / commit


def resolve_revision(path: str, revision: str | None, *, ask_hub: bool, earlier: str | None = None) -> str | None:
    """The commit that a hub model's branch or tag stands for; None when neither the hub nor the local cache tells it.

    The hub comes first where it may be asked, since a branch moves; HF_HUB_OFFLINE is honoured. Without its word
    `earlier` counts, what an earlier launch took it for: what vLLM fetched by commit left no name in the cache.
    """
    name = revision or DEFAULT_BRANCH
    if _is_commit(name):
        return name
    if ask_hub and not offline():
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HTTPError

        try:
            sha = HfApi().model_info(path, revision=name, timeout=HUB_TIMEOUT_S).sha
            return str(sha) if sha else None
        except (HTTPError, OSError, ValueError) as error:
            # Gated, unknown, misspelt or out of reach: what is known here may do, and else vLLM gives the hub's words.
            log.warning("the hub does not tell the commit of %s: %s", at(path, revision), str(error).partition("\n")[0])
    ref = _folder(path) / "refs" / name
    told = ref.read_text().strip() if ref.is_file() else None
    # Where the branch has moved on and `fetch` brought its new commit, the earlier one may never have come.
    return told if told and earlier and not snapshot(path, earlier).is_dir() else earlier or told


def bring(source: Source) -> Brought:
    """Download what of `source` is not in the cache yet; an interrupted download goes on where it stopped.

    Also notes in the cache what the branch stands for, so that a later launch without network knows it. Raises what
    huggingface_hub raises: HTTPError, OSError or ValueError.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()  # a log has no use for them
    hub = HfApi()
    repository = source.repository
    commit = source.commit or str(hub.model_info(repository, revision=source.branch, timeout=HUB_TIMEOUT_S).sha)
    tree = hub.list_repo_tree(repository, revision=commit, recursive=True)
    sizes: dict[str, int] = {file.path: file.size for file in tree if isinstance(file, RepoFile)}

    def content(name: str) -> str:
        return Path(hf_hub_download(repository, name, revision=commit)).read_text()

    names = _files(source, sizes, content)
    folder = snapshot(repository, commit)
    new = [name for name in names if not (folder / name).is_file()]
    if new:
        # Without the files that are there: huggingface_hub would look at each of them again.
        snapshot_download(repository, revision=commit, allow_patterns=[glob.escape(name) for name in new])
    if absent := [name for name in names if not (folder / name).is_file()]:
        # It returns what is there where the hub answers no second question.
        raise OSError(f"{len(absent)} of {len(names)} files did not come, {absent[0]} among them; try again")
    if what := lacking(replace(source, commit=commit)):
        raise ValueError(f"{what}, and the repository does not have it either")
    _note_branch(source, commit)
    return Brought(folder=folder, commit=commit, new_bytes=sum(sizes[name] for name in new))


def folder_of(source: Source) -> Path:
    """The folder with `source` at its commit, downloaded only if it is not in the cache. Raises as `bring` does."""
    if source.commit is not None and lacking(source) is None:
        return snapshot(source.repository, source.commit)
    return bring(source).folder


def lacking(source: Source) -> str | None:
    """What of `source` is not in the cache of this machine, in words; None when a server would find everything.

    Looks at files only, in a millisecond or two. What cannot be seen without the hub counts as there: weights in one
    file of several that no index and no name tells of.
    """
    if source.commit is None or not (folder := snapshot(source.repository, source.commit)).is_dir():
        return "not here"
    # A link whose file is not there, as an interrupted download leaves it, is no file.
    names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    absent = [" or ".join(choice) for choice in NEEDED_BY_PART[source.part] if not _matching(names, choice)]
    if source.part is Part.MODEL and (patterns := _patterns(source, names)):
        absent += _absent_weights(folder, names, patterns)
    if not absent:
        return None
    return f"{absent[0]} is not here" + (f", nor are {len(absent) - 1} more files" if absent[1:] else "")


def _absent_weights(folder: Path, names: Collection[str], patterns: Iterable[str]) -> list[str]:
    for pattern in patterns:
        index = INDEX_BY_PATTERN.get(pattern)
        if index is not None and index in names:
            return sorted(_indexed((folder / index).read_text()) - set(names))
        if found := _matching(names, [pattern]):
            return _absent_of_series(found)
    return [" or ".join(patterns)]


def _absent_of_series(names: Iterable[str]) -> list[str]:
    """Of `model-00001-of-00003.safetensors` and the like, the ones that are not among `names`."""
    expected: set[str] = set()
    for name in names:
        if found := re.search(r"-(\d+)-of-(\d+)(?=\.)", name):
            numbers = (str(number).zfill(len(found[1])) for number in range(1, int(found[2]) + 1))
            expected |= {f"{name[: found.start(1)]}{number}{name[found.end(1) :]}" for number in numbers}
    return sorted(expected - set(names))


def _files(source: Source, names: Mapping[str, int], content: Callable[[str], str]) -> list[str]:
    """Which files of a repository are used, of all with their bytes; `content` reads one of them."""
    text = [name for name, size in names.items() if os.path.splitext(name)[1] not in LARGE and size <= LARGE_BYTES]
    if source.part is Part.TOKENIZER:
        return text
    if source.part is Part.ADAPTER:
        return [*text, *_first(names, ADAPTER_WEIGHTS)]
    patterns = _patterns(source, names)
    if patterns is None:
        return list(names)
    # vLLM asks for the index before it tries the patterns in turn, and only for the one of safetensors.
    if SAFETENSORS in patterns and (index := INDEX_BY_PATTERN[SAFETENSORS]) in names:
        return [*text, *(name for name in sorted(_indexed(content(index))) if name in names)]
    return [*text, *(name for name in _first(names, patterns) if name not in TRAINING_STATE)]


def _patterns(source: Source, names: Collection[str]) -> tuple[str, ...] | None:
    """Weight files in order of preference; None for a format that is not known here."""
    if source.load_format == "auto" and _matching(names, [CONSOLIDATED]):
        return (CONSOLIDATED,)  # Mistral's own format, which vLLM prefers wherever a repository has it
    return WEIGHTS_BY_LOAD_FORMAT.get(source.load_format)


def _first(names: Collection[str], patterns: Iterable[str]) -> list[str]:
    """What matches the first pattern that anything matches."""
    return next((found for pattern in patterns if (found := _matching(names, [pattern]))), [])


def _matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Those of the repository's top folder that match one of the patterns; vLLM reads no weights from below it."""
    top = (name for name in names if "/" not in name)
    return [name for name in top if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _indexed(index: str) -> set[str]:
    try:
        return set(json.loads(index)["weight_map"].values())
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"an index of weight files without a weight_map: {index[:60]!r}") from error


def _note_branch(source: Source, commit: str) -> None:
    branch = source.branch or DEFAULT_BRANCH
    if _is_commit(branch):
        return
    ref = _folder(source.repository) / "refs" / branch
    ref.parent.mkdir(parents=True, exist_ok=True)
    temporary = ref.with_name(f".{ref.name}.{os.getpid()}")
    temporary.write_text(commit)
    temporary.replace(ref)


def cache() -> Path:
    """The hub's cache on this machine, whether it exists or not."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _folder(repository: str) -> Path:
    return cache() / "--".join(["models", *repository.split("/")])


def _is_commit(revision: str) -> bool:
    return re.fullmatch("[0-9a-f]{40}", revision) is not None
