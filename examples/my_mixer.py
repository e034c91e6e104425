"""A mixer of one's own, in one file: y = W_o (SiLU(W_g x) ∘ e), where every channel of e is an exponential moving average of x with a learned decay.

    gam train --data my_text.txt --model moving_average --moving_average.memory 64 --import examples/my_mixer.py
    gam bench --data my_texts/ --models moving_average gam transformer --import examples/my_mixer.py --out runs/mine

`--import` also takes the name of an installed module. Shapes: B rows, T tokens, D = hidden_size.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import nn
from torch.nn.functional import silu

import gam_lm
from gam_lm.errors import checked
from gam_lm.mixers.base import Cost, Mixer, init_linear, residual_branches
from gam_lm.mixers.options import MixerOptions
from gam_lm.ops.segments import read_segments


@checked
class MovingAverageOptions(MixerOptions):
    """A gated exponential moving average of every channel."""

    memory: Annotated[float, Field(gt=1)] = 32.0
    """Tokens that the slowest channel remembers at initialisation; the others remember fewer, down to one."""


class MovingAverage(Mixer):
    """The recurrence is a plain loop over the tokens: easy to read, slow on a GPU."""

    options_type = MovingAverageOptions

    def __init__(self, config):
        super().__init__(config)
        D = config.hidden_size
        self.gate, self.out, self.keep_D = nn.Linear(D, D), nn.Linear(D, D), nn.Parameter(torch.empty(D))

    def forward(self, x_BTD, state=None, *, segments_BT=None):
        (e_BD,) = state or self.initial_state(len(x_BTD), device=x_BTD.device, dtype=x_BTD.dtype)
        segments = read_segments(torch.ones_like(x_BTD[..., 0], dtype=torch.long) if segments_BT is None else segments_BT)
        keep_D, averages, sequence_B = torch.sigmoid(self.keep_D.to(e_BD.dtype)), [], torch.zeros_like(segments.index_BT[:, 0])
        for x_BD, real_B, index_B in zip(x_BTD.unbind(1), segments.real_BT.unbind(1), segments.index_BT.unbind(1), strict=True):
            e_BD = torch.where((index_B == sequence_B)[:, None], e_BD, 0)  # a new sequence forgets
            e_BD = torch.where(real_B[:, None], keep_D * e_BD + (1 - keep_D) * x_BD, e_BD)  # padding touches nothing
            sequence_B = index_B
            averages.append(e_BD)
        return self.out(silu(self.gate(x_BTD)) * torch.stack(averages, 1).to(x_BTD.dtype)), (e_BD,)

    def initial_state(self, batch_size, *, device=None, dtype=None):
        dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        return (torch.zeros(batch_size, self.config.hidden_size, device=device, dtype=dtype),)

    def init_weights(self):
        tokens_D = torch.logspace(0, 1, len(self.keep_D), base=self.options.memory, device=self.keep_D.device)
        self.keep_D.data.copy_((tokens_D - 0.99).log())  # σ of it is 1 − 1/tokens, nearly
        init_linear(self.gate, self.config)
        init_linear(self.out, self.config, residual=residual_branches(self.config, self.options))

    def compiles(self, context):
        return False

    @classmethod
    def cost(cls, config, context):
        D = config.hidden_size
        flops = 4 * D * D + 4 * D
        return Cost(parameters=2 * D * D + 3 * D, forward_flops=flops, decode_flops=flops, activations=6 * D, state_bytes=4 * D)

    @classmethod
    def reach(cls, config):
        return None


gam_lm.register("moving_average", MovingAverageOptions, MovingAverage)
