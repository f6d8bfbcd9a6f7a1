"use strict";
// The table of cases (sort, filter, columns) and the viewer. Text from data is set as textContent.
const find = (id) => document.getElementById(id);

// ---------------------------------------------------------------- table of cases

const table = find("table");
const views = new Map();
for (const script of document.querySelectorAll("script.view")) {
  views.set(script.dataset.case, script);
}

function sortBy(heading) {
  const headings = [...heading.parentElement.children];
  const column = headings.indexOf(heading);
  const order = heading.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
  headings.forEach((other) => other.removeAttribute("aria-sort"));
  heading.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  const key = (row) => column === 0 ? row.dataset.case : row.children[column].dataset.value;
  const compare = (a, b) => {
    if (column === 0) return sign * a.key.localeCompare(b.key, undefined, { numeric: true });
    if (a.key === "" || b.key === "") return (a.key === "") - (b.key === "");  // missing last
    return sign * (Number(a.key) - Number(b.key));
  };
  const rows = [...table.tBodies[0].rows].map((row) => ({ row, key: key(row) }));
  table.tBodies[0].append(...rows.sort(compare).map((item) => item.row));
}

function filter() {
  const wanted = find("filter").value.trim().toLowerCase();
  const rows = [...table.tBodies[0].rows];
  for (const row of rows) {
    const words = `${row.dataset.case} ${row.querySelector(".m-empty").textContent}`;
    row.hidden = !words.toLowerCase().includes(wanted);
  }
  const left = rows.filter((row) => !row.hidden).length;
  find("count").textContent = left === rows.length ? `${left} cases` : `${left} of ${rows.length}`;
}

function columns() {
  const boxes = [...document.querySelectorAll("#cases .tools [data-group]")];
  for (const box of boxes) {
    for (const cell of table.querySelectorAll(`.m-${box.dataset.group}`)) {
      cell.hidden = !box.checked;
    }
  }
}

function prepareTable() {
  document.querySelector("#cases .tools").hidden = false;
  for (const button of table.querySelectorAll("thead button")) {
    button.addEventListener("click", () => sortBy(button.closest("th")));
  }
  for (const row of table.tBodies[0].rows) {
    if (!views.has(row.dataset.case)) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = row.dataset.case;
    row.cells[0].firstElementChild.replaceChildren(button);
    row.classList.add("shown");
    row.addEventListener("click", () => {
      if (getSelection().isCollapsed) openCase(row.dataset.case);
    });
  }
  // Up and down go from case to case, so that nobody tabs through 250 of them.
  table.tBodies[0].addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const names = shownCases();
    const place = names.indexOf(event.target.closest("tr").dataset.case) + step;
    if (!step || !names[place]) return;
    event.preventDefault();
    rowOf(names[place]).querySelector("button").focus();
  });
  find("filter").addEventListener("input", filter);
  find("cases").querySelector("fieldset").addEventListener("change", columns);
  filter();
  columns();
}

const rowOf = (name) => [...table.tBodies[0].rows].find((row) => row.dataset.case === name);
const shownCases = () => [...table.tBodies[0].rows]
  .filter((row) => !row.hidden && views.has(row.dataset.case)).map((row) => row.dataset.case);

// ---------------------------------------------------------------- viewer

const dialog = find("viewer");
const sliders = [...document.querySelectorAll("#slices input")];  // axial, coronal, sagittal
const AXES = [2, 1, 0];  // the axis that each of them walks along
const MODES = [["all", 3], ["axial", 0], ["coronal", 1], ["sagittal", 2], ["3-D", 4]];
const NAMES = { t1: "T1", t1ce: "T1ce", t2: "T2", flair: "FLAIR" };
const NO_WEBGL = "The scan cannot be drawn: this browser offers no WebGL2. Take a current Firefox, "
  + "Chrome, Edge or Safari, or switch on hardware acceleration in the settings of this one. "
  + "Tables and pictures of this page work without it.";

