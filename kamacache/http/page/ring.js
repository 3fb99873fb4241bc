// The ring: each member's share as an arc, and what there is to know of the one under the pointer.
// The real ring has 2,048 points a node; an arc is their sum, in the order of the addresses.

const STATES = {
  own: "this node",
  usable: "usable",
  down: "down",
  "partly down": "down for some workers",
  draining: "draining",
  returning: "just came back",
  connecting: "being connected",
  unknown: "not known one by one",
  left: "left the ring",
  ready: "ready",
  starting: "starting",
  silent: "does not answer",
  stalled: "not serving",
};
const TONES = {
  down: "bad",
  "partly down": "warn",
  draining: "warn",
  returning: "warn",
  connecting: "none",
  unknown: "none",
};

class RingView {
  constructor(root) {
    root.classList.add("panel");
    this.chosen = null; // address
    this.plot = svg("svg", {
      viewBox: "0 0 200 200",
      role: "listbox",
      tabindex: "0",
      "aria-label": "Members of the ring; arrow keys go through them",
    });
    this.told = el("p", { id: "ring-told" });
    this.keys = el("p", { class: "keys" });
    root.replaceChildren(this.plot, this.told, this.keys);
    const choose = (event) => {
      const arc = event.target.closest("[data-address]");
      this.choose(arc ? arc.getAttribute("data-address") : null);
    };
    this.plot.addEventListener("pointermove", choose);
    this.plot.addEventListener("pointerdown", choose);
    this.plot.addEventListener("pointerleave", (event) => {
      if (event.pointerType === "mouse" && document.activeElement !== this.plot)
        this.choose(null);
    });
    this.plot.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") this.choose(null);
      if (step === undefined || !this.members.length) return;
      event.preventDefault();
      const now = this.members.findIndex((member) => member.address === this.chosen);
      const next =
        now < 0
          ? step > 0
            ? 0
            : this.members.length - 1
          : (now + step + this.members.length) % this.members.length;
      this.choose(this.members[next].address);
    });
    this.members = [];
    this.shape = "";
  }

  choose(address) {
    if (address === this.chosen) return;
    this.chosen = address;
    this.mark();
  }

  take(status) {
    const ring = status.ring;
    const own = status.node.name || "this node";
    this.clustered = Boolean(ring);
    this.members = ring ? ring.members : [{ address: own, weight: 1, share: 1, state: "own" }];
    this.more = ring ? ring.more : 0;
    this.number = ring ? ring.number : null;
    const count = this.members.length + this.more;
    put(
      $("ring-hint"),
      ring ? count + (count === 1 ? " member" : " members") + ", list number " + ring.number : "",
    );
    const shape = JSON.stringify([this.members, this.more]);
    if (shape !== this.shape) {
      this.shape = shape;
      this.draw(count);
    }
    this.mark();
  }

  draw(count) {
    const arcs = [];
    const rest = Math.max(
      0,
      1 - this.members.reduce((sum, member) => sum + (member.share || 0), 0),
    );
    let from = 0;
    this.members.forEach((member, i) => {
      const tone =
        member.state === "own" ? "own" : TONES[member.state] || (i % 2 ? "odd" : "even");
      const arc = wedge(from, from + member.share, member.state === "down" ? 80 : 92);
      const label =
        member.address +
        ", " +
        show.percent(member.share) +
        " of the keys, " +
        (STATES[member.state] || member.state);
      arcs.push(
        svg("path", {
          d: arc,
          class: "arc " + tone + (count > 40 ? " thin" : ""),
          role: "option",
          "data-address": member.address,
          "aria-label": label,
          "aria-selected": "false",
          id: "member-" + i,
        }),
      );
      from += member.share;
    });
    if (this.more && rest > 0.0005)
      arcs.push(svg("path", { d: wedge(from, from + rest, 92), class: "arc none" }));
    const middle = svg(
      "text",
      { class: "middle", x: 100, y: 101, "text-anchor": "middle" },
      count,
    );
    const under = svg(
      "text",
      { class: "under", x: 100, y: 113, "text-anchor": "middle" },
      count === 1 ? "node" : "nodes",
    );
    this.plot.replaceChildren(...arcs, middle, under);
    const tones = new Set(
      this.members.map((member) =>
        member.state === "own" ? "own" : TONES[member.state] || "even",
      ),
    );
    const names = {
      own: "this node",
      even: "usable",
      bad: "down",
      warn: "limited",
      none: "not known",
    };
    this.keys.replaceChildren(
      ...Object.keys(names)
        .filter((tone) => tones.has(tone))
        .map((tone) => el("span", {}, el("span", { class: "key " + tone }), names[tone])),
    );
  }

  mark() {
    const member = this.members.find((one) => one.address === this.chosen) || null;
    let active = null;
    for (const arc of this.plot.querySelectorAll("[data-address]")) {
      const is = member !== null && arc.getAttribute("data-address") === member.address;
      arc.classList.toggle("chosen", is);
      arc.setAttribute("aria-selected", String(is));
      if (is) active = arc;
    }
    if (active) {
      this.plot.setAttribute("aria-activedescendant", active.id);
      this.plot.append(active); // above its neighbours
    } else this.plot.removeAttribute("aria-activedescendant");
    const told = member || this.members.find((one) => one.state === "own");
    if (!told) return this.told.replaceChildren();
    const mean = 1 / Math.max(1, this.members.length + this.more);
    const parts = [show.percent(told.share) + " of the keys", STATES[told.state] || told.state];
    if (told.weight !== 1) parts.push("weight " + told.weight);
    if (this.clustered && this.members.length > 1)
      parts.push("an even share is " + show.percent(mean));
    if (!this.clustered) parts.splice(0, 2, "owns every key: a single node");
    const text = told.address + parts.join(" · ");
    if (this.told.textContent !== text)
      this.told.replaceChildren(el("b", {}, told.address), parts.join(" · "));
  }
}

function wedge(from, to, outer) {
  const inner = 58;
  const full = to - from > 0.9999;
  const at = (share, radius) => {
    const angle = (share - 0.25) * 2 * Math.PI;
    return (
      (100 + radius * Math.cos(angle)).toFixed(2) +
      " " +
      (100 + radius * Math.sin(angle)).toFixed(2)
    );
  };
  if (full) {
    const circle = (radius, sweep) =>
      "M" +
      at(0, radius) +
      "A" +
      radius +
      " " +
      radius +
      " 0 1 " +
      sweep +
      " " +
      at(0.5, radius) +
      "A" +
      radius +
      " " +
      radius +
      " 0 1 " +
      sweep +
      " " +
      at(0, radius) +
      "Z";
    return circle(outer, 1) + circle(inner, 0);
  }
  const large = to - from > 0.5 ? 1 : 0;
  return (
    "M" +
    at(from, outer) +
    "A" +
    outer +
    " " +
    outer +
    " 0 " +
    large +
    " 1 " +
    at(to, outer) +
    "L" +
    at(to, inner) +
    "A" +
    inner +
    " " +
    inner +
    " 0 " +
    large +
    " 0 " +
    at(from, inner) +
    "Z"
  );
}
