// The page speaks to the same endpoint as every other client: /v1/chat/completions, streamed.

import { asCurl, asPython, toClipboard } from "./copying.js";
import { fault, figure, opened } from "./images.js";
import { ended, events, failure, said, told } from "./stream.js";

const $ = (id) => document.getElementById(id);

// What the server says of itself; models tuned on one wording of a format answer worse to another.
let settings = { model: "", max_new_tokens: 1024, formats: {}, takes_key: true };

let talk = []; // OpenAI chat messages
let shown = []; // images of the next question: {uri, plan, image}
let adding = null; // images that are being read: a promise of whether all of them can be used
let waiting = false; // a question waits for them
let running = null; // AbortController of the answer on its way
let asked = null; // the messages of the last question, for copying
let seed = drawn(); // of the last question, too, so that what is copied gets the same answer
let pinned = true; // whether the end of the talk is in sight, and kept there
let laidOut = ""; // the talk's heights when that was last seen to

// requests

function drawn() {
  return Math.floor(Math.random() * 2 ** 31);
}

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
    ...(Number($("temperature").value) > 0 && { seed }),
    ...(stream && { stream: true, stream_options: { include_usage: true } }),
  };
}

// The answer in its bubble, and what is to be kept of it; null where it failed.
async function answer(messages, bubble) {
  running = new AbortController();
  busy(true);
  asked = messages;
  seed = drawn();
  const start = performance.now();
  const writing = written(bubble.firstChild);
  let [usage, finish, thought] = [null, null, false];
  try {
    const response = await post(messages, running.signal);
    if (!response.ok) throw new Error(hinted(await failure(response), response.status));
    for await (const event of events(response)) {
      if (event.error) throw new Error(said(event));
      const { delta, finish_reason } = event.choices?.[0] ?? {};
      writing.add(delta?.content ?? delta?.refusal ?? "");
      thought ||= Boolean(delta?.reasoning_content ?? delta?.reasoning);
      usage = event.usage ?? usage;
      finish = finish_reason ?? finish;
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      if (writing.end()) bubble.firstChild.appendData("\n");
      bubble.classList.add("error");
      bubble.append(note(error.message, "failed"));
      follow();
      return null;
    }
    finish = "stopped";
  } finally {
    running = null;
    busy(false);
    bubble.classList.remove("waiting");
  }
  const text = writing.end();
  if (!text) bubble.firstChild.data = thought ? "(no answer, only thoughts before one)" : "(no answer)";
  const seconds = (performance.now() - start) / 1000;
  bubble.append(note([...ended(finish), ...told(usage, seconds)].join(" · ")));
  follow();
  return text;
}

// A text that grows, drawn once a frame: to lay out a long one anew for every piece takes longer than
// its pieces take to come.
function written(node) {
  let [text, shownLength, frame] = ["", 0, 0];
  const draw = () => {
    frame = 0;
    node.appendData(text.slice(shownLength));
    shownLength = text.length;
    follow();
  };
  return {
    add(piece) {
      text += piece;
      if (piece) frame ||= requestAnimationFrame(draw);
    },
    end() {
      cancelAnimationFrame(frame);
      draw();
      return text;
    },
  };
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

// A refusal, and where the key goes that it asks for.
function hinted(message, status) {
  if (status !== 401 || !settings.takes_key) return message;
  $("settings").open = true;
  return `${message.replace(/\.?$/, ".")} Give the key under Settings.`;
}

// the talk

async function ask(event) {
  event.preventDefault();
  if (running || waiting || !(await imagesRead())) return;
  const question = $("text").value.trim();
  // An image alone is no question: the box that waits for one is pointed at.
  if (!question) return $("text").focus();
  const message = composed(question);
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
  follow();
  const text = await answer([...talk, message], bubble);
  // Of an answer that a new talk has broken off nothing stays.
  if (talk !== own) return;
  if (text === null || !text.trim()) {
    // What was not answered is no part of the talk; the question stays to be sent again, unless
    // the next one is being written already.
    if (!$("text").value.trim() && !shown.length) {
      $("text").value = question;
      shown = kept;
      showImages();
    }
  } else {
    talk.push(message, { role: "assistant", content: text.trim() });
  }
  fit();
}

// Whether a question may go: one that is sent before its image is read must not go without it.
async function imagesRead() {
  if (!adding) return true;
  waiting = true;
  try {
    return await adding;
  } finally {
    waiting = false;
  }
}

// The sentence that asks for the chosen form of answer.
function format() {
  return settings.formats[new FormData($("ask")).get("format")];
}

// The message of a question, with the images that wait and the format that is chosen.
function composed(question) {
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
  bubble.setAttribute("role", "article");
  bubble.ariaLabel = { user: "Question", assistant: "Answer" }[kind] ?? "Error";
  bubble.append(document.createTextNode(text));
  $("talk").append(bubble);
  pinned = true;
  follow();
  return bubble;
}

function note(text, kind = "quiet") {
  const line = document.createElement("span");
  line.className = kind;
  line.textContent = text;
  return line;
}

// Keeps the end in sight, unless somebody has gone up to read.
function follow() {
  if (pinned) $("talk").scrollTop = $("talk").scrollHeight;
  laidOut = heights();
}

// A talk that is laid out anew scrolls as well; that is nobody who goes up to read.
function scrolled() {
  if (heights() !== laidOut) return follow();
  const { scrollHeight, scrollTop, clientHeight } = $("talk");
  pinned = scrollHeight - scrollTop - clientHeight < 40;
}

function heights() {
  return `${$("talk").scrollHeight} ${$("talk").clientHeight}`;
}

// Stop takes the place of Ask, and who used the keyboard there goes on there, and after the answer in
// the box; nobody is called away from elsewhere. On a phone the box would bring up its keyboard.
function busy(is) {
  const focused = document.activeElement;
  $("send").hidden = is;
  $("stop").hidden = !is;
  $("talk").ariaBusy = String(is); // an answer is read out once, when it is whole
  if (is && [null, document.body, $("send")].includes(focused)) $("stop").focus();
  if (!is && focused === $("stop"))
    (matchMedia("(pointer: coarse)").matches ? $("send") : $("text")).focus();
}

// images

// Whether all of the files can be used; what is wrong with the others is told.
function add(files) {
  const before = adding ?? Promise.resolve(true);
  const reading = before.then(async (right) => (await addAll(files, talk)) && right);
  adding = reading;
  reading.finally(() => {
    if (adding === reading) adding = null;
  });
  return reading;
}

async function addAll(files, own) {
  let right = true;
  for (const file of files) {
    const wrong = await fault(file);
    const one = wrong ? null : await opened(file, headers());
    if (talk !== own) return false; // a new talk has begun meanwhile
    if (wrong) turn("error", `${file.name || "what was given"} ${wrong}`);
    else shown.push(one);
    right &&= !wrong;
  }
  showImages();
  $("text").focus();
  return right;
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
        ($("shown").querySelectorAll("button")[place] ?? $("choose")).focus();
      };
      const element = figure(one, 352);
      element.append(remove);
      return element;
    }),
  );
}

