// The page works without this: it sorts, filters, compares and opens samples. Text from outside is only ever set as
// textContent, never as markup.
"use strict";
(() => {
  document.documentElement.classList.add("js");
  const $ = (id) => document.getElementById(id);

  const make = (tag, properties = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name === "class") node.className = value;
      else if (name in node) node[name] = value;
      else node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  };

  const unpacked = async (id) => {
    const text = $(id).textContent;
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  };

  const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(4);
  const counted = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

  // Waits until typing pauses, so that long lists are not made anew for each letter.
  const later = (action, ms = 120) => {
    let timer;
    return () => {
      clearTimeout(timer);
      timer = setTimeout(action, ms);
    };
  };

  // What costs time is made when the reader comes near it, or prints.
  const near = (node, action) => {
    let done = false;
    const once = () => {
      if (!done) action();
      done = true;
    };
    new IntersectionObserver((entries, watcher) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      watcher.disconnect();
      once();
    }, { rootMargin: "500px" }).observe(node);
    addEventListener("beforeprint", once);
  };

  // --- Tables that sort ------------------------------------------------------------------------------------------

  const sortable = (table) => {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = head.querySelector("button");
      if (!button) return;
      button.addEventListener("click", () => {
        const before = head.getAttribute("aria-sort");
        const first = column === 0 || button.dataset.high === "0" ? "ascending" : "descending";
        const order = before === "none" ? first : before === "ascending" ? "descending" : "ascending";
        heads.forEach((other) => other.hasAttribute("aria-sort") && other.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", order);
        const sign = order === "ascending" ? 1 : -1;
        const key = (row) => {
          const cell = row.cells[column];
          if (column === 0) return cell.textContent.trim();
          return cell.dataset.v === undefined || cell.dataset.v === "" ? null : Number(cell.dataset.v);
        };
        const keyed = [...table.tBodies[0].rows].map((row) => [key(row), row]);
        keyed.sort(([a], [b]) => {
          if (a === null || b === null) return (a === null) - (b === null); // without a number last, either way
          return sign * (column === 0 ? a.localeCompare(b, "en", { numeric: true }) : a - b);
        });
        table.tBodies[0].append(...keyed.map(([, row]) => row));
      });
    });
  };
  sortable($("board"));
  document.querySelectorAll("table.sortable").forEach(sortable);

  const filterBoard = () => {
    const model = $("find-model").value.trim().toLowerCase();
    const task = $("find-task").value.trim().toLowerCase();
    const all = $("all-metrics").checked;
    const board = $("board");
    const shown = [...board.tHead.rows[0].cells].map(
      (head, column) =>
        column === 0 || ((all || !head.classList.contains("more")) && head.dataset.task.toLowerCase().includes(task)),
    );
    let rows = 0;
    for (const row of board.rows) {
      const head = row.parentNode === board.tHead;
      const hidden = !head && !row.dataset.model.toLowerCase().includes(model);
      row.hidden = hidden;
      rows += !head && !hidden;
      for (let column = 1; column < shown.length; column++) row.cells[column].hidden = !shown[column];
    }
    const columns = shown.filter(Boolean).length - 1;
    $("shown").textContent = `${counted(rows, "model")}, ${counted(columns, "column")}`;
  };
  for (const id of ["find-model", "find-task"]) $(id).addEventListener("input", later(filterBoard, 60));
  $("all-metrics").addEventListener("change", filterBoard);

  document.querySelectorAll("[data-open]").forEach((button) =>
    button.addEventListener("click", () => {
      const details = $("chart-list").querySelectorAll("details");
      const open = button.textContent === "Unfold all";
      details.forEach((one) => (one.open = open));
      button.textContent = open ? "Fold all" : "Unfold all";
    }),
  );

  const options = (select, texts, chosen) => {
    select.replaceChildren(...texts.map((text, number) => make("option", { value: String(number), textContent: text })));
    if (chosen !== undefined) select.value = String(chosen);
  };

  const pager = (box, page, pages, go) => {
    if (pages < 2) return box.replaceChildren();
    const button = (text, to, usable) => {
      const one = make("button", { type: "button", textContent: text, disabled: !usable });
      one.addEventListener("click", () => go(to));
      return one;
    };
    box.replaceChildren(
      button("Previous", page - 1, page > 0),
      make("span", { textContent: `page ${page + 1} of ${pages}` }),
      button("Next", page + 1, page + 1 < pages),
    );
  };

  // --- Paired comparisons ----------------------------------------------------------------------------------------

  const SVG = "http://www.w3.org/2000/svg";
  const interval = (low, difference, high, widest, shown) => {
    const box = document.createElementNS(SVG, "svg");
    box.setAttribute("class", "interval");
    box.setAttribute("viewBox", "0 0 176 22");
    box.setAttribute("role", "img");
    box.setAttribute("aria-label", `from ${signed(low)} to ${signed(high)}`);
    const at = (value) => 88 + (80 * Math.max(-widest, Math.min(widest, value))) / (widest || 1);
    const draw = (tag, attributes) => {
      const node = document.createElementNS(SVG, tag);
      for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
      box.append(node);
    };
    draw("line", { class: "zero", x1: 88, x2: 88, y1: 1, y2: 21 });
    draw("line", { class: shown ? "" : "none", x1: at(low), x2: at(high), y1: 11, y2: 11 });
    draw("circle", { class: shown ? "" : "none", cx: at(difference), cy: 11, r: 4 });
    return box;
  };

  const startPairs = async () => {
    const data = await unpacked("data-comparisons");
    const rows = data.rows.map((row) => {
      const [column, a, b, n, unpaired, va, vb, difference, low, high, p, detectable, test, notes, verdict] = row;
      return { column, a, b, n, unpaired, va, vb, difference, low, high, p, detectable, test, notes, verdict };
    });
    const turned = (r) => ({
      ...r, a: r.b, b: r.a, va: r.vb, vb: r.va, difference: -r.difference, low: r.high === null ? null : -r.high, high: r.low === null ? null : -r.low, verdict: r.verdict === 2 ? 2 : -r.verdict,
    });
    const byPair = new Map();
    rows.forEach((r) => {
      const key = r.a < r.b ? `${r.a} ${r.b}` : `${r.b} ${r.a}`;
      if (!byPair.has(key)) byPair.set(key, []);
      byPair.get(key).push(r);
    });
    const tasks = [...new Set(data.columns.map((column) => column[0]))];
    const ALL = "-1";
    for (const [id, chosen] of [["pair-a", rows[0].a], ["pair-b", rows[0].b]]) {
      options($(id), data.models, chosen);
      $(id).prepend(make("option", { value: ALL, textContent: "any model" }));
      $(id).value = String(chosen);
    }
    $("pair-task").append(...tasks.map((task) => make("option", { value: task, textContent: task })));
    const PAGE = 60;
    let page = 0;
    const show = () => {
      const [a, b] = [Number($("pair-a").value), Number($("pair-b").value)];
      const task = $("pair-task").value;
      const only = $("pair-shown").checked;
      const near = a >= 0 && b >= 0 ? byPair.get(a < b ? `${a} ${b}` : `${b} ${a}`) || [] : rows;
      const found = near
        .filter(
          (r) =>
            (a < 0 || r.a === a || r.b === a) && (b < 0 || r.a === b || r.b === b) &&
            (!task || data.columns[r.column][0] === task) && (!only || r.verdict !== 0),
        )
        .map((r) => ((a >= 0 && r.a !== a) || (a < 0 && b >= 0 && r.b !== b) ? turned(r) : r));
      const widest = Math.max(0, ...found.map((r) => Math.max(Math.abs(r.low), Math.abs(r.high))).filter(Number.isFinite));
      const cell = (text, name = "n") => make("td", { class: name, textContent: text });
      const pages = Math.ceil(found.length / PAGE);
      page = Math.min(page, Math.max(0, pages - 1));
      const lines = found.slice(page * PAGE, (page + 1) * PAGE).map((r) => {
        const [name, metric, filter] = data.columns[r.column];
        const label = filter === "none" || filter === "" ? metric : `${metric}, ${filter}`;
        const notes = r.notes.map((number) => data.notes[number]);
        if (r.unpaired) notes.push(`${counted(r.unpaired, "document")} found no partner`);
        const drawn = make("td");
        if (r.low !== null && r.high !== null) drawn.append(interval(r.low, r.difference, r.high, widest, r.verdict !== 0));
        const verdict = r.verdict === 2 ? "different" : r.verdict > 0 ? "better" : r.verdict < 0 ? "worse" : "no difference shown";
        return make(
          "tr", {},
          make("th", { scope: "row" }, name, make("span", { class: "under", textContent: label })),
          make("td", { class: "pair", textContent: `${data.models[r.a]} / ${data.models[r.b]}` }),
          cell(r.va === null ? "–" : r.va.toFixed(4)), cell(r.vb === null ? "–" : r.vb.toFixed(4)),
          cell(r.difference === null ? "–" : signed(r.difference)), drawn,
          make("td", { class: "n", title: data.tests[r.test], textContent: data.chances[r.p] }),
          cell(verdict, r.verdict ? "verdict shown" : "verdict muted"), cell(r.n.toLocaleString("en")),
          cell(r.detectable === null ? "–" : r.detectable.toFixed(4)),
          make("td", {}, ...notes.map((note) => make("span", { class: "under", textContent: note }))),
        );
      });
      $("pair-table").classList.toggle("one", a >= 0 && b >= 0);
      $("pair-table").tBodies[0].replaceChildren(...lines);
      $("pair-count").textContent = counted(found.length, "comparison");
      pager($("pair-pager"), page, pages, (to) => {
        page = to;
        show();
      });
    };
    for (const id of ["pair-a", "pair-b", "pair-task", "pair-shown"]) {
      $(id).addEventListener("change", () => {
        page = 0;
        show();
      });
    }
    show();
  };

  // --- Samples ---------------------------------------------------------------------------------------------------

  const startSamples = () => {
    const PAGE = 25;
    const loaded = new Map();
    let block = null;
    let page = 0;
    let found = [];
    let wanted = 0; // the last task that was asked for: a slower one that opens later must not replace it

    const text = (value) => (typeof value === "string" ? value : JSON.stringify(value, null, 1) ?? "");

    const value = (answer, [by, name]) => answer?.[3]?.[by]?.[name];
    // The chosen measure or, of a document whose subtask has others, the first of its own.
    const measured = (...answers) => {
      const chosen = block.measures[Number($("s-metric").value)] ?? ["", "", null];
      return [chosen, ...block.measures].find((m) => answers.some((answer) => value(answer, m) !== undefined)) ?? chosen;
    };
    const figure = (v) => (typeof v === "number" ? (Number.isInteger(v) ? String(v) : v.toFixed(4)) : v === undefined ? "–" : text(v));

    const open = async (number) => {
      wanted = number;
      $("s-count").textContent = "Opening…";
      if (!loaded.has(number)) {
        const data = await unpacked(`block-${number}`);
        loaded.set(number, data);
      }
      if (wanted !== number) return;
      const [oldA, oldB] = block ? [block.models[$("s-a").value], block.models[$("s-b").value]] : [];
      block = loaded.get(number);
      const at = (name, otherwise) => (block.models.includes(name) ? block.models.indexOf(name) : otherwise);
      options($("s-a"), block.models, at(oldA, 0));
      options($("s-b"), block.models, at(oldB, Math.min(1, block.models.length - 1)));
      options($("s-metric"), block.measures.map(([by, name]) => (by === "none" ? name : `${name}, ${by}`)), 0);
      refresh();
    };

    const refresh = () => {
      if (!block) return;
      const a = Number($("s-a").value);
      const b = Number($("s-b").value);
      const which = $("s-which").value;
      const words = $("s-text").value.trim().toLowerCase();
      const has = (content) => text(content).toLowerCase().includes(words);
      found = [];
      block.answers.forEach((row, index) => {
        const [one, other] = [row[a], row[b]];
        if (!one && !other) return;
        const measure = measured(one, other);
        const [x, y] = [value(one, measure), value(other, measure)];
        // Above 0 where A is better; 0 too where the task does not say which direction is.
        const better = typeof x === "number" && typeof y === "number" ? (x - y) * (measure[2] === null ? 0 : measure[2] ? 1 : -1) : 0;
        if (which === "score" && JSON.stringify(x) === JSON.stringify(y)) return;
        if (which === "a" && !(better > 0)) return;
        if (which === "b" && !(better < 0)) return;
        if (which === "answer" && JSON.stringify(chosen(one, index)) === JSON.stringify(chosen(other, index))) return;
        if (words) {
          const doc = block.docs[index];
          const prompts = [one, other].filter(Boolean).map((answer) => block.prompts[answer[0] < 0 ? doc[2] : answer[0]]);
          const parts = [...prompts, doc[3], doc[4], doc[5], one?.[1], other?.[1]];
          if (!parts.some((part) => part !== undefined && has(part))) return;
        }
        found.push(index);
      });
      page = 0;
      list();
    };

    // What a model answered: its text, or of choices the likeliest one.
    const chosen = (answer, index) => {
      if (!answer) return null;
      const choices = block.docs[index][4];
      if (!choices.length) return answer[1];
      let best = 0;
      answer[1].forEach((given, number) => {
        if (given[0][0] > answer[1][best][0][0]) best = number;
      });
      return best;
    };

    // 1 is right only where more is better: that a stereotype was preferred is not.
    const marked = (name, v, more) => {
      const known = more !== true ? null : v === 1 ? ["yes", "✓", "right"] : v === 0 ? ["no", "✗", "wrong"] : null;
      if (!known) return make("span", { textContent: `${name} ${figure(v)}` });
      const [good, sign, word] = known;
      return make("span", { class: good, textContent: `${name} ${sign} ` }, make("span", { class: "sr", textContent: word }));
    };

    const list = () => {
      const pages = Math.ceil(found.length / PAGE);
      const [a, b] = [Number($("s-a").value), Number($("s-b").value)];
      const shown = found.slice(page * PAGE, (page + 1) * PAGE);
      $("s-list").replaceChildren(
        ...shown.map((index) => {
          const [subtask, id, prompt, target, , doc] = block.docs[index];
          const row = block.answers[index];
          const measure = measured(row[a], row[b]);
          const title = (block.subtasks.length > 1 ? `${block.subtasks[subtask]} ` : "") + `#${id}`;
          const one = make("details", { class: "sample" });
          one.append(
            make("summary", {},
              make("span", { class: "what" }, make("b", { textContent: title }), ` ${gist(doc, block.prompts[prompt], target)}`),
              make("span", { class: "marks" }, marked("A", value(row[a], measure), measure[2]), " \u00a0 ", marked("B", value(row[b], measure), measure[2]))),
          );
          one.addEventListener("toggle", () => one.open && one.childElementCount === 1 && one.append(body(index, a, b)));
          return one;
        }),
      );
      const unknown = ["a", "b"].includes($("s-which").value) && block.measures[Number($("s-metric").value)]?.[2] === null;
      $("s-count").textContent = `${counted(found.length, "document")} of ${block.docs.length.toLocaleString("en")}` +
        (unknown ? "; the task does not say which direction of this metric is better" : "");
      pager($("s-pager"), page, pages, (to) => {
        page = to;
        list();
        $("s-count").scrollIntoView({ block: "nearest" });
      });
    };

    const gist = (doc, prompt, target) => {
      const known = ["question", "query", "problem", "prompt", "input", "text", "q", "ctx", "goal"];
      const field = known.find((name) => typeof doc?.[name] === "string" && doc[name].trim());
      const source = field ? doc[field] : prompt ? prompt.slice(-240) : text(target);
      return source.replace(/\s+/g, " ").slice(0, 160);
    };

    // A text with what was searched for marked in it.
    const block_of = (content) => {
      const node = make("pre", { tabIndex: 0 });
      const words = $("s-text").value.trim();
      const whole = text(content);
      if (!words) node.textContent = whole;
      else {
        const lower = whole.toLowerCase();
        let from = 0;
        // Lower case can be longer than the text (İ): then positions do not match and nothing is marked.
        const usable = lower.length === whole.length;
        for (let at = usable ? lower.indexOf(words.toLowerCase()) : -1; at >= 0; at = lower.indexOf(words.toLowerCase(), from)) {
          node.append(whole.slice(from, at), make("mark", { textContent: whole.slice(at, at + words.length) }));
          from = at + words.length;
        }
        node.append(whole.slice(from));
      }
      return node;
    };

    const body = (index, a, b) => {
      const [, , prompt, target, choices, doc] = block.docs[index];
      const row = block.answers[index];
      const own = (answer) => (answer ? (answer[0] < 0 ? prompt : answer[0]) : prompt);
      const box = make("div", { class: "body" });
      const heading = (words) => make("h4", { textContent: words });
      const same = own(row[a]) === own(row[b]) || !row[a] || !row[b];
      if (same) box.append(heading("Prompt"), block_of(block.prompts[own(row[a] ?? row[b])]));
      const target_text = choices.length && /^\d+$/.test(text(target)) && choices[Number(target)] !== undefined
        ? `${text(target)}:${choices[Number(target)]}` : text(target);
      const two = make("div", { class: "two" });
      for (const [letter, m] of [["A", a], ["B", b]]) {
        const side = make("div", {}, heading(`${letter}: ${block.models[m]}`));
        const answer = row[m];
        if (!answer) side.append(make("p", { class: "muted", textContent: "has no answer to this document" }));
        else {
          if (!same) side.append(heading("Prompt"), block_of(block.prompts[own(answer)]));
          if (choices.length) side.append(likelihoods(choices, answer, chosen(answer, index), target));
          else for (const given of answer[1]) for (const one of given) side.append(block_of(one));
          for (const [by, filtered] of Object.entries(answer[2])) {
            side.append(heading(`through the filter ${by}`), block_of(filtered.length === 1 ? filtered[0] : filtered));
          }
          const metrics = Object.entries(answer[3]).flatMap(([by, of]) =>
            Object.entries(of).map(([name, v]) => `${by === "none" ? name : `${name}, ${by}`}: ${figure(v)}`));
          side.append(make("p", { class: "muted", textContent: metrics.join(" · ") }));
        }
        two.append(side);
      }
      box.append(two, heading("Target"), block_of(target_text));
      const whole = make("details", {}, make("summary", { class: "muted", textContent: "the document as the data set has it" }));
      whole.addEventListener("toggle", () => whole.open && whole.childElementCount === 1 && whole.append(block_of(doc)));
      box.append(whole);
      return box;
    };

    const likelihoods = (choices, answer, best, target) => {
      const lines = choices.map((choice, number) =>
        make("tr", { class: number === best ? "chosen" : "" },
          make("td", { textContent: choice.trim() }),
          make("td", { class: "n", textContent: figure(answer[1][number]?.[0]?.[0]) }),
          make("td", {}, [number === best ? "likeliest" : "", String(number) === text(target) ? "target" : ""].filter(Boolean).join(", "))));
      return make("div", { class: "scroll" }, make("table", {},
        make("thead", {}, make("tr", {}, ...["choice", "log-likelihood", ""].map((name, i) => make("th", { scope: "col", class: i === 1 ? "n" : "", textContent: name })))),
        make("tbody", {}, ...lines)));
    };

    $("s-task").addEventListener("change", () => open(Number($("s-task").value)));
    for (const id of ["s-a", "s-b", "s-metric", "s-which"]) $(id).addEventListener("change", refresh);
    $("s-text").addEventListener("input", later(refresh));

    near($("sample-controls"), () => block || open(Number($("s-task").value)));
  };

  if (typeof DecompressionStream === "undefined") {
    for (const id of ["pair-count", "s-count"]) if ($(id)) $(id).textContent = "This browser is too old to open the compressed data.";
  } else {
    if ($("data-comparisons")) near($("pair-table"), startPairs);
    if ($("s-task")) startSamples();
  }
  filterBoard();
  document.documentElement.dataset.ready = "yes";
})();
