//! Bootable disk images, made of a distribution's own packages without root's mounts or loop devices.
//!
//! mmdebstrap installs the packages into a directory, where `mke2fs -d` makes the root's file system
//! of it. The partition table is written here; GRUB, the same for BIOS and UEFI, is taken out of its
//! packages, so the host needs none. Under UEFI it is loaded by Debian's signed shim, so that secure
//! boot works.
//!
//! An image is kept under a key of its recipe and of the archive's state when it was built. The image
//! that was last built from a recipe is used again, whatever the archive has by now, until somebody
//! asks for a fresh one.

mod bootstrap;
mod disk;
mod entry;
mod error;
mod gpt;
mod grub;
mod recipe;

use std::fs::{self, File, OpenOptions, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

pub use error::ImageBuildError;
pub use recipe::{BootFirmware, DEFAULT_SIZE, ImageRecipe, MAX_SIZE, MIN_SIZE, RecipeError};

use crate::cache::Leases;
use crate::progress::waiting;
use crate::source::apt::{self, SuiteSources};
use crate::{Bound, Cache, ContentKey, Kind, Progress};

/// The cache kind of images.
const IMAGES: &str = "images";

/// What images may take on disk: about twenty of the usual ones. They can all be built again.
const MAX_BYTES: u64 = 10 << 30;

/// It, for whoever looks after the cache.
pub(crate) const KIND: Kind =
    Kind { name: IMAGES, bound: Bound::Bytes(MAX_BYTES), verify: entry::verify_all };

/// Raised when the same recipe, packages and scripts would give another image.
const BUILDER: &str = "image-1";

/// Where notes lie of which entry was last built from a recipe.
const LATEST: &str = ".latest";

/// An image in the cache.
#[derive(Debug, Clone)]
pub struct BuiltImage {
    /// A raw disk, which nobody may write to.
    pub path: PathBuf,
    /// The key of its entry, of the kind `images`.
    pub key: String,
    /// The date of the package lists that it was built from, as the archive writes it.
    pub date: String,
    /// Keeps the entry from being deleted as long as it is used.
    pub leases: Leases,
}

/// The image of a recipe: that which was last built from it if there is one, else a new one.
///
/// # Errors
/// [`ImageBuildError`].
pub fn build(
    cache: &Cache,
    recipe: &ImageRecipe,
    progress: &dyn Progress,
) -> Result<BuiltImage, ImageBuildError> {
    if let Some(image) = latest(cache, recipe)? {
        return Ok(image);
    }
    make(cache, recipe, false, progress)
}

/// The image of a recipe as the archive is now: asks for its lists, and builds a new image if they
/// are not those that it was last built from.
///
/// # Errors
/// [`ImageBuildError`].
pub fn refresh(
    cache: &Cache,
    recipe: &ImageRecipe,
    progress: &dyn Progress,
) -> Result<BuiltImage, ImageBuildError> {
    make(cache, recipe, true, progress)
}

fn make(
    cache: &Cache,
    recipe: &ImageRecipe,
    fresh: bool,
    progress: &dyn Progress,
) -> Result<BuiltImage, ImageBuildError> {
    bootstrap::check(recipe)?;
    let (distro, suite) = (recipe.distribution, &recipe.suite);
    let sources = apt::suite_sources(cache.root(), distro, suite, fresh, progress);
    let sources = sources.map_err(|source| ImageBuildError::Archive {
        recipe: recipe.to_string(),
        source: Box::new(source),
    })?;
    let key = recipe_key(recipe).field("archive", &sources.state);
    let key = format!("{}-{}-{}", recipe.distribution, recipe.suite, &key.finish()[..24]);
    let on_wait = waiting(progress, "building the same image");
    let build = |dir: &Path| build_entry(dir, &key, recipe, &sources, progress);
    let (dir, lease) = cache.get_or_build_leased(IMAGES, &key, entry::verify, build, on_wait)?;
    let leases = Leases::default();
    leases.add(lease);
    note_latest(cache, recipe, &key)?;
    Ok(BuiltImage { path: dir.join(entry::IMAGE), key, date: sources.date, leases })
}

/// The image that was last built from a recipe, as long as it is whole. Needs no network.
///
/// # Errors
/// [`ImageBuildError::Cache`].
pub fn latest(cache: &Cache, recipe: &ImageRecipe) -> Result<Option<BuiltImage>, ImageBuildError> {
    let Ok(key) = fs::read_to_string(latest_note(cache, recipe)) else { return Ok(None) };
    // A note can be damaged as any file, so a key that is none is no error.
    let Ok(Some(lease)) = cache.lease(IMAGES, &key) else { return Ok(None) };
    let Ok(Some(dir)) = cache.lookup(IMAGES, &key, entry::verify) else { return Ok(None) };
    let Ok(entry) = entry::read(&dir) else { return Ok(None) };
    if entry.recipe != *recipe {
        return Ok(None);
    }
    let leases = Leases::default();
    leases.add(lease);
    Ok(Some(BuiltImage { path: dir.join(entry::IMAGE), key, date: entry.date, leases }))
}

/// A key of all but the archive's state.
fn recipe_key(recipe: &ImageRecipe) -> ContentKey {
    recipe.add_to(ContentKey::new(BUILDER)).field("scripts", bootstrap::version())
}

/// The file that names the entry which was last built from a recipe.
fn latest_note(cache: &Cache, recipe: &ImageRecipe) -> PathBuf {
    let key = recipe_key(recipe).finish();
    cache.root().join(IMAGES).join(LATEST).join(&key[..32])
}

fn note_latest(cache: &Cache, recipe: &ImageRecipe, key: &str) -> Result<(), ImageBuildError> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let note = latest_note(cache, recipe);
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    let temporary = note.with_extension(format!("new.{}.{count}", std::process::id()));
    fs::create_dir_all(note.parent().unwrap_or(&note))
        .and_then(|()| fs::write(&temporary, key))
        .and_then(|()| fs::rename(&temporary, &note))
        .map_err(|e| ImageBuildError::cache_io("note the newest image in", &note, e))
}

