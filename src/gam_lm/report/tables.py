"""Tables in Markdown, from results.json alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gam_lm.report.statistics import summarise

Row = Mapping[str, Any]


def quality_table(results: Mapping[str, Any]) -> str:
    """Table 1's columns (model, parameters, seconds per epoch, validation loss, perplexity) and what tells more.

    A model's rows are averaged over its seeds; ± is the 95 % interval of the mean. Counting floors stand last.
    """
    rows = results["rows"]
    trained = [row for row in rows if not row.get("floor")]
    columns = ["Model", "Parameters", "s/epoch", "Val loss (nats)", "PPL", "Bits/byte", "Tokens/s", "State (bytes)", "Seeds"]
    paper = any("paper_val_ppl" in row for row in trained)
    if paper:
        columns.insert(5, "PPL (paper's protocol)")
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|--:" * (len(columns) - 1) + "|"]
    for name, group in by_model(trained).items():
        cells = [
            name, f"{group[0]['parameters']:,}", _mean(group, "epoch_seconds", "{:,.0f}"), _interval(group, "val_nats_per_token", "{:.4f}"),
            _mean(group, "val_ppl", "{:,.2f}"), _mean(group, "val_bits_per_byte", "{:.4f}"), _mean(group, "tokens_per_second", "{:,.0f}"),
            f"{group[0]['state_bytes']:,}", str(len(group)),
        ]  # fmt: skip
        if paper:
            cells.insert(5, _mean(group, "paper_val_ppl", "{:,.2f}") if "paper_val_ppl" in group[0] else "")
        lines.append("| " + " | ".join(cells) + " |")
    for row in rows:
        if row.get("floor"):
            cells = [
                f"*{row['model']} counts*",
                "",
                "",
                f"{row['val_nats_per_token']:.4f}",
                f"{row['val_ppl']:,.2f}",
                f"{row['val_bits_per_byte']:.4f}",
                "",
                "",
                "",
            ]
            if paper:
                cells.insert(5, "")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", provenance(results), ""])


def provenance(results: Mapping[str, Any]) -> str:
    """One line on the corpus and the machine."""
    corpus, machine = results["corpus"], results["environment"]
    words = [f"{corpus['name']} (sha256 {corpus['sha256'][:12]}, {corpus['tokens']:,} training tokens, tokenizer {corpus['tokenizer']})"]
    trained = [row for row in results["rows"] if not row.get("floor")]
    if trained:
        words.append(f"{trained[0]['train_tokens']:,} tokens trained")
    words.append(f"{machine['device']}, {machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, Python {machine['python']}")
    return "; ".join(words) + "."


def by_model(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by model, in the order in which the models first appear."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["model"], []).append(row)
    return found


def _mean(group: list[Row], key: str, form: str) -> str:
    return form.format(summarise([row[key] for row in group]).mean)


def _interval(group: list[Row], key: str, form: str) -> str:
    summary = summarise([row[key] for row in group])
    return form.format(summary.mean) + (f" ± {form.format(summary.half_width)}" if summary.count > 1 else "")


def recall_table(results: Mapping[str, Any]) -> str:
    """Accuracy by task and size, a column per model, with the bytes that each carries from token to token; ± is the 95 % interval over seeds."""
    rows = results["rows"]
    models = list(by_model(rows))
    lines = ["| Task | Pairs | Length | " + " | ".join(models) + " |", "|---|--:|--:" + "|--:" * len(models) + "|"]
    sizes = list(dict.fromkeys((row["task"], row["pairs"], row["sequence_length"]) for row in rows))
    for task, pairs, length in sizes:
        cells = [task, str(pairs), str(length)]
        for model in models:
            group = [row for row in rows if (row["model"], row["task"], row["pairs"], row["sequence_length"]) == (model, task, pairs, length)]
            if not group:
                cells.append("")
                continue
            summary = summarise([100 * row["accuracy"] for row in group])
            spread = f" ± {summary.half_width:.1f}" if summary.count > 1 else ""
            cells.append(f"{summary.mean:.1f} %{spread} ({group[0]['state_bytes'] / 1024:,.0f} KiB)")
        lines.append("| " + " | ".join(cells) + " |")
    machine = results["environment"]
    return "\n".join([*lines, "", f"{machine['device']}, {machine['processor']}, {machine['cores']} cores, torch {machine['torch']}.", ""])
