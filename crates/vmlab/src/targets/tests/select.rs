//! What is selected of a file.

use std::collections::{BTreeMap, BTreeSet};

use super::vmlab;
use crate::targets::{Selection, SelectionError, Shard, Target};

fn targets() -> Vec<Target> {
    let target = |name: &str, tags: &str| {
        format!("[[target]]\nname = '{name}'\ncommand = 'c'\ntags = {tags}\n")
    };
    let all = [("kernel 6.1", "[]"), ("kernel 6.12", "['slow']"), ("image", "['slow', 'net']")];
    vmlab(&all.map(|(name, tags)| target(name, tags)).concat())
}

fn selected(selection: &Selection) -> Vec<String> {
    let targets = targets();
    selection.select(&targets).unwrap().into_iter().map(|target| target.name.clone()).collect()
}

#[test]
fn names_and_tags_select() {
    let all = Selection::all;
    assert_eq!(selected(&all()).len(), 3);
    assert_eq!(selected(&all().filter(r"kernel 6\.").unwrap()), ["kernel 6.1", "kernel 6.12"]);
    assert_eq!(
        selected(&all().filter("1$").unwrap().filter("^i").unwrap()),
        ["kernel 6.1", "image"]
    );
    assert_eq!(selected(&all().tag("slow")), ["kernel 6.12", "image"]);
    assert_eq!(selected(&all().tag("slow").skip_tag("net")), ["kernel 6.12"]);
    assert_eq!(selected(&all().filter("6").unwrap().tag("slow").tag("net")), ["kernel 6.12"]);
}

#[test]
fn selecting_nothing_is_an_error_that_names_what_there_is() {
    let targets = targets();
    let error = Selection::all().filter("kernel 5").unwrap().select(&targets).unwrap_err();
    assert_eq!(
        error.to_string(),
        "no target is selected; there are `kernel 6.1`, `kernel 6.12 (slow)`, `image (net, slow)`"
    );
    assert!(Selection::all().tag("quick").select(&targets).is_err());
    let names = (0..25).map(|number| number.to_string()).collect();
    let error = SelectionError::Nothing { names }.to_string();
    assert!(error.ends_with("`18`, `19` and 5 more"), "{error}");
    let error = Selection::all().filter("(").unwrap_err();
    assert_eq!(error.to_string(), "the filter `(` is no regular expression");
}

fn part(text: &str, names: &[&str], recorded: &BTreeMap<String, u64>) -> Vec<usize> {
    text.parse::<Shard>().unwrap().of(names, recorded)
}

#[test]
fn shards_have_each_target_once() {
    let names: Vec<String> = (0..37).map(|number| format!("t{number}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let recorded: BTreeMap<String, u64> =
        names.iter().step_by(3).zip(1..).map(|(name, ms)| ((*name).to_owned(), ms * 100)).collect();
    for count in [1, 2, 8, 37, 50] {
        let mut seen = BTreeSet::new();
        for index in 1..=count {
            let part = part(&format!("{index}/{count}"), &names, &recorded);
            assert!(part.is_sorted());
            assert!(part.into_iter().all(|index| seen.insert(index)), "{index}/{count}");
        }
        assert_eq!(seen.len(), names.len(), "{count}");
    }
}

#[test]
fn shards_are_balanced_and_do_not_depend_on_the_order() {
    let names = ["long", "a", "b", "c", "new"];
    let recorded = [("long", 900), ("a", 200), ("b", 300), ("c", 400), ("gone", 9000)];
    let recorded: BTreeMap<String, u64> = recorded.map(|(name, ms)| (name.to_owned(), ms)).into();
    let pick = |text: &str, names: &[&str]| -> Vec<String> {
        let indices = part(text, names, &recorded);
        indices.into_iter().map(|index| names[index].to_owned()).collect()
    };
    // What was never measured is taken to last 400 ms, so that both have to do for 1100 ms.
    assert_eq!(pick("1/2", &names), ["long", "a"]);
    assert_eq!(pick("2/2", &names), ["b", "c", "new"]);
    let mut turned = names;
    turned.reverse();
    let sorted = |mut names: Vec<String>| {
        names.sort();
        names
    };
    for shard in ["1/3", "2/3", "3/3"] {
        assert_eq!(sorted(pick(shard, &names)), sorted(pick(shard, &turned)), "{shard}");
    }
    // Without any times, each has as many.
    let counts = ["1/2", "2/2"].map(|shard| part(shard, &names, &BTreeMap::new()).len());
    assert_eq!(counts, [3, 2]);
}

#[test]
fn shards_are_read() {
    for good in ["1/1", "8/8", "2/8"] {
        assert!(good.parse::<Shard>().is_ok(), "{good}");
    }
    for bad in ["", "1", "0/2", "3/2", "1/0", "a/b", "1/2/3", "-1/2"] {
        let error = bad.parse::<Shard>().unwrap_err().to_string();
        assert!(error.contains(&format!("`{bad}`")), "{error}");
    }
}
