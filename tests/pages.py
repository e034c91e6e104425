"""The pages of the documentation and what they show, for tests."""

import re
from pathlib import Path

import torch

from gam_lm.checkpoint import save_model
from gam_lm.config import ModelConfig
from gam_lm.data.tokenizer import train_bpe
from gam_lm.mixers.gam_options import GAMOptions
from gam_lm.model import LanguageModel

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TEXT = "Once upon a time there was a cat. It sat on the mat, and the dog sat on the log.\n"


def blocks(page, language):
    return [code for found, code in BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


def commands(page):
    return [line for code in blocks(page, "sh") for line in code.splitlines() if line.strip() and not line.startswith("#")]


def make_home(folder):
    """A folder as the pages suppose it: texts, and a small model of them."""
    (folder / "my_texts").mkdir()
    for i in range(40):
        (folder / "my_texts" / f"{i:02}.txt").write_text(TEXT * 20)
    tokenizer = train_bpe([TEXT * 4], 300)
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=16, num_hidden_layers=2, options=(GAMOptions(num_memory_slots=8, num_heads=2),)
    )
    save_model(folder / "runs" / "mine", LanguageModel(config), tokenizer)
    return folder
