// Small charts of the last minutes: lines or a stack of shares, drawn as SVG.
// All share one moment under the pointer, so that what happened together is seen together.

const WINDOW_MS = 600000;
const GAP_MS = 25000; // points further apart are not joined: nobody sampled between them
const MARGIN = { left: 40, right: 4, top: 6, bottom: 14 };
const HEIGHT = 96;

const LAYERS = [
  ["near", "near cache"],
  ["memory", "shared memory"],
  ["negative", "known absent"],
  ["worker", "worker"],
];

const CHARTS = [
  {
    title: "Hit ratio by layer",
    kind: "stack",
    format: show.percent,
    empty: "no gets yet",
    layers: LAYERS,
  },
  { title: "Gets per second", format: show.rate, lines: [["gets_s", "gets", "s1"]] },
  {
    title: "Loads per second",
    format: show.rate,
    lines: [
      ["loads_s", "getter", "s1"],
      ["fetches_s", "from peers", "s2"],
      ["load_errors_s", "failed", "s5", true],
    ],
  },
  { title: "Evictions per second", format: show.rate, lines: [["evictions_s", "evicted", "s4"]] },
  {
    title: "Load time",
    log: true,
    format: show.ms,
    empty: "no loads yet",
    lines: [
      ["load_p50_ms", "p50", "s1"],
      ["load_p99_ms", "p99", "s3", true],
    ],
  },
  {
    title: "Peer calls",
    id: "peer",
    log: true,
    format: show.ms,
    empty: "no calls to peers yet",
    lines: [
      ["peer_p50_ms", "p50", "s1"],
      ["peer_p99_ms", "p99", "s3", true],
    ],
  },
  {
    title: "Requests of clients",
    log: true,
    format: show.ms,
    empty: "no gRPC or HTTP requests yet",
    lines: [
      ["grpc_p50_ms", "gRPC p50", "s1"],
      ["grpc_p99_ms", "p99", "s3", true],
      ["http_p50_ms", "HTTP p50", "s2"],
      ["http_p99_ms", "p99", "s4", true],
    ],
  },
  {
    title: "CPU of all processes",
    format: (n) => (known(n) ? trimmed(n) + " cores" : NONE),
    lines: [["cpu", "cores", "s1"]],
  },
];

