/**
 * What the browser keeps. Storage may be forbidden or full: then nothing is kept, and nothing fails.
 * `settings` outlive the window; `session` holds what was written in one window and outlives a reload.
 */
export const settings = memory(() => localStorage);
export const session = memory(() => sessionStorage);

function memory(storage) {
  return {
    /** What was kept under `name`; null if there is nothing that can be read. */
    recall(name) {
      try {
        return JSON.parse(storage().getItem(`nanokimi.${name}`));
      } catch {
        return null;
      }
    },
    /** Keeps the first of `values` for which there is room. */
    remember(name, ...values) {
      for (const value of values) {
        try {
          storage().setItem(`nanokimi.${name}`, JSON.stringify(value));
          return;
        } catch {
          // the next one is smaller
        }
      }
    },
  };
}
