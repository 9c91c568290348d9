//! Targets of a matrix as tables: two of its axes are rows and columns, and each value of the others has a table
//! of its own.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::super::text::{add, duration, escape_line};
use super::super::{Results, TargetResult};
use super::shown_name;

/// A table has at most so many cells for each target: one of combinations that `include` has one by one would be all
/// holes, and large.
const SPARSE: usize = 20;

/// A target, and the identifier of its details.
type Linked<'a> = (&'a TargetResult, &'a str);

/// An axis on which the targets of a matrix differ.
struct Axis<'a> {
    name: &'a str,
    /// Its place in the axes of each target.
    index: usize,
    /// In the order of the targets.
    values: Vec<&'a str>,
}

/// The tables of all matrices; nothing where there is none.
pub(super) fn grids(out: &mut String, results: &Results, ids: &[String]) {
    let grids: Vec<String> =
        matrices(results, ids).iter().filter_map(|matrix| grid(matrix)).collect();
    if grids.is_empty() {
        return;
    }
    out.push_str("<section aria-labelledby=\"ui-matrix\">\n<h2 id=\"ui-matrix\">Matrix</h2>\n");
    grids.iter().for_each(|grid| out.push_str(grid));
    out.push_str("</section>\n");
}

/// Targets that one matrix has made, as far as that shows: they are beside each other, have the same axes, and no
/// two the same values.
fn matrices<'a>(results: &'a Results, ids: &'a [String]) -> Vec<Vec<Linked<'a>>> {
    let mut matrices: Vec<Vec<Linked<'a>>> = Vec::new();
    let mut values: HashSet<&[(String, String)]> = HashSet::new();
    let names = |target: &'a TargetResult| target.axes.iter().map(|(name, _)| name);
    for (target, id) in results.targets.iter().zip(ids) {
        if target.axes.is_empty() {
            continue;
        }
        let repeated = !values.insert(&target.axes);
        match matrices.last_mut().filter(|last| !repeated && names(last[0].0).eq(names(target))) {
            Some(last) => last.push((target, id)),
            None => {
                values = HashSet::from([target.axes.as_slice()]);
                matrices.push(vec![(target, id)]);
            }
        }
    }
    matrices
}

fn axes<'a>(matrix: &[Linked<'a>]) -> Vec<Axis<'a>> {
    let Some((first, _)) = matrix.first() else { return Vec::new() };
    let axis = |(index, (name, _)): (usize, &'a (String, String))| {
        let mut values: Vec<&str> = Vec::new();
        for (target, _) in matrix {
            let value = value(target, index);
            if !values.contains(&value) {
                values.push(value);
            }
        }
        Axis { name, index, values }
    };
    first.axes.iter().enumerate().map(axis).filter(|axis| axis.values.len() > 1).collect()
}

fn value(target: &TargetResult, index: usize) -> &str {
    target.axes.get(index).map_or("", |(_, value)| value)
}

fn grid(matrix: &[Linked<'_>]) -> Option<String> {
    let mut axes = axes(matrix);
    // The longest are rows and columns, and of two alike the first. Pages are longer than they are wide.
    axes.sort_by_key(|axis| std::cmp::Reverse(axis.values.len()));
    let mut axes = axes.into_iter();
    let rows = axes.next()?;
    let columns = axes.next();
    let others: Vec<Axis<'_>> = axes.collect();
    let mut tables: BTreeMap<Vec<usize>, Vec<Linked<'_>>> = BTreeMap::new();
    for &(target, id) in matrix {
        let place = |axis: &Axis<'_>| {
            let value = value(target, axis.index);
            axis.values.iter().position(|other| *other == value).unwrap_or_default()
        };
        tables.entry(others.iter().map(place).collect()).or_default().push((target, id));
    }
    let mut out = String::new();
    for (places, targets) in tables {
        let of = others.iter().zip(places);
        let of: Vec<String> =
            of.map(|(axis, place)| labelled(axis.name, axis.values[place])).collect();
        if !of.is_empty() {
            add(&mut out, format_args!("<h3>{}</h3>\n", of.join(", ")));
        }
        table(&mut out, &rows, columns.as_ref(), &targets);
    }
    Some(out)
}

fn labelled(axis: &str, value: &str) -> String {
    format!("{}: {}", escape_line(axis), escape_line(value))
}

fn table(out: &mut String, rows: &Axis<'_>, columns: Option<&Axis<'_>>, targets: &[Linked<'_>]) {
    let mut cells: HashMap<(&str, &str), Linked<'_>> = HashMap::new();
    let row_of = |target| value(target, rows.index);
    let column_of = |target| columns.map_or("", |axis| value(target, axis.index));
    for &(target, id) in targets {
        cells.insert((row_of(target), column_of(target)), (target, id));
    }
    let used: HashSet<&str> = cells.keys().map(|(row, _)| *row).collect();
    let row_values: Vec<&str> =
        rows.values.iter().copied().filter(|value| used.contains(value)).collect();
    let used: HashSet<&str> = cells.keys().map(|(_, column)| *column).collect();
    let column_values: Vec<&str> = match columns {
        Some(axis) => axis.values.iter().copied().filter(|value| used.contains(value)).collect(),
        None => vec![""],
    };
    if row_values.len() * column_values.len() > SPARSE * targets.len() {
        return out.push_str("<p class=\"note\">Too sparse for a table.</p>\n");
    }
    let row_name = escape_line(rows.name);
    let corner = match columns {
        Some(columns) => format!("{row_name} \\ {}", escape_line(columns.name)),
        None => row_name,
    };
    add(
        out,
        format_args!(
            "<div class=\"scroll\"><table class=\"grid\">\n<thead><tr><th scope=\"col\">{corner}</th>"
        ),
    );
    for value in &column_values {
        add(out, format_args!("<th scope=\"col\">{}</th>", escape_line(value)));
    }
    out.push_str("</tr></thead>\n<tbody>\n");
    for row in &row_values {
        add(out, format_args!("<tr><th scope=\"row\">{}</th>", escape_line(row)));
        for column in &column_values {
            match cells.get(&(*row, *column)) {
                Some(linked) => cell(out, *linked),
                // It is excluded, or was not chosen.
                None => out.push_str("<td class=\"empty\">–</td>"),
            }
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody>\n</table></div>\n");
}

fn cell(out: &mut String, (target, id): Linked<'_>) {
    let (name, outcome) = (shown_name(target), target.outcome.name());
    add(
        out,
        format_args!(
            "<td class=\"cell {outcome}\"><a href=\"#{id}\" title=\"{name}\"><span class=\"badge {outcome}\">{outcome}\
             </span> <span class=\"took\">{}</span></a></td>",
            duration(target.took_ms())
        ),
    );
}