class Chart {
  constructor(about, board) {
    this.about = about;
    this.board = board;
    this.plot = svg("svg", { role: "img", tabindex: "0", "aria-label": about.title });
    this.at = el("span", { class: "at" });
    this.legend = el("div", { class: "legend" });
    this.root = el(
      "div",
      { class: "chart panel" },
      el("h3", {}, about.title, this.at),
      this.plot,
      this.legend,
    );
    this.values = (about.layers || about.lines).map(([, name, colour, dashed]) => {
      const key = about.layers
        ? el("span", { class: "key" })
        : el("span", { class: "key stroke c-" + colour + (dashed ? " dash" : "") });
      const value = el("b", {}, NONE);
      this.legend.append(el("span", {}, key, name + " ", value));
      return { key, value };
    });
    if (about.layers)
      about.layers.forEach(([column], i) => this.values[i].key.classList.add("f-" + column));
    this.plot.addEventListener("pointermove", (event) => board.point(this.time(event)));
    this.plot.addEventListener("pointerdown", (event) => board.point(this.time(event)));
    this.plot.addEventListener("pointerleave", () => board.point(null));
    this.plot.addEventListener("blur", () => board.point(null));
    this.plot.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
      if (event.key === "Escape") board.point(null);
      if (step === undefined) return;
      event.preventDefault();
      board.step(step);
      herald.tell(this.title());
    });
  }

  get width() {
    return Math.max(120, this.plot.clientWidth || 280);
  }

  time(event) {
    const box = this.plot.getBoundingClientRect();
    const share =
      (event.clientX - box.left - MARGIN.left) / (box.width - MARGIN.left - MARGIN.right);
    return this.board.end - WINDOW_MS * (1 - Math.min(1, Math.max(0, share)));
  }

  x(ms) {
    return (
      MARGIN.left +
      (1 - (this.board.end - ms) / WINDOW_MS) * (this.width - MARGIN.left - MARGIN.right)
    );
  }

  y(value) {
    const { low, high } = this.range;
    const at = this.about.log
      ? Math.log(Math.max(value, low) / low) / Math.log(high / low)
      : (value - low) / (high - low);
    return (
      HEIGHT -
      MARGIN.bottom -
      Math.min(1, Math.max(0, at)) * (HEIGHT - MARGIN.top - MARGIN.bottom)
    );
  }

  measure(points) {
    if (this.about.kind === "stack") return { low: 0, high: 1, ticks: [0, 0.5, 1] };
    let high = 0;
    let low = Infinity;
    for (const point of points) {
      for (const [column] of this.about.lines) {
        const value = point[column];
        if (!known(value)) continue;
        high = Math.max(high, value);
        if (value > 0) low = Math.min(low, value);
      }
    }
    return this.about.log ? decades(low, high) : rounds(high);
  }

  draw(points, chosen) {
    const about = this.about;
    this.range = this.measure(points);
    const shapes = [];
    for (const tick of this.range.ticks) {
      const y = Math.round(this.y(tick)) + 0.5;
      shapes.push(
        svg("line", {
          class: "grid",
          x1: MARGIN.left,
          x2: this.width - MARGIN.right,
          y1: y,
          y2: y,
        }),
      );
      const label =
        about.kind === "stack"
          ? Math.round(tick * 100) + " %"
          : about.log
            ? show.ms(tick)
            : show.rate(tick);
      shapes.push(svg("text", { x: MARGIN.left - 5, y: y + 3, "text-anchor": "end" }, label));
    }
    for (const minutes of [10, 5, 0]) {
      const anchor = { 10: "start", 5: "middle", 0: "end" }[minutes];
      shapes.push(
        svg(
          "text",
          { x: this.x(this.board.end - minutes * 60000), y: HEIGHT - 2, "text-anchor": anchor },
          minutes ? "−" + minutes + " min" : "now",
        ),
      );
    }
    const drawn =
      about.kind === "stack"
        ? this.stack(points)
        : about.lines.map((line) => this.line(points, line));
    shapes.push(...drawn.filter(Boolean));
    if (!drawn.some(Boolean)) {
      const middle = (MARGIN.left + this.width) / 2;
      shapes.push(
        svg(
          "text",
          { x: middle, y: HEIGHT / 2, "text-anchor": "middle" },
          about.why || (points.length ? about.empty || "nothing yet" : "no data yet"),
        ),
      );
    }
    if (chosen && this.board.time !== null) {
      const x = this.x(chosen.unix_ms);
      shapes.push(
        svg("line", { class: "cross", x1: x, x2: x, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }),
      );
    }
    this.plot.setAttribute("viewBox", "0 0 " + this.width + " " + HEIGHT);
    this.plot.replaceChildren(...shapes);
    const shown = this.board.time === null ? points[points.length - 1] : chosen;
    (about.layers || about.lines).forEach(([column], i) =>
      put(this.values[i].value, shown ? about.format(shown[column]) : NONE),
    );
    put(
      this.at,
      this.board.time !== null && chosen
        ? show.time(chosen.unix_ms)
        : about.layers && shown
          ? about.format(total(shown))
          : "",
    );
    this.plot.setAttribute("aria-label", this.title());
  }

  title() {
    const values = (this.about.layers || this.about.lines).map(
      ([, name], i) => name + " " + this.values[i].value.textContent,
    );
    const when = this.board.time === null ? "now" : this.at.textContent;
    return this.about.title + ", " + when + ": " + values.join(", ");
  }

  line(points, [column, , colour, dashed]) {
    let path = "";
    let last = null;
    for (const point of points) {
      const value = point[column];
      if (!known(value)) {
        last = null;
        continue;
      }
      const joined = last !== null && point.unix_ms - last <= GAP_MS;
      const at = this.x(point.unix_ms).toFixed(1) + " " + this.y(value).toFixed(1);
      // A point without neighbours is a dot: a line of no length with round ends.
      path += joined ? "L" + at : "M" + at + "h0.01";
      last = point.unix_ms;
    }
    return path
      ? svg("path", { class: "line c-" + colour + (dashed ? " dash" : ""), d: path })
      : null;
  }

  stack(points) {
    const shapes = [];
    for (const run of runs(points.filter((point) => known(point.near)))) {
      const below = run.map(() => 0);
      const wide = run.length === 1 ? [run[0], run[0]] : run;
      for (const [column] of this.about.layers) {
        const above = run.map((point, i) => below[i] + point[column]);
        const x = (i) => this.x(wide[i].unix_ms) + (run.length === 1 ? i * 2 - 1 : 0);
        const at = (levels, i) =>
          x(i).toFixed(1) + " " + this.y(levels[Math.min(i, run.length - 1)]).toFixed(1);
        let path = "M" + wide.map((_, i) => at(above, i)).join("L");
        path += "L" + wide.map((_, i) => at(below, wide.length - 1 - i)).join("L") + "Z";
        shapes.push(svg("path", { class: "f-" + column, d: path }));
        above.forEach((level, i) => (below[i] = level));
      }
    }
    return shapes;
  }
}

