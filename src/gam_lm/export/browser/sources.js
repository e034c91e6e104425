"use strict";
// Which tokens a layer's reads come from: the memory is Σ_i u_i v_iᵀ + X V0, and u_i and X go through the rule as the memory does.
// See gam_lm.ops.read_sources, whose shares these are. The last `most` tokens are kept, in turns.

const Sources = (() => {
  const { byHead, read } = typeof require === "undefined" ? GAM : require("./step.js");

  class Sources {
    constructor(model, layer, most = 128) {
      const { num_heads: H, num_memory_slots: S, write } = model.options, D = model.config.hidden_size;
      Object.assign(this, { H, M: S / H, E: D / H, most, mean: write === "mean", count: 0 });
      this.V0 = model.weights[`layers.${layer}.mixer.written.bank`];
      this.X = this.mean ? null : new Float64Array(S * S / H);
      this.U = new Float64Array(most * S);
      this.V = new Float64Array(most * D);
      this.lengths = new Float64Array(most * H);  // ‖v_i‖ of every head
      this.alive = new Uint8Array(most * H);  // whether a head still holds any of a token: numbers that fade for ever are slow
    }

    // After a step, with its `seen`: shares of the tokens {index, share}, of the learned bank, and of what is older than the tokens that are kept.
    update(seen) {
      const { H, M, E, U, V, most, alive, lengths } = this, { r, a, v, b, decay } = seen, S = H * M, D = H * E;
      const place = this.count % most, index = this.count++, kept = Math.min(this.count, most);
      alive.fill(0, place * H, (place + 1) * H);
      const bank = this.ofBank(seen), rest = this.count > most ? seen.g.map((each, i) => each - bank[i]) : null;
      const weights = new Float64Array(kept * H);
      for (let k = 0; k < kept; k++) for (let h = 0; h < H; h++) if (alive[k * H + h]) weights[k * H + h] = this.through(k, h, r, a, b[h], decay[h]);
      V.set(v, place * D);
      for (let h = 0; h < H; h++) {
        lengths[place * H + h] = Math.hypot(...v.subarray(h * E, (h + 1) * E));
        for (let m = h * M; m < (h + 1) * M; m++) {
          U[place * S + m] = b[h] * a[m];
          weights[place * H + h] += r[m] * U[place * S + m];
        }
      }
      alive.fill(1, place * H, (place + 1) * H);
      const tokens = Array.from({ length: kept }, (_, k) => {
        let length = 0;
        for (let h = 0; h < H; h++) {
          const weight = weights[k * H + h];
          if (rest && weight) for (let e = h * E; e < (h + 1) * E; e++) rest[e] -= weight * V[k * D + e];
          length += Math.abs(weight) * lengths[k * H + h];
        }
        return { index: index - (place - k + most) % most, share: length };
      });
      const length = (x) => byHead(x, H, (each) => [Math.hypot(...each)]).reduce((sum, each) => sum + each, 0);
      const learned = length(bank), older = rest ? length(rest) : 0;
      const all = Math.max(tokens.reduce((sum, each) => sum + each.share, learned + older), 1e-30);
      for (const each of tokens) each.share /= all;
      return { tokens: tokens.sort((x, y) => x.index - y.index), bank: learned / all, older: older / all };
    }

    // u ← (I − b a aᵀ) λ u of the delta rule, λ u of the mean rule, for token k and head h; returns rᵀ u.
    through(k, h, r, a, b, keep) {
      const { U, H, M } = this, first = k * H * M + h * M, of = h * M;
      let met = 0, weight = 0, most = 0;
      if (!this.mean) for (let m = 0; m < M; m++) met += a[of + m] * U[first + m];
      for (let m = 0; m < M; m++) {
        const u = keep * (U[first + m] - b * met * a[of + m]);
        U[first + m] = u;
        weight += r[of + m] * u;
        most = Math.max(most, Math.abs(u));
      }
      this.alive[k * H + h] = Number(most > 1e-20);
      return weight;
    }

    // What the read takes from V0: (I + X)ᵀ r, or r c, of its rows. X ← (I − b a aᵀ) λ X − b a aᵀ.
    ofBank({ r, a, b, decay, prior }) {
      const { H, M, E, X, V0 } = this;
      if (this.mean) return read(r, V0, null, H, M, E, prior);
      const met = new Float64Array(H * M), weight = Float64Array.from(r);
      for (let h = 0, i = 0; h < H; h++) {
        const of = h * M;
        for (let m = 0; m < M; m++) for (let n = 0; n < M; n++, i++) met[of + n] += a[of + m] * X[i];
        i -= M * M;
        for (let m = 0; m < M; m++) {
          const written = b[h] * a[of + m], reading = r[of + m];
          for (let n = 0; n < M; n++, i++) {
            X[i] = decay[h] * X[i] - written * (decay[h] * met[of + n] + a[of + n]);
            weight[of + n] += reading * X[i];
          }
        }
      }
      return read(weight, V0, null, H, M, E);
    }
  }

  return Sources;
})();

if (typeof module !== "undefined") module.exports = Sources;
