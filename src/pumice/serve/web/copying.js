// A question for use elsewhere, as it would be sent from here.

// The body comes through the standard input: images are longer than a command line may be.
export function asCurl(body, withKey) {
  const key = withKey ? " -H 'Authorization: Bearer KEY'" : "";
  return [
    `curl ${location.origin}/v1/chat/completions -H 'Content-Type: application/json'${key} -d @- <<'JSON'`,
    JSON.stringify(body),
    "JSON",
    "",
  ].join("\n");
}

export function asPython({ model, messages, ...others }) {
  return [
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${location.origin}/v1", api_key="KEY")`,
    "answer = client.chat.completions.create(",
    `    model=${JSON.stringify(model ?? "")},`,
    `    messages=${JSON.stringify(messages)},`,
    ...Object.entries(others).map(([name, value]) => `    ${name}=${value},`),
    ")",
    "print(answer.choices[0].message.content)",
  ].join("\n");
}

// Whether the browser allows it.
export async function toClipboard(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copiedAsSelected(text);
  }
}

// The clipboard is open to https and to this machine alone; the page of another one in the same
// network may still copy what is selected.
function copiedAsSelected(text) {
  const [box, focused] = [document.createElement("textarea"), document.activeElement];
  box.value = text;
  document.body.append(box);
  box.select();
  const done = document.execCommand("copy");
  box.remove();
  focused?.focus();
  return done;
}
