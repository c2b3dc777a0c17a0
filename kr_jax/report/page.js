'use strict';
// Draws the charts of a report, again when the theme changes, when its axis is switched, and before printing.
(() => {
  const read = id => JSON.parse(document.getElementById(id).textContent);
  const charts = read('charts'), themes = read('themes');
  const dark = matchMedia('(prefers-color-scheme: dark)');
  const drawn = new Map(); // box -> its axis and theme, and the view that shows them

  // A specification names its colours in ranges alone; data have no such key.
  const themed = (spec, palette) => JSON.parse(JSON.stringify(spec), (key, x) =>
    key === 'range' && Array.isArray(x) ? x.map(c => Object.hasOwn(palette, c) ? palette[c] : c) : x);

  const chosen = box => {
    const input = box.closest('figure').querySelector('input:checked');
    return input ? input.value : Object.keys(charts[box.dataset.chart])[0];
  };

  async function draw(box, theme) {
    const axis = chosen(box), key = `${axis} ${theme}`, last = drawn.get(box);
    if (last && last.key === key) return;
    const now = {key, result: null};
    drawn.set(box, now);
    try {
      const canvas = document.createElement('div');
      if (!last) box.replaceChildren(canvas); else box.append(canvas);
      now.result = await vegaEmbed(canvas, themed(charts[box.dataset.chart][axis], themes[theme].palette), {
        mode: 'vega-lite', renderer: 'svg', actions: false, ast: true, config: themes[theme].config,
        tooltip: {theme: theme === 'dark' ? 'dark' : 'light'}});
      if (drawn.get(box) !== now) { // it was asked for another meanwhile
        now.result.finalize();
        canvas.remove();
        return;
      }
      if (last && last.result) last.result.finalize();
      box.replaceChildren(canvas);
    } catch (error) {
      console.error(box.dataset.chart, error);
      const said = document.createElement('p');
      said.className = 'failed';
      said.textContent = `This chart could not be drawn: ${error.message}`;
      box.replaceChildren(said);
    }
  }

  // A chart in closed details is drawn when they are opened.
  const all = theme => Promise.all([...document.querySelectorAll('.canvas')].filter(
    box => !box.closest('details:not([open])')).map(box => draw(box, theme)));
  const theme = () => dark.matches ? 'dark' : 'light';
  const again = () => all(theme());

  dark.addEventListener('change', again);
  document.addEventListener('toggle', again, true);
  document.addEventListener('change', event => event.target.closest('fieldset.axes') && again());
  addEventListener('beforeprint', () => all('light'));
  addEventListener('afterprint', again);
  again().then(() => { document.documentElement.dataset.drawn = 'yes'; });
})();
