"""The limits of the model's arithmetic: no token at all, decays that forget everything, rates that ran away, temperatures near 0."""

import math

import pytest
import torch
import torch.nn.functional as F
from stacks import STACKS, stack

from gam_lm.errors import InputError
from gam_lm.inference.continuation import Sampling
from gam_lm.inference.generation import draw, generate
from gam_lm.model import LanguageModel
from gam_lm.ops.delta_rule import delta_memory, naive_delta_memory
from gam_lm.ops.mean_rule import mean_memory, naive_mean_memory

KINDS = ("gam-static", "gam-mean", "gam-slots", "gam-paper", *STACKS)


def model_of(kind):
    torch.manual_seed(0)
    return LanguageModel(stack(kind)).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("segmented", [False, True])
def test_no_token_changes_no_state(kind, segmented):
    model, none = model_of(kind), torch.zeros(2, 0, dtype=torch.long)
    segments = none if segmented else None
    logits, loss = model(none, none, segments=segments)
    assert logits.shape == (2, 0, 40) and loss == 0
    first, second = torch.randint(40, (2, 5)), torch.randint(40, (2, 3))
    _, state = model.stream(first)
    _, same = model.stream(none, state, segments=segments)
    assert torch.equal(model.stream(second, same)[0], model.stream(second, state)[0])
    _, start = model.stream(none)
    torch.testing.assert_close(model.stream(first, start)[0], model.stream(first)[0])


def rule_inputs(B=2, T=11, H=2, M=4, E=3):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    read, write = (F.normalize(normal(B, T, H, M).abs(), dim=-1) for _ in range(2))
    return read, write, normal(B, T, H, E), normal(B, T, H).sigmoid(), -normal(B, T, H).abs(), normal(H, M, E)


@pytest.mark.parametrize("least", [-math.inf, -1e300, -1e30, -1e3])
@pytest.mark.parametrize("rule", ["delta", "mean"])
def test_a_decay_to_nothing_is_the_limit(rule, least):
    read, write, value, gate, log_decay, bank = rule_inputs()
    log_decay[:, [0, 3, 6, 7]] = least
    log_decay[1] = least
    log_decay.requires_grad_()
    if rule == "delta":
        out, state = delta_memory(read, write, value, gate, log_decay, bank, chunk_size=4)
        expected, last = naive_delta_memory(read, write, value, gate, log_decay.detach(), bank)
        lasts = (last,)
    else:
        prior = torch.ones(bank.shape[:2], dtype=torch.float64)
        out, state = mean_memory(read, write, value, gate, log_decay, bank, prior, chunk_size=4)
        expected, lasts = naive_mean_memory(read, write, value, gate, log_decay.detach(), bank, prior)
    assert (out - expected).abs().max() < 1e-12
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(state, lasts, strict=True))
    out.sum().backward()
    assert log_decay.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["gam", "gated_deltanet", "mamba"])
def test_a_rate_that_ran_away_stays_a_number(kind):
    model = model_of(kind)
    for name, parameter in model.named_parameters():
        if name.endswith(("log_rate", "A_log")):
            torch.nn.init.constant_(parameter, 1e4)
    tokens = torch.randint(40, (2, 20))
    _, loss = model(tokens, tokens)
    loss.backward()
    assert loss.isfinite() and all(each.grad.isfinite().all() for each in model.parameters())


@pytest.mark.parametrize("temperature", [0.0, 1e-40, 5e-324, 1e-5])
def test_a_temperature_near_0_takes_the_likeliest(temperature):
    logits = torch.tensor([1.0, 3.0, 2.999, -5.0])
    assert int(draw(logits, temperature, None, 1.0, torch.Generator())) == 1


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", math.nan), ("temperature", math.inf), ("temperature", -1.0), ("top_p", math.nan), ("top_p", 0.0), ("top_k", 0), ("seed", 2**63)]
)
def test_sampling_that_cannot_be_is_one_line(field, value):
    with pytest.raises(InputError, match=field):
        next(generate(model_of("gam"), [1], **{field: value}))
    with pytest.raises(InputError, match=field):
        Sampling(**{field: value})
