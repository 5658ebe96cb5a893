// The page of `far-scale play`; far_scale/play/messages.py describes what is sent.
"use strict";

const byId = (id) => document.getElementById(id);
const token = new URLSearchParams(location.search).get("token");
const query = token === null ? "" : `?token=${encodeURIComponent(token)}`;

const DEMO_KEYS = {
  ArrowUp: "forward", KeyW: "forward", ArrowLeft: "left", KeyA: "left", ArrowRight: "right", KeyD: "right",
  ArrowDown: "wait", KeyS: "wait", Space: "wait",
};
const ARROWS = { forward: "▲", left: "◀", right: "▶", wait: "●" };
const COMMAND_KEYS = { KeyP: "run", KeyZ: "back", KeyR: "reset", KeyN: "new" };
const DIGITS = 10; // actions with a key of their own
const NEXT_KEYS = ["Space", "Enter", "ArrowRight", "ArrowUp"];

let socket = null;
let hello = null;
let running = false;
let seed = null; // of the walk
let keys = {}; // code of a key -> function that returns its action
const held = new Map(); // what holds an action: code of a key, or "pointer" and its number -> action
let drawing = Promise.resolve(); // pictures are drawn in the order in which they came

function send(message) {
  if (socket !== null && socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message));
}

function press(source, action) {
  if (held.has(source)) return;
  const isNew = ![...held.values()].includes(action);
  held.set(source, action);
  if (isNew) send({ type: "press", action });
  markButtons();
}

function release(source) {
  if (!held.has(source)) return;
  const action = held.get(source);
  held.delete(source);
  if (![...held.values()].includes(action)) send({ type: "release", action });
  markButtons();
}

function releaseAll() {
  held.clear();
  send({ type: "release" });
  markButtons();
}

function markButtons() {
  const actions = [...held.values()];
  for (const button of byId("inputs").querySelectorAll("button")) {
    button.classList.toggle("down", actions.includes(Number(button.dataset.action)));
  }
}

function showMessage(text) {
  byId("message").textContent = text;
  byId("message").hidden = text === "";
}

function inputButton(text, title, action) {
  const button = document.createElement("button");
  button.textContent = text;
  button.title = title;
  button.setAttribute("aria-label", title);
  button.dataset.action = action();
  button.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    button.setPointerCapture(event.pointerId);
    press(`pointer ${event.pointerId}`, action());
  });
  for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) {
    button.addEventListener(name, (event) => release(`pointer ${event.pointerId}`));
  }
  button.addEventListener("contextmenu", (event) => event.preventDefault());
  // For screen readers and tests, whose clicks have no pointer.
  button.addEventListener("click", (event) => {
    if (event.detail !== 0) return;
    press("click", action());
    release("click");
  });
  return button;
}

function buildInputs() {
  const area = byId("inputs");
  area.replaceChildren();
  area.classList.toggle("pad", hello.is_demo);
  keys = {};
  if (hello.is_demo) {
    for (const [code, name] of Object.entries(DEMO_KEYS)) keys[code] = () => hello.inputs.indexOf(name);
    hello.inputs.forEach((name, action) => {
      const button = inputButton(ARROWS[name], name, () => action);
      button.classList.add(name);
      area.append(button);
    });
    byId("help").textContent =
      "Arrow keys or W A D walk, space waits. P runs and pauses, Z steps back, R resets, N takes a new maze. " +
      "While paused, a frame comes only with a key.";
  } else if (hello.condition === "actions") {
    hello.inputs.forEach((name, action) => {
      if (action < DIGITS) keys[`Digit${action}`] = () => action;
      area.append(inputButton(name, `action ${name}`, () => action));
    });
    byId("help").textContent = "The digits are the actions. P runs and pauses, Z steps back, R resets, N starts anew.";
  } else {
    let chosen = () => 0;
    if (hello.condition === "labels") {
      const chooser = document.createElement("select");
      chooser.id = "label";
      chooser.setAttribute("aria-label", "label");
      hello.inputs.forEach((name, label) => chooser.add(new Option(name, label)));
      chooser.addEventListener("change", () => {
        chooser.blur();
        releaseAll();
      });
      chosen = () => Number(chooser.value);
      area.append(chooser);
    }
    const next = inputButton("next", "next frame", chosen);
    area.append(next);
    for (const code of NEXT_KEYS) keys[code] = chosen;
    byId("help").textContent = "Space makes the next frame. P runs and pauses, Z steps back, R resets, N starts anew.";
  }
}

