//! A writer of small ISO 9660 images (ECMA-119) with the names of Rock Ridge (IEEE P1282): one
//! directory, read-only files of root.

/// The size of a logical sector, and of a logical block.
pub(super) const SECTOR: usize = 2048;

/// The system area, which is the image's user's.
const SYSTEM_SECTORS: usize = 16;

/// Where the descriptors and tables are.
const PRIMARY_DESCRIPTOR: usize = SYSTEM_SECTORS;
const TERMINATOR: usize = 17;
const PATH_TABLE_LITTLE: usize = 18;
const PATH_TABLE_BIG: usize = 19;
const ROOT_DIRECTORY: usize = 20;

/// The first sector of the first file.
pub(super) const FIRST_FILE: usize = 21;

/// The path table of a root directory alone: one record of a one-byte name (9.4), padded to be even.
const PATH_TABLE_LEN: u32 = 10;

/// File flags (9.1.6).
const DIRECTORY: u8 = 1 << 1;

/// A time that all files have, so that the image depends on nothing but its content: 1980-01-01,
/// in years since 1900, month, day, hour, minute, second, zone (9.1.5).
const TIME: [u8; 7] = [80, 1, 1, 0, 0, 0, 0];

const DIRECTORY_MODE: u32 = 0o040_555;
const FILE_MODE: u32 = 0o100_444;

/// A file of the root directory.
pub(super) struct File<'a> {
    /// By Rock Ridge.
    pub(super) name: &'a str,
    /// For those who know no Rock Ridge: eight and three upper case characters (7.5, 10.1).
    pub(super) short_name: &'a str,
    pub(super) content: &'a [u8],
    /// The file begins at a multiple of so many sectors.
    pub(super) align: usize,
}

/// The first sector of each file.
pub(super) fn places(files: &[File<'_>]) -> Vec<usize> {
    let mut next = FIRST_FILE;
    let mut place = |file: &File<'_>| {
        let place = next.next_multiple_of(file.align);
        next = place + file.content.len().div_ceil(SECTOR);
        place
    };
    files.iter().map(&mut place).collect()
}

/// The image. The system area begins with `system`.
///
/// The names are this crate's own: few enough for one sector of directory, and short.
pub(super) fn image(label: &str, system: &[u8], files: &[File<'_>]) -> Vec<u8> {
    let places = places(files);
    // The last file's last unit is whole.
    let last = places.last().zip(files.last());
    let sectors = last.map_or(FIRST_FILE, |(place, file)| {
        place + file.content.len().div_ceil(SECTOR).next_multiple_of(file.align)
    });
    let mut image = vec![0; sectors * SECTOR];
    let mut put = |sector: usize, bytes: &[u8]| {
        image[sector * SECTOR..][..bytes.len()].copy_from_slice(bytes);
    };
    put(0, system);
    put(PRIMARY_DESCRIPTOR, &primary_descriptor(label, sectors as u32));
    // Type, standard identifier, version (8.3).
    put(TERMINATOR, b"\xffCD001\x01");
    put(PATH_TABLE_LITTLE, &path_table(u32::to_le_bytes, u16::to_le_bytes));
    put(PATH_TABLE_BIG, &path_table(u32::to_be_bytes, u16::to_be_bytes));
    put(ROOT_DIRECTORY, &root_directory(files, &places));
    for (file, &place) in files.iter().zip(&places) {
        put(place, file.content);
    }
    image
}

/// A number in both byte orders (7.2.3, 7.3.3).
fn both_16(value: u16) -> [u8; 4] {
    let mut bytes = [0; 4];
    bytes[..2].copy_from_slice(&value.to_le_bytes());
    bytes[2..].copy_from_slice(&value.to_be_bytes());
    bytes
}

fn both_32(value: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&value.to_le_bytes());
    bytes[4..].copy_from_slice(&value.to_be_bytes());
    bytes
}