fn build_entry(
    dir: &Path,
    key: &str,
    recipe: &ImageRecipe,
    sources: &SuiteSources,
    progress: &dyn Progress,
) -> Result<(), ImageBuildError> {
    let layout = disk::Layout::new(recipe.size, recipe.firmware, key)?;
    let path = dir.join(entry::IMAGE);
    let failed = |e| ImageBuildError::cache_io("write the image", &path, e);
    // An ordinary user's mmdebstrap works as one of that user's subordinate numbers, who may write to
    // these two for as long as nobody else can reach them.
    let shared = |path: &Path| {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        file.set_permissions(Permissions::from_mode(0o666))?;
        Ok(file)
    };
    let disk = shared(&path).map_err(failed)?;
    disk.set_len(layout.size).map_err(failed)?;
    let archive_path = dir.join("boot.tar");
    let archive = shared(&archive_path).map_err(failed)?;
    bootstrap::run(recipe, sources, &layout, (&disk, &archive), progress)?;

    progress.phase("make the disk");
    let files = bootstrap::boot_files(&archive).map_err(failed)?;
    let scratch = dir.join("scratch");
    fs::create_dir(&scratch).map_err(failed)?;
    layout.finish(&disk, &files, &scratch)?;
    fs::remove_dir_all(&scratch).and_then(|()| fs::remove_file(&archive_path)).map_err(failed)?;
    disk.set_permissions(Permissions::from_mode(0o444)).map_err(failed)?;
    entry::finish(dir, recipe, &sources.date).map_err(failed)
}

/// Copies an image, sharing its blocks or leaving holes where the file system can.
///
/// # Errors
/// [`ImageBuildError::Io`].
pub fn copy(image: &Path, to: &Path) -> Result<(), ImageBuildError> {
    let copied = || -> std::io::Result<()> {
        use std::os::unix::fs::FileExt;
        let from = File::open(image)?;
        let disk = File::create(to)?;
        if rustix::fs::ioctl_ficlone(&disk, &from).is_ok() {
            return Ok(());
        }
        let size = from.metadata()?.len();
        disk.set_len(size)?;
        let mut chunk = vec![0; 1 << 20];
        let mut at = 0;
        while let Some(data) = entry::next_data(&from, at)? {
            let want = (size - data).min(chunk.len() as u64) as usize;
            from.read_exact_at(&mut chunk[..want], data)?;
            for (index, block) in chunk[..want].chunks(4096).enumerate() {
                if block.iter().any(|byte| *byte != 0) {
                    disk.write_all_at(block, data + 4096 * index as u64)?;
                }
            }
            at = data + want as u64;
        }
        Ok(())
    };
    copied().map_err(|e| ImageBuildError::io("copy the image to", to, e))
}
