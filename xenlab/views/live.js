// The control bar: shows the frames that Python drew, sends orders, at most one on its way.

const BUTTONS = [
  ["start", "Start", "To the start (Home)"],
  ["previous", "◀ event", "To the previous event ([)"],
  ["back", "◀ step", "One instruction back (left arrow; with Shift 100)"],
  ["toggle", "▶ Play", "Play or pause (Space)"],
  ["step", "step ▶", "One instruction forward (right arrow; with Shift 100)"],
  ["next", "event ▶", "To the next event (])"],
  ["end", "End", "Run to the end (End)"],
];

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// Orders while one is on its way: steps add up, of scrubbing only the last counts.
function sender(model) {
  let sent = 0;
  let waiting = null;
  let busy = false;
  const send = (order) => {
    busy = true;
    sent += 1;
    model.send({ ...order, id: sent });
  };
  const answered = () => {
    if (model.get("answered") < sent) return;
    busy = false;
    if (waiting) {
      const order = waiting;
      waiting = null;
      send(order);
    }
  };
  model.on("change:answered", answered);
  sent = model.get("answered");
  const give = (order) => {
    if (!busy) return send(order);
    const adds = waiting && waiting.do === order.do && (order.do === "step" || order.do === "back");
    waiting = adds ? { ...order, n: waiting.n + order.n } : order;
  };
  return { give, stop: () => model.off("change:answered", answered) };
}

// A list to choose one value of the model's from.
function choice(model, name, label, values, text) {
  const list = element("select", { class: `xl-${name}`, title: label, "aria-label": label });
  for (const value of values) list.append(element("option", { value }, text(value)));
  list.addEventListener("change", () => {
    model.set(name, values[list.selectedIndex]);
    model.save_changes();
  });
  return list;
}

function toolbar(model, order) {
  const bar = element("div", { class: "xl-bar", role: "toolbar", "aria-label": "Run control" });
  const buttons = {};
  for (const [name, sign, label] of BUTTONS) {
    const button = element("button", { type: "button", class: `xl-${name}`, title: label, "aria-label": label }, sign);
    button.addEventListener("click", () => order(name));
    buttons[name] = button;
    bar.append(button);
  }
  const stops = choice(model, "stop", "What the event buttons stop at", model.get("stops"), (value) => value);
  const inSpeed = (value) => `${value.toLocaleString("en")} / s`;
  const speed = choice(model, "speed", "Speed in instructions a second", model.get("speeds"), inSpeed);
  bar.append(stops, speed);
  return { bar, buttons, speed, stops };
}

// A slider gives its order when it is let go; while it is held it follows the hand.
function sliderBox(place, frame, give) {
  const range = element("input", { type: "range", "aria-label": frame.label });
  const value = element("output", {});
  const box = element("label", { class: "xl-slider" }, element("span", {}, frame.label), range, value);
  range.addEventListener("input", () => (value.textContent = Number(range.value).toLocaleString("en")));
  range.addEventListener("change", () => give({ do: "slide", slider: place, n: Number(range.value) }));
  const show = (now) => {
    [range.min, range.max, range.step, range.disabled] = [now.low, now.high, now.step, now.off];
    if (range.matches(":active")) return;
    range.value = now.value;
    value.textContent = now.off ? "–" : now.value.toLocaleString("en");
  };
  return { box, show };
}

function frameBox(place, frame) {
  const picture = element("div", { class: "xl-picture", "data-view": place });
  const table = element("pre", { class: "xl-text" });
  const details = element("details", {}, element("summary", {}, `${frame.title} as text`), table);
  return { box: element("section", { class: "xl-frame", "aria-label": frame.title }, picture, details), picture, table };
}

