"""The options of GAM's mixer (gam_lm.mixers.gam). Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from gam_lm.errors import InputError, checked
from gam_lm.mixers.options import MixerOptions, Positive, check_heads, default_heads


@checked
class GAMOptions(MixerOptions):
    """The defaults are the recommended memory: delta rule, plain keys, SiLU gates. `published` gives the paper's."""

    memory: Literal["bank", "attention", "self_attention"] = "bank"
    """What the global path reads: a bank of slots; or over all tokens, with a state that grows, softmax attention by the keys of the memory (attention), or
    by queries and keys of its own with rotary positions, as in a Llama block (self_attention)."""
    write: Literal["none", "mean", "delta"] = "delta"
    """What the sequence writes into the bank: nothing (the paper's static bank), a decayed weighted mean of the values that came to a slot, or the
    difference to what the slot held."""
    write_address: Literal["slots", "keys"] | None = None
    """Where a written bank is addressed: softmax over learned slots, or plain keys (SiLU, length 1); by default keys, and slots for the mean."""
    write_gate: Literal["learned", "closed"] = "learned"
    """How strongly a token writes: as it learns to, or not at all, with the same parameters (what is writing worth?)."""
    max_write: Annotated[float, Field(gt=0, le=2)] = 1.0
    """The strongest write of the delta rule: 1, or up to 2, with which the memory can flip a sign and track states."""
    num_memory_slots: Positive | None = None
    """Slots of a block's bank in total, divided over the heads of a written one; with plain keys, the width of the keys. By default hidden_size; of no
    meaning to self_attention."""
    num_heads: Positive | None = None
    """Heads of a written memory or of the attention in its place; by default 4, and more where each would be wider than 64."""
    conv_kernel_size: Positive = 3
    """Taps of the causal convolution of the local path, and of the one that addresses writes; the current token is included."""
    fusion: Literal["gate", "sum", "global", "local"] = "gate"
    """How the two paths meet: gated, summed, or one of them alone (the published ablation)."""
    keep_gate: bool = False
    """Whether a path that stands alone keeps its gate, which the published ablation drops with the other path."""
    gate_activation: Literal["sigmoid", "silu"] = "silu"
    """What the gates pass through: x·σ(x), open at initialisation, or σ(x) as in the paper."""
    static_path: bool = False
    """Whether the paper's static bank stands beside a written one."""
    chunk_size: Positive = 64
    """Tokens that the written memory handles at once: speed and memory only, never the result."""
    backend: Literal["auto", "torch", "fla", "triton"] = "auto"
    """torch, or a kernel of the delta rule for a GPU: flash-linear-attention's, or the library's own (triton), which auto takes on an NVIDIA GPU
    where triton is installed, else torch; a single token that is decoded is then one step in torch."""

    def __post_init__(self) -> None:
        alone = self.fusion in ("global", "local")
        if self.keep_gate and not alone:
            raise InputError(f"keep_gate is True with fusion={self.fusion!r}: it is for 'global' and 'local'; both paths with their gates are fusion='gate'")
        if self.memory != "bank":
            if self.write != "delta":
                raise InputError(f"write is {self.write!r} with memory={self.memory!r}, which has no bank to write: leave write out")
            if self.fusion == "local":
                raise InputError(f"fusion is 'local' with memory={self.memory!r}, which is the global path: use 'gate', 'sum' or 'global'")
        if not self.written:
            self._check_unwritten()
        if self.addresses_writes:
            if self.conv_kernel_size < 2:
                raise InputError(
                    f"conv_kernel_size is {self.conv_kernel_size}: a written memory addresses a write by what came before its value, use 2 or more"
                )
            if self.fusion == "local":
                raise InputError(f"fusion is 'local' with write={self.write!r}: a written memory is the global path, use write='none' or another fusion")
        if self.write == "mean" and self.write_address == "keys":
            raise InputError("write_address is 'keys' with write='mean', whose weights are shares of slots: use 'slots', or write='delta'")
        if self.max_write != 1 and self.write == "mean":
            raise InputError(f"max_write is {self.max_write} with write={self.write!r}: it belongs to write='delta'")
        if self.backend in ("fla", "triton") and (self.write != "delta" or self.memory != "bank"):
            raise InputError(f"backend is {self.backend!r}, which has the delta rule alone: use write='delta' with memory='bank', or backend='auto'")

    def _check_unwritten(self) -> None:
        """What says how a bank is written is refused where none is, not passed over; write_address='keys' is what another memory's default came to."""
        where = f"write={self.write!r}" if self.memory == "bank" else f"memory={self.memory!r}"
        for field, idle in (("write_address", (None, "keys")), ("write_gate", ("learned",)), ("max_write", (1,)), ("static_path", (False,))):
            if (value := getattr(self, field)) not in idle:
                raise InputError(f"{field} is {value!r} with {where}: it belongs to a bank that is written, leave it out")

    @property
    def written(self) -> bool:
        """Whether the sequence writes into the bank."""
        return self.memory == "bank" and self.write != "none"

    @property
    def addresses_writes(self) -> bool:
        """Whether a convolution of the memory's keys says where a token writes."""
        return self.written or self.memory == "attention"

    @property
    def has_heads(self) -> bool:
        """Whether the memory divides its width over heads."""
        return self.written or self.memory != "bank"

    @property
    def keeps_inputs(self) -> bool:
        """Whether the last inputs of the mixer are state: the convolution of the local path reads them, and so does that of where to write."""
        return self.fusion != "global" or self.addresses_writes

    @property
    def gated_paths(self) -> int:
        """Paths that have a gate."""
        return 2 if self.fusion == "gate" else int(self.keep_gate)

    def resolved(self, hidden_size: int) -> GAMOptions:
        """See `MixerOptions.resolved`."""
        heads = self.num_heads or default_heads(hidden_size)
        slots = self.num_memory_slots or hidden_size
        if self.has_heads:
            check_heads("num_heads", heads, hidden_size)
        if self.memory == "self_attention":
            if hidden_size // heads % 2:
                raise InputError(f"num_heads is {heads} with memory='self_attention', which needs an even width per head and finds {hidden_size // heads}")
            return self.replace(num_heads=heads, num_memory_slots=None, write_address=None)
        if self.has_heads and slots % heads:
            raise InputError(f"num_memory_slots is {slots}, which num_heads={heads} does not divide: every head has the same number of slots")
        address = self.write_address or ("slots" if self.write == "mean" else "keys")
        return self.replace(num_heads=heads, num_memory_slots=slots, write_address=address if self.written else None)

    def enlarged(self, ratio: float) -> GAMOptions:
        """See `MixerOptions.enlarged`."""
        heads = max(1, round((self.num_heads or 1) * ratio))
        slots = heads * max(1, round(self.num_memory_slots * ratio / heads)) if self.num_memory_slots else None
        return self.replace(num_heads=heads, num_memory_slots=slots)

    @classmethod
    def published(cls, **changes: Any) -> GAMOptions:
        """The paper's memory: static, sigmoid gates, 512 slots, 3 taps."""
        published: dict[str, Any] = {"write": "none", "gate_activation": "sigmoid", "num_memory_slots": 512}
        return cls(**published | changes)
