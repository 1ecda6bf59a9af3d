// Explores one score map. What computes maps differs between hosts; all else is here, once.
// Pixels are counted as in fcvgg.geometry: the middle of pixel 0 is 0.0, boxes are half-open.

const $ = (id) => document.getElementById(id);
const host = document.documentElement.dataset.host;
const start = JSON.parse($("data").textContent);

// -- geometry ---------------------------------------------------------------------------------

/** One axis of a map, in pixels of the network's input. */
class Axis {
  constructor(axis, cells, size, imageSize) {
    Object.assign(this, axis);
    this.cells = cells;
    this.size = size;
    this.ratio = imageSize / size; // image pixels in an input pixel
  }
  span(cell) { return [this.offset + cell * this.stride, this.offset + cell * this.stride + this.field]; }
  windowOf(cell) { return [this.start + cell * this.stride, this.start + cell * this.stride + this.crop]; }
  /** The pixels that are nearest to a cell's centre. */
  around(cell) { const middle = this.centre(cell) + 0.5; return [middle - this.stride / 2, middle + this.stride / 2]; }
  centre(cell) { return this.offset + (this.field - 1) / 2 + cell * this.stride; }
  place(point) { return (point - this.centre(0)) / this.stride; }
  touchesPadding(cell) { const [first, end] = this.span(cell); return first < 0 || end > this.size; }
  /** The pixels seen by the unit of an inner layer whose centre is nearest to a cell's. */
  unit([stride, offset, field], cell) {
    const at = Math.max(Math.round((this.centre(cell) - offset - (field - 1) / 2) / stride), 0);
    return [offset + at * stride, offset + at * stride + field];
  }
  inImage([first, end]) { return [first * this.ratio, end * this.ratio]; }
}

/** An axis of the network for an input of `size`, which is padded up to the window if smaller. */
function placed(axis, size) {
  const before = Math.floor(Math.max(axis.window - size, 0) / 2);
  return { ...axis, offset: axis.offset - before, start: axis.start - before, shift: before };
}

// -- probabilities ----------------------------------------------------------------------------

/** How far a probability is above chance, from 0 to 1: the scale of the colours. */
const evidence = (p, chance) => Math.min(Math.max(Math.log(p / chance) / Math.log(1 / chance), 0), 1);

const written = (p) =>
  Number.isNaN(p) ? "no data" : p >= 0.001 ? p.toFixed(3) : p > 0 ? p.toExponential(1) : "0.000";

/** Class probabilities, in place, of scores `(K, n)` that are what `activation` says. */
function toProbabilities(scores, classes, activation) {
  const n = scores.length / classes;
  for (let cell = 0; cell < n; cell++) {
    let highest = -Infinity, sum = 0;
    const softmax = activation === "logits" && classes > 1;
    if (softmax) for (let k = cell; k < scores.length; k += n) highest = Math.max(highest, scores[k]);
    for (let k = cell; k < scores.length; k += n) {
      const value = scores[k];
      if (softmax) sum += scores[k] = Math.exp(value - highest);
      else if (activation.endsWith("logits")) scores[k] = 1 / (1 + Math.exp(-value));
      else scores[k] = Math.min(Math.max(activation === "log_probabilities" ? Math.exp(value) : value, 0), 1);
    }
    if (softmax) for (let k = cell; k < scores.length; k += n) scores[k] /= sum;
  }
  return scores;
}

/** The mean `(K)` over the cells of maps `(K, n)`. */
function meanOfCells(maps, classes) {
  const n = maps.length / classes;
  return Float64Array.from({ length: classes }, (_, k) => {
    let sum = 0;
    for (let i = k * n; i < (k + 1) * n; i++) sum += maps[i];
    return sum / n;
  });
}

const bytesOf = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

