"""What vLLM lacks on CPUs: its 4-bit kernel, and generators that can be wound back."""

import pytest

torch = pytest.importorskip("torch")

from sweep.serving import vllm_plugin  # noqa: E402 (needs torch)


@pytest.mark.parametrize("with_zeros", [True, False], ids=["zero points", "symmetric"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_the_operator_multiplies_with_the_dequantised_weight(with_zeros: bool, with_bias: bool) -> None:
    inputs, outputs, group = 128, 96, 64
    source = torch.Generator().manual_seed(0)
    values = torch.randint(0, 16, (inputs, outputs), generator=source)
    zeros = torch.randint(0, 16, (inputs // group, outputs), generator=source)
    scales = torch.rand(inputs // group, outputs, generator=source).half()
    bias = torch.randn(outputs, generator=source).half() if with_bias else None
    x = torch.randn(5, inputs, generator=source).half()
    centre = zeros if with_zeros else torch.full_like(zeros, 8)
    weight = (values - centre.repeat_interleave(group, 0)) * scales.float().repeat_interleave(group, 0)
    expected = x.float() @ weight + (0 if bias is None else bias.float())

    # vLLM keeps the words of 16 output columns together: [outputs / 16, inputs, 2].
    packed = _words(values).view(inputs, -1, 2).permute(1, 0, 2).reshape(outputs // 16, -1)
    out = torch.empty(5, outputs, dtype=torch.float16)
    vllm_plugin._gemm_wna16(x, packed, out, scales, _words(zeros) if with_zeros else None, bias, 8, "vec")
    torch.testing.assert_close(out.float(), expected, rtol=2e-3, atol=2e-2)


def test_a_seeded_generator_draws_as_torchs_own_and_takes_being_wound_back() -> None:
    ours, own = torch.Generator(device="cpu"), torch._C.Generator(device="cpu")
    for generator in (ours, own):
        generator.manual_seed(3)
    # vLLM does this after each part of a prompt; torch's own raises.
    ours.set_offset(ours.get_offset() - 4)
    with pytest.raises(RuntimeError, match="does not use offset"):
        own.set_offset(own.get_offset() - 4)
    assert torch.rand(5, generator=ours).tolist() == torch.rand(5, generator=own).tolist()


def _words(values: "torch.Tensor") -> "torch.Tensor":
    """[rows, columns] of 4-bit values -> [rows, columns / 8] of int32, the first column in the lowest bits."""
    return (values.view(len(values), -1, 8) << torch.arange(0, 32, 4)).sum(-1).to(torch.int32)
