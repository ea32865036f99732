import { ServerError } from "./api.js";
import { chatReader, newToken } from "./continuation.js";
import { byId, make } from "./dom.js";
import { session } from "./store.js";
import { Talk } from "./talk.js";
import { TokenText } from "./token_text.js";
import { insight } from "./writer.js";

/** The tab that talks in turns. */
export class ChatTab {
  #page;
  #talk;
  #edge = make("p", { className: "edge" }, "left out from here up: the context is full");

  /** @param {object} page what the tabs share: context, writer, settings, panel, problems, follow */
  constructor(page) {
    this.#page = page;
    this.#talk = new Talk(page.context);
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
    const { messages, left } = this.#talk;
    const talk = messages.map(({ role, content, tokens, cost }) => ({ role, content, tokens, cost }));
    const bare = talk.map((message) => ({ ...message, tokens: [] }));
    session.remember("chat", { draft, left, talk }, { draft, left, talk: bare });
  }

  #restore() {
    const { draft = "", left = 0, talk = [] } = session.recall("chat") ?? {};
    byId("message").value = draft;
    for (const { role, content, tokens, cost } of talk) {
      if (role === "user") {
        this.#ask(content);
        continue;
      }
      const { message, view } = this.#answer();
      Object.assign(message, { content, tokens, cost });
      view.draw(tokens, { loose: tokens.length ? "" : content });
    }
    this.#leaveOut(left);
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
    const before = this.#talk.messages.at(-1).role === "assistant" ? this.#drop() : null;
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
    while (this.#talk.messages.length) this.#drop();
    this.#leaveOut(0);
    this.#page.panel.release();
    this.#page.meter.clear();
    this.#page.problems.clear();
    this.#buttons();
    this.keep();
    byId("message").focus();
  }

  #drop() {
    const message = this.#talk.messages.pop();
    message.element.remove();
    this.#page.panel.release();
    return message;
  }

  #put(message) {
    this.#talk.messages.push(message);
    this.#page.follow(() => byId("messages").append(message.element));
    return message;
  }

  #add(role, name, body) {
    const element = make("article", { className: `message ${role}` }, make("h2", {}, name), body);
    return this.#put({ role, content: "", tokens: [], cost: 0, element });
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
    const { problems } = this.#page;
    const leftBefore = this.#talk.left;
    const { message, view } = this.#answer();
    problems.clear();
    const { continuation, failure } = await this.#write(message, view);
    const begun = continuation.text || continuation.finish; // a model may well end without a word
    if (!begun) {
      this.#leaveOut(leftBefore);
      this.#drop();
      this.#takeBack(before);
    }
    this.#buttons();
    this.keep();
    if (failure) problems.show(failure, advice(failure));
    if (begun) await this.#inspect(continuation, view, message);
  }

  /** Has the reply written, without the oldest turns if all of them are too long. */
  async #write(message, view) {
    const { writer, settings, panel, follow } = this.#page;
    const talk = this.#talk;
    const request = { logprobs: true, top_logprobs: 5, ...settings.request() };
    const draw = ({ text, tokens, used }, from) => {
      Object.assign(message, { content: text, tokens, cost: used - talk.known });
      follow(() => view.draw(tokens, { from }));
      panel.refresh(view, from);
    };
    let tokens = talk.known;
    for (;;) {
      talk.fit(tokens, request.max_tokens);
      this.#leaveOut(talk.left);
      const read = within(talk.most(request.max_tokens), chatReader());
      const writing = writer.write("/v1/chat/completions", { ...request, messages: this.#history() }, read, draw);
      this.#buttons();
      const written = await writing;
      tokens = written.failure?.tokens;
      if (!tokens || !talk.hasOlder) return written;
    }
  }

  /** Leaves out the oldest `count` messages: they stay on the page, above a line that says so. */
  #leaveOut(count) {
    this.#talk.left = count;
    if (count) this.#talk.messages[count].element.before(this.#edge);
    else this.#edge.remove();
  }

  /** What the server is to read: the system message, if any, and the talk so far. */
  #history() {
    const talk = this.#talk.asked.map(({ role, content }) => ({ role, content }));
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
    this.#page.follow(() => message.element.append(this.#readBefore(before)));
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
    for (const id of ["chat-regenerate", "chat-clear"]) byId(id).disabled = busy || !this.#talk.messages.length;
  }
}

/** Reads chunks with `read`; a prompt of more than `most` tokens is refused, as one over the context is. */
function within(most, read) {
  return (chunk) => {
    const news = read(chunk);
    const tokens = news?.promptIds?.length ?? 0;
    if (tokens <= most) return news;
    throw new ServerError(`its ${tokens} tokens leave no room for a reply: write less`, { status: 400, tokens });
  };
}

/** What to do about a message that was refused, where the server does not say so. */
function advice({ status, tokens }) {
  return status === 400 && !tokens ? "Change your message, or Clear for a new talk." : "";
}
