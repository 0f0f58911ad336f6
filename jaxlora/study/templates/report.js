"use strict";
// The predictions browser. All text from models and data goes through textContent, never through markup.
// A link can name a view: report.html?first=RUN_ID&second=RUN_ID&filter=format&words=apples#predictions
const { models, problems } = JSON.parse(document.getElementById("data").textContent);
const [TEXT, EXTRACTED, STRICT, NUMERIC, TRUNCATED] = [0, 1, 2, 3, 4];
const PAGE = 10;
const byId = (id) => document.getElementById(id);

const FILTERS = {
  one: (a, b) => a[STRICT] !== b[STRICT],
  first: (a, b) => a[STRICT] && !b[STRICT],
  second: (a, b) => !a[STRICT] && b[STRICT],
  wrong: (a, b) => !a[STRICT] || !b[STRICT],
  nobox: (a, b) => a[EXTRACTED] === null || b[EXTRACTED] === null,
  truncated: (a, b) => a[TRUNCATED] || b[TRUNCATED],
  format: (a, b) => a[STRICT] !== a[NUMERIC] || b[STRICT] !== b[NUMERIC],
  all: () => true,
};

let start = 0;

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function marks(answer) {
  const found = [answer[STRICT] ? ["right", "right"] : ["wrong", "wrong"]];
  if (answer[NUMERIC] && !answer[STRICT]) found.push(["", "right number, other format"]);
  if (answer[EXTRACTED] === null) found.push(["", "no box"]);
  if (answer[TRUNCATED]) found.push(["", "truncated"]);
  return found.map(([name, text]) => element("span", `mark ${name}`, text));
}

function answerCard(model, answer) {
  const card = element("div", "answer");
  card.append(element("h4", "", model.id), ...marks(answer));
  if (answer[EXTRACTED] !== null) card.append(element("span", "mark", `answer: ${answer[EXTRACTED]}`));
  card.append(element("pre", "", answer[TEXT]));
  return card;
}

function problemCard(problem, chosen) {
  const card = element("article", "problem");
  const answers = element("div", "answers");
  answers.append(...chosen.map((i) => answerCard(models[i], problem.answers[i])));
  card.append(
    element("h3", "", `Problem ${problem.index} · reference answer ${problem.reference}`),
    element("p", "", problem.question),
    answers,
  );
  return card;
}

function show() {
  const [first, second] = [Number(byId("first").value), Number(byId("second").value)];
  const filter = FILTERS[byId("filter").value];
  const words = byId("words").value.toLowerCase();
  const holds = (text) => text.toLowerCase().includes(words);
  const found = problems.filter(
    ({ question, answers }) =>
      filter(answers[first], answers[second]) &&
      (!words || holds(question) || holds(answers[first][TEXT]) || holds(answers[second][TEXT])),
  );
  start = Math.max(0, Math.min(start, Math.floor((found.length - 1) / PAGE) * PAGE));
  const page = found.slice(start, start + PAGE);
  const range = found.length ? `${start + 1} to ${start + page.length} of ` : "";
  byId("count").textContent = `${range}${found.length} found among ${problems.length} problems`;
  byId("back").disabled = start === 0;
  byId("next").disabled = start + PAGE >= found.length;
  const chosen = first === second ? [first] : [first, second];
  byId("list").replaceChildren(...page.map((problem) => problemCard(problem, chosen)));
}

function begin() {
  if (!models.length) {
    byId("no-predictions").hidden = false;
    return;
  }
  for (const id of ["first", "second"]) {
    byId(id).append(...models.map((model, i) => Object.assign(element("option", "", model.id), { value: i })));
  }
  // Two conditions with the same seed, if there are such; else the base and the first adapter.
  const first = models.findIndex((model) => model.condition !== null);
  const mate = models.findIndex((m) => first >= 0 && m.seed === models[first].seed && m.condition !== models[first].condition);
  byId("first").value = mate >= 0 ? first : 0;
  byId("second").value = mate >= 0 ? mate : models.length - 1;
  const asked = new URLSearchParams(location.search);
  for (const id of ["first", "second"]) {
    const model = models.findIndex((m) => m.id === asked.get(id));
    if (model >= 0) byId(id).value = model;
  }
  if (Object.hasOwn(FILTERS, asked.get("filter"))) byId("filter").value = asked.get("filter");
  byId("words").value = asked.get("words") ?? "";
  const again = () => { start = 0; show(); };
  for (const id of ["first", "second", "filter"]) byId(id).addEventListener("change", again);
  byId("words").addEventListener("input", again);
  byId("back").addEventListener("click", () => { start -= PAGE; show(); });
  byId("next").addEventListener("click", () => { start += PAGE; show(); });
  byId("browser").hidden = false;
  show();
}

begin();