/// The primary volume descriptor (8.4). Offsets are the standard's byte positions less one.
fn primary_descriptor(label: &str, sectors: u32) -> Vec<u8> {
    let mut descriptor = vec![0; SECTOR];
    let mut put = |at: usize, bytes: &[u8]| descriptor[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x01CD001\x01");
    put(8, &[b' '; 64]);
    put(40, label.as_bytes());
    put(80, &both_32(sectors));
    put(120, &both_16(1)); // volumes in the set
    put(124, &both_16(1)); // the number of this one
    put(128, &both_16(SECTOR as u16));
    put(132, &both_32(PATH_TABLE_LEN));
    put(140, &(PATH_TABLE_LITTLE as u32).to_le_bytes());
    put(148, &(PATH_TABLE_BIG as u32).to_be_bytes());
    put(156, &record(b"\0", ROOT_DIRECTORY, SECTOR, DIRECTORY, &[]));
    // Names of the set, the publisher, the preparer, the application, and of three files: none.
    put(190, &[b' '; 623]);
    // Four dates, none of them given: digits and a zone.
    for at in [813, 830, 847, 864] {
        put(at, &[b'0'; 16]);
    }
    put(881, &[1]); // version of the file structure
    descriptor
}

fn path_table(u32_bytes: fn(u32) -> [u8; 4], u16_bytes: fn(u16) -> [u8; 2]) -> Vec<u8> {
    let mut table = vec![1, 0]; // length of the name, of the extended attributes
    table.extend(u32_bytes(ROOT_DIRECTORY as u32));
    table.extend(u16_bytes(1)); // the parent is the root itself
    table.extend([0, 0]); // the name, and padding
    table
}

fn root_directory(files: &[File<'_>], places: &[usize]) -> Vec<u8> {
    // SP says that system use fields are used, ER by which standard; both belong to the first record.
    let mut own = b"SP\x07\x01\xbe\xef\x00".to_vec();
    own.extend(b"ER\x12\x01\x0a\x00\x00\x01RRIP_1991A");
    own.extend(posix(DIRECTORY_MODE, 2));
    let mut directory = record(b"\0", ROOT_DIRECTORY, SECTOR, DIRECTORY, &own);
    let parent = posix(DIRECTORY_MODE, 2);
    directory.extend(record(b"\x01", ROOT_DIRECTORY, SECTOR, DIRECTORY, &parent));
    // The standard wants them sorted by the short name.
    let mut order: Vec<_> = files.iter().zip(places).collect();
    order.sort_by_key(|(file, _)| file.short_name);
    for (file, &place) in order {
        let mut fields = posix(FILE_MODE, 1);
        fields.extend(b"NM");
        fields.extend([5 + file.name.len() as u8, 1, 0]);
        fields.extend(file.name.as_bytes());
        let short = format!("{};1", file.short_name);
        directory.extend(record(short.as_bytes(), place, file.content.len(), 0, &fields));
    }
    directory
}

/// The PX field: mode, links, user, group.
fn posix(mode: u32, links: u32) -> Vec<u8> {
    let mut field = b"PX\x24\x01".to_vec();
    for value in [mode, links, 0, 0] {
        field.extend(both_32(value));
    }
    field
}

/// A directory record (9.1).
fn record(name: &[u8], place: usize, len: usize, flags: u8, system_use: &[u8]) -> Vec<u8> {
    let mut record = vec![0, 0];
    record.extend(both_32(place as u32));
    record.extend(both_32(len as u32));
    record.extend(TIME);
    record.extend([flags, 0, 0]); // not interleaved
    record.extend(both_16(1)); // the volume
    record.push(name.len() as u8);
    record.extend(name);
    if name.len().is_multiple_of(2) {
        record.push(0);
    }
    record.extend(system_use);
    if !record.len().is_multiple_of(2) {
        record.push(0);
    }
    record[0] = record.len() as u8;
    record
}
