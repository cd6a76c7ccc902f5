// Markdown as elements. Text of a model is never parsed as HTML, and links lead to web and mail addresses alone.

const INLINE = /(`+)([\s\S]*?[^`])\1(?!`)|\*\*([^\n]+?)\*\*|(?<![\w*])\*(?!\s)([^\n*]+?)\*(?!\w)|(?<!\w)_(?!\s)([^\n_]+?)_(?!\w)|\[([^\]\n]+)\]\(([^)\s]+)\)|(https?:\/\/[^\s<>"')\]]+)/g;
const SAFE = /^(https?|mailto):/i;

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes))
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== false && value !== undefined) made.setAttribute(key, value === true ? "" : value);
  made.append(...children);
  return made;
}

function link(address, text) {
  if (!SAFE.test(address)) return document.createTextNode(text);
  return element("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow" }, text);
}

function inline(text) {
  const found = [];
  let last = 0;
  for (const match of text.matchAll(INLINE)) {
    found.push(text.slice(last, match.index));
    const [whole, , code, strong, star, line, label, address, bare] = match;
    if (code !== undefined) found.push(element("code", {}, code));
    else if (strong !== undefined) found.push(element("strong", {}, ...inline(strong)));
    else if (star !== undefined || line !== undefined) found.push(element("em", {}, ...inline(star ?? line)));
    else found.push(address === undefined ? link(bare, bare) : link(address, label));
    last = match.index + whole.length;
  }
  return [...found, text.slice(last)];
}

const withBreaks = (lines) => lines.flatMap((line, at) => [...(at ? [element("br")] : []), ...inline(line)]);
const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;

function codeBlock(lines, language) {
  const text = lines.join("\n");
  const copy = element("button", { type: "button", onclick: () => navigator.clipboard?.writeText(text) }, "Copy");
  return element("pre", { tabindex: "0" }, element("code", language ? { "data-language": language } : {}, text), copy);
}

function list(lines, at) {
  const [, indent, mark] = ITEM.exec(lines[at]);
  const made = element(/\d/.test(mark) ? "ol" : "ul", /\d/.test(mark) ? { start: parseInt(mark) } : {});
  while (at < lines.length) {
    const match = ITEM.exec(lines[at]);
    if (!match || match[1].length < indent.length) break;
    if (match[1].length > indent.length && made.lastChild) {
      const [inner, next] = list(lines, at);
      made.lastChild.append(inner);
      at = next;
      continue;
    }
    const item = [match[3]];
    at += 1;
    while (at < lines.length && lines[at].trim() && !ITEM.test(lines[at]) && /^\s/.test(lines[at])) item.push(lines[at++].trim());
    made.append(element("li", {}, ...withBreaks(item)));
    while (at < lines.length && !lines[at].trim() && ITEM.test(lines[at + 1] ?? "")) at += 1;
  }
  return [made, at];
}

export function markdown(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n"), made = [];
  for (let at = 0; at < lines.length; ) {
    const line = lines[at], fence = /^\s{0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/.exec(line);
    if (fence) {
      const end = lines.findIndex((other, i) => i > at && other.trim().startsWith(fence[1]));
      made.push(codeBlock(lines.slice(at + 1, end < 0 ? undefined : end), fence[2]));
      at = end < 0 ? lines.length : end + 1;
    } else if (/^#{1,6}\s/.test(line)) {
      const level = Math.min(/^#+/.exec(line)[0].length + 2, 6);
      made.push(element(`h${level}`, {}, ...inline(line.replace(/^#+\s+/, "").replace(/\s+#+$/, ""))));
      at += 1;
    } else if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(line)) {
      made.push(element("hr"));
      at += 1;
    } else if (/^\s{0,3}>/.test(line)) {
      const end = lines.findIndex((other, i) => i > at && !/^\s{0,3}>/.test(other));
      const inner = lines.slice(at, end < 0 ? undefined : end).map((one) => one.replace(/^\s{0,3}>\s?/, ""));
      made.push(element("blockquote", {}, ...markdown(inner.join("\n"))));
      at = end < 0 ? lines.length : end;
    } else if (ITEM.test(line)) {
      const [found, next] = list(lines, at);
      made.push(found);
      at = next;
    } else if (line.includes("|") && /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/.test(lines[at + 1] ?? "")) {
      const head = element("tr", {}, ...cells(line).map((cell) => element("th", {}, ...inline(cell))));
      const body = element("tbody");
      for (at += 2; at < lines.length && lines[at].includes("|"); at += 1)
        body.append(element("tr", {}, ...cells(lines[at]).map((cell) => element("td", {}, ...inline(cell)))));
      made.push(element("table", {}, element("thead", {}, head), body));
    } else if (!line.trim()) at += 1;
    else {
      const end = lines.findIndex(
        (other, i) => i > at && (!other.trim() || ITEM.test(other) || /^\s{0,3}(`{3,}|~{3,}|>|#{1,6}\s)/.test(other)),
      );
      made.push(element("p", {}, ...withBreaks(lines.slice(at, end < 0 ? undefined : end))));
      at = end < 0 ? lines.length : end;
    }
  }
  return made;
}
