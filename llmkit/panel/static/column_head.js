// The heading of a column. It names the whole column, too, for those who hear the page: a box cannot carry a name.

export default {
  render({ model, el }) {
    const title = document.createElement("h3");
    title.className = "llmkit-column-title";
    title.id = `llmkit-column-${Math.random().toString(36).slice(2)}`;
    title.textContent = model.get("text");
    el.append(title);
    let frame = 0;
    const name = () => {
      const column = el.closest(".llmkit-column");
      if (!column) {
        frame = requestAnimationFrame(name); // the boxes around it are not there yet
        return;
      }
      column.setAttribute("role", "region");
      column.setAttribute("aria-labelledby", title.id);
    };
    name();
    return () => cancelAnimationFrame(frame);
  },
};
