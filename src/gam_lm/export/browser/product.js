"use strict";
// y = W x, where nearly all time of a step goes: in plain JavaScript, and four numbers at a time in a few instructions of WebAssembly that are put together here.

const Product = (() => {
  // Four rows at a time, so that x is looked up once for four and their sums do not wait for each other.
  function plain(W, x, rows, y = new Float64Array(rows), from = 0) {
    const n = x.length;
    let o = from;
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
    return y;
  }

  // product(W, x, y, rows, bytes): addresses in the memory; rows a multiple of 4 above 0, and of 16 the bytes of x and of a row.
  function module() {
    const leb = (n) => (n < 128 ? [n] : [(n & 127) | 128, ...leb(n >> 7)]);
    const section = (id, ...content) => [id, ...leb(content.length), ...content];
    const get = (i) => [0x20, i], set = (i) => [0x21, i], tee = (i) => [0x22, i], integer = (n) => [0x41, n];
    const add = [0x6a], subtract = [0x6b], below = [0x49], again = [0x0d, 0], loop = [0x03, 0x40], end = [0x0b];  // `again` goes back to the loop's start if true
    const load = [0xfd, 0x00, 4, 0], plus = [0xfd, 0xe4, 1], times = [0xfd, 0xe6, 1], zeros = [0x43, 0, 0, 0, 0, 0xfd, 0x13];  // of four numbers of fp32
    const lane = (i) => [0xfd, 0x1f, i], sum = [0x92], store = (offset) => [0x38, 2, offset];  // of one
    const I32 = 0x7f, V128 = 0x7b, [W, x, y, rows, bytes, j, row, s, xs] = [0, 1, 2, 3, 4, 5, 6, 7, 11];
    const four = [0, 1, 2, 3];
    const body = [
      2, 2, I32, 5, V128,  // locals: j and row; s, s + 1, s + 2, s + 3 and xs
      ...loop,
      ...four.flatMap((k) => [...zeros, ...set(s + k)]), ...integer(0), ...set(j),
      ...loop,
      ...get(W), ...get(j), ...add, ...set(row), ...get(x), ...get(j), ...add, ...load, ...set(xs),
      ...four.flatMap((k) => [
        ...get(s + k), ...get(row), ...load, ...get(xs), ...times, ...plus, ...set(s + k), ...get(row), ...get(bytes), ...add, ...set(row),
      ]),
      ...get(j), ...integer(16), ...add, ...tee(j), ...get(bytes), ...below, ...again,
      ...end,
      ...four.flatMap((k) => [...get(y), ...four.flatMap((i) => [...get(s + k), ...lane(i), ...(i ? sum : [])]), ...store(4 * k)]),
      ...get(W), ...four.flatMap(() => [...get(bytes), ...add]), ...set(W), ...get(y), ...integer(16), ...add, ...set(y),
      ...get(rows), ...integer(4), ...subtract, ...tee(rows), ...again,
      ...end, ...end,
    ];
    const m = 0x6d, f = 0x66;  // names
    return Uint8Array.from([
      0, 0x61, 0x73, 0x6d, 1, 0, 0, 0,
      ...section(1, 1, 0x60, 5, I32, I32, I32, I32, I32, 0), ...section(2, 1, 1, m, 1, m, 2, 0, 1), ...section(3, 1, 0), ...section(7, 1, 1, f, 0, 0),
      ...section(10, 1, ...leb(body.length), ...body),
    ]);
  }

  // Room for `count` numbers of fp32 and for the longest x and y, and the product over matrices that lie in it.
  function room(count, longest) {
    const scratch = 4 * Math.ceil(count / 4) * 4, other = scratch + 4 * Math.ceil(longest / 4) * 4;
    try {
      const memory = new WebAssembly.Memory({ initial: Math.ceil((other + 4 * longest + 16) / 65536) });
      const { f } = new WebAssembly.Instance(new WebAssembly.Module(module()), { m: { m: memory } }).exports;
      const numbers = new Float32Array(memory.buffer), xs = numbers.subarray(scratch / 4), ys = numbers.subarray(other / 4);
      return {
        numbers,
        product(W, x, rows) {
          const n = x.length, whole = rows - rows % 4;
          if (n % 4 || !whole || W.buffer !== memory.buffer || W.byteOffset % 16) return plain(W, x, rows);
          xs.set(x);
          f(W.byteOffset, scratch, other, whole, 4 * n);
          const y = new Float64Array(rows);
          y.set(ys.subarray(0, whole));
          return plain(W, x, rows, y, whole);
        },
      };
    } catch (error) {  // a browser without WebAssembly, or without its instructions for four numbers
      if (!(error instanceof ReferenceError || error instanceof WebAssembly.CompileError || error instanceof RangeError)) throw error;
      return { numbers: new Float32Array(count), product: plain };
    }
  }

  return { plain, room };
})();

if (typeof module !== "undefined") module.exports = Product;