let nv = null;          // the one viewer; a browser allows few WebGL contexts
let shown = null;       // {name, view, scans, sides}
let wanted = "";        // the case asked for last: an earlier one that comes late is dropped
const state = { modality: "flair", mode: 3, fill: true, opacity: 0.6, reference: true,
  prediction: true, cross: true };

async function viewer() {
  if (nv) return nv;
  if (!document.createElement("canvas").getContext("webgl2")) throw new Error(NO_WEBGL);
  const made = new niivue.Niivue({
    logLevel: "error", loadingText: "", dragAndDropEnabled: false, dragMode: 0,
    isRadiologicalConvention: true, sagittalNoseLeft: true, isOrientCube: true,
    multiplanarLayout: 2, multiplanarShowRender: 1, multiplanarPadPixels: 14,
    crosshairColor: [0.3, 0.9, 0.4, 0.8], fontColor: [1, 1, 1, 1], viewModeHotKey: "",
    clipPlaneHotKey: "", cycleClipPlaneHotKey: "", showAllOrientationMarkers: true,
  });
  await made.attachToCanvas(find("canvas"));
  made.onLocationChange = located;
  nv = made;
  return nv;
}

async function openCase(name) {
  wanted = name;
  shown = null;
  find("viewer-case").textContent = name;
  find("viewer-scores").textContent = scores(name);
  say("Loading …");
  for (const id of ["legend", "place", "viewer-grid"]) find(id).textContent = "";
  if (!dialog.open) dialog.showModal();
  neighbours();
  find("stage").hidden = false;
  await new Promise((done) => setTimeout(done));  // the words are painted first
  try {
    const drawing = await viewer();
    const view = JSON.parse(views.get(name).textContent);
    const sides = {};
    for (const side of ["prediction", "reference"]) {
      if (view[side]) sides[side] = await labels(view, side);
    }
    const modality = view.modalities.includes(state.modality) ? state.modality : view.modalities[0];
    const scan = await volume(view.images[view.modalities.indexOf(modality)], name);
    if (wanted !== name || !dialog.open) return;
    shown = { name, view, scan, sides, scans: { [modality]: scan.img } };
    state.modality = modality;
    // All at once: each call of addVolume would draw every layer again.
    drawing.volumes = [scan, ...Object.values(sides).map((side) => side.layer)];
    drawing.back = scan;
    drawing.overlays = drawing.volumes.slice(1);
    dress();
    drawing.setSliceType(state.mode);
    goTo(view.centre);
    say("");
  } catch (error) {
    find("stage").hidden = true;
    say(error.message === NO_WEBGL ? NO_WEBGL : `The scan cannot be drawn: ${error.message}`, true);
  }
}

function volume(base64, name, opacity = 1) {
  return niivue.NVImage.loadFromBase64({ base64, name: `${name}.nii.gz`, colormap: "gray", opacity,
    cal_min: 0, cal_max: 255 });
}

async function labels(view, side) {
  const layer = await volume(view[side], side);
  layer.setColormapLabel(palette(view, side));
  return { layer, full: layer.img, shell: shell(layer.img, layer.hdr.dims.slice(1, 4),
    view.labels.map((label) => label.value)) };
}

function palette(view, side) {
  const map = { R: [0], G: [0], B: [0], A: [0], I: [0], labels: [""] };
  for (const label of view.labels) {
    const hex = label[side];
    [1, 3, 5].forEach((at, i) => map["RGB"[i]].push(parseInt(hex.slice(at, at + 2), 16)));
    map.A.push(255);
    map.I.push(label.value);
    map.labels.push(label.name);
  }
  return map;
}

