import { byId, make } from "./dom.js";
import { settings as memory } from "./store.js";

const SLIDERS = [
  { name: "temperature", label: "Temperature", hint: "0: the likeliest", min: 0, max: 2, step: 0.05, usual: 1 },
  { name: "top_p", label: "Top p", hint: "1: off", min: 0, max: 1, step: 0.01, usual: 0.9 },
  { name: "top_k", label: "Top k", hint: "0: off", min: 0, max: 100, most: 2 ** 31 - 1, step: 1, usual: 0 },
  { name: "min_p", label: "Min p", hint: "0: off", min: 0, max: 1, step: 0.01, usual: 0 },
  { name: "max_tokens", label: "Max tokens", hint: "at a time", min: 1, max: 100, step: 1, usual: 100 },
];
const MOST_STOPS = 16;
const LONGEST_STOP = 200; // characters
const TEXTS = {
  seed: (value) =>
    /^\d*$/.test(value.trim()) && Number(value) <= Number.MAX_SAFE_INTEGER
      ? ""
      : `A seed is a whole number from 0 to ${Number.MAX_SAFE_INTEGER}. Leave it empty for a new one each time.`,
  stop: (value) =>
    stops(value).length <= MOST_STOPS && stops(value).every((line) => [...line].length <= LONGEST_STOP)
      ? ""
      : `At most ${MOST_STOPS} stop strings, each of at most ${LONGEST_STOP} characters.`,
  system: () => "",
};

/** What the user chose about sampling; kept in the browser. What cannot be sent is said beside its field. */
export class Settings {
  #fields = new Map();

  /** @param {number} context most tokens of a text */
  constructor(context) {
    for (const slider of SLIDERS) {
      const bounded = slider.name === "max_tokens" ? { ...slider, max: context } : slider;
      this.#fields.set(slider.name, addSlider(bounded, () => this.#keep()));
    }
    for (const [name, check] of Object.entries(TEXTS)) this.#fields.set(name, textField(name, check, () => this.#keep()));
    byId("reset").addEventListener("click", () => this.#set({}));
    this.#set(memory.recall("settings") ?? {});
  }

  /** The system message; "" for none. */
  get system() {
    return this.#fields.get("system").get();
  }

  /** Whether all can be sent; if not, the first field that cannot is shown. */
  ready() {
    const wrong = [...this.#fields.keys()].find((name) => byId(name).ariaInvalid === "true");
    if (!wrong) return true;
    byId("sampling").open = true;
    byId(wrong).focus();
    return false;
  }

  /** The fields of a request. Without a seed of the user's a new one is drawn, to be told and used again. */
  request() {
    const numbers = Object.fromEntries(SLIDERS.map(({ name }) => [name, Number(this.#fields.get(name).get())]));
    const seed = this.#fields.get("seed").get().trim();
    const stop = stops(this.#fields.get("stop").get());
    return {
      ...numbers,
      seed: seed ? Number(seed) : Math.floor(Math.random() * 1e6), // short, to be typed again
      ...(stop.length && { stop }),
    };
  }

  #set(values) {
    for (const [name, field] of this.#fields) field.set(values[name] ?? field.usual);
    this.#keep();
  }

  #keep() {
    const values = [...this.#fields].map(([name, field]) => [name, field.get()]);
    memory.remember("settings", Object.fromEntries(values));
  }
}

/** The stop strings that stand one a line. */
function stops(value) {
  const lines = value.split("\n").filter(Boolean);
  return lines.map((line) => line.replaceAll("\\n", "\n").replaceAll("\\t", "\t"));
}

/** Says under `field` what is wrong with it; "": nothing is. */
function judge(field, fault) {
  field.ariaInvalid = fault ? "true" : "false";
  byId(`${field.id}-fault`).textContent = fault;
}

/** A line for what is wrong with the field `name`, which a screen reader reads with it. */
function faultLine(field) {
  field.setAttribute("aria-describedby", `${field.id}-fault`);
  return make("p", { id: `${field.id}-fault`, className: "fault", role: "alert" });
}

function textField(name, check, changed) {
  const field = byId(name);
  field.parentElement.append(faultLine(field));
  field.addEventListener("input", () => {
    judge(field, check(field.value));
    changed();
  });
  const set = (value) => {
    field.value = value;
    judge(field, check(field.value));
  };
  return { get: () => field.value, set, usual: "" };
}

/** A slider and a number that follow each other. */
function addSlider({ name, label, hint, min, max, most = max, step, usual }, changed) {
  const slider = make("input", { type: "range", id: `${name}-slider`, min, max, step });
  const number = make("input", { id: name, inputMode: "decimal", autocomplete: "off" });
  slider.setAttribute("aria-label", label);
  const typed = () => (number.value.trim() ? Number(number.value) : NaN);
  const possible = (value) => value >= min && value <= most && (step < 1 || Number.isInteger(value));
  const check = () => {
    const kind = step < 1 ? "A number" : "A whole number";
    judge(number, possible(typed()) ? "" : `${kind} from ${min} to ${most}.`);
    if (possible(typed())) slider.value = typed();
  };
  const set = (value) => {
    number.value = value;
    check();
  };
  slider.addEventListener("input", () => {
    set(slider.value);
    changed();
  });
  number.addEventListener("input", () => {
    check();
    changed();
  });
  const caption = make("label", { htmlFor: name }, label, " ", make("small", {}, hint));
  byId("sliders").append(make("div", { className: "setting slider" }, caption, slider, number, faultLine(number)));
  return { get: () => number.value.trim(), set, usual: Math.min(usual, max) };
}
