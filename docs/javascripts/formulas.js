// Formulas that pymdownx.arithmatex has marked, \( ... \) in a line and \[ ... \] by itself; in tables of contents they are not marked.
if (window.katex) {
  for (const element of document.querySelectorAll(".arithmatex")) {
    const text = element.textContent.trim();
    katex.render(text.slice(2, -2), element, { displayMode: text.startsWith("\\["), throwOnError: false });
  }
  for (const element of document.querySelectorAll(".md-nav__link .md-ellipsis")) {
    if (element.textContent.includes("\\(")) {
      element.innerHTML = element.innerHTML.replace(/\\\((.*?)\\\)/g, (_, formula) => katex.renderToString(formula, { throwOnError: false }));
    }
  }
}
