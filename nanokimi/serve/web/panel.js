import { byId, make, percent } from "./dom.js";
import { visible } from "./token_text.js";

const PART = /^bytes:|\uFFFD/; // what the server writes for a part of a character: nothing to go on from

/** @typedef {import("./continuation.js").Token} Token */

/**
 * The panel that shows one token: what it is, what could have stood in its place, where the model sent it.
 * It watches the texts (see TokenText): one token at a time is shown, and a kept one stays until it is let go.
 */
export class Panel {
  #experts;
  /** Called as `branch(text, index, alternative)` when an alternative is chosen. */
  branch = () => {};
  /** Whether a text's alternatives can be chosen. */
  branches = () => false;
  #text = null;
  #index = null;
  #kept = false;

  /** @param {number} experts routed ones of a layer */
  constructor(experts) {
    this.#experts = experts;
    byId("panel-close").addEventListener("click", () => this.release());
  }

  show(text, index) {
    if (this.#kept) return;
    this.#select(text, index, false);
  }

  walked(text, index) {
    this.#select(text, index, this.#kept && text === this.#text);
    text.reveal(index);
    byId("walked").textContent = spoken(text.tokens[index], index, text.tokens.length);
  }

  keep(text, index) {
    const again = this.#kept && text === this.#text && index === this.#index;
    this.#select(text, index, index !== null && !again);
    text.reveal(index); // the panel of a phone may cover it
  }

  /** Lets a kept token go; false if none was kept. */
  release() {
    const kept = this.#kept;
    this.#select(null, null, false);
    return kept;
  }

  /** Draws the shown token anew if it is one of those of `text` that have changed, which begin at `from`. */
  refresh(text, from = 0) {
    if (text !== this.#text || this.#index < from) return; // a button must not vanish under the pointer
    if (text.tokens[this.#index]) this.#draw();
    else this.release();
  }

  #select(text, index, kept) {
    if (this.#text && this.#text !== text) this.#text.mark(null, false);
    this.#text = text;
    this.#index = index;
    this.#kept = kept;
    text?.mark(index, kept);
    this.#draw();
  }

  #draw() {
    const token = this.#text?.tokens[this.#index];
    byId("panel").hidden = !token;
    byId("walk-hint").hidden = Boolean(token);
    byId("panel-close").hidden = !this.#kept;
    if (!token) return;
    const [text, index] = [this.#text, this.#index];
    const choose = this.branches(text) ? (other) => this.branch(text, index, other) : null;
    byId("panel-token").replaceChildren(heading(token, index, text.tokens.length));
    byId("panel-insight").replaceChildren(
      ...alternatives(token, choose),
      ...expertGrid(token, this.#experts),
    );
  }
}

function heading(token, index, count) {
  const facts = [`token ${index + 1} of ${count}`, `id ${token.id}`];
  if (token.prompt) facts.push("prompt");
  const head = make("header", { className: "token-head" }, make("h2", {}, shown(token)));
  if (token.logprob !== null) {
    head.append(make("p", { className: "probability" }, percent(Math.exp(token.logprob))));
    facts.push(`${(-token.logprob / Math.LN2).toFixed(1)} bits`);
  }
  head.append(make("p", { className: "facts" }, facts.join(" · ")));
  return head;
}

/** A token or an alternative; a part of a character as the server calls it. */
function shown({ text, name }) {
  return visible(text || name || "part of a character");
}

function alternatives(token, choose) {
  if (!token.alternatives.length) return [];
  const rows = token.alternatives.map((other) => row(other, isSame(other, token), choose));
  if (token.logprob !== null && !token.alternatives.some((other) => isSame(other, token))) {
    rows.push(row(token, true, choose));
  }
  const title = choose ? "Instead: choose one to go on from there" : "What the model expected";
  return [make("h3", {}, title), make("ol", { className: "alternatives" }, ...rows)];
}

function isSame(other, token) {
  return other.id === undefined ? other.text === token.name : other.id === token.id;
}

function row(other, taken, choose) {
  const bar = make("span", { className: "bar" });
  bar.style.width = `${100 * Math.exp(other.logprob)}%`;
  const parts = [
    make("span", { className: "piece", title: shown(other) }, shown(other)),
    make("span", { className: "track" }, bar),
    make("span", { className: "share" }, percent(Math.exp(other.logprob))),
  ];
  if (taken) parts[0].append(make("span", { className: "unseen" }, " (this token)"));
  const able = choose && !taken && !PART.test(other.text);
  const inner = make(able ? "button" : "div", { className: "alternative" }, ...parts);
  if (able) {
    inner.type = "button";
    inner.addEventListener("click", () => choose(other));
  }
  inner.classList.toggle("taken", taken);
  return make("li", {}, inner);
}

function expertGrid(token, count) {
  if (!token.experts) return [make("p", { className: "facts" }, "Its experts are shown once the text has ended.")];
  if (!token.experts.length) return [];
  const rows = token.experts.map((chosen, layer) => {
    const words = `MoE layer ${layer + 1}: experts ${chosen.map((e) => e + 1).join(", ")}`;
    const cells = Array.from({ length: count }, (_, e) =>
      make("span", { className: chosen.includes(e) ? "cell chosen" : "cell" }, count <= 16 ? String(e + 1) : ""),
    );
    const line = make("div", { className: "cells", title: words }, ...cells);
    line.setAttribute("aria-hidden", "true");
    const name = make("span", { className: "layer" }, `${layer + 1}`);
    name.setAttribute("aria-hidden", "true");
    return make("li", {}, name, line, make("span", { className: "unseen" }, words));
  });
  return [make("h3", {}, "Experts, layer by layer"), make("ol", { className: "experts" }, ...rows)];
}

function spoken(token, index, count) {
  const share = token.logprob === null ? "" : `, ${percent(Math.exp(token.logprob))}`;
  return `${shown(token)}${share}, token ${index + 1} of ${count}`;
}
