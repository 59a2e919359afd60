// What the widgets' modules have in common; it stands before each of them.

const element = (tag, name = "", text = "") => {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text) made.textContent = text;
  return made;
};

// Says whether the text is on the clipboard.
const toClipboard = async (text) => {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Browsers give pages without https no clipboard, but they let them copy what is marked.
    const focused = document.activeElement;
    const area = element("textarea", "llmkit-clipboard");
    area.value = text;
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    focused?.focus?.({ preventScroll: true });
    return copied;
  }
};
