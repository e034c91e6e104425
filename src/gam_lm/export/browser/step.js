"use strict";
// GAM, one token at a time: examples/gam_numpy.py in JavaScript, with its names. See gam_lm.mixers.gam for the equations.
//
//     D hidden size   V vocabulary   K taps   H heads   S slots of all heads   M = S / H   E = D / H
//     r where to read (S)   a where to write (S)   v what to write (D)   b how strongly (H)   decay what the memory keeps (H)
//     V0 the learned bank (H·M·E)   state: the last K − 1 h and scores, and the memory D (H·M·E; mean rule: S and Z)
//
// A layer's `silent` (S) takes slots out of every read and write, as Mixer.silence does; a head whose slots are all silent reads nothing.
// What a step did at each layer, for people to look at, is in `layer.seen`; sources.js tells which tokens a read came from.

const GAM = (() => {
  const { room } = typeof require === "undefined" ? Product : require("./product.js");
  const sigmoid = (x) => 1 / (1 + Math.exp(-x));
  const silu = (x) => x / (1 + Math.exp(-x));
  const softplus = (x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));
  const filled = (n, f) => Float64Array.from({ length: n }, (_, i) => f(i));

  // erf by Numerical Recipes' Chebyshev fit of erfc; relative error below 1.2e-7.
  const FIT = [-1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398, 1.48851587, -0.82215223, 0.17087277];
  function gelu(x) {
    const z = Math.abs(x) / Math.SQRT2, t = 1 / (1 + z / 2);
    let fit = 0;
    for (let i = FIT.length - 1; i >= 0; i--) fit = fit * t + FIT[i];
    const erfc = t * Math.exp(fit - z * z);
    return x * (x >= 0 ? 1 - erfc / 2 : erfc / 2);
  }

  function normalized(x, weight, bias, eps) {  // LayerNorm; without a bias RMSNorm; without a weight that of 1
    const n = x.length, y = new Float64Array(n);
    let mean = 0, square = 0;
    if (bias) for (let i = 0; i < n; i++) mean += x[i] / n;
    for (let i = 0; i < n; i++) square += (x[i] - mean) ** 2 / n;
    const scale = 1 / Math.sqrt(square + eps);
    for (let i = 0; i < n; i++) y[i] = (x[i] - mean) * scale * (weight ? weight[i] : 1) + (bias ? bias[i] : 0);
    return y;
  }

  function softmax(x) {
    const e = new Float64Array(x.length);
    let top = -Infinity, sum = 0;
    for (let i = 0; i < x.length; i++) top = Math.max(top, x[i]);
    for (let i = 0; i < x.length; i++) sum += e[i] = Math.exp(x[i] - top);
    for (let i = 0; i < x.length; i++) e[i] /= sum;
    return e;
  }

  // −log softmax(x)_i.
  function surprise(x, i) {
    let top = -Infinity, sum = 0;
    for (let j = 0; j < x.length; j++) top = Math.max(top, x[j]);
    for (let j = 0; j < x.length; j++) sum += Math.exp(x[j] - top);
    return Math.log(sum) + top - x[i];
  }

  // f of each head's part of x.
  function byHead(x, H, f) {
    const n = x.length / H, y = new Float64Array(x.length);
    for (let h = 0; h < H; h++) y.set(f(x.subarray(h * n, (h + 1) * n), h), h * n);
    return y;
  }

  // x / max(‖x‖, least)
  function unit(x, least) {
    let square = 0;
    for (const each of x) square += each * each;
    const scale = 1 / Math.max(Math.sqrt(square), least);
    return x.map((each) => each * scale);
  }

  // Without what is silent, scaled back to a sum of 1 where the weights are shares.
  function audible(x, silent, shares) {
    if (!silent) return x;
    const y = x.map((each, i) => (silent[i] ? 0 : each));
    const sum = shares ? Math.max(y.reduce((total, each) => total + each, 0), 1e-30) : 1;
    return y.map((each) => each / sum);
  }

  // Σ_k w_k ∘ window_k + bias; the window is what came before and x itself, `weight` (C, K).
  function taps(past, x, weight, bias) {
    const K = past.length + 1, y = Float64Array.from(bias);
    [...past, x].forEach((each, k) => { for (let c = 0; c < y.length; c++) y[c] += weight[c * K + k] * each[c]; });
    return y;
  }

  // g_h = Σ_m r_m (bank_m + memory_m) of every head; `scale` counts the bank's rows, `memory` may be null.
  function read(r, bank, memory, H, M, E, scale) {
    const g = new Float64Array(H * E);
    for (let h = 0, i = 0; h < H; h++) {
      for (let m = h * M; m < (h + 1) * M; m++) {
        const weight = r[m], prior = scale ? weight * scale[m] : weight;
        for (let e = h * E; e < (h + 1) * E; e++, i++) g[e] += prior * bank[i] + (memory ? weight * memory[i] : 0);
      }
    }
    return g;
  }

  // memory ← λ memory + b a (v − held)ᵀ of every head.
  function write(memory, decay, b, a, v, held, H, M, E) {
    for (let h = 0, i = 0; h < H; h++) {
      const keep = decay[h], error = v.slice(h * E, (h + 1) * E);
      if (held) for (let e = 0; e < E; e++) error[e] -= held[h * E + e];
      for (let m = h * M; m < (h + 1) * M; m++) {
        const weight = b[h] * a[m];
        for (let e = 0; e < E; e++, i++) memory[i] = keep * memory[i] + weight * error[e];
      }
    }
  }

  class Model {
    // config: of config.json. weights: by name, as unpack gives them. product: y = W x of such.
    constructor(config, { weights, product }) {
      this.product = product;
      this.config = config;
      this.options = config.options.gam;
      this.weights = weights;
      this.silent = Array.from({ length: config.num_hidden_layers }, () => null);
      this.reset();
    }

    reset() {
      const { hidden_size: D } = this.config, { conv_kernel_size: K, num_memory_slots: S, num_heads: H } = this.options;
      const past = (n) => Array.from({ length: K - 1 }, () => new Float64Array(n));
      this.position = 0;
      this.layers = this.silent.map(() => ({
        h: past(D), scores: past(S), memory: new Float64Array(S * D / H), Z: new Float64Array(S), seen: {},
      }));
    }

    linear(name, x) {
      const W = this.weights[`${name}.weight`], bias = this.weights[`${name}.bias`];
      const y = this.product(W, x, W.length / x.length);
      if (bias) for (let o = 0; o < y.length; o++) y[o] += bias[o];
      return y;
    }

    norm(name, x) {
      return normalized(x, this.weights[`${name}.weight`], this.weights[`${name}.bias`], this.config.layer_norm_eps);
    }

    // Read one token; the logits of the next one (V).
    step(token) {
      const { config, weights } = this, D = config.hidden_size, E = weights["embed_tokens.weight"], P = weights["embed_positions.weight"];
      const row = (W, o) => filled(D, (i) => W[o * D + i] * (W.scale ? W.scale[o] : 1)), position = P ? row(P, this.position) : null;
      let x = row(E, token).map((each, i) => each + (position ? position[i] : 0));
      this.position++;
      this.layers.forEach((state, i) => {
        const name = `layers.${i}`;
        if (config.stack === "bare") {
          x = this.mixer(`${name}.mixer`, x, state, this.silent[i]);
          return;
        }
        const y = this.mixer(`${name}.mixer`, this.norm(`${name}.mixer_norm`, x), state, this.silent[i]);
        x = x.map((each, j) => each + y[j]);
        if (weights[`${name}.mlp.up_proj.weight`]) {
          const z = this.feedForward(`${name}.mlp`, this.norm(`${name}.mlp_norm`, x));
          x = x.map((each, j) => each + z[j]);
        }
      });
      return this.product(weights["lm_head.weight"] ?? E, this.norm("norm", x), config.vocab_size);
    }

    feedForward(name, h) {
      const up = this.linear(`${name}.up_proj`, h);
      if (this.config.mlp !== "swiglu") return this.linear(`${name}.down_proj`, up.map(gelu));
      const gate = this.linear(`${name}.gate_proj`, h);
      return this.linear(`${name}.down_proj`, up.map((each, i) => silu(gate[i]) * each));
    }

    // y_t = φ(W_l h_t) ∘ local_t + φ(W_g h_t) ∘ static_t + W_o (φ(W_g h_t) ∘ RMSNorm(g_t)), as far as there are such paths.
    mixer(name, h, state, silent) {
      const { weights: w, options, config } = this, D = h.length;
      const [localGate, globalGate] = this.gates(name, h);
      const y = new Float64Array(D);
      const add = (path, gate) => path.forEach((each, i) => { y[i] += gate ? gate[i] * each : each; });
      const mean = (x) => (x ? x.reduce((sum, each) => sum + each, 0) / D : null);
      state.seen = { gates: { local: mean(localGate), memory: mean(globalGate) } };
      if (w[`${name}.conv.weight`]) add(taps(state.h, h, w[`${name}.conv.weight`], w[`${name}.conv.bias`]), localGate);
      const bank = w[`${name}.memory.bank`];
      if (bank) {  // static_t = softmax(h_t Bᵀ) B, the paper's memory
        const written = options.write !== "none";
        const share = audible(softmax(this.product(bank, h, bank.length / D)), written ? null : silent, true), path = new Float64Array(D);
        share.forEach((each, s) => { for (let i = 0; i < D; i++) path[i] += each * bank[s * D + i]; });
        if (!written) state.seen.shares = share;
        add(path, globalGate);
      }
      if (options.write !== "none") {
        const g = byHead(this.written(`${name}.written`, h, state, silent), options.num_heads, (each) => normalized(each, null, null, config.layer_norm_eps));
        add(this.linear(`${name}.written.out_proj`, g.map((each, i) => each * w[`${name}.written.norm`][i] * (globalGate ? globalGate[i] : 1))));
      }
      state.h = [...state.h, h].slice(1);
      return y;
    }

    // φ(W_l h_t) and φ(W_g h_t); null without gates, the same one twice where a single path kept its gate.
    gates(name, h) {
      if (!this.weights[`${name}.gate.weight`]) return [null, null];
      const gate = this.linear(`${name}.gate`, h).map(this.options.gate_activation === "silu" ? silu : sigmoid);
      return this.options.fusion === "gate" ? [gate.subarray(0, h.length), gate.subarray(h.length)] : [gate, gate];
    }

    // What token t reads from the memory that the sequence writes, g_t (D).
    written(name, h, state, silent) {
      const { weights: w, options } = this, { num_heads: H, num_memory_slots: S } = options;
      const M = S / H, D = h.length, E = D / H, mean = options.write === "mean", V0 = w[`${name}.bank`], memory = state.memory;
      // s_t = τ K h_t, and for writing Σ_k u_k ∘ s_{t−K+1+k} + bias, at first "the token before"
      const sharpness = w[`${name}.sharpness`];
      const scores = this.product(w[`${name}.address`], h, S).map((each, s) => (sharpness ? sharpness[Math.floor(s / M)] * each : each));
      const before = taps(state.scores, scores, w[`${name}.before.weight`], w[`${name}.before.bias`]);
      state.scores = [...state.scores, scores].slice(1);
      const quiet = (head) => silent && silent.subarray(head * M, (head + 1) * M);
      const key = (x, head) => unit(audible(x.map(silu), quiet(head), false), 1);  // SiLU(s_t) / max(‖·‖, 1)
      const slots = (x, head) => audible(softmax(x), quiet(head), true);  // shares of learned slots
      const plain = options.write_address === "keys";
      const r = byHead(scores, H, plain ? key : slots);
      const a = byHead(before, H, plain ? key : mean ? slots : (x, head) => unit(slots(x, head), 1e-12));  // 0 where all are silent
      const v = this.linear(`${name}.value_proj`, h), gates = this.linear(`${name}.write_proj`, h), rate = w[`${name}.log_rate`];
      const b = filled(H, (i) => (options.write_gate === "learned" ? sigmoid(gates[i]) * options.max_write : 0));
      const decay = filled(H, (i) => Math.exp(-Math.exp(rate[i]) * softplus(gates[H + i])));  // λ = exp(−exp(A) softplus(·))
      Object.assign(state.seen, { r, a, v, b, decay });
      if (mean) {  // S_t = λ S_{t−1} + b a vᵀ,  Z_t = λ Z_{t−1} + b a,  g_t = Σ_m r_m (c_m V0_m + S_m) / (c_m + Z_m)
        const prior = filled(S, (s) => softplus(w[`${name}.prior`][s]));
        write(memory, decay, b, a, v, null, H, M, E);
        for (let s = 0; s < S; s++) state.Z[s] = decay[Math.floor(s / M)] * state.Z[s] + b[Math.floor(s / M)] * a[s];
        const share = r.map((each, s) => each / (prior[s] + state.Z[s]));
        Object.assign(state.seen, { r: share, prior });
        return (state.seen.g = read(share, V0, memory, H, M, E, prior));
      }
      // D_t = λ D_{t−1} + b a (v − (V0 + λ D_{t−1})ᵀ a)ᵀ,  g_t = (V0 + D_t)ᵀ r
      const held = read(a, V0, null, H, M, E), kept = read(a, memory, null, H, M, E);
      write(memory, decay, b, a, v, held.map((each, i) => each + decay[Math.floor(i / E)] * kept[i]), H, M, E);
      return (state.seen.g = read(r, V0, memory, H, M, E));
    }
  }

  // Weights from the page's bytes, and the product over them: fp16 becomes fp32, int8 gets the scales of its rows.
  function unpack(bytes, tensors) {
    const weights = {}, half = halves(), entries = Object.entries(tensors), wide = (dtype, size) => 16 * Math.ceil((dtype === "int8" ? size : 4 * size) / 16);
    const { buffer, product } = room(entries.reduce((sum, [, { dtype, size }]) => sum + wide(dtype, size), 0), Math.max(...entries.map(([, { longest }]) => longest)));
    let next = 0;
    for (const [name, { dtype, size, offset, scale }] of entries) {
      const made = weights[name] = new (dtype === "int8" ? Int8Array : Float32Array)(buffer, next, size);
      next += wide(dtype, size);
      if (dtype === "fp32") made.set(new Float32Array(bytes, offset, size));
      else if (dtype === "fp16") new Uint16Array(bytes, offset, size).forEach((each, i) => { made[i] = half[each]; });
      else {
        made.set(new Int8Array(bytes, offset, size));
        made.scale = weights[scale];
      }
    }
    return { weights, product };
  }

  // All 65,536 numbers of fp16.
  function halves() {
    return Float32Array.from({ length: 65536 }, (_, bits) => {
      const sign = bits >> 15 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
      return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
    });
  }

  return { Model, unpack, softmax, surprise, byHead, read };
})();

if (typeof module !== "undefined") module.exports = GAM;
