
(function () {
  "use strict";
  var table = document.getElementById("runs");
  var heads = Array.prototype.slice.call(table.tHead.rows[0].cells);
  var body = table.tBodies[0];

  function compare(a, b) {
    var x = Number(a), y = Number(b);
    if (!isNaN(x) && !isNaN(y)) return x - y;
    return a < b ? -1 : a > b ? 1 : 0;
  }

  function sort(index, descending) {
    var rows = Array.prototype.map.call(body.rows, function (row) {
      return { row: row, value: row.cells[index].dataset.value };
    });
    rows.sort(function (a, b) {
      // What a run does not have comes last, whichever way the column is sorted.
      if (a.value === "" || b.value === "") return (a.value === "") - (b.value === "");
      return descending ? compare(b.value, a.value) : compare(a.value, b.value);
    });
    rows.forEach(function (entry) { body.appendChild(entry.row); });
    heads.forEach(function (head, other) {
      var order = other !== index ? "none" : descending ? "descending" : "ascending";
      head.setAttribute("aria-sort", order);
    });
  }

  heads.forEach(function (head, index) {
    // Numbers first show the largest, words the first of the alphabet.
    var first = head.classList.contains("numeric") ? "descending" : "ascending";
    head.querySelector("button").addEventListener("click", function () {
      var now = head.getAttribute("aria-sort");
      var next = now === "none" ? first : now === "ascending" ? "descending" : "ascending";
      sort(index, next === "descending");
    });
  });
})();
