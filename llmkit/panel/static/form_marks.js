// ipywidgets has no words for these: which text explains a field, whether a field is wrong, whether a fold is open.
// They are read off the page and said to screen readers.

let number = 0;

const set = (element, name, value) => {
  if (value === null) element.removeAttribute(name);
  else if (element.getAttribute(name) !== value) element.setAttribute(name, value);
};

const mark = (root) => {
  for (const field of root.querySelectorAll(".llmkit-field")) {
    const control = field.querySelector("input, select, textarea");
    if (!control) continue;
    const texts = [...field.querySelectorAll(":scope > .llmkit-html > .widget-html-content")];
    for (const text of texts) text.id ||= `llmkit-text-${++number}`;
    const told = texts.filter((text) => text.childElementCount).map((text) => text.id);
    set(control, "aria-describedby", told.join(" ") || null);
    set(control, "aria-invalid", field.querySelector(":scope > .llmkit-wrong") ? "true" : null);
  }
  for (const fold of root.querySelectorAll(".llmkit-fold")) {
    set(fold, "aria-expanded", String(fold.classList.contains("llmkit-open")));
  }
};

export default {
  render({ el }) {
    let frame = 0;
    let observer = null;
    const soon = (work) => {
      cancelAnimationFrame(frame);
      frame = requestAnimationFrame(work);
    };
    el.classList.add("llmkit-hidden");
    // The widgets around this one are put into the page after it.
    soon(() => {
      const root = el.closest(".llmkit-tab");
      if (!root) return;
      observer = new MutationObserver(() => soon(() => mark(root)));
      observer.observe(root, { subtree: true, childList: true, attributes: true, attributeFilter: ["class"] });
      mark(root);
    });
    return () => {
      cancelAnimationFrame(frame);
      observer?.disconnect();
    };
  },
};
