/**
 * The data of each server-sent event of a response body, however the network cut the bytes.
 * @param {ReadableStream<Uint8Array>} body
 * @returns {AsyncGenerator<string>} comments and other fields are left out, as is an event that never ended
 */
export async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const events = (held + value).split(/\r?\n\r?\n|\r\r/);
      held = events.pop();
      for (const event of events) {
        const data = dataOf(event);
        if (data !== null) yield data;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // also when the reader of the events leaves early
  }
}

function dataOf(event) {
  const lines = event.split(/\r?\n|\r/).filter((line) => line.startsWith("data:"));
  return lines.length ? lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n") : null;
}
