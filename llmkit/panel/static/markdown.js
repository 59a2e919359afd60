// What a model writes, as Markdown, into the page: safely, and as it comes. `markdownit` is in the same module.

const PLAIN_AT = 50_000; // characters of one block, from which on the answer is shown as plain text
const PLAIN_PIECE = 10_000;
const DEEPEST = 60; // levels of one block; deeper ones are shown as plain text

// -- text ---------------------------------------------------------------------------------------------------------

// Escape sequences of terminals, and control characters that no text needs.
const CONTROLS = new RegExp(
  [
    "\\x1b\\[[0-?]{0,32}[ -/]{0,8}[@-~]?",
    "\\x1b[\\]PX^_][^\\x07\\x1b\\n]{0,500}(?:\\x07|\\x1b\\\\)?",
    "\\x1b[ -/]{0,8}[0-~]?",
    "\\x9b[0-?]{0,32}[ -/]{0,8}[@-~]?",
    "[\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f-\\x9f]",
  ].join("|"),
  "g",
);
const UNFINISHED = /(?:[\x1b\x9b]\[?[0-?]{0,32}[ -/]{0,8}|\x1b[\]PX^_][^\x07\x1b\n]{0,500}\x1b?|\r)$/;

const withoutControls = (text) => text.replace(/\r\n?/g, "\n").replace(CONTROLS, "");

// Takes text in pieces. What a piece leaves unfinished, as half an escape sequence, waits for the next.
const makeCleaner = () => {
  let held = "";
  return (piece, ended) => {
    const text = held + piece;
    held = ended ? "" : (UNFINISHED.exec(text)?.[0] ?? "");
    return withoutControls(text.slice(0, text.length - held.length));
  };
};

// -- elements -----------------------------------------------------------------------------------------------------

const button = (name, text, label) => {
  const made = element("button", `llmkit-quiet-button ${name}`, text);
  made.type = "button";
  made.setAttribute("aria-label", label);
  return made;
};

const RASTER = /^data:image\/(?:png|jpeg|gif|webp);base64,[a-z0-9+/]+={0,2}$/i;

const picture = (name, source, text) => {
  const made = element("img", name);
  made.alt = text;
  made.src = source;
  return made;
};

