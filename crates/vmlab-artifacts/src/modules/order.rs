//! The order in which modules have to be loaded.

use std::collections::{HashMap, HashSet, VecDeque};

use super::index::Index;

/// A module to load.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Step<'a> {
    pub(super) name: &'a str,
    /// Only soft dependencies lead to it.
    pub(super) optional: bool,
    /// All that has to be loaded before it has a lower number.
    pub(super) wave: usize,
}

/// A dependency that the index does not have.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Missing {
    pub(super) module: String,
    pub(super) needed: String,
}

/// Orders `roots` and all that they need, dependencies first, each module once: in waves, of which each
/// needs only what is in those before it.
///
/// A soft dependency is loaded before the module that names it, unless it needs that module itself
/// or cannot be loaded at all: then it comes last, or not.
pub(super) fn load_order<'a>(
    index: &'a Index,
    roots: &[&'a str],
) -> Result<Vec<Step<'a>>, Missing> {
    let hard = needed_by(index, roots)?;
    let mut walk = Walk { index, marks: HashMap::new(), order: Vec::new(), later: VecDeque::new() };
    for root in roots {
        walk.visit(root);
    }
    let mut waves = Waves { index, of: HashMap::new() };
    walk.order.iter().for_each(|module| waves.place(module, 0));
    while let Some(module) = walk.later.pop_front() {
        let done = walk.order.len();
        walk.visit(module);
        // It waits for everything so far, and with it what it alone needs.
        let behind = waves.count();
        walk.order.iter().skip(done).for_each(|module| waves.place(module, behind));
    }
    let steps = walk.order.into_iter();
    let mut steps: Vec<_> = steps
        .map(|name| Step { name, optional: !hard.contains(name), wave: waves.of[name] })
        .collect();
    steps.sort_by_key(|step| step.wave);
    Ok(steps)
}

/// The waves of modules that are placed in their load order.
struct Waves<'a> {
    index: &'a Index,
    of: HashMap<&'a str, usize>,
}

impl<'a> Waves<'a> {
    /// Places a module behind what it needs or wishes to have, and in no wave before `least`.
    fn place(&mut self, module: &'a str, least: usize) {
        let needs = self.index.modules.get(module).into_iter().flat_map(|entry| &entry.needs);
        let soft = self.index.soft.get(module).into_iter().flat_map(|soft| &soft.before);
        let wishes = soft.flat_map(|name| self.index.resolve(name));
        let before = needs.map(String::as_str).chain(wishes);
        let behind = before.filter_map(|name| self.of.get(name)).map(|wave| wave + 1).max();
        self.of.insert(module, behind.unwrap_or(0).max(least));
    }

    fn count(&self) -> usize {
        self.of.values().max().map_or(0, |last| last + 1)
    }
}

/// `roots` and all modules that they cannot be loaded without.
fn needed_by<'a>(index: &'a Index, roots: &[&'a str]) -> Result<HashSet<&'a str>, Missing> {
    let mut found: HashSet<&str> = roots.iter().copied().collect();
    let mut todo = roots.to_vec();
    while let Some(module) = todo.pop() {
        let Some(entry) = index.modules.get(module) else { continue };
        for needed in &entry.needs {
            if index.is_builtin(needed) && !index.modules.contains_key(needed) {
                continue;
            }
            if !index.modules.contains_key(needed) {
                return Err(Missing { module: module.to_owned(), needed: needed.clone() });
            }
            if found.insert(needed) {
                todo.push(needed);
            }
        }
    }
    Ok(found)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mark {
    /// What it needs is being ordered.
    Open,
    /// It is in the order.
    Done,
}

struct Walk<'a> {
    index: &'a Index,
    marks: HashMap<&'a str, Mark>,
    order: Vec<&'a str>,
    /// Soft dependencies that have to wait for everything else.
    later: VecDeque<&'a str>,
}

impl<'a> Walk<'a> {
    /// Appends a module after all that it needs. The stack is a vector, because the depth is in the
    /// hands of whoever made the index.
    fn visit(&mut self, root: &'a str) {
        let mut stack = Vec::new();
        self.open(root, &mut stack);
        while let Some((module, todo)) = stack.last_mut() {
            let module = *module;
            match todo.pop_front() {
                Some(next) => self.open(next, &mut stack),
                None => {
                    stack.pop();
                    self.marks.insert(module, Mark::Done);
                    self.order.push(module);
                }
            }
        }
    }

    fn open(&mut self, module: &'a str, stack: &mut Vec<(&'a str, VecDeque<&'a str>)>) {
        if self.marks.contains_key(module) {
            return;
        }
        let Some(entry) = self.index.modules.get(module) else { return };
        self.marks.insert(module, Mark::Open);

        let mut todo = VecDeque::new();
        if let Some(soft) = self.index.soft.get(module) {
            for wish in soft.before.iter().flat_map(|name| self.index.resolve(name)) {
                match needed_by(self.index, &[wish]) {
                    Ok(needs) if needs.iter().any(|n| self.marks.get(n) == Some(&Mark::Open)) => {
                        self.later.push_back(wish);
                    }
                    Ok(_) => todo.push_back(wish),
                    Err(_) => {}
                }
            }
            for wish in soft.after.iter().flat_map(|name| self.index.resolve(name)) {
                if needed_by(self.index, &[wish]).is_ok() {
                    self.later.push_back(wish);
                }
            }
        }
        todo.extend(entry.needs.iter().map(String::as_str));
        stack.push((module, todo));
    }
}
