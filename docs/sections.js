// A link to something in a closed part of a page opens the part; a link to a heading opens the
// parts of its section.
const open = () => {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const around = target?.closest("details");
  if (around) around.open = true;
  for (let part = target?.nextElementSibling; part && part.tagName !== "H2"; part = part.nextElementSibling) {
    if (part.tagName === "DETAILS") part.open = true;
    if (part.matches("details.part")) break;
  }
  if (around) target.scrollIntoView();
};
addEventListener("hashchange", open);
open();
