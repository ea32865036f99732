/** Browser storage that may be forbidden: then nothing is kept, and nothing fails. */

export function recall(name) {
  try {
    return localStorage.getItem(`nanokimi.${name}`);
  } catch {
    return null;
  }
}

export function remember(name, value) {
  try {
    localStorage.setItem(`nanokimi.${name}`, value);
  } catch {
    // a full or forbidden storage only costs the memory of it
  }
}