// Only whole addresses of the web and of mail. Those within the page or the server are not the model's to know.
const addressOf = (text) => {
  if (!/^(?:https?:\/\/|mailto:)/i.test(text)) return null;
  try {
    const url = new URL(text);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
};

// -- from Markdown to elements ------------------------------------------------------------------------------------

// Lines stay lines, as small models write them without knowing Markdown.
const markdown = markdownit({ html: false, linkify: true, breaks: true });
markdown.linkify.set({ fuzzyLink: false, fuzzyEmail: false, fuzzyIP: false });
markdown.validateLink = (address) => addressOf(address) !== null || RASTER.test(address);
// A picture elsewhere would tell its owner that somebody reads this; it becomes a link.
markdown.renderer.rules.image = (tokens, index, options, env, renderer) => {
  const { escapeHtml } = markdown.utils;
  const source = escapeHtml(tokens[index].attrGet("src") ?? "");
  const text = escapeHtml(renderer.renderInlineAsText(tokens[index].children, options, env) || "image");
  return RASTER.test(source) ? `<img src="${source}" alt="${text}">` : `<a href="${source}">${text}</a>`;
};

const AS_IT_IS = new Set(
  "P H1 H2 H3 H4 H5 H6 UL OL LI THEAD TBODY TR CODE EM STRONG S BLOCKQUOTE HR BR".split(" "),
);

const codeBox = (pre) => {
  const code = pre.querySelector("code") ?? pre;
  const language = (/^language-(\S{1,30})/.exec(code.className)?.[1] ?? "").replace(/[{},;].*/, "");
  const bar = element("div", "llmkit-code-bar");
  bar.append(element("span", "llmkit-code-language", language || "text"), button("llmkit-copy-code", "Copy", "Copy code"));
  const box = element("div", "llmkit-code");
  const shown = element("pre");
  shown.tabIndex = 0; // a box that scrolls has to be reached by keys
  shown.append(element("code", "", code.textContent.replace(/\n$/, "")));
  box.append(bar, shown);
  return box;
};

const tableBox = (table) => {
  const box = element("div", "llmkit-table");
  box.tabIndex = 0;
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", "Table");
  box.append(admit(table, element("table")));
  return box;
};

const cell = (from) => {
  const made = element(from.tagName);
  const side = /^text-align:(center|right)$/.exec(from.getAttribute("style") ?? "")?.[1];
  if (side) made.className = `llmkit-${side}`;
  if (from.tagName === "TH") made.scope = "col";
  return admit(from, made);
};

const link = (from) => {
  const address = addressOf(from.getAttribute("href") ?? "");
  const made = address ? element("a") : element("span");
  if (address) {
    Object.assign(made, { href: address, title: address, target: "_blank", rel: "noopener noreferrer nofollow" });
  }
  return admit(from, made);
};

// What markdown-it made is made once more, of nothing but what is named here: should it ever let something through,
// that stays text.
const allowed = (from) => {
  const { tagName } = from;
  if (tagName === "PRE") return codeBox(from);
  if (tagName === "TABLE") return tableBox(from);
  if (tagName === "TH" || tagName === "TD") return cell(from);
  if (tagName === "A") return link(from);
  if (tagName === "IMG") {
    const source = from.getAttribute("src") ?? "";
    return RASTER.test(source) ? picture("", source, from.alt) : document.createTextNode(from.alt);
  }
  if (!AS_IT_IS.has(tagName)) return document.createTextNode(from.textContent);
  const made = admit(from, element(tagName));
  if (tagName === "OL" && from.start !== 1) made.start = from.start;
  return made;
};

const SPACED_BY_STYLE = new Set("BODY UL OL TABLE THEAD TBODY TR BLOCKQUOTE".split(" "));

const admit = (from, to) => {
  for (const node of from.childNodes) {
    if (node.nodeType === Node.ELEMENT_NODE) to.append(allowed(node));
    else if (node.nodeType === Node.TEXT_NODE && (node.data.trim() || !SPACED_BY_STYLE.has(from.tagName))) {
      to.append(node.data);
    }
  }
  return to;
};

const plain = (text) => element("div", "llmkit-plain", text);

const elementsOf = (tokens, text, env) => {
  if (tokens.some((token) => token.level > DEEPEST)) return [plain(text.trim())];
  const html = markdown.renderer.render(tokens, markdown.options, env);
  // A document of its own: nothing in it runs, and nothing is fetched for it.
  return [...admit(new DOMParser().parseFromString(html, "text/html").body, element("div")).children];
};

// -- as it comes --------------------------------------------------------------------------------------------------

const sameShell = (one, other) =>
  one.nodeName === other.nodeName &&
  one.attributes.length === other.attributes.length &&
  [...one.attributes].every(({ name, value }) => other.getAttribute(name) === value);

// Makes children of `parent`, from the one at `from` on, look like `wanted`. What is alike stays the same node, so
// that a selection, a focus and the place in a box that scrolls outlive the next word.
const patch = (parent, from, wanted) => {
  let old = parent.childNodes[from] ?? null;
  for (const node of wanted) {
    const next = old?.nextSibling ?? null;
    if (old === null) parent.append(node);
    else if (old.nodeType === Node.TEXT_NODE && node.nodeType === Node.TEXT_NODE) grow(old, node.data);
    else if (old.nodeType === Node.ELEMENT_NODE && node.nodeType === Node.ELEMENT_NODE && sameShell(old, node)) {
      patch(old, 0, [...node.childNodes]);
    } else old.replaceWith(node);
    old = next;
  }
  while (old !== null) {
    const next = old.nextSibling;
    old.remove();
    old = next;
  }
};

const grow = (node, text) => {
  if (node.data === text) return;
  if (text.startsWith(node.data)) node.appendData(text.slice(node.data.length));
  else node.data = text;
};

// The blocks of the outermost level: where each starts, by character and by line, and what it is.
const blocksOf = (tokens, text) => {
  const starts = [0];
  for (let at = text.indexOf("\n"); at >= 0; at = text.indexOf("\n", at + 1)) starts.push(at + 1);
  const blocks = tokens
    .filter((token) => token.level === 0 && token.nesting >= 0 && token.map)
    .map(({ type, map: [line] }) => {
      const before = line > 0 ? text.slice(starts[line - 1], starts[line]) : "";
      return { start: starts[line], line, list: /list/.test(type), apart: !before.trim() };
    });
  if (blocks.length) blocks[0].start = 0; // what defines links is no block
  return { blocks, lastLine: starts.length - 1 };
};

// How many blocks nothing that comes can change. The last line is on its way: "***" may yet become "***bold***", and
// "2" the next item of a list. A table is known by its second line.
const finishedOf = (blocks, lastLine) => {
  for (let index = blocks.length - 1; index > 0; index -= 1) {
    const { line, apart } = blocks[index];
    const before = blocks[index - 1];
    if (line <= lastLine - 2 || (apart && (!before.list || line < lastLine))) return index;
  }
  return 0;
};

// Shows a growing text in `root`. A block that is finished is made once; only the last one is looked at again.
const makeBody = (root) => {
  let settled = 0; // characters
  let nodes = 0; // elements, which show them
  let isPlain = false;
  let env = { references: {} };

  const more = (made) => {
    patch(root, nodes, made);
    nodes += made.length;
  };

  const showPlain = (text, ended) => {
    const made = [];
    for (let cut; text.length - settled > PLAIN_PIECE; settled = cut + 1) {
      cut = text.indexOf("\n", settled + PLAIN_PIECE);
      if (cut < 0) break;
      made.push(plain(text.slice(settled, cut)));
    }
    const open = text.slice(settled);
    patch(root, nodes, open ? [...made, plain(open)] : made);
    nodes += made.length;
    if (ended) settled = text.length;
  };

  const pass = (text, ended) => {
    if (isPlain) return showPlain(text, ended);
    const tail = text.slice(settled);
    const draft = { references: { ...env.references } };
    const tokens = markdown.parse(tail, draft);
    const { blocks, lastLine } = blocksOf(tokens, tail);
    const endOf = (index) => blocks[index + 1]?.start ?? tail.length;
    const giant = blocks.findIndex(({ start }, index) => endOf(index) - start > PLAIN_AT);
    let finished = ended ? blocks.length : finishedOf(blocks, lastLine);
    if (giant >= 0) finished = giant;
    const made = [];
    for (let index = 0; index < finished; index += 1) {
      const block = tail.slice(blocks[index].start, endOf(index));
      made.push(...elementsOf(markdown.parse(block, env), block, env));
    }
    const rest = finished ? endOf(finished - 1) : 0;
    if (giant >= 0) {
      more(made);
      settled += rest;
      isPlain = true;
      return showPlain(text, ended);
    }
    let last = [];
    if (!ended && finished) last = elementsOf(markdown.parse(tail.slice(rest), draft), tail.slice(rest), draft);
    else if (!ended) last = elementsOf(tokens, tail, draft);
    patch(root, nodes, [...made, ...last]);
    nodes += made.length;
    settled = ended ? text.length : settled + rest;
    if (ended) env = draft; // with addresses that are named after the last block
  };

  return (text, ended) => {
    pass(text, ended);
    // Addresses that were named below the words they belong to.
    if (ended && !isPlain && Object.keys(env.references).length) {
      settled = nodes = 0;
      pass(text, ended);
    }
  };
};
