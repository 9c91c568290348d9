//! Reports as machines and people read them.
#![allow(clippy::unwrap_used, reason = "clippy takes the helpers of tests for other code")]

mod browser;
mod github;
mod html;
mod json;
mod junit;
#[allow(dead_code, reason = "an example uses the rest of it")]
mod samples;
mod tap;
mod terminal;