function showHello(message) {
  hello = message;
  seed = null;
  byId("model").textContent = hello.model + (hello.note ? ` · ${hello.note}` : "");
  for (const id of ["dream", "engine"]) [byId(id).height, byId(id).width] = hello.size;
  byId("engine-figure").hidden = !hello.engine;
  byId("new").textContent = hello.start === "maze" ? "New maze" : hello.start === "recorded" ? "Next episode" : "New seed";
  byId("steps").max = Math.min(32, hello.max_steps);
  byId("guidance-label").hidden = !hello.guidance;
  for (const kind of ["mp4", "json"]) byId(`save-${kind}`).href = `/recordings/${hello.session}.${kind}${query}`;
  buildInputs();
}

function showState(state) {
  running = state.run;
  const chooser = byId("label");
  if (chooser !== null && state.seed !== seed) chooser.value = state.idle; // the label of the given frames
  seed = state.seed;
  byId("run").textContent = running ? "Pause" : "Run";
  byId("seed").textContent = state.seed;
  for (const name of ["steps", "guidance"]) {
    if (document.activeElement !== byId(name)) byId(name).value = state[name];
    byId(`${name}-value`).textContent = name === "steps" ? state[name] : state[name].toFixed(1);
  }
}

function showNumbers(header) {
  byId("frame").textContent = header.frame < 0 ? "–" : header.frame;
  byId("fps").textContent = header.fps > 0 ? header.fps.toFixed(1) : "–";
  byId("model-ms").textContent = header.model_ms > 0 ? `${header.model_ms.toFixed(0)} ms` : "–";
  byId("decoder-ms").textContent = header.decoder_ms > 0 ? `${header.decoder_ms.toFixed(0)} ms` : "–";
  byId("cache").textContent = `${(header.cache_bytes / 1e6).toFixed(1)} MB`;
  byId("recorded").textContent = header.recorded === 1 ? "1 frame recorded" : `${header.recorded} frames recorded`;
  byId("back").disabled = header.steps_back === 0;
  for (const kind of ["mp4", "json"]) byId(`save-${kind}`).hidden = header.frame < 0;
}

async function draw(id, bytes) {
  const canvas = byId(id);
  const context = canvas.getContext("2d");
  if (bytes.byteLength === 0) {
    context.clearRect(0, 0, canvas.width, canvas.height);
    return;
  }
  const picture = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  picture.close();
}

function showFrame(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const [dream, engine] = header.pictures;
  const start = 4 + length;
  drawing = drawing
    .then(async () => {
      await draw("dream", buffer.slice(start, start + dream));
      await draw("engine", buffer.slice(start + dream, start + dream + engine));
      showNumbers(header);
    })
    .catch((error) => showMessage(`a frame could not be shown: ${error.message}`));
}

function connect() {
  showMessage("");
  const scheme = location.protocol === "https:" ? "wss:" : "ws:";
  socket = new WebSocket(`${scheme}//${location.host}/walk${query}`);
  socket.binaryType = "arraybuffer";
  let reason = "the connection is lost";
  socket.addEventListener("message", (event) => {
    if (event.data instanceof ArrayBuffer) {
      showFrame(event.data);
      return;
    }
    const message = JSON.parse(event.data);
    if (message.type === "hello") showHello(message);
    else if (message.type === "state") showState(message);
    else {
      reason = message.message;
      showMessage(message.message);
    }
  });
  socket.addEventListener("close", () => {
    held.clear();
    markButtons();
    byId("model").textContent = "not connected";
    showMessage(`${reason}. `);
    const again = document.createElement("button");
    again.textContent = "Connect again";
    again.addEventListener("click", connect, { once: true });
    byId("message").append(again);
  });
}

function command(name) {
  showMessage("");
  if (name === "run") send({ type: "run", on: !running });
  else send({ type: name });
}

for (const name of ["run", "back", "reset", "new"]) {
  byId(name).addEventListener("click", () => {
    byId(name).blur(); // or else space would click it again
    command(name);
  });
}

for (const name of ["steps", "guidance"]) {
  byId(name).addEventListener("input", () => send({ type: "set", [name]: Number(byId(name).value) }));
  byId(name).addEventListener("change", () => byId(name).blur()); // the arrow keys walk again
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || hello === null) return;
  if (["SELECT", "INPUT"].includes(document.activeElement.tagName)) return;
  if (event.code in keys) {
    event.preventDefault();
    if (!event.repeat) press(event.code, keys[event.code]());
  } else if (event.code in COMMAND_KEYS && !event.repeat) {
    command(COMMAND_KEYS[event.code]);
  }
});
addEventListener("keyup", (event) => release(event.code));
addEventListener("blur", releaseAll);
document.addEventListener("visibilitychange", () => document.hidden && releaseAll());

connect();
