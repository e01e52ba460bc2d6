"""The page of a listening test: one HTML file that plays the pieces and keeps the answers, without a server."""

from collections.abc import Sequence

from midimamba.text import for_html, for_link

_PIECE = """\
<section class="piece" data-file="{file}" aria-label="Piece">
<audio controls preload="metadata" src="{link}"></audio>
<fieldset>
<legend>How much do you like it?</legend>
{ratings}
</fieldset>
<fieldset>
<legend>Who wrote it?</legend>
{authors}
</fieldset>
</section>
"""
_CHOICE = '<label><input type="radio" name="{group}" value="{value}" autocomplete="off"> {text}</label>'
_RATINGS = {"1": "1, not at all", "2": "2", "3": "3", "4": "4", "5": "5, very much"}
_AUTHORS = {"true": "a person", "false": "a machine"}

# With placeholders in braces, all braces of the style and the script would have to be doubled.
_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Listening test</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; }
body { max-width: 38rem; margin: 0 auto; padding: 1rem; font: 1.05rem/1.5 system-ui, sans-serif;
  background: Canvas; color: CanvasText; }
[hidden] { display: none !important; }
audio, progress { display: block; width: 100%; }
fieldset { margin: 1rem 0; border: 1px solid GrayText; border-radius: .5rem;
  display: flex; flex-wrap: wrap; gap: 0 1.5rem; }
label { display: inline-flex; align-items: center; gap: .4rem; min-height: 2.75rem; }
input { width: 1.25rem; height: 1.25rem; }
button { font: inherit; min-height: 2.75rem; padding: 0 1.25rem; }
nav { display: flex; justify-content: space-between; }
</style>
</head>
<body data-test="@TEST@">
<main>
<h1>Listening test</h1>
<p>Listen to each piece and answer two questions about it. Take your time. You may go back, skip a piece, or close the
page and continue later in the same browser. All pieces are played with the same set of instruments: please judge
the music alone.</p>
<noscript><p>This page needs JavaScript to save your answers.</p></noscript>
<p id="unsaved" role="alert" hidden>This browser cannot save your answers. Please finish before you close the page.</p>
<h2 id="place" tabindex="-1">Pieces</h2>
<progress id="progress" aria-label="Pieces answered" value="0" max="@COUNT@"></progress>
<p id="count" aria-live="polite"></p>
@PIECES@
<section id="end" hidden>
<p>Thank you. Download your answers and send the file to the person who asked you to take part.</p>
<p><button type="button" id="download">Download answers.json</button></p>
<p><button type="button" id="clear">Delete all answers and start over for another listener</button></p>
</section>
<nav aria-label="Pieces">
<button type="button" id="back">Back</button>
<button type="button" id="next">Next</button>
</nav>
</main>
<script>
"use strict";
const test = document.body.dataset.test;
const storage = "listening-test-" + test;
const sections = [...document.querySelectorAll(".piece")];
const element = (id) => document.getElementById(id);

let state = null;
try { state = JSON.parse(localStorage.getItem(storage)); } catch { /* the page says so when it saves */ }
if (!state) {
  // Every listener hears a different order, so that fatigue does not affect the same pieces.
  const order = sections.map((section) => section.dataset.file);
  for (let last = order.length - 1; last > 0; last--) {
    const other = Math.floor(Math.random() * (last + 1));
    [order[last], order[other]] = [order[other], order[last]];
  }
  state = { order, answers: {} };
}
const pieces = state.order.map((file) => sections.find((section) => section.dataset.file === file));
const answered = (file) => ["rating", "person"].every((field) => field in (state.answers[file] || {}));
let place = state.order.findIndex((file) => !answered(file));
if (place < 0) place = pieces.length;

function save() {
  try { localStorage.setItem(storage, JSON.stringify(state)); } catch { element("unsaved").hidden = false; }
}

function showCount() {
  const count = state.order.filter(answered).length;
  element("progress").value = count;
  element("count").textContent = count + " of " + pieces.length + " pieces answered";
}

function show() {
  for (const [index, piece] of pieces.entries()) {
    piece.hidden = index !== place;
    if (piece.hidden) piece.querySelector("audio").pause();
  }
  const atEnd = place === pieces.length;
  element("end").hidden = !atEnd;
  element("place").textContent = atEnd ? "The end" : "Piece " + (place + 1) + " of " + pieces.length;
  element("back").disabled = place === 0;
  element("next").disabled = atEnd;
  showCount();
}

function move(step) {
  place += step;
  show();
  element("place").focus();
}

for (const piece of pieces) {
  const file = piece.dataset.file;
  for (const input of piece.querySelectorAll("input")) {
    const field = input.name.split("-")[0];
    const value = JSON.parse(input.value);
    input.checked = (state.answers[file] || {})[field] === value;
    input.addEventListener("change", () => {
      state.answers[file] = { ...state.answers[file], [field]: value };
      save();
      showCount();
    });
  }
}
element("back").addEventListener("click", () => move(-1));
element("next").addEventListener("click", () => move(1));
element("clear").addEventListener("click", () => {
  if (!confirm("Delete all answers saved in this browser?")) return;
  try { localStorage.removeItem(storage); } catch { /* nothing was saved */ }
  location.reload();
});
element("download").addEventListener("click", () => {
  const complete = Object.entries(state.answers).filter(([file]) => answered(file));
  const content = JSON.stringify({ test, answers: Object.fromEntries(complete) }, null, 2);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type: "application/json" }));
  link.download = "answers.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
});
save();
show();
</script>
</body>
</html>
"""


def listening_page(test: str, files: Sequence[str]) -> str:
    """
    The page as HTML: static, with no external resources, and with no hint of which arm a piece belongs to.

    It keeps the answers in the local storage of the browser under the id of the test, and offers them for download as
    `answers.json`: `{"test": id, "answers": {file: {"rating": 1 to 5, "person": true or false}}}`. Pieces with an
    unanswered question are left out.

    Args:
        test (`str`): the id of the test.
        files (`Sequence[str]`): the names of the sound files beside the page.
    """
    pieces = "".join(
        _PIECE.format(
            file=for_html(file),
            link=for_link(file),
            ratings=_choices(f"rating-{index}", _RATINGS),
            authors=_choices(f"person-{index}", _AUTHORS),
        )
        for index, file in enumerate(files)
    )
    page = _PAGE.replace("@TEST@", for_html(test)).replace("@COUNT@", str(len(files)))
    return page.replace("@PIECES@", pieces)


def _choices(group: str, choices: dict[str, str]) -> str:
    return "\n".join(_CHOICE.format(group=group, value=value, text=text) for value, text in choices.items())
