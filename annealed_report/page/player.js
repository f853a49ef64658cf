"use strict";
// Particles on their way through two chains: see annealed_report/player.py, which gives the data.
for (const root of document.querySelectorAll(".player[data-player]")) {
  const data = JSON.parse(root.dataset.player);
  delete root.dataset.player; // each is made once
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const make = (tag, fields, ...children) => {
    const element = Object.assign(document.createElement(tag), fields);
    element.append(...children);
    return element;
  };
  const last = data.states - 1, SIZE = 300;
  const particles = {};
  for (const [start, methods] of Object.entries(data.particles)) {
    particles[start] = {};
    for (const [method, text] of Object.entries(methods)) particles[start][method] = bytes(text);
  }
  const contours = data.contours.map((lines) => lines.map(bytes));
  const slider = (max, step, value, label) => make("input", { type: "range", min: 0, max, step, value, ariaLabel: label });
  const start = make("select", { ariaLabel: "start of the kernels" },
    ...Object.keys(particles).map((name) => make("option", { textContent: name, value: name })));
  const training = slider(data.steps.length - 1, 1, data.steps.length - 1, "training step");
  const time = slider(last, 0.02, last, "state t of the chain");
  const trained = make("output", {}), reached = make("output", {});
  const button = make("button", { type: "button", textContent: "Play" });
  const views = Object.keys(data.names).map((method) => {
    const canvas = make("canvas", { width: 2 * SIZE, height: 2 * SIZE, style: "width: 100%; border: 1px solid #ccc" });
    canvas.setAttribute("role", "img");
    const title = make("div", { textContent: data.names[method] });
    return { method, canvas, figure: make("div", { style: "flex: 1 1 8rem; max-width: 20rem; text-align: center" }, title, canvas) };
  });
  const draw = () => {
    const t = Number(time.value), before = Math.min(Math.floor(t), last - 1), part = t - before;
    const step = Number(training.value), target = Math.round(t);
    trained.textContent = `${data.steps[step].toLocaleString("en")} steps`;
    reached.textContent = `t = ${t.toFixed(1)}`;
    for (const { method, canvas } of views) {
      const pen = canvas.getContext("2d"), scale = canvas.width / 255;
      const at = (value) => value * scale, up = (value) => (255 - value) * scale;
      pen.fillStyle = "#fff";
      pen.fillRect(0, 0, canvas.width, canvas.height);
      pen.strokeStyle = "#777";
      pen.lineWidth = 1.5;
      for (const line of contours[target]) {
        pen.beginPath();
        for (let n = 0; n < line.length; n += 2) pen.lineTo(at(line[n]), up(line[n + 1]));
        pen.stroke();
      }
      const all = particles[start.value][method], count = all.length / (data.steps.length * data.states);
      const from = (step * data.states + before) * count;
      pen.fillStyle = data.colours[method];
      pen.globalAlpha = 0.75;
      for (let n = 0; n < count; n += 2) {
        const x = all[from + n] + part * (all[from + count + n] - all[from + n]);
        const y = all[from + n + 1] + part * (all[from + count + n + 1] - all[from + n + 1]);
        pen.beginPath();
        pen.arc(at(x), up(y), 5, 0, 7);
        pen.fill();
      }
      pen.globalAlpha = 1;
      canvas.setAttribute("aria-label", `${data.names[method]}, ${start.value}, ${trained.textContent}: particles at ${reached.textContent} over the contours of the target there`);
    }
  };
  let playing = 0;
  const stop = () => { cancelAnimationFrame(playing); playing = 0; button.textContent = "Play"; };
  button.addEventListener("click", () => {
    if (playing) { stop(); return; }
    const begun = performance.now();
    button.textContent = "Stop";
    const frame = (now) => {
      const t = Math.min(last, (now - begun) / 1100);
      const share = t % 1, whole = t - share;
      time.value = t >= last ? last : whole + share * share * (3 - 2 * share); // sets off and arrives gently
      draw();
      if (t >= last) stop(); else playing = requestAnimationFrame(frame);
    };
    playing = requestAnimationFrame(frame);
  });
  time.addEventListener("input", () => { stop(); draw(); });
  for (const input of [training, start]) input.addEventListener("input", draw);
  root.replaceChildren(
    make("div", { style: "display: flex; flex-wrap: wrap; gap: 1rem; justify-content: center" }, ...views.map((view) => view.figure)),
    make("div", { className: "player-controls", style: "display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; align-items: center; justify-content: center; margin-top: .6rem" },
      make("label", {}, "start ", start),
      make("label", {}, "training ", training, " ", trained),
      make("label", {}, "chain ", time, " ", reached),
      button));
  draw();
}
