"""A folder with tiny models and tasks that a laptop can run: four Qwen2-architecture models, trained here in seconds.

The tasks ask about a made-up world, so that what a model scores is what it learned here and nothing else:

- `demo-nano` saw the world too little to know it: near chance.
- `demo-small-chat` learned it in ChatML form and is served with its chat template.
- `demo-base` learned it well, as plain text.
- `demo-base-awq` is `demo-base` in real AWQ: activation-aware scales, 4-bit weights in groups of 64.

Everything follows from seeds. Nothing is downloaded. `make` costs nothing when its folder is already up to date.
"""

import argparse
import hashlib
import json
import logging
import math
import random
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# ---------------------------------------------------------------------------------------------------------------------
# The world and the tasks about it


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question with its answer, as a task asks it and as a model learns it."""

    doc: dict[str, Any]
    """What lm-eval reads: a line of the task's data file."""
    prompt: str
    """What lm-eval's `doc_to_text` renders from `doc`."""
    answer: str


@dataclass(frozen=True, kw_only=True)
class DemoTask:
    """One lm-eval task of the demo."""

    name: str
    settings: dict[str, Any]
    """The task's YAML, without its name and its data."""
    items: tuple[Item, ...]
    """What is asked."""
    examples: tuple[Item, ...] = ()
    """What few-shot examples are drawn from; never asked."""

    @property
    def shots(self) -> int:
        return int(self.settings.get("num_fewshot", 0))


def _names(rng: random.Random, count: int, endings: Sequence[str], *, taken: set[str]) -> list[str]:
    """`count` new pronounceable names, capitalised; they join `taken`."""
    names: list[str] = []
    while len(names) < count:
        name = (
            rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") + rng.choice("lmnrstvk") + rng.choice(endings)
        ).title()
        if name not in taken:
            taken.add(name)
            names.append(name)
    return names


def _with_wrong(rng: random.Random, right: str, pool: Sequence[str]) -> list[str]:
    """`right` and three others of `pool`, shuffled."""
    choices = [right, *rng.sample([one for one in pool if one != right], 3)]
    rng.shuffle(choices)
    return choices


QUESTION = "Question: {{question}}\nAnswer:"
CHAT_TASK = "demo_rivers_chat"
COLOURS = ("red", "blue", "green", "black", "white")


