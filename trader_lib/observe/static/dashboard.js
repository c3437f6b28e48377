"use strict";
// The page of a session. Everything that comes from it is put in place as text, never as markup.

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const LOST_MS = 4000;
let view = {}, heard = 0, filter = "", filtered = null, opened = new Set(), checks = new Map(), operator = null, asking = null;

function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") for (const [event, what] of Object.entries(value)) made.addEventListener(event, what);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return made;
}
function svg(tag, attributes, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
const put = (id, ...children) => $(id).replaceChildren(...children);

// ---- how figures are written
const fixed = (digits) => new Intl.NumberFormat("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const MONEY = fixed(2), TWO = fixed(2), FREE = new Intl.NumberFormat("en-US", { maximumFractionDigits: 9 });
const known = (value) => value !== null && value !== undefined && value !== "";
const money = (value) => (known(value) ? MONEY.format(value).replace("-", "−") : "–");
const number = (value) => (known(value) ? FREE.format(value).replace("-", "−") : "–");
const price = (value) => (known(value) ? new Intl.NumberFormat("en-US", { minimumFractionDigits: 2, maximumFractionDigits: 4 }).format(value) : "–");
const percent = (value) => (known(value) ? `${TWO.format(value * 100).replace("-", "−")} %` : "–");
const signed = (text, value) => (known(value) && Number(value) > 0 ? `+${text}` : text);
const moment = (value) => (value ? `${value.slice(0, 10)} ${value.slice(11, 16)}` : "–");
const clock = (value) => (value ? `${value.slice(0, 10)} ${value.slice(11, 19)}` : "–");
const words = (value) => { const told = String(value).replaceAll("_", " "); return told.charAt(0).toUpperCase() + told.slice(1); };
function statistic(name, value) {
  if (typeof value !== "number") return String(value ?? "–");
  if (/_days$/.test(name)) return number(Math.round(value * 10) / 10);
  if (/return|volatility|drawdown|rate|time_in|best_|worst_|at_risk|shortfall|alpha/.test(name)) return percent(value);
  return /equity|fees/.test(name) ? money(value) : number(Math.round(value * 1e4) / 1e4);
}
function lasting(seconds) {
  if (!known(seconds)) return "–";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} days`;
}
function moved(text, value) {
  if (!known(value) || Number(value) === 0) return el("span", {}, text);
  const up = Number(value) > 0;
  return el("span", { class: up ? "up" : "down" }, `${up ? "▲" : "▼"} ${signed(text, value)}`);
}

// ---- head
function badge(id, sign, text, kind) {
  const node = $(id), said = `${sign}${sign ? " " : ""}${text}`;
  if (node.textContent === said && node.className === `badge ${kind}`) return;  // said once to those who listen
  node.className = `badge ${kind}`;
  node.replaceChildren(...(sign ? [el("span", { class: "sign", "aria-hidden": "true" }, sign)] : []), `${sign ? " " : ""}${text}`);
}
function drawHead() {
  const several = view.strategies.length > 1;
  const name = view.strategies.map((one) => one.name).join(", ") || (view.result ? words(view.result.kind) : "Session");
  $("strategy").textContent = name;
  $("run").textContent = view.run + (view.runner && view.condition === "alive" ? ` · process ${view.runner.pid} on ${view.runner.host}` : "");
  const conditions = {
    alive: ["●", "Running", "good"], dead: ["✕", "Dead", "bad"], ended: view.degraded ? ["■", "Ended degraded", "bad"] : ["■", "Ended", ""],
    waiting: ["…", view.behind ? "Reading the journal" : "Not begun", ""], report: ["■", words(view.result ? view.result.status : ""), ""],
  };
  badge("condition", ...conditions[view.condition]);
  const states = { ACTIVE: ["▶", "ACTIVE", "good"], REDUCING: ["▼", "REDUCING", "warn"], HALTED: ["■", "HALTED", "bad"] };
  const [sign, word, kind] = states[view.state];
  badge("state", sign, word, view.condition === "alive" || kind !== "good" ? kind : "");
  $("state").hidden = view.condition === "report" || view.condition === "waiting";
  badge("stage", "", view.stage ? view.stage.toUpperCase() : "–", view.stage === "live" ? "bad" : "");
  $("stage").hidden = !view.stage;
  $("money").hidden = view.stage !== "live";
  document.title = `${view.condition === "alive" ? view.state : conditions[view.condition][1]} · ${name} · trader`;
  $("strategies-card").hidden = !several;
  document.body.classList.toggle("report", view.condition === "report");
  $("decisions-title").textContent = view.condition === "report" ? `Orders and refusals, the latest ${view.decisions.length}` : "Decisions";
  $("seen").textContent = `Seen ${clock(view.seen_at)} UTC · event ${number(view.events)}${view.session_id ? ` · session ${view.session_id}` : ""}. Times are UTC; figures are as of the last bar.`;
}
function drawAlerts() {
  const told = [];
  const lost = heard && performance.now() - heard > LOST_MS;
  document.body.classList.toggle("lost", Boolean(lost));
  if (lost) told.push(["bad", `This page has lost its server: nothing was heard for ${lasting((performance.now() - heard) / 1000)}, and what it shows is old. If the session served it, the session may be dead: trader status ${view.run || "RUN"}`]);
  if (view.behind && view.condition !== "alive") told.push(["info", `Loading: ${number(view.events)} of ${number(view.events + view.behind)} events of the journal are read.`]);
  if (view.condition === "dead") told.push(["bad", `The session is dead: it stopped without an end, and what is open at the broker is still open. trader kill ${view.run} cancels it; trader ${view.stage === "live" ? "live" : "paper"} --resume ${view.run} goes on.`]);
  if (view.trouble) told.push(["bad", `The journal cannot be read: ${view.trouble}`]);
  if (view.condition === "alive" && view.silent_s > 120) told.push(["warn", `The session is alive and has written nothing for ${lasting(view.silent_s)}.`]);
  if (view.asked) told.push(["warn", `An operator wants ${view.asked}; the session has not confirmed it yet.`]);
  if (view.condition !== "report" && view.state && view.state !== "ACTIVE") told.push([view.state === "HALTED" ? "bad" : "warn", `${view.state}: ${view.state_reason}. An operator lifts it by trader resume ${view.run} --by NAME`]);
  for (const one of view.strategies.length > 1 ? view.strategies : []) if (one.reason && one.state !== "ACTIVE") told.push(["warn", `${one.name} is ${one.state}: ${one.reason}`]);
  if (view.books && !view.books.ok) told.push(["bad", `The books differ from the broker's: ${view.books.differences.join("; ")}`]);
  if (view.unanswered && view.unanswered.length) told.push(["warn", `No answer yet on ${view.unanswered.length} order${view.unanswered.length > 1 ? "s" : ""}: ${view.unanswered.slice(0, 3).join(", ")}`]);
  if (view.degraded) told.push(["bad", `The session ended degraded. ${view.degraded}`]);
  if (view.result && view.result.failure && !view.degraded) told.push(["bad", `The run failed: ${view.result.failure}`]);
  const text = told.map(([kind, sentence]) => kind + sentence).join("\n");
  if (drawAlerts.said === text) return;
  drawAlerts.said = text;
  put("alerts", ...told.map(([kind, sentence]) => el("p", { class: `alert ${kind}` }, `${{ bad: "✕", warn: "!", info: "…" }[kind]} ${sentence}`)));
}

// ---- figures
const HEADLINES = ["total_return", "annual_return", "sharpe_ratio", "max_drawdown", "trades", "win_rate"];
function tile(name, value, under) {
  return el("div", { class: "tile" }, el("dl", {}, el("dt", {}, name), el("dd", { "data-figure": name }, value, under ? el("small", {}, under) : "")));
}
function drawFigures() {
  const f = view.figures, tiles = [];
  if (view.condition === "report" && !known(f.equity)) {
    const { statistics, equity_end, orders, refused } = view.result, first = HEADLINES.filter((name) => name in statistics);
    const named = first.length ? first : Object.keys(statistics).slice(0, 8);
    put("figures", ...(known(equity_end) ? [tile("Equity at the end", money(equity_end), "USD")] : []),
      ...named.map((name) => tile(words(name), statistic(name, statistics[name]))), tile("Orders", number(orders), `${number(refused)} refused`));
    return;
  }
  tiles.push(tile("Equity", money(f.equity), `USD · cash ${money(f.cash)}`));
  tiles.push(tile("Day", moved(money(f.day_pl), f.day_pl), percent(f.day_return)));
  tiles.push(tile("Since the start", moved(money(f.total_pl), f.total_pl), percent(f.total_return)));
  tiles.push(tile("Drawdown", el("span", { class: f.drawdown < 0 ? "down" : "" }, percent(f.drawdown)), `deepest ${percent(f.max_drawdown)}`));
  tiles.push(tile("Exposure", known(f.exposure) ? `${TWO.format(f.exposure)} ×` : "–", `${view.positions.length} position${view.positions.length === 1 ? "" : "s"}`));
  tiles.push(tile("Last bar", view.last_bar ? moment(view.last_bar).slice(0, 10) : "–", view.last_bar ? `${view.last_bar.slice(11, 16)} UTC` : "none yet"));
  put("figures", ...tiles);
}

// ---- the curve
let drawn = null;
function drawCurve() {
  const points = view.curve, box = $("chart").getBoundingClientRect(), wide = Math.max(260, box.width), high = box.height || 290;
  if (points.length < 2) { drawn = null; put("chart", el("p", { class: "empty" }, view.condition === "report" ? "Its result holds no curve; report.html in the run folder has one." : "The curve begins with the second bar.")); return; }
  const left = 64, right = wide - 10, top = 8, split = high * 0.72, foot = high - 22;
  const first = points[0][0], last = points[points.length - 1][0];
  let low = Infinity, top_ = -Infinity, peak = -Infinity, deepest = 0;
  const drops = points.map(([, worth]) => { peak = Math.max(peak, worth); const drop = worth / peak - 1; deepest = Math.min(deepest, drop); low = Math.min(low, worth); top_ = Math.max(top_, worth); return drop; });
  if (top_ === low) { top_ += Math.abs(low) * 0.001 + 1; low -= Math.abs(low) * 0.001 + 1; }
  const x = (at) => left + ((at - first) / Math.max(1, last - first)) * (right - left);
  const y = (worth) => split - ((worth - low) / (top_ - low)) * (split - top);
  const base = split + 18, z = (drop) => base + (deepest ? drop / deepest : 0) * (foot - base);
  const made = svg("svg", { viewBox: `0 0 ${wide} ${high}`, "aria-hidden": "true" });
  const compact = new Intl.NumberFormat("en-US", { notation: "compact", maximumSignificantDigits: 4 });
  for (const worth of ticks(low, top_, 4)) {
    made.append(svg("line", { class: "grid", x1: left, x2: right, y1: y(worth), y2: y(worth) }), svg("text", { x: left - 8, y: y(worth) + 4, "text-anchor": "end" }, compact.format(worth)));
  }
  made.append(svg("line", { class: "grid", x1: left, x2: right, y1: base, y2: base }), svg("text", { x: left - 8, y: foot, "text-anchor": "end" }, percent(deepest)));
  const count = Math.max(2, Math.min(6, Math.floor((right - left) / 110)));
  for (let n = 0; n <= count; n += 1) {
    const at = first + ((last - first) * n) / count, when = new Date(at).toISOString();
    const text = last - first > 3 * 86400e3 ? when.slice(0, 10) : when.slice(11, 16);
    made.append(svg("text", { x: x(at), y: high - 5, "text-anchor": n === 0 ? "start" : n === count ? "end" : "middle" }, text));
  }
  const path = points.map(([at, worth], n) => `${n ? "L" : "M"}${x(at).toFixed(1)} ${y(worth).toFixed(1)}`).join("");
  const under = points.map(([at], n) => `L${x(at).toFixed(1)} ${z(drops[n]).toFixed(1)}`).join("");
  made.append(
    svg("path", { class: "area", d: `${path}L${x(last).toFixed(1)} ${split}L${left} ${split}Z` }), svg("path", { class: "line", d: path }),
    svg("path", { class: "under", d: `M${left} ${base}${under}L${x(last).toFixed(1)} ${base}Z` }),
  );
  const cross = svg("line", { class: "cross", y1: top, y2: foot, x1: -9, x2: -9 }), dot = svg("circle", { class: "dot", r: 4, cx: -9, cy: -9 });
  made.append(cross, dot);
  put("chart", made);
  $("chart").setAttribute("aria-label", `Equity from ${money(points[0][1])} to ${money(points[points.length - 1][1])} USD, lowest ${money(low)}, highest ${money(top_)}, deepest drawdown ${percent(deepest)}. Arrow keys read single points.`);
  drawn = { points, drops, x, y, left, right, wide, cross, dot, at: points.length - 1 };
  point(null);
}
function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough)), step = [1, 2, 2.5, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high && found.length < 12; at += step) found.push(at);
  return found;
}
function point(index) {
  if (!drawn) { $("readout").textContent = ""; return; }
  const shown = index === null ? drawn.points.length - 1 : index, [at, worth] = drawn.points[shown];
  drawn.at = shown;
  const place = index === null ? -9 : drawn.x(at);
  drawn.cross.setAttribute("x1", place); drawn.cross.setAttribute("x2", place);
  drawn.dot.setAttribute("cx", place); drawn.dot.setAttribute("cy", index === null ? -9 : drawn.y(worth));
  $("readout").textContent = `${clock(new Date(at).toISOString()).slice(0, 16)} · ${money(worth)} USD · ${percent(drawn.drops[shown])}`;
}
$("chart").addEventListener("pointermove", (event) => {
  if (!drawn) return;
  const box = $("chart").getBoundingClientRect(), wanted = ((event.clientX - box.left) / box.width) * drawn.wide;
  let best = 0;
  drawn.points.forEach(([at], n) => { if (Math.abs(drawn.x(at) - wanted) < Math.abs(drawn.x(drawn.points[best][0]) - wanted)) best = n; });
  point(best);
});
$("chart").addEventListener("pointerleave", () => point(null));
$("chart").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20 }[event.key];
  if (!step || !drawn) return;
  event.preventDefault();
  $("readout").setAttribute("aria-live", "polite");
  point(Math.max(0, Math.min(drawn.points.length - 1, drawn.at + step)));
});
new ResizeObserver(() => { if (view.curve) drawCurve(); }).observe($("chart"));

