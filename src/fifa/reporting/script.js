"use strict";
// What a page can do beyond being read; without it everything is shown all the same.
(() => {
  const all = (selector, where = document) => [...where.querySelectorAll(selector)];
  const make = (tag, facts, ...inside) => {
    const made = Object.assign(document.createElement(tag), facts);
    made.append(...inside);
    return made;
  };
  const button = (label, press) => {
    const made = make("button", { type: "button", className: "tool", textContent: label });
    made.addEventListener("click", press);
    return made;
  };
  for (const part of all(".live")) part.hidden = false;

  // Copy the command that makes a figure, or the commands that are listed
  const told = make("p", { className: "unseen" });
  told.setAttribute("role", "status");
  document.body.append(told);
  const copier = (label, text) => {
    const made = button(label, async () => {
      try {
        await navigator.clipboard.writeText(text);
        told.textContent = made.textContent = "Copied";
        setTimeout(() => { told.textContent = ""; made.textContent = label; }, 2000);
      } catch { // the browser has no clipboard for this page: show what is to be copied, selected
        const shown = make("code", { className: "copy", tabIndex: -1, textContent: text });
        made.replaceWith(shown);
        shown.focus();
        getSelection().selectAllChildren(shown);
      }
    });
    made.title = text;
    return made;
  };
  for (const figure of all("figure:has(> .plot)")) {
    figure.append(copier("Copy the command", document.body.dataset.command));
  }
  for (const listed of all("pre")) listed.after(copier("Copy", listed.textContent));

  // What scrolls sideways can be scrolled by keys
  const reach = () => {
    for (const part of all(".scroll, pre")) {
      if (part.scrollWidth > part.clientWidth) part.tabIndex = 0;
      else part.removeAttribute("tabindex");
    }
  };
  addEventListener("resize", reach);
  document.addEventListener("toggle", reach, true);
  reach();

  // Only the pairs of a reason or a generator
  for (const filter of all(".filter")) {
    const section = filter.closest("section");
    const choices = all("select", filter), pairs = all(".pair", section);
    const apply = () => {
      for (const pair of pairs) {
        pair.hidden = !choices.every(
          ({ name, value }) => !value || pair.dataset[name].split(" ").includes(value)
        );
      }
      for (const group of all(".group", section)) {
        group.hidden = !group.querySelector(".pair:not([hidden])");
      }
      const shown = pairs.filter((pair) => !pair.hidden).length;
      filter.querySelector("[role=status]").textContent = `${shown} of ${pairs.length} pairs`;
    };
    filter.addEventListener("change", apply);
    apply();
  }

  // A pair, larger; keys step through those that are shown in its section
  const place = make("p"), view = make("div");
  const forward = button("Next →", () => show(next(1)));
  forward.autofocus = true;
  let at; // the pair that is shown
  const others = () => all(".pair", at.closest("section")).filter((one) => one.offsetParent);
  const next = (by) => {
    const pairs = others();
    return pairs.at((pairs.indexOf(at) + by) % pairs.length);
  };
  const show = (pair) => {
    at = pair;
    const pairs = others(), title = pair.closest(".group").querySelector("h3").textContent;
    place.textContent = `${pairs.indexOf(at) + 1} of ${pairs.length}: ${title}`;
    view.replaceChildren(at.cloneNode(true));
    for (const inner of all(".tool", view)) inner.remove();
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
  };
  const dialog = make(
    "dialog",
    { className: "viewer" },
    make(
      "div",
      { className: "steps" },
      place,
      button("← Previous", () => show(next(-1))),
      forward,
      button("Close", () => dialog.close())
    ),
    view
  );
  dialog.setAttribute("aria-label", "A pair, larger");
  place.setAttribute("role", "status");
  document.body.append(dialog);
  dialog.addEventListener("close", () => at.querySelector(".tool").focus());
  const pictured = all("section").filter((one) => one.querySelector(".pair img"));
  for (const pair of pictured.flatMap((section) => all(".pair", section))) {
    const open = button("Larger", () => show(pair));
    open.setAttribute("aria-label", `Larger: ${pair.querySelector("bdi").textContent.slice(0, 60)}`);
    pair.querySelector(".details").append(open);
  }
  document.addEventListener("click", ({ target }) => {
    if (target === dialog) dialog.close(); // beside what it shows
    else if (target.matches(".group .pair img")) show(target.closest(".pair"));
  });
  document.addEventListener("keydown", (event) => {
    const by = { j: 1, ArrowRight: 1, k: -1, ArrowLeft: -1 }[event.key];
    if (!by || event.ctrlKey || event.altKey || event.metaKey) return;
    if (dialog.open) show(next(by));
    else if ((at = event.target.closest(".pair:has(.tool)"))) next(by).querySelector(".tool").focus();
    else return;
    event.preventDefault();
  });
})();
