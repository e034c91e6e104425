"use strict";
// What the memory of a layer holds, as a picture, and the switches that take heads and slots out of it. The names are those of page.js.

// A canvas of `wide` × `high` numbers: blue below 0, orange above, the page's colour at 0.
function heat(canvas, wide, high, value, most) {
  canvas.width = wide;
  canvas.height = high;
  const pen = canvas.getContext("2d"), image = pen.createImageData(wide, high);
  const zero = dark.matches ? [23, 24, 26] : [251, 250, 248], above = dark.matches ? [255, 150, 70] : [190, 80, 10], below = dark.matches ? [90, 170, 255] : [20, 90, 170];
  for (let i = 0; i < wide * high; i++) {
    const x = value(i) / most, strength = Math.min(1, Math.sqrt(Math.abs(x))), end = x > 0 ? above : below;
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = zero[c] + strength * (end[c] - zero[c]);
    image.data[4 * i + 3] = 255;
  }
  pen.putImageData(image, 0, 0);
}

const largest = (x) => x.reduce((most, each) => Math.max(most, Math.abs(each)), 1e-30);

function drawMemory() {
  const { num_heads: H, num_memory_slots: S, write } = made.config.options.gam, state = model.layers[layer()], box = $("memory");
  if (write === "none") {
    const shares = state.seen.shares;
    if (!shares) return;
    const wide = Math.ceil(Math.sqrt(S)), most = largest(shares);
    heat(box.querySelector("canvas"), wide, Math.ceil(S / wide), (i) => shares[i] ?? 0, most);
    return;
  }
  const bank = model.weights[`layers.${layer()}.mixer.written.bank`], E = made.config.hidden_size / H, M = S / H;
  // The mean rule holds sums and weights: what a slot gives is (c V0 + S) / (c + Z).
  const prior = state.seen.prior, held = (i) => {
    const s = Math.floor(i / E);
    return prior ? (prior[s] * bank[i] + state.memory[i]) / (prior[s] + state.Z[s]) : bank[i] + state.memory[i];
  };
  const values = Float32Array.from({ length: S * E }, (_, i) => held(i)), most = largest(values);
  box.querySelectorAll("canvas").forEach((canvas, h) => heat(canvas, E, M, (i) => values[h * M * E + i], most));
}

// The switches of the layer that is shown.
function switches() {
  const { num_heads: H, num_memory_slots: S, write, fusion } = made.config.options.gam, box = $("memory"), written = write !== "none";
  const none = !written && fusion === "local";
  $("slots-label").hidden = none;
  box.className = written ? "" : "one";
  $("legend").textContent = none ? "The model has none." : written
    ? "What each head holds: a row for each slot, orange above zero, blue below. Press a head to switch it off."
    : "How much of each slot the newest token read. Click a slot to switch it off.";
  if (none) box.replaceChildren();
  else if (written) {
    box.replaceChildren(...Array.from({ length: H }, (_, h) => {
      const button = make("button", "", make("canvas", ""), `Head ${h + 1}`);
      button.type = "button";
      button.onclick = () => {
        const on = button.getAttribute("aria-pressed") === "true";
        silence((s) => (Math.floor(s / (S / H)) === h ? on : null));
      };
      return button;
    }));
  } else {
    const canvas = make("canvas", "");
    canvas.onclick = (event) => {
      const wide = Math.ceil(Math.sqrt(S)), box = canvas.getBoundingClientRect();
      const place = Math.floor((event.clientY - box.top) / box.height * canvas.height) * wide + Math.floor((event.clientX - box.left) / box.width * wide);
      silence((s) => (s === place ? !model.silent[layer()]?.[s] : null));
    };
    box.replaceChildren(canvas);
  }
  $("slots").value = ranges(model.silent[layer()]);
  pressed();
}

// Switch slots of the layer: `off` says true, false, or null for as it was.
function silence(off) {
  const S = made.config.options.gam.num_memory_slots, before = model.silent[layer()];
  const mask = Uint8Array.from({ length: S }, (_, s) => Number(off(s) ?? before?.[s] ?? 0));
  model.silent[layer()] = mask.some(Boolean) ? mask : null;
  $("slots").value = ranges(model.silent[layer()]);
  pressed();
}

function pressed() {
  const { num_heads: H, num_memory_slots: S } = made.config.options.gam;
  document.querySelectorAll("#memory button").forEach((button, h) => {
    const mask = model.silent[layer()]?.subarray(h * S / H, (h + 1) * S / H);
    button.setAttribute("aria-pressed", String(!mask?.every(Boolean)));
  });
  const layers = model.silent.flatMap((mask, i) => (mask ? [`${mask.reduce((sum, each) => sum + each, 0)} of ${S} slots of layer ${i + 1}`] : []));
  $("off").textContent = layers.length ? `Off: ${layers.join(", ")}. The text goes on without them.` : "";
}

// A mask as "3 17 20-31", and back.
function ranges(mask) {
  const found = [];
  mask?.forEach((off, s) => {
    if (!off) return;
    if (found.length && found.at(-1)[1] === s - 1) found.at(-1)[1] = s;
    else found.push([s, s]);
  });
  return found.map(([first, last]) => (first === last ? first : `${first}-${last}`)).join(" ");
}
function inRanges(text) {
  const parts = [...text.matchAll(/(\d+)(?:\s*-\s*(\d+))?/g)].map(([, first, last]) => [Number(first), Number(last ?? first)]);
  return (s) => parts.some(([first, last]) => first <= s && s <= last);
}
