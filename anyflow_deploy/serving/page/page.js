// The page of anyflow-serve: asks for a video, draws its frames as they come, plays them at their rate. No library, no build.
"use strict";

const $ = (id) => document.getElementById(id);
const token = { get: () => sessionStorage.getItem("token") || "", set: (word) => sessionStorage.setItem("token", word) };
let model = null;
let current = null; // the video on the stage

// Talking to the server

async function ask(path, options = {}) {
  const headers = { ...(options.headers || {}) };
  if (token.get()) headers.Authorization = `Bearer ${token.get()}`;
  if (options.body) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) $("token-row").hidden = false;
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => ({ error: { message: answer.statusText } }));
  const problem = new Error(body.error.message);
  problem.status = answer.status;
  throw problem;
}

function socketOf(id) {
  const words = token.get() ? ["anyflow", `token.${token.get()}`] : ["anyflow"];
  const address = new URL(`v1/videos/${id}/stream?format=jpeg`, location.href);
  address.protocol = address.protocol === "https:" ? "wss:" : "ws:";
  const socket = new WebSocket(address, words);
  socket.binaryType = "blob";
  return socket;
}

// What is asked for

const deadlineMs = () => {
  const most = model ? model.limits.deadline_ms : 600000; // from 100 ms upwards, evenly on a logarithmic scale
  return Number((100 * (most / 100) ** (Number($("deadline").value) / 100)).toPrecision(2));
};
const seconds = (ms) => (ms < 1000 ? `${ms} ms` : `${(ms / 1000).toLocaleString("en", { maximumFractionDigits: 1 })} s`);
const by = () => document.querySelector("input[name=by]:checked").value;

function showChoices() {
  $("by-steps").hidden = by() !== "steps";
  $("by-deadline").hidden = by() !== "deadline";
  $("steps-shown").value = `${$("steps").value} step${$("steps").value === "1" ? "" : "s"}`;
  $("deadline-shown").value = seconds(deadlineMs());
  const each = model && model.kind === "causal" ? "each chunk" : "the whole video";
  $("hint").textContent = by() === "steps" ? `for ${each}; more steps, better video` : `for ${each}: as many steps as fit`;
}

function wanted() {
  const body = { prompt: $("prompt").value, size: $("size").value, num_frames: Number($("frames").value) };
  if (by() === "steps") body.num_inference_steps = Number($("steps").value);
  else body.deadline_ms = deadlineMs();
  if ($("seed").value !== "") body.seed = Number($("seed").value);
  return body;
}

// What comes back

class Showing {
  constructor(video) {
    this.id = video.id;
    this.fps = video.fps;
    this.frames = []; // JPEG
    this.drawing = false;
    this.chunks = [];
    this.position = 0;
    this.ended = false;
    const [width, height] = video.size.split("x").map(Number);
    Object.assign($("screen"), { width, height });
    this.pen = $("screen").getContext("2d");
    $("empty").hidden = false;
    this.missing = document.createElement("i"); // room for the frames that are not there yet
    this.missing.style.flexGrow = video.num_frames;
    $("timeline").replaceChildren(this.missing);
    this.timer = setInterval(() => this.draw(), 1000 / video.fps);
    this.socket = socketOf(video.id);
    this.socket.onmessage = (message) => this.take(message.data);
    this.socket.onclose = () => this.closed();
  }

  take(data) {
    if (data instanceof Blob) {
      this.frames.push(data); // compressed: decoded only to be drawn, so long videos fit
      return;
    }
    const message = JSON.parse(data);
    if (message.type === "chunk") this.chunk(message);
    else if (message.type === "error") complain(new Error(message.error.message));
    else {
      if (message.type === "end") this.ended = true;
      show(message.video);
    }
  }

  chunk(message) {
    this.chunks.push(message);
    const mark = document.createElement("span");
    mark.style.flexGrow = message.frames;
    mark.textContent = `${message.seconds.toFixed(1)} s`;
    mark.title = `frames ${message.first_frame} to ${message.first_frame + message.frames - 1}, there after ${message.seconds} s`;
    this.missing.before(mark);
    this.missing.style.flexGrow -= message.frames;
  }

  async draw() { // at the end it waits for the next frame, and begins again when the video is whole
    if (!this.frames.length || this.drawing) return;
    $("empty").hidden = true;
    if (this.position >= this.frames.length) {
      if (!this.ended) return;
      this.position = 0;
    }
    this.drawing = true;
    const picture = await createImageBitmap(this.frames[this.position]).finally(() => { this.drawing = false; });
    if (current === this) this.pen.drawImage(picture, 0, 0, $("screen").width, $("screen").height);
    picture.close();
    const at = this.chunks.findIndex((c) => this.position >= c.first_frame && this.position < c.first_frame + c.frames);
    $("timeline").querySelectorAll("span").forEach((mark, index) => mark.classList.toggle("now", index === at));
    this.position += 1;
    $("screen").dataset.drawn = String(Number($("screen").dataset.drawn || 0) + 1);
  }

