// What scrolls sideways can be reached by keyboard: wide tables, equations and code.
const SCROLLS = ".md-typeset__scrollwrap, math[display=block], pre > code";

function reach() {
  for (const one of document.querySelectorAll(SCROLLS)) {
    if (one.scrollWidth > one.clientWidth) one.tabIndex = 0;
    else one.removeAttribute("tabindex");
  }
}

const content = document.querySelector(".md-content");
new ResizeObserver(reach).observe(content);
// The theme puts a frame around each table, which may come later and move nothing.
new MutationObserver(reach).observe(content, { childList: true, subtree: true });
