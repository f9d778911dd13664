
(function () {
  "use strict";

  function list(nodes) {
    return Array.prototype.slice.call(nodes);
  }

  function compare(a, b) {
    var x = Number(a), y = Number(b);
    if (!isNaN(x) && !isNaN(y)) return x - y;
    return a < b ? -1 : a > b ? 1 : 0;
  }

  function sortable(table) {
    var heads = list(table.tHead.rows[0].cells);
    var body = table.tBodies[0];

    function sort(index, descending) {
      var rows = list(body.rows).map(function (row) {
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
  }

  function labelled(text, field) {
    var label = document.createElement("label");
    label.appendChild(document.createTextNode(text + " "));
    label.appendChild(field);
    return label;
  }

  // A choice for each column of few values, and a search for words in any; none for a short table.
  function filterable(table, bar) {
    var rows = list(table.tBodies[0].rows);
    if (rows.length < 10) return;
    var choices = [];
    list(table.tHead.rows[0].cells).forEach(function (head, index) {
      if (!("filter" in head.dataset)) return;
      var known = {};
      rows.forEach(function (row) { known[row.cells[index].dataset.value] = true; });
      var values = Object.keys(known).sort(compare);
      if (values.length < 2 || values.length > 200) return;
      var select = document.createElement("select");
      select.add(new Option("all", ""));
      values.forEach(function (value) { select.add(new Option(value || "–", "=" + value)); });
      choices.push({ index: index, select: select });
      bar.appendChild(labelled(head.textContent.trim(), select));
    });
    var search = document.createElement("input");
    search.type = "search";
    bar.appendChild(labelled("search", search));
    var count = document.createElement("output");
    bar.appendChild(count);

    function apply() {
      var words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      var left = 0;
      rows.forEach(function (row) {
        var fits = choices.every(function (choice) {
          var wanted = choice.select.value;
          return wanted === "" || wanted === "=" + row.cells[choice.index].dataset.value;
        });
        var text = row.textContent.toLowerCase();
        fits = fits && words.every(function (word) { return text.indexOf(word) >= 0; });
        row.hidden = !fits;
        left += fits ? 1 : 0;
      });
      count.textContent = left + " of " + rows.length;
    }

    bar.addEventListener("input", apply);
    bar.addEventListener("change", apply);
    bar.hidden = false;
    apply();
  }

  // Two methods at a time, and the questions that one of them alone gets right.
  function paired(section) {
    var selects = list(section.querySelectorAll("select"));
    var said = section.querySelector("output");
    var wins = JSON.parse(section.dataset.wins);
    var articles = list(section.querySelectorAll("article"));

    function apply() {
      var one = Number(selects[0].value), other = Number(selects[1].value);
      var left = 0;
      articles.forEach(function (article) {
        var views = list(article.querySelectorAll(".strategy"));
        var differ = views[one].dataset.right !== views[other].dataset.right;
        article.hidden = !differ;
        left += differ ? 1 : 0;
        views.forEach(function (view, index) { view.hidden = index !== one && index !== other; });
      });
      var text = left + (left === 1 ? " pictured question." : " pictured questions.");
      if (wins.length) {
        text += " Of all " + section.dataset.questions + ", the first alone scores more on " +
          wins[one][other] + ", the second on " + wins[other][one] + ".";
      }
      said.textContent = text;
    }

    selects.forEach(function (select) { select.addEventListener("change", apply); });
    section.querySelector(".filters").hidden = false;
    apply();
  }

  list(document.querySelectorAll("table.runs")).forEach(sortable);
  list(document.querySelectorAll("[data-table]")).forEach(function (bar) {
    filterable(document.getElementById(bar.dataset.table), bar);
  });
  var differences = document.getElementById("differences");
  if (differences) paired(differences);
})();
