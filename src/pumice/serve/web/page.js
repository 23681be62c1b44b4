// The page speaks to the same endpoint as every other client: /v1/chat/completions, streamed.

const $ = (id) => document.getElementById(id);

// What the server says of itself; models tuned on one wording of a format answer worse to another.
let settings = { model: "", max_new_tokens: 1024, formats: {} };

let talk = []; // OpenAI chat messages
let shown = []; // images of the next question: {uri, plan, image}
let running = null; // AbortController of the answer on its way
let asked = null; // the messages of the last question, for copying

// requests

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

function body(messages, stream = true) {
  return {
    ...(settings.model && { model: settings.model }),
    messages,
    max_tokens: Number($("length").value),
    temperature: Number($("temperature").value),
    ...(Number($("temperature").value) > 0 && { seed: Math.floor(Math.random() * 2 ** 31) }),
    ...(stream && { stream: true, stream_options: { include_usage: true } }),
  };
}

async function failure(response) {
  try {
    const told = await response.json();
    return told.error?.message ?? told.message ?? told.detail ?? JSON.stringify(told);
  } catch {
    return `the server answered with HTTP ${response.status}`;
  }
}

// The JSON objects of a stream of server-sent events; a stream without its end is an error. Other
// servers end lines with two signs, and send comments to keep the connection.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the answer broke off: the connection was closed");
    text += value;
    const lines = text.split(/\r?\n/);
    text = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function answer(messages, bubble) {
  running = new AbortController();
  busy(true);
  asked = messages;
  const start = performance.now();
  let text = "";
  let usage = null;
  let finish = null;
  try {
    const response = await post(messages, running.signal);
    if (!response.ok) throw new Error(await failure(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message ?? JSON.stringify(event.error));
      text += event.choices?.[0]?.delta?.content ?? "";
      usage = event.usage ?? usage;
      finish = event.choices?.[0]?.finish_reason ?? finish;
      bubble.firstChild.data = text;
      follow();
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      bubble.classList.add("error");
      bubble.firstChild.data = text + (text ? "\n" : "") + error.message;
      return null;
    }
    finish = "stopped";
  } finally {
    running = null;
    busy(false);
    bubble.classList.remove("waiting");
  }
  bubble.firstChild.data = text || "(no answer)";
  const seconds = (performance.now() - start) / 1000;
  bubble.append(note([...ENDS[finish] ?? [], ...told(usage, seconds)].join(" · ")));
  follow();
  return text;
}

