// Draws the figures of executed notebooks with the site's own copy of plotly.js, which only pages with figures load.
document.addEventListener("DOMContentLoaded", () => {
  const figures = document.querySelectorAll(".plotly-figure");
  if (!figures.length) return;
  const library = document.createElement("script");
  library.src = new URL("plotly.min.js", document.querySelector('script[src*="figures.js"]').src).href;
  library.onload = () => {
    for (const figure of figures) {
      const told = JSON.parse(figure.querySelector("script").textContent);
      delete told.layout.width;
      Plotly.newPlot(figure, told.data, told.layout, { responsive: true, displaylogo: false });
    }
  };
  document.head.append(library);
});
