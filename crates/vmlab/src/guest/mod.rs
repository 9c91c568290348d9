//! The session with the agent in a guest: commands, their streams, and how they end.

mod command;
mod connection;
mod copy;
mod environment;
mod kernel_log;
pub(crate) mod qga;
mod streams;

pub use command::{Child, ChildControl, Command, ExitStatus, Output, Stdio};
pub use copy::CopySide;
pub(crate) use copy::shown;
pub use environment::{Environment, GuestUser};
pub use kernel_log::{KernelLog, LogLevel, LogMark, LogRecord};
pub(crate) use kernel_log::{events_of, parse as parse_log_record};
pub use streams::{ChildStderr, ChildStdin, ChildStdout};
pub use vmlab_wire::message::TerminalSize;

pub(crate) use connection::{Connection, Greeting, Held, Lost};
