"use strict";
// The browser for a run's answers. All text from models and data goes through textContent, never through markup.
// A link can name a view: answers.html?step=12&filter=mixed&words=apples
const { steps } = JSON.parse(document.getElementById("data").textContent);
const PAGE = 5;
const byId = (id) => document.getElementById(id);
const title = ({ kind, step }) => (kind === "eval" ? `evaluation at step ${step}` : `batch ${step}`);
const plain = (value) => (Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(6))));

const some = (test) => ({ answers }) => answers.some(test);
const constant = ({ answers }) => answers.every((one) => one.reward === answers[0].reward);
const FILTERS = {
  all: () => true,
  mixed: (group) => !constant(group),
  constant,
  wrong: some((one) => !one.correct),
  cut: some((one) => one.truncated),
  failed: some((one) => one.failed),
  malformed: some((one) => !one.well_formed),
};

let start = 0;

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function marks(one) {
  const found = [[one.correct ? "right" : "wrong", one.correct ? "right" : "wrong"], ["", `reward ${plain(one.reward)}`]];
  if (typeof one.advantage === "number") found.push(["", `advantage ${one.advantage > 0 ? "+" : ""}${plain(one.advantage)}`]);
  if (!one.well_formed) found.push(["", "not well formed"]);
  if (one.truncated) found.push(["", "cut at the limit"]);
  found.push(["", `${one.tokens} tokens`]);
  if (one.logprob !== null) found.push(["", `log p ${plain(one.logprob)}`]);
  return found.map(([name, text]) => element("span", `mark ${name}`, text));
}

function answerCard(one, number) {
  const card = element("div", "answer");
  card.append(element("h4", "", `Answer ${number + 1}`), ...marks(one));
  card.append(element("p", "note", one.why), element("pre", "", one.text));
  return card;
}

function groupCard(group) {
  const card = element("article", "problem");
  const order = byId("order").value;
  const sign = order === "best" ? -1 : order === "worst" ? 1 : 0;
  const numbered = group.answers.map((one, i) => [one, i]).sort(([a], [b]) => sign * (a.reward - b.reward));
  const answers = element("div", "answers");
  answers.append(...numbered.map(([one, i]) => answerCard(one, i)));
  const several = group.answers.length > 1 ? ` · mean reward ${plain(group.mean)}${constant(group) ? ", constant: teaches nothing" : ""}` : "";
  card.append(
    element("h3", "", `Problem ${group.problem} · reference ${group.reference || "none"}${several}`),
    element("p", "", group.question),
    answers,
  );
  return card;
}

function show() {
  const step = steps[Number(byId("step").value)];
  const words = byId("words").value.toLowerCase();
  const holds = (text) => text.toLowerCase().includes(words);
  const filter = FILTERS[byId("filter").value];
  const found = step.shown.filter((group) => filter(group) && (!words || holds(group.question) || group.answers.some((one) => holds(one.text))));
  start = Math.max(0, Math.min(start, Math.floor((found.length - 1) / PAGE) * PAGE));
  const page = found.slice(start, start + PAGE);
  const range = found.length ? `${start + 1} to ${start + page.length} of ` : "";
  const left = step.groups > step.shown.length ? `; ${step.groups} are in samples/${step.file}` : "";
  byId("count").textContent = `${range}${found.length} found among ${step.shown.length} problems${left}`;
  byId("numbers").replaceChildren(...step.numbers.map(([name, value]) => element("span", "mark", `${name}: ${plain(value)}`)));
  byId("back").disabled = start === 0;
  byId("next").disabled = start + PAGE >= found.length;
  byId("earlier").disabled = Number(byId("step").value) === 0;
  byId("later").disabled = Number(byId("step").value) === steps.length - 1;
  byId("list").replaceChildren(...page.map(groupCard));
}

function begin() {
  byId("step").append(...steps.map((step, i) => Object.assign(element("option", "", title(step)), { value: i })));
  const asked = new URLSearchParams(location.search);
  const named = steps.findIndex(({ kind, step }) => kind === "step" && String(step) === asked.get("step"));
  byId("step").value = Math.max(named, 0);
  if (Object.hasOwn(FILTERS, asked.get("filter"))) byId("filter").value = asked.get("filter");
  byId("words").value = asked.get("words") ?? "";
  const again = () => { start = 0; show(); };
  for (const id of ["step", "filter", "order"]) byId(id).addEventListener("change", again);
  byId("words").addEventListener("input", again);
  const turn = (by) => () => { byId("step").value = Number(byId("step").value) + by; again(); };
  byId("earlier").addEventListener("click", turn(-1));
  byId("later").addEventListener("click", turn(1));
  byId("back").addEventListener("click", () => { start -= PAGE; show(); });
  byId("next").addEventListener("click", () => { start += PAGE; show(); });
  byId("browser").hidden = false;
  show();
}

begin();
