// Runs before the first paint, so that a chosen theme never flashes. Not a module for that reason.
"use strict";

(() => {
  const stored = localStorage.getItem("theme");
  if (stored === "light" || stored === "dark") document.documentElement.dataset.theme = stored;
})();
