// Reading what a server answers: its stream of events, and whatever it says instead of one.

const EXCERPT = 300; // signs shown of a text that was not meant for people

const broken = () => new Error("the answer broke off: the connection was closed");
// Every browser has words of its own for it; that somebody stopped the answer is told elsewhere.
const lost = (error) => (error.name === "AbortError" ? error : broken());

// What a refusal says, also where the server, or a proxy before it, does not speak JSON.
export async function failure(response) {
  const cause = await refusal(response);
  const wait = response.headers.get("retry-after");
  if (!wait) return cause;
  return `${cause} (try again ${/^\d+$/.test(wait) ? `in ${wait} s` : `after ${wait}`})`;
}

async function refusal(response) {
  const text = await response.text().catch(() => "");
  try {
    return said(JSON.parse(text));
  } catch {
    const words = plain(text, response);
    return `the server answered with HTTP ${response.status}${words && `: ${words}`}`;
  }
}

// The sentence in an error's JSON; servers keep it in several places.
export function said(error) {
  const places = [error?.error?.message, error?.error, error?.message, error?.detail];
  return places.find((place) => place && typeof place === "string") ?? JSON.stringify(error);
}

// A text that is no JSON; of a page what it is called.
function plain(text, response) {
  let words = text;
  if (kind(response).includes("html")) {
    const page = new DOMParser().parseFromString(text, "text/html");
    words = page.title || page.body.textContent;
  }
  words = words.trim().replace(/\s+/g, " ");
  return words.length > EXCERPT ? `${words.slice(0, EXCERPT)}…` : words;
}

const kind = (response) => response.headers.get("content-type") ?? "";

// The JSON objects of a stream of server-sent events; one without its end is an error. Other servers
// end lines with two signs, send comments to keep the connection, and leave out [DONE] or the last
// line's end; some do not stream at all.
export async function* events(response) {
  if (kind(response).includes("json")) return yield whole(await fully(response));
  if (kind(response).includes("html"))
    throw new Error(`what came is no answer but a page: ${plain(await fully(response), response)}`);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let [rest, complete] = ["", false];
  try {
    for (let done = false; !done; ) {
      const read = await next(reader);
      done = read.done;
      const lines = (rest + (read.value ?? "")).split(/\r?\n/);
      rest = done ? "" : lines.pop();
      for (const line of lines) {
        const data = line.startsWith("data:") ? line.slice(5).trim() : "";
        if (data === "[DONE]") return;
        const event = data && parsed(data, done);
        if (!event || typeof event !== "object") continue;
        complete ||= Boolean(event.choices?.[0]?.finish_reason);
        yield event;
      }
    }
    if (!complete) throw broken();
  } finally {
    // Where reading ends before the answer does, the server must not go on with it.
    reader.cancel().catch(() => {});
  }
}

async function next(reader) {
  try {
    return await reader.read();
  } catch (error) {
    throw lost(error);
  }
}

async function fully(response) {
  try {
    return await response.text();
  } catch (error) {
    throw lost(error);
  }
}

function parsed(data, last) {
  try {
    return JSON.parse(data);
  } catch {
    if (last) throw broken();
    throw new Error(`the server sent a piece that is no JSON: ${data.slice(0, EXCERPT)}`);
  }
}

// An answer that was not streamed, as the one event of a stream.
function whole(text) {
  const answer = parsed(text, false);
  return { ...answer, choices: answer?.choices?.map((one) => ({ ...one, delta: one.message })) };
}

const ENDS = {
  stopped: "stopped",
  length: "cut at the longest answer",
  content_filter: "withheld by a content filter",
};

// Why an answer ended, where it is not that all was said.
export function ended(finish) {
  return finish && finish !== "stop" ? [ENDS[finish] ?? `ended by ${finish}`] : [];
}

// The numbers of an answer; servers other than pumice say fewer of them.
export function told(usage, seconds) {
  const time = `${seconds.toFixed(1)} s`;
  if (!usage) return [time];
  const { image_tokens: image, cached_tokens: cached } = usage.prompt_tokens_details ?? {};
  const parts = [image && `${image} image`, cached && `${cached} cached`].filter(Boolean);
  const of = parts.length ? ` (${parts.join(", ")})` : "";
  return [`${usage.prompt_tokens} prompt tokens${of}`, `${usage.completion_tokens} new`, time];
}
