"""Pure functions of the model, each under the equation that it computes and beside a naive reference that the tests use."""
