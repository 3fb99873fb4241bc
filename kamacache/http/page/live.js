// The page as a whole: asks for /status.json once a second while it is seen, and shows it.

const EVERY_MS = 1000;
const PATIENCE_MS = 5000; // for one answer
const BACK_OFF_MS = [1000, 2000, 4000, 8000, 15000];

const board = new Board($("charts"));
const ring = new RingView($("ring"));
const peers = new Table($("peers"), PEERS);
const groups = new Table($("groups"), GROUPS);
const roles = new Table($("roles"), ROLES);

const FIGURES = [
  [
    "Gets",
    (t) => show.rate((t.recent || {}).gets_s) + " /s",
    (t) => show.count(t.since_start.gets) + " since start",
  ],
  [
    "Hit ratio",
    (t) => show.percent((t.recent || {}).hit_ratio),
    (t) => show.percent(t.since_start.hit_ratio) + " since start",
  ],
  [
    "Loads",
    (t) => show.rate((t.recent || {}).loads_s) + " /s",
    (t) => show.count(t.since_start.loads) + " since start",
  ],
  [
    "Load time p99",
    (t) => show.ms((t.recent || {}).load_p99_ms),
    (t) => "p50 " + show.ms((t.recent || {}).load_p50_ms),
  ],
  [
    "Load errors",
    (t) => show.rate((t.recent || {}).load_errors_s) + " /s",
    (t) => show.count(t.since_start.load_errors) + " since start",
  ],
  [
    "Evictions",
    (t) => show.rate((t.recent || {}).evictions_s) + " /s",
    (t) => show.count(t.since_start.evictions) + " since start",
  ],
  [
    "Items",
    (t) => show.count(t.items),
    (t) => show.bytes(t.live_bytes) + " of " + show.bytes(t.capacity_bytes),
  ],
];
const figures = FIGURES.map(([name, value, more]) => {
  const shown = el("dd", { class: "value" }, NONE);
  const under = el("dd", { class: "more" }, NONE);
  $("figures").append(el("div", {}, el("dt", {}, name), shown, under));
  return { value, more, shown, under };
});

function render(status) {
  const node = status.node;
  const name = node.name || node.run_dir;
  put($("name"), name);
  document.title = (node.state === "ready" ? "" : node.state + ": ") + name + " · KamaCache";
  $("state").dataset.state = node.state;
  put($("state"), STATES[node.state] || node.state);
  const worker = node.workers === 1 ? " worker, " : " workers, ";
  put(
    $("about"),
    [
      "up " + show.seconds(node.uptime_s),
      node.workers + worker + node.fronts + (node.fronts === 1 ? " front" : " fronts"),
      "version " + node.version,
      "pid " + node.pid,
    ].join(" · "),
  );
  put(
    $("foot"),
    "run directory " +
      node.run_dir +
      " · epoch " +
      node.epoch +
      " · Python " +
      node.python +
      " · reloads " +
      node.reloads,
  );
  notes(status);
  for (const figure of figures) {
    put(figure.shown, figure.value(status.totals));
    put(figure.under, figure.more(status.totals));
  }
  board.take(status.history, status.unix_ms, node.clustered);
  ring.take(status);
  $("peers-section").classList.toggle("alone", !node.clustered);
  peers.empty = node.clustered
    ? "No other node is a member yet."
    : "A single node: it has no peers.";
  peers.take(status.peers);
  const usable = status.peers.filter((peer) => peer.state === "usable").length;
  const over = known(status.recent_s)
    ? "rates of the last " + show.seconds(status.recent_s)
    : "rates come with the next sample";
  put(
    $("peers-hint"),
    status.peers.length
      ? usable +
          " of " +
          status.peers.length +
          " usable" +
          (status.peers_more ? ", " + status.peers_more + " more are not shown" : "")
      : "",
  );
  groups.take(status.groups);
  put($("groups-hint"), status.groups.length + ", " + over);
  roles.take(status.roles);
  put(
    $("roles-hint"),
    status.roles.filter((role) => role.state === "ready").length +
      " of " +
      status.roles.length +
      " ready",
  );
  happened(status.changes);
}

