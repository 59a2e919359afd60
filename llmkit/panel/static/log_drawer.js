// An engine's log. The kernel sends new lines by messages, none is synchronised state. They reach the page as text
// nodes alone, and no more of them than the kernel keeps.

const NEAR_THE_END = 40; // pixels from the end that still count as reading along
const COPIED_MS = 1500;

// Called once for a widget; all its views share what is in here.
export default () => {
  let lines = [];
  let note = "";
  const views = new Set();

  const draw = (view, fresh) => {
    const { box, text } = view;
    const reading = box.scrollHeight - box.scrollTop - box.clientHeight < NEAR_THE_END;
    text.append(...fresh.map((line) => document.createTextNode(line + "\n")));
    const height = box.scrollHeight;
    while (text.childNodes.length > lines.length) text.firstChild.remove();
    if (reading) box.scrollTop = box.scrollHeight;
    else box.scrollTop -= height - box.scrollHeight; // what is being read stays where it is
    view.note.textContent = note;
    view.copy.disabled = lines.length === 0;
  };

  const receive = (model, message) => {
    if (message.type === "all") {
      ({ lines, note } = message);
      for (const view of views) {
        view.text.replaceChildren();
        view.box.scrollTop = view.box.scrollHeight;
        draw(view, lines);
      }
    } else if (message.type === "append") {
      lines = lines.concat(message.lines).slice(-model.get("kept"));
      note = "";
      for (const view of views) draw(view, message.lines);
    } else if (message.type === "note") {
      note = message.note;
      for (const view of views) draw(view, []);
    }
  };

  return {
    initialize({ model }) {
      model.on("msg:custom", (message) => receive(model, message));
      model.send({ type: "hello" }); // after a reload of the page the kernel still knows everything
    },
    render({ model, el }) {
      const root = element("div", "llmkit-log");
      const box = element("div", "llmkit-log-box");
      const view = {
        box,
        text: element("div", "llmkit-log-text"),
        note: element("div", "llmkit-log-note"),
        copy: element("button", "llmkit-log-copy", "Copy"),
      };
      box.tabIndex = 0;
      box.setAttribute("role", "log");
      box.setAttribute("aria-live", "off"); // else every line would be read aloud
      box.setAttribute("aria-label", model.get("label"));
      view.note.setAttribute("role", "status");
      view.copy.type = "button";
      view.copy.setAttribute("aria-label", `Copy the ${model.get("label").replace(/^L/, "l")}`);
      let timer = 0;
      const say = (text) => {
        view.copy.textContent = text;
        clearTimeout(timer);
        timer = setTimeout(() => (view.copy.textContent = "Copy"), COPIED_MS);
      };
      view.copy.addEventListener("click", () => {
        toClipboard(lines.join("\n")).then((copied) => say(copied ? "Copied" : "Not copied"));
      });
      // Keys that scroll are for this box alone: the notebook would leave it.
      box.addEventListener("keydown", (event) => {
        if (/^(Arrow|Page|Home|End)/.test(event.key)) event.stopPropagation();
      });
      box.append(view.text);
      const foot = element("div", "llmkit-log-foot");
      foot.append(view.note, view.copy);
      root.append(box, foot);
      el.append(root);
      views.add(view);
      draw(view, lines);
      // The box has a height only once it is in the page.
      requestAnimationFrame(() => (box.scrollTop = box.scrollHeight));
      return () => {
        clearTimeout(timer);
        views.delete(view);
      };
    },
  };
};
