// Tables that are sorted, searched and kept short; rows stay the same elements from poll to poll.

const ROWS_FIRST = 16;

class Table {
  // columns: {name, value(row) for sorting, cell(row) -> text or node, wide?, down? sorts descending first}
  constructor(root, { caption, key, columns, empty }) {
    Object.assign(this, {
      key,
      columns,
      empty,
      rows: [],
      sort: null,
      all: false,
      wanted: "",
      kept: new Map(),
    });
    this.head = el("tr", { role: "row" });
    columns.forEach((column, i) => {
      const button = el("button", { type: "button", title: column.title }, column.name);
      button.addEventListener("click", () => this.by(i));
      column.th = el(
        "th",
        {
          class: column.text ? "left" : null,
          role: "columnheader",
          scope: "col",
          "aria-sort": "none",
        },
        button,
      );
      this.head.append(column.th);
    });
    this.body = el("tbody", { role: "rowgroup" });
    const table = el(
      "table",
      { role: "table", "aria-label": caption },
      el("thead", { role: "rowgroup" }, this.head),
      this.body,
    );
    this.search = el("input", { type: "search", spellcheck: "false", autocomplete: "off" });
    this.search.addEventListener("input", () => {
      this.wanted = this.search.value.toLowerCase();
      this.draw();
    });
    this.found = el("span", { class: "muted", role: "status" });
    this.tools = el(
      "div",
      { class: "tools", hidden: true },
      el("label", {}, "Find", this.search),
      this.found,
    );
    this.button = el("button", { type: "button", class: "more", hidden: true });
    this.button.addEventListener("click", () => {
      this.all = !this.all;
      this.draw();
    });
    this.none = el("p", { class: "empty" }, empty);
    root.classList.add("table");
    root.replaceChildren(this.tools, table, this.none, this.button);
    this.table = table;
  }

  by(i) {
    const before = this.sort;
    const first = this.columns[i].down ? -1 : 1;
    if (before && before.column === i && before.way !== first) this.sort = null;
    else this.sort = { column: i, way: before && before.column === i ? -before.way : first };
    this.columns.forEach((column, at) => {
      const way = this.sort && this.sort.column === at ? this.sort.way : 0;
      column.th.setAttribute(
        "aria-sort",
        way > 0 ? "ascending" : way < 0 ? "descending" : "none",
      );
    });
    this.draw();
  }

  take(rows) {
    this.rows = rows;
    this.draw();
  }

  draw() {
    let rows = this.wanted
      ? this.rows.filter((row) => this.key(row).toLowerCase().includes(this.wanted))
      : [...this.rows];
    if (this.sort) {
      const { column, way } = this.sort;
      const value = this.columns[column].value;
      rows.sort((a, b) => compare(value(a), value(b), way));
    }
    const found = rows.length;
    if (!this.all) rows = rows.slice(0, ROWS_FIRST);
    this.tools.hidden = this.rows.length <= ROWS_FIRST;
    put(this.found, this.wanted ? found + " of " + this.rows.length : "");
    this.button.hidden = found <= ROWS_FIRST;
    put(this.button, this.all ? "Show " + ROWS_FIRST : "Show all " + found);
    this.table.hidden = !rows.length;
    this.none.hidden = Boolean(rows.length);
    put(this.none, this.wanted ? "None is called so." : this.empty);
    const kept = new Map();
    rows.forEach((row, i) => {
      const key = this.key(row);
      const line = this.kept.get(key) || this.make();
      kept.set(key, line);
      this.columns.forEach((column, at) => place(line.children[at], column.cell(row)));
      line.dataset.key = key;
      if (this.body.children[i] !== line)
        this.body.insertBefore(line, this.body.children[i] || null);
    });
    while (this.body.children.length > rows.length) this.body.lastChild.remove();
    this.kept = kept;
  }

  make() {
    return el(
      "tr",
      { role: "row" },
      ...this.columns.map((column, i) => {
        if (i === 0) return el("th", { role: "rowheader", scope: "row" });
        return el("td", {
          role: "cell",
          "data-label": column.name,
          class: column.text ? "left" : column.wide ? "wide" : null,
        });
      }),
    );
  }
}

// Puts a text, or an element that is another one than stands there.
function place(cell, content) {
  if (!(content instanceof Node)) {
    if (cell.firstElementChild) cell.replaceChildren(content);
    return put(cell, content);
  }
  if (cell.childNodes.length === 1 && cell.firstChild.isEqualNode(content)) return undefined;
  return cell.replaceChildren(content);
}

function compare(a, b, way) {
  const missing = (value) => value === null || value === undefined;
  if (missing(a) || missing(b)) return missing(a) - missing(b);
  return (typeof a === "string" ? a.localeCompare(b) : a - b) * way;
}

const pill = (state) =>
  el("span", { class: "pill", "data-state": state }, STATES[state] || state);
const hot = (text, is) => (is ? el("span", { class: "hot" }, text) : text);
const recent = (row) => row.recent || {};

function share(part, whole, text) {
  const bar = el("span", { class: "bar fill", role: "img", "aria-label": text });
  const inner = el("span");
  inner.style.width = (whole > 0 ? Math.min(100, (100 * part) / whole) : 0).toFixed(1) + "%";
  bar.append(inner);
  return el("span", {}, bar, el("span", { class: "under" }, text));
}