// Draws a frame again and gives the keyboard's focus back to the event that had it.
function draw(part, frame) {
  if (part.svg !== frame.svg) {
    part.svg = frame.svg;
    const focused = part.picture.contains(document.activeElement) && document.activeElement.dataset.event;
    part.picture.innerHTML = frame.svg;
    if (focused) part.picture.querySelector(`[data-event="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
  }
  if (part.table.textContent !== frame.text) part.table.textContent = frame.text;
}

function orderFor(name, model, count) {
  if (name === "toggle") return { do: model.get("playing") ? "pause" : "play" };
  if (name === "start") return { do: "seek", n: model.get("start") };
  return { do: name, n: count };
}

const KEYS = { ArrowRight: "step", ArrowLeft: "back", Home: "start", End: "end", "[": "previous", "]": "next", " ": "toggle" };

// JupyterLab's shortcuts are switched off in here, so that "a" adds no cell; saving is still wanted.
function passOnSave(event) {
  if (!(event.ctrlKey || event.metaKey) || event.key !== "s") return;
  event.preventDefault();
  const { key, code, keyCode, ctrlKey, metaKey } = event;
  const again = { key, code, keyCode, ctrlKey, metaKey, bubbles: true, cancelable: true };
  event.currentTarget.parentElement.dispatchEvent(new KeyboardEvent("keydown", again));
}

function onKey(event, order, select) {
  passOnSave(event);
  const chosen = event.target.closest("[data-event]");
  const presses = event.key === "Enter" || event.key === " ";
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (chosen && presses) select(chosen);
  // Their keys are theirs; JupyterLab, further out, would take the arrows for itself.
  else if (event.target.closest("select, .xl-slider")) return event.stopPropagation();
  else if (presses && event.target.closest("button, summary")) return;
  else if (KEYS[event.key]) order(KEYS[event.key], event.shiftKey ? 100 : 1);
  else return;
  event.preventDefault();
  event.stopPropagation();
}

function render({ model, el }) {
  const { give, stop } = sender(model);
  const order = (name, count = 1) => give(orderFor(name, model, count));
  const select = (chosen) =>
    give({ do: "select", view: Number(chosen.closest("[data-view]").dataset.view), key: chosen.dataset.event });
  const { bar, buttons, speed, stops } = toolbar(model, order);
  const scrub = element("input", { type: "range", class: "xl-scrub", step: 1, "aria-label": "Position in the run" });
  const place = element("output", { class: "xl-place" });
  const status = element("span", { class: "xl-status", role: "status", "aria-live": "polite" });
  const sliders = model.get("sliders").map((frame, number) => sliderBox(number, frame, give));
  bar.append(place, scrub, status);
  const root = element("div", { class: "xl-live", tabindex: 0, role: "group", "data-lm-suppress-shortcuts": "true" });
  root.setAttribute("aria-label", "Live view. Left and right arrow step, Space plays, brackets go from event to event.");
  root.append(bar);
  if (sliders.length) {
    const group = { class: "xl-sliders", role: "group", "aria-label": "What you may set" };
    bar.append(element("div", group, ...sliders.map((slider) => slider.box)));
  }
  el.append(root);

  scrub.addEventListener("input", () => give({ do: "seek", n: Number(scrub.value) }));
  root.addEventListener("keydown", (event) => onKey(event, order, select));
  root.addEventListener("click", (event) => {
    const chosen = event.target.closest("[data-event]");
    if (chosen) select(chosen);
  });

  const parts = [];
  const update = () => {
    model.get("frames").forEach((frame, number) => {
      if (!parts[number]) {
        parts[number] = frameBox(number, frame);
        root.append(parts[number].box);
      }
      draw(parts[number], frame);
    });
    model.get("sliders").forEach((frame, number) => sliders[number]?.show(frame));
    const [position, start, end] = ["position", "start", "end"].map((name) => model.get(name));
    scrub.min = start;
    scrub.max = end;
    if (!scrub.matches(":active")) scrub.value = position;
    scrub.setAttribute("aria-valuetext", `instruction ${position} of ${end}`);
    place.textContent = `${position.toLocaleString("en")} / ${end.toLocaleString("en")}`;
    const playing = model.get("playing");
    buttons.toggle.textContent = playing ? "❚❚ Pause" : "▶ Play";
    buttons.toggle.setAttribute("aria-pressed", playing);
    buttons.back.disabled = buttons.start.disabled = buttons.previous.disabled = position <= start;
    status.textContent = model.get("status");
    speed.value = model.get("speed");
    stops.value = model.get("stop");
  };
  const names = ["frames", "position", "start", "end", "playing", "status", "speed", "stop", "sliders"];
  const changes = names.map((name) => `change:${name}`).join(" ");
  let planned = 0;
  const plan = () => {
    planned ||= requestAnimationFrame(() => {
      planned = 0;
      update();
    });
  };
  model.on(changes, plan);
  update();
  return () => {
    stop();
    model.off(changes, plan);
    cancelAnimationFrame(planned);
  };
}

export default { render };
