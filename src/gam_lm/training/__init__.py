"""How a model is trained: the recipe, the loop, the validation number."""
