"""GAM models in Hugging Face's transformers: importing this package makes the Auto classes know ``model_type`` "gam".

    import gam_lm.hf
    model = AutoModelForCausalLM.from_pretrained("runs/gam")        a run directory is a model directory

The only room that imports transformers (extra ``hf``).
"""

from __future__ import annotations

from gam_lm.errors import MissingExtraError

try:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
except ImportError as error:
    raise MissingExtraError("transformers", "hf", "gam_lm.hf") from error

from gam_lm.hf.cache import GAMCache
from gam_lm.hf.configuration_gam import GAMConfig
from gam_lm.hf.modeling_gam import GAMForCausalLM, GAMModel

AutoConfig.register(GAMConfig.model_type, GAMConfig)
AutoModel.register(GAMConfig, GAMModel)
AutoModelForCausalLM.register(GAMConfig, GAMForCausalLM)

__all__ = ["GAMCache", "GAMConfig", "GAMForCausalLM", "GAMModel"]
