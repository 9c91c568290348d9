//! Standard streams of a command behave as those of a local one.

mod common;

use common::Site;

#[test]
fn stdout_and_stderr_stay_apart() {
    let site = Site::new();
    let outcome = site.sh(&[], "printf out; printf err >&2").output();
    outcome.expect_code(0);
    assert_eq!((outcome.stdout_text(), outcome.stderr_text()), ("out".into(), "err".into()));
}
