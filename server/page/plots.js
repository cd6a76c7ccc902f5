// Small live plots of the server's counters.

import { element } from "./markdown.js";

const EVERY_MS = 1000, KEPT = 90;
const SVG = "http://www.w3.org/2000/svg";
const mega = (bytes) => (bytes >= 1e9 ? `${(bytes / 1e9).toFixed(2)} GB` : `${Math.round(bytes / 1e6)} MB`);

const PLOTS = [
  { name: "Tokens a second", of: (now) => now.generated_tokens_per_second, shown: (value) => value.toFixed(1) },
  {
    name: "Memory", of: (now) => now.memory_bytes, most: (now) => now.ram_bytes,
    shown: (value, now) => `${mega(value)} of ${mega(now.ram_bytes)}`,
  },
  {
    name: "Experts found in memory", most: () => 1, shown: (value) => `${Math.round(100 * value)}%`,
    of: (now, before) => {
      const hits = now.expert_hits_total - before.expert_hits_total;
      const looks = hits + now.expert_misses_total - before.expert_misses_total;
      return looks > 0 ? hits / looks : undefined;
    },
  },
  { name: "Experts used a layer", of: (now) => now.experts_used || undefined, shown: (value) => value.toFixed(2) },
];

export function parse(text) {
  const found = {};
  for (const line of text.split("\n")) {
    const match = /^edge_moe_(\w+) (\S+)$/.exec(line);
    if (match) found[match[1]] = Number(match[2]);
  }
  return found;
}

function svg(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

class Plot {
  constructor(about, into) {
    this.about = about;
    this.values = [];
    this.said = element("b", {}, "–");
    this.path = svg("path", {});
    this.limit = svg("line", { x1: 0, x2: KEPT, y1: 1, y2: 1, visibility: "hidden" });
    const picture = svg("svg", { viewBox: `0 0 ${KEPT} 40`, preserveAspectRatio: "none", "aria-hidden": "true" });
    picture.append(this.limit, this.path);
    into.append(element("figure", {}, element("figcaption", {}, about.name, this.said), picture));
  }

  add(now, before) {
    const value = this.about.of(now, before) ?? this.values.at(-1);
    if (value === undefined) return;
    this.values = [...this.values.slice(1 - KEPT), value];
    this.said.textContent = this.about.shown(value, now);
    const limit = this.about.most?.(now), most = limit || Math.max(...this.values, 1e-9);
    const points = this.values.map((one, at) => `${KEPT - this.values.length + at} ${39 - 38 * Math.min(one / most, 1)}`);
    this.path.setAttribute("d", `M ${points.join(" L ")}`);
    if (limit) this.limit.setAttribute("visibility", "visible");
  }
}

// told: gets why there is nothing new, or an empty text.
export function plots(into, fetched, told) {
  const all = PLOTS.map((about) => new Plot(about, into));
  let before;
  async function look() {
    if (!document.hidden)
      try {
        const now = parse(await fetched("metrics").then((answer) => answer.text()));
        for (const plot of all) plot.add(now, before ?? now);
        before = now;
        told("");
      } catch (error) {
        told(error instanceof TypeError ? "the server does not answer" : error.message);
      }
    setTimeout(look, EVERY_MS);
  }
  look();
}
