import { inspect, streamChunks } from "./api.js";
import { Continuation } from "./continuation.js";

/** @typedef {import("./continuation.js").Token} Token */

/** Asks the server for texts and for what stands behind them: one text at a time on the whole page. */
export class Writer {
  #stopping = new AbortController();
  #inspecting = new AbortController();
  #model;
  #meter;

  /**
   * @param {string} model its name
   * @param {import("./meter.js").Meter} meter
   */
  constructor(model, meter) {
    this.#model = model;
    this.#meter = meter;
  }

  /** Whether a text is being written; the whole page can see it, and whether it is being inspected. */
  get busy() {
    return document.body.dataset.state === "writing";
  }

  /** Ends the text that is being written; what came stays. */
  stop() {
    this.#stopping.abort();
  }

  /**
   * One text from request to last token. `draw(continuation, from)` is called at most once per frame.
   * @returns {Promise<{continuation: Continuation, failure: Error | null}>}
   */
  async write(path, request, read, draw) {
    this.#inspecting.abort();
    tell("writing");
    this.#stopping = new AbortController();
    const continuation = new Continuation();
    const frames = new Frames((from) => {
      draw(continuation, from);
      this.#meter.draw();
    });
    let [ended, failure] = [null, null];
    this.#meter.start(request.seed);
    try {
      const body = { model: this.#model, ...request, return_token_ids: true };
      for await (const chunk of streamChunks(path, body, this.#stopping.signal)) {
        const news = read(chunk);
        if (!news) continue;
        frames.ask(continuation.add(news));
        this.#meter.count(news.tokens.length, continuation.used);
      }
      ended = continuation.finish;
    } catch (error) {
      failure = error.name === "AbortError" ? null : error;
      this.stop(); // also of an answer that is not wanted
      ended = !failure ? "stopped" : continuation.tokens.length ? "broken" : "refused";
    }
    tell("ready");
    frames.finish();
    this.#meter.finish(ended);
    return { continuation, failure };
  }

  /**
   * Asks for the experts of a text, and for the alternatives with their ids.
   * @param {number[]} ids all of the text
   * @returns {Promise<object[] | null>} null if another text was begun in the meantime
   */
  async inspect(ids) {
    this.#inspecting.abort();
    const { signal } = (this.#inspecting = new AbortController());
    tell("inspecting");
    try {
      return await inspect(this.#model, ids, signal);
    } catch (error) {
      if (error.name === "AbortError") return null;
      throw error;
    } finally {
      if (!signal.aborted) tell("ready");
    }
  }
}

function tell(state) {
  document.body.dataset.state = state;
}

/** What an inspection says of a token; the text that it added here stays as it is. */
export function insight({ id, text: name, logprob, alternatives, experts }) {
  return { id, name, logprob, alternatives, experts };
}

/** Gathers changes so that each frame draws once. */
class Frames {
  #draw;
  #from = Infinity;
  #frame = 0;

  constructor(draw) {
    this.#draw = draw;
  }

  ask(from) {
    this.#from = Math.min(this.#from, from);
    this.#frame ||= requestAnimationFrame(() => this.finish());
  }

  finish() {
    cancelAnimationFrame(this.#frame);
    if (this.#from < Infinity) this.#draw(this.#from);
    [this.#from, this.#frame] = [Infinity, 0];
  }
}
