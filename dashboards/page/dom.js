// Elements made and kept: what has not changed is not touched.

/** An element; `parts` are its children: elements or text. Attributes that begin with "on" are listeners. */
export function el(tag, attributes = {}, ...parts) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...parts);
  return node;
}

export function text(node, value) {
  const wanted = String(value);
  if (node.textContent !== wanted) node.textContent = wanted;
}

/** Text, and beside it the exact value for tools and for the pointer. */
export function figure(node, shown, value) {
  text(node, shown);
  if (node.dataset.value !== String(value)) node.dataset.value = value;
}

/** One child of `parent` for each item, in their order: made by `make(item)` once for each key, then brought up to date. */
export function keyed(parent, items, keyOf, make, update) {
  const kept = (parent.kept ??= new Map());
  const wanted = new Set();
  items.forEach((item, at) => {
    const key = keyOf(item);
    wanted.add(key);
    let node = kept.get(key);
    if (!node) kept.set(key, (node = make(item)));
    if (parent.children[at] !== node) parent.insertBefore(node, parent.children[at] ?? null);
    update(node, item);
  });
  for (const [key, node] of kept) {
    if (wanted.has(key)) continue;
    node.remove();
    kept.delete(key);
  }
}

/** Fill a bar: each part [class, share] after the one before it. Parts are layers, the longest at the back. */
export function fill(bar, parts) {
  let end = 0;
  const ends = parts.map(([name, share]) => [name, (end = Math.min(1, end + share))]);
  keyed(bar, ends.reverse(), ([name]) => name, ([name]) => el("i", { class: name }), (node, [name, at]) => {
    node.style.transform = name === "mark" ? `translateX(${at * 100}%)` : `scaleX(${at})`;
  });
}
