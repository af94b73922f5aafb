"""Commits, files and caches, with the real client against a hub of our own (hub_stub.py)."""

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from hub_stub import TOKEN, HubStub, hub_stub, reach
from huggingface_hub import constants, errors

from sweep.planning.hub import Part, Source, bring, folder_of, lacking, resolve_revision, snapshot

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "f" * 40

# No two alike: the cache downloads one content once.
TEXT = {
    "config.json": b'{"of": "config"}',
    "tokenizer.json": b'{"of": "tokenizer"}',
    "tokenizer_config.json": b'{"of": "its settings"}',
    "chat_template.jinja": b"{{ x }}",
}
SMALL = {**TEXT, "model.safetensors": b"w" * 100}


def index(*names: str) -> bytes:
    return json.dumps({"weight_map": {f"layer.{number}": name for number, name in enumerate(names)}}).encode()


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    """An empty hub, an empty cache and no token."""
    with hub_stub() as stub:
        reach(stub, tmp_path / "hf", monkeypatch)
        yield stub
    assert stub.unknown == []


@pytest.fixture
def no_network(hub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def model(**changes: object) -> Source:
    known = {"repository": "org/m", "branch": None, "commit": None, "part": Part.MODEL}
    return Source(**{**known, **changes})  # type: ignore[arg-type]


def cache(branch: str, commit: str, repository: str = "org/m") -> None:
    """What an earlier download of a branch leaves behind."""
    folder = snapshot(repository, commit)
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent.parent / "refs").mkdir(exist_ok=True)
    (folder.parent.parent / "refs" / branch).write_text(commit)


# Commits


def test_the_hub_s_word_comes_before_the_local_copy(hub: HubStub) -> None:
    cache("main", OTHER_COMMIT)
    commit = hub.add("org/m", SMALL)
    assert resolve_revision("org/m", None, ask_hub=True, earlier=OTHER_COMMIT) == commit


def test_a_branch_that_moved_stands_for_its_new_commit(hub: HubStub) -> None:
    old = hub.add("org/m", SMALL)
    new = hub.add("org/m", {**SMALL, "README.md": b"v2"})
    hub.add("org/m", SMALL, branch="v1")
    assert resolve_revision("org/m", None, ask_hub=True) == new
    assert resolve_revision("org/m", "v1", ask_hub=True) == old


def test_who_may_not_ask_looks_into_the_cache(hub: HubStub) -> None:
    cache("v1", COMMIT)
    assert resolve_revision("org/m", "v1", ask_hub=False) == COMMIT
    assert resolve_revision("org/m", "v2", ask_hub=False) is None
    assert resolve_revision("org/m", None, ask_hub=False) is None
    assert hub.requests == []


def test_the_offline_switch_is_honoured(hub: HubStub, no_network: None) -> None:
    cache("main", COMMIT)
    assert resolve_revision("org/m", None, ask_hub=True) == COMMIT
    assert hub.requests == []


def test_a_commit_stands_for_itself(hub: HubStub) -> None:
    assert resolve_revision("org/m", COMMIT, ask_hub=True) == COMMIT
    assert hub.requests == []


def test_a_repository_that_the_hub_does_not_know_is_said_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    assert resolve_revision("org/m", None, ask_hub=True) is None
    assert "org/m@main" in caplog.messages[0]
    assert "\n" not in caplog.messages[0]


