// What moves on the page: the divider over the labels, filters, the viewer, read-outs under the pointer.
// Without it everything is still there to read.
"use strict";
(() => {
  const palette = JSON.parse(document.getElementById("palette").textContent);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // Which class a label image has at a point: read from its pixels, once drawn.
  const canvases = new WeakMap();
  function classAt(image, x, y) {
    if (!image || image.hidden || !image.naturalWidth || !image.src.startsWith("data:image")) return null;
    let kept = canvases.get(image);
    if (!kept || kept.src !== image.src) {
      const canvas = document.createElement("canvas");
      canvas.width = image.naturalWidth;
      canvas.height = image.naturalHeight;
      const context = canvas.getContext("2d", { willReadFrequently: true });
      context.drawImage(image, 0, 0);
      kept = { src: image.src, context };
      canvases.set(image, kept);
    }
    const at = (share, size) => Math.min(size - 1, Math.max(0, Math.floor(share * size)));
    const pixel = kept.context.getImageData(at(x, image.naturalWidth), at(y, image.naturalHeight), 1, 1).data;
    if (!pixel[3]) return "no label";
    const hex = "#" + [0, 1, 2].map((i) => pixel[i].toString(16).padStart(2, "0")).join("");
    return palette[hex] || "unknown";
  }
  function shares(event, element) {
    const box = element.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  }

  // The comparer
  for (const comparer of all(".comparer")) {
    const frame = comparer.querySelector(".frame");
    const readout = comparer.querySelector(".readout");
    const [before, after] = [".before", ".after"].map((one) => frame.querySelector(one));
    const [left, right] = all(".tag", frame).map((tag) => tag.textContent);
    const cut = comparer.querySelector(".cut");
    const opacity = comparer.querySelector(".opacity");
    const follow = () => {
      frame.style.setProperty("--cut", cut.value + "%");
      frame.style.setProperty("--opacity", opacity.value / 100);
    };
    cut.addEventListener("input", follow);
    opacity.addEventListener("input", follow);
    frame.addEventListener("pointermove", (event) => {
      const [x, y] = shares(event, frame);
      const [raw, refined] = [classAt(before, x, y), classAt(after, x, y)];
      if (raw === null && refined === null) return;
      readout.textContent = raw === refined || raw === null || refined === null
        ? raw ?? refined : `${left}: ${raw} → ${right}: ${refined}`;
    });
    follow();
  }

  // Filters: chips show the entries that carry their tag
  function filter(section, entries, count) {
    const chips = all(".chip", section);
    for (const chip of chips) {
      chip.addEventListener("click", () => {
        for (const other of chips) other.setAttribute("aria-pressed", String(other === chip));
        let shown = 0;
        for (const entry of entries) {
          const tags = entry.dataset.tags.split(" ").filter(Boolean);
          entry.hidden = chip.dataset.filter !== "" && !tags.includes(chip.dataset.filter);
          shown += entry.hidden ? 0 : 1;
        }
        count.textContent = shown === 1 ? "1 picture" : `${shown} pictures`;
      });
    }
  }
  const pictures = document.getElementById("pictures");
  if (pictures) filter(pictures, all(".card", pictures), document.getElementById("gallery-count"));
  const predictions = document.getElementById("predictions");
  if (predictions) filter(predictions, all(".predicted", predictions), document.getElementById("predictions-count"));

  for (const radio of all("input[name=over]")) {
    radio.addEventListener("change", () => { document.getElementById("gallery").dataset.over = radio.value; });
  }
  for (const radio of all("input[name=model]")) {
    radio.addEventListener("change", () => {
      for (const view of all(".view", predictions)) view.hidden = view.dataset.model !== radio.value;
    });
  }
  const byTarget = all(".by-target");
  const showTarget = (name) => { for (const table of byTarget) table.hidden = table.dataset.target !== name; };
  for (const radio of all("input[name=target]")) radio.addEventListener("change", () => showTarget(radio.value));
  const chosen = document.querySelector("input[name=target]:checked");
  if (chosen) showTarget(chosen.value);

  // The class under the pointer in truths and predictions
  const pixelClass = document.getElementById("pixel-class");
  for (const image of all("img[data-readable]")) {
    image.addEventListener("pointermove", (event) => {
      const name = classAt(image, ...shares(event, image));
      if (name) { image.title = name; pixelClass.textContent = name; }
    });
  }

  // The viewer
  const viewer = document.getElementById("viewer");
  if (viewer) {
    const cards = () => all(".card").filter((card) => !card.hidden);
    let current = null;
    const set = (selector, card, from) => {
      const image = viewer.querySelector(selector);
      const source = card.querySelector(from);
      if (!image) return;
      image.hidden = !source;
      if (source) image.src = source.src;
    };
    const show = (card) => {
      current = card;
      const among = cards();
      const picture = card.querySelector(".picture");
      const frame = viewer.querySelector(".frame");
      const base = viewer.querySelector(".base, .alone");
      base.src = picture.src;
      base.alt = picture.alt;
      if (frame) {
        frame.style.aspectRatio = `${picture.getAttribute("width")}/${picture.getAttribute("height")}`;
        fit(frame);
        set(".before", card, ".raw");
        set(".after", card, ".refined");
      }
      const told = viewer.querySelector(".told");
      told.replaceChildren(...all(".prompt, .marks, .origin", card).map((part) => part.cloneNode(true)));
      for (const details of all("details", told)) details.open = true;
      for (const link of all("a", told)) link.addEventListener("click", () => viewer.close());
      viewer.querySelector(".place").textContent = `${among.indexOf(card) + 1} of ${among.length}`;
    };
    const turn = (by) => {
      const among = cards();
      show(among[(among.indexOf(current) + by + among.length) % among.length]);
    };
    for (const card of all(".card")) {
      card.querySelector(".open").addEventListener("click", () => { show(card); viewer.showModal(); viewer.scrollTop = 0; });
    }
    for (const button of all(".turn", viewer)) button.addEventListener("click", () => turn(Number(button.dataset.turn)));
    viewer.querySelector(".close").addEventListener("click", () => viewer.close());
    viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
    viewer.addEventListener("keydown", (event) => {
      if (event.target.matches("input")) return;
      if (event.key === "ArrowLeft") turn(-1);
      if (event.key === "ArrowRight") turn(1);
    });
  }

  // Frames keep the picture's shape also where their height is limited
  function fit(frame) {
    const [width, height] = frame.style.aspectRatio.split("/").map(Number);
    frame.style.maxWidth = `calc(${frame.closest("dialog") ? 58 : 70}vh * ${width / height})`;
  }
  all(".frame").forEach(fit);

  // Values under the pointer in the charts
  for (const svg of all(".chart svg")) {
    const values = svg.parentElement.querySelector(".values");
    const cross = svg.querySelector(".cross");
    const { left, right, x0, x1 } = Object.fromEntries(Object.entries(svg.dataset).map(([key, value]) => [key, Number(value)]));
    const curves = all(".smooth", svg).map((path) => ({ path, label: path.dataset.label, points: JSON.parse(path.dataset.points) }));
    const width = svg.viewBox.baseVal.width;
    svg.addEventListener("pointermove", (event) => {
      const x = shares(event, svg)[0] * width;
      if (x < left || x > right) return;
      const step = x0 + ((x - left) / (right - left)) * (x1 - x0);
      cross.setAttribute("x1", x);
      cross.setAttribute("x2", x);
      const shown = curves.filter(({ path }) => !path.classList.contains("off"));
      if (!shown.length) return;
      const near = shown.map(({ label, points }) => [label, points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a))]);
      values.textContent = `step ${near[0][1][0]}: ` + near.map(([label, point]) => `${shown.length > 1 ? label + " " : ""}${point[1]}`).join(" · ");
    });
    svg.addEventListener("pointerleave", () => {
      cross.setAttribute("x1", -9);
      cross.setAttribute("x2", -9);
      values.textContent = "\u00a0";
    });
  }

  // Names of trainings show and hide their lines
  for (const chip of all("[data-training]")) {
    const follow = () => {
      for (const path of all("#curves path[data-label]")) {
        if (path.dataset.label === chip.dataset.training) path.classList.toggle("off", chip.getAttribute("aria-pressed") !== "true");
      }
    };
    chip.addEventListener("click", () => {
      chip.setAttribute("aria-pressed", String(chip.getAttribute("aria-pressed") !== "true"));
      follow();
    });
    follow();
  }

  // A link to a record opens it
  const open = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target && target.tagName === "DETAILS") target.open = true;
  };
  addEventListener("hashchange", open);
  for (const link of all('a[href^="#made-"]')) link.addEventListener("click", () => setTimeout(open));
  open();
})();
