// Draw the charts in the page's colors, and redraw them when the color scheme changes or the page is printed. Printing
// opens all <details>.
(() => {
  const data = JSON.parse(document.getElementById("charts").textContent);
  const root = document.documentElement;

  const draw = () => {
    const style = getComputedStyle(root);
    const color = (name) => style.getPropertyValue(name).trim();
    const palette = (number) => color(`--color-${1 + ((number - 1) % 7)}`);
    const line = { gridcolor: color("--line"), zerolinecolor: color("--line"), linecolor: color("--line"), automargin: true };
    for (const [name, { traces, layout }] of Object.entries(data)) {
      const shapes = (layout.shapes || []).map((shape) => ({ ...shape, line: { ...shape.line, color: color("--faint"), width: 1 } }));
      const colored = structuredClone(traces).map((trace) => {
        const { color: number, ...rest } = trace;
        return number ? { ...rest, marker: { color: palette(number) }, line: { color: palette(number) } } : rest;
      });
      Plotly.react(`chart-${name}`, colored, {
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)",
        font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("--text") },
        colorway: [1, 2, 3, 4, 5, 6, 7].map(palette),
        margin: { l: 8, r: 8, t: 8, b: 8 },
        legend: { orientation: "h", y: -0.15 },
        hoverlabel: { bgcolor: color("--paper"), font: { color: color("--text") } },
        ...layout,
        shapes,
        xaxis: { ...line, ...layout.xaxis },
        yaxis: { ...line, ...layout.yaxis },
      }, { responsive: true, displaylogo: false, displayModeBar: false });
    }
  };

  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  let closed = [];
  addEventListener("beforeprint", () => {
    root.dataset.paper = "";
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const details of closed) details.open = true;
    draw();
  });
  addEventListener("afterprint", () => {
    delete root.dataset.paper;
    for (const details of closed) details.open = false;
    draw();
  });
})();
