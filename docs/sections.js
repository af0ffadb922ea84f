// A link to a section opens its tables, which are closed at first.
function openSection() {
  let part = document.getElementById(decodeURIComponent(location.hash.slice(1)))
  while ((part = part?.nextElementSibling) && part.tagName !== "H2") {
    if (part.tagName === "DETAILS") part.open = true
  }
}
addEventListener("hashchange", openSection)
openSection()