// Voxels with a neighbour further out, nested regions one in the other: on every plane a line one
// voxel wide around each region. `order` lists the label values from the outermost in.
function shell(full, [nx, ny, nz], order) {
  const depth = new Uint8Array(256);
  order.forEach((value, i) => { depth[value] = i + 1; });
  const result = new Uint8Array(full.length);
  for (let z = 0, i = 0; z < nz; z++) for (let y = 0; y < ny; y++) for (let x = 0; x < nx; x++, i++) {
    if (!full[i]) continue;
    const own = depth[full[i]];
    const inside = x > 0 && x < nx - 1 && y > 0 && y < ny - 1 && z > 0 && z < nz - 1
      && depth[full[i - 1]] >= own && depth[full[i + 1]] >= own && depth[full[i - nx]] >= own
      && depth[full[i + nx]] >= own && depth[full[i - nx * ny]] >= own
      && depth[full[i + nx * ny]] >= own;
    if (!inside) result[i] = full[i];
  }
  return result;
}

// ---------------------------------------------------------------- what is shown of the case

function dress() {
  if (!shown) return;
  for (const [side, { layer, full, shell }] of Object.entries(shown.sides)) {
    const filled = side === "prediction" && state.fill;
    layer.img = filled ? full : shell;
    layer.opacity = state[side] ? (filled ? state.opacity : Math.min(1, state.opacity + 0.4)) : 0;
  }
  nv.opts.crosshairWidth = state.cross ? 0.3 : 0;
  nv.updateGLVolume();
  controls();
}

async function showModality(modality) {
  if (!shown) return;  // still loading
  const { view, scans, name } = shown;
  const place = view.modalities.indexOf(modality);
  state.modality = modality;
  if (!scans[modality]) scans[modality] = (await volume(view.images[place], name)).img;
  if (shown?.name !== name || state.modality !== modality) return;  // another was asked for since
  shown.scan.img = scans[modality];
  dress();
}

function showMode(mode) {
  state.mode = mode;
  nv.setSliceType(mode);
  controls();
}

function goTo(millimetres) {
  nv.scene.crosshairPos = nv.mm2frac(millimetres);
  moved();
}

function moved() {
  nv.drawScene();
  nv.createOnLocationChange();
}

function slide(index) {
  const at = [...nv.frac2vox(nv.scene.crosshairPos)];
  at[AXES[index]] = Number(sliders[index].value);
  nv.scene.crosshairPos = nv.vox2frac(at);
  moved();
}

function located() {
  if (!shown) return;
  const at = [...nv.frac2vox(nv.scene.crosshairPos)];
  const size = shown.scan.hdr.dims.slice(1, 4);
  sliders.forEach((slider, i) => {
    slider.max = size[AXES[i]] - 1;
    slider.value = at[AXES[i]];
    slider.nextElementSibling.textContent = `${at[AXES[i]] + 1} of ${size[AXES[i]]}`;
  });
  const index = at[0] + size[0] * (at[1] + size[1] * at[2]);
  const words = ["reference", "prediction"].filter((side) => shown.sides[side]).map((side) => {
    const value = shown.sides[side].full[index];
    const label = shown.view.labels.find((one) => one.value === value);
    return `${side}: ${label ? label.name : "no tumour"}`;
  });
  find("place").textContent = `At the cross: ${words.join(", ")}`;
}

function controls() {
  const { view, sides } = shown;
  choices("modalities", view.modalities.map((name, i) => ({ value: name,
    words: NAMES[name] || name, key: i < 9 ? String(i + 1) : "" })), state.modality, showModality);
  choices("modes", MODES.map(([words, value]) => ({ words, value, key: "" })), state.mode, showMode);
  for (const side of ["reference", "prediction"]) {
    find(`show-${side}`).disabled = !sides[side];
    find(`show-${side}`).checked = Boolean(sides[side]) && state[side];
  }
  find("fill").checked = state.fill;
  find("cross").checked = state.cross;
  find("opacity").value = state.opacity;
  legend();
  const edges = view.spacing.map((edge) => Number(edge.toFixed(2))).join(" × ");
  find("viewer-grid").textContent = "The patient's right (R) is on the left. Turn the wheel over a "
    + `slice to scroll. Shown in voxels of ${edges} mm` + (view.resampled
      ? ", coarser than the scan; the metrics were not computed on this." : ".");
}

