//! An ELF file with DWARF: a linked kernel, or a module, whose sections have no places yet.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::path::Path;

use gimli::{EndianArcSlice, RunTimeEndian};
use object::read::ReadRef;
use object::{
    Object, ObjectKind, ObjectSection, ObjectSymbol, ReadCache, RelocationKind, RelocationTarget,
    SectionIndex, SectionKind, SymbolKind,
};

use crate::events::{Location, Place};

type Dwarf = gimli::Dwarf<EndianArcSlice<RunTimeEndian>>;

/// The kernel counts what pads a function, and an ELF file does not. No kernel aligns functions to more.
const MAX_PADDING: u64 = 64;

/// A file that each kernel has, and a function in it that is never inlined. `decode_stacktrace.sh` takes the same.
const MAIN: &str = "init/main.c";
const FUNCTION_OF_MAIN: &str = "kernel_init";

/// A function.
#[derive(Debug, Clone, Copy)]
struct Function {
    address: u64,
    size: u64,
    /// Whether it is the last of its section. To the kernel it reaches as far as the memory that the section is in.
    last: bool,
}

impl Function {
    /// Whether it is as long as the kernel says.
    fn fits(&self, size: u64) -> bool {
        self.size <= size && (self.last || size - self.size < MAX_PADDING)
    }
}

/// The places of a module's sections, which overlap in its file, are apart by whole such.
const SECTION_ALIGNMENT: u64 = 4096;

/// The longest section that is read: four times what the largest of Debian's kernels has. A file may claim anything.
const MAX_SECTION: u64 = 2 << 30;

/// What is known of the code in a file.
pub(super) struct ObjectFile {
    context: addr2line::Context<EndianArcSlice<RunTimeEndian>>,
    /// All functions of a name.
    functions: HashMap<String, Vec<Function>>,
}

/// Whether a file is ELF, and has debug information. It is not read as a whole for that.
pub(super) fn has_debug_info(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return false };
    let cache = ReadCache::new(file);
    object::File::parse(&cache).is_ok_and(|file| file.section_by_name(".debug_info").is_some())
}

impl ObjectFile {
    /// A linked kernel. It may be large, so that only what is needed of it is read.
    pub(super) fn of_kernel(path: &Path) -> Option<Self> {
        let cache = ReadCache::new(File::open(path).ok()?);
        Self::read(&object::File::parse(&cache).ok()?)
    }

    /// A module.
    pub(super) fn of_module(content: &[u8]) -> Option<Self> {
        Self::read(&object::File::parse(content).ok()?)
    }

    fn read<'data, R: ReadRef<'data>>(file: &object::File<'data, R>) -> Option<Self> {
        file.section_by_name(".debug_info")?;
        let places = places(file);
        let endian =
            if file.is_little_endian() { RunTimeEndian::Little } else { RunTimeEndian::Big };
        let dwarf = Dwarf::load(|id| {
            let content = match file.section_by_name(id.name()) {
                Some(section) => relocated(file, &section, &places)?,
                None => Vec::new(),
            };
            Ok::<_, object::Error>(EndianArcSlice::new(content.into(), endian))
        });
        let context = addr2line::Context::from_dwarf(dwarf.ok()?).ok()?;
        let mut functions: HashMap<String, Vec<Function>> = HashMap::new();
        let mut last: HashMap<SectionIndex, u64> = HashMap::new();
        let code = || file.symbols().filter(|symbol| symbol.kind() == SymbolKind::Text);
        for symbol in code() {
            if let Some(section) = symbol.section_index() {
                let last = last.entry(section).or_default();
                *last = symbol.address().max(*last);
            }
        }
        for symbol in code() {
            let (Some(section), Ok(name)) = (symbol.section_index(), symbol.name()) else {
                continue;
            };
            let function = Function {
                address: place(&places, section).wrapping_add(symbol.address()),
                size: symbol.size(),
                last: last.get(&section) == Some(&symbol.address()),
            };
            functions.entry(name.to_owned()).or_default().push(function);
        }
        Some(Self { context, functions })
    }

    /// What the paths of a kernel's sources begin with: packages name directories of the machine that built them.
    pub(super) fn sources(&self) -> Option<String> {
        let function = self.functions.get(FUNCTION_OF_MAIN)?.first()?;
        let location = self.context.find_location(function.address).ok()??;
        location.file?.strip_suffix(MAIN).map(str::to_owned)
    }

