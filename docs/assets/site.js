// What scrolls sideways can be reached by keyboard: wide tables, equations and code.
const SCROLLS = ".md-typeset__scrollwrap, math[display=block], pre > code";

function reach() {
  for (const one of document.querySelectorAll(SCROLLS)) {
    if (one.scrollWidth > one.clientWidth) one.tabIndex = 0;
    else one.removeAttribute("tabindex");
  }
}

new ResizeObserver(reach).observe(document.querySelector(".md-content"));
