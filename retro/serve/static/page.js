// The page of `retro serve`. Whatever comes from a model or a document is set as textContent, never as markup.

const MIN_SHOWN_RUN = 3; // tokens; shorter runs are chance
const RUN_COLORS = 4;
const $ = (id) => document.getElementById(id);
const form = $("form");
let asking = null; // AbortController of the request under way

function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}

// the server

function headers() {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function checked(response) {
  if (response.ok) return response;
  if (response.status === 401) $("key-field").hidden = false;
  const body = await response.json().catch(() => null);
  throw new Error(body?.error?.message ?? `the server answered ${response.status}.`);
}

async function list(path) {
  return (await (await checked(await fetch(path, { headers: headers() }))).json()).data;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// the form

async function load() {
  const [[model], stores] = await Promise.all([list("/v1/models"), list("/v1/stores")]);
  document.title = `${model.id} · retro serve`;
  $("model").textContent = model.id;
  $("about").textContent = `chunks of ${model.retro.chunk_len} tokens, at most ${model.retro.max_new_tokens} new ones`;
  $("tokens").max = model.retro.max_new_tokens;
  $("tokens").value = Math.min(128, model.retro.max_new_tokens);
  $("neighbors").placeholder = model.retro.num_neighbors;
  $("store").replaceChildren(...stores.map((store) => {
    const option = element("option", "", store.id);
    option.value = store.id;
    option.title = `${store.num_documents} documents, ${store.num_chunks} chunks`;
    option.dataset.most = store.max_num_neighbors;
    return option;
  }));
  update();
}

function update() {
  const on = $("retrieval").checked;
  $("store").disabled = $("neighbors").disabled = !on;
  $("hint").textContent = on ? "Each chunk of the text is written while reading what the chunk before it found." : "Retrieval is off: nothing is read.";
  $("neighbors").max = $("store").selectedOptions[0]?.dataset.most ?? "";
}

function request() {
  const asked = {
    prompt: $("prompt").value,
    max_tokens: $("tokens").valueAsNumber,
    temperature: $("temperature").valueAsNumber,
    stream: true,
    stream_options: { include_usage: true },
    retro: { retrieval: $("retrieval").checked },
  };
  if (asked.retro.retrieval) {
    asked.retro.align = "end";
    asked.retro.store = $("store").value;
    if ($("neighbors").value) asked.retro.num_neighbors = $("neighbors").valueAsNumber;
  }
  if ($("seed").value) asked.seed = $("seed").valueAsNumber;
  return asked;
}

// one text

async function write() {
  if (!$("store").options.length) await load();
  const asked = request();
  const started = performance.now();
  const seconds = () => `${((performance.now() - started) / 1000).toFixed(1)} s`;
  const text = new Text(asked.prompt);
  $("status").textContent = "waiting";
  asking = new AbortController();
  const options = { method: "POST", headers: headers(), body: JSON.stringify(asked), signal: asking.signal };
  let usage, reason;
  for await (const part of events(await checked(await fetch("/v1/completions", options)))) {
    if (part.error) throw new Error(part.error.message);
    $("status").textContent = `writing, ${seconds()}`;
    for (const chunk of part.retro?.sources ?? []) text.read(chunk);
    for (const choice of part.choices) {
      text.add(choice.text);
      reason = choice.finish_reason ?? reason;
    }
    usage = part.usage ?? usage;
  }
  text.finish();
  const ended = { stop: "the text ended", length: "the length was reached" }[reason] ?? "the answer was cut off";
  $("status").textContent = `${usage?.completion_tokens ?? "?"} tokens in ${seconds()}; ${ended}`;
}

class Text {
  constructor(prompt) {
    this.written = "";
    this.chunks = new Map(); // by number, the latest word on each
    this.span = element("span", "chunk");
    $("text").replaceChildren(element("span", "prompt", prompt), this.span);
    $("text").classList.add("writing");
    $("sources").replaceChildren();
  }

  add(text) {
    this.written += text;
    this.span.append(text);
  }

  read(chunk) {
    if (!this.chunks.has(chunk.chunk)) {
      this.span = this.chunkSpan(chunk);
      $("text").append(this.span);
    }
    this.chunks.set(chunk.chunk, chunk);
    if (!chunk.neighbors.length) return;
    const section = reading(chunk);
    const before = $("sources").querySelector(`[data-chunk="${chunk.chunk}"]`);
    const panel = $("sources");
    const atEnd = panel.scrollHeight - panel.scrollTop - panel.clientHeight < 30;
    if (before) before.replaceWith(section);
    else panel.append(section);
    if (!before && atEnd) panel.scrollTop = panel.scrollHeight;
    for (const passage of section.querySelectorAll(".passage")) showMark(passage);
  }

  chunkSpan(chunk) {
    const span = element("span", "chunk");
    if (!chunk.neighbors.length) return span;
    span.classList.add("reads");
    span.dataset.chunk = chunk.chunk;
    span.append(element("span", "number", chunk.chunk + 1));
    return span;
  }

  finish() {
    $("text").classList.remove("writing");
    const chunks = [...this.chunks.values()].sort((a, b) => a.chunk - b.chunk);
    if (!chunks.length || !chunks.every((chunk) => chunk.tokens)) return;
    const prompt = $("text").firstChild;
    let left = this.written;
    const spans = chunks.map((chunk) => {
      const span = this.chunkSpan(chunk);
      const runs = shownRuns(chunk);
      for (let i = chunk.num_prompt_tokens; i < chunk.tokens.length; i++) {
        const token = left.slice(0, chunk.tokens[i].length);
        left = left.slice(token.length);
        const run = runs.find(({ start, stop }) => start <= chunk.start + i && chunk.start + i < stop);
        appendPiece(span, token, run?.place);
      }
      return span;
    });
    $("text").replaceChildren(prompt, ...spans, left);
  }
}

function shownRuns(chunk) {
  return chunk.neighbors.flatMap(({ copied }, place) =>
    copied && copied.num_tokens >= MIN_SHOWN_RUN ? [{ place, start: copied.start, stop: copied.start + copied.num_tokens }] : []);
}

// Text in a mark of the neighbor that it was copied from, joined to the piece before it where that is marked alike.
function appendPiece(parent, text, place) {
  if (place === undefined) return parent.append(text);
  const last = parent.lastChild;
  if (last instanceof Element && last.matches(`mark.run-${place % RUN_COLORS}`)) return last.append(text);
  parent.append(element("mark", `run-${place % RUN_COLORS}`, text));
}

function reading(chunk) {
  const section = element("div", "reading");
  section.dataset.chunk = chunk.chunk;
  section.append(element("h3", "", `Chunk ${chunk.chunk + 1} read`), ...chunk.neighbors.map(card));
  return section;
}

function card(neighbor, place) {
  const made = element("article");
  const title = neighbor.title || neighbor.document_id || "source unknown";
  const where = [`${neighbor.measure} ${(Math.round(neighbor.score * 1000) / 1000).toFixed(3)}`];
  if (neighbor.position !== null) where.push(`chunk ${neighbor.position + 1}`);
  where.push(...[neighbor.date, neighbor.source].filter(Boolean));
  const copied = neighbor.copied && neighbor.copied.num_tokens >= MIN_SHOWN_RUN ? neighbor.copied : null;
  if (copied) where.push(`copied ${copied.num_tokens} tokens`);
  made.append(element("h4", "", title), element("p", "where", where.join(" · ")), passage(neighbor, copied, place));
  return made;
}

function passage(neighbor, copied, place) {
  const made = element("p", "passage");
  const parts = [element("span"), element("span", "continuation")];
  neighbor.tokens.forEach((token, i) => {
    const inside = copied && copied.neighbor_start <= i && i < copied.neighbor_start + copied.num_tokens;
    appendPiece(parts[i < neighbor.continuation_start ? 0 : 1], token, inside ? place : undefined);
  });
  made.append(...parts);
  return made;
}

// Scroll a passage, and nothing else, to what was copied from it.
function showMark(passage) {
  const mark = passage.querySelector("mark");
  if (mark) passage.scrollTop = mark.offsetTop - passage.offsetTop - 20;
}

function choose(event) {
  const number = event.target.closest(".reads")?.dataset.chunk;
  if (number === undefined) return;
  for (const chosen of document.querySelectorAll(".chosen")) chosen.classList.remove("chosen");
  for (const same of document.querySelectorAll(`[data-chunk="${number}"]`)) same.classList.add("chosen");
  if (event.type === "click") $("sources").querySelector(`[data-chunk="${number}"]`)?.scrollIntoView({ block: "nearest" });
}

// what people do

async function submit(event) {
  event.preventDefault();
  $("error").hidden = true;
  $("write").disabled = true;
  $("stop").disabled = false;
  try {
    await write();
  } catch (error) {
    $("text").classList.remove("writing");
    const stopped = error.name === "AbortError";
    $("status").textContent = stopped ? "stopped" : "";
    $("error").hidden = stopped;
    $("error").textContent = error.message;
  } finally {
    $("write").disabled = false;
    $("stop").disabled = true;
  }
}

form.addEventListener("submit", submit);
form.addEventListener("change", update);
$("key").addEventListener("change", () => load().then(() => { $("error").hidden = true; }, () => {}));
$("stop").addEventListener("click", () => asking?.abort());
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
for (const kind of ["click", "mouseover"]) $("text").addEventListener(kind, choose);
load().catch((error) => {
  $("error").hidden = false;
  $("error").textContent = error.message;
});