// ---- tables
function table(id, columns, rows, empty) {
  if (!rows.length) { put(id, el("p", { class: "empty" }, empty)); return; }
  const head = el("tr", {}, ...columns.map((name) => el("th", { scope: "col", class: name.endsWith("#") ? "n" : "" }, name.replace("#", ""))));
  const box = $(id), down = box.scrollTop, along = box.scrollLeft;
  for (const row of rows.flat()) if (row.cells.length === columns.length) columns.forEach((name, n) => row.cells[n].setAttribute("data-name", name.replace("#", "")));
  put(id, el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows.flat())));
  box.scrollTop = down; box.scrollLeft = along;
}
const cell = (content, kind = "") => el("td", { class: kind }, content);
const PURPOSES = { entry: "target", exit: "protective exit" };  // an order that a target asks for, whichever way it goes
const purpose = (value) => PURPOSES[value] || value.replaceAll("_", " ");
function chip(id) {
  return known(id) ? el("button", { class: "chip", type: "button", title: `Everything under ${id}`, on: { click: () => choose(id) } }, id.slice(0, 8)) : "";
}
const matching = (rows) => (filter ? rows.filter((row) => row.correlation_id === filter) : rows);
const several = () => view.strategies.length > 1;
function drawPositions() {
  const own = several();
  table("positions", ["Symbol", ...(own ? ["Strategy"] : []), "Qty#", "Entry#", "Last#", "Value#", "Unrealized#", "Realized#"], view.positions.map((row) => el("tr", {},
    cell(row.symbol), ...(own ? [cell(row.strategy)] : []), cell(number(row.qty), "n"), cell(price(row.avg_entry_price), "n"), cell(price(row.mark), "n"), cell(money(row.market_value), "n"),
    cell(moved(money(row.unrealized_pl), row.unrealized_pl), "n"), cell(money(row.realized_pl), "n"))), "Nothing is held.");
}
function drawOrders() {
  table("open_orders", ["Symbol", "Side", "Type", "Left#", "Limit#", "Stop#", "Status"], view.open_orders.map((row) => el("tr", { title: row.client_order_id },
    cell(row.symbol), cell(row.side), cell(row.type.replaceAll("_", " ")), cell(number(row.remaining), "n"), cell(price(row.limit_price), "n"), cell(price(row.stop_price), "n"), cell(row.status))), "No order is open.");
}
function drawStrategies() {
  table("strategies", ["Strategy", "State", "Equity#", "Cash#", "Positions#", "Why"], view.strategies.map((row) => el("tr", {},
    cell(row.name), cell(row.state), cell(money(row.equity), "n"), cell(money(row.cash), "n"), cell(String(row.positions), "n"), cell(row.reason, "wide"))), "");
}
function drawDecisions() {
  const own = several();
  const columns = ["Bar", "Symbol", ...(own ? ["Strategy"] : []), "Side", "Order", "For", "Risk", "Became", "Why", "Trace"];
  table("decisions", columns, matching(view.decisions).map((row) => {
    const id = row.client_order_id, open = opened.has(id);
    const verdict = row.approved ? "✓ approved" : row.times > 1 ? `✕ refused ${number(row.times)} times` : "✕ refused";
    const toggle = !id ? verdict : el("button", { class: "open", type: "button", "aria-expanded": String(open), on: { click: () => unfold(id) } }, verdict);
    const line = el("tr", {}, cell(moment(row.at)), cell(row.symbol), ...(own ? [cell(row.strategy)] : []), cell(row.side), cell(row.what), cell(purpose(row.purpose)),
      el("td", { class: row.approved ? "" : "down" }, toggle), cell(row.outcome), cell(row.reasons.join(" "), "wide"), cell(chip(row.correlation_id)));
    if (!open) return [line];
    const found = checks.get(id);
    const list = found ? found.map((check) => el("tr", {}, el("td", { class: check.passed ? "up" : "down" }, check.passed ? "✓ passed" : "✕ failed"), cell(words(check.name.toLowerCase()) + (check.scope ? ` (${check.scope})` : "")), cell(check.reason, "wide"))) : [];
    return [line, el("tr", { class: "more" }, el("td", { colspan: String(columns.length) }, el("p", { class: "mono" }, `trader explain ${view.run} ${id}`), found ? el("table", {}, el("tbody", {}, ...list)) : "Asking …"))];
  }), filter ? "No recent decision under this trace." : "Nothing was decided yet.");
}
async function unfold(id) {
  if (opened.has(id)) opened.delete(id); else opened.add(id);
  drawDecisions();
  if (opened.has(id) && !checks.has(id)) {
    const answer = await ask(`api/decisions?order=${encodeURIComponent(id)}`);
    checks.set(id, answer.ok ? [...answer.said.checks].sort((one, other) => one.passed - other.passed) : [{ passed: false, name: "older", scope: "", reason: answer.told }]);
    drawDecisions();
  }
}
function drawFills() {
  const own = several();
  table("fills", ["Time", "Symbol", ...(own ? ["Strategy"] : []), "Side", "Qty#", "Price#", "For", "Trace"], matching(view.fills).map((row) => el("tr", {},
    cell(moment(row.at)), cell(row.symbol), ...(own ? [cell(row.strategy)] : []), cell(row.side), cell(number(row.qty), "n"), cell(price(row.price), "n"), cell(purpose(row.purpose)), cell(chip(row.correlation_id)))), filter ? "No recent fill under this trace." : "No fill yet.");
}
function drawHappenings() {
  const signs = { info: "·", warning: "!", error: "✕" }, kinds = { info: "", warning: "warned", error: "down" };
  table("happenings", ["Time", "", "What"], matching(view.happenings).map((row) => el("tr", {},
    cell(clock(row.at)), el("td", { class: kinds[row.level], "aria-label": row.level }, signs[row.level]), el("td", { class: `wide ${kinds[row.level]}` }, row.sentence))), "Nothing out of the ordinary.");
}
function drawAgents() {
  const signs = { ok: "✓ ok", degraded: "! degraded", down: "✕ down", unknown: "–" }, kinds = { ok: "up", degraded: "warned", down: "down", unknown: "" };
  table("agents", ["Agent", "State", "Events#", "Failures#", "Restarts#", "Last event", "Why"], view.agents.map((row) => el("tr", {},
    cell(row.agent.replaceAll("_", " ")), cell(signs[row.state], kinds[row.state]), cell(number(row.handled), "n"), cell(String(row.failures), "n"), cell(String(row.restarts), "n"), cell(moment(row.last_event_at)), cell(row.reason, "wide"))),
  "No agent has failed. How each is at this moment, only the session's own page can tell.");
}
function drawBooks() {
  const books = view.books;
  if (!books) { put("books", el("p", { class: "empty" }, "Not reconciled yet.")); return; }
  const verdict = books.ok ? el("dd", { class: "up" }, "✓ agrees with the broker") : el("dd", { class: "down" }, "✕ differs from the broker");
  put("books", el("dl", { class: "facts" }, el("dt", {}, "Books"), verdict, el("dt", {}, "Last"), el("dd", {}, `${clock(books.at)} (${lasting(books.age_s)} ago)`)),
    ...(books.differences.length || books.found.length ? [el("ul", { class: "plainlist" }, ...[...books.differences, ...books.found].map((one) => el("li", {}, one)))] : []));
}
function drawResult() {
  const result = view.result;
  $("result-card").hidden = !result;
  if (!result) return;
  const facts = { Run: `${result.kind}, ${result.status}`, Orders: `${number(result.orders)}, ${number(result.refused)} refused`, "Order list": result.order_list_hash || "–" };
  for (const [name, value] of Object.entries(result.statistics)) if (!["orders", "refused"].includes(name)) facts[words(name)] = statistic(name, value);
  put("result", el("dl", { class: "facts many" }, ...Object.entries(facts).map(([name, value]) => el("div", { class: String(value).length > 40 ? "long" : "" }, el("dt", {}, name), el("dd", {}, value)))));
}
function drawLog() {
  const rows = filter ? filtered || [] : view.log;
  const kinds = { WARNING: "warned", ERROR: "down", CRITICAL: "down" };
  table("log", ["Time", "Level", "Agent", "Message", "Trace"], rows.map((row) => el("tr", {},
    cell(row.at.slice(0, 19).replace("T", " ")), cell(row.level, kinds[row.level]), cell(row.agent), cell(row.message, "wide"), cell(chip(row.correlation_id)))),
  filter ? "Nothing was logged under this trace." : "Nothing was logged yet.");
}

