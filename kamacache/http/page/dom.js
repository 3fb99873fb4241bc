// What the rest is built with: elements, and numbers as people read them.
// Whatever came from the server is put in as text. Nothing here, or anywhere, parses it as HTML.

const SVG = "http://www.w3.org/2000/svg";
const $ = (id) => document.getElementById(id);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    node.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children) {
    if (child === null || child === undefined) continue;
    node.append(child instanceof Node ? child : String(child));
  }
  return node;
}

const el = (tag, attributes, ...children) =>
  fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);

// Changes a text only where it is another one: a screen reader and a selection stay as they are.
function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const NONE = "–";
const known = (number) => typeof number === "number" && Number.isFinite(number);

function trimmed(number) {
  const digits = number >= 100 ? 0 : number >= 10 ? 1 : 2;
  return number
    .toFixed(digits)
    .replace(/(\.\d*?)0+$/, "$1")
    .replace(/\.$/, "");
}

function scaled(number, step, units) {
  let unit = 0;
  while (Math.abs(number) >= step && unit < units.length - 1) {
    number /= step;
    unit += 1;
  }
  return trimmed(number) + units[unit];
}

const show = {
  count: (n) =>
    known(n)
      ? n < 10000
        ? String(Math.round(n))
        : scaled(n, 1000, ["", " k", " M", " G", " T"])
      : NONE,
  rate: (n) =>
    known(n) ? (n > 0 && n < 0.01 ? "<0.01" : scaled(n, 1000, ["", " k", " M", " G"])) : NONE,
  bytes: (n) => (known(n) ? scaled(n, 1024, [" B", " KiB", " MiB", " GiB", " TiB"]) : NONE),
  // A ratio that is not quite 1 is never shown as 100 %.
  percent: (n) => {
    if (!known(n)) return NONE;
    const digits = n > 0.99 && n < 1 ? 2 : 1;
    const factor = 10 ** (digits + 2);
    return ((Math.floor(n * factor + 1e-6) / factor) * 100).toFixed(digits) + " %";
  },
  cores: (n) => (known(n) ? (n * 100).toFixed(n < 0.1 ? 1 : 0) + " %" : NONE),
  ms: (n) => {
    if (!known(n)) return NONE;
    if (n < 1) return trimmed(n * 1000) + " µs";
    return n < 1000 ? trimmed(n) + " ms" : trimmed(n / 1000) + " s";
  },
  seconds: (n) => {
    if (!known(n)) return NONE;
    if (n < 1) return trimmed(n * 1000) + " ms";
    if (n < 60) return Math.floor(n) + " s";
    if (n < 3600) return Math.floor(n / 60) + " min " + Math.floor(n % 60) + " s";
    if (n < 86400) return Math.floor(n / 3600) + " h " + Math.floor((n % 3600) / 60) + " min";
    return Math.floor(n / 86400) + " d " + Math.floor((n % 86400) / 3600) + " h";
  },
  time: (ms) =>
    new Date(ms).toLocaleTimeString([], {
      hour12: false,
      hour: "2-digit",
      minute: "2-digit",
      second: "2-digit",
    }),
};

// Tells a screen reader once what has changed; never more often than it can be heard.
const herald = {
  told: "",
  tell(text) {
    if (text === this.told) return;
    this.told = text;
    put($("said"), text);
  },
};
