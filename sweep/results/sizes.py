"""How large the models of a sweep are, and which are others in fewer bits: from weights that lie here, or names."""

import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path, PurePath
from typing import Any

import msgspec

from sweep.results.reading import Sweep

_QUANTIZED = re.compile(r"(?i)[-_.](awq|gptq|int[48]|fp8|nf4|w\d+a\d+|bnb|4bit|8bit|marlin|nvfp4)(?=[-_.]|$)")


def asked_of(sweep: Sweep, model: str) -> Mapping[str, Any]:
    """What the config says of it, or else its records do."""
    known: Mapping[str, Any] | None = sweep.config.get("models", {}).get(model)
    return known or next((record.settings for record in sweep.records if record.model == model), {})


def billions(sweep: Sweep, model: str) -> float | None:
    """Parameters, from the weights where they lie here unquantised, else from what the model is called.

    A model that is another of the sweep in fewer bits has as many as that one.
    """
    path = str(asked_of(sweep, model).get("path") or "")
    if not is_quantized(sweep, model):
        parameters = _parameters(path)
        if parameters:
            return parameters / 1e9
    elif (full := dict(in_fewer_bits(sweep)).get(model)) and (size := billions(sweep, full)) is not None:
        return size
    for name in (PurePath(path).name, model):
        found = re.search(r"(?i)(?<![a-z0-9.])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", name)
        if found:
            return float(found[1]) / (1 if found[2].lower() == "b" else 1000)
    return None


def sized(billions: float) -> str:
    """`7 B`, `350 M`."""
    return f"{billions:.3g} B" if billions >= 1 else f"{billions * 1000:.3g} M"


class _Index(msgspec.Struct):
    """`model.safetensors.index.json`."""

    weight_map: dict[str, str]


@cache
def _parameters(path: str) -> int | None:
    """Numbers in the safetensors files of a local folder, by their headers; None where they do not tell."""
    total = 0
    try:
        for file in _weights(Path(path)) if path else ():
            with file.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                if length > file.stat().st_size:
                    return None  # no safetensors: a pointer of Git LFS, for one
                header = msgspec.json.decode(opened.read(length), type=dict[str, dict[str, Any]])
            total += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    except (OSError, msgspec.MsgspecError):
        return None  # not for this page to complain about: vLLM has read it or has said why not
    return total or None


def _weights(folder: Path) -> list[Path]:
    """What transformers would load; beside it the same weights may lie in another form (`consolidated.safetensors`)."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
        return [folder / name for name in sorted(set(named.values()))]
    return sorted(folder.glob("model*.safetensors"))


class _Quantization(msgspec.Struct):
    quant_method: str = ""


class _Config(msgspec.Struct):
    """`config.json`."""

    quantization_config: _Quantization | None = None


@cache
def _quant_method(path: str) -> str:
    """What the config of a local folder says; nothing where there is none, or it does not say."""
    try:
        read = msgspec.json.decode((Path(path) / "config.json").read_bytes(), type=_Config) if path else _Config()
    except (OSError, msgspec.MsgspecError):
        return ""
    return read.quantization_config.quant_method if read.quantization_config is not None else ""


def quantization(sweep: Sweep, model: str) -> str:
    """As the sweep asks for it, or the config of its local folder says, or `by its name`; empty for a full model."""
    asked = asked_of(sweep, model)
    path = str(asked.get("path") or "")
    named = _QUANTIZED.search(PurePath(path).name) or _QUANTIZED.search(model)
    return str(asked.get("quantization") or _quant_method(path) or ("by its name" if named else ""))


def is_quantized(sweep: Sweep, model: str) -> bool:
    return bool(quantization(sweep, model))


def in_fewer_bits(sweep: Sweep) -> list[tuple[str, str]]:
    """Models whose name says that they are another of the sweep in fewer bits, asked in the same way, each with it."""
    pairs = []
    for model in sweep.models:
        if not is_quantized(sweep, model):
            continue
        names = {_QUANTIZED.sub("", PurePath(str(asked_of(sweep, model).get("path") or "")).name).lower()}
        names.add(_QUANTIZED.sub("", model).lower())
        for full in sweep.models:
            other = asked_of(sweep, full)
            same = other.get("chat", False) == asked_of(sweep, model).get("chat", False)
            if (
                not is_quantized(sweep, full)
                and same
                and names & {PurePath(str(other.get("path") or "")).name.lower(), full.lower()}
            ):
                pairs.append((model, full))
                break
    return pairs
