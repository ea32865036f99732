import { chatReader, newToken } from "./continuation.js";
import { byId, make } from "./dom.js";
import { TokenText } from "./token_text.js";
import { insight } from "./writer.js";

/** The tab that talks in turns. */
export class ChatTab {
  #page;
  #messages = []; // {role, content} as the server wants them, each with its element

  /** @param {object} page what the tabs share: writer, settings, panel, problems, follow */
  constructor(page) {
    this.#page = page;
    byId("chat-form").addEventListener("submit", (event) => {
      event.preventDefault();
      if (page.writer.busy) page.writer.stop();
      else this.#send();
    });
    byId("message").addEventListener("keydown", (event) => this.#key(event));
    byId("chat-regenerate").addEventListener("click", () => this.#regenerate());
    byId("chat-clear").addEventListener("click", () => this.#clear());
    this.#buttons();
  }

  #key(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!this.#page.writer.busy) this.#send();
  }

  #send() {
    const content = byId("message").value.trim();
    if (!content) return undefined;
    byId("message").value = "";
    const body = make("div", { className: "said", textContent: content });
    this.#add("user", "You", body).content = content;
    return this.#reply();
  }

  #regenerate() {
    if (this.#messages.at(-1).role === "assistant") this.#drop();
    return this.#reply();
  }

  #clear() {
    while (this.#messages.length) this.#drop();
    this.#page.panel.release();
    this.#page.meter.clear();
    this.#buttons();
    byId("message").focus();
  }

  #drop() {
    this.#messages.pop().element.remove();
    this.#page.panel.release();
  }

  #add(role, name, ...body) {
    const element = make("article", { className: `message ${role}` }, make("h2", {}, name), ...body);
    const message = { role, content: "", element };
    this.#messages.push(message);
    this.#page.follow(() => byId("messages").append(element));
    return message;
  }

  async #reply() {
    const { writer, settings, problems, panel } = this.#page;
    const request = { messages: this.#history(), logprobs: true, top_logprobs: 5, ...settings.request() };
    const body = make("div", { className: "tokens said", tabIndex: 0 });
    body.setAttribute("role", "group");
    body.setAttribute("aria-label", "Reply, token by token");
    body.setAttribute("aria-describedby", "walk-hint");
    const view = new TokenText(body, panel);
    const message = this.#add("assistant", "Model", body);
    problems.clear();
    const writing = writer.write("/v1/chat/completions", request, chatReader(), ({ tokens, text }, from) => {
      message.content = text;
      this.#page.follow(() => view.draw(tokens, { from }));
      panel.refresh(view, from);
    });
    this.#buttons();
    const { continuation, failure } = await writing;
    const begun = continuation.text || continuation.finish; // a model may well end without a word
    if (!begun) this.#drop();
    this.#buttons();
    if (failure) problems.show(failure, failure.status === 400 ? "Clear begins a new talk." : "");
    if (begun) await this.#inspect(continuation, view, message);
  }

  /** What the server is to read: the system message, if any, and the talk so far. */
  #history() {
    const talk = this.#messages.map(({ role, content }) => ({ role, content }));
    const system = this.#page.settings.system.trim();
    return system ? [{ role: "system", content: system }, ...talk] : talk;
  }

  async #inspect({ promptIds, tokens }, view, message) {
    if (!promptIds) return;
    const views = await this.#page.look([...promptIds, ...tokens.map(({ id }) => id)]);
    if (!views) return;
    tokens.forEach((token, i) => Object.assign(token, insight(views[promptIds.length + i])));
    view.draw(tokens);
    this.#page.panel.refresh(view);
    const read = views.slice(0, promptIds.length);
    const before = read.map((seen) => newToken({ text: seen.text, prompt: true, ...insight(seen) }));
    message.element.append(this.#readBefore(before));
  }

  /** The prompt as the chat template put it, folded under a line that opens it. */
  #readBefore(tokens) {
    const body = make("div", { className: "tokens", tabIndex: 0 });
    body.setAttribute("role", "group");
    body.setAttribute("aria-label", "What the model read, token by token");
    new TokenText(body, this.#page.panel).draw(tokens);
    const summary = make("summary", {}, `What the model read: ${tokens.length} tokens`);
    return make("details", { className: "read" }, summary, body);
  }

  #buttons() {
    const { busy } = this.#page.writer;
    byId("send").textContent = busy ? "Stop" : "Send";
    for (const id of ["chat-regenerate", "chat-clear"]) byId(id).disabled = busy || !this.#messages.length;
  }
}
