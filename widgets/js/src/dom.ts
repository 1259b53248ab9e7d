/** Elements without markup: text only ever becomes a text node. */

export interface Options {
  class?: string;
  text?: string;
  attrs?: Record<string, string>;
}

export function el<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  options: Options = {},
  children: (Node | string)[] = [],
): HTMLElementTagNameMap[K] {
  const node = document.createElement(tag);
  if (options.class !== undefined) node.className = options.class;
  if (options.text !== undefined) node.textContent = options.text;
  for (const [name, value] of Object.entries(options.attrs ?? {})) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** Sets the text only where it differs: an unchanged live region is not read out again. */
export function setText(node: Element, text: string): void {
  if (node.textContent !== text) node.textContent = text;
}

let lastId = 0;

/** An id that no other element of the page has, for labels and descriptions. */
export function uniqueId(stem: string): string {
  lastId += 1;
  return `pml-${stem}-${lastId}-${Math.random().toString(36).slice(2, 8)}`;
}
