"""From results.json to what people read: statistics, tables, plots. Never imports torch."""
