"""What mixes the tokens of a block: the contract (base), each mixer with its options beside it, and the registry."""
