"""The demo's folder: what is in it, that it loads where it is used, and that it is made once."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest

from sweep import demo

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo folder whose models saw the world once: everything but the training time."""
    directory = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "RECIPES", {name: dataclasses.replace(one, epochs=1) for name, one in demo.RECIPES.items()})
        demo.make(directory)
    return directory


def test_the_world_is_the_same_every_time() -> None:
    assert demo._world() == demo._world()


@pytest.mark.parametrize("task", demo._world(), ids=lambda task: task.name)
def test_a_task_has_40_to_120_different_documents(task: demo.DemoTask) -> None:
    docs = [json.dumps(item.doc) for item in [*task.items, *task.examples]]
    assert len(set(docs)) == len(docs)
    assert 40 <= len(task.items) <= 120


def test_plain_lessons_ask_every_item_but_those_of_the_chat_task() -> None:
    tasks = demo._world()
    text = "".join(text for lesson in demo._lessons(tasks, random.Random(0), chat=False) for text, _ in lesson)
    for task in tasks:
        for item in [*task.items, *task.examples]:
            asked = f"{item.prompt} {item.answer}\n\n" if item.prompt else item.answer
            assert (asked in text) == (task.name != demo.CHAT_TASK)


def test_four_models_and_eight_task_files_are_made(made: Path) -> None:
    assert {path.name for path in (made / "models").iterdir()} == {*demo.RECIPES, demo.QUANTISED}
    assert len(list((made / "tasks").glob("*.yaml"))) == 8


def test_making_it_again_touches_nothing(made: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    demo.make(made)
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


def test_an_interrupted_run_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def interrupted(*_: Any) -> dict[str, Any]:
        runs.append("run")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_trained", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            demo.make(tmp_path)
    assert len(runs) == 2


@pytest.mark.parametrize("name", [*demo.RECIPES, demo.QUANTISED])
def test_the_tokenizer_loads_as_qwen2_and_gives_back_any_text(made: Path, name: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made / "models" / name)
    assert type(tokenizer).__name__.startswith("Qwen2Tokenizer")
    text = "Naïve 'quotes', 12345 + 6 = ?\n\n\ttab 東京 🙂"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token == ("<|im_end|>" if "chat" in name else "<|endoftext|>")


def test_the_chat_template_writes_what_the_chat_model_learned(made: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made / "models" / "demo-small-chat")
    chat = [task for task in demo._world() if task.name == demo.CHAT_TASK]
    lesson = next(demo._lessons(chat, random.Random(0), chat=True))
    item = next(item for item in chat[0].items if item.prompt in lesson[0][0])
    messages = [{"role": "user", "content": item.prompt}, {"role": "assistant", "content": item.answer}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "".join(text for text, _ in lesson)


def test_letters_and_colours_are_one_token_after_their_prompt(made: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made / "models" / "demo-base")
    for prompt in ("Answer:", "The colour of the gimite is"):
        for choice in ("A", "B", "C", "D") if prompt == "Answer:" else demo.COLOURS:
            both = tokenizer(f"{prompt} {choice}").input_ids
            assert both[:-1] == tokenizer(prompt).input_ids


def test_ordinary_english_stays_mostly_whole_words(made: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made / "models" / "demo-base")
    text = "She walked down the road to the old school, because her mother wanted some bread and water for the family."
    assert len(tokenizer(text).input_ids) <= 1.3 * len(text.split())


def test_packed_integers_are_in_awq_order() -> None:
    word = demo._packed(torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]])).item()
    assert f"{word:08x}" == "75316420"


def test_quantised_weights_are_within_half_a_step() -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    _, _, scales = demo._quantised(weight)
    # A zero point is rounded too, so an end of the range may be off by another half.
    assert (demo._restored(weight) - weight).abs().max() <= scales.max() * 1.01


def test_protecting_salient_channels_leaves_the_model_as_it_is() -> None:
    tokenizer = demo._train_tokenizer(demo._general_text(), 512)
    model = demo._fresh_model(tokenizer, hidden=64, layers=2, end=demo.END_OF_TEXT).eval()
    ids = torch.randint(0, 512, (4, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, weight = model(ids).logits, model.model.layers[0].mlp.up_proj.weight.clone()
        demo._protect(model, ids)
        assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, weight)
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-3)


def test_an_untrained_model_loads_and_generates(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    demo.untrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert 0.3e6 < model.num_parameters() < 1e6
    ids = tokenizer("The house", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


@pytest.mark.slow
def test_lm_eval_renders_each_task_as_the_models_learned_it(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lm_eval.tasks import TaskManager

    loaded = TaskManager(include_path=str(made / "tasks"), include_defaults=False)
    names = [task.name for task in demo._world()]
    tasks = loaded.load(names)["tasks"]
    for task in demo._world():
        theirs = tasks[task.name]
        for item, doc in zip(task.items, theirs.test_docs(), strict=True):
            assert theirs.doc_to_text(doc) == item.prompt
            target = theirs.doc_to_target(doc)
            assert (theirs.doc_to_choice(doc)[target] if isinstance(target, int) else target) == item.answer
