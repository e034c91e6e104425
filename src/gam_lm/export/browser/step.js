"use strict";
// GAM, one token at a time: examples/gam_numpy.py in JavaScript, with its names. See gam_lm.mixers.gam for the equations.
//
//     D hidden size   V vocabulary   K taps   H heads   S slots of all heads   M = S / H   E = D / H
//     r where to read (S)   a where to write (S)   v what to write (D)   b how strongly (H)   decay what the memory keeps (H)
//     V0 the learned bank (H·M·E)   state: the last K − 1 h and scores, and the memory D (H·M·E; mean rule: S and Z)
//
// A layer's `silent` (S) takes slots out of every read and write, as Mixer.silence does; a head whose slots are all silent reads nothing.
// What a step did at each layer, for people to look at, is in `layer.seen`; Sources below tells which tokens a read came from.

const GAM = (() => {
  const sigmoid = (x) => 1 / (1 + Math.exp(-x));
  const silu = (x) => x / (1 + Math.exp(-x));
  const softplus = (x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));
  const filled = (n, f) => Float64Array.from({ length: n }, (_, i) => f(i));

  // erf by Numerical Recipes' Chebyshev fit of erfc; relative error below 1.2e-7.
  const FIT = [-1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398, 1.48851587, -0.82215223, 0.17087277];
  function gelu(x) {
    const z = Math.abs(x) / Math.SQRT2, t = 1 / (1 + z / 2);
    const erfc = t * Math.exp(-z * z + FIT.reduceRight((sum, c) => sum * t + c, 0));
    return x * (x >= 0 ? 1 - erfc / 2 : erfc / 2);
  }

  // y = W x of a matrix of `rows` rows; four sums, so that the processor need not wait for one.
  function product(W, x, rows) {
    const n = x.length, y = new Float64Array(rows);
    for (let o = 0, i = 0; o < rows; o++) {
      let s0 = 0, s1 = 0, s2 = 0, s3 = 0, j = 0;
      for (; j + 3 < n; j += 4, i += 4) {
        s0 += W[i] * x[j]; s1 += W[i + 1] * x[j + 1]; s2 += W[i + 2] * x[j + 2]; s3 += W[i + 3] * x[j + 3];
      }
      for (; j < n; j++, i++) s0 += W[i] * x[j];
      y[o] = s0 + s1 + s2 + s3;
    }
    return y;
  }

  function normalized(x, weight, bias, eps) {  // LayerNorm; without a bias RMSNorm
    let mean = 0, square = 0;
    if (bias) for (const each of x) mean += each / x.length;
    for (const each of x) square += (each - mean) ** 2 / x.length;
    const scale = 1 / Math.sqrt(square + eps);
    return filled(x.length, (i) => (x[i] - mean) * scale * weight[i] + (bias ? bias[i] : 0));
  }

  function softmax(x) {
    const top = x.reduce((most, each) => Math.max(most, each), -Infinity);
    const e = x.map((each) => Math.exp(each - top));
    const sum = e.reduce((total, each) => total + each, 0);
    return e.map((each) => each / sum);
  }

  // f of each head's part of x.
  function byHead(x, H, f) {
    const n = x.length / H, y = new Float64Array(x.length);
    for (let h = 0; h < H; h++) y.set(f(x.subarray(h * n, (h + 1) * n), h), h * n);
    return y;
  }

  function unit(x) {
    let square = 0;
    for (const each of x) square += each * each;
    const scale = 1 / Math.max(Math.sqrt(square), 1e-12);
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
    const K = past.length + 1;
    return filled(x.length, (c) => past.reduce((sum, each, k) => sum + weight[c * K + k] * each[c], bias[c] + weight[c * K + K - 1] * x[c]));
  }

  // g_h = Σ_m r_m (bank_m + memory_m) of every head; `scale` counts the bank's rows.
  function read(r, bank, memory, H, M, E, scale) {
    const g = new Float64Array(H * E);
    for (let s = 0, i = 0; s < H * M; s++) {
      const first = Math.floor(s / M) * E, weight = r[s], prior = scale ? scale[s] : 1;
      for (let e = 0; e < E; e++, i++) g[first + e] += weight * (prior * bank[i] + memory[i]);
    }
    return g;
  }

  class Model {
    // weights: Float32Arrays by name. config: of config.json.
    constructor(config, weights) {
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
      const y = product(W, x, W.length / x.length);
      if (bias) for (let o = 0; o < y.length; o++) y[o] += bias[o];
      return y;
    }

    norm(name, x) {
      return normalized(x, this.weights[`${name}.weight`], this.weights[`${name}.bias`], this.config.layer_norm_eps);
    }

    // Read one token; the logits of the next one (V).
    step(token) {
      const { config, weights } = this, D = config.hidden_size, E = weights["embed_tokens.weight"], P = weights["embed_positions.weight"];
      let x = filled(D, (i) => E[token * D + i] + (P ? P[this.position * D + i] : 0));
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
      return product(weights["lm_head.weight"] ?? E, this.norm("norm", x), config.vocab_size);
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
        const share = audible(softmax(product(bank, h, bank.length / D)), written ? null : silent, true), path = new Float64Array(D);
        share.forEach((each, s) => { for (let i = 0; i < D; i++) path[i] += each * bank[s * D + i]; });
        if (!written) state.seen.shares = share;
        add(path, globalGate);
      }
      if (options.write !== "none") {
        const g = byHead(this.written(`${name}.written`, h, state, silent), options.num_heads, (each) => normalized(each, each.map(() => 1), null, config.layer_norm_eps));
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
      const scores = product(w[`${name}.address`], h, S).map((each, s) => (sharpness ? sharpness[Math.floor(s / M)] * each : each));
      const before = taps(state.scores, scores, w[`${name}.before.weight`], w[`${name}.before.bias`]);
      state.scores = [...state.scores, scores].slice(1);
      const quiet = (head) => silent && silent.subarray(head * M, (head + 1) * M);
      const key = (x, head) => unit(audible(x.map(silu), quiet(head), false));  // SiLU(s_t) / ‖·‖
      const slots = (x, head) => audible(softmax(x), quiet(head), true);  // shares of learned slots
      const plain = options.write_address === "keys";
      const r = byHead(scores, H, plain ? key : slots);
      const a = byHead(before, H, plain ? key : mean ? slots : (x, head) => unit(slots(x, head)));
      const v = this.linear(`${name}.value_proj`, h), write = this.linear(`${name}.write_proj`, h), rate = w[`${name}.log_rate`];
      const b = filled(H, (i) => (options.write_gate === "learned" ? sigmoid(write[i]) * options.max_write : 0));
      const decay = filled(H, (i) => Math.exp(-Math.exp(rate[i]) * softplus(write[H + i])));  // λ = exp(−exp(A) softplus(·))
      Object.assign(state.seen, { r, a, v, b, decay });
      if (mean) {  // S_t = λ S_{t−1} + b a vᵀ,  Z_t = λ Z_{t−1} + b a,  g_t = Σ_m r_m (c_m V0_m + S_m) / (c_m + Z_m)
        const prior = filled(S, (s) => softplus(w[`${name}.prior`][s]));
        for (let s = 0, i = 0; s < S; s++) {
          const head = Math.floor(s / M), weight = b[head] * a[s];
          for (let e = 0; e < E; e++, i++) memory[i] = decay[head] * memory[i] + weight * v[head * E + e];
          state.Z[s] = decay[head] * state.Z[s] + weight;
        }
        const share = r.map((each, s) => each / (prior[s] + state.Z[s]));
        Object.assign(state.seen, { r: share, prior });
        return (state.seen.g = read(share, V0, memory, H, M, E, prior));
      }
      // D_t = λ D_{t−1} + b a (v − (V0 + λ D_{t−1})ᵀ a)ᵀ,  g_t = (V0 + D_t)ᵀ r
      for (let head = 0, i = 0; head < H; head++) for (let j = 0; j < M * E; j++, i++) memory[i] *= decay[head];
      const held = read(a, V0, memory, H, M, E);
      for (let s = 0, i = 0; s < S; s++) {
        const head = Math.floor(s / M), weight = b[head] * a[s];
        for (let e = 0; e < E; e++, i++) memory[i] += weight * (v[head * E + e] - held[head * E + e]);
      }
      return (state.seen.g = read(r, V0, memory, H, M, E));
    }
  }

  // Which tokens a layer's reads come from: the memory is Σ_i u_i v_iᵀ + X V0, and u_i and X go through the rule as the memory does.
  // See gam_lm.ops.read_sources, whose shares these are.
  class Sources {
    constructor(model, layer, most = 256) {
      const { num_heads: H, num_memory_slots: S, write } = model.options;
      Object.assign(this, { H, M: S / H, E: model.config.hidden_size / H, most, mean: write === "mean", tokens: [], dropped: false });
      this.V0 = model.weights[`layers.${layer}.mixer.written.bank`];
      this.X = this.mean ? null : new Float64Array(H * this.M * this.M);
    }

    // After a step, with its `seen`: shares of the tokens {index, share}, of the learned bank, and of what is older than the tokens that are kept.
    update(index, seen) {
      const { H, M, E, tokens, X } = this, { r, a, v, b, decay } = seen;
      for (const { u } of tokens) this.through(u, a, b, decay);
      tokens.push({ index, u: a.map((each, s) => b[Math.floor(s / M)] * each), v });
      if (tokens.length > this.most) this.dropped = Boolean(tokens.shift());
      const seenBank = this.ofBank(r, a, b, decay, seen.prior);  // changes X
      const rest = seen.g.map((each, i) => each - seenBank[i]);
      const lengths = tokens.map((token) => {
        let total = 0;
        for (let h = 0; h < H; h++) {
          let weight = 0, square = 0;
          for (let m = h * M; m < (h + 1) * M; m++) weight += r[m] * token.u[m];
          for (let e = h * E; e < (h + 1) * E; e++) {
            square += token.v[e] ** 2;
            rest[e] -= weight * token.v[e];
          }
          total += Math.abs(weight) * Math.sqrt(square);
        }
        return total;
      });
      const length = (x) => byHead(x, H, (each) => [Math.hypot(...each)]).reduce((sum, each) => sum + each, 0);
      const bank = length(seenBank), older = this.dropped ? length(rest) : 0;
      const all = Math.max(lengths.reduce((sum, each) => sum + each, bank + older), 1e-30);
      return { tokens: lengths.map((each, i) => ({ index: tokens[i].index, share: each / all })), bank: bank / all, older: older / all };
    }

    // u ← (I − b a aᵀ) λ u of the delta rule, λ u of the mean rule.
    through(u, a, b, decay) {
      for (let h = 0; h < this.H; h++) {
        const first = h * this.M, end = first + this.M;
        let met = 0;
        for (let m = first; m < end; m++) {
          u[m] *= decay[h];
          met += a[m] * u[m];
        }
        if (!this.mean) for (let m = first; m < end; m++) u[m] -= b[h] * met * a[m];
      }
    }

    // What the read takes from V0: (I + X)ᵀ r, or r c, of its rows. X ← (I − b a aᵀ) λ X − b a aᵀ.
    ofBank(r, a, b, decay, prior) {
      const { H, M, E, X, V0 } = this, zero = new Float64Array(V0.length);
      if (this.mean) return read(r, V0, zero, H, M, E, prior);
      const weight = Float64Array.from(r);
      for (let h = 0; h < H; h++) {
        const x = (m, n) => (h * M + m) * M + n, met = Float64Array.from(a.subarray(h * M, (h + 1) * M));
        for (let m = 0; m < M; m++) for (let n = 0; n < M; n++) met[n] += a[h * M + m] * (X[x(m, n)] *= decay[h]);
        for (let m = 0; m < M; m++) {
          for (let n = 0; n < M; n++) {
            X[x(m, n)] -= b[h] * a[h * M + m] * met[n];
            weight[h * M + n] += r[h * M + m] * X[x(m, n)];
          }
        }
      }
      return read(weight, V0, zero, H, M, E);
    }
  }

  // Weights from the page's bytes: fp16 and int8 with a scale for each row become Float32Arrays.
  function unpack(bytes, tensors) {
    const weights = {}, half = halves();
    for (const [name, { dtype, size, offset, scale }] of Object.entries(tensors)) {
      if (dtype === "fp32") weights[name] = new Float32Array(bytes, offset, size);
      else if (dtype === "fp16") weights[name] = Float32Array.from(new Uint16Array(bytes, offset, size), (each) => half[each]);
      else {
        const rows = weights[scale], levels = new Int8Array(bytes, offset, size), wide = new Float32Array(size), n = size / rows.length;
        for (let o = 0, i = 0; o < rows.length; o++) for (let j = 0; j < n; j++, i++) wide[i] = levels[i] * rows[o];
        weights[name] = wide;
      }
    }
    return weights;
  }

  // All 65,536 numbers of fp16.
  function halves() {
    return Float32Array.from({ length: 65536 }, (_, bits) => {
      const sign = bits >> 15 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
      return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
    });
  }

  return { Model, Sources, unpack, softmax };
})();

if (typeof module !== "undefined") module.exports = GAM;
