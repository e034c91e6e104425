"use strict";
// What is seen: the text token by token, and what the model did at each; memory.js draws its memory.

const $ = (id) => document.getElementById(id);
const dark = matchMedia("(prefers-color-scheme: dark)");
const TOP = 6;  // sources that are named
const SLICE = 14;  // milliseconds of work before the browser may draw and take keys
const FRAME = 80;  // milliseconds between two looks at the model

let made, model, tokenizer, sources, decoder;
let logits = null;  // after the last token
let tokens = [];  // {id, text, given, surprise, layers}
let chosen = null;  // a token that was pointed at; null follows the newest
let running = false, stopping = false;

function unpacked() {
  made = JSON.parse($("data").textContent);
  const text = atob($("weights").textContent), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  $("weights").remove();
  model = new GAM.Model(made.config, GAM.unpack(bytes.buffer, made.tensors));
  tokenizer = new BPE.Tokenizer(made.tokenizer);
}

function anew() {
  model.reset();
  sources = model.layers.map((_, i) => (made.config.options.gam.write === "none" ? null : new Sources(model, i)));
  decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  logits = chosen = null;
  tokens = [];
  $("text").replaceChildren();
  show();
}

// Read one token and keep what happened.
function read(id, given) {
  const surprise = logits && GAM.surprise(logits, id);
  logits = model.step(id);
  const layers = model.layers.map(({ seen }, i) => {
    const found = { gates: { ...seen.gates } };
    if (seen.b) found.gates.write = seen.b.reduce((sum, each) => sum + each, 0) / seen.b.length;
    if (sources[i]) {
      const { tokens: named, bank, older } = sources[i].update(seen);
      found.sources = named.sort((x, y) => y.share - x.share).slice(0, TOP);
      Object.assign(found, { bank, older });
    }
    return found;
  });
  const text = id === made.tokenizer.end ? "" : decoder.decode(tokenizer.bytes(id), { stream: true });
  tokens.push({ id, text, given, surprise, layers });
  $("text").append(span(tokens.at(-1), tokens.length - 1));
}

function sampled(temperature) {
  if (temperature === 0) return logits.reduce((best, value, id) => (value > logits[best] ? id : best), 0);
  let rest = Math.random();
  const chances = GAM.softmax(logits.map((each) => each / temperature));
  for (let id = 0; id < chances.length; id++) if ((rest -= chances[id]) < 0) return id;
  return chances.length - 1;
}

const channel = new MessageChannel();
const drawn = () => new Promise((resolve) => {
  channel.port1.onmessage = resolve;
  channel.port2.postMessage(null);
});

async function goOn() {
  const given = tokenizer.encode($("ask").value), most = Math.max(1, Number($("most").value) || 1);
  if (!given.length && !tokens.length) given.push(made.tokenizer.end ?? 0);
  $("ask").value = "";
  running = true;
  stopping = false;
  $("go").textContent = "Stop";
  let written = 0, first = 0, last = performance.now(), seen = 0, why = "";
  while (!stopping && (given.length || written < most)) {
    if (made.config.positions === "learned" && model.position >= made.config.max_position_embeddings) {
      why = `the model's positions end at ${made.config.max_position_embeddings} tokens`;
      break;
    }
    if (given.length) read(given.shift(), true);
    else {
      first ||= performance.now();
      const id = sampled(Number($("temperature").value));
      read(id, false);
      written++;
      if (id === made.tokenizer.end) {
        why = "the text has ended";
        break;
      }
    }
    if (performance.now() - last > SLICE) {
      if (performance.now() - seen > FRAME) {
        show();
        say(written, performance.now() - first, "");
        seen = performance.now();
      }
      await drawn();
      last = performance.now();
    }
  }
  running = false;
  $("go").textContent = "Go on";
  show();
  say(written, performance.now() - first, stopping ? "stopped" : why);
}

function say(written, milliseconds, why) {
  const parts = [`${tokens.length} tokens`];
  if (written) parts.push(`${(1000 * written / milliseconds).toFixed(0)} tokens a second`);
  if (why) parts.push(why);
  $("status").textContent = parts.join(" · ");
}

function make(tag, className, ...content) {
  const element = document.createElement(tag);
  element.className = className;
  element.append(...content);
  return element;
}

