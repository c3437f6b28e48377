// Draws the figures of executed notebooks and the diagrams of chapters with the site's own copies of plotly.js and mermaid,
// which only pages load that have any.
function withLibrary(name, then) {
  const library = document.createElement("script");
  library.src = new URL(name, document.querySelector('script[src*="figures.js"]').src).href;
  library.onload = then;
  document.head.append(library);
}

document.addEventListener("DOMContentLoaded", () => {
  const figures = document.querySelectorAll(".plotly-figure"), diagrams = document.querySelectorAll("pre.diagram");
  if (figures.length) withLibrary("plotly.min.js", () => {
    for (const figure of figures) {
      const drawn = JSON.parse(figure.querySelector("script").textContent);
      delete drawn.layout.width;
      Plotly.newPlot(figure, drawn.data, drawn.layout, { responsive: true, displaylogo: false });
    }
  });
  if (diagrams.length) withLibrary("mermaid.min.js", () => {
    const dark = document.documentElement.dataset.theme === "dark";
    mermaid.initialize({ startOnLoad: false, securityLevel: "strict", theme: dark ? "dark" : "neutral" });
    mermaid.run({ nodes: diagrams });
  });
});
