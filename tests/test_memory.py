"""The written memory against its recurrence, token by token, and where it must equal the paper's retrieval."""

import pytest
import torch

from gam_lm.config import ModelConfig
from gam_lm.mixers.gam import GAMMixer
from gam_lm.mixers.gam_options import GAMOptions
from gam_lm.ops.delta_rule import delta_memory, naive_delta_memory, unit_triangular_inverse
from gam_lm.ops.mean_rule import mean_memory, naive_mean_memory
from gam_lm.ops.retrieval import naive_retrieve, retrieve


def parts(T, B=2, H=2, M=5, D=3, *, one_hot=False, decay=0.3, dtype=torch.float64):
    """Inputs of both rules; ``decay`` is the mean of −log λ."""
    read, write = (torch.randn(B, T, H, M, dtype=dtype).mul(2).softmax(-1) for _ in range(2))
    if one_hot:
        read, write = (torch.nn.functional.one_hot(x.argmax(-1), M).to(dtype) for x in (read, write))
    values = {
        "read_BTHM": read,
        "write_BTHM": write / write.norm(dim=-1, keepdim=True),
        "value_BTHE": torch.randn(B, T, H, D, dtype=dtype),
        "gate_BTH": torch.rand(B, T, H, dtype=dtype),
        "log_decay_BTH": -2 * decay * torch.rand(B, T, H, dtype=dtype),
        "bank_HME": torch.randn(H, M, D, dtype=dtype),
    }
    prior = {"prior_HM": 0.5 + torch.rand(H, M, dtype=dtype)}
    return values, prior


RULES = {"delta": (delta_memory, naive_delta_memory), "mean": (mean_memory, naive_mean_memory)}
every_rule = pytest.mark.parametrize("rule", RULES)


def arguments(rule, *sizes, **options):
    values, prior = parts(*sizes, **options)
    return values | prior if rule == "mean" else values


def near(a, b, tolerance=1e-10):
    a, b = a.detach(), b.detach()
    assert a.isfinite().all()
    assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max()))


def compare(rule, values, chunk, tolerance=1e-10):
    """Outputs, states and the gradients of all inputs, against the recurrence in float64."""
    chunked, by_recurrence = RULES[rule]
    ours = {name: value.clone().requires_grad_() for name, value in values.items()}
    theirs = {name: value.double().requires_grad_() for name, value in values.items()}
    found, state = chunked(**ours, chunk_size=chunk)
    expected, last = by_recurrence(*theirs.values())
    near(found, expected, tolerance)
    states = (last,) if rule == "delta" else last
    for a, b in zip(state, states, strict=True):
        near(a, b, tolerance)
    weight = torch.randn_like(expected)
    (expected * weight).sum().add((states[0] ** 2).sum()).backward()
    (found * weight.to(found.dtype)).sum().add((state[0] ** 2).sum()).backward()
    for name in values:
        near(ours[name].grad, theirs[name].grad, tolerance)


@every_rule
@pytest.mark.parametrize("T", [1, 2, 16, 17, 50, 131])
@pytest.mark.parametrize("chunk", [16, 64])
def test_chunks_equal_the_recurrence(rule, T, chunk):
    compare(rule, arguments(rule, T), chunk)


@every_rule
@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.01, 20.0])
def test_chunks_equal_the_recurrence_for_one_hot_addresses_and_all_decays(rule, one_hot, decay):
    compare(rule, arguments(rule, 70, one_hot=one_hot, decay=decay), 32)


