// A field for a key. What is typed stays in this page until the kernel asks for it, goes to it in one message, and
// is gone from the page. It is never part of the widget's state, which notebooks save.

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
        if (message.type !== "collect") return;
        const value = typed;
        fill("");
        model.send({ type: "key", request: message.request, value });
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
      input.addEventListener("input", () => fill(input.value));
      // JupyterLab's shortcuts have no business in here.
      input.addEventListener("keydown", (event) => event.stopPropagation());
      inputs.add(input);
      el.classList.add("llmkit-key-field");
      el.append(label, input);
      return () => inputs.delete(input);
    },
  };
};
