/** @typedef {import("./continuation.js").Token} Token */

const SURPRISE = [0.5, 0.2, 0.05, 0.01, 0.001]; // probabilities between which the colours lie

/** How surprising a token was: 0 (likely) to 5; null if the model was not asked. */
export function surpriseOf(token) {
  return token.logprob === null ? null : SURPRISE.filter((p) => Math.exp(token.logprob) < p).length;
}

/** White space and control characters as something to see. */
export function visible(text) {
  return text
    .replaceAll(" ", "␣")
    .replaceAll("\n", "⏎")
    .replaceAll("\t", "⇥")
    .replace(/[\p{Cc}\p{Cf}\p{Zs}\p{Zl}\p{Zp}]/gu, codePoint);
}

function codePoint(character) {
  return `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
}

/**
 * A text of which every token is an element that can be pointed at, walked to and kept.
 * Tells `watcher` of it: `show(text, index)`, `keep(text, index)` (null: none), `walked(text, index)`.
 */
export class TokenText {
  /** @type {Token[]} */
  tokens = [];
  #element;
  #watcher;
  #spans = [];
  #loose = document.createElement("span"); // text whose tokens are not known yet
  #current = null;

  constructor(element, watcher) {
    this.#element = element;
    this.#watcher = watcher;
    this.#loose.className = "loose";
    element.append(this.#loose);
    element.addEventListener("pointerover", (event) => this.#pointed(event));
    element.addEventListener("click", (event) => this.#clicked(event));
    element.addEventListener("keydown", (event) => this.#key(event));
  }

  /**
   * Shows `loose` and after it `tokens`, of which those before `from` are as they were.
   * @param {Token[]} tokens
   */
  draw(tokens, { loose = "", from = 0 } = {}) {
    this.tokens = tokens;
    if (this.#loose.textContent !== loose) this.#loose.textContent = loose;
    for (const span of this.#spans.splice(tokens.length)) span.remove();
    const added = document.createDocumentFragment();
    for (let i = from; i < tokens.length; i++) {
      if (!this.#spans[i]) added.append((this.#spans[i] = document.createElement("span")));
      dress(this.#spans[i], tokens[i]);
    }
    this.#element.append(added);
    if (this.#current >= tokens.length) this.#current = null;
  }

  /** Marks a token as the one that is shown. */
  mark(index, kept) {
    this.#spans[this.#current]?.classList.remove("current", "kept");
    this.#current = index;
    this.#spans[index]?.classList.add("current");
    this.#spans[index]?.classList.toggle("kept", kept);
  }

  #indexOf(event) {
    const span = event.target.closest(".token");
    return span ? this.#spans.indexOf(span) : null;
  }

  #pointed(event) {
    const index = event.pointerType === "mouse" ? this.#indexOf(event) : null; // a finger does not hover
    if (index !== null) this.#watcher.show(this, index);
  }

  #clicked(event) {
    if (getSelection().isCollapsed) this.#watcher.keep(this, this.#indexOf(event)); // else text is being copied
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !this.tokens.length) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.#watcher.keep(this, this.#current);
      return;
    }
    const index = this.#step(event.key);
    if (index === null) return;
    event.preventDefault();
    this.#watcher.walked(this, index);
  }

  /** Scrolls to a token, if it is out of sight. */
  reveal(index) {
    this.#spans[index]?.scrollIntoView({ block: "nearest" });
  }

  /** The token that a key moves to; null if the key does not move. */
  #step(key) {
    const last = this.tokens.length - 1;
    const here = this.#current;
    const goals = {
      ArrowRight: Math.min((here ?? -1) + 1, last), ArrowLeft: Math.max((here ?? last + 1) - 1, 0), Home: 0, End: last,
    };
    return goals[key] ?? null;
  }
}

function dress(span, token) {
  const surprise = surpriseOf(token);
  const names = ["token"];
  if (token.prompt) names.push("prompt");
  if (/\n/.test(token.text)) names.push("breaks");
  if (surprise !== null) names.push(`surprise-${surprise}`);
  for (const kept of ["current", "kept"]) if (span.classList.contains(kept)) names.push(kept);
  span.className = names.join(" ");
  if (span.textContent !== token.text) span.textContent = token.text;
}
