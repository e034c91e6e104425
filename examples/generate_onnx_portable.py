"""Generate from `gam export RUN --format onnx --portable` with ONNX Runtime and tokenizers alone: python generate_onnx_portable.py FOLDER PROMPT [TOKENS]"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

folder, prompt, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 50
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
prefill, step = (onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("prefill", "step"))
ids = tokenizer.encode(prompt).ids
block = json.loads((folder / "export.json").read_text())["prefill_tokens"] or len(ids)

# A sequence starts from zeros; a free dimension, of which the batch is the only one here, has a name in place of a size.
dtypes = {"tensor(int64)": np.int64, "tensor(float)": np.float32}
state = {i.name: np.zeros([d if isinstance(d, int) else 1 for d in i.shape], dtypes[i.type]) for i in step.get_inputs()[1:]}


def run(graph, tokens):
    """Feed tokens, keep the state that comes back, return the logits after the last token."""
    logits, *new = graph.run(None, {"tokens": np.array([tokens]), **state})
    state.update(zip(state, new, strict=True))
    return logits[0]


read = list(ids)
while ids:  # whole blocks through prefill, what is left token by token
    size = block if len(ids) >= block > 1 else 1
    logits, ids = run(prefill if size > 1 else step, ids[:size]), ids[size:]
for _ in range(count):
    ids.append(int(logits.argmax()))
    logits = run(step, ids[-1:])
print(tokenizer.decode(read + ids))  # as one text: alone, some decoders drop the space before its first word