function layers(row) {
  const rates = known(recent(row).near) ? row.recent : row.since_start;
  if (!known(rates.near)) return NONE;
  const text = LAYERS.map(([column, name]) => name + " " + show.percent(rates[column])).join(
    ", ",
  );
  const bar = el("span", { class: "bar", role: "img", "aria-label": text, title: text });
  for (const [column] of LAYERS) {
    const part = el("span", { class: "f-" + column });
    part.style.width = (100 * rates[column]).toFixed(1) + "%";
    bar.append(part);
  }
  return bar;
}

const plain = (name, read, format, more) => ({
  name,
  down: true,
  value: read,
  cell: (row) => format(read(row)),
  ...more,
});

const GROUPS = {
  caption: "Groups",
  key: (row) => row.name,
  empty: "This node has no groups.",
  columns: [
    { name: "Group", value: (row) => row.name, cell: (row) => row.name },
    plain("Gets/s", (row) => recent(row).gets_s, show.rate),
    plain("Hit ratio", (row) => recent(row).hit_ratio, show.percent, {
      title: "of the last minute",
    }),
    {
      name: "By layer",
      title: "near cache, shared memory, known absent, worker",
      wide: true,
      value: (row) => recent(row).near,
      cell: layers,
    },
    plain("Since start", (row) => row.since_start.hit_ratio, show.percent, {
      title: "hit ratio since the node's start",
    }),
    plain("Loads/s", (row) => recent(row).loads_s, show.rate),
    plain("p50", (row) => recent(row).load_p50_ms, show.ms, { title: "of the loads' times" }),
    plain("p99", (row) => recent(row).load_p99_ms, show.ms, { title: "of the loads' times" }),
    {
      name: "Errors/s",
      down: true,
      value: (row) => recent(row).load_errors_s,
      cell: (row) => hot(show.rate(recent(row).load_errors_s), recent(row).load_errors_s > 0),
    },
    plain("From peers/s", (row) => recent(row).fetches_s, show.rate),
    plain("Evicted/s", (row) => recent(row).evictions_s, show.rate),
    plain("Items", (row) => row.items, show.count),
    {
      name: "Bytes",
      wide: true,
      down: true,
      value: (row) => row.live_bytes / Math.max(1, row.capacity_bytes),
      cell: (row) =>
        share(
          row.live_bytes,
          row.capacity_bytes,
          show.bytes(row.live_bytes) + " of " + show.bytes(row.capacity_bytes),
        ),
    },
  ],
};

const PEERS = {
  caption: "Peers",
  key: (row) => row.address,
  empty: "No peers.",
  columns: [
    {
      name: "Peer",
      value: (row) => row.address,
      cell: (row) => (row.address === "other" ? "other nodes, together" : row.address),
    },
    { name: "State", text: true, value: (row) => row.state, cell: (row) => pill(row.state) },
    {
      name: "Breakers",
      title: "workers of this node to which the peer counts as down",
      down: true,
      value: (row) => row.down,
      cell: (row) =>
        row.links
          ? hot(row.down ? row.down + " of " + row.links + " open" : "closed", row.down > 0)
          : NONE,
    },
    plain("Calls/s", (row) => recent(row).calls_s, show.rate),
    {
      name: "Failed/s",
      down: true,
      value: (row) => recent(row).failures_s,
      cell: (row) => hot(show.rate(recent(row).failures_s), recent(row).failures_s > 0),
    },
    plain("p50", (row) => recent(row).p50_ms, show.ms),
    plain("p99", (row) => recent(row).p99_ms, show.ms),
    plain("In flight", (row) => row.in_flight, show.count),
    plain("Invalidations waiting", (row) => row.invalidations_waiting, show.count),
    plain(
      "Lag",
      (row) => row.invalidation_lag_s,
      (n) => (n > 0 ? show.seconds(n) : "0"),
      { title: "age of the oldest invalidation that waits" },
    ),
  ],
};

const queue = (row) => {
  if (row.role === "worker")
    return (row.loads_running || 0) + (row.loads_queued || 0) + (row.fetches_in_flight || 0);
  return row.calls_in_flight;
};

const ROLES = {
  caption: "Processes",
  key: (row) => row.role + " " + row.index,
  empty: "No process is known.",
  columns: [
    {
      name: "Process",
      value: (row) => row.role + String(row.index).padStart(4, "0"),
      cell: (row) =>
        row.role === "supervisor" || row.role === "http" || row.role === "agent"
          ? row.role
          : row.role + " " + row.index,
    },
    { name: "State", text: true, value: (row) => row.state, cell: (row) => pill(row.state) },
    { name: "PID", value: (row) => row.pid, cell: (row) => (row.pid ? String(row.pid) : NONE) },
    {
      name: "Restarts",
      down: true,
      value: (row) => row.restarts,
      cell: (row) => (row.restarts ? el("span", { class: "warmish" }, row.restarts) : "0"),
    },
    plain("Uptime", (row) => row.uptime_s, show.seconds),
    plain("CPU", (row) => row.cpu, show.cores, { title: "of one core, in the last minute" }),
    plain("RSS", (row) => row.rss_bytes, show.bytes, {
      title: "memory, with what it touched of the shared one",
    }),
    plain("Own", (row) => row.own_bytes, show.bytes, {
      title: "memory without what is shared with others",
    }),
    plain("Connections", (row) => row.connections, show.count),
    {
      name: "Under way",
      title: "worker: loads that run + wait, and keys asked of peers; front and http: calls",
      down: true,
      value: queue,
      cell: (row) => {
        if (row.role !== "worker") return show.count(queue(row));
        return (
          (row.loads_running || 0) +
          " + " +
          (row.loads_queued || 0) +
          ", " +
          (row.fetches_in_flight || 0)
        );
      },
    },
  ],
};
