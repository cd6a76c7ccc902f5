// The chat page: conversations, kept in this browser, with a model on the server that the page came from.

import { element, markdown } from "./markdown.js";
import { plots } from "./plots.js";

const $ = (id) => document.getElementById(id);
const TALKS = "edge-moe.talks", SETTINGS = "edge-moe.settings", KEY = "edge-moe.key", CURRENT = "edge-moe.current";

function stored(storage, name, otherwise) {
  try {
    return JSON.parse(storage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

const talks = stored(localStorage, TALKS, []).filter((talk) => Array.isArray(talk?.messages));
const settings = { system: "", temperature: 0.7, prune: 0, most: "", ...stored(localStorage, SETTINGS, {}) };
let model = "", current = null, running = null;

function keep(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
  } catch {
    say("this browser has no room for more: delete old conversations", true);
  }
}

function say(text, wrong = false) {
  $("state").textContent = text;
  $("state").classList.toggle("wrong", wrong);
}

async function fetched(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) $("key-label").hidden = false;
  if (!answer.ok) throw new Error((await answer.json().catch(() => null))?.error?.message ?? `error ${answer.status}`);
  return answer;
}

// ---- conversations

const titleOf = (talk) => talk.messages.find((one) => one.role === "user")?.content.trim().slice(0, 60) || "Empty";
const keepTalks = () => keep(TALKS, talks.filter((talk) => talk.messages.length));

function begin() {
  current = talks.find((talk) => !talk.messages.length) ?? { id: crypto.randomUUID?.() ?? String(Date.now()), messages: [] };
  if (!talks.includes(current)) talks.unshift(current);
  show();
}

function show() {
  sessionStorage.setItem(CURRENT, JSON.stringify(current.id));
  $("list").replaceChildren(
    ...talks.filter((talk) => talk.messages.length).map((talk) =>
      element("li", talk === current ? { "aria-current": "true" } : {},
        element("button", { class: "quiet", onclick: () => { stop(); current = talk; show(); close(); } }, titleOf(talk)),
        element("button", { class: "quiet", "aria-label": `Delete: ${titleOf(talk)}`, title: "Delete", onclick: () => remove(talk) }, "×"))),
  );
  $("log").replaceChildren(...current.messages.map(item));
  $("log").scrollTop = $("log").scrollHeight;
}

function remove(talk) {
  if (talk === current) stop();
  talks.splice(talks.indexOf(talk), 1);
  keepTalks();
  talk === current ? begin() : show();
}

const action = (text, onclick) => element("button", { class: "quiet", type: "button", onclick }, text);

function item(message, at) {
  const made = element("li", { class: message.role });
  fill(made, message);
  const copy = action("Copy", () => navigator.clipboard?.writeText(message.content));
  const own = message.role === "user" ? action("Edit", () => edit(at)) : action("Retry", () => retry(at));
  const counts = message.counts ? element("span", {}, message.counts) : "";
  made.append(element("div", { class: "actions" }, copy, own, counts));
  return made;
}

function fill(made, message) {
  const parts = [];
  if (message.thought) {
    const open = made.querySelector("details")?.open ?? !message.content;
    parts.push(element("details", { class: "thought", open }, element("summary", {}, "Thought"), message.thought));
  }
  const said = message.role === "user" ? [message.content] : markdown(message.content);
  parts.push(element("div", { class: "said" }, ...said));
  if (message.error) parts.push(element("p", { class: "wrong", role: "alert" }, message.error));
  made.replaceChildren(...parts, ...made.querySelectorAll(":scope > .actions"));
}

function edit(at) {
  stop();
  $("message").value = current.messages[at].content;
  current.messages.length = at;
  keepTalks();
  show();
  grow();
  $("message").focus();
}

function retry(at) {
  stop();
  current.messages.length = at;
  answer();
}

// ---- answers

function request(talk) {
  const messages = talk.messages.filter((one) => !one.error || one.content).map(({ role, content }) => ({ role, content }));
  if (settings.system.trim()) messages.unshift({ role: "system", content: settings.system });
  const body = { model, messages, stream: true, stream_options: { include_usage: true }, temperature: settings.temperature };
  if (settings.most) body.max_completion_tokens = Number(settings.most);
  if (settings.prune > 0) body.prune = settings.prune;
  return { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let left = ""; ; ) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (left + value).split("\n\n");
    left = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

async function answer() {
  const talk = current, message = { role: "assistant", content: "", thought: "" };
  const asked = request(talk), control = new AbortController();
  talk.messages.push(message);
  talks.splice(0, 0, ...talks.splice(talks.indexOf(talk), 1));
  running = control;
  busy(true);
  show();
  const made = $("log").lastElementChild;
  let drawn = false;
  const draw = () => {
    if (drawn) return;
    drawn = true;
    requestAnimationFrame(() => {
      drawn = false;
      const log = $("log"), below = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
      if (talk === current) fill(made, message);
      if (below) log.scrollTop = log.scrollHeight;
    });
  };
  try {
    for await (const piece of events(await fetched("v1/chat/completions", { ...asked, signal: control.signal }))) {
      if (piece.error) throw new Error(piece.error.message);
      const delta = piece.choices?.[0]?.delta ?? {};
      message.content += delta.content ?? "";
      message.thought += delta.reasoning_content ?? "";
      if (piece.choices?.[0]?.finish_reason === "length") message.counts = settings.most ? "cut at the maximum of tokens" : "cut: the context is full";
      if (piece.usage) message.counts = [message.counts, counts(piece.usage)].filter(Boolean).join("; ");
      draw();
    }
  } catch (error) {
    if (control.signal.aborted) message.counts = "stopped";
    else message.error = error.message;
  }
  if (running === control) {
    running = null;
    busy(false);
  }
  keepTalks();
  if (talk === current) {
    const focused = document.activeElement;
    show();
    focused?.isConnected && focused.focus();
  }
}

function counts(usage) {
  const { experts_used: used, top_k: most, generation_tps: speed } = usage.edge_moe ?? {};
  const experts = most ? `, ${used.toFixed(2)} of ${most} experts` : "";
  return `${usage.completion_tokens} tokens${speed ? ` at ${speed.toFixed(1)} a second` : ""}${experts}`;
}

function stop() {
  running?.abort();
  running = null;
  busy(false);
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
}

// ---- the form, settings and panels

function grow() {
  $("message").style.height = "auto";
  $("message").style.height = `${$("message").scrollHeight + 2}px`;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("message").value;
  if (!text.trim() || running) return;
  current.messages.push({ role: "user", content: text });
  $("message").value = "";
  grow();
  answer();
});
$("message").addEventListener("input", grow);
$("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  running ? stop() : close();
});
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", () => { stop(); begin(); close(); $("message").focus(); });

