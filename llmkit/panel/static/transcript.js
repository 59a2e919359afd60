// Prompts and their answers. The kernel sends only what is new; nothing of it is synchronised state, so an answer
// costs its own length once. Text reaches the page as text nodes alone: whatever a model says stays inert.

const NEAR_THE_END = 40; // pixels from the end that still count as reading along

const element = (tag, name, text) => {
  const made = document.createElement(tag);
  made.className = name;
  if (text) made.textContent = text;
  return made;
};

// Called once for a widget; all its views share what is in here.
export default () => {
  let turns = [];
  const views = new Set();

  const draw = (turn) => {
    const nodes = {
      root: element("div", "llmkit-turn"),
      question: element("div", "llmkit-question", turn.prompt),
      answer: element("div", "llmkit-answer"),
      text: document.createTextNode(turn.text),
      note: element("div", "llmkit-turn-note"),
    };
    nodes.answer.append(element("span", "llmkit-speaker", turn.model_id), nodes.text);
    nodes.root.append(nodes.question, nodes.answer, nodes.note);
    finish(nodes, turn);
    return nodes;
  };

  const finish = (nodes, turn) => {
    nodes.root.classList.toggle("llmkit-streaming", turn.state === "streaming");
    nodes.note.classList.toggle("llmkit-turn-error", turn.state === "failed");
    nodes.note.textContent = turn.note;
  };

  const follow = (view, change) => {
    const { box } = view;
    const reading = box.scrollHeight - box.scrollTop - box.clientHeight < NEAR_THE_END;
    change();
    if (reading) box.scrollTop = box.scrollHeight;
  };

  const redraw = (view) => {
    view.nodes = turns.map(draw);
    view.box.replaceChildren(...(turns.length ? view.nodes.map((nodes) => nodes.root) : [view.empty]));
    view.box.scrollTop = view.box.scrollHeight;
  };

  const receive = (message) => {
    const last = turns.at(-1);
    if (message.type === "all") {
      turns = message.turns;
      views.forEach(redraw);
    } else if (message.type === "begin") {
      turns.push(message.turn);
      for (const view of views) {
        view.empty.remove();
        view.nodes.push(draw(message.turn));
        view.box.append(view.nodes.at(-1).root);
        view.box.scrollTop = view.box.scrollHeight;
      }
    } else if (message.type === "append" && last) {
      last.text += message.text;
      for (const view of views) follow(view, () => view.nodes.at(-1).text.appendData(message.text));
    } else if (message.type === "end" && last) {
      Object.assign(last, { state: message.state, note: message.note });
      for (const view of views) follow(view, () => finish(view.nodes.at(-1), last));
    }
  };

  return {
    initialize({ model }) {
      model.on("msg:custom", receive);
      model.send({ type: "hello" }); // after a reload of the page the kernel still knows everything
    },
    render({ model, el }) {
      const box = element("div", "llmkit-transcript");
      box.tabIndex = 0;
      box.setAttribute("role", "log");
      box.setAttribute("aria-label", "Answers");
      el.append(box);
      const view = { box, nodes: [], empty: element("div", "llmkit-transcript-empty", model.get("placeholder")) };
      views.add(view);
      redraw(view);

      // Ctrl+Enter in the prompt sends it. The panel around this view is not in the page yet, so the page listens.
      const send = (event) => {
        if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
        const panel = event.target.closest?.(".llmkit-user-prompt")?.closest(".llmkit-panel");
        if (!panel?.contains(box)) return;
        event.preventDefault();
        event.stopPropagation();
        event.target.dispatchEvent(new Event("change", { bubbles: true })); // the kernel has to have the text first
        panel.querySelector(".llmkit-send")?.click();
      };
      document.addEventListener("keydown", send, true);
      return () => {
        views.delete(view);
        document.removeEventListener("keydown", send, true);
      };
    },
  };
};
