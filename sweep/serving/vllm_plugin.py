"""What vLLM 0.32 lacks on CPUs, given to our own servers there by option; imported in vLLM's workers and nowhere else.

`--worker-extension-cls sweep.serving.vllm_plugin.OnCpu`

- AWQ without AVX-512: vLLM picks its 4-bit kernel on every x86 CPU, but leaves it out of the library that it loads on
  AVX2 alone. The server then starts, answers /health and dies at the first request ("'_OpNamespace' '_C' object has no
  attribute 'cpu_gemm_wna16'").
- A sampled request with a seed whose prompt is read in parts: after each part vLLM winds the request's generator back,
  which torch's generators for CPUs cannot do, and the engine dies ("CPU Generator does not use offset").
"""

import torch


class OnCpu:
    """Empty: to find it, vLLM imports this module in the worker before the model loads, and that is all it takes."""


class _Generator(torch.Generator):  # type: ignore[misc]
    """Is not wound back: what is sampled is as random as before, but depends on the parts that its prompt was read in.

    Winding back needs the state before each draw, 5 kB to be copied for every sampled token.
    """

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> None:
        pass


def _gemm_wna16(
    x: torch.Tensor,
    packed: torch.Tensor,
    out: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    pack_factor: int,
    isa_hint: str,  # noqa: ARG001 (part of the operator's signature)
) -> None:
    """Write x @ dequantised weight (+ bias) into `out`: vLLM's operator in plain torch, right but not fast.

    `packed` holds blocks of 16 output columns, each [inputs, 2] words of 8 values; `scales` and `zeros` have a row for
    each group.
    """
    inputs, groups = x.shape[1], scales.shape[0]
    values = _unpacked(packed.view(-1, inputs, 16 // pack_factor).permute(1, 0, 2).reshape(inputs, -1))
    # Without zero points the values are stored with 8 added.
    centre = 8 if zeros is None else _unpacked(zeros).unsqueeze(1)
    weight = (values.view(groups, inputs // groups, -1) - centre) * scales.float().unsqueeze(1)
    result = x.float() @ weight.view(inputs, -1)
    out.copy_(result if bias is None else result + bias.float())


def _unpacked(words: torch.Tensor) -> torch.Tensor:
    """The eight 4-bit values of each int32, lowest bits first: [rows, words] -> [rows, 8 * words]."""
    return ((words.unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15).flatten(1)


def _register() -> torch.library.Library | None:
    """The operator's registration, or None where vLLM brings its own or is not there."""
    if hasattr(torch.ops._C, "cpu_gemm_wna16"):
        return None
    library = torch.library.Library("_C", "FRAGMENT")
    library.define(
        "cpu_gemm_wna16(Tensor input, Tensor q_weight, Tensor(a2!) output, Tensor scales, Tensor? zeros, Tensor? bias, "
        "SymInt pack_factor, str isa_hint) -> ()"
    )
    library.impl("cpu_gemm_wna16", _gemm_wna16, "CPU")
    return library


_registration = _register()  # kept: torch takes the operator back when this is collected

torch.Generator = _Generator  # vLLM makes its own by this name
