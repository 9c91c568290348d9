//! The page in headless Chromium: what its script does, and what no script may.

use std::path::Path;
use std::process::Command;

use vmlab::results::{AttemptResult, Outcome, TargetResult, html};

use crate::samples::{self, attempt, suite, target};

/// The page's tree when its scripts have run.
fn shown(page: &str, hash: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("page.html");
    std::fs::write(&file, page).unwrap();
    let output = chromium(dir.path())
        .arg("--dump-dom")
        .arg(format!("file://{}{hash}", file.display()))
        .output()
        .expect("timeout runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("</html>"), "chromium, of Debian's package of that name, runs: {errors}");
    text
}

fn chromium(dir: &Path) -> Command {
    // A browser that hangs ends, with all of its processes.
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", "240", "chromium", "--headless", "--disable-gpu"]);
    // Its sandbox works for no root, and in few containers; the pages are ours.
    command.args(["--no-sandbox", "--disable-breakpad", "--disable-dev-shm-usage"]);
    command.args(["--virtual-time-budget=5000", "--window-size=1200,900"]);
    command.arg(format!("--user-data-dir={}", dir.join("profile").display()));
    command.env("TMPDIR", dir).env("HOME", dir).env_remove("DBUS_SESSION_BUS_ADDRESS");
    command
}

#[test]
fn searching_filtering_and_links_work() {
    const LINES: usize = 50_000;
    let console: String = (1..=LINES).map(|number| format!("line {number} <b> (x)\n")).collect();
    let long = AttemptResult { console, ..attempt(None, "one\nTwo two\nthree\n") };
    let of = |kernel: &str| samples::axes(&[("kernel", kernel)]);
    let results = suite(vec![
        TargetResult { axes: of("a"), ..target("long", Outcome::Passed, vec![long]) },
        TargetResult { axes: of("b"), ..samples::flaky() },
        samples::failed(),
        samples::timeout(),
    ]);
    let page = html(&results);
    // Only for this script: the page's policy runs none but the page's own.
    let begin = page.find("script-src 'sha256-").unwrap();
    let end = begin + page[begin..].find("';").unwrap() + 1;
    let page = format!("{}script-src 'unsafe-inline'{}", &page[..begin], &page[end..]);
    let driver = include_str!("browser.js");
    let page = page.replace("</body>", &format!("<script>{driver}</script></body>"));
    let tree = shown(&page, "#network");
    let begin = tree.find("data-found=\"").expect("the driver came to its end") + 12;
    let found = &tree[begin..begin + tree[begin..].find('"').unwrap()];
    let found = found.replace("&lt;", "<").replace("&gt;", ">");
    assert_eq!(
        found,
        "network opened; others closed; log scrolled true to its end true; \
         filter 6.12 exit: exit; passed off: network exit hang; all off: none true; \
         link: long network exit hang, long opened; \
         cells passed flaky, network opened; \
         output: 1 line, 2 Two two, marks Two two; restored true; \
         console: 23756 lines, the first 2000 are shown, 2000 spans, first 4; \
         literal: 1 line, 77 line 77 <b> (x); nothing: 0 lines; \
         slash focuses true; escape clears true"
    );
}

#[test]
fn no_script_runs_but_the_pages_own() {
    let results = suite(vec![samples::hostile(), samples::flaky()]);
    // Even if escaping failed: as this would be in the page.
    let page = html(&results).replace(
        "</main>",
        "</main><script>document.title='owned'</script><img src=\"x\" onerror=\"document.title='owned'\">",
    );
    let tree = shown(&page, "#network");
    assert!(tree.contains("<html lang=\"en\" class=\"scripted\">"), "the page's own script runs");
    assert!(tree.contains("<title>demo: 0 passed, 1 flaky, 1 failed</title>"));
    let details = tree.find("<details class=\"target flaky\"").unwrap();
    let tag = &tree[details..details + tree[details..].find('>').unwrap()];
    assert!(tag.ends_with(" open=\"\""), "the address names it: {tag}");
}
