import { byId, make } from "./dom.js";

const ENDS = {
  stop: "ended",
  length: "length reached",
  stopped: "stopped",
  broken: "broken off",
  refused: "nothing came",
};

const MEASURABLE = 0.05; // seconds: a text that comes in one burst has no speed

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
    const seconds = (this.#last - this.#first) / 1000;
    const figures = [["context", `${this.#used} of ${this.#context}`, "context"]];
    if (this.#first) {
      figures.push(["first token", duration((this.#first - this.#started) / 1000), "first"]);
      const speed = (this.#tokens - this.#atFirst) / seconds;
      if (seconds > MEASURABLE) figures.push(["speed", `${speed.toFixed(1)} tokens/s`, "speed"]);
      figures.push(["seed", String(this.#seed), "seed"]);
    }
    const pairs = figures.map(([name, value, key]) =>
      make("div", { className: `figure-${key}` }, make("dt", {}, name), make("dd", {}, value)),
    );
    byId("figures").replaceChildren(...pairs);
  }
}

function duration(seconds) {
  return seconds < 1 ? `${Math.round(1000 * seconds)} ms` : `${seconds.toFixed(2)} s`;
}
