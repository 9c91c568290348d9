//! Serves a directory to whoever connects to a socket first, as other vhost-user file servers do:
//! `share SOCKET DIR [fixed|auto|coherent]`. The benchmarks put it in their place.
#![allow(clippy::unwrap_used, reason = "a program to measure with")]

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use vmlab_devices::fs::{CachePolicy, Fs, Passthrough, PassthroughConfig, Server};
use vmlab_devices::transport::vhost_user::serve;

fn main() {
    let args: Vec<_> = std::env::args().skip(1).collect();
    let (socket, dir, cache) = match args.as_slice() {
        [socket, dir] => (socket, dir, "auto"),
        [socket, dir, cache] => (socket, dir, cache.as_str()),
        _ => panic!("share SOCKET DIR [fixed|auto|coherent]"),
    };
    let cache = match cache {
        "fixed" => CachePolicy::Fixed,
        "auto" => CachePolicy::Auto,
        "coherent" => CachePolicy::Coherent,
        other => panic!("{other} is no cache policy"),
    };
    let config = PassthroughConfig { cache, submounts: false, ..Default::default() };
    let listener = UnixListener::bind(socket).unwrap();
    let (connection, _) = listener.accept().unwrap();
    let server = Server::new(Passthrough::new(Path::new(dir), config).unwrap());
    serve(Arc::new(Fs::new(server, "share", 1)), connection).unwrap().wait().unwrap();
}
