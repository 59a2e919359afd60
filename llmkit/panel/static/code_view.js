// What an action is as code, in a fold. The kernel sends it only while the fold is open. Code reaches the page as text
// nodes alone. Of long code the page has the beginning; to be copied, the whole is asked for.

const LANGUAGES = { python: "Python", curl: "curl" };
const SAID_MS = 2000;

const button = (name, text, click) => {
  const made = element("button", name, text);
  made.type = "button";
  made.addEventListener("click", click);
  return made;
};

// Called once for a widget; all its views share what is in here.
export default () => {
  let items = [];
  let language = "python";
  let requests = 0;
  const waiting = new Map();
  const views = new Set();

  const whole = (model, number) => {
    const item = items[number];
    if (item[language].length >= item.characters[language]) return item[language];
    requests += 1;
    model.send({ type: "whole", request: requests, item: number, language });
    return new Promise((resolve) => waiting.set(requests, resolve));
  };

  const makeItem = (view, number) => {
    const nodes = {
      root: element("section", "llmkit-source-item"),
      title: element("span", "llmkit-source-title"),
      text: element("pre", "llmkit-source-text"),
      cut: element("div", "llmkit-hint"),
    };
    nodes.copy = button("llmkit-source-button llmkit-source-copy", "Copy", async () => {
      const copied = await toClipboard(await whole(view.model, number));
      nodes.copy.textContent = copied ? "Copied" : "Copy";
      view.said.textContent = copied ? "Copied." : "The browser does not let this page copy. Mark the code and press Ctrl+C.";
      clearTimeout(nodes.timer);
      nodes.timer = setTimeout(() => {
        nodes.copy.textContent = "Copy";
        view.said.textContent = "";
      }, copied ? SAID_MS : 4 * SAID_MS);
    });
    nodes.text.tabIndex = 0; // so that keys can scroll it
    const head = element("div", "llmkit-source-head");
    head.append(nodes.title, nodes.copy);
    nodes.root.append(head, nodes.text, nodes.cut);
    return nodes;
  };

  const drawItem = (nodes, item) => {
    const name = `${item.title}: ${LANGUAGES[language]}`;
    nodes.root.setAttribute("aria-label", name);
    nodes.text.setAttribute("aria-label", name);
    nodes.copy.setAttribute("aria-label", `Copy ${name}`);
    nodes.title.textContent = item.title;
    // What is equal stays, and with it what a person has marked.
    if (nodes.text.textContent !== item[language]) nodes.text.textContent = item[language];
    const characters = item.characters[language];
    const isCut = item[language].length < characters;
    nodes.cut.textContent = isCut ? `Only the beginning is shown; Copy gives all ${characters.toLocaleString()} characters.` : "";
  };

  const draw = (view) => {
    const open = view.model.get("unfolded");
    view.fold.setAttribute("aria-expanded", String(open));
    view.body.hidden = !open;
    for (const [name, choice] of Object.entries(view.choices)) choice.setAttribute("aria-pressed", String(name === language));
    while (view.items.length > items.length) view.items.pop().root.remove();
    while (view.items.length < items.length) {
      view.items.push(makeItem(view, view.items.length));
      view.list.append(view.items.at(-1).root);
    }
    items.forEach((item, number) => drawItem(view.items[number], item));
    view.empty.hidden = items.length > 0;
  };

  return {
    initialize({ model }) {
      model.on("msg:custom", (message) => {
        if (message.type === "code") {
          items = message.items;
          views.forEach(draw);
        } else if (message.type === "whole") {
          waiting.get(message.request)?.(message.text);
          waiting.delete(message.request);
        }
      });
      model.on("change:unfolded", () => views.forEach(draw));
      model.send({ type: "hello" });
    },
    render({ model, el }) {
      const id = `llmkit-source-${Math.random().toString(36).slice(2)}`;
      const view = {
        model,
        items: [],
        choices: {},
        body: element("div", "llmkit-source-body"),
        list: element("div", "llmkit-source-list"),
        empty: element("div", "llmkit-hint", "There is nothing to show yet."),
        said: element("div", "llmkit-hint llmkit-source-said"),
      };
      view.fold = button("llmkit-source-fold", "Show as code", () => {
        model.set("unfolded", !model.get("unfolded"));
        model.save_changes();
      });
      view.fold.setAttribute("aria-controls", id);
      view.body.id = id;
      view.said.setAttribute("role", "status");
      const choose = element("div", "llmkit-source-languages");
      choose.setAttribute("role", "group");
      choose.setAttribute("aria-label", "Language");
      for (const [name, label] of Object.entries(LANGUAGES)) {
        view.choices[name] = button("llmkit-source-button", label, () => {
          language = name;
          views.forEach(draw);
        });
        choose.append(view.choices[name]);
      }
      view.body.append(choose, view.empty, view.list, view.said);
      el.classList.add("llmkit-source");
      el.dataset.lmSuppressShortcuts = "true"; // Enter presses a button here; it does not open a cell
      el.append(view.fold, view.body);
      views.add(view);
      draw(view);
      return () => views.delete(view);
    },
  };
};
