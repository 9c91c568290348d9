//! As much of GitHub's runner as `action.yml` needs: it evaluates what the steps are given, runs those that are
//! scripts, one after the other, and reads what they write.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use yaml_rust2::{Yaml, YamlLoader};

use crate::common::{Outcome, Site, vmlab_bin};

/// Variables of the tests' own that a runner would have as well.
const KEPT: [&str; 6] = ["PATH", "HOME", "XDG_CACHE_HOME", "VMLAB_CACHE_DIR", "USER", "LANG"];

/// The top of the sources, where the action is.
pub(super) fn repo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

pub(super) fn action() -> Yaml {
    load(&repo().join("action.yml"))
}

pub(super) fn load(path: &Path) -> Yaml {
    let text = std::fs::read_to_string(path).unwrap();
    YamlLoader::load_from_str(&text).unwrap().remove(0)
}

/// A mapping's entries; none where it is none.
pub(super) fn entries(yaml: &Yaml) -> Vec<(&str, &Yaml)> {
    let map = yaml.as_hash().into_iter().flatten();
    map.map(|(key, value)| (key.as_str().unwrap(), value)).collect()
}

/// What is in `${{ … }}`, if that is all of a text.
pub(super) fn expression(text: &str) -> Option<&str> {
    Some(text.strip_prefix("${{")?.strip_suffix("}}")?.trim())
}

/// What became of an action.
#[derive(Debug)]
pub(super) struct Done {
    /// Of the last step that ran.
    pub(super) outcome: Outcome,
    /// What all steps have printed.
    pub(super) log: String,
    pub(super) outputs: BTreeMap<String, String>,
    pub(super) summary: String,
}

/// Uses the action with these inputs, in the site's working directory, until a step fails.
pub(super) fn uses(site: &Site, inputs: &[(&str, &str)], env: &[(&str, &str)]) -> Done {
    let action = action();
    let mut given: BTreeMap<String, String> = entries(&action["inputs"])
        .into_iter()
        .map(|(name, input)| (name.to_owned(), input["default"].as_str().unwrap().to_owned()))
        .collect();
    given.insert("vmlab".to_owned(), vmlab_bin().to_str().unwrap().to_owned());
    for (name, value) in inputs {
        assert!(given.insert((*name).to_owned(), (*value).to_owned()).is_some(), "{name}");
    }
    let temp = site.path().join("temp");
    std::fs::create_dir_all(&temp).unwrap();
    let summary = site.path().join("summary");
    let mut steps: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
    let mut log = String::new();
    let mut last = None;
    for (index, step) in action["runs"]["steps"].as_vec().unwrap().iter().enumerate() {
        let Some(script) = step["run"].as_str() else { continue };
        let (file, output) =
            (site.path().join("step"), site.path().join(format!("output-{index}")));
        std::fs::write(&file, script).unwrap();
        std::fs::write(&output, "").unwrap();
        let mut run =
            site.host_sh("exec bash --noprofile --norc -e -o pipefail \"$0\"").env("TERM", "dumb");
        run.command.arg(&file).env_clear();
        run.command.env("XDG_STATE_HOME", site.state()).env("XDG_RUNTIME_DIR", site.runtime());
        let kept = KEPT.iter().filter_map(|name| Some((*name, std::env::var_os(name)?)));
        run.command.envs(kept);
        for (name, value) in entries(&step["env"]) {
            let value = evaluate(value.as_str().unwrap(), &given, &steps);
            run.command.env(name, value);
        }
        run.command
            .env("CI", "true")
            .env("GITHUB_ACTIONS", "true")
            .env("GITHUB_ACTION_PATH", repo())
            .env("GITHUB_OUTPUT", &output)
            .env("GITHUB_STEP_SUMMARY", &summary)
            .env("GITHUB_WORKSPACE", site.cwd())
            .env("RUNNER_OS", "Linux")
            .env("RUNNER_TEMP", &temp)
            .envs(env.iter().copied());
        let outcome = run.output();
        log.push_str(&outcome.stdout_text());
        log.push_str(&outcome.stderr_text());
        if let Some(id) = step["id"].as_str() {
            steps.insert(id.to_owned(), outputs(&output));
        }
        let failed = outcome.code != Some(0);
        last = Some(outcome);
        if failed {
            break;
        }
    }
    let outputs = entries(&action["outputs"]).into_iter().map(|(name, output)| {
        (name.to_owned(), evaluate(output["value"].as_str().unwrap(), &given, &steps))
    });
    Done {
        outputs: outputs.collect(),
        outcome: last.unwrap(),
        log,
        summary: std::fs::read_to_string(summary).unwrap_or_default(),
    }
}

/// An output that no step has written is empty, as it is at GitHub.
fn evaluate(
    text: &str,
    inputs: &BTreeMap<String, String>,
    steps: &BTreeMap<String, BTreeMap<String, String>>,
) -> String {
    let Some(expression) = expression(text) else {
        assert!(!text.contains("${{"), "{text}");
        return text.to_owned();
    };
    match expression.split('.').collect::<Vec<_>>()[..] {
        ["inputs", name] => inputs[name].clone(),
        ["steps", id, "outputs", name] => {
            steps.get(id).and_then(|step| step.get(name)).cloned().unwrap_or_default()
        }
        _ => panic!("{expression} is none that this runner knows"),
    }
}

/// `NAME=VALUE`, or `NAME<<DELIMITER`, lines, and the delimiter.
fn outputs(path: &Path) -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(path).unwrap();
    let mut lines = text.lines();
    let mut found = BTreeMap::new();
    while let Some(line) = lines.next() {
        let (name, value) = match line.split_once("<<") {
            Some((name, end)) => {
                let value: Vec<&str> = lines.by_ref().take_while(|line| *line != end).collect();
                (name, value.join("\n"))
            }
            None => line.split_once('=').map(|(name, value)| (name, value.to_owned())).unwrap(),
        };
        found.insert(name.to_owned(), value);
    }
    found
}
