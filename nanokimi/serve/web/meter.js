import { byId, make } from "./dom.js";

const ENDS = {
  stop: "ended",
  length: "length reached",
  stopped: "stopped",
  broken: "broken off",
  refused: "nothing came",
};

const MEASURABLE = 0.05; // seconds: what comes in one burst is timed with its request
const UNKNOWN = "–";

/** The figures below the text: speed, time to the first token, context used, how it ended. */
export class Meter {
  #context;
  #started = 0;
  #first = 0;
  #last = 0;
  #tokens = 0;
  #atFirst = 0; // tokens that came with the first: they took no time that was seen
  #used = 0;
  #seed = 0;

  /** @param {number} context most tokens of a text */
  constructor(context) {
    this.#context = context;
    this.draw();
  }

  /** How much of the context the text takes, as of a text that was kept. */
  get used() {
    return this.#used;
  }

  set used(used) {
    this.#used = used;
    this.draw();
  }

  /** A request with `seed` leaves now. */
  start(seed) {
    this.#started = performance.now();
    this.#first = this.#last = this.#tokens = 0;
    this.#seed = seed;
    byId("said").textContent = "writing …";
    this.draw();
  }

  /** `tokens` more have come; prompt and all now take `used` places of the context. */
  count(tokens, used) {
    if (tokens) this.#last = performance.now();
    this.#tokens += tokens;
    if (!this.#first) [this.#first, this.#atFirst] = [this.#last, this.#tokens];
    this.#used = used;
  }

  /** @param {keyof ENDS} reason why nothing more comes */
  finish(reason) {
    this.draw();
    byId("said").textContent = ENDS[reason] + (this.#tokens ? `, ${this.#tokens} tokens` : "");
  }

  /** Nothing is on the page. */
  clear() {
    this.#started = this.#first = this.#last = this.#tokens = this.#used = 0;
    byId("said").textContent = "";
    this.draw();
  }

  draw() {
    const first = this.#first ? duration((this.#first - this.#started) / 1000) : UNKNOWN;
    const figures = {
      context: ["context", `${this.#used} of ${this.#context}`],
      first: ["first token", first],
      speed: ["speed", this.#first ? `${this.#speed().toFixed(1)} tokens/s` : UNKNOWN],
      seed: ["seed", this.#started ? String(this.#seed) : UNKNOWN],
    };
    const pairs = Object.entries(figures).map(([key, [name, value]]) =>
      make("div", { className: `figure-${key}` }, make("dt", {}, name), make("dd", { title: value }, value)),
    );
    byId("figures").replaceChildren(...pairs);
  }

  /** Tokens a second after the first one; of all and with the request where that is too short to be timed. */
  #speed() {
    const seconds = (this.#last - this.#first) / 1000;
    if (seconds > MEASURABLE) return (this.#tokens - this.#atFirst) / seconds;
    return this.#tokens / ((this.#last - this.#started) / 1000);
  }
}

function duration(seconds) {
  return seconds < 1 ? `${Math.round(1000 * seconds)} ms` : `${seconds.toFixed(2)} s`;
}
