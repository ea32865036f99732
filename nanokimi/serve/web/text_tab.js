import { align, completionNews, newToken } from "./continuation.js";
import { byId } from "./dom.js";
import { session } from "./store.js";
import { TokenText } from "./token_text.js";
import { insight } from "./writer.js";

/** The tab that continues a prompt: token after token, from any place in any direction. */
export class TextTab {
  #page;
  #view;
  #prompt = { text: "", ids: null, tokens: null }; // ids and tokens as soon as the server tells them
  #written = [];
  #begin = 0; // how much was written before the last generation
  #inspection = Promise.resolve();

  /** @param {object} page what the tabs share: writer, settings, panel, problems, follow */
  constructor(page) {
    this.#page = page;
    this.#view = new TokenText(byId("text"), page.panel);
    byId("text-form").addEventListener("submit", (event) => {
      event.preventDefault();
      if (page.writer.busy) page.writer.stop();
      else this.#generate();
    });
    byId("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !page.writer.busy) this.#generate();
    });
    byId("text-regenerate").addEventListener("click", () => this.#regenerate());
    byId("text-continue").addEventListener("click", () => this.#continue());
    byId("text-clear").addEventListener("click", () => this.#clear());
    this.#restore();
    this.#buttons();
  }

  /** Keeps the text and what is being written for a reload: without its tokens if they are too many. */
  keep() {
    const draft = byId("prompt").value;
    const whole = { draft, prompt: this.#prompt, written: this.#written, begin: this.#begin };
    const text = this.#prompt.text + this.#written.map((token) => token.text).join("");
    session.remember("text", whole, { draft, prompt: { text, ids: null, tokens: null }, written: [], begin: 0 });
  }

  #restore() {
    const kept = session.recall("text");
    if (!kept) return;
    byId("prompt").value = kept.draft;
    [this.#prompt, this.#written, this.#begin] = [kept.prompt, kept.written, kept.begin];
    this.#draw();
    if (this.#prompt.ids && !this.#prompt.tokens) this.#inspection = this.#inspect(); // the reload came first
  }

  owns(view) {
    return view === this.#view;
  }

  /**
   * Puts `other` in the place of a token, leaves out what followed, and goes on from there.
   * @param {{id?: number, text: string}} other
   */
  async branch(index, other) {
    if (!this.#page.settings.ready()) return;
    const token = this.#view.tokens[index];
    this.#page.writer.stop();
    await this.#inspection; // only it tells the ids of alternatives
    const chosen = token.alternatives.find(({ id, text }) => id !== undefined && text === other.text);
    const at = this.#tokens().indexOf(token);
    if (!chosen || at < 0 || this.#page.writer.busy) return;
    const kept = this.#tokens().slice(0, at);
    if (token.prompt) this.#promptFrom(kept);
    this.#written = kept.filter(({ prompt }) => !prompt);
    this.#written.push(newToken({ ...chosen, alternatives: token.alternatives }));
    this.#page.panel.release();
    await this.#goOn();
  }

  #promptFrom(tokens) {
    this.#prompt = { text: tokens.map(({ text }) => text).join(""), ids: tokens.map(({ id }) => id), tokens };
  }

  #generate() {
    if (!this.#page.settings.ready()) return undefined;
    this.#prompt = { text: byId("prompt").value, ids: null, tokens: null };
    this.#written = [];
    this.#begin = 0;
    return this.#run();
  }

  #regenerate() {
    if (!this.#page.settings.ready()) return undefined;
    this.#written.length = this.#begin;
    return this.#run();
  }

  #continue() {
    if (!this.#page.settings.ready()) return undefined;
    while (this.#written.at(-1)?.text === "") this.#written.pop(); // a character cut off: written anew as a whole
    return this.#goOn();
  }

  #goOn() {
    this.#begin = this.#written.length;
    return this.#run();
  }

  #clear() {
    this.#prompt = { text: "", ids: null, tokens: null };
    this.#written = [];
    this.#page.panel.release();
    this.#page.meter.clear();
    this.#page.problems.clear();
    this.#draw();
    this.#buttons();
    this.keep();
    byId("prompt").focus();
  }

  async #run() {
    const { writer, settings, problems } = this.#page;
    const before = [...this.#written];
    const prompt = this.#prompt.ids ? this.#ids() : this.#prompt.text;
    const request = { prompt, logprobs: 5, ...settings.request() };
    problems.clear();
    this.#draw();
    const writing = writer.write("/v1/completions", request, completionNews, (continuation, from) => {
      this.#prompt.ids ??= continuation.promptIds;
      this.#written = [...before, ...continuation.tokens];
      this.#draw((this.#prompt.tokens?.length ?? 0) + before.length + from);
    });
    this.#inspection = writing.then(() => this.#inspect()); // what waits for it waits for the text too
    this.#buttons();
    const { failure } = await writing;
    this.#buttons();
    this.keep();
    if (failure) problems.show(failure);
  }

  async #inspect() {
    if (!this.#prompt.ids) return;
    const views = await this.#page.look(this.#ids());
    if (!views) return;
    const start = this.#prompt.ids.length;
    const pieces = align(this.#prompt.text, views.slice(0, start).map(({ text }) => text));
    this.#prompt.tokens ??= pieces.map((text) => newToken({ text, prompt: true }));
    this.#tokens().forEach((token, i) => Object.assign(token, insight(views[i])));
    this.#draw();
  }

  #ids() {
    return [...this.#prompt.ids, ...this.#written.map(({ id }) => id)];
  }

  #tokens() {
    return [...(this.#prompt.tokens ?? []), ...this.#written];
  }

  #draw(from = 0) {
    const loose = this.#prompt.tokens ? "" : this.#prompt.text;
    this.#page.follow(() => this.#view.draw(this.#tokens(), { loose, from }));
    this.#page.panel.refresh(this.#view, from);
  }

  #buttons() {
    const { busy } = this.#page.writer;
    const something = Boolean(this.#prompt.text || this.#written.length);
    byId("generate").textContent = busy ? "Stop" : "Generate";
    byId("text-regenerate").disabled = busy || !something;
    byId("text-continue").disabled = busy || !this.#prompt.ids;
    byId("text-clear").disabled = busy || !something;
  }
}
