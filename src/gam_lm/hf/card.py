"""The model card, filled from what the run itself wrote, and the upload of model, records and card in one commit."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gam_lm.checkpoint import read_json
from gam_lm.mixers.registry import options_class
from gam_lm.runtime.files import write_text

if TYPE_CHECKING:
    from gam_lm.hf.modeling_gam import GAMForCausalLM

RECORDS = ("recipe.json", "run.toml", "metrics.jsonl", "results.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""What goes along with the weights, where the run has it."""


def push_run(
    model: GAMForCausalLM,
    repo_id: str,
    *,
    commit_message: str = "Upload model",
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
) -> str:
    """Upload the model to the Hub; the arguments are those of ``push_to_hub`` of transformers.

    Where the model was loaded from a run directory, the run's records and its tokenizer go along and fill the model card. A card that the
    repository has already is left alone.

    Returns:
        The address of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    run = Path(model.config.name_or_path) if model.config.name_or_path else None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if run is not None and run.is_dir():
            for record in RECORDS:
                if (run / record).is_file() and not (folder / record).is_file():
                    shutil.copy(run / record, folder / record)
        if not api.file_exists(repo_id, "README.md", revision=revision):
            write_text(folder / "README.md", model_card(folder, repo_id, model.num_parameters(), tags=tags))
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=commit_message, commit_description=commit_description, revision=revision,
            create_pr=create_pr,
        )  # fmt: skip
    return str(commit)


def model_card(directory: Path, name: str, parameters: int, *, tags: list[str] | None = None) -> str:
    """The README.md of a model directory: what the model is, how it was trained and what it reached, as far as the records tell.

    Args:
        directory: with config.json and, where there is one, recipe.json, metrics.jsonl and results.json of the run.
        name: title, and what ``from_pretrained`` is given in the example.
        parameters: of the model.
        tags: for the Hub, besides the library's own.
    """
    config = read_json(directory / "config.json")
    recipe = read_json(directory / "recipe.json") if (directory / "recipe.json").is_file() else {}
    corpus, training = recipe.get("corpus", {}), recipe.get("train_config", {})
    figures = _figures(directory)
    from gam_lm import __version__

    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation", "tags:",
        *(f"- {tag}" for tag in dict.fromkeys(["gam-lm", "gated-associative-memory", *(tags or [])])), "---", "",
        f"# {name.rsplit('/', 1)[-1]}", "",
        f"A language model of {parameters:,} parameters, made with gam-lm {__version__}. Its blocks mix tokens by " + _mixers(config) + ".", "",
        "| | |", "|---|---|",
        *(f"| {label} | {config[field]} |" for field, label in CONFIG_ROWS.items() if config.get(field) is not None),
    ]  # fmt: skip
    if corpus:
        lines += [
            "",
            "## Training",
            "",
            f"Corpus `{corpus['name']}` (sha256 `{corpus['sha256'][:12]}`): {corpus['tokens']:,} tokens of {corpus['bytes']:,} bytes.",
        ]
    if training:
        lines += [
            "",
            "| | |",
            "|---|---|",
            *(f"| {label} | {training[field]} |" for field, label in TRAIN_ROWS.items() if training.get(field) is not None),
        ]
    if figures:
        lines += ["", "## Results", "", "| Figure | Value |", "|---|--:|", *(f"| {label} | {value} |" for label, value in figures.items())]
    lines += [
        "", "## Use", "", "```python", "import gam_lm.hf  # pip install 'gam-lm[hf]'", "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")', f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        'inputs = tokenizer("The", return_tensors="pt")', "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))", "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


CONFIG_ROWS = {
    "num_hidden_layers": "Blocks", "hidden_size": "Width", "mlp": "Feed-forward network", "positions": "Positions", "vocab_size": "Vocabulary",
}  # fmt: skip
TRAIN_ROWS = {
    "steps": "Steps", "batch_size": "Sequences per step", "context": "Tokens per sequence", "learning_rate": "Highest learning rate", "seed": "Seed",
}  # fmt: skip
FIGURE_ROWS = {
    "val_nats_per_token": "Validation loss (nats per token)", "val_ppl": "Validation perplexity per token",
    "val_bits_per_byte": "Validation bits per byte", "val_word_ppl": "Validation perplexity per word",
}  # fmt: skip


def _mixers(config: Mapping[str, Any]) -> str:
    """The mixers of a stack, in the order of their turn, and the options of each kind that are not the defaults."""
    parts = []
    for name, values in config["options"].items():
        defaults = options_class(name)().resolved(config["hidden_size"]).to_dict()
        changed = ", ".join(f"{key} {value}" for key, value in values.items() if value != defaults[key])
        parts.append(f"`{name}`" + (f" ({changed})" if changed else ""))
    turn = f", in turn {' '.join(f'`{name}`' for name in config['mixers'])}" if len(parts) > 1 else ""
    return " and ".join(parts) + turn


def _figures(directory: Path) -> dict[str, str]:
    """Label → value: the row of results.json where the run has one, else the last validation of metrics.jsonl."""
    path = directory / "results.json"
    if path.is_file():
        row = read_json(path)["rows"][-1]
        return {label: f"{row[key]:.4f}" for key, label in FIGURE_ROWS.items() if key in row}
    path = directory / "metrics.jsonl"
    if path.is_file():
        measured = [point for point in map(json.loads, path.read_text(encoding="utf-8").splitlines()) if "val_nats" in point]
        if measured:
            last = measured[-1]
            return {
                f"Validation loss after {last['step']:,} steps (nats per token)": f"{last['val_nats']:.4f}",
                "Validation perplexity per token": f"{math.exp(min(700.0, last['val_nats'])):,.2f}", "Training tokens": f"{last['tokens']:,}",
            }  # fmt: skip
    return {}