  closed() {
    if (this.ended) return;
    complain(new Error("The connection was lost; the server may still be making the video."));
    busy(false);
  }

  stop() {
    clearInterval(this.timer);
    this.socket.onclose = this.socket.onmessage = null;
    this.socket.close();
  }
}

function show(video) {
  const done = video.status === "completed" || video.status === "failed";
  $("progress").value = video.progress;
  const places = { queued: `Waiting; ${video.queue_position} before this one.`, in_progress: `Working, ${video.progress} per cent.`, completed: "Done." };
  $("status").textContent = video.error ? (video.error.code === "cancelled" ? "Cancelled." : `Failed: ${video.error.message}`) : places[video.status];
  $("finish").hidden = done || video.deadline_ms === null;
  const made = video.timings.total;
  const rows = {
    "first frame after": video.timings.first_frame && `${video.timings.first_frame.toFixed(2)} s`,
    "steps made": video.steps.join(", "),
    deadline: video.deadline_met === null ? "" : video.deadline_met ? "met" : "missed",
    "whole video": done && made && !video.error && `${made.toFixed(2)} s (${(video.num_frames / video.fps / made).toFixed(2)} times real time)`,
    "text, transformer, VAE, mp4": done && !video.error && ["text", "transformer", "vae", "mp4"].map((n) => `${(video.timings[n] || 0).toFixed(2)} s`).join(", "),
    seed: video.seed,
  };
  $("numbers").tBodies[0].replaceChildren(...Object.entries(rows).filter(([, value]) => value || value === 0).map(([name, value]) => {
    const row = document.createElement("tr");
    for (const text of [name, value]) row.append(Object.assign(document.createElement("td"), { textContent: text }));
    return row;
  }));
  $("numbers").hidden = false;
  if (done) {
    busy(false);
    if (!video.error) offer(video);
    list().catch(complain);
  }
}

function offer(video) { // the token travels in a header, so the file is fetched when it is asked for
  const link = $("download");
  link.hidden = false;
  link.href = `v1/videos/${video.id}/content`;
  link.download = `${video.id}.mp4`;
  link.onclick = token.get() ? (event) => { event.preventDefault(); save(video).catch(complain); } : null;
}

async function save(video) {
  const blob = await (await ask(`v1/videos/${video.id}/content`)).blob();
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: `${video.id}.mp4` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

async function list() {
  const videos = (await (await ask("v1/videos?limit=10")).json()).data.filter((video) => video.status !== "failed");
  $("earlier").hidden = !videos.length;
  $("list").replaceChildren(...videos.map((video) => {
    const line = document.createElement("li");
    const span = (text) => Object.assign(document.createElement("span"), { textContent: text });
    const watch = Object.assign(document.createElement("button"), { type: "button", textContent: "Watch" });
    watch.onclick = () => begin(video);
    const remove = Object.assign(document.createElement("button"), { type: "button", textContent: "Delete" });
    remove.onclick = () => ask(`v1/videos/${video.id}`, { method: "DELETE" }).then(list).catch(complain);
    line.append(span(video.prompt), span(`${video.size}, ${Number(video.seconds).toFixed(1)} s`), span(video.status.replace("_", " ")), watch, remove);
    return line;
  }));
}

function begin(video) {
  if (current) current.stop();
  $("problem").textContent = "";
  $("download").hidden = true;
  busy(video.status !== "completed");
  current = new Showing(video);
}

function busy(working) {
  $("go").disabled = working;
  $("cancel").hidden = !working;
  if (!working) $("finish").hidden = true;
}

function complain(problem) { $("problem").textContent = problem.message; }

// The controls

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  $("problem").textContent = "";
  $("go").disabled = true;
  try {
    if (!model) await start();
    begin(await (await ask("v1/videos", { method: "POST", body: JSON.stringify(wanted()) })).json());
  } catch (problem) {
    busy(false);
    complain(problem);
  }
});
for (const word of ["cancel", "finish"]) {
  $(word).addEventListener("click", () => ask(`v1/videos/${current.id}/${word}`, { method: "POST" }).catch(complain));
}
$("token").addEventListener("change", () => {
  token.set($("token").value);
  start().then(() => { $("token-row").hidden = true; $("problem").textContent = ""; }).catch(complain);
});
document.querySelectorAll("#ask input").forEach((input) => input.addEventListener("input", showChoices));

async function start() {
  model = (await (await ask("v1/models")).json()).data[0];
  const kind = model.kind === "causal" ? "chunk by chunk" : "whole video at once";
  $("model").textContent = `${model.id}, ${kind}, ${model.fps} frames a second`;
  $("steps").max = model.limits.num_inference_steps;
  $("steps").value = model.default.num_inference_steps;
  $("size").value = model.default.size;
  $("frames").max = model.limits.num_frames;
  $("frames").value = Math.min(model.default.num_frames, model.limits.num_frames);
  $("prompt").maxLength = model.limits.prompt_characters;
  showChoices();
  await list();
}

showChoices();
start().catch(complain);