async function post(messages, signal) {
  // A browser sends no such header, and says of it what it says of a server that is gone.
  if (/[^ -~]/.test($("key").value.trim())) throw new Error("the API key has a sign that no key has, such as a letter with an accent");
  try {
    return await fetch("/v1/chat/completions", {
      method: "POST",
      headers: headers(),
      body: JSON.stringify(body(messages)),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server cannot be reached");
  }
}

const ENDS = { stopped: ["stopped"], length: ["cut at the longest answer"] };

// The numbers of an answer; servers other than pumice say fewer of them.
function told(usage, seconds) {
  const time = `${seconds.toFixed(1)} s`;
  if (!usage) return [time];
  const { image_tokens: image, cached_tokens: cached } = usage.prompt_tokens_details ?? {};
  const parts = [image && `${image} image`, cached && `${cached} cached`].filter(Boolean);
  const of = parts.length ? ` (${parts.join(", ")})` : "";
  return [`${usage.prompt_tokens} prompt tokens${of}`, `${usage.completion_tokens} new`, time];
}

// the talk

async function ask(event) {
  event.preventDefault();
  const question = $("text").value.trim();
  if (running) return;
  // An image alone is no question: the box that waits for one is pointed at.
  if (!question) return $("text").focus();
  const message = written(question);
  const bubbleAsked = turn("user", question);
  if (format()) bubbleAsked.append(note(format()));
  if (shown.length) {
    const images = document.createElement("div");
    images.className = "images";
    images.append(...shown.map((one) => figure(one)));
    bubbleAsked.prepend(images);
  }
  const [kept, own] = [shown, talk];
  clearQuestion();
  const bubble = turn("assistant", "");
  bubble.classList.add("waiting");
  const said = await answer([...talk, message], bubble);
  // Of an answer that a new talk has broken off nothing stays.
  if (talk !== own) return;
  if (said === null || !said.trim()) {
    // What was not answered is no part of the talk; the question stays to be sent again, unless
    // the next one is being written already.
    if (!$("text").value.trim() && !shown.length) {
      $("text").value = question;
      shown = kept;
      showImages();
    }
  } else {
    talk.push(message, { role: "assistant", content: said.trim() });
  }
  fit();
  $("text").focus();
}

// The sentence that asks for the chosen form of answer.
function format() {
  return settings.formats[new FormData($("ask")).get("format")];
}

// The message of a question, with the images that wait and the format that is chosen.
function written(question) {
  return {
    role: "user",
    content: [
      ...shown.map((one) => ({ type: "image_url", image_url: { url: one.uri } })),
      { type: "text", text: format() ? `${question}\n${format()}` : question },
    ],
  };
}

function clearQuestion() {
  $("text").value = "";
  shown = [];
  showImages();
  fit();
}

function turn(kind, text) {
  const bubble = document.createElement("div");
  bubble.className = `turn ${kind}`;
  bubble.append(document.createTextNode(text));
  $("talk").append(bubble);
  follow();
  return bubble;
}

function note(text) {
  const line = document.createElement("span");
  line.className = "quiet";
  line.textContent = text;
  return line;
}

function follow() {
  $("talk").scrollTop = $("talk").scrollHeight;
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
}

// images

// What is wrong with a file, if anything is. An <img> shows drawings, and as much of a broken file as
// there is; servers take neither, and so does createImageBitmap.
async function fault(file) {
  const kinds = "PNG, JPEG, WebP and GIF can be used";
  if (!file.type.startsWith("image/")) return `is no image; ${kinds}`;
  if (file.type.startsWith("image/svg")) return "is an SVG drawing, which holds no pixels: draw it into a PNG first";
  try {
    (await createImageBitmap(file)).close();
  } catch {
    return `cannot be decoded by the browser: it is cut short or damaged, or of another kind; ${kinds}`;
  }
}

async function add(files) {
  for (const file of files) {
    const wrong = await fault(file);
    if (wrong) {
      turn("error", `${file.name || "what was given"} ${wrong}`);
      continue;
    }
    const uri = await new Promise((done) => {
      const reader = new FileReader();
      reader.onload = () => done(reader.result);
      reader.readAsDataURL(file);
    });
    const image = new Image();
    image.src = uri;
    await image.decode();
    shown.push({ uri, image, plan: await plan(image) });
  }
  showImages();
  $("text").focus();
}

async function plan(image) {
  const query = `width=${image.naturalWidth}&height=${image.naturalHeight}`;
  try {
    const response = await fetch(`/page/image-plan?${query}`, { headers: headers() });
    return response.ok ? response.json() : null;
  } catch {
    return null; // that the server is gone is told to who asks
  }
}

function showImages() {
  $("shown").replaceChildren(
    ...shown.map((one, place) => {
      const remove = document.createElement("button");
      remove.type = "button";
      remove.textContent = "×";
      remove.title = remove.ariaLabel = "Take the image away";
      remove.onclick = () => {
        shown.splice(place, 1);
        showImages();
      };
      const element = figure(one);
      element.append(remove);
      return element;
    }),
  );
}

// The picture as the model gets it: on its canvas, cut into tiles, with the tokens it becomes.
function figure({ image, plan }) {
  const element = document.createElement("figure");
  const canvas = document.createElement("canvas");
  const tiled = plan?.plan;
  const [width, height] = tiled ? tiled.target : [image.naturalWidth, image.naturalHeight];
  const fit = 640 / Math.max(width, height);
  const scale = tiled ? fit : Math.min(1, fit); // lines of tiles must show on the smallest picture
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const draw = canvas.getContext("2d");
  draw.scale(canvas.width / width, canvas.height / height);
  if (tiled) drawTiles(draw, image, tiled, scale);
  else draw.drawImage(image, 0, 0, width, height);
  element.append(canvas);
  const caption = document.createElement("figcaption");
  caption.textContent = describe(image, plan);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", caption.textContent);
  element.append(caption);
  return element;
}

function drawTiles(draw, image, tiled, scale) {
  const [width, height] = tiled.target;
  draw.fillStyle = "#7a7669";
  draw.fillRect(0, 0, width, height);
  draw.drawImage(image, ...tiled.offset, ...tiled.resized);
  draw.strokeStyle = "#f0916b";
  draw.lineWidth = 2 / scale;
  for (let column = 0; column < tiled.grid[0]; column++)
    for (let row = 0; row < tiled.grid[1]; row++)
      draw.strokeRect(column * tiled.tile, row * tiled.tile, tiled.tile, tiled.tile);
}

function describe(image, plan) {
  const size = `${image.naturalWidth} × ${image.naturalHeight}`;
  if (!plan) return size;
  if (!plan.plan) return `${size}: ${plan.image_tokens} image tokens`;
  const { grid, tokens } = plan.plan;
  const whole = tokens.global ? `${tokens.global} of the whole, ` : "";
  return `${size}: ${grid[0]} × ${grid[1]} tiles, ${plan.image_tokens} image tokens (${whole}${tokens.tiles} of tiles, ${tokens.row_end} row ends)`;
}

// copying

// What stands in the box, or else what was asked last.
function question() {
  const text = $("text").value.trim();
  if (!text && !shown.length && asked) return asked;
  return [...talk, written(text || "What is in the image?")];
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    $("copied").textContent = "copied";
  } catch {
    $("copied").textContent = "the browser does not allow copying";
  }
}

// The body comes through the standard input: images are longer than a command line may be.
function asCurl() {
  const key = $("key").value.trim() ? " -H 'Authorization: Bearer KEY'" : "";
  return [
    `curl ${location.origin}/v1/chat/completions -H 'Content-Type: application/json'${key} -d @- <<'JSON'`,
    JSON.stringify(body(question(), false)),
    "JSON",
    "",
  ].join("\n");
}

function asPython() {
  const { messages, max_tokens, temperature } = body(question(), false);
  return [
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${location.origin}/v1", api_key="KEY")`,
    "answer = client.chat.completions.create(",
    `    model=${JSON.stringify($("model").textContent)},`,
    `    messages=${JSON.stringify(messages)},`,
    `    max_tokens=${max_tokens},`,
    `    temperature=${temperature},`,
    ")",
    "print(answer.choices[0].message.content)",
  ].join("\n");
}

// the page itself

function fit() {
  $("text").style.height = "auto";
  $("text").style.height = `${$("text").scrollHeight + 2}px`;
}

function reset() {
  running?.abort();
  talk = [];
  asked = null;
  $("talk").replaceChildren();
  clearQuestion();
  $("text").focus();
}

$("ask").addEventListener("submit", ask);
$("text").addEventListener("input", fit);
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) ask(event);
});
$("stop").onclick = () => running?.abort();
$("reset").onclick = reset;
$("choose").onclick = () => $("file").click();
$("file").onchange = async () => {
  await add([...$("file").files]);
  $("file").value = "";
};
$("curl").onclick = () => copy(asCurl());
$("python").onclick = () => copy(asPython());
for (const name of ["temperature", "length"])
  $(name).oninput = () => ($(`${name}-shown`).value = $(name).value);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (files.length) {
    event.preventDefault();
    add(files);
  }
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop").hidden = false;
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("drop").hidden = true;
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").hidden = true;
  add([...event.dataTransfer.files]);
});

// When the settings open or the question grows, the end of the talk stays in sight.
new ResizeObserver(follow).observe($("talk"));

$("key").value = sessionStorage.getItem("key") ?? "";
$("key").onchange = () => sessionStorage.setItem("key", $("key").value);
$("text").focus();
try {
  settings = await (await fetch("/page/settings")).json();
} catch {
  turn("error", "the server cannot be reached; load the page again");
}
$("model").textContent = settings.model;
$("length").max = settings.max_new_tokens;
$("length").min = Math.min(16, settings.max_new_tokens);
$("length").value = Math.min(256, settings.max_new_tokens);
$("length-shown").value = $("length").value;