function span(token, index) {
  const element = make("span", token.given ? "given" : "", token.text);
  element.setAttribute("role", "option");
  element.dataset.index = index;
  element.tabIndex = -1;
  element.style.setProperty("--value", Math.min(1, (token.surprise ?? 0) / 10).toFixed(3));
  return element;
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;
const chance = (share) => (share < 0.001 ? `1 in ${Math.round(1 / share).toLocaleString("en")}` : percent(share));
const layer = () => Number($("layer").value) - 1;

function bar(name, share, value) {
  const inner = make("b", "");
  inner.style.width = `${Math.max(0, Math.min(100, 100 * share))}%`;
  return make("div", "bar", make("span", "", name), make("i", "", inner), make("span", "", value));
}

// How a token is named in a list.
const named = (index) => (tokens[index].text ? tokens[index].text.replaceAll("\n", "↵") : "·");

function show() {
  const index = chosen ?? tokens.length - 1, token = tokens[index];
  const list = $("text");
  if (chosen === null && list.scrollHeight - list.scrollTop - list.clientHeight < 160) list.scrollTop = list.scrollHeight;
  for (const each of list.querySelectorAll(".source, [aria-selected=true], [tabindex='0']")) {
    each.classList.remove("source");
    each.removeAttribute("aria-selected");
    each.tabIndex = -1;
  }
  $("follow").hidden = chosen === null;
  $("layer-name").textContent = `${layer() + 1} of ${model.layers.length}`;
  $("chosen").textContent = token ? `“${named(index)}”, token ${index + 1}` : "No token yet";
  const found = token?.layers[layer()];
  $("surprise").textContent = token?.surprise == null ? "" : `${token.surprise.toFixed(2)} nats: its chance was ${chance(Math.exp(-token.surprise))}`;
  const gates = Object.entries(found?.gates ?? {}).filter(([, value]) => value !== null);
  const names = { local: "local path", memory: "memory path", write: "write gate" };
  $("gates").replaceChildren(...gates.map(([name, value]) => bar(names[name], Math.abs(value), value.toFixed(3))));
  if (token) {
    const element = list.children[index];
    element.setAttribute("aria-selected", "true");
    element.tabIndex = 0;
  }
  $("reads").hidden = !sources[layer()];
  if (found?.sources) {
    for (const each of found.sources) if (each.share > 0.01) list.children[each.index].classList.add("source");
    $("sources").replaceChildren(
      ...found.sources.map((each) => bar(named(each.index), each.share, percent(each.share))),
      bar("the learned bank", found.bank, percent(found.bank)), ...(found.older ? [bar("older tokens", found.older, percent(found.older))] : []),
    );
  } else $("sources").replaceChildren();
  drawSurprises(index);
  drawMemory();
}

function drawSurprises(index) {
  const canvas = $("surprises"), pen = canvas.getContext("2d"), style = getComputedStyle(document.body);
  canvas.width = canvas.clientWidth || 320;
  const shown = tokens.slice(Math.max(0, index - 79), index + 1), wide = canvas.width / 80;
  pen.fillStyle = style.getPropertyValue("--accent");
  shown.forEach(({ surprise }, i) => {
    const high = Math.min(1, (surprise ?? 0) / 10) * canvas.height;
    pen.fillRect(i * wide, canvas.height - high, Math.max(1, wide - 1), high);
  });
}

function choose(index) {
  chosen = Math.max(0, Math.min(tokens.length - 1, index));
  show();
}

$("form").onsubmit = (event) => {
  event.preventDefault();
  if (running) stopping = true;
  else if (model) goOn();
};
$("anew").onclick = () => {
  if (running) stopping = true;
  setTimeout(anew);  // after the token that is being read
  $("status").textContent = "";
  $("ask").focus();
};
$("ask").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) $("form").requestSubmit();
  }
};
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) stopping = true;
});
$("temperature").oninput = () => { $("degrees").textContent = Number($("temperature").value).toFixed(1); };
$("layer").oninput = () => {
  switches();
  show();
};
$("follow").onclick = () => {
  chosen = null;
  $("text").scrollTop = $("text").scrollHeight;
  show();
};
$("slots").onchange = () => {
  const off = inRanges($("slots").value);
  silence((s) => off(s));
};
$("text").onclick = (event) => {
  const index = event.target.dataset?.index;
  if (index !== undefined) choose(Number(index));
};
$("text").onkeydown = (event) => {
  const now = chosen ?? tokens.length - 1, to = { ArrowRight: now + 1, ArrowLeft: now - 1, ArrowDown: now + 10, ArrowUp: now - 10, Home: 0, End: tokens.length - 1 }[event.key];
  if (to === undefined || !tokens.length) return;
  event.preventDefault();
  choose(to);
  $("text").children[chosen].focus();
};
dark.addEventListener("change", () => model && show());

setTimeout(() => {  // the page is drawn before the weights are unpacked
  unpacked();
  $("layer").max = made.config.num_hidden_layers;
  $("facts").textContent = `${(made.parameters / 1e6).toFixed(made.parameters < 1e6 ? 3 : 1)} M parameters, ${made.weights}. It runs in this page, offline; nothing is sent anywhere.`;
  anew();
  switches();
  show();
  $("go").disabled = $("anew").disabled = false;
  $("ask").focus();
}, 30);
