/**
 * @typedef {object} Message
 * @property {"user" | "assistant"} role
 * @property {string} content
 * @property {HTMLElement} element
 * @property {import("./continuation.js").Token[]} tokens of a reply
 * @property {number} cost of a reply: how many tokens its turn takes, the user's message included
 */

/** A talk in turns, of which the model reads as much as fits its context. */
export class Talk {
  /** @type {Message[]} turn by turn: what the user said and the reply */
  messages = [];
  /** How many of the oldest messages are left out, whole turns. */
  left = 0;
  #context;

  /** @param {number} context most tokens of a text */
  constructor(context) {
    this.#context = context;
  }

  /** What the model is to read once there is room for its reply, the last message. */
  get asked() {
    return this.messages.slice(this.left, -1);
  }

  /** How many tokens the turns before the newest are known to take. */
  get known() {
    return this.asked.reduce((sum, { cost }) => sum + cost, 0);
  }

  /** Whether the model reads a turn before the newest one. */
  get hasOlder() {
    return this.asked.length > 1;
  }

  /** Most tokens to read: up to half of the context is kept free for the reply, unless the newest turn needs it. */
  most(reply) {
    return this.#context - (this.hasOlder ? Math.min(reply, Math.floor(this.#context / 2)) : 1);
  }

  /** Leaves out the oldest turns of what has `tokens`, until the rest leaves room for a `reply`; the newest stays. */
  fit(tokens, reply) {
    for (let over = tokens - this.most(reply); over > 0 && this.hasOlder; this.left += 2) {
      over -= this.messages[this.left + 1].cost;
    }
  }
}