const total = (point) =>
  known(point.near) ? LAYERS.reduce((sum, [column]) => sum + point[column], 0) : null;

function runs(points) {
  const found = [];
  for (const point of points) {
    const run = found[found.length - 1];
    if (run && point.unix_ms - run[run.length - 1].unix_ms <= GAP_MS) run.push(point);
    else found.push([point]);
  }
  return found;
}

function rounds(high) {
  if (!(high > 0)) return { low: 0, high: 1, ticks: [0, 1] };
  const power = 10 ** Math.floor(Math.log10(high));
  const top =
    [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((n) => n * power).find((n) => n >= high * 1.0001) ||
    10 * power;
  return { low: 0, high: top, ticks: [0, top / 2, top] };
}

function decades(low, high) {
  if (!(high > 0)) return { low: 1, high: 100, ticks: [1, 10, 100] };
  let from = Math.floor(Math.log10(low === Infinity ? high : low));
  let to = Math.ceil(Math.log10(high * 1.0001));
  if (to - from < 2) from = to - 2;
  const step = Math.ceil((to - from) / 3);
  const ticks = [];
  for (let power = from; power <= to; power += step) ticks.push(10 ** power);
  return { low: 10 ** from, high: 10 ** to, ticks };
}

// All the charts, and the moment that they show.
class Board {
  constructor(root) {
    this.points = [];
    this.end = Date.now();
    this.time = null; // under the pointer; null: the last point
    this.charts = CHARTS.map((about) => new Chart({ ...about }, this));
    root.replaceChildren(...this.charts.map((chart) => chart.root));
    new ResizeObserver(() => this.draw()).observe(root);
  }

  // Takes a document's points; more or all of them again do no harm.
  take(history, now, clustered) {
    const last = this.points.length ? this.points[this.points.length - 1].unix_ms : 0;
    if (now < last - 1000) this.points = []; // the clock went back
    const after = this.points.length ? last : 0;
    for (const row of history.points) {
      const point = Object.fromEntries(history.columns.map((column, i) => [column, row[i]]));
      if (point.unix_ms > after) this.points.push(point);
    }
    while (this.points.length && this.points[0].unix_ms < now - WINDOW_MS) this.points.shift();
    this.end = now;
    const peer = this.charts.find((chart) => chart.about.id === "peer");
    peer.about.why = clustered ? null : "a single node has no peers";
    this.draw();
  }

  get last() {
    return this.points.length ? this.points[this.points.length - 1].unix_ms : 0;
  }

  get chosen() {
    if (this.time === null) return null;
    let best = null;
    for (const point of this.points) {
      if (
        best === null ||
        Math.abs(point.unix_ms - this.time) < Math.abs(best.unix_ms - this.time)
      )
        best = point;
    }
    return best;
  }

  point(time) {
    this.time = time;
    this.draw();
  }

  step(count) {
    if (!this.points.length) return;
    const now = this.chosen ? this.points.indexOf(this.chosen) : this.points.length - 1;
    const next = Math.min(this.points.length - 1, Math.max(0, now + count));
    this.point(this.points[next].unix_ms);
  }

  draw() {
    const chosen = this.chosen;
    for (const chart of this.charts) chart.draw(this.points, chosen);
  }
}
