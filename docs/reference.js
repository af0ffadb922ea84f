// A link to a part of a page that is closed, or to something in it, opens the part.
const reveal = () => {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const part = target?.closest("details") ?? target?.nextElementSibling;
  if (!part?.matches("details.part")) return;
  part.open = true;
  target.scrollIntoView();
};
addEventListener("hashchange", reveal);
reveal();
