"""Descriptions of BLiMP, LAMBADA, ARC-easy and PIQA for lm-evaluation-harness; their data is read by `gam_lm.data.task_files`.

They measure as the harness's own tasks of these names do. `lm_eval --include_path` takes the folder as well.
"""