// copying

// What stands in the box, or else what was asked last.
function question() {
  const text = $("text").value.trim();
  if (!text && !shown.length && asked) return asked;
  return [...talk, composed(text || "What is in the image?")];
}

async function copy(written) {
  const key = $("key").value.trim() !== "";
  const done = await toClipboard(written(body(question(), false), key));
  $("copied").textContent = done ? "copied" : "the browser does not allow copying";
}

// the page itself

function fit() {
  $("text").style.height = "auto";
  $("text").style.height = `${$("text").scrollHeight + 2}px`;
  follow(); // measuring the box has moved the talk
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
// The second click of two on Ask falls on Stop and is meant for nothing.
$("stop").onclick = (event) => event.detail < 2 && running?.abort();
$("reset").onclick = reset;
$("choose").onclick = () => $("file").click();
$("file").onchange = async () => {
  await add([...$("file").files]);
  $("file").value = "";
};
$("curl").onclick = () => copy(asCurl);
$("python").onclick = () => copy(asPython);
for (const name of ["temperature", "length"])
  $(name).oninput = () => ($(`${name}-shown`).value = $(name).value);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing) running?.abort();
});
document.addEventListener("paste", (event) => {
  const { files: given, types } = event.clipboardData;
  const files = [...given];
  // Office programs put a picture of the text beside the text that is meant.
  const isText = types.includes("text/plain") && types.includes("text/html");
  if (files.length && !isText) {
    event.preventDefault();
    add(files);
  }
});
// Text that is dragged goes into the box as everywhere; a link beside it would lead away from here.
document.addEventListener("dragover", (event) => {
  const files = event.dataTransfer.types.includes("Files");
  if (!files && event.target.matches?.("textarea, input")) return;
  event.preventDefault();
  if (!files) event.dataTransfer.dropEffect = "none";
  $("drop").hidden = !files;
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("drop").hidden = true;
});
document.addEventListener("drop", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  $("drop").hidden = true;
  add([...event.dataTransfer.files]);
});

$("talk").onscroll = scrolled;
// When the settings open or the question grows, the end of the talk stays in sight.
new ResizeObserver(follow).observe($("talk"));

$("key").value = sessionStorage.getItem("key") ?? "";
$("key").onchange = () => sessionStorage.setItem("key", $("key").value);
$("text").focus();
try {
  const response = await fetch("/page/settings");
  if (!response.ok) throw new Error(await failure(response));
  settings = await response.json();
} catch (error) {
  turn("error", `the server does not say what it serves (${error.message}); load the page again`);
}
$("model").textContent = settings.model;
$("length").max = settings.max_new_tokens;
$("length").min = Math.min(16, settings.max_new_tokens);
$("length").value = Math.min(256, settings.max_new_tokens);
$("length-shown").value = $("length").value;
