/**
 * A request as a command of a shell and as a program in Python, both of which run as they are.
 *
 * Pictures are read from files instead of being written out, and the key from the environment variable API_KEY.
 */

import { isEmbedded } from "./pictures.js";

/** A picture's place in a body: it is written as what reads the file. */
class FromFile {
  constructor(name, kind) {
    this.name = name;
    this.kind = kind;
  }
}

/** What openai's Python client has arguments for; other fields go into its extra_body. */
const OPENAI_FIELDS = new Set([
  "model",
  "messages",
  "temperature",
  "top_p",
  "max_tokens",
  "seed",
  "frequency_penalty",
  "presence_penalty",
]);

/**
 * { curl, python, files }: `body` is what requestBody made of `turns`, `files` are the pictures to save first, each a
 * picture with the name `file` that the snippets read.
 */
export function snippets(body, turns, { url, hasKey }) {
  const files = namedFiles(turns);
  const byUrl = new Map(files.map((picture) => [picture.url, new FromFile(picture.file, picture.kind)]));
  const shortened = { ...body, messages: body.messages.map((message) => shorten(message, byUrl)) };
  return { curl: curl(shortened, files.length > 0, url, hasKey), python: python(shortened, files, url, hasKey), files };
}

/** Pictures that are sent as data, each once, under names that differ. */
function namedFiles(turns) {
  const found = new Map();
  const taken = new Set();
  for (const picture of turns.flatMap((turn) => turn.pictures ?? []).filter(isEmbedded)) {
    if (found.has(picture.url)) continue;
    const file = unusedName(picture.name, taken);
    taken.add(file);
    found.set(picture.url, { ...picture, file });
  }
  return [...found.values()];
}

function unusedName(name, taken) {
  // What browsers make of a name when they save a file; and one that begins with a dash would be an option.
  const safe = name.replace(/["*/:<>?\\|\p{Cc}]/gu, "_").replace(/^[-.~]+/, "") || "picture";
  let unused = safe;
  for (let number = 2; taken.has(unused); number++) unused = `${number}-${safe}`;
  return unused;
}

function shorten(message, byUrl) {
  if (typeof message.content === "string") return message;
  const parts = message.content.map((part) => {
    const file = byUrl.get(part.image_url?.url);
    return file ? { ...part, image_url: { ...part.image_url, url: file } } : part;
  });
  return { ...message, content: parts };
}

// -- a shell --------------------------------------------------------------------------------------------------------

const shellWord = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", String.raw`'\''`)}'`);

/** The body comes through standard input: a picture is too long for an argument. */
function curl(body, hasFiles, url, hasKey) {
  const lines = [`curl ${shellWord(url)}`, "-H 'Content-Type: application/json'"];
  if (hasKey) lines.push('-H "Authorization: Bearer $API_KEY"');
  lines.push(hasFiles ? "-d @- <<EOF" : "-d @- <<'EOF'");
  const syntax = {
    constants: { true: "true", false: "false", null: "null" },
    string: hasFiles ? (text) => withinExpansion(JSON.stringify(text)) : JSON.stringify,
    file: ({ name, kind }) => `"data:${kind};base64,$(base64 < ${shellWord(name)} | tr -d '\\n')"`, // -w0 is GNU's alone
  };
  return `${lines.join(" \\\n  ")}\n${written(body, syntax)}\nEOF\n`;
}

/** Where a shell expands commands, it also takes these for its own. A backslash before anything else is one. */
function withinExpansion(text) {
  return text.replace(/[$`]|\\(?=[$`\\])/g, String.raw`\$&`);
}

// -- Python ---------------------------------------------------------------------------------------------------------

const PYTHON = {
  constants: { true: "True", false: "False", null: "None" },
  string: JSON.stringify, // its escapes are Python's, too
  file: ({ name, kind }) => `data_url(${JSON.stringify(name)}, ${JSON.stringify(kind)})`,
};
const DATA_URL = `

def data_url(path, kind):
    with open(path, "rb") as file:
        return f"data:{kind};base64,{base64.b64encode(file.read()).decode()}"

`;

function python(body, files, url, hasKey) {
  const modules = [...(files.length > 0 ? ["base64"] : []), ...(hasKey ? ["os"] : [])];
  const imports = modules.map((name) => `import ${name}\n`).join("") + (modules.length > 0 ? "\n" : "");
  const base = url.replace(/\/chat\/completions$/, "");
  const key = hasKey ? 'os.environ["API_KEY"]' : '"none"';
  const own = Object.entries(body).filter(([name]) => OPENAI_FIELDS.has(name));
  const extra = Object.entries(body).filter(([name]) => !OPENAI_FIELDS.has(name));
  if (extra.length > 0) own.push(["extra_body", Object.fromEntries(extra)]);
  const fields = own.map(([name, value]) => `    ${name}=${written(value, PYTHON, "    ")},\n`).join("");
  return `${imports}from openai import OpenAI
${files.length > 0 ? DATA_URL : ""}
client = OpenAI(base_url=${JSON.stringify(base)}, api_key=${key})
stream = client.chat.completions.create(
${fields}    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
`;
}

// -- both -----------------------------------------------------------------------------------------------------------

/** A JSON value, indented, in a language's own words; what fits on a line stays on it. */
function written(value, syntax, indent = "") {
  if (value instanceof FromFile) return syntax.file(value);
  if (typeof value === "string") return syntax.string(value);
  if (typeof value === "number") return String(value);
  if (value === null || typeof value === "boolean") return syntax.constants[String(value)];
  const inner = `${indent}  `;
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const items = Array.isArray(value)
    ? value.map((item) => written(item, syntax, inner))
    : Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${written(item, syntax, inner)}`);
  const line = `${open}${items.join(", ")}${close}`;
  if (line.length <= 76 && !line.includes("\n")) return line;
  return `${open}\n${items.map((item) => inner + item).join(",\n")}\n${indent}${close}`;
}
