// Converts Markdown to elements. A model's output only becomes text: it can't contain HTML or load
// anything, and each link shows its address.

const DEEPEST = 6; // levels of nested lists and quotations
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6}) +(\S.*)$/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])( +|$)/;
const QUOTE = /^ {0,3}> ?/;
// code, strong, emphasis, a link or an image; bounded, so that no text takes long
const INLINE = new RegExp(
  [
    /(`{1,3})(?!`)(?<code>[^`]{1,1000}|[^`]{0,500}`{1,2}[^`]{1,500})\1(?!`)/,
    /\*\*(?=\S)(?<strong>(?:[^*\n]|\*(?!\*)){1,1000})\*\*/,
    /(?<![\w*])\*(?=[^\s*])(?<em>[^*\n]{1,1000})\*(?!\*)/,
    /(?<!\w)_(?=[^\s_])(?<under>[^_\n]{1,1000})_(?!\w)/,
    /!?\[(?<label>[^[\]\n]{0,500})\]\((?<address>https?:\/\/[^\s()<>]{1,1000})\)/,
  ].map((one) => one.source).join("|"),
  "g",
);

/** What a text of Markdown is, in an element. What was shown before and still holds stays. */
export class Formatted {
  constructor(element) {
    this.element = element;
    this.shown = [];
  }

  show(text) {
    const found = blocks(text.split("\n"));
    const sources = found.map((block) => JSON.stringify(block));
    let same = 0;
    while (same < sources.length && sources[same] === this.shown[same]) same++;
    while (this.element.children.length > same) this.element.lastElementChild.remove();
    this.element.append(...found.slice(same).map((block) => made(block, 0)));
    this.shown = sources;
  }
}

/** The blocks of lines: {kind, lines}, for lists {kind, items}. */
function blocks(lines) {
  const found = [];
  for (let at = 0; at < lines.length; ) {
    const line = lines[at];
    const [fence, item] = [FENCE.exec(line), ITEM.exec(line)];
    const from = at++;
    if (!line.trim()) continue;
    if (fence) {
      const [, marks, language] = fence;
      const ends = (one) => one.startsWith(marks) && !one.replaceAll(marks[0], "");
      while (at < lines.length && !ends(lines[at].trim())) at++;
      found.push({ kind: "code", language, lines: lines.slice(from + 1, at++) });
    } else if (HEADING.test(line)) {
      const [, marks, title] = HEADING.exec(line);
      const lines = [title.replace(/ #+ *$/, "")];
      found.push({ kind: "heading", level: marks.length, lines });
    } else if (RULE.test(line)) {
      found.push({ kind: "rule" });
    } else if (QUOTE.test(line)) {
      while (at < lines.length && QUOTE.test(lines[at])) at++;
      const inside = lines.slice(from, at).map((one) => one.replace(QUOTE, ""));
      found.push({ kind: "quotation", lines: inside });
    } else if (item) {
      const [{ length: wide }, , mark] = item;
      const goesOn = (k) => !lines[k].trim() || /^ {2}/.test(lines[k])
        || (lines[k - 1].trim() && !begins(lines[k]));
      while (at < lines.length && goesOn(at)) at++;
      const further = lines.slice(from + 1, at);
      const within = further.map((one) => one.replace(/^ +/, (s) => s.slice(wide)));
      const ordered = /\d/.test(mark);
      const last = found.at(-1);
      if (last?.kind !== "list" || last.ordered !== ordered) {
        found.push({ kind: "list", ordered, start: parseInt(mark, 10), items: [] });
      }
      found.at(-1).items.push([line.slice(wide), ...within]);
    } else {
      while (at < lines.length && lines[at].trim() && !begins(lines[at])) at++;
      found.push({ kind: "paragraph", lines: lines.slice(from, at) });
    }
  }
  return found;
}

const begins = (line) => [FENCE, HEADING, RULE, QUOTE, ITEM].some((one) => one.test(line));

function made({ kind, lines, level, language, ordered, start, items }, depth) {
  if (kind === "rule") return element("hr");
  if (kind === "code") return code(lines.join("\n"), language);
  if (kind === "heading") return element(`h${Math.min(level + 3, 6)}`, ...inline(lines[0]));
  if (kind === "paragraph" || depth >= DEEPEST) {
    return element("p", ...inline((lines ?? items.flat()).join("\n")));
  }
  const inside = (one) => blocks(one).map((block) => made(block, depth + 1));
  if (kind === "quotation") return element("blockquote", ...inside(lines));
  const list = element(ordered ? "ol" : "ul", ...items.map((one) => element("li", ...inside(one))));
  if (ordered && start !== 1) list.start = start;
  return list;
}

function code(text, language) {
  const block = document.getElementById("code").content.cloneNode(true).firstElementChild;
  block.querySelector("code").textContent = text;
  block.querySelector(".language").textContent = language;
  const button = block.querySelector("button");
  button.addEventListener("click", async () => {
    const copied = navigator.clipboard?.writeText(text).then(() => "Copied", () => "Not copied");
    button.textContent = (await copied) ?? "Not copied";
  });
  return block;
}

function inline(text) {
  const found = [];
  let at = 0;
  for (const { index, 0: { length }, groups: { code, strong, em, under, label, address } } of
    text.matchAll(INLINE)) {
    found.push(text.slice(at, index));
    at = index + length;
    if (code !== undefined) found.push(element("code", code));
    else if (address === undefined) {
      found.push(element(strong ? "strong" : "em", ...inline(strong ?? em ?? under)));
    } else {
      const link = element("a", address);
      Object.assign(link, { href: address, target: "_blank", rel: "noopener noreferrer" });
      found.push(`${label} (`, link, ")");
    }
  }
  return [...found, text.slice(at)];
}

function element(name, ...children) {
  const made = document.createElement(name);
  made.append(...children); // strings become text nodes
  return made;
}