function close() {
  for (const [button, panel] of [["open-talks", "talks"], ["open-panel", "panel"]]) {
    $(panel).classList.remove("open");
    $(button).setAttribute("aria-expanded", "false");
  }
}
for (const [button, panel] of [["open-talks", "talks"], ["open-panel", "panel"]])
  $(button).addEventListener("click", () => {
    const opens = !$(panel).classList.contains("open");
    close();
    $(panel).classList.toggle("open", opens);
    $(button).setAttribute("aria-expanded", String(opens));
  });

const SHOWN = { temperature: (value) => value.toFixed(2), prune: (value) => `${Math.round(100 * value)}%` };
for (const name of ["system", "temperature", "prune", "most"]) {
  const input = $(name), output = document.querySelector(`output[for=${name}]`);
  const told = () => { if (output) output.textContent = SHOWN[name](Number(settings[name])); };
  input.value = settings[name];
  told();
  input.addEventListener("input", () => {
    settings[name] = input.type === "range" ? Number(input.value) : input.value;
    told();
    keep(SETTINGS, settings);
  });
}
$("key").addEventListener("change", () => {
  sessionStorage.setItem(KEY, $("key").value);
  meet();
});

async function meet() {
  try {
    const [about] = (await fetched("v1/models").then((answer) => answer.json())).data;
    model = about.id;
    document.title = $("model").textContent = model;
    $("pruning").hidden = !about.prune_most;
    if (about.prune_most) $("prune").max = about.prune_most;
    say("");
  } catch (error) {
    say(error.message, true);
  }
}

current = talks.find((talk) => talk.id === stored(sessionStorage, CURRENT, null));
current ? show() : begin();
meet();
plots($("plots"), fetched, (why) => (why || model) && say(why, Boolean(why)));
