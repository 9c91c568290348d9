//! The inodes that the guest's kernel knows, found by what they are and by node id.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;
use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use rustix::fs::{FileType, Statx, StatxFlags, makedev};
use rustix::io::Errno;

use crate::filesystem::Result;
use crate::types::{Name, NodeId};

/// What a file is, however it is called.
///
/// The mount is part of it: a directory that is mounted twice would otherwise be one inode at two places,
/// one of them perhaps below the other or read-only. The birth time tells a file from an earlier one with
/// the same inode number. Where there is none, the type at least is what was checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) mount: u64,
    pub(super) device: u64,
    pub(super) ino: u64,
    pub(super) birth: (i64, u32),
    /// The file type's bits of the mode.
    kind: u32,
}

impl Key {
    /// The key of what was looked at. Where files keep no birth time for life, `births` is false.
    pub(super) fn of(stat: &Statx, births: bool) -> Self {
        let has = |flag: StatxFlags| stat.stx_mask & flag.bits() != 0;
        let birth = (stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec);
        Self {
            // Linux before 5.8 does not tell it.
            mount: if has(StatxFlags::MNT_ID) { stat.stx_mnt_id } else { 0 },
            device: makedev(stat.stx_dev_major, stat.stx_dev_minor),
            ino: stat.stx_ino,
            birth: if births && has(StatxFlags::BTIME) { birth } else { (0, 0) },
            kind: FileType::from_raw_mode(stat.stx_mode.into()).as_raw_mode(),
        }
    }
}

/// Where an inode was seen last.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) parent: Arc<Inode>,
    pub(super) name: CString,
}

/// A descriptor of an inode, kept for as long as there is a reason.
#[derive(Debug)]
struct Kept {
    fd: Arc<OwnedFd>,
    /// It is a directory that is used; may be closed at any time.
    cached: bool,
    /// It has lost the name by which it was known. Holds one count of [`Pins`].
    pinned: Option<Arc<()>>,
    /// How many handles are open.
    opens: u32,
}

/// Counts the inodes that only a descriptor reaches.
#[derive(Debug, Default)]
pub(super) struct Pins(Arc<()>);

impl Pins {
    /// One more, if there are fewer than `most`.
    pub(super) fn take(&self, most: usize) -> Option<Arc<()>> {
        (Arc::strong_count(&self.0) <= most).then(|| Arc::clone(&self.0))
    }

    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        Arc::strong_count(&self.0) - 1
    }
}

#[derive(Debug, Default)]
struct State {
    place: Option<Place>,
    /// Whether the table has forgotten it. It gets no place then, for nobody would leave that again.
    forgotten: bool,
    kept: Option<Kept>,
}

/// A file or directory that the guest's kernel has a reference of, or that leads to one.
#[derive(Debug)]
pub(super) struct Inode {
    pub(super) id: NodeId,
    pub(super) key: Key,
    pub(super) kind: FileType,
    /// Whether birth times identify files on its mount.
    pub(super) births: bool,
    /// References of the guest's kernel.
    lookups: AtomicU64,
    /// Inodes whose place is in it.
    children: AtomicU64,
    /// Whether its cached descriptor was used since that was last asked.
    used: AtomicBool,
    /// Whether its last list said nothing of files but their names.
    pub(super) bare: AtomicBool,
    state: Mutex<State>,
}

impl Inode {
    fn new(id: NodeId, key: Key, kind: FileType, births: bool) -> Self {
        Self {
            id,
            key,
            kind,
            births,
            lookups: AtomicU64::new(0),
            children: AtomicU64::new(0),
            used: AtomicBool::new(false),
            bare: AtomicBool::new(false),
            state: Mutex::default(),
        }
    }

