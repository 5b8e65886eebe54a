"use strict";
// Votes without leaving the page. Without this script the same forms work, a page load a vote.
(() => {
  const vote = document.getElementById("vote");
  const undo = document.getElementById("undo");
  const status = document.getElementById("status");
  const prompt = document.getElementById("prompt");
  const loaded = new Map(); // images by id, decoded before they are needed
  const keys = {
    ArrowLeft: "left", 1: "left", ArrowRight: "right", 2: "right", ArrowDown: "tie", 3: "tie",
  };
  let busy = false;

  function load(id) {
    if (!loaded.has(id)) {
      const image = new Image();
      image.alt = "";
      image.draggable = false;
      image.src = `${vote.dataset.images}${id}.png`;
      loaded.set(id, image.decode().then(() => image, (error) => {
        loaded.delete(id);
        throw error;
      }));
    }
    return loaded.get(id);
  }

  function ahead(ids) {
    for (const id of ids) load(id).catch(() => {}); // it is asked for again when it is shown
  }

  function put(side, image) {
    const button = vote.querySelector(`[value=${side}]`);
    const old = button.querySelector("img"); // none if it has just moved to the other side
    if (old) old.remove();
    image.id = side;
    button.prepend(image);
  }

  async function show(state) {
    if (state.done) {
      location.reload();
      return new Promise(() => {}); // no vote before the page is gone
    }
    const [left, right] = await Promise.all(state.images.map(load));
    put("left", left); // both at once, never one beside an old one
    put("right", right);
    prompt.textContent = state.prompt;
    prompt.scrollTop = 0;
    for (const form of [vote, undo]) form.elements.position.value = state.position;
    undo.querySelector("button").disabled = state.votes === 0;
    const progress = document.getElementById("progress");
    progress.max = state.total; // fewer, where others fill pairs meanwhile
    progress.value = state.votes;
    document.getElementById("count").lastChild.textContent =
      `${state.votes + 1} of ${state.total}`;
    status.textContent = `Pair ${state.votes + 1} of ${state.total}: ${state.prompt}`;
    for (const id of loaded.keys()) {
      if (![...state.images, ...state.upcoming].includes(id)) loaded.delete(id);
    }
    ahead(state.upcoming);
  }

  async function send(form, button) {
    if (busy) return;
    busy = true;
    const fields = new URLSearchParams(new FormData(form));
    if (button.name) fields.set(button.name, button.value);
    button.classList.add("chosen");
    document.body.classList.remove("failed");
    const slow = setTimeout(() => document.body.classList.add("waiting"), 250);
    try {
      const answer = await fetch(form.action, {
        method: "POST", body: fields, headers: { Accept: "application/json" },
      });
      // 409: this voter went on in another tab; what is shown then is where they are
      if (!answer.ok && answer.status !== 409) throw new Error(await answer.text());
      await show(await answer.json());
    } catch (error) {
      document.body.classList.add("failed");
      status.textContent = "That did not work. Is the network there? Please try again.";
    } finally {
      clearTimeout(slow);
      document.body.classList.remove("waiting");
      button.classList.remove("chosen");
      busy = false;
    }
  }

  for (const form of [vote, undo]) {
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      send(form, event.submitter || form.querySelector("button"));
    });
  }

  document.addEventListener("keydown", (event) => {
    if (event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
    const scrolls = event.target === prompt && prompt.scrollHeight > prompt.clientHeight;
    if (scrolls && event.key === "ArrowDown") return; // of a long prompt; 3 is a tie as well
    if (event.key === "u" || event.key === "U") {
      const button = undo.querySelector("button");
      if (!button.disabled) send(undo, button);
    } else if (Object.hasOwn(keys, event.key)) {
      send(vote, vote.querySelector(`[value=${keys[event.key]}]`));
    } else {
      return;
    }
    event.preventDefault();
  });

  ahead(vote.dataset.upcoming.split(" ").filter(Boolean));
})();
