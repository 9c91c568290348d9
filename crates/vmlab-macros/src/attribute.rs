//! What is in the attribute's parentheses.

use proc_macro2::Span;
use syn::parse::{Parse, ParseStream};
use syn::punctuated::Punctuated;
use syn::{Error, Ident, LitBool, Result, Token, parenthesized};

use crate::value::{self, Text};

/// Keys that may be there several times.
const SEVERAL: [&str; 2] = ["share", "disk"];

/// All keys.
const KEYS: [&str; 16] = [
    "kernel",
    "cpus",
    "topology",
    "memory",
    "share",
    "disk",
    "net",
    "timeout",
    "fail_on",
    "expect_err",
    "expect_event",
    "rootfs",
    "image",
    "user",
    "append",
    "host",
];

/// Keys of which a test has one or the other, and why.
const ALTERNATIVES: [(&str, &str, &str); 4] = [
    ("cpus", "topology", "both say how many CPUs there are"),
    ("image", "rootfs", "the guest's root is on the image"),
    ("host", "user", "what runs in the VM of a `host` test names its own user"),
    ("host", "timeout", "nothing can end a function that runs on the host"),
];

/// How far a word may be from the one that is meant.
const SLIP: usize = 2;

/// A key and where it is.
#[derive(Debug, Clone)]
pub(crate) struct Key {
    name: String,
    span: Span,
}

/// A directory of the host.
#[derive(Debug)]
pub(crate) struct Share {
    pub(crate) host: Text,
    pub(crate) guest: Option<Text>,
    pub(crate) writable: bool,
}

/// All of it, without contradictions.
#[derive(Debug, Default)]
pub(crate) struct Attribute {
    keys: Vec<Key>,
    pub(crate) kernels: Vec<Text>,
    pub(crate) cpus: Option<u32>,
    pub(crate) topology: Option<Text>,
    pub(crate) memory: Option<Text>,
    pub(crate) shares: Vec<Share>,
    /// The options of each disk, as names and values.
    pub(crate) disks: Vec<Vec<(String, String)>>,
    pub(crate) net: Option<Text>,
    pub(crate) timeout: Option<Text>,
    pub(crate) fail_on: Option<Vec<Text>>,
    pub(crate) expect_err: bool,
    pub(crate) expect_event: Option<Text>,
    pub(crate) rootfs: Option<Text>,
    pub(crate) image: Option<Text>,
    pub(crate) user: Option<Text>,
    pub(crate) append: Vec<Text>,
    pub(crate) host: bool,
}

impl Parse for Attribute {
    fn parse(input: ParseStream<'_>) -> Result<Self> {
        let mut read = Self::default();
        while !input.is_empty() {
            let key = input.call(key)?;
            read.entry(&key, input)?;
            read.keys.push(key);
            if !input.is_empty() {
                input.parse::<Token![,]>()?;
            }
        }
        read.check()?;
        Ok(read)
    }
}

impl Attribute {
    /// Where a key is, if it is there.
    pub(crate) fn span_of(&self, name: &str) -> Option<Span> {
        self.keys.iter().find(|key| key.name == name).map(|key| key.span)
    }

    fn entry(&mut self, key: &Key, input: ParseStream<'_>) -> Result<()> {
        let name = key.name.as_str();
        if !SEVERAL.contains(&name) && self.span_of(name).is_some() {
            return Err(key.error(format!("`{name}` is there twice")));
        }
        match name {
            "share" => {
                self.shares.push(share(key, input)?);
                return Ok(());
            }
            "disk" => {
                let disk = disk(key, input)?;
                return self.add_disk(disk);
            }
            "host" => {
                self.host = flag(input)?;
                return Ok(());
            }
            "expect_err" => {
                self.expect_err = flag(input)?;
                return Ok(());
            }
            name if !KEYS.contains(&name) => return Err(key.unknown("key of a test", &KEYS)),
            _ => {}
        }
        input.parse::<Token![=]>()?;
        match name {
            "kernel" => self.kernels = kernels(input)?,
            "cpus" => self.cpus = Some(value::cpus(input)?),
            "topology" => self.topology = Some(value::topology(input)?),
            "memory" => self.memory = Some(value::size(input)?),
            "net" => self.net = Some(net(input)?),
            "timeout" => self.timeout = Some(value::time(input)?),
            "fail_on" => self.fail_on = Some(value::texts(input)?),
            "expect_event" => self.expect_event = Some(input.parse()?),
            "rootfs" => self.rootfs = Some(input.parse()?),
            "image" => self.image = Some(input.parse()?),
            "user" => self.user = Some(input.parse()?),
            _ => self.append = value::texts(input)?,
        }
        Ok(())
    }

    fn add_disk(&mut self, disk: Vec<(String, Text)>) -> Result<()> {
        let name_of = |disk: &[(String, String)]| {
            disk.iter().find(|(key, _)| key == "name").map(|(_, name)| name.clone())
        };
        if let Some((_, name)) = disk.iter().find(|(key, _)| key == "name")
            && self.disks.iter().any(|other| name_of(other).as_ref() == Some(&name.value))
        {
            return Err(name.error("is the name of another disk"));
        }
        self.disks.push(disk.into_iter().map(|(key, text)| (key, text.value)).collect());
        Ok(())
    }

