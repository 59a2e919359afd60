// A field for a key. What is typed stays in this page; it goes to the kernel in one message when that asks for it,
// and is gone from the page when that says so: a key that is refused need not be typed again. It is never part of
// the widget's state, which notebooks save. Whether there is anything the kernel is told, and no more.

export default () => {
  const inputs = new Set();
  let typed = "";

  const fill = (value) => {
    typed = value;
    for (const input of inputs) if (input.value !== value) input.value = value;
  };

  return {
    initialize({ model }) {
      model.on("msg:custom", (message) => {
        if (message.type === "collect") model.send({ type: "key", request: message.request, value: typed });
        if (message.type === "forget") fill("");
      });
      model.on("change:placeholder", () => {
        for (const input of inputs) input.placeholder = model.get("placeholder");
      });
    },
    render({ model, el }) {
      const id = `llmkit-key-${Math.random().toString(36).slice(2)}`;
      const label = document.createElement("label");
      label.className = "widget-label";
      label.htmlFor = id;
      label.textContent = model.get("label");
      const input = document.createElement("input");
      Object.assign(input, { id, type: "password", placeholder: model.get("placeholder"), value: typed });
      input.setAttribute("autocomplete", "new-password"); // no browser offers to keep it
      input.spellcheck = false;
      input.addEventListener("input", () => {
        const before = typed;
        fill(input.value);
        if (Boolean(before) !== Boolean(typed)) model.send({ type: "typed", any: Boolean(typed) });
      });
      // JupyterLab's shortcuts have no business in here.
      input.addEventListener("keydown", (event) => event.stopPropagation());
      inputs.add(input);
      el.classList.add("llmkit-key-field");
      el.append(label, input);
      return () => inputs.delete(input);
    },
  };
};