    /// The same inode for another table, without a place. Of its descriptor, what handles and the cache have of
    /// it is theirs to add.
    fn copy(&self, pins: &Pins) -> Self {
        let state = self.state();
        let pinned = state.kept.as_ref().filter(|kept| kept.pinned.is_some());
        let kept = pinned.map(|kept| Kept {
            fd: Arc::clone(&kept.fd),
            cached: false,
            pinned: Some(Arc::clone(&pins.0)),
            opens: 0,
        });
        let state = State { place: None, forgotten: state.forgotten, kept };
        let number = |from: &AtomicU64| AtomicU64::new(from.load(Ordering::SeqCst));
        Self {
            id: self.id,
            key: self.key,
            kind: self.kind,
            births: self.births,
            lookups: number(&self.lookups),
            children: number(&self.children),
            used: AtomicBool::new(false),
            bare: AtomicBool::new(self.bare.load(Ordering::Relaxed)),
            state: Mutex::new(state),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic runs while it is locked.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where it was seen last. One that never had a name, or has lost it, is out of reach.
    pub(super) fn place(&self) -> Result<Place> {
        self.state().place.clone().ok_or(Errno::STALE)
    }

    /// Tells it that the table has forgotten it. Gives the place, to be left.
    fn forgotten(&self) -> Option<Place> {
        let mut state = self.state();
        state.forgotten = true;
        state.place.take()
    }

    /// Whether it was seen last under this name.
    pub(super) fn is_at(&self, parent: &Arc<Self>, name: Name<'_>) -> bool {
        let state = self.state();
        state.place.as_ref().is_some_and(|place| place.is(parent, name.as_c_str()))
    }

    /// Its descriptor, if there is one.
    pub(super) fn kept(&self) -> Option<Arc<OwnedFd>> {
        let state = self.state();
        let kept = state.kept.as_ref()?;
        if kept.cached {
            self.used.store(true, Ordering::Relaxed);
        }
        Some(Arc::clone(&kept.fd))
    }

    /// Keeps a descriptor until [`uncache`](Self::uncache). Returns whether it was not kept so before.
    pub(super) fn cache(&self, fd: &Arc<OwnedFd>) -> bool {
        self.used.store(true, Ordering::Relaxed);
        !std::mem::replace(&mut self.keep(&mut self.state(), fd).cached, true)
    }

    /// Whether the cached descriptor was used since this was last asked.
    pub(super) fn was_used(&self) -> bool {
        self.used.swap(false, Ordering::Relaxed)
    }

    pub(super) fn uncache(&self) {
        self.no_longer(|kept| kept.cached = false);
    }

    /// Keeps a descriptor for as long as there is the inode, or until it is found under a name.
    pub(super) fn pin(&self, fd: &Arc<OwnedFd>, pin: Arc<()>) {
        self.keep(&mut self.state(), fd).pinned = Some(pin);
    }

    /// Keeps a descriptor until [`closed`](Self::closed) was called as often as this.
    pub(super) fn opened(&self, fd: &Arc<OwnedFd>) {
        self.keep(&mut self.state(), fd).opens += 1;
    }

    pub(super) fn closed(&self) {
        self.no_longer(|kept| kept.opens = kept.opens.saturating_sub(1));
    }

    fn keep<'a>(&self, state: &'a mut State, fd: &Arc<OwnedFd>) -> &'a mut Kept {
        let fd = Arc::clone(fd);
        state.kept.get_or_insert(Kept { fd, cached: false, pinned: None, opens: 0 })
    }

    fn no_longer(&self, reason: impl FnOnce(&mut Kept)) {
        let mut state = self.state();
        let Some(kept) = &mut state.kept else { return };
        reason(kept);
        let closed = (!kept.cached && kept.pinned.is_none() && kept.opens == 0)
            .then(|| state.kept.take())
            .flatten();
        // Closing can take time.
        drop(state);
        drop(closed);
    }

    /// Of two threads that take the last lookup and the last child at once, one at least must see both, so
    /// these counts have one order for all threads.
    fn wanted(&self) -> bool {
        self.lookups.load(Ordering::SeqCst) != 0
            || self.children.load(Ordering::SeqCst) != 0
            || self.id == NodeId::ROOT
    }
}

