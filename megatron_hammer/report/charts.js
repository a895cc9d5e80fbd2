"use strict";
// Charts of a run report (report/page.py): curves in SVG, drawn from the JSON in the page. Nothing is fetched, and texts
// of runs enter the page as text nodes only. Drag over a chart to zoom all charts, double-click to see all again.
(() => {
  const data = JSON.parse(document.getElementById("figures").textContent);
  const words = data.words;
  const SVG = "http://www.w3.org/2000/svg";
  const KEY = "megatron_hammer " + location.pathname;
  const state = { smooth: 0, log: false, tokens: false, zoom: null, hidden: {} };
  try { Object.assign(state, JSON.parse(sessionStorage.getItem(KEY) || "{}")); } catch { /* private mode */ }
  const keep = () => { try { sessionStorage.setItem(KEY, JSON.stringify(state)); } catch { /* the same */ } };

  const make = (name, attributes, parent, text) => {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes || {})) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    if (parent) parent.append(element);
    return element;
  };
  const html = (name, kind, parent, text) => {
    const element = document.createElement(name);
    if (kind) element.className = kind;
    if (text !== undefined) element.textContent = text;
    if (parent) parent.append(element);
    return element;
  };

  // ---- numbers ----

  const short = (value) => {
    const size = Math.abs(value);
    if (size === 0) return "0";
    for (const [unit, bound] of [["T", 1e12], ["B", 1e9], ["M", 1e6], ["k", 1e4]]) {
      if (size >= bound) return String(+(value / (bound === 1e4 ? 1e3 : bound)).toPrecision(4)) + unit;
    }
    return size < 1e-3 ? value.toExponential(2).replace(/\.?0+e/, "e") : String(+value.toPrecision(4));
  };
  const ticks = (low, high, most) => {
    const rough = (high - low) / Math.max(1, most);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
    return found;
  };
  const logTicks = (low, high) => {  // of log10 values
    if (high - low < 1) return ticks(10 ** low, 10 ** high, 4).filter((v) => v > 0);
    const found = [];
    const every = Math.max(1, Math.ceil((high - low) / 6));
    for (let p = Math.ceil(low); p <= high; p += every) found.push(10 ** p);
    return found;
  };
  const interpolate = (xs, ys, x) => {
    if (!xs.length) return x;
    let low = 0, high = xs.length - 1;
    if (x <= xs[0]) return xs[0] ? ys[0] * x / xs[0] : ys[0];
    if (x >= xs[high]) return ys[high];
    while (high - low > 1) { const mid = (low + high) >> 1; if (xs[mid] <= x) low = mid; else high = mid; }
    return ys[low] + (ys[high] - ys[low]) * (x - xs[low]) / (xs[high] - xs[low]);
  };
  // An exponential mean without the pull towards its start (Adam's correction); the weight counts points, so that the
  // few of evaluations stay as they are.
  const FEW = 60;
  const smoothed = (ys, weight) => {
    let sum = 0, norm = 0;
    return ys.map((y) => { sum = weight * sum + (1 - weight) * y; norm = weight * norm + 1 - weight; return sum / norm; });
  };

  const xsOf = (curve) => {
    if (!state.tokens) return curve.x;
    const by = data.runs[curve.run].tokens;
    return curve.t || (curve.t = curve.x.map((x) => interpolate(by.x, by.y, x)));
  };
  const xOf = (run, step) => state.tokens ? interpolate(data.runs[run].tokens.x, data.runs[run].tokens.y, step) : step;

  // ---- one chart ----

  class Chart {
    constructor(box, spec) {
      this.box = box; this.spec = spec;
      this.legend = html("div", "legend", box);
      this.svg = make("svg", { role: "img", "aria-label": spec.title, tabindex: 0 });
      box.append(this.svg);
      this.tip = html("div", "tip", box);
      this.tip.hidden = true;
      this.name = (curve) => spec.id + "/" + curve.run + "/" + curve.name;
      for (const curve of spec.curves) {
        const button = html("button", "", this.legend);
        button.type = "button";
        button.setAttribute("aria-pressed", String(!state.hidden[this.name(curve)]));
        const swatch = make("svg", { width: 22, height: 10, "aria-hidden": "true" }, button);
        make("line", { x1: 0, x2: 22, y1: 5, y2: 5, class: "c" + curve.colour, "stroke-dasharray": curve.dash,
          "stroke-width": 3 }, swatch);
        html("span", "", button, curve.name);
        button.addEventListener("click", () => {
          state.hidden[this.name(curve)] = !state.hidden[this.name(curve)];
          button.setAttribute("aria-pressed", String(!state.hidden[this.name(curve)]));
          keep(); this.draw();
        });
      }
      this.listen();
    }

    shown() { return this.spec.curves.filter((curve) => !state.hidden[this.name(curve)] && curve.x.length); }

    range() {
      const ends = this.spec.curves.map(xsOf).filter((xs) => xs.length);
      const low = Math.min(...ends.map((xs) => xs[0])), high = Math.max(...ends.map((xs) => xs[xs.length - 1]));
      return high > low ? [low, high] : [low - 1, high + 1];
    }

    draw() {
      const { svg, spec } = this;
      svg.replaceChildren();
      this.tip.hidden = true;
      const width = Math.max(240, this.box.clientWidth), height = width < 500 ? 220 : 300;
      const left = 58, right = 26, top = 10, bottom = 36;
      svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      svg.setAttribute("width", width); svg.setAttribute("height", height);
      const [x0, x1] = state.zoom || this.range();
      const log = state.log && !spec.signed;
      const fit = (y) => log ? Math.log10(y) : y;
      const usable = (y) => Number.isFinite(y) && (!log || y > 0);
      let y0 = Infinity, y1 = -Infinity;
      const drawn = this.shown().map((curve) => {
        const xs = xsOf(curve), rough = state.smooth > 0 && curve.y.length > FEW;
        const mean = rough ? smoothed(curve.y, state.smooth) : curve.y;
        for (let i = 0; i < xs.length; i++) {
          if (xs[i] < x0 || xs[i] > x1) continue;
          for (const y of [curve.y[i], curve.lo ? curve.lo[i] : NaN, curve.hi ? curve.hi[i] : NaN]) {
            if (usable(y)) { y0 = Math.min(y0, fit(y)); y1 = Math.max(y1, fit(y)); }
          }
        }
        return { curve, xs, mean, rough };
      });
      if (!(y1 >= y0)) { y0 = 0; y1 = 1; }
      if (y1 - y0 < 1e-12 + Math.abs(y1) * 1e-9) { const more = Math.abs(y1) * .05 || 1; y0 -= more; y1 += more; }
      else { const more = (y1 - y0) * .05; y1 += more; y0 = y0 >= 0 && !log && y0 < more ? 0 : y0 - more; }
      const px = (x) => left + (x - x0) / (x1 - x0) * (width - left - right);
      const py = (y) => top + (y1 - fit(y)) / (y1 - y0) * (height - top - bottom);
      Object.assign(this, { drawn, px, py, x0, x1, left, right, width, height, top, bottom, usable });
      for (const y of log ? logTicks(y0, y1) : ticks(y0, y1, 5)) {
        make("line", { class: "grid", x1: left, x2: width - right, y1: py(y), y2: py(y) }, svg);
        make("text", { x: left - 6, y: py(y) + 4, "text-anchor": "end" }, svg, short(y));
      }
      for (const x of ticks(x0, x1, width / 110)) {
        make("text", { x: px(x), y: height - bottom + 16, "text-anchor": "middle" }, svg, short(x));
      }
      make("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, svg,
        state.tokens ? words.tokens : words.step);
      const clip = make("clipPath", { id: "clip-" + spec.id }, svg);
      make("rect", { x: left, y: top, width: width - left - right, height: height - top - bottom }, clip);
      const inside = make("g", { "clip-path": `url(#clip-${spec.id})` }, svg);
      for (const mark of data.marks) {
        const x = px(xOf(mark.run, mark.step));
        const line = make("line", { class: "mark " + mark.kind, x1: x, x2: x, y1: top, y2: height - bottom }, inside);
        make("title", {}, line, mark.text);
      }
      for (const { curve, xs, mean, rough } of drawn) this.drawCurve(inside, curve, xs, mean, rough);
      this.cursor = make("line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" }, svg);
      this.chosen = make("rect", { class: "chosen", y: top, height: height - top - bottom, visibility: "hidden" }, svg);
    }

    drawCurve(inside, curve, xs, mean, rough) {
      const { px, py, usable } = this;
      const path = (ys) => {
        let text = "", down = false;
        for (let i = 0; i < xs.length; i++) {
          if (!usable(ys[i])) { down = false; continue; }
          text += (down ? "L" : "M") + px(xs[i]).toFixed(1) + " " + py(ys[i]).toFixed(1);
          down = true;
        }
        return text;
      };
      const colour = "c" + curve.colour;
      if (curve.lo && curve.lo.every(usable)) {
        const back = xs.map((x, i) => `L${px(x).toFixed(1)} ${py(curve.lo[i]).toFixed(1)}`).reverse().join("");
        make("path", { class: "band " + colour, d: path(curve.hi) + back + "Z" }, inside);
      }
      if (rough) make("path", { class: "raw " + colour, d: path(curve.y) }, inside);
      make("path", { class: "curve " + colour, d: path(mean), "stroke-dasharray": curve.dash }, inside);
      if (xs.length <= FEW) {
        for (let i = 0; i < xs.length; i++) {
          if (usable(mean[i])) make("circle", { class: colour, cx: px(xs[i]), cy: py(mean[i]), r: 2.5 }, inside);
        }
      }
    }

    // Where the pointer is, as x; kept within the axes.
    at(event) {
      const place = event.clientX - this.svg.getBoundingClientRect().left;
      const share = (place - this.left) / (this.width - this.left - this.right);
      return this.x0 + Math.min(1, Math.max(0, share)) * (this.x1 - this.x0);
    }

    tell(x) {
      const rows = [];
      let near = null;
      for (const { curve, xs, mean } of this.drawn) {
        let low = 0, high = xs.length - 1;
        while (high - low > 1) { const mid = (low + high) >> 1; if (xs[mid] <= x) low = mid; else high = mid; }
        const i = Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
        if (near === null || Math.abs(xs[i] - x) < Math.abs(near - x)) near = xs[i];
        rows.push([curve, mean[i], curve.lo ? [curve.lo[i], curve.hi[i]] : null]);
      }
      if (near === null) return;
      this.cursor.setAttribute("x1", this.px(near)); this.cursor.setAttribute("x2", this.px(near));
      this.cursor.setAttribute("visibility", "visible");
      this.tip.replaceChildren();
      html("div", "where", this.tip, (state.tokens ? words.tokens : words.step) + " " + short(near));
      for (const [curve, value, ends] of rows.slice(0, 16)) {
        const line = html("div", "", this.tip);
        html("i", "dot b" + curve.colour, line);
        html("span", "", line, `${curve.name}: ${short(value)}` + (ends && ends[0] !== ends[1]
          ? ` (${short(ends[0])} – ${short(ends[1])})` : ""));
      }
      this.tip.hidden = false;
      const place = this.px(near);
      const space = this.tip.offsetWidth + 14;
      this.tip.style.left = Math.max(0, place + space > this.width ? place - space : place + 12) + "px";
    }

    quiet() { this.tip.hidden = true; this.cursor.setAttribute("visibility", "hidden"); }

    listen() {
      const { svg } = this;
      let from = null;
      svg.addEventListener("pointerdown", (event) => {
        if (event.button) return;
        from = this.at(event); svg.setPointerCapture(event.pointerId);
      });
      svg.addEventListener("pointermove", (event) => {
        if (!this.drawn) return;
        const x = this.at(event);
        if (from === null) { this.tell(x); return; }
        const [a, b] = [this.px(from), this.px(x)].sort((p, q) => p - q);
        this.chosen.setAttribute("x", a); this.chosen.setAttribute("width", b - a);
        this.chosen.setAttribute("visibility", "visible");
      });
      svg.addEventListener("pointerup", (event) => {
        if (from === null) return;
        const [a, b] = [from, this.at(event)].sort((p, q) => p - q);
        from = null;
        if (this.px(b) - this.px(a) > 8) { state.zoom = [a, b]; changed(); }
        else { this.chosen.setAttribute("visibility", "hidden"); this.tell(b); }
      });
      svg.addEventListener("pointercancel", () => { from = null; this.draw(); });
      svg.addEventListener("pointerleave", () => { if (from === null) this.quiet(); });
      svg.addEventListener("dblclick", () => { state.zoom = null; changed(); });
      svg.addEventListener("keydown", (event) => {
        const [a, b] = state.zoom || this.range(), size = b - a, middle = (a + b) / 2;
        const next = { ArrowLeft: [a - size / 4, b - size / 4], ArrowRight: [a + size / 4, b + size / 4],
          "+": [middle - size / 4, middle + size / 4], "-": [middle - size, middle + size] }[event.key];
        if (event.key === "Escape" || event.key === "0") state.zoom = null;
        else if (next) state.zoom = next;
        else return;
        event.preventDefault(); changed();
      });
    }
  }

  // ---- the page ----

  const charts = data.charts.map((spec) => new Chart(document.getElementById("chart-" + spec.id), spec));
  const changed = () => { keep(); for (const chart of charts) chart.draw(); };
  const control = (id, event, apply) => {
    const element = document.getElementById(id);
    if (element) element.addEventListener(event, () => { apply(element); changed(); });
    return element;
  };
  const smooth = control("smooth", "input", (e) => { state.smooth = e.value / 100 * .995; });
  const log = control("log", "change", (e) => { state.log = e.checked; });
  const tokens = control("tokens", "change", (e) => { state.tokens = e.checked; state.zoom = null; });
  control("all", "click", () => { state.zoom = null; });
  smooth.value = state.smooth / .995 * 100; log.checked = state.log; tokens.checked = state.tokens;
  if (!data.runs.every((run) => run.tokens.x.length)) { state.tokens = tokens.checked = false; tokens.disabled = true; }
  document.getElementById("controls").hidden = false;
  let width = document.body.clientWidth;
  changed(); // at once: a browser that is busy makes its first frame, which the observer waits for, late
  new ResizeObserver(() => {
    if (document.body.clientWidth !== width) { width = document.body.clientWidth; changed(); }
  }).observe(document.body);
  if (data.refresh) {
    setInterval(() => { if (document.visibilityState === "visible") location.reload(); }, data.refresh * 1000);
  }
})();
