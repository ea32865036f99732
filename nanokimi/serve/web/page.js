import { explain, servedModel } from "./api.js";
import { ChatTab } from "./chat_tab.js";
import { byId, make } from "./dom.js";
import { Meter } from "./meter.js";
import { Panel } from "./panel.js";
import { Settings } from "./settings.js";
import { session, settings as memory } from "./store.js";
import { TextTab } from "./text_tab.js";
import { Writer } from "./writer.js";

const SURPRISES = ["50 % or more", "20 % or more", "5 % or more", "1 % or more", "0.1 % or more", "less than 0.1 %"];

const RETRY = 2000; // milliseconds between two attempts to reach the server
const narrow = matchMedia("(max-width: 56rem)");

/** The one line that says what went wrong. */
const problems = {
  show(error, hint = "") {
    byId("error").textContent = `${explain(error)} ${hint}`;
    byId("error").hidden = false;
  },
  clear() {
    byId("error").hidden = true;
  },
};

/** Does `change`; a reader who is at the end of what scrolls stays there. */
function follow(change) {
  const scroller = narrow.matches ? document.documentElement : document.querySelector("main");
  const atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
  change();
  if (atEnd) scroller.scrollTop = scroller.scrollHeight;
}

/** The model, once the server can be reached; until then the page says why it is not. */
async function awaitModel() {
  for (;;) {
    try {
      const model = await servedModel();
      problems.clear();
      return model;
    } catch (error) {
      problems.show(error);
      await new Promise((done) => setTimeout(done, RETRY));
    }
  }
}

async function start() {
  const model = await awaitModel();
  introduce(model);
  const meter = new Meter(model.max_model_len);
  const writer = new Writer(model.id, meter);
  const panel = new Panel(model.n_routed_experts);
  const settings = new Settings(model.max_model_len);
  const page = { writer, meter, panel, problems, follow, settings, look: (ids) => look(writer, ids) };
  page.context = model.max_model_len;
  const text = new TextTab(page);
  const tabs = model.chat ? [text, new ChatTab(page)] : [text];
  panel.branches = (view) => text.owns(view);
  panel.branch = (view, index, other) => text.branch(index, other);
  listen(writer, panel);
  openTabs(model.chat, () => writer.stop());
  meter.used = session.recall("used") ?? 0;
  addEventListener("pagehide", () => {
    for (const tab of tabs) tab.keep();
    session.remember("used", meter.used);
  });
}

/** Inspects a text. Null if that failed, which is then told, or is not wanted any more. */
async function look(writer, ids) {
  try {
    return await writer.inspect(ids);
  } catch (error) {
    if (byId("error").hidden) problems.show(error); // else it is told already
    return null;
  }
}

function listen(writer, panel) {
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if (writer.busy) writer.stop();
    else panel.release();
  });
  document.addEventListener("focusin", (event) => {
    if (narrow.matches && event.target.matches("textarea")) panel.release(); // it would lie over what is written
  });
}

function introduce({ id, max_model_len: context, chat }) {
  document.title = `${id} · nanokimi`;
  const does = chat ? "talks in turns" : "continues text";
  const holds = `context of ${context.toLocaleString("en")} tokens`;
  byId("model").replaceChildren(make("strong", {}, id), ` ${does} · ${holds}`);
}

/** Text, or chat where the model can; `left` is called when the other one is chosen. */
function openTabs(chat, left) {
  byId("modes").hidden = !chat;
  byId("system-setting").hidden = !chat;
  const first = chat ? (session.recall("mode") ?? "chat") : "text";
  const open = (mode) => {
    byId("text-tab").hidden = mode !== "text";
    byId("chat-tab").hidden = mode !== "chat";
    session.remember("mode", mode);
  };
  for (const radio of document.getElementsByName("mode")) {
    radio.checked = radio.value === first;
    radio.addEventListener("change", () => {
      left();
      open(radio.value);
    });
  }
  open(first);
  const writes = byId(first === "chat" ? "message" : "prompt");
  if (matchMedia("(hover: hover)").matches) writes.focus(); // else a phone's keyboard would cover half the page
}

function colourBySurprise() {
  const box = byId("surprise");
  const swatches = SURPRISES.map((title, i) => make("span", { className: `swatch surprise-${i}`, title }));
  byId("legend").replaceChildren("likely", ...swatches, "surprising");
  const show = () => {
    document.body.classList.toggle("surprised", box.checked);
    byId("legend").hidden = !box.checked;
    memory.remember("surprise", box.checked);
  };
  box.checked = memory.recall("surprise") === true;
  box.addEventListener("change", show);
  show();
}

/** What a narrow window folds away; a wide one shows it. */
function fold() {
  for (const id of ["sampling", "panel-more"]) byId(id).open = !narrow.matches;
}

narrow.addEventListener("change", fold);
fold();
colourBySurprise();
start();
