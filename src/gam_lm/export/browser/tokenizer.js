"use strict";
// Byte-level BPE: what tokenizers' ByteLevel pre-tokenizer and BPE model do, for text in which special tokens are the characters they are.

const BPE = (() => {
  // Bytes that are printable stand for themselves in the vocabulary, the others for characters from 256 on.
  const characters = [], bytes = new Map();
  for (let byte = 0, next = 256; byte < 256; byte++) {
    const plain = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
    characters.push(String.fromCodePoint(plain ? byte : next++));
    bytes.set(characters[byte], byte);
  }
  const SPACE = "\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";  // Unicode's White_Space; \s is another set
  const WORD = new RegExp(`'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^${SPACE}\\p{L}\\p{N}]+|[${SPACE}]+(?![^${SPACE}])|[${SPACE}]+`, "gu");

  class Tokenizer {
    // tokens: spellings by id, null for none. merges: pairs of ids, flat, the first merged first. prefix: whether a text gets a space before it.
    constructor({ tokens, merges, special, prefix, words }) {
      Object.assign(this, { tokens, prefix, words, special: new Map(special) });
      this.ids = new Map(tokens.map((token, id) => [token, id]));
      this.ranks = new Map();
      for (let i = 0; i < merges.length; i += 2) {
        const made = this.ids.get(tokens[merges[i]] + tokens[merges[i + 1]]);
        if (!this.ranks.has(`${merges[i]} ${merges[i + 1]}`)) this.ranks.set(`${merges[i]} ${merges[i + 1]}`, [i / 2, made]);
      }
    }

    encode(text) {
      if (this.prefix && text && !text.startsWith(" ")) text = ` ${text}`;
      return (this.words ? text.match(WORD) ?? [] : [text]).flatMap((word) => this.word(word));
    }

    // The pair that was merged first in training is merged first, over and over.
    word(word) {
      const ids = [...new TextEncoder().encode(word)].map((byte) => this.ids.get(characters[byte]));
      for (;;) {
        let best = null, place = -1;
        for (let i = 0; i + 1 < ids.length; i++) {
          const found = this.ranks.get(`${ids[i]} ${ids[i + 1]}`);
          if (found && (!best || found[0] < best[0])) [best, place] = [found, i];
        }
        if (!best) return ids;
        ids.splice(place, 2, best[1]);
      }
    }

    // The bytes of a token; those of several make a character now and then.
    bytes(id) {
      if (this.special.has(id)) return new TextEncoder().encode(this.special.get(id));
      return Uint8Array.from([...(this.tokens[id] ?? "")], (each) => bytes.get(each));
    }

    decode(ids) {
      return new TextDecoder("utf-8", { ignoreBOM: true }).decode(Uint8Array.from(ids.flatMap((id) => [...this.bytes(id)])));
    }
  }

  return { Tokenizer };
})();

if (typeof module !== "undefined") module.exports = BPE;