let noted = "";
function notes(status) {
  const told = JSON.stringify(status.notes);
  if (told === noted) return;
  noted = told;
  const lines = status.notes.map((note) =>
    el("li", { class: "note", "data-level": note.level }, note.text),
  );
  if (status.notes_more)
    lines.push(
      el("li", { class: "note", "data-level": "info" }, "and " + status.notes_more + " more"),
    );
  if (!lines.length)
    lines.push(el("li", { class: "note", "data-level": "good" }, "Nothing needs attention."));
  $("notes").replaceChildren(...lines);
  herald.tell(
    status.notes.length
      ? status.notes
          .slice(0, 3)
          .map((note) => note.text)
          .join(". ")
      : "Nothing needs attention.",
  );
}

let listed = "";
function happened(changes) {
  const told = JSON.stringify(changes);
  if (told === listed) return;
  listed = told;
  const lines = changes.map((change) =>
    el(
      "li",
      { "data-level": change.level },
      el("time", { datetime: new Date(change.unix_ms).toISOString() }, show.time(change.unix_ms)),
      change.text,
    ),
  );
  if (!lines.length)
    lines.push(
      el(
        "li",
        {},
        el("span", { class: "muted" }, NONE),
        el("span", { class: "muted" }, "nothing since this process began"),
      ),
    );
  $("changes").replaceChildren(...lines);
}

// ---- asking -------------------------------------------------------------------------------------

const link = { state: "wait", failed: 0, since: null, timer: 0, asking: null, why: "" };

function tellLink(state, text) {
  link.state = state;
  $("link").dataset.link = state;
  put($("link-text"), text);
}

async function ask() {
  if (link.asking || document.hidden) return;
  clearTimeout(link.timer);
  const stop = new AbortController();
  const patience = setTimeout(() => stop.abort(), PATIENCE_MS);
  link.asking = stop;
  let wait = EVERY_MS;
  try {
    const reply = await fetch("status.json?after=" + board.last, {
      signal: stop.signal,
      cache: "no-store",
    });
    if (!reply.ok) throw new Error(await refusal(reply));
    const status = await reply.json();
    if (link.failed) herald.tell("The connection is back.");
    link.failed = 0;
    link.since = null;
    $("lost").hidden = true;
    delete document.body.dataset.lost;
    tellLink("live", "live");
    restartBeat();
    render(status);
  } catch (error) {
    if (link.asking !== stop) return; // the page was hidden meanwhile
    wait = failed(
      stop.signal.aborted
        ? "no answer within " + PATIENCE_MS / 1000 + " s"
        : String(error.message || error),
    );
  } finally {
    clearTimeout(patience);
    if (link.asking === stop) {
      link.asking = null;
      link.timer = setTimeout(ask, wait);
    }
  }
}

async function refusal(reply) {
  let why = "status " + reply.status;
  try {
    why += ": " + (await reply.json()).message;
  } catch {
    // no body of ours: the status says enough
  }
  return why;
}

function failed(why) {
  link.since ??= Date.now();
  link.why = why;
  const wait = BACK_OFF_MS[Math.min(link.failed, BACK_OFF_MS.length - 1)];
  link.failed += 1;
  const text =
    "Connection lost since " +
    show.time(link.since) +
    ": " +
    why +
    ". The numbers below are from then. Trying again.";
  put($("lost"), text);
  $("lost").hidden = false;
  document.body.dataset.lost = "";
  document.title = "lost: " + document.title.replace(/^lost: /, "");
  tellLink("lost", "connection lost since " + show.time(link.since));
  return wait * (0.85 + 0.3 * Math.random()); // not all pages at once when the node is back
}

function restartBeat() {
  const dot = $("link").querySelector(".dot");
  for (const animation of dot.getAnimations()) {
    animation.cancel();
    animation.play();
  }
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    clearTimeout(link.timer);
    const asking = link.asking;
    link.asking = null;
    if (asking) asking.abort();
    if (link.state === "live") tellLink("wait", "paused while hidden");
    return;
  }
  ask();
});
window.addEventListener("online", ask);
ask();
