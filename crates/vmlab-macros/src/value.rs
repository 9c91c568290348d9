//! The values of keys, checked as far as that can be done without the library.

use proc_macro2::Span;
use syn::parse::{Parse, ParseStream};
use syn::{Error, Expr, ExprArray, ExprLit, ExprUnary, Lit, Result, UnOp};

/// A text and where it is.
#[derive(Debug, Clone)]
pub(crate) struct Text {
    pub(crate) value: String,
    pub(crate) span: Span,
}

impl Parse for Text {
    fn parse(input: ParseStream<'_>) -> Result<Self> {
        let literal: syn::LitStr = input.parse()?;
        Ok(Self { value: literal.value(), span: literal.span() })
    }
}

/// One text, or several in brackets.
pub(crate) fn texts(input: ParseStream<'_>) -> Result<Vec<Text>> {
    if !input.peek(syn::token::Bracket) {
        return Ok(vec![input.parse()?]);
    }
    let array: ExprArray = input.parse()?;
    let text = |element: Expr| match element {
        Expr::Lit(ExprLit { lit: Lit::Str(literal), .. }) => {
            Ok(Text { value: literal.value(), span: literal.span() })
        }
        other => Err(Error::new_spanned(other, "expected a string")),
    };
    array.elems.into_iter().map(text).collect()
}

/// A string, a number or `true` and `false`, as text.
pub(crate) fn scalar(input: ParseStream<'_>) -> Result<Text> {
    let expression: Expr = input.parse()?;
    let span = syn::spanned::Spanned::span(&expression);
    let (sign, literal) = match expression {
        Expr::Unary(ExprUnary { op: UnOp::Neg(_), expr, .. }) => ("-", *expr),
        other => ("", other),
    };
    let value = match literal {
        Expr::Lit(ExprLit { lit: Lit::Str(text), .. }) if sign.is_empty() => text.value(),
        Expr::Lit(ExprLit { lit: Lit::Int(number), .. }) => number.base10_digits().to_owned(),
        Expr::Lit(ExprLit { lit: Lit::Float(number), .. }) => number.base10_digits().to_owned(),
        Expr::Lit(ExprLit { lit: Lit::Bool(value), .. }) if sign.is_empty() => {
            value.value.to_string()
        }
        _ => return Err(Error::new(span, "expected a string, a number, `true` or `false`")),
    };
    Ok(Text { value: format!("{sign}{value}"), span })
}

/// A number of CPUs.
pub(crate) fn cpus(input: ParseStream<'_>) -> Result<u32> {
    let literal: syn::LitInt = input.parse()?;
    match literal.base10_parse::<u32>() {
        Ok(cpus) if cpus > 0 => Ok(cpus),
        _ => Err(Error::new(literal.span(), "expected a number of CPUs, at least 1")),
    }
}

/// A size such as `512M`.
pub(crate) fn size(input: ParseStream<'_>) -> Result<Text> {
    let text: Text = input.parse()?;
    let units = ["", "k", "kb", "kib", "m", "mb", "mib", "g", "gb", "gib", "t", "tb", "tib"];
    match has_unit(&text.value, &units) {
        true => Ok(text),
        false => Err(text.error("is no size: a number with K, M, G or T, such as 512M")),
    }
}

/// A time such as `60s`.
pub(crate) fn time(input: ParseStream<'_>) -> Result<Text> {
    let text: Text = input.parse()?;
    match has_unit(&text.value, &["", "ms", "s", "m", "min", "h"]) {
        true => Ok(text),
        false => Err(text.error("is no time: a number with ms, s, m or h, such as 90s")),
    }
}

/// CPUs by nodes, caches, cores and threads.
pub(crate) fn topology(input: ParseStream<'_>) -> Result<Text> {
    let text: Text = input.parse()?;
    let numbers: Vec<_> = text.value.split(',').map(|part| part.trim().parse::<u32>()).collect();
    match numbers.len() == 4 && numbers.iter().all(|number| number.as_ref().is_ok_and(|n| *n > 0)) {
        true => Ok(text),
        false => Err(text.error(
            "is no topology: nodes, last-level caches per node, cores per cache and threads per core, \
             such as 1,1,2,1",
        )),
    }
}

fn has_unit(text: &str, units: &[&str]) -> bool {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    number.parse::<f64>().is_ok() && units.contains(&unit.trim().to_ascii_lowercase().as_str())
}

impl Text {
    pub(crate) fn error(&self, what: &str) -> Error {
        Error::new(self.span, format!("`{}` {what}", self.value))
    }
}