// ---- one trace
async function choose(id) {
  filter = id; filtered = null;
  drawFilter();
  if (!id) return;
  const answer = await ask(`api/log?correlation=${encodeURIComponent(id)}`);
  if (filter === id) { filtered = answer.ok ? answer.said : []; drawLog(); }
}
function drawFilter() {
  $("filter").hidden = !filter;
  put("filter", el("span", {}, "Only what belongs to trace ", el("span", { class: "mono" }, filter)), el("button", { class: "chip", type: "button", on: { click: () => choose("") } }, "✕ show all"));
  drawDecisions(); drawFills(); drawHappenings(); drawLog();
}

// ---- stopping
async function ask(path, body) {
  try {
    const sent = body === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json", "X-Trader-CSRF": (operator && operator.csrf) || "" }, body: JSON.stringify(body) };
    const answer = await fetch(path, { credentials: "same-origin", cache: "no-store", ...sent });
    const said = await answer.json();
    return { ok: answer.ok, said, told: typeof said.detail === "string" ? said.detail : `The server answered ${answer.status}.` };
  } catch { return { ok: false, said: null, told: "The server did not answer." }; }
}
const ACTIONS = {
  reduce: ["Reduce", "Only orders that shrink a position", "Reduce this session?", "REDUCING: from now on it sends only orders that bring a position nearer to zero. Exits stay."],
  halt: ["Halt", "Cancel what is open, send nothing more", "Halt this session?", "HALTED: it cancels its open orders, protective exits included, and sends nothing more."],
  kill: ["Kill", "Halt, and cancel at the broker itself", "Kill this session?", "HALTED, and every open order of the account is canceled at the broker itself, orders placed by hand included."],
};
function drawControls() {
  const over = view.condition === "ended" || view.condition === "report";
  $("stop").hidden = view.condition === "report";
  if (!operator) { put("controls"); return; }
  const resume = el("p", { class: "quiet" }, "To come back: ", el("code", {}, `trader resume ${view.run || "RUN"} --by NAME`), ". Resuming belongs to a shell, not to a page.");
  if (over) { put("controls", el("p", { class: "quiet" }, "The session has ended: there is nothing to stop.")); return; }
  if (!operator.buttons) { put("controls", el("p", { class: "quiet" }, "This page only shows: no token is set (TRADER_MONITORING__TOKEN). From a shell: "), el("code", {}, `trader kill ${view.run || "RUN"}`)); return; }
  if (!operator.csrf) {
    const field = el("input", { type: "password", id: "token", autocomplete: "current-password", required: true });
    const form = el("form", { class: "unlock", on: { submit: (event) => { event.preventDefault(); unlock(field.value); } } }, el("label", {}, "Operator's token ", field), el("button", { class: "act", type: "submit" }, "Unlock the buttons"));
    put("controls", form);
    return;
  }
  put("controls", ...Object.entries(ACTIONS).map(([name, [title, under]]) => el("button", { class: `act ${name}`, type: "button", id: `act-${name}`, on: { click: () => confirmed(name) } }, title, el("small", {}, under))),
    resume, el("button", { class: "link", type: "button", on: { click: lock } }, "Lock the buttons"));
}
function answered(text, bad) { $("answer").textContent = text; $("answer").className = bad ? "bad" : ""; }
async function unlock(token) {
  const answer = await ask("api/unlock", { token });
  if (answer.ok) { operator.csrf = answer.said.csrf; answered("Unlocked.", false); } else answered(answer.told, true);
  drawControls();
  if (answer.ok) $("act-reduce").focus();
}
async function lock() { await ask("api/lock", {}); operator.csrf = null; answered("Locked.", false); drawControls(); }
function confirmed(action) {
  asking = action;
  const [title, , question, text] = ACTIONS[action];
  $("confirm-title").textContent = question;
  const own = action === "kill" && view.stage === "simulated" ? "HALTED: its exchange is a part of the session, which cancels what is open itself." : text;
  $("confirm-text").textContent = `${view.stage === "live" ? "This session trades REAL MONEY. " : ""}${own}`;
  $("flatten-row").hidden = action !== "kill";
  $("flatten").checked = false;
  $("do").textContent = title; $("do").className = action;
  $("confirm").showModal();
  ($("by").value ? $("reason") : $("by")).focus();
}
$("cancel").addEventListener("click", () => $("confirm").close());
$("confirm-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const wish = { action: asking, by: $("by").value, reason: $("reason").value, flatten: asking === "kill" && $("flatten").checked };
  $("confirm").close();
  answered(`${ACTIONS[asking][0]}: asked, waiting for the session …`, false);
  for (const button of document.querySelectorAll("button.act")) button.disabled = true;
  const answer = await ask("api/steer", wish);
  if (answer.ok) answered(`${answer.said.done ? "✓" : "! Something is left to do."} ${answer.said.told.join("\n")}`, !answer.said.done);
  else { answered(answer.told, true); await meet(); }
  drawControls();
});
async function meet() { const answer = await ask("api/operator"); operator = answer.ok ? answer.said : null; drawControls(); }

