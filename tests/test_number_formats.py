"""Where bf16 has no matrix unit the write rules compute in fp32 and give what they were asked for, and training takes fp32."""

import pytest
import torch
import torch.nn.functional as F

from gam_lm.ops.delta_rule import delta_memory
from gam_lm.ops.mean_rule import mean_memory
from gam_lm.ops.number_formats import product_format
from gam_lm.training.precision import choose_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("tiles", "dtype", "expected"),
    [
        (True, torch.bfloat16, torch.bfloat16), (False, torch.bfloat16, torch.float32), (True, torch.float16, torch.float32),
        (False, torch.float16, torch.float32), (False, torch.float32, torch.float32), (False, torch.float64, torch.float64),
    ],
)  # fmt: skip
def test_a_rule_computes_in_what_is_quick(tiles, dtype, expected, monkeypatch):
    monkeypatch.setattr("gam_lm.ops.number_formats.CPU_HAS_BF16_TILES", tiles)
    assert product_format(dtype, CPU) == expected
    assert product_format(dtype, torch.device("cuda")) == dtype


@pytest.mark.parametrize("tiles", [True, False])
def test_training_takes_bf16_only_with_a_matrix_unit(tiles, monkeypatch):
    monkeypatch.setattr("gam_lm.ops.number_formats.CPU_HAS_BF16", True)
    monkeypatch.setattr("gam_lm.ops.number_formats.CPU_HAS_BF16_TILES", tiles)
    assert choose_dtype("auto", CPU) == (torch.bfloat16 if tiles else torch.float32)
    assert choose_dtype("bf16", CPU) == torch.bfloat16  # whoever names it gets it


@pytest.mark.parametrize("rule", [delta_memory, mean_memory])
def test_without_a_unit_for_bf16_a_rule_is_that_of_fp32_on_the_same_inputs(rule, monkeypatch):
    monkeypatch.setattr("gam_lm.ops.number_formats.CPU_HAS_BF16_TILES", False)
    generator = torch.Generator().manual_seed(0)
    read, write, value = (torch.randn(2, 70, 2, 8, generator=generator).to(torch.bfloat16) for _ in range(3))
    read, write = F.normalize(read.float().abs(), dim=-1).to(torch.bfloat16), F.normalize(write.float().abs(), dim=-1).to(torch.bfloat16)
    gate, log_decay = torch.rand(2, 70, 2, generator=generator), -torch.rand(2, 70, 2, generator=generator)
    bank = torch.randn(2, 8, 8, generator=generator)
    slope = torch.randn(2, 70, 2, 8, generator=generator).to(torch.bfloat16)
    prior = (torch.rand(2, 8, generator=generator) + 1,) if rule is mean_memory else ()

    def run(dtype):
        inputs = [each.detach().to(dtype).requires_grad_() for each in (read, write, value)]
        found, state = rule(*inputs, gate, log_decay, bank, *prior, chunk_size=16)
        found.backward(slope.to(dtype))
        return found, state, [each.grad for each in inputs]

    (low, low_state, low_grads), (wide, wide_state, wide_grads) = run(torch.bfloat16), run(torch.float32)
    assert low.dtype == torch.bfloat16 and all(grad.dtype == torch.bfloat16 for grad in low_grads)
    torch.testing.assert_close(low, wide.to(torch.bfloat16))
    for one, other in zip(low_state, wide_state, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(low_grads, wide_grads, strict=True):
        torch.testing.assert_close(one, other.to(torch.bfloat16))
