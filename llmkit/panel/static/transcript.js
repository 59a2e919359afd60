// Prompts and their answers. The kernel sends only what is new; nothing of it is synchronised state, so an answer
// costs its own length once. What shows Markdown is in markdown.js, which is part of the same module.

const NEAR_THE_END = 40; // pixels from the end that still count as reading along
const PAINT_SHARE = 4; // the page rests this many times as long as painting took
const FRAME_MS = 12; // for one frame's painting, when there is much to catch up
const COPIED_MS = 1500;
const ASK_AGAIN_MS = 5000;

const length = (text) => {
  const count = text.match(/\S+/g)?.length ?? 0;
  return `${count} ${count === 1 ? "word" : "words"}`;
};
const ended = (turn) => turn.state !== "streaming";

const copyFrom = async (pressed, text) => {
  await toClipboard(text);
  const label = pressed.dataset.label ?? pressed.getAttribute("aria-label");
  const say = (shown, read) => {
    pressed.textContent = shown;
    pressed.setAttribute("aria-label", read);
  };
  pressed.dataset.label = label; // pressed twice, it still finds its way back
  say("Copied", "Copied");
  setTimeout(() => say("Copy", label), COPIED_MS);
};

const pretty = (value) => {
  try {
    return JSON.stringify(typeof value === "string" ? JSON.parse(value) : (value ?? {}), null, 2);
  } catch {
    return String(value); // as the model wrote it
  }
};

const toolCard = (call) => {
  const { name = "", arguments: values } = call?.function ?? call ?? {};
  const card = element("div", "llmkit-tool");
  const title = element("div", "llmkit-tool-name", "Calls ");
  title.append(element("code", "", withoutControls(String(name))));
  const shown = element("pre", "", withoutControls(pretty(values)));
  shown.tabIndex = 0;
  card.append(title, shown);
  return card;
};

// -- a turn, as the page has it and as one view shows it ----------------------------------------------------------

const makeTurn = (sent) => {
  const turn = { ...sent, cleaners: { text: makeCleaner(), reasoning: makeCleaner() } };
  for (const name of ["model_id", "prompt", "note"]) turn[name] = withoutControls(sent[name]);
  for (const name of ["text", "reasoning"]) turn[name] = turn.cleaners[name](sent[name], ended(sent));
  return turn;
};

const extend = (turn, more, isEnd) => {
  for (const name of ["text", "reasoning"]) turn[name] += turn.cleaners[name](more[name] ?? "", isEnd);
};

const makeThoughts = () => {
  const root = element("details", "llmkit-thoughts");
  const summary = element("summary");
  const text = element("div", "llmkit-thoughts-text");
  text.tabIndex = 0;
  root.append(summary, text);
  root.hidden = true;
  let chosen = false; // by who reads; then it stays as it is
  summary.addEventListener("click", () => (chosen = true));
  let shown = "";
  const show = (turn) => {
    const thinking = !turn.text && !ended(turn);
    const news = `${turn.reasoning.length} ${thinking}`;
    if (!turn.reasoning || news === shown) return;
    shown = news;
    root.hidden = false;
    if (!chosen) root.open = thinking;
    summary.textContent = thinking ? "Thinking …" : `Thought for a while (${length(turn.reasoning)})`;
    const atEnd = text.scrollHeight - text.scrollTop - text.clientHeight < NEAR_THE_END;
    patch(text, 0, [document.createTextNode(turn.reasoning)]);
    if (thinking && atEnd) text.scrollTop = text.scrollHeight;
  };
  return { root, show };
};