/** The probabilities `(classes, h, w)` of a map that Python packed; see `packed` there. */
async function unpacked({ codes, span }) {
  const stream = new Blob([bytesOf(codes)]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const n = bytes.length / 2;
  return Float32Array.from({ length: n }, (_, i) => {
    const code = bytes[i] * 256 + bytes[n + i];
    return code === 0 ? NaN : code === 1 ? 0 : Math.exp(((code - 1) / 16382 - 1) * span);
  });
}

// -- hosts ------------------------------------------------------------------------------------
// Each computes a view: image, sizes, axes, classes, averages, and probabilities.

async function viewOf(description) {
  const image = description.image ? await bitmapOf(await blobOf(description.image)) : null;
  return finished({ ...description, image, probabilities: await unpacked(description.packed) });
}

function finished(view) {
  view.axes = [0, 1].map((i) => new Axis(view.axes[i], view.cells[i], view.input_size[i], view.image_size[i]));
  view.colours = bytesOf(view.colours);
  return view;
}

// a fetch of a data URL would be a connection, which the page's policy forbids
const blobOf = (url) => new Blob([bytesOf(url.split(",")[1])], { type: url.slice(5, url.indexOf(";")) });
const bitmapOf = (blob) => createImageBitmap(blob);

const hosts = {
  file: { first: () => viewOf(start) },
  serve: {
    async compute(file, { side, stride }) {
      if (file.size > start.limit) throw new Error(start.refusal); // before it is sent
      this.last?.abort(); // what is no longer waited for
      this.last = new AbortController();
      const query = new URLSearchParams();
      if (side) query.set("side", side);
      if (stride) query.set("stride", stride);
      const headers = { "Content-Type": "application/octet-stream" };
      const request = { method: "POST", body: file, headers, signal: this.last.signal };
      const answer = await fetch(`map?${query}`, request).catch(() => {
        throw new Error("the server does not answer; start fcvgg serve again");
      });
      const found = await answer.json();
      if (!answer.ok) throw new Error(found.error);
      return viewOf(found);
    },
  },
  page: {
    compute(file, { side }, progress) {
      this.worker ??= new Worker("worker.js", { type: "module" });
      const { port1, port2 } = new MessageChannel(); // one for each request keeps answers apart
      return new Promise((resolve, reject) => {
        this.worker.onerror = (event) => {
          this.worker = undefined;
          reject(new Error(event.message || "worker.js cannot be loaded; open the page over http"));
        };
        port1.onmessage = ({ data }) => {
          if (data.error) reject(new Error(data.error));
          else if (data.progress) progress(data);
          else resolve(this.view(file, data));
        };
        this.worker.postMessage({ file, side, network: start }, [port2]);
      });
    },
    async view(file, { scores, classes, cells, input_size, image_size, side }) {
      const { activation, names } = start;
      const averages = activation.endsWith("logits")
        ? toProbabilities(meanOfCells(scores, classes), classes, activation)
        : null;
      const probabilities = toProbabilities(scores, classes, activation);
      return finished({
        ...start, cells, input_size, image_size, side,
        image: await bitmapOf(file),
        axes: start.axes.map((axis, i) => placed(axis, input_size[i])),
        averages: averages ?? meanOfCells(probabilities, classes),
        classes: Array.from({ length: classes }, (_, k) => k),
        names: names ?? Array.from({ length: classes }, (_, k) => `${k}`),
        total: classes, probabilities, largest_side: 2 * start.usual_side,
      });
    },
  },
};

// -- state ------------------------------------------------------------------------------------

let view = null; // of the map that is shown
let chosen = 0; // the class, as a place in view.classes
let cell = null; // [row, column] that is looked at
let pinned = false;
let source = null; // the file that was opened
let wished = {}; // side and stride
let computing = 0;

const cellsCount = () => view.cells[0] * view.cells[1];
const probabilityAt = (place, [row, col]) =>
  view.probabilities[place * cellsCount() + row * view.cells[1] + col];

function show(next) {
  const name = view && view.names[chosen];
  const first = next.averages.indexOf(Math.max(...next.averages));
  const again = view && view.total === next.total && source === view.source ? next.names.indexOf(name) : -1;
  view = { ...next, source };
  chosen = again >= 0 ? again : Math.max(next.names.indexOf(next.target ?? next.names[first]), 0);
  cell = null;
  pinned = false;
  $("explorer").hidden = false;
  $("subtitle").textContent = summary(view);
  $("search").hidden = view.names.length <= FEW;
  $("layer").max = view.layers.length;
  $("layer").value = view.layers.length;
  if (host !== "file") offerSizes();
  fitStage();
  drawPhotograph();
  drawBar();
  listClasses();
  choose(chosen);
}

/** A number for height and width, or both where they differ. */
const both = (axes, name) => (axes[0][name] === axes[1][name] ? `${axes[0][name]}` : `${axes[0][name]}×${axes[1][name]}`);

function summary({ cells, image_size, input_size, axes }) {
  const rescaled = image_size.some((n, i) => n !== input_size[i]);
  return (
    `${cells.join(" by ")} cells on ${image_size.join(" by ")} pixels (height by width)` +
    (rescaled ? `, rescaled to ${input_size.join(" by ")}` : "") +
    `; window ${both(axes, "crop")}, stride ${both(axes, "stride")}, receptive field ${both(axes, "field")}`
  );
}

function offerSizes() {
  $("side").min = Math.min(32, view.side);
  $("side").max = Math.max(Math.min(...view.image_size), view.largest_side);
  $("side").value = view.side;
  $("side-value").textContent = `${view.side} px`;
  const strides = view.strides ?? [];
  $("stride").replaceChildren(...strides.map((n) => new Option(`${n} px`, n, false, n === view.axes[0].stride)));
  $("stride").parentElement.hidden = strides.length < 2;
}

// -- drawing ----------------------------------------------------------------------------------

const LARGEST = 1600; // side of what is drawn

function fitStage() {
  const [height, width] = view.image_size;
  const stage = $("stage");
  stage.style.aspectRatio = `${width} / ${height}`;
  stage.style.setProperty("--ratio", width / height);
  $("boxes").setAttribute("viewBox", `0 0 ${width} ${height}`);
}

function drawPhotograph() {
  const canvas = $("photograph");
  const [height, width] = view.image_size;
  const factor = Math.min(LARGEST / Math.max(height, width), 1);
  canvas.width = Math.max(Math.round(width * factor), 1);
  canvas.height = Math.max(Math.round(height * factor), 1);
  const context = canvas.getContext("2d");
  context.fillStyle = view.image ? "#fff" : "#808080"; // transparent pixels are seen on white
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  if (view.image) context.drawImage(view.image, 0, 0, canvas.width, canvas.height);
}

/** Per pixel of an axis: the cells before and after, the way between, and whether it is held. */
function between(axis, pixels, smooth) {
  return Array.from({ length: pixels }, (_, i) => {
    const place = axis.place(((i + 0.5) * axis.size) / pixels - 0.5);
    const inside = Math.min(Math.max(place, 0), axis.cells - 1);
    const reach = smooth ? 1e-9 : 0.5; // a cell that is drawn as a square reaches half a stride
    const held = place < -reach || place > axis.cells - 1 + reach;
    if (!smooth) return [Math.round(inside), Math.round(inside), 0, held];
    const first = Math.floor(inside);
    return [first, Math.min(first + 1, axis.cells - 1), inside - first, held];
  });
}

/** Small images are enlarged by odd numbers, which keep a pixel at the middle of the image's own. */
function overlayScale(longest) {
  const whole = Math.floor(640 / longest);
  return whole < 1 ? 640 / longest : whole - 1 + (whole % 2);
}

function drawOverlay() {
  const smooth = $("drawn").value === "smooth";
  const canvas = $("overlay");
  const factor = overlayScale(Math.max(...view.image_size));
  canvas.height = Math.max(Math.round(view.image_size[0] * factor), 1);
  canvas.width = Math.max(Math.round(view.image_size[1] * factor), 1);
  canvas.style.imageRendering = smooth ? "auto" : "pixelated";
  const rows = between(view.axes[0], canvas.height, smooth);
  const cols = between(view.axes[1], canvas.width, smooth);
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(canvas.width, canvas.height);
  const map = view.probabilities.subarray(chosen * cellsCount(), (chosen + 1) * cellsCount());
  const opacity = $("opacity").value / 100;
  const width = view.cells[1];
  const wide = Math.max(Math.floor(Math.max(canvas.width, canvas.height) / 120), 1);
  let at = 0, row = 0;
  for (const [above, below, down, heldRow] of rows) {
    let col = 0;
    for (const [left, right, across, heldCol] of cols) {
      const upper = mixed(map[above * width + left], map[above * width + right], across);
      const lower = mixed(map[below * width + left], map[below * width + right], across);
      const p = mixed(upper, lower, down);
      // held values are hatched, as in the figures that Python draws
      const held = !(heldRow || heldCol) ? 1 : Math.floor((row + col) / wide) % 3 ? 0 : view.held;
      if (!Number.isNaN(p)) paint(pixels.data, at, evidence(p, view.chance), opacity * held);
      at += 4;
      col++;
    }
    row++;
  }
  context.putImageData(pixels, 0, 0);
}

// a cell without data must not count where its weight is 0
const mixed = (a, b, way) => (way === 0 ? a : a + (b - a) * way);

function paint(pixels, at, share, opacity) {
  const level = Math.round(share * 255) * 4;
  for (let i = 0; i < 3; i++) pixels[at + i] = view.colours[level + i];
  pixels[at + 3] = Math.round(view.colours[level + 3] * opacity);
}

function drawBar() {
  const context = $("bar").getContext("2d");
  const pixels = context.createImageData(256, 1);
  for (let i = 0; i < 256; i++) paint(pixels.data, i * 4, i / 255, $("opacity").value / 100);
  context.putImageData(pixels, 0, 0);
  $("ticks").replaceChildren(...view.ticks.map((p) => {
    const tick = document.createElement("span");
    tick.textContent = p === view.chance ? `chance ${+p.toPrecision(2)}` : `${p}`;
    tick.style.left = `${evidence(p, view.chance) * 100}%`;
    return tick;
  }));
  $("bar").setAttribute("aria-label", `Colour bar: probabilities from chance, ${+view.chance.toPrecision(2)}, to 1`);
}

function rectangle(kind, rows, cols) {
  const [top, bottom] = view.axes[0].inImage(rows);
  const [left, right] = view.axes[1].inImage(cols);
  const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  const box = { class: kind, x: left, y: top, width: right - left, height: bottom - top };
  for (const [name, value] of Object.entries(box)) rect.setAttribute(name, value);
  return rect;
}

function drawBoxes() {
  if (!cell) return $("boxes").replaceChildren();
  const [y, x] = view.axes;
  const rects = [];
  const layer = +$("layer").value;
  for (let i = 0; i < layer && layer < view.layers.length; i++) rects.push(unitOf(i, "earlier"));
  rects.push(rectangle("own", y.around(cell[0]), x.around(cell[1])));
  for (const kind of ["halo", "field"]) rects.push(rectangle(kind, y.span(cell[0]), x.span(cell[1])));
  for (const kind of ["halo", "window"]) rects.push(rectangle(kind, y.windowOf(cell[0]), x.windowOf(cell[1])));
  if (layer < view.layers.length) rects.push(unitOf(layer, "layer"));
  $("boxes").replaceChildren(...rects);
}

function unitOf(layer, kind) {
  const [y, x] = view.layers[layer].axes;
  const shift = (axis, i) => [axis[0], axis[1] - (view.axes[i].shift ?? 0), axis[2]];
  return rectangle(kind, view.axes[0].unit(shift(y, 0), cell[0]), view.axes[1].unit(shift(x, 1), cell[1]));
}

// -- classes ----------------------------------------------------------------------------------

const LISTED = 60;
const FEW = 10; // classes that are seen at once need no search

function classRow(tag, name, p) {
  const row = document.createElement(tag);
  row.className = "class";
  const share = Number.isNaN(p) ? 0 : evidence(p, view.chance);
  const level = Math.round(share * 255) * 4;
  row.style.setProperty("--part", share);
  row.style.setProperty("--colour", `rgb(${view.colours.subarray(level, level + 3).join(" ")})`);
  const label = document.createElement("span");
  label.textContent = name;
  const value = document.createElement("b");
  value.textContent = written(p);
  row.append(label, value);
  return row;
}

function listClasses() {
  const wanted = $("search").value.trim().toLowerCase();
  const order = Array.from(view.averages.keys()).sort((a, b) => view.averages[b] - view.averages[a]);
  const found = order.filter((i) => view.names[i].toLowerCase().includes(wanted));
  $("classes").replaceChildren(...found.slice(0, LISTED).map((i) => {
    const row = classRow("label", view.names[i], view.averages[i]);
    const radio = Object.assign(document.createElement("input"), { type: "radio", name: "class", value: i, checked: i === chosen });
    radio.addEventListener("change", () => choose(i));
    row.prepend(radio);
    return row;
  }));
  const hidden = found.length - LISTED;
  const absent = view.total - view.classes.length;
  $("more").textContent = [
    found.length === 0 ? "No class has such a name." : hidden > 0 ? `${hidden} more; search to find them.` : "",
    absent > 0 ? `The page holds ${view.classes.length} of ${view.total} classes.` : "",
  ].join(" ").trim();
}

function choose(place) {
  chosen = place;
  $("shown").textContent = view.names[place];
  const radio = document.querySelector(`#classes input[value="${place}"]`);
  if (radio) radio.checked = true;
  drawOverlay();
  look(cell, false);
}

// -- cells ------------------------------------------------------------------------------------

const TOP = 5;
const rounded = (n) => +n.toFixed(1);

function boxText(rows, cols) {
  const [top, bottom] = view.axes[0].inImage(rows).map(rounded);
  const [left, right] = view.axes[1].inImage(cols).map(rounded);
  return `${top}, ${left}, ${bottom}, ${right}`;
}

/** Look at a cell: its boxes, its facts, its classes; `aloud` for those who hear the page. */
function look(next, aloud) {
  cell = next;
  drawBoxes();
  layerText();
  $("cell-facts").hidden = $("cell-order").hidden = $("cell-detail").hidden = !cell;
  $("cell-hint").hidden = !!cell;
  $("crop").hidden = !(cell && pinned && view.image);
  $("cell-name").textContent = cell ? `Cell (${cell.join(", ")})${pinned ? ", pinned" : ""}` : "Cell";
  if (!cell) return;
  const [y, x] = view.axes;
  const touches = y.touchesPadding(cell[0]) || x.touchesPadding(cell[1]);
  $("cell-window").textContent = boxText(y.windowOf(cell[0]), x.windowOf(cell[1]));
  $("cell-field").textContent = boxText(y.span(cell[0]), x.span(cell[1]));
  $("cell-padding").textContent = touches ? "touches padding" : "sees no padding";
  const best = topClasses();
  $("cell-classes").replaceChildren(...best.map(([i, p]) => classRow("li", view.names[i], p)));
  if (pinned && view.image) drawCrop();
  if (aloud) {
    const named = best.slice(0, 3).map(([i, p]) => `${view.names[i]} ${written(p)}`).join(", ");
    $("spoken").textContent =
      `Cell ${cell.join(", ")}${pinned ? ", pinned" : ""}: ${named}. ` +
      `${view.names[chosen]} ${written(probabilityAt(chosen, cell))}. ${$("cell-padding").textContent}.`;
  }
}

function topClasses() {
  const all = view.names.map((_, i) => [i, probabilityAt(i, cell)]);
  return all.sort((a, b) => b[1] - a[1]).slice(0, TOP);
}

function layerText() {
  const layer = view.layers[+$("layer").value];
  const text = layer
    ? `${layer.name}: field ${both(layer.axes, 2)}, stride ${both(layer.axes, 0)}`
    : `the whole network: field ${both(view.axes, "field")}`;
  $("layer-value").textContent = layer ? `field ${both(layer.axes, 2)}` : "all";
  $("layer").setAttribute("aria-valuetext", text);
  $("cell-layer").textContent = text;
  $("cell-layer").hidden = $("layer-term").hidden = !layer;
}

/** The window of the pinned cell, as far as the image goes; what lies beyond it is grey. */
function drawCrop() {
  const [y, x] = view.axes;
  const [top, bottom] = y.inImage(y.windowOf(cell[0]));
  const [left, right] = x.inImage(x.windowOf(cell[1]));
  const canvas = $("crop");
  const factor = 224 / Math.max(bottom - top, right - left);
  canvas.width = Math.max(Math.round((right - left) * factor), 1);
  canvas.height = Math.max(Math.round((bottom - top) * factor), 1);
  const context = canvas.getContext("2d");
  context.fillStyle = "#808080";
  context.fillRect(0, 0, canvas.width, canvas.height);
  const [height, width] = view.image_size;
  context.drawImage(view.image, -left * factor, -top * factor, width * factor, height * factor);
}

function cellAt(event) {
  const box = $("stage").getBoundingClientRect();
  const at = [(event.clientY - box.top) / box.height, (event.clientX - box.left) / box.width];
  return view.axes.map((axis, i) => {
    const place = Math.round(axis.place(at[i] * axis.size - 0.5));
    return Math.min(Math.max(place, 0), axis.cells - 1);
  });
}

// -- controls ---------------------------------------------------------------------------------

const KEYS = {
  ArrowUp: ([r, c]) => [r - 1, c],
  ArrowDown: ([r, c]) => [r + 1, c],
  ArrowLeft: ([r, c]) => [r, c - 1],
  ArrowRight: ([r, c]) => [r, c + 1],
  Home: ([r]) => [r, 0],
  End: ([r]) => [r, Infinity],
};

const middleCell = () => view.cells.map((n) => Math.floor((n - 1) / 2));

function pin(next) {
  pinned = !(pinned && cell && next[0] === cell[0] && next[1] === cell[1]);
  look(next, true);
}

function listenToStage() {
  const stage = $("stage");
  stage.addEventListener("pointermove", (event) => {
    if (pinned || event.pointerType === "touch") return;
    const next = cellAt(event);
    if (!cell || next[0] !== cell[0] || next[1] !== cell[1]) look(next, false);
  });
  stage.addEventListener("pointerleave", () => { if (!pinned && document.activeElement !== stage) look(null); });
  stage.addEventListener("click", (event) => pin(cellAt(event)));
  stage.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in KEYS) {
      const next = cell ? KEYS[event.key](cell) : middleCell();
      look(next.map((n, i) => Math.min(Math.max(n, 0), view.cells[i] - 1)), true);
    } else if (event.key === "Enter" || event.key === " ") pin(cell ?? middleCell());
    else if (event.key === "Escape") { pinned = false; look(null); }
    else return;
    event.preventDefault();
  });
}

