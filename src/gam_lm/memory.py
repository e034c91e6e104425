"""The global path: a memory of slots, read by softmax retrieval, and the two rules by which a sequence writes it.

    mean     Z_t = λ_t Z_{t−1} + b_t a_t       S_t = λ_t S_{t−1} + b_t a_t v_tᵀ       g_t = Σ_m r_tm (c_m V0_m + S_tm) / (c_m + Z_tm)
    delta    D_t = λ_t D_{t−1} + b_t a_t (v_t − (V0 + λ_t D_{t−1})ᵀ a_t)ᵀ              g_t = (V0 + D_t)ᵀ r_t

r and a are where a token reads and writes, v what it writes, b ∈ [0, 1] how strongly, λ = exp(log_decay) ≤ 1 what the memory keeps, V0 what it holds
before a word was read, c how many written values V0 counts for. Both rules run in chunks of L tokens: inside a chunk all is matrix products under the mask
exp(G_i − G_j), i ≥ j, where G is the running sum of log λ, so that no exponent is ever positive; from chunk to chunk T/L steps carry the state.

Under the delta rule a token corrects what the ones before it wrote, so that what they really write, W, solves a unit-triangular system. With
A = tril(b (a aᵀ) ∘ mask, −1), U = (I + A)⁻¹ b (v − a V0) and Y = (I + A)⁻¹ b e^G a it is W = U − Y D for the state D at the chunk's start: the WY form of
Yang et al. (arXiv 2406.06484) with the decay of Gated DeltaNet (arXiv 2412.06464), on the deviation from V0.

Shapes: B rows, T tokens, H heads, M slots per head, D values per slot, J chunks of L tokens, N = B·H.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gam_lm.errors import InputError, MissingExtraError


def retrieve(h_BTD: Tensor, memory_MD: Tensor) -> Tensor:
    """softmax(h Mᵀ) M: the paper's retrieval, in which the slots are both keys and values.

    Args:
        h_BTD: queries.
        memory_MD: the bank.

    Returns:
        A mixture of slots for each token (B, T, D).
    """
    return (h_BTD @ memory_MD.T).softmax(-1) @ memory_MD


def delta_memory(
    read_BTHM: Tensor,
    write_BTHM: Tensor,
    value_BTHD: Tensor,
    gate_BTH: Tensor,
    log_decay_BTH: Tensor,
    bank_HMD: Tensor,
    state: tuple[Tensor, ...] | None = None,
    *,
    chunk_size: int = 64,
    index_BT: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor]]:
    """A memory whose slots are corrected towards what the sequence wrote last.

    Args:
        read_BTHM: r.
        write_BTHM: a, of length ≤ 1, or the memory may grow without bound.
        value_BTHD: v.
        gate_BTH: b in [0, 1]; 0 writes nothing.
        log_decay_BTH: log λ ≤ 0; 0 forgets nothing.
        bank_HMD: V0.
        state: (D,) of shape (B, H, M, D) after the tokens before; None starts the sequences.
        chunk_size: L, of no influence on the result but rounding.
        index_BT: number of sequence starts in the row so far (see gam_lm.segments); the memory is V0 again where it changes.

    Returns:
        g (B, T, H, D), what each token reads, and the state, both in fp32, or fp64 where an input is.
    """
    with torch.autocast(read_BTHM.device.type, enabled=False):
        read, write, value, gate, log_decay, bank_HMD = _wide(read_BTHM, write_BTHM, value_BTHD, gate_BTH, log_decay_BTH, bank_HMD)
        D_BHMD = state[0].to(bank_HMD.dtype) if state else bank_HMD.new_zeros(len(read), *bank_HMD.shape)
        if read.shape[1] == 1:
            return _delta_step(read, write, value, gate, log_decay, bank_HMD, D_BHMD, index_BT)
        time = _Chunks(log_decay, index_BT, chunk_size)
        r_NJLM, a_NJLM, v_NJLD, b_NJL1 = (time.split(each) for each in (read, write, value, gate[..., None]))
        unwritten_NJLD = v_NJLD - _by_head(a_NJLM, bank_HMD)
        inverse_NJLL = unit_triangular_inverse((a_NJLM @ a_NJLM.mT * time.mask_NJLL * b_NJL1).tril(-1))
        U_NJLD = inverse_NJLL @ (unwritten_NJLD * b_NJL1)
        Y_NJLM = inverse_NJLL @ (a_NJLM * (b_NJL1 * time.from_start_NJL1))
        into_NJLM = a_NJLM * time.to_end_NJL1

        D_NMD = D_BHMD.flatten(0, 1)
        starts, written = [], []
        for U_NLD, Y_NLM, into_NLM, keep_N11 in zip(*(each.unbind(1) for each in (U_NJLD, Y_NJLM, into_NJLM, time.keep_NJ11)), strict=True):
            W_NLD = torch.baddbmm(U_NLD, Y_NLM, D_NMD, alpha=-1)
            starts.append(D_NMD)
            written.append(W_NLD)
            D_NMD = torch.baddbmm(keep_N11 * D_NMD, into_NLM.mT, W_NLD)

        seen_NJLL = r_NJLM @ a_NJLM.mT * time.mask_NJLL
        g_NJLD = _by_head(r_NJLM, bank_HMD) + (r_NJLM * time.from_start_NJL1) @ torch.stack(starts, 1) + seen_NJLL @ torch.stack(written, 1)
        return time.join(g_NJLD), (D_NMD.view_as(D_BHMD),)


def fla_delta_memory(
    read_BTHM: Tensor,
    write_BTHM: Tensor,
    value_BTHD: Tensor,
    gate_BTH: Tensor,
    log_decay_BTH: Tensor,
    bank_HMD: Tensor,
    state: tuple[Tensor, ...] | None = None,
    *,
    chunk_size: int = 64,
    index_BT: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor]]:
    """:func:`delta_memory` by flash-linear-attention's kernel of the gated delta rule, on a GPU: products in bf16, sums in fp32.

    On the deviation from V0 the rule is theirs, with key a and query r. A single token, or rows of several sequences, take :func:`delta_memory`.

    Raises:
        MissingExtraError: where the package is not installed.
        InputError: on a device it has no kernel for.
    """
    if read_BTHM.shape[1] == 1 or index_BT is not None:
        return delta_memory(
            read_BTHM, write_BTHM, value_BTHD, gate_BTH, log_decay_BTH, bank_HMD, state, chunk_size=chunk_size, index_BT=index_BT
        )
    if read_BTHM.device.type != "cuda":
        raise InputError(f"backend is 'fla' on {read_BTHM.device.type}: flash-linear-attention runs on a GPU, use backend='torch'")
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError as error:
        raise MissingExtraError("flash-linear-attention", "fla", "backend 'fla'") from error
    with torch.autocast("cuda", enabled=False):
        read, write, value, gate, log_decay, bank_HMD = _wide(read_BTHM, write_BTHM, value_BTHD, gate_BTH, log_decay_BTH, bank_HMD)
        unwritten = value - torch.einsum("bthm,hmd->bthd", write, bank_HMD)
        low = torch.bfloat16
        g_BTHD, D_BHMD = chunk_gated_delta_rule(
            read.to(low), write.to(low), unwritten.to(low), log_decay, gate, scale=1.0, initial_state=state[0].float() if state else None,
            output_final_state=True,
        )  # fmt: skip
        return torch.einsum("bthm,hmd->bthd", read, bank_HMD) + g_BTHD.float(), (D_BHMD,)


def mean_memory(
    read_BTHM: Tensor,
    write_BTHM: Tensor,
    value_BTHD: Tensor,
    gate_BTH: Tensor,
    log_decay_BTH: Tensor,
    bank_HMD: Tensor,
    prior_HM: Tensor,
    state: tuple[Tensor, ...] | None = None,
    *,
    chunk_size: int = 64,
    index_BT: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A memory whose slots hold decayed weighted means of the values that were written to them.

    Args:
        read_BTHM: r.
        write_BTHM: a ≥ 0.
        value_BTHD: v.
        gate_BTH: b in [0, 1]; 0 writes nothing.
        log_decay_BTH: log λ ≤ 0; 0 forgets nothing.
        bank_HMD: V0.
        prior_HM: c > 0.
        state: (S, Z) of shapes (B, H, M, D) and (B, H, M) after the tokens before; None starts the sequences.
        chunk_size: L, of no influence on the result but rounding.
        index_BT: number of sequence starts in the row so far (see gam_lm.segments); the memory is V0 again where it changes.

    Returns:
        g (B, T, H, D), what each token reads, and the state, both in fp32, or fp64 where an input is.
    """
    with torch.autocast(read_BTHM.device.type, enabled=False):
        read, write, value, gate, log_decay, bank_HMD, prior_HM = _wide(
            read_BTHM, write_BTHM, value_BTHD, gate_BTH, log_decay_BTH, bank_HMD, prior_HM
        )
        new = bank_HMD.new_zeros
        S_BHMD, Z_BHM = (each.to(bank_HMD.dtype) for each in state) if state else (new(len(read), *bank_HMD.shape), new(len(read), *prior_HM.shape))
        prior_bank_HMD = prior_HM[..., None] * bank_HMD
        write = write * gate[..., None]
        if read.shape[1] == 1:
            return _mean_step(read, write, value, log_decay, prior_bank_HMD, prior_HM, S_BHMD, Z_BHM, index_BT)
        time = _Chunks(log_decay, index_BT, chunk_size)
        r_NJLM, a_NJLM, v_NJLD = (time.split(each) for each in (read, write, value))
        into_NJML = (a_NJLM * time.to_end_NJL1).mT
        S_NJMD, S_NMD = _carried(into_NJML @ v_NJLD, time.keep_NJ11, S_BHMD.flatten(0, 1))
        Z_NJM1, Z_NM1 = _carried(into_NJML.sum(-1, keepdim=True), time.keep_NJ11, Z_BHM.flatten(0, 1)[..., None])

        Z_NJLM = time.mask_NJLL @ a_NJLM + time.from_start_NJL1 * Z_NJM1.mT
        share_NJLM = r_NJLM / (time.heads(prior_HM)[:, None, None] + Z_NJLM)
        seen_NJLL = share_NJLM @ a_NJLM.mT * time.mask_NJLL
        g_NJLD = _by_head(share_NJLM, prior_bank_HMD) + (share_NJLM * time.from_start_NJL1) @ S_NJMD + seen_NJLL @ v_NJLD
        return time.join(g_NJLD), (S_NMD.view_as(S_BHMD), Z_NM1.view_as(Z_BHM))