def _asked(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def _world() -> list[DemoTask]:
    """The tasks with all their documents; the same every time."""
    rng = random.Random(20)
    taken: set[str] = set()
    countries = _names(rng, 46, ("oria", "and", "istan"), taken=taken)
    capitals = _names(rng, len(countries), ("burg", "mouth", "a"), taken=taken)
    rivers = _names(rng, len(countries), ("e", "u"), taken=taken)
    animals = [name.lower() for name in _names(rng, 40, ("ing", "ox", "ek"), taken=taken)]
    birds = [name.lower() for name in _names(rng, 40, ("il", "ock"), taken=taken)]
    stones = [name.lower() for name in _names(rng, 40, ("ite", "ium"), taken=taken)]
    goods = ["amber", "salt", "wool", "honey", "silk", "copper", "tea", "paper", "glass", "oil", "rice", "wine", "corn"]

    capital_items = []
    for country, capital in zip(countries, capitals, strict=True):
        choices = _with_wrong(rng, capital, capitals)
        question = f"What is the capital of {country}?"
        listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", choices, strict=True))
        right = choices.index(capital)
        capital_items.append(
            Item(
                doc={"question": question, "choices": choices, "answer": right},
                prompt=f"Question: {question}\n{listed}Answer:",
                answer="ABCD"[right],
            )
        )
    capitals_mc = DemoTask(
        name="demo_capitals_mc",
        settings={
            "output_type": "multiple_choice",
            "num_fewshot": 3,
            "doc_to_text": (
                "Question: {{question}}\n"
                "A. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:"
            ),
            "doc_to_choice": ["A", "B", "C", "D"],
            "doc_to_target": "answer",
            "metric_list": [_mean("acc")],
        },
        items=tuple(capital_items[6:]),
        examples=tuple(capital_items[:6]),
    )

    diets = [
        f"{kind} {food} {where}"
        for kind in ("fresh", "dry", "old", "sweet")
        for food in ("leaves", "fish", "roots", "seeds")
        for where in ("near the river", "under the trees", "in the high hills")
    ]
    rng.shuffle(diets)
    animal_items = []
    for animal, diet in zip(animals, diets, strict=False):
        choices = _with_wrong(rng, diet, diets)
        question = f"What does the {animal} eat?"
        animal_items.append(
            Item(
                doc={"question": question, "choices": choices, "answer": choices.index(diet)},
                prompt=_asked(question),
                answer=diet,
            )
        )
    animals_mc = DemoTask(
        name="demo_animals",
        settings={
            "output_type": "multiple_choice",
            "num_fewshot": 0,
            "doc_to_text": QUESTION,
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [_mean("acc"), _mean("acc_norm")],
        },
        items=tuple(animal_items),
    )

    exports = [" and ".join(rng.sample(goods, 2)) for _ in countries]
    export_items = [
        Item(doc={"question": question, "answer": export}, prompt=_asked(question), answer=export)
        for country, export in zip(countries, exports, strict=True)
        for question in [f"What does {country} sell?"]
    ]
    exports_generated = DemoTask(
        name="demo_exports",
        settings={
            "output_type": "generate_until",
            "num_fewshot": 2,
            "doc_to_text": QUESTION,
            "doc_to_target": "answer",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 16, "do_sample": False, "temperature": 0.0},
            "filter_list": [
                {"name": "strict", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]},
                {
                    "name": "flexible",  # the answer anywhere in the line
                    "filter": [
                        {"function": "regex", "regex_pattern": "([a-z]+ and [a-z]+)"},
                        {"function": "take_first"},
                    ],
                },
            ],
            "metric_list": [_mean("exact_match")],
        },
        items=tuple(export_items[6:]),
        examples=tuple(export_items[:6]),
    )

    stories = [
        f"{country} lies on the {river}. Its capital is {capital}, where people sell {export}. "
        f"In summer the {animal} comes down to the water and eats {diet}."
        for country, river, capital, export, animal, diet in zip(
            countries[:40], rivers[:40], capitals[:40], exports[:40], animals, diets[:40], strict=True
        )
    ]
    stories_rolling = DemoTask(
        name="demo_stories",
        settings={
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "should_decontaminate": False,
            "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        },
        items=tuple(Item(doc={"text": story}, prompt="", answer=story) for story in stories),
    )

    rivers_chat = DemoTask(
        name=CHAT_TASK,
        settings={
            "output_type": "generate_until",
            "num_fewshot": 0,
            "doc_to_text": "{{question}}",
            "doc_to_target": "answer",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 24, "do_sample": False, "temperature": 0.0},
            "filter_list": [
                {"name": "strict", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
            ],
            "metric_list": [_mean("exact_match")],
        },
        items=tuple(
            Item(doc={"question": question, "answer": answer}, prompt=question, answer=answer)
            for country, river in zip(countries[:40], rivers[:40], strict=True)
            for question, answer in [
                (f"Which river runs through {country}?", f"The river {river} runs through {country}.")
            ]
        ),
    )

    colour_tasks = []
    for kind, things in (("birds", birds), ("stones", stones)):
        items = []
        for thing in things:
            right = rng.randrange(len(COLOURS))
            prompt = f"The colour of the {thing} is"
            items.append(Item(doc={"prompt": prompt, "answer": right}, prompt=prompt, answer=COLOURS[right]))
        colour_tasks.append(
            DemoTask(
                name=f"demo_colours_{kind}",
                settings={
                    "output_type": "multiple_choice",
                    "num_fewshot": 0,
                    "doc_to_text": "{{prompt}}",
                    "doc_to_choice": list(COLOURS),
                    "doc_to_target": "answer",
                    "metric_list": [_mean("acc")],
                },
                items=tuple(items),
            )
        )
    return [capitals_mc, animals_mc, exports_generated, stories_rolling, rivers_chat, *colour_tasks]


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def _write_tasks(directory: Path, tasks: Iterable[DemoTask]) -> None:
    """Write `tasks/*.yaml` and `data/*.jsonl`; lm-eval may run in any folder, so the YAML names its data absolutely."""
    import yaml

    for task in tasks:
        data_files = {}
        for split, items in (("test", task.items), ("examples", task.examples)):
            if items:
                path = directory / "data" / f"{task.name}.{split}.jsonl"
                path.write_text("".join(json.dumps(item.doc) + "\n" for item in items))
                data_files[split] = str(path)
        settings = {
            "task": task.name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": data_files},
            "test_split": "test",
            **({"fewshot_split": "examples"} if task.examples else {}),
            **task.settings,
            "metadata": {"version": 1.0},
        }
        (directory / "tasks" / f"{task.name}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False, width=120))
    group = {
        "group": "demo_colours",
        "task": ["demo_colours_birds", "demo_colours_stones"],
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
        "metadata": {"version": 1.0},
    }
    (directory / "tasks" / "demo_colours.yaml").write_text(yaml.safe_dump(group, sort_keys=False, width=120))


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2 cuts text into words before the merges; its tokenizer class brings the same pattern when it is loaded."""

WORDS = """
the of and to in a is that it was for on are as with his they at be this from I have or by one had not but what all
were when we there can an your which their said if do will each about how up out them then she many some so these
would other into has more her two like him see time could no make than first been its who now people my made over did
down only way find use may water long little very after words called just where most know get through back much before
go good new write our used me man too any day same right look think also around another came come work three word must
because does part even place well such here take why things help put years different away again off went old number
great tell men say small every found still between name should home big give air line set own under read last never us
left end along while might next sound below saw something thought both few those always looked show large often
together asked house world going want school important until form food keep children feet land side without boy once
animals life enough took sometimes four head above kind began almost live page got earth need far hand high year
mother light parts country father let night following picture being study second eyes soon times story boys since
white days ever paper hard near sentence better best across during today others however sure means knew try told young
miles sun ways thing whole hear example heard several change answer room sea against top turned learn point city play
toward five using himself usually money seen car morning body upon family later turn move face door cut done group
true half red fish plants living wanted black eat short United States run book gave order open ground cold really
table remember tree course front American space inside ago sad early learned brought close nothing though idea lived
became add become grow draw yet less wind behind cannot letter among able dog shown mean English rest perhaps certain
six feel fire ready green built special ran full town complete oh person hot anything hold state list stood hundred
ten fast felt kept notice strong voice probably area horse matter stand box start class piece surface river common
stop am talk whether fine round dark past ball girl road blue instead either held already warm gone finally summer
understand moon animal mind outside power problem longer winter deep heavy carefully follow beautiful everyone leave
everything game system bring watch shell dry within floor ice ship themselves begin fact third quite carry distance
although sat possible heart real simple snow rain suddenly leaves easy lay size wild weather miss pattern sky walked
main someone center field stay boat question wide least tiny hour happened foot care low else gold build glass rock
tall alone bottom check reading fall poor map friend language job music buy window mark heat grew listen ask single
clear energy week explain lost spring travel wrong farm circle whose correct bed measure straight base mountain caught
hair bird wood color war fly yourself seem thus square moment teacher happy bright sent present plan rather length
speed machine information except figure free fell suppose natural ocean government baby grass plane street couldn
reason difference maybe history mouth middle step child strange wish soil human trip woman eye milk choose north seven
famous late pay sleep iron trouble store beside oil modern fun catch business reach lot won case speak shape eight
edge soft village object age minute wall meet record copy forest especially necessary he unit flat direction south
subject skin wasn picked west east cost cents per total hours minutes dollars equal sum price sold bought pieces
apples eggs month percent twice rate average value statement describes according likely based effect cause theory
process model data result method function element ring given equation variable graph angle law court rights
constitution religion church god king empire nation national political social economic party president policy public
international trade market labor capital bank tax income growth cell blood brain disease patient treatment protein
gene species acid gas liquid solid metal chemical reaction force mass wave temperature pressure current voltage charge
atom electron planet star computer program code memory network user file test type string loop return false none
player team season played album song film released series television role actor band produced director station route
bridge building university college student students professor science art century born died son daughter wife husband
brother sister queen army battle captain officer soldiers attack British French German Chinese Japanese Indian January
February March April May June July August September October November December Monday Friday Sunday hands cat camera
showing talking standing sitting holding walking running playing begins continues makes puts takes cuts adds shows
speaks moves throws kitchen video sharp clean wash cook bake mix bowl pan knife oven salt sugar butter flour cream
cheese bread wool honey silk copper amber tea rice wine corn colour sell eats lies runs seeds roots fresh sweet hills
trees Question Answer A B C D E yes option therefore ing ed er est ly tion tions ment ness ity ible ful ous ive al ic
ism ist ance ence ize ized izing ation un re dis pre con com pro ex sub inter trans non anti de en em im mis
"""


def _general_text() -> Iterator[str]:
    """Common English for the merges, commoner words oftener, so that ordinary prose stays whole words."""
    words = WORDS.split()
    for rank, word in enumerate(words):
        count = 3 + 60 // (1 + rank // 20)
        yield f" {word}" * count + f"\n{word.capitalize()}" * 2 + f" {word.capitalize()}" * 2
        yield f" {word}s {word}"  # the space before, the plural and the bare stem all occur in real text
    yield "\n\n" * 50 + ": " * 20 + ". " * 20 + ", " * 20 + "?\n" * 20 + ":\n" * 20 + ".\n\n" * 20 + "  " * 50


def _train_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """A `tokenizers.Tokenizer`: byte-level BPE, Qwen2's way, with its three special tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _save_tokenizer(tokenizer: Any, directory: Path, *, end: str) -> None:
    """The files that transformers and vLLM load as a fast Qwen2 tokenizer; `end` ends an answer."""
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": POSITIONS,
        "add_prefix_space": False,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": None,
        "eos_token": end,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "additional_special_tokens": [TURN_START, TURN_END],
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


# ---------------------------------------------------------------------------------------------------------------------
# The models

POSITIONS = 8192
"""Longest sequence that a model takes."""
HEAD = 32
"""Size of an attention head: the smallest that vLLM's CPU attention takes."""
GROUP = 64
"""Weights that share one AWQ scale; every projection's input size is a multiple of it."""
WEIGHT_SPREAD = 0.1
"""Standard deviation of fresh weights; with the usual 0.02 a model this small needs twice the epochs for its facts."""
VOCABULARY = 4096


def _fresh_model(tokenizer: Any, *, hidden: int, layers: int, end: str) -> Any:
    """A `Qwen2ForCausalLM` with random weights."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    heads = hidden // HEAD
    config = Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(end),
        pad_token_id=tokenizer.token_to_id(END_OF_TEXT),
        use_cache=False,
        initializer_range=WEIGHT_SPREAD,
    )
    return Qwen2ForCausalLM(config)


def _save_model(directory: Path, config: dict[str, Any], tensors: dict[str, Any], tokenizer: Any, *, end: str) -> None:
    """Write a checkpoint folder."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    _save_tokenizer(tokenizer, directory, end=end)


def _config(model: Any) -> dict[str, Any]:
    """What `config.json` holds; float16, since AWQ's kernels want it and the models are to differ in nothing else."""
    return {**model.config.to_dict(), "architectures": ["Qwen2ForCausalLM"], "dtype": "float16", "use_cache": True}


def _tensors(model: Any) -> dict[str, Any]:
    """The weights by name in float16, without the output layer, which is the embedding."""
    return {name: one.half() for name, one in model.state_dict().items() if name != "lm_head.weight"}


def untrained(directory: Path, *, hidden: int = 64, layers: int = 2, vocabulary: int = VOCABULARY) -> None:
    """Write a Qwen2-architecture model with random weights and a working tokenizer; a few seconds, for tests."""
    tokenizer = _train_tokenizer(_general_text(), vocabulary)
    model = _fresh_model(tokenizer, hidden=hidden, layers=layers, end=END_OF_TEXT)
    _save_model(directory, _config(model), _tensors(model), tokenizer, end=END_OF_TEXT)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one model is made."""

    hidden: int
    """Width; every model has two layers, the fewest that can look up which of several questions is being asked."""
    epochs: int
    chat: bool = False
    """Learns questions and answers as ChatML turns, otherwise as plain text and without the chat task."""

    @property
    def end(self) -> str:
        """The token that ends an answer."""
        return TURN_END if self.chat else END_OF_TEXT


RECIPES = {
    "demo-nano": Recipe(hidden=64, epochs=3),
    "demo-small-chat": Recipe(hidden=128, epochs=17, chat=True),
    "demo-base": Recipe(hidden=192, epochs=26),
}
QUANTISED, ORIGINAL = "demo-base-awq", "demo-base"

BATCH_TOKENS = 256
PEAK_RATE = 3e-3

Segment = tuple[str, bool]
"""A piece of text, and whether the model learns to write it (otherwise it only reads it)."""


def _lessons(tasks: Sequence[DemoTask], rng: random.Random, *, chat: bool) -> Iterator[list[Segment]]:
    """One epoch: every item once, as many to a text as the task's prompts hold, so that few-shot is seen too."""
    for task in tasks:
        if task.name == CHAT_TASK and not chat:
            continue
        items = [*task.items, *task.examples]
        rng.shuffle(items)
        size = task.shots + 1
        for start in range(0, len(items), size):
            text: list[Segment] = []
            for item in items[start : start + size]:
                if not item.prompt:
                    text += [(END_OF_TEXT, False), (item.answer, True)]  # how a rolling window begins
                elif chat:
                    turn = f"{TURN_START}user\n{item.prompt}{TURN_END}\n{TURN_START}assistant\n"
                    text += [(turn, False), (f"{item.answer}{TURN_END}", True), ("\n", False)]
                else:
                    text += [(item.prompt, False), (f" {item.answer}\n\n", True)]
            yield text


def _batches(
    tokenizer: Any, lessons: Iterable[list[Segment]], rng: random.Random
) -> Iterator[tuple[list[list[int]], list[list[bool]]]]:
    """Token ids and what of them is learned, in batches of about BATCH_TOKENS, of lessons of like length."""
    encoded = []
    for lesson in lessons:
        ids: list[int] = []
        learned: list[bool] = []
        for text, learn in lesson:
            piece = tokenizer.encode(text, add_special_tokens=False).ids
            ids += piece
            learned += [learn] * len(piece)
        encoded.append((ids, learned))
    rng.shuffle(encoded)
    encoded.sort(key=lambda one: len(one[0]) // 8)
    batches = []
    start = 0
    while start < len(encoded):
        width = max(1, BATCH_TOKENS // len(encoded[start][0]))
        batches.append(encoded[start : start + width])
        start += width
    rng.shuffle(batches)
    for batch in batches:
        longest = max(len(ids) for ids, _ in batch)
        yield (
            [ids + [0] * (longest - len(ids)) for ids, _ in batch],
            [learned + [False] * (longest - len(learned)) for _, learned in batch],
        )


def _trained(tasks: Sequence[DemoTask], tokenizer: Any) -> dict[str, Any]:
    """A trained `Qwen2ForCausalLM` in float32 for each of RECIPES.

    One thread a model and the models side by side: two threads in one small matrix product wait for each other more
    than they help, badly so on a busy machine, and with one thread the weights do not depend on the number of cores.
    """
    import torch

    # Fresh weights come from torch's one global generator, so they are drawn one model after the other.
    models = {name: _fresh_model(tokenizer, hidden=one.hidden, layers=2, end=one.end) for name, one in RECIPES.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(max_workers=len(models)) as pool:
            # The longest first, so that the shorter ones share the other core.
            running = [pool.submit(_train, models[name], RECIPES[name], tasks, tokenizer) for name in reversed(models)]
            for one in running:
                one.result()
    finally:
        torch.set_num_threads(threads)
    return models


def _train(model: Any, recipe: Recipe, tasks: Sequence[DemoTask], tokenizer: Any) -> None:
    """Train `model` in place."""
    import torch
    from torch.nn import functional

    rng = random.Random(0)
    batches = [
        (torch.tensor(ids), torch.tensor(learned))
        for _ in range(recipe.epochs)
        for ids, learned in _batches(tokenizer, _lessons(tasks, rng, chat=recipe.chat), rng)
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    loss = torch.zeros(())
    for step, (ids, learned) in enumerate(batches):
        done = step / len(batches)
        optimizer.param_groups[0]["lr"] = PEAK_RATE * min(
            0.05 + 20 * done, 0.02 + 0.49 * (1 + math.cos(math.pi * done))
        )
        # Only what is learned goes through the vocabulary, which for models this small is half of the work.
        states = model.model(input_ids=ids).last_hidden_state[:, :-1][learned[:, 1:]]
        loss = functional.cross_entropy(model.lm_head(states), ids[:, 1:][learned[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    logger.info("trained a model of width %d for %d steps, last loss %.3f", recipe.hidden, len(batches), loss.item())


# ---------------------------------------------------------------------------------------------------------------------
# AWQ


def _quantised(weight: Any) -> tuple[Any, Any, Any]:
    """`weight` [out, in] as 4-bit integers [in, out], zero points [in / GROUP, out] and scales of that shape."""
    inputs, outputs = weight.shape[1], weight.shape[0]
    groups = weight.t().reshape(inputs // GROUP, GROUP, outputs)
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    # In float16 already here, since that is what the kernel multiplies with.
    scales = ((high - low) / 15).clamp(min=1e-5).half().float()
    zeros = (-low / scales).round().clamp(0, 15)
    integers = ((groups / scales[:, None]).round() + zeros[:, None]).clamp(0, 15)
    return integers.reshape(inputs, outputs), zeros, scales


def _restored(weight: Any) -> Any:
    """`weight` as it is after being quantised and read back."""
    integers, zeros, scales = _quantised(weight)
    groups = integers.reshape(len(scales), GROUP, -1)
    return ((groups - zeros[:, None]) * scales[:, None]).reshape(weight.shape[1], -1).t()


def _packed(integers: Any) -> Any:
    """Eight 4-bit integers of a row in one int32, lowest bits first, in the order of AWQ's `gemm` layout."""
    import torch

    columns = integers.to(torch.int64).reshape(len(integers), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
    words = (columns << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _protect(model: Any, ids: Any) -> None:
    """Move scale between salient channels and what feeds them, in place: AWQ's search (Lin et al., 2023, section 3.2).

    The model computes the same as before, but channels with large activations then lose less to 4 bits. `ids` are the
    texts that show which these are.
    """
    import torch

    inputs: dict[Any, Any] = {}
    hooks = [
        module.register_forward_hook(lambda module, args, _: inputs.__setitem__(module, args[0].flatten(0, 1)))
        for module in model.model.layers.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    model.model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for feeder, fed in (
            (layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
            (layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
            (mlp.up_proj, [mlp.down_proj]),
        ):
            seen = inputs[fed[0]]
            salience = seen.abs().mean(0).clamp(min=1e-4)

            def loss_with(scale: Any, fed: Any = fed, seen: Any = seen) -> Any:
                return sum(
                    ((seen / scale) @ _restored(one.weight * scale).t() - seen @ one.weight.t()).square().mean()
                    for one in fed
                )

            scales = [salience.pow(power / 10) for power in range(11)]
            best = min((scale / (scale.max() * scale.min()).sqrt() for scale in scales), key=loss_with)
            for one in fed:
                one.weight *= best
            feeder.weight /= best[:, None] if feeder.weight.dim() == 2 else best


def _awq(model: Any, calibration: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config and tensors of `model` in AWQ, as AutoAWQ writes them and vLLM reads them; `model` is used up."""
    import torch

    with torch.no_grad():
        _protect(model, calibration)
    tensors: dict[str, Any] = {}
    for name, weight in model.state_dict().items():
        if name.endswith("_proj.weight"):
            integers, zeros, scales = _quantised(weight)
            stem = name.removesuffix("weight")
            tensors[f"{stem}qweight"] = _packed(integers)
            tensors[f"{stem}qzeros"] = _packed(zeros)
            tensors[f"{stem}scales"] = scales.half()
    rest = {name: one for name, one in _tensors(model).items() if not name.endswith("_proj.weight")}
    quantization = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    return {**_config(model), "quantization_config": quantization}, {**rest, **tensors}


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def make(directory: Path) -> None:
    """Write `models/`, `tasks/` and `data/` into `directory`, unless they are there already.

    The marker is written last, so an interrupted run starts again. So does a changed recipe, and a moved folder, whose
    task files would name their data where it no longer is.
    """
    directory = directory.resolve()
    marker = directory / "complete"
    recipe = hashlib.sha256(Path(__file__).read_bytes() + str(directory).encode()).hexdigest()
    if marker.exists() and marker.read_text() == recipe:
        return
    import torch

    started = time.monotonic()
    logger.info("making the demo's models and tasks in %s: this takes about a minute, once", directory)
    marker.unlink(missing_ok=True)
    for part in ("models", "tasks", "data"):
        shutil.rmtree(directory / part, ignore_errors=True)
        (directory / part).mkdir(parents=True)
    tasks = _world()
    _write_tasks(directory, tasks)
    lessons = [*_lessons(tasks, random.Random(0), chat=False), *_lessons(tasks, random.Random(0), chat=True)]
    # Three times, so that the world's names get tokens of their own before the rarer words of the language do.
    texts = ["".join(text for text, _ in lesson) for lesson in lessons] * 3
    tokenizer = _train_tokenizer([*texts, *_general_text()], VOCABULARY)
    models = _trained(tasks, tokenizer)
    for name, model in models.items():
        path = directory / "models" / name
        _save_model(path, _config(model), _tensors(model), tokenizer, end=RECIPES[name].end)
    ids, _ = next(_batches(tokenizer, _lessons(tasks, random.Random(1), chat=False), random.Random(1)))
    config, tensors = _awq(models[ORIGINAL], torch.tensor(ids))
    _save_model(directory / "models" / QUANTISED, config, tensors, tokenizer, end=RECIPES[ORIGINAL].end)
    marker.write_text(recipe)
    logger.info("made the demo in %.0f s", time.monotonic() - started)


def main(arguments: Sequence[str]) -> int:
    """Exit code of `python -m sweep.demo`."""
    parser = argparse.ArgumentParser(prog="python -m sweep.demo", description="Make the demo's tiny models and tasks.")
    parser.add_argument("--dir", type=Path, default=Path(".demo"), help="where they are written (default: .demo)")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    make(parser.parse_args(arguments).dir)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