const makeTurnView = (turn) => {
  const root = element("article", "llmkit-turn");
  const question = element("div", "llmkit-question", turn.prompt);
  const pictures = turn.images.filter((source) => RASTER.test(source));
  const thumbs = element("div", "llmkit-thumbs");
  thumbs.append(...pictures.map((source, at) => picture("llmkit-thumb", source, `Image ${at + 1} of the prompt`)));
  if (pictures.length) question.prepend(thumbs);
  const answer = element("div", "llmkit-answer");
  const thoughts = makeThoughts();
  const body = element("div", "llmkit-body");
  const tools = element("div", "llmkit-tools");
  answer.append(element("span", "llmkit-speaker", turn.model_id), thoughts.root, body, tools);
  const row = element("div", "llmkit-turn-row");
  const copy = button("llmkit-copy", "Copy", `Copy the answer of ${turn.model_id}`);
  const note = element("span", "llmkit-turn-note");
  row.append(copy, note);
  root.append(question, answer, row);
  const showBody = makeBody(body);
  copy.addEventListener("click", () => copyFrom(copy, turn.text));

  const show = () => {
    thoughts.show(turn);
    showBody(turn.text, ended(turn));
    const failed = turn.state === "failed";
    root.classList.toggle("llmkit-streaming", !ended(turn));
    root.classList.toggle("llmkit-waiting", !ended(turn) && !turn.text && !turn.reasoning);
    copy.disabled = !turn.text;
    note.classList.toggle("llmkit-turn-error", failed);
    if (failed) note.setAttribute("role", "alert"); // before the text, or it is not read out
    if (note.textContent !== turn.note) note.textContent = turn.note;
    if (ended(turn)) tools.replaceChildren(...(turn.tool_calls ?? []).map(toolCard));
  };
  return { root, show, shown: false };
};

// -- the box ------------------------------------------------------------------------------------------------------

// One place of the page that shows all turns.
const makeView = (model, el) => {
  const box = element("div", "llmkit-transcript");
  const list = element("div", "llmkit-turns");
  const empty = element("div", "llmkit-transcript-empty");
  const said = element("div", "llmkit-unseen"); // read out by screen readers
  said.setAttribute("role", "status");
  box.tabIndex = 0;
  box.setAttribute("role", "log");
  box.setAttribute("aria-live", "polite");
  box.setAttribute("aria-label", "Answers");
  box.dataset.lmSuppressShortcuts = "true"; // keys in here are for reading, not for the notebook's cells
  box.append(empty, list);
  el.classList.add("llmkit-transcript-view");
  el.append(box, said);
  const view = { box, list, said, turns: [], atEnd: true, top: 0 };

  const follow = () => {
    if (!view.atEnd) return;
    box.scrollTop = box.scrollHeight;
    view.top = box.scrollTop;
  };
  const scrolled = () => {
    if (box.scrollTop === view.top) return; // that was us; by now there may be more below
    const rest = box.scrollHeight - box.scrollTop - box.clientHeight;
    view.atEnd = rest < 2 || (rest < NEAR_THE_END && box.scrollTop >= view.top);
    view.top = box.scrollTop;
  };
  const settings = () => {
    empty.textContent = model.get("placeholder");
    el.classList.toggle("llmkit-compact", model.get("compact"));
  };
  const pressed = (event) => {
    const code = event.target.closest?.(".llmkit-copy-code");
    if (code) copyFrom(code, code.closest(".llmkit-code").querySelector("code").textContent);
  };
  // Ctrl+Enter in the prompt sends it. The tab around this view is not in the page yet, so the page listens.
  const send = (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || event.isComposing) return;
    const tab = event.target.closest?.(".llmkit-user-prompt")?.closest(".llmkit-tab");
    if (!tab?.contains(box)) return;
    event.preventDefault();
    event.stopImmediatePropagation(); // another transcript of the same tab would send it once more
    if (event.repeat) return;
    event.target.dispatchEvent(new Event("change", { bubbles: true })); // the kernel has to have the text first
    tab.querySelector(".llmkit-send")?.click();
  };

  const sizes = new ResizeObserver(follow); // also when a hidden tab is shown, or a picture is there
  sizes.observe(box);
  sizes.observe(list);
  box.addEventListener("scroll", scrolled, { passive: true });
  box.addEventListener("wheel", (event) => event.deltaY < 0 && (view.atEnd = false), { passive: true });
  box.addEventListener("click", pressed);
  document.addEventListener("keydown", send, true);
  model.on("change:placeholder", settings);
  model.on("change:compact", settings);
  settings();

  view.follow = follow;
  view.remove = () => {
    sizes.disconnect();
    document.removeEventListener("keydown", send, true);
    model.off("change:placeholder", settings);
    model.off("change:compact", settings);
  };
  return view;
};