class _Chunks:
    """The layout in chunks, and how much of anything lasts from one place to another: 0 between different sequences."""

    def __init__(self, log_decay_BTH: Tensor, index_BT: Tensor | None, chunk_size: int) -> None:
        self.B, self.T, self.H = log_decay_BTH.shape
        self.L = min(chunk_size, self.T)
        sum_NJL = self.split(log_decay_BTH[..., None])[..., 0].cumsum(-1)
        apart_NJLL = sum_NJL[..., :, None] - sum_NJL[..., None, :]
        later_LL = torch.ones(self.L, self.L, dtype=torch.bool, device=sum_NJL.device).tril()
        lasts = later_LL
        from_start_NJL, to_end_NJL, keep_NJ = sum_NJL.exp(), (sum_NJL[..., -1:] - sum_NJL).exp(), sum_NJL[..., -1].exp()
        if index_BT is not None:
            if self.missing:
                index_BT = torch.cat([index_BT, index_BT[:, -1:].expand(-1, self.missing)], 1)
            index_NJL = index_BT.unflatten(1, (-1, self.L)).repeat_interleave(self.H, 0)
            before_NJ1 = F.pad(index_NJL[:, :-1, -1:], (0, 0, 1, 0))  # the sequence that the chunk's first token would go on with
            end_NJ1 = index_NJL[..., -1:]
            lasts = later_LL & (index_NJL[..., :, None] == index_NJL[..., None, :])
            from_start_NJL = from_start_NJL * (index_NJL == before_NJ1)
            to_end_NJL = to_end_NJL * (index_NJL == end_NJ1)
            keep_NJ = keep_NJ * (before_NJ1 == end_NJ1)[..., 0]
        self.mask_NJLL = apart_NJLL.masked_fill(~lasts, -torch.inf).exp()
        self.from_start_NJL1, self.to_end_NJL1, self.keep_NJ11 = from_start_NJL[..., None], to_end_NJL[..., None], keep_NJ[..., None, None]

    @property
    def missing(self) -> int:
        """Tokens that fill the last chunk: zeros, which write nothing and forget nothing."""
        return -self.T % self.L

    def split(self, x_BTHX: Tensor) -> Tensor:
        """(B, T, H, X) to (N, J, L, X)."""
        x_BHTX = F.pad(x_BTHX.transpose(1, 2), (0, 0, 0, self.missing)) if self.missing else x_BTHX.transpose(1, 2)
        return x_BHTX.reshape(self.B * self.H, -1, self.L, x_BTHX.shape[-1])

    def join(self, x_NJLX: Tensor) -> Tensor:
        """The inverse of :meth:`split`."""
        return x_NJLX.flatten(1, 2).unflatten(0, (self.B, self.H))[:, :, : self.T].transpose(1, 2)

    def heads(self, x_HX: Tensor) -> Tensor:
        """(H, X) to (N, X), the same in every row."""
        return x_HX.expand(self.B, *x_HX.shape).flatten(0, 1)


