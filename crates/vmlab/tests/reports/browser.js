(async () => {
  const pause = () => new Promise((done) => setTimeout(done, 300));
  const all = (selector) => [...document.querySelectorAll(selector)];
  const details = (id) => document.querySelector(`details[data-id="${id}"]`);
  const type = (field, text) => {
    field.value = text;
    field.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const rows = () => all("tbody tr[data-id]:not([hidden])").map((row) => row.dataset.id).join(" ");
  const shown = () => all("details.target:not([hidden])").map((one) => one.dataset.id).join(" ");
  const found = [];
  try {
    const closed = !details("long").open;
    found.push(`network ${details("network").open ? "opened" : "closed"}`, `others ${closed ? "closed" : "opened"}`);
    const hung = details("hang").querySelector("pre");
    const below = hung.scrollHeight - hung.clientHeight - hung.scrollTop;
    found.push(`log scrolled ${hung.scrollTop > 100} to its end ${below < 3}`);
    const filter = document.getElementById("ui-filter");
    type(filter, "6.12 exit");
    found.push(`filter 6.12 exit: ${rows() === shown() ? rows() : "differ"}`);
    type(filter, "");
    const box = (outcome) => document.querySelector(`.counts input[value=${outcome}]`);
    box("passed").click();
    found.push(`passed off: ${rows() === shown() ? rows() : "differ"}`);
    box("flaky").click();
    box("failed").click();
    found.push(`all off: none ${!document.getElementById("ui-none").hidden && rows() === ""}`);
    // An address leads to its target whatever was filtered.
    location.hash = "#long";
    await pause();
    found.push(`link: ${rows()}, long ${details("long").open ? "opened" : "closed"}`);
    // So does a cell of the matrix.
    details("network").open = false;
    box("flaky").click();
    const cells = all(".grid .cell a");
    cells[1].click();
    await pause();
    const cell = details("network").open && !details("network").hidden;
    found.push(`cells ${cells.map((one) => one.textContent.split(" ")[0]).join(" ")}, network ${cell ? "opened" : "closed"}`);
    const [output, console] = details("long").querySelectorAll("details.log");
    const search = async (log, text) => {
      type(log.querySelector("input"), text);
      await pause();
      return log.querySelector("output").textContent;
    };
    const lines = (log) => [...log.querySelectorAll(".line")];
    const text = (line) => `${line.dataset.number} ${line.textContent.trimEnd()}`;
    const before = output.querySelector("pre").textContent;
    let count = await search(output, "two");
    const marks = [...output.querySelectorAll("mark")].map((mark) => mark.textContent).join(" ");
    found.push(`output: ${count}, ${lines(output).map(text).join("|")}, marks ${marks}`);
    await search(output, "");
    found.push(`restored ${output.querySelector("pre").textContent === before && before === "one\nTwo two\nthree\n"}`);
    count = await search(console, "4");
    const spans = lines(console);
    found.push(`console: ${count}, ${spans.length} spans, first ${spans[0].dataset.number}`);
    count = await search(console, "LINE 77 <B> (X)");
    found.push(`literal: ${count}, ${lines(console).map(text).join("|")}`);
    found.push(`nothing: ${await search(console, "nowhere")}`);
    const press = (key, at) => at.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
    document.activeElement.blur();
    press("/", document.body);
    found.push(`slash focuses ${document.activeElement === filter}`);
    type(filter, "zzz");
    press("Escape", filter);
    found.push(`escape clears ${filter.value === "" && rows() !== ""}`);
  } catch (error) {
    found.push(String(error));
  }
  document.documentElement.dataset.found = found.join("; ");
})();