// Called once for a widget; all its views share what is in here.
export default () => {
  const page = crypto.getRandomValues(new Uint32Array(2)).join("-");
  const views = new Set();
  let turns = [];
  let number = null; // of the last message; null until the kernel told everything
  let asked = 0;
  let frame = 0;
  let restUntil = 0;

  const show = (view, at) => {
    view.turns[at].show();
    view.turns[at].shown = true;
  };

  // Shows what is not shown yet, the newest first. What took long waits long for the next time.
  const paint = () => {
    cancelAnimationFrame(frame);
    frame = 0;
    const started = performance.now();
    const late = () => performance.now() - started > FRAME_MS;
    let left = false;
    for (const view of views) {
      for (let at = view.turns.length - 1; at >= 0; at -= 1) {
        if (view.turns[at].shown) continue;
        if (late() && at < view.turns.length - 1) left = true;
        else show(view, at);
      }
      view.follow();
    }
    const now = performance.now();
    restUntil = left ? 0 : now + (now - started) * PAINT_SHARE;
    if (left) schedule();
  };

  const tick = () => {
    if (performance.now() < restUntil) frame = requestAnimationFrame(tick);
    else paint();
  };

  const schedule = () => {
    frame ||= requestAnimationFrame(tick);
  };

  const add = (view, turn) => {
    view.turns.push(makeTurnView(turn));
    view.list.append(view.turns.at(-1).root);
    show(view, view.turns.length - 1);
  };

  const busy = (view) => view.box.setAttribute("aria-busy", String(turns.some((turn) => !ended(turn))));

  const redraw = (view) => {
    view.turns = turns.map(makeTurnView);
    view.list.replaceChildren(...view.turns.map((turn) => turn.root));
    view.atEnd = true;
    busy(view);
    schedule();
  };

  const changed = (atOnce) => {
    for (const view of views) if (view.turns.length) view.turns.at(-1).shown = false;
    if (atOnce) paint();
    else schedule();
  };

  const handlers = {
    all(message) {
      turns = message.turns.map(makeTurn);
      views.forEach(redraw);
    },
    begin(message) {
      turns.push(makeTurn(message.turn));
      const gone = Math.max(turns.length - message.kept, 0);
      turns.splice(0, gone);
      for (const view of views) {
        view.said.textContent = "";
        for (const turn of view.turns.splice(0, gone)) turn.root.remove();
        view.atEnd = true; // who asks wants to see the answer
        busy(view);
        add(view, turns.at(-1));
        view.follow();
      }
    },
    wait(message) {
      turns.at(-1).note = withoutControls(message.note);
      changed(true);
    },
    append(message) {
      const turn = turns.at(-1);
      turn.note = "";
      const first = !turn.text && !turn.reasoning;
      extend(turn, message, false);
      changed(first);
    },
    end(message) {
      const turn = turns.at(-1);
      extend(turn, {}, true);
      const note = withoutControls(message.note);
      Object.assign(turn, { state: message.state, note, tool_calls: message.tool_calls });
      changed(true);
      for (const view of views) {
        busy(view);
        const how = { done: "has answered", stopped: "was stopped" }[turn.state];
        if (how) view.said.textContent = `${turn.model_id} ${how}. ${turn.note}`;
      }
    },
  };

  return {
    initialize({ model }) {
      const ask = () => {
        asked = Date.now();
        model.send({ type: "hello", page });
      };
      const receive = (message) => {
        if (!Object.hasOwn(handlers, message?.type)) return;
        const missed = number === null || message.number > number + 1;
        const isAll = message.type === "all";
        const forOther = isAll && message.page && message.page !== page;
        if (isAll && !forOther) {
          number = message.number;
          asked = 0;
          handlers.all(message);
        } else if (missed) {
          if (Date.now() - asked > ASK_AGAIN_MS) ask();
        } else if (message.number === number + 1) {
          number = message.number;
          if (!forOther) handlers[message.type](message);
        }
      };
      model.on("msg:custom", receive);
      ask(); // after a reload of the page the kernel still knows everything
      return () => model.off("msg:custom", receive);
    },
    render({ model, el }) {
      const view = makeView(model, el);
      views.add(view);
      redraw(view);
      return () => {
        views.delete(view);
        view.remove();
      };
    },
  };
};
