"""A Llama of a run's size behind `transformers serve`, for comparison with `gam serve`.

The weights are drawn at random: the time of a token does not depend on them.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from driver import Address


def make_llama(run: Path, folder: Path) -> int:
    """Write a Llama of the width, depth, vocabulary and (within 1 %) parameters of ``run``, with its tokenizer; returns the number of parameters."""
    from tokenizers import Tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from gam_lm.checkpoint import load_config
    from gam_lm.model import count_parameters
    from gam_lm.serve.chat import TEMPLATE

    config = load_config(run)
    D, layers, V = config.hidden_size, config.num_hidden_layers, config.vocab_size
    wanted = count_parameters(config)
    inner = round(((wanted - V * D - D) / layers - 4 * D * D - 2 * D) / (3 * D))
    heads = next(heads for heads in (4, 2, 1) if D % (2 * heads) == 0)
    tokenizer = Tokenizer.from_file(str(run / "tokenizer.json"))
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads, tie_word_embeddings=True,
        max_position_embeddings=32_768, bos_token_id=tokenizer.token_to_id("<|endoftext|>"), eos_token_id=tokenizer.token_to_id("<|endoftext|>"),
    ))  # fmt: skip
    llama.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    ).save_pretrained(folder)
    parameters = sum(parameter.numel() for parameter in llama.parameters())
    if abs(parameters - wanted) > 0.01 * wanted:
        raise SystemExit(f"the Llama has {parameters:,} parameters, {wanted:,} were wanted")
    return parameters


@contextlib.contextmanager
def transformers_serving(folder: Path, python: str, log: Path, *flags: str) -> Iterator[tuple[Address, str]]:
    """`transformers serve` in a process of its own: its address and the model's name. Raises SystemExit with its log where it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "transformers.cli.transformers", "serve", str(folder), "--port", str(port), "--device", "cpu", *flags]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            for _ in range(240):
                with contextlib.suppress(OSError):
                    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
                    connection.request("GET", "/health")
                    if connection.getresponse().status == 200:
                        break
                if process.poll() is not None:
                    break
                time.sleep(0.5)
            else:
                process.terminate()
            if process.poll() is not None:
                raise SystemExit("transformers serve did not start:\n" + log.read_text()[-2000:])
            yield ("127.0.0.1", port), str(folder)
        finally:
            process.terminate()
            process.wait(30)


if __name__ == "__main__":
    made = make_llama(Path(sys.argv[1]), Path(sys.argv[2]))
    print(json.dumps({"parameters": made}))