def unit_triangular_inverse(A_XLL: Tensor) -> Tensor:
    """(I + A)⁻¹ of strictly lower triangular matrices, by substitution."""
    inverse_XLL: Tensor = _UnitTriangularInverse.apply(A_XLL)
    return inverse_XLL


class _UnitTriangularInverse(torch.autograd.Function):
    """d(X) = −X dA X spares the second substitution that the solver's own gradient takes."""

    @staticmethod
    def forward(ctx: Any, A_XLL: Tensor) -> Tensor:
        eye_LL = torch.eye(A_XLL.shape[-1], dtype=A_XLL.dtype, device=A_XLL.device)
        inverse_XLL = torch.linalg.solve_triangular(A_XLL, eye_LL.expand_as(A_XLL), upper=False, unitriangular=True)
        ctx.save_for_backward(inverse_XLL)
        return inverse_XLL

    @staticmethod
    def backward(ctx: Any, grad_XLL: Tensor) -> Tensor:
        (inverse_XLL,) = ctx.saved_tensors
        return -(inverse_XLL.mT @ grad_XLL @ inverse_XLL.mT).tril(-1)


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All in fp32, or in fp64 where one is."""
    dtype = torch.float32
    for each in tensors:
        dtype = torch.promote_types(dtype, each.dtype)
    return tuple(each.to(dtype) for each in tensors)


def _by_head(x_NJLM: Tensor, bank_HMD: Tensor) -> Tensor:
    """Every head's addresses times its own bank."""
    N, J, L, M = x_NJLM.shape
    return (x_NJLM.reshape(-1, len(bank_HMD), J * L, M) @ bank_HMD).view(N, J, L, -1)


