// The page of `beacon-jax serve`. No framework and no build step: what the server sends is
// what a reader sees. Text of models and documents goes in by `textContent` only.

import { complete, compress, keepKey, request } from "./server.js";

const $ = (id) => document.getElementById(id);
const MAX_CELLS = 600; // more windows share a cell: a strip of thousands says no more
const LABELLED_CELLS = 48; // so few are wide enough for a ratio in each
const NOTHING = "Make a memory or choose one first.";

const sources = new Map(); // memory id -> the document it was made of, while in the page
const talks = new Map(); // memory id -> its conversation
let model = {}; // entry of /v1/models
let memories = []; // as /v1/memories lists them
let chosen = null; // the memory shown, with its windows
let view = null; // of the section "Memory"; progress of another is not drawn there
let picked = null; // the chosen file
let making = null; // AbortController of the compression that runs
let asking = null; // the same of answers

// ---- Small things

function el(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

const clone = (id) => $(id).content.firstElementChild.cloneNode(true);
const count = (n) => Math.round(n).toLocaleString("en");
const many = (n, word) => `${count(n)} ${n === 1 ? word : word.replace(/y$/, "ie") + "s"}`;
const times = (ratio) => `×${Number(ratio.toFixed(ratio < 9.95 ? 1 : 0))}`;
const seconds = (s) => `${s.toFixed(s < 10 ? 2 : 1)} s`;

function bytes(n) {
  const power = n < 1024 ? 0 : Math.min(Math.floor(Math.log2(n) / 10), 4);
  const value = n / 1024 ** power;
  const unit = ["bytes", "KiB", "MiB", "GiB", "TiB"][power];
  return `${power && value < 100 ? value.toPrecision(3) : count(value)} ${unit}`;
}

/** Writes a number of bytes into a <data>: short to read, exact as its value. */
const weigh = (n, node = el("data")) =>
  Object.assign(node, { value: n, title: many(n, "byte"), textContent: bytes(n) });

/** Fills a <dl>; each entry is [term, text or node]. */
function figures(list, entries) {
  const row = ([term, value]) => el("div", {}, el("dt", {}, term), el("dd", {}, value));
  list.replaceChildren(...entries.map(row));
  list.hidden = false;
}

function complain(id, error) {
  const text = error?.message ?? error ?? "";
  $(id).hidden = !text;
  $(id).textContent = text;
  if (error?.status !== 401) return;
  $("key-form").hidden = false;
  $("key").focus();
}

/** Marks a form as busy; the focus is not lost with the stop button. */
function busy(form, on) {
  const [go, stop] = [$(`${form}-go`), $(`${form}-stop`)];
  if (!on && document.activeElement === stop) go.focus();
  go.setAttribute("aria-disabled", on);
  stop.hidden = !on;
}

// Screen readers hear of progress and answers once a second, not at every token. A later
// text of the same kind replaces one that was not said yet.
const unsaid = new Map();
let speaking = 0;

function say(text, kind = Symbol()) {
  unsaid.set(kind, text);
  speaking ||= setTimeout(() => {
    speaking = 0;
    $("live").textContent = [...unsaid.values()].join(" ");
    unsaid.clear();
  }, 1000);
}

// ---- A document becomes a memory

async function pick(file) {
  complain("make-error");
  try {
    // Read now: a file that changes on the disk could not be sent a second time.
    picked = { name: file.name, file: new Blob([await file.arrayBuffer()]) };
  } catch {
    complain("make-error", `${file.name} cannot be read. Choose a text file.`);
    return;
  }
  $("file-name").textContent = `${file.name}, ${bytes(picked.file.size)}`;
  showPicked();
  say(`${file.name} is chosen.`);
}

function showPicked() {
  $("file-line").hidden = !picked;
  $("text").hidden = $("text-label").hidden = !!picked;
}

const ratioChosen = () => document.querySelector("[name=ratio]:checked")?.value;

function showHints() {
  const ratio = ratioChosen();
  const shown = [Number(ratio) ? "number" : ratio, ratio !== "full" && $("method").value];
  for (const hint of $("make").querySelectorAll("[data-hint]")) {
    hint.hidden = !shown.includes(hint.dataset.hint);
  }
  $("ratio-number").textContent = ratio;
  $("method").disabled = ratio === "full";
}

function showModel() {
  const { id, window, max_tokens, chat, ratios = [], methods = [] } = model;
  $("model").textContent = `${id} · windows of ${window} · up to ${count(max_tokens)} tokens`;
  const first = String(ratios[Math.floor(ratios.length / 2)] ?? "auto");
  const segments = [...ratios, "auto", "full"].map(String).map((value) => {
    const input = { type: "radio", name: "ratio", value, checked: value === first };
    const name = Number(value) ? `×${value}` : value;
    return el("label", {}, el("input", input), el("span", {}, name));
  });
  $("ratios").replaceChildren(...segments);
  $("method").replaceChildren(...methods.map((name) => el("option", { value: name }, name)));
  $("question-label").textContent = chat ? "Question" : "Prompt";
  $("base-hint").hidden = chat;
  showHints();
}

async function make(event) {
  event.preventDefault();
  if (making) return;
  complain("make-error");
  const text = $("text").value;
  if (!picked && !text.trim()) {
    complain("make-error", "There is no document yet. Paste a text or choose a file.");
    $("text").focus();
    return;
  }
  const words = text.trim().slice(0, 200).replace(/\s+/g, " ");
  const source = picked ?? { text, name: words.length > 48 ? `${words.slice(0, 48)}…` : words };
  const ratio = ratioChosen();
  const settings = { ratio: Number(ratio) || ratio };
  if (ratio !== "full" && $("method").value) settings.method = $("method").value;
  const before = chosen;
  const started = performance.now();
  const progress = showProgress(source.name);
  const mine = view;
  making = new AbortController();
  busy("make", true);
  try {
    const memory = await compress(source, settings, making.signal, progress);
    sources.set(memory.id, source);
    const took = (performance.now() - started) / 1000;
    if (view === mine) choose(memory, `Made in ${seconds(took)}.`);
    say(`Done: ${many(memory.tokens, "token")} in ${many(memory.slots, "slot")}.`, "progress");
    await refresh();
  } catch (error) {
    const stopped = error.name === "AbortError";
    complain("make-error", stopped ? "Stopped. No memory was made." : error);
    if (view === mine) before ? choose(before) : show(null);
  } finally {
    making = null;
    busy("make", false);
  }
}

// ---- What a memory is made of

function show(memory, title, state) {
  chosen = memory;
  view = Symbol();
  $("memory-title").textContent = title ?? "Memory";
  $("memory-state").textContent = state;
  $("memory-none").hidden = title !== undefined;
  $("memory-view").hidden = title === undefined;
  showList();
  showTalk();
}

/** On a small screen the memory is below the list. */
function reveal() {
  if ($("memory").getBoundingClientRect().top > innerHeight / 2) $("memory").scrollIntoView();
}

/** Paints how much of a window is kept. */
function paint(cell, kept) {
  cell.className = kept >= 1 ? "cell raw" : "cell";
  cell.style.setProperty("--kept", Math.min(Math.max(kept || 0, 0), 1));
  return cell;
}

const cellOf = (w) => paint(el("span"), w.ratio <= 1 ? 1 : w.slots / w.tokens);

function showStrip(cells) {
  $("strip").className = cells.length <= LABELLED_CELLS ? "strip few" : "strip";
  $("strip").replaceChildren(...cells);
}

/** Clears the view and returns what fills it, event by event. */
function showProgress(name) {
  show(null, name, "Waiting for the server.");
  const mine = view;
  for (const id of ["memory-figures", "strip", "strip-key"]) $(id).replaceChildren();
  $("windows-details").hidden = $("bar-key").hidden = true;
  $("bar-kept").style.width = "0";
  reveal();
  let cells = [];
  let last = { tokens: 0, slots: 0, cells: 0 };
  return ({ tokens, total, slots, window }) => {
    const windows = Math.ceil(total / window);
    const read = tokens < total ? Math.floor(tokens / window) : windows;
    const state = `Compressing: ${count(read)} of ${many(windows, "window")}.`;
    say(state, "progress");
    if (view !== mine) return;
    if (!cells.length) {
      cells = Array.from({ length: Math.min(windows, MAX_CELLS) }, () => paint(el("span"), 0));
      showStrip(cells);
    }
    const now = Math.floor((read * cells.length) / windows);
    const kept = (slots - last.slots) / (tokens - last.tokens);
    for (const cell of cells.slice(last.cells, now)) paint(cell, kept);
    if (now > last.cells) last = { tokens, slots, cells: now };
    cells[now]?.classList.add("reading");
    $("memory-state").textContent = state;
    const share = `${((100 * slots) / (tokens || 1)).toFixed(1)} %`;
    $("bar-kept").style.width = share.replace(" ", "");
    const progress = [["Tokens read", `${count(tokens)} of ${count(total)}`]];
    figures($("memory-figures"), [...progress, ["Slots", count(slots)], ["Kept", share]]);
  };
}

const named = (memory) => memory.name || (memory.parent ? "Conversation" : memory.id);
const isFull = (memory) => memory.ratio <= 1;
const methodOf = (memory) => (isFull(memory) ? "full attention" : memory.method);

/** Shows a memory: figures, bar of bytes, strip of windows, table of equal windows. */
function choose(memory, note = "") {
  show(memory, named(memory), `${memory.id} ${note && `· ${note}`}`);
  const [tokens, slots] = [count(memory.tokens), count(memory.slots)];
  const made = [["Tokens", tokens], ["Slots", slots], ["Ratio", times(memory.ratio)]];
  figures($("memory-figures"), [...made, ["Method", methodOf(memory)]]);
  const share = (100 * memory.bytes) / (memory.full_bytes || 1);
  $("bar-kept").style.width = `${share}%`;
  $("bar-key").hidden = false;
  weigh(memory.bytes, $("kept"));
  weigh(Math.max(memory.full_bytes - memory.bytes, 0), $("saved"));
  $("share").textContent = `${share.toFixed(1)} % of ${bytes(memory.full_bytes)}`;
  showWindows(memory.windows ?? []);
}

function showWindows(windows) {
  const usual = Math.max(model.window ?? 0, ...windows.slice(0, 1).map((w) => w.tokens));
  const all = windows.map((w, i) => ({ ...w, first: i + 1, last: i + 1 }));
  const isOpen = (w) => w.last === all.length && w.tokens < usual;
  const kindOf = (w) => (isOpen(w) ? "open" : w.ratio <= 1 ? "raw" : times(w.ratio));

  const groups = new Array(Math.min(all.length, MAX_CELLS)).fill().map(() => []);
  all.forEach((w, i) => groups[Math.floor((i * groups.length) / all.length)].push(w));
  const cells = groups.map((group) => {
    const [tokens, slots] = ["tokens", "slots"].map((k) => group.reduce((n, w) => n + w[k], 0));
    const cell = paint(el("span"), group.every((w) => w.ratio <= 1) ? 1 : slots / tokens);
    const [from, to] = [group[0].first, group.at(-1).last];
    const which = from === to ? `Window ${from}` : `Windows ${from} to ${to}`;
    cell.title = `${which}: ${many(tokens, "token")} in ${many(slots, "slot")}`;
    const label = kindOf(group[0]).replace("×", "");
    if (all.length <= LABELLED_CELLS) cell.append(el("span", {}, label));
    return cell;
  });
  showStrip(cells);

  const kinds = Map.groupBy(all, kindOf);
  const keys = [...kinds].sort((a, b) => b[1][0].ratio - a[1][0].ratio).map(([kind, group]) => {
    const what = kind === "open" ? many(group[0].tokens, "token") : many(group.length, "window");
    return el("span", {}, cellOf(group[0]), el("span", {}, `${kind}: ${what}`));
  });
  if (cells.length < all.length) keys.push("Neighbouring windows share a mark.");
  $("strip-key").replaceChildren(...keys);

  const runs = [];
  for (const w of all) {
    const run = runs.at(-1);
    if (run?.slots === w.slots && run.tokens === w.tokens) run.last = w.last;
    else runs.push({ ...w });
  }
  const rows = runs.map((run) => {
    const which = run.first === run.last ? run.first : `${run.first} to ${run.last}`;
    const texts = [which, kindOf(run), run.tokens, run.slots].map(String);
    return el("tr", {}, ...texts.map((text) => el("td", {}, text)));
  });
  $("windows").replaceChildren(...rows);
  $("windows-details").hidden = !rows.length;
}

// ---- The list of memories

async function refresh() {
  clearTimeout(refresh.timer);
  try {
    const { data } = await (await request("v1/memories")).json();
    memories = data.sort((a, b) => (b.created ?? 1e12) - (a.created ?? 1e12)); // none: unfinished
    complain("memories-error");
  } catch (error) {
    complain("memories-error", error);
  }
  showList();
  const some = memories.some((memory) => memory.status === "compressing");
  if (some) refresh.timer = setTimeout(refresh, 2000);
}

function showList() {
  const had = document.activeElement?.dataset.key;
  const steps = memories.filter((memory) => memory.parent);
  $("steps-line").hidden = !steps.length;
  $("steps-text").textContent = `Show ${many(steps.length, "memory")} of conversations`;
  const all = $("steps").checked;
  const shown = memories.filter((m) => all || !m.parent || m.id === chosen?.id);
  $("memories-none").hidden = shown.length > 0;
  $("memories").replaceChildren(...shown.map(cardOf));
  if (had) $("memories").querySelector(`[data-key="${CSS.escape(had)}"]`)?.focus();
}

function cardOf(memory) {
  const card = clone("card");
  const [open, remove] = card.querySelectorAll("button");
  open.textContent = named(memory);
  open.dataset.key = `open ${memory.id}`;
  open.onclick = () => load(memory.id);
  open.setAttribute("aria-pressed", memory.id === chosen?.id);
  remove.dataset.key = `delete ${memory.id}`;
  remove.onclick = () => confirmDelete(memory);
  const ratio = memory.ratio ? times(memory.ratio) : "unfinished";
  remove.setAttribute("aria-label", `Delete ${named(memory)}, ${ratio}`);
  card.classList.toggle("chosen", memory.id === chosen?.id);
  const { tokens, slots, bytes, progress } = memory;
  const read = progress && `${count(progress.tokens)} of ${many(progress.total, "token")}`;
  const size = () => [["Tokens", count(tokens)], ["Slots", count(slots)]];
  const cost = () => [["Bytes", weigh(bytes)], ["Ratio", ratio]];
  figures(card.querySelector("dl"), read ? [["Compressing", read]] : [...size(), ...cost()]);
  return card;
}

async function load(id) {
  try {
    const memory = await (await request(`v1/memories/${encodeURIComponent(id)}`)).json();
    if (memory.status === "compressing") throw new Error("This memory is not finished yet.");
    choose(memory);
    complain("memories-error");
    reveal();
  } catch (error) {
    if (error.status === 404) await refresh();
    complain("memories-error", error);
  }
}

function confirmDelete(memory) {
  const ids = new Set([memory.id]); // and of all that continues it: older ones come first
  for (const m of [...memories].reverse()) if (ids.has(m.parent)) ids.add(m.id);
  $("confirm-text").textContent =
    `${named(memory)}: ${many(memory.slots ?? 0, "slot")}, ${bytes(memory.bytes ?? 0)}. ` +
    "To have it again, its text must be compressed again.";
  $("confirm-steps-line").hidden = ids.size === 1;
  $("confirm-steps-text").textContent = `Also ${many(ids.size - 1, "memory")} of its conversations`;
  $("confirm-steps").checked = false;
  $("confirm").returnValue = "";
  $("confirm").onclose = () => {
    const all = $("confirm-steps").checked ? [...ids] : [memory.id];
    if ($("confirm").returnValue === "delete") remove(all);
  };
  $("confirm").showModal();
}

async function remove(ids) {
  try {
    for (const id of ids) {
      await request(`v1/memories/${encodeURIComponent(id)}`, { method: "DELETE" });
      for (const [base, talk] of talks) {
        if (talk.sides.some((side) => side.id === id)) talks.delete(base);
      }
      if (chosen?.id === id) show(null);
    }
    say(`Deleted: ${many(ids.length, "memory")}.`);
    await refresh();
  } catch (error) {
    await refresh();
    complain("memories-error", error);
  }
  showTalk();
  $("memories-title").focus();
}

// ---- Questions

/** A conversation has two sides, each with its own memory; the second is full attention. */
function talkOf(memory) {
  if (!talks.has(memory.id)) {
    const log = el("div");
    for (const { role, content } of memory.messages ?? []) {
      const who = role === "user" ? "Asked: " : "Answered: ";
      log.append(el("p", { className: "earlier" }, el("strong", {}, who), String(content)));
    }
    const title = `Memory, ${times(memory.ratio)}, ${methodOf(memory)}`;
    const full = { title: "Full attention", unseen: [], full: true };
    talks.set(memory.id, { log, sides: [{ id: memory.id, title, unseen: [] }, full], turns: 0 });
  }
  return talks.get(memory.id);
}

function showTalk() {
  const talk = chosen && talkOf(chosen);
  $("log").replaceChildren(...(talk?.log.hasChildNodes() ? [talk.log] : []));
  $("ask-new").hidden = !talk?.turns;
  let reason = "";
  if (!chosen) reason = NOTHING;
  else if (isFull(chosen)) reason = "This memory is full attention already.";
  else if (!talk.sides[1].id && !sources.has(chosen.id)) {
    reason = "The text of this memory is not in the page. Compress the document again to compare.";
  }
  $("full").disabled = Boolean(reason);
  if (reason) $("full").checked = false;
  $("full-hint").textContent =
    reason || "The same text, read once without compression. Both answer at the same time.";
}

async function ask(event) {
  event?.preventDefault();
  if (asking) return;
  complain("ask-error");
  const question = $("question").value;
  if (!chosen || !question.trim()) {
    complain("ask-error", chosen ? "Write something first." : NOTHING);
    $("question").focus();
    return;
  }
  const talk = talkOf(chosen);
  const source = sources.get(chosen.id);
  const turn = clone("turn");
  turn.querySelector("h3").textContent = question;
  talk.log.append(turn);
  talk.turns += 1;
  showTalk();
  $("question").value = "";
  asking = new AbortController();
  busy("ask", true);
  const both = $("full").checked;
  const answers = talk.sides.slice(0, both ? 2 : 1).map((side) => {
    const box = clone("answer");
    box.classList.toggle("full", Boolean(side.full));
    box.querySelector("h4").textContent = side.title;
    turn.querySelector(".answers").append(box);
    return answer(side, question, box, source, asking.signal);
  });
  const [said, fullSaid] = await Promise.all(answers);
  if (fullSaid) say(`Full attention: ${fullSaid}`);
  const asked = { role: "user", content: question };
  if (said && !both) talk.sides[1].unseen.push(asked, { role: "assistant", content: said });
  if (!said) $("question").value ||= question; // to ask it again
  await refresh();
  asking = null;
  busy("ask", false);
  showTalk();
}

/** Streams one answer into its box; returns its text, or "" where it failed. */
async function answer(side, question, box, source, signal) {
  const [said, note] = [box.querySelector(".said"), box.querySelector(".note")];
  try {
    if (!side.id) {
      const settings = { ratio: "full", name: `${source.name}, full attention` };
      const made = await compress(source, settings, signal, ({ tokens, total }) => {
        note.textContent = `Reading uncompressed: ${count(tokens)} of ${many(total, "token")}.`;
      });
      side.id = made.id;
    }
    note.textContent = "Waiting for the first token.";
    const body = { model: model.id, memory: side.id, chat: model.chat };
    body.messages = [...side.unseen, { role: "user", content: question }];
    body.max_tokens = $("max-tokens").valueAsNumber || 256;
    body.temperature = $("temperature").valueAsNumber || 0;
    let heard = 0;
    const hear = (text, end) => {
      if (side.full || end <= heard) return; // one voice: full attention is said at its end
      say((unsaid.get(side) ?? "") + text.slice(heard, end), side);
      heard = end;
    };
    const result = await complete(body, signal, (piece, text) => {
      note.textContent = "";
      said.append(piece);
      hear(text, text.lastIndexOf(" "));
    });
    hear(result.text, result.text.length);
    if (result.memory) Object.assign(side, { id: result.memory.id, unseen: [] });
    note.textContent = result.text.trim() ? "" : "The answer is empty.";
    if (result.finish === "length") {
      note.textContent = "Cut at the longest answer. Allow more tokens in the settings below.";
    }
    showTimes(box.querySelector("dl"), result);
    return result.text;
  } catch (error) {
    if (error.status === 401) complain("page-error", error);
    if (error.status === 404 && side.full) side.id = null; // deleted: read it anew next time
    const stopped = error.name === "AbortError";
    note.className = stopped ? "note muted" : "note error";
    note.textContent = stopped ? "Stopped. It is not part of the conversation." : error.message;
    say(note.textContent);
    return "";
  }
}

/** Times without the wait for others: of the two answers one may stand in front. */
function showTimes(list, { started, first, ended, pieces, usage, timings, memory }) {
  const queued = timings?.queue_seconds ?? 0;
  const tokens = usage?.completion_tokens ?? pieces;
  const speed = tokens / (timings?.decode_seconds ?? (ended - first) / 1000);
  const kept = usage?.memory ?? memory;
  const entries = [
    ["First token", first ? seconds((first - started) / 1000 - queued) : "–"],
    ["Time", seconds((ended - started) / 1000 - queued)],
    ["Tokens/s", speed > 0 && isFinite(speed) ? speed.toFixed(1) : "–"],
  ];
  if (kept) entries.push(["Slots", count(kept.slots)], ["Bytes", weigh(kept.bytes)]);
  if (queued >= 0.1) entries.push(["Waited", seconds(queued)]);
  figures(list, entries);
}

// ---- Start

/** Starts once the programs are compiled; the server refuses all else before. */
async function ready() {
  const answer = await fetch("ready").catch(() => null);
  const { done, of } = (await answer?.json().catch(() => null)) ?? {};
  const text = answer?.ok ? "Ready" : of ? `Compiling: ${done} of ${of}` : "No answer";
  if ($("status").textContent !== text) $("status").textContent = text;
  $("status").dataset.state = answer?.ok ? "ready" : "";
  if (answer?.ok) start();
  else setTimeout(ready, 2000);
}

async function start() {
  try {
    model = (await (await request("v1/models")).json()).data[0];
    complain("page-error");
    $("key-form").hidden = true;
    $("main").hidden = false;
    showModel();
    showTalk();
    await refresh();
  } catch (error) {
    complain("page-error", error);
  }
}

$("key-form").onsubmit = async (event) => {
  event.preventDefault();
  keepKey($("key").value.trim());
  $("key").value = "";
  await start();
  if ($("key-form").hidden) $("text").focus();
};

$("make").onsubmit = make;
$("make").onchange = showHints;
$("make-stop").onclick = () => making?.abort();
$("file").onchange = () => {
  if ($("file").files.length) pick($("file").files[0]);
  $("file").value = ""; // the same file can be chosen again
};
$("file-remove").onclick = () => {
  picked = null;
  showPicked();
  $("file").focus();
};
$("steps").onchange = showList;
$("ask").onsubmit = ask;
$("ask-stop").onclick = () => asking?.abort();
$("ask-new").onclick = () => {
  asking?.abort();
  talks.delete(chosen.id);
  showTalk();
  $("question").focus();
};
$("question").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask(event);
};

// A file dropped beside the field must not make the browser leave the page.
for (const kind of ["dragover", "dragleave", "drop"]) {
  addEventListener(kind, (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files.length) pick(event.dataTransfer.files[0]);
  });
}

ready();