function choices(id, items, chosen, choose) {
  const group = find(id);
  if (group.childElementCount !== items.length || group.dataset.case !== shown.name) {
    group.dataset.case = shown.name;
    group.replaceChildren(...items.map((item) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = item.key ? `${item.words} ` : item.words;
      if (item.key) button.append(Object.assign(document.createElement("kbd"),
        { textContent: item.key }));
      button.addEventListener("click", () => choose(item.value));
      return button;
    }));
  }
  [...group.children].forEach((button, i) =>
    button.setAttribute("aria-pressed", items[i].value === chosen));
}

function legend() {
  const lines = ["reference", "prediction"].filter((side) => shown.sides[side]).map((side) => {
    const filled = side === "prediction" && state.fill;
    const line = document.createElement("p");
    line.append(`${side} (${state[side] ? (filled ? "filled" : "outlined") : "hidden"})`);
    for (const label of shown.view.labels) {
      const entry = document.createElement("span");
      const swatch = document.createElement("i");
      swatch.style.borderColor = label[side];
      if (filled) swatch.style.background = label[side];
      entry.append(swatch, label.name);
      line.append(entry);
    }
    return line;
  });
  find("legend").replaceChildren(...lines);
}

function scores(name) {
  const heads = [...table.tHead.rows[1].cells];
  return "Dice: " + [...rowOf(name).cells].map((cell, i) => [heads[i], cell])
    .filter(([, cell]) => cell.classList.contains("m-dice"))
    .map(([head, cell]) => `${head.textContent.trim()} ${cell.textContent}`).join(", ");
}

function neighbours() {
  const names = shownCases();
  const place = names.indexOf(wanted);
  find("previous").disabled = place <= 0;
  find("next").disabled = place < 0 || place === names.length - 1;
}

function step(by) {
  const names = shownCases();
  const name = names[names.indexOf(wanted) + by];
  if (name) openCase(name);
}

function say(words, problem = false) {
  find("viewer-message").textContent = words;
  find("viewer-message").classList.toggle("problem", problem);
  for (const id of ["controls", "slices"]) find(id).hidden = problem;
}

function toggle(name) {
  if (name === "reference" || name === "prediction") {
    if (!shown?.sides[name]) return;
  }
  state[name] = !state[name];
  dress();
}

function prepareViewer() {
  find("close").addEventListener("click", () => dialog.close());
  find("previous").addEventListener("click", () => step(-1));
  find("next").addEventListener("click", () => step(1));
  find("centre").addEventListener("click", () => shown && goTo(shown.view.centre));
  find("show-reference").addEventListener("change", () => toggle("reference"));
  find("show-prediction").addEventListener("change", () => toggle("prediction"));
  find("fill").addEventListener("change", () => toggle("fill"));
  find("cross").addEventListener("change", () => toggle("cross"));
  find("opacity").addEventListener("input", () => {
    state.opacity = Number(find("opacity").value);
    dress();
  });
  sliders.forEach((slider, i) => slider.addEventListener("input", () => slide(i)));
  dialog.addEventListener("close", () => {
    if (rowOf(wanted)) rowOf(wanted).querySelector("button").focus();
  });
  dialog.addEventListener("keydown", (event) => {
    if (!shown || event.ctrlKey || event.metaKey || event.altKey) return;
    const key = event.key.toLowerCase();
    const modality = shown.view.modalities[Number(key) - 1];
    if (modality) showModality(modality);
    else if (key === "r") toggle("reference");
    else if (key === "p") toggle("prediction");
    else if (key === "f") toggle("fill");
    else if (key === "x") toggle("cross");
    else if (key === "c") goTo(shown.view.centre);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }, true);
}

if (table) {
  prepareTable();
  prepareViewer();
}
