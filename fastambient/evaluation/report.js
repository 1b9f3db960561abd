"use strict";
// The gallery of report.html. Counts are over all samples, in the float64 values that metrics.json was made from;
// pictures are drawn to the canvases of one page of cards, from sheets that are decoded when they are needed.
(() => {
  const PAGE = 36, BINS = 60, STEP = 0.005;
  const $ = id => document.getElementById(id);
  const ui = { run: $("run"), measure: $("measure"), order: $("order"), only: $("only"), threshold: $("threshold"),
    value: $("value"), what: $("what"), reset: $("reset"), count: $("count"), pairs: $("pairs"), spread: $("spread") };

  const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer;  // little-endian, as all browsers' hosts
  const runs = JSON.parse($("data").textContent).map(run => ({
    ...run,
    shown: new Int32Array(bytes(run.shown)),
    scores: run.scores.map(s => ({
      ...s,
      values: new Float64Array(bytes(s.values)), control: new Float64Array(bytes(s.control)),
      index: new Int32Array(bytes(s.index)), place: new Int32Array(bytes(s.place)),
      mirrored: new Uint8Array(bytes(s.mirrored)),
    })),
  }));
  const state = { run: 0, score: 0, page: 0, list: new Int32Array(0), at: runs.map(r => r.scores.map(s => s.threshold)) };
  const run = () => runs[state.run];
  const score = () => run().scores[state.score];
  const threshold = () => state.at[state.run][state.score];

  // Thresholds that the slider can stand at: round numbers and, exactly, the one that the figures were counted with.
  function stops(s) {
    if (s.stops) return s.stops;
    let low = 0;
    if (s.closer === "high") {
      let least = s.threshold;
      for (const v of s.values) least = Math.min(least, v);
      for (const v of s.control) least = Math.min(least, v);
      low = Math.max(-1, Math.floor(least * 20) / 20);
    }
    const round = Array.from({ length: Math.round((1 - low) / STEP) + 1 }, (_, i) => Number((low + i * STEP).toFixed(3)));
    s.stops = [...new Set([...round, s.threshold])].sort((a, b) => a - b);
    return s.stops;
  }
  const isCopy = (v, s, t) => (s.closer === "low" ? v < t : v > t);
  function copies(values, s, t) {
    let n = 0;
    for (const v of values) if (isCopy(v, s, t)) n++;
    return n;
  }
  const text = n => n.toLocaleString("en");
  const share = (n, of) => `${(100 * n / of).toFixed(1)}\u00a0%`;
  const says = s => (s.closer === "low" ? "below" : "above");

  // Order of the places in `shown`, copies first; equal values by sample number.
  function nearFirst(s) {
    if (!s.order) {
      const shown = run().shown, sign = s.closer === "low" ? 1 : -1;
      s.order = Int32Array.from(shown.keys()).sort((a, b) =>
        sign * (s.values[shown[a]] - s.values[shown[b]]) || shown[a] - shown[b]);
    }
    return s.order;
  }
  function arrange() {
    const s = score(), shown = run().shown, near = nearFirst(s);
    let list = near;
    if (ui.only.checked) {
      const t = threshold();
      let n = 0;
      while (n < near.length && isCopy(s.values[shown[near[n]]], s, t)) n++;
      list = near.subarray(0, n);
    }
    if (ui.order.value === "far") list = list.slice().reverse();
    if (ui.order.value === "number") list = list.slice().sort((a, b) => shown[a] - shown[b]);
    state.list = list;
  }

  const sheets = new Map();
  function sheet(kind, number) {
    const name = `sheet-${state.run}-${kind}-${number}`;
    if (!sheets.has(name)) {
      const image = new Image();
      image.src = `data:${run().sheets[kind].mime};base64,${$(name).textContent}`;
      sheets.set(name, image.decode().then(() => image));
    }
    return sheets.get(name);
  }
  function draw(canvas, kind, place, mirrored) {
    const g = run().sheets[kind], within = place % g.each;
    const key = `${state.run} ${kind} ${place} ${mirrored}`;
    if (canvas.dataset.key === key) return;
    canvas.dataset.key = key;
    canvas.width = g.width;  // also clears
    canvas.height = g.height;
    sheet(kind, Math.floor(place / g.each)).then(image => {
      if (canvas.dataset.key !== key) return;  // the card shows another pair by now
      const pen = canvas.getContext("2d");
      if (mirrored) { pen.translate(g.width, 0); pen.scale(-1, 1); }
      pen.drawImage(image, (within % g.columns) * g.width, Math.floor(within / g.columns) * g.height, g.width, g.height,
        0, 0, g.width, g.height);
      canvas.dataset.drawn = key;
    });
  }

  const element = (name, properties = {}, ...children) => {
    const e = Object.assign(document.createElement(name), properties);
    e.append(...children);
    return e;
  };
  const cards = [];
  function card(i) {
    if (!cards[i]) {
      const sample = element("canvas"), train = element("canvas");
      const two = element("div", { className: "two" }, sample, train);
      two.setAttribute("role", "img");
      const value = element("strong"), badge = element("span", { className: "badge" });
      const left = element("span"), right = element("span");
      const numbers = element("div", { className: "unit" }, left, right), words = element("p", {}, value, " ", badge);
      const own = element("div"), name = element("div"), names = element("div", { className: "names" }, own, name);
      for (const e of [numbers, words, names]) e.setAttribute("aria-hidden", "true");  // the picture's label says the same
      cards[i] = { li: element("li", {}, two, numbers, words, names), sample, train, two, value, badge, left, right, own, name, names };
    }
    return cards[i];
  }
  // [name of the sample, name of its nearest training image], "" where it is not known.
  function named(s, k) {
    const { samples, train } = run().names;
    return [samples ? samples[k] : "", train ? train[s.place[k]] : ""];
  }
  function mark(c, s, k) {
    const n = run().shown[k], v = s.values[n], copy = isCopy(v, s, threshold());
    const [mine, theirs] = named(s, k), beside = theirs ? `, ${theirs}` : "", own = mine ? `, ${mine},` : "";
    const flipped = s.mirrored[k] ? " (mirrored)" : "";
    c.li.className = copy ? "copy" : "";
    c.badge.textContent = copy ? "copy" : "";
    c.two.setAttribute("aria-label",
      `Sample ${n}${own} beside training image ${s.index[k]}${beside}${flipped}, ${s.key.replace("_", " ")} ${v.toFixed(3)}${copy ? ", copy" : ""}`);
  }
  function render() {
    const s = score(), shown = run().shown, pages = Math.max(1, Math.ceil(state.list.length / PAGE));
    state.page = Math.min(Math.max(state.page, 0), pages - 1);
    const start = state.page * PAGE, here = state.list.subarray(start, start + PAGE);
    here.forEach((k, i) => {
      const c = card(i), n = shown[k];
      c.li.dataset.sample = n;
      c.li.dataset.value = s.values[n];
      c.value.textContent = s.values[n].toFixed(3);
      c.left.textContent = `#${n}`;
      c.right.textContent = `#${s.index[k]}${s.mirrored[k] ? " \u2194" : ""}`;
      const [mine, theirs] = named(s, k);
      c.own.textContent = mine;
      c.name.textContent = theirs;
      c.names.hidden = !mine && !theirs;
      c.li.title = [mine, theirs].filter(Boolean).join(" \u2192 ");
      mark(c, s, k);
      draw(c.sample, "samples", k, false);
      draw(c.train, "train", s.place[k], s.mirrored[k] === 1);
    });
    const wanted = cards.slice(0, here.length).map(c => c.li);
    if (ui.pairs.children.length !== wanted.length) ui.pairs.replaceChildren(...wanted);
    const last = start + here.length;
    const words = here.length ? `${text(start + 1)}\u2013${text(last)} of ${text(state.list.length)}` : "no pair";
    for (const nav of document.querySelectorAll("[data-pager]")) {
      nav.querySelector("[data-page]").textContent = words;
      nav.querySelector("[data-go='-1']").disabled = state.page === 0;
      nav.querySelector("[data-go='1']").disabled = state.page === pages - 1;
    }
  }

  function count() {
    const s = score(), t = threshold(), n = copies(s.values, s, t), of = s.values.length;
    let words = `${text(n)} of ${text(of)} samples (${share(n, of)}) are copies at this threshold; `;
    if (s.control.length) {
      const k = copies(s.control, s, t);
      words += `against held-out images ${text(k)} of ${text(s.control.length)} (${share(k, s.control.length)}).`;
    } else words += "there are no held-out images to compare with.";
    if (run().shown.length < run().total) words += ` The gallery holds the ${text(run().shown.length)} samples that are most alike.`;
    ui.count.textContent = words;
    ui.value.textContent = t.toFixed(3);
    ui.threshold.setAttribute("aria-valuetext", `${says(s)} ${t.toFixed(3)}`);
    ui.reset.disabled = t === s.threshold;
    const [low, high] = [stops(s)[0], 1], x = 300 * (t - low) / (high - low);
    const line = ui.spread.querySelector("line");
    line.setAttribute("x1", x);
    line.setAttribute("x2", x);
  }
  function histogram() {
    const s = score(), low = stops(s)[0], bins = values => {
      const h = new Array(BINS).fill(0);
      for (const v of values) h[Math.min(BINS - 1, Math.max(0, Math.floor((v - low) / (1 - low) * BINS)))] += 1 / values.length;
      return h;
    };
    const both = [bins(s.values), bins(s.control)], top = Math.max(...both[0], ...both[1], 1e-9);
    const path = h => h.map((v, i) => `${i ? "L" : "M"}${300 * i / BINS} ${48 - 46 * v / top}H${300 * (i + 1) / BINS}`).join("");
    ui.spread.querySelector(".train").setAttribute("d", `M0 48${path(both[0]).replace("M", "L")}V48Z`);
    ui.spread.querySelector(".control").setAttribute("d", s.control.length ? path(both[1]) : "");
  }

  // Pictures at a whole multiple of their pixels, so that all pixels are of one size: of the multiples between 56 and 96
  // CSS pixels (or one, of larger pictures) the one that leaves the least room in a row of cards unused.
  function fit() {
    const wide = run().sheets.samples.width, all = ui.pairs.clientWidth, gap = 10, frame = 22;
    let best = { side: wide, rest: Infinity };
    for (let m = 1; m * wide <= Math.max(wide, 96); m++) {
      const side = m * wide, card = 2 * side + frame, rest = (all + gap) / Math.max(1, Math.floor((all + gap) / (card + gap))) - gap - card;
      if ((side >= 56 || 2 * side > 96) && rest < best.rest) best = { side, rest };
    }
    const side = Math.min(best.side, Math.floor((all - frame) / 2));
    ui.pairs.style.setProperty("--side", `${side}px`);
    ui.pairs.style.setProperty("--card-width", `${2 * side + frame}px`);
    ui.pairs.classList.toggle("smooth", side < wide);
  }
  function chooseMeasure() {
    const s = score(), at = stops(s), g = run().sheets.samples;
    ui.what.textContent = `${s.key.replace("_", " ")} ${says(s)}`;
    ui.threshold.max = at.length - 1;
    ui.threshold.value = at.indexOf(threshold());
    ui.pairs.style.setProperty("--shape", `${g.width} / ${g.height}`);
    fit();
    histogram();
    rearrange();
  }
  function chooseRun() {
    const old = ui.measure.value;
    ui.measure.replaceChildren(...run().scores.map(s => element("option", { value: s.key, textContent: s.label })));
    state.score = Math.max(0, run().scores.findIndex(s => s.key === old));
    ui.measure.value = score().key;
    document.querySelector("[data-one=measure]").hidden = run().scores.length < 2;
    chooseMeasure();
  }
  function rearrange() {
    state.page = 0;
    count();
    arrange();
    render();
  }
  function move(t) {
    state.at[state.run][state.score] = t;
    count();
    if (ui.only.checked) { state.page = 0; arrange(); render(); }
    else state.list.subarray(state.page * PAGE, (state.page + 1) * PAGE).forEach((k, i) => mark(cards[i], score(), k));
  }

  ui.run.append(...runs.map((r, i) => element("option", { value: i, textContent: r.name })));
  document.querySelector("[data-one=run]").hidden = runs.length < 2;
  ui.run.addEventListener("change", () => { state.run = Number(ui.run.value); chooseRun(); });
  ui.measure.addEventListener("change", () => { state.score = ui.measure.selectedIndex; chooseMeasure(); });
  ui.order.addEventListener("change", rearrange);
  ui.only.addEventListener("change", rearrange);
  ui.threshold.addEventListener("input", () => move(stops(score())[Number(ui.threshold.value)]));
  ui.reset.addEventListener("click", () => {
    move(score().threshold);
    ui.threshold.value = stops(score()).indexOf(score().threshold);
    ui.threshold.focus();  // the button is disabled now
  });
  for (const nav of document.querySelectorAll("[data-pager]")) {
    nav.addEventListener("click", event => {
      const step = Number(event.target.dataset.go || 0);
      if (!step) return;
      state.page += step;
      render();
      if (event.target.disabled) nav.querySelector(`[data-go='${-step}']`).focus();
      if (nav.dataset.pager === "below") { ui.pairs.focus({ preventScroll: true }); ui.pairs.scrollIntoView({ block: "start" }); }
    });
  }
  for (const e of document.querySelectorAll("[data-controls]")) e.hidden = false;
  $("missing").remove();
  chooseRun();
  new ResizeObserver(fit).observe(ui.pairs);
})();
