"""Inputs of the selective scan, what a kernel makes of them, and how far that is from the recurrence."""

import torch

from gam_lm.config import ModelConfig
from gam_lm.model import LanguageModel

NAMES = ("y", "state", "x", "dt", "A", "B", "C", "first")


def parts(B, T, E=3, N=2):
    """Inputs of the scan and a first state, in float64."""
    x, b, c = (torch.randn(B, T, n, dtype=torch.float64) for n in (E, N, N))
    dt, A = torch.rand(B, T, E, dtype=torch.float64), -3 * torch.rand(N, E, dtype=torch.float64)
    return [x, dt, A, b, c, torch.randn(B, N, E, dtype=torch.float64)]


def taken(rule, values, dtype=torch.float64, device="cpu", index=None):
    """Output, state, and the gradients of all inputs under weights that are the same for every rule."""
    leaves = [each.detach().to(device, dtype).requires_grad_() for each in values]
    y, h = rule(*leaves, **({} if index is None else {"index_BT": index.to(device)}))
    draw = torch.Generator().manual_seed(3)
    wy, wh = (torch.randn(each.shape, generator=draw, dtype=torch.float64).to(device) for each in (y, h))
    ((y.double() * wy).sum() + (h.double() * wh).sum()).backward()
    return [each.detach().double().cpu() for each in (y, h, *(leaf.grad for leaf in leaves))]


def error(x, exact):
    return float((x - exact).norm() / exact.norm().clamp(min=1e-12))


def as_exact(ours, plain, exact, floor):
    """Every error of ``ours`` is below twice that of ``plain`` (or of ``floor``)."""
    for name, a, b, c in zip(NAMES, ours, plain, exact, strict=False):
        assert a.isfinite().all(), name
        assert error(a, c) <= 2 * max(error(b, c), floor), (name, error(a, c), error(b, c))


def same_model(backend, tokens, segments):
    """A model of Mamba on a backend has the logits, gradients and streams of the one in plain PyTorch."""

    def model(name):
        torch.manual_seed(0)
        options = {"mamba": {"backend": name, "state_size": 3}}
        config = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "mixers": ["mamba"], "options": options}
        return LanguageModel(ModelConfig.from_dict(config)).to(tokens.device)

    fast, plain = model(backend), model("torch")
    grads = []
    for each in (fast, plain):
        logits, loss = each(tokens, tokens, segments=segments)
        grads.append([logits, *torch.autograd.grad(loss, list(each.parameters()))])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    cut = tokens.shape[1] - 1
    start, state = fast.stream(tokens[:, :cut])
    torch.testing.assert_close(torch.cat([start, fast.stream(tokens[:, cut:], state)[0]], 1), plain.stream(tokens)[0], rtol=1e-4, atol=1e-5)
