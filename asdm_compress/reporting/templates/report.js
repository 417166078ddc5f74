"use strict";
(() => {
  const all = (selector, root = document) => Array.from(root.querySelectorAll(selector));
  const say = (text) => { document.getElementById("said").textContent = text; };

  // Light, dark, or as the system has it. Some browsers refuse storage to files: then the choice lasts for the visit.
  const themes = ["auto", "light", "dark"];
  const themeButton = document.getElementById("theme");
  const setTheme = (theme) => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    themeButton.textContent = `Colours: ${theme}`;
    themeButton.setAttribute("aria-label", `Colours: ${theme}`);
  };
  let theme = "auto";
  try { theme = themes.find((name) => name === localStorage.getItem("theme")) || theme; } catch { /* no storage */ }
  setTheme(theme);
  themeButton.addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    setTheme(theme);
    try { localStorage.setItem("theme", theme); } catch { /* no storage */ }
  });

  // Sliders between two images.
  const move = (input) => {
    input.parentElement.style.setProperty("--at", `${input.value}%`);
    input.setAttribute("aria-valuetext", `the line is at ${input.value} percent`);
  };
  const sliders = all(".pairs .compare input");
  sliders.forEach((input) => {
    move(input);
    input.addEventListener("input", () => move(input));
  });
  const together = document.getElementById("all");
  if (together) together.addEventListener("input", () => sliders.forEach((input) => { input.value = together.value; move(input); }));
  all('.controls input[type="radio"]').forEach((radio) => radio.addEventListener("change", () => {
    all(".pairs").forEach((pairs) => { pairs.dataset[radio.name] = radio.value; });
  }));

  // What is pointed at or focused in a drawing is told below it; what is picked opens its part of the page.
  const tell = (pick) => {
    const readout = pick.closest(".picture").querySelector(".readout");
    if (!readout) return;
    const head = document.createElement("p");
    const name = document.createElement("strong");
    name.textContent = pick.dataset.label;
    head.append(name);
    const list = document.createElement("ul");
    pick.dataset.lines.split("\n").filter(Boolean).forEach((line) => {
      const item = document.createElement("li");
      item.textContent = line;
      list.append(item);
    });
    readout.classList.add("told");
    readout.replaceChildren(head, list);
  };
  const open = (pick) => {
    const panel = pick.dataset.opens && document.getElementById(pick.dataset.opens);
    if (!panel) return;
    all(".panel", panel.parentElement).forEach((other) => { other.hidden = other !== panel; });
    all("[data-opens]", pick.ownerSVGElement).forEach((other) => other.setAttribute("aria-pressed", String(other === pick)));
  };
  const centre = (element) => {
    const box = element.getBoundingClientRect();
    return [box.left + box.width / 2, box.top + box.height / 2];
  };
  const directions = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const turns = { PageUp: -1, PageDown: 1 };
  const next = (picks, pick, key) => {
    if (key === "Home") return picks[0];
    if (key === "End") return picks[picks.length - 1];
    // What lies at one place with another is reached by going through all of them in order.
    if (key in turns) return picks[picks.indexOf(pick) + turns[key]] || null;
    const [dx, dy] = directions[key];
    const [x, y] = centre(pick);
    let best = null;
    let least = Infinity;
    picks.forEach((other) => {
      if (other === pick) return;
      const [ox, oy] = centre(other);
      const along = (ox - x) * dx + (oy - y) * dy;
      const aside = Math.abs((ox - x) * dy) + Math.abs((oy - y) * dx);
      if (along > 1 && along + 2 * aside < least) { least = along + 2 * aside; best = other; }
    });
    return best;
  };
  all(".drawing").forEach((drawing) => {
    const picks = all(".pick", drawing);
    if (!picks.length) return;
    const hold = (pick) => {
      picks.forEach((other) => other.setAttribute("tabindex", other === pick ? "0" : "-1"));
    };
    hold(picks.find((pick) => { const of = pick.dataset.opens && document.getElementById(pick.dataset.opens); return of && !of.hidden; }) || picks[0]);
    picks.filter((pick) => pick.dataset.opens && !document.getElementById(pick.dataset.opens).hidden).forEach((pick) => pick.setAttribute("aria-pressed", "true"));
    const found = (event) => event.target.closest(".pick");
    drawing.addEventListener("pointerover", (event) => { const pick = found(event); if (pick) tell(pick); });
    drawing.addEventListener("focusin", (event) => { const pick = found(event); if (pick) { hold(pick); tell(pick); } });
    drawing.addEventListener("click", (event) => { const pick = found(event); if (pick) { hold(pick); tell(pick); open(pick); } });
    drawing.addEventListener("keydown", (event) => {
      const pick = found(event);
      if (!pick) return;
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        open(pick);
      } else if (event.key in directions || event.key in turns || event.key === "Home" || event.key === "End") {
        event.preventDefault();
        const other = next(picks, pick, event.key);
        if (other) other.focus();
      }
    });
  });

  // What is wider than the screen scrolls, and so has to be reached by the keyboard.
  const reachable = () => all(".scroll").forEach((place) => {
    if (place.scrollWidth > place.clientWidth + 1) {
      place.tabIndex = 0;
      place.setAttribute("role", "region");
      const name = place.querySelector("caption, svg");
      place.setAttribute("aria-label", `${name ? name.getAttribute("aria-label") || name.textContent : "wide content"}, scrolls`);
    } else {
      ["tabindex", "role", "aria-label"].forEach((attribute) => place.removeAttribute(attribute));
    }
  });
  addEventListener("resize", reachable);
  reachable();

  // The contents stand beside the report where there is room, and say where the reader is.
  const contents = document.getElementById("contents");
  const wide = matchMedia("(min-width: 1060px)");
  const unfold = () => { contents.open = wide.matches; };
  wide.addEventListener("change", unfold);
  unfold();
  const links = new Map(all("nav a").map((link) => [link.hash.slice(1), link]));
  if ("IntersectionObserver" in window) {
    const watch = new IntersectionObserver((entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => {
      links.forEach((link) => link.removeAttribute("aria-current"));
      const link = links.get(entry.target.id);
      if (link) link.setAttribute("aria-current", "location");
    }), { rootMargin: "-20% 0px -70% 0px" });
    all("main > section").forEach((section) => watch.observe(section));
  }

  all(".copy").forEach((button) => button.addEventListener("click", async () => {
    const code = document.getElementById(button.dataset.of);
    try {
      await navigator.clipboard.writeText(code.textContent);
      say("Copied.");
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      say("Selected; copy it with the keyboard.");
      button.textContent = "Selected";
    }
  }));

  // Paper has nothing to unfold.
  let folded = [];
  addEventListener("beforeprint", () => { folded = all("main details:not([open])"); folded.forEach((details) => { details.open = true; }); });
  addEventListener("afterprint", () => folded.forEach((details) => { details.open = false; }));
})();
