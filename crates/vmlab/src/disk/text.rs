//! Disks as users write them.

use std::path::PathBuf;
use std::str::FromStr;

use vmlab_artifacts::nearest;

use super::serving::Serving;
use super::{CloneMode, Disk, DiskSource, Mkfs, MountPoint};
use crate::Error;
use crate::config::DiskWrites;
use crate::units::Bytes;

/// What users call what becomes of writes.
pub(crate) const MODES: [(&str, DiskWrites); 4] = [
    ("discard", DiskWrites::Discarded),
    ("rw", DiskWrites::Kept),
    ("ro", DiskWrites::Refused),
    ("clone", DiskWrites::Cloned(CloneMode::Auto)),
];

/// The keys of `KEY=VALUE,...`.
const KEYS: [&str; 25] = [
    "size",
    "fs",
    "name",
    "label",
    "uuid",
    "mount",
    "mount-option",
    "mkfs-option",
    "content",
    "path",
    "image",
    "mode",
    "clone",
    "keep",
    "read-only",
    "serve",
    "throttle",
    "iops",
    "iops-burst",
    "bps",
    "bps-burst",
    "fault",
    "record",
    "block-size",
    "queues",
];

fn writes_named(name: &str) -> Option<DiskWrites> {
    MODES.iter().find(|(known, _)| *known == name).map(|(_, writes)| *writes)
}

impl FromStr for Disk {
    type Err = Error;

    /// Reads `FILE[:NAME][:ro|rw|discard|clone]`, or `KEY=VALUE,...` as [`Disk::from_pairs`] does. A relative path
    /// is taken from the working directory. Writes to a file are discarded unless said otherwise.
    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = |why: &str| Error::Disk { text: text.to_owned(), why: why.to_owned() };
        let first = text.split([',', ':', '/']).next().unwrap_or_default();
        if let Some((key, _)) = first.split_once('=')
            && nearest(key, &KEYS).is_some()
        {
            let pairs = text.split(',').map(|part| part.split_once('=').unwrap_or((part, "true")));
            return Self::from_pairs(pairs).map_err(|why| bad(&why));
        }
        let mut parts: Vec<&str> = text.split(':').collect();
        let mode = parts.last().and_then(|last| writes_named(last)).filter(|_| parts.len() > 1);
        if mode.is_some() {
            parts.pop();
        }
        let (path, name) = match parts[..] {
            [path] => (path, None),
            [path, name] => (path, Some(name)),
            _ => return Err(bad("it has too many parts")),
        };
        if path.is_empty() {
            return Err(bad("the file is empty"));
        }
        let mut disk = Self::of(DiskSource::File(path.into()), DiskWrites::Discarded);
        disk.name = name.map(str::to_owned);
        disk.writes = mode.unwrap_or(DiskWrites::Discarded);
        disk.check().map_err(|error| match error {
            Error::Disk { why, .. } => bad(&why),
            other => other,
        })?;
        Ok(disk)
    }
}

impl Disk {
    /// Reads a disk from keys and values: `size`, `fs`, `name`, `label`, `uuid`, `mount` (a path or `none`),
    /// `content`, `path` (or `image`), `mode` (`discard`, `rw`, `ro`, `clone`), `clone` (`auto`, `reflink`, `copy`, `overlay`),
    /// `keep`, `read-only`, `serve`, `throttle` (or `iops`, `iops-burst`, `bps` and `bps-burst`), `record`,
    /// `block-size`, `queues`, and `mount-option`, `mkfs-option` and `fault`, which can be there several times.
    ///
    /// # Errors
    /// What is wrong with them, in words.
    pub fn from_pairs<'a>(
        pairs: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self, String> {
        let mut single: [Option<&str>; KEYS.len()] = [None; KEYS.len()];
        let (mut mount_options, mut mkfs_options, mut faults) =
            (Vec::new(), Vec::new(), Vec::new());
        let mut rates: Vec<String> = Vec::new();
        for (key, value) in pairs {
            let written = key.replace('_', "-");
            let several = |key: &&str| key.ends_with("-option") || *key == "fault";
            let plural = written.strip_suffix('s').filter(several);
            let known = plural.unwrap_or(&written);
            match (known, KEYS.iter().position(|name| *name == known)) {
                ("mount-option", _) => mount_options.push(value.to_owned()),
                ("mkfs-option", _) => mkfs_options.push(value.to_owned()),
                ("fault", _) => faults.push(value.to_owned()),
                ("iops" | "iops-burst" | "bps" | "bps-burst", _) => {
                    rates.push(format!("{known}={value}"));
                }
                ("throttle", _) => rates.push(value.to_owned()),
                (_, Some(at)) if single[at].is_none() => single[at] = Some(value),
                (_, Some(_)) => return Err(format!("`{key}` is there twice")),
                (_, None) => {
                    let hint = nearest(known, &KEYS);
                    let hint = hint.map(|near| format!(": did you mean `{near}`?"));
                    return Err(format!("`{key}` is no key{}", hint.unwrap_or_default()));
                }
            }
        }
        let [
            size,
            fs,
            name,
            label,
            uuid,
            mount,
            _,
            _,
            content,
            path,
            image,
            mode,
            clone,
            keep,
            read_only,
            serve,
            _,
            _,
            _,
            _,
            _,
            _,
            record,
            block_size,
            queues,
        ] = single;
        if path.is_some() && image.is_some() {
            return Err("`image` says the same as `path`".to_owned());
        }
        let yes = |key: &str, value| match value {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(other) => Err(format!("`{key}` is true or false, not `{other}`")),
        };
        let number = |key: &str, value: Option<&str>| {
            let read = |text: &str| text.parse().map_err(|_| format!("`{key}={text}`: no number"));
            value.map(read).transpose()
        };
        let owned = |value: Option<&str>| value.map(str::to_owned);
        let given = Given {
            size: size.map(|size| size.parse::<Bytes>().map_err(|e| e.to_string())).transpose()?,
            fs: owned(fs),
            name: owned(name),
            label: owned(label),
            uuid: owned(uuid),
            mount: owned(mount),
            mount_options,
            mkfs_options,
            content: content.map(PathBuf::from),
            image: path.or(image).map(PathBuf::from),
            mode: match mode {
                Some(mode) => Some(writes_named(mode).ok_or_else(|| {
                    format!("`{mode}` is no mode; there are discard, rw, ro and clone")
                })?),
                None => None,
            },
            clone: clone.map(str::parse).transpose()?,
            keep: keep.map(PathBuf::from),
            read_only: yes("read-only", read_only)?,
            serving: Serving {
                own: yes("serve", serve)?,
                throttle: (!rates.is_empty()).then(|| rates.join(",")),
                faults,
                record: record.map(PathBuf::from),
                block_size: number("block-size", block_size)?,
                queues: number("queues", queues)?,
            },
        };
        given.disk()
    }
}