    /// The function at an address, how far it is from its start, and where in the sources that is.
    pub(super) fn function_at(&self, address: u64) -> Option<(&str, u64, Vec<Location>)> {
        let all =
            self.functions.iter().flat_map(|(name, all)| all.iter().map(move |one| (name, one)));
        let holding = all.filter(|(_, function)| {
            address.checked_sub(function.address).is_some_and(|offset| offset < function.size)
        });
        // A module's first and last function have these names beside their own.
        let second = |name: &str| matches!(name, "init_module" | "cleanup_module");
        let (name, function) = holding.min_by_key(|(name, _)| (second(name), *name))?;
        Some((name, address - function.address, self.lines_of(address).unwrap_or_default()))
    }

    /// Where an instruction is in the sources, the innermost of inlined functions first. `None` if this is not
    /// the file of that code, or it has several such functions.
    pub(super) fn locate(&self, place: &Place<'_>) -> Option<Vec<Location>> {
        let functions = self.functions.get(place.function)?;
        let mut functions = functions.iter().filter(|function| function.fits(place.size));
        let function = functions.next()?;
        if functions.any(|other| other.address != function.address) || place.offset >= function.size
        {
            return None;
        }
        self.lines_of(function.address.wrapping_add(place.offset))
    }

    fn lines_of(&self, address: u64) -> Option<Vec<Location>> {
        let mut frames = self.context.find_frames(address).skip_all_loads().ok()?;
        let mut found: Vec<Location> = Vec::new();
        while let Ok(Some(frame)) = frames.next() {
            let Some(location) = frame.location else { continue };
            let (Some(file), Some(line)) = (location.file, location.line) else { continue };
            let function = frame.function.and_then(|name| Some(name.raw_name().ok()?.into_owned()));
            // A module's file may begin with the directory that it was built in, which is made to be this one.
            let file = file.strip_prefix("./").unwrap_or(file).to_owned();
            found.push(Location { file, line, inlined: function });
        }
        // The outermost is the function that the report names.
        found.last_mut()?.inlined = None;
        Some(found)
    }
}

/// Sections with code: name, length in bytes, and the place that [`ObjectFile`] gives it.
pub(super) fn code_sections(content: &[u8]) -> Vec<(String, u64, u64)> {
    let Ok(file) = object::File::parse(content) else { return Vec::new() };
    let places = places(&file);
    let code = file.sections().filter(|section| section.kind() == SectionKind::Text);
    let one = |section: object::Section<'_, '_>| {
        Some((section.name().ok()?.to_owned(), section.size(), place(&places, section.index())))
    };
    code.filter_map(one).collect()
}

/// Where the sections are that have addresses of their own only once they are loaded.
fn places<'data, R: ReadRef<'data>>(file: &object::File<'data, R>) -> HashMap<SectionIndex, u64> {
    let mut places = HashMap::new();
    if file.kind() == ObjectKind::Relocatable {
        let mut next = SECTION_ALIGNMENT;
        for section in file.sections().filter(|section| section.kind() == SectionKind::Text) {
            places.insert(section.index(), next);
            let size = section.size().div_ceil(SECTION_ALIGNMENT).saturating_add(1);
            next = next.saturating_add(size.saturating_mul(SECTION_ALIGNMENT));
        }
    }
    places
}

fn place(places: &HashMap<SectionIndex, u64>, section: SectionIndex) -> u64 {
    places.get(&section).copied().unwrap_or(0)
}

/// A section's content with all addresses put into it that a linker would.
fn relocated<'data, R: ReadRef<'data>>(
    file: &object::File<'data, R>,
    section: &object::Section<'data, '_, R>,
    places: &HashMap<SectionIndex, u64>,
) -> Result<Vec<u8>, object::Error> {
    let compressed = section.compressed_data()?;
    if compressed.uncompressed_size > MAX_SECTION {
        return Ok(Vec::new());
    }
    let mut content = compressed.decompress().map(Cow::into_owned)?;
    if file.kind() != ObjectKind::Relocatable {
        return Ok(content);
    }
    for (offset, relocation) in section.relocations() {
        if relocation.kind() != RelocationKind::Absolute {
            continue;
        }
        let target = match relocation.target() {
            RelocationTarget::Symbol(index) => {
                let symbol = file.symbol_by_index(index)?;
                let base = symbol.section_index().map_or(0, |section| place(places, section));
                base.wrapping_add(symbol.address())
            }
            RelocationTarget::Section(index) => place(places, index),
            _ => 0,
        };
        let value = target.wrapping_add_signed(relocation.addend()).to_le_bytes();
        let width = usize::from(relocation.size() / 8).min(value.len());
        let Ok(start) = usize::try_from(offset) else { continue };
        // What is beyond the section's end is in a file that was made to harm.
        if let Some(bytes) = start.checked_add(width).and_then(|end| content.get_mut(start..end)) {
            bytes.copy_from_slice(&value[..width]);
        }
    }
    Ok(content)
}
