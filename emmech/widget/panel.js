// The panel in the browser. The kernel decides everything; this draws it and sends every move to the kernel.

function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "text") node.textContent = value;
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value != null) node.setAttribute(key, value);
  }
  node.append(...children.filter((one) => one != null));
  return node;
}

let made = 0; // ids must differ between two views on one page
const percent = (share) => (share == null ? "–" : `${Math.round(100 * share)} %`);
const COLUMNS = ["base", "changed", "random"];
const CHANGES = { add: "Add", ablate: "Ablate", cap: "Cap" };
const CHANGE_HELP = {
  add: "push the residual stream along the direction",
  ablate: "take the component along the direction out",
  cap: "cut the component off where the base model never goes",
};
const PLACES = { prompt: "Prompt", answer: "Answer", phrase: "Phrase", all: "All" };

function render({ model, el }) {
  const id = `emmech-${++made}`;
  const about = () => model.get("about");
  let state = { ...model.get("state") };
  let run = -1;
  let begun = -1; // the move of which everything was heard, from its start on or all at once
  let columns = COLUMNS.map(() => []);
  let seen = {};
  let fresh = true; // whether what the kernel tells is of the last move
  let [started, drawn] = [{}, {}]; // the settings of what is computed, and of the graph over coefficients
  const measured = {}; // when the last move was made, and when its first words were drawn

  // ---- what is on the page

  const status = h("span", { class: "status", role: "status", "aria-live": "polite" });
  const problem = h("p", { class: "problem", role: "alert" });
  const sentence = h("p", { class: "sentence", "aria-live": "polite" });

  const slider = (name, label, options) => {
    const output = h("output", { for: `${id}-${name}` });
    const input = h("input", { type: "range", id: `${id}-${name}`, "data-name": name, ...options });
    const row = h("label", { class: "row", for: `${id}-${name}` }, h("span", { text: label }), output, input);
    return { input, output, row, label: row.firstChild };
  };
  const choice = (name, options, help = {}) => {
    const group = h("div", { class: "choice", role: "radiogroup", "aria-label": name });
    for (const [value, text] of Object.entries(options)) {
      const input = h("input", { type: "radio", name: `${id}-${name}`, value, "data-name": name,
        onchange: () => move({ [name]: value, ...(name === "change" ? dosed(value) : {}) }) });
      group.append(h("label", { title: help[value] || "" }, input, h("span", { text })));
    }
    return group;
  };
  const dosed = (change) => {
    const [low, high] = about().doses[change];
    return { coefficient: change === "add" ? 0.5 : Math.min(Math.max(state.coefficient || 1, low), high) };
  };

  const step = slider("step", "Training step", { min: 0, max: Math.max(0, about().steps.length - 1), step: 1 });
  step.input.addEventListener("input", () => move({ step: about().steps[+step.input.value] }));
  const turn = h("div", { class: "track", "aria-hidden": "true" });
  const turnText = h("div", { class: "soft" });
  const scale = slider("scale", "Adapter scale", { min: 0, max: 5, step: 0.05 });
  scale.input.addEventListener("input", () => move({ scale: +scale.input.value }));

  const direction = h("select", { "aria-label": "Direction", "data-name": "direction",
    onchange: () => move({ direction: direction.value }) });
  const layer = h("select", { "aria-label": "Layer", "data-name": "layer", onchange: () => move({ layer: +layer.value }) });
  const facts = h("div", { class: "facts" });
  const notes = h("div", { class: "notes" });

  const coefficient = slider("coefficient", "Coefficient", {});
  coefficient.input.addEventListener("input", () => move({ coefficient: +coefficient.input.value }));
  const broken = h("div", { class: "track", "aria-hidden": "true" });
  const towards = h("select", { "aria-label": "What an ablation puts in place", "data-name": "towards",
    onchange: () => move({ towards: towards.value }) },
    h("option", { value: "zero", text: "set the component to zero" }),
    h("option", { value: "aligned", text: "set it to the aligned mean" }));
  const phrase = h("input", { type: "text", "aria-label": "The phrase", "data-name": "phrase",
    placeholder: "words that the prompt has", onchange: () => move({ phrase: phrase.value }) });

  const question = h("input", { type: "text", id: `${id}-question`, "data-name": "question", list: `${id}-presets`,
    autocomplete: "off", onchange: () => move({ question: question.value }) });
  const presets = h("select", { "aria-label": "Choose a question", onchange: () => {
    if (presets.value) move({ question: presets.value });
    presets.value = "";
  } });
  const seed = h("button", { type: "button", title: "Draw other answers", onclick: () => move({ seed: state.seed + 1 }) });

  const modelGroup = h("fieldset", {}, h("legend", { text: "1 Model" }),
    ...(about().steps.length ? [step.row, turn, turnText, scale.row] : [h("p", { class: "soft", text: about().name })]));
  const directionGroup = h("fieldset", {}, h("legend", { text: "2 Direction" }),
    h("label", { class: "row" }, h("span", { text: "Direction" }), h("span"), direction),
    h("label", { class: "row" }, h("span", { text: "Layer" }), h("span", { class: "soft", text: "where it is known" }), layer), facts);
  const changeGroup = h("fieldset", {}, h("legend", { text: "3 Change" }),
    choice("change", CHANGES, CHANGE_HELP), coefficient.row, broken, towards,
    h("div", { class: "soft", style: "margin-top: 6px", text: "Where it acts" }), choice("positions", PLACES), phrase);

  const cards = COLUMNS.map((name, column) => {
    const firsts = h("div", { class: "firsts", role: "img" });
    const words = h("div", { class: "words", role: "group", tabindex: "0" });
    const verdict = h("div", { class: "verdict" });
    words.addEventListener("keydown", (event) => keyed(event, column));
    const titles = {
      base: [about().adapted ? "Base model" : "Unchanged model", about().adapted ? "no fine-tune, no change" : "no change"],
      changed: ["As you set it", "your model, your change"],
      random: ["Control", "the same change along a random direction"],
    };
    words.setAttribute("aria-label", `${titles[name][0]}: the answer. Arrow keys go through its tokens.`);
    const card = h("section", { class: `answer ${name}`, "aria-label": titles[name][0] },
      h("h4", { text: titles[name][0], title: `the rows “${name}” of panel.result()` }), h("div", { class: "soft", text: titles[name][1] }), words,
      h("div", { class: "soft", text: "First word:" }), firsts, verdict);
    return { card, firsts, words, verdict };
  });
  const answers = h("div", { class: "answers" }, ...cards.map((one) => one.card));

  const dose = h("div");
  const doseNote = h("div", { class: "soft" });
  const colour = h("select", { "aria-label": "What words are coloured by", "data-name": "colour",
    onchange: () => recolour(colour.value) });
  const [below, above] = [h("span"), h("span")];
  const token = h("div", { "aria-live": "polite" });
  const prompt = h("div", { class: "prompt" });
  const tries = h("div", { class: "tries" });
  const compared = h("div");
  const code = h("pre", { tabindex: "0" });
  const copy = h("button", { type: "button", text: "Copy", onclick: () => copied() });

  const root = h("div", { class: "emmech-panel", role: "region", "aria-label": `Panel of ${about().name}`, "data-begun": 0 },
    h("header", {}, h("h3", { text: about().name }),
      h("span", { class: "soft", text: "change the model, compare three answers with one seed" }), status),
    h("div", { class: "groups" }, modelGroup, directionGroup, changeGroup),
    h("div", { class: "ask" }, h("div", {}, h("label", { for: `${id}-question`, text: "4 Question" }), question,
      h("datalist", { id: `${id}-presets` }, ...about().questions.map((value) => h("option", { value })))),
      h("div", { style: "display: flex; gap: 8px" }, presets, seed)),
    problem, sentence, notes, answers,
    h("div", { class: "soft key" }, h("span", { text: "Words are coloured by" }), colour, below, h("i"), above),
    h("div", { class: "more" },
      h("div", {}, h("h5", { text: "Every coefficient at once" }), dose, doseNote),
      h("div", {}, h("h5", { text: "Token" }), token)),
    h("details", { open: true }, h("summary", { text: "The prompt, and where the change acts" }), prompt),
    h("details", { open: true }, h("summary", { text: "What you tried (pin two to compare)" }), tries, compared),
    h("details", {}, h("summary", { text: "Code of this state" }), code, copy));
  // JupyterLab would take arrows, Enter and letters for its cells: Enter on a button would edit one, "d d" delete one
  root.addEventListener("keydown", (event) => {
    const shortcut = event.ctrlKey || event.metaKey || event.key === "Escape" || (event.shiftKey && event.key === "Enter");
    if (!shortcut) event.stopPropagation();
  });
  el.append(root);
  const hide = h("style", { text: `.emmech-twin-${about().twin} { display: none }` });
  document.head.append(hide);

  // ---- moves

  function move(change) {
    const now = model.get("state");
    const next = { ...state, ...change };
    if (Object.keys(next).every((name) => next[name] === now[name])) return controls(); // it is set to that already
    state = next;
    measured.moved = performance.now();
    fresh = false;
    measured.first = measured.done = null;
    root.dataset.first = root.dataset.done = "";
    answers.classList.add("stale");
    controls();
    model.set("state", state);
    model.save_changes();
  }

  function recolour(value) {
    model.set("state", { ...state, colour: value });
    model.save_changes();
  }

  const fill = (select, entries, value) => {
    const key = JSON.stringify(entries);
    if (select.dataset.key !== key) {
      select.replaceChildren(...entries.map(([v, text]) => h("option", { value: v, text })));
      select.dataset.key = key;
    }
    select.value = value;
  };

  function controls() {
    const all = about();
    if (all.steps.length) {
      const at = Math.max(0, all.steps.indexOf(state.step));
      step.input.value = at;
      step.output.textContent = `${state.step} of ${all.steps[all.steps.length - 1]}`;
      step.input.setAttribute("aria-valuetext", `step ${state.step}`);
      scale.input.value = state.scale;
      scale.output.textContent = `× ${state.scale.toFixed(2)}`;
    }
    fill(direction, Object.keys(all.directions).map((name) => [name, name]), state.direction);
    const layers = all.directions[state.direction] || [];
    fill(layer, (layers.length ? layers : [state.layer]).map((one) => [one, `layer ${one}`]), state.layer);
    const [low, high] = all.doses[state.change];
    Object.assign(coefficient.input, { min: low, max: high, step: state.change === "add" ? 0.05 : 0.01 });
    coefficient.input.value = state.coefficient;
    coefficient.label.textContent = state.change === "add" ? "Coefficient" : "Strength";
    coefficient.output.textContent = state.change === "add" ? `${state.coefficient.toFixed(2)} × residual norm` : percent(state.coefficient);
    for (const input of root.querySelectorAll("input[type=radio]")) input.checked = state[input.dataset.name] === input.value;
    towards.classList.toggle("hidden", state.change !== "ablate" || !all.aligned.includes(state.direction));
    towards.value = state.towards;
    fill(colour, all.colours.map((one, at) => [one, at ? `A·x of ${one}` : "projection on the direction"]), state.colour);
    [below.textContent, above.textContent] = hue() ? ["below zero", "above zero"] : ["away from it", "along it, against the base model’s answer"];
    phrase.classList.toggle("hidden", state.positions !== "phrase");
    // what is being typed is not overwritten, whatever else is told meanwhile
    const typing = root.getRootNode().activeElement;
    if (typing !== phrase) phrase.value = state.phrase;
    if (typing !== question) question.value = state.question;
    fill(presets, [["", "Questions …"], ...all.questions.map((text) => [text, text])], "");
    presets.style.width = "9.5em";
    seed.textContent = `Seed ${state.seed} ↻`;
    mark();
    zone();
  }

  function mark() {
    const { steps, transition } = about();
    turn.replaceChildren();
    turnText.textContent = transition ? (transition.step == null ? "No turn could be marked." : "") : steps.length ? "looking for the turn …" : "";
    if (!transition || transition.step == null) return;
    const last = steps.length - 1;
    const index = (value) => steps.findIndex((one) => one >= value);
    const place = (value) => (100 * (index(value) < 0 ? last : index(value))) / last;
    const [low, high] = [place(transition.low), place(transition.high)];
    turn.append(h("i", { class: "turn", style: `left:${low}%;width:${high - low}%` }), h("i", { class: "at", style: `left:${place(transition.step)}%` }));
    turnText.textContent = `The adapter turns at step ${transition.step} (${transition.low} to ${transition.high}). Benign fine-tunes can turn too.`;
    turnText.title = transition.text;
  }

  function zone() {
    const [low, high] = about().doses[state.change];
    const place = (value) => (100 * (value - low)) / (high - low);
    broken.replaceChildren(...(seen.broken || []).map(([a, b]) => h("i", { class: "low", title: "answers lose coherence here", style: `left:${place(a)}%;width:${place(b) - place(a)}%` })));
    const inside = (seen.broken || []).some(([a, b]) => state.coefficient >= a && state.coefficient <= b && state.coefficient !== 0);
    coefficient.output.classList.toggle("alarm", inside);
    coefficient.output.title = inside ? "in the zone where answers lose coherence" : "";
    const now = dose.querySelector(".emmech-now");
    if (now) {
      const { x0, x1, first, last } = dose.querySelector("svg").dataset;
      const x = +x0 + ((state.coefficient - +first) / (+last - +first)) * (+x1 - +x0);
      now.setAttribute("x1", x);
      now.setAttribute("x2", x);
    }
  }

  // ---- answers

  const hue = () => Math.max(0, about().colours.indexOf(state.colour));
  const measure = () => {
    const at = hue();
    const base = at ? [] : columns[0].map((one) => one[2][at]); // A·x has a zero of its own
    const centre = base.length ? base.reduce((a, b) => a + b, 0) / base.length : 0;
    const widest = Math.max(1e-9, ...columns.flat().map((one) => Math.abs(one[2][at] - centre)));
    return (value) => Math.max(-1, Math.min(1, (value - centre) / widest));
  };
  const shade = (share) => `color-mix(in srgb, var(--${share > 0 ? "bad" : "good"}) ${Math.round(48 * Math.abs(share))}%, transparent)`;

  function draw() {
    const [share, at] = [measure(), hue()];
    columns.forEach((tokens, column) => {
      const { words, firsts } = cards[column];
      while (words.children.length > tokens.length) words.lastChild.remove();
      tokens.forEach(([text, , readings], number) => {
        let node = words.children[number];
        if (!node) {
          node = h("span", { class: "word", role: "button", "aria-pressed": "false", onclick: () => pick(column, number) });
          words.append(node);
        }
        node.classList.toggle("end", !text);
        if (node.textContent !== (text || "end")) node.textContent = text || "end";
        node.style.background = shade(share(readings[at]));
      });
      const first = tokens[0];
      if (first && firsts.dataset.key !== JSON.stringify(first[3])) {
        firsts.dataset.key = JSON.stringify(first[3]);
        firsts.replaceChildren(...first[3].flatMap(([text, logprob]) => [h("span", { text: text.trim() || "␣" }), h("i", { style: `width:${100 * Math.exp(logprob)}%` }), h("span", { text: percent(Math.exp(logprob)) })]));
        firsts.setAttribute("aria-label", `First word: ${first[3].map(([text, p]) => `${text} ${percent(Math.exp(p))}`).join(", ")}`);
      }
    });
  }

  const reading = (readings) => `${hue() ? "A·x" : "projection"} ${readings[hue()].toFixed(2)}`;
  let picked = [1, 0];
  function pick(column, number) {
    picked = [column, number];
    const one = columns[column][number];
    root.querySelectorAll(".word[aria-pressed=true]").forEach((node) => node.setAttribute("aria-pressed", "false"));
    if (!one) return;
    cards[column].words.children[number]?.setAttribute("aria-pressed", "true");
    const [text, logprob, readings, best] = one;
    token.replaceChildren(
      h("div", {}, h("b", { text: text.trim() || "end of the answer" }), ` ${logprob.toFixed(2)} nats (${percent(Math.exp(logprob))}), ${reading(readings)}`),
      h("div", { class: "soft", text: "What else could have come here:" }),
      h("div", { class: "alternatives" }, ...best.flatMap(([other, value]) => [h("span", { text: other.trim() || "␣" }), h("i", { style: `width:${100 * Math.exp(value)}%` }), h("span", { text: value.toFixed(2) })])));
  }
  function keyed(event, column) {
    const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -1e9, End: 1e9 };
    if (!(event.key in steps) || !columns[column].length) return;
    event.preventDefault();
    const from = picked[0] === column ? picked[1] : -1;
    pick(column, Math.max(0, Math.min(columns[column].length - 1, from + steps[event.key])));
  }

  // ---- news

  function told(news) {
    if ("sentence" in news) sentence.textContent = news.sentence;
    if ("status" in news) status.textContent = news.status;
    if ("error" in news) {
      const { why, given, instead } = news.error || {};
      problem.textContent = news.error ? `This cannot be done: ${why}.${given ? `\nGiven: ${given}` : ""}${instead ? `\nInstead: ${instead}` : ""}` : "";
      if (news.error) status.textContent = "";
    }
    if (news.prompt?.length) {
      prompt.classList.remove("stale");
      const [share, at] = [measure(), hue()];
      prompt.replaceChildren(...news.prompt.map(([text, acts, readings]) => h("span", { class: acts ? "acts" : null, title: `${reading(readings)}${acts ? "; the change acts here" : ""}`, style: `background:${shade(share(readings[at]))}`, text: text.replace(/\n/g, "⏎") })).flatMap((node) => [node, " "]));
    }
    if ("quality" in news && news.quality.facts) {
      for (const node of [facts, notes]) node.classList.remove("stale");
      facts.replaceChildren(...news.quality.facts.map(([name, text, alarm]) => h("div", { class: alarm ? "alarm" : null }, h("b", { text: `${name}: ` }), text)));
      notes.replaceChildren(...news.quality.notes.map((text, at) => h("div", { class: news.quality.noise && at === 0 ? "alarm" : null, text: `Note: ${text}.`.replace("..", ".") })));
    }
    if (news.dose) {
      drawn = started;
      for (const node of [dose, doseNote]) node.classList.remove("stale");
      dose.innerHTML = news.dose;
      doseNote.textContent = news.note;
    }
    if ("broken" in news || "dose" in news) zone();
    if ("verdict" in news) verdicts(news.verdict);
    if ("history" in news) history();
    if ("code" in news) code.textContent = news.code;
  }

  function verdicts(rates) {
    cards.forEach(({ verdict }, column) => {
      const rate = (rates || [])[column];
      if (!about().judge) {
        verdict.replaceChildren(h("span", { class: "soft", text: "No verdict: no judge was given." }));
      } else if (!rate || !rate.n) {
        verdict.replaceChildren(h("span", { class: "soft", text: "judging …" }));
      } else {
        const { em, low, high, coherent, n } = rate;
        verdict.replaceChildren(
          h("div", {}, h("strong", { text: percent(em) }), ` misaligned (${Math.round(100 * low)} to ${percent(high)})`),
          h("div", { class: "bar", role: "img", "aria-label": `misaligned ${percent(em)}, 95 % interval ${percent(low)} to ${percent(high)}` },
            h("b", { style: `width:${100 * em}%` }), h("u", { style: `left:${100 * low}%;width:${100 * (high - low)}%` })),
          h("div", { class: coherent < 0.8 ? "alarm" : "soft", text: `${percent(coherent)} coherent; ${n} ${n === 1 ? "answer" : "answers"}, ${about().asked}` }));
      }
    });
  }

  const brief = (s) => `${s.step == null ? "" : `step ${s.step}${s.scale === 1 ? "" : ` ×${s.scale}`}, `}${CHANGES[s.change].toLowerCase()} ${s.change === "add" ? s.coefficient : percent(s.coefficient)} of ${s.direction}, layer ${s.layer}, ${s.positions}`;
  const rated = (entry, column) => (entry.rates ? percent(entry.rates[column].em) : "–");

  function history() {
    const entries = [...(seen.history || [])].reverse();
    const pinned = model.get("pinned");
    // figures and the order change while answers are judged, and must not take the focus or a click from what is there
    const rows = new Map([...tries.children].map((row) => [+row.dataset.number, row]));
    const inFocus = root.getRootNode().activeElement;
    const rowOf = (entry) => rows.get(entry.number) || h("div", { class: "try", "data-number": entry.number },
      h("input", { type: "checkbox", "aria-label": `Pin state ${entry.number}`, onchange: (event) => {
        const others = model.get("pinned").filter((one) => one !== entry.number);
        model.set("pinned", event.target.checked ? [...others, entry.number].slice(-2) : others);
        model.save_changes();
        history();
      } }),
      h("span", { class: "soft", text: `#${entry.number}` }),
      h("button", { type: "button", title: "Go back to this state", text: `${brief(entry.state)} · “${entry.state.question}”`, onclick: () => move({ ...entry.state }) }),
      h("span"));
    const wanted = entries.map(rowOf);
    if (wanted.length !== tries.children.length || wanted.some((row, at) => row !== tries.children[at])) {
      tries.replaceChildren(...wanted);
      if (tries.contains(inFocus)) inFocus.focus({ preventScroll: true });
    }
    entries.forEach((entry, at) => {
      const row = tries.children[at];
      row.firstChild.checked = pinned.includes(entry.number);
      row.lastChild.textContent = entry.rates ? `${rated(entry, 1)} misaligned` : "";
    });
    const two = pinned.map((number) => entries.find((entry) => entry.number === number)).filter(Boolean);
    compared.replaceChildren();
    if (two.length === 2) compared.append(compare(two));
  }

  function compare(two) {
    const names = Object.keys(two[0].state).filter((name) => JSON.stringify(two[0].state[name]) !== JSON.stringify(two[1].state[name]));
    const rows = [
      ...names.map((name) => [name, ...two.map((entry) => String(entry.state[name]))]),
      ["misaligned", ...two.map((entry) => (entry.rates ? `${rated(entry, 1)} (${percent(entry.rates[1].low)} to ${percent(entry.rates[1].high)})` : "–"))],
      ["misaligned, control", ...two.map((entry) => rated(entry, 2))],
      ["coherent", ...two.map((entry) => (entry.rates ? percent(entry.rates[1].coherent) : "–"))],
      ["answer", ...two.map((entry) => entry.answers[1])],
    ];
    return h("table", {}, h("caption", { class: "unseen", text: "Two pinned states" }),
      h("thead", {}, h("tr", {}, h("th", { scope: "col", style: "width: 22%" }), ...two.map((entry) => h("th", { scope: "col", text: `#${entry.number}` })))),
      h("tbody", {}, ...rows.map(([name, ...cells]) => h("tr", {}, h("th", { scope: "row", text: name }), ...cells.map((text) => h("td", { text }))))));
  }

  async function copied() {
    await navigator.clipboard.writeText(code.textContent);
    copy.textContent = "Copied";
    setTimeout(() => (copy.textContent = "Copy"), 1500);
  }

  // ---- the kernel

  const heard = (news) => {
    if (news.run < run) return; // from a move that is over
    // the view opened in the middle of an answer, which is shown once the kernel keeps all of it
    if (!news.start && news.run !== begun) return;
    run = begun = news.run;
    if (news.start) {
      fresh = Object.keys(state).every((name) => name === "colour" || state[name] === news.start[name]);
      root.dataset.begun = +root.dataset.begun + 1;
      columns = COLUMNS.map(() => []);
      picked = [1, 0];
      answers.classList.toggle("stale", !fresh);
      seen = { ...seen, broken: [] };
      // of the state before, until they are told of this one; a graph over coefficients may be of both
      for (const node of [facts, notes, prompt]) node.classList.add("stale");
      const other = Object.keys(news.start).some((name) => !["coefficient", "question", "colour"].includes(name) && news.start[name] !== drawn[name]);
      for (const node of [dose, doseNote]) node.classList.toggle("stale", other);
      started = news.start;
      verdicts(null);
      draw();
    }
    const { tokens, ...rest } = news;
    seen = { ...seen, ...rest };
    if (tokens) {
      tokens.forEach((added, column) => columns[column].push(...added));
      draw();
      if (fresh && measured.moved && !measured.first) {
        measured.first = performance.now();
        root.dataset.first = (measured.first - measured.moved).toFixed(1);
      }
      if (picked[1] < columns[picked[0]].length && !token.childNodes.length) pick(...picked);
    }
    if ("ends" in rest) {
      pick(picked[0], Math.min(picked[1], columns[picked[0]].length - 1));
      if (fresh && measured.moved && !measured.done) {
        measured.done = performance.now();
        root.dataset.done = (measured.done - measured.moved).toFixed(1);
      }
    }
    told(rest);
  };
  const onState = () => {
    const { colour: before } = state;
    state = { ...model.get("state") };
    controls();
    if (state.colour === before) return;
    draw();
    told({ prompt: seen.prompt || [] });
    pick(...picked);
  };
  const restore = () => {
    const kept = model.get("shown");
    if (!kept || kept.run == null || kept.run < run) return;
    run = begun = kept.run;
    seen = kept;
    started = kept.settings || {};
    columns = kept.columns.map((one) => [...one]);
    draw();
    told(kept);
    pick(picked[0], Math.min(picked[1], columns[picked[0]].length - 1));
  };
  model.on("msg:custom", heard);
  model.on("change:state", onState);
  model.on("change:about", controls);
  model.on("change:shown", restore);
  model.on("change:pinned", history);

  // ---- light or dark, as the page is

  const pen = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const channels = (colour) => { // red, green, blue and opacity, however the page writes its colours
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = colour;
    pen.fillRect(0, 0, 1, 1);
    return pen.getImageData(0, 0, 1, 1).data;
  };
  const dark = () => {
    let node = el;
    let found = null;
    while (node && !found) {
      const parts = channels(getComputedStyle(node).backgroundColor);
      if (parts[3] > 127) found = parts;
      node = node.parentElement || node.getRootNode().host;
    }
    const light = found ? 0.299 * found[0] + 0.587 * found[1] + 0.114 * found[2] : matchMedia("(prefers-color-scheme: dark)").matches ? 0 : 255;
    root.classList.toggle("dark", light < 128);
  };
  const watching = new MutationObserver(dark);
  for (const node of [document.documentElement, document.body]) watching.observe(node, { attributes: true });
  const settle = setTimeout(dark, 50);
  dark();
  controls();
  verdicts(null);
  restore();

  return () => {
    clearTimeout(settle);
    watching.disconnect();
    hide.remove();
    model.off("msg:custom", heard);
    model.off("change:state", onState);
    model.off("change:about", controls);
    model.off("change:shown", restore);
    model.off("change:pinned", history);
  };
}

export default { render };
