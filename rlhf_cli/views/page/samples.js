"use strict";
// The browser of samples: responses side by side by their prompts, searched, sorted, and coloured
// token by token. `data.samples` is a list of sets, as views/samples.py makes them. What models and
// rows say is put into text nodes alone, and characters that are not seen are named.

(() => {
  const PER_PAGE = 10;
  const SCORES = { reward: "reward", gold: "gold", kl: "KL", response_tokens: "length" };
  const VALUES = {
    kls: ["KL", "more likely than under the reference", "less likely", "nats"],
    advantages: ["advantage", "better than expected", "worse", ""],
    rewards: ["reward", "paid", "charged", ""],
    logprobs: ["log-prob", "", "less expected", "nats"],
  };
  // Controls but tab and line feed; what turns the direction of writing, or has no width; tags;
  // halves of characters.
  const UNSEEN =
    /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\u{e0000}-\u{e007f}]/gu;

  // ------------------------------------------------------------------------- texts and numbers

  /** A text as nodes, in which each character that is not seen is named. */
  function visible(text) {
    const nodes = [];
    let end = 0;
    for (const found of text.matchAll(UNSEEN)) {
      if (found.index > end) nodes.push(text.slice(end, found.index));
      const code = found[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      nodes.push(element("span", { class: "unseen" }, `U+${code}`));
      end = found.index + found[0].length;
    }
    if (end < text.length) nodes.push(text.slice(end));
    return nodes;
  }

  /** A text in which such characters are named, where only text can stand. */
  function named(text) {
    return visible(text)
      .map((node) => (typeof node === "string" ? node : `[${node.textContent}]`))
      .join("");
  }

  function figure(value) {
    if (value === null || value === undefined) return "none";
    const size = Math.abs(value);
    if (size < 0.0005) return "0";
    const text = size >= 1000 ? size.toFixed(0) : String(Number(size.toPrecision(3)));
    return (value < 0 ? "\u2212" : "") + text;
  }

  function signed(value) {
    const text = figure(value);
    return (value > 0 && text !== "0" ? "+" : "") + text;
  }

  /** Lower case of the same length, so that places in it are those in the text. */
  function folded(text) {
    const low = text.toLowerCase();
    if (low.length === text.length) return low;
    return Array.from(text, (each) => {
      const own = each.toLowerCase();
      return own.length === each.length ? own : each;
    }).join("");
  }

  function mean(values) {
    return values.length ? values.reduce((sum, each) => sum + each, 0) / values.length : null;
  }

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

  // ------------------------------------------------------------------------- the browser

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
      keys.append(
        "Keys: Enter in the search goes to the first prompt; there ",
        element("kbd", {}, "j"), " and ", element("kbd", {}, "k"), " go to the next and the previous, ",
        element("kbd", {}, "["), " and ", element("kbd", {}, "]"), " to other responses, ",
        element("kbd", {}, "/"), " to the search; arrows go along coloured tokens.",
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
        parts.push(this.select("Samples", titles, this.number, (to) => this.open(Number(to))));
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
      return element("div", { class: "field" }, element("label", { for: control.id }, label), control);
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
        if (answered && (!find || this.textOf(i).includes(find))) found.push(i);
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
        this.texts[i] = folded([...entry.prompt, ...said].map((each) => each.text).join("\n"));
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
      const left = this.set.left_out
        ? ` To keep this page small ${this.set.left_out} more responses are left out; samples.jsonl has them.`
        : "";
      this.status.textContent = `${count} prompts${which}.${left}`;
      this.turns();
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
      );
      card.entry = entry;
      const counts = this.columns().map((source) => this.answersOf(entry, source).length);
      card.alone = counts.filter(Boolean).length === 1; // then all of its responses are shown
      if (!card.alone && Math.max(...counts) > 1) {
        this.turnToFound(entry);
        head.append(this.stepper(card, Math.max(...counts)));
      }
      this.fill(card);
      return card;
    }

    /** Show the first responses in which what is searched for stands, if it is not in the prompt. */
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
      const means = Math.max(...counts) > 1 ? `, means of ${[...new Set(counts)].join(" and ")}` : "";
      const text = `${SCORES[this.score]}${means}: ${one} ${figure(ours)}, ${other} ${figure(theirs)}, `;
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
        mark(this.list, folded(this.find.trim()));
      };
      const say = () => {
        label.textContent = `response ${(this.shownOf.get(card.entry) ?? 0) + 1} of ${most}`;
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
      const cell = element("section", { class: "answer", "aria-label": named(name) }, title);
      cell.style.setProperty("--own", `var(--series-${source % 8})`);
      const facts = this.scores
        .filter((each) => answer[each] !== undefined)
        .map((each) => `${SCORES[each]} ${figure(answer[each])}`);
      if (answer.step !== undefined) facts.unshift(`step ${answer.step}`);
      if (answer.unended) facts.push("cut at the limit of tokens");
      if (facts.length) cell.append(element("p", { class: "facts" }, facts.join(" \u00b7 ")));
      const parts = Object.entries(answer.parts ?? {});
      if (parts.length) {
        const terms = parts.map(([term, value]) => `${named(term)} ${figure(value)}`);
        cell.append(element("p", { class: "facts" }, `of it ${terms.join(", ")}`));
      }
      const values = this.colour && answer[this.colour];
      cell.append(values ? this.coloured(name, answer, values) : plain(answer.text));
      if (values) {
        cell.append(element("output", { class: "told" }));
      } else if (this.colour) {
        cell.append(element("p", { class: "told" }, "not known token by token"));
      }
      if (answer.tokens) cell.append(this.table(answer));
      return cell;
    }

    /** The text token by token; the last ones may end it without being in it. */
    coloured(name, answer, values) {
      const label = `${named(name)}, by ${VALUES[this.colour][0]} of tokens; arrows move along them`;
      const place = { class: "text coloured", dir: "auto", tabindex: "0", role: "group", "aria-label": label };
      const text = element("div", place);
      const most = this.limits[this.colour];
      let length = 0;
      answer.tokens.forEach((each, i) => {
        if (each === "") return; // a part of the character that a later token ends
        const value = values[i];
        const token = element("span", { class: "token" }, ...visible(each));
        if (length >= answer.text.length) token.classList.add("end");
        if (value !== null) {
          token.classList.add(value < 0 ? "below" : "above");
          token.style.setProperty("--share", Math.min(1, Math.abs(value) / most).toFixed(3));
        }
        token.told = () => told(answer, i);
        length += each.length;
        text.append(token);
      });
      if (length < answer.text.length) {
        text.append(element("span", { class: "rest" }, ...visible(answer.text.slice(length))));
      }
      if (!text.hasChildNodes()) return plain("");
      text.addEventListener("keydown", (event) => move(event, text));
      text.addEventListener("focus", () => text.querySelector(".picked") || pick(text.querySelector(".token")));
      return text;
    }

    /** All values of all tokens, for those who do not see colours; made when it is opened. */
    table(answer) {
      const details = element("details", {}, element("summary", {}, "values of tokens"));
      details.addEventListener("toggle", () => {
        if (!details.open || details.querySelector("table")) return;
        const names = this.values.filter((name) => answer[name]);
        const heads = ["token", ...names.map((name) => VALUES[name][0])];
        const head = element("tr", {}, ...heads.map((each) => element("th", { scope: "col" }, each)));
        const rows = answer.tokens.map((token, i) =>
          element(
            "tr",
            {},
            element("th", { scope: "row" }, ...visible(JSON.stringify(token).slice(1, -1))),
            ...names.map((name) => element("td", {}, figure(answer[name][i]))),
          ),
        );
        details.append(
          element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows)),
        );
      });
      return details;
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

  // ------------------------------------------------------------------------- parts of a card

  function asked(messages) {
    const place = element("div", { class: "asked" });
    for (const { role, text } of messages) {
      if (role) place.append(element("p", { class: "role" }, ...visible(role)));
      place.append(plain(text));
    }
    return place;
  }

  function plain(text) {
    if (text === "") return element("div", { class: "text empty" }, "empty");
    return element("div", { class: "text", dir: "auto" }, ...visible(text));
  }

  /** What is known of a token, in words. */
  function told(answer, i) {
    const known = Object.entries(VALUES)
      .filter(([name]) => answer[name])
      .map(([name, [label]]) => `${label} ${figure(answer[name][i])}`);
    return `${i + 1} of ${answer.tokens.length}, ${JSON.stringify(named(answer.tokens[i]))}: ${known.join(", ")}`;
  }

  /** Tell of a token, and mark it. */
  function pick(token) {
    if (!token) return;
    const text = token.closest(".text");
    text.querySelector(".picked")?.classList.remove("picked");
    token.classList.add("picked");
    text.parentElement.querySelector("output.told").textContent = token.told();
  }

  function move(event, text) {
    const tokens = [...text.querySelectorAll(".token")];
    const at = tokens.findIndex((each) => each.classList.contains("picked"));
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: tokens.length - 1 }[event.key];
    if (to === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const next = tokens[Math.max(0, Math.min(tokens.length - 1, to))];
    pick(next);
    next?.scrollIntoView({ block: "nearest" });
  }

  /** Mark what is searched for, also where it goes over the ends of tokens. */
  function mark(list, find) {
    if (!window.CSS?.highlights) return;
    CSS.highlights.delete("found");
    if (!find) return;
    const ranges = [];
    for (const text of list.querySelectorAll(".text")) {
      const nodes = [];
      const walk = document.createTreeWalker(text, NodeFilter.SHOW_TEXT);
      let whole = "";
      while (walk.nextNode()) {
        nodes.push([whole.length, walk.currentNode]);
        whole += walk.currentNode.data;
      }
      whole = folded(whole);
      let last = 0;
      const place = (at) => {
        while (last + 1 < nodes.length && nodes[last + 1][0] <= at) last += 1;
        return [nodes[last][1], at - nodes[last][0]];
      };
      for (let at = whole.indexOf(find); at >= 0; at = whole.indexOf(find, at + find.length)) {
        const range = new Range();
        range.setStart(...place(at));
        const [node, end] = place(at + find.length - 1);
        range.setEnd(node, end + 1);
        ranges.push(range);
      }
    }
    CSS.highlights.set("found", new Highlight(...ranges));
  }

  const place = document.getElementById("samples");
  if (place && data.samples?.length) new Browser(place, data.samples);
})();