@pytest.mark.parametrize("alike", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_chunks_equal_the_recurrence_for_plain_keys(alike, decay):
    """Keys of any sign and length 1, also where all of them are nearly one and the same and each write corrects the one before."""
    values = arguments("delta", 131, decay=decay)
    common = torch.randn(5, dtype=torch.float64)
    for name in ("read_BTHM", "write_BTHM"):
        values[name] = torch.nn.functional.normalize(alike * common + (1 - alike) * torch.randn_like(values[name]), dim=-1)
    compare("delta", values, 64)


@pytest.mark.parametrize("address", ["keys", "slots"])
def test_the_mixer_is_its_equations(address):
    """The equations of gam_lm.mixers.gam under the delta rule with SiLU gates, token by token in float64, and the gradients of all its parameters."""
    torch.manual_seed(3)
    D, H, S, K, T = 8, 2, 10, 3, 37
    config = ModelConfig(
        vocab_size=7, hidden_size=D,
        options=(GAMOptions(num_heads=H, num_memory_slots=S, conv_kernel_size=K, chunk_size=16, write="delta", write_address=address),),
    )  # fmt: skip
    mixer = GAMMixer(config).double()
    mixer.init_weights()
    for parameter in mixer.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    h = 3 * torch.randn(T, D, dtype=torch.float64)
    memory, silu = mixer.written, torch.nn.functional.silu

    def before(x, conv):
        """K taps over the current row and those before it."""
        padded = torch.cat([x.new_zeros(K - 1, x.shape[1]), x])
        return torch.stack([sum(conv.weight[:, k] * padded[t + k] for k in range(K)) + conv.bias for t in range(len(x))])

    scores = (h @ memory.address.T).unflatten(-1, (H, -1))
    if address == "slots":
        scores = scores * memory.sharpness[:, None]
    write = before(scores.flatten(1), memory.before).unflatten(-1, (H, -1))
    if address == "keys":
        read, write = silu(scores), silu(write)
        lengths = [each.norm(dim=-1, keepdim=True) for each in (read, write)]
        assert all((each < 1).any() and (each > 1).any() for each in lengths)
        read, write = (each / length.clamp(min=1) for each, length in zip((read, write), lengths, strict=True))
    else:
        read, write = scores.softmax(-1), write.softmax(-1)
        write = write / write.norm(dim=-1, keepdim=True)
    strength, step = (h @ memory.write_proj.weight.T + memory.write_proj.bias).chunk(2, -1)
    log_decay = -memory.log_rate.exp() * torch.nn.functional.softplus(step)
    value = (h @ memory.value_proj.weight.T).unflatten(-1, (H, -1))
    seen, _ = naive_delta_memory(*(each[None] for each in (read, write, value, strength.sigmoid(), log_decay)), memory.bank)
    seen = seen[0] / (seen[0].square().mean(-1, keepdim=True) + config.layer_norm_eps).sqrt()
    gates = silu(h @ mixer.gate.weight.T + mixer.gate.bias).split(D, -1)
    expected = gates[0] * before(h, mixer.conv) + (gates[1] * seen.flatten(1) * memory.norm) @ memory.out_proj.weight.T

    found, _ = mixer(h[None])
    near(found[0], expected)
    weight, names = torch.randn_like(expected), [name for name, _ in mixer.named_parameters()]
    ours, theirs = (torch.autograd.grad((y * weight).sum(), list(mixer.parameters())) for y in (found[0], expected))
    assert len(names) == len(ours) and all(grad.abs().max() > 0 for grad in theirs)
    for a, b in zip(ours, theirs, strict=True):
        near(a, b)


@pytest.mark.slow
@every_rule
@pytest.mark.parametrize("chunk", [16, 64, 128])
def test_chunks_equal_the_recurrence_over_a_thousand_tokens(rule, chunk):
    compare(rule, arguments(rule, 1000, 1, 2), chunk)


@every_rule
def test_single_precision_is_near_the_recurrence_in_double(rule):
    compare(rule, arguments(rule, 200, dtype=torch.float32), 64, 1e-4)


@every_rule
def test_bf16_inputs_give_finite_outputs_and_gradients(rule):
    values = {name: value.bfloat16() for name, value in arguments(rule, 100, one_hot=True, decay=20.0).items()}
    values = {name: value.requires_grad_() for name, value in values.items()}
    found, state = RULES[rule][0](**values)
    found.sum().backward()
    assert found.dtype == torch.bfloat16 and found.isfinite().all()
    assert all(each.dtype == torch.float32 and each.isfinite().all() for each in state)
    assert all(value.grad.isfinite().all() for value in values.values())


@every_rule
def test_bf16_values_are_near_the_recurrence_in_double(rule):
    """Products in bf16, three digits; masks, system and state in fp32: no error grows along the sequence."""
    values = {name: value if name in ("gate_BTH", "log_decay_BTH") else value.bfloat16() for name, value in arguments(rule, 400, decay=0.01).items()}
    values = {name: value.float() if value.dtype == torch.float64 else value for name, value in values.items()}
    compare(rule, values, 64, 3e-2)


@every_rule
def test_gradients_equal_finite_differences(rule):
    values = {name: value.requires_grad_() for name, value in arguments(rule, 5, 1, 1, 3, 2).items()}
    assert torch.autograd.gradcheck(lambda *inputs: RULES[rule][0](*inputs, chunk_size=2)[0], tuple(values.values()))


@every_rule
def test_a_state_goes_on_where_it_was_left(rule):
    values = arguments(rule, 40)
    shared = {name: value for name, value in values.items() if not name.startswith(("bank", "prior"))}
    fixed = {name: value for name, value in values.items() if name not in shared}
    whole, last = RULES[rule][0](**values, chunk_size=16)
    state, pieces = None, []
    for start, end in ((0, 7), (7, 8), (8, 39), (39, 40)):
        piece, state = RULES[rule][0](**{name: value[:, start:end] for name, value in shared.items()}, **fixed, state=state, chunk_size=16)
        pieces.append(piece)
    near(torch.cat(pieces, 1), whole)
    for a, b in zip(state, last, strict=True):
        near(a, b)


def test_the_papers_retrieval_is_its_equation():
    """Outputs and gradients of softmax(h Mᵀ) M against a weighted mean of slots, in float64."""
    inputs = [torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True), torch.randn(9, 6, dtype=torch.float64, requires_grad=True)]
    found, expected = retrieve(*inputs), naive_retrieve(*inputs)
    near(found, expected, 1e-12)
    weight = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), inputs) for y in (found, expected)), strict=True):
        near(a, b, 1e-12)