impl Place {
    fn is(&self, parent: &Arc<Inode>, name: &CStr) -> bool {
        Arc::ptr_eq(&self.parent, parent) && self.name.as_c_str() == name
    }

    /// The inode that was there is there no longer. Gives the parent if nobody wants it any more.
    fn leave(self) -> Option<Arc<Inode>> {
        let parent = self.parent;
        let last = parent.children.fetch_sub(1, Ordering::SeqCst) == 1;
        (last && !parent.wanted()).then_some(parent)
    }
}

#[derive(Debug, Default)]
struct Maps {
    nodes: HashMap<NodeId, Arc<Inode>>,
    keys: HashMap<Key, Arc<Inode>>,
}

/// All inodes.
#[derive(Debug)]
pub(super) struct Inodes {
    maps: RwLock<Maps>,
    next: AtomicU64,
    most: usize,
}

impl Inodes {
    /// Room for so many.
    pub(super) fn new(most: usize) -> Self {
        Self { maps: RwLock::default(), next: AtomicU64::new(NodeId::ROOT.0 + 1), most }
    }

    fn read(&self) -> RwLockReadGuard<'_, Maps> {
        self.maps.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Maps> {
        self.maps.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets everything and begins with this root. Node ids are not used again.
    pub(super) fn reset(&self, stat: &Statx, births: bool, fd: &Arc<OwnedFd>) {
        let key = Key::of(stat, births);
        let kind = FileType::from_raw_mode(stat.stx_mode.into());
        let root = Arc::new(Inode::new(NodeId::ROOT, key, kind, births));
        root.opened(fd);
        let mut maps = Maps::default();
        maps.nodes.insert(root.id, Arc::clone(&root));
        maps.keys.insert(key, root);
        self.clear(maps);
    }

    fn clear(&self, new: Maps) {
        let old = std::mem::replace(&mut *self.write(), new);
        // One by one, for otherwise the last child would take a whole chain of parents with it, each inside
        // of the other's destructor.
        for inode in old.nodes.values() {
            drop(inode.forgotten());
        }
    }

    pub(super) fn get(&self, node: NodeId) -> Result<Arc<Inode>> {
        self.read().nodes.get(&node).cloned().ok_or(Errno::STALE)
    }

    /// The inode with this key, if the guest's kernel has a reference of it.
    pub(super) fn find(&self, key: &Key) -> Option<Arc<Inode>> {
        self.read().keys.get(key).cloned()
    }

    /// The inode with this key, made if there is none, with one more reference.
    pub(super) fn refer(&self, key: Key, kind: FileType, births: bool) -> Result<Arc<Inode>> {
        if let Some(inode) = self.read().keys.get(&key) {
            // Removal asks again once it has the lock.
            inode.lookups.fetch_add(1, Ordering::SeqCst);
            return Ok(Arc::clone(inode));
        }
        let mut maps = self.write();
        let Maps { nodes, keys } = &mut *maps;
        if nodes.len() >= self.most && !keys.contains_key(&key) {
            return Err(Errno::NFILE);
        }
        let inode = match keys.entry(key) {
            Slot::Occupied(slot) => Arc::clone(slot.get()),
            Slot::Vacant(slot) => {
                let id = NodeId(self.next.fetch_add(1, Ordering::Relaxed));
                let inode = Arc::new(Inode::new(id, key, kind, births));
                nodes.insert(id, Arc::clone(&inode));
                Arc::clone(slot.insert(inode))
            }
        };
        inode.lookups.fetch_add(1, Ordering::SeqCst);
        Ok(inode)
    }

    /// Takes back references of the guest's kernel; more than there are do no harm.
    pub(super) fn forget(&self, node: NodeId, count: u64) {
        let maps = self.read();
        let Some(inode) = maps.nodes.get(&node) else { return };
        let less = |lookups: u64| Some(lookups.saturating_sub(count));
        let before = inode.lookups.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less);
        if before.is_ok_and(|before| before <= count) {
            let inode = Arc::clone(inode);
            drop(maps);
            self.release(inode);
        }
    }

