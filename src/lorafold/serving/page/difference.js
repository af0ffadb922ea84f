// Compares two texts word by word: the words of only one of them, and the common words in order.

const MOST = 4_000_000; // comparisons of words; they take a moment
const words = new Intl.Segmenter(undefined, { granularity: "word" });
let opened = false; // whether the user last left it open

/** The parts of both texts in order, as [kind, text]: "both", "left" or "right". null: too long. */
export function differences(left, right) {
  const [a, b] = [left, right].map((text) => [...words.segment(text)].map((word) => word.segment));
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start++;
  let end = 0;
  const most = Math.min(a.length, b.length) - start;
  while (end < most && a.at(-1 - end) === b.at(-1 - end)) end++;
  const [n, m] = [a.length - start - end, b.length - start - end];
  if (n * m > MOST) return null;
  // the length of the longest common subsequence of a[i..] and b[j..]
  const wide = m + 1;
  const longest = new Uint32Array((n + 1) * wide);
  for (let i = n - 1; i >= 0; i--) {
    for (let j = m - 1; j >= 0; j--) {
      longest[i * wide + j] = a[start + i] === b[start + j]
        ? longest[(i + 1) * wide + j + 1] + 1
        : Math.max(longest[(i + 1) * wide + j], longest[i * wide + j + 1]);
    }
  }
  const found = [];
  const add = (kind, word) => {
    if (found.at(-1)?.[0] === kind) found.at(-1)[1] += word;
    else found.push([kind, word]);
  };
  a.slice(0, start).forEach((word) => add("both", word));
  for (let i = 0, j = 0; i < n || j < m; ) {
    if (i < n && j < m && a[start + i] === b[start + j]) {
      add("both", a[start + i]);
      i++, j++;
    } else if (j === m || (i < n && longest[(i + 1) * wide + j] >= longest[i * wide + j + 1])) {
      add("left", a[start + i++]);
    } else {
      add("right", b[start + j++]);
    }
  }
  if (end) a.slice(-end).forEach((word) => add("both", word));
  return found;
}

/** Both answers as one text in which what differs is marked, shut or open as the last one. */
export function compared(left, right) {
  const made = document.getElementById("compared").content.cloneNode(true).firstElementChild;
  const found = differences(left, right);
  const [title, text] = [made.querySelector("summary"), made.querySelector(".text")];
  if (!found) title.textContent = "The answers are too long to compare word by word";
  else if (left === right) title.textContent = "Both answers are the same";
  else {
    const apart = found.filter(([kind]) => kind !== "both").length;
    title.textContent = `${apart} ${apart === 1 ? "difference" : "differences"}`;
    const names = { both: "span", left: "del", right: "ins" };
    for (const [kind, words] of found) {
      const part = document.createElement(names[kind]);
      part.textContent = words;
      text.append(part);
    }
    made.open = opened;
  }
  made.addEventListener("toggle", () => (opened = made.open));
  return made;
}