def test_delta_that_never_writes_reads_its_bank_bit_for_bit():
    values, _ = parts(70)
    found, (state,) = delta_memory(**(values | {"gate_BTH": torch.zeros_like(values["gate_BTH"])}))
    assert torch.equal(found, (values["read_BTHM"].transpose(1, 2) @ values["bank_HME"]).transpose(1, 2))
    assert not state.any()


def _per_head(read_BTHM, bank_HME):
    return torch.stack([read_BTHM[:, :, h] @ bank_HME[h] for h in range(len(bank_HME))], 2)


def test_mean_that_never_writes_reads_its_bank():
    values, prior = parts(70)
    found, _ = mean_memory(**(values | prior | {"gate_BTH": torch.zeros_like(values["gate_BTH"])}))
    near(found, _per_head(values["read_BTHM"], values["bank_HME"]), 1e-14)


@every_rule
def test_one_head_with_tied_bank_that_never_writes_is_the_papers_retrieval(rule):
    h, bank = torch.randn(2, 40, 6, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    read = (h @ bank.T).softmax(-1)[:, :, None]
    nothing = torch.zeros(2, 40, 1, dtype=torch.float64)
    prior = {"prior_HM": torch.ones(1, 9, dtype=torch.float64)} if rule == "mean" else {}
    found, _ = RULES[rule][0](read, read, h[:, :, None], nothing, nothing, bank[None], **prior)
    near(found[:, :, 0], retrieve(h, bank), 1e-14)


def test_delta_replaces_what_a_slot_held():
    """With one-hot addresses, gate 1 and no decay a slot holds the last value written to it."""
    values, _ = parts(30, one_hot=True, decay=0.0)
    values |= {"gate_BTH": torch.ones_like(values["gate_BTH"]), "read_BTHM": values["write_BTHM"]}
    found, _ = delta_memory(**values)
    near(found, values["value_BTHE"])


def test_mean_averages_what_was_written():
    """With one slot, gate 1 and no decay it is the running mean of the values and of the bank, which counts as ``prior`` of them."""
    values, _ = parts(12, 1, 1, 1, 3, decay=0.0)
    values |= {"gate_BTH": torch.ones(1, 12, 1, dtype=torch.float64), "prior_HM": torch.full((1, 1), 2.0, dtype=torch.float64)}
    found, _ = mean_memory(**values)
    count = torch.arange(1, 13, dtype=torch.float64)[:, None]
    near(found[0, :, 0], (values["value_BTHE"][0, :, 0].cumsum(0) + 2 * values["bank_HME"][0]) / (count + 2))


def test_the_inverse_is_exact_where_the_doubling_product_is_not():
    A = torch.rand(4, 64, 64, dtype=torch.float64).tril(-1)
    inverse = unit_triangular_inverse(A)
    near(inverse @ (A + torch.eye(64, dtype=torch.float64)), torch.eye(64, dtype=torch.float64).expand(4, 64, 64), 1e-9)
    assert torch.autograd.gradcheck(unit_triangular_inverse, (A[:1, :4, :4].clone().requires_grad_(),))
