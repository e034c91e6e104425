"""What a model does with its context: measured on any model, in words and figures."""
