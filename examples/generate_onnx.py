"""Generate from `gam export RUN --format onnx` with ONNX Runtime and tokenizers alone: python generate_onnx.py FOLDER PROMPT [TOKENS]"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

folder, prompt, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 50
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
graph = onnxruntime.InferenceSession(folder / "model.onnx")
ids = tokenizer.encode(prompt).ids

# A sequence starts from zeros. A free dimension has a name in place of a size: one row here, and nothing cached yet.
dtypes = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(bool)": np.bool_}
free = {"batch": 1, "cached": 0}
state = {i.name: np.zeros([free.get(size, size) for size in i.shape], dtypes[i.type]) for i in graph.get_inputs()[1:]}

new, tokens = [], ids  # the whole prompt at once, then a token at a time
for _ in range(count):
    logits, *values = graph.run(None, {"tokens": np.array([tokens]), **state})
    state = dict(zip(state, values, strict=True))
    tokens = [int(logits[0].argmax())]
    new += tokens
print(tokenizer.decode(ids + new))  # as one text: alone, some decoders drop the space before its first word
