// A link to a section opens its tables, or the object that it describes, which are closed at first;
// a link to something in a closed part opens that part.
function openSection() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)))
  const within = target?.closest("details")
  if (within) {
    within.open = true
    target.scrollIntoView()
  }
  let part = target
  while ((part = part?.nextElementSibling) && !/^H[1-6]$/.test(part.tagName)) {
    if (part.tagName === "DETAILS") part.open = true
  }
}
addEventListener("hashchange", openSection)
openSection()
