//! Tests of kernel modules: they are built for the kernel of a VM, loaded into it, used and unloaded, with a look at the
//! guest before and after each of that.

mod checks;
mod code;
mod life;
mod own_tests;
mod session;
mod tap;

use std::path::PathBuf;
use std::time::Duration;

use regex::Regex;

use tap::Tap;

pub(crate) use life::{Before, Life, Step, content_of};
pub(crate) use own_tests::{OwnTest, SKIPPED, build as build_own_tests};

/// How long loading, unloading or a look may take unless set, as long as that is on an emulated processor.
pub const STEP_TIME: Duration = Duration::from_secs(20);

/// The tests in a text (TAP) that failed.
pub(crate) fn failures_of_tap(text: &str) -> Vec<String> {
    Tap::read(text.lines()).failed
}

/// A text is no regular expression.
#[derive(Debug, thiserror::Error)]
#[error("`{text}` is no regular expression")]
pub struct BadRegex {
    text: String,
    source: regex::Error,
}

/// What is loaded around the command of a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModuleSpec {
    /// The directory with the sources, absolute.
    pub dir: PathBuf,
    /// Parameters, `name=value` each: of the module that no other one needs, or `module.name=value`.
    pub parameters: Vec<String>,
    /// Regular expressions for lines of the kernel's log that are no failure, though they are warnings or worse.
    pub allowed_log: Vec<String>,
    /// Whether the programs in its directory `tests` are run while it is loaded.
    pub own_tests: bool,
    /// What of its debugging messages is switched on while it is loaded: `+p`, `file x.c +p`
    /// (`Documentation/admin-guide/dynamic-debug-howto.rst`).
    pub dynamic_debug: Option<String>,
    /// Trace events that are shown: `SYSTEM` or `SYSTEM:EVENT`.
    pub trace: Vec<String>,
    /// Whether the kernel's log is shown among the command's output.
    pub show_log: bool,
    /// How often they are loaded and unloaded while the command runs, again and again until that is done, instead of
    /// once around it.
    pub cycles: Option<u32>,
    /// How long loading, unloading or a look may take.
    pub step_time: Duration,
    /// The script that repeats the test, for who reads what is kept of a failure.
    pub again: Option<String>,
}

impl ModuleSpec {
    /// The modules in this directory, without parameters.
    pub fn of(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            parameters: Vec::new(),
            allowed_log: Vec::new(),
            own_tests: false,
            dynamic_debug: None,
            trace: Vec::new(),
            show_log: false,
            cycles: None,
            step_time: STEP_TIME,
            again: None,
        }
    }

    /// Lets lines of the kernel's log pass that match a regular expression.
    ///
    /// # Errors
    /// When it is none.
    pub fn allow_log(&mut self, regex: &str) -> Result<(), BadRegex> {
        let bad = |source| BadRegex { text: regex.to_owned(), source };
        Regex::new(regex).map_err(bad)?;
        self.allowed_log.push(regex.to_owned());
        Ok(())
    }

    /// Parameters that are for none of these modules.
    pub(crate) fn strangers(&self, modules: &[&str]) -> Vec<&str> {
        let stranger = |parameter: &&String| {
            let name = parameter.split('=').next().unwrap_or_default();
            let of = name.split_once('.').map(|(of, _)| of.replace('-', "_"));
            of.is_some_and(|of| !modules.contains(&of.as_str()))
        };
        self.parameters.iter().filter(stranger).map(String::as_str).collect()
    }

    /// The parameters for a module, as the kernel takes them. `last` is the one that no other needs.
    pub(crate) fn parameters_of(&self, module: &str, last: bool) -> String {
        let own = self.parameters.iter().filter_map(|parameter| {
            let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            match name.split_once('.') {
                Some((of, _)) if of.replace('-', "_") == module => Some(&parameter[of.len() + 1..]),
                None if last => Some(parameter.as_str()),
                _ => None,
            }
            .filter(|_| !value.contains('\0'))
        });
        let debug = self.dynamic_debug.as_ref().map(|query| format!("dyndbg=\"{query}\""));
        own.map(str::to_owned).chain(debug).collect::<Vec<String>>().join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_go_to_their_modules() {
        let mut spec = ModuleSpec::of("/m");
        spec.parameters =
            ["size=4", "my-base.debug=1", "name=\"a.b c\""].map(str::to_owned).to_vec();
        assert_eq!(spec.parameters_of("top", true), "size=4 name=\"a.b c\"");
        assert_eq!(spec.parameters_of("my_base", false), "debug=1");
        assert_eq!(spec.parameters_of("other", false), "");
        assert!(spec.strangers(&["top", "my_base"]).is_empty());
        assert_eq!(spec.strangers(&["top"]), ["my-base.debug=1"]);
        spec.dynamic_debug = Some("file x.c +p".to_owned());
        assert_eq!(spec.parameters_of("other", false), "dyndbg=\"file x.c +p\"");
    }
}
