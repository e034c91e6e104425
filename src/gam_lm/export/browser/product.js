"use strict";
// y = W x, where nearly all time of a step goes: in plain JavaScript, and four numbers at a time in a few instructions of WebAssembly that are put together here.
// W is a Float32Array, or an Int8Array with a `scale` for each row.

const Product = (() => {
  // Four rows at a time, so that x is looked up once for four and their sums do not wait for each other.
  function plain(W, x, rows) {
    const n = x.length, y = new Float64Array(rows);
    let o = 0;
    for (; o + 3 < rows; o += 4) {
      const a = o * n, b = a + n, c = b + n, d = c + n;
      let s0 = 0, s1 = 0, s2 = 0, s3 = 0;
      for (let j = 0; j < n; j++) {
        const each = x[j];
        s0 += W[a + j] * each; s1 += W[b + j] * each; s2 += W[c + j] * each; s3 += W[d + j] * each;
      }
      y[o] = s0; y[o + 1] = s1; y[o + 2] = s2; y[o + 3] = s3;
    }
    for (; o < rows; o++) for (let j = 0; j < n; j++) y[o] += W[o * n + j] * x[j];
    if (W.scale) for (o = 0; o < rows; o++) y[o] *= W.scale[o];
    return y;
  }

  // wide(W, x, y, rows, bytes) and narrow(…): addresses in the memory; rows a multiple of 4 above 0, and `bytes` of a row: of fp32 a multiple of 16, of int8 of 8.
  function module() {
    const leb = (n) => (n < 128 ? [n] : [(n & 127) | 128, ...leb(n >> 7)]);
    const section = (id, ...content) => [id, ...leb(content.length), ...content];
    const get = (i) => [0x20, i], set = (i) => [0x21, i], tee = (i) => [0x22, i], integer = (n) => [0x41, n];
    const add = [0x6a], subtract = [0x6b], shift = [0x74], below = [0x49], again = [0x0d, 0], loop = [0x03, 0x40], end = [0x0b];  // `again` goes to the loop's start if true
    const load = (offset) => [0xfd, 0x00, 4, offset], plus = [0xfd, 0xe4, 1], times = [0xfd, 0xe6, 1], zeros = [0x43, 0, 0, 0, 0, 0xfd, 0x13];  // of four numbers of fp32
    const load8 = [0xfd, 0x01, 3, 0], low = [0xfd, 0xa7, 1, 0xfd, 0xfa, 1], high = [0xfd, 0xa8, 1, 0xfd, 0xfa, 1];  // eight of int8; four of those as fp32
    const lane = (i) => [0xfd, 0x1f, i], sum = [0x92], store = (offset) => [0x38, 2, offset];  // of one
    const I32 = 0x7f, V128 = 0x7b, [W, x, y, rows, bytes, j, row, s, xs, others, levels] = [0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13];
    const four = [0, 1, 2, 3];
    const wide = [
      ...get(x), ...get(j), ...add, ...load(0), ...set(xs),
      ...four.flatMap((k) => [...get(s + k), ...get(row), ...load(0), ...get(xs), ...times, ...plus, ...set(s + k), ...get(row), ...get(bytes), ...add, ...set(row)]),
      ...get(j), ...integer(16),
    ];
    const at = [...get(x), ...get(j), ...integer(2), ...shift, ...add];  // a byte of W stands for four of x
    const narrow = [
      ...at, ...load(0), ...set(xs), ...at, ...load(16), ...set(others),
      ...four.flatMap((k) => [
        ...get(row), ...load8, ...set(levels), ...get(s + k), ...get(levels), ...low, ...get(xs), ...times, ...plus,
        ...get(levels), ...high, ...get(others), ...times, ...plus, ...set(s + k), ...get(row), ...get(bytes), ...add, ...set(row),
      ]),
      ...get(j), ...integer(8),
    ];
    const code = (inner) => {
      const body = [
        2, 2, I32, 7, V128,  // locals: j and row; s, s + 1, s + 2, s + 3, xs, others and levels
        ...loop,
        ...four.flatMap((k) => [...zeros, ...set(s + k)]), ...integer(0), ...set(j),
        ...loop,
        ...get(W), ...get(j), ...add, ...set(row), ...inner, ...add, ...tee(j), ...get(bytes), ...below, ...again,
        ...end,
        ...four.flatMap((k) => [...get(y), ...four.flatMap((i) => [...get(s + k), ...lane(i), ...(i ? sum : [])]), ...store(4 * k)]),
        ...get(W), ...four.flatMap(() => [...get(bytes), ...add]), ...set(W), ...get(y), ...integer(16), ...add, ...set(y),
        ...get(rows), ...integer(4), ...subtract, ...tee(rows), ...again,
        ...end, ...end,
      ];
      return [...leb(body.length), ...body];
    };
    const m = 0x6d, f = 0x66, g = 0x67;  // names
    return Uint8Array.from([
      0, 0x61, 0x73, 0x6d, 1, 0, 0, 0,
      ...section(1, 1, 0x60, 5, I32, I32, I32, I32, I32, 0), ...section(2, 1, 1, m, 1, m, 2, 0, 1), ...section(3, 2, 0, 0),
      ...section(7, 2, 1, f, 0, 0, 1, g, 0, 1), ...section(10, 2, ...code(wide), ...code(narrow)),
    ]);
  }

  // Room for `size` bytes of matrices and for the longest x and y, and the product over matrices that lie in it.
  function room(size, longest) {
    const scratch = 16 * Math.ceil(size / 16), other = scratch + 16 * Math.ceil(longest / 4);
    try {
      const memory = new WebAssembly.Memory({ initial: Math.ceil((other + 4 * longest + 16) / 65536) });
      const { f, g } = new WebAssembly.Instance(new WebAssembly.Module(module()), { m: { m: memory } }).exports;
      const xs = new Float32Array(memory.buffer, scratch, longest), ys = new Float32Array(memory.buffer, other, longest);
      return {
        buffer: memory.buffer,
        product(W, x, rows) {
          const n = x.length, narrow = W instanceof Int8Array;
          if (n % (narrow ? 8 : 4) || rows % 4 || W.buffer !== memory.buffer) return plain(W, x, rows);
          xs.set(x);
          (narrow ? g : f)(W.byteOffset, scratch, other, rows, narrow ? n : 4 * n);
          const y = Float64Array.from(ys.subarray(0, rows));
          if (W.scale) for (let o = 0; o < rows; o++) y[o] *= W.scale[o];
          return y;
        },
      };
    } catch (error) {  // a browser without WebAssembly, or without its instructions for four numbers
      if (!(error instanceof ReferenceError || error instanceof WebAssembly.CompileError || error instanceof RangeError)) throw error;
      return { buffer: new ArrayBuffer(scratch), product: plain };
    }
  }

  return { plain, room };
})();

if (typeof module !== "undefined") module.exports = Product;
