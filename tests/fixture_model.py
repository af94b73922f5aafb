"""A tiny model with what bends scores in real checkpoints: a BOS that its tokenizer adds, a chat template that renders
it too, and a generation_config.json with a repetition penalty and sampling defaults.

Random weights on the demo's architecture; seconds to make. Its output layer is its embedding, so untrained it repeats
what it reads, which a repetition penalty changes at once.
"""

import json
from pathlib import Path
from typing import Any

from sweep import demo

BOS = "<|begin|>"
PENALTY = 1.3

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% if not (loop.last and not add_generation_prompt) %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def make_fixture_tokenizer(folder: Path) -> Path:
    """A folder with the tokenizer alone, which puts BOS before a text as Llama's do."""
    _save_tokenizer(folder, _tokenizer())
    return folder


def make_fixture_model(folder: Path) -> Path:
    """A folder with the whole checkpoint."""
    tokenizer = _tokenizer()
    model = demo._fresh_model(tokenizer, hidden=64, layers=2, end=demo.TURN_END)
    config = {**demo._config(model), "bos_token_id": tokenizer.token_to_id(BOS)}
    demo._save_model(folder, config, demo._tensors(model), tokenizer, end=demo.TURN_END)
    _save_tokenizer(folder, tokenizer)
    generation = {
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": [tokenizer.token_to_id(demo.TURN_END), tokenizer.token_to_id(demo.END_OF_TEXT)],
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "repetition_penalty": PENALTY,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))
    return folder


def _tokenizer() -> Any:
    from tokenizers import AddedToken, processors

    tokenizer = demo._train_tokenizer(demo._general_text(), 600)
    tokenizer.add_special_tokens([AddedToken(BOS, special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def _save_tokenizer(folder: Path, tokenizer: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": demo.POSITIONS,
        "clean_up_tokenization_spaces": False,
        "bos_token": BOS,
        "eos_token": demo.TURN_END,
        "pad_token": demo.END_OF_TEXT,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