    /// Remembers where an inode is. A pin is no longer needed then. Who has no reference of it may find that
    /// it was forgotten meanwhile.
    pub(super) fn set_place(&self, inode: &Arc<Inode>, parent: &Arc<Inode>, name: Name<'_>) {
        if inode.id == NodeId::ROOT || Arc::ptr_eq(inode, parent) {
            return;
        }
        let mut state = inode.state();
        if state.forgotten {
            return;
        }
        let old = match &state.place {
            Some(place) if place.is(parent, name.as_c_str()) => None,
            _ => {
                parent.children.fetch_add(1, Ordering::SeqCst);
                let (parent, name) = (Arc::clone(parent), name.as_c_str().to_owned());
                state.place.replace(Place { parent, name })
            }
        };
        let pinned = state.kept.as_ref().is_some_and(|kept| kept.pinned.is_some());
        drop(state);
        if pinned {
            inode.no_longer(|kept| kept.pinned = None);
        }
        if let Some(unwanted) = old.and_then(Place::leave) {
            self.release(unwanted);
        }
    }

    /// Forgets an inode that nobody wants, and the parents that were there for it alone.
    fn release(&self, inode: Arc<Inode>) {
        let mut next = Some(inode);
        while let Some(inode) = next {
            let mut maps = self.write();
            if inode.wanted() {
                return;
            }
            let in_maps = maps.nodes.remove(&inode.id);
            let by_key = match maps.keys.entry(inode.key) {
                Slot::Occupied(slot) if Arc::ptr_eq(slot.get(), &inode) => Some(slot.remove()),
                _ => None,
            };
            drop(maps);
            drop((in_maps, by_key));
            next = inode.forgotten().and_then(Place::leave);
        }
    }

    /// All inodes once more, and what each of them and of `open` has become. To be called while nothing is
    /// done with them.
    pub(super) fn duplicate<'a>(
        &self,
        root: &Arc<OwnedFd>,
        pins: &Pins,
        open: impl Iterator<Item = &'a Arc<Inode>>,
    ) -> (Self, HashMap<*const Inode, Arc<Inode>>) {
        let maps = self.read();
        let mut copies: HashMap<*const Inode, Arc<Inode>> = HashMap::new();
        let mut found: Vec<Arc<Inode>> = maps.nodes.values().map(Arc::clone).collect();
        found.extend(open.map(Arc::clone));
        let mut at = 0;
        while let Some(inode) = found.get(at) {
            let parent = inode.place().ok().map(|place| place.parent);
            copies.entry(Arc::as_ptr(inode)).or_insert_with(|| Arc::new(inode.copy(pins)));
            found.extend(parent.filter(|parent| !copies.contains_key(&Arc::as_ptr(parent))));
            at += 1;
        }
        for inode in &found {
            let place = inode.place().ok();
            let Some(copy) = copies.get(&Arc::as_ptr(inode)) else { continue };
            copy.state().place = place.and_then(|Place { parent, name }| {
                let parent = Arc::clone(copies.get(&Arc::as_ptr(&parent))?);
                Some(Place { parent, name })
            });
        }
        let copied = |inode: &Arc<Inode>| copies.get(&Arc::as_ptr(inode)).map(Arc::clone);
        let nodes = maps.nodes.iter().filter_map(|(id, inode)| Some((*id, copied(inode)?)));
        let keys = maps.keys.iter().filter_map(|(key, inode)| Some((*key, copied(inode)?)));
        let maps = Maps { nodes: nodes.collect(), keys: keys.collect() };
        if let Some(inode) = maps.nodes.get(&NodeId::ROOT) {
            inode.opened(root);
        }
        let next = AtomicU64::new(self.next.load(Ordering::Relaxed));
        (Self { maps: RwLock::new(maps), next, most: self.most }, copies)
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.read().nodes.len()
    }
}

impl Drop for Inodes {
    fn drop(&mut self) {
        self.clear(Maps::default());
    }
}