    fn check(&self) -> Result<()> {
        for (one, other, why) in ALTERNATIVES {
            if let (Some(first), Some(second)) = (self.span_of(one), self.span_of(other)) {
                let mut error = Error::new(
                    second,
                    format!("`{one}` and `{other}` cannot both be there: {why}"),
                );
                error.combine(Error::new(first, format!("`{one}` is here")));
                return Err(error);
            }
        }
        Ok(())
    }
}

impl Key {
    fn error(&self, message: impl std::fmt::Display) -> Error {
        Error::new(self.span, message)
    }

    fn unknown(&self, what: &str, known: &[&str]) -> Error {
        let name = &self.name;
        let near = known
            .iter()
            .map(|known| (strsim::damerau_levenshtein(name, known), known))
            .filter(|(distance, known)| {
                *distance <= SLIP && *distance < known.len().min(name.len())
            })
            .min();
        match near {
            Some((_, near)) => self.error(format!("`{name}` is no {what}: did you mean `{near}`?")),
            None => self.error(format!("`{name}` is no {what}; there are {}", known.join(", "))),
        }
    }
}

fn key(input: ParseStream<'_>) -> Result<Key> {
    let ident = input.call(<Ident as syn::ext::IdentExt>::parse_any)?;
    Ok(Key { name: ident.to_string(), span: ident.span() })
}

/// A key alone, or with `= true` or `= false`.
fn flag(input: ParseStream<'_>) -> Result<bool> {
    if input.peek(Token![=]) {
        input.parse::<Token![=]>()?;
        return Ok(input.parse::<LitBool>()?.value);
    }
    Ok(true)
}

fn kernels(input: ParseStream<'_>) -> Result<Vec<Text>> {
    let span = input.span();
    let kernels = value::texts(input)?;
    if kernels.is_empty() {
        return Err(Error::new(span, "there is no kernel in it"));
    }
    for (at, kernel) in kernels.iter().enumerate() {
        if kernels[..at].iter().any(|other| other.value == kernel.value) {
            return Err(kernel.error("is there twice"));
        }
    }
    Ok(kernels)
}

fn net(input: ParseStream<'_>) -> Result<Text> {
    let text: Text = input.parse()?;
    match text.value.as_str() {
        "none" | "user" => Ok(text),
        _ => Err(text.error("is no network; there are none, user")),
    }
}

/// The entries of a key's parentheses.
fn entries<T>(
    input: ParseStream<'_>,
    entry: fn(ParseStream<'_>) -> Result<(Key, T)>,
) -> Result<Vec<(Key, T)>> {
    let content;
    parenthesized!(content in input);
    let mut read: Vec<(Key, T)> = Vec::new();
    let all = Punctuated::<_, Token![,]>::parse_terminated_with(&content, entry)?;
    for (key, value) in all {
        if read.iter().any(|(other, _)| other.name == key.name) {
            return Err(key.error(format!("`{}` is there twice", key.name)));
        }
        read.push((key, value));
    }
    Ok(read)
}

fn share(share: &Key, input: ParseStream<'_>) -> Result<Share> {
    const KEYS: [&str; 3] = ["host", "guest", "writable"];
    let all = entries(input, |input| {
        let key = input.call(key)?;
        match key.name.as_str() {
            "host" | "guest" => {
                input.parse::<Token![=]>()?;
                let text = input.parse::<Text>()?;
                Ok((key, text))
            }
            "writable" => {
                let span = key.span;
                let value = flag(input)?.to_string();
                Ok((key, Text { value, span }))
            }
            _ => Err(key.unknown("key of a share", &KEYS)),
        }
    })?;
    let mut read = Share {
        host: Text { value: String::new(), span: share.span },
        guest: None,
        writable: false,
    };
    for (key, text) in all {
        match key.name.as_str() {
            "host" => read.host = text,
            "guest" => read.guest = Some(text),
            _ => read.writable = text.value == "true",
        }
    }
    if read.host.value.is_empty() {
        return Err(share.error("`host` is missing: the directory of the host"));
    }
    Ok(read)
}

/// Which options there are is the library's to know; a disk is parsed there as the command line's is.
fn disk(disk: &Key, input: ParseStream<'_>) -> Result<Vec<(String, Text)>> {
    let all = entries(input, |input| {
        let key = input.call(key)?;
        if !input.peek(Token![=]) {
            let span = key.span;
            return Ok((key, Text { value: "true".to_owned(), span }));
        }
        input.parse::<Token![=]>()?;
        let text = value::scalar(input)?;
        match text.value.contains(',') {
            true => Err(text.error("has a comma, which parts options of a disk")),
            false => Ok((key, text)),
        }
    })?;
    if all.is_empty() {
        return Err(disk.error("a disk needs options, such as `name` and `size`"));
    }
    Ok(all.into_iter().map(|(key, text)| (key.name, text)).collect())
}