@pytest.mark.parametrize(
    "error",
    [
        errors.HTTPError("502 Server Error.\nBad Gateway"),
        errors.OfflineModeIsEnabled("offline"),
        errors.HFValidationError("Repo id must be in the form 'repo_name' or 'namespace/repo_name'"),
        TimeoutError("timed out"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_hub_that_does_not_answer_costs_nothing_but_a_line(
    error: Exception, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object, path: str, *, revision: str, timeout: float) -> None:
        assert timeout <= 10
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    assert resolve_revision("org/m", None, ask_hub=True) is None
    assert resolve_revision("org/m", None, ask_hub=True, earlier=COMMIT) == COMMIT
    cache("main", OTHER_COMMIT)
    assert resolve_revision("org/m", None, ask_hub=True) == OTHER_COMMIT
    assert caplog.record_tuples[0][1] == logging.WARNING
    assert "\n" not in caplog.messages[0]


# Which files


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    ("others", "load_format", "wanted"),
    [
        pytest.param(("model.safetensors",), "auto", {"model.safetensors"}, id="one file"),
        pytest.param(
            ("model.safetensors", "pytorch_model.bin", "consolidated.00.pth"),
            "auto",
            {"model.safetensors"},
            id="safetensors before bin",
        ),
        pytest.param(
            (*SHARDS, "model.safetensors.index.json", "extra.safetensors"),
            "auto",
            {*SHARDS, "model.safetensors.index.json"},
            id="what the index lists",
        ),
        pytest.param(
            ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tf_model.h5"),
            "auto",
            {"pytorch_model.bin"},
            id="no state of a trainer",
        ),
        pytest.param(
            ("consolidated.safetensors", "params.json", *SHARDS, "model.safetensors.index.json"),
            "auto",
            {"consolidated.safetensors", "params.json", "model.safetensors.index.json"},
            id="Mistral's own format first",
        ),
        pytest.param(
            ("consolidated.safetensors", "params.json", "model.safetensors"),
            "safetensors",
            {"params.json", "model.safetensors", "consolidated.safetensors"},
            id="load_format safetensors",
        ),
        pytest.param(("model.safetensors", "pytorch_model.bin"), "npcache", {"pytorch_model.bin"}, id="npcache"),
        pytest.param(("model.safetensors",), "dummy", set(), id="no weights for dummy"),
        pytest.param(("rank-0.tensors", "x.onnx"), "sharded_state", {"rank-0.tensors", "x.onnx"}, id="unknown format"),
        pytest.param(
            ("model.safetensors", "original/consolidated.00.pth", "onnx/model.onnx", "original/params.json", "a.png"),
            "auto",
            {"model.safetensors", "original/params.json"},
            id="weights of the top folder",
        ),
        pytest.param(
            ("modeling_own.py", "model.safetensors"), "auto", {"modeling_own.py", "model.safetensors"}, id="code"
        ),
    ],
)
def test_a_model_is_what_vllm_reads_of_it(
    hub: HubStub, others: tuple[str, ...], load_format: str, wanted: set[str]
) -> None:
    files = {**TEXT, **{name: index(*SHARDS) if "index" in name else name.encode() for name in others}}
    hub.add("org/m", files)
    brought = bring(model(load_format=load_format))
    there = {str(path.relative_to(brought.folder)) for path in brought.folder.rglob("*") if path.is_file()}
    assert there == {*TEXT, *wanted}
    assert sorted(hub.downloaded()) == sorted(there)
    assert lacking(model(commit=brought.commit, load_format=load_format)) is None


def test_of_a_tokenizer_no_weights_are_taken(hub: HubStub) -> None:
    hub.add("org/t", SMALL)
    bring(model(repository="org/t", part=Part.TOKENIZER))
    assert set(hub.downloaded()) == set(TEXT)


def test_of_an_adapter_its_own_weights_are_taken_and_no_checkpoint_of_its_training(hub: HubStub) -> None:
    own = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"w"}
    hub.add("org/a", {**own, "adapter_model.bin": b"w", "checkpoint-5/optimizer.pt": b"s", "training_args.bin": b"s"})
    source = model(repository="org/a", part=Part.ADAPTER)
    brought = bring(source)
    assert set(hub.downloaded()) == set(own)
    assert lacking(replace(source, commit=brought.commit)) is None


# Downloading


def test_what_is_there_is_not_downloaded_again(hub: HubStub) -> None:
    commit = hub.add("org/m", SMALL)
    first = bring(model())
    assert (first.commit, first.new_bytes) == (commit, sum(map(len, SMALL.values())))
    hub.requests.clear()
    assert bring(model()) == replace(first, new_bytes=0)
    assert hub.downloaded() == []


def test_the_planned_commit_is_brought_though_the_branch_has_moved(hub: HubStub) -> None:
    planned = hub.add("org/m", SMALL)
    hub.add("org/m", {**SMALL, "model.safetensors": b"retrained"})
    folder = bring(model(commit=planned)).folder
    assert (folder / "model.safetensors").read_bytes() == SMALL["model.safetensors"]


def test_a_later_launch_without_network_knows_the_commit(hub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.add("org/m", SMALL)
    pinned = hub.add("org/m", {**SMALL, "x.txt": b""}, branch="dev")
    bring(model(commit=commit))
    bring(model(branch=pinned, commit=pinned))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_revision("org/m", None, ask_hub=True) == commit
    refs = snapshot("org/m", commit).parent.parent / "refs"
    assert [path.name for path in refs.iterdir()] == ["main"]


def test_a_download_that_failed_goes_on_where_it_stopped(hub: HubStub) -> None:
    shards = {SHARDS[0]: b"w", SHARDS[1]: b"v", "model.safetensors.index.json": index(*SHARDS)}
    commit = hub.add("org/m", {**TEXT, **shards})
    hub.repositories["models", "org/m"].broken = {SHARDS[1]}
    with pytest.raises(errors.LocalEntryNotFoundError):
        bring(model())
    assert lacking(model(commit=commit)) == f"{SHARDS[1]} is not here"
    hub.repositories["models", "org/m"].broken = set()
    hub.requests.clear()
    assert bring(model()).new_bytes == 1
    assert hub.downloaded() == [SHARDS[1]]
    assert lacking(model(commit=commit)) is None


def test_a_gated_repository_opens_with_the_token(hub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/m", SMALL)
    hub.repositories["models", "org/m"].gated = True
    with pytest.raises(errors.GatedRepoError):
        bring(model())
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert bring(model()).new_bytes > 0


def test_a_folder_that_is_complete_needs_no_hub(hub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/a", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"w"})
    source = model(repository="org/a", part=Part.ADAPTER)
    brought = bring(source)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert folder_of(replace(source, commit=brought.commit)) == brought.folder
    with pytest.raises(errors.OfflineModeIsEnabled):
        folder_of(replace(source, commit=OTHER_COMMIT))


# What is missing


@pytest.mark.parametrize(
    ("files", "said"),
    [
        pytest.param(SMALL, None, id="complete"),
        pytest.param({"model.safetensors": b"w"}, "config.json or params.json is not here", id="no config"),
        pytest.param(TEXT, "*.safetensors or *.bin or *.pt is not here", id="no weights"),
        pytest.param(
            {**TEXT, "model.safetensors.index.json": index("a.safetensors", "b.safetensors", "c.safetensors")},
            "a.safetensors is not here, nor are 2 more files",
            id="only the index",
        ),
        pytest.param({**TEXT, SHARDS[0]: b"w"}, f"{SHARDS[1]} is not here", id="a shard, no index"),
        pytest.param(
            {**TEXT, "pytorch_model.bin.index.json": index("pytorch_model-1.bin")},
            "pytorch_model-1.bin is not here",
            id="the index of bin",
        ),
    ],
)
def test_a_snapshot_that_is_not_whole_is_told_apart(files: dict[str, bytes], said: str | None) -> None:
    folder = snapshot("org/m", COMMIT)
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    assert lacking(model(commit=COMMIT)) == said


def test_a_link_without_its_file_is_no_file() -> None:
    folder = snapshot("org/m", COMMIT)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").symlink_to("../../blobs/gone")
    assert lacking(model(commit=COMMIT)) == "*.safetensors or *.bin or *.pt is not here"


def test_what_nobody_fetched_or_knows_is_not_here() -> None:
    assert lacking(model(commit=COMMIT)) == "not here"
    assert lacking(model()) == "not here"
