import { chatReader, newToken } from "./continuation.js";
import { byId, make } from "./dom.js";
import { session } from "./store.js";
import { TokenText } from "./token_text.js";
import { insight } from "./writer.js";

/** The tab that talks in turns. */
export class ChatTab {
  #page;
  #messages = []; // {role, content} as the server wants them, each with its element and, of a reply, its tokens

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
    this.#restore();
    this.#buttons();
  }

  /** Keeps the talk and what is being written for a reload: without its tokens if they are too many. */
  keep() {
    const draft = byId("message").value;
    const talk = this.#messages.map(({ role, content, tokens }) => ({ role, content, tokens }));
    const bare = talk.map(({ role, content }) => ({ role, content, tokens: [] }));
    session.remember("chat", { draft, talk }, { draft, talk: bare });
  }

  #restore() {
    const { draft, talk } = session.recall("chat") ?? { draft: "", talk: [] };
    byId("message").value = draft;
    for (const { role, content, tokens } of talk) {
      if (role === "user") {
        this.#ask(content);
        continue;
      }
      const { message, view } = this.#answer();
      Object.assign(message, { content, tokens });
      view.draw(tokens, { loose: tokens.length ? "" : content });
    }
  }

  #key(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!this.#page.writer.busy) this.#send();
  }

  #send() {
    const content = byId("message").value.trim();
    if (!content || !this.#page.settings.ready()) return undefined;
    byId("message").value = "";
    this.#ask(content);
    return this.#reply();
  }

  #regenerate() {
    if (!this.#page.settings.ready()) return undefined;
    const before = this.#messages.at(-1).role === "assistant" ? this.#drop() : null;
    return this.#reply(before);
  }

  /** Undoes what brought no answer: the reply that was there `before` stands again, or the message is to be sent anew. */
  #takeBack(before) {
    if (before) {
      this.#put(before);
      return;
    }
    const box = byId("message"); // in which the next message may have been begun
    box.value = [this.#drop().content, box.value].filter(Boolean).join("\n");
    box.focus();
  }

  #clear() {
    while (this.#messages.length) this.#drop();
    this.#page.panel.release();
    this.#page.meter.clear();
    this.#page.problems.clear();
    this.#buttons();
    this.keep();
    byId("message").focus();
  }

  #drop() {
    const message = this.#messages.pop();
    message.element.remove();
    this.#page.panel.release();
    return message;
  }

  #put(message) {
    this.#messages.push(message);
    this.#page.follow(() => byId("messages").append(message.element));
    return message;
  }

  #add(role, name, body) {
    const element = make("article", { className: `message ${role}` }, make("h2", {}, name), body);
    return this.#put({ role, content: "", tokens: [], element });
  }

  #ask(content) {
    const body = make("div", { className: "said", dir: "auto", textContent: content });
    this.#add("user", "You", body).content = content;
  }

  /** Room for a reply. */
  #answer() {
    const body = make("div", { className: "tokens said", dir: "auto", tabIndex: 0 });
    body.setAttribute("role", "group");
    body.setAttribute("aria-label", "Reply, token by token");
    body.setAttribute("aria-describedby", "walk-hint");
    const view = new TokenText(body, this.#page.panel);
    return { message: this.#add("assistant", "Model", body), view };
  }

  async #reply(before = null) {
    const { writer, settings, problems, panel } = this.#page;
    const request = { messages: this.#history(), logprobs: true, top_logprobs: 5, ...settings.request() };
    const { message, view } = this.#answer();
    problems.clear();
    const writing = writer.write("/v1/chat/completions", request, chatReader(), ({ tokens, text }, from) => {
      Object.assign(message, { content: text, tokens });
      this.#page.follow(() => view.draw(tokens, { from }));
      panel.refresh(view, from);
    });
    this.#buttons();
    const { continuation, failure } = await writing;
    const begun = continuation.text || continuation.finish; // a model may well end without a word
    if (!begun) {
      this.#drop();
      this.#takeBack(before);
    }
    this.#buttons();
    this.keep();
    if (failure) problems.show(failure, failure.status === 400 ? "Change your message, or Clear for a new talk." : "");
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
    const body = make("div", { className: "tokens", dir: "auto", tabIndex: 0 });
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
