//! Many questions to one guest: a script asks them, and the test compares the answers one by one.

use std::collections::BTreeMap;

use crate::common::Outcome;

/// `fact NAME COMMAND…` prints what the command printed, stderr included, and its exit code.
/// Everything goes through one `printf`, so that a command cannot end up between the marks.
const PRELUDE: &str = r#"
fact() {
    local name="$1" out code
    shift
    out=$("$@" 2>&1)
    code=$?
    printf '@@%s\n%s\n@@%s %s\n' "$name" "$out" end "$code"
}
"#;

/// The answers of a guest, by the names of the questions.
#[derive(Debug)]
pub(crate) struct Facts(BTreeMap<String, (String, i32)>);

/// The words that make bash ask: put them behind `--`.
pub(crate) fn script(text: &str) -> [String; 3] {
    ["bash".to_owned(), "-c".to_owned(), format!("{PRELUDE}{text}")]
}

impl Facts {
    /// Reads what a script wrote. It has to have ended well, and to have kept silent otherwise.
    #[track_caller]
    pub(crate) fn of(outcome: &Outcome) -> Self {
        outcome.expect_code(0);
        assert_eq!(outcome.stderr_text(), "");
        let text = outcome.stdout_text();
        let mut facts = BTreeMap::new();
        let mut lines = text.lines();
        while let Some(line) = lines.next() {
            let name = line.strip_prefix("@@").unwrap_or_else(|| panic!("{line:?} in {text}"));
            let mut answer = Vec::new();
            let code = loop {
                let line = lines.next().unwrap_or_else(|| panic!("{name} does not end: {text}"));
                match line.strip_prefix("@@end ") {
                    Some(code) => break code.parse().unwrap(),
                    None => answer.push(line),
                }
            };
            let known = facts.insert(name.to_owned(), (answer.join("\n"), code));
            assert_eq!(known, None, "{name} is asked twice");
        }
        Self(facts)
    }

    #[track_caller]
    fn get(&self, name: &str) -> &(String, i32) {
        self.0.get(name).unwrap_or_else(|| panic!("nothing was asked about {name}: {self:?}"))
    }

    /// What a command printed. It has to have succeeded.
    #[track_caller]
    pub(crate) fn text(&self, name: &str) -> &str {
        let (text, code) = self.get(name);
        assert_eq!(*code, 0, "{name}: {text}");
        text
    }

    #[track_caller]
    pub(crate) fn number(&self, name: &str) -> u64 {
        let text = self.text(name);
        text.trim().parse().unwrap_or_else(|_| panic!("{name} is no number: {text:?}"))
    }

    /// Fails unless the command succeeded and printed exactly this.
    #[track_caller]
    pub(crate) fn expect(&self, name: &str, wanted: &str) -> &Self {
        assert_eq!(self.text(name), wanted, "{name}");
        self
    }

    /// Fails unless the command failed and printed this among other things.
    #[track_caller]
    pub(crate) fn expect_failure(&self, name: &str, wanted: &str) -> &Self {
        let (text, code) = self.get(name);
        assert_ne!(*code, 0, "{name} succeeded: {text}");
        assert!(text.contains(wanted), "{name}: no {wanted:?} in {text:?}");
        self
    }
}
