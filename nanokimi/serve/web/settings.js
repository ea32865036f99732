import { byId, make } from "./dom.js";
import { recall, remember } from "./store.js";

const SLIDERS = [
  { name: "temperature", label: "Temperature", hint: "0: the likeliest", min: 0, max: 2, step: 0.05, usual: 1 },
  { name: "top_p", label: "Top p", hint: "1: off", min: 0, max: 1, step: 0.01, usual: 0.9 },
  { name: "top_k", label: "Top k", hint: "0: off", min: 0, max: 100, step: 1, usual: 0 },
  { name: "min_p", label: "Min p", hint: "0: off", min: 0, max: 1, step: 0.01, usual: 0 },
  { name: "max_tokens", label: "Max tokens", hint: "at a time", min: 1, max: 100, step: 1, usual: 100 },
];
const TEXTS = ["seed", "stop", "system"];

/** What the user chose about sampling; kept in the browser. */
export class Settings {
  #fields = new Map();

  /** @param {number} context most tokens of a text */
  constructor(context) {
    for (const slider of SLIDERS) {
      const bounded = slider.name === "max_tokens" ? { ...slider, max: context } : slider;
      this.#fields.set(slider.name, addSlider(bounded, () => this.#keep()));
    }
    for (const name of TEXTS) {
      const field = byId(name);
      field.addEventListener("input", () => this.#keep());
      this.#fields.set(name, { get: () => field.value, set: (value) => (field.value = value), usual: "" });
    }
    byId("reset").addEventListener("click", () => this.#set({}));
    this.#set(kept());
  }

  /** The system message; "" for none. */
  get system() {
    return this.#fields.get("system").get();
  }

  /** The fields of a request. Without a seed of the user's a new one is drawn, to be told and used again. */
  request() {
    const numbers = Object.fromEntries(SLIDERS.map(({ name }) => [name, this.#fields.get(name).get()]));
    const seed = this.#fields.get("seed").get().trim();
    const stop = this.#fields.get("stop").get().split("\n").filter(Boolean);
    return {
      ...numbers,
      seed: /^\d+$/.test(seed) ? Number(seed) : Math.floor(Math.random() * 2 ** 31),
      ...(stop.length && { stop: stop.map((line) => line.replaceAll("\\n", "\n").replaceAll("\\t", "\t")) }),
    };
  }

  #set(values) {
    for (const [name, field] of this.#fields) field.set(values[name] ?? field.usual);
    this.#keep();
  }

  #keep() {
    const values = Object.fromEntries([...this.#fields].map(([name, field]) => [name, field.get()]));
    remember("settings", JSON.stringify(values));
  }
}

function kept() {
  try {
    return JSON.parse(recall("settings")) ?? {};
  } catch {
    return {};
  }
}

/** A slider and a number that follow each other. */
function addSlider({ name, label, hint, min, max, step, usual }, changed) {
  const slider = make("input", { type: "range", id: `${name}-slider`, min, max, step });
  const number = make("input", { type: "number", id: name, min, max: name === "top_k" ? "" : max, step: "any" });
  slider.setAttribute("aria-label", label);
  const set = (value) => {
    const highest = name === "top_k" ? Infinity : max;
    const whole = step === 1 ? Math.round(value) : Number(value);
    number.value = slider.value = Number.isFinite(whole) ? Math.min(highest, Math.max(min, whole)) : usual;
  };
  const follow = (source, event, settle) =>
    source.addEventListener(event, () => {
      settle(source.value);
      changed();
    });
  follow(slider, "input", set);
  follow(number, "change", (value) => set(value === "" ? NaN : value));
  const caption = make("label", { htmlFor: name }, label, " ", make("small", {}, hint));
  byId("sliders").append(make("div", { className: "setting slider" }, caption, slider, number));
  return { get: () => Number(number.value), set, usual: Math.min(usual, max) };
}