// ---- what is drawn when what changed
const PARTS = [
  [["run", "condition", "state", "stage", "strategies", "runner", "seen_at", "behind", "result", "events"], drawHead],
  [["condition", "behind", "events", "state", "state_reason", "asked", "books", "unanswered", "trouble", "silent_s", "result", "strategies"], drawAlerts],
  [["figures", "positions", "last_bar", "condition", "result"], drawFigures], [["curve", "condition"], drawCurve], [["positions", "strategies"], drawPositions], [["open_orders"], drawOrders],
  [["strategies"], drawStrategies], [["decisions", "strategies"], drawDecisions], [["fills", "strategies"], drawFills], [["happenings"], drawHappenings], [["agents"], drawAgents],
  [["books"], drawBooks], [["result"], drawResult], [["log"], drawLog],
];
function take(changed) {
  heard = performance.now();
  const before = view.condition;
  Object.assign(view, changed);
  for (const [names, draw] of PARTS) if (names.some((name) => name in changed)) draw();
  if (view.condition !== before) drawControls();
}
function listen() {
  const events = new EventSource("api/events");
  events.addEventListener("view", (event) => take(JSON.parse(event.data)));
  events.addEventListener("beat", () => { heard = performance.now(); });
  events.addEventListener("error", () => { if (events.readyState === EventSource.CLOSED) setTimeout(listen, 2000); });
}
setInterval(() => { if (view.run) drawAlerts(); }, 1000);
meet();
listen();
