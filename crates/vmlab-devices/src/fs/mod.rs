//! virtio-fs: a FUSE server for the guest's kernel.

mod buffers;
mod device;

pub use device::{Fs, MAX_TAG};
pub use vmlab_fuse::{
    CachePolicy, FileSystem, Landlock, Passthrough, PassthroughConfig, Restrictions, Server,
};
