// Memory by owner over the last two minutes, stacked, moving with the clock.

const SPAN_MS = 120_000;
const FRAME_MS = 1000 / 30;
const LAYERS = ["used", "cached", "activations", "start"];

const still = matchMedia("(prefers-reduced-motion: reduce)");
const dark = matchMedia("(prefers-color-scheme: dark)");
const charts = new Set();
let colours = null;
dark.addEventListener("change", () => (colours = null));

function palette() {
  const style = getComputedStyle(document.documentElement);
  return (colours ??= Object.fromEntries([...LAYERS, "ink", "soft", "line"].map((name) => [name, style.getPropertyValue(`--${name}`).trim()])));
}

/** A chart on a canvas. Samples are {used, cached, activations, start, budget} in bytes. */
export class Chart {
  constructor(canvas) {
    this.canvas = canvas;
    this.samples = [];
    charts.add(this);
  }

  add(sample) {
    const now = performance.now();
    this.samples.push({ at: now, ...sample });
    while (this.samples.length > 2 && this.samples[1].at < now - SPAN_MS) this.samples.shift();
  }

  draw(now) {
    const { canvas, samples } = this;
    const scale = Math.min(devicePixelRatio, 2);
    const width = Math.round(canvas.clientWidth * scale), height = Math.round(canvas.clientHeight * scale);
    if (!width || samples.length < 2) return;
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    const at = (canvas.pen ??= canvas.getContext("2d")), ink = palette();
    const top = Math.max(...samples.map((s) => Math.max(s.budget, s.used + s.cached + s.activations + s.start))) * 1.06 || 1;
    const x = (time) => width - ((now - time) / SPAN_MS) * width, y = (value) => height - (value / top) * height;
    at.clearRect(0, 0, width, height);
    const sums = samples.map(() => 0);
    for (const layer of LAYERS) {
      at.beginPath();
      samples.forEach((s, n) => at.lineTo(x(s.at), y(sums[n])));
      at.lineTo(width, y(sums.at(-1)));
      samples.forEach((s, n) => (sums[n] += s[layer]));
      at.lineTo(width, y(sums.at(-1)));
      for (let n = samples.length - 1; n >= 0; n--) at.lineTo(x(samples[n].at), y(sums[n]));
      at.fillStyle = ink[layer];
      at.fill();
    }
    at.beginPath();
    at.setLineDash([4 * scale, 4 * scale]);
    samples.forEach((s) => at.lineTo(x(s.at), y(s.budget)));
    at.lineTo(width, y(samples.at(-1).budget));
    at.strokeStyle = ink.soft;
    at.lineWidth = scale;
    at.stroke();
    at.setLineDash([]);
    at.fillStyle = ink.soft;
    at.font = `${11 * scale}px system-ui, sans-serif`;
    at.fillText("2 min ago", 6 * scale, height - 6 * scale);
    at.fillText("budget", 6 * scale, y(samples.at(-1).budget) + 13 * scale);
  }
}

let drawn = 0;
function frame(now) {
  requestAnimationFrame(frame);
  if (now - drawn < (still.matches ? 1000 : FRAME_MS - 2)) return;
  drawn = now;
  for (const chart of charts) {
    if (chart.canvas.isConnected) chart.draw(now);
    else if (chart.samples.length) charts.delete(chart);
  }
}
requestAnimationFrame(frame);
