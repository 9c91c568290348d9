//! The session with the agent in a guest: commands, their streams, and how they end.

mod command;
mod connection;
mod environment;
pub(crate) mod qga;
mod streams;

pub use command::{Child, ChildControl, Command, ExitStatus, Output, Stdio};
pub use environment::{Environment, GuestUser};
pub use streams::{ChildStderr, ChildStdin, ChildStdout};
pub use vmlab_wire::message::TerminalSize;

pub(crate) use connection::{Connection, Greeting, Held, Lost};
