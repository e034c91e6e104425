// Generate from `gam export RUN --format onnx` in JavaScript:
//
//     npm install onnxruntime-node @huggingface/tokenizers
//     node generate_onnx.mjs FOLDER PROMPT [TOKENS]

import { readFileSync } from "node:fs";
import { join } from "node:path";
import { Tokenizer } from "@huggingface/tokenizers";
import ort from "onnxruntime-node";

const [folder, prompt, count = "50"] = process.argv.slice(2);
const tokenizer = new Tokenizer(JSON.parse(readFileSync(join(folder, "tokenizer.json"), "utf8")), {});
const graph = await ort.InferenceSession.create(join(folder, "model.onnx"));

// A sequence starts from zeros. A free dimension has a name in place of a size: one row here, and nothing cached yet.
const free = { batch: 1, cached: 0 };
const arrays = { int64: BigInt64Array, float32: Float32Array, bool: Uint8Array };
let state = {};
for (const { name, type, shape } of graph.inputMetadata.filter((each) => each.name !== "tokens")) {
  const sizes = shape.map((size) => free[size] ?? size);
  state[name] = new ort.Tensor(type, new arrays[type](sizes.reduce((product, size) => product * size, 1)), sizes);
}

const made = [];
const ids = tokenizer.encode(prompt).ids;
let tokens = ids;
while (made.length < Number(count)) {  // the whole prompt at once, then a token at a time
  const out = await graph.run({ tokens: new ort.Tensor("int64", BigInt64Array.from(tokens, BigInt), [1, tokens.length]), ...state });
  state = Object.fromEntries(Object.keys(state).map((name) => [name, out[`new_${name}`]]));
  const logits = out.logits.data;
  tokens = [logits.reduce((best, value, id) => (value > logits[best] ? id : best), 0)];
  made.push(...tokens);
}
console.log(tokenizer.decode([...ids, ...made]));  // as one text: alone, some decoders drop the space before its first word
