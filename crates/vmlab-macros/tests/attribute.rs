//! What the attribute refuses, and where the compiler points to.

#[test]
fn mistakes_are_shown_where_they_are() {
    trybuild::TestCases::new().compile_fail("tests/refused/*.rs");
}
