"""Named models (gam_lm.presets.models) and named setups (gam_lm.presets.setups). Imports no torch."""
