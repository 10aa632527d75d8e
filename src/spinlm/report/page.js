// Draws the charts in the page's colours, again whenever those change: by the device's setting, or for paper. There all
// that is folded is open.
(() => {
  const data = JSON.parse(document.getElementById("charts").textContent);
  const root = document.documentElement;

  const draw = () => {
    const style = getComputedStyle(root);
    const colour = (name) => style.getPropertyValue(name).trim();
    const palette = (number) => colour(`--colour-${1 + ((number - 1) % 7)}`);
    const line = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line"), automargin: true };
    for (const [name, { traces, layout }] of Object.entries(data)) {
      const shapes = (layout.shapes || []).map((shape) => ({ ...shape, line: { ...shape.line, color: colour("--faint"), width: 1 } }));
      const coloured = structuredClone(traces).map((trace) => {
        const { colour: number, ...rest } = trace;
        return number ? { ...rest, marker: { color: palette(number) }, line: { color: palette(number) } } : rest;
      });
      Plotly.react(`chart-${name}`, coloured, {
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)",
        font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("--text") },
        colorway: [1, 2, 3, 4, 5, 6, 7].map(palette),
        margin: { l: 8, r: 8, t: 8, b: 8 },
        legend: { orientation: "h", y: -0.15 },
        hoverlabel: { bgcolor: colour("--paper"), font: { color: colour("--text") } },
        ...layout,
        shapes,
        xaxis: { ...line, ...layout.xaxis },
        yaxis: { ...line, ...layout.yaxis },
      }, { responsive: true, displaylogo: false, displayModeBar: false });
    }
  };

  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  let unfolded = [];
  addEventListener("beforeprint", () => {
    root.dataset.paper = "";
    unfolded = [...document.querySelectorAll("details:not([open])")];
    for (const one of unfolded) one.open = true;
    draw();
  });
  addEventListener("afterprint", () => {
    delete root.dataset.paper;
    for (const one of unfolded) one.open = false;
    draw();
  });
})();
