/**
 * @typedef {object} Token
 * @property {number} id
 * @property {string} text what it added to the text; "" if it is a part of a character or of a stop string
 * @property {string} [name] what the server calls it; also of one without a text of its own
 * @property {number | null} logprob natural logarithm, of the model's own distribution
 * @property {{id?: number, text: string, logprob: number}[]} alternatives likeliest first
 * @property {number[][] | null} experts of each MoE layer, null until the text was inspected
 * @property {boolean} prompt
 */

/** @returns {Token} */
export function newToken(fields) {
  return { text: "", logprob: null, alternatives: [], experts: null, prompt: false, ...fields };
}

/** What a stream has brought so far. A token's text reaches from its place to that of the next one. */
export class Continuation {
  tokens = [];
  promptIds = null;
  finish = null;
  #characters = []; // whole code points: offsets count them, not the two halves of an emoji
  #offsets = [];

  get text() {
    return this.#characters.join("");
  }

  /** How many places of the context it takes, prompt and all. */
  get used() {
    return (this.promptIds?.length ?? 0) + this.tokens.length;
  }

  /**
   * @param {{text: string, promptIds: number[] | null, finish: string | null, tokens: object[]}} news
   * @returns {number} the first token whose text is new
   */
  add({ text, promptIds, finish, tokens }) {
    const changed = Math.max(0, this.tokens.length - 1);
    this.promptIds ??= promptIds;
    this.finish ??= finish;
    this.#characters.push(...text);
    for (const { offset, ...token } of tokens) {
      this.tokens.push(newToken(token));
      this.#offsets.push(offset);
    }
    for (let i = changed; i < this.tokens.length; i++) {
      const start = i === 0 ? 0 : this.#offsets[i];
      this.tokens[i].text = this.#characters.slice(start, this.#offsets[i + 1]).join("");
    }
    return changed;
  }
}

/** Reads a chunk of /v1/completions; null if it holds no choice (the usage comes in such a one). */
export function completionNews(chunk) {
  const choice = chunk.choices[0];
  if (!choice) return null;
  const scores = choice.logprobs;
  const tokens = (choice.token_ids ?? []).map((id, i) => ({
    id,
    name: scores.tokens[i],
    offset: scores.text_offset[i],
    logprob: scores.token_logprobs[i],
    alternatives: Object.entries(scores.top_logprobs[i] ?? {})
      .map(([text, logprob]) => ({ text, logprob }))
      .sort((a, b) => b.logprob - a.logprob), // an object lists keys such as "1" first
  }));
  return { ...whole(chunk, choice), text: choice.text, tokens };
}

/** Reads the chunks of one answer of /v1/chat/completions, which gives bytes instead of places. */
export function chatReader() {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  let characters = 0;
  const placed = ({ token: name, bytes, logprob, top_logprobs }, id) => {
    const token = { id, name, offset: characters, logprob, alternatives: top_logprobs.map(alternative) };
    characters += [...decoder.decode(new Uint8Array(bytes), { stream: true })].length;
    return token;
  };
  return (chunk) => {
    const choice = chunk.choices[0];
    if (!choice) return null;
    const scores = choice.logprobs?.content ?? [];
    const tokens = (choice.token_ids ?? []).map((id, i) => placed(scores[i], id));
    return { ...whole(chunk, choice), text: choice.delta.content ?? "", tokens };
  };
}

function alternative({ token, logprob }) {
  return { text: token, logprob };
}

function whole(chunk, choice) {
  return {
    promptIds: choice.prompt_token_ids ?? chunk.prompt_token_ids ?? null,
    finish: choice.finish_reason ?? null,
  };
}

/**
 * Lays the pieces of a text's tokens along the text. Pieces that do not stand in it are parts of characters: they share
 * what lies up to the next piece that does.
 * @param {string} text
 * @param {string[]} pieces
 * @returns {string[]} as many as pieces; joined they are the text
 */
export function align(text, pieces) {
  const cut = [];
  let [at, broken] = [0, 0];
  for (const piece of pieces) {
    const found = piece ? text.indexOf(piece, at) : -1;
    if (found === at || (broken && found > at)) {
      cut.push(...share(text.slice(at, found), broken), piece);
      [at, broken] = [found + piece.length, 0];
    } else {
      broken++;
    }
  }
  return cut.concat(share(text.slice(at), broken));
}

/** Gives each character to the token of its last byte, or all to the last token if tokens are not bytes. */
function share(text, count) {
  const cut = Array(count).fill("");
  const characters = [...text];
  const sizes = characters.map((character) => new TextEncoder().encode(character).length);
  if (sizes.reduce((sum, size) => sum + size, 0) !== count) {
    if (count) cut[count - 1] = text;
    return cut;
  }
  let end = -1;
  characters.forEach((character, i) => (cut[(end += sizes[i])] = character));
  return cut;
}
