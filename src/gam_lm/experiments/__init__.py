"""What is measured: each module runs one experiment and writes its results.json as it goes."""