/// What was given of a disk, wherever.
#[derive(Debug, Default)]
pub(crate) struct Given {
    pub(crate) size: Option<Bytes>,
    pub(crate) fs: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) label: Option<String>,
    pub(crate) uuid: Option<String>,
    pub(crate) mount: Option<String>,
    pub(crate) mount_options: Vec<String>,
    pub(crate) mkfs_options: Vec<String>,
    pub(crate) content: Option<PathBuf>,
    pub(crate) image: Option<PathBuf>,
    pub(crate) mode: Option<DiskWrites>,
    pub(crate) clone: Option<CloneMode>,
    pub(crate) keep: Option<PathBuf>,
    pub(crate) read_only: bool,
    pub(crate) serving: Serving,
}

impl Given {
    /// The disk, if all of it goes together.
    ///
    /// # Errors
    /// What does not, in words.
    pub(crate) fn disk(self) -> Result<Disk, String> {
        let of_filesystem = [
            (self.label.is_some(), "label"),
            (self.uuid.is_some(), "uuid"),
            (self.content.is_some(), "content"),
            (!self.mkfs_options.is_empty(), "mkfs-options"),
        ];
        let fs = self.fs.filter(|fs| fs != "raw");
        let needs_one = of_filesystem.iter().find(|(given, _)| *given);
        if let (None, Some((_, key))) = (&fs, needs_one) {
            return Err(format!("`{key}` is of a new filesystem, and there is no `fs`"));
        }
        let mut disk = match (self.image, self.size) {
            (Some(_), Some(_)) => return Err("it has both `path` and `size`".to_owned()),
            (None, None) => return Err("it has neither `size` nor `path`".to_owned()),
            (Some(_), None) if fs.is_some() => {
                return Err(
                    "a file has the filesystem that it has: `fs` is for new disks".to_owned()
                );
            }
            (Some(path), None) if path.as_os_str().is_empty() => {
                return Err("its file is empty".to_owned());
            }
            (Some(path), None) => Disk::of(DiskSource::File(path), DiskWrites::Discarded),
            (None, Some(size)) => Disk::blank(size),
        };
        if let Some(name) = fs {
            let (label, uuid) = (self.label, self.uuid);
            let (options, content) = (self.mkfs_options, self.content);
            disk = disk.formatted(Mkfs { name, label, uuid, options, content });
        }
        disk.writes = match (self.mode, self.clone, self.read_only) {
            (Some(mode), None, false) => mode,
            (None | Some(DiskWrites::Cloned(_)), Some(how), false) => DiskWrites::Cloned(how),
            (None, None, true) => DiskWrites::Refused,
            (None, None, false) => disk.writes,
            _ => return Err("only one of `mode`, `clone` and `read-only` can be given".to_owned()),
        };
        disk.name = self.name;
        disk.mount = match self.mount {
            None => MountPoint::Usual,
            Some(none) if none == "none" => MountPoint::Nowhere,
            Some(path) => MountPoint::At(path.into()),
        };
        disk.mount_options = self.mount_options;
        disk.keep = self.keep;
        disk.serve = self.serving.options()?;
        match disk.check() {
            Ok(()) => Ok(disk),
            Err(Error::Disk { why, .. }) => Err(why),
            Err(other) => Err(other.to_string()),
        }
    }
}
