/** Short ways to the document. Text only ever goes in as text. */

export function byId(id) {
  return document.getElementById(id);
}

/** A new element with properties and children (elements or strings). */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** 0.1234 as "12.3 %", small ones with two digits that count; never broken over lines. */
export function percent(probability) {
  const value = 100 * probability;
  if (value >= 99.95) return "100\u00a0%";
  if (value >= 1) return `${value.toFixed(1)}\u00a0%`;
  if (value >= 0.01) return `${value.toPrecision(2)}\u00a0%`;
  return "<0.01\u00a0%";
}