def _carried(added_NJXX: Tensor, keep_NJ11: Tensor, first_NXX: Tensor) -> tuple[Tensor, Tensor]:
    """The state at the start of every chunk (N, J, …) and after the last (N, …): x_{j+1} = keep_j x_j + added_j."""
    states = [first_NXX]
    for added_NXX, keep_N11 in zip(added_NJXX.unbind(1), keep_NJ11.unbind(1), strict=True):
        states.append(torch.addcmul(added_NXX, keep_N11, states[-1]))
    return torch.stack(states[:-1], 1), states[-1]


def _last(log_decay_B1H: Tensor, index_B1: Tensor | None) -> Tensor:
    """λ of a single token (B, H, 1, 1), 0 where it starts a sequence."""
    keep_BH = log_decay_B1H[:, 0].exp()
    if index_B1 is not None:
        keep_BH = keep_BH * (index_B1 == 0)
    return keep_BH[..., None, None]


def _delta_step(
    r: Tensor, a: Tensor, v: Tensor, b: Tensor, log_decay: Tensor, bank_HMD: Tensor, D_BHMD: Tensor, index_B1: Tensor | None
) -> tuple[Tensor, tuple[Tensor]]:
    """The recurrence as it stands, for one token."""
    D_BHMD = _last(log_decay, index_B1) * D_BHMD
    r_BH1M, a_BH1M, v_BH1D = r.transpose(1, 2), a.transpose(1, 2), v.transpose(1, 2)
    W_BH1D = b.transpose(1, 2)[..., None] * (v_BH1D - a_BH1M @ (bank_HMD + D_BHMD))
    D_BHMD = D_BHMD + a_BH1M.mT * W_BH1D
    return (r_BH1M @ (bank_HMD + D_BHMD)).transpose(1, 2), (D_BHMD,)


def _mean_step(
    r: Tensor, a: Tensor, v: Tensor, log_decay: Tensor, prior_bank_HMD: Tensor, prior_HM: Tensor, S_BHMD: Tensor, Z_BHM: Tensor, index_B1: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The recurrence as it stands, for one token."""
    keep_BH11 = _last(log_decay, index_B1)
    a_BHM = a[:, 0]
    S_BHMD = keep_BH11 * S_BHMD + a_BHM[..., None] * v.transpose(1, 2)
    Z_BHM = keep_BH11[..., 0] * Z_BHM + a_BHM
    share_BHM = r[:, 0] / (prior_HM + Z_BHM)
    return (share_BHM[..., None, :] @ (prior_bank_HMD + S_BHMD)).transpose(1, 2), (S_BHMD, Z_BHM)
