"""A trained model at work: generation, compiled steps, products of few rows, int8."""
