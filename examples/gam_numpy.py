"""GAM in one file of numpy, one token at a time: python gam_numpy.py RUN PROMPT [TOKENS]

What a port starts from: every equation of gam_lm.mixers.gam stands here once, beside its number. gam_lm/export/browser/step.js is the same file in JavaScript.
It reads a run directory of fp32 or fp16 weights whose mixers are all ``gam`` with a bank.

    D hidden_size   V vocab_size   K taps   H heads   S slots of all heads   M = S / H   E = D / H
    x the residual stream   h = norm(x)   y what the mixer adds
    r_HM where to read   a_HM where to write   v_HE what to write   b_H how strongly   decay_H what the memory keeps
    V0_HME the learned bank   state: the last K − 1 h and scores, and the memory D_HME (mean rule: S_HME and Z_HM)
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

erf = np.vectorize(math.erf, otypes=[float])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def unit(x, least=1e-12):
    """x / max(‖x‖, least) over the last dimension."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), least)


def rms(x, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


class GAM:
    """The weights by name, and the state of one text."""

    def __init__(self, folder):
        self.config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        self.options = self.config["options"]["gam"]
        self.weights = {name: each.astype(np.float64) for name, each in load_file(Path(folder) / "model.safetensors").items()}
        K, D, S, H = self.options["conv_kernel_size"], self.config["hidden_size"], self.options["num_memory_slots"], self.options["num_heads"]
        self.H = H
        self.position = 0
        self.layers = [
            {"h": np.zeros((K - 1, D)), "scores": np.zeros((K - 1, S)), "memory": np.zeros((H, S // H, D // H)), "Z": np.zeros((H, S // H))}
            for _ in range(self.config["num_hidden_layers"])
        ]

    def linear(self, name, x):
        y = self.weights[name + ".weight"] @ x
        return y + self.weights[name + ".bias"] if name + ".bias" in self.weights else y

    def norm(self, name, x):
        eps = self.config["layer_norm_eps"]
        if self.config["norm"] == "rms":
            return rms(x, eps) * self.weights[name + ".weight"]
        return (x - x.mean()) / np.sqrt(x.var() + eps) * self.weights[name + ".weight"] + self.weights[name + ".bias"]

    def step(self, token):
        """Read one token; the logits of the next one (V,)."""
        x = self.weights["model.embed_tokens.weight"][token]
        if self.config["positions"] == "learned":
            x = x + self.weights["model.embed_positions.weight"][self.position]
        self.position += 1
        for i, state in enumerate(self.layers):
            name = f"model.layers.{i}"
            if self.config["stack"] == "bare":
                x = self.mixer(name + ".mixer", x, state)
                continue
            x = x + self.mixer(name + ".mixer", self.norm(name + ".mixer_norm", x), state)
            if name + ".mlp.up_proj.weight" in self.weights:
                x = x + self.feed_forward(name + ".mlp", self.norm(name + ".mlp_norm", x))
        head = "model.embed_tokens.weight" if self.config["tie_word_embeddings"] else "lm_head.weight"
        return self.weights[head] @ self.norm("model.norm", x)

    def feed_forward(self, name, h):
        up = self.linear(name + ".up_proj", h)
        if self.config["mlp"] == "swiglu":
            return self.linear(name + ".down_proj", silu(self.linear(name + ".gate_proj", h)) * up)
        return self.linear(name + ".down_proj", up * (1 + erf(up / math.sqrt(2))) / 2)  # GELU

    def mixer(self, name, h, state):
        """y_t = φ(W_l h_t) ∘ local_t + φ(W_g h_t) ∘ static_t + W_o (φ(W_g h_t) ∘ RMSNorm(g_t)), as far as there are such paths."""
        w, options, y = self.weights, self.options, 0
        local_gate, global_gate = self.gates(name, h)
        if name + ".conv.weight" in w:  # local_t = Σ_k w_k ∘ h_{t−K+1+k} + bias
            window_KD = np.vstack([state["h"], h])
            y = y + local_gate * ((w[name + ".conv.weight"].T * window_KD).sum(0) + w[name + ".conv.bias"])
        if name + ".memory.bank" in w:  # static_t = softmax(h_t Bᵀ) B, the paper's memory
            bank_SD = w[name + ".memory.bank"]
            y = y + global_gate * (softmax(bank_SD @ h) @ bank_SD)
        if options["write"] != "none":
            g_HE = self.written(name + ".written", h, state)
            g_D = rms(g_HE, self.config["layer_norm_eps"]).ravel() * w[name + ".written.norm"]
            y = y + self.linear(name + ".written.out_proj", global_gate * g_D)
        state["h"] = np.vstack([state["h"], h])[1:]
        return y

    def gates(self, name, h):
        """φ(W_l h_t) and φ(W_g h_t); 1 without gates, the same one twice where a single path kept its gate."""
        if name + ".gate.weight" not in self.weights:
            return 1.0, 1.0
        gate = (silu if self.options["gate_activation"] == "silu" else sigmoid)(self.linear(name + ".gate", h))
        return np.split(gate, 2) if self.options["fusion"] == "gate" else (gate, gate)

    def written(self, name, h, state):
        """What token t reads from the memory that the sequence writes, g_t (H, E)."""
        w, H, mean = self.weights, self.H, self.options["write"] == "mean"
        V0_HME = w[name + ".bank"]
        # s_t = τ K h_t, and for writing Σ_k u_k ∘ s_{t−K+1+k} + bias, at first "the token before"
        s_S = w[name + ".address"] @ h
        if name + ".sharpness" in w:
            s_S = s_S * np.repeat(w[name + ".sharpness"], len(s_S) // H)
        window_KS = np.vstack([state["scores"], s_S])
        state["scores"] = window_KS[1:]
        before_S = (w[name + ".before.weight"].T * window_KS).sum(0) + w[name + ".before.bias"]
        r_HM, a_HM = s_S.reshape(H, -1), before_S.reshape(H, -1)
        if self.options["write_address"] == "keys":  # r_t = SiLU(s_t) / ‖·‖
            r_HM, a_HM = unit(silu(r_HM), 1.0), unit(silu(a_HM), 1.0)
        else:  # shares of learned slots
            r_HM, a_HM = softmax(r_HM), softmax(a_HM) if mean else unit(softmax(a_HM))
        v_HE = self.linear(name + ".value_proj", h).reshape(H, -1)
        b_H, step_H = np.split(self.linear(name + ".write_proj", h), 2)
        b_H = sigmoid(b_H) * self.options["max_write"] if self.options["write_gate"] == "learned" else 0 * b_H
        decay_H = np.exp(-np.exp(w[name + ".log_rate"]) * np.logaddexp(0, step_H))  # λ = exp(−exp(A) softplus(·))
        kept_HME = decay_H[:, None, None] * state["memory"]
        if mean:  # S_t = λ S_{t−1} + b a vᵀ,  Z_t = λ Z_{t−1} + b a,  g_t = Σ_m r_m (c_m V0_m + S_m) / (c_m + Z_m)
            prior_HM = np.logaddexp(0, w[name + ".prior"])
            written_HM = b_H[:, None] * a_HM
            state["memory"] = kept_HME + written_HM[:, :, None] * v_HE[:, None]
            state["Z"] = decay_H[:, None] * state["Z"] + written_HM
            share_HM = r_HM / (prior_HM + state["Z"])
            return np.einsum("hm,hme->he", share_HM, prior_HM[..., None] * V0_HME + state["memory"])
        # D_t = λ D_{t−1} + b a (v − (V0 + λ D_{t−1})ᵀ a)ᵀ,  g_t = (V0 + D_t)ᵀ r
        error_HE = v_HE - np.einsum("hme,hm->he", V0_HME + kept_HME, a_HM)
        state["memory"] = kept_HME + b_H[:, None, None] * a_HM[:, :, None] * error_HE[:, None]
        return np.einsum("hme,hm->he", V0_HME + state["memory"], r_HM)


if __name__ == "__main__":
    from tokenizers import Tokenizer

    folder, prompt, count = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 50
    tokenizer, model = Tokenizer.from_file(str(Path(folder) / "tokenizer.json")), GAM(folder)
    ids = tokenizer.encode(prompt).ids
    for token in ids:
        logits = model.step(token)
    for _ in range(count):
        ids.append(int(logits.argmax()))
        logits = model.step(ids[-1])
    print(tokenizer.decode(ids))
