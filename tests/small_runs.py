"""A text and a command that are small enough for tests which train several models."""

import random

WORDS = ["the", "a", "cat", "dog", "sees", "finds", "old", "new", "house", "tree", "and", "then", "but", "runs", "sleeps"]


def write_book(folder):
    """A text of a few hundred different sentences."""
    rng = random.Random(0)
    path = folder / "book.txt"
    path.write_text("\n".join(" ".join(rng.choices(WORDS, k=9)) + "." for _ in range(400)))
    return path


def command(verb, book, out, *more):
    """`gam bench` or `gam tune` of two tiny models."""
    tiny = ["--vocab-size", "270", "--hidden-size", "8", "--num-hidden-layers", "1", "--steps", "3", "--batch-size", "2", "--context", "32"]
    return [verb, "--data", str(book), "--models", "gam", "transformer", "--no-match-parameters", "--device", "cpu", "--precision", "fp32",
            *tiny, "--out", str(out), *more]  # fmt: skip
