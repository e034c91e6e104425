"""The ladder of `gam bench-plan` as a table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gam_lm.report.tables import Table
from gam_lm.results import read_results
from gam_lm.runtime.files import write_text
from gam_lm.training.plan import vocabulary_for


def ladder_table(results: Mapping[str, Any]) -> Table:
    """A line for each run, by text and minutes; the best of each text and time is bold."""
    groups: defaultdict[tuple[int, float], list[Mapping[str, Any]]] = defaultdict(list)
    for row in results["rows"]:
        groups[row["text_bytes"], row["minutes"]].append(row)
    lines = []
    for (text_bytes, minutes), rows in sorted(groups.items()):
        figures = [row["val_bits_per_byte"] for row in rows if "val_bits_per_byte" in row]
        for row in sorted(rows, key=lambda row: (row["parameters"], row["vocab_size"], row["rate"], row["train_config"]["batch_size"])):
            bits = row.get("val_bits_per_byte")
            said = "diverged" if bits is None else f"{bits:.3f}"
            floor = row["bigram_bits_per_byte"]
            config, recipe = row["model_config"], row["train_config"]
            seen = f"{row['train_tokens'] / 1e6:.2f} M, {row['text_passes']:.2g}" if "train_tokens" in row else ""
            lines.append([
                f"{text_bytes / 1e6:g} MB, {minutes:g} min", f"{row['model']} {config['hidden_size']} × {config['num_hidden_layers']}",
                f"{row['vocab_size']:,}" + ("*" if row["vocab_size"] == vocabulary_for(text_bytes, minutes) else ""),
                f"{recipe['batch_size']}, {recipe['muon_learning_rate']:.2g}", seen, f"**{said}**" if bits is not None and bits == min(figures) else said, f"{floor:.3f}",
            ])  # fmt: skip
    columns = ["Text and time", "Model", "Vocabulary", "Batch, Muon's rate", "Tokens seen, passes", "Bits a byte", "Bigram counts"]
    note = (
        "Validation is on one text for all. AdamW's rate is changed as Muon's is. A star marks the vocabulary of the rule. "
        "Other vocabularies have other bigram counts."
    )
    return Table(columns=columns, rows=lines, title="The ladder of sizes, texts and times", note=note)


def write_ladder(out: Path) -> str:
    """Write table.md of the ladder in ``out``, and return it."""
    table = ladder_table(read_results(out / "results.json")).markdown()
    write_text(out / "table.md", table)
    return table
