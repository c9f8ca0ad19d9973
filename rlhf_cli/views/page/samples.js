"use strict";
// The browser of samples: responses side by side by their prompts, searched and sorted, by mouse
// and by keys. `data.samples` is a list of sets, as views/samples.py makes them.

(() => {
  const PER_PAGE = 10;
  const SCORES = {
    won: "won",
    reward: "reward",
    gold: "gold",
    kl: "KL",
    response_tokens: "length",
  };

  // ------------------------------------------------------------------------- a set of samples

  /** Of the responses of a set, all that `read` gives. */
  function* over(set, read) {
    for (const entry of set.prompts) {
      for (const answers of Object.values(entry.answers)) {
        for (const answer of answers) yield* read(answer);
      }
    }
  }

  /** The names among `names` that some response has. */
  function present(set, names) {
    const seen = new Set(over(set, (answer) => names.filter((name) => answer[name] !== undefined)));
    return names.filter((name) => seen.has(name));
  }

  /** What is coloured in full: all but the greatest hundredth of the values lie below it. */
  function limitOf(set, name) {
    const sizes = Array.from(over(set, (answer) => answer[name] || []), Math.abs);
    sizes.sort((one, other) => one - other);
    return sizes[Math.floor(0.99 * (sizes.length - 1))] || 1e-9;
  }

  function mean(values) {
    return values.length ? values.reduce((sum, each) => sum + each, 0) / values.length : null;
  }

  class Browser {
    constructor(place, sets) {
      this.sets = sets;
      this.list = element("div", { class: "prompts" });
      this.status = element("p", { class: "status", role: "status" });
      this.legend = element("div", { class: "legend" });
      this.form = element("form", { class: "controls", role: "search" });
      const pages = { class: "pager", role: "navigation", "aria-label": "Pages of prompts" };
      this.pager = element("div", pages);
      this.form.addEventListener("submit", (event) => {
        event.preventDefault();
        this.enter(0);
      });
      const keys = element("p", { class: "hint" });
      const key = (name) => element("kbd", {}, name);
      keys.append(
        ...["Keys: Enter in the search goes to the first prompt; there ", key("j"), " and "],
        ...[key("k"), " go to the next and the previous, ", key("["), " and ", key("]")],
        ...[" to other responses, ", key("/"), " to the search; arrows go along coloured tokens."],
      );
      place.append(this.form, keys, this.legend, this.status, this.list, this.pager);
      place.addEventListener("keydown", (event) => this.onKey(event));
      this.list.addEventListener("pointerover", (event) => pick(event.target.closest(".token")));
      this.list.addEventListener("click", (event) => pick(event.target.closest(".token")));
      this.open(0);
    }

    /** Show a set from its beginning. */
    open(number) {
      const set = this.sets[number];
      this.number = number;
      this.set = set;
      this.texts = []; // of each prompt all that is said, in lower case, once it is asked for
      this.scores = present(set, Object.keys(SCORES));
      this.values = present(set, Object.keys(VALUES));
      this.limits = {};
      this.shownOf = new Map(); // entry -> which of its responses
      this.lastOf = set.sources.map((_, source) => {
        const own = set.prompts.flatMap((entry) => entry.answers[source] || []);
        return own.reduce((last, each) => Math.max(last, each.step ?? -1), -1);
      });
      const steps = over(set, (each) => (each.step === undefined ? [] : [each.step]));
      this.steps = [...new Set(steps)].sort((one, other) => one - other);
      this.step = this.steps.length > 1 ? "last" : ""; // of training what it came to
      this.one = 0;
      this.other = set.reference ?? (set.sources.length > 1 ? 1 : 0);
      if (this.other === this.one && set.sources.length > 1) this.one = 1;
      this.score = this.scores[0] ?? null;
      this.colour = this.values[0] ?? "";
      this.order = "file";
      this.only = false;
      this.find = "";
      this.mark = "";
      this.marks = [...new Set(set.prompts.flatMap((entry) => entry.marks ?? []))].sort();
      this.controls();
      this.update();
    }

    controls() {
      const { set } = this;
      const names = set.sources.map((each, i) => [i, named(each.name)]);
      const several = names.length > 1;
      const parts = [];
      if (this.sets.length > 1) {
        const titles = this.sets.map((each, i) => [i, named(each.title)]);
        const choose = (to) => {
          this.open(Number(to));
          this.form.querySelector("select").focus(); // the one that was chosen in is gone
        };
        parts.push(this.select("Samples", titles, this.number, choose));
      }
      this.search = element("input", { type: "search", autocomplete: "off", spellcheck: "false" });
      this.search.addEventListener("input", () => {
        clearTimeout(this.waiting);
        this.waiting = setTimeout(() => this.change({ find: this.search.value }), 120);
      });
      parts.push(this.field("Search", this.search));
      if (several) {
        const pick = (key) => (to) => this.change({ [key]: Number(to) });
        parts.push(this.select("Policy", names, this.one, pick("one")));
        parts.push(this.select("Compared with", names, this.other, pick("other")));
      }
      if (this.scores.length > 1) {
        const scores = this.scores.map((name) => [name, SCORES[name]]);
        parts.push(this.select("Score", scores, this.score, (score) => this.change({ score })));
      }
      this.orders = this.select("Order", [], "", (order) => this.change({ order }));
      parts.push(this.orders);
      if (this.steps.length > 1) {
        const steps = [["last", "the last of each"], ["", "all"]];
        for (const step of this.steps) steps.push([step, String(step)]);
        parts.push(this.select("Step", steps, this.step, (step) => this.change({ step })));
      }
      if (this.values.length) {
        const colours = this.values.map((name) => [name, VALUES[name][0]]);
        const pick = (colour) => this.change({ colour }, true);
        parts.push(this.select("Colour", [...colours, ["", "none"]], this.colour, pick));
      }
      if (this.marks.length > 1) {
        const marks = [["", "all"], ...this.marks.map((each) => [each, each])];
        parts.push(this.select("Show", marks, this.mark, (mark) => this.change({ mark })));
      }
      if (names.length > 2) {
        const only = element("input", { type: "checkbox" });
        only.addEventListener("change", () => this.change({ only: only.checked }, true));
        parts.push(element("label", { class: "check" }, only, "these two alone"));
      }
      this.form.replaceChildren(...parts);
    }

    /** A labelled choice; `then` is called with the value that is chosen. */
    select(label, options, value, then) {
      const choice = element("select");
      for (const [own, text] of options) choice.append(element("option", { value: own }, text));
      choice.value = value;
      choice.addEventListener("change", () => then(choice.value));
      return this.field(label, choice);
    }

    field(label, control) {
      control.id = `samples-${label.toLowerCase().replace(" ", "-")}`;
      const name = element("label", { for: control.id }, label);
      return element("div", { class: "field" }, name, control);
    }

    change(values, samePage = false) {
      Object.assign(this, values);
      this.update(samePage ? this.page : 0);
    }

    /** What the prompts can be ordered by, with the names of what is chosen now. */
    nameOrders() {
      const [one, other] = [this.one, this.other].map((i) => this.set.sources[i]?.name ?? "");
      const score = SCORES[this.score];
      const orders = [["file", "as sampled"], ["file-", "the last first"]];
      if (this.score && this.set.sources.length > 1) {
        const difference = `${score}: ${named(one)} less ${named(other)}`;
        orders.push(["difference", `${difference}, greatest first`]);
        orders.push(["difference-", `${difference}, least first`]);
      }
      if (this.score) {
        orders.push(["score", `${score} of ${named(one)}, greatest first`]);
        orders.push(["score-", `${score} of ${named(one)}, least first`]);
      }
      const choice = this.orders.querySelector("select");
      choice.replaceChildren(...orders.map(([value, text]) => element("option", { value }, text)));
      choice.value = this.order;
    }

    /** The responses of a source to a prompt: all, of one step, or of the last of its steps. */
    answersOf(entry, source) {
      const answers = entry.answers[source] || [];
      if (this.step === "") return answers;
      const step = this.step === "last" ? this.lastOf[source] : Number(this.step);
      return answers.filter((each) => each.step === step);
    }

    /** The mean of a score over these responses. */
    scoreOf(entry, source) {
      const known = this.answersOf(entry, source).map((each) => each[this.score]);
      return mean(known.filter((each) => each !== null && each !== undefined));
    }

    differenceOf(entry) {
      if (!this.score || this.set.sources.length < 2) return null;
      const ours = this.scoreOf(entry, this.one);
      const theirs = this.scoreOf(entry, this.other);
      return ours === null || theirs === null ? null : ours - theirs;
    }

    /** The numbers of the prompts that are searched for, in their order. */
    matching() {
      const find = folded(this.find.trim());
      const order = this.order.replace("-", "");
      const sign = this.order.endsWith("-") ? -1 : 1;
      const found = [];
      this.set.prompts.forEach((entry, i) => {
        const answered = Object.keys(entry.answers).some(
          (source) => this.answersOf(entry, source).length,
        );
        const marked = !this.mark || entry.marks?.includes(this.mark);
        if (answered && marked && (!find || this.textOf(i).includes(find))) found.push(i);
      });
      if (order === "file") return sign > 0 ? found : found.reverse();
      const key = (i) => {
        const entry = this.set.prompts[i];
        return order === "difference"
          ? this.differenceOf(entry)
          : this.scoreOf(entry, this.one);
      };
      const keyed = found.map((i) => [i, key(i)]);
      keyed.sort(([, one], [, other]) => {
        if (one === null || other === null) return (one === null) - (other === null);
        return sign * (other - one);
      });
      return keyed.map(([i]) => i);
    }

    textOf(i) {
      if (this.texts[i] === undefined) {
        const entry = this.set.prompts[i];
        const said = Object.values(entry.answers).flat();
        const texts = [...entry.prompt, ...said].map((each) => each.text);
        this.texts[i] = folded([...texts, ...(entry.said ?? [])].join("\n"));
      }
      return this.texts[i];
    }

    update(page = 0) {
      this.nameOrders();
      this.found = this.matching();
      this.pages = Math.max(1, Math.ceil(this.found.length / PER_PAGE));
      this.page = Math.min(page, this.pages - 1);
      this.explain();
      const first = this.page * PER_PAGE;
      const shown = this.found.slice(first, first + PER_PAGE);
      this.list.replaceChildren(...shown.map((i) => this.card(i)));
      const all = this.set.prompts.length;
      const count = this.found.length === all ? `${all}` : `${this.found.length} of ${all}`;
      const which = shown.length ? `, ${first + 1} to ${first + shown.length} shown` : "";
      const more = this.set.left_out;
      const left = more ? ` ${more} more responses, left out here, are in samples.jsonl.` : "";
      this.status.textContent = `${count} prompts${which}.${left}`;
      this.turns();
      reachable(this.list);
      mark(this.list, folded(this.find.trim()));
    }

    turns() {
      const turn = (label, by) => {
        const button = element("button", { type: "button" }, label);
        button.disabled = this.page + by < 0 || this.page + by >= this.pages;
        button.addEventListener("click", () => this.turn(by, 0));
        return button;
      };
      const place = element("span", {}, `page ${this.page + 1} of ${this.pages}`);
      this.pager.replaceChildren(turn("Previous", -1), place, turn("Next", 1));
      this.pager.hidden = this.pages === 1;
    }

    turn(by, card) {
      this.update(this.page + by);
      this.enter(card);
    }

    /** Put the focus on a prompt of this page. */
    enter(card) {
      const cards = this.list.children;
      const to = cards[card < 0 ? cards.length + card : card];
      if (!to) return;
      to.focus({ preventScroll: true });
      to.scrollIntoView({ block: "nearest" });
    }

    /** What the colours mean. */
    explain() {
      this.legend.hidden = !this.colour;
      if (!this.colour) return;
      const [name, above, below, unit] = VALUES[this.colour];
      this.limits[this.colour] ??= limitOf(this.set, this.colour);
      const most = this.limits[this.colour];
      const bar = element("span", { class: `bar ${above ? "both" : "below"}` });
      const high = above ? `${figure(most)} ${above}` : "0 certain";
      const low = `${figure(-most)} ${below}`;
      this.legend.replaceChildren(`${name} of tokens${unit && `, ${unit}`}: `, low, bar, high);
    }

    // ----------------------------------------------------------------------- a prompt

    card(i) {
      const entry = this.set.prompts[i];
      const title = element("h3", { id: `prompt-${i}` }, `Prompt ${i + 1}`);
      const head = element("header", {}, title);
      const difference = this.differenceOf(entry);
      if (difference !== null) head.append(this.compared(entry, difference));
      const body = element("div", { class: "answers" });
      const card = element(
        "article",
        { class: "prompt", tabindex: "-1", "aria-labelledby": title.id },
        head,
        asked(entry.prompt),
        body,
        ...(entry.said ?? []).map((each) => element("p", { class: "facts" }, ...visible(each))),
      );
      card.entry = entry;
      const counts = this.columns().map((source) => this.answersOf(entry, source).length);
      // then all of its responses are shown
      card.alone = this.set.beside || counts.filter(Boolean).length === 1;
      if (!card.alone && Math.max(...counts) > 1) {
        this.turnToFound(entry);
        head.append(this.stepper(card, Math.max(...counts)));
      }
      this.fill(card);
      return card;
    }

    /** Show the first responses in which what is searched for stands, unless the prompt has it. */
    turnToFound(entry) {
      const find = folded(this.find.trim());
      const says = (each) => folded(each.text).includes(find);
      if (!find || entry.prompt.some(says)) return;
      const places = this.columns().map((each) => this.answersOf(entry, each).findIndex(says));
      const found = places.filter((place) => place >= 0);
      if (found.length) this.shownOf.set(entry, Math.min(...found));
    }

    /** The sources in the order of columns: the two that are compared first. */
    columns() {
      const all = this.set.sources.map((_, i) => i);
      const first = [this.one, this.other].filter((each, i, both) => both.indexOf(each) === i);
      return this.only ? first : [...first, ...all.filter((each) => !first.includes(each))];
    }

    compared(entry, difference) {
      const [ours, theirs] = [this.one, this.other].map((each) =>
        this.scoreOf(entry, each),
      );
      const [one, other] = [this.one, this.other].map((each) => named(this.set.sources[each].name));
      const counts = [this.one, this.other].map((each) => this.answersOf(entry, each).length);
      const sizes = [...new Set(counts)].join(" and ");
      const score = SCORES[this.score] + (Math.max(...counts) > 1 ? `, means of ${sizes}` : "");
      const text = `${score}: ${one} ${figure(ours)}, ${other} ${figure(theirs)}, `;
      const side = difference > 0 ? "up" : difference < 0 ? "down" : "";
      const change = element("b", { class: side }, `difference ${signed(difference)}`);
      return element("p", { class: "compared" }, text, change);
    }

    stepper(card, most) {
      const label = element("span", { role: "status" });
      const turn = (text, name, by) => {
        const button = element("button", { type: "button", "aria-label": name }, text);
        button.addEventListener("click", () => card.go(by));
        return button;
      };
      card.go = (by) => {
        const now = this.shownOf.get(card.entry) ?? 0;
        this.shownOf.set(card.entry, (now + by + most) % most);
        say();
        this.fill(card);
        reachable(card);
        mark(this.list, folded(this.find.trim()));
      };
      const say = () => {
        label.textContent = `response ${((this.shownOf.get(card.entry) ?? 0) % most) + 1} of ${most}`;
      };
      say();
      return element(
        "div",
        { class: "stepper" },
        turn("\u2039", "previous response", -1),
        label,
        turn("\u203a", "next response", 1),
      );
    }

    /** The responses that a card shows now. */
    fill(card) {
      const at = this.shownOf.get(card.entry) ?? 0;
      const cells = [];
      for (const source of this.columns()) {
        const answers = this.answersOf(card.entry, source);
        const shown = card.alone || !answers.length ? answers : [answers[at % answers.length]];
        cells.push(...shown.map((each) => this.answer(source, each)));
      }
      card.querySelector(".answers").replaceChildren(...cells);
    }

    // ----------------------------------------------------------------------- a response

    answer(source, answer) {
      const { name, of } = this.set.sources[source];
      const title = element("h4", { title: named(of) }, ...visible(name));
      const attributes = { class: "answer", role: "group", "aria-label": named(name) };
      const cell = element("div", attributes, title);
      cell.style.setProperty("--own", `var(--series-${source % 8})`);
      const facts = this.scores
        .filter((each) => answer[each] !== undefined)
        .map((each) => `${SCORES[each]} ${figure(answer[each])}`);
      if (answer.step !== undefined) facts.unshift(`step ${answer.step}`);
      if (answer.unended) facts.push("cut at the limit of tokens");
      if (facts.length) cell.append(element("p", { class: "facts" }, facts.join(" \u00b7 ")));
      if (answer.said?.length) cell.append(verdicts(answer.said));
      const parts = Object.entries(answer.parts ?? {});
      if (parts.length) {
        const terms = parts.map(([term, value]) => `${named(term)} ${figure(value)}`);
        cell.append(element("p", { class: "facts" }, `terms: ${terms.join(", ")}`));
      }
      const values = this.colour && answer[this.colour];
      const most = this.limits[this.colour];
      cell.append(values ? coloured(name, answer, this.colour, most) : plain(answer.text));
      if (values) {
        cell.append(element("output", { class: "told" }));
      } else if (this.colour) {
        cell.append(element("p", { class: "told" }, "not known token by token"));
      }
      if (answer.tokens) cell.append(tokenTable(answer));
      return cell;
    }

    // ----------------------------------------------------------------------- keys

    onKey(event) {
      if (event.ctrlKey || event.altKey || event.metaKey) return;
      if (event.target.matches("input, select, textarea")) return;
      const card = event.target.closest("article.prompt");
      const at = card ? [...this.list.children].indexOf(card) : -1;
      const keys = {
        "/": () => this.search.focus(),
        j: () => (at + 1 < this.list.children.length ? this.enter(at + 1) : this.beyond(1, 0)),
        k: () => (at > 0 ? this.enter(at - 1) : this.beyond(-1, -1)),
        "[": () => card?.go?.(-1),
        "]": () => card?.go?.(1),
      };
      if (!Object.hasOwn(keys, event.key)) return;
      event.preventDefault();
      const inside = card && event.key !== "/" && !"jk".includes(event.key);
      keys[event.key]();
      if (inside) card.focus({ preventScroll: true });
    }

    beyond(by, card) {
      if (this.page + by >= 0 && this.page + by < this.pages) this.turn(by, card);
    }
  }

  /** Let keys scroll what is longer than its box. */
  function reachable(place) {
    for (const text of place.querySelectorAll(".text:not([tabindex])")) {
      if (text.scrollHeight <= text.clientHeight) continue;
      text.tabIndex = 0;
      text.setAttribute("role", "group");
      text.setAttribute("aria-label", "long text");
    }
  }

  /** What each of those who labelled says of a response. */
  function verdicts(said) {
    const list = element("ul", { class: "said" });
    for (const [who, what] of said) {
      list.append(element("li", {}, ...visible(who), ": ", element("b", {}, what)));
    }
    return list;
  }

  /** A prompt, message by message. */
  function asked(messages) {
    const place = element("div", { class: "asked" });
    for (const { role, text } of messages) {
      if (role) place.append(element("p", { class: "role" }, ...visible(role)));
      place.append(plain(text));
    }
    return place;
  }

  const place = document.getElementById("samples");
  if (place && data.samples?.length) new Browser(place, data.samples);
})();