function listenToControls() {
  const redraw = () => {
    $("opacity-value").textContent = `${$("opacity").value} %`;
    drawOverlay();
    drawBar();
  };
  $("opacity-value").textContent = `${$("opacity").value} %`;
  $("opacity").addEventListener("input", redraw);
  $("drawn").addEventListener("change", drawOverlay);
  $("grey").addEventListener("change", () => $("photograph").classList.toggle("grey", $("grey").checked));
  $("photograph").classList.add("grey");
  $("layer").addEventListener("input", () => look(cell ?? middleCell(), false));
  $("search").addEventListener("input", listClasses);
  $("side").addEventListener("input", () => ($("side-value").textContent = `${$("side").value} px`));
  $("side").addEventListener("change", () => recompute({ side: +$("side").value }));
  $("stride").addEventListener("change", () => recompute({ stride: +$("stride").value }));
}

// -- images that a host computes on -----------------------------------------------------------

function complain(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

async function recompute(change) {
  if (!source) return;
  wished = { ...wished, ...change };
  const turn = ++computing; // an answer that came too late is dropped
  complain("");
  const since = performance.now();
  const count = () => ($("seconds").textContent = `${((performance.now() - since) / 1000).toFixed(0)} s`);
  const wait = setInterval(count, 200);
  const progress = (data) => {
    if ($("waiting").textContent !== data.progress) $("waiting").textContent = data.progress;
    if (data.share === undefined) $("progress").removeAttribute("value");
    else $("progress").value = data.share;
  };
  progress({ progress: "computing" });
  count();
  $("busy").hidden = false;
  try {
    const next = await hosts[host].compute(source, wished, progress);
    if (turn === computing) show(next);
  } catch (error) {
    if (turn === computing) { complain(error.message.split("\n")[0]); takeBack(); }
  } finally {
    clearInterval(wait);
    if (turn === computing) $("busy").hidden = true;
  }
}

/** After an error, what is shown is what the controls say and what they change. */
function takeBack() {
  source = view?.source;
  if (!view) return;
  wished = { side: view.side, stride: view.axes[0].stride };
  offerSizes();
}

function open(file) {
  if (!file) return;
  source = file;
  wished = { stride: wished.stride };
  recompute({});
}

function listenToFiles() {
  const drop = $("drop");
  $("file").addEventListener("change", () => open($("file").files[0]));
  $("open").addEventListener("submit", (event) => event.preventDefault());
  document.addEventListener("paste", (event) => open(event.clipboardData.files[0]));
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", kind === "dragenter" || kind === "dragover");
      if (kind === "drop") open(event.dataTransfer.files[0]);
    });
  }
}

function introduce() {
  const size = Math.ceil(start.bytes / 2 ** 20);
  $("about").textContent =
    `The network of ${size} MB is loaded with the first image and runs in this browser; images stay on this machine.`;
}

listenToStage();
listenToControls();
$("title").textContent = start.title;
document.title = start.title;
if (host === "file") {
  hosts.file.first().then(show, (error) => complain(`the map in this file cannot be read: ${error.message}`));
} else {
  for (const part of document.querySelectorAll(".needs-host")) part.hidden = false;
  if (host === "page") introduce();
  listenToFiles();
}
document.documentElement.dataset.ready = "yes";
